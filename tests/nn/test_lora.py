"""Adapters beside those of Flax NNX, put onto models that exist, merged, and turned off for a while."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.nn import initializers

import mutatis as mu
from mutatis import nn
from mutatis.errors import ArgumentError, DeferredStateError, FilterError, StructureError

pytestmark = pytest.mark.once  # arithmetic of arrays: what JAX's versions differ in, the tests of transforms show

RANDOM = initializers.normal(1.0)


def waves(*shape: int) -> jax.Array:
    return jnp.sin(jnp.arange(np.prod(shape), dtype=jnp.float32)).reshape(shape)


class Net(mu.Module):
    """A list of layers, one of them under two names, and maps from and to heads."""

    def __init__(self) -> None:
        rngs = mu.Rngs(0)
        self.heads = nn.LinearGeneral(3, (2, 4), rngs=rngs)
        self.out = nn.LinearGeneral((2, 4), 3, axis=(-2, -1), use_bias=False, rngs=rngs)
        self.layers = [nn.Linear(3, 3, rngs=rngs), nn.Linear(3, 3, use_bias=False, rngs=rngs)]
        self.tied = self.layers[0]

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.out(self.heads(x))
        for layer in self.layers:
            x = jax.nn.tanh(layer(x))
        return self.tied(x)


def adapted(rank: int = 2, **options: Any) -> Net:
    """A net with adapters that add something."""
    net = nn.LoRA.apply(Net(), nn.Linear | nn.LinearGeneral, rank, **options)
    for number, cell in enumerate(mu.variables(net, nn.LoRAParam).values()):
        cell.value = 0.3 * jax.random.normal(jax.random.key(number), cell.shape)
    return net


# -- the same as Flax ------------------------------------------------------------------------------------------------


@pytest.mark.once
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_beside_flax(dtype: Any) -> None:
    nnx = pytest.importorskip("flax.nnx")
    x = waves(2, 3)
    tolerance = 1e-6 if dtype is None else 1e-2
    one = nn.LoRA(3, 2, 4, b_initializer=RANDOM, dtype=dtype, rngs=mu.Rngs(0))
    other = nnx.LoRA(3, 2, 4, b_initializer=RANDOM, dtype=dtype, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(one.lora_a.value, other.lora_a[...])
    np.testing.assert_array_equal(one.lora_b.value, other.lora_b[...])
    np.testing.assert_allclose(one(x), other(x), atol=tolerance)

    one = nn.LoRA(3, 2, 4, b_initializer=RANDOM, base_module=nn.Linear(3, 4, rngs=mu.Rngs(1)), rngs=mu.Rngs(0))
    other = nnx.LoRA(3, 2, 4, b_initializer=RANDOM, base_module=nnx.Linear(3, 4, rngs=nnx.Rngs(1)), rngs=nnx.Rngs(0))
    np.testing.assert_allclose(one(x), other(x), atol=1e-6)

    options = {"lora_rank": 2, "b_initializer": RANDOM, "dtype": dtype}
    one = nn.LoRALinear(3, 4, rngs=mu.Rngs(0), **options)
    other = nnx.LoRALinear(3, 4, rngs=nnx.Rngs(0), **options)
    paths = {tuple(path): value[...] for path, value in nnx.to_flat_state(nnx.state(other, nnx.Param))}
    for path, value in mu.state(one).flat().items():
        np.testing.assert_array_equal(value, paths.pop(path))
    assert not paths
    with jax.numpy_dtype_promotion("standard"):
        wanted = other(x)
        gradients = nnx.grad(lambda m: jnp.sum(m(x).astype(jnp.float32) ** 2))(other)
    got = mu.jit(one)(x)
    assert got.dtype == wanted.dtype
    np.testing.assert_allclose(got, wanted, atol=10 * tolerance)
    grads = mu.grad(lambda m: jnp.sum(m(x).astype(jnp.float32) ** 2))(one)
    for path, value in nnx.to_flat_state(gradients):
        np.testing.assert_allclose(grads[tuple(path)], value[...], atol=20 * tolerance)


# -- onto a model that exists ---------------------------------------------------------------------------------------------


def test_nothing_changes_at_first_and_paths_stay() -> None:
    net, plain = Net(), Net()
    assert nn.LoRA.apply(net, nn.Linear | nn.LinearGeneral, 2) is net
    np.testing.assert_array_equal(net(waves(5, 3)), plain(waves(5, 3)))
    base = mu.state(net, lambda path, cell: not isinstance(cell, nn.LoRAParam))
    assert base == mu.state(plain)
    shapes = {p: v.shape for p, v in mu.state(net, nn.LoRAParam).flat().items()}
    assert shapes[("heads", "lora", "lora_a")] == (3, 2) and shapes[("out", "lora", "lora_a")] == (8, 2)
    assert net.tied is net.layers[0] and len(shapes) == 8


def test_only_adapters_are_trained() -> None:
    net = adapted()
    before = mu.state(net)
    optimizer = mu.Optimizer(net, optax.sgd(0.1), wrt=nn.LoRAParam)

    @mu.jit
    def step(x: jax.Array) -> None:
        optimizer.update(mu.grad(lambda net: jnp.sum(net(x) ** 2), wrt=nn.LoRAParam)(net))

    step(waves(5, 3))
    changed = [path for path, value in mu.state(net).flat().items() if not np.array_equal(value, before[path])]
    assert sorted(map(str, changed)) == sorted(str(path) for path in mu.variables(net, nn.LoRAParam))


@pytest.mark.parametrize("options", [{}, {"alpha": 3.0}])
def test_merged(options: dict[str, Any]) -> None:
    net = adapted(**options)
    mu.freeze(net, lambda path, cell: not isinstance(cell, nn.LoRAParam))
    x = waves(5, 3)
    wanted = net(x)
    with nn.adapters_off(net):
        assert not np.allclose(net(x), wanted)
    assert nn.LoRA.merge(net) is net
    np.testing.assert_allclose(net(x), wanted, atol=1e-5)
    assert mu.state(net).keys() == mu.state(Net()).keys() and net.tied is net.layers[0]
    assert {type(module) for module in mu.modules(net).values()} == {Net, nn.Linear, nn.LinearGeneral}
    assert all(cell.frozen for cell in mu.variables(net).values())


def test_a_layer_alone_and_a_wrapped_one() -> None:
    layer = nn.LoRA.apply(nn.Linear(3, 2, rngs=mu.Rngs(0)), nn.Linear, 2)
    assert type(layer) is nn.LoRALinear and type(nn.LoRA.merge(layer)) is nn.Linear
    net = Net()
    mu.replace(net, "layers[1]", lambda old: nn.LoRA(3, 2, 3, base_module=old, b_initializer=RANDOM, rngs=mu.Rngs(1)))
    wanted = net(waves(5, 3))
    np.testing.assert_allclose(nn.LoRA.merge(net)(waves(5, 3)), wanted, atol=1e-5)
    assert type(net.layers[1]) is nn.Linear


def test_narrow_kernels_stay_narrow() -> None:
    net = nn.Linear(3, 2, param_dtype=jnp.bfloat16, rngs=mu.Rngs(0))
    net = nn.LoRA.apply(net, nn.Linear, 2)
    net.lora.lora_b.value += 1
    x = waves(5, 3).astype(jnp.bfloat16)
    wanted = net(x)
    merged = nn.LoRA.merge(net)
    assert {cell.dtype for cell in mu.variables(merged).values()} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(merged(x), wanted, atol=0.1)


def test_adapted_models_copy_and_save(tmp_path: Any) -> None:
    net = adapted()
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), mu.clone(net)):
        np.testing.assert_array_equal(copied(waves(5, 3)), net(waves(5, 3)))
    mu.checkpoint.save(tmp_path / "adapters", net, nn.LoRAParam)
    other = nn.LoRA.apply(Net(), nn.Linear | nn.LinearGeneral, 2)
    mu.checkpoint.restore(tmp_path / "adapters", other, nn.LoRAParam)
    np.testing.assert_array_equal(other(waves(5, 3)), net(waves(5, 3)))


# -- layers that are stacked --------------------------------------------------------------------------------------------


class Block(mu.Module):
    def __init__(self, rngs: mu.Rngs) -> None:
        self.up, self.norm = nn.Linear(8, 8, rngs=rngs), nn.LayerNorm(8, rngs=rngs)
        self.attention = nn.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.fixed = nn.LoRA(8, 2, 8, base_module=nn.Linear(8, 8, rngs=rngs), b_initializer=RANDOM, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.attention(self.norm(jax.nn.tanh(self.up(x))), is_causal=True) + 0.1 * self.fixed(x)


EVERY = nn.Linear | nn.LinearGeneral


def blocks() -> list[Block]:
    return [Block(mu.Rngs(seed)) for seed in range(3)]


def random_adapters(model: Any) -> Any:
    nn.LoRA.apply(model, EVERY, 2, alpha=3.0)
    for number, cell in enumerate(mu.variables(model, nn.LoRAParam).values()):
        cell.value = 0.3 * jax.random.normal(jax.random.key(number), cell.shape)
    return model


@pytest.mark.parametrize("remat", [False, True])
def test_on_a_stack_as_on_the_layers_before(remat: bool) -> None:
    before, x = random_adapters(blocks()), waves(2, 4, 8)
    wanted = nn.Stack(before)
    stack = nn.Stack(blocks(), remat=remat)
    plain = stack(x)
    assert nn.LoRA.apply(stack, EVERY, 2, alpha=3.0) is stack
    np.testing.assert_allclose(stack(x), plain, rtol=1e-6)
    a = stack.layer.up.lora.lora_a
    assert a.shape == (3, 8, 2) and not np.allclose(a[0], a[1])
    mu.update(stack, mu.state(wanted, nn.LoRAParam))

    def run(layers: Any, x: jax.Array) -> jax.Array:
        for layer in layers:
            x = layer(x)
        return x

    np.testing.assert_allclose(stack(x), run(before, x), rtol=1e-4, atol=1e-5)
    ours = mu.jit(mu.grad(lambda m: jnp.sum(m(x) ** 2), wrt=nn.LoRAParam))(stack).flat()
    theirs = mu.grad(lambda m: jnp.sum(run(m, x) ** 2), wrt=nn.LoRAParam)(before)
    for path, gradient in ours.items():
        each = jnp.stack([part.flat()[path[1:]] for part in theirs])
        np.testing.assert_allclose(gradient, each, rtol=1e-3, atol=1e-3, err_msg=str(path))
    assert len(ours) == 14

    trained = stack(x)
    with nn.adapters_off(stack):
        assert not np.allclose(stack(x), trained)
    for layer in (stack, before):
        nn.LoRA.merge(layer)
    np.testing.assert_allclose(stack(x), trained, rtol=1e-4, atol=1e-5)
    assert not mu.variables(stack, nn.LoRAParam) and type(stack.layer.up) is nn.Linear
    for path, kernel in mu.state(stack.layer, mu.Param).flat().items():
        each = jnp.stack([mu.state(layer, mu.Param).flat()[path] for layer in before])
        np.testing.assert_allclose(kernel, each, rtol=1e-5, atol=1e-6, err_msg=str(path))


def test_layers_of_a_stack_with_adapters_come_out_and_in_again() -> None:
    stack, x = nn.LoRA.apply(nn.Stack(blocks()), EVERY, 2), waves(2, 4, 8)
    for number, cell in enumerate(mu.variables(stack, nn.LoRAParam).values()):
        cell.value = 0.3 * jax.random.normal(jax.random.key(number), cell.shape)
    layers = stack.layers()
    assert layers[0].up.lora.lora_a.shape == (8, 2)
    again = nn.Stack(layers)
    np.testing.assert_allclose(again(x), stack(x), rtol=1e-6)
    np.testing.assert_allclose(nn.LoRA.merge(again)(x), stack(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_an_ensemble_along_any_axis_and_stacks_in_it(axis: int) -> None:
    def make(rngs: mu.Rngs) -> Any:
        return nn.Linear(4, 4, use_bias=False, rngs=rngs)

    several = mu.vmap(make, out_axes=axis)(mu.Rngs(0).split(5))
    several = nn.LoRA.apply(several, nn.Linear, 2)
    assert several.lora.lora_a.shape == tuple(np.insert((4, 2), axis, 5))
    several.lora.lora_b.value += 0.5
    call = mu.vmap(lambda m, x: m(x), in_axes=(axis, None))
    wanted = call(several, waves(3, 4))
    for one in range(5):
        kernel, a, b = (
            jnp.take(cell.value, one, axis) for cell in (several.kernel, several.lora.lora_a, several.lora.lora_b)
        )
        np.testing.assert_allclose(wanted[one], waves(3, 4) @ (kernel + a @ b), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(call(nn.LoRA.merge(several), waves(3, 4)), wanted, rtol=1e-4, atol=1e-5)


def test_an_ensemble_of_stacks() -> None:
    several = mu.vmap(lambda rngs: nn.Stack(lambda rngs: nn.Linear(4, 4, rngs=rngs), 3, rngs=rngs))(mu.Rngs(0).split(5))
    nn.LoRA.apply(several, nn.Linear, 2)
    assert several.layer.lora.lora_a.shape == (5, 3, 4, 2)
    assert len(np.unique(several.layer.lora.lora_a)) == 5 * 3 * 4 * 2
    several.layer.lora.lora_b.value += 0.5
    call = mu.vmap(lambda m, x: m(x), in_axes=(0, None))
    wanted = call(several, waves(2, 4))
    np.testing.assert_allclose(call(nn.LoRA.merge(several), waves(2, 4)), wanted, rtol=1e-4, atol=1e-5)


def test_kernels_that_are_stacked_by_hand() -> None:
    layer = nn.Linear(4, 4, rngs=mu.Rngs(0))
    layer.kernel = mu.Param(waves(3, 4, 4))
    layer.bias = mu.Param(waves(3, 4))
    adapted = nn.LoRA.apply(layer, nn.Linear, 2)
    assert adapted.lora.lora_a.shape == (3, 4, 2)
    adapted.lora.lora_b.value += 0.5
    call = mu.vmap(lambda m, x: m(x), in_axes=(0, None))
    wanted = call(adapted, waves(2, 4))
    np.testing.assert_allclose(call(nn.LoRA.merge(adapted), waves(2, 4)), wanted, rtol=1e-4, atol=1e-5)


# -- turned off -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: f,
        mu.jit,
        mu.remat,
        lambda f: lambda net, x: mu.value_and_grad(f)(net, x)[0],
        lambda f: lambda net, x: mu.vmap(f, in_axes=(None, 0))(net, x[None])[0],
        lambda f: lambda net, x: mu.for_loop(lambda x: f(net, x), x[None])[0],
        lambda f: lambda net, x: mu.cond(x[0, 0] < 1, f, lambda net, x: jnp.float32(0), net, x),
        jax.jit,
    ],
    ids=["eager", "jit", "remat", "grad", "vmap", "for_loop", "cond", "jax.jit"],
)
def test_off(transform: Any) -> None:
    net, plain, x = adapted(), Net(), waves(5, 3)

    def both(net: Any, x: jax.Array) -> jax.Array:
        with nn.adapters_off(net):
            without = jnp.sum(net(x))
        return jnp.sum(net(x)) - without

    wanted = jnp.sum(net(x)) - jnp.sum(plain(x))
    np.testing.assert_allclose(transform(both)(net, x), wanted, rtol=1e-4)
    assert all(adapter.active for adapter in mu.modules(net, nn.LoRA).values())


def test_off_around_a_program_and_on_again(traces: Any) -> None:
    net, plain, x = adapted(), Net(), waves(5, 3)
    body = traces.count(lambda net, x: net(x))
    run = mu.jit(body)
    wanted = run(net, x)
    for _ in range(2):
        with pytest.raises(KeyError), nn.adapters_off(net), nn.adapters_off(net):
            np.testing.assert_allclose(run(net, x), plain(x), rtol=1e-6)
            raise KeyError
        np.testing.assert_array_equal(run(net, x), wanted)
    assert traces.total == 2
    assert nn.LoRA(3, 2, 4, rngs=mu.Rngs(0))(x).shape == (5, 4)


# -- bad input -----------------------------------------------------------------------------------------------------------


def test_what_takes_no_adapter() -> None:
    with pytest.raises(FilterError, match=r"(?s)no layer that takes an adapter.*got:      \.\n"):
        nn.LoRA.apply(nn.Sequential(nn.Dropout(0.0)), nn.Sequential, 2)
    net = adapted()
    before = mu.state(net)
    with pytest.raises(StructureError, match="layer `layers\\[1\\]` cannot take an adapter: it has one"):
        nn.LoRA.apply(net, lambda path, module: path == ("layers", 1), 2)
    with pytest.raises(DeferredStateError, match="kernel has not been created"):
        nn.LoRA.apply(nn.Sequential(nn.Linear(None, 3, rngs=mu.Rngs(0))), nn.Linear, 2)
    with pytest.raises(ArgumentError, match="of rank 0"):
        nn.LoRA.apply(Net(), nn.Linear, 0)
    with pytest.raises(ArgumentError, match=r"(?s)lora_a.*3 features"):
        nn.LoRA(3, 2, 4, rngs=mu.Rngs(0))(waves(2, 5))
    with pytest.raises(ArgumentError, match="cannot be called"):
        nn.LoRA(3, 2, 4, base_module=3, rngs=mu.Rngs(0))
    assert mu.state(net) == before


def test_what_cannot_be_merged() -> None:
    with pytest.raises(FilterError):
        nn.LoRA.merge(Net())
    with pytest.raises(StructureError, match=r"adapter `layers\[0\]` cannot be merged: it is not added to a kernel"):
        nn.LoRA.merge(nn.Sequential(nn.LoRA(3, 2, 4, rngs=mu.Rngs(0))))
    net = Net()
    net.layers[1].kernel = net.layers[0].kernel
    net = nn.LoRA.apply(net, nn.Linear, 2)
    before = mu.state(net)
    with pytest.raises(StructureError, match="other modules use the same kernel"):
        nn.LoRA.merge(net)
    assert mu.state(net) == before and type(net.layers[1]) is nn.LoRALinear


def test_a_general_layer_without_an_adapter() -> None:
    with pytest.raises(StructureError, match=r"nn\.LoRA\.apply\(model, nn\.LinearGeneral"):
        nn.LoRALinearGeneral(3, 4, rngs=mu.Rngs(0))(jnp.ones(3))
