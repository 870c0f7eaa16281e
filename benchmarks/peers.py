"""The whole programs of `workloads.py` in other libraries: each gives what is called for one step, by name.

They do the same work with random numbers of their own. A library that is not installed is left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import decoding
import jax
import jax.numpy as jnp
import optax
import timing

Step = Callable[[], Any]
Steps = dict[str, Step]
NNX, EQUINOX, BRAINSTATE = "nnx.jit", "eqx.filter_jit", "brainstate jit"


def threaded(step: Callable[..., Any], *held: Any) -> Step:
    """Calls a pure step with what it returned last; the result comes last."""
    kept = held

    def call() -> Any:
        nonlocal kept
        *kept, value = step(*kept)
        return value

    return call


# -- a variational autoencoder ---------------------------------------------------------------------------------------

LAYERS = {"inner": (64, 32), "mean": (32, 8), "spread": (32, 8), "outer": (8, 32), "out": (32, 64)}


def vae(x: jax.Array) -> Steps:
    """Sown in NNX; returned beside the result in Equinox."""
    steps: Steps = {}
    tx = optax.adam(1e-3)
    if (nnx := timing.installed("flax.nnx")) is not None:

        class Net(nnx.Module):  # type: ignore[misc, name-defined]
            def __init__(self, rngs: Any) -> None:
                for name, sizes in LAYERS.items():
                    setattr(self, name, nnx.Linear(*sizes, rngs=rngs))
                self.noise = nnx.Rngs(7)

            def __call__(self, x: jax.Array) -> jax.Array:
                hidden = jnp.tanh(self.inner(x))
                mean, spread = self.mean(hidden), self.spread(hidden)
                self.sow(nnx.Intermediate, "kl", 0.5 * jnp.sum(mean**2 + jnp.exp(spread) - 1 - spread))
                code = mean + jnp.exp(0.5 * spread) * jax.random.normal(self.noise(), mean.shape)
                return self.out(jnp.tanh(self.outer(code)))

        net = Net(nnx.Rngs(0))
        optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)

        def loss(net: Any) -> jax.Array:
            error = jnp.sum((net(x) - x) ** 2)
            (kl,) = jax.tree.leaves(nnx.pop(net, nnx.Intermediate))
            return error + kl

        @nnx.jit
        def step(net: Any, optimizer: Any) -> Any:
            value, grads = nnx.value_and_grad(loss)(net)
            optimizer.update(net, grads)
            return value

        steps[NNX] = functools.partial(step, net, optimizer)
    if (eqx := timing.installed("equinox")) is not None:
        nets = {
            name: eqx.nn.Linear(*sizes, key=jax.random.key(number))
            for number, (name, sizes) in enumerate(LAYERS.items())
        }

        def loss_of(nets: Any, key: jax.Array) -> jax.Array:
            apply = {name: jax.vmap(layer) for name, layer in nets.items()}
            hidden = jnp.tanh(apply["inner"](x))
            mean, spread = apply["mean"](hidden), apply["spread"](hidden)
            kl = 0.5 * jnp.sum(mean**2 + jnp.exp(spread) - 1 - spread)
            code = mean + jnp.exp(0.5 * spread) * jax.random.normal(key, mean.shape)
            return jnp.sum((apply["out"](jnp.tanh(apply["outer"](code))) - x) ** 2) + kl

        @functools.partial(eqx.filter_jit, donate="all")
        def improve(nets: Any, moments: Any, key: jax.Array) -> Any:
            key, used = jax.random.split(key)
            value, grads = eqx.filter_value_and_grad(loss_of)(nets, used)
            updates, moments = tx.update(grads, moments, eqx.filter(nets, eqx.is_array))
            return eqx.apply_updates(nets, updates), moments, key, value

        steps[EQUINOX] = threaded(improve, nets, tx.init(eqx.filter(nets, eqx.is_array)), jax.random.key(7))
    return steps


# -- a Q-learner -----------------------------------------------------------------------------------------------------


def dqn(transition: dict[str, jax.Array], capacity: int = 1024) -> Steps:
    """The replay buffer in Variables of NNX."""
    if (nnx := timing.installed("flax.nnx")) is None:
        return {}
    features = transition["before"].size

    class Values(nnx.Module):  # type: ignore[misc, name-defined]
        def __init__(self, rngs: Any) -> None:
            self.one = nnx.Linear(features, 32, rngs=rngs)
            self.two = nnx.Linear(32, 32, rngs=rngs)
            self.out = nnx.Linear(32, 2, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.out(jax.nn.relu(self.two(jax.nn.relu(self.one(x)))))

    class Agent(nnx.Module):  # type: ignore[misc, name-defined]
        def __init__(self, rngs: Any) -> None:
            self.values = Values(rngs)
            self.target = nnx.clone(self.values)
            self.replay = nnx.Dict(
                {name: nnx.Variable(jnp.zeros((capacity, *a.shape), a.dtype)) for name, a in transition.items()}
            )
            self.steps = nnx.Variable(jnp.int32(0))
            self.draws = nnx.Rngs(7)

    agent = Agent(nnx.Rngs(0))
    optimizer = nnx.Optimizer(agent.values, optax.adam(1e-3), wrt=nnx.Param)

    def loss(values: Any, target: Any, batch: dict[str, jax.Array]) -> jax.Array:
        chosen = jnp.take_along_axis(values(batch["before"]), batch["action"][:, None], 1)[:, 0]
        best = jnp.max(jax.lax.stop_gradient(target(batch["after"])), 1)
        return jnp.mean((chosen - (batch["reward"] + 0.99 * best)) ** 2)

    @nnx.jit
    def step(agent: Any, optimizer: Any, transition: dict[str, jax.Array]) -> Any:
        at = agent.steps[...] % capacity
        for name, array in transition.items():
            agent.replay[name][...] = agent.replay[name][...].at[at].set(array)
        agent.steps[...] += 1
        drawn = jax.random.randint(agent.draws(), (32,), 0, jnp.minimum(agent.steps[...], capacity))
        batch = {name: agent.replay[name][...][drawn] for name in transition}
        value, grads = nnx.value_and_grad(loss)(agent.values, agent.target, batch)
        optimizer.update(agent.values, grads)
        newer, older = nnx.state(agent.values), nnx.state(agent.target)
        nnx.update(agent.target, jax.tree.map(lambda old, new: old + 0.01 * (new - old), older, newer))
        return value

    return {NNX: lambda: step(agent, optimizer, transition)}


# -- a generator and a discriminator -----------------------------------------------------------------------------------


def gan(real: jax.Array) -> Steps:
    """Two models and two optimizers."""
    steps: Steps = {}
    tx = optax.adam(1e-3)

    def judged(on_real: jax.Array, on_fake: jax.Array) -> jax.Array:
        return jnp.mean(jax.nn.softplus(-on_real) + jax.nn.softplus(on_fake))

    if (nnx := timing.installed("flax.nnx")) is not None:

        class Perceptron(nnx.Module):  # type: ignore[misc, name-defined]
            def __init__(self, inputs: int, outputs: int, rngs: Any) -> None:
                self.one = nnx.Linear(inputs, 32, rngs=rngs)
                self.out = nnx.Linear(32, outputs, rngs=rngs)

            def __call__(self, x: jax.Array) -> jax.Array:
                return self.out(jax.nn.relu(self.one(x)))

        nets = Perceptron(4, 16, nnx.Rngs(0)), Perceptron(16, 1, nnx.Rngs(1))
        optimizers = tuple(nnx.Optimizer(net, tx, wrt=nnx.Param) for net in nets)

        @nnx.jit
        def step(makes: Any, judges: Any, of_makes: Any, of_judges: Any, draws: Any) -> Any:
            codes = jax.random.normal(draws(), (32, 4))
            fake = makes(codes)
            first, grads = nnx.value_and_grad(lambda judges: judged(judges(real), judges(fake)))(judges)
            of_judges.update(judges, grads)
            second, grads = nnx.value_and_grad(lambda makes: jnp.mean(jax.nn.softplus(-judges(makes(codes)))))(makes)
            of_makes.update(makes, grads)
            return first + second

        steps[NNX] = functools.partial(step, *nets, *optimizers, nnx.Rngs(7))
    if (eqx := timing.installed("equinox")) is not None:
        keys = jax.random.split(jax.random.key(0), 3)
        pair = tuple(
            eqx.nn.MLP(inputs, outputs, 32, 1, key=key)
            for (inputs, outputs), key in zip([(4, 16), (16, 1)], keys, strict=False)
        )

        @functools.partial(eqx.filter_jit, donate="all")
        def improve(makes: Any, judges: Any, of_makes: Any, of_judges: Any, key: jax.Array) -> Any:
            key, used = jax.random.split(key)
            codes = jax.random.normal(used, (32, 4))

            def of_judge(judges: Any) -> jax.Array:
                return judged(jax.vmap(judges)(real), jax.vmap(judges)(jax.vmap(makes)(codes)))

            first, grads = eqx.filter_value_and_grad(of_judge)(judges)
            updates, of_judges = tx.update(grads, of_judges, eqx.filter(judges, eqx.is_array))
            judges = eqx.apply_updates(judges, updates)

            def of_maker(makes: Any) -> jax.Array:
                return jnp.mean(jax.nn.softplus(-jax.vmap(judges)(jax.vmap(makes)(codes))))

            second, grads = eqx.filter_value_and_grad(of_maker)(makes)
            updates, of_makes = tx.update(grads, of_makes, eqx.filter(makes, eqx.is_array))
            return eqx.apply_updates(makes, updates), judges, of_makes, of_judges, key, first + second

        moments = (tx.init(eqx.filter(net, eqx.is_array)) for net in pair)
        steps[EQUINOX] = threaded(improve, *pair, *moments, keys[2])
    return steps


# -- spiking neurons ---------------------------------------------------------------------------------------------------


def lif(fire: Callable[..., Any], weights: jax.Array, current: jax.Array) -> Steps:
    """States of BrainState, and Variables of NNX."""
    steps: Steps = {}
    size = current.size
    start = {"membrane": jnp.zeros(size), "rest": jnp.zeros(size, jnp.int32), "spikes": jnp.zeros(size)}
    if (nnx := timing.installed("flax.nnx")) is not None:

        class Spiking(nnx.Module):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                self.weights = nnx.Param(jnp.array(weights))
                for name, array in start.items():
                    setattr(self, name, nnx.Variable(jnp.array(array)))

            def __call__(self, current: jax.Array) -> jax.Array:
                held = tuple(getattr(self, name)[...] for name in start)
                for name, new in zip(start, fire(held, self.weights[...], current), strict=True):
                    getattr(self, name)[...] = new
                return jnp.sum(self.spikes[...])

        step = nnx.jit(lambda net, current: net(current))
        steps[NNX] = functools.partial(step, Spiking(), current)
    if (brainstate := timing.installed("brainstate")) is not None:
        fixed = brainstate.ParamState(jnp.array(weights))
        states = tuple(brainstate.HiddenState(jnp.array(array)) for array in start.values())

        def advance(current: jax.Array) -> jax.Array:
            new = fire(tuple(state.value for state in states), fixed.value, current)
            for state, value in zip(states, new, strict=True):
                state.value = value
            return jnp.sum(states[2].value)

        jit = getattr(brainstate.transform, "jit", None) or brainstate.compile.jit
        steps[BRAINSTATE] = functools.partial(jit(advance), current)
    return steps


# -- decoding ----------------------------------------------------------------------------------------------------------


def decoder(sizes: decoding.Sizes, weights: Any) -> Steps:
    """A token at each call, looked at; the caches in Variables of NNX."""
    if (nnx := timing.installed("flax.nnx")) is None:
        return {}

    class Decoder(nnx.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            flat, self.treedef = jax.tree.flatten(weights)
            self.weights = nnx.List([nnx.Param(array) for array in flat])
            kept, self.kept_treedef = jax.tree.flatten(decoding.caches(sizes))
            self.kept = nnx.List([nnx.Cache(array) for array in kept])

        def __call__(self, token: jax.Array) -> jax.Array:
            read = jax.tree.unflatten(self.treedef, [each[...] for each in self.weights])
            kept = jax.tree.unflatten(self.kept_treedef, [each[...] for each in self.kept])
            kept, token = decoding.decode(sizes, read, kept, token)
            for cell, new in zip(self.kept, jax.tree.leaves(kept), strict=True):
                cell[...] = new
            return token

    net, jitted = Decoder(), nnx.jit(lambda net, token: net(token))
    token, done = jnp.int32(1), 0

    def step() -> int:
        nonlocal token, done
        if done == sizes.length:
            for cell, new in zip(net.kept, jax.tree.leaves(decoding.caches(sizes)), strict=True):
                cell[...] = new
            token, done = jnp.int32(1), 0
        token, done = jitted(net, token), done + 1
        return int(token)

    return {NNX: step}
