"""`mu.interop.linen` with the real library: what Linen gives natively is the twin."""

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

pytest.importorskip("flax")

from flax import linen as nn

from mutatis.interop.linen import FromLinen, ToLinen
from tests.nets import Layers


class Block(nn.Module):
    width: int = 4

    @nn.compact
    def __call__(self, x: Any, train: bool = True) -> Any:
        x = nn.Dense(self.width)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dropout(0.5, deterministic=not train)(nn.relu(x))


class Norm(nn.Module):
    """As `Block`, without random numbers."""

    @nn.compact
    def __call__(self, x: Any, train: bool = True) -> Any:
        return nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(3)(x))


class Tied(nn.Module):
    def setup(self) -> None:
        self.dense = nn.Dense(3)

    def __call__(self, x: Any) -> Any:
        return self.dense(self.dense(x))


class Decode(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        index = self.variable("cache", "index", lambda: jnp.zeros((), jnp.int32))
        spikes = self.variable("spikes", "seen", lambda: jnp.zeros((3,)))
        index.value += 1
        spikes.value = spikes.value + x
        self.sow("intermediates", "twice", 2 * x)
        return x * index.value.astype(x.dtype)


def batch(n: int = 8, size: int = 3, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (n, size))


def assert_equal(a: Any, b: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


def collections(net: FromLinen) -> Any:
    return mu.state(net).filter(lambda path, _: path[0] == "variables").to_pure_dict()["variables"]


# -- theirs in ours ------------------------------------------------------------------------------------------------


def test_collections_become_kinds() -> None:
    net = FromLinen(Block(), rngs=mu.Rngs(0)).lazy_init(batch())
    kinds = {path[1:]: type(cell) for path, cell in mu.variables(net).items() if path[0] == "variables"}
    assert kinds == {
        ("params", "Dense_0", "kernel"): mu.Param,
        ("params", "Dense_0", "bias"): mu.Param,
        ("params", "BatchNorm_0", "scale"): mu.Param,
        ("params", "BatchNorm_0", "bias"): mu.Param,
        ("batch_stats", "BatchNorm_0", "mean"): mu.BatchStat,
        ("batch_stats", "BatchNorm_0", "var"): mu.BatchStat,
    }


def test_a_collection_of_ones_own() -> None:
    net = FromLinen(Decode(), rngs=mu.Rngs(0))
    x = jnp.ones(3)
    for n in (2, 3):  # `init` has called it once
        assert_equal(net(x), n * x)
    (path,) = mu.state(net, "spikes")
    spikes = mu.variables(net)[path]
    assert spikes.collection == "spikes" and float(spikes[0]) == 3
    assert int(net.variables["cache"]["index"]) == 3 and type(net.variables["cache"]["index"]) is mu.Cache
    assert "intermediates" not in net.variables
    assert type(pickle.loads(pickle.dumps(spikes))) is type(spikes)
    assert type(copy.deepcopy(net).variables["spikes"]["seen"]) is type(spikes)


def test_a_kind_that_declares_the_collection_is_found() -> None:
    class Voltage(mu.Variable):
        collection = "voltages"

    class Neuron(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return self.variable("voltages", "v", lambda: x).value

    assert type(FromLinen(Neuron(), rngs=mu.Rngs(0)).lazy_init(jnp.ones(2)).variables["voltages"]["v"]) is Voltage


def test_intermediates_are_those_of_the_last_call() -> None:
    net = FromLinen(Decode(), rngs=mu.Rngs(0), mutable=["cache", "spikes", "intermediates"])
    step = mu.jit(lambda net, x: net(x))
    for n in range(3):
        step(net, jnp.full(3, float(n)))
        (sown,) = net.variables["intermediates"]["twice"].value
        assert float(sown[0]) == 2 * n
    assert type(net.variables["intermediates"]["twice"]) is mu.Intermediate
    mu.pop(net, mu.Intermediate)
    net(jnp.ones(3))


def native_training(variables: Any, xs: Any) -> Any:
    """Training by hand, in Linen's own way."""
    tx = optax.sgd(0.1, momentum=0.9)
    params, stats = variables["params"], variables["batch_stats"]
    opt = tx.init(params)

    @jax.jit
    def step(params: Any, stats: Any, opt: Any, x: Any) -> Any:
        def loss(params: Any) -> Any:
            y, new = Norm().apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
            return jnp.mean((y - 1) ** 2), new["batch_stats"]

        grads, stats = jax.grad(loss, has_aux=True)(params)
        updates, opt2 = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), stats, opt2

    for x in xs:
        params, stats, opt = step(params, stats, opt, x)
    return {"params": params, "batch_stats": stats}


@pytest.mark.parametrize("loop", ["steps", "scan"])
def test_training_equals_native(loop: str) -> None:
    variables = Norm().init(jax.random.key(1), batch())
    xs = jnp.stack([batch(seed=n) for n in range(5)])
    net = FromLinen(Norm(), variables=variables)
    opt = mu.Optimizer(net, optax.sgd(0.1, momentum=0.9))

    def step(x: Any) -> None:
        grads = mu.grad(lambda net: jnp.mean((net(x) - 1) ** 2))(net)
        opt.update(grads)

    if loop == "scan":
        mu.jit(lambda: mu.for_loop(step, xs))()
    else:
        jitted = mu.jit(step)
        for x in xs:
            jitted(x)
    expected = native_training(variables, xs)
    assert_equal(collections(net), expected)
    assert_equal(net.eval()(xs[0], train=False), Norm().apply(expected, xs[0], train=False))


def test_evaluation_writes_nothing() -> None:
    net = FromLinen(Block(), rngs=mu.Rngs(0)).lazy_init(batch()).eval()
    mu.freeze(net)
    before = mu.state(net)
    a, b = net(batch(), train=False), mu.jit(lambda x: net(x, train=False))(batch())
    assert_equal(a, b)
    assert mu.state(net) == before


@pytest.mark.parametrize("lift", [nn.remat, nn.jit])
@pytest.mark.parametrize("jit", [False, True])
def test_what_lifted_transforms_hand_through_is_not_written(lift: Any, jit: bool) -> None:
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.BatchNorm(use_running_average=True)(x)

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return lift(Inner)(name="inner")(x)

    net = FromLinen(Outer(), rngs=mu.Rngs(0)).lazy_init(batch()).eval()
    mu.freeze(net)
    (mu.jit(net) if jit else net)(batch())


def test_frozen_statistics_say_what_to_do() -> None:
    net = FromLinen(Norm(), rngs=mu.Rngs(0)).lazy_init(batch())
    mu.freeze(net, mu.BatchStat)
    with pytest.raises(errors.FrozenStateError, match=r"(?s)BatchNorm_0.*eval"):
        net(batch())


def test_a_dropped_write_is_linens_error() -> None:
    net = FromLinen(Norm(), rngs=mu.Rngs(0), mutable=False).lazy_init(batch())
    with pytest.raises(Exception, match="immutable"):
        net(batch())


def test_dropout_draws_anew_and_the_same_in_remat() -> None:
    net = FromLinen(nn.Dropout(0.5, deterministic=False), rngs=mu.Rngs(0))
    a, b = net(jnp.ones(64)), net(jnp.ones(64))
    assert not jnp.array_equal(a, b)

    def loss(net: Any, x: Any) -> Any:
        return jnp.sum(net(x) ** 2)

    twin = mu.clone(net)
    grads = mu.grad(lambda x: loss(net, x))(jnp.ones(64))
    again = mu.grad(lambda x: mu.remat(loss)(twin, x))(jnp.ones(64))
    assert_equal(grads, again)
    assert mu.state(net) == mu.state(twin)


def test_streams_by_name() -> None:
    rngs = mu.Rngs(params=0, dropout=1)
    net = FromLinen(nn.Dropout(0.5, deterministic=False), rngs=rngs)
    key = mu.clone(net).rngs.stream("dropout")
    key.draw()  # for `init`
    expected = nn.Dropout(0.5, deterministic=False).apply({}, jnp.ones(16), rngs={"dropout": key.draw()})
    assert_equal(net(jnp.ones(16)), expected)
    given = net.eval()(jnp.ones(16), rngs={"dropout": jax.random.key(3)})
    assert_equal(
        given, nn.Dropout(0.5, deterministic=False).apply({}, jnp.ones(16), rngs={"dropout": jax.random.key(3)})
    )


def test_sharing() -> None:
    tied = FromLinen(Tied(), rngs=mu.Rngs(0)).lazy_init(batch())
    assert len(mu.state(tied, mu.Param)) == 2

    class Twice(mu.Module):
        def __init__(self) -> None:
            self.a = self.b = FromLinen(nn.Dense(3), rngs=mu.Rngs(0))

        def __call__(self, x: Any) -> Any:
            return self.b(self.a(x))

    net = Twice()
    mu.jit(net)(batch())
    assert net.a is net.b and len(mu.state(net, mu.Param)) == 2
    kernel = {"params": jax.tree.map(jnp.asarray, collections(net.a)["params"])}

    def twice(v: Any) -> Any:
        return nn.Dense(3).apply(v, nn.Dense(3).apply(v, batch())).sum()

    grads = mu.grad(lambda net: net(batch()).sum())(net)
    native = jax.grad(twice)(kernel)["params"]
    assert_equal(grads["a", "variables", "params", "kernel"], native["kernel"])


def test_a_step_traces_once(traces: Any) -> None:
    net = FromLinen(Block(), rngs=mu.Rngs(0)).lazy_init(batch())
    body = traces.count(lambda x: net(x).sum())
    step = mu.jit(body)
    for n in range(3):
        step(batch(seed=n))
    assert traces[body] == 1


def test_states_are_created_inside_a_program() -> None:
    net = FromLinen(Block(), rngs=mu.Rngs(0))
    mu.jit(lambda x: net(x))(batch())
    twin = FromLinen(Block(), rngs=mu.Rngs(0))
    twin(batch())
    assert_equal(collections(net), collections(twin))
    failing = FromLinen(Block(), rngs=mu.Rngs(0))

    def fails(x: Any) -> None:
        failing(x)
        raise KeyError("after")

    with pytest.raises(KeyError):
        mu.jit(fails)(batch())
    assert failing.variables is None


def test_shapes_only() -> None:
    shape = jax.ShapeDtypeStruct((8, 3), jnp.float32)
    net = mu.eval_shape(lambda: FromLinen(Block(), rngs=mu.Rngs(0)).lazy_init(shape))
    assert net.variables["params"]["Dense_0"]["kernel"].shape == (3, 4)
    assert isinstance(net.variables["params"]["Dense_0"]["kernel"].value, jax.ShapeDtypeStruct)


def test_an_ensemble_and_a_scan_over_layers() -> None:
    make = mu.vmap(lambda key: FromLinen(Norm(), rngs=mu.Rngs(key)).lazy_init(batch()))
    layers = make(jax.random.split(jax.random.key(0), 4))
    single = [mu.clone(layers) for _ in range(4)]
    for n, one in enumerate(single):
        for cell in mu.variables(one).values():
            cell.value = jax.tree.map(lambda leaf, n=n: leaf[n], cell.value)
    out = mu.vmap(lambda net, x: net(x), in_axes=(0, None))(mu.clone(layers), batch())
    assert_equal(out, jnp.stack([mu.clone(one)(batch()) for one in single]))
    x = batch()
    scanned, _ = mu.scan(lambda x, net: (net(x), None), x, layers)
    for one in single:
        x = one(x)
    assert_equal(scanned, x)
    assert_equal(
        layers.variables["batch_stats"]["BatchNorm_0"]["mean"].value[3],
        single[3].variables["batch_stats"]["BatchNorm_0"]["mean"].value,
    )


@pytest.mark.parametrize("how", ["deepcopy", "clone", "split", "pickle", "checkpoint"])
def test_copies(how: str, tmp_path: Path) -> None:
    net = FromLinen(Block(), rngs=mu.Rngs(0)).lazy_init(batch())
    net(batch())
    if how == "deepcopy":
        other = copy.deepcopy(net)
    elif how == "clone":
        other = mu.clone(net)
    elif how == "split":
        definition, params, rest = mu.split(net, mu.Param, ...)
        other = mu.merge(definition, params, rest)
        assert mu.graphdef(other) == mu.graphdef(net)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(net))
    else:
        pytest.importorskip("orbax.checkpoint")
        mu.checkpoint.save(tmp_path / "net", net)
        other = FromLinen(Block(), rngs=mu.Rngs(1)).lazy_init(batch())
        mu.checkpoint.restore(tmp_path / "net", other)
    assert mu.state(other) == mu.state(net)
    assert_equal(other(batch()), net(batch()))
    assert mu.state(other) == mu.state(net)


def test_partitioning_names_are_kept() -> None:
    init = nn.with_partitioning(nn.initializers.ones, ("in", "out"))
    net = FromLinen(nn.Dense(3, kernel_init=init), rngs=mu.Rngs(0))
    net(batch())
    assert net.variables["params"]["kernel"].sharding == ("in", "out")


def test_an_unhashable_recipe() -> None:
    class Sizes:
        __hash__ = None  # type: ignore[assignment]
        size = 3

    class Net(nn.Module):
        sizes: Any

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Dense(self.sizes.size)(x)

    net = FromLinen(Net(Sizes()), rngs=mu.Rngs(0))
    assert mu.jit(net)(batch()).shape == (8, 3)


def test_no_streams() -> None:
    with pytest.raises(errors.RandomStreamError, match=r"rngs=mu\.Rngs\(0\)"):
        FromLinen(nn.Dense(3))(batch())


# -- ours in theirs ------------------------------------------------------------------------------------------------


def plain(rngs: mu.Rngs) -> Layers:
    return Layers(rngs, rate=0.0)


class Host(nn.Module):
    train: bool = True

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(2)(ToLinen(Layers, deterministic=not self.train, name="ours")(x))


def test_states_are_in_collections() -> None:
    variables = Host().init(jax.random.key(0), batch())
    shapes = jax.tree.map(jnp.shape, variables)
    assert shapes == {
        "params": {
            "ours": {"layers": {"0": {"bias": (4,), "kernel": (3, 4)}, "1": {"bias": (4,), "scale": (4,)}}},
            "Dense_0": {"bias": (2,), "kernel": (4, 2)},
        },
        "batch_stats": {"ours": {"layers": {"1": {"mean": (4,), "var": (4,)}}}},
        "cache": {"ours": {"calls": ()}},
    }
    assert int(variables["cache"]["ours"]["calls"]) == 0
    assert_equal(variables["batch_stats"]["ours"]["layers"]["1"]["mean"], jnp.zeros(4))


@pytest.mark.parametrize("jit", [False, True])
def test_apply_equals_the_module(jit: bool) -> None:
    layer = ToLinen(plain)
    variables = layer.init(jax.random.key(0), batch())
    model = plain(mu.Rngs(0))
    model(batch())
    apply = jax.jit(layer.apply, static_argnames="mutable") if jit else layer.apply
    for n in range(3):
        mu.update(model, {"layers": {0: variables["params"]["layers"]["0"]}})
        if n == 0:
            mu.reset(model, mu.BatchStat)
            model.calls.value = 0
        out, updates = apply(variables, batch(seed=n), mutable=("batch_stats", "cache"))
        assert_equal(out, model(batch(seed=n)))
        assert_equal(updates["batch_stats"]["layers"]["1"]["var"], model.layers[1].var.value)
        assert int(updates["cache"]["calls"]) == n + 1
        variables = {**variables, **updates}
    evaluated = ToLinen(plain, deterministic=True).apply(variables, batch(), mutable=("cache",))[0]
    assert_equal(evaluated, model.eval()(batch()))


def test_gradients_equal() -> None:
    layer = ToLinen(plain)
    variables = layer.init(jax.random.key(0), batch())
    model = plain(mu.Rngs(0))
    model(batch())
    mu.update(model, {"layers": {0: variables["params"]["layers"]["0"]}})

    def loss(params: Any) -> Any:
        out, _ = layer.apply({**variables, "params": params}, batch(), mutable=["batch_stats", "cache"])
        return jnp.sum(out**3)

    theirs = jax.grad(loss)(variables["params"])
    ours = mu.grad(lambda model: jnp.sum(model(batch()) ** 3))(model)
    assert_equal(theirs["layers"]["0"]["kernel"], ours["layers", 0, "kernel"])
    assert_equal(theirs["layers"]["1"]["scale"], ours["layers", 1, "scale"])


def test_a_write_to_an_immutable_collection_is_linens_error() -> None:
    layer = ToLinen(plain)
    variables = layer.init(jax.random.key(0), batch())
    with pytest.raises(Exception, match="immutable"):
        layer.apply(variables, batch())


def test_random_streams_come_from_linen() -> None:
    layer = ToLinen(lambda rngs: mu.nn.Dropout(0.5, rngs=rngs))
    variables = layer.init(jax.random.key(0), jnp.ones(32))
    assert variables == {}
    a = layer.apply(variables, jnp.ones(32), rngs={"dropout": jax.random.key(1)})
    assert_equal(a, layer.apply(variables, jnp.ones(32), rngs={"dropout": jax.random.key(1)}))
    assert not jnp.array_equal(a, layer.apply(variables, jnp.ones(32), rngs={"dropout": jax.random.key(2)}))
    with pytest.raises(errors.RandomStreamError, match=r"`stream` was drawn from.*\n.*rngs=\{'dropout'"):
        layer.apply(variables, jnp.ones(32))
    off = ToLinen(lambda rngs: mu.nn.Dropout(0.5, rngs=rngs), deterministic=True)
    assert_equal(off.apply(variables, jnp.ones(32)), jnp.ones(32))


def test_two_streams_of_a_name_differ() -> None:
    class Two(mu.Module):
        def __init__(self, rngs: mu.Rngs) -> None:
            self.a, self.b = mu.nn.Dropout(0.5, rngs=rngs), mu.nn.Dropout(0.5, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.a(x), self.b(x)

    a, b = ToLinen(Two).apply({}, jnp.ones(64), rngs={"dropout": jax.random.key(0)})
    assert not jnp.array_equal(a, b)


def test_methods_and_lifted_transforms() -> None:
    layer = ToLinen(plain)
    variables = layer.init(jax.random.key(0), batch())

    class Call(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return ToLinen(plain, name="ours")(x, method="features")

    wrapped = {name: {"ours": part} for name, part in variables.items()}
    kernel, bias = variables["params"]["layers"]["0"]["kernel"], variables["params"]["layers"]["0"]["bias"]
    assert_equal(Call().apply(wrapped, batch()), batch() @ kernel + bias[None])

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            scan = nn.scan(
                lambda module, x, _: (module(x), None),
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True},
                length=3,
            )
            return scan(ToLinen(lambda rngs: mu.nn.Linear(3, 3, rngs=rngs), name="layers"), x, None)[0]

    stacked = Stack().init(jax.random.key(0), batch())
    kernels = stacked["params"]["layers"]["kernel"]
    assert kernels.shape == (3, 3, 3) and not jnp.array_equal(kernels[0], kernels[1])
    x = batch()
    for n in range(3):
        x = x @ kernels[n] + stacked["params"]["layers"]["bias"][n][None]
    assert_equal(Stack().apply(stacked, batch()), x)


class Sower(mu.Module):
    def __init__(self, rngs: mu.Rngs) -> None:
        self.w = mu.Param(jnp.ones(3))

    def __call__(self, x: Any) -> Any:
        mu.sow(self, "hidden", x * self.w)
        return x


def test_sow() -> None:
    layer = ToLinen(Sower)
    variables = layer.init(jax.random.key(0), jnp.ones(3))
    assert set(variables) == {"params"}
    assert_equal(layer.apply(variables, jnp.ones(3)), jnp.ones(3))
    _, updates = layer.apply(variables, jnp.full(3, 2.0), mutable=["intermediates"])
    assert_equal(jax.tree.leaves(updates["intermediates"]), [jnp.full(3, 2.0)])


def test_round_trip() -> None:
    """Ours in theirs in ours."""
    net = FromLinen(Host(), rngs=mu.Rngs(0))
    mu.jit(net)(batch())
    stats = net.variables["batch_stats"]["ours"]["layers"]["1"]["mean"]
    assert type(stats) is mu.BatchStat and float(jnp.abs(stats.value).sum()) > 0
    grads = mu.grad(lambda net: net(batch()).sum())(net)
    assert grads["variables", "params", "ours", "layers", "0", "kernel"].shape == (3, 4)
    assert int(net.variables["cache"]["ours"]["calls"]) == 2


class Grows(mu.Module):
    def __init__(self, rngs: mu.Rngs) -> None:
        self.layers: list[Any] = []
        self.rngs = rngs

    def __call__(self, x: Any) -> Any:
        self.layers.append(mu.Param(x))
        return x


OUTSIDE = mu.Variable(0)


class Stray(mu.Module):
    def __init__(self, rngs: mu.Rngs) -> None:
        self.w = mu.Param(1.0)

    def __call__(self, x: Any) -> Any:
        OUTSIDE.value += 1
        return x


class Unused(mu.Module):
    def __init__(self, rngs: mu.Rngs) -> None:
        self.layer = mu.nn.Linear(None, 3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return x


@pytest.mark.parametrize(
    ("constructor", "error", "text"),
    [
        (Grows, errors.StructureError, r"changed what the module is made of[^$]*layers\[0\]"),
        (Stray, errors.StructureError, "no part of the module"),
        (Unused, errors.DeferredStateError, r"layer\.kernel"),
    ],
)
def test_refusals(constructor: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        ToLinen(constructor).init(jax.random.key(0), jnp.ones(3))
    assert int(OUTSIDE) == 0


def test_missing_variables() -> None:
    layer = ToLinen(plain)
    variables = layer.init(jax.random.key(0), batch())
    with pytest.raises(errors.StructureError, match=r"missing: layers\[1\]\.mean in `batch_stats`"):
        layer.apply({"params": variables["params"]}, batch())
