"""Arguments: pytrees with the nodes set apart from the leaves, and the names that arguments go by in messages.

JAX gets leaves only. The function gets its own modules and variables back, at their places: `self is self`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Sequence
from operator import is_
from typing import Any

import jax

from mutatis.core.naming import innermost, probe, show_name
from mutatis.core.nodes import is_node
from mutatis.core.showing import show_class, show_value
from mutatis.errors import ArgumentError, StructureError


def as_numbers(given: int | Sequence[int] | None) -> tuple[int, ...]:
    """The positions that an option says: one, several, or none."""
    return () if given is None else (given,) if isinstance(given, int) else tuple(given)


def as_names(given: str | Iterable[str] | None) -> tuple[str, ...]:
    """The names that an option says: one, several, or none."""
    return () if given is None else (given,) if isinstance(given, str) else tuple(given)


def static_positions(count: int, names: Iterable[str], argnums: Collection[int], argnames: Collection[str]) -> set[Any]:
    """Which arguments of a call are static: numbers from 0, and keywords.

    Args:
      count: how many positional arguments there are.
      names: the keywords.
      argnums: the numbers that were said, which may be negative; those that this call does not have say nothing.
      argnames: the names that were said.
    """
    numbers = {number + count if number < 0 else number for number in argnums}
    return {number for number in numbers if 0 <= number < count} | {name for name in names if name in argnames}


def check_static_arguments(args: Sequence[Any], kwargs: dict[str, Any], positions: Iterable[Any], where: str) -> None:
    """Raise if a static argument of a call cannot be hashed, as `check_hashable` says."""
    for position in positions:
        check_hashable(args[position] if isinstance(position, int) else kwargs[position], position, where)


def check_hashable(value: Any, position: Any, where: str) -> None:
    """Raise if a static argument cannot be hashed: its changes would not be seen.

    Raises:
      ArgumentError: it cannot.
    """
    try:
        hash(value)
    except TypeError:
        place = f"argument {position}" if isinstance(position, int) else f"argument `{position}`"
        raise ArgumentError(
            f"static {place} is not hashable",
            where=where,
            expected="a hashable value: a number, string, tuple, function or frozen dataclass",
            got=f"{show_value(value)}, which is traced"
            if isinstance(value, jax.core.Tracer)
            else f"{type(value).__name__}: {value!r:.60}",
            cure="Pass it as an ordinary argument, or a hashable value in its place: `tuple(x)` for a list.",
        ) from None


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

    def refuse_moved(self, tree: Any, where: str) -> None:
        """Raise if a tree that was unflattened, and handed to a function, holds other nodes now, or in another order.

        Args:
          tree: what the function was given, as it has left it.
          where: the transform, for the message.

        Raises:
          StructureError: the function has changed a list or dict of states in place, and nobody else has that.
        """
        now = FlatTree(tree).nodes if self.nodes else []
        if len(now) != len(self.nodes) or not all(map(is_, now, self.nodes)):
            raise StructureError(
                "a list or dict of states among the arguments was changed in place by a traced function",
                where=where,
                expected="the states that it came with, in their order",
                got="others, or another order",
                cure="JAX hands the function a copy of it, so the caller's would stay as it is. Return the new one; or keep the "
                "states in a module, whose attributes may change.",
            )


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
    kinds = inspect.Parameter
    positional = [p.name for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    rest = next((p.name for p in parameters if p.kind is kinds.VAR_POSITIONAL), "args")
    names = positional[: len(args)]
    names += [f"{rest}[{index}]" for index in range(len(args) - len(names))]
    return [*names, *kwargs]


def leaf_names(
    function: Any, args: Sequence[Any], kwargs: dict[str, Any], but: Collection[Any] = frozenset()
) -> list[str]:
    """What the leaves of the arguments go by in messages, in the order of a `FlatTree` of both: ``batch['x']``.

    Those at the positions and keywords in `but` are left out.
    """
    kwargs = dict(sorted(kwargs.items()))
    values = [*enumerate(args), *kwargs.items()]
    return [
        name + place
        for name, (position, value) in zip(argument_names(function, args, kwargs), values, strict=True)
        if position not in but
        for place in leaf_places(value)
    ]


def leaf_places(value: Any) -> list[str]:
    """Where the leaves of a value are in it, as Python writes it: ``['x'][0]``."""
    entries = jax.tree_util.tree_flatten_with_path(value, is_leaf=is_node)[0]
    return [jax.tree_util.keystr(path) for path, item in entries if not is_node(item)]


def check_result(result: Any, leaves: Sequence[Any], label: str) -> None:
    """Raise if a function returned something that JAX has no arrays for.

    Args:
      result: the structure of what it returned: what can be unflattened.
      leaves: the leaves.
      label: the call, for the message.

    Raises:
      ArgumentError: it did; the message says where in the result.
    """
    for index, leaf in enumerate(leaves):
        try:
            jax.typeof(leaf)
        except TypeError:
            place = leaf_places(result.unflatten(leaves))[index]
            raise ArgumentError(
                f"the function returned {show_value(leaf)}, which JAX has no arrays for",
                where=label,
                expected="arrays, numbers, modules, or pytrees of these",
                got=show_class(leaf) + (f" at {place}" if place else ""),
                cure="Return arrays. What does not depend on them is an attribute of a module, or known outside.",
            ) from None


def function_name(function: Any) -> str:
    """A function's name, for messages."""
    function = innermost(function)
    name = probe(function, "__qualname__")
    return show_name(name if isinstance(name, str) else type(function).__name__)
