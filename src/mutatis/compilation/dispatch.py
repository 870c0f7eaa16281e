"""Dispatch: the call of a compiled program over cells, and what may go wrong in the middle of it.

A launch takes the buffers of the cells, runs the program, and stores what it returns. Nothing but a piece of C code lies between
the program's end and the place where its results are safe, so that an interrupt comes before the launch or after it. Buffers
that user code may hold are copied first; what another thread writes meanwhile is the later write. What a signal handler does
to the states meanwhile, `core.cells` tells.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Sequence
from itertools import starmap
from typing import Any

from mutatis import _compat
from mutatis.compilation.binding import Binding
from mutatis.compilation.plan import DispatchPlan, copy_values
from mutatis.compilation.program import Program
from mutatis.compilation.record import replay
from mutatis.core import access, checks
from mutatis.core.cells import LANDED, Cell, Lease, commit_rest, expose, give_back, my_lease, settle
from mutatis.core.interrupts import held_back
from mutatis.core.structure import structure
from mutatis.model import contexts

_set_value = Cell.__dict__["_value"].__set__  # the slot's own setter, written in C


def launch(
    plan: DispatchPlan, flat: list[Any], compiled: Any = None, seconds: list[float] | None = None
) -> tuple[int, Sequence[Any], Sequence[Any]]:
    """Take the buffers, run, commit.

    Args:
      plan: which cells, and how to call.
      flat: the values of the arguments.
      compiled: what to run in place of the plan's own program.
      seconds: is given what compiling took, if this is the first call.
    """
    variant = plan.variant
    donating = bool(variant.donated) and (compiled is not None or _donation_is_safe())
    jitted = variant.jitted if donating or not variant.donated else plan.program.undonated
    if compiled is not None:
        jitted = compiled
    first = plan.first
    if first is not None:
        _compile(plan, jitted, flat, seconds)
    while (outcome := _launch(plan, jitted, donating, flat, first)) is None:
        pass  # a signal handler used the states meanwhile
    return outcome


def _compile(plan: DispatchPlan, jitted: Any, flat: list[Any], seconds: list[float] | None) -> None:
    """Compile before the launch, without the leases: nobody waits for that."""
    started = time.perf_counter()
    while (lowered := _lower(plan, jitted, flat)) is None:
        pass  # a signal handler used the states meanwhile
    lowered.compile()
    if seconds is not None:
        seconds.append(time.perf_counter() - started)


def _lower(plan: DispatchPlan, jitted: Any, flat: list[Any]) -> Any:
    """Lower, which looks at the arrays of the cells; None if they have been deleted."""
    lease = my_lease()
    box: list[Any] = []
    exposed: list[int] = []
    try:
        return jitted.lower(*plan.group.take(lease, plan, box, True, exposed), *flat)
    except RuntimeError as problem:
        if lease.flight is box or "deleted" not in str(problem):
            raise
        return None
    finally:
        if lease.flight is box:
            expose(lease, [plan.written[i] for i in exposed])
        lease.flight = None
        give_back(lease)


def _launch(
    plan: DispatchPlan, jitted: Any, donating: bool, flat: list[Any], first: int | None
) -> tuple[int, Sequence[Any], Sequence[Any]] | None:
    """Try to launch; None if somebody used the states while it was prepared."""
    variant, written = plan.variant, plan.written
    lease = my_lease()
    box: list[Any] = []
    exposed: list[int] = []
    try:
        values = plan.group.take(lease, plan, box, donating, exposed)
        if plan.ambient or (exposed and donating):
            _replace(values, plan, exposed if donating else ())
        values += flat
        if first is None:
            call = starmap(jitted, (values,))
            lease.values = values
            # Python runs nothing between this look and the launch, nor between the program's end and `box`.
            if lease.flight is not box:
                return None
            box.extend(call)
        else:
            with held_back():
                lease.values = values
                if lease.flight is not box:
                    return None
                box.append(jitted(*values))
            variant.called.add(first)
            plan.first = None
        if variant.waits:
            checks.wait_for(box)
        ((number, (new, made, leaves)),) = box[0].items()
        new = new if plan.program.records[number].new.plain else plan.results(box, values)
        landing = zip(written, new, strict=True)
        if lease.flight is not box:  # who interrupted us has committed it, or has recalled it
            if box[-1] is not LANDED:
                return None
        else:
            if lease.landing is None:
                lease.landing = landing
            if lease.overwritten or lease.landing is not landing:
                commit_rest(lease)
            else:
                for cell, value in landing:
                    cell._value = value
        return number, made, leaves
    except BaseException as problem:
        if _rescue(plan, lease, box, exposed, problem):
            return None
        if isinstance(problem, RecursionError) and not box and jitted is not plan.program.undonated:
            # A signal handler that has interrupted JAX in the middle of this very call: another `jax.jit` of the program.
            return _launch(plan, plan.program.undonated, False, flat, None)
        raise
    finally:
        lease.flight = None  # before anything that an interrupt could keep from happening
        give_back(lease)
        if variant.retypes:
            structure.changed(*written)


def _rescue(plan: DispatchPlan, lease: Lease, box: list[Any], exposed: list[int], problem: BaseException) -> bool:
    """After an exception: commit what has been computed, all in one C call; else put the leases right.

    Returns:
      Whether JAX raised because the launch was recalled: it is to begin again.
    """
    if lease.flight is not box:
        return not box and isinstance(problem, RuntimeError | ValueError) and "deleted" in str(problem)
    values = lease.values
    if not box or values is None or plan.variant.waits:
        expose(lease, [plan.written[i] for i in exposed])
    elif lease.overwritten:
        settle(lease)
    else:
        deque(map(_set_value, plan.written, plan.results(box, values)), 0)
    return False


def run_inside(plan: DispatchPlan, cells: Sequence[Cell], flat: list[Any]) -> tuple[int, Sequence[Any], Sequence[Any]]:
    """Run in a transaction: nothing is donated there, and what is written is committed at its end.

    Args:
      plan: how to call.
      cells: its cells, with those of the contexts of now.
      flat: the values of the arguments.
    """
    values = access.load_many(cells)
    if plan.variant.waits:
        checks.expect()
    return write_inside(plan.program, cells, values, plan.program.undonated(*values, *flat))


def write_inside(
    program: Program, cells: Sequence[Cell], values: Sequence[Any], returned: dict[int, Any]
) -> tuple[int, Sequence[Any], Sequence[Any]]:
    """Write what a program returned, in the transaction that is open here.

    Args:
      program: the program.
      cells: its cells.
      values: what it was called with.
      returned: what it returned.

    Returns:
      The number of its record, and the arrays of what was made and of the result.
    """
    ((number, (new, made, leaves)),) = returned.items()
    record = program.records[number]
    if not record.new.plain:
        new = record.new.decode(new, [values[index] for index in record.written])
    access.write_many([cells[index] for index in record.written], new)
    for index in record.restarted:
        access.restart(cells[index])
    access.note_reads([cells[index] for index in record.seen])
    return number, made, leaves


def rebuild_result(binding: Binding, program: Program, number: int, made: Sequence[Any], leaves: Sequence[Any]) -> Any:
    """The user's result, and what became of structure."""
    record = program.records[number]
    if record.plain and record.out.plain:
        return record.structure[0].unflatten(leaves)
    return replay(record, binding.cells, binding.live_objects(), binding.places, made, leaves)


def _replace(values: list[Any], plan: DispatchPlan, exposed: Sequence[int]) -> None:
    """Put the arrays of contexts, and copies of what user code may hold, in the place of what the cells hold."""
    now = contexts.cells() if plan.ambient else ()
    for index, number in plan.ambient:
        values[index] = now[number]._value
    places = [p for i in exposed if (p := plan.donating_at[i]) is not None]
    if not places:
        return
    for place, value in zip(places, copy_values([values[p] for p in places]), strict=True):
        values[place] = value


def _donation_is_safe() -> bool:
    return not _compat.checks_results() and _HAS_GIL


_HAS_GIL = getattr(sys, "_is_gil_enabled", lambda: True)()
