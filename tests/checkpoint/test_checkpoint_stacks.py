"""A model with a list of layers and one with a `Stack` of them read each other's checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import checkpoint, nn
from mutatis.errors import CheckpointError

pytestmark = pytest.mark.once
X = jnp.linspace(-1.0, 1.0, 8).reshape(2, 4)


class Block(mu.Module):
    """With a state of each sort: parameters, statistics, a random stream, and a pytree."""

    def __init__(self, rngs: mu.Rngs) -> None:
        self.inner = [nn.Linear(4, 4, rngs=rngs)]
        self.norm = nn.BatchNorm(4, rngs=rngs)
        self.drop = nn.Dropout(0.5, rngs=rngs)
        self.pair = mu.Hidden({"a": jnp.zeros(2), "b": jax.random.uniform(rngs())})

    def __call__(self, x: Any) -> Any:
        return x + jnp.tanh(self.norm(self.inner[0](x)))


class Listed(mu.Module):
    def __init__(self, seed: int, length: int = 3) -> None:
        rngs = mu.Rngs(seed)
        self.blocks = [Block(rngs) for _ in range(length)]
        self.out = nn.Linear(4, 1, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x)
        return self.out(x)


class Stacked(mu.Module):
    def __init__(self, seed: int, length: int = 3) -> None:
        rngs = mu.Rngs(seed)
        self.blocks = nn.Stack(Block, length, rngs=rngs)
        self.out = nn.Linear(4, 1, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.out(self.blocks(x))


@pytest.mark.parametrize("saved", [Listed, Stacked])
@pytest.mark.parametrize("read", [Listed, Stacked])
def test_each_reads_the_other(saved: Callable[..., Any], read: Callable[..., Any], tmp_path: Path) -> None:
    first, second = saved(0), read(1)
    first(X)
    without_streams = mu.Not(mu.RngState)
    checkpoint.save(tmp_path / "c", first, without_streams)
    checkpoint.restore(tmp_path / "c", second, without_streams)
    for model in (first, second):
        model.eval()
    np.testing.assert_allclose(first(X), second(X), rtol=1e-5)
    back = saved(2)
    checkpoint.save(tmp_path / "d", second, without_streams)
    checkpoint.restore(tmp_path / "d", back, without_streams)
    one, other = (dict(mu.state(model, without_streams).flat()) for model in (first, back))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_part_by_a_filter(tmp_path: Path) -> None:
    listed, stacked = Listed(0), Stacked(1)
    checkpoint.save(tmp_path / "c", listed)
    before = stacked.blocks.layer.norm.mean.value
    checkpoint.restore(tmp_path / "c", stacked, mu.Param)
    np.testing.assert_array_equal(stacked.blocks.layer.inner[0].kernel[1], listed.blocks[1].inner[0].kernel.value)
    np.testing.assert_array_equal(stacked.blocks.layer.norm.mean.value, before)


@pytest.mark.parametrize("forms", [(Listed, Stacked), (Stacked, Listed)])
@pytest.mark.parametrize("lengths", [(2, 3), (3, 2)])
def test_another_number_of_layers_is_refused(forms: Any, lengths: Any, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", forms[0](0, lengths[0]), mu.Param)
    model = forms[1](1, lengths[1])
    before = dict(mu.state(model, mu.Param).flat())
    with pytest.raises(CheckpointError):
        checkpoint.restore(tmp_path / "c", model, mu.Param)
    jax.tree.map(np.testing.assert_array_equal, before, dict(mu.state(model, mu.Param).flat()))


def test_types_are_compared(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", {"layers": nn.Stack([nn.Linear(2, 3, rngs=mu.Rngs(n)) for n in range(2)])})
    with pytest.raises(CheckpointError, match=r"expected float32\[4,3\], got float32\[2,3\]"):
        checkpoint.restore(tmp_path / "c", {"layers": [nn.Linear(4, 3, rngs=mu.Rngs(n)) for n in range(2)]})


@pytest.mark.parametrize("forms", [(Listed, Stacked), (Stacked, Listed)])
def test_one_layer(forms: Any, tmp_path: Path) -> None:
    first, second = forms[0](0, 1), forms[1](1, 1)
    checkpoint.save(tmp_path / "c", first, mu.Param)
    checkpoint.restore(tmp_path / "c", second, mu.Param)
    np.testing.assert_allclose(first(X), second(X), rtol=1e-5)
