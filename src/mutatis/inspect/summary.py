"""A table of the states of a model by kind: how many there are, their elements and their bytes.

The table is data; as text it is aligned columns, and `rich` shows it as a table of its own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from mutatis.core import access
from mutatis.inspect.tables import Table, show_bytes
from mutatis.model.walks import variables


@dataclasses.dataclass(frozen=True)
class Row:
    """The states of one kind.

    Attributes:
      kind: the name of the kind.
      states: how many there are; shared ones count once.
      elements: the elements of their arrays; a random key is one.
      bytes: the size of their arrays.
    """

    kind: str
    states: int = 0
    elements: int = 0
    bytes: int = 0

    def __add__(self, other: Row) -> Row:
        return Row(self.kind, self.states + other.states, self.elements + other.elements, self.bytes + other.bytes)


@dataclasses.dataclass(frozen=True)
class StateTable(Table):
    """States by kind; `print` shows it as text, `rich.print` as a table."""

    rows: tuple[Row, ...]
    header = ("kind", "states", "elements", "size")
    left = ("kind",)

    @property
    def total(self) -> Row:
        """The sum of all rows."""
        return sum(self.rows, Row("total"))

    def cells(self) -> list[tuple[str, ...]]:
        """The text of each row."""
        return [*map(_cells, self.rows)]

    def footer(self) -> tuple[str, ...]:
        """The text of the sums."""
        return _cells(self.total)


def _cells(row: Row) -> tuple[str, ...]:
    return row.kind, f"{row.states:,}", f"{row.elements:,}", show_bytes(row.bytes)


def state_table(node: Any) -> StateTable:
    """The states of a node by kind, in the order of their paths.

    Reads sizes only: nothing is computed, and a state that has not been created yet counts without elements.

    Args:
      node: a Module, a Variable, or a list, tuple or dict of them.

    Example:
      >>> import mutatis as mu
      >>> print(mu.inspect.state_table(mu.nn.BatchNorm(64)))
      kind       states  elements    size
      Param           2       128   512 B
      BatchStat       2       128   512 B
      total           4       256  1.0 kB
    """
    rows: dict[str, Row] = {}
    for cell in variables(node).values():
        leaves = jax.tree.leaves(access.load(cell))
        kind = type(cell).__name__
        one = Row(kind, 1, sum(leaf.size for leaf in leaves), sum(leaf.size * leaf.dtype.itemsize for leaf in leaves))
        rows[kind] = rows.get(kind, Row(kind)) + one
    return StateTable(tuple(rows.values()))
