"""Lanes: what runs once as code and many times over data, in a `vmap` or on the devices of a `shard_map`.

A random stream that all lanes share becomes a stream for each at its first read: draws differ from lane to lane and are the same
in every run. Outside, its count is one further if it was used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mutatis import _compat
from mutatis.core.cells import Cell
from mutatis.core.transactions import Transaction
from mutatis.model.kinds import RngState


class LaneTransaction(Transaction):
    """The transaction of one transform over lanes.

    Args:
      lane: the number of the lane, as a value that differs from lane to lane.
      alike: the streams that all lanes share as they are.
      given: values of streams that came in through JAX; others are what they are outside.
    """

    __slots__ = ("_alike", "_given", "_lane", "_streams")

    def __init__(
        self, *args: Any, lane: Any, alike: set[Any], given: Mapping[Any, Any] | None = None, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self._lane = lane
        self._alike = alike
        self._given = {} if given is None else given
        self._streams: dict[Any, Any] = {}  # what the streams are outside

    def load_outer(self, cell: Cell) -> Any:
        """What the cell holds outside, or a stream for each lane."""
        value = self._given[cell] if cell in self._given else super().load_outer(cell)
        if not isinstance(cell, RngState) or cell in self._alike or cell.frozen:
            return value
        self._streams[cell] = value
        with _compat.at_trace(self.trace):  # the read may come from a deeper trace, whose value would not live here
            key = _fold(_fold(value["key"], value["count"]), jnp.broadcast_to(self._lane, value["count"].shape))
            return {"key": key, "count": jnp.zeros_like(value["count"])}

    def is_forked(self, cell: Cell) -> bool:
        """Whether each lane has a stream of its own in the place of this one."""
        return cell in self._streams

    def close(self) -> None:
        """Let go of every tracer."""
        super().close()
        self._lane, self._given = None, {}

    def forget(self) -> None:
        """Let go of the values that live inside."""
        self._streams.clear()

    def outside(self, cell: Any, value: Any) -> Any:
        """What a cell that was given this value is outside: a stream that the lanes have drawn from is one further."""
        if cell not in self._streams or cell in self.restarted:
            return value
        stream = self._streams[cell]
        return {"key": stream["key"], "count": stream["count"] + np.uint32(1)}


def unite(cell: Any, states: str, axis: str) -> str:
    """The cure for a value that differs from lane to lane in a cell that they share.

    Args:
      cell: the cell.
      states: what gives the cell an axis, as code.
      axis: the name of the lanes' axis, as code.
    """
    if isinstance(cell, RngState):
        return (
            "Draw from a random stream in transforms of `mu`, each lane has its own; and set it to one key in all of them. "
            f"Or give each lane a stream that is kept: `mu.Rngs(0).split(n)` and `states={states}`."
        )
    return f"Reduce it, `jax.lax.pmean(x, {axis})`, or give the state an axis: `states={states}`."


def _fold(key: Any, count: Any) -> Any:
    """`jax.random.fold_in`, for each stream of an ensemble."""
    fold: Any = jax.random.fold_in
    for _ in range(key.ndim):
        fold = jax.vmap(fold)
    return fold(key, count)
