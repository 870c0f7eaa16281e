"""Integrators: functions that make one step in time of a differential equation."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mutatis.errors import ArgumentError
from mutatis.model.contexts import Context

dt = Context("dt", 1.0)
"""The length of a step in time, in ms as all times here: ``nn.dt.get()``, and ``with nn.dt.set(0.1):`` for another one."""


def relaxed(y: Any, goal: Any, tau: Any, step: float) -> Any:
    """The exact step of ``tau dy/dt = goal - y``."""
    return y - (goal - y) * jnp.expm1(-jnp.asarray(step / tau, y.dtype))


def step_length() -> Any:
    """How long a step is, in milliseconds, as a number."""
    return in_base_units(dt.get(), "nn.dt")


def in_base_units(value: Any, name: str) -> Any:
    """A quantity with a unit as a number of milliseconds or millivolts, which the neurons here count in; numbers as they are.

    Raises:
      ArgumentError: it is neither a time nor a voltage.
    """
    if not hasattr(value, "to_decimal"):
        return value
    units = importlib.import_module(type(value).__module__.partition(".")[0])
    for unit in (units.ms, units.mV):
        if units.have_same_dim(value, unit):
            return value.to_decimal(unit)
    raise ArgumentError(
        f"`{name}` is in a unit that is neither one of time nor of voltage",
        path=name,
        expected="a number, or a quantity in ms or mV",
        got=str(value),
        cure="Divide by the unit that it is meant in: `tau / saiunit.ms` is a number.",
    )


def exp_euler(f: Callable[[jax.Array], jax.Array], y: jax.Array, step: Any) -> jax.Array:
    """Make one step of the exponential Euler method for a differential equation ``dy/dt = f(y)``, element by element.

    The step is exact where `f` is linear.

    Args:
      f: the derivative by time, a function of `y` that returns an array of its shape. Each element depends on the same element
        of `y` only.
      y: the present value: an array, with a unit if `f` and `step` have units that fit.
      step: the length of the step, in the unit of time of `f`; `nn.dt.get()` in a neuron.

    Returns:
      The value after the step, of the shape of `y`.

    Source: Hochbruck and Ostermann, Exponential integrators, 2010, https://doi.org/10.1017/S0962492910000048

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> y = mu.nn.exp_euler(lambda y: -y / 10.0, jnp.ones(()), step=5.0)
      >>> bool(jnp.allclose(y, jnp.exp(-0.5)))
      True
    """
    one = jax.tree.map(jnp.ones_like, y)
    slope, change = jax.jvp(f, (y,), (one,))
    z = change / one * step  # without a unit, if the others have some
    small = jnp.abs(z) < 1e-3  # where the quotient would lose digits
    safe = jnp.where(small, jnp.ones_like(z), z)
    phi = jnp.where(small, 1 + z / 2 + z * z / 6, jnp.expm1(safe) / safe)
    return y + step * phi * slope


def rk4(f: Callable[[Any], Any], y: Any, step: Any) -> Any:
    """Make one step of the classical Runge-Kutta method, of order four, for a differential equation ``dy/dt = f(y)``.

    Args:
      f: the derivative by time, a function of `y` that returns the same structure.
      y: the present value, an array or a pytree of arrays.
      step: the length of the step, in the unit of time of `f`; `nn.dt.get()` in a neuron.

    Returns:
      The value after the step, of the structure of `y`.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> y = mu.nn.rk4(lambda y: -y, jnp.ones(()), step=0.1)
      >>> bool(jnp.allclose(y, jnp.exp(-0.1), atol=1e-6))
      True
    """

    def each(g: Callable[..., Any], *trees: Any) -> Any:
        return jax.tree.map(g, *trees, is_leaf=lambda leaf: hasattr(leaf, "dtype"))  # an array, or one with a unit

    def moved(k: Any, share: float) -> Any:
        return each(lambda a, b: a + share * step * b, y, k)

    k1 = f(y)
    k2 = f(moved(k1, 0.5))
    k3 = f(moved(k2, 0.5))
    k4 = f(moved(k3, 1.0))
    return each(lambda a, p, q, r, s: a + step / 6 * (p + 2 * q + 2 * r + s), y, k1, k2, k3, k4)
