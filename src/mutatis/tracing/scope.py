"""Scope: everything that the arguments and captures of a call lead to, with the paths by which messages name it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mutatis.core.cells import Cell
from mutatis.core.naming import show_path
from mutatis.core.structure import structure_lock
from mutatis.model.graph import Encoder
from mutatis.model.modules import Module
from mutatis.model.variables import Variable


class Scope:
    """Everything that some roots lead to: cells with their paths, modules, containers.

    Args:
      roots: nodes with their names.
      watch: whether it is for a program: later changes are counted, and `specs` and `tail` describe the structure.
    """

    def __init__(self, roots: Sequence[tuple[str, Any]], *, watch: bool = False) -> None:
        self.encoder = Encoder(thread=True, watch=watch, describe=watch, loose=True)
        with structure_lock:
            self.specs = tuple(self.encoder.encode(node, (name,)) for name, node in roots)
            self.tail = self.encoder.encode_references()
        self.cells: list[Variable] = list(self.encoder.cells)
        self.containers = [obj for obj in self.encoder.objects if not isinstance(obj, Module)]

    def locate(self, cell: Cell) -> str | None:
        """The printed path of a cell."""
        number = self.encoder.cells.get(cell)  # type: ignore[call-overload]
        return None if number is None else show_root_path(self.encoder.paths[number])

    def cells_of(self, node: Any) -> dict[tuple[Any, ...], Variable]:
        """The cells of a node by their paths in it."""
        encoder = Encoder()
        encoder.encode(node)
        return dict(zip(encoder.paths, encoder.cells, strict=True))


def show_root_path(path: tuple[Any, ...]) -> str:
    """A path that starts with the name of a root, which is an expression."""
    rest = show_path(path[1:])
    return f"{path[0]}{'' if not rest or rest.startswith('[') else '.'}{rest}"
