"""Nodes: what the classes that make up models declare, for all that walks over models or searches for them."""

from __future__ import annotations

from typing import Any, ClassVar


class Searched:
    """An object whose attributes may lead to states, though it is no module: transforms look into those it lists."""

    __slots__ = ()
    _searched_: ClassVar[tuple[str, ...]] = ()  # the names of these attributes


class Node(Searched):
    """A part of models: a Variable, a Module, or a transformed one (`Wrapped`)."""

    __slots__ = ()
    _references_: ClassVar[tuple[str, ...]] = ()  # attributes that refer to other nodes without owning them


def is_node(obj: Any) -> bool:
    """Whether an object is a part of models."""
    return issubclass(type(obj), Node)  # not `isinstance`, which asks a stand-in for the class that it claims to be


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
