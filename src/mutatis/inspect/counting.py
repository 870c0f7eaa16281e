"""Counts of what a model holds: numbers, states and bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from mutatis.core.showing import show_bytes, show_count
from mutatis.model.filters import FilterLike
from mutatis.model.tally import Tally, tally
from mutatis.model.variables import Variable
from mutatis.model.walks import check_node, variables


class Count(int):
    """The number of elements in a model, as `mu.inspect.count` returns it: an int that also knows states and bytes.

    Attributes:
      numbers: the number of elements of the arrays, as a plain int; a random key is one.
      states: the number of states; a shared one counts once.
      bytes: the size of their arrays in bytes.
      kinds: a dictionary from the names of kinds to their counts.
    """

    states: int
    bytes: int
    kinds: Mapping[str, Count]

    def __new__(cls, numbers: int, states: int, bytes: int, kinds: Mapping[str, Count] = MappingProxyType({})) -> Count:
        self = super().__new__(cls, numbers)
        self.states, self.bytes, self.kinds = states, bytes, dict(kinds)
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        return self.numbers, self.states, self.bytes, self.kinds

    @property
    def numbers(self) -> int:
        """The number of elements of the arrays, as a plain int."""
        return int(self)

    def __str__(self) -> str:
        return f"{show_count(self.numbers, 'number')} in {show_count(self.states, 'state')}, {show_bytes(self.bytes)}"

    def __repr__(self) -> str:
        return f"<{self}>"


def count(node: Any, *filters: FilterLike) -> Count:
    """Count the numbers in a model, or in the states that filters select. Nothing is read or computed.

    A state with several paths counts once. A state that has not been created yet counts without numbers.

    Args:
      node: a Module, a Variable, or a list, tuple or dict of them.
      *filters: which states; all, if none is given. ``mu.Param`` selects the trainable parameters.

    Returns:
      An int. It also has `states` (how many), `bytes` (their size) and `kinds` (a dictionary of the counts by kind).

    Raises:
      ArgumentError: `node` is no part of a model.

    Example:
      >>> import mutatis as mu
      >>> norm = mu.nn.BatchNorm(64)
      >>> print(mu.inspect.count(norm, mu.Param))
      128 numbers in 2 states, 512 B
      >>> total = mu.inspect.count(norm)
      >>> f"{total:,}", total.states, total.kinds["BatchStat"].bytes
      ('256', 4, 512)
    """
    by_kind: dict[str, list[Variable[Any]]] = {}
    for cell in variables(check_node(node), *filters).values():
        by_kind.setdefault(type(cell).__name__, []).append(cell)
    kinds = {kind: tally(cells) for kind, cells in by_kind.items()}
    return _count(kinds.values(), {kind: _count([found]) for kind, found in kinds.items()})


def _count(tallies: Iterable[Tally], kinds: Mapping[str, Count] = MappingProxyType({})) -> Count:
    found = list(tallies)
    return Count(
        sum(one.numbers for one in found), sum(one.states for one in found), sum(one.bytes for one in found), kinds
    )
