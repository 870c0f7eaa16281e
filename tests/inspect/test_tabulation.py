"""The table of layers: shapes, states and costs beside those of a real call, without one."""

from __future__ import annotations

import io
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import rich.console

import mutatis as mu
from mutatis import nn
from mutatis.inspect import tabulate

X = jax.ShapeDtypeStruct((32, 784), jnp.float32)


class Block(mu.Module):
    def __init__(self, rngs: mu.Rngs) -> None:
        self.linear = nn.Linear(None, 128, rngs=rngs)
        self.dropout = nn.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Any, *, scale: Any = None, active: bool = True) -> Any:
        return self.dropout(self.linear(x)) if active else x


class Net(mu.Module):
    def __init__(self, rngs: mu.Rngs) -> None:
        self.block = mu.remat(Block(rngs), static_argnames=("active",))
        self.norm = nn.BatchNorm(128)
        self.cache = None

    def __call__(self, x: Any) -> Any:
        if self.cache is None:
            self.cache = mu.Cache(jnp.zeros(3))
        y = self.norm(self.block(x, scale=None, active=True))
        return self.norm(y)


@pytest.mark.parametrize("shapes", [False, True])
def test_calls(shapes: bool) -> None:
    net = mu.eval_shape(lambda: Net(mu.Rngs(0))) if shapes else Net(mu.Rngs(0))
    calls = tabulate(net, X).calls
    assert [(call.path, call.layer) for call in calls] == [
        ("", "Net"),
        ("block", "Block"),
        ("block.linear", "Linear"),
        ("block.dropout", "Dropout"),
        ("norm", "BatchNorm"),
        ("norm", "BatchNorm"),
    ]
    assert [call.inputs for call in calls[:5]] == ["float32[32,784]"] * 3 + ["float32[32,128]"] * 2
    assert {call.output for call in calls} == {"float32[32,128]"}
    assert calls[0].kinds == {"RngState": 1, "Param": 4, "BatchStat": 2, "Cache": 1}
    assert [call.parameters for call in calls] == [100_736, 100_480, 100_480, 0, 256, 256]
    assert calls[2].bytes == 4 * 100_480
    assert net.cache is None, "the model is left as it is"
    assert net.block.__wrapped__.linear.kernel.deferred


def test_flops_are_those_of_the_layer_alone() -> None:
    linear = nn.Linear(784, 128, rngs=mu.Rngs(0))
    (call,) = tabulate(linear, X).calls
    by_hand = jax.jit(lambda k, b, x: x @ k + b[None]).lower(linear.kernel.value, linear.bias.value, X)
    assert call.flops == by_hand.cost_analysis()["flops"]


def test_depth_and_text() -> None:
    table = tabulate(Net(mu.Rngs(0)), X, depth=1)
    assert [call.path for call in table.calls] == ["", "block", "norm", "norm"]
    console = rich.console.Console(file=io.StringIO(), width=200)
    console.print(table)
    for text in (str(table), console.file.getvalue(), table.to_html()):
        assert "100,480" in text and "BatchNorm" in text


def test_nothing_is_allocated() -> None:
    net = mu.eval_shape(lambda: nn.Linear(100_000, 100_000, rngs=mu.Rngs(0)))
    (call,) = tabulate(net, jax.ShapeDtypeStruct((1, 100_000), jnp.float32)).calls
    assert call.parameters == 10_000_100_000


@pytest.mark.parametrize("transform", ["vmap", "scan"])
def test_stacked_layers(transform: str) -> None:
    class Stack(mu.Module):
        def __init__(self) -> None:
            keys = jax.random.split(jax.random.key(0), 3)
            self.layers = mu.vmap(lambda key: nn.Linear(4, 4, rngs=mu.Rngs(key)))(keys)

        def __call__(self, x: Any) -> Any:
            if transform == "vmap":
                return mu.vmap(lambda layer: layer(x))(self.layers)
            return mu.scan(lambda x, layer: (layer(x), None), x, self.layers)[0]

    x = jax.ShapeDtypeStruct((2, 4), jnp.float32)
    _, layer = tabulate(Stack(), x).calls
    (alone,) = tabulate(nn.Linear(4, 4, rngs=mu.Rngs(0)), x).calls
    assert (layer.path, layer.parameters, layer.bytes) == ("layers", 3 * 20, 3 * 80)
    assert (layer.inputs, layer.output, layer.flops) == (alone.inputs, alone.output, alone.flops)


def test_flags_and_functions_are_what_they_are() -> None:
    class Switch(mu.Module):
        def __init__(self) -> None:
            self.linear = nn.Linear(4, 4, rngs=mu.Rngs(0))

        def __call__(self, x: Any, active: bool, act: Any = None) -> Any:
            return act(self.linear(x)) if active else x

    x = jax.ShapeDtypeStruct((2, 4), jnp.float32)
    assert [call.path for call in tabulate(Switch(), x, True, act=jnp.tanh).calls] == ["", "linear"]
    assert [call.path for call in tabulate(Switch(), x, False).calls] == [""]


class Deep(mu.Module):
    """Many blocks that are alike, and one that is not."""

    def __init__(self, depth: int) -> None:
        rngs = mu.Rngs(0)
        sizes = [4] * depth + [8]
        self.blocks = [nn.Sequential(nn.Linear(4, size, rngs=rngs), nn.LayerNorm(size, rngs=rngs)) for size in sizes]

    def __call__(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x)
        return x


def test_layers_that_are_alike_are_folded() -> None:
    table = tabulate(mu.eval_shape(lambda: Deep(9)), jax.ShapeDtypeStruct((2, 4), jnp.float32))
    assert len(table.calls) == 1 + 3 * 10
    shown = [row.split()[0] for row in str(table).splitlines()[1:]]
    assert shown == [
        ".",
        *(f"blocks[{which}]{rest}" for which in ("0..8", "9") for rest in ("", ".layers[0]", ".layers[1]")),
    ]
    few = tabulate(mu.eval_shape(lambda: Deep(3)), jax.ShapeDtypeStruct((2, 4), jnp.float32))
    assert len(str(few).splitlines()) == 2 + 3 * 4


def test_a_model_of_thousands_of_layers_stays_readable() -> None:
    def make() -> Any:
        net: Any = mu.Module()
        net.alike = [nn.PReLU() for _ in range(3000)]
        net.others = [mu.Param(jnp.zeros(size + 2)) for size in range(1000)]
        return net

    text = repr(mu.eval_shape(make))
    assert len(text.splitlines()) <= 40
    assert "alike=[3,000 x PReLU(" in text and " more: " in text and "Param(float32[1001])" in text


def test_layers_before_a_loop() -> None:
    class Net(mu.Module):
        def __init__(self) -> None:
            self.first = nn.Linear(4, 4, rngs=mu.Rngs(0))
            self.rest = nn.Stack(lambda rngs: nn.Linear(4, 4, rngs=rngs), 3, rngs=mu.Rngs(1))
            self.step = mu.jit(lambda layer, x: layer(x))

        def __call__(self, x: Any) -> Any:
            return self.rest(self.step(self.first, self.first(x)))

    calls = mu.inspect.tabulate(Net(), jnp.ones((2, 4))).calls
    assert {call.path for call in calls} >= {"", "first", "rest", "rest.layer"}
