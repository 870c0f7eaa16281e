"""Whole programs of the kind that users write, each beside what hand-written JAX or NumPy gives."""

from __future__ import annotations

import copy
import functools
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mutatis as mu
from mutatis import checkpoint
from tests.nets import Counter


class Statistic(mu.BatchStat):
    """A kind of the user's own."""


class Mixed(mu.Module):
    """Parameters, statistics of a user's kind, a count and a cache."""

    def __init__(self) -> None:
        self.kernel = mu.Param(jnp.ones((3, 2)))
        self.bias = mu.Param(jnp.zeros(2))
        self.mean = Statistic(jnp.zeros(2))
        self.var = Statistic(jnp.ones(2))
        self.step = mu.Variable(0)
        self.cache = mu.Cache(jnp.full((4, 2), 7.0))


def test_a_model_with_five_kinds_of_state() -> None:
    model = Mixed()
    assert len(jax.tree.leaves(mu.state(model))) == 6
    assert len(mu.state(model, mu.Param)) == 2
    assert len(mu.state(model, Statistic)) == 2
    others = mu.All(mu.Variable, mu.Not(mu.Param), mu.Not(Statistic), mu.Not(mu.Cache))
    assert list(mu.state(model, others)) == [("step",)]
    before = mu.state(model, mu.Not(mu.Cache))
    mu.update(model, mu.state(model, mu.Cache).map(lambda _, value: jnp.zeros_like(value)))
    assert not np.asarray(model.cache).any()
    assert mu.state(model, mu.Not(mu.Cache)) == before


def by_module() -> Callable[[], Any]:
    return mu.jit(Counter())


def by_method() -> Callable[[], Any]:
    return mu.jit(Counter().count)


def by_closure() -> Callable[[], Any]:
    counter = Counter()
    return mu.jit(lambda: counter.count())


def by_pure_function() -> Callable[[], Any]:
    pure, state = mu.functionalize(Counter().count)
    pure = jax.jit(pure)

    def call() -> Any:
        nonlocal state
        out, state = pure(state)
        return out

    return call


@pytest.mark.parametrize("make", [by_module, by_method, by_closure, by_pure_function], ids=lambda f: f.__name__)
def test_a_counter_counts(make: Callable[[], Callable[[], Any]]) -> None:
    count = make()
    assert [int(count()) for _ in range(4)] == [1, 2, 3, 4]


class HandNorm(mu.Module):
    def __init__(self) -> None:
        self.mean = mu.Variable(jnp.zeros(3))
        self.var = mu.Variable(jnp.ones(3))

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.training:
            mean, var = x.mean(0), x.var(0)
            self.mean.value = 0.9 * self.mean.value + 0.1 * mean
            self.var.value = 0.9 * self.var.value + 0.1 * var
        else:
            mean, var = self.mean.value, self.var.value
        return (x - mean[None]) / jnp.sqrt(var + 1e-5)[None]


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_by_hand_is_the_same_compiled(training: bool) -> None:
    eager, compiled = HandNorm(), HandNorm()
    eager.training = compiled.training = training
    call = mu.jit(compiled)
    for seed in range(3):
        x = jax.random.normal(jax.random.key(seed), (8, 3)) + seed
        np.testing.assert_allclose(call(x), eager(x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(compiled.mean.value, eager.mean.value, rtol=1e-5)
    np.testing.assert_allclose(compiled.var.value, eager.var.value, rtol=1e-5)
    assert bool((compiled.mean.value != 0).any()) == training


class Neuron(mu.Module):
    """Integrates its input; fires at 1 and then rests for three steps."""

    def __init__(self, count: int) -> None:
        self.potential = mu.Hidden(jnp.zeros(count))
        self.resting = mu.Hidden(jnp.zeros(count, jnp.int32))

    def __call__(self, current: jax.Array) -> jax.Array:
        potential = jnp.where(self.resting.value > 0, jnp.float32(0), self.potential * jnp.float32(0.5) + current)
        spikes = potential >= 1
        self.potential.value = jnp.where(spikes, jnp.float32(0), potential)
        self.resting.value = jnp.where(spikes, 3, jnp.maximum(self.resting.value - 1, 0))
        return spikes


def test_spiking_neurons_equal_a_numpy_loop() -> None:
    currents = np.random.default_rng(0).integers(0, 8, (50, 4)).astype(np.float32) / 8
    neuron = Neuron(4)
    run = mu.jit(lambda xs: mu.scan(lambda carry, x: (carry, neuron(x)), None, xs)[1])
    spikes = run(currents)

    potential, resting, expected = np.zeros(4, np.float32), np.zeros(4, np.int32), []
    for current in currents:
        potential = np.where(resting > 0, np.float32(0), potential * np.float32(0.5) + current)
        fired = potential >= 1
        potential = np.where(fired, np.float32(0), potential)
        resting = np.where(fired, 3, np.maximum(resting - 1, 0))
        expected.append(fired)
    np.testing.assert_array_equal(spikes, np.stack(expected))
    np.testing.assert_array_equal(neuron.potential, potential)
    np.testing.assert_array_equal(neuron.resting, resting)
    assert spikes.any()


class Regression(mu.Module):
    def __init__(self) -> None:
        self.w = mu.Param(jnp.array([[1.0, -2.0], [0.5, 3.0], [2.0, 1.0]]))
        self.b = mu.Param(jnp.array([0.1, -0.1]))
        self.mean = mu.BatchStat(jnp.zeros(2))
        self.calls = mu.Variable(0)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.w + self.b.value[None]
        self.mean.value = 0.9 * self.mean.value + 0.1 * jax.lax.stop_gradient(y).mean(0)
        self.calls += 1
        return y


def loss(model: Regression, x: jax.Array) -> jax.Array:
    return jnp.mean(model(x) ** 2)


def pure_loss(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return jnp.mean((x @ params["w"] + params["b"][None]) ** 2)


X = jax.random.normal(jax.random.key(0), (5, 3))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("style", ["argument", "closure"])
def test_gradients_equal_hand_written_ones(style: str, compiled: bool) -> None:
    model = Regression()
    if style == "argument":
        step = functools.partial(mu.jit(mu.grad(loss)) if compiled else mu.grad(loss), model)
    else:
        step = mu.grad(lambda x: loss(model, x), of=model)
        step = mu.jit(step) if compiled else step
    params = {"w": model.w.value, "b": model.b.value}
    expected = jax.grad(pure_loss)(params, X)
    gradients = step(X)
    np.testing.assert_allclose(gradients["w"], expected["w"], rtol=1e-5)
    np.testing.assert_allclose(gradients["b"], expected["b"], rtol=1e-5)
    assert int(model.calls) == 1
    np.testing.assert_allclose(model.mean.value, 0.1 * (X @ params["w"] + params["b"][None]).mean(0), rtol=1e-5)


@pytest.mark.parametrize("update", ["grads", "model and grads"])
@pytest.mark.parametrize("style", ["arguments", "closures"])
def test_an_optimizer_in_a_compiled_step(style: str, update: str) -> None:
    with jax.numpy_dtype_promotion("standard"):  # optax computes float ** int
        model = Regression()
        optimizer = mu.Optimizer(model, optax.adam(1e-3))

        def step(model: Regression, optimizer: mu.Optimizer, x: jax.Array) -> jax.Array:
            value, gradients = mu.value_and_grad(loss)(model, x)
            if update == "grads":
                optimizer.update(gradients)
            else:
                optimizer.update(model, gradients)
            return value

        if style == "arguments":
            run = functools.partial(mu.jit(step), model, optimizer)
        else:
            run = mu.jit(lambda x: step(model, optimizer, x))

        tx = optax.adam(1e-3)
        params = {"w": model.w.value, "b": model.b.value}
        state = tx.init(params)
        for _ in range(4):
            expected, gradients = jax.value_and_grad(pure_loss)(params, X)
            updates, state = tx.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
            np.testing.assert_allclose(run(X), expected, rtol=1e-5)
        np.testing.assert_allclose(model.w.value, params["w"], rtol=1e-5)
        assert int(optimizer.step) == int(model.calls) == 4


# -- tied weights -------------------------------------------------------------------------------------------------


class Tied(mu.Module):
    def __init__(self, scale: Any = 1.0) -> None:
        self.embed = mu.Param(jnp.arange(6.0).reshape(3, 2) * scale)
        self.head = {"kernel": self.embed}

    def __call__(self, x: jax.Array) -> jax.Array:
        return (x @ self.embed) @ self.head["kernel"].value.T


def is_tied(model: Tied) -> bool:
    return model.head["kernel"] is model.embed


def test_a_tied_weight_has_one_gradient() -> None:
    model = Tied()
    gradients = mu.grad(lambda m: jnp.sum(m(X) ** 2))(model)
    expected = jax.grad(lambda w: jnp.sum(((X @ w) @ w.T) ** 2))(model.embed.value)
    assert list(gradients) == [("embed",)]
    np.testing.assert_allclose(gradients["embed"], expected, rtol=1e-4)


def test_a_tied_weight_moves_once() -> None:
    model = Tied()
    optimizer = mu.Optimizer(model, optax.sgd(0.1))
    before = np.asarray(model.embed)
    optimizer.update(mu.state(model, mu.Param).map(lambda _, value: jnp.ones_like(value)))
    np.testing.assert_allclose(model.embed, before - np.float32(0.1), rtol=1e-6)


def by_split(model: Tied) -> Tied:
    return mu.merge(*mu.split(model))


def by_pickle(model: Tied) -> Tied:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [by_split, mu.clone, copy.deepcopy, by_pickle], ids=lambda f: f.__name__)
def test_copies_keep_ties_and_are_independent(copied: Callable[[Tied], Tied]) -> None:
    model = Tied()
    other = copied(model)
    assert is_tied(other)
    other.embed.value = jnp.zeros((3, 2))
    assert not np.asarray(other.head["kernel"]).any()
    assert np.asarray(model.embed).any()


def test_a_stack_of_models_keeps_ties() -> None:
    stack = mu.vmap(Tied)(jnp.arange(1.0, 4.0))
    assert is_tied(stack)
    assert stack.embed.shape == (3, 3, 2)
    out = mu.vmap(lambda m: m(X))(stack)
    np.testing.assert_allclose(out[2], Tied(3.0)(X), rtol=1e-5)

    def layer(h: jax.Array, model: Tied) -> tuple[jax.Array, None]:
        model.embed.value = model.embed + 1
        return h @ model.head["kernel"].value @ model.embed.value.T, None

    h, _ = mu.scan(layer, X, stack)
    expected = X
    for scale in range(1, 4):
        w = jnp.arange(6.0).reshape(3, 2) * scale + 1
        expected = expected @ w @ w.T
    np.testing.assert_allclose(h, expected, rtol=1e-4)
    assert is_tied(stack)


def test_a_tied_weight_is_saved_once(tmp_path: Path) -> None:
    model = Tied()
    checkpoint.save(tmp_path / "tied", model)
    other = Tied(0.0)
    checkpoint.restore(tmp_path / "tied", other)
    assert is_tied(other)
    np.testing.assert_array_equal(other.embed, model.embed)
    assert len(mu.state(model)) == 1


# -- arrays that others hold ---------------------------------------------------------------------------------------


@mu.jit
def learn(model: Regression) -> None:
    model.w.value = model.w + 1
    model.calls += 1


def test_a_learner_hands_its_weights_to_an_actor() -> None:
    model = Regression()
    start = np.asarray(model.w)
    device = jax.devices()[0]
    taken = []
    for _ in range(5):
        learn(model)
        taken.append(jax.device_put(model.w.value, device))
    for number, weights in enumerate(taken):
        np.testing.assert_array_equal(weights, start + number + 1)


def test_kept_values_stay_as_they_were() -> None:
    model = Regression()
    kept = []
    for _ in range(5):
        kept.append(model.w.value)
        learn(model)
    for number, weights in enumerate(kept):
        np.testing.assert_array_equal(weights, kept[0] + number)


def test_two_states_may_hold_one_array() -> None:
    model = Regression()
    model.mean.value = model.b.value
    learn(model)
    learn(model)
    np.testing.assert_array_equal(model.mean, model.b)


def test_a_second_thread_reads_all_the_time() -> None:
    model = Regression()
    learn(model)
    stop = threading.Event()
    seen: list[Any] = []

    def read() -> None:
        while not stop.is_set():
            try:
                seen.append(float(np.asarray(model.w.value)[0, 0]))
            except Exception as problem:  # handed to the main thread
                seen.append(problem)
                return

    thread = threading.Thread(target=read)
    thread.start()
    for _ in range(500):
        learn(model)
    stop.set()
    thread.join()
    assert not [item for item in seen if isinstance(item, Exception)]
    assert seen == sorted(seen)


def test_an_evaluation_by_a_raw_loop_is_refused_not_stale() -> None:
    model = Regression()

    def body(carry: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
        return carry + jnp.sum(x[None] @ model.w), None

    with pytest.raises(
        mu.errors.TraceLevelError, match=r"`Regression\.w` \(Param\) was read inside a raw JAX transform"
    ):
        jax.lax.scan(body, jnp.float32(0), X)
    for _ in range(3):
        total, _ = mu.scan(body, jnp.float32(0), X)
        np.testing.assert_allclose(total, jnp.sum(X @ model.w), rtol=1e-4, atol=1e-4)
        learn(model)
    with mu.freeze(model):
        total, _ = jax.lax.scan(lambda c, x: body(c, x), jnp.float32(0), X)
    np.testing.assert_allclose(total, jnp.sum(X @ model.w), rtol=1e-4, atol=1e-4)
