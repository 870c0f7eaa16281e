"""Axes for states: how `vmap` and `scan` are told which states are split, shared or carried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from mutatis import transactions
from mutatis.errors import AxisError
from mutatis.filters import Filter, FilterLike, Path, as_filter
from mutatis.graph import variables
from mutatis.lifting import Site
from mutatis.variables import Variable, raw_value, spelled


class _Mark:
    """A named alternative to an axis."""

    def __init__(self, name: str, doc: str) -> None:
        self._name = name
        self.__doc__ = doc

    def __repr__(self) -> str:
        return f"mu.{self._name}"

    def __reduce__(self) -> str:
        return self._name


Carry = _Mark("Carry", "In `scan`: the state is carried from one iteration to the next.")
Shared = _Mark("Shared", "In `vmap`: a random stream that all lanes draw alike from.")


class StateAxes:
    """Axes by filter: the first filter that selects a state decides.

    Args:
      axes: for each filter an axis, or None (shared by all lanes of a `vmap`), `mu.Shared` (so are random draws) or
        `mu.Carry` (carried by a `scan`).

    Example:
      >>> import mutatis as mu
      >>> mu.StateAxes({mu.Param: None, ...: 0})
      StateAxes({OfType(Param): None, Everything(): 0})
    """

    __slots__ = ("_axes",)

    def __init__(self, axes: Mapping[FilterLike, Any]) -> None:
        self._axes: tuple[tuple[Filter, Any], ...] = tuple((as_filter(f), axis) for f, axis in axes.items())
        for _, axis in self._axes:
            if not (axis is None or isinstance(axis, int | _Mark)) or isinstance(axis, bool):
                raise AxisError(
                    f"{axis!r:.40} is not an axis",
                    expected="an int, None, `mu.Carry` or `mu.Shared`",
                    got=type(axis).__name__,
                    cure="`mu.StateAxes({mu.Param: None, ...: 0})`",
                )

    def axis_of(self, path: Path, variable: Variable) -> Any:
        """The axis of a state, None if no filter selects it."""
        return next((axis for selects, axis in self._axes if selects(path, variable)), None)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StateAxes) and self._axes == other._axes

    def __hash__(self) -> int:
        return hash(self._axes)

    def __repr__(self) -> str:
        return "StateAxes({" + ", ".join(f"{f!r}: {axis!r}" for f, axis in self._axes) + "})"


def assign_axes(site: Site, nodes: Sequence[tuple[Any, Any]], states: Any) -> dict[Variable, Any]:
    """The axis of every cell for which one was given.

    Args:
      site: the call of the transform.
      nodes: nodes among the arguments, each with an axis or `StateAxes`.
      states: `StateAxes` for all other cells, or pairs of a node and its axes, or a dict of them.

    Raises:
      AxisError: two different axes are asked for one state.
    """
    found: dict[Variable, Any] = {}
    pairs = list(nodes)
    if isinstance(states, Mapping):
        pairs += list(states.items())
    elif isinstance(states, list | tuple):
        pairs += states
    elif states is not None and not isinstance(states, StateAxes):
        raise AxisError(
            f"`states={states!r:.40}` says no axes",
            where=site.label,
            expected="StateAxes, or pairs of a node and an axis or StateAxes",
            got=type(states).__name__,
            cure="`states=mu.StateAxes({mu.Param: None, ...: 0})` or `states=[(model, 0)]`.",
        )
    for node, axes in pairs:
        for path, cell in variables(node).items():
            axis = axes.axis_of(path, cell) if isinstance(axes, StateAxes) else axes
            if cell in found and found[cell] != axis:
                raise AxisError(
                    f"state `{site.scope.locate(cell)}` ({type(cell).__name__}) is asked for along two axes",
                    path=site.scope.locate(cell),
                    where=site.label,
                    expected="one axis for a state, however it is reached",
                    got=f"{found[cell]!r} and {axis!r}",
                    cure="Give the same axis at both places, or pass the module once.",
                )
            found[cell] = axis
    if isinstance(states, StateAxes):
        for path, cell in zip(site.scope.encoder.paths, site.scope.cells, strict=True):
            if cell not in found:
                found[cell] = states.axis_of(path[1:], cell)
    return found


def check_axis(site: Site, cell: Variable, axis: int) -> Any:
    """The value of a cell, which has this axis.

    Raises:
      AxisError: it has not.
    """
    value = raw_value(cell)
    for leaf in jax.tree.leaves(value):
        count = axis + 1 if axis >= 0 else -axis  # that it takes to have this axis
        if leaf.ndim < count:
            raise AxisError(
                f"state `{site.scope.locate(cell)}` ({type(cell).__name__}) has no axis {axis}",
                path=site.scope.locate(cell),
                where=site.label,
                expected=f"at least {count} {'axis' if count == 1 else 'axes'}",
                got=f"shape {leaf.shape}",
                made_at=transactions.made_at(cell),
                cure=f"Share it, `mu.StateAxes({{{spelled(type(cell))}: None, ...: 0}})`, or stack the models: "
                "`mu.vmap(make)(keys)`.",
            )
    return value
