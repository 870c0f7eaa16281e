"""State operations: taking the values out of a model and putting them back."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, overload

import jax

from mutatis import _compat
from mutatis.core import access
from mutatis.core.avals import same_type, show_type
from mutatis.core.cells import UNSET, Deferred
from mutatis.core.collection import uncollected
from mutatis.core.naming import show_path
from mutatis.core.showing import show_class, show_value
from mutatis.core.structure import structure_lock
from mutatis.core.transactions import Transaction
from mutatis.errors import ArgumentError, FilterError, StateTypeError, StructureError
from mutatis.model.filters import FilterLike, Path
from mutatis.model.graph import Encoder, make_cell
from mutatis.model.graphdef import GraphDef, describe_graph
from mutatis.model.kinds import RngState
from mutatis.model.state import State, first_filters
from mutatis.model.strangers import plain_value
from mutatis.model.surgery import GONE, held_fast, holders_among, rewrite, swapped
from mutatis.model.values import as_value
from mutatis.model.variables import Variable, spelled, started
from mutatis.model.walks import check_node, check_tags, variables

T = TypeVar("T")


@overload
def state(node: Any, filter: FilterLike = ..., /) -> State: ...
@overload
def state(node: Any, first: FilterLike, second: FilterLike, /) -> tuple[State, State]: ...
@overload
def state(
    node: Any, first: FilterLike, second: FilterLike, third: FilterLike, /, *more: FilterLike
) -> tuple[State, State, State, *tuple[State, ...]]: ...
@uncollected
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
    places = first_filters(cells.items(), filters, leftovers=True)
    check_tags([filter for i, filter in enumerate(filters) if i not in places.values()], cells)
    states = tuple(_state_of({p: cells[p] for p, at in places.items() if at == i}) for i in range(len(filters)))
    return states[0] if len(filters) == 1 else states


def _state_of(cells: Mapping[Path, Variable]) -> State:
    values = access.read_many([*cells.values()])
    return State(dict(zip(cells, values, strict=True)), dict(zip(cells, map(type, cells.values()), strict=True)))


def graphdef(node: T) -> GraphDef[T]:
    """The static rest of a node: hashable, without arrays, equal for equal structure."""
    return describe_graph(node)[0]


@overload
def split(node: T, filter: FilterLike = ..., /) -> tuple[GraphDef[T], State]: ...
@overload
def split(node: T, first: FilterLike, second: FilterLike, /) -> tuple[GraphDef[T], State, State]: ...
@overload
def split(
    node: T, first: FilterLike, second: FilterLike, third: FilterLike, /, *more: FilterLike
) -> tuple[GraphDef[T], State, State, State, *tuple[State, ...]]: ...
@uncollected
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
    places = first_filters(by_path.items(), filters)
    return definition, *(everything._only(p for p, at in places.items() if at == i) for i in range(len(filters)))


@uncollected
def merge(definition: GraphDef[T], *states: State | Mapping[Any, Any]) -> T:
    """A new node from a `GraphDef` and values; sharing is as it was.

    Raises:
      StructureError: a value is missing, or one belongs to no path.
    """
    if not isinstance(definition, GraphDef):
        raise ArgumentError(
            f"{show_value(definition)} is not a graph definition",
            expected="a GraphDef, and then States",
            got=show_class(definition),
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
        access.create(cell, value if value is UNSET or type(value) is Deferred else as_value(value, cell))
    return definition.build(cells)


def _fits(kept: Any, value: Any) -> bool:
    """Whether a value may stand for a state of a type."""
    if kept is UNSET or value is UNSET or type(kept) is Deferred or type(value) is Deferred:
        return True
    return same_type(kept, value if type(value) is _compat.ARRAY else as_value(value), lanes=True)


@uncollected
def clone(node: T) -> T:
    """An independent copy of a node with the same values; sharing is kept."""
    return merge(*split(node))


def update(node: Any, *states: State | Mapping[Any, Any], cast: bool = False) -> None:
    """Write values into the states of a node, by path. Everything is checked before anything is written.

    Args:
      node: a Module, a Variable, or a list, tuple or dict of them.
      *states: `State`s, plain nested dictionaries, or flat ones whose keys are paths, or what `nnx.state` of Flax gives; they
        need not cover all states.
      cast: whether another dtype is converted.

    Raises:
      StateTypeError: paths do not exist, or a value has another structure, shape or dtype; all are listed.
      FrozenStateError: a state is frozen.
    """
    cells = variables(node)
    writes: dict[Path, Any] = {}
    for part in states:
        writes.update(_with_streams(flat_for(part, cells), cells))
    targets = [cells[path] for path in writes if path in cells]
    news = []
    problems = []
    pairs = zip(targets, access.peek_many(targets), strict=True)
    for path, value in writes.items():
        if path not in cells:
            problems.append(f"unexpected: {show_path(path)}{nearest(path, cells)}")
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
    if access.is_outside() and all(cell._frozen is None and type(cell).set in _STORING for cell in targets):
        access.write_many(targets, news)
        return
    with Transaction("update") as tx:
        for cell, new in zip(targets, news, strict=True):
            cell.set(new)
        access.commit(tx)


_STORING = {Variable.set, RngState.set}  # outside of transactions, after the checks, they only store the value


def nearest(path: Path, paths: Iterable[Path]) -> str:
    """The existing path that is most like one that does not exist, for messages."""
    near = difflib.get_close_matches(show_path(path), map(show_path, paths), 1, 0.0)
    return f" (nearest: {near[0]})" if near else ""


def flat_for(part: Any, paths: Iterable[Path]) -> dict[Path, Any]:
    """A State or dictionary by path, nested or flat (as `variables` gives it); a dictionary at a full path is a value."""
    if isinstance(part, State):
        return part._flat
    if not isinstance(part, Mapping):
        raise ArgumentError(
            f"{show_value(part)} is not a State",
            expected="a State, or nested dictionaries by path",
            got=show_class(part),
            cure="`mu.state(model)` gives a State; `state.to_pure_dict()` nested dictionaries.",
        )
    ends = set(paths)
    if part and all(isinstance(key, tuple) and key in ends for key in part):
        return dict(part)
    flat: dict[Path, Any] = {}
    pending: list[tuple[Path, Any]] = [((), part)]
    while pending:
        path, value = pending.pop()
        if isinstance(value, Mapping) and path not in ends:
            pending.extend(((*path, key), inner) for key, inner in value.items())
        else:
            flat[path] = plain_value(value)
    return flat


def _with_streams(flat: dict[Path, Any], cells: Mapping[Path, Variable]) -> dict[Path, Any]:
    """Values by path, with the key and count of each stream of Flax NNX put together to the value of ours.

    A layer of NNX calls its stream `rngs`, whatever ours calls it; and its `Rngs` has no level between itself and the streams.
    """
    apart = [path[:-1] for path in flat if path not in cells and len(path) > 1 and path[-1] == "key"]
    streams = [path for path, cell in cells.items() if isinstance(cell, RngState)] if apart else []
    for owner in apart:
        key, count = (*owner, "key"), (*owner, "count")
        same = [path for path in streams if path in (owner, (*owner[:-1], "streams", owner[-1]))]
        same = same or [path for path in streams if path[:-1] == owner[:-1] and owner[-1] == "rngs"]
        if len(same) == 1 and count in flat:
            rest = {path: value for path, value in flat.items() if path not in (key, count)}
            flat = {**rest, same[0]: {"key": flat[key], "count": flat[count]}}
    return flat


@overload
def pop(node: Any, filter: FilterLike, /) -> State: ...
@overload
def pop(node: Any, first: FilterLike, second: FilterLike, /) -> tuple[State, State]: ...
@overload
def pop(
    node: Any, first: FilterLike, second: FilterLike, third: FilterLike, /, *more: FilterLike
) -> tuple[State, State, State, *tuple[State, ...]]: ...
def pop(node: Any, *filters: FilterLike) -> Any:
    """Take states out of a node: their values are returned and their attributes removed.

    Raises:
      FilterError: no filter was given.
      StructureError: a state cannot be taken from where it is: it is the node itself, or in a tuple that is.
    """
    if not filters:
        raise FilterError("`mu.pop` needs a filter", cure="Say what to take out: `mu.pop(model, mu.Intermediate)`.")
    with structure_lock:
        encoder = Encoder(describe=False)
        encoder.encode(check_node(node))
    cells = dict(zip(encoder.paths, encoder.cells, strict=True))
    places = first_filters(cells.items(), filters, leftovers=True)
    check_tags([filter for i, filter in enumerate(filters) if i not in places.values()], cells)
    taken = [{p: cells[p] for p, at in places.items() if at == i} for i in range(len(filters))]
    states = tuple(_state_of(part) for part in taken)
    gone = {cell for part in taken for cell in part.values()}

    def swap(item: Any) -> Any:
        return GONE if isinstance(item, Variable) and item in gone else item

    if swapped(node, swap, ()) is not node:
        raise held_fast((), node)
    rewrite(holders_among(encoder, gone), swap)
    return states[0] if len(filters) == 1 else states


def reset(node: Any, *filters: FilterLike, batch_shape: int | tuple[int, ...] = ()) -> None:
    """Write again how the states with `init` start, where they live now. A model that `mu.vmap` stacked stays stacked.

    Args:
      node: a Module, a Variable, or a list, tuple or dict of them.
      *filters: which states; all with `init`, if none is given.
      batch_shape: axes that are put in front of each initial value.

    Raises:
      FilterError: the filters select a state without `init`. Nothing is written then.
      FrozenStateError: a state is frozen. Likewise.
    """
    batch_shape = (batch_shape,) if isinstance(batch_shape, int) else batch_shape
    if any(isinstance(given, tuple) and given and all(type(n) is int for n in given) for given in filters):
        raise FilterError(
            f"{show_value(list(filters))} are no filters",
            expected="filters, and then `batch_shape=`",
            got="a number or a shape",
            cure="A shape goes by its name: `mu.reset(model, batch_shape=(4,))`.",
        )
    chosen = variables(node, *filters)
    without = [path for path, cell in chosen.items() if cell.init is None]
    if filters and without:
        cell = chosen[without[0]]
        streams = isinstance(cell, RngState)
        raise FilterError(
            f"state `{show_path(without[0])}` ({type(cell).__name__}) cannot be reset: nothing says how it starts",
            path=show_path(without[0]),
            expected="states that were made with `init=`",
            got=None if len(without) == 1 else f"{len(without)} without",
            made_at=cell.made_at,
            cure="`mu.reseed(model, default=0)` starts random streams anew."
            if streams
            else f"Say how it starts, `{spelled(type(cell))}(init=lambda: jnp.zeros(3))`; `mu.reset(model)` takes those that do.",
        )
    cells = [cell for cell in chosen.values() if cell.init is not None]
    values = [_placed_like(cell, started(cell, batch_shape)) for cell in cells]
    with Transaction("reset") as tx:
        for cell, value in zip(cells, values, strict=True):
            cell.set(value)
        access.commit(tx)


def _placed_like(cell: Variable, value: Any) -> Any:
    """A value where the state's present one is, if that is on several devices and has as many axes."""
    where = access.placement(cell)
    leaves, treedef = jax.tree.flatten(value)
    old = jax.tree.leaves(access.peek(cell))
    if where is None or len(where) != len(leaves) or [x.ndim for x in leaves] != [x.ndim for x in old]:
        return value
    return treedef.unflatten([jax.device_put(x, sharding) for x, sharding in zip(leaves, where, strict=True)])
