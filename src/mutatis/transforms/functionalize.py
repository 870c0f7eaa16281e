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
    """A pure function and the state it starts from.

    ``pure(state, *args, **kwargs) -> (out, new_state)`` runs `f` in a transaction that is filled from `state`; what `f`
    writes is in `new_state` and nowhere else. It goes through every raw JAX transform.

    Args:
      f: a function, bound method, partial or callable Module.
      of: the nodes whose states are taken: a Module, a Variable, or a list, tuple or dict of them. Without it, those that
        `f` names. The paths of the state are those in the one node, or start with the names of several.

    Raises:
      StructureError: `state` has other paths than the one given, or `f` writes to a state that is not in it.

    Example:
      >>> import jax, mutatis as mu
      >>> class Counter(mu.Module):
      ...     def __init__(self):
      ...         self.n = mu.Variable(0)
      ...     def __call__(self):
      ...         self.n += 1
      ...         return self.n.value
      >>> counter = Counter()
      >>> pure, state = mu.functionalize(counter)
      >>> out, state = jax.jit(pure)(state)
      >>> out, state["n"], counter.n
      (Array(1, dtype=int32), Array(1, dtype=int32), Variable(0, int32))
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
