"""Names of other libraries: each is missing, and what is written instead exists and runs."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import optax
import pytest

import mutatis as mu
from mutatis import nn
from mutatis._equivalents import EQUIVALENTS

pytestmark = pytest.mark.once  # many alike; what JAX's versions differ in, the twins and traces of transforms show

ROWS = [(place, name, instead) for place, names in EQUIVALENTS.items() for name, instead in names.items()]
PLACES = {"mutatis": mu, "mutatis.nn": nn, "Variable": mu.Param(jnp.ones(2)), "jax.Array": jnp.ones(2)}
PLACES |= {"Module": mu.Module(), "Optimizer": mu.Optimizer(mu.Param(1.0), optax.sgd(0.1)), "mutatis.optim": mu.optim}


@pytest.mark.parametrize(("place", "name", "instead"), ROWS)
def test_every_row(place: str, name: str, instead: str) -> None:
    with pytest.raises(AttributeError) as caught:
        mu.jit(lambda: getattr(PLACES[place], name))()  # what is said of arrays is said where they go through us
    assert instead in str(caught.value) + "".join(getattr(caught.value, "__notes__", ()))
    # What the row says exists: each dotted name in it leads somewhere.
    names = {"mu": mu, "nn": nn, "jax": jax, "v": PLACES["Variable"], "model": mu.Module(), "state": mu.State({}, {})}
    for dotted in re.findall(r"\b(?:mu|nn|jax|v|model|state)(?:\.\w+)+", instead):
        root, *parts = dotted.split(".")
        found = names[root]
        for part in parts:
            found = getattr(found, part)


@pytest.mark.parametrize(
    "code",
    [
        "mu.nn.Linear(2, 3, rngs=mu.Rngs(0))",
        "mu.Rngs(0).split(4)",
        "mu.Rngs(0).fork()",
        "mu.state(model).to_pure_dict()",
        "mu.update(model, mu.state(model).to_pure_dict())",
        "mu.split(model, mu.Param, ...)",
        "mu.view(model, training=False)",
        "mu.Param(x, tag='a')",
        "mu.Param(x, sharding=('embed', 'mlp'))",
        "nn.Conv(1, 8, kernel_size=(3, 3), rngs=rngs)",
        "nn.Conv(1, 8, kernel_size=(3,), rngs=rngs)",
        "nn.Conv(1, 8, kernel_size=(3, 3, 3), rngs=rngs)",
        "nn.ConvTranspose(1, 8, kernel_size=(3, 3), rngs=rngs)",
        "nn.Embed(num_embeddings=100, features=8, rngs=rngs)",
        "nn.max_pool(x[None, ..., None], (2, 2), (2, 2))",
        "nn.AdaptiveAvgPool((1, 1))(x[..., None])",
        "nn.Dropout(0.5, broadcast_dims=(1, 2), rngs=rngs)",
        "nn.relu(mu.Param(x))",
        "mu.reset(model, mu.Hidden)",
        "mu.scan(lambda c, x: (c, x), 0, x, checkpoint_every=10)",
        "mu.grad(lambda m: m.w.value.sum(), wrt=mu.Param)(model)",
    ],
)
def test_what_is_written_instead_runs(code: str) -> None:
    model = mu.Module()
    model.w = mu.Param(jnp.ones((2, 2)))
    eval(code, {"mu": mu, "nn": nn, "jax": jax, "model": model, "x": jnp.ones((2, 2)), "rngs": mu.Rngs(0)})


@pytest.mark.parametrize("name", [name for name in dir(jax.nn) if not name.startswith("_")])
def test_functions_of_jax_are_named(name: str) -> None:
    if not hasattr(nn, name):
        with pytest.raises(AttributeError, match=rf"write `jax\.nn\.{name}`"):
            getattr(nn, name)


def test_other_names_are_only_missing() -> None:
    for place in (mu, nn):
        with pytest.raises(AttributeError, match=r"has no attribute 'nothing_like_it'$"):
            _ = place.nothing_like_it
        assert not hasattr(place, "__wrapped__")
        assert not hasattr(place, "_private")
