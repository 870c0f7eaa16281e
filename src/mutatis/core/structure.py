"""Structure: one number that tells whether anything has changed that compiled programs took for granted.

What a program takes for granted are attributes, frozen marks and placements; not the values of states. The number is the
**epoch**. It behaves like a Zobrist hash, as chess programs use it for positions: each value of each flag (a bool, int, string
or None in an attribute) stands for a random number, and changing a flag from `a` to `b` changes the epoch by
``number(a) ^ number(b)``. So setting a flag back brings the old epoch back, and with it all that was known then; `train()` and
`eval()` in turn cost no walk. Any change of something else begins an epoch that never was before.

Most changes are of something else than what a given program is about. So modules and cells carry a number of their own, too,
which is new after each of their changes: who finds that the epoch is another one compares those.
"""

from __future__ import annotations

import os
import random
import threading
from operator import attrgetter
from typing import Any, Protocol


class Marked(Protocol):
    """What carries a number of its own: a cell, or what is kept about a module."""

    _epoch: int


epoch_of = attrgetter("_epoch")


class _Structure:
    """The epoch. Nothing but a few plain assignments is done with the lock, so that no signal handler runs in between."""

    __slots__ = ("_lock", "epoch", "shape", "unspecific")

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.epoch = 0
        self.shape = 0  # changes with anything but a flag
        self.unspecific = 0  # changes with what is not said to be about certain modules or cells

    def changed(self, *marks: Marked) -> None:
        """Begin an epoch that never was. Call it before a change and after it: others may look in between.

        Args:
          marks: what changes; nothing: that is not known.
        """
        fresh = _random_bits(128)
        for mark in marks:  # first: who sees the new epoch is to see these
            mark._epoch = fresh
        if not marks:
            self.unspecific = fresh
        with self._lock:
            self.epoch = self.shape = fresh

    def begin(self, *marks: Marked) -> tuple[int, int]:
        """Before flags are changed, of these modules: the epoch of now, and one that is for the meantime."""
        meantime = _random_bits(128)
        for mark in marks:
            mark._epoch = meantime
        with self._lock:
            before = self.epoch
            self.epoch = meantime
        return before, meantime

    def end(self, begun: tuple[int, int], difference: int, *marks: Marked) -> None:
        """After flags were changed: the epoch of their values, by the numbers of the old and the new ones."""
        before, meantime = begun
        fresh = _random_bits(128)
        for mark in marks:
            mark._epoch = fresh
        with self._lock:
            if self.epoch == meantime:  # else something else has changed too: the epoch is one that never was
                self.epoch = before ^ difference


_random_bits = random.Random(int.from_bytes(os.urandom(16))).getrandbits  # our own: users seed the global one


class Watch:
    """What is kept about a module since somebody took its structure for granted."""

    __slots__ = ("_epoch", "_kept", "_numbers", "disturbances", "submodules", "training")

    def __init__(self) -> None:
        self._epoch = _random_bits(128)
        self.training = _random_bits(128)  # what the change of this flag makes of the epoch
        self.disturbances = 0  # changes of its structure while another thread was tracing
        self.submodules: Any = None  # a walk that was made over it, and what proves that it holds
        self._numbers: dict[Any, int] = {}
        self._kept: tuple[Any, ...] = ()

    def keep(self, node: Any) -> None:
        """Keep a node alive with the module, until a number of others have been kept."""
        self._kept = (node, *[other for other in self._kept if other is not node])[:_KEPT]

    def difference(self, name: str, old: Any, new: Any) -> int | None:
        """What a change of a flag makes of the epoch; None for a change of anything but a flag."""
        if name == "training":  # absent: as its class says
            return self.training if old is not new else 0
        a, b = type(old), type(new)
        if a in _FLAGS and b in _FLAGS:
            return self._number((name, a, old)) ^ self._number((name, b, new))
        return None

    def _number(self, key: Any) -> int:
        if key not in self._numbers:
            if len(self._numbers) > _REMEMBERED:
                self._numbers.clear()  # from now on, old values make epochs that never were
            self._numbers[key] = _random_bits(128)
        return self._numbers[key]


_FLAGS = frozenset({bool, int, str, type(None)})
_REMEMBERED = 64  # values of one module's flags
_KEPT = 16  # nodes


structure = _Structure()
# Held while a trace changes structure in place, and by whoever walks over structure.
structure_lock = threading.RLock()
