"""The cell: one place that holds one committed value, and the right of a thread to take its buffer.

A cell knows nothing of models or kinds. Its value is a pytree of arrays, or a placeholder:

- `UNSET`: there is no value (yet). It is an *empty* pytree, so a cell without a value goes through JAX like any
  other and merely has no leaves.
- `Deferred(key)`: there is no value yet, and `key` is the random key to make it from.

**Leases.** A compiled step wants to *donate* the buffers of the states it writes: JAX then reuses their memory
and deletes the old arrays. That may not be seen. Each thread has one `Lease`. A cell carries a thread's lease
while its buffer was made by a compiled program and no user code holds an array over it. Reading the value in
Python takes the lease away: the cell is *exposed*, and the next step copies it instead of donating it. While a
thread dispatches a step its lease is *busy*: other threads that want a cell under a busy lease wait (for a
dispatch, no longer), so nobody finds a deleted array and no update is lost. All leases of a step are taken at
once or not at all, so waiting cannot deadlock.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from typing import Any

import jax


class _Unset:
    """The placeholder of a cell that has no value."""

    def __repr__(self) -> str:
        return "UNSET"

    def __reduce__(self) -> str:
        return "UNSET"


UNSET = _Unset()
jax.tree_util.register_pytree_node(_Unset, lambda _: ((), None), lambda _aux, _children: UNSET)


class Deferred:
    """The placeholder of a state that its layer creates at the first call, from this random key."""

    __slots__ = ("key",)

    def __init__(self, key: Any) -> None:
        self.key = key

    def __repr__(self) -> str:
        return "Deferred()"


jax.tree_util.register_pytree_node(Deferred, lambda d: ((d.key,), None), lambda _aux, children: Deferred(*children))


class Lease:
    """A thread's right to the buffers of the cells that carry it."""

    __slots__ = ("broken", "busy", "donating")

    def __init__(self) -> None:
        self.busy = False  # a step over the cells is being dispatched
        self.donating = False  # that step deletes the old arrays
        self.broken = False  # somebody wrote one of the cells meanwhile


class _Thread(threading.local):
    def __init__(self) -> None:
        self.lease = Lease()


_thread = _Thread()
_mutex = threading.Lock()
_released = threading.Condition(_mutex)
_MISSED = 0.05  # seconds after which who waits looks again: an interrupt may have kept a notice from being given


class Cell:
    """A place that holds one committed value."""

    __slots__ = ("__weakref__", "_birth", "_lease", "_value")

    _value: Any
    _lease: Lease | None
    _birth: Any  # weak reference to the raw JAX trace the cell was made in; None for an ordinary cell

    def __init__(self) -> None:
        self._value = UNSET
        self._lease = None
        self._birth = None

    def admit(self, value: Any) -> Any:
        """A value as the cell stores it."""
        return value


def peek(cell: Cell) -> Any:
    """The committed value, and from now on it counts as held by user code."""
    # The value is loaded before the lease is looked at: a step puts its lease on a cell before the new value.
    value = cell._value
    return value if cell._lease is None else _expose(cell)


def _expose(cell: Cell) -> Any:
    mine = _thread.lease
    with _mutex:
        lease = _wait_for_donation(cell, mine)
        if lease is not None and not lease.busy:
            cell._lease = None
        return cell._value


def _wait_for_donation(cell: Cell, mine: Lease) -> Lease | None:
    # A function, as `_take` is.
    while (lease := cell._lease) is not None and lease.busy and lease.donating and lease is not mine:
        _released.wait(_MISSED)
    return lease


def poke(cell: Cell, value: Any) -> None:
    """Store a committed value that user code may hold."""
    if cell._lease is not None:
        with _mutex:
            lease: Lease | None = cell._lease  # looked at again: a step may have ended meanwhile
            if lease is not None and lease.busy:
                lease.broken = True  # the step that is running has to leave this cell alone
            cell._lease = None
    cell._value = value


def my_lease() -> Lease:
    """This thread's lease."""
    return _thread.lease


def take(lease: Lease, written: Sequence[Cell], read: Sequence[Cell], donating: bool, exposed: list[int]) -> None:
    """Make a thread's lease busy over the cells of a step.

    Args:
      lease: this thread's lease.
      written: the cells that the step writes.
      read: those that it only reads.
      donating: whether it deletes the old arrays.
      exposed: is filled with the places in `written` whose buffers user code may hold.
    """
    with _mutex:
        _take(lease, written, read, exposed)
        lease.busy = True
        lease.donating = donating


def _take(lease: Lease, written: Sequence[Cell], read: Sequence[Cell], exposed: list[int]) -> None:
    # A function: from CPython 3.12 on an interrupt in a loop directly inside `with _mutex` may leave it locked.
    owners = [cell._lease for cell in written]
    others = [cell._lease for cell in read]
    if owners.count(lease) == len(owners) and others.count(lease) + others.count(None) == len(others):
        return
    _wait_for_others(lease, written, read)
    exposed += [i for i, cell in enumerate(written) if cell._lease is None]
    for cell in written:
        cell._lease = lease
    for cell in read:
        if cell._lease is not None:
            cell._lease = lease


def _wait_for_others(mine: Lease, written: Sequence[Cell], read: Sequence[Cell]) -> None:
    while any(
        (lease := cell._lease) is not None and lease is not mine and lease.busy
        for cells in (written, read)
        for cell in cells
    ):
        _released.wait(_MISSED)


def give_back(lease: Lease) -> None:
    """End a dispatch: whoever waits for a cell of this lease goes on."""
    with _mutex:
        lease.busy = lease.broken = False
        _released.notify_all()


def expose(cells: Sequence[Cell]) -> None:
    """Count the present values of these cells as held by user code, whoever made them."""
    with _mutex:
        for cell in cells:
            cell._lease = None


class _Structure:
    """A count of the changes to what compiled programs took for granted: attributes, frozen marks, placements."""

    __slots__ = ("_numbers", "epoch")

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self.epoch = 0

    def changed(self) -> None:
        """Begin another epoch. Call it after a change: who looks in between sees the change and looks again."""
        self.epoch = next(self._numbers)  # numbers are drawn atomically, so two threads cannot begin the same epoch


structure = _Structure()
# Held while a trace changes structure in place, and by whoever walks over structure.
structure_lock = threading.RLock()
