"""Static values: what of a model is not state, and when two of them are equal.

A compiled program depends on the static values it met, so they are part of its key. They are equal by type and value
(``1`` is not ``True``, ``0.0`` is not ``-0.0``, NaN equals itself); functions are equal when their code and what they
captured are; and `static(obj)` is equal only to itself.
"""

from __future__ import annotations

import copyreg
import dataclasses
import enum
import functools
import numbers
import sys
import types
import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mutatis.core.nodes import is_node
from mutatis.core.showing import show_value
from mutatis.errors import StaticAttributeError

T = TypeVar("T")


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


def static(obj: T) -> T:
    """Mark an object as static, so that it can be an attribute of a module although it is mutable.

    Assign the result to an attribute of a module; the attribute then reads as the object itself. A jitted function takes the
    object for a constant. It compares objects by identity: another object compiles another program, but a change inside the
    object goes unnoticed.

    Args:
      obj: any object, such as a configuration or a tokenizer.

    Returns:
      A wrapper for the assignment, which type checkers take for `obj`.

    Example:
      >>> import mutatis as mu
      >>> class Net(mu.Module):
      ...     def __init__(self, config):
      ...         self.config = mu.static(config)
      >>> net = Net({"width", "depth"})  # a set is mutable, so it is not static by itself
      >>> "width" in net.config
      True
    """
    kept: T = StaticObject(obj)  # type: ignore[assignment]  # as the attribute, which unwraps it
    return kept


class WeakIdentity:
    """A key that is equal only for the same object, as long as it lives.

    Args:
      obj: the object.
      ended: is called with the key when the object has died.
    """

    __slots__ = ("__weakref__", "_hash", "_reference")

    def __init__(self, obj: Any, ended: Callable[[WeakIdentity], None]) -> None:
        me = weakref.ref(self)
        self._hash = id(obj)
        self._reference = weakref.ref(obj, lambda _: None if (key := me()) is None else ended(key))

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, WeakIdentity) and (obj := self._reference()) is not None and obj is other._reference()

    def __hash__(self) -> int:
        return self._hash


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


_SMALL = 64  # arrays of JAX up to this many elements are compared by content
_BYTES = 64 * 1024  # NumPy arrays, which can be changed in place, up to this size


def static_key(value: Any, _open: tuple[int, ...] = ()) -> Hashable:
    """A hashable key, equal for equal static values only: what is not understood is equal to itself alone."""
    kind = type(value)
    if value is None or kind in (bool, int, str, bytes, type, types.EllipsisType):
        return (kind, value)
    if kind in (float, complex):
        return (kind, repr(value))
    if isinstance(value, StaticObject | Identity):
        return value
    if isinstance(value, enum.Enum):
        return Identity(value)  # `==` of the user's enumerations may hold between members of two of them
    if id(value) in _open:
        return "recursion"
    inner = (*_open, id(value))
    if kind is list or isinstance(value, tuple | frozenset):
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
        return array_key(value)
    try:
        hash(value)
    except TypeError:
        return Identity(value)
    if dataclasses.is_dataclass(kind) and kind.__dataclass_params__.eq:  # type: ignore[attr-defined]
        fields = [field.name for field in dataclasses.fields(value) if field.compare]
        return (kind, value, tuple(static_key(getattr(value, name, None), inner) for name in fields))
    return (kind, value, repr(value)) if isinstance(value, numbers.Number) else (kind, value)


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
    return ("function", function.__code__, Identity(function.__globals__), defaults, keywords, tuple(captured))


def array_key(array: Any) -> Hashable:
    """The key of an array: its content if that can be looked at for little, else its identity."""
    if isinstance(array, np.generic):
        return (type(array), array.tobytes(), str(array.dtype))
    if isinstance(array, np.ndarray):
        if type(array) is not np.ndarray or array.nbytes > _BYTES or array.dtype.hasobject:
            return Identity(array)
        return ("array", array.dtype, array.shape, array.tobytes())
    if array.size > _SMALL or array.is_deleted() or not array.is_fully_addressable:
        return Identity(array)
    kind = (array.aval, array.sharding, array.committed)
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        with jax.ensure_compile_time_eval():
            return ("key", *kind, np.asarray(jax.random.key_data(array)).tobytes())
    return ("array", *kind, np.asarray(array).tobytes())


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
        got=show_value(value),
        cure=f"Keep it by identity, `self.{name} = mu.static(...)`, or make it state: `self.{name} = mu.Variable(...)`.",
    )
