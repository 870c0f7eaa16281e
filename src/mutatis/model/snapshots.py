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
    """The values and the structure of a model at one moment, as `mu.snapshot` takes them.

    It keeps the arrays of that moment, so while it exists, a compiled step copies these states once instead of donating their
    memory.
    """

    __slots__ = ("_lending", "_structure", "_values")

    def __init__(self, node: Any) -> None:
        encoder = Encoder()
        with structure_lock:
            encoder.encode(check_node(node))
            self._structure = [(o, dict(o.__dict__) if isinstance(o, Module) else o.copy()) for o in encoder.objects]
        values, self._lending = access.lend([*encoder.cells], access.load_many)
        self._values = dict(zip(encoder.cells, values, strict=True))

    def restore(self) -> None:
        """Put back all values, attributes, lists and dictionaries as they were at the moment of the snapshot.

        You may call it several times. If one of them cannot be put back, an error is raised and nothing changes.
        """
        if self._lending is not None:
            self._lending.keep()
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
    """Remember a model as it is now, to go back to it later with ``restore()``.

    A snapshot holds the values of all states and the structure: the attributes of modules, and the items of lists and
    dictionaries. It costs little time, because it copies no arrays. While it exists, a compiled step copies the states once
    instead of donating their memory.

    Args:
      node: a Module, a Variable, or a list, tuple or dict of them.

    Returns:
      A Snapshot with the method `restore`, which puts everything back.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> model = mu.nn.Linear(2, 1, rngs=mu.Rngs(0))
      >>> before = mu.snapshot(model)
      >>> model.bias.value = jnp.ones(1)
      >>> model.note = "changed"
      >>> before.restore()
      >>> model.bias.value, hasattr(model, "note")
      (Array([0.], dtype=float32), False)
    """
    return Snapshot(node)
