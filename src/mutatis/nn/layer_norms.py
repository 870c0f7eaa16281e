"""Normalization of each example by itself: `LayerNorm`, `RMSNorm`, `GroupNorm` and `InstanceNorm` keep no statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer, ones, zeros
from jax.typing import ArrayLike, DTypeLike

from mutatis.nn.layers import NO_METADATA, Metadata, PromoteDtype, as_axes, promote_dtype
from mutatis.nn.moments import Normalization, axes_of, check_setting
from mutatis.random import Rngs


class LayerNorm(Normalization):
    """Normalizes each example to mean 0 and variance 1 over its features, then multiplies by a scale and adds a bias.

    Args:
      num_features: the number of features. None takes it from the first input.
      epsilon: a small number that is added to the variance.
      dtype: the dtype of the result. None takes the common dtype of the input and the parameters. The statistics are computed in
        float32 or wider.
      param_dtype: the dtype of the parameters.
      use_bias: whether to add a bias.
      use_scale: whether to multiply by a scale.
      bias_init: the initializer of the bias, as those of `jax.nn.initializers`.
      scale_init: the initializer of the scale.
      reduction_axes: the axes over which the mean and the variance are taken.
      feature_axes: the axes along which scale and bias differ; `num_features` is the product of their sizes.
      axis_name: the name of an axis of an enclosing `mu.vmap` or `mu.shard_map`, over which the statistics are averaged too.
      axis_index_groups: groups of lanes of that axis, each with its own statistics, as in `jax.lax.psum`.
      use_fast_variance: whether to compute the mean and the variance in one pass over the input, not in two.
      promote_dtype: the function that brings ``(x, scale, bias)`` to one dtype; it is called with that tuple and ``dtype=``.
      rngs: random streams, for initializers that draw from the stream `params`; the default ones need none.
      bias_metadata: metadata of the bias, such as ``{"sharding": ("embed",)}``.
      scale_metadata: metadata of the scale.

    Attributes:
      scale: Param of shape (num_features,), or None.
      bias: Param of shape (num_features,), or None.

    Raises:
      RandomStreamError: an initializer is given that may draw, and no `rngs`.

    Source:
      Ba, Kiros and Hinton, Layer Normalization, 2016, https://arxiv.org/abs/1607.06450

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> norm = mu.nn.LayerNorm(2)
      >>> norm(jnp.array([[1.0, 3.0], [10.0, 30.0]])).round(3).tolist()
      [[-1.0, 1.0], [-1.0, 1.0]]
    """

    def __init__(
        self,
        num_features: int | None,
        *,
        epsilon: float = 1e-6,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = zeros,
        scale_init: Initializer = ones,
        reduction_axes: int | Sequence[int] = -1,
        feature_axes: int | Sequence[int] = -1,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtype = promote_dtype,
        rngs: Rngs | None = None,
        bias_metadata: Metadata = NO_METADATA,
        scale_metadata: Metadata = NO_METADATA,
    ) -> None:
        self.num_features = num_features
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.reduction_axes = as_axes(reduction_axes)
        self.feature_axes = as_axes(feature_axes)
        self._settle(
            use_bias=use_bias,
            use_scale=use_scale,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
        )
        self.scale = self._make("scale", scale_init, rngs, scale_metadata) if use_scale else None
        self.bias = self._make("bias", bias_init, rngs, bias_metadata) if use_bias else None

    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalize.

        Args:
          x: an array of floats, with `num_features` along `feature_axes`; by default of shape (..., num_features).
          mask: an array that broadcasts to `x`, and is 0 for elements that count in no statistic, such as padding.

        Returns:
          An array of the same shape.

        Raises:
          ArgumentError: the input has another number of features, or holds integers, or the mask does not fit it.
          AxisError: there is no axis `axis_name`.
        """
        x = jnp.asarray(x)
        axes = self._fit(x, self.feature_axes, mask)
        values, scale, bias = self._take(x)
        mean, var = self._moments(values, axes_of(self.reduction_axes, values.ndim), mask)
        return self._normalized(values, mean, var, scale, bias, axes)


class RMSNorm(Normalization):
    """Divides each example by the root mean square of its features, then multiplies each feature by a scale.

    Unlike `LayerNorm` it does not subtract the mean and has no bias.

    Args:
      num_features: the number of features. None takes it from the first input.
      epsilon: a small number that is added to the mean square.
      reduction_axes: the axes over which the mean square is taken.
      dtype, param_dtype, use_scale, scale_init, feature_axes, axis_name, axis_index_groups, use_fast_variance, promote_dtype,
        rngs, scale_metadata: as in `LayerNorm`.

    Attributes:
      scale: Param of shape (num_features,), or None.

    Raises:
      RandomStreamError: an initializer is given that may draw, and no `rngs`.

    Source:
      Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, https://arxiv.org/abs/1910.07467

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> norm = mu.nn.RMSNorm(4)
      >>> norm(jnp.array([[0.0, 0.0, 0.0, 4.0]])).round(3).tolist()
      [[0.0, 0.0, 0.0, 2.0]]
    """

    def __init__(
        self,
        num_features: int | None,
        *,
        epsilon: float = 1e-6,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_scale: bool = True,
        scale_init: Initializer = ones,
        reduction_axes: int | Sequence[int] = -1,
        feature_axes: int | Sequence[int] = -1,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtype = promote_dtype,
        rngs: Rngs | None = None,
        scale_metadata: Metadata = NO_METADATA,
    ) -> None:
        self.num_features = num_features
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.reduction_axes = as_axes(reduction_axes)
        self.feature_axes = as_axes(feature_axes)
        self._settle(
            use_scale=use_scale,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
        )
        self.scale = self._make("scale", scale_init, rngs, scale_metadata) if use_scale else None

    def __call__(self, x: ArrayLike, mask: ArrayLike | None = None) -> jax.Array:
        """Normalize.

        Args:
          x: an array of floats, with `num_features` along `feature_axes`; by default of shape (..., num_features).
          mask: an array that broadcasts to `x`, and is 0 for elements that count in no statistic, such as padding.

        Returns:
          An array of the same shape.

        Raises:
          ArgumentError: the input has another number of features, or holds integers, or the mask does not fit it.
          AxisError: there is no axis `axis_name`.
        """
        x = jnp.asarray(x)
        axes = self._fit(x, self.feature_axes, mask)
        values, scale, _ = self._take(x)
        zero, square = self._moments(values, axes_of(self.reduction_axes, values.ndim), mask, use_mean=False)
        return self._normalized(values, zero, square, scale, None, axes)


class GroupNorm(Normalization):
    """Normalizes groups of features of each example to mean 0 and variance 1, then multiplies by a scale and adds a bias.

    The mean and the variance of a group are taken over its features and over all axes but the first. Scale and bias are numbers
    for each feature.

    Args:
      num_features: the size of the last axis. None takes it from the first input.
      num_groups: the number of groups, which divides the number of features. Give None if you give `group_size`.
      group_size: the number of features in a group, in place of `num_groups`.
      reduction_axes: the axes over which the mean and the variance are taken; the last axis must be among them. None takes all
        but the first.
      epsilon, dtype, param_dtype, use_bias, use_scale, bias_init, scale_init, axis_name, axis_index_groups, use_fast_variance,
        promote_dtype, rngs, bias_metadata, scale_metadata: as in `LayerNorm`.

    Attributes:
      scale: Param of shape (num_features,), or None.
      bias: Param of shape (num_features,), or None.

    Raises:
      ArgumentError: the number does not divide the features, or both or none of `num_groups` and `group_size` are given.
      RandomStreamError: an initializer is given that may draw, and no `rngs`.

    Source:
      Wu and He, Group Normalization, 2018, https://arxiv.org/abs/1803.08494

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> norm = mu.nn.GroupNorm(4, num_groups=2)
      >>> norm(jnp.array([[1.0, 3.0, 10.0, 30.0]])).round(3).tolist()
      [[-1.0, 1.0, -1.0, 1.0]]
    """

    def __init__(
        self,
        num_features: int | None,
        num_groups: int | None = 32,
        group_size: int | None = None,
        *,
        epsilon: float = 1e-6,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = zeros,
        scale_init: Initializer = ones,
        reduction_axes: int | Sequence[int] | None = None,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtype = promote_dtype,
        rngs: Rngs | None = None,
        bias_metadata: Metadata = NO_METADATA,
        scale_metadata: Metadata = NO_METADATA,
    ) -> None:
        check_setting(
            "GroupNorm",
            "num_groups",
            num_groups,
            (num_groups is None) is not (group_size is None),
            "either `num_groups` or `group_size`, and None for the other",
            "`nn.GroupNorm(64, num_groups=None, group_size=16, rngs=rngs)`",
        )
        self.num_features = num_features
        self.num_groups = num_groups
        self.group_size = group_size
        if num_features is not None:
            self.num_groups, self.group_size = self._groups(num_features)
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.reduction_axes = None if reduction_axes is None else as_axes(reduction_axes)
        self._settle(
            use_bias=use_bias,
            use_scale=use_scale,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
        )
        self.scale = self._make("scale", scale_init, rngs, scale_metadata) if use_scale else None
        self.bias = self._make("bias", bias_init, rngs, bias_metadata) if use_bias else None

    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalize.

        Args:
          x: an array of floats, of shape (batch, ..., num_features).
          mask: an array that broadcasts to `x`, and is 0 for elements that count in no statistic, such as padding.

        Returns:
          An array of the same shape.

        Raises:
          ArgumentError: the input has another number of features, or holds integers, or the mask does not fit it.
          AxisError: there is no axis `axis_name`.
        """
        x = jnp.asarray(x)
        (last,) = self._fit(x, (-1,), mask)
        grouped = (*x.shape[:-1], *self._groups(x.shape[-1]))
        reduced = range(1, x.ndim) if self.reduction_axes is None else axes_of(self.reduction_axes, x.ndim)
        others = [axis for axis in reduced if axis != last]
        check_setting(
            "GroupNorm",
            "reduction_axes",
            self.reduction_axes,
            self.reduction_axes is None or len(others) < len(reduced),
            "axes with the last one among them, which has the features",
            "`reduction_axes=(1, 2, -1)`",
        )
        values, scale, bias = self._take(x)
        if mask is not None:
            mask = self._shown(mask, values).reshape(grouped)
        values = values.reshape(grouped)
        mean, var = self._moments(values, (*others, last + 1), mask)
        y = self._normalized(values, mean, var, scale, bias, (last, last + 1))
        return y.reshape(*grouped[:-2], -1)

    def _groups(self, features: int) -> tuple[int, int]:
        """How many groups there are, and of how many features."""
        by = self.num_groups if self.group_size is None else self.group_size
        name = "num_groups" if self.group_size is None else "group_size"
        check_setting(
            "GroupNorm",
            name,
            by,
            isinstance(by, int) and by > 0 and features % by == 0,
            f"a number that divides the {features} features",
            f"`nn.GroupNorm({features}, num_groups=1, rngs=rngs)`, or another divisor.",
        )
        assert by is not None
        return (by, features // by) if self.group_size is None else (features // by, by)


class InstanceNorm(Normalization):
    """Normalizes each feature of each example to mean 0 and variance 1, then multiplies by a scale and adds a bias.

    The mean and the variance are taken over all axes but the first, which is that of the examples, and those of the features.

    Args:
      num_features: the number of features. None takes it from the first input.
      feature_axes: the axes of the features, without the first axis; `num_features` is the product of their sizes.
      epsilon, dtype, param_dtype, use_bias, use_scale, bias_init, scale_init, axis_name, axis_index_groups, use_fast_variance,
        promote_dtype, rngs, bias_metadata, scale_metadata: as in `LayerNorm`.

    Attributes:
      scale: Param of shape (num_features,), or None.
      bias: Param of shape (num_features,), or None.

    Raises:
      RandomStreamError: an initializer is given that may draw, and no `rngs`.

    Source:
      Ulyanov, Vedaldi and Lempitsky, Instance Normalization, 2016, https://arxiv.org/abs/1607.08022

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> norm = mu.nn.InstanceNorm(2)
      >>> x = jnp.array([[[1.0, 50.0], [3.0, 10.0]]])  # one example of length 2, with 2 features
      >>> norm(x).round(3).tolist()
      [[[-1.0, 1.0], [1.0, -1.0]]]
    """

    def __init__(
        self,
        num_features: int | None,
        *,
        epsilon: float = 1e-6,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = zeros,
        scale_init: Initializer = ones,
        feature_axes: int | Sequence[int] = -1,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtype = promote_dtype,
        rngs: Rngs | None = None,
        bias_metadata: Metadata = NO_METADATA,
        scale_metadata: Metadata = NO_METADATA,
    ) -> None:
        self.num_features = num_features
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.feature_axes = as_axes(feature_axes)
        self._settle(
            use_bias=use_bias,
            use_scale=use_scale,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
        )
        self.scale = self._make("scale", scale_init, rngs, scale_metadata) if use_scale else None
        self.bias = self._make("bias", bias_init, rngs, bias_metadata) if use_bias else None

    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalize.

        Args:
          x: an array of floats, of shape (batch, ..., num_features), or with `num_features` along other `feature_axes`.
          mask: an array that broadcasts to `x`, and is 0 for elements that count in no statistic, such as padding.

        Returns:
          An array of the same shape.

        Raises:
          ArgumentError: the input has another number of features, or holds integers, or the mask does not fit it.
          AxisError: there is no axis `axis_name`.
        """
        x = jnp.asarray(x)
        axes = self._fit(x, self.feature_axes, mask)
        check_setting(
            "InstanceNorm",
            "feature_axes",
            self.feature_axes,
            0 not in axes,
            "axes after the first, which is that of the examples",
            "For one example without a batch, `norm(x[None])[0]`.",
        )
        values, scale, bias = self._take(x)
        mean, var = self._moments(values, [axis for axis in range(1, values.ndim) if axis not in axes], mask)
        return self._normalized(values, mean, var, scale, bias, axes)
