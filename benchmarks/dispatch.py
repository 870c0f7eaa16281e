"""What one call of a jitted step costs: a step that reads and writes every state of a model.

The states are arrays of eight floats in nested modules, so the time is that of the call and not of the arithmetic. Every
contender does the same work (their results are compared bit for bit) and all run in one process, in rounds: one round
times a batch of calls of each, in an order that moves on by one. A figure is the median over the rounds of the ratio to
raw `jax.jit` over a flat list within the same round, so that what else the machine does weighs on both.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing

import mutatis as mu

BLOCK = {"dense": ("bias", "kernel"), "norm": ("bias", "mean", "scale", "var")}  # six states, as JAX sorts them
FACTOR = 1.0001
BASELINE, DONATED = "jax.jit, flat list", "jax.jit, flat list, donated"


@dataclasses.dataclass
class Contender:
    """One way to keep the states.

    Args:
      name: what it is.
      step: one call; it leaves the new values where the next one finds them.
      one: one of the present values, to wait for.
      values: all of them, in the order of the blocks.
    """

    name: str
    step: Callable[[], Any]
    one: Callable[[], Any]
    values: Callable[[], list[Any]]


def start(count: int) -> list[Any]:
    """The values that every contender starts from."""
    return [jnp.full(8, 1.0 + index) for index in range(count)]


def threaded(name: str, values: Any, one: Callable[[Any], Any], **options: Any) -> Contender:
    """Plain `jax.jit` over a pytree that is threaded through by hand."""
    jitted = jax.jit(lambda values: jax.tree.map(lambda x: x * FACTOR, values), **options)

    def step() -> None:
        nonlocal values
        values = jitted(values)

    return Contender(name, step, lambda: one(values), lambda: jax.tree.leaves(values))


def nested(count: int) -> Any:
    """The values as nested dictionaries, one for each module."""
    values = iter(start(count))
    return {
        "blocks": [
            {part: {name: next(values) for name in names} for part, names in BLOCK.items()} for _ in range(count // 6)
        ]
    }


def build(count: int, module: type, cell: Callable[[Any], Any], sequence: Callable[[Any], Any] = list) -> Any:
    """A model of nested modules in some library."""

    class Part(module):  # type: ignore[misc]
        def __init__(self, names: tuple[str, ...], values: Iterator[Any]) -> None:
            super().__init__()
            for name in names:
                setattr(self, name, cell(next(values)))

    class Block(module):  # type: ignore[misc]
        def __init__(self, values: Iterator[Any]) -> None:
            super().__init__()
            for name, names in BLOCK.items():
                setattr(self, name, Part(names, values))

    class Net(module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            values = iter(start(count))
            self.blocks = sequence([Block(values) for _ in range(count // 6)])

    return Net()


def cells(block: Any) -> tuple[Any, ...]:
    """The cells of a block, as JAX sorts them."""
    dense, norm = block.dense, block.norm
    return dense.bias, dense.kernel, norm.bias, norm.mean, norm.scale, norm.var


def update(net: Any) -> None:
    """The step: reads and writes every state."""
    for block in net.blocks:
        for cell in cells(block):
            cell.value = cell.value * FACTOR


def stateful(name: str, net: Any, jit: Callable[..., Any], *, argument: bool) -> Contender:
    """A library's `jit` over a model that is an argument, or that the function names."""
    step = jit(update) if argument else jit(lambda: update(net))
    call = (lambda: step(net)) if argument else step
    every = [cell for block in net.blocks for cell in cells(block)]
    return Contender(name, call, lambda: every[0].value, lambda: [cell.value for cell in every])


def contenders(count: int, peers: bool) -> Iterator[Contender]:
    """The rows of the table."""
    yield threaded(BASELINE, start(count), lambda values: values[0])
    yield threaded(DONATED, start(count), lambda values: values[0], donate_argnums=0)
    yield threaded("jax.jit, nested dicts", nested(count), lambda values: values["blocks"][0]["dense"]["bias"])
    yield stateful("mu.jit, model as argument", build(count, mu.Module, mu.Variable), mu.jit, argument=True)
    yield stateful("mu.jit, model closed over", build(count, mu.Module, mu.Variable), mu.jit, argument=False)
    if peers and (nnx := timing.installed("flax.nnx")):
        net = build(count, nnx.Module, nnx.Variable, nnx.List)
        yield stateful("nnx.jit, model as argument", net, nnx.jit, argument=True)
    if peers and (brainstate := timing.installed("brainstate")):
        net = build(count, brainstate.nn.Module, brainstate.ParamState)
        yield stateful("brainstate, model closed over", net, brainstate.transform.jit, argument=False)
    if peers and (eqx := timing.installed("equinox")):
        yield returned("eqx.filter_jit, module returned", eqx, count)
        yield returned("eqx.filter_jit, donated", eqx, count, donate="all")
    if peers and (pz := timing.installed("penzai.pz")):
        yield variables("pz.variable_jit", pz, count)
        yield variables("pz.variable_jit, donated", pz, count, donate_variables=True)


def returned(name: str, eqx: Any, count: int, **options: Any) -> Contender:
    """Equinox: a module of arrays, of which the step returns a new one."""
    values = iter(start(count))

    def part(names: tuple[str, ...]) -> Any:
        fields = {"__annotations__": dict.fromkeys(names, jax.Array), "__module__": __name__}
        return type("Part", (eqx.Module,), fields)

    parts = {name: part(names) for name, names in BLOCK.items()}

    class Block(eqx.Module):  # type: ignore[misc]
        dense: Any
        norm: Any

    class Net(eqx.Module):  # type: ignore[misc]
        blocks: list[Block]

    def block() -> Any:
        return Block(**{name: parts[name](*(next(values) for _ in names)) for name, names in BLOCK.items()})

    net = Net([block() for _ in range(count // 6)])
    jitted = eqx.filter_jit(lambda net: jax.tree.map(lambda x: x * FACTOR, net), **options)

    def step() -> None:
        nonlocal net
        net = jitted(net)

    return Contender(name, step, lambda: net.blocks[0].dense.bias, lambda: jax.tree.leaves(net))


def variables(name: str, pz: Any, count: int, **options: Any) -> Contender:
    """Penzai: a pytree of mutable variables, which its `variable_jit` unbinds, freezes and updates at each call."""
    values = iter(start(count))

    def struct(name: str, fields: tuple[str, ...]) -> Any:
        body = {"__annotations__": dict.fromkeys(fields, Any), "__module__": __name__}
        return pz.pytree_dataclass(type(name, (pz.Struct,), body))

    parts = {name: struct("Part", names) for name, names in BLOCK.items()}
    block, net = struct("Block", tuple(BLOCK)), struct("Net", ("blocks",))

    def made(part: str) -> Any:
        return parts[part](*(pz.StateVariable(next(values)) for _ in BLOCK[part]))

    model = net([block(*map(made, BLOCK)) for _ in range(count // 6)])
    jitted = pz.variable_jit(update, **options)
    every = [cell for block in model.blocks for cell in cells(block)]
    return Contender(name, lambda: jitted(model), lambda: every[0].value, lambda: [cell.value for cell in every])


def check(every: list[Contender]) -> None:
    """All contenders have computed the same."""
    first = [np.asarray(value) for value in every[0].values()]
    for other in every[1:]:
        values = [np.asarray(value) for value in other.values()]
        if len(values) != len(first) or not all(map(np.array_equal, first, values)):
            sys.exit(f"`{other.name}` did not compute what `{every[0].name}` did")


def calls_for(count: int) -> int:
    """How many calls make a batch."""
    return max(4, 3000 // count)


def measure(count: int, rounds: int, peers: bool) -> dict[str, list[float]]:
    """Seconds per call of each contender, by round."""
    every = {contender.name: contender for contender in contenders(count, peers)}
    times = timing.interleave(
        {name: contender.step for name, contender in every.items()},
        calls=calls_for(count),
        rounds=rounds,
        wait=lambda name: every[name].one(),
    )
    check(list(every.values()))
    return times


def summary(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Microseconds, and the ratios to both baselines."""
    return {
        name: {
            "microseconds": statistics.median(seconds) * 1e6,
            "ratio": timing.ratio(times, name, BASELINE),
            "ratio_to_donated": timing.ratio(times, name, DONATED),
        }
        for name, seconds in times.items()
    }


def table(results: dict[int, dict[str, dict[str, float]]]) -> str:
    """The results as text."""
    rows = [["", *(f"{count} states" for count in results)]]
    for name in next(iter(results.values())):
        figures = (results[count][name] for count in results)
        rows.append(
            [name, *(f"{f['ratio']:5.2f} ({f['ratio_to_donated']:.2f}) {f['microseconds']:6.0f} us" for f in figures)]
        )
    return timing.aligned(rows, str.rjust, gap="   ")


def sizes(text: str) -> list[int]:
    """The argument of ``--states``."""
    counts = timing.numbers(text)
    if any(count <= 0 or count % 6 for count in counts):
        raise argparse.ArgumentTypeError("multiples of 6, the states of a block")
    return counts


def main() -> None:
    """Measure as the command line says, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--states", type=sizes, default=[60, 300, 1200], help="how many, e.g. 60,300 (multiples of 6)")
    parser.add_argument("--rounds", type=int, default=100, help="how often each batch of calls is timed")
    parser.add_argument("--peers", action="store_true", help="NNX, BrainState, Equinox and Penzai too, if installed")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    options = parser.parse_args()

    warnings.filterwarnings("ignore", "'.value' ", DeprecationWarning)  # of NNX: the others know no other word
    results = {count: summary(measure(count, options.rounds, options.peers)) for count in options.states}
    setup = {**timing.setup(), "rounds": options.rounds}
    if options.json:
        print(json.dumps({**setup, "results": results}, indent=1))
        return
    print("One call of a step that reads and writes every state: the time as a ratio to the first row (to the second).")
    print(", ".join(f"{key} {value}" for key, value in setup.items()) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
