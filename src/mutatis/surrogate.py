"""Surrogate gradients: spikes whose derivative, which is zero wherever it is defined, is replaced by a smooth one.

Each function returns 1 where ``x >= 0`` and 0 elsewhere, in the dtype of `x`. Its derivative is a bump around 0. A neuron takes
such a function as ``surrogate=mu.surrogate.arctan``, or as ``surrogate=functools.partial(mu.surrogate.arctan, alpha=2.0)`` for
another shape of the bump. The parameters of the bump may be arrays, with a number for each neuron; they get no gradient.

Source: Neftci, Mostafa and Zenke, Surrogate Gradient Learning in Spiking Neural Networks, 2019, https://arxiv.org/abs/1901.09948
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mutatis import _homes
from mutatis.core.avals import show_type
from mutatis.errors import ArgumentError

__all__ = ["arctan", "gaussian", "multi_gaussian", "piecewise_quadratic", "relu", "sigmoid"]


def _heaviside(x: jax.Array, derivative: jax.Array) -> jax.Array:
    return (x >= 0).astype(x.dtype)


def _rule(primals: Any, tangents: Any) -> Any:
    x, derivative = primals
    return _spike(x, derivative), tangents[0] * derivative


_spike: Any = jax.custom_jvp(_heaviside)
_spike.defjvp(_rule)


def _floating(x: ArrayLike) -> jax.Array:
    array = jnp.asarray(x)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ArgumentError(
            "spikes have a gradient for floating numbers only",
            path="x",
            expected="a floating dtype",
            got=show_type(array),
            cure="`mu.surrogate.sigmoid(x.astype(jnp.float32))`",
        )
    return array


def _like(x: jax.Array, *widths: ArrayLike) -> list[jax.Array]:
    return [jax.lax.stop_gradient(jnp.asarray(width, x.dtype)) for width in widths]


def sigmoid(x: ArrayLike, alpha: ArrayLike = 4.0) -> jax.Array:
    """Spikes with the derivative of a steep sigmoid: ``alpha * s * (1 - s)`` with ``s = sigmoid(alpha * x)``.

    Args:
      x: the distance of the membrane potential above the threshold, negative below it: an array of floats of any shape.
      alpha: the steepness of the sigmoid.

    Returns:
      The spikes: 1 where ``x >= 0`` and 0 elsewhere, of the shape and dtype of `x`.

    Raises:
      ArgumentError: `x` does not hold floats.

    Example:
      >>> import jax, jax.numpy as jnp, mutatis as mu
      >>> mu.surrogate.sigmoid(jnp.array([-0.1, 0.0, 2.0]))
      Array([0., 1., 1.], dtype=float32)
      >>> float(jax.grad(mu.surrogate.sigmoid)(0.0))
      1.0
      >>> neurons = mu.nn.LIF(3, surrogate=mu.surrogate.sigmoid)  # the default of the neurons
    """
    x = _floating(x)
    (alpha,) = _like(x, alpha)
    s = jax.nn.sigmoid(alpha * x)
    return _spike(x, alpha * s * (1 - s))


def relu(x: ArrayLike, width: ArrayLike = 1.0, alpha: ArrayLike = 0.3) -> jax.Array:
    """Spikes with a triangle as their derivative: ``alpha * max(width - |x|, 0)``.

    Args:
      x: the distance of the membrane potential above the threshold, negative below it: an array of floats of any shape.
      width: the distance from 0 beyond which the derivative is 0.
      alpha: the slope of the sides of the triangle.

    Returns:
      The spikes: 1 where ``x >= 0`` and 0 elsewhere, of the shape and dtype of `x`.

    Raises:
      ArgumentError: `x` does not hold floats.

    Example:
      >>> import jax, jax.numpy as jnp, mutatis as mu
      >>> [round(float(jax.grad(mu.surrogate.relu)(x)), 3) for x in (0.0, 0.5, 2.0)]
      [0.3, 0.15, 0.0]
      >>> neurons = mu.nn.LIF(3, surrogate=mu.surrogate.relu)
    """
    x = _floating(x)
    width, alpha = _like(x, width, alpha)
    return _spike(x, alpha * jnp.maximum(width - jnp.abs(x), 0))


def arctan(x: ArrayLike, alpha: ArrayLike = 1.0) -> jax.Array:
    """Spikes with the derivative of an arc tangent: ``alpha / 2 / (1 + (pi / 2 * alpha * x)**2)``.

    Args:
      x: the distance of the membrane potential above the threshold, negative below it: an array of floats of any shape.
      alpha: the steepness of the arc tangent.

    Returns:
      The spikes: 1 where ``x >= 0`` and 0 elsewhere, of the shape and dtype of `x`.

    Raises:
      ArgumentError: `x` does not hold floats.

    Example:
      >>> import functools, jax, mutatis as mu
      >>> [round(float(jax.grad(mu.surrogate.arctan)(x)), 3) for x in (0.0, 1.0)]
      [0.5, 0.144]
      >>> neurons = mu.nn.LIF(3, surrogate=functools.partial(mu.surrogate.arctan, alpha=2.0))
    """
    x = _floating(x)
    (alpha,) = _like(x, alpha)
    return _spike(x, alpha / 2 / (1 + (jnp.pi / 2 * alpha * x) ** 2))


def _bell(x: jax.Array, center: jax.Array, sigma: jax.Array) -> jax.Array:
    return jnp.exp(-((x - center) ** 2) / (2 * sigma**2)) / (jnp.sqrt(jnp.asarray(2 * jnp.pi, x.dtype)) * sigma)


def gaussian(x: ArrayLike, sigma: ArrayLike = 0.5, alpha: ArrayLike = 0.5) -> jax.Array:
    """Spikes with a bell as their derivative: `alpha` times the density of a normal distribution.

    Args:
      x: the distance of the membrane potential above the threshold, negative below it: an array of floats of any shape.
      sigma: the standard deviation of the distribution.
      alpha: the factor of the density.

    Returns:
      The spikes: 1 where ``x >= 0`` and 0 elsewhere, of the shape and dtype of `x`.

    Raises:
      ArgumentError: `x` does not hold floats.

    Example:
      >>> import jax, jax.numpy as jnp, mutatis as mu
      >>> [round(float(jax.grad(mu.surrogate.gaussian)(x)), 3) for x in (0.0, 1.0)]
      [0.399, 0.054]
      >>> neurons = mu.nn.LIF(3, surrogate=mu.surrogate.gaussian)
    """
    x = _floating(x)
    sigma, alpha = _like(x, sigma, alpha)
    return _spike(x, alpha * _bell(x, jnp.zeros_like(sigma), sigma))


def multi_gaussian(
    x: ArrayLike, h: ArrayLike = 0.15, s: ArrayLike = 6.0, sigma: ArrayLike = 0.5, scale: ArrayLike = 0.5
) -> jax.Array:
    """Spikes with a bell between two shallow valleys as their derivative; in the valleys it is negative.

    Args:
      x: the distance of the membrane potential above the threshold, negative below it: an array of floats of any shape.
      h: the depth of the valleys, relative to the bell.
      s: the width of the valleys, as a multiple of `sigma`.
      sigma: the standard deviation of the bell, and the distance of the valleys from 0.
      scale: the factor of the whole derivative.

    Returns:
      The spikes: 1 where ``x >= 0`` and 0 elsewhere, of the shape and dtype of `x`.

    Raises:
      ArgumentError: `x` does not hold floats.

    Source: Yin, Corradi and Bohté, Accurate and efficient time-domain classification with adaptive spiking recurrent neural
      networks, 2021, https://doi.org/10.1038/s42256-021-00397-w

    Example:
      >>> import jax, jax.numpy as jnp, mutatis as mu
      >>> [round(float(jax.grad(mu.surrogate.multi_gaussian)(x)), 3) for x in (0.0, 2.0)]
      [0.439, -0.016]
      >>> neurons = mu.nn.LIF(3, surrogate=mu.surrogate.multi_gaussian)
    """
    x = _floating(x)
    deep, wide, center, factor = _like(x, h, s, sigma, scale)
    bell = _bell(x, jnp.zeros_like(center), center) * (1 + deep)
    valleys = (_bell(x, center, wide * center) + _bell(x, -center, wide * center)) * deep
    return _spike(x, factor * (bell - valleys))


def piecewise_quadratic(x: ArrayLike, alpha: ArrayLike = 1.0) -> jax.Array:
    """Spikes with a triangle of area 1 as their derivative: ``max(alpha - alpha**2 * |x|, 0)``.

    Args:
      x: the distance of the membrane potential above the threshold, negative below it: an array of floats of any shape.
      alpha: the height of the triangle; the derivative is 0 beyond ``1 / alpha``.

    Returns:
      The spikes: 1 where ``x >= 0`` and 0 elsewhere, of the shape and dtype of `x`.

    Raises:
      ArgumentError: `x` does not hold floats.

    Example:
      >>> import jax, jax.numpy as jnp, mutatis as mu
      >>> [float(jax.grad(mu.surrogate.piecewise_quadratic)(x)) for x in (0.0, 0.5, 2.0)]
      [1.0, 0.5, 0.0]
      >>> neurons = mu.nn.LIF(3, surrogate=mu.surrogate.piecewise_quadratic)
    """
    x = _floating(x)
    (alpha,) = _like(x, alpha)
    return _spike(x, jnp.maximum(alpha - alpha**2 * jnp.abs(x), 0))


_homes.publish(__name__, {name: globals()[name] for name in __all__})
