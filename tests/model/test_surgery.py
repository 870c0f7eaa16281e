"""`mu.modules`, `mu.replace`, `mu.pop`: what models hold, wherever it is, tied and in cycles, and under transforms."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mutatis as mu
from mutatis import errors

pytestmark = pytest.mark.once  # many alike; what JAX's versions differ in, the twins and traces of transforms show

X = jnp.float32(3)
Pair = namedtuple("Pair", "left right")


class Scale(mu.Module):
    def __init__(self, w: float = 2.0) -> None:
        self.w = mu.Param(jnp.float32(w))

    def __call__(self, x: Any) -> Any:
        return self.w.value * x


class Lora(mu.Module):
    """Something else in the place of a layer, that holds it."""

    def __init__(self, base: Any) -> None:
        self.base = base
        self.a = mu.Param(jnp.float32(10))

    def __call__(self, x: Any) -> Any:
        return self.a.value * self.base(x)


class Net(mu.Module):
    """A layer in each sort of place."""

    def __init__(self) -> None:
        self.attribute = Scale(1.0)
        self.entries = {"a": Scale(2.0), 7: [Scale(3.0)]}
        self.items = [Scale(4.0), "static", (Scale(5.0),)]
        self.pair = Pair(Scale(6.0), 1)
        self.wrapped = mu.remat(Scale(7.0))

    def layers(self) -> list[Any]:
        inside = [self.entries["a"], self.entries[7][0], self.items[0], self.items[2][0]]
        return [self.attribute, *inside, self.pair.left, self.wrapped]

    def __call__(self, x: Any) -> Any:
        for layer in self.layers():
            x = layer(x)
        return x


PATHS = {
    "attribute": ("attribute",),
    "entries.a": ("entries", "a"),
    "entries[7][0]": ("entries", 7, 0),
    "items[0]": ("items", 0),
    "items[2][0]": ("items", 2, 0),
    "pair[0]": ("pair", 0),
    "wrapped": ("wrapped",),
}
PRODUCT = 5040.0


def kinds(node: Any) -> list[str]:
    return [type(module).__name__ for module in mu.modules(node).values()]


# -- modules -------------------------------------------------------------------------------------------------------


def test_modules_by_path() -> None:
    net = Net()
    found = mu.modules(net)
    assert [*found] == [(), *PATHS.values()]
    assert found[()] is net and found["items", 2, 0] is net.items[2][0]
    assert [float(found[path].w) for path in PATHS.values()] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ((Net,), [()]),
        ((Lora,), []),
        ((mu.Module,), [(), *PATHS.values()]),
        ((lambda path, module: "items" in path,), [("items", 0), ("items", 2, 0)]),
        ((mu.PathContains("a"), Net), [(), ("entries", "a")]),
        ((mu.All(Scale, mu.Not(mu.PathContains(0))),), [("attribute",), ("entries", "a"), ("wrapped",)]),
        ((None,), []),
    ],
)
def test_modules_by_filter(filters: Any, expected: Any) -> None:
    assert [*mu.modules(Net(), *filters)] == expected


def test_modules_of_containers_and_other_nodes() -> None:
    a, b = Scale(), Scale()
    assert mu.modules([a, {"b": (b, a)}]) == {(0,): a, (1, "b", 0): b}
    assert mu.modules(mu.Param(1.0)) == mu.modules([]) == {}
    assert [*mu.modules(mu.vmap(a))] == [()]
    with pytest.raises(errors.ArgumentError, match="3 is not a node"):
        mu.modules(3)


def test_modules_in_cycles_and_ties_are_met_once() -> None:
    net = Net()
    net.me, net.tie = net, net.items[0]
    net.items += [net, net.items]
    assert [*mu.modules(net)] == [(), *PATHS.values()]


# -- replace -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shown", PATHS)
@pytest.mark.parametrize("where", ["shown", "path", "predicate", "module"])
def test_replace_one(shown: str, where: str) -> None:
    net = Net()
    old = mu.modules(net)[PATHS[shown]]
    containers = net.entries, net.items
    ways = {
        "shown": shown,
        "path": PATHS[shown],
        "predicate": lambda path, _: path == PATHS[shown],
        "module": lambda _, module: module is old,
    }
    assert mu.replace(net, ways[where], Lora) is net
    found = mu.modules(net)
    assert type(found[PATHS[shown]]) is Lora and found[*PATHS[shown], "base"] is old
    assert kinds(net).count("Lora") == 1 and len(found) == 9
    assert float(net(X)) == float(mu.jit(net)(X)) == 10 * PRODUCT * 3
    assert (net.entries, net.items) == containers and net.entries is containers[0] and net.items is containers[1]
    assert type(net.pair) is Pair and [*net.entries] == ["a", 7]


def test_replace_all() -> None:
    net = Net()
    mu.replace(net, Scale, Lora)
    assert kinds(net) == ["Net"] + ["Lora", "Scale"] * 7
    assert float(net(X)) == pytest.approx(1e7 * PRODUCT * 3)


def test_ties_stay_tied() -> None:
    net = Net()
    net.items.append(net.attribute)
    net.tie = mu.vmap(net.attribute)
    made: list[Any] = []
    mu.replace(net, "attribute", lambda module: made.append(Lora(module)) or made[-1])
    assert net.attribute is net.items[3] is net.tie.__wrapped__ is made[0] and len(made) == 1
    np.testing.assert_array_equal(net.tie(jnp.ones(2)), [10, 10])


def test_innermost_first() -> None:
    net = mu.Module()
    net.outer = Lora(Lora(Scale()))
    seen = []
    mu.replace(net, Lora, lambda module: seen.append(type(module.base)) or Scale(5.0))
    assert seen == [Scale, Scale] and kinds(net) == ["Module", "Scale"]


def test_the_node_itself() -> None:
    net = Net()
    for where in ((), "", Net, lambda path, _: path == ()):
        other = mu.replace(net, where, Lora)
        assert type(other) is Lora and other.base is net
    assert kinds(net)[0] == "Net"


def test_cycles() -> None:
    net = Net()
    net.me = net
    net.items += [net.items, net]
    mu.replace(net, Scale, Lora)
    assert kinds(net).count("Lora") == 7 and net.me is net and net.items[3] is net.items
    other = mu.replace(net, Net, Lora)
    assert other.base is net and net.me is other and net.items[4] is other


def test_in_a_list_and_beside_an_optimizer() -> None:
    net = Net()
    nodes = [net.attribute, net]
    assert mu.replace(nodes, "[0]", Lora) is nodes
    assert nodes[0] is net.attribute and type(net.attribute) is Lora
    net = Net()
    mu.replace(net, Scale, lambda module: (mu.freeze(module), Lora(module))[1])
    optimizer = mu.Optimizer(net, optax.sgd(1.0))
    optimizer.update(mu.grad(lambda net: net(X) * 1e-10)(net))
    assert float(net.attribute.a) != 10 and float(net.attribute.base.w) == 1


@pytest.mark.parametrize("make", [lambda m: (m,), lambda m: Pair(m, m), mu.remat, mu.jit])
def test_what_cannot_be_changed_in_place_is_returned(make: Any) -> None:
    assert kinds(mu.replace(make(Scale()), Scale, Lora)) == ["Lora", "Scale"]


def test_bound_methods_follow() -> None:
    net = Net()
    net.call = net.attribute.__call__
    mu.replace(net, "attribute", Lora)
    assert float(net.call(X)) == float(net.attribute(X)) == 30


@pytest.mark.parametrize(
    "other",
    [None, 3, "text", jnp.tanh, mu.Param(1.0), jnp.ones(2)],
    ids=["None", "number", "text", "function", "state", "array"],
)
def test_anything_that_an_attribute_takes(other: Any) -> None:
    net = Net()
    mu.replace(net, "attribute", lambda _: other)
    assert net.attribute is other
    assert float(mu.jit(lambda net: net.items[0](X))(net)) == 12


@pytest.mark.parametrize("where", ["attribute", "items[0]", "entries.a"])
@pytest.mark.parametrize("other", [[jnp.ones(2)], {}.keys()], ids=["arrays", "unhashable"])
def test_what_no_model_can_hold(where: str, other: Any) -> None:
    net = Net()
    before = repr(net)
    with pytest.raises((errors.StructureError, errors.StaticAttributeError), match=r"attribute|items|entries"):
        mu.replace(net, where, lambda _: other)
    assert repr(net) == before


@pytest.mark.parametrize(
    ("where", "error", "got"),
    [
        ("items[9]", errors.FilterError, "no module is selected by 'items[9]'"),
        ("items", errors.FilterError, "got:      ., attribute, entries.a, entries[7][0], items[0], items[2][0], "),
        (Lora, errors.FilterError, "`mu.modules(model)` lists them by path."),
        (None, errors.FilterError, "no module is selected by None"),
        (lambda path, _: path == ("x",), errors.FilterError, "no module is selected by the function"),
        (("items", "x"), errors.FilterError, "no module is selected by ('items', 'x')"),
        (3, errors.FilterError, "3 is not a filter"),
        pytest.param(("items", 9), errors.FilterError, "no module is selected by ('items', 9)"),
    ],
)
def test_nothing_is_selected(where: Any, error: type[Exception], got: str) -> None:
    net = Net()
    before = repr(net)
    with pytest.raises(error) as caught:
        mu.replace(net, where, Lora)
    assert got in str(caught.value) and repr(net) == before


def test_any_path_of_a_tied_module() -> None:
    net = Net()
    net.tie = net.attribute
    mu.replace(net, "tie", Lora)
    assert type(net.attribute) is Lora


def test_the_path_as_it_is_printed() -> None:
    assert type(mu.replace(Net(), ".", Lora)) is Lora


def test_no_node() -> None:
    with pytest.raises(errors.ArgumentError, match="3 is not a node"):
        mu.replace(3, Scale, Lora)
    with pytest.raises(errors.FilterError, match="got:      no modules"):
        mu.replace([mu.Param(1.0)], Scale, Lora)


class Failing:
    """Fails at its n-th call."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self, module: Any) -> Any:
        self.left -= 1
        if not self.left:
            raise KeyError("in the middle")
        return Lora(module)


@pytest.mark.parametrize(
    "n",
    [1, 4],
)
def test_a_function_that_fails_changes_nothing(n: int) -> None:
    net = Net()
    with pytest.raises(KeyError):
        mu.replace(net, Scale, Failing(n))
    assert kinds(net) == ["Net"] + ["Scale"] * 7


@pytest.mark.parametrize("form", ["argument", "closure"])
@pytest.mark.parametrize(
    "transform", [mu.jit, mu.grad, mu.remat, lambda f: mu.vmap(f, (None, 0)), lambda f: mu.jit(mu.grad(f))]
)
def test_a_transform_that_fails_changes_nothing(transform: Any, form: str) -> None:
    net = Net()
    before, layers, items = repr(net), net.layers(), net.items
    with pytest.raises(KeyError):
        transform(lambda m, _: mu.replace(net if form == "closure" else m, Scale, Failing(5)))(net, X[None])
    assert repr(net) == before and net.items is items
    assert all(new is old for new, old in zip(net.layers(), layers, strict=True))


# -- replace under transforms --------------------------------------------------------------------------------------


def lora_once(net: Net, x: Any) -> Any:
    if isinstance(net.items[0], Scale):
        mu.replace(net, lambda path, module: path in (("items", 0), ("wrapped",)), Lora)
    return net(x)


@pytest.mark.parametrize("form", ["argument", "closure"])
def test_replaced_inside_of_jit(form: str, traces: Any) -> None:
    net = Net()
    f = mu.jit(traces.count(lora_once)) if form == "argument" else mu.jit(traces.count(lambda x: lora_once(net, x)))
    args = (net, X) if form == "argument" else (X,)
    old = net.items[0]
    for _ in range(3):
        assert float(f(*args)) == 100 * PRODUCT * 3
        assert kinds(net).count("Lora") == 2 and net.items[0].base is old
    net.items[0].a.value = jnp.float32(1)
    assert float(f(*args)) == 10 * PRODUCT * 3
    assert traces.total == 2
    if form == "argument":
        assert float(f(other := Net(), X)) == 100 * PRODUCT * 3 and kinds(other).count("Lora") == 2
        assert traces.total == 2, "the first program again, with what it did to the model"


def test_replaced_between_calls_of_jit(traces: Any) -> None:
    net = Net()
    f = mu.jit(traces.count(lambda net, x: net(x)))
    for _ in range(3):
        assert float(f(net, X)) == PRODUCT * 3
        mu.replace(net, "items[2][0]", Lora)
        assert float(f(net, X)) == 10 * PRODUCT * 3
        mu.replace(net, Lora, lambda module: module.base)
    assert traces.total == 2


def gradient(net: Any, factor: float) -> dict[tuple[Any, ...], float]:
    """By hand: the derivative of a product by each factor."""
    return {path: factor * PRODUCT * 3 / float(cell) for path, cell in mu.variables(net, mu.Param).items()}


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_before_and_after(compiled: bool) -> None:
    net = Net()
    f = mu.grad(lambda net, x: net(x))
    g = mu.jit(f) if compiled else f
    for factor in (1.0, 10.0):
        assert g(net, X).flat() == pytest.approx(gradient(net, factor))
        mu.replace(net, "items[0]", Lora)
    inside = mu.grad(lora_once)
    net = Net()
    expected = gradient(net, 100.0)
    assert (mu.jit(inside) if compiled else inside)(net, X).flat() == pytest.approx(expected)
    assert kinds(net).count("Lora") == 2


@pytest.mark.parametrize(
    ("run", "match"),
    [
        (lambda f: mu.for_loop(f, jnp.ones(2)), "in the body of a loop"),
        (lambda f: mu.cond(True, f, lambda x: x, X), "in a branch"),
    ],
)
@pytest.mark.parametrize("edit", ["replace", "pop"])
def test_refused_in_loops_and_branches(run: Any, match: str, edit: str) -> None:
    net = Net()
    net.cache = mu.Cache(0)
    before = repr(net)

    def body(x: Any) -> Any:
        mu.replace(net, "items[0]", Lora) if edit == "replace" else mu.pop(net, mu.Cache)
        return x

    place = "items" if edit == "replace" else "cache"
    with pytest.raises(errors.StructureError, match=rf"`net\.{place}` was changed {match}"):
        run(body)
    assert repr(net) == before


# -- pop -----------------------------------------------------------------------------------------------------------


def holder() -> Any:
    """States of two kinds in each sort of place."""
    node = mu.Module()
    node.a = mu.Cache(1)
    node.items = [mu.Cache(2), mu.Param(3.0), [mu.Cache(4)]]
    node.entries = {"x": mu.Cache(5), "y": mu.Param(6.0), "z": {"deep": mu.Cache(7)}}
    node.parts = (mu.Cache(8), (mu.Cache(9), "static"))
    node.inner = Scale(10.0)
    node.wrapped = mu.remat(Scale(11.0))
    node.table = jnp.arange(2)
    return node


CACHES = {
    ("a",): 1,
    ("entries", "x"): 5,
    ("entries", "z", "deep"): 7,
    ("items", 0): 2,
    ("items", 2, 0): 4,
    ("parts", 0): 8,
    ("parts", 1, 0): 9,
}


@pytest.mark.parametrize(
    "filter", [mu.Cache, "cache", lambda _, v: isinstance(v, mu.Cache), mu.Not((mu.Param, "buffers"))]
)
def test_pop(filter: Any) -> None:
    node = holder()
    items, entries, inner = node.items, node.entries, node.items[2]
    assert mu.pop(node, filter).flat() == CACHES
    assert not hasattr(node, "a")
    assert node.items is items and items[1] is inner and inner == [] and float(items[0]) == 3
    assert node.entries is entries and [*entries] == ["y", "z"] and entries["z"] == {}
    assert node.parts == (("static",),)
    assert [*mu.state(node)] == [("entries", "y"), ("inner", "w"), ("items", 0), ("table",), ("wrapped", "w")]
    assert mu.pop(node, filter).flat() == {}


def test_several_filters_and_the_rest() -> None:
    node = holder()
    params, caches, rest = mu.pop(node, mu.Param, mu.Cache, ...)
    assert [*params] == [("entries", "y"), ("inner", "w"), ("items", 1), ("wrapped", "w")]
    assert caches.flat() == CACHES and [*rest] == [("table",)]
    assert len(mu.state(node)) == 0
    with pytest.raises(AttributeError, match="table"):
        node.table


def test_all_occurrences_and_cycles() -> None:
    node = holder()
    node.me = node
    node.items += [node.a, node.items, node]
    node.inner.tie = {"tied": node.a, "twice": (node.a, node.a)}
    assert mu.pop(node, mu.Cache).flat() == CACHES
    assert node.items[2:] == [node.items, node] and node.inner.tie == {"twice": ()}
    assert node.me is node and len(mu.state(node, mu.Cache)) == 0


def test_a_state_that_a_bound_method_names() -> None:
    node = mu.Module()
    node.a = mu.Cache(1)
    node.write = node.a.set
    try:
        mu.pop(node, mu.Cache)
    except errors.StructureError:
        return
    assert len(mu.state(node, mu.Cache)) == 0


@pytest.mark.parametrize(
    ("make", "left"),
    [
        (lambda c: [c, 1, c], [1]),
        (lambda c: {"a": c, "b": (c, {"c": c}), "d": 1}, {"b": ({},), "d": 1}),
        (lambda c: [[(c,)], c], [[()]]),
    ],
)
def test_pop_from_containers(make: Callable[[Any], Any], left: Any) -> None:
    node = make(mu.Cache(1))
    assert [*mu.pop(node, mu.Cache).flat().values()] == [1]
    assert node == left


def test_pop_frozen_and_not_yet_made() -> None:
    node = mu.Module()
    node.frozen = mu.Cache(3)
    node.waits = mu.Param(init=lambda: jnp.ones(2))
    mu.freeze(node)
    states = mu.pop(node, mu.Cache, mu.Param)
    assert states[0].flat() == {("frozen",): 3} and [*states[1]] == [("waits",)]
    assert repr(node) == "Module()"


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (
            lambda n: (n, ()),
            errors.FilterError,
            "`mu.pop` needs a filter\nSay what to take out: `mu.pop(model, mu.Intermed",
        ),
        (
            lambda n: (n.a, (mu.Cache,)),
            errors.StructureError,
            "`Cache` cannot be popped: nothing can be taken out of a Cache",
        ),
        (lambda n: ((n.a,), (mu.Cache,)), errors.StructureError, "`tuple` cannot be popped"),
        (lambda n: (Pair(n.a, 1), (mu.Cache,)), errors.StructureError, "`Pair` cannot be popped"),
        (lambda n: ([n, Pair(n.a, 1)], (mu.Cache,)), errors.StructureError, "`[1]` cannot be popped"),
        (lambda n: (setattr(n, "z", Pair(n.a, 1)), (n, (mu.Cache,)))[1], errors.StructureError, "`z` cannot be popped"),
        (lambda n: (3, (mu.Cache,)), errors.ArgumentError, "3 is not a node"),
        (lambda n: (n, (3,)), errors.FilterError, "3 is not a filter"),
    ],
)
def test_pop_refused(make: Any, error: type[Exception], text: str) -> None:
    keeper = holder()
    node, filters = make(keeper)
    before = repr(keeper)
    with pytest.raises(error) as caught:
        mu.pop(node, *filters)
    assert text in str(caught.value) and repr(keeper) == before
    if "cannot be popped" in text:
        assert "Pop from each module that holds states: `mu.pop(model, mu.Cache)`." in str(caught.value)


@pytest.mark.parametrize("form", ["argument", "closure"])
def test_pop_inside_of_jit(form: str, traces: Any) -> None:
    node = holder()

    def f(node: Any) -> Any:
        taken = mu.pop(node, mu.Cache)
        node.a = mu.Cache(taken["a"] + 1)
        return taken

    g = mu.jit(traces.count(f)) if form == "argument" else mu.jit(traces.count(lambda: f(node)))
    args = (node,) if form == "argument" else ()
    assert g(*args).flat() == CACHES
    assert g(*args).flat() == {("a",): 2}
    total = traces.total
    for k in (3, 4):
        assert g(*args).flat() == {("a",): k}
    assert traces.total == total and len(node.items) == 2 and node.parts == (("static",),)


@pytest.mark.parametrize("transform", [mu.jit, mu.grad, lambda f: mu.jit(mu.grad(f))])
def test_gradients_with_what_was_popped(transform: Any) -> None:
    node = holder()

    def f(node: Any, x: Any) -> Any:
        return node.wrapped(x) * mu.pop(node, mu.Cache)["a"].astype(jnp.float32)

    out = transform(f)(node, X)
    assert float(out if transform is mu.jit else out["wrapped", "w"]) == (33 if transform is mu.jit else 3)
    assert len(mu.state(node, mu.Cache)) == 0


@pytest.mark.parametrize("transform", [mu.jit, mu.grad, mu.remat, lambda f: lambda n: mu.vmap(lambda _: f(n))(X[None])])
def test_a_failure_puts_back_what_was_popped(transform: Any) -> None:
    node = holder()
    node.items.append(node.a)
    before, held = mu.state(node), node.items[:]

    def f(node: Any) -> Any:
        mu.pop(node, mu.Cache, ...)
        raise KeyError("in the middle")

    with pytest.raises(KeyError):
        transform(f)(node)
    assert mu.state(node) == before and node.items == held and held[3] is node.a
    assert float(jax.jit(lambda node: node.inner(X))(node)) == 30


@pytest.mark.parametrize("undo", ["failure", "snapshot"])
def test_what_is_put_back_is_where_it_was(undo: str, traces: Any) -> None:
    node = holder()
    f, definition, snapshot = mu.jit(traces.count(lambda node: node.inner(X))), mu.graphdef(node), mu.snapshot(node)
    f(node)
    if undo == "failure":
        with pytest.raises(KeyError):
            mu.jit(lambda: (mu.pop(node, mu.Cache), {}["missing"]))()
    else:
        mu.pop(node, mu.Cache)
        snapshot.restore()
    f(node)
    assert traces.total == 1
    assert mu.graphdef(node) == definition
