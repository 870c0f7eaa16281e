"""`mu.optim.EMA` beside optax, as states of a step and without copies; and `optimizer.opt_state`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mutatis as mu
from mutatis.errors import ArgumentError, OptimizerError
from tests.nets import Layers

X = jnp.sin(jnp.arange(12.0)).reshape(4, 3)


def make() -> Layers:
    return Layers(mu.Rngs(0), rate=0.0, features=3)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "decay", [0.9, lambda step: jnp.minimum(0.9, (1 + step) / (10 + step))], ids=["number", "schedule"]
)
def test_beside_one_by_hand(decay: Any, compiled: bool) -> None:
    net = make()
    ema = mu.optim.EMA(net, decay)
    wanted = mu.state(net, mu.Param)

    def step(k: Any) -> None:
        for cell in mu.variables(net, mu.Param).values():
            cell.value = cell.value + k
        ema.update()

    run = mu.jit(step) if compiled else step
    for k in range(3):
        run(jnp.float32(k))
        d = decay(k) if callable(decay) else decay
        wanted = jax.tree.map(lambda old, new, d=d: d * old + (1 - d) * new, wanted, mu.state(net, mu.Param))
    averaged = mu.view(net, states=ema, training=False)
    for path, value in wanted.flat().items():
        np.testing.assert_allclose(mu.variables(averaged)[path].value, value, rtol=1e-5)
    assert int(ema.step) == 3


def test_a_view_sees_each_update_and_nothing_is_copied() -> None:
    net = make()
    ema = mu.optim.EMA(net, 0.5)
    averaged = mu.view(net, states=ema)
    assert averaged.layers[0].kernel is ema.state["layers[0].kernel"]
    before = averaged.features(X)
    step = mu.jit(lambda: (net.layers[0].kernel.set(net.layers[0].kernel.value + 1), ema.update()))
    for _ in range(3):
        step()
    assert not np.allclose(averaged.features(X), before)


def test_states_that_appear_and_vanish() -> None:
    net: Any = mu.Module()
    net.a = mu.Param(1.0)
    ema = mu.optim.EMA(net, 0.5)
    net.b = mu.Param(4.0)
    ema.update()
    net.a.value, net.b.value = 3.0, 2.0
    ema.update()
    assert {name: float(cell) for name, cell in ema.state.items()} == {"a": 2.0, "b": 3.0}
    del net.a
    ema.update()
    assert [*ema.state] == ["b"]


def test_statistics_too_and_saved_with_the_step(tmp_path: Any) -> None:
    net = make()
    ema = mu.optim.EMA(net, 0.5, wrt=(mu.Param, mu.BatchStat))
    net(X)
    ema.update()
    assert "layers[1].mean" in ema.state and "calls" not in ema.state
    mu.checkpoint.save(tmp_path / "ema", (net, ema))
    other = make()
    again = mu.optim.EMA(other, 0.5, wrt=(mu.Param, mu.BatchStat))
    mu.checkpoint.restore(tmp_path / "ema", (other, again))
    assert mu.state(again) == mu.state(ema)


@pytest.mark.parametrize("decay", [1.5, -1, "0.9", None])
def test_no_decay(decay: Any) -> None:
    with pytest.raises(ArgumentError, match="cannot decay by"):
        mu.optim.EMA(make(), decay)


# -- optax's own state -----------------------------------------------------------------------------------------------------


@jax.numpy_dtype_promotion("standard")  # optax promotes
def test_opt_state_is_that_of_optax() -> None:
    w = mu.Param(jnp.array([1.0, 2.0]))
    optimizer = mu.Optimizer(w, optax.inject_hyperparams(optax.adam)(learning_rate=0.1))
    mu.jit(lambda: optimizer.update(mu.grad(lambda: jnp.sum(w.value**2), of=w)()))()
    assert int(optax.tree.get(optimizer.opt_state.inner_state, "count")) == 1
    np.testing.assert_allclose(optax.tree.get(optimizer.opt_state, "mu")[()], [0.2, 0.4], rtol=1e-5)
    optimizer.opt_state = optax.tree.set(optimizer.opt_state, learning_rate=jnp.float32(0.0))
    before = w.value
    optimizer.update(mu.grad(lambda: jnp.sum(w.value**2), of=w)())
    np.testing.assert_array_equal(w.value, before)


def test_an_opt_state_that_does_not_fit() -> None:
    optimizer = mu.Optimizer(mu.Param(jnp.ones(2)), optax.adam(0.1))
    before = mu.state(optimizer)
    other = mu.Optimizer(mu.Param(jnp.ones(3)), optax.adam(0.1))
    for wrong in (None, other.opt_state, optax.sgd(0.1).init(1.0)):
        with pytest.raises(OptimizerError, match="not what the optimizer keeps"):
            optimizer.opt_state = wrong
    assert mu.state(optimizer) == before


@pytest.mark.parametrize("features", [8, 3])
def test_a_layer_that_was_replaced(features: int) -> None:
    model = {"head": mu.nn.Linear(4, 1, rngs=mu.Rngs(0))}
    averages = mu.optim.EMA(model)
    model["head"] = mu.nn.Linear(4, features, rngs=mu.Rngs(0))
    with pytest.raises(
        mu.errors.StateTypeError, match=r"(?s)average of state `head\.(bias|kernel)`.*make the averages anew"
    ):
        averages.update()
