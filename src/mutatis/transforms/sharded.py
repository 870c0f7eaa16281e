"""`mu.shard_map`: run a stateful function on each device, over its part of the data and of the states."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, ParamSpec, TypeVar, overload

import jax
from jax.sharding import PartitionSpec

from mutatis import _compat
from mutatis.core import naming
from mutatis.core.nodes import is_node
from mutatis.core.showing import show_value
from mutatis.core.transactions import Transaction
from mutatis.errors import ArgumentError, LaneError
from mutatis.model.kinds import RngState
from mutatis.model.variables import Variable, spelled
from mutatis.tracing.arguments import broadcast
from mutatis.tracing.axes import Shared, StateSharding, axes_by_cell, named
from mutatis.tracing.call_site import CallSite, RunResult
from mutatis.tracing.lanes import LaneTransaction, unite
from mutatis.tracing.staging import refuse_structure
from mutatis.tracing.transformed import ForPartial, Transformed

_REPLICATED = PartitionSpec()
_INFER = inspect.signature(jax.shard_map).parameters["in_specs"].default

P = ParamSpec("P")
R = TypeVar("R")


@overload
def shard_map(f: ForPartial, /, *, out_specs: Any) -> Any: ...
@overload
def shard_map(
    f: Transformed[P, R],
    /,
    *,
    out_specs: Any,
    in_specs: Any = ...,
    mesh: Any = ...,
    axis_names: AbstractSet[Any] = ...,
    check_vma: bool = ...,
    states: Any = ...,
) -> Transformed[P, R]: ...
@overload
def shard_map(
    f: Callable[P, R],
    /,
    *,
    out_specs: Any,
    in_specs: Any = ...,
    mesh: Any = ...,
    axis_names: AbstractSet[Any] = ...,
    check_vma: bool = ...,
    states: Any = ...,
) -> Transformed[P, R]: ...
@overload
def shard_map(
    f: None = None,
    /,
    *,
    out_specs: Any,
    in_specs: Any = ...,
    mesh: Any = ...,
    axis_names: AbstractSet[Any] = ...,
    check_vma: bool = ...,
    states: Any = ...,
) -> Callable[[Callable[P, R]], Transformed[P, R]]: ...
def shard_map(
    f: Callable[..., Any] | None = None,
    /,
    *,
    out_specs: Any,
    in_specs: Any = _INFER,
    mesh: Any = None,
    axis_names: AbstractSet[Any] = frozenset(),
    check_vma: bool = True,
    states: Any = None,
) -> Any:
    """Run a function on each device of a mesh, over its part of the data; as `jax.shard_map`, with states.

    Each state is either replicated, so that each device has the whole of it, or split by a spec, so that each device sees its
    part. A value that `f` writes to a state has to be the same on all devices along the mesh axes that the spec of the state does
    not name; reduce it first, for instance with `jax.lax.pmean`.

    From a replicated random stream each device draws numbers of its own: they depend on the key of the stream, its count and the
    number of the device. Afterwards the count of the stream is one higher, if it was used.

    Args:
      f: the function, bound method, partial or callable Module; its arguments are given by position. Without `f`, the result is a
        decorator.
      out_specs: a `jax.sharding.PartitionSpec` for each result, which says how the parts are put together, as in `jax.shard_map`.
      in_specs: a `jax.sharding.PartitionSpec` for each argument, which says how it is split, as in `jax.shard_map`. The spec of a
        Module holds for all its states; a `mu.StateSharding` gives a spec for each filter. Without `in_specs`, arguments and
        states are split as they are placed, on a mesh of explicit axes.
      mesh: the mesh of devices, as in `jax.shard_map`. The default is the mesh of `jax.set_mesh`.
      axis_names: the axes of the mesh that are split by hand, as in `jax.shard_map`. The default is all of them.
      check_vma: whether JAX checks that results without an axis are equal along it, as in `jax.shard_map`. Without the check, a
        replicated state may be written with another value on each device, and holds the one of the first.
      states: the specs of states that the function uses from outside: a `mu.StateSharding` for all of them, or pairs of a node
        and its spec or StateSharding. States without a spec are split as they are placed on explicit axes, and else replicated.

    Returns:
      A function of whole arrays that returns whole arrays.

    Raises:
      LaneError: a value that differs from device to device is written to a state that is replicated along that axis.
      AxisError: two different specs are given for one state.
      StructureError: the function makes states or changes attributes or containers.
      ArgumentError: the function is called with keyword arguments, or a sharding is given in place of a spec.

    Example:
      >>> import jax, jax.numpy as jnp, mutatis as mu
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> total = mu.Variable(0.0)
      >>> @mu.shard_map(mesh=mesh, in_specs=P("data"), out_specs=P("data"))
      ... def double(x):
      ...     total.value += jax.lax.psum(jnp.sum(x), "data")  # the same on all devices
      ...     return 2 * x
      >>> double(jnp.arange(4.0)), float(total)
      (Array([0., 2., 4., 6.], dtype=float32), 6.0)
    """
    options = {k: v for k, v in locals().items() if k != "f"}
    remake: functools.partial[Any] = functools.partial(shard_map, **options)
    if f is None:
        return remake
    return Transformed(f, remake, lambda function, args, kwargs: _shard(function, args, kwargs, **options))


def _shard(
    function: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    in_specs: Any,
    out_specs: Any,
    states: Any,
    **options: Any,
) -> Any:
    others = [("states", [node for node, _ in named(states, "shard_map", StateSharding)])]
    with CallSite("shard_map", function, args, others=others) as site:
        if kwargs:
            raise ArgumentError(
                "there are keyword arguments",
                where=site.label,
                expected="arguments by position: `in_specs` has a spec for each",
                got=", ".join(kwargs),
                cure="Pass them by position.",
            )
        inferred = in_specs is _INFER
        entries = [] if inferred else broadcast(in_specs, args, _is_spec)
        leaf_specs = [spec for spec, item in entries if not is_node(item)]
        if inferred:
            leaf_specs = list(map(_own_spec, site.packed.leaves))
        given = axes_by_cell(site, [(item, spec) for spec, item in entries if is_node(item)], states, StateSharding)
        for cell, spec in given.items():
            if isinstance(spec, jax.sharding.Sharding):
                raise ArgumentError(
                    f"state {site.describe(cell)} is given a sharding, where the spec alone is wanted",
                    path=site.scope.locate(cell),
                    where=site.label,
                    expected="a PartitionSpec, None or `mu.Shared`",
                    got=show_value(spec),
                    cure='`mu.StateSharding({mu.Param: P("model"), ...: P()})`; the mesh is that of the `shard_map`.',
                )
        cells = site.scope.cells
        values = site.values(cells)
        specs = [_spec_of(value, given.get(cell)) for cell, value in zip(cells, values, strict=True)]
        alike = {cell for cell in cells if given.get(cell) is Shared}
        groups = list(dict.fromkeys([*specs, _REPLICATED]))
        by_cell = dict(zip(cells, specs, strict=True))
        streams = {c for c in cells if isinstance(c, RngState) and by_cell[c] == _REPLICATED}
        before = set(jax.sharding.get_abstract_mesh().manual_axes)  # of a `shard_map` around this one

        def pure(values: list[Any], leaves: list[Any]) -> Any:
            inputs = dict(zip(cells, values, strict=True))
            mapped = tuple(a for a in jax.sharding.get_abstract_mesh().manual_axes if a not in before)
            opened: list[LaneTransaction] = []

            def make(*positional: Any, **settings: Any) -> Transaction:
                own = {cell: inputs[cell] for cell in streams}
                opened.append(
                    LaneTransaction(*positional, lane=jax.lax.axis_index(mapped), alike=alike, given=own, **settings)
                )
                return opened[0]

            overlay = {cell: value for cell, value in inputs.items() if cell not in streams}
            site.end, out, written = site.run(overlay, leaves, make=make)
            opened[0].disown(site.end.born)
            site.let_go(site.end)
            refuse_structure(site, site.end, "what each device runs")
            written = [value for cell, value in zip(site.end.cells, written, strict=True) if cell not in site.end.born]
            site.end.cells = [cell for cell in site.end.cells if cell not in site.end.born]
            result = site.end.unflatten(out, [None] * len(site.end.nodes))
            return result, _sort_by_spec(site, site.end, written, by_cell, groups, mapped, opened[0])

        out, new = jax.shard_map(
            pure,
            in_specs=(specs, leaf_specs),
            out_specs=(out_specs, groups),
            **options,
        )(values, site.packed.leaves)
        left = [iter(values) for values in new]
        ordered = [next(left[groups.index(by_cell.get(cell, _REPLICATED))]) for cell in site.end.cells]
        return site.commit(site.end, ordered, jax.tree.leaves(out))


def _is_spec(x: Any) -> bool:
    return x is None or isinstance(x, PartitionSpec | StateSharding)


def _spec_of(value: Any, given: Any) -> PartitionSpec:
    """The spec of a state: what was said, else what is part of its type."""
    if isinstance(given, PartitionSpec):
        return given
    specs = {_own_spec(leaf) for leaf in jax.tree.leaves(value)}
    return specs.pop() if len(specs) == 1 else _REPLICATED


def _own_spec(leaf: Any) -> PartitionSpec:
    """How an array is split by its type, over the axes of an explicit mesh."""
    spec = tuple(jax.typeof(leaf).sharding.spec)
    return PartitionSpec(*spec) if any(axis is not None for axis in spec) else _REPLICATED


def _sort_by_spec(
    site: CallSite,
    end: RunResult,
    written: Sequence[Any],
    specs: dict[Variable, PartitionSpec],
    groups: list[PartitionSpec],
    mapped: tuple[Any, ...],
    tx: LaneTransaction,
) -> list[list[Any]]:
    """The written values by the spec that they have outside."""
    sorted_values: list[list[Any]] = [[] for _ in groups]
    for cell, value in zip(end.cells, written, strict=True):
        spec = specs.get(cell, _REPLICATED)
        new = tx.outside(cell, value)
        along = {
            axis for entry in spec if entry is not None for axis in (entry if isinstance(entry, tuple) else (entry,))
        }
        for leaf in jax.tree.leaves(new):
            if differs := (_compat.varying_axes(leaf) & set(mapped)) - along:
                raise LaneError(
                    f"state {site.describe(cell)} was given a value "
                    f"that differs from device to device along {', '.join(map(repr, sorted(differs)))}",
                    path=site.scope.locate(cell),
                    where=site.label,
                    expected=f"the same value on all devices that share it, as its spec is {spec}",
                    got=f"a value that varies along {sorted(differs)}",
                    made_at=naming.made_at(cell),
                    cure=unite(
                        cell,
                        f"mu.StateSharding({{{spelled(type(cell))}: P({sorted(differs)[0]!r}), ...: P()}})",
                        repr(sorted(differs)[0]),
                    ),
                )
        sorted_values[groups.index(spec)].append(new)
    tx.forget()
    return sorted_values
