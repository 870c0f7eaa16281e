"""`PReLU`, an activation with a parameter. Those without are functions, and are those of `jax.nn`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from mutatis.model.kinds import Param
from mutatis.nn.layers import NO_METADATA, Layer, Metadata, PromoteDtype, parameter, promote_dtype


class PReLU(Layer):
    """The parametric ReLU: the identity for positive numbers, and multiplication by a learned slope for negative ones.

    Args:
      negative_slope_init: the first value of the slope.
      dtype: the dtype of the computation and of the output. None takes that of the input.
      param_dtype: the dtype of the slope.
      promote_dtype: the function that brings ``(inputs, negative_slope)`` to one dtype; it is called with that tuple and
        ``dtype=``. If `dtype` is None, the tuple has the input only, and the slope is converted to its dtype.
      negative_slope_metadata: metadata of the slope.

    Attributes:
      negative_slope: Param of shape ().

    Source:
      He et al., Delving Deep into Rectifiers, 2015, https://arxiv.org/abs/1502.01852

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> activation = mu.nn.PReLU(0.5)
      >>> activation(jnp.array([-2.0, 2.0])).tolist()
      [-1.0, 2.0]
    """

    negative_slope: Param

    def __init__(
        self,
        negative_slope_init: float = 0.01,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        promote_dtype: PromoteDtype = promote_dtype,
        negative_slope_metadata: Metadata = NO_METADATA,
    ) -> None:
        def start(_key: object, shape: object, dtype: DTypeLike) -> jax.Array:
            return jnp.asarray(negative_slope_init, dtype)

        self.negative_slope = parameter(start, None, (), param_dtype, negative_slope_metadata)
        self.dtype = dtype
        self.param_dtype = param_dtype
        self._settle(promote_dtype=promote_dtype)

    def __call__(self, inputs: ArrayLike) -> jax.Array:
        """Apply the activation to each element.

        Args:
          inputs: an array of floats, of any shape.

        Returns:
          An array of the same shape.

        Raises:
          ArgumentError: the input holds integers.
        """
        x = jnp.asarray(inputs)
        slope = self.negative_slope.value
        (x,) = (x,) if self.dtype is not None else self._promote(self.negative_slope, x)
        if self.dtype is None:
            slope = slope.astype(x.dtype)
        else:
            x, slope = self.promote_dtype((x, slope), dtype=self.dtype)
        return jnp.where(x >= 0, x, slope * x)
