"""Delays: the values of some steps ago."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from mutatis.core import naming
from mutatis.core.avals import show_type
from mutatis.core.calls import as_integer
from mutatis.core.showing import show_value
from mutatis.errors import ArgumentError
from mutatis.model.kinds import Hidden
from mutatis.model.modules import Module
from mutatis.nn.layers import as_axes
from mutatis.nn.spiking.units import in_steps, in_unit


class Delay(Module):
    """A buffer of the values of the last steps, for signals that arrive later.

    It is a ring buffer, so a push writes one value, however long the buffer is. ``mu.reset(net, mu.Hidden, batch_shape=(32,))``
    starts a batch.

    Args:
      shape: the shape of a value; an int is for one axis.
      max_steps: the number of steps that can be looked back: the longest delay divided by the length of a step.
      dtype: the dtype of the values, to which those that are pushed are converted.

    Attributes:
      buffer: Hidden of shape (*batch, max_steps + 1, *shape), zeros at the start.
      newest: Hidden, int32 of shape (*batch,): the place of the last value in the buffer, for each element of a batch.

    Raises:
      ArgumentError: `max_steps` is no int from 0; a value of another shape is pushed; or `at` looks back too far.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> delay = mu.nn.Delay(2, max_steps=3)
      >>> for n in range(1, 6):
      ...     delay.push(jnp.array([n, 10.0 * n]))
      >>> delay.at(0)  # the last value
      Array([ 5., 50.], dtype=float32)
      >>> delay.at(jnp.array([1, 3])), delay.at(0.5)  # a delay for each element; an interpolated one
      (Array([ 4., 20.], dtype=float32), Array([ 4.5, 45. ], dtype=float32))
    """

    def __init__(self, shape: int | tuple[int, ...], max_steps: int, dtype: Any = jnp.float32) -> None:
        most = as_integer(max_steps)
        if most is None or most < 0:
            raise ArgumentError(
                "`nn.Delay` has nothing to hold",
                path="max_steps",
                expected="an int, from 0",
                got=show_value(max_steps),
                cure="`nn.Delay(100, max_steps=16)`: the longest delay divided by the step.",
            )
        self.shape = as_axes(shape)
        self.max_steps = most
        size = (most + 1, *self.shape)

        def empty() -> jax.Array:
            return jnp.zeros(size, dtype)

        self.buffer = Hidden(empty(), init=empty)
        self.newest = Hidden(jnp.int32(0), init=lambda: jnp.int32(0))

    def push(self, x: ArrayLike) -> None:
        """Add the value of the present step; the oldest value is dropped.

        Args:
          x: an array of shape (*batch, *shape). A quantity is taken as a number of mV.

        Raises:
          ArgumentError: the value has another shape.
        """
        buffer, axis = self.buffer.value, self._axis()
        value = jnp.asarray(in_unit(x, "mV", "x"))
        wanted = buffer.shape[:axis] + buffer.shape[axis + 1 :]
        if value.shape != wanted:
            batch = value.shape[: max(0, value.ndim - len(self.shape))]
            raise ArgumentError(
                f"delay {naming.describe(self.buffer)} was given a value of another shape",
                path=naming.path_of(self.buffer),
                where=naming.where(),
                expected=f"shape {wanted}",
                got=show_type(value),
                made_at=self.buffer.made_at,
                cure=f"Start a batch first: `mu.reset(model, mu.Hidden, batch_shape={batch})`."
                if value.shape == batch + self.shape
                else "Push a value for each element: `jnp.broadcast_to(x, delay.shape)`.",
            )
        at = (self.newest.value + 1) % (self.max_steps + 1)

        def put(buffer: jax.Array, value: jax.Array, at: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_index_in_dim(buffer, value, at, 0)

        for _ in range(axis):
            put = jax.vmap(put)
        self.buffer.value = put(buffer, value.astype(buffer.dtype), at)
        self.newest.value = at

    def at(self, steps: ArrayLike) -> jax.Array:
        """The value of some steps ago.

        Args:
          steps: the number of steps, from 0 (the last value) to `max_steps`: a number for all elements, or an array of shape
            `shape` or (*batch, *shape) with one for each. A float is interpolated between steps, and may be differentiated. A
            quantity of time is divided by `nn.dt`.

        Returns:
          An array of shape (*batch, *shape). It has the dtype of the values; integers and booleans are interpolated as floats.

        Raises:
          ArgumentError: the number is out of range, or the array has another shape. A number that is computed in compiled code
            cannot be compared there; the nearest one in range is taken.
        """
        array = jnp.asarray(in_steps(steps, "steps"))
        self._check(array)
        if jnp.issubdtype(array.dtype, jnp.integer):
            return self._pick(jnp.clip(array.astype(jnp.int32), 0, self.max_steps))
        first = jnp.clip(
            jnp.floor(array), 0, max(0, self.max_steps - 1)
        )  # so the last step belongs to an interval, too
        share = array - first
        share = jnp.where(share < 0, 0, jnp.where(share > 1, 1, share))  # differentiable at both ends
        below = first.astype(jnp.int32)
        values = self._pick(below), self._pick(jnp.minimum(below + 1, self.max_steps))
        dtype = values[0].dtype if jnp.issubdtype(values[0].dtype, jnp.inexact) else array.dtype
        if share.ndim and share.shape != values[0].shape:
            share = jnp.broadcast_to(share, values[0].shape)
        share = share.astype(dtype)
        return (1 - share) * values[0].astype(dtype) + share * values[1].astype(dtype)

    def _axis(self) -> int:
        """The axis of time, behind those of a batch."""
        return int(self.buffer.value.ndim) - 1 - len(self.shape)

    def _pick(self, steps: jax.Array) -> jax.Array:
        buffer, axis = self.buffer.value, self._axis()
        newest = self.newest.value
        if steps.ndim or axis:
            newest = newest.reshape(newest.shape + (1,) * len(self.shape))
            steps = jnp.broadcast_to(steps, buffer.shape[:axis] + self.shape)
        place = (newest - steps) % (self.max_steps + 1)
        if place.ndim == 0:
            return jax.lax.dynamic_index_in_dim(buffer, place, axis, keepdims=False)
        return jnp.take_along_axis(buffer, jnp.expand_dims(place, axis), axis).squeeze(axis)

    def _check(self, steps: jax.Array) -> None:
        whole = self.buffer.value.shape[: self._axis()] + self.shape
        number = steps.dtype != jnp.bool_
        if steps.shape not in ((), self.shape, whole) or not number:
            raise self._refused(
                "was asked for another shape than its values have"
                if number
                else "was asked for what is no number of steps",
                show_type(steps),
                "One number for all, or one for each element.",
            )
        if isinstance(steps, jax.core.Tracer) or steps.size == 0:
            return
        known = np.asarray(steps, np.float64)
        low, high = known.min(), known.max()  # NaN, if there is one
        if low >= 0 and high <= self.max_steps * (1 + 1e-6):
            return
        longer = f"`nn.Delay({self.shape}, max_steps={int(np.ceil(high))})`" if np.isfinite(high) else ""
        raise self._refused(
            "does not reach so far back" if low >= 0 else "does not know what comes",
            f"{high if low >= 0 else low:g} steps",
            longer if low >= 0 and longer else "The last value that was pushed is that of 0 steps ago: `delay.at(0)`.",
        )

    def _refused(self, problem: str, got: str, cure: str) -> ArgumentError:
        return ArgumentError(
            f"delay {naming.describe(self.buffer)} {problem}",
            path=naming.path_of(self.buffer),
            where=naming.where(),
            expected=f"from 0 to {self.max_steps} steps, a number or an array of shape {self.shape}",
            got=got,
            made_at=self.buffer.made_at,
            cure=cure,
        )
