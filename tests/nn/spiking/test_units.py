"""Quantities as parameters and inputs of neurons, synapses and delays: taken in their unit, refused in another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import nn
from mutatis.errors import ArgumentError

pytestmark = pytest.mark.once


@pytest.fixture(params=["saiunit", "brainunit"])
def u(request: pytest.FixtureRequest) -> Any:
    return pytest.importorskip(request.param)


def density(u: Any, unit: Any) -> Any:
    return unit / u.cm**2


# Each with units, and as plain numbers.
SAME: dict[str, tuple[Callable[[Any], Any], Callable[[], Any]]] = {
    "LIF": (
        lambda u: nn.LIF(2, 0.02 * u.second, -0.05 * u.volt, -60 * u.mV, v_rest=-65 * u.mV, tau_ref=2 * u.ms),
        lambda: nn.LIF(2, 20.0, -50.0, -60.0, v_rest=-65.0, tau_ref=2.0),
    ),
    "LIF, an array": (
        lambda u: nn.LIF(2, jnp.array([10.0, 20.0]) * u.ms, v_rest=np.array([0.0, 0.5]) * u.mV),
        lambda: nn.LIF(2, jnp.array([10.0, 20.0]), v_rest=np.array([0.0, 0.5])),
    ),
    "LIF, trained": (
        lambda u: nn.LIF(2, mu.Param(0.02 * u.second), v_rest=mu.Param(jnp.array([0.1, 0.5]) * u.mV)),
        lambda: nn.LIF(2, 20.0, v_rest=np.array([0.1, 0.5])),
    ),
    "ALIF": (
        lambda u: nn.ALIF(2, 10 * u.ms, tau_a=0.1 * u.second, beta=0.2 * u.mV),
        lambda: nn.ALIF(2, 10.0, tau_a=100.0, beta=0.2),
    ),
    "LI": (lambda u: nn.LI(2, 5 * u.ms, v_rest=1 * u.mV), lambda: nn.LI(2, 5.0, v_rest=1.0)),
    "Izhikevich": (
        lambda u: nn.Izhikevich(2, 20 * u.Hz, 0.2 / u.ms, -65 * u.mV, 8 * u.mV / u.ms, v_th=30 * u.mV),
        lambda: nn.Izhikevich(2),
    ),
    "HodgkinHuxley": (
        lambda u: nn.HodgkinHuxley(
            2, v_th=20 * u.mV, capacitance=density(u, 1 * u.uF), g_na=density(u, 120 * u.mS), e_k=-0.077 * u.volt
        ),
        lambda: nn.HodgkinHuxley(2),
    ),
    "Expon": (lambda u: nn.Expon(2, 5000 * u.us), lambda: nn.Expon(2, 5.0)),
    "DualExpon": (lambda u: nn.DualExpon(2, 9 * u.ms, 2 * u.ms), lambda: nn.DualExpon(2, 9.0, 2.0)),
    "Alpha": (lambda u: nn.Alpha(2, mu.Param(7 * u.ms)), lambda: nn.Alpha(2, 7.0)),
    "STP": (lambda u: nn.STP(2, 0.2, 1 * u.second, 100 * u.ms), lambda: nn.STP(2, 0.2, 1000.0, 100.0)),
}


@pytest.mark.parametrize("name", SAME)
def test_quantities_are_numbers_of_the_unit(u: Any, name: str) -> None:
    with_units, plain = SAME[name]
    xs = jnp.asarray(np.random.default_rng(0).random((30, 2)) * (1 if name == "STP" else 20), jnp.float32)
    expected = mu.for_loop(plain(), xs)
    with nn.dt.set(0.001 * u.second):
        np.testing.assert_allclose(mu.for_loop(with_units(u), xs), expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(mu.jit(mu.for_loop)(with_units(u), xs), expected, rtol=1e-4, atol=1e-4)


WRONG: dict[str, Callable[[Any], Any]] = {
    "tau": lambda u: nn.LIF(2, tau=20 * u.mV),
    "v_th": lambda u: nn.LIF(2, v_th=20 * u.ms),
    "v_rest": lambda u: nn.LI(2, v_rest=mu.Param(20 * u.ms)),
    "tau_a": lambda u: nn.ALIF(2, tau_a=jnp.ones(2) * u.mV),
    "beta": lambda u: nn.ALIF(2, beta=1 * u.ms),
    "a": lambda u: nn.Izhikevich(2, a=1 * u.ms),
    "g_na": lambda u: nn.HodgkinHuxley(2, g_na=1 * u.mS),
    "tau_rise": lambda u: nn.DualExpon(2, tau_rise=1 * u.Hz),
    "u": lambda u: nn.STP(2, u=0.1 * u.mV),
    "x": lambda u: nn.LIF(2)(jnp.ones(2) * u.ms),
    "rates": lambda u: nn.Poisson(rngs=mu.Rngs(0))(jnp.ones(2) * u.ms),
    "steps": lambda u: nn.Delay(2, 3).at(1 * u.mV),
}


@pytest.mark.parametrize("name", WRONG)
def test_another_dimension_is_refused(u: Any, name: str) -> None:
    with pytest.raises(
        ArgumentError, match=rf"(?s)`{name}` is in a unit that does not fit.*expected:.*got: .*a quantity in"
    ):
        WRONG[name](u)


def test_a_step_in_another_unit(u: Any) -> None:
    with nn.dt.set(2 * u.mV), pytest.raises(ArgumentError, match=r"(?s)`nn.dt`.*in ms.*a quantity in mV"):
        nn.LIF(2)(1.0)


def test_a_resistance_with_a_unit_takes_a_current(u: Any) -> None:
    plain, other = nn.LI(2, resistance=100.0), nn.LI(2, resistance=0.1 * u.Gohm)
    np.testing.assert_allclose(other(jnp.array([1.0, 2.0]) * u.nA), plain(jnp.array([1.0, 2.0])), rtol=1e-6)
    np.testing.assert_allclose(other(jnp.array([1e3, 2e3]) * u.pA), plain(jnp.array([1.0, 2.0])), rtol=1e-6)
    for module, x in ((other, 1.0 * u.mV), (plain, 1.0 * u.nA)):
        with pytest.raises(ArgumentError, match="`x` is in a unit that does not fit"):
            module(x)


def test_rates_and_delays(u: Any) -> None:
    ours, theirs = (nn.Poisson(rngs=mu.Rngs(0)) for _ in range(2))
    rates = jnp.full(50, 300.0)
    with nn.dt.set(np.float64(0.5)):
        np.testing.assert_array_equal(ours(rates * u.Hz), theirs(rates))
        np.testing.assert_array_equal(ours(rates / 1000 / u.ms), theirs(rates))
    delay = nn.Delay(1, max_steps=4)
    for n in range(5):
        delay.push(jnp.full(1, n) * u.mV)
    with nn.dt.set(0.5):
        np.testing.assert_allclose(delay.at(1.5 * u.ms), [1.0])
        np.testing.assert_allclose(delay.at(0.75 * u.ms), [2.5])
        np.testing.assert_allclose(mu.jit(lambda steps: delay.at(steps))(2000 * u.us), [0.0])


def test_a_parameter_with_a_unit_is_trained(u: Any) -> None:
    def last(net: Any) -> Any:
        return mu.for_loop(net, jnp.ones((5, 2)))[-1].sum()

    ours = mu.grad(last)(nn.LI(2, tau=mu.Param(0.02 * u.second)))
    theirs = mu.grad(last)(nn.LI(2, tau=mu.Param(20.0)))
    (a,), (b,) = jax.tree.leaves(ours), jax.tree.leaves(theirs)
    np.testing.assert_allclose(a, b * 1000, rtol=1e-5)  # by seconds, and by milliseconds


@pytest.mark.parametrize("given", ["x", None, 1j, [[1.0], [1.0, 2.0]]], ids=str)
def test_what_is_no_number(given: Any) -> None:
    uses: list[Callable[[], Any]] = [
        lambda: nn.LIF(2, tau=given),
        lambda: nn.Izhikevich(2, a=given),
        lambda: nn.LIF(2)(given),
        lambda: nn.Alpha(2)(given),
        lambda: nn.Delay(2, 3).push(given),
        lambda: nn.Delay(2, 3).at(given),
        lambda: nn.Poisson(rngs=mu.Rngs(0))(given),
    ]
    for use in uses:
        with pytest.raises(ArgumentError, match="is no real number"):
            use()


def test_times_of_an_encoder(u: Any) -> None:
    x = jnp.array([1.0, 0.3, 0.02])
    with nn.dt.set(0.5):
        np.testing.assert_array_equal(nn.latency(x, 40, tau=5 * u.ms), nn.latency(x, 40, tau=10.0))
        assert nn.Poisson(rngs=mu.Rngs(0))(np.full(3, 50) * u.Hz).dtype == jnp.float32


@pytest.mark.parametrize("method", [nn.exp_euler, nn.rk4])
def test_a_step_that_does_not_fit_the_derivative(u: Any, method: Any) -> None:
    v = jnp.ones(2) * u.mV
    for step in (1.0, 1.0 * u.mV):
        with pytest.raises(
            ArgumentError,
            match=r"(?s)unit does not fit.*expected: a step in (ms|1 ms).*got: .*a step (without a unit|in mV)",
        ):
            method(lambda v: -v / (10.0 * u.ms), v, step)
    with pytest.raises(ArgumentError, match="unit does not fit"):
        method(lambda v: -v / 10.0, jnp.ones(2), 1.0 * u.ms)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("method", [nn.exp_euler, nn.rk4])
def test_a_step_keeps_the_dtype_of_a_quantity(u: Any, method: Any, dtype: Any) -> None:
    v = jnp.ones(2, dtype) * u.mV
    for step in (0.5 * u.ms, jnp.float32(0.5) * u.ms, np.float64(0.5) * u.ms):
        after = method(lambda v: -v / (dtype(10.0) * u.ms), v, step)
        assert after.dtype == dtype
        np.testing.assert_allclose((after / u.mV).astype(jnp.float32), np.exp(-0.05), rtol=1e-2)
