"""`Stack` beside a list of the same layers: outputs, gradients, statistics, streams, caches; there and back; bad input."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import nn
from mutatis.errors import ArgumentError, StructureError

pytestmark = pytest.mark.once


class Block(mu.Module):
    def __init__(self, rngs: mu.Rngs) -> None:
        self.linear, self.norm = nn.Linear(8, 8, rngs=rngs), nn.BatchNorm(8, rngs=rngs)
        self.dropout = nn.Dropout(0.5, rngs=rngs)
        self.attention = nn.MultiHeadAttention(2, 8, rngs=rngs)

    def __call__(self, x: jax.Array, decode: bool = False) -> jax.Array:
        x = x + self.dropout(self.norm(self.linear(x)))
        return x + self.attention(x, decode=decode, is_causal=True)


def make() -> tuple[list[Block], jax.Array]:
    return [Block(mu.Rngs(seed)) for seed in range(3)], jnp.sin(jnp.arange(64.0)).reshape(2, 4, 8)


def run(layers: Any, x: jax.Array) -> jax.Array:
    for layer in layers:
        x = layer(x)
    return x


def same(a: Any, b: Any) -> None:
    values = [mu.state(node).flat() for node in (a, b)]
    assert values[0].keys() == values[1].keys()
    for path, value in values[0].items():
        for x, y in zip(jax.tree.leaves(value), jax.tree.leaves(values[1][path]), strict=True):
            if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
                x, y = jax.random.key_data(x), jax.random.key_data(y)
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5, err_msg=str(path))


@pytest.mark.parametrize(("remat", "transform"), [(False, lambda f: f), (True, mu.jit)], ids=["eager", "remat and jit"])
def test_as_a_list(remat: bool, transform: Any) -> None:
    layers, x = make()
    stack = nn.Stack(layers, remat=remat, unroll=2)
    loss = mu.value_and_grad(lambda m, x: jnp.sum(run([m] if isinstance(m, nn.Stack) else m, x) ** 2))
    for _ in range(2):
        value, gradient = transform(loss)(stack, x)
        wanted, gradients = loss(layers, x)
        np.testing.assert_allclose(value, wanted, rtol=1e-4)
        for path, stacked in gradient.flat().items():
            each = jnp.stack([g.flat()[path[1:]] for g in gradients])
            np.testing.assert_allclose(stacked, each, rtol=1e-3, atol=1e-3, err_msg=str(path))
    for ours, theirs in zip(stack.layers(), layers, strict=True):
        same(ours, theirs)
    np.testing.assert_allclose(stack.eval()(x), run([layer.eval() for layer in layers], x), rtol=1e-4, atol=1e-5)


def test_there_and_back() -> None:
    layers, x = make()
    stack = nn.Stack(Block, 3, rngs=mu.Rngs(7))
    assert len(stack) == 3 and not np.array_equal(stack[0].linear.kernel, stack[1].linear.kernel)
    stack.load(layers)
    same(stack[1], layers[1])
    same(nn.Stack(stack.layers()), stack)
    assert sorted(mu.state(stack.layers(), mu.Param).flat()) == sorted(mu.state(layers, mu.Param).flat())
    with pytest.raises(IndexError):
        stack[3]
    assert stack.layer.linear.kernel.shape == (3, 8, 8)


def test_a_layer_that_was_taken_out_starts_anew_as_one_layer() -> None:
    stack = nn.Stack(make()[0])
    layer = stack[1]
    layer.attention.init_cache((2, 8, 8))
    mu.reset(layer, mu.BatchStat)
    assert layer.norm.mean.shape == (8,)
    again = nn.Stack(stack.layers())
    mu.reset(again, mu.BatchStat)
    assert again.layer.norm.mean.shape == (3, 8) and mu.graphdef(again) == mu.graphdef(stack)


def test_each_layer_has_a_cache() -> None:
    layers, x = make()
    stack = nn.Stack(layers).eval()
    wanted = stack(x)
    stack.each(lambda layer: layer.attention.init_cache((2, 8, 8), ragged=True))
    read = mu.jit(lambda m, x: m(x, decode=True))
    np.testing.assert_allclose(read(stack, x[:, :3]), wanted[:, :3], rtol=1e-4, atol=1e-5)
    (cache,) = nn.kv_caches(stack)
    assert cache.index.value.tolist() == [[3, 3]] * 3
    read(stack, -x[:, 3:])
    cache.truncate(3)
    cache.reorder(jnp.array([1, 0]))
    np.testing.assert_allclose(read(stack, x[::-1, 3:]), wanted[::-1, 3:], rtol=1e-4, atol=1e-5)
    mu.reset(stack, mu.Cache)
    np.testing.assert_allclose(read(stack, x), wanted, rtol=1e-4, atol=1e-5)


def test_the_body_is_traced_once(traces: Any) -> None:
    for depth in (2, 16):
        count = traces.total
        stack = nn.Stack(lambda rngs: nn.Linear(4, 4, rngs=rngs), depth, rngs=mu.Rngs(0))
        text = mu.jit(traces.count(lambda m, x: m(x))).lower(stack, jnp.ones((1, 4))).as_text()
        assert traces.total == count + 1 and text.count("dot_general") == 1


@pytest.mark.parametrize(
    ("use", "error", "text"),
    [
        (lambda: nn.Stack([]), ArgumentError, "no layers"),
        (lambda: nn.Stack(Block, 0, rngs=mu.Rngs(0)), ArgumentError, "length=0"),
        (lambda: nn.Stack(Block, 2), ArgumentError, "streams"),
        (
            lambda: nn.Stack([nn.Linear(8, n, rngs=mu.Rngs(0)) for n in (8, 9)]),
            StructureError,
            r"(?s)different structure.*kernel: .*\[8,8\].*\[8,9\]",
        ),
        (
            lambda: nn.Stack([nn.Dropout(rate, rngs=mu.Rngs(0)) for rate in (0.1, 0.2)]),
            StructureError,
            "rate: 0.1 and 0.2",
        ),
        (
            lambda: nn.Stack([nn.Linear(8, 8, rngs=mu.Rngs(n)) for n in range(2)]).load(make()[0]),
            StructureError,
            "2 layers",
        ),
    ],
)
def test_bad_input(use: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        use()


@pytest.mark.parametrize("remat", [False, True])
def test_program_and_memory_do_not_grow_with_depth(remat: bool) -> None:
    x = jnp.ones((4, 64))

    def compiled(depth: int) -> tuple[Any, Any, int]:
        stack = nn.Stack(lambda rngs: nn.Linear(64, 64, rngs=rngs), depth, rngs=mu.Rngs(0), remat=remat)
        forward = mu.jit(lambda stack, x: jnp.sum(stack(x))).lower(stack, x)
        grad = mu.jit(lambda stack, x: mu.grad(lambda stack: jnp.sum(jnp.tanh(stack(x))))(stack)).lower(stack, x)
        return forward, grad, forward.compile().memory_analysis().temp_size_in_bytes

    few, many = compiled(4), compiled(64)
    for a, b in zip(few[:2], many[:2], strict=True):
        assert a.as_text().count("\n") == b.as_text().count("\n"), "the same operations, however many layers"
    layer = 4 * (64 * 64 + 64)
    assert many[2] <= few[2] + layer, "beside the weights there is one layer at a time"


def test_slices_and_numbers_of_numpy() -> None:
    stack = nn.Stack(lambda rngs: nn.Linear(2, 2, rngs=rngs), 4, rngs=mu.Rngs(0))
    for given, numbers in ((slice(1, 3), [1, 2]), (slice(None, None, -1), [3, 2, 1, 0]), (slice(7, 9), [])):
        layers = stack[given]
        assert [float(layer.kernel[0, 0]) for layer in layers] == [float(stack.layer.kernel[n, 0, 0]) for n in numbers]
    assert float(stack[np.int64(2)].kernel[0, 0]) == float(stack.layer.kernel[2, 0, 0])
    for wrong in (1.5, "a", None):
        with pytest.raises(ArgumentError, match="goes by its number"):
            stack[wrong]
    with pytest.raises(ArgumentError, match="goes by its number"):
        mu.jit(lambda n: stack[n].kernel.value)(1)


def test_layers_of_another_mode_are_loaded() -> None:
    stack = nn.Stack([Block(mu.Rngs(n)) for n in range(2)]).eval()
    layers = [Block(mu.Rngs(n + 5)) for n in range(2)]
    stack.load(layers)
    assert mu.state(stack[1]) == mu.state(layers[1])
    assert not stack.layer.training
    with pytest.raises(StructureError, match="training: True and False"):
        stack.load([layers[0], layers[1].eval()])
    with pytest.raises(StructureError, match=r"(?s)as many layers.*expected: 2 layers.*got: +1"):
        stack.load(layers[:1])


class Scaled(mu.Module):
    """A layer with a state that was made elsewhere."""

    def __init__(self, scale: Any, rngs: mu.Rngs) -> None:
        self.scale, self.linear = scale, nn.Linear(4, 4, rngs=rngs)


@pytest.mark.parametrize("size", [3, 4])  # with three it would be taken for one of each layer
def test_states_that_are_not_of_one_layer_are_refused(size: int) -> None:
    shared, layer = mu.Buffer(jnp.ones(size)), nn.Linear(4, 4, rngs=mu.Rngs(0))
    for make in (
        lambda: nn.Stack(lambda rngs: Scaled(shared, rngs), 3, rngs=mu.Rngs(0)),
        lambda: nn.Stack([Scaled(shared, mu.Rngs(n)) for n in range(3)]),
        lambda: nn.Stack([layer] * 3),
    ):
        with pytest.raises(StructureError, match="is not of this layer alone"):
            make()


def test_stacks_that_are_stacked() -> None:
    stacks = mu.vmap(lambda rngs: nn.Stack(lambda rngs: nn.Linear(2, 2, rngs=rngs), 3, rngs=rngs))(mu.Rngs(0).split(3))
    with pytest.raises(StructureError, match="of several stacks"):
        stacks[1]
    inside = mu.vmap(lambda stack: stack[1])(stacks)
    np.testing.assert_array_equal(inside.kernel, stacks.layer.kernel[:, 1])
    nested = nn.Stack([nn.Stack([nn.Linear(2, 2, rngs=mu.Rngs(n + 3 * m)) for n in range(3)]) for m in range(2)])
    np.testing.assert_array_equal(nested[1][2].kernel, nested.layer.layer.kernel[1, 2])
    with pytest.raises(StructureError, match="of several stacks"):
        nested.layer[0]
