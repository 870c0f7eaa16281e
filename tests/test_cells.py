"""Leases: what is donated, what is copied, who waits."""

from __future__ import annotations

import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import cells


class Holder(mu.Module):
    def __init__(self, value: Any) -> None:
        self.v = mu.Variable(value)


@mu.jit
def increment(model: Holder) -> None:
    model.v.value = model.v + 1


def settled() -> Holder:
    """A model whose state was made by a compiled program and has not been handed out."""
    model = Holder(jnp.arange(8.0))
    increment(model)
    return model


def test_a_program_donates_what_programs_made() -> None:
    model = settled()
    inside = model.v._value
    increment(model)
    assert inside.is_deleted()


def keep_value(model: Holder) -> Any:
    return model.v.value


def keep_state(model: Holder) -> Any:
    return mu.state(model)[("v",)]


def keep_snapshot(model: Holder) -> Any:
    return mu.snapshot(model)._values[model.v]


def keep_pytree(model: Holder) -> Any:
    return jax.tree.leaves(model)[0]


def keep_iterated(model: Holder) -> Any:
    return model.v[...]


def keep_from_grad(model: Holder) -> Any:
    return mu.grad(lambda: (jnp.sum(model.v.value), model.v.value), has_aux=True, of=model, wrt=mu.Variable)()[1]


@pytest.mark.parametrize(
    "keep",
    [keep_value, keep_state, keep_snapshot, keep_pytree, keep_iterated, keep_from_grad],
    ids=lambda f: f.__name__,
)
def test_what_was_handed_out_is_copied(keep: Any) -> None:
    model = settled()
    kept = keep(model)
    before = np.asarray(kept).copy()
    increment(model)
    increment(model)
    np.testing.assert_array_equal(np.asarray(kept), before)
    np.testing.assert_array_equal(np.asarray(model.v), before + 2)


def test_a_copy_is_made_once() -> None:
    model = settled()
    _ = model.v.value
    increment(model)
    inside = model.v._value
    increment(model)
    assert inside.is_deleted(), "after the copy the state is the program's own again"


@pytest.mark.parametrize(
    "alias", [np.asarray, lambda x: jax.device_put(x, x.sharding), lambda x: x.addressable_data(0)]
)
def test_aliases_stay_intact(alias: Any) -> None:
    model = settled()
    other = alias(model.v.value)
    before = np.asarray(other).copy()
    for _ in range(3):
        increment(model)
    np.testing.assert_array_equal(np.asarray(other), before)


def test_two_cells_may_hold_one_array() -> None:
    array = jnp.arange(4.0)
    pair = mu.Module()
    pair.a, pair.b = mu.Variable(array), mu.Variable(array)

    @mu.jit
    def step(pair: Any) -> None:
        pair.a.value = pair.a + 1
        pair.b.value = pair.b * 2

    for _ in range(3):
        step(pair)
    np.testing.assert_array_equal(np.asarray(pair.a), np.arange(4.0) + 3)
    np.testing.assert_array_equal(np.asarray(pair.b), np.arange(4.0) * 8)
    np.testing.assert_array_equal(np.asarray(array), np.arange(4.0))


def test_a_state_may_be_an_argument_too() -> None:
    model = settled()

    @mu.jit
    def step(model: Holder, x: jax.Array) -> jax.Array:
        model.v.value = model.v + x
        return x

    before = np.asarray(model.v).copy()
    out = step(model, model.v.value)
    np.testing.assert_array_equal(np.asarray(out), before)
    np.testing.assert_array_equal(np.asarray(model.v), 2 * before)


@pytest.mark.parametrize("donate", [False, "auto", True])
def test_donate_option(donate: Any) -> None:
    step = mu.jit(lambda m: m.v.set(m.v + 1), donate=donate)
    model = Holder(jnp.zeros(4))
    step(model)
    inside = model.v._value
    step(model)
    assert inside.is_deleted() == bool(donate)


def test_programs_that_call_back_do_not_donate() -> None:
    def fails(x: Any) -> Any:
        if fail:
            raise ValueError("no")
        return x

    @mu.jit
    def step(model: Holder) -> None:
        model.v.value = jax.pure_callback(fails, jax.ShapeDtypeStruct((8,), jnp.float32), model.v.value) + 1

    fail = False
    model = Holder(jnp.zeros(8))
    step(model)
    step(model)
    fail = True
    with pytest.raises(Exception, match="no"):
        step(model)
    np.testing.assert_array_equal(np.asarray(model.v), np.full(8, 2.0))


def test_a_debug_print_does_not_keep_from_donating(capfd: pytest.CaptureFixture[str]) -> None:
    @mu.jit
    def step(model: Holder) -> None:
        jax.debug.print("v {}", model.v.value[0])
        model.v.value = model.v + 1

    model = Holder(jnp.zeros(8))
    step(model)
    inside = model.v._value
    step(model)
    jax.effects_barrier()
    assert inside.is_deleted()


def test_results_are_checked_before_they_are_committed() -> None:
    @mu.jit
    def step(model: Holder) -> None:
        model.v.value = jnp.log(model.v - 2)

    model = Holder(jnp.full(4, 3.0))
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        step(model)
        step(model)
    assert np.isfinite(np.asarray(model.v)).all()


def test_a_reader_never_finds_a_deleted_array() -> None:
    model = Holder(jnp.zeros(1000))
    increment(model)
    stop = threading.Event()
    problems: list[BaseException] = []
    seen: list[float] = []

    def read() -> None:
        try:
            while not stop.is_set():
                seen.append(float(np.asarray(model.v.value)[0]))
        except BaseException as problem:
            problems.append(problem)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(1500):
        increment(model)
    stop.set()
    reader.join()
    assert not problems
    assert seen == sorted(seen)
    assert float(model.v.value[0]) == 1501


@pytest.mark.parametrize("count", [2, 8])
def test_steps_of_several_threads_are_in_some_order(count: int) -> None:
    model = Holder(jnp.zeros(8))
    increment(model)
    problems: list[BaseException] = []

    def train() -> None:
        try:
            for _ in range(200):
                increment(model)
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=train) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert float(model.v.value[0]) == 200 * count + 1


def test_placeholders_are_empty_pytrees() -> None:
    assert jax.tree.leaves(cells.UNSET) == []
    assert len(jax.tree.leaves(cells.Deferred(jax.random.key(0)))) == 1
