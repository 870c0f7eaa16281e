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
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from mutatis import _compat
from mutatis.compilation.pending import PendingCall
from mutatis.core.avals import show_type
from mutatis.core.nodes import is_node
from mutatis.core.showing import cut, show_count, show_structure
from mutatis.core.statics import Static, StaticObject
from mutatis.errors import CompilationError, RecompilationWarning, see
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
_DEEP = 20  # functions in functions that are described
_SHOWN = 3  # facts of one attribute in a warning
_ONE_LEAF = jax.tree.structure(0)
_WIDTH, _SCREEN = 120, 40  # columns and lines that the log shows unasked
_SETTINGS = "JAX's configuration"


@dataclasses.dataclass(frozen=True)
class Compilation:
    """One compilation of a function, as `mu.inspect.explain` lists them.

    Attributes:
      number: its number, from 1.
      at: the time at which tracing had ended.
      tracing: the time of tracing in seconds.
      compiling: the time of lowering and compiling in seconds.
      facts: the properties of the call that decided about the program, by path.
      nearest: the number of the earlier compilation that has most in common with this one; None for the first.
      changes: the differences from that one: a dictionary from paths to pairs of the text before and the text now.
      cure: the code to write to avoid the compilation, where it is known.
    """

    number: int
    at: datetime.datetime
    tracing: float
    compiling: float
    facts: Mapping[str, str] = dataclasses.field(repr=False)
    nearest: int | None
    changes: Mapping[str, tuple[str, str]]
    cure: str | None = None

    def __str__(self) -> str:
        times = f"traced in {_seconds(self.tracing)}, compiled in {_seconds(self.compiling)}"
        lines = [f"{self.number}. at {self.at:%H:%M:%S}, {times}"]
        if self.nearest is not None:
            lines[0] += f"; compared with {self.nearest}:"
            lines += [f"     {path}: {before} -> {now}" for path, (before, now) in self.changes.items()]
            if not self.changes:
                lines.append("     the same call; another function, or another way to hand over its buffers")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True, repr=False)
class Explanation:
    """The reasons for the compilations of a function, as `mu.inspect.explain` returns them.

    `print` shows it as text, and a notebook as HTML that folds.

    Attributes:
      name: the name of the function.
      compilations: a tuple of `Compilation`, in the order of time.
    """

    name: str
    compilations: tuple[Compilation, ...]

    def title(self) -> str:
        """Return a line with the number of compilations, and with their time if there are several."""
        head = f"{self.name}: {show_count(len(self.compilations), 'compilation')}"
        if len(self.compilations) < 2:
            return head
        tracing, compiling = (sum(getattr(one, name) for one in self.compilations) for name in ("tracing", "compiling"))
        return f"{head}, traced in {_seconds(tracing)}, compiled in {_seconds(compiling)}"

    def __str__(self) -> str:
        cures = dict.fromkeys(entry.cure for entry in self.compilations if entry.cure is not None)
        return "\n".join([self.title(), *(f"  {compilation}" for compilation in self.compilations), *cures])

    def __repr__(self) -> str:
        lines = str(self).split("\n")
        if len(lines) > _SCREEN:
            above, below = 6, _SCREEN - 7  # the latest say most
            lines[above:-below] = [f"  ... {show_count(len(lines) - above - below, 'more line')}"]
        return "\n".join(cut(line, _WIDTH) for line in lines)

    def to_html(self) -> str:
        """Return the compilations as HTML, without a style."""
        from mutatis.core import markup

        shown = []
        for compilation in self.compilations:
            first, *rest = map(markup.escape, str(compilation).split("\n"))
            inside = "".join(f"<div>{line.strip()}</div>" for line in rest)
            shown.append(markup.folding(first, inside) if rest else f'<div class="leaf">{first}</div>')
        return markup.folding(markup.escape(self.title()), "".join(shown))

    def _repr_html_(self) -> str:
        from mutatis.core import markup

        return markup.framed(self.to_html())


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


class Facts(dict[str, str]):
    """What decides about a program, by path.

    Attributes:
      owners: for what is inside of a value, the attribute or argument whose value that is.
      cures: for such an attribute, what to write if it is another each time, where that is known.
    """

    def __init__(self, given: Mapping[str, str] | None = None) -> None:
        super().__init__(given or {})
        self.owners: dict[str, str] = {}
        self.cures: dict[str, str] = {}

    def add_value(self, path: str, value: Any, cure: str | None = None) -> None:
        """Add what a static value says."""
        found = dict(_static_facts(path, value))
        self.update(found)
        self.owners.update(dict.fromkeys(found, path))
        if cure is not None:
            self.cures[path] = cure


class Log:
    """The latest compilations of one function."""

    def __init__(self) -> None:
        self.entries: tuple[Compilation, ...] = ()  # another one each time: threads may look at it meanwhile
        self._count = 0
        self._planned: list[_Plan] = []
        self._warned: set[str] = set()
        self._owners: dict[str, str] = {}

    def begin(self, name: str, given: Facts) -> Compilation:
        """Describe a compilation that begins, and warn if there were many for one reason.

        Args:
          name: what is compiled.
          given: what decided about the program.
        """
        facts = {sys.intern(path): sys.intern(text) for path, text in given.items()}  # most are the same each time
        differences = [(_differences(entry.facts, facts), entry.number) for entry in self.entries]
        changes, nearest = min(differences, key=lambda pair: (len(pair[0]), -pair[1]), default=({}, None))
        if len(changes) > 1:
            changes.pop(_SETTINGS, None)  # the others say it better
        self._owners.update(given.owners)
        causes = self._causes(changes)
        cure = next(filter(None, map(given.cures.get, causes)), None)
        entry = Compilation(self._count + 1, datetime.datetime.now(), 0.0, 0.0, facts, nearest, changes, cure)
        for plan in self._planned:
            plan.count(name, entry)
        if len(causes) == 1:
            self._warn(name, causes[0], entry)
        return entry

    def _causes(self, changes: Mapping[str, Any]) -> list[str]:
        """The attributes and arguments that changes are of."""
        return [*dict.fromkeys(self._owners.get(path, path) for path in changes)]

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

    def _warn(self, name: str, cause: str, latest: Compilation) -> None:
        for_it = [entry for entry in (*self.entries, latest) if self._causes(entry.changes) == [cause]]
        if len(for_it) < _MANY or cause in self._warned:
            return
        if all(now.startswith(("function ", "class ")) for _, now in latest.changes.values()):
            return  # there are only so many of them
        self._warned.add(cause)
        paths = [*dict.fromkeys(path for entry in for_it for path in entry.changes)]
        if len(paths) == 1:
            seen = list(dict.fromkeys(text for entry in for_it for text in entry.changes[paths[0]]))
            what = f"`{paths[0]}` was another: {', '.join(seen[:6])}{', ...' if len(seen) > 6 else ''}"
        else:
            seen = [now for _, now in latest.changes.values()]
            parts = [f"`{path}` {before} -> {now}" for path, (before, now) in latest.changes.items()]
            more = f", and {len(parts) - _SHOWN} more" if len(parts) > _SHOWN else ""
            what = f"`{cause}` was another, as the last time: {', '.join(parts[:_SHOWN])}{more}"
        cure = latest.cure
        if cure is None and all(re.fullmatch(r"\w+\[[\d,]*\].*", text) for text in seen):
            cure = "Pad it to one shape, or to a few."
        cure = cure or "Make it an array: an argument, or a state (`mu.Variable`)."
        warnings.warn(
            f"`{name}` was compiled again {len(for_it)} times only because {what}. {cure} "
            f"`mu.inspect.explain` lists the compilations. {see(RecompilationWarning)}",
            RecompilationWarning,
            stacklevel=8,
        )


_CURES: dict[tuple[type, str], str] = {}


def advise(kind: type[Module], attribute: str, cure: str) -> None:
    """Say what to write if a static attribute of a kind of modules is another each time a function is called.

    Args:
      kind: the kind of modules.
      attribute: the name of the attribute.
      cure: what to write, as text or code that runs.
    """
    _CURES[kind, attribute] = cure


def _cure_of(obj: Any, attribute: str) -> str | None:
    return next((cure for kind in type(obj).__mro__ if (cure := _CURES.get((kind, attribute))) is not None), None)


def _differences(before: Mapping[str, str], now: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    return {
        path: (before.get(path, _MISSING), now.get(path, _MISSING))
        for path in dict.fromkeys((*now, *before))
        if before.get(path) != now.get(path)
    }


def facts_of(call: PendingCall) -> Facts:
    """Everything of a call that decides which program it gets."""
    named = call.binding.captures.named
    facts = Facts({name: text if isinstance(text, str) else text() for name, text in named.items()})
    layout = call.binding.layout
    function = call.functions[0] if len(call.functions) == 1 else call.function
    names = argument_names(function, call.args, call.kwargs)
    entries = [*enumerate(call.args), *call.kwargs.items()]
    for name, (position, value) in zip(names, entries, strict=True):
        if position in layout.statics:
            facts.add_value(name, value)
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
        for path, value in items:
            if not isinstance(value, list | dict):  # those are described by themselves
                facts.add_value(path, value, _cure_of(obj, path.rpartition(".")[2]))
    for number, cell in enumerate(scope.cells):
        facts[show_root_path(scope.encoder.paths[number])] = _show_state(cell)
    for context, entry in contexts.active():
        if isinstance(entry, Static):
            facts[f"context {context.name}"] = _show(entry.value)
    facts.update({name: str(getattr(jax.config, name, None)) for name in jax.config.values})
    facts["mesh"] = str(jax.sharding.get_abstract_mesh())
    facts[_SETTINGS] = f"settings {_compat.trace_settings()}"
    return facts


def _static_facts(path: str, value: Any, around: tuple[int, ...] = ()) -> Iterator[tuple[str, str]]:
    """What an attribute, argument or entry says, and what is inside of it, unless it is a node, which is described by itself.

    Args:
      path: what it goes by.
      value: its value.
      around: the identities of what it is in: a function may name itself.
    """
    value = value.value if isinstance(value, StaticObject | Static) else value
    if len(around) > _DEEP or id(value) in around or isinstance(value, Module | Variable):
        return
    inside: Iterable[tuple[str, Any]] = ()
    if isinstance(value, Wrapped):
        yield path, type(value).__name__
    elif isinstance(value, tuple):
        yield path, f"tuple of {len(value)}"
        names = [f".{name}" for name in getattr(value, "_fields", ())] or [f"[{i}]" for i in range(len(value))]
        inside = zip(names, value, strict=True)
    elif isinstance(value, list):
        yield path, f"{len(value)} items"
        inside = ((f"[{i}]", item) for i, item in enumerate(value))
    elif isinstance(value, dict):
        yield path, f"{len(value)} items"
        inside = ((f"[{key!r}]", item) for key, item in value.items())
    elif isinstance(value, types.FunctionType):
        yield path, f"function {value.__qualname__}"
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        inside = [*_defaults(value), *((f".{name}", contents(cell)) for name, cell in cells)]
    elif isinstance(value, functools.partial):
        inside = [("", value.func), *((f".[{i}]", item) for i, item in enumerate(value.args))]
        inside += [(f".{name}", item) for name, item in value.keywords.items()]
    elif isinstance(value, jax.Array | np.ndarray):
        yield path, f"{show_type(value)} array"
    else:
        yield path, _show(value)
    for name, item in inside:
        yield from _static_facts(f"{path}{name}", item, (*around, id(value)))


def _defaults(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """The defaults of a function's parameters."""
    code, values = function.__code__, function.__defaults__ or ()
    names = code.co_varnames[code.co_argcount - len(values) : code.co_argcount]
    yield from ((f".{name}", value) for name, value in zip(names, values, strict=True))
    yield from ((f".{name}", value) for name, value in (function.__kwdefaults__ or {}).items())


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
