"""Shardings: what `in_shardings` and `out_shardings` say of arguments, results, and the states of modules among them.

A prefix of the arguments (or of the result) says a sharding for each part. For a Module it is a sharding for all its states, a
`State` of shardings, or a `mu.StateSharding`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from mutatis import _compat
from mutatis.core import access, naming
from mutatis.core.naming import show_path
from mutatis.core.nodes import is_node
from mutatis.core.placements import constrain_leaf
from mutatis.core.showing import show_value
from mutatis.errors import ArgumentError, StructureError
from mutatis.model.state import State
from mutatis.model.variables import Variable
from mutatis.model.walks import variables
from mutatis.tracing.arguments import broadcast
from mutatis.tracing.axes import Shared, StateSharding


class InShardings:
    """What `in_shardings` says of one call: a sharding, or none, for cells, and a prefix for each of JAX's arguments."""

    __slots__ = ("by_cell", "by_position")

    def __init__(self, given: Any, args: Mapping[int, Any], label: str) -> None:
        self.by_cell: dict[Variable, Any] = {}
        self.by_position: dict[Any, Any] = {}
        for (position, value), entry in zip(args.items(), _for_each(given, len(args), label), strict=True):
            entries = [(entry, value)] if is_node(value) else broadcast(entry, value, is_sharding)
            nodes = [(said, item) for said, item in entries if is_node(item)]
            self.by_position[position] = [said for said, item in entries if not is_node(item)] if nodes else entry
            for said, node in nodes:
                self._add(of_node(said, node, label), label)

    def _add(self, said: dict[Variable, Any], label: str) -> None:
        for cell, sharding in said.items():
            if self.by_cell.setdefault(cell, sharding) != sharding:
                raise ArgumentError(
                    "`in_shardings` says two shardings of one state, which is reached by two arguments",
                    where=label,
                    expected="one sharding for a state, however it is reached",
                    got=f"{show_value(self.by_cell[cell])} and {show_value(sharding)}",
                    cure="Say the same at both places, or pass the module once.",
                )


def _for_each(given: Any, count: int, label: str) -> Sequence[Any]:
    if not isinstance(given, tuple | list) or isinstance(given, PartitionSpec):
        return [given] * count
    if len(given) != count:
        raise ArgumentError(
            f"`in_shardings` has {len(given)} entries for {count} arguments",
            where=label,
            expected=f"{count} entries: one for each positional argument that is not static, or one sharding for all",
            got=show_value(given),
            cure="Give an entry for each; None leaves it to JAX.",
        )
    return given


def is_sharding(x: Any) -> bool:
    """Whether a part of a prefix says something, and is no container of such."""
    return x is None or isinstance(x, jax.sharding.Sharding | PartitionSpec | StateSharding | State)


def of_node(said: Any, node: Any, label: str) -> dict[Variable, Any]:
    """The sharding of each state of a node for which one is said.

    Raises:
      StructureError: it has other states, or a state has fewer axes than its sharding names.
    """
    if said is None or said is _compat.UNSPECIFIED:
        return {}
    cells = variables(node)
    if isinstance(said, State):
        differences = [f"missing:    {show_path(path)}" for path in cells if path not in set(said)]
        differences += [f"unexpected: {show_path(path)}" for path in said if path not in cells]
        if differences:
            raise StructureError(
                "a State of shardings does not fit its module",
                where=label,
                differences=differences,
                cure="Make it of the module: `mu.state(model).map(lambda path, x: sharding)`.",
            )
    found: dict[Variable, Any] = {}
    for path, cell in cells.items():
        if isinstance(said, State):
            sharding = said[path]
        else:
            sharding = said.of(path, cell) if isinstance(said, StateSharding) else said
        if isinstance(said, StateSharding) and (sharding is None or sharding is Shared):
            sharding = PartitionSpec()
        if sharding is not None:
            _check_rank(path, cell, sharding, label)
            found[cell] = sharding
    return found


def _check_rank(path: Any, cell: Variable, sharding: Any, label: str) -> None:
    spec = sharding if isinstance(sharding, PartitionSpec) else getattr(sharding, "spec", ())
    for leaf in jax.tree.leaves(access.peek(cell)):
        if len(spec) > leaf.ndim:
            raise StructureError(
                f"state {naming.describe(cell)} has fewer axes than its sharding",
                path=naming.path_of(cell) or show_path(path),
                where=label,
                expected=f"at least {len(spec)} axes, for {spec}",
                got=f"shape {leaf.shape}",
                made_at=cell.made_at,
                cure="Say shardings by filter: `mu.StateSharding({mu.Param: P('x'), ...: P()})`.",
            )


def constrain(value: Any, sharding: Any) -> Any:
    """A traced value, placed; anything but a sharding leaves it where it is."""
    if sharding is None or sharding is _compat.UNSPECIFIED:
        return value
    return jax.tree.map(lambda leaf: constrain_leaf(leaf, sharding), value)
