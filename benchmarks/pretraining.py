"""Tracing and lowering of a pretraining step, as large models are trained: with Mutatis, and threaded by hand.

A scan over layers that are computed again for the gradient, a mixture of experts in each, microbatches by another scan, AdamW
with clipping, and a moving average of the parameters. Both come to the same losses and parameters, which is checked.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import timing
from jax import lax

import mutatis as mu

LAYERS, WIDTH, HIDDEN, EXPERTS, WORDS = 4, 32, 64, 4, 64
MICROBATCHES, BATCH, LENGTH = 2, 2, 8


def transformation() -> optax.GradientTransformation:
    """The optimizer."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def block(own: Any, x: jax.Array) -> jax.Array:
    """Attention, and then the experts, each as far as the gate says."""
    y = normalize(x, own["before"])
    q, k, v = jnp.split(y @ own["qkv"], 3, axis=-1)
    scores = jnp.einsum("bld,bmd->blm", q, k) * WIDTH**-0.5
    mask = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))
    x = x + jax.nn.softmax(jnp.where(mask, scores, -1e9)) @ v @ own["out"]
    y = normalize(x, own["between"])
    gate = jax.nn.softmax(y @ own["gate"])
    inner = jax.nn.silu(jnp.einsum("bld,edh->bleh", y, own["enter"]))
    return x + jnp.einsum("bleh,ehd,ble->bld", inner, own["leave"], gate)


def normalize(x: jax.Array, scale: jax.Array) -> jax.Array:
    """RMSNorm."""
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The mean over all words."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))


def start() -> dict[str, Any]:
    """Parameters, those of the layers stacked."""
    rng = np.random.default_rng(0)
    shapes = {
        "qkv": (WIDTH, 3 * WIDTH),
        "out": (WIDTH, WIDTH),
        "gate": (WIDTH, EXPERTS),
        "enter": (EXPERTS, WIDTH, HIDDEN),
        "leave": (EXPERTS, HIDDEN, WIDTH),
    }
    layers = {name: 0.1 * rng.standard_normal((LAYERS, *shape), np.float32) for name, shape in shapes.items()}
    scales = {name: np.ones((LAYERS, WIDTH), np.float32) for name in ("before", "between")}
    words = 0.1 * rng.standard_normal((WORDS, WIDTH), np.float32)
    return jax.tree.map(
        jnp.asarray, {"layers": {**layers, **scales}, "words": words, "last": np.ones(WIDTH, np.float32)}
    )


def batch() -> tuple[jax.Array, jax.Array]:
    """Microbatches of words, and of the words that follow."""
    text = np.random.default_rng(1).integers(0, WORDS, (MICROBATCHES, BATCH, LENGTH + 1))
    return jnp.asarray(text[..., :-1]), jnp.asarray(text[..., 1:])


# -- with Mutatis ------------------------------------------------------------------------------------------------------


class Layer(mu.Module):
    """A layer, or all of them stacked."""

    def __init__(self, values: dict[str, jax.Array]) -> None:
        for name, value in values.items():
            setattr(self, name, mu.Param(value))

    def __call__(self, x: jax.Array) -> jax.Array:
        return block({name: cell.value for name, cell in vars(self).items()}, x)


class Transformer(mu.Module):
    """Words in, scores of the next words out."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.layers = Layer(values["layers"])
        self.words, self.last = mu.Param(values["words"]), mu.Param(values["last"])

    def __call__(self, tokens: jax.Array) -> jax.Array:
        def one(x: jax.Array, layer: Layer) -> tuple[jax.Array, None]:
            return layer(x), None

        x, _ = mu.scan(mu.remat(one), self.words.value[tokens], self.layers)
        return normalize(x, self.last.value) @ self.words.value.T


def with_mutatis() -> tuple[Any, tuple[Any, ...]]:
    """The step, and its arguments."""
    net = Transformer(jax.tree.map(jnp.array, start()))
    optimizer, average = mu.Optimizer(net, transformation()), mu.optim.EMA(net, decay=0.999)

    def loss(net: Transformer, tokens: jax.Array, targets: jax.Array) -> jax.Array:
        return cross_entropy(net(tokens), targets)

    def step(net: Transformer, optimizer: mu.Optimizer, average: Any, tokens: jax.Array, targets: jax.Array) -> Any:
        def one(total: Any, batch: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, mu.value_and_grad(loss)(net, *batch)), None

        none = jnp.float32(0), jax.tree.map(jnp.zeros_like, mu.state(net, mu.Param))
        (value, grads), _ = mu.scan(one, none, (tokens, targets))
        optimizer.update(jax.tree.map(lambda g: g / MICROBATCHES, grads))
        average.update()
        return value / MICROBATCHES

    return step, (net, optimizer, average, *batch())


# -- by hand -----------------------------------------------------------------------------------------------------------


def by_hand() -> tuple[Any, tuple[Any, ...]]:
    """The step, and its arguments."""
    tx = transformation()

    def forward(parameters: Any, tokens: jax.Array) -> jax.Array:
        def one(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
            return block(layer, x), None

        x, _ = lax.scan(jax.checkpoint(one), parameters["words"][tokens], parameters["layers"])
        return normalize(x, parameters["last"]) @ parameters["words"].T

    def loss(parameters: Any, tokens: jax.Array, targets: jax.Array) -> jax.Array:
        return cross_entropy(forward(parameters, tokens), targets)

    def step(held: Any, tokens: jax.Array, targets: jax.Array) -> Any:
        parameters, moments, average, count = held

        def one(total: Any, batch: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(parameters, *batch)), None

        none = jnp.float32(0), jax.tree.map(jnp.zeros_like, parameters)
        (value, grads), _ = lax.scan(one, none, (tokens, targets))
        grads = jax.tree.map(lambda g: g / MICROBATCHES, grads)
        updates, moments = tx.update(grads, moments, parameters)
        parameters = optax.apply_updates(parameters, updates)
        average = jax.tree.map(lambda a, p: 0.999 * a + (1 - 0.999) * p, average, parameters)
        return (parameters, moments, average, count + 1), value / MICROBATCHES

    parameters = start()
    held = parameters, tx.init(parameters), jax.tree.map(jnp.array, parameters), jnp.int32(0)
    return step, (held, *batch())


def check(steps: int = 3) -> None:
    """Both come to the same.

    Raises:
      AssertionError: they do not.
    """
    (ours, (net, *rest)), (hand, (held, *given)) = with_mutatis(), by_hand()
    jitted, hand = mu.jit(ours), jax.jit(hand)
    for _ in range(steps):
        held, expected = hand(held, *given)
        np.testing.assert_allclose(jitted(net, *rest), expected, rtol=1e-5)
    for theirs, cell in zip(
        jax.tree.leaves(held[0]), jax.tree.leaves(mu.state(net, mu.Param).to_pure_dict()), strict=True
    ):
        np.testing.assert_allclose(cell, theirs, rtol=1e-3, atol=1e-4)


def measure(options: argparse.Namespace) -> list[timing.Row]:
    """The rows: of the processor time of this thread, which does all of it, with garbage collection off."""
    check()
    (ours, given), (hand, values) = with_mutatis(), by_hand()
    # A fresh function each time, or JAX would find its trace.
    forms = {
        "ours": lambda: mu.jit(lambda *args: ours(*args)).lower(*given),
        "hand": lambda: jax.jit(lambda *args: hand(*args), donate_argnums=0).lower(*values),
    }
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(options.rounds + 1):
        for name, lower in forms.items():
            gc.collect()
            gc.disable()
            begin = time.thread_time()
            lower()
            times[name].append(time.thread_time() - begin)
            gc.enable()
    times = {name: seconds[1:] for name, seconds in times.items()}
    note = " to ".join(f"{statistics.median(times[name]):.2f} s" for name in forms)
    what = "tracing and lowering a pretraining step, warm"
    return [timing.Row(what, "threaded by hand", timing.ratio(times, "ours", "hand"), 1.15, note=note)]


if __name__ == "__main__":
    timing.main(__doc__, measure, rounds=15)
