"""Captures: the states that a function names are implicit arguments, and rebinding a name is noticed."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from tests.nets import Counter


class Plain:
    """Not a module: an object that merely holds one."""

    def __init__(self, counter: Counter) -> None:
        self.counter = counter
        self.scale = 1
        self.parts = [counter]

    def count(self) -> Any:
        return self.counter.count() * self.scale

    def __call__(self) -> Any:
        return self.count()

    def indirectly(self) -> Any:
        return self.count()


THE_COUNTER = Counter()
COUNTERS = [THE_COUNTER]
HOLDER = Plain(THE_COUNTER)


def count_global() -> Any:
    return THE_COUNTER.count()


def count_through_a_function() -> Any:
    return count_global()


def count_in_a_global_list() -> Any:
    return COUNTERS[0].count()


def count_in_a_plain_global() -> Any:
    return HOLDER.counter.count()


def by_closure(c: Counter) -> Callable[[], Any]:
    return lambda: c.count()


def by_nested_closure(c: Counter) -> Callable[[], Any]:
    def inner() -> Any:
        return c.count()

    def outer() -> Any:
        return inner()

    return outer


def by_default(c: Counter) -> Callable[[], Any]:
    def f(counter: Any = c) -> Any:
        return counter.count()

    return f


def by_keyword_default(c: Counter) -> Callable[[], Any]:
    def f(*, counter: Any = c) -> Any:
        return counter.count()

    return f


def by_partial(c: Counter) -> Callable[[], Any]:
    return functools.partial(lambda counter: counter.count(), c)


def by_partial_keyword(c: Counter) -> Callable[[], Any]:
    return functools.partial(lambda *, counter: counter.count(), counter=c)


def by_method(c: Counter) -> Callable[[], Any]:
    return c.count


def by_module(c: Counter) -> Callable[[], Any]:
    return c


def by_list(c: Counter) -> Callable[[], Any]:
    counters = [1, c]
    return lambda: counters[1].count()


def by_nested_containers(c: Counter) -> Callable[[], Any]:
    counters = {"a": ({"b": [c]},)}
    return lambda: counters["a"][0]["b"][0].count()


def by_variable(c: Counter) -> Callable[[], Any]:
    n = c.n

    def f() -> Any:
        nonlocal n
        n += 1
        return n.value

    return f


def by_plain_object(c: Counter) -> Callable[[], Any]:
    plain = Plain(c)
    return lambda: plain.counter.count()


def by_plain_method(c: Counter) -> Callable[[], Any]:
    return Plain(c).count


def by_plain_callable(c: Counter) -> Callable[[], Any]:
    return Plain(c)


def by_plain_indirect_method(c: Counter) -> Callable[[], Any]:
    return Plain(c).indirectly


def by_plain_list(c: Counter) -> Callable[[], Any]:
    plain = Plain(c)
    return lambda: plain.parts[0].count()


def by_namespace(c: Counter) -> Callable[[], Any]:
    space = types.SimpleNamespace(counter=c)
    return lambda: space.counter.count()


def by_wrapper(c: Counter) -> Callable[[], Any]:
    @functools.wraps(c.count)
    def f(*args: Any) -> Any:
        return c.count(*args)

    return f


def by_transform(c: Counter) -> Callable[[], Any]:
    return mu.remat(lambda: c.count())


def by_lru_cache(c: Counter) -> Callable[[], Any]:
    @functools.cache
    def scale() -> int:
        return 1

    return lambda: c.count() * scale()


def by_function_in_a_dict(c: Counter) -> Callable[[], Any]:
    table = {"f": lambda: c.count()}
    return lambda: table["f"]()


def by_comprehension(c: Counter) -> Callable[[], Any]:
    return lambda: [counter.count() for counter in (c,)][0]  # noqa: RUF015


MAKERS = [value for name, value in list(globals().items()) if name.startswith("by_")]


@pytest.mark.parametrize("make", MAKERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("transform", ["jit", "for_loop", "cond", "grad"])
def test_what_a_function_names_is_threaded(make: Callable[[Counter], Any], transform: str, traces: Any) -> None:
    counter = Counter()
    function = make(counter)
    if transform == "jit":
        step = mu.jit(function)
        with traces.compilations() as first:
            step()
        with traces.compilations() as later:
            assert [int(step()) for _ in range(3)] == [2, 3, 4]
        assert first.count
        assert later.count == 0
    elif transform == "for_loop":
        out = mu.for_loop(lambda _: function(), jnp.arange(4))
        np.testing.assert_array_equal(out, [1, 2, 3, 4])
    elif transform == "cond":
        assert [int(mu.cond(True, function, lambda: jnp.int32(0))) for _ in range(4)] == [1, 2, 3, 4]
    else:
        for _ in range(4):
            mu.grad(lambda x: (function(), x)[1])(1.0)
    assert int(counter.n) == 4


@pytest.mark.parametrize(
    "function", [count_global, count_through_a_function, count_in_a_global_list, count_in_a_plain_global]
)
def test_globals(function: Callable[[], Any]) -> None:
    THE_COUNTER.n.value = 0
    step = mu.jit(function)
    assert [int(step()) for _ in range(3)] == [1, 2, 3]


# -- rebinding ---------------------------------------------------------------------------------------------------


def test_rebinding_a_global_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    step = mu.jit(count_through_a_function)
    THE_COUNTER.n.value = 0
    step()
    other = Counter(10)
    monkeypatch.setitem(globals(), "THE_COUNTER", other)
    assert int(step()) == 11
    assert int(other.n) == 11


def test_rebinding_a_closure_is_noticed() -> None:
    counter = Counter()
    step = mu.jit(lambda: counter.count())
    step()
    first, counter = counter, Counter(10)
    assert int(step()) == 11
    counter = first
    assert int(step()) == 2


def test_rebinding_an_attribute_of_a_plain_object_is_noticed() -> None:
    plain = Plain(Counter())
    step = mu.jit(lambda: plain.counter.count() * plain.scale)
    assert [int(step()) for _ in range(2)] == [1, 2]
    plain.counter = Counter(10)
    assert int(step()) == 11
    plain.scale = 2
    assert int(step()) == 24


def test_attributes_that_another_function_loads_are_noticed() -> None:
    plain = Plain(Counter())
    plain.shift = 0.0

    def shifted(x: Any) -> Any:
        return x + plain.shift

    step = mu.jit(lambda x: shifted(x * plain.scale))
    assert float(step(1.0)) == 1
    plain.shift = 5.0
    assert float(step(1.0)) == 6
    plain.scale = 3.0
    assert float(step(1.0)) == 8


def test_replacing_an_item_of_a_captured_container_is_noticed() -> None:
    counters = [Counter()]
    step = mu.jit(lambda: counters[0].count())
    step()
    counters[0] = Counter(10)
    assert int(step()) == 11
    counters[:] = [Counter(20), Counter(30)]
    assert int(step()) == 21


def test_a_captured_number_is_noticed() -> None:
    table = {"scale": 2.0, "more": [1.0]}
    step = mu.jit(lambda x: x * table["scale"] + table["more"][0])
    assert float(step(1.0)) == 3
    table["scale"] = 5.0
    assert float(step(1.0)) == 6
    table["more"][0] = 2.0
    assert float(step(1.0)) == 7


def test_a_captured_array_is_noticed() -> None:
    array = jnp.ones(3)
    step = mu.jit(lambda: array * 2)
    np.testing.assert_array_equal(step(), [2, 2, 2])
    array = jnp.full(3, 5.0)
    np.testing.assert_array_equal(step(), [10, 10, 10])
    array = jnp.zeros(100)
    assert step().shape == (100,)


def test_a_function_that_is_named_is_noticed() -> None:
    helper = jnp.sin
    step = mu.jit(lambda x: helper(x))
    assert float(step(0.0)) == 0
    helper = jnp.cos
    assert float(step(0.0)) == 1
    helper = lambda x: x + 7  # noqa: E731
    assert float(step(0.0)) == 7


def test_a_state_found_by_tracing_is_threaded_with_a_warning() -> None:
    @functools.cache
    def registry() -> Counter:
        return Counter()

    registry()
    step = mu.jit(lambda: registry().count())
    with pytest.warns(mu.CapturedStateWarning, match=r"`Counter\.n` \(Variable\)") as caught:
        step()
    text = str(caught[0].message)
    assert "jit(" in text
    assert "Pass it as an argument, or name it" in text
    assert [int(step()) for _ in range(2)] == [2, 3], "threaded, and warned about once"


def test_rebinding_a_class_attribute_is_noticed() -> None:
    class Registry:
        counter = Counter()

    step = mu.jit(lambda: Registry.counter.count())
    assert [int(step()) for _ in range(2)] == [1, 2]
    Registry.counter = Counter(10)
    assert int(step()) == 11


@pytest.mark.parametrize("kind", ["registry", "factory"])
def test_other_ways_to_hide_a_state(kind: str) -> None:
    hidden = types.MappingProxyType({"c": Counter()})

    @functools.cache
    def factory() -> Counter:
        return Counter()

    factory()
    step = mu.jit((lambda: hidden["c"].count()) if kind == "registry" else (lambda: factory().count()))
    try:
        first = int(step())
    except mu.CapturedStateWarning:
        with pytest.warns(mu.CapturedStateWarning):
            first = int(step())
    assert first == 1
    assert [int(step()) for _ in range(2)] == [2, 3]


def test_the_warning_names_each_state_once() -> None:
    @functools.cache
    def registry(_: str) -> mu.Variable:
        return mu.Variable(0)

    a, b = registry("a"), registry("b")

    def step() -> None:
        registry("a").value += 1
        registry("b").value += registry("a").value

    compiled = mu.jit(step)
    with pytest.warns(mu.CapturedStateWarning) as caught:
        compiled()
    assert len(caught) == 2
    compiled()
    assert (int(a), int(b)) == (2, 3)


def test_an_argument_that_is_captured_too_stays_one() -> None:
    counter = Counter()

    @mu.jit
    def step(c: Counter) -> Any:
        c.n += 1
        counter.n += 10
        return c.n.value

    assert int(step(counter)) == 11
    other = Counter(100)
    assert int(step(other)) == 101
    assert int(counter.n) == 21


def test_a_recursive_function() -> None:
    counter = Counter()

    def down(n: int) -> Any:
        return counter.count() if n == 0 else down(n - 1)

    step = mu.jit(lambda: down(3))
    assert [int(step()) for _ in range(2)] == [1, 2]


def test_unrelated_globals_do_not_matter(monkeypatch: pytest.MonkeyPatch, traces: Any) -> None:
    counter = Counter()
    step = mu.jit(traces.count(lambda: counter.count()))
    step()
    monkeypatch.setitem(globals(), "UNRELATED", 3)
    monkeypatch.setitem(globals(), "COUNTERS", [])
    step()
    assert traces.total == 1


def test_a_name_bound_after_jit_was_made() -> None:
    @mu.jit
    def step() -> Any:
        return later.count()

    later = Counter()
    assert [int(step()) for _ in range(2)] == [1, 2]


def test_a_generator_and_a_class_inside_the_function() -> None:
    counter = Counter()

    def f() -> Any:
        class Local:
            def run(self) -> Any:
                return counter.count()

        return sum(x for x in (Local().run(), Local().run()))

    step = mu.jit(f)
    assert [int(step()) for _ in range(2)] == [3, 7]


def test_modules_in_instances_of_frozen_dataclasses_and_slots() -> None:
    class Slotted:
        __slots__ = ("counter",)

        def __init__(self, counter: Counter) -> None:
            self.counter = counter

    slotted = Slotted(Counter())
    step = mu.jit(lambda: slotted.counter.count())
    try:
        step()
    except mu.CapturedStateWarning:
        with pytest.warns(mu.CapturedStateWarning):
            step()
    before = int(slotted.counter.n)
    step()
    assert int(slotted.counter.n) == before + 1


def test_raw_jax_functions_are_searched_too() -> None:
    counter = Counter()
    vmapped = jax.vmap(lambda x: x * counter.n.value)
    step = mu.jit(lambda x: (counter.count(), vmapped(x))[1])
    np.testing.assert_array_equal(step(jnp.arange(3)), [0, 1, 2])
    np.testing.assert_array_equal(step(jnp.arange(3)), [0, 2, 4])
