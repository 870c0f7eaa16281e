"""A table of the states of a model by kind: how many there are, their elements and their bytes.

The table is data; as text it is aligned columns, and `rich` shows it as a table of its own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from mutatis.core.showing import show_bytes, show_count
from mutatis.inspect.tables import Table
from mutatis.model.tally import tally
from mutatis.model.walks import variables


@dataclasses.dataclass(frozen=True)
class Row:
    """The states of one kind, a row of `mu.inspect.state_table`.

    Attributes:
      kind: the name of the kind.
      states: the number of states; a shared one counts once.
      elements: the number of elements of their arrays; a random key is one.
      bytes: the size of their arrays in bytes.
    """

    kind: str
    states: int = 0
    elements: int = 0
    bytes: int = 0

    def __add__(self, other: Row) -> Row:
        return Row(self.kind, self.states + other.states, self.elements + other.elements, self.bytes + other.bytes)


@dataclasses.dataclass(frozen=True, repr=False)
class StateTable(Table):
    """The states of a model by kind, as `mu.inspect.state_table` returns them.

    `print` shows it as text, `rich.print` as a table.

    Attributes:
      rows: one row for each kind, with `kind`, `states`, `elements` and `bytes`.
    """

    rows: tuple[Row, ...]
    header = ("kind", "states", "elements", "size")
    left = ("kind",)

    def title(self) -> str:
        """Return the line that stands above the table in a notebook."""
        return f"{show_count(self.total.states, 'state')}, {show_bytes(self.total.bytes)}"

    @property
    def total(self) -> Row:
        """The sum of all rows."""
        return sum(self.rows, Row("total"))

    def cells(self) -> list[tuple[str, ...]]:
        """Return the text of each row."""
        return [*map(_cells, self.rows)]

    def footer(self) -> tuple[str, ...]:
        """Return the text of the sums."""
        return _cells(self.total)


def _cells(row: Row) -> tuple[str, ...]:
    return row.kind, f"{row.states:,}", f"{row.elements:,}", show_bytes(row.bytes)


def state_table(node: Any) -> StateTable:
    """Make a table of the states of a model by kind: how many there are, their elements and their size.

    It reads sizes only: nothing is computed. A state that has not been created yet counts without elements.

    Args:
      node: a Module, a Variable, or a list, tuple or dict of them.

    Returns:
      A `StateTable`. `print` shows it, and `rows` and `total` have the numbers.

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
        kind, found = type(cell).__name__, tally([cell])
        rows[kind] = rows.get(kind, Row(kind)) + Row(kind, 1, found.numbers, found.bytes)
    return StateTable(tuple(rows.values()))
