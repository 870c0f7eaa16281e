"""Dispatch plans: a binding's cells divided for one way to call its program."""

from __future__ import annotations

from typing import Any

from mutatis.compilation.program import Variant
from mutatis.compilation.record import TraceRecord
from mutatis.core.cells import Group
from mutatis.core.committed import observers
from mutatis.model.variables import Variable


class DispatchPlan:
    """What is decided beforehand about the calls with one binding: the variant of the program, and what goes where.

    Args:
      cells: the binding's cells.
      variant: the variant.
      number: the number of the record.
      record: the record: what the call does besides writing values, and what it returns.
    """

    __slots__ = ("donating_at", "first", "group", "number", "observed", "restructures", "treedef", "variant", "written")

    def __init__(self, cells: list[Variable], variant: Variant, number: int, record: TraceRecord) -> None:
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
        self.group = Group(self.written, [cell for i, cell in enumerate(cells) if i not in taken])
        self.donating_at = [i if i in variant.donated else None for i in variant.written]
