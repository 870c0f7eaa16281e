"""Neurons beside loops in NumPy and what can be solved: membranes, resets, refractory times, adaptation; gradients; bad input."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import nn
from mutatis.errors import ArgumentError

pytestmark = pytest.mark.once


def currents(steps: int, size: int) -> Any:
    return np.random.default_rng(0).uniform(0.5, 2.5, (steps, size)).astype(np.float32)


def lif_by_hand(
    x: Any, tau: Any, v_th: float, v_reset: float, rest: float, tau_ref: float, hard: bool, dt: float
) -> Any:
    v, spikes = np.full(x.shape[1], rest, np.float64), np.zeros(x.shape[1])
    left = np.zeros(x.shape[1])
    out = []
    for now in x:
        v = np.where(spikes > 0, v_reset if hard else v - (v_th - v_reset), v)
        awake = left <= 0
        goal = rest + now
        moved = goal + (v - goal) * np.exp(-dt / tau)
        v = np.where(awake, moved, v)
        spikes = np.where(awake, v >= v_th, False).astype(np.float64)
        left = np.where(spikes > 0, tau_ref, np.maximum(left - dt, 0))
        out.append((v, spikes))
    return [np.stack(each) for each in zip(*out, strict=True)]


@pytest.mark.parametrize("reset", ["soft", "hard"])
@pytest.mark.parametrize("tau_ref", [0.0, 2.0])
@pytest.mark.parametrize("tau", [10.0, "each"])
def test_lif(reset: Any, tau_ref: float, tau: Any) -> None:
    tau = np.linspace(5, 20, 6).astype(np.float32) if tau == "each" else tau
    x = currents(80, 6)
    net = nn.LIF(6, tau, 1.0, -0.2, v_rest=0.1, tau_ref=tau_ref, reset=reset)
    with nn.dt.set(0.5):
        spikes, v = mu.jit(lambda net, x: mu.for_loop(lambda x: (net(x), net.v.value), x))(net, x)
    wanted_v, wanted = lif_by_hand(x, tau, 1.0, -0.2, 0.1, tau_ref, reset == "hard", 0.5)
    np.testing.assert_array_equal(spikes, wanted)
    np.testing.assert_allclose(v, wanted_v, atol=2e-5)
    assert spikes.sum() > 10


def test_a_membrane_decays_as_solved() -> None:
    for step in (0.1, 1.0, 7.0):
        net = nn.LI(1, tau=12.0, v_rest=-3.0)
        net.v.value = jnp.ones(1)
        with nn.dt.set(step):
            v = mu.for_loop(net, jnp.zeros((20, 1)))
        np.testing.assert_allclose(v[:, 0], -3 + 4 * np.exp(-step * np.arange(1, 21) / 12), rtol=1e-5)


def test_alif_is_lif_with_a_threshold_that_moves() -> None:
    x = currents(100, 4)
    net = nn.ALIF(4, tau_a=50.0, beta=0.3, reset="hard")
    spikes = np.asarray(mu.for_loop(net, x))
    v, a, last = np.zeros(4), np.zeros(4), np.zeros(4)
    for now, found in zip(x, spikes, strict=True):
        a = (a + last) * np.exp(-1 / 50.0)
        v = np.where(last > 0, 0.0, v)
        v = now + (v - now) * np.exp(-1 / 10.0)
        last = ((v - 1.0 - 0.3 * a) >= 0).astype(float)
        np.testing.assert_array_equal(found, last)
    np.testing.assert_allclose(net.a.value, a, rtol=1e-4)


def test_izhikevich_by_hand() -> None:
    net, (v, u, spiked) = nn.Izhikevich(1), (-65.0, -13.0, False)
    with nn.dt.set(0.25):
        found = mu.for_loop(lambda x: (net(x), net.v.value), jnp.full((2000, 1), 10.0))
        count = 0
        for spike, membrane in zip(np.asarray(found[0][:, 0]), np.asarray(found[1][:, 0]), strict=True):
            if spiked:
                v, u = -65.0, u + 8.0
            v = v + 0.25 * (0.04 * v * v + 5 * v + 140 - u + 10.0)
            goal = 0.2 * v
            u = goal + (u - goal) * np.exp(-0.02 * 0.25)
            v = min(v, 60.0)
            spiked = v >= 30.0
            assert bool(spike) == spiked
            np.testing.assert_allclose(membrane, v, rtol=2e-2, atol=0.2)
            v, u, count = float(membrane), u, count + spiked
    assert 5 < count < 40


def test_hodgkin_huxley_rests_and_fires() -> None:
    with nn.dt.set(0.02):
        quiet = nn.HodgkinHuxley(1)
        assert float(mu.for_loop(quiet, jnp.zeros((2000, 1))).sum()) == 0
        assert abs(float(quiet.v.value[0]) + 65) < 0.5, "it rests at -65 mV"
        busy = nn.HodgkinHuxley(3)
        spikes = mu.for_loop(busy, jnp.broadcast_to(jnp.array([7.0, 10.0, 20.0]), (5000, 3)))
    counts = np.asarray(spikes.sum(0))
    assert counts[0] < counts[1] < counts[2] and 6 <= counts[1] <= 8, "about 70 Hz at 10 uA / cm2"


@pytest.mark.parametrize("make", [nn.LIF, nn.ALIF, nn.Izhikevich, nn.HodgkinHuxley, nn.LI])
def test_batches_transforms_and_gradients(make: Any) -> None:
    net = make(5)
    x = jnp.asarray(currents(4, 5)) * 8
    alone = mu.for_loop(net, x)
    mu.reset(net, mu.Hidden)
    np.testing.assert_allclose(mu.jit(lambda net: mu.for_loop(net, x))(net), alone, rtol=1e-5, atol=1e-5)
    mu.reset(net, mu.Hidden, batch_shape=(3,))
    batched = mu.for_loop(net, jnp.broadcast_to(x[:, None], (4, 3, 5)))
    np.testing.assert_allclose(batched[:, 1], alone, rtol=1e-5, atol=1e-5)
    several = mu.vmap(lambda _: make(5))(jnp.arange(2))
    out = mu.vmap(lambda net, x: net(x), (0, None))(several, x[0])
    np.testing.assert_allclose(out[1], alone[0], rtol=1e-5, atol=1e-5)

    def loss(x: jax.Array) -> jax.Array:
        net = make(5)
        mu.for_loop(net, x)
        return jnp.sum(net.v.value)

    grad = jax.grad(loss)(x)
    assert grad.shape == x.shape and bool(jnp.isfinite(grad).all()) and bool(jnp.any(grad != 0))


def test_a_trained_time_constant() -> None:
    net = nn.LIF(3, tau=mu.Param(jnp.full(3, 10.0)))
    x = jnp.asarray(currents(30, 3))

    def loss(net: Any) -> jax.Array:
        mu.reset(net, mu.Hidden)
        return jnp.sum(mu.for_loop(net, x))

    grads = mu.grad(loss)(net)
    assert list(grads) == [("tau",)] and bool(jnp.all(grads["tau"] != 0))

    def by_hand(tau: Any) -> Any:
        def step(carry: Any, now: Any) -> Any:
            v, spikes = carry
            v = v - spikes
            v = now + (v - now) * jnp.exp(-1.0 / tau)
            spikes = mu.surrogate.sigmoid(v - 1.0)
            return (v, spikes), spikes

        return jnp.sum(jax.lax.scan(step, (jnp.zeros(3), jnp.zeros(3)), x)[1])

    np.testing.assert_allclose(grads["tau"], jax.grad(by_hand)(jnp.full(3, 10.0)), rtol=1e-3)


def test_bad_input() -> None:
    for use, text in [
        (lambda: nn.LIF(3, tau=-1.0), "not above zero"),
        (lambda: nn.LIF(3, tau=jnp.array([1.0, 0.0, 1.0])), "not above zero"),
        (lambda: nn.LIF(3, tau=jnp.ones(2)), "`tau` of this shape"),
        (lambda: nn.LIF(3, reset="gentle"), "cannot be reset"),
        (lambda: nn.Expon(3, tau=0.0), "not above zero"),
    ]:
        with pytest.raises(ArgumentError, match=text):
            use()
    net = nn.LIF(3)
    with pytest.raises(ArgumentError, match=r"(?s)another shape than its states.*batch_shape=\(7,\)"):
        net(jnp.ones((7, 3)))
    with pytest.raises(ArgumentError, match="another shape than its states"):
        net(jnp.ones(4))
    assert not net.v.value.any()


@pytest.mark.parametrize(("tau_ref", "step", "silent"), [(0.5, 0.1, 5), (0.3, 0.1, 3), (5.0, 0.1, 50), (2.0, 1.0, 2)])
def test_silent_steps_are_those_of_the_time(tau_ref: float, step: float, silent: int) -> None:
    with nn.dt.set(step):
        spikes = mu.for_loop(nn.LIF(1, tau_ref=tau_ref), jnp.full((200, 1), 1e4))
    assert set(np.diff(np.nonzero(np.asarray(spikes)[:, 0])[0]) - 1) == {silent}


@pytest.mark.parametrize(("step", "time"), [(0.05, 20.0), (0.001, 5.0), (0.1, 2.0), (0.1, 5.05), (0.3, 1.0)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_refractory_steps_are_counted(dtype: Any, step: float, time: float) -> None:
    neuron = nn.LIF(1, tau=1.0, tau_ref=time, reset="hard", dtype=dtype)
    silent = (
        int(np.ceil(float(jnp.asarray(time, dtype)) / step - 0.01))
        if dtype != jnp.float32
        else int(np.ceil(time / step - 0.01))
    )
    if not isinstance(neuron.tau_ref, mu.Variable):
        silent = int(np.ceil(time / step - 0.01))
    with nn.dt.set(step):
        spikes = mu.for_loop(neuron, jnp.full((3 * silent + 8, 1), 1e4, dtype))
    assert np.diff(np.flatnonzero(np.asarray(spikes[:, 0], np.float32))).tolist()[:2] == [silent + 1] * 2
    assert neuron.v.dtype == dtype and spikes.dtype == dtype


def test_thresholds_and_settings_that_do_not_fit() -> None:
    for use, text in [
        (lambda: nn.LIF(1, v_th=0.5, v_reset=1.0), "threshold at or below `v_reset`"),
        (lambda: nn.ALIF(2, v_th=jnp.array([1.0, 0.0])), "threshold at or below `v_reset`"),
        (lambda: nn.Izhikevich(1, v_th=-65.0), "threshold at or below `c`"),
        (lambda: nn.LIF(1, surrogate="sigmoid"), "`surrogate`"),
        (lambda: nn.LIF(-1), "integers"),
    ]:
        with pytest.raises(ArgumentError, match=text):
            use()
    late: Any = nn.LIF(1)
    late.tau_ref = 5.0
    with pytest.raises(ArgumentError, match="without a refractory time"):
        late(1.0)
    late = nn.LIF(1)
    late.reset = "zero"
    with pytest.raises(ArgumentError, match="cannot be reset 'zero'"):
        late(1.0)


def test_izhikevich_with_a_low_threshold() -> None:
    with nn.dt.set(0.5):
        spikes = mu.for_loop(nn.Izhikevich(1, v_th=-20.0), jnp.full((400, 1), 10.0))
        slope = mu.grad(lambda x: jnp.sum(mu.for_loop(nn.Izhikevich(1), jnp.full((20, 1), 1.0) * x)))(200.0)
    assert float(spikes.sum()) == 5 and float(slope) != 0
