"""Committed values: reads and writes that reach the cells themselves, and what raw JAX transforms may not do there.

JAX keeps the programs of raw transforms that stage (jit, scan, while, cond, checkpoint): a state that is read inside one would go
stale in it without a word. A write inside any raw transform would be lost, or leave a tracer behind. Both are `TraceLevelError`.
A cell that was made inside a raw transform lives and dies with it, and may be read and written there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from mutatis import _compat
from mutatis.core import avals, naming
from mutatis.core.cells import Cell, load, store
from mutatis.core.structure import structure
from mutatis.errors import TraceLevelError

# By the identity of cells, whose `==` compares values: with a reference that takes the entry away when the cell dies.
observers: dict[int, tuple[weakref.ref[Cell], tuple[Callable[[], None], ...]]] = {}


def observe(cell: Cell, notices: tuple[Callable[[], None], ...]) -> None:
    """Say what is called when a cell has been given a value."""
    if notices:
        number = id(cell)
        observers[number] = weakref.ref(cell, lambda _: observers.pop(number, None)), notices
    else:
        observers.pop(id(cell), None)


def observers_of(cell: Cell) -> tuple[Callable[[], None], ...]:
    """What is called when a cell has been given a value."""
    entry = observers.get(id(cell))
    return () if entry is None else entry[1]


def notify(cells: Iterable[Cell]) -> None:
    """Tell the observers of cells that these have been given values, all of them."""
    for cell in cells if observers else ():
        for notice in observers_of(cell):
            notice()


def load_committed(cell: Cell, trace: Any) -> Any:
    """The committed value of a cell, for code that runs at `trace`.

    Raises:
      TraceLevelError: a raw transform would keep the value.
    """
    value = load(cell)
    if trace is not _compat.EVAL_TRACE and _compat.is_staging(trace) and not is_local(cell, trace):
        check_stale(cell, trace)
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
        structure.changed()
    store(cell, value)
    if not same:
        structure.changed()


def is_local(cell: Cell, trace: Any) -> bool:
    """Whether a cell was made under the raw transform that is tracing, and so lives and dies with it."""
    return cell._birth is not None and cell._birth() is trace


def check_stale(cell: Cell, trace: Any) -> None:
    """Raise, for a read inside a raw transform that stages, unless the state is frozen."""
    if getattr(cell, "frozen", False):
        return
    raise TraceLevelError(
        f"state {naming.describe(cell)} was read inside a raw JAX transform ({_compat.raw_transform_name(trace)})",
        path=naming.path_of(cell),
        made_at=naming.made_at(cell),
        cure="JAX would keep this value in a program that it reuses after the state has changed. Use the transform of the "
        "same name in `mu` (`mu.jit`, `mu.scan`, ...; `mu.custom_vjp` for a rule), pass `cell.value` in as an argument, use "
        "`mu.functionalize`, or declare it constant with `with mu.freeze(model): ...`.",
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
