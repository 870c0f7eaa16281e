"""State operations: taking the values out of a model and putting them back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, overload

import jax

from mutatis import _compat
from mutatis.core import access, naming, nearness
from mutatis.core.avals import same_type, show_type
from mutatis.core.calls import as_shape
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
from mutatis.model.kinds import BatchStat, Buffer, MetricState, OptState, Param, RngState
from mutatis.model.state import State, first_filters, paths_of_texts
from mutatis.model.strangers import plain_value
from mutatis.model.surgery import GONE, held_fast, holders_among, rewrite, swapped
from mutatis.model.tags import check_tags
from mutatis.model.values import as_value
from mutatis.model.variables import Variable, spelled, started
from mutatis.model.walks import check_node, holder_of, variables

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
    """Read the values of a model: a `State`, which maps the path of each state to its present value.

    A state with several paths (a shared weight) is listed once, at its first path.

    Args:
      node: a Module, a Variable, or a list, tuple or dict of them.
      *filters: which states. Without filters, one State holds everything. Each filter gives one State, which holds the states
        that it selects and no earlier filter does. States that no filter selects are left out. ``...`` as the last filter takes
        the rest.

    Returns:
      One `State`, or with several filters a tuple of them.

    Note:
      The arrays in the State stay valid. For this, the next compiled step copies these states once, instead of donating their
      memory, if the State still exists or an array of it was looked at.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> norm = mu.nn.BatchNorm(2)
      >>> params, rest = mu.state(norm, mu.Param, ...)
      >>> [*params], [*rest]
      ([('bias',), ('scale',)], [('mean',), ('var',)])
      >>> params["scale"]
      Array([1., 1.], dtype=float32)
    """
    cells = variables(node)
    if not filters:
        return _state_of(cells)
    places = first_filters(cells.items(), filters, leftovers=True)
    check_tags([filter for i, filter in enumerate(filters) if i not in places.values()], cells)
    states = tuple(_state_of({p: cells[p] for p, at in places.items() if at == i}) for i in range(len(filters)))
    return states[0] if len(filters) == 1 else states


def _state_of(cells: Mapping[Path, Variable]) -> State:
    values, lending = access.lend([*cells.values()])
    kinds = dict(zip(cells, map(type, cells.values()), strict=True))
    return State(dict(zip(cells, values, strict=True)), kinds, lending)


def graphdef(node: T) -> GraphDef[T]:
    """Read the structure of a model without its values: hashable, without arrays, and equal for models of equal structure.

    Args:
      node: a Module, a Variable, or a list, tuple or dict of them.

    Returns:
      A `GraphDef`, the first item of `mu.split`. `mu.merge` builds a model from it and values.

    Example:
      >>> import mutatis as mu
      >>> a, b = mu.nn.Linear(2, 1, rngs=mu.Rngs(0)), mu.nn.Linear(2, 1, rngs=mu.Rngs(1))
      >>> mu.graphdef(a) == mu.graphdef(b)
      True
      >>> model = mu.merge(mu.graphdef(a), mu.state(b))
    """
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
    """Take a model apart: its structure without values (a `GraphDef`), and its values as one or more `State`s.

    `mu.merge` puts them together again. In between, the values can go through code that wants pure functions of arrays, such as
    raw JAX transforms.

    Args:
      node: a Module, a Variable, or a list, tuple or dict of them.
      *filters: which states go into which State; each state is in the State of the first filter that selects it. Without filters
        there is one State of everything.

    Returns:
      A tuple: the GraphDef, which is static and hashable, and then a State for each filter.

    Raises:
      FilterError: states are left over, because no filter selects them (``...`` as the last filter takes the rest).

    Example:
      >>> import jax, jax.numpy as jnp, mutatis as mu
      >>> graphdef, params, rest = mu.split(mu.nn.BatchNorm(2).eval(), mu.Param, ...)
      >>> def loss_fn(params, x):
      ...     model = mu.merge(graphdef, params, rest)
      ...     return jnp.sum(model(x))
      >>> jax.grad(loss_fn)(params, jnp.ones((4, 2)))["bias"]
      Array([4., 4.], dtype=float32)
    """
    definition, cells = describe_graph(node)
    by_path = dict(zip(definition.paths, cells, strict=True))
    everything = _state_of(by_path)
    if not filters:
        return definition, everything
    places = first_filters(by_path.items(), filters)
    check_tags([filter for i, filter in enumerate(filters) if i not in places.values()], by_path)
    return definition, *(everything._only(p for p, at in places.items() if at == i) for i in range(len(filters)))


@uncollected
def merge(definition: GraphDef[T], *states: State | Mapping[Any, Any]) -> T:
    """Build a new model from a `GraphDef` and values; the inverse of `mu.split`.

    The new model has states of its own, so writes to it do not reach the model that was split. States that were shared between
    places are shared again.

    Args:
      definition: the GraphDef, from `mu.split` or `mu.graphdef`.
      *states: `State`s or dictionaries by path that together have one value for each state.

    Returns:
      A new node of the same structure, such as a module.

    Raises:
      StructureError: a value is missing, or one belongs to no path.
      StateTypeError: a value has another structure, shape or dtype than the GraphDef was made with.

    Example:
      >>> import jax, jax.numpy as jnp, mutatis as mu
      >>> model = mu.nn.Linear(2, 1, rngs=mu.Rngs(0))
      >>> graphdef, state = mu.split(model)
      >>> zeros = mu.merge(graphdef, jax.tree.map(jnp.zeros_like, state))
      >>> zeros(jnp.ones(2)), zeros.kernel is model.kernel
      (Array([0.], dtype=float32), False)
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
    """Make an independent copy of a model with the same values.

    Writes to the copy do not reach the original, nor the other way round. States that are shared between places of the model are
    shared in the copy too. Random streams are copied like other states, so the copy draws the same numbers as the original would.

    Args:
      node: a Module, a Variable, or a list, tuple or dict of them.

    Returns:
      A new node of the same structure.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> model = mu.nn.Linear(2, 1, rngs=mu.Rngs(0))
      >>> target = mu.clone(model)
      >>> model.bias.value = jnp.ones(1)
      >>> target.bias.value
      Array([0.], dtype=float32)
    """
    return merge(*split(node))


def update(node: Any, *states: State | Mapping[Any, Any], cast: bool = False) -> None:
    """Write values into the states of a model, by path. All values are checked before the first is written.

    Args:
      node: a Module, a Variable, or a list, tuple or dict of them.
      *states: `State`s, nested dictionaries, flat dictionaries whose keys are paths, or the result of `nnx.state` of Flax. They
        need not cover all states. A later one overrides an earlier one.
      cast: whether to convert a value of another dtype. If False, another dtype is an error.

    Raises:
      StateTypeError: a path does not exist, or a value has another structure, shape or dtype; the message lists all of them.
      FrozenStateError: a state is frozen.

    Example:
      >>> import jax, jax.numpy as jnp, mutatis as mu
      >>> model = mu.nn.Linear(2, 1, rngs=mu.Rngs(0))
      >>> mu.update(model, {"bias": jnp.ones(1)})
      >>> model.bias.value
      Array([1.], dtype=float32)
      >>> mu.update(model, jax.tree.map(lambda x: 0.5 * x, mu.state(model, mu.Param)))
      >>> model.bias.value
      Array([0.5], dtype=float32)
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
    near = nearness.nearest(show_path(path), map(show_path, paths))
    return f" (nearest: {near})" if near else ""


def flat_for(part: Any, paths: Iterable[Path]) -> dict[Path, Any]:
    """A State or dictionary by path, nested or flat (as `variables` gives it, or as paths are printed).

    A dictionary at a full path is a value.
    """
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
    meant = paths_of_texts([path for path in flat if path not in ends], ends)
    return {meant.get(path, path): value for path, value in flat.items()} if meant else flat


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
    """Remove states from a model and return their values. The attributes that held the states are removed too.

    A typical use is to take out the values that `mu.sow` kept.

    Args:
      node: a Module, or a list, tuple or dict of modules and states.
      *filters: which states; at least one filter.

    Returns:
      One `State`, or with several filters a tuple of them: each state is in the State of the first filter that selects it.

    Raises:
      FilterError: no filter was given.
      StructureError: a state cannot be taken from its place: it is the node itself, or an item of a tuple that is the node.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> class Net(mu.Module):
      ...     def __call__(self, x):
      ...         mu.sow(self, "doubled", 2 * x)
      ...         return x
      >>> net = Net()
      >>> _ = net(jnp.ones(2))
      >>> mu.pop(net, mu.Intermediate)["doubled"]
      (Array([2., 2.], dtype=float32),)
      >>> hasattr(net, "doubled")
      False
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


_OF_A_BATCH = (Param, BatchStat, MetricState, Buffer, OptState)


def reset(node: Any, *filters: FilterLike, batch_shape: int | Sequence[int] = ()) -> None:
    """Set states back to their start: each gets the value of its `init` again.

    The states of the layers have an `init` where a restart makes sense: statistics, caches and recurrent states. A model that
    `mu.vmap` stacked stays stacked.

    Args:
      node: a Module, a Variable, or a list, tuple or dict of them.
      *filters: which states. Without filters, all states that have an `init`.
      batch_shape: integers from 0, one or several: axes in front of each start value, such as the batch axis of a recurrent
        state. They are the shape of arrays, so they have to be known: no traced values. Without filters, states that are one
        for a whole batch start without these axes: `Param`, `BatchStat`, `MetricState` (also the records of a monitor),
        `Buffer` and `OptState`.

    Raises:
      ArgumentError: `batch_shape` is no shape. Nothing is written then.
      FilterError: a filter selects a state without `init`. Nothing is written then.
      FrozenStateError: a state is frozen. Nothing is written then.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> norm = mu.nn.BatchNorm(2)
      >>> _ = norm(jnp.ones((4, 2)))
      >>> mu.reset(norm, mu.BatchStat)
      >>> norm.mean.value
      Array([0., 0.], dtype=float32)
      >>> cell = mu.nn.GRUCell(2, 3, rngs=mu.Rngs(0))
      >>> mu.reset(cell, mu.Hidden, batch_shape=4)
      >>> cell.carry.shape
      (4, 3)
    """
    shape = as_shape(batch_shape)
    if shape is None:
        raise ArgumentError(
            f"states cannot start with `batch_shape={show_value(batch_shape)}`",
            path="batch_shape",
            where=naming.where(),
            expected="integers from 0, known when the call is made: one, or a tuple of them",
            got=show_value(batch_shape),
            cure="`mu.reset(model, mu.Hidden, batch_shape=(32,))`, with the size of an array: `batch_shape=x.shape[:1]`.",
        )
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
    axes = [() if not filters and isinstance(cell, _OF_A_BATCH) else shape for cell in cells]
    holders = [holder_of(node, path) for path, cell in chosen.items() if cell.init is not None]
    values = [started(*each) for each in zip(cells, axes, holders, strict=True)]
    with Transaction("reset") as tx:
        for cell, value in zip(cells, values, strict=True):
            cell.set(value)
        access.commit(tx)
