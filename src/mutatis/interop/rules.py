"""Rules: how the names and arrays of a file become those of a model, said as data and checked, forwards and backwards.

A name is dotted: ``encoder.layer.3.attention.query.weight``. A rule has a pattern of their names and one of ours, in which
``{i}`` stands for one part of a name, the same on both sides, and ``*``, in what is left out, for anything. A pattern may end
before the name
does: the rest is handed on. Of the rules that match a name the first counts; a name that none matches stays as it is.

Where arrays are cut, joined or turned, a *layout* says so. Each is one step with its way back, so that what a rule
reads it can also write.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from mutatis.core.showing import show_value
from mutatis.errors import ArgumentError

Arrays: TypeAlias = list[Any]


class Layout:
    """How the arrays that a rule takes become those that it gives, and the way back.

    `read` and `write` take and give lists of NumPy arrays. A `ValueError` says why arrays do not fit.
    """

    def read(self, arrays: Arrays) -> Arrays:
        """Ours for theirs."""
        raise NotImplementedError

    def write(self, arrays: Arrays) -> Arrays:
        """Theirs for ours."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, init=False)
class Transpose(Layout):
    """The axes in another order: `read` is ``x.transpose(axes)``; without axes they are reversed.

    Example:
      >>> from mutatis.interop import Transpose
      >>> Transpose(1, 2, 0).read([np.ones((2, 3, 4))])[0].shape
      (3, 4, 2)
    """

    axes: tuple[int, ...]

    def __init__(self, *axes: int) -> None:
        object.__setattr__(self, "axes", axes)

    def read(self, arrays: Arrays) -> Arrays:
        return [x.transpose(self.axes or None) for x in arrays]

    def write(self, arrays: Arrays) -> Arrays:
        back = tuple(self.axes.index(n) for n in range(len(self.axes)))
        return [x.transpose(back or None) for x in arrays]


@dataclasses.dataclass(frozen=True)
class Reshape(Layout):
    """Another shape for the same numbers in the same order.

    Args:
      ours: the shape in the model; one axis may be -1.
      theirs: the shape in the file; one axis may be -1.
    """

    ours: tuple[int, ...]
    theirs: tuple[int, ...]

    def read(self, arrays: Arrays) -> Arrays:
        return [x.reshape(self.ours) for x in arrays]

    def write(self, arrays: Arrays) -> Arrays:
        return [x.reshape(self.theirs) for x in arrays]


@dataclasses.dataclass(frozen=True)
class Split(Layout):
    """One array of theirs, cut into several of ours: a fused projection.

    Args:
      axis: the axis to cut along.
      sizes: the sizes of the parts; parts are equal if none are given.
    """

    axis: int = 0
    sizes: tuple[int, ...] = ()
    parts: int = dataclasses.field(default=0, repr=False)  # filled in by the rule: how many names it gives

    def read(self, arrays: Arrays) -> Arrays:
        (x,) = arrays
        if self.sizes and sum(self.sizes) != x.shape[self.axis]:
            raise ValueError(f"the parts {self.sizes} do not add up to {x.shape[self.axis]}")
        return list(np.split(x, np.cumsum(self.sizes)[:-1] if self.sizes else self.parts, axis=self.axis))

    def write(self, arrays: Arrays) -> Arrays:
        return [np.concatenate(arrays, axis=self.axis)]


@dataclasses.dataclass(frozen=True)
class Join(Layout):
    """Several arrays of theirs, put together to one of ours.

    Args:
      axis: the axis along which they are put one after the other.
      sizes: their sizes, for the way back; they are equal if none are given.
    """

    axis: int = 0
    sizes: tuple[int, ...] = ()
    parts: int = dataclasses.field(default=0, repr=False)

    def read(self, arrays: Arrays) -> Arrays:
        return Split(self.axis, self.sizes).write(arrays)

    def write(self, arrays: Arrays) -> Arrays:
        return Split(self.axis, self.sizes, self.parts).read(arrays)


@dataclasses.dataclass(frozen=True)
class Halves(Layout):
    """Rows for rotary positions: theirs turn neighbours (0, 1), (2, 3), ..., ours one half against the other.

    GGUF files of the Llama family hold query and key projections in this order.

    Args:
      heads: the number of heads that the first axis holds.

    Example:
      >>> from mutatis.interop import Halves
      >>> Halves(1).read([np.arange(6)])[0].tolist()
      [0, 2, 4, 1, 3, 5]
    """

    heads: int

    def read(self, arrays: Arrays) -> Arrays:
        return [x.reshape(self.heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape) for x in arrays]

    def write(self, arrays: Arrays) -> Arrays:
        return [x.reshape(self.heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape) for x in arrays]


RulesLike: TypeAlias = Mapping[Any, Any] | Iterable[tuple[Any, Any]]

_FORMS = (
    "`{'encoder.layer.{i}': 'blocks.{i}', 'pooler': None, 'qkv': (('query', 'key', 'value'), interop.Split(axis=0))}`: "
    "names, or None to leave out; with a layout, a pair of names and layout."
)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One rule: patterns of their names, of ours (none: the array is left out), and the layout between them."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    layout: Layout | None
    patterns: tuple[re.Pattern[str], ...]

    def match(self, name: str) -> tuple[int, dict[str, str]] | None:
        """Which of its patterns a name of theirs has, and what stands in its places."""
        for number, pattern in enumerate(self.patterns):
            if (found := pattern.fullmatch(name)) is not None:
                places = {key: value or "" for key, value in found.groupdict().items()}
                rest = places["rest__"].removeprefix(".")
                return number, {**places, "rest__": f".{rest}" if rest else ""}
        return None

    def __str__(self) -> str:
        return ", ".join(self.theirs)


def as_rules(rules: RulesLike) -> tuple[Rule, ...]:
    """Rules from a dictionary, or from pairs.

    Raises:
      ArgumentError: one is not of a form that rules have.
    """
    pairs = rules.items() if isinstance(rules, Mapping) else rules
    return tuple(_rule(*pair) for pair in pairs)


def _rule(theirs: Any, given: Any) -> Rule:
    ours, layout = (
        given if isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], Layout) else (given, None)
    )
    sources, targets = _as_names(theirs), () if ours is None else _as_names(ours)
    if sources is None or targets is None:
        raise _refused(theirs, given, "names are texts")
    if targets and "*" in "".join(sources):
        raise _refused(theirs, given, "what `*` stands for is left out, and has no name")
    if layout is None and (len(sources), len(targets)) not in ((1, 1), (1, 0)):
        raise _refused(theirs, given, "several names need a layout that says how they become others")
    if isinstance(layout, Split | Join):
        one, several = (sources, targets) if isinstance(layout, Split) else (targets, sources)
        if len(one) != 1 or len(several) < 2 or len(layout.sizes) not in (0, len(several)):
            raise _refused(
                theirs, given, f"`{type(layout).__name__}` stands between one name and several, with a size for each"
            )
        layout = dataclasses.replace(layout, parts=len(several))
    elif layout is not None and len(sources) != len(targets):
        raise _refused(theirs, given, f"`{type(layout).__name__}` gives as many arrays as it takes")
    places = set(re.findall(r"{(\w+)}", "".join(sources)))
    if unknown := set(re.findall(r"{(\w+)}", "".join(targets))) - places:
        raise _refused(theirs, given, f"{{{min(unknown)}}} stands on one side only")
    return Rule(sources, targets, layout, tuple(map(_pattern, sources)))


def _as_names(given: Any) -> tuple[str, ...] | None:
    names = (given,) if isinstance(given, str) else given
    return names if isinstance(names, tuple) and names and all(isinstance(n, str) for n in names) else None


def _refused(theirs: Any, given: Any, why: str) -> ArgumentError:
    return ArgumentError(
        f"the rule {show_value(theirs)}: {show_value(given)} says nothing: {why}",
        expected="a pattern of their names, and ours",
        got=f"{theirs!r}: {given!r}",
        cure=_FORMS,
    )


def _pattern(text: str) -> re.Pattern[str]:
    """What matches a pattern, and keeps the rest of the name."""
    seen: set[str] = set()
    parts = []
    for part in re.split(r"({\w+}|\*)", text):
        name = part[1:-1]
        if part == "*":
            parts.append(".*")
        elif re.fullmatch(r"{\w+}", part):
            parts.append(f"(?P={name})" if name in seen else f"(?P<{name}>[^.]+)")
            seen.add(name)
        else:
            parts.append(re.escape(part))
    return re.compile("".join(parts) + r"(?P<rest__>\..*)?" if text else r"(?P<rest__>.*)")


def _fill(pattern: str, places: Mapping[str, str]) -> str:
    filled = re.sub(r"{(\w+)}", lambda found: places[found[1]], pattern)
    return (filled + places["rest__"]).removeprefix(".")


@dataclasses.dataclass
class Translated:
    """Arrays under names of ours: for each the names that they had, and what does not work out."""

    arrays: dict[str, list[tuple[str, Any]]]
    problems: list[str]
    unused: list[str]


def translate(rules: Sequence[Rule], arrays: Mapping[str, Any]) -> Translated:
    """Arrays by the names that rules give them; one name may get several arrays, each with the name that it had."""
    done = Translated({}, [], [])
    groups: dict[tuple[int, tuple[tuple[str, str], ...]], dict[int, str]] = {}
    for name in arrays:
        found = next(((n, m) for n, rule in enumerate(rules) if (m := rule.match(name)) is not None), None)
        if found is None:
            done.arrays.setdefault(name, []).append((name, arrays[name]))
        else:
            number, (place, places) = found
            groups.setdefault((number, tuple(sorted(places.items()))), {})[place] = name
    for (number, items), names in groups.items():
        rule, places = rules[number], dict(items)
        lacking = [_fill(rule.theirs[n], places) for n in range(len(rule.theirs)) if n not in names]
        label = " + ".join(names[n] for n in sorted(names))
        if lacking:
            done.problems.append(f"incomplete: {label} comes with {', '.join(lacking)}, which are not there")
            continue
        taken = [arrays[names[n]] for n in range(len(rule.theirs))]
        try:
            given = taken[: len(rule.ours)] if rule.layout is None else rule.layout.read(list(map(np.asarray, taken)))
        except ValueError as error:
            shapes = ", ".join(str(np.shape(x)) for x in taken)
            done.problems.append(f"{label}: {rule.layout} does not take the shape {shapes}: {error}")
            continue
        for pattern, array in zip(rule.ours, given, strict=True):
            done.arrays.setdefault(_fill(pattern, places), []).append((label, array))
    used = {number for number, _ in groups}
    for number, rule in enumerate(rules):
        if number not in used and rule.ours:
            near = difflib.get_close_matches(re.sub(r"{\w+}", "0", rule.theirs[0]), arrays, 1, 0.5)
            done.unused.append(f"no name matches the rule `{rule}`" + "".join(f" (nearest: {found})" for found in near))
    return done


def inverse(rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """The rules for the way back, from names of ours to theirs; what is left out stays out."""
    return tuple(
        Rule(
            rule.ours, rule.theirs, None if rule.layout is None else _Back(rule.layout), tuple(map(_pattern, rule.ours))
        )
        for rule in rules
        if rule.ours
    )


@dataclasses.dataclass(frozen=True)
class _Back(Layout):
    """A layout the other way round."""

    layout: Layout

    def read(self, arrays: Arrays) -> Arrays:
        return self.layout.write(arrays)

    def write(self, arrays: Arrays) -> Arrays:
        return self.layout.read(arrays)
