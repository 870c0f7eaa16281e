"""Places of a function: the names that it binds anew, and the lists and dicts that it names and that hold no states yet.

They are what a transform watches besides the structure of models (`core.places`): a state that is made late may be put there.
"""

from __future__ import annotations

import builtins
import dis
import functools
import types
from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

from mutatis.core.places import Place


class _Stored(NamedTuple):
    """The names that code binds."""

    closure: frozenset[str]
    globals: frozenset[str]
    attributes: frozenset[str]


@functools.lru_cache(maxsize=4096)
def stored_names(code: types.CodeType) -> _Stored:
    """The names that a function, and the functions defined in it, bind to something else."""
    found: dict[str, set[str]] = {"STORE_DEREF": set(), "STORE_GLOBAL": set(), "STORE_ATTR": set()}
    for instruction in dis.get_instructions(code):
        name = instruction.opname.replace("DELETE_", "STORE_")
        if name in found:
            found[name].add(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            for names, more in zip(found.values(), stored_names(constant), strict=True):
                names |= more
    return _Stored(*map(frozenset, found.values()))


def places_of(
    functions: Iterable[types.FunctionType],
    objects: Iterable[tuple[str, Any]],
    containers: Iterable[tuple[str, Any]],
) -> list[Place]:
    """The places that functions may put states in.

    Args:
      functions: the functions.
      objects: the plain objects that they name, with their names.
      containers: the plain lists and dicts that they name and that hold no states.
    """
    places: list[Place] = []
    attributes: set[str] = set()
    for function in functions:
        code, stored = function.__code__, stored_names(function.__code__)
        attributes |= stored.attributes
        variables = zip(code.co_freevars, function.__closure__ or (), strict=True)
        places += [Place(cell, None, name, (code, name)) for name, cell in variables if name in stored.closure]
        names = function.__globals__
        places += [
            Place(names, name, name, (code, name)) for name in sorted(stored.globals) if not hasattr(builtins, name)
        ]
    for name, obj in objects:
        held = vars(obj)
        places += [Place(held, key, f"{name}.{key}", (name, key)) for key in sorted(attributes)]
    places += [Place(container, None, name, _slot(name, container)) for name, container in containers]
    return places


def _slot(name: str, container: Any) -> Hashable:
    return name, type(container).__name__
