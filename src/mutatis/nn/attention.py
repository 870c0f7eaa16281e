"""`MultiHeadAttention`: projections to several heads, attention in each, and a cache for decoding."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn.initializers import Initializer, zeros
from jax.typing import ArrayLike, DTypeLike

from mutatis.core import naming
from mutatis.errors import ArgumentError, RandomStreamError, StructureError
from mutatis.model.kinds import Cache, Param, RngState, stream_value
from mutatis.model.modules import Module
from mutatis.model.surgery import modules
from mutatis.nn.caches import KVCache
from mutatis.nn.dot_product import dot_product_attention, fitting, turned
from mutatis.nn.layer_norms import LayerNorm
from mutatis.nn.layers import NO_METADATA, Metadata, PromoteDtype, first_said, misfit, promote_dtype
from mutatis.nn.linear import LinearGeneral, default_kernel_init
from mutatis.nn.masks import combine_masks
from mutatis.nn.positions import RoPE
from mutatis.nn.stacked import made_for_each
from mutatis.random import Rngs, stream_of


class MultiHeadAttention(Module):
    """Attention of several heads, as in a transformer. Called with one input, it is self-attention.

    Each head projects the inputs to queries, keys and values. A last projection joins the heads.

    To generate text, call `init_cache` once and then the layer with ``decode=True``. The input is the next token, or the next
    several. The cache keeps the keys and values of all tokens, and each token sees those before it.

    Args:
      num_heads: the number of heads.
      in_features: the size of the last axis of the input of the queries.
      qkv_features: the number of features of all heads together. None takes `in_features`.
      out_features: the size of the last axis of the output. None takes `in_features`.
      num_kv_heads: the number of heads of keys and values, of which each serves several query heads (grouped-query attention).
        None takes `num_heads`.
      in_kv_features: the size of the last axis of the inputs of keys and values. None takes `in_features`.
      dtype: the dtype of the computation and of the output. None takes the common dtype of the input and the parameters.
      param_dtype: the dtype of the parameters.
      broadcast_dropout: whether all elements of a batch and all heads drop the same attention weights.
      dropout_rate: the probability that an attention weight is set to zero, in [0, 1).
      deterministic: whether to drop nothing, unless the call says so. None follows `model.train()` and `model.eval()`.
      precision: the precision of the products, as in `jax.lax.dot_general`.
      kernel_init, bias_init: the initializers of kernels and biases, as those of `jax.nn.initializers`.
      out_kernel_init, out_bias_init: those of the last projection. None takes `kernel_init` and `bias_init`.
      use_bias: whether the projections have biases.
      attention_fn: `dot_product_attention`, or a function with its arguments.
      decode: whether to read from and write to the cache, unless the call says so. None means False.
      normalize_qk: whether to normalize queries and keys, each head by itself.
      qkv_promote_dtype, out_promote_dtype, ln_promote_dtype: functions that bring arrays to one dtype, in the projections of the
        inputs, in the last one, and in the normalizations.
      qkv_dot_general, out_dot_general, qkv_dot_general_cls, out_dot_general_cls: as in `LinearGeneral`.
      rngs: random streams; the parameters are drawn from `params`, and a stream is forked from `dropout` if weights will be
        dropped.
      keep_rngs: whether the layer has a stream of its own for dropout. If False, each call brings one.
      kernel_metadata, out_kernel_metadata, bias_metadata, out_bias_metadata, query_ln_scale_metadata, key_ln_scale_metadata:
        metadata of the parameters, such as ``{"sharding": (None, "heads")}``. None for the last projection takes that of the
        others.
      rope: a `RoPE`, which rotates queries and keys by their positions before they are cached.

    Attributes:
      query, key, value: `LinearGeneral` from the inputs to (heads, features).
      query_ln, key_ln: `LayerNorm`, or None.
      out: `LinearGeneral` from (heads, features) to the output.
      stream: RngState, or None.
      cache: `KVCache`, or None before `init_cache`.

    Raises:
      ArgumentError: the number of heads does not divide the number of features, or the number of key heads that of query heads.
      RandomStreamError: there is no stream to draw from.

    Source:
      Vaswani et al., Attention is all you need, 2017, https://arxiv.org/abs/1706.03762;
      Ainslie et al., GQA: Training Generalized Multi-Query Transformer Models, 2023, https://arxiv.org/abs/2305.13245

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> layer = mu.nn.MultiHeadAttention(num_heads=4, in_features=16, rngs=mu.Rngs(0))
      >>> x = jnp.ones((2, 6, 16))  # 2 sequences of 6 tokens
      >>> layer(x, is_causal=True).shape
      (2, 6, 16)
      >>> layer.init_cache((2, 32, 16))
      >>> _ = layer(x, decode=True)  # the prompt
      >>> layer(x[:, :1], decode=True).shape, int(layer.cache.index)  # one further token
      ((2, 1, 16), 7)
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        num_kv_heads: int | None = None,
        in_kv_features: int | None = None,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        broadcast_dropout: bool = True,
        dropout_rate: float = 0.0,
        deterministic: bool | None = None,
        precision: lax.PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        out_kernel_init: Initializer | None = None,
        bias_init: Initializer = zeros,
        out_bias_init: Initializer | None = None,
        use_bias: bool = True,
        attention_fn: Callable[..., jax.Array] = dot_product_attention,
        decode: bool | None = None,
        normalize_qk: bool = False,
        qkv_promote_dtype: PromoteDtype = promote_dtype,
        out_promote_dtype: PromoteDtype = promote_dtype,
        ln_promote_dtype: PromoteDtype = promote_dtype,
        qkv_dot_general: Callable[..., jax.Array] | None = None,
        out_dot_general: Callable[..., jax.Array] | None = None,
        qkv_dot_general_cls: Any = None,
        out_dot_general_cls: Any = None,
        rngs: Rngs,
        keep_rngs: bool = True,
        kernel_metadata: Metadata = NO_METADATA,
        out_kernel_metadata: Metadata | None = None,
        bias_metadata: Metadata = NO_METADATA,
        out_bias_metadata: Metadata | None = None,
        query_ln_scale_metadata: Metadata = NO_METADATA,
        key_ln_scale_metadata: Metadata = NO_METADATA,
        rope: RoPE | None = None,
    ) -> None:
        self.num_heads = num_heads
        self.in_features = in_features
        self.qkv_features = in_features if qkv_features is None else qkv_features
        self.out_features = in_features if out_features is None else out_features
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.in_kv_features = in_features if in_kv_features is None else in_kv_features
        _check_division("qkv_features", self.qkv_features, "num_heads", num_heads)
        _check_division("num_heads", num_heads, "num_kv_heads", self.num_kv_heads)
        self.head_dim = self.qkv_features // num_heads
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.broadcast_dropout = broadcast_dropout
        self.dropout_rate = dropout_rate
        self.deterministic = deterministic
        self.precision = precision
        self.attention_fn = attention_fn
        self.decode = decode
        projection = functools.partial(
            LinearGeneral, use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, precision=precision, rngs=rngs
        )
        inner = functools.partial(
            projection,
            kernel_init=kernel_init,
            bias_init=bias_init,
            promote_dtype=qkv_promote_dtype,
            dot_general=qkv_dot_general,
            dot_general_cls=qkv_dot_general_cls,
            kernel_metadata=kernel_metadata,
            bias_metadata=bias_metadata,
        )
        self.query = inner(in_features, (num_heads, self.head_dim))
        self.key = inner(self.in_kv_features, (self.num_kv_heads, self.head_dim))
        self.value = inner(self.in_kv_features, (self.num_kv_heads, self.head_dim))
        self.query_ln = self.key_ln = None
        if normalize_qk:
            norm = functools.partial(
                LayerNorm,
                self.head_dim,
                use_bias=False,
                dtype=dtype,
                param_dtype=param_dtype,
                promote_dtype=ln_promote_dtype,
                rngs=rngs,
            )
            self.query_ln = norm(scale_metadata=query_ln_scale_metadata)
            self.key_ln = norm(scale_metadata=key_ln_scale_metadata)
        self.out = projection(
            (num_heads, self.head_dim),
            self.out_features,
            axis=(-2, -1),
            kernel_init=kernel_init if out_kernel_init is None else out_kernel_init,
            bias_init=bias_init if out_bias_init is None else out_bias_init,
            promote_dtype=out_promote_dtype,
            dot_general=out_dot_general,
            dot_general_cls=out_dot_general_cls,
            kernel_metadata=out_kernel_metadata or kernel_metadata,
            bias_metadata=out_bias_metadata or bias_metadata,
        )
        self.stream = None
        if keep_rngs and dropout_rate > 0:
            key = stream_of(rngs, "dropout", "`nn.MultiHeadAttention`").draw()
            self.stream = RngState(stream_value(key), tag="dropout")
        self.rope = rope
        self.cache: KVCache | None = None

    def __call__(
        self,
        inputs_q: ArrayLike,
        inputs_k: ArrayLike | None = None,
        inputs_v: ArrayLike | None = None,
        *,
        mask: ArrayLike | None = None,
        deterministic: bool | None = None,
        rngs: Rngs | None = None,
        sow_weights: bool = False,
        decode: bool | None = None,
        is_causal: bool = False,
        out_sharding: Any = None,
        qkv_sharding: Any = None,
        input_positions: ArrayLike | None = None,
        lengths: ArrayLike | None = None,
    ) -> jax.Array:
        """Compute the attention of queries to keys and values.

        Args:
          inputs_q: the input of the queries, an array of floats of shape (*batch, queries, in_features).
          inputs_k: the input of the keys, of shape (*batch, keys, in_kv_features). None takes `inputs_q`.
          inputs_v: the input of the values, of shape (*batch, keys, in_kv_features). None takes `inputs_k`.
          mask: booleans that broadcast to (*batch, heads, queries, keys): whether a query sees a key. With a cache, the keys are
            the places of the cache.
          deterministic: whether to drop nothing; overrides the setting of the layer.
          rngs: random streams to draw from in place of the layer's own.
          sow_weights: whether to keep the attention weights, as the Intermediate `attention_weights` of the layer.
          decode: whether to read from and write to the cache; overrides the setting of the layer.
          is_causal: whether a query sees only the keys up to its own place. With a cache this is always so.
          out_sharding, qkv_sharding: the shardings of the output and of the projected inputs, on a mesh whose axes are explicit.
          input_positions: integers of shape (*batch, length), the positions for `rope` or `attention_fn`. None counts from 0, or
            from the end of the cache.
          lengths: for a ragged cache: the number of tokens that count in each row, integers of the shape of the batch.

        Returns:
          An array of shape (*batch, queries, out_features).

        Raises:
          ArgumentError: an input or the mask has another shape; the cache is full; there are values without keys, or positions
            without a `rope`.
          RandomStreamError: there is no stream to draw from.
          StructureError: the call is to decode, and there is no cache.
        """
        query, key, value = self._project(inputs_q, inputs_k, inputs_v, qkv_sharding)
        cache = self._cache() if first_said(decode, self.decode, False) else None
        if cache is not None:
            mask = self._cache_mask(mask, query, key, cache)  # before anything is written
        if input_positions is not None and self.rope is None and self.attention_fn is dot_product_attention:
            raise ArgumentError(
                f"layer {naming.describe(self)} was given positions, and has nothing that takes them",
                path="input_positions",
                where=naming.where(),
                expected="None, or a layer with `rope`",
                got=f"positions of shape {jnp.shape(input_positions)}",
                cure="`nn.MultiHeadAttention(..., rope=nn.RoPE(), rngs=rngs)`; other positions are added to the inputs.",
            )
        options = {} if input_positions is None or self.rope is not None else {"input_positions": input_positions}
        if self.rope is not None:
            if cache is not None and input_positions is None:
                input_positions = cache.next_positions(query.shape[-3])
            query, key = (turned(self.rope, x, input_positions) for x in (query, key))
        if cache is not None:
            key, value, written = cache.update(key, value, lengths)
            mask = combine_masks(mask, written, dtype=bool)
        elif lengths is not None:
            raise ArgumentError(
                f"layer {naming.describe(self)} was given lengths, and does not decode",
                path="lengths",
                where=naming.where(),
                expected="None, or a call with `decode=True`",
                got=f"lengths of shape {jnp.shape(lengths)}",
                cure="`layer(x, decode=True, lengths=lengths)`; without a cache a mask hides padding: "
                "`nn.make_attention_mask(tokens > 0, tokens > 0)`.",
            )
        dropout_key = self._dropout_key(deterministic, rngs)
        x = self.attention_fn(
            query,
            key,
            value,
            mask=mask,
            dropout_rng=dropout_key,
            dropout_rate=0.0 if dropout_key is None else self.dropout_rate,
            broadcast_dropout=self.broadcast_dropout,
            deterministic=dropout_key is None,
            dtype=self.dtype,
            precision=self.precision,
            module=self if sow_weights else None,
            is_causal=is_causal and cache is None,
            **options,
        )
        return self.out(x, out_sharding=out_sharding)

    def init_cache(
        self,
        input_shape: Sequence[int],
        dtype: DTypeLike = jnp.float32,
        *,
        window: int | None = None,
        ragged: bool = False,
    ) -> None:
        """Make an empty cache for decoding; of layers that are stacked, as in an `nn.Stack`, one for each.

        Args:
          input_shape: the shape of the largest input that the cache has to hold, (*batch, max_length, in_features).
          dtype: the dtype in which keys and values are kept.
          window: the number of tokens that a query sees, itself included; the cache then overwrites older ones and never gets
            full. None means all tokens.
          ragged: whether each row of the batch has its own length.

        Raises:
          ArgumentError: the cache is too short for the window.
        """
        *batch, length, _ = input_shape
        heads, features = self.num_kv_heads, self.head_dim

        def make() -> KVCache:
            return KVCache(batch, length, heads, features, dtype=dtype, window=window, ragged=ragged)

        inside = modules(self, LinearGeneral).values()  # a projection may be wrapped, as by an adapter, or replaced
        kernels = [(linear.kernel, len(linear.axis) + len(linear.out_features)) for linear in inside]
        self.cache = made_for_each(make, *kernels[0]) if kernels else make()

    @property
    def cached_key(self) -> Cache[jax.Array] | None:
        """The state of the keys in the cache; None without one."""
        return None if self.cache is None else self.cache.key

    @property
    def cached_value(self) -> Cache[jax.Array] | None:
        """The state of the values in the cache; None without one."""
        return None if self.cache is None else self.cache.value

    @property
    def cache_index(self) -> Cache[jax.Array] | None:
        """The state of the number of tokens in the cache; None without one."""
        return None if self.cache is None else self.cache.index

    def _project(self, inputs_q: Any, inputs_k: Any, inputs_v: Any, sharding: Any) -> tuple[jax.Array, ...]:
        if inputs_k is None and inputs_v is not None:
            raise ArgumentError(
                "attention was given values and no keys to find them by",
                path="inputs_k",
                where=naming.where(),
                expected="an array of keys",
                got="None",
                cure="`layer(queries, inputs)` takes keys and values from the same inputs.",
            )
        inputs_q = jnp.asarray(inputs_q)
        if inputs_q.ndim < 2:
            raise misfit(
                self._owner(),
                expected=f"an array of shape (*batch, length, {self.in_features})",
                got=f"an input of shape {inputs_q.shape}",
                cure="One vector is a sequence of length 1: `x[None]`.",
            )
        inputs_k = inputs_q if inputs_k is None else inputs_k
        inputs_v = inputs_k if inputs_v is None else inputs_v
        query = self.query(inputs_q, out_sharding=sharding)
        key = self.key(inputs_k, out_sharding=sharding)
        value = self.value(inputs_v, out_sharding=sharding)
        if self.query_ln is not None and self.key_ln is not None:
            query, key = self.query_ln(query), self.key_ln(key)
        return query, key, value

    def _owner(self) -> Param | Module:
        """A state of the layer, by which messages name it; itself, if its projection is wrapped or replaced."""
        query: Any = self.query
        return query.kernel if isinstance(query, LinearGeneral) else self

    def _cache(self) -> KVCache:
        if self.cache is None:
            raise StructureError(
                f"layer {naming.describe(self)} has no cache to decode with",
                path=naming.path_of(self),
                where=naming.where(),
                expected="a cache, made before",
                got="None",
                cure="`layer.init_cache((batch, max_length, features))` makes one.",
            )
        return self.cache

    def _cache_mask(self, mask: ArrayLike | None, query: jax.Array, key: jax.Array, cache: KVCache) -> jax.Array | None:
        """A mask over the places of a cache.

        Raises:
          ArgumentError: it does not fit them, or the keys are those of other tokens than the queries.
        """
        if query.shape[:-2] != key.shape[:-2]:
            raise misfit(
                self._owner(),
                expected="queries and keys of the same tokens, to add these to the cache",
                got=f"{query.shape[-3]} queries and {key.shape[-3]} keys",
                cure="Attention to another sequence has no cache to decode with: `layer(x, others, decode=False)`.",
            )
        if mask is None:
            return None
        batch, count = key.shape[:-3], query.shape[-3]
        return fitting("mask", mask, (*batch, self.num_heads, count, cache.places(count)))

    def _dropout_key(self, deterministic: bool | None, rngs: Rngs | None) -> jax.Array | None:
        """The key to drop weights with; None if none are dropped."""
        if self.dropout_rate == 0 or first_said(deterministic, self.deterministic, not self.training):
            return None
        if rngs is not None:
            return stream_of(rngs, "dropout", "`nn.MultiHeadAttention`").draw()
        if self.stream is None:
            raise RandomStreamError(
                "`nn.MultiHeadAttention` has no random stream `dropout` to draw from",
                path="dropout",
                where=naming.where(),
                cure="Give it one in the call, `layer(x, rngs=rngs)`, or make the layer with `keep_rngs=True`; to drop nothing, "
                "call `model.eval()`.",
            )
        return self.stream.draw()


def _check_division(name: str, number: int, by: str, divisor: int) -> None:
    if divisor <= 0 or number % divisor:
        raise ArgumentError(
            f"`{name}` of `nn.MultiHeadAttention` does not divide by `{by}`",
            path=name,
            expected=f"a multiple of {by}={divisor}" if divisor > 0 else f"{by} from 1",
            got=repr(number),
            cure="`nn.MultiHeadAttention(num_heads=8, in_features=512, num_kv_heads=2, rngs=rngs)`",
        )
