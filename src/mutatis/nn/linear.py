"""Linear maps: `Linear` over the last axis, `Conv` over the spatial axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn.initializers import Initializer, lecun_normal, zeros
from jax.typing import ArrayLike, DTypeLike

from mutatis.errors import ArgumentError
from mutatis.model.modules import Module
from mutatis.nn.layers import as_tuple, check_input, materialize, param_key, parameter, promote, stretch
from mutatis.random import Rngs

Padding: TypeAlias = str | int | Sequence[int | tuple[int, int]]


def default_kernel_init(key: Any, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
    """LeCun's initializer, normal with variance 1 / fan_in: a function by name, which pickles."""
    return lecun_normal()(key, shape, dtype)


class Linear(Module):
    """The affine map ``x @ kernel + bias`` over the last axis.

    Args:
      in_features: the size of the last axis of the input; None takes it from the first input.
      out_features: the size of the last axis of the output.
      use_bias: whether to add a bias.
      dtype: the dtype to compute in; None takes what the input and the parameters promote to.
      param_dtype: the dtype of the parameters.
      precision: of the product, as in `jax.lax.dot_general`.
      kernel_init: makes the kernel, an initializer of `jax.nn.initializers`.
      bias_init: makes the bias.
      rngs: random streams, of which `params` is drawn from.

    Attributes:
      kernel: Param of shape (in_features, out_features).
      bias: Param of shape (out_features,), or None.

    Raises:
      RandomStreamError: there is no stream to draw the parameters from.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> layer = mu.nn.Linear(None, 3, rngs=mu.Rngs(0))
      >>> layer(jnp.ones((2, 5))).shape, layer.kernel.shape
      ((2, 3), (5, 3))
    """

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
        rngs: Rngs,
    ) -> None:
        shape = None if in_features is None else (in_features, out_features)
        self.kernel = parameter(kernel_init, param_key("Linear", rngs), shape, param_dtype)
        self.bias = parameter(bias_init, param_key("Linear", rngs), (out_features,), param_dtype) if use_bias else None
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.kernel_init = kernel_init if in_features is None else None

    def __call__(self, x: ArrayLike) -> jax.Array:
        """Map the last axis.

        Args:
          x: an array of shape (..., in_features).

        Returns:
          An array of shape (..., out_features).

        Raises:
          ArgumentError: the input has another number of features.
        """
        x = jnp.asarray(x)
        features = check_input(self.kernel, x, along=0)
        materialize(self.kernel, self.kernel_init, (features, self.out_features), self.param_dtype)
        x, kernel, bias = promote(self.dtype, x, self.kernel.value, None if self.bias is None else self.bias.value)
        y = jnp.matmul(x, kernel, precision=self.precision)
        return y if bias is None else y + stretch(bias, -1, y.ndim)


class Conv(Module):
    """A convolution (cross-correlation) over the spatial axes, channels last.

    Args:
      in_features: the number of channels of the input; None takes it from the first input.
      out_features: the number of channels of the output.
      kernel_size: the size of the kernel along each spatial axis; their number is that of the spatial axes.
      strides: the step along each spatial axis; one int is for all.
      padding: ``"SAME"``, ``"VALID"``, an int for both sides of all axes, or for each axis an int or (low, high).
      input_dilation: the spacing of the input along each spatial axis.
      kernel_dilation: the spacing of the kernel along each spatial axis.
      feature_group_count: into how many groups the channels are divided.
      use_bias, dtype, param_dtype, precision, kernel_init, bias_init, rngs: as in `Linear`.

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

    def __init__(
        self,
        in_features: int | None,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] = 1,
        *,
        padding: Padding = "SAME",
        input_dilation: int | Sequence[int] = 1,
        kernel_dilation: int | Sequence[int] = 1,
        feature_group_count: int = 1,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = zeros,
        rngs: Rngs,
    ) -> None:
        self.in_features = in_features
        self.out_features = out_features
        self.kernel_size = as_tuple("Conv", "kernel_size", kernel_size)
        rank = len(self.kernel_size)
        self.strides = as_tuple("Conv", "strides", strides, rank)
        self.input_dilation = as_tuple("Conv", "input_dilation", input_dilation, rank)
        self.padding = _lax_padding(padding, self.input_dilation)
        self.kernel_dilation = as_tuple("Conv", "kernel_dilation", kernel_dilation, rank)
        self.feature_group_count = feature_group_count
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.kernel_init = kernel_init if in_features is None else None
        shape = None if in_features is None else self._kernel_shape(in_features)
        self.kernel = parameter(kernel_init, param_key("Conv", rngs), shape, param_dtype)
        self.bias = parameter(bias_init, param_key("Conv", rngs), (out_features,), param_dtype) if use_bias else None

    def __call__(self, x: ArrayLike) -> jax.Array:
        """Convolve.

        Args:
          x: an array of shape (..., *spatial, in_features), with any number of batch axes.

        Returns:
          An array of shape (..., *spatial, out_features); the spatial sizes depend on the padding and strides.

        Raises:
          ArgumentError: the input has another number of channels, or too few axes.
        """
        x = jnp.asarray(x)
        axes = len(self.kernel_size) + 1
        features = check_input(self.kernel, x, along=-2, times=self.feature_group_count, ndim=axes)
        materialize(self.kernel, self.kernel_init, self._kernel_shape(features), self.param_dtype)
        inputs, kernel, bias = promote(self.dtype, x, self.kernel.value, None if self.bias is None else self.bias.value)
        batch = inputs.shape[:-axes]
        y = lax.conv_general_dilated(
            inputs.reshape(math.prod(batch), *inputs.shape[-axes:]),
            kernel,
            self.strides,
            self.padding,
            lhs_dilation=self.input_dilation,
            rhs_dilation=self.kernel_dilation,
            dimension_numbers=_channels_last(axes + 1),
            feature_group_count=self.feature_group_count,
            precision=self.precision,
        )
        y = y if bias is None else y + stretch(bias, -1, y.ndim)
        return y.reshape(*batch, *y.shape[1:])

    def _kernel_shape(self, in_features: int) -> tuple[int, ...]:
        groups = self.feature_group_count
        if in_features % groups or self.out_features % groups:
            raise ArgumentError(
                f"`nn.Conv` cannot divide its channels into {groups} groups",
                path="feature_group_count",
                expected=f"numbers of channels that {groups} divides",
                got=f"{in_features} in, {self.out_features} out",
                cure="Choose a `feature_group_count` that divides both.",
            )
        return (*self.kernel_size, in_features // groups, self.out_features)


def _channels_last(ndim: int) -> lax.ConvDimensionNumbers:
    spatial = range(1, ndim - 1)
    data = (0, ndim - 1, *spatial)
    return lax.ConvDimensionNumbers(data, (ndim - 1, ndim - 2, *range(ndim - 2)), data)


def _lax_padding(padding: Padding, input_dilation: tuple[int, ...]) -> Any:
    """Padding as `jax.lax` wants it: a name, or (low, high) for each spatial axis."""
    if isinstance(padding, str):
        known = ("SAME", "SAME_LOWER", "VALID") if set(input_dilation) == {1} else ()
        if padding not in known:
            raise ArgumentError(
                f"`nn.Conv` does not know the padding {padding!r}{'' if known else ' of a dilated input'}",
                path="padding",
                expected=", ".join([*map(repr, known), "an int", "(low, high) for each spatial axis"]),
                got=repr(padding),
                cure=f"Say how much: `padding={((0, 0),) * len(input_dilation)}`. For other values than 0, pad the input "
                "before, `jnp.pad(x, widths, mode='wrap')`.",
            )
        return padding
    widths = (padding,) * len(input_dilation) if isinstance(padding, int) else tuple(padding)
    as_tuple("Conv", "padding", [0] * len(widths), len(input_dilation))
    return tuple((width, width) if isinstance(width, int) else tuple(width) for width in widths)
