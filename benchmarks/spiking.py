"""Loops over time beside `lax.scan` by hand and BrainState: a step, compiling, memory, derivatives, bars and checks.

The nets are made of `mutatis.nn`; by hand the same arithmetic is written out, and the results are compared before anything is
timed. Two nets: *dense*, 256 LIF neurons that are fed back through weights and a delay; *sparse*, 4000 LIF neurons that excite
each other through 2 % of all connections and synapses that decay.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing

import mutatis as mu
from mutatis import nn

STEPS = 10_000
KEEP = float(np.exp(np.float32(-1.0 / 20.0)))  # of a membrane, in a step
FADE = float(np.exp(np.float32(-1.0 / 5.0)))  # of a synapse
Pure = Callable[..., Any]


class Dense(mu.Module):
    """LIF neurons that are fed back through weights and a delay of ten steps."""

    def __init__(self, size: int = 256) -> None:
        drawn = np.random.default_rng(0).standard_normal((size, size)).astype(np.float32)
        self.weights = mu.Param(jnp.asarray(drawn / np.sqrt(size)))
        self.neurons = nn.LIF(size, tau=20.0)
        self.delay = nn.Delay((size,), max_steps=10)

    def __call__(self, x: jax.Array) -> jax.Array:
        """One step; gives the number of spikes."""
        spikes = self.neurons(x + self.delay.at(9) @ self.weights.value)
        self.delay.push(spikes)
        return spikes.sum()

    def by_hand(self) -> tuple[Pure, Any, Any]:
        """The same as a function of (parameters, carry, x), the parameters, and the first carry."""
        (size,) = self.neurons.size

        def step(weights: jax.Array, carry: Any, x: jax.Array) -> Any:
            v, spikes, ring, place = carry
            late = jax.lax.dynamic_index_in_dim(ring, (place - 10) % 11, keepdims=False)
            v, spikes = fire(v, spikes, x + late @ weights)
            ring = jax.lax.dynamic_update_index_in_dim(ring, spikes, place, 0)
            return (v, spikes, ring, (place + 1) % 11), spikes.sum()

        start = jnp.zeros(size), jnp.zeros(size), jnp.zeros((11, size)), jnp.int32(0)
        return step, self.weights.value, start


class Sparse(mu.Module):
    """LIF neurons that excite each other at random, through synapses that decay."""

    def __init__(self, size: int = 4000) -> None:
        self.neurons = nn.LIF(size, tau=20.0)
        self.connect = nn.FixedProb(size, size, 0.02, 0.02, rngs=mu.Rngs(0))
        self.synapses = nn.Expon(size, tau=5.0)

    def __call__(self, x: jax.Array) -> jax.Array:
        """One step; gives the number of spikes."""
        arrived = self.synapses(self.connect(self.neurons.spikes.value))
        return self.neurons(x + arrived).sum()

    def by_hand(self) -> tuple[Pure, Any, Any]:
        """The same as a function of (parameters, carry, x), the parameters, and the first carry."""
        (size,) = self.neurons.size

        def step(parameters: Any, carry: Any, x: jax.Array) -> Any:
            (source, target, weight), (v, spikes, g) = parameters, carry
            sent = spikes[source] * weight
            g = g * FADE + jnp.zeros(size).at[target].add(sent)
            v, spikes = fire(v, spikes, x + g)
            return (v, spikes, g), spikes.sum()

        parameters = self.connect.source.value, self.connect.target.value, self.connect.weight.value
        return step, parameters, (jnp.zeros(size), jnp.zeros(size), jnp.zeros(size))


def fire(v: jax.Array, spikes: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A step of LIF neurons."""
    start = v - spikes
    v = start + (x - start) * (1 - KEEP)
    return v, (v >= 1).astype(v.dtype)


def currents(steps: int, size: int) -> jax.Array:
    """What comes in."""
    return jnp.asarray(np.random.default_rng(1).uniform(0.8, 1.2, (steps, size)).astype(np.float32))


class Pair:
    """A net in `mu.for_loop`, and by hand in `lax.scan`, each compiled."""

    def __init__(self, net: Any, steps: int, **options: Any) -> None:
        self.net = net
        self.xs = currents(steps, net.neurons.size[0])
        step, self.parameters, self.carry = net.by_hand()

        @mu.jit
        def ours(net: Any, xs: jax.Array) -> jax.Array:
            return mu.for_loop(net, xs, **options)

        self.ours = ours

        def hand(carry: Any, parameters: Any, xs: jax.Array) -> Any:
            return jax.lax.scan(lambda carry, x: step(parameters, carry, x), carry, xs)

        self.hand = jax.jit(hand, donate_argnums=0)

    def call_ours(self) -> Any:
        """One call."""
        return self.ours(self.net, self.xs)

    def call_hand(self) -> Any:
        """One call."""
        self.carry, out = self.hand(self.carry, self.parameters, self.xs)
        return out

    def check(self) -> None:
        """The same spikes, but for those of membranes that are at the threshold to the last digit."""
        ours, hand = np.asarray(self.call_ours()), np.asarray(self.call_hand())
        assert ours.sum() > 0
        assert np.mean(ours != hand) < 0.02, (ours, hand)

    def compile_seconds(self) -> float:
        """Tracing and compiling: a ratio to by hand."""
        seconds = {"ours": [], "hand": []}  # type: dict[str, list[float]]
        for _ in range(5):
            jax.clear_caches()
            for name, lower in (
                ("ours", lambda: self.ours.lower(self.net, self.xs)),
                ("hand", lambda: self.hand.lower(self.carry, self.parameters, self.xs)),
            ):
                begin = time.perf_counter()
                lower().compile()
                seconds[name].append(time.perf_counter() - begin)
        return statistics.median(a / b for a, b in zip(seconds["ours"], seconds["hand"], strict=True))


def per_step(options: argparse.Namespace) -> list[timing.Row]:
    """Time per step and to compile, beside by hand."""
    rows = []
    for net, steps, what in ((Dense(), STEPS, "dense"), (Sparse(), 500, "sparse, 4000 neurons")):
        Pair(net, steps).check()
        mu.reset(net, mu.Hidden)
        pair = Pair(net, steps)
        times = timing.interleave({"ours": pair.call_ours, "hand": pair.call_hand}, calls=1, rounds=options.rounds)
        note = f"{statistics.median(times['ours']) / steps * 1e6:.3g} us"
        rows.append(
            timing.Row(f"a step, {what}", "`lax.scan` by hand", timing.ratio(times, "ours", "hand"), 1.05, note=note)
        )
        rows.append(timing.Row(f"tracing and compiling, {what}", "by hand", pair.compile_seconds(), 1.5))
    return rows


def beside_brainstate(options: argparse.Namespace) -> list[timing.Row]:
    """The dense net as BrainState runs it."""
    brainstate = timing.installed("brainstate")
    if brainstate is None:
        return []
    net = Dense()
    step, parameters, start = net.by_hand()
    xs = currents(STEPS, 256)
    states = [brainstate.HiddenState(value) for value in start]
    pair = Pair(net, STEPS)

    def one(x: jax.Array) -> jax.Array:
        new, out = step(parameters, [state.value for state in states], x)
        for state, value in zip(states, new, strict=True):
            state.value = value
        return out

    theirs = brainstate.transform.jit(lambda xs: brainstate.transform.for_loop(one, xs))
    called = brainstate.transform.jit(one)
    ours_called = mu.jit(lambda net, x: net(x))
    times = timing.interleave({"ours": pair.call_ours, "theirs": lambda: theirs(xs)}, calls=1, rounds=options.rounds)
    single = timing.interleave(
        {"ours": lambda: ours_called(net, xs[0]), "theirs": lambda: called(xs[0])}, calls=200, rounds=options.rounds
    )
    return [
        timing.Row("a step, dense, in one loop", "BrainState", timing.ratio(times, "ours", "theirs"), 1.05),
        timing.Row("a step, dense, called from Python", "BrainState", timing.ratio(single, "ours", "theirs"), 1.0),
    ]


def gradients(size: int, steps: int, every: int | None) -> tuple[Any, Any, Any]:
    """A derivative through a loop of rates, compiled: ours, by hand with the same blocks, and what both are called with."""
    xs, w = currents(steps, size), Dense(size).weights.value

    def by_hand(w: jax.Array, xs: jax.Array) -> jax.Array:
        def step(carry: Any, x: jax.Array) -> Any:
            v = carry + (x + carry @ w - carry) * (1 - KEEP)
            return v, v.sum()

        if every is None:
            return jax.lax.scan(step, jnp.zeros(size), xs)[1].sum()
        block = jax.checkpoint(lambda carry, xs: jax.lax.scan(step, carry, xs))
        return jax.lax.scan(block, jnp.zeros(size), xs.reshape(-1, every, size))[1].sum()

    v = mu.Hidden(jnp.zeros(size))

    def ours(w: jax.Array, xs: jax.Array) -> jax.Array:
        v.value = jnp.zeros(size)

        def step(x: jax.Array) -> jax.Array:
            v.value = v.value + (x + v.value @ w - v.value) * (1 - KEEP)
            return v.value.sum()

        return mu.for_loop(step, xs, checkpoint_every=every).sum()

    return mu.jit(mu.grad(ours)), jax.jit(jax.grad(by_hand)), (w, xs)


def temporary(compiled: Any, given: Any) -> int:
    """The temporary memory of a program, in bytes."""
    return int(compiled.lower(*given).compile().memory_analysis().temp_size_in_bytes)


def memory(options: argparse.Namespace) -> list[timing.Row]:
    """Bytes, which are counted, and the time of a derivative in blocks."""
    flat = [
        Pair(Dense(), steps).ours.lower(Dense(), currents(steps, 256)).compile().memory_analysis().temp_size_in_bytes
        for steps in (1000, STEPS)
    ]
    ours, hand, given = gradients(256, STEPS, 100)
    times = timing.interleave(
        {"ours": lambda: ours(*given), "hand": lambda: hand(*given)}, calls=1, rounds=options.rounds
    )
    bytes_of_ours, bytes_by_hand = temporary(ours, given), temporary(hand, given)
    theory = (STEPS // 100 + 100) * 256 * 4
    whole = temporary(gradients(256, STEPS, None)[0], given)
    return [
        timing.Row("temporary memory of 10,000 steps", "of 1,000", flat[1] / flat[0], 1.0),
        timing.Row(
            "gradient through 10,000 steps, `checkpoint_every=100`",
            "bytes, by hand",
            bytes_of_ours / bytes_by_hand,
            1.05,
        ),
        timing.Row("the same", "seconds, by hand", timing.ratio(times, "ours", "hand"), 1.05),
        timing.Row(
            "the same",
            "bytes of (10,000 / 100 + 100) carries",
            bytes_of_ours / theory,
            3.0,
            note=f"{bytes_of_ours / 1e6:.3g} MB",
        ),
        timing.Row("the same", "bytes, without `checkpoint_every`", bytes_of_ours / whole, 0.1),
    ]


def bars(options: argparse.Namespace) -> list[timing.Row]:
    """What a bar costs, in loops of half a second and more."""
    rows = []
    v = mu.Variable(jnp.ones(8))
    for work, count, what in ((1, 24_000_000, "tiny steps"), (400, 20_000, "steps of 25 us")):

        def body(x: jax.Array, work: int = work) -> jax.Array:
            y = v.value
            for _ in range(work):
                y = jnp.sin(y) * 1.1
            v.value = y
            return y[0]

        xs = jnp.zeros(count)
        plain = mu.jit(lambda xs, body=body: mu.for_loop(body, xs))
        shown = mu.jit(lambda xs, body=body, what=what: mu.for_loop(body, xs, progress=what))
        calls = {"plain": lambda plain=plain, xs=xs: plain(xs), "bar": lambda shown=shown, xs=xs: shown(xs)}
        times = timing.interleave(calls, calls=1, rounds=max(5, options.rounds // 2))
        note = f"{statistics.median(times['plain']):.2f} s"
        rows.append(
            timing.Row(f"a loop with a bar, {what}", "without", timing.ratio(times, "bar", "plain"), 1.03, note=note)
        )
    return rows


def checks(options: argparse.Namespace) -> list[timing.Row]:
    """What a check, a watch and a history cost a call."""
    net = nn.Linear(64, 64, rngs=mu.Rngs(0))
    x = jnp.ones((8, 64))

    def plain(net: nn.Linear, x: jax.Array) -> None:
        net.kernel.value = net.kernel.value * 0.99 + x.sum() * 1e-9

    def checked(net: nn.Linear, x: jax.Array) -> None:
        plain(net, x)
        mu.error_if(~jnp.isfinite(net.kernel.value), "not finite")

    step, checked_step = mu.jit(plain), mu.jit(checked)

    def batch(step: Any, around: Callable[[], Any] | None = None) -> Callable[[], Any]:
        def call() -> Any:
            if around is None:
                for _ in range(200):
                    step(net, x)
            else:
                with around():
                    for _ in range(200):
                        step(net, x)
            return net.kernel._value

        return call

    contenders = {
        "a plain step": batch(step),
        "`mu.error_if` in the step": batch(checked_step),
        "`mu.inspect.watch` on its state": batch(step, lambda: mu.inspect.watch(net)),
        "`mu.inspect.history` of its state": batch(step, lambda: mu.inspect.history(net)),
    }
    times = timing.interleave(contenders, calls=1, rounds=options.rounds)
    return [
        timing.Row(f"one call: {name}", "", statistics.median(times[name]) / 200 * 1e6, unit="us")
        for name in contenders
    ]


PARTS = {"steps": per_step, "brainstate": beside_brainstate, "memory": memory, "bars": bars, "checks": checks}


def measure(options: argparse.Namespace) -> list[timing.Row]:
    """All rows."""
    return [row for part in options.only for row in PARTS[part](options)]


if __name__ == "__main__":
    only = {"type": lambda text: text.split(","), "default": [*PARTS], "help": ", ".join(PARTS)}
    timing.main(__doc__, measure, ("--only", only), rounds=12)
