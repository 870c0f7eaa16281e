"""Normalization of weights: `SpectralNorm` and `WeightNorm` call a layer with normalized weights in place of its own.

The layer's own weights stay as they are, and gradients go through the normalization to them. (Flax NNX overwrites the weights
with the normalized ones.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.nn.initializers import Initializer, normal, ones
from jax.typing import DTypeLike

from mutatis.core import access, naming
from mutatis.core.showing import show_value
from mutatis.errors import ArgumentError
from mutatis.model.filters import Filter, FilterLike, Path, PathContains, as_filter
from mutatis.model.kinds import BatchStat, Param
from mutatis.model.modules import Module
from mutatis.model.variables import Variable
from mutatis.model.walks import variables
from mutatis.nn.layers import (
    Layer,
    PromoteDtype,
    as_axes,
    draws_nothing,
    first_said,
    param_key,
    parameter,
    promote_dtype,
)
from mutatis.nn.moments import axes_of
from mutatis.random import Rngs
from mutatis.transforms.transaction import transaction

KERNELS = PathContains("kernel")


class SpectralNorm(Layer):
    """Calls a layer with its weights divided by their largest singular value, which is estimated by power iteration.

    The weights of the layer themselves stay as they are. All Params with two or more axes are divided. For one with more than
    two axes, all axes but the last count as one.

    Args:
      layer_instance: the layer.
      n_steps: the number of steps of the power iteration in each call.
      epsilon: a small number that is added to the square of a vector's length before the vector is divided by it.
      dtype: the dtype of the normalized weights. None takes that of the weights.
      param_dtype: the dtype of the states of the iteration.
      error_on_non_matrix: whether weights with more than two axes are an error.
      update_stats: whether a call in training keeps the vectors of its iteration, from which the next one starts. After
        `model.eval()` a call keeps none, unless the call says so.
      rngs: random streams; the first vectors are drawn from the stream `params`.

    Attributes:
      layer_instance: the layer.
      batch_stats: a dictionary of BatchStats. For each weight there is one under its path and ``"u"``, the vector, of shape (1,
        size of the last axis), and one under its path and ``"sigma"``, the estimate of the singular value, of shape ().

    Raises:
      ArgumentError: a weight has more than two axes, and `error_on_non_matrix` is set.
      RandomStreamError: there is no stream to draw from.

    Source:
      Miyato et al., Spectral Normalization for Generative Adversarial Networks, 2018, https://arxiv.org/abs/1802.05957

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> linear = mu.nn.Linear(2, 2, use_bias=False, rngs=mu.Rngs(0))
      >>> linear.kernel.value = jnp.diag(jnp.array([4.0, 1.0]))  # the singular values are 4 and 1
      >>> layer = mu.nn.SpectralNorm(linear, n_steps=20, rngs=mu.Rngs(1))
      >>> layer(jnp.ones((1, 2))).round(3).tolist()
      [[1.0, 0.25]]
    """

    def __init__(
        self,
        layer_instance: Module,
        *,
        n_steps: int = 1,
        epsilon: float = 1e-12,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        error_on_non_matrix: bool = False,
        update_stats: bool = True,
        rngs: Rngs,
    ) -> None:
        self.layer_instance = layer_instance
        self.n_steps = n_steps
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.error_on_non_matrix = error_on_non_matrix
        self.update_stats = update_stats
        self.batch_stats: dict[Path, BatchStat] = {}
        for path, weight in self._weights().items():
            u = normal()(param_key("SpectralNorm", rngs), (1, weight.shape[-1]), param_dtype)
            self.batch_stats[*path, "u"] = BatchStat(u)
            self.batch_stats[*path, "sigma"] = BatchStat(jnp.ones((), param_dtype))

    def __call__(self, x: Any, update_stats: bool | None = None, **options: Any) -> Any:
        """Call the layer with normalized weights.

        Args:
          x: the input of the layer.
          update_stats: whether to keep the vectors of the iteration; overrides the setting of the layer.
          **options: further arguments of the layer, by keyword.

        Returns:
          The result of the layer.

        Raises:
          ArgumentError: `update_stats` is neither True, False nor None.
        """
        if update_stats is not None and not isinstance(update_stats, bool | np.bool_):
            raise ArgumentError(
                "`nn.SpectralNorm` was given what does not say whether to keep its statistics",
                path="update_stats",
                where=naming.where(),
                expected="True, False or None",
                got=show_value(update_stats),
                cure="Further inputs of the layer go by their names: `norm(queries, inputs_k=keys)`.",
            )
        update = first_said(update_stats, self.update_stats and self.training)
        lent = {weight: self._divided(path, weight, update) for path, weight in self._weights().items()}
        return _call_with(lent, self.layer_instance, x, **options)

    def _weights(self) -> dict[Path, Param]:
        found = variables(self.layer_instance, Param)
        weights = {path: weight for path, weight in found.items() if weight.ndim > 1 and self.n_steps > 0}
        for weight in weights.values():
            if weight.ndim > 2 and self.error_on_non_matrix:
                raise ArgumentError(
                    f"state {naming.describe(weight)} is no matrix, and `error_on_non_matrix` is set",
                    path=naming.path_of(weight),
                    expected="two axes",
                    got=f"shape {weight.shape}",
                    cure="`nn.SpectralNorm(layer, error_on_non_matrix=False, rngs=rngs)` takes all axes but the last as one.",
                )
        return weights

    def _divided(self, path: Path, weight: Variable, update: bool) -> jax.Array:
        """A weight divided by its largest singular value; the iteration runs on a copy that no gradient goes through."""
        matrix = weight.value.reshape(-1, weight.shape[-1])
        kept = _kept(self.batch_stats, path, "u")
        fixed, u = lax.stop_gradient(matrix).astype(kept.dtype), kept.value
        for _ in range(self.n_steps):
            v = _unit(u @ fixed.T, self.epsilon)
            u = _unit(v @ fixed, self.epsilon)
        v, u = lax.stop_gradient(v), lax.stop_gradient(u)
        sigma = (v @ matrix.astype(kept.dtype) @ u.T)[0, 0]
        if update:
            kept.value = u
            _kept(self.batch_stats, path, "sigma").value = lax.stop_gradient(sigma)
        safe = jnp.where(sigma != 0, sigma, jnp.ones_like(sigma))
        return (weight.value / safe.astype(weight.dtype)).astype(weight.dtype if self.dtype is None else self.dtype)


class WeightNorm(Layer):
    """Calls a layer with its weights scaled to length 1 for each output feature, times a learned scale.

    The weights of the layer themselves stay as they are.

    Args:
      layer_instance: the layer.
      feature_axes: the axes of a weight that count its features. Each feature has a length and a scale of its own. None takes
        one length for the whole weight.
      use_scale: whether to multiply by scales.
      scale_init: the initializer of the scales, as those of `jax.nn.initializers`.
      epsilon: a small number that is added to the square of the length.
      dtype: the dtype of the normalized weights. None takes the common dtype of a weight and its scale.
      param_dtype: the dtype of the scales.
      variable_filter: a filter: which states are normalized. The default takes those with "kernel" in their path.
      promote_dtype: the function that brings ``(weight, scale)`` to one dtype; it is called with that tuple and ``dtype=``.
      rngs: random streams, for initializers that draw from the stream `params`; the default one needs none.

    Attributes:
      layer_instance: the layer.
      scales: a dictionary from the path of a weight to a Param, of the shape of the weight's features. None without
        `use_scale`.

    Raises:
      RandomStreamError: an initializer is given that may draw, and no `rngs`.

    Source:
      Salimans and Kingma, Weight Normalization, 2016, https://arxiv.org/abs/1602.07868

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> linear = mu.nn.Linear(2, 1, rngs=mu.Rngs(0))
      >>> linear.kernel.value = jnp.array([[0.0], [40.0]])
      >>> layer = mu.nn.WeightNorm(linear)  # calls `linear` with the kernel [[0.0], [1.0]]
      >>> layer(jnp.array([[5.0, 7.0]])).tolist()
      [[7.0]]
    """

    def __init__(
        self,
        layer_instance: Module,
        *,
        feature_axes: int | Sequence[int] | None = -1,
        use_scale: bool = True,
        scale_init: Initializer = ones,
        epsilon: float = 1e-12,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        variable_filter: FilterLike = KERNELS,
        promote_dtype: PromoteDtype = promote_dtype,
        rngs: Rngs | None = None,
    ) -> None:
        self.layer_instance = layer_instance
        self.feature_axes = () if feature_axes is None else as_axes(feature_axes)
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.variable_filter: Filter = as_filter(variable_filter)
        self._settle(use_scale=use_scale, promote_dtype=promote_dtype)
        self.scales: dict[Path, Param] | None = None
        if use_scale:
            self.scales = {}
            for path, weight in self._weights().items():
                shape = tuple(weight.shape[axis] for axis in self._features(weight))
                free = rngs is None or draws_nothing(scale_init)  # which draw nothing in Flax either
                key = None if free and draws_nothing(scale_init) else param_key("WeightNorm", rngs, scale_init)
                self.scales[path] = parameter(scale_init, key, shape, param_dtype)

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the layer with normalized weights.

        Args:
          x, *args, **kwargs: the arguments of the layer.

        Returns:
          The result of the layer.
        """
        lent = {weight: self._normalized(path, weight) for path, weight in self._weights().items()}
        return _call_with(lent, self.layer_instance, x, *args, **kwargs)

    def _weights(self) -> dict[Path, Variable]:
        return dict(variables(self.layer_instance, lambda path, cell: self.variable_filter(path, cell)))

    def _features(self, weight: Variable) -> list[int]:
        return [*axes_of(self.feature_axes, weight.ndim)]

    def _normalized(self, path: Path, weight: Variable) -> jax.Array:
        """A weight at length 1, times its scale."""
        features = self._features(weight)
        others = [axis for axis in range(weight.ndim) if axis not in features]
        unit = _unit(weight.value, self.epsilon, others)
        if self.scales is None:
            return unit.astype(weight.dtype if self.dtype is None else self.dtype)
        scale = _kept(self.scales, path).value
        place = [size if axis in features else 1 for axis, size in enumerate(weight.shape)]
        unit, scale = self.promote_dtype((unit, scale.reshape(place)), dtype=self.dtype)
        return unit * scale


def _call_with(lent: Mapping[Any, jax.Array], layer: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a layer whose states have other values for the time of the call; what it writes to others stays.

    Nothing of a frozen state is changed, so the values are lent to it, too.
    """
    with transaction() as tx:
        for cell, value in lent.items():
            access.write(cell, value)
        out = layer(*args, **kwargs)
        tx.rollback(lambda path, cell: cell in lent)
    return out


def _kept(kept: Mapping[Any, Any], path: Path, *names: str) -> Any:
    """What is kept about a weight.

    Raises:
      ArgumentError: there is nothing: the weight was not there when the layer was made.
    """
    if (*path, *names) not in kept:
        raise ArgumentError(
            f"nothing is known about the weight `{naming.show_path(path)}`",
            path=naming.show_path(path),
            where=naming.where(),
            expected="a weight that the layer had when it was wrapped",
            got="one that came later, or has another path now",
            cure="Wrap the layer after changing it: `nn.WeightNorm(layer, rngs=rngs)`.",
        )
    return kept[*path, *names]


def _unit(x: jax.Array, epsilon: float, axes: Sequence[int] | None = None) -> jax.Array:
    """An array at length 1, as a whole or along axes."""
    return x * lax.rsqrt(jnp.sum(x * x, axes, keepdims=True) + epsilon)
