"""Modules as trees of anything: masks, specs, axes, None; for raw JAX, Equinox and solvers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mutatis as mu
from mutatis import errors, nn

pytestmark = pytest.mark.once  # nothing here depends on the version of JAX


class Scale(mu.Module):
    def __init__(self, w: Any) -> None:
        self.w = mu.Param(w)

    def __call__(self, x: Any) -> Any:
        return self.w.value * x


@dataclasses.dataclass
class Opaque:
    """Not hashable, no array, and equal to nothing."""

    name: str

    def __eq__(self, other: object) -> bool:
        raise AssertionError("nobody asked")


def net() -> nn.Linear:
    return nn.Linear(2, 3, rngs=mu.Rngs(0))


LEAVES = [
    True,
    0,
    -1.5,
    "name",
    b"x",
    P("x"),
    P(),
    Opaque("a"),
    object(),
    int,
    len,
    1 + 2j,
    jnp.float32,
    np.arange(3),
    ...,
]


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: type(leaf).__name__)
@pytest.mark.parametrize("state", ["live", "frozen", "thawed copy", "copy", "eval", "tree"])
def test_leaves_of_any_kind(leaf: Any, state: str) -> None:
    model: Any = net()
    if state == "frozen":
        mu.freeze(model, lambda path, _: path[-1] == "kernel")
    if "copy" in state:
        model = jax.tree.map(lambda x: x, model)
    if state == "thawed copy":
        mu.thaw(model)
    if state == "eval":
        model.eval()
    if state == "tree":
        model = {"a": [model], "b": mu.Param(1.0)}
    tree = jax.tree.map(lambda _: leaf, model)
    assert all(found is leaf for found in jax.tree.leaves(tree))
    assert len(jax.tree.leaves(tree)) == len(jax.tree.leaves(model))
    both = jax.tree.map(lambda a, b: (a.shape, b), model, tree)  # with the model itself
    assert len(jax.tree.leaves(both, is_leaf=lambda x: isinstance(x, tuple))) == len(jax.tree.leaves(model))
    assert jax.tree.structure(tree) == jax.tree.structure(model)
    back = jax.tree.map(lambda _, b: b, tree, model)
    jax.tree.map(np.testing.assert_array_equal, back, model)
    assert repr(tree)
    assert len(mu.variables(tree)) == len(mu.variables(model))


def test_none_as_a_leaf() -> None:
    model = net()
    tree = jax.tree.map(lambda _: None, model)
    assert jax.tree.leaves(tree) == []
    assert jax.tree.leaves(tree, is_leaf=lambda x: x is None) == [None, None]
    assert tree.kernel.value is None
    assert repr(tree)


def test_trees_of_trees() -> None:
    tree = jax.tree.map(lambda x: {"mean": x, "name": "a"}, net())
    assert len(jax.tree.leaves(tree)) == 4
    outer = jax.tree.transpose(jax.tree.structure(net()), jax.tree.structure({"mean": 0, "name": 0}), tree)
    assert outer["name"].kernel.value == "a"


def test_axes_for_raw_vmap() -> None:
    nets = mu.vmap(Scale)(jnp.array([1.0, 2.0]))
    axes = jax.tree.map(lambda _: 0, nets)
    run = jax.vmap(lambda net, x: net(x), in_axes=(axes, None))
    np.testing.assert_array_equal(run(nets, 3.0), [3, 6])
    np.testing.assert_array_equal(jax.jit(run)(nets, 3.0), [3, 6])
    none = jax.tree.map(lambda _: None, nets)
    np.testing.assert_array_equal(jax.vmap(lambda net, x: net(x), in_axes=(none, 0))(nets, jnp.ones(2)), [[1, 2]] * 2)
    made = jax.vmap(Scale, out_axes=jax.tree.map(lambda _: 0, Scale(0.0)))(jnp.arange(3.0))
    np.testing.assert_array_equal(made.w.value, [0, 1, 2])


def test_shardings_for_device_put_and_jit() -> None:
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    model = nn.Linear(2, 4, rngs=mu.Rngs(0))
    shardings = jax.tree.map(lambda x: NamedSharding(mesh, P(*[None] * (x.ndim - 1), "x")), model)
    placed = jax.device_put(model, shardings)
    assert placed.kernel.value.sharding.spec == P(None, "x")
    run = jax.jit(lambda net, x: net(x), in_shardings=(shardings, None))
    np.testing.assert_allclose(run(placed, jnp.ones(2)), model(jnp.ones(2)), rtol=1e-6)
    back = jax.jit(lambda net: net, out_shardings=shardings)(model)
    assert back.bias.value.sharding.spec == P("x")


def test_masks_for_optax() -> None:
    model = net()
    with jax.numpy_dtype_promotion("standard"):
        tx = optax.masked(optax.sgd(1.0), jax.tree.map(lambda x: x.ndim > 1, model))
        grads = jax.tree.map(jnp.ones_like, model)
        updates, _ = tx.update(grads, tx.init(model), model)
    new = jax.tree.map(lambda p, u: p + u, model, updates)
    np.testing.assert_allclose(new.kernel.value, model.kernel.value - 1, rtol=1e-6)
    np.testing.assert_array_equal(new.bias.value, model.bias.value + 1)


def test_shapes_and_reductions() -> None:
    model = net()
    shapes = jax.eval_shape(lambda net: jax.tree.map(lambda x: x[..., None], net), model)
    assert shapes.kernel.value.shape == (2, 3, 1)
    assert jax.tree.reduce(lambda n, x: n + x.size, model, 0) == 9
    assert jax.tree.all(jax.tree.map(lambda x: x.dtype == jnp.float32, model))
    flat, unravel = jax.flatten_util.ravel_pytree(model)
    np.testing.assert_array_equal(unravel(flat).kernel.value, model.kernel.value)


def test_a_write_to_a_tree_is_refused_and_thaw_is_the_cure() -> None:
    tree = jax.tree.map(lambda _: 0, net())
    with pytest.raises(errors.FrozenStateError):
        tree.bias.value = jnp.ones(3)
    mu.thaw(tree)
    tree.bias.value = jnp.ones(3)


# -- Equinox -------------------------------------------------------------------------------------------------------


def test_equinox_partition_and_filter_transforms() -> None:
    eqx = pytest.importorskip("equinox")
    model, x = net(), jnp.ones(2)
    arrays, rest = eqx.partition(model, eqx.is_array)
    assert [len(jax.tree.leaves(part)) for part in (arrays, rest)] == [2, 0]
    np.testing.assert_array_equal(eqx.combine(arrays, rest)(x), model(x))
    mask = jax.tree.map(lambda leaf: leaf.ndim > 1, model)
    kernels, others = eqx.partition(model, mask)
    assert [len(jax.tree.leaves(part)) for part in (kernels, others)] == [1, 1]
    np.testing.assert_array_equal(eqx.combine(kernels, others)(x), model(x))
    grads = eqx.filter_grad(lambda net, x: net(x).sum())(model, x)
    np.testing.assert_array_equal(grads.bias.value, jnp.ones(3))
    np.testing.assert_array_equal(eqx.filter_jit(lambda net, x: net(x))(model, x), model(x))
    some = eqx.filter(model, lambda leaf: leaf.ndim == 1)
    assert some.kernel.value is None
    mixed = (model, "adam", 3)
    dynamic, static = eqx.partition(mixed, eqx.is_array)
    assert eqx.combine(dynamic, static)[1:] == ("adam", 3)
    updated = eqx.apply_updates(model, jax.tree.map(jnp.ones_like, model))
    np.testing.assert_array_equal(updated.bias.value, model.bias.value + 1)


def test_diffrax_arguments() -> None:
    diffrax = pytest.importorskip("diffrax")
    model = Scale(jnp.float32(-1.0))

    def solve(model: Scale) -> Any:
        term = diffrax.ODETerm(lambda t, y, model: model(y))
        return diffrax.diffeqsolve(term, diffrax.Tsit5(), 0.0, 1.0, 0.1, jnp.float32(1.0), args=model).ys[0]

    with jax.numpy_dtype_promotion("standard"):
        np.testing.assert_allclose(jax.jit(solve)(model), np.exp(-1), rtol=1e-3)
