"""Normalization: `BatchNorm` keeps running statistics beside its parameters."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn.initializers import Initializer, ones, zeros
from jax.typing import ArrayLike, DTypeLike

from mutatis.core import naming
from mutatis.core.cells import Deferred
from mutatis.errors import AxisError
from mutatis.model.kinds import BatchStat, Param
from mutatis.model.modules import Module
from mutatis.nn.layers import (
    check_input,
    convert,
    first_said,
    materialize,
    param_key,
    parameter,
    promote,
    stretch,
    widen,
)
from mutatis.random import Rngs


class BatchNorm(Module):
    """Normalizes each feature to mean 0 and variance 1 over all other axes, then scales and shifts it.

    In training the mean and variance are those of the batch, and the running ones move towards them:
    ``mean = momentum * mean + (1 - momentum) * batch_mean``. In evaluation they are the running ones. Gradients flow
    through the statistics of the batch, not through the running ones. `mu.reset(model, mu.BatchStat)` starts them anew.

    Args:
      num_features: the size of the feature axis; None takes it from the first input.
      use_running_average: whether to use the running statistics, unless the call says so. None goes by the module's
        mode: they are used after `model.eval()`.
      momentum: the weight of the old value in the running statistics.
      epsilon: is added to the variance.
      use_bias: whether to add a bias.
      use_scale: whether to multiply by a scale.
      dtype: the dtype of the result; None takes what the input and the parameters promote to. The statistics are
        computed and kept in float32 or wider.
      param_dtype: the dtype of the parameters.
      bias_init: makes the bias, an initializer of `jax.nn.initializers`.
      scale_init: makes the scale.
      axis: the feature axis.
      axis_name: an axis of an enclosing `mu.vmap` or `mu.shard_map`, over whose lanes the statistics are averaged, too.
      rngs: random streams, of which `params` is drawn from; needed with other initializers only.

    Attributes:
      scale: Param of shape (num_features,), or None.
      bias: Param of shape (num_features,), or None.
      mean: BatchStat of shape (num_features,).
      var: BatchStat of shape (num_features,); without Bessel's correction.

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

    def __init__(
        self,
        num_features: int | None,
        *,
        use_running_average: bool | None = None,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        use_bias: bool = True,
        use_scale: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        bias_init: Initializer = zeros,
        scale_init: Initializer = ones,
        axis: int = -1,
        axis_name: str | None = None,
        rngs: Rngs | None = None,
    ) -> None:
        self.num_features = num_features
        self.use_running_average = use_running_average
        self.momentum = momentum
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.bias_init = bias_init if num_features is None else None
        self.scale_init = scale_init if num_features is None else None
        self.axis = axis
        self.axis_name = axis_name
        self.mean = _statistic(zeros, num_features, widen(param_dtype))
        self.var = _statistic(ones, num_features, widen(param_dtype))
        self.scale = self._parameter(scale_init, rngs) if use_scale else None
        self.bias = self._parameter(bias_init, rngs) if use_bias else None

    def __call__(self, x: ArrayLike, use_running_average: bool | None = None) -> jax.Array:
        """Normalize.

        Args:
          x: an array of shape (..., num_features), or with `num_features` along another `axis`.
          use_running_average: whether to use the running statistics; goes before what the layer was made with.

        Returns:
          An array of the same shape.

        Raises:
          ArgumentError: the input has another number of features.
          AxisError: there is no axis `axis_name`.
          FrozenStateError: the running statistics would be updated, and are frozen.
        """
        x = jnp.asarray(x)
        self._materialize(check_input(self.mean, x, along=0, axis=self.axis))
        if first_said(use_running_average, self.use_running_average, not self.training):
            mean, var = self.mean.value, self.var.value
        else:
            mean, var = self._batch_statistics(x)
            self._move(self.mean, mean)
            self._move(self.var, var)
        scale = None if self.scale is None else self.scale.value
        bias = None if self.bias is None else self.bias.value
        result, _, _ = promote(self.dtype, x, scale, bias)
        wide = widen(result.dtype)

        def place(vector: jax.Array) -> jax.Array:
            return stretch(convert(vector, wide), self.axis, x.ndim)

        factor = lax.rsqrt(convert(var, wide) + self.epsilon)
        if scale is not None:
            factor *= convert(scale, wide)
        y = (convert(x, wide) - place(mean)) * place(factor)
        if bias is not None:
            y += place(bias)
        return convert(y, result.dtype)

    def _batch_statistics(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The mean and variance of a batch; in two passes, which does not cancel where the mean is large."""
        x = convert(x, widen(x.dtype))
        others = [axis for axis in range(x.ndim) if axis != self.axis % x.ndim]

        def average(values: jax.Array) -> jax.Array:
            return self._over_lanes(jnp.mean(values, others))

        mean = average(x)
        return mean, average(jnp.square(x - stretch(mean, self.axis, x.ndim)))

    def _over_lanes(self, mean: jax.Array) -> jax.Array:
        if self.axis_name is None:
            return mean
        try:
            return lax.pmean(mean, self.axis_name)
        except NameError:
            raise AxisError(
                f"state {naming.describe(self.mean)} is averaged over an axis `{self.axis_name}` that does not exist",
                path=naming.path_of(self.mean),
                where=naming.where(),
                expected=f"a transform around the call with axis_name={self.axis_name!r}",
                made_at=self.mean.made_at,
                cure=f"`mu.vmap(model, axis_name={self.axis_name!r})(batch)`; to use the running statistics, `model.eval()`.",
            ) from None

    def _move(self, running: BatchStat, new: jax.Array) -> None:
        new = convert(lax.stop_gradient(new), running.dtype)
        running.value = self.momentum * running.value + (1 - self.momentum) * new

    def _parameter(self, init: Initializer, rngs: Rngs | None) -> Param:
        key = None if rngs is None and init in (zeros, ones) else param_key("BatchNorm", rngs)
        return parameter(init, key, None if self.num_features is None else (self.num_features,), self.param_dtype)

    def _materialize(self, features: int) -> None:
        shape = (features,)
        materialize(self.mean, zeros, shape, widen(self.param_dtype))
        materialize(self.var, ones, shape, widen(self.param_dtype))
        materialize(self.scale, self.scale_init, shape, self.param_dtype)
        materialize(self.bias, self.bias_init, shape, self.param_dtype)


def _statistic(init: Initializer, features: int | None, dtype: Any) -> BatchStat:
    """A running statistic that `mu.reset` starts anew."""
    start = _waiting if features is None else _start(init, features, dtype)
    return BatchStat(start(), init=start)


@functools.lru_cache(maxsize=1024)
def _start(init: Initializer, features: int, dtype: Any) -> functools.partial[jax.Array]:
    """How a statistic starts; one object for all that start alike, so that a walk over them describes it once."""
    return functools.partial(init, None, (features,), dtype)


def _waiting() -> Deferred:
    return Deferred(None)
