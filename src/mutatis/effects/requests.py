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
    """The methods of a state that a layer asked for: a protocol, for annotations.

    Example:
      >>> import dataclasses, jax
      >>> from mutatis import effects
      >>> @jax.tree_util.register_dataclass
      ... @dataclasses.dataclass
      ... class Total:
      ...     state: effects.LocalStateEffect
      ...     def __call__(self, x):
      ...         self.state.set(self.state.get() + x)
      ...         return self.state.get()
    """

    def get(self) -> T:
        """Return the value of the state."""

    def set(self, value: T) -> None:
        """Give the state a new value."""


class Effect:
    """Base class of the objects that stand for a state in a tree."""

    name: str | None
    category: Category

    def get(self) -> Any:
        """Return the value, in a layer that is called by its handler."""
        raise self._unhandled("read")

    def set(self, value: Any) -> None:
        """Give the state a new value, in a layer that is called by its handler."""
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
        """Make a copy with another explicit name; without an explicit name, return the object itself."""
        return self if self.name is None else dataclasses.replace(self, name=rename_fn(self.name))  # type: ignore[type-var]


E = TypeVar("E", bound=Effect)


@dataclasses.dataclass(frozen=True)
class InitialLocalStateRequest(Effect, Generic[T]):
    """A request for a state that has no value yet. A layer holds it in an attribute.

    Args:
      state_initializer: a function without arguments that returns the first value, an array or a pytree of arrays.
      category: the purpose of the state, any hashable value. A handler takes the states of one category.
      name: an explicit name of the state. Without one it goes by its position in the tree.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> request = mu.effects.InitialLocalStateRequest(lambda: jnp.zeros(2), category="cache", name="last")
      >>> request.as_frozen().get()
      Array([0., 0.], dtype=float32)
    """

    state_initializer: Callable[[], T]
    category: Category
    name: str | None = None

    def as_frozen(self) -> FrozenLocalStateRequest[T]:
        """Make a `FrozenLocalStateRequest` with the first value."""
        return FrozenLocalStateRequest(self.state_initializer(), self.category, self.name)


@dataclasses.dataclass(frozen=True, eq=False)  # it holds arrays, which are compared as whole values
class FrozenLocalStateRequest(Effect, Generic[T]):
    """A request for a state that has a value. The value can be read without a handler.

    `freeze_local_states` makes it. Two requests are equal if their names, categories and values are equal. Arrays are equal if
    they have the same type and elements. In a traced function, where elements are not known, an array is equal only to itself.

    Args:
      state: the value: an array or a pytree of arrays.
      category: the purpose of the state, any hashable value. A handler takes the states of one category.
      name: an explicit name of the state. Without one it goes by its position in the tree.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> request = mu.effects.FrozenLocalStateRequest(jnp.ones(2), category="cache")
      >>> request.get()
      Array([1., 1.], dtype=float32)
    """

    state: T
    category: Category
    name: str | None = None

    def get(self) -> T:
        """Return the value."""
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
    """A request for a state that another request, earlier in the tree, defines.

    Args:
      name: the explicit name of both requests.
      category: the category of both requests.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> first = mu.effects.InitialLocalStateRequest(lambda: jnp.zeros(2), category="cache", name="last")
      >>> second = mu.effects.SharedLocalStateRequest("last", category="cache")
      >>> _, states = mu.effects.handle_local_states([first, second], category="cache", state_sharing="allowed")
      >>> states
      {'last': Array([0., 0.], dtype=float32)}
    """

    name: str
    category: Category


@dataclasses.dataclass(frozen=True)
class HandledLocalStateRef(Effect):
    """A reference to a state in a handled tree. `handle_local_states` makes it.

    Args:
      handler_id: the id of the handler that gives it its value.
      category: the purpose of the state; for a Variable, its kind.
      name: the key of the state in the dictionary of states.
      was_explicitly_named: whether `name` is an explicit name; else it is a position.
    """

    handler_id: str
    category: Category
    name: str
    was_explicitly_named: bool

    def with_renamed_parameters(self, rename_fn: Rename) -> HandledLocalStateRef:
        """Make a copy with another explicit name; without an explicit name, return the reference itself."""
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
