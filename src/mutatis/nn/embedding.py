"""`Embed`: vectors for numbers, such as those of words."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer, variance_scaling
from jax.typing import ArrayLike, DTypeLike

from mutatis.core.avals import show_type
from mutatis.nn.layers import (
    NO_METADATA,
    Layer,
    Metadata,
    PromoteDtype,
    misfit,
    param_key,
    parameter,
    promote_dtype,
)
from mutatis.random import Rngs


def default_embed_init(key: Any, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
    """Normal with variance 1 / features: a function by name, which pickles."""
    return variance_scaling(1.0, "fan_in", "normal", out_axis=0)(key, shape, dtype)


class Embed(Layer):
    """A table of vectors that are looked up by number, such as the embeddings of tokens.

    A number beyond the table gives NaN, because compiled code cannot raise an error. Negative numbers count from the end of the
    table. A table with a single vector gives it for every number.

    Args:
      num_embeddings: the number of vectors.
      features: the size of each vector.
      dtype: the dtype of the result. None takes that of the table.
      param_dtype: the dtype of the table.
      embedding_init: the initializer of the table, as those of `jax.nn.initializers`. The default is normal with variance 1 /
        features.
      promote_dtype: the function that brings ``(embedding,)``, or ``(query, embedding)``, to one dtype. It is called with that
        tuple and ``dtype=``, and for the former with ``inexact=False``.
      rngs: random streams; the table is drawn from the stream `params`.
      embedding_metadata: metadata of the table, such as ``{"sharding": ("vocab", "embed")}``.

    Attributes:
      embedding: Param of shape (num_embeddings, features).

    Raises:
      RandomStreamError: there is no stream to draw the table from.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> embed = mu.nn.Embed(num_embeddings=100, features=8, rngs=mu.Rngs(0))
      >>> x = embed(jnp.array([[3, 1, 4]]))
      >>> x.shape
      (1, 3, 8)
      >>> logits = embed.attend(x)  # an output layer with the same weights
      >>> logits.shape
      (1, 3, 100)
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        embedding_init: Initializer = default_embed_init,
        promote_dtype: PromoteDtype = promote_dtype,
        rngs: Rngs,
        embedding_metadata: Metadata = NO_METADATA,
    ) -> None:
        key = param_key("Embed", rngs, embedding_init)
        shape = (num_embeddings, features)
        self.embedding = parameter(embedding_init, key, shape, param_dtype, embedding_metadata)
        self.num_embeddings = num_embeddings
        self.features = features
        self.dtype = dtype
        self.param_dtype = param_dtype
        self._settle(promote_dtype=promote_dtype)

    def __call__(self, inputs: ArrayLike, out_sharding: Any = None) -> jax.Array:
        """Look up the vectors of some numbers.

        Args:
          inputs: an array of integers, of any shape.
          out_sharding: the sharding of the result, on a mesh whose axes are explicit. None takes that of the input, and along the
            features that of the table.

        Returns:
          An array of shape (*inputs.shape, features).

        Raises:
          ArgumentError: the input holds no integers.
        """
        numbers = jnp.asarray(inputs)
        if not jnp.issubdtype(numbers.dtype, jnp.integer):
            raise misfit(
                self.embedding,
                expected=f"integers, below {self.num_embeddings}",
                got=f"an input of {show_type(numbers)}",
                cure="Give numbers of rows, `x.astype(jnp.int32)`; vectors of floats go through `nn.Linear`, or "
                "`embed.attend(x)`.",
            )
        (table,) = self.promote_dtype((self.embedding.value,), dtype=self._dtype(), inexact=False)
        if self.num_embeddings == 1:
            return jnp.broadcast_to(table.reshape(-1), (*numbers.shape, self.features))
        out_sharding = _placement(numbers, table) if out_sharding is None else out_sharding
        if out_sharding is None:
            return jnp.take(table, numbers, axis=0)
        looked_up = jax.sharding.auto_axes(lambda table, numbers: jnp.take(table, numbers, axis=0))
        return looked_up(table, numbers, out_sharding=out_sharding)

    def attend(self, query: ArrayLike, out_sharding: Any = None) -> jax.Array:
        """Compute the inner product with every vector: logits over the table, by the weights of the embedding.

        Args:
          query: an array of floats, of shape (..., features).
          out_sharding: the sharding of the result, on a mesh whose axes are explicit.

        Returns:
          An array of shape (..., num_embeddings).

        Raises:
          ArgumentError: the query has another number of features.
        """
        x = jnp.asarray(query)
        if x.ndim == 0 or x.shape[-1] != self.embedding.shape[1]:
            raise misfit(
                self.embedding,
                expected=f"{self.embedding.shape[1]} features along axis -1",
                got=f"a query of shape {x.shape}",
                cure="Bring the query to the size of the embedding before, `nn.Linear(in_features, features, rngs=rngs)`.",
            )
        x, table = self.promote_dtype((x, self.embedding.value), dtype=self._dtype())
        return jnp.dot(x, table.T, out_sharding=out_sharding)

    def _dtype(self) -> Any:
        return self.embedding.dtype if self.dtype is None else self.dtype


def _placement(numbers: jax.Array, table: jax.Array) -> jax.sharding.PartitionSpec | None:
    """How rows of a table are placed, where that is part of the arrays' types; None where it is not."""
    rows, columns = jax.typeof(numbers).sharding, jax.typeof(table).sharding
    spread = [axis for sharding in (rows, columns) if not sharding.mesh.empty for axis in sharding.spec]
    if all(axis is None for axis in spread):
        return None
    first = () if rows.mesh.empty else rows.spec
    taken = {name for axis in first for name in (axis if isinstance(axis, tuple) else (axis,))}
    last = None if columns.mesh.empty else columns.spec[1]
    names = last if isinstance(last, tuple) else (last,)
    return jax.sharding.PartitionSpec(
        *(first or (None,) * numbers.ndim), None if taken.intersection(names) - {None} else last
    )
