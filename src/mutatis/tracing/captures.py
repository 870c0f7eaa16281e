"""What a function names: the modules and variables that become implicit arguments of a transform, and all else it depends on.

`search` looks through closure cells, global names, defaults, partials, `__self__`, containers, the attributes of objects,
classes and Python modules that the code loads, and the Python functions that are named, transitively; then, when a walk has
found the modules, through the methods of their classes. It gives:

- `roots`: the nodes found (and the containers that hold some), with the names they go by;
- `token`: a key of all else that was found. Two searches have equal tokens only if everything that they found is equal; what is
  not understood counts by identity, and is kept alive by the token;
- `guards`: what to compare at the next call to notice that something is another;
- `opaque`: whether something was found that may change without being seen (an iterator, an object that is written in C). Then
  a program is good for the very same function only, as JAX's are.

Functions of libraries are searched through their closures only, and what libraries hold counts by identity: their globals name
no user's model.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import marshal
import operator
import sys
import types
import weakref
from collections import deque
from collections.abc import Hashable, Iterable
from typing import Any

import jax
import numpy as np

from mutatis.core.nodes import is_node
from mutatis.core.statics import Identity, Static, StaticObject, array_key, static_key
from mutatis.model import contexts
from mutatis.model.filters import Filter
from mutatis.model.graph import Encoder
from mutatis.model.modules import Module
from mutatis.model.wrapped import Wrapped
from mutatis.tracing import traced
from mutatis.tracing.codes import (
    Names,
    contents,
    default_names,
    identifiers,
    is_library_class,
    is_library_file,
    names_of,
    shows_its_state,
)
from mutatis.tracing.guards import EMPTY, Guards, items_of

_MANY = 1024  # containers up to this length are looked into
_NODES = 10_000  # up to this one, for nodes
_BUDGET = 20_000  # objects that one search looks at
_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes, types.EllipsisType})
_PLAIN_DATA = frozenset({type(None), bool, int, float, str})
_CONTAINERS = (list, tuple, dict, set, frozenset, deque, types.MappingProxyType)
_GETTERS = (operator.attrgetter, operator.itemgetter, operator.methodcaller)
_BUILTIN = (types.BuiltinFunctionType, types.MethodWrapperType)
_UNCHANGING = frozenset({"jax", "jaxlib", "optax", "ml_dtypes", "mutatis"})  # what they make does not change
_CONSTANT = (
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.ClassMethodDescriptorType,
    types.GenericAlias,
    np.ufunc,
    types.CodeType,
)
# Methods that run without being named, except where the code makes, compares or prints objects.
_MAKING = ("__new__", "__init__", "__post_init__")
_COMPARING = ("__eq__", "__ne__", "__hash__", "__lt__", "__le__", "__gt__", "__ge__")
_PRINTING = ("__repr__", "__str__", "__format__")
_NEVER = frozenset({*_MAKING, *_COMPARING, *_PRINTING, "__del__", "__init_subclass__", "__class_getitem__", "__setattr__",
    "__delattr__", "__set_name__", "__getnewargs__", "__setstate__", "__getstate__", "__reduce__", "__reduce_ex__", "__annotate__",
    "__annotate_func__", "__replace__"})  # fmt: skip


class _Entry:
    """Something whose attributes are looked at, by the names that the code loads."""

    __slots__ = ("done", "name", "namespace", "number", "obj", "whole")

    def __init__(self, number: int, name: str, obj: Any, namespace: dict[str, Any] | None) -> None:
        self.number = number
        self.name = name
        self.obj = obj  # an object; a class; a module or a function
        self.namespace = namespace
        self.done = 0  # how many of the names were looked for
        self.whole = False  # whether all of its attributes were looked at


class Captures:
    """The result of a search; `unchanged` says whether it still holds."""

    __slots__ = (
        "_absent",
        "_classes",
        "_compares",
        "_entries",
        "_holders",
        "_keep",
        "_making",
        "_misses",
        "_names",
        "_prints",
        "_seen",
        "_whole",
        "ephemeral",
        "guards",
        "named",
        "opaque",
        "roots",
        "token",
    )

    def __init__(self) -> None:
        self.roots: list[tuple[str, Any]] = []
        self.token: list[Hashable] = []
        self.named: dict[str, str] = {}  # what was found, as text, for explanations
        self.ephemeral = False  # a tracer is captured: what is made from this search must not be kept
        self.opaque = False
        self.guards = Guards()
        self._keep: list[Any] = []  # keeps the identities of guarded values from being used again
        self._seen: dict[int, int] = {}  # where in the token each object was met first
        self._classes: set[int] = set()  # those that were looked into
        self._making: set[int] = set()  # those of them of which objects may be made
        self._entries: list[_Entry] = []
        self._holders: set[int] = set()  # the classes and static values of modules that were looked into
        self._names: dict[str, None] = {}  # the attribute names that the functions load
        self._absent: list[tuple[Any, str]] = []  # where a name was looked for in vain
        self._whole = self._compares = self._prints = self._misses = False

    def unchanged(self) -> bool:
        """Whether every name is still bound to what it was bound to."""
        return self.guards.unchanged()

    def complete(self) -> None:
        """End the search."""
        self._settle()
        if self._misses:
            for owner, key in self._absent:
                self._guard(owner, key, EMPTY)
        self.guards.close()
        self._seen.clear()
        self._entries.clear()
        self._absent.clear()

    def look_into_modules(self, encoder: Encoder) -> bool:
        """Look into the classes of modules that a walk found, and into their functions; whether that led to further nodes."""
        self._settle()
        before = len(self.roots)
        for kind in dict.fromkeys(type(obj) for obj in encoder.objects if isinstance(obj, Module)):
            if id(kind) not in self._holders:
                self._holders.add(id(kind))
                self._class(kind.__name__, kind)
        for _, static in encoder.statics():
            value = static.value
            if isinstance(value, types.FunctionType | functools.partial | types.MethodType):
                if id(value) not in self._holders:
                    self._holders.add(id(value))
                    self.visit(getattr(value, "__name__", "static"), value)
        self._settle()
        return len(self.roots) > before

    # -- values ----------------------------------------------------------------------------------------------

    def enter(self, name: str, function: Any) -> None:
        """Look into a function without keeping it alive: whoever calls it does."""
        self._seen[id(function)] = len(self.token)
        self._look_into(name, function)

    def visit(self, name: str, value: Any) -> None:
        """Look into one value that goes by a name."""
        if type(value) in _ATOMS:
            self.token.append(static_key(value))
            self.named[name] = f"{value!r:.100}"
            if type(value) is str:
                self._names.update(dict.fromkeys(identifiers(value)))
        elif is_node(value) and not isinstance(value, Wrapped):
            self.token.append("node")
            self.roots.append((name, value))
            for attribute in getattr(type(value), "_searched_", ()):
                self.visit(attribute, value.__dict__[attribute])
        elif isinstance(value, jax.core.Tracer):
            self.ephemeral = True
            self.token.append(Identity(value))
        elif (at := self._seen.get(id(value))) is not None:
            self.token.append(("again", at))
        else:
            self._seen[id(value)] = len(self.token)
            self._keep.append(value)
            if len(self._keep) > _BUDGET:
                self._unknown(value)
            else:
                self._look_into(name, value)

    def _look_into(self, name: str, value: Any) -> None:
        kind = type(value)
        if isinstance(value, types.FunctionType):
            self.named[name] = f"function {value.__qualname__}"
            self._function(name, value)
        elif isinstance(value, type):
            self.named[name] = f"class {value.__qualname__}"
            self._identity(value)
            self._class(name, value, makes=True)
        elif isinstance(value, types.ModuleType):
            self._identity(value)
            self._entry(name, value, vars(value))
        elif isinstance(value, _CONTAINERS):
            self._container(name, value)
        elif isinstance(value, np.ndarray | np.generic | jax.Array):
            self._array(name, value)
        elif isinstance(value, enum.Enum):
            self.named[name] = str(value)
            self._identity(value)
            self._class(name, kind)
            self.visit(f"{name}.value", value._value_)
        elif isinstance(value, int | float | complex | str | bytes):
            base = next(base for base in (int, float, complex, str, bytes) if isinstance(value, base))
            self._part(Identity(kind), base.__repr__(value))
            self._object(name, value, state=False)
        elif self._callable(name, value) or self._of_ours(name, value):
            pass
        elif isinstance(value, types.SimpleNamespace) or (shows_its_state(kind) and not _is_library_object(kind)):
            self._part("object", Identity(kind))
            self._object(name, value)
        else:
            self._other(name, value)

    def _callable(self, name: str, value: Any) -> bool:
        """Look into what Python makes of functions; whether it is of that sort."""
        kind = type(value)
        if isinstance(value, types.MethodType):
            self._part("method")
            self.visit(name, value.__func__)
            self.visit("self", value.__self__)
        elif isinstance(value, functools.partial):
            self._part("partial", Identity(kind), len(value.args), tuple(value.keywords))
            self.visit(name, value.func)
            for index, item in enumerate(value.args):
                self.visit(f"{name}.args[{index}]", item)
            for key, item in value.keywords.items():
                self.visit(key, item)
            if kind is not functools.partial:
                self._object(name, value)
        elif isinstance(value, _BUILTIN):
            owner = value.__self__
            if owner is None or isinstance(owner, types.ModuleType | type):
                self.named[name] = f"function {value.__qualname__}"
                self._identity(value)
            else:
                self._part("of an object", kind, value.__name__)
                self.visit(name, owner)
        elif isinstance(value, _GETTERS):
            self._part(kind)
            self.visit(name, value.__reduce__()[1:])
        elif isinstance(value, staticmethod | classmethod):
            self._part(kind)
            self.visit(name, value.__func__)
        elif isinstance(value, property):
            self._part(kind)
            self.visit(name, (value.fget, value.fset))
        elif isinstance(value, functools.cached_property):
            self._part(kind)
            self.visit(name, value.func)
        elif isinstance(value, weakref.ref):
            self._part(kind)
            self.visit(name, value())
        elif isinstance(value, types.CellType):
            self._part(kind)
            self._bound(name, value, None, contents(value, EMPTY))
        else:
            return False
        return True

    def _of_ours(self, name: str, value: Any) -> bool:
        """Look into what Mutatis, or JAX, makes of functions; whether it is of that sort."""
        if isinstance(value, Wrapped):
            self._part("transformed", Identity(type(value)), len(value.parts), len(value.rules))
            self.visit("options", value.remake)
            self.visit(name, value.__wrapped__)
            for part in (*value.parts.values(), *value.rules):
                self.visit(name, part)
        elif isinstance(value, Filter):
            self._part("filter", Identity(type(value)))
            self.visit(name, value._parts())
        elif isinstance(value, contexts.Context):
            self._identity(value)
            if is_node(value.default):
                self.visit(name, value.default)
        elif isinstance(value, StaticObject):
            self._identity(value.value)
        elif hasattr(type(value), "_searched_"):
            self._identity(value)
            for attribute in type(value)._searched_:
                self.visit(attribute, getattr(value, attribute))
        elif is_library_class(type(value)) and callable(getattr(value, "__wrapped__", None)):
            self.named[name] = f"function {getattr(value, '__qualname__', name)}"
            self._identity(value)
            wrapped = value.__wrapped__
            if not (isinstance(wrapped, types.FunctionType) and _is_plain_library(wrapped)):
                self.visit(name, wrapped)
                for rule in ("fwd", "bwd", "jvp", "jvp_rule"):  # of JAX's `custom_vjp` and `custom_jvp`
                    self.visit(rule, getattr(value, rule, None))
        else:
            return False
        return True

    def _other(self, name: str, value: Any) -> None:
        """What is a value, by what it says itself; else by its identity, and it may change without being seen."""
        self.named[name] = f"{value!r:.100}" if is_library_class(type(value)) else type(value).__name__
        if isinstance(value, _CONSTANT) or type(value) is object:
            self._identity(value)
        elif _is_value(value):
            self.token.append(static_key(value))
        else:
            self.opaque = self.opaque or type(value).__module__.partition(".")[0] not in _UNCHANGING
            self._identity(value)
            self._object(name, value, state=False)

    def _identity(self, value: Any) -> None:
        self.token.append(Identity(value))

    def _unknown(self, value: Any) -> None:
        self.opaque = True
        self.token.append(Identity(value))

    def _part(self, *parts: Hashable) -> None:
        self.token.append(parts)

    # -- functions -------------------------------------------------------------------------------------------

    def _function(self, name: str, function: types.FunctionType) -> None:
        code = function.__code__
        defaults, keywords = function.__defaults__ or (), function.__kwdefaults__ or {}
        self._part(code, Identity(function.__globals__), len(defaults), tuple(keywords))
        for variable, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if variable == "__class__":  # of `super()`: nothing is made of it
                self._class(variable, contents(cell, object))
            else:
                self._bound(variable, cell, None, contents(cell, EMPTY))
        for variable, value in zip(default_names(function), defaults, strict=True):
            self.visit(variable, value)
        if keywords:
            self.guards.add_contents(keywords)
        for variable, value in keywords.items():
            self.visit(variable, value)
        if is_library_file(code.co_filename):
            return
        names = names_of(code)
        self._note(names)
        for variable in names.globals:
            if variable in function.__globals__:
                self._part("global", variable)
                self._bound(variable, function.__globals__, variable, function.__globals__[variable])
            else:
                self.guards.add_name(function.__globals__, variable, EMPTY)
        for module in names.imports:
            if module in sys.modules:
                self.visit(module, sys.modules[module])
        if attributes := vars(function):
            self._entry(name, function, attributes)

    def _note(self, names: Names) -> None:
        """Go on with what the code of another function names."""
        self._names.update(dict.fromkeys(names.attributes))
        self._whole = self._whole or names.whole
        self._misses = self._misses or names.misses
        self.opaque = self.opaque or names.hidden
        if names.compares and not self._compares:
            self._compares = True
            self._names.update(dict.fromkeys(_COMPARING))
        if names.prints and not self._prints:
            self._prints = True
            self._names.update(dict.fromkeys(_PRINTING))

    def _bound(self, name: str, owner: Any, key: str | None, value: Any) -> None:
        """A value that a place is bound to: guard the place, and look into the value."""
        self._guard(owner, key, value)
        if value is EMPTY:
            self.token.append("empty")
            return
        if not is_node(value):
            self._keep.append(value)
        start = len(self.token)
        self.visit(name, value)
        self._count_as_one(start, traced.class_of(owner, key, value))

    def _guard(self, owner: Any, key: str | None, value: Any) -> None:
        if key is None:
            self.guards.add_cell(owner, value)
        elif isinstance(owner, dict):
            self.guards.add_name(owner, key, value)
        elif isinstance(owner, type):
            self.guards.add_of_class(owner, key, value)
        else:
            self.guards.add_slot(owner, key, value)

    def _count_as_one(self, start: int, number: int | None) -> None:
        """Put in the place of what was found since then that tracing made it so, if it did."""
        if number is not None:
            self.token[start:] = [("traced", number)]

    # -- data ------------------------------------------------------------------------------------------------

    def _container(self, name: str, value: Any) -> None:
        kind = type(value)
        items = items_of(value)
        mapping = isinstance(value, dict | types.MappingProxyType)
        width = len(items) // 2 if mapping else len(items)
        holds = _holds_nodes(items)
        if holds and (kind in (list, dict) or isinstance(value, tuple)):
            self.roots.append((name, value))  # itself: what is put into it is put into the user's own
        elif width > _MANY:
            self._unknown(value)
            return
        elif not isinstance(value, tuple | frozenset):
            self.guards.add_contents(value)
        start = len(self.token)
        self._part(Identity(kind), width)
        if not mapping and not holds and width > 8 and _PLAIN_DATA.issuperset(map(type, items)):
            self.token.append(marshal.dumps(items, 2))
            self._names.update(dict.fromkeys(_names_among(items)))
        elif mapping:
            self._mapping(name, items[:width], items[width:])
        else:
            fields = getattr(kind, "_fields", ())
            for index, item in enumerate(items):
                self.visit(f"{name}.{fields[index]}" if index < len(fields) else f"{name}[{index}]", item)
        if kind not in (list, tuple, dict, set, frozenset) and (
            hasattr(value, "__dict__") or not is_library_class(kind)
        ):
            self._object(name, value)
        if isinstance(value, dict) and (factory := getattr(value, "default_factory", None)) is not None:
            self.visit(f"{name}.default_factory", factory)
        if not holds:
            self._count_as_one(start, traced.class_of(value, None, items))

    def _mapping(self, name: str, keys: list[Any], values: list[Any]) -> None:
        if _PLAIN_DATA.issuperset(map(type, keys)):
            self.token.append(static_key(keys))
            self._names.update(dict.fromkeys(_names_among(keys)))
        else:
            for key in keys:  # dicts find them by hash: they do not change
                if is_node(key) or isinstance(key, tuple):
                    self.visit(f"a key of {name}", key)
                else:
                    self.token.append(static_key(key) if type(key) in _ATOMS else Identity(key))
        for key, value in zip(keys, values, strict=True):
            self.visit(f"{name}[{key!r:.50}]", value)

    def _array(self, name: str, array: Any) -> None:
        key = array_key(array)
        self.token.append(key)
        self.named[name] = f"{array.dtype}{list(array.shape)} array"
        if isinstance(array, np.ndarray):
            if isinstance(key, Identity):
                self.opaque = True
            else:
                self.guards.add_contents(array)

    # -- attributes ------------------------------------------------------------------------------------------

    def _object(self, name: str, value: Any, *, state: bool = True) -> None:
        """Have the attributes of an object looked at that the code loads, and the methods of its class."""
        kind = type(value)
        self._class(name, kind)
        entry = self._entry(name, value, getattr(value, "__dict__", None))
        frozen = dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
        if state and (frozen or _is_made_by_library(kind) or _is_pytree(value)):
            self._all_of(entry)
        elif entry.namespace:
            for key, held in list(entry.namespace.items()):  # models, however the code comes to them
                if is_node(held) or (type(held) in (list, tuple, dict) and _holds_nodes(items_of(held))):
                    self._attribute(entry, key)

    def _entry(self, name: str, obj: Any, namespace: dict[str, Any] | None) -> _Entry:
        self._entries.append(_Entry(len(self._entries), name, obj, namespace))
        return self._entries[-1]

    def _class(self, name: str, kind: type, *, makes: bool = False) -> None:
        """Have the attributes of a user's class looked at that the code loads, and the methods that run unnamed."""
        bases = [base for base in kind.__mro__ if not is_library_class(base)]
        if bases and id(kind) not in self._classes:
            self._classes.add(id(kind))
            self._keep.append(kind)
            self._identity(kind)
            self._entry(name, kind, None)
            self._methods(bases, None)
        if bases and makes and id(kind) not in self._making:
            self._making.add(id(kind))
            self._methods(bases, frozenset(_MAKING))

    def _methods(self, bases: list[type], wanted: frozenset[str] | None) -> None:
        for base in bases:
            for key, value in list(vars(base).items()):
                special = key.startswith("__") and key.endswith("__") and key not in _NEVER
                if (special if wanted is None else key in wanted) and callable(_function_in(value)):
                    self._part("method", key)
                    self._guard(base, key, value)
                    self.visit(key, value)

    def _settle(self) -> None:
        """With all functions known so far, look at the attributes that they load."""
        again = True
        while again:
            again = False
            for entry in self._entries:  # which grow meanwhile
                if self._whole and not entry.whole:
                    again = True
                    self._all_of(entry)
                if entry.done < len(self._names):
                    again = True
                    names = list(self._names)
                    rest, entry.done = names[entry.done :], len(names)
                    for key in rest:
                        self._attribute(entry, key)

    def _all_of(self, entry: _Entry) -> None:
        """Look at all attributes of an object."""
        entry.whole = True
        if isinstance(entry.obj, types.ModuleType):
            self.opaque = self.opaque or not is_library_file(getattr(entry.obj, "__file__", None) or "")
            return
        if isinstance(entry.obj, type):
            keys = [k for base in entry.obj.__mro__ if not is_library_class(base) for k in vars(base) if k[:2] != "__"]
        else:
            keys = [*(entry.namespace or ()), *_slots(type(entry.obj))]
            if entry.namespace is not None:
                self.guards.add_contents(entry.namespace)
        for key in keys:
            self._attribute(entry, key)

    def _attribute(self, entry: _Entry, key: str) -> None:
        obj, namespace = entry.obj, entry.namespace
        if isinstance(obj, type):
            self._of_class(entry, obj, key)
        elif namespace is not None and key in namespace:
            self._part("attribute", entry.number, key)
            if isinstance(obj, types.ModuleType) and _is_library_data(obj, namespace[key]):
                self.guards.add_name(namespace, key, namespace[key])
                self._keep.append(namespace[key])
                self._identity(namespace[key])
            else:
                self._bound(f"{entry.name}.{key}", namespace, key, namespace[key])
        elif isinstance(obj, types.ModuleType | types.FunctionType):
            self._absent.append((namespace, key))
        else:
            base, value = _find_in_class(type(obj), key)
            if isinstance(value, types.MemberDescriptorType):
                self._part("slot", entry.number, key)
                self._bound(f"{entry.name}.{key}", obj, key, getattr(obj, key, EMPTY))
            elif namespace is not None:
                if base is not None and not is_library_class(base):
                    self._guard(namespace, key, EMPTY)
                else:
                    self._absent.append((namespace, key))

    def _of_class(self, entry: _Entry, kind: type, key: str) -> None:
        for base in kind.__mro__:
            if is_library_class(base):
                continue
            if key not in vars(base):
                self._absent.append((base, key))
                continue
            value = vars(base)[key]
            self._part("of class", entry.number, key)
            for before in kind.__mro__[: kind.__mro__.index(base)]:
                if not is_library_class(before):
                    self._guard(before, key, EMPTY)
            self._bound(f"{entry.name}.{key}", base, key, value)
            return


def search(*functions: Any) -> Captures:
    """What the functions name, and what contexts are set to; to be completed."""
    found = Captures()
    for function in functions:
        if isinstance(function, Module):
            found.token.append("node")
            found.roots.append(("model", function))
        else:
            found.enter(getattr(function, "__name__", "f"), function)
    for context, entry in contexts.active():
        found.visit(context.name, entry.value if isinstance(entry, Static) else entry)
    found._settle()
    return found


def _holds_nodes(items: list[Any], depth: int = 4) -> bool:
    return len(items) <= _NODES and any(
        is_node(item)
        or (depth > 0 and type(item) in (list, tuple, dict) and _holds_nodes(items_of(item), depth - 1))
        or (depth > 0 and isinstance(item, tuple) and _holds_nodes(items_of(item), depth - 1))
        for item in items
    )


def _names_among(items: Iterable[Any]) -> list[str]:
    return [name for item in items if type(item) is str for name in identifiers(item)]


def _is_plain_library(function: types.FunctionType) -> bool:
    return not function.__closure__ and is_library_file(function.__code__.co_filename)


def _is_library_data(module: types.ModuleType, value: Any) -> bool:
    """Whether something in a module is a library's own, which counts by identity."""
    if isinstance(value, types.ModuleType):
        return False
    return is_library_file(getattr(module, "__file__", None) or "") or module.__name__ in sys.stdlib_module_names


def _is_value(value: Any) -> bool:
    """Whether an object of a library says itself what it is equal to: then it does not change."""
    kind = type(value)
    if not is_library_class(kind) or kind.__hash__ in (None, object.__hash__):
        return False
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _is_library_object(kind: type) -> bool:
    """Whether objects of a class are a library's own: values, or things with an identity, and not merely data."""
    return is_library_class(kind) and kind.__hash__ is not None


def _is_made_by_library(kind: type) -> bool:
    """Whether code of a library works on the attributes, which names are not known then."""
    return any(
        is_library_class(base) and base not in _HARMLESS and base.__module__ not in _ABSTRACT for base in kind.__mro__
    )


_HARMLESS = (object, types.SimpleNamespace, list, tuple, dict, set, frozenset, deque, int, float, complex, str, bytes)
_ABSTRACT = ("abc", "typing", "collections.abc", "_collections_abc", "typing_extensions")


def _is_pytree(value: Any) -> bool:
    """Whether JAX knows how to take an object apart, without naming its attributes."""
    return bool(jax.tree.structure(value, is_leaf=lambda item: item is not value) != _LEAF)


_LEAF = jax.tree.structure(0)


def _slots(kind: type) -> list[str]:
    return [k for base in kind.__mro__ for k, v in vars(base).items() if isinstance(v, types.MemberDescriptorType)]


def _find_in_class(kind: type, key: str) -> tuple[type | None, Any]:
    for base in kind.__mro__:
        if key in base.__dict__:
            return base, base.__dict__[key]
    return None, None


def _function_in(value: Any) -> Any:
    return value.__func__ if isinstance(value, staticmethod | classmethod) else value
