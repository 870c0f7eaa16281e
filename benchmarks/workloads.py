"""Whole programs as people run them, one jitted call a step from Python, each beside its twin threaded by hand.

A variational autoencoder that sows its KL term, a Q-learner with its replay buffer in states, a generator and a discriminator
with an optimizer each, spiking neurons called step by step, and decoding token by token with each token looked at. The twins
donate what they thread, draw the same numbers from the same keys, and come to the same results, which is checked. With
``--peers`` the same programs stand beside them in Flax NNX, Equinox or BrainState.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import decoding
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
import timing

import mutatis as mu
from mutatis import nn

Step = Callable[[], Any]
GOAL = 1.15


@dataclasses.dataclass(frozen=True)
class Workload:
    """A program, and the same by hand.

    Args:
      ours: makes one step, and gives its result.
      hand: the same.
      goal: what the ratio of their times should at most be.
      others: the same program in other libraries, with random numbers of their own, by the name of what is called.
    """

    ours: Step
    hand: Step
    goal: float = GOAL
    others: dict[str, Step] = dataclasses.field(default_factory=dict)


def dense(parameters: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """A layer by hand."""
    return x @ parameters["kernel"] + parameters["bias"]


def plain(net: mu.Module) -> dict[str, Any]:
    """Copies of a model's parameters as nested dictionaries."""
    return {
        name: {"kernel": jnp.array(layer.kernel.value), "bias": jnp.array(layer.bias.value)}
        for name, layer in vars(net).items()
        if isinstance(layer, nn.Linear)
    }


def stream(rngs: mu.Rngs) -> dict[str, jax.Array]:
    """A copy of a stream, to be drawn from by hand."""
    return jax.tree.map(jnp.array, dict(next(iter(mu.variables(rngs).values())).value))


def draw(stream: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """A key, and the stream after it."""
    key = jax.random.fold_in(stream["key"], stream["count"])
    return key, {"key": stream["key"], "count": stream["count"] + jnp.uint32(1)}


# -- a variational autoencoder ---------------------------------------------------------------------------------------


class Autoencoder(mu.Module):
    """64 numbers to 8 and back; its KL term is sown."""

    def __init__(self, rngs: mu.Rngs) -> None:
        self.inner = nn.Linear(64, 32, rngs=rngs)
        self.mean = nn.Linear(32, 8, rngs=rngs)
        self.spread = nn.Linear(32, 8, rngs=rngs)
        self.outer = nn.Linear(8, 32, rngs=rngs)
        self.out = nn.Linear(32, 64, rngs=rngs)
        self.noise = mu.Rngs(7)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The reconstruction."""
        hidden = jnp.tanh(self.inner(x))
        mean, spread = self.mean(hidden), self.spread(hidden)
        mu.sow(self, "kl", 0.5 * jnp.sum(mean**2 + jnp.exp(spread) - 1 - spread))
        code = mean + jnp.exp(0.5 * spread) * jax.random.normal(self.noise(), mean.shape)
        return self.out(jnp.tanh(self.outer(code)))


def vae(beside: bool = False) -> Workload:
    """Adam on the reconstruction and the KL term."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((32, 64), np.float32))
    net = Autoencoder(mu.Rngs(0))
    parameters, noise = plain(net), stream(net.noise)
    tx = optax.adam(1e-3)
    optimizer = mu.Optimizer(net, tx)

    def loss(net: Autoencoder) -> jax.Array:
        error = jnp.sum((net(x) - x) ** 2)
        ((kl,),) = mu.pop(net, mu.Intermediate).values()
        return error + kl

    @mu.jit
    def step(net: Autoencoder, optimizer: mu.Optimizer) -> jax.Array:
        value, grads = mu.value_and_grad(loss)(net)
        optimizer.update(grads)
        return value

    def loss_by_hand(parameters: Any, key: jax.Array) -> jax.Array:
        hidden = jnp.tanh(dense(parameters["inner"], x))
        mean, spread = dense(parameters["mean"], hidden), dense(parameters["spread"], hidden)
        kl = 0.5 * jnp.sum(mean**2 + jnp.exp(spread) - 1 - spread)
        code = mean + jnp.exp(0.5 * spread) * jax.random.normal(key, mean.shape)
        out = dense(parameters["out"], jnp.tanh(dense(parameters["outer"], code)))
        return jnp.sum((out - x) ** 2) + kl

    @functools.partial(jax.jit, donate_argnums=0)
    def by_hand(held: Any) -> Any:
        parameters, moments, noise = held
        key, noise = draw(noise)
        value, grads = jax.value_and_grad(loss_by_hand)(parameters, key)
        updates, moments = tx.update(grads, moments, parameters)
        return (optax.apply_updates(parameters, updates), moments, noise), value

    held = (parameters, tx.init(parameters), noise)

    def hand() -> Any:
        nonlocal held
        held, value = by_hand(held)
        return value

    return Workload(lambda: step(net, optimizer), hand, others=peers.vae(x) if beside else {})


# -- a Q-learner -----------------------------------------------------------------------------------------------------

CAPACITY, FEATURES, ACTIONS = 1024, 4, 2


class Values(mu.Module):
    """The value of each action."""

    def __init__(self, rngs: mu.Rngs) -> None:
        self.one = nn.Linear(FEATURES, 32, rngs=rngs)
        self.two = nn.Linear(32, 32, rngs=rngs)
        self.out = nn.Linear(32, ACTIONS, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(jax.nn.relu(self.two(jax.nn.relu(self.one(x)))))


def empty_replay() -> dict[str, jax.Array]:
    """Room for transitions."""
    return {
        "before": jnp.zeros((CAPACITY, FEATURES)),
        "action": jnp.zeros(CAPACITY, jnp.int32),
        "reward": jnp.zeros(CAPACITY),
        "after": jnp.zeros((CAPACITY, FEATURES)),
    }


class Agent(mu.Module):
    """Values, older values to aim at, and a replay buffer."""

    def __init__(self, rngs: mu.Rngs) -> None:
        self.values = Values(rngs)
        self.target = mu.clone(self.values)
        self.replay = {name: mu.Variable(array) for name, array in empty_replay().items()}
        self.steps = mu.Variable(jnp.int32(0))
        self.draws = mu.Rngs(7)


def dqn(beside: bool = False) -> Workload:
    """A transition is kept, a batch drawn, the values improved, and the target moved."""
    rng = np.random.default_rng(0)
    transition = {
        "before": jnp.asarray(rng.standard_normal(FEATURES, np.float32)),
        "action": jnp.int32(1),
        "reward": jnp.float32(0.5),
        "after": jnp.asarray(rng.standard_normal(FEATURES, np.float32)),
    }
    agent = Agent(mu.Rngs(0))
    values, noise = plain(agent.values), stream(agent.draws)
    tx = optax.adam(1e-3)
    optimizer = mu.Optimizer(agent.values, tx)

    def error(chosen: jax.Array, after: jax.Array, reward: jax.Array) -> jax.Array:
        return jnp.mean((chosen - (reward + 0.99 * jnp.max(after, 1))) ** 2)

    def loss(values: Values, target: Values, batch: dict[str, jax.Array]) -> jax.Array:
        chosen = jnp.take_along_axis(values(batch["before"]), batch["action"][:, None], 1)[:, 0]
        return error(chosen, jax.lax.stop_gradient(target(batch["after"])), batch["reward"])

    @mu.jit
    def step(agent: Agent, optimizer: mu.Optimizer, transition: dict[str, jax.Array]) -> jax.Array:
        at = agent.steps.value % CAPACITY
        for name, array in transition.items():
            agent.replay[name][at] = array
        agent.steps += 1
        drawn = jax.random.randint(agent.draws(), (32,), 0, jnp.minimum(agent.steps.value, CAPACITY))
        batch = {name: kept.value[drawn] for name, kept in agent.replay.items()}
        value, grads = mu.value_and_grad(loss)(agent.values, agent.target, batch)
        optimizer.update(grads)
        newer = mu.state(agent.values)
        mu.update(agent.target, jax.tree.map(lambda old, new: old + 0.01 * (new - old), mu.state(agent.target), newer))
        return value

    def forward(p: Any, x: jax.Array) -> jax.Array:
        return dense(p["out"], jax.nn.relu(dense(p["two"], jax.nn.relu(dense(p["one"], x)))))

    def loss_by_hand(values: Any, target: Any, batch: Any) -> jax.Array:
        chosen = jnp.take_along_axis(forward(values, batch["before"]), batch["action"][:, None], 1)[:, 0]
        return error(chosen, jax.lax.stop_gradient(forward(target, batch["after"])), batch["reward"])

    @functools.partial(jax.jit, donate_argnums=0)
    def by_hand(held: Any, transition: Any) -> Any:
        values, target, moments, replay, steps, noise = held
        at = steps % CAPACITY
        replay = {name: array.at[at].set(transition[name]) for name, array in replay.items()}
        steps = steps + 1
        key, noise = draw(noise)
        drawn = jax.random.randint(key, (32,), 0, jnp.minimum(steps, CAPACITY))
        batch = {name: array[drawn] for name, array in replay.items()}
        value, grads = jax.value_and_grad(loss_by_hand)(values, target, batch)
        updates, moments = tx.update(grads, moments, values)
        values = optax.apply_updates(values, updates)
        target = jax.tree.map(lambda old, new: old + 0.01 * (new - old), target, values)
        return (values, target, moments, replay, steps, noise), value

    held = (values, jax.tree.map(jnp.array, values), tx.init(values), empty_replay(), jnp.int32(0), noise)

    def hand() -> Any:
        nonlocal held
        held, value = by_hand(held, transition)
        return value

    return Workload(lambda: step(agent, optimizer, transition), hand, others=peers.dqn(transition) if beside else {})


# -- a generator and a discriminator -----------------------------------------------------------------------------------


class Perceptron(mu.Module):
    """Two layers."""

    def __init__(self, inputs: int, outputs: int, rngs: mu.Rngs) -> None:
        self.one = nn.Linear(inputs, 32, rngs=rngs)
        self.out = nn.Linear(32, outputs, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(jax.nn.relu(self.one(x)))


def gan(beside: bool = False) -> Workload:
    """Each improves on the other, with an optimizer of its own."""
    real = jnp.asarray(np.random.default_rng(0).standard_normal((32, 16), np.float32))
    makes, judges, draws = Perceptron(4, 16, mu.Rngs(0)), Perceptron(16, 1, mu.Rngs(1)), mu.Rngs(7)
    p_makes, p_judges, noise = plain(makes), plain(judges), stream(draws)
    tx = optax.adam(1e-3)
    optimizers = mu.Optimizer(makes, tx), mu.Optimizer(judges, tx)

    def judged(on_real: jax.Array, on_fake: jax.Array) -> jax.Array:
        return jnp.mean(jax.nn.softplus(-on_real) + jax.nn.softplus(on_fake))

    @mu.jit
    def step(makes: Perceptron, judges: Perceptron, optimizers: Any, draws: mu.Rngs) -> Any:
        codes = jax.random.normal(draws(), (32, 4))
        first, grads = mu.value_and_grad(lambda judges: judged(judges(real), judges(makes(codes))))(judges)
        optimizers[1].update(grads)
        second, grads = mu.value_and_grad(lambda makes: jnp.mean(jax.nn.softplus(-judges(makes(codes)))))(makes)
        optimizers[0].update(grads)
        return first + second

    def forward(p: Any, x: jax.Array) -> jax.Array:
        return dense(p["out"], jax.nn.relu(dense(p["one"], x)))

    @functools.partial(jax.jit, donate_argnums=0)
    def by_hand(held: Any) -> Any:
        makes, judges, of_makes, of_judges, noise = held
        key, noise = draw(noise)
        codes = jax.random.normal(key, (32, 4))

        def of_judge(p: Any) -> jax.Array:
            return judged(forward(p, real), forward(p, forward(makes, codes)))

        first, grads = jax.value_and_grad(of_judge)(judges)
        updates, of_judges = tx.update(grads, of_judges, judges)
        judges = optax.apply_updates(judges, updates)

        def of_maker(p: Any) -> jax.Array:
            return jnp.mean(jax.nn.softplus(-forward(judges, forward(p, codes))))

        second, grads = jax.value_and_grad(of_maker)(makes)
        updates, of_makes = tx.update(grads, of_makes, makes)
        makes = optax.apply_updates(makes, updates)
        return (makes, judges, of_makes, of_judges, noise), first + second

    held = (p_makes, p_judges, tx.init(p_makes), tx.init(p_judges), noise)

    def hand() -> Any:
        nonlocal held
        held, value = by_hand(held)
        return value

    return Workload(lambda: step(makes, judges, optimizers, draws), hand, others=peers.gan(real) if beside else {})


# -- spiking neurons ---------------------------------------------------------------------------------------------------


class Spiking(mu.Module):
    """A layer of leaky integrate-and-fire neurons that listen to each other."""

    def __init__(self, size: int, weights: jax.Array) -> None:
        self.weights = mu.Param(weights)
        self.membrane = mu.Hidden(jnp.zeros(size))
        self.rest = mu.Hidden(jnp.zeros(size, jnp.int32))
        self.spikes = mu.Hidden(jnp.zeros(size))

    def __call__(self, current: jax.Array) -> jax.Array:
        """One time step; gives the number of spikes."""
        state = self.membrane.value, self.rest.value, self.spikes.value
        self.membrane.value, self.rest.value, self.spikes.value = fire(state, self.weights.value, current)
        return jnp.sum(self.spikes.value)


def fire(state: Any, weights: jax.Array, current: jax.Array) -> Any:
    """Membranes, refractory times and spikes after a time step."""
    membrane, rest, spikes = state
    membrane = jnp.where(rest > 0, 0.0, 0.95 * membrane + current + spikes @ weights)
    fires = membrane > 1
    return jnp.where(fires, 0.0, membrane), jnp.where(fires, 5, jnp.maximum(rest - 1, 0)), fires.astype(jnp.float32)


def lif(beside: bool = False) -> Workload:
    """One call a time step."""
    size = 128
    weights = jnp.asarray(np.random.default_rng(0).standard_normal((size, size), np.float32) * np.float32(0.05))
    current = jnp.linspace(0.0, 0.2, size)
    net = Spiking(size, jnp.array(weights))
    step = mu.jit(lambda net, current: net(current))
    held = (jnp.zeros(size), jnp.zeros(size, jnp.int32), jnp.zeros(size))

    @functools.partial(jax.jit, donate_argnums=0)
    def by_hand(held: Any, weights: jax.Array, current: jax.Array) -> Any:
        held = fire(held, weights, current)
        return held, jnp.sum(held[2])

    def hand() -> Any:
        nonlocal held
        held, count = by_hand(held, weights, current)
        return count

    return Workload(lambda: step(net, current), hand, others=peers.lif(fire, weights, current) if beside else {})


# -- decoding ----------------------------------------------------------------------------------------------------------


def writer(sizes: decoding.Sizes, weights: Any, *, argument: bool, reads: bool) -> Step:
    """Decodes a token at each call and looks at it; begins again where the cache ends."""
    decoder = decoding.Decoder(sizes, weights)
    jitted = mu.jit(lambda decoder, token: decoder(token)) if argument else mu.jit(lambda token: decoder(token))
    token, done = jnp.int32(1), 0

    def step() -> int:
        nonlocal token, done
        if done == sizes.length:
            decoder.position.value, token, done = jnp.int32(0), jnp.int32(1), 0
        token, done = jitted(decoder, token) if argument else jitted(token), done + 1
        return int(token) + (int(decoder.position.value) if reads else 0)

    return step


def writer_by_hand(sizes: decoding.Sizes, weights: Any, *, reads: bool) -> Step:
    """The same."""
    kept = decoding.caches(sizes)
    jitted = jax.jit(functools.partial(decoding.decode, sizes), donate_argnums=1)
    token, done = jnp.int32(1), 0

    def step() -> int:
        nonlocal kept, token, done
        if done == sizes.length:
            kept["position"], token, done = jnp.int32(0), jnp.int32(1), 0
        kept, token = jitted(weights, kept, token)
        done += 1
        return int(token) + (int(kept["position"]) if reads else 0)

    return step


def decoder(*, argument: bool = True, reads: bool = False, models: int = 1, goal: float) -> Callable[..., Workload]:
    """Decoding by one or two models in turn, each token looked at."""

    def make(beside: bool = False) -> Workload:
        sizes = decoding.SIZES["small"]
        weights = [decoding.weights(sizes, seed) for seed in range(models)]
        ours = [writer(sizes, each, argument=argument, reads=reads) for each in weights]
        hand = [writer_by_hand(sizes, each, reads=reads) for each in weights]
        others = peers.decoder(sizes, weights[0]) if beside and argument and not reads and models == 1 else {}
        return Workload(lambda: sum(step() for step in ours), lambda: sum(step() for step in hand), goal, others)

    return make


WORKLOADS: dict[str, Callable[..., Workload]] = {
    "a VAE that sows its KL term": vae,
    "a DQN step with its replay buffer in states": dqn,
    "a GAN with two optimizers": gan,
    "an LIF step, called from Python": lif,
    "a token, looked at, model as argument": decoder(goal=1.08),
    "a token, looked at, model closed over": decoder(argument=False, goal=1.08),
    "a token, looked at, the position read too": decoder(reads=True, goal=1.12),
    "a token, looked at, of two models in turn": decoder(models=2, goal=1.12),
}


def check(name: str, workload: Workload, steps: int = 6) -> None:
    """Both come to the same results.

    Raises:
      AssertionError: they do not.
    """
    for _ in range(steps):
        np.testing.assert_allclose(workload.ours(), workload.hand(), rtol=2e-4, err_msg=name)


def measure(options: argparse.Namespace) -> list[timing.Row]:
    """The rows."""
    rows = []
    for name, make in WORKLOADS.items():
        if options.only not in name:
            continue
        workload = make(options.peers)
        check(name, workload)
        calls = {"ours": workload.ours, "hand": workload.hand, **workload.others}
        times = timing.interleave(calls, calls=30, rounds=options.rounds)
        rows.append(timing.Row(name, "the same by hand", timing.ratio(times, "ours", "hand"), workload.goal))
        rows += [timing.Row(name, other, timing.ratio(times, "ours", other), 1.0) for other in workload.others]
    return rows


if __name__ == "__main__":
    timing.main(
        __doc__,
        measure,
        ("--only", {"default": "", "help": "a part of the names of the programs to run"}),
        ("--peers", {"action": "store_true", "help": "other libraries, too"}),
    )
