"""What can be counted rather than timed: copies, traces, and what a sharded step says to the compiler.

No machine is too noisy for these. Each count stands beside what the same thing takes by hand in plain JAX; the sharded step
beside a twin that pins each result to where its argument was, as a step must that is called again.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["JAX_NUM_CPU_DEVICES"] = "8"  # before JAX is imported

import jax
import jax.numpy as jnp
import numpy as np
import optax
import timing
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mutatis as mu
from mutatis import nn
from mutatis.compilation import dispatch


@contextmanager
def copies() -> Iterator[list[int]]:
    """How many arrays were copied in a block, one entry for each step that copied any."""
    found: list[int] = []
    original = dispatch.copy_values

    def counted(values: list[Any]) -> Any:
        found.append(len(values))
        return original(values)

    dispatch.copy_values = counted
    try:
        yield found
    finally:
        dispatch.copy_values = original


def training() -> tuple[Any, Callable[[], Any]]:
    """A model and an optimizer, and a step over them."""
    net = mu.Module()
    net.layers = [nn.Linear(8, 8, rngs=mu.Rngs(n)) for n in range(4)]
    optimizer = mu.Optimizer(net, optax.adam(1e-3))

    @mu.jit
    def step(net: Any, optimizer: mu.Optimizer) -> None:
        optimizer.update(mu.state(net, mu.Param))

    def call() -> None:
        step(net, optimizer)

    return (net, optimizer), call


def copied_after(use: Callable[[Any], Any]) -> int:
    """How many states a step copies because of what was done before it."""
    model, step = training()
    for _ in range(3):
        step()
    use(model)
    with copies() as found:
        step()
    return sum(found)


def save(model: Any) -> None:
    """A checkpoint that is done before the next step."""
    with tempfile.TemporaryDirectory() as folder:
        mu.checkpoint.save(Path(folder) / "saved", model)


def traces_of_making() -> int:
    """How often the first call traces a function that makes modules."""
    runs = []

    @mu.jit
    def make(key: jax.Array) -> Any:
        runs.append(1)
        return [nn.Linear(4, 4, rngs=mu.Rngs(key)) for _ in range(3)]

    make(jax.random.key(0))
    return len(runs)


def innermost_traces(loop: Callable[..., Any], jit: Callable[..., Any], depth: int = 4) -> int:
    """How often the innermost of nested loops is traced whose carries start as Python numbers."""
    runs = []

    def nested(level: int) -> Any:
        def body(carry: Any, x: Any) -> Any:
            if level == 0:
                runs.append(1)
                return carry + x, None
            return loop(nested(level - 1), 0, jnp.arange(2))[0] + carry, None

        return body

    jit(lambda: loop(nested(depth - 1), 0, jnp.arange(2))[0])()
    return len(runs)


def sharded() -> tuple[Any, Any]:
    """The compiled texts of a step over a model in shards: ours, and its pinned twin by hand."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    tx = optax.adam(1e-3)
    net = mu.Module()
    net.layers = [nn.Linear(32, 32, rngs=mu.Rngs(n)) for n in range(6)]
    optimizer = mu.Optimizer(net, tx)

    def place(x: Any) -> Any:
        spec = P("data", "model") if np.ndim(x) == 2 else P()
        return jax.device_put(x, NamedSharding(mesh, spec))

    for cell in mu.variables([net, optimizer]).values():
        cell.value = jax.tree.map(place, cell.value)
    x = jax.device_put(jnp.ones((16, 32)), NamedSharding(mesh, P("data")))

    @mu.jit
    def step(net: Any, optimizer: mu.Optimizer, x: jax.Array) -> jax.Array:
        def loss(net: Any) -> jax.Array:
            out = x
            for layer in net.layers:
                out = jnp.tanh(layer(out))
            return jnp.mean(out**2)

        value, grads = mu.value_and_grad(loss)(net)
        optimizer.update(grads)
        return value

    parameters = [{"kernel": layer.kernel.value, "bias": layer.bias.value} for layer in net.layers]
    moments = jax.tree.map(place, tx.init(parameters))

    def loss_by_hand(parameters: Any, x: jax.Array) -> jax.Array:
        for layer in parameters:
            x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
        return jnp.mean(x**2)

    def by_hand(parameters: Any, moments: Any, x: jax.Array) -> Any:
        value, grads = jax.value_and_grad(loss_by_hand)(parameters, x)
        updates, moments = tx.update(grads, moments, parameters)
        return optax.apply_updates(parameters, updates), moments, value

    placed = jax.tree.map(lambda leaf: leaf.sharding, (parameters, moments))
    pinned = jax.jit(by_hand, donate_argnums=(0, 1), out_shardings=(*placed, None))
    return step.lower(net, optimizer, x), pinned.lower(parameters, moments, x)


def collectives(compiled: str) -> dict[str, int]:
    """How many operations of each kind talk between devices."""
    kinds = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
    return {kind: len(re.findall(rf"= [^=\n]*\b{kind}(?:-start)?\(", compiled)) for kind in kinds}


def measure(options: argparse.Namespace) -> list[timing.Row]:
    """The rows."""
    rows = [
        timing.Row("copies in the step after a checkpoint save", "none", copied_after(save), 0, "arrays"),
        timing.Row("copies in the step after a dropped `mu.state`", "none", copied_after(mu.state), 0, "arrays"),
        timing.Row("copies in the step after a dropped `mu.snapshot`", "none", copied_after(mu.snapshot), 0, "arrays"),
        timing.Row("traces of a function that makes modules", "one", traces_of_making(), 1, "traces"),
    ]
    ours, hand = innermost_traces(mu.scan, mu.jit), innermost_traces(jax.lax.scan, jax.jit)
    rows.append(timing.Row("traces of the innermost of 4 loops, carries Python numbers", "one", ours, 1, "traces"))
    rows[-1].note = f"lax.scan: {hand}"
    step, pinned = sharded()
    writes = [
        len(re.findall(r"sharding_constraint|@Sharding|mhlo.sharding|sdy.sharding", low.as_text()))
        for low in (step, pinned)
    ]
    found = [collectives(low.compile().as_text()) for low in (step, pinned)]
    for kind in found[1]:
        if any(counts[kind] for counts in found):
            rows.append(
                timing.Row(
                    f"a sharded training step: {kind}", "pinned by hand", found[0][kind], found[1][kind], "operations"
                )
            )
    rows.append(
        timing.Row("a sharded training step: shardings said", "pinned by hand", writes[0], writes[1], "operations")
    )
    return rows


if __name__ == "__main__":
    timing.main(__doc__, measure)
