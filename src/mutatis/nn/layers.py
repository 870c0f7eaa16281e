"""What layers have in common.

- A size that is left out waits: the state holds its random key in place of a value (`Deferred`), and the layer creates
  the value at its first call, when the input shows the size. The key is a value like any other, so this works inside
  `jit` too, and draws the same numbers as if the size had been given.
- A setting may be said three times: in the call, else where the layer is made, else by `training` of the module.
- A setting that few layers change stands at the class (`Layer`); only what differs from it is an attribute of the layer.
- An input that does not fit is refused before JAX sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.nn.initializers import Initializer, ones, zeros
from jax.typing import ArrayLike, DTypeLike

from mutatis.core import access, naming
from mutatis.core.avals import show_type
from mutatis.core.calls import as_integer, as_shape
from mutatis.core.cells import Deferred
from mutatis.core.showing import show_value
from mutatis.errors import ArgumentError, RandomStreamError
from mutatis.model.kinds import Param
from mutatis.model.modules import Module
from mutatis.model.variables import Variable
from mutatis.random import Rngs, show_given, stream_of

Shape = tuple[int, ...]
Arrays = TypeVar("Arrays", bound=tuple[Any, ...])
PromoteDtype: TypeAlias = Callable[..., Any]  # (arrays, *, dtype) -> arrays, as `promote_dtype`
Metadata: TypeAlias = Mapping[str, Any]

NO_METADATA: Metadata = MappingProxyType({})


def param_key(layer: str, rngs: Rngs | None, init: Initializer | None = None) -> jax.Array | None:
    """A fresh key for a parameter of a layer; None for an initializer that needs none. The stream advances either way.

    Raises:
      RandomStreamError: there is no stream to draw from.
    """
    if not isinstance(rngs, Rngs):
        raise RandomStreamError(
            f"`nn.{layer}` cannot draw its parameters: `rngs` holds no random streams",
            path="params",
            expected="Rngs",
            got=show_given(rngs),
            cure=_rngs_of(rngs),
        )
    stream = stream_of(rngs, "params", f"`nn.{layer}`")
    if draws_nothing(init):
        stream.skip()
        return None
    return stream.draw()


def draws_nothing(init: Initializer | None) -> bool:
    """Whether an initializer is known to need no random key."""
    return init is zeros or init is ones


def _rngs_of(given: Any) -> str:
    """What to give as `rngs`, for what was given."""
    if isinstance(given, int):
        return f"A seed starts streams: `rngs=mu.Rngs({given})`."
    if isinstance(given, jax.Array):
        return "A key starts streams: `rngs = mu.Rngs(key)`, and then `rngs=rngs`."
    return "Make streams once, `rngs = mu.Rngs(0)`, and give them to every layer: `rngs=rngs`."


def parameter(
    init: Initializer, key: jax.Array | None, shape: Shape | None, dtype: DTypeLike, metadata: Metadata = NO_METADATA
) -> Param:
    """A parameter; without a shape, one that waits for `materialize`.

    Among the metadata, `sharding` is that of the state. Flax calls it `out_sharding`.
    """
    said = {"sharding" if name == "out_sharding" else name: value for name, value in metadata.items()}
    return Param(Deferred(key) if shape is None else init(key, sizes(shape), dtype), **said)


def sizes(shape: Shape) -> Shape:
    """A shape that is one.

    Raises:
      ArgumentError: a size of it is no integer from 0.
    """
    checked = as_shape(shape)
    if checked is None:
        raise ArgumentError(
            f"a layer cannot have parameters of shape {shape}",
            expected="sizes that are integers",
            got=", ".join(show_value(size) for size in shape if as_shape(size) is None),
            cure="The sizes of a layer, such as numbers of features, are ints: `nn.Linear(4, 8, rngs=rngs)`; a quotient of them "
            "is `n // 2`.",
        )
    return checked


def materialize(cell: Variable | None, init: Initializer | None, shape: Shape, dtype: DTypeLike) -> None:
    """Create the value of a state that waits for its shape; without `init` there is none."""
    if cell is not None and init is not None and type(placeholder := access.load(cell)) is Deferred:
        cell.value = init(placeholder.key, sizes(shape), dtype)
        cell._shape = tuple(shape)


class Layer(Module):
    """A module with the settings that layers share. What few layers change stands at the class, until one does."""

    dtype: Any = None
    promote_dtype: Any
    preferred_element_type: Any = None
    use_bias: Any = True
    use_scale: Any = True
    kernel_init: Any = None  # kept where the kernel waits for its size

    def _settle(self, **settings: Any) -> None:
        """Keep the settings that differ from those of the class."""
        for name, value in settings.items():
            if value is not getattr(type(self), name):
                setattr(self, name, value)

    def _accept(self, owner: Variable | Module, inputs: jax.Array) -> None:
        """Refuse integers, unless something says that they are numbers to compute with.

        Raises:
          ArgumentError: the input holds them.
        """
        if self.dtype is None and self.promote_dtype is promote_dtype and not jnp.issubdtype(inputs.dtype, jnp.inexact):
            raise misfit(
                owner,
                expected="floats",
                got=f"an input of {show_type(inputs)}",
                cure="Convert them, `x.astype(jnp.float32)`, or say so where the layer is made, `dtype=jnp.float32`. Numbers "
                "that stand for words or classes go through `nn.Embed` first.",
            )

    def _promote(self, owner: Variable | Module, inputs: jax.Array, *parameters: jax.Array | None) -> Any:
        """The input and the parameters in the dtype to compute in.

        Raises:
          ArgumentError: the input holds integers.
        """
        self._accept(owner, inputs)
        return self.promote_dtype((inputs, *parameters), dtype=self.dtype)

    def _options(self, out_sharding: Any = None) -> dict[str, Any]:
        """The options of a product that were said: a function of the user's need not know the others."""
        said = {"preferred_element_type": self.preferred_element_type, "out_sharding": out_sharding}
        return {name: value for name, value in said.items() if value is not None}


# `lax.dot_general` as `jnp.matmul` calls it: found by JAX without Python's help where it is not traced, differentiated at once,
# and gone from what is traced.
_dot_general = jax.jit(
    lax.dot_general,
    static_argnames=("dimension_numbers", "precision", "preferred_element_type", "out_sharding"),
    inline=True,
)


def contract(
    dot_general: Callable[..., jax.Array], x: jax.Array, y: jax.Array, dimensions: Any, **options: Any
) -> jax.Array:
    """A product by a layer's `dot_general`."""
    if dot_general is lax.dot_general:
        return _dot_general(x, y, dimension_numbers=dimensions, **options)
    return dot_general(x, y, dimensions, **options)


def as_array(value: ArrayLike) -> jax.Array:
    """`jnp.asarray(value)`, which takes its time over arrays, too.

    Raises:
      ArgumentError: it is a quantity with a unit, which layers do not know.
    """
    if isinstance(value, jax.Array):
        return value
    if hasattr(value, "to_decimal"):
        raise ArgumentError(
            "a layer was given a quantity with a unit",
            where=naming.where(),
            expected="an array of numbers",
            got=str(value),
            cure="Divide by the unit that the layer is to count in, `layer(x / saiunit.mV)`, and multiply what it gives.",
        )
    return jnp.asarray(value)


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
    raise misfit(
        cell,
        expected=f"{ndim} or more axes" + ("" if features is None else f", with {features} features along axis {axis}"),
        got=f"an input of shape {x.shape}",
        cure=(
            "Features, such as channels, are the last axis: `jnp.moveaxis(x, 1, -1)`. " if features in x.shape else ""
        )
        + "Give the size of the input where the layer is made, or None to take it from the first input: "
        "`nn.Linear(None, 10, rngs=rngs)`.",
    )


def misfit(owner: Variable | Module, *, expected: str, got: str, cure: str) -> ArgumentError:
    """The error for an input that does not fit a layer, which is named by one of its states, or by itself if it has none."""
    state = isinstance(owner, Variable)
    what = f"state {naming.describe(owner)}" if state else f"layer {naming.describe(owner)}"
    return ArgumentError(
        f"{what} does not fit the input{' of its layer' if state else ''}",
        path=naming.path_of(owner),
        where=naming.where(),
        expected=expected,
        got=got,
        made_at=naming.made_at(owner),
        cure=cure,
    )


def promote_dtype(args: Arrays, /, *, dtype: DTypeLike | None = None, inexact: bool = True) -> Arrays:
    """Arrays in one dtype: the one that is asked for, else what they promote to. None stays None.

    Args:
      args: a tuple of arrays, and of None for what a layer does not have.
      dtype: the dtype to compute in.
      inexact: whether integers become floats.

    Raises:
      ArgumentError: the dtype is one of integers.
    """
    given = [array for array in args if array is not None]
    if dtype is None:
        first = given[0]
        alike = all(isinstance(a, jax.Array) and a.dtype == first.dtype and not a.weak_type for a in given)
        if alike and not (inexact and not jnp.issubdtype(first.dtype, jnp.inexact)):
            return args
        dtype = jnp.result_type(*given)
        if inexact and not jnp.issubdtype(dtype, jnp.inexact):
            dtype = jnp.float32
    elif inexact and not jnp.issubdtype(dtype, jnp.inexact):
        raise ArgumentError(
            "a layer computes with floats",
            path="dtype",
            expected="a dtype of floats",
            got=show_value(jnp.dtype(dtype).name),
            cure="`dtype=jnp.float32`; None takes what the input and the parameters promote to.",
        )
    arrays: Any = tuple(None if array is None else jnp.asarray(array, dtype) for array in args)
    return arrays  # type: ignore[no-any-return]


def promote(dtype: DTypeLike | None, *arrays: jax.Array | None) -> list[Any]:
    """Arrays in the dtype to compute in: the one asked for, else what they promote to. None stays None."""
    return list(promote_dtype(arrays, dtype=dtype))


Layer.promote_dtype = staticmethod(promote_dtype)


def convert(array: jax.Array, dtype: DTypeLike) -> jax.Array:
    """`array.astype(dtype)`, which takes its time to do nothing."""
    return array if array.dtype == dtype and not array.weak_type else array.astype(dtype)


def alike(*arrays: jax.Array) -> list[jax.Array]:
    """Arrays in the dtype that they promote to: what a layer remembers or adds may be wider than what it computes with."""
    if len({array.dtype for array in arrays}) == 1:
        return list(arrays)
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*arrays)
    return [convert(array, dtype) for array in arrays]


def total(one: jax.Array, other: jax.Array) -> jax.Array:
    """The sum of two arrays of one shape, in the dtype that they promote to."""
    one, other = alike(one, other)
    return one + other


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


def add_bias(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    """A result plus a bias along its last axis, in the dtype of the result."""
    return y if bias is None else y + stretch(convert(bias, y.dtype), -1, y.ndim)


def first_said(*choices: bool | None) -> bool:
    """The first choice that is not None."""
    return next(choice for choice in choices if choice is not None)


def as_tuple(layer: str, name: str, value: int | Sequence[int] | None, length: int | None = None) -> Shape:
    """A number from 1 for each spatial axis; None is 1 for all.

    Raises:
      ArgumentError: there are more or fewer, or they are no such numbers.
    """
    if value is None:
        value = 1
    one = as_integer(value)
    shape = (one,) * (length or 1) if one is not None else as_shape(value)
    if shape is None or any(size < 1 for size in shape):
        raise ArgumentError(
            f"`nn.{layer}` cannot have `{name}={show_value(value)}`",
            path=name,
            expected="an int from 1, or one for each spatial axis",
            got=show_value(value),
            cure=f"`{name}={(3,) * (length or 2)}`",
        )
    if length is not None and len(shape) != length:
        raise ArgumentError(
            f"`nn.{layer}` has {length} spatial axes, and `{name}` is for {len(shape)}",
            path=name,
            expected=f"one int, or {length}",
            got=repr(value),
            cure=f"`{name}={(1,) * length}`",
        )
    return shape


def as_axes(axes: Any) -> Shape:
    """One integer, or several, as a tuple: axes, or a shape.

    Raises:
      ArgumentError: they are no integers.
    """
    one = as_integer(axes)
    several = [one] if one is not None else [as_integer(axis) for axis in axes] if np.iterable(axes) else [None]
    integers = tuple(axis for axis in several if axis is not None)
    if len(integers) != len(several):
        raise ArgumentError(
            f"{show_value(axes)} is neither an integer nor a tuple of integers",
            expected="an int, or a tuple of ints",
            got=show_value(axes),
            cure="A size of several axes is a tuple: `(4, 8)`.",
        )
    return integers
