"""Stamps: what keeps JAX from finding a raw transform's trace again after states were read in it.

A raw transform (`jax.checkpoint`, `jax.lax.scan`, a solver) files the trace of a function under the function object. If that read
a state, the trace holds its value, as a constant: for the next transaction it is a wrong one, or a tracer that is gone. JAX lets
a library add a value of its own to the keys of all traces. Ours, inside of our transforms, is a `Stamp`.

All stamps of a thread are equal, so that traces which read no state are shared as ever. When a raw transform reads a state, the
stamp under which it was entered is *retired*: it equals only itself from then on, and goes out of use. So the trace that is
being made under it, and whatever else is filed there, is never found again. What reads no state is traced again only if it was
filed under the same stamp.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from types import TracebackType
from typing import Any

from mutatis import _compat


class _Thread(threading.local):
    def __init__(self) -> None:
        self.kind = object()  # not shared among threads: another one might find a trace before a state is read in it
        self.staging: Any = None  # weak reference to the raw trace in which a state was read last


_thread = _Thread()


class Stamp(float):
    """A value for the keys of JAX's traces. (A float, so that its hash is computed without Python code.)"""

    __slots__ = ("kind", "successor")

    def __init__(self) -> None:
        self.kind: object = _thread.kind
        self.successor: Stamp | None = None  # what is in use in its place, once it is retired

    __hash__ = float.__hash__

    def __eq__(self, other: object) -> bool:
        return type(other) is Stamp and self.kind is other.kind


def latest(stamp: Any) -> Any:
    """What is in use now in the place of a stamp (or of no stamp)."""
    while type(stamp) is Stamp and stamp.successor is not None:
        stamp = stamp.successor
    return stamp


def retire(stamp: Any, staging: Any) -> bool:
    """Let nothing be found again that is filed under a stamp, or its successor, since a state is read there.

    Args:
      stamp: the stamp that was in force where the raw transform was entered, if there was one.
      staging: the raw transform's trace. Another read there costs nothing.

    Returns:
      Whether there was one.
    """
    if type(stamp) is not Stamp:
        return False
    if _thread.staging is None or _thread.staging() is not staging:
        _thread.staging = _compat.weak_trace(staging)
        stamp = latest(stamp)
        stamp.kind = stamp
        stamp.successor = Stamp()
        if _compat.stamp() is stamp:
            _compat.swap_stamp(stamp.successor)
    return True


def in_ordinary_code() -> bool:
    """Whether no stamp is in force."""
    return type(_compat.stamp()) is not Stamp


class stamped:
    """A block under a stamp, or under none: JAX finds there what it has traced outside of all our transforms."""

    __slots__ = ("_before", "_stamp")

    def __init__(self, stamp: Stamp | None) -> None:
        self._stamp = stamp

    def __enter__(self) -> None:
        self._before = _compat.swap_stamp(_compat.NO_STAMP if self._stamp is None else self._stamp)

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        _compat.swap_stamp(latest(self._before))


# -- constants ----------------------------------------------------------------------------------------------------

# By the identity of cells, whose `==` compares values.
_constants: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_thawings = itertools.count(1)


def keep_constant(cell: Any) -> None:
    """Note that JAX keeps the value of a frozen cell in a trace that it may find again."""
    _constants[id(cell)] = cell


def thawed(cell: Any) -> None:
    """Note that a cell may change again. If JAX has kept its value, all is traced anew: nobody knows which traces those are."""
    if _constants.pop(id(cell), None) is not None:
        _compat.set_stamp_of_all(next(_thawings))
