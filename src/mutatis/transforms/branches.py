"""`mu.cond` and `mu.switch`: branches that read and write state.

Each branch is staged once. Every state that some branch writes is a result of all of them: a branch that does not write it
passes it on, so the branch that is not taken leaves states alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, TypeVarTuple, overload

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mutatis.compilation.eager_control import compiled, runs_eagerly
from mutatis.core import access
from mutatis.core.avals import show_type
from mutatis.core.calls import check_function, takes
from mutatis.core.showing import show_class, show_structure, show_value
from mutatis.errors import ArgumentError, StateTypeError, StructureError
from mutatis.model.variables import Variable
from mutatis.tracing.arguments import FlatTree, leaf_places
from mutatis.tracing.call_site import CallSite
from mutatis.tracing.masks import Masked
from mutatis.tracing.staging import Staged, check_kept, refuse_structure, stage, stage_together
from mutatis.tracing.unrolled import decides_in_python, run_once

_NONE = object()

R = TypeVar("R")
X = TypeVar("X")
Xs = TypeVarTuple("Xs")

_COND = (
    "Give what to test, and two functions, also for doing nothing (`lambda *_: None`): "
    "`mu.cond(pred, true_fun, false_fun, *operands)`."
)
_SWITCH = "Give the number, and a list of functions: `mu.switch(index, [f, g], *operands)`."


@overload
def cond(pred: ArrayLike, true_fun: Callable[[*Xs], R], false_fun: Callable[[*Xs], R], *operands: *Xs) -> R: ...
@overload
def cond(pred: ArrayLike, true_fun: Callable[[X], R], false_fun: Callable[[X], R], *, operand: X) -> R: ...
@takes("mu.cond(pred, true_fun, false_fun, *operands)", _=_COND)  # type: ignore[misc]  # `*Any` takes what `*Xs` does
def cond(
    pred: Any, true_fun: Callable[..., Any], false_fun: Callable[..., Any], *operands: Any, operand: Any = _NONE
) -> Any:
    """Run one of two functions, by a condition that may be an array; as `jax.lax.cond`, with states.

    In compiled code a Python ``if`` cannot test an array, and `cond` can. Only the branch that runs changes states.

    Args:
      pred: a boolean scalar.
      true_fun: the function that runs if `pred` is true.
      false_fun: the function that runs if `pred` is false. It returns the same structure, shapes and dtypes.
      *operands: the arguments of both functions.
      operand: a single argument, as in `jax.lax.cond`.

    Returns:
      The result of the function that ran.

    Raises:
      StateTypeError: a branch changes a state's shape or dtype.
      StructureError: a branch makes states or changes attributes, or the results differ in structure.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> skipped = mu.Variable(0)
      >>> def skip(x):
      ...     skipped.value += 1
      ...     return jnp.zeros_like(x)
      >>> @mu.jit
      ... def step(x):
      ...     return mu.cond(jnp.isfinite(x), lambda x: x, skip, x)
      >>> float(step(1.0)), float(step(jnp.nan)), int(skipped)
      (1.0, 0.0, 1)
    """
    _check_choice("cond", pred, _COND)
    check_function(true_fun, "cond", "true_fun", _COND)
    check_function(false_fun, "cond", "false_fun", _COND)
    if operand is not _NONE:
        operands = (operand,)
    if runs_eagerly():
        return compiled(
            "cond",
            _choose_compiled,
            (false_fun, true_fun),
            {"name": "cond"},
            pred,
            operands,
            names=("pred", "operands"),
        )
    return _choose("cond", pred, (false_fun, true_fun), operands)


@overload
def switch(index: ArrayLike, branches: Sequence[Callable[[*Xs], R]], *operands: *Xs) -> R: ...
@overload
def switch(index: ArrayLike, branches: Sequence[Callable[[X], R]], *, operand: X) -> R: ...
@takes("mu.switch(index, [f, g], *operands)", _=_SWITCH)  # type: ignore[misc]  # `*Any` takes what `*Xs` does
def switch(index: Any, branches: Sequence[Callable[..., Any]], *operands: Any, operand: Any = _NONE) -> Any:
    """Run one of several functions, by its number; as `jax.lax.switch`, with states.

    Only the branch that runs changes states.

    Args:
      index: an integer scalar, the number of the branch from 0. A smaller one runs the first branch, and a larger one the last.
      branches: the functions. All return the same structure, shapes and dtypes.
      *operands: the arguments of all functions.
      operand: a single argument, as in `jax.lax.switch`.

    Returns:
      The result of the function that ran.

    Raises:
      StateTypeError: a branch changes a state's shape or dtype.
      StructureError: a branch makes states or changes attributes, or the results differ in structure.

    Example:
      >>> import mutatis as mu
      >>> n = mu.Variable(0)
      >>> mu.switch(2, [lambda: n.set(1), lambda: n.set(2), lambda: n.set(3)])
      >>> int(n)
      3
    """
    _check_choice("switch", index, _SWITCH)
    if not isinstance(branches, Sequence):
        raise ArgumentError(
            "`mu.switch` takes its functions as a list",
            path="branches",
            expected="a list of functions",
            got=show_class(branches),
            cure=_SWITCH,
        )
    for branch in branches:
        check_function(branch, "switch", "branches", _SWITCH)
    if not branches:
        raise ArgumentError("`switch` has no branches", expected="at least one function", cure=_SWITCH)
    if operand is not _NONE:
        operands = (operand,)
    if runs_eagerly():
        return compiled(
            "switch",
            _choose_compiled,
            tuple(branches),
            {"name": "switch"},
            index,
            operands,
            names=("index", "operands"),
        )
    return _choose("switch", index, tuple(branches), operands)


def _choose_compiled(functions: Sequence[Any], options: dict[str, Any], operands: Any) -> Any:
    index, arguments = operands
    return _choose(options["name"], index, tuple(functions), arguments)


def _choose(name: str, index: Any, functions: tuple[Any, ...], operands: tuple[Any, ...]) -> Any:
    with CallSite(name, functions[-1], operands, functions=functions[:-1]) as site:
        index = index.get() if isinstance(index, Variable) else index
        if index is not None and jnp.shape(index):
            raise ArgumentError(
                "one branch is taken, and there are several values to choose it by",
                where=site.label,
                expected="a scalar",
                got=show_value(index),
                cure="Choose by one, `jnp.any(index)`; or choose for each element, `jnp.where(index, x, y)`, or lane: "
                "`mu.vmap(lambda i: mu.cond(i, lambda: 1, lambda: 0))(index)`.",
            )
        packed = FlatTree(operands)
        if decides_in_python(index):
            number = int(bool(index)) if name == "cond" else min(max(operator.index(index), 0), len(functions) - 1)
            call = _caller(name, functions[number], packed)
            end, leaves, changed, _ = run_once(site, "a branch", {}, lambda: call(packed.leaves))
            access.write_many([*changed], [*changed.values()])
            return end.unflatten(leaves)
        cells = site.scope.cells

        def stage_branch(number: int) -> Masked:
            call = _caller(name, functions[number], packed)
            branch = Masked(site, lambda leaves, call: stage(site, cells, {}, leaves, call), packed.leaves, call)
            refuse_structure(site, branch.staged.end, "a branch")
            return branch

        masked: list[Masked] = stage_together(site, lambda: [stage_branch(n) for n in range(len(functions))])
        branches = [branch.staged for branch in masked]
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

        def chosen() -> jax.Array:
            given = jnp.asarray(index, jnp.bool_) if name == "cond" else index
            return jnp.clip(jnp.asarray(given, jnp.int32), 0, len(branches) - 1)

        def pure(number: int) -> Callable[[Any, Any], Any]:
            def branch(states: list[Any], leaves: list[Any]) -> Any:
                now = {**values, **dict(zip(written, states, strict=True))}
                out, new = masked[number](now, leaves, lambda: chosen() == number)
                return [new.get(cell, now[cell]) for cell in written], out

            return branch

        inputs = ([values[cell] for cell in written], packed.leaves)
        try:
            if name == "cond":
                new, leaves = jax.lax.cond(index, pure(1), pure(0), *inputs)
            else:
                new, leaves = jax.lax.switch(index, [pure(n) for n in range(len(branches))], *inputs)
        except TypeError as error:
            _refuse_types(site, name, branches, error)
            raise
        for cell, value in zip(written, new, strict=True):
            access.write(cell, value)
        return branches[0].end.unflatten(leaves)


def _check_choice(name: str, index: Any, cure: str) -> None:
    """Refuse a function, or anything else that is called, in the place of what chooses a branch."""
    if callable(index):
        parameter = "pred" if name == "cond" else "index"
        raise ArgumentError(
            f"`mu.{name}` was given what is called, and not tested, as its `{parameter}`",
            path=parameter,
            expected="a boolean scalar" if name == "cond" else "an integer scalar",
            got=show_class(index),
            cure=cure,
        )


def _caller(name: str, function: Callable[..., Any], packed: FlatTree) -> Callable[[Any], Any]:
    def call(leaves: Any) -> Any:
        operands = packed.unflatten(leaves)
        out = function(*operands)
        packed.refuse_moved(operands, name)
        return out

    return call


def _refuse_types(site: CallSite, name: str, branches: Sequence[Staged], error: TypeError) -> None:
    """Say which results of the branches have different types, if that is what JAX refused.

    Raises:
      StateTypeError: some have.
    """
    names = _names(name, branches)
    places = leaf_places(branches[0].end.unflatten(branches[0].leaves))
    for place, *kinds in zip(places, *(staged.leaves for staged in branches), strict=True):
        shown = [show_type(kind) for kind in kinds]
        if len(set(shown)) > 1:
            other = next(number for number, text in enumerate(shown) if text != shown[0])
            raise StateTypeError(
                "the branches return different types" + (f" at {place}" if place else ""),
                where=site.label,
                expected=f"what {names[0]} returns: {shown[0]}",
                got=f"{names[other]}: {shown[other]}",
                cure="Return arrays of one shape from every branch: `jnp.broadcast_to(x, (3,))`."
                if len({str(kind.dtype) for kind in kinds}) == 1
                else "Return arrays of one type from every branch: `jnp.asarray(x, jnp.float32)`.",
            ) from error


def _names(name: str, branches: Sequence[Staged]) -> Sequence[str]:
    """What the branches go by in messages."""
    return ("the false branch", "the true branch") if name == "cond" else [f"branch {n}" for n in range(len(branches))]


def _check_results(site: CallSite, name: str, branches: Sequence[Staged]) -> None:
    names = _names(name, branches)
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
