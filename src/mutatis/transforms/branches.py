"""`mu.cond` and `mu.switch`: branches that read and write state.

Each branch is staged once. Every state that some branch writes is a result of all of them: a branch that does not write it
passes it on, so the branch that is not taken leaves states alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, TypeVarTuple, overload

import jax
from jax.typing import ArrayLike

from mutatis.compilation.eager_control import compiled, runs_eagerly
from mutatis.core import access
from mutatis.core.showing import show_structure
from mutatis.errors import ArgumentError, StructureError
from mutatis.tracing.arguments import FlatTree
from mutatis.tracing.call_site import CallSite
from mutatis.tracing.staging import Staged, check_kept, refuse_structure, stage

_NONE = object()

R = TypeVar("R")
X = TypeVar("X")
Xs = TypeVarTuple("Xs")


@overload
def cond(pred: ArrayLike, true_fun: Callable[[*Xs], R], false_fun: Callable[[*Xs], R], *operands: *Xs) -> R: ...
@overload
def cond(pred: ArrayLike, true_fun: Callable[[X], R], false_fun: Callable[[X], R], *, operand: X) -> R: ...
def cond(  # type: ignore[misc]  # mypy does not see that `*Any` takes what `*Xs` does
    pred: Any, true_fun: Callable[..., Any], false_fun: Callable[..., Any], *operands: Any, operand: Any = _NONE
) -> Any:
    """Run one of two functions; as `jax.lax.cond`, with states.

    Args:
      pred: a boolean scalar.
      true_fun: what is run if it is true.
      false_fun: what is run if not.
      *operands: their arguments.
      operand: a single argument, as in `jax.lax.cond`.

    Raises:
      StateTypeError: a branch changes a state's shape or dtype.
      StructureError: a branch makes states or changes attributes, or the results differ in structure.

    Example:
      >>> import mutatis as mu
      >>> n = mu.Variable(0)
      >>> def add():
      ...     n.value += 1
      >>> mu.cond(True, add, lambda: None); mu.cond(False, add, lambda: None)
      >>> int(n)
      1
    """
    if operand is not _NONE:
        operands = (operand,)
    if runs_eagerly():
        return compiled("cond", _choose_compiled, (false_fun, true_fun), {"name": "cond"}, pred, operands)
    return _choose("cond", pred, (false_fun, true_fun), operands)


@overload
def switch(index: ArrayLike, branches: Sequence[Callable[[*Xs], R]], *operands: *Xs) -> R: ...
@overload
def switch(index: ArrayLike, branches: Sequence[Callable[[X], R]], *, operand: X) -> R: ...
def switch(  # type: ignore[misc]  # mypy does not see that `*Any` takes what `*Xs` does
    index: Any, branches: Sequence[Callable[..., Any]], *operands: Any, operand: Any = _NONE
) -> Any:
    """Run one of several functions; as `jax.lax.switch`, with states. The index is clamped.

    Example:
      >>> import mutatis as mu
      >>> n = mu.Variable(0)
      >>> mu.switch(2, [lambda: n.set(1), lambda: n.set(2), lambda: n.set(3)])
      >>> int(n)
      3
    """
    if not branches:
        raise ArgumentError(
            "`switch` has no branches", expected="at least one function", cure="Give a list of functions."
        )
    if operand is not _NONE:
        operands = (operand,)
    if runs_eagerly():
        return compiled("switch", _choose_compiled, tuple(branches), {"name": "switch"}, index, operands)
    return _choose("switch", index, tuple(branches), operands)


def _choose_compiled(functions: Sequence[Any], options: dict[str, Any], operands: Any) -> Any:
    index, arguments = operands
    return _choose(options["name"], index, tuple(functions), arguments)


def _choose(name: str, index: Any, functions: tuple[Any, ...], operands: tuple[Any, ...]) -> Any:
    with CallSite(name, functions[-1], operands, functions=functions[:-1]) as site:
        packed = FlatTree(operands)
        cells = site.scope.cells
        branches: list[Staged] = []
        for function in functions:
            staged = stage(site, cells, {}, packed.leaves, _caller(function, packed))
            refuse_structure(site, staged.end, "a branch")
            branches.append(staged)
        every: list[Any] = list(dict.fromkeys(cell for staged in branches for cell in staged.cells))
        values = dict(zip(every, site.values(every), strict=True))
        written: list[Any] = list(
            dict.fromkeys(cell for staged in branches for cell in staged.end.cells if cell not in staged.end.born)
        )
        for staged in branches:
            for cell in written:
                if cell in staged.values:
                    check_kept(site, staged, cell, values[cell], "in a branch")
        _check_results(site, name, branches)

        def pure(staged: Staged) -> Callable[[Any, Any], Any]:
            def branch(states: list[Any], leaves: list[Any]) -> Any:
                now = {**values, **dict(zip(written, states, strict=True))}
                out, new = staged(now, leaves)
                return [new.get(cell, now[cell]) for cell in written], out

            return branch

        inputs = ([values[cell] for cell in written], packed.leaves)
        if name == "cond":
            new, leaves = jax.lax.cond(index, pure(branches[1]), pure(branches[0]), *inputs)
        else:
            new, leaves = jax.lax.switch(index, [pure(staged) for staged in branches], *inputs)
        for cell, value in zip(written, new, strict=True):
            access.write(cell, value)
        return branches[0].end.unflatten(leaves)


def _caller(function: Callable[..., Any], packed: FlatTree) -> Callable[[Any], Any]:
    return lambda leaves: function(*packed.unflatten(leaves))


def _check_results(site: CallSite, name: str, branches: Sequence[Staged]) -> None:
    names = ("the false branch", "the true branch") if name == "cond" else [f"branch {n}" for n in range(len(branches))]
    first = branches[0]
    for number, staged in enumerate(branches):
        same_nodes = [id(node) for node in staged.end.nodes] == [id(node) for node in first.end.nodes]
        if staged.end.structure != first.end.structure or not same_nodes:
            raise StructureError(
                "the branches return different structures",
                where=site.label,
                expected=f"what {names[0]} returns: {show_structure(first.end.structure[0])}",
                got=f"{names[number]}: {show_structure(staged.end.structure[0])}",
                cure="Return the same containers (and the same modules) from every branch.",
            )
