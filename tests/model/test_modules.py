"""Modules: attributes of every sort, modes, copies, and a module as one pytree node."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import errors
from tests.nets import Norm


class Net(mu.Module):
    def __init__(self) -> None:
        self.w = mu.Param(jnp.arange(2.0))
        self.blocks = [Norm(), {"a": Norm(), "b": (mu.Cache(0), "static")}]
        self.table = jnp.arange(3)
        self.size = 3
        self.x_tied = self.w

    def __call__(self, x: Any) -> Any:
        return x * self.w


# -- attributes --------------------------------------------------------------------------------------------------


def test_no_init_of_the_base_is_needed() -> None:
    assert len(mu.state(Net())) == 7
    assert repr(mu.Module()) == "Module()"


def test_attributes_can_be_made_anywhere() -> None:
    module = mu.Module()
    module.a = mu.Param(1.0)
    module.b = [module.a]
    assert [*mu.state(module)] == [("a",)]
    del module.a
    assert [*mu.state(module)] == [("b", 0)]
    with pytest.raises(AttributeError, match="no attribute 'a'"):
        del module.a
    with pytest.raises(AttributeError):
        module.a


@pytest.mark.parametrize("array", [jnp.arange(3.0), np.arange(3.0, dtype=np.float32)])
def test_an_array_becomes_a_buffer_behind_the_attribute(array: Any) -> None:
    module = mu.Module()
    module.table = array
    assert isinstance(module.table, jax.Array)
    np.testing.assert_array_equal(module.table, array)
    assert [*mu.state(module, mu.Buffer)] == [("table",)]
    cell = mu.variables(module)["table",]
    module.table = module.table + 1
    assert mu.variables(module)["table",] is cell
    np.testing.assert_array_equal(cell, array + 1)
    module.table += 1
    np.testing.assert_array_equal(module.table, array + 2)
    assert module.table.sum() == 9


def test_a_numpy_attribute_is_copied_in() -> None:
    array = np.zeros(2, np.float32)
    module = mu.Module()
    module.table = array
    array[0] = 5
    assert float(module.table[0]) == 0


def test_a_key_becomes_a_buffer() -> None:
    module = mu.Module()
    module.key = jax.random.key(3)
    assert jnp.issubdtype(module.key.dtype, jax.dtypes.prng_key)
    assert mu.jit(lambda m: jax.random.normal(m.key))(module) == jax.random.normal(jax.random.key(3))


def test_buffers_are_threaded() -> None:
    module = Net()

    @mu.jit
    def step(module: Net) -> None:
        module.table = module.table + 1
        module.table = module.table.at[0].set(9)

    step(module)
    step(module)
    np.testing.assert_array_equal(module.table, [9, 3, 4])


def test_an_array_attribute_does_not_leak_to_other_instances() -> None:
    a, b = mu.Module(), mu.Module()
    a.thing = jnp.zeros(2)
    b.thing = 5
    assert b.thing == 5
    with pytest.raises(AttributeError, match="thing"):
        mu.Module().thing
    assert not hasattr(mu.Module(), "thing")


@pytest.mark.parametrize(
    "make",
    [
        lambda: [jnp.zeros(2)],
        lambda: (np.zeros(2),),
        lambda: {"a": jnp.zeros(2)},
        lambda: [1, {"a": (jnp.zeros(2),)}],
        lambda: [mu.Param(1.0), jax.random.key(0)],
    ],
)
def test_a_container_of_bare_arrays_is_refused(make: Callable[[], Any]) -> None:
    module = mu.Module()
    with pytest.raises(errors.StructureError, match=r"`Module\.things` is a \w+ of bare arrays") as caught:
        module.things = make()
    assert not hasattr(module, "things")
    assert "[mu.Param(x) for x in arrays]" in str(caught.value)
    arrays = [jnp.zeros(2), jnp.ones(3)]
    scope = {"self": module, "mu": mu, "arrays": arrays}
    exec("self.things = [mu.Param(x) for x in arrays]", scope)  # both cures
    assert len(mu.state(module)) == 2
    exec("self.things = mu.Variable(arrays)", scope)
    assert len(mu.state(module)) == 1


def test_an_array_appended_to_a_container_is_refused_when_it_is_seen() -> None:
    module = mu.Module()
    module.things = [mu.Param(1.0)]
    module.things.append(jnp.zeros(2))
    for use in (mu.state, mu.jit(lambda m: None)):
        with pytest.raises(errors.StructureError, match="bare array"):
            use(module)


@pytest.mark.parametrize(
    "transform",
    [lambda f: f, mu.jit, mu.grad, lambda f: lambda x: mu.vmap(f)(x[None])],
    ids=["eager", "jit", "grad", "vmap"],
)
def test_a_tracer_put_into_a_container_is_refused(transform: Any) -> None:
    if jax.config.jax_check_tracer_leaks:
        pytest.skip("it leaks tracers on purpose, and JAX's own check may come first")
    module = mu.Module()
    module.things, module.by_name = [mu.Param(1.0)], {}

    def keep(x: Any) -> Any:
        module.things.append(x * 2)
        module.by_name["x"] = x
        return jnp.sum(x)

    try:
        transform(keep)(jnp.float32(1))
    except errors.StructureError as error:
        assert "bare arrays" in str(error)  # noqa: PT017
        assert module.things == [module.things[0]]
        assert module.by_name == {}
    else:
        assert not any(isinstance(thing, jax.core.Tracer) for thing in [*module.things, *module.by_name.values()])


@pytest.mark.parametrize("value", [jnp.ones(2), np.ones(2, np.float32)])
def test_an_array_assigned_over_a_state_writes_it(value: Any) -> None:
    net = Net()
    cell = net.w
    net.w = value
    assert net.w is cell
    assert net.x_tied is cell
    np.testing.assert_array_equal(net.x_tied, [1, 1])


def test_numbers_assigned_over_a_state_write_it() -> None:
    module = mu.Module()
    module.n = mu.Variable(0)
    cell = module.n
    module.n += 1
    assert (module.n is cell, int(cell)) == (True, 1)
    module.n = 5
    assert (module.n is cell, int(cell)) == (True, 5)


@pytest.mark.parametrize("new", [None, mu.Param(3.0), mu.Module(), "text"], ids=lambda v: type(v).__name__)
def test_anything_else_assigned_over_a_state_replaces_it(new: Any) -> None:
    net = Net()
    net.w = new
    assert net.w is new
    assert net.x_tied is not new
    np.testing.assert_array_equal(net.x_tied, [0, 1])


def test_pytrees_assigned_over_a_state_write_it() -> None:
    module = mu.Module()
    module.v = mu.Variable({"a": 1})
    cell = module.v
    module.v = {"a": 2}
    assert module.v is cell
    assert int(cell.value["a"]) == 2


def test_a_frozen_state_is_not_written_by_assignment() -> None:
    net = Net()
    mu.freeze(net)
    with pytest.raises(errors.FrozenStateError, match=r"Net\.w` \(Param\)"):
        net.w = jnp.ones(2)
    with pytest.raises(errors.FrozenStateError, match="table"):
        net.table = jnp.ones(3)


def test_properties_and_class_attributes_are_plain_python() -> None:
    class Scaled(mu.Module):
        limit = 3

        def __init__(self) -> None:
            self.s = mu.Variable(2.0)

        @property
        def scale(self) -> Any:
            return self.s.value

        @scale.setter
        def scale(self, value: Any) -> None:
            self.s.value = value

        @property
        def fixed(self) -> int:
            return 1

    module = Scaled()
    module.scale = 5.0
    assert float(module.scale) == 5
    assert "scale" not in vars(module)
    assert module.limit == 3
    with pytest.raises(AttributeError):
        module.fixed = 3


def test_dataclass_modules() -> None:
    @dataclasses.dataclass
    class Layer(mu.Module):
        w: Any
        size: int = 4
        parts: list[Any] = dataclasses.field(default_factory=list)
        table: Any = None

    layer = Layer(mu.Param(1.0), table=jnp.arange(2))
    assert layer.size == 4
    assert layer.parts == []
    assert layer != Layer(layer.w)
    assert hash(layer) == hash(layer)
    assert set(mu.state(layer)) == {("w",), ("table",)}
    np.testing.assert_array_equal(layer.table, [0, 1])
    assert Layer(mu.Param(1.0)).table is None
    assert "Layer(" in repr(layer)
    other = mu.clone(layer)
    assert type(other) is Layer
    assert float(mu.jit(lambda m: m.w * m.size)(other)) == 4


def test_modules_with_slots_and_super_init() -> None:
    class Base(mu.Module):
        def __init__(self, n: int) -> None:
            super().__init__()
            self.n = mu.Variable(n)

    class Derived(Base):
        def __init__(self) -> None:
            super().__init__(3)
            self.m = mu.Variable(1)

    assert [*mu.state(Derived())] == [("m",), ("n",)]


# -- counting numbers under jit ----------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 1.5])
def test_a_plain_number_may_not_count_in_a_compiled_transform(start: Any) -> None:
    module = mu.Module()
    module.steps = start

    @mu.jit
    def step(module: Any) -> None:
        module.steps += 1

    with pytest.raises(errors.StaticAttributeError, match=r"`Module\.steps` is a plain number") as caught:
        step(module)
    assert module.steps == start
    assert "jit(" in str(caught.value).splitlines()[0]
    assert f"expected: {start}" in str(caught.value)
    assert f"got:      {start + 1}" in str(caught.value)
    exec(f"self.steps = mu.Variable({start!r})", {"self": module, "mu": mu})  # the cure
    step(module)
    step(module)
    assert float(module.steps) == start + 2


def test_other_static_changes_are_committed_and_replayed() -> None:
    module = mu.Module()
    module.flag, module.seen, module.n = False, [], mu.Variable(0)

    @mu.jit
    def step(module: Any) -> None:
        module.flag = not module.flag
        module.name = "on" if module.flag else "off"
        module.n += 1

    for expected in (True, False, True, False):
        step(module)
        assert module.flag is expected
        assert module.name == ("on" if expected else "off")
    assert int(module.n) == 4


def test_the_same_number_may_be_assigned_in_a_compiled_transform() -> None:
    module = mu.Module()
    module.size = 3
    mu.jit(lambda m: setattr(m, "size", 3))(module)
    mu.jit(lambda m: setattr(m, "other", 4))(module)
    assert (module.size, module.other) == (3, 4)


# -- modes -------------------------------------------------------------------------------------------------------


def test_modes_reach_every_module_once() -> None:
    net = Net()
    net.blocks[1]["a"].loop = net  # a cycle
    net.wrapped = mu.remat(Norm())
    parts = [net, net.blocks[0], net.blocks[1]["a"], net.wrapped.__wrapped__]
    assert net.eval() is net
    assert [p.training for p in parts] == [False] * 4
    assert net.train() is net
    assert [p.training for p in parts] == [True] * 4
    net.blocks[0].training = False
    assert [p.training for p in parts] == [True, False, True, True]


def test_modes_are_checked() -> None:
    net = Net()
    with pytest.raises(errors.StructureError, match=r"`Net\.training` cannot be 'test'"):
        net.training = "test"
    assert net.training is True


def test_the_mode_is_part_of_the_structure() -> None:
    net = Net()
    before = mu.graphdef(net)
    assert mu.graphdef(net.eval()) != before
    assert mu.graphdef(net.train()) == before
    assert mu.clone(net.eval()).training is False


# -- repr --------------------------------------------------------------------------------------------------------


def test_repr_is_a_readable_tree() -> None:
    class Small(mu.Module):
        def __init__(self) -> None:
            self.w = mu.Param(jnp.zeros((2, 3)))
            self.parts = [mu.Cache(1), self.w]
            self.name = "x"
            self.norm = Norm()
            self.act = jax.nn.relu

    assert repr(Small()) == (
        "Small(  # 8 parameters, 44 B in 4 states\n"
        "  w=Param(float32[2,3]),\n"
        "  parts=[Cache(int32[]), <same as w>],\n"
        "  name='x',\n"
        "  norm=Norm(\n"
        "    scale=Param(float32[2]),\n"
        "    mean=BatchStat(float32[2]),\n"
        "  ),\n"
        "  act=relu,\n"
        ")"
    )


def test_repr_ends_with_cycles_and_inside_transforms() -> None:
    net = Net()
    net.me = net
    net.list = [net.w]
    net.list.append(net.list)
    assert "me=<same as the whole Net>" in repr(net) and "<same as list>" in repr(net)
    shown: list[str] = []
    mu.jit(lambda m: shown.append(repr(m)))(Net())
    assert "w=Param(float32[2])" in shown[0]


# -- identity, copies --------------------------------------------------------------------------------------------


def test_modules_compare_and_hash_by_identity() -> None:
    a, b = Net(), Net()
    assert a == a
    assert a != b
    assert len({a, b, a}) == 2


def test_modules_are_collected() -> None:
    net = Net()
    step = mu.jit(lambda m, x: m(x))
    step(net, 1.0)
    references = [weakref.ref(net), weakref.ref(net.w), weakref.ref(net.blocks[0])]
    del net
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


def by_pickle(net: Any) -> Any:
    return pickle.loads(pickle.dumps(net))


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, mu.clone], ids=["deepcopy", "pickle", "clone"])
def test_copies(copied: Callable[[Any], Any]) -> None:
    net = Net().eval()
    net.me = net
    net.blocks.append(net.blocks)
    net.name = mu.static([1])
    other = copied(net)
    assert type(other) is Net
    assert mu.state(other) == mu.state(net)
    assert other.me is other
    assert other.blocks[-1] is other.blocks
    assert other.x_tied is other.w
    assert other.w is not net.w
    assert (other.size, other.training, other.name) == (3, False, [1])
    other.w.value = jnp.full(2, 7.0)
    other.table = other.table + 1
    other.blocks[0].extra = 1
    np.testing.assert_array_equal(net.w, [0, 1])
    np.testing.assert_array_equal(net.table, [0, 1, 2])
    assert not hasattr(net.blocks[0], "extra")
    np.testing.assert_array_equal(mu.jit(lambda m, x: m(x))(other, 2.0), [14, 14])


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, mu.clone], ids=["deepcopy", "pickle", "clone"])
@pytest.mark.parametrize("function", [jax.nn.relu, jax.nn.gelu, jnp.tanh, jnp.matmul], ids=lambda f: f.__name__)
def test_functions_of_jax_survive_copies(function: Any, copied: Callable[[Any], Any]) -> None:
    module = mu.Module()
    module.act = function
    module.layers = [function, {"a": (function, mu.Param(1.0))}]
    other = copied(module)
    assert other.act is function
    assert other.layers[0] is function
    assert other.layers[1]["a"][0] is function
    assert mu.graphdef(other) == mu.graphdef(module)


def test_a_shallow_copy_shares_the_states() -> None:
    net = Net()
    other = copy.copy(net)
    assert other.w is net.w
    other.extra = 1
    assert not hasattr(net, "extra")


def test_copies_keep_the_order_of_attributes_in_repr() -> None:
    assert repr(copy.deepcopy(Net())) == repr(Net())
    assert repr(mu.clone(Net())) == repr(Net())


# -- a module is one pytree node ---------------------------------------------------------------------------------


def test_a_module_is_one_node_with_its_unique_values() -> None:
    net = Net()
    leaves, treedef = jax.tree.flatten(net)
    assert len(leaves) == 7
    assert leaves[-1] is net.w.value or any(leaf is net.w.value for leaf in leaves)
    assert treedef == jax.tree.structure(Net())
    assert treedef != jax.tree.structure(Net().eval())
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(net)[0]]
    assert ".w" in paths
    assert ".blocks[0].mean" in paths


def test_a_detached_copy_reads_but_does_not_write() -> None:
    net = Net()
    doubled = jax.tree.map(lambda x: 2 * x, net)
    assert type(doubled) is Net
    assert doubled.x_tied is doubled.w
    np.testing.assert_array_equal(doubled(1.0), [0, 2])
    with pytest.raises(errors.FrozenStateError, match=r"`Net\.\w+` \(Param\) was written in a detached copy") as caught:
        doubled.w.value = jnp.zeros(2)
    for name in ("mu.jit", "mu.functionalize", "mu.thaw"):
        assert name in str(caught.value)
    exec("mu.thaw(copy)", {"mu": mu, "copy": doubled})  # the cure
    doubled.w.value = jnp.zeros(2)
    np.testing.assert_array_equal(doubled.x_tied, [0, 0])
    np.testing.assert_array_equal(net.w, [0, 1])


def test_raw_transforms_over_a_module_as_argument() -> None:
    net = Net()
    np.testing.assert_array_equal(jax.jit(lambda m, x: m(x))(net, 3.0), [0, 3])
    grads = jax.grad(lambda m: jnp.sum(m(2.0)), allow_int=True)(net)
    assert isinstance(grads, Net)
    np.testing.assert_array_equal(grads.w, [2, 2])
    assert jax.eval_shape(lambda m: m(1.0), net).shape == (2,)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), net)
    np.testing.assert_array_equal(jax.vmap(lambda m: m(1.0))(stacked), [[0, 1], [0, 1]])
    with pytest.raises(errors.FrozenStateError, match="detached"):
        jax.jit(lambda m: m.w.set(jnp.zeros(2)))(net)


def test_raw_jit_of_a_module_sees_new_values() -> None:
    net = Net()
    run = jax.jit(lambda m, x: m(x))
    np.testing.assert_array_equal(run(net, 1.0), [0, 1])
    net.w.value = jnp.full(2, 5.0)
    np.testing.assert_array_equal(run(net, 1.0), [5, 5])


def test_a_module_made_in_a_raw_transform_may_write_there() -> None:
    @jax.jit
    def run(x: Any) -> Any:
        module = mu.Module()
        module.n = mu.Variable(x)
        module.n += 1
        module.n.value = module.n * 2
        module.table = jnp.zeros(2)
        module.table = module.table + 1
        return module.n.value, module.table

    n, table = run(3.0)
    assert float(n) == 8
    np.testing.assert_array_equal(table, [1, 1])


@pytest.mark.jax_leaks
def test_a_module_returned_from_raw_jit_is_a_detached_one() -> None:
    net = jax.jit(Net)()
    np.testing.assert_array_equal(net.w, [0, 1])
    assert net.x_tied is net.w
    mu.thaw(net)
    net.w.value = jnp.ones(2)
    np.testing.assert_array_equal(mu.jit(lambda m, x: m(x))(net, 2.0), [2, 2])


def test_a_module_among_other_things_in_a_pytree() -> None:
    net = Net()
    tree = {"net": net, "x": 1.0}
    assert len(jax.tree.leaves(tree)) == 8
    mapped = jax.tree.map(lambda x: x, tree)
    np.testing.assert_array_equal(mapped["net"].w, net.w)


# -- nodes that are transformed ----------------------------------------------------------------------------------


@pytest.mark.parametrize("around", [mu.remat, mu.jit])
def test_a_transformed_module_is_a_node_that_paths_skip(around: Any) -> None:
    class Block(mu.Module):
        def __init__(self) -> None:
            self.w = mu.Param(2.0)
            self.n = mu.Variable(0)

        def __call__(self, x: Any) -> Any:
            self.n += 1
            return x * self.w

    class Outer(mu.Module):
        def __init__(self) -> None:
            self.inner = around(Block())
            self.more = [around(Block())]

        def __call__(self, x: Any) -> Any:
            return self.more[0](self.inner(x))

    outer = Outer()
    assert [*mu.state(outer)] == [("inner", "n"), ("inner", "w"), ("more", 0, "n"), ("more", 0, "w")]
    assert float(outer(1.0)) == 4
    assert float(mu.jit(outer)(1.0)) == 4
    assert int(outer.inner.__wrapped__.n) == 2
    for copied in (mu.clone, copy.deepcopy):
        other = copied(outer)
        assert float(other(1.0)) == 4
        assert int(other.inner.__wrapped__.n) == 3
        assert int(outer.inner.__wrapped__.n) == 2
    grads = mu.grad(lambda m: m(1.0))(outer)
    assert float(grads["inner", "w"]) == 2


def test_methods_may_be_transformed() -> None:
    class Agent(mu.Module):
        def __init__(self) -> None:
            self.n = mu.Variable(0)

        @mu.jit
        def step(self, x: Any) -> Any:
            self.n += 1
            return self.n.value * x.astype(jnp.int32)

        @mu.jit(static_argnums=(1,))
        def named(self, name: str) -> Any:
            self.n += len(name)

    agent, other = Agent(), Agent()
    assert [int(agent.step(jnp.float32(2))) for _ in range(2)] == [2, 4]
    assert int(other.step(jnp.float32(1))) == 1
    agent.named("abc")
    assert int(agent.n) == 5
