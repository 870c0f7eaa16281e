"""Delays: the values of some steps ago."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from mutatis.core import naming
from mutatis.core.avals import show_type
from mutatis.core.calls import is_count
from mutatis.errors import ArgumentError
from mutatis.model.kinds import Hidden
from mutatis.model.modules import Module
from mutatis.nn.layers import as_axes
from mutatis.nn.spiking.integrators import in_base_units


class Delay(Module):
    """A buffer of the values of the last steps, for signals that arrive later.

    It is a ring buffer, so a push writes one value, however long the buffer is.

    Args:
      shape: the shape of a value; an int is for one axis.
      max_steps: the number of steps that can be looked back: the longest delay divided by the length of a step.
      dtype: the dtype of the values.

    Attributes:
      buffer: Hidden of shape (max_steps + 1, *shape), zeros at the start.
      newest: Hidden, an int32 scalar: the place of the last value in the buffer.

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
        if not is_count(max_steps, 0):
            raise ArgumentError(
                "`nn.Delay` has nothing to hold",
                path="max_steps",
                expected="an int, from 0",
                got=repr(max_steps),
                cure="`nn.Delay(100, max_steps=16)`: the longest delay divided by the step.",
            )
        self.shape = as_axes(shape)
        self.max_steps = max_steps
        size = (max_steps + 1, *self.shape)

        def empty() -> jax.Array:
            return jnp.zeros(size, dtype)

        self.buffer = Hidden(empty(), init=empty)
        self.newest = Hidden(jnp.int32(0), init=lambda: jnp.int32(0))

    def push(self, x: ArrayLike) -> None:
        """Add the value of the present step; the oldest value is dropped.

        Args:
          x: an array of shape `shape`.

        Raises:
          ArgumentError: the value has another shape.
        """
        buffer = self.buffer.value
        value = jnp.asarray(in_base_units(x, "x"))
        if value.shape != self.shape:
            raise ArgumentError(
                f"delay {naming.describe(self.buffer)} was given a value of another shape",
                path=naming.path_of(self.buffer),
                where=naming.where(),
                expected=f"shape {self.shape}",
                got=show_type(value),
                made_at=self.buffer.made_at,
                cure="A batch has a delay for each element: `mu.vmap` over the net, or `nn.Delay((batch, size), ...)`.",
            )
        at = (self.newest.value + 1) % (self.max_steps + 1)
        self.buffer.value = jax.lax.dynamic_update_index_in_dim(buffer, value.astype(buffer.dtype), at, 0)
        self.newest.value = at

    def at(self, steps: ArrayLike) -> jax.Array:
        """The value of some steps ago.

        Args:
          steps: the number of steps, from 0 (the last value) to `max_steps`: a number for all elements, or an array of shape
            `shape` with one for each. A float is interpolated between steps, and may be differentiated.

        Returns:
          An array of shape `shape`.

        Raises:
          ArgumentError: the number is out of range, where that can be known, or the array has another shape.
        """
        array = jnp.asarray(steps)
        self._check(array)
        if jnp.issubdtype(array.dtype, jnp.integer):
            return self._pick(array)
        below = jnp.floor(array)
        share = (array - below).astype(self.buffer.dtype)
        first = below.astype(jnp.int32)
        second = jnp.minimum(first + 1, self.max_steps)
        return (1 - share) * self._pick(first) + share * self._pick(second)

    def _pick(self, steps: jax.Array) -> jax.Array:
        place = (self.newest.value - steps) % (self.max_steps + 1)
        buffer = self.buffer.value
        if place.ndim == 0:
            return jax.lax.dynamic_index_in_dim(buffer, place, keepdims=False)
        return jnp.take_along_axis(buffer, place[None], axis=0)[0]

    def _check(self, steps: jax.Array) -> None:
        known = not isinstance(steps, jax.core.Tracer)
        wrong = (
            known and steps.size > 0 and bool(np.any((np.asarray(steps) > self.max_steps) | (np.asarray(steps) < 0)))
        )
        if wrong or steps.shape not in ((), self.shape):
            raise ArgumentError(
                f"delay {naming.describe(self.buffer)} does not reach so far back"
                if wrong
                else f"delay {naming.describe(self.buffer)} was asked for another shape than its values have",
                path=naming.path_of(self.buffer),
                where=naming.where(),
                expected=f"from 0 to {self.max_steps} steps, a number or an array of shape {self.shape}",
                got=f"{np.asarray(steps).max()} steps" if wrong else f"shape {steps.shape}",
                made_at=self.buffer.made_at,
                cure=f"`nn.Delay({self.shape}, max_steps={int(np.ceil(np.asarray(steps).max()))})`"
                if wrong
                else "One number for all, or one for each element.",
            )
