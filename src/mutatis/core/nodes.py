"""Nodes: what the classes that make up models declare, for all that walks over models or searches for them.

What the library has to know of a class stands in tables here and not in attributes of the class: users' classes may have
attributes of any name.
"""

from __future__ import annotations

from typing import Any

from mutatis.errors import StructureError

# A number of an object that no other object has while it lives, as `id`, which asks an audit hook first: some packages that JAX
# imports put one in place, and then it is slow.
identity = object.__hash__


class Node:
    """A part of models: a Variable, a Module, or a transformed one (`Wrapped`)."""

    __slots__ = ()


def is_node(obj: Any) -> bool:
    """Whether an object is a part of models."""
    return issubclass(type(obj), Node)  # not `isinstance`, which asks a stand-in for the class that it claims to be


class Reference:
    """An attribute's value that refers to other nodes without owning them, as an optimizer does to its model.

    A copy refers to the copy of what its original refers to if that is made in the same call, and else to nothing.
    """

    __slots__ = ("_value",)

    def __init__(self, value: Any) -> None:
        self._value = value

    @property
    def value(self) -> Any:
        """What it refers to.

        Raises:
          StructureError: it is a copy, and what its original refers to was not copied with it.
        """
        if self._value is LOST:
            raise StructureError(
                "what this object refers to was not copied with it",
                expected="a copy of both, made in one call",
                got="a copy of the object alone",
                cure="Copy both together: `mu.clone((model, optimizer))`.",
            )
        return self._value

    @property
    def lost(self) -> bool:
        """Whether what the original refers to was not copied with it."""
        return self._value is LOST

    def __reduce__(self) -> tuple[Any, ...]:
        return Reference, (self._value,)

    def __repr__(self) -> str:
        return "Reference(...)"


class _Lost:
    """In the place of what a copy would refer to, had it been copied too."""

    __slots__ = ()

    def __reduce__(self) -> str:
        return "LOST"


LOST = _Lost()

_searched: dict[type, tuple[str, ...]] = {}


def declare_searched(cls: type, *attributes: str) -> None:
    """Say that these attributes of a class's objects may lead to states, though they are no parts of a module."""
    _searched[cls] = attributes


def searched_attributes(obj: Any) -> tuple[str, ...] | None:
    """The attributes of an object that transforms look into; None if nothing is said of its class."""
    return next((_searched[base] for base in type(obj).__mro__ if base in _searched), None)


def is_container(value: Any) -> bool:
    """Whether a value is a plain list, dict or tuple, which walks look into."""
    return type(value) in (list, dict) or isinstance(value, tuple)


def holds_nodes(value: Any, depth: int = 5) -> bool:
    """Whether a value is a part of models, or a plain container that holds some."""
    if is_node(value):
        return True
    if depth == 0 or not is_container(value) or len(value) > _MANY:
        return False
    return any(holds_nodes(item, depth - 1) for item in (value.values() if isinstance(value, dict) else value))


_MANY = 10_000  # longer containers are data


# -- classes that keep the states of several nodes stacked -----------------------------------------------------------

_stacked: dict[type, str] = {}
STACKED_PARTS: set[str] = set()  # their names


def declare_stacked(cls: type, name: str) -> None:
    """Say that below this attribute of a class's objects the states of several nodes are stacked, which could be a list."""
    _stacked[cls] = name
    STACKED_PARTS.add(name)


def stacked_part(cls: type) -> str | None:
    """The name of that attribute; None if there is none."""
    return next((_stacked[base] for base in cls.__mro__ if base in _stacked), None)
