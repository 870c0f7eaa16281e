"""Encoders: rates on average, times by size."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import nn
from mutatis.errors import ArgumentError

pytestmark = pytest.mark.once


def test_poisson() -> None:
    encode = nn.Poisson(rngs=mu.Rngs(0))
    rates = jnp.array([0.0, 50.0, 400.0])
    with nn.dt.set(0.5):
        spikes = np.asarray(
            mu.jit(lambda: mu.for_loop(lambda _: encode(jnp.broadcast_to(rates, (50, 3))), jnp.arange(400)))()
        )
    assert set(np.unique(spikes)) == {0.0, 1.0}
    np.testing.assert_allclose(spikes.mean((0, 1)), np.asarray(rates) * 0.5e-3, atol=0.005)
    assert not np.array_equal(spikes[0], spikes[1])
    with pytest.raises(ArgumentError, match="no floating numbers"):
        encode(jnp.arange(3))


def test_latency() -> None:
    x = jnp.linspace(0.0, 1.0, 30)
    spikes = np.asarray(nn.latency(x, 40))
    fired = spikes.any(0)
    assert spikes.sum(0).max() == 1 and not fired[0] and fired[1:].all()
    when = spikes.argmax(0)[1:]
    assert (np.diff(when) <= 0).all()
    expected = np.floor(5.0 * np.log(np.asarray(x[1:]) / (np.asarray(x[1:]) - 0.01)))
    np.testing.assert_array_equal(when, expected)
    assert jax.jit(lambda x: nn.latency(x, 4))(jnp.ones((2, 3))).shape == (4, 2, 3)
