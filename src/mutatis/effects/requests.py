"""What stands in a tree for a state: requests, and references of handlers; and how to find them there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Generic, Protocol, TypeAlias, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp

from mutatis.core.nodes import is_node
from mutatis.errors import EffectError
from mutatis.model.filters import Path
from mutatis.model.variables import Variable
from mutatis.model.walks import variables
from mutatis.model.wrapped import borrows

T = TypeVar("T")
Category: TypeAlias = Hashable
Rename: TypeAlias = Callable[[str], str]


@runtime_checkable
class LocalStateEffect(Protocol[T]):
    """What a layer may do with a state that it asked for."""

    def get(self) -> T:
        """The value."""

    def set(self, value: T) -> None:
        """Give the state another value."""


class Effect:
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


E = TypeVar("E", bound=Effect)


@dataclasses.dataclass(frozen=True)
class InitialLocalStateRequest(Effect, Generic[T]):
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


@dataclasses.dataclass(frozen=True, eq=False)  # it holds arrays, which are compared as whole values
class FrozenLocalStateRequest(Effect, Generic[T]):
    """Asks for a state that has a value, which can be read without a handler.

    Two of them are equal if their names, categories and values are: arrays of one type with the same elements. In a traced
    function, where values are not known, an array is equal to itself only.

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

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FrozenLocalStateRequest) or (self.category, self.name) != (other.category, other.name):
            return False
        own, treedef = jax.tree.flatten(self.state)
        others, structure = jax.tree.flatten(other.state)
        return treedef == structure and all(map(_same_value, own, others))

    def __hash__(self) -> int:
        leaves, treedef = jax.tree.flatten(self.state)
        return hash((self.category, self.name, treedef, tuple(map(jnp.shape, leaves))))


def _same_value(a: Any, b: Any) -> bool:
    """Whether two leaves are one, or known to be equal and of one type."""
    if a is b:
        return True
    try:
        kinds = [(kind.shape, kind.dtype, kind.weak_type) for kind in (jax.typeof(a), jax.typeof(b))]
    except TypeError:  # nothing of JAX's
        return type(a) is type(b) and bool(a == b)
    if kinds[0] != kinds[1] or isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
        return False
    return bool(jnp.array_equal(a, b))


@dataclasses.dataclass(frozen=True)
class SharedLocalStateRequest(Effect):
    """Asks for a state that another request, earlier in the tree, defines.

    Args:
      name: the explicit name of both.
      category: the category of both.
    """

    name: str
    category: Category


@dataclasses.dataclass(frozen=True)
class HandledLocalStateRef(Effect):
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
REQUESTS = (InitialLocalStateRequest, FrozenLocalStateRequest, SharedLocalStateRequest)


for _class in (InitialLocalStateRequest, FrozenLocalStateRequest, SharedLocalStateRequest, HandledLocalStateRef):
    _fields = [field.name for field in dataclasses.fields(_class)]
    _children = ["state"] if _class is FrozenLocalStateRequest else []
    jax.tree_util.register_dataclass(_class, _children, [name for name in _fields if name not in _children])


def is_model(item: Any) -> bool:
    return is_node(item) or borrows(item)


def is_part(item: Any) -> bool:
    return isinstance(item, Effect) or is_model(item)


def variables_of(model: Any) -> dict[Path, Variable]:
    return {path[1:]: cell for path, cell in variables([model]).items()}  # in a list: it may be a method


def parts_of(tree: Any) -> list[tuple[Any, Any]]:
    """The requests, references and nodes of a tree (and its other leaves) with their key paths."""
    return [*jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_part)[0]]


def positions_of(tree: Any, is_leaf: Callable[[Any], bool]) -> list[tuple[str, Any]]:
    """The leaves of a tree, each with where it is: ``Chain.parts[0]/Total.state``, with the classes on the way there.

    Containers have no names, so where a layer is in a list of layers is a number and no more.
    """
    return [(text.removeprefix("/"), leaf) for text, leaf in _walk("", tree, is_leaf)]


def _walk(text: str, tree: Any, is_leaf: Callable[[Any], bool]) -> Iterator[tuple[str, Any]]:
    if is_leaf(tree):
        yield text, tree
        return
    for keys, child in jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda item: item is not tree)[0]:
        if not keys:  # an ordinary leaf
            yield text, tree
            return
        step = jax.tree_util.keystr(keys)
        is_field = isinstance(keys[0], jax.tree_util.FlattenedIndexKey) or step.startswith(".")
        yield from _walk(f"{text}/{type(tree).__name__}{step}" if is_field else text + step, child, is_leaf)
