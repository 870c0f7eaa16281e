"""The journal: what was changed about the structure of models, so that it can be undone.

Attributes and marks are noted one by one, before they change. Plain lists and dicts tell nobody that they change: what they
hold is remembered at the beginning, and compared.

**Order.** What a container held at the beginning comes before everything that was noted. A transform inside notes of a
container what it held when that transform began, which may be something in between; undone the latest first, the beginning
has the last word.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

from mutatis.core.cells import Cell
from mutatis.core.containers import ContainerSnapshot
from mutatis.core.stamps import thawed
from mutatis.core.structure import structure

Entry: TypeAlias = tuple[
    Any, str, Any
]  # an object, the name of its attribute ("" for a container), what was there before

ABSENT = object()  # in the place of an attribute that is not there


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
    """

    __slots__ = ("_containers", "noted")

    def __init__(self, containers: Sequence[Any] = ()) -> None:
        self._containers = ContainerSnapshot(containers, copies=True) if containers else None
        self.noted: list[Entry] = []

    def __bool__(self) -> bool:
        """Whether anything has changed."""
        return bool(self.noted) or (self._containers is not None and not self._containers.unchanged())

    def note(self, obj: Any, name: str, old: Any) -> None:
        """Note an attribute's old value, or all that a container holds, before it changes."""
        self.noted.append((obj, name, old))

    def changed_containers(self) -> list[tuple[Any, Any]]:
        """The containers that hold something else than at the beginning, each with what it held."""
        return [] if self._containers is None else self._containers.changed()

    def entries(self) -> list[Entry]:
        """Everything that has changed, in the order in which it can be undone from the end."""
        return [*((container, "", then) for container, then in self.changed_containers()), *self.noted]

    def hand_over(self, outer: Journal) -> None:
        """Let another journal know of everything: whoever undoes that one undoes this, too."""
        outer.noted += self.entries()
        self.noted = []

    def undo(self, *, but: frozenset[int] = frozenset()) -> None:
        """Put back everything that has changed.

        Args:
          but: the `id`s of objects that stay as they are.
        """
        entries = [entry for entry in self.entries() if id(entry[0]) not in but]
        self.noted = []
        undo(entries)

    @contextlib.contextmanager
    def put_aside(self) -> Iterator[None]:
        """Have everything as it was before, for a while."""
        entries = self.entries()
        changed = [
            (obj, name, content(obj, name))
            for obj, name, _ in {(id(o), n): (o, n, old) for o, n, old in entries}.values()
        ]
        undo(entries)
        try:
            yield
        finally:
            undo(changed[::-1])


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
    if isinstance(obj, list):
        obj[:] = old
    elif isinstance(obj, dict):
        obj.clear()
        obj.update(old)
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
    if isinstance(obj, list | dict):
        return obj.copy()
    return getattr(obj, name) if isinstance(obj, Cell) else obj.__dict__.get(name, ABSENT)


def reorder(attributes: dict[str, Any], order: Iterable[str]) -> None:
    """Bring attributes into an order, which is part of a structure; further ones come last."""
    ordered = {name: attributes[name] for name in order if name in attributes} | attributes
    attributes.clear()
    attributes.update(ordered)
