"""Layouts: how the state of optax lies beside the parameters, as states whose names end in the parameters' paths."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Hashable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from mutatis.core import access, placements
from mutatis.core.naming import show_path
from mutatis.model.filters import Path
from mutatis.model.kinds import OptState
from mutatis.model.state import State
from mutatis.model.variables import Variable


@dataclasses.dataclass(frozen=True)
class Layout:
    """How optax keeps what it keeps for parameters: names and types of the leaves, and the structure around them."""

    types: Hashable  # of the parameters
    names: tuple[str, ...]
    leaves: tuple[jax.ShapeDtypeStruct, ...]
    treedef: Any

    def __repr__(self) -> str:
        return f"<{len(self.names)} leaves>"


_layouts: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def layout_of(init: Any, values: State, types: Hashable) -> Layout:
    """The layout for parameters of these types; `init` is asked for it once."""
    try:
        known = _layouts.setdefault(init, {})
    except TypeError:  # no weak references to it, or no hash
        known = {}
    if types not in known:
        names, leaves, treedef = named_leaves(jax.eval_shape(init, values))
        known[types] = Layout(types, tuple(names), tuple(map(struct_of, leaves)), treedef)
    layout: Layout = known[types]
    return layout


def types_of(values: State) -> Hashable:
    leaves, treedef = jax.tree.flatten(values)
    return treedef, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def struct_of(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def named_leaves(state: Any) -> tuple[list[str], list[Any], Any]:
    """The leaves of an optax state with names that end in the parameters' paths: ``0.mu.blocks[0].kernel``."""
    entries, treedef = jax.tree_util.tree_flatten_with_path(state)
    names = [jax.tree_util.keystr(keys, simple=True, separator=".") for keys, _ in entries]
    return names, [leaf for _, leaf in entries], treedef


def beside(params: dict[Path, Variable], leaves: dict[str, Any]) -> dict[str, OptState]:
    """States for arrays whose names end in the parameters' paths; one of a parameter's shape lives where that does."""
    by_name = {
        ".".join([show_path(path), *way]): (cell, leaf) for path, cell in params.items() for way, leaf in _leaves(cell)
    }
    found = {}
    for name, leaf in leaves.items():
        parts = name.split(".")
        ends = (".".join(parts[at:]) for at in range(len(parts) + 1))
        beside = next((by_name[end] for end in ends if end in by_name), None)
        if beside is None or jnp.shape(beside[1]) != jnp.shape(leaf):
            found[name] = OptState(leaf)
            continue
        cell = beside[0]
        found[name] = OptState(placements.like(cell, access.peek_committed(cell), leaf))
        found[name].sharding, found[name]._lanes = cell.sharding, cell._lanes
    return found


def _leaves(cell: Variable) -> Iterator[tuple[list[str], Any]]:
    """The leaves of a parameter, each with its way there; a bare array has none."""
    for keys, leaf in jax.tree_util.tree_leaves_with_path(cell.get()):
        yield [jax.tree_util.keystr((key,), simple=True) for key in keys], leaf
