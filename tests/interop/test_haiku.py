"""`mu.interop.haiku` with the real library: what Haiku gives natively is the twin."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mutatis as mu
from mutatis import errors

pytest.importorskip("haiku")

import haiku as hk

from mutatis.interop.haiku import FromHaiku, ToHaiku
from tests.nets import Layers


@pytest.fixture(autouse=True)
def promote() -> Iterator[None]:
    """Haiku's dropout multiplies booleans and floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def forward(x: Any, is_training: bool = True) -> Any:
    x = hk.Linear(4)(x)
    x = hk.BatchNorm(True, True, 0.9, cross_replica_axis=None)(x, is_training)
    return hk.dropout(hk.next_rng_key(), 0.5, x) if is_training and hk.maybe_next_rng_key() is not None else x


def tied(x: Any) -> Any:
    linear = hk.Linear(3)
    return linear(linear(x))


def dropout(x: Any) -> Any:
    return hk.dropout(hk.next_rng_key(), 0.5, x)


def batch(n: int = 8, size: int = 3, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (n, size))


def assert_equal(a: Any, b: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


# -- theirs in ours ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["function", "transformed"])
def test_values_become_states(given: str) -> None:
    function = forward if given == "function" else hk.transform_with_state(forward)
    net = FromHaiku(function, rngs=mu.Rngs(0)).lazy_init(batch())
    assert set(net.variables["params"]) == {"linear", "batch_norm"}
    assert type(net.variables["params"]["linear"]["w"]) is mu.Param
    assert type(net.variables["state"]["batch_norm/~/mean_ema"]["average"]) is mu.BatchStat
    assert len(mu.state(net, mu.Param)) == 4 and len(mu.state(net, mu.BatchStat)) == 6


def test_without_state() -> None:
    transformed = hk.transform(tied)
    net = FromHaiku(transformed, rngs=mu.Rngs(0))
    out = mu.jit(net)(batch())
    assert len(mu.state(net, mu.Param)) == 2
    params = {name: {k: v.value for k, v in part.items()} for name, part in net.variables["params"].items()}
    assert_equal(out, transformed.apply(params, None, batch()))
    grads = mu.grad(lambda net: net(batch()).sum())(net)
    native = jax.grad(lambda params: transformed.apply(params, None, batch()).sum())(params)
    assert_equal(grads["variables", "params", "linear", "w"], native["linear"]["w"])


def test_training_equals_native() -> None:
    transformed = hk.transform_with_state(forward)
    params, state = transformed.init(jax.random.key(0), batch())
    net = FromHaiku(forward, params=params, state=state)
    tx = optax.sgd(0.1, momentum=0.9)
    ours, theirs = mu.Optimizer(net, tx), tx.init(params)
    xs = jnp.stack([batch(seed=n) for n in range(4)])

    def step(x: Any) -> None:
        ours.update(mu.grad(lambda net: jnp.mean((net(x) - 1) ** 2))(net))

    mu.jit(lambda: mu.for_loop(step, xs))()
    for x in xs:

        def loss(params: Any, state: Any, x: Any = x) -> Any:
            y, state = transformed.apply(params, state, None, x)
            return jnp.mean((y - 1) ** 2), state

        grads, state = jax.grad(loss, has_aux=True)(params, state)
        updates, theirs = tx.update(grads, theirs)
        params = optax.apply_updates(params, updates)
    held = {name: mu.state(net)["variables", name].to_pure_dict() for name in ("params", "state")}
    assert_equal(held, {"params": params, "state": state})
    expected, _ = transformed.apply(params, state, None, xs[0], False)
    mu.freeze(net)
    assert_equal(net.eval()(xs[0], is_training=False), expected)


def test_keys() -> None:
    net = FromHaiku(dropout, rngs=mu.Rngs(params=0, dropout=1))
    x = jnp.ones(64)
    assert not jnp.array_equal(net(x), net(x))
    twin = mu.clone(net)
    native = hk.transform(dropout)
    assert_equal(net(x), native.apply({}, twin.rngs.dropout(), x))
    assert_equal(net.eval()(x, rng=jax.random.key(3)), native.apply({}, jax.random.key(3), x))
    assert mu.state(net) == mu.state(twin)
    net.train()

    def loss(net: Any, x: Any) -> Any:
        return jnp.sum(net(x) ** 2)

    assert_equal(mu.grad(lambda x: loss(net, x))(x), mu.grad(lambda x: mu.remat(loss)(twin.train(), x))(x))


def test_a_step_traces_once(traces: Any) -> None:
    net = FromHaiku(forward, rngs=mu.Rngs(0)).lazy_init(batch())
    body = traces.count(lambda x: net(x).sum())
    step = mu.jit(body)
    for n in range(3):
        step(batch(seed=n))
    assert traces[body] == 1


def test_an_ensemble_and_a_scan_over_layers() -> None:
    make = mu.vmap(lambda key: FromHaiku(lambda x: hk.Linear(3)(x), rngs=mu.Rngs(key)).lazy_init(batch()))
    layers = make(jax.random.split(jax.random.key(0), 3))
    w, b = (layers.variables["params"]["linear"][name].value for name in "wb")
    x = batch()
    scanned, _ = mu.scan(lambda x, net: (net(x), None), x, layers)
    for n in range(3):
        x = x @ w[n] + b[n][None]
    assert_equal(scanned, x)


@pytest.mark.parametrize("how", ["deepcopy", "clone", "split", "pickle", "checkpoint"])
def test_copies(how: str, tmp_path: Path) -> None:
    net = FromHaiku(forward, rngs=mu.Rngs(0))
    net(batch())
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
        other = FromHaiku(forward, rngs=mu.Rngs(1)).lazy_init(batch())
        mu.checkpoint.restore(tmp_path / "net", other)
    assert mu.graphdef(other) == mu.graphdef(net)
    assert_equal(other(batch()), net(batch()))
    assert mu.state(other) == mu.state(net)


def test_no_streams() -> None:
    with pytest.raises(errors.RandomStreamError, match=r"rngs=mu\.Rngs\(0\)"):
        FromHaiku(forward)(batch())


# -- ours in theirs ------------------------------------------------------------------------------------------------


class Ours(Layers):
    """With a state that is a pytree."""

    def __init__(self, rngs: mu.Rngs) -> None:
        super().__init__(rngs, rate=0.0)
        self.calls = mu.Cache({"n": 0})

    def __call__(self, x: Any) -> Any:
        self.calls.value = {"n": self.calls.value["n"] + 1}
        for layer in self.layers:
            x = layer(x)
        return self.drop(x)


def host(x: Any, is_training: bool = True) -> Any:
    return hk.Linear(2)(ToHaiku(Ours, name="ours")(x, is_training=is_training))


def test_apply_equals_the_module() -> None:
    transformed = hk.transform_with_state(
        lambda x, is_training=True: ToHaiku(Ours, name="ours")(x, is_training=is_training)
    )
    params, state = transformed.init(jax.random.key(0), batch())
    assert jax.tree.map(jnp.shape, params) == {
        "ours": {"layers.0.bias": (4,), "layers.0.kernel": (3, 4), "layers.1.bias": (4,), "layers.1.scale": (4,)}
    }
    assert int(state["ours"]["calls"]["n"]) == 0
    model = Ours(mu.Rngs(0))
    model(batch())
    mu.reset(model, mu.BatchStat)
    mu.update(model, {"layers": {0: {name: params["ours"][f"layers.0.{name}"] for name in ("kernel", "bias")}}})
    apply = jax.jit(transformed.apply)
    for n in range(3):
        grads = jax.grad(lambda params, n=n: (apply(params, state, None, batch(seed=n))[0] ** 3).sum())(params)
        ours = mu.grad(lambda model, n=n: (model(batch(seed=n)) ** 3).sum())(model)
        assert_equal(grads["ours"]["layers.0.kernel"], ours["layers", 0, "kernel"])
        _, state = apply(params, state, None, batch(seed=n))
        assert_equal(state["ours"]["layers.1.mean"], model.layers[1].mean.value)
        assert int(state["ours"]["calls"]["n"]) == n + 1
    out, _ = transformed.apply(params, state, None, batch(), False)
    assert_equal(out, model.eval()(batch()))


def test_one_module_called_twice() -> None:
    def twice(x: Any) -> Any:
        ours = ToHaiku(lambda rngs: mu.nn.Linear(None, 3, rngs=rngs), name="ours")
        return ours(ours(x))

    transformed = hk.transform(twice)
    params = transformed.init(jax.random.key(0), batch())
    w, b = params["ours"]["kernel"], params["ours"]["bias"]
    assert_equal(transformed.apply(params, None, batch()), (batch() @ w + b[None]) @ w + b[None])


def test_keys_in_haiku() -> None:
    transformed = hk.transform_with_state(
        lambda x, is_training=True: ToHaiku(lambda rngs: mu.nn.Dropout(0.5, rngs=rngs))(x, is_training=is_training)
    )
    x = jnp.ones(32)
    params, state = transformed.init(jax.random.PRNGKey(0), x)
    assert params == {} and state == {}
    a, _ = transformed.apply(params, state, jax.random.key(0), x)
    b, _ = transformed.apply(params, state, jax.random.key(1), x)
    assert not jnp.array_equal(a, b)
    assert_equal(transformed.apply(params, state, None, x, False)[0], x)
    with pytest.raises(errors.RandomStreamError, match="is_training=False"):
        transformed.apply(params, state, None, x)


def test_round_trip() -> None:
    net = FromHaiku(host, rngs=mu.Rngs(0))
    mu.jit(net)(batch())
    cell = net.variables["state"]["ours"]["layers.1.mean"]
    assert type(cell) is mu.BatchStat and float(jnp.abs(cell.value).sum()) > 0
    grads = mu.grad(lambda net: net(batch()).sum())(net)
    assert grads["variables", "params", "ours", "layers.0.kernel"].shape == (3, 4)


def test_refusals() -> None:
    class WritesParam(mu.Module):
        def __init__(self, rngs: mu.Rngs) -> None:
            self.w = mu.Param(jnp.ones(2))

        def __call__(self, x: Any) -> Any:
            self.w += 1
            return x

    transformed = hk.transform_with_state(lambda x: ToHaiku(WritesParam)(x))
    with pytest.raises(errors.FrozenStateError, match="constant in a call"):
        transformed.apply(*transformed.init(jax.random.key(0), jnp.ones(2)), None, jnp.ones(2))
    with pytest.raises(errors.StructureError, match=r"missing: layers\[0\]\.kernel"):
        hk.transform_with_state(host).apply({"linear": {}}, {}, None, batch())
