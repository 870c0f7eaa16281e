"""The graph of a model: paths, live cells, and the static description."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import errors
from mutatis.core.naming import show_path

Pair = namedtuple("Pair", "a b")


class Layer(mu.Module):
    def __init__(self, value: float = 1.0) -> None:
        self.w = mu.Param(value)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ((), ""),
        (("w",), "w"),
        (("blocks", 0, "norm", "mean"), "blocks[0].norm.mean"),
        ((0, "w"), "[0].w"),
        (("d", "a b"), "d['a b']"),
        (("d", ("x", 1)), "d[('x', 1)]"),
        (("d", "class"), "d['class']"),
        (("a", 0, 1), "a[0][1]"),
    ],
)
def test_paths_read_like_python(path: Any, text: str) -> None:
    assert show_path(path) == text


def node_of(kind: str) -> tuple[Any, list[Any]]:
    """A node and the paths of its states."""
    a, b = Layer(), mu.Cache(2.0)
    return {
        "module": (a, [("w",)]),
        "variable": (b, [()]),
        "list": ([a, b], [(0, "w"), (1,)]),
        "tuple": ((a, b), [(0, "w"), (1,)]),
        "namedtuple": (Pair(a, b), [(0, "w"), (1,)]),
        "dict": ({"x": a, "y": b}, [("x", "w"), ("y",)]),
        "keys that are tuples": ({(1, 2): a, (3,): b}, [((1, 2), "w"), ((3,),)]),
        "nested": ([{"x": (a,)}, [b]], [(0, "x", 0, "w"), (1, 0)]),
        "tied": ([b, {"again": b}, a, a], [(0,), (2, "w")]),
        "transformed": (mu.remat(a), [("w",)]),
        "empty": ([], []),
    }[kind]


NODES = [
    "module",
    "variable",
    "list",
    "tuple",
    "namedtuple",
    "dict",
    "keys that are tuples",
    "nested",
    "tied",
    "transformed",
    "empty",
]


@pytest.mark.parametrize("kind", NODES)
def test_every_operation_takes_every_node(kind: str) -> None:
    node, paths = node_of(kind)
    cells = mu.variables(node)
    assert [*cells] == paths
    assert set(mu.state(node)) == set(paths)
    definition, state = mu.split(node)
    copied = mu.merge(definition, state)
    assert type(copied) is type(node)
    assert mu.state(copied) == state
    assert not set(mu.variables(copied).values()) & set(cells.values())
    assert definition == mu.graphdef(node) == mu.graphdef(copied)
    mu.update(node, state.map(lambda _, value: value + 1))
    assert [float(c) for c in cells.values()] == [float(state[p]) + 1 for p in paths]
    if paths:
        assert float(mu.jit(lambda n: sum(mu.state(n).flat().values()))(node)) == sum(map(float, cells.values()))
    snapshot = mu.snapshot(node)
    for cell in cells.values():
        cell.value = 0.0
    snapshot.restore()
    assert [float(c) for c in cells.values()] == [float(state[p]) + 1 for p in paths]


@pytest.mark.parametrize("bad", [3, "text", None, jnp.zeros(2), object(), lambda: None, {1, 2}])
def test_what_is_no_node_is_refused(bad: Any) -> None:
    for use in (mu.state, mu.split, mu.variables, mu.graphdef, mu.clone, mu.snapshot, mu.freeze, mu.reset):
        with pytest.raises(errors.ArgumentError, match="is not a node") as caught:
            use(bad)
        assert "class Net(mu.Module)" in str(caught.value)


def test_variables_gives_the_live_cells() -> None:
    layer = Layer()
    assert mu.variables(layer)["w",] is layer.w
    assert mu.variables(layer, mu.Cache) == {}


# -- GraphDef ----------------------------------------------------------------------------------------------------


class Model(mu.Module):
    def __init__(self, width: int = 3, act: Any = jax.nn.relu, kind: Any = mu.Param, tie: bool = False) -> None:
        self.layers = [Layer(), {"a": Layer()}]
        self.width = width
        self.act = act
        self.x = kind(1.0)
        self.y = self.x if tie else kind(1.0)


def test_equal_structure_has_equal_definitions() -> None:
    a, b = Model(), Model()
    b.x.value = 5.0
    b.layers[0].w.value = jnp.zeros(7)
    assert mu.graphdef(a) == mu.graphdef(b)
    assert hash(mu.graphdef(a)) == hash(mu.graphdef(b))
    assert len({mu.graphdef(a), mu.graphdef(b)}) == 1
    assert repr(mu.graphdef(a)) == "GraphDef(Model, 4 states)"


def with_extra() -> Any:
    model = Model()
    model.layers.append(Layer())
    return model


def with_a_dict() -> Any:
    model = Model()
    model.layers = {"0": model.layers[0], "1": model.layers[1]}
    return model


def frozen() -> Any:
    model = Model()
    mu.freeze(model.x)
    return model


def shared_layer() -> Any:
    model = Model()
    model.layers[1]["a"] = model.layers[0]
    return model


@pytest.mark.parametrize(
    "other",
    [
        lambda: Model(width=4),
        lambda: Model(act=jax.nn.gelu),
        lambda: Model(kind=mu.Cache),
        lambda: Model(tie=True),
        lambda: Model().eval(),
        with_extra,
        with_a_dict,
        frozen,
        shared_layer,
    ],
)
def test_other_structure_has_another_definition(other: Any) -> None:
    assert mu.graphdef(Model()) != mu.graphdef(other())
    assert mu.graphdef(other()) == mu.graphdef(other())


def test_metadata_and_names_are_structure() -> None:
    every = [
        mu.Param(1.0),
        mu.Param(1.0, name="w"),
        mu.Param(1.0, tag="t"),
        mu.Param(1.0, sharding=("x",)),
        mu.Param(1.0, fixed=True),
        mu.Param(1.0, init=2.0),
        mu.Cache(1.0),
    ]
    assert len({mu.graphdef(v) for v in every}) == len(every)


def test_a_definition_holds_no_arrays() -> None:
    definition = mu.graphdef(Model())
    assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(definition.spec))
    assert definition != 3
    assert jax.jit(lambda x, d: x + d.spec[1]().width, static_argnums=1)(1, mu.graphdef(Model())) == 4


@pytest.mark.parametrize("keys", ["az", "za"])
def test_the_order_of_a_dict_is_kept(keys: str) -> None:
    model = mu.Module()
    model.layers = {key: mu.Param(float(ord(key))) for key in keys}
    model.statics = {key: ord(key) for key in keys}
    for copied in (mu.clone(model), mu.merge(*mu.split(model)), jax.tree.map(lambda x: x, model)):
        assert [*copied.layers] == list(keys)
        assert [*copied.statics] == list(keys)


def test_definitions_differ_in_the_order_of_a_dict() -> None:
    a, b = mu.Module(), mu.Module()
    a.layers = {"a": mu.Param(1.0), "z": mu.Param(1.0)}
    b.layers = {"z": mu.Param(1.0), "a": mu.Param(1.0)}
    assert mu.graphdef(a) != mu.graphdef(b)


# -- sharing and cycles ------------------------------------------------------------------------------------------


def cyclic() -> Any:
    model = Model()
    model.me = model
    model.layers.append(model.layers)
    model.layers[1]["back"] = model
    model.layers[0].parent = model
    return model


def test_cycles() -> None:
    model = cyclic()
    assert len(mu.state(model)) == 4
    other = mu.clone(model)
    assert other.me is other
    assert other.layers[2] is other.layers
    assert other.layers[1]["back"] is other
    assert other.layers[0].parent is other
    assert mu.graphdef(other) == mu.graphdef(model)
    assert float(mu.jit(lambda m: m.me.layers[0].parent.x.value)(other)) == 1


def test_one_list_at_two_places_stays_one() -> None:
    model = mu.Module()
    model.a = [mu.Param(1.0)]
    model.b = model.a
    other = mu.clone(model)
    assert other.a is other.b

    @mu.jit
    def grow(model: Any) -> None:
        model.a.append(mu.Cache(2.0))

    grow(other)
    assert len(other.b) == 2
    assert other.a is other.b


def test_a_cell_in_two_nodes_of_a_tuple_stays_one() -> None:
    layer = Layer()
    other = Layer()
    other.w = layer.w
    first, second = mu.clone((layer, other))
    assert first.w is second.w
    assert first.w is not layer.w
    assert len(mu.state((layer, other))) == 1


def test_the_optimizer_refers_to_a_model_that_is_copied_along() -> None:
    import optax

    model = Layer()
    optimizer = mu.Optimizer(model, optax.sgd(0.1))
    assert all("_model" not in path for path in mu.state(optimizer))
    other_model, other = mu.clone((model, optimizer))
    other.update(mu.state(other_model, mu.Param))
    assert float(other_model.w) == pytest.approx(0.9)
    assert float(model.w) == 1
    alone = mu.clone(optimizer)
    with pytest.raises(errors.StructureError, match="was not copied with it"):
        alone.update(mu.state(model, mu.Param))
    assert float(model.w) == 1


def test_many_modules_and_deep_nesting() -> None:
    model = mu.Module()
    inner = model
    for _ in range(60):
        inner.next = mu.Module()
        inner = inner.next
    inner.w = mu.Param(2.0)
    assert len(mu.state(mu.clone(model))) == 1
    assert float(mu.jit(lambda m: sum(mu.state(m).flat().values()))(model)) == 2


def test_subclasses_of_dict_and_list_are_not_plain_containers() -> None:
    model = mu.Module()
    try:
        model.parts = OrderedDict(a=mu.Param(1.0))
    except errors.MutatisError:
        return
    assert [*mu.state(model)] == [("parts", "a")], "accepted, so its states must be seen"
    other = mu.clone(model)
    assert type(other.parts) is OrderedDict
    np.testing.assert_array_equal(other.parts["a"], 1.0)


# -- a model that was walked over is not walked over again: whatever changes must be seen all the same ----------------


class Two(Layer):
    pass


def returning(value: Any) -> Callable[[], Any]:
    return lambda: value


class Rich(mu.Module):
    """One of each that a walk goes through."""

    def __init__(self) -> None:
        self.layer = Layer()
        self.items = [mu.Param(2.0), Layer(3.0), [mu.Cache(4)]]
        self.entries = {"a": mu.Param(5.0), "b": [1, 2]}
        self.fixed = (mu.Param(6.0), (Layer(7.0), {"deep": mu.Param(8.0)}))
        self.pair = Pair(mu.Param(9.0), 1)
        self.inner = mu.remat(Layer(10.0))
        self.bound = self.layer.train
        self.act = returning(1)
        self.table = functools.partial(returning, np.zeros(2))
        self.array = jnp.ones(2)
        self.number = 1


def moved_last(model: Rich) -> None:
    model.__dict__["layer"] = model.__dict__.pop("layer")


def closure(model: Rich) -> None:
    model.act.__closure__[0].cell_contents = 2


def in_the_tuple(model: Rich) -> None:
    model.fixed[1][1]["deep"] = mu.Param(0.0)


CHANGES: dict[str, Callable[[Rich], Any]] = {
    "attribute": lambda m: setattr(m.layer, "w2", mu.Param(0.0)),
    "another cell": lambda m: setattr(m.layer, "w", mu.Cache(1.0)),
    "removed": lambda m: delattr(m, "array"),
    "flag": lambda m: m.eval(),
    "past the module": lambda m: m.__dict__.update(new=mu.Param(0.0)),
    "order": moved_last,
    "class of a module": lambda m: setattr(m.layer, "__class__", Two),
    "appended": lambda m: m.items.append(mu.Param(0.0)),
    "turned round": lambda m: m.items.reverse(),
    "in a list in a list": lambda m: m.items[2].append(5),
    "same length": lambda m: m.items.__setitem__(2, (mu.Cache(4),)),
    "entry": lambda m: m.entries.update(a=mu.Param(1.0)),
    "key": lambda m: m.entries.update(c=m.entries.pop("a")),
    "in the tuple": in_the_tuple,
    "kind of tuple": lambda m: setattr(m, "pair", tuple(m.pair)),
    "transformed": lambda m: setattr(m, "inner", mu.remat(m.inner.__wrapped__, prevent_cse=False)),
    "inside transformed": lambda m: setattr(m.inner.__wrapped__, "w2", mu.Param(0.0)),
    "bound to another": lambda m: setattr(m, "bound", m.items[1].train),
    "tied": lambda m: setattr(m, "tie", m.items[0]),
    "closure": closure,
    "array in a static": lambda m: m.table.args[0].fill(1),
    "static of another type": lambda m: setattr(m, "number", True),
    "metadata": lambda m: m.layer.w.metadata.update(tag="x"),
    "name": lambda m: setattr(m.layer.w, "name", "x"),
    "sharding": lambda m: setattr(m.layer.w, "sharding", ("x",)),
    "fixed": lambda m: setattr(m.layer.w, "fixed", True),
    "frozen": lambda m: mu.freeze(m.layer),
    "kind": lambda m: setattr(m.layer.w, "__class__", mu.Cache),
    "shape": lambda m: m.layer.w.set(jnp.ones(3)),
}


@pytest.mark.parametrize("first", [mu.state, mu.split], ids=["state", "split"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_is_seen(change: Callable[[Rich], Any], first: Callable[[Any], Any]) -> None:
    model = Rich()
    for _ in range(2):
        first(model)
    before = mu.split(model)
    change(model)
    definition, state = mu.split(model)
    assert (definition, state) != before or definition.types != before[0].types
    assert mu.split(copy.deepcopy(model)) == (definition, state)  # which was not looked at before
    assert mu.state(model) == state
    live = mu.variables(model)
    assert {path: type(cell) for path, cell in live.items()} == state.kinds()
    assert all(cell is other for cell, other in zip(live.values(), mu.variables([model]).values(), strict=True))
    assert mu.graphdef(mu.merge(definition, state)) == definition


def test_what_is_put_back_is_as_it_was() -> None:
    model = Rich()
    before = mu.split(model)
    saved = mu.snapshot(model)
    model.number, model.new = 2, mu.Param(0.0)
    model.items.pop()
    assert mu.graphdef(model) != before[0]
    saved.restore()
    assert mu.split(model) == before


def test_a_module_without_states_is_described_after_its_values_were_taken() -> None:
    model = mu.Module()
    model.number = 3
    assert not mu.state(model)
    assert mu.clone(model).number == 3


def test_a_function_that_is_traced_leaves_nothing_in_the_model() -> None:
    model = Layer()

    @mu.jit
    def step(model: Layer, x: jax.Array) -> jax.Array:
        copy = mu.clone(model)
        copy.act = returning(x)  # as a static value, a tracer
        return mu.split(copy)[1]["w"] + mu.state(model)["w"] + x

    with jax.checking_leaks():
        assert float(step(model, jnp.float32(2.0))) == 4.0
        assert float(step(model, jnp.float32(3.0))) == 5.0
