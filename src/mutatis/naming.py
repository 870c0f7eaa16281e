"""Where a cell is, for messages: found among all live modules, by asking the garbage collector for them.

Only errors come here, and only when no open transform knows the cell's path.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any


def path_by_search(cell: Any) -> str | None:
    """The path of a cell from the outermost module that leads to it: ``Net.blocks[0].mean``."""
    holders: dict[int, tuple[Any, str]] = {}
    for obj in gc.get_objects():
        if _has_attributes(obj):
            for child, path in _children(obj):
                holders.setdefault(id(child), (obj, path))
    path = ""
    target = cell
    seen = {id(cell)}
    while id(target) in holders:
        holder, part = holders[id(target)]
        if id(holder) in seen:
            break
        seen.add(id(holder))
        path = part + path
        target = holder
    return None if target is cell else type(target).__name__ + path


def _has_attributes(obj: Any) -> bool:
    kind = type(obj)
    return getattr(kind, "_mutatis_node_", False) is True and isinstance(getattr(obj, "__dict__", None), dict)


def _children(obj: Any) -> Iterator[tuple[Any, str]]:
    """The nodes that an object's attributes hold, directly or in containers, with the way to them."""
    attributes = vars(obj)
    pending: list[tuple[Any, str]] = [(attributes[name], f".{name}") for name in sorted(attributes)]
    seen: set[int] = set()
    while pending:
        value, path = pending.pop(0)
        if getattr(type(value), "_mutatis_node_", False) is True:
            yield value, path
        elif isinstance(value, list | tuple | dict) and id(value) not in seen:
            seen.add(id(value))
            items = value.items() if isinstance(value, dict) else enumerate(value)
            pending[:0] = [(item, f"{path}[{key!r}]") for key, item in items]
