"""`mu.map` beside `jax.lax.map`: one after the other, or in batches."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import errors

XS = jnp.arange(7.0)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("batch_size", [None, 1, 2, 3, 7, 10])
def test_values(batch_size: int | None, compiled: bool) -> None:
    w = mu.Param(jnp.float32(3))
    f = lambda xs: mu.map(lambda x: {"a": x["x"] * w.value, "b": (x["y"],)}, xs, batch_size=batch_size)  # noqa: E731
    xs = {"x": XS, "y": jnp.ones((7, 2))}
    out = (mu.jit(f) if compiled else f)(xs)
    raw = jax.lax.map(lambda x: {"a": x["x"] * 3, "b": (x["y"],)}, xs, batch_size=batch_size)
    assert jax.tree.structure(out) == jax.tree.structure(raw)
    jax.tree.map(np.testing.assert_array_equal, out, raw)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_gradients(batch_size: int | None) -> None:
    w = mu.Param(jnp.float32(3))
    grads = mu.grad(lambda: jnp.sum(mu.map(lambda x: jnp.sin(w.value * x), XS, batch_size=batch_size)), of=w)()
    expected = jax.grad(lambda w: jnp.sum(jax.lax.map(lambda x: jnp.sin(w * x), XS)))(jnp.float32(3))
    np.testing.assert_allclose(grads[()], expected, rtol=1e-5)


def test_states_are_carried_without_batches() -> None:
    total = mu.Variable(jnp.float32(0))

    def f(x: Any) -> Any:
        total.value = total + x
        return total.value

    np.testing.assert_array_equal(mu.map(f, XS), jnp.cumsum(XS))
    assert float(total) == 21


def test_modules_are_sliced_without_batches() -> None:
    layers = mu.vmap(lambda x: [mu.Param(x)])(XS)
    np.testing.assert_array_equal(mu.map(lambda m: m[0].value * 2, layers), XS * 2)
    with pytest.raises(errors.ArgumentError, match="cannot slice modules") as caught:
        mu.map(lambda m: m[0].value * 2, layers, batch_size=2)
    assert "mu.vmap(f)(modules)" in str(caught.value)
    np.testing.assert_array_equal(mu.vmap(lambda m: m[0].value * 2)(layers), XS * 2)  # the cure


@pytest.mark.parametrize("write", [lambda n, x: n.set(n + 1), lambda n, x: n.set(x)])
def test_writes_in_batches_are_refused(write: Any) -> None:
    n = mu.Variable(jnp.float32(0))
    with pytest.raises(errors.LaneError, match="written in a batch of items") as caught:
        mu.map(lambda x: write(n, x), XS, batch_size=2)
    assert "Leave out `batch_size`" in str(caught.value)
    assert float(n) == 0
    mu.map(lambda x: write(n, x), XS)  # the cure
    assert float(n) in (6, 7)


@pytest.mark.parametrize("batch_size", [None, 2, 3])
def test_draws_differ_per_item_and_advance(batch_size: int | None) -> None:
    rngs = mu.Rngs(0)
    f = lambda x: jax.random.uniform(rngs())  # noqa: E731
    first, second = mu.map(f, XS, batch_size=batch_size), mu.map(f, XS, batch_size=batch_size)
    assert len({float(x) for x in [*first, *second]}) == 14


@pytest.mark.parametrize("options", [{}, {"batch_size": 2}])
@pytest.mark.parametrize("bad", [3.0, {"x": XS, "y": jnp.float32(0)}, {"x": XS, "y": XS[:3]}])
def test_bad_items(bad: Any, options: Any) -> None:
    n = mu.Variable(0)

    def f(x: Any) -> Any:
        n.value += 0
        return 1.0

    with pytest.raises((TypeError, ValueError)):
        mu.map(f, bad, **options)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_the_function_is_traced_once(batch_size: int | None, traces: Any) -> None:
    w = mu.Param(jnp.float32(3))
    f = traces.count(lambda x: w.value * x)
    run = mu.jit(lambda xs: mu.map(f, xs, batch_size=batch_size))
    run(jnp.arange(6.0))
    assert traces.total == 1
    run(jnp.arange(6.0))
    assert traces.total == 1
