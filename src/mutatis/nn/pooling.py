"""Pooling over the spatial axes, channels last: over windows, or adaptively to a size that is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from mutatis.core.avals import show_type
from mutatis.core.showing import show_value
from mutatis.errors import ArgumentError
from mutatis.model.modules import Module

Padding: TypeAlias = str | Sequence[tuple[int, int]]
Reduction: TypeAlias = Callable[..., jax.Array]

_NAMES = ("SAME", "SAME_LOWER", "VALID")


def pool(
    inputs: ArrayLike,
    init: Any,
    reduce_fn: Callable[..., Any],
    window_shape: Sequence[int],
    strides: Sequence[int] | None,
    padding: Padding,
) -> jax.Array:
    """Reduce each window of an array to one number, such as a sum or a maximum.

    Args:
      inputs: an array of shape (..., *spatial, features), with any number of batch axes.
      init: the first value of each reduction: the neutral element of `reduce_fn`, such as 0.0 for a sum.
      reduce_fn: a function of two scalars, such as `jax.lax.add`.
      window_shape: the size of the window along each spatial axis, such as ``(2, 2)`` for images.
      strides: the step of the window along each spatial axis. None means 1.
      padding: ``"VALID"`` (none), ``"SAME"`` or ``"SAME_LOWER"`` (for a step of 1 the output has the size of the input), or
        (low, high) for each spatial axis.

    Returns:
      An array of shape (..., *spatial, features). Its spatial sizes depend on the strides and the padding.

    Raises:
      ArgumentError: the input has too few axes, or the window, strides and padding are for different numbers of axes.

    Example:
      >>> import jax, jax.numpy as jnp, mutatis as mu
      >>> x = jnp.ones((1, 4, 1))  # one sequence of length 4, with one feature
      >>> mu.nn.pool(x, 0.0, jax.lax.add, window_shape=(2,), strides=(2,), padding="VALID").tolist()
      [[[2.0], [2.0]]]
    """
    x = jnp.asarray(inputs)
    window = _sizes("window_shape", window_shape)
    steps = (1,) * len(window) if strides is None else _sizes("strides", strides, len(window))
    around: Any = padding
    if (isinstance(padding, str) and padding not in _NAMES) or isinstance(padding, int):
        raise _unknown("padding", padding, f"{', '.join(map(repr, _NAMES))}, or (low, high) for each spatial axis")
    batch = x.ndim - len(window) - 1
    if batch < 0:
        raise ArgumentError(
            f"an input has too few axes to pool {len(window)} of them",
            path="inputs",
            expected=f"{len(window)} spatial axes and one of features, or more axes in front",
            got=f"an input of shape {x.shape}",
            cure="Features come last, `x[..., None]`; the window is for the spatial axes only, as `(2, 2)`.",
        )
    if not isinstance(padding, str):
        widths = [_sizes("padding", width, 2) for width in padding]
        _sizes("padding", [0] * len(widths), len(window))
        around = [(0, 0)] * batch + widths + [(0, 0)]
    in_front = (1,) * batch
    return lax.reduce_window(x, init, reduce_fn, (*in_front, *window, 1), (*in_front, *steps, 1), around)


def avg_pool(
    inputs: ArrayLike,
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Padding = "VALID",
    count_include_pad: bool = True,
) -> jax.Array:
    """The mean of each window.

    Args:
      inputs: an array of floats, of shape (..., *spatial, features), with any number of batch axes.
      window_shape: the size of the window along each spatial axis, such as ``(2, 2)`` for images.
      strides: the step of the window along each spatial axis. None means 1; most models use the size of the window.
      padding: ``"VALID"`` (none), ``"SAME"``, or (low, high) for each spatial axis, as in `pool`.
      count_include_pad: whether padding counts in the mean, as zeros. The mean of a window of padding only is 0.

    Returns:
      An array of shape (..., *spatial, features). Its spatial sizes depend on the strides and the padding.

    Raises:
      ArgumentError: as in `pool`; or the input holds integers.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> images = jnp.ones((4, 28, 28, 8))
      >>> mu.nn.avg_pool(images, (2, 2), strides=(2, 2)).shape
      (4, 14, 14, 8)
      >>> mu.nn.avg_pool(jnp.arange(4.0).reshape(1, 4, 1), (2,), (2,)).tolist()
      [[[0.5], [2.5]]]
    """
    x = _floats("avg_pool", inputs)
    total = pool(x, 0.0, lax.add, window_shape, strides, padding)
    if count_include_pad:
        return total / math.prod(window_shape)
    spatial = x.shape[x.ndim - len(window_shape) - 1 : -1]
    ones = jnp.ones((*(1,) * (x.ndim - len(spatial) - 1), *spatial, 1), total.dtype)
    count = pool(ones, 0.0, lax.add, window_shape, strides, padding)
    return total / jnp.maximum(count, 1)


def max_pool(
    inputs: ArrayLike, window_shape: Sequence[int], strides: Sequence[int] | None = None, padding: Padding = "VALID"
) -> jax.Array:
    """The maximum of each window.

    Args:
      inputs: an array of shape (..., *spatial, features), with any number of batch axes.
      window_shape: the size of the window along each spatial axis, such as ``(2, 2)`` for images.
      strides: the step of the window along each spatial axis. None means 1; most models use the size of the window.
      padding: ``"VALID"`` (none), ``"SAME"``, or (low, high) for each spatial axis, as in `pool`.

    Returns:
      An array of shape (..., *spatial, features). Its spatial sizes depend on the strides and the padding.

    Raises:
      ArgumentError: as in `pool`.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> images = jnp.ones((4, 28, 28, 8))
      >>> mu.nn.max_pool(images, (2, 2), strides=(2, 2)).shape
      (4, 14, 14, 8)
      >>> mu.nn.max_pool(jnp.arange(4.0).reshape(1, 4, 1), (2,), (2,)).tolist()
      [[[1.0], [3.0]]]
    """
    x = jnp.asarray(inputs)
    return pool(x, _extreme(x, -1), lax.max, window_shape, strides, padding)


def min_pool(
    inputs: ArrayLike, window_shape: Sequence[int], strides: Sequence[int] | None = None, padding: Padding = "VALID"
) -> jax.Array:
    """The minimum of each window.

    Args:
      inputs: an array of shape (..., *spatial, features), with any number of batch axes.
      window_shape: the size of the window along each spatial axis, such as ``(2, 2)`` for images.
      strides: the step of the window along each spatial axis. None means 1; most models use the size of the window.
      padding: ``"VALID"`` (none), ``"SAME"``, or (low, high) for each spatial axis, as in `pool`.

    Returns:
      An array of shape (..., *spatial, features). Its spatial sizes depend on the strides and the padding.

    Raises:
      ArgumentError: as in `pool`.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> mu.nn.min_pool(jnp.arange(4.0).reshape(1, 4, 1), (2,), (2,)).tolist()
      [[[0.0], [2.0]]]
    """
    x = jnp.asarray(inputs)
    return pool(x, _extreme(x, 1), lax.min, window_shape, strides, padding)


def adaptive_avg_pool(inputs: ArrayLike, target_shape: Sequence[int | None]) -> jax.Array:
    """The mean of windows that are chosen so that the spatial axes of the output have the sizes `target_shape`.

    Window ``i`` of ``m`` over an axis of size ``n`` goes from ``floor(i * n / m)`` to ``ceil((i + 1) * n / m)``. With
    ``(1, 1)`` it is the global mean of an image.

    Args:
      inputs: an array of floats, of shape (..., *spatial, features), with any number of batch axes.
      target_shape: the size of the output along each spatial axis. None keeps the size of the input.

    Returns:
      An array of shape (..., *target_shape, features).

    Raises:
      ArgumentError: the input has too few axes, or a spatial axis of size 0, or holds integers.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> mu.nn.adaptive_avg_pool(jnp.ones((2, 7, 5, 3)), (1, 1)).shape
      (2, 1, 1, 3)
      >>> mu.nn.adaptive_avg_pool(jnp.arange(5.0).reshape(1, 5, 1), (2,)).tolist()
      [[[1.0], [3.0]]]
    """
    return _adaptive(_floats("adaptive_avg_pool", inputs), target_shape, jnp.mean)


def adaptive_max_pool(inputs: ArrayLike, target_shape: Sequence[int | None]) -> jax.Array:
    """The maximum of windows that are chosen as in `adaptive_avg_pool`.

    Args:
      inputs: an array of shape (..., *spatial, features), with any number of batch axes.
      target_shape: the size of the output along each spatial axis. None keeps the size of the input.

    Returns:
      An array of shape (..., *target_shape, features).

    Raises:
      ArgumentError: the input has too few axes, or a spatial axis of size 0.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> mu.nn.adaptive_max_pool(jnp.ones((2, 7, 5, 3)), (1, 1)).shape
      (2, 1, 1, 3)
      >>> mu.nn.adaptive_max_pool(jnp.arange(5.0).reshape(1, 5, 1), (2,)).tolist()
      [[[2.0], [4.0]]]
    """
    return _adaptive(jnp.asarray(inputs), target_shape, jnp.max)


class AdaptiveAvgPool(Module):
    """`adaptive_avg_pool` as a layer, for example in a `Sequential`.

    Args:
      target_shape: the size of the output along each spatial axis. None keeps the size of the input.

    Raises:
      ArgumentError: `target_shape` is not a sequence of ints above 0 and of None.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> layer = mu.nn.AdaptiveAvgPool((1, 1))
      >>> layer(jnp.ones((2, 7, 5, 3))).shape
      (2, 1, 1, 3)
    """

    def __init__(self, target_shape: Sequence[int | None]) -> None:
        self.target_shape = _sizes("target_shape", target_shape)

    def __call__(self, inputs: ArrayLike) -> jax.Array:
        """Pool the spatial axes.

        Args:
          inputs: an array of floats, of shape (..., *spatial, features).

        Returns:
          An array of shape (..., *target_shape, features).

        Raises:
          ArgumentError: as in `adaptive_avg_pool`.
        """
        return adaptive_avg_pool(inputs, self.target_shape)


class AdaptiveMaxPool(Module):
    """`adaptive_max_pool` as a layer, for example in a `Sequential`.

    Args:
      target_shape: the size of the output along each spatial axis. None keeps the size of the input.

    Raises:
      ArgumentError: `target_shape` is not a sequence of ints above 0 and of None.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> layer = mu.nn.AdaptiveMaxPool((1, 1))
      >>> layer(jnp.ones((2, 7, 5, 3))).shape
      (2, 1, 1, 3)
    """

    def __init__(self, target_shape: Sequence[int | None]) -> None:
        self.target_shape = _sizes("target_shape", target_shape)

    def __call__(self, inputs: ArrayLike) -> jax.Array:
        """Pool the spatial axes.

        Args:
          inputs: an array of shape (..., *spatial, features).

        Returns:
          An array of shape (..., *target_shape, features).

        Raises:
          ArgumentError: as in `adaptive_max_pool`.
        """
        return adaptive_max_pool(inputs, self.target_shape)


def _adaptive(x: jax.Array, target_shape: Sequence[int | None], reduce: Reduction) -> jax.Array:
    """Reduce one spatial axis after the other, which comes to the same for averages of windows and for maxima."""
    target = _sizes("target_shape", target_shape)
    first = x.ndim - len(target) - 1
    if first < 0 or 0 in x.shape[first:-1]:
        raise ArgumentError(
            f"an input cannot be pooled to {target}",
            path="inputs",
            expected=f"{len(target)} spatial axes that are not empty, and one of features, or more axes in front",
            got=f"an input of shape {x.shape}",
            cure="Features come last, `x[..., None]`; the target is for the spatial axes only, as `(1, 1)`.",
        )
    for axis, size in enumerate(target, first):
        if size is not None and size != x.shape[axis]:
            x = _to_size(x, axis, size, reduce)
    return x


def _to_size(x: jax.Array, axis: int, size: int, reduce: Reduction) -> jax.Array:
    length = x.shape[axis]
    if length % size == 0:
        return reduce(x.reshape(*x.shape[:axis], size, length // size, *x.shape[axis + 1 :]), axis + 1)
    windows = [(i * length // size, -(-(i + 1) * length // size)) for i in range(size)]
    return jnp.concatenate(
        [reduce(lax.slice_in_dim(x, low, high, axis=axis), axis, keepdims=True) for low, high in windows], axis
    )


def _sizes(name: str, value: Any, length: int | None = None) -> tuple[Any, ...]:
    """Whole numbers for each spatial axis. One number alone would not say how many such axes there are."""
    sizes = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else None
    if sizes is None or (length is not None and len(sizes) != length):
        raise _unknown(name, value, "a number for each spatial axis" if length is None else f"a tuple of {length}")
    least = 0 if name == "padding" else 1
    whole = all(isinstance(size, int | np.integer) and size >= least for size in sizes if size is not None)
    if not whole or (None in sizes and name != "target_shape"):
        raise _unknown(name, value, "whole numbers" + (" above 0" if least else ""))
    return sizes


def _unknown(name: str, value: Any, expected: str) -> ArgumentError:
    example = "((1, 1), (1, 1))" if name == "padding" else "(2, 2)"
    return ArgumentError(
        f"`{name}` of pooling does not say what to do along each spatial axis",
        path=name,
        expected=expected,
        got=show_value(value),
        cure=f"For images, `{name}={example}`; the axes of the batch and of the features are not counted.",
    )


def _floats(what: str, inputs: ArrayLike) -> jax.Array:
    x = jnp.asarray(inputs)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise ArgumentError(
            f"`nn.{what}` averages floats",
            path="inputs",
            expected="an array of floats",
            got=show_type(x),
            cure="`x.astype(jnp.float32)`",
        )
    return x


def _extreme(x: jax.Array, sign: int) -> Any:
    """The least number of an array's dtype, or the greatest."""
    if x.dtype == bool:
        return np.bool_(sign > 0)
    if jnp.issubdtype(x.dtype, jnp.integer):
        limits = jnp.iinfo(x.dtype)
        return np.asarray(limits.max if sign > 0 else limits.min, x.dtype)
    return sign * np.inf
