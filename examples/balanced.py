"""A balanced network of 4000 spiking neurons, where excitation and inhibition cancel and each neuron fires irregularly.

    make example NAME=balanced

The network is that of Vogels and Abbott with current-based synapses, a benchmark for simulators: 3200 excitatory and 800
inhibitory neurons, 2 % of all pairs connected, and no external input, because the resting potential is a little above threshold.
One `mu.for_loop` over 10,000 steps simulates a second and counts rates and intervals in states, so only the raster needs memory
for each step. The program prints the time of a step, the mean rate and the coefficient of variation of the intervals, and saves
a raster of a hundred neurons.

By default the weights are three times those of the benchmark, so that the intervals vary as much as those of a Poisson process.
`--strength 1` runs the benchmark itself, whose neurons fire as often but more regularly.

Source: Brette et al., Simulation of networks of spiking neurons, 2007, https://doi.org/10.1007/s10827-007-0038-6 (benchmark 2)
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import mutatis as mu
from mutatis import nn
from mutatis.inspect import plot

STEP = 0.1  # milliseconds
REST, THRESHOLD, RESET = -49.0, -50.0, -60.0  # millivolts


class Net(mu.Module):
    """Four fifths of the neurons excite, one fifth inhibits; spikes arrive some steps after they were sent.

    Args:
      size: how many neurons.
      rngs: random streams, for the connections and for where membranes start.
      strength: what the weights of the benchmark are multiplied by.
      prob: the chance that a pair is connected.
      delay: how many steps a spike is on its way, at least 1.
    """

    def __init__(self, size: int, rngs: mu.Rngs, strength: float = 3.0, prob: float = 0.02, delay: int = 8) -> None:
        self.exciting = size * 4 // 5
        events = max(1, size // 100)  # of which a step has a few: only their connections are looked at
        scale = strength * 80 / (size * prob)  # a net of another size gets the same input on average
        self.excite = nn.FixedProb(self.exciting, size, prob, 1.62 * scale, events=events, rngs=rngs)
        self.inhibit = nn.FixedProb(size - self.exciting, size, prob, -9.0 * scale, events=events, rngs=rngs)
        self.fast, self.slow = nn.Expon(size, tau=5.0), nn.Expon(size, tau=10.0)
        self.neurons = nn.LIF(size, 20.0, THRESHOLD, RESET, v_rest=REST, tau_ref=5.0, reset="hard")
        self.delay = nn.Delay(size, max_steps=delay - 1)
        # Not all at once.
        self.neurons.v.value = jax.random.uniform(rngs.params(), (size,), minval=RESET, maxval=THRESHOLD)

    def __call__(self) -> jax.Array:
        """One step in time; gives the spikes."""
        arriving = self.delay.at(self.delay.max_steps)
        excitation = self.fast(self.excite(arriving[: self.exciting]))
        inhibition = self.slow(self.inhibit(arriving[self.exciting :]))
        spikes = self.neurons(excitation + inhibition)
        self.delay.push(spikes)
        return spikes


class Intervals(mu.Module):
    """How often each neuron spikes, and mean and variance of the intervals between its spikes, without keeping them.

    Args:
      size: how many neurons.
      after: from which step on it counts, when the net has forgotten its start.
    """

    def __init__(self, size: int, after: int = 0) -> None:
        self.after = after
        self.step = mu.MetricState(0)
        self.count = mu.MetricState(jnp.zeros(size, jnp.int32))
        self.last = mu.MetricState(jnp.zeros(size, jnp.int32))  # the step of the last spike
        self.mean = mu.MetricState(jnp.zeros(size))
        self.squares = mu.MetricState(jnp.zeros(size))  # of distances from the mean, summed as Welford does

    def __call__(self, spikes: jax.Array) -> None:
        """Count one step."""
        now, seen = self.step.value, self.count.value
        spiked = (spikes > 0) & (now >= self.after)
        ends = spiked & (seen > 0)  # an interval, the one with number `seen`
        interval = (now - self.last.value).astype(jnp.float32) * STEP
        off = interval - self.mean.value
        mean = self.mean.value + off / jnp.maximum(seen, 1).astype(jnp.float32)
        self.squares.value = jnp.where(ends, self.squares.value + off * (interval - mean), self.squares.value)
        self.mean.value = jnp.where(ends, mean, self.mean.value)
        self.last.value = jnp.where(spiked, now, self.last.value)
        self.count.value = seen + spiked.astype(jnp.int32)
        self.step.value = now + 1

    def rates(self) -> np.ndarray:
        """Spikes a second, of each neuron."""
        steps = max(int(self.step) - self.after, 1)
        return np.asarray(self.count.value) / (steps * STEP / 1000)

    def variation(self, fewest: int = 5) -> np.ndarray:
        """Standard deviation by mean of the intervals, for neurons with so many of them; 1 is that of a Poisson process."""
        intervals = np.asarray(self.count.value) - 1
        enough = intervals >= fewest
        variance = np.asarray(self.squares.value)[enough] / (intervals[enough] - 1)
        return np.asarray(np.sqrt(variance) / np.asarray(self.mean.value)[enough])


@mu.jit(static_argnames="steps")
def simulate(net: Net, intervals: Intervals, monitor: mu.recording.Monitor | None, steps: int) -> None:
    """So many steps in one loop; all that is left of them is in states."""

    def step() -> None:
        intervals(net())
        if monitor is not None:
            monitor()

    with nn.dt.set(STEP):
        mu.for_loop(step, length=steps)


def draw(monitor: mu.recording.Monitor, path: Path) -> None:
    """Spikes over time."""
    import matplotlib.pyplot as plt

    kept = np.asarray(monitor.state["neurons", "spikes"])
    figure, (spikes, rate) = plt.subplots(2, figsize=(9, 6), sharex=True, height_ratios=[3, 1])
    plot.raster(kept, np.arange(len(kept)) * STEP, ax=spikes, s=2).set_xlabel("")
    width = max(1, round(5 / STEP))
    means = kept[: len(kept) // width * width].reshape(-1, width, kept.shape[1]).mean((1, 2)) / STEP * 1000
    plot.traces(means, np.arange(len(means)) * width * STEP, ax=rate)
    rate.set(ylabel="spikes a second", xlabel="time (ms)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Simulate, count, draw."""
    parser = argparse.ArgumentParser(description="A balanced net of spiking neurons.")
    parser.add_argument("--size", type=int, default=4000, help="neurons, four fifths of them excitatory")
    parser.add_argument("--steps", type=int, default=10_000, help="steps of a tenth of a millisecond")
    parser.add_argument("--strength", type=float, default=3.0, help="of the weights; 1 is the benchmark")
    parser.add_argument("--shown", type=int, default=100, help="neurons in the raster")
    parser.add_argument("--seed", type=int, default=0, help="of connections and start")
    parser.add_argument("--out", type=Path, default=Path("runs/balanced"), help="where the picture goes")
    args = parser.parse_args()
    net = Net(args.size, mu.Rngs(args.seed), args.strength)
    intervals = Intervals(args.size, after=min(1000, args.steps // 10))
    shown = range(0, args.size, max(1, args.size // args.shown))
    monitor = mu.recording.Monitor(net, "neurons.spikes", length=args.steps, index=shown)
    connections = sum(len(connection.target.value) for connection in (net.excite, net.inhibit))
    begin = time.perf_counter()
    program = simulate.lower(net, intervals, monitor, args.steps).compile()
    compiled = time.perf_counter()
    program(net, intervals, monitor, args.steps)
    jax.block_until_ready(intervals.count.value)
    took = time.perf_counter() - compiled
    print(f"{args.size} neurons, {connections} connections, {args.steps} steps of {STEP} ms")
    print(f"compiled in {compiled - begin:.1f} s, ran in {took:.1f} s, {took / args.steps * 1e6:.0f} µs a step")
    variation = intervals.variation()
    print(f"mean rate {intervals.rates().mean():.1f} spikes a second")
    if len(variation):
        print(f"coefficient of variation of intervals {variation.mean():.2f}, the mean of {len(variation)} neurons")
    draw(monitor, args.out / "raster.png")
    print(f"a raster is in {args.out}/raster.png")


if __name__ == "__main__":
    main()
