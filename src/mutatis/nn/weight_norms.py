"""Normalization of weights: `SpectralNorm` and `WeightNorm` lend the layer that they are around other weights for a call.

The layer's own weights stay as they are. For the time of a call it finds the normalized ones in their place, and gradients
go through the normalization to its own. (Flax NNX writes the normalized weights over them.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn.initializers import Initializer, normal, ones
from jax.typing import DTypeLike

from mutatis.core import access, naming
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
from mutatis.random import Rngs
from mutatis.transforms.transaction import transaction

KERNELS = PathContains("kernel")


class SpectralNorm(Layer):
    """Calls a layer with its weights divided by their largest singular value, which a power iteration estimates.

    Weights with one axis or none are left as they are; of more than two axes, all but the last count as one.

    Args:
      layer_instance: the layer.
      n_steps: how many steps of the iteration each call takes.
      epsilon: keeps a norm from being zero.
      dtype: the dtype of the normalized weights; None is that of the weights.
      param_dtype: the dtype of what the iteration keeps.
      error_on_non_matrix: whether weights with more than two axes are refused.
      update_stats: whether a call keeps what its iteration came to, unless the call says so, or `model.eval()` was called.
      rngs: random streams, of which `params` is drawn from.

    Attributes:
      layer_instance: the layer.
      batch_stats: BatchStat states by the path of the weight and ``"u"``, of shape (1, size of the last axis), or
        ``"sigma"``, the estimate, of shape ().

    Raises:
      ArgumentError: a weight has more than two axes, and that is to be refused.

    Source:
      Miyato et al., Spectral Normalization for Generative Adversarial Networks, 2018, https://arxiv.org/abs/1802.05957

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> rngs = mu.Rngs(0)
      >>> layer = mu.nn.SpectralNorm(mu.nn.Linear(2, 2, use_bias=False, rngs=rngs), n_steps=20, rngs=rngs)
      >>> layer.layer_instance.kernel.value = jnp.diag(jnp.array([4.0, 1.0]))
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

    def __call__(self, x: Any, update_stats: bool | None = None) -> Any:
        """Call the layer with normalized weights.

        Args:
          x: what the layer is called with.
          update_stats: whether to keep what the iteration comes to; goes before what the layer was made with.

        Returns:
          What the layer returns.
        """
        update = first_said(update_stats, self.update_stats and self.training)
        lent = {weight: self._divided(path, weight, update) for path, weight in self._weights().items()}
        return _call_with(lent, self.layer_instance, x)

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
    """Calls a layer with its weights at length 1 along their features, times a scale that is trained.

    Args:
      layer_instance: the layer.
      feature_axes: the axes of a weight that count its features: each has a length and a scale of its own. None is for one
        length of the whole weight.
      use_scale: whether to multiply by scales.
      scale_init: makes the scales, an initializer of `jax.nn.initializers`.
      epsilon: is added to the square of the length.
      dtype: the dtype of the normalized weights; None takes what the weight and its scale promote to.
      param_dtype: the dtype of the scales.
      variable_filter: which weights are normalized.
      promote_dtype: brings ``(weight, scale)`` to one dtype; is called with that tuple and ``dtype=``.
      rngs: random streams, of which `params` is drawn from; needed with other initializers only.

    Attributes:
      layer_instance: the layer.
      scales: Param states by the path of the weight, of the shape of its features; None without.

    Raises:
      RandomStreamError: an initializer is given that may draw, and no `rngs`.

    Source:
      Salimans and Kingma, Weight Normalization, 2016, https://arxiv.org/abs/1602.07868

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> layer = mu.nn.WeightNorm(mu.nn.Linear(2, 1, rngs=mu.Rngs(0)))
      >>> layer.layer_instance.kernel.value = jnp.array([[0.0], [40.0]])
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
          x, *args, **kwargs: what the layer is called with.

        Returns:
          What the layer returns.
        """
        lent = {weight: self._normalized(path, weight) for path, weight in self._weights().items()}
        return _call_with(lent, self.layer_instance, x, *args, **kwargs)

    def _weights(self) -> dict[Path, Variable]:
        return dict(variables(self.layer_instance, lambda path, cell: self.variable_filter(path, cell)))

    def _features(self, weight: Variable) -> list[int]:
        return sorted({axis % weight.ndim for axis in self.feature_axes})

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
