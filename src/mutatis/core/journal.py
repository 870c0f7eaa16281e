"""The journal: what was changed about the structure of models, so that it can be undone.

Attributes and marks are noted one by one, before they change. Plain lists and dicts, and the names of Python, tell nobody that
they change: what they hold is remembered at the beginning, and compared.

**Order.** What a container or name held at the beginning comes before everything that was noted. A transform inside notes of a
container what it held when that transform began, which may be something in between; undone the latest first, the beginning
has the last word.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

from mutatis.core.cells import Cell
from mutatis.core.containers import ContainerSnapshot
from mutatis.core.places import ABSENT, Place, concerns_states, refill, same_items
from mutatis.core.stamps import thawed
from mutatis.core.structure import structure

__all__ = ["ABSENT", "Entry", "Journal", "Removed", "identity", "put_back", "reorder", "undo"]

Entry: TypeAlias = tuple[
    Any, str, Any
]  # an object, the name of its attribute ("" for a container or place), what was there before


class Removed:
    """What an entry says of an attribute that was removed: its value, and the order of all attributes."""

    __slots__ = ("order", "value")

    def __init__(self, value: Any, order: tuple[str, ...]) -> None:
        self.value = value
        self.order = order


class Journal:
    """The changes of structure since it was begun.

    Args:
      containers: the plain lists and dicts whose changes count.
      places: the names, and further lists and dicts, whose changes count if they have to do with states.
    """

    __slots__ = ("_containers", "_places", "noted")

    def __init__(self, containers: Sequence[Any] = (), places: Sequence[Place] = ()) -> None:
        self._containers = ContainerSnapshot(containers, copies=True) if containers else None
        self._places = [(place, place.get()) for place in places]
        self.noted: list[Entry] = []

    def note(self, obj: Any, name: str, old: Any) -> None:
        """Note an attribute's old value, or all that a container holds, before it changes."""
        self.noted.append((obj, name, old))

    def changed_containers(self) -> list[tuple[Any, Any]]:
        """The containers that hold something else than at the beginning, each with what it held."""
        return [] if self._containers is None else self._containers.changed()

    def changed_places(self) -> list[tuple[Place, Any]]:
        """The places that hold something else than at the beginning, each with what it held; if either has to do with states."""
        changed = [(place, then) for place, then in self._places if not place.holds(then)]
        return [(place, then) for place, then in changed if concerns_states(then, place.get())]

    def entries(self) -> list[Entry]:
        """Everything that has changed, in the order in which it can be undone from the end."""
        begun = [*self.changed_places(), *self.changed_containers()]
        return [*((place, "", then) for place, then in begun), *self.noted]

    def changes(self) -> list[Entry]:
        """What is not as it was at the beginning, each with what was there then: not what was changed and changed back."""
        first: dict[tuple[int, str], Entry] = {}
        for entry in self.entries():
            first.setdefault(identity(*entry[:2]), entry)
        return [entry for entry in first.values() if not _is_as_before(*entry)]

    def made(self) -> list[Any]:
        """The objects whose attributes were all set since the beginning: those that were made since."""
        objects = {id(obj): obj for obj, _, _ in self.noted if not isinstance(obj, _NO_OBJECTS)}
        first: dict[int, dict[str, Any]] = {key: {} for key in objects}
        for obj, name, old in self.noted:
            if id(obj) in first:
                first[id(obj)].setdefault(name, old)
        return [
            obj
            for key, obj in objects.items()
            if all(first[key].get(name) is ABSENT for name in {*obj.__dict__, *first[key]})
        ]

    def hand_over(self, outer: Journal) -> None:
        """Let another journal know of everything: whoever undoes that one undoes this, too."""
        outer.noted += self.entries()
        self.noted = []

    def condense(self, concerns: Callable[[Any, str], bool]) -> None:
        """Keep of what was noted no more than it takes to undo it, and that only of some things.

        Args:
          concerns: says which, by the object and the name of its attribute.
        """
        first = set(map(id, self.changes()))
        self.noted = [entry for entry in self.noted if id(entry) in first and concerns(*entry[:2])]

    def undo(self, keeps: Callable[[Any], bool] = lambda _obj: False) -> None:
        """Put back everything that has changed.

        Args:
          keeps: says which objects stay as they are.
        """
        entries = [entry for entry in self.entries() if not keeps(entry[0])]
        self.noted = []
        undo(entries)

    @contextlib.contextmanager
    def put_aside(self) -> Iterator[None]:
        """Have everything as it was before, for a while."""
        entries = self.entries()
        things = {identity(obj, name): (obj, name) for obj, name, _ in entries}
        changed = [(obj, name, content(obj, name)) for obj, name in things.values()]
        undo(entries)
        try:
            yield
        finally:
            undo(changed[::-1])


_NO_OBJECTS = (Cell, list, dict, Place)


def identity(obj: Any, name: str) -> tuple[int, str]:
    """What tells what an entry is about from all else of now."""
    return obj.identity if isinstance(obj, Place) else (id(obj), name)


def _is_as_before(obj: Any, name: str, old: Any) -> bool:
    if isinstance(obj, Place):
        return obj.holds(old)
    if isinstance(obj, list | dict):
        return same_items(obj, old)
    if isinstance(obj, Cell):
        return bool(getattr(obj, name) == old)
    now, then = obj.__dict__.get(name, ABSENT), old.value if isinstance(old, Removed) else old
    return now is then or (type(now) is type(then) and type(now) in _FLAGS and bool(now == then))


_FLAGS = (str, int, float, bool)


def undo(entries: Sequence[Entry]) -> None:
    """Put back what entries say, the latest first."""
    if not entries:
        return
    structure.changed()
    for obj, name, old in reversed(entries):
        put_back(obj, name, old)
    structure.changed()


def put_back(obj: Any, name: str, old: Any) -> None:
    """Set what an entry says: an attribute of an object (or its absence), or all that a list or dict holds."""
    if isinstance(obj, Place):
        obj.put(old)
    elif isinstance(obj, list | dict):
        refill(obj, old)
    elif isinstance(obj, Cell):
        setattr(obj, name, old)  # a mark
        if name == "_frozen" and old is None:
            thawed(obj)
    elif old is ABSENT:
        obj.__dict__.pop(name, None)
    elif isinstance(old, Removed):
        obj.__dict__[name] = old.value
        reorder(obj.__dict__, old.order)
    else:
        obj.__dict__[name] = old


def content(obj: Any, name: str) -> Any:
    """What `put_back` would have to be told to leave everything as it is."""
    if isinstance(obj, Place):
        return obj.get()
    if isinstance(obj, list | dict):
        return obj.copy()
    return getattr(obj, name) if isinstance(obj, Cell) else obj.__dict__.get(name, ABSENT)


def reorder(attributes: dict[str, Any], order: Iterable[str]) -> None:
    """Bring attributes into an order, which is part of a structure; further ones come last."""
    ordered = {name: attributes[name] for name in order if name in attributes} | attributes
    attributes.clear()
    attributes.update(ordered)
