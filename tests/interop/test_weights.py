"""`mutatis.interop.weights`: weights of files and of live models of other libraries, by rules and conventions."""

from __future__ import annotations

import functools
import sys
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import errors, interop, nn
from mutatis.interop import Halves, Join, Reshape, Split, Transpose

pytestmark = pytest.mark.once

DATA = Path(__file__).parents[1] / "data" / "weights"


class Net(mu.Module):
    """Layers in a list and a dictionary, one of them twice, with a stream and a cache."""

    def __init__(self, seed: int = 0) -> None:
        rngs = mu.Rngs(seed)
        self.layers = [nn.Linear(3, 4, rngs=rngs), nn.BatchNorm(4)]
        self.named = {"conv": nn.Conv(4, 6, (2, 3), feature_group_count=2, rngs=rngs)}
        self.tied = self.layers[0]
        self.drop = nn.Dropout(0.5, rngs=rngs)
        self.seen = mu.Cache(jnp.zeros((), jnp.int32))
        self.table = mu.Param(jax.random.normal(rngs(), (2, 2)))


def equal(a: Any, b: Any, *filters: Any) -> bool:
    return mu.state(a, *filters) == mu.state(b, *filters)


# -- out and in again ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convention", ["flax", "torch"])
def test_out_and_in(convention: str, tmp_path: Path) -> None:
    model, other = Net(0), Net(1)
    interop.save(tmp_path / "net.safetensors", model, convention=convention)
    interop.load(other, tmp_path / "net.safetensors", convention=convention)
    assert equal(model, other, mu.Any(mu.Param, mu.BatchStat)) and not equal(model, other)
    model.drop(jnp.ones(3))
    interop.save(tmp_path / "all.safetensors", model, ..., convention=convention)
    interop.load(other, tmp_path / "all.safetensors", ..., convention=convention)
    assert equal(model, other)


def test_names_of_torch() -> None:
    shapes = {name: array.shape for name, array in interop.export(Net(), convention="torch").items()}
    assert shapes == {
        "layers.0.bias": (4,),
        "layers.0.weight": (4, 3),
        "layers.1.bias": (4,),
        "layers.1.running_mean": (4,),
        "layers.1.running_var": (4,),
        "layers.1.weight": (4,),
        "named.conv.bias": (6,),
        "named.conv.weight": (6, 2, 2, 3),
        "table": (2, 2),
    }


RULES = {
    "enc.{i}.fc": "layers.{i}",
    "enc.{i}.norm": "layers.{i}",
    ("left.{part}", "right.{part}"): ("named.conv.{part}", Join(axis=0, sizes=(2, 4))),
    "flat": ("table", Reshape((2, 2), (4,))),
    "pooler": None,
    "*.position_ids": None,
}


def test_rules_go_both_ways() -> None:
    model, other = Net(0), Net(1)
    weights = interop.export(model, rules=RULES, convention="torch")
    assert (
        weights["left.weight"].shape == (2, 2, 2, 3) and weights["flat"].shape == (4,) and "enc.0.fc.weight" in weights
    )
    weights["enc.1.norm.weight"] = weights.pop("enc.1.fc.weight")
    interop.load(
        other,
        {**weights, "pooler.dense.weight": np.ones(3), "a.position_ids": np.ones(3)},
        rules=RULES,
        convention="torch",
    )
    assert equal(model, other, mu.Any(mu.Param, mu.BatchStat))


@pytest.mark.parametrize(
    "layout", [Transpose(), Transpose(1, 0), Reshape((-1,), (8, 3)), Split(1, (1, 2)), Split(0), Halves(2), Halves(1)]
)
def test_layouts_and_their_way_back(layout: Any) -> None:
    given = np.arange(24).reshape(8, 3)
    targets = ("a", "b") if isinstance(layout, Split) else "a"
    (rule,) = interop.rules.as_rules({"x": (targets, layout)})
    there = rule.layout.read([given])
    assert len(there) == len(rule.ours) and not all(np.array_equal(x, given) for x in there)
    (back,) = rule.layout.write(there)
    np.testing.assert_array_equal(back, given)


def test_split_projections() -> None:
    fused = np.arange(18, dtype=np.float32).reshape(6, 3)
    model = {name: nn.Linear(3, 2, rngs=mu.Rngs(0)) for name in "qkv"}
    weights = {"attn.in_proj_weight": fused, "attn.in_proj_bias": fused[:, 0]}
    rules = {
        f"attn.in_proj_{part}": (tuple(f"{name}.{part}" for name in "qkv"), Split()) for part in ("weight", "bias")
    }
    interop.load(model, weights, rules=rules, convention="torch")
    np.testing.assert_array_equal(model["k"].kernel, fused[2:4].T)
    np.testing.assert_array_equal(model["v"].bias, fused[4:, 0])
    back = interop.export(model, rules=rules, convention="torch")
    np.testing.assert_array_equal(back["attn.in_proj_weight"], fused)


# -- tied, integer, frozen, shapes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("convention", ["flax", "torch"])
def test_tied_weights(convention: str) -> None:
    model, other = Net(0), Net(1)
    weights = interop.export(model, convention=convention)
    name = "layers.0.weight" if convention == "torch" else "layers.0.kernel"
    alias = name.replace("layers.0", "tied")
    interop.load(other, {**weights, alias: weights[name]}, convention=convention)
    assert equal(model, other, mu.Param)
    other = Net(2)
    interop.load(
        other, {**{n: x for n, x in weights.items() if n != name}, alias: weights[name]}, convention=convention
    )
    assert equal(model, other, mu.Param)
    with pytest.raises(
        errors.CheckpointError, match=f"layers.0..kernel: `{name}` and `head.w` both come to it, and differ"
    ):
        interop.load(other, {**weights, "head.w": weights[name] + 1}, rules={"head.w": name}, convention=convention)


def test_integers_fit_or_are_refused() -> None:
    model = {"n": mu.Buffer(jnp.zeros(2, jnp.int32))}
    interop.load(model, {"n": np.array([3, 4], np.int64)})
    assert model["n"].value.tolist() == [3, 4] and model["n"].dtype == jnp.int32
    with pytest.raises(errors.CheckpointError, match=r"expected int32\[2\], got int64\[2\]"):
        interop.load(model, {"n": np.array([3, 2**40])})


def test_batches_that_torch_counted_are_taken_where_there_is_a_state() -> None:
    class Counting(nn.BatchNorm):
        def __init__(self, size: int) -> None:
            super().__init__(size)
            self.num_batches_tracked = mu.BatchStat(jnp.zeros((), jnp.int32))

    weights = interop.export(nn.BatchNorm(2), convention="torch")
    weights["num_batches_tracked"] = np.array(7)
    interop.load(nn.BatchNorm(2), weights, convention="torch")
    norm = Counting(2)
    interop.load(norm, weights, convention="torch")
    assert int(norm.num_batches_tracked.value) == 7


def test_frozen_deferred_and_shapes() -> None:
    source = interop.export(nn.Linear(3, 4, rngs=mu.Rngs(0)), convention="torch")
    lazy = nn.Linear(None, 4, rngs=mu.Rngs(1))
    frozen = nn.Linear(3, 4, rngs=mu.Rngs(1))
    mu.freeze(frozen)
    shapes = mu.eval_shape(lambda: nn.Linear(3, 4, rngs=mu.Rngs(1)))
    for model in (lazy, frozen, shapes):
        interop.load(model, source, convention="torch")
        np.testing.assert_array_equal(model.kernel.value, source["weight"].T)
    assert frozen.kernel.frozen
    np.testing.assert_array_equal(lazy(jnp.ones((1, 3))), frozen(jnp.ones((1, 3))))


def test_a_state_keeps_its_place_and_its_array() -> None:
    model = nn.Linear(3, 4, rngs=mu.Rngs(0))
    device = jax.devices()[-1]
    mu.update(model, jax.tree.map(lambda x: jax.device_put(x, device), mu.state(model)))
    array = np.ones((3, 4), np.float32)
    interop.load(model, {"kernel": array, "bias": np.ones(4, np.float32)})
    array[:] = 0
    assert model.kernel.value.devices() == {device} and float(model.kernel.sum()) == 12


def test_under_jit_and_in_a_transaction() -> None:
    model, weights = (
        nn.Linear(2, 2, rngs=mu.Rngs(0)),
        {"kernel": np.ones((2, 2), np.float32), "bias": np.ones(2, np.float32)},
    )
    before = mu.state(model)
    with mu.transaction(model) as tx:
        interop.load(model, weights)
        assert float(model.kernel.sum()) == 4
        tx.rollback()
    assert mu.state(model) == before
    mu.jit(lambda: interop.load(model, weights))()
    assert float(model.kernel.sum()) == 4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "int32"])
def test_other_dtypes_are_converted_on_demand(dtype: str) -> None:
    model = {"w": mu.Param(jnp.zeros(2))}
    weights = {"w": np.ones(2, jnp.dtype(dtype))}
    with pytest.raises(errors.CheckpointError, match="`cast=True` converts dtypes"):
        interop.load(model, weights)
    interop.load(model, weights, cast=True)
    assert model["w"].value.tolist() == [1, 1] and model["w"].dtype == jnp.float32


def test_a_part_by_filter() -> None:
    model = Net(0)
    weights = interop.export(Net(1))
    head = mu.PathContains("layers")
    interop.load(model, {**weights, "table": np.zeros((5, 5))}, head)
    assert equal(model, Net(1), mu.All(head, mu.Param)) and equal(model, Net(0), mu.PathContains("table"))
    with pytest.raises(errors.CheckpointError, match="missing:    seen"):
        interop.load(model, weights, mu.Cache)


# -- mismatches --------------------------------------------------------------------------------------------------------


def test_all_mismatches_in_one_message() -> None:
    model = Net(0)
    before = mu.state(model)
    weights = interop.export(model, convention="torch")
    weights["layers.0.weigth"] = weights.pop("layers.0.weight")
    weights["named.conv.weight"] = np.ones((6, 4, 2, 3), np.float32)
    weights["table"] = np.ones((2, 2), np.float16)
    weights["fused"] = np.ones((5, 2), np.float32)
    weights["left.q"] = np.ones(2, np.float32)
    rules = {
        "fused": (("a", "b"), Split()),
        ("left.{n}", "right.{n}"): ("c.{n}", Join()),
        "layer.{i}.norm": "layers.{i}",
    }
    with pytest.raises(errors.CheckpointError) as caught:
        interop.load(model, weights, rules=rules, convention="torch")
    assert str(caught.value).splitlines() == [
        "the weights do not fit the model; nothing was loaded",
        "  missing:    layers[0].kernel, as `layers.0.weight` (nearest: layers.0.weigth)",
        "  unexpected: layers.0.weigth (nearest: layers.0.weight)",
        "  fused: Split(axis=0, sizes=()) does not take the shape (5, 2): array split does not result in an equal division",
        "  incomplete: left.q comes with right.q, which are not there",
        "  named.conv.kernel: expected float32[2,3,2,6], got float32[2,3,4,6] from `named.conv.weight` float32[6,4,2,3]",
        "  table: expected float32[2,2], got float16[2,2] from `table`",
        "  no name matches the rule `layer.{i}.norm` (nearest: layers.0.bias)",
        "Say how the names differ: `rules={'encoder.layer.{i}': 'blocks.{i}', 'pooler': None}`. A filter loads a part.",
    ]
    assert mu.state(model) == before and len(caught.value.differences) == 7


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"a": 3}, "names are texts"),
        ({("a", "b"): "c"}, "need a layout"),
        ({"a": (("b", "c"), Transpose())}, "gives as many arrays as it takes"),
        ({"a": ("b", Split())}, "between one name and several"),
        ({"a": (("b", "c"), Split(0, (1, 2, 3)))}, "with a size for each"),
        ({"a.{i}": "b.{j}"}, "{j} stands on one side only"),
        ({"a.*": "b"}, "`*` stands for is left out"),
    ],
)
def test_rules_that_say_nothing(rules: Any, words: str) -> None:
    with pytest.raises(errors.ArgumentError) as caught:
        interop.load(Net(), {}, rules=rules)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [(3, "3 holds no weights"), ({"a": "text"}, "`a` is 'text', and no array"), ({"a": [{}], "b": object()}, "`b` is")],
)
def test_sources_that_are_none(source: Any, words: str) -> None:
    with pytest.raises(errors.ArgumentError, match=words):
        interop.load(Net(), source)
    with pytest.raises(errors.ArgumentError, match="no convention 'keras'"):
        interop.load(Net(), {}, convention="keras")


@pytest.mark.parametrize(
    "make",
    [
        lambda rngs: nn.Linear(3, 4, rngs=rngs),
        lambda rngs: nn.Conv(3, 4, (2, 2), rngs=rngs),
        lambda rngs: nn.LinearGeneral(3, (2, 2), rngs=rngs),
        lambda rngs: nn.ConvTranspose(3, 4, (2,), rngs=rngs),
    ],
)
def test_stacked_layers_have_no_names_in_torch(make: Any) -> None:
    stacked = mu.vmap(make)(mu.Rngs(0).split(2))
    assert interop.export(stacked)["kernel"].shape == stacked.kernel.shape
    for use in (
        lambda: interop.export(stacked, convention="torch"),
        lambda: interop.load(stacked, {}, convention="torch"),
    ):
        with pytest.raises(errors.StructureError, match="`kernel` holds those of several layers"):
            use()


def test_traced_arrays_are_no_weights() -> None:
    model = nn.Linear(2, 2, rngs=mu.Rngs(0))
    with pytest.raises(errors.ArgumentError, match=r"`kernel` is a value that a transform traces"):
        mu.jit(lambda x: interop.load(model, {"kernel": x}, "params"))(jnp.ones((2, 2)))


def test_two_states_of_one_name() -> None:
    model = {"a": {"b": mu.Param(jnp.ones(2))}, "a.b": mu.Param(jnp.zeros(2))}
    with pytest.raises(errors.StructureError, match=r"are both called `a\.b` in the convention 'flax'"):
        interop.export(model)


# -- torch -------------------------------------------------------------------------------------------------------------


class Tensor:
    """A tensor of torch, as far as `load` asks for one."""

    def __init__(self, array: Any) -> None:
        self._array, self.dtype = array, f"torch.{array.dtype}"

    def detach(self) -> Tensor:
        return self

    def cpu(self) -> Tensor:
        return self

    def view(self, dtype: Any) -> Tensor:
        return Tensor(self._array.view(dtype))

    def numpy(self) -> Any:
        if "bfloat16" in self.dtype:
            raise TypeError("not of NumPy")
        return self._array


def test_a_live_module_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "__module__", "torch")
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(int16=np.int16))
    arrays = {"weight": np.ones((4, 3), jnp.bfloat16), "bias": np.ones(4, np.float32)}
    module = types.SimpleNamespace(state_dict=lambda: {name: Tensor(array) for name, array in arrays.items()})
    model = nn.Linear(3, 4, rngs=mu.Rngs(0))
    interop.load(model, module, convention="torch", cast=True)
    assert float(model.kernel.sum()) == 12


class AsTorch(mu.Module):
    """The network of tests/data/weights/make.py."""

    def __init__(self, rngs: mu.Rngs) -> None:
        self.conv = nn.Conv(4, 6, (3, 3), feature_group_count=2, rngs=rngs)
        self.norm = nn.BatchNorm(6, momentum=1 - 0.3, rngs=rngs)
        self.up = nn.ConvTranspose(6, 5, (3, 3), strides=2, padding="VALID", rngs=rngs)
        self.embed = nn.Embed(7, 5, rngs=rngs)
        self.line = nn.LayerNorm(5, epsilon=1e-5, rngs=rngs)
        self.head = nn.Linear(5, 3, rngs=rngs)

    def __call__(self, x: jax.Array, words: jax.Array) -> jax.Array:
        x = self.up(jax.nn.relu(self.norm(self.conv(x)))).mean((1, 2))
        return self.head(self.line(x + self.embed(words)))


@pytest.mark.parametrize("file", ["net.pt", "legacy.pt"])
def test_layers_give_what_those_of_torch_give(file: str) -> None:
    model = AsTorch(mu.Rngs(0))
    interop.load(model, DATA / file, convention="torch")
    expected = dict(np.load(DATA / "net.npz"))
    x, words = jnp.asarray(expected["x"]), jnp.asarray(expected["words"].astype(np.int32))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    close(model.eval()(x, words), expected["evaluated"])
    close(model.train()(x, words), expected["trained"])
    close(model.norm.mean, expected["mean"])
    n = 2 * 6 * 6  # PyTorch moves towards the unbiased variance
    start = 0.7 * np.asarray(interop.read(DATA / file)["norm.running_var"])
    close(start + (model.norm.var.value - start) * n / (n - 1), expected["var"])
    back = interop.export(model, mu.Param, convention="torch")
    assert all(np.array_equal(array, interop.read(DATA / file)[name]) for name, array in back.items())


def test_attention_of_several_heads() -> None:
    heads, width = 3, 6
    model = nn.LinearGeneral(width, (heads, 2), rngs=mu.Rngs(0))
    out = nn.LinearGeneral((heads, 2), width, axis=(-2, -1), rngs=mu.Rngs(0))
    weight, bias = np.arange(36, dtype=np.float32).reshape(6, 6), np.arange(6, dtype=np.float32)
    for layer in (model, out):
        interop.load(layer, {"weight": weight, "bias": bias}, convention="torch")
        back = interop.export(layer, convention="torch")
        assert np.array_equal(back["weight"], weight) and np.array_equal(back["bias"], bias)
    x = jnp.ones((1, width))
    expected = np.ones((1, width)) @ weight.T + bias
    np.testing.assert_allclose(model(x).reshape(1, 6), expected)
    np.testing.assert_allclose(out(x.reshape(1, heads, 2)), expected)
    prelu = nn.PReLU()
    interop.load(prelu, {"weight": np.full(1, 0.5, np.float32)}, convention="torch")
    assert prelu.negative_slope.value == 0.5 and interop.export(prelu, convention="torch")["weight"].shape == (1,)


# -- Flax ----------------------------------------------------------------------------------------------------------------


def their_net() -> Any:
    nnx = pytest.importorskip("flax.nnx")

    class Theirs(nnx.Module):
        def __init__(self) -> None:
            rngs = nnx.Rngs(5)
            self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)])
            self.named = nnx.Dict(conv=nnx.Conv(4, 6, (2, 3), feature_group_count=2, rngs=rngs))
            self.tied = self.layers[0]
            self.drop = nnx.Dropout(0.5, rngs=rngs)
            self.seen = nnx.Cache(jnp.ones((), jnp.int32))
            self.table = nnx.Param(jnp.ones((2, 2)))
            self.layers[1].mean[...] = jnp.arange(4.0)

    return Theirs()


def assert_as_theirs(model: Net, theirs: Any, streams: bool) -> None:
    np.testing.assert_array_equal(model.layers[0].kernel, theirs.layers[0].kernel[...])
    np.testing.assert_array_equal(model.layers[1].mean, theirs.layers[1].mean[...])
    np.testing.assert_array_equal(model.named["conv"].kernel, theirs.named["conv"].kernel[...])
    assert int(model.seen) == 1
    if streams:
        for _ in range(2):
            np.testing.assert_array_equal(model.drop(jnp.ones(32)), theirs.drop(jnp.ones(32)))


@pytest.mark.parametrize("cached", [False, True])
def test_update_takes_a_state_of_nnx(cached: bool) -> None:
    nnx = pytest.importorskip("flax.nnx")
    theirs, model = their_net(), Net()
    theirs.drop(jnp.ones(3))
    mu.update(model, nnx.state(theirs))
    if cached:
        mu.update(model, nnx.to_pure_dict(nnx.state(theirs)))
    assert_as_theirs(model, theirs, streams=True)


@pytest.mark.parametrize("how", ["module", "state", "pure", "orbax state", "orbax pure"])
def test_nnx_models_and_checkpoints(how: str, tmp_path: Path) -> None:
    nnx = pytest.importorskip("flax.nnx")
    theirs = their_net()
    theirs.drop(jnp.ones(3))
    state = nnx.state(theirs)
    source: Any = {"module": theirs, "state": state}.get(how, nnx.to_pure_dict(state))
    if "orbax" in how:
        orbax = pytest.importorskip("orbax.checkpoint")
        with orbax.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "net", state if how == "orbax state" else source)
        source = tmp_path / "net"
    model = Net()
    interop.load(model, source)
    assert_as_theirs(model, theirs, streams=True)


@pytest.mark.parametrize("stored", [False, True])
def test_linen_collections_and_checkpoints(stored: bool, tmp_path: Path) -> None:
    linen = pytest.importorskip("flax.linen")

    class Theirs(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            return linen.BatchNorm(use_running_average=False)(linen.Dense(4)(x))

    x = jax.random.normal(jax.random.key(0), (5, 3))
    variables = Theirs().init(jax.random.key(1), x)
    source: Any = variables
    if stored:
        orbax = pytest.importorskip("orbax.checkpoint")
        with orbax.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "net", variables)
        source = tmp_path / "net"
    model = Net()
    rules = {"Dense_0": "layers.0", "BatchNorm_0": "layers.1"}
    interop.load(model, source, mu.PathContains("layers"), rules=rules)
    out, updates = Theirs().apply(variables, x, mutable=["batch_stats"])
    np.testing.assert_allclose(model.layers[1](model.layers[0](x)), out, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.layers[1].var, updates["batch_stats"]["BatchNorm_0"]["var"], rtol=1e-6)
    with pytest.raises(
        errors.CheckpointError, match=r"layers\[1\].mean: is a BatchStat \(batch_stats\), and `m` is in `params`"
    ):
        interop.load(model, {"params": {"m": np.zeros(4)}}, rules={"m": "layers.1.mean"})
    door = interop.FromLinen(Theirs(), variables=jax.tree.map(jnp.zeros_like, variables))
    interop.load(door.variables, source)
    np.testing.assert_array_equal(
        door.variables["params"]["Dense_0"]["kernel"], variables["params"]["Dense_0"]["kernel"]
    )


def recurrent_net() -> mu.Module:
    rngs = mu.Rngs(0)
    net = mu.Module()
    for layer, inputs in enumerate((3, 8)):
        cells = [nn.OptimizedLSTMCell(inputs, 4, rngs=rngs) for _ in range(2)]
        setattr(net, f"lstm{layer}", nn.Bidirectional(nn.RNN(cells[0]), nn.RNN(cells[1])))
    net.gru = [nn.RNN(nn.GRUCell(inputs, 4, use_recurrent_bias=True, rngs=rngs)) for inputs in (3, 4)]
    net.rnn = nn.RNN(nn.SimpleCell(3, 4, rngs=rngs))
    net.cell = nn.GRUCell(3, 4, use_recurrent_bias=True, rngs=rngs)
    return net


def recurrent_rules(net: Any) -> dict[Any, Any]:
    rules = {}
    for layer in (0, 1):
        both = getattr(net, f"lstm{layer}")
        for side, rnn in (("forward_rnn", both.forward_rnn), ("backward_rnn", both.backward_rnn)):
            path, back = f"lstm{layer}.{side}.cell", side == "backward_rnn"
            rules |= interop.recurrent("lstm", path, rnn.cell, layer=layer, reverse=back)
        rules |= interop.recurrent("gru", f"gru.{layer}.cell", nn.GRUCell, layer=layer)
    rules |= interop.recurrent("rnn", "rnn.cell", net.rnn.cell)
    return rules | interop.recurrent("cell", "cell", net.cell, layer=None)


def test_recurrent_layers_of_pytorch(tmp_path: Path) -> None:
    arrays = dict(np.load(DATA / "recurrent.npz"))
    x = arrays.pop("x")
    wanted = {name.removeprefix("out."): arrays.pop(name) for name in [*arrays] if name.startswith("out.")}
    net = recurrent_net()
    rules = recurrent_rules(net)
    interop.load(net, arrays, mu.Param, convention="torch", rules=rules)
    given = {
        "lstm": net.lstm1(net.lstm0(x)),
        "gru": net.gru[1](net.gru[0](x)),
        "rnn": net.rnn(x),
        "cell": net.cell(jnp.zeros((2, 4)), x[:, 0])[0],
    }
    for name, array in wanted.items():
        np.testing.assert_allclose(given[name], array, atol=1e-5, err_msg=name)
    interop.save(tmp_path / "net.safetensors", net, mu.Param, convention="torch", rules=rules)
    again, written = recurrent_net(), interop.read(tmp_path / "net.safetensors")
    assert written.keys() == arrays.keys()
    for name, array in arrays.items():
        assert written[name].shape == array.shape
    np.testing.assert_array_equal(written["gru.bias_hh_l1"], arrays["gru.bias_hh_l1"])
    interop.load(again, written, mu.Param, convention="torch", rules=rules)
    np.testing.assert_array_equal(again.lstm1(again.lstm0(x)), given["lstm"])


def test_a_gru_without_the_second_bias_says_so() -> None:
    arrays = {k: v for k, v in np.load(DATA / "recurrent.npz").items() if k.startswith("cell.")}
    net = mu.Module()
    net.cell = nn.GRUCell(3, 4, rngs=mu.Rngs(0))
    before = mu.state(net)
    with pytest.raises(errors.CheckpointError, match=r"cell\.dense_h\.bias"):
        interop.load(
            net, arrays, mu.Param, convention="torch", rules=interop.recurrent("cell", "cell", net.cell, layer=None)
        )
    assert mu.state(net) == before
    with pytest.raises(errors.ArgumentError, match="no rules for the weights"):
        interop.recurrent("lstm", "cell", nn.LSTMCell)


@pytest.mark.parametrize(
    ("given", "state", "fits"),
    [
        (np.array([1.5, 2.0]), jnp.zeros(2, jnp.float16), True),
        (np.array([1, 2]), jnp.zeros(2, jnp.bfloat16), True),
        (np.array([1.0, 2.0]), jnp.zeros(2, jnp.int32), True),
        (np.array([1.5, 2.0]), jnp.zeros(2, jnp.int32), False),
        (np.array([1.0, np.nan]), jnp.zeros(2, jnp.int32), False),
        (np.array([300, 2]), jnp.zeros(2, jnp.int8), False),
        (np.array([1, 0]), jnp.zeros(2, bool), True),
        (np.array([1, 2]), jnp.zeros(2, bool), False),
        (np.array([1j, 2.0], np.complex64), jnp.zeros(2), False),
        (np.array([1.0, 2.0], np.complex64), jnp.zeros(2), True),
        (np.array([1.0, 2.0]), jnp.zeros(2, jnp.complex64), True),
    ],
)
def test_what_a_cast_may_change(given: Any, state: Any, fits: bool) -> None:
    model = {"w": mu.Variable(state)}
    if fits:
        interop.load(model, {"w": given}, cast=True)
        assert model["w"].dtype == state.dtype
        np.testing.assert_array_equal(np.asarray(model["w"].value, complex), given)
        return
    with pytest.raises(errors.CheckpointError, match="w: `cast=True` would change the numbers"):
        interop.load(model, {"w": given}, cast=True)
    np.testing.assert_array_equal(model["w"], state)


def test_layouts_that_do_not_fit() -> None:
    class Twice(interop.Layout):
        def read(self, arrays: Any) -> Any:
            return [*arrays, *arrays]

        def write(self, arrays: Any) -> Any:
            return arrays

    model = {"a": mu.Param(jnp.zeros(2)), "b": mu.Param(jnp.zeros(2))}
    weights = {"ab": np.arange(4, dtype=np.float32)}
    for layout, text in ((Split(axis=1), "does not take the shape"), (Twice(), "`Twice` gives 2 arrays for 1 names")):
        rules: Any = {"ab": (("a", "b"), layout)} if isinstance(layout, Split) else {"ab": ("a", layout)}
        with pytest.raises(errors.CheckpointError, match=text):
            interop.load(model, weights, rules=rules)


@pytest.mark.parametrize("convention", ["flax", "torch"])
def test_states_that_are_tied(convention: str) -> None:
    """The file has the array under both names."""
    a, b = nn.Embed(5, 3, rngs=mu.Rngs(0)), nn.Embed(5, 3, rngs=mu.Rngs(1))
    b.embedding = a.embedding
    name = "weight" if convention == "torch" else "embedding"
    array = np.arange(15, dtype=np.float32).reshape(5, 3)
    interop.load({"a": a, "b": b}, {f"a.{name}": array, f"b.{name}": array}, convention=convention)
    np.testing.assert_array_equal(b.embedding, array)
    with pytest.raises(errors.CheckpointError, match="both come to it, and differ"):
        interop.load({"a": a, "b": b}, {f"a.{name}": array, f"b.{name}": array + 1}, convention=convention)
