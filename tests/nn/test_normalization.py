"""`BatchNorm` beside the same written by hand, in every mode and along every axis, and its statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import initializers

import mutatis as mu
from mutatis import nn
from mutatis.errors import ArgumentError, AxisError, FrozenStateError, RandomStreamError

pytestmark = pytest.mark.once

EAGER_AND_JIT = pytest.mark.parametrize("transform", [lambda f: f, mu.jit], ids=["eager", "jit"])


def noise(*shape: int, seed: int = 0) -> jax.Array:
    return 3 + 2 * jax.random.normal(jax.random.key(seed), shape)


def normalize(x: Any, mean: Any, var: Any, epsilon: float = 1e-5) -> Any:
    return (x - mean) / np.sqrt(var + epsilon)


# -- the same as by hand -------------------------------------------------------------------------------------------


@EAGER_AND_JIT
@pytest.mark.parametrize(("shape", "axis"), [((6, 4), -1), ((2, 3, 5, 4), -1), ((2, 4, 5), 1), ((4,), 0)])
def test_train_and_eval(transform: Callable[..., Any], shape: tuple[int, ...], axis: int) -> None:
    norm = nn.BatchNorm(4, momentum=0.8, epsilon=1e-3, axis=axis)
    norm.scale.value, norm.bias.value = jnp.arange(1.0, 5.0), jnp.arange(4.0)
    call = transform(norm)
    across = [1] * len(shape)
    across[axis] = 4
    others = tuple(a for a in range(len(shape)) if a != axis % len(shape))
    scale, bias = np.arange(1.0, 5.0).reshape(across), np.arange(4.0).reshape(across)
    mean, var = np.zeros(4), np.ones(4)
    for seed in range(3):
        x = np.asarray(noise(*shape, seed=seed))
        batch_mean, batch_var = x.mean(others), x.var(others)
        wanted = normalize(x, batch_mean.reshape(across), batch_var.reshape(across), 1e-3) * scale + bias
        np.testing.assert_allclose(call(x), wanted, rtol=1e-4, atol=1e-4)
        mean, var = 0.8 * mean + 0.2 * batch_mean, 0.8 * var + 0.2 * batch_var
        np.testing.assert_allclose(norm.mean, mean, rtol=1e-5)
        np.testing.assert_allclose(norm.var, var, rtol=1e-5, atol=1e-6)
    norm.eval()
    wanted = normalize(x, mean.reshape(across), var.reshape(across), 1e-3) * scale + bias
    np.testing.assert_allclose(call(x), wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(norm.mean, mean, rtol=1e-5)


def test_gradient_and_one_update() -> None:
    norm, x = nn.BatchNorm(3), noise(8, 3)
    target = noise(8, 3, seed=1)

    def by_hand(scale: jax.Array, bias: jax.Array, x: jax.Array) -> jax.Array:
        mean, var = x.mean(0, keepdims=True), x.var(0, keepdims=True)
        return jnp.sum(((x - mean) / jnp.sqrt(var + 1e-5) * scale[None] + bias[None] - target) ** 2)

    of_model, of_x = mu.grad(lambda m, x: jnp.sum((m(x) - target) ** 2), argnums=(0, 1))(norm, x)
    wanted = jax.grad(by_hand, (0, 1, 2))(jnp.ones(3), jnp.zeros(3), x)
    assert [*of_model] == [("bias",), ("scale",)]
    for got, want in zip((of_model["scale"], of_model["bias"], of_x), wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(norm.mean, 0.01 * x.mean(0), rtol=1e-5)


def test_lanes_average_their_statistics() -> None:
    whole, lanes = nn.BatchNorm(4), nn.BatchNorm(4, axis_name="lanes")
    x = noise(12, 4)
    y = mu.vmap(lambda part: lanes(part), axis_name="lanes")(x.reshape(3, 4, 4))
    np.testing.assert_allclose(y.reshape(12, 4), whole(x), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lanes.mean, whole.mean, rtol=1e-6)
    np.testing.assert_allclose(lanes.var, whole.var, rtol=1e-6)


def test_lanes_that_do_not_exist() -> None:
    norm = nn.BatchNorm(4, axis_name="lanes")
    with pytest.raises(AxisError, match=r"(?s)mean.*axis `lanes` that does not exist.*axis_name='lanes'\)"):
        norm(noise(3, 4))
    assert norm(noise(3, 4), use_running_average=True).shape == (3, 4)


# Flax 0.12.8 on JAX 0.10.2: nnx.BatchNorm(2, momentum=0.9), train and then eval.
def test_numbers_of_flax() -> None:
    norm = nn.BatchNorm(2, momentum=0.9)
    x = jnp.sin(jnp.arange(8.0)).reshape(4, 2)
    trained = [[0.0522762, 0.9581866], [1.5503653, -0.0414548], [-1.1945741, -1.6115959], [-0.4080675, 0.6948641]]
    np.testing.assert_allclose(norm(x), trained, atol=1e-6)
    np.testing.assert_allclose([norm.mean, norm.var], [[-0.003173, 0.0170163], [0.9368404, 0.9490833]], atol=1e-6)
    evaluated = [[0.0032782, 0.8462765], [0.942722, 0.1273885], [-0.778615, -1.0017722], [-0.2854009, 0.6569092]]
    np.testing.assert_allclose(norm(x, use_running_average=True), evaluated, atol=1e-6)


@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_large_means_do_not_cancel(shift: float) -> None:
    x = np.asarray(noise(1000, 1)) + shift
    norm = nn.BatchNorm(1, momentum=0.0)
    norm(x)
    np.testing.assert_allclose(norm.var, x.astype(np.float64).var(0), rtol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_inputs_have_wide_statistics(dtype: Any) -> None:
    norm = nn.BatchNorm(4, dtype=dtype, param_dtype=dtype)
    x = noise(64, 4).astype(dtype)
    y = norm(x)
    assert (y.dtype, norm.scale.dtype, norm.mean.dtype) == (dtype, dtype, jnp.float32)
    np.testing.assert_allclose(norm.mean, 0.01 * np.asarray(x, np.float32).mean(0), rtol=1e-6)
    assert nn.BatchNorm(4, dtype=dtype)(noise(8, 4).astype(dtype)).dtype == dtype


# -- modes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said_in_call", [None, False, True])
@pytest.mark.parametrize("said_in_init", [None, False, True])
@pytest.mark.parametrize("training", [True, False])
def test_who_decides(said_in_call: bool | None, said_in_init: bool | None, training: bool) -> None:
    norm = nn.BatchNorm(2, use_running_average=said_in_init)
    norm.training = training
    norm(noise(4, 2), use_running_average=said_in_call)
    said = [said for said in (said_in_call, said_in_init, not training) if said is not None]
    assert np.array_equal(norm.mean, [0, 0]) == said[0]


def test_view_serves_beside_training() -> None:
    norm = nn.BatchNorm(2)
    served = mu.view(norm, training=False)
    mu.jit(norm)(noise(4, 2))
    before = np.asarray(norm.mean)
    np.testing.assert_allclose(mu.jit(served)(before[None]), np.zeros((1, 2)), atol=1e-6)
    np.testing.assert_array_equal(norm.mean, before)


@EAGER_AND_JIT
def test_frozen_statistics(transform: Callable[..., Any]) -> None:
    norm = nn.BatchNorm(2)
    call = transform(lambda x: norm(x))
    mu.freeze(norm, mu.BatchStat)
    with pytest.raises(FrozenStateError, match=r"(?s)\.mean` \(BatchStat\) was written.*`model.eval\(\)`"):
        call(noise(4, 2))
    norm.eval()
    assert call(noise(4, 2)).shape == (4, 2)
    norm.train()
    mu.thaw(norm)
    call(noise(4, 2))
    assert not np.array_equal(norm.mean, [0, 0])


# -- parameters and statistics ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("use_scale", "use_bias"), [(True, False), (False, True), (False, False)])
def test_without_parameters(use_scale: bool, use_bias: bool) -> None:
    norm = nn.BatchNorm(2, use_scale=use_scale, use_bias=use_bias)
    assert [path for (path,) in mu.variables(norm, mu.Param)] == ["bias"] * use_bias + ["scale"] * use_scale
    np.testing.assert_allclose(norm(noise(5, 2)), nn.BatchNorm(2)(noise(5, 2)), rtol=1e-6)


@EAGER_AND_JIT
def test_size_from_the_first_input(transform: Callable[..., Any]) -> None:
    waiting, given = nn.BatchNorm(None), nn.BatchNorm(3)
    x = noise(5, 3)
    np.testing.assert_array_equal(transform(waiting)(x), transform(given)(x))
    assert mu.state(waiting) == mu.state(given)
    with pytest.raises(ArgumentError, match=r"(?s)mean.*3 features along axis -1.*\(5, 4\)"):
        waiting(noise(5, 4))


@pytest.mark.parametrize("features", [3, None])
def test_reset(features: int | None) -> None:
    norm, fresh = nn.BatchNorm(features), nn.BatchNorm(3)
    norm(noise(5, 3))
    norm.scale.value = 2 * jnp.ones(3)
    mu.reset(norm, mu.BatchStat)
    norm(noise(5, 3, seed=1))
    fresh(noise(5, 3, seed=1))
    assert mu.state(norm, mu.BatchStat) == mu.state(fresh, mu.BatchStat)
    np.testing.assert_array_equal(norm.scale, 2 * np.ones(3))


def test_initializers_that_draw_need_streams() -> None:
    with pytest.raises(RandomStreamError, match=r"rngs = mu.Rngs\(0\)"):
        nn.BatchNorm(3, scale_init=initializers.normal())
    norm = nn.BatchNorm(3, scale_init=initializers.normal(), rngs=mu.Rngs(0))
    assert len(set(np.asarray(norm.scale).tolist())) == 3


def test_no_such_axis() -> None:
    with pytest.raises(ArgumentError, match=r"(?s)features along axis 2.*\(5, 3\)"):
        nn.BatchNorm(3, axis=2)(noise(5, 3))


@pytest.mark.parametrize("transform", [lambda f: f, mu.jit], ids=["eager", "jit"])
def test_a_batch_that_is_all_padding(transform: Callable[..., Any]) -> None:
    layer = nn.BatchNorm(3, momentum=0.5)
    x = jnp.arange(12.0).reshape(4, 3)
    call = transform(lambda layer, x, mask: layer(x, mask=mask))
    y = call(layer, x, jnp.zeros((4, 1)))
    assert bool(jnp.all(jnp.isfinite(y)))
    np.testing.assert_array_equal(layer.mean, jnp.zeros(3))
    np.testing.assert_array_equal(layer.var, jnp.ones(3))
    features = jnp.array([[1.0, 0.0, 1.0]])  # of the second nothing is known
    call(layer, x, features)
    np.testing.assert_allclose(layer.mean, [2.25, 0.0, 3.25])
    np.testing.assert_allclose(layer.var[1], 1.0)
    grads = mu.grad(lambda layer: jnp.sum(layer(x, mask=jnp.zeros((4, 1)))))(layer)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(grads))


def test_lanes_of_which_some_are_padding() -> None:
    layer, whole = nn.BatchNorm(2, axis_name="lanes"), nn.BatchNorm(2)
    x, mask = jnp.arange(12.0).reshape(2, 3, 2), jnp.array([[0.0, 0, 0], [1, 1, 0]])[..., None]
    mu.vmap(lambda x, mask: layer(x, mask=mask), axis_name="lanes")(x, mask)
    whole(x, mask=mask)
    np.testing.assert_allclose(layer.mean, whole.mean, rtol=1e-6)
    np.testing.assert_allclose(layer.var, whole.var, rtol=1e-5)
    mu.vmap(lambda x, mask: layer(x, mask=mask), axis_name="lanes")(x, mask * 0)
    np.testing.assert_allclose(layer.mean, whole.mean, rtol=1e-6)


def test_axes_that_are_not_there() -> None:
    x = jnp.ones((2, 4))
    for use in (
        lambda: nn.LayerNorm(4, reduction_axes=2, rngs=mu.Rngs(0))(x),
        lambda: nn.RMSNorm(4, reduction_axes=-3, rngs=mu.Rngs(0))(x),
        lambda: nn.WeightNorm(nn.Linear(4, 2, rngs=mu.Rngs(0)), feature_axes=2, rngs=mu.Rngs(0))(x),
    ):
        with pytest.raises(ArgumentError, match="there is no axis"):
            use()
