"""What runs without `mu.jit` around it: layers and gradients, loops and branches, making layers, and operations on large models.

Each beside the same in plain JAX, or beside itself on a model of a thousand states.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import timing
from jax import lax

import mutatis as mu
from mutatis import nn

Call = Callable[[], Any]


class Perceptron(mu.Module):
    """Three layers."""

    def __init__(self, rngs: mu.Rngs) -> None:
        self.layers = [nn.Linear(32, 32, rngs=rngs), nn.Linear(32, 32, rngs=rngs), nn.Linear(32, 1, rngs=rngs)]

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


def forward(parameters: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    """The same by hand."""
    for own in parameters[:-1]:
        x = jax.nn.relu(x @ own["kernel"] + own["bias"])
    return x @ parameters[-1]["kernel"] + parameters[-1]["bias"]


def layers() -> dict[str, tuple[Call, Call]]:
    """A call and a gradient of a small model."""
    net, x = Perceptron(mu.Rngs(0)), jnp.ones((8, 32))
    parameters = [{"kernel": layer.kernel.value, "bias": layer.bias.value} for layer in net.layers]
    ours = mu.grad(lambda net: jnp.sum(net(x) ** 2))
    hand = jax.grad(lambda parameters: jnp.sum(forward(parameters, x) ** 2))
    return {
        "an eager call of a small MLP": (lambda: net(x), lambda: forward(parameters, x)),
        "an eager gradient of a small MLP": (lambda: ours(net), lambda: hand(parameters)),
    }


def control() -> dict[str, tuple[Call, Call]]:
    """Loops and branches with a fresh function at each call."""
    w, xs, yes = mu.Param(jnp.float32(2)), jnp.arange(8.0), jnp.array(True)
    start = jnp.float32(0)

    def loop() -> Any:
        return mu.scan(lambda carry, x: (carry + w.value * x, None), start, xs)

    def loop_by_hand() -> Any:
        value = jnp.float32(2)
        return lax.scan(lambda carry, x: (carry + value * x, None), start, xs)

    def branch() -> Any:
        return mu.cond(yes, lambda x: x * w.value, lambda x: x - w.value, start)

    def branch_by_hand() -> Any:
        value = jnp.float32(2)
        return lax.cond(yes, lambda x: x * value, lambda x: x - value, start)

    return {
        "an eager `mu.scan` over a fresh function": (loop, loop_by_hand),
        "an eager `mu.cond` of fresh functions": (branch, branch_by_hand),
    }


def making() -> dict[str, tuple[Call, Call]]:
    """A hundred layers."""
    initializer = jax.nn.initializers.lecun_normal()

    def ours() -> Any:
        rngs = mu.Rngs(0)
        return [nn.Linear(16, 16, rngs=rngs) for _ in range(100)][-1].kernel.value

    def draws() -> Any:
        key = jax.random.key(0)
        made = [
            (initializer(jax.random.fold_in(key, number), (16, 16), jnp.float32), jnp.zeros(16))
            for number in range(100)
        ]
        return made[-1][0]

    return {"making 100 `nn.Linear`": (ours, draws)}


GOALS = {
    "an eager call of a small MLP": 1.2,
    "an eager gradient of a small MLP": 1.2,
    "an eager `mu.scan` over a fresh function": 1.0,
    "an eager `mu.cond` of fresh functions": 1.0,
    "making 100 `nn.Linear`": 1.2,
}
CALLS = {"an eager call of a small MLP": 50, "making 100 `nn.Linear`": 1}


# -- large models ------------------------------------------------------------------------------------------------------


class Block(mu.Module):
    """Two states, over the same array everywhere: a large model in little memory."""

    def __init__(self, value: jax.Array) -> None:
        self.weight = mu.Param(value)
        self.mean = mu.BatchStat(value)


def large(count: int) -> mu.Module:
    """A model of so many states."""
    net, value = mu.Module(), jnp.ones(2)
    net.blocks = [Block(value) for _ in range(count // 2)]
    return net


def growth(counts: list[int]) -> list[timing.Row]:
    """The cost of operations per state, beside that on the smallest model."""
    rows = []
    seconds: dict[str, list[float]] = {}
    for count in counts:
        net = large(count)
        definition, state = mu.split(net)
        operations = {
            "state": functools.partial(mu.state, net),
            "split": functools.partial(mu.split, net),
            "merge": functools.partial(mu.merge, definition, state),
            "clone": functools.partial(mu.clone, net),
            "deepcopy": functools.partial(copy.deepcopy, net),
        }
        for name, operation in operations.items():
            operation()
            times = []
            for _ in range(3):
                begin = time.perf_counter()
                operation()
                times.append((time.perf_counter() - begin) / count)
            seconds.setdefault(name, []).append(statistics.median(times))
    for name, (smallest, *others) in seconds.items():
        for count, taken in zip(counts[1:], others, strict=True):
            what = f"`{name}` of {count} states, per state"
            rows.append(timing.Row(what, f"of {counts[0]}", taken / smallest, 1.3, note=f"{taken * 1e6:.2g} us"))
    return rows


def measure(options: argparse.Namespace) -> list[timing.Row]:
    """The rows."""
    rows = []
    for name, (ours, hand) in {**layers(), **control(), **making()}.items():
        times = timing.interleave({"ours": ours, "hand": hand}, calls=CALLS.get(name, 5), rounds=options.rounds)
        rows.append(timing.Row(name, "plain JAX", timing.ratio(times, "ours", "hand"), GOALS[name]))
    return rows + growth(options.states)


if __name__ == "__main__":
    timing.main(
        __doc__,
        measure,
        (
            "--states",
            {"type": timing.numbers, "default": [1000, 10000, 100000], "help": "how many the large models have"},
        ),
        rounds=20,
    )
