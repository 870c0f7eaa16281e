"""Axes for states: how `vmap`, `scan` and `shard_map` are told which states are split, shared or carried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax

from mutatis.core import access, naming
from mutatis.core.showing import show_class, show_value
from mutatis.errors import ArgumentError, AxisError
from mutatis.model.filters import Filter, FilterLike, Path, as_filter
from mutatis.model.variables import Variable, spelled
from mutatis.model.walks import variables
from mutatis.tracing.call_site import CallSite


class _Mark:
    """A named alternative to an axis."""

    __module__ = "mutatis"  # where it is pickled from, by its name

    def __init__(self, name: str, doc: str) -> None:
        self._name = name
        self.__doc__ = doc

    def __repr__(self) -> str:
        return f"mu.{self._name}"

    def __reduce__(self) -> str:
        return self._name


Carry = _Mark(
    "Carry",
    "In the place of an axis: `mu.scan` carries the state from one iteration to the next, instead of slicing it. For example "
    "``mu.scan(f, init, model, states=mu.StateAxes({mu.Param: 0, ...: mu.Carry}))``.",
)
Shared = _Mark(
    "Shared",
    "In the place of an axis or a spec: all lanes of a `mu.vmap`, or all devices of a `mu.shard_map`, share the state, and they "
    "draw the same numbers from a random stream. For example ``mu.vmap(model, states=mu.StateAxes({mu.RngState: mu.Shared}))``.",
)


class ByFilter:
    """Something for each state, by filter: the first filter that selects a state decides."""

    __slots__ = ("_entries",)
    _what: ClassVar[str]
    _expected: ClassVar[str]
    _example: ClassVar[str]
    _pair: ClassVar[str]

    def __init__(self, entries: Mapping[FilterLike, Any]) -> None:
        if not isinstance(entries, Mapping):
            raise ArgumentError(
                f"`{type(self).__name__}` is made of a dictionary: for each filter {self._what}",
                expected=f"a dictionary from filters to one of {self._expected}",
                got=show_class(entries),
                cure=f"`{self._example}`",
            )
        self._entries: tuple[tuple[Filter, Any], ...] = tuple((as_filter(f), entry) for f, entry in entries.items())
        for _, entry in self._entries:
            if not self._fits(entry):
                raise AxisError(
                    f"{show_value(entry)} is not {self._what}",
                    expected=self._expected,
                    got=show_class(entry),
                    cure=f"`{self._example}`",
                )

    @staticmethod
    def _fits(entry: Any) -> bool:
        raise NotImplementedError

    @staticmethod
    def _normal(entry: Any) -> Any:
        return entry

    def entries(self) -> list[Any]:
        """Everything that is said."""
        return [entry for _, entry in self._entries]

    def of(self, path: Path, variable: Variable) -> Any:
        """What is said for a state, None if no filter selects it."""
        return next((entry for selects, entry in self._entries if selects(path, variable)), None)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self._entries == other._entries

    def __hash__(self) -> int:
        return hash((type(self), self._entries))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({{" + ", ".join(f"{f!r}: {entry!r}" for f, entry in self._entries) + "})"


class StateAxes(ByFilter):
    """An axis for each state of a model, chosen by filters, for `mu.vmap` and `mu.scan`.

    Give it in the place of an axis (`in_axes`, `out_axes`) or as `states=`.

    Args:
      axes: a dictionary from filters to axes. The first filter that selects a state decides; ``...`` selects the rest. An axis is
        an int, or None (all lanes of a `vmap` share the state), or `mu.Shared` (they also draw the same random numbers), or
        `mu.Carry` (a `scan` carries the state from iteration to iteration).

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> model = mu.nn.BatchNorm(2)
      >>> model.mean.value = jnp.zeros((3, 2))  # statistics of 3 lanes, and one scale and bias for all
      >>> model.var.value = jnp.ones((3, 2))
      >>> axes = mu.StateAxes({mu.BatchStat: 0, ...: None})
      >>> mu.vmap(lambda model, x: model(x), in_axes=(axes, 0))(model, jnp.ones((3, 4, 2))).shape
      (3, 4, 2)
      >>> model.mean.shape, model.scale.shape
      ((3, 2), (2,))
    """

    __slots__ = ()
    _what = "an axis"
    _expected = "an int, None, `mu.Carry` or `mu.Shared`"
    _example = "mu.StateAxes({mu.Param: None, ...: 0})"
    _pair = "[(model, 0)]"

    def __init__(self, axes: Mapping[FilterLike, Any]) -> None:
        super().__init__(axes)

    @staticmethod
    def _fits(entry: Any) -> bool:
        return entry is None or isinstance(entry, _Mark) or (isinstance(entry, int) and not isinstance(entry, bool))


class StateSharding(ByFilter):
    """A partition spec for each state of a model, chosen by filters, for `mu.shard_map` and `mu.jit`.

    Give it in the place of a spec or sharding (`in_specs`, `in_shardings`, `out_shardings`), or as `states=` of `mu.shard_map`.

    Args:
      specs: a dictionary from filters to specs. The first filter that selects a state decides; ``...`` selects the rest. A spec
        is a `jax.sharding.PartitionSpec`, or None (each device has the whole state), or `mu.Shared` (likewise, and random streams
        draw the same numbers on all devices). In `mu.jit` a spec refers to the mesh of `jax.set_mesh`, and a
        `jax.sharding.Sharding` may stand in its place.

    Raises:
      ArgumentError: `specs` is not a dictionary.
      AxisError: an entry of it is none of these.

    Example:
      >>> import jax, jax.numpy as jnp, mutatis as mu
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> model = mu.nn.Linear(2, 4, use_bias=False, rngs=mu.Rngs(0))
      >>> specs = mu.StateSharding({mu.Param: P(None, "model"), ...: P()})  # the kernel is split along its outputs
      >>> forward = mu.shard_map(
      ...     lambda model, x: model(x), mesh=mesh, in_specs=(specs, P()), out_specs=P(None, "model")
      ... )
      >>> forward(model, jnp.ones((3, 2))).shape
      (3, 4)
    """

    __slots__ = ()
    _what = "a spec"
    _expected = "a PartitionSpec, None or `mu.Shared`"
    _example = 'mu.StateSharding({mu.Param: P("model"), ...: P()})'
    _pair = '[(model, P("model"))]'

    def __init__(self, specs: Mapping[FilterLike, Any]) -> None:
        super().__init__(specs)

    @staticmethod
    def _fits(entry: Any) -> bool:
        return entry is None or entry is Shared or isinstance(entry, jax.sharding.PartitionSpec | jax.sharding.Sharding)

    @staticmethod
    def _normal(entry: Any) -> Any:
        return jax.sharding.PartitionSpec() if entry is None else entry


def named(states: Any, label: str, by: type[ByFilter] = StateAxes) -> list[tuple[Any, Any]]:
    """The pairs of a node and its axes that `states=` of a transform gives; none if it says axes by filter, or nothing.

    Args:
      states: what was given.
      label: the transform, for messages.
      by: what says axes by filter.

    Raises:
      AxisError: it is none of these.
    """
    if states is None or isinstance(states, by):
        return []
    pairs = states.items() if isinstance(states, Mapping) else states if isinstance(states, list | tuple) else None
    if pairs is None or any(not isinstance(pair, list | tuple) or len(pair) != 2 for pair in pairs):
        raise AxisError(
            f"`states={show_value(states)}` says no axes",
            where=label,
            expected=f"a {by.__name__}, or pairs of a node and one of {by._expected} or a {by.__name__}",
            got=show_class(states),
            cure=f"`states={by._example}`, or `states={by._pair}` for one node.",
        )
    return [(node, axes) for node, axes in pairs]


def axes_by_cell(
    site: CallSite, nodes: Sequence[tuple[Any, Any]], states: Any, by: type[ByFilter] = StateAxes
) -> dict[Variable, Any]:
    """The axis (or spec) of every cell for which one was given.

    Args:
      site: the call of the transform.
      nodes: nodes among the arguments, each with an axis or a `by`.
      states: a `by` for all other cells, or pairs of a node and its axes, or a dict of them.
      by: what says axes by filter.

    Raises:
      AxisError: two different axes are asked for one state.
    """
    found: dict[Variable, Any] = {}
    for node, axes in (*nodes, *named(states, site.label, by)):
        for path, cell in variables(node).items():
            axis = axes.of(path, cell) if isinstance(axes, ByFilter) else axes
            if not by._fits(axis):
                raise AxisError(
                    f"state `{site.scope.locate(cell)}` ({type(cell).__name__}) is asked for along what is not {by._what}",
                    path=site.scope.locate(cell),
                    where=site.label,
                    expected=by._expected,
                    got=show_value(axis),
                    cure=f"`states={by._example}`, or `states={by._pair}` for one node.",
                )
            axis = by._normal(axis)
            if cell in found and found[cell] != axis:
                raise AxisError(
                    f"state `{site.scope.locate(cell)}` ({type(cell).__name__}) is asked for along two axes",
                    path=site.scope.locate(cell),
                    where=site.label,
                    expected="one axis or spec for a state, however it is reached",
                    got=f"{show_value(found[cell])} and {show_value(axis)}",
                    cure="Give the same axis at both places, or pass the module once.",
                )
            found[cell] = axis
    if isinstance(states, ByFilter):
        for path, cell in zip(site.scope.encoder.paths, site.scope.cells, strict=True):
            if cell not in found:
                found[cell] = states.of(path[1:], cell)
    return found


def check_axis(site: CallSite, cell: Variable, axis: int) -> Any:
    """The value of a cell, which has this axis.

    Raises:
      AxisError: it has not.
    """
    value = access.load(cell)
    for leaf in jax.tree.leaves(value):
        count = axis + 1 if axis >= 0 else -axis  # that it takes to have this axis
        if leaf.ndim < count:
            raise AxisError(
                f"state `{site.scope.locate(cell)}` ({type(cell).__name__}) has no axis {axis}",
                path=site.scope.locate(cell),
                where=site.label,
                expected=f"at least {count} {'axis' if count == 1 else 'axes'}",
                got=f"shape {leaf.shape}",
                made_at=naming.made_at(cell),
                cure=f"Share it, `mu.StateAxes({{{spelled(type(cell))}: None, ...: 0}})`, or stack the models: "
                "`mu.vmap(make)(keys)`.",
            )
    return value
