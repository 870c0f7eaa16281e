"""Small programs that are easy to get silently wrong: each gives what hand-threaded JAX gives, or names the state.

Where it makes sense a program is run in both styles: the model is an argument of the step, or closed over by it.
"""

from __future__ import annotations

import copy
import functools
import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mutatis as mu
from mutatis import errors

pytestmark = pytest.mark.once  # many alike; what JAX's versions differ in, the twins and traces of transforms show

Style = Callable[..., Callable[..., Any]]


def _as_argument(transform: Callable[..., Any], body: Callable[..., Any], *nodes: Any) -> Callable[..., Any]:
    transformed = transform(body)
    return lambda *args: transformed(*nodes, *args)


def _closed_over(transform: Callable[..., Any], body: Callable[..., Any], *nodes: Any) -> Callable[..., Any]:
    return transform(lambda *args: body(*nodes, *args))


@pytest.fixture(params=[_as_argument, _closed_over], ids=["argument", "closure"])
def bind(request: pytest.FixtureRequest) -> Style:
    """`bind(transform, body, *nodes)(*args)` runs ``body(*nodes, *args)``, its nodes passed in or closed over."""
    return request.param


class Net(mu.Module):
    """A weight, a counter, a statistic and a flag."""

    def __init__(self, scale: float = 1.0) -> None:
        self.w = mu.Param(scale * jnp.arange(1.0, 4.0))
        self.n = mu.Variable(0)
        self.mean = mu.BatchStat(jnp.zeros(()))
        self.training = True
        self.steps = 0

    def __call__(self, x: Any) -> jax.Array:
        self.n += 1
        self.mean.value = 0.5 * self.mean.value + 0.5 * jnp.mean(x)
        return jnp.sum(self.w.value * x)


class Tied(mu.Module):
    """One weight under two names."""

    def __init__(self) -> None:
        self.first = mu.Param(jnp.array([1.0, 2.0]))
        self.second = self.first
        self.n = mu.Variable(0)

    def __call__(self, x: jax.Array) -> jax.Array:
        self.n += 1
        return jnp.sum(self.first.value * x) + 3.0 * jnp.sum(self.second.value**2)


X = np.array([1.0, 2.0, 3.0], np.float32)


def count(m: Any) -> Any:
    m.n += 1
    return m.n.value


def means(xs: Any, start: float = 0.0) -> list[float]:
    """The running statistic of `Net`, threaded by hand."""
    out = []
    for x in xs:
        start = 0.5 * start + 0.5 * float(np.mean(x))
        out.append(start)
    return out


# --- jit -----------------------------------------------------------------------------------------------------------


def test_01_a_write_is_seen_outside_and_traced_once(bind: Style, traces: Any) -> None:
    m = Net()
    step = bind(mu.jit, traces.count(Net.__call__), m)
    out = [float(step(X * k)) for k in (1, 2, 3)]
    assert out == [14.0, 28.0, 42.0]
    assert int(m.n) == 3
    assert float(m.mean) == pytest.approx(means([X, 2 * X, 3 * X])[-1])
    assert traces.total == 1


def test_02_one_module_as_two_arguments_is_one_state(bind: Style) -> None:
    m = Net()

    def body(a: Net, b: Net) -> Any:
        a.n += 1
        b.n += 1
        return a.n.value * 10 + b.n.value

    assert int(bind(mu.jit, body, m, m)()) == 22
    assert int(m.n) == 2


@pytest.mark.parametrize("style", ["argument", "closure"])
def test_03_two_modules_first_then_one_twice(style: str) -> None:
    a, b = Net(), Net()
    pair = [a, b]

    def body(left: Net, right: Net) -> Any:
        left.n += 1
        right.n += 10
        return left.n.value

    by_argument = mu.jit(body)
    by_closure = mu.jit(lambda: body(*pair))
    run = (lambda: by_argument(*pair)) if style == "argument" else by_closure
    assert int(run()) == 1
    pair[1] = a
    assert int(run()) == 12
    pair[1] = b
    assert int(run()) == 13
    assert (int(a.n), int(b.n)) == (13, 20)


def test_04_a_flipped_flag_changes_the_answer(bind: Style) -> None:
    m = Net()
    step = bind(mu.jit, lambda m, x: x * 2 if m.training else x, m)
    assert float(step(3.0)) == 6.0
    m.training = False
    assert float(step(3.0)) == 3.0
    m.training = True
    assert float(step(3.0)) == 6.0


def test_05_flipping_back_and_forth_compiles_twice(bind: Style, traces: Any) -> None:
    m = Net()
    step = bind(mu.jit, traces.count(lambda m, x: x * 2 if m.training else x), m)
    for k in range(8):
        m.training = k % 2 == 0
        assert float(step(3.0)) == (6.0 if m.training else 3.0)
    assert traces.total == 2


_global = Net()


def _helper() -> Any:
    _global.n += 1
    return _global.n.value


@pytest.mark.parametrize("way", ["closure", "global", "method", "partial", "default"])
def test_06_a_closure_writes_a_state_it_was_not_given(way: str) -> None:
    m = _global if way == "global" else Net()

    def by_default(m: Any = m) -> Any:
        return count(m)

    f: Any = {
        "closure": lambda: count(m),
        "global": _helper,
        "method": functools.partial(m.__call__, X),
        "partial": functools.partial(count, m),
        "default": by_default,
    }[way]
    before = int(m.n)
    step = mu.jit(f)
    step()
    step()
    assert int(m.n) == before + 2


def test_07_the_closed_over_name_is_bound_to_another_model() -> None:
    first, second = Net(), Net()
    m = first
    step = mu.jit(lambda: count(m))
    step()
    m = second
    assert int(step()) == 1
    assert (int(first.n), int(second.n)) == (1, 1)
    m = first
    assert int(step()) == 2
    assert (int(first.n), int(second.n)) == (2, 1)


def test_07_the_global_name_is_bound_to_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    step = mu.jit(_helper)
    step()
    other = Net()
    monkeypatch.setitem(globals(), "_global", other)
    assert int(step()) == 1
    assert int(other.n) == 1


def test_08_a_state_gets_another_shape_between_calls(bind: Style) -> None:
    m = Net()
    step = bind(mu.jit, lambda m: jnp.sum(m.w.value) + m.w.value.shape[0], m)
    assert float(step()) == 9.0
    m.w.value = jnp.ones(5)
    assert float(step()) == 10.0


def test_09_a_state_changes_dtype_inside_the_step(bind: Style, traces: Any) -> None:
    m = Net()

    def body(m: Net) -> None:
        m.n.value = m.n.value.astype(jnp.float32) + 0.5

    step = bind(mu.jit, traces.count(body), m)
    for k in range(3):
        step()
        assert m.n.dtype == jnp.float32
        assert float(m.n) == 0.5 * (k + 1)
    assert traces.total == 2


def test_10_a_python_int_in_a_state_is_an_array(bind: Style, traces: Any) -> None:
    m = Net()
    m.n.value = 5
    step = bind(mu.jit, traces.count(count), m)
    assert [int(step()) for _ in range(3)] == [6, 7, 8]
    assert m.n.dtype == jnp.int32
    assert not m.n.value.weak_type
    m.n.value = 0
    step()
    assert traces.total == 1


def test_11_a_plain_int_counted_up_is_refused(bind: Style) -> None:
    m = Net()

    def body(m: Net) -> None:
        m.steps += 1

    with pytest.raises(errors.StaticAttributeError, match="steps"):
        bind(mu.jit, body, m)()
    assert m.steps == 0


def test_12_a_state_created_on_first_use(bind: Style, traces: Any) -> None:
    m = Net()

    def body(m: Any, x: Any) -> Any:
        if not hasattr(m, "cache"):
            m.cache = mu.Cache(jnp.zeros_like(x))
        m.cache += x
        return m.cache.value

    step = bind(mu.jit, traces.count(body), m)
    for k in (1, 2, 3):
        np.testing.assert_allclose(step(X), k * X)
    np.testing.assert_allclose(m.cache.value, 3 * X)
    assert traces.total == 2


def test_12_a_deferred_state_is_created_under_jit(bind: Style) -> None:
    m = Net()
    m.late = mu.Variable(init=lambda: jnp.ones(2))
    step = bind(mu.jit, lambda m: m.late.set(2.0 * m.late.value), m)
    step()
    step()
    np.testing.assert_allclose(m.late.value, [4.0, 4.0])


class Broken(Exception):
    """Raised by the user's code."""


def test_13_an_exception_in_mid_trace_restores_the_state(bind: Style) -> None:
    m = Net()
    bad = [True]

    def body(m: Net, x: Any) -> Any:
        out = m(x)
        if bad[0]:
            raise Broken("mine", 7)
        return out

    step = bind(mu.jit, body, m)
    with pytest.raises(Broken) as info:
        step(X)
    assert info.value.args == ("mine", 7)
    assert (int(m.n), float(m.mean)) == (0, 0.0)
    bad[0] = False
    assert float(step(X)) == 14.0
    assert int(m.n) == 1


def test_14_attributes_written_before_the_exception_are_rolled_back(bind: Style) -> None:
    m = Net()
    m.blocks = [mu.Cache(jnp.zeros(2))]

    def body(m: Any) -> None:
        m.training = False
        m.extra = "new"
        m.blocks.append(mu.Cache(jnp.ones(2)))
        m.w = mu.Param(jnp.zeros(1))
        m.n += 1
        raise Broken

    w = m.w
    with pytest.raises(Broken):
        bind(mu.jit, body, m)()
    assert m.training is True
    assert not hasattr(m, "extra")
    assert len(m.blocks) == 1
    assert m.w is w
    assert count(m) == 1


@pytest.mark.parametrize("donate", ["auto", True, False])
def test_15_two_states_hold_one_buffer_and_are_donated(bind: Style, donate: Any) -> None:
    x = jnp.arange(4.0)
    a, b = mu.Variable(x), mu.Variable(x)

    def body(a: Any, b: Any) -> None:
        a.value = a.value + 1.0
        b.value = b.value * 2.0

    step = bind(functools.partial(mu.jit, donate=donate), body, a, b)
    step()
    step()
    np.testing.assert_allclose(a.value, np.arange(4.0) + 2)
    np.testing.assert_allclose(b.value, np.arange(4.0) * 4)
    np.testing.assert_allclose(x, np.arange(4.0))
    a.value = b.value
    step()
    np.testing.assert_allclose(a.value, np.arange(4.0) * 4 + 1)
    np.testing.assert_allclose(b.value, np.arange(4.0) * 8)


def test_16_a_module_built_inside_jit_and_returned() -> None:
    build = mu.jit(lambda scale: Net(scale))
    a, b = build(2.0), build(3.0)
    assert isinstance(a, Net)
    np.testing.assert_allclose(a.w.value, [2.0, 4.0, 6.0])
    np.testing.assert_allclose(b.w.value, [3.0, 6.0, 9.0])
    mu.jit(count)(a)
    a.n += 1
    assert (int(a.n), int(b.n)) == (2, 0)


def test_17_threads_trace_and_run_steps_at_once() -> None:
    shared = mu.jit(count)
    start = threading.Barrier(4)

    def work(k: int) -> tuple[int, float]:
        m = Net()
        own = mu.jit(lambda x: m(x))
        start.wait(60)
        for i in range(10):
            shared(m)
            own(X * i if k % 2 == 0 else X)
        return int(m.n), float(m.mean)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, range(4)))
    counted = means([X * i for i in range(10)])[-1]
    fixed = means([X] * 10)[-1]
    assert [n for n, _ in results] == [20] * 4
    assert [mean for _, mean in results] == pytest.approx([counted, fixed, counted, fixed])


@pytest.mark.parametrize("style", ["argument", "closure"])
def test_18_a_fresh_instance_does_not_compile_again(style: str, traces: Any) -> None:
    body = traces.count(Net.__call__)
    m = Net()
    by_argument, by_closure = mu.jit(body), mu.jit(lambda x: body(m, x))
    for k in range(1, 5):
        m = Net(float(k))
        assert float(by_argument(m, X) if style == "argument" else by_closure(X)) == 14.0 * k
        assert int(m.n) == 1
    assert traces.total == 1


def test_19_jit_inside_jit_on_one_state(bind: Style) -> None:
    m = Net()
    inner = mu.jit(count)

    def body(m: Net) -> Any:
        m.n += 10
        a = inner(m)
        m.n += 100
        return a, inner(m)

    assert [int(v) for v in bind(mu.jit, body, m)()] == [11, 112]
    assert int(m.n) == 112


def test_20_raw_jit_around_a_write() -> None:
    m = Net()
    with pytest.raises(errors.TraceLevelError, match=r"n`.*(\n.*)*mu\.jit"):
        jax.jit(lambda: m.n.set(1))()
    assert int(m.n) == 0


def test_20_raw_jit_around_a_write_to_an_argument() -> None:
    m = Net()
    with pytest.raises(errors.MutatisError, match=r"n`.*(\n.*)*mu\.jit"):
        jax.jit(lambda m: m.n.set(1))(m)
    assert int(m.n) == 0


def test_21_raw_grad_around_a_write() -> None:
    m = Net()
    with pytest.raises(errors.TraceLevelError, match=r"n`.*(\n.*)*mu\.(value_and_)?grad"):
        jax.grad(m)(jnp.ones(3))
    assert int(m.n) == 0


# --- gradients -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["argument", "closure"])
def differentiate(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """`differentiate(mu.grad, body, node, **options)(*args)`: the node is an argument, or what `of` names."""

    def make(transform: Callable[..., Any], body: Callable[..., Any], node: Any, **options: Any) -> Any:
        if request.param == "argument":
            transformed = transform(body, **options)
            return lambda *args: transformed(node, *args)
        return transform(lambda *args: body(node, *args), of=node, **options)

    return make


def test_22_the_loss_writes_once_and_only_parameters_get_gradients(differentiate: Any) -> None:
    m = Net()
    loss, grads = differentiate(mu.value_and_grad, Net.__call__, m)(X)
    assert float(loss) == 14.0
    assert list(grads.flat()) == [("w",)]
    np.testing.assert_allclose(grads["w"], X)
    assert int(m.n) == 1
    assert float(m.mean) == 1.0


def test_23_a_tied_weight_has_one_gradient(differentiate: Any) -> None:
    m = Tied()
    x = jnp.array([5.0, 7.0])
    grads = differentiate(mu.grad, Tied.__call__, m)(x)
    assert list(grads.flat()) == [("first",)]
    np.testing.assert_allclose(grads["first"], [5.0 + 6.0, 7.0 + 12.0])
    assert int(m.n) == 1


def _two_gradients(style: str, a: Net, b: Net) -> Any:
    def body(a: Any, b: Any) -> Any:
        own = jnp.sum(b.own.value) if hasattr(b, "own") else 0.0
        return a(X) + 10.0 * b(X) + own

    if style == "argument":
        return mu.grad(body, argnums=(0, 1))(a, b)
    return mu.grad(lambda: body(a, b), of=(a, b))()


@pytest.mark.parametrize("style", ["argument", "closure"])
def test_24_two_differentiated_modules_share_a_weight(style: str) -> None:
    a, b = Net(), Net()
    b.w = a.w
    b.own = mu.Param(jnp.ones(2))
    first, second = _two_gradients(style, a, b)
    np.testing.assert_allclose(first["w"], 11 * X)
    assert list(second.flat()) == [("own",)]
    np.testing.assert_allclose(second["own"], [1.0, 1.0])
    assert (int(a.n), int(b.n)) == (1, 1)


@pytest.mark.parametrize("style", ["argument", "closure"])
def test_24_the_second_module_has_only_the_shared_weight(style: str) -> None:
    a, b = Net(), Net()
    b.w = a.w
    first, second = _two_gradients(style, a, b)
    np.testing.assert_allclose(first["w"], 11 * X)
    assert list(second.flat()) == []


class Adapter(mu.Param):
    """A class of parameters that is trained alone."""


def test_25_gradients_for_one_class_of_parameters(differentiate: Any) -> None:
    m = Net()
    m.adapter = Adapter(jnp.ones(3))

    def body(m: Any) -> Any:
        return m(X) + jnp.sum(m.adapter.value * m.w.value)

    grads = differentiate(mu.grad, body, m, wrt=Adapter)()
    assert list(grads.flat()) == [("adapter",)]
    np.testing.assert_allclose(grads["adapter"], [1.0, 2.0, 3.0])
    assert int(m.n) == 1


def test_26_aux_from_a_state_written_in_the_loss(differentiate: Any) -> None:
    m = Net()

    def body(m: Net) -> Any:
        loss = m(X)
        return loss, (m.mean.value, m.n.value)

    (loss, (mean, n)), grads = differentiate(mu.value_and_grad, body, m, has_aux=True)()
    assert (float(loss), float(mean), int(n)) == (14.0, 1.0, 1)
    np.testing.assert_allclose(grads["w"], X)
    assert float(m.mean) == 1.0
    m.mean += 1.0


@pytest.mark.parametrize("compile_it", [False, True])
def test_27_gradient_for_an_array_while_a_state_is_written(compile_it: bool) -> None:
    m = Net()
    gradient = mu.grad(lambda x: m(x))
    gradient = mu.jit(gradient) if compile_it else gradient
    np.testing.assert_allclose(gradient(jnp.asarray(X)), [1.0, 2.0, 3.0])
    assert int(m.n) == 1
    assert float(m.mean) == 1.0


def test_28_second_derivative_of_a_function_that_writes(bind: Style) -> None:
    m = Net()

    def body(m: Net, x: Any) -> Any:
        m.n += 1
        m.mean.value = x
        return x**3 * jnp.sum(m.w.value)

    second = mu.grad(mu.grad(lambda x: body(m, x)))
    assert float(second(2.0)) == pytest.approx(72.0)
    assert (int(m.n), float(m.mean)) == (1, 2.0)
    step = bind(mu.jit, lambda m, x: mu.grad(mu.grad(lambda y: body(m, y)))(x), m)
    assert float(step(2.0)) == pytest.approx(72.0)
    assert int(m.n) == 2


@pytest.mark.parametrize("style", ["argument", "closure"])
def test_29_gradients_per_example_and_a_counter(style: str) -> None:
    m = Net()
    xs = jnp.asarray(np.stack([X, 2 * X]))

    def body(m: Net, x: Any) -> Any:
        m.n += 1
        return jnp.sum(m.w.value * x) ** 2

    if style == "argument":
        step = functools.partial(mu.jit(mu.vmap(mu.grad(body), in_axes=(None, 0))), m)
    else:
        step = mu.jit(mu.vmap(mu.grad(lambda x: body(m, x), of=m)))
    expected = jax.vmap(jax.grad(lambda w, x: jnp.sum(w * x) ** 2), in_axes=(None, 0))(jnp.arange(1.0, 4.0), xs)
    np.testing.assert_allclose(step(xs)["w"], expected, rtol=1e-6)
    assert int(m.n) == 1


# --- lanes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compile_it", [False, True])
@pytest.mark.parametrize("style", ["argument", "closure"])
def test_30_a_lane_dependent_write_is_refused(style: str, compile_it: bool) -> None:
    m = Net()
    if style == "argument":
        mapped: Any = mu.vmap(lambda m, x: m.mean.set(x), in_axes=(None, 0))
        mapped = functools.partial(mu.jit(mapped) if compile_it else mapped, m)
    else:
        mapped = mu.vmap(lambda x: m.mean.set(x))
        mapped = mu.jit(mapped) if compile_it else mapped
    with pytest.raises(errors.LaneError, match="mean`"):
        mapped(jnp.arange(3.0))
    assert float(m.mean) == 0.0
    assert m.mean.shape == ()


@pytest.mark.parametrize("style", ["argument", "closure"])
def test_31_an_ensemble(style: str) -> None:
    m = mu.vmap(Net)(jnp.arange(1.0, 4.0))
    assert (m.w.shape, m.n.shape, m.mean.shape) == ((3, 3), (3,), (3,))
    xs = jnp.asarray(np.stack([X, 2 * X, 3 * X]))
    if style == "argument":
        out = mu.vmap(Net.__call__)(m, xs)
    else:
        out = mu.vmap(lambda x: m(x), states=mu.StateAxes({...: 0}))(xs)
    np.testing.assert_allclose(out, [14.0, 56.0, 126.0])
    np.testing.assert_array_equal(m.n.value, [1, 1, 1])
    np.testing.assert_allclose(m.mean.value, [1.0, 2.0, 3.0])


def test_32_one_module_along_two_axes() -> None:
    m = mu.vmap(Net)(jnp.arange(1.0, 4.0))
    with pytest.raises(errors.AxisError, match=r"`a\.\w+`"):
        mu.vmap(lambda a, b: a(X), in_axes=(0, 1))(m, m)
    with pytest.raises(errors.AxisError, match=r"`a\.\w+`"):
        mu.vmap(lambda a, b: a(X), in_axes=(0, None))(m, m)
    np.testing.assert_array_equal(m.n.value, [0, 0, 0])


def test_33_a_stacked_tied_weight_stays_one_state() -> None:
    m = mu.vmap(lambda _: Tied())(jnp.arange(3))
    assert m.first is m.second
    assert list(mu.variables(m, mu.Param)) == [("first",)]
    grads = mu.vmap(mu.grad(Tied.__call__), in_axes=(0, None))(m, jnp.array([5.0, 7.0]))
    np.testing.assert_allclose(grads["first"], [[11.0, 19.0]] * 3)


def test_34_vmap_over_a_constructor() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    stacked = mu.vmap(lambda key: mu.nn.Linear(3, 2, rngs=mu.Rngs(key)))(keys)
    assert stacked.kernel.shape == (3, 3, 2)
    for k in range(3):
        np.testing.assert_allclose(
            stacked.kernel.value[k], mu.nn.Linear(3, 2, rngs=mu.Rngs(keys[k])).kernel.value, rtol=1e-6
        )


# --- loops ---------------------------------------------------------------------------------------------------------

XS = np.stack([X * k for k in range(1, 5)])


def eagerly(f: Callable[..., Any]) -> Callable[..., Any]:
    return f


@pytest.fixture(params=[eagerly, mu.jit], ids=["eager", "jit"])
def maybe_jit(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """`mu.jit`, or nothing."""
    return request.param


def test_35_scan_threads_a_counter_and_a_statistic(bind: Style, maybe_jit: Any) -> None:
    m = Net()

    def body(m: Net, xs: Any) -> Any:
        def one(carry: Any, x: Any) -> Any:
            carry += m(x)
            return carry, m.mean.value

        return mu.scan(one, jnp.float32(0.0), xs)

    total, ms = bind(maybe_jit, body, m)(XS)
    assert float(total) == 140.0
    np.testing.assert_allclose(ms, means(XS))
    assert (int(m.n), float(m.mean)) == (4, pytest.approx(means(XS)[-1]))


def test_36_fresh_randomness_per_step(bind: Style, maybe_jit: Any) -> None:
    rngs, twin = mu.Rngs(0), mu.Rngs(0)
    draw = bind(maybe_jit, lambda r: mu.for_loop(lambda: jax.random.normal(r()), length=4), rngs)
    first, second = draw(), draw()
    expected = [float(jax.random.normal(twin())) for _ in range(9)]
    np.testing.assert_allclose(np.concatenate([first, second]), expected[:8], rtol=1e-6)
    assert float(jax.random.normal(rngs())) == pytest.approx(expected[8])
    assert len(set(expected)) == 9


def test_37_scan_in_scan(bind: Style, maybe_jit: Any) -> None:
    m = Net()

    def body(m: Net, xs: Any) -> Any:
        def outer(row: Any) -> Any:
            m.n += 100
            return mu.for_loop(lambda x: m.mean.set(2.0 * m.mean.value + x) or count(m), row)

        return mu.for_loop(outer, xs)

    out = bind(maybe_jit, body, m)(XS)
    expected = 0.0
    for x in XS.ravel():
        expected = 2 * expected + float(x)
    np.testing.assert_array_equal(out, [[100 * (i + 1) + 3 * i + j + 1 for j in range(3)] for i in range(4)])
    assert float(m.mean) == expected
    assert int(m.n) == 412


def test_38_gradient_of_a_scan_that_writes(differentiate: Any) -> None:
    m = Net()

    def body(m: Net, xs: Any) -> Any:
        def one(x: Any) -> Any:
            m.n += 1
            m.mean.value = 0.5 * m.mean.value + jnp.sum(m.w.value * x) ** 2

        mu.for_loop(one, xs)
        return m.mean.value

    def plain(w: Any) -> Any:
        mean = jnp.float32(0.0)
        for x in XS:
            mean = 0.5 * mean + jnp.sum(w * x) ** 2
        return mean

    loss, grads = differentiate(mu.value_and_grad, body, m)(XS)
    expected, gradient = jax.value_and_grad(plain)(jnp.arange(1.0, 4.0))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(grads["w"], gradient, rtol=1e-6)
    np.testing.assert_allclose(m.mean.value, expected, rtol=1e-6)
    assert int(m.n) == 4


@pytest.mark.parametrize("style", ["argument", "closure"])
def test_39_vmap_of_scan_with_stacked_state(style: str) -> None:
    m = mu.vmap(Net)(jnp.arange(1.0, 3.0))

    def body(m: Net, xs: Any) -> Any:
        return mu.for_loop(m, xs)

    if style == "argument":
        out = mu.vmap(body, in_axes=(0, None))(m, XS)
    else:
        out = mu.vmap(lambda xs: body(m, xs), in_axes=None, axis_size=2, states=mu.StateAxes({...: 0}))(XS)
    np.testing.assert_allclose(out, [[14.0 * k * i for i in range(1, 5)] for k in (1, 2)])
    np.testing.assert_array_equal(m.n.value, [4, 4])
    np.testing.assert_allclose(m.mean.value, [means(XS)[-1]] * 2)


def test_40_a_state_created_in_a_scan_body_is_refused(bind: Style, maybe_jit: Any) -> None:
    m = Net()

    def one(m: Any, x: Any) -> None:
        m.n += 1
        m.late = mu.Cache(x)

    with pytest.raises(errors.StructureError, match="late"):
        bind(maybe_jit, lambda m: mu.for_loop(lambda x: one(m, x), XS), m)()
    assert not hasattr(m, "late")
    assert int(m.n) == 0


def test_41_a_scan_of_length_zero_changes_nothing(bind: Style, maybe_jit: Any) -> None:
    m = Net()
    out = bind(maybe_jit, lambda m: mu.for_loop(m, XS[:0]), m)()
    assert out.shape == (0,)
    assert (int(m.n), float(m.mean)) == (0, 0.0)


def test_42_a_scan_body_raises(bind: Style, maybe_jit: Any) -> None:
    m = Net()

    def one(m: Net, x: Any) -> None:
        m(x)
        m.training = False
        raise Broken

    with pytest.raises(Broken):
        bind(maybe_jit, lambda m: mu.for_loop(lambda x: one(m, x), XS), m)()
    assert (int(m.n), float(m.mean), m.training) == (0, 0.0, True)
    assert int(count(m)) == 1


@pytest.mark.parametrize("loop", ["for", "fori", "while"])
def test_43_a_loop_over_two_modules(bind: Style, maybe_jit: Any, loop: str) -> None:
    a, b = Net(), Net()

    def both(a: Net, b: Net) -> None:
        a.n += 1
        b.n += a.n.value

    def body(a: Net, b: Net) -> None:
        if loop == "for":
            mu.for_loop(lambda: both(a, b), length=4)
        elif loop == "fori":
            mu.fori_loop(0, 4, lambda _, carry: both(a, b), None)
        else:
            mu.while_loop(lambda _: a.n < 4, lambda _: both(a, b), None)

    bind(maybe_jit, body, a, b)()
    assert (int(a.n), int(b.n)) == (4, 10)


def test_44_a_loop_that_never_runs_changes_nothing(bind: Style, maybe_jit: Any) -> None:
    m = Net()

    def never(m: Net) -> None:
        mu.while_loop(lambda _: m.n < 0, lambda _: m.n.set(m.n.value + 1), None)
        mu.fori_loop(3, 3, lambda _, c: c + m(X), jnp.float32(0.0))

    bind(maybe_jit, never, m)()
    assert (int(m.n), float(m.mean)) == (0, 0.0)


def test_45_one_module_twice_in_a_loop(bind: Style, maybe_jit: Any) -> None:
    m = Net()

    def body(a: Net, b: Net) -> Any:
        def one() -> Any:
            a.n += 1
            b.n += 10
            return a.n.value

        return mu.for_loop(one, length=3)

    np.testing.assert_array_equal(bind(maybe_jit, body, m, m)(), [11, 22, 33])
    assert int(m.n) == 33


# --- branches and remat --------------------------------------------------------------------------------------------


def test_46_only_one_branch_writes(bind: Style, maybe_jit: Any) -> None:
    m = Net()
    step = bind(maybe_jit, lambda m, p: mu.cond(p, lambda: count(m), lambda: jnp.int32(-1)), m)
    assert [int(step(p)) for p in (True, False, True)] == [1, -1, 2]
    assert int(m.n) == 2


def test_47_branches_write_different_states(bind: Style, maybe_jit: Any) -> None:
    m = Net()
    branches = [lambda m: m.n.set(m.n.value + 1), lambda m: m.mean.set(m.mean.value + 2.0), lambda m: None]
    step = bind(maybe_jit, lambda m, i: mu.switch(i, [functools.partial(b, m) for b in branches]), m)
    seen = []
    for i in (0, 1, 2, 1):
        step(i)
        seen.append((int(m.n), float(m.mean)))
    assert seen == [(1, 0.0), (1, 2.0), (1, 2.0), (1, 4.0)]


def test_48_a_branch_changes_dtype(bind: Style, maybe_jit: Any) -> None:
    m = Net()

    def cast(m: Net) -> None:
        mu.cond(True, lambda: m.n.set(m.n.value.astype(jnp.float32)), lambda: None)

    with pytest.raises(errors.StateTypeError, match=r"n`.*(\n.*)*float32"):
        bind(maybe_jit, cast, m)()
    assert m.n.dtype == jnp.int32
    assert int(m.n) == 0


def test_49_a_branch_per_lane_under_vmap(bind: Style) -> None:
    m = mu.vmap(Net)(jnp.arange(1.0, 5.0))

    def one(m: Net, p: Any) -> None:
        mu.cond(p, lambda: m.n.set(m.n.value + 1), lambda: m.mean.set(m.mean.value - 1.0))

    bind(mu.jit, lambda m, ps: mu.vmap(one)(m, ps), m)(jnp.array([True, False, True, False]))
    np.testing.assert_array_equal(m.n.value, [1, 0, 1, 0])
    np.testing.assert_allclose(m.mean.value, [0.0, -1.0, 0.0, -1.0])
    shared = Net()
    with pytest.raises(errors.LaneError, match="n`"):
        mu.vmap(lambda p: mu.cond(p, lambda: shared.n.set(1), lambda: None))(jnp.array([True, False]))
    assert int(shared.n) == 0


def test_50_eager_cond_with_stable_functions_traces_once(traces: Any) -> None:
    m = Net()
    yes, no = traces.count(lambda: count(m)), traces.count(lambda: jnp.int32(0))
    for k in range(6):
        mu.cond(k % 2 == 0, yes, no)
    assert int(m.n) == 3
    assert (traces[yes], traces[no]) == (1, 1)


def test_51_a_statistic_under_remat_is_updated_once(differentiate: Any, maybe_jit: Any) -> None:
    m = Net()
    step = maybe_jit(differentiate(mu.value_and_grad, mu.remat(Net.__call__), m))
    loss, grads = step(X)
    assert float(loss) == 14.0
    np.testing.assert_allclose(grads["w"], X)
    assert (int(m.n), float(m.mean)) == (1, 1.0)


def test_52_raw_custom_vjp_whose_forward_writes(bind: Style) -> None:
    m = Net()

    @jax.custom_vjp
    def double(x: Any) -> Any:
        return 2.0 * x

    def forward(x: Any) -> Any:
        m.n += 1
        return 2.0 * x, None

    double.defvjp(forward, lambda _, g: (2.0 * g,))
    with pytest.raises(errors.TraceLevelError, match=r"n`.*(\n.*)*mu\."):
        bind(mu.jit, lambda m, x: mu.grad(lambda y: double(y) * jnp.sum(m.w.value))(x), m)(1.0)
    assert int(m.n) == 0


def test_52_custom_vjp_whose_forward_writes(bind: Style) -> None:
    net = Net()

    @mu.custom_vjp
    def f(net: Any, x: Any) -> Any:
        return net(x)

    def forward(net: Any, x: Any) -> Any:
        net.n += 1
        return f(net, x), (net, x)

    def backward(residuals: Any, g: Any) -> Any:
        net, x = residuals
        return mu.State({("w",): g * x}), 2 * g * net.w.value

    f.defvjp(forward, backward)
    gradient = bind(lambda body: mu.jit(lambda *args: mu.grad(body, argnums=len(args) - 1)(*args)), f, net)
    np.testing.assert_array_equal(gradient(jnp.ones(3)), 2 * net.w.value)
    assert int(net.n) == 2
    np.testing.assert_allclose(net.mean, 0.5)


def test_53_vjp_writes_once_however_often_the_pullback_runs(bind: Style, maybe_jit: Any) -> None:
    net = Net()

    def step(net: Any, x: Any) -> Any:
        value, pullback = mu.vjp(lambda x: net(x), x)
        return value, pullback(1.0)[0], pullback(2.0)[0]

    value, once, twice = bind(maybe_jit, step, net)(jnp.ones(3))
    assert float(value) == 6
    np.testing.assert_array_equal(once, net.w)
    np.testing.assert_array_equal(twice, 2 * net.w.value)
    assert int(net.n) == 1
    np.testing.assert_allclose(net.mean, 0.5)


def test_54_jvp_through_a_state_write(bind: Style, maybe_jit: Any) -> None:
    net = Net()
    net.h = mu.Hidden(jnp.zeros(3))

    def step(net: Any, x: Any) -> Any:
        def f(x: Any) -> Any:
            net.h.value = net.w * x
            net.n += 1
            return jnp.sum(net.h.value**2)

        return mu.jvp(f, (x,), (jnp.ones(3),))

    x = jnp.array([1.0, 0.5, 0.25])
    value, tangent = bind(maybe_jit, step, net)(x)
    expected = jax.jvp(lambda x: jnp.sum((net.w.value * x) ** 2), (x,), (jnp.ones(3),))
    np.testing.assert_allclose((value, tangent), expected)
    np.testing.assert_allclose(net.h, net.w.value * x)
    assert int(net.n) == 1


def test_55_a_replicated_counter_under_shard_map(bind: Style, maybe_jit: Any) -> None:
    net = Net()
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.PartitionSpec("x")

    def step(net: Any, x: Any) -> Any:
        def each(x: Any) -> Any:
            net.n += 1
            net.mean.value = jax.lax.pmean(jnp.mean(x), "x")
            return 2 * x

        return mu.shard_map(each, mesh=mesh, in_specs=split, out_specs=split)(x)

    np.testing.assert_array_equal(bind(maybe_jit, step, net)(jnp.arange(8.0)), 2 * jnp.arange(8.0))
    assert int(net.n) == 1
    np.testing.assert_allclose(net.mean, 3.5)
    with pytest.raises(errors.LaneError, match=r"mean"):
        mu.shard_map(lambda x: net.mean.set(jnp.sum(x)), mesh=mesh, in_specs=split, out_specs=split)(jnp.arange(8.0))
    np.testing.assert_allclose(net.mean, 3.5)


def test_56_a_nan_check_fails_the_step_and_the_state_is_kept(bind: Style) -> None:
    m = Net()

    def body(m: Net, x: Any) -> Any:
        m(x)
        m.w.value = m.w.value * jnp.log(x)
        return jnp.sum(m.w.value)

    step = bind(mu.jit, body, m)
    step(X)
    kept = np.asarray(m.w.value)
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        step(-X)
    np.testing.assert_array_equal(m.w.value, kept)
    assert (int(m.n), float(m.mean)) == (1, 1.0)
    step(X)
    assert int(m.n) == 2


# --- objects -------------------------------------------------------------------------------------------------------


def test_57_a_deepcopy_keeps_ties_and_is_independent() -> None:
    m = Tied()
    step = mu.jit(Tied.__call__)
    step(m, jnp.ones(2))
    twin = copy.deepcopy(m)
    assert twin.first is twin.second
    assert twin.first is not m.first
    step(twin, jnp.ones(2))
    twin.first.value = jnp.zeros(2)
    assert (int(m.n), int(twin.n)) == (1, 2)
    np.testing.assert_allclose(m.second.value, [1.0, 2.0])
    np.testing.assert_allclose(twin.second.value, [0.0, 0.0])


def test_58_states_as_dict_keys_and_list_members(maybe_jit: Any) -> None:
    a, b, c = mu.Variable(jnp.zeros(2)), mu.Variable(jnp.zeros(2)), mu.Variable(jnp.zeros(2))
    order = {a: 1.0, b: 2.0}
    members = [a, b]

    def body() -> None:
        for cell, size in order.items():
            cell.value = cell.value + size
        assert any(b is member for member in members)  # `in` and `index` compare values, as with arrays
        assert not any(c is member for member in members)
        assert c not in order

    step = maybe_jit(body)
    step()
    step()
    np.testing.assert_allclose(a.value, [2.0, 2.0])
    np.testing.assert_allclose(b.value, [4.0, 4.0])
    del members[1]
    assert len(members) == 1
    assert members[0] is a


def test_59_an_array_assigned_over_a_parameter_writes_it(bind: Style, maybe_jit: Any) -> None:
    m = Net()
    w = m.w
    bind(maybe_jit, lambda m, x: setattr(m, "w", x), m)(X * 5)
    assert m.w is w
    assert isinstance(m.w, mu.Param)
    np.testing.assert_allclose(w.value, X * 5)


def test_60_an_attribute_is_added_to_in_place(bind: Style, maybe_jit: Any) -> None:
    m = Net()
    n = m.n

    def body(m: Net) -> None:
        m.n += 1

    step = bind(maybe_jit, body, m)
    step()
    step()
    assert m.n is n
    assert int(n) == 2
    assert n.dtype == jnp.int32


class Forward(mu.Module):
    def __init__(self, start: float) -> None:
        self.a = mu.Param(jnp.full(2, start))
        self.b = mu.Param(jnp.full(2, 10 * start))


class Backward(mu.Module):
    def __init__(self, start: float) -> None:
        self.b = mu.Param(jnp.full(2, 10 * start))
        self.a = mu.Param(jnp.full(2, start))


def test_61_attribute_order_does_not_matter_for_loading(tmp_path: Path) -> None:
    source = Forward(1.0)
    by_update, by_restore = Backward(5.0), Backward(7.0)
    mu.update(by_update, mu.state(source))
    mu.checkpoint.save(tmp_path / "c", source)
    mu.checkpoint.restore(tmp_path / "c", by_restore)
    for target in (by_update, by_restore):
        np.testing.assert_allclose(target.a.value, [1.0, 1.0])
        np.testing.assert_allclose(target.b.value, [10.0, 10.0])


def test_62_split_and_merge_keep_ties() -> None:
    m = Tied()
    definition, params, rest = mu.split(m, mu.Param, ...)
    assert list(params.flat()) == [("first",)]
    merged = mu.merge(definition, params, rest)
    assert merged.first is merged.second
    merged.first.value = jnp.zeros(2)
    np.testing.assert_allclose(merged.second.value, [0.0, 0.0])
    np.testing.assert_allclose(m.first.value, [1.0, 2.0])


# --- checkpoints ---------------------------------------------------------------------------------------------------


def test_63_restore_with_a_name_the_model_does_not_have(tmp_path: Path) -> None:
    m, other = Net(), Net()
    m.surplus = mu.Variable(jnp.zeros(2))
    mu.jit(count)(m)
    mu.checkpoint.save(tmp_path / "c", m)
    with pytest.raises(errors.CheckpointError, match="surplus"):
        mu.checkpoint.restore(tmp_path / "c", other)
    assert int(other.n) == 0


def test_64_restore_of_a_float_into_an_int_counter(tmp_path: Path) -> None:
    m, other = Net(2.0), Net()
    m.n.value = 1.5
    mu.checkpoint.save(tmp_path / "c", m)
    with pytest.raises(errors.MutatisError, match=r"\bn\b.*(\n.*)*float32") as info:
        mu.checkpoint.restore(tmp_path / "c", other)
    assert isinstance(info.value, errors.CheckpointError | errors.StateTypeError)
    assert other.n.dtype == jnp.int32
    np.testing.assert_allclose(other.w.value, X)


def test_65_a_round_trip_with_a_random_key_inside(tmp_path: Path) -> None:
    def make(seed: int) -> Net:
        m: Any = Net()
        m.rngs = mu.Rngs(seed)
        m.key = jax.random.key(seed)
        m.raw = mu.Variable(jax.random.key(seed + 10))
        return m

    def draw(m: Any) -> list[float]:
        return [float(jax.random.normal(key)) for key in (m.rngs(), m.key, m.raw.value)]

    m, other = make(0), make(1)
    draw(m)
    mu.checkpoint.save(tmp_path / "c", m)
    mu.checkpoint.restore(tmp_path / "c", other)
    assert draw(other) == draw(m)
    assert draw(other) == draw(m)


# --- optimizers ----------------------------------------------------------------------------------------------------


def test_66_the_optimizer_moves_a_tied_weight_once(differentiate: Any, maybe_jit: Any) -> None:
    m = Tied()
    optimizer = mu.Optimizer(m, optax.sgd(0.5))
    x = jnp.array([5.0, 7.0])
    gradient = differentiate(mu.grad, Tied.__call__, m)
    maybe_jit(lambda: optimizer.update(gradient(x)))()
    np.testing.assert_allclose(m.first.value, [1.0 - 0.5 * 11.0, 2.0 - 0.5 * 19.0])
    assert m.first is m.second


def test_67_a_parameter_reshaped_after_the_optimizer_was_made(maybe_jit: Any) -> None:
    m = Net()
    optimizer = mu.Optimizer(m, optax.sgd(0.5, momentum=0.9))
    m.w.value = jnp.ones(5)
    gradient = mu.grad(lambda: jnp.sum(m.w.value**2), of=m)
    with pytest.raises(errors.OptimizerError, match=r"\bw\b"):
        maybe_jit(lambda: optimizer.update(gradient()))()
    np.testing.assert_allclose(m.w.value, np.ones(5))
    assert int(optimizer.step) == 0


@pytest.mark.parametrize("style", ["argument", "closure"])
def test_68_a_new_optimizer_with_the_same_settings_does_not_compile_again(style: str, traces: Any) -> None:
    m = Net()
    optimizer = mu.Optimizer(m, optax.sgd(0.5, momentum=0.9))

    def body(m: Net, optimizer: mu.Optimizer) -> None:
        optimizer.update(mu.grad(lambda: m(X), of=m)())

    body = traces.count(body)
    by_argument, by_closure = mu.jit(body), mu.jit(lambda: body(m, optimizer))
    for k in range(1, 4):
        m = Net(float(k))
        optimizer = mu.Optimizer(m, optax.sgd(0.5, momentum=0.9))
        by_argument(m, optimizer) if style == "argument" else by_closure()
        np.testing.assert_allclose(m.w.value, k * X - 0.5 * X)
        assert int(optimizer.step) == 1
    assert traces.total == 1


# --- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["argument", "closure"])
def test_69_dropping_the_model_frees_its_arrays(style: str) -> None:
    m: Any = Net()
    by_argument, by_closure = mu.jit(Net.__call__), mu.jit(lambda x: m(x))
    for _ in range(2):
        by_argument(m, X) if style == "argument" else by_closure(X)
    gone = [weakref.ref(m), *(weakref.ref(cell.value) for cell in mu.variables(m).values())]
    m = None
    gc.collect()
    assert [ref() for ref in gone] == [None] * 4


def test_70_a_numpy_array_is_copied_in(bind: Style) -> None:
    mine = np.ones(3, np.float32)
    m = Net()
    m.w.value = mine
    m.table = mine
    fresh = mu.Variable(mine)
    mine[:] = 7.0
    np.testing.assert_allclose(bind(mu.jit, lambda m: m.w.value + m.table, m)(), [2.0, 2.0, 2.0])
    np.testing.assert_allclose(fresh.value, [1.0, 1.0, 1.0])


# --- calls ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [eagerly, mu.jit, mu.remat, mu.vmap])
def test_71_a_module_as_keyword_argument(transform: Any, traces: Any) -> None:
    m = mu.vmap(Net)(jnp.ones(2)) if transform is mu.vmap else Net()
    step = transform(lambda x, *, model: model(x))
    xs = np.stack([X, X]) if transform is mu.vmap else X
    step(xs, model=m)
    out = step(xs, model=m)
    np.testing.assert_allclose(out, np.full(np.shape(out), 14.0))
    np.testing.assert_array_equal(m.n.value, np.full(m.n.shape, 2))


def test_72_a_module_inside_a_dict_argument(traces: Any) -> None:
    m, other = Net(), Net(2.0)
    body = traces.count(lambda batch: batch["parts"][0](batch["x"]))
    step = mu.jit(body)
    assert float(step({"parts": [m], "x": X})) == 14.0
    assert float(step({"parts": [other], "x": X})) == 28.0
    assert (int(m.n), int(other.n)) == (1, 1)
    assert traces.total == 1
    grads = mu.grad(lambda tree: tree["parts"][0](X))({"parts": [m]})
    np.testing.assert_allclose(grads["parts"][0]["w"], X)
    assert int(m.n) == 2


def test_73_gradient_through_cond_with_state(differentiate: Any, maybe_jit: Any) -> None:
    m = Net()

    def body(m: Net, p: Any) -> Any:
        def yes() -> None:
            m.n += 1
            m.mean.value = jnp.sum(m.w.value**2)

        mu.cond(p, yes, lambda: m.mean.set(jnp.sum(m.w.value)))
        return 3.0 * m.mean.value

    gradient = maybe_jit(differentiate(mu.grad, body, m))
    np.testing.assert_allclose(gradient(jnp.array(True))["w"], 6 * X)
    assert (int(m.n), float(m.mean)) == (1, 14.0)
    np.testing.assert_allclose(gradient(jnp.array(False))["w"], [3.0, 3.0, 3.0])
    assert (int(m.n), float(m.mean)) == (1, 6.0)


@pytest.mark.parametrize("style", ["argument", "closure"])
def test_74_pmean_over_lanes_into_one_shared_statistic(style: str, maybe_jit: Any) -> None:
    m = Net()

    def body(m: Net, x: Any) -> None:
        m.mean.value = 0.5 * m.mean.value + 0.5 * jax.lax.pmean(x, "lanes")

    if style == "argument":
        mapped: Any = functools.partial(maybe_jit(mu.vmap(body, in_axes=(None, 0), axis_name="lanes")), m)
    else:
        mapped = maybe_jit(mu.vmap(lambda x: body(m, x), axis_name="lanes"))
    mapped(jnp.arange(4.0))
    mapped(jnp.arange(4.0))
    assert m.mean.shape == ()
    assert float(m.mean) == pytest.approx(1.125)


def test_75_gradient_accumulation(bind: Style) -> None:
    m = Net()

    def loss(m: Net, x: Any) -> Any:
        return m(x) ** 2

    def step(m: Net, xs: Any) -> Any:
        gradient = mu.grad(lambda x: loss(m, x), of=m)

        def one(total: Any, x: Any) -> Any:
            return jax.tree.map(jnp.add, total, gradient(x)), None

        return mu.scan(one, jax.tree.map(jnp.zeros_like, mu.state(m, mu.Param)), xs)[0]

    total = bind(mu.jit, step, m)(XS)
    w = jnp.arange(1.0, 4.0)
    expected = sum(jax.grad(lambda w, x=x: jnp.sum(w * x) ** 2)(w) for x in XS)
    np.testing.assert_allclose(total["w"], expected, rtol=1e-6)
    assert int(m.n) == 4
    assert float(m.mean) == pytest.approx(means(XS)[-1])


def test_76_one_model_two_threads_and_a_lock(bind: Style) -> None:
    m = Net()
    step = bind(mu.jit, count, m)
    lock = threading.Lock()
    seen = []

    def work() -> None:
        for _ in range(50):
            with lock:
                seen.append(int(step()))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert seen == list(range(1, 101))
    assert int(m.n) == 100


def test_77_an_exception_deep_inside_nested_transforms(differentiate: Any) -> None:
    m = Net()
    bad = [True]

    def body(m: Net, xs: Any) -> Any:
        def one(total: Any, x: Any) -> Any:
            m.training = not bad[0]
            total += m(x)
            if bad[0]:
                raise Broken
            return total, None

        m.n += 100
        return mu.scan(one, jnp.float32(0.0), xs)[0]

    step = mu.jit(differentiate(mu.grad, body, m))
    with pytest.raises(Broken):
        step(XS)
    assert (int(m.n), float(m.mean), m.training) == (0, 0.0, True)
    bad[0] = False
    np.testing.assert_allclose(step(XS)["w"], XS.sum(0))
    assert int(m.n) == 104


def test_78_a_state_alternates_between_two_shapes(bind: Style, traces: Any) -> None:
    m = Net()
    step = bind(mu.jit, traces.count(lambda m: m.w.set(m.w.value + 1)), m)
    for k in range(8):
        m.w.value = jnp.zeros(2 + k % 2)
        step()
        np.testing.assert_allclose(m.w.value, np.ones(2 + k % 2))
    assert traces.total == 2


def test_79_a_gradient_first_under_jit_then_eagerly(differentiate: Any) -> None:
    m = Net()
    gradient = differentiate(mu.grad, Net.__call__, m)
    for run in (mu.jit(gradient), gradient, mu.jit(gradient), gradient):
        np.testing.assert_allclose(run(X)["w"], X)
    assert int(m.n) == 4
    assert float(m.mean) == pytest.approx(means([X] * 4)[-1])


def test_80_two_jitted_functions_share_a_state(bind: Style) -> None:
    m = Net()
    up = bind(mu.jit, count, m)
    double = bind(mu.jit, lambda m: m.n.set(m.n.value * 2), m)
    for _ in range(3):
        up()
        double()
    assert int(m.n) == 14
    m.n.value = 100
    double()
    assert int(up()) == 201


@pytest.mark.parametrize("donate", ["auto", False])
def test_81_the_state_survives_a_step_that_fails_at_run_time(bind: Style, donate: Any) -> None:
    m = Net()
    bad = [False]

    def host(x: Any) -> Any:
        if bad[0]:
            raise ValueError("the host says no")
        return np.asarray(x)

    def body(m: Net, x: Any) -> Any:
        out = jax.pure_callback(host, jax.ShapeDtypeStruct((), jnp.float32), m(x))
        m.w.value = m.w.value + 0.0 * out
        return out

    step = bind(functools.partial(mu.jit, donate=donate), body, m)
    step(X)
    bad[0] = True
    with pytest.raises(Exception, match="the host says no"):
        jax.block_until_ready(step(X))
    assert (int(m.n), float(m.mean)) == (1, 1.0)
    np.testing.assert_allclose(m.w.value, X)
    bad[0] = False
    assert float(step(X)) == 14.0
    assert int(m.n) == 2
