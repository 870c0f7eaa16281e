"""Attention of queries to keys: the weights, and the means of the values with these weights."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from mutatis.core import naming
from mutatis.core.avals import broadcasts
from mutatis.errors import ArgumentError, RandomStreamError
from mutatis.interventions import sow
from mutatis.model.kinds import Intermediate
from mutatis.model.modules import Module
from mutatis.nn.layers import PromoteDtype, promote_dtype
from mutatis.nn.positions import RoPE


def dot_product_attention_weights(
    query: ArrayLike,
    key: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: DTypeLike | None = None,
    precision: lax.PrecisionLike = None,
    module: Module | None = None,
    promote_dtype: PromoteDtype = promote_dtype,
    is_causal: bool = False,
) -> jax.Array:
    """The attention weights of queries and keys: ``softmax(query @ key.T / sqrt(features) + bias)``.

    Args:
      query: an array of floats of shape (*batch, queries, heads, features).
      key: an array of floats of shape (*batch, keys, key heads, features). If there are fewer key heads than heads, each serves
        several heads (grouped-query attention).
      bias: an array that broadcasts to (*batch, heads, queries, keys), and is added before the softmax.
      mask: an array that broadcasts to (*batch, heads, queries, keys), and is True or not 0 where a query sees a key. A query
        that sees no key gives the same weight to all.
      broadcast_dropout: whether all elements of a batch and all heads drop the same weights.
      dropout_rng: the random key for dropout.
      dropout_rate: the probability that a weight is set to zero, in [0, 1).
      deterministic: whether to drop nothing.
      dtype: the dtype of the computation. None takes the common dtype of the arrays.
      precision: the precision of the product, as in `jax.lax.dot_general`.
      module: a module that keeps the weights as its Intermediate `attention_weights`.
      promote_dtype: the function that brings ``(query, key)`` to one dtype; it is called with that tuple and ``dtype=``.
      is_causal: whether a query sees only the keys up to its own place.

    Returns:
      An array of shape (*batch, heads, queries, keys). The weights of a query sum to 1, unless some were dropped.

    Raises:
      ArgumentError: the shapes do not fit each other, or the rate is not in [0, 1).
      RandomStreamError: weights are to be dropped, and there is no `dropout_rng`.

    Source:
      Vaswani et al., Attention is all you need, 2017, https://arxiv.org/abs/1706.03762

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> query, key = jnp.zeros((1, 3, 2, 8)), jnp.zeros((1, 4, 2, 8))  # 3 queries and 4 keys, in 2 heads
      >>> weights = mu.nn.dot_product_attention_weights(query, key)
      >>> weights.shape, weights[0, 0, 0].tolist()
      ((1, 2, 3, 4), [0.25, 0.25, 0.25, 0.25])
    """
    if not 0 <= dropout_rate < 1:
        raise ArgumentError(
            "attention cannot drop weights with this rate",
            path="dropout_rate",
            expected="a probability, from 0 to below 1",
            got=repr(dropout_rate),
            cure="`dropout_rate=0.1`",
        )
    q: jax.Array
    k: jax.Array
    drops = dropout_rate > 0 and not deterministic
    if drops and dropout_rng is None:
        raise RandomStreamError(
            "attention has no random key to drop weights with",
            path="dropout_rng",
            where=naming.where(),
            cure="Give it one, `dropout_rng=rngs.dropout()`; to drop nothing, `deterministic=True`.",
        )
    q, k = promote_dtype((jnp.asarray(query), jnp.asarray(key)), dtype=dtype)
    shape = _weights_shape(q, k)
    groups = q.shape[-2] // k.shape[-2]
    grouped = q.reshape(*q.shape[:-2], k.shape[-2], groups, q.shape[-1])
    scaled = grouped / jnp.sqrt(q.shape[-1]).astype(q.dtype)
    weights = jnp.einsum("...qhgd,...khd->...hgqk", scaled, k, precision=precision).reshape(shape)
    if bias is not None:
        weights = weights + fitting("bias", bias, shape)
    visible = None if mask is None else fitting("mask", mask, shape).astype(bool)
    if is_causal:
        causal = jnp.tril(jnp.ones(shape[-2:], bool)).reshape((1,) * (len(shape) - 2) + shape[-2:])
        visible = causal if visible is None else visible & causal
    if visible is not None:
        weights = jnp.where(visible, weights, jnp.finfo(weights.dtype).min)
    weights = jax.nn.softmax(weights).astype(q.dtype)
    if module is not None:
        sow(module, "attention_weights", weights, kind=Intermediate)
    if drops:
        assert dropout_rng is not None
        kept_shape = (1,) * (len(shape) - 2) + shape[-2:] if broadcast_dropout else shape
        kept = jax.random.bernoulli(dropout_rng, 1 - dropout_rate, kept_shape)
        weights = weights * (kept.astype(weights.dtype) / jnp.asarray(1 - dropout_rate, weights.dtype))
    return weights


def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: DTypeLike | None = None,
    precision: lax.PrecisionLike = None,
    module: Module | None = None,
    promote_dtype: PromoteDtype = promote_dtype,
    is_causal: bool = False,
) -> jax.Array:
    """Attention: for each query, the mean of the values with the weights of `dot_product_attention_weights`.

    If `dropout_rate` is 0, there is no `precision` and no `module`, and keys and values have one shape,
    `jax.nn.dot_product_attention` computes it, with a fast kernel where JAX has one.

    Args:
      query: an array of floats of shape (*batch, queries, heads, features).
      key: an array of floats of shape (*batch, keys, key heads, features). If there are fewer key heads than heads, each serves
        several heads.
      value: an array of floats of shape (*batch, keys, key heads, value features).
      bias, mask, broadcast_dropout, dropout_rng, dropout_rate, deterministic, dtype, precision, module, is_causal: as in
        `dot_product_attention_weights`.
      promote_dtype: the function that brings ``(query, key, value)`` to one dtype; it is called with that tuple and ``dtype=``.

    Returns:
      An array of shape (*batch, queries, heads, value features).

    Raises:
      ArgumentError: the shapes do not fit each other, or the rate is not in [0, 1).
      RandomStreamError: weights are to be dropped, and there is no `dropout_rng`.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> query = jnp.ones((2, 6, 4, 8))  # 2 sequences of 6 tokens, in 4 heads of 8 features
      >>> key = value = jnp.ones((2, 6, 4, 8))
      >>> mu.nn.dot_product_attention(query, key, value, is_causal=True).shape
      (2, 6, 4, 8)
    """
    q, k, v = promote_dtype((jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)), dtype=dtype)
    shape = _weights_shape(q, k, v)
    if dropout_rate == 0 and module is None and precision is None and v.shape == k.shape:
        return _fused(q, k, v, bias, mask, is_causal, shape)
    weights = dot_product_attention_weights(
        q,
        k,
        bias,
        mask,
        broadcast_dropout,
        dropout_rng,
        dropout_rate,
        deterministic,
        dtype,
        precision,
        module,
        promote_dtype,
        is_causal,
    )
    heads = v.shape[-2]
    grouped = weights.reshape(*shape[:-3], heads, shape[-3] // heads, *shape[-2:])
    result = jnp.einsum("...hgqk,...khd->...qhgd", grouped, v, precision=precision)
    return result.reshape(*q.shape[:-1], v.shape[-1])


def dot_product_attention_with_rope(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    rope: RoPE,
    input_positions: ArrayLike | None = None,
    **options: Any,
) -> jax.Array:
    """`dot_product_attention` after a rotation of queries and keys by their positions.

    In a model, give `rope` to `MultiHeadAttention` instead: that works with a cache, too.

    Args:
      query, key, value: as in `dot_product_attention`.
      rope: the `RoPE` that rotates the queries and the keys.
      input_positions: integers of shape (*batch, length), the positions of queries and keys. None counts from 0.
      **options: further arguments of `dot_product_attention`.

    Returns:
      An array of shape (*batch, queries, heads, value features).

    Raises:
      ArgumentError: the shapes do not fit each other.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> x = jnp.ones((2, 6, 4, 8))  # 2 sequences of 6 tokens, in 4 heads of 8 features
      >>> mu.nn.dot_product_attention_with_rope(x, x, x, rope=mu.nn.RoPE(), is_causal=True).shape
      (2, 6, 4, 8)
    """
    q, k = (turned(rope, jnp.asarray(x), input_positions) for x in (query, key))
    return dot_product_attention(q, k, value, **options)


def _fused(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: ArrayLike | None,
    mask: ArrayLike | None,
    is_causal: bool,
    shape: tuple[int, ...],
) -> jax.Array:
    """By `jax.nn.dot_product_attention`, which knows one batch axis."""
    bias = None if bias is None else fitting("bias", bias, shape)
    mask = None if mask is None else fitting("mask", mask, shape).astype(bool)
    attend = jax.numpy_dtype_promotion("standard")(jax.nn.dot_product_attention)  # it sums in float32, which promotes
    batch = query.shape[:-3]
    if len(batch) <= 1:
        return attend(query, key, value, bias, mask, is_causal=is_causal)

    def flat(x: jax.Array | None) -> jax.Array | None:
        if x is None or math.prod(x.shape[:-3]) == 1:
            return None if x is None else x.reshape(1, *x.shape[-3:])
        return jnp.broadcast_to(x, (*batch, *x.shape[-3:])).reshape(math.prod(batch), *x.shape[-3:])

    query_, key_, value_ = (x.reshape(math.prod(batch), *x.shape[-3:]) for x in (query, key, value))
    result = attend(query_, key_, value_, flat(bias), flat(mask), is_causal=is_causal)
    return result.reshape(query.shape)


def turned(rope: RoPE, x: jax.Array, positions: ArrayLike | None) -> jax.Array:
    """Turn vectors of shape (*batch, length, heads, features), all heads alike."""
    if positions is not None:
        positions = jnp.asarray(positions)[..., None, :]
    return jnp.moveaxis(rope(jnp.moveaxis(x, -3, -2), positions), -2, -3)


def _weights_shape(query: jax.Array, key: jax.Array, value: jax.Array | None = None) -> tuple[int, ...]:
    """The shape of the weights, (*batch, heads, queries, keys)."""
    others = [key] if value is None else [key, value]
    fits = (
        query.ndim >= 3
        and all(x.ndim == query.ndim and x.shape[:-3] == query.shape[:-3] for x in others)
        and all(x.shape[-3:-1] == key.shape[-3:-1] for x in others)
        and query.shape[-1] == key.shape[-1]
        and key.shape[-2] > 0
        and query.shape[-2] % key.shape[-2] == 0
    )
    if not fits:
        raise ArgumentError(
            "queries, keys and values do not fit each other",
            path="query",
            where=naming.where(),
            expected="shapes (*batch, queries, heads, features), and twice (*batch, keys, key heads, features), of which the "
            "number of heads is a multiple of the number of key heads",
            got=", ".join(str(x.shape) for x in (query, *others)),
            cure="Batch axes come first and are equal; heads stand between the length and the features.",
        )
    return (*query.shape[:-3], query.shape[-2], query.shape[-3], key.shape[-3])


def fitting(name: str, array: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    """A mask or bias with as many axes as the weights have, which it has to broadcast to."""
    array = jnp.asarray(array)
    if broadcasts(array.shape, shape):
        return array.reshape((1,) * (len(shape) - array.ndim) + array.shape)
    raise ArgumentError(
        f"the {name} does not fit the weights of attention",
        path=name,
        where=naming.where(),
        expected=f"an array that broadcasts to (*batch, heads, queries, keys) = {shape}",
        got=f"one of shape {array.shape}",
        cure="`nn.make_attention_mask(query_tokens > 0, key_tokens > 0)` gives (*batch, 1, queries, keys); an axis of size 1 "
        "holds for all.",
    )
