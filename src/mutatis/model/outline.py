"""Outlines: what a model holds, as parts that know their text, with equal neighbours folded. Nothing is read or computed.

The `repr` of a module, the tree in a notebook and the page of a model are this outline, laid out (`tree`).
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import threading
import types
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import jax

from mutatis.core import access
from mutatis.core.avals import placement, show_type
from mutatis.core.cells import UNSET, Deferred
from mutatis.core.naming import probe, show_path
from mutatis.core.nodes import Reference, holds_nodes, is_node
from mutatis.core.showing import cut, show_value
from mutatis.core.statics import PLAIN
from mutatis.model.filters import Path
from mutatis.model.settings import LONG, SHORT, class_name, is_default, settings_of, show_attribute, show_static
from mutatis.model.tally import Tally
from mutatis.model.variables import Variable
from mutatis.model.wrapped import Wrapped, borrows

_DEEPEST = 40  # modules and containers inside one another


@dataclasses.dataclass(eq=False, slots=True)
class Part:
    """A module, a container, a state or a value, and what is in it.

    Attributes:
      path: where it is.
      name: how its text begins, such as ``kernel=``.
      head, tail: its text, before and after what is in it.
      said: the settings that stand in the text of a module, as ``16 -> 32``.
      children: what is in it.
      tally: the states that were met here first.
      count: how many equal ones it stands for.
      module: whether it is a module.
      own: the one line that a user's class has for itself.
      brief: whether its settings, or that line, say all there is to say.
      note: what else is to be said.
      same: the part that has shown the same object already.
    """

    path: Path
    name: str = ""
    head: str = ""
    tail: str = ""
    said: str = ""
    children: list[Part] = dataclasses.field(default_factory=list)
    tally: Tally = dataclasses.field(default_factory=Tally)
    count: int = 1
    module: bool = False
    own: str | None = None
    brief: bool = False
    note: str = ""
    same: Part | None = None

    def levels(self) -> int:
        """How many modules are inside one another here."""
        return max((child.levels() for child in self.children), default=0) + self.module


def outline(node: Any) -> Part:
    """The outline of a module, a state, or a container of them.

    Where a `__repr__` of the user's asks for that of a module that is being shown, the answer is short.
    """
    nested: list[int] = _shown.__dict__.setdefault("nested", [])
    if id(node) in nested or len(nested) >= _NESTED:
        return Part((), "", f"{class_name(type(node))}(...)")
    nested.append(id(node))
    try:
        return _Outliner().part(node, (), "", True)
    finally:
        nested.pop()


_shown = threading.local()  # what is being shown in this thread
_NESTED = 3


class _Outliner:
    """One walk over a model: what was met is shown once."""

    def __init__(self) -> None:
        self._met: dict[int, Part] = {}
        self._kept: list[Any] = []  # so that nothing else gets the identity of what was met
        self._depth = 0

    def part(self, value: Any, path: Path, name: str, training: bool) -> Part:
        """What is shown of a value."""
        if type(value) in PLAIN or not (is_node(value) or holds_nodes(value) or _is_bound(value)):
            return Part(path, name, show_static(value))
        met = self._met.get(id(value))
        if met is not None:
            where = show_path(met.path) or f"the whole {met.head.rstrip('([{')}"
            return Part(path, name, f"<same as {where}>", same=met)
        self._kept.append(value)
        if isinstance(value, Variable):
            return self._state(value, path, name)
        if self._depth >= _DEEPEST:
            return self._deep(value, path, name)
        self._depth += 1
        try:
            if isinstance(value, Wrapped):
                return self._around(f"{class_name(type(value))}(", value.__wrapped__, path, name, training)
            if isinstance(value, types.MethodType):
                text = str(probe(value.__func__, "__name__", "method"))
                return self._around(f"{cut(text, SHORT)} of (", value.__self__, path, name, training)
            return (
                self._container(value, path, name, training)
                if not is_node(value)
                else self._module(value, path, name, training)
            )
        finally:
            self._depth -= 1

    def _state(self, cell: Variable[Any], path: Path, name: str) -> Part:
        part = self._met[id(cell)] = Part(path, name, show_state(cell))
        part.note = "read as an array" if cell._behind else ""
        part.tally.add(cell)
        return part

    def _around(self, head: str, value: Any, path: Path, name: str, training: bool) -> Part:
        """A transformed function or module, or a method of one: around what it is of."""
        inner = self.part(value, path, name, training)
        if not inner.module:
            inner.head = f"{head}{inner.head}"
            inner.tail += ")"
            return inner
        return Part(path, name, head, ")", children=[dataclasses.replace(inner, name="")], tally=inner.tally)

    def _module(self, module: Any, path: Path, name: str, training: bool) -> Part:
        cls = type(module)
        part = self._met[id(module)] = Part(path, name, f"{class_name(cls)}(", ")", module=True)
        part.own = _own_words(module)
        attributes = {key: value for key, value in dict(module.__dict__).items() if not isinstance(value, Reference)}
        modes = {"training"} if attributes.get("training", True) is training else set()
        training = attributes["training"] if isinstance(attributes.get("training"), bool) else True
        shown = {key: x for key, x in attributes.items() if key not in modes and not is_default(cls, key, x)}
        ours = cls.__module__.partition(".")[0] == __name__.partition(".")[0]
        if ours:
            shown = {key: x for key, x in shown.items() if not key.startswith("_")}
        said = settings_of(cls, shown)
        part.said = ", ".join(filter(None, said.values()))
        part.children = [
            self.part(value, (*path, key), f"{show_attribute(key)}=", training)
            for key, value in shown.items()
            if key not in said
        ]
        holds_more = any(child.children or child.module or child.same for child in part.children)
        part.brief = part.own is not None or (ours and bool(part.said) and not holds_more)
        _finish(part, _fold_named)
        return part

    def _deep(self, value: Any, path: Path, name: str) -> Part:
        """What is too deep to be shown: only counted."""
        part = Part(path, name, f"{class_name(type(value))}(...)", note="too deep to be shown")
        pending = [value]
        while pending:
            item = pending.pop()
            if id(item) in self._met and item is not value:
                continue
            self._met[id(item)] = part
            self._kept.append(item)
            if isinstance(item, Variable):
                part.tally.add(item)
            elif is_node(item) or holds_nodes(item):
                inside = item if isinstance(item, list | tuple | dict) else dict(vars(item))
                pending.extend(inside.values() if isinstance(inside, dict) else inside)
        return part

    def _container(self, held: Any, path: Path, name: str, training: bool) -> Part:
        part = self._met[id(held)] = Part(path, name)
        if isinstance(held, dict):
            part.head, part.tail = "{", "}"
            pairs = [(key, f"{cut(show_value(key), SHORT)}: ", x) for key, x in dict(held).items()]
        elif fields := getattr(type(held), "_fields", ()):
            part.head, part.tail = f"{class_name(type(held))}(", ")"
            pairs = [(at, f"{field}=", x) for at, (field, x) in enumerate(zip(fields, held, strict=False))]
        else:
            part.head, part.tail = ("[", "]") if isinstance(held, list) else ("(", ")")
            pairs = [(at, "", x) for at, x in enumerate(list(held))]
        part.children = [self.part(x, (*path, key), label, training) for key, label, x in pairs]
        _finish(part, _fold_named if isinstance(held, dict) else _fold_listed)
        return part


def _finish(part: Part, fold: Callable[[Part], list[Part]]) -> None:
    for child in part.children:
        part.tally += child.tally
    part.children = fold(part)


def _is_bound(value: Any) -> bool:
    return isinstance(value, types.MethodType) and borrows(value)


# -- texts ---------------------------------------------------------------------------------------------------------


def show_state(cell: Variable[Any]) -> str:
    """A state by its kind, its type and its marks; its value is not read."""
    value = access.peek(cell)
    waits = value is UNSET or type(value) is Deferred
    texts = ["deferred" if waits else cut(show_type(value), LONG)]
    if (where := show_place(cell, value)) and not waits:
        texts.append(where)
    texts += [f"name={cell.name!r}"] if cell.name is not None else []
    texts += ["frozen"] if cell.frozen else []
    texts += [f"{key}={cut(show_value(x), SHORT)}" for key, x in cell.metadata.items()]
    return f"{class_name(type(cell))}({cut(', '.join(texts), 2 * LONG)})"


def show_place(cell: Variable[Any], value: Any) -> str:
    """How a state is spread over devices, or is to be; empty if it is on one."""
    spread = None if value is UNSET or type(value) is Deferred else _placement(value)
    where = spread[0] if spread else cell.sharding
    if where is None:
        return ""
    spec = getattr(where, "spec", where)
    return f"sharding={cut(show_value(spec), SHORT)}"


def _placement(value: Any) -> tuple[Any, ...] | None:
    try:
        return placement([leaf for leaf in jax.tree.leaves(value) if not isinstance(leaf, jax.core.Tracer)])
    except Exception:  # an array that JAX made without saying where
        return None


def _own_words(module: Any) -> str | None:
    """The line that the user's class has for itself, by a `__repr__` of its own."""
    if str(getattr(type(module).__repr__, "__module__", "")).startswith(f"{__name__.partition('.')[0]}."):
        return None
    try:
        text = repr(module)
    except Exception:  # users' classes raise what they like
        return None
    return text if 0 < len(text) <= LONG and text.isprintable() else None


# -- folding -------------------------------------------------------------------------------------------------------

_PERIOD = 6  # kinds of layers that take turns in a list
_ALIKE = 3  # that many attributes or entries that differ by a number only are one


def _key(part: Part, base: Path) -> Hashable:
    """What makes two neighbours equal; `base` is the path of the neighbour that the part is in."""
    inside = part.path[len(base) :]
    name = "" if not inside else part.name
    if part.same is not None:
        target = part.same.path
        if target[: len(base)] == base:
            return ("same", name, target[len(base) :])
        siblings = base and target[: len(base) - 1] == base[:-1] and target[len(base) :] == inside
        if not (siblings and inside):
            return ("same", name, part.head)
        met = part.same  # what the first of the neighbours has at this place
        return (
            name,
            met.head,
            met.said,
            met.note,
            met.count,
            tuple(_key(child, target[: len(base)]) for child in met.children),
        )
    children = tuple(_key(child, base) for child in part.children)
    return (name, part.head, part.said, part.note, part.count, children)


def _shared(part: Part, base: Path) -> Iterator[str]:
    """What one of several neighbours shares with the first of them."""
    if part.same is not None and part.same.path[: len(base)] != base and part.same.path[: len(base) - 1] == base[:-1]:
        yield show_path(part.path[len(base) :])
    for child in part.children:
        yield from _shared(child, base)


def _together(alike: Sequence[Part], **changes: Any) -> Part:
    """Several equal neighbours as one part."""
    total = Tally()
    for part in alike:
        total += part.tally
    shared = list(dict.fromkeys(itertools.chain.from_iterable(_shared(part, part.path) for part in alike[1:])))
    shared = [text for text in shared if text]
    note = ", ".join(filter(None, (alike[0].note, f"all with one {', '.join(shared[:3])}" if shared else "")))
    return dataclasses.replace(alike[0], count=sum(part.count for part in alike), tally=total, note=note, **changes)


def _fold_listed(part: Part) -> list[Part]:
    """The items of a list, with equal neighbours as one, and a few that take turns as one row of them."""
    items = part.children
    if len(items) < 2:
        return items
    numbers: dict[Hashable, int] = {}
    keys = [numbers.setdefault(_key(item, item.path), len(numbers)) for item in items]
    folded: list[Part] = []
    at = 0
    while at < len(items):
        period, times = _repetition(keys, at)
        if times == 1:
            folded.append(items[at])
            at += 1
            continue
        rows = [items[at + turn : at + times * period : period] for turn in range(period)]
        at += times * period
        if period == 1:
            folded.append(_together(rows[0]))
            continue
        turns = [dataclasses.replace(_together(row), count=1) for row in rows]
        group = Part(rows[0][0].path, "", "(", ")", children=turns, count=times)
        for turn in turns:
            group.tally += turn.tally
        folded.append(group)
    return folded


def _repetition(keys: Sequence[int], at: int) -> tuple[int, int]:
    """How many kinds take turns from here on, and how often: those that cover the most."""
    best = (1, 1)
    for period in range(1, _PERIOD + 1):
        row = keys[at : at + period]
        if len(row) < period or (period > 1 and len(set(row)) == 1):
            continue
        times = 1
        while keys[at + times * period : at + (times + 1) * period] == row:
            times += 1
        if (times > 1 if period == 1 else times > 2) and times * period > best[0] * best[1]:
            best = (period, times)
    return best


def _fold_named(part: Part) -> list[Part]:
    """Attributes or entries, of which those that differ by a number in their names only are one: ``w0..99=``."""
    groups: dict[Hashable, list[Part]] = {}
    if len(part.children) < _ALIKE:
        return part.children
    for number, child in enumerate(part.children):
        pattern = tuple(re.split(r"\d+", child.name))
        alike: Hashable = number  # a name without a number is alone
        if len(pattern) > 1:
            alike = (pattern, _key(child, child.path))
        groups.setdefault(alike, []).append(child)
    folded: dict[int, Part] = {id(child): child for child in part.children}
    for row in groups.values():
        span = _span([child.name for child in row]) if len(row) >= _ALIKE else None
        if span is not None:
            folded[id(row[0])] = _together(row, name=span)
            for child in row[1:]:
                del folded[id(child)]
    return [*folded.values()]


def _span(names: Iterable[str]) -> str | None:
    """Names that differ by numbers as one, ``w0..99=``; None if numbers are left out between them."""
    rows = [re.split(r"(\d+)", name) for name in names]
    columns = [list(dict.fromkeys(column)) for column in zip(*rows, strict=True)]
    whole, text = 1, ""
    for column in columns:
        if len(column) == 1:
            text += column[0]
            continue
        numbers = sorted(map(int, column))
        if numbers[-1] - numbers[0] != len(numbers) - 1:
            return None
        whole *= len(numbers)
        text += f"{numbers[0]}..{numbers[-1]}"
    return text if whole == len(rows) else None
