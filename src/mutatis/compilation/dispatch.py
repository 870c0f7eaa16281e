"""Dispatch: the call of a compiled program over cells, and what may go wrong in the middle of it.

A launch takes the buffers of the cells, runs the program, and stores what it returns. Nothing but a piece of C code lies between
the program's end and the place where its results are safe, so that an interrupt comes before the launch or after it. Buffers
that user code may hold are copied first; what another thread writes meanwhile is the later write.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Sequence
from itertools import starmap
from typing import Any

import jax
import jax.numpy as jnp

from mutatis import _compat
from mutatis.compilation.binding import Binding
from mutatis.compilation.plan import DispatchPlan
from mutatis.compilation.program import Program
from mutatis.compilation.record import replay
from mutatis.core.cells import Cell, expose, give_back, my_lease
from mutatis.core.interrupts import held_back
from mutatis.core.structure import structure
from mutatis.model.variables import Variable

_set_value = Cell.__dict__["_value"].__set__  # the slot's own setter, written in C


def launch(
    binding: Binding, plan: DispatchPlan, flat: list[Any], compiled: Any = None, seconds: list[float] | None = None
) -> tuple[int, Sequence[Any], Sequence[Any]]:
    """Take the buffers, run, commit.

    Args:
      binding: which cells.
      split: how to call.
      flat: the values of the arguments.
      compiled: what to run in place of the split's own program.
      seconds: is given what compiling took, if this is the first call.
    """
    program, variant, written = binding.program, plan.variant, plan.written
    donating = bool(variant.donated) and (compiled is not None or _donation_is_safe())
    values: list[Any] = []
    jitted = variant.jitted if donating or not variant.donated else program.undonated
    if compiled is not None:
        jitted = compiled
    box: list[Any] = []
    lease = my_lease()
    exposed: list[int] = []
    try:
        plan.group.take(lease, donating, exposed)
        values += [cell._value for cell in binding.cells]
        if exposed and donating:
            _copy_exposed(values, plan, exposed)
        values += flat
        if plan.first is not None:
            started = time.perf_counter()
            jitted.lower(*values).compile()
            if seconds is not None:
                seconds.append(time.perf_counter() - started)
            with held_back():
                box.append(jitted(*values))
            variant.called.add(plan.first)
            plan.first = None
        else:
            # In one C call, so that an interrupt comes before the launch or after its results are kept.
            box.extend(starmap(jitted, (values,)))
        if variant.waits:
            jax.block_until_ready(box)
        number, new, made, leaves = _take_apart(box, program, values)
        if lease.broken:
            _commit_unbroken(lease, written, new)
        else:
            for cell, value in zip(written, new, strict=True):
                cell._value = value
        return number, made, leaves
    except BaseException:
        if box and not variant.waits:
            deque(map(_set_value, written, _take_apart(box, program, values)[1]), 0)
        else:
            expose([written[i] for i in exposed])
        raise
    finally:
        lease.busy = lease.broken = False  # before anything that an interrupt could keep from happening
        give_back(lease)
        if variant.retypes:
            structure.changed()


def rebuild_result(binding: Binding, number: int, made: Sequence[Any], leaves: Sequence[Any]) -> Any:
    """The user's result, and what became of structure."""
    record = binding.program.records[number]
    if record.plain and record.out.plain:
        return record.structure[0].unflatten(leaves)
    return replay(record, binding.cells, binding.live_objects(), made, leaves)


def _take_apart(box: list[Any], program: Program, values: list[Any]) -> tuple[int, Sequence[Any], Any, Any]:
    """What a program returned: the number of its record, the written values, and the arrays of the rest."""
    ((number, (new, made, leaves)),) = box[0].items()
    record = program.records[number]
    if not record.new.plain:
        new = record.new.decode(new, [values[index] for index in record.written])
    return number, new, made, leaves


def _commit_unbroken(lease: Any, written: list[Variable], new: Sequence[Any]) -> None:
    """Commit, except to cells that somebody else wrote while the program ran: theirs is the later write."""
    for cell, value in zip(written, new, strict=True):
        if cell._lease is lease:
            cell._value = value


_copies = jax.jit(lambda values: values)


def _copy(values: list[Any]) -> Any:
    """New buffers with the same contents, all made by one program."""
    if all(getattr(leaf, "is_fully_addressable", True) for leaf in jax.tree.leaves(values)):
        return _copies(values)
    # A program over an array that spans processes would have to be launched by all of them: copy shard by shard.
    return jax.tree.map(_copy_shards, values)


def _copy_exposed(values: list[Any], plan: DispatchPlan, exposed: list[int]) -> None:
    # A function of its own, as `core.interrupts` says of loops under a lock.
    places = [p for i in exposed if (p := plan.donating_at[i]) is not None]
    for place, value in zip(places, _copy([values[p] for p in places]), strict=True):
        values[place] = value


def _copy_shards(array: Any) -> Any:
    shards = [jnp.copy(shard.data) for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)


def _donation_is_safe() -> bool:
    return not _compat.checks_results() and _HAS_GIL


_HAS_GIL = getattr(sys, "_is_gil_enabled", lambda: True)()
