"""A program is used again only for what it was made for: the faults that were found, kind by kind, and what follows from them."""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import operator
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mutatis as mu
from mutatis import errors, nn

pytestmark = [pytest.mark.once, pytest.mark.filterwarnings("ignore::mutatis.errors.RecompilationWarning")]


def total(body: Callable[[Any, Any], Any], first: Any = 0.0) -> float:
    """Fold 1, 2, 3, 4 by an eager `mu.scan`."""
    return float(mu.scan(lambda c, x: (body(c, x), None), first, jnp.arange(1.0, 5.0))[0])


def twice(f: Callable[[], Any], change: Callable[[], Any]) -> list[float]:
    """What f gives before and after a change."""
    before = float(f())
    change()
    return [before, float(f())]


class Net(mu.Module):
    def __init__(self, w: float = 2.0) -> None:
        self.w = mu.Param(w)

    def __call__(self, x: Any) -> Any:
        return x * self.w.value


# -- values that are taken for others


def test_a_builtin_function_in_a_fresh_closure() -> None:
    def run(op: Any) -> float:
        return total(lambda c, x: op(c, x), 1.0)

    assert [run(operator.add), run(operator.mul), run(operator.add)] == [11, 24, 11]


def test_a_builtin_function_in_a_while_loop() -> None:
    def run(op: Any) -> float:
        return float(mu.while_loop(lambda c: c < 100, lambda c: op(c, 3.0), 2.0))

    assert [run(operator.add), run(operator.mul)] == [101, 162]


ACTIVATION: Any = math.sin


def test_a_global_that_names_a_library_function(monkeypatch: pytest.MonkeyPatch) -> None:
    f = mu.jit(lambda: jnp.float32(ACTIVATION(1.0)))
    got = twice(f, lambda: monkeypatch.setitem(globals(), "ACTIVATION", math.cos))
    assert got == pytest.approx([math.sin(1), math.cos(1)])


def test_a_global_that_hides_a_builtin(monkeypatch: pytest.MonkeyPatch) -> None:
    f = mu.jit(lambda: jnp.float32(max(1.0, 2.0)))
    assert twice(f, lambda: monkeypatch.setitem(globals(), "max", min)) == [2, 1]


def test_a_function_of_a_library_module_that_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    f = mu.jit(lambda x: jnp.sin(x))
    before = float(f(1.0))
    monkeypatch.setattr(jnp, "sin", jnp.cos)
    assert [before, float(f(1.0))] == pytest.approx([math.sin(1), math.cos(1)])


def test_one_array_under_two_names() -> None:
    a, b = jnp.array(1.0), jnp.array(2.0)
    c = a
    f = mu.jit(lambda: 0 * a + 0 * b + c)
    before = float(f())
    c = b
    assert [before, float(f())] == [1, 2]


def test_arrays_that_are_weakly_typed_or_not() -> None:
    def run(array: Any) -> Any:
        held = [array]
        return mu.scan(lambda c, x: (c, x * held[0]), None, jnp.ones(2, jnp.float16))[1].dtype

    with jax.numpy_dtype_promotion("standard"):
        assert [run(jnp.asarray(2.0)), run(jnp.asarray(2.0, jnp.float32))] == [jnp.float16, jnp.float32]


def test_where_a_model_stands_among_what_is_captured() -> None:
    def make(a: Any, b: Any) -> Any:
        return lambda c, x: c + (a if isinstance(a, float) else 10 * b)

    assert [total(make(1.0, Net())), total(make(Net(), 1.0))] == [4, 40]


def test_members_of_two_enumerations_that_are_equal() -> None:
    class A(enum.IntEnum):
        X = 1

    class B(enum.IntEnum):
        X = 1

    def run(mode: Any) -> float:
        return total(lambda c, x: c + len(type(mode).__qualname__) if mode is A.X else c + 100)

    assert run(A.X) != run(B.X)


def test_a_static_attribute_of_a_frozen_dataclass_of_equal_values() -> None:
    @dataclasses.dataclass(frozen=True)
    class Config:
        n: Any

    net, step = Net(), mu.jit(lambda net: jnp.float32(len(type(net.config.n).__name__)))
    lengths = []
    for n in (1, True, 1.0):
        net.config = Config(n)
        lengths.append(float(step(net)))
    assert lengths == [3, 4, 5]


@pytest.mark.parametrize("size", [65, 1000, 5000])
def test_long_lists(size: int) -> None:
    table = [1.0] * size
    f = mu.jit(lambda: jnp.float32(table[0]))
    before = float(f())
    table = [2.0] * size
    assert [before, float(f())] == [1, 2]


# -- numbers whose identity comes back


def test_a_float_in_a_closure_another_each_call() -> None:
    v, lr = mu.Variable(0.0), 0.0

    def f() -> None:
        v.value = v.value + lr

    step, want = mu.jit(f), 0.0
    for i in range(40):
        lr = i * 0.37
        step()
        want += lr
    assert float(v) == pytest.approx(want)


def test_an_attribute_another_float_each_call() -> None:
    config, got = types.SimpleNamespace(lr=0.0), []
    f = mu.jit(lambda: jnp.float32(config.lr))
    for i in range(40):
        config.lr = i * 0.37
        got.append(float(f()))
    assert got == pytest.approx([i * 0.37 for i in range(40)])


# -- what is changed in place

TEMPERATURE = 1.0


class Warm(mu.Module):
    temperature = 1.0

    def __init__(self) -> None:
        self.w = mu.Param(2.0)

    def by_global(self) -> Any:
        return self.w.value * TEMPERATURE

    def by_class(self) -> Any:
        return self.w.value * self.temperature

    @staticmethod
    def shift() -> float:
        return TEMPERATURE

    @property
    def heat(self) -> Any:
        return self.w.value + self.shift()


class Around(mu.Module):
    def __init__(self) -> None:
        self.inner = [Warm()]

    def __call__(self) -> Any:
        return self.inner[0].by_global() + self.inner[0].heat


@pytest.mark.parametrize("reach", ["argument", "closure"])
@pytest.mark.parametrize(
    ("make", "read", "want"), [(Warm, Warm.by_global, [2, 10]), (Around, Around.__call__, [5, 17])]
)
def test_globals_in_the_methods_of_a_model(
    make: Any, read: Any, want: Any, reach: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = make()
    f = mu.jit(lambda net: read(net)) if reach == "argument" else mu.jit(lambda: read(net))
    run = (lambda: f(net)) if reach == "argument" else f
    assert twice(run, lambda: monkeypatch.setitem(globals(), "TEMPERATURE", 5.0)) == want


OTHER = mu.Variable(1.0)


class Uses(mu.Module):
    def __init__(self) -> None:
        self.w = mu.Param(2.0)

    def __call__(self) -> Any:
        OTHER.value = OTHER.value + 1
        return self.w.value * OTHER.value


def test_states_that_the_methods_of_a_model_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "OTHER", mu.Variable(1.0))
    f, net = mu.jit(lambda net: net()), Uses()
    assert [float(f(net)) for _ in range(2)] == [4, 6]
    monkeypatch.setitem(globals(), "OTHER", mu.Variable(9.0))
    assert float(f(net)) == 20


def test_an_attribute_of_the_class_of_a_model() -> None:
    class Half(Warm):
        temperature = 0.5

    net, f = Half(), mu.jit(lambda net: net.by_class())
    assert twice(lambda: f(net), lambda: setattr(Half, "temperature", 5.0)) == [1, 10]
    assert twice(lambda: f(net), lambda: delattr(Half, "temperature")) == [10, 2]


def test_a_method_that_is_replaced() -> None:
    class Local(Warm):
        def step(self) -> Any:
            return self.w.value

    net, f = Local(), mu.jit(lambda net: net.step())
    assert twice(lambda: f(net), lambda: setattr(Local, "step", lambda self: self.w.value * 10)) == [2, 20]


def test_a_default_of_a_plain_class_then_the_own_one_of_an_object() -> None:
    class Settings:
        lr = 0.25

    settings = Settings()
    f = mu.jit(lambda: jnp.float32(settings.lr))
    assert twice(f, lambda: setattr(settings, "lr", 0.5)) == [0.25, 0.5]


# -- what tracing itself changes


def test_a_dict_that_the_function_completes_is_watched_still() -> None:
    config, v = {"lr": 1.0}, mu.Variable(0.0)

    def f() -> None:
        config.setdefault("eps", 0.0)
        v.value = v.value + config["lr"]

    step = mu.jit(f)
    step()
    config["lr"] = 100.0
    step()
    config["lr"] = 1.0
    step()
    assert float(v) == 102
    assert len(mu.inspect.explain(step).compilations) == 2, "toggling back compiles nothing"


def test_a_count_of_traces_that_two_functions_share() -> None:
    count = 0

    def body(x: Any) -> Any:
        nonlocal count
        count += 1
        return x * 2

    first, second = mu.jit(lambda x: body(x)), mu.jit(lambda x: body(x) + 1)
    for _ in range(4):
        assert [float(first(1.0)), float(second(1.0))] == [2, 3]
    assert count == 2


def test_each_function_object_of_a_loop_counts_its_own_traces() -> None:
    def run() -> list[int]:
        seen: list[int] = []

        def body(c: Any, x: Any) -> Any:
            seen.append(1)
            return c + x, None

        for _ in range(3):
            assert float(mu.scan(body, 0.0, jnp.arange(3.0))[0]) == 3
        return seen

    assert [run(), run()] == [[1], [1]]


def test_a_fresh_closure_that_rebinds_what_it_captured() -> None:
    def run(scale: float) -> float:
        def body(c: Any, x: Any) -> Any:
            nonlocal scale
            now, scale = scale, scale + 1.0
            return c + now

        return total(body)

    assert [run(1.0), run(2.0), run(1.0), run(3.0)] == [4, 8, 4, 12]


def test_something_else_that_traces_changed_is_noticed_when_others_change_it() -> None:
    calls: dict[str, float] = {}
    scale = [1.0]

    def f(x: Any) -> Any:
        calls["f"] = calls.get("f", 0) + 1
        scale.append(0.0)
        return x * scale[0]

    step = mu.jit(f)
    assert [float(step(2.0)) for _ in range(3)] == [2, 2, 2]
    scale[0] = 5.0
    assert [float(step(2.0)) for _ in range(3)] == [10, 10, 10]
    assert calls == {"f": 2}


# -- static arguments

STATIC: dict[str, Callable[[Any], Any]] = {
    "position": lambda v: mu.jit(lambda x, v: x, static_argnums=1)(1.0, v),
    "from the end": lambda v: mu.jit(lambda x, v: x, static_argnums=-1)(1.0, v),
    "name": lambda v: mu.jit(lambda x, v: x, static_argnames="v")(1.0, v=v),
    "name by position": lambda v: mu.jit(lambda x, v: x, static_argnames="v")(1.0, v),
    "remat": lambda v: mu.remat(lambda x, v: x, static_argnums=(1,))(1.0, v),
    "make_jaxpr": lambda v: mu.make_jaxpr(lambda x, v: x, static_argnums=1)(1.0, v),
}


@pytest.mark.parametrize("how", STATIC)
@pytest.mark.parametrize("value", [np.ones(3), [1], {"a": 1}, {1}, ([1],)], ids=lambda v: type(v).__name__)
def test_static_arguments_that_cannot_be_hashed(how: str, value: Any) -> None:
    with pytest.raises(errors.ArgumentError, match="is not hashable") as caught:
        STATIC[how](value)
    assert isinstance(caught.value, ValueError)
    assert "`tuple(x)`" in str(caught.value)
    STATIC[how]((1, "a"))


def test_static_functions_are_searched() -> None:
    config = types.SimpleNamespace(k=1.0)
    step = mu.jit(lambda x, f: f(x), static_argnums=1)
    got = []
    for k in (1.0, 2.0, 1.0):
        config.k = k
        got.append(float(step(3.0, lambda x: x * config.k)))
    assert got == [3, 6, 3]


# -- containers and closures that hold models and arrays together


def test_a_tuple_of_a_model_and_an_array_in_a_branch() -> None:
    args = (Net(), jnp.float32(3.0))
    assert float(mu.cond(True, lambda: args[0](args[1]), lambda: jnp.float32(0.0))) == 6


def test_a_dict_of_a_model_and_an_array() -> None:
    batch = {"model": Net(), "x": jnp.float32(3.0)}
    f = mu.jit(lambda: batch["model"](batch["x"]))
    assert twice(f, lambda: batch.update(x=jnp.float32(4.0))) == [6, 8]


@pytest.mark.parametrize(
    "rest",
    [jnp.ones(2), np.ones(2), np.ones(2000), {1, 2}, mu.State({}), None, object(), jax.random.key(0)],
    ids=lambda v: type(v).__name__,
)
@pytest.mark.parametrize("kind", ["list", "tuple", "nested", "dict"])
@pytest.mark.parametrize("transform", ["jit", "scan", "grad", "cond", "remat"])
def test_anything_beside_a_model(rest: Any, kind: str, transform: str) -> None:
    net = Net()
    held: Any = {
        "list": [net, rest],
        "tuple": (net, rest),
        "nested": [(net, {"x": [rest]})],
        "dict": {0: net, 1: rest},
    }[kind]

    def wrapper(*args: Any) -> Any:
        first = args[0][0] if isinstance(args[0], tuple) else net
        first.w.value = first.w + 1
        return first.w.value

    def f() -> Any:
        return wrapper(*held)

    if transform == "jit":
        step = mu.jit(f)
        step(), step()
    elif transform == "scan":
        mu.scan(lambda c, _: (c, f()), None, length=2)
    elif transform == "grad":
        mu.grad(lambda: (f(), net.w.value)[1], of=net)()
        mu.remat(f)()
    elif transform == "cond":
        mu.cond(True, f, lambda: jnp.float32(0))
        mu.cond(True, f, lambda: jnp.float32(0))
    else:
        mu.remat(f)(), mu.remat(f)()
    assert float(net.w) == 4


def test_models_are_put_into_a_captured_list_that_holds_an_array() -> None:
    held: list[Any] = [mu.Variable(1.0), jnp.ones(2)]

    def f() -> None:
        if len(held) == 2:
            held.append(mu.Variable(5.0))
        held[2].value = held[2] + 1

    step = mu.jit(f)
    step(), step()
    assert float(held[2]) == 7
    assert isinstance(held[1], jax.Array)


@pytest.mark.jax_leaks
def test_no_tracer_is_left_in_a_captured_list() -> None:
    held: list[Any] = [mu.Variable(1.0), jnp.ones(2)]
    for transform in (mu.jit, mu.remat):
        with pytest.raises(errors.StructureError, match="bare array"):
            transform(lambda x: held.append(x * 2))(jnp.ones(2))
        assert len(held) == 2


# -- a program is compiled once


def compilations(step: Any) -> int:
    return len(mu.inspect.explain(step).compilations)


def test_a_schedule_that_rebinds_its_own_closure() -> None:
    w = mu.Param(jnp.ones(4))
    optimizer = mu.Optimizer(w, optax.adam(optax.warmup_cosine_decay_schedule(0.0, 1e-3, 10, 200)))
    step = mu.jit(lambda o: o.update(mu.grad(lambda: jnp.sum(w.value**2), of=w)()))
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(3):
            step(optimizer)
            other = mu.Module()
            other.layer = nn.Linear(2, 2, rngs=mu.Rngs(0))
            other.eval()
    assert compilations(step) == 1


def test_a_state_with_init_compiles_once() -> None:
    class Lazy(mu.Module):
        def __init__(self) -> None:
            self.cache = mu.Cache(init=lambda: jnp.zeros(3))

        def __call__(self, x: Any) -> Any:
            self.cache.value = self.cache.value + x

    net, step = Lazy(), mu.jit(lambda net, x: net(x))
    step(net, 1.0), step(net, 1.0)
    np.testing.assert_array_equal(net.cache.value, [2, 2, 2])
    assert compilations(step) == 1


def test_a_state_with_init_has_no_value_after_a_failure() -> None:
    cache = mu.Cache(init=lambda: jnp.zeros(3))
    fails = False

    def f() -> Any:
        cache.value = cache + 1
        if not cache.deferred and fails:
            raise KeyError
        return cache.value

    fails = True
    with pytest.raises(KeyError):
        mu.jit(f)()
    assert cache.deferred


def test_a_state_whose_init_draws_is_made_when_it_is_read() -> None:
    def make() -> tuple[Any, Any]:
        rngs = mu.Rngs(0)
        return rngs, mu.Param(init=lambda: jax.random.normal(rngs()))

    def f(rngs: Any, w: Any) -> Any:
        return jax.random.normal(rngs()) + w.value

    want = f(*make())
    rngs, w = make()
    assert float(mu.jit(f)(rngs, w)) == pytest.approx(float(want))
    assert int(rngs.default.value["count"]) == 2


@pytest.mark.parametrize("loop", ["scan", "while_loop", "fori_loop"])
def test_nested_loops_with_a_number_as_carry_trace_the_body_once(loop: str, traces: Any) -> None:
    @traces.count
    def innermost() -> Any:
        return jnp.sum(jnp.ones(3))

    def nest(depth: int) -> Any:
        if depth == 0:
            return innermost()
        if loop == "scan":
            return mu.scan(lambda c, _: (c + nest(depth - 1), None), 0.0, length=2)[0]
        if loop == "fori_loop":
            return mu.fori_loop(0, 2, lambda i, c: c + nest(depth - 1), 0.0)
        return mu.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1] + nest(depth - 1)), (0, 0.0))[1]

    assert float(mu.jit(lambda: nest(4))()) == 48
    assert traces.total == 1


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("start", [0.0, 1, True])
def test_the_carry_gets_the_type_that_it_has_in_jax(dtype: Any, start: Any) -> None:
    def body(c: Any, x: Any) -> Any:
        y = x.astype(dtype)
        return (c * y if not isinstance(start, bool) else c | (x > 0)), (c + y).astype(jnp.result_type(c, y))

    with jax.numpy_dtype_promotion("standard"):
        want = jax.lax.scan(body, start, jnp.ones(3)) if not (start == 1 and start is not True) else None
        if want is None:
            return
        got = mu.scan(body, start, jnp.ones(3))
    assert jax.tree.map(lambda x: x.dtype, got) == jax.tree.map(lambda x: x.dtype, want)


def test_expect_says_what_differed() -> None:
    scale = 1.0
    step = mu.jit(lambda v, x: v.set(x * scale))
    v = mu.Variable(jnp.ones(2))
    with step.expect(compilations=1):
        step(v, jnp.ones(2))
        step(v, jnp.zeros(2))
        scale = 2.0
        with pytest.raises(errors.CompilationError, match=r"compiled once more than planned") as caught:
            step(v, jnp.ones(2))
    assert "scale: 1.0 -> 2.0" in str(caught.value)
    np.testing.assert_array_equal(v.value, [0, 0])
    step(v, jnp.ones(2))
    np.testing.assert_array_equal(v.value, [2, 2])


def test_an_explanation_names_settings_of_jax_and_of_an_optimizer() -> None:
    w = mu.Param(jnp.ones(4))
    step = mu.jit(lambda o: o.update(mu.grad(lambda: jnp.sum(w.value**2), of=w)()))
    for rate in (0.1, 0.2):
        step(mu.Optimizer(w, optax.sgd(rate)))
    with jax.default_matmul_precision("highest"):
        step(mu.Optimizer(w, optax.sgd(0.2)))
    first, second, third = mu.inspect.explain(step).compilations
    assert not first.changes
    assert all(path.startswith("o.tx") for path in second.changes)
    assert ("-0.1", "-0.2") in second.changes.values()
    assert third.changes == {"jax_default_matmul_precision": ("None", "highest")}


# -- bindings are kept, however the model is reached


class Parts(mu.Module):
    def __init__(self) -> None:
        self.v = mu.Variable(0)

    def step(self) -> None:
        self.v.value = self.v.value + 1


def reached(kind: str, model: Any) -> Callable[[], Any]:
    if kind == "list":
        held: Any = [model]
    elif kind == "tuple":
        held = (model, jnp.ones(2))
    elif kind == "dict":
        held = {0: model}
    elif kind == "list of an object":
        space = types.SimpleNamespace(models=[model])
        return mu.jit(lambda: space.models[0].step())
    elif kind == "partial":
        return mu.jit(functools.partial(Parts.step, model))
    elif kind == "Variables in a list":
        cells = [model.v]
        return mu.jit(lambda: cells[0].set(cells[0].value + 1))
    elif kind == "Variable":
        step = mu.jit(lambda v: v.set(v.value + 1))
        return lambda: step(model.v)
    else:
        step = mu.jit(lambda m, v: m.step())
        other = mu.Variable(0)
        return lambda: step(model, other)
    return mu.jit(lambda: held[0].step())


@pytest.mark.parametrize(
    "kind",
    ["list", "tuple", "dict", "list of an object", "partial", "Variables in a list", "Variable", "a Variable beside"],
)
def test_bindings_are_kept(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mutatis.compilation.compiler import Compiler

    model = Parts()
    step = reached(kind, model)
    step(), step()
    walks: list[Any] = []
    bind = Compiler._bind
    monkeypatch.setattr(Compiler, "_bind", lambda self, *a, **k: (walks.append(a), bind(self, *a, **k))[1])
    for _ in range(10):
        step()
    assert not walks
    assert int(model.v) == 12


def test_few_of_the_bindings_for_bare_variables_are_kept() -> None:
    step = mu.jit(lambda v: v.set(v.value + 1))
    for _ in range(100):
        step(mu.Variable(0))
    assert len(step._compiler.bindings) <= 16
