"""Masks of attention: which key each query may see. True, or any number but 0, is for a pair that counts."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from mutatis.errors import ArgumentError


def make_attention_mask(
    query_input: ArrayLike,
    key_input: ArrayLike,
    pairwise_fn: Callable[..., jax.Array] = jnp.multiply,
    extra_batch_dims: int = 0,
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """A mask for attention, made from one number for each query and one for each key.

    By default a query sees a key if both numbers are not 0, so ``tokens > 0`` for both hides padding.

    Args:
      query_input: an array of shape (*batch, queries), such as booleans: whether a query is a token or padding.
      key_input: an array of shape (*batch, keys).
      pairwise_fn: a function of the two arrays, which are broadcast against each other, that returns the mask. It computes
        element by element.
      extra_batch_dims: the number of axes of size 1 to put in front.
      dtype: the dtype of the mask.

    Returns:
      An array of shape (*batch, 1, queries, keys), after the extra axes. The axis of size 1 is that of the heads.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> tokens = jnp.array([[5, 3, 0]])  # one sequence; 0 is padding
      >>> mask = mu.nn.make_attention_mask(tokens > 0, tokens > 0, dtype=bool)
      >>> mask.shape, mask[0, 0].astype(int).tolist()
      ((1, 1, 3, 3), [[1, 1, 0], [1, 1, 0], [0, 0, 0]])
    """
    pairs = pairwise_fn(jnp.asarray(query_input)[..., :, None], jnp.asarray(key_input)[..., None, :])
    mask = pairs[..., None, :, :]
    return mask.reshape((1,) * extra_batch_dims + mask.shape).astype(dtype)


def make_causal_mask(x: ArrayLike, extra_batch_dims: int = 0, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """A mask by which each token sees itself and the tokens before it.

    Args:
      x: an array of shape (*batch, length), of which only the shape counts.
      extra_batch_dims: the number of axes of size 1 to put in front.
      dtype: the dtype of the mask.

    Returns:
      An array of shape (*batch, 1, length, length), after the extra axes: 1 where a query (row) sees a key (column), else 0.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> mu.nn.make_causal_mask(jnp.zeros((1, 3)))[0, 0].astype(int).tolist()
      [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    """
    shape = jnp.shape(x)
    places = jnp.broadcast_to(jnp.arange(shape[-1], dtype=jnp.int32), shape)
    return make_attention_mask(places, places, jnp.greater_equal, extra_batch_dims, dtype)


def combine_masks(*masks: ArrayLike | None, dtype: DTypeLike = jnp.float32) -> jax.Array | None:
    """The conjunction of several masks: a query sees a key if all masks allow it.

    Args:
      *masks: arrays with the same number of axes, which broadcast against each other. A mask that is None is left out.
      dtype: the dtype of the mask.

    Returns:
      An array of the common shape. None if there is no mask.

    Raises:
      ArgumentError: the masks have different numbers of axes, or shapes that do not broadcast.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> causal = mu.nn.make_causal_mask(jnp.zeros((1, 3)))
      >>> tokens = mu.nn.make_attention_mask(jnp.ones((1, 3)), jnp.array([[1.0, 1.0, 0.0]]))
      >>> mu.nn.combine_masks(causal, None, tokens)[0, 0].astype(int).tolist()
      [[1, 0, 0], [1, 1, 0], [1, 1, 0]]
    """
    given = [jnp.asarray(mask).astype(bool) for mask in masks if mask is not None]
    if not given:
        return None
    shapes = [mask.shape for mask in given]
    try:
        if len({len(shape) for shape in shapes}) > 1:
            raise ValueError
        jnp.broadcast_shapes(*shapes)
    except ValueError:
        raise ArgumentError(
            "masks that do not fit each other cannot be combined",
            path="masks",
            expected="as many axes in all, of one size or 1",
            got=f"shapes {', '.join(map(str, shapes))}",
            cure="A mask has the shape (*batch, heads or 1, queries, keys), which `nn.make_attention_mask` gives.",
        ) from None
    combined = given[0]
    for mask in given[1:]:
        combined = combined & mask
    return combined.astype(dtype)
