"""Whether it pays to pack many small states into few buffers: a trial by hand in plain JAX; no library does it here.

JAX takes about a microsecond to hand an array over to a program and back. Packed, the states are slices of one buffer for
each dtype: the program cuts them out, steps, and puts the new ones together, by one `concatenate` or by one update of a slice
after the other. Whoever reads a state between two calls cuts it out then. Each step is measured against the very same step
over a flat donated list, which is what `mu.jit` hands over, and their results are compared. *Stacked* is something else, and
not what a library could do by itself: a model whose author keeps equal states as the rows of one array.

A step in a loop (`lax.fori_loop`) is one without its call. Compile times are of one compilation each, tracing included.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import decoding
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from timing import Row, interleave, main, numbers, ratio

Step = Callable[[list[Any], Any], list[Any]]  # states, and what is only read -> new states
FLAT, STACKED = "flat list, donated", "stacked by hand"
INNER = 20  # steps of a loop within a program
CHECKED = 3  # steps after which results are compared: states that were equal at first no longer are


@dataclasses.dataclass
class Work:
    """A step over states.

    Args:
      name: what it is.
      step: what is measured.
      states: what it reads and writes.
      fixed: what it only reads.
    """

    name: str
    step: Step
    states: list[Any]
    fixed: Any = ()


class Packing:
    """How arrays are packed: those of a dtype end to end in one buffer, large ones and lone ones as they are.

    Args:
      arrays: the arrays.
      limit: the most elements of an array that is packed.
      update: whether to put new arrays in place one after the other, and not all together by one `concatenate`.
    """

    def __init__(self, arrays: Sequence[Any], limit: int | None = None, *, update: bool = False) -> None:
        self.update = update
        self.shapes = [array.shape for array in arrays]
        groups: dict[Any, list[int]] = {}
        for index, array in enumerate(arrays):
            if limit is None or array.size <= limit:
                groups.setdefault(array.dtype, []).append(index)
        self.groups = [indices for indices in groups.values() if len(indices) > 1]
        packed = {index for indices in self.groups for index in indices}
        self.rest = [index for index in range(len(arrays)) if index not in packed]
        self.places: dict[int, tuple[int, int]] = {}  # by array: its group, and where it starts there
        for group, indices in enumerate(self.groups):
            ends = np.cumsum([0, *(arrays[index].size for index in indices)]).tolist()
            self.places.update({index: (group, start) for index, start in zip(indices, ends, strict=False)})

    def pack(self, arrays: Sequence[Any]) -> list[Any]:
        """The buffers of a call: one for each group, and the arrays that are not packed."""
        buffers = [jnp.concatenate([arrays[index].reshape(-1) for index in indices]) for indices in self.groups]
        return buffers + [arrays[index] for index in self.rest]

    def cut(self, buffers: Sequence[Any], index: int) -> Any:
        """One array, inside a program."""
        group, start = self.places[index]
        shape = self.shapes[index]
        return lax.slice(buffers[group], (start,), (start + int(np.prod(shape)),)).reshape(shape)

    def unpack(self, buffers: Sequence[Any]) -> list[Any]:
        """All arrays, inside a program."""
        lone = dict(zip(self.rest, buffers[len(self.groups) :], strict=True))
        return [lone[index] if index in lone else self.cut(buffers, index) for index in range(len(self.shapes))]

    def put(self, buffers: Sequence[Any], arrays: Sequence[Any]) -> list[Any]:
        """The new buffers, inside a program."""
        if not self.update:
            return self.pack(arrays)
        new = list(buffers[: len(self.groups)])
        for index, (group, start) in self.places.items():
            new[group] = lax.dynamic_update_slice(new[group], arrays[index].reshape(-1), (start,))
        return new + [arrays[index] for index in self.rest]

    def lift(self, step: Step) -> Step:
        """The same step over buffers."""
        return lambda buffers, fixed: self.put(buffers, step(self.unpack(buffers), fixed))

    def read(self, buffers: Sequence[Any], index: int) -> Any:
        """One array between two calls. The place is data, so that one program serves all arrays of a shape."""
        group, start = self.places[index]
        return _cut(buffers[group], start, self.shapes[index])

    def write(self, buffers: list[Any], index: int, value: Any) -> None:
        """Set one array between two calls, in place."""
        group, start = self.places[index]
        buffers[group] = _set(buffers[group], start, value)


@jax.jit(static_argnums=2)
def _cut(buffer: Any, start: Any, shape: Any) -> Any:
    return lax.dynamic_slice(buffer, (start,), (int(np.prod(shape)),)).reshape(shape)


@jax.jit(donate_argnums=0)
def _set(buffer: Any, start: Any, value: Any) -> Any:
    return lax.dynamic_update_slice(buffer, value.reshape(-1), (start,))


class Runner:
    """A compiled step, with the states that it keeps and what its compilation took."""

    def __init__(self, step: Step, kept: list[Any], fixed: Any) -> None:
        self.kept = [jnp.copy(array) for array in kept]  # each its own: it will be donated
        self.fixed = fixed
        begin = time.perf_counter()
        self.jitted = jax.jit(step, donate_argnums=0)
        self()
        jax.block_until_ready(self.kept)
        self.seconds = time.perf_counter() - begin

    def __call__(self) -> Any:
        """One call."""
        self.kept = self.jitted(self.kept, self.fixed)
        return self.kept[0]


def looped(step: Step) -> Step:
    """Many steps in one program."""
    return lambda kept, fixed: lax.fori_loop(0, INNER, lambda _, kept: step(kept, fixed), kept)


def same(name: str, a: Sequence[Any], b: Sequence[Any]) -> None:
    """Two contenders have computed the same, but for how XLA orders sums when it fuses otherwise."""
    for x, y in zip(a, b, strict=True):
        if np.linalg.norm(np.ravel(x - y)) > 0.01 * np.linalg.norm(np.ravel(y)) + 1e-6:
            sys.exit(f"{name}: packed and flat states differ by {np.abs(x - y).max():g}")


def compare(
    work: Work,
    packings: dict[str, Packing],
    rounds: int,
    *,
    loop: bool = False,
    goal: float | None = None,
    stacked: Runner | None = None,
) -> list[Row]:
    """The rows of one step: over a flat list, and packed in several ways."""
    rows, runners = [], {FLAT: Runner(work.step, work.states, work.fixed)}
    for _ in range(CHECKED - 1):
        runners[FLAT]()
    loops = {FLAT: Runner(looped(work.step), work.states, work.fixed)} if loop else {}
    for name, packing in packings.items():
        step, kept = packing.lift(work.step), packing.pack(work.states)
        runners[name] = Runner(step, kept, work.fixed)
        for _ in range(CHECKED - 1):
            runners[name]()
        same(f"{work.name}, {name}", packing.unpack(runners[name].kept), runners[FLAT].kept)
        if loop:
            loops[name] = Runner(looped(step), kept, work.fixed)
    if stacked is not None:
        runners[STACKED] = stacked
    times = interleave(dict(runners), calls=10, rounds=rounds)
    within = interleave(dict(loops), calls=1, rounds=max(3, rounds // 3)) if loop else {}
    middle = {name: float(np.median(seconds)) for name, seconds in times.items()}
    for name, runner in runners.items():
        held = f"{len(runner.kept)} buffers"
        if name != FLAT:
            best = goal if name != STACKED else None
            rows.append(Row(f"{work.name}: a call, {name}", FLAT, ratio(times, name, FLAT), best, note=held))
            rows.append(Row(f"{work.name}: compiling, {name}", FLAT, runner.seconds / runners[FLAT].seconds))
        rows.append(Row(f"{work.name}: a call, {name}", "", middle[name] * 1e6, unit="us", note=held))
        rows.append(Row(f"{work.name}: compiling, {name}", "", runner.seconds, unit="s"))
        if name in within:
            inside = float(np.median(within[name])) / INNER
            rows.append(Row(f"{work.name}: a step in a loop, {name}", "", inside * 1e6, unit="us"))
    return rows


# -- the steps ---------------------------------------------------------------------------------------------------------


def adam(value: Any, m: Any, v: Any, gradient: Any) -> tuple[Any, Any, Any]:
    """Adam, without the correction of its first steps."""
    m = 0.9 * m + 0.1 * gradient
    v = 0.99 * v + 0.01 * gradient * gradient
    return value - 1e-3 * m / (jnp.sqrt(v) + 1e-8), m, v


def optimized(values: Sequence[Any], gradients: Sequence[Any], ms: Sequence[Any], vs: Sequence[Any]) -> list[Any]:
    """New values, then all first moments, then all second ones."""
    new = [adam(*entry) for entry in zip(values, ms, vs, gradients, strict=True)]
    return [entry[part] for part in range(3) for entry in new]


def synthetic(count: int) -> Work:
    """Adam on arrays of eight floats, each pulled to zero."""

    def step(states: list[Any], _: Any) -> list[Any]:
        values = states[:count]
        return optimized(values, values, states[count : 2 * count], states[2 * count :])

    start = [jnp.full(8, 1.0 + index / count) for index in range(count)]
    return Work(f"Adam, {count} x 3 states", step, start + [jnp.zeros(8)] * (2 * count))


def stacked_adam(count: int) -> Runner:
    """The same over three arrays of many rows."""

    def step(states: list[Any], _: Any) -> list[Any]:
        return optimized(states[:1], states[:1], states[1:2], states[2:])

    start = jnp.stack([jnp.full(8, 1.0 + index / count) for index in range(count)])
    return Runner(step, [start, jnp.zeros((count, 8)), jnp.zeros((count, 8))], ())


def normalized(depth: int = 50, width: int = 32, batch: int = 16) -> Work:
    """Training a deep residual net of dense layers with BatchNorm: parameters, two moments each, running statistics."""
    rng = np.random.default_rng(0)

    def forward(params: Sequence[Any], x: Any) -> tuple[Any, list[Any]]:
        batches = []
        for kernel, scale, bias in zip(params[::3], params[1::3], params[2::3], strict=True):
            y = x @ kernel
            mean, var = jnp.mean(y, 0), jnp.var(y, 0)
            batches += [mean, var]
            x = x + 0.1 * jax.nn.relu((y - mean) * lax.rsqrt(var + 1e-5) * scale + bias)
        return jnp.mean(x * x), batches

    def step(states: list[Any], x: Any) -> list[Any]:
        count = 3 * depth
        params, ms, vs = (states[part * count : (part + 1) * count] for part in range(3))
        gradients, batches = jax.grad(forward, has_aux=True)(params, x)
        running = [0.9 * old + 0.1 * new for old, new in zip(states[3 * count : -1], batches, strict=True)]
        return [*optimized(params, gradients, ms, vs), *running, states[-1] + 1]

    params = []
    for _ in range(depth):
        kernel = rng.standard_normal((width, width), np.float32) / np.float32(width) ** 0.5
        params += [jnp.asarray(kernel), jnp.ones(width), jnp.zeros(width)]
    moments = [jnp.zeros_like(param) for param in params]
    states = [*params, *moments, *moments, *([jnp.zeros(width), jnp.ones(width)] * depth), jnp.int32(0)]
    x = jnp.asarray(rng.standard_normal((batch, width), np.float32))
    return Work(f"BatchNorm net, {depth} layers, Adam", step, states, x)


def spiking(depth: int = 100, width: int = 64) -> Work:
    """One step in time of a spiking net: synaptic current, membrane potential and threshold of each layer."""
    rng = np.random.default_rng(0)

    def step(states: list[Any], fixed: Any) -> list[Any]:
        matrices, spikes = fixed
        new = []
        for matrix, current, membrane, threshold in zip(matrices, states[::3], states[1::3], states[2::3], strict=True):
            current = 0.8 * current + spikes @ matrix
            membrane = 0.9 * membrane + current
            spikes = (membrane > threshold).astype(jnp.float32)
            membrane = membrane - spikes * threshold
            new += [current, membrane, 0.95 * threshold + 0.05 * (1 + spikes)]
        return new

    matrices = [jnp.asarray(rng.standard_normal((width, width), np.float32) * 0.2) for _ in range(depth)]
    states = [jnp.zeros(width), jnp.zeros(width), jnp.ones(width)] * depth
    return Work(f"spiking net, {depth} layers", step, states, (matrices, jnp.ones(width)))


def caching(size: str) -> Work:
    """Decoding with a cache of keys and values, the position set back when the cache is full."""
    sizes = decoding.SIZES[size]
    tree = jax.tree.structure(decoding.caches(sizes))

    def step(states: list[Any], weights: Any) -> list[Any]:
        caches = tree.unflatten([*states[:-1], states[-1] % sizes.length])
        return jax.tree.leaves(decoding.decode(sizes, weights, caches, states[-1] % sizes.vocabulary)[0])

    return Work(f"decoding, {size}", step, jax.tree.leaves(decoding.caches(sizes)), decoding.weights(sizes))


def scaling(count: int) -> Work:
    """Multiplies each of many states."""
    return Work(f"{count} states", lambda states, _: [x * 1.0001 for x in states], [jnp.full(8, 1.0)] * count)


# -- what is measured --------------------------------------------------------------------------------------------------


def both(work: Work) -> dict[str, Packing]:
    """All states packed, put together in either way."""
    return {"concatenated": Packing(work.states), "updated": Packing(work.states, update=True)}


def between(work: Work, rounds: int) -> list[Row]:
    """What reading and writing one state between two calls costs."""
    packing = Packing(work.states)
    flat, buffers = list(work.states), packing.pack(work.states)
    index = len(flat) // 2
    value = flat[index]
    host = {
        FLAT: lambda: np.array(flat[index]),
        "packed": lambda: np.array(packing.read(buffers, index)),
    }
    times = interleave(host, calls=50, rounds=rounds)
    once = interleave({"packed": lambda: packing.read(buffers, index)}, calls=50, rounds=rounds)
    again = interleave({"packed": lambda: packing.write(buffers, index, value) or buffers[0]}, calls=50, rounds=rounds)
    figures = {
        "reading one state, packed": once["packed"],
        "reading one state to the host, packed": times["packed"],
        f"reading one state to the host, {FLAT}": times[FLAT],
        "writing one state, packed": again["packed"],
    }
    size = sum(buffer.nbytes for buffer in buffers[: len(packing.groups)]) / 1e6
    return [
        Row(f"{work.name}: {what}", "", float(np.median(seconds)) * 1e6, unit="us", note=f"of {size:.2g} MB")
        for what, seconds in figures.items()
    ]


def measure(options: argparse.Namespace) -> list[Row]:
    """The rows."""
    rounds, rows = options.rounds, []
    if "adam" in options.parts:
        work = synthetic(options.states)
        stacked = stacked_adam(options.states)
        rows += compare(work, both(work), rounds, loop=not options.no_loop, goal=0.3, stacked=stacked)
        rows += between(work, rounds)
    if "models" in options.parts:
        net = normalized()
        small = {"concatenated, up to 256 elements": Packing(net.states, 256)}
        rows += compare(net, {"concatenated": Packing(net.states), **small}, rounds) + between(net, rounds)
        for work in (spiking(), caching(options.decoder)):
            rows += compare(work, both(work), rounds) + between(work, rounds)
    if "growth" in options.parts:
        for count in options.growth:
            work = scaling(count)
            rows += compare(work, both(work), rounds)
    return rows


if __name__ == "__main__":
    main(
        __doc__,
        measure,
        ("--parts", {"default": "adam,models,growth", "help": "which of adam, models and growth"}),
        (
            "--states",
            {"type": int, "default": 300, "help": "of the synthetic step, times three; 1200 compile for minutes"},
        ),
        (
            "--no-loop",
            {"action": "store_true", "help": "leave out the synthetic step in a loop, half of the compiling"},
        ),
        ("--growth", {"type": numbers, "default": [10, 100, 1000], "help": "how many states, e.g. 10,100"}),
        ("--decoder", {"default": "deep", "help": "of the sizes in decoding.py"}),
    )
