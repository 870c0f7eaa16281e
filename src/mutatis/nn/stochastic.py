"""Layers that draw random numbers when they are called: `Dropout`."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mutatis.core import naming
from mutatis.core.avals import show_type
from mutatis.core.showing import show_value
from mutatis.errors import ArgumentError, RandomStreamError
from mutatis.model.kinds import RngState, stream_value
from mutatis.nn.layers import Layer, first_said, misfit
from mutatis.random import Rngs, as_key, is_stream, stream_of


class Dropout(Layer):
    """Sets elements to zero at random in training, and scales up the others so that the expected value stays the same.

    After `model.eval()` it returns the input as it is. The layer owns a random stream, which it forks from the stream
    `rng_collection` of `rngs` when it is made. So each layer draws numbers of its own, also when layers are stacked and scanned
    over, and checkpoints save the stream.

    Args:
      rate: the probability that an element is set to zero, in [0, 1].
      broadcast_dims: axes along which elements are dropped together.
      deterministic: whether to return the input as it is, unless the call says so. None follows `model.train()` and
        `model.eval()`.
      rng_collection: the name of the stream among `rngs`, here and in calls.
      rngs: random streams, or one of them. It may be left out if nothing will be dropped, or if each call brings its own.

    Attributes:
      stream: RngState, or None without `rngs`.

    Raises:
      ArgumentError: the rate is not a probability.

    Source:
      Srivastava et al., Dropout: A Simple Way to Prevent Neural Networks from Overfitting, 2014,
      https://jmlr.org/papers/v15/srivastava14a.html

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> dropout = mu.nn.Dropout(0.5, rngs=mu.Rngs(0))
      >>> dropout(jnp.ones(8)).tolist()
      [2.0, 0.0, 2.0, 0.0, 2.0, 2.0, 2.0, 0.0]
      >>> dropout.eval()(jnp.ones(3)).tolist()
      [1.0, 1.0, 1.0]
    """

    rng_collection: Any = "dropout"

    def __init__(
        self,
        rate: float,
        *,
        broadcast_dims: Sequence[int] = (),
        deterministic: bool | None = None,
        rng_collection: str = "dropout",
        rngs: Rngs | RngState | None = None,
    ) -> None:
        if not (hasattr(rate, "__float__") and 0 <= rate <= 1):
            raise ArgumentError(
                f"`nn.Dropout` cannot drop with rate {show_value(rate)}",
                path="rate",
                expected="a probability, from 0 to 1",
                got=show_value(rate),
                cure="`nn.Dropout(0.5, rngs=rngs)`",
            )
        self.rate = rate
        self.broadcast_dims = tuple(broadcast_dims)
        self.deterministic = deterministic
        self._settle(rng_collection=rng_collection)
        self.stream = None
        if rngs is not None:
            self.stream = RngState(stream_value(self._draw(rngs)), tag=rng_collection)

    def __call__(
        self,
        inputs: ArrayLike,
        *,
        deterministic: bool | None = None,
        rngs: Rngs | RngState | jax.Array | None = None,
    ) -> jax.Array:
        """Drop elements at random.

        Args:
          inputs: an array of floats, of any shape.
          deterministic: whether to return the input as it is; overrides the setting of the layer.
          rngs: random streams, one of them, or a key, to draw from in place of the layer's own stream.

        Returns:
          An array of the same shape and dtype.

        Raises:
          ArgumentError: the input holds integers.
          RandomStreamError: there is no stream to draw from.
        """
        x = jnp.asarray(inputs)
        if self.rate == 0 or first_said(deterministic, self.deterministic, not self.training):
            return x
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            raise misfit(
                self if self.stream is None else self.stream,
                expected="floats",
                got=f"an input of {show_type(x)}",
                cure="Convert them before, `x.astype(jnp.float32)`, or put the layer after the one that makes floats of them.",
            )
        if self.rate == 1:  # dividing by the keep rate would give NaN, in the gradient too
            return jnp.zeros_like(x)
        keep = 1 - self.rate
        if not all(-x.ndim <= axis < x.ndim for axis in self.broadcast_dims):
            raise misfit(
                self if self.stream is None else self.stream,
                expected=f"an axis for each of broadcast_dims={self.broadcast_dims}",
                got=f"an input of shape {x.shape}",
                cure="Axes of the input are counted from 0, or from its end: `broadcast_dims=(-1,)`.",
            )
        together = {axis % x.ndim for axis in self.broadcast_dims}
        shape = tuple(1 if axis in together else size for axis, size in enumerate(x.shape))
        key = self._draw(self.stream if rngs is None else rngs)
        kept = jax.random.bernoulli(key, keep, shape, out_sharding=_placement(x, together))
        return jnp.where(kept, x / keep, jnp.zeros_like(x))

    def _draw(self, rngs: Any) -> jax.Array:
        """A key from what was given as random streams."""
        if rngs is None:
            raise RandomStreamError(
                f"`nn.Dropout` has no random stream `{self.rng_collection}` to draw from",
                path=self.rng_collection,
                where=naming.where(),
                cure="Give it one where it is made, `nn.Dropout(0.5, rngs=mu.Rngs(0))`, or in the call, "
                "`layer(x, rngs=rngs)`; to drop nothing, call `model.eval()`.",
            )
        if isinstance(rngs, jax.Array):
            return as_key(rngs, self.rng_collection)
        if is_stream(rngs):
            return rngs.draw()
        return stream_of(rngs, self.rng_collection, "`nn.Dropout`").draw()


def _placement(x: jax.Array, together: Set[int]) -> jax.sharding.NamedSharding | None:
    """How random numbers for an array are placed, where that is part of its type: as the array, but for axes of length 1."""
    sharding = jax.typeof(x).sharding
    if sharding.mesh.empty or all(axis is None for axis in sharding.spec):
        return None
    spec = (None if place in together else axis for place, axis in enumerate(sharding.spec))
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*spec))
