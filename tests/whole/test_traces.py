"""How often user code is traced and XLA compiles, by transform and call pattern."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import mutatis as mu

pytestmark = pytest.mark.once


class Model(mu.Module):
    def __init__(self, size: int = 3) -> None:
        self.w = mu.Param(jnp.ones(size))
        self.calls = mu.Variable(0)
        self.blocks = [mu.Cache(jnp.zeros(size))]
        self.flag = False


def body(model: Model, x: jax.Array) -> jax.Array:
    model.calls += 1
    if model.flag:
        model.w.value = model.w + 1
    return jnp.sum(model.w.value) * x


@pytest.fixture
def counted(traces: Any) -> tuple[Callable[..., Any], Callable[[], int]]:
    function = traces.count(body)
    return function, lambda: traces[body]


X = jnp.float32(2)


def same_object(step: Any) -> None:
    model = Model()
    for _ in range(4):
        step(model, X)


def equal_new_objects(step: Any) -> None:
    for _ in range(4):
        step(Model(), X)


def other_shape_and_back(step: Any) -> None:
    model = Model()
    for x in (X, jnp.ones(4), X, jnp.ones(4)):
        step(model, x)


def other_state_shape_and_back(step: Any) -> None:
    model = Model()
    for size in (3, 5, 3, 5):
        model.w.value = jnp.ones(size)
        step(model, X)


def toggled_flag_and_back(step: Any) -> None:
    model = Model()
    for flag in (False, True, False, True):
        model.flag = flag
        step(model, X)


def toggled_mode_and_back(step: Any) -> None:
    model = Model()
    for _ in range(2):
        step(model.train(), X)
        step(model.eval(), X)


def other_list_and_back(step: Any) -> None:
    model = Model()
    extra = mu.Cache(jnp.zeros(1))
    for _ in range(2):
        step(model, X)
        model.blocks.append(extra)
        step(model, X)
        model.blocks.pop()


def a_value_read_between(step: Any) -> None:
    model = Model()
    for _ in range(4):
        step(model, X)
        assert model.w.value is not None
        model.calls.value = 0


def frozen_and_thawed(step: Any) -> None:
    model = Model()
    for _ in range(2):
        step(model, X)
        with mu.freeze(model.w):
            step(model, X)


def python_numbers(step: Any) -> None:
    model = Model()
    for x in (1.0, 2.0, 3.0):
        step(model, x)


PATTERNS = {
    same_object: 1,
    equal_new_objects: 1,
    other_shape_and_back: 2,
    other_state_shape_and_back: 2,
    toggled_flag_and_back: 2,
    toggled_mode_and_back: 2,
    other_list_and_back: 2,
    a_value_read_between: 1,
    frozen_and_thawed: 2,
    python_numbers: 1,
}


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda f: f.__name__)
def test_jit_of_a_model(pattern: Any, counted: Any) -> None:
    function, count = counted
    pattern(mu.jit(function))
    assert count() == PATTERNS[pattern]


def _scalar(f: Any) -> Any:
    return lambda model, x: jnp.sum(f(model, x))


def _with_rule(f: Any) -> Any:
    function = mu.custom_jvp(f)
    function.defjvp(lambda primals, tangents: (primals[1], tangents[1]))
    return function


# Each with the number of times that one call traces the body.
TRANSFORMS: dict[str, tuple[Callable[[Any], Any], int]] = {
    "grad": (lambda f: mu.grad(_scalar(f)), 1),
    "value_and_grad": (lambda f: mu.value_and_grad(_scalar(f), argnums=1), 1),
    "jvp": (lambda f: lambda m, x: mu.jvp(lambda x: f(m, x), (x,), (x,)), 1),
    "vjp": (lambda f: lambda m, x: mu.vjp(lambda x: f(m, x), x)[1](x)[0], 1),
    "linearize": (lambda f: lambda m, x: mu.linearize(lambda x: f(m, x), x)[1](x), 1),
    "jacfwd": (lambda f: mu.jacfwd(f), 1),
    "jacrev": (lambda f: mu.jacrev(f), 1),
    "hessian": (lambda f: mu.hessian(_scalar(f)), 1),
    "custom_jvp": (_with_rule, 1),
    "vmap": (lambda f: lambda m, x: mu.vmap(lambda y: f(m, y))(jnp.stack([x, x])), 1),
    "scan": (lambda f: lambda m, x: mu.scan(lambda c, y: (c, f(m, y)), 0, jnp.stack([x, x])), 1),
    "for_loop": (lambda f: lambda m, x: mu.for_loop(lambda y: f(m, y), jnp.stack([x, x])), 1),
    "fori_loop": (lambda f: lambda m, x: mu.fori_loop(0, 2, lambda i, y: f(m, y) * 0 + y, x), 1),
    "while_loop": (lambda f: lambda m, x: mu.while_loop(lambda y: jnp.all(y < 3), lambda y: f(m, y) * 0 + 4, x), 1),
    "map": (lambda f: lambda m, x: mu.map(lambda y: f(m, y), jnp.stack([x, x])), 1),
    "cond": (lambda f: lambda m, x: mu.cond(True, lambda: f(m, x), lambda: f(m, x)), 2),
    "switch": (lambda f: lambda m, x: mu.switch(1, [lambda: f(m, x), lambda: f(m, x)]), 2),
    "remat": (mu.remat, 1),
    "functionalize": (lambda f: lambda m, x: mu.functionalize(lambda x: f(m, x), of=m)[0](mu.state(m), x), 1),
    "jit": (mu.jit, 1),
}
CALLS = {same_object: 4, equal_new_objects: 4, other_shape_and_back: 4, toggled_flag_and_back: 4, python_numbers: 3}
COMPILED_ONCE = {
    "scan",
    "for_loop",
    "fori_loop",
    "while_loop",
    "map",
    "cond",
    "switch",
    "jit",
}  # in ordinary Python too


@pytest.mark.parametrize("pattern", CALLS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("compiled", [True, False], ids=["in jit", "eager"])
def test_the_table(name: str, pattern: Any, compiled: bool, counted: Any) -> None:
    function, count = counted
    transform, per_call = TRANSFORMS[name]
    step = transform(function)
    once = compiled or name in COMPILED_ONCE
    cast = lambda m, x: step(m, jnp.asarray(x, jnp.float32))  # noqa: E731
    runs = 0

    def stepping(model: Any, x: Any) -> Any:
        nonlocal runs
        runs += 1
        return (jitted if compiled else cast)(model, x)

    jitted = mu.jit(cast)
    pattern(stepping)
    assert runs == CALLS[pattern]
    expected = PATTERNS[pattern] if once else runs
    assert count() == per_call * expected


def test_shard_map_traces_again_for_the_placement_that_it_gives(traces: Any) -> None:
    everywhere = jax.sharding.PartitionSpec()
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    each = mu.shard_map(traces.count(body), mesh=mesh, in_specs=everywhere, out_specs=everywhere)
    step, model = mu.jit(each), Model()
    for _ in range(4):
        step(model, X)
    assert traces.total == 2, "states on one device, and then on all"


def test_other_captured_arrays_compile_nothing(traces: Any) -> None:
    n = mu.Variable(jnp.zeros(()))

    def one_round(x: jax.Array) -> None:
        def add() -> Any:
            n.value += x[0]
            return x[1]

        mu.cond(True, add, lambda: -x[0])
        assert float(mu.for_loop(lambda y: y * x[0], jnp.arange(3.0))[2]) == 2 * float(x[0])

    arrays = [jnp.full(100, float(i)) for i in range(5)]
    one_round(arrays[0])
    one_round(arrays[1])
    with traces.compilations() as compiled:
        for x in arrays[2:]:
            one_round(x)
    assert compiled.count == 0, compiled.names
    assert float(n) == 10


@pytest.mark.parametrize("pattern", [same_object, equal_new_objects, other_shape_and_back], ids=lambda f: f.__name__)
def test_compilations_are_as_many_as_traces(pattern: Any, traces: Any) -> None:
    step = mu.jit(body)
    pattern(lambda model, x: step(model, x))  # whatever JAX compiles once, such as copies and constants
    again = mu.jit(body)
    with traces.compilations() as compiled:
        pattern(lambda model, x: again(model, x))
    assert sum("body" in name for name in compiled.names) == PATTERNS[pattern]


def test_jit_of_a_closure(counted: Any) -> None:
    function, count = counted
    model = Model()
    step = mu.jit(lambda x: function(model, x))
    for _ in range(3):
        step(X)
    assert count() == 1
    model = Model()
    model.w.value = jnp.full(3, 2.0)
    assert float(step(X)) == 12
    assert int(model.calls) == 1
    assert count() == 1, "another model of the same structure"
    model = Model(5)
    step(X)
    assert count() == 2


def test_a_count_of_traces_does_not_trace_again() -> None:
    count = 0
    counts = [0]
    by_name = {"step": 0}

    @mu.jit
    def step(model: Model) -> None:
        nonlocal count
        count += 1
        counts[0] += 1
        by_name["step"] += 1
        model.calls += 1

    for _ in range(3):
        step(Model())
    assert count == counts[0] == by_name["step"] == 1


def test_captured_flags_are_noticed(traces: Any) -> None:
    model = Model()
    scale = 2.0

    @mu.jit
    @traces.count
    def step() -> Any:
        return scale * model.w.value[0]

    assert float(step()) == 2
    scale = 3.0
    assert float(step()) == 3
    scale = 2.0
    assert float(step()) == 2
    assert traces.total == 2


def test_eager_branches_and_loops_of_stable_functions(traces: Any) -> None:
    n = mu.Variable(0)

    @traces.count
    def add() -> None:
        n.value += 1

    @traces.count
    def add_and_give(carry: Any, x: Any) -> tuple[Any, Any]:
        n.value += 1
        return carry, x

    def nothing() -> None:
        pass

    for index in range(4):
        mu.cond(index % 2 == 0, add, nothing)
        mu.scan(add_and_give, None, jnp.arange(3))
    assert int(n) == 2 + 12
    assert traces[add] == 1
    assert traces[add_and_give] == 1


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_innermost_body_is_traced_once(depth: int, compiled: bool, traces: Any) -> None:
    n = mu.Variable(0)

    @traces.count
    def innermost(_: Any) -> None:
        n.value += 1

    function = innermost
    for _ in range(depth):
        function = lambda _, inner=function: mu.for_loop(inner, jnp.arange(2))  # noqa: E731
    (mu.jit(function) if compiled else function)(None)
    assert int(n) == 2**depth
    assert traces.total == 1


def test_transforms_trace_once_per_call(traces: Any) -> None:
    model = Model()
    function = traces.count(body)
    mu.grad(lambda m: function(m, X))(model)
    assert traces.total == 1
    mu.vmap(lambda x: function(model, x))(jnp.arange(3.0))
    assert traces.total == 2
    mu.jit(mu.vmap(mu.grad(lambda x: mu.remat(function)(model, x))))(jnp.arange(3.0))
    assert traces.total == 3


def test_two_programs_share_a_state() -> None:
    model = Model()
    up = mu.jit(lambda m: m.calls.set(m.calls + 1))
    double = mu.jit(lambda m: m.calls.set(m.calls * 2))
    for _ in range(3):
        up(model)
        double(model)
    assert int(model.calls) == 14


def test_only_what_is_written_comes_back() -> None:
    jaxpr = mu.make_jaxpr(lambda m: body(m, X))(Model())
    assert len(jaxpr.in_avals) == 3
    assert len(jaxpr.out_avals) == 2, "the result and the count"
