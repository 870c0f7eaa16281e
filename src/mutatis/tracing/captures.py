"""What a function names: the modules and variables that become implicit arguments of a transform, and all else it depends on.

`search` looks through closure cells, global names, defaults, partials, `__self__`, containers, the attributes of objects,
classes and Python modules that the code loads, and the Python functions that are named, transitively; then, when a walk has
found the modules, through the methods of their classes. It gives:

- `roots`: the nodes found (and the containers that hold some), with the names they go by;
- `token`: a key of all else that was found. Two searches have equal tokens only if everything that they found is equal; what is
  not understood counts by identity, and is kept alive by the token;
- `guards`: what to compare at the next call to notice that something is another;
- `find_places`: where the functions may put states that they make;
- `opaque`: whether something was found that may change without being seen (an iterator, an object that is written in C). Then
  a program is good for the very same function only, as JAX's are.

Functions of libraries are searched through their closures only, and what libraries hold counts by identity: their globals name
no user's model.
"""

from __future__ import annotations

import enum
import functools
import marshal
import operator
import sys
import types
import weakref
from collections import defaultdict, deque
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from mutatis.core.naming import probe, wrapped
from mutatis.core.nodes import holds_nodes, is_node, searched_attributes
from mutatis.core.places import Place
from mutatis.core.statics import Identity, Static, StaticObject, array_key, static_key
from mutatis.model import contexts
from mutatis.model.filters import Filter
from mutatis.model.graph import Encoder
from mutatis.model.modules import Module
from mutatis.model.wrapped import Wrapped
from mutatis.tracing import traced
from mutatis.tracing.attributes import AttributeSearch
from mutatis.tracing.classes import is_library_class, is_library_object, is_plain_library, is_value, shows_its_state
from mutatis.tracing.codes import (
    contents,
    default_names,
    identifiers,
    is_library_file,
    names_of,
)
from mutatis.tracing.guards import EMPTY, items_of
from mutatis.tracing.places import places_of

_MANY = 1024  # containers up to this length are looked into
_BUDGET = 20_000  # objects that one search looks at
_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes, types.EllipsisType})
_PLAIN_DATA = frozenset({type(None), bool, int, float, str})
_CONTAINERS = (list, tuple, dict, set, frozenset, deque, types.MappingProxyType)
_GETTERS = (operator.attrgetter, operator.itemgetter, operator.methodcaller)
_NO_PLACES = (types.ModuleType, types.FunctionType, type)  # what is put there outlives every model
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


class Captures(AttributeSearch):
    """The result of a search; `unchanged` says whether it still holds."""

    __slots__ = ("_functions", "_holders", "_loose", "ephemeral", "roots")

    def __init__(self) -> None:
        super().__init__()
        self.roots: list[tuple[str, Any]] = []
        self.ephemeral = False  # a tracer is captured: what is made from this search must not be kept
        self._holders: set[int] = set()  # the classes and static values of modules that were looked into
        self._functions: list[types.FunctionType] = []  # of the user's that were looked into
        self._loose: list[tuple[str, Any]] = []  # lists and dicts that hold no states

    def unchanged(self) -> bool:
        """Whether every name is still bound to what it was bound to."""
        return self.guards.unchanged()

    def complete(self) -> None:
        """End the search."""
        self._look_at_attributes()
        if self._misses:
            for owner, key in self._absent:
                self._guard(owner, key, EMPTY)
        self.guards.close()
        self._seen.clear()
        self._entries.clear()
        self._absent.clear()
        self._functions.clear()
        self._loose.clear()

    def find_places(self) -> list[Place]:
        """Where the functions may put states, besides in models. It is asked before the search ends."""
        objects = [
            (entry.name, entry.obj)
            for entry in self._entries
            if entry.namespace is not None
            and not isinstance(entry.obj, _NO_PLACES)
            and not is_library_object(type(entry.obj))
        ]
        return places_of(self._functions, objects, self._loose)

    def look_into_modules(self, encoder: Encoder) -> bool:
        """Look into the classes of modules that a walk found, and into their functions; whether that led to further nodes."""
        self._look_at_attributes()
        before = len(self.roots)
        for kind in dict.fromkeys(type(obj) for obj in encoder.objects if isinstance(obj, Module)):
            if id(kind) not in self._holders:
                self._holders.add(id(kind))
                self._class(kind.__name__, kind)
        named = dict(self.named)
        for _, static in encoder.statics():
            value = static.value
            runs = isinstance(value, types.FunctionType | functools.partial | types.MethodType)
            if runs and id(value) not in self._holders:
                self._holders.add(id(value))
                self.visit(getattr(value, "__name__", "static"), value)
        self.named = named  # explanations say by which path of the model they came to these
        self._look_at_attributes()
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
            for attribute in searched_attributes(value) or ():
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
        elif isinstance(value, types.SimpleNamespace) or (shows_its_state(kind) and not is_library_object(kind)):
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
        elif (attributes := searched_attributes(value)) is not None:
            self._identity(value)
            for attribute in attributes:
                self.visit(attribute, getattr(value, attribute))
        elif is_library_class(type(value)) and callable(inner := wrapped(value)):
            self.named[name] = f"function {probe(value, '__qualname__', name)}"
            self._identity(value)
            if not (isinstance(inner, types.FunctionType) and is_plain_library(inner)):
                self.visit(name, inner)
                for rule in ("fwd", "bwd", "jvp", "jvp_rule"):  # of JAX's `custom_vjp` and `custom_jvp`
                    self.visit(rule, probe(value, rule))
        else:
            return False
        return True

    def _other(self, name: str, value: Any) -> None:
        """What is a value, by what it says itself; else by its identity, and it may change without being seen."""
        # Shown when somebody asks: what users' classes and libraries do for it may cost much.
        self.named[name] = (lambda: f"{value!r:.100}") if is_library_class(type(value)) else type(value).__name__
        if isinstance(value, _CONSTANT) or type(value) is object:
            self._identity(value)
        elif is_value(value):
            self.token.append(static_key(value))
        else:
            self.opaque = self.opaque or type(value).__module__.partition(".")[0] not in _UNCHANGING
            self._identity(value)
            self._object(name, value, state=False)

    def _unknown(self, value: Any) -> None:
        self.opaque = True
        self.token.append(Identity(value))

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
        self._functions.append(function)
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

    # -- data ------------------------------------------------------------------------------------------------

    def _container(self, name: str, value: Any) -> None:
        kind = type(value)
        items = items_of(value)
        mapping = isinstance(value, dict | types.MappingProxyType)
        width = len(items) // 2 if mapping else len(items)
        holds = holds_nodes(items)
        if holds and (kind in (list, dict) or isinstance(value, tuple)):
            self.roots.append((name, value))  # itself: what is put into it is put into the user's own
        elif width > _MANY:
            self._unknown(value)
            return
        elif not isinstance(value, tuple | frozenset):
            self.guards.add_contents(value)
            if kind in (list, dict):
                self._loose.append((name, value))
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
        if isinstance(value, defaultdict) and value.default_factory is not None:
            self.visit(f"{name}.default_factory", value.default_factory)
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


def search(*functions: Any) -> Captures:
    """What the functions name, and what contexts are set to; to be completed."""
    found = Captures()
    for function in functions:
        if isinstance(function, Module):
            found.token.append("node")
            found.roots.append(("model", function))
        else:
            found.enter(str(probe(function, "__name__", "f")), function)
    for context, entry in contexts.active():
        found.visit(context.name, entry.value if isinstance(entry, Static) else entry)
    found._look_at_attributes()
    return found


def _names_among(items: Iterable[Any]) -> list[str]:
    return [name for item in items if type(item) is str for name in identifiers(item)]
