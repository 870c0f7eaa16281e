"""A recurrent spiking net learns a pattern online, by eligibility traces that run forward in time, without backpropagation.

    make example NAME=eprop

In e-prop the gradient is a sum over time of products of a learning signal for each neuron and an eligibility trace for each
synapse. The traces are states beside those of the neurons, and the weights change at every step. The net hears the same random
spikes in each trial, and learns to draw three sums of sines, a second long. The program prints the loss, and compares the
gradient with that of backpropagation through time, before and after training.

E-prop leaves out the effect of a spike by way of other neurons. So its gradient is that of backpropagation through time with the
spikes that are fed back held constant, and the full gradient in a net without feedback. The program prints the cosine to both.

Source: Bellec et al., A solution to the learning dilemma for recurrent networks of spiking neurons, 2020,
https://doi.org/10.1038/s41467-020-17236-y
"""

from __future__ import annotations

import argparse
import functools
import math
import time

import jax
import jax.numpy as jnp
import optax

import mutatis as mu
from mutatis import nn

TAU, TAU_A, TAU_OUT = 20.0, 200.0, 20.0  # of membranes, thresholds and the readout, in milliseconds; a step is one
BETA = 0.1  # how much a spike raises a threshold, which is 1 at rest

surrogate = functools.partial(mu.surrogate.relu, alpha=0.3)


class Net(mu.Module):
    """Neurons that tire and feed back to each other, and a readout that only integrates."""

    def __init__(self, inputs: int, size: int, outputs: int, rngs: mu.Rngs) -> None:
        self.into = nn.Linear(inputs, size, use_bias=False, rngs=rngs)
        self.back = nn.Linear(size, size, use_bias=False, rngs=rngs)
        self.out = nn.Linear(size, outputs, use_bias=False, rngs=rngs)
        self.hidden = nn.ALIF(size, TAU, tau_a=TAU_A, beta=BETA, resistance=TAU, surrogate=surrogate)
        self.readout = nn.LI(outputs, TAU_OUT, resistance=TAU_OUT)

    def __call__(self, spikes: jax.Array, hold: bool = False) -> jax.Array:
        """One step in time; gives what the readout holds. `hold`: what is fed back is a constant for gradients."""
        before = self.hidden.spikes.value
        current = self.into(spikes) + self.back(jax.lax.stop_gradient(before) if hold else before)
        return self.readout(self.out(self.hidden(current)))


def decay(tau: float) -> float:
    """What is left after a step."""
    return math.exp(-1 / tau)


class Trace(mu.Module):
    """How each synapse has moved its neuron so far: a trace follows the equations of what it is the derivative of.

    Attributes:
      v, a, spikes: Hidden of shape (pre, post), the derivatives of membranes, thresholds and spikes by the weights.
      out: Hidden, that of what a readout makes of the spikes.
    """

    def __init__(self, pre: int, post: int) -> None:
        def empty() -> jax.Array:
            return jnp.zeros((pre, post))

        self.v, self.a = mu.Hidden(init=empty), mu.Hidden(init=empty)
        self.spikes, self.out = mu.Hidden(init=empty), mu.Hidden(init=empty)

    def __call__(self, arriving: jax.Array, slope: jax.Array) -> jax.Array:
        """One step in time, beside that of the neurons.

        Args:
          arriving: what came to the synapses in this step, of shape (pre,).
          slope: the surrogate derivative of each neuron, of shape (post,).

        Returns:
          `out`.
        """
        before = self.spikes.value
        self.a.value = decay(TAU_A) * (self.a.value + before)
        self.v.value = decay(TAU) * (self.v.value - before) + TAU * (1 - decay(TAU)) * arriving[:, None]
        self.spikes.value = slope[None] * (self.v.value - BETA * self.a.value)
        self.out.value = decay(TAU_OUT) * self.out.value + TAU_OUT * (1 - decay(TAU_OUT)) * self.spikes.value
        return self.out.value


class Eprop(mu.Module):
    """A net, and the traces of its synapses.

    Attributes:
      net: the net.
      into, back: the traces of its synapses.
      out: those of the readout, which are alike for all of its outputs.
    """

    def __init__(self, net: Net) -> None:
        inputs, size = net.into.kernel.shape
        self.net = net
        self.into, self.back = Trace(inputs, size), Trace(size, size)
        self.out = nn.LI(size, TAU_OUT, resistance=TAU_OUT)

    def __call__(self, spikes: jax.Array, target: jax.Array) -> tuple[jax.Array, mu.State]:
        """One step in time; gives its loss, and its share of the gradient."""
        net, hidden = self.net, self.net.hidden
        before = hidden.spikes.value
        error = net(spikes) - target
        above = hidden.v.value - 1 - BETA * hidden.a.value
        _, slope = jax.jvp(surrogate, (above,), (jnp.ones_like(above),))
        signal = net.out.kernel.value @ error
        return 0.5 * (error @ error), mu.State(
            {
                ("into", "kernel"): self.into(spikes, slope) * signal[None],
                ("back", "kernel"): self.back(before, slope) * signal[None],
                ("out", "kernel"): jnp.outer(self.out(hidden.spikes.value), error),
            }
        )


@mu.jit
def trial(learner: Eprop, optimizer: mu.Optimizer, spikes: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Run once from the start, and learn at every step; gives losses and spikes of all steps."""
    mu.reset(learner, mu.Hidden)

    def step(spikes: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
        loss, gradient = learner(spikes, target)
        optimizer.update(gradient)
        return loss, learner.net.hidden.spikes.value

    return mu.for_loop(step, spikes, target)


@mu.jit
def forward(learner: Eprop, spikes: jax.Array, target: jax.Array) -> mu.State:
    """The gradient by e-prop of the loss of a trial, the sum over its steps."""
    mu.reset(learner, mu.Hidden)

    def step(total: mu.State, given: tuple[jax.Array, jax.Array]) -> tuple[mu.State, None]:
        return jax.tree.map(jnp.add, total, learner(*given)[1]), None

    zeros = {path: jnp.zeros_like(value) for path, value in mu.state(learner.net, mu.Param).flat().items()}
    return mu.scan(step, mu.State(zeros), (spikes, target))[0]


@mu.jit(static_argnames="hold")
def backward(net: Net, spikes: jax.Array, target: jax.Array, hold: bool = False) -> mu.State:
    """The gradient of the same loss by backpropagation through time."""

    def loss(net: Net) -> jax.Array:
        mu.reset(net, mu.Hidden)
        return 0.5 * jnp.sum((mu.for_loop(lambda x: net(x, hold), spikes) - target) ** 2)

    return mu.grad(loss)(net)


def cosine(a: mu.State, b: mu.State, *names: str) -> float:
    """Between two gradients by the weights of these names."""
    x, y = (jnp.concatenate([gradient[name, "kernel"].ravel() for name in names]) for gradient in (a, b))
    return float(x @ y / jnp.sqrt((x @ x) * (y @ y)))


def task(steps: int, inputs: int, outputs: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Spikes of the inputs, 50 a second, and what is to be drawn: sums of sines of 1, 2, 3 and 5 Hz."""
    chance, height, shift = jax.random.split(key, 3)
    spikes = jax.random.bernoulli(chance, 0.05, (steps, inputs)).astype(jnp.float32)
    heights = jax.random.uniform(height, (4, outputs), minval=0.5, maxval=2.0)
    shifts = jax.random.uniform(shift, (4, outputs), maxval=2 * jnp.pi)
    turns = 2 * jnp.pi / 1000 * jnp.outer(jnp.arange(float(steps)), jnp.array([1.0, 2.0, 3.0, 5.0]))
    waves = (heights[None] * jnp.sin(turns[:, :, None] + shifts[None])).sum(1)
    return spikes, waves / jnp.abs(waves).max(0, keepdims=True)


def main() -> None:
    """Learn, and compare the gradients before and after."""
    parser = argparse.ArgumentParser(description="A spiking net learns a pattern online.")
    parser.add_argument("--trials", type=int, default=100, help="how often the pattern is drawn")
    parser.add_argument("--steps", type=int, default=1000, help="milliseconds of a trial")
    parser.add_argument("--size", type=int, default=100, help="spiking neurons")
    parser.add_argument("--rate", type=float, default=1e-4, help="of Adam, at each step")
    args = parser.parse_args()
    spikes, target = task(args.steps, 20, 3, jax.random.key(1))
    net = Net(20, args.size, 3, mu.Rngs(0))
    learner, optimizer = Eprop(net), mu.Optimizer(net, optax.adam(args.rate))

    def compare(when: str) -> None:
        ours, whole = forward(learner, spikes, target), backward(net, spikes, target)
        held = backward(net, spikes, target, hold=True)
        shown = ", ".join(f"{name} {cosine(ours, whole, name):.3f}" for name in ("into", "back", "out"))
        print(f"{when}: cosine to backpropagation {cosine(ours, whole, 'into', 'back'):.3f} ({shown});", end=" ")
        print(f"with feedback held constant {cosine(ours, held, 'into', 'back'):.6f}")

    compare("before")
    begin = time.perf_counter()
    for number in range(args.trials):
        losses, fired = trial(learner, optimizer, spikes, target)
        if number == 0 or (number + 1) % max(1, args.trials // 10) == 0:
            print(f"trial {number + 1}: loss {losses.mean():.4f}, {fired.mean() * 1000:.0f} spikes a second")
    print(f"{args.trials} trials in {time.perf_counter() - begin:.1f} s")
    compare("after")


if __name__ == "__main__":
    main()
