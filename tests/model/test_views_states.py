"""`mu.view(model, states=...)`: a model evaluated with other values."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis.errors import StateTypeError
from tests.nets import Layers

X = jnp.sin(jnp.arange(12.0)).reshape(4, 3)


def make(seed: int = 0) -> Layers:
    return Layers(mu.Rngs(seed), rate=0.0, features=3)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "give",
    [
        lambda other: mu.state(other, mu.Param),
        lambda other: mu.state(other, mu.Param).to_pure_dict(),
        lambda other: mu.variables(other, mu.Param),
        lambda other: dict(mu.state(other, mu.Param).flat()),
    ],
    ids=["State", "nested", "variables", "flat"],
)
def test_other_parameters(give: Any, compiled: bool) -> None:
    net, other = make(), make(1)
    before = mu.state(net)
    viewed = mu.view(net, states=give(other), training=False)
    run = mu.jit(lambda net: net(X)) if compiled else lambda net: net(X)
    np.testing.assert_allclose(run(viewed), mu.view(other, training=False)(X), rtol=1e-6)
    assert viewed.layers[1].mean is net.layers[1].mean and viewed.tied is viewed.layers[0]
    assert {path: value for path, value in mu.state(net).flat().items() if path != ("calls",)} == {
        path: value for path, value in before.flat().items() if path != ("calls",)
    }
    assert net.training


def test_states_of_another_model_are_seen_not_copied() -> None:
    net, other = make(), make(1)
    viewed = mu.view(net, states=other)
    assert viewed.layers[0].kernel is other.layers[0].kernel and type(viewed) is Layers
    other.layers[0].kernel.value = jnp.zeros((3, 4))
    np.testing.assert_allclose(viewed.features(X), other.features(X))
    viewed.layers[0].bias.value = jnp.ones(4)
    assert float(other.layers[0].bias[0]) == 1 and float(net.layers[0].bias[0]) == 0


def test_values_go_to_states_of_the_views_own() -> None:
    net = make()
    viewed = mu.view(net, states={"layers": {0: {"bias": jnp.ones(4)}}})
    viewed.layers[0].bias.value += 1
    assert float(net.layers[0].bias[0]) == 0 and float(viewed.layers[0].bias[0]) == 2
    assert type(viewed.layers[0].bias) is mu.Param and viewed.layers[0].kernel is net.layers[0].kernel


def test_a_gradient_at_other_values() -> None:
    net, other = make(), make(1)
    values = mu.state(other, mu.Param)

    def loss(values: Any) -> Any:
        return jnp.sum(mu.view(net, states=values).features(X) ** 2)

    got = mu.jit(jax.grad(loss))(values)
    wanted = mu.grad(lambda net: jnp.sum(net.features(X) ** 2))(other)
    np.testing.assert_allclose(got["layers", 0, "kernel"], wanted["layers", 0, "kernel"], rtol=1e-5)


def test_states_that_do_not_fit() -> None:
    net = make()
    with pytest.raises(StateTypeError) as caught:
        mu.view(net, states={"layers": {0: {"bias": jnp.ones(5), "kernle": jnp.ones(3)}}})
    text = str(caught.value)
    assert "layers[0].bias: expected float32[4], got float32[5]" in text
    assert "unexpected: layers[0].kernle (nearest: layers[0].kernel)" in text
