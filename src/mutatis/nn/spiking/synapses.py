"""Synapses: conductances that spikes raise and that decay, and the short-term plasticity of synapses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from mutatis.core.showing import show_value
from mutatis.errors import ArgumentError
from mutatis.nn.spiking.dynamics import Dynamics, Parameter
from mutatis.nn.spiking.integrators import relaxed


class Expon(Dynamics):
    """Synapses with exponential decay: a spike raises the conductance by 1, and then ``tau dg/dt = -g``.

    Args:
      size: the number of synapses, or their shape.
      tau: the time constant of the decay, in ms.
      dtype: the dtype of the state.

    Attributes:
      g: Hidden of shape (*batch, *size), the conductances.

    Raises:
      ArgumentError: `tau` has another shape or is not above 0; or in a call the input has another shape.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> synapse = mu.nn.Expon(1, tau=10.0)
      >>> spikes = jnp.zeros((11, 1)).at[0].set(1.0)  # one spike, in the first of 11 steps
      >>> g = mu.for_loop(synapse, spikes)
      >>> bool(jnp.allclose(g[10], jnp.exp(-1.0)))
      True
    """

    _positive = frozenset({"tau"})
    _input_unit = ""
    _units: ClassVar[Mapping[str, str]] = dict.fromkeys(_positive, "ms")

    def __init__(self, size: int | tuple[int, ...], tau: Parameter = 8.0, *, dtype: Any = jnp.float32) -> None:
        super().__init__(size, dtype)
        self._parameters(tau=tau)
        self.g = self._hidden()

    def __call__(self, spikes: ArrayLike) -> jax.Array:
        """Make one step in time.

        Args:
          spikes: the arriving spikes, a number or an array of the shape of the states; a spike of strength `w` is the number
            `w`.

        Returns:
          The conductances `g`, to which the spikes of this step have added their whole strength.
        """
        x, tau = self._input(spikes, self.g.value), self._get("tau")
        self.g.value = relaxed(self.g.value, 0.0, tau, self._step()) + x
        return self.g.value


class DualExpon(Dynamics):
    """Synapses whose conductance rises and decays with two time constants. Its peak after a single spike is 1.

    Args:
      size: the number of synapses, or their shape.
      tau_decay: the time constant of the decay, in ms.
      tau_rise: the time constant of the rise, in ms. It must differ from `tau_decay`; for equal ones there is `Alpha`.
      dtype: the dtype of the states.

    Attributes:
      decay, rise: Hidden of shape (*batch, *size); the conductance is their difference, scaled.

    Raises:
      ArgumentError: a time constant has another shape or is not above 0, or both are equal; or an input has another shape.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> synapse = mu.nn.DualExpon(1, tau_decay=10.0, tau_rise=1.0)
      >>> spikes = jnp.zeros((1000, 1)).at[0].set(1.0)
      >>> with mu.nn.dt.set(0.01):
      ...     g = mu.for_loop(synapse, spikes)
      >>> bool(jnp.allclose(g.max(), 1.0, atol=1e-4))
      True
    """

    _positive = frozenset({"tau_decay", "tau_rise"})
    _input_unit = ""
    _units: ClassVar[Mapping[str, str]] = dict.fromkeys(_positive, "ms")

    def __init__(
        self,
        size: int | tuple[int, ...],
        tau_decay: Parameter = 10.0,
        tau_rise: Parameter = 1.0,
        *,
        dtype: Any = jnp.float32,
    ) -> None:
        super().__init__(size, dtype)
        self._parameters(tau_decay=tau_decay, tau_rise=tau_rise)
        self.decay, self.rise = self._hidden(), self._hidden()
        times = [self._get("tau_decay"), self._get("tau_rise")]
        known = not any(isinstance(time, jax.core.Tracer | jax.ShapeDtypeStruct) for time in times)
        near = float(jnp.finfo(dtype).eps) ** 0.5  # so near that their difference has few digits
        if known and np.any(np.abs(np.subtract(*map(np.asarray, times))) <= near * np.asarray(times[0])):
            raise ArgumentError(
                "`nn.DualExpon` cannot rise as slowly as it decays: the difference of the two exponentials is zero",
                path="tau_rise",
                expected="another time than `tau_decay`, so far from it that their difference has digits left",
                got=show_value(times[1]),
                cure=f"Both times in one: `nn.Alpha({self.size}, tau=10.0)`.",
            )

    def __call__(self, spikes: ArrayLike) -> jax.Array:
        """Make one step in time.

        Args:
          spikes: the arriving spikes, a number or an array of the shape of the states; a spike of strength `w` is the number
            `w`.

        Returns:
          The conductances, of the shape of the states; a spike starts to raise them in the next step.
        """
        x, step = self._input(spikes, self.decay.value), self._step()
        slow, fast = self._get("tau_decay"), self._get("tau_rise")
        self.decay.value = relaxed(self.decay.value, 0.0, slow, step) + x
        self.rise.value = relaxed(self.rise.value, 0.0, fast, step) + x
        peak = jnp.log(slow / fast) * slow * fast / (slow - fast)
        height = jnp.exp(-peak / slow) - jnp.exp(-peak / fast)
        return ((self.decay.value - self.rise.value) / height).astype(self.dtype)


class Alpha(Dynamics):
    """Synapses with an alpha function: after a spike the conductance is ``t / tau * exp(1 - t / tau)``.

    Its peak is 1, at ``t = tau``.

    Args:
      size: the number of synapses, or their shape.
      tau: the time from a spike to the peak, in ms.
      dtype: the dtype of the states.

    Attributes:
      g: Hidden of shape (*batch, *size), the conductances.
      h: Hidden of the same shape, the decaying sum of spikes that drives `g`.

    Raises:
      ArgumentError: `tau` has another shape or is not above 0; or in a call the input has another shape.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> spikes = jnp.zeros((11, 1)).at[0].set(1.0)  # one spike, in the first of 11 steps
      >>> g = mu.for_loop(mu.nn.Alpha(1, tau=5.0), spikes)
      >>> bool(jnp.allclose(g[5], 1.0)), int(g.argmax())
      (True, 5)
    """

    _positive = frozenset({"tau"})
    _input_unit = ""
    _units: ClassVar[Mapping[str, str]] = dict.fromkeys(_positive, "ms")

    def __init__(self, size: int | tuple[int, ...], tau: Parameter = 8.0, *, dtype: Any = jnp.float32) -> None:
        super().__init__(size, dtype)
        self._parameters(tau=tau)
        self.g, self.h = self._hidden(), self._hidden()

    def __call__(self, spikes: ArrayLike) -> jax.Array:
        """Make one step in time.

        Args:
          spikes: the arriving spikes, a number or an array of the shape of the states; a spike of strength `w` is the number
            `w`.

        Returns:
          The conductances `g`; a spike starts to raise them in the next step.
        """
        x, tau, step = self._input(spikes, self.g.value), self._get("tau"), self._step()
        decay = jnp.exp(-jnp.asarray(step / tau, self.dtype))
        # Both equations together have a solution: `g` is moved by `h` while both decay.
        self.g.value = decay * (self.g.value + jnp.asarray(step / tau * jnp.e, self.dtype) * self.h.value)
        self.h.value = decay * self.h.value + x
        return self.g.value


class STP(Dynamics):
    """Synapses with short-term plasticity: recent spikes make the next ones stronger (facilitation) and weaker (depression).

    Args:
      size: the number of synapses, or their shape.
      u: the share of its resources that a synapse uses for a single spike, from 0 to 1.
      tau_f: the time constant with which facilitation decays, in ms.
      tau_d: the time constant with which the resources recover, in ms.
      dtype: the dtype of the states.

    Attributes:
      u_now: Hidden of shape (*batch, *size), the facilitation: the share for the next spike, before that spike raises it.
      x: Hidden of the same shape, the resources that are there, from 0 to 1.

    Raises:
      ArgumentError: a parameter has another shape, or a time constant is not above 0; or in a call the input has another shape.

    Source: Tsodyks, Pawelzik and Markram, Neural networks with dynamic synapses, 1998,
      https://doi.org/10.1162/089976698300017502

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> synapse = mu.nn.STP(1, u=0.5, tau_f=1.0, tau_d=500.0)
      >>> out = mu.for_loop(synapse, jnp.ones((5, 1)))  # a spike in each of 5 steps
      >>> bool((jnp.diff(out[:, 0]) < 0).all())  # depression: each is weaker than the one before
      True
    """

    _positive = frozenset({"tau_f", "tau_d"})
    _units: ClassVar[Mapping[str, str]] = dict.fromkeys(_positive, "ms")
    _input_unit = ""

    def __init__(
        self,
        size: int | tuple[int, ...],
        u: Parameter = 0.15,
        tau_f: Parameter = 1500.0,
        tau_d: Parameter = 200.0,
        *,
        dtype: Any = jnp.float32,
    ) -> None:
        super().__init__(size, dtype)
        self._parameters(u=u, tau_f=tau_f, tau_d=tau_d)
        self.u_now, self.x = self._hidden(), self._hidden(1.0)

    def __call__(self, spikes: ArrayLike) -> jax.Array:
        """Make one step in time.

        Args:
          spikes: the arriving spikes, 0 or 1, a number or an array of the shape of the states.

        Returns:
          The strengths of the spikes, from 0 to 1, of the shape of the states; 0 where there is no spike.
        """
        step, spikes = self._step(), self._input(spikes, self.x.value)
        tau_f, tau_d, base = self._get("tau_f"), self._get("tau_d"), self._get("u")
        u = relaxed(self.u_now.value, 0.0, tau_f, step)
        x = relaxed(self.x.value, 1.0, tau_d, step)
        u = u + spikes * base * (1 - u)
        used = u * x * spikes
        self.u_now.value, self.x.value = u, x - used
        return used
