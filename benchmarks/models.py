"""Two models, each written twice: with Mutatis, and as plain functions over nested dictionaries of arrays.

The second is what an expert writes who threads parameters, statistics and moments by hand. Both do the same arithmetic and
start from the same numbers, so what they compute, and the programs that JAX makes of them, can be compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import mutatis as mu
from mutatis import nn

EPSILON = 1e-5
MOMENTUM = 0.99


@dataclasses.dataclass(frozen=True)
class Task:
    """A model to train, in both forms.

    Args:
      name: what it is.
      build: makes the model.
      loss: the loss of ``(model, x, y)``; it updates the model's statistics.
      by_hand: the loss of ``(params, stats, x, y)`` and the new statistics.
      batch: makes ``(x, y)``.
    """

    name: str
    build: Callable[[], mu.Module]
    loss: Callable[[Any, jax.Array, jax.Array], jax.Array]
    by_hand: Callable[[Any, Any, jax.Array, jax.Array], tuple[jax.Array, Any]]
    batch: Callable[[], tuple[jax.Array, jax.Array]]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over a batch."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


# -- a train step ---------------------------------------------------------------------------------------------------


def optimizer() -> Any:
    """The optax transformation of both."""
    return optax.adam(1e-3)


def stateful_step(task: Task) -> Callable[..., Any]:
    """A new step of ``(model, optimizer, x, y)``: the states are written where they live."""

    def step(net: mu.Module, opt: mu.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
        value, gradients = mu.value_and_grad(task.loss)(net, x, y)
        opt.update(gradients)
        return value

    return step


def threaded_step(task: Task) -> Callable[..., Any]:
    """A new step of ``(state, x, y)``: it returns the new state beside the loss."""
    tx = optimizer()

    def step(state: tuple[Any, ...], x: jax.Array, y: jax.Array) -> tuple[tuple[Any, ...], jax.Array]:
        params, stats, moments, count = state
        (value, stats), gradients = jax.value_and_grad(task.by_hand, has_aux=True)(params, stats, x, y)
        updates, moments = tx.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), stats, moments, count + 1), value

    return step


def threaded_state(net: mu.Module) -> tuple[Any, ...]:
    """Parameters, statistics, moments and the number of steps as plain arrays; the first two are copies of a model's."""
    copies = jax.tree.map(jnp.copy, mu.state(net))
    params = copies.filter(mu.Param).to_pure_dict()
    return params, copies.filter(mu.BatchStat).to_pure_dict(), optimizer().init(params), jnp.int32(0)


# -- a decoder-only transformer -------------------------------------------------------------------------------------


def mix(qkv: jax.Array, heads: int) -> jax.Array:
    """Causal attention of a sequence to itself."""
    batch, length, width = qkv.shape
    q, k, v = jnp.moveaxis(qkv.reshape(batch, length, 3, heads, width // 3 // heads), 2, 0)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -1e9)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(batch, length, width // 3)


class Embedding(mu.Module):
    """A vector for each of some things."""

    def __init__(self, count: int, width: int, *, rngs: mu.Rngs) -> None:
        self.table = mu.Param(0.02 * jax.random.normal(rngs.params(), (count, width)))

    def __call__(self, index: jax.Array) -> jax.Array:
        return self.table.value[index]


class LayerNorm(mu.Module):
    """Normalizes over the last axis, then scales and shifts."""

    def __init__(self, width: int) -> None:
        self.scale = mu.Param(jnp.ones(width))
        self.bias = mu.Param(jnp.zeros(width))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x - jnp.mean(x, -1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + EPSILON)
        return x * self.scale + self.bias


class Block(mu.Module):
    """Attention and two layers, each around a residual connection."""

    def __init__(self, width: int, heads: int, *, rngs: mu.Rngs) -> None:
        self.heads = heads
        self.norm1 = LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, rngs=rngs)
        self.out = nn.Linear(width, width, rngs=rngs)
        self.norm2 = LayerNorm(width)
        self.up = nn.Linear(width, 4 * width, rngs=rngs)
        self.down = nn.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.out(mix(self.qkv(self.norm1(x)), self.heads))
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))


class Transformer(mu.Module):
    """A decoder-only transformer, from tokens to logits."""

    def __init__(self, layers: int, width: int, heads: int, vocabulary: int, length: int, *, rngs: mu.Rngs) -> None:
        self.tokens = Embedding(vocabulary, width, rngs=rngs)
        self.places = Embedding(length, width, rngs=rngs)
        self.blocks = [Block(width, heads, rngs=rngs) for _ in range(layers)]
        self.norm = LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.tokens(tokens) + self.places(jnp.arange(tokens.shape[-1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def linear(p: Any, x: jax.Array) -> jax.Array:
    """`nn.Linear` by hand."""
    return x @ p["kernel"] + p["bias"]


def layer_norm(p: Any, x: jax.Array) -> jax.Array:
    """`LayerNorm` by hand."""
    x = x - jnp.mean(x, -1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + EPSILON)
    return x * p["scale"] + p["bias"]


def transformer(
    layers: int = 12, width: int = 64, heads: int = 4, vocabulary: int = 256, length: int = 32, batch: int = 4
) -> Task:
    """A decoder-only transformer."""

    def build() -> Transformer:
        return Transformer(layers, width, heads, vocabulary, length, rngs=mu.Rngs(0))

    def loss(net: Transformer, x: jax.Array, y: jax.Array) -> jax.Array:
        return cross_entropy(net(x), y)

    def block(p: Any, x: jax.Array) -> jax.Array:
        x = x + linear(p["out"], mix(linear(p["qkv"], layer_norm(p["norm1"], x)), heads))
        return x + linear(p["down"], jax.nn.gelu(linear(p["up"], layer_norm(p["norm2"], x))))

    def by_hand(params: Any, stats: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
        h = params["tokens"]["table"][x] + params["places"]["table"][jnp.arange(x.shape[-1])]
        for number in range(layers):
            h = block(params["blocks"][number], h)
        return cross_entropy(linear(params["head"], layer_norm(params["norm"], h)), y), stats

    def tokens() -> tuple[jax.Array, jax.Array]:
        text = jax.random.randint(jax.random.key(1), (batch, length + 1), 0, vocabulary)
        return text[:, :-1], text[:, 1:]

    return Task(f"transformer, {layers} layers", build, loss, by_hand, tokens)


# -- a residual convolutional net -----------------------------------------------------------------------------------


class ConvBlock(mu.Module):
    """Two convolutions around a residual connection."""

    def __init__(self, width: int, *, rngs: mu.Rngs) -> None:
        self.conv1 = nn.Conv(width, width, (3, 3), use_bias=False, rngs=rngs)
        self.norm1 = nn.BatchNorm(width, momentum=MOMENTUM, epsilon=EPSILON, use_fast_variance=False)
        self.conv2 = nn.Conv(width, width, (3, 3), use_bias=False, rngs=rngs)
        self.norm2 = nn.BatchNorm(width, momentum=MOMENTUM, epsilon=EPSILON, use_fast_variance=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.nn.relu(self.norm1(self.conv1(x)))
        return jax.nn.relu(x + self.norm2(self.conv2(y)))


class ConvNet(mu.Module):
    """Convolutions with batch normalization, from images to logits."""

    def __init__(self, blocks: int, width: int, classes: int, *, rngs: mu.Rngs) -> None:
        self.stem = nn.Conv(3, width, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nn.BatchNorm(width, momentum=MOMENTUM, epsilon=EPSILON, use_fast_variance=False)
        self.blocks = [ConvBlock(width, rngs=rngs) for _ in range(blocks)]
        self.head = nn.Linear(width, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(x, (1, 2)))


def conv(p: Any, x: jax.Array) -> jax.Array:
    """`nn.Conv` by hand."""
    return jax.lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def batch_norm(p: Any, stats: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    """`nn.BatchNorm` in training by hand, and the new statistics."""
    mean = jnp.mean(x, (0, 1, 2), keepdims=True)
    var = jnp.mean(jnp.square(x - mean), (0, 1, 2), keepdims=True)
    new = {
        name: MOMENTUM * stats[name] + (1 - MOMENTUM) * jax.lax.stop_gradient(value).reshape(-1)
        for name, value in (("mean", mean), ("var", var))
    }
    scale, bias = (p[name].reshape(1, 1, 1, -1) for name in ("scale", "bias"))
    return (x - mean) * (jax.lax.rsqrt(var + EPSILON) * scale) + bias, new


def convnet(layers: int = 50, width: int = 16, size: int = 16, classes: int = 10, batch: int = 8) -> Task:
    """A residual net: a convolution, blocks of two each, and a linear layer."""
    blocks = (layers - 2) // 2

    def build() -> ConvNet:
        return ConvNet(blocks, width, classes, rngs=mu.Rngs(0))

    def loss(net: ConvNet, x: jax.Array, y: jax.Array) -> jax.Array:
        return cross_entropy(net(x), y)

    def block(p: Any, stats: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        y, norm1 = batch_norm(p["norm1"], stats["norm1"], conv(p["conv1"], x))
        y, norm2 = batch_norm(p["norm2"], stats["norm2"], conv(p["conv2"], jax.nn.relu(y)))
        return jax.nn.relu(x + y), {"norm1": norm1, "norm2": norm2}

    def by_hand(params: Any, stats: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
        h, norm = batch_norm(params["norm"], stats["norm"], conv(params["stem"], x))
        h = jax.nn.relu(h)
        new: dict[int, Any] = {}
        for number in range(blocks):
            h, new[number] = block(params["blocks"][number], stats["blocks"][number], h)
        logits = linear(params["head"], jnp.mean(h, (1, 2)))
        return cross_entropy(logits, y), {"norm": norm, "blocks": new}

    def images() -> tuple[jax.Array, jax.Array]:
        x = jax.random.normal(jax.random.key(1), (batch, size, size, 3))
        return x, jax.random.randint(jax.random.key(2), (batch,), 0, classes)

    return Task(f"convnet, {layers} layers", build, loss, by_hand, images)
