"""Attributes: the part of a search for captures that looks into objects, classes and modules by the names that code loads."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Hashable
from typing import Any

from mutatis.core.nodes import holds_nodes, is_node
from mutatis.core.statics import Identity
from mutatis.tracing import traced
from mutatis.tracing.classes import (
    find_in_class,
    function_in,
    is_library_class,
    is_library_data,
    is_made_by_library,
    is_pytree,
    slots_of,
)
from mutatis.tracing.codes import Names, is_library_file
from mutatis.tracing.guards import EMPTY, Guards

# Methods that run without being named, except where the code makes, compares or prints objects.
_MAKING = ("__new__", "__init__", "__post_init__")
_COMPARING = ("__eq__", "__ne__", "__hash__", "__lt__", "__le__", "__gt__", "__ge__")
_PRINTING = ("__repr__", "__str__", "__format__")
_NEVER = frozenset({
    *_MAKING, *_COMPARING, *_PRINTING, "__del__", "__init_subclass__", "__class_getitem__", "__setattr__", "__delattr__",
    "__set_name__", "__getnewargs__", "__setstate__", "__getstate__", "__reduce__", "__reduce_ex__", "__annotate__",
    "__annotate_func__", "__replace__",
})  # fmt: skip


class _Entry:
    """Something whose attributes are looked at, by the names that the code loads."""

    __slots__ = ("bases", "done", "name", "namespace", "number", "obj", "whole")

    def __init__(self, number: int, name: str, obj: Any, namespace: dict[str, Any] | None) -> None:
        self.number = number
        self.name = name
        self.obj = obj  # an object; a class; a module or a function
        self.namespace = namespace
        self.bases: list[type] = []  # of a class: those that are the user's, in the order of a look-up
        self.done = 0  # how many of the names were looked for
        self.whole = False  # whether all of its attributes were looked at


class AttributeSearch:
    """The part of a search that looks at attributes by name, and keeps what is found.

    Code names attributes, not whose they are: each name that some code loads is looked for in every object, class and Python
    module that was found.
    """

    __slots__ = (
        "_absent",
        "_classes",
        "_compares",
        "_entries",
        "_keep",
        "_making",
        "_misses",
        "_names",
        "_prints",
        "_seen",
        "_whole",
        "guards",
        "named",
        "opaque",
        "token",
    )

    def __init__(self) -> None:
        self.token: list[Hashable] = []
        self.named: dict[str, str | Callable[[], str]] = {}  # what was found, as text, for explanations
        self.opaque = False
        self.guards = Guards()
        self._keep: list[Any] = []  # keeps the identities of guarded values from being used again
        self._seen: dict[int, int] = {}  # where in the token each object was met first
        self._classes: set[int] = set()  # those that were looked into
        self._making: set[int] = set()  # those of them of which objects may be made
        self._entries: list[_Entry] = []
        self._names: dict[str, None] = {}  # the attribute names that the functions load
        self._absent: list[tuple[Any, str]] = []  # where a name was looked for in vain
        self._whole = self._compares = self._prints = self._misses = False

    def visit(self, name: str, value: Any) -> None:
        """Look into one value that goes by a name."""
        raise NotImplementedError

    # -- what is found ---------------------------------------------------------------------------------------

    def _identity(self, value: Any) -> None:
        self.token.append(Identity(value))

    def _part(self, *parts: Any) -> None:
        self.token.append(parts)

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

    # -- attributes ------------------------------------------------------------------------------------------

    def _object(self, name: str, value: Any, *, state: bool = True) -> None:
        """Have the attributes of an object looked at that the code loads, and the methods of its class."""
        kind = type(value)
        self._class(name, kind)
        if not is_library_class(kind):
            self.guards.add_kind(value)
        entry = self._entry(name, value, getattr(value, "__dict__", None))
        frozen = dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
        if state and (frozen or is_made_by_library(kind) or is_pytree(value)):
            self._all_of(entry)
        elif entry.namespace:
            for key, held in list(entry.namespace.items()):  # models, however the code comes to them
                if holds_nodes(held):
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
            self._entry(name, kind, None).bases = bases
            self._methods(bases, None)
        if bases and makes and id(kind) not in self._making:
            self._making.add(id(kind))
            self._methods(bases, frozenset(_MAKING))

    def _methods(self, bases: list[type], wanted: frozenset[str] | None) -> None:
        for index, base in enumerate(bases):
            for key, value in list(vars(base).items()):
                special = key.startswith("__") and key.endswith("__") and key not in _NEVER
                if (special if wanted is None else key in wanted) and callable(function_in(value)):
                    self._part("method", key)
                    for before in bases[:index]:
                        self._guard(before, key, vars(before).get(key, EMPTY))
                    self._guard(base, key, value)
                    self.visit(key, value)

    def _look_at_attributes(self) -> None:
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
            keys = [*(entry.namespace or ()), *slots_of(type(entry.obj))]
            if entry.namespace is not None:
                self.guards.add_contents(entry.namespace)
        for key in keys:
            self._attribute(entry, key)

    def _attribute(self, entry: _Entry, key: str) -> None:
        obj, namespace = entry.obj, entry.namespace
        if isinstance(obj, type):
            self._of_class(entry, key)
        elif namespace is not None and key in namespace:
            self._part("attribute", entry.number, key)
            if isinstance(obj, types.ModuleType) and is_library_data(obj, namespace[key]):
                self.guards.add_name(namespace, key, namespace[key])
                self._keep.append(namespace[key])
                self._identity(namespace[key])
            else:
                self._bound(f"{entry.name}.{key}", namespace, key, namespace[key])
        elif isinstance(obj, types.ModuleType | types.FunctionType):
            self._absent.append((namespace, key))
        else:
            base, value = find_in_class(type(obj), key)
            if isinstance(value, types.MemberDescriptorType):
                self._part("slot", entry.number, key)
                self._bound(f"{entry.name}.{key}", obj, key, getattr(obj, key, EMPTY))
            elif namespace is not None:
                if base is not None and not is_library_class(base):
                    self._guard(namespace, key, EMPTY)
                else:
                    self._absent.append((namespace, key))

    def _of_class(self, entry: _Entry, key: str) -> None:
        for index, base in enumerate(entry.bases):
            if key not in base.__dict__:
                self._absent.append((base, key))
                continue
            value = base.__dict__[key]
            self._part("of class", entry.number, key)
            for before in entry.bases[:index]:
                self._guard(before, key, EMPTY)
            self._bound(f"{entry.name}.{key}", base, key, value)
            return
