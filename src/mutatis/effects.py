"""Effects: the local state of layers as a dictionary that goes in and comes out.

A layer of any pytree type (a dataclass, an Equinox or Penzai module, a dict) asks for state by an attribute that holds an
`InitialLocalStateRequest`. `handle_local_states` puts a reference in the place of each request and gives the values as a
dictionary; the handled layer maps ``(argument, states)`` to ``(output, new_states)``. `freeze_local_states` puts values back.

A handled call is a transaction whose overlay is filled from the dictionary. In the place of a reference stands a `Variable`
that has no value outside of it, so every transform of Mutatis understands the state, and a write that would leak is refused.
The states of a Mutatis `Module` are its Variables: the overlay lies on the model's own cells, and nothing else differs. What
the layer writes of other states is written where it was called; with handlers around handlers that is the next one's overlay.

**Names.** A state with an explicit name goes by it: moving its layer does not change it, `rename` does. Any other goes by its
position in the tree when it was handled, such as ``.parts[1].state``, which renaming does not change.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeAlias, TypeVar, runtime_checkable

import jax

from mutatis.cells import UNSET, structure_lock
from mutatis.errors import EffectError
from mutatis.filters import Filter, Path, Satisfies, as_filter
from mutatis.graph import show_path, variables
from mutatis.lifting import Site, function_name
from mutatis.modules import borrows, is_node
from mutatis.state import merge, split, thaw
from mutatis.surgery import modules
from mutatis.transactions import Transaction
from mutatis.values import as_value
from mutatis.variables import Variable, caller, detached, initial, raw_value, set_mark

T = TypeVar("T")
Category: TypeAlias = Hashable
Rename: TypeAlias = Callable[[str], str]

__all__ = [
    "FrozenLocalStateRequest",
    "HandledLocalStateRef",
    "InitialLocalStateRequest",
    "LocalStateEffect",
    "LocalStateEffectImpl",
    "SharedLocalStateRequest",
    "WithFunctionalLocalState",
    "embed_shared_state_requests",
    "freeze_local_states",
    "handle_local_states",
    "hoist_shared_state_requests",
    "rename",
    "thaw",
]


@runtime_checkable
class LocalStateEffect(Protocol[T]):
    """What a layer may do with a state that it asked for."""

    def get(self) -> T:
        """The value."""

    def set(self, value: T) -> None:
        """Give the state another value."""


class _Effect:
    """What stands in a tree for a state."""

    name: str | None
    category: Category

    def get(self) -> Any:
        """The value, in a layer that is called by its handler."""
        raise self._unhandled("read")

    def set(self, value: Any) -> None:
        """Give the state another value, in a layer that is called by its handler."""
        raise self._unhandled("written")

    def _unhandled(self, what: str) -> EffectError:
        which = f"category={self.category!r}" if isinstance(self.category, str) else "category_predicate=lambda _: True"
        return EffectError(
            f"state `{self.name or 'without a name'}` was {what} outside of its handler",
            path=self.name,
            expected="a layer that is called by its handler",
            got=type(self).__name__,
            cure=f"`handled, states = mu.effects.handle_local_states(layer, {which})`, then "
            "`out, states = handled((x, states))`.",
        )

    def with_renamed_parameters(self: E, rename_fn: Rename) -> E:
        """The same with another explicit name, if it has one."""
        return self if self.name is None else dataclasses.replace(self, name=rename_fn(self.name))  # type: ignore[type-var]


E = TypeVar("E", bound=_Effect)


@dataclasses.dataclass(frozen=True)
class InitialLocalStateRequest(_Effect, Generic[T]):
    """Asks for a state that has yet to start.

    Args:
      state_initializer: a function of no arguments that makes the first value.
      category: what the state is for; a handler takes the states of its category.
      name: an explicit name.
    """

    state_initializer: Callable[[], T]
    category: Category
    name: str | None = None

    def as_frozen(self) -> FrozenLocalStateRequest[T]:
        """The same with its first value."""
        return FrozenLocalStateRequest(self.state_initializer(), self.category, self.name)


@dataclasses.dataclass(frozen=True, eq=False)  # it holds arrays
class FrozenLocalStateRequest(_Effect, Generic[T]):
    """Asks for a state that has a value, which can be read without a handler.

    Args:
      state: the value: an array or a pytree of arrays.
      category: what the state is for.
      name: an explicit name.
    """

    state: T
    category: Category
    name: str | None = None

    def get(self) -> T:
        """The value."""
        return self.state


@dataclasses.dataclass(frozen=True)
class SharedLocalStateRequest(_Effect):
    """Asks for a state that another request, earlier in the tree, defines.

    Args:
      name: the explicit name of both.
      category: the category of both.
    """

    name: str
    category: Category


@dataclasses.dataclass(frozen=True)
class HandledLocalStateRef(_Effect):
    """Stands in a handled tree for a state.

    Args:
      handler_id: the handler that fills it.
      category: what the state is for; of a Variable, its kind.
      name: its key in the dictionary of states.
      was_explicitly_named: whether that is an explicit name, else a position.
    """

    handler_id: str
    category: Category
    name: str
    was_explicitly_named: bool

    def with_renamed_parameters(self, rename_fn: Rename) -> HandledLocalStateRef:
        """The same with another explicit name, if it has one."""
        return super().with_renamed_parameters(rename_fn) if self.was_explicitly_named else self


Request: TypeAlias = InitialLocalStateRequest[Any] | FrozenLocalStateRequest[Any]
_REQUESTS = (InitialLocalStateRequest, FrozenLocalStateRequest, SharedLocalStateRequest)


class LocalStateEffectImpl(Variable):
    """What stands for a state while a handled layer runs: a Variable whose value is in the call's transaction only."""


@dataclasses.dataclass(frozen=True, eq=False)  # a function to JAX: hashed by identity
class WithFunctionalLocalState:
    """A layer whose states go in and come out: ``handled((argument, states)) -> (output, new_states)``.

    A pytree, made by `handle_local_states`. As a function of ``(argument, states)`` it goes through raw JAX transforms. A Module
    in it is live: its other states are read and written as anywhere, so raw `jax.jit` refuses those that are neither
    handled nor frozen, unless the handled object is one of its arguments. Its states are looked up by name or path at each call.

    Args:
      handler_id: tells its references from those of other handlers.
      body: the layer, with references in the place of the requests.
      variables: the states in the Modules of the body.
    """

    handler_id: str
    body: Any
    variables: tuple[HandledLocalStateRef, ...] = ()

    _searched_: ClassVar[tuple[str, ...]] = ("body", "_models")  # what these name is captured by transforms of Mutatis

    def __call__(self, argument: Any, states: Mapping[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Run the layer.

        Args:
          argument: ``(argument, states)``, or the layer's argument if the states are given beside it.
          states: the states.

        Returns:
          The output, and what the states are then.

        Raises:
          EffectError: the states are not those of the layer.
        """
        inner, given = _pair(argument) if states is None else (argument, states)
        self._check(given)
        cells: dict[str, Variable] = {name: _live(name) for name in given} | self._cells()
        body = _replace(self.body, self.handler_id, lambda ref: cells[ref.name])

        def layer(argument: Any) -> Any:
            return body(argument)

        layer.__qualname__ = function_name(body)
        with _writable(cells.values()):
            overlay = {cell: as_value(given[name], cell) for name, cell in cells.items()}
            others = [("body", self.body)]
            with Site("handle_local_states", layer, (inner,), {"states": cells}, others) as site:
                end, leaves, values = site.run(overlay, call=lambda: layer(inner))
                site.refuse_changes("a handled layer, which is a pure function")
                _check_output(end.nodes, cells)
                written = dict(zip(end.cells, values, strict=True))
                new = {name: written.pop(cell, given[name]) for name, cell in cells.items()}
                end.cells = [*written]
                return site.commit(end, [*written.values()], leaves), new

    def with_renamed_parameters(self, rename_fn: Rename) -> WithFunctionalLocalState:
        """The same with other explicit names, as `rename` gives it."""
        return rename(self, rename_fn)

    @property
    def _models(self) -> list[Any]:
        """The Modules and Variables in the body, however deep."""
        return [part for _, part in _parts(self.body) if _is_model(part)]

    def _names(self) -> list[str]:
        """The keys of the states."""
        names = [ref.name for ref in self.variables]
        _replace(self.body, self.handler_id, lambda ref: names.append(ref.name))
        return [*dict.fromkeys(names)]

    def _cells(self) -> dict[str, Variable]:
        """The states in the Modules of the body, by their keys."""
        if not self.variables:
            return {}
        found = _keyed(self.body)
        missing = [f"missing: {ref.name}" for ref in self.variables if ref.name not in found]
        if missing:
            raise EffectError(
                "the model has changed since it was handled",
                differences=missing,
                cure="Handle it again: `handled, states = mu.effects.handle_local_states(model, category=...)`.",
            )
        return {ref.name: found[ref.name][0] for ref in self.variables}

    def _check(self, states: Mapping[str, Any]) -> None:
        names = self._names()
        if set(states) != set(names):
            raise EffectError(
                "the states are not those of the handled layer",
                differences=[
                    *(f"missing:    {name}" for name in names if name not in states),
                    *(f"unexpected: {name}" for name in states if name not in names),
                ],
                cure="Pass the dictionary that `mu.effects.handle_local_states` gave, or one that the handled layer returned.",
            )


for _class, _children in (
    (InitialLocalStateRequest, []),
    (FrozenLocalStateRequest, ["state"]),
    (SharedLocalStateRequest, []),
    (HandledLocalStateRef, []),
    (WithFunctionalLocalState, ["body", "variables"]),
):
    _fields = [field.name for field in dataclasses.fields(_class)]
    jax.tree_util.register_dataclass(_class, _children, [name for name in _fields if name not in _children])


# -- handling and freezing ------------------------------------------------------------------------------------------


def handle_local_states(
    body: Any,
    category: Any = None,
    category_predicate: Callable[[Any], bool] | None = None,
    lazy: bool = False,
    state_sharing: Literal["forbidden", "allowed", "unsafe"] = "forbidden",
    handler_id: str | None = None,
) -> tuple[WithFunctionalLocalState, Any]:
    """Make the states of a layer an argument and a result.

    Args:
      body: any pytree. It is not changed.
      category: which requests, by equality; of the Variables in Modules those that it selects as a filter.
      category_predicate: which categories, in place of `category`. A Variable is asked for by its `collection`.
      lazy: whether the initializers run later.
      state_sharing: whether states may have one name. ``"allowed"`` accepts shared requests after the place with the value, and
        initial requests with the same initializer object; ``"unsafe"`` anything, and takes the last.
      handler_id: tells its references from those of other handlers; found if not given.

    Returns:
      The handled layer and the initial dictionary, or a function that gives it if `lazy`.

    Raises:
      EffectError: requests contradict each other, two states have one name, or an argument means nothing.

    Example:
      >>> import dataclasses
      >>> from mutatis import effects
      >>> @jax.tree_util.register_dataclass
      ... @dataclasses.dataclass
      ... class Total:
      ...     state: effects.LocalStateEffect
      ...     def __call__(self, x):
      ...         self.state.set(self.state.get() + x)
      ...         return self.state.get()
      >>> layer = Total(effects.InitialLocalStateRequest(lambda: jnp.zeros(()), category="sums"))
      >>> handled, states = effects.handle_local_states(layer, category="sums")
      >>> jax.jit(handled)((2.0, states))
      (Array(2., dtype=float32), {'.state': Array(2., dtype=float32)})
    """
    wanted = _choice(category, category_predicate)
    if state_sharing not in ("forbidden", "allowed", "unsafe"):
        raise EffectError(
            f"`state_sharing` cannot be {state_sharing!r}",
            expected='"forbidden", "allowed" or "unsafe"',
            got=repr(state_sharing),
            cure='`mu.effects.handle_local_states(layer, category="state", state_sharing="allowed")`',
        )
    identity = _new_id(body, handler_id)
    definitions: dict[str, Any] = {}  # by key: a request, or a Variable
    refs = []
    for _, part in _parts(body):
        if _is_model(part):
            _check_module(part)
    for key, (cell, path) in _keyed(body).items():
        if _selection(category, category_predicate)(path, cell):
            definitions[key] = cell
            refs.append(HandledLocalStateRef(identity, type(cell), key, cell.name is not None))

    def refer(place: Any, part: Any) -> Any:
        if not isinstance(part, _REQUESTS) or not wanted(part.category):
            return part
        key = jax.tree_util.keystr(place) if part.name is None else part.name
        before = definitions.get(key)
        if isinstance(part, SharedLocalStateRequest):
            _check_shared(part, before, state_sharing)
        else:
            _check_definition(key, part, before, state_sharing)
            definitions[key] = part
        return HandledLocalStateRef(identity, part.category, key, part.name is not None)

    handled = jax.tree_util.tree_map_with_path(refer, body, is_leaf=_is_part)

    def start() -> dict[str, Any]:
        return {key: _first_value(key, definition) for key, definition in definitions.items()}

    return WithFunctionalLocalState(identity, handled, tuple(refs)), start if lazy else start()


def freeze_local_states(handled: WithFunctionalLocalState, states: Mapping[str, Any]) -> Any:
    """The layer of a handler with these values in it, and without the handler.

    Requests come back as `FrozenLocalStateRequest`, the later places of a shared name as `SharedLocalStateRequest`. A Module is
    copied, and its handled Variables are frozen; `mu.thaw` makes them live. The result can be saved, and handled again.

    Raises:
      EffectError: the states are not those of the layer.
    """
    handled._check(states)
    seen: set[str] = set()

    def freeze(ref: HandledLocalStateRef) -> Any:
        if not ref.was_explicitly_named:
            return FrozenLocalStateRequest(states[ref.name], ref.category)
        if ref.name in seen:
            return SharedLocalStateRequest(ref.name, ref.category)
        seen.add(ref.name)
        return FrozenLocalStateRequest(states[ref.name], ref.category, ref.name)

    parts, tree = jax.tree.flatten(_replace(handled.body, handled.handler_id, freeze), is_leaf=_is_part)
    with Transaction("freeze_local_states") as tx:
        tx.fill({cell: as_value(states[name], cell) for name, cell in handled._cells().items()})
        parted = split([part for part in parts if _is_model(part)])  # together, for what they share
    copies = iter(merge(*parted))
    body = tree.unflatten([next(copies) if _is_model(part) else part for part in parts])
    for cell in dataclasses.replace(handled, body=body)._cells().values():
        set_mark(cell, "_frozen", "frozen")
    return body


# -- shared states --------------------------------------------------------------------------------------------------


def hoist_shared_state_requests(tree: Any, unsafe: bool = False) -> tuple[Any, dict[str, Request]]:
    """Take the definitions of shared states out of a tree, so that its parts can be moved.

    Args:
      tree: any pytree. Variables that Modules share are left alone: a Module can be moved as it is.
      unsafe: whether definitions may differ; the last one is taken.

    Returns:
      The tree with a `SharedLocalStateRequest` at every place of a name that has several, and the definitions by name.

    Raises:
      EffectError: the places of a name have several categories or definitions.
    """
    requests = [part for _, part in _parts(tree) if isinstance(part, _REQUESTS) and part.name is not None]
    names = [request.name for request in requests]
    definitions: dict[str, Request] = {}
    categories: dict[str, Category] = {}
    for request in requests:
        name: Any = request.name
        if names.count(name) > 1:
            _check_category(name, request.category, categories.setdefault(name, request.category))
            if not isinstance(request, SharedLocalStateRequest):
                _check_definition(name, request, definitions.get(name), "unsafe" if unsafe else "allowed")
                definitions[name] = request

    def hoist(part: Any) -> Any:
        shared = isinstance(part, _REQUESTS) and part.name in definitions
        return SharedLocalStateRequest(part.name, part.category) if shared else part

    return jax.tree.map(hoist, tree, is_leaf=_is_part), definitions


def embed_shared_state_requests(tree: Any, state_requests: Mapping[str, Request]) -> Any:
    """Put the definitions of shared states into a tree, each at its first place.

    Args:
      tree: any pytree.
      state_requests: the definitions by name; names that the tree does not share are passed over.

    Raises:
      EffectError: a definition has another name or category than its places, or the tree has one already.
    """
    pending: dict[Any, Any] = dict(state_requests)
    for name, request in pending.items():
        if not isinstance(request, InitialLocalStateRequest | FrozenLocalStateRequest) or request.name != name:
            raise EffectError(
                f"state `{name}` is not defined by what goes by its name",
                path=name,
                expected=f"an initial or frozen request with the name {name!r}",
                got=f"{type(request).__name__} with the name {getattr(request, 'name', None)!r}",
                cure="Key the definitions by their names: `{r.name: r for r in state_requests.values()}`.",
            )
    for _, part in _parts(tree):
        if isinstance(part, _REQUESTS) and part.name in pending:
            _check_category(part.name, part.category, pending[part.name].category)
            if not isinstance(part, SharedLocalStateRequest):
                raise _several(part.name, pending[part.name], part)

    def embed(part: Any) -> Any:
        return pending.pop(part.name, part) if isinstance(part, SharedLocalStateRequest) else part

    return jax.tree.map(embed, tree, is_leaf=_is_part)


# -- names ----------------------------------------------------------------------------------------------------------


def rename(node: T, fn: Rename) -> T:
    """Change the explicit names of states; a state without one keeps going by its position.

    A Variable is renamed in place, like a mark: compiled programs take notice, and a transaction that fails takes it back.
    Requests, references and handlers are values, so they are renamed in the tree that is returned.

    Args:
      node: a Module, a Variable, or any pytree of them and of requests, handled or not.
      fn: gives the new name for an explicit name; it is asked once for each.

    Returns:
      The node itself, or the renamed tree.

    Raises:
      EffectError: two names become one, or a name is no string. Then nothing has changed.

    Example:
      >>> import mutatis as mu
      >>> norm = {"mean": mu.BatchStat(0.0, name="mean"), "var": mu.BatchStat(1.0)}
      >>> mu.rename(norm, lambda name: f"encoder/{name}")
      {'mean': BatchStat(0.0, float32, name='encoder/mean'), 'var': BatchStat(1.0, float32)}
    """
    parts = [part for _, part in _parts(node)]
    cells = {cell: None for part in parts if _is_model(part) for cell in _variables(part).values()}
    named: list[Any] = [part for part in [*parts, *cells] if isinstance(part, _Effect | Variable)]
    explicit = {
        part.name: None for part in named if part.name is not None and getattr(part, "was_explicitly_named", True)
    }
    before = {part.name: "a position" for part in named if not getattr(part, "was_explicitly_named", True)}
    table = {name: fn(name) for name in explicit}
    for old, new in table.items():
        if type(new) is not str or new in before:
            raise EffectError(
                f"state `{old}` cannot be renamed to {new!r}",
                path=old,
                expected="a string that names no other state",
                got=f"{before[new]}, too" if type(new) is str else type(new).__name__,
                cure="Give each its own: `mu.rename(model, lambda name: f'encoder/{name}')`.",
            )
        before[new] = f"the new name of `{old}`"
    for cell in cells:
        if cell.name is not None:
            set_mark(cell, "name", table[cell.name])
    renamed: T = jax.tree.map(
        lambda part: part.with_renamed_parameters(table.__getitem__) if isinstance(part, _Effect) else part,
        node,
        is_leaf=_is_part,
    )
    return renamed


# -- trees of requests, references and nodes ------------------------------------------------------------------------


def _is_model(item: Any) -> bool:
    return is_node(item) or borrows(item)


def _is_part(item: Any) -> bool:
    return isinstance(item, _Effect) or _is_model(item)


def _variables(model: Any) -> dict[Path, Variable]:
    return {path[1:]: cell for path, cell in variables([model]).items()}  # in a list: it may be a method


def _parts(tree: Any) -> list[tuple[Any, Any]]:
    """The requests, references and nodes of a tree (and its other leaves) with their key paths."""
    return [*jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_part)[0]]


def _replace(tree: Any, handler_id: str, make: Callable[[HandledLocalStateRef], Any]) -> Any:
    """The tree with something else in the place of a handler's references; one of the same id inside has its own."""

    def is_unit(item: Any) -> bool:
        return _is_part(item) or (isinstance(item, WithFunctionalLocalState) and item.handler_id == handler_id)

    def replace(item: Any) -> Any:
        return make(item) if isinstance(item, HandledLocalStateRef) and item.handler_id == handler_id else item

    return jax.tree.map(replace, tree, is_leaf=is_unit)


def _free(tree: Any) -> dict[Variable, tuple[str, Path]]:
    """The cells of the nodes in a tree that no handler in it has taken: where in the tree, and the path in the node."""
    found: dict[Variable, tuple[str, Path]] = {}
    is_unit = lambda item: _is_model(item) or isinstance(item, WithFunctionalLocalState)  # noqa: E731
    for at, item in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_unit)[0]:
        if isinstance(item, WithFunctionalLocalState):
            taken = {*item._cells().values()}
            inside = {
                cell: (_join(".body", at), path) for cell, (at, path) in _free(item.body).items() if cell not in taken
            }
        elif _is_model(item):
            inside = {cell: (show_path(path), path) for path, cell in _variables(item).items()}
        else:
            continue
        for cell, (place, path) in inside.items():
            found.setdefault(cell, (_join(jax.tree_util.keystr(at), place), path))
    return found


def _join(place: str, rest: str) -> str:
    return f"{place}.{rest}" if place and rest and rest[0] not in ".[" else place + rest


def _keyed(tree: Any) -> dict[str, tuple[Variable, Path]]:
    """The cells of the nodes in a tree by their keys in a dictionary of states, each with its path in its node."""
    found: dict[str, tuple[Variable, Path]] = {}
    for cell, (place, path) in _free(tree).items():
        key = place if cell.name is None else cell.name
        if key in found:
            raise EffectError(
                f"two states have the name {key!r}: {show_path(found[key][1])} and {show_path(path)}",
                path=show_path(path),
                made_at=cell.made_at,
                cure="To share a state put the same Variable in both places; else give each its own name, or none.",
            )
        found[key] = cell, path
    return found


def _live(name: str) -> LocalStateEffectImpl:
    """A state for one call."""
    cell = detached(LocalStateEffectImpl)
    cell._frozen, cell._made_at, cell.name = None, caller(), name
    return cell


@contextlib.contextmanager
def _writable(cells: Iterable[Variable]) -> Iterator[None]:
    """Let a call write what is frozen outside of it. Other threads wait, for marks are structure."""
    with contextlib.ExitStack() as stack:
        with structure_lock:
            if any(cell.frozen for cell in cells):
                stack.enter_context(structure_lock)
                stack.enter_context(thaw([*cells]))
        yield


def _first_value(key: str, definition: Any) -> Any:
    """What a state starts with."""
    if isinstance(definition, InitialLocalStateRequest):
        return as_value(definition.state_initializer(), _live(key))
    if isinstance(definition, FrozenLocalStateRequest):
        return as_value(definition.state, _live(key))
    value = raw_value(definition)
    return as_value(initial(definition), definition) if value is UNSET and definition.init is not None else value


# -- checks ---------------------------------------------------------------------------------------------------------


def _choice(category: Any, predicate: Callable[[Any], bool] | None) -> Callable[[Any], bool]:
    """Which categories of requests are meant."""
    if (category is None) == (predicate is None):
        raise EffectError(
            "which states are to be handled is said " + ("twice" if predicate else "nowhere"),
            expected="exactly one of `category` and `category_predicate`",
            got="both" if predicate else "neither",
            cure="`mu.effects.handle_local_states(layer, category='cache')`; for the category None give "
            "`category_predicate=lambda category: category is None`.",
        )
    return predicate or (lambda other: bool(other == category))


def _selection(category: Any, predicate: Callable[[Any], bool] | None) -> Filter:
    """Which Variables are meant."""
    return as_filter(category) if predicate is None else Satisfies(lambda _, cell: predicate(cell.collection))


def _new_id(body: Any, handler_id: str | None) -> str:
    """A name for a handler that no reference in its body has."""
    taken = {part.handler_id for _, part in _parts(body) if isinstance(part, HandledLocalStateRef)}
    if handler_id in taken:
        raise EffectError(
            f"the body has a handler {handler_id!r} already",
            expected="another name for each handler",
            got=f"handlers {sorted(taken)}",
            cure="Leave `handler_id` out: `mu.effects.handle_local_states(layer, category='cache')`.",
        )
    numbered = (f"local_state_{number}" for number in itertools.count())
    return handler_id or next(name for name in numbered if name not in taken)


def _check_module(node: Any) -> None:
    """Refuse requests in a Module, where they are static values that nobody fills."""
    for path, module in modules([node]).items():
        for name, value in vars(module).items():
            if any(isinstance(part, _Effect) for part in jax.tree.leaves(value, is_leaf=_is_part)):
                raise EffectError(
                    f"`{show_path((*path[1:], name))}` is a request in a Module, whose states are its Variables",
                    path=show_path((*path[1:], name)),
                    expected="a Variable",
                    got=type(value).__name__,
                    cure=f"`self.{name} = mu.Variable(init=lambda: jnp.zeros(3), tag='cache')`: `get` and `set` are the same.",
                )


def _pair(argument: Any) -> tuple[Any, Mapping[str, Any]]:
    if isinstance(argument, tuple | list) and len(argument) == 2 and isinstance(argument[1], Mapping):
        return argument[0], argument[1]
    raise EffectError(
        "a handled layer was called without states",
        expected="(argument, states)",
        got=f"{type(argument).__name__}",
        cure="`out, states = handled((x, states))`",
    )


def _check_output(nodes: Sequence[Any], cells: Mapping[str, Variable]) -> None:
    """Refuse to hand out states, which have the values of the call in it only."""
    for name, cell in cells.items():
        if any(node is cell for node in nodes):
            raise EffectError(
                f"state `{name}` was returned by its layer",
                path=name,
                expected="its value",
                got=type(cell).__name__,
                cure="Return what it holds: `return state.get()`.",
            )


def _check_category(name: Any, category: Category, other: Category) -> None:
    if category != other:
        raise EffectError(
            f"state `{name}` is shared by places of several categories",
            path=name,
            expected=repr(other),
            got=repr(category),
            cure="Give the category of the place with the value: "
            f"`mu.effects.SharedLocalStateRequest({name!r}, {other!r})`.",
        )


def _check_shared(request: SharedLocalStateRequest, before: Any, sharing: str) -> None:
    """Raise unless a place may share what was found before it."""
    if sharing == "forbidden":
        raise _forbidden(request.name)
    if before is None or isinstance(before, Variable) or before.name is None:
        raise EffectError(
            f"state `{request.name}` is shared before it is defined",
            path=request.name,
            expected="an initial or frozen request with this name, earlier in the tree",
            got="none" if before is None else "a state of a Module, or one without a name",
            cure="Put the definitions at their first places: "
            "`mu.effects.embed_shared_state_requests(*mu.effects.hoist_shared_state_requests(tree))`.",
        )
    _check_category(request.name, request.category, before.category)


def _check_definition(key: str, request: Request, before: Any, sharing: str) -> None:
    """Raise unless a request may define what is defined already."""
    if before is None:
        return
    if isinstance(before, Variable) or before.name is None or request.name is None:
        raise _several(key, before, request)  # an explicit name that is also a position
    if sharing == "forbidden":
        raise _forbidden(key)
    if sharing == "allowed":
        _check_category(key, request.category, before.category)
        both = isinstance(request, InitialLocalStateRequest) and isinstance(before, InitialLocalStateRequest)
        if not both or request.state_initializer is not before.state_initializer:  # type: ignore[union-attr]
            raise _several(key, before, request)


def _forbidden(name: str) -> EffectError:
    return EffectError(
        f"several places share the state `{name}`",
        path=name,
        expected="one place for each name (state_sharing='forbidden')",
        cure="If that is meant: `mu.effects.handle_local_states(layer, category=..., state_sharing='allowed')`. "
        "If not, give each its own name.",
    )


def _several(name: Any, before: Any, request: Any) -> EffectError:
    return EffectError(
        f"state `{name}` has several definitions",
        path=name,
        expected="one, or initial requests with the same initializer",
        got=f"{type(before).__name__} and {type(request).__name__}",
        cure=f"Leave one, and ask for it at the other places: `mu.effects.SharedLocalStateRequest({name!r}, "
        f"{request.category!r})`.",
    )
