"""Programs: a stateful function of one structure as a pure function under `jax.jit`, and the notes of its traces.

The pure function takes one positional argument per cell and then the leaves of the user's arguments. Each trace of it leaves
a **record**: which cells were written, what was returned, what was built. The program returns ``{number of the record:
values}``: the key of a dict is static in a pytree, so what the values mean comes back with them and no Python code runs inside
the compiled call.

Structure is changed on the user's own objects while a function is traced, noted in the record, and undone before JAX goes on.
After the call, the first and every later one, `replay` does what the record says.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, Protocol

import jax

from mutatis import _compat, transactions
from mutatis.cells import UNSET, Cell, structure_lock
from mutatis.containers import Contents
from mutatis.errors import MutatisError
from mutatis.graph import Decoder, Encoder, Spec, cell_spec, make_cell
from mutatis.lifting import Packed, Scope, fill
from mutatis.modules import Module
from mutatis.transactions import Transaction
from mutatis.variables import Variable, set_mark


class NeedsTraceError(Exception):
    """The compiled call would trace, though its shapes are known: JAX's settings changed, or its caches were cleared."""


class FoundStates(BaseException):
    """Tracing found states that are not inputs; not an `Exception`, so that no user code catches it."""

    def __init__(self, cells: list[Variable]) -> None:
        self.cells = cells


class StaleBinding(BaseException):
    """Another thread changed the structure between the walk over it and the trace; not an `Exception`, as above."""


class Tracing(Protocol):
    """What a program knows of the call that it is traced for."""

    fast: bool  # the call holds a lease and should not trace: it goes back for a record first
    traced: bool  # the user's function has been run
    walked: Any  # the walk that this began with
    outer: Any  # the trace at which the call was made
    program: Any

    @property
    def label(self) -> str:
        """What the call is, for messages."""

    def scope(self) -> Scope:
        """A walk over everything that the call can reach."""

    def bound_to(self, scope: Scope) -> bool:
        """Whether a walk finds what the program was chosen for: another thread may have changed it."""

    def run(self, leaves: Sequence[Any]) -> Any:
        """Run the user's function with JAX's values in the place of the arguments' leaves."""


REPLAY: Any = object()  # in the place of a call that is not to trace, and of which nothing else is known


class _Calls(threading.local):
    request: Tracing | None = None


calls = _Calls()


class CompiledTransaction(Transaction):
    """The transaction of a traced program: a cell that is not an input is noted, and tracing starts again with it."""

    __slots__ = ("found",)

    def __init__(self, label: str, scope: Scope, outer: Any) -> None:
        super().__init__(label, locate=scope.locate, outer=outer, compiled=True)
        self.found: dict[Any, None] = {}

    def fetch(self, cell: Cell) -> Any:
        """What the cell holds outside: good enough to trace on until all such cells are known."""
        value = super().fetch(cell)
        self.found[cell] = None
        return value

    def write(self, cell: Cell, value: Any, trace: Any) -> None:
        """Write; a first write to a cell that is not an input finds it too."""
        if cell not in self.values and cell._birth is None:
            self.found[cell] = None
        super().write(cell, value, trace)


class Options:
    """The options of `mu.jit` that reach `jax.jit`."""

    def __init__(
        self,
        *,
        donate: str | bool = "auto",
        static_argnums: tuple[int, ...] = (),
        static_argnames: tuple[str, ...] = (),
        donate_args: frozenset[Any] = frozenset(),
        in_shardings: Any = _compat.UNSPECIFIED,
        out_shardings: Any = _compat.UNSPECIFIED,
        keep_unused: bool = False,
        inline: bool = False,
        compiler_options: dict[str, Any] | None = None,
        where: dict[str, Any] | None = None,
    ) -> None:
        self.donate = donate
        self.static_argnums = frozenset(static_argnums)
        self.static_argnames = frozenset(static_argnames)
        self.donate_args = donate_args
        self.in_shardings = in_shardings
        self.out_shardings = out_shardings
        self.keep_unused = keep_unused
        self.inline = inline
        self.compiler_options = compiler_options
        self.where = where or {}

    def constrain_outputs(self, packed: Packed) -> list[Any]:
        """The leaves of the result, placed as `out_shardings` says."""
        if self.out_shardings is _compat.UNSPECIFIED:
            return packed.leaves
        tree = packed.fill(packed.leaves, [None] * len(packed.nodes))
        full = jax.tree.broadcast(self.out_shardings, tree, is_leaf=lambda x: x is None)
        shardings = jax.tree.leaves(full, is_leaf=lambda x: x is None)
        return [
            leaf if sharding is None else jax.lax.with_sharding_constraint(leaf, sharding)
            for leaf, sharding in zip(packed.leaves, shardings, strict=True)
        ]


class Crossing:
    """How values come out of a program: as plain arrays.

    Python's own pytree nodes and typed random keys among the results would take JAX's compiled call off its fast path, on which
    it runs no Python code: it is slower then, and an interrupt inside it loses the results.

    Args:
      values: the traced values.
      before: for each what it was when it came in, or None; a key that is still the same does not go out.
    """

    __slots__ = ("_parts", "arrays", "keyed", "plain")

    def __init__(self, values: Sequence[Any], before: Sequence[Any] | None = None) -> None:
        self.arrays: list[Any] = []
        self.keyed: list[bool] = []  # by value: whether it holds random keys
        self._parts: list[tuple[Any, list[Any]]] = []  # the structure of each value, and where its leaves come from
        self.plain = True
        for index, value in enumerate(values):
            leaves, treedef = jax.tree.flatten(value)
            old = [] if before is None else jax.tree.leaves(before[index])
            sources = [self._send(leaf, old) for leaf in leaves]
            self.keyed.append(any(source is not None for source in sources))
            self.plain = self.plain and sources == [None] and treedef == _ONE_LEAF
            self._parts.append((treedef, sources))

    def _send(self, leaf: Any, old: list[Any]) -> Any:
        if not (hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)):
            self.arrays.append(leaf)
            return None
        for index, known in enumerate(old):
            if known is leaf:
                return index
        self.arrays.append(jax.random.key_data(leaf))
        return jax.random.key_impl(leaf)

    def receive(self, arrays: Sequence[Any], before: Sequence[Any] | None = None) -> Sequence[Any]:
        """The values, of what JAX gave back."""
        if self.plain:
            return arrays
        rest = iter(arrays)
        values = []
        for index, (treedef, sources) in enumerate(self._parts):
            old = [] if before is None else jax.tree.leaves(before[index])
            values.append(jax.tree.unflatten(treedef, [_received(source, rest, old) for source in sources]))
        return values


_ONE_LEAF = jax.tree.structure(0)


def _received(source: Any, arrays: Iterator[Any], old: list[Any]) -> Any:
    if source is None:
        return next(arrays)
    return old[source] if isinstance(source, int) else jax.random.wrap_key_data(next(arrays), impl=source)


class Record:
    """One trace of a program: which values it returns, and what it did besides.

    Args:
      written: the numbers of the cells that are written, in the order in which their values are returned.
      same_type: those of them whose type stays the same.
      crossings: how the written values, those of the cells that were made, and the leaves of the result come out.
      made: the specifications of the cells that were made.
      out: the structure of the user's result, with the specifications of the nodes in it.
      changes: what became of attributes and containers.
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
        "new",
        "nodes",
        "out",
        "plain",
        "restarted",
        "same_type",
        "seen",
        "structure",
        "waits",
        "written",
    )

    def __init__(
        self,
        written: list[int],
        same_type: list[int],
        crossings: tuple[Crossing, Crossing, Crossing],
        made: list[tuple[int, Spec]],
        structure: Any,
        nodes: tuple[Spec, ...],
        changes: list[tuple[int, str | None, Spec | None]],
        marks: list[tuple[int, str, str | None]],
        restarted: list[int],
        seen: list[int],
    ) -> None:
        self.written = tuple(written)
        self.same_type = tuple(same_type)
        self.new, self.born, self.out = crossings
        keyed = {number for number, holds in zip(written, self.new.keyed, strict=True) if holds}
        self.donatable = tuple(number for number in same_type if number not in keyed)
        self.made = made
        self.structure = structure
        self.nodes = nodes
        self.changes = changes
        self.marks = marks
        self.restarted = restarted
        self.seen = seen
        self.plain = not (made or nodes or changes or marks)
        self.waits = False  # it calls back into Python, so it may fail at run time


class Variant:
    """One way to call a program: with these cells written and these buffers donated."""

    __slots__ = ("called", "donated", "jitted", "retypes", "waits", "written")

    def __init__(self, program: Program, record: Record) -> None:
        self.called: set[int] = set()  # the numbers of the records for which it was called
        self.written = record.written
        self.retypes = len(record.same_type) < len(record.written)  # some cell holds another type afterwards
        self.waits = record.waits
        donate = program.options.donate
        donates = donate is True or (donate == "auto" and not record.waits)
        self.donated = frozenset(record.donatable) if donates else frozenset()
        self.jitted = program.make_jit(tuple(sorted(self.donated)))


class Program:
    """One structure's pure function, its traces, and the `jax.jit`s of it."""

    def __init__(
        self, options: Options, label: str, count: int, positions: tuple[Any, ...], placements: list[Any]
    ) -> None:
        self.options = options
        self.count = count
        self.placements = placements
        self.records: dict[int, Record] = {}
        self._numbers = itertools.count()
        self._variants: dict[Hashable, Variant] = {}  # more than one if its traces differ in what they write
        me = weakref.ref(self)

        def pure(*flat: Any) -> dict[int, Any]:
            program = me()
            request = calls.request
            if request is REPLAY:
                raise NeedsTraceError
            if program is None or request is None or request.program is not program:
                raise MutatisError(f"`{label}` was traced outside a call", cure="Call it, or use `mu.make_jaxpr`.")
            if request.fast:
                raise NeedsTraceError
            return program.trace(request, flat)

        pure.__name__ = pure.__qualname__ = label
        self._pure = pure
        self._positions = positions
        self.plain = self.make_jit(())

    def make_jit(self, donated: tuple[int, ...]) -> Any:
        """The pure function under `jax.jit`, with these arguments donated (and those that the user named)."""
        options = self.options
        users = tuple(self.count + i for i in range(len(self._positions)) if self._positions[i] in options.donate_args)
        shardings: dict[str, Any] = {}
        if options.in_shardings is not _compat.UNSPECIFIED:
            given = options.in_shardings
            each = [given[p] if isinstance(given, tuple) else given for p in self._positions]
            shardings["in_shardings"] = (*[_compat.UNSPECIFIED] * self.count, *each)
        return jax.jit(
            self._pure,
            donate_argnums=(*donated, *users),
            keep_unused=options.keep_unused,
            inline=options.inline,
            **({} if options.compiler_options is None else {"compiler_options": options.compiler_options}),
            **shardings,
            **options.where,
        )

    def trace(self, request: Tracing, flat: Sequence[Any]) -> dict[int, Any]:
        """Run the user's function on JAX's tracers; called by JAX."""
        request.traced = True
        with structure_lock:
            scope = request.walked = request.scope()
            if not request.bound_to(scope):
                raise StaleBinding
            result = self._run(request, flat, scope)
            if scope.encoder.disturbed():
                raise StaleBinding
            return result

    def _run(self, request: Tracing, flat: Sequence[Any], scope: Scope) -> dict[int, Any]:
        with CompiledTransaction(request.label, scope, request.outer) as tx:
            contents = Contents(scope.containers, copies=True)
            tx.fill(dict(zip(scope.cells, flat[: self.count], strict=True)))
            try:
                out = request.run(flat[self.count :])
                tx.settle()
                packed = Packed(out)
                record = self._describe(scope, tx, packed, contents, flat)
            finally:
                # Undone last: what transforms inside noted of a container may be from after other changes of it.
                tx.journal[:0] = [(container, "", then) for container, then in contents.changed()]
            tx.undo()
            if tx.found:
                raise FoundStates(list(tx.found))
            number = next(self._numbers)
            self.records[number] = record
            out = record.new.arrays, record.born.arrays, record.out.arrays
            record.new.arrays = record.born.arrays = record.out.arrays = []
            return {number: out}

    def _describe(
        self, scope: Scope, tx: CompiledTransaction, packed: Packed, contents: Contents, flat: Sequence[Any]
    ) -> Record:
        """Everything that the trace did."""
        known = scope.encoder
        encoder = Encoder(thread=True)
        encoder.know(known)
        changes: list[tuple[int, str | None, Spec | None]] = []
        marked = {obj: None for obj, _, _ in tx.journal if isinstance(obj, Variable) and obj in known.cells}
        marks = [(known.cells[cell], mark, getattr(cell, mark)) for cell in marked for mark in ("_frozen", "name")]
        for obj, name in {(id(o), n): (o, n) for o, n, _ in tx.journal}.values():
            number = known.known(obj)
            if number is not None and isinstance(obj, Module):
                value = obj.__dict__.get(name, transactions.ABSENT)
                changes.append((number, name, None if value is transactions.ABSENT else encoder.encode(value, (name,))))
        for container, _ in contents.changed():
            number = known.known(container)
            if number is not None:
                entries = (
                    encoder._entries(container, ()) if isinstance(container, dict) else encoder._items(container, ())
                )
                changes.append((number, None, entries))
        nodes = tuple(encoder.encode(node, ("out",)) for node in packed.nodes)
        encoder.finish()

        # In the order of the inputs: JAX gives a result the first donated buffer of its type, which is to be its own.
        written: list[Any] = [cell for cell in known.cells if cell in tx.written]
        numbers = [known.cells[cell] for cell in written]
        new = [self._keep_placement(known.cells[cell], tx.values[cell]) for cell in written]
        same = [i for i, value in zip(numbers, new, strict=True) if _same_avals(flat[i], value)]
        made_cells = list(encoder.cells)[self.count :]
        for cell in made_cells:
            if cell not in tx.born:
                tx.found[cell] = None
        made = [tx.values.get(cell, UNSET) for cell in made_cells]
        specs = [(encoder.cells[cell], cell_spec(cell)) for cell in made_cells]
        crossings = (
            Crossing(new, [flat[number] for number in numbers]),
            Crossing(made),
            Crossing(self.options.constrain_outputs(packed)),
        )
        restarted = [number for cell, number in known.cells.items() if cell in tx.restarted]
        seen = [number for cell, number in known.cells.items() if cell in tx.seen]
        return Record(numbers, same, crossings, specs, packed.structure, nodes, changes, marks, restarted, seen)

    def _keep_placement(self, number: int, value: Any) -> Any:
        shardings = self.placements[number]
        if shardings is None:
            return value
        leaves, treedef = jax.tree.flatten(value)
        if len(leaves) != len(shardings):
            return value
        return jax.tree.unflatten(treedef, [_constrain(x, s) for x, s in zip(leaves, shardings, strict=True)])

    def variant_for(self, record: Record) -> Variant:
        """How to call the program for the shapes of a record."""
        key = (record.written, record.same_type, record.waits)
        if key not in self._variants:
            self._variants[key] = Variant(self, record)
        return self._variants[key]


def _constrain(value: Any, sharding: Any) -> Any:
    if isinstance(sharding, jax.sharding.NamedSharding) and len(sharding.spec) <= value.ndim:
        explicit = any(kind == jax.sharding.AxisType.Explicit for kind in sharding.mesh.axis_types)
        return jax.sharding.reshard(value, sharding) if explicit else jax.lax.with_sharding_constraint(value, sharding)
    return value


def _same_avals(old: Any, new: Any) -> bool:
    before, tree = jax.tree.flatten(old)
    after, other = jax.tree.flatten(new)
    return tree == other and all(jax.typeof(a) == jax.typeof(b) for a, b in zip(before, after, strict=True))


def replay(record: Record, cells: list[Any], objects: list[Any], made: Sequence[Any], leaves: Sequence[Any]) -> Any:
    """Do to the user's objects what the trace did, and rebuild the result.

    Args:
      record: what the trace did.
      cells: the cells of the call.
      objects: its modules, lists and dicts, by number.
      made: the values of the cells that were made, as they came out.
      leaves: the leaves of the result, as they came out.
    """
    leaves = record.out.receive(leaves)
    if record.plain:
        return record.structure[0].unflatten(leaves)
    values = {number: value for (number, _), value in zip(record.made, record.born.receive(made), strict=True)}

    def make(number: int, spec: Spec) -> Variable:
        cell = make_cell(spec)
        transactions.create(cell, values[number])
        return cell

    decoder = Decoder(list(cells), objects, make)
    with structure_lock:
        for number, name, spec in record.changes:
            target: Any = objects[number]
            if name is None:
                _refill(target, spec, decoder)
            elif spec is None:
                target._set_structure(name, transactions.ABSENT)
            else:
                target._set_structure(name, decoder.decode(spec))
        for number, name, mark in record.marks:
            set_mark(cells[number], name, mark)
        nodes = [decoder.decode(spec) for spec in record.nodes]
    return fill(record.structure, leaves, nodes)


def _refill(container: Any, items: Any, decoder: Decoder) -> None:
    tx = transactions.current()
    if tx is not None:
        tx.note(container, "", container.copy())
    if isinstance(container, list):
        container[:] = [decoder.decode(item) for item in items]
    else:
        entries = {key.value: decoder.decode(item) for key, item in items}
        container.clear()
        container.update(entries)
