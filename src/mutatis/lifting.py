"""Lifting: a stateful function made pure for one call, and its effects brought back.

Every transform is a page on top of this:

    with Site("vmap", f, args, kwargs) as site:        # what can be reached: arguments and captures
        def pure(values, leaves):                      # what JAX sees: arrays in, arrays out
            site.end, leaves, values = site.run(dict(zip(cells, values)), leaves)
            return leaves, values
        leaves, values = jax.vmap(pure, ...)(...)
        return site.commit(site.end, values, leaves)   # the states are written; the user's result

A **Site** is the outer side of a transaction: it sets the nodes among the arguments apart from the leaves (the function
gets its own objects back, `self is self`), knows every cell that can be reached and its path, and remembers the
containers, so that an exception leaves all as it was. `Site.run` is the inner side: it opens a `Transaction` over
JAX's tracers, runs the function on the real objects and takes out what was written.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import jax

from mutatis import _compat, transactions
from mutatis.captures import Captures, search
from mutatis.cells import Cell, structure_lock
from mutatis.containers import Contents
from mutatis.errors import StructureError
from mutatis.graph import Encoder, show_path
from mutatis.kinds import Intermediate
from mutatis.modules import Module, Wrapped, borrows, is_node
from mutatis.transactions import Transaction
from mutatis.variables import Variable, raw_value

_compat.hide_frames(os.path.dirname(os.path.abspath(__file__)))  # users' tracebacks show users' code


class Packed:
    """A pytree with the nodes set apart from the leaves."""

    __slots__ = ("_places", "_treedef", "leaves", "nodes")

    def __init__(self, tree: Any) -> None:
        everything, self._treedef = jax.tree.flatten(tree, is_leaf=is_node)
        self._places = [index for index, item in enumerate(everything) if is_node(item)]
        self.nodes = [everything[index] for index in self._places]
        for index in reversed(self._places):
            del everything[index]
        self.leaves: list[Any] = everything

    @property
    def structure(self) -> Any:
        """The tree and the places of the nodes in it: hashable."""
        return self._treedef, tuple(self._places)

    def fill(self, leaves: Sequence[Any], nodes: Sequence[Any] | None = None) -> Any:
        """The tree with other leaves (and, if given, other nodes)."""
        return fill(self.structure, leaves, self.nodes if nodes is None else nodes)


def fill(structure: Any, leaves: Sequence[Any], nodes: Sequence[Any]) -> Any:
    """The tree of this structure with these leaves and nodes."""
    treedef, places = structure
    everything = list(leaves)
    for index, node in zip(places, nodes, strict=True):
        everything.insert(index, node)
    return jax.tree.unflatten(treedef, everything)


def broadcast(prefix: Any, tree: Any, is_entry: Callable[[Any], bool]) -> list[tuple[Any, Any]]:
    """Each leaf and node of a tree with the entry that a prefix of the tree says."""
    entries, treedef = jax.tree.flatten(prefix, is_leaf=is_entry)
    return [
        (entry, item)
        for entry, part in zip(entries, treedef.flatten_up_to(tree), strict=True)
        for item in jax.tree.leaves(part, is_leaf=is_node)
    ]


class End:
    """How one run of the function ended: the shape of its result, and the cells it wrote or made.

    It holds no values: those go through JAX and come back.
    """

    __slots__ = ("born", "cells", "nodes", "structure")

    def __init__(self, out: Packed, tx: Transaction) -> None:
        self.structure = out.structure
        self.nodes = out.nodes
        self.cells: list[Any] = list(tx.written)
        self.born: dict[Any, None] = dict(tx.born)

    def without_cells(self) -> End:
        """The shape of the result alone."""
        end = copy.copy(self)
        end.cells, end.born = [], {}
        return end

    def fill(self, leaves: Sequence[Any], nodes: Sequence[Any] | None = None) -> Any:
        """The user's result around these leaves."""
        return fill(self.structure, leaves, self.nodes if nodes is None else nodes)


def argument_names(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[str]:
    """The parameter names that arguments go by, for messages."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    names: list[str] = []
    for index in range(len(args)):
        parameter = parameters[min(index, len(parameters) - 1)] if parameters else None
        if parameter is None:
            names.append(f"args[{index}]")
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL or index >= len(parameters):
            names.append(f"{parameter.name}[{index}]")
        else:
            names.append(parameter.name)
    return [*names, *kwargs]


def function_name(function: Any) -> str:
    """A function's name, for messages."""
    function = (
        inspect.unwrap(function, stop=lambda f: not hasattr(f, "__wrapped__")) if callable(function) else function
    )
    while hasattr(function, "func"):  # partials
        function = function.func
    name = getattr(function, "__qualname__", None) or type(function).__name__
    return str(name).replace("<locals>.", "").replace("<lambda>", "lambda")


def named_nodes(names: Sequence[str], values: Sequence[Any]) -> list[tuple[str, Any]]:
    """The nodes in these arguments with their names: ``batch['model']``."""
    found: list[tuple[str, Any]] = []
    for name, value in zip(names, values, strict=True):
        if is_node(value):
            found.append((name, value))
            continue
        for path, item in jax.tree_util.tree_flatten_with_path(value, is_leaf=is_node)[0]:
            if is_node(item):
                found.append((name + jax.tree_util.keystr(path), item))
    return found


class Scope:
    """Everything that some roots lead to: cells with their paths, modules, containers.

    Args:
      roots: nodes with their names.
      watch: whether it is for a program: later changes are counted, and `specs` and `tail` describe the structure.
    """

    def __init__(self, roots: Sequence[tuple[str, Any]], *, watch: bool = False) -> None:
        self.encoder = Encoder(thread=True, watch=watch, describe=watch)
        with structure_lock:
            self.specs = tuple(self.encoder.encode(node, (name,)) for name, node in roots)
            self.tail = self.encoder.finish()
        self.cells: list[Variable] = list(self.encoder.cells)
        self.containers = [obj for obj in self.encoder.objects if not isinstance(obj, Module)]

    def locate(self, cell: Cell) -> str | None:
        """The printed path of a cell."""
        number = self.encoder.cells.get(cell)  # type: ignore[call-overload]
        return None if number is None else show_root_path(self.encoder.paths[number])

    def cells_of(self, node: Any) -> dict[tuple[Any, ...], Variable]:
        """The cells of a node by their paths in it."""
        encoder = Encoder()
        encoder.encode(node)
        return dict(zip(encoder.paths, encoder.cells, strict=True))


def show_root_path(path: tuple[Any, ...]) -> str:
    """A path that starts with the name of a root, which is an expression."""
    rest = show_path(path[1:])
    return f"{path[0]}{'' if not rest or rest.startswith('[') else '.'}{rest}"


class Site:
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
        self.label = f"{name}({function_name(function)})"
        self.args = tuple(args)
        self.kwargs = kwargs or {}
        self.packed = Packed((self.args, self.kwargs))
        self.captures: Captures = search(function, *functions)
        values = [*self.args, *self.kwargs.values()]
        nodes = named_nodes(argument_names(function, self.args, self.kwargs), values)
        further = named_nodes([name for name, _ in others], [value for _, value in others])
        self.scope = Scope([*nodes, *self.captures.roots, *further])
        self.outer = _compat.current_trace()
        self.end: End
        self.repeats: int | None = 1  # how often a call runs what is traced once; None if that is not known
        self._contents = Contents(self.scope.containers, copies=True)
        self._journal: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _value: object, _trace: TracebackType | None) -> None:
        tx = transactions.current()
        if kind is not None:
            self.undo()
        elif self._journal or tx is not None or not self._contents.unchanged():
            changes = self._contents.changed()
            try:
                for container, _ in changes:
                    number = self.scope.encoder.known(container)
                    path = () if number is None else self.scope.encoder.object_paths[number]
                    Encoder().encode(container, path)  # what was put in is no array, and so no tracer
            except StructureError:
                self.undo()
                raise
            if tx is not None:
                for entry in [(container, "", then) for container, then in changes] + self._journal:
                    tx.note(*entry)

    def run(
        self,
        overlay: dict[Any, Any],
        leaves: Sequence[Any] | None = None,
        *,
        call: Callable[[], Any] | None = None,
        make: Callable[..., Transaction] = Transaction,
    ) -> tuple[End, list[Any], list[Any]]:
        """Run the function in a transaction over JAX's values.

        Args:
          overlay: JAX's values of cells.
          leaves: JAX's values of the arguments' leaves.
          call: what to run, if not the function on the arguments.
          make: makes the transaction.

        Returns:
          How it ended, the leaves of the result, and the values of the cells that were written or made.
        """
        with make(self.label, locate=self.scope.locate, outer=self.outer) as tx:
            tx.fill(overlay)
            tx.repeats = self.repeats
            try:
                if call is None:
                    args, kwargs = self.packed.fill(self.packed.leaves if leaves is None else leaves)
                    out = self.function(*args, **kwargs)
                else:
                    out = call()
            finally:
                self._journal.extend(tx.journal)  # undone by the site, with everything else
                tx.journal.clear()
            tx.settle()
            packed = Packed(out)
            end = End(packed, tx)
            return end, packed.leaves, [tx.values[cell] for cell in end.cells]

    def describe(self, cell: Variable) -> str:
        """``state `model.w` (Param)``, less the word state, by the name that the call knows the cell by."""
        path = self.scope.locate(cell)
        return f"`{path}` ({type(cell).__name__})" if path else transactions.describe(cell)

    def values(self, cells: Sequence[Variable]) -> list[Any]:
        """The present values of cells, as code at the call of the transform reads them."""
        return [raw_value(cell) for cell in cells]

    def commit(self, end: End, values: Sequence[Any], leaves: Sequence[Any]) -> Any:
        """Write what the function wrote, as JAX gave it back.

        Returns:
          The user's result around the leaves that JAX gave back.

        Raises:
          TraceLevelError: it made states of modules that outlive a raw JAX transform around the call.
        """
        for obj, name, _ in self._journal if end.born else ():
            value = obj.__dict__.get(name) if isinstance(obj, Module) else None
            if isinstance(value, Variable) and value in end.born:
                transactions.check_outlived(obj, name)
        write_back(end.cells, end.born, values)
        return end.fill(leaves)

    def undo(self, keep: Sequence[Any] = ()) -> None:
        """Put structure back as it was before the call, as an exception would.

        Args:
          keep: nodes that were made in the call and stay as they are.
        """
        encoder = Encoder()
        for node in keep:
            encoder.encode(node)
        new = {id(obj) for obj in encoder.objects if self.scope.encoder.known(obj) is None}
        journal = [entry for entry in self._journal if id(entry[0]) not in new]
        transactions.undo(journal)  # first: what it says of a container may be from after other changes of it
        transactions.undo([(container, "", then) for container, then in self._contents.changed()])
        self._journal.clear()

    def refuse_creation(self, end: End, what: str) -> None:
        """Raise if the function created deferred states, where that has no meaning.

        Raises:
          StructureError: it did; the message names the first.
        """
        for cell in end.cells:
            if cell not in end.born and transactions.is_deferred(cell):
                raise StructureError(
                    f"state {transactions.describe(cell)} was created inside {what}",
                    path=self.scope.locate(cell),
                    where=self.label,
                    made_at=transactions.made_at(cell),
                    cure="Create it before: call the model once, or give its size where it is made.",
                )

    def sown(self, end: End) -> list[Any]:
        """The intermediate values that the function kept as new attributes of modules.

        Raises:
          StructureError: one is reduced over the runs of the function, of which none is the first.
        """
        new = [o.__dict__.get(name) for o, name, _ in self._journal if isinstance(o, Module)]
        sown = [cell for cell in new if isinstance(cell, Intermediate) and cell in end.born]
        for cell in sown:
            if "reduced" in cell.metadata:
                raise StructureError(
                    f"state {transactions.describe(cell)} is reduced over iterations, and made by the first of them",
                    path=transactions.path_of(cell),
                    where=self.label,
                    made_at=cell.made_at,
                    cure="Start it before the loop, with what leaves the others as they are: "
                    "`mu.sow(model, 'total', 0.0, reduce=jnp.add)`.",
                )
        return sown

    def refuse_changes(self, what: str, but: Sequence[Any] = ()) -> None:
        """Raise if the function changed attributes or containers, where that has no meaning.

        Args:
          what: where that is, for the message.
          but: cells that may be new attributes.

        Raises:
          StructureError: it did; the message names the first.
        """
        entries = [*((o, n) for o, n, _ in self._journal), *((c, "") for c, _ in self._contents.changed())]
        for obj, name in entries:
            number = self.scope.encoder.known(obj)
            if number is None:
                continue  # an object that the function made
            if isinstance(obj, Module) and any(obj.__dict__.get(name) is cell for cell in but):
                continue
            if isinstance(obj, Module) and isinstance(obj.__dict__.get(name), Intermediate):
                raise StructureError(
                    f"a value was kept inside {what}, by `mu.sow` or `mu.capture`",
                    path=transactions.path_of(obj.__dict__[name]),
                    where=self.label,
                    expected="values that are kept each time that it runs",
                    got=f"a first value for `{name}`",
                    cure="Return the value from there, and keep it outside.",
                )
            path = show_root_path((*self.scope.encoder.object_paths[number], *((name,) if name else ())))
            raise StructureError(
                f"`{path}` was changed inside {what}",
                path=path,
                where=self.label,
                cure="The body is traced once, not run each time. Make states and change attributes before; "
                "inside, write to states.",
            )


class Transformed(Wrapped):
    """A function that a transform was applied to. Works as a method, and as an attribute of modules.

    Args:
      function: the user's function.
      remake: makes the same of another function; as a static value it stands for the transform.
      call: ``call(function, args, kwargs)`` runs the transform; subclasses may define `__call__` instead.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        remake: Callable[..., Any],
        call: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any] | None = None,
    ) -> None:
        self.__wrapped__ = function
        self.set_recipe(remake)
        self._call = call
        for name in ("__name__", "__qualname__", "__doc__", "__module__"):
            if hasattr(function, name):
                setattr(self, name, getattr(function, name))

    def set_recipe(self, remake: Callable[..., Any]) -> None:
        """Say how to make the same of another function; options that hold nodes are set apart."""
        keywords = remake.keywords if isinstance(remake, functools.partial) else {}
        self.parts = {name: option for name, option in keywords.items() if _names_nodes(option)}
        if self.parts:
            rest = {name: option for name, option in keywords.items() if name not in self.parts}
            remake = functools.partial(remake.func, *remake.args, **rest)  # type: ignore[attr-defined]
        self.remake = remake

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        assert self._call is not None
        return self._call(self.__wrapped__, args, kwargs)

    def __get__(self, obj: Any, owner: type | None = None) -> Any:
        return self if obj is None else types.MethodType(self, obj)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        parts = {name: copy.deepcopy(part, memo) for name, part in self.parts.items()}
        return self.remake(copy.deepcopy(self.__wrapped__, memo), **parts)

    def __reduce__(self) -> Any:
        return functools.partial(self.remake, **self.parts), (self.__wrapped__,)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({function_name(self.__wrapped__)})"


def _names_nodes(option: Any) -> bool:
    return any(is_node(leaf) or borrows(leaf) for leaf in jax.tree.leaves(option, is_leaf=is_node))


def write_back(cells: Iterable[Any], born: Mapping[Any, None], values: Iterable[Any]) -> None:
    """Write the values that a run left in the cells that it wrote or made."""
    old = []
    for cell, value in zip(cells, values, strict=True):
        if cell in born:
            transactions.create(cell, value)
        else:
            old.append((cell, value))
    transactions.write_all([cell for cell, _ in old], [value for _, value in old])
