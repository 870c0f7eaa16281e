"""`Conv` and `ConvTranspose`: masks, paddings, sizes that are left out, and bad input. Their numbers: `test_layers_as_nnx`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import mutatis as mu
from mutatis import nn
from mutatis.errors import ArgumentError

MASK = np.arange(3 * 4 * 2).reshape(3, 4, 2) % 3 > 0


def waves(*shape: int) -> jax.Array:
    return jnp.sin(jnp.arange(np.prod(shape), dtype=jnp.float32)).reshape(shape)


@pytest.mark.parametrize("inputs", [4, None])
@pytest.mark.parametrize("layer", [nn.Conv, nn.ConvTranspose])
def test_mask_is_a_buffer(layer: Any, inputs: int | None) -> None:
    masked, bare = layer(inputs, 2, 3, mask=MASK, rngs=mu.Rngs(0)), layer(4, 2, 3, rngs=mu.Rngs(0))
    assert [*mu.variables(masked, mu.Buffer)] == [("mask",)]
    bare.kernel.value *= MASK.astype(np.float32)
    x = waves(2, 5, 4)
    np.testing.assert_allclose(mu.jit(masked)(x), bare(x), rtol=1e-5, atol=1e-6)
    gradient = mu.grad(lambda m: jnp.sum(m(x)))(masked)["kernel"]
    assert np.all(np.asarray(gradient)[~MASK] == 0) and np.any(np.asarray(gradient)[MASK] != 0)
    masked.mask = np.zeros_like(MASK)
    np.testing.assert_array_equal(masked(x), np.zeros((2, 5, 2)))


def test_causal() -> None:
    layer = nn.Conv(1, 1, 3, padding="CAUSAL", kernel_dilation=2, rngs=mu.Rngs(0))
    reach = jax.jacobian(lambda x: layer(x[:, None])[:, 0])(waves(8))
    seen = np.asarray(reach) != 0
    assert (
        not np.any(np.triu(seen, 1))
        and np.all(np.diag(seen))
        and seen[7].tolist() == [i in (3, 5, 7) for i in range(8)]
    )


def test_circular_commutes_with_rolling() -> None:
    conv = nn.Conv(2, 3, (3, 2), padding="CIRCULAR", rngs=mu.Rngs(0))
    transposed = nn.ConvTranspose(2, 3, (3, 2), padding="CIRCULAR", rngs=mu.Rngs(0))
    x = waves(1, 5, 6, 2)
    for layer in (conv, transposed):
        got, want = layer(jnp.roll(x, (2, 1), (1, 2))), jnp.roll(layer(x), (2, 1), (1, 2))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("padding", ["VALID", "CIRCULAR"])
def test_transposed_is_the_transpose(padding: str) -> None:
    """With `transpose_kernel`, <conv(x), y> = <x, transposed(y)> for the same kernel."""
    conv = nn.Conv(2, 3, 3, strides=1, padding=padding, use_bias=False, rngs=mu.Rngs(0))
    back = nn.ConvTranspose(3, 2, 3, padding=padding, transpose_kernel=True, use_bias=False, rngs=mu.Rngs(1))
    back.kernel.value = conv.kernel.value
    x = waves(6, 2)
    y = waves(*conv(x).shape) + 1
    np.testing.assert_allclose(jnp.sum(conv(x) * y), jnp.sum(x * back(y)), rtol=1e-5)


def test_functions_in_place_of_the_own() -> None:
    seen: list[Any] = []

    def counted(*args: Any, **kwargs: Any) -> jax.Array:
        seen.append(set(kwargs))
        return lax.conv_general_dilated(*args, **kwargs)

    def double(arrays: Any, *, dtype: Any) -> Any:
        return tuple(None if array is None else 2 * array for array in arrays)

    plain, other = (
        nn.Conv(4, 2, 3, use_bias=False, rngs=mu.Rngs(0), **options)
        for options in ({}, {"conv_general_dilated": counted, "promote_dtype": double})
    )
    x = waves(2, 5, 4)
    np.testing.assert_allclose(other(x), 4 * plain(x), rtol=1e-6)
    assert not seen[0] & {"out_sharding", "preferred_element_type"}  # what was not said, a function need not know


def test_metadata() -> None:
    layer = nn.Conv(
        4, 2, 3, kernel_metadata={"sharding": (None, "in", "out"), "tag": "k"}, bias_metadata={"out_sharding": ("out",)},
        rngs=mu.Rngs(0),
    )  # fmt: skip
    assert (layer.kernel.sharding, layer.kernel.tag, layer.bias.sharding) == ((None, "in", "out"), "k", ("out",))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: nn.Conv(4, 3, 3, mask=MASK, rngs=mu.Rngs(0)), r"(?s)mask of `nn.Conv`.*\(3, 4, 3\).*\(3, 4, 2\)"),
        (lambda: nn.Conv(4, 3, (3, 3), padding="CAUSAL", rngs=mu.Rngs(0)), "along one spatial axis only"),
        (lambda: nn.ConvTranspose(4, 3, 3, padding="CAUSAL", rngs=mu.Rngs(0)), "does not know the padding 'CAUSAL'"),
        (lambda: nn.ConvTranspose(4, 3, 3, strides=(1, 2), rngs=mu.Rngs(0)), "1 spatial axes, and `strides` is for 2"),
        (lambda: nn.Conv(4, 3, 3, padding="CIRCULAR", input_dilation=2, rngs=mu.Rngs(0)), "of a dilated input"),
        (lambda: nn.Conv(4, 4, (0, 3), rngs=mu.Rngs(0)), r"cannot have `kernel_size=\(0, 3\)`"),
        (lambda: nn.Conv(4, 4, (3.0,), rngs=mu.Rngs(0)), "cannot have `kernel_size="),
        (lambda: nn.Conv(4, 4, 3, strides=0, rngs=mu.Rngs(0)), "cannot have `strides=0`"),
        (lambda: nn.ConvTranspose(4, 4, 3, strides=1.5, rngs=mu.Rngs(0)), "cannot have `strides=1.5`"),
        (lambda: nn.Conv(4, 4, 3, kernel_dilation=-1, rngs=mu.Rngs(0)), "cannot have `kernel_dilation=-1`"),
        (lambda: nn.Conv(4, 4, 3, padding=1.5, rngs=mu.Rngs(0)), "cannot pad by 1.5"),
        (lambda: nn.Conv(4, 4, 3, padding=((1, 2, 3),), rngs=mu.Rngs(0)), r"cannot pad by \(1, 2, 3\)"),
        (lambda: nn.Conv(4, 4, 3, feature_group_count=0, rngs=mu.Rngs(0)), "into 0 groups"),
        (lambda: nn.Conv(4, "4", 3, rngs=mu.Rngs(0)), r"(?s)parameters of shape \(4, '4'\).*got: .*'4'"),
    ],
)
def test_settings_that_do_not_fit(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        make()


@pytest.mark.parametrize(
    ("layer", "x", "text"),
    [
        (lambda: nn.ConvTranspose(4, 3, 3, rngs=mu.Rngs(0)), waves(2, 5, 3), r"(?s)with 4 features.*\(2, 5, 3\)"),
        (lambda: nn.ConvTranspose(4, 3, (3, 3), rngs=mu.Rngs(0)), waves(5, 4), r"(?s)3 or more axes.*\(5, 4\)"),
        (lambda: nn.Conv(None, 3, 3, mask=MASK, rngs=mu.Rngs(0)), waves(2, 5, 4), "mask of `nn.Conv`"),
        (lambda: nn.Conv(None, 3, 3, rngs=mu.Rngs(0)), jnp.ones((2, 5, 4), jnp.uint8), r"(?s)floats.*uint8\[2,5,4\]"),
    ],
)
def test_inputs_that_do_not_fit(layer: Callable[[], Any], x: jax.Array, text: str) -> None:
    made = layer()
    before = {path: cell.deferred for path, cell in mu.variables(made).items()}
    with pytest.raises(ArgumentError, match=text):
        made(x)
    assert {path: cell.deferred for path, cell in mu.variables(made).items()} == before


def test_sizes_of_numpy() -> None:
    settings: Any = {"kernel_size": (3, 2), "strides": (2, 1), "padding": ((1, 0), (0, 2)), "kernel_dilation": 2}
    layers = [
        nn.Conv(4, 6, feature_group_count=2, rngs=mu.Rngs(0), **settings),
        nn.Conv(
            np.int64(4), np.int32(6), feature_group_count=np.int64(2), rngs=mu.Rngs(0),
            **{name: np.int64(value) if isinstance(value, int) else np.array(value) for name, value in settings.items()},
        ),
    ]  # fmt: skip
    x = waves(2, 9, 8, 4)
    np.testing.assert_array_equal(layers[1](x), layers[0](x))
    assert layers[0].padding == layers[1].padding and layers[1].kernel_dilation == (2, 2)
