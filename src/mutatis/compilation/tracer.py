"""Tracing a program: the user's function is run on JAX's tracers, and what it did is written down in a record.

Structure is changed on the user's own objects while a function is traced, noted in the record, and undone before JAX goes on.
After the call, the first and every later one, `record.replay` does what the record says.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from mutatis.compilation.pending import PendingCall
from mutatis.compilation.program import NeedsTraceError, Program
from mutatis.compilation.record import OutputEncoding, TraceRecord
from mutatis.compilation.shardings import constrain, of_node
from mutatis.core.avals import same_type
from mutatis.core.cells import UNSET, Cell
from mutatis.core.journal import Journal
from mutatis.core.leftovers import Leftovers
from mutatis.core.nodes import is_node
from mutatis.core.places import ABSENT, Place
from mutatis.core.structure import structure_lock
from mutatis.core.transactions import Transaction
from mutatis.errors import StructureError
from mutatis.model.byhand import drop_traced, note_by_hand
from mutatis.model.graph import Encoder, Spec, cell_spec, handed_out
from mutatis.model.modules import Module
from mutatis.model.variables import Variable
from mutatis.tracing.arguments import FlatTree, check_result
from mutatis.tracing.guards import refuse_moves
from mutatis.tracing.scope import Scope


class FoundStates(BaseException):
    """Tracing found states that are not inputs; not an `Exception`, so that no user code catches it."""

    def __init__(self, cells: list[Variable]) -> None:
        self.cells = cells


class StartsLate(BaseException):
    """Tracing gave states with `init` their first value, which could be an input; not an `Exception`, as above."""

    def __init__(self, cells: list[Variable]) -> None:
        self.cells = cells


class StaleBinding(BaseException):
    """Another thread changed the structure between the walk over it and the trace; not an `Exception`, as above."""


class CompiledTransaction(Transaction):
    """The transaction of a traced program: a cell that is not an input is noted, and tracing starts again with it."""

    __slots__ = ("found",)

    def __init__(self, label: str, scope: Scope, outer: Any) -> None:
        journal = Journal(scope.containers, scope.places)
        super().__init__(label, locate=scope.locate, outer=outer, journal=journal, compiled=True)
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
    if call.fast or call.program is not program:
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
        record = _run_once(call, program, flat, scope, tx)
        leftovers = _put_back(scope, tx)
        _refuse(leftovers, call)
        refuse_moves(call.binding.captures.guards, [*scope.cells, *scope.encoder.modules()], call.label)
        if tx.found:
            raise FoundStates(list(tx.found))
        if call.may_start and (late := _started(scope, tx)):
            raise StartsLate(late)
        return {program.add(record): record.take_arrays()}


def _refuse(leftovers: Leftovers, call: PendingCall) -> None:
    try:
        leftovers.refuse(call.label)
    except StructureError:
        if threading.active_count() == 1 or call.stale >= _GLANCES:
            raise
        raise StaleBinding from None  # the user's code in another thread may have held it for a moment


_GLANCES = 3  # traces after which what is left is no glance of another thread


def _started(scope: Scope, tx: CompiledTransaction) -> list[Variable]:
    """The states with `init` that got their first value in the trace."""
    return [c for c in scope.cells if c in tx.written and c._value is UNSET and c._init is not None]


def _run_once(
    call: PendingCall, program: Program, flat: Sequence[Any], scope: Scope, tx: CompiledTransaction
) -> TraceRecord:
    # A function: when it is over, nothing of ours holds what the user's function made and returned.
    out = call.run(flat[program.count :])
    tx.note_changes_in_place()
    known, result = scope.encoder, FlatTree(out)
    if known.disturbed():
        raise StaleBinding  # what another thread assigned is not to be taken for what the function put there by hand
    note_by_hand(known.modules(), known.held, tx.journal)
    walk = handed_out(result.nodes, tx.journal)
    drop_traced(module for module in walk.modules() if known.known(module) is None)
    tx.adopt(walk.cells)
    check_result(result, result.leaves, call.label)
    return _record(program, scope, tx, result, flat)


def _put_back(scope: Scope, tx: CompiledTransaction) -> Leftovers:
    """Put structure back as it was before the trace, and let go of the states that were made in it."""
    made = {id(obj) for obj in tx.journal.made() if scope.encoder.known(obj) is None}
    strays = [
        entry
        for entry in tx.journal.changes()
        if isinstance(entry[0], Module) and id(entry[0]) not in made and scope.encoder.known(entry[0]) is None
    ]
    leftovers = Leftovers(tx.born, strays)

    def stays(obj: Any) -> bool:
        """Whether it is left as it is: what was made, and an unknown place, where a state that is left is found to be lost."""
        return id(obj) in made or (isinstance(obj, Place | list | dict) and scope.place_of(obj, "") is None)

    tx.journal.undo(keeps=stays)
    tx.disown([*tx.born])
    return leftovers


def _record(
    program: Program, scope: Scope, tx: CompiledTransaction, result: FlatTree, flat: Sequence[Any]
) -> TraceRecord:
    """Everything that the trace did."""
    known = scope.encoder
    encoder = Encoder(thread=True)
    encoder.know(known)
    changed = tx.journal.changes()
    marked = {obj: None for obj, _, _ in changed if isinstance(obj, Variable) and obj in known.cells}
    marks = [(known.cells[cell], mark, getattr(cell, mark)) for cell in marked for mark in ("_frozen", "name")]
    changes: list[tuple[int, str | None, Spec | None]] = []
    for obj, name, _ in changed:
        number = known.known(obj)
        if number is not None and isinstance(obj, Module):
            value = obj.__dict__.get(name, ABSENT)
            changes.append((number, name, None if value is ABSENT else encoder.encode(value, (name,))))
        elif number is not None:
            path, loose = known.object_paths[number], number in known.outside
            changes.append((number, None, encoder.encode_contents(obj, path, loose=loose)))
    moved = {place.identity: None for place, _ in tx.journal.changed_places()}
    moves = [
        (number, _encode_place(encoder, place)) for number, place in enumerate(scope.places) if place.identity in moved
    ]
    nodes = tuple(encoder.encode(node, ("out",)) for node in result.nodes)
    tail = encoder.encode_references()

    shardings, leaves = _place_result(program, tx, result)
    # In the order of the inputs: JAX gives a result the first donated buffer of its type, which is to be its own.
    written: list[Any] = [cell for cell in known.cells if cell in tx.written]
    numbers = [known.cells[cell] for cell in written]
    new = [program.keep_placement(known.cells[cell], tx.values[cell], shardings.get(cell)) for cell in written]
    same = [i for i, value in zip(numbers, new, strict=True) if same_type(flat[i], value, exact=True)]
    made_cells = list(encoder.cells)[program.count :]
    for cell in made_cells:
        if cell not in tx.born:
            tx.found[cell] = None
    made = [constrain(tx.values.get(cell, UNSET), shardings.get(cell)) for cell in made_cells]
    return TraceRecord(
        written=numbers,
        same_type=same,
        scalars=[i for i, value in zip(numbers, new, strict=True) if getattr(value, "ndim", None) == 0],
        encodings=(
            OutputEncoding(new, [flat[number] for number in numbers]),
            OutputEncoding(made),
            OutputEncoding(leaves),
        ),
        made=[(encoder.cells[cell], cell_spec(cell)) for cell in made_cells],
        structure=result.structure,
        nodes=nodes,
        tail=tail,
        changes=changes,
        moves=moves,
        marks=marks,
        restarted=[number for cell, number in known.cells.items() if cell in tx.restarted],
        seen=[number for cell, number in known.cells.items() if cell in tx.seen],
    )


def _place_result(program: Program, tx: CompiledTransaction, result: FlatTree) -> tuple[dict[Any, Any], list[Any]]:
    """What `out_shardings` says of the states of returned nodes, and the leaves of the result as it says they are placed.

    A state that is placed elsewhere than it was counts as written, though its value is the same.
    """
    entries = program.options.result_shardings(result)
    if not entries:
        return {}, result.leaves
    shardings: dict[Any, Any] = {}
    for said, node in entries:
        if is_node(node):
            shardings |= of_node(said, node, tx.label)
    for cell in shardings:
        if cell not in tx.written:
            tx.written[cell] = 1
            tx.values[cell] = tx.load(cell, tx.trace)
    leaves = [said for said, item in entries if not is_node(item)]
    return shardings, [constrain(leaf, said) for leaf, said in zip(result.leaves, leaves, strict=True)]


def _encode_place(encoder: Encoder, place: Place) -> Any:
    """The specification of what a place outside of models holds; None if a name is bound to nothing."""
    if not place.is_name:
        return encoder.encode_contents(place.holder, (place.path,), loose=True)
    value = place.get()
    if value is ABSENT:
        return None
    encoder.loose = True
    spec = encoder.encode(value, (place.path,))
    encoder.loose = False
    return spec
