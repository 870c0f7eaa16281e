"""Leftovers: what a traced function made, or changed, and keeps where no transform sees it.

When a trace is over, the states that it made are handed over to whoever called the transform, or they are garbage. One that
lives on all the same is kept in an odd place: a cache, a set, an attribute of a class. It would never get a value, and a
program that is called again would not make it again. The same goes for a change of a module that nothing known leads to. Both
are refused, so that no state is lost without a word.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from typing import Any

from mutatis.core import frames, naming
from mutatis.core.cells import Cell
from mutatis.core.journal import Entry, undo
from mutatis.errors import StructureError


class Leftovers:
    """What should be garbage when a trace is over. It is held weakly.

    Args:
      cells: the states that were made and are not handed over.
      changes: how modules changed that were there before, and that nothing leads to.
    """

    __slots__ = ("_cells", "_changes")

    def __init__(self, cells: Iterable[Cell], changes: Iterable[Entry] = ()) -> None:
        self._cells = [weakref.ref(cell) for cell in cells]
        self._changes = [(weakref.ref(obj), name, old) for obj, name, old in changes]

    def refuse(self, where: str) -> None:
        """Raise if something of it is alive; what can be put back is put back.

        Args:
          where: the transform, for the message.

        Raises:
          StructureError: it is; the message says where the state was made.
        """
        if not self._alive() or frames.recorder() is not None:  # who records what is done holds it
            return
        for generation in (1, 2):
            gc.collect(generation)
            if not self._alive():
                return
        changes = [(obj, name, old) for ref, name, old in self._changes if (obj := ref()) is not None]
        cell = next((cell for ref in self._cells if (cell := ref()) is not None), None)
        error = _lost_state(cell, where) if cell is not None else _lost_change(*changes[0][:2], where)
        undo(changes)
        raise error

    def _alive(self) -> bool:
        return any(ref() is not None for ref in self._cells) or any(ref() is not None for ref, _, _ in self._changes)


def _lost_state(cell: Cell, where: str) -> StructureError:
    return StructureError(
        f"state {naming.describe(cell)} was made while `{where}` was traced, and is kept where no transform sees it",
        path=naming.path_of(cell),
        where=where,
        expected="states in attributes of modules and of plain objects, in lists, dicts and variables that the function names",
        got="a state in a cache, in a set, in an attribute of a class, or the like",
        made_at=naming.made_at(cell),
        cure="Make it before the call; or keep it in an attribute, list or dict that is an argument or that the function names.",
    )


def _lost_change(obj: Any, name: str, where: str) -> StructureError:
    path = f"{type(obj).__name__}.{name}"
    return StructureError(
        f"`{path}` was changed while `{where}` was traced, and neither its arguments nor the names it uses lead to the module",
        path=path,
        where=where,
        cure="The change would be lost in later calls. Pass the module as an argument, or name it in the function.",
    )
