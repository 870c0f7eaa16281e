"""Classes: what one can know of an object by its class: whose it is, where its state is, and whether it is a value."""

from __future__ import annotations

import builtins
import sys
import types
import weakref
from collections import deque
from typing import Any

import jax

from mutatis.tracing.codes import is_library_file


def is_library_class(kind: type) -> bool:
    """Whether a class is of Python, of an installed package, or of Mutatis."""
    known = _classes.get(kind)
    if known is None:
        file = getattr(sys.modules.get(kind.__module__), "__file__", None)
        inside = kind.__module__.partition(".")[0] in _STANDARD if file is None else is_library_file(file)
        if kind.__module__ == "builtins" and _is_made_by_code(kind):  # by `exec` in a namespace without a name
            inside = getattr(builtins, kind.__name__, None) is kind
        known = _classes[kind] = inside
    return known


def shows_its_state(kind: type) -> bool:
    """Whether all that an object of a class holds is in its attributes: it has no base that is written in C."""
    known = _visible.get(kind)
    if known is None:
        known = _visible[kind] = all(base is object or _is_python(base) for base in kind.__mro__)
    return known


def _is_python(kind: type) -> bool:
    file = getattr(sys.modules.get(kind.__module__), "__file__", None) or ""
    return _is_made_by_code(kind) and not (is_library_class(kind) and not file.endswith(".py"))


def _is_made_by_code(kind: type) -> bool:
    return bool(kind.__flags__ & _HEAP) and not kind.__flags__ & _IMMUTABLE


_STANDARD = sys.stdlib_module_names | {"builtins"}
_HEAP, _IMMUTABLE = 1 << 9, 1 << 8  # of a class: made at run time; C code made it for good
_classes: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()
_visible: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()


def is_plain_library(function: types.FunctionType) -> bool:
    """Whether a function is a library's own, which captured nothing."""
    return not function.__closure__ and is_library_file(function.__code__.co_filename)


def is_library_data(module: types.ModuleType, value: Any) -> bool:
    """Whether something in a module is a library's own, which counts by identity."""
    if isinstance(value, types.ModuleType):
        return False
    return is_library_file(getattr(module, "__file__", None) or "") or module.__name__ in sys.stdlib_module_names


def is_value(value: Any) -> bool:
    """Whether an object of a library says itself what it is equal to: then it does not change."""
    kind = type(value)
    if not is_library_class(kind) or getattr(kind, "__hash__", None) in (None, object.__hash__):
        return False
    try:
        hash(value)
    except TypeError:
        return False
    return True


def is_library_object(kind: type) -> bool:
    """Whether objects of a class are a library's own: values, or things with an identity, and not merely data."""
    return is_library_class(kind) and kind.__hash__ is not None


def is_made_by_library(kind: type) -> bool:
    """Whether code of a library works on the attributes, which names are not known then."""
    return any(
        is_library_class(base) and base not in _HARMLESS and base.__module__ not in _ABSTRACT for base in kind.__mro__
    )


_HARMLESS = (object, types.SimpleNamespace, list, tuple, dict, set, frozenset, deque, int, float, complex, str, bytes)
_ABSTRACT = ("abc", "typing", "collections.abc", "_collections_abc", "typing_extensions")


def is_pytree(value: Any) -> bool:
    """Whether JAX knows how to take an object apart, without naming its attributes."""
    return bool(jax.tree.structure(value, is_leaf=lambda item: item is not value) != _LEAF)


_LEAF = jax.tree.structure(0)


def slots_of(kind: type) -> list[str]:
    """The names of the slots of a class."""
    return [k for base in kind.__mro__ for k, v in vars(base).items() if isinstance(v, types.MemberDescriptorType)]


def find_in_class(kind: type, key: str) -> tuple[type | None, Any]:
    """The class among the bases that has an attribute, and what it is, as it stands there."""
    for base in kind.__mro__:
        if key in base.__dict__:
            return base, base.__dict__[key]
    return None, None


def function_in(value: Any) -> Any:
    """What a static method or class method was made of; anything else as it is."""
    return value.__func__ if isinstance(value, staticmethod | classmethod) else value
