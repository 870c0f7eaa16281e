"""`BatchNorm`: normalization over the batch, which keeps running statistics beside its parameters."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn.initializers import Initializer, ones, zeros
from jax.typing import ArrayLike, DTypeLike

from mutatis.core.cells import Deferred
from mutatis.model.kinds import BatchStat
from mutatis.model.variables import Variable
from mutatis.nn.layers import (
    NO_METADATA,
    Metadata,
    PromoteDtype,
    convert,
    first_said,
    materialize,
    promote_dtype,
    sizes,
    widen,
)
from mutatis.nn.moments import Normalization
from mutatis.random import Rngs


class BatchNorm(Normalization):
    """Normalizes each feature to mean 0 and variance 1 over all other axes, then multiplies by a scale and adds a bias.

    In training it uses the mean and variance of the batch, and moves the running ones towards them:
    ``mean = momentum * mean + (1 - momentum) * batch_mean``. After `model.eval()` it uses the running ones. Gradients flow
    through the statistics of the batch, not through the running ones. ``mu.reset(model, mu.BatchStat)`` starts the running
    statistics anew.

    Args:
      num_features: the size of the feature axis. None takes it from the first input.
      use_running_average: whether to use the running statistics, unless the call says so. None follows `model.train()` and
        `model.eval()`.
      axis: the feature axis.
      momentum: the weight of the old value in the running statistics; PyTorch's `momentum` is 1 minus this.
      epsilon: a small number that is added to the variance.
      dtype: the dtype of the result. None takes the common dtype of the input and the parameters. The statistics are computed and
        kept in float32 or wider.
      param_dtype: the dtype of the parameters.
      use_bias: whether to add a bias.
      use_scale: whether to multiply by a scale.
      bias_init: the initializer of the bias, as those of `jax.nn.initializers`.
      scale_init: the initializer of the scale.
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
      mean: BatchStat of shape (num_features,), the running mean.
      var: BatchStat of shape (num_features,), the running variance, of batches without Bessel's correction.

    Raises:
      RandomStreamError: an initializer is given that may draw, and no `rngs`.

    Source:
      Ioffe and Szegedy, Batch Normalization, 2015, https://arxiv.org/abs/1502.03167

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> norm = mu.nn.BatchNorm(1, momentum=0.5)
      >>> norm(jnp.array([[1.0], [3.0]])).round(3).tolist()
      [[-1.0], [1.0]]
      >>> norm.mean.value, norm.var.value
      (Array([1.], dtype=float32), Array([1.], dtype=float32))
      >>> norm.eval()(jnp.array([[2.0]])).round(3).tolist()
      [[1.0]]
    """

    _otherwise = "; to use the running statistics, `model.eval()`."

    def __init__(
        self,
        num_features: int | None,
        *,
        use_running_average: bool | None = None,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = zeros,
        scale_init: Initializer = ones,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtype = promote_dtype,
        rngs: Rngs | None = None,
        bias_metadata: Metadata = NO_METADATA,
        scale_metadata: Metadata = NO_METADATA,
    ) -> None:
        self.num_features = num_features
        self.use_running_average = use_running_average
        self.momentum = momentum
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.axis = axis
        self._settle(
            use_bias=use_bias,
            use_scale=use_scale,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
        )
        self.mean = _statistic(zeros, num_features, widen(param_dtype))
        self.var = _statistic(ones, num_features, widen(param_dtype))
        self.scale = self._make("scale", scale_init, rngs, scale_metadata) if use_scale else None
        self.bias = self._make("bias", bias_init, rngs, bias_metadata) if use_bias else None

    def __call__(
        self, x: ArrayLike, use_running_average: bool | None = None, *, mask: ArrayLike | None = None
    ) -> jax.Array:
        """Normalize a batch, and in training update the running statistics.

        Args:
          x: an array of floats, of shape (..., num_features), or with `num_features` along another `axis`.
          use_running_average: whether to use the running statistics; overrides the setting of the layer.
          mask: an array that broadcasts to `x`, and is 0 for padding, which then counts in no statistic. All of `x` is normalized
            all the same. Where nothing is left, the running statistics stay, and the batch counts as of mean and variance 0.

        Returns:
          An array of the same shape.

        Raises:
          ArgumentError: the input has another number of features, or holds integers, or the mask does not fit it.
          AxisError: there is no axis `axis_name`.
          FrozenStateError: the running statistics would be updated, and are frozen.
        """
        x = jnp.asarray(x)
        axes = self._fit(x, (self.axis,), mask)
        shape = (x.shape[self.axis],)
        materialize(self.mean, zeros, shape, widen(self.param_dtype))
        materialize(self.var, ones, shape, widen(self.param_dtype))
        values, scale, bias = self._take(x)
        if first_said(use_running_average, self.use_running_average, not self.training):
            place = [size if axis in axes else 1 for axis, size in enumerate(values.shape)]
            mean, var = self.mean.value.reshape(place), self.var.value.reshape(place)
        else:
            over = [axis for axis in range(values.ndim) if axis not in axes]
            mean, var = self._moments(values, over, mask)
            known = True if mask is None else self._shows_any(mask, values, over)
            self._move(self.mean, mean, known)
            self._move(self.var, var, known)
        return self._normalized(values, mean, var, scale, bias, axes)

    def _owner(self) -> Variable:
        return self.mean

    def _move(self, running: BatchStat, new: jax.Array, known: Any) -> None:
        new = convert(lax.stop_gradient(new), running.dtype).reshape(running.shape)
        moved = self.momentum * running.value + (1 - self.momentum) * new
        running.value = moved if known is True else jnp.where(known.reshape(running.shape), moved, running.value)


def _statistic(init: Initializer, features: int | None, dtype: Any) -> BatchStat:
    """A running statistic that `mu.reset` starts anew."""
    start = _waiting if features is None else _start(init, *sizes((features,)), dtype)
    return BatchStat(start(), init=start)


@functools.lru_cache(maxsize=1024)
def _start(init: Initializer, features: int, dtype: Any) -> functools.partial[jax.Array]:
    """How a statistic starts; one object for all that start alike, so that a walk over them describes it once."""
    return functools.partial(init, None, (features,), dtype)


def _waiting() -> Deferred:
    return Deferred(None)
