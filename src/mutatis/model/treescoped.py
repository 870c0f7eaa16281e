"""Models in treescope: modules and states as what they are, with their kinds, shapes and placements.

Treescope asks for this (`__treescope_repr__`), so it is there; nothing else imports it. Arrays are drawn by treescope itself,
with the picture of how they are sharded. Their values are looked at: a compiled step need not copy them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mutatis.core import access
from mutatis.core.cells import UNSET, Deferred
from mutatis.core.naming import show_path
from mutatis.core.nodes import Reference
from mutatis.core.showing import show_value
from mutatis.model.settings import class_name, is_default

Render = Callable[..., Any]


def render_module(module: Any, path: str | None, render: Render) -> Any:
    """A module with its attributes; what is None, or as the class has it, is left out."""
    from treescope import formatting_util, repr_lib

    shown = {
        name: value
        for name, value in dict(module.__dict__).items()
        if not isinstance(value, Reference) and not is_default(type(module), name, value)
    }
    color = formatting_util.color_from_string(type(module).__qualname__)
    return repr_lib.render_object_constructor(type(module), shown, path, render, color=color)


def render_variable(cell: Any, path: str | None, render: Render) -> Any:
    """A state: its kind around its value, and its marks."""
    value = access.peek(cell)
    if value is UNSET or type(value) is Deferred:
        rows: list[tuple[str, Any]] = [("deferred", None)]
    else:
        rows = [("", render(value, path=None if path is None else f"{path}.value"))]
    marks = [f"name={cell.name!r}"] if cell.name is not None else []
    marks += ["frozen"] if cell.frozen else []
    marks += [] if cell.sharding is None else [f"sharding={show_value(cell.sharding)}"]
    marks += [f"{key}={show_value(item)}" for key, item in cell.metadata.items()]
    return _node(f"{class_name(type(cell))}(", [*rows, *((mark, None) for mark in marks)], ")", path)


def render_state(state: Any, path: str | None, render: Render) -> Any:
    """A State: its values by path, with their kinds."""
    rows = []
    for at, value in state._held.items():
        name = f"{show_path(at) or '.'}: {class_name(state._kinds[at])}"
        if type(value) is Deferred:
            rows.append((f"{name} deferred", None))
            continue
        inner = None if path is None else f"{path}[{at!r}]"
        rows.append((f"{name} ", render(value, path=inner)))
    return _node("State({", rows, "})", path)


def render_wrapped(wrapped: Any, path: str | None, render: Render) -> Any:
    """A transformed function or module, around what it is of."""
    inner = None if path is None else f"{path}.__wrapped__"
    rows = [("", render(wrapped.__wrapped__, path=inner))]
    return _node(f"{class_name(type(wrapped))}(", rows, ")", path)


def _node(prefix: str, rows: list[tuple[str, Any]], suffix: str, path: str | None) -> Any:
    """What folds: rows of a text and a rendering, or of a text alone."""
    from treescope import formatting_util
    from treescope import rendering_parts as parts

    children = []
    for number, (name, rendered) in enumerate(rows, 1):
        comma = parts.siblings(",", parts.fold_condition(collapsed=parts.text(" ")))
        if number == len(rows):
            comma = parts.fold_condition(expanded=parts.text(","))
        line = parts.text(name) if rendered is None else parts.siblings_with_annotations(name, rendered)
        children.append(parts.build_full_line_with_annotations(line, comma))
    return parts.build_foldable_tree_node_from_children(
        prefix=parts.text(prefix),
        children=children,
        suffix=parts.text(suffix),
        path=path,
        background_color=formatting_util.color_from_string(prefix),
    )
