"""Groups: the cells of a step, and how the step takes all their leases at once.

A group remembers that its cells all carried a thread's lease. So the next step looks only at those that have lost it since,
which the lease notes (`Lease.lost`), and at all of them if another thread has taken any cells meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mutatis.core.cells import Cell, Lease, Loan, Step, busy_lease, is_exposed, moves, mutex, wait_while
from mutatis.core.nodes import identity

_LOOKED_AT = 64  # cells that a lease has lost: beyond, a step looks at all of its cells
_KEPT = 4096  # of those, for steps that are made seldom


class Group:
    """The cells of a step.

    Args:
      cells: all of them, in the order of the program's arguments.
      written: the cells that the step writes.
      read: those that it only reads.
    """

    __slots__ = ("_lost", "_moves", "_owner", "_places", "cells", "read", "written")

    def __init__(self, cells: Sequence[Cell], written: Sequence[Cell], read: Sequence[Cell]) -> None:
        self.cells = cells
        self.written = written
        self.read = read
        self._owner: Lease | None = None  # whose all of the written ones were ...
        self._lost: Any = None  # ... when it had lost these ...
        self._moves = 0  # ... and leases had been taken this often
        self._places: dict[int, int] = {}  # of the written cells, by `identity`

    def take(self, lease: Lease, step: Step, flight: list[Any], donating: bool, exposed: list[int]) -> list[Any]:
        """Make a thread's lease busy over the cells.

        Args:
          lease: this thread's lease.
          step: the step.
          flight: will hold what the step returns.
          donating: whether the step deletes the old arrays.
          exposed: is filled with the places in `written` whose buffers user code may hold.

        Returns:
          The values of the cells.
        """
        with mutex:
            if self._lost is not lease.lost or self._moves != moves.count or self._owner is not lease:
                self._wait_for_others(lease)  # before it is busy; what interrupts that may use it for its own step
            lease.step = step
            lease.donating = donating
            lease.exposed = exposed
            lease.values = lease.landing = None
            lease.flight = flight  # from now on, who interrupts makes it void
            if self._lost is not lease.lost or self._moves != moves.count or self._owner is not lease:
                self._take(lease, flight, exposed)
            return self._values()  # now: the next step of another thread may delete what this one only reads

    def _values(self) -> list[Any]:
        # A function of its own, as `interrupts` says of loops under a lock.
        return [cell._value for cell in self.cells]

    def _wait_for_others(self, lease: Lease) -> None:
        if (self._owner is not lease or self._moves != moves.count) and not self._is_mine(lease):
            wait_while(lambda: self._busy_for(lease))

    def _is_mine(self, lease: Lease) -> bool:
        """Whether the cells carry this lease, but for exposed ones that the step only reads."""
        owners = [cell._lease for cell in self.written]
        others = [cell._lease for cell in self.read]
        return owners.count(lease) == len(owners) and others.count(lease) + others.count(None) == len(others)

    def _take(self, lease: Lease, flight: list[Any], exposed: list[int]) -> None:
        lost = self._lost_since(lease)
        if lost is not None:
            self._take_back(lease, flight, exposed, lost)
            return
        if not lease.taken:
            lease.taken = True
            moves.leases += 1
        if not self._is_mine(lease) or lease.shown or lease.overwritten:
            if self._busy_for(lease) is not None:  # another thread has begun since: nobody waits while busy
                lease.flight = None
                return
            lease.overwritten.clear()
            exposed += [i for i, cell in enumerate(self.written) if is_exposed(cell)]
            wanted: list[tuple[Cell, Lease | None]] = [(cell, lease) for cell in self.written]
            wanted += [(cell, None if is_exposed(cell) else lease) for cell in self.read]
            moves.count += 1
            for cell, its in wanted:
                if lease.flight is not flight:  # what we know of the cells may be true no more
                    return
                cell._lease = its
            lease.shown.clear()
        if lease.flight is flight:
            self._moves = moves.count
            self._lost = lease.lost
            self._owner = lease

    def _lost_since(self, lease: Lease) -> list[int] | None:
        """The places of the written cells that a lease has lost since they all carried it; None if that cannot be told."""
        if self._owner is not lease or self._moves != moves.count or lease.shown or lease.overwritten:
            return None
        if not self._places:
            self._places = {identity(cell): place for place, cell in enumerate(self.written)}
        places, entry = set(), lease.lost
        for _ in range(_LOOKED_AT):
            if entry is self._lost:
                break
            if entry is None:
                return None
            number, entry = entry
            if (place := self._places.get(number)) is not None:
                places.add(place)
        else:
            return None
        owners = {place: self.written[place]._lease for place in places}
        if any(owner is not None and owner is not lease and type(owner) is not Loan for owner in owners.values()):
            return None
        return [place for place, owner in owners.items() if owner is not lease]

    def _take_back(self, lease: Lease, flight: list[Any], exposed: list[int], lost: list[int]) -> None:
        exposed += [place for place in lost if is_exposed(self.written[place])]
        if lost and moves.leases > 1:  # another thread's group may count on it that nobody has these
            moves.count += 1
            self._moves = moves.count
        lease.losses += len(lost)
        if lease.losses > _KEPT:
            lease.losses, lease.lost = 0, (object(), None)
        for place in lost:
            if lease.flight is not flight:
                return
            self.written[place]._lease = lease
        if lease.flight is flight:
            self._lost = lease.lost

    def _busy_for(self, mine: Lease) -> Lease | None:
        """The lease with which another step is being dispatched over one of the cells, if one is."""
        found = (busy_lease(cell) for cells in (self.written, self.read) for cell in cells)
        return next((lease for lease in found if lease is not None and lease is not mine), None)
