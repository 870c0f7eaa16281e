"""Dispatch plans: a binding's cells divided for one way to call its program, and what a call's results mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mutatis.compilation.program import Program, Variant
from mutatis.compilation.record import TraceRecord
from mutatis.core import transactions
from mutatis.core.committed import observers
from mutatis.core.groups import Group
from mutatis.model.variables import Variable


class DispatchPlan:
    """What is decided beforehand about the calls with one binding: the variant of the program, and what goes where.

    Args:
      program: the program.
      cells: the binding's cells.
      ambient: which of them stand for the arrays of contexts, each with the context's number.
      variant: the variant.
      number: the number of the record.
      record: the record: what the call does besides writing values, and what it returns.
    """

    __slots__ = (
        "ambient",
        "donating_at",
        "first",
        "group",
        "lands",
        "number",
        "observed",
        "program",
        "restructures",
        "treedef",
        "variant",
        "written",
    )

    def __init__(
        self,
        program: Program,
        cells: list[Variable],
        ambient: list[tuple[int, int]],
        variant: Variant,
        number: int,
        record: TraceRecord,
    ) -> None:
        self.program = program
        self.ambient = ambient
        self.variant = variant
        self.restructures = not record.plain
        # Of the result, if that is all which is to be done after a call.
        self.treedef: Any = record.structure[0] if record.plain and record.out.plain else None
        self.number = number
        self.first = None if number in variant.called else number  # JAX makes the first call of a program in Python
        self.written = [cells[i] for i in variant.written]
        self.observed = [cell for cell in self.written if id(cell) in observers] if observers else []
        if self.observed:
            self.treedef = None
        taken = set(variant.written)
        self.group = Group(cells, self.written, [cell for i, cell in enumerate(cells) if i not in taken])
        self.donating_at = [i if i in variant.donated else None for i in variant.written]
        self.lands = bool(variant.donated) or not variant.waits

    def results(self, box: list[Any], values: list[Any]) -> Sequence[Any]:
        """The written values, of what the program returned into the box and was called with."""
        ((number, (new, _, _)),) = box[0].items()
        record = self.program.records[number]
        return new if record.new.plain else record.new.decode(new, [values[index] for index in record.written])

    def recall(self, values: list[Any], donating: bool) -> bool:
        """Keep a launch on these values from running or from counting, if it has not run; whether that was so.

        Args:
          values: what the program was called with, in the order of its arguments.
          donating: whether it deletes the arrays that it may.
        """
        if not donating:
            return not self.variant.waits
        places = sorted(self.variant.donated)
        arrays = jax.tree.leaves([values[place] for place in places])
        if any(array.is_deleted() for array in arrays):
            return False
        owners = [(self.group.cells[place], values[place]) for place in places]
        kept = [(cell, value) for cell, value in owners if cell._value is value]
        for (cell, _), new in zip(kept, copy_values([value for _, value in kept]), strict=True):
            cell._value = new
        for array in arrays:
            array.delete()
        return True


def copy_values(values: list[Any]) -> Any:
    """New buffers with the same contents, all made by one program."""
    leaves = jax.tree.leaves(values)
    if all(getattr(leaf, "is_fully_addressable", True) for leaf in leaves):
        types = tuple([leaf.aval for leaf in leaves])
        try:
            if types in _traced:
                return _copies(values)
            with transactions.tracing():  # a signal handler is to find no trace of ours
                copies = _copies(values)
            _traced.add(types)
            return copies
        except RecursionError:  # a signal handler that has interrupted JAX in compiling this very program
            return jax.tree.map(_copy_by_host, values)
    # A program over an array that spans processes would have to be launched by all of them: copy shard by shard.
    return jax.tree.map(_copy_shards, values)


_copies = jax.jit(lambda values: values)
_traced: set[tuple[Any, ...]] = set()  # the types that it was traced for


def _copy_by_host(array: Any) -> Any:
    return jax.device_put(np.array(array), array.sharding if array.committed else None)


def _copy_shards(array: Any) -> Any:
    # No program: under a mesh of all processes none runs on one device.
    shards = [jax.device_put(shard.data, shard.device, may_alias=False) for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)
