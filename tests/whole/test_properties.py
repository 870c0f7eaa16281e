"""Laws that hold for every model: random trees with ties, cycles, containers, several kinds and pytree values.

- split and merge are inverse; a clone is equal, independent and tied alike; copies by deepcopy and pickle too.
- Equal structure has equal definitions, whatever the values; another value of a static has another definition.
- A `State` is flattened and rebuilt without loss; filters divide it into disjoint parts that make up the whole.
- `update` writes everything or nothing.
- A step of random writes leaves what it leaves eagerly, compiled, in a loop of one iteration and in a branch.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import mutatis as mu
from mutatis import errors
from mutatis.core.naming import show_path

KINDS = [mu.Param, mu.BatchStat, mu.Cache, mu.Hidden, mu.Variable]


class Node(mu.Module):
    """A module whose attributes are drawn."""


class Leaf(mu.Module):
    def __init__(self, cell: Any) -> None:
        self.cell = cell


class Builder:
    """Builds a model from drawn numbers; what was built before may be used again, so there are ties and cycles."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.cells: list[mu.Variable] = []
        self.modules: list[mu.Module] = []
        self.containers: list[Any] = []

    def number(self, most: int) -> int:
        return self.draw(st.integers(0, most))

    def value(self) -> Any:
        shape = (2,) * self.number(2)
        dtype = [np.float32, np.int32, np.bool_][self.number(2)]
        array = np.full(shape, len(self.cells) + 1).astype(dtype)
        return [array, {"a": array, "b": (array,)}, [array, array]][max(0, self.number(4) - 2)]

    def cell(self) -> mu.Variable:
        if self.cells and self.number(3) == 0:
            return self.cells[self.number(len(self.cells) - 1)]
        options: dict[str, Any] = [{}, {"name": "n"}, {"tag": "t"}, {"fixed": True}][self.number(3)]
        self.cells.append(KINDS[self.number(len(KINDS) - 1)](self.value(), **options))
        return self.cells[-1]

    def node(self, depth: int) -> Any:
        what = self.number(8) if depth > 0 else self.number(2)
        if what <= 1:
            return self.cell()
        if what == 2:
            return ["text", 3, None, 2.5, jnp.tanh, (1, "a")][self.number(5)]
        if what == 3 and self.modules:
            return self.modules[self.number(len(self.modules) - 1)]
        if what == 4 and self.containers:
            return self.containers[self.number(len(self.containers) - 1)]
        if what == 5:
            items: list[Any] = []
            self.containers.append(items)
            items.extend(self.node(depth - 1) for _ in range(self.number(3)))
            return items
        if what == 6:
            entries: dict[str, Any] = {}
            self.containers.append(entries)
            for key in self.draw(st.permutations("zax"))[: self.number(3)]:
                entries[key] = self.node(depth - 1)
            return entries
        if what == 7:
            return tuple(self.node(depth - 1) for _ in range(self.number(2)))
        return self.module(depth - 1)

    def module(self, depth: int) -> mu.Module:
        node = Node()
        self.modules.append(node)
        for name in self.draw(st.permutations("dcba"))[: 1 + self.number(3)]:
            setattr(node, name, self.node(depth))
        if self.number(3) == 0:
            node.buffer = jnp.arange(3)
        if self.number(5) == 0:
            node.eval()
        return node


@st.composite
def models(draw: st.DrawFn) -> mu.Module:
    """A random model."""
    return Builder(draw).module(3)


def same_values(a: Any, b: Any) -> bool:
    return mu.state(a) == mu.state(b)


def shape_of(model: Any) -> Any:
    """The sharing of everything: objects by the order in which they are met, as plain nested tuples."""
    numbers: dict[int, int] = {}

    def walk(value: Any) -> Any:
        plain = isinstance(value, tuple) or not isinstance(value, mu.Module | mu.Variable | list | dict)
        if not plain:
            if id(value) in numbers:
                return ("again", numbers[id(value)])
            numbers[id(value)] = len(numbers)
        if isinstance(value, mu.Variable):
            return (type(value).__name__, value.name, value.fixed, tuple(value.metadata.items()))
        if isinstance(value, mu.Module):
            return (type(value).__name__, tuple((k, walk(v)) for k, v in sorted(vars(value).items())))
        if isinstance(value, dict):
            return ("dict", tuple((k, walk(v)) for k, v in value.items()))
        if isinstance(value, list | tuple):
            return (type(value).__name__, tuple(walk(v) for v in value))
        return value

    return walk(model)


def bump(value: Any) -> Any:
    """Another value of the same type."""
    return jax.tree.map(lambda x: ~x if x.dtype == jnp.bool_ else x + jnp.ones((), x.dtype), value)


COPIES = [
    mu.clone,
    copy.deepcopy,
    lambda model: pickle.loads(pickle.dumps(model)),
    lambda model: mu.merge(*mu.split(model)),
    lambda model: mu.merge(*mu.split(model, mu.Param, mu.Not(mu.Cache), ...)),
    lambda model: jax.tree.map(lambda x: x, model),
]


@given(models(), st.sampled_from(COPIES))
def test_copies_are_equal_independent_and_tied_alike(model: Any, copied: Any) -> None:
    before = mu.state(model)
    other = copied(model)
    assert same_values(model, other)
    assert shape_of(other) == shape_of(model)
    if copied is COPIES[-1]:
        assert all(cell.frozen for cell in mu.variables(other).values()), "detached"
        mu.thaw(other)
    assert mu.graphdef(other) == mu.graphdef(model)
    assert not set(mu.variables(model).values()) & set(mu.variables(other).values())
    for cell in mu.variables(other).values():
        cell.value = bump(cell.value)
    assert mu.state(model) == before
    if len(before):
        assert mu.state(other) != before


@given(models())
def test_a_definition_does_not_depend_on_values(model: Any) -> None:
    definition = mu.graphdef(model)
    text = hash(definition)
    for cell in mu.variables(model).values():
        cell.value = bump(cell.value)
    assert mu.graphdef(model) == definition
    assert hash(mu.graphdef(model)) == text
    model.one_more = 1
    assert mu.graphdef(model) != definition
    del model.one_more
    assert mu.graphdef(model) == definition


@given(models())
def test_a_state_is_a_pytree_without_loss(model: Any) -> None:
    state = mu.state(model)
    leaves, treedef = jax.tree.flatten(state)
    assert len(leaves) == sum(len(jax.tree.leaves(v)) for v in state.values())
    again = jax.tree.unflatten(treedef, leaves)
    assert again == state
    assert again.kinds() == state.kinds()
    assert mu.State.from_flat(state.flat(), state.kinds()) == state
    assert [*mu.State.from_flat(dict(reversed(state.flat().items())), state.kinds())] == [*state]
    assert pickle.loads(pickle.dumps(state)) == state
    assert state | state == state
    assert state | mu.State({}) == state


FILTERS = [
    mu.Param,
    mu.Cache,
    mu.BatchStat,
    "hidden",
    mu.PathContains("a"),
    mu.Not(mu.Param),
    mu.Everything(),
    mu.Nothing(),
]


@given(models(), st.lists(st.sampled_from(FILTERS), max_size=4))
def test_filters_divide_a_state(model: Any, filters: list[Any]) -> None:
    state = mu.state(model)
    parts = mu.state(model, *filters, ...)
    parts = parts if isinstance(parts, tuple) else (parts,)
    assert sum(map(len, parts)) == len(state)
    whole = mu.State({})
    for part in parts:
        whole = whole | part
    assert whole == state
    assert all(a == b for a, b in zip(state.split(*filters, ...), parts, strict=True))
    for part, filter in zip(parts, filters, strict=False):
        assert set(part) <= set(mu.variables(model, filter))
        assert part.filter(filter) == part
        assert len(part.filter(mu.Not(filter))) == 0
    _, *split = mu.split(model, *filters, ...)
    assert all(a == b for a, b in zip(split, parts, strict=True))


@given(models(), st.sampled_from(FILTERS), st.sampled_from(FILTERS))
def test_filters_are_a_boolean_algebra(model: Any, a: Any, b: Any) -> None:
    everything = set(mu.variables(model))
    left, right = set(mu.variables(model, a)), set(mu.variables(model, b))
    assert set(mu.variables(model, mu.All(a, b))) == left & right
    assert set(mu.variables(model, mu.Any(a, b))) == set(mu.variables(model, a, b)) == left | right
    assert set(mu.variables(model, mu.Not(a))) == everything - left
    assert set(mu.variables(model, ~(mu.Not(a) | mu.Not(b)))) == left & right


@given(models(), st.data())
def test_update_writes_everything_or_nothing(model: Any, data: st.DataObject) -> None:
    state = mu.state(model)
    new = state.map(lambda _, value: bump(value))
    if len(state) and data.draw(st.booleans()):
        bad = data.draw(st.sampled_from([*state]))
        wrong = data.draw(st.sampled_from(["shape", "dtype", "structure", "frozen"]))
        if wrong == "frozen":
            mu.freeze(mu.variables(model)[bad])
        values = {
            "shape": lambda v: jax.tree.map(lambda x: x[None], v),
            "dtype": lambda v: jax.tree.map(lambda x: x.astype(jnp.float16), v),
            "structure": lambda v: [v],
            "frozen": lambda v: v,
        }
        flat = new.flat()
        flat[bad] = values[wrong](flat[bad])
        try:
            mu.update(model, mu.State(flat, new.kinds()))
        except errors.FrozenStateError as error:
            assert wrong == "frozen"
            assert error.path  # noqa: PT017
        except errors.StateTypeError as error:
            assert wrong != "frozen"
            assert show_path(bad) in str(error)  # noqa: PT017
        else:
            raise AssertionError(f"accepted: {wrong}")
        assert mu.state(model) == state
        mu.thaw(model)
    mu.update(model, new)
    assert mu.state(model) == new
    mu.update(model, state.to_pure_dict())
    assert mu.state(model) == state


@given(models())
def test_a_snapshot_restores(model: Any) -> None:
    before, form = mu.state(model), shape_of(model)
    snapshot = mu.snapshot(model)
    for cell in mu.variables(model).values():
        cell.value = bump(cell.value)
    for name in list(vars(model)):
        delattr(model, name)
    model.other = [mu.Param(1)]
    snapshot.restore()
    assert mu.state(model) == before
    assert shape_of(model) == form


@given(models())
def test_repr_ends(model: Any) -> None:
    assert repr(model).startswith("Node(")


@given(models())
def test_pop_takes_what_it_returns(model: Any) -> None:
    taken, rest = mu.state(model, mu.Param, ...)
    try:
        popped = mu.pop(model, mu.Param)
    except errors.MutatisError:
        assert mu.state(model) == taken | rest, "refused: then nothing is gone"
        return
    assert popped == taken
    assert set(mu.state(model, mu.Param)) == set()
    assert len(mu.state(model)) == len(rest)


@settings(max_examples=12)
@given(models(), st.data())
def test_a_step_is_the_same_everywhere(model: Any, data: st.DataObject) -> None:
    count = len(mu.variables(model))
    chosen = data.draw(st.lists(st.integers(0, max(0, count - 1)), max_size=3)) if count else []
    kind = data.draw(st.sampled_from(["jit", "closure", "loop", "branch", "remat", "grad", "functionalize", "nested"]))

    def step(model: Any) -> Any:
        cells = [*mu.variables(model).values()]
        for i in chosen:
            cells[i].value = bump(cells[i].value)
        return mu.state(model)

    other = mu.clone(model)
    expected = step(other)
    shape = shape_of(model)
    if kind == "functionalize":
        pure, state = mu.functionalize(lambda: step(model), of=model)
        out, new = jax.jit(pure)(state)
        assert new == expected
        assert mu.state(model) == state
        mu.update(model, new)
    else:
        out = {
            "jit": lambda: mu.jit(step)(model),
            "closure": lambda: mu.jit(lambda: step(model))(),
            "loop": lambda: jax.tree.map(lambda x: x[0], mu.for_loop(lambda: step(model), length=1)),
            "branch": lambda: mu.cond(True, lambda: step(model), lambda: mu.state(model)),
            "remat": lambda: mu.remat(step)(model),
            "grad": lambda: mu.grad(lambda x: (x, step(model)), has_aux=True)(1.0)[1],
            "nested": lambda: mu.jit(lambda m: mu.cond(True, lambda: mu.remat(step)(m), lambda: mu.state(m)))(model),
        }[kind]()
    assert out == expected
    assert mu.state(model) == expected
    assert shape_of(model) == shape
    assert mu.graphdef(model) == mu.graphdef(other)
