"""`mu.functionalize`: a stateful function as a pure one, for raw JAX."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Concatenate, ParamSpec, TypeVar

from mutatis.core.naming import show_path
from mutatis.core.showing import show_class
from mutatis.errors import ArgumentError, StructureError
from mutatis.model.contexts import ContextValue
from mutatis.model.modules import Module
from mutatis.model.operations import state
from mutatis.model.state import State
from mutatis.model.walks import variables
from mutatis.tracing.call_site import CallSite
from mutatis.tracing.captures import search

P = ParamSpec("P")
R = TypeVar("R")


def functionalize(
    f: Callable[P, R], *, of: Any = None
) -> tuple[Callable[Concatenate[State, P], tuple[R, State]], State]:
    """Turn a function that reads and writes state into a pure function, and the state from which it starts.

    Every raw JAX transform, solver or library takes the pure function: its states are an argument and a result. It does not touch
    the model: the values that `f` writes are in the new state and nowhere else. `mu.update(model, state)` brings them back.

    Args:
      f: a function, bound method, partial or callable Module.
      of: the nodes whose states are taken: a Module, a Variable, or a list, tuple or dict of them. Without it, the ones that `f`
        uses. With one node, the paths of the state are the paths in it; with several, they begin with the name of the node.

    Returns:
      A pair: ``pure``, called as ``pure(state, *args, **kwargs) -> (out, new_state)``, and a `State` with the present values.

    Raises:
      StructureError: `state` has other paths than the one given, or `f` writes to a state that is not in it.

    Example:
      >>> import jax, jax.numpy as jnp, mutatis as mu
      >>> norm = mu.nn.BatchNorm(2)
      >>> pure, state = mu.functionalize(norm)
      >>> out, new_state = jax.jit(pure)(state, jnp.ones((4, 2)))
      >>> bool((new_state["mean"] == state["mean"]).all()), bool((norm.mean == state["mean"]).all())
      (False, True)
      >>> mu.update(norm, new_state)
      >>> bool((norm.mean == new_state["mean"]).all())
      True
    """
    node = _named_nodes(f) if of is None else of

    def pure(state: State, /, *args: P.args, **kwargs: P.kwargs) -> tuple[R, State]:
        if not isinstance(state, Mapping):
            raise ArgumentError(
                "a pure function was called without its state",
                path="state",
                where="functionalize",
                expected="the state, and then the arguments of the function",
                got=f"{show_class(state)} in the place of the state",
                cure="`out, state = pure(state, x)`",
            )
        cells = variables(node)
        if set(state) != set(cells):
            differences = [f"missing:    {show_path(p)}" for p in cells if p not in set(state)]
            differences += [f"unexpected: {show_path(p)}" for p in state if p not in cells]
            raise StructureError(
                "the state does not fit the function",
                where="functionalize",
                differences=differences,
                cure="Pass the state that `mu.functionalize` gave, or one that `pure` returned.",
            )
        with CallSite("functionalize", f, args, kwargs, others=[("of", node)]) as site:
            site.mark = f"pure at {__file__}"  # the name of this function may be part of a program's
            end, leaves, values = site.run({cell: state[path] for path, cell in cells.items()})
            site.refuse_changes("a pure function")
            site.let_go(end)
            site.refuse_leftovers(end)
            written = dict(zip(end.cells, values, strict=True))
            known = {*cells.values(), *end.born}
            for cell in written.keys() - known:
                raise StructureError(
                    f"state {site.describe(cell)} was written by a pure function that was not made of it",
                    path=site.scope.locate(cell),
                    where=site.label,
                    made_at=cell.made_at,
                    cure="Its new value would be lost. Name its owner, too: `mu.functionalize(f, of=[model, other])`.",
                )
            new = {path: written.get(cell, state[path]) for path, cell in cells.items()}
            return end.unflatten(leaves), State(new, {path: type(cell) for path, cell in cells.items()})

    return pure, state(node)


def _named_nodes(f: Any) -> Any:
    """The node that a function names, or those by name."""
    if isinstance(f, Module):
        return f
    roots = {name: node for name, node in search(f).roots if not isinstance(node, ContextValue)}
    return next(iter(roots.values())) if len(roots) == 1 else roots
