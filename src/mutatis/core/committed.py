"""Committed values: reads and writes that reach the cells themselves, and what raw JAX transforms may not do there.

JAX keeps the programs of raw transforms that stage (jit, scan, while, cond, checkpoint): a state that is read inside one would go
stale in it without a word. A write inside any raw transform would be lost, or leave a tracer behind. Both are `TraceLevelError`.
A cell that was made inside a raw transform lives and dies with it, and may be read and written there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from mutatis import _compat
from mutatis.core import avals, naming
from mutatis.core.cells import Cell, load, store
from mutatis.core.placements import kept
from mutatis.core.stamps import keep_constant, retire
from mutatis.core.structure import structure
from mutatis.errors import TraceLevelError

_NOW = object()
# By the identity of cells, whose `==` compares values: with a reference that takes the entry away when the cell dies.
Observer: TypeAlias = Callable[[list[Any]], None]  # is given those of its cells that one commit has written
observers: dict[int, tuple[weakref.ref[Cell], tuple[Observer, ...]]] = {}


def observe(cell: Cell, those: tuple[Observer, ...]) -> None:
    """Say what is called when a cell has been given a value."""
    if those:
        number, forget = id(cell), observers.pop  # at the end of a program the names of this module are gone
        observers[number] = weakref.ref(cell, lambda _: forget(number, None)), those
    else:
        observers.pop(id(cell), None)


def observers_of(cell: Cell) -> tuple[Observer, ...]:
    """What is called when a cell has been given a value."""
    entry = observers.get(id(cell))
    return () if entry is None else entry[1]


def notify(cells: Iterable[Cell]) -> None:
    """Tell the observers of cells that these have been given values, all of them: each observer once."""
    told: dict[int, tuple[Observer, list[Cell]]] = {}
    for cell in cells if observers else ():
        for observer in observers_of(cell):
            told.setdefault(id(observer), (observer, []))[1].append(cell)
    for observer, its_cells in told.values():
        observer(its_cells)


def load_committed(cell: Cell, trace: Any, stamp: Any = _NOW) -> Any:
    """The committed value of a cell, for code that runs at `trace`.

    Args:
      cell: the cell.
      trace: the trace.
      stamp: the stamp in force there (or None), if that is another place than here.

    Raises:
      TraceLevelError: a raw transform would keep the value.
    """
    value = load(cell)
    if trace is not _compat.EVAL_TRACE and (staging := staging_trace(cell, trace)) is not None:
        check_stale(cell, staging, _compat.stamp() if stamp is _NOW else stamp)
    return value


def store_committed(cell: Cell, value: Any, trace: Any) -> None:
    """Give a cell another committed value, on behalf of code that runs at `trace`.

    Raises:
      TraceLevelError: that is a raw transform.
    """
    if trace is not _compat.EVAL_TRACE and not is_local(cell, trace):
        raise write_refused(cell, trace)
    same = cell._birth is not None or avals.fits_program(cell._value, value)
    if not same:
        value = kept(cell._value, value)
        structure.changed(cell)
    store(cell, value)
    if not same:
        structure.changed(cell)


def is_local(cell: Cell, trace: Any) -> bool:
    """Whether a cell was made under the raw transform that is tracing, and so lives and dies with it."""
    return cell._birth is not None and cell._birth() is trace


def staging_trace(cell: Cell, trace: Any, ours: Any = None) -> Any:
    """The raw transform, between `trace` and our own `ours`, that would keep the value of a cell in a program; None without one.

    A cell that was made under a raw transform is as good as a value there.
    """
    return _compat.staging_trace(trace, ours, None if cell._birth is None else cell._birth())


def check_stale(cell: Cell, staging: Any, stamp: Any) -> None:
    """Have JAX never find the raw trace again in which a cell is read, or raise.

    Args:
      cell: the cell.
      staging: the trace of the raw transform.
      stamp: the stamp that was in force where the raw transform was entered, if there was one.

    Raises:
      TraceLevelError: there was none, and the state is not frozen.
    """
    if retire(stamp, staging):
        return
    if getattr(cell, "frozen", False):
        keep_constant(cell)
        return
    raise TraceLevelError(
        f"state {naming.describe(cell)} was read inside a raw JAX transform ({_compat.raw_transform_name(staging)})",
        path=naming.path_of(cell),
        made_at=naming.made_at(cell),
        cure="JAX would keep this value in a program that it reuses after the state has changed. Use the transform of the "
        "same name in `mu` (`mu.jit`, `mu.scan`, ...; `mu.custom_vjp` for a rule), pass `cell.value` in as an argument, use "
        "`mu.functionalize`, or say that it does not change meanwhile: `with mu.freeze(model): ...` around a call of a solver.",
    )


def write_refused(cell: Cell, trace: Any) -> TraceLevelError:
    """The error for a write inside a raw transform."""
    raw = _compat.raw_transform_name(trace)
    return TraceLevelError(
        f"state {naming.describe(cell)} was written inside a raw JAX transform ({raw})",
        path=naming.path_of(cell),
        made_at=naming.made_at(cell),
        cure="The write would be lost or leak a tracer. Use the transform of the same name in `mu` (`mu.jit`, `mu.grad`, "
        "`mu.vmap`, `mu.scan`, ...; `mu.custom_vjp` for a rule), or make a pure function with `mu.functionalize`.",
    )
