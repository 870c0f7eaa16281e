"""`Linear` and `Conv` beside plain NumPy and JAX, the numbers of Flax, sizes that are left out, and bad input."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import initializers

import mutatis as mu
from mutatis import nn
from mutatis.errors import ArgumentError, DeferredStateError, FrozenStateError, RandomStreamError

EAGER_AND_JIT = pytest.mark.parametrize("transform", [lambda f: f, mu.jit], ids=["eager", "jit"])


def waves(*shape: int) -> jax.Array:
    return jnp.sin(jnp.arange(np.prod(shape), dtype=jnp.float32)).reshape(shape)


# -- the same as by hand -----------------------------------------------------------------------------------------


@EAGER_AND_JIT
@pytest.mark.parametrize("batch", [(), (2,), (2, 3), (0,)])
@pytest.mark.parametrize("use_bias", [True, False])
def test_linear(transform: Callable[..., Any], batch: tuple[int, ...], use_bias: bool) -> None:
    layer = nn.Linear(5, 4, use_bias=use_bias, bias_init=initializers.normal(1.0), rngs=mu.Rngs(0))
    x = waves(*batch, 5)
    wanted = np.asarray(x) @ np.asarray(layer.kernel) + (np.asarray(layer.bias) if use_bias else 0)
    np.testing.assert_allclose(transform(layer)(x), wanted, rtol=1e-5, atol=1e-6)
    assert len(mu.state(layer, mu.Param)) == 1 + use_bias


def convolve(x: np.ndarray, kernel: np.ndarray, strides: Any, pads: Any, dilation: Any, groups: int) -> np.ndarray:
    """A convolution as a sum over the kernel's places; spatial axes 1 and 2."""
    x = np.pad(x, [(0, 0), *pads, (0, 0)])
    reach = [(size - 1) * d for size, d in zip(kernel.shape[:2], dilation, strict=True)]
    sizes = [(n - r - 1) // s + 1 for n, r, s in zip(x.shape[1:3], reach, strides, strict=True)]
    inputs, outputs = kernel.shape[2], kernel.shape[3] // groups
    y = np.zeros((len(x), *sizes, kernel.shape[3]))
    for i, j in np.ndindex(*kernel.shape[:2]):
        rows = i * dilation[0] + strides[0] * np.arange(sizes[0])
        columns = j * dilation[1] + strides[1] * np.arange(sizes[1])
        seen = x[:, rows][:, :, columns]
        for g in range(groups):
            into, out = slice(g * inputs, (g + 1) * inputs), slice(g * outputs, (g + 1) * outputs)
            y[..., out] += seen[..., into] @ kernel[i, j, :, out]
    return y


@EAGER_AND_JIT
@pytest.mark.parametrize(
    ("options", "strides", "pads", "dilation", "groups"),
    [
        ({}, (1, 1), [(1, 1), (0, 1)], (1, 1), 1),
        ({"strides": 2, "padding": "VALID"}, (2, 2), [(0, 0), (0, 0)], (1, 1), 1),
        ({"strides": (1, 2), "padding": 1}, (1, 2), [(1, 1), (1, 1)], (1, 1), 1),
        ({"padding": [(2, 0), 1], "kernel_dilation": (2, 1)}, (1, 1), [(2, 0), (1, 1)], (2, 1), 1),
        ({"padding": (0, 1), "feature_group_count": 2}, (1, 1), [(0, 0), (1, 1)], (1, 1), 2),
    ],
)
def test_conv(transform: Callable[..., Any], options: Any, strides: Any, pads: Any, dilation: Any, groups: int) -> None:
    layer = nn.Conv(4, 6, kernel_size=(3, 2), bias_init=initializers.normal(1.0), rngs=mu.Rngs(0), **options)
    x = waves(2, 7, 6, 4)
    wanted = convolve(np.asarray(x), np.asarray(layer.kernel), strides, pads, dilation, groups) + np.asarray(layer.bias)
    np.testing.assert_allclose(transform(layer)(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3), (0,)])
def test_conv_takes_any_batch_axes(batch: tuple[int, ...]) -> None:
    layer = nn.Conv(2, 3, kernel_size=3, input_dilation=2, padding=1, rngs=mu.Rngs(0))
    x = waves(*batch, 4, 2)
    y = layer(x)
    assert y.shape == (*batch, 7, 3)
    np.testing.assert_array_equal(y.reshape(-1, 7, 3), layer(x.reshape(-1, 4, 2)))


def test_gradient() -> None:
    layer = nn.Linear(3, 2, rngs=mu.Rngs(0))
    x = waves(4, 3)
    gradient = mu.grad(lambda m: jnp.sum(m(x) ** 2))(layer)
    by_hand = jax.grad(lambda w, b: jnp.sum((x @ w + b[None]) ** 2), (0, 1))(layer.kernel.value, layer.bias.value)
    np.testing.assert_allclose(gradient["kernel"], by_hand[0], rtol=1e-6)
    np.testing.assert_allclose(gradient["bias"], by_hand[1], rtol=1e-6)


def test_dtypes() -> None:
    narrow = nn.Linear(3, 2, dtype=jnp.bfloat16, rngs=mu.Rngs(0))
    assert narrow.kernel.dtype == jnp.float32 and narrow(waves(1, 3)).dtype == jnp.bfloat16
    stored = nn.Conv(3, 2, kernel_size=2, param_dtype=jnp.float16, rngs=mu.Rngs(0))
    assert {cell.dtype for cell in mu.variables(stored).values()} == {jnp.dtype(jnp.float16)}
    assert stored(waves(5, 3).astype(jnp.float16)).dtype == jnp.float16
    assert nn.Linear(3, 2, dtype=jnp.float32, rngs=mu.Rngs(0))(jnp.arange(3)).dtype == jnp.float32


# Flax 0.12.8 on JAX 0.10.2: nnx.Linear and nnx.Conv of the same arguments, in this order, from nnx.Rngs(0).
def test_numbers_of_flax() -> None:
    rngs = mu.Rngs(0)
    linear, conv = nn.Linear(3, 2, rngs=rngs), nn.Conv(2, 3, (3, 3), strides=2, rngs=rngs)
    x = jnp.arange(6.0).reshape(2, 3) / 3
    np.testing.assert_allclose(linear(x), [[-0.51404428, 0.00624381], [-0.89946872, -0.90179032]], rtol=1e-5)
    y = conv(waves(2, 4, 5, 2))
    assert y.shape == (2, 2, 3, 3)
    np.testing.assert_allclose(y[0, 0, 0], [-0.28688177, 0.03851434, 1.16562915], rtol=1e-5)
    np.testing.assert_allclose(y[1, 1, 2], [-0.08326373, 0.07728288, -0.02784407], rtol=1e-5)
    causal = nn.Conv(
        4, 4, 2, padding=((1, 0),), kernel_dilation=2, feature_group_count=2, use_bias=False, rngs=mu.Rngs(1)
    )
    wanted = [0.20195275, -0.691917, 0.35151759, 0.23238261]
    np.testing.assert_allclose(causal(waves(1, 5, 4))[0, :, 0], wanted, rtol=1e-5)


# -- sizes that are left out ---------------------------------------------------------------------------------------


def make(kind: str, inputs: int | None, seed: int = 0) -> Any:
    rngs = mu.Rngs(seed)
    return nn.Linear(inputs, 3, rngs=rngs) if kind == "Linear" else nn.Conv(inputs, 3, (2, 2), rngs=rngs)


KINDS = pytest.mark.parametrize("kind", ["Linear", "Conv"])


@KINDS
@EAGER_AND_JIT
def test_size_from_the_first_input(kind: str, transform: Callable[..., Any]) -> None:
    waiting, given = make(kind, None), make(kind, 5)
    assert waiting.kernel.deferred and not waiting.bias.deferred
    x = waves(2, 4, 4, 5)
    first = transform(waiting)(x)
    assert mu.state(waiting) == mu.state(given)
    np.testing.assert_array_equal(first, transform(given)(x))


def test_waiting_layers_share_programs_not_numbers(traces: Any) -> None:
    body = traces.count(lambda layer, x: layer(x))
    call = mu.jit(body)
    layers = [make("Linear", None, seed) for seed in range(2)]
    for layer in layers:
        for _ in range(2):
            call(layer, waves(1, 5))
    assert traces.total == 2  # waiting, and made
    assert not np.array_equal(layers[0].kernel, layers[1].kernel)


def test_failing_first_call_leaves_the_layer_waiting() -> None:
    layer = make("Linear", None)

    @mu.jit
    def fail(x: jax.Array) -> None:
        layer(x)
        raise KeyError

    with pytest.raises(KeyError):
        fail(waves(1, 5))
    assert layer.kernel.deferred
    assert layer(waves(1, 7)).shape == (1, 3)


def test_waiting_layers_copy_and_pickle() -> None:
    layer = make("Linear", None)
    copies = [mu.clone(layer), pickle.loads(pickle.dumps(layer)), mu.eval_shape(lambda: make("Linear", None))]
    for copied in copies[:2]:
        np.testing.assert_array_equal(copied(waves(1, 5)), make("Linear", 5)(waves(1, 5)))
    assert layer.kernel.deferred and copies[2].kernel.deferred


@pytest.mark.parametrize("use", [lambda m: m.kernel.value, mu.grad(lambda m: jnp.sum(m(waves(1, 5))))])
def test_waiting_parameters_cannot_be_used(use: Callable[..., Any]) -> None:
    layer = make("Linear", None)
    with pytest.raises(DeferredStateError, match=r"(?s)kernel.*[Cc]all the model once"):
        use(layer)
    layer(waves(1, 5))
    use(layer)


def test_frozen_layers_run_and_cannot_be_created() -> None:
    layer, waiting = mu.nn.Linear(5, 3, rngs=mu.Rngs(0)), make("Linear", None)
    mu.freeze([layer, waiting])
    assert layer(waves(1, 5)).shape == (1, 3)
    with pytest.raises(FrozenStateError):
        waiting(waves(1, 5))
    mu.thaw(waiting)
    waiting(waves(1, 5))


# -- bad input -----------------------------------------------------------------------------------------------------


class Net(mu.Module):
    def __init__(self) -> None:
        self.layers = [nn.Linear(5, 3, rngs=mu.Rngs(0))]

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layers[0](x)


def test_wrong_number_of_features() -> None:
    with pytest.raises(ArgumentError) as caught:
        mu.jit(lambda net, x: net(x))(Net(), waves(2, 4))
    error = caught.value
    assert error.path == "net.layers[0].kernel"
    assert str(error).splitlines()[:3] == [
        "state `net.layers[0].kernel` (Param) does not fit the input of its layer "
        "inside `jit(lambda in test_wrong_number_of_features)`",
        "  expected: 1 or more axes, with 5 features along axis -1",
        "  got:      an input of shape (2, 4)",
    ]
    assert "in Net.__init__" in str(error)


@pytest.mark.parametrize(
    ("make", "shape", "text"),
    [
        (lambda: nn.Linear(None, 3, rngs=mu.Rngs(0)), (), r"(?s)expected: 1 or more axes\n.*shape \(\)"),
        (lambda: nn.Conv(4, 3, (2, 2), rngs=mu.Rngs(0)), (2, 4), r"(?s)3 or more axes, with 4 features.*\(2, 4\)"),
        (lambda: nn.Conv(4, 4, 3, feature_group_count=2, rngs=mu.Rngs(0)), (5, 2), r"(?s)4 features.*\(5, 2\)"),
        (lambda: nn.Conv(None, 4, 3, feature_group_count=2, rngs=mu.Rngs(0)), (5, 3), "into 2 groups"),
    ],
)
def test_inputs_that_do_not_fit(make: Callable[[], Any], shape: tuple[int, ...], text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        make()(waves(*shape))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"strides": (1, 1, 1)}, "2 spatial axes, and `strides` is for 3"),
        ({"padding": [1]}, "2 spatial axes, and `padding` is for 1"),
        ({"padding": "same"}, "padding 'same'"),
        ({"padding": "SAME", "input_dilation": 2}, "padding 'SAME' of a dilated input"),
        ({"feature_group_count": 3}, "into 3 groups"),
    ],
)
def test_settings_that_do_not_fit(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        nn.Conv(4, 3, kernel_size=(2, 2), rngs=mu.Rngs(0), **options)


@pytest.mark.parametrize("rngs", [None, 0, jax.random.key(0), mu.Rngs(dropout=0)], ids=["None", "int", "key", "other"])
def test_streams_that_do_not_fit(rngs: Any) -> None:
    with pytest.raises(RandomStreamError, match="param") as caught:
        nn.Linear(4, 3, rngs=rngs)
    assert "mu.Rngs(" in str(caught.value)
