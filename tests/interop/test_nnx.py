"""`mu.interop.nnx` with the real library: what NNX gives natively is the twin."""

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

pytest.importorskip("flax")

from flax import nnx

from mutatis.interop.nnx import FromNnx, ToNnx
from tests.nets import Layers


class Net(nnx.Module):
    def __init__(self, rngs: Any, rate: float = 0.5) -> None:
        self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, momentum=0.9, rngs=rngs)])
        self.tied = self.layers[0]
        self.drop = nnx.Dropout(rate, rngs=rngs)
        self.scale = jnp.full(4, 2.0)
        self.calls = nnx.Cache(jnp.zeros((), jnp.int32))

    def __call__(self, x: Any) -> Any:
        self.calls[...] += 1
        for layer in self.layers:
            x = layer(x)
        return self.drop(x) * self.scale[None]


def batch(n: int = 8, size: int = 3, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (n, size))


def assert_equal(a: Any, b: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


def assert_same_values(net: FromNnx, native: Any) -> None:
    ours, theirs = nnx.state(net.module), nnx.state(native)
    for (path, a), (other, b) in zip(nnx.to_flat_state(ours), nnx.to_flat_state(theirs), strict=True):
        a, b = (v.get_value() if isinstance(v, nnx.Variable) else v for v in (a, b))
        assert path == other
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert_equal(a, b)


# -- theirs in ours ------------------------------------------------------------------------------------------------


def test_variables_become_kinds() -> None:
    class Adapter(nnx.Param):
        pass

    class Spikes(nnx.Variable):
        pass

    module = Net(nnx.Rngs(0))
    module.adapter = Adapter(jnp.ones(2))
    module.spikes = Spikes(jnp.ones(2))
    module.plain = nnx.Variable(jnp.ones(2))
    net = FromNnx(module)
    kinds = {show_path(path[1:]): type(cell) for path, cell in mu.variables(net).items()}
    spikes = kinds.pop("spikes")
    assert spikes.collection == "Spikes" and [*mu.state(net, "Spikes")] == [("variables", "spikes")]
    assert kinds == {
        "layers[0].kernel": mu.Param,
        "layers[0].bias": mu.Param,
        "layers[1].scale": mu.Param,
        "layers[1].bias": mu.Param,
        "layers[1].mean": mu.BatchStat,
        "layers[1].var": mu.BatchStat,
        "drop.rngs": mu.RngState,
        "scale": mu.Buffer,
        "calls": mu.Cache,
        "adapter": mu.Param,
        "plain": mu.Variable,
    }
    assert [*mu.state(net, "Adapter")] == [("variables", "adapter")]
    back = net.module
    assert type(back.adapter) is Adapter and type(back.spikes) is Spikes and back.tied is back.layers[0]


def test_draws_are_those_of_nnx() -> None:
    native = Net(nnx.Rngs(0))
    net = FromNnx(native)
    call = mu.jit(net)
    for n in range(3):
        assert_equal(call(batch(seed=n)), native(batch(seed=n)))
    assert_same_values(net, native)


@pytest.mark.parametrize("loop", ["steps", "scan"])
def test_training_equals_native(loop: str) -> None:
    native = Net(nnx.Rngs(0))
    net = FromNnx(native)
    tx = optax.sgd(0.1, momentum=0.9)
    theirs, ours = nnx.Optimizer(native, tx, wrt=nnx.Param), mu.Optimizer(net, tx)
    xs = jnp.stack([batch(seed=n) for n in range(4)])

    def loss(net: Any, x: Any) -> Any:
        return jnp.mean((net(x) - 1) ** 2)

    @nnx.jit
    def native_step(native: Any, theirs: Any, x: Any) -> None:
        theirs.update(native, nnx.grad(loss)(native, x))

    def step(x: Any) -> None:
        ours.update(mu.grad(loss)(net, x))

    for x in xs:
        native_step(native, theirs, x)
    if loop == "scan":
        mu.for_loop(step, xs)
    else:
        for x in xs:
            mu.jit(step)(x)
    assert_same_values(net, native)
    native.eval()
    assert_equal(net.eval()(xs[0]), native(xs[0]))


def test_evaluation_writes_nothing_else_and_is_undone() -> None:
    net = FromNnx(nnx.Sequential(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(0)))).eval()
    definition = mu.graphdef(net)
    mu.freeze(net)
    assert_equal(net(batch()), mu.jit(net)(batch()))
    assert mu.graphdef(net) != definition  # only since it is frozen:
    mu.thaw(net)
    assert mu.graphdef(net) == definition
    net.train()(batch())
    assert float(jnp.abs(net.variables["layers"][0]["mean"].value).sum()) > 0


@pytest.mark.parametrize("transform", [nnx.remat, nnx.jit])
@pytest.mark.parametrize("jit", [False, True])
def test_what_transforms_hand_through_is_not_written(transform: Any, jit: bool) -> None:
    class Inner(nnx.Module):
        def __init__(self) -> None:
            self.linear = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
            self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

        @transform
        def inner(self, x: Any) -> Any:
            return self.norm(self.linear(x))

        def __call__(self, x: Any) -> Any:
            return self.inner(x)

    net = FromNnx(Inner())
    mu.freeze(net, mu.Param)
    (mu.jit(net) if jit else net)(batch())
    assert float(jnp.abs(net.variables["norm"]["mean"].value).sum()) > 0
    mu.freeze(net.eval())
    (mu.jit(net) if jit else net)(batch())


def test_frozen_statistics() -> None:
    net = FromNnx(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    mu.freeze(net, mu.BatchStat)
    with pytest.raises(errors.FrozenStateError, match="eval"):
        net(batch())


def test_remat_draws_the_same() -> None:
    net = FromNnx(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    twin = mu.clone(net)

    def loss(net: Any, x: Any) -> Any:
        return jnp.sum(net(x) ** 2)

    x = jnp.ones(64)
    assert_equal(mu.grad(lambda x: loss(net, x))(x), mu.grad(lambda x: mu.remat(loss)(twin, x))(x))
    assert mu.state(net) == mu.state(twin)
    assert not jnp.array_equal(net(x), net(x))


def test_a_step_traces_once(traces: Any) -> None:
    net = FromNnx(Net(nnx.Rngs(0)))
    body = traces.count(lambda x: net(x).sum())
    step = mu.jit(body)
    for n in range(3):
        step(batch(seed=n))
    assert traces[body] == 1


def test_an_ensemble_and_a_scan_over_layers() -> None:
    make = mu.vmap(lambda key: FromNnx(nnx.BatchNorm(3, scale_init=nnx.initializers.normal(1.0), rngs=nnx.Rngs(key))))
    layers = make(jax.random.split(jax.random.key(0), 3))
    single = [mu.clone(layers) for _ in range(3)]
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
    assert_equal(layers.variables["var"].value[2], single[2].variables["var"].value)


def test_lanes_with_one_stream_draw_differently() -> None:
    net = FromNnx(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    out = mu.vmap(lambda x: net(x))(jnp.ones((4, 32)))
    assert len({tuple(row) for row in out.tolist()}) == 4
    assert int(net.variables["rngs"].value["count"]) == 1


def test_lanes_of_a_stream_that_a_transform_hands_through() -> None:
    class Inner(nnx.Module):
        def __init__(self) -> None:
            self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

        @nnx.remat
        def __call__(self, x: Any) -> Any:
            return self.drop(x)

    net = FromNnx(Inner())
    out = mu.jit(lambda x: mu.vmap(net)(x))(jnp.ones((4, 32)))
    assert len({tuple(row) for row in out.tolist()}) == 4
    assert int(net.variables["drop"]["rngs"].value["count"]) == 1


def test_sharing_between_parts() -> None:
    class Twice(mu.Module):
        def __init__(self) -> None:
            self.a = self.b = FromNnx(nnx.Linear(3, 3, rngs=nnx.Rngs(0)))

        def __call__(self, x: Any) -> Any:
            return self.b(self.a(x))

    net = Twice()
    native = net.a.module
    grads = mu.grad(lambda net: net(batch()).sum())(net)
    theirs = nnx.grad(lambda native: native(native(batch())).sum())(native)
    assert len(grads) == 2
    assert_equal(grads["a", "variables", "kernel"], theirs["kernel"].get_value())


class Grows(nnx.Module):
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Any) -> Any:
        self.calls += 1
        if not hasattr(self, "last"):
            self.last = nnx.Cache(x)
        self.last[...] = x
        return x


def test_structure_flows_back() -> None:
    net = FromNnx(Grows())
    net(jnp.ones(2))
    net(jnp.full(2, 3.0))
    assert net.module.calls == 2 and net.variables["last"].value.tolist() == [3.0, 3.0]
    other = FromNnx(Grows())
    mu.jit(other)(jnp.ones(2))
    assert other.variables["last"].value.tolist() == [1.0, 1.0]
    mu.snapshot(net)
    before = mu.graphdef(net)

    def fails() -> None:
        net(jnp.ones(2))
        raise KeyError

    with pytest.raises(KeyError):
        mu.jit(fails)()
    assert mu.graphdef(net) == before and net.variables["last"].value.tolist() == [3.0, 3.0]


@pytest.mark.parametrize("how", ["deepcopy", "clone", "split", "pickle", "checkpoint"])
def test_copies(how: str, tmp_path: Path) -> None:
    net = FromNnx(Net(nnx.Rngs(0)))
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
        other = FromNnx(Net(nnx.Rngs(1)))
        mu.checkpoint.restore(tmp_path / "net", other)
    assert mu.graphdef(other) == mu.graphdef(net)
    assert_equal(other(batch()), net(batch()))
    assert mu.state(other) == mu.state(net)


# -- attributes, methods and parts of theirs, through the door ------------------------------------------------------


@pytest.mark.parametrize("jit", [False, True])
def test_methods_pass_through_with_their_writes(jit: bool) -> None:
    native = nnx.MultiHeadAttention(num_heads=2, in_features=4, decode=True, rngs=nnx.Rngs(0))
    net = FromNnx(native)
    for length in (5, 7):  # anew, in another size
        native.init_cache((2, length, 4))
        net.init_cache((2, length, 4))
        assert net.cached_key.shape == (2, length, 2, 2) and isinstance(net.cache_index, mu.Cache)
        for n in range(2):
            x = jnp.full((2, 1, 4), n + 1.0)
            assert_equal((mu.jit(net) if jit else net)(x), native(x))
    assert_same_values(net, native)


def test_attributes_pass_through() -> None:
    net = FromNnx(nnx.Embed(7, 3, rngs=nnx.Rngs(0)))
    assert net.features == 3 and net.embedding is net.variables["embedding"]
    assert_equal(net.attend(jnp.eye(3)), net.embedding.value.T)
    net.embedding = jnp.zeros((7, 3))
    assert not net.attend(jnp.eye(3)).any()
    net.features = 4
    assert net.features == net.module.features == 4 and "features" not in net.__dict__
    with pytest.raises(
        AttributeError, match=r"'FromNnx' object has no attribute 'head', and the Embed of NNX has none"
    ):
        _ = net.head
    net.head = 3  # of our own
    assert net.__dict__["head"] == 3 and not hasattr(net.module, "head")


def test_parts_are_reached_on() -> None:
    net = FromNnx(Net(nnx.Rngs(0)))
    assert len(net.layers) == 2 and [part.use_bias for part in net.layers] == [True, True]
    assert net.layers[0].kernel is net.tied.kernel is net.variables["layers"][0]["kernel"]
    assert isinstance(net.drop.rngs, mu.RngState) and "layers[-1]" not in repr(net.layers[-1])
    net.drop.rate = 0.0
    assert net.module.drop.rate == net.drop.rate == mu.clone(net).drop.rate == 0.0
    net.layers[1](batch(size=4))
    assert float(jnp.abs(net.layers[1].mean.value).sum()) > 0
    net.eval()
    before = mu.state(net)
    net.layers[1](batch(size=4))
    assert mu.state(net) == before


def test_properties_see_values_and_what_fails_writes_nothing() -> None:
    class Counts(nnx.Module):
        def __init__(self) -> None:
            self.w = self.v = nnx.Param(jnp.ones(2))
            self.n = 0

        @property
        def total(self) -> Any:
            self.n += 1
            return self.w[...].sum()

        def fails(self) -> None:
            self.w[...] = jnp.zeros(2)
            self.n = 9
            raise KeyError

        @staticmethod
        def twice(x: int) -> int:
            return 2 * x

    class Ours(FromNnx):
        def __init__(self, module: Any) -> None:
            self.early = 1
            super().__init__(module)

    net = Ours(Counts())
    assert (float(net.total), net.n, net.twice(3), net.early) == (2.0, 1, 6, 1) and net.w is net.v
    with pytest.raises(KeyError):
        net.fails()
    assert net.n == 1 and float(net.w.sum()) == 2.0
    assert jax.tree.leaves(mu.grad(lambda net: net.total)(net))[0].tolist() == [1.0, 1.0]


# -- ours in theirs ------------------------------------------------------------------------------------------------


class Ours(Layers):
    """With an array that is no parameter."""

    def __init__(self, rngs: mu.Rngs) -> None:
        super().__init__(rngs, features=3)
        self.scale = jnp.full(4, 2.0)

    def __call__(self, x: Any) -> Any:
        return super().__call__(x) * self.scale[None]


class Host(nnx.Module):
    def __init__(self, model: mu.Module, rngs: Any) -> None:
        self.ours = ToNnx(model)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.head(self.ours(x))


def test_states_are_variables() -> None:
    class Adapter(mu.Param):
        collection = "adapters"

    model = Ours(mu.Rngs(0))
    model.adapter = Adapter(jnp.ones(2))
    net = ToNnx(model)
    types = {path[1:]: type(v) for path, v in nnx.to_flat_state(nnx.state(net))}
    adapter, scale = types.pop(("adapter",)), types.pop(("scale",))
    assert issubclass(adapter, nnx.Param) and nnx.variable_name_from_type(adapter) == "adapters"
    assert nnx.variable_name_from_type(scale) == "buffers"
    assert types == {
        ("layers", "0", "kernel"): nnx.Param,
        ("layers", "0", "bias"): nnx.Param,
        ("layers", "1", "scale"): nnx.Param,
        ("layers", "1", "bias"): nnx.Param,
        ("layers", "1", "mean"): nnx.BatchStat,
        ("layers", "1", "var"): nnx.BatchStat,
        ("drop", "stream", "key"): nnx.RngKey,
        ("drop", "stream", "count"): nnx.RngCount,
        ("calls",): nnx.Cache,
    }


def test_training_in_nnx_equals_ours() -> None:
    model = Ours(mu.Rngs(0))
    net = ToNnx(model)
    tx = optax.sgd(0.1, momentum=0.9)
    theirs, ours = nnx.Optimizer(net, tx, wrt=nnx.Param), mu.Optimizer(model, tx)

    def loss(net: Any, x: Any) -> Any:
        return jnp.mean((net(x) - 1) ** 2)

    @nnx.jit
    def native_step(net: Any, theirs: Any, x: Any) -> None:
        theirs.update(net, nnx.grad(loss)(net, x))

    for n in range(4):
        native_step(net, theirs, batch(seed=n))
        mu.jit(lambda x: ours.update(mu.grad(loss)(model, x)))(batch(seed=n))
    held = net.variables
    assert_equal(held["layers"]["0"]["kernel"].get_value(), model.layers[0].kernel.value)
    assert_equal(held["layers"]["1"]["var"].get_value(), model.layers[1].var.value)
    assert int(held["calls"].get_value()) == int(model.calls) == 4
    assert int(held["drop"]["stream"].count.get_value()) == 4
    net.eval()
    assert_equal(net(batch()), model.eval()(batch()))
    assert_equal(net(batch(), method="features"), model.features(batch()))


def test_eager_calls_write_in_place() -> None:
    net = ToNnx(Ours(mu.Rngs(0)))
    for _ in range(2):
        net(batch())
    assert int(net.variables["calls"].get_value()) == 2
    copied = nnx.clone(net)
    assert_equal(copied(batch()), net(batch()))


def test_in_a_host_and_in_ours_again() -> None:
    host = Host(Ours(mu.Rngs(0)), nnx.Rngs(0))
    net = FromNnx(host)
    assert_equal(mu.jit(net)(batch()), host(batch()))
    assert_same_values(net, host)
    assert type(net.variables["ours"]["variables"]["drop"]["stream"]) is mu.RngState


def test_nnx_finds_the_streams() -> None:
    net = ToNnx(mu.nn.Dropout(0.5, rngs=mu.Rngs(0)))
    nnx.reseed(net, dropout=7)
    a = net(jnp.ones(32))
    nnx.reseed(net, dropout=7)
    assert_equal(net(jnp.ones(32)), a)
    assert not jnp.array_equal(net(jnp.ones(32)), a)


def test_vmap_and_scan_of_nnx() -> None:
    @nnx.vmap
    def make(key: Any) -> Any:
        return ToNnx(mu.nn.Linear(3, 3, rngs=mu.Rngs(key)))

    layers = make(jax.random.split(jax.random.key(0), 3))
    kernels, biases = (layers.variables[name].get_value() for name in ("kernel", "bias"))
    out = nnx.vmap(lambda net, x: net(x), in_axes=(0, None))(layers, batch())
    assert_equal(out[1], batch() @ kernels[1] + biases[1][None])

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def forward(x: Any, net: Any) -> Any:
        return net(x)

    x = batch()
    for n in range(3):
        x = x @ kernels[n] + biases[n][None]
    assert_equal(forward(batch(), layers), x)


def test_sow() -> None:
    class Sower(mu.Module):
        def __call__(self, x: Any) -> Any:
            mu.sow(self, "hidden", 2 * x)
            return x

    net = ToNnx(Sower())
    for n in range(2):
        nnx.jit(lambda net, x: net(x))(net, jnp.full(2, float(n)))
    sown = jax.tree.leaves(nnx.pop(net, nnx.Intermediate))
    assert_equal(sown, [jnp.full(2, 2.0)])


def test_frozen_states_are_no_parameters() -> None:
    layer = mu.nn.Linear(3, 3, rngs=mu.Rngs(0))
    mu.freeze(layer.kernel)
    net = ToNnx(layer)
    grads = nnx.grad(lambda net: net(batch()).sum())(net)
    assert [path for path, _ in nnx.to_flat_state(grads)] == [("variables", "bias")]


def test_lower_precision() -> None:
    net = ToNnx(mu.nn.Linear(3, 3, rngs=mu.Rngs(0)))
    definition, state = nnx.split(net)
    half = nnx.merge(definition, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state))
    assert half(batch().astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_refusals() -> None:
    with pytest.raises(errors.DeferredStateError, match=r"`kernel` has no value"):
        ToNnx(mu.nn.Linear(None, 3, rngs=mu.Rngs(0)))
    with pytest.raises(errors.ArgumentError, match="holds a Mutatis module"):
        ToNnx(jnp.ones(3))  # type: ignore[arg-type]
    both = mu.Module()
    both.held = {1: mu.Param(1.0), "1": mu.Param(2.0)}
    with pytest.raises(errors.StructureError, match="taken as text"):
        ToNnx(both)
