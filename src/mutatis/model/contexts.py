"""Contexts: one ambient value each, such as a simulation's time step, logical axis rules or a dtype policy.

What is set is seen by everything that runs inside, on this thread. Compiled programs depend on it: a static value is part of
their key, an array or a model is an implicit argument.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
from collections.abc import Hashable, Iterator
from typing import Any, ClassVar

import jax
import numpy as np

from mutatis.core import access, avals, naming
from mutatis.core.cells import UNSET
from mutatis.core.nodes import identity, is_node
from mutatis.core.showing import show_class, show_value
from mutatis.core.statics import Static, StaticObject, check_static
from mutatis.errors import ContextError, StaticAttributeError
from mutatis.model.attributes import holds_arrays
from mutatis.model.variables import Variable, detached


class ContextValue(Variable):
    """The array (or pytree of arrays) that a context is set to."""

    collection = "context"


class Context:
    """A setting that any function can read without having it as an argument, and that a ``with`` block changes.

    `get` reads the value, and ``with context.set(value):`` changes it inside the block, on this thread. Jitted functions notice
    the change: an array or a model is an input of the program, and another static value compiles another program. So does a raw
    `jax.jit` inside a transform of Mutatis. Elsewhere it does not: it keeps a static value that it read when it traced.

    Args:
      name: the name, for messages.
      default: the value outside of all blocks. Without a default, `get` outside of a block is a `ContextError`.

    Raises:
      StaticAttributeError: `set` was given something else than arrays, a module or a hashable static value.

    Example:
      >>> import mutatis as mu
      >>> dt = mu.Context("dt", 1.0)
      >>> position = mu.Variable(0.0)
      >>> @mu.jit
      ... def move():
      ...     position.value += dt.get()
      >>> move()
      >>> with dt.set(0.5):
      ...     move()
      >>> float(position), dt.get()
      (1.5, 1.0)
    """

    __slots__ = ("__weakref__", "_number", "default", "name", "recurs")
    _numbers: ClassVar[Iterator[int]] = itertools.count()

    def __init__(self, name: str, default: Any = UNSET) -> None:
        self.name = name
        self.default = default
        self._number = next(Context._numbers)
        self.recurs = False  # whether a model that is called under a module set here keeps that for the next time

    def get(self) -> Any:
        """Read the value: the one of the innermost ``with`` block around the call, or the default.

        Raises:
          ContextError: there is neither.
        """
        active: dict[Context, Any] = dict(_active.get())
        access.depend_on_setting()
        if self not in active:
            if self.default is UNSET:
                raise ContextError(
                    f"context `{self.name}` is not set, and has no default",
                    path=self.name,
                    where=naming.where(),
                    cure=f'Set it, `with {self.name}.set(value): ...`, or give a default: `mu.Context("{self.name}", None)`.',
                )
            return self.default
        entry = active[self]
        if isinstance(entry, Static):
            return entry.value.value if isinstance(entry.value, StaticObject) else entry.value
        # Containers anew: what is changed in them stays with who asked.
        return jax.tree.map(lambda leaf: leaf, entry.get()) if isinstance(entry, ContextValue) else entry

    @contextlib.contextmanager
    def set(self, value: Any) -> Iterator[None]:
        """Set the value inside a ``with`` block; afterwards the value from before is back.

        Args:
          value: an array or a pytree of arrays, a Module or Variable, or a hashable static value such as a number or a string.

        Raises:
          StaticAttributeError: the value is none of these.
        """
        entry = self._admit(value)
        before = _active.get()
        pairs = [*(pair for pair in before if pair[0] is not self), (self, entry)]
        token = _active.set(tuple(sorted(pairs, key=lambda pair: pair[0]._number)))  # in whatever order they are set
        try:
            yield
        finally:
            _active.reset(token)

    def _admit(self, value: Any) -> Any:
        """How a value is kept: a node as it is, arrays in a cell, anything else as a static value."""
        if is_node(value):
            return value
        leaves = jax.tree.leaves(value, is_leaf=is_node)
        arrays = bool(leaves) and all(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves)
        if arrays or (len(leaves) == 1 and hasattr(value, "dtype") and holds_arrays(value)):  # or a number with a unit
            cell = detached(ContextValue)
            cell._frozen, cell.name = None, self.name
            access.create_detached(cell, cell.admit(value))
            return cell
        try:
            if any(map(is_node, leaves)):
                raise StaticAttributeError("a container of modules or states")
            if not isinstance(value, StaticObject | tuple):
                check_static(value, "Context", self.name)
            return Static(value)
        except (StaticAttributeError, TypeError):
            raise StaticAttributeError(
                f"context `{self.name}` cannot be set to {show_value(value)}",
                path=self.name,
                expected="arrays, a Module or Variable, or a hashable value such as a number, string or function",
                got=show_class(value),
                cure=f"Keep an object by its identity, `{self.name}.set(mu.static(...))`, or set a Module that holds the states.",
            ) from None

    def __repr__(self) -> str:
        return f"Context({self.name!r})"


_active: contextvars.ContextVar[tuple[tuple[Context, Any], ...]] = contextvars.ContextVar("mutatis", default=())


def active() -> tuple[tuple[Context, Any], ...]:
    """The contexts that are set, each with its entry: a `Static` or a node."""
    return _active.get()


def key() -> Hashable:
    """What of the contexts decides which program is called; models among them by identity, arrays by their types."""
    return tuple((context, _identity(entry)) for context, entry in _active.get())


def _identity(entry: Any) -> Hashable:
    if isinstance(entry, ContextValue) and entry._birth is None:
        leaves, treedef = jax.tree.flatten(entry._value)
        return treedef, *[leaf.aval for leaf in leaves], avals.placement(entry._value)
    return entry if isinstance(entry, Static) else identity(entry)


def structure() -> Hashable:
    """The same without identities: nodes are described with the other arguments."""
    return tuple((context, entry if isinstance(entry, Static) else None) for context, entry in _active.get())


def cells() -> tuple[ContextValue, ...]:
    """The arrays that are set."""
    active = _active.get()
    return tuple(entry for _, entry in active if isinstance(entry, ContextValue)) if active else ()


def nodes() -> list[Any]:
    """The modules and other nodes that are set."""
    return [entry for _, entry in _active.get() if not isinstance(entry, Static | ContextValue)]


def recurs(node: Any) -> bool:
    """Whether a node that is set comes again, by its context."""
    return any(entry is node and context.recurs for context, entry in _active.get())
