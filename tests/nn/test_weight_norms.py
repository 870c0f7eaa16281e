"""`SpectralNorm` and `WeightNorm` lend a layer other weights for a call; its own stay, whatever happens in the call."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import nn
from mutatis.errors import ArgumentError, DeferredStateError, FrozenStateError
from tests.nets import Layers

pytestmark = pytest.mark.once  # arithmetic of arrays: what JAX's versions differ in, the tests of transforms show

WRAPPERS = pytest.mark.parametrize("wrapper", [nn.SpectralNorm, nn.WeightNorm])
EAGER_AND_JIT = pytest.mark.parametrize("transform", [lambda f: f, mu.jit], ids=["eager", "jit"])


def wrapped(wrapper: Any, layer: Any = None) -> Any:
    rngs = mu.Rngs(0)
    return wrapper(nn.Linear(4, 3, rngs=rngs) if layer is None else layer, rngs=rngs)


def noise(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), shape)


@EAGER_AND_JIT
def test_spectral_norm_is_one(transform: Any) -> None:
    layer = wrapped(nn.SpectralNorm)
    call = transform(layer)
    for _ in range(30):
        call(noise(1, 4))
    kernel = np.asarray(layer.layer_instance.kernel)
    largest = np.linalg.svd(kernel, compute_uv=False)[0]
    np.testing.assert_allclose(layer.batch_stats["kernel", "sigma"], largest, rtol=1e-4)
    x = noise(2, 4)
    np.testing.assert_allclose(call(x), x @ kernel / largest, rtol=1e-3, atol=1e-4)


@EAGER_AND_JIT
def test_weight_norm_is_the_scale(transform: Any) -> None:
    layer = wrapped(nn.WeightNorm)
    layer.scales["kernel",].value = jnp.array([1.0, 2.0, 3.0])
    kernel, x = np.asarray(layer.layer_instance.kernel), noise(2, 4)
    wanted = np.asarray(x) @ (kernel / np.linalg.norm(kernel, axis=0) * [1, 2, 3])
    np.testing.assert_allclose(transform(layer)(x), wanted, rtol=1e-5, atol=1e-6)


@WRAPPERS
@EAGER_AND_JIT
def test_own_weights_stay(wrapper: Any, transform: Any) -> None:
    layer = wrapped(wrapper)
    before = mu.state(layer, mu.Param)
    transform(layer)(noise(2, 4))
    assert mu.state(layer, mu.Param) == before
    ledger = mu.inspect.ledger(lambda m, x: m(x))(layer, noise(2, 4))
    written = [entry.path for entry in ledger.entries if entry.updates]
    assert written == [f"m.batch_stats[('kernel', '{name}')]" for name in ("sigma", "u") if keeps_statistics(layer)]


def keeps_statistics(layer: Any) -> bool:
    return isinstance(layer, nn.SpectralNorm)


@WRAPPERS
def test_states_inside_go_on(wrapper: Any) -> None:
    """Statistics and streams of what is inside are written as ever, in a compiled step as in plain code."""
    layers = [wrapped(wrapper, Layers(mu.Rngs(0), features=4)) for _ in range(2)]
    x = noise(8, 4)
    for layer, call in zip(layers, (layers[0], mu.jit(layers[1])), strict=True):
        first, second = call(x), call(x)
        assert not np.array_equal(first, second)
        assert int(layer.layer_instance.calls.value) == 2
        assert int(layer.layer_instance.drop.stream.value["count"]) == 2
    for path, value in mu.state(layers[0], mu.Not(mu.RngState)).flat().items():
        np.testing.assert_allclose(value, mu.state(layers[1])[path], rtol=1e-4, atol=1e-5)


@WRAPPERS
def test_an_error_inside_leaves_the_weights(wrapper: Any) -> None:
    layer = wrapped(wrapper)
    before = mu.state(layer, mu.Param)
    with pytest.raises(ArgumentError, match="with 4 features"):
        layer(noise(2, 5))
    assert mu.state(layer, mu.Param) == before


@WRAPPERS
def test_frozen_weights_serve(wrapper: Any) -> None:
    layer = wrapped(wrapper).eval()
    y = layer(noise(2, 4))
    mu.freeze(layer)
    np.testing.assert_allclose(layer(noise(2, 4)), y, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda m, x: m(x))(layer, noise(2, 4)), y, rtol=1e-5)  # as raw JAX may, too
    if keeps_statistics(layer):
        with pytest.raises(FrozenStateError, match=r"model.eval\(\)"):
            layer.train()(noise(2, 4))


@WRAPPERS
def test_under_remat_and_around_one_another(wrapper: Any) -> None:
    layer, x = wrapped(wrapper), noise(2, 4)
    plain = mu.grad(lambda m: jnp.sum(m(x) ** 2))(mu.clone(layer))
    again = mu.grad(lambda m: mu.remat(lambda m, x: jnp.sum(m(x) ** 2))(m, x))(layer)
    for path, value in plain.flat().items():
        np.testing.assert_allclose(value, again[path], rtol=1e-5, atol=1e-6)
    both = wrapped(wrapper, wrapped(nn.WeightNorm))
    assert both(x).shape == (2, 3)


@pytest.mark.parametrize("said_in_call", [None, False, True])
@pytest.mark.parametrize("training", [False, True])
def test_who_decides(said_in_call: bool | None, training: bool) -> None:
    layer = wrapped(nn.SpectralNorm)
    layer.training = training
    before = np.asarray(layer.batch_stats["kernel", "u"])
    layer(noise(2, 4), update_stats=said_in_call)
    said = training if said_in_call is None else said_in_call
    assert np.array_equal(before, layer.batch_stats["kernel", "u"]) is not said


def test_what_does_not_fit() -> None:
    with pytest.raises(ArgumentError, match=r"(?s)kernel.*is no matrix.*\(3, 4, 2\)"):
        nn.SpectralNorm(nn.Conv(4, 2, 3, rngs=mu.Rngs(0)), error_on_non_matrix=True, rngs=mu.Rngs(0))
    for wrapper in (nn.SpectralNorm, nn.WeightNorm):
        with pytest.raises(DeferredStateError, match="kernel"):
            wrapper(nn.Linear(None, 3, rngs=mu.Rngs(0)), rngs=mu.Rngs(0))
        layer = wrapped(wrapper)
        layer.layer_instance = nn.Sequential(nn.Linear(4, 3, rngs=mu.Rngs(0)))
        with pytest.raises(ArgumentError, match=r"weight `layers\[0\].kernel`"):
            layer(noise(2, 4))


def test_further_inputs_of_the_layer() -> None:
    attention = nn.MultiHeadAttention(2, 8, rngs=mu.Rngs(0))
    layer = nn.SpectralNorm(attention, rngs=mu.Rngs(1)).eval()
    x, others = jnp.ones((1, 3, 8)), jnp.arange(40.0).reshape(1, 5, 8) / 40
    assert layer(x, inputs_k=others).shape == (1, 3, 8)
    assert not jnp.allclose(layer(x, inputs_k=others), layer(x))
    with pytest.raises(ArgumentError, match="whether to keep its statistics") as caught:
        layer(x, others)
    assert "inputs_k=keys" in str(caught.value)
