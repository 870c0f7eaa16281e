"""What layers have in common.

- A size that is left out waits: the state holds its random key in place of a value (`Deferred`), and the layer creates
  the value at its first call, when the input shows the size. The key is a value like any other, so this works inside
  `jit` too, and draws the same numbers as if the size had been given.
- A setting may be said three times: in the call, else where the layer is made, else by `training` of the module.
- An input that does not fit is refused before JAX sees it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from mutatis.core import access, naming
from mutatis.core.cells import Deferred
from mutatis.core.showing import show_class
from mutatis.errors import ArgumentError, RandomStreamError
from mutatis.model.kinds import Param
from mutatis.model.variables import Variable
from mutatis.random import Rngs, stream_of

Shape = tuple[int, ...]


def param_key(layer: str, rngs: Rngs | None) -> jax.Array:
    """A fresh key for a parameter of a layer.

    Raises:
      RandomStreamError: there is no stream to draw from.
    """
    if not isinstance(rngs, Rngs):
        raise RandomStreamError(
            f"`nn.{layer}` cannot draw its parameters: `rngs` holds no random streams",
            path="params",
            expected="Rngs",
            got=show_class(rngs),
            cure=_rngs_of(rngs),
        )
    return stream_of(rngs, "params", f"`nn.{layer}`").draw()


def _rngs_of(given: Any) -> str:
    """What to give as `rngs`, for what was given."""
    if isinstance(given, int):
        return f"A seed starts streams: `rngs=mu.Rngs({given})`."
    if isinstance(given, jax.Array):
        return "A key starts streams: `rngs = mu.Rngs(key)`, and then `rngs=rngs`."
    return "Make streams once, `rngs = mu.Rngs(0)`, and give them to every layer: `rngs=rngs`."


def parameter(init: Initializer, key: jax.Array | None, shape: Shape | None, dtype: DTypeLike) -> Param:
    """A parameter; without a shape, one that waits for `materialize`."""
    return Param(Deferred(key) if shape is None else init(key, shape, dtype))


def materialize(cell: Variable | None, init: Initializer | None, shape: Shape, dtype: DTypeLike) -> None:
    """Create the value of a state that waits for its shape; without `init` there is none."""
    if cell is not None and init is not None and type(placeholder := access.load(cell)) is Deferred:
        cell.value = init(placeholder.key, shape, dtype)


def check_input(cell: Variable, x: jax.Array, *, along: int, times: int = 1, axis: int = -1, ndim: int = 1) -> int:
    """The number of features of an input, which has to be what the layer's state was made for.

    Args:
      cell: the state; any number fits one that waits for its shape.
      x: the input.
      along: the axis of the state that has the size of the features.
      times: how often they contain it.
      axis: where the features are in the input.
      ndim: the least number of axes of the input.

    Raises:
      ArgumentError: the input has too few axes, or another number of features.
    """
    features = None if cell.deferred else cell.shape[along] * times
    if x.ndim >= ndim and -x.ndim <= axis < x.ndim and features in (None, x.shape[axis]):
        return int(x.shape[axis])
    raise ArgumentError(
        f"state {naming.describe(cell)} does not fit the input of its layer",
        path=naming.path_of(cell),
        where=naming.where(),
        expected=f"{ndim} or more axes" + ("" if features is None else f", with {features} features along axis {axis}"),
        got=f"an input of shape {x.shape}",
        made_at=cell.made_at,
        cure="Give the size of the input where the layer is made, or None to take it from the first input: "
        "`nn.Linear(None, 10, rngs=rngs)`.",
    )


def promote(dtype: DTypeLike | None, *arrays: jax.Array | None) -> list[Any]:
    """Arrays in the dtype to compute in: the one asked for, else what they promote to. None stays None."""
    if dtype is None:
        given = [array for array in arrays if array is not None]
        if all(isinstance(a, jax.Array) and a.dtype == given[0].dtype and not a.weak_type for a in given):
            return list(arrays)
        dtype = jnp.result_type(*(array for array in arrays if array is not None))
    return [None if array is None else jnp.asarray(array, dtype) for array in arrays]


def convert(array: jax.Array, dtype: DTypeLike) -> jax.Array:
    """`array.astype(dtype)`, which takes its time to do nothing."""
    return array if array.dtype == dtype and not array.weak_type else array.astype(dtype)


def widen(dtype: DTypeLike) -> Any:
    """The dtype for sums over many elements: float32, or the given one if it is wider."""
    with jax.numpy_dtype_promotion("standard"):  # it is asked for here, so the strict mode need not refuse it
        return jnp.promote_types(dtype, jnp.float32)


def stretch(vector: jax.Array, axis: int, ndim: int) -> jax.Array:
    """A vector along one axis, with axes of size 1 around it: what broadcasts to `ndim` axes by rank.

    Along the last axis `jax.numpy` comes to the same by itself and traces it faster, unless it was told to refuse.
    """
    if axis % ndim == ndim - 1 and jax.config.jax_numpy_rank_promotion == "allow":
        return vector
    return jnp.expand_dims(vector, [other for other in range(ndim) if other != axis % ndim])


def first_said(*choices: bool | None) -> bool:
    """The first choice that is not None."""
    return next(choice for choice in choices if choice is not None)


def as_tuple(layer: str, name: str, value: int | Sequence[int], length: int | None = None) -> Shape:
    """A number for each spatial axis.

    Raises:
      ArgumentError: there are more or fewer.
    """
    numbers = (value,) * (length or 1) if isinstance(value, int) else tuple(value)
    if length is not None and len(numbers) != length:
        raise ArgumentError(
            f"`nn.{layer}` has {length} spatial axes, and `{name}` is for {len(numbers)}",
            path=name,
            expected=f"one int, or {length}",
            got=repr(value),
            cure=f"`{name}={(1,) * length}`",
        )
    return numbers
