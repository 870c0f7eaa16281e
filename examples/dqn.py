"""A Q-learner finds its way through a maze: environment, replay buffer, target net and exploration are states of one model.

    make example NAME=dqn

All of training runs in compiled calls of `mu.for_loop`, and no function passes state to the next one. Value iteration gives the
best possible return from each place. The program prints the reward while exploring and the return of the greedy policy, beside
the best return.

Source: Mnih et al., Human-level control through deep reinforcement learning, 2015, https://doi.org/10.1038/nature14236, with the
targets of van Hasselt, Guez and Silver, Deep Reinforcement Learning with Double Q-learning, 2016,
https://arxiv.org/abs/1509.06461
"""

from __future__ import annotations

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mutatis as mu
from mutatis import nn

MAZE = (
    "......",
    ".##.#.",
    ".#..#.",
    ".#.##.",
    "...#.G",
)
WALLS = np.array([[cell == "#" for cell in row] for row in MAZE])
FREE = [(r, c) for r, row in enumerate(MAZE) for c, cell in enumerate(row) if cell == "."]
GOAL = next((r, c) for r, row in enumerate(MAZE) for c, cell in enumerate(row) if cell == "G")
MOVES = np.array([(-1, 0), (1, 0), (0, -1), (0, 1)])
STEP_COST, DISCOUNT, LONGEST = -0.04, 0.95, 40


def walk(place: jax.Array, action: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One step in the maze: where one is then, the reward, and whether the goal is reached. Walls and the border stop."""
    rows, columns = WALLS.shape
    there = place + jnp.asarray(MOVES)[action]
    inside = (there >= 0).all() & (there < jnp.array([rows, columns])).all()
    there = jnp.where(inside, there, place)
    there = jnp.where(jnp.asarray(WALLS)[there[0], there[1]], place, there)
    done = (there == jnp.array(GOAL)).all()
    return there, jnp.where(done, 1.0, STEP_COST), done


class World(mu.Module):
    """The place that one is at, and for how long; a new start after the goal, or after too many steps."""

    def __init__(self, rngs: mu.Rngs) -> None:
        self.place = mu.Hidden(jnp.array(FREE[0], jnp.int32))
        self.steps = mu.Hidden(jnp.int32(0))
        self.rngs = rngs

    def __call__(self, action: jax.Array) -> dict[str, jax.Array]:
        """Act; gives the transition."""
        before = self.place.value
        after, reward, done = walk(before, action)
        over = done | (self.steps.value + 1 >= LONGEST)
        start = jnp.asarray(FREE)[jax.random.randint(self.rngs(), (), 0, len(FREE))]
        self.place.value = jnp.where(over, start, after).astype(jnp.int32)
        self.steps.value = jnp.where(over, 0, self.steps.value + 1)
        return {"before": before, "action": action, "reward": reward, "after": after, "done": done}


class Replay(mu.Module):
    """The last transitions, in rings of arrays."""

    def __init__(self, room: int, rngs: mu.Rngs) -> None:
        self.room = room
        self.rings = {
            "before": mu.Buffer(jnp.zeros((room, 2), jnp.int32)),
            "action": mu.Buffer(jnp.zeros(room, jnp.int32)),
            "reward": mu.Buffer(jnp.zeros(room)),
            "after": mu.Buffer(jnp.zeros((room, 2), jnp.int32)),
            "done": mu.Buffer(jnp.zeros(room, bool)),
        }
        self.count = mu.Variable(jnp.int32(0))
        self.rngs = rngs

    def add(self, transition: dict[str, jax.Array]) -> None:
        """Keep a transition in the place of the oldest."""
        for name, value in transition.items():
            self.rings[name][self.count.value % self.room] = value
        self.count += 1

    def sample(self, size: int) -> dict[str, jax.Array]:
        """A batch of those that are kept."""
        chosen = jax.random.randint(self.rngs(), (size,), 0, jnp.minimum(self.count.value, self.room))
        return {name: ring.value[chosen] for name, ring in self.rings.items()}


class Values(mu.Module):
    """The value of each move, of places."""

    def __init__(self, hidden: int, rngs: mu.Rngs) -> None:
        self.into = nn.Linear(WALLS.size, hidden, rngs=rngs)
        self.out = nn.Linear(hidden, len(MOVES), rngs=rngs)

    def __call__(self, places: jax.Array) -> jax.Array:
        seen = jax.nn.one_hot(places[..., 0] * WALLS.shape[1] + places[..., 1], WALLS.size)
        return self.out(nn.relu(self.into(seen)))


class Agent(mu.Module):
    """Everything that learning goes through."""

    def __init__(self, hidden: int, rngs: mu.Rngs, room: int = 5000) -> None:
        self.values = Values(hidden, rngs)
        self.target = mu.clone(self.values)
        self.world, self.replay = World(rngs), Replay(room, rngs)
        self.rngs = rngs
        self.optimizer = mu.Optimizer(self.values, optax.adam(1e-3))
        self.step = mu.Variable(jnp.int32(0))

    def act(self, explore: jax.Array) -> jax.Array:
        """The best move that is known, or at times a random one."""
        key, other = jax.random.split(self.rngs())
        best = jnp.argmax(self.values(self.world.place.value))
        return jnp.where(jax.random.uniform(key) < explore, jax.random.randint(other, (), 0, len(MOVES)), best)

    def loss(self, batch: dict[str, jax.Array]) -> jax.Array:
        """How far values are from what one step and the target net say."""
        chosen = jnp.take_along_axis(self.values(batch["before"]), batch["action"][:, None], 1)[:, 0]
        best = jnp.argmax(self.values(batch["after"]), -1)
        later = jnp.take_along_axis(self.target(batch["after"]), best[:, None], 1)[:, 0]
        goal = batch["reward"] + DISCOUNT * jnp.where(batch["done"], 0.0, later)
        return jnp.mean((chosen - jax.lax.stop_gradient(goal)) ** 2)


def learn(agent: Agent, explore: jax.Array, batch: int = 32, every: int = 200) -> jax.Array:
    """One step: act, keep, improve, and now and then move the target; gives the reward."""
    transition = agent.world(agent.act(explore))
    agent.replay.add(transition)
    drawn = agent.replay.sample(batch)
    agent.optimizer.update(mu.grad(lambda values: agent.loss(drawn))(agent.values))
    agent.step += 1
    newer, older = mu.state(agent.values), mu.state(agent.target)
    moves = agent.step.value % every == 0
    mu.update(agent.target, jax.tree.map(lambda new, old: jnp.where(moves, new, old), newer, older))
    return transition["reward"]


@mu.jit
def train(agent: Agent, explore: jax.Array) -> jax.Array:
    """A step for each chance of a random move; gives the rewards."""
    return mu.for_loop(lambda chance: learn(agent, chance), explore)


def best_values() -> np.ndarray:
    """The value of each place by value iteration, of shape (rows, columns)."""
    values = jnp.zeros(WALLS.shape)
    places = jnp.asarray(FREE, jnp.int32)

    def sweep(values: jax.Array, _: None) -> tuple[jax.Array, None]:
        def of(place: jax.Array) -> jax.Array:
            there, reward, done = jax.vmap(lambda action: walk(place, action))(jnp.arange(len(MOVES)))
            return jnp.max(reward + DISCOUNT * jnp.where(done, 0.0, values[there[:, 0], there[:, 1]]))

        return values.at[places[:, 0], places[:, 1]].set(jax.vmap(of)(places)), None

    return np.asarray(jax.lax.scan(sweep, values, None, 100)[0])


def earned(agent: Agent) -> np.ndarray:
    """What the greedy learner earns from each free place, discounted, of shape (free places,)."""

    def from_place(start: jax.Array) -> jax.Array:
        def step(
            carry: tuple[jax.Array, jax.Array, jax.Array], _: jax.Array
        ) -> tuple[tuple[jax.Array, ...], jax.Array]:
            place, weight, over = carry
            there, reward, done = walk(place, jnp.argmax(agent.values(place)))
            return (there, weight * DISCOUNT, over | done), jnp.where(over, 0.0, weight * reward)

        start_of = (start, jnp.float32(1.0), jnp.bool_(False))
        return mu.scan(step, start_of, jnp.arange(LONGEST))[1].sum()

    return np.asarray(mu.vmap(from_place)(jnp.asarray(FREE, jnp.int32)))


def main() -> None:
    """Learn, and compare with the best way."""
    parser = argparse.ArgumentParser(description="A Q-learner in a maze.")
    parser.add_argument("--steps", type=int, default=20_000, help="steps in the maze")
    parser.add_argument("--hidden", type=int, default=64, help="units of the net")
    args = parser.parse_args()
    agent = Agent(args.hidden, mu.Rngs(0))
    best = best_values()[tuple(np.array(FREE).T)].mean()
    began, parts = time.perf_counter(), 10
    explore = np.maximum(0.05, np.linspace(1.0, -0.5, args.steps, dtype=np.float32))
    for number, part in enumerate(np.split(explore[: args.steps // parts * parts], parts)):
        rewards = train(agent, jnp.asarray(part))
        print(
            f"step {(number + 1) * len(part)}: {float(rewards.mean()):+.3f} a step while exploring; "
            f"greedy {earned(agent).mean():.3f} on average, the best is {best:.3f}"
        )
    print(f"{time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
