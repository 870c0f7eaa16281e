"""`Dropout`: what it draws, from which stream, and who decides whether it does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import nn
from mutatis.errors import ArgumentError, RandomStreamError

pytestmark = pytest.mark.once


@pytest.mark.parametrize("transform", [lambda f: f, mu.jit], ids=["eager", "jit"])
def test_draws_by_hand(transform: Callable[..., Any]) -> None:
    dropout = nn.Dropout(0.25, rngs=mu.Rngs(0, dropout=1))
    call, x = transform(dropout), jnp.arange(1.0, 101.0)
    own = jax.random.fold_in(jax.random.key(1), 0)  # the layer's stream: the first draw of `dropout`
    for count in range(3):
        kept = jax.random.bernoulli(jax.random.fold_in(own, count), 0.75, x.shape)
        np.testing.assert_array_equal(call(x), jnp.where(kept, x / 0.75, 0.0))


# Flax 0.12.8 on JAX 0.10.2: nnx.Dropout(0.5, rngs=nnx.Rngs(0)), two calls.
def test_numbers_of_flax() -> None:
    dropout = nn.Dropout(0.5, rngs=mu.Rngs(0))
    assert dropout(jnp.ones(8)).tolist() == [2, 0, 2, 0, 2, 2, 2, 0]
    assert dropout(jnp.ones(8)).tolist() == [2, 2, 2, 0, 2, 0, 0, 2]


def test_mean_stays() -> None:
    y = nn.Dropout(0.3, rngs=mu.Rngs(0))(jnp.ones(100_000))
    assert float(y.mean()) == pytest.approx(1, abs=0.01)
    assert set(np.unique(y)) == {np.float32(0), np.float32(1) / np.float32(0.7)}


@pytest.mark.parametrize("axis", [0, -1])
def test_broadcast_dims(axis: int) -> None:
    y = nn.Dropout(0.5, broadcast_dims=[axis], rngs=mu.Rngs(0))(jnp.ones((8, 8)))
    assert np.all(y == np.take(y, [0], axis)) and len(np.unique(y)) == 2


@pytest.mark.parametrize(("rate", "value"), [(0, 1.0), (1, 0.0), (1.0, 0.0)])
def test_nothing_and_everything(rate: float, value: float) -> None:
    dropout = nn.Dropout(rate)  # draws nothing, hence needs no stream
    np.testing.assert_array_equal(dropout(jnp.ones(3)), np.full(3, value))
    np.testing.assert_array_equal(jax.grad(lambda x: dropout(x).sum())(jnp.ones(3)), np.full(3, value))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtype_stays(dtype: Any) -> None:
    assert nn.Dropout(0.5, rngs=mu.Rngs(0))(jnp.ones(3, dtype)).dtype == dtype


@pytest.mark.parametrize("said_in_call", [None, False, True])
@pytest.mark.parametrize("said_in_init", [None, False, True])
@pytest.mark.parametrize("training", [True, False])
def test_who_decides(said_in_call: bool | None, said_in_init: bool | None, training: bool) -> None:
    dropout = nn.Dropout(0.5, deterministic=said_in_init, rngs=mu.Rngs(0))
    dropout.training = training
    y = dropout(jnp.ones(100), deterministic=said_in_call)
    said = [said for said in (said_in_call, said_in_init, not training) if said is not None]
    assert bool(jnp.all(y == 1)) == said[0]
    assert int(dropout.stream.value["count"]) == (not said[0])


# -- streams -------------------------------------------------------------------------------------------------------


def test_each_layer_draws_its_own() -> None:
    rngs = mu.Rngs(0)
    first, second = nn.Dropout(0.5, rngs=rngs), nn.Dropout(0.5, rngs=rngs)
    assert not np.array_equal(first(jnp.ones(100)), second(jnp.ones(100)))
    assert int(rngs.default.value["count"]) == 2  # drawn from when the layers were made, and no more


def test_lanes_draw_their_own() -> None:
    dropout = nn.Dropout(0.5, rngs=mu.Rngs(0))
    y = mu.vmap(lambda x: dropout(x))(jnp.ones((2, 100)))
    assert not np.array_equal(y[0], y[1])


def test_layers_of_a_scan_draw_their_own() -> None:
    stack = mu.vmap(lambda seed: nn.Dropout(0.5, rngs=mu.Rngs(seed)))(jnp.arange(3))
    _, masks = mu.scan(lambda carry, layer: (carry, layer(jnp.ones(100))), None, stack)
    alone = [nn.Dropout(0.5, rngs=mu.Rngs(seed))(jnp.ones(100)) for seed in range(3)]
    np.testing.assert_array_equal(masks, alone)
    np.testing.assert_array_equal(stack.stream.value["count"], [1, 1, 1])


def test_checkpoints_continue_the_stream(tmp_path: Path) -> None:
    dropout, other = nn.Dropout(0.5, rngs=mu.Rngs(0)), nn.Dropout(0.5, rngs=mu.Rngs(1))
    dropout(jnp.ones(3))
    mu.checkpoint.save(tmp_path / "c", dropout)
    mu.checkpoint.restore(tmp_path / "c", other)
    np.testing.assert_array_equal(dropout(jnp.ones(100)), other(jnp.ones(100)))


def test_reseed_by_name() -> None:
    rngs = mu.Rngs(0)
    layers = [nn.Dropout(0.5, rngs=rngs), nn.Dropout(0.5, rngs=rngs)]
    mu.reseed(layers, dropout=3)
    first = [layer(jnp.ones(100)) for layer in layers]
    mu.reseed(layers, dropout=3)
    np.testing.assert_array_equal(first, [layer(jnp.ones(100)) for layer in layers])
    assert not np.array_equal(*first)


def test_streams_of_the_call() -> None:
    dropout = nn.Dropout(0.5, rngs=mu.Rngs(0))
    y, again = (dropout(jnp.ones(100), rngs=mu.Rngs(dropout=1)) for _ in range(2))
    np.testing.assert_array_equal(y, again)
    assert int(dropout.stream.value["count"]) == 0


def test_no_stream() -> None:
    dropout = nn.Dropout(0.5)
    with pytest.raises(RandomStreamError, match="no random stream `dropout`") as caught:
        mu.jit(dropout)(jnp.ones(3))
    assert caught.value.where == "jit(Dropout)"
    nn.Dropout(0.5, rngs=mu.Rngs(0))(jnp.ones(3))  # the three cures
    dropout(jnp.ones(3), rngs=mu.Rngs(0))
    dropout.eval()(jnp.ones(3))


@pytest.mark.parametrize("rate", [-0.1, 1.5, float("nan")])
def test_rate_is_a_probability(rate: float) -> None:
    with pytest.raises(ArgumentError, match="expected: a probability"):
        nn.Dropout(rate, rngs=mu.Rngs(0))


def test_collections_and_single_streams() -> None:
    named = nn.Dropout(0.5, rng_collection="noise", rngs=mu.Rngs(0, noise=1, dropout=2))
    plain = nn.Dropout(0.5, rngs=mu.Rngs(dropout=1))
    x = jnp.ones(100)
    np.testing.assert_array_equal(named(x), plain(x))
    assert named.stream.tag == "noise"
    mu.reseed(named, noise=3)
    rngs = mu.Rngs(noise=1)
    first = named(x, rngs=rngs)
    np.testing.assert_array_equal(first, named(x, rngs=mu.Rngs(1).stream("anything")))
    np.testing.assert_array_equal(first, named(x, rngs=mu.Rngs(1).anything))
    np.testing.assert_array_equal(first, named(x, rngs=mu.Rngs(1)()))  # a key
    assert int(named.stream.value["count"]) == 0 and int(rngs.noise.value["count"]) == 1
    with pytest.raises(RandomStreamError, match="no random stream `noise`"):
        nn.Dropout(0.5, rng_collection="noise", rngs=mu.Rngs(dropout=0))
    with pytest.raises(RandomStreamError, match="no random stream `noise` to draw from"):
        nn.Dropout(0.5, rng_collection="noise")(x)
    for given in (3, jnp.ones(3)):
        with pytest.raises(RandomStreamError):
            plain(x, rngs=given)


@pytest.mark.parametrize("broadcast_dims", [(), (0,), (1, -1)])
@pytest.mark.parametrize("spec", [("x", None, "y"), (None, ("x", "y"), None), (None, None, None)])
@pytest.mark.parametrize("kinds", ["Explicit", "Auto"])
def test_any_placement(kinds: str, spec: Any, broadcast_dims: tuple[int, ...]) -> None:
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(getattr(jax.sharding.AxisType, kinds),) * 2)
    x = jnp.ones((4, 8, 4))
    wanted = nn.Dropout(0.5, broadcast_dims=broadcast_dims, rngs=mu.Rngs(0))(x)
    with jax.set_mesh(mesh):
        layer = nn.Dropout(0.5, broadcast_dims=broadcast_dims, rngs=mu.Rngs(0))
        placed = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)))
        y = mu.jit(layer)(placed)
        assert tuple(y.sharding.spec) == spec or kinds == "Auto"
    np.testing.assert_array_equal(y, wanted)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("options", "x", "text"),
    [
        ({}, jnp.ones(3, jnp.int32), r"(?s)drops\[0\].*floats.*int32\[3\]"),
        ({"broadcast_dims": (2,)}, jnp.ones((3, 4)), r"(?s)drops\[0\].*broadcast_dims=\(2,\).*\(3, 4\)"),
    ],
)
def test_inputs_that_do_not_fit(stream: bool, options: Any, x: jax.Array, text: str) -> None:
    net = mu.Module()
    net.drops = [nn.Dropout(0.5, rngs=mu.Rngs(0) if stream else None, **options)]
    with pytest.raises(ArgumentError, match=text):
        net.drops[0](x, rngs=jax.random.key(0))
    assert net.drops[0](x, deterministic=True) is x
