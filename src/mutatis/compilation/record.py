"""Trace records: what one trace of a program did, so that every later call can do the same to the user's objects.

A traced function returns values, writes states, makes states, and changes attributes and containers. The values go through JAX;
the rest is noted in a record, undone before JAX goes on, and done after the call, the first and every later one, by `replay`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from mutatis.core import access, transactions
from mutatis.core.avals import ONE_LEAF
from mutatis.core.journal import ABSENT
from mutatis.core.places import Place, refill
from mutatis.core.structure import structure, structure_lock
from mutatis.model.graph import Decoder, Spec, make_cell
from mutatis.model.modules import set_attribute
from mutatis.model.variables import Variable, set_mark
from mutatis.tracing.arguments import unflatten


class OutputEncoding:
    """How values come out of a program: as plain arrays.

    Python's own pytree nodes and typed random keys among the results would take JAX's compiled call off its fast path, on which
    it runs no Python code: it is slower then, and an interrupt inside it loses the results.

    Args:
      values: the traced values.
      before: for each what it was when it came in, or None; a key that is still the same does not go out.
    """

    __slots__ = ("_odd", "arrays", "keyed", "plain")

    def __init__(self, values: Sequence[Any], before: Sequence[Any] | None = None) -> None:
        self.arrays: list[Any] = []
        self.keyed: list[bool] = []  # by value: whether it holds random keys
        # Of each value that is not one plain array: how many of those come before it, its number and structure, and where its
        # leaves come from.
        self._odd: list[tuple[int, int, Any, list[Any]]] = []
        count = 0
        for index, value in enumerate(values):
            leaves, treedef = jax.tree.flatten(value)
            old = [] if before is None else jax.tree.leaves(before[index])
            sources = [self._encode(leaf, old) for leaf in leaves]
            self.keyed.append(any(source is not None for source in sources))
            if sources == [None] and treedef == ONE_LEAF:
                count += 1
            else:
                self._odd.append((count, index, treedef, sources))
                count = 0
        self.plain = not self._odd

    def _encode(self, leaf: Any, old: list[Any]) -> Any:
        if not (hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)):
            self.arrays.append(leaf)
            return None
        for index, known in enumerate(old):
            if known is leaf:
                return index
        self.arrays.append(jax.random.key_data(leaf))
        return jax.random.key_impl(leaf)

    def decode(self, arrays: Sequence[Any], before: Sequence[Any] | None = None) -> Sequence[Any]:
        """The values, of what JAX gave back."""
        if self.plain:
            return arrays
        values: list[Any] = []
        at = 0
        for count, index, treedef, sources in self._odd:
            values += arrays[at : at + count]
            at += count
            kept = [] if before is None or int not in map(type, sources) else jax.tree.leaves(before[index])
            leaves = []
            for source in sources:
                if type(source) is int:
                    leaves.append(kept[source])
                    continue
                array = arrays[at]
                at += 1
                leaves.append(array if source is None else jax.random.wrap_key_data(array, impl=source))
            values.append(treedef.unflatten(leaves))
        values += arrays[at:]
        return values


class TraceRecord:
    """One trace of a program: which values it returns, and what it did besides.

    Args:
      written: the numbers of the cells that are written, in the order in which their values are returned.
      same_type: those of them whose type stays the same.
      scalars: those of them that are one number each: reusing its memory gains nothing, and it is looked at after each step.
      encodings: how the written values, those of the cells that were made, and the leaves of the result come out.
      made: the specifications of the cells that were made.
      out: the structure of the user's result, with the specifications of the nodes in it.
      tail: what modules refer to that were made.
      changes: what became of attributes and containers.
      moves: what became of places outside of models, by number.
      marks: what is marked on cells that were frozen, thawed or renamed: number, attribute, mark.
      restarted: the numbers of the random streams that were set.
      seen: the numbers of the cells that the function read.
    """

    __slots__ = (
        "born",
        "changes",
        "donatable",
        "made",
        "marks",
        "moves",
        "new",
        "nodes",
        "out",
        "plain",
        "restarted",
        "same_type",
        "seen",
        "structure",
        "tail",
        "waits",
        "written",
    )

    def __init__(
        self,
        written: list[int],
        same_type: list[int],
        scalars: list[int],
        encodings: tuple[OutputEncoding, OutputEncoding, OutputEncoding],
        made: list[tuple[int, Spec]],
        structure: Any,
        nodes: tuple[Spec, ...],
        tail: tuple[Spec, ...],
        changes: list[tuple[int, str | None, Spec | None]],
        moves: list[tuple[int, Spec | None]],
        marks: list[tuple[int, str, str | None]],
        restarted: list[int],
        seen: list[int],
    ) -> None:
        self.written = tuple(written)
        self.same_type = tuple(same_type)
        self.new, self.born, self.out = encodings
        keyed = {number for number, holds in zip(written, self.new.keyed, strict=True) if holds}
        self.donatable = tuple(number for number in same_type if number not in keyed and number not in scalars)
        self.made = made
        self.structure = structure
        self.nodes = nodes
        self.tail = tail
        self.changes = changes
        self.moves = moves
        self.marks = marks
        self.restarted = restarted
        self.seen = seen
        self.plain = not (made or nodes or changes or moves or marks)
        self.waits: bool | None = (
            None  # whether it calls back into Python, so that it may fail at run time; None: not known yet
        )

    def take_arrays(self) -> tuple[list[Any], list[Any], list[Any]]:
        """What the program returns: the written values, those of the cells that were made, and the leaves of the result."""
        out = self.new.arrays, self.born.arrays, self.out.arrays
        self.new.arrays = self.born.arrays = self.out.arrays = []  # they are tracers
        return out


def replay(
    record: TraceRecord,
    cells: list[Any],
    objects: list[Any],
    places: Sequence[Place],
    made: Sequence[Any],
    leaves: Sequence[Any],
) -> Any:
    """Do to the user's objects what the trace did, and rebuild the result.

    Args:
      record: what the trace did.
      cells: the cells of the call.
      objects: its modules, lists and dicts, by number.
      places: its places outside of models.
      made: the values of the cells that were made, as they came out.
      leaves: the leaves of the result, as they came out.
    """
    leaves = record.out.decode(leaves)
    if record.plain:
        return record.structure[0].unflatten(leaves)
    values = {number: value for (number, _), value in zip(record.made, record.born.decode(made), strict=True)}

    def make(number: int, spec: Spec) -> Variable:
        cell = make_cell(spec)
        access.create(cell, values[number])
        return cell

    decoder = Decoder(list(cells), objects, make)
    with structure_lock:
        for number, name, spec in record.changes:
            target: Any = objects[number]
            if name is None:
                _fill(target, spec, decoder)
            elif spec is None:
                set_attribute(target, name, ABSENT)
            else:
                set_attribute(target, name, decoder.decode(spec))
        for number, spec in record.moves:
            _move(places[number], spec, decoder)
        for number, name, mark in record.marks:
            set_mark(cells[number], name, mark)
        nodes = [decoder.decode(spec) for spec in record.nodes]
        decoder.refer(record.tail)
    return unflatten(record.structure, leaves, nodes)


def shapes_of(
    record: TraceRecord, cells: list[Any], objects: list[Any], made: Sequence[Any], leaves: Sequence[Any]
) -> Any:
    """What `replay` would give, of shapes, and doing nothing; the arguments are those of `replay`."""
    made, leaves = [[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in part] for part in (made, leaves)]
    values = dict(zip((number for number, _ in record.made), jax.eval_shape(record.born.decode, made), strict=True))

    def make(number: int, spec: Spec) -> Variable:
        cell = make_cell(spec)
        access.create_detached(cell, values[number])
        return cell

    decoder = Decoder(list(cells), objects, make)
    for _, name, spec in record.changes:  # in the same order: what is built is numbered
        _decode_only(decoder, spec, name is None)
    for _, spec in record.moves:
        _decode_only(decoder, spec, spec is not None and (not spec or not isinstance(spec[0], str)))
    nodes = [decoder.decode(spec) for spec in record.nodes]
    return unflatten(record.structure, jax.eval_shape(record.out.decode, leaves), nodes)


def _decode_only(decoder: Decoder, spec: Any, of_container: bool) -> None:
    if of_container:
        for item in spec:
            decoder.decode(item if isinstance(item[0], str) else item[1])
    elif spec is not None:
        decoder.decode(spec)


def _fill(container: Any, items: Any, decoder: Decoder) -> None:
    """Have a list or dict hold what items describe."""
    tx = transactions.current()
    if tx is not None:
        tx.journal.note(container, "", container.copy())
    if isinstance(container, list):
        refill(container, [decoder.decode(item) for item in items])
    else:
        refill(container, {key.value: decoder.decode(item) for key, item in items})


def _move(place: Place, spec: Any, decoder: Decoder) -> None:
    """Put into a place outside of models what a specification describes."""
    structure.changed()
    if not place.is_name:
        _fill(place.holder, spec, decoder)
    else:
        tx = transactions.current()
        if tx is not None:
            tx.journal.note(place, "", place.get())
        place.put(ABSENT if spec is None else decoder.decode(spec))
    structure.changed()
