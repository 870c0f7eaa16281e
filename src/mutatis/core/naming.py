"""Naming: how messages speak of a cell, and of the place where something happens.

A cell's path is known to what is open (`frames`). Where nothing open knows it, all live modules are searched for it, by asking
the garbage collector for them; only errors come there.
"""

from __future__ import annotations

import functools
import gc
import inspect
import keyword
import os
import re
import sys
import types
from collections.abc import Iterator
from typing import Any

import jax

from mutatis.core import frames
from mutatis.core.nodes import is_node

PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep  # the files of this library
JAX = os.path.dirname(os.path.abspath(jax.__file__)) + os.sep  # those of JAX


def path_of(cell: Any) -> str | None:
    """The printed path of a cell in what the open transforms were given, else in the live modules."""
    frame = frames.innermost()
    while frame is not None:
        if frame.locate is not None and (path := frame.locate(cell)) is not None:
            return str(path)
        frame = frame.parent
    return _path_by_search(cell)


def describe(cell: Any) -> str:
    """A cell as messages name it, after the word state: ```model.w` (Param)``."""
    path = path_of(cell) or getattr(cell, "name", None)
    kind = type(cell).__name__
    return f"`{path}` ({kind})" if path else f"({kind} without a place in a model)"


def probe(obj: Any, name: str, default: Any = None) -> Any:
    """An attribute of an object that may be of a user's class, whose ``__getattr__`` may raise what it likes."""
    try:
        return getattr(obj, name, default)
    except Exception:
        return default


def wrapped(function: Any) -> Any:
    """What a decorated or transformed function is around, or None; attributes that a class makes up on demand are nothing."""
    if type(function) is types.FunctionType:
        return function.__dict__.get("__wrapped__")
    found = inspect.getattr_static(function, "__wrapped__", None)
    return None if found is None else probe(function, "__wrapped__")


def innermost(function: Any) -> Any:
    """The function that decorators, transforms and partials are around."""
    seen = {id(function)}
    while True:
        inner = function.func if isinstance(function, functools.partial) else wrapped(function)
        if inner is None or id(inner) in seen:
            return function
        seen.add(id(inner))
        function = inner


def made_at(cell: Any) -> str | None:
    """Where a cell was made: ``model.py:41 in Net.__init__``."""
    return getattr(cell, "made_at", None)


def where() -> str | None:
    """The transforms that are open here: ``jit(train_step) > scan(body)``."""
    labels: list[str] = []
    frame = frames.innermost()
    while frame is not None:
        if labels[-1:] != [frame.label]:  # a loop in ordinary code is a program and the loop in it
            labels.append(frame.label)
        frame = frame.parent
    return " > ".join(reversed(labels)) or None


def _path_by_search(cell: Any) -> str | None:
    """The path of a cell from the outermost module that leads to it: ``Net.blocks[0].mean``."""
    holders: dict[int, tuple[Any, str]] = {}
    for obj in gc.get_objects():
        if is_node(obj) and isinstance(getattr(obj, "__dict__", None), dict):
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


def _children(obj: Any) -> Iterator[tuple[Any, str]]:
    """The nodes that an object's attributes hold, directly or in containers, with the way to them."""
    attributes = vars(obj)
    pending: list[tuple[Any, str]] = [(attributes[name], f".{name}") for name in sorted(attributes)]
    seen: set[int] = set()
    while pending:
        value, path = pending.pop(0)
        if is_node(value):
            yield value, path
        elif isinstance(value, list | tuple | dict) and id(value) not in seen:
            seen.add(id(value))
            items = value.items() if isinstance(value, dict) else enumerate(value)
            pending[:0] = [(item, f"{path}[{key!r}]") for key, item in items]


def show_path(path: tuple[Any, ...]) -> str:
    """A path as it would be written in Python.

    Example:
      >>> from mutatis.core.naming import show_path
      >>> show_path(("blocks", 0, "norm", "mean"))
      'blocks[0].norm.mean'
    """
    text = ""
    for part in path:
        if isinstance(part, str) and part.isidentifier() and not keyword.iskeyword(part):
            text += f".{part}" if text else part
        else:
            text += f"[{part!r}]"
    return text


def show_name(qualname: str) -> str:
    """A function's or class's qualified name as messages show it: ``train.step``, ``lambda in Net.__call__``.

    What has no name of its own, a lambda or a function that is called `_`, is no part of another one's.
    """
    *outer, last = qualname.replace("<locals>.", "").split(".")
    around = [name for name in outer if name not in ("<lambda>", "_")]
    if last not in ("<lambda>", "_"):
        return ".".join([*around, last])
    word = "lambda" if last == "<lambda>" else "_"
    return f"{word} in {'.'.join(around)}" if around else word


def caller() -> tuple[str, int, str]:
    """The nearest frame outside this package, and outside JAX, which may have called it."""
    frame: Any = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((PACKAGE, JAX)):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_qualname


def show_place(place: tuple[str, int, str]) -> str:
    """A file, line and function as messages show them: ``model.py:41 in Net.__init__``, ``Cell In[3]:2 in Net.__init__``."""
    file, line, function = place
    return f"{show_cell(file) or os.path.basename(file)}:{line} in {show_name(function)}"


_CELL = re.compile(r"<ipython-input-(\d+)-\w+>|ipython-input-(\d+)-\w+\.py|ipykernel_\d+[/\\]\w+\.py")


def show_cell(file: str) -> str | None:
    """The cell of a notebook that a file name stands for; None for any other file.

    Example:
      >>> from mutatis.core.naming import show_cell
      >>> show_cell("<ipython-input-3-0d1f>"), show_cell("model.py")
      ('Cell In[3]', None)
    """
    found = _CELL.search(file)
    if found is None:
        return None
    if (number := found[1] or found[2]) is not None:
        return f"Cell In[{number}]"
    try:  # the number is not in the name; IPython knows it
        named = sys.modules["IPython"].get_ipython().compile.format_code_name(file)
        return " ".join(named)
    except Exception:  # not in a notebook, or another IPython
        return "Cell"
