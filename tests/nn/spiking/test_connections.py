"""Connections beside dense matrices: what arrives, and the gradient of the strengths; how they are drawn; bad input."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import sparse

import mutatis as mu
from mutatis import nn
from mutatis.errors import ArgumentError

pytestmark = pytest.mark.once


def dense(connection: Any) -> np.ndarray:
    return np.stack([np.asarray(connection(row)) for row in np.eye(connection.pre, dtype=np.float32)])


def make(name: str) -> Any:
    rngs = mu.Rngs(0)
    matrix = jnp.where(jax.random.uniform(jax.random.key(1), (6, 5)) < 0.4, 1.5, 0.0)
    return {
        "one": lambda: nn.OneToOne(6, jnp.arange(6.0)),
        "number": lambda: nn.FixedNum(6, 5, 2, jax.random.normal(jax.random.key(0), (6, 2)), rngs=rngs),
        "one weight": lambda: nn.FixedNum(6, 5, 3, 0.5, rngs=rngs),
        "chance": lambda: nn.FixedProb(6, 5, 0.5, jax.nn.initializers.normal(1.0), rngs=rngs),
        "sparse": lambda: nn.Sparse(sparse.BCOO.fromdense(matrix)),
    }[name]()


@pytest.mark.parametrize("name", ["one", "number", "one weight", "chance", "sparse"])
def test_beside_a_dense_matrix(name: str) -> None:
    connection = make(name)
    matrix = dense(connection)
    x = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
    np.testing.assert_allclose(connection(x), x @ matrix, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mu.jit(lambda c, x: c(x))(connection, x), x @ matrix, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mu.vmap(lambda x: connection(x))(x), x @ matrix, rtol=1e-5, atol=1e-6)
    grad = mu.grad(lambda c: jnp.sum(c(x[0]) ** 2))(connection)["weight"]
    eps = 1e-2
    cell = connection.weight
    start = np.asarray(cell.value)
    for at in list(np.ndindex(start.shape))[:4]:
        sums = []
        for sign in (1, -1):
            moved = start.copy()
            moved[at] += sign * eps
            cell.value = moved
            sums.append(float(jnp.sum(connection(x[0]) ** 2)))
        np.testing.assert_allclose(grad[at], (sums[0] - sums[1]) / (2 * eps), rtol=2e-2, atol=2e-2)


def test_how_they_are_drawn() -> None:
    number = nn.FixedNum(200, 50, 7, rngs=mu.Rngs(0))
    assert all(len(set(row.tolist())) == 7 for row in np.asarray(number.target.value))
    chance = nn.FixedProb(200, 300, 0.1, rngs=mu.Rngs(0))
    matrix = dense(chance)
    assert set(np.unique(matrix)) == {0.0, 1.0} and abs(matrix.mean() - 0.1) < 0.01
    assert abs(matrix.sum(1).std() - np.sqrt(300 * 0.09)) < 1.5
    again = nn.FixedProb(200, 300, 0.1, rngs=mu.Rngs(0))
    np.testing.assert_array_equal(again.target.value, chance.target.value)
    assert nn.FixedProb(3, 4, 0.0, rngs=mu.Rngs(0))(jnp.ones(3)).tolist() == [0.0] * 4
    assert list(mu.state(chance, mu.Param)) == [("weight",)]


def test_bad_input() -> None:
    rngs = mu.Rngs(0)
    for use, text in [
        (lambda: nn.FixedNum(3, 4, 5, rngs=rngs), "cannot reach 5 of 4"),
        (lambda: nn.FixedProb(3, 4, 1.5, rngs=rngs), "by the chance 1.5"),
        (lambda: nn.FixedNum(3, 4, 2.5, rngs=rngs), "cannot reach 2.5 of 4"),
        (lambda: nn.FixedNum(3, 4, "2", rngs=rngs), "cannot reach '2' of 4"),
        (lambda: nn.FixedNum(3, 4, True, rngs=rngs), "cannot reach True of 4"),
        (lambda: nn.FixedNum(3.0, 4, 2, rngs=rngs), "cannot connect 3.0 neurons"),
        (lambda: nn.FixedProb(3, -4, 0.5, rngs=rngs), "cannot connect -4 neurons"),
        (lambda: nn.FixedProb(3, 4, "0.5", rngs=rngs), "`prob` is no real number"),
        (lambda: nn.OneToOne(3, weight=1j), "`weight` is no real number"),
        (lambda: nn.FixedNum(3, 4, 2, events=1.5, rngs=rngs), "have room for 1.5 events"),
        (lambda: nn.FixedNum(3, 4, 2, events=0, rngs=rngs), "have room for 0 events"),
        (lambda: nn.FixedNum(3, 4, 2, jnp.ones(3), rngs=rngs), "weights of this shape"),
        (lambda: nn.Sparse(jnp.ones((2, 2))), "needs a sparse matrix"),
        (lambda: make("number")(jnp.ones(5)), "another number of neurons"),
        (lambda: mu.jit(lambda rngs: nn.FixedProb(3, 4, 0.5, rngs=rngs))(rngs), "is traced"),
    ]:
        with pytest.raises(ArgumentError, match=text):
            use()


@pytest.mark.parametrize("spikes", [0, 1, 3, 4, 8])  # there is room for three
@pytest.mark.parametrize("strengths", ["one", "each"])
@pytest.mark.parametrize("layer", ["FixedNum", "FixedProb"])
def test_events_are_the_product(layer: str, strengths: str, spikes: int) -> None:
    def make(events: int | None) -> Any:
        rngs = mu.Rngs(0)
        if layer == "FixedNum":
            weight = jnp.arange(8 * 4.0).reshape(8, 4) if strengths == "each" else 0.5
            return nn.FixedNum(8, 6, 4, weight, events=events, rngs=rngs)
        weight = jax.nn.initializers.normal(1.0) if strengths == "each" else 0.5
        return nn.FixedProb(8, 6, 0.6, weight, events=events, rngs=rngs)

    every, events = make(None), make(3)
    x = jnp.zeros(8).at[np.random.default_rng(0).permutation(8)[:spikes]].set(1.0)

    def loss(connect: Any, x: Any) -> Any:
        return jnp.sum(jnp.sin(connect(x)))

    for of in (
        lambda connect: connect(x),
        lambda connect: mu.jit(mu.grad(loss, argnums=(0, 1)))(connect, x),  # of neurons that do not spike, too
        lambda connect: mu.jvp(lambda x: connect(x), (x,), (jnp.ones(8),)),
        lambda connect: mu.vmap(lambda x: connect(x))(jnp.stack([x, 1 - x])),
        lambda connect: connect(jnp.stack([x, 1 - x])),
        lambda connect: mu.for_loop(lambda x: connect(x), jnp.stack([x, 1 - x, x * 2])),
        lambda connect: connect(x * 0.25),
    ):
        for a, b in zip(jax.tree.leaves(of(every)), jax.tree.leaves(of(events)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bool_, jnp.int32])
def test_spikes_that_are_no_floats(dtype: Any) -> None:
    spikes = jnp.array([0, 1, 0, 0, 1, 0, 0, 0]).astype(dtype)
    few, every = (nn.FixedNum(8, 6, 3, 0.5, events=events, rngs=mu.Rngs(0)) for events in (3, None))
    np.testing.assert_allclose(few(spikes), every(spikes))
    grads = [mu.grad(lambda layer: jnp.sum(layer(spikes)))(layer)["weight"] for layer in (few, every)]
    np.testing.assert_allclose(*grads)


def test_sizes_of_numpy() -> None:
    connect = nn.FixedNum(np.int64(6), np.int32(5), np.int64(2), events=np.int64(2), rngs=mu.Rngs(0))
    same = nn.FixedNum(6, 5, 2, events=2, rngs=mu.Rngs(0))
    np.testing.assert_array_equal(dense(connect), dense(same))


def test_whole_numbers_of_a_sparse_matrix_are_trained() -> None:
    whole, floats = (
        nn.Sparse(sparse.BCOO.fromdense(jnp.array([[0, 2], [3, 0]], dtype))) for dtype in (jnp.int32, jnp.float32)
    )
    x = jnp.array([1.0, 2.0])
    np.testing.assert_array_equal(whole(x), floats(x))
    grads = [mu.grad(lambda layer: jnp.sum(layer(x) ** 2))(layer)["weight"] for layer in (whole, floats)]
    np.testing.assert_array_equal(*grads)


@pytest.mark.parametrize("layer", ["FixedNum", "FixedProb"])
def test_events_are_compiled_once(layer: str, traces: Any) -> None:
    connect = getattr(nn, layer)(40, 30, 3 if layer == "FixedNum" else 0.1, events=3, rngs=mu.Rngs(0))
    xs = list(jnp.eye(40)[:4])
    connect(xs[0])
    with traces.compilations() as compiled:
        for x in xs:
            connect(x)
    assert compiled.count == 0


@pytest.mark.parametrize("events", [None, 2])
@pytest.mark.parametrize("layer", ["FixedNum", "FixedProb", "OneToOne", "Sparse"])
def test_weights_with_a_unit(layer: str, events: int | None) -> None:
    u = pytest.importorskip("saiunit")

    def made(unit: Any) -> Any:
        strengths = jnp.arange(1.0, 7.0)
        if layer == "FixedNum":
            weight = jnp.arange(12.0).reshape(6, 2)
            return nn.FixedNum(6, 5, 2, weight if unit is None else weight * unit, events=events, rngs=mu.Rngs(0))
        if layer == "FixedProb":
            return nn.FixedProb(6, 5, 0.5, 0.5 if unit is None else 0.5 * unit, events=events, rngs=mu.Rngs(0))
        if layer == "OneToOne":
            return nn.OneToOne(6, strengths if unit is None else strengths * unit)
        connect = nn.Sparse(sparse.BCOO.fromdense(jnp.eye(6) * 2))
        if unit is not None:
            connect.weight = mu.Param(connect.weight.value * unit)
        return connect

    plain, quantity = made(None), made(u.nA)
    x = jnp.zeros(6).at[2].set(1.0)
    for of in (lambda connect: connect(x), lambda connect: mu.jit(lambda c, x: c(x))(connect, x)):
        np.testing.assert_allclose(of(quantity) / u.nA, of(plain), rtol=1e-6)
    loss = lambda connect, unit: jnp.sum((connect(x) / unit) ** 2)  # noqa: E731
    ours = mu.grad(lambda c: loss(c, u.nA))(quantity)["weight"]
    np.testing.assert_allclose(jax.tree.leaves(ours)[0], mu.grad(lambda c: loss(c, 1.0))(plain)["weight"], rtol=1e-6)
    size = quantity(x).shape[0]
    neurons = nn.LIF(size, resistance=2.0 * u.Mohm), nn.LIF(size, resistance=2.0)
    np.testing.assert_allclose(neurons[0](quantity(x)), neurons[1](plain(x)))
    with pytest.raises(ArgumentError, match="unit that does not fit"):
        nn.LIF(size)(quantity(x))


def test_events_of_other_connections() -> None:
    """As a checkpoint restores them: a neuron may have more connections than any had."""
    nets = [nn.FixedProb(6, 6, 0.3, events=2, rngs=mu.Rngs(seed)) for seed in range(20)]
    pairs = [(a, b) for a in nets for b in nets if a.source.shape == b.source.shape and a.most < b.most]
    few, more = pairs[0]
    mu.update(few, mu.state(more))
    for row in jnp.eye(6):
        np.testing.assert_array_equal(few(row), more(row))
