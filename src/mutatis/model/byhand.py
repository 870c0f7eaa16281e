"""By hand: arrays that code puts into a module's instance dictionary past `__setattr__`, to compute something once.

Such an array is a constant of the module, as one that a function captures is: no state, and part of the key of compiled programs.
What is put there while a transform traces is taken out again when it ends, if it holds arrays: it would hold tracers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from mutatis.core.avals import is_concrete
from mutatis.core.journal import ABSENT, Journal, put_back
from mutatis.core.nodes import is_node


def put_by_hand(value: Any) -> bool:
    """Whether an attribute holds an array, or is a tuple with some, which `__setattr__` does not let in."""
    if not isinstance(value, tuple):
        return isinstance(value, jax.Array | np.ndarray)
    return any(map(put_by_hand, value)) and not any(map(is_node, value))


def note_by_hand(modules: Iterable[Any], held: dict[int, dict[str, Any]], journal: Journal) -> None:
    """Look for what a traced function put into instance dictionaries by hand, at its end.

    Arrays are taken out; all else counts as assigned.

    Args:
      modules: the modules that it was given.
      held: what each held before, by `id`.
      journal: what it assigned.
    """
    noted = None
    for module in modules:
        before, now = held[id(module)], module.__dict__
        if len(before) == len(now) and all(now.get(name, ABSENT) is value for name, value in before.items()):
            continue
        if noted is None:
            noted = {(id(obj), name) for obj, name, _ in journal.noted}
        for name in [*now]:
            old, value = before.get(name, ABSENT), now[name]
            if value is old or (id(module), name) in noted:
                continue
            if _holds_arrays(value):
                put_back(module, name, old)
            else:
                journal.note(module, name, old)


def drop_traced(modules: Iterable[Any]) -> None:
    """Take tracers that were put there by hand out of modules that a traced function made."""
    for module in modules:
        for name, value in [*module.__dict__.items()]:
            if put_by_hand(value) and not is_concrete(value):
                del module.__dict__[name]


def _holds_arrays(value: Any) -> bool:
    leaves = jax.tree.leaves(value, is_leaf=is_node)
    return any(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves)
