"""The transaction: what every transform of Mutatis is.

A transaction is an overlay on the cells. While it is open here (on this thread, in this task),

- a **read** finds the value in the innermost overlay that has it, else further out, else the committed one;
- a **write** goes to the innermost overlay;
- when it ends well, its writes move one level out (the outermost commits them to the cells);
- when it ends in an exception, they are dropped, and changes of structure are undone from its journal.

A transform opens one inside the function that it hands to JAX. So there are two traces to know: `outer`, where
the transform was called, and `trace`, where its function runs. Each level checks that the trace of a read or write
is its own; one that is not belongs to a *raw* JAX transform in between. A write there would be lost or would leak: it is a
`TraceLevelError`. A read is right, for JAX never finds the raw transform's trace again (`stamps`); in ordinary code, outside of
all transforms, there is nothing to arrange that with, and a read in a trace that JAX keeps is a `TraceLevelError`, too.

What happens on a miss is the transform's choice: most load from further out (`Transaction.load_outer`), a compiled program
notes that it needs the cell as an input, `vmap` gives each lane its own random stream.

`access` has the same verbs for the code that runs now, and the table of what each of them counts as.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import jax

from mutatis import _compat
from mutatis.core import frames, naming
from mutatis.core.cells import UNSET, Cell, load_many
from mutatis.core.committed import check_stale, is_local, load_committed, staging_trace, write_refused
from mutatis.core.interrupts import divert, undivert
from mutatis.core.journal import Journal
from mutatis.core.stamps import Stamp, latest, retire, stamped
from mutatis.errors import TraceLevelError

_MISSING = object()
_CONTAINERS = (dict, list, tuple)


def current() -> Transaction | None:
    """The innermost transaction that is open here."""
    return frames.innermost()  # type: ignore[no-any-return]


class Transaction(frames.Frame):
    """An overlay on the cells.

    Args:
      label: what it is, for messages: ``jit(train_step)``.
      locate: finds the printed path of a cell among what the transform was given.
      outer: the trace at which the transform was called, if that is not the one of now.
      journal: where changes of structure are noted, if the transform has begun one.
      compiled: whether the function is traced into a program that is kept and reused.
    """

    __slots__ = (
        "_lent",
        "_outside",
        "_stamp",
        "_through",
        "born",
        "compiled",
        "journal",
        "outer",
        "pinned",
        "repeats",
        "restarted",
        "seen",
        "split",
        "trace",
        "values",
        "written",
    )

    def __init__(
        self,
        label: str,
        *,
        locate: Callable[[Cell], str | None] | None = None,
        outer: Any = None,
        journal: Journal | None = None,
        compiled: bool = False,
    ) -> None:
        super().__init__(label, locate)
        self.parent: Transaction | None
        self.compiled: bool = compiled or (self.parent is not None and self.parent.compiled)
        self.outer = _compat.current_trace() if outer is None else outer
        self.trace: Any = None
        self.repeats: int | None = 1  # how often what runs here once is run in a call; None if that is not known
        self.split: Mapping[Any, int] = {}  # cells of which each run sees a slice, along this axis
        self.values: dict[Cell, Any] = {}
        self.seen: dict[Cell, None] = {}  # what the function read, here and further in
        self.written: dict[Cell, int] = {}  # and wrote, how often
        self._through: set[Cell] = set()  # cells whose values come from further out
        self._lent: dict[Cell, list[Any]] = {}  # the leaves that containers held when they came here
        self.born: dict[Cell, None] = {}
        self.pinned: set[Cell] = set()  # read inside a raw transform: may not change any more
        self.restarted: set[Cell] = set()  # random streams that were set, not drawn from
        self.journal = Journal() if journal is None else journal
        self._stamp: Any = None  # the one in force inside, if there is one
        self._outside: Any = None  # and outside

    def __enter__(self) -> Self:
        self.trace = _compat.current_trace()
        frames.push(self)
        if self.trace is _compat.EVAL_TRACE:  # ordinary code goes on as it was: what JAX has compiled for it is found
            self._stamp = self._outside = _compat.stamp()
        else:
            self._stamp = Stamp()
            self._outside = _compat.swap_stamp(self._stamp)
        return self

    def __exit__(self, kind: type[BaseException] | None, _value: object, _trace: TracebackType | None) -> None:
        frames.pop(self)
        if self.trace is not None and self.trace is not _compat.EVAL_TRACE:  # and it has not ended before, by `commit`
            _compat.swap_stamp(latest(self._outside))
        if kind is not None:
            self.journal.undo()
        else:
            if self.parent is not None:
                self.parent.note_reads(cell for cell in self.seen if cell not in self.born)
            if (record := frames.recorder()) is not None:
                record(self)
        self.close()

    def close(self) -> None:
        """Let go of every tracer; what is wanted of it has been taken out before."""
        self.thread = None
        self.trace = self.outer = None
        self.values.clear()
        self._lent.clear()
        self.pinned.clear()

    # -- values ----------------------------------------------------------------------------------------------

    def read(self, cell: Cell, trace: Any) -> Any:
        """The value of a cell, read by code that runs at `trace`."""
        if cell._birth is None or cell in self.values:  # else it lives and dies with the raw transform that made it
            self.seen[cell] = None
        return self.load(cell, trace)

    def load(self, cell: Cell, trace: Any) -> Any:
        """The value of a cell, for a transform that is called by code that runs at `trace`."""
        value = self.values.get(cell, _MISSING)
        if value is _MISSING:
            value = self._miss(cell) if cell._birth is None else _load_local(self.parent, cell)
        if trace is not self.trace and (staging := staging_trace(cell, trace, self.trace)) is not None:
            check_stale(cell, staging, self._stamp)
            self._pin(cell)
        return value

    def load_many(self, cells: Sequence[Any]) -> list[Any]:
        """The values of cells, for a transform that is called by ordinary code, as `load` gives them one by one."""
        missing = [cell for cell in cells if cell not in self.values]
        loaded = zip(missing, load_many(missing), strict=True) if missing else ()
        found = {cell: value for cell, value in loaded if value is not UNSET}
        if found:
            self.preload(found)
            self._through.update(found)
        return [self.values.get(cell, UNSET) for cell in cells]

    def write_many(self, cells: Sequence[Any], values: Sequence[Any]) -> None:
        """Give cells other values, on behalf of the code that the transaction is around, as `write` does one by one."""
        for cell in self.pinned.intersection(cells) if self.pinned else ():
            self._check_pin(cell, "written")
        self.preload(dict(zip(cells, values, strict=True)))
        counts = self.written
        for cell in cells:
            counts[cell] = counts.get(cell, 0) + 1
        self._through.difference_update(cells)

    def note_reads(self, cells: Iterable[Cell]) -> None:
        """Note that code further in has read these cells; one that a raw transform made there may hold its tracer."""
        self.seen.update({cell: None for cell in cells if cell._birth is None})

    def _miss(self, cell: Cell) -> Any:
        self.preload({cell: self.load_outer(cell)})
        self._through.add(cell)
        return self.values[cell]

    def _pin(self, cell: Cell) -> None:
        """Forbid further writes, here and in every level that this one read the value through."""
        self.pinned.add(cell)
        if cell in self._through and self.parent is not None:
            self.parent._pin(cell)

    def _check_pin(self, cell: Cell, what: str) -> None:
        if cell in self.pinned:
            raise TraceLevelError(
                f"state {naming.describe(cell)} was {what} after a raw JAX transform had read it",
                path=naming.path_of(cell),
                where=self.label,
                made_at=naming.made_at(cell),
                cure="JAX may reuse the raw transform's program with the old value. Use the transform of the same name "
                "in `mu` (`mu.scan` for `jax.lax.scan`, ...), or write the state before the raw transform.",
            )

    def preload(self, values: Mapping[Any, Any]) -> None:
        """Put values into the overlay that count as read, not written, unless they are changed in place."""
        self.values.update(values)
        for cell, value in values.items():
            if type(value) in _CONTAINERS:
                self._hold(cell, _fresh(value))
            elif self._lent:
                self._lent.pop(cell, None)

    def _hold(self, cell: Cell, value: Any) -> None:
        self.values[cell] = value
        if type(value) in _CONTAINERS:
            self._lent[cell] = jax.tree.leaves(value)
        elif self._lent:
            self._lent.pop(cell, None)

    def load_outer(self, cell: Cell) -> Any:
        """The value of a cell further out: where the transaction was opened."""
        parent = self.open_parent()
        return load_committed(cell, self.outer, self._outside) if parent is None else parent.load(cell, self.outer)

    def depend(self, trace: Any) -> None:
        """Note that code that runs at `trace` depends on a setting here, which is no state, as if it read one."""
        if trace is not self.trace and (staging := _compat.staging_trace(trace, self.trace)) is not None:
            retire(self._stamp, staging)
        parent = self.open_parent()
        if parent is not None:
            parent.depend(self.outer)
        elif (staging := _compat.staging_trace(self.outer)) is not None:
            retire(self._outside, staging)

    def write(self, cell: Cell, value: Any, trace: Any) -> None:
        """Give a cell another value, on behalf of code that runs at `trace`."""
        if trace is not self.trace and trace is not _compat.EVAL_TRACE:
            if is_local(cell, trace):
                cell._value = value
                return
            raise write_refused(cell, trace)
        self._check_pin(cell, "written")
        self._hold(cell, value)
        self.written[cell] = self.written.get(cell, 0) + 1
        self._through.discard(cell)

    def create(self, cell: Cell, value: Any) -> None:
        """Give a cell that was made just now its first value."""
        self._hold(cell, value)
        self.written[cell] = 1
        self.born[cell] = None

    def adopt(self, cells: Iterable[Cell]) -> None:
        """Count those cells as made here that JAX has made of pytrees in this trace, since they are handed out."""
        for cell in cells:
            if cell._birth is not None and cell._birth() is self.trace and cell not in self.values:
                value, cell._birth = cell._value, None
                self.create(cell, value)

    def drop(self, selects: Callable[[Cell], bool]) -> None:
        """Forget what was written to cells, but for those that were made here."""
        cells = [cell for cell in {**self.written, **self._lent} if cell not in self.born and selects(cell)]
        for cell in cells:
            if cell in self.written:
                self._check_pin(cell, "rolled back")
        for cell in cells:
            for known in (self.written, self.values, self._lent):
                known.pop(cell, None)

    def note_changes_in_place(self) -> None:
        """Count values that were changed in place (dictionaries, lists) as written. Call it before the end."""
        for cell, before in self._lent.items():
            after = jax.tree.leaves(self.values[cell])
            if len(before) != len(after) or any(a is not b for a, b in zip(before, after, strict=True)):
                self.values[cell] = cell.admit(self.values[cell])
                self._lent[cell] = after
                self.written[cell] = self.written.get(cell, 0) + 1
                self.restart(cell)

    def disown(self, cells: Iterable[Cell]) -> None:
        """Let go of cells that were made here, as if they had never been."""
        for cell in cells:
            for known in (self.values, self.seen, self.written, self.born, self._lent):
                known.pop(cell, None)
            for others in (self._through, self.pinned, self.restarted):
                others.discard(cell)

    def restart(self, cell: Cell) -> None:
        """Note that a cell was given a value that does not continue the one it had, here and so further out."""
        self.restarted.add(cell)
        if self.parent is not None:
            self.parent.restart(cell)


class tracing:
    """A block of ordinary code in which JAX traces: whatever happens in it, it leaves nothing open.

    Signal handlers run as if in front of it: they find committed values, and models as they were.

    Args:
      journal: where the changes of structure are noted that the block makes.
    """

    __slots__ = ("_diverted", "_frame", "_journal", "_stamp")

    def __init__(self, journal: Journal | None = None) -> None:
        self._journal = journal
        self._diverted: list[Any] | None = None

    def __enter__(self) -> None:
        if _compat.current_trace() is _compat.EVAL_TRACE:
            self._frame = frames.innermost()
            self._stamp = _compat.stamp()
            self._diverted = divert(self._in_front)

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        if self._diverted is None:
            return
        undivert(self._diverted)
        if kind is not None:  # an interrupt may have kept from ending what began inside
            _compat.restore_eager_trace()
            for tx in frames.up_to(self._frame):
                tx.close()
            frames.reset(self._frame)
            if _compat.stamp() is not self._stamp:
                _compat.swap_stamp(latest(self._stamp) if type(self._stamp) is Stamp else _compat.NO_STAMP)

    @contextlib.contextmanager
    def _in_front(self) -> Iterator[None]:
        journals = [tx.journal for tx in frames.up_to(self._frame)]
        if self._journal is not None:
            journals.append(self._journal)
        with contextlib.ExitStack() as stack:
            for journal in {id(journal): journal for journal in journals}.values():
                stack.enter_context(journal.put_aside())
            stack.enter_context(frames.at_frame(self._frame))
            stack.enter_context(stamped(None))
            stack.enter_context(_compat.at_trace(_compat.EVAL_TRACE))
            yield


def _fresh(value: Any) -> Any:
    """Plain containers anew, so that a change in place is seen and reaches nobody else."""
    if type(value) in _CONTAINERS:
        return jax.tree.map(lambda leaf: leaf, value)
    return value


def _load_local(tx: Transaction | None, cell: Cell) -> Any:
    """The value of a cell that was made under a raw transform: it is in the cell, unless a transaction overlays it."""
    while tx is not None:
        if cell in tx.values:
            return tx.values[cell]
        tx = tx.parent
    return cell._value
