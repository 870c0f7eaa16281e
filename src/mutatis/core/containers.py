"""What plain lists and dicts hold, remembered so that a change can be noticed cheaply and undone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import is_
from typing import Any

from mutatis.core.places import same_items


class ContainerSnapshot:
    """What plain containers held at one moment, compared by identity: `==` would call the users' code.

    Args:
      containers: plain lists and dicts.
      held: what each held at that moment; now, if not given.
      copies: whether they are to be put back.
    """

    __slots__ = ("_lengths", "_saved", "_views", "containers", "copies")

    def __init__(self, containers: Sequence[Any], held: Sequence[Any] | None = None, *, copies: bool = False) -> None:
        self.containers = list(containers)
        self._views = _views(containers)
        then = self._views if held is None else _views(held)
        self._lengths = list(map(len, then))
        self._saved = list(chain.from_iterable(then))
        self.copies = [container.copy() for container in containers] if copies else []

    def unchanged(self) -> bool:
        """Whether all containers hold the very same objects."""
        return not self._views or (
            list(map(len, self._views)) == self._lengths
            and all(map(is_, chain.from_iterable(self._views), self._saved))
        )

    def changed(self) -> list[tuple[Any, Any]]:
        """The containers that hold something else now, each with its copy of then."""
        if self.unchanged():
            return []
        pairs = zip(self.containers, self.copies, strict=True)
        return [(now, then) for now, then in pairs if not same_items(now, then)]


def _views(containers: Sequence[Any]) -> list[Any]:
    """What to go over: a dict's keys, and its values."""
    views: list[Any] = []
    for container in containers:
        views.append(container)
        if isinstance(container, dict):
            views.append(container.values())
    return views
