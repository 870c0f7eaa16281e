"""Integrators: functions that make one step in time of a differential equation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mutatis.core import naming
from mutatis.core.showing import show_class, show_structure
from mutatis.errors import ArgumentError
from mutatis.nn.spiking.units import check_slope, without_unit


def relaxed(y: Any, goal: Any, tau: Any, step: float) -> Any:
    """The exact step of ``tau dy/dt = goal - y``."""
    return y - (goal - y) * jnp.expm1(-jnp.asarray(step / tau, y.dtype))


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

    Raises:
      ArgumentError: `y`, `f(y)` and `step` have units that do not fit, or `y` is not one array.

    Source: Hochbruck and Ostermann, Exponential integrators, 2010, https://doi.org/10.1017/S0962492910000048

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> y = mu.nn.exp_euler(lambda y: -y / 10.0, jnp.ones(()), step=5.0)
      >>> bool(jnp.allclose(y, jnp.exp(-0.5)))
      True
    """
    if not (hasattr(y, "dtype") or isinstance(y, int | float | complex)):
        raise ArgumentError(
            "`nn.exp_euler` makes the step of one array",
            path="y",
            where=naming.where(),
            expected="an array, with or without a unit",
            got=show_class(y),
            cure="Call it for each array, or `nn.rk4(f, y, step)`, which takes pytrees.",
        )
    y = _as_float(y)
    one = jax.tree.map(jnp.ones_like, y)
    slope, change = jax.jvp(f, (y,), (one,))
    check_slope("exp_euler", y, slope, step)
    z = change / one * _of_type(step, y)  # without a unit, if the others have some
    return y + _of_type(step, y) * _phi(z) * slope


def _as_float(y: Any) -> Any:
    """An integer, also with a unit, as a float, which can change a little; anything else as it is."""
    bare, unit = without_unit(y)
    whole = jnp.issubdtype(jnp.result_type(bare), jnp.integer)
    return unit(jnp.asarray(bare, jnp.result_type(float))) if whole else y


def _of_type(number: Any, y: Any) -> Any:
    """A number, or a quantity, in the dtype of an array of floats."""
    if not hasattr(y, "dtype") or not jnp.issubdtype(y.dtype, jnp.inexact):
        return number
    bare, unit = without_unit(number)
    return unit(jnp.asarray(bare, y.dtype))


def _phi(z: Any) -> Any:
    """``(exp(z) - 1) / z``, which is 1 at 0, with all its derivatives."""
    small = jnp.abs(z) < 0.02  # where derivatives of the quotient would lose digits; the series has all of float64's
    safe = jnp.where(small, jnp.ones_like(z), z)
    series = jnp.ones_like(z)
    for n in range(8, 1, -1):
        series = 1 + z / n * series
    return jnp.where(small, series, jnp.expm1(safe) / safe)


def rk4(f: Callable[[Any], Any], y: Any, step: Any) -> Any:
    """Make one step of the classical Runge-Kutta method, of order four, for a differential equation ``dy/dt = f(y)``.

    Args:
      f: the derivative by time, a function of `y` that returns the same structure.
      y: the present value, an array or a pytree of arrays.
      step: the length of the step, in the unit of time of `f`; `nn.dt.get()` in a neuron.

    Returns:
      The value after the step, of the structure of `y`.

    Raises:
      ArgumentError: `y`, `f(y)` and `step` have units that do not fit, or `f(y)` has another structure than `y`.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> y = mu.nn.rk4(lambda y: -y, jnp.ones(()), step=0.1)
      >>> bool(jnp.allclose(y, jnp.exp(-0.1), atol=1e-6))
      True
    """

    def each(g: Callable[..., Any], *trees: Any) -> Any:
        return jax.tree.map(g, *trees, is_leaf=lambda leaf: hasattr(leaf, "dtype"))  # an array, or one with a unit

    def moved(k: Any, share: float) -> Any:
        return each(lambda a, b: a + _of_type(share * step, a) * b, y, k)

    y = each(_as_float, y)
    k1 = f(y)
    ours, theirs = (jax.tree.structure(each(lambda leaf: 0, tree)) for tree in (y, k1))
    if ours != theirs:
        raise ArgumentError(
            "`nn.rk4` was given a derivative of another structure than the value",
            path="f",
            where=naming.where(),
            expected=f"f(y) of the structure of y: {show_structure(ours)}",
            got=show_structure(theirs),
            cure="Return a derivative for each part of `y`, in the same containers.",
        )
    each(lambda y, slope: check_slope("rk4", y, slope, step), y, k1)
    k2 = f(moved(k1, 0.5))
    k3 = f(moved(k2, 0.5))
    k4 = f(moved(k3, 1.0))
    return each(lambda a, p, q, r, s: a + _of_type(step / 6, a) * (p + 2 * q + 2 * r + s), y, k1, k2, k3, k4)
