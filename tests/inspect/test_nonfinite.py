"""`find_nonfinite`: the state, the operation, its line, iteration and inputs; through every transform; nothing is changed."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mutatis as mu
from mutatis import nn
from mutatis.errors import ArgumentError, TraceLevelError
from mutatis.inspect import Nonfinite


def find(f: Any, *args: Any) -> Nonfinite:
    return mu.inspect.find_nonfinite(f)(*args)


def line_of(function: Any, text: str) -> int:
    """The number of the line of a function's source that holds a text."""
    lines, first = inspect.getsourcelines(function)
    return first + next(number for number, line in enumerate(lines) if text in line)


class Net(mu.Module):
    def __init__(self) -> None:
        self.total = mu.Variable(jnp.ones(3))
        self.other = mu.Variable(jnp.ones(3))

    def step(self, x: jax.Array) -> jax.Array:
        scale = jnp.log(x)
        self.other.value = self.other.value + 1
        self.total.value = self.total.value * scale
        return scale.sum()


GOOD, BAD = jnp.array([1.0, 2.0, 3.0]), jnp.array([1.0, 2.0, -1.0])
AROUND: dict[str, Any] = {
    "plain": lambda net: net.step,
    "jit": lambda net: mu.jit(net.step),
    "jit in jit": lambda net: mu.jit(lambda x: mu.jit(net.step)(x) + 1),
    "remat": lambda net: lambda x: mu.remat(net.step)(x),
    "cond": lambda net: lambda x: mu.cond(x[0] > 0, net.step, lambda x: x.sum(), x),
    "raw jit inside": lambda net: lambda x: net.total.set(net.total.value * jax.jit(jnp.log)(x)),
    "grad": lambda net: lambda x: mu.grad(net.step)(x),
}


@pytest.mark.parametrize("name", AROUND)
def test_the_first_operation(name: str) -> None:
    net = Net()
    f = AROUND[name](net)
    assert not find(f, GOOD)
    found = find(f, BAD)
    assert found
    assert found.operation == "log"
    assert found.inputs == ("float32[3] from -1 to 2",)
    assert [path.rpartition(".")[2] for path in found.states] == ["total"]
    if name != "raw jit inside":
        assert found.line == f"test_nonfinite.py:{line_of(Net.step, 'jnp.log')} in Net.step"
    np.testing.assert_array_equal(net.total.value, 1.0)
    np.testing.assert_array_equal(net.other.value, 1.0)
    assert "becomes non-finite" in str(found)


def test_the_iteration_of_a_loop() -> None:
    net = Net()

    def grow(x: jax.Array) -> None:
        net.total.value = net.total.value * x

    found = find(lambda xs: mu.for_loop(grow, xs), jnp.full(6, 1e10))
    assert (found.operation, found.iterations) == ("mul", (3,))
    assert found.inputs == ("float32[3] 1e+30", "float32[] 1e+10")
    nested = find(lambda xs: mu.for_loop(lambda _: mu.for_loop(grow, xs[:2]), xs), jnp.full(6, 1e10))
    assert nested.iterations == (1, 1)
    backwards = find(lambda xs: mu.for_loop(lambda t: 1 / (t - 2), xs, reverse=True), jnp.arange(5.0))
    assert (backwards.operation, backwards.iterations) == ("div", (2,))


def test_a_while_loop_and_its_branches() -> None:
    def body(v: jax.Array) -> jax.Array:
        return mu.cond(v > 3, lambda v: jnp.log(v - 6.0), lambda v: v + 1, v)

    found = find(lambda x: mu.while_loop(lambda v: v < 5, body, x), 1.0)
    assert (found.operation, found.iterations, found.inputs) == ("log", (3,), ("float32[] -2",))


def test_a_gradient_that_is_not_finite() -> None:
    net, x = nn.Linear(3, 2, rngs=mu.Rngs(0)), jnp.ones((4, 3))
    optimizer = mu.Optimizer(net, optax.adam(1e-3))

    @mu.jit
    def train(net: Any, optimizer: mu.Optimizer, x: jax.Array) -> None:
        def loss(net: Any) -> jax.Array:
            y = net(x)
            return jnp.sqrt((y - y) ** 2).sum()

        optimizer.update(mu.grad(loss)(net))

    with jax.numpy_dtype_promotion("standard"):
        found = find(train, net, optimizer, x)
    assert {"net.kernel", "net.bias"} <= set(found.states)
    assert found.line is not None
    assert found.line.endswith("train.loss")
    assert found.infinite is None or found.infinite.operation == "div"


def test_masks_are_not_blamed() -> None:
    def attend(x: jax.Array) -> jax.Array:
        weights = jax.nn.softmax(jnp.where(jnp.arange(4) < 2, x, -jnp.inf))
        return weights + jnp.sqrt(x - 2)

    found = find(attend, jnp.ones(4))
    assert found.operation == "sqrt"
    assert not find(lambda x: jax.nn.softmax(jnp.where(jnp.arange(4) < 2, x, -jnp.inf)), jnp.ones(4))


def test_an_infinite_input_has_an_origin_of_its_own() -> None:
    def f(x: jax.Array) -> jax.Array:
        big = jax.jit(jnp.exp)(x)
        return jax.jit(lambda a: a - a)(big)

    found = find(f, jnp.full(2, 1000.0))
    assert found.operation == "sub"
    assert found.infinite is not None
    assert (found.infinite.operation, found.infinite.inputs) == ("exp", ("float32[2] 1000",))
    assert "its infinite input: `exp`" in str(found)


def test_what_came_in_is_named() -> None:
    net = Net()
    assert find(net.step, GOOD * jnp.nan).source == "x"
    net.total.value = net.total.value.at[1].set(jnp.nan)
    found = find(lambda: mu.for_loop(lambda _: net.total.set(net.total.value * 2.0), jnp.arange(3)))
    assert found.source is not None
    assert found.source.endswith("total")
    assert "was non-finite before the step" in str(found)


def test_lanes_and_checks() -> None:
    net = Net()

    def lane(x: jax.Array) -> jax.Array:
        y = jnp.sqrt(x)
        mu.error_if(jnp.isnan(y), "NaN")
        return y

    found = find(lambda x: mu.vmap(lane)(x), jnp.arange(3.0) - 1)
    assert found.operation == "sqrt"
    assert found.returned

    @mu.jit
    def step(net: Net, x: jax.Array) -> None:
        net.total.value = jnp.log(x)
        mu.error_if(jnp.isnan(net.total.value), "NaN")

    assert find(step, net, BAD).operation == "log"
    step(net, GOOD)


def test_random_streams_and_statistics_stay() -> None:
    class Noisy(mu.Module):
        def __init__(self) -> None:
            self.norm = nn.BatchNorm(3)
            self.rngs = mu.Rngs(0)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.norm(x) / (jax.random.normal(self.rngs(), x.shape) * 0)

    net = Noisy()
    before = mu.state(net)
    found = find(net, jnp.ones((2, 3)))
    assert found.operation == "div"
    for path, value in mu.state(net).items():
        for old, new in zip(jax.tree.leaves(before[path]), jax.tree.leaves(value), strict=True):
            assert old is new or bool(jnp.all(old == new))


def test_static_arguments_donated_ones_and_new_states() -> None:
    step = mu.jit(lambda x, n: x / (n - 2), static_argnames="n")
    assert find(step, jnp.ones(2), 2).operation == "div"
    scaled = mu.jit(lambda x, scale: x / scale, static_argnames="scale")
    assert find(scaled, jnp.zeros(2), 0.0).operation == "div"
    assert find(jax.jit(jnp.log, donate_argnums=0), -jnp.ones(2)).operation == "log"
    assert find(lambda x: mu.Variable(jnp.log(x)), -1.0).states == ("a new Variable",)


def test_functions_of_jax_are_at_the_line_that_calls_them() -> None:
    def first(x: jax.Array) -> jax.Array:
        return jax.nn.log_sigmoid(x)

    def second(x: jax.Array) -> jax.Array:
        return jax.nn.log_sigmoid(x) * jnp.log1p(-x)

    find(first, jnp.ones(2))
    found = find(second, jnp.full(2, 2.0))
    assert (
        found.line == f"test_nonfinite.py:{line_of(second, 'log1p')} in {second.__qualname__.replace('<locals>.', '')}"
    )


def test_an_infinite_number_that_the_program_writes() -> None:
    def into(x: jax.Array) -> jax.Array:
        x = x * 2
        return x.at[0].set(jnp.inf)  # here

    def whole(x: jax.Array) -> jax.Array:
        return x + jnp.full(2, -jnp.inf)  # here

    def inside(x: jax.Array) -> jax.Array:
        return mu.for_loop(lambda x: x * jnp.inf, x)  # here

    def difference(x: jax.Array) -> jax.Array:
        return x + jnp.inf - jnp.inf  # here

    for f in (into, whole, inside, difference):
        found = find(f, jnp.ones(2))
        assert found.operation is not None, f
        assert found.line is not None
        assert f":{line_of(f, '# here')}" in found.line
        assert "first: " in str(found)


def test_the_line_is_yours_where_a_library_is_called() -> None:
    u = pytest.importorskip("saiunit")

    def step(x: jax.Array) -> jax.Array:
        voltage = x * u.mV
        return u.math.log(voltage / u.mV)  # here

    found = find(step, -jnp.ones(2))
    assert found.operation == "log"
    assert f"test_nonfinite.py:{line_of(step, '# here')}" in str(found.line)


def test_what_cannot_be_searched() -> None:
    with pytest.raises(ArgumentError, match="cannot be called as its `f`"):
        mu.inspect.find_nonfinite(3)  # type: ignore[arg-type]
    for transform in (mu.jit, jax.jit, mu.vmap, mu.grad):
        with pytest.raises(TraceLevelError, match="cannot be searched while a function is traced"):
            transform(lambda x: find(jnp.log, x) and x.sum())(jnp.ones(2))


@pytest.mark.parametrize("options", [{}, {"checkpoint_every": 3}, {"progress": lambda done, total: None}])
def test_the_iteration_is_that_of_the_loop_as_it_is_written(options: dict[str, Any]) -> None:
    found = find(lambda xs: mu.for_loop(lambda x: jnp.sqrt(5.0 - x), xs, **options), jnp.arange(7.0))
    assert (found.iterations, found.operation) == ((6,), "sqrt")
