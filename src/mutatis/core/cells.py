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
once or not at all, so waiting cannot deadlock. The cells of a step are a `Group`, which remembers that they all
carried a thread's lease: as long as no lease has moved anywhere, the next step looks at none of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
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


class _Moves:
    """How often a lease was put on a cell or taken off, and how many threads wait for one that is busy."""

    __slots__ = ("count", "waiting")

    def __init__(self) -> None:
        self.count = 0  # changed first, then the leases: an interrupt in between does no harm
        self.waiting = 0


_moves = _Moves()
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


def load(cell: Cell) -> Any:
    """The committed value, and from now on it counts as held by user code."""
    # A step puts its lease on a cell before it takes the value away. Looked at again: it may have ended, and the lease be gone.
    value = cell._value
    return value if cell._lease is None and cell._value is value else _expose(cell)


def _expose(cell: Cell) -> Any:
    mine = _thread.lease
    with _mutex:
        _wait_while(lambda: (lease := cell._lease) is not None and lease is not mine and lease.busy and lease.donating)
        lease = cell._lease
        if lease is not None and not lease.busy:
            _moves.count += 1
            cell._lease = None
        return cell._value


def _wait_while(busy: Callable[[], bool]) -> None:
    """Wait, with the mutex, until something is no longer so."""
    _moves.waiting += 1  # before the first look: who ends a step and sees nobody wait gives no notice
    try:
        _wait(busy)
    finally:
        _moves.waiting -= 1


def _wait(busy: Callable[[], bool]) -> None:
    # A function of its own, as `interrupts` says of loops under a lock.
    while busy():
        _released.wait(_MISSED)


def store(cell: Cell, value: Any) -> None:
    """Store a committed value that user code may hold."""
    if cell._lease is not None:
        with _mutex:
            lease: Lease | None = cell._lease  # looked at again: a step may have ended meanwhile
            if lease is not None and lease.busy:
                lease.broken = True  # the step that is running has to leave this cell alone
            _moves.count += 1
            cell._lease = None
    cell._value = value


def my_lease() -> Lease:
    """This thread's lease."""
    return _thread.lease


class Group:
    """The cells of a step.

    Args:
      written: the cells that the step writes.
      read: those that it only reads.
    """

    __slots__ = ("_moves", "_owner", "read", "written")

    def __init__(self, written: Sequence[Cell], read: Sequence[Cell]) -> None:
        self.written = written
        self.read = read
        self._owner: Lease | None = None  # whose all of the written ones were ...
        self._moves = 0  # ... when leases had moved this often

    def take(self, lease: Lease, donating: bool, exposed: list[int]) -> None:
        """Make a thread's lease busy over the cells.

        Args:
          lease: this thread's lease.
          donating: whether the step deletes the old arrays.
          exposed: is filled with the places in `written` whose buffers user code may hold.
        """
        with _mutex:
            if self._owner is not lease or self._moves != _moves.count:
                self._take(lease, exposed)
            lease.busy = True
            lease.donating = donating

    def _take(self, lease: Lease, exposed: list[int]) -> None:
        # A function of its own, as `interrupts` says of loops under a lock.
        owners = [cell._lease for cell in self.written]
        others = [cell._lease for cell in self.read]
        if owners.count(lease) < len(owners) or others.count(lease) + others.count(None) < len(others):
            _wait_while(lambda: self._busy_for(lease))
            exposed += [i for i, cell in enumerate(self.written) if cell._lease is None]
            _moves.count += 1
            for cell in self.written:
                cell._lease = lease
            for cell in self.read:
                if cell._lease is not None:
                    cell._lease = lease
        self._moves = _moves.count
        self._owner = lease

    def _busy_for(self, mine: Lease) -> bool:
        """Whether another thread dispatches a step over one of the cells."""
        return any(
            (lease := cell._lease) is not None and lease is not mine and lease.busy
            for cells in (self.written, self.read)
            for cell in cells
        )


def give_back(lease: Lease) -> None:
    """End a dispatch: whoever waits for a cell of this lease goes on."""
    lease.busy = lease.broken = False
    if _moves.waiting:  # who begins to wait from now on sees that it is not busy
        with _mutex:
            _released.notify_all()


def expose(cells: Sequence[Cell]) -> None:
    """Count the present values of these cells as held by user code, whoever made them."""
    with _mutex:
        _moves.count += 1
        _expose_all(cells)


def _expose_all(cells: Sequence[Cell]) -> None:
    # A function of its own, as `_take` is.
    for cell in cells:
        cell._lease = None
