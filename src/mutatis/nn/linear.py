"""Linear maps: `Linear` over the last axis, `LinearGeneral` over any axes, `Einsum` as an equation says."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn.initializers import Initializer, lecun_normal, zeros
from jax.typing import ArrayLike, DTypeLike

from mutatis.errors import ArgumentError
from mutatis.nn.layers import (
    NO_METADATA,
    Layer,
    Metadata,
    PromoteDtype,
    Shape,
    add_bias,
    as_array,
    as_axes,
    check_input,
    contract,
    convert,
    materialize,
    misfit,
    param_key,
    parameter,
    promote_dtype,
)
from mutatis.random import Rngs


def default_kernel_init(key: Any, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
    """LeCun's initializer, normal with variance 1 / fan_in: a function by name, which pickles."""
    return lecun_normal()(key, shape, dtype)


class Linear(Layer):
    """A fully connected layer: the affine map ``x @ kernel + bias`` over the last axis.

    Args:
      in_features: the size of the last axis of the input. None takes it from the first input.
      out_features: the size of the last axis of the output.
      use_bias: whether to add a bias.
      dtype: the dtype of the computation and of the output. None takes the common dtype of the input and the parameters.
      param_dtype: the dtype of the parameters.
      precision: the precision of the product, as in `jax.lax.dot_general`.
      kernel_init: the initializer of the kernel, as those of `jax.nn.initializers`. The default is LeCun's: normal with variance
        1 / in_features.
      bias_init: the initializer of the bias.
      dot_general: the function for the product, in place of `jax.lax.dot_general`.
      promote_dtype: the function that brings ``(inputs, kernel, bias)`` to one dtype; it is called with that tuple and
        ``dtype=``.
      preferred_element_type: the dtype of the product, as in `jax.lax.dot_general`.
      rngs: random streams; the parameters are drawn from the stream `params`.
      kernel_metadata: metadata of the kernel, such as ``{"sharding": ("embed", "mlp")}``.
      bias_metadata: metadata of the bias.

    Attributes:
      kernel: Param of shape (in_features, out_features).
      bias: Param of shape (out_features,), or None.

    Raises:
      RandomStreamError: there is no stream to draw the parameters from.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> layer = mu.nn.Linear(5, 3, rngs=mu.Rngs(0))
      >>> layer(jnp.ones((2, 5))).shape
      (2, 3)
      >>> layer.kernel.shape, layer.bias.shape
      ((5, 3), (3,))
    """

    dot_general: Any = staticmethod(lax.dot_general)

    def __init__(
        self,
        in_features: int | None,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = zeros,
        dot_general: Callable[..., jax.Array] = lax.dot_general,
        promote_dtype: PromoteDtype = promote_dtype,
        preferred_element_type: DTypeLike | None = None,
        rngs: Rngs,
        kernel_metadata: Metadata = NO_METADATA,
        bias_metadata: Metadata = NO_METADATA,
    ) -> None:
        shape = None if in_features is None else (in_features, out_features)
        key = param_key("Linear", rngs, kernel_init)
        self.kernel = parameter(kernel_init, key, shape, param_dtype, kernel_metadata)
        self.bias = None
        if use_bias:
            key = param_key("Linear", rngs, bias_init)
            self.bias = parameter(bias_init, key, (out_features,), param_dtype, bias_metadata)
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.kernel_init = kernel_init if in_features is None else None
        self._settle(
            use_bias=use_bias,
            dot_general=dot_general,
            promote_dtype=promote_dtype,
            preferred_element_type=preferred_element_type,
        )

    def __call__(self, inputs: ArrayLike, out_sharding: Any = None) -> jax.Array:
        """Apply the map to the last axis.

        Args:
          inputs: an array of floats, of shape (..., in_features).
          out_sharding: the sharding of the result, on a mesh whose axes are explicit.

        Returns:
          An array of shape (..., out_features).

        Raises:
          ArgumentError: the input has another number of features, or holds integers.
        """
        x = as_array(inputs)
        features = check_input(self.kernel, x, along=0)
        self._accept(self.kernel, x)
        materialize(self.kernel, self.kernel_init, (features, self.out_features), self.param_dtype)
        bias = None if self.bias is None else self.bias.value
        x, kernel, bias = self._promote(self.kernel, x, self.kernel.value, bias)
        dimensions = (((x.ndim - 1,), (0,)), ((), ()))
        options = self._options(out_sharding)
        return add_bias(contract(self.dot_general, x, kernel, dimensions, precision=self.precision, **options), bias)


class LinearGeneral(Layer):
    """An affine map over several axes of the input, which become the last axes of the output.

    Attention uses it to map features to heads, and heads back to features. The initializer draws the kernel as one matrix, with
    as many columns as there are output features, and reshapes it.

    Args:
      in_features: the sizes of the input axes that are mapped; an int is for one axis. None takes them from the first input.
      out_features: the sizes of the output axes that replace them; an int is for one axis.
      axis: the input axes that are mapped, as many as there are sizes in `in_features`.
      batch_axis: axes along which each entry has its own kernel and bias, with their sizes: ``{0: 8}``. They must be the
        leading axes of the input, in order.
      use_bias, dtype, param_dtype, kernel_init, bias_init, precision, promote_dtype, preferred_element_type, rngs,
        kernel_metadata, bias_metadata: as in `Linear`.
      dot_general: the function for the product. None takes `jax.lax.dot_general`.
      dot_general_cls: a function without arguments that returns the function for the product; it overrides `dot_general`.

    Attributes:
      kernel: Param of shape (*batch sizes, *in_features, *out_features).
      bias: Param of shape (*batch sizes, *out_features), or None.

    Raises:
      ArgumentError: there are more or fewer sizes than axes, or the batch axes are not the leading ones.
      RandomStreamError: there is no stream to draw the parameters from.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> to_heads = mu.nn.LinearGeneral(16, (4, 8), rngs=mu.Rngs(0))
      >>> from_heads = mu.nn.LinearGeneral((4, 8), 16, axis=(-2, -1), rngs=mu.Rngs(1))
      >>> heads = to_heads(jnp.ones((2, 16)))
      >>> heads.shape, from_heads(heads).shape
      ((2, 4, 8), (2, 16))
    """

    dot_general: Any = None
    dot_general_cls: Any = None

    def __init__(
        self,
        in_features: int | Sequence[int] | None,
        out_features: int | Sequence[int],
        *,
        axis: int | Sequence[int] = -1,
        batch_axis: Mapping[int, int] = MappingProxyType({}),
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = zeros,
        precision: lax.PrecisionLike = None,
        promote_dtype: PromoteDtype = promote_dtype,
        dot_general: Callable[..., jax.Array] | None = None,
        dot_general_cls: Any = None,
        preferred_element_type: DTypeLike | None = None,
        rngs: Rngs,
        kernel_metadata: Metadata = NO_METADATA,
        bias_metadata: Metadata = NO_METADATA,
    ) -> None:
        self.in_features = None if in_features is None else as_axes(in_features)
        self.out_features = as_axes(out_features)
        self.axis = as_axes(axis)
        self.batch_axis = dict(batch_axis)
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self._check_axes()
        shape = None if self.in_features is None else self._kernel_shape(self.in_features)
        key = param_key("LinearGeneral", rngs, kernel_init)
        self.kernel = parameter(self._flat(kernel_init), key, shape, param_dtype, kernel_metadata)
        self.bias = None
        if use_bias:
            key = param_key("LinearGeneral", rngs, bias_init)
            shape = (*self.batch_axis.values(), *self.out_features)
            self.bias = parameter(_as_vector(bias_init), key, shape, param_dtype, bias_metadata)
        self._settle(
            use_bias=use_bias,
            kernel_init=kernel_init if in_features is None else None,
            dot_general=dot_general,
            dot_general_cls=dot_general_cls,
            promote_dtype=promote_dtype,
            preferred_element_type=preferred_element_type,
        )

    def __call__(self, inputs: ArrayLike, out_sharding: Any = None) -> jax.Array:
        """Apply the map to the axes.

        Args:
          inputs: an array of floats with the sizes `in_features` along `axis`, and with the batch sizes along the batch axes.
          out_sharding: the sharding of the result, on a mesh whose axes are explicit.

        Returns:
          An array with the batch axes, then the axes that are not mapped, then `out_features`.

        Raises:
          ArgumentError: the input has other sizes, or holds integers.
        """
        x = as_array(inputs)
        axes = self._axes_in(x)
        self._accept(self.kernel, x)
        init = None if self.kernel_init is None else self._flat(self.kernel_init)
        shape = self._kernel_shape(tuple(x.shape[axis] for axis in axes))
        materialize(self.kernel, init, shape, self.param_dtype)
        bias = None if self.bias is None else self.bias.value
        x, kernel, bias = self._promote(self.kernel, x, self.kernel.value, bias)
        batch = tuple(range(len(self.batch_axis)))
        contracted = tuple(range(len(batch), len(batch) + len(axes)))
        dot_general = self.dot_general or lax.dot_general
        if self.dot_general_cls is not None:
            dot_general = self.dot_general_cls()
        dimensions = ((tuple(axes), contracted), (batch, batch))
        y = contract(dot_general, x, kernel, dimensions, precision=self.precision, **self._options(out_sharding))
        if bias is None:
            return y
        between = (1,) * (y.ndim - bias.ndim)
        return y + convert(bias, y.dtype).reshape(*bias.shape[: len(batch)], *between, *self.out_features)

    def _check_axes(self) -> None:
        if self.in_features is not None and len(self.in_features) != len(self.axis):
            raise ArgumentError(
                "`nn.LinearGeneral` needs a size for each axis that it maps",
                path="in_features",
                expected=f"as many sizes as there are in axis={self.axis}",
                got=repr(self.in_features),
                cure="`nn.LinearGeneral((4, 8), 16, axis=(-2, -1), rngs=rngs)`",
            )
        if list(self.batch_axis) != list(range(len(self.batch_axis))):
            raise ArgumentError(
                "the batch axes of `nn.LinearGeneral` are not the leading axes, in order",
                path="batch_axis",
                expected="axes 0, 1, ... and their sizes",
                got=repr(self.batch_axis),
                cure="Move them to the front, `jnp.moveaxis(x, axis, 0)`, and give `batch_axis={0: size}`.",
            )

    def _axes_in(self, x: jax.Array) -> Shape:
        """The axes to map, counted from the front."""
        sizes = dict(self.batch_axis)
        if not self.kernel.deferred:
            sizes.update(zip(self.axis, self.kernel.shape[len(sizes) :], strict=False))
        inside = all(-x.ndim <= axis < x.ndim for axis in (*self.axis, *self.batch_axis))
        if not inside or any(x.shape[axis] != size for axis, size in sizes.items()):
            raise misfit(
                self.kernel,
                expected=", ".join(f"{size} along axis {axis}" for axis, size in sizes.items()) or f"axes {self.axis}",
                got=f"an input of shape {x.shape}",
                cure="Say which axes to map where the layer is made: "
                "`nn.LinearGeneral((4, 8), 16, axis=(-2, -1), rngs=rngs)`.",
            )
        return tuple(axis % x.ndim for axis in self.axis)

    def _kernel_shape(self, in_features: Shape) -> Shape:
        return (*self.batch_axis.values(), *in_features, *self.out_features)

    def _flat(self, init: Initializer) -> Initializer:
        """An initializer that draws as for a matrix: all that goes in by all that comes out."""
        outputs = math.prod(self.out_features)

        def draw(key: Any, shape: Any, dtype: Any) -> Any:
            return init(key, (math.prod(shape[: len(shape) - len(self.out_features)]), outputs), dtype).reshape(shape)

        return draw


def _as_vector(init: Initializer) -> Initializer:
    return lambda key, shape, dtype: init(key, (math.prod(shape),), dtype).reshape(shape)


class Einsum(Layer):
    """A product of the input and a kernel by an equation of `jax.numpy.einsum`, plus a bias.

    Args:
      einsum_str: the equation, such as ``"nta,hab->nthb"``: the axes of the input, of the kernel, and of the output.
      kernel_shape: the sizes of the axes of the kernel.
      bias_shape: the sizes of those axes of the kernel that the output has, in the order of the output. None adds no bias.
      dtype, param_dtype, precision, kernel_init, bias_init, promote_dtype, preferred_element_type, rngs, kernel_metadata,
        bias_metadata: as in `Linear`.
      einsum_op: the function for the product, in place of `jax.numpy.einsum`.

    Attributes:
      kernel: Param of shape `kernel_shape`.
      bias: Param of shape `bias_shape`, or None.

    Raises:
      ArgumentError: the equation does not have two operands and ``->``, or `kernel_shape` does not fit it.
      RandomStreamError: there is no stream to draw the parameters from.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> layer = mu.nn.Einsum("nta,hab->nthb", kernel_shape=(8, 2, 4), bias_shape=(8, 4), rngs=mu.Rngs(0))
      >>> layer(jnp.ones((16, 11, 2))).shape
      (16, 11, 8, 4)
    """

    einsum_op: Any = staticmethod(jnp.einsum)

    def __init__(
        self,
        einsum_str: str,
        kernel_shape: Sequence[int],
        bias_shape: Sequence[int] | None = None,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = zeros,
        promote_dtype: PromoteDtype = promote_dtype,
        einsum_op: Callable[..., jax.Array] = jnp.einsum,
        preferred_element_type: DTypeLike | None = None,
        rngs: Rngs,
        kernel_metadata: Metadata = NO_METADATA,
        bias_metadata: Metadata = NO_METADATA,
    ) -> None:
        self.einsum_str = einsum_str.replace(" ", "")
        self.kernel_shape = tuple(kernel_shape)
        self._sizes(self.einsum_str, _operands(self.einsum_str)[1])
        self.bias_shape = None if bias_shape is None else tuple(bias_shape)
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        key = param_key("Einsum", rngs, kernel_init)
        self.kernel = parameter(kernel_init, key, self.kernel_shape, param_dtype, kernel_metadata)
        self.bias = None
        if self.bias_shape is not None:
            key = param_key("Einsum", rngs, bias_init)
            self.bias = parameter(bias_init, key, self.bias_shape, param_dtype, bias_metadata)
        self._settle(promote_dtype=promote_dtype, einsum_op=einsum_op, preferred_element_type=preferred_element_type)

    def __call__(self, inputs: ArrayLike, einsum_str: str | None = None, out_sharding: Any = None) -> jax.Array:
        """Compute the product and add the bias.

        Args:
          inputs: an array of floats, with the axes of the first operand of the equation.
          einsum_str: an equation for this call, in place of that of the layer.
          out_sharding: the sharding of the result, on a mesh whose axes are explicit.

        Returns:
          An array with the axes of the result of the equation.

        Raises:
          ArgumentError: the input or the bias does not fit the equation, or the input holds integers.
        """
        x = as_array(inputs)
        equation = self.einsum_str if einsum_str is None else einsum_str.replace(" ", "")
        of_input, of_kernel, of_result = _operands(equation)
        sizes = self._sizes(equation, of_kernel)
        self._check(equation, _labels(of_input, x.ndim), sizes, x)
        bias = None if self.bias is None else self.bias.value
        x, kernel, bias = self._promote(self.kernel, x, self.kernel.value, bias)
        y: jax.Array = self.einsum_op(equation, x, kernel, precision=self.precision, **self._options(out_sharding))
        if bias is None:
            return y
        shape = [sizes.get(label, 1) for label in _labels(of_result, y.ndim)]
        if math.prod(shape) != bias.size:
            raise ArgumentError(
                "the bias of `nn.Einsum` does not fit its equation",
                path="bias_shape",
                expected=f"{tuple(size for size in shape if size != 1)}, for {equation!r}",
                got=repr(bias.shape),
                cure="The bias has the axes of the kernel that are in the result, in its order.",
            )
        return y + convert(bias, y.dtype).reshape(shape)

    def _sizes(self, equation: str, of_kernel: str) -> dict[Any, int]:
        """The sizes of the kernel's axes by their labels."""
        labels = _labels(of_kernel, len(self.kernel_shape))
        if len(labels) != len(self.kernel_shape):
            raise ArgumentError(
                "the kernel of `nn.Einsum` does not fit its equation",
                path="kernel_shape",
                expected=f"a size for each of the axes `{of_kernel}`, in {equation!r}",
                got=repr(self.kernel_shape),
                cure='`nn.Einsum("...i,io->...o", (3, 4), (4,), rngs=rngs)`',
            )
        return dict(zip(labels, self.kernel_shape, strict=True))

    def _check(self, equation: str, labels: list[Any], sizes: dict[Any, int], x: jax.Array) -> None:
        wanted = {label: sizes[label] for label in labels if isinstance(label, str) and label in sizes}
        fits = len(labels) == x.ndim and all(
            label not in wanted or size == wanted[label] for label, size in zip(labels, x.shape, strict=True)
        )
        if not fits:
            expected = [
                f"axes `{equation.partition(',')[0]}`",
                *(f"{label} = {size}" for label, size in wanted.items()),
            ]
            raise misfit(
                self.kernel,
                expected=", ".join(expected),
                got=f"an input of shape {x.shape}",
                cure=f"Give the input the axes of the equation, {equation!r}; `...` stands for any number of axes.",
            )


def _operands(equation: str) -> tuple[str, str, str]:
    """The axes of the input, of the kernel and of the result."""
    operands, arrow, result = equation.partition("->")
    if not arrow or operands.count(",") != 1:
        raise ArgumentError(
            "`nn.Einsum` does not understand its equation",
            path="einsum_str",
            expected="an equation of two operands, the input and the kernel, with `->`",
            got=repr(equation),
            cure='`nn.Einsum("...i,io->...o", (3, 4), (4,), rngs=rngs)`',
        )
    of_input, _, of_kernel = operands.partition(",")
    return of_input, of_kernel, result


def _labels(subscripts: str, ndim: int) -> list[Any]:
    """The label of each axis of an operand; axes under an ellipsis are numbered from their right, as they broadcast."""
    before, dots, after = subscripts.partition("...")
    under = ndim - len(before) - len(after) if dots else 0
    return [*before, *range(-under, 0), *after]
