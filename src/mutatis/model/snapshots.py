"""Snapshots: a model as it was at one moment, to go back to."""

from __future__ import annotations

from typing import Any

from mutatis.core import access
from mutatis.core.journal import ABSENT, Journal, put_back, reorder
from mutatis.core.structure import structure_lock
from mutatis.core.transactions import Transaction
from mutatis.model.graph import Encoder
from mutatis.model.modules import Module, set_attribute
from mutatis.model.walks import check_node


class Snapshot:
    """The values and the structure of a node at one moment; `restore` puts them back.

    It keeps pointers to the arrays, so the next compiled step copies what is held instead of donating it.
    """

    __slots__ = ("_structure", "_values")

    def __init__(self, node: Any) -> None:
        encoder = Encoder()
        with structure_lock:
            encoder.encode(check_node(node))
            self._structure = [(o, dict(o.__dict__) if isinstance(o, Module) else o.copy()) for o in encoder.objects]
        self._values = {cell: access.load(cell) for cell in encoder.cells}

    def restore(self) -> None:
        """Put back every value, attribute and container as it was, or nothing if one of them cannot be."""
        containers = [obj for obj, _ in self._structure if not isinstance(obj, Module)]
        with structure_lock, Transaction("restore", journal=Journal(containers)) as tx:
            for obj, saved in self._structure:
                if isinstance(obj, Module):
                    for name in obj.__dict__.keys() - saved.keys():
                        set_attribute(obj, name, ABSENT)
                    for name, value in saved.items():
                        if obj.__dict__.get(name, ABSENT) is not value:
                            set_attribute(obj, name, value)
                    reorder(obj.__dict__, saved)
                else:
                    put_back(obj, "", saved)
            access.write_many([*self._values], [*self._values.values()])
            access.commit(tx)


def snapshot(node: Any) -> Snapshot:
    """Remember a node as it is now.

    Example:
      >>> import mutatis as mu
      >>> count = mu.Variable(1)
      >>> before = mu.snapshot(count)
      >>> count.value = 5
      >>> before.restore()
      >>> count
      Variable(1, int32)
    """
    return Snapshot(node)
