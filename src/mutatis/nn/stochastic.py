"""Layers that draw random numbers when they are called: `Dropout`."""

from __future__ import annotations

from collections.abc import Sequence, Set

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mutatis.core import naming
from mutatis.core.showing import show_value
from mutatis.errors import ArgumentError, RandomStreamError
from mutatis.model.kinds import RngState, stream_value
from mutatis.model.modules import Module
from mutatis.nn.layers import first_said
from mutatis.random import Rngs, stream_of


class Dropout(Module):
    """Sets elements to zero at random and scales up the others, so that the expected value stays.

    The layer owns a random stream, forked from the `dropout` stream of `rngs` when it is made. So each layer draws
    numbers of its own, also when layers are stacked and scanned over, and the stream is saved with the model.

    Args:
      rate: the probability of an element to be set to zero, in [0, 1].
      broadcast_dims: axes along which elements are dropped together.
      deterministic: whether to return the input as it is, unless the call says so. None goes by `training` of the module:
        elements are dropped unless `model.eval()` was called.
      rngs: random streams; may be left out if nothing will be dropped, or if each call brings its own.

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

    def __init__(
        self,
        rate: float,
        *,
        broadcast_dims: Sequence[int] = (),
        deterministic: bool | None = None,
        rngs: Rngs | None = None,
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
        self.stream = None
        if rngs is not None:
            key = stream_of(rngs, "dropout", "`nn.Dropout`").draw()
            self.stream = RngState(stream_value(key), tag="dropout")

    def __call__(self, x: ArrayLike, *, deterministic: bool | None = None, rngs: Rngs | None = None) -> jax.Array:
        """Drop elements.

        Args:
          x: an array of floats, of any shape.
          deterministic: whether to return the input as it is; goes before what the layer was made with.
          rngs: random streams to draw from in place of the layer's own.

        Returns:
          An array of the same shape and dtype.

        Raises:
          RandomStreamError: there is no stream to draw from.
        """
        x = jnp.asarray(x)
        if self.rate == 0 or first_said(deterministic, self.deterministic, not self.training):
            return x
        if self.rate == 1:  # dividing by the keep rate would give NaN, in the gradient too
            return jnp.zeros_like(x)
        keep = 1 - self.rate
        together = {axis % x.ndim for axis in self.broadcast_dims}
        shape = tuple(1 if axis in together else size for axis, size in enumerate(x.shape))
        kept = jax.random.bernoulli(self._stream(rngs).draw(), keep, shape, out_sharding=_placement(x, together))
        return jnp.where(kept, x / keep, jnp.zeros_like(x))

    def _stream(self, rngs: Rngs | None) -> RngState:
        if rngs is not None:
            return stream_of(rngs, "dropout", "`nn.Dropout`")
        if self.stream is None:
            raise RandomStreamError(
                "`nn.Dropout` has no random stream `dropout` to draw from",
                path="dropout",
                where=naming.where(),
                cure="Give it one where it is made, `nn.Dropout(0.5, rngs=mu.Rngs(0))`, or in the call, "
                "`layer(x, rngs=rngs)`; to drop nothing, call `model.eval()`.",
            )
        return self.stream


def _placement(x: jax.Array, together: Set[int]) -> jax.sharding.NamedSharding | None:
    """How random numbers for an array are placed, where that is part of its type: as the array, but for axes of length 1."""
    sharding = jax.typeof(x).sharding
    if sharding.mesh.empty or all(axis is None for axis in sharding.spec):
        return None
    spec = (None if place in together else axis for place, axis in enumerate(sharding.spec))
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*spec))
