"""Dispatch plans: a binding's cells divided for one way to call its program, and what a call's results mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mutatis.compilation.program import Program, Variant
from mutatis.compilation.record import TraceRecord
from mutatis.core.cells import Group
from mutatis.core.committed import observers
from mutatis.model.variables import Variable


class DispatchPlan:
    """What is decided beforehand about the calls with one binding: the variant of the program, and what goes where.

    Args:
      program: the program.
      cells: the binding's cells.
      variant: the variant.
      number: the number of the record.
      record: the record: what the call does besides writing values, and what it returns.
    """

    __slots__ = (
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
        self, program: Program, cells: list[Variable], variant: Variant, number: int, record: TraceRecord
    ) -> None:
        self.program = program
        self.variant = variant
        self.restructures = not record.plain
        # Of the result, if that is all which is to be done after a call.
        self.treedef: Any = record.structure[0] if record.plain and record.out.plain else None
        self.number = number
        self.first = None if number in variant.called else number  # JAX makes the first call of a program in Python
        self.written = [cells[i] for i in variant.written]
        self.observed = [cell for cell in self.written if cell in observers] if observers else []
        if self.observed:
            self.treedef = None
        taken = set(variant.written)
        self.group = Group(cells, self.written, [cell for i, cell in enumerate(cells) if i not in taken])
        self.donating_at = [i if i in variant.donated else None for i in variant.written]
        self.lands = bool(variant.donated) or not variant.waits

    def take_apart(
        self, box: list[Any], values: list[Any]
    ) -> tuple[int, Sequence[Any], Sequence[Any], Sequence[Any]]:
        """What the program returned: the number of its record, the written values, and the arrays of the rest.

        Args:
          box: holds what it returned.
          values: what it was called with.
        """
        ((number, (new, made, leaves)),) = box[0].items()
        record = self.program.records[number]
        if not record.new.plain:
            new = record.new.decode(new, [values[index] for index in record.written])
        return number, new, made, leaves

    def results(self, box: list[Any], values: list[Any]) -> Sequence[Any]:
        """The written values alone."""
        return self.take_apart(box, values)[1]
