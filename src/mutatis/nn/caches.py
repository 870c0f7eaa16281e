"""`KVCache`: the keys and values of the tokens so far, so that attention reads each token once.

The arrays are made once, as large as they will ever be, and written in place, so one compiled step serves every length. A
mask lets each query see the tokens up to its own. The number of tokens is a state, one for all rows of a batch or (`ragged`) one
for each row. With a `window` the array is a ring: a token takes the place of the oldest one, and its position is kept beside it.

Axes are counted from the end. So the caches of an `nn.Stack`, whose states have one more leading axis, are emptied, rolled back
and reordered from outside as one is.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from mutatis.core import naming
from mutatis.core.avals import is_concrete
from mutatis.core.calls import as_integer
from mutatis.core.showing import show_value
from mutatis.errors import ArgumentError
from mutatis.model.kinds import Cache
from mutatis.model.modules import Module
from mutatis.model.surgery import modules
from mutatis.model.variables import Variable
from mutatis.nn.layers import as_axes, convert


class KVCache(Module):
    """The keys and values of the tokens so far, for one layer of attention.

    `MultiHeadAttention.init_cache` makes one and the layer fills it, so most users only empty it, ``mu.reset(model, mu.Cache)``,
    or take tokens back, `truncate`. `nn.kv_caches(model)` lists the caches of a model.

    Too many tokens are an error wherever that can be known: when more come at once than there are places, and in ordinary code.
    The caches of an `nn.Stack` are one `KVCache`, whose states have a leading axis for the layers. What is called on it from
    outside holds for all layers.

    In a compiled program, tokens beyond the end overwrite the last places (a ragged cache drops them), and `index` goes on
    counting. Compare it with `max_length` where it matters.

    Args:
      batch_shape: the sizes of the batch axes; an int is for one axis.
      max_length: the number of places for tokens. With a `window` it is at least the size of the window, which is then the
        default; with more places, `truncate` can take back more tokens.
      num_heads: the number of heads of keys and values.
      head_dim: the number of features of each head.
      dtype: the dtype in which keys and values are kept.
      window: the number of tokens that a query sees, itself included; older ones are overwritten. None means all tokens.
      ragged: whether each row of the batch has its own length.

    Attributes:
      key: Cache of shape (*batch_shape, max_length, num_heads, head_dim).
      value: Cache of the same shape.
      index: Cache, the number of tokens so far, int32 of shape () or, if `ragged`, of shape batch_shape.
      positions: Cache of shape (*index.shape, max_length), the position of the token in each place, -1 for none; None without a
        window.

    Raises:
      ArgumentError: there is no length, or one that is shorter than the window.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> cache = mu.nn.KVCache(2, max_length=8, num_heads=1, head_dim=4)
      >>> prompt = jnp.ones((2, 3, 1, 4))  # 2 sequences of 3 tokens
      >>> keys, values, mask = cache.update(prompt, prompt)
      >>> keys.shape, int(cache.index)
      ((2, 8, 1, 4), 3)
      >>> mask[0, 0, -1].tolist()  # the places that the last token sees
      [True, True, True, False, False, False, False, False]
      >>> cache.truncate(2)
      >>> int(cache.index)
      2
    """

    def __init__(
        self,
        batch_shape: int | Sequence[int],
        max_length: int | None = None,
        num_heads: int = 1,
        head_dim: int = 1,
        *,
        dtype: DTypeLike = jnp.float32,
        window: int | None = None,
        ragged: bool = False,
    ) -> None:
        shown = 0 if window is None else as_integer(window)
        length = shown if max_length is None else as_integer(max_length)
        if shown is None or (window is not None and shown < 1) or length is None or length < max(shown, 1):
            raise ArgumentError(
                "`nn.KVCache` has no place for the tokens that a query sees",
                path="max_length",
                expected="an int, from 1"
                if window is None
                else "a window from 1, and None or an int from the window on",
                got=f"max_length={show_value(max_length)}, window={show_value(window)}",
                cure="`nn.KVCache(batch, max_length=1024, num_heads=8, head_dim=64)`",
            )
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise ArgumentError(
                "`nn.KVCache` would round keys and values",
                path="dtype",
                expected="a dtype of floats",
                got=str(jnp.dtype(dtype)),
                cure="`dtype=jnp.bfloat16` halves the memory.",
            )
        batch = as_axes(batch_shape)
        self.batch_shape = batch
        self.max_length = length
        self.window = None if window is None else shown
        self.ragged = ragged
        counted = batch if ragged else ()
        self.key = _state((*batch, length, num_heads, head_dim), dtype)
        self.value = _state((*batch, length, num_heads, head_dim), dtype)
        self.index = _state(counted, jnp.int32)
        self.positions = None if window is None else _state((*counted, length), jnp.int32, -1)

    def next_positions(self, count: int) -> jax.Array:
        """The positions of the next tokens: the numbers from `index` on.

        Args:
          count: the number of tokens.

        Returns:
          Integers of shape (*index.shape, count).
        """
        start = self.index.value
        return start[..., None] + jnp.arange(count, dtype=jnp.int32).reshape((1,) * start.ndim + (count,))

    def places(self, count: int) -> int:
        """The number of places that `update` gives to attend to.

        Args:
          count: the number of tokens that come.
        """
        return self.max_length if self.window is None or count == 1 else self.max_length + count

    def update(
        self, key: jax.Array, value: jax.Array, lengths: ArrayLike | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Add the keys and values of one or more tokens, and return all that there are.

        Args:
          key, value: arrays of shape (*batch_shape, count, num_heads, head_dim).
          lengths: for a ragged cache: the number of tokens that count in each row, from the first; integers of shape batch_shape.
            The others are padding. None means all.

        Returns:
          keys, values: arrays of shape (*batch_shape, places, num_heads, head_dim) and the dtype of the input, to attend to.
            There are as many places as in the cache. With a window and several tokens there are `count` more, because the first
            of the new tokens may see old ones that the last overwrite.
          mask: booleans of shape (*batch_shape or ones, 1, count, places): whether a query sees a place.

        Raises:
          ArgumentError: the arrays have another shape, there are lengths for a cache that is not ragged or that are no numbers of
            these tokens, or it is full. Inside compiled programs the numbers are not known.
        """
        key, value = jnp.asarray(key), jnp.asarray(value)
        count = self._check(key, value, lengths)
        positions = self.next_positions(count)
        counts = None if lengths is None else jnp.asarray(lengths, jnp.int32)
        old = self.key.value, self.value.value
        stored = None if self.positions is None else self.positions.value
        if stored is None and counts is None and not self.ragged:
            new = [self._write_slice(array, part) for array, part in zip(old, (key, value), strict=True)]
        else:
            slots = self._slots(positions, counts)
            new = [self._write(array, part, slots) for array, part in zip(old, (key, value), strict=True)]
            if self.positions is not None:
                self.positions.value = put(self.positions.value, positions, slots)
        self.key.value, self.value.value = new
        self.index.value = self.index.value + (jnp.int32(count) if counts is None else counts)
        if stored is None or self.positions is None:
            places = jnp.arange(self.max_length, dtype=jnp.int32)
            seen = places.reshape((1,) * positions.ndim + (-1,)) <= positions[..., None]
        elif count == 1:
            seen = self._in_window(self.positions.value, positions)
        else:
            new = [jnp.concatenate([a, convert(b, a.dtype)], -3) for a, b in zip(old, (key, value), strict=True)]
            known = positions if counts is None else jnp.where(_counted(counts, count), positions, -1)
            seen = self._in_window(jnp.concatenate([stored, known], -1), positions)
        ones = () if self.ragged else (1,) * len(self.batch_shape)
        mask = seen.reshape(*ones, *seen.shape[:-2], 1, *seen.shape[-2:])
        return convert(new[0], key.dtype), convert(new[1], value.dtype), mask

    def reset(self) -> None:
        """Remove all tokens."""
        for cell in (self.index, self.key, self.value):  # also the numbers: hidden ones that are NaN would show
            cell.value = jnp.zeros_like(cell.value)
        if self.positions is not None:
            self.positions.value = jnp.full_like(self.positions.value, -1)

    def truncate(self, length: ArrayLike) -> None:
        """Take back the last tokens, so that a length remains; rows that are shorter stay as they are.

        Args:
          length: the number of tokens that remain: an int for all rows, or for a ragged cache integers of shape batch_shape. An
            array of the shape of `index`, which in an `nn.Stack` has an axis for the layers, always fits.

        Raises:
          ArgumentError: the length is negative or of another shape, or tokens in the window are no longer kept; inside compiled
            programs these are masked.
        """
        given = jnp.asarray(length)
        new = given.astype(jnp.int32)
        before = self.index.value
        shapes = {(), before.shape, self.batch_shape if self.ragged else ()}
        if (
            not jnp.issubdtype(given.dtype, jnp.integer)
            or new.shape not in shapes
            or ((known := known_numbers(length)) is not None and np.any(known < 0))
        ):
            raise self._refusal(
                "cannot be rolled back to this length",
                expected=", or ".join(
                    ["an int from 0", *(f"an array of shape {shape}" for shape in sorted(shapes) if shape)]
                ),
                got=repr(length) if new.shape == () else f"an array of shape {new.shape}",
                cure="`cache.truncate(cache.index - 4)` takes the last four tokens away.",
            )
        index = jnp.minimum(before, jnp.broadcast_to(new, before.shape))
        if self.positions is not None:
            stored = self.positions.value
            kept = jnp.where(stored < index[..., None], stored, -1)
            self._check_window(kept, index)
            self.positions.value = kept
        self.index.value = index

    def reorder(self, rows: ArrayLike) -> None:
        """Replace each row of the batch by a copy of some row, as beam search does.

        Args:
          rows: for each row the number of the row to copy; integers of shape batch_shape.

        Raises:
          ArgumentError: the batch does not have one axis, there are more or fewer numbers, or there is no row of a number; inside
            compiled programs such a row is undefined.
        """
        rows = jnp.asarray(rows)
        fits = rows.shape == self.batch_shape and rows.ndim == 1 and jnp.issubdtype(rows.dtype, jnp.integer)
        if not fits or (_known(rows) and bool(jnp.any((rows < 0) | (rows >= len(rows))))):
            raise self._refusal(
                "cannot be reordered by these numbers",
                expected="one number for each row of a batch of one axis"
                if len(self.batch_shape) != 1
                else f"integers of shape {self.batch_shape}, from 0 to {self.batch_shape[0] - 1}",
                got=str(rows.tolist()) if _known(rows) and rows.size < 16 else f"{rows.dtype}{list(rows.shape)}",
                cure="`cache.reorder(jnp.array([0, 0, 1]))`",
            )
        for cell, after in self._rows():
            cell.value = jnp.take(cell.value, rows, axis=-1 - after)

    def kept_before(self, row: ArrayLike, length: ArrayLike) -> jax.Array | None:
        """The positions that a row of a ragged cache with a window would hold if it were rolled back to a length.

        Args:
          row: the number of the row.
          length: the number of tokens that would remain, an integer, or one for each layer of an `nn.Stack`.

        Returns:
          Integers of shape (max_length,), -1 for places without a token; with a leading axis for the layers of an `nn.Stack`.
          None without a window.

        Raises:
          ArgumentError: tokens in the window are no longer kept.
        """
        if self.positions is None:
            return None
        end = jnp.asarray(length, jnp.int32)
        stored = self.positions.value[..., row, :]
        kept = jnp.where(stored < jnp.broadcast_to(end[..., None], stored.shape), stored, -1)
        self._check_window(kept, end)
        return kept

    def _rows(self) -> list[tuple[Cache[jax.Array], int]]:
        """The states that have the batch axes, and how many axes come after these."""
        counted = [(self.index, 0), (self.positions, 1)] if self.ragged else []
        return [(cell, after) for cell, after in [(self.key, 3), (self.value, 3), *counted] if cell is not None]

    def _slots(self, positions: jax.Array, counts: jax.Array | None) -> jax.Array:
        """The places of new tokens; behind the last place for those that do not count, or that have no place in a ring."""
        total = positions.shape[-1]
        counted = jnp.ones((1,) * positions.ndim, bool) if counts is None else _counted(counts, total)
        if self.window is None:
            return jnp.where(counted, positions, self.max_length)
        end = positions[..., :1] + (total if counts is None else counts[..., None])
        lasts = counted & (positions >= end - self.max_length)
        return jnp.where(lasts, positions % self.max_length, self.max_length)

    def _write_slice(self, array: jax.Array, part: jax.Array) -> jax.Array:
        axis = len(self.batch_shape)
        return lax.dynamic_update_slice_in_dim(array, convert(part, array.dtype), self.index.value, axis)

    def _write(self, array: jax.Array, part: jax.Array, slots: jax.Array) -> jax.Array:
        part = convert(part, array.dtype)
        return put(array, part, slots) if self.ragged else array.at[..., slots, :, :].set(part, mode="drop")

    def _in_window(self, stored: jax.Array, positions: jax.Array) -> jax.Array:
        """Whether a query sees a place, of shape (..., queries, places)."""
        places, queries = stored[..., None, :], positions[..., :, None]
        return (places >= 0) & (places <= queries) & (places > queries - (self.window or 0))

    def _check(self, key: jax.Array, value: jax.Array, lengths: ArrayLike | None) -> int:
        """The number of new tokens, which have to fit."""
        before = len(self.batch_shape)
        count = key.shape[before] if key.ndim == before + 3 else 1
        shape = (*self.batch_shape, count, *self.key.shape[-2:])
        if layers := stacked_shape(self):
            raise self._refusal(
                "holds the keys and values of many layers, which are added one layer after the other",
                expected="a call in the loop over the layers",
                got=f"a cache with axes {layers} for the layers",
                cure="Call the stack, `model.blocks(x, decode=True)`; or add to each layer by itself: "
                "`stack.each(lambda layer, k, v: layer.attention.cache.update(k, v), keys, values)`.",
            )
        if key.shape != shape or value.shape != shape:
            raise self._refusal(
                "does not fit the keys and values of its layer",
                expected=f"arrays of shape {shape}",
                got=f"keys of shape {key.shape}, values of shape {value.shape}",
                cure="Make a cache for inputs of this shape: `layer.init_cache((batch, max_length, features))`.",
            )
        if lengths is not None and (not self.ragged or jnp.shape(lengths) != self.batch_shape):
            raise self._refusal(
                "has one length for all rows" if not self.ragged else "has a length for each row",
                expected="lengths=None" if not self.ragged else f"lengths of shape {self.batch_shape}",
                got=f"lengths of shape {jnp.shape(lengths)}",
                cure="`layer.init_cache(shape, ragged=True)` makes a cache whose rows have lengths of their own.",
            )
        if lengths is not None:
            self._check_lengths(jnp.asarray(lengths), count)
        if self.window is None:
            self._check_room(count, lengths)
        return count

    def _check_lengths(self, lengths: jax.Array, count: int) -> None:
        lengths = lengths.astype(jnp.int32) if jnp.issubdtype(lengths.dtype, jnp.integer) else lengths
        whole = jnp.issubdtype(lengths.dtype, jnp.integer) or lengths.dtype == bool
        if not whole or (_known(lengths) and bool(jnp.any((lengths < 0) | (lengths > count)))):
            raise self._refusal(
                f"cannot count {'these' if whole else 'parts of'} tokens",
                expected=f"lengths that are integers from 0 to {count}, the number of tokens that come",
                got=str(lengths.tolist()) if _known(lengths) else f"lengths of {lengths.dtype}",
                cure="Of a batch of prompts that are filled up behind their ends, `lengths=(tokens > 0).sum(-1)`.",
            )

    def _check_room(self, count: int, lengths: ArrayLike | None) -> None:
        start, more = self.index.value, jnp.asarray(count if lengths is None else lengths, jnp.int32)
        known = _known(start) and _known(more) and start.size > 0
        needed = int((start + more).max()) if known else count if lengths is None else 0
        if needed > self.max_length:
            raise self._refusal(
                "is full",
                expected=f"at most {self.max_length} tokens",
                got=f"{needed}, with those that come" if known else f"{count} at once",
                cure="Make it longer, `layer.init_cache((batch, max_length, features))`; or empty it, "
                "`mu.reset(model, mu.Cache)`; or roll it back, `cache.truncate(length)`.",
            )

    def _check_window(self, kept: jax.Array, index: jax.Array) -> None:
        window = self.window or 0
        if not (_known(kept) and _known(index)):
            return
        wanted = jnp.minimum(index, window - 1)
        there = jnp.sum(kept > (index - window)[..., None], -1)
        if bool(jnp.any(there < wanted)):
            raise self._refusal(
                "cannot be rolled back so far: tokens that its window would show are no longer kept",
                expected=f"at most {self.max_length - window + 1} tokens back",
                got=f"back to {index.tolist()}",
                cure="Keep more tokens than the window shows: "
                f"`nn.KVCache(..., max_length={self.max_length + 8}, window={window})`.",
            )

    def _refusal(self, problem: str, *, expected: str, got: str, cure: str) -> ArgumentError:
        return ArgumentError(
            f"cache {naming.describe(self.key)} {problem}",
            path=naming.path_of(self.key),
            where=naming.where(),
            expected=expected,
            got=got,
            made_at=self.key.made_at,
            cure=cure,
        )


def kv_caches(node: Any) -> list[KVCache]:
    """The key-value caches of a model, in the order of its layers.

    Args:
      node: a Module, or a list, tuple or dict of them.

    Returns:
      A list of `KVCache`s. They are the caches of the model themselves, so a change of one changes the model.

    Example:
      >>> import mutatis as mu
      >>> model = mu.nn.MultiHeadAttention(2, 8, decode=True, rngs=mu.Rngs(0))
      >>> model.init_cache((1, 16, 8))
      >>> [int(cache.index) for cache in mu.nn.kv_caches(model)]  # the number of tokens in each
      [0]
      >>> for cache in mu.nn.kv_caches(model):
      ...     cache.truncate(0)
    """
    return list(modules(node, KVCache).values())


def stacked_shape(cache: KVCache) -> tuple[int, ...]:
    """The sizes of the axes that the states of a cache have for the layers of an `nn.Stack`; () of one layer."""
    return cache.key.shape[: -3 - len(cache.batch_shape)]


def _state(shape: tuple[int, ...], dtype: DTypeLike, fill: int = 0) -> Cache[jax.Array]:
    start = functools.partial(jnp.full, shape, fill, dtype)
    return Cache(start(), init=start)


def put(array: jax.Array, part: jax.Array, slots: jax.Array) -> jax.Array:
    """Write parts into places, which each row has for itself."""
    if slots.ndim > 1:
        return jax.vmap(put)(array, part, slots)
    return array.at[slots].set(part, mode="drop")


def _counted(counts: jax.Array, total: int) -> jax.Array:
    """Whether a token counts, of shape (*batch, total)."""
    return jnp.arange(total).reshape((1,) * counts.ndim + (total,)) < counts[..., None]


def known_numbers(given: Any) -> np.ndarray | None:
    """The numbers of an argument as NumPy's, if they are known; what JAX computes of them in a compiled function is not."""
    value = given.value if isinstance(given, Variable) else given
    return np.asarray(value) if is_concrete(value) else None


def _known(array: jax.Array) -> bool:
    """Whether the numbers are there, and not only their shape."""
    return not isinstance(array, jax.core.Tracer)
