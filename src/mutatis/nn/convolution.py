"""Convolutions over the spatial axes, channels last: `Conv`, and `ConvTranspose`, which goes the other way."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.nn.initializers import Initializer, zeros
from jax.typing import ArrayLike, DTypeLike

from mutatis.core.calls import as_integer
from mutatis.core.showing import show_value
from mutatis.errors import ArgumentError
from mutatis.model.kinds import Param
from mutatis.nn.layers import (
    NO_METADATA,
    Layer,
    Metadata,
    PromoteDtype,
    Shape,
    add_bias,
    as_tuple,
    check_input,
    materialize,
    param_key,
    parameter,
    promote_dtype,
    sizes,
)
from mutatis.nn.linear import default_kernel_init
from mutatis.random import Rngs

Padding: TypeAlias = str | int | Sequence[int | tuple[int, int]]

# Paddings that are done to the input before the convolution, and what `jax.numpy.pad` calls them.
_BEFORE = {"CIRCULAR": "wrap", "REFLECT": "reflect", "CAUSAL": "constant"}


class _Convolution(Layer):
    """The parameters of a convolution."""

    kernel: Param
    bias: Param | None
    mask: Any
    param_dtype: Any

    def _kernel_shape(self, in_features: int) -> Shape:
        raise NotImplementedError

    def _parameters(self, x: jax.Array, in_features: int) -> tuple[jax.Array, jax.Array | None]:
        """The kernel under its mask, and the bias, for an input; nothing is created for one that does not fit."""
        self._accept(self.kernel, x)
        shape = self._kernel_shape(in_features)
        mask = None if self.mask is None else _mask_for(type(self).__name__, self.mask, shape)
        materialize(self.kernel, self.kernel_init, shape, self.param_dtype)
        kernel = self.kernel.value
        return kernel if mask is None else kernel * mask.astype(
            kernel.dtype
        ), None if self.bias is None else self.bias.value


class Conv(_Convolution):
    """A convolution over the spatial axes, with the channels last: images have the shape (batch, height, width, channels).

    As in other libraries the kernel is not flipped, so it is a cross-correlation. The number of spatial axes is that of
    `kernel_size`: one for sequences, two for images, three for volumes.

    Args:
      in_features: the number of channels of the input. None takes it from the first input.
      out_features: the number of channels of the output.
      kernel_size: the size of the kernel along each spatial axis. An int is for one axis, so give ``(3, 3)`` for images.
      strides: the step along each spatial axis; an int is for all.
      padding: ``"SAME"`` (for a step of 1 the output has the size of the input), ``"VALID"`` (none), an int for both sides of all
        axes, or for each axis an int or (low, high). ``"CIRCULAR"`` continues the input periodically and ``"REFLECT"`` mirrors
        it, each with as much as ``"SAME"`` pads for a step of 1. ``"CAUSAL"``, for one spatial axis, pads at the front only, so
        that no output sees a later input.
      input_dilation: the spacing of the input along each spatial axis; an int is for all.
      kernel_dilation: the spacing of the kernel along each spatial axis; an int is for all.
      feature_group_count: the number of groups of channels; `groups` in PyTorch.
      use_bias: whether to add a bias.
      mask: an array of the kernel's shape, by which the kernel is multiplied. It is a Buffer of the layer.
      dtype: the dtype of the computation and of the output. None takes the common dtype of the input and the parameters.
      conv_general_dilated: the function for the convolution, in place of `jax.lax.conv_general_dilated`.
      param_dtype, precision, kernel_init, bias_init, promote_dtype, preferred_element_type, rngs, kernel_metadata, bias_metadata:
        as in `Linear`.

    Attributes:
      kernel: Param of shape (*kernel_size, in_features // feature_group_count, out_features).
      bias: Param of shape (out_features,), or None.

    Raises:
      ArgumentError: the sizes contradict each other.
      RandomStreamError: there is no stream to draw the parameters from.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> layer = mu.nn.Conv(1, 8, kernel_size=(3, 3), strides=2, rngs=mu.Rngs(0))
      >>> layer(jnp.ones((4, 28, 28, 1))).shape
      (4, 14, 14, 8)
    """

    conv_general_dilated: Any = staticmethod(lax.conv_general_dilated)

    def __init__(
        self,
        in_features: int | None,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        padding: Padding = "SAME",
        input_dilation: int | Sequence[int] | None = 1,
        kernel_dilation: int | Sequence[int] | None = 1,
        feature_group_count: int = 1,
        use_bias: bool = True,
        mask: ArrayLike | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = zeros,
        conv_general_dilated: Callable[..., jax.Array] = lax.conv_general_dilated,
        promote_dtype: PromoteDtype = promote_dtype,
        preferred_element_type: DTypeLike | None = None,
        rngs: Rngs,
        kernel_metadata: Metadata = NO_METADATA,
        bias_metadata: Metadata = NO_METADATA,
    ) -> None:
        self.in_features = in_features
        self.out_features = out_features
        self.kernel_size = as_tuple("Conv", "kernel_size", kernel_size)
        rank = len(self.kernel_size)
        self.strides = as_tuple("Conv", "strides", strides, rank)
        self.input_dilation = as_tuple("Conv", "input_dilation", input_dilation, rank)
        names = ("SAME", "SAME_LOWER", "VALID", *_BEFORE) if set(self.input_dilation) == {1} else ()
        self.padding = _lax_padding("Conv", padding, rank, names, "" if names else " of a dilated input")
        self.kernel_dilation = as_tuple("Conv", "kernel_dilation", kernel_dilation, rank)
        self.feature_group_count = as_integer(feature_group_count) or 0
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.kernel_init = kernel_init if in_features is None else None
        shape = None if in_features is None else self._kernel_shape(in_features)
        self.mask = None if mask is None else _mask_for("Conv", mask, shape)
        key = param_key("Conv", rngs, kernel_init)
        self.kernel = parameter(kernel_init, key, shape, param_dtype, kernel_metadata)
        self.bias = None
        if use_bias:
            key = param_key("Conv", rngs, bias_init)
            self.bias = parameter(bias_init, key, (out_features,), param_dtype, bias_metadata)
        self._settle(
            use_bias=use_bias,
            conv_general_dilated=conv_general_dilated,
            promote_dtype=promote_dtype,
            preferred_element_type=preferred_element_type,
        )

    def __call__(self, inputs: ArrayLike, out_sharding: Any = None) -> jax.Array:
        """Convolve.

        Args:
          inputs: an array of floats, of shape (..., *spatial, in_features), with any number of batch axes.
          out_sharding: the sharding of the result, on a mesh whose axes are explicit; several batch axes count as one.

        Returns:
          An array of shape (..., *spatial, out_features). Its spatial sizes depend on the padding and the strides.

        Raises:
          ArgumentError: the input has another number of channels, or too few axes, or holds integers.
        """
        x = jnp.asarray(inputs)
        axes = len(self.kernel_size) + 1
        features = check_input(self.kernel, x, along=-2, times=self.feature_group_count, ndim=axes)
        kernel, bias = self._parameters(x, features)
        x, kernel, bias = self._promote(self.kernel, x, kernel, bias)
        batch = x.shape[:-axes]
        x, padding = self._pad(x if len(batch) == 1 else x.reshape(math.prod(batch), *x.shape[-axes:]))
        y: jax.Array = self.conv_general_dilated(
            x,
            kernel,
            self.strides,
            padding,
            lhs_dilation=self.input_dilation,
            rhs_dilation=self.kernel_dilation,
            dimension_numbers=_channels_last(axes + 1),
            feature_group_count=self.feature_group_count,
            precision=self.precision,
            **self._options(out_sharding),
        )
        y = add_bias(y, bias)
        return y if len(batch) == 1 else y.reshape(*batch, *y.shape[1:])

    def _pad(self, x: jax.Array) -> tuple[jax.Array, Any]:
        """The input, padded if the convolution cannot do it, and what is left for that to pad."""
        mode = _BEFORE.get(self.padding) if isinstance(self.padding, str) else None
        if mode is None:
            return x, self.padding
        reach = [(size - 1) * d for size, d in zip(self.kernel_size, self.kernel_dilation, strict=True)]
        widths = [(far, 0) if self.padding == "CAUSAL" else (far // 2, (far + 1) // 2) for far in reach]
        return jnp.pad(x, [(0, 0), *widths, (0, 0)], mode=mode), "VALID"

    def _kernel_shape(self, in_features: int) -> Shape:
        groups = self.feature_group_count
        if groups < 1 or any(size % groups for size in sizes((in_features, self.out_features))):
            raise ArgumentError(
                f"`nn.Conv` cannot divide its channels into {groups} groups",
                path="feature_group_count",
                expected=f"numbers of channels that {groups} divides",
                got=f"{in_features} in, {self.out_features} out",
                cure="Choose a `feature_group_count` that divides both.",
            )
        return (*self.kernel_size, in_features // groups, self.out_features)


class ConvTranspose(_Convolution):
    """A transposed convolution over the spatial axes, with the channels last, as decoders use it to enlarge images.

    The number of spatial axes is that of `kernel_size`: one for sequences, two for images, three for volumes.

    Args:
      in_features: the number of channels of the input. None takes it from the first input.
      out_features: the number of channels of the output.
      kernel_size: the size of the kernel along each spatial axis. An int is for one axis, so give ``(3, 3)`` for images.
      strides: the factor by which the output is larger than the input, along each spatial axis; an int is for all. None means
        1.
      padding: ``"SAME"`` (the output has `strides` times the size of the input), ``"VALID"`` (the output has all places that
        the kernel reaches), or ``"CIRCULAR"`` (the size of ``"SAME"``, for a periodic output). An int, or for each axis an int
        or (low, high), pads the input after it was spread by `strides`, as in `jax.lax.conv_transpose`. PyTorch's `padding` is
        ``dilation * (size - 1)`` minus that number.
      kernel_dilation: the spacing of the kernel along each spatial axis; an int is for all. None means 1.
      mask: an array of the kernel's shape, by which the kernel is multiplied. It is a Buffer of the layer.
      transpose_kernel: whether the kernel is that of the `Conv` whose transpose this layer is: its spatial axes are flipped,
        and its channels exchanged.
      use_bias, dtype, param_dtype, precision, kernel_init, bias_init, promote_dtype, preferred_element_type, rngs,
        kernel_metadata, bias_metadata: as in `Linear`.

    Attributes:
      kernel: Param of shape (*kernel_size, in_features, out_features), or (*kernel_size, out_features, in_features) with
        `transpose_kernel`.
      bias: Param of shape (out_features,), or None.

    Raises:
      ArgumentError: the sizes contradict each other.
      RandomStreamError: there is no stream to draw the parameters from.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> layer = mu.nn.ConvTranspose(8, 1, kernel_size=(3, 3), strides=2, rngs=mu.Rngs(0))
      >>> layer(jnp.ones((4, 14, 14, 8))).shape
      (4, 28, 28, 1)
    """

    def __init__(
        self,
        in_features: int | None,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = None,
        *,
        padding: Padding = "SAME",
        kernel_dilation: int | Sequence[int] | None = None,
        use_bias: bool = True,
        mask: ArrayLike | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = zeros,
        transpose_kernel: bool = False,
        promote_dtype: PromoteDtype = promote_dtype,
        preferred_element_type: DTypeLike | None = None,
        rngs: Rngs,
        kernel_metadata: Metadata = NO_METADATA,
        bias_metadata: Metadata = NO_METADATA,
    ) -> None:
        self.in_features = in_features
        self.out_features = out_features
        self.kernel_size = as_tuple("ConvTranspose", "kernel_size", kernel_size)
        rank = len(self.kernel_size)
        self.strides = as_tuple("ConvTranspose", "strides", strides, rank)
        self.padding = _lax_padding("ConvTranspose", padding, rank, ("SAME", "VALID", "CIRCULAR"))
        self.kernel_dilation = as_tuple("ConvTranspose", "kernel_dilation", kernel_dilation, rank)
        self.transpose_kernel = transpose_kernel
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        shape = None if in_features is None else self._kernel_shape(in_features)
        self.mask = None if mask is None else _mask_for("ConvTranspose", mask, shape)
        key = param_key("ConvTranspose", rngs, kernel_init)
        self.kernel = parameter(kernel_init, key, shape, param_dtype, kernel_metadata)
        self.bias = None
        if use_bias:
            key = param_key("ConvTranspose", rngs, bias_init)
            self.bias = parameter(bias_init, key, (out_features,), param_dtype, bias_metadata)
        self._settle(
            use_bias=use_bias,
            kernel_init=kernel_init if in_features is None else None,
            promote_dtype=promote_dtype,
            preferred_element_type=preferred_element_type,
        )

    def __call__(self, inputs: ArrayLike) -> jax.Array:
        """Apply the transposed convolution.

        Args:
          inputs: an array of floats, of shape (..., *spatial, in_features), with any number of batch axes.

        Returns:
          An array of shape (..., *spatial, out_features). Its spatial sizes depend on the padding and the strides.

        Raises:
          ArgumentError: the input has another number of channels, or too few axes, or holds integers.
        """
        x = jnp.asarray(inputs)
        axes = len(self.kernel_size) + 1
        features = check_input(self.kernel, x, along=-1 if self.transpose_kernel else -2, ndim=axes)
        kernel, bias = self._parameters(x, features)
        x, kernel, bias = self._promote(self.kernel, x, kernel, bias)
        batch = x.shape[:-axes]
        x = x if len(batch) == 1 else x.reshape(math.prod(batch), *x.shape[-axes:])
        y = lax.conv_transpose(
            x,
            kernel,
            self.strides,
            "VALID" if self.padding == "CIRCULAR" else self.padding,
            rhs_dilation=self.kernel_dilation,
            transpose_kernel=self.transpose_kernel,
            precision=self.precision,
            **self._options(),
        )
        if self.padding == "CIRCULAR":
            for axis, stride in enumerate(self.strides, 1):
                y = self._wrapped(y, axis, stride * x.shape[axis])
        y = add_bias(y, bias)
        return y if len(batch) == 1 else y.reshape(*batch, *y.shape[1:])

    def _wrapped(self, y: jax.Array, axis: int, period: int) -> jax.Array:
        """The sum of an axis over its periods, centered on the middle one."""
        missing = -(y.shape[axis] - period) % (2 * period)  # to an odd number of periods
        low = missing // 2 if self.transpose_kernel else (missing + 1) // 2
        widths = [(0, 0)] * y.ndim
        widths[axis] = (low, missing - low)
        y = jnp.pad(y, widths)
        return y.reshape(*y.shape[:axis], -1, period, *y.shape[axis + 1 :]).sum(axis)

    def _kernel_shape(self, in_features: int) -> Shape:
        channels = (in_features, self.out_features)
        return (*self.kernel_size, *(reversed(channels) if self.transpose_kernel else channels))


def _mask_for(layer: str, mask: Any, shape: Shape | None) -> jax.Array:
    """A mask of the kernel; one that is not of its shape is refused."""
    mask = jnp.asarray(mask)
    if shape is not None and mask.shape != shape:
        raise ArgumentError(
            f"the mask of `nn.{layer}` does not fit its kernel",
            path="mask",
            expected=f"the kernel's shape, {shape}",
            got=f"shape {mask.shape}",
            cure=f"`mask=jnp.ones({shape})`, with 0 where the kernel has no weight.",
        )
    return mask


def _channels_last(ndim: int) -> lax.ConvDimensionNumbers:
    spatial = range(1, ndim - 1)
    data = (0, ndim - 1, *spatial)
    return lax.ConvDimensionNumbers(data, (ndim - 1, ndim - 2, *range(ndim - 2)), data)


def _lax_padding(layer: str, padding: Padding, rank: int, known: Sequence[str], of_what: str = "") -> Any:
    """Padding as the layer keeps it: a name that is known, or (low, high) for each spatial axis."""
    if isinstance(padding, str):
        if padding not in known:
            raise ArgumentError(
                f"`nn.{layer}` does not know the padding {padding!r}{of_what}",
                path="padding",
                expected=", ".join([*map(repr, known), "an int", "(low, high) for each spatial axis"]),
                got=repr(padding),
                cure=f"Say how much: `padding={((0, 0),) * rank}`. For other values than 0, pad the input before, "
                "`jnp.pad(x, widths, mode='edge')`.",
            )
        if padding == "CAUSAL" and rank != 1:
            raise ArgumentError(
                f"`nn.{layer}` pads causally along one spatial axis only",
                path="padding",
                expected="a kernel with one spatial axis",
                got=f"one with {rank}",
                cure="Say how much, (low, high) for each axis: `padding=((2, 0), (1, 1))`.",
            )
        return padding
    one = as_integer(padding)
    widths = [(one, one)] * rank if one is not None else [_width(layer, each, rank) for each in _items(padding)]
    as_tuple(layer, "padding", [1] * len(widths), rank)
    return tuple(widths)


def _items(given: Any) -> list[Any]:
    return list(given) if np.iterable(given) else [given]


def _width(layer: str, given: Any, rank: int) -> tuple[int, int]:
    """How much is padded in front of an axis and behind it."""
    one = as_integer(given)
    ends = [one, one] if one is not None else [as_integer(end) for end in _items(given)]
    low, high = ends if len(ends) == 2 else (None, None)
    if low is None or high is None:
        raise ArgumentError(
            f"`nn.{layer}` cannot pad by {show_value(given)}",
            path="padding",
            expected="an int, or (low, high), for each spatial axis",
            got=show_value(given),
            cure=f"`padding={((1, 1),) * rank}`",
        )
    return low, high
