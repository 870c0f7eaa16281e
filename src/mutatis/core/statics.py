"""Static values: what of a model is not state, and when two of them are equal.

A compiled program depends on the static values it met, so they are part of its key. They are equal by type and value
(``1`` is not ``True``, ``0.0`` is not ``-0.0``, NaN equals itself); functions are equal when their code and what they
captured are; and `static(obj)` is equal only to itself.
"""

from __future__ import annotations

import copyreg
import enum
import functools
import sys
import types
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mutatis.core.nodes import is_node
from mutatis.errors import StaticAttributeError


class StaticObject:
    """A wrapper that makes any object static, by identity; changes inside it are not seen.

    Args:
      value: the object.
    """

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StaticObject) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)

    def __repr__(self) -> str:
        return f"static({self.value!r})"

    def __reduce__(self) -> Any:
        return static, (self.value,)


def static(obj: Any) -> Any:
    """Mark an object as static when it is assigned to an attribute: kept by identity, its changes unseen.

    Example:
      >>> import mutatis as mu
      >>> class Net(mu.Module):
      ...     def __init__(self, config):
      ...         self.config = mu.static(config)
      >>> Net({"a", "b"}).config == {"a", "b"}
      True
    """
    return StaticObject(obj)


class Static:
    """A static value with its key; equal to another when the keys are."""

    __slots__ = ("_hash", "key", "value")

    def __init__(self, value: Any) -> None:
        self.value = value
        self.key = static_key(value)
        self._hash = hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self._hash == other._hash and self.key == other.key

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return repr(self.value)

    def __setstate__(self, state: tuple[None, dict[str, Any]]) -> None:
        Static.__init__(self, state[1]["value"])  # hashes differ from process to process, and so may keys


class Identity:
    """A key that is equal only for the same object, which it keeps alive."""

    __slots__ = ("obj",)

    def __init__(self, obj: Any) -> None:
        self.obj = obj

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and self.obj is other.obj

    def __hash__(self) -> int:
        return id(self.obj)


_SMALL = 64  # arrays up to this many elements are compared by content


def static_key(value: Any, _open: tuple[int, ...] = ()) -> Hashable:
    """A hashable key, equal for equal static values."""
    kind = type(value)
    if value is None or kind in (bool, int, str, bytes, type, types.EllipsisType):
        return (kind, value)
    if kind in (float, complex):
        return (kind, repr(value))
    if isinstance(value, enum.Enum | StaticObject | Identity):
        return value
    if id(value) in _open:
        return "recursion"
    inner = (*_open, id(value))
    if kind in (list, tuple) or (isinstance(value, tuple) and hasattr(value, "_fields")):
        return (kind, tuple(static_key(item, inner) for item in value))
    if kind is dict:
        return (kind, tuple((static_key(k, inner), static_key(v, inner)) for k, v in value.items()))
    if kind is types.FunctionType:
        return function_key(value, inner)
    if kind is types.MethodType:
        return ("method", static_key(value.__func__, inner), static_key(value.__self__, inner))
    if kind is functools.partial:
        keywords = tuple((k, static_key(v, inner)) for k, v in value.keywords.items())
        return ("partial", static_key(value.func, inner), static_key(value.args, inner), keywords)
    if isinstance(value, jax.core.Tracer) or is_node(value):
        return Identity(value)
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _array_key(value)
    try:
        hash(value)
    except TypeError:
        return Identity(value)
    return (kind, value)


def function_key(function: types.FunctionType, _open: tuple[int, ...] = ()) -> Hashable:
    """A key that is equal for functions of equal code, defaults and captured values."""
    captured = []
    for cell in function.__closure__ or ():
        try:
            captured.append(static_key(cell.cell_contents, _open))
        except ValueError:  # an empty closure cell
            captured.append("empty")
    defaults = static_key(function.__defaults__, _open)
    keywords = static_key(function.__kwdefaults__, _open)
    return ("function", function.__code__, id(function.__globals__), defaults, keywords, tuple(captured))


def _array_key(array: Any) -> Hashable:
    if array.size > _SMALL:
        return Identity(array)
    if isinstance(array, jax.Array) and jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        with jax.ensure_compile_time_eval():
            return ("key", str(array.dtype), array.shape, np.asarray(jax.random.key_data(array)).tobytes())
    return ("array", type(array).__name__, str(array.dtype), array.shape, np.asarray(array).tobytes())


def _reduce_function(function: Any) -> Any:
    """A function object of JAX as its name, as Python pickles and copies plain functions, where that leads to it."""
    name = getattr(function, "__qualname__", function.__name__)
    found: Any = sys.modules.get(function.__module__)
    for part in name.split("."):
        found = getattr(found, part, None)
    return name if found is function else function.__reduce_ex__(4)


for _kind in (type(jax.jit(repr)), jax.custom_jvp, jax.custom_vjp, jnp.ufunc):
    copyreg.pickle(_kind, _reduce_function)

# Static at a glance, and owned by no node.
PLAIN = frozenset({type(None), bool, int, float, str, bytes, type, types.FunctionType, types.BuiltinFunctionType})
_BY_IDENTITY = (
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    functools.partial,
    types.ModuleType,
)
_TRUSTED = ("jax", "jaxlib", "numpy", "optax", "builtins", "functools", "operator", "ml_dtypes", "mutatis")


def check_static(value: Any, owner: str, name: str) -> None:
    """Raise unless a value may be a static attribute.

    Raises:
      StaticAttributeError: it is unhashable, or an object whose changes would not be seen.
    """
    if value is None or isinstance(value, _BY_IDENTITY):
        return
    kind = type(value)
    try:
        hash(value)
        problem = "is a mutable object: its changes would not be seen"
        if (
            getattr(kind, "__hash__", None) is not object.__hash__
            or kind.__module__.partition(".")[0] in _TRUSTED
            or type(value) is object
        ) and not hasattr(value, "__next__"):
            return
    except TypeError:
        problem = "is not hashable"
    raise StaticAttributeError(
        f"`{owner}.{name}` cannot be static: {kind.__name__} {problem}",
        path=f"{owner}.{name}",
        expected="a Variable, Module, array, or a hashable value such as a number, string, function or frozen dataclass",
        got=f"{value!r:.60}",
        cure=f"Keep it by identity, `self.{name} = mu.static(...)`, or make it state: `self.{name} = mu.Variable(...)`.",
    )
