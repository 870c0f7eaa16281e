"""Layouts: how the arguments of a call are divided among static values, nodes, and JAX's positional arguments."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from typing import Any

import jax
import numpy as np

from mutatis import _compat
from mutatis.core.nodes import Node, identity, is_node
from mutatis.core.statics import Static
from mutatis.tracing.arguments import FlatTree, check_hashable, static_positions, unflatten

_ARRAY = _compat.ARRAY
# In a key; a string alone is the name of a keyword argument.
_NUMBERS: dict[Any, Hashable] = {kind: (kind.__name__,) for kind in (bool, int, float, complex)}


_CONTAINERS = frozenset({dict, list, tuple})


def _divide_plain(container: Any, kind: type) -> tuple[Any, tuple[Hashable, ...]] | None:
    """JAX's argument for a container, and what of it goes into the key: if it is one of arrays, as most batches are, or a list or
    tuple of arrays and nodes; else None.
    """
    if kind is dict:
        types = [item.aval for item in container.values() if type(item) is _ARRAY]
        return None if len(types) < len(container) else (container, (kind, *container, *types))
    leaves: list[Any] = []
    parts: list[Hashable] = [kind]
    for item in container:
        if type(item) is _ARRAY:
            leaves.append(item)
            parts.append(item.aval)
        elif is_node(item):
            parts.append(identity(item))
        else:
            return None
    return container if len(leaves) == len(container) else leaves, tuple(parts)


def _type_of(leaf: Any) -> Any:
    """What of a leaf decides which trace it needs."""
    if isinstance(leaf, jax.Array):
        return leaf.aval
    is_array = isinstance(leaf, np.ndarray | np.generic | jax.ShapeDtypeStruct)
    return (type(leaf), leaf.shape, leaf.dtype) if is_array else type(leaf)


class Layout:
    """How the arguments of a call are divided among nodes and JAX's positional arguments."""

    __slots__ = ("mixed", "positions", "statics")

    def __init__(self, positions: list[Any], mixed: dict[Any, Any], statics: set[Any]) -> None:
        self.positions = tuple(positions)  # of JAX's arguments: a number or a keyword
        self.mixed = mixed  # positions of containers that hold nodes, with their structure
        self.statics = statics

    def rebuild(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], flat: Sequence[Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """The arguments of a call with JAX's values in the place of its leaves."""
        new_args, new_kwargs = list(args), dict(kwargs)
        for position, value in zip(self.positions, flat, strict=True):
            target: Any = new_args if isinstance(position, int) else new_kwargs
            if position in self.mixed:
                value = unflatten(self.mixed[position], value, FlatTree(target[position]).nodes)
            target[position] = value
        return new_args, new_kwargs

    def static_parts(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
        """The static arguments of a call, by position."""
        return tuple((p, Static(args[p] if isinstance(p, int) else kwargs[p])) for p in sorted(self.statics, key=str))


class Arguments:
    """Divides the arguments of one function's calls.

    Args:
      name: the transform's name, for messages.
      static_argnums: the positions of its static arguments.
      static_argnames: their names.
    """

    def __init__(self, name: str, static_argnums: Collection[int], static_argnames: Collection[str]) -> None:
        self._name = name
        self._static_argnums = static_argnums
        self._static_argnames = static_argnames
        self._has_statics = bool(static_argnums or static_argnames)

    def divide(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], tuple[Hashable, ...]]:
        """JAX's positional arguments of a call, and the key of its objects."""
        flat: list[Any] = []
        key: list[Hashable] = []
        statics = self._statics(args, kwargs) if self._has_statics else ()
        for index, value in enumerate(args):
            kind = type(value)
            if statics and index in statics:
                self._place_static(value, index, key)
            elif kind is _ARRAY:
                flat.append(value)
                key.append(value.aval)
            elif issubclass(kind, Node):
                key.append(identity(value))
            else:
                self._place(value, flat, key)
        for name in sorted(kwargs) if kwargs else ():
            key.append(name)
            if name in statics:
                self._place_static(kwargs[name], name, key)
            else:
                self._place(kwargs[name], flat, key)
        return flat, tuple(key)

    def _statics(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Collection[Any]:
        """The positions of a call's static arguments."""
        return static_positions(len(args), kwargs, self._static_argnums, self._static_argnames)

    def _place_static(self, value: Any, position: Any, key: list[Hashable]) -> None:
        check_hashable(value, position, self._name)
        key.append(Static(value))

    @staticmethod
    def _place(value: Any, flat: list[Any], key: list[Hashable]) -> None:
        kind = type(value)
        if kind is _ARRAY:
            flat.append(value)
            key.append(value.aval)
        elif is_node(value):
            key.append(identity(value))
        elif kind in _NUMBERS:
            flat.append(value)
            key.append(_NUMBERS[kind])
        elif kind in _CONTAINERS and (divided := _divide_plain(value, kind)) is not None:
            flat.append(divided[0])
            key.append(divided[1])
        else:
            packed = FlatTree(value)
            flat.append(packed.leaves if packed.nodes else value)
            key.append((packed.structure, *map(identity, packed.nodes), *map(_type_of, packed.leaves)))

    def layout(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Layout:
        """How the arguments of a call are divided."""
        positions: list[Any] = []
        mixed: dict[Any, Any] = {}
        statics = set(self._statics(args, kwargs))
        entries = [*enumerate(args), *((name, kwargs[name]) for name in sorted(kwargs))]
        for position, value in entries:
            if position not in statics and not is_node(value):
                packed = FlatTree(value)
                positions.append(position)
                if packed.nodes:
                    mixed[position] = packed.structure
        return Layout(positions, mixed, statics)
