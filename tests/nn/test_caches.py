"""`KVCache`: what attention computes with one, in any pieces, is what it computes at once; rolling back, beams, rows, rings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import nn
from mutatis.errors import ArgumentError

pytestmark = [pytest.mark.once, pytest.mark.filterwarnings("ignore:`jit.read.` was compiled")]

LENGTH = 7


def waves(*shape: int) -> jax.Array:
    return jnp.sin(jnp.arange(np.prod(shape), dtype=jnp.float32)).reshape(shape)


def make(window: int | None = None, ragged: bool = False, places: int = 8, batch: tuple[int, ...] = (2,)) -> Any:
    layer = nn.MultiHeadAttention(4, 8, num_kv_heads=2, rope=nn.RoPE(100.0), rngs=mu.Rngs(0))
    layer.init_cache((*batch, places, 8), window=window, ragged=ragged)
    return layer


def at_once(layer: Any, x: jax.Array, window: int | None = None) -> jax.Array:
    places = jnp.arange(x.shape[-2])
    seen = places[:, None] >= places[None]
    if window is not None:
        seen &= places[:, None] - places[None] < window
    return layer(x, mask=seen.reshape((1,) * (x.ndim - 1) + seen.shape))  # type: ignore[no-any-return]


@mu.jit
def read(layer: Any, x: jax.Array, lengths: Any = None) -> jax.Array:
    return layer(x, decode=True, lengths=lengths)  # type: ignore[no-any-return]


def in_pieces(layer: Any, x: jax.Array, pieces: tuple[int, ...], run: Callable[..., Any] = read) -> jax.Array:
    ends = np.cumsum(pieces)
    return jnp.concatenate([run(layer, x[..., end - n : end, :]) for n, end in zip(pieces, ends, strict=True)], -2)


RINGS = [(None, 8), (3, 3), (3, 5), (4, 8)]


@pytest.mark.parametrize("pieces", [(4, 1, 1, 1), (2, 5)], ids=str)
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("window", "places"), RINGS)
def test_pieces(window: int | None, places: int, ragged: bool, pieces: tuple[int, ...]) -> None:
    layer, x = make(window, ragged, places), waves(2, LENGTH, 8)
    wanted = at_once(layer, x, window)
    np.testing.assert_allclose(in_pieces(layer, x, pieces), wanted, rtol=1e-4, atol=1e-5)
    assert jnp.all(layer.cache.index.value == LENGTH)
    mu.reset(layer, mu.Cache)
    np.testing.assert_allclose(in_pieces(layer, x, pieces), wanted, rtol=1e-4, atol=1e-5)
    if len(pieces) > 2:
        return
    layer.cache.reset()
    eager = in_pieces(layer, x, pieces, lambda layer, x: layer(x, decode=True))
    np.testing.assert_allclose(eager, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("window", [None, 3])
def test_batch_axes(batch: tuple[int, ...], ragged: bool, window: int | None) -> None:
    layer, x = make(window, ragged, batch=batch), waves(*batch, LENGTH, 8)
    np.testing.assert_allclose(in_pieces(layer, x, (4, 3)), at_once(layer, x, window), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_rows_of_different_lengths(window: int | None) -> None:
    layer, x = make(window, ragged=True), waves(2, LENGTH, 8)
    first = read(layer, x[:, :5], jnp.array([5, 2]))
    assert layer.cache.index.value.tolist() == [5, 2]
    np.testing.assert_allclose(first[1, :2], at_once(layer, x, window)[1, :2], rtol=1e-4, atol=1e-5)
    second = read(layer, jnp.stack([x[0, 5:6], x[1, 2:3]]))
    np.testing.assert_allclose(second[0, 0], at_once(layer, x, window)[0, 5], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(second[1, 0], at_once(layer, x, window)[1, 2], rtol=1e-4, atol=1e-5)
    before = mu.state(layer, mu.Cache)
    read(layer, x[:, :1], jnp.array([0, 0]))
    assert mu.state(layer, mu.Cache) == before


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("window", "places"), [(None, 8), (3, 6), (3, 3)])
def test_rolling_back(ragged: bool, window: int | None, places: int) -> None:
    layer, x = make(window, ragged, places), waves(2, LENGTH, 8)
    read(layer, jnp.concatenate([x[:, :4], -x[:, 4:6]], 1))
    if places == window:
        with pytest.raises(ArgumentError, match=r"(?s)rolled back so far.*back to"):
            layer.cache.truncate(4)
        assert jnp.all(layer.cache.index.value == 6)
        return
    layer.cache.truncate(4)
    layer.cache.truncate(99)
    np.testing.assert_allclose(read(layer, x[:, 4:]), at_once(layer, x, window)[:, 4:], rtol=1e-4, atol=1e-5)
    if ragged:
        layer.cache.truncate(jnp.array([7, 6]))
        assert layer.cache.index.value.tolist() == [7, 6]


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("window", [None, 3])
def test_beams(ragged: bool, window: int | None) -> None:
    layer, x = make(window, ragged), waves(2, LENGTH, 8)
    read(layer, x[:, :4])
    layer.cache.reorder(jnp.array([1, 1]))
    wanted = at_once(layer, jnp.stack([x[1], x[1]]), window)[:, 4:]
    np.testing.assert_allclose(read(layer, jnp.stack([x[1], x[1]])[:, 4:]), wanted, rtol=1e-4, atol=1e-5)


def test_within_a_loop_and_a_rolled_back_transaction() -> None:
    layer, x = make(), waves(2, LENGTH, 8)
    ys = mu.for_loop(lambda token: layer(token[:, None], decode=True)[:, 0], jnp.moveaxis(x, 1, 0))
    np.testing.assert_allclose(jnp.moveaxis(ys, 0, 1), at_once(layer, x), rtol=1e-4, atol=1e-5)
    layer.cache.truncate(3)
    with mu.transaction() as tx:
        read(layer, x[:, 3:])
        tx.rollback()
    assert int(layer.cache.index) == 3


@pytest.mark.parametrize("length", [3, 1])
def test_narrow_cache(length: int) -> None:
    layer, x = make(), waves(2, LENGTH, 8)
    layer.init_cache((2, 8, 8), jnp.bfloat16)
    y = in_pieces(layer, x, (length,) * (LENGTH // length))
    assert y.dtype == jnp.float32 and layer.cache.key.dtype == jnp.bfloat16
    np.testing.assert_allclose(y, at_once(layer, x)[:, : y.shape[1]], rtol=0.1, atol=0.02)


def test_one_program_for_all_lengths(traces: Any) -> None:
    step = mu.jit(traces.count(lambda layer, x: layer(x, decode=True)))
    layer, x = make(), waves(2, LENGTH, 8)
    for place in range(LENGTH):
        step(layer, x[:, place : place + 1])
    assert traces.total == 1


def test_cache_of_flax() -> None:
    nnx = pytest.importorskip("flax.nnx")
    ours = nn.MultiHeadAttention(4, 8, num_kv_heads=2, decode=True, rngs=mu.Rngs(0))
    theirs = nnx.MultiHeadAttention(4, 8, num_kv_heads=2, decode=True, rngs=nnx.Rngs(0))
    x = waves(2, 5, 8)
    for layer in (ours, theirs):
        layer.init_cache(x.shape)
    for place in range(5):
        token = x[:, place : place + 1]
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            wanted = theirs(token)
        np.testing.assert_allclose(ours(token), wanted, rtol=1e-4, atol=1e-5)
    for name in ("cached_key", "cached_value", "cache_index"):
        np.testing.assert_allclose(getattr(ours, name).value, getattr(theirs, name)[...], rtol=1e-5, atol=1e-6)


# -- bad input -----------------------------------------------------------------------------------------------------


def test_full() -> None:
    layer, x = make(places=4), waves(2, LENGTH, 8)
    with pytest.raises(ArgumentError, match=r"(?s)cache `.*cache.key` \(Cache\) is full.*at most 4.*7") as caught:
        layer(x, decode=True)
    assert "mu.reset(model, mu.Cache)" in str(caught.value)
    with pytest.raises(ArgumentError, match=r"(?s)is full inside `jit.*at most 4.*7 at once"):
        read(layer, x)
    assert int(layer.cache.index) == 0
    read(layer, x[:, :4])
    with pytest.raises(ArgumentError, match=r"(?s)is full.*at most 4.*5"):
        layer(x[:, :1], decode=True)
    ragged = make(ragged=True, places=4)
    read(ragged, x[:, :4], jnp.array([4, 1]))
    with pytest.raises(ArgumentError, match="is full"):
        ragged(x[:, :1], decode=True)
    ragged(x[:, :1], decode=True, lengths=jnp.array([0, 1]))
    assert ragged.cache.index.value.tolist() == [4, 2]


@pytest.mark.parametrize("ragged", [False, True])
def test_a_mask_for_each_row(ragged: bool) -> None:
    layer, x = make(ragged=ragged), waves(2, LENGTH, 8)
    tokens = (
        jnp.arange(8)[None, None, None] >= jnp.array([0, 2])[:, None, None, None]
    )  # the second row begins with two places of padding
    written = in_pieces(layer, x, (4, 3), lambda layer, x: layer(x, decode=True, mask=tokens))
    causal = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))[None, None]
    wanted = layer(x, mask=causal & tokens[..., :LENGTH])
    np.testing.assert_allclose(written[0], wanted[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(written[1, 2:], wanted[1, 2:], rtol=1e-4, atol=1e-5)


class Doubled(mu.Module):
    """A projection of another class than the layer has made."""

    def __init__(self, inner: nn.LinearGeneral) -> None:
        self.inner = inner

    def __call__(self, x: Any, out_sharding: Any = None) -> jax.Array:
        return 2 * self.inner(x, out_sharding)


def test_a_projection_that_was_wrapped() -> None:
    plain, x = make(), waves(2, LENGTH, 8)
    wrapped, alone = make(), make()
    plain.query.kernel.value, plain.query.bias.value = 2 * plain.query.kernel.value, 2 * plain.query.bias.value
    wanted = at_once(plain, x)
    for layer in (wrapped, alone):
        layer.query = Doubled(layer.query)
    stack = nn.Stack([wrapped, alone])
    wrapped.init_cache((2, 8, 8))
    np.testing.assert_allclose(read(wrapped, x), wanted, rtol=1e-4, atol=1e-5)
    stack.layer.init_cache((2, 8, 8))
    assert stack.layer.cache.key.shape == (2, 2, 8, 2, 2)
    np.testing.assert_allclose(stack(x, decode=True), at_once(plain, wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("use", "text"),
    [
        (lambda m: m(waves(3, 1, 8), decode=True), r"(?s)does not fit.*\(2, 1, 2, 2\).*\(3, 1, 2, 2\)"),
        (lambda m: m(waves(2, 1, 8), decode=True, lengths=jnp.array([1, 1])), "one length for all rows"),
        (lambda m: m(waves(2, 1, 8), decode=True, mask=jnp.ones((2, 1, 1, 5))), r"(?s)mask.*\(2, 1, 1, 5\)"),
        (lambda m: m(waves(2, 1, 8), waves(2, 3, 8), decode=True), "1 queries and 3 keys"),
        (lambda m: m(waves(2, 1, 8), lengths=jnp.array([1, 1])), "does not decode"),
        (lambda m: m.cache.reorder(jnp.array([0, 2])), r"(?s)cannot be reordered.*from 0 to 1.*\[0, 2\]"),
        (lambda m: m.cache.reorder(jnp.array([0, -1])), r"(?s)cannot be reordered.*\[0, -1\]"),
        (lambda m: m.cache.truncate(-1), r"(?s)cannot be rolled back.*-1"),
        (lambda m: m.cache.truncate(jnp.array([1, 2])), r"(?s)cannot be rolled back.*\(2,\)"),
        (lambda m: m.cache.reorder(jnp.array([1, 2, 0])), r"(?s)cannot be reordered.*\(2,\).*\[1, 2, 0\]"),
        (lambda m: nn.KVCache(2), "max_length"),
        (lambda m: nn.KVCache(2, 3, window=4), "an int from the window on"),
    ],
)
def test_bad_input(use: Callable[..., Any], text: str) -> None:
    layer = make()
    layer(waves(2, 3, 8), decode=True)
    before = mu.state(layer)
    with pytest.raises(ArgumentError, match=text):
        use(layer)
    assert mu.state(layer) == before


@pytest.mark.parametrize("lengths", [[4, 1], [-1, 1], [1.0, 1.0]], ids=str)
def test_lengths_that_count_other_tokens(lengths: list[int]) -> None:
    layer = make(ragged=True)
    with pytest.raises(ArgumentError, match=r"(?s)from 0 to 3.*"):
        layer(waves(2, 3, 8), decode=True, lengths=jnp.array(lengths))
    assert layer.cache.index.value.tolist() == [0, 0]


@pytest.mark.parametrize("ragged", [False, True])
def test_prompts_that_begin_with_padding(ragged: bool) -> None:
    """A mask for each row, over the places of the cache, hides it; positions do not matter without `rope`."""
    layer, x, padding = nn.MultiHeadAttention(2, 8, rngs=mu.Rngs(0)), waves(2, 6, 8), jnp.array([3, 1])
    layer.init_cache((2, 8, 8), ragged=ragged)
    mask = (jnp.arange(8)[None] >= padding[:, None])[:, None, None]
    decode = mu.jit(lambda layer, x, mask: layer(x, decode=True, mask=mask))
    y = jnp.concatenate([decode(layer, part, mask) for part in (x[:, :4], x[:, 4:5], x[:, 5:])], 1)
    for row, start in enumerate(padding.tolist()):
        alone = layer(x[row, start:], is_causal=True, decode=False)
        np.testing.assert_allclose(y[row, start:], alone, rtol=1e-4, atol=1e-5)


def test_projections_that_are_wrapped_or_replaced() -> None:
    class Half(mu.Module):
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __call__(self, x: jax.Array, out_sharding: Any = None) -> jax.Array:
            return jnp.asarray(0.5 * self.inner(x, out_sharding))

    layer, x = nn.MultiHeadAttention(2, 8, rngs=mu.Rngs(0)), waves(2, 5, 8)
    layer.query, layer.key = Half(layer.query), Half(layer.key)
    whole = layer(x, is_causal=True, decode=False)
    layer.init_cache((2, 8, 8))
    np.testing.assert_allclose(layer(x, decode=True), whole, rtol=1e-5, atol=1e-6)


def test_under_64_bits() -> None:
    layer: Any = nn.MultiHeadAttention(2, 8, rngs=mu.Rngs(0))
    x = jnp.sin(jnp.arange(24.0)).reshape(1, 3, 8)
    wanted = layer(x, is_causal=True)
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        layer.init_cache((1, 8, 8))
        parts = [layer(x[:, :2], decode=True), mu.jit(lambda layer, x: layer(x, decode=True))(layer, x[:, 2:])]
        np.testing.assert_allclose(jnp.concatenate(parts, 1), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"window": 0}, {"window": -1}, {"window": 2.0}, {"dtype": jnp.int32}])
def test_settings_that_are_none(options: dict[str, Any]) -> None:
    layer = nn.MultiHeadAttention(2, 8, rngs=mu.Rngs(0))
    with pytest.raises(ArgumentError, match=r"no place for the tokens|would round keys"):
        layer.init_cache((1, 8, 8), **options)
    with pytest.raises(ArgumentError, match="cannot be rolled back to this length"):
        nn.KVCache(1, 8).truncate(2.5)
