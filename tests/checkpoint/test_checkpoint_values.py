"""What goes into a checkpoint comes out of it, bit for bit: every dtype, kind, structure and placement."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import checkpoint
from mutatis.errors import FrozenStateError

pytestmark = pytest.mark.once  # many alike; what JAX's versions differ in, the twins and traces of transforms show

DTYPES = [
    "bool",
    "int2",
    "int4",
    "int8",
    "int16",
    "int32",
    "uint2",
    "uint4",
    "uint8",
    "uint16",
    "uint32",
    "float16",
    "bfloat16",
    "float32",
    "complex64",
    "float4_e2m1fn",
    "float8_e3m4",
    "float8_e4m3",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e4m3b11fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
]

KINDS = [
    mu.Variable,
    mu.Param,
    mu.BatchStat,
    mu.Cache,
    mu.Hidden,
    mu.Intermediate,
    mu.Perturbation,
    mu.Buffer,
    mu.OptState,
    mu.MetricState,
]


def bits(value: Any) -> list[Any]:
    """A value's structure, and of each leaf dtype, shape and bytes."""

    def of(leaf: Any) -> Any:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return str(jax.random.key_impl(leaf)), *of(jax.random.key_data(leaf))
        return str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()

    return [jax.tree.structure(value), *map(of, jax.tree.leaves(value))]


def scrambled(value: Any) -> Any:
    """Another value of the same type."""

    def other(leaf: Any) -> Any:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = jax.random.key_data(leaf)
            return jax.random.wrap_key_data(data ^ np.uint32(1), impl=jax.random.key_impl(leaf))
        return jnp.zeros_like(leaf)

    return jax.tree.map(other, value)


def check_round_trip(path: Path, value: Any, kind: type[mu.Variable] = mu.Variable) -> None:
    saved = kind(value)
    other = kind(scrambled(saved.value))
    checkpoint.save(path, saved)
    checkpoint.restore(path, other)
    assert bits(other.value) == bits(saved.value)


class Net(mu.Module):
    """A small model with several kinds of state."""

    def __init__(self, seed: int = 0) -> None:
        self.blocks = [Block(seed), Block(seed + 1)]
        self.rngs = mu.Rngs(seed, dropout=seed + 10)
        self.table = jnp.arange(4) + seed  # a Buffer behind the attribute
        self.steps = mu.Variable(seed)


class Block(mu.Module):
    def __init__(self, seed: int) -> None:
        self.w = mu.Param(jax.random.normal(jax.random.key(seed), (3, 2)))
        self.mean = mu.BatchStat(jnp.full(2, seed + 0.5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (3, 5)], ids=str)
def test_dtypes(dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    raw = np.random.default_rng(0).integers(0, 256, (*shape, jnp.dtype(dtype).itemsize), dtype=np.uint8)
    if dtype == "bool" or jnp.dtype(dtype).kind == "V" or "int" in dtype or "float4" in dtype:
        value = (raw[..., 0] % 2).astype(dtype)  # not every byte is one of these
    else:
        value = raw.view(dtype)[..., 0]  # NaNs with payloads, infinities, subnormal numbers
    check_round_trip(tmp_path / "c", jnp.asarray(value))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_kinds(kind: type[mu.Variable], tmp_path: Path) -> None:
    check_round_trip(tmp_path / "c", jnp.arange(3.0), kind)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
@pytest.mark.parametrize("shape", [(), (3,), (0, 2)], ids=str)
def test_random_keys(impl: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    keys = jax.random.split(jax.random.key(7, impl=impl), shape) if shape else jax.random.key(7, impl=impl)
    check_round_trip(tmp_path / "c", keys)
    check_round_trip(tmp_path / "c", {"old": jax.random.PRNGKey(3), "new": keys})


@pytest.mark.parametrize(
    "value",
    [
        {"key": 1, "value": (2.0, [True, None])},
        [(), {}, [jnp.ones(2), {"a/b.c": jnp.zeros((1, 0))}]],
        {3: jnp.ones(2), 1: 2},
        (),
    ],
    ids=str,
)
def test_structures(value: Any, tmp_path: Path) -> None:
    check_round_trip(tmp_path / "c", value)


def test_a_model_continues_as_if_never_stopped(tmp_path: Path) -> None:
    def step(net: Net) -> Any:
        noise = jax.random.normal(net.rngs.dropout(), (3, 2))
        for block in net.blocks:
            block.w += noise
            block.mean.value = 0.9 * block.mean.value + 0.1 * block.w.value.mean(0)
        net.steps += 1
        return noise

    net, other = Net(0), Net(5)
    step_net, step_other = mu.jit(step), mu.jit(step)
    for _ in range(3):
        step_net(net)
    checkpoint.save(tmp_path / "c", net)
    checkpoint.restore(tmp_path / "c", other)
    for _ in range(3):
        assert bits(step_net(net)) == bits(step_other(other))
    assert mu.state(net) == mu.state(other)


@pytest.mark.parametrize("wrap", [lambda n: n, lambda n: (n, mu.Cache(1)), lambda n: {"net": n}, lambda n: [[n]]])
def test_nodes(wrap: Any, tmp_path: Path) -> None:
    saved, other = wrap(Net(0)), wrap(Net(1))
    checkpoint.save(tmp_path / "c", saved)
    checkpoint.restore(tmp_path / "c", other)
    assert mu.state(saved) == mu.state(other)


def test_a_node_without_states(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", {})
    checkpoint.restore(tmp_path / "c", {})


@pytest.mark.parametrize("path", ["c", Path("c"), "new/folders/c"], ids=str)
def test_paths(path: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    w = mu.Param(1.0)
    checkpoint.save(path, w)
    w.value = 2.0
    checkpoint.restore(tmp_path / path, w)
    assert w == 1.0


# -- sharing and names --------------------------------------------------------------------------------------------


def test_tied_weights_are_saved_once(tmp_path: Path) -> None:
    shared, other = mu.Param(jnp.ones(2)), mu.Param(jnp.zeros(2))
    checkpoint.save(tmp_path / "c", {"embed": shared, "head": {"w": shared}})
    assert (tmp_path / "c" / "mutatis.json").read_text().count('"path": ') == 1
    model = {"embed": other, "head": {"w": other}}
    checkpoint.restore(tmp_path / "c", model)
    assert model["head"]["w"] is other
    np.testing.assert_array_equal(other.value, np.ones(2))


def test_a_named_state_may_move(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", {"encoder": mu.Param(1.0, name="w"), "b": mu.Param(2.0)})
    model = {"net": {"decoder": mu.Param(0.0, name="w")}, "b": mu.Param(0.0)}
    checkpoint.restore(tmp_path / "c", model)
    assert model["net"]["decoder"] == 1.0 and model["b"] == 2.0


def test_a_name_is_not_a_path(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", {"a": mu.Param(1.0, name="b"), "b": mu.Param(2.0)})
    model = {"a": mu.Param(0.0, name="b"), "b": mu.Param(0.0)}
    checkpoint.restore(tmp_path / "c", model)
    assert model["a"] == 1.0 and model["b"] == 2.0


# -- filters ------------------------------------------------------------------------------------------------------


def test_filters_of_save(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", Net(0), mu.Param, "rngs")
    net = Net(1)
    checkpoint.restore(tmp_path / "c", net, mu.Param, "rngs")
    assert mu.state(net, [mu.Param, "rngs"]) == mu.state(Net(0), [mu.Param, "rngs"])
    assert mu.state(net, mu.BatchStat) == mu.state(Net(1), mu.BatchStat)


def test_filters_of_restore(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", Net(0))
    net = Net(1)
    checkpoint.restore(tmp_path / "c", net, mu.Param)
    assert mu.state(net, mu.Param) == mu.state(Net(0), mu.Param)
    assert mu.state(net, mu.Not(mu.Param)) == mu.state(Net(1), mu.Not(mu.Param))


def test_what_the_filters_leave_out_need_not_be_in_the_model(tmp_path: Path) -> None:
    class Moment(mu.OptState):
        pass

    checkpoint.save(tmp_path / "c", {"w": mu.Param(1.0), "m": Moment(2.0)})
    model = {"w": mu.Param(0.0)}
    checkpoint.restore(tmp_path / "c", model, mu.Param)
    checkpoint.restore(tmp_path / "c", model, mu.Not(Moment))
    checkpoint.restore(tmp_path / "c", model, mu.PathContains("w"))
    assert model["w"] == 1.0


# -- what the model's states are ----------------------------------------------------------------------------------


def test_frozen_states_are_restored_and_stay_frozen(tmp_path: Path) -> None:
    net = Net(0)
    checkpoint.save(tmp_path / "c", net)
    other = Net(1)
    mu.freeze(other, mu.Param)
    checkpoint.restore(tmp_path / "c", other)
    assert mu.state(other) == mu.state(net)
    with pytest.raises(FrozenStateError):
        other.blocks[0].w += 1.0


@pytest.mark.parametrize(
    "value", [jnp.ones(2), {"key": jax.random.key(1), "count": [1, (2.0, None)]}], ids=["one", "tree"]
)
def test_deferred_states_are_created(value: Any, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", {"v": mu.Cache(value)})
    cell = mu.Cache(init=lambda: pytest.fail("the initial value is not wanted"))
    checkpoint.restore(tmp_path / "c", {"v": cell})
    assert bits(cell.value) == bits(mu.Cache(value).value)


@pytest.mark.parametrize("abstract", [mu.eval_shape, jax.eval_shape], ids=["mu", "jax"])
def test_a_model_of_shapes_gets_arrays(abstract: Any, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", Net(0))
    net = abstract(lambda: Net(1))
    checkpoint.restore(tmp_path / "c", net)
    assert mu.state(net) == mu.state(Net(0))


def test_a_compiled_step_goes_on_after_restore(traces: Any, tmp_path: Path) -> None:
    def add(net: Net) -> None:
        net.steps += 1

    counted = traces.count(add)
    step = mu.jit(counted)
    net = Net(0)
    step(net)
    checkpoint.save(tmp_path / "c", net)
    step(net)
    checkpoint.restore(tmp_path / "c", net)
    step(net)
    step(net)
    assert net.steps == 3 and traces[counted] == 1


def test_cast(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", {"w": mu.Param(jnp.array([1, 2]))})
    model = {"w": mu.Param(jnp.zeros(2, jnp.bfloat16))}
    checkpoint.restore(tmp_path / "c", model, cast=True)
    np.testing.assert_array_equal(model["w"].value, jnp.array([1, 2], jnp.bfloat16))
    assert model["w"].dtype == jnp.bfloat16


def mesh_sharding(*spec: Any) -> Any:
    return jax.sharding.NamedSharding(jax.make_mesh((4,), ("x",)), jax.sharding.PartitionSpec(*spec))


@pytest.mark.parametrize("place", [lambda: mesh_sharding("x"), mesh_sharding, lambda: jax.devices()[2]])
@pytest.mark.parametrize(
    "value", [jnp.arange(8.0), jnp.zeros((8, 0)), jax.random.split(jax.random.key(0), 8), jnp.ones(8, "uint4")], ids=str
)
def test_values_go_where_the_model_lives(place: Any, value: Any, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", mu.Param(value))
    placed = jax.device_put(scrambled(value), place())
    model = mu.Param(placed)
    checkpoint.restore(tmp_path / "c", model)
    assert bits(model.value) == bits(value)
    assert model.value.sharding == placed.sharding and model.value.committed
    checkpoint.save(tmp_path / "d", model)
    here = mu.Param(scrambled(value))
    checkpoint.restore(tmp_path / "d", here)
    assert bits(here.value) == bits(value)
    assert here.value.sharding == value.sharding and not here.value.committed


def test_shapes_of_a_mesh_go_to_the_mesh_of_now(tmp_path: Path) -> None:
    sharding = mesh_sharding("x")
    w = mu.Param(jax.device_put(jnp.arange(8.0), sharding))
    checkpoint.save(tmp_path / "c", w)
    shape = jax.eval_shape(lambda x: 2 * x, w.value)  # JAX keeps the axes of the mesh, not its devices
    for mesh, expected in [(sharding.mesh, sharding), (None, jnp.ones(1).sharding)]:
        model = mu.Param(shape)
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            checkpoint.restore(tmp_path / "c", model)
        assert model.value.sharding == expected
        np.testing.assert_array_equal(model.value, np.arange(8.0))
