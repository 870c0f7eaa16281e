"""Accumulation: a gradient over a batch that does not fit into memory, as the mean over microbatches.

States are carried from one microbatch to the next, as in a loop by hand: statistics move, streams advance, counts count.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mutatis.core.avals import show_type
from mutatis.core.calls import is_count
from mutatis.core.nodes import is_node
from mutatis.core.showing import show_class, show_value
from mutatis.errors import ArgumentError
from mutatis.model.state import State
from mutatis.tracing.transformed import Transformed
from mutatis.transforms.abstract import eval_shape
from mutatis.transforms.autodiff import grad, value_and_grad
from mutatis.transforms.loops import scan

P = ParamSpec("P")
R = TypeVar("R")

_USE = "`mu.accumulate(mu.value_and_grad(loss_fn), 4)(model, batch)`"


def accumulate(
    f: Callable[P, R], steps: int, *, in_axes: int | Sequence[int | None] | None = 0, average: bool = True
) -> Transformed[P, R]:
    """Make a function that cuts its batch into microbatches, calls `f` on each of them, and returns the mean of the results.

    Use it for a batch that does not fit into memory: with a loss that is a mean over the batch,
    ``mu.accumulate(mu.value_and_grad(loss_fn), steps)`` returns the loss and the gradients of the whole batch, and needs the
    memory of one microbatch. The microbatches run one after another, in one `mu.scan`, so a state that `f` writes goes from one
    to the next: a batch norm updates its statistics `steps` times. `f` is traced twice: the first time only for the shapes of the
    results.

    Args:
      f: a function of modules and arrays whose results are floats; mostly `mu.grad` or `mu.value_and_grad` of a loss function.
      steps: the number of microbatches, an int. It must divide the size of the batch.
      in_axes: the batch axis of the arrays among the arguments: an int, or a tuple with one int for each positional argument.
        None passes an argument to each microbatch whole. Modules, `State`s, numbers and arrays without axes are always passed
        whole, and arrays among the keyword arguments are cut along axis 0. The arrays that are cut have one size along their
        batch axes.
      average: whether to average the results. If False they are summed, for a loss that is a sum over the batch.

    Returns:
      A function with the arguments and the results of `f`. The auxiliary result of a loss with `has_aux` comes back stacked, with
      an axis of length `steps` in front.

    Raises:
      ArgumentError: the size of a batch is not a multiple of `steps`, two batches have different sizes, no argument is a batch,
        or a result is not a float.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> model = mu.nn.Linear(3, 1, rngs=mu.Rngs(0))
      >>> def loss_fn(model, x):
      ...     return jnp.mean(model(x) ** 2)
      >>> x = jnp.arange(24.0).reshape(8, 3)
      >>> loss, grads = mu.accumulate(mu.value_and_grad(loss_fn), 4)(model, x)  # 4 microbatches of 2
      >>> bool(jnp.allclose(loss, loss_fn(model, x))), grads["kernel"].shape
      (True, (3, 1))
    """
    if not is_count(steps):
        raise ArgumentError(
            f"a batch cannot be cut into {show_value(steps)} microbatches",
            path="steps",
            expected="an int from 1 on",
            got=show_value(steps),
            cure=_USE,
        )
    axes = in_axes if in_axes is None or isinstance(in_axes, int) else tuple(in_axes)
    aux = _has_aux(f)

    def call(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cut, whole, parts = _cut(args, kwargs, axes, steps)

        def once(whole: list[Any], parts: list[Any]) -> Any:
            args, kwargs = cut.filled(whole, parts)
            return function(*args, **kwargs)

        def body(carry: Any, parts: list[Any]) -> Any:
            total, whole = carry
            out = once(whole, parts)
            total = jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, _summed(out, aux))
            return (total, whole), _beside(out, aux)

        first = [jax.ShapeDtypeStruct(part.shape[1:], part.dtype) for part in parts]
        shapes = eval_shape(once, whole, first)
        start = jax.tree.map(_zeros, _summed(shapes, aux))
        (total, _), beside = scan(body, (start, whole), parts)
        scale = 1 / steps if average else 1.0
        result = jax.tree.map(lambda a, shape: (a * scale).astype(shape.dtype), total, _summed(shapes, aux))
        return _together(result, beside, aux)

    return Transformed(f, functools.partial(accumulate, steps=steps, in_axes=axes, average=average), call)


def _has_aux(f: Any) -> str | None:
    """Where the result of a function has what is no value or gradient, if it is known to have it."""
    remake = getattr(f, "remake", None)
    public = getattr(remake, "func", None)
    if public not in (grad, value_and_grad) or not remake.keywords.get("has_aux"):  # type: ignore[union-attr]
        return None
    return "grad" if public is grad else "value_and_grad"


def _summed(out: Any, aux: str | None) -> Any:
    if aux == "value_and_grad":
        return out[0][0], out[1]
    return out[0] if aux == "grad" else out


def _beside(out: Any, aux: str | None) -> Any:
    return out[0][1] if aux == "value_and_grad" else out[1] if aux == "grad" else None


def _together(summed: Any, beside: Any, aux: str | None) -> Any:
    if aux == "value_and_grad":
        return (summed[0], beside), summed[1]
    return (summed, beside) if aux == "grad" else summed


def _zeros(leaf: Any) -> jax.Array:
    """Where the sum of results starts: in float32, at least, so that many small ones count.

    Raises:
      ArgumentError: the results are no floats.
    """
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        raise ArgumentError(
            "`accumulate` takes the mean of floats",
            expected="a function that gives floats, such as a loss and gradients",
            got=f"a result of {show_type(leaf)}",
            cure="Give what is no loss beside it, `mu.value_and_grad(loss_fn, has_aux=True)`: it comes back stacked.",
        )
    with jax.numpy_dtype_promotion("standard"):
        return jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32))


class _Arguments:
    """The arguments of a call without its arrays, which loops are given as their own.

    Args:
      leaves: modules, numbers and all else that is no array, by number.
      treedef: the structure of ``(args, kwargs)``.
      whole: the numbers of the arrays that each microbatch gets.
      cut: the numbers of those that are cut.
    """

    def __init__(self, leaves: dict[int, Any], treedef: Any, whole: tuple[int, ...], cut: tuple[int, ...]) -> None:
        self._leaves = leaves
        self._treedef = treedef
        self._whole = whole
        self._cut = cut

    def filled(self, whole: list[Any], parts: list[Any]) -> Any:
        """The arguments of a microbatch: ``(args, kwargs)``."""
        arrays = zip((*self._whole, *self._cut), (*whole, *parts), strict=True)
        leaves = {**self._leaves, **dict(arrays)}
        return jax.tree.unflatten(self._treedef, [leaves[n] for n in range(len(leaves))])


def _cut(args: Any, kwargs: Any, axes: Any, steps: int) -> tuple[_Arguments, list[Any], list[jax.Array]]:
    """The arguments of a call, the arrays that each microbatch gets whole, and the others as microbatches.

    Args:
      args, kwargs: the arguments.
      axes: the batch axis, or one for each of `args`.
      steps: the number of microbatches.

    Raises:
      ArgumentError: `axes` are not as many, or there is no batch, or one that cannot be cut.
    """
    if isinstance(axes, tuple) and len(axes) != len(args):
        raise ArgumentError(
            "`in_axes` does not fit the arguments of an accumulated function",
            path="in_axes",
            expected=f"{len(args)} axes",
            got=show_value(axes),
            cure="One axis is for all, `in_axes=0`; or one for each positional argument, None for what is no batch: "
            "`in_axes=(None, 0)`.",
        )
    each = axes if isinstance(axes, tuple) else (axes,) * len(args)
    leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=_is_whole)
    chosen = [axis for arg, axis in zip(args, each, strict=True) for _ in jax.tree.leaves(arg, is_leaf=_is_whole)]
    chosen += [0] * (len(leaves) - len(chosen))
    is_array = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
    cut = tuple(n for n, leaf in enumerate(leaves) if is_array[n] and leaf.ndim and chosen[n] is not None)
    whole = tuple(n for n, leaf in enumerate(leaves) if n not in cut and (is_array[n] or isinstance(leaf, State)))
    if not cut:
        raise ArgumentError(
            "an accumulated function was called without a batch",
            expected="an array among its arguments",
            got=", ".join(map(show_class, args)) or "no arguments",
            cure=f"Hand the batch in: {_USE}.",
        )
    _check_sizes({n: leaves[n].shape for n in cut}, chosen)
    rest = {n: leaf for n, leaf in enumerate(leaves) if n not in cut and n not in whole}
    parts = [_parts(leaves[n], chosen[n], steps) for n in cut]
    return _Arguments(rest, treedef, whole, cut), [leaves[n] for n in whole], parts


def _check_sizes(shapes: dict[int, tuple[int, ...]], axes: list[int]) -> None:
    """Raise unless all that is cut is as long: what has another size, such as class weights, is no part of the batch."""
    sizes = {shape[axes[n]] for n, shape in shapes.items() if -len(shape) <= axes[n] < len(shape)}
    if len(sizes) > 1:
        raise ArgumentError(
            "the arguments of an accumulated function are batches of different sizes",
            path="in_axes",
            expected="one size along the batch axes of all arrays that are cut",
            got=", ".join(f"shape {shape} along axis {axes[n]}" for n, shape in shapes.items()),
            cure="What is no batch, such as the weights of classes, is passed whole: `in_axes=(None, 0, 0, None)`, with one "
            "entry for each positional argument; or the function closes over it.",
        )


def _is_whole(x: Any) -> bool:
    return is_node(x) or isinstance(x, State)


def _parts(array: Any, axis: int, steps: int) -> jax.Array:
    """A batch as microbatches, along a new axis 0."""
    if not -array.ndim <= axis < array.ndim or array.shape[axis] % steps:
        raise ArgumentError(
            f"a batch cannot be cut into {steps} equal microbatches",
            path="steps",
            expected=f"an array whose size along axis {axis} is a multiple of {steps}",
            got=f"an array of shape {array.shape}",
            cure="Drop or pad what is left over, or choose `steps` so that it divides the batch. What is no batch is said by "
            "`in_axes=(None, 0)`.",
        )
    axis %= array.ndim
    shape = array.shape
    cut = jnp.reshape(array, (*shape[:axis], steps, shape[axis] // steps, *shape[axis + 1 :]))
    return jnp.moveaxis(cut, axis, 0)
