"""Guards: what is compared before each call, to notice that something a function names is bound to something else.

A **place** is where something can be changed without the function being told: a closure cell, a name in a namespace (a module,
an object, a class), a slot of an object, what a container or an array holds. Guards compare places with what they held, by
identity.
"""

from __future__ import annotations

import contextlib
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from functools import partial
from operator import is_
from typing import Any, NamedTuple

import numpy as np

from mutatis.core.containers import ContainerSnapshot
from mutatis.core.nodes import holds_nodes, identity, is_container, is_node
from mutatis.errors import StructureError
from mutatis.tracing.codes import contents

EMPTY = object()  # what an unbound place holds


class Place(NamedTuple):
    """Something that can be changed, and what it held.

    Attributes:
      owner: the cell, namespace, object, container or array.
      key: the name in it; None for all that it holds.
      held: what it held: one value, a list of values, or the bytes of an array. Of a node its `identity`: it is not kept alive.
    """

    owner: Any
    key: str | None
    held: Any


class Guards:
    """Places, with what they held when they were added; each is compared once."""

    __slots__ = (
        "_cells",
        "_containers",
        "_content",
        "_kinds",
        "_names",
        "_nodes",
        "_odd",
        "_of_classes",
        "_seen",
        "_slots",
        "_values",
    )

    def __init__(self) -> None:
        self._cells: list[Place] = []
        self._names: list[Place] = []
        self._of_classes: list[Place] = []
        self._slots: list[Place] = []
        self._kinds: list[tuple[Any, type]] = []  # objects, each with its class
        self._containers: list[Place] = []  # plain lists and dicts
        self._odd: list[tuple[Callable[[Any], Any], Place]] = []  # with what reads them
        self._seen: set[tuple[int, str | None]] = set()
        self._content: ContainerSnapshot
        self._values: tuple[list[tuple[Any, ...]], ...]  # those places that hold values, as they are compared
        self._nodes: list[
            tuple[Callable[[], Any], int]
        ]  # how to read those that hold nodes, and the `identity` of each

    def add_cell(self, cell: types.CellType, value: Any) -> None:
        """Guard a closure cell."""
        if self._is_new(cell, None):
            self._cells.append(Place(cell, None, _held(value)))

    def add_name(self, namespace: dict[str, Any], key: str, value: Any) -> None:
        """Guard a name in the namespace of a module or an object; `EMPTY`: that it is not there."""
        if self._is_new(namespace, key):
            self._names.append(Place(namespace, key, _held(value)))

    def add_of_class(self, kind: type, key: str, value: Any) -> None:
        """Guard a name in the namespace of a class, without those of its bases."""
        if self._is_new(kind, key):
            self._of_classes.append(Place(kind, key, _held(value)))

    def add_slot(self, obj: Any, key: str, value: Any) -> None:
        """Guard a slot of an object."""
        if self._is_new(obj, key):
            self._slots.append(Place(obj, key, _held(value)))

    def add_kind(self, obj: Any) -> None:
        """Guard the class of an object."""
        if self._is_new(obj, _CLASS):
            self._kinds.append((obj, type(obj)))

    def add_contents(self, container: Any) -> None:
        """Guard what a container or a NumPy array holds."""
        if self._is_new(container, None):
            if type(container) in (list, dict):
                self._containers.append(Place(container, None, items_of(container)))
            else:
                read = _bytes if isinstance(container, np.ndarray) else items_of
                self._odd.append((read, Place(container, None, read(container))))

    def _is_new(self, owner: Any, key: str | None) -> bool:
        mark = (id(owner), key)
        if mark in self._seen:
            return False
        self._seen.add(mark)
        return True

    def close(self) -> None:
        """Make ready for comparing; nothing is added from now on."""
        self._content = ContainerSnapshot([place.owner for place in self._containers])
        self._nodes = [
            *((partial(contents, p.owner, EMPTY), int(p.held)) for p in _of_nodes(self._cells)),
            *((partial(dict.get, p.owner, p.key, EMPTY), int(p.held)) for p in _of_nodes(self._names)),
            *((partial(p.owner.__dict__.get, p.key, EMPTY), int(p.held)) for p in _of_nodes(self._of_classes)),
            *((partial(getattr, p.owner, p.key, EMPTY), int(p.held)) for p in _of_nodes(self._slots)),
        ]
        self._values = (
            [(place.owner, place.held) for place in _of_values(self._cells)],
            [(place.owner, place.key, place.held) for place in _of_values(self._names)],
            [(place.owner.__dict__, place.key, place.held) for place in _of_values(self._of_classes)],
            [(place.owner, place.key, place.held) for place in _of_values(self._slots)],
        )
        self._seen.clear()

    def unchanged(self) -> bool:
        """Whether every place holds what it held."""
        cells, names, classes, slots = self._values
        # Plain loops: `id` is slow where there is an audit hook, as some packages put in place.
        try:
            for cell, held in cells:
                if cell.cell_contents is not held:
                    return False
        except ValueError:  # one of them was emptied
            if any(contents(cell, EMPTY) is not held for cell, held in cells):
                return False
        for namespace, key, held in names:
            if dict.get(namespace, key, EMPTY) is not held:
                return False
        for namespace, key, held in classes:
            if namespace.get(key, EMPTY) is not held:
                return False
        for obj, key, held in slots:
            if getattr(obj, key, EMPTY) is not held:
                return False
        for obj, kind in self._kinds:
            if type(obj) is not kind:
                return False
        if self._nodes and any(identity(read()) != number for read, number in self._nodes):
            return False
        if not self._content.unchanged():
            return False
        return not self._odd or all(_same(read(place.owner), place.held) for read, place in self._odd)

    def changed(self) -> list[tuple[Place, Any]]:
        """The places that hold something else now, with what that is, as in `Place.held`."""
        now: list[tuple[Place, Any]] = []
        now += [(place, _held(contents(place.owner, EMPTY))) for place in self._cells]
        now += [(place, _held(place.owner.get(place.key, EMPTY))) for place in self._names]
        now += [(place, _held(place.owner.__dict__.get(place.key, EMPTY))) for place in self._of_classes]
        now += [(place, _held(getattr(place.owner, str(place.key), EMPTY))) for place in self._slots]
        now += [(Place(obj, _CLASS, kind), type(obj)) for obj, kind in self._kinds]
        now += [(place, items_of(place.owner)) for place in self._containers]
        now += [(place, read(place.owner)) for read, place in self._odd]
        return [(place, held) for place, held in now if not _same(place.held, held)]

    def moved(self) -> list[Place]:
        """The places that held states and hold others now, or in another order, and the objects that have another class."""
        return [place for place, now in self.changed() if place.key == _CLASS or _moves(place, now)]


_CLASS = "__class__"
_NO_DATA = (types.ModuleType, types.FunctionType, type)  # what they hold is not theirs alone


def _moves(place: Place, now: Any) -> bool:
    before = _nodes_in(place.held)  # what is put where nothing was is new, or found once more
    if not before:
        return False
    after = _nodes_in(now)
    return sorted(before) != sorted(after) if isinstance(place.owner, set) else before != after


def _nodes_in(held: Any, depth: int = 5) -> list[int]:
    """The nodes that a place held, itself or in a container or plain object, by `identity`."""
    if type(held) is _OfNode or is_node(held):
        return [int(held) if type(held) is _OfNode else identity(held)]
    if is_container(held):
        inside = held.values() if isinstance(held, dict) else held
    else:
        attributes = None if isinstance(held, _NO_DATA) else getattr(held, "__dict__", None)
        inside = [item for item in attributes.values() if holds_nodes(item)] if isinstance(attributes, dict) else []
    return [node for item in inside if holds_nodes(item, depth) for node in _nodes_in(item, depth - 1)]


def refuse_moves(guards: Guards, nodes: Iterable[Any], where: str) -> None:
    """Raise if a traced function moved states in a place of which no transform keeps account; what can be put back is.

    Args:
      guards: what the function names.
      nodes: the states and modules that it may have moved.
      where: the transform, for the message.

    Raises:
      StructureError: it did, or it gave an object another class.
    """
    moved = guards.moved()
    if not moved:
        return
    known = {identity(node): node for node in nodes}
    for place in moved:
        _put_back(place, known)
    place = moved[0]
    owner = type(place.owner).__name__
    name = f"{place.owner.__name__}.{place.key}" if isinstance(place.owner, type) else place.key
    what = f"a {owner} that holds states" if place.key is None else f"`{name}`"
    what = f"the class of an object of `{place.held.__name__}`" if place.key == _CLASS else what
    raise StructureError(
        f"{what} was changed by a function that is traced, and a program would not do that again",
        path=None if place.key in (None, _CLASS) else name,
        where=where,
        expected="changes of attributes of modules and plain objects, of lists, dicts, and variables",
        got="another order, or others"
        if place.key is None
        else f"another {'class' if place.key == _CLASS else 'object'} than before",
        cure="Change it outside of the function; or keep the states in a list, a dict or a module, whose changes each call "
        "does again.",
    )


def _put_back(place: Place, nodes: dict[int, Any]) -> None:
    """Have a place hold what it held, as far as Python lets it.

    Args:
      place: the place.
      nodes: those that it may have held, by `identity`.
    """
    held = nodes.get(int(place.held), EMPTY) if type(place.held) is _OfNode else place.held
    with contextlib.suppress(Exception):
        if place.key is None:
            _refill(place.owner, held)
        elif held is not EMPTY and isinstance(place.owner, dict):
            place.owner[place.key] = held
        elif held is not EMPTY:
            setattr(place.owner, place.key, held)


def _refill(container: Any, items: list[Any]) -> None:
    if isinstance(container, types.CellType):
        if items is not EMPTY:
            container.cell_contents = items
    elif isinstance(container, dict):
        half = len(items) // 2
        kind = OrderedDict if isinstance(container, OrderedDict) else dict
        kind.clear(container)
        for key, value in zip(items[:half], items[half:], strict=True):
            kind.__setitem__(container, key, value)
    elif isinstance(container, list):
        list.__setitem__(container, slice(None), items)
    elif isinstance(container, deque | set):
        container.clear()
        (container.extend if isinstance(container, deque) else container.update)(items)


class _OfNode(int):
    """The `identity` of a node."""


def _held(value: Any) -> Any:
    return _OfNode(identity(value)) if is_node(value) else value


def _of_nodes(places: list[Place]) -> list[Place]:
    return [place for place in places if type(place.held) is _OfNode]


def _of_values(places: list[Place]) -> list[Place]:
    return [place for place in places if type(place.held) is not _OfNode]


def _same(a: Any, b: Any) -> bool:
    if type(a) is list and type(b) is list:
        return len(a) == len(b) and all(map(is_, a, b))
    return a is b or (type(a) is type(b) and type(a) in (bytes, _OfNode) and bool(a == b))


def _bytes(array: Any) -> bytes:
    return bytes(array.tobytes())


def items_of(container: Any) -> list[Any]:
    """What a container holds; of a mapping first its keys. Not what a user's class says: its own methods are not asked."""
    if isinstance(container, OrderedDict):  # whose order is its own
        return [*OrderedDict.keys(container), *OrderedDict.values(container)]
    if isinstance(container, dict):
        return [*dict.keys(container), *dict.values(container)]
    if isinstance(container, types.MappingProxyType):
        return [*container.keys(), *container.values()]
    kind: Any = next(kind for kind in (list, tuple, set, frozenset, deque) if isinstance(container, kind))
    return [*kind.__iter__(container)]


def is_held_node(held: Any) -> bool:
    """Whether a place held a node, or a container of some."""
    return type(held) is _OfNode or holds_nodes(held)
