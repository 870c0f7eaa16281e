"""Where a cell is, for messages: found by asking the garbage collector who refers to it.

Only errors come here, and only when no open transform knows the cell's path.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any


def path_by_referrers(cell: Any, depth: int = 8) -> str | None:
    """Climb from the cell through attributes and containers to the outermost object, by asking the collector."""
    parts: list[str] = []
    target: Any = cell
    seen = {id(cell)}
    root: str | None = None
    for _ in range(depth):
        step = next(_holders(target, seen), None)
        if step is None:
            break
        target, part = step
        seen.add(id(target))
        parts.append(part)
        if not isinstance(target, list | tuple | dict):
            root = type(target).__name__
    return root + "".join(reversed(parts)) if root is not None else None


def _holders(target: Any, seen: set[int]) -> Iterator[tuple[Any, str]]:
    for holder in _referrers(target):
        if id(holder) in seen:
            continue
        if isinstance(holder, list | tuple):
            for index, item in enumerate(holder):
                if item is target:
                    yield holder, f"[{index}]"
        elif isinstance(holder, dict) and "__builtins__" not in holder:
            owner = next((o for o in gc.get_referrers(holder) if getattr(o, "__dict__", None) is holder), None)
            for key, item in list(holder.items()):
                if item is target and isinstance(key, str):
                    if owner is None:
                        yield holder, f"[{key!r}]"
                    elif _is_node(owner):
                        yield owner, f".{key}"
        elif _is_node(holder):
            for key, item in list(holder.__dict__.items()):
                if item is target:
                    yield holder, f".{key}"


def _referrers(target: Any) -> list[Any]:
    return [r for r in gc.get_referrers(target) if isinstance(r, list | tuple | dict) or _is_node(r)]


def _is_node(obj: Any) -> bool:
    return getattr(type(obj), "_mutatis_node_", False) is True
