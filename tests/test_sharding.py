"""State on devices: what states say is applied where they are made, kept by every write, and costs what pinned JAX costs."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import mutatis as mu
from mutatis import nn
from mutatis.errors import ArgumentError, FilterError, ShardingError


@pytest.fixture(autouse=True)
def _promote() -> Any:
    with jax.numpy_dtype_promotion("standard"):  # as optax takes it for granted
        yield


BOTH = [AxisType.Auto, AxisType.Explicit]


def mesh_of(kind: AxisType = AxisType.Auto, shape: tuple[int, ...] = (2, 2)) -> Any:
    return jax.make_mesh(shape, ("data", "model")[: len(shape)], axis_types=(kind,) * len(shape))


def spec(value: Any) -> tuple[Any, ...]:
    """The axes of the mesh by which an array is split, without those at its end that are whole."""
    value = value.value if isinstance(value, mu.Variable) else value
    parts = [*value.sharding.spec]
    while parts and parts[-1] is None:
        parts.pop()
    return tuple(parts)


def layer(key: int = 0, size: int = 8) -> nn.Linear:
    return nn.Linear(
        size,
        size,
        kernel_metadata={"sharding": ("data", "model")},
        bias_metadata={"sharding": P("model")},
        rngs=mu.Rngs(key),
    )


# -- where states are made ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("how", ["eagerly", "jit", "deferred", "init"])
def test_a_state_is_made_where_it_says(kind: AxisType, how: str) -> None:
    def make() -> Any:
        if how == "init":
            net = mu.Module()
            net.kernel = mu.Param(init=lambda: jnp.ones((8, 8)), sharding=("data", "model"))
            net.bias = mu.Param(init=lambda: jnp.ones(8), sharding="model")
            return net
        if how == "deferred":
            return nn.Linear(
                None,
                8,
                kernel_metadata={"sharding": ("data", "model")},
                bias_metadata={"sharding": ("model",)},
                rngs=mu.Rngs(0),
            )
        return layer()

    with jax.set_mesh(mesh_of(kind)):
        net = mu.jit(make)() if how == "jit" else make()
        if how == "deferred":
            net(jnp.ones((2, 8)))
        assert spec(net.kernel) == ("data", "model") and spec(net.bias) == ("model",)
    plain = layer()
    assert len(plain.kernel.value.sharding.device_set) == 1, "without a mesh it is only said"
    if how in ("eagerly", "jit"):
        np.testing.assert_allclose(net.kernel.value, plain.kernel.value, rtol=1e-6)


def test_what_is_made_in_jit_is_never_whole() -> None:
    with jax.set_mesh(mesh_of(shape=(4,))):
        make = mu.jit(lambda: mu.Param(jax.random.normal(jax.random.key(0), (64, 64)), sharding=("data", None)))
        program = make.lower().compile()
        assert program.memory_analysis().output_size_in_bytes <= 64 * 64 * 4 // 4 + 64
        assert not re.findall(r"f32\[64,64\]", program.as_text()), "each device makes its part"


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_stacked_state_is_not_split_along_the_new_axis(kind: AxisType, compiled: bool) -> None:
    def make(keys: Any) -> Any:
        return mu.vmap(lambda key: layer(key))(keys)

    with jax.set_mesh(mesh_of(kind)):
        stacked = (mu.jit(make) if compiled else make)(jax.random.split(jax.random.key(0), 3))
        assert spec(stacked.kernel) == (None, "data", "model") and spec(stacked.bias) == (None, "model")
        assert mu.sharding.of(mu.eval_shape(make, jax.random.split(jax.random.key(0), 3)))["kernel"].spec[0] is None
        optimizer = mu.Optimizer(stacked, optax.adam(1e-3))
        assert spec(optimizer.state["0.mu.kernel"]) == (None, "data", "model")
        stack = nn.Stack(lambda rngs: layer(rngs.params()), 4, rngs=mu.Rngs(0))
        assert spec(stack.layer.kernel) == (None, "data", "model")


def test_names_and_rules() -> None:
    make = mu.jit(lambda: mu.Param(jnp.ones((8, 8)), sharding=("embed", "mlp")))
    with jax.set_mesh(mesh_of()):
        for rules, wanted in [
            ({"embed": "data", "mlp": None}, ("data",)),
            ({"embed": None, "mlp": "model"}, (None, "model")),
            ({"embed": ("data", "model"), "mlp": None}, (("data", "model"),)),
            ({"embed": ["model"], "mlp": "data"}, ("model", "data")),
            ({"embed": "data", "mlp": None}, ("data",)),
        ]:
            with mu.sharding.rules(rules):
                assert spec(make()) == wanted
                assert spec(mu.Param(jnp.ones((8, 8)), sharding=P("embed", "mlp"))) == wanted
        assert len(mu.inspect.explain(make).compilations) == 4, "one for each set of rules"
        with mu.sharding.rules(embed="data"), mu.sharding.rules(mlp="model"):
            assert spec(mu.Param(jnp.ones((8, 8)), sharding=("embed", "mlp"))) == ("data", "model")


def test_a_value_of_several_arrays() -> None:
    with jax.set_mesh(mesh_of()):
        state = mu.Variable({"a": jnp.ones((4, 2)), "n": 0}, sharding=P("data"))
    assert spec(state.value["a"]) == ("data",) and spec(state.value["n"]) == ()


def test_shapes() -> None:
    with jax.set_mesh(mesh_of()):
        shapes = mu.eval_shape(layer)
        where = mu.sharding.of(shapes)
        assert where["kernel"].spec == P("data", "model")
        made = mu.sharding.place(mu.eval_shape(lambda: nn.Linear(8, 8, rngs=mu.Rngs(0))), {"kernel": P("data")})
        assert made.kernel.value.sharding.spec == P("data")
    assert mu.sharding.of(mu.eval_shape(layer))["kernel"] is None


@pytest.mark.parametrize("kind", BOTH)
def test_a_copy_is_where_its_original_is(kind: AxisType) -> None:
    with jax.set_mesh(mesh_of(kind)):
        net = layer()
        mu.sharding.place(net, {"bias": P("data")})
        again = pickle.loads(pickle.dumps(net))
        assert spec(again.kernel) == ("data", "model") and spec(again.bias) == ("model",), "it is made anew"
        for twin in (mu.clone(net), copy.deepcopy(net), mu.merge(*mu.split(net))):
            assert spec(twin.kernel) == ("data", "model") and spec(twin.bias) == ("data",)
        for _ in range(2):
            mu.jit(lambda net: mu.for_loop(lambda x: net.kernel.set(net.kernel + x), jnp.ones(3)))(net)
            assert spec(net.kernel) == ("data", "model")


def test_inside_shard_map_each_device_has_its_part() -> None:
    mesh = mesh_of()
    x = jnp.arange(8.0)
    out = mu.shard_map(
        lambda x: mu.Param(x, sharding=P("data")).value * 2, mesh=mesh, in_specs=P("data"), out_specs=P("data")
    )(x)
    np.testing.assert_array_equal(out, x * 2)


def test_a_checkpoint_is_restored_to_where_shapes_say(tmp_path: Any) -> None:
    net = layer()
    mu.checkpoint.save(tmp_path / "net", net)
    with jax.set_mesh(mesh_of()):
        shapes = mu.eval_shape(layer)
        mu.checkpoint.restore(tmp_path / "net", shapes)
        assert spec(shapes.kernel) == ("data", "model")
        np.testing.assert_array_equal(shapes.kernel.value, net.kernel.value)


# -- writes ------------------------------------------------------------------------------------------------------------


def write_plain(net: Any, new: Any) -> None:
    net.kernel.value = new


def write_numpy(net: Any, new: Any) -> None:
    net.kernel.value = np.asarray(new)


def write_committed(net: Any, new: Any) -> None:
    net.kernel.value = jax.device_put(new, jax.devices()[1])


def write_elsewhere(net: Any, new: Any) -> None:
    net.kernel.value = jax.device_put(new, NamedSharding(net.kernel.value.sharding.mesh, P(None, "data")))


def write_update(net: Any, new: Any) -> None:
    mu.update(net, {"kernel": new})


def write_item(net: Any, new: Any) -> None:
    net.kernel[...] = new


def write_transaction(net: Any, new: Any) -> None:
    with mu.transaction():
        net.kernel.value = new


def write_jit(net: Any, new: Any) -> None:
    mu.jit(lambda net: net.kernel.set(new * 1))(net)


def write_jit_in_transaction(net: Any, new: Any) -> None:
    with mu.transaction():
        mu.jit(lambda net: net.kernel.set(new * 1))(net)


def write_scan(net: Any, new: Any) -> None:
    mu.for_loop(lambda x: net.kernel.set(new + x), jnp.zeros(2))


def write_grad(net: Any, new: Any) -> None:
    mu.grad(lambda x: (net.kernel.set(new), x)[1])(1.0)


def write_restore(net: Any, new: Any) -> None:
    before = mu.snapshot(net)
    net.kernel.value = new * 0
    before.restore()
    net.kernel.value = new


WRITES = [
    write_plain,
    write_numpy,
    write_committed,
    write_elsewhere,
    write_update,
    write_item,
    write_transaction,
    write_jit,
    write_jit_in_transaction,
    write_scan,
    write_grad,
    write_restore,
]


@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__.removeprefix("write_"))
def test_a_write_keeps_a_state_where_it_is(write: Any) -> None:
    mesh = mesh_of()
    net = mu.sharding.place(nn.Linear(8, 8, rngs=mu.Rngs(0)), {"kernel": P("data", "model")}, mesh=mesh)
    new = jnp.arange(64.0).reshape(8, 8)
    write(net, new)
    assert net.kernel.value.sharding.is_equivalent_to(NamedSharding(mesh, P("data", "model")), 2)
    np.testing.assert_array_equal(net.kernel.value, new)


def test_a_reset_keeps_it() -> None:
    with jax.set_mesh(mesh_of()):
        net = mu.Module()
        net.h = mu.Hidden(init=lambda: jnp.zeros((8, 2)), sharding=P("data"))
        net.h.value = net.h.value + 1
        mu.reset(net)
        assert spec(net.h) == ("data",) and not net.h.value.any()


def test_another_shape_that_cannot_be_split_so_goes_to_all_devices() -> None:
    net = mu.sharding.place(nn.Linear(8, 8, rngs=mu.Rngs(0)), {"kernel": P("data")}, mesh=mesh_of())
    net.kernel.value = jnp.ones((7, 3))
    assert spec(net.kernel) == () and len(net.kernel.value.sharding.device_set) == 4


def test_a_state_that_is_whole_everywhere_may_be_split_by_hand() -> None:
    mesh = mesh_of()
    with jax.set_mesh(mesh):  # under which new arrays are on all devices
        net = nn.Linear(8, 8, rngs=mu.Rngs(0))
        where = {"kernel": NamedSharding(mesh, P("data")), "bias": NamedSharding(mesh, P())}
        mu.update(net, {name: jax.device_put(mu.state(net)[name], place) for name, place in where.items()})
        assert spec(net.kernel) == ("data",)
        mu.jit(lambda net: net.kernel.set(net.kernel + 1))(net)
        net.kernel.value = jnp.zeros((8, 8))
        assert spec(net.kernel) == ("data",)


def test_other_devices_are_meant() -> None:
    net = mu.sharding.place(nn.Linear(8, 8, rngs=mu.Rngs(0)), {"kernel": P("data")}, mesh=mesh_of())
    two = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    net.kernel.value = jax.device_put(net.kernel.value, NamedSharding(two, P("x")))
    assert spec(net.kernel) == ("x",)
    cell = mu.Variable(jax.device_put(jnp.ones(3), jax.devices()[2]))
    cell.value = jnp.zeros(3)
    assert cell.value.devices() == {jax.devices()[2]}
    cell.value = jax.device_put(jnp.zeros(3), jax.devices()[1])
    assert cell.value.devices() == {jax.devices()[1]}


# -- training: the same as on one device, and the program of pinned JAX --------------------------------------------------


class Net(mu.Module):
    def __init__(self, rngs: mu.Rngs, **names: Any) -> None:
        self.one = nn.Linear(8, 16, use_bias=False, kernel_metadata={"sharding": names.get("one")}, rngs=rngs)
        self.norm = nn.BatchNorm(16, rngs=rngs)
        self.dropout = nn.Dropout(0.2, rngs=rngs)
        self.two = nn.Linear(16, 8, kernel_metadata={"sharding": names.get("two")}, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.two(self.dropout(jnp.tanh(self.norm(self.one(x)))))


def loss_of(net: Net, x: jax.Array) -> jax.Array:
    return jnp.mean((net(x) - x) ** 2)


def train(net: Net, optimizer: mu.Optimizer, x: jax.Array) -> jax.Array:
    value, grads = mu.value_and_grad(loss_of)(net, x)
    optimizer.update(grads)
    return value


LAYOUTS = {
    "data": ({}, P("data")),
    "fully sharded": ({"one": (None, "data"), "two": ("data", None)}, P("data")),
    "tensor": ({"one": (None, "model"), "two": ("model", None)}, P()),
    "mixed": ({"one": ("data", "model"), "two": ("model", "data")}, P("data")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [AxisType.Auto])
def test_training_is_that_of_one_device(layout: str, kind: AxisType, traces: Any) -> None:
    names, batch = LAYOUTS[layout]
    x = jnp.sin(jnp.arange(64.0)).reshape(8, 8)
    alone = Net(mu.Rngs(0))
    alone_optimizer = mu.Optimizer(alone, optax.adam(1e-2))
    step_alone = mu.jit(train)
    wanted = [float(step_alone(alone, alone_optimizer, x)) for _ in range(4)]
    with jax.set_mesh(mesh_of(kind)):
        net, optimizer = mu.jit(
            lambda: (lambda net: (net, mu.Optimizer(net, optax.adam(1e-2))))(Net(mu.Rngs(0), **names))
        )()
        before = mu.sharding.of([net, optimizer])
        placed = jax.device_put(x, NamedSharding(jax.sharding.get_mesh(), batch))
        step = mu.jit(train)
        found = [float(step(net, optimizer, placed)) for _ in range(4)]
        after = mu.sharding.of([net, optimizer])
    np.testing.assert_allclose(found, wanted, rtol=2e-5)
    assert len(mu.inspect.explain(step).compilations) == 1
    for path, where in before.items():
        leaves = zip(jax.tree.leaves(where), jax.tree.leaves(after[path]), strict=True)
        if "kernel" in str(path):
            assert all(a.is_equivalent_to(b, 2) for a, b in leaves)
        else:
            assert all(len(b.device_set) == 4 for _, b in leaves)
    for name, cell in mu.variables(net, mu.Param).items():
        np.testing.assert_allclose(cell.value, mu.variables(alone)[name].value, rtol=1e-4, atol=1e-5)


def collectives(text: str) -> dict[str, int]:
    kinds = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
    return {kind: len(re.findall(rf"= [^=\n]*\b{kind}(?:-start)?\(", text)) for kind in kinds}


@pytest.mark.parametrize("layout", ["data", "fully sharded", "tensor"])
def test_the_program_talks_as_little_as_by_hand(layout: str) -> None:
    names, batch = LAYOUTS[layout]
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        one = nn.Linear(8, 16, kernel_metadata={"sharding": names.get("one")}, rngs=mu.Rngs(0))
        two = nn.Linear(16, 8, kernel_metadata={"sharding": names.get("two")}, rngs=mu.Rngs(1))
    mu.sharding.place([one, two], {mu.OfType(mu.Param) & (lambda p, c: c.sharding is None): P()}, mesh=mesh)
    x = jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh, batch))

    @mu.jit
    def step(one: Any, two: Any, x: Any) -> None:
        grads = mu.grad(lambda one, two: jnp.mean(two(jnp.tanh(one(x))) ** 2), (0, 1))(one, two)
        for net, grad in zip((one, two), grads, strict=True):
            mu.update(net, jax.tree.map(lambda p, g: p - 0.1 * g, mu.state(net), grad))

    def loss(params: Any, x: Any) -> Any:
        (a, b), (c, d) = params
        hidden = jnp.tanh(x @ a + jnp.reshape(b, (1, -1)))
        return jnp.mean((hidden @ c + jnp.reshape(d, (1, -1))) ** 2)

    params = [(net.kernel.value, net.bias.value) for net in (one, two)]
    placed = jax.tree.map(lambda leaf: leaf.sharding, params)
    by_hand = jax.jit(
        lambda params, x: jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params, x)),
        donate_argnums=0,
        out_shardings=placed,
    )
    ours = collectives(step.lower(one, two, x).compile().as_text())
    hand = collectives(by_hand.lower(params, x).compile().as_text())
    assert sum(ours.values()) <= sum(hand.values()), (ours, hand)


def test_what_says_nothing_goes_to_all_devices_once(traces: Any) -> None:
    mesh = mesh_of()
    net = mu.sharding.place(nn.Linear(8, 8, rngs=mu.Rngs(0)), {"kernel": P("data")}, mesh=mesh)
    count, rngs = mu.Variable(0), mu.Rngs(0)

    def step(net: Any, count: Any, rngs: Any) -> Any:
        count.value += 1
        net.kernel.value = net.kernel + jax.random.normal(rngs(), (8, 8))
        return net.bias.value

    jitted = mu.jit(traces.count(step))
    for _ in range(4):
        jitted(net, count, rngs)
    assert traces.total == 1
    assert int(count) == 4 and len(count.value.sharding.device_set) == 4
    assert len(net.bias.value.sharding.device_set) == 4


# -- placing -------------------------------------------------------------------------------------------------------------


def test_placing_by_path_kind_and_state() -> None:
    mesh = mesh_of()
    net = mu.Module()
    net.layers = [nn.Linear(8, 8, rngs=mu.Rngs(n)) for n in range(3)]
    net.norm = nn.BatchNorm(8, rngs=mu.Rngs(0))
    values = jax.tree.map(np.asarray, mu.state(net))
    mu.sharding.place(
        net, {"layers[0].kernel": P("data"), "layers[*].kernel": P(None, "model"), mu.Param: P()}, mesh=mesh
    )
    assert spec(net.layers[0].kernel) == ("data",) and spec(net.layers[2].kernel) == (None, "model")
    assert spec(net.layers[1].bias) == () and len(net.norm.mean.value.sharding.device_set) == 1
    where = mu.sharding.of(net)
    mu.sharding.place(net, P(), mesh=mesh)
    assert spec(net.layers[0].kernel) == ()
    mu.sharding.place(net, where.filter(mu.Param))
    assert spec(net.layers[0].kernel) == ("data",)
    mu.sharding.place(net, mu.StateSharding({mu.Param: P("model"), ...: P()}), mesh=mesh)
    assert spec(net.layers[0].kernel) == ("model",) == spec(net.norm.scale) and spec(net.norm.mean) == ()
    for path, value in values.items():
        np.testing.assert_array_equal(mu.state(net)[path], value)
    frozen = nn.Linear(8, 8, rngs=mu.Rngs(0))
    with mu.freeze(frozen):
        mu.sharding.place(frozen, P("data"), mesh=mesh)
        assert spec(frozen.kernel) == ("data",)


def test_a_model_that_was_made_before_the_mesh() -> None:
    net = layer()
    optimizer = mu.Optimizer(net, optax.adam(1e-3))
    with jax.set_mesh(mesh_of()):
        mu.sharding.place([net, optimizer])
    assert spec(net.kernel) == spec(optimizer.state["0.mu.kernel"]) == ("data", "model")


def test_bad_input_moves_nothing() -> None:
    mesh = mesh_of()
    net = layer()
    small = nn.Linear(3, 8, rngs=mu.Rngs(0))
    for use, error, text in [
        (lambda: mu.sharding.place(net, {"kernle": P()}, mesh=mesh), FilterError, r"(?s)kernle.*nearest: kernel"),
        (lambda: mu.sharding.place(net, {mu.Cache: P()}, mesh=mesh), FilterError, "selects no state"),
        (lambda: mu.sharding.place(net, P("data")), ShardingError, "no mesh"),
        (lambda: mu.sharding.place(net), ShardingError, "no mesh"),
        (lambda: mu.sharding.place(net, P("data", "model"), mesh=mesh), ShardingError, "fewer axes"),
        (lambda: mu.sharding.place(net, P("rows"), mesh=mesh), ShardingError, r"(?s)`rows`.*data: 2, model: 2"),
        (lambda: mu.sharding.place(net, {"kernel": P("data", "data")}, mesh=mesh), ShardingError, "twice"),
        (lambda: mu.sharding.place([net, small], P("data"), mesh=mesh), ShardingError, r"(?s)2 equal parts.*\(3, 8\)"),
        (lambda: mu.sharding.place(net, 3, mesh=mesh), ArgumentError, "cannot be placed by 3"),
        (
            lambda: mu.sharding.place(
                net, mu.sharding.of(small.train())["kernel"] and mu.State.from_flat({("w",): P()}), mesh=mesh
            ),
            FilterError,
            "no state `w`",
        ),
        (lambda: mu.jit(lambda net: mu.sharding.place(net, P(), mesh=mesh))(net), ShardingError, "inside a transform"),
        (lambda: mu.sharding.rules(embed=3).__enter__(), ArgumentError, "`?'?embed"),
    ]:
        with pytest.raises(error, match=text):
            use()
    assert all(len(where.device_set) == 1 for where in mu.sharding.of(net).values())
    with jax.set_mesh(mesh):
        for sharding, text in [
            ("rows", "no axis of the mesh"),
            (P("data", None, "model"), "fewer axes"),
            (P(("data", "model")), "4 equal parts"),
        ]:
            with pytest.raises(ShardingError, match=text):
                mu.Param(jnp.ones((6, 2)), sharding=sharding)
            with pytest.raises(ShardingError, match=text):
                mu.jit(lambda sharding=sharding: mu.Param(jnp.ones((6, 2)), sharding=sharding))()


def test_a_table_and_a_picture(capsys: pytest.CaptureFixture[str]) -> None:
    net = mu.sharding.place(nn.Linear(8, 8, rngs=mu.Rngs(0)), {"kernel": P("data")}, mesh=mesh_of())
    table = mu.inspect.placements(net)
    assert [(row.path, row.placement, row.bytes, row.per_device) for row in table.rows] == [
        ("bias", "cpu:0", 32, 32),
        ("kernel", "P('data',) of data: 2, model: 2", 256, 128),
    ]
    assert "not said" in str(mu.inspect.placements(mu.eval_shape(layer)))
    table.picture("kernel")
    assert "CPU" in capsys.readouterr().out
    with pytest.raises(FilterError, match="cannot be drawn"):
        table.picture("weight")


def test_dropout_on_explicit_axes() -> None:
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((4, 8)), NamedSharding(mesh, P("data", "model")))
        y = mu.jit(lambda d, x: d(x))(nn.Dropout(0.5, rngs=mu.Rngs(0)), x)
    assert spec(y) == ("data", "model")
    np.testing.assert_array_equal(y, nn.Dropout(0.5, rngs=mu.Rngs(0))(jnp.ones((4, 8))))


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize(
    "transform",
    [mu.grad, jax.grad, lambda f: mu.jit(mu.grad(f)), mu.remat, jax.jit, mu.hessian, lambda f: mu.jit(mu.remat(f))],
)
def test_made_inside_of_a_derivative(kind: AxisType, transform: Any) -> None:
    def f(x: jax.Array) -> jax.Array:
        w = mu.Param(x * 2, sharding=P("data"))
        return jnp.sum(w.value**2)

    x = jnp.arange(8.0)
    wanted = transform(f)(x)
    with jax.set_mesh(mesh_of(kind)):
        np.testing.assert_allclose(transform(f)(x), wanted, rtol=1e-6)
        several = jnp.stack([x, x + 1, x])
        np.testing.assert_allclose(mu.vmap(transform(f))(several)[2], wanted, rtol=1e-6)
