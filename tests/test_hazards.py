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
            own(np.full(k + 1 if k != 2 else 3, i, np.float32) if k in (0, 2) else X)
        return int(m.n), float(m.mean)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, range(4)))
    counted = means([np.float32(i) for i in range(10)])[-1]
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


def test_20_raw_jit_around_a_write(bind: Style) -> None:
    m = Net()
    with pytest.raises((errors.TraceLevelError, errors.FrozenStateError), match=r"n`.*(\n.*)*mu\.jit"):
        bind(jax.jit, lambda m: m.n.set(1), m)()
    assert int(m.n) == 0


def test_21_raw_grad_around_a_write() -> None:
    m = Net()
    with pytest.raises(errors.TraceLevelError, match=r"n`.*(\n.*)*mu\.(value_and_)?grad"):
        jax.grad(m)(jnp.ones(3))
    assert int(m.n) == 0
