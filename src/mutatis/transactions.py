"""The transaction: what every transform of Mutatis is.

A transaction is an overlay on the cells. While it is open on this thread,

- a **read** finds the value in the innermost overlay that has it, else further out, else the committed one;
- a **write** goes to the innermost overlay;
- when it ends well, its writes move one level out (the outermost commits them to the cells);
- when it ends in an exception, they are dropped, and changes of structure are undone from a journal.

A transform opens one inside the function that it hands to JAX. So there are two traces to know: `outer`, where
the transform was called, and `trace`, where its function runs. Each level checks that the trace of a read or write
is its own; one that is not belongs to a *raw* JAX transform in between. A write there would be lost or would leak,
and a read might be kept by a program that JAX reuses after the state has changed: both are `TraceLevelError`.

What happens on a miss is the transform's choice: most read further out (`Transaction.fetch`), a compiled program
notes that it needs the cell as an input, `vmap` gives each lane its own random stream.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import jax

from mutatis import _compat
from mutatis.cells import UNSET, Cell, Deferred, peek, poke, structure
from mutatis.errors import TraceLevelError
from mutatis.naming import path_by_search

_MISSING = object()
_CONTAINERS = (dict, list, tuple)


class _Open(threading.local):
    def __init__(self) -> None:
        self.top: Transaction | None = None
        self.recorder: Callable[[Transaction], None] | None = None


_open = _Open()


def current() -> Transaction | None:
    """The innermost open transaction of this thread."""
    return _open.top


@contextlib.contextmanager
def recorded(recorder: Callable[[Transaction], None]) -> Iterator[None]:
    """Hand each transaction of this thread that ends well to a function, the inner ones first."""
    before, _open.recorder = _open.recorder, recorder
    try:
        yield
    finally:
        _open.recorder = before


def is_recorded() -> bool:
    """Whether transactions are recorded, so that what is known already has to be traced again."""
    return _open.recorder is not None


class Transaction:
    """An overlay on the cells.

    Args:
      label: what it is, for messages: ``jit(train_step)``.
      locate: finds the printed path of a cell among what the transform was given.
      outer: the trace at which the transform was called, if that is not the one of now.
      compiled: whether the function is traced into a program that is kept and reused.
    """

    __slots__ = (
        "_lent",
        "_through",
        "born",
        "compiled",
        "journal",
        "label",
        "locate",
        "outer",
        "parent",
        "pinned",
        "repeats",
        "restarted",
        "seen",
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
        compiled: bool = False,
    ) -> None:
        self.label = label
        self.locate = locate
        self.parent: Transaction | None = _open.top
        self.compiled: bool = compiled or (self.parent is not None and self.parent.compiled)
        self.outer = _compat.current_trace() if outer is None else outer
        self.trace: Any = None
        self.repeats: int | None = 1  # how often what runs here once is run in a call; None if that is not known
        self.values: dict[Cell, Any] = {}
        self.seen: dict[Cell, None] = {}  # what the function read, here and further in
        self.written: dict[Cell, int] = {}  # and wrote, how often
        self._through: set[Cell] = set()  # cells whose values come from further out
        self._lent: dict[Cell, list[Any]] = {}  # the leaves that containers held when they came here
        self.born: dict[Cell, None] = {}
        self.pinned: set[Cell] = set()  # read inside a raw transform: may not change any more
        self.restarted: set[Cell] = set()  # random streams that were set, not drawn from
        self.journal: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Self:
        self.trace = _compat.current_trace()
        _open.top = self
        return self

    def __exit__(self, kind: type[BaseException] | None, _value: object, _trace: TracebackType | None) -> None:
        _open.top = self.parent
        if kind is not None:
            self.undo()
        else:
            if self.parent is not None:
                self.parent.note_reads(self.seen)
            if _open.recorder is not None:
                _open.recorder(self)
        self.close()

    def close(self) -> None:
        """Let go of every tracer; what is wanted of it has been taken out before."""
        self.trace = self.outer = None
        self.values.clear()
        self._lent.clear()
        self.pinned.clear()

    # -- values ----------------------------------------------------------------------------------------------

    def read(self, cell: Cell, trace: Any) -> Any:
        """The value of a cell, read by code that runs at `trace`."""
        if cell._birth is None or cell in self.values:  # else it lives and dies with the raw transform that made it
            self.seen[cell] = None
        return self.look(cell, trace)

    def look(self, cell: Cell, trace: Any) -> Any:
        """The same for a transform, which hands the value to code that may read it."""
        value = self.values.get(cell, _MISSING)
        if value is _MISSING and cell._birth is not None:
            return _read_local(self.parent, cell)
        if trace is not self.trace:
            if value is _MISSING:
                value = self._miss(cell)
            if _compat.is_staging(trace):
                if not self.compiled and _is_concrete(value):
                    _check_stale(cell, trace)
                self._pin(cell)
            return value
        return self._miss(cell) if value is _MISSING else value

    def note_reads(self, cells: Iterable[Cell]) -> None:
        """Note that code further in has read these cells; one that a raw transform made there may hold its tracer."""
        self.seen.update({cell: None for cell in cells if cell._birth is None})

    def _miss(self, cell: Cell) -> Any:
        self.fill({cell: self.fetch(cell)})
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
                f"state {describe(cell)} was {what} after a raw JAX transform had read it",
                path=path_of(cell),
                where=self.label,
                made_at=made_at(cell),
                cure="JAX may reuse the raw transform's program with the old value. Use the transform of the same name "
                "in `mu` (`mu.scan` for `jax.lax.scan`, ...), or write the state before the raw transform.",
            )

    def fill(self, values: Mapping[Any, Any]) -> None:
        """Put values into the overlay that count as read, not written, unless they are changed in place."""
        for cell, value in values.items():
            self._hold(cell, _fresh(value))

    def _hold(self, cell: Cell, value: Any) -> None:
        self.values[cell] = value
        if type(value) in _CONTAINERS:
            self._lent[cell] = jax.tree.leaves(value)
        else:
            self._lent.pop(cell, None)

    def fetch(self, cell: Cell) -> Any:
        """What a cell holds further out."""
        return read_outside(self, cell)

    def write(self, cell: Cell, value: Any, trace: Any) -> None:
        """Give a cell another value, on behalf of code that runs at `trace`."""
        if trace is not self.trace and trace is not _compat.EVAL_TRACE:
            if _is_local(cell, trace):
                cell._value = value
                return
            raise _write_refused(cell, trace)
        self._check_pin(cell, "written")
        self._hold(cell, value)
        self.written[cell] = self.written.get(cell, 0) + 1
        self._through.discard(cell)

    def adopt(self, cell: Cell, value: Any) -> None:
        """Take in a cell that was made just now."""
        self._hold(cell, value)
        self.written[cell] = 1
        self.born[cell] = None

    def commit(self) -> None:
        """Move the writes one level out."""
        for cell in self.written:
            write_outside(self, cell, self.values[cell])
        if self.parent is None:
            committed(self.written)

    def drop(self, selects: Callable[[Cell], bool]) -> None:
        """Forget what was written to cells, but for those that were made here."""
        cells = [cell for cell in {**self.written, **self._lent} if cell not in self.born and selects(cell)]
        for cell in cells:
            if cell in self.written:
                self._check_pin(cell, "rolled back")
        for cell in cells:
            for known in (self.written, self.values, self._lent):
                known.pop(cell, None)

    def settle(self) -> None:
        """Count values that were changed in place (dictionaries, lists) as written. Call it before the end."""
        for cell, before in self._lent.items():
            after = jax.tree.leaves(self.values[cell])
            if len(before) != len(after) or any(a is not b for a, b in zip(before, after, strict=True)):
                self.values[cell] = cell.admit(self.values[cell])
                self._lent[cell] = after
                self.written[cell] = self.written.get(cell, 0) + 1
                self.restart(cell)

    def restart(self, cell: Cell) -> None:
        """Note that a cell was given a value that does not continue the one it had, here and so further out."""
        self.restarted.add(cell)
        if self.parent is not None:
            self.parent.restart(cell)

    # -- structure -------------------------------------------------------------------------------------------

    def note(self, obj: Any, name: str, old: Any) -> None:
        """Note an attribute's old value, before it changes."""
        self.journal.append((obj, name, old))

    def undo(self) -> None:
        """Put every attribute and container that this transaction changed back as it was."""
        undo(self.journal)
        self.journal.clear()


ABSENT = object()


class Removed:
    """What a journal says of an attribute that was removed: its value, and the order of all attributes."""

    __slots__ = ("order", "value")

    def __init__(self, value: Any, order: tuple[str, ...]) -> None:
        self.value = value
        self.order = order


def undo(journal: list[tuple[Any, str, Any]]) -> None:
    """Put back what journal entries say, the latest first."""
    if not journal:
        return
    structure.changed()
    for obj, name, old in reversed(journal):
        put_back(obj, name, old)
    structure.changed()


def put_back(obj: Any, name: str, old: Any) -> None:
    """Set what a journal entry says: an attribute of an object (or its absence), or all that a list or dict holds."""
    if isinstance(obj, list):
        obj[:] = old
    elif isinstance(obj, dict):
        obj.clear()
        obj.update(old)
    elif isinstance(obj, Cell):
        setattr(obj, name, old)  # a mark
    elif old is ABSENT:
        obj.__dict__.pop(name, None)
    elif isinstance(old, Removed):
        obj.__dict__[name] = old.value
        reorder(obj.__dict__, old.order)
    else:
        obj.__dict__[name] = old


def reorder(attributes: dict[str, Any], order: Iterable[str]) -> None:
    """Bring attributes into an order, which is part of a structure; further ones come last."""
    ordered = {name: attributes[name] for name in order if name in attributes} | attributes
    attributes.clear()
    attributes.update(ordered)


# -- reads and writes of the code that runs now ---------------------------------------------------------------


def read(cell: Cell) -> Any:
    """The value of a cell, read by the code that runs now."""
    tx = _open.top
    trace = _compat.current_trace()
    return _read_committed(cell, trace) if tx is None else tx.read(cell, trace)


def look(cell: Cell) -> Any:
    """The same for a transform, which hands the value to code that may read it."""
    tx = _open.top
    trace = _compat.current_trace()
    return _read_committed(cell, trace) if tx is None else tx.look(cell, trace)


def note_reads(cells: Iterable[Cell]) -> None:
    """Note that a program, which has been called for the code that runs now, reads these cells."""
    if _open.top is not None:
        _open.top.note_reads(cells)


def read_all(cells: Sequence[Cell]) -> list[Any]:
    """The values of cells for the code that runs now; `UNSET` where there is none."""
    if is_outside():
        return list(map(peek, cells))
    return [read(cell) if holds_value(cell) else UNSET for cell in cells]


def is_outside() -> bool:
    """Whether the code that runs now is in no transaction and no JAX transform: to read and write is to load and store."""
    return _open.top is None and _compat.current_trace() is _compat.EVAL_TRACE


def write(cell: Cell, value: Any) -> None:
    """Give a cell another value, for the code that runs now."""
    tx = _open.top
    trace = _compat.current_trace()
    if tx is not None:
        tx.write(cell, value, trace)
        return
    _write_committed(cell, value, trace)
    if observers:
        committed((cell,))


def write_all(cells: Sequence[Cell], values: Sequence[Any]) -> None:
    """Give cells other values, together, for the code that runs now."""
    if not is_outside():
        for cell, value in zip(cells, values, strict=True):
            write(cell, value)
        return
    pairs = zip(cells, values, strict=True)
    same = all(cell._birth is not None or _same_kind(cell._value, value) for cell, value in pairs)
    if not same:
        structure.changed()
    for cell, value in zip(cells, values, strict=True):
        poke(cell, value)
    if not same:
        structure.changed()
    committed(cells)


observers: weakref.WeakKeyDictionary[Cell, tuple[Callable[[], None], ...]] = weakref.WeakKeyDictionary()


def committed(cells: Iterable[Cell]) -> None:
    """Tell the observers of cells that these have been given values, all of them."""
    for cell in cells if observers else ():
        for notify in observers.get(cell, ()):
            notify()


def restart(cell: Cell) -> None:
    """Note that a random stream is set, not drawn from; see `Transaction.restart`."""
    if _open.top is not None:
        _open.top.restart(cell)


def create(cell: Cell, value: Any) -> None:
    """Give a new cell its first value."""
    tx = _open.top
    trace = _compat.current_trace()
    if tx is not None and (trace is tx.trace or trace is _compat.EVAL_TRACE):
        tx.adopt(cell, value)
    else:
        place(cell, value)


def place(cell: Cell, value: Any) -> None:
    """Give a cell that JAX makes its value, outside every transaction; it belongs to the trace that runs now."""
    trace = _compat.current_trace()
    if trace is not _compat.EVAL_TRACE:
        cell._birth = _compat.weak_trace(trace)
    cell._value = value


def birth() -> Any:
    """A weak reference to the raw transform that is tracing, to which what is made now belongs; None outside of any."""
    trace = _compat.current_trace()
    if trace is _compat.EVAL_TRACE:
        return None
    tx = _open.top
    return None if tx is not None and trace is tx.trace else _compat.weak_trace(trace)


def check_outlived(obj: Any, name: str) -> None:
    """Raise if an object is to hold a state that is made under a raw transform, which the object outlives.

    Raises:
      TraceLevelError: it is.
    """
    now = birth()
    if now is None or (obj._birth is not None and obj._birth() is now()):
        return
    owner = type(obj).__name__
    raw = _compat.raw_transform_name(now())
    raise TraceLevelError(
        f"`{owner}.{name}` was set to a state that is made inside a raw JAX transform ({raw})",
        path=f"{owner}.{name}",
        where=where(),
        cure="It would hold a tracer when the transform is over. Use the transform of the same name in `mu` (`mu.jit`, "
        "`mu.grad`, `mu.vmap`, ...), or make the state before.",
    )


def read_outside(tx: Transaction, cell: Cell) -> Any:
    """What a cell holds outside a transaction, where that was opened."""
    if tx.parent is None:
        return _read_committed(cell, tx.outer)
    return tx.parent.look(cell, tx.outer)


def write_outside(tx: Transaction, cell: Cell, value: Any) -> None:
    """Give a cell another value outside a transaction, where that was opened."""
    if tx.parent is None:
        _write_committed(cell, value, tx.outer)
    else:
        tx.parent.write(cell, value, tx.outer)


def holds_value(cell: Cell) -> bool:
    """Whether a cell has a value (or a placeholder for one) for the code that runs now."""
    return glimpse(cell) is not UNSET


def is_deferred(cell: Cell) -> bool:
    """Whether a cell has no value yet for the code that runs now."""
    value = glimpse(cell)
    return value is UNSET or type(value) is Deferred


def glimpse(cell: Cell) -> Any:
    """The value of a cell, only to look at what kind of thing it is: this is no read, and nobody's hold on it changes."""
    tx = _open.top
    while tx is not None:
        if cell in tx.values:
            return tx.values[cell]
        tx = tx.parent
    return cell._value


def glimpse_all(cells: Sequence[Cell]) -> list[Any]:
    """The same for many."""
    return [cell._value for cell in cells] if _open.top is None else list(map(glimpse, cells))


def _read_committed(cell: Cell, trace: Any) -> Any:
    value = peek(cell)
    if trace is not _compat.EVAL_TRACE and _compat.is_staging(trace) and not _is_local(cell, trace):
        _check_stale(cell, trace)
    return value


def _write_committed(cell: Cell, value: Any, trace: Any) -> None:
    if trace is not _compat.EVAL_TRACE and not _is_local(cell, trace):
        raise _write_refused(cell, trace)
    same = cell._birth is not None or _same_kind(cell._value, value)
    if not same:
        structure.changed()
    poke(cell, value)
    if not same:
        structure.changed()


def _is_local(cell: Cell, trace: Any) -> bool:
    """Whether a cell was made under the raw transform that is tracing, and so lives and dies with it."""
    return cell._birth is not None and cell._birth() is trace


def _read_local(tx: Transaction | None, cell: Cell) -> Any:
    """The value of a cell that was made under a raw transform: it is in the cell, unless a transaction overlays it."""
    while tx is not None:
        if cell in tx.values:
            return tx.values[cell]
        tx = tx.parent
    return cell._value


def _is_concrete(value: Any) -> bool:
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value))


def _fresh(value: Any) -> Any:
    """Plain containers anew, so that a change in place is seen and reaches nobody else."""
    if type(value) in _CONTAINERS:
        return jax.tree.map(lambda leaf: leaf, value)
    return value


def _same_kind(old: Any, new: Any) -> bool:
    """Whether a program that was compiled for one value fits the other: type and placement are the same."""
    if type(old) is _compat.ARRAY and type(new) is _compat.ARRAY:
        x, y = old.sharding, new.sharding
        return (old.aval is new.aval or bool(old.aval == new.aval)) and (x is y or bool(x == y))
    before, tree = jax.tree.flatten(old)
    after, other = jax.tree.flatten(new)
    return tree == other and all(
        isinstance(a, jax.Array) and isinstance(b, jax.Array) and a.aval == b.aval and a.sharding == b.sharding
        for a, b in zip(before, after, strict=True)
    )


def _placement(value: Any) -> Any:
    """Where the leaves live, if on several devices: that is part of what a program is compiled for."""
    shardings = [leaf.sharding for leaf in jax.tree.leaves(value) if isinstance(leaf, jax.Array)]
    spread = [s for s in shardings if type(s) is not jax.sharding.SingleDeviceSharding]
    return spread if spread else None


def placement(cell: Cell) -> tuple[Any, ...] | None:
    """The shardings of a cell's leaves for the code that runs now, if on several devices."""
    tx = _open.top
    while tx is not None:
        if cell in tx.values:
            return None  # a tracer's placement belongs to the enclosing program
        tx = tx.parent
    spread = None if cell._birth is not None else _placement(cell._value)
    return None if spread is None else tuple(spread)


def _check_stale(cell: Cell, trace: Any) -> None:
    if getattr(cell, "frozen", False):
        return
    raise TraceLevelError(
        f"state {describe(cell)} was read inside a raw JAX transform ({_compat.raw_transform_name(trace)})",
        path=path_of(cell),
        made_at=made_at(cell),
        cure="JAX would keep this value in a program that it reuses after the state has changed. Use the transform of the "
        "same name in `mu` (`mu.jit`, `mu.scan`, ...; `mu.custom_vjp` for a rule), pass `cell.value` in as an argument, use "
        "`mu.functionalize`, or declare it constant with `with mu.freeze(model): ...`.",
    )


def _write_refused(cell: Cell, trace: Any) -> TraceLevelError:
    raw = _compat.raw_transform_name(trace)
    return TraceLevelError(
        f"state {describe(cell)} was written inside a raw JAX transform ({raw})",
        path=path_of(cell),
        made_at=made_at(cell),
        cure="The write would be lost or leak a tracer. Use the transform of the same name in `mu` (`mu.jit`, `mu.grad`, "
        "`mu.vmap`, `mu.scan`, ...; `mu.custom_vjp` for a rule), or make a pure function with `mu.functionalize`.",
    )


# -- names of cells, for messages only ------------------------------------------------------------------------


def path_of(cell: Cell) -> str | None:
    """The path of a cell in what the open transforms were given, else in the live modules."""
    tx = _open.top
    while tx is not None:
        if tx.locate is not None and (path := tx.locate(cell)) is not None:
            return path
        tx = tx.parent
    return path_by_search(cell)


def describe(cell: Cell) -> str:
    """``state `model.w` (Param)``, less the word state."""
    path = path_of(cell) or getattr(cell, "name", None)
    kind = type(cell).__name__
    return f"`{path}` ({kind})" if path else f"({kind} without a place in a model)"


def made_at(cell: Cell) -> str | None:
    """Where the cell was made."""
    return getattr(cell, "made_at", None)


def where() -> str | None:
    """The transforms that are open on this thread: ``jit(train_step) > scan(body)``."""
    labels: list[str] = []
    tx = _open.top
    while tx is not None:
        labels.append(tx.label)
        tx = tx.parent
    return " > ".join(reversed(labels)) or None
