"""Freezing and thawing: the moments of a state that was frozen for a while are those that it had."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mutatis as mu

pytestmark = pytest.mark.once  # nothing here depends on the version of JAX


@pytest.fixture(autouse=True)
def promotion() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"):  # optax asks for it
        yield


class Head(mu.Param):
    pass


def model() -> dict[str, Any]:
    return {"body": mu.Param(jnp.zeros(2)), "head": Head(jnp.zeros(2))}


def loss(net: dict[str, Any]) -> Any:
    return (net["body"].value + 2 * net["head"].value).sum()


TXS = {
    "adam": lambda: optax.adam(0.01),
    "momentum": lambda: optax.sgd(0.01, momentum=0.9),
    "adam with clipping and a schedule": lambda: optax.chain(
        optax.clip_by_global_norm(10.0), optax.adam(optax.cosine_decay_schedule(0.01, 1000))
    ),
    "adafactor": lambda: optax.adafactor(0.01, min_dim_size_to_factor=1),
    "accumulation": lambda: optax.MultiSteps(optax.adam(0.01), 2),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.01),
}


def train(net: dict[str, Any], optimizer: mu.Optimizer) -> None:
    optimizer.update(mu.grad(lambda: loss(net), of=net)())


def looped(net: dict[str, Any], optimizer: mu.Optimizer, n: int) -> None:
    mu.for_loop(lambda _: train(net, optimizer), jnp.arange(n))


WAYS: dict[str, Callable[[Any, Any, int], None]] = {
    "eager": lambda net, optimizer, n: [train(net, optimizer) for _ in range(n)] and None,
    "jit": lambda net, optimizer, n: [mu.jit(train)(net, optimizer) for _ in range(n)] and None,
    "for_loop in jit": lambda net, optimizer, n: mu.jit(looped, static_argnums=2)(net, optimizer, n),
}


@pytest.mark.parametrize("tx", TXS.values(), ids=TXS)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_moments_are_kept(tx: Callable[[], Any], way: Callable[[Any, Any, int], None]) -> None:
    net = model()
    optimizer = mu.Optimizer(net, tx())
    way(net, optimizer, 4)
    names = [*optimizer.state]
    moments = {name: state.value for name, state in optimizer.state.items() if "head" in name}
    assert moments
    head = np.asarray(net["head"])
    mu.freeze(net, Head)
    way(net, optimizer, 2)
    np.testing.assert_array_equal(net["head"], head)
    for name, before in moments.items():
        np.testing.assert_array_equal(optimizer.state[name], before, name)
    mu.thaw(net, Head)
    assert [*optimizer.state] == names
    way(net, optimizer, 2)
    assert not np.array_equal(net["head"], head)
    assert [*optimizer.state] == names


@pytest.mark.parametrize("tx", [lambda: optax.adam(0.01), lambda: optax.sgd(0.01, momentum=0.9)])
def test_steps_are_as_long_as_before(tx: Callable[[], Any]) -> None:
    net = model()
    optimizer = mu.Optimizer(net, tx())
    step = mu.jit(lambda: train(net, optimizer))

    def length() -> float:
        before = net["head"].value
        step()
        return float(jnp.abs(net["head"].value - before).max())

    for _ in range(2000):
        step()
    before = length()
    with mu.freeze(net, Head):
        for _ in range(10):
            step()
    assert [length(), length()] == pytest.approx([before, before], rel=0.01)


def test_frozen_from_the_start_gets_moments_when_it_is_thawed() -> None:
    net = model()
    mu.freeze(net, Head)
    optimizer = mu.Optimizer(net, optax.adam(0.01))
    train(net, optimizer)
    assert not any("head" in name for name in optimizer.state)
    mu.thaw(net, Head)
    train(net, optimizer)
    np.testing.assert_allclose(net["head"], -0.01, rtol=0.5)
    assert any("head" in name for name in optimizer.state)


def test_a_state_that_is_gone_loses_its_moments_and_a_frozen_one_does_not() -> None:
    net = {**model(), "more": mu.Param(jnp.zeros(3))}
    optimizer = mu.Optimizer(net, optax.adam(0.01))
    mu.freeze(net, Head)
    del net["more"]
    train(net, optimizer)
    assert {name.rpartition(".")[2] for name in optimizer.state} == {"count", "body", "head"}


def test_everything_frozen() -> None:
    net = model()
    optimizer = mu.Optimizer(net, optax.adam(0.01))
    train(net, optimizer)
    with mu.freeze(net):
        optimizer.update({})
    train(net, optimizer)
    assert int(optimizer.step) == 3


def test_a_frozen_state_in_a_checkpoint_of_the_optimizer() -> None:
    net = model()
    optimizer = mu.Optimizer(net, optax.adam(0.01))
    train(net, optimizer)
    mu.freeze(net, Head)
    train(net, optimizer)
    other = mu.clone((net, optimizer))
    mu.thaw(other, Head)
    mu.thaw(net, Head)
    train(net, optimizer)
    train(*other)
    jax.tree.map(np.testing.assert_array_equal, mu.state((net, optimizer)), mu.state(other))
