"""Wrapped nodes: a transformed function or module as a part of a model."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

from mutatis.core.nodes import Node, is_node


class Wrapped(Node):
    """A transformed function or module. As an attribute it is a node with one child, which paths skip.

    ``remake(child, **parts)`` gives the same transform around another child; as a static value `remake` stands for the transform.
    `parts` are those of its options that hold nodes.
    """

    __wrapped__: Any
    remake: Callable[..., Any]
    parts: Mapping[str, Any]
    rules: tuple[Any, ...] = ()  # further functions that it runs: what they name is captured too
    _bindings: Any = None  # as a module's

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        from mutatis.model.treescoped import render_wrapped

        return render_wrapped(self, path, subtree_renderer)


def borrows(value: Any) -> bool:
    """Whether a value is a function that belongs to a node, or names one in its options."""
    if isinstance(value, Wrapped):
        return bool(value.parts) or borrows(value.__wrapped__)
    return isinstance(value, types.MethodType) and is_node(value.__self__)
