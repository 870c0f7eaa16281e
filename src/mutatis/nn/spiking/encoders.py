"""Encoders: functions and modules that turn numbers into spikes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from mutatis.core.avals import show_type
from mutatis.core.calls import as_integer
from mutatis.core.showing import show_value
from mutatis.errors import ArgumentError
from mutatis.model.kinds import RngState, stream_value
from mutatis.model.modules import Module
from mutatis.nn.layers import widen
from mutatis.nn.spiking.units import has_unit, in_steps, in_unit, step_length
from mutatis.random import Rngs, stream_of


class Poisson(Module):
    """Encodes rates as spikes at random times (a Poisson process). There is at most one spike in a step.

    Args:
      rngs: random streams; a stream of the encoder's own is forked from `default`.
      dtype: the dtype of the spikes.

    Attributes:
      stream: RngState, the stream that calls draw from.

    Raises:
      RandomStreamError: there is no stream to draw from.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> encode = mu.nn.Poisson(rngs=mu.Rngs(0))
      >>> rates = jnp.full(100, 200.0)  # 100 neurons at 200 Hz
      >>> spikes = mu.for_loop(lambda _: encode(rates), jnp.arange(1000))  # 1000 steps of 1 ms: a second
      >>> bool(abs(spikes.sum(0).mean() - 200) < 5)
      True
    """

    def __init__(self, *, rngs: Rngs, dtype: Any = jnp.float32) -> None:
        key = stream_of(rngs, "default", "`nn.Poisson`").draw()
        self.stream = RngState(stream_value(key), tag="default")
        self.dtype = dtype

    def __call__(self, rates: ArrayLike) -> jax.Array:
        """Draw the spikes of one step in time.

        Args:
          rates: the rates in Hz (spikes per second), an array of floats of any shape.

        Returns:
          The spikes, 0 or 1, of the same shape.

        Raises:
          ArgumentError: the rates are not floats, or a quantity in another unit.
        """
        array = jnp.asarray(in_unit(rates, "Hz", "rates"))
        if has_unit(rates) and jnp.issubdtype(array.dtype, jnp.integer):  # `50 * saiunit.Hz` is no count of spikes
            array = array.astype(jnp.result_type(float))
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ArgumentError(
                "`nn.Poisson` was given rates that are no floating numbers",
                path="rates",
                expected="spikes per second, as floating numbers",
                got=show_type(array),
                cure="`encode(200.0 * pixels)`, with pixels from 0 to 1",
            )
        wide = widen(array.dtype)  # narrower numbers are too coarse for small chances
        chance = array.astype(wide) * jnp.asarray(step_length() * 1e-3, wide)
        return (jax.random.uniform(self.stream.draw(), array.shape, wide) < chance).astype(self.dtype)


def latency(
    x: ArrayLike, steps: int, *, tau: float = 5.0, threshold: float = 0.01, dtype: Any = jnp.float32
) -> jax.Array:
    """Encodes each number as one spike, which comes the earlier, the larger the number is.

    The spike comes when a leaky membrane with the number as its input would reach the threshold.

    Args:
      x: an array of floats from 0 to 1, of any shape.
      steps: the number of steps in time.
      tau: the time constant of the membrane, in steps; a quantity of time is divided by `nn.dt`.
      threshold: the threshold of the membrane. Numbers up to it never spike.
      dtype: the dtype of the spikes.

    Returns:
      The spikes, 0 or 1, of shape (steps, *x.shape).

    Raises:
      ArgumentError: `steps` is no int from 0, or `tau` or `threshold` is not above 0.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> spikes = mu.nn.latency(jnp.array([1.0, 0.02, 0.0]), steps=20)
      >>> spikes.argmax(0)[:2], spikes.sum(0)
      (Array([0, 3], dtype=int32), Array([1., 1., 0.], dtype=float32))
    """
    array, tau, count = jnp.asarray(in_unit(x, "", "x")), in_steps(tau, "tau"), as_integer(steps)
    for name, given, fits, expected in (
        ("steps", steps, count is not None and count >= 0, "an int from 0, known where it is called"),
        ("tau", tau, _is_positive(tau), "a number of steps above 0"),
        ("threshold", threshold, _is_positive(in_unit(threshold, "", "threshold")), "a number above 0"),
    ):
        if not fits:
            raise ArgumentError(
                f"`nn.latency` cannot work with `{name}={show_value(given)}`",
                path=name,
                expected=expected,
                got=show_value(given),
                cure="`nn.latency(x, steps=20, tau=5.0, threshold=0.01)`",
            )
    above = array > threshold
    safe = jnp.where(above, array, threshold + 1.0)
    when = jnp.floor(tau * jnp.log(safe / (safe - threshold))).astype(jnp.int32)
    at = jnp.arange(count).reshape((-1,) + (1,) * array.ndim)
    return ((at == when[None]) & above[None]).astype(dtype)


def _is_positive(value: Any) -> bool:
    return isinstance(value, jax.core.Tracer) or bool(np.all(np.asarray(value) > 0))
