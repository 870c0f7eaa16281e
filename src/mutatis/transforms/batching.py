"""`mu.vmap`: vectorize functions that read and write state.

A state has an axis and is split among the lanes, or it has none and all lanes share it. What is written to a shared state
has to be the same in all lanes. Random streams without an axis give each lane a stream of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, ParamSpec, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np

from mutatis import _compat
from mutatis.core import naming, placements
from mutatis.core.calls import takes
from mutatis.core.naming import show_path
from mutatis.core.nodes import is_node
from mutatis.core.showing import show_value
from mutatis.core.transactions import Transaction
from mutatis.errors import AxisError, LaneError
from mutatis.model.variables import Variable, note_stacked, spelled
from mutatis.model.walks import variables
from mutatis.tracing.arguments import broadcast, check_result, leaf_names
from mutatis.tracing.axes import Shared, StateAxes, axes_by_cell, check_axis, named
from mutatis.tracing.call_site import CallSite, RunResult
from mutatis.tracing.lanes import LaneTransaction, unite
from mutatis.tracing.transformed import ForPartial, Transformed

P = ParamSpec("P")
R = TypeVar("R")


@overload
def vmap(f: ForPartial, /) -> Any: ...
@overload
def vmap(
    f: Transformed[P, R],
    in_axes: Any = ...,
    out_axes: Any = ...,
    axis_name: Hashable | None = ...,
    axis_size: int | None = ...,
    spmd_axis_name: Hashable | None = ...,
    sum_match: bool = ...,
    *,
    states: Any = ...,
) -> Transformed[P, R]: ...
@overload
def vmap(
    f: Callable[P, R],
    in_axes: Any = ...,
    out_axes: Any = ...,
    axis_name: Hashable | None = ...,
    axis_size: int | None = ...,
    spmd_axis_name: Hashable | None = ...,
    sum_match: bool = ...,
    *,
    states: Any = ...,
) -> Transformed[P, R]: ...
@overload
def vmap(
    f: None = None,
    in_axes: Any = ...,
    out_axes: Any = ...,
    axis_name: Hashable | None = ...,
    axis_size: int | None = ...,
    spmd_axis_name: Hashable | None = ...,
    sum_match: bool = ...,
    *,
    states: Any = ...,
) -> Callable[[Callable[P, R]], Transformed[P, R]]: ...
@takes("mu.vmap(f)(xs)", _="Call what comes back with the arguments: `mu.vmap(f)(xs)`.")
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

    The parallel computations are called *lanes*. A Module argument with an axis is an ensemble: each of its states, random
    streams too, has an axis with an entry for each lane. A Module argument with the axis None is shared by all lanes, and so are
    the states that the function uses from outside. All lanes may read a shared state. They may write to it only a value that does
    not depend on the lane, such as a count of calls.

    A state that the function makes is stacked along axis 0. The states of a Module that it makes and returns are stacked along
    the axis of `out_axes`. From a shared random stream each lane draws numbers of its own; afterwards the count of the stream is
    one higher, if it was used.

    Args:
      f: the function, bound method, partial or callable Module. Without `f`, the result is a decorator.
      in_axes: the axis of each argument, an int or None, as in `jax.vmap`. For a Module a `mu.StateAxes` gives an axis for each
        filter.
      out_axes: the axis of each result, as in `jax.vmap`. For a Module that the function makes: an axis or a `mu.StateAxes`. A
        Module that existed before keeps its axes.
      axis_name: a name for the axis, for collectives such as ``jax.lax.pmean(x, axis_name)``, as in `jax.vmap`.
      axis_size: the number of lanes, where no argument has an axis, as in `jax.vmap`.
      spmd_axis_name, sum_match: as in `jax.vmap`.
      states: the axes of states that the function uses from outside: a `mu.StateAxes` for all of them, or pairs of a node and its
        axes.

    Returns:
      A function of stacked arguments that returns stacked results.

    Raises:
      LaneError: a value that differs per lane is written to a shared state.
      AxisError: axes contradict each other, or a state has no such axis.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> def make(rngs):
      ...     return mu.nn.Linear(2, 1, rngs=rngs)
      >>> ensemble = mu.vmap(make)(mu.Rngs(0).split(3))  # one model whose states have an axis for 3 members
      >>> ensemble.kernel.shape
      (3, 2, 1)
      >>> predict = mu.vmap(lambda model, x: model(x), in_axes=(0, None))
      >>> predict(ensemble, jnp.ones((4, 2))).shape
      (3, 4, 1)
    """
    options = {k: v for k, v in locals().items() if k != "f"}
    remake: functools.partial[Any] = functools.partial(vmap, **options)
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
    others = [("states", [node for node, _ in named(states, name)])]
    with CallSite(name, function, args, kwargs, others=others) as site:
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
            check_result(site.end, out, site.label)
            result = site.end.unflatten(out, [None] * len(site.end.nodes))
            outside.update(_result_axes(site, site.end, out, out_axes, split))
            return result, *_sort_by_axis(
                site, site.end, outside, groups, written, opened[0], trace if writes else None
            )

        outside: dict[Any, Any] = dict(split)  # the axes that states have outside
        groups = {axis: axis for axis in {*split.values(), 0, *_numbers_in(out_axes)}}
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
            axis = outside.get(cell)
            value = next(shared_left) if axis is None else next(groups_left[axis])
            ordered.append(value)
            if cell in end.born and axis is not None:
                leaves = jax.tree.leaves(value)  # none, if the state has yet to start
                note_stacked(cell, axis % jnp.ndim(leaves[0]) if leaves else axis, lanes.size)
                if cell.sharding is not None:
                    ordered[-1] = placements.declared(cell, value)
        return site.commit(end, ordered, jax.tree.leaves(out))


def _result_axes(
    site: CallSite, end: RunResult, out: Sequence[Any], out_axes: Any, split: dict[Variable, int]
) -> dict[Any, Any]:
    """The axes that the states that were made have outside: what `out_axes` says of a node that is returned, else 0.

    Raises:
      AxisError: it says something that cannot be done.
    """
    found: dict[Any, Any] = {}
    result = end.unflatten(out)
    try:
        entries = broadcast(tuple(out_axes) if isinstance(out_axes, list) else out_axes, result, _is_axis)
    except ValueError:  # JAX says it better
        entries = []
    for axes, node in entries:
        for path, cell in variables(node).items() if is_node(node) else ():
            axis = axes.of(path, cell) if isinstance(axes, StateAxes) else axes
            axis = None if axis is Shared else axis
            made = cell in end.born
            before = found.get(cell, axis) if made else axis if axis == 0 else split.get(cell)
            if axis != before or not (axis is None or isinstance(axis, int)):
                raise AxisError(
                    f"state {site.describe(cell)} cannot come out along {axis!r}",
                    path=site.scope.locate(cell) or show_path(path),
                    where=site.label,
                    expected=f"{before!r}, " + ("as at another place" if made else "the axis that it came in with"),
                    got=f"out_axes={show_value(out_axes)}",
                    made_at=naming.made_at(cell),
                    cure="`out_axes` is for modules that the function makes. Say the axis of others by `in_axes` or `states=`.",
                )
            if made:
                found[cell] = axis
    return dict.fromkeys(end.born, 0) | found


def _numbers_in(out_axes: Any) -> set[int]:
    """All axes that occur in `out_axes`."""
    entries = jax.tree.leaves(out_axes, is_leaf=_is_axis)
    every = [axis for entry in entries for axis in (entry.entries() if isinstance(entry, StateAxes) else [entry])]
    return {axis for axis in every if isinstance(axis, int)}


def _sort_by_axis(
    site: CallSite,
    end: RunResult,
    outside: dict[Any, Any],
    axes: Iterable[int],
    written: list[Any],
    tx: LaneTransaction,
    trace: Any,
) -> tuple[dict[int, list[Any]], list[Any]]:
    """The written values by the axis that they have outside, and those without one (refused if there is no `trace`)."""
    groups: dict[int, list[Any]] = {axis: [] for axis in axes}
    shared: list[Any] = []
    sown = site.sown(end)
    for cell, value in zip(end.cells, written, strict=True):
        axis = outside.get(cell)
        if axis is not None and (trace is not None or cell not in sown):
            groups[axis].append(value)
        elif (new := tx.outside(cell, value)) is not value:
            shared.append(new)
        elif trace is None:
            raise LaneError(
                f"state {site.describe(cell)} was written in a batch of items, which have no order",
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
            got=show_value(in_axes),
            cure="Give an axis for each positional argument; keyword arguments are mapped over axis 0.",
        )
    try:
        entries = broadcast(in_axes, args, _is_axis) + broadcast(0, kwargs, _is_axis)
    except ValueError as error:
        raise AxisError(
            "`in_axes` does not have the structure of the arguments",
            where=site.label,
            expected="an axis for each argument: an int, None, `mu.StateAxes`, or a tree of them like the argument",
            got=show_value(in_axes),
            cure="Choose axes of a module by filter: `mu.vmap(f, in_axes=(mu.StateAxes({mu.Param: None, ...: 0}), 0))`.",
        ) from error
    leaves = [axis for axis, item in entries if not is_node(item)]
    nodes = [(item, axis) for axis, item in entries if is_node(item)]
    return leaves, nodes


def _is_axis(x: Any) -> bool:
    return x is None or isinstance(x, int | StateAxes)


def _plain_axes(out_axes: Any) -> Any:
    """`out_axes` for JAX: nodes are not among its outputs, so the axes that were said for them do not matter."""
    return jax.tree.map(lambda axis: 0 if isinstance(axis, StateAxes) else axis, out_axes, is_leaf=_is_axis)


def _check_argument_axis(site: CallSite, name: str, leaf: Any, axis: Any) -> None:
    """Refuse what is no axis of an argument."""
    count = jnp.ndim(leaf)
    if not isinstance(axis, int):
        problem, expected = (
            "is asked for along what is not an axis of an array",
            "an int or None; of a Module, `mu.StateAxes` too",
        )
    elif not -count <= axis < count:
        problem = f"has no axis {axis}"
        expected = (
            f"an axis from {-count} to {count - 1}, or None" if count else "None, for a scalar is the same in all lanes"
        )
    else:
        return
    raise AxisError(
        f"argument `{name}` {problem}",
        path=name,
        where=site.label,
        expected=expected,
        got=f"axis {show_value(axis)} of {show_value(leaf)}",
        cure="Give each argument its own, and None to those that the lanes share: `mu.vmap(f, in_axes=(None, 0))`.",
    )


def _count(
    site: CallSite, leaf_axes: Sequence[Any], split: dict[Variable, int], values: Sequence[Any], axis_size: int | None
) -> int:
    """The number of lanes.

    Raises:
      AxisError: nothing is mapped, or states disagree about the number.
    """
    sizes: dict[int, str] = {} if axis_size is None else {axis_size: "axis_size"}
    names = leaf_names(site.function, site.args, site.kwargs)
    for axis, leaf, name in zip(leaf_axes, site.packed.leaves, names, strict=True):
        if axis is not None:
            _check_argument_axis(site, name, leaf, axis)
            sizes.setdefault(jnp.shape(leaf)[axis], name)
    for (cell, axis), value in zip(split.items(), values, strict=True):
        for leaf in jax.tree.leaves(value):
            sizes.setdefault(leaf.shape[axis], f"state {site.scope.locate(cell)}")
    if len(sizes) == 1:
        return next(iter(sizes))
    raise AxisError(
        "the mapped axes have different sizes" if sizes else "there is nothing to map over",
        where=site.label,
        got=", ".join(f"{name}: {size}" for size, name in sizes.items()) or None,
        cure="All mapped axes have one size; None shares an argument: `mu.vmap(f, in_axes=(0, None))`. With nothing to map, "
        "say how many lanes there are: `mu.vmap(f, in_axes=None, axis_size=8)`.",
    )
