"""`mu.jit`: what is traced and compiled when, every option of `jax.jit`, and what is replayed on cached calls."""

from __future__ import annotations

import functools
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import errors


class Net(mu.Module):
    def __init__(self, size: int = 3) -> None:
        self.w = mu.Param(jnp.ones(size))
        self.n = mu.Variable(0)
        self.flag = False
        self.parts = [mu.Cache(0.0)]

    def __call__(self, x: Any) -> Any:
        self.n += 1
        return jnp.sum(self.w.value) * x + (1.0 if self.flag else 0.0)


def step(net: Net, x: Any) -> Any:
    return net(x)


# -- the twin ----------------------------------------------------------------------------------------------------


def test_the_program_is_the_one_threaded_by_hand() -> None:
    def by_hand(w: Any, n: Any, x: Any) -> Any:
        return jnp.sum(w) * x + 0.0, n + 1

    net = Net()
    jaxpr = mu.make_jaxpr(step)(net, 2.0)
    hand = jax.make_jaxpr(by_hand)(net.w.value, net.n.value, 2.0)
    assert [e.primitive for e in jaxpr.eqns] == [e.primitive for e in hand.eqns] or len(jaxpr.eqns) == len(hand.eqns)
    assert len(jaxpr.in_avals) == len(hand.in_avals) + 1, "the cache, which is not used"
    assert len(jaxpr.out_avals) == len(hand.out_avals)


@pytest.mark.parametrize("reads", [0, 1, 3])
@pytest.mark.parametrize("writes", [0, 1, 3])
def test_only_written_states_are_outputs(reads: int, writes: int) -> None:
    net = mu.Module()
    net.vs = [mu.Variable(jnp.float32(i)) for i in range(3)]

    def f() -> None:
        total = sum((net.vs[i].value for i in range(reads)), jnp.float32(0))
        for i in range(writes):
            net.vs[i].value = total

    assert len(mu.make_jaxpr(f)().out_avals) == writes
    pure = mu.jit(f)
    pure()
    assert [float(v) for v in net.vs][writes:] == [0.0, 1.0, 2.0][writes:]


# -- how often it is traced --------------------------------------------------------------------------------------


@pytest.fixture
def counted(traces: Any) -> Any:
    return traces.count(step)


def test_same_object(counted: Any, traces: Any) -> None:
    compiled = mu.jit(counted)
    net = Net()
    assert [float(compiled(net, x)) for x in (1.0, 2.0, 3.0)] == [3, 6, 9]
    assert traces.total == 1
    assert int(net.n) == 3


def test_equal_new_objects(counted: Any, traces: Any) -> None:
    compiled = mu.jit(counted)
    with traces.compilations() as first:
        compiled(Net(), 1.0)
    with traces.compilations() as later:
        for _ in range(3):
            net = Net()
            compiled(net, 1.0)
            assert int(net.n) == 1
    assert traces.total == 1
    assert sum("step" in name for name in first.names) == 1
    assert sum("step" in name for name in later.names) == 0


@pytest.mark.parametrize(
    "xs",
    [
        (jnp.float32(1), jnp.ones(4), jnp.float32(1), jnp.ones(4)),
        (1.0, jnp.float32(1), 2.0, jnp.float32(1)),
        (np.float32(1), np.ones(2, np.float32), np.float32(1)),
    ],
    ids=["shape", "weak type", "numpy"],
)
def test_another_type_and_back(xs: Any, counted: Any, traces: Any) -> None:
    compiled = mu.jit(counted)
    net = Net()
    for x in xs:
        np.testing.assert_allclose(compiled(net, x), 3 * jnp.asarray(x))
    assert traces.total == 2
    assert int(net.n) == len(xs)


def test_another_type_of_a_state_and_back(counted: Any, traces: Any) -> None:
    compiled = mu.jit(counted)
    net = Net()
    for size, dtype in ((3, jnp.float32), (5, jnp.float32), (3, jnp.float32), (5, jnp.float32)):
        net.w.value = jnp.ones(size, dtype)
        assert float(compiled(net, 1.0)) == size
    assert traces.total == 2


def test_a_state_that_changes_its_type_in_each_call(traces: Any) -> None:
    net = Net()

    @traces.count
    def grow(net: Net) -> None:
        net.w.value = jnp.concatenate([net.w.value, jnp.ones(1)])

    compiled = mu.jit(grow)
    for size in (4, 5, 6):
        compiled(net)
        assert net.w.shape == (size,)
    assert traces.total == 3
    net.w.value = jnp.ones(3)
    compiled(net)
    assert net.w.shape == (4,)
    assert traces.total == 3


def test_a_toggled_flag_and_back(counted: Any, traces: Any) -> None:
    compiled = mu.jit(counted)
    net = Net()
    for flag in (False, True, False, True):
        net.flag = flag
        assert float(compiled(net, 1.0)) == 3 + flag
    assert traces.total == 2


def test_a_flag_of_another_model_is_not_mixed_up(counted: Any, traces: Any) -> None:
    compiled = mu.jit(counted)
    a, b = Net(), Net()
    b.flag = True
    assert [float(compiled(net, 1.0)) for net in (a, b, a, b)] == [3, 4, 3, 4]
    assert traces.total == 2


def test_two_functions_share_a_state(traces: Any) -> None:
    net = Net()
    up = mu.jit(traces.count(lambda net: net.n.set(net.n + 1)))
    double = mu.jit(traces.count(lambda net: net.n.set(net.n * 2)))
    for _ in range(3):
        up(net)
        double(net)
    assert int(net.n) == 14
    assert traces.total == 2


def test_a_closure_and_its_rebinding(traces: Any) -> None:
    net = Net()
    compiled = mu.jit(traces.count(lambda x: net(x)))
    for _ in range(2):
        compiled(1.0)
    net = Net()
    net.w.value = net.w * 2
    assert float(compiled(1.0)) == 6
    assert traces.total == 1, "another model of the same structure"
    net = Net(5)
    assert float(compiled(1.0)) == 5
    assert traces.total == 2


def test_jit_made_anew_on_each_call_traces_anew(traces: Any) -> None:
    net = Net()
    for _ in range(2):
        mu.jit(traces.count(step))(net, 1.0)
    assert int(net.n) == 2


def test_reading_and_writing_between_calls_costs_no_trace(counted: Any, traces: Any) -> None:
    compiled = mu.jit(counted)
    net = Net()
    for i in range(4):
        compiled(net, 1.0)
        assert int(net.n) == i + 1
        net.w.value = net.w + 1
        mu.state(net)
        repr(net)
        mu.clone(net)
    assert traces.total == 1


@pytest.mark.parametrize("kind", ["argument", "closure", "method", "module", "partial"])
def test_forms_of_a_function(kind: str, traces: Any) -> None:
    net = Net()
    compiled = {
        "argument": lambda: functools.partial(mu.jit(step), net),
        "closure": lambda: mu.jit(lambda x: net(x)),
        "method": lambda: mu.jit(net.__call__),
        "module": lambda: mu.jit(net),
        "partial": lambda: mu.jit(functools.partial(step, net)),
    }[kind]()
    assert [float(compiled(x)) for x in (1.0, 2.0)] == [3, 6]
    with traces.compilations() as compiled_again:
        compiled(3.0)
    assert compiled_again.count == 0
    assert int(net.n) == 3


def test_the_order_of_a_dict_is_structure(traces: Any) -> None:
    def run(model: Any) -> Any:
        x = jnp.float32(1)
        for layer in model.layers.values():
            x = x * layer.value + layer.value
        return x + sum(i * s for i, s in enumerate(model.statics.values()))

    def make(order: str) -> Any:
        model = mu.Module()
        model.layers = {k: mu.Param(float(ord(k) - 95)) for k in order}
        model.statics = {k: float(ord(k)) for k in order}
        return model

    compiled = mu.jit(traces.count(run))
    for order in ("az", "za", "az", "za"):
        assert float(compiled(make(order))) == float(run(make(order)))
    assert traces.total == 2


# -- options of jax.jit ------------------------------------------------------------------------------------------


def test_static_arguments(traces: Any) -> None:
    @traces.count
    def power(net: Net, n: int, x: Any, *, name: str = "a") -> Any:
        net.n += len(name)
        return x**n

    for options in (
        {"static_argnums": (1,), "static_argnames": ("name",)},
        {"static_argnums": [1], "static_argnames": "name"},
        {"static_argnums": -2, "static_argnames": ["name"]},
    ):
        net = Net()
        compiled = mu.jit(power, **options)
        before = traces.total
        assert [float(compiled(net, n, jnp.float32(2))) for n in (2, 3, 2)] == [4, 8, 4]
        assert traces.total == before + 2
        assert float(compiled(net, 2, jnp.float32(2), name="abc")) == 4
        assert traces.total == before + 3
        assert int(net.n) == 6


def test_static_argnames_hold_by_position_as_in_jax(traces: Any) -> None:
    """`jax.jit` infers argnums from argnames and the other way round."""

    def f(net: Net, n: int) -> Any:
        net.n += 1
        return jnp.zeros(n)

    raw = jax.jit(lambda x, n: jnp.zeros(n), static_argnames=("n",))
    assert raw(0, 3).shape == (3,)
    assert raw(0, n=3).shape == (3,)
    by_name = mu.jit(f, static_argnames=("n",))
    assert by_name(Net(), n=3).shape == (3,)
    assert by_name(Net(), 3).shape == (3,)
    by_number = mu.jit(f, static_argnums=1)
    assert by_number(Net(), 3).shape == (3,)
    assert by_number(Net(), n=3).shape == (3,)


def test_static_arguments_have_to_be_hashable() -> None:
    with pytest.raises((ValueError, TypeError)):
        jax.jit(lambda x, n: x, static_argnums=1)(0, [1])
    net = Net()
    try:
        mu.jit(lambda net, n: net(1.0) * n[0], static_argnums=1)(net, [2.0])
    except (TypeError, ValueError):
        assert int(net.n) == 0
    else:
        assert float(mu.jit(lambda net, n: net(1.0) * n[0], static_argnums=1)(net, [3.0])) == 9


def test_static_arguments_of_other_types_are_told_apart() -> None:
    compiled = mu.jit(lambda n: jnp.int32(n is True), static_argnums=0)
    assert int(compiled(1)) == 0
    assert int(compiled(True)) == 1


@pytest.mark.parametrize(
    "options",
    [{"static_argnames": "nothing"}, {"static_argnums": 4}, {"donate_argnames": "nothing"}, {"donate_argnums": 4}],
)
def test_options_are_checked(options: Any) -> None:
    def f(net: Any, x: Any) -> Any:
        return x

    with pytest.raises(ValueError, match="arg"):
        jax.jit(f, **options)(1, 2)
    with pytest.raises(ValueError, match="arg"):
        mu.jit(f, **options)(Net(), 2)


@pytest.mark.parametrize("bad", ["maybe", None, 3])
def test_the_option_donate_is_checked(bad: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="donate"):
        mu.jit(step, donate=bad)(Net(), 1.0)


@pytest.mark.parametrize("options", [{"donate_argnums": 1}, {"donate_argnums": (1,)}, {"donate_argnames": "x"}])
def test_donated_arguments(options: Any) -> None:
    net = Net()
    compiled = mu.jit(lambda net, x: net(1.0) + x, **options)
    x = jnp.zeros(8)
    if "donate_argnames" in options:
        compiled(net, x=x)
    else:
        compiled(net, x)
    assert x.is_deleted()
    y = jnp.zeros(8)
    mu.jit(lambda net, x: net(1.0) + x)(net, y)
    assert not y.is_deleted()


def test_donated_names_hold_by_position() -> None:
    f = lambda net, x: net(1.0) + x  # noqa: E731
    x, y = jnp.zeros(8), jnp.zeros(8)
    mu.jit(f, donate_argnames="x")(Net(), x)
    mu.jit(f, donate_argnums=1)(Net(), x=y)
    raw_x, raw_y = jnp.zeros(8), jnp.zeros(8)
    jax.jit(lambda a, x: a + x, donate_argnames="x")(1.0, raw_x)
    jax.jit(lambda a, x: a + x, donate_argnums=1)(1.0, x=raw_y)
    assert (x.is_deleted(), y.is_deleted()) == (raw_x.is_deleted(), raw_y.is_deleted())


@pytest.fixture
def sharding() -> Any:
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    return lambda *spec: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))


def test_out_shardings(sharding: Any) -> None:
    net = Net(4)
    split, whole = sharding("x"), sharding()
    net.w.value = jax.device_put(net.w.value, whole)
    net.n.value = jax.device_put(net.n.value, whole)
    net.parts[0].value = jax.device_put(net.parts[0].value, whole)

    def f(net: Net, x: Any) -> Any:
        net.n += 1
        return {"a": x * net.w.value, "b": jnp.sum(x)}

    x = jax.device_put(jnp.arange(4.0), whole)
    out = mu.jit(f, out_shardings={"a": split, "b": whole})(net, x)
    assert out["a"].sharding == split
    np.testing.assert_array_equal(out["a"], np.arange(4.0))
    out = mu.jit(f, out_shardings={"a": split, "b": None})(net, x)
    assert out["a"].sharding == split
    assert int(net.n) == 2


def test_in_shardings(sharding: Any) -> None:
    net = Net(4)
    split = sharding("x")
    for cell in mu.variables(net).values():
        cell.value = jax.device_put(cell.value, sharding())
    seen: list[Any] = []

    def f(net: Net, x: Any) -> Any:
        net.n += 1
        jax.debug.inspect_array_sharding(x, callback=seen.append)
        return x * net.w.value

    compiled = mu.jit(f, in_shardings=(None, split))
    out = compiled(net, np.arange(4.0, dtype=np.float32))
    np.testing.assert_array_equal(out, np.arange(4.0))
    assert seen
    assert seen[0].is_equivalent_to(split, 1)
    assert int(net.n) == 1


def test_a_written_state_keeps_its_placement(sharding: Any, traces: Any) -> None:
    split = sharding("x")
    net = Net(4)
    net.w.value = jax.device_put(net.w.value, split)

    @traces.count
    def f(net: Net) -> None:
        net.w.value = jnp.zeros(4)

    compiled = mu.jit(f)
    for _ in range(3):
        compiled(net)
        assert net.w.value.sharding.is_equivalent_to(split, 1)
    assert traces.total == 1


def test_compiler_options() -> None:
    net = Net()
    compiled = mu.jit(step, compiler_options={"xla_embed_ir_in_executable": True})
    assert float(compiled(net, 1.0)) == 3


@pytest.mark.parametrize("compiled", [lambda f: mu.jit(f), lambda f: mu.jit(donate=False)(f), lambda f: mu.jit()(f)])
def test_decorator_forms(compiled: Any) -> None:
    net = Net()
    assert float(compiled(step)(net, 1.0)) == 3
    assert compiled(step).__name__ == "step"
    assert compiled(step).__wrapped__ is step
    assert repr(compiled(step)) == "Jitted(step)"


def test_disable_jit() -> None:
    net = Net()
    compiled = mu.jit(lambda net, x: (net(x), isinstance(net.w.value, jax.core.Tracer)))
    with jax.disable_jit():
        out, traced = compiled(net, 1.0)
    assert not traced
    assert float(out) == 3
    assert int(net.n) == 1
    with jax.disable_jit(), pytest.raises(KeyError):
        mu.jit(lambda: (net.n.set(9), {}["x"]))()
    assert int(net.n) == 1


# -- results -----------------------------------------------------------------------------------------------------


def test_results_of_every_structure() -> None:
    net = Net()
    out = mu.jit(lambda net, x: {"a": [x, None, (x + 1,)], "net": net, "w": net.w, "b": ()})(net, 1.0)
    assert out["net"] is net
    assert out["w"] is net.w
    assert out["a"][1] is None
    assert float(out["a"][2][0]) == 2
    assert mu.jit(lambda: None)() is None


def test_modules_made_inside_come_out_live(traces: Any) -> None:
    @traces.count
    def make(key: Any, size: int) -> Net:
        net = Net(size)
        net.w.value = jax.random.normal(key, (size,))
        net.tied = net.w
        return net

    compiled = mu.jit(make, static_argnums=1)
    a, b = compiled(jax.random.key(0), 3), compiled(jax.random.key(1), 3)
    assert traces.total == 1
    assert a is not b
    assert a.w is not b.w
    assert a.tied is a.w
    assert not np.array_equal(a.w, b.w)
    assert not a.w.frozen
    a.w.value = jnp.zeros(3)
    assert float(a(1.0)) == 0
    assert mu.graphdef(a) == mu.graphdef(b)


def test_changes_of_structure_are_replayed(traces: Any) -> None:
    @traces.count
    def grow(net: Net) -> Any:
        net.parts.append(mu.Cache(net.n.value * 10))
        net.extra = net.parts[-1]
        net.n += 1
        return net.extra

    compiled = mu.jit(grow)
    for i in range(3):
        net = Net()
        net.n.value = i
        out = compiled(net)
        assert out is net.extra is net.parts[1]
        assert int(net.extra) == 10 * i
        assert int(net.n) == i + 1
    assert traces.total == 1
    compiled(net)
    assert len(net.parts) == 3
    assert traces.total == 2


def test_a_submodule_that_is_replaced() -> None:
    class Outer(mu.Module):
        def __init__(self) -> None:
            self.inner = Net()
            self.table = {"a": Net()}

    @mu.jit
    def swap(outer: Outer) -> None:
        outer.inner, outer.table["a"] = outer.table["a"], outer.inner
        outer.inner.n += 1

    outer = Outer()
    a, b = outer.inner, outer.table["a"]
    for expected in (b, a, b):
        swap(outer)
        assert outer.inner is expected
    assert (int(a.n), int(b.n)) == (1, 2)


def test_deferred_states_are_created_in_the_first_call(traces: Any) -> None:
    net = mu.Module()
    net.h = mu.Hidden(init=lambda: jnp.zeros(2))

    @traces.count
    def f(net: Any) -> None:
        net.h.value = net.h + 1

    compiled = mu.jit(f)
    for _ in range(3):
        compiled(net)
    np.testing.assert_array_equal(net.h, [3, 3])
    assert traces.total == 2, "without and with a value"


# -- inside other things -----------------------------------------------------------------------------------------


def test_jit_inside_jit_is_one_program(traces: Any) -> None:
    net = Net()
    inner = mu.jit(traces.count(step))
    outer = mu.jit(lambda x: inner(net, x) + inner(net, x))
    assert float(outer(1.0)) == 6
    assert float(outer(2.0)) == 12
    assert int(net.n) == 4
    assert traces.total == 1


@pytest.mark.parametrize(
    "around",
    [
        lambda f: mu.grad(f)(1.0),
        lambda f: mu.vmap(f)(jnp.ones(2)),
        lambda f: mu.scan(lambda c, x: (f(c), None), 1.0, length=2)[0],
        lambda f: mu.cond(True, f, lambda x: x, 1.0),
        lambda f: mu.remat(f)(1.0),
        lambda f: mu.jit(f)(1.0),
    ],
)
def test_jit_inside_other_transforms(around: Any) -> None:
    a, b = Net(), Net()
    inner = mu.jit(step)
    np.testing.assert_allclose(around(lambda x: inner(a, x)), around(lambda x: step(b, x)))
    assert mu.state(a) == mu.state(b)


def test_jit_inside_raw_transforms_is_refused_at_the_write() -> None:
    net = Net()
    compiled = mu.jit(step)
    for raw in (jax.jit, jax.grad, jax.vmap):
        with pytest.raises(errors.TraceLevelError, match="n"):
            raw(lambda x: compiled(net, x))(jnp.ones(2) if raw is jax.vmap else 1.0)
    assert int(net.n) == 0
    assert float(compiled(net, 1.0)) == 3


def test_reading_only_inside_raw_gradients_is_fine() -> None:
    net = Net()
    read = mu.jit(lambda net, x: jnp.sum(net.w.value) * x)
    assert float(jax.grad(lambda x: read(net, x))(1.0)) == 3
    np.testing.assert_array_equal(jax.vmap(lambda x: read(net, x))(jnp.ones(2)), [3, 3])


# -- lifetimes and threads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["argument", "closure", "method"])
def test_models_and_programs_are_collected(form: str) -> None:
    net = Net()
    compiled: Any = {
        "argument": lambda: mu.jit(step),
        "closure": lambda: mu.jit(lambda x: net(x)),
        "method": lambda: mu.jit(net.__call__),
    }[form]()
    compiled(*(net, 1.0) if form == "argument" else (1.0,))
    alive = [weakref.ref(net), weakref.ref(net.w)]
    if form == "argument":
        del net
        gc.collect()
        assert [r() for r in alive] == [None, None]
        compiled(Net(), 1.0)
    else:
        alive.append(weakref.ref(compiled))
        del net, compiled
        gc.collect()
        assert [r() for r in alive] == [None, None, None]


def test_threads_with_models_of_their_own(traces: Any) -> None:
    compiled = mu.jit(step)
    nets = [Net() for _ in range(4)]
    problems: list[BaseException] = []

    def run(net: Net) -> None:
        try:
            for i in range(50):
                net.flag = i % 2 == 0
                assert float(compiled(net, 1.0)) == 3 + (i % 2 == 0)
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=run, args=(net,)) for net in nets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert [int(net.n) for net in nets] == [50] * 4


def test_caches_may_be_cleared() -> None:
    net = Net()
    compiled = mu.jit(step)
    compiled(net, 1.0)
    jax.clear_caches()
    assert float(compiled(net, 1.0)) == 3
    with jax.default_matmul_precision("highest"):
        assert float(compiled(net, 1.0)) == 3
    assert int(net.n) == 3


def test_settings_of_jax_are_part_of_a_program() -> None:
    net = Net()
    compiled: Callable[..., Any] = mu.jit(lambda net, x: (net(1.0), jnp.zeros(2, float))[1] + x)
    assert compiled(net, 1.0).dtype == jnp.float32
    with jax.enable_x64(True):
        assert compiled(net, 1.0).dtype == jnp.float64
    assert compiled(net, 1.0).dtype == jnp.float32
    assert int(net.n) == 3


def test_keep_unused_and_inline() -> None:
    net = Net()
    for options in ({"keep_unused": True}, {"inline": True}, {"keep_unused": True, "inline": True}):
        compiled = mu.jit(step, **options)
        assert float(compiled(net, 1.0)) == 3
    for inline in (False, True):
        mine = mu.make_jaxpr(lambda x: mu.jit(lambda x: x * 2, inline=inline)(x))(1.0)
        theirs = jax.make_jaxpr(lambda x: jax.jit(lambda x: x * 2, inline=inline)(x))(1.0)
        assert [e.primitive for e in mine.eqns] == [e.primitive for e in theirs.eqns]
