"""`Embed`: what it looks up, how the result is placed, and bad input. Its numbers: `test_layers_as_nnx`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import mutatis as mu
from mutatis import nn
from mutatis.errors import ArgumentError


def test_look_up_and_attend() -> None:
    embed = nn.Embed(5, 3, rngs=mu.Rngs(0))
    table = np.asarray(embed.embedding)
    numbers = jnp.array([[4, 0], [-1, 2]])
    np.testing.assert_array_equal(mu.jit(embed)(numbers), table[np.asarray(numbers)])
    np.testing.assert_allclose(embed.attend(table[:2]), table[:2] @ table.T, rtol=1e-6)
    assert np.all(np.isnan(embed(jnp.array([5, 99]))))
    gradient = mu.grad(lambda m: jnp.sum(m(numbers)))(embed)["embedding"]
    assert gradient[:, 0].tolist() == [1, 0, 1, 0, 2]


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_dtypes(dtype: Any) -> None:
    embed = nn.Embed(5, 3, dtype=dtype, rngs=mu.Rngs(0))
    wanted = jnp.float32 if dtype is None else dtype
    numbers = jnp.arange(3, dtype=jnp.uint8)
    assert embed(numbers).dtype == wanted and embed.attend(jnp.ones((2, 3), jnp.bfloat16)).dtype == wanted
    embed.embedding.value = embed.embedding.value.astype(jnp.float16)
    assert embed(numbers).dtype == (jnp.float16 if dtype is None else dtype)


@pytest.mark.parametrize("table", [(None, None), ("y", None), (None, "y"), (None, "x"), ("x", "y")])
@pytest.mark.parametrize("rows", [(None, None), ("x", None)])
def test_placement_on_explicit_axes(table: Any, rows: Any) -> None:
    mesh = jax.make_mesh((2, 2), ("x", "y"))
    embed = nn.Embed(8, 4, rngs=mu.Rngs(0))
    values = np.asarray(embed.embedding)
    numbers = np.arange(12).reshape(4, 3) % 8
    with jax.set_mesh(mesh):
        embed.embedding.value = jax.device_put(values, NamedSharding(mesh, PartitionSpec(*table)))
        placed = jax.device_put(numbers, NamedSharding(mesh, PartitionSpec(*rows)))
        y = mu.jit(embed)(placed)
        np.testing.assert_array_equal(y, values[numbers])
        features = None if table[1] == rows[0] else table[1]
        assert tuple(jax.typeof(y).sharding.spec) == (*rows, features)
        spec = PartitionSpec(None, None, "y")
        assert jax.typeof(embed(placed, out_sharding=spec)).sharding.spec == spec


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda embed: embed(jnp.ones(3)), r"(?s)net\.table\[0\]\.embedding.*integers, below 5.*float32\[3\]"),
        (lambda embed: embed(jnp.ones(3, bool)), r"(?s)integers, below 5.*bool\[3\]"),
        (lambda embed: embed.attend(jnp.ones((2, 4))), r"(?s)3 features along axis -1.*\(2, 4\)"),
        (lambda embed: embed.attend(jnp.float32(1)), r"(?s)3 features along axis -1.*\(\)"),
    ],
)
def test_inputs_that_do_not_fit(call: Any, text: str) -> None:
    net = mu.Module()
    net.table = [nn.Embed(5, 3, rngs=mu.Rngs(0))]
    with pytest.raises(ArgumentError, match=text):
        mu.jit(lambda net: call(net.table[0]))(net)
