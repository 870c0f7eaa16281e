"""Synapses beside what their equations have as solutions."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import nn
from mutatis.errors import ArgumentError

pytestmark = pytest.mark.once
TIMES = np.arange(60)


def after_one_spike(synapse: mu.Module, step: float) -> np.ndarray:
    with nn.dt.set(step):
        return np.asarray(mu.for_loop(synapse, jnp.zeros((60, 1)).at[0].set(1.0)))[:, 0]


@pytest.mark.parametrize("step", [0.1, 1.0])
def test_after_one_spike(step: float) -> None:
    t = TIMES * step
    np.testing.assert_allclose(after_one_spike(nn.Expon(1, 7.0), step), np.exp(-t / 7), rtol=1e-5)
    np.testing.assert_allclose(after_one_spike(nn.Alpha(1, 6.0), step), t / 6 * np.exp(1 - t / 6), rtol=1e-4, atol=1e-6)
    peak = np.log(10 / 2) * 10 * 2 / (10 - 2)
    height = np.exp(-peak / 10) - np.exp(-peak / 2)
    wanted = (np.exp(-t / 10) - np.exp(-t / 2)) / height
    np.testing.assert_allclose(after_one_spike(nn.DualExpon(1, 10.0, 2.0), step), wanted, rtol=1e-4, atol=1e-6)


def test_spikes_add_up() -> None:
    x = jnp.zeros((30, 2)).at[jnp.array([3, 10]), 0].set(1.0)
    for make in (nn.Expon, nn.Alpha, nn.DualExpon):
        both = np.asarray(mu.for_loop(make(2), x))
        one, other = (np.asarray(mu.for_loop(make(2), jnp.zeros((30, 2)).at[at, 0].set(1.0))) for at in (3, 10))
        np.testing.assert_allclose(both, one + other, rtol=1e-5, atol=1e-6)
        assert not both[:, 1].any()


def test_short_term_plasticity_by_hand() -> None:
    rng = np.random.default_rng(0)
    spikes = (rng.uniform(size=(100, 1)) < 0.3).astype(np.float32)
    found = np.asarray(mu.for_loop(nn.STP(1, 0.3, 50.0, 80.0), spikes))[:, 0]
    u, x = 0.0, 1.0
    for now, worth in zip(spikes[:, 0], found, strict=True):
        u, x = u * np.exp(-1 / 50), 1 - (1 - x) * np.exp(-1 / 80)
        u += now * 0.3 * (1 - u)
        np.testing.assert_allclose(worth, u * x * now, rtol=1e-4, atol=1e-6)
        x -= u * x * now
    facilitating = mu.for_loop(nn.STP(1, 0.1, 500.0, 5.0), jnp.ones((5, 1)).at[1::2].set(0.0))
    assert float(facilitating[4, 0]) > float(facilitating[0, 0])


def test_equal_times_are_refused() -> None:
    for times in ((3.0, 3.0), (jnp.array([3.0, 4.0]), 4.0), (mu.Param(3.0), 3)):
        with pytest.raises(ArgumentError, match=r"nn\.Alpha\(\(2,\), tau=10\.0\)"):
            nn.DualExpon(2, *times)
    assert jnp.isfinite(mu.jit(lambda slow: nn.DualExpon(2, slow, 1.0)(jnp.ones(2)))(3.0)).all()


def test_times_that_are_nearly_equal() -> None:
    for rise in (10.0, 9.9999, 10.001):
        with pytest.raises(ArgumentError, match=r"(?s)cannot rise as slowly.*nn\.Alpha"):
            nn.DualExpon(2, 10.0, rise)
    assert float(mu.for_loop(nn.DualExpon(1, 10.0, 9.9), jnp.zeros((40, 1)).at[0].set(1.0)).max()) == pytest.approx(
        1, abs=1e-2
    )
