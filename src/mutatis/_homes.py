"""The homes of public objects: where they say that they are, whichever file defines them.

`publish` gives an object the home by which users know it: ``mutatis.Param``. That is in its `repr`, and in whatever is pickled or
exported, so that no move of a file breaks anybody. What was pickled when objects still said in which file they were can be
read too: for whoever unpickles, and nobody else, the modules of that time are found (`_FormerModule`).
"""

from __future__ import annotations

import copyreg
import dis
import importlib
import importlib.abc
import importlib.machinery
import inspect
import sys
import types
from collections.abc import Sequence
from typing import Any


def publish(home: str, objects: dict[str, Any]) -> None:
    """Have the classes and functions of this package say that they are at home in a module.

    Args:
      home: the public module.
      objects: what it has, by name.
    """
    for name, obj in objects.items():
        here = isinstance(obj, type | types.FunctionType) and obj.__module__.startswith("mutatis.")
        if here and obj.__module__ != "mutatis.errors":  # which is public
            if isinstance(obj, type) and "__annotations__" in obj.__dict__:
                # Strings would from now on be looked up in the home, by `typing.get_type_hints` of a subclass too.
                obj.__annotations__ = inspect.get_annotations(obj, eval_str=True)
            obj.__module__ = home
            obj.__qualname__ = obj.__name__ = name


# Where to look for what a module of 0.1.0 defined.
_FORMER = {
    "axes": ("tracing.axes",),
    "cells": ("core.cells",),
    "compilations": ("compilation.log",),
    "contexts": ("model.contexts",),
    "differentiation": ("tracing.differentiation",),
    "filters": ("model.filters",),
    "graph": ("model.graph", "model.graphdef", "model.walks", "core.naming"),
    "kinds": ("model.kinds",),
    "lifting": ("tracing.transformed", "tracing.arguments"),
    "modules": ("model.modules", "model.wrapped"),
    "state": ("model.state", "model.operations", "model.snapshots"),
    "statics": ("core.statics",),
    "surgery": ("model.surgery",),
    "transforms.custom_rules": ("transforms.custom.rule", "transforms.custom.vjp", "transforms.custom.jvp"),
    "values": ("model.values", "core.avals"),
    "variables": ("model.variables",),
}


class _FormerModule(types.ModuleType):
    """A module of an earlier version, for unpickling."""

    def __getattr__(self, name: str) -> Any:
        if name == "_new_module":
            return copyreg.__newobj__  # type: ignore[attr-defined]
        for place in _FORMER[self.__name__.removeprefix("mutatis.")]:
            found = getattr(importlib.import_module(f"mutatis.{place}"), name, None)
            if found is not None:
                return found
        raise AttributeError(f"module {self.__name__!r} of an earlier version has no {name!r} any more")


class _Former(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds former modules for `pickle`. To everybody else they do not exist."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        known = fullname.startswith("mutatis.") and fullname.removeprefix("mutatis.") in _FORMER
        return importlib.machinery.ModuleSpec(fullname, self) if known and _is_unpickling() else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _FormerModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class _Package(types.ModuleType):
    """The package. Python sets what it imports as an attribute of the package; `mutatis.state` stays a function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not isinstance(value, _FormerModule):
            super().__setattr__(name, value)


def _is_unpickling() -> bool:
    """Whether a module is asked for by a plain call, as `pickle` does, and not by an `import` statement or by `importlib`."""
    frame: Any = sys._getframe(1)
    while frame.f_code.co_filename == __file__ or frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    by_statement = dis.opname[frame.f_code.co_code[frame.f_lasti]] == "IMPORT_NAME"
    return not by_statement and frame.f_globals.get("__name__", "").partition(".")[0] != "importlib"


def read_former_pickles(package: str) -> None:
    """Have pickles of earlier versions of a package read."""
    sys.meta_path.append(_Former())
    sys.modules[package].__class__ = _Package
