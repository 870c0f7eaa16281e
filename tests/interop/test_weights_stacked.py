"""Weights of layers in an `nn.Stack`: by the names of a list of layers, from and to either form, in both conventions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import errors, interop, nn

pytestmark = pytest.mark.once


class Block(mu.Module):
    """A layer with statistics, a stream, a tied part and weights that torch has turned."""

    def __init__(self, rngs: mu.Rngs) -> None:
        self.attention = nn.MultiHeadAttention(2, 4, rngs=rngs)
        self.norm = nn.BatchNorm(4)
        self.conv = nn.Conv(4, 4, (3,), rngs=rngs)
        self.tied = self.conv
        self.drop = nn.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.norm(self.conv(x + self.attention(x)))


class Net(mu.Module):
    def __init__(self, seed: int, layers: int = 3, *, stacked: bool) -> None:
        rngs = mu.Rngs(seed)
        self.embed = nn.Embed(7, 4, rngs=rngs)
        blocks = [Block(rngs) for _ in range(layers)]
        self.blocks: Any = nn.Stack(blocks) if stacked else blocks

    def __call__(self, tokens: Any) -> Any:
        x = self.embed(tokens)
        for block in self.blocks.layers() if isinstance(self.blocks, nn.Stack) else self.blocks:
            x = block(x)
        return x


TOKENS = jnp.array([[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize("convention", ["flax", "torch"])
@pytest.mark.parametrize("to", ["list", "stack"])
@pytest.mark.parametrize("of", ["list", "stack"])
def test_either_form_from_either(of: str, to: str, convention: str, tmp_path: Path) -> None:
    net, other = Net(0, stacked=of == "stack"), Net(1, stacked=to == "stack")
    net.train()(TOKENS)
    other.train()
    interop.save(tmp_path / "net.safetensors", net, convention=convention)
    names = [*interop.read(tmp_path / "net.safetensors")]
    assert sorted(names) == sorted(interop.export(Net(0, stacked=False), convention=convention))
    interop.load(other, tmp_path / "net.safetensors", convention=convention)
    np.testing.assert_allclose(net.eval()(TOKENS), other.eval()(TOKENS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("to", ["list", "stack"])
def test_stacked_arrays_and_states(to: str) -> None:
    net, other = Net(0, stacked=True), Net(1, stacked=to == "stack")
    interop.load(other, mu.state(net))  # under the paths of the stack
    np.testing.assert_allclose(net.eval()(TOKENS), other.eval()(TOKENS), rtol=1e-5, atol=1e-6)
    streams = [np.asarray(jax.random.key_data(block.drop.stream.value["key"])) for block in net.blocks.layers()]
    interop.load(other, mu.state(net), ...)
    layers = other.blocks.layers() if to == "stack" else other.blocks
    for block, stream in zip(layers, streams, strict=True):
        np.testing.assert_array_equal(jax.random.key_data(block.drop.stream.value["key"]), stream)


def test_names_through_tied_parts() -> None:
    net = Net(0, stacked=True)
    theirs = {name.replace(".conv.", ".tied."): array * 2 for name, array in interop.export(net).items()}
    interop.load(net, theirs)
    for name, array in interop.export(net).items():
        np.testing.assert_array_equal(array, theirs[name.replace(".conv.", ".tied.")])


def test_a_stack_in_a_stack() -> None:
    def make(seed: int, stacked: bool) -> Any:
        rngs = mu.Rngs(seed)
        rows = [[nn.Linear(2, 2, rngs=rngs) for _ in range(3)] for _ in range(2)]
        return nn.Stack([nn.Stack(row) for row in rows]) if stacked else rows

    nested, lists = make(0, True), make(1, False)
    lists_named = interop.export(lists)
    assert sorted(interop.export(nested)) == sorted(lists_named)
    interop.load(nested, lists_named)
    x = jnp.ones((1, 2))
    wanted = x
    for layer in (layer for row in lists for layer in row):
        wanted = layer(wanted)
    np.testing.assert_allclose(nested(x), wanted, rtol=1e-6)
    interop.load(lists, mu.state(make(2, True)))
    assert interop.export(lists)["0.0.bias"].shape == (2,)


def test_rules_of_a_published_model() -> None:
    """Layers of other names and with one fused matrix, as they are published, go into the stack."""
    stack = nn.Stack(lambda rngs: nn.LinearGeneral(4, (2, 3), rngs=rngs, use_bias=False), 2, rngs=mu.Rngs(0))
    model = {"layers": stack}
    theirs = {f"h.{n}.proj.weight": np.random.default_rng(n).normal(size=(6, 4)).astype(np.float32) for n in range(2)}
    interop.load(model, theirs, rules={"h.{n}.proj": "layers.{n}"}, convention="torch")
    for n in range(2):
        np.testing.assert_array_equal(stack.layer.kernel[n].reshape(4, 6), theirs[f"h.{n}.proj.weight"].T)


def test_what_does_not_fit() -> None:
    net = Net(0, stacked=True)
    before = mu.state(net)
    good = interop.export(Net(1, stacked=False))
    for change, text in [
        (
            lambda w: w.pop("blocks.1.conv.kernel"),
            r"missing:    blocks\[1\]\.conv\.kernel, as `blocks\.1\.conv\.kernel`",
        ),
        (
            lambda w: w.update({"blocks.3.conv.kernel": w["blocks.2.conv.kernel"]}),
            r"unexpected: blocks\.3\.conv\.kernel",
        ),
        (
            lambda w: w.update({"blocks.2.norm.mean": np.zeros(5, np.float32)}),
            r"blocks\[2\]\.norm\.mean: expected float32\[4\], got float32\[5\]",
        ),
    ]:
        weights = dict(good)
        change(weights)
        with pytest.raises(errors.CheckpointError, match=text):
            interop.load(net, weights)
        assert mu.state(net) == before
    with pytest.raises(
        errors.CheckpointError, match=r"blocks\.layer\.conv\.kernel: expected those of 2 layers, got float32\[3,3,4,4\]"
    ) as caught:
        interop.load(Net(0, 2, stacked=True), mu.state(net))
    assert "missing" not in str(caught.value)


def test_an_ensemble_of_stacks_keeps_its_stacked_names() -> None:
    ensemble = mu.vmap(lambda rngs: nn.Stack(lambda rngs: nn.Linear(2, 2, rngs=rngs), 3, rngs=rngs))(
        mu.Rngs(0).split(2)
    )
    weights = interop.export(ensemble)
    assert weights["layer.kernel"].shape == (2, 3, 2, 2)
    interop.load(ensemble, {name: array + 1 for name, array in weights.items()})
    np.testing.assert_array_equal(ensemble.layer.kernel, weights["layer.kernel"] + 1)


def test_placement_and_dtype_stay() -> None:
    stack = nn.Stack(lambda rngs: nn.Linear(2, 2, param_dtype=jnp.bfloat16, rngs=rngs), 3, rngs=mu.Rngs(0))
    weights = interop.export(stack)
    interop.load(stack, {name: array * 2 for name, array in weights.items()})
    assert stack.layer.kernel.dtype == jnp.bfloat16 and stack.layer.kernel.shape == (3, 2, 2)
    interop.load(stack, {name: array.astype(np.float32) for name, array in weights.items()}, cast=True)
    np.testing.assert_array_equal(np.asarray(stack.layer.kernel[1]), weights["1.kernel"])


@pytest.mark.parametrize("features", [2, 3])
def test_a_transposed_convolution_either_way_round(features: int) -> None:
    weight = np.random.default_rng(0).normal(size=(2, features, 3)).astype(np.float32)  # of torch: (in, out, size)
    x = jnp.sin(jnp.arange(10.0)).reshape(1, 5, 2)
    outputs = []
    for turned in (False, True):
        layer = nn.ConvTranspose(
            2, features, 3, strides=2, padding=((2, 2),), transpose_kernel=turned, use_bias=False, rngs=mu.Rngs(0)
        )
        interop.load(layer, {"weight": weight}, convention="torch")
        np.testing.assert_array_equal(interop.export(layer, convention="torch")["weight"], weight)
        outputs.append(layer(x))
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-6)


def test_rules_for_names_that_begin_like_a_collection() -> None:
    model = {"layers": [nn.Linear(2, 3, rngs=mu.Rngs(0))]}
    rules = {"hidden": "layers.0"}
    weights = {name: array + 1 for name, array in interop.export(model, rules=rules).items()}
    interop.load(model, weights, rules=rules)
    np.testing.assert_array_equal(model["layers"][0].kernel, weights["hidden.kernel"])


def test_an_ensemble_as_large_as_its_stacks() -> None:
    make = mu.vmap(lambda rngs: nn.Stack(lambda rngs: nn.Linear(2, 2, rngs=rngs), 3, rngs=rngs))
    assert sorted(interop.export(make(mu.Rngs(0).split(3)))) == ["layer.bias", "layer.kernel"]
