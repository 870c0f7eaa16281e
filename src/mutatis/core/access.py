"""Access: how the engine reads and writes cells for the code that runs now, through whatever transaction is open here.

The vocabulary, here and on `Transaction`:

| verb | what it does | counts as read or written | the array counts as handed out |
|---|---|---|---|
| `read`, `write` | what the user's code does | yes | yes |
| `load` | takes a value for a transform, which hands it to code that may then read it; `UNSET` if there is none | no | yes |
| `lent` | takes values for a block of ours | no | until the block ends |
| `peek` | looks at what kind of thing the value is, and lets go of it | no | no |
| `create` | gives a cell that was made just now its first value | as made | |
| `create_detached` | the same for a cell that JAX makes of a pytree, outside every transaction | no | |
| `preload` | fills an overlay with what JAX gives, before the code runs | no, until it is changed in place | |
| `commit_writes` | writes what a transform or transaction leaves, where it was called | as written and made | |

`load` and `store` of `cells` are below all of this: they know nothing of transactions. A handed-out array may still be held by
the user, so the next compiled step copies it instead of donating it. `..._many` takes several cells.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from mutatis import _compat
from mutatis.core import avals, cells, checks, naming
from mutatis.core.cells import UNSET, Cell, Deferred
from mutatis.core.committed import load_committed, notify, observers, store_committed
from mutatis.core.frames import innermost
from mutatis.core.placements import kept, replicated
from mutatis.core.structure import structure
from mutatis.core.transactions import Transaction
from mutatis.errors import TraceLevelError

_ARRAY = _compat.ARRAY


def is_outside() -> bool:
    """Whether the code that runs now is in no transaction and no JAX transform: to read and write is to load and store."""
    return innermost() is None and _compat.current_trace() is _compat.EVAL_TRACE


# -- reading ------------------------------------------------------------------------------------------------------


def read(cell: Cell) -> Any:
    """The value of a cell, for the user's code."""
    tx: Transaction | None = innermost()
    trace = _compat.current_trace()
    return load_committed(cell, trace) if tx is None else tx.read(cell, trace)


def convert(cell: Cell, how: Callable[[Any], Any]) -> Any:
    """What a function makes of a cell's array that holds none of it, such as a number: the array is not handed out."""
    if is_outside():
        value = cell._value
        if type(value) is _ARRAY:
            try:
                return how(value)
            except RuntimeError:  # a step of another thread, or one that this code interrupts, has deleted it meanwhile
                pass
    return how(cell.value)  # type: ignore[attr-defined]


def read_many(states: Sequence[Cell]) -> list[Any]:
    """The values of cells at one moment, for the user's code; `UNSET` where there is none."""
    if is_outside():
        return cells.load_many(states)
    return [read(cell) if holds_value(cell) else UNSET for cell in states]


def load(cell: Cell) -> Any:
    """The value of a cell, for a transform; its placeholder if it is deferred: nothing is created."""
    if not holds_value(cell):
        return UNSET
    tx: Transaction | None = innermost()
    trace = _compat.current_trace()
    return load_committed(cell, trace) if tx is None else tx.load(cell, trace)


def depend_on_setting() -> None:
    """Have a raw transform that is tracing depend on a setting that is read, which is no state, as on a state."""
    tx: Transaction | None = innermost()
    if tx is not None:
        tx.depend(_compat.current_trace())


def peek(cell: Cell) -> Any:
    """The value of a cell, only to look at what kind of thing it is."""
    tx: Transaction | None = innermost()
    while tx is not None:
        if cell in tx.values:
            return tx.values[cell]
        tx = tx.parent
    return cell._value


def peek_committed(cell: Cell) -> Any:
    """The committed value of a cell, only to look at what kind of thing it is."""
    return cell._value


def peek_many(states: Sequence[Cell]) -> list[Any]:
    """The values of cells, only to look at what kind of thing they are."""
    return [cell._value for cell in states] if innermost() is None else list(map(peek, states))


def load_many(states: Sequence[Cell]) -> list[Any]:
    """The values of cells, as `load` gives them."""
    tx: Transaction | None = innermost()
    if type(tx) is Transaction and _compat.current_trace() is _compat.EVAL_TRACE and tx.open_parent() is None:
        return tx.load_many(states)
    return list(map(load, states))


@contextlib.contextmanager
def lent(states: Sequence[Cell]) -> Iterator[list[Any]]:
    """The values of cells, for a block of ours that lets go of them: no step has to copy them after it."""
    if not is_outside():
        yield load_many(states)
        return
    loan = cells.Loan()
    try:
        yield cells.lend_many(states, loan)
    finally:
        loan.lent = False


class Lending:
    """Values that were lent to an object of ours: if it is dropped before anybody looks at them, no step has to copy them."""

    __slots__ = ("_loan",)

    def __init__(self, loan: cells.Loan) -> None:
        self._loan: cells.Loan | None = loan

    def keep(self) -> None:
        """They count as held by user code for good."""
        self._loan = None

    def __del__(self) -> None:
        if self._loan is not None:
            self._loan.lent = False


def lend(
    states: Sequence[Cell], inside: Callable[[Sequence[Cell]], list[Any]] = read_many
) -> tuple[list[Any], Lending | None]:
    """The values of cells, and what to keep beside them until somebody looks at them.

    Args:
      states: the cells.
      inside: what gives the values inside transforms and transactions, where nothing is lent.
    """
    if not is_outside():
        return inside(states), None
    loan = cells.Loan()
    return cells.lend_many(states, loan), Lending(loan)


def holds_value(cell: Cell) -> bool:
    """Whether a cell has a value (or a placeholder for one)."""
    return peek(cell) is not UNSET


def is_deferred(cell: Cell) -> bool:
    """Whether a cell has no value yet."""
    value = peek(cell)
    return value is UNSET or type(value) is Deferred


def is_made_here(cell: Cell) -> bool:
    """Whether a cell was made in a transform that is not over, and so is not known to outlive it."""
    tx: Transaction | None = innermost()
    while tx is not None:
        if cell in tx.born:
            return True
        tx = tx.parent
    return False


def placement(cell: Cell) -> tuple[Any, ...] | None:
    """The shardings of a cell's leaves, if on several devices; None in a trace: there it belongs to the program around."""
    tx: Transaction | None = innermost()
    while tx is not None:
        if cell in tx.values:
            return None
        tx = tx.parent
    return None if cell._birth is not None else avals.placement(cell._value)


def split_axes(cell: Cell) -> list[int]:
    """The axes along which the code that runs now sees a slice of a cell, the outermost transform's first."""
    axes = []
    tx: Transaction | None = innermost()
    while tx is not None:
        if cell in tx.split:
            axes.append(tx.split[cell])
        tx = tx.parent
    return axes[::-1]


def note_reads(states: Iterable[Cell]) -> None:
    """Note that a compiled program, which has been called for the code that runs now, reads these cells."""
    if (tx := innermost()) is not None:
        tx.note_reads(states)


# -- writing ------------------------------------------------------------------------------------------------------


def write(cell: Cell, value: Any) -> None:
    """Give a cell another value."""
    tx: Transaction | None = innermost()
    trace = _compat.current_trace()
    if tx is not None:
        tx.write(cell, value, trace)
        return
    store_committed(cell, value, trace)
    if observers:
        notify((cell,))


def write_many(states: Sequence[Cell], values: Sequence[Any]) -> None:
    """Give cells other values, together."""
    tx: Transaction | None = innermost()
    if type(tx) is Transaction and _compat.current_trace() is tx.trace:
        tx.write_many(states, values)
        return
    if not is_outside():
        for cell, value in zip(states, values, strict=True):
            write(cell, value)
        return
    checks.settle(values)
    pairs = zip(states, values, strict=True)
    others = [cell for cell, value in pairs if cell._birth is None and not avals.fits_program(cell._value, value)]
    if others:
        changed = set(others)
        values = [
            kept(cell._value, value) if cell in changed else value for cell, value in zip(states, values, strict=True)
        ]
        structure.changed(*others)
    cells.store_many(states, values)
    if others:
        structure.changed(*others)
    notify(states)


def move(states: Sequence[Cell], values: Sequence[Any]) -> None:
    """Give cells, from outside of transforms, the same values in other places."""
    structure.changed(*states)
    cells.store_many(states, values)
    structure.changed(*states)


def replicate(states: Sequence[Cell], mesh: Any) -> bool:
    """Put states, of which nobody has said where they are to be, on all devices of a mesh; whether there were any.

    A program over the mesh would bring them back there, and be traced again for that at its second call.
    """
    found = []
    for cell in states if mesh is not None else ():
        value = None if cell._birth is not None else replicated(cell._value, mesh)
        if value is not None:
            found.append((cell, value))
    if found:
        move([cell for cell, _ in found], [value for _, value in found])
    return bool(found)


def restart(cell: Cell) -> None:
    """Note that a random stream is set, not drawn from; see `Transaction.restart`."""
    if (tx := innermost()) is not None:
        tx.restart(cell)


def create(cell: Cell, value: Any) -> None:
    """Give a cell that was made just now its first value."""
    cell._shape = getattr(value, "shape", None)
    tx: Transaction | None = innermost()
    trace = _compat.current_trace()
    if tx is not None and (trace is tx.trace or trace is _compat.EVAL_TRACE):
        tx.create(cell, value)
    else:
        create_detached(cell, value)


def create_detached(cell: Cell, value: Any) -> None:
    """Give a cell its value outside every transaction; it belongs to the trace that runs now."""
    trace = _compat.current_trace()
    if trace is not _compat.EVAL_TRACE:
        cell._birth = _compat.weak_trace(trace)
    cell._value = value


def commit_writes(states: Iterable[Cell], born: Mapping[Cell, None], values: Iterable[Any]) -> None:
    """Write what a transform or transaction left in the cells that it wrote or made."""
    old = []
    for cell, value in zip(states, values, strict=True):
        if cell in born:
            create(cell, value)
        else:
            old.append((cell, value))
    write_many([cell for cell, _ in old], [value for _, value in old])


def commit(tx: Transaction) -> None:
    """End a transaction well and move everything that it did one level out: values, states, changes of structure.

    It is the last thing in the transaction's block. If it raises, everything is undone.
    """
    tx.note_changes_in_place()
    values = [tx.values[cell] for cell in tx.written]
    pinned = {*tx.pinned}
    tx.__exit__(None, None, None)
    try:
        commit_writes(tx.written, tx.born, values)
    except BaseException:
        tx.journal.undo()
        raise
    if (outer := innermost()) is not None:
        tx.journal.hand_over(outer.journal)
        outer.pinned |= pinned


# -- what is made under raw JAX -----------------------------------------------------------------------------------


def birth() -> Any:
    """A weak reference to the raw transform that is tracing, to which what is made now belongs; None outside of any."""
    trace = _compat.current_trace()
    if trace is _compat.EVAL_TRACE:
        return None
    tx: Transaction | None = innermost()
    return None if tx is not None and trace is tx.trace else _compat.weak_trace(trace)


def check_outlived(owner: str, born: Any, name: str) -> None:
    """Raise if an object is to hold a state that is made under a raw transform, which the object outlives.

    Args:
      owner: the name of the object's class.
      born: weak reference to the raw transform that it was made in itself, or None.
      name: the attribute.

    Raises:
      TraceLevelError: it is.
    """
    now = birth()
    if now is None or (born is not None and born() is now()):
        return
    raw = _compat.raw_transform_name(now())
    raise TraceLevelError(
        f"`{owner}.{name}` was set to a state that is made in a raw JAX transform ({raw})",
        path=f"{owner}.{name}",
        where=naming.where(),
        cure="It would hold a tracer when the transform is over. Use the transform of the same name in `mu` (`mu.jit`, "
        "`mu.grad`, `mu.vmap`, ...), or make the state before.",
    )
