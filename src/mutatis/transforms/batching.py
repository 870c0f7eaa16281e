"""`mu.vmap`: vectorize functions that read and write state.

A state has an axis and is split among the lanes, or it has none and all lanes share it. What is written to a shared state
has to be the same in all lanes. Random streams without an axis give each lane a stream of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mutatis import _compat
from mutatis.core import naming
from mutatis.core.nodes import is_node
from mutatis.core.transactions import Transaction
from mutatis.errors import AxisError, LaneError
from mutatis.model.variables import Variable, note_stacked, spelled
from mutatis.tracing.arguments import broadcast
from mutatis.tracing.axes import Shared, StateAxes, axes_by_cell, check_axis
from mutatis.tracing.call_site import CallSite, RunResult
from mutatis.tracing.lanes import LaneTransaction, unite
from mutatis.tracing.transformed import Transformed


def vmap(
    f: Callable[..., Any] | None = None,
    in_axes: Any = 0,
    out_axes: Any = 0,
    axis_name: Hashable | None = None,
    axis_size: int | None = None,
    spmd_axis_name: Hashable | None = None,
    sum_match: bool = False,
    *,
    states: Any = None,
) -> Any:
    """Vectorize a function over an axis of its arguments; as `jax.vmap`, with states.

    An axis for a Module argument splits all its states, random streams too: the module is an ensemble. None shares
    them. States that the function makes have axis 0 outside.

    A random stream that is shared gives each lane a stream of its own, from the stream's key, its count and the number of
    the lane; outside, its count is one further if it was used.

    Args:
      f: the function, bound method, partial or callable Module.
      in_axes: as in `jax.vmap`; `mu.StateAxes` in the place of a Module's axis chooses by filter.
      out_axes, axis_name, axis_size, spmd_axis_name, sum_match: as in `jax.vmap`.
      states: `mu.StateAxes` for everything that the function captures, or pairs of a node and its axes.

    Raises:
      LaneError: a value that differs per lane is written to a shared state.
      AxisError: axes contradict each other, or a state has no such axis.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> calls = mu.Variable(0)
      >>> def f(x):
      ...     calls.value += 1
      ...     return 2 * x
      >>> mu.vmap(f)(jnp.arange(3)), int(calls)
      (Array([0, 2, 4], dtype=int32), 1)
    """
    options = {k: v for k, v in locals().items() if k != "f"}
    remake = functools.partial(vmap, **options)
    if f is None:
        return remake
    return Transformed(f, remake, lambda function, args, kwargs: vectorize(function, args, kwargs, **options))


def vectorize(
    function: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    in_axes: Any = 0,
    out_axes: Any = 0,
    axis_name: Any = None,
    axis_size: int | None = None,
    spmd_axis_name: Any = None,
    sum_match: bool = False,
    states: Any = None,
    name: str = "vmap",
    writes: bool = True,
) -> Any:
    """One vectorized call; the options are those of `vmap`.

    Args:
      name: the transform's name, for messages.
      writes: whether shared states may be written (the same value in all lanes).
    """
    named = states.items() if isinstance(states, dict) else states if isinstance(states, list | tuple) else ()
    with CallSite(name, function, args, kwargs, others=[("states", [node for node, _ in named])]) as site:
        leaf_axes, node_axes = _argument_axes(site, args, kwargs, in_axes)
        axes = axes_by_cell(site, node_axes, states)
        for cell in site.scope.cells:
            if cell not in axes and type(cell).vmap_axis is not None:
                axes[cell] = type(cell).vmap_axis
        split: dict[Variable, int] = {cell: axis for cell, axis in axes.items() if isinstance(axis, int)}
        site.split = split
        alike = {cell for cell, axis in axes.items() if axis is Shared}
        values = [check_axis(site, cell, axis) for cell, axis in split.items()]
        lanes = np.arange(_count(site, leaf_axes, split, values, axis_size), dtype=np.uint32)

        def pure(values: list[Any], leaves: list[Any], lane: Any) -> Any:
            trace = _compat.current_trace()
            opened: list[LaneTransaction] = []

            def make(*positional: Any, **options: Any) -> Transaction:
                opened.append(LaneTransaction(*positional, lane=lane, alike=alike, **options))
                return opened[0]

            overlay = dict(zip(split, values, strict=True))
            site.end, out, written = site.run(overlay, leaves, make=make)
            result = site.end.unflatten(out, [None] * len(site.end.nodes))
            return result, *_sort_by_axis(site, site.end, split, written, opened[0], trace if writes else None)

        groups = {axis: axis for axis in {*split.values(), 0}}
        out, by_axis, shared = jax.vmap(
            pure,
            in_axes=(list(split.values()), leaf_axes, 0),
            out_axes=(_plain_axes(out_axes), groups, None),
            axis_name=axis_name,
            axis_size=axis_size if lanes.size == 0 else lanes.size,
            spmd_axis_name=spmd_axis_name,
            sum_match=sum_match,
        )(values, site.packed.leaves, lanes)
        end = site.end
        groups_left = {axis: iter(group) for axis, group in by_axis.items()}
        shared_left = iter(shared)
        ordered = []
        for cell in end.cells:
            axis = 0 if cell in end.born else split.get(cell)
            if cell in end.born:
                note_stacked(cell, 0, lanes.size)
            ordered.append(next(shared_left) if axis is None else next(groups_left[axis]))
        return site.commit(end, ordered, jax.tree.leaves(out))


def _sort_by_axis(
    site: CallSite, end: RunResult, split: dict[Variable, int], written: list[Any], tx: LaneTransaction, trace: Any
) -> tuple[dict[int, list[Any]], list[Any]]:
    """The written values by the axis that they have outside, and those without one (refused if there is no `trace`)."""
    groups: dict[int, list[Any]] = {axis: [] for axis in {*split.values(), 0}}
    shared: list[Any] = []
    sown = site.sown(end)
    for cell, value in zip(end.cells, written, strict=True):
        if cell in end.born and (trace is not None or cell not in sown):
            groups[0].append(value)
        elif cell in split:
            groups[split[cell]].append(value)
        elif (new := tx.outside(cell, value)) is not value:
            shared.append(new)
        elif trace is None:
            raise LaneError(
                f"state {site.describe(cell)} was written in a vectorized `map`, where items have no order",
                path=site.scope.locate(cell),
                where=site.label,
                made_at=naming.made_at(cell),
                cure="Leave out `batch_size`, so that the items are run one after the other.",
            )
        elif any(_compat.is_batched(leaf, trace) for leaf in jax.tree.leaves(value)):
            raise LaneError(
                f"state {site.describe(cell)} is shared by all lanes and was given a value that differs per lane",
                path=site.scope.locate(cell),
                where=site.label,
                expected="the same value in all lanes, or an axis for the state",
                got="a value per lane",
                made_at=naming.made_at(cell),
                cure=unite(cell, f"mu.StateAxes({{{spelled(type(cell))}: 0, ...: None}})", "axis_name"),
            )
        else:
            shared.append(value)
    tx.forget()
    return groups, shared


def _argument_axes(
    site: CallSite, args: tuple[Any, ...], kwargs: dict[str, Any], in_axes: Any
) -> tuple[list[Any], list[tuple[Any, Any]]]:
    """The axes of the arguments' leaves, and those of the nodes among them."""
    if isinstance(in_axes, list):
        in_axes = tuple(in_axes)
    if isinstance(in_axes, tuple) and len(in_axes) != len(args):
        raise AxisError(
            f"`in_axes` has {len(in_axes)} entries for {len(args)} positional arguments",
            where=site.label,
            expected=f"{len(args)} entries, or one axis for all",
            got=f"{in_axes!r:.60}",
            cure="Give an axis for each positional argument; keyword arguments are mapped over axis 0.",
        )
    entries = broadcast(in_axes, args, _is_axis) + broadcast(0, kwargs, _is_axis)
    leaves = [axis for axis, item in entries if not is_node(item)]
    nodes = [(item, axis) for axis, item in entries if is_node(item)]
    return leaves, nodes


def _is_axis(x: Any) -> bool:
    return x is None or isinstance(x, int | StateAxes)


def _plain_axes(out_axes: Any) -> Any:
    """`out_axes` for JAX: nodes are not among its outputs, so the axes that were said for them do not matter."""
    return jax.tree.map(lambda axis: 0 if isinstance(axis, StateAxes) else axis, out_axes, is_leaf=_is_axis)


def _count(
    site: CallSite, leaf_axes: Sequence[Any], split: dict[Variable, int], values: Sequence[Any], axis_size: int | None
) -> int:
    """The number of lanes.

    Raises:
      AxisError: nothing is mapped, or states disagree about the number.
    """
    sizes: dict[int, str] = {} if axis_size is None else {axis_size: "axis_size"}
    for axis, leaf in zip(leaf_axes, site.packed.leaves, strict=True):
        if axis is not None and jnp.ndim(leaf):
            sizes.setdefault(jnp.shape(leaf)[axis], "an argument")
    for (cell, axis), value in zip(split.items(), values, strict=True):
        for leaf in jax.tree.leaves(value):
            sizes.setdefault(leaf.shape[axis], f"state {site.scope.locate(cell)}")
    if len(sizes) == 1:
        return next(iter(sizes))
    raise AxisError(
        "`vmap` is given axes of different sizes" if sizes else "`vmap` has nothing to map over",
        where=site.label,
        got=", ".join(f"{name}: {size}" for size, name in sizes.items()) or None,
        cure="All mapped axes have one size; share the others with None, or say `axis_size=`.",
    )
