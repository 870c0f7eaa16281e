"""Loops and branches that Python runs, under `jax.disable_jit`: the values in them are concrete, as in JAX's own.

What a loop means stays: the body is run in a transaction of its own each time, and may do what it may do when it is traced. All
runs together are one transaction, so that a body that fails in the middle leaves all as it was.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mutatis import _compat
from mutatis.core import access
from mutatis.core.transactions import Transaction
from mutatis.tracing.call_site import CallSite, RunResult
from mutatis.tracing.staging import refuse_structure


def decides_in_python(value: Any) -> bool:
    """Whether Python may run a loop or branch that this value decides: JIT is disabled, and the value is no tracer."""
    return _compat.jit_disabled() and not isinstance(value, jax.core.Tracer)


def run_once(
    site: CallSite, what: str, overlay: Mapping[Any, Any], call: Callable[[], Any], *, stacks: bool = False
) -> tuple[Any, Any, Any, Any]:
    """Run a body once.

    Args:
      site: the call of the transform.
      what: what it is, for messages.
      overlay: values that cells have in it.
      call: runs the user's function.
      stacks: whether what it sows, or makes and returns, is stacked, and not refused.

    Returns:
      How it ended, the leaves of the result, the values of the states that it wrote and that were there before, and of those that
      it sowed or made and returned, in order.
    """
    end, leaves, values = site.run(dict(overlay), call=call)
    site.let_go(end)
    new = [*site.sown(end), *site.made(end)] if stacks else []
    refuse_structure(site, end, what, new)
    by_cell = dict(zip(end.cells, values, strict=True))
    return end, leaves, {c: v for c, v in by_cell.items() if c not in end.born}, {cell: by_cell[cell] for cell in new}


def scan_in_python(
    site: CallSite,
    what: str,
    step: Callable[[Any], Any],
    start: Sequence[Any],
    xs: Sequence[Any],
    stacks: Mapping[Any, Any],
    order: Sequence[int],
) -> tuple[RunResult, list[Any], dict[Any, Any]]:
    """Run the body of a scan for each slice.

    Args:
      site: the call of the transform.
      what: the body, for messages.
      step: runs it on the leaves of the carry and of a slice.
      start: the leaves of the carry.
      xs: the leaves to slice, along axis 0.
      stacks: the values of the states to slice, along axis 0.
      order: the indices, in the order of the runs; one at least.

    Returns:
      How the last run ended, the leaves of the last carry and of the stacked results, and the stacks of the sliced states that
      were written, and of those that were sowed or made and returned.
    """
    carry = list(start)
    touched: set[Any] = set()  # of the sliced states, those that are written
    rows: dict[int, tuple[list[Any], list[Any]]] = {}
    with Transaction(site.label) as tx:
        for index in order:
            if rows:
                site.undo()  # what the body sowed: it is stacked
            slices = [leaf[index] for leaf in xs]
            overlay = {cell: jax.tree.map(lambda x, i=index: x[i], stack) for cell, stack in stacks.items()}
            call = functools.partial(step, (carry, slices))
            end, leaves, written, new = run_once(site, what, overlay, call, stacks=True)
            carry, ys = leaves[: len(carry)], leaves[len(carry) :]
            touched |= written.keys() & stacks.keys()
            for cell, value in written.items():
                if cell not in stacks:
                    access.write(cell, value)
            rows[index] = ys, [*(written.get(cell, overlay[cell]) for cell in stacks), *new.values()]
        results = [jax.tree.map(lambda *parts: jnp.stack(parts), *parts) for parts in _columns(rows, 0)]
        stacked = [jax.tree.map(lambda *parts: jnp.stack(parts), *parts) for parts in _columns(rows, 1)]
        access.commit(tx)
    by_cell = dict(zip((*stacks, *new), stacked, strict=True))
    return end, [*carry, *results], {cell: stack for cell, stack in by_cell.items() if cell in touched or cell in new}


def _columns(rows: Mapping[int, tuple[list[Any], list[Any]]], which: int) -> list[tuple[Any, ...]]:
    return list(zip(*(rows[index][which] for index in sorted(rows)), strict=True))


def while_in_python(
    site: CallSite,
    holds: Callable[[Sequence[Any]], Any],
    what: str,
    step: Callable[[Any], Any],
    start: Sequence[Any],
) -> Any:
    """Run a body while a condition holds.

    Args:
      site: the call of the transform.
      holds: runs the condition on the leaves of the carry: a boolean.
      what: the body, for messages.
      step: runs it on the leaves of the carry.
      start: the leaves of the carry.

    Returns:
      How the last run ended, or None, and the leaves of the last carry.
    """
    carry, end = list(start), None
    with Transaction(site.label) as tx:
        while holds(carry):
            end, carry, written, _ = run_once(site, what, {}, functools.partial(step, carry))
            for cell, value in written.items():
                access.write(cell, value)
        access.commit(tx)
    return end, carry
