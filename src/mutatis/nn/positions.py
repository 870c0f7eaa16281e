"""Positions of tokens: added to their vectors (`SinusoidalPositions`, `LearnedPositions`), or as an angle (`RoPE`).

All are called with vectors and, if the first of them is not at position 0, the positions.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer, normal
from jax.typing import ArrayLike, DTypeLike

from mutatis.core import naming
from mutatis.core.avals import broadcasts
from mutatis.errors import ArgumentError
from mutatis.model.kinds import Buffer
from mutatis.model.modules import Module
from mutatis.nn.layers import check_input, convert, misfit, param_key, parameter
from mutatis.random import Rngs


class RoPE(Module):
    """Rotary positions: rotates each pair of features by an angle that is proportional to the position.

    The inner product of two rotated vectors depends on the distance of their positions only. `MultiHeadAttention` takes a
    `RoPE` as its `rope`. The pairs are feature ``i`` of the first half with feature ``i`` of the second. The angles are
    computed in float32, and the result has the dtype of the input.

    Args:
      theta: the base of the wavelengths: pair ``i`` turns by ``theta ** (-2 * i / features)`` radians for each position.
      embedding_size: the number of features, for a table of angles that is computed once. None computes them in each call.
      max_seq_len: the number of positions in the table. Give both sizes or neither.

    Attributes:
      cached_sin: Buffer of shape (max_seq_len, embedding_size // 2), or None.
      cached_cos: Buffer of shape (max_seq_len, embedding_size // 2), or None.

    Raises:
      ArgumentError: only one of the sizes is given, or the number of features is odd.

    Source:
      Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021, https://arxiv.org/abs/2104.09864

    Example:
      >>> import jax.numpy as jnp, numpy as np, mutatis as mu
      >>> rope = mu.nn.RoPE()
      >>> x = jnp.array([[1.0, 0.0], [1.0, 0.0]])  # two tokens, at the positions 0 and 1
      >>> print(np.asarray(rope(x), float).round(2))
      [[1.   0.  ]
       [0.54 0.84]]
      >>> attention = mu.nn.MultiHeadAttention(num_heads=4, in_features=16, rope=rope, rngs=mu.Rngs(0))
      >>> attention(jnp.ones((2, 6, 16)), is_causal=True).shape
      (2, 6, 16)
    """

    def __init__(
        self, theta: float = 10000.0, embedding_size: int | None = None, max_seq_len: int | None = None
    ) -> None:
        if (embedding_size is None) != (max_seq_len is None):
            raise ArgumentError(
                "`nn.RoPE` needs both sizes for a table, or neither",
                path="max_seq_len" if max_seq_len is None else "embedding_size",
                expected="an int",
                got="None",
                cure="`nn.RoPE(embedding_size=64, max_seq_len=2048)`, or `nn.RoPE()`",
            )
        self.theta = theta
        self.cached_sin = self.cached_cos = None
        if embedding_size is not None and max_seq_len is not None:
            sin, cos = _angles(jnp.arange(max_seq_len), embedding_size, theta)
            self.cached_sin, self.cached_cos = Buffer(sin), Buffer(cos)

    def __call__(self, x: ArrayLike, input_positions: ArrayLike | None = None) -> jax.Array:
        """Rotate vectors by their positions.

        Args:
          x: an array of floats of shape (..., length, features). With heads, their axis comes before the length.
          input_positions: the positions, numbers of shape (..., length) whose leading axes broadcast to those of `x`. None
            counts from 0.

        Returns:
          An array of the same shape and dtype.

        Raises:
          ArgumentError: the number of features is odd, or not that of the table, or the positions do not fit.
        """
        x = jnp.asarray(x)
        self._check(x, input_positions)
        tables = [table.value[: x.shape[-2]] for table in (self.cached_sin, self.cached_cos) if table is not None]
        if input_positions is None and tables and len(tables[0]) == x.shape[-2]:
            sin, cos = tables
        else:
            sin, cos = self.angles(jnp.arange(x.shape[-2]) if input_positions is None else input_positions, x.shape[-1])
        return rotate(x, sin, cos)

    def angles(self, positions: ArrayLike, features: int) -> tuple[jax.Array, jax.Array]:
        """The sine and the cosine of the angles at some positions.

        Args:
          positions: the positions, an array of any shape.
          features: the number of features.

        Returns:
          Two arrays of shape (*positions.shape, features // 2), float32.

        Raises:
          ArgumentError: the number of features is odd.
        """
        return _angles(jnp.asarray(positions), features, self.theta)

    def _check(self, x: jax.Array, positions: ArrayLike | None) -> None:
        if x.ndim < 2 or x.shape[-1] % 2 or not jnp.issubdtype(x.dtype, jnp.inexact):
            raise misfit(
                self,
                expected="floats of shape (..., length, features), with an even number of features",
                got=f"an input of {x.dtype}{list(x.shape)}",
                cure="With heads, put them before the length: `jnp.moveaxis(x, -2, -3)`.",
            )
        if self.cached_sin is not None and self.cached_sin.shape[-1] * 2 != x.shape[-1]:
            raise misfit(
                self,
                expected=f"{self.cached_sin.shape[-1] * 2} features, for which the table was made",
                got=f"an input of shape {x.shape}",
                cure=f"`nn.RoPE(embedding_size={x.shape[-1]}, max_seq_len={self.cached_sin.shape[0]})`: the size of a head. "
                "`nn.RoPE()` has no table and takes any.",
            )
        shape = x.shape[:-1] if positions is None else jnp.shape(positions)
        if not broadcasts(shape, x.shape[:-1]) or shape[-1:] != x.shape[-2:-1]:
            raise misfit(
                self,
                expected=f"a position for each vector of an input of shape {x.shape}",
                got=f"positions of shape {shape}",
                cure=f"`rope(x, jnp.arange({x.shape[-2]}) + start)`",
            )


def rotate(x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
    """Rotate each pair of feature ``i`` of the first half and feature ``i`` of the second.

    Args:
      x: an array of shape (..., features).
      sin, cos: the sine and the cosine of the angles, of shape (..., features // 2), whose leading axes broadcast to those of
        `x`.

    Returns:
      An array of the shape and dtype of `x`.
    """
    first, second = (convert(half, sin.dtype) for half in jnp.split(x, 2, axis=-1))
    between = (1,) * (x.ndim - sin.ndim)
    sin, cos = (table.reshape(between + table.shape) for table in (sin, cos))
    return convert(jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1), x.dtype)


class SinusoidalPositions(Module):
    """Adds sines and cosines of the position to each vector, as the first Transformer did.

    The wavelengths grow from 2π to 2π * theta along the features, in which sines and cosines alternate. The layer has no
    parameters, and there is no greatest position.

    Args:
      theta: the base of the wavelengths.

    Source:
      Vaswani et al., Attention is all you need, 2017, https://arxiv.org/abs/1706.03762

    Example:
      >>> import jax.numpy as jnp, numpy as np, mutatis as mu
      >>> positions = mu.nn.SinusoidalPositions()
      >>> print(np.asarray(positions(jnp.zeros((2, 4))), float).round(2))
      [[0.   1.   0.   1.  ]
       [0.84 0.54 0.01 1.  ]]
    """

    def __init__(self, theta: float = 10000.0) -> None:
        self.theta = theta

    def __call__(self, x: ArrayLike, input_positions: ArrayLike | None = None) -> jax.Array:
        """Add the positions to vectors.

        Args:
          x: an array of floats of shape (..., length, features).
          input_positions: the positions, numbers of shape (..., length) whose leading axes broadcast to those of `x`. None
            counts from 0.

        Returns:
          An array of the same shape and dtype.

        Raises:
          ArgumentError: the positions do not fit.
        """
        x = jnp.asarray(x)
        positions = _positions(self, x, input_positions)
        sin, cos = _angles(positions, x.shape[-1] + x.shape[-1] % 2, self.theta)
        table = jnp.stack([sin, cos], axis=-1).reshape(*positions.shape, -1)[..., : x.shape[-1]]
        return x + convert(_in_front(table, x.ndim), x.dtype)


class LearnedPositions(Module):
    """Adds a learned vector for its position to each vector.

    Args:
      max_length: the number of positions. A later position gives NaN, because compiled code cannot raise an error.
      features: the size of each vector.
      param_dtype: the dtype of the learned vectors.
      embedding_init: the initializer of the learned vectors, as those of `jax.nn.initializers`. None takes a normal one with
        standard deviation 0.02.
      rngs: random streams; the vectors are drawn from the stream `params`.

    Attributes:
      embedding: Param of shape (max_length, features).

    Raises:
      RandomStreamError: there is no stream to draw the vectors from.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> positions = mu.nn.LearnedPositions(max_length=16, features=8, rngs=mu.Rngs(0))
      >>> positions(jnp.zeros((2, 5, 8))).shape  # 2 sequences of 5 tokens
      (2, 5, 8)
    """

    def __init__(
        self,
        max_length: int,
        features: int,
        *,
        param_dtype: DTypeLike = jnp.float32,
        embedding_init: Initializer | None = None,
        rngs: Rngs,
    ) -> None:
        init = normal(0.02) if embedding_init is None else embedding_init
        key = param_key("LearnedPositions", rngs, init)
        self.embedding = parameter(init, key, (max_length, features), param_dtype)
        self.max_length = max_length
        self.features = features

    def __call__(self, x: ArrayLike, input_positions: ArrayLike | None = None) -> jax.Array:
        """Add the positions to vectors.

        Args:
          x: an array of floats of shape (..., length, features).
          input_positions: the positions, numbers of shape (..., length) whose leading axes broadcast to those of `x`. None
            counts from 0.

        Returns:
          An array of the same shape and dtype.

        Raises:
          ArgumentError: the input has another number of features, or is longer than `max_length`; or the positions do not fit.
        """
        x = jnp.asarray(x)
        check_input(self.embedding, x, along=1, ndim=2)
        if input_positions is None and x.shape[-2] > self.max_length:
            raise ArgumentError(
                f"state {naming.describe(self.embedding)} has no positions for an input of this length",
                path=naming.path_of(self.embedding),
                where=naming.where(),
                expected=f"at most {self.max_length} along axis -2",
                got=f"an input of shape {x.shape}",
                made_at=self.embedding.made_at,
                cure="Shorten the input, or make more positions, `nn.LearnedPositions(max_length, features, rngs=rngs)`.",
            )
        positions = _positions(self, x, input_positions)
        vectors = jnp.take(self.embedding.value, positions, axis=0)
        return x + convert(_in_front(vectors, x.ndim), x.dtype)


def _angles(positions: jax.Array, features: int, theta: float) -> tuple[jax.Array, jax.Array]:
    if features <= 0 or features % 2:
        raise ArgumentError(
            "features are turned in pairs",
            path="embedding_size",
            expected="a positive, even number",
            got=repr(features),
            cure="`nn.RoPE(embedding_size=64, max_seq_len=2048)`",
        )
    frequencies = theta ** (-jnp.arange(0, features, 2, dtype=jnp.float32) / features)
    angles = positions.astype(jnp.float32)[..., None] * frequencies.reshape((1,) * positions.ndim + (-1,))
    return jnp.sin(angles), jnp.cos(angles)


def _positions(layer: Module, x: jax.Array, given: ArrayLike | None) -> jax.Array:
    """The positions of the vectors of an input."""
    positions = jnp.arange(x.shape[-2]) if given is None and x.ndim > 1 else jnp.asarray(0 if given is None else given)
    if x.ndim < 2 or not broadcasts(positions.shape, x.shape[:-1]) or positions.shape[-1:] != x.shape[-2:-1]:
        raise misfit(
            layer,
            expected="an input of shape (..., length, features), and a position for each vector",
            got=f"an input of shape {x.shape}, positions of shape {positions.shape}",
            cure="`positions(x, jnp.arange(x.shape[-2]) + start)`",
        )
    return positions


def _in_front(table: jax.Array, ndim: int) -> jax.Array:
    return table.reshape((1,) * (ndim - table.ndim) + table.shape)
