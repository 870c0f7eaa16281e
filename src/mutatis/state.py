"""State: the values of a model by path, and the operations that take them out and put them back."""

from __future__ import annotations

import difflib
import json
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from operator import lt
from typing import Any, TypeVar

import jax
import jax.export
import jax.numpy as jnp

from mutatis import _compat, transactions
from mutatis.cells import UNSET, Deferred, structure_lock
from mutatis.errors import FilterError, StateTypeError, StructureError
from mutatis.filters import FilterLike, Path, as_filter
from mutatis.graph import (
    Encoder,
    GraphDef,
    check_node,
    describe_graph,
    make_cell,
    show_path,
    variables,
)
from mutatis.kinds import RngState
from mutatis.modules import Module, is_node
from mutatis.surgery import GONE, held_fast, holders_of, modules, rewrite, swapped
from mutatis.values import as_value, same_type, show_type
from mutatis.variables import Variable, initial, raw_value, set_mark

T = TypeVar("T")


class State(Mapping[Any, Any]):
    """A mapping from paths to values, with the kind of each.

    A pytree whose leaves are the values; the paths and kinds are part of its structure. It goes through raw JAX
    and optax. `state["blocks"]` or `state["blocks", 0]` is the part below that path, a value at a full path.

    Example:
      >>> import mutatis as mu
      >>> state = mu.state({"a": {"w": mu.Param(1.0), "n": mu.Cache(2.0)}})
      >>> float(state["a"]["w"]), [*state]
      (1.0, [('a', 'n'), ('a', 'w')])
    """

    __slots__ = ("_flat", "_kinds")

    def __init__(self, flat: Mapping[Path, Any], kinds: Mapping[Path, type[Variable]] | None = None) -> None:
        kinds = {} if kinds is None else kinds
        paths = _sorted(flat)
        self._flat = {path: flat[path] for path in paths}
        self._kinds = {path: kinds.get(path, Variable) for path in paths}

    @classmethod
    def from_flat(cls, flat: Mapping[Path, Any], kinds: Mapping[Path, type[Variable]] | None = None) -> State:
        """A State from a mapping of paths (tuples) to values."""
        return cls(flat, kinds)

    def flat(self) -> dict[Path, Any]:
        """The values by path."""
        return dict(self._flat)

    def kinds(self) -> dict[Path, type[Variable]]:
        """The kinds by path."""
        return dict(self._kinds)

    def __getitem__(self, key: Any) -> Any:
        path = key if isinstance(key, tuple) else (key,)
        if path in self._flat:
            return self._flat[path]
        below = {p: p[len(path) :] for p in self._flat if p[: len(path)] == path}
        if not below:
            raise KeyError(f"no state at {show_path(path)!r}; there are {', '.join(map(show_path, self._flat))}")
        return State(
            {rest: self._flat[p] for p, rest in below.items()}, {rest: self._kinds[p] for p, rest in below.items()}
        )

    def __iter__(self) -> Iterator[Path]:
        return iter(self._flat)

    def __len__(self) -> int:
        return len(self._flat)

    def __contains__(self, key: object) -> bool:
        path = key if isinstance(key, tuple) else (key,)
        return any(p[: len(path)] == path for p in self._flat)

    def __or__(self, other: State) -> State:
        if not isinstance(other, State):
            return NotImplemented
        return State({**self._flat, **other._flat}, {**self._kinds, **other._kinds})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, State) or jax.tree.structure(self) != jax.tree.structure(other):
            return False
        return all(
            same_type(a, b) and bool(jnp.all(a == b))
            for a, b in zip(jax.tree.leaves(self), jax.tree.leaves(other), strict=True)
        )

    __hash__ = None  # type: ignore[assignment]  # compares by value and holds arrays

    def filter(self, *filters: FilterLike) -> State:
        """The part that any of the filters selects (by path and kind)."""
        selects = as_filter(filters)
        return self._only(path for path in self._flat if selects(path, self._kinds[path]))

    def split(self, *filters: FilterLike) -> tuple[State, ...]:
        """One State for each filter; each entry is in the first that selects it.

        Raises:
          FilterError: entries are left over.
        """
        places = assign(self._kinds.items(), filters)
        return tuple(self._only(path for path, at in places.items() if at == i) for i in range(len(filters)))

    def map(self, function: Callable[[Path, Any], Any]) -> State:
        """The State of ``function(path, value)`` for each entry."""
        return State({path: function(path, value) for path, value in self._flat.items()}, self._kinds)

    def to_pure_dict(self) -> dict[Any, Any]:
        """Plain nested dictionaries by path."""
        root: dict[Any, Any] = {}
        for path, value in self._flat.items():
            inner = root
            for part in path[:-1]:
                inner = inner.setdefault(part, {})
            inner[path[-1] if path else ()] = value
        return root

    def _only(self, paths: Iterable[Path]) -> State:
        kept = list(paths)
        return State({path: self._flat[path] for path in kept}, {path: self._kinds[path] for path in kept})

    def __repr__(self) -> str:
        lines = [f"  {show_path(p) or '.'}: {self._kinds[p].__name__} {show_type(v)}," for p, v in self._flat.items()]
        return "State({\n" + "\n".join(lines) + "\n})" if lines else "State({})"


def _sorted(given: Iterable[Path]) -> list[Path]:
    """Paths in order. Those of a model mostly are, and compare as they are: names with names, indices with indices."""
    paths = list(given)
    try:
        if set(map(type, chain.from_iterable(paths))) <= {int, str} and all(map(lt, paths, paths[1:])):
            return paths
    except TypeError:  # a name and an index in the same place
        pass
    return sorted(paths, key=_order)


def _order(path: Path) -> tuple[Any, ...]:
    return tuple(
        (0, part, "") if type(part) is int else (1, 0, part if type(part) is str else repr(part)) for part in path
    )


def _flatten(state: State) -> tuple[list[Any], Any]:
    return [*state._flat.values()], (tuple(state._flat), tuple(state._kinds.values()))


def _flatten_with_keys(state: State) -> tuple[list[tuple[Any, Any]], Any]:
    return [(jax.tree_util.DictKey(show_path(path)), value) for path, value in state._flat.items()], _flatten(state)[1]


def _unflatten(aux: Any, children: Iterable[Any]) -> State:
    state: State = State.__new__(State)
    paths, kinds = aux
    state._flat = dict(zip(paths, children, strict=True))
    state._kinds = dict(zip(paths, kinds, strict=True))
    return state


def _write_structure(aux: Any) -> bytes:
    paths, kinds = aux
    return json.dumps([[list(path) for path in paths], [f"{k.__module__}:{k.__qualname__}" for k in kinds]]).encode()


def _read_structure(text: bytes) -> Any:
    paths, kinds = json.loads(bytes(text))
    return tuple(map(tuple, paths)), tuple(map(pkgutil.resolve_name, kinds))


jax.tree_util.register_pytree_with_keys(State, _flatten_with_keys, _unflatten, _flatten)
jax.export.register_pytree_node_serialization(
    State,
    serialized_name="mutatis.State",
    serialize_auxdata=_write_structure,
    deserialize_auxdata=_read_structure,
)


# -- taking values out ----------------------------------------------------------------------------------------------


def state(node: Any, *filters: FilterLike) -> Any:
    """The values of a node by path.

    Args:
      node: a Module, a Variable, or a list, tuple or dict of them.
      *filters: with none, one `State` of everything; with n, n of them, each state in the first filter that selects
        it (one filter gives one `State`). States that no filter selects are left out.

    Note:
      The arrays are handed out, so the next compiled step copies these states once instead of donating them.
    """
    cells = variables(node)
    if not filters:
        return _state_of(cells)
    places = assign(cells.items(), filters, leftovers=True)
    states = tuple(_state_of({p: cells[p] for p, at in places.items() if at == i}) for i in range(len(filters)))
    return states[0] if len(filters) == 1 else states


def _state_of(cells: Mapping[Path, Variable]) -> State:
    values = transactions.read_all([*cells.values()])
    return State(dict(zip(cells, values, strict=True)), dict(zip(cells, map(type, cells.values()), strict=True)))


def assign(
    items: Iterable[tuple[Path, Any]], filters: tuple[FilterLike, ...], *, leftovers: bool = False
) -> dict[Path, int | None]:
    """The number of the first filter that selects each (path, variable or kind).

    Raises:
      FilterError: something is left over, unless `leftovers`.
    """
    predicates = [as_filter(f) for f in filters]
    places = {path: next((i for i, f in enumerate(predicates) if f(path, v)), None) for path, v in items}
    rest = [path for path, at in places.items() if at is None]
    if rest and not leftovers:
        raise FilterError(
            f"{len(rest)} {'state matches' if len(rest) == 1 else 'states match'} none of the filters "
            f"{', '.join(map(repr, predicates))}",
            differences=[show_path(path) for path in rest],
            cure="Add `...` as the last filter: it takes the rest.",
        )
    return places


def graphdef(node: Any) -> GraphDef:
    """The static rest of a node: hashable, without arrays, equal for equal structure."""
    return describe_graph(node)[0]


def split(node: Any, *filters: FilterLike) -> tuple[Any, ...]:
    """The `GraphDef` of a node and its values: one `State`, or one for each filter.

    Raises:
      FilterError: states are left over (``...`` as the last filter takes the rest).

    Example:
      >>> import mutatis as mu
      >>> definition, params, rest = mu.split({"w": mu.Param(1.0), "n": mu.Cache(0)}, mu.Param, ...)
      >>> mu.merge(definition, params, rest)["w"]
      Param(1.0, float32)
    """
    definition, cells = describe_graph(node)
    by_path = dict(zip(definition.paths, cells, strict=True))
    everything = _state_of(by_path)
    if not filters:
        return definition, everything
    places = assign(by_path.items(), filters)
    return definition, *(everything._only(p for p, at in places.items() if at == i) for i in range(len(filters)))


def merge(definition: GraphDef, *states: Any) -> Any:
    """A new node from a `GraphDef` and values; sharing is as it was.

    Raises:
      StructureError: a value is missing, or one belongs to no path.
    """
    if not isinstance(definition, GraphDef):
        raise StructureError(
            f"{type(definition).__name__} is not a graph definition",
            expected="a GraphDef, and then States",
            got=f"{definition!r:.60}",
            cure="`definition, state = mu.split(model)`; `mu.merge(definition, state)`.",
        )
    given: dict[Path, Any] = {}
    for part in states:
        given.update(flat_for(part, definition.paths))
    known = set(definition.paths)
    if given.keys() != known:
        missing = [f"missing:    {show_path(p)}" for p in definition.paths if p not in given]
        extra = [f"unexpected: {show_path(p)}" for p in given if p not in known]
        raise StructureError(
            "the states do not fit the graph definition",
            differences=missing + extra,
            cure="Merge with every State that `mu.split` gave, and no other.",
        )

    values = [given[path] for path in definition.paths]
    wrong = [
        f"{show_path(path)}: expected {show_type(kept)}, got {show_type(value)}"
        for path, kept, value in zip(definition.paths, definition.types or (), values, strict=True)
        if not _fits(kept, value)
    ]
    if wrong:
        raise StateTypeError(
            "the states do not have the types that the graph definition was made with",
            differences=wrong,
            cure="Convert the values, or take the definition from a model of these types: `mu.graphdef(model)`.",
        )

    cells = list(map(make_cell, definition.cells))
    for cell, value in zip(cells, values, strict=True):
        transactions.create(cell, value if value is UNSET or type(value) is Deferred else as_value(value, cell))
    return definition.build(cells)


def _fits(kept: Any, value: Any) -> bool:
    """Whether a value may stand for a state of a type. A tracer may have another shape: it may be one lane of it."""
    if kept is UNSET or value is UNSET or type(kept) is Deferred or type(value) is Deferred:
        return True
    if type(kept) is jax.ShapeDtypeStruct and type(value) is _compat.ARRAY:
        return bool(kept.shape == value.shape and kept.dtype == value.dtype)
    before, tree = jax.tree.flatten(kept)
    after, other = jax.tree.flatten(as_value(value))
    return tree == other and all(
        a.dtype == b.dtype and (a.shape == b.shape or isinstance(b, jax.core.Tracer))
        for a, b in zip(before, after, strict=True)
    )


def clone(node: T) -> T:
    """An independent copy of a node with the same values; sharing is kept."""
    copied: T = merge(*split(node))
    return copied


# -- putting values back --------------------------------------------------------------------------------------------


def update(node: Any, *states: Any, cast: bool = False) -> None:
    """Write values into the states of a node, by path. Everything is checked before anything is written.

    Args:
      node: a Module, a Variable, or a list, tuple or dict of them.
      *states: `State`s or plain nested dictionaries; they need not cover all states.
      cast: whether another dtype is converted.

    Raises:
      StateTypeError: paths do not exist, or a value has another structure, shape or dtype; all are listed.
      FrozenStateError: a state is frozen.
    """
    cells = variables(node)
    writes: dict[Path, Any] = {}
    for part in states:
        writes.update(flat_for(part, cells))
    targets = [cells[path] for path in writes if path in cells]
    news = []
    problems = []
    pairs = zip(targets, transactions.glimpse_all(targets), strict=True)
    for path, value in writes.items():
        if path not in cells:
            problems.append(f"unexpected: {show_path(path)}{_nearest(path, cells)}")
            continue
        cell, old = next(pairs)
        try:
            new = as_value(value, cell)
        except StateTypeError as error:
            problems.append(f"{show_path(path)}: expected {error.expected}, got {error.got}")
            continue
        if old is not UNSET and type(old) is not Deferred:
            if cast and jax.tree.structure(new) == jax.tree.structure(old):
                new = jax.tree.map(lambda a, b: a.astype(b.dtype), new, old)
            if not same_type(old, new):
                problems.append(f"{show_path(path)}: expected {show_type(old)}, got {show_type(new)}")
        news.append(new)
    if problems:
        raise StateTypeError(
            "the values do not fit the states; nothing was written",
            differences=problems,
            cure="`mu.variables(model)` lists the states by path."
            if all(problem.startswith("unexpected") for problem in problems)
            else "`cast=True` converts dtypes; another shape needs another cell: `model.w = mu.Param(x)`.",
        )
    if transactions.is_outside() and all(cell._frozen is None and type(cell).set in _STORING for cell in targets):
        transactions.write_all(targets, news)
        return
    with transactions.Transaction("update") as tx:
        for cell, new in zip(targets, news, strict=True):
            cell.set(new)
        tx.commit()


_STORING = {Variable.set, RngState.set}  # outside of transactions, after the checks, they only store the value


def _nearest(path: Path, paths: Iterable[Path]) -> str:
    near = difflib.get_close_matches(show_path(path), map(show_path, paths), 1, 0.0)
    return f" (nearest: {near[0]})" if near else ""


def flat_for(part: Any, paths: Iterable[Path]) -> dict[Path, Any]:
    """A State or nested dictionary by path; a dictionary at a full path is a value."""
    if isinstance(part, State):
        return part._flat
    if not isinstance(part, Mapping):
        raise StateTypeError(
            f"{type(part).__name__} is not a state",
            expected="a State, or nested dictionaries by path",
            got=f"{part!r:.60}",
            cure="`mu.state(model)` gives a State; `state.to_pure_dict()` nested dictionaries.",
        )
    ends = set(paths)
    flat: dict[Path, Any] = {}
    pending: list[tuple[Path, Any]] = [((), part)]
    while pending:
        path, value = pending.pop()
        if isinstance(value, Mapping) and path not in ends:
            pending.extend(((*path, key), inner) for key, inner in value.items())
        else:
            flat[path] = value
    return flat


def pop(node: Any, *filters: FilterLike) -> Any:
    """Take states out of a node: their values are returned and their attributes removed.

    Raises:
      FilterError: no filter was given.
      StructureError: a state cannot be taken from where it is: it is the node itself, or in a tuple that is.
    """
    if not filters:
        raise FilterError("`mu.pop` needs a filter", cure="Say what to take out: `mu.pop(model, mu.Intermediate)`.")
    cells = variables(node)
    places = assign(cells.items(), filters, leftovers=True)
    taken = [{p: cells[p] for p, at in places.items() if at == i} for i in range(len(filters))]
    states = tuple(_state_of(part) for part in taken)
    gone = {cell for part in taken for cell in part.values()}

    def swap(item: Any) -> Any:
        return GONE if isinstance(item, Variable) and item in gone else item

    if swapped(node, swap, ()) is not node:
        raise held_fast((), node)
    rewrite(holders_of(node), swap)
    return states[0] if len(filters) == 1 else states


def reset(node: Any, *filters: FilterLike, batch_shape: tuple[int, ...] = ()) -> None:
    """Write again how the states with `init` start, where they live now.

    Args:
      node: a Module, a Variable, or a list, tuple or dict of them.
      *filters: which states; all with `init`, if none is given.
      batch_shape: axes that are put in front of each initial value.
    """
    for cell in variables(node, *filters).values():
        if cell.init is None:
            continue
        value = as_value(initial(cell), cell)
        if batch_shape:
            value = jax.tree.map(lambda x: jnp.broadcast_to(x, (*batch_shape, *x.shape)), value)
        where = transactions.placement(cell)
        if where is not None and len(where) == len(jax.tree.leaves(value)):
            value = jax.tree.unflatten(
                jax.tree.structure(value),
                [jax.device_put(x, s) for x, s in zip(jax.tree.leaves(value), where, strict=True)],
            )
        cell.set(value)


class Snapshot:
    """The values and the structure of a node at one moment; `restore` puts them back.

    It keeps pointers to the arrays, so the next compiled step copies what is held instead of donating it.
    """

    __slots__ = ("_structure", "_values")

    def __init__(self, node: Any) -> None:
        encoder = Encoder()
        with structure_lock:
            encoder.encode(check_node(node))
            self._structure = [(o, dict(o.__dict__) if isinstance(o, Module) else o.copy()) for o in encoder.objects]
        self._values = {cell: raw_value(cell) for cell in encoder.cells}

    def restore(self) -> None:
        """Put back every value, attribute and container as it was."""
        with structure_lock:
            for obj, saved in self._structure:
                if isinstance(obj, Module):
                    for name in obj.__dict__.keys() - saved.keys():
                        delattr(obj, name)
                    for name, value in saved.items():
                        if obj.__dict__.get(name, transactions.ABSENT) is not value:
                            obj._set_structure(name, value)
                    transactions.reorder(obj.__dict__, saved)
                else:
                    transactions.put_back(obj, "", saved)
        transactions.write_all([*self._values], [*self._values.values()])


def snapshot(node: Any) -> Snapshot:
    """Remember a node as it is now.

    Example:
      >>> import mutatis as mu
      >>> count = mu.Variable(1)
      >>> before = mu.snapshot(count)
      >>> count.value = 5
      >>> before.restore()
      >>> count
      Variable(1, int32)
    """
    return Snapshot(node)


class _Marked:
    """States that were frozen or thawed; leaving it as a context puts the marks back."""

    def __init__(self, node: Any, filters: tuple[FilterLike, ...], mark: str | None) -> None:
        self._node = node
        self._before = {cell: cell._frozen for cell in variables(node, *filters).values()}
        for cell in self._before:
            set_mark(cell, "_frozen", mark)

    def __enter__(self) -> Any:
        return self._node

    def __exit__(self, *_: object) -> None:
        for cell, mark in self._before.items():
            set_mark(cell, "_frozen", mark)


def freeze(node: Any, *filters: FilterLike) -> _Marked:
    """Make states readable only, for good or, as a context manager, for a while.

    A frozen state still matches its kind, is left out by `grad` and optimizers, and may be a constant in raw JAX.

    Example:
      >>> import mutatis as mu
      >>> w = mu.Param(1.0)
      >>> with mu.freeze(w):
      ...     w.value = 2.0
      Traceback (most recent call last):
      ...
      mutatis.errors.FrozenStateError: frozen state (Param without a place in a model) was written
      Make it live again: `mu.thaw(model)`.
    """
    return _Marked(node, filters, "frozen")


def thaw(node: Any, *filters: FilterLike) -> _Marked:
    """Make frozen (and detached) states live again, for good or, as a context manager, for a while."""
    return _Marked(node, filters, None)


def view(module: Module, **statics: Any) -> Any:
    """Another module over the same cells with other static attributes, such as ``mode="eval"``.

    Each attribute is set on every submodule that has it; `mode` on all.

    Raises:
      StructureError: no submodule has the attribute, or it holds states: those are the original's too.
    """
    definition, cells = describe_graph(module)
    other = definition.build(list(cells))
    parts = [*modules(other).values()]
    for name, value in statics.items():
        having = [part for part in parts if name == "mode" or name in part.__dict__]
        if not having:
            raise StructureError(
                f"no module of {type(module).__name__} has an attribute `{name}`",
                path=name,
                cure="`mu.view` changes static attributes that exist; `mode` is one of every module.",
            )
        for part in having:
            held = part.__dict__.get(name)
            if is_node(held) or (isinstance(held, list | tuple | dict) and variables(held)):
                raise StructureError(
                    f"`{name}` holds states, which a view shares with its original",
                    path=name,
                    expected="a static attribute",
                    got=type(held).__name__,
                    cure="Write to the model itself, or change a copy: `mu.clone(model)`.",
                )
            setattr(part, name, value)
    return other
