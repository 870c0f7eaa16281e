"""Tallies: how many states there are, of which kinds and types, and how large; values are looked at and never read."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import jax

from mutatis.core import access
from mutatis.core.cells import UNSET, Deferred
from mutatis.core.showing import show_bytes, show_count
from mutatis.model.kinds import Param
from mutatis.model.variables import Variable


def sizes(value: Any) -> tuple[int, int]:
    """The elements and the bytes of a value's arrays; a size that is not a number is left out."""
    elements = size = 0
    for leaf in jax.tree.leaves(value):
        try:
            count = int(math.prod(leaf.shape))
            elements, size = elements + count, size + count * int(leaf.dtype.itemsize)
        except Exception:  # no array, or one with an axis whose size is only known by name
            continue
    return elements, size


class Tally:
    """States, counted. Each is counted by who adds it, so a shared one once.

    Attributes:
      states: how many there are.
      numbers: the elements of their arrays.
      bytes: the size of their arrays.
      parameters: the elements of those that are parameters.
      kinds: how many there are of each kind.
      dtypes: the dtypes of their arrays.
      frozen: how many can be read only.
      deferred: how many have no value yet.
      stacked: how many have axes that transforms have put into them, an ensemble's or a stack's, by the sizes of these.
    """

    __slots__ = ("bytes", "deferred", "dtypes", "frozen", "kinds", "numbers", "parameters", "stacked", "states")

    def __init__(self) -> None:
        self.states = self.numbers = self.bytes = self.parameters = self.frozen = self.deferred = 0
        self.kinds: dict[str, int] = {}
        self.dtypes: dict[str, None] = {}
        self.stacked: dict[tuple[int, ...], int] = {}

    def add(self, cell: Variable[Any]) -> None:
        """Count a state."""
        self.frozen += cell.frozen
        if cell._lanes:
            axes = tuple(size for _, size in cell._lanes)
            self.stacked[axes] = self.stacked.get(axes, 0) + 1
        self.add_value(access.peek(cell), type(cell))

    def add_value(self, value: Any, kind: type[Variable[Any]]) -> None:
        """Count a state by what it holds and its kind."""
        self.states += 1
        self.kinds[kind.__name__] = self.kinds.get(kind.__name__, 0) + 1
        if value is UNSET or type(value) is Deferred:
            self.deferred += 1
            return
        numbers, size = sizes(value)
        self.numbers += numbers
        self.bytes += size
        self.parameters += numbers if issubclass(kind, Param) else 0
        for leaf in jax.tree.leaves(value):
            self.dtypes[str(getattr(leaf, "dtype", "?"))] = None

    def __iadd__(self, other: Tally) -> Tally:
        for name in ("states", "numbers", "bytes", "parameters", "frozen", "deferred"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for kind, count in other.kinds.items():
            self.kinds[kind] = self.kinds.get(kind, 0) + count
        self.dtypes |= other.dtypes
        for axes, count in other.stacked.items():
            self.stacked[axes] = self.stacked.get(axes, 0) + count
        return self

    def total(self) -> str:
        """All of it: ``1,301 parameters, 5.2 kB in 4 states``; nothing if there are no states."""
        if not self.states:
            return ""
        what = show_count(self.parameters, "parameter") if self.parameters else show_count(self.numbers, "number")
        return f"{what}, {show_bytes(self.bytes)} in {show_count(self.states, 'state')}{self._marks()}"

    def content(self) -> str:
        """What there is: ``2 Param, 2 BatchStat, float32``; nothing if there are no states."""
        if not self.states:
            return ""
        kinds = [f"{count:,} {kind}" for kind, count in self.kinds.items()]
        dtypes = [*self.dtypes]
        return ", ".join([*_few(kinds), *_few(dtypes)]) + self._marks()

    def _marks(self) -> str:
        marks = "".join(
            f", {'' if count == self.states else f'{count:,} '}stacked {' x '.join(map(str, axes))}"
            for axes, count in self.stacked.items()
        )
        for count, word in ((self.frozen, "frozen"), (self.deferred, "deferred")):
            if count:
                marks += f", {word}" if count == self.states else f", {count:,} {word}"
        return marks


_MOST = 4  # kinds, or dtypes, that are named


def _few(texts: list[str]) -> list[str]:
    return texts if len(texts) <= _MOST else [*texts[: _MOST - 1], f"{len(texts) - _MOST + 1} others"]


def tally(cells: Iterable[Variable[Any]]) -> Tally:
    """States, counted."""
    found = Tally()
    for cell in cells:
        found.add(cell)
    return found
