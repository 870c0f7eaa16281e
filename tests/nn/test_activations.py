"""`PReLU`, and that activations and initializers are those of JAX, under the names that people type."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import nn
from mutatis.errors import ArgumentError


def test_names_are_those_of_jax() -> None:
    names = "celu elu gelu glu hard_sigmoid hard_silu hard_swish hard_tanh identity leaky_relu log_sigmoid log_softmax " \
        "logsumexp one_hot relu relu6 selu sigmoid silu soft_sign softmax softplus standardize swish tanh mish"  # fmt: skip
    for name in names.split():
        assert getattr(nn, name) is getattr(jax.nn, name)
    for name in dir(jax.nn.initializers):
        if not name.startswith("_"):
            assert getattr(nn.initializers, name) is getattr(jax.nn.initializers, name)
    assert nn.initializers.zeros_init() is jax.nn.initializers.zeros
    assert nn.initializers.ones_init() is jax.nn.initializers.ones


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_prelu(dtype: jnp.dtype) -> None:
    layer, x = nn.PReLU(0.5), jnp.array([-2.0, 0.0, 2.0], dtype)
    y = mu.jit(layer)(x)
    assert y.dtype == dtype and y.tolist() == [-1, 0, 2]
    assert float(mu.grad(lambda m: jnp.sum(m(x).astype(jnp.float32)))(layer)["negative_slope"]) == -2
    assert nn.PReLU(dtype=jnp.float16)(x).dtype == jnp.float16
    assert nn.PReLU(dtype=jnp.float32)(jnp.arange(-1, 2)).tolist() == pytest.approx([-0.01, 0, 1])
    assert nn.PReLU(param_dtype=jnp.bfloat16, negative_slope_metadata={"tag": "slope"}).negative_slope.tag == "slope"


def test_prelu_takes_floats() -> None:
    with pytest.raises(ArgumentError, match=r"(?s)negative_slope.*floats.*int32\[3\]"):
        nn.PReLU()(np.arange(3, dtype=np.int32))
