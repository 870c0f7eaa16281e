"""What tracing itself changes: counts of traces, caches that are filled, closures that settle when they run first.

Such a change is no reason to trace again: a program holds for what the function started from and for what its trace left. So
what a place held before a trace and after it are made equal, in the keys of all functions; a place that somebody else changes
is noticed, as ever. What is noted here is kept by the compilers that noted it, and goes with them.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Hashable
from typing import Any

from mutatis.core.statics import Identity, static_key
from mutatis.tracing.guards import EMPTY, Place, is_held_node

_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes})
_numbers = itertools.count()


class TracedPlace:
    """A place that traces changed: which of the things that it held count as one."""

    __slots__ = ("__weakref__", "_owner", "classes")

    def __init__(self, owner: Any) -> None:
        self._owner: Any
        try:
            self._owner = weakref.ref(owner)
        except TypeError:  # lists, dicts, closure cells
            self._owner = owner
        self.classes: dict[Hashable, int] = {}

    def is_of(self, owner: Any) -> bool:
        """Whether it is a place of this object."""
        return self._owner is owner or (isinstance(self._owner, weakref.ref) and self._owner() is owner)


_places: weakref.WeakValueDictionary[tuple[int, str | None], TracedPlace] = weakref.WeakValueDictionary()


def _find(owner: Any, key: str | None) -> TracedPlace | None:
    place = _places.get((id(owner), key))
    return place if place is not None and place.is_of(owner) else None


def class_of(owner: Any, key: str | None, held: Any) -> int | None:
    """A number that is equal for what traces made equal; None for what they did not."""
    place = _find(owner, key) if _places else None
    return None if place is None else place.classes.get(_content(held))


def note(place: Place, now: Any) -> TracedPlace | None:
    """Note that a trace has changed a place; what is returned holds as long as it is kept.

    Args:
      place: the place, with what it held before the trace.
      now: what it holds now.
    """
    if is_held_node(place.held) or is_held_node(now):
        return None  # states and models are not what a program was made from
    traced = _find(place.owner, place.key)
    if traced is None:
        traced = _places[id(place.owner), place.key] = TracedPlace(place.owner)
    before = _content(place.held)
    number = traced.classes.setdefault(before, next(_numbers))
    traced.classes[_content(now)] = number  # the latest trace wins
    return traced


def _content(held: Any) -> Hashable:
    if type(held) is list:
        return tuple(map(_content, held))
    return static_key(held) if type(held) in _ATOMS else "empty" if held is EMPTY else Identity(held)
