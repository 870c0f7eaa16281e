"""Call sites: a stateful function made pure for one call of a transform, and its effects brought back.

Every transform is a page on top of this:

    with CallSite("vmap", f, args, kwargs) as site:    # what can be reached: arguments and captures
        def pure(values, leaves):                      # what JAX sees: arrays in, arrays out
            site.end, leaves, values = site.run(dict(zip(cells, values)), leaves)
            return leaves, values
        leaves, values = jax.vmap(pure, ...)(...)
        return site.commit(site.end, values, leaves)   # the states are written; the user's result

A **call site** is the outer side of a transaction: it sets the nodes among the arguments apart from the leaves (the function
gets its own objects back, `self is self`), knows every cell that can be reached and its path, and keeps a
journal of structure, so that an exception leaves all as it was. `CallSite.run` is the inner side: it opens a `Transaction` over
JAX's tracers, runs the function on the real objects and takes out what was written.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import jax

from mutatis import _compat
from mutatis.core import access, naming, transactions
from mutatis.core.cells import Cell
from mutatis.core.journal import Journal
from mutatis.core.leftovers import Leftovers
from mutatis.core.nodes import is_node
from mutatis.core.notes import annotate
from mutatis.core.places import Place
from mutatis.core.transactions import Transaction
from mutatis.errors import StructureError
from mutatis.model.byhand import drop_traced, note_by_hand
from mutatis.model.graph import Encoder, handed_out
from mutatis.model.kinds import Intermediate
from mutatis.model.modules import Module, birth_of
from mutatis.model.variables import Variable
from mutatis.tracing.arguments import FlatTree, argument_names, function_name, leaf_names, named_nodes, unflatten
from mutatis.tracing.blame import Labels, name_inputs, new_mark
from mutatis.tracing.captures import Captures, search
from mutatis.tracing.guards import refuse_moves
from mutatis.tracing.scope import Scope

F = TypeVar("F", bound=Callable[..., Any])


class RunResult:
    """How one run of the function ended: the shape of its result, and the cells it wrote or made.

    It holds no values: those go through JAX and come back.
    """

    __slots__ = ("born", "cells", "dropped", "nodes", "structure")

    def __init__(self, out: FlatTree, tx: Transaction) -> None:
        self.structure = out.structure
        self.nodes = out.nodes
        self.cells: list[Any] = list(tx.written)
        self.born: dict[Any, None] = dict(tx.born)
        self.dropped = Leftovers([])  # of the states that it made, those that are let go

    def without_cells(self) -> RunResult:
        """The shape of the result alone."""
        end = copy.copy(self)
        end.cells, end.born = [], {}
        return end

    def unflatten(self, leaves: Sequence[Any], nodes: Sequence[Any] | None = None) -> Any:
        """The user's result around these leaves."""
        return unflatten(self.structure, leaves, self.nodes if nodes is None else nodes)


class CallSite:
    """One call of a transform: the outer side of its transactions.

    Args:
      name: the transform's name, for messages.
      function: the user's function; what it names becomes an implicit argument.
      args: the positional arguments.
      kwargs: the keyword arguments.
      others: further values that hold nodes, by name (``of=model``).
      functions: further functions to search.
    """

    def __init__(
        self,
        name: str,
        function: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
        others: Sequence[tuple[str, Any]] = (),
        functions: Sequence[Any] = (),
    ) -> None:
        self.function = function
        self.name = name
        self.label = f"{name}({function_name(function)})"
        self.mark = new_mark(name)  # of the functions that it has JAX trace
        self.args = tuple(args)
        self.kwargs = kwargs or {}
        self.packed = FlatTree((self.args, self.kwargs))
        self.captures: Captures = search(function, *functions)
        values = [*self.args, *self.kwargs.values()]
        nodes = named_nodes(argument_names(function, self.args, self.kwargs), values)
        further = named_nodes([name for name, _ in others], [value for _, value in others])
        self.scope = Scope([*nodes, *self.captures.roots, *further], self.captures.find_places())
        self.outer = _compat.current_trace()
        self.end: RunResult
        self.repeats: int | None = 1  # how often a call runs what is traced once; None if that is not known
        self.split: dict[Any, int] = {}  # cells of which each run sees a slice, along this axis
        self.journal = Journal(self.scope.containers, self.scope.places)  # of all runs
        self._tracing = transactions.tracing(self.journal)

    def __enter__(self) -> Self:
        self._tracing.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, _value: object, _trace: TracebackType | None) -> None:
        self._tracing.__exit__(kind, _value, _trace)
        if kind is not None:
            self.journal.undo()
            return
        try:
            for container, _ in self.journal.changed_containers():
                number = self.scope.encoder.known(container)
                path = () if number is None else self.scope.encoder.object_paths[number]
                loose = number in self.scope.encoder.outside
                Encoder(loose=loose).encode(container, path)  # what was put in is no tracer
            for place, _ in self.journal.changed_places():
                Encoder(loose=True).encode(place.get(), (place.path,))
        except StructureError:
            self.journal.undo()
            raise
        if (tx := transactions.current()) is not None:
            self.journal.hand_over(tx.journal)

    def run(
        self,
        overlay: dict[Any, Any],
        leaves: Sequence[Any] | None = None,
        *,
        call: Callable[[], Any] | None = None,
        make: Callable[..., Transaction] = Transaction,
    ) -> tuple[RunResult, list[Any], list[Any]]:
        """Run the function in a transaction over JAX's values.

        Args:
          overlay: JAX's values of cells.
          leaves: JAX's values of the arguments' leaves.
          call: what to run, if not the function on the arguments.
          make: makes the transaction.

        Returns:
          How it ended, the leaves of the result, and the values of the cells that were written or made.
        """
        try:
            return self._run(overlay, leaves, call, make)
        except Exception as error:
            name_inputs(error, self, [*overlay])
            annotate(error)
            raise

    def _run(
        self,
        overlay: dict[Any, Any],
        leaves: Sequence[Any] | None,
        call: Callable[[], Any] | None,
        make: Callable[..., Transaction],
    ) -> tuple[RunResult, list[Any], list[Any]]:
        with make(self.label, locate=self.scope.locate, outer=self.outer, journal=self.journal) as tx:
            tx.preload(overlay)
            tx.repeats, tx.split = self.repeats, self.split
            if call is None:
                args, kwargs = self.packed.unflatten(self.packed.leaves if leaves is None else leaves)
                out = self.function(*args, **kwargs)
                self.packed.refuse_moved((args, kwargs), self.label)
            else:
                out = call()
            tx.note_changes_in_place()
            encoder = self.scope.encoder
            note_by_hand(encoder.modules(), encoder.held, self.journal)
            packed = FlatTree(out)
            if packed.nodes or self.journal.noted:
                walk = handed_out(packed.nodes, self.journal)
                drop_traced(module for module in walk.modules() if encoder.known(module) is None)
                tx.adopt(walk.cells)
            end = RunResult(packed, tx)
            return end, packed.leaves, [tx.values[cell] for cell in end.cells]

    def marked(self, pure: F) -> F:
        """A function that JAX is to trace in the place of the user's: if an error speaks of it, it is known which it is.

        What JAX calls its arguments is ``values``, of the cells of the run, and ``leaves``, as `labels` says.
        """
        pure.__name__ = pure.__qualname__ = self.mark
        return pure

    def labels(self) -> Labels:
        """What the leaves that the function is traced for go by in messages; a transform may say another."""
        return {"leaves": leaf_names(self.function, self.args, self.kwargs)}

    def describe(self, cell: Variable) -> str:
        """A cell as messages name it, after the word state: by the path that this call knows it by."""
        path = self.scope.locate(cell)
        return f"`{path}` ({type(cell).__name__})" if path else naming.describe(cell)

    def values(self, cells: Sequence[Variable]) -> list[Any]:
        """The present values of cells, as code at the call of the transform reads them."""
        return [access.load(cell) for cell in cells]

    def commit(self, end: RunResult, values: Sequence[Any], leaves: Sequence[Any]) -> Any:
        """Write what the function wrote, as JAX gave it back.

        Returns:
          The user's result around the leaves that JAX gave back.

        Raises:
          TraceLevelError: it made states of modules that outlive a raw JAX transform around the call.
        """
        for obj, name, _ in self.journal.changes() if end.born else ():
            value = obj.__dict__.get(name) if isinstance(obj, Module) else None
            if isinstance(value, Variable) and value in end.born:
                access.check_outlived(type(obj).__name__, birth_of(obj), name)
        access.commit_writes(end.cells, end.born, values)
        return end.unflatten(leaves)

    def undo(self, keep: Sequence[Any] = ()) -> None:
        """Put structure back as it was before the call, as an exception would; what was made since is none of it.

        Args:
          keep: nodes that were made in the call and stay as they are.
        """
        encoder = Encoder()
        for node in keep:
            encoder.encode(node)
        made = [*encoder.objects, *self.journal.made()]
        new = {id(obj) for obj in made if self.scope.encoder.known(obj) is None}
        self.journal.undo(keeps=lambda obj: id(obj) in new)

    def refuse_creation(self, end: RunResult, what: str) -> None:
        """Raise if the function created deferred states, where that has no meaning.

        Raises:
          StructureError: it did; the message names the first.
        """
        for cell in end.cells:
            if cell not in end.born and access.is_deferred(cell):
                raise StructureError(
                    f"state {naming.describe(cell)} was created in {what}",
                    path=self.scope.locate(cell),
                    where=self.label,
                    made_at=naming.made_at(cell),
                    cure="Create it before: call the model once, or give its size where it is made."
                    + ("" if cell.init is None else " This one starts by `mu.reset(model, batch_shape=(4,))`."),
                )

    def sown(self, end: RunResult) -> list[Any]:
        """The intermediate values that the function kept as new attributes of modules.

        Raises:
          StructureError: one is reduced over the runs of the function, of which none is the first.
        """
        sown = self._sown(end)
        for cell in sown:
            if "reduced" in cell.metadata:
                raise StructureError(
                    f"state {naming.describe(cell)} is reduced over iterations, and made by the first of them",
                    path=naming.path_of(cell),
                    where=self.label,
                    made_at=cell.made_at,
                    cure="Start it before the loop, with what leaves the others as they are: "
                    "`mu.sow(model, 'total', 0.0, reduce=jnp.add)`.",
                )
        return sown

    def made(self, end: RunResult) -> list[Any]:
        """The states that the function made and returned in modules, but for those that it sowed."""
        returned = {cell for node in end.nodes for cell in self.scope.cells_of(node).values()} - set(self._sown(end))
        return [cell for cell in end.cells if cell in end.born and cell in returned]

    def _sown(self, end: RunResult) -> list[Any]:
        changed = [(obj, name) for obj, name, _ in self.journal.changes() if isinstance(obj, Module)]
        new = [obj.__dict__.get(name) for obj, name in changed if self.scope.place_of(obj, name) is not None]
        return [cell for cell in new if isinstance(cell, Intermediate) and cell in end.born]

    def refuse_changes(self, what: str, but: Sequence[Any] = ()) -> None:
        """Raise if the function changed attributes or containers, where that has no meaning.

        Args:
          what: where that is, for the message.
          but: cells that may be new attributes.

        Raises:
          StructureError: it did; the message names the first.
        """
        for obj, name, _ in self.journal.changes():
            path = self.scope.place_of(obj, name)
            if path is None:
                continue  # an object that the function made, or one that `refuse_leftovers` looks at
            now = obj.__dict__.get(name) if isinstance(obj, Module) else obj.get() if isinstance(obj, Place) else obj
            if any(now is cell for cell in but):
                continue
            if isinstance(obj, Module) and isinstance(now, Intermediate):
                raise StructureError(
                    f"a value was kept in {what}, by `mu.sow` or `mu.capture`",
                    path=naming.path_of(now),
                    where=self.label,
                    expected="values that are kept each time that it runs",
                    got=f"a first value for `{name}`",
                    cure="Return the value from there, and keep it outside.",
                )
            raise StructureError(
                f"`{path}` was changed in {what}",
                path=path,
                where=self.label,
                made_at=next(filter(None, map(naming.made_at, jax.tree.leaves(now, is_leaf=is_node))), None),
                cure="The body is traced once, not run each time. Make states and change attributes before; "
                "inside, write to states.",
            )
        refuse_moves(self.captures.guards, [*self.scope.cells, *self.scope.encoder.modules()], self.label)

    def let_go(self, end: RunResult) -> None:
        """Have a run that is over hold none of the states that it made, but for those that it sowed or returned."""
        kept = set(self._sown(end))
        for node in end.nodes:
            kept.update(self.scope.cells_of(node).values())
        dropped = [cell for cell in end.born if cell not in kept]
        end.dropped = Leftovers(dropped)
        stand_ins = {cell: Cell() for cell in dropped}
        end.cells = [stand_ins.get(cell, cell) for cell in end.cells]
        end.born = {stand_ins.get(cell, cell): None for cell in end.born}

    def refuse_leftovers(self, end: RunResult) -> None:
        """Raise if states that a run made, or changes of modules that nothing leads to, are kept where they are not seen.

        It is for runs whose other changes have been refused or put back already.

        Raises:
          StructureError: there are some; the message says where the first was made.
        """
        made = set(map(id, self.journal.made()))
        known = self.scope.encoder.known
        changes = [entry for entry in self.journal.changes() if isinstance(entry[0], Module)]
        strays = [entry for entry in changes if id(entry[0]) not in made and known(entry[0]) is None]
        self.journal.condense(lambda obj, name: self.scope.place_of(obj, name) is not None)
        leftovers = Leftovers([], strays)
        del changes, strays
        end.dropped.refuse(self.label)
        leftovers.refuse(self.label)
