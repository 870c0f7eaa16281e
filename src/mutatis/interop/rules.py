"""Rules: how the names and arrays of a file differ from those of a model, as data that is checked, in both directions.

A name is dotted: ``encoder.layer.3.attention.query.weight``. A rule has a pattern of the names in the file and one of those in
the model. In a pattern ``{i}`` stands for one part of a name, the same on both sides. In a rule that leaves arrays out, ``*``
stands for anything. A pattern may end before the name does: the rest of the name is kept. Of the rules that match a name the
first counts; a name that no rule matches stays as it is.

Where arrays are cut, joined or turned, the rule has a *layout*. Each layout is one step with an inverse, so that a rule that
reads an array can also write it.
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
    """Base class of layouts: how the arrays that a rule takes from a file become those of a model, and the way back.

    A rule is a pair of names and a layout, as in ``{"qkv": (("query", "key", "value"), Split(axis=0))}``. To write a layout of
    your own, define `read` and `write`, which take and return lists of NumPy arrays. Raise a `ValueError` if arrays do not fit;
    its text becomes part of the message.

    Example:
      >>> import numpy as np, mutatis as mu
      >>> class Scaled(mu.interop.Layout):
      ...     def read(self, arrays):
      ...         return [x / 8 for x in arrays]
      ...     def write(self, arrays):
      ...         return [x * 8 for x in arrays]
      >>> layer = mu.nn.Linear(2, 1, use_bias=False, rngs=mu.Rngs(0))
      >>> mu.interop.load(layer, {"w": np.full((2, 1), 16.0, np.float32)}, rules={"w": ("kernel", Scaled())})
      >>> layer.kernel.value[0, 0]
      Array(2., dtype=float32)
    """

    def read(self, arrays: Arrays) -> Arrays:
        """Return the arrays of the model for those of the file."""
        raise NotImplementedError

    def write(self, arrays: Arrays) -> Arrays:
        """Return the arrays of the file for those of the model."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, init=False)
class Transpose(Layout):
    """A layout that puts the axes into another order.

    Args:
      *axes: the order, as in ``x.transpose(axes)`` from the file to the model. Without axes the order is reversed.

    Example:
      >>> import numpy as np, mutatis as mu
      >>> mu.interop.Transpose(1, 2, 0).read([np.ones((2, 3, 4))])[0].shape
      (3, 4, 2)
      >>> layer = mu.nn.Linear(2, 3, use_bias=False, rngs=mu.Rngs(0))
      >>> weights = {"weight": np.ones((3, 2), np.float32)}
      >>> mu.interop.load(layer, weights, rules={"weight": ("kernel", mu.interop.Transpose())})
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
    """A layout that gives the same numbers, in the same order, another shape.

    Args:
      ours: the shape in the model, a tuple of ints; one of them may be -1.
      theirs: the shape in the file, likewise.

    Example:
      >>> import numpy as np, mutatis as mu
      >>> layout = mu.interop.Reshape(ours=(2, 4, -1), theirs=(2, -1))
      >>> layout.read([np.ones((2, 12))])[0].shape, layout.write([np.ones((2, 4, 3))])[0].shape
      ((2, 4, 3), (2, 12))
    """

    ours: tuple[int, ...]
    theirs: tuple[int, ...]

    def read(self, arrays: Arrays) -> Arrays:
        return [x.reshape(self.ours) for x in arrays]

    def write(self, arrays: Arrays) -> Arrays:
        return [x.reshape(self.theirs) for x in arrays]


@dataclasses.dataclass(frozen=True)
class Split(Layout):
    """A layout that cuts one array of the file into several of the model, such as a fused projection.

    Args:
      axis: the axis to cut along.
      sizes: the sizes of the parts, a tuple of ints. Without sizes the parts are equal.
      parts: the number of parts, which the rule fills in.

    Example:
      >>> import numpy as np, mutatis as mu
      >>> [x.shape for x in mu.interop.Split(axis=0, sizes=(4, 2)).read([np.ones((6, 3))])]
      [(4, 3), (2, 3)]
      >>> model = {"q": mu.Param(np.zeros(2)), "k": mu.Param(np.zeros(2))}
      >>> weights = {"qk": np.arange(4, dtype=np.float32)}
      >>> mu.interop.load(model, weights, rules={"qk": (("q", "k"), mu.interop.Split())})
      >>> model["k"].value
      Array([2., 3.], dtype=float32)
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
    """A layout that puts several arrays of the file together to one of the model.

    Args:
      axis: the axis along which the arrays are put one after the other.
      sizes: their sizes along this axis, for the way back. Without sizes they are equal.
      parts: the number of arrays, which the rule fills in.

    Example:
      >>> import numpy as np, mutatis as mu
      >>> model = {"qk": mu.Param(np.zeros(4))}
      >>> weights = {"q": np.ones(2, np.float32), "k": np.zeros(2, np.float32)}
      >>> mu.interop.load(model, weights, rules={("q", "k"): ("qk", mu.interop.Join())})
      >>> model["qk"].value
      Array([1., 1., 0., 0.], dtype=float32)
    """

    axis: int = 0
    sizes: tuple[int, ...] = ()
    parts: int = dataclasses.field(default=0, repr=False)

    def read(self, arrays: Arrays) -> Arrays:
        return Split(self.axis, self.sizes).write(arrays)

    def write(self, arrays: Arrays) -> Arrays:
        return Split(self.axis, self.sizes, self.parts).read(arrays)


@dataclasses.dataclass(frozen=True)
class Sum(Layout):
    """A layout that adds several arrays of the file, for arrays that the other library only ever adds, such as two biases.

    On the way back the first array gets the sum, and the others get zeros.

    Args:
      parts: the number of arrays, which the rule fills in.

    Example:
      >>> import numpy as np, mutatis as mu
      >>> mu.interop.Sum().read([np.ones(2), np.ones(2)])[0].tolist()
      [2.0, 2.0]
    """

    parts: int = dataclasses.field(default=0, repr=False)

    def read(self, arrays: Arrays) -> Arrays:
        if len({x.shape for x in arrays}) != 1:
            raise ValueError("what is added has one shape")
        return [sum(arrays[1:], arrays[0])]

    def write(self, arrays: Arrays) -> Arrays:
        (x,) = arrays
        return [x, *(np.zeros_like(x) for _ in range(self.parts - 1))]


@dataclasses.dataclass(frozen=True)
class Halves(Layout):
    """A layout of the rows of a projection for rotary positions.

    In the file, rotation turns neighbouring elements of a head, (0, 1), (2, 3), ...; in the model it turns the first half of a
    head against the second. GGUF files of the Llama family hold query and key projections in the first order.

    Args:
      heads: the number of heads along the first axis.

    Example:
      >>> import numpy as np, mutatis as mu
      >>> mu.interop.Halves(1).read([np.arange(6)])[0].tolist()
      [0, 2, 4, 1, 3, 5]
    """

    heads: int

    def read(self, arrays: Arrays) -> Arrays:
        return [x.reshape(self.heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape) for x in arrays]

    def write(self, arrays: Arrays) -> Arrays:
        return [x.reshape(self.heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape) for x in arrays]


def recurrent(theirs: str, ours: str, cell: Any, *, layer: int | None = 0, reverse: bool = False) -> dict[Any, Any]:
    """Make the rules for the weights of one layer of `torch.nn.RNN`, `GRU` or `LSTM`, or of their cells.

    Use them with ``convention="torch"``. PyTorch has two biases where `SimpleCell` and `OptimizedLSTMCell` have one: the rules
    add them. In a GRU the second bias is inside of the reset gate: make the `GRUCell` with ``use_recurrent_bias=True``.

    Args:
      theirs: the name of the PyTorch module, such as ``"encoder.lstm"``.
      ours: the name of the cell in the model, such as ``"encoder.cell"``; this is also the name of the cell of an `nn.RNN`.
      cell: the cell in the model or its class: `SimpleCell`, `GRUCell` or `OptimizedLSTMCell`.
      layer: the number of the layer; None for a cell of PyTorch, whose names have no number.
      reverse: whether it is the backward direction of a bidirectional layer.

    Returns:
      A dictionary of rules for `load` and `save`. Join several by ``|``.

    Raises:
      ArgumentError: `cell` is of another class.

    Example:
      >>> import mutatis as mu
      >>> rules = mu.interop.recurrent("lstm", "cell", mu.nn.OptimizedLSTMCell)
      >>> rules["lstm.weight_ih_l0"]
      'cell.dense_i.weight'
    """
    end = ("" if layer is None else f"_l{layer}") + ("_reverse" if reverse else "")
    bias = {"SimpleCell": "dense_i", "OptimizedLSTMCell": "dense_h", "GRUCell": None}
    kind = cell if isinstance(cell, type) else type(cell)
    name = next((base.__name__ for base in kind.__mro__ if base.__name__ in bias), None)
    if name is None:
        raise ArgumentError(
            "there are no rules for the weights of such a cell",
            path="cell",
            expected="`nn.SimpleCell`, `nn.GRUCell` or `nn.OptimizedLSTMCell`",
            got=kind.__name__,
            cure="Make the model with `nn.OptimizedLSTMCell`, whose weights lie side by side as in PyTorch.",
        )
    names = {part: f"{theirs}.{part}{end}" for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    rules: dict[Any, Any] = {
        names["weight_ih"]: f"{ours}.dense_i.weight",
        names["weight_hh"]: f"{ours}.dense_h.weight",
    }
    if bias[name] is None:
        return rules | {names["bias_ih"]: f"{ours}.dense_i.bias", names["bias_hh"]: f"{ours}.dense_h.bias"}
    return rules | {(names["bias_ih"], names["bias_hh"]): (f"{ours}.{bias[name]}.bias", Sum())}


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
    if isinstance(layout, Split | Join | Sum):
        one, several = (sources, targets) if isinstance(layout, Split) else (targets, sources)
        sizes = () if isinstance(layout, Sum) else layout.sizes
        if len(one) != 1 or len(several) < 2 or len(sizes) not in (0, len(several)):
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
        except (ValueError, IndexError, TypeError) as error:  # of layouts of users, too
            shapes = ", ".join(str(np.shape(x)) for x in taken)
            done.problems.append(f"{label}: {rule.layout} does not take the shape {shapes}: {error}")
            continue
        if len(given) != len(rule.ours):
            done.problems.append(
                f"{label}: `{type(rule.layout).__name__}` gives {len(given)} arrays for {len(rule.ours)} names"
            )
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
