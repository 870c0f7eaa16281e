"""Integrators beside solutions: exact where they should be, and of the order that they have."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mutatis import nn
from mutatis.errors import ArgumentError

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


@pytest.mark.parametrize("z", [0.0, 1e-12, -1e-6, 1e-3, -0.0199, 0.0201, -0.3, 2.0, -30.0])
def test_the_share_of_a_step_and_its_derivatives(z: float) -> None:
    """``phi(z) = (exp(z) - 1) / z``, beside its series and its recursion."""

    def phi(z: Any) -> Any:
        return nn.exp_euler(lambda y: z * y + 1.0, jnp.zeros(()), 1.0)

    def by_hand(order: int) -> float:
        if abs(z) < 0.5:  # of z**n / (n + 1)!, differentiated
            return sum(math.perm(n, order) * z ** (n - order) / math.factorial(n + 1) for n in range(order, 25))
        e = math.exp(z)
        return [(e - 1) / z, (e * (z - 1) + 1) / z**2, (e * (z * z - 2 * z + 2) - 2) / z**3][order]

    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        first, second = jax.grad(phi), jax.grad(jax.grad(phi))
        for f, order, rtol in ((phi, 0, 1e-15), (first, 1, 1e-13), (second, 2, 1e-10)):
            np.testing.assert_allclose(f(jnp.float64(z)), by_hand(order), rtol=rtol)


@pytest.mark.parametrize("step", [np.float64(0.1), np.float32(0.1), jnp.float32(0.1)])
def test_the_dtype_is_that_of_the_value(step: Any) -> None:
    y = jnp.ones(3, jnp.bfloat16)
    assert nn.exp_euler(lambda y: -y, y, step).dtype == jnp.bfloat16
    assert nn.rk4(lambda y: -y, y, step).dtype == jnp.bfloat16


@pytest.mark.parametrize("y", [1.0, 1, np.float32(1.0), np.array([1, 1]), jnp.ones(2, jnp.int32)])
def test_numbers_of_any_kind(y: Any) -> None:
    for method in (nn.exp_euler, nn.rk4):
        np.testing.assert_allclose(method(lambda y: -y / 2, y, 0.1), np.full(np.shape(y), np.exp(-0.05)), rtol=1e-5)


def test_trees() -> None:
    state = {"x": jnp.array(1.0), "v": jnp.array(0.0)}
    for _ in range(100):
        state = nn.rk4(lambda s: {"x": s["v"], "v": -s["x"]}, state, 2 * np.pi / 100)
    np.testing.assert_allclose([state["x"], state["v"]], [1.0, 0.0], atol=1e-5)


def test_values_that_are_no_arrays() -> None:
    for use, text in [
        (lambda: nn.exp_euler(lambda y: y, [jnp.ones(2)], 0.1), "the step of one array"),  # type: ignore[arg-type]
        (lambda: nn.rk4(lambda y: None, jnp.ones(2), 0.1), "another structure"),
        (lambda: nn.rk4(lambda y: (*y, *y), (jnp.ones(2),), 0.1), "another structure"),
    ]:
        with pytest.raises(ArgumentError, match=text):
            use()


def test_whole_numbers_with_a_unit() -> None:
    u = pytest.importorskip("saiunit")
    for method in (nn.exp_euler, nn.rk4):
        after = method(lambda v: -v / (10 * u.ms), -65 * u.mV, 5 * u.ms)  # type: ignore[operator]
        np.testing.assert_allclose(after / u.mV, -65 * np.exp(-0.5), rtol=1e-3)
