"""How messages show a value: short, in Python's notation, and never a word of JAX's insides.

An array, a tracer too, is shown by its type (``float32[3]``), a module or state by its class (``Net(...)``), a function by its
name; containers as Python writes them, with what is too long left out.
"""

from __future__ import annotations

import itertools
import re
import reprlib
import types
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from mutatis.core.naming import show_name
from mutatis.core.nodes import is_node

_MOST = 100  # characters
_INSIDES = re.compile(r"Traced<|Tracer|ShapedArray|PyTreeDef")
_ASIDE = re.compile(r" at 0x[0-9a-fA-F]+|  # [^\n]*")  # an address, a comment
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType)


def show_value(value: Any) -> str:
    """A value for a message.

    Example:
      >>> import jax.numpy as jnp
      >>> from mutatis.core.showing import show_value
      >>> show_value({"a": jnp.zeros(3), "b": (1, "text")})
      "{'a': float32[3], 'b': (1, 'text')}"
    """
    text = _SHORT.repr(value)
    return cut(text, _MOST)


def show_class(value: Any) -> str:
    """What a value is, in a word: its class, ``None``, the type of an array, or that it is a class itself."""
    if isinstance(value, type):
        return "a class"
    return show_value(value) if value is None or _is_array(value) else type(value).__name__


def show_bytes(count: int) -> str:
    """A number of bytes.

    Example:
      >>> from mutatis.core.showing import show_bytes
      >>> show_bytes(12), show_bytes(1_500)
      ('12 B', '1.5 kB')
    """
    size, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.0f} B" if units[0] == "B" else f"{size:.1f} {units[0]}"


def show_count(count: int, what: str) -> str:
    """How many there are of something that takes an s: ``1 state``, ``1,234 states``."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def cut(text: str, most: int) -> str:
    """A text of so many characters at most."""
    return text if len(text) <= most else f"{text[: max(0, most - 3)]}..."


def show_structure(treedef: Any) -> str:
    """A structure with a star for each leaf.

    Example:
      >>> import jax
      >>> from mutatis.core.showing import show_structure
      >>> show_structure(jax.tree.structure({"a": 1, "b": (2, 3)}))
      "{'a': *, 'b': (*, *)}"
    """
    return notation(treedef, itertools.repeat("*"))


def notation(treedef: Any, leaves: Iterator[str]) -> str:
    """A structure as Python would write it, with these texts as its leaves."""
    data = treedef.node_data()
    if data is None:
        return next(leaves)
    kind, more = data
    parts = [notation(child, leaves) for child in treedef.children()]
    if kind is type(None):
        return "None"
    if kind is list:
        return f"[{', '.join(parts)}]"
    if kind is tuple:
        return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"
    if kind is dict:
        return "{" + ", ".join(f"{key!r}: {part}" for key, part in zip(more, parts, strict=True)) + "}"
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        parts = [f"{name}={part}" for name, part in zip(kind._fields, parts, strict=True)]
    rest = "" if more is None or more == () else f"[{show_value(more)}]"
    return f"{kind.__name__}{rest}({', '.join(parts)})"


def show_leaf_type(leaf: Any) -> str:
    """The type of an array, tracer or abstract array, ``float32[3,4]``, or the class of anything else."""
    if not _is_array(leaf):
        return type(leaf).__name__
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 60

    def repr1(self, x: Any, level: int) -> str:
        if is_node(x):
            return f"{type(x).__name__}(...)"
        if _is_array(x):
            return show_leaf_type(x)
        if isinstance(x, jax.tree_util.PyTreeDef):
            return show_structure(x)
        if isinstance(x, _FUNCTIONS):
            return f"the function {show_name(x.__qualname__)}"
        if isinstance(x, type):
            return f"the class {show_name(x.__qualname__)}"
        if hasattr(x, "dtype") and not jax.tree_util.all_leaves([x]):
            leaves, treedef = jax.tree.flatten(x)
            return notation(treedef, map(show_leaf_type, leaves))
        if isinstance(x, tuple) and hasattr(x, "_fields"):
            items = (f"{name}={self.repr1(item, level - 1)}" for name, item in zip(x._fields, x, strict=True))
            return f"{type(x).__name__}({', '.join(items)})"
        return super().repr1(x, level)

    def repr_instance(self, x: Any, level: int) -> str:
        """Any other object: its own words, unless they are about memory or JAX's insides."""
        try:
            text = " ".join(_ASIDE.sub("", repr(x)).split())
        except Exception:  # users' classes raise what they like
            text = ""
        if not text or text.startswith("<") or _INSIDES.search(text):
            return f"a {type(x).__name__}"
        return cut(text, self.maxother)


def _is_array(x: Any) -> bool:
    """Whether something is an array, a tracer or an abstract array; a number of NumPy is shown as a number."""
    if is_node(x) or isinstance(x, type | np.generic):
        return False
    try:
        like_one = hasattr(x, "dtype") and isinstance(getattr(x, "shape", None), tuple)
        return like_one and jax.tree_util.all_leaves([x])  # and no array with a unit
    except Exception:  # users' classes raise what they like, and so do random streams
        return False


_SHORT = _Short()
