"""The cell: one place that holds one committed value, and the right of a thread to take its buffer.

A cell knows nothing of models or kinds. Its value is a pytree of arrays, or a placeholder:

- `UNSET`: there is no value (yet). It is an *empty* pytree, so a cell without a value goes through JAX like any
  other and merely has no leaves.
- `Deferred(key)`: there is no value yet, and `key` is the random key to make it from.

**Leases.** A compiled step wants to *donate* the buffers of the states it writes: JAX then reuses their memory
and deletes the old arrays. That may not be seen. Each thread has one `Lease`. A cell carries a thread's lease
while its buffer was made by a compiled program and no user code holds an array over it. Reading the value in
Python takes the lease away: the cell is *exposed*, and the next step copies it instead of donating it. While a
thread dispatches a step its lease is *busy*: other threads that want a cell that the step deletes wait (for a
dispatch, no longer), so nobody finds a deleted array and no update is lost. All leases of a step are taken at
once or not at all, and nobody waits while his own lease is busy, so waiting cannot deadlock. The cells of a step
are a `Group`, which remembers that they all carried a thread's lease: the next step looks only at those that have lost it
since, which the lease notes; and at all of them, if another thread has taken any cells.

**Code that runs in the middle of a dispatch, on its thread.** Python runs signal handlers between any two steps of
ours, and weakref callbacks and `__del__` wherever something is freed. It cannot wait for what it interrupts. So a
dispatch has three parts, and `settle` says what becomes of it:

- while it is *prepared* (leases, values, copies), it is void: it begins again when the interruption is over. Just before
  the launch it looks whether that has happened, and nothing can happen between that look and the launch;
- while it is *in flight* (inside JAX's compiled call) no handler runs, as a rule. But JAX makes some calls in Python. Before the
  program runs it can still be *recalled*: the cells get copies, the arrays that it holds are deleted, so that JAX raises, and it
  begins again. Between the run and the return, the states are refused;
- when it has *landed*, the results are there: who interrupts commits the rest of them, in the place of who was interrupted.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from operator import is_
from typing import Any, Protocol

import jax

from mutatis.core.nodes import identity
from mutatis.errors import MutatisError


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
    """A thread's right to the buffers of the cells that carry it, and the step that is being dispatched with it, if one is."""

    __slots__ = (
        "donating",
        "exposed",
        "flight",
        "landing",
        "lent",
        "losses",
        "lost",
        "overwritten",
        "shown",
        "step",
        "taken",
        "values",
    )

    def __init__(self) -> None:
        self.flight: list[Any] | None = None  # of the step: empty, then what it returned; it is busy if there is one
        self.step: Step | None = None
        self.donating = False  # it deletes the old arrays
        self.exposed: list[int] = []  # the places of the written cells that user code held the values of
        self.values: list[Any] | None = None  # what it was launched on; None while it is prepared
        self.landing: Iterator[tuple[Cell, Any]] | None = None  # what is still to be committed, once it has begun
        self.shown: set[Cell] = set()  # cells that are exposed, and need the lease until the step has ended
        self.overwritten: set[Cell] = set()  # those that somebody wrote while it was in flight
        # The cells that it was taken off, by `id`, the last one first: `(number, (number, ...))`. A chain, because to add to it
        # takes no call, in which a signal handler might run.
        self.lost: Any = (0, None)
        self.losses = 0  # how long that is
        self.lent = False  # whether it is a loan that is not over
        self.taken = False  # whether any cell has ever carried it


class Loan(Lease):
    """In the place of a lease, on cells whose values are lent to code of ours that lets go of them again, such as a save.

    Until then they count as held by user code; afterwards a step may delete them.
    """

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__()
        self.lent = True


class Step(Protocol):
    """What of a step is needed to finish it."""

    @property
    def written(self) -> Sequence[Cell]:
        """The cells that it writes."""

    @property
    def lands(self) -> bool:
        """Whether what it returned counts at once. It does not if the program may still fail and has deleted nothing."""

    def recall(self, values: list[Any], donating: bool) -> bool:
        """Keep it from running, or from counting, if it was launched on these values and has not run; whether that was so."""

    def results(self, box: list[Any], values: list[Any]) -> Sequence[Any]:
        """The values of the written cells, of what it returned and was launched on."""


LANDED = object()  # in the flight of a step whose results have been committed by somebody else


class _Thread(threading.local):
    def __init__(self) -> None:
        self.lease = Lease()


class _Moves:
    """How often leases were put on cells, how many leases there have been, and how many threads wait for one that is busy."""

    __slots__ = ("count", "leases", "waiting")

    def __init__(self) -> None:
        self.count = 0  # changed first, then the leases: an interrupt in between does no harm
        self.leases = 0
        self.waiting = 0


moves = _Moves()
_thread = _Thread()
mutex = threading.RLock()  # what interrupts a thread that holds it may take it, too: see `settle`
_released = threading.Condition(mutex)
_MISSED = 0.05  # seconds after which who waits looks again: an interrupt may have kept a notice from being given


class Cell:
    """A place that holds one committed value."""

    __slots__ = ("__weakref__", "_birth", "_epoch", "_lease", "_shape", "_value")

    _value: Any
    _lease: Lease | None
    _birth: Any  # weak reference to the raw JAX trace the cell was made in; None for an ordinary cell
    _epoch: int  # another one after each change of its type or marks: see `structure`
    _shape: tuple[int, ...] | None  # of the array that it was made with; only messages ask for it
    sharding: Any = None  # where a state says that it lives; other cells say nothing

    def __init__(self) -> None:
        self._value = UNSET
        self._lease = None
        self._birth = None
        self._epoch = 0
        self._shape = None

    def admit(self, value: Any) -> Any:
        """A value as the cell stores it."""
        return value


def load(cell: Cell) -> Any:
    """The committed value, and from now on it counts as held by user code.

    Raises:
      MutatisError: a step of this thread, which this code has interrupted, is deleting it.
    """
    # A step puts its lease on a cell before it takes the value away. Looked at again: it may have ended, and the lease be gone.
    value = cell._value
    return value if cell._lease is None and cell._value is value else _expose(cell)


def load_many(cells: Sequence[Cell]) -> list[Any]:
    """The committed values of cells at one moment, as `load` gives them."""
    return _load_whole(cells, None)


def lend_many(cells: Sequence[Cell], loan: Loan) -> list[Any]:
    """The committed values of cells at one moment, which count as held by user code until the loan is over."""
    return _load_whole(cells, loan)


def _load_whole(cells: Sequence[Cell], loan: Loan | None) -> list[Any]:
    with mutex:
        values, leased = _look_at(cells)
    if not leased:
        return values
    settle(_thread.lease)
    with mutex:
        return _expose_values(cells, loan)


# Loops under a lock are in functions of their own, as `interrupts` says.


def _look_at(cells: Sequence[Cell]) -> tuple[list[Any], bool]:
    """The values of cells, and whether more is to be done: a step may delete them, or has begun to meanwhile."""
    values = [cell._value for cell in cells]
    leased = any(cell._lease is not None for cell in cells)
    return values, leased or not _are(cells, values)


def _expose_values(cells: Sequence[Cell], loan: Loan | None) -> list[Any]:
    while True:
        if _thread.lease.flight is None:  # who interrupts a step of its own cannot wait
            wait_while(lambda: _busy_over(cells, landing=True))
        values = [_expose_value(cell, loan) for cell in cells]
        # Nobody was in the middle of committing between the two looks at the values: they were there together.
        if _thread.lease.flight is not None or (_busy_over(cells, landing=True) is None and _are(cells, values)):
            return values


def _are(cells: Sequence[Cell], values: Sequence[Any]) -> bool:
    """Whether the values of cells are these, still."""
    return all(map(is_, [cell._value for cell in cells], values))


def _busy_over(cells: Sequence[Cell], landing: bool = False) -> Lease | None:
    """The lease with which a step is being dispatched over one of the cells, if one is; or with which one is committed."""
    busy = (lease for cell in cells if (lease := busy_lease(cell)) is not None)
    return next((lease for lease in busy if not landing or lease.landing is not None), None)


def _expose(cell: Cell) -> Any:
    settle(_thread.lease)
    value = cell._value
    if getattr(value, "ndim", None) == 0:
        return value  # no step deletes a single number: see `TraceRecord.donatable`
    with mutex:
        return _expose_value(cell)


def _expose_value(cell: Cell, loan: Loan | None = None) -> Any:
    number = identity(cell)
    while True:
        wait_while(lambda: None if (lease := busy_lease(cell)) is None or not lease.donating else lease)
        lease, value = cell._lease, cell._value
        if lease is None or lease is loan:
            return value  # nothing has happened since the look at it
        lease.lost = (number, lease.lost)  # and no call stands from there to here, in which a signal handler would run
        if lease.flight is None:
            cell._lease = None if lease.lent else loan
            return value
        if not lease.donating:
            lease.shown.add(cell)
            if busy_lease(cell) is lease and cell._value is value:  # else it has ended, and may not have seen that
                return value


def store(cell: Cell, value: Any) -> None:
    """Store a committed value that user code may hold."""
    if cell._lease is None:
        cell._value = value
    else:
        settle(_thread.lease)
        with mutex:
            _store_leased(cell, value)


def store_many(cells: Sequence[Cell], values: Sequence[Any]) -> None:
    """Store committed values, as `store` does, at one moment: no step and no `load_many` finds some of them only."""
    settle(_thread.lease)
    with mutex:
        if _thread.lease.flight is None:  # who interrupts a step of its own cannot wait
            wait_while(lambda: _busy_over(cells))  # before the first is stored: waiting lets others in
        _store_all(cells, values)


def _store_all(cells: Sequence[Cell], values: Sequence[Any]) -> None:
    # A function of its own, as `_look_at` is.
    for cell, value in zip(cells, values, strict=True):
        if cell._lease is None:
            cell._value = value
        else:
            _store_leased(cell, value)


def _store_leased(cell: Cell, value: Any) -> None:
    number = identity(cell)
    while (lease := cell._lease) is not None and lease.flight is not None:
        if lease.values is None:
            _void(lease)  # it begins again, on this value
            continue
        lease.overwritten.add(cell)
        if lease.landing is None:  # looked at after that: it will see that this is the later write
            lease.lost = (number, lease.lost)
            lease.shown.add(cell)
            cell._value = value
            return
        wait_while(lambda lease=lease: None if lease.landing is None else lease)  # type: ignore[misc]
    if lease is not None:
        lease.lost = (number, lease.lost)
    cell._lease = None
    cell._value = value


def settle(lease: Lease) -> None:
    """For code of a thread that may have interrupted its own step: bring that step to an end, unless it is in flight."""
    flight, step = lease.flight, lease.step
    if flight is None or step is None:
        return
    if lease.values is not None and not flight and step.recall(lease.values, lease.donating):
        lease.values = None
    if lease.values is None:
        with mutex:
            _void(lease)
    elif flight and step.lands:
        if lease.landing is None:
            landing = zip(step.written, step.results(flight, lease.values), strict=True)
            if lease.landing is None:
                lease.landing = landing
        commit_rest(lease)
        flight.append(LANDED)
        give_back(lease)


def _void(lease: Lease) -> None:
    """Have a step that is being prepared begin again."""
    if lease.values is None:
        lease.flight = None  # Python runs nothing between the look and this: it is not launched
        if lease.step is not None:
            _expose_all(lease, [lease.step.written[i] for i in lease.exposed])


def commit_rest(lease: Lease) -> None:
    """Commit what a step that has landed has not committed yet; what somebody else wrote meanwhile is the later write."""
    for cell, value in lease.landing or ():
        if cell not in lease.overwritten:
            cell._value = value


def busy_lease(cell: Cell) -> Lease | None:
    """The lease of a cell, if it is busy."""
    lease = cell._lease
    return None if lease is None or lease.flight is None else lease


def wait_while(busy: Callable[[], Lease | None]) -> None:
    """Wait, with the mutex, until no lease is in the way.

    Raises:
      MutatisError: this thread dispatches a step itself, which this code has interrupted.
    """
    if busy() is None:
        return
    if _thread.lease.flight is not None:
        raise MutatisError(
            "a state was used by code that interrupted a step over it, between the run and the return",
            expected="a finalizer (`__del__`, a callback of `weakref`) or signal handler that leaves states alone there",
            cure="Note there what is to be done, say in a `queue.SimpleQueue`, and do it after the step.",
        )
    moves.waiting += 1  # before the next look: who ends a step and sees nobody wait gives no notice
    try:
        _wait(busy)
    finally:
        moves.waiting -= 1


def _wait(busy: Callable[[], Lease | None]) -> None:
    # A function of its own, as `interrupts` says of loops under a lock.
    while (lease := busy()) is not None:
        if not _released.wait(_MISSED):
            _void(lease)  # prepared for so long, it may wait for something in JAX that this thread has interrupted


def my_lease() -> Lease:
    """A lease of this thread that is not busy."""
    lease = _thread.lease
    if lease.flight is None:
        return lease
    settle(lease)
    return _thread.lease if _thread.lease.flight is None else Lease()


def is_exposed(cell: Cell) -> bool:
    """Whether user code may hold the value of a cell that is in no step's flight."""
    lease = cell._lease
    return lease is None or lease.lent or cell in lease.shown


def give_back(lease: Lease) -> None:
    """End a dispatch: whoever waits for a cell of this lease goes on."""
    lease.flight = lease.step = lease.values = lease.landing = None
    if lease.shown or lease.overwritten:
        with mutex:
            _forget_shown(lease)
    if moves.waiting:  # who begins to wait from now on sees that it is not busy
        with mutex, contextlib.suppress(RuntimeError):  # what interrupted us there has given notice already
            _released.notify_all()


def _forget_shown(lease: Lease) -> None:
    _expose_all(lease, tuple(lease.shown))
    lease.shown.clear()
    lease.overwritten.clear()


def expose(lease: Lease, cells: Sequence[Cell]) -> None:
    """Count the values of these cells as held by user code, where they still carry a lease: another step may have begun."""
    with mutex:
        _expose_all(lease, cells)


def _expose_all(lease: Lease, cells: Sequence[Cell]) -> None:
    # A function of its own, as `_look_at` is.
    for cell in cells:
        number = identity(cell)
        if cell._lease is lease:
            lease.lost = (number, lease.lost)
            cell._lease = None
