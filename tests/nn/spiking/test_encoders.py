"""Encoders: rates on average, times by size."""

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


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("rate", [1.0, 20.0, 500.0])
def test_rates_of_narrow_dtypes(rate: float, dtype: Any) -> None:
    encode = nn.Poisson(rngs=mu.Rngs(0))
    spikes = encode(jnp.full(200_000, rate, dtype))
    assert spikes.dtype == jnp.float32
    deviation = np.sqrt(rate / 1000 / 200_000)
    assert abs(float(spikes.mean()) - rate / 1000) < 5 * deviation


def test_a_latency_that_is_none() -> None:
    x = jnp.array([0.5, 1.0])
    for options, text in [
        ({"steps": -1}, "steps=-1"),
        ({"steps": 2.5}, "steps=2.5"),
        ({"steps": 5, "tau": -1.0}, "tau=-1.0"),
        ({"steps": 5, "threshold": 0.0}, "threshold=0.0"),
    ]:
        with pytest.raises(ArgumentError, match=f"cannot work with `{text}"):
            nn.latency(x, **options)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="no real number"):
        nn.latency("x", 5)  # type: ignore[arg-type]
    assert nn.latency(x, np.int64(5)).shape == (5, 2)
