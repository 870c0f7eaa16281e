"""`mu.Context`: what is static and what is an argument, nesting, threads, tasks, transforms, raw JAX, lifetimes."""

from __future__ import annotations

import asyncio
import contextvars
import enum
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
from mutatis.model.modules import bindings_of
from tests.nets import Scale as Net

pytestmark = pytest.mark.once  # many alike; what JAX's versions differ in, the twins and traces of transforms show


def f32(x: float) -> jax.Array:
    return jnp.float32(x)


# -- as plain Python -------------------------------------------------------------------------------------------


def test_the_default_and_what_is_set() -> None:
    dt = mu.Context("dt", 1.0)
    assert dt.get() == 1.0
    assert repr(dt) == "Context('dt')"
    with dt.set(0.5) as nothing:
        assert nothing is None
        assert dt.get() == 0.5
        with dt.set(0.25):
            assert dt.get() == 0.25
        assert dt.get() == 0.5
    assert dt.get() == 1.0
    assert mu.Context("other", None).get() is None
    with pytest.raises(errors.ContextError, match="context `other` is not set"):
        mu.Context("other").get()


def test_contexts_are_told_apart_by_identity() -> None:
    a, b = mu.Context("same", 1), mu.Context("same", 2)
    with a.set(10):
        assert (a.get(), b.get()) == (10, 2)
        with b.set(20), a.set(11):
            assert (a.get(), b.get()) == (11, 20)
        assert (a.get(), b.get()) == (10, 2)


def test_an_exception_ends_it() -> None:
    dt = mu.Context("dt", 1.0)
    with pytest.raises(KeyError), dt.set(2.0), dt.set(f32(3)):
        raise KeyError
    assert dt.get() == 1.0


def test_none_can_be_set_and_hides_the_default() -> None:
    dt = mu.Context("dt", 1.0)
    with dt.set(None):
        assert dt.get() is None


@pytest.mark.parametrize("value", [[1], {"a": 1}, {1}, bytearray(b"x"), [f32(1), 2.0]])
def test_what_cannot_be_static(value: Any) -> None:
    dt = mu.Context("dt", None)
    with pytest.raises(errors.StaticAttributeError, match="dt"), dt.set(value):
        raise AssertionError
    assert dt.get() is None


def test_the_fix_for_what_cannot_be_static_is_about_contexts() -> None:
    dt = mu.Context("dt")
    with pytest.raises(errors.StaticAttributeError) as caught, dt.set([1]):
        pass
    assert "self.dt" not in str(caught.value)


def test_a_mutable_object_can_be_kept_by_identity() -> None:
    dt, config = mu.Context("dt"), [1, 2]
    with dt.set(mu.static(config)):
        assert dt.get() is config


@pytest.mark.parametrize("value", [{}, [], ()])
def test_an_empty_tree_is_no_tree_of_arrays(value: Any) -> None:
    dt = mu.Context("dt", 3)
    if value == ():
        with dt.set(value):
            assert dt.get() == ()
    else:
        with pytest.raises(errors.StaticAttributeError), dt.set(value):
            raise AssertionError


def test_numbers_are_static_and_arrays_are_not() -> None:
    dt = mu.Context("dt")
    seen: list[Any] = []
    f = mu.jit(lambda: seen.append(type(dt.get())))
    for value in (1, 1.0, True, np.float32(1), "1", f32(1), np.ones(2, np.float32)):
        with dt.set(value):
            f()
    assert seen[:5] == [int, float, bool, np.float32, str]
    assert all(issubclass(kind, jax.core.Tracer) for kind in seen[5:])
    with dt.set(np.ones(2, np.float32)):
        assert isinstance(dt.get(), jax.Array), "as every state, it is stored as a JAX array"


def test_a_numpy_array_is_copied_in() -> None:
    dt, x = mu.Context("dt"), np.zeros(2, np.float32)
    with dt.set(x):
        x[:] = 7
        np.testing.assert_array_equal(dt.get(), [0, 0])


# -- how often it compiles -------------------------------------------------------------------------------------


def test_each_static_value_is_one_program(traces: Any) -> None:
    dt = mu.Context("dt", 1.0)
    f = mu.jit(traces.count(lambda x: x * dt.get()))
    for _ in range(3):
        assert float(f(f32(1))) == 1
        for value in (0.5, 0.25, 2):
            with dt.set(value if isinstance(value, float) else float(value)):
                assert float(f(f32(1))) == value
    assert traces.total == 4
    with traces.compilations() as compiled, dt.set(0.5):
        f(f32(3))
    assert compiled.count == 0


def test_values_that_are_equal_but_not_the_same(traces: Any) -> None:
    flag = mu.Context("flag")
    f = mu.jit(traces.count(lambda: jnp.asarray(repr(flag.get()) == "True")))
    for value, expected in ((1, False), (True, True), (1.0, False), (0.0, False), (-0.0, False)):
        with flag.set(value):
            assert bool(f()) is expected
    assert traces.total == 5
    with flag.set(float("nan")):
        f()
    with flag.set(float("nan")):
        f()
    assert traces.total == 6


def test_static_values_of_many_kinds(traces: Any) -> None:
    class Mode(enum.Enum):
        A = 1
        B = 2

    rules = mu.Context("rules")
    seen: list[Any] = []
    f = mu.jit(traces.count(lambda: seen.append(rules.get())))
    values: list[Any] = [Mode.A, Mode.B, jnp.float32, jnp.bfloat16, (("a", None), ("b", "x")), jnp.tanh, len, "x", None]
    for _ in range(2):
        for value in values:
            with rules.set(value):
                f()
    assert seen == values


@pytest.mark.parametrize("value", [f32(1), {"a": f32(1), "b": [f32(2)]}, (f32(1), f32(2))])
def test_arrays_are_arguments(value: Any, traces: Any) -> None:
    dt = mu.Context("dt")
    f = mu.jit(traces.count(lambda x: x * sum(jax.tree.leaves(dt.get()))))
    total = sum(float(leaf) for leaf in jax.tree.leaves(value))
    with dt.set(value):
        assert float(f(f32(2))) == 2 * total
    bigger = jax.tree.map(lambda x: x + 1, value)
    x = f32(2)
    with traces.compilations() as compiled:
        with dt.set(bigger):
            out = f(x)
        with dt.set(value):
            assert float(f(x)) == 2 * total
    assert float(out) == 2 * (total + len(jax.tree.leaves(value)))
    assert traces.total == 1
    assert compiled.count == 0


def test_another_type_of_array_is_another_trace(traces: Any) -> None:
    dt = mu.Context("dt")
    f = mu.jit(traces.count(lambda: jnp.sum(dt.get())))
    values = [jnp.ones(2), jnp.ones(3), jnp.ones(2, jnp.int32), jnp.ones((2, 1))]
    for _ in range(2):
        for value in values:
            with dt.set(value):
                assert f() == value.sum()
    assert traces.total == 4


def test_what_is_not_read_still_compiles_only_once_for_arrays(traces: Any) -> None:
    dt = mu.Context("dt")
    f = mu.jit(traces.count(lambda x: x + 1))
    for k in range(4):
        with dt.set(f32(k)):
            f(f32(1))
    assert traces.total == 1


def test_the_order_in_which_contexts_are_set_does_not_matter(traces: Any) -> None:
    a, b = mu.Context("a"), mu.Context("b")
    f = mu.jit(traces.count(lambda: a.get() * b.get() * f32(1)))
    with a.set(2.0), b.set(3.0):
        assert float(f()) == 6
    with b.set(3.0), a.set(2.0):
        assert float(f()) == 6
    with a.set(7.0), b.set(3.0), a.set(2.0):
        assert float(f()) == 6
    assert traces.total == 1


def test_an_array_then_a_number_then_nothing(traces: Any) -> None:
    dt = mu.Context("dt", 4.0)
    f = mu.jit(traces.count(lambda x: x * dt.get()))
    for _ in range(3):
        with dt.set(f32(2)):
            assert float(f(f32(1))) == 2
        with dt.set(3.0):
            assert float(f(f32(1))) == 3
        assert float(f(f32(1))) == 4
    assert traces.total == 3


def test_one_array_in_two_contexts() -> None:
    a, b = mu.Context("a"), mu.Context("b")
    x = f32(2)
    f = mu.jit(lambda: a.get() + 10 * b.get())
    with a.set(x), b.set(x):
        assert float(f()) == 22
    with a.set(x), b.set(f32(3)):
        assert float(f()) == 32
    with a.set(f32(4)), b.set(x):
        assert float(f()) == 24


@pytest.mark.parametrize("form", ["argument", "closure"])
@pytest.mark.parametrize("again", [1, 3])
def test_fifty_rounds_do_not_grow_caches(form: str, again: int, traces: Any) -> None:
    dt, net = mu.Context("dt"), Net()
    body = traces.count(lambda m, x: m(x) * dt.get())
    f = mu.jit(body) if form == "argument" else mu.jit(lambda x: body(net, x))
    args = (net, f32(1)) if form == "argument" else (f32(1),)
    for k in range(50):
        with dt.set(f32(k)):
            for _ in range(again):
                assert float(f(*args)) == 2 * k
        compiler = f._compiler
        (program,) = set(compiler.programs.values())  # filed before its trace, and after it
        assert len(program.records) == 1
        assert len(compiler.bindings) <= 1 and len(compiler._captured) <= 1
        assert sum(len(found) for found in (bindings_of(net) or {}).values()) <= 1
    assert traces.total == 1
    assert int(net.calls) == 50 * again


def test_a_binding_is_kept_after_it_is_replaced() -> None:
    dt, net = mu.Context("dt"), Net()
    f = mu.jit(lambda x: net(x) * dt.get())
    for k in range(3):
        with dt.set(f32(k)):
            f(f32(1))
            assert len(f._compiler.bindings) == 1


def test_context_values_die() -> None:
    dt = mu.Context("dt")
    net = Net()
    f = mu.jit(lambda x: net(x) * dt.get())
    arrays = []
    for k in range(5):
        value = f32(k)
        arrays.append(weakref.ref(value))
        with dt.set(value):
            f(f32(1))
        del value
    gc.collect()
    assert sum(ref() is not None for ref in arrays) <= 1, "but for the binding of the last call"


# -- models ----------------------------------------------------------------------------------------------------


def test_a_model_is_threaded(traces: Any) -> None:
    current = mu.Context("model")
    f = mu.jit(traces.count(lambda x: current.get()(x)))
    a, b = Net(2.0), Net(3.0)
    for _ in range(2):
        with current.set(a):
            assert float(f(f32(1))) == 2
        with current.set(b):
            assert float(f(f32(1))) == 3
    assert (int(a.calls), int(b.calls)) == (2, 2)
    assert traces.total == 1, "another model of the same structure compiles nothing"
    a.w.value = f32(5)
    with current.set(a):
        assert current.get() is a
        assert float(f(f32(1))) == 5


def test_a_variable_is_threaded() -> None:
    time = mu.Context("t")
    t = mu.Variable(0.0)
    f = mu.jit(lambda: time.get().set(time.get() + 1))
    with time.set(t):
        f()
        f()
        time.get().value += 1
    assert float(t) == 3


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda net: {0: net}, id="dict"),
        pytest.param(lambda net: [net], id="list"),
        pytest.param(lambda net: (net,), id="tuple"),
        pytest.param(lambda net: (net, "static"), id="mixed"),
    ],
)
def test_models_in_containers_are_threaded_or_refused(make: Callable[[Net], Any], compiled: bool) -> None:
    nets, net = mu.Context("nets"), Net()
    f = mu.jit(lambda x: nets.get()[0](x)) if compiled else lambda x: nets.get()[0](x)
    value = make(net)
    try:
        with nets.set(value):
            net.w.value = f32(3)
            assert nets.get()[0] is net
            assert float(f(f32(1))) == 3
            net.w.value = f32(4)
            assert float(f(f32(1))) == 4
            assert int(net.calls) == 2
    except errors.StaticAttributeError:
        assert int(net.calls) == 0


def test_a_model_that_is_an_argument_too(traces: Any) -> None:
    current = mu.Context("model")
    net, other = Net(), Net(3.0)

    def f(m: Any) -> Any:
        m.w.value = m.w + 1
        return current.get().w.value

    g = mu.jit(traces.count(f))
    with current.set(net):
        assert float(g(net)) == 3
        assert float(g(other)) == 3
        assert float(g(net)) == 4
    with current.set(other):
        assert float(g(other)) == 5
    assert (float(net.w), float(other.w)) == (4, 5)


def test_gradients_of_a_model_in_a_context() -> None:
    current = mu.Context("model")
    net = Net()
    with current.set(net):
        grads = mu.grad(lambda x: current.get()(x) ** 2, of=net)(f32(3))
        compiled = mu.jit(mu.grad(lambda x: current.get()(x) ** 2, of=net))(f32(3))
    assert float(grads["w"]) == float(compiled["w"]) == 36
    assert int(net.calls) == 2


def test_a_dropped_model_is_freed(traces: Any) -> None:
    current = mu.Context("model")
    f = mu.jit(lambda x: current.get()(x))
    gone = []
    for _ in range(4):
        net = Net()
        gone.append(weakref.ref(net))
        with current.set(net):
            f(f32(1))
            f(f32(1))
        del net
    gc.collect()
    assert [ref() for ref in gone] == [None] * 4
    assert len(f._compiler.bindings) == 0
    assert len(f._compiler.programs) == 1


def test_a_default_that_is_a_model() -> None:
    net = Net()
    current = mu.Context("model", net)
    f = mu.jit(lambda x: current.get()(x))
    assert float(f(f32(1))) == 2
    net.w.value = f32(3)
    assert float(f(f32(1))) == 3
    assert int(net.calls) == 2


def test_a_structure_that_changes_inside() -> None:
    current = mu.Context("model")
    net = Net()

    def f() -> None:
        current.get().extra = mu.Variable(1.0)

    with current.set(net):
        mu.jit(f)()
    assert float(net.extra) == 1


# -- threads and tasks -----------------------------------------------------------------------------------------


def test_each_thread_has_its_own() -> None:
    dt = mu.Context("dt", 0.0)
    f = mu.jit(lambda x: x + dt.get())
    barrier = threading.Barrier(4)
    failures: list[Any] = []

    def work(k: int) -> None:
        try:
            assert dt.get() == 0.0
            for round in range(5):
                with dt.set(float(k) if k % 2 else f32(k)):
                    barrier.wait(30)
                    got = float(f(f32(round)))
                    if got != k + round:
                        failures.append((k, round, got))
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    with dt.set(99.0):
        threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert dt.get() == 99.0
    assert failures == []


def test_a_copied_context_goes_to_a_thread() -> None:
    dt = mu.Context("dt", 0.0)
    seen: list[Any] = []
    with dt.set(1.0):
        copied = contextvars.copy_context()
    thread = threading.Thread(target=lambda: copied.run(lambda: seen.append(dt.get())))
    thread.start()
    thread.join(30)
    assert seen == [1.0]
    assert dt.get() == 0.0


def test_tasks_have_their_own() -> None:
    dt = mu.Context("dt", 0.0)
    f = mu.jit(lambda x: x + dt.get())

    async def work(k: int) -> list[float]:
        seen = []
        with dt.set(float(k) if k % 2 else f32(k)):
            for _ in range(3):
                await asyncio.sleep(0)
                seen.append(float(f(f32(0))))
        return [*seen, float(dt.get())]

    async def main() -> Any:
        with dt.set(7.0):
            results = await asyncio.gather(*(work(k) for k in range(4)))
            return results, dt.get()

    results, after = asyncio.run(main())
    assert results == [[k, k, k, 7] for k in range(4)]
    assert after == 7.0


# -- set and read inside transforms ----------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "name", ["jit", "vmap", "grad", "scan", "remat", "cond", "for_loop", "fori_loop", "while_loop"]
)
@pytest.mark.parametrize("static", [False, True])
def test_read_inside(name: str, static: bool, compiled: bool) -> None:
    dt = mu.Context("dt")
    n = mu.Variable(0.0)

    def body(x: Any) -> Any:
        n.value += dt.get()
        return x * dt.get()

    calls: dict[str, Callable[[], Any]] = {
        "jit": lambda: mu.jit(body)(f32(3)),
        "vmap": lambda: mu.vmap(body)(jnp.full(2, 3.0))[0],
        "grad": lambda: 3 * mu.grad(body)(f32(3)),
        "scan": lambda: mu.scan(lambda c, x: (c, body(x)), 0, jnp.full(1, 3.0))[1][0],
        "remat": lambda: mu.remat(body)(f32(3)),
        "cond": lambda: mu.cond(True, body, lambda x: x, f32(3)),
        "for_loop": lambda: mu.for_loop(body, jnp.full(1, 3.0))[0],
        "fori_loop": lambda: mu.fori_loop(0, 1, lambda i, x: body(x), f32(3)),
        "while_loop": lambda: mu.while_loop(lambda x: n.value < dt.get(), body, f32(3)),
    }
    call = calls[name]
    f = mu.jit(lambda: call()) if compiled else call
    total = 0.0
    for value in (2.0, 5.0, 2.0):
        if name == "while_loop":
            n.value, total = f32(0), 0.0
        with dt.set(value if static else f32(value)):
            assert float(f()) == 3 * value
        total += value
        assert float(n) == total


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["jit", "vmap", "grad", "scan", "remat", "cond", "for_loop", "fori_loop"])
@pytest.mark.parametrize("inner", ["plain", "jit", "remat", "cond", "scan"])
def test_set_inside_to_a_traced_value(name: str, inner: str, compiled: bool) -> None:
    dt = mu.Context("dt", 0.0)
    n = mu.Variable(0)

    def read() -> Any:
        return dt.get() * 2

    reads: dict[str, Callable[[], Any]] = {
        "plain": read,
        "jit": mu.jit(read),
        "remat": lambda: mu.remat(read)(),
        "cond": lambda: mu.cond(n.value > 0, read, lambda: read() * 0),
        "scan": lambda: mu.scan(lambda c, _: (c, read()), 0, length=2)[1][1],
    }

    def body(x: Any) -> Any:
        n.value += 1
        with dt.set(x + 1):
            first = reads[inner]()
            with dt.set(x * 10):
                second = reads[inner]()
        assert dt.get() == 0.0
        return first + second

    calls: dict[str, Callable[[Any], Any]] = {
        "jit": lambda x: mu.jit(body)(x),
        "vmap": lambda x: mu.vmap(body)(jnp.stack([x, x]))[1],
        "grad": lambda x: mu.value_and_grad(body)(x)[0],
        "scan": lambda x: mu.scan(lambda c, x: (c, body(x)), 0, jnp.stack([x]))[1][0],
        "remat": lambda x: mu.remat(body)(x),
        "cond": lambda x: mu.cond(True, body, lambda x: x, x),
        "for_loop": lambda x: mu.for_loop(body, jnp.stack([x]))[0],
        "fori_loop": lambda x: mu.fori_loop(0, 1, lambda i, x: body(x), x),
    }
    call = calls[name]
    f = mu.jit(call) if compiled else call
    for k in (1.0, 2.0, 3.0):
        assert float(f(f32(k))) == 2 * (k + 1) + 20 * k
    assert int(n) == 3
    assert dt.get() == 0.0


def test_gradients_go_through_a_context() -> None:
    dt = mu.Context("dt")

    def f(x: Any) -> Any:
        with dt.set(x**2):
            return mu.jit(lambda: dt.get() * 3)() + mu.remat(lambda: dt.get())()

    assert float(mu.grad(f)(f32(2))) == 16
    assert float(mu.jit(mu.grad(f))(f32(2))) == 16
    assert float(jax.grad(f)(f32(2))) == 16
    np.testing.assert_allclose(mu.vmap(mu.grad(f))(jnp.arange(3.0)), 8 * jnp.arange(3.0))
    np.testing.assert_allclose(mu.hessian(f)(f32(2)), 8)


def test_nested_jit_reads_the_outer_value(traces: Any) -> None:
    dt = mu.Context("dt")
    inner = mu.jit(traces.count(lambda x: x * dt.get()))
    outer = mu.jit(lambda x: inner(x) + inner(x + 1))
    for k in (2.0, 3.0):
        with dt.set(f32(k)):
            assert float(outer(f32(1))) == 3 * k
    assert traces.total == 1
    for k in (2.0, 3.0):
        with dt.set(k):
            assert float(outer(f32(1))) == 3 * k
    assert traces.total == 3


def test_set_around_and_inside_again() -> None:
    dt = mu.Context("dt", 1.0)

    @mu.jit
    def f(x: Any) -> Any:
        a = dt.get() * x
        with dt.set(5.0):
            b = inner(x)
        return a, b, inner(x)

    inner = mu.jit(lambda x: x * dt.get())
    for value in (2.0, f32(3), 2.0):
        with dt.set(value):
            a, b, c = f(f32(1))
        assert (float(a), float(b), float(c)) == (float(value), 5, float(value))
    assert [float(x) for x in f(f32(1))] == [1, 5, 1]


def test_an_exception_inside_a_transform() -> None:
    dt, n = mu.Context("dt", 1.0), mu.Variable(0)

    @mu.jit
    def f(x: Any) -> Any:
        n.value += 1
        with dt.set(x):
            raise KeyError("now")

    for _ in range(2):
        with dt.set(f32(4)), pytest.raises(KeyError):
            f(f32(1))
        assert dt.get() == 1.0
        assert int(n) == 0


# -- raw JAX ---------------------------------------------------------------------------------------------------


def test_raw_jit_may_not_read_an_array() -> None:
    dt = mu.Context("dt")
    raw = jax.jit(lambda x: x * dt.get())
    with dt.set(f32(2)), pytest.raises(errors.TraceLevelError):
        raw(f32(1))
    for transform in (jax.checkpoint, lambda f: lambda x: jax.lax.scan(lambda c, y: (c, f(y)), 0, x[None])):
        with dt.set(f32(2)), pytest.raises(errors.TraceLevelError):
            transform(lambda x: x * dt.get())(f32(1))


def test_the_refusal_says_what_it_is() -> None:
    dt = mu.Context("dt")
    with dt.set(f32(2)), pytest.raises(errors.TraceLevelError, match="dt"):
        jax.jit(lambda x: x * dt.get())(f32(1))


@pytest.mark.parametrize("raw", [jax.grad, jax.vmap])
def test_raw_grad_and_vmap_may_read(raw: Any) -> None:
    dt = mu.Context("dt")
    x = f32(1) if raw is jax.grad else jnp.ones(2)
    for k in (2.0, 3.0):
        with dt.set(f32(k)):
            np.testing.assert_array_equal(raw(lambda x: x * dt.get())(x), jnp.full(x.shape, k))


def test_raw_scan_inside_mu_jit_may_read() -> None:
    dt = mu.Context("dt")
    f = mu.jit(lambda xs: jax.lax.scan(lambda c, x: (c, x * dt.get()), 0, xs)[1])
    for k in (2.0, 3.0):
        with dt.set(f32(k)):
            np.testing.assert_array_equal(f(jnp.ones(2)), [k, k])


def test_set_under_raw_transforms() -> None:
    dt = mu.Context("dt")

    def f(x: Any) -> Any:
        with dt.set(x * 2):
            return dt.get() + mu.jit(lambda: dt.get())() + mu.vmap(lambda y: dt.get() * y)(jnp.ones(2))[0]

    assert float(jax.jit(f)(f32(1))) == 6
    assert float(jax.jit(f)(f32(2))) == 12
    assert float(jax.grad(f)(f32(2))) == 6
    np.testing.assert_array_equal(jax.vmap(f)(jnp.arange(3.0)), 6 * jnp.arange(3.0))
    assert float(jax.checkpoint(f)(f32(2))) == 12


def test_functionalize_with_a_context_set() -> None:
    dt, net = mu.Context("dt", 1.0), Net()
    pure, state = mu.functionalize(lambda x: net(x) * dt.get())
    with dt.set(3.0):
        out, state = pure(state, f32(1))
        assert float(out) == 6
    with dt.set(f32(5)):
        pure_inside, inside = mu.functionalize(lambda x: net(x) * dt.get())
        assert set(inside) == set(state), "what a context is set to is no state of the function"
        out, state = pure(state, f32(1))
        assert float(out) == 10
    out, state = pure_inside(inside, f32(1))
    assert float(out) == 2
    assert int(net.calls) == 0


def test_eval_shape_and_make_jaxpr() -> None:
    dt = mu.Context("dt")
    with dt.set(jnp.ones(3)):
        assert mu.eval_shape(lambda: dt.get() * 2).shape == (3,)
        assert len(mu.make_jaxpr(lambda: dt.get() * 2)().jaxpr.outvars) == 1


# -- the value itself ------------------------------------------------------------------------------------------


def test_a_dict_that_is_changed_in_place_does_not_reach_the_context() -> None:
    config = mu.Context("config")
    mine = {"a": f32(1)}
    with config.set(mine):
        mine["a"] = f32(2)
        assert float(config.get()["a"]) == 1

        def f() -> Any:
            got = config.get()
            got["a"] = f32(7)
            return mu.jit(lambda: config.get()["a"])()

        assert float(mu.jit(f)()) in (1, 7)
        assert float(config.get()["a"]) == 1


def test_a_random_key() -> None:
    key = mu.Context("key")
    f = mu.jit(lambda: jax.random.uniform(key.get()))
    values = []
    for seed in (0, 1, 0):
        with key.set(jax.random.key(seed)):
            values.append(float(f()))
    assert values[0] == values[2] != values[1]
    assert values[0] == float(jax.random.uniform(jax.random.key(0)))


def test_a_tuple_with_a_key_is_static() -> None:
    setting = mu.Context("setting")
    f = mu.jit(lambda: jax.random.uniform(setting.get()[0]))
    for seed in (0, 1, 0):
        with setting.set((jax.random.key(seed), "static")):
            assert float(f()) == float(jax.random.uniform(jax.random.key(seed)))


@pytest.mark.parametrize("name", ["jit", "scan", "cond", "vmap in jit"])
def test_a_key_that_is_captured(name: str) -> None:
    key = jax.random.key(0)

    def body(x: Any) -> Any:
        return jax.random.uniform(key) + x

    calls: dict[str, Callable[[], Any]] = {
        "jit": lambda: mu.jit(body)(f32(1)),
        "scan": lambda: mu.scan(lambda c, x: (c, body(x)), 0, jnp.ones(1))[1][0],
        "cond": lambda: mu.cond(True, body, body, f32(1)),
        "vmap in jit": lambda: mu.jit(lambda: mu.vmap(body)(jnp.ones(2))[0])(),
    }
    np.testing.assert_allclose(calls[name](), 1 + jax.random.uniform(key))


def test_donation_does_not_take_the_value() -> None:
    dt, v = mu.Context("dt"), mu.Variable(jnp.zeros(4))
    value = jnp.ones(4)

    @mu.jit
    def f() -> None:
        v.value = dt.get()

    with dt.set(value):
        f()
        f()
        v.value = v + 1
        mu.jit(lambda: v.set(v + 1))()
        np.testing.assert_array_equal(dt.get(), np.ones(4))
    np.testing.assert_array_equal(value, np.ones(4))
    np.testing.assert_array_equal(v, np.full(4, 3.0))


def test_a_state_that_is_the_value() -> None:
    """A state's array as a context's value: the state is written and donated, the value stays."""
    dt, v = mu.Context("dt"), mu.Variable(jnp.ones(4))

    @mu.jit
    def f() -> None:
        v.value = v + dt.get()

    with dt.set(v.value):
        for _ in range(3):
            f()
        np.testing.assert_array_equal(dt.get(), np.ones(4))
    np.testing.assert_array_equal(v, np.full(4, 4.0))


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, mu.jit, mu.remat])
def test_a_kept_transform_notices_a_static_value(wrap: Any) -> None:
    dt = mu.Context("dt", 1.0)
    kept = wrap(lambda x: x * dt.get())
    step = mu.jit(lambda x: kept(x))

    def twice(x: Any) -> Any:
        before = mu.grad(kept)(x)
        with dt.set(3.0):
            return before, kept(x), mu.vmap(kept)(x[None])[0], kept(x)

    for _ in range(2):
        assert float(step(f32(2))) == 2
        with dt.set(5.0):
            assert float(step(f32(2))) == 10
        assert [*map(float, mu.jit(twice)(f32(2)))] == [1, 6, 6, 6]


def test_no_leaks() -> None:
    dt, net = mu.Context("dt"), Net()

    def f(x: Any) -> Any:
        with dt.set(x):
            return mu.scan(lambda c, _: (c + dt.get(), None), x, length=2)[0] + net(x)

    with jax.checking_leaks():
        assert float(mu.jit(f)(f32(1))) == 5
        assert float(mu.jit(mu.grad(f))(f32(1))) == 5
        with dt.set(f32(3)):
            assert float(mu.jit(lambda x: x * dt.get())(f32(1))) == 3
        assert mu.vmap(f)(jnp.ones(2)).shape == (2,)


def test_no_tracer_stays_behind() -> None:
    dt = mu.Context("dt")
    inner = mu.jit(lambda: dt.get() * 2)

    def f(x: Any) -> Any:
        with dt.set(x):
            return inner()

    for k in (1.0, 2.0):
        assert float(mu.jit(f)(f32(k))) == 2 * k
        assert float(mu.grad(f)(f32(k))) == 2
    with dt.set(f32(4)):
        assert float(inner()) == 8
    assert len(inner._compiler.bindings) <= 2
