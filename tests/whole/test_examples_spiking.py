"""The examples of spiking nets, a balanced one and one that learns online, do what the same loops do by hand in plain JAX."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mutatis as mu
from tests.whole.test_examples import load
from tests.whole.test_examples_training import run

pytestmark = pytest.mark.once  # nothing here depends on the version of JAX


@pytest.fixture(scope="module")
def balanced() -> ModuleType:
    return load("balanced")


@pytest.fixture(scope="module")
def eprop() -> ModuleType:
    return load("eprop")


def relax(y: jax.Array, towards: Any, tau: float, step: float) -> jax.Array:
    """A step of exponential Euler."""
    z = jnp.float32(-1 / tau) * step
    return y + step * (jnp.expm1(z) / z) * ((towards - y) / tau)


def arrays_of(net: Any) -> dict[str, Any]:
    """What the loop by hand needs to know of a balanced net: weights, places, and where membranes start."""
    named = {"excite": net.excite, "inhibit": net.inhibit}
    kept: dict[str, Any] = {
        name: (part.weight.value, part.source.value, part.target.value) for name, part in named.items()
    }
    return kept | {"v": net.neurons.v.value}


def balanced_by_hand(arrays: dict[str, Any], delay: int, steps: int, after: int = 0) -> Any:
    """What is carried at the end, and the spikes of all steps."""
    size, step = len(arrays["v"]), 0.1
    resting = round(5.0 / step)  # steps of silence after a spike
    exciting = size * 4 // 5

    def sent(name: str, spikes: jax.Array) -> jax.Array:
        weight, source, target = arrays[name]
        return jnp.zeros(size).at[target].add(spikes[source] * weight)

    def body(carry: dict[str, Any], _: None) -> tuple[dict[str, Any], jax.Array]:
        now, ring, seen = carry["step"], carry["ring"], carry["count"]
        arriving = jax.lax.dynamic_index_in_dim(ring, now % delay, keepdims=False)
        fast = relax(carry["fast"], 0, 5.0, step) + sent("excite", arriving[:exciting])
        slow = relax(carry["slow"], 0, 10.0, step) + sent("inhibit", arriving[exciting:])
        start = jnp.where(carry["spikes"] > 0, -60, carry["v"])
        awake = carry["rest"] <= 0
        v = jnp.where(awake, relax(start, -49 + (fast + slow), 20.0, step), start)
        spiked = awake & (v >= -50)
        counted = spiked & (now >= after)
        ends = counted & (seen > 0)
        interval = (now - carry["last"]).astype(jnp.float32) * step
        off = interval - carry["mean"]
        mean = carry["mean"] + off / jnp.maximum(seen, 1).astype(jnp.float32)
        spikes = spiked.astype(jnp.float32)
        return {
            "step": now + 1,
            "ring": ring.at[now % delay].set(spikes),
            "fast": fast,
            "slow": slow,
            "v": v,
            "spikes": spikes,
            "rest": jnp.where(spiked, jnp.int32(resting), jnp.maximum(carry["rest"] - 1, 0)),
            "count": seen + counted.astype(jnp.int32),
            "last": jnp.where(counted, now, carry["last"]),
            "mean": jnp.where(ends, mean, carry["mean"]),
            "squares": jnp.where(ends, carry["squares"] + off * (interval - mean), carry["squares"]),
        }, spikes

    zeros, numbers = jnp.zeros(size), jnp.zeros(size, jnp.int32)
    start = {
        "step": jnp.int32(0),
        "ring": jnp.zeros((delay, size)),
        "v": arrays["v"],
    }
    start |= dict.fromkeys(("fast", "slow", "spikes", "mean", "squares"), zeros)
    start |= dict.fromkeys(("rest", "count", "last"), numbers)
    end, spikes = jax.lax.scan(body, start, None, length=steps)
    return end | {"rest": end["rest"].astype(jnp.float32) * step}, spikes


def test_a_balanced_net_is_the_loop_by_hand(balanced: ModuleType, tmp_path: Path) -> None:
    net, size, steps = balanced.Net(200, mu.Rngs(0), prob=0.2, delay=3), 200, 600
    end, spikes = jax.jit(lambda arrays: balanced_by_hand(arrays, 3, steps, 100))(arrays_of(net))
    intervals = balanced.Intervals(size, after=100)
    monitor = mu.recording.Monitor(net, "neurons.spikes", length=steps)
    for _ in range(2):  # a run goes on where the last one ended
        balanced.simulate(net, intervals, monitor, steps // 2)
    kept = np.asarray(monitor.state["neurons", "spikes"])
    np.testing.assert_array_equal(kept, spikes)
    assert 0.5 < kept.sum() / size < 10 and kept.any(0).mean() > 0.1, "they fire, but not always"
    now = {"fast": net.fast.g, "slow": net.slow.g, "v": net.neurons.v, "rest": net.neurons.rest}
    now |= {name: getattr(intervals, name) for name in ("count", "last", "mean", "squares")}
    for name, state in now.items():
        np.testing.assert_allclose(state.value, end[name], rtol=1e-5, atol=1e-5, err_msg=name)
    balanced.draw(monitor, tmp_path / "raster.png")
    assert (tmp_path / "raster.png").stat().st_size > 5000


def test_intervals_are_counted_as_they_come(balanced: ModuleType) -> None:
    spikes = np.random.default_rng(0).random((900, 5)) < np.array([0.0, 0.003, 0.05, 0.1, 0.4])
    intervals = balanced.Intervals(5, after=100)
    mu.for_loop(intervals, jnp.float32(spikes))
    times = [np.nonzero(train)[0] for train in spikes[100:].T]
    np.testing.assert_allclose(intervals.rates(), [len(each) / 0.08 for each in times], rtol=1e-6)
    lengths = [np.diff(each) for each in times if len(each) > 5]
    expected = [each.std(ddof=1) / each.mean() for each in lengths]
    assert len(expected) == 3
    np.testing.assert_allclose(intervals.variation(fewest=5), expected, rtol=1e-5)


def test_a_longer_run_takes_no_more_memory(balanced: ModuleType) -> None:
    net, intervals = balanced.Net(100, mu.Rngs(0), prob=0.2), balanced.Intervals(100)
    short = mu.recording.Monitor(net, "neurons.spikes", length=50, index=range(10))

    def temporary(steps: int, monitor: Any) -> int:
        memory = balanced.simulate.lower(net, intervals, monitor, steps).compile().memory_analysis()
        return int(memory.temp_size_in_bytes)

    by_hand = jax.jit(lambda arrays: balanced_by_hand(arrays, 8, 1_000)[0]).lower(arrays_of(net)).compile()
    assert temporary(1_000, None) == temporary(10_000, None)
    assert temporary(1_000, short) == temporary(10_000, short)
    assert temporary(1_000, None) <= by_hand.memory_analysis().temp_size_in_bytes + 1000, "as much as by hand"
    whole = [mu.recording.Monitor(net, "neurons.spikes", length=length, index=range(10)) for length in (1_000, 10_000)]
    assert temporary(1_000, whole[0]) == temporary(10_000, whole[1]), "a record is written in its place"


@pytest.mark.slow
@pytest.mark.once
def test_a_balanced_net_fires_at_irregular_times(tmp_path: Path) -> None:
    shown = run("balanced", f"--out={tmp_path}")
    (rate,) = re.findall(r"mean rate ([\d.]+) spikes", shown)
    ((variation, neurons),) = re.findall(r"intervals ([\d.]+), the mean of (\d+) neurons", shown)
    assert 5 <= float(rate) <= 30 and 0.7 <= float(variation) <= 1.3 and int(neurons) > 1000
    assert (tmp_path / "raster.png").stat().st_size > 10_000


STEPS, INPUTS, SIZE, OUTPUTS = 80, 8, 12, 2


def made(eprop: ModuleType, steps: int = STEPS) -> tuple[Any, jax.Array, jax.Array]:
    """A small learner, and its task; more spikes come in than in the large one, as there are fewer inputs."""
    spikes, target = eprop.task(steps, INPUTS, OUTPUTS, jax.random.key(3))
    spikes = jnp.maximum(spikes, jax.random.bernoulli(jax.random.key(4), 0.1, spikes.shape).astype(jnp.float32))
    return eprop.Eprop(eprop.Net(INPUTS, SIZE, OUTPUTS, mu.Rngs(0))), spikes.at[0].set(1.0), target


def eprop_by_hand(tx: Any, weights: dict[str, jax.Array], moments: Any, spikes: jax.Array, target: jax.Array) -> Any:
    """A trial that learns at every step: weights, moments and traces in the end, and losses and spikes of all steps."""
    decay, decay_a, rise = np.exp(-1 / 20), np.exp(-1 / 200), 20 * (1 - np.exp(-1 / 20))
    decay, decay_a, rise = float(decay), float(decay_a), float(rise)

    def trace(old: dict[str, jax.Array], arriving: jax.Array, slope: jax.Array) -> dict[str, jax.Array]:
        a = decay_a * (old["a"] + old["spikes"])
        v = decay * (old["v"] - old["spikes"]) + rise * arriving[:, None]
        new = slope[None, :] * (v - 0.1 * a)
        return {"v": v, "a": a, "spikes": new, "out": decay * old["out"] + rise * new}

    def body(carry: Any, given: Any) -> Any:
        weights, moments, old = carry
        x, wanted = given
        a = decay_a * (old["a"] + old["z"])
        v = decay * (old["v"] - old["z"]) + rise * (x @ weights["into"] + old["z"] @ weights["back"])
        above = v - 1 - 0.1 * a
        z = (above >= 0).astype(jnp.float32)
        slope = jnp.maximum(0.3 - 0.3 * jnp.abs(above), 0)
        y = decay * old["y"] + rise * (z @ weights["out"])
        error = y - wanted
        into, back = trace(old["into"], x, slope), trace(old["back"], old["z"], slope)
        seen = decay * old["seen"] + rise * z
        signal = weights["out"] @ error
        gradient = {"into": into["out"] * signal[None, :], "back": back["out"] * signal[None, :]}
        gradient["out"] = seen[:, None] * error[None, :]
        updates, moments = tx.update(gradient, moments, weights)
        new = {"v": v, "a": a, "z": z, "y": y, "seen": seen, "into": into, "back": back}
        return (optax.apply_updates(weights, updates), moments, new), (0.5 * (error**2).sum(), z)

    def empty(pre: int) -> dict[str, jax.Array]:
        return {name: jnp.zeros((pre, SIZE)) for name in ("v", "a", "spikes", "out")}

    start = {"y": jnp.zeros(OUTPUTS), "into": empty(INPUTS), "back": empty(SIZE)}
    start |= {name: jnp.zeros(SIZE) for name in ("v", "a", "z", "seen")}
    return jax.lax.scan(body, (weights, moments, start), (spikes, target))


def test_learning_online_is_the_loop_by_hand(eprop: ModuleType) -> None:
    learner, spikes, target = made(eprop)
    net, tx = learner.net, optax.adam(1e-3)
    weights = {name: getattr(net, name).kernel.value for name in ("into", "back", "out")}
    with jax.numpy_dtype_promotion("standard"):  # optax promotes
        optimizer, moments = mu.Optimizer(net, tx), tx.init(weights)
        by_hand = jax.jit(lambda *operands: eprop_by_hand(tx, *operands))
        for _ in range(2):
            losses, fired = eprop.trial(learner, optimizer, spikes, target)
            (weights, moments, end), (their_losses, their_fired) = by_hand(weights, moments, spikes, target)
            np.testing.assert_array_equal(fired, their_fired)
            np.testing.assert_allclose(losses, their_losses, rtol=1e-5, atol=1e-7)
    assert 0.02 < float(fired.mean()) < 0.3
    for side in ("into", "back"):
        for name in ("v", "a", "spikes", "out"):
            state = getattr(getattr(learner, side), name).value
            assert np.abs(state).max() > 0
            np.testing.assert_allclose(state, end[side][name], rtol=1e-5, atol=1e-6, err_msg=f"{side}.{name}")
    np.testing.assert_allclose(learner.out.v.value, end["seen"], rtol=1e-5)
    for name, weight in weights.items():
        np.testing.assert_allclose(getattr(net, name).kernel.value, weight, rtol=1e-5, atol=1e-6, err_msg=name)


def agree(ours: mu.State, theirs: mu.State) -> None:
    assert [*ours] == [*theirs]
    for path, value in theirs.flat().items():
        np.testing.assert_allclose(ours[path], value, rtol=1e-4, atol=1e-5 * np.abs(value).max(), err_msg=str(path))


def test_traces_are_backpropagation_without_what_is_fed_back(eprop: ModuleType) -> None:
    learner, spikes, target = made(eprop)
    ours, whole = eprop.forward(learner, spikes, target), eprop.backward(learner.net, spikes, target)
    assert all(np.abs(value).max() > 0 for value in ours.flat().values())
    agree(ours, eprop.backward(learner.net, spikes, target, hold=True))
    for name in ("into", "back"):
        assert 0.2 < eprop.cosine(ours, whole, name) < 0.999, "another gradient, of about the same direction"
    np.testing.assert_allclose(ours["out", "kernel"], whole["out", "kernel"], rtol=1e-4, atol=1e-4)
    learner.net.back.kernel.value = jnp.zeros((SIZE, SIZE))
    agree(eprop.forward(learner, spikes, target), eprop.backward(learner.net, spikes, target))


def test_one_step_has_nothing_to_leave_out(eprop: ModuleType) -> None:
    learner, spikes, target = made(eprop, 1)
    ours = eprop.forward(learner, spikes, target + 1)
    assert np.abs(ours["into", "kernel"]).max() > 0 and not np.abs(ours["back", "kernel"]).any()
    agree(ours, eprop.backward(learner.net, spikes, target + 1))


def test_a_net_learns_online(eprop: ModuleType) -> None:
    learner, spikes, target = made(eprop)
    with jax.numpy_dtype_promotion("standard"):
        optimizer = mu.Optimizer(learner.net, optax.adam(1e-3))
        losses = [float(eprop.trial(learner, optimizer, spikes, target)[0].mean()) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]
    assert int(optimizer.step) == 20 * STEPS


@pytest.mark.slow
@pytest.mark.once
def test_a_pattern_is_learned_without_going_back() -> None:
    shown = run("eprop")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", shown)]
    assert losses[-1] < 0.1 * losses[0]
    cosines = [float(each) for each in re.findall(r"backpropagation (-?[\d.]+)", shown)]
    held = [float(each) for each in re.findall(r"held constant ([\d.]+)", shown)]
    assert len(cosines) == len(held) == 2 and min(cosines) > 0.5 and min(held) > 0.9999
