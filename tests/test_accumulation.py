"""`mu.accumulate`: gradients over microbatches beside those of the whole batch, and states beside a loop by hand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mutatis as mu
from mutatis import nn
from mutatis.errors import ArgumentError


def waves(*shape: int) -> jax.Array:
    return jnp.sin(jnp.arange(np.prod(shape), dtype=jnp.float32)).reshape(shape)


class Net(mu.Module):
    """Weights, statistics, dropout and a count."""

    def __init__(self) -> None:
        rngs = mu.Rngs(0)
        self.first, self.norm = nn.Linear(3, 4, rngs=rngs), nn.BatchNorm(4, momentum=0.5)
        self.drop, self.last = nn.Dropout(0.5, rngs=rngs), nn.Linear(4, 2, rngs=rngs)
        self.calls = mu.Variable(0)

    def __call__(self, x: Any) -> Any:
        self.calls += 1
        return self.last(self.drop(jax.nn.tanh(self.norm(self.first(x)))))


def loss(net: Any, x: Any, y: Any) -> Any:
    return jnp.mean((net(x) - y) ** 2)


X, Y = waves(8, 3), waves(8, 2)


@pytest.mark.parametrize("transform", [lambda f: f, mu.jit], ids=["eager", "jit"])
def test_the_gradient_of_the_whole_batch(transform: Any) -> None:
    net = nn.Linear(3, 2, rngs=mu.Rngs(0))
    wanted = mu.value_and_grad(loss)(net, X, Y)
    for steps in (1, 4, 8):
        got = transform(mu.accumulate(mu.value_and_grad(loss), steps))(net, X, y=Y)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, wanted)
    (grads,) = (transform(mu.accumulate(mu.grad(lambda n, x: jnp.sum(n(x) ** 2)), 4, average=False))(net, X),)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        grads,
        mu.grad(lambda n, x: jnp.sum(n(x) ** 2))(net, X),
    )


def test_states_are_carried() -> None:
    net, other = Net(), Net()
    got = mu.jit(mu.accumulate(mu.value_and_grad(loss), 4))(net, X, Y)
    each = [mu.value_and_grad(loss)(other, X[n : n + 2], Y[n : n + 2]) for n in range(0, 8, 2)]
    wanted = jax.tree.map(lambda *parts: sum(parts) / 4, *each)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, wanted)
    assert int(net.calls) == 4
    for path, value in mu.state(net, mu.BatchStat, mu.RngState)[0].flat().items():
        np.testing.assert_allclose(value, mu.state(other)[path], rtol=1e-5)
    assert int(net.drop.stream.value["count"]) == int(other.drop.stream.value["count"]) == 4


@pytest.mark.parametrize("public", [mu.grad, mu.value_and_grad])
def test_what_comes_beside_is_stacked(public: Any) -> None:
    net = nn.Linear(3, 2, rngs=mu.Rngs(0))

    def with_logits(net: Any, x: Any) -> Any:
        y = net(x)
        return jnp.mean(y**2), {"logits": y, "count": jnp.int32(len(x))}

    got = mu.accumulate(public(with_logits, has_aux=True), 4)(net, X)
    (value, aux), grads = got if public is mu.value_and_grad else ((None, got[1]), got[0])
    np.testing.assert_allclose(aux["logits"].reshape(8, 2), net(X), rtol=1e-6)
    assert aux["count"].tolist() == [2] * 4 and set(grads) == {("kernel",), ("bias",)}
    assert value is None or float(value) == pytest.approx(float(with_logits(net, X)[0]), rel=1e-5)


def test_axes_and_arguments_that_are_no_batch() -> None:
    net = nn.Linear(3, 2, rngs=mu.Rngs(0))

    def weighted(net: Any, batch: Any, weights: Any, scale: float) -> Any:
        return scale * jnp.mean((net(batch["x"].swapaxes(0, 1)) * weights[None]) ** 2)

    batch, weights = {"x": X.T}, jnp.array([1.0, 2.0])
    got = mu.accumulate(mu.value_and_grad(weighted), 2, in_axes=(0, 1, None, None))(net, batch, weights, 0.5)
    wanted = mu.value_and_grad(weighted)(net, batch, weights, 0.5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, wanted)


def test_many_small_gradients_count() -> None:
    w = mu.Param(jnp.zeros((), jnp.bfloat16))
    x = jnp.ones((1024, 1), jnp.bfloat16)
    gradient = mu.jit(mu.accumulate(mu.grad(lambda w, x: jnp.sum(w.value * x)), 1024, average=False))(w, x)[()]
    assert gradient.dtype == jnp.bfloat16 and float(gradient) == 1024, "in bfloat16 it would stop at 256"


@jax.numpy_dtype_promotion("standard")  # optax promotes
def test_a_training_step() -> None:
    net, other = nn.Linear(3, 2, rngs=mu.Rngs(0)), nn.Linear(3, 2, rngs=mu.Rngs(0))
    optimizers = [mu.Optimizer(model, optax.adam(0.1)) for model in (net, other)]

    @mu.jit
    def step(x: Any, y: Any) -> Any:
        value, grads = mu.accumulate(mu.value_and_grad(loss), 4)(net, x, y)
        optimizers[0].update(grads)
        return value

    for _ in range(3):
        step(X, Y)
        optimizers[1].update(mu.grad(loss)(other, X, Y))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), mu.state(net), mu.state(other))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda f, net: mu.accumulate(f, 0), "into 0 microbatches"),
        (lambda f, net: mu.accumulate(f, 3)(net, X, Y), r"(?s)into 3 equal.*shape \(8, 3\)"),
        (lambda f, net: mu.accumulate(f, 2)(net), "without a batch"),
        (lambda f, net: mu.accumulate(f, 2, in_axes=(0, 0))(net, X, Y), "3 axes"),
        (lambda f, net: mu.accumulate(lambda net, x: jnp.argmax(x), 2)(net, X), r"(?s)mean of floats.*int32"),
        (lambda f, net: mu.accumulate(f, 2)(net, X, Y[:4]), r"(?s)different sizes.*shape \(4, 2\) along axis 0"),
        (lambda f, net: mu.accumulate(f, 2, in_axes=(None, 0, 1))(net, X, Y), r"(?s)different sizes.*in_axes"),
    ],
)
def test_bad_input(call: Any, text: str) -> None:
    net = Net()
    with pytest.raises(ArgumentError, match=text):
        call(mu.value_and_grad(loss), net)
    assert int(net.calls) == 0
