"""Settings: what the attributes of a module say in a few words, and which of them say nothing that its class does not."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import types
import weakref
from typing import Any

import jax
import numpy as np

from mutatis.core.naming import probe
from mutatis.core.nodes import holds_nodes, is_node
from mutatis.core.showing import cut, show_value

LONG = 80  # characters of one value
SHORT = 60  # characters of a name, and of the settings of a module


def show_static(value: Any) -> str:
    """A value that is no part of a model."""
    try:
        if isinstance(value, tuple) and any(map(callable, value)) and hasattr(value, "_fields"):
            return f"{class_name(type(value))}(...)"
        name = probe(value, "__name__") if not isinstance(value, jax.Array | np.ndarray) else None
        text = name if isinstance(name, str) and name and callable(value) else show_value(value)
    except Exception:  # users' classes raise what they like
        text = f"a {type(value).__name__}"
    return cut(" ".join(text.split()), LONG)


def class_name(cls: type) -> str:
    return cut(" ".join(cls.__name__.split()), SHORT)


def show_attribute(name: str) -> str:
    return name if name.isidentifier() and len(name) <= SHORT else cut(repr(name), SHORT)


def settings_of(cls: type, attributes: dict[str, Any]) -> dict[str, str]:
    """The attributes that are arguments of the class, and plain values: ``{"rate": "rate=0.5"}``; sizes come first."""
    said: dict[str, str] = {}
    known = defaults_of(cls)
    ins, outs = attributes.get("in_features"), attributes.get("out_features")
    if {"in_features", "out_features"} <= known.keys() and outs is not None and _is_plain(ins) and _is_plain(outs):
        said["out_features"] = f"{'?' if ins is None else show_static(ins)} -> {show_static(outs)}"
        said["in_features"] = ""
    room = SHORT
    for name, value in attributes.items():
        if name not in known or name in said or not _is_plain(value):
            continue
        if name == "kernel_size" and isinstance(value, tuple):
            text = f"kernel {'x'.join(map(str, value))}"
        else:
            text = f"{show_attribute(name)}={show_static(value)}"
        if len(text) <= room:
            said[name] = text
            room -= len(text)
    return said


def _is_plain(value: Any) -> bool:
    """Whether a value is said in a few characters."""
    if isinstance(value, tuple):
        return all(map(_is_plain, value)) and len(value) <= 8
    if isinstance(value, str):
        return len(value) <= SHORT // 2
    return (
        value is None
        or isinstance(value, bool | int | float | complex | np.generic | np.dtype | enum.Enum | types.FunctionType)
        or (isinstance(value, type) and not is_node(value))
        or (callable(value) and hasattr(jax.nn, str(probe(value, "__name__"))))
    )


# -- what a class says without being asked ---------------------------------------------------------------------------

_defaults: weakref.WeakKeyDictionary[type, dict[str, Any]] = weakref.WeakKeyDictionary()
_EMPTY: tuple[Any, ...] = (list, dict, tuple, set)


def defaults_of(cls: type) -> dict[str, Any]:
    """The arguments of a class with their defaults; `inspect.Parameter.empty` where there is none."""
    known = _defaults.get(cls)
    if known is None:
        known = _defaults[cls] = _find_defaults(cls)
    return known


def _find_defaults(cls: type) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        if "__init__" not in base.__dict__ or base is object:
            continue
        try:
            parameters = [*inspect.signature(base.__dict__["__init__"]).parameters.values()][1:]
        except (TypeError, ValueError):
            break
        fields = getattr(base, "__dataclass_fields__", {})
        for parameter in parameters:
            default = parameter.default
            if (field := fields.get(parameter.name)) is not None and field.default_factory is not dataclasses.MISSING:
                make = field.default_factory
                default = make() if make in _EMPTY else parameter.empty
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                found.setdefault(parameter.name, default)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break  # the arguments of the classes above are not for users of this one
    return found


def is_default(cls: type, name: str, value: Any) -> bool:
    """Whether an attribute says nothing: it is None, or as the class has it."""
    if value is None:
        return True
    if is_node(value) or holds_nodes(value):
        return False
    given = defaults_of(cls).get(name, inspect.Parameter.empty)
    if given is inspect.Parameter.empty:
        given = inspect.getattr_static(cls, name, inspect.Parameter.empty)
    return given is not inspect.Parameter.empty and _same(value, given)


def _same(value: Any, default: Any) -> bool:
    """Whether two values are the same; only what Python itself compares is compared."""
    if value is default:
        return True
    if type(value) is tuple and type(default) is int:  # one size for all axes
        return bool(value) and all(item is default for item in value)
    if type(value) is not type(default):
        return False
    if isinstance(value, tuple | list) and type(value) in (tuple, list):
        return len(value) == len(default) and all(map(_same, value, default))
    if type(value) in (dict, set):
        return not value and not default
    if type(value) not in (bool, int, float, complex, str, bytes, np.dtype):
        return False
    return bool(value == default or (value != value and default != default))
