"""Handlers: the states of a layer as an argument and a result, and back into the layer."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax

from mutatis.core import access
from mutatis.core.cells import UNSET
from mutatis.core.naming import caller, show_path
from mutatis.core.nodes import declare_searched
from mutatis.core.showing import show_class
from mutatis.core.structure import structure_lock
from mutatis.core.transactions import Transaction
from mutatis.effects.renaming import rename
from mutatis.effects.requests import (
    REQUESTS,
    Effect,
    FrozenLocalStateRequest,
    HandledLocalStateRef,
    InitialLocalStateRequest,
    Rename,
    SharedLocalStateRequest,
    is_model,
    is_part,
    parts_of,
    positions_of,
    variables_of,
)
from mutatis.effects.sharing import check_definition, check_shared
from mutatis.errors import ArgumentError, EffectError
from mutatis.model.filters import Filter, Path, Satisfies, as_filter
from mutatis.model.marks import thaw
from mutatis.model.operations import merge, split
from mutatis.model.surgery import modules
from mutatis.model.values import as_value
from mutatis.model.variables import Variable, detached, initial, set_mark
from mutatis.tracing.arguments import function_name
from mutatis.tracing.call_site import CallSite


class LocalStateEffectImpl(Variable):
    """The object that stands for a state while a handled layer runs: a Variable whose value is only in the transaction of the
    call.
    """


@dataclasses.dataclass(frozen=True, eq=False)  # a function to JAX: hashed by identity
class WithFunctionalLocalState:
    """A layer whose states go in and come out: ``handled((argument, states)) -> (output, new_states)``.

    `handle_local_states` makes it. It is a pytree, and a function of ``(argument, states)`` that goes through raw JAX transforms.
    A Module in it is live: states of the Module that are not handled are read and written as anywhere else. So raw `jax.jit`
    refuses these, unless they are frozen or the handled layer is one of its arguments. Handled states are looked up by name or
    path at each call.

    Args:
      handler_id: the id that tells its references from those of other handlers.
      body: the layer, with references in place of the requests.
      variables: references to the handled states in the Modules of the body.
    """

    handler_id: str
    body: Any
    variables: tuple[HandledLocalStateRef, ...] = ()

    def __call__(self, argument: Any, states: Mapping[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Run the layer.

        Args:
          argument: a pair ``(argument, states)``; or the argument alone, if the states are given separately.
          states: the dictionary of states.

        Returns:
          A pair: the output of the layer, and the dictionary of the new states.

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
            with CallSite("handle_local_states", layer, (inner,), {"states": cells}, others) as site:
                end, leaves, values = site.run(overlay, call=lambda: layer(inner))
                site.refuse_changes("a handled layer, which is a pure function")
                _check_output(end.nodes, cells)
                written = dict(zip(end.cells, values, strict=True))
                new = {name: written.pop(cell, given[name]) for name, cell in cells.items()}
                end.cells = [*written]
                return site.commit(end, [*written.values()], leaves), new

    def with_renamed_parameters(self, rename_fn: Rename) -> WithFunctionalLocalState:
        """Make a copy with other explicit names, as `mu.rename` does."""
        return rename(self, rename_fn)

    @property
    def _models(self) -> list[Any]:
        """The Modules and Variables in the body, however deep."""
        return [part for _, part in parts_of(self.body) if is_model(part)]

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


declare_searched(WithFunctionalLocalState, "body", "_models")  # what these name is captured by transforms of Mutatis


jax.tree_util.register_dataclass(WithFunctionalLocalState, ["body", "variables"], ["handler_id"])


def handle_local_states(
    body: Any,
    category: Any = None,
    category_predicate: Callable[[Any], bool] | None = None,
    lazy: bool = False,
    state_sharing: Literal["forbidden", "allowed", "unsafe"] = "forbidden",
    handler_id: str | None = None,
) -> tuple[WithFunctionalLocalState, Any]:
    """Turn the states of a layer into an argument and a result, so that the layer becomes a pure function.

    Args:
      body: the layer, any pytree with requests or Modules in it. It is not changed.
      category: which states to handle: the requests whose category is equal to it, and the Variables in Modules that it selects
        as a filter, such as `mu.Param`.
      category_predicate: a function from a category to a bool, in place of `category`. For a Variable it gets the `collection`.
      lazy: whether to return a function that makes the initial states, instead of the states.
      state_sharing: whether several requests may have one name: ``"forbidden"``; ``"allowed"`` for shared requests after the one
        with the value, and for initial requests with the same initializer object; or ``"unsafe"`` for any, of which the last
        counts.
      handler_id: the id that tells its references from those of other handlers. By default a free one is found.

    Returns:
      A pair: the handled layer (`WithFunctionalLocalState`), and the dictionary of the initial states, or with `lazy` a function
      that returns it.

    Raises:
      EffectError: requests contradict each other, or two states have one name.
      ArgumentError: an argument has a wrong value, or not exactly one of `category` and `category_predicate` is given.

    Example:
      >>> import dataclasses, jax, jax.numpy as jnp
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
      (Array(2., dtype=float32), {'Total.state': Array(2., dtype=float32)})
    """
    wanted = _choice(category, category_predicate)
    if state_sharing not in ("forbidden", "allowed", "unsafe"):
        raise ArgumentError(
            f"`state_sharing` cannot be {state_sharing!r}",
            expected='"forbidden", "allowed" or "unsafe"',
            got=repr(state_sharing),
            cure='`mu.effects.handle_local_states(layer, category="state", state_sharing="allowed")`',
        )
    identity = _new_id(body, handler_id)
    definitions: dict[str, Any] = {}  # by key: a request, or a Variable
    refs = []
    for _, part in parts_of(body):
        if is_model(part):
            _check_module(part)
    for key, (cell, path) in _keyed(body).items():
        if _selection(category, category_predicate)(path, cell):
            definitions[key] = cell
            refs.append(HandledLocalStateRef(identity, type(cell), key, cell.name is not None))

    def refer(place: Any, part: Any) -> Any:
        if not isinstance(part, REQUESTS) or not wanted(part.category):
            return part
        key = place if part.name is None else part.name
        before = definitions.get(key)
        if isinstance(part, SharedLocalStateRequest):
            check_shared(part, before, state_sharing)
        else:
            check_definition(key, part, before, state_sharing)
            definitions[key] = part
        return HandledLocalStateRef(identity, part.category, key, part.name is not None)

    tree = jax.tree.structure(body, is_leaf=is_part)
    handled = tree.unflatten([refer(place, part) for place, part in positions_of(body, is_part)])

    def start() -> dict[str, Any]:
        return {key: _first_value(key, definition) for key, definition in definitions.items()}

    return WithFunctionalLocalState(identity, handled, tuple(refs)), start if lazy else start()


def freeze_local_states(handled: WithFunctionalLocalState, states: Mapping[str, Any]) -> Any:
    """Put values into a handled layer and take the handler away; the inverse of `handle_local_states`.

    Requests come back as `FrozenLocalStateRequest`, and the later places of a shared name as `SharedLocalStateRequest`. A Module
    is copied, and its handled Variables are frozen; `mu.thaw` makes them writable. You can save the result, and handle it again.

    Args:
      handled: the handled layer.
      states: the dictionary of its states.

    Returns:
      A layer like the original one, with these values.

    Raises:
      EffectError: the states are not those of the layer.

    Example:
      >>> import jax.numpy as jnp
      >>> from mutatis import effects
      >>> layer = {"total": effects.InitialLocalStateRequest(lambda: jnp.zeros(()), category="sums")}
      >>> handled, states = effects.handle_local_states(layer, category="sums")
      >>> layer = effects.freeze_local_states(handled, {name: value + 1 for name, value in states.items()})
      >>> layer["total"].get()
      Array(1., dtype=float32)
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

    parts, tree = jax.tree.flatten(_replace(handled.body, handled.handler_id, freeze), is_leaf=is_part)
    with Transaction("freeze_local_states") as tx:
        tx.preload({cell: as_value(states[name], cell) for name, cell in handled._cells().items()})
        parted = split([part for part in parts if is_model(part)])  # together, for what they share
    copies = iter(merge(*parted))
    body = tree.unflatten([next(copies) if is_model(part) else part for part in parts])
    for cell in dataclasses.replace(handled, body=body)._cells().values():
        set_mark(cell, "_frozen", "frozen")
    return body


def _replace(tree: Any, handler_id: str, make: Callable[[HandledLocalStateRef], Any]) -> Any:
    """The tree with something else in the place of a handler's references; one of the same id inside has its own."""

    def is_unit(item: Any) -> bool:
        return is_part(item) or (isinstance(item, WithFunctionalLocalState) and item.handler_id == handler_id)

    def replace(item: Any) -> Any:
        return make(item) if isinstance(item, HandledLocalStateRef) and item.handler_id == handler_id else item

    return jax.tree.map(replace, tree, is_leaf=is_unit)


def _free(tree: Any) -> dict[Variable, tuple[str, Path]]:
    """The cells of the nodes in a tree that no handler in it has taken: where their node is, and the path in it."""
    found: dict[Variable, tuple[str, Path]] = {}
    is_unit = lambda item: is_model(item) or isinstance(item, WithFunctionalLocalState)  # noqa: E731
    for at, item in positions_of(tree, is_unit):
        if isinstance(item, WithFunctionalLocalState):
            taken = {*item._cells().values()}
            inside = {cell: place for cell, place in _free(item.body).items() if cell not in taken}
            here = _beside(at, f"{type(item).__name__}.body")
        elif is_model(item):
            inside = {cell: ("", path) for path, cell in variables_of(item).items()}
            here = at
        else:
            continue
        for cell, (place, path) in inside.items():
            found.setdefault(cell, (_beside(here, place), path))
    return found


def _beside(place: str, rest: str) -> str:
    """A position, and one in what is there."""
    return f"{place}/{rest}" if place and rest and rest[0] != "[" else place + rest


def _key(cell: Variable, place: str, path: Path) -> str:
    """What a cell goes by: its name, else the position of its node and its path in that."""
    if cell.name is not None:
        return cell.name
    rest = show_path(path)
    return f"{place}.{rest}" if place and rest and rest[0] != "[" else place + rest


def _keyed(tree: Any) -> dict[str, tuple[Variable, Path]]:
    """The cells of the nodes in a tree by their keys in a dictionary of states, each with its path in its node."""
    found: dict[str, tuple[Variable, Path]] = {}
    for cell, (place, path) in _free(tree).items():
        key = _key(cell, place, path)
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
    value = access.load(definition)
    return initial(definition) if value is UNSET and definition.init is not None else value


# -- checks ---------------------------------------------------------------------------------------------------------


def _choice(category: Any, predicate: Callable[[Any], bool] | None) -> Callable[[Any], bool]:
    """Which categories of requests are meant."""
    if (category is None) == (predicate is None):
        raise ArgumentError(
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
    taken = {part.handler_id for _, part in parts_of(body) if isinstance(part, HandledLocalStateRef)}
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
            if any(isinstance(part, Effect) for part in jax.tree.leaves(value, is_leaf=is_part)):
                raise EffectError(
                    f"`{show_path((*path[1:], name))}` is a request in a Module, whose states are its Variables",
                    path=show_path((*path[1:], name)),
                    expected="a Variable",
                    got=show_class(value),
                    cure=f"`self.{name} = mu.Variable(init=lambda: jnp.zeros(3), tag='cache')`: `get` and `set` are the same.",
                )


def _pair(argument: Any) -> tuple[Any, Mapping[str, Any]]:
    if isinstance(argument, tuple | list) and len(argument) == 2 and isinstance(argument[1], Mapping):
        return argument[0], argument[1]
    raise ArgumentError(
        "a handled layer was called without states",
        expected="(argument, states)",
        got=show_class(argument),
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
