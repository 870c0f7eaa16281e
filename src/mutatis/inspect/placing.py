"""A table of where the states of a model live, and a picture of one array."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from mutatis.core import access
from mutatis.core.avals import show_type
from mutatis.core.naming import show_path
from mutatis.core.showing import show_bytes, show_count
from mutatis.errors import FilterError
from mutatis.inspect.tables import Table
from mutatis.model.filters import FilterLike, Path
from mutatis.model.variables import Variable
from mutatis.model.walks import variables
from mutatis.sharding import of


@dataclasses.dataclass(frozen=True)
class Placed:
    """The place of one state, a row of `mu.inspect.placements`.

    Attributes:
      path: the path of the state in the model.
      kind: the name of its kind.
      type: the shapes and dtypes of its value.
      placement: the partition spec with the mesh, or the device, as text.
      bytes: the size of its arrays in bytes.
      per_device: the size of the part that one device holds in bytes.
    """

    path: str
    kind: str
    type: str
    placement: str
    bytes: int
    per_device: int


@dataclasses.dataclass(frozen=True, repr=False)
class PlacementTable(Table):
    """The places of the states of a model, as `mu.inspect.placements` returns them.

    `print` shows it as text, `rich.print` as a table.

    Attributes:
      rows: one row for each state, in the order of their paths.
      states: a dictionary from paths to the states.
    """

    rows: tuple[Placed, ...]
    states: dict[Path, Variable] = dataclasses.field(repr=False, compare=False)
    header = ("state", "kind", "type", "placement", "size", "per device")
    left = ("state", "kind", "type", "placement")

    def title(self) -> str:
        """Return the line that stands above the table in a notebook."""
        return f"{show_count(len(self.rows), 'state')}, {show_bytes(sum(row.bytes for row in self.rows))}"

    def cells(self) -> list[tuple[str, ...]]:
        """Return the text of each row."""
        return [
            (row.path, row.kind, row.type, row.placement, show_bytes(row.bytes), show_bytes(row.per_device))
            for row in self.rows
        ]

    def footer(self) -> tuple[str, ...]:
        """Return the text of the sums."""
        sums = (show_bytes(sum(row.bytes for row in self.rows)), show_bytes(sum(row.per_device for row in self.rows)))
        return ("total", "", "", "", *sums)

    def picture(self, path: str) -> None:
        """Draw which device holds which part of a state of one or two axes, with `jax.debug.visualize_array_sharding`.

        Args:
          path: the path of the state, as the table shows it.

        Raises:
          FilterError: there is no such state, or it is not an array of one or two axes.
        """
        value = next((access.load(cell) for at, cell in self.states.items() if show_path(at) == path), None)
        if not isinstance(value, jax.Array) or value.ndim not in (1, 2):
            raise FilterError(
                f"`{path}` cannot be drawn",
                path=path,
                expected="the path of a state that holds an array of one or two axes",
                got="no such state" if value is None else show_type(value),
                cure="`print(mu.inspect.placements(model))` lists the states by path.",
            )
        jax.debug.visualize_array_sharding(value)


def placements(node: Any, *filters: FilterLike) -> PlacementTable:
    """Make a table of the devices on which the states of a model are, with one row for each state.

    Args:
      node: a Module, a Variable, or a list, tuple or dict of them, also of shapes (`mu.eval_shape`).
      *filters: which states; all, if none is given.

    Returns:
      A `PlacementTable`. `print` shows it, and ``picture(path)`` draws one array.

    Example:
      >>> import jax, mutatis as mu
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> net = mu.sharding.place(mu.nn.Linear(8, 2, rngs=mu.Rngs(0)), {"kernel": P("data"), ...: P()}, mesh=mesh)
      >>> print(mu.inspect.placements(net))
      state   kind   type          placement              size  per device
      bias    Param  float32[2]    P() of data: 1          8 B         8 B
      kernel  Param  float32[8,2]  P('data',) of data: 1  64 B        64 B
      total                                               72 B        72 B
    """
    cells = variables(node, *filters)
    where = of(node, *filters)
    rows = []
    for path, cell in cells.items():
        value = access.peek(cell)
        leaves, places = jax.tree.leaves(value), jax.tree.leaves(where[path], is_leaf=lambda x: x is None)
        sizes = [_bytes(leaf.shape, leaf) for leaf in leaves]
        parts = [
            _bytes(leaf.shape if place is None else place.shard_shape(leaf.shape), leaf)
            for leaf, place in zip(leaves, places, strict=False)
        ]
        shown = ", ".join(dict.fromkeys(map(_show, places)))
        rows.append(Placed(show_path(path), type(cell).__name__, show_type(value), shown, sum(sizes), sum(parts)))
    return PlacementTable(tuple(rows), cells)


def _bytes(shape: Any, leaf: Any) -> int:
    return int(math.prod(shape) * leaf.dtype.itemsize)


def _show(place: Any) -> str:
    if place is None:
        return "not said"
    if isinstance(place, jax.sharding.NamedSharding):
        return f"{place.spec} of {', '.join(f'{name}: {size}' for name, size in place.mesh.shape.items())}"
    devices = [*place.device_set]
    return str(devices[0]) if len(devices) == 1 else str(place)
