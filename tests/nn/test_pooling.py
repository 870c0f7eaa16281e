"""Pooling beside that of Flax and the same by hand: windows, dtypes, gradients, adaptive windows, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import nn
from mutatis.errors import ArgumentError

pytestmark = pytest.mark.once  # arithmetic of arrays: what JAX's versions differ in, the tests of transforms show


def noise(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape)


@pytest.mark.parametrize("transform", [lambda f: f, mu.jit, jax.grad], ids=["eager", "jit", "grad"])
@pytest.mark.parametrize(
    "options",
    [
        {"window_shape": (2, 3)},
        {"window_shape": (2, 2), "strides": (2, 1), "padding": "SAME"},
        {"window_shape": (3, 2), "strides": (2, 2), "padding": ((1, 1), (0, 1))},
    ],
)
@pytest.mark.parametrize("name", ["avg_pool", "max_pool", "min_pool", "avg_pool of what is there"])
def test_as_flax_does(name: str, options: dict[str, Any], transform: Callable[..., Any]) -> None:
    nnx = pytest.importorskip("flax.nnx")
    name, _, of_what = name.partition(" ")
    options = options | ({"count_include_pad": False} if of_what else {})

    def call(lib: Any) -> Any:
        def pooled(x: jax.Array) -> jax.Array:
            y = getattr(lib, name)(x, **options)
            return jnp.sum(jnp.sin(y)) if transform is jax.grad else y

        return transform(pooled)(noise(2, 5, 6, 3))

    with jax.numpy_dtype_promotion("standard"):
        wanted = call(nnx)
    np.testing.assert_allclose(call(nn), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3), (0,)])
def test_any_batch_axes(batch: tuple[int, ...]) -> None:
    x = noise(*batch, 6, 3)
    y = nn.avg_pool(x, (2,), (2,), count_include_pad=False)
    np.testing.assert_allclose(y, np.asarray(x).reshape(*batch, 3, 2, 3).mean(-2), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int8, jnp.uint8, jnp.int32, bool])
def test_dtypes(dtype: Any) -> None:
    x = jnp.array([3, 0, 0, 7, 1]).astype(dtype)[None, :, None]
    for pool, reduce in ((nn.max_pool, max), (nn.min_pool, min)):
        y = pool(x, (2,), (2,), "SAME")
        assert y.dtype == dtype
        values = x[0, :, 0].tolist()
        assert y[0, :, 0].tolist() == [reduce(values[i : i + 2]) for i in (0, 2, 4)]


def test_pool_takes_any_function() -> None:
    x = jnp.arange(1.0, 7.0)[None, :, None]
    assert nn.pool(x, 1.0, jax.lax.mul, (2,), (2,), "VALID")[0, :, 0].tolist() == [2, 12, 30]
    assert nn.pool(x, 0.0, jax.lax.add, (2,), None, ((0, 1),))[0, :, 0].tolist() == [3, 5, 7, 9, 11, 6]


@pytest.mark.parametrize("transform", [lambda f: f, mu.jit, mu.vmap], ids=["eager", "jit", "vmap"])
@pytest.mark.parametrize("target", [(1, 1), (3, 2), (5, 7), (7, 3), (None, 4)])
@pytest.mark.parametrize("name", ["Avg", "Max"])
def test_adaptive(name: str, target: tuple[Any, ...], transform: Callable[..., Any]) -> None:
    x = noise(2, 5, 7, 3)
    reduce = {"Avg": np.mean, "Max": np.max}[name]
    rows, columns = (range(size or full) for size, full in zip(target, (5, 7), strict=True))
    windows = [
        [math.floor(i * n / len(t)), math.ceil((i + 1) * n / len(t))] for n, t in ((5, rows), (7, columns)) for i in t
    ]
    downs, alongs = windows[: len(rows)], windows[len(rows) :]
    wanted = np.stack(
        [np.stack([reduce(np.asarray(x)[:, a:b, c:d], (1, 2)) for c, d in alongs], 1) for a, b in downs], 1
    )
    layer = getattr(nn, f"Adaptive{name}Pool")(target)
    np.testing.assert_allclose(transform(layer)(x), wanted, rtol=1e-5, atol=1e-6)
    assert not mu.variables(layer)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda x: nn.max_pool(x, 2), r"(?s)`window_shape`.*each spatial axis\n  got:      2"),
        (lambda x: nn.max_pool(x, (2, 0)), "whole numbers above 0"),
        (lambda x: nn.max_pool(x, (2.0, 2)), "whole numbers above 0"),
        (lambda x: nn.max_pool(x, (2, 2), (2,)), r"(?s)`strides`.*a tuple of 2"),
        (lambda x: nn.max_pool(x, (2, 2), padding=1), r"(?s)`padding`.*'SAME'"),
        (lambda x: nn.max_pool(x, (2, 2), padding="same"), r"(?s)`padding`.*'SAME'"),
        (lambda x: nn.max_pool(x, (2, 2), padding=((1, 1),)), r"(?s)`padding`.*a tuple of 2"),
        (lambda x: nn.max_pool(x[0, 0], (2, 2)), r"(?s)2 spatial axes.*\(6, 3\)"),
        (lambda x: nn.avg_pool(x.astype(int), (2, 2)), r"(?s)averages floats.*int32"),
        (lambda x: nn.AdaptiveAvgPool(1), r"(?s)`target_shape`.*got:      1"),
        (lambda x: nn.AdaptiveAvgPool((1, 1))(x[0, 0]), r"(?s)2 spatial axes.*\(6, 3\)"),
        (lambda x: nn.adaptive_max_pool(x[:, :0], (1, 1)), r"(?s)not empty.*\(2, 0, 6, 3\)"),
        (lambda x: nn.adaptive_avg_pool(x.astype(int), (1, 1)), "averages floats"),
    ],
)
def test_what_does_not_fit(call: Callable[[jax.Array], Any], text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        call(noise(2, 5, 6, 3))


def test_windows_of_padding_only() -> None:
    y = nn.avg_pool(jnp.ones((1, 4, 1)), (2,), (2,), ((2, 2),), count_include_pad=False)
    np.testing.assert_array_equal(y.ravel(), [0.0, 1.0, 1.0, 0.0])
