"""Surrogate gradients: spikes are 0 and 1, and differentiate as their formulas say; under jit, vmap, in bfloat16."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis.errors import ArgumentError

pytestmark = pytest.mark.once


def bell(x: Any, center: float, sigma: float) -> Any:
    return np.exp(-((x - center) ** 2) / (2 * sigma**2)) / (np.sqrt(2 * np.pi) * sigma)


def steep(x: Any, alpha: float) -> Any:
    s = 1 / (1 + np.exp(-alpha * x))
    return alpha * s * (1 - s)


FORMULAS: list[tuple[Callable[..., Any], Callable[[Any], Any]]] = [
    (mu.surrogate.sigmoid, lambda x: steep(x, 4.0)),
    (functools.partial(mu.surrogate.sigmoid, alpha=2.0), lambda x: steep(x, 2.0)),
    (mu.surrogate.relu, lambda x: 0.3 * np.maximum(1.0 - np.abs(x), 0)),
    (functools.partial(mu.surrogate.relu, width=2.0), lambda x: 0.3 * np.maximum(2.0 - np.abs(x), 0)),
    (mu.surrogate.arctan, lambda x: 0.5 / (1 + (np.pi / 2 * x) ** 2)),
    (mu.surrogate.gaussian, lambda x: 0.5 * bell(x, 0, 0.5)),
    (
        mu.surrogate.multi_gaussian,
        lambda x: 0.5 * (1.15 * bell(x, 0, 0.5) - 0.15 * bell(x, 0.5, 3.0) - 0.15 * bell(x, -0.5, 3.0)),
    ),
    (mu.surrogate.piecewise_quadratic, lambda x: np.maximum(1 - np.abs(x), 0)),
    (functools.partial(mu.surrogate.piecewise_quadratic, alpha=2.0), lambda x: np.maximum(2 - 4 * np.abs(x), 0)),
]


@pytest.mark.parametrize(("spike", "formula"), FORMULAS)
def test_spikes_and_their_derivatives(spike: Any, formula: Any) -> None:
    x = jnp.linspace(-2.0, 2.0, 41)
    np.testing.assert_array_equal(spike(x), (np.asarray(x) >= 0).astype(np.float32))
    found = jax.vmap(jax.grad(lambda x: 3.0 * spike(x)))(x)
    np.testing.assert_allclose(found, 3.0 * formula(np.asarray(x, np.float64)), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.grad(spike)))(x), found / 3, rtol=1e-6)
    np.testing.assert_allclose(jax.jvp(spike, (x,), (jnp.ones_like(x),))[1], found / 3, rtol=1e-6)
    narrow = spike(x.astype(jnp.bfloat16))
    assert narrow.dtype == jnp.bfloat16


def test_a_width_for_each_neuron_has_no_gradient() -> None:
    alpha = jnp.array([1.0, 2.0])
    grad = jax.grad(lambda x, alpha: mu.surrogate.arctan(x, alpha).sum(), (0, 1))(jnp.zeros(2), alpha)
    np.testing.assert_allclose(grad[0], [0.5, 1.0])
    np.testing.assert_array_equal(grad[1], [0.0, 0.0])


def test_integers_are_refused() -> None:
    with pytest.raises(ArgumentError, match="floating numbers only"):
        mu.surrogate.sigmoid(jnp.arange(3))
