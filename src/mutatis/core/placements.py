"""Placements: on which devices a value lives, how a state says where it should, and that a write keeps it there.

A state says it when it is made: by a `PartitionSpec`, by names of its axes, or by a whole `jax.sharding.Sharding`. Under a mesh
(`jax.set_mesh`) the value is put there, and further values follow the one that is there. Rules map names of axes to axes of the
mesh; they are an ambient value of `mutatis.sharding`, which declares here how to read it. An axis that a transform put in front
of a stacked state is not split.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mutatis import _compat
from mutatis.core import naming
from mutatis.core.cells import Deferred
from mutatis.core.nodes import is_node
from mutatis.errors import ShardingError

_read_rules: list[Callable[[], Mapping[str, Any]]] = []


def declare_rules(read: Callable[[], Mapping[str, Any]]) -> None:
    """Say how the rules that are in force are read."""
    _read_rules[:] = [read]


def current_mesh() -> Any:
    """The mesh that `jax.set_mesh` has set, without its devices where a program is traced; None if there is none."""
    trace = _compat.current_trace()
    if trace is _compat.EVAL_TRACE:
        mesh: Any = jax.sharding.get_mesh()
    elif _compat.staging_trace(trace) is not None or _is_manual(jax.sharding.get_abstract_mesh()):
        mesh = jax.sharding.get_abstract_mesh()
    else:  # a derivative or a `vmap` of what runs at once
        with _compat.at_trace(_compat.EVAL_TRACE):
            mesh = jax.sharding.get_mesh()
    return None if mesh.empty else mesh


def _is_manual(mesh: Any) -> bool:
    """Whether an axis of a mesh is that of a `shard_map` around."""
    return AxisType.Manual in (mesh.axis_types or ())


def declared(cell: Any, value: Any) -> Any:
    """The first value of a state, where the state says that it lives; where it is, without a mesh.

    Raises:
      ShardingError: the mesh has no such axis, or cannot split the value so.
    """
    return jax.tree.map(lambda leaf: _at_home(cell, leaf), value)


def _at_home(cell: Any, leaf: Any) -> Any:
    if _compat.is_per_lane(leaf):
        return leaf  # the whole of it, when the transform is over
    where = sharding_of(cell, leaf)
    return leaf if where is None else moved(leaf, where)


def sharding_of(cell: Any, leaf: Any) -> Any:
    """Where a state says that an array of its value lives; None if it says nothing, or there is no mesh.

    Args:
      cell: the state.
      leaf: the array, or its shape.

    Raises:
      ShardingError: the mesh has no such axis, or cannot split the array so.
    """
    said = cell.sharding
    if said is None or not hasattr(leaf, "shape"):
        return None
    mesh = current_mesh()
    spec = said
    if isinstance(said, NamedSharding):
        mesh, spec = said.mesh, said.spec
    elif isinstance(said, jax.sharding.Sharding):
        return said
    if mesh is None:
        return None
    if leaf.ndim == 0:
        return NamedSharding(mesh, PartitionSpec())  # a count beside arrays
    names = [*([spec] if isinstance(spec, str) else spec)]
    for axis, _ in sorted(cell._lanes):
        if axis <= len(names):
            names.insert(axis, None)
    return named(names, leaf.shape, mesh, cell, said)


def named(names: Sequence[Any], shape: Sequence[int], mesh: Any, cell: Any, said: Any) -> NamedSharding:
    """The sharding of an array whose axes have these names.

    Args:
      names: for each axis a name, a tuple of names, or None.
      shape: of the array.
      mesh: the mesh.
      cell: the state that holds it, for messages.
      said: what was said of it, for messages.

    Raises:
      ShardingError: the mesh has no such axis, or cannot split the array so.
    """
    rules = _read_rules[0]() if _read_rules else {}
    axes = [_axes(name, rules, mesh, cell, said) for name in names]
    if len(axes) > len(shape):
        raise _refused(
            "has fewer axes than its sharding",
            cell,
            expected=f"at least {len(axes)} axes, for {said!r}",
            got=f"shape {tuple(shape)}",
            cure="Name no more axes than there are; None is an axis that is not split.",
        )
    used = [axis for group in axes for axis in group]
    if len(set(used)) < len(used):
        raise _refused(
            "would be split twice along one axis of the mesh",
            cell,
            expected="each axis of the mesh at most once",
            got=f"{said!r}, which is {_spec(axes)}",
            cure="Map one of the names to None: `with mu.sharding.rules(embed=None): ...`.",
        )
    for size, group in zip(shape, axes, strict=False):
        parts = math.prod(mesh.shape[axis] for axis in group)
        if size % parts:
            raise _refused(
                f"cannot be split into {parts} equal parts",
                cell,
                expected=f"an axis that {parts} divides, for {_spec(axes)} on a mesh of {_sizes(mesh)}",
                got=f"shape {tuple(shape)}",
                cure="Make it a multiple, or leave that axis whole: `sharding=P(None, ...)`.",
            )
    return NamedSharding(mesh, _spec(axes))


def _axes(name: Any, rules: Mapping[str, Any], mesh: Any, cell: Any, said: Any) -> tuple[str, ...]:
    """The axes of the mesh that a name, or several, stand for."""
    if name is None or name is PartitionSpec.UNCONSTRAINED:
        return ()
    if isinstance(name, tuple | list):
        return tuple(axis for each in name for axis in _axes(each, rules, mesh, cell, said))
    if name in rules:
        wanted = rules[name]
        axes = () if wanted is None else (wanted,) if isinstance(wanted, str) else tuple(wanted)
    else:
        axes = (name,)
    for axis in axes:
        if axis not in mesh.axis_names:
            raise _refused(
                f"is to be split along `{axis}`, which is no axis of the mesh",
                cell,
                expected=f"an axis of the mesh ({_sizes(mesh)}) or a name that the rules map to one"
                + (f" ({', '.join(map(repr, rules))})" if rules else ""),
                got=f"{said!r}",
                cure=f'Say what it stands for: `with mu.sharding.rules({name}="{mesh.axis_names[0]}"): ...`, or None for '
                "an axis that is not split.",
            )
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return tuple(axis for axis in axes if kinds[axis] != AxisType.Manual)  # inside `shard_map` each device has its part


def _spec(axes: Sequence[tuple[str, ...]]) -> PartitionSpec:
    return PartitionSpec(*(None if not group else group[0] if len(group) == 1 else group for group in axes))


def _sizes(mesh: Any) -> str:
    return ", ".join(f"{name}: {size}" for name, size in mesh.shape.items())


def _refused(problem: str, cell: Any, *, expected: str, got: str, cure: str) -> ShardingError:
    known = not isinstance(cell, str)
    return ShardingError(
        f"state {naming.describe(cell) if known else f'`{cell}`'} {problem}",
        path=naming.path_of(cell) if known else cell,
        where=naming.where(),
        expected=expected,
        got=got,
        made_at=naming.made_at(cell) if known else None,
        cure=cure,
    )


def moved(leaf: Any, where: Any) -> Any:
    """An array, or its shape, in another place."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    if isinstance(leaf, jax.core.Tracer) or _compat.current_trace() is not _compat.EVAL_TRACE:
        return constrain_leaf(leaf, where)
    return leaf if _is_at(leaf, where) else put(leaf, where)


def put(leaf: jax.Array, where: Any) -> jax.Array:
    """An array in another place. If that spans processes, each of them puts the same array there, which is checked."""
    if where.is_fully_addressable or not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.device_put(leaf, where)
    numbers = jax.device_put(jax.random.key_data(leaf), where)  # which JAX does not do with keys
    return jax.random.wrap_key_data(numbers, impl=jax.random.key_impl(leaf))


def _is_at(leaf: Any, where: Any) -> bool:
    if not leaf.committed or leaf.sharding == where:
        return bool(leaf.committed)
    # On one device all are alike, and only the names differ: those are kept.
    return len(where.device_set) > 1 and bool(leaf.sharding.is_equivalent_to(where, leaf.ndim))


def constrain_leaf(leaf: Any, sharding: Any) -> Any:
    """A traced array, placed."""
    mesh = jax.sharding.get_abstract_mesh() if isinstance(sharding, PartitionSpec) else getattr(sharding, "mesh", None)
    if mesh is not None and any(kind == AxisType.Explicit for kind in mesh.axis_types):
        return jax.sharding.reshard(leaf, sharding)
    return jax.lax.with_sharding_constraint(leaf, sharding)


def kept(old: Any, new: Any) -> Any:
    """A value that is written to a state from outside of transforms, where the one before it is.

    An array that is spread over other devices than the old one stays there. So does one that is split where the old one was whole
    on each device, and one that was put on a device by hand where the old one is on one device, too.
    """
    if type(old) is Deferred:  # the first value: see `declared`
        return new
    before, after = jax.tree.leaves(old), jax.tree.leaves(new)
    if not all(isinstance(leaf, jax.Array) for leaf in [*before, *after]):
        return new
    if len(before) == len(after):
        wheres = [_follow(a, b) for a, b in zip(before, after, strict=True)]
        if any(where is not None for where in wheres):
            pairs = zip(after, wheres, strict=True)
            placed = [leaf if where is None else moved(leaf, where) for leaf, where in pairs]
            return jax.tree.unflatten(jax.tree.structure(new), placed)
    return new


def _follow(old: jax.Array, new: jax.Array) -> Any:
    """Where a new array goes that takes the place of an old one; None if it stays."""
    if not old.committed or isinstance(new, jax.core.Tracer) or isinstance(old, jax.core.Tracer):
        return None
    if not _is_spread(old):
        return None if new.committed else old.sharding
    if _is_spread(new) and (old.sharding.is_fully_replicated or new.sharding.device_set != old.sharding.device_set):
        return None
    where = old.sharding
    if isinstance(where, NamedSharding) and not _divides(where, new.shape):
        where = NamedSharding(where.mesh, PartitionSpec())
    return None if _is_at(new, where) else where


def _is_spread(array: jax.Array) -> bool:
    return len(array.sharding.device_set) > 1


def _divides(where: NamedSharding, shape: Sequence[int]) -> bool:
    if len(where.spec) > len(shape):
        return False
    groups = [(group,) if isinstance(group, str) else group or () for group in where.spec]
    sizes = [math.prod(where.mesh.shape[axis] for axis in group) for group in groups]
    return all(size % parts == 0 for size, parts in zip(shape, sizes, strict=False))


def like(cell: Any, now: Any, value: Any) -> Any:
    """A value of a state's own shape, such as its moment, where the state is.

    Args:
      cell: the state.
      now: its committed value; it is where this is, or where it says that it lives.
      value: the other value.
    """
    leaves = [leaf for leaf in jax.tree.leaves(now, is_leaf=is_node) if isinstance(leaf, jax.Array)]
    spread = [leaf.sharding for leaf in leaves if not isinstance(leaf, jax.core.Tracer) and _is_spread(leaf)]
    if not spread:
        return declared(cell, value) if cell.sharding is not None else value
    return jax.tree.map(lambda leaf: moved(leaf, spread[0]) if leaf.ndim else leaf, value)


def mesh_of(placements: Sequence[tuple[Any, ...] | None]) -> Any:
    """The mesh over which states are spread, if it is one; of what `avals.placement` gives for each."""
    spread = {sharding for each in placements if each is not None for sharding in each}
    meshes = {sharding.mesh for sharding in spread if isinstance(sharding, NamedSharding)}
    return meshes.pop() if len(meshes) == 1 and len({frozenset(s.device_set) for s in spread}) == 1 else None


def replicated(value: Any, mesh: Any) -> Any:
    """A value on all devices of a mesh, if nobody has said where it is to be; else None."""
    leaves = jax.tree.leaves(value)
    if not leaves or not all(isinstance(leaf, jax.Array) and not leaf.committed for leaf in leaves):
        return None
    where = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: put(leaf, where), value)
