"""Tracing a program: the user's function is run on JAX's tracers, and what it did is written down in a record.

Structure is changed on the user's own objects while a function is traced, noted in the record, and undone before JAX goes on.
After the call, the first and every later one, `record.replay` does what the record says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mutatis.compilation.pending import PendingCall
from mutatis.compilation.program import NeedsTraceError, Program, refuse_outside_calls
from mutatis.compilation.record import OutputEncoding, TraceRecord
from mutatis.core.avals import same_type
from mutatis.core.cells import UNSET, Cell
from mutatis.core.journal import ABSENT, Journal
from mutatis.core.structure import structure_lock
from mutatis.core.transactions import Transaction
from mutatis.model.byhand import drop_traced, settle
from mutatis.model.graph import Encoder, Spec, cell_spec, made_modules
from mutatis.model.modules import Module
from mutatis.model.variables import Variable
from mutatis.tracing.arguments import FlatTree
from mutatis.tracing.scope import Scope


class FoundStates(BaseException):
    """Tracing found states that are not inputs; not an `Exception`, so that no user code catches it."""

    def __init__(self, cells: list[Variable]) -> None:
        self.cells = cells


class StaleBinding(BaseException):
    """Another thread changed the structure between the walk over it and the trace; not an `Exception`, as above."""


class CompiledTransaction(Transaction):
    """The transaction of a traced program: a cell that is not an input is noted, and tracing starts again with it."""

    __slots__ = ("found",)

    def __init__(self, label: str, scope: Scope, outer: Any) -> None:
        super().__init__(label, locate=scope.locate, outer=outer, journal=Journal(scope.containers), compiled=True)
        self.found: dict[Any, None] = {}

    def load_outer(self, cell: Cell) -> Any:
        """What the cell holds outside: good enough to trace on until all such cells are known."""
        value = super().load_outer(cell)
        self.found[cell] = None
        return value

    def write(self, cell: Cell, value: Any, trace: Any) -> None:
        """Write; a first write to a cell that is not an input finds it too."""
        if cell not in self.values and cell._birth is None:
            self.found[cell] = None
        super().write(cell, value, trace)


def trace(call: PendingCall, program: Program, flat: Sequence[Any]) -> dict[int, Any]:
    """Run the user's function on JAX's tracers, for a call; JAX calls this, through the pure function of a program.

    Args:
      call: the call.
      program: the program that is traced.
      flat: the tracers of the cells, and then of the leaves of the arguments.

    Returns:
      What the program returns: the number of the record, and the values.

    Raises:
      NeedsTraceError: the call holds a lease and should not trace.
      StaleBinding: another thread changed the structure meanwhile.
      FoundStates: the function reached states that are no inputs.
    """
    if call.program is not program:
        refuse_outside_calls(program, flat)
    if call.fast:
        raise NeedsTraceError
    call.traced = True
    with structure_lock:
        scope = call.walked = call.scope()
        if not call.bound_to(scope):
            raise StaleBinding
        result = _run(call, program, flat, scope)
        if scope.encoder.disturbed():
            raise StaleBinding
        return result


def _run(call: PendingCall, program: Program, flat: Sequence[Any], scope: Scope) -> dict[int, Any]:
    with CompiledTransaction(call.label, scope, call.outer) as tx:
        tx.preload(dict(zip(scope.cells, flat[: program.count], strict=True)))
        out = call.run(flat[program.count :])
        tx.note_changes_in_place()
        known, result = scope.encoder, FlatTree(out)
        settle([obj for obj in known.objects if isinstance(obj, Module)], known.held, tx.journal)
        drop_traced(made_modules(known, result.nodes, tx.journal))
        record = _record(program, scope, tx, result, flat)
        tx.journal.undo()
        if tx.found:
            raise FoundStates(list(tx.found))
        return {program.add(record): record.take_arrays()}


def _record(
    program: Program, scope: Scope, tx: CompiledTransaction, result: FlatTree, flat: Sequence[Any]
) -> TraceRecord:
    """Everything that the trace did."""
    known = scope.encoder
    encoder = Encoder(thread=True)
    encoder.know(known)
    changes: list[tuple[int, str | None, Spec | None]] = []
    noted = {(id(obj), name): (obj, name) for obj, name, _ in tx.journal.noted}.values()
    marked = {obj: None for obj, _ in noted if isinstance(obj, Variable) and obj in known.cells}
    marks = [(known.cells[cell], mark, getattr(cell, mark)) for cell in marked for mark in ("_frozen", "name")]
    for obj, name in noted:
        number = known.known(obj)
        if number is not None and isinstance(obj, Module):
            value = obj.__dict__.get(name, ABSENT)
            changes.append((number, name, None if value is ABSENT else encoder.encode(value, (name,))))
    for container, _ in tx.journal.changed_containers():
        number = known.known(container)
        if number is not None:
            changes.append((number, None, encoder.encode_contents(container)))
    nodes = tuple(encoder.encode(node, ("out",)) for node in result.nodes)
    tail = encoder.encode_references()

    # In the order of the inputs: JAX gives a result the first donated buffer of its type, which is to be its own.
    written: list[Any] = [cell for cell in known.cells if cell in tx.written]
    numbers = [known.cells[cell] for cell in written]
    new = [program.keep_placement(known.cells[cell], tx.values[cell]) for cell in written]
    same = [i for i, value in zip(numbers, new, strict=True) if same_type(flat[i], value, exact=True)]
    made_cells = list(encoder.cells)[program.count :]
    for cell in made_cells:
        if cell not in tx.born:
            tx.found[cell] = None
    made = [tx.values.get(cell, UNSET) for cell in made_cells]
    return TraceRecord(
        written=numbers,
        same_type=same,
        encodings=(
            OutputEncoding(new, [flat[number] for number in numbers]),
            OutputEncoding(made),
            OutputEncoding(program.options.constrain_outputs(result)),
        ),
        made=[(encoder.cells[cell], cell_spec(cell)) for cell in made_cells],
        structure=result.structure,
        nodes=nodes,
        tail=tail,
        changes=changes,
        marks=marks,
        restarted=[number for cell, number in known.cells.items() if cell in tx.restarted],
        seen=[number for cell, number in known.cells.items() if cell in tx.seen],
    )
