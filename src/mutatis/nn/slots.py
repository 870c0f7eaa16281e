"""`SlotCache`: the rows of a model's caches as slots that requests come to and leave, all served by one step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from mutatis.core import naming
from mutatis.errors import ArgumentError
from mutatis.model.kinds import Cache, RngState, stream_value
from mutatis.model.modules import Module
from mutatis.nn.caches import KVCache, known_numbers, kv_caches, put, stacked_shape
from mutatis.random import Rngs, as_key, stream_of


class SlotCache(Module):
    """The key-value caches of all layers of a model as slots for requests, with a random stream for each slot.

    A server uses it to generate text for many requests in one batch (continuous batching). A slot is a row of the batch:
    `insert` puts a new request into it while the others go on, and `evict` empties it. Slots do not influence each other: each
    has its own length and draws from its own stream. The number of a slot may be a traced value, so one compiled program serves
    all slots.

    Args:
      model: a model with ragged caches (``init_cache(..., ragged=True)``), or these caches themselves. Its layers may be in a
        list or in an `nn.Stack`.
      rngs: random streams; the streams of the slots are split from the stream `default`.

    Attributes:
      caches: the `KVCache`s of the model, in the order of its layers; one for all layers of an `nn.Stack`.
      slots: the number of slots, an int.
      active: Cache, booleans of shape (slots,): whether there is a request in a slot.
      stream: RngState, a stream for each slot.

    Raises:
      ArgumentError: there are no caches, or they are not ragged ones with one batch axis of one size.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> model = mu.nn.MultiHeadAttention(2, 8, decode=True, rngs=mu.Rngs(0))
      >>> model.init_cache((1, 16, 8))
      >>> _ = model(jnp.ones((1, 3, 8)))  # a prompt of 3 tokens
      >>> request = mu.clone(model.cache)
      >>> model.init_cache((4, 16, 8), ragged=True)
      >>> slots = mu.nn.SlotCache(model, rngs=mu.Rngs(0))
      >>> slots.insert(2, request, seed=7)
      >>> slots.lengths.tolist(), slots.active.value.tolist()
      ([0, 0, 3, 0], [False, False, True, False])
      >>> _ = model(jnp.ones((4, 1, 8)), lengths=slots.steps())  # one step for all active slots
      >>> slots.lengths.tolist()
      [0, 0, 4, 0]
    """

    def __init__(self, model: Any, *, rngs: Rngs) -> None:
        self.caches = kv_caches(model)
        sizes = {cache.batch_shape for cache in self.caches if cache.ragged}
        if not self.caches or len(sizes) != 1 or not all(c.ragged and len(c.batch_shape) == 1 for c in self.caches):
            raise ArgumentError(
                "`nn.SlotCache` needs caches whose rows have lengths of their own",
                path="model",
                expected="ragged caches of one batch axis, of one size",
                got=", ".join(f"batch {cache.batch_shape}, ragged={cache.ragged}" for cache in self.caches)
                or "no caches",
                cure="`layer.init_cache((slots, max_length, features), ragged=True)`",
            )
        ((self.slots,),) = sizes
        self.active = Cache(jnp.zeros(self.slots, bool), init=jnp.zeros(self.slots, bool))
        key = stream_of(rngs, "default", "`nn.SlotCache`").draw()
        self.stream = RngState(stream_value(jax.random.split(key, self.slots)), tag="slots")

    @property
    def lengths(self) -> jax.Array:
        """The number of tokens in each slot: int32 of shape (slots,)."""
        return self.caches[0].index.value.reshape(-1, self.slots)[0]  # all layers have read the same tokens

    def steps(self) -> jax.Array:
        """The `lengths` of one decoding step: int32 of shape (slots,), 1 for each slot with a request, else 0."""
        return self.active.value.astype(jnp.int32)

    def insert(self, slot: ArrayLike, request: Any, row: ArrayLike = 0, *, seed: ArrayLike | None = None) -> None:
        """Put a request into a slot, in place of its present content.

        Args:
          slot: the number of the slot, an int or an integer scalar.
          request: a model of the same layers that has read the prompt, or its caches; one for each cache of the slots.
          row: the row of the batch of `request` to take.
          seed: a seed or a random key from which the stream of the slot starts. None lets the stream go on.

        Raises:
          ArgumentError: there is no such slot or row, or the caches do not fit.
        """
        sources = kv_caches(request)
        self._check(slot, sources)
        if jnp.ndim(slot):
            raise ArgumentError(
                "a request goes into one slot",
                path="slot",
                where=naming.where(),
                expected="an int or an integer scalar",
                got=f"an array of shape {jnp.shape(slot)}",
                cure="Insert requests one by one: `slots.insert(slot, request, row=0)`.",
            )
        _check_number(
            "row", row, min(source.batch_shape[0] for source in sources), "`slots.insert(slot, request, row=0)`"
        )
        for target, source in zip(self.caches, sources, strict=True):
            length = source.index.value[..., row] if source.ragged else source.index.value
            target.index.value = target.index.value.at[..., slot].set(length)
            if target.positions is not None and source.positions is not None:
                stored = source.positions.value
                _insert_ring(target, slot, source, row, stored[..., row, :] if source.ragged else stored, length)
                continue
            for into, part in ((target.key, source.key), (target.value, source.value)):
                taken = lax.dynamic_index_in_dim(part.value, row, -4, keepdims=False).astype(into.dtype)
                rest = [(0, 0)] * (taken.ndim - 3) + [(0, target.max_length - source.max_length), (0, 0), (0, 0)]
                # The whole row: what an earlier request has left there may be NaN.
                into.value = into.value.at[..., slot, :, :, :].set(jnp.pad(taken, rest))
        self.active.value = self.active.value.at[slot].set(True)
        if seed is not None:
            self.reseed(slot, seed)

    def evict(self, slot: ArrayLike) -> None:
        """Empty a slot.

        Args:
          slot: the number of the slot, or an array of several numbers.

        Raises:
          ArgumentError: there is no such slot.
        """
        self._check(slot)
        slot = jnp.asarray(slot)
        for cache in self.caches:
            for cell in (cache.key, cache.value):
                cell.value = cell.value.at[..., slot, :, :, :].set(0)
            cache.index.value = cache.index.value.at[..., slot].set(0)
            if cache.positions is not None:
                cache.positions.value = cache.positions.value.at[..., slot, :].set(-1)
        self.active.value = self.active.value.at[slot].set(False)

    def share(self, source: ArrayLike, target: ArrayLike, length: ArrayLike | None = None) -> None:
        """Copy the first tokens of a slot into another, which is then active.

        So a model reads a prompt that many requests begin with only once.

        Args:
          source: the number of the slot to copy from.
          target: the number of the slot to copy into.
          length: the number of tokens to copy, at most. None copies all.

        Raises:
          ArgumentError: there is no such slot, the length is negative, or tokens in the window of a cache are no longer kept.
        """
        self._check(source)
        self._check(target)
        source, target = jnp.asarray(source), jnp.asarray(target)
        if length is not None:
            _check_number("length", length, None, "`slots.share(0, 1, length=16)`")
        ends = [cache.index.value[..., source] for cache in self.caches]
        ends = ends if length is None else [jnp.minimum(end, length) for end in ends]
        rings = [cache.kept_before(source, end) for cache, end in zip(self.caches, ends, strict=True)]  # all, or none
        for cache, end, kept in zip(self.caches, ends, rings, strict=True):
            cache.index.value = cache.index.value.at[..., target].set(end)
            if cache.positions is not None:
                cache.positions.value = cache.positions.value.at[..., target, :].set(kept)
            for cell in (cache.key, cache.value):
                cell.value = cell.value.at[..., target, :, :, :].set(cell.value[..., source, :, :, :])
        self.active.value = self.active.value.at[target].set(True)

    def reorder(self, rows: ArrayLike, *, streams: bool = False) -> None:
        """Replace each slot by a copy of some slot, as beam search does.

        Args:
          rows: for each slot the number of the slot to copy; integers of shape (slots,).
          streams: whether the random streams are copied, too. Then copies of one slot draw the same numbers, which beams should
            not.

        Raises:
          ArgumentError: there are more or fewer numbers.
        """
        for cache in self.caches:
            cache.reorder(rows)
        self.active.value = jnp.take(self.active.value, jnp.asarray(rows))
        if streams:
            self.stream.set(jax.tree.map(lambda x: x[jnp.asarray(rows)], self.stream.get()))

    def truncate(self, length: ArrayLike) -> None:
        """Take back the last tokens, so that a length remains; slots that are shorter stay as they are.

        Args:
          length: the number of tokens that remain: an int for all slots, or integers of shape (slots,).

        Raises:
          ArgumentError: the length is negative or of another shape, or tokens in the window of a cache are no longer kept.
        """
        for cache in self.caches:
            cache.truncate(length)

    def reseed(self, slot: ArrayLike, seed: ArrayLike) -> None:
        """Start the random stream of a slot anew.

        Args:
          slot: the number of the slot.
          seed: a seed or a random key.

        Raises:
          ArgumentError: there is no such slot.
        """
        self._check(slot)
        slot = jnp.asarray(slot)
        old = self.stream.get()
        key = as_key(seed, "slots")
        self.stream.set({"key": old["key"].at[slot].set(key), "count": old["count"].at[slot].set(0)})

    def keys(self) -> jax.Array:
        """Draw a random key from the stream of each slot.

        Returns:
          An array of keys of shape (slots,).
        """
        old = self.stream.get()
        self.stream.set({"key": old["key"], "count": old["count"] + jnp.uint32(1)})
        return jax.vmap(jax.random.fold_in)(old["key"], old["count"])

    def _check(self, slot: ArrayLike, sources: Sequence[KVCache] | None = None) -> None:
        _check_number("slot", slot, self.slots, "`slots.active.value` says which slots are free.")
        if sources is None:
            return
        if len(self.caches) != len(sources) or not all(map(_fits, self.caches, sources)):
            raise ArgumentError(
                "the request's caches do not fit into the slots",
                path="request",
                where=naming.where(),
                expected=f"{len(self.caches)} caches of at most these sizes: {_sizes(self.caches)}",
                got=f"{len(sources)} caches: {_sizes(sources)}",
                cure="Read the request with the same model: `model.init_cache(...)` with at most as many places.",
            )


def _check_number(name: str, number: ArrayLike, below: int | None, cure: str) -> None:
    """Refuse what is no number from 0, as far as it is known.

    Raises:
      ArgumentError: it is not.
    """
    numbers = known_numbers(number)
    whole = jnp.issubdtype(jnp.result_type(number) if numbers is None else numbers.dtype, jnp.integer)
    if whole and (numbers is None or np.all((numbers >= 0) & (below is None or numbers < below))):
        return
    raise ArgumentError(
        f"there is no {name} {number}",
        path=name,
        where=naming.where(),
        expected="an integer from 0" + ("" if below is None else f" to {below - 1}"),
        got=repr(number),
        cure=cure,
    )


def _insert_ring(
    target: KVCache, slot: ArrayLike, source: KVCache, row: ArrayLike, positions: jax.Array, length: jax.Array
) -> None:
    """Put what a ring holds into a row of another, which may be longer or shorter."""
    if target.positions is None:
        return
    fits = (positions >= 0) & (positions >= length[..., None] - target.max_length)
    layers = stacked_shape(target)
    places = jnp.where(fits, positions % target.max_length, target.max_length)
    for into, part in ((target.key, source.key), (target.value, source.value)):
        taken = lax.dynamic_index_in_dim(part.value, row, -4, keepdims=False).astype(into.dtype)
        empty = jnp.zeros((*layers, *into.shape[-3:]), into.dtype)
        into.value = into.value.at[..., slot, :, :, :].set(put(empty, taken, places))
    stored = put(jnp.full((*layers, target.max_length), -1, jnp.int32), positions, places)
    target.positions.value = target.positions.value.at[..., slot, :].set(stored)


def _fits(target: KVCache, source: KVCache) -> bool:
    """Whether a row of a cache can hold what is in a row of another."""
    same = target.key.shape[-2:] == source.key.shape[-2:] and target.window == source.window
    same = same and len(source.batch_shape) == 1 and stacked_shape(target) == stacked_shape(source)
    return same and (target.window is not None or target.max_length >= source.max_length)


def _sizes(caches: Sequence[KVCache]) -> str:
    sizes = [
        f"{cache.max_length} places, {cache.key.shape[-2]} heads of {cache.key.shape[-1]} features"
        + (f", window {cache.window}" if cache.window is not None else "")
        + "".join(f", stacked for {size} layers" for size in stacked_shape(cache))
        for cache in caches
    ]
    return "; ".join(dict.fromkeys(sizes))
