"""States that change places while a function is traced: done again by each call, as in eager Python, or refused and put back."""

from __future__ import annotations

import dataclasses
import types
from collections import ChainMap, OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis.errors import StructureError


class Plain:
    a: Any
    b: Any


class Slots:
    __slots__ = ("a", "b")
    a: Any
    b: Any


class Own(list[Any]):
    pass


@dataclasses.dataclass(frozen=True)
class Pair:
    a: Any
    b: Any


class Counter:
    step = 1.0

    def __init__(self, cell: Any) -> None:
        self.cell = cell

    def go(self, x: Any) -> Any:
        self.cell.value = self.cell.value + self.step * x
        return self.cell.value


class Other(Counter):
    step = 2.0


class Model(mu.Module):
    step = 1.0

    def __init__(self, cell: Any) -> None:
        self.cell = cell

    def go(self, x: Any) -> Any:
        self.cell.value = self.cell.value + self.step * x
        return self.cell.value


class OtherModel(Model):
    step = 2.0


def attributes(holder: Any, cells: list[Any]) -> Callable[[Any], Any]:
    """A step that writes to one of two attributes, and swaps them."""
    holder.a, holder.b = cells[:2]

    def step(x: Any) -> Any:
        holder.a.value = holder.a.value + x
        holder.a, holder.b = holder.b, holder.a
        return holder.a.value

    return step


def entries(holder: Any, cells: list[Any]) -> Callable[[Any], Any]:
    holder["a"], holder["b"] = cells[:2]

    def step(x: Any) -> Any:
        holder["a"].value = holder["a"].value + x
        holder["a"], holder["b"] = holder["b"], holder["a"]
        return holder["a"].value

    return step


def items(holder: Any, turn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def step(x: Any) -> Any:
        holder[0].value = holder[0].value + x
        turn(holder)
        return holder[0].value

    return step


def to_end(cells: list[Any]) -> Callable[[Any], Any]:
    held = OrderedDict(zip("abc", cells, strict=True))

    def step(x: Any) -> Any:
        first = next(iter(held.values()))
        first.value = first.value + x
        held.move_to_end(next(iter(held)))
        return next(iter(held.values())).value

    return step


def one_of_a_set(cells: list[Any]) -> Callable[[Any], Any]:
    held = {cells[0]}

    def step(x: Any) -> Any:
        cell = next(iter(held))
        cell.value = cell.value + x
        held.remove(cell)
        held.add(cells[1] if cell is cells[0] else cells[0])
        return cell.value

    return step


def replaced(cells: list[Any]) -> Callable[[Any], Any]:
    holder: Any = Plain()
    holder.pair = Pair(cells[0], cells[1])

    def step(x: Any) -> Any:
        holder.pair.a.value = holder.pair.a.value + x
        holder.pair = dataclasses.replace(holder.pair, a=holder.pair.b, b=holder.pair.a)
        return holder.pair.a.value

    return step


def variables(cells: list[Any]) -> Callable[[Any], Any]:
    a, b = cells[:2]

    def step(x: Any) -> Any:
        nonlocal a, b
        a.value = a.value + x
        a, b = b, a
        return a.value

    return step


def of_class(first: type, second: type) -> Callable[[list[Any]], Callable[[Any], Any]]:
    def make(cells: list[Any]) -> Callable[[Any], Any]:
        thing: Any = first(cells[0])

        def step(x: Any) -> Any:
            out = thing.go(x)
            thing.__class__ = second if type(thing) is first else first
            return out

        return step

    return make


def a_function() -> Any:
    def f() -> None: ...

    return f


AGAIN: dict[str, Callable[[list[Any]], Callable[[Any], Any]]] = {
    "list": lambda cells: items(list(cells), list.reverse),
    "dict": lambda cells: entries({}, cells),
    "object": lambda cells: attributes(Plain(), cells),
    "namespace": lambda cells: attributes(types.SimpleNamespace(), cells),
    "module": lambda cells: attributes(mu.Module(), cells),
    "variables": variables,
    "UserDict": lambda cells: entries(UserDict(), cells),
    "ChainMap": lambda cells: entries(ChainMap({}), cells),
}
REFUSED: dict[str, Callable[[list[Any]], Callable[[Any], Any]]] = {
    "deque": lambda cells: items(deque(cells), lambda held: held.rotate(1)),
    "deque, out and in": lambda cells: items(deque(cells), lambda held: held.append(held.popleft())),
    "subclass of list": lambda cells: items(Own(cells), lambda held: held.reverse()),
    "order of an OrderedDict": to_end,
    "OrderedDict": lambda cells: entries(OrderedDict(), cells),
    "defaultdict": lambda cells: entries(defaultdict(list), cells),
    "slots": lambda cells: attributes(Slots(), cells),
    "class": lambda cells: attributes(type("Holder", (), {}), cells),
    "module of Python": lambda cells: attributes(types.ModuleType("holder"), cells),
    "function": lambda cells: attributes(a_function(), cells),
    "frozen dataclass": replaced,
    "set": one_of_a_set,
    "class of an object": of_class(Counter, Other),
    "class of a module": of_class(Model, OtherModel),
}


def states() -> list[Any]:
    return [mu.Variable(10.0**n) for n in range(3)]


def run(step: Callable[[Any], Any]) -> list[float]:
    return [float(step(jnp.float32(n + 1))) for n in range(5)]


@pytest.mark.parametrize("name", AGAIN)
def test_it_moves_in_each_call(name: str) -> None:
    eager, compiled = states(), states()
    assert run(mu.jit(AGAIN[name](compiled))) == run(AGAIN[name](eager))
    assert [float(cell) for cell in compiled] == [float(cell) for cell in eager]


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_and_put_back(name: str) -> None:
    cells, eager = states(), states()
    step = REFUSED[name](cells)
    for _ in range(2):
        with pytest.raises(StructureError, match=r"changed by a function that is traced|was given another class"):
            mu.jit(step)(jnp.float32(1))
    assert [float(cell) for cell in cells] == [1.0, 10.0, 100.0]
    assert run(step) == run(REFUSED[name](eager)), "everything is where it was"


@pytest.mark.parametrize("name", sorted(set(REFUSED) - {"class of a module"}))
def test_it_is_refused_in_a_loop(name: str) -> None:
    step = REFUSED[name](states())
    with pytest.raises(StructureError):
        mu.for_loop(step, jnp.arange(1.0, 6.0))
    with pytest.raises(StructureError):
        mu.jit(lambda xs: mu.for_loop(step, xs))(jnp.arange(1.0, 6.0))


@pytest.mark.parametrize("kinds", [(Counter, Other), (Model, OtherModel)], ids=["object", "module"])
def test_another_class_between_calls(kinds: tuple[Any, Any]) -> None:
    def results(transform: Callable[..., Any]) -> list[float]:
        thing = kinds[0](mu.Variable(0.0))
        step, passed = transform(lambda x: thing.go(x)), transform(lambda cell, x: thing.go(x) + 0 * cell.value)
        out = []
        for n in range(6):
            out.append(float(step(jnp.float32(n)) + passed(thing.cell, jnp.float32(1))))
            thing.__class__ = kinds[1] if n % 3 else kinds[0]
        return out

    assert results(mu.jit) == results(lambda f: f)


def test_what_is_put_where_nothing_was_is_no_move() -> None:
    registry: set[Any] = set()
    holder: Any = types.ModuleType("holder")
    cell = mu.Variable(0.0)

    @mu.jit
    def step(x: Any) -> Any:
        holder.latest = cell
        cell.value += x
        return cell.value

    assert [float(step(1.0)) for _ in range(3)] == [1.0, 2.0, 3.0]
    assert holder.latest is cell
    assert not registry


# -- lists and dicts among the arguments ---------------------------------------------------------------------------


ARGUMENTS: dict[str, Callable[[Any], Any]] = {
    "reverse": lambda held: held.reverse(),
    "append": lambda held: held.append(held[0]),
    "delete": lambda held: held.__delitem__(0),
    "swap": lambda held: held.__setitem__(slice(0, 2), held[1::-1]),
    "another": lambda held: held.__setitem__(0, mu.Variable(0.0)),
}
TRANSFORMS: dict[str, Callable[..., Any]] = {
    "jit": mu.jit,
    "grad": lambda f: mu.grad(f, wrt=mu.Variable),
    "remat": mu.remat,
    "jit and remat": lambda f: mu.jit(mu.remat(f)),
    "vmap": lambda f: lambda held, x: mu.vmap(f, in_axes=(None, 0))(held, x[None]),
    "cond": lambda f: lambda held, x: mu.cond(x > 0, f, lambda held, x: held[0].value * x, held, x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("change", ARGUMENTS)
def test_an_argument_that_is_changed_in_place(change: str, transform: str) -> None:
    cells = states()

    def step(held: Any, x: Any) -> Any:
        ARGUMENTS[change](held)
        return held[0].value * x

    with pytest.raises(StructureError, match=r"(?s)list or dict of states among the arguments.*Return the new one"):
        TRANSFORMS[transform](step)(cells, jnp.float32(2))
    assert [float(cell) for cell in cells] == [1.0, 10.0, 100.0]


def test_an_argument_that_is_not_differentiated_is_the_callers() -> None:
    cells = states()
    first = cells[0]

    def step(held: Any, x: Any) -> Any:
        held.reverse()
        return held[0].value * x

    assert float(mu.grad(step, argnums=1)(cells, jnp.float32(2))) == 100.0
    assert cells[2] is first


def test_lists_of_arrays_are_copies_as_in_jax() -> None:
    def step(cell: Any, xs: Any) -> Any:
        xs.append(xs[0] * 2)
        cell.value += sum(xs)
        return cell.value

    cell, xs = mu.Variable(0.0), [jnp.float32(1)]
    assert float(mu.jit(step)(cell, xs)) == 3.0
    assert len(xs) == 1


# -- modules that `jax.tree` makes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "transform",
    [mu.jit, mu.remat, lambda f: mu.jit(mu.remat(f)), jax.jit, lambda f: f],
    ids=["jit", "remat", "both", "raw jit", "eager"],
)
def test_a_tree_map_over_a_module(transform: Callable[..., Any]) -> None:
    layer = mu.nn.Linear(2, 2, rngs=mu.Rngs(0))
    double = transform(lambda layer: jax.tree.map(lambda x: 2 * x, layer))
    for _ in range(2):
        other = double(layer)
        assert type(other) is mu.nn.Linear and other.kernel is not layer.kernel
        np.testing.assert_allclose(other.kernel, 2 * layer.kernel.value)
    one = transform(lambda cell: jax.tree.map(lambda x: 2 * x, cell))(layer.kernel)
    np.testing.assert_allclose(one, 2 * layer.kernel.value)
    total = transform(lambda layer: sum(map(jnp.sum, jax.tree.leaves(jax.tree.map(jnp.abs, layer)))))(layer)
    np.testing.assert_allclose(total, jnp.sum(jnp.abs(layer.kernel.value)), rtol=1e-6)


def test_another_object_with_the_same_states_is_no_move() -> None:
    holder, seen = Plain(), {1}
    cell = mu.Variable(0.0)
    holder.latest = Pair(cell, 0)  # type: ignore[attr-defined]
    held = {cell}

    @mu.jit
    def step(x: Any) -> Any:
        holder.latest = Pair(cell, len(seen))  # type: ignore[attr-defined]
        held.discard(cell)
        held.add(cell)
        cell.value += x.sum()
        return cell.value

    assert [float(step(jnp.ones(n))) for n in (1, 2, 2)] == [1.0, 3.0, 5.0]


@pytest.mark.parametrize("transform", [mu.jit, mu.remat, lambda f: mu.jit(mu.remat(f))], ids=["jit", "remat", "both"])
def test_modules_that_jax_makes_on_the_way(transform: Callable[..., Any]) -> None:
    """JAX rebuilds modules in its own transforms, some around what is no array; they are none of the result."""
    layer, xs = mu.nn.Linear(2, 2, rngs=mu.Rngs(0)), jnp.arange(6.0).reshape(3, 2)

    def program(layer: Any) -> Any:
        mapped = jax.vmap(lambda layer, x: layer(x), in_axes=(None, 0))(layer, xs).sum()
        gradient = jax.grad(lambda layer: layer(xs).sum())(layer)
        doubled = jax.jit(lambda layer: jax.tree.map(lambda x: 2 * x, layer))(layer)
        shapes = jax.tree.map(lambda x: x.shape, layer)
        abstract = jax.eval_shape(lambda layer: layer, layer)
        carried, _ = jax.lax.scan(lambda c, _: (jax.tree.map(lambda x: x + 1, c), None), layer, None, length=2)
        chosen = jax.lax.cond(xs[0, 0] < 1, lambda layer: layer, lambda layer: layer, layer)
        assert shapes is not None and abstract is not None
        return mapped, *map(jax.tree.leaves, (gradient, doubled, carried, chosen))

    wanted = program(layer)
    for _ in range(2):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), transform(program)(layer), wanted)


def test_states_that_jax_makes_and_that_are_assigned() -> None:
    def results(transform: Callable[..., Any]) -> Any:
        layer: Any = mu.nn.Linear(2, 2, rngs=mu.Rngs(0))

        def step(layer: Any) -> Any:
            layer.kernel = jax.tree.map(lambda x: 2 * x, layer.kernel)
            layer.shifted = jax.tree.map(lambda x: x + 1, layer.bias)
            return layer(jnp.ones((1, 2))).sum() + layer.shifted.value.sum()

        run = transform(step)
        return [float(run(layer)) for _ in range(3)], float(layer.kernel.value.sum())

    np.testing.assert_allclose(results(mu.jit)[0], results(lambda f: f)[0], rtol=1e-5)
    np.testing.assert_allclose(results(mu.remat)[1], results(lambda f: f)[1], rtol=1e-5)
