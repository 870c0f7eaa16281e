"""Scope: everything that the arguments and captures of a call lead to, with the paths by which messages name it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from mutatis.core.cells import Cell
from mutatis.core.journal import identity
from mutatis.core.naming import show_path
from mutatis.core.places import Place
from mutatis.core.structure import structure_lock
from mutatis.model.graph import Encoder
from mutatis.model.modules import Module
from mutatis.model.variables import Variable


class Scope:
    """Everything that some roots lead to: cells with their paths, modules, containers.

    Args:
      roots: nodes with their names.
      places: where the functions may put states, besides.
      watch: whether it is for a program: later changes are counted, and `structure` describes what was found.
    """

    def __init__(self, roots: Sequence[tuple[str, Any]], places: Sequence[Place] = (), *, watch: bool = False) -> None:
        self.encoder = Encoder(thread=True, watch=watch, describe=watch, loose=True)
        with structure_lock:
            specs = tuple(self.encoder.encode(node, (name,)) for name, node in roots)
            self._walked = specs, self.encoder.encode_references()
        self.cells: list[Variable] = list(self.encoder.cells)
        self.containers = [obj for obj in self.encoder.objects if not isinstance(obj, Module)]
        self.set_places(places)

    def set_places(self, places: Sequence[Place]) -> None:
        """Say where the functions may put states, besides; the search for that may need the walk."""
        # A container that a module holds, too, is part of the structure.
        self.places = [place for place in places if place.is_name or self.encoder.known(place.holder) is None]
        self._by_identity = {place.identity: place for place in self.places}
        self.structure: Hashable = (*self._walked, tuple(place.slot for place in self.places))

    def place_of(self, obj: Any, name: str) -> str | None:
        """What a changed object, or its attribute, is called; None if nothing leads to it."""
        number = self.encoder.known(obj)
        if number is None:
            place = self._by_identity.get(identity(obj, name))
            return None if place is None else place.path
        return show_root_path((*self.encoder.object_paths[number], *((name,) if name else ())))

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
