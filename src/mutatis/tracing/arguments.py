"""Arguments: pytrees with the nodes set apart from the leaves, and the names that arguments go by in messages.

JAX gets leaves only. The function gets its own modules and variables back, at their places: `self is self`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax

from mutatis.core.naming import innermost, probe
from mutatis.core.nodes import is_node


class FlatTree:
    """A pytree with the nodes set apart from the leaves."""

    __slots__ = ("_places", "_treedef", "leaves", "nodes")

    def __init__(self, tree: Any) -> None:
        everything, self._treedef = jax.tree.flatten(tree, is_leaf=is_node)
        self._places = [index for index, item in enumerate(everything) if is_node(item)]
        self.nodes = [everything[index] for index in self._places]
        for index in reversed(self._places):
            del everything[index]
        self.leaves: list[Any] = everything

    @property
    def structure(self) -> Any:
        """The tree and the places of the nodes in it: hashable."""
        return self._treedef, tuple(self._places)

    def unflatten(self, leaves: Sequence[Any], nodes: Sequence[Any] | None = None) -> Any:
        """The tree with other leaves (and, if given, other nodes)."""
        return unflatten(self.structure, leaves, self.nodes if nodes is None else nodes)


def unflatten(structure: Any, leaves: Sequence[Any], nodes: Sequence[Any]) -> Any:
    """The tree of this structure with these leaves and nodes."""
    treedef, places = structure
    everything = list(leaves)
    for index, node in zip(places, nodes, strict=True):
        everything.insert(index, node)
    return jax.tree.unflatten(treedef, everything)


def broadcast(prefix: Any, tree: Any, is_entry: Callable[[Any], bool]) -> list[tuple[Any, Any]]:
    """Each leaf and node of a tree with the entry that a prefix of the tree says."""
    entries, treedef = jax.tree.flatten(prefix, is_leaf=is_entry)
    return [
        (entry, item)
        for entry, part in zip(entries, treedef.flatten_up_to(tree), strict=True)
        for item in jax.tree.leaves(part, is_leaf=is_node)
    ]


def named_nodes(names: Sequence[str], values: Sequence[Any]) -> list[tuple[str, Any]]:
    """The nodes in these arguments with their names: ``batch['model']``."""
    found: list[tuple[str, Any]] = []
    for name, value in zip(names, values, strict=True):
        if is_node(value):
            found.append((name, value))
            continue
        for path, item in jax.tree_util.tree_flatten_with_path(value, is_leaf=is_node)[0]:
            if is_node(item):
                found.append((name + jax.tree_util.keystr(path), item))
    return found


def argument_names(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[str]:
    """The parameter names that arguments go by, for messages."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except Exception:  # of a user's class, too
        parameters = []
    names: list[str] = []
    for index in range(len(args)):
        parameter = parameters[min(index, len(parameters) - 1)] if parameters else None
        if parameter is None:
            names.append(f"args[{index}]")
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL or index >= len(parameters):
            names.append(f"{parameter.name}[{index}]")
        else:
            names.append(parameter.name)
    return [*names, *kwargs]


def function_name(function: Any) -> str:
    """A function's name, for messages."""
    function = innermost(function)
    name = probe(function, "__qualname__")
    return (
        (name if isinstance(name, str) else type(function).__name__)
        .replace("<locals>.", "")
        .replace("<lambda>", "lambda")
    )
