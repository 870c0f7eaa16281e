"""State on devices: the places of states, given by axis names and rules, and how to move a model.

A state gets its place when it is made, by ``mu.Param(x, sharding=P("data", None))`` or ``sharding=("embed", "mlp")``. Under a
mesh, ``with jax.set_mesh(mesh): ...``, its array is put there: in ordinary Python, and in `mu.jit`, where it is made in parts.
Moments of an optimizer are placed as their parameters, and every write keeps a state in its place. A state without a `sharding`
goes to all devices of the mesh at the first compiled call that uses it.

Example:
  >>> import jax, jax.numpy as jnp, mutatis as mu
  >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  >>> with jax.set_mesh(mesh), mu.sharding.rules(embed="data", mlp=None):
  ...     w = mu.Param(jnp.ones((8, 2)), sharding=("embed", "mlp"))
  >>> mu.sharding.of({"w": w})["w"].spec
  P('data', None)
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
from jax.sharding import NamedSharding, PartitionSpec

from mutatis import _homes
from mutatis.core import access, naming, placements
from mutatis.core.cells import UNSET, Deferred
from mutatis.core.naming import show_path
from mutatis.core.showing import show_class, show_value
from mutatis.errors import ArgumentError, FilterError, ShardingError
from mutatis.model.contexts import Context
from mutatis.model.filters import FilterLike, Path, as_filter
from mutatis.model.state import State
from mutatis.model.variables import Variable
from mutatis.model.walks import check_node, variables
from mutatis.tracing.axes import Shared, StateSharding

__all__ = ["of", "place", "rules"]

T = TypeVar("T")

_rules = Context("sharding rules", ())


@contextlib.contextmanager
def rules(given: Mapping[str, Any] | None = None, /, **more: Any) -> Iterator[None]:
    """Define names for the axes of arrays, inside a ``with`` block: each name stands for an axis of the mesh, several axes, or
    none.

    A state that is made with ``sharding=("embed", "mlp")`` is then split along the axes of the mesh that these names stand for.
    Blocks may be nested; the innermost block that has a name counts. A name without a rule is an axis of the mesh itself. A
    jitted function compiles another program under other rules.

    Args:
      given: a dictionary of rules, for names that are not Python identifiers.
      **more: for each name an axis of the mesh (a string), a tuple of axes, or None for an axis that is not split.

    Raises:
      ArgumentError: a name stands for something else.

    Example:
      >>> import jax, jax.numpy as jnp, mutatis as mu
      >>> mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
      >>> with jax.set_mesh(mesh), mu.sharding.rules(embed=("data", "model"), mlp=None):
      ...     w = mu.Param(jnp.ones((8, 2)), sharding=("embed", "mlp"))
      >>> w.value.sharding.spec
      P(('data', 'model'), None)
    """
    new: dict[Any, Any] = {**(given or {}), **more}
    for name, axes in new.items():
        several = axes if isinstance(axes, tuple | list) else (axes,)
        if not isinstance(name, str) or not (axes is None or all(isinstance(axis, str) for axis in several)):
            raise ArgumentError(
                f"the name {show_value(name)} of an axis cannot stand for {show_value(axes)}",
                path=str(name),
                expected="an axis of the mesh, a tuple of some, or None",
                got=show_class(axes),
                cure='`with mu.sharding.rules(embed="data", mlp=("model",), batch=None): ...`',
            )
    plain = {name: tuple(axes) if isinstance(axes, list) else axes for name, axes in new.items()}
    with _rules.set(tuple(sorted({**dict(_rules.get()), **plain}.items()))):
        yield


placements.declare_rules(lambda: dict(_rules.get()))


def of(node: Any, *filters: FilterLike) -> State:
    """Read where the states of a model are: the sharding of each array, by path.

    Args:
      node: a Module, a Variable, or a list, tuple or dict of them, also of shapes (`mu.eval_shape`).
      *filters: which states; all, if none is given.

    Returns:
      A `State` with a `jax.sharding.Sharding` in place of each array, which `mu.jit`, `jax.device_put` and Orbax accept. For a
      shape it is the sharding that the state was made with, or None.

    Example:
      >>> import jax, jax.numpy as jnp, mutatis as mu
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> with jax.set_mesh(mesh):
      ...     w = mu.Param(jnp.ones((8, 2)), sharding=P("data", None))
      >>> mu.sharding.of({"w": w})["w"].spec
      P('data', None)
    """
    cells = variables(node, *filters)
    found = {}
    for path, cell in cells.items():
        value = access.peek(cell)
        waits = value is UNSET or type(value) is Deferred
        found[path] = None if waits else jax.tree.map(lambda leaf, cell=cell: _where(cell, leaf), value)
    return State(found, {path: type(cell) for path, cell in cells.items()})


def _where(cell: Variable, leaf: Any) -> Any:
    if isinstance(leaf, jax.core.Tracer):
        return placements.sharding_of(cell, leaf)
    known = getattr(leaf, "sharding", None)
    return placements.sharding_of(cell, leaf) if known is None else known


def place(node: T, specs: Any = None, *, mesh: Any = None) -> T:
    """Move the states of a model to devices, as partition specs say. The values stay the same, and frozen states stay frozen.

    Args:
      node: a Module, a Variable, or a list, tuple or dict of them. In a model of shapes (`mu.eval_shape`) it records the places,
        and `mu.checkpoint.restore` then puts the arrays there.
      specs: the place of each state. One for all states: a `PartitionSpec`, a tuple of names, a `Sharding` or a device. Or a
        dictionary of these by path (``{"layers[*].kernel": P("data")}``, where ``*`` stands for anything) or by filter
        (``{mu.Param: P("data"), ...: P()}``), of which the first key that fits counts. Or a `mu.StateSharding`, or a `State` of
        shardings as `mu.sharding.of` returns it. States that it does not mention stay in place. None uses the `sharding` that
        each state was made with.
      mesh: the mesh of devices. The default is the mesh of `jax.set_mesh`.

    Returns:
      The node itself.

    Raises:
      ShardingError: there is no mesh, the mesh has no such axis, it cannot split a state so, or the call is inside a transform.
        Then nothing has moved.
      FilterError: a path or filter selects no state.

    Example:
      >>> import jax, mutatis as mu
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> net = mu.sharding.place(mu.nn.Linear(8, 2, rngs=mu.Rngs(0)), {"kernel": P("data"), ...: P()}, mesh=mesh)
      >>> net.kernel.value.sharding.spec
      P('data',)
    """
    if not access.is_outside():
        raise ShardingError(
            "a model was placed inside a transform or transaction",
            where=naming.where(),
            cure="Place it before the call; inside, `jax.lax.with_sharding_constraint` says where a value is.",
        )
    cells = variables(check_node(node))
    specs = _as_sharding(specs)
    if isinstance(specs, Mapping) and not isinstance(specs, State):
        specs = {key: _as_sharding(said) for key, said in specs.items()}
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        if specs is not None and mesh is None and placements.current_mesh() is None and not _is_whole(specs):
            raise ShardingError(
                "there is no mesh to place a model on",
                expected="a mesh, set or given",
                cure='`with jax.set_mesh(jax.make_mesh((8,), ("data",))): ...`, or `mu.sharding.place(model, specs, mesh=mesh)`.',
            )
        moves = [(cell, _moved(path, cell, said)) for path, cell, said in _said(cells, specs)]
    access.move([cell for cell, _ in moves], [value for _, value in moves])
    return node


def _as_sharding(said: Any) -> Any:
    """What is said of states, with a sharding in the place of a device."""
    return jax.sharding.SingleDeviceSharding(said) if isinstance(said, jax.Device) else said


def _is_whole(specs: Any) -> bool:
    """Whether shardings with meshes of their own are given."""
    parts = [*specs.values()] if isinstance(specs, Mapping) else [specs]
    return all(part is None or isinstance(part, jax.sharding.Sharding) for part in parts)


def _said(cells: dict[Path, Variable], specs: Any) -> Iterator[tuple[Path, Variable, Any]]:
    """The states of which something is said, each with that."""
    if isinstance(specs, State):
        unknown = [show_path(path) for path in specs if path not in cells]
        if unknown:
            raise FilterError(
                f"there is no state {', '.join(f'`{path}`' for path in unknown)}",
                cure="`mu.sharding.of(model)` has the paths of the model's states.",
            )
        yield from ((path, cells[path], said) for path, said in specs.items() if said is not None)
        return
    if isinstance(specs, StateSharding):
        specs = _by_filter(specs)
    elif isinstance(specs, Mapping):
        specs = _by_rule(specs, cells)
    for path, cell in cells.items():
        said = specs(path, cell) if callable(specs) else cell.sharding if specs is None else specs
        if said is not None:
            yield path, cell, said


def _by_filter(specs: StateSharding) -> Callable[[Path, Variable], Any]:
    return lambda path, cell: None if (said := specs.of(path, cell)) is Shared else said


def _by_rule(specs: Mapping[Any, Any], cells: dict[Path, Variable]) -> Callable[[Path, Variable], Any]:
    """What rules say of a state; a text is a path."""
    tests = [(_path_filter(key) if isinstance(key, str) else as_filter(key), said) for key, said in specs.items()]
    for key, (selects, _) in zip(specs, tests, strict=True):
        if key is not ... and not any(selects(path, cell) for path, cell in cells.items()):
            near = difflib.get_close_matches(str(key), map(show_path, cells), 1, 0.0) if isinstance(key, str) else []
            raise FilterError(
                f"the rule for {show_value(key)} selects no state",
                expected="the path of a state, with `*` for anything, or a filter that selects some",
                got=show_value(key) + (f" (nearest: {near[0]})" if near else ""),
                cure="`mu.variables(model)` lists the states by path.",
            )
    return lambda path, cell: next((said for selects, said in tests if selects(path, cell)), None)


def _path_filter(text: str) -> Callable[[Path, Any], bool]:
    pattern = re.compile(re.escape(text).replace(r"\*", ".*"))
    return lambda path, _: pattern.fullmatch(show_path(path)) is not None


def _moved(path: Path, cell: Variable, said: Any) -> Any:
    """The value of a state, moved to where it is said."""
    value = access.load(cell)
    if value is UNSET or type(value) is Deferred:
        return value
    if isinstance(said, Mapping | list):  # of a state that holds several arrays, as `of` gives it
        return jax.tree.map(placements.moved, value, said)
    name = naming.path_of(cell) or show_path(path) or cell.name or type(cell).__name__
    return jax.tree.map(lambda leaf: placements.moved(leaf, _resolved(name, leaf, said, cell)), value)


def _resolved(name: str, leaf: Any, said: Any, cell: Variable) -> Any:
    if said is cell.sharding:
        where = placements.sharding_of(cell, leaf)
        if where is None:
            raise ShardingError(
                "there is no mesh to place a model on",
                path=name,
                expected="a mesh, set or given",
                cure='`with jax.set_mesh(jax.make_mesh((8,), ("data",))): ...`, or `mu.sharding.place(model, mesh=mesh)`.',
            )
        return where
    if isinstance(said, jax.sharding.Sharding) and not isinstance(said, NamedSharding):
        return said
    mesh, spec = (said.mesh, said.spec) if isinstance(said, NamedSharding) else (placements.current_mesh(), said)
    if not isinstance(spec, PartitionSpec | tuple | list | str):
        raise ArgumentError(
            f"a state cannot be placed by {show_value(said)}",
            path=name,
            expected="a PartitionSpec, a tuple of names, or a Sharding",
            got=show_class(said),
            cure='`mu.sharding.place(model, {mu.Param: P("data"), ...: P()})`',
        )
    if leaf.ndim == 0:
        return NamedSharding(mesh, PartitionSpec())
    return placements.named([spec] if isinstance(spec, str) else [*spec], leaf.shape, mesh, name, said)


_homes.publish(__name__, {name: globals()[name] for name in __all__})
