"""Proximal policy optimization balances a pole: a batch of environments is state, and the update is in the same program.

    make example NAME=ppo

In an iteration all environments run for some steps. Then the program estimates advantages backwards in time, and improves the
policy by several passes over the batch in random order. One compiled function does all of this, and the environments continue
where they were. The program prints the length of the episodes, and at the end how long the pole stands without exploration.

Source: Schulman et al., Proximal Policy Optimization Algorithms, 2017, https://arxiv.org/abs/1707.06347; the pole is that of
Barto, Sutton and Anderson, 1983, with the numbers of Gym's CartPole-v1, whose episodes end after 500 steps.
"""

from __future__ import annotations

import argparse
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import mutatis as mu
from mutatis import nn

LONGEST = 500
DISCOUNT, TRACE, CLIP, ENTROPY = 0.99, 0.95, 0.2, 0.01


class Poles(mu.Module):
    """Carts with poles: place, speed, angle and turn of each, and how long it has stood."""

    def __init__(self, count: int, rngs: mu.Rngs) -> None:
        self.rngs = rngs
        self.now = mu.Hidden(self.fresh(count))
        self.steps = mu.Hidden(jnp.zeros(count))
        self.lengths = mu.MetricState(jnp.zeros(count))  # of the episodes that ended last

    def fresh(self, count: int) -> jax.Array:
        """New starts, of shape (count, 4)."""
        return jax.random.uniform(self.rngs(), (count, 4), minval=-0.05, maxval=0.05)

    def __call__(self, action: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Push left or right; gives the situations then, which of them are failures, and which episodes are over."""
        after, fell = swing(self.now.value, action)
        steps = self.steps.value + 1
        over = fell | (steps >= LONGEST)
        self.lengths.value = jnp.where(over, steps, self.lengths.value)
        self.now.value = jnp.where(over[:, None], self.fresh(len(steps)), after)
        self.steps.value = jnp.where(over, 0.0, steps)
        return after, fell, over


def swing(now: jax.Array, action: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A fiftieth of a second of the equations of motion; gives the situation after it, and whether it is one of failure."""
    x, speed, angle, turn = now.T
    push = jnp.where(action == 1, 10.0, -10.0)
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    part = (push + 0.05 * turn**2 * sine) / 1.1
    spin = (9.8 * sine - cosine * part) / (0.5 * (4 / 3 - 0.1 * cosine**2 / 1.1))
    moved = part - 0.05 * spin * cosine / 1.1
    after = jnp.stack([x + 0.02 * speed, speed + 0.02 * moved, angle + 0.02 * turn, turn + 0.02 * spin], -1)
    return after, (jnp.abs(after[:, 0]) > 2.4) | (jnp.abs(after[:, 2]) > 0.2095)


class Policy(mu.Module):
    """Logits of the two pushes, and the value of a situation."""

    def __init__(self, hidden: int, rngs: mu.Rngs) -> None:
        wide, small = nn.initializers.orthogonal(2**0.5), nn.initializers.orthogonal(0.01)
        self.act = nn.Sequential(
            nn.Linear(4, hidden, kernel_init=wide, rngs=rngs),
            nn.tanh,
            nn.Linear(hidden, 2, kernel_init=small, rngs=rngs),
        )
        self.judge = nn.Sequential(
            nn.Linear(4, hidden, kernel_init=wide, rngs=rngs), nn.tanh, nn.Linear(hidden, 1, rngs=rngs)
        )

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.act(x), self.judge(x)[..., 0]


class Seen(NamedTuple):
    """A step of the environments, or many."""

    x: jax.Array
    action: jax.Array
    log_prob: jax.Array
    value: jax.Array
    later: jax.Array  # the value of the situation that the action led to
    fell: jax.Array
    over: jax.Array


class Agent(mu.Module):
    """Environments, policy, optimizer, and random streams."""

    def __init__(self, count: int, hidden: int, updates: int, rngs: mu.Rngs) -> None:
        self.rngs = rngs
        self.poles, self.policy = Poles(count, rngs), Policy(hidden, rngs)
        rate = optax.linear_schedule(5e-3, 0.0, updates)
        self.optimizer = mu.Optimizer(self.policy, optax.chain(optax.clip_by_global_norm(0.5), optax.adam(rate)))

    def step(self) -> Seen:
        """Act in all environments."""
        x = self.poles.now.value
        logits, value = self.policy(x)
        action = jax.random.categorical(self.rngs(), logits)
        log_prob = of_action(jax.nn.log_softmax(logits), action)
        after, fell, over = self.poles(action)
        return Seen(x, action, log_prob, value, self.policy(after)[1], fell, over)

    def loss(self, seen: Seen, advantage: jax.Array, goal: jax.Array) -> jax.Array:
        """The clipped objective, the error of the values, and a prize for being undecided."""
        logits, value = self.policy(seen.x)
        log_probs = jax.nn.log_softmax(logits)
        ratio = jnp.exp(of_action(log_probs, seen.action) - seen.log_prob)
        gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * advantage)
        undecided = -jnp.sum(jnp.exp(log_probs) * log_probs, -1)
        return -gain.mean() + 0.5 * ((value - goal) ** 2).mean() - ENTROPY * undecided.mean()


def of_action(values: jax.Array, action: jax.Array) -> jax.Array:
    """The entry of the action that was taken, along the last axis."""
    return jnp.take_along_axis(values, action[..., None], -1)[..., 0]


def advantages(seen: Seen) -> jax.Array:
    """Generalized advantage estimates, backwards through time.

    Args:
      seen: steps, of shape (time, environments).
    """
    # Nothing comes after a failure; an episode that ends by its length would have gone on.
    surprise = 1.0 + DISCOUNT * jnp.where(seen.fell, 0.0, seen.later) - seen.value

    def back(carry: jax.Array, step: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        now, over = step
        carry = now + DISCOUNT * TRACE * jnp.where(over, 0.0, carry)
        return carry, carry

    return jax.lax.scan(back, jnp.zeros_like(surprise[0]), (surprise, seen.over), reverse=True)[1]


def iterate(agent: Agent, steps: int, passes: int, parts: int) -> jax.Array:
    """Run, estimate, improve; gives the mean length of the episodes that ended last."""
    seen = mu.for_loop(lambda _: agent.step(), jnp.arange(steps))
    advantage = advantages(seen)
    batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (seen, advantage, advantage + seen.value))

    def improve(part: tuple[Seen, jax.Array, jax.Array]) -> None:
        known, gain, goal = part
        gain = (gain - gain.mean()) / (gain.std() + 1e-8)
        agent.optimizer.update(mu.grad(lambda policy: agent.loss(known, gain, goal))(agent.policy))

    def one_pass(_: jax.Array) -> None:
        order = jax.random.permutation(agent.rngs(), len(batch[1]))
        mu.for_loop(improve, jax.tree.map(lambda x: x[order].reshape(parts, -1, *x.shape[1:]), batch))

    mu.for_loop(one_pass, jnp.arange(passes))
    return agent.poles.lengths.value.mean()


def make(envs: int, hidden: int, iterations: int, passes: int = 4, parts: int = 4) -> Agent:
    """A new agent, whose rate falls to nothing in so many iterations."""
    return Agent(envs, hidden, iterations * passes * parts, mu.Rngs(0))


@mu.jit(static_argnames=("iterations", "steps", "passes", "parts"))
def train(agent: Agent, iterations: int, steps: int = 64, passes: int = 4, parts: int = 4) -> jax.Array:
    """Many iterations; gives the mean length of episodes after each."""
    return mu.for_loop(lambda _: iterate(agent, steps, passes, parts), jnp.arange(iterations))


@mu.jit
def stands(agent: Agent) -> jax.Array:
    """How long the policy keeps new poles up when it decides for the likelier push, of shape (environments,)."""
    now = agent.poles.fresh(len(agent.poles.steps.value))

    def step(carry: tuple[jax.Array, jax.Array], _: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        now, up = carry
        now, fell = swing(now, jnp.argmax(agent.policy(now)[0], -1))
        return (now, up & ~fell), up & ~fell

    return mu.scan(step, (now, jnp.ones(len(now), bool)), jnp.arange(LONGEST))[1].sum(0)


def main() -> None:
    """Train, and let it balance."""
    parser = argparse.ArgumentParser(description="Proximal policy optimization on a pole.")
    parser.add_argument("--iterations", type=int, default=120, help="how often to run and to improve")
    parser.add_argument("--envs", type=int, default=32, help="environments")
    parser.add_argument("--hidden", type=int, default=64, help="units of each net")
    args = parser.parse_args()
    agent = make(args.envs, args.hidden, args.iterations)
    began, rounds = time.perf_counter(), min(10, args.iterations)
    for number in range(rounds):
        lengths = train(agent, args.iterations // rounds)
        print(f"iteration {(number + 1) * (args.iterations // rounds)}: episodes of {float(lengths[-1]):.0f} steps")
    print(
        f"{time.perf_counter() - began:.1f} s; decided, the pole stands for {float(stands(agent).mean()):.0f} of {LONGEST} steps"
    )


if __name__ == "__main__":
    main()
