"""Places: where Python code keeps values outside of models.

A place is a name (a variable of a closure, a global, an attribute of a plain object), or a plain list or dict. What a transformed
function puts there is none of the library's business, unless it has to do with states: then it belongs to the transaction, as
the attributes of modules do.
"""

from __future__ import annotations

import types
from collections.abc import Hashable
from operator import is_
from typing import Any

from mutatis.core.nodes import holds_nodes

ABSENT = object()  # in the place of what is not there


class Place:
    """A name to which a value is bound, or a container that holds some.

    Args:
      holder: the variable of a closure, the namespace that has the name, or the list or dict.
      key: the name in the namespace; None for a variable of a closure and for a container.
      path: what messages call it.
      slot: the same for the same place in functions of the same code.
    """

    __slots__ = ("holder", "key", "path", "slot")

    def __init__(self, holder: Any, key: str | None, path: str, slot: Hashable) -> None:
        self.holder = holder
        self.key = key
        self.path = path
        self.slot = slot

    @property
    def is_name(self) -> bool:
        """Whether it is a name, and no container."""
        return self.key is not None or isinstance(self.holder, types.CellType)

    @property
    def identity(self) -> tuple[int, str]:
        """What tells it from other places of now."""
        return id(self.holder), self.key or ""

    def get(self) -> Any:
        """What is bound to the name, or a copy of the container."""
        if self.key is not None:
            return self.holder.get(self.key, ABSENT)
        if isinstance(self.holder, types.CellType):
            try:
                return self.holder.cell_contents
            except ValueError:  # nothing is bound to it
                return ABSENT
        return self.holder.copy()

    def put(self, content: Any) -> None:
        """Have it hold what `get` once gave."""
        if self.key is not None:
            if content is ABSENT:
                self.holder.pop(self.key, None)
            else:
                self.holder[self.key] = content
        elif isinstance(self.holder, types.CellType):
            if content is not ABSENT:
                self.holder.cell_contents = content
            elif self.get() is not ABSENT:
                del self.holder.cell_contents
        else:
            refill(self.holder, content)

    def holds(self, content: Any) -> bool:
        """Whether it still holds the very same."""
        return self.get() is content if self.is_name else same_items(self.holder, content)


def same_items(one: Any, other: Any) -> bool:
    """Whether two lists or two dicts hold the very same, in the same order: `==` would call the users' code."""
    if len(one) != len(other) or not all(map(is_, one, other)):
        return False
    return not isinstance(one, dict) or all(map(is_, one.values(), other.values()))


def refill(container: Any, items: Any) -> None:
    """Have a list or dict hold other items, in place."""
    if isinstance(container, list):
        container[:] = items
    else:
        container.clear()
        container.update(items)


def concerns_states(*contents: Any) -> bool:
    """Whether there is a state or module among what a place held or holds."""
    return any(map(holds_nodes, contents))
