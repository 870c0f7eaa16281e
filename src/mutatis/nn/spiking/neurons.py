"""Neurons: membranes that integrate their input, spike at a threshold, and start again.

A call is one step in time, of the length of the context `nn.dt` (1.0 if nothing is set; times are in milliseconds). The states of
a neuron are `Hidden` with an `init`: `mu.reset(net, mu.Hidden, batch_shape=(32,))` starts a batch. A parameter is a number, an
array with a number for each neuron, or a Variable: ``tau=mu.Param(jnp.full(100, 20.0))`` is trained. A quantity with a unit
(``10 * saiunit.ms``) is taken as a number of the parameter's unit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from mutatis.core import naming
from mutatis.core.calls import check_function
from mutatis.core.showing import show_value
from mutatis.errors import ArgumentError
from mutatis.nn.layers import widen
from mutatis.nn.spiking.dynamics import Dynamics, Parameter
from mutatis.nn.spiking.integrators import exp_euler, relaxed
from mutatis.surrogate import sigmoid

Surrogate: TypeAlias = Callable[[jax.Array], jax.Array]
Reset: TypeAlias = Literal["soft", "hard"]


class Neuron(Dynamics):
    """Base class of neurons that spike.

    Attributes:
      v: Hidden of shape (*batch, *size), the membrane potentials.
      spikes: Hidden of the same shape, the spikes of the last step, 0 or 1.

    Example:
      >>> import mutatis as mu
      >>> net = mu.nn.Sequential(mu.nn.Linear(2, 3, rngs=mu.Rngs(0)), mu.nn.LIF(3))
      >>> len(mu.modules(net, mu.nn.Neuron)), isinstance(net[1], mu.nn.Neuron)
      (1, True)
    """

    v_th: Parameter
    v_reset: Parameter
    tau_ref: Parameter
    surrogate: Surrogate
    reset: Reset

    def _check(self, low: str, surrogate: Any) -> None:
        """Raise unless the threshold is above the potential after a spike, and there is a surrogate."""
        check_function(surrogate, f"nn.{type(self).__name__}", "surrogate", "`surrogate=mu.surrogate.arctan`")
        ends = [self._value(low), self._value("v_th")]
        known = not any(isinstance(end, jax.core.Tracer | jax.ShapeDtypeStruct) for end in ends)
        if known and not bool(np.all(np.less(*map(np.asarray, ends)))):
            raise ArgumentError(
                f"`nn.{type(self).__name__}` cannot have a threshold at or below `{low}`",
                path="v_th",
                expected=f"`v_th` above {show_value(ends[0])}",
                got=show_value(ends[1]),
                cure=f"`nn.{type(self).__name__}(n, v_th=1.0, {low}=0.0)`",
            )

    def _check_reset(self, reset: str) -> None:
        if reset not in ("soft", "hard"):
            raise ArgumentError(
                f"`nn.{type(self).__name__}` cannot be reset {show_value(reset)}",
                path="reset",
                expected='"soft", which subtracts, or "hard", which sets',
                got=show_value(reset),
                cure=f'`nn.{type(self).__name__}(..., reset="soft")`',
            )

    def _fire(self, v: jax.Array, above: Any = 0.0) -> jax.Array:
        """The spikes of membranes, which differentiate as the surrogate says."""
        v_th, v_reset = self._get("v_th"), self._get("v_reset")
        return self.surrogate((v - v_th - above) / (v_th - v_reset))

    def _after(self, v: jax.Array, spikes: jax.Array) -> jax.Array:
        """Membranes after their spikes: lowered by the way from the threshold to the reset, or set to the reset."""
        self._check_reset(self.reset)
        top = self._get("v_th") if self.reset == "soft" else jax.lax.stop_gradient(v)
        return v - (top - self._get("v_reset")) * spikes


class LIF(Neuron):
    """Leaky integrate-and-fire neurons: ``tau dv/dt = v_rest - v + resistance * x``.

    A call makes one step in time, of the length `nn.dt` (1 ms by default), and returns the spikes. A neuron spikes if its
    membrane potential is at the threshold or above it at the end of the step. The next step starts from the reset. Each
    parameter is a number, an array of the shape `size`, or a Variable: ``tau=mu.Param(jnp.full(100, 20.0))`` is trained.
    Numbers may stand for potentials of any scale, quantities with a unit are taken as mV. Membranes start at `v_rest`.
    ``mu.reset(net, mu.Hidden, batch_shape=(32,))`` starts a batch, at the `v_rest` of that time.

    Args:
      size: the number of neurons, or their shape.
      tau: the time constant of the membrane, in ms.
      v_th: the threshold.
      v_reset: the membrane potential after a spike.
      v_rest: the membrane potential that a neuron without input approaches.
      resistance: the factor of the input. If it is a quantity, in MOhm, the input is a current in nA.
      tau_ref: the refractory time after a spike, in ms: for so long the membrane stays at the reset.
      reset: ``"soft"`` subtracts ``v_th - v_reset`` after a spike, ``"hard"`` sets the membrane to `v_reset`.
      surrogate: the function that makes the spikes and has a surrogate gradient, of `mutatis.surrogate`.
      dtype: the dtype of the states.

    Attributes:
      v: Hidden of shape (*batch, *size), the membrane potentials.
      spikes: Hidden of the same shape, the spikes of the last step.
      rest: Hidden of the same shape, the refractory time that is left, in ms, float32 or wider; None if `tau_ref` is 0.

    Raises:
      ArgumentError: a parameter has another shape, or `tau` is not above 0; or in a call the input has another shape.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> net = mu.nn.LIF(3, tau=10.0)
      >>> spikes = mu.for_loop(net, jnp.full((50, 3), 1.5))  # 50 steps of 1 ms
      >>> spikes.shape, spikes.sum(0)
      ((50, 3), Array([4., 4., 4.], dtype=float32))
    """

    _units: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("tau", "tau_ref"), "ms"),
        **dict.fromkeys(("v_th", "v_reset", "v_rest"), "mV"),
        "resistance": "MOhm",
    }
    _positive = frozenset({"tau"})

    def __init__(
        self,
        size: int | tuple[int, ...],
        tau: Parameter = 10.0,
        v_th: Parameter = 1.0,
        v_reset: Parameter = 0.0,
        *,
        v_rest: Parameter = 0.0,
        resistance: Parameter = 1.0,
        tau_ref: Parameter = 0.0,
        reset: Reset = "soft",
        surrogate: Surrogate = sigmoid,
        dtype: Any = jnp.float32,
    ) -> None:
        super().__init__(size, dtype)
        self._check_reset(reset)
        self._parameters(tau=tau, v_th=v_th, v_reset=v_reset, v_rest=v_rest, resistance=resistance, tau_ref=tau_ref)
        self._set_input_unit(resistance)
        self._check("v_reset", surrogate)
        self.reset = reset
        self.surrogate = surrogate
        self.v = self._hidden_at("v_rest")
        self.spikes = self._hidden()
        self.rest = (
            None if self._never_rests() else self._hidden(dtype=widen(dtype))
        )  # narrow numbers do not count steps

    def __call__(self, x: ArrayLike) -> jax.Array:
        """Make one step in time.

        Args:
          x: the input, a number or an array of the shape of the states.

        Returns:
          The spikes, 0 or 1, of the shape of the states.
        """
        step = self._step()
        x = self._input(x, self.v.value)
        start = self._after(self.v.value, self.spikes.value)
        v = relaxed(start, self._get("v_rest") + self._get("resistance") * x, self._get("tau"), step)
        if self.rest is None:
            if not self._never_rests():
                raise ArgumentError(
                    f"`nn.{type(self).__name__}` was made without a refractory time, and cannot have one now",
                    path="tau_ref",
                    where=naming.where(),
                    expected="`tau_ref=0.0`",
                    got=show_value(self.tau_ref),
                    cure=f"Say it where the neurons are made: `nn.{type(self).__name__}(n, tau_ref=5.0)`.",
                )
            spikes = self._fire(v)
        else:
            # In whole steps, as many as the time needs, whatever is left of them by rounding.
            rest, wide = self.rest.value, jnp.asarray(step, self.rest.dtype)
            awake = rest <= 0.5 * wide
            v = jnp.where(awake, v, start)
            spikes = jnp.where(awake, self._fire(v), 0)
            whole = jnp.ceil(jnp.asarray(self._get("tau_ref"), rest.dtype) / wide - 0.01)
            left = jnp.where(jax.lax.stop_gradient(spikes) > 0, whole, jnp.maximum(jnp.round(rest / wide) - 1, 0))
            self.rest.value = left * wide
        self.v.value, self.spikes.value = v, spikes
        return spikes

    def _never_rests(self) -> bool:
        time = self.tau_ref
        return isinstance(time, int | float) and time == 0


class LI(Dynamics):
    """Leaky integrators that never spike, such as a readout: ``tau dv/dt = v_rest - v + resistance * x``.

    Args:
      size, tau, v_rest, resistance, dtype: as in `LIF`.

    Attributes:
      v: Hidden of shape (*batch, *size), the membrane potentials.

    Raises:
      ArgumentError: as in `LIF`.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> readout = mu.nn.LI(2, tau=20.0)
      >>> mu.for_loop(readout, jnp.ones((3, 2))).shape
      (3, 2)
    """

    _units: ClassVar[Mapping[str, str]] = LIF._units
    _positive = frozenset({"tau"})

    def __init__(
        self,
        size: int | tuple[int, ...],
        tau: Parameter = 10.0,
        *,
        v_rest: Parameter = 0.0,
        resistance: Parameter = 1.0,
        dtype: Any = jnp.float32,
    ) -> None:
        super().__init__(size, dtype)
        self._parameters(tau=tau, v_rest=v_rest, resistance=resistance)
        self._set_input_unit(resistance)
        self.v = self._hidden_at("v_rest")

    def __call__(self, x: ArrayLike) -> jax.Array:
        """Make one step in time with the input `x`, a number or an array of the shape of `v`, and return `v`."""
        x = self._input(x, self.v.value)
        goal = self._get("v_rest") + self._get("resistance") * x
        self.v.value = relaxed(self.v.value, goal, self._get("tau"), self._step())
        return self.v.value


class ALIF(LIF):
    """Adaptive leaky integrate-and-fire neurons: each spike raises the threshold, ``v_th + beta * a``, which then falls again.

    Args:
      size, tau, v_th, v_reset, v_rest, resistance, tau_ref, reset, surrogate, dtype: as in `LIF`.
      tau_a: the time constant with which the threshold falls, in ms.
      beta: the rise of the threshold by one spike.

    Attributes:
      v, spikes, rest: as in `LIF`.
      a: Hidden of shape (*batch, *size), the sum of the past spikes, each of which decays with `tau_a`.

    Raises:
      ArgumentError: as in `LIF`, or `tau_a` is not above 0.

    Source: Bellec et al., Long short-term memory and learning-to-learn in networks of spiking neurons, 2018,
      https://arxiv.org/abs/1803.09574

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> spikes = mu.for_loop(mu.nn.ALIF(1, beta=0.5), jnp.full((200, 1), 2.0))
      >>> bool(spikes[:50].sum() > spikes[150:].sum())  # it spikes less often as it adapts
      True
    """

    _units: ClassVar[Mapping[str, str]] = {**LIF._units, "tau_a": "ms", "beta": "mV"}
    _positive = frozenset({"tau", "tau_a"})

    def __init__(
        self,
        size: int | tuple[int, ...],
        tau: Parameter = 10.0,
        v_th: Parameter = 1.0,
        v_reset: Parameter = 0.0,
        *,
        tau_a: Parameter = 100.0,
        beta: Parameter = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(size, tau, v_th, v_reset, **options)
        self._parameters(tau_a=tau_a, beta=beta)
        self.a = self._hidden()

    def _fire(self, v: jax.Array, above: Any = 0.0) -> jax.Array:
        return super()._fire(v, above + self._get("beta") * self.a.value)

    def __call__(self, x: ArrayLike) -> jax.Array:
        """Make one step in time with the input `x`, as in `LIF`, and return the spikes, 0 or 1."""
        tau_a = self._get("tau_a")
        self.a.value = relaxed(self.a.value + self.spikes.value, 0.0, tau_a, self._step())
        return super().__call__(x)


class Izhikevich(Neuron):
    """Neurons of two variables with many firing patterns: ``dv/dt = 0.04 v**2 + 5 v + 140 - u + x``, ``du/dt = a (b v - u)``.

    A call makes one step in time, of the length `nn.dt`, and returns the spikes. After a spike, `v` is set to `c` and `u` grows
    by `d`. The default parameters are those of regular spiking. Each may be a number, an array or a Variable, as in `LIF`.

    Args:
      size: the number of neurons, or their shape.
      a: the rate of the recovery `u`, in 1/ms.
      b: the strength with which `u` follows `v`.
      c: the membrane potential after a spike, in mV.
      d: the growth of `u` by a spike.
      v_th: the membrane potential of a spike, in mV.
      surrogate: the function that makes the spikes and has a surrogate gradient, of `mutatis.surrogate`.
      dtype: the dtype of the states.

    Attributes:
      v, u: Hidden of shape (*batch, *size), the membrane potential in mV and its recovery.
      spikes: Hidden of the same shape, the spikes of the last step.

    Source: Izhikevich, Simple model of spiking neurons, 2003, https://doi.org/10.1109/TNN.2003.820440

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> with mu.nn.dt.set(0.5):
      ...     spikes = mu.for_loop(mu.nn.Izhikevich(1), jnp.full((400, 1), 10.0))  # 200 ms
      >>> bool(spikes.sum() > 2)
      True
    """

    _units: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("a", "b"), "1/ms"),
        **dict.fromkeys(("c", "v_th"), "mV"),
        "d": "mV/ms",
    }
    _input_unit = "mV/ms"

    def __init__(
        self,
        size: int | tuple[int, ...],
        a: Parameter = 0.02,
        b: Parameter = 0.2,
        c: Parameter = -65.0,
        d: Parameter = 8.0,
        *,
        v_th: Parameter = 30.0,
        surrogate: Surrogate = sigmoid,
        dtype: Any = jnp.float32,
    ) -> None:
        super().__init__(size, dtype)
        self._parameters(a=a, b=b, c=c, d=d, v_th=v_th)
        self._check("c", surrogate)
        self.surrogate = surrogate
        self.v, self.u, self.spikes = self._hidden(-65.0), self._hidden(-13.0), self._hidden()

    def __call__(self, x: ArrayLike) -> jax.Array:
        """Make one step in time with the input `x`, a number or an array of the shape of `v`, and return the spikes, 0 or 1."""
        step = self._step()
        x = self._input(x, self.v.value)
        a, b, c, d, v_th = (self._get(name) for name in ("a", "b", "c", "d", "v_th"))
        v = self.v.value + (c - jax.lax.stop_gradient(self.v.value)) * self.spikes.value
        u = self.u.value + d * self.spikes.value
        v = v + step * (0.04 * v * v + 5 * v + 140 - u + x)
        u = exp_euler(lambda u: a * (b * v - u), u, step)
        # The way up has no end: a long step would overflow. The derivative goes on.
        v = v - jax.lax.stop_gradient(jnp.maximum(v - (v_th + jnp.abs(v_th)), 0))
        spikes = self.surrogate((v - v_th) / (v_th - c))
        self.v.value, self.u.value, self.spikes.value = v, u, spikes
        return spikes


class HodgkinHuxley(Neuron):
    """Hodgkin-Huxley neurons: a membrane with channels of sodium and potassium, and a leak.

    They need small steps, such as 0.02 ms.

    Args:
      size: the number of neurons, or their shape.
      v_th: the membrane potential of a spike, in mV: a neuron spikes in the step in which it comes from below to `v_th` or
        above.
      capacitance: the capacitance of the membrane, in uF/cm^2.
      g_na, g_k, g_l: the conductances of sodium, potassium and the leak, in mS/cm^2.
      e_na, e_k, e_l: their reversal potentials, in mV.
      surrogate: the function that makes the spikes and has a surrogate gradient, of `mutatis.surrogate`.
      dtype: the dtype of the states.

    Attributes:
      v: Hidden of shape (*batch, *size), the membrane potentials in mV.
      m, h, n: Hidden of the same shape, the open shares of the gates, from 0 to 1.
      spikes: Hidden of the same shape, the spikes of the last step.

    Source: Hodgkin and Huxley, A quantitative description of membrane current, 1952,
      https://doi.org/10.1113/jphysiol.1952.sp004764

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> with mu.nn.dt.set(0.02):
      ...     spikes = mu.for_loop(mu.nn.HodgkinHuxley(1), jnp.full((2500, 1), 10.0))  # 50 ms
      >>> float(spikes.sum())
      4.0
    """

    _units: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("v_th", "e_na", "e_k", "e_l"), "mV"),
        **dict.fromkeys(("g_na", "g_k", "g_l"), "mS/cm^2"),
        "capacitance": "uF/cm^2",
    }
    _positive = frozenset({"capacitance"})
    _input_unit = "uA/cm^2"

    def __init__(
        self,
        size: int | tuple[int, ...],
        *,
        v_th: Parameter = 20.0,
        capacitance: Parameter = 1.0,
        g_na: Parameter = 120.0,
        g_k: Parameter = 36.0,
        g_l: Parameter = 0.3,
        e_na: Parameter = 50.0,
        e_k: Parameter = -77.0,
        e_l: Parameter = -54.387,
        surrogate: Surrogate = sigmoid,
        dtype: Any = jnp.float32,
    ) -> None:
        super().__init__(size, dtype)
        self._parameters(v_th=v_th, capacitance=capacitance, g_na=g_na, g_k=g_k, g_l=g_l, e_na=e_na, e_k=e_k, e_l=e_l)
        self.surrogate = surrogate
        self.v, self.spikes = self._hidden(-65.0), self._hidden()
        self.m, self.h, self.n = self._hidden(0.0529), self._hidden(0.5961), self._hidden(0.3177)

    def __call__(self, x: ArrayLike) -> jax.Array:
        """Make one step in time.

        Args:
          x: the current into the membrane, in uA/cm^2, a number or an array of the shape of the states.

        Returns:
          The spikes, 0 or 1, of the shape of the states.
        """
        step, before = self._step(), self.v.value
        x = self._input(x, before)
        for gate, (opens, closes) in zip((self.m, self.h, self.n), _rates(before), strict=True):
            gate.value = exp_euler(functools.partial(_gate, opens, closes), gate.value, step)
        sodium = self._get("g_na") * self.m.value**3 * self.h.value
        potassium = self._get("g_k") * self.n.value**4
        leak, e_na, e_k, e_l = (self._get(name) for name in ("g_l", "e_na", "e_k", "e_l"))

        def slope(v: jax.Array) -> jax.Array:
            currents = sodium * (e_na - v) + potassium * (e_k - v) + leak * (e_l - v)
            return (currents + x) / self._get("capacitance")

        v = exp_euler(slope, before, step)
        v_th = self._get("v_th")
        self.v.value = v
        self.spikes.value = jnp.where(before < v_th, self.surrogate((v - v_th) / 10.0), 0)
        return self.spikes.value


def _gate(opens: jax.Array, closes: jax.Array, y: jax.Array) -> jax.Array:
    return opens * (1 - y) - closes * y


def _rates(v: jax.Array) -> tuple[tuple[jax.Array, jax.Array], ...]:
    """How fast the gates m, h and n open and close, by the membrane."""

    def linear(z: jax.Array) -> jax.Array:
        """``z / (1 - exp(-z))``, which is 1 at 0."""
        small = jnp.abs(z) < 1e-4
        safe = jnp.where(small, jnp.ones_like(z), z)
        return jnp.where(small, 1 + z / 2, safe / -jnp.expm1(-safe))

    m = linear((v + 40) / 10), 4.0 * jnp.exp(-(v + 65) / 18)
    h = 0.07 * jnp.exp(-(v + 65) / 20), jax.nn.sigmoid((v + 35) / 10)
    n = 0.1 * linear((v + 55) / 10), 0.125 * jnp.exp(-(v + 65) / 80)
    return m, h, n
