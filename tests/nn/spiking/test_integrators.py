"""Integrators beside solutions: exact where they should be, and of the order that they have."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mutatis import nn

pytestmark = pytest.mark.once


def error(method: Any, steps: int) -> float:
    y = jnp.array(0.5)
    for _ in range(steps):
        y = method(lambda y: y * (1 - y), y, 2.0 / steps)
    return float(jnp.abs(y - 1 / (1 + np.exp(-2.0))))


def test_order() -> None:
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        assert 3.2 < error(nn.exp_euler, 16) / error(nn.exp_euler, 32) < 4.8, "second order"
        assert 13 < error(nn.rk4, 8) / error(nn.rk4, 16) < 19, "fourth"


@pytest.mark.parametrize("rate", [0.0, 1e-6, 0.3, 40.0])
def test_exact_where_linear(rate: float) -> None:
    y = nn.exp_euler(lambda y: 2.0 - rate * y, jnp.array(1.0), 0.7)
    wanted = 1 + 2.0 * 0.7 if rate == 0 else 2 / rate + (1 - 2 / rate) * np.exp(-rate * 0.7)
    np.testing.assert_allclose(y, wanted, rtol=1e-3 if rate == 1e-6 else 1e-5)
    assert bool(jnp.isfinite(jax.grad(lambda r: nn.exp_euler(lambda y: -r * y, jnp.array(1.0), 0.7))(rate)))


def test_trees() -> None:
    state = {"x": jnp.array(1.0), "v": jnp.array(0.0)}
    for _ in range(100):
        state = nn.rk4(lambda s: {"x": s["v"], "v": -s["x"]}, state, 2 * np.pi / 100)
    np.testing.assert_allclose([state["x"], state["v"]], [1.0, 0.0], atol=1e-5)
