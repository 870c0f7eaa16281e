"""What one call of a jitted step costs, in the ways that a step is written: the rows of the report about calls.

The states are arrays of eight floats in nested modules, as in `dispatch.py`, and each contender does the same work.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import dispatch
import jax
import jax.numpy as jnp
import optax
import timing

import mutatis as mu


def goal(count: int, goals: tuple[float, ...] = (1.10, 1.05, 1.03, 1.00)) -> float:
    """The goal beside the donated list: an expert's cost, and a little more where there is little else."""
    return goals[sum(count >= size for size in (300, 1200, 4000))]


def steps(count: int, rounds: int) -> list[timing.Row]:
    """A step that reads and writes every state; the model as an argument, and closed over."""
    times = dispatch.measure(count, rounds, peers=False)
    rows = []
    for name in ("mu.jit, model as argument", "mu.jit, model closed over"):
        what = f"{name}: {count} states"
        rows.append(timing.Row(what, "undonated list", timing.ratio(times, name, dispatch.BASELINE), 0.90))
        rows.append(timing.Row(what, "donated list", timing.ratio(times, name, dispatch.DONATED), goal(count)))
    return rows


def training(count: int, rounds: int) -> list[timing.Row]:
    """A step over ``(model, optimizer, metrics)``: half of the states are momenta."""
    transform = optax.sgd(0.01, momentum=0.9)
    net = dispatch.build(count // 2 // 6 * 6, mu.Module, mu.Param)
    optimizer = mu.Optimizer(net, transform)
    metrics = mu.metrics.Average()

    @mu.jit
    def step(net: Any, optimizer: mu.Optimizer, metrics: mu.metrics.Average) -> None:
        optimizer.update(mu.state(net, mu.Param))  # the gradient of half the square
        metrics.update(values=jnp.float32(1))

    params = dispatch.start(count // 2 // 6 * 6)
    opt_state = transform.init(params)
    counts = (jnp.float32(0), jnp.int32(0))

    def by_hand(params: Any, opt_state: Any, counts: Any) -> Any:
        updates, opt_state = transform.update(params, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, (counts[0] + 1, counts[1] + 1)

    jitted = jax.jit(by_hand, donate_argnums=(0, 1, 2))

    def hand() -> None:
        nonlocal params, opt_state, counts
        params, opt_state, counts = jitted(params, opt_state, counts)

    first = next(iter(mu.variables(net).values()))
    times = timing.interleave(
        {"hand": hand, "ours": lambda: step(net, optimizer, metrics)},
        calls=dispatch.calls_for(count),
        rounds=rounds,
        wait=lambda name: params[0] if name == "hand" else first._value,
    )
    what = f"mu.jit, (model, optimizer, metrics): {count} states"
    return [
        timing.Row(what, "donated pytrees", timing.ratio(times, "ours", "hand"), goal(count, (1.12, 1.06, 1.05, 1.02)))
    ]


def reading(count: int, rounds: int) -> list[timing.Row]:
    """A step that only reads."""
    net = dispatch.build(count, mu.Module, mu.Variable)
    values = dispatch.start(count)

    @mu.jit
    def step(net: Any, x: jax.Array) -> jax.Array:
        return x + sum(cell.value[0] for block in net.blocks for cell in dispatch.cells(block))

    hand = jax.jit(lambda values, x: x + sum(value[0] for value in values))
    x = jnp.float32(1)
    times = timing.interleave(
        {"hand": lambda: hand(values, x), "ours": lambda: step(net, x)}, calls=dispatch.calls_for(count), rounds=rounds
    )
    return [timing.Row(f"a step that only reads {count} states", "list", timing.ratio(times, "ours", "hand"), 1.10)]


def toggling(count: int, rounds: int) -> list[timing.Row]:
    """`train` and `eval` in turn, before each call."""
    net = dispatch.build(count, mu.Module, mu.Variable)

    @mu.jit
    def step(net: Any) -> None:
        factor = dispatch.FACTOR if net.training else 1 / dispatch.FACTOR
        for block in net.blocks:
            for cell in dispatch.cells(block):
                cell.value = cell.value * factor

    def ours() -> None:
        step(net.train())
        step(net.eval())

    def by_hand(factor: float) -> Callable[[Any], Any]:
        return jax.jit(lambda values: [value * factor for value in values], donate_argnums=0)

    train, evaluate = by_hand(dispatch.FACTOR), by_hand(1 / dispatch.FACTOR)
    values = dispatch.start(count)

    def hand() -> None:
        nonlocal values
        values = evaluate(train(values))

    first = net.blocks[0].dense.bias
    times = timing.interleave(
        {"hand": hand, "ours": ours},
        calls=dispatch.calls_for(count),
        rounds=rounds,
        wait=lambda name: values[0] if name == "hand" else first._value,
    )
    what = f"`train()` or `eval()` before each call: {count} states"
    return [timing.Row(what, "two functions, donated list", timing.ratio(times, "ours", "hand"), 1.5)]


def growth(counts: list[int], rounds: int) -> list[timing.Row]:
    """The cost of a call by the number of its states, beside what the donated list costs."""
    rows = []
    for count in counts:
        net = dispatch.build(count, mu.Module, mu.Variable)
        step = mu.jit(dispatch.update)
        hand = dispatch.threaded("", dispatch.start(count), lambda values: values[0], donate_argnums=0)
        first = net.blocks[0].dense.bias
        times = timing.interleave(
            {"hand": hand.step, "ours": lambda step=step, net=net: step(net)},
            calls=dispatch.calls_for(count),
            rounds=max(1, rounds // 4),
            wait=lambda name, hand=hand, first=first: hand.one() if name == "hand" else first._value,
        )
        ours = sorted(times["ours"])[len(times["ours"]) // 2]
        ratio = timing.ratio(times, "ours", "hand")
        note = f"{ratio:.2f} of the donated list"
        rows.append(timing.Row(f"growth: {count} states", "", ours / count * 1e6, unit="us per state", note=note))
    return rows


def measure(options: argparse.Namespace) -> list[timing.Row]:
    """All rows."""
    rows = []
    for count in options.states:
        rows += steps(count, options.rounds)
        rows += training(count, options.rounds)
    rows += reading(options.states[-2:][0], options.rounds)
    for count in options.states[:2]:
        rows += toggling(count, options.rounds)
    return rows + growth(options.growth, options.rounds)


if __name__ == "__main__":
    timing.main(
        __doc__,
        measure,
        ("--states", {"type": dispatch.sizes, "default": [60, 300, 1200, 4998], "help": "how many"}),
        ("--growth", {"type": dispatch.sizes, "default": [12, 30, 102, 300, 1002, 3000, 10_002], "help": "how many"}),
    )
