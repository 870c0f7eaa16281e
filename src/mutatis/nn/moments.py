"""What layers that normalize have in common: means and variances of an input, over axes, under a mask and over lanes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn.initializers import Initializer

from mutatis.core import naming
from mutatis.core.avals import broadcasts
from mutatis.core.showing import show_value
from mutatis.errors import ArgumentError, AxisError
from mutatis.model.kinds import Param
from mutatis.model.modules import Module
from mutatis.model.variables import Variable
from mutatis.nn.layers import (
    Layer,
    Metadata,
    Shape,
    as_axes,
    convert,
    draws_nothing,
    materialize,
    misfit,
    param_key,
    parameter,
    widen,
)
from mutatis.random import Rngs


class Normalization(Layer):
    """The parameters of a layer that normalizes, and what it does to an input with them."""

    scale: Param | None
    bias: Param | None = None
    scale_init: Any = None  # kept where the parameters wait for their size
    bias_init: Any = None
    axis_name: Any = None
    axis_index_groups: Any = None
    _otherwise = ""  # what else helps where there is no such axis
    use_fast_variance: Any = True
    num_features: int | None
    param_dtype: Any
    epsilon: float

    def _make(self, name: str, init: Initializer, rngs: Rngs | None, metadata: Metadata) -> Param:
        """A parameter of one number for each feature; without streams if its initializer needs none."""
        layer = type(self).__name__
        key = None if rngs is None and draws_nothing(init) else param_key(layer, rngs, init)
        shape = None if self.num_features is None else (self.num_features,)
        if shape is None:
            self._settle(**{f"{name}_init": init})
        return parameter(init, key, shape, self.param_dtype, metadata)

    def _fit(self, x: jax.Array, axes: Sequence[int], mask: Any = None) -> Shape:
        """The feature axes, counted from the front, of an input that has as many features as the layer.

        Raises:
          ArgumentError: it has not, or not so many axes, or holds integers; or the mask does not fit it.
        """
        owner = self._owner()
        wanted = self.num_features
        if isinstance(owner, Variable) and not owner.deferred:
            wanted = owner.shape[0]
        inside = all(-x.ndim <= axis < x.ndim for axis in axes)
        features = math.prod(x.shape[axis] for axis in axes) if inside else None
        if features is None or wanted not in (None, features):
            along = f"axis {axes[0]}" if len(axes) == 1 else f"axes {tuple(axes)}"
            raise misfit(
                owner,
                expected=f"{'features' if wanted is None else f'{wanted} features'} along {along}",
                got=f"an input of shape {x.shape}",
                cure=f"Give the size of the input where the layer is made, `nn.{type(self).__name__}({features or 8}, "
                "rngs=rngs)`, or None to take it from the first input.",
            )
        self._accept(owner, x)
        if mask is not None:
            self._shown(mask, x)
        materialize(self.scale, self.scale_init, (features,), self.param_dtype)
        materialize(self.bias, self.bias_init, (features,), self.param_dtype)
        return tuple(axis % x.ndim for axis in axes)

    def _owner(self) -> Variable | Module:
        """A state of the layer, by which messages name it; itself, if it has none."""
        parameter = self.scale if self.scale is not None else self.bias
        return self if parameter is None else parameter

    def _take(self, x: jax.Array) -> Any:
        """The input, the scale and the bias in the dtype to compute in."""
        scale = None if self.scale is None else self.scale.value
        bias = None if self.bias is None else self.bias.value
        return self._promote(self._owner(), x, scale, bias)

    def _moments(
        self, x: jax.Array, axes: Sequence[int], mask: Any = None, *, use_mean: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """The mean and the variance over axes, which stay with size 1; in float32 or wider.

        The variance is that around the mean, or without `use_mean` around 0. `use_fast_variance` takes both from one pass
        over the input. What it computes with is the distance from one of the values that are averaged, so it does not
        cancel where the mean is large; and where that value is not at hand, because a mask may hide it or the axis is
        spread over devices, it is two passes all the same.
        """
        x = convert(x, widen(x.dtype))
        average = self._average(x, axes, mask)
        if not use_mean:
            square = average(_squared(x))
            return jnp.zeros_like(square), square
        if not (self.use_fast_variance and mask is None and x.size and not _spread(x, axes)):
            mean = average(x)
            return mean, average(_squared(x - mean))
        first = lax.stop_gradient(x[tuple(slice(1) if axis in axes else slice(None) for axis in range(x.ndim))])
        near = jnp.mean(x - first, axes, keepdims=True)
        mean = first + near
        var = jnp.maximum(0, jnp.mean(_squared(x - first), axes, keepdims=True) - _squared(near))
        if self.axis_name is None:
            return mean, var
        of_all = self._over_lanes(mean, lax.pmean)
        return of_all, self._over_lanes(var + _squared(mean - of_all), lax.pmean)

    def _average(self, x: jax.Array, axes: Sequence[int], mask: Any) -> Callable[[jax.Array], jax.Array]:
        """How to average arrays like `x`, over what the mask shows, and over lanes."""
        if mask is None:
            return lambda values: self._over_lanes(jnp.mean(values, axes, keepdims=True), lax.pmean)
        shown = self._shown(mask, x)

        def average(values: jax.Array) -> jax.Array:
            total = jnp.sum(values, axes, where=shown, keepdims=True)
            count = jnp.sum(shown, axes, dtype=total.real.dtype, keepdims=True)
            return self._over_lanes(total, lax.psum) / jnp.maximum(self._over_lanes(count, lax.psum), 1)

        return average

    def _shows_any(self, mask: Any, x: jax.Array, axes: Sequence[int]) -> jax.Array:
        """Whether a mask shows anything along axes, which stay with size 1, in any lane."""
        shown = jnp.any(self._shown(mask, x), axes, keepdims=True)
        return self._over_lanes(shown.astype(jnp.int32), lax.psum) > 0

    def _shown(self, mask: Any, x: jax.Array) -> jax.Array:
        """A mask in the shape of the input.

        Raises:
          ArgumentError: it does not broadcast to that.
        """
        mask = jnp.asarray(mask)
        if not broadcasts(mask.shape, x.shape):
            owner = self._owner()
            raise ArgumentError(
                f"the mask for {naming.describe(owner)} does not fit the input of its layer",
                path="mask",
                where=naming.where(),
                expected=f"a shape that broadcasts to {x.shape}",
                got=f"shape {mask.shape}",
                cure="A mask of shape (batch, length) for an input of shape (batch, length, features): "
                "`mask=mask[..., None]`.",
            )
        return jnp.broadcast_to(mask.astype(bool), x.shape)

    def _over_lanes(self, values: jax.Array, reduce: Callable[..., jax.Array]) -> jax.Array:
        if self.axis_name is None:
            return values
        groups = {} if self.axis_index_groups is None else {"axis_index_groups": self.axis_index_groups}
        try:
            return reduce(values, self.axis_name, **groups)
        except NameError:
            owner = self._owner()
            raise AxisError(
                f"{'state' if isinstance(owner, Variable) else 'layer'} {naming.describe(owner)} is averaged over an axis "
                f"`{self.axis_name}` that does not exist",
                path=naming.path_of(owner),
                where=naming.where(),
                expected=f"a transform around the call with axis_name={self.axis_name!r}",
                made_at=naming.made_at(owner),
                cure=f"`mu.vmap(model, axis_name={self.axis_name!r})(batch)`{self._otherwise}",
            ) from None

    def _normalized(self, x: Any, mean: Any, var: Any, scale: Any, bias: Any, axes: Shape) -> jax.Array:
        """The input less its mean, by its deviation, scaled and shifted along axes; computed in float32 or wider."""
        wide = widen(x.dtype)
        place = [size if axis in axes else 1 for axis, size in enumerate(x.shape)]
        factor = lax.rsqrt(convert(var, widen(var.dtype)) + self.epsilon)
        if scale is not None:
            factor = factor * convert(scale, wide).reshape(place)
        y = (convert(x, wide) - mean) * factor
        if bias is not None:
            y = y + convert(bias, wide).reshape(place)
        return convert(y, x.dtype)


def axes_of(axes: Any, ndim: int) -> Shape:
    """Axes counted from the front, each once.

    Raises:
      ArgumentError: an array of so many axes has no such axis.
    """
    if outside := [axis for axis in as_axes(axes) if not -ndim <= axis < ndim]:
        raise ArgumentError(
            f"there is no axis {outside[0]} of an array of {ndim} axes",
            where=naming.where(),
            expected=f"axes from {-ndim} to {ndim - 1}",
            got=show_value(axes),
            cure="Axes that count from the end, such as -1, fit inputs with more or fewer batch axes.",
        )
    return tuple(sorted({axis % ndim for axis in as_axes(axes)}))


def _squared(x: jax.Array) -> jax.Array:
    """The square of the absolute value."""
    return jnp.square(x.real) + jnp.square(x.imag) if jnp.iscomplexobj(x) else jnp.square(x)


def _spread(x: jax.Array, axes: Sequence[int]) -> bool:
    """Whether an array is spread over devices along an axis, and its type says so."""
    sharding = jax.typeof(x).sharding
    return not sharding.mesh.empty and any(sharding.spec[axis] is not None for axis in axes)


def check_setting(layer: str, name: str, value: Any, fits: bool, expected: str, cure: str) -> None:
    """Refuse a setting that contradicts the others.

    Raises:
      ArgumentError: it does.
    """
    if not fits:
        raise ArgumentError(
            f"`nn.{layer}` cannot work with this `{name}`",
            path=name,
            expected=expected,
            got=show_value(value),
            cure=cure,
        )
