"""`MultiHeadAttention`, masks and positions beside those of Flax with the same weights; dropout; bad input."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import nn
from mutatis.errors import ArgumentError, RandomStreamError, StructureError

nnx = pytest.importorskip("flax.nnx")

ROPE_OF_FLAX = pytest.mark.skipif(not hasattr(nnx, "RoPE"), reason="this Flax has no RoPE")


def waves(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.sin(jnp.arange(np.prod(shape), dtype=jnp.float32)).reshape(shape).astype(dtype)


SETTINGS: list[dict[str, Any]] = [
    {"num_heads": 2, "in_features": 8},
    {"num_heads": 4, "in_features": 8, "num_kv_heads": 2, "use_bias": False},
    {"num_heads": 4, "in_features": 8, "num_kv_heads": 1, "qkv_features": 16, "out_features": 6},
    {
        "num_heads": 2,
        "in_features": 8,
        "in_kv_features": 8,
        "normalize_qk": True,
        "bias_init": jax.nn.initializers.normal(),
    },
    {"num_heads": 2, "in_features": 8, "dropout_rate": 0.5},
    {"num_heads": 4, "in_features": 8, "num_kv_heads": 2, "dropout_rate": 0.3, "broadcast_dropout": False},
]
TRANSFORMS: dict[str, Callable[[Any], Any]] = {
    "eager": lambda f: f,
    "jit": mu.jit,
    "scan": lambda f: lambda m, x: mu.scan(lambda _, __: (None, f(m, x)), None, length=1)[1][0],
}


def twins(settings: dict[str, Any], dtype: Any = jnp.float32) -> tuple[Any, Any]:
    ours = nn.MultiHeadAttention(**settings, param_dtype=dtype, rngs=mu.Rngs(0))
    theirs = nnx.MultiHeadAttention(**settings, param_dtype=dtype, decode=False, deterministic=False, rngs=nnx.Rngs(0))
    return ours, theirs


@pytest.mark.parametrize("settings", SETTINGS, ids=range(len(SETTINGS)))
def test_draws_of_flax(settings: dict[str, Any]) -> None:
    ours, theirs = twins(settings)
    wanted = dict(nnx.to_flat_state(nnx.state(theirs, nnx.Param)))
    got = mu.variables(ours, mu.Param)
    assert set(got) == set(wanted)
    for path, cell in got.items():
        np.testing.assert_array_equal(cell.value, wanted[path][...], err_msg=str(path))


@jax.numpy_dtype_promotion("standard")  # Flax promotes
@jax.numpy_rank_promotion("allow")
def of_flax(theirs: Any, *args: Any, **options: Any) -> Any:
    return theirs(*args, **options)


@pytest.mark.once
@pytest.mark.parametrize(
    ("transform", "dtype"), [*((name, jnp.float32) for name in TRANSFORMS), ("jit", jnp.bfloat16)], ids=str
)
@pytest.mark.parametrize("settings", SETTINGS, ids=range(len(SETTINGS)))
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_outputs_of_flax(transform: str, dtype: Any, settings: dict[str, Any], train: bool) -> None:
    ours, theirs = twins(settings, dtype)
    ours.train() if train else ours.eval()
    x = waves(2, 5, 8, dtype=dtype)
    mask = nn.make_causal_mask(x[..., 0], dtype=bool)
    call = TRANSFORMS[transform](lambda m, x: m(x, mask=mask))
    tolerance = 1e-5 if dtype == jnp.float32 else 3e-2
    for _ in range(2):  # streams advance alike
        wanted = of_flax(theirs, x, mask=mask, deterministic=not train)
        got = call(ours, x)
        assert got.dtype == wanted.dtype
        np.testing.assert_allclose(got.astype(jnp.float32), wanted.astype(jnp.float32), rtol=tolerance, atol=tolerance)


@pytest.mark.once
@pytest.mark.parametrize("settings", SETTINGS, ids=range(len(SETTINGS)))
def test_gradients_of_flax(settings: dict[str, Any]) -> None:
    ours, theirs = twins(settings)
    x, y = waves(2, 3, 8), waves(2, 4, 8)
    got = mu.grad(lambda m: jnp.sum(m(x, y) ** 2))(ours)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        wanted = dict(nnx.to_flat_state(nnx.grad(lambda m: jnp.sum(m(x, y, deterministic=False) ** 2))(theirs)))
    for path, value in got.flat().items():
        np.testing.assert_allclose(value, wanted[path][...], rtol=1e-3, atol=1e-4, err_msg=str(path))


def test_under_vmap() -> None:
    layer = nn.MultiHeadAttention(2, 8, rngs=mu.Rngs(0))
    x = waves(3, 2, 4, 8)
    np.testing.assert_allclose(mu.vmap(layer)(x), layer(x), rtol=1e-5, atol=1e-6)
    ensemble = mu.vmap(lambda rngs: nn.MultiHeadAttention(2, 8, rngs=rngs))(mu.Rngs(0).split(3))
    assert ensemble.query.kernel.shape == (3, 8, 2, 4)
    assert mu.vmap(lambda m, x: m(x))(ensemble, x).shape == x.shape


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_batch_axes_and_masks(batch: tuple[int, ...]) -> None:
    query, key, value = waves(*batch, 3, 4, 8), waves(*batch, 5, 2, 8) + 0.5, waves(*batch, 5, 2, 8)
    mask = (jnp.arange(15).reshape(3, 5) % 4 > 0).reshape((1,) * (len(batch) + 1) + (3, 5))
    bias = waves(4, 3, 5)
    fast = nn.dot_product_attention(query, key, value, bias, mask)
    weights = nn.dot_product_attention_weights(query, key, bias, mask)
    grouped = weights.reshape(*batch, 2, 2, 3, 5)
    wanted = jnp.einsum("...hgqk,...khd->...qhgd", grouped, value).reshape(query.shape)
    np.testing.assert_allclose(fast, wanted, rtol=1e-5, atol=1e-5)
    precise = nn.dot_product_attention(query, key, value, bias, mask, precision="highest")
    np.testing.assert_allclose(fast, precise, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(weights[..., 0, 0], 0)
    assert nn.dot_product_attention(query, key, value[..., :3]).shape == (*batch, 3, 4, 3)


def test_weights_are_kept() -> None:
    layer = nn.MultiHeadAttention(2, 8, rngs=mu.Rngs(0))
    plain, kept = layer(waves(1, 3, 8), is_causal=True), layer(waves(1, 3, 8), is_causal=True, sow_weights=True)
    np.testing.assert_allclose(plain, kept, rtol=1e-5, atol=1e-6)
    (weights,) = mu.pop(layer, mu.Intermediate)["attention_weights"]
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(jnp.triu(weights[0, 0], 1), 0)


# -- masks and positions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("shape", [(4,), (2, 4), (2, 3, 4)])
def test_masks_of_flax(shape: tuple[int, ...], extra: int) -> None:
    tokens = (jnp.arange(np.prod(shape)).reshape(shape) % 3).astype(jnp.int32)
    causal = nn.make_causal_mask(tokens, extra)
    known = nn.make_attention_mask(tokens > 0, tokens > 0, extra_batch_dims=extra)
    np.testing.assert_array_equal(causal, nnx.make_causal_mask(tokens, extra))
    np.testing.assert_array_equal(known, nnx.make_attention_mask(tokens > 0, tokens > 0, extra_batch_dims=extra))
    both = nn.combine_masks(causal, None, known)
    assert both is not None and both.dtype == jnp.float32
    np.testing.assert_array_equal(both, nnx.combine_masks(causal, None, known))
    assert nn.combine_masks(None) is None


@ROPE_OF_FLAX
@pytest.mark.parametrize("table", [False, True])
def test_rope_of_flax(table: bool) -> None:
    sizes = {"embedding_size": 8, "max_seq_len": 16} if table else {}
    ours, theirs, x = nn.RoPE(100.0, **sizes), nnx.RoPE(100.0), waves(2, 5, 8)
    np.testing.assert_allclose(ours(x), of_flax(theirs, x), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours(x, jnp.arange(5) + 7), of_flax(theirs, x, jnp.arange(5) + 7), rtol=1e-5, atol=1e-5)
    rows = jnp.array([[0, 1, 2, 3, 4], [9, 8, 7, 6, 5]])
    each = [of_flax(theirs, x[row], rows[row]) for row in range(2)]
    np.testing.assert_allclose(ours(x, rows), jnp.stack(each), rtol=1e-5, atol=1e-5)
    assert ours(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@ROPE_OF_FLAX
def test_rope_as_an_argument_and_as_a_function() -> None:
    x = waves(2, 5, 8)
    function = functools.partial(nnx.dot_product_attention_with_rope, rope=nnx.RoPE())
    wanted = of_flax(nnx.MultiHeadAttention(2, 8, attention_fn=function, decode=False, rngs=nnx.Rngs(0)), x)
    ours = functools.partial(nn.dot_product_attention_with_rope, rope=nn.RoPE())
    for layer in (
        nn.MultiHeadAttention(2, 8, rope=nn.RoPE(), rngs=mu.Rngs(0)),
        nn.MultiHeadAttention(2, 8, attention_fn=ours, rngs=mu.Rngs(0)),
    ):
        np.testing.assert_allclose(mu.jit(layer)(x), wanted, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(layer(x, input_positions=jnp.arange(5)[None]), wanted, rtol=1e-5, atol=1e-5)


def test_positions_that_are_added() -> None:
    table = np.zeros((6, 4))
    for place, pair in np.ndindex(6, 2):
        table[place, 2 * pair : 2 * pair + 2] = np.sin(place / 100**pair), np.cos(place / 100**pair)
    sines, learned = nn.SinusoidalPositions(), nn.LearnedPositions(6, 4, rngs=mu.Rngs(0))
    x, places = waves(2, 3, 4), jnp.array([2, 3, 4])
    np.testing.assert_allclose(sines(x), x + table[None, :3], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sines(x, places), x + table[None, 2:5], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(learned(x, places), x + learned.embedding.value[None, 2:5], rtol=1e-6)
    np.testing.assert_array_equal(learned(x)[:, 1:], learned(x[:, 1:], jnp.array([1, 2])))


# -- bad input -----------------------------------------------------------------------------------------------------


def call(**options: Any) -> Callable[..., Any]:
    return lambda *args, **more: nn.MultiHeadAttention(2, 8, rngs=mu.Rngs(0), **options)(*args, **more)


def wrapped() -> Any:
    layer: Any = nn.MultiHeadAttention(2, 8, rngs=mu.Rngs(0))
    layer.query = nn.SpectralNorm(layer.query, rngs=mu.Rngs(1))
    return layer


@pytest.mark.parametrize(
    ("use", "text"),
    [
        (lambda: call()(waves(2, 3, 7)), r"(?s)query.kernel.*8 along axis -1.*\(2, 3, 7\)"),
        (lambda: call()(waves(8)), r"(?s)query.kernel.*\(\*batch, length, 8\).*\(8,\)"),
        (lambda: call()(jnp.ones((2, 3, 8), jnp.int32)), "floats"),
        (lambda: call()(waves(2, 3, 8), mask=jnp.ones((3, 1, 3, 3))), r"(?s)mask.*\(2, 2, 3, 3\).*\(3, 1, 3, 3\)"),
        (lambda: call()(waves(2, 3, 8), mask=jnp.ones((2, 3, 4))), r"(?s)mask.*\(2, 3, 4\)"),
        (lambda: call()(waves(2, 3, 8), None, waves(2, 3, 8)), "values and no keys"),
        (lambda: call()(waves(2, 3, 8), waves(3, 3, 8)), "do not fit each other"),
        (lambda: nn.MultiHeadAttention(3, 8, rngs=mu.Rngs(0)), r"(?s)`qkv_features`.*num_heads=3.*8"),
        (lambda: nn.MultiHeadAttention(4, 8, num_kv_heads=3, rngs=mu.Rngs(0)), r"(?s)`num_heads`.*num_kv_heads=3"),
        (lambda: call(dropout_rate=1.0)(waves(2, 3, 8)), "rate"),
        (lambda: nn.RoPE(max_seq_len=8), "embedding_size"),
        (lambda: nn.RoPE()(waves(2, 3)), "even number of features"),
        (lambda: nn.RoPE()(waves(2, 4), jnp.arange(3)), r"(?s)shape \(2, 4\).*\(3,\)"),
        (lambda: nn.LearnedPositions(4, 8, rngs=mu.Rngs(0))(waves(5, 8)), r"(?s)embedding.*at most 4.*\(5, 8\)"),
        (
            lambda: call(rope=nn.RoPE(embedding_size=8, max_seq_len=9))(waves(2, 3, 8)),
            r"(?s)8 features, for which the table was made.*\(2, 2, 3, 4\)",
        ),
        (
            lambda: call()(waves(2, 3, 8), input_positions=jnp.arange(3)),
            r"(?s)has nothing that takes them.*nn.RoPE\(\)",
        ),
        (lambda: wrapped()(waves(8)), r"(?s)layer .MultiHeadAttention.*\(\*batch, length, 8\)"),
        (lambda: nn.combine_masks(jnp.ones((2, 3)), jnp.ones((4, 3))), r"\(2, 3\), \(4, 3\)"),
    ],
)
def test_bad_input(use: Callable[[], Any], text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        use()


def test_missing_streams_and_caches() -> None:
    with pytest.raises(RandomStreamError, match=r"(?s)dropout.*rngs=rngs"):
        call(dropout_rate=0.1, keep_rngs=False)(waves(2, 3, 8))
    assert call(dropout_rate=0.1, keep_rngs=False)(waves(2, 3, 8), rngs=mu.Rngs(dropout=0)).shape == (2, 3, 8)
    with pytest.raises(StructureError, match=r"(?s)no cache.*init_cache"):
        call(decode=True)(waves(2, 1, 8))
