"""`SlotCache`: the rows of a model's caches as slots that requests come to and leave, all served by one step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from mutatis.core import naming
from mutatis.errors import ArgumentError
from mutatis.model.kinds import Cache, RngState, stream_value
from mutatis.model.modules import Module
from mutatis.nn.caches import KVCache, kv_caches
from mutatis.random import Rngs, as_key, stream_of


class SlotCache(Module):
    """The caches of all layers of a model, taken together, and a random stream for each row.

    A slot is a row of the batch. Its number may be known only when the program runs, so one compiled program inserts into any
    slot. What is in one slot has no influence on another: each has its own length, and draws from its own stream.

    Args:
      model: a model with ragged caches (`init_cache(..., ragged=True)`), or these themselves.
      rngs: random streams, from whose `default` the streams of the slots are split.

    Attributes:
      caches: the caches of the model, in the order of its layers.
      active: Cache, booleans of shape (slots,): whether there is a request.
      stream: RngState, a stream for each slot.

    Raises:
      ArgumentError: there are no caches, or they are not ragged ones of one batch axis.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> model = mu.nn.MultiHeadAttention(2, 8, decode=True, rngs=mu.Rngs(0))
      >>> model.init_cache((1, 16, 8))
      >>> _ = model(jnp.ones((1, 3, 8)))
      >>> request = mu.clone(model.cache)  # a prompt that was read
      >>> model.init_cache((4, 16, 8), ragged=True)
      >>> slots = mu.nn.SlotCache(model, rngs=mu.Rngs(0))
      >>> slots.insert(2, request, seed=7)
      >>> slots.lengths.tolist(), slots.active.value.tolist()
      ([0, 0, 3, 0], [False, False, True, False])
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
        """How many tokens there are in each slot, of shape (slots,)."""
        return self.caches[0].index.value

    def steps(self) -> jax.Array:
        """1 for each slot with a request, else 0: the `lengths` of one step for all of them."""
        return self.active.value.astype(jnp.int32)

    def insert(self, slot: ArrayLike, request: Any, row: ArrayLike = 0, *, seed: ArrayLike | None = None) -> None:
        """Put a request into a slot, whatever was there.

        Args:
          slot: the number of the slot.
          request: a model, or caches, that have read the request; of as many layers.
          row: which row of these.
          seed: a seed or key to start the slot's stream with; None lets it go on.

        Raises:
          ArgumentError: there is no such slot, or the caches do not fit.
        """
        sources = kv_caches(request)
        self._check(slot, sources)
        for target, source in zip(self.caches, sources, strict=True):
            length = source.index.value[row] if source.ragged else source.index.value
            target.index.value = target.index.value.at[slot].set(length)
            for into, part in ((target.key, source.key), (target.value, source.value)):
                taken = lax.dynamic_index_in_dim(part.value, row, keepdims=True).astype(into.dtype)
                into.value = lax.dynamic_update_slice(into.value, taken, (slot, 0, 0, 0))
        self.active.value = self.active.value.at[slot].set(True)
        if seed is not None:
            self.reseed(slot, seed)

    def evict(self, slot: ArrayLike) -> None:
        """Empty a slot.

        Args:
          slot: the number of the slot, or an array of several.

        Raises:
          ArgumentError: there is no such slot.
        """
        self._check(slot)
        for cache in self.caches:
            cache.index.value = cache.index.value.at[slot].set(0)
        self.active.value = self.active.value.at[slot].set(False)

    def share(self, source: ArrayLike, target: ArrayLike, length: ArrayLike | None = None) -> None:
        """Copy the beginning of a slot into another, which is then active: a prompt that many begin with is read once.

        Args:
          source: the number of the slot to copy from.
          target: that of the slot to copy into.
          length: how many tokens at most; None is for all.

        Raises:
          ArgumentError: there is no such slot.
        """
        self._check(source)
        self._check(target)
        for cache in self.caches:
            there = cache.index.value[source]
            cache.index.value = cache.index.value.at[target].set(
                there if length is None else jnp.minimum(there, length)
            )
            for cell in (cache.key, cache.value):
                cell.value = cell.value.at[target].set(cell.value[source])
        self.active.value = self.active.value.at[target].set(True)

    def reorder(self, rows: ArrayLike, *, streams: bool = False) -> None:
        """Let each slot go on from a slot.

        Args:
          rows: for each slot the number of the one that it goes on from.
          streams: whether the streams go with them; beams that go on from one slot should not draw alike.

        Raises:
          ArgumentError: there are more or fewer numbers.
        """
        for cache in self.caches:
            cache.reorder(rows)
        self.active.value = jnp.take(self.active.value, jnp.asarray(rows))
        if streams:
            self.stream.set(jax.tree.map(lambda x: x[jnp.asarray(rows)], self.stream.get()))

    def truncate(self, length: ArrayLike) -> None:
        """Roll back to a length, one for all slots or one for each.

        Raises:
          ArgumentError: the length is negative or of another shape.
        """
        for cache in self.caches:
            cache.truncate(length)

    def reseed(self, slot: ArrayLike, seed: ArrayLike) -> None:
        """Start the stream of a slot anew.

        Args:
          slot: the number of the slot.
          seed: a seed or key.

        Raises:
          ArgumentError: there is no such slot.
        """
        self._check(slot)
        old = self.stream.get()
        key = as_key(seed, "slots")
        self.stream.set({"key": old["key"].at[slot].set(key), "count": old["count"].at[slot].set(0)})

    def keys(self) -> jax.Array:
        """A fresh key from the stream of each slot, of shape (slots,)."""
        old = self.stream.get()
        self.stream.set({"key": old["key"], "count": old["count"] + jnp.uint32(1)})
        return jax.vmap(jax.random.fold_in)(old["key"], old["count"])

    def _check(self, slot: ArrayLike, sources: Sequence[KVCache] | None = None) -> None:
        known = not isinstance(slot, jax.core.Tracer)
        if known and not bool(jnp.all((jnp.asarray(slot) >= 0) & (jnp.asarray(slot) < self.slots))):
            raise ArgumentError(
                f"there is no slot {slot}",
                path="slot",
                where=naming.where(),
                expected=f"a number from 0 to {self.slots - 1}",
                got=repr(slot),
                cure="`slots.active.value` says which slots are free.",
            )
        if sources is None:
            return
        ours, theirs = ([cache.key.shape[-3:] for cache in caches] for caches in (self.caches, sources))
        rings = any(cache.window is not None for cache in [*self.caches, *sources])
        fits = len(ours) == len(theirs) and all(
            a[0] >= b[0] and a[1:] == b[1:] for a, b in zip(ours, theirs, strict=True)
        )
        if not fits or rings:
            raise ArgumentError(
                "the request's caches do not fit into the slots",
                path="request",
                where=naming.where(),
                expected=f"{len(ours)} caches without a window, of at most these (max_length, heads, features): {ours[:3]}",
                got=f"{len(theirs)} caches: {theirs[:3]}{', with a window' if rings else ''}",
                cure="Read the request with the same model: `model.init_cache(...)` with at most as many places.",
            )
