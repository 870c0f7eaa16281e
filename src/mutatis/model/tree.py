"""The readable tree that the `repr` of a module is."""

from __future__ import annotations

import itertools
from typing import Any

from mutatis.core.naming import probe
from mutatis.core.nodes import Reference, is_node
from mutatis.model.variables import Variable
from mutatis.model.wrapped import Wrapped


def tree_lines(module: Any, indent: str, seen: set[int]) -> list[str]:
    """One line per attribute, nested modules indented."""
    if id(module) in seen:
        return [f"{type(module).__name__}(...)"]
    seen.add(id(module))
    lines = [f"{type(module).__name__}("]
    for name, value in dict(module.__dict__).items():
        if not isinstance(value, Reference):
            lines.append(f"{indent}  {name}={_show(value, indent + '  ', seen)},")
    lines.append(f"{indent})")
    return lines if len(lines) > 2 else [f"{type(module).__name__}()"]


def _show(value: Any, indent: str, seen: set[int]) -> str:
    if isinstance(value, Variable):
        if id(value) in seen:
            return f"{value!r} (shared)"
        seen.add(id(value))
        return f"{value!r}, read as an array" if value._behind else repr(value)
    if isinstance(value, Wrapped):
        return f"{type(value).__name__}({_show(value.__wrapped__, indent, seen)})"
    if is_node(value):
        return "\n".join(tree_lines(value, indent, seen))
    if isinstance(value, list | dict) and id(value) in seen:
        return "[...]" if isinstance(value, list) else "{...}"
    if isinstance(value, list | tuple) and any(is_node(item) for item in value):
        seen.add(id(value))
        shown = _folded([_show(item, indent + "  ", seen) for item in value])
        inner = "".join(f"{indent}  {text}\n" for text in shown)
        left, right = ("[", "]") if isinstance(value, list) else ("(", ")")
        return f"{left}\n{inner}{indent}{right}"
    if isinstance(value, dict) and any(is_node(item) for item in value.values()):
        seen.add(id(value))
        inner = "".join(f"{indent}  {key!r}: {_show(item, indent + '  ', seen)},\n" for key, item in value.items())
        return f"{{\n{inner}{indent}}}"
    name = probe(value, "__name__")
    return name if isinstance(name, str) else repr(value)


_ALIKE = 4  # items in a row, from which on they are folded
_MOST = 40  # lines for a list


def _folded(texts: list[str]) -> list[str]:
    """The items of a list, a long row of equal ones as one; of very many that differ, those at both ends."""
    lines = []
    for text, run in itertools.groupby(texts):
        count = len(list(run))
        lines += [f"{text},"] * count if count < _ALIKE else [f"{text},", f"... {count - 1:,} more like it,"]
    left_out = len(lines) - _MOST
    return lines if left_out <= 0 else [*lines[: _MOST // 2], f"... {left_out:,} more,", *lines[-_MOST // 2 :]]
