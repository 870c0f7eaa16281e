"""Compilations: a log of when a function was compiled, and of what differed from the times before.

A compilation is described by facts, ``{"model.layers": "3 items", "batch['x']": "float32[32,784]"}``: everything of a
call that decides which program it gets. Compilations differ by the facts that differ. The log is text: it keeps nothing alive.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import re
import sys
import types
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from mutatis import _compat
from mutatis.compilation.pending import PendingCall
from mutatis.core.avals import show_type
from mutatis.core.nodes import is_node
from mutatis.core.showing import show_structure
from mutatis.core.statics import Static, StaticObject
from mutatis.errors import CompilationError, RecompilationWarning
from mutatis.model import contexts
from mutatis.model.modules import Module, is_training
from mutatis.model.variables import Variable
from mutatis.model.wrapped import Wrapped
from mutatis.tracing.arguments import FlatTree, argument_names
from mutatis.tracing.codes import contents
from mutatis.tracing.scope import show_root_path

_KEPT = 30  # compilations of one function that are remembered
_MANY = 5  # compilations because of one fact after which there is a warning
_MISSING = "nothing"
_DEEP = 6  # functions in functions that are described
_ONE_LEAF = jax.tree.structure(0)
_SETTINGS = "JAX's configuration"


@dataclasses.dataclass(frozen=True)
class Compilation:
    """One compilation of a function.

    Attributes:
      number: which it is, from 1.
      at: when tracing had ended.
      tracing: the seconds that tracing took.
      compiling: the seconds that lowering and compiling took.
      facts: what decided about the program, by path.
      nearest: the number of the earlier compilation that it has most in common with; None for the first.
      changes: what differs from that one, by path: the text before and the text now.
    """

    number: int
    at: datetime.datetime
    tracing: float
    compiling: float
    facts: Mapping[str, str] = dataclasses.field(repr=False)
    nearest: int | None
    changes: Mapping[str, tuple[str, str]]

    def __str__(self) -> str:
        times = f"traced in {_seconds(self.tracing)}, compiled in {_seconds(self.compiling)}"
        lines = [f"{self.number}. at {self.at:%H:%M:%S}, {times}"]
        if self.nearest is not None:
            lines[0] += f"; compared with {self.nearest}:"
            lines += [f"     {path}: {before} -> {now}" for path, (before, now) in self.changes.items()]
            if not self.changes:
                lines.append("     the same call; another function, or another way to hand over its buffers")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Why a function was compiled: `print` it, or look at `compilations`."""

    name: str
    compilations: tuple[Compilation, ...]

    def __str__(self) -> str:
        count = len(self.compilations)
        head = f"{self.name}: {count} compilation{'' if count == 1 else 's'}"
        return "\n".join([head, *(f"  {compilation}" for compilation in self.compilations)])


class _Plan:
    """How many compilations there may be in a block."""

    def __init__(self, allowed: int) -> None:
        self._allowed = allowed
        self._begun = 0

    def count(self, name: str, entry: Compilation) -> None:
        """Count a compilation that begins.

        Raises:
          CompilationError: it is one too many.
        """
        self._begun += 1
        if self._begun <= self._allowed:
            return
        causes = [f"{path}: {before} -> {now}" for path, (before, now) in entry.changes.items()]
        raise CompilationError(
            f"`{name}` is compiled once more than planned",
            expected=f"{self._allowed} compilation{'' if self._allowed == 1 else 's'}",
            got=f"{self._begun}",
            differences=causes or ["nothing is known to differ: it is the first compilation, or another function"],
            cure=f"Keep that the same, pass it as an array, or plan for it: `step.expect(compilations={self._begun})`.",
        )


class Log:
    """The latest compilations of one function."""

    def __init__(self) -> None:
        self.entries: tuple[Compilation, ...] = ()  # another one each time: threads may look at it meanwhile
        self._count = 0
        self._planned: list[_Plan] = []
        self._warned: set[str] = set()

    def begin(self, name: str, facts: Mapping[str, str]) -> Compilation:
        """Describe a compilation that begins, and warn if there were many for one reason.

        Args:
          name: what is compiled.
          facts: what decided about the program.
        """
        facts = {sys.intern(path): sys.intern(text) for path, text in facts.items()}  # most are the same each time
        differences = [(_differences(entry.facts, facts), entry.number) for entry in self.entries]
        changes, nearest = min(differences, key=lambda pair: (len(pair[0]), -pair[1]), default=({}, None))
        if len(changes) > 1:
            changes.pop(_SETTINGS, None)  # the others say it better
        entry = Compilation(self._count + 1, datetime.datetime.now(), 0.0, 0.0, facts, nearest, changes)
        for plan in self._planned:
            plan.count(name, entry)
        if len(changes) == 1:
            self._warn(name, next(iter(changes)), entry)
        return entry

    def end(self, entry: Compilation, tracing: float, compiling: float) -> None:
        """Note a compilation that has ended, and the seconds that it took."""
        self._count += 1
        ended = dataclasses.replace(entry, tracing=tracing, compiling=compiling)
        self.entries = (*self.entries, ended)[-_KEPT:]

    @contextlib.contextmanager
    def plan(self, compilations: int) -> Iterator[None]:
        """Allow so many compilations in a block."""
        plan = _Plan(compilations)
        self._planned.append(plan)
        try:
            yield
        finally:
            self._planned.remove(plan)

    def _warn(self, name: str, path: str, latest: Compilation) -> None:
        for_it = [entry for entry in (*self.entries, latest) if [*entry.changes] == [path]]
        if len(for_it) < _MANY or path in self._warned:
            return
        if latest.changes[path][1].startswith(("function ", "class ")):
            return  # there are only so many of them
        self._warned.add(path)
        seen = list(dict.fromkeys(text for entry in for_it for text in entry.changes[path]))
        shapes = all(re.fullmatch(r"\w+\[[\d,]*\].*", text) for text in seen)
        cure = (
            "Pad it to one shape, or to a few"
            if shapes
            else "Make it an array: an argument, or a state (`mu.Variable`)"
        )
        warnings.warn(
            f"`{name}` was compiled {len(for_it)} times only because `{path}` was another: {', '.join(seen[:6])}"
            f"{', ...' if len(seen) > 6 else ''}. {cure}. `mu.inspect.explain` lists the compilations.",
            RecompilationWarning,
            stacklevel=8,
        )


def _differences(before: Mapping[str, str], now: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    return {
        path: (before.get(path, _MISSING), now.get(path, _MISSING))
        for path in dict.fromkeys((*now, *before))
        if before.get(path) != now.get(path)
    }


def facts_of(call: PendingCall) -> dict[str, str]:
    """Everything of a call that decides which program it gets."""
    facts = dict(call.binding.captures.named)
    layout = call.binding.layout
    named = call.functions[0] if len(call.functions) == 1 else call.function
    names = argument_names(named, call.args, call.kwargs)
    entries = [*enumerate(call.args), *call.kwargs.items()]
    for name, (position, value) in zip(names, entries, strict=True):
        if position in layout.statics:
            facts[name] = _show(value)
        elif not is_node(value):
            for path, leaf in jax.tree_util.tree_flatten_with_path(value, is_leaf=is_node)[0]:
                if not is_node(leaf):
                    facts[name + jax.tree_util.keystr(path)] = _show_leaf(leaf)
            if (treedef := FlatTree(value).structure[0]) != _ONE_LEAF:
                facts[f"structure of {name}"] = show_structure(treedef)
    scope = call.scope() if call.walked is None else call.walked
    for path, obj in zip(scope.encoder.object_paths, scope.encoder.objects, strict=True):
        place = show_root_path(path)
        if isinstance(obj, Module):
            facts[place] = type(obj).__name__
            items = [(f"{place}.{name}", value) for name, value in dict(vars(obj)).items()]
            items.append((f"{place}.training", is_training(obj)))
        else:
            held = obj.copy()
            facts[place] = f"{len(held)} items"
            pairs = enumerate(held) if isinstance(held, list) else held.items()
            items = [(f"{place}[{key!r}]", value) for key, value in pairs]
        for item in items:
            facts.update(_static_facts(*item))
    for number, cell in enumerate(scope.cells):
        facts[show_root_path(scope.encoder.paths[number])] = _show_state(cell)
    for context, entry in contexts.active():
        if isinstance(entry, Static):
            facts[f"context {context.name}"] = _show(entry.value)
    facts.update({name: str(getattr(jax.config, name, None)) for name in jax.config.values})
    facts["mesh"] = str(jax.sharding.get_abstract_mesh())
    facts[_SETTINGS] = f"settings {_compat.trace_settings()}"
    return facts


def _static_facts(path: str, value: Any, depth: int = 0) -> Iterator[tuple[str, str]]:
    """What an attribute or entry says, unless it is described by itself: a node, a list or a dict."""
    if depth > _DEEP:
        return
    if isinstance(value, Wrapped):
        yield path, type(value).__name__
    elif isinstance(value, tuple):
        yield path, f"tuple of {len(value)}"
        names = [f".{name}" for name in getattr(value, "_fields", ())] or [f"[{i}]" for i in range(len(value))]
        for name, item in zip(names, value, strict=True):
            yield from _static_facts(f"{path}{name}", item, depth + 1)
    elif isinstance(value, types.FunctionType):
        yield path, f"function {value.__qualname__}"
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            yield from _static_facts(f"{path}.{name}", contents(cell), depth + 1)
    elif isinstance(value, functools.partial):
        yield from _static_facts(path, value.func, depth + 1)
        for name, item in (*((f"[{i}]", x) for i, x in enumerate(value.args)), *value.keywords.items()):
            yield from _static_facts(f"{path}.{name}", item, depth + 1)
    elif isinstance(value, jax.Array | np.ndarray):
        yield path, f"{show_type(value)} array"
    elif not isinstance(value, Module | Variable | list | dict):
        yield path, _show(value)


def _show_state(cell: Variable) -> str:
    value = cell._value  # its types are all that is looked at: not a read that exposes the state
    spread = [
        str(leaf.sharding)
        for leaf in jax.tree.leaves(value)
        if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and len(leaf.sharding.device_set) > 1
    ]
    parts = [type(cell).__name__, show_type(value), "frozen" if cell.frozen else "", *dict.fromkeys(spread)]
    return " ".join(filter(None, parts))


def _show_leaf(leaf: Any) -> str:
    if isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        weak = getattr(leaf, "weak_type", False)
        return show_type(leaf) + (" (weakly typed)" if weak else "")
    return f"a Python {type(leaf).__name__}"


def _show(value: Any) -> str:
    value = value.value if isinstance(value, StaticObject | Static) else value
    if value is None or type(value) in (bool, int, float):
        return repr(value)
    name = getattr(value, "__qualname__", None)
    return name if isinstance(name, str) else re.sub(r" at 0x[0-9a-f]+", "", f"{value!r:.200}")


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.0f} ms"
