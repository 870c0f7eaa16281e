"""`Sequential`: what goes from one to the next, keyword arguments, and changes of the list."""

from __future__ import annotations

import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import nn
from mutatis.errors import ArgumentError


def test_one_after_the_other() -> None:
    rngs = mu.Rngs(0)
    first, last = nn.Linear(2, 4, rngs=rngs), nn.Linear(4, 3, rngs=rngs)
    model, x = nn.Sequential(first, nn.relu, last), jnp.ones((5, 2))
    np.testing.assert_allclose(mu.jit(model)(x), last(jax.nn.relu(first(x))), rtol=1e-6)
    assert [*mu.state(model).flat()] == [("layers", i, name) for i in (0, 2) for name in ("bias", "kernel")]
    assert [*model] == model.layers and len(model) == 3 and model[1:] == [nn.relu, last]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model))(x), model(x))


def test_tuples_and_dictionaries() -> None:
    assert (
        nn.Sequential(lambda a, b: (b, a), lambda a, b: {"left": a, "right": b}, lambda right, left: right - left)(1, 3)
        == -2
    )
    assert nn.Sequential(lambda a: {"a": a}, lambda a, b: a + b)(1, b=3) == 4


@pytest.mark.parametrize(
    ("args", "kwargs", "wanted"), [((3,), {}, 3), ((3, 4), {}, (3, 4)), ((), {"a": 1}, {"a": 1}), ((), {}, None)]
)
def test_empty(args: Any, kwargs: Any, wanted: Any) -> None:
    assert nn.Sequential()(*args, **kwargs) == wanted


def test_keyword_arguments_reach_who_takes_them() -> None:
    seen = []
    model = nn.Sequential(
        nn.Dropout(0.5, rngs=mu.Rngs(0)),
        nn.BatchNorm(4),
        lambda x, *, scale=1: x * scale,
        lambda x, **rest: seen.append(rest) or x,
        jnp.negative,
    )
    x = jnp.ones((2, 4))
    y = model(x, deterministic=True, use_running_average=True, scale=2)
    np.testing.assert_allclose(y, -2 * x, rtol=1e-4)
    assert seen == [{"deterministic": True, "use_running_average": True, "scale": 2}]


def test_the_list_may_change() -> None:
    model = nn.Sequential(nn.relu)
    call = mu.jit(model)
    assert call(jnp.ones((1, 4))).shape == (1, 4)
    model.layers.append(nn.Linear(4, 2, rngs=mu.Rngs(0)))
    assert call(jnp.ones((1, 4))).shape == (1, 2)


def test_what_does_not_fit() -> None:
    with pytest.raises(ArgumentError, match=r"number 1 of `nn.Sequential` cannot be called inside `jit\(Sequential\)`"):
        mu.jit(nn.Sequential(nn.relu, 3))(jnp.ones(2))
    with pytest.raises(ArgumentError, match=r"number 1 of `nn.Sequential` was given `a` twice"):
        nn.Sequential(lambda x: {"a": x}, lambda a: a)(1, a=2)
