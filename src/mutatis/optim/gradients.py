"""What an optimizer is given: whether it is a transformation, and gradients of its parameters; and what else people give."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from mutatis.core.avals import shapes_of, show_type
from mutatis.core.naming import show_path
from mutatis.core.nodes import is_node
from mutatis.core.showing import show_class, show_value
from mutatis.errors import ArgumentError, OptimizerError
from mutatis.model.filters import Path
from mutatis.model.state import State
from mutatis.model.walks import variables
from mutatis.tracing.transformed import Transformed


def check_transformation(model: Any, tx: Any) -> None:
    """Refuse what is no optax transformation.

    Raises:
      ArgumentError: it is none.
    """
    if all(callable(getattr(tx, name, None)) for name in ("init", "update")) and not (
        isinstance(tx, type) or is_node(tx)
    ):
        return
    raise ArgumentError(
        f"{show_value(tx)} is not an optax transformation",
        path="tx",
        expected="an object with the methods `init` and `update`, such as `optax.adam(1e-3)`",
        got=show_class(tx),
        cure=_transformation_of(model, tx),
    )


def _transformation_of(model: Any, tx: Any) -> str:
    """What to write for what was given as a transformation."""
    import optax

    make = "Make the transformation: `mu.Optimizer(model, optax.{}(1e-3))`."
    if is_node(tx) and callable(getattr(model, "update", None)):
        return "The model comes first: `mu.Optimizer(model, tx)`."
    name = tx if isinstance(tx, str) else getattr(tx, "__name__", "")
    known = getattr(optax, name.lower(), None) if name.isidentifier() else None
    if callable(known) and (known is tx or isinstance(tx, str)):
        rated = "learning_rate" in inspect.signature(known).parameters
        return make.format(name.lower() if rated else "adam")
    if isinstance(tx, list | tuple) and tx:
        return "Several are one after the other: `mu.Optimizer(model, optax.chain(*tx))`."
    if callable(tx) and not isinstance(tx, type):
        first = make.format("adam").replace("Make", "If it makes one, make")
        return f"A schedule is the rate of one: `mu.Optimizer(model, optax.adam(schedule))`. {first}"
    if isinstance(tx, int | float) and not isinstance(tx, bool):
        return f"A rate alone does not say how to step: `mu.Optimizer(model, optax.adam({tx!r}))`."
    return make.format("adam")


def check_gradients(grads: Any, values: State) -> State:
    """The gradients as a State of the parameters' paths.

    Raises:
      OptimizerError: some are missing, of no parameter, or of another shape, all listed; or an ArgumentError: they are none.
    """
    flat = dict(_gradients_by_path(_as_state(grads, values), (), frozenset(values.flat())))
    problems = [f"missing:    {show_path(path)}" for path in values if path not in flat]
    problems += [
        f"unexpected: {show_path(path) or f'one value for all, {show_value(value)}'}"
        for path, value in flat.items()
        if path not in values.flat()
    ]
    for path, value in values.flat().items():
        if path in flat and shapes_of(flat[path]) != shapes_of(value):
            problems.append(f"{show_path(path)}: expected {show_type(value)}, got {show_type(flat[path])}")
    if problems:
        check_are_gradients(grads)
        raise OptimizerError(
            "the gradients do not fit the parameters of the optimizer",
            differences=problems,
            cure="Differentiate the model that the optimizer was made with, by the same `wrt`.",
        )
    return State(flat, values.kinds())


def check_are_gradients(given: Any) -> None:
    """Refuse what people give in the place of gradients, which do not fit.

    Raises:
      ArgumentError: it is a model, a loss, what differentiates, or gradients among other things.
    """
    from_loss = "`optimizer.update(mu.grad(loss_fn)(model, x))`"
    states = [isinstance(part, State) for part in given] if isinstance(given, list | tuple) else []
    if states == [True]:
        got, cure = f"a {type(given).__name__} of them", "Take them out: `optimizer.update(grads[0])`."
    elif states in ([True, False], [False, True]):
        aux = ", has_aux=True" if states[0] or isinstance(given[0], tuple) else ""
        function = "mu.grad" if states[0] else "mu.value_and_grad"
        names = "grads, aux" if states[0] else "(loss, aux), grads" if aux else "loss, grads"
        got = f"a pair, as `{function}` gives it"
        cure = f"Take it apart: `{names} = {function}(loss_fn{aux})(model, x)`, then `optimizer.update(grads)`."
    elif isinstance(given, Transformed):
        got, cure = "a function that a transform made", f"Call it with the arguments of the loss: {from_loss}."
    elif is_node(given):
        got, cure = show_class(given), f"Differentiate it first: {from_loss}; with a model, that comes first."
    elif not isinstance(given, State | list | tuple | dict):
        got, cure = show_value(given), f"Differentiate the loss: {from_loss}."
    else:
        return
    raise ArgumentError("`update` was given what are no gradients", expected="what `mu.grad` gives", got=got, cure=cure)


def _as_state(grads: Any, values: State) -> Any:
    """Gradients by path, if they are a model, as raw `jax.grad` gives them: a copy with gradients in the place of values."""
    cells = variables(grads) if is_node(grads) else {}
    live = not cells or any(cell._frozen != "detached" for cell in cells.values())
    return grads if live else State({path: cell.get() for path, cell in cells.items() if path in values.flat()})


def _gradients_by_path(grads: Any, path: Path, ends: frozenset[Path]) -> Iterator[tuple[Path, Any]]:
    """The gradients by path; a container at the path of a parameter is a gradient."""
    if isinstance(grads, State):
        yield from (((*path, *inner), value) for inner, value in grads.flat().items())
    elif isinstance(grads, list | tuple | dict) and path not in ends:
        for key, part in grads.items() if isinstance(grads, dict) else enumerate(grads):
            yield from _gradients_by_path(part, (*path, key), ends)
    else:
        yield path, grads
