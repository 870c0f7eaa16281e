"""`mu.interop.equinox` with the real library: what Equinox gives natively is the twin."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mutatis as mu
from mutatis import errors
from mutatis.core.naming import show_path

pytest.importorskip("equinox")

import equinox as eqx

from mutatis.interop.equinox import FromEquinox, ToEquinox
from tests.nets import Layers


class Net(eqx.Module):
    linear: Any
    norm: Any
    drop: Any
    layers: list[Any]
    activation: Any
    count: Any

    def __init__(self, key: Any) -> None:
        self.linear = eqx.nn.Linear(3, 4, key=key)
        self.norm = eqx.nn.BatchNorm(4, "batch", mode="ema", momentum=0.9)
        self.drop = eqx.nn.Dropout(0.5)
        self.layers = [eqx.nn.Linear(4, 4, key=key)]
        self.activation = jax.nn.relu
        self.count = jnp.arange(4)

    def __call__(self, x: Any, state: Any, key: Any = None) -> Any:
        x, state = self.norm(self.linear(x), state)
        x = self.drop(self.activation(x), key=key)
        return self.layers[0](x), state


def batch(n: int = 8, size: int = 3, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (n, size))


def assert_equal(a: Any, b: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


def over_batch(net: Any) -> Any:
    return mu.vmap(net, axis_name="batch")


# -- theirs in ours ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["module", "pair"])
def test_leaves_become_states(given: str) -> None:
    made = eqx.nn.make_with_state(Net)(jax.random.key(0)) if given == "pair" else (Net(jax.random.key(0)),)
    net = FromEquinox(*made, rngs=mu.Rngs(0))
    kinds = {show_path(path[1:]): type(cell) for path, cell in mu.variables(net).items() if path[0] != "rngs"}
    stats = {path for path, kind in kinds.items() if kind is mu.BatchStat}
    assert stats and all(path.startswith("norm.") for path in stats)
    assert {path: kind for path, kind in kinds.items() if path not in stats} == {
        "linear.weight": mu.Param,
        "linear.bias": mu.Param,
        "norm.weight": mu.Param,
        "norm.bias": mu.Param,
        "layers[0].weight": mu.Param,
        "layers[0].bias": mu.Param,
        "count": mu.Buffer,
    }


def test_training_equals_native() -> None:
    model, state = eqx.nn.make_with_state(Net)(jax.random.key(0))
    model = eqx.tree_at(lambda m: m.drop, model, eqx.nn.Dropout(0.0))
    net = FromEquinox(model, state)
    tx = optax.sgd(0.1, momentum=0.9)
    ours, theirs = mu.Optimizer(net, tx), tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def native_step(model: Any, state: Any, opt: Any, x: Any) -> Any:
        def loss(model: Any, state: Any) -> Any:
            y, state = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
            return jnp.mean((y - 1) ** 2), state

        grads, state = eqx.filter_grad(loss, has_aux=True)(model, state)
        updates, opt = tx.update(grads, opt, model)
        return eqx.apply_updates(model, updates), state, opt

    def step(x: Any) -> None:
        ours.update(mu.grad(lambda net: jnp.mean((over_batch(net)(x) - 1) ** 2))(net))

    xs = jnp.stack([batch(seed=n) for n in range(4)])
    for x in xs:
        model, state, theirs = native_step(model, state, theirs, x)
    mu.jit(lambda: mu.for_loop(step, xs))()
    after, after_state = net.module
    assert_equal(jax.tree.leaves(eqx.filter(after, eqx.is_array)), jax.tree.leaves(eqx.filter(model, eqx.is_array)))
    assert_equal(jax.tree.leaves(after_state), jax.tree.leaves(state))
    native = eqx.nn.inference_mode(model)
    expected, _ = jax.vmap(native, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(xs[0], state)
    mu.freeze(net)
    assert_equal(over_batch(net.eval())(xs[0]), expected)


def test_keys() -> None:
    net = FromEquinox(eqx.nn.Dropout(0.5), rngs=mu.Rngs(dropout=0))
    x = jnp.ones(64)
    assert not jnp.array_equal(net(x), net(x))
    twin = mu.clone(net)
    key = twin.rngs.dropout()
    assert_equal(net(x), eqx.nn.Dropout(0.5)(x, key=key))
    assert_equal(net(x, key=jax.random.key(5)), eqx.nn.Dropout(0.5)(x, key=jax.random.key(5)))
    assert mu.state(net) == mu.state(twin)
    assert_equal(net.eval()(x), x)
    assert mu.state(net) == mu.state(twin)
    lanes = mu.vmap(net.train())(jnp.ones((4, 64)))
    assert len({tuple(row) for row in lanes.tolist()}) == 4


def test_remat_draws_the_same() -> None:
    net = FromEquinox(eqx.nn.Dropout(0.5), rngs=mu.Rngs(0))
    twin = mu.clone(net)

    def loss(net: Any, x: Any) -> Any:
        return jnp.sum(net(x) ** 2)

    x = jnp.ones(64)
    assert_equal(mu.grad(lambda x: loss(net, x))(x), mu.grad(lambda x: mu.remat(loss)(twin, x))(x))
    assert mu.state(net) == mu.state(twin)


def test_filter() -> None:
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    spec = eqx.tree_at(lambda m: m.layers[-1].weight, jax.tree.map(lambda _: False, model), True)
    net = FromEquinox(model, filter=spec)
    assert [path[1:] for path in mu.state(net, mu.Param)] == [("layers", 1, "weight")]
    assert len(mu.state(net, mu.Buffer)) == 3
    grads = mu.grad(lambda net: mu.vmap(net)(batch()).sum())(net)
    native = eqx.filter_grad(lambda model: jax.vmap(model)(batch()).sum())(model)
    assert_equal(grads["variables", "layers", 1, "weight"], native.layers[1].weight)


def test_sharing() -> None:
    class Tied(eqx.Module):
        shared: Any

        def __init__(self, key: Any) -> None:
            a, b = (eqx.nn.Linear(3, 3, key=key) for _ in range(2))
            self.shared = eqx.nn.Shared((a, b), lambda pair: pair[1].weight, lambda pair: pair[0].weight)

        def __call__(self, x: Any) -> Any:
            a, b = self.shared()
            return b(a(x))

    model = Tied(jax.random.key(0))
    net = FromEquinox(model)
    assert len(mu.state(net, mu.Param)) == 3
    grads = mu.grad(lambda net: mu.vmap(net)(batch()).sum())(net)
    native = eqx.filter_grad(lambda model: jax.vmap(model)(batch()).sum())(model)
    assert len(jax.tree.leaves(native)) == 3
    native_a, native_b = native.shared.pytree
    held = grads["variables", "shared", "pytree"]
    assert_equal(held[0, "weight"], native_a.weight)
    assert_equal(held[1, "bias"], native_b.bias)

    class Twice(mu.Module):
        def __init__(self) -> None:
            self.a = self.b = FromEquinox(model)

        def __call__(self, x: Any) -> Any:
            return self.b(self.a(x))

    assert len(mu.state(Twice(), mu.Param)) == 3


def test_a_step_traces_once_also_for_another_of_its_structure(traces: Any) -> None:
    make = [FromEquinox(Net(jax.random.key(n)), rngs=mu.Rngs(n)) for n in range(2)]
    assert mu.graphdef(make[0]) == mu.graphdef(make[1])
    body = traces.count(lambda net, x: over_batch(net)(x).sum())
    step = mu.jit(body)
    for n in range(3):
        for net in make:
            step(net, batch(seed=n))
    assert traces[body] == 1


def test_an_ensemble_and_a_scan_over_layers() -> None:
    make = mu.vmap(lambda key: FromEquinox(eqx.nn.Linear(3, 3, key=key)))
    layers = make(jax.random.split(jax.random.key(0), 3))
    weights, biases = layers.variables["weight"].value, layers.variables["bias"].value
    x = batch()
    out = mu.vmap(lambda net, x: mu.vmap(net)(x), in_axes=(0, None))(layers, x)
    assert_equal(out[1], x @ weights[1].T + biases[1][None])
    scanned, _ = mu.scan(lambda x, net: (mu.vmap(net)(x), None), x, layers)
    for n in range(3):
        x = x @ weights[n].T + biases[n][None]
    assert_equal(scanned, x)


@pytest.mark.parametrize("how", ["deepcopy", "clone", "split", "pickle", "checkpoint"])
def test_copies(how: str, tmp_path: Path) -> None:
    net = FromEquinox(Net(jax.random.key(0)), rngs=mu.Rngs(0))
    over_batch(net)(batch())
    if how == "deepcopy":
        other = copy.deepcopy(net)
    elif how == "clone":
        other = mu.clone(net)
    elif how == "split":
        other = mu.merge(*mu.split(net, mu.Param, ...))
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(net))
    else:
        pytest.importorskip("orbax.checkpoint")
        mu.checkpoint.save(tmp_path / "net", net)
        other = FromEquinox(Net(jax.random.key(1)), rngs=mu.Rngs(1))
        mu.checkpoint.restore(tmp_path / "net", other)
    assert mu.graphdef(other) == mu.graphdef(net)
    assert_equal(over_batch(other)(batch()), over_batch(net)(batch()))
    assert mu.state(other) == mu.state(net)


def test_a_state_that_does_not_come_back() -> None:
    class Bad(eqx.Module):
        norm: Any

        def __call__(self, x: Any, state: Any) -> Any:
            return x

    net = FromEquinox(Bad(eqx.nn.BatchNorm(3, "batch", mode="ema")))
    with pytest.raises(errors.StructureError, match=r"did not return it(?s:.*)return out, state"):
        net(jnp.ones(3))


# -- ours in theirs ------------------------------------------------------------------------------------------------


def test_a_stateless_module() -> None:
    layer = mu.nn.Linear(3, 2, rngs=mu.Rngs(0))
    net = ToEquinox(layer)
    assert not net.is_stateful()
    assert_equal(eqx.filter_jit(net)(batch()), layer(batch()))
    assert len(jax.tree.leaves(eqx.filter(net, eqx.is_inexact_array))) == 2
    mlp = eqx.nn.Sequential([net, eqx.nn.Lambda(jax.nn.relu)])
    assert_equal(jax.vmap(mlp)(batch()), jax.nn.relu(layer(batch())))


def test_training_in_equinox_equals_ours() -> None:
    ours = Layers(mu.Rngs(0), rate=0.0, features=3)
    net, state = eqx.nn.make_with_state(ToEquinox)(ours)
    assert net.is_stateful()
    tx = optax.sgd(0.1, momentum=0.9)
    opt, our_opt = tx.init(eqx.filter(net, eqx.is_inexact_array)), mu.Optimizer(ours, tx)

    @eqx.filter_jit
    def step(net: Any, state: Any, opt: Any, x: Any) -> Any:
        def loss(net: Any, state: Any) -> Any:
            y, state = net(x, state)
            return jnp.mean((y - 1) ** 2), state

        grads, state = eqx.filter_grad(loss, has_aux=True)(net, state)
        updates, opt = tx.update(grads, opt, net)
        return eqx.apply_updates(net, updates), state, opt

    for n in range(4):
        net, state, opt = step(net, state, opt, batch(seed=n))
        our_opt.update(mu.grad(lambda m, n=n: jnp.mean((m(batch(seed=n)) - 1) ** 2))(ours))
    assert_equal(net.params["layers"]["0"]["kernel"], ours.layers[0].kernel.value)
    held = state.get(net.index)
    assert_equal(held["layers"]["1"]["var"], ours.layers[1].var.value)
    assert int(held["calls"]) == 4
    out, _ = eqx.nn.inference_mode(net)(batch(), state)
    assert_equal(out, ours.eval()(batch()))


def test_keys_in_equinox() -> None:
    net = ToEquinox(mu.nn.Dropout(0.5, rngs=mu.Rngs(0)))
    x = jnp.ones(32)
    a = net(x, key=jax.random.key(0))
    assert_equal(a, net(x, key=jax.random.key(0)))
    assert not jnp.array_equal(a, net(x, key=jax.random.key(1)))
    assert_equal(eqx.nn.inference_mode(net)(x), x)
    net(x, key=jax.random.PRNGKey(0))
    with pytest.raises(errors.RandomStreamError, match=r"key=jax\.random\.key\(0\)"):
        net(x)
    two = mu.Module()
    two.a, two.b = mu.nn.Dropout(0.5, rngs=mu.Rngs(0)), mu.nn.Dropout(0.5, rngs=mu.Rngs(0))
    rows = jax.vmap(lambda key: net(x, key=key))(jax.random.split(jax.random.key(0), 3))
    assert len({tuple(row) for row in rows.tolist()}) == 3


def test_in_a_sequential_and_in_ours_again() -> None:
    def make() -> Any:
        return eqx.nn.Sequential([eqx.nn.Lambda(jnp.negative), ToEquinox(Layers(mu.Rngs(0), rate=0.0, features=3))])

    model, state = eqx.nn.make_with_state(make)()
    out, after = model(batch(), state)
    fresh, start = eqx.nn.make_with_state(make)()
    net = FromEquinox(fresh, start)
    assert_equal(mu.jit(net)(batch()), out)
    assert_equal(jax.tree.leaves(net.module[1]), jax.tree.leaves(after))


def test_methods_and_state_by_name() -> None:
    ours = Layers(mu.Rngs(0), features=3)
    net, state = eqx.nn.make_with_state(ToEquinox)(ours)
    out, state = net(batch(), state=state, method="features")
    assert_equal(out, ours.features(batch()))
    with pytest.raises(errors.ArgumentError, match="without its state"):
        net(batch(), key=jax.random.key(0))


def test_frozen_states_are_not_trained() -> None:
    layer = mu.nn.Linear(3, 3, rngs=mu.Rngs(0))
    mu.freeze(layer.kernel)
    net, state = eqx.nn.make_with_state(ToEquinox)(layer)
    assert set(net.params) == {"bias"}
    out, _ = net(batch(), state)
    assert_equal(out, layer(batch()))


def test_two_of_a_structure_are_the_same_program(traces: Any) -> None:
    body = traces.count(lambda net, x: net(x))
    jitted = eqx.filter_jit(body)
    for n in range(2):
        jitted(ToEquinox(mu.nn.Linear(3, 3, rngs=mu.Rngs(n))), batch())
    assert traces[body] == 1


def test_refusals() -> None:
    with pytest.raises(errors.DeferredStateError, match=r"`kernel` has no value"):
        ToEquinox(mu.nn.Linear(None, 3, rngs=mu.Rngs(0)))
    with pytest.raises(errors.ArgumentError, match="holds a Mutatis module"):
        ToEquinox(eqx.nn.Linear(3, 3, key=jax.random.key(0)))
