"""`Linear`, `LinearGeneral`, `Einsum` and `Conv` beside plain NumPy and JAX; sizes that are left out, and bad input."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.nn import initializers
from jax.sharding import NamedSharding, PartitionSpec

import mutatis as mu
from mutatis import nn
from mutatis.errors import ArgumentError, DeferredStateError, FrozenStateError, RandomStreamError

pytestmark = pytest.mark.once

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


def test_settings_of_the_product() -> None:
    seen: list[Any] = []

    def counted(*args: Any, **kwargs: Any) -> jax.Array:
        seen.append(kwargs)
        return lax.dot_general(*args, **kwargs)

    x = waves(2, 3)
    plain = nn.Linear(3, 2, rngs=mu.Rngs(0))
    for layer in (
        nn.Linear(3, 2, dot_general=counted, rngs=mu.Rngs(0)),
        nn.LinearGeneral(3, 2, dot_general=counted, rngs=mu.Rngs(0)),
        nn.LinearGeneral(3, 2, dot_general_cls=lambda: counted, rngs=mu.Rngs(0)),
        nn.Einsum("...a,ab->...b", (3, 2), (2,), einsum_op=lambda s, *a, **k: counted(
            *a, (((1,), (0,)), ((), ())), **k), rngs=mu.Rngs(0)),
    ):  # fmt: skip
        np.testing.assert_allclose(layer(x), plain(x), rtol=1e-6)
        assert seen.pop() == {"precision": None}  # what was not said, a function need not know
    wide = nn.Linear(3, 2, dtype=jnp.bfloat16, preferred_element_type=jnp.float32, rngs=mu.Rngs(0))
    assert wide(x).dtype == jnp.float32


def test_metadata() -> None:
    layer = nn.LinearGeneral(
        4, 2, kernel_metadata={"sharding": ("in", "out"), "tag": "k"}, bias_metadata={"out_sharding": ("out",)},
        rngs=mu.Rngs(0),
    )  # fmt: skip
    assert (layer.kernel.sharding, layer.kernel.tag, layer.bias.sharding) == (("in", "out"), "k", ("out",))


def test_placement_of_the_result() -> None:
    mesh = jax.make_mesh((2, 2), ("x", "y"))
    spec = PartitionSpec("x", None, "y")
    with jax.set_mesh(mesh):
        x = jax.device_put(waves(2, 3, 4), NamedSharding(mesh, PartitionSpec("x")))
        for layer in (
            nn.Linear(4, 2, rngs=mu.Rngs(0)),
            nn.LinearGeneral(4, 2, rngs=mu.Rngs(0)),
            nn.Einsum("...a,ab->...b", (4, 2), (2,), rngs=mu.Rngs(0)),
        ):
            assert jax.typeof(layer(x)).sharding.spec == PartitionSpec("x", None, None)
            placed = mu.jit(lambda m, x: m(x, out_sharding=spec))(layer, x)
            assert jax.typeof(placed).sharding.spec == spec
            np.testing.assert_allclose(placed, layer(x), rtol=1e-6)


def test_a_bias_of_zeros_needs_no_key() -> None:
    """And the stream goes on as if it had been drawn."""
    jaxpr = mu.make_jaxpr(lambda key: nn.Linear(2, 3, rngs=mu.Rngs(key)).kernel.value)(jax.random.key(0))
    assert str(jaxpr).count("random_fold_in") == 1
    rngs, drawn = mu.Rngs(0), mu.Rngs(0)
    nn.Linear(2, 3, rngs=rngs)
    nn.Linear(2, 3, bias_init=initializers.normal(), rngs=drawn)
    np.testing.assert_array_equal(jax.random.key_data(rngs()), jax.random.key_data(drawn()))


def test_general_sizes_from_the_first_input() -> None:
    waiting, given = (nn.LinearGeneral(size, (2, 3), axis=(1, -1), rngs=mu.Rngs(0)) for size in (None, (4, 5)))
    x = waves(2, 4, 3, 5)
    np.testing.assert_allclose(mu.jit(waiting)(x), mu.jit(given)(x), rtol=1e-4, atol=1e-6)
    for a, b in zip(jax.tree.leaves(mu.state(waiting)), jax.tree.leaves(mu.state(given)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    with pytest.raises(ArgumentError, match=r"(?s)4 along axis 1, 5 along axis -1.*\(2, 5, 3, 5\)"):
        waiting(waves(2, 5, 3, 5))


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
    for a, b in zip(jax.tree.leaves(mu.state(waiting)), jax.tree.leaves(mu.state(given)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
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
    ("layer", "text"),
    [
        (lambda: nn.Linear(None, 3, rngs=mu.Rngs(0)), r"Linear.kernel.*floats.*int32\[2,4\].*`nn.Embed`"),
        (lambda: nn.LinearGeneral(None, 3, rngs=mu.Rngs(0)), r"LinearGeneral.kernel.*floats.*int32\[2,4\]"),
        (lambda: nn.Einsum("ab,bc->ac", (4, 3), rngs=mu.Rngs(0)), r"Einsum.kernel.*floats.*int32\[2,4\]"),
        (lambda: nn.Linear(4, 3, dtype=jnp.int32, rngs=mu.Rngs(0)), r"computes with floats.*int32"),
    ],
)
def test_integers(layer: Callable[[], Any], text: str) -> None:
    made = layer()
    with pytest.raises(ArgumentError, match=f"(?s){text}"):
        made(jnp.ones((2, 4), jnp.int32))
    assert made.kernel.deferred == (made.kernel_init is not None)  # nothing was created for them


@pytest.mark.parametrize(
    ("make", "shape", "text"),
    [
        (lambda: nn.LinearGeneral((5, 4), 3, axis=1, rngs=mu.Rngs(0)), (), r"size for each axis.*\(1,\).*\(5, 4\)"),
        (lambda: nn.LinearGeneral(4, 3, batch_axis={1: 2}, rngs=mu.Rngs(0)), (), r"not the leading axes.*\{1: 2\}"),
        (
            lambda: nn.LinearGeneral(4, 3, batch_axis={0: 2}, rngs=mu.Rngs(0)),
            (3, 4),
            r"2 along axis 0, 4 along axis -1",
        ),
        (lambda: nn.LinearGeneral(4, 3, axis=2, rngs=mu.Rngs(0)), (3, 4), r"4 along axis 2.*\(3, 4\)"),
        (lambda: nn.Einsum("ab,bc", (4, 3), rngs=mu.Rngs(0)), (), "with `->`"),
        (lambda: nn.Einsum("ab->ab", (4, 3), rngs=mu.Rngs(0)), (), "of two operands"),
        (lambda: nn.Einsum("ab,bc->ac", (4,), rngs=mu.Rngs(0)), (), r"axes `bc`.*\(4,\)"),
        (lambda: nn.Einsum("ab,bc->ac", (4, 3), rngs=mu.Rngs(0)), (2, 5), r"axes `ab`, b = 4.*\(2, 5\)"),
        (lambda: nn.Einsum("ab,bc->ac", (4, 3), rngs=mu.Rngs(0)), (2, 2, 4), r"axes `ab`, b = 4.*\(2, 2, 4\)"),
        (lambda: nn.Einsum("ab,bc->ac", (4, 3), (4,), rngs=mu.Rngs(0)), (2, 4), r"the bias.*\(3,\).*\(4,\)"),
    ],
)
def test_axes_that_do_not_fit(make: Callable[[], Any], shape: tuple[int, ...], text: str) -> None:
    with pytest.raises(ArgumentError, match=f"(?s){text}"):
        make()(waves(*shape))


def test_another_equation_in_the_call() -> None:
    layer = nn.Einsum("ab, bc -> ac", (4, 3), (3,), bias_init=initializers.normal(1.0), rngs=mu.Rngs(0))
    x = waves(2, 5, 4)
    np.testing.assert_allclose(layer(x, "...b,bc->...c"), jax.vmap(layer)(x), rtol=1e-5, atol=1e-6)


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


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(4.0, 3, rngs=mu.Rngs(0)),
        lambda: nn.Linear(-3, 4, rngs=mu.Rngs(0)),
        lambda: nn.Linear(3, "4", rngs=mu.Rngs(0)),
        lambda: nn.Linear(None, 2.5, rngs=mu.Rngs(0))(jnp.ones((1, 3))),
        lambda: nn.Embed(4.0, 3, rngs=mu.Rngs(0)),
        lambda: nn.GRUCell(2.0, 8, rngs=mu.Rngs(0)),
        lambda: nn.LayerNorm(3.0, rngs=mu.Rngs(0)),
        lambda: nn.BatchNorm(-3),
        lambda: nn.LinearGeneral((2, 3.0), 4, rngs=mu.Rngs(0)),
        lambda: nn.LIF(3.5),
        lambda: nn.LayerNorm(3, reduction_axes=1.5, rngs=mu.Rngs(0)),
    ],
)
def test_sizes_that_are_none(make: Callable[[], Any]) -> None:
    with pytest.raises(ArgumentError, match=r"integer"):
        make()


def test_sizes_of_numpy_are_sizes() -> None:
    assert nn.Linear(np.int64(2), np.int32(3), rngs=mu.Rngs(0)).kernel.shape == (2, 3)
    assert nn.LinearGeneral(np.int64(2), (np.int32(3), 4), rngs=mu.Rngs(0)).kernel.shape == (2, 3, 4)
    assert nn.LIF(np.int64(3)).v.shape == (3,)
