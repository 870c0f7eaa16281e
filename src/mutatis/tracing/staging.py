"""Staging: one run of a stateful function as a jaxpr, for loops and branches.

A loop has to know what its body writes before it can be built: those states are carried. So the body is traced once, with
every cell that can be reached as an explicit input, and what its transaction recorded is the answer. The loop is then built
around that jaxpr, and the user's code does not run again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from mutatis import _compat
from mutatis.core import access, naming, transactions
from mutatis.core.avals import same_type, show_type
from mutatis.core.cells import UNSET
from mutatis.core.transactions import Transaction
from mutatis.errors import StateTypeError, StructureError
from mutatis.model.kinds import Intermediate
from mutatis.model.variables import Variable, spelled
from mutatis.tracing.arguments import FlatTree, check_result
from mutatis.tracing.call_site import CallSite, RunResult


class Code:
    """The jaxpr of a run, with the structure of its results. It holds no states and nothing of the user's."""

    __slots__ = ("_closed", "_treedef")

    def __init__(self, closed: Any, treedef: Any) -> None:
        self._closed = closed
        self._treedef = treedef

    def dtypes(self) -> set[Any]:
        """The dtypes of all values in it."""
        return _compat.dtypes_in(self._closed.jaxpr)

    def __call__(self, values: Sequence[Any], leaves: Any) -> tuple[list[Any], list[Any]]:
        """Run the jaxpr: the leaves of the result, and the written values."""
        flat = jax.tree.leaves((values, leaves))
        out = jax.core.eval_jaxpr(self._closed.jaxpr, self._closed.consts, *flat)
        return jax.tree.unflatten(self._treedef, out)  # type: ignore[no-any-return]


class Staged:
    """A traced run: call it with values of its cells and leaves.

    Args:
      cells: the cells that are explicit inputs, in order.
      end: how the run ended.
      closed: the jaxpr.
      shapes: the shapes of the result's leaves and of the written values.
    """

    def __init__(self, cells: list[Variable], end: RunResult, closed: Any, shapes: Any) -> None:
        self.cells = cells
        self.end = end
        leaves, values = shapes
        self.leaves = list(closed.out_avals[: len(leaves)])  # with their weak types, unlike `shapes`
        self.values = dict(zip(end.cells, values, strict=True))  # shapes of what is written, by cell
        self.code = Code(closed, jax.tree.structure(shapes))
        self.checks = bool(closed.effects) and _compat.has_host_callback(closed.jaxpr)  # whether it may hold some

    def __call__(self, values: Mapping[Any, Any], leaves: Any) -> tuple[list[Any], dict[Any, Any]]:
        """Run the jaxpr.

        Args:
          values: the values of the cells.
          leaves: the values of the arguments' leaves, in the structure they were staged with.

        Returns:
          The leaves of the result, and the written values by cell.
        """
        new_leaves, written = self.code([values[cell] for cell in self.cells], leaves)
        return new_leaves, dict(zip(self.end.cells, written, strict=True))


def stage(
    site: CallSite,
    cells: Sequence[Variable],
    types: Mapping[Any, Any],
    leaves: Any,
    call: Callable[[Any], Any],
    make: Callable[..., Transaction] = Transaction,
) -> Staged:
    """Trace ``call(leaves)`` with the cells as inputs. A state with `init` that it uses for the first time is created before.

    Args:
      site: the call of the transform.
      cells: the cells to be inputs.
      types: values or shapes for cells, where they are not what the cells hold now.
      leaves: values or shapes of the arguments' leaves.
      call: runs the user's function.
      make: makes the transaction.
    """
    inputs = list(cells)
    while True:
        ends: list[RunResult] = []

        def pure(values: list[Any], leaves: Any, inputs: list[Variable] = inputs, ends: list[RunResult] = ends) -> Any:
            end, out, written = site.run(dict(zip(inputs, values, strict=True)), call=lambda: call(leaves), make=make)
            ends.append(end)
            check_result(end, out, site.label)
            return out, written

        values = [types[cell] if cell in types else access.load(cell) for cell in inputs]
        closed, shapes = jax.make_jaxpr(site.marked(pure), return_shape=True)(values, leaves)
        (end,) = ends
        if first_used := [cell for cell in end.cells if _may_be_created(cell, end, types)]:
            site.undo()
            for cell in first_used:
                cell.get()
            continue
        site.let_go(end)
        known = set(inputs)
        unknown: list[Any] = [cell for cell in end.cells if cell not in known and cell not in end.born]
        if not unknown:
            return Staged(inputs, end, closed, shapes)
        site.undo()
        inputs = [*inputs, *unknown]  # written, though the search did not find it: trace again with it


def stage_together(site: CallSite, build: Callable[[], Any]) -> Any:
    """Stage several functions, anew if one of them uses a state for the first time: for all of them it then has a value."""
    while True:
        late = [cell for cell in site.scope.cells if access.peek(cell) is UNSET]
        staged = build()
        if all(access.peek(cell) is UNSET for cell in late):
            return staged


def _may_be_created(cell: Any, end: RunResult, types: Mapping[Any, Any]) -> bool:
    """Whether a state that has no value yet, and knows how it starts, is used for the first time: it is created before."""
    made = cell in end.born or cell in types
    return not made and access.peek(cell) is UNSET and getattr(cell, "init", None) is not None


def check_kept(site: CallSite, staged: Staged, cell: Variable, before: Any, what: str) -> None:
    """Raise unless a state that is written keeps its type.

    Raises:
      StateTypeError: it does not; the message gives the cast.
    """
    after = staged.values[cell]
    if same_type(before, after):
        return
    old, new = show_type(before), show_type(after)
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(before)}
    same = jax.tree.structure(before) == jax.tree.structure(after)  # else it is another container, or unit
    cast = (
        f" Convert what is written: `v.value = x.astype(jnp.{next(iter(dtypes))})`."
        if len(dtypes) == 1 and same and dtypes != {str(leaf.dtype) for leaf in jax.tree.leaves(after)}
        else ""
    )
    cure = f"What is carried or chosen has one type.{cast} Or give the state the type {new} before."
    if isinstance(cell, Intermediate):
        cure = "It holds what was sown before: take that out first, `mu.pop(model, mu.Intermediate)`."
    elif cell.init is not None and (batch := _batch(before, after)):
        cure = "It starts without the axes of a batch: say them before the loop, "
        cure += f"`mu.reset(model, {spelled(type(cell))}, batch_shape={batch})`."
    raise StateTypeError(
        f"state {naming.describe(cell)} changes its type {what}",
        path=site.scope.locate(cell),
        where=site.label,
        expected=old,
        got=new,
        made_at=naming.made_at(cell),
        cure=cure,
    )


def _batch(before: Any, after: Any) -> tuple[int, ...]:
    """The axes that a value has got in front, if that is all that happened to it."""
    old, new = jax.tree.leaves(before), jax.tree.leaves(after)
    if jax.tree.structure(before) != jax.tree.structure(after) or not old:
        return ()
    batch: tuple[int, ...] = new[0].shape[: max(0, new[0].ndim - old[0].ndim)]
    fits = all(b.shape == (*batch, *a.shape) and a.dtype == b.dtype for a, b in zip(old, new, strict=True))
    return batch if fits else ()


def check_same_nodes(site: CallSite, before: Sequence[Any], after: Sequence[Any]) -> None:
    """Raise unless modules among a loop's carry are the same objects, at the same places, after an iteration.

    Raises:
      StructureError: they are not.
    """
    if len(before) != len(after) or any(a is not b for a, b in zip(before, after, strict=True)):
        raise StructureError(
            "the carry holds other modules after an iteration than before",
            where=site.label,
            expected=[type(node).__name__ for node in before],
            got=[type(node).__name__ for node in after],
            cure="Return the very modules of the carry; their states are carried, and change in place.",
        )


def refuse_structure(site: CallSite, end: RunResult, what: str, but: Sequence[Any] = ()) -> None:
    """Raise if the function made states or changed structure: it is traced once and not run each time.

    Args:
      site: the call of the transform.
      end: how the function ended.
      what: what it is, for the message.
      but: cells that may be made.

    Raises:
      StructureError: it did; the message names what.
    """
    site.refuse_creation(end, what)
    site.refuse_changes(what, but)
    born = {id(cell) for cell in end.born} - set(map(id, but))
    for node in end.nodes:
        cells = site.scope.cells_of(node)
        if any(id(cell) in born for cell in cells.values()):
            raise StructureError(
                f"a {type(node).__name__} was made and returned in {what}",
                where=site.label,
                cure="Make it before, and write to its states inside; or return arrays.",
            )
    site.refuse_leftovers(end)


def with_values(result: Any) -> Any:
    """A result with the values in the place of Variables that the function did not make: they are stacked as arrays are."""
    tx = transactions.current()
    packed = FlatTree(result)
    if not any(isinstance(node, Variable) for node in packed.nodes):
        return result
    made = {} if tx is None else tx.born
    nodes = [node.get() if isinstance(node, Variable) and node not in made else node for node in packed.nodes]
    return packed.unflatten(packed.leaves, nodes)
