"""`functools.cached_property` in modules: its value is kept beside the structure, not in it.

A value that is computed in ordinary Python is kept while the states that it was computed from keep their values. Inside a
transform it is computed anew and not kept: it would hold tracers, or be a constant in a program that another model shares. So
code that runs eagerly and the same code compiled always agree.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import jax

from mutatis.core import access
from mutatis.core.transactions import Transaction

Kept = dict[str, tuple[Any, list[tuple[Any, list[Any]]]]]  # by name: the value; states with the leaves that they had


class CachedProperty(functools.cached_property[Any]):
    """A cached property of a module.

    Args:
      original: what the class says.
      kept: gives what is kept of a module.
    """

    def __init__(self, original: functools.cached_property[Any], kept: Callable[[Any], Kept]) -> None:
        super().__init__(original.func)
        self.attrname = original.attrname
        self._kept = kept

    def __get__(self, instance: Any, owner: type[Any] | None = None) -> Any:
        if instance is None:
            return self
        if not access.is_outside():
            return self.func(instance)
        kept, name = self._kept(instance), self.attrname or ""
        if name in kept:
            value, states = kept[name]
            if all(_has(reference(), leaves) for reference, leaves in states):
                return value
        with Transaction(name) as tx:
            value = self.func(instance)
            access.commit(tx)
        kept[name] = value, [(weakref.ref(cell), _leaves(cell)) for cell in tx.seen]
        return value


def _leaves(cell: Any) -> list[Any]:
    """The leaves of a state's value; arrays weakly, as a value that was given up should not live on here."""
    return [weakref.ref(x) if isinstance(x, jax.Array) else lambda x=x: x for x in jax.tree.leaves(access.peek(cell))]


def _has(cell: Any, leaves: list[Any]) -> bool:
    if cell is None:
        return False
    now = jax.tree.leaves(access.peek(cell))
    return len(now) == len(leaves) and all(leaf is then() for leaf, then in zip(now, leaves, strict=True))


def adopt(cls: type, kept: Callable[[Any], Kept]) -> None:
    """Have the cached properties of a class of modules, also those of its mixins, keep their values beside the structure."""
    for base in reversed(cls.__mro__):
        for name, value in list(vars(base).items()):
            if type(value) is functools.cached_property and _first(cls, name) is value:
                setattr(cls, name, CachedProperty(value, kept))


def _first(cls: type, name: str) -> Any:
    return next(vars(base)[name] for base in cls.__mro__ if name in vars(base))
