"""Population-based training: members train in parallel under `mu.vmap`, and the worst copy the best.

    make example NAME=population

Each member is a net with an optimizer, whose learning rate and weight decay are states too. Between generations the worst quarter
copies the net, the moments and the rates of the best quarter, and changes the rates. One program trains all members, and another
one selects. The program prints the best and the median loss of each generation, and those of a search without copying.

Source: Jaderberg et al., Population Based Training of Neural Networks, 2017, https://arxiv.org/abs/1711.09846
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mutatis as mu
from mutatis import nn


class Member(mu.Module):
    """A net, its optimizer, and its rates."""

    def __init__(self, key: jax.Array, rate: jax.Array, decay: jax.Array, hidden: int = 32) -> None:
        self.rngs = mu.Rngs(key)
        self.net = nn.Sequential(
            nn.Linear(2, hidden, rngs=self.rngs),
            nn.tanh,
            nn.Linear(hidden, hidden, rngs=self.rngs),
            nn.tanh,
            nn.Linear(hidden, 1, rngs=self.rngs),
        )
        self.optimizer = mu.Optimizer(self.net, optax.scale_by_adam())
        self.log_rate, self.log_decay = mu.Variable(jnp.log(rate)), mu.Variable(jnp.log(decay))

    def loss(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """The mean squared error."""
        return jnp.mean((self.net(x)[:, 0] - y) ** 2)

    def learn(self, x: jax.Array, y: jax.Array, steps: int, batch: int = 32) -> jax.Array:
        """Some steps of Adam with decay; gives the losses."""

        def step(_: jax.Array) -> jax.Array:
            chosen = jax.random.randint(self.rngs(), (batch,), 0, len(x))
            value, grads = mu.value_and_grad(lambda net: self.loss(x[chosen], y[chosen]))(self.net)
            before = mu.state(self.net, mu.Param)
            self.optimizer.update(grads)  # by a rate of 1: it is put right below
            after = mu.state(self.net, mu.Param)
            rate, decay = jnp.exp(self.log_rate.value), jnp.exp(self.log_decay.value)
            mu.update(self.net, jax.tree.map(lambda p, q: p - rate * ((q - p) + decay * p), before, after))
            return value

        return mu.for_loop(step, jnp.arange(steps))


def data(count: int, seed: int) -> tuple[jax.Array, jax.Array]:
    """Places and the height of a hilly land there, with noise; shapes (count, 2) and (count,)."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (count, 2)).astype(np.float32)
    y = np.sin(5 * x[:, 0]) * np.cos(4 * x[:, 1]) + 0.1 * rng.standard_normal(count)
    return jnp.asarray(x), jnp.asarray(y, jnp.float32)


@mu.jit(static_argnames="steps")
def generation(members: Member, x: jax.Array, y: jax.Array, held: tuple[jax.Array, jax.Array], steps: int) -> jax.Array:
    """All members learn for some steps; gives the loss of each on data that are held out."""

    def one(member: Member) -> jax.Array:
        member.learn(x, y, steps)
        return member.loss(*held)

    return mu.vmap(one)(members)


@mu.jit
def select(members: Member, losses: jax.Array, key: jax.Array) -> jax.Array:
    """The worst quarter becomes copies of the best quarter, with other rates; gives whom each member goes on from."""
    count, quarter = len(losses), len(losses) // 4
    order = jnp.argsort(jnp.where(jnp.isnan(losses), jnp.inf, losses))
    source = jnp.arange(count).at[order[count - quarter :]].set(order[:quarter])
    streams = mu.state(members, mu.RngState)
    mu.update(members, jax.tree.map(lambda x: x[source], mu.state(members)))
    mu.update(members, streams)  # the same net with the same draws would learn the same
    moved = source != jnp.arange(count)
    for name, state in (("rate", members.log_rate), ("decay", members.log_decay)):
        change = jax.random.choice(jax.random.fold_in(key, len(name)), jnp.log(jnp.array([0.5, 2.0])), (count,))
        state.value = state.value + jnp.where(moved, change, 0.0)
    return source


def make(count: int, seed: int = 0) -> Member:
    """Members with rates from a wide range, stacked."""
    rng = np.random.default_rng(seed)
    rates = jnp.asarray(10 ** rng.uniform(-5, -1, count), jnp.float32)
    decays = jnp.asarray(10 ** rng.uniform(-5, -1, count), jnp.float32)
    members: Member = mu.jit(mu.vmap(Member))(jax.random.split(jax.random.key(seed), count), rates, decays)
    return members


def run(count: int, generations: int, steps: int, copies: bool) -> np.ndarray:
    """The losses of all members after each generation, of shape (generations, members)."""
    members, (x, y), held = make(count), data(400, 1), data(400, 2)
    found = []
    for number in range(generations):
        losses = generation(members, x, y, held, steps)
        found.append(np.asarray(losses))
        if copies and number + 1 < generations:
            select(members, losses, jax.random.key(number))
    return np.stack(found)


def main() -> None:
    """A population, and the same members each on its own."""
    parser = argparse.ArgumentParser(description="Population-based training.")
    parser.add_argument("--members", type=int, default=16, help="how many nets")
    parser.add_argument("--generations", type=int, default=20, help="how often to select")
    parser.add_argument("--steps", type=int, default=100, help="steps of each generation")
    args = parser.parse_args()
    alone = run(args.members, args.generations, args.steps, copies=False)
    together = run(args.members, args.generations, args.steps, copies=True)
    for number in range(0, args.generations, max(1, args.generations // 5)):
        print(f"generation {number + 1}: best {together[number].min():.4f}, median {np.median(together[number]):.4f}")
    print(f"at the end: best {together[-1].min():.4f}, median {np.median(together[-1]):.4f}")
    print(
        f"with fixed rates: best {alone[-1].min():.4f}, median {np.median(alone[-1]):.4f}; the noise alone gives 0.0100"
    )


if __name__ == "__main__":
    main()
