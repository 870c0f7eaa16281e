"""What a function names: the modules and variables that become implicit arguments of a transform.

`search` looks through closure cells, global names, defaults, partials, `__self__`, containers, the attributes of plain
objects, and the Python functions that are named, transitively. It returns three things:

- `roots`: the nodes found (and the containers that hold some), with the names they go by;
- `token`: a key of all else that was found on the way (numbers, flags, other functions' code): a program that was
  traced with other values is another program;
- guards: what to compare at the next call to notice that a name is bound to something else.

Functions of installed libraries are searched through their closures only: their globals name no user's model. Names
that the function itself rebinds (a count of its traces) are left out, once tracing has shown them (`ignored`).
"""

from __future__ import annotations

import dis
import functools
import sys
import sysconfig
import types
from collections.abc import Hashable
from itertools import repeat
from operator import attrgetter
from typing import Any, TypeAlias

import jax

from mutatis.core.containers import ContainerSnapshot
from mutatis.core.naming import probe, wrapped
from mutatis.core.nodes import is_node, searched_attributes
from mutatis.core.statics import Identity, Static, static_key
from mutatis.model import contexts
from mutatis.model.filters import Filter
from mutatis.model.modules import Module
from mutatis.model.wrapped import Wrapped

_EMPTY = object()
_get_contents = attrgetter("cell_contents")
_SMALL = 64  # containers of static values up to this length count
_MANY = 10_000  # longer containers are data
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
_SKIPPED = (types.ModuleType, type, types.BuiltinFunctionType, types.MethodWrapperType)


Slot: TypeAlias = tuple[Hashable, str]  # a name in the code of a function


class Captures:
    """The result of a search; `unchanged` says whether it still holds."""

    __slots__ = (
        "_attributes",
        "_cells",
        "_container_slots",
        "_containers",
        "_contents",
        "_guards",
        "_inside",
        "_keep",
        "_names",
        "_objects",
        "_seen",
        "ephemeral",
        "ignored",
        "named",
        "roots",
        "token",
    )

    def __init__(self, ignored: frozenset[Slot] = frozenset()) -> None:
        self.roots: list[tuple[str, Any]] = []
        self.token: list[Hashable] = []
        self.named: dict[str, str] = {}  # the numbers and strings that were found, for explanations
        self.ephemeral = False  # a tracer is captured: what is made from this search must not be kept
        self.ignored = ignored
        self._inside: Hashable = None  # the code of the function that is looked into
        self._cells: list[tuple[Any, int, Slot]] = []
        self._names: list[tuple[dict[str, Any], str, int, Slot]] = []
        self._containers: list[Any] = []  # small lists and dicts of static values
        self._container_slots: list[Slot] = []
        self._contents: ContainerSnapshot
        self._guards: tuple[list[Any], list[Any], list[Any], list[int]]  # cells, dicts, keys; what all of them held
        self._keep: list[Any] = []  # keeps the identities of guarded values from being used again
        self._objects: list[tuple[str, Any, set[str]]] = []  # plain objects, with the attributes that were looked at
        self._seen: set[int] = set()
        self._attributes: dict[str, None] = {}  # the attribute names that the functions load

    def unchanged(self) -> bool:
        """Whether every name is still bound to what it was bound to."""
        closures, dicts, keys, identities = self._guards
        try:
            now = list(map(id, map(_get_contents, closures)))
        except ValueError:  # one of them was emptied
            now = [id(_contents(cell)) for cell in closures]
        now += map(id, map(dict.get, dicts, keys, repeat(_EMPTY)))
        return now == identities and self._contents.unchanged()

    def changed(self) -> frozenset[Slot]:
        """The names that are bound to something else now."""
        cells = {slot for cell, identity, slot in self._cells if id(_contents(cell)) != identity}
        names = {slot for names, key, identity, slot in self._names if id(names.get(key, _EMPTY)) != identity}
        before = zip(self._containers, self._contents.copies, self._container_slots, strict=True)
        items = {slot for now, then, slot in before if static_key(now) != static_key(then)}
        return frozenset(cells | names | items)

    def complete(self) -> None:
        """End the search: with all functions known, look at the attributes that they load of plain objects."""
        while any(self._object(*entry) for entry in self._objects):
            pass
        self._contents = ContainerSnapshot(self._containers, copies=True)
        identities = [identity for _, identity, _ in self._cells]
        identities += [identity for _, _, identity, _ in self._names]
        names = self._names
        self._guards = ([c for c, _, _ in self._cells], [d for d, *_ in names], [k for _, k, *_ in names], identities)
        self._seen.clear()

    # -- the search ------------------------------------------------------------------------------------------

    def enter(self, name: str, function: Any) -> None:
        """Look into a function without keeping it alive: whoever calls it does."""
        self._seen.add(id(function))
        self._look_into(name, function)

    def visit(self, name: str, value: Any) -> None:
        """Look into one value that goes by a name."""
        if isinstance(value, _SKIPPED):
            return
        if is_node(value) and not isinstance(value, Wrapped):
            self.roots.append((name, value))
            for attribute in searched_attributes(value) or ():
                self.visit(attribute, value.__dict__[attribute])
        elif isinstance(value, contexts.Context):
            self.token.append(Identity(value))
            if is_node(value.default):
                self.visit(name, value.default)
        elif isinstance(value, jax.core.Tracer):
            self.ephemeral = True
            self.token.append(Identity(value))
        elif value is None or isinstance(value, bool | int | float | complex | str | bytes):
            self.token.append(static_key(value))
            self.named[name] = f"{value!r:.100}"
        elif id(value) in self._seen:
            self.token.append("again")
        else:
            self._seen.add(id(value))
            self._keep.append(value)
            self._look_into(name, value)

    def _look_into(self, name: str, value: Any) -> None:
        if isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.MethodType):
            self.visit(name, value.__func__)
            self.visit("self", value.__self__)
        elif isinstance(value, functools.partial):
            self.visit(name, value.func)
            for index, item in enumerate(value.args):
                self.visit(f"{name}.args[{index}]", item)
            for key, item in value.keywords.items():
                self.visit(key, item)
        elif isinstance(value, Filter):
            self.visit(name, value._parts())
        elif isinstance(value, Wrapped):
            self.token.append(static_key(value.remake))
            self.visit(name, value.__wrapped__)
            for part in (*value.parts.values(), *value.rules):
                self.visit(name, part)
        elif _is_container(value):
            self._container(name, value)
        elif isinstance(wrapped(value), types.FunctionType):
            self.token.append(Identity(value))
            self.visit(name, value.__wrapped__)
            for rule in ("fwd", "bwd", "jvp"):  # of JAX's `custom_vjp` and `custom_jvp`
                self.visit(rule, probe(value, rule))
        elif (attributes := searched_attributes(value)) is not None:
            self.token.append(Identity(value))
            for attribute in attributes:
                self.visit(attribute, getattr(value, attribute))
        elif _is_plain(value):
            self.token.append(static_key(type(value)))
            self._objects.append((name, value, set()))
        else:
            self.token.append(static_key(value))

    def _function(self, function: types.FunctionType) -> None:
        code = function.__code__
        outside, self._inside = self._inside, code
        self.token.append(code)
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            value = _contents(cell)
            if (code, name) not in self.ignored:
                self._cells.append((cell, id(value), (code, name)))
                if value is not _EMPTY:
                    self.visit(name, value)
        for name, value in zip(_default_names(function), function.__defaults__ or (), strict=True):
            self.visit(name, value)
        for name, value in (function.__kwdefaults__ or {}).items():
            self.visit(name, value)
        if not _is_library(code.co_filename):
            names, attributes = _names_of(code)
            self._attributes.update(dict.fromkeys(attributes))
            for name in names:
                value = function.__globals__.get(name, _EMPTY)
                if value is not _EMPTY and not isinstance(value, _SKIPPED) and not _is_library_function(value):
                    self._named(function.__globals__, name, name, value)
        self._inside = outside

    def _named(self, names: dict[str, Any], key: str, name: str, value: Any) -> None:
        """A value that a global or an attribute is bound to."""
        slot = (self._inside, name)
        if slot in self.ignored:
            return
        self._names.append((names, key, id(value), slot))
        if not is_node(value):
            self._keep.append(value)
        self.visit(name, value)

    def _container(self, name: str, value: Any) -> None:
        items = list(value.values()) if isinstance(value, dict) else list(value)
        if _holds_nodes(value):
            self.roots.append((name, value))
            for index, item in enumerate(items):
                if not is_node(item):
                    self.visit(f"{name}[{index}]", item)
        elif len(items) <= _SMALL and (self._inside, name) not in self.ignored:
            keys = tuple(value) if isinstance(value, dict) else len(items)
            self.token.append((type(value).__name__, static_key(keys)))
            if not isinstance(value, tuple):
                self._containers.append(value)
                self._container_slots.append((self._inside, name))
            for index, item in enumerate(items):
                self.visit(f"{name}[{index}]", item)

    def _object(self, name: str, value: Any, done: set[str]) -> bool:
        """Look at the attributes of a user's object that are nodes or that the functions load, but for those done."""
        attributes = vars(value)
        nodes = [k for k, v in attributes.items() if is_node(v) or (_is_container(v) and _holds_nodes(v))]
        rest = [key for key in dict.fromkeys([*nodes, *self._attributes]) if key not in done]
        done.update(rest)
        for key in rest:
            if key in attributes:
                self._named(attributes, key, f"{name}.{key}", attributes[key])
            elif isinstance(method := getattr(type(value), key, None), types.FunctionType):
                self.visit(key, method)
        return bool(rest)


def search(*functions: Any, ignored: frozenset[Slot] = frozenset()) -> Captures:
    """What the functions name, except for names that are to be ignored, and what contexts are set to."""
    found = Captures(ignored)
    for function in functions:
        if isinstance(function, Module):
            found.roots.append(("model", function))
        else:
            found.enter(str(probe(function, "__name__", "f")), function)
    for context, entry in contexts.active():
        found.visit(context.name, entry.value if isinstance(entry, Static) else entry)
    found.complete()
    return found


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet bound
        return _EMPTY


def _is_container(value: Any) -> bool:
    return type(value) in (list, tuple, dict) or (isinstance(value, tuple) and hasattr(value, "_fields"))


def _holds_nodes(value: Any, depth: int = 4) -> bool:
    items = value.values() if isinstance(value, dict) else value
    return len(items) <= _MANY and any(
        is_node(item) or (depth > 0 and _is_container(item) and _holds_nodes(item, depth - 1)) for item in items
    )


@functools.lru_cache(maxsize=4096)
def _names_of(code: types.CodeType) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The globals and the attributes that a function and the functions defined in it load, in order of first use."""
    names: dict[str, None] = {}
    attributes: dict[str, None] = {}
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            names[instruction.argval] = None
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            attributes[instruction.argval] = None
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner_names, inner_attributes = _names_of(constant)
            names.update(dict.fromkeys(inner_names))
            attributes.update(dict.fromkeys(inner_attributes))
    return tuple(names), tuple(attributes)


def _default_names(function: types.FunctionType) -> tuple[str, ...]:
    code = function.__code__
    count = len(function.__defaults__ or ())
    return code.co_varnames[code.co_argcount - count : code.co_argcount]


@functools.lru_cache(maxsize=4096)
def _is_library(filename: str) -> bool:
    return filename.startswith(_LIBRARIES) or "/site-packages/" in filename or _is_ours(filename)


_HERE = __file__.rpartition("captures")[0]


def _is_ours(filename: str) -> bool:
    return filename.startswith(_HERE)


def _is_library_function(value: Any) -> bool:
    """Whether a global name holds a function of a library, which names no user's model."""
    return isinstance(value, types.FunctionType) and _is_library(value.__code__.co_filename) and not value.__closure__


def _is_plain(value: Any) -> bool:
    """Whether an object is of a user's own class, so that its attributes may hold models."""
    kind = type(value)
    if isinstance(value, types.SimpleNamespace):
        return True
    if not hasattr(value, "__dict__"):
        return False
    module = sys.modules.get(kind.__module__)
    file = getattr(module, "__file__", None)
    return kind.__module__ != "builtins" and (file is None or not _is_library(file))
