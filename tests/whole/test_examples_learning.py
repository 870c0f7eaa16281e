"""The examples that learn by acting and by selection: each beside the same in plain JAX, and the whole among the slow tests."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mutatis as mu
from tests.whole.test_examples import load

pytestmark = pytest.mark.once  # nothing here depends on the version of JAX


@pytest.fixture(autouse=True)
def usual_promotion() -> Any:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


class Stream:
    """A random stream by hand: a key and a count, as a pytree that is handed on."""

    def __init__(self, rngs: mu.Rngs) -> None:
        (held,) = mu.state(rngs).values()
        self.held = jax.tree.map(jnp.array, held)

    @staticmethod
    def draw(held: Any) -> tuple[Any, jax.Array]:
        return {**held, "count": held["count"] + 1}, jax.random.fold_in(held["key"], held["count"])


def dense(p: Any, x: jax.Array) -> jax.Array:
    return x @ p["kernel"] + p["bias"]


def by_name(module: Any) -> Any:
    """The parameters of a module as nested dicts, copied."""
    found: dict[Any, Any] = {}
    for path, value in mu.state(module, mu.Param).items():
        at = found
        for part in path[:-1]:
            at = at.setdefault(part, {})
        at[path[-1]] = jnp.array(value)
    return found


def close(ours: Any, hand: Any) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(hand), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


# -- the maze ------------------------------------------------------------------------------------------------------


def test_a_q_learner_is_the_one_by_hand() -> None:
    dqn = load("dqn")
    room, size = 20, 4
    agent = dqn.Agent(8, mu.Rngs(0), room=room)
    explore = jnp.linspace(1.0, 0.0, 60)
    values, stream = by_name(agent.values), Stream(agent.rngs)
    tx = optax.adam(1e-3)

    def q(p: Any, places: jax.Array) -> jax.Array:
        seen = jax.nn.one_hot(places[..., 0] * dqn.WALLS.shape[1] + places[..., 1], dqn.WALLS.size)
        return dense(p["out"], jax.nn.relu(dense(p["into"], seen)))

    def loss(p: Any, target: Any, batch: Any) -> jax.Array:
        chosen = jnp.take_along_axis(q(p, batch["before"]), batch["action"][:, None], 1)[:, 0]
        best = jnp.argmax(q(p, batch["after"]), -1)
        later = jnp.take_along_axis(q(target, batch["after"]), best[:, None], 1)[:, 0]
        goal = batch["reward"] + dqn.DISCOUNT * jnp.where(batch["done"], 0.0, later)
        return jnp.mean((chosen - jax.lax.stop_gradient(goal)) ** 2)

    def step(carry: Any, chance: jax.Array) -> tuple[Any, jax.Array]:
        p, target, moments, held, place, steps, rings, count = carry
        held, key = Stream.draw(held)
        key, other = jax.random.split(key)
        random = jax.random.randint(other, (), 0, 4)
        action = jnp.where(jax.random.uniform(key) < chance, random, jnp.argmax(q(p, place)))
        after, reward, done = dqn.walk(place, action)
        over = done | (steps + 1 >= dqn.LONGEST)
        held, key = Stream.draw(held)
        start = jnp.asarray(dqn.FREE)[jax.random.randint(key, (), 0, len(dqn.FREE))]
        row = {"before": place, "action": action, "reward": reward, "after": after, "done": done}
        rings = {name: ring.at[count % room].set(row[name]) for name, ring in rings.items()}
        count = count + 1
        held, key = Stream.draw(held)
        drawn = jax.random.randint(key, (size,), 0, jnp.minimum(count, room))
        grads = jax.grad(loss)(p, target, {name: ring[drawn] for name, ring in rings.items()})
        updates, moments = tx.update(grads, moments, p)
        p = optax.apply_updates(p, updates)
        target = jax.tree.map(lambda new, old: jnp.where(count % 25 == 0, new, old), p, target)
        place = jnp.where(over, start, after).astype(jnp.int32)
        return (p, target, moments, held, place, jnp.where(over, 0, steps + 1), rings, count), reward

    rings = {name: jnp.array(ring.value) for name, ring in agent.replay.rings.items()}
    start = (values, values, tx.init(values), stream.held, agent.world.place.value, jnp.int32(0), rings, jnp.int32(0))
    (hand, target, *_), rewards = jax.jit(lambda start, xs: jax.lax.scan(step, start, xs))(start, explore)
    ours = mu.jit(lambda agent, xs: mu.for_loop(lambda chance: dqn.learn(agent, chance, size, 25), xs))(agent, explore)
    np.testing.assert_array_equal(ours, rewards)
    close(by_name(agent.values), hand)
    close(by_name(agent.target), target)


@pytest.mark.slow
def test_a_q_learner_finds_the_best_way() -> None:
    dqn = load("dqn")
    agent = dqn.Agent(64, mu.Rngs(0))
    dqn.train(agent, jnp.maximum(0.05, jnp.linspace(1.0, -0.5, 12_000)))
    best = dqn.best_values()[tuple(np.array(dqn.FREE).T)]
    np.testing.assert_allclose(dqn.earned(agent), best, atol=1e-4)


# -- the pole ------------------------------------------------------------------------------------------------------


def test_a_policy_is_the_one_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    ppo = load("ppo")
    monkeypatch.setattr(ppo, "LONGEST", 20)  # some poles fall before, others stand
    envs, steps, passes, parts, iterations = 6, 18, 2, 2, 2
    agent = ppo.make(envs, 8, iterations, passes, parts)
    held, p = Stream(agent.rngs).held, by_name(agent.policy)
    now, lasted = jnp.array(agent.poles.now.value), jnp.zeros(envs)
    rate = optax.linear_schedule(5e-3, 0.0, iterations * passes * parts)
    tx = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(rate))

    def policy(p: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        act, judge = ([p[name]["layers"][place] for place in (0, 2)] for name in ("act", "judge"))
        return (
            dense(act[1], jnp.tanh(dense(act[0], x))),
            dense(judge[1], jnp.tanh(dense(judge[0], x)))[..., 0],
        )

    def act(carry: Any, _: Any) -> tuple[Any, Any]:
        p, held, now, lasted = carry
        logits, value = policy(p, now)
        held, key = Stream.draw(held)
        action = jax.random.categorical(key, logits)
        after, fell = ppo.swing(now, action)
        over = fell | (lasted + 1 >= ppo.LONGEST)
        held, key = Stream.draw(held)
        fresh = jax.random.uniform(key, (envs, 4), minval=-0.05, maxval=0.05)
        log_prob = ppo.of_action(jax.nn.log_softmax(logits), action)
        seen = ppo.Seen(now, action, log_prob, value, policy(p, after)[1], fell, over)
        return (p, held, jnp.where(over[:, None], fresh, after), jnp.where(over, 0.0, lasted + 1)), seen

    def loss(p: Any, seen: Any, advantage: jax.Array, goal: jax.Array) -> jax.Array:
        logits, value = policy(p, seen.x)
        log_probs = jax.nn.log_softmax(logits)
        ratio = jnp.exp(ppo.of_action(log_probs, seen.action) - seen.log_prob)
        gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage)
        undecided = -jnp.sum(jnp.exp(log_probs) * log_probs, -1)
        return -gain.mean() + 0.5 * ((value - goal) ** 2).mean() - ppo.ENTROPY * undecided.mean()

    def estimate(seen: Any) -> jax.Array:
        found: list[jax.Array] = []
        sums = jnp.zeros(envs)
        for t in reversed(range(steps)):
            surprise = 1.0 + ppo.DISCOUNT * (1.0 - seen.fell[t]) * seen.later[t] - seen.value[t]
            sums = surprise + ppo.DISCOUNT * ppo.TRACE * (1.0 - seen.over[t]) * sums
            found.insert(0, sums)
        return jnp.stack(found)

    def iterate(p: Any, moments: Any, held: Any, now: Any, lasted: Any) -> Any:
        (_, held, now, lasted), seen = jax.lax.scan(act, (p, held, now, lasted), None, steps)
        advantage = estimate(seen)
        batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (seen, advantage, advantage + seen.value))
        for _ in range(passes):
            held, key = Stream.draw(held)
            order = jax.random.permutation(key, envs * steps)
            shuffled = jax.tree.map(lambda x, order=order: x[order].reshape(parts, -1, *x.shape[1:]), batch)
            for number in range(parts):
                known, gain, goal = jax.tree.map(lambda x, number=number: x[number], shuffled)
                gain = (gain - gain.mean()) / (gain.std() + 1e-8)
                updates, moments = tx.update(jax.grad(loss)(p, known, gain, goal), moments, p)
                p = optax.apply_updates(p, updates)
        return (p, moments, held, now, lasted), (seen.fell.sum(), (seen.over & ~seen.fell).sum())

    hand, ends = (p, tx.init(p), held, now, lasted), np.zeros(2)
    by_hand = jax.jit(iterate)
    for _ in range(iterations):
        hand, ended = by_hand(*hand)
        ends += np.asarray(ended)
    assert ends.all(), "both ends of an episode occur"
    ppo.train(agent, iterations, steps, passes, parts)
    close(by_name(agent.policy), hand[0])
    close(agent.poles.now.value, hand[3])


@pytest.mark.slow
def test_the_pole_stands() -> None:
    ppo = load("ppo")
    agent = ppo.make(32, 64, 120)
    lengths = ppo.train(agent, 120)
    assert float(lengths[:5].mean()) < 100
    assert float(lengths[-1]) >= 475
    assert float(ppo.stands(agent).mean()) >= 475


# -- the population ------------------------------------------------------------------------------------------------


def test_a_population_is_the_one_by_hand() -> None:
    population = load("population")
    (x, y), steps = population.data(40, 1), 5
    members = population.make(4)
    stacked = by_name(members.net)
    held = jax.tree.map(jnp.array, next(iter(mu.state(members, mu.RngState).values())))
    rates, decays = jnp.exp(members.log_rate.value), jnp.exp(members.log_decay.value)
    tx = optax.scale_by_adam()

    def net(p: Any, x: jax.Array) -> jax.Array:
        for place in (0, 2):
            x = jnp.tanh(dense(p["layers"][place], x))
        return dense(p["layers"][4], x)[:, 0]

    def one(p: Any, held: Any, rate: jax.Array, decay: jax.Array) -> tuple[jax.Array, Any]:
        moments = tx.init(p)
        for _ in range(steps):
            held, key = Stream.draw(held)
            chosen = jax.random.randint(key, (32,), 0, len(x))
            grads = jax.grad(lambda p, chosen=chosen: jnp.mean((net(p, x[chosen]) - y[chosen]) ** 2))(p)
            updates, moments = tx.update(grads, moments, p)
            p = jax.tree.map(lambda p, u: p - rate * (u + decay * p), p, updates)
        return jnp.mean((net(p, x) - y) ** 2), p

    losses, hand = jax.jit(jax.vmap(one))(stacked, held, rates, decays)
    close(population.generation(members, x, y, (x, y), steps), losses)
    close(by_name(members.net), hand)


def test_selection_copies_all_but_random_streams() -> None:
    population = load("population")
    members = population.make(8)
    x, y = population.data(40, 1)
    population.generation(members, x, y, (x, y), 2)
    before, streams = mu.state(members), mu.state(members, mu.RngState)
    losses = jnp.array([5.0, 1.0, 2.0, jnp.nan, 3.0, 4.0, 9.0, 0.5])
    source = np.asarray(population.select(members, losses, jax.random.key(0)))
    assert source.tolist() == [0, 1, 2, 1, 4, 5, 7, 7]  # the best are 7 and 1, the worst 6 and the one that diverged
    rates = ("log_rate", "log_decay")
    for path, value in mu.state(members).items():
        if path in streams:
            assert all(
                bool(jnp.all(a == b)) for a, b in zip(*map(jax.tree.leaves, (value, streams[path])), strict=True)
            )
        elif path[-1] not in rates:
            np.testing.assert_array_equal(value, before[path][source])
    moved = source != np.arange(8)
    change = np.abs(members.log_rate.value - before["log_rate"][source])
    np.testing.assert_allclose(change[moved], np.log(2), rtol=1e-5)
    np.testing.assert_array_equal(change[~moved], 0)


@pytest.mark.slow
def test_a_population_beats_the_best_fixed_rates() -> None:
    population = load("population")
    alone = population.run(16, 20, 100, copies=False)
    together = population.run(16, 20, 100, copies=True)
    assert together[-1].min() <= alone[-1].min()
    assert np.median(together[-1]) < 0.6 * np.median(alone[-1])
