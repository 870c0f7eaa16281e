"""Leases: what is donated, what is copied, who waits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis.core import cells


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


SNAPSHOTS: list[Any] = []  # one that is dropped holds nothing


def keep_snapshot(model: Holder) -> Any:
    SNAPSHOTS.append(mu.snapshot(model))
    return SNAPSHOTS[-1]._values[model.v]


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


ALIASES: dict[str, Callable[[jax.Array], Any]] = {
    "numpy": np.asarray,
    "numpy view": lambda x: np.asarray(x)[2:],
    "buffer protocol": lambda x: memoryview(x) if hasattr(x, "__buffer__") else np.asarray(x),
    "dlpack to numpy": np.from_dlpack,
    "dlpack to jax": jnp.from_dlpack,
    "device_put": lambda x: jax.device_put(x, x.sharding),
    "device_put may_alias": lambda x: jax.device_put(x, may_alias=True),
    "addressable_data": lambda x: x.addressable_data(0),
    "addressable_shards": lambda x: x.addressable_shards[0].data,
    "single device arrays": lambda x: jax.make_array_from_single_device_arrays(
        x.shape, x.sharding, [shard.data for shard in x.addressable_shards]
    ),
    "jnp.asarray": jnp.asarray,
    "reshape": lambda x: x.reshape(x.shape),
}


@pytest.mark.parametrize("made_by", ["program", "user"])
@pytest.mark.parametrize("alias", ALIASES.values(), ids=ALIASES)
def test_aliases_stay_intact(alias: Callable[[jax.Array], Any], made_by: str) -> None:
    if made_by == "program":
        model = settled()
        other = alias(model.v.value)
    else:
        array = jnp.arange(1.0, 9.0)
        other = alias(array)
        model = Holder(array)
        del array
    before = np.asarray(other).copy()
    for _ in range(3):
        increment(model)
    np.testing.assert_array_equal(np.asarray(other), before)
    np.testing.assert_array_equal(np.asarray(model.v), np.arange(1.0, 9.0) + 3)


def test_the_data_of_a_random_key_stays_intact() -> None:
    key = mu.Variable(jax.random.key(0))

    @mu.jit
    def draw() -> jax.Array:
        key.value = jax.random.fold_in(key.value, 1)
        return jax.random.bits(key.value)

    draw()
    data = jax.random.key_data(key.value)
    before = np.asarray(data).copy()
    draw()
    draw()
    np.testing.assert_array_equal(np.asarray(data), before)


def test_sharded_states_are_donated_and_their_shards_stay_intact() -> None:
    mesh = jax.make_mesh((4,), ("x",))
    sharding = jax.NamedSharding(mesh, jax.P("x"))
    model = Holder(jax.device_put(jnp.arange(8.0), sharding))
    increment(model)
    inside = model.v._value
    increment(model)
    assert inside.is_deleted()
    shard = model.v.value.addressable_shards[1].data
    whole = jax.make_array_from_single_device_arrays(
        (8,), sharding, [part.data for part in model.v.value.addressable_shards]
    )
    increment(model)
    np.testing.assert_array_equal(np.asarray(shard), [4.0, 5.0])
    np.testing.assert_array_equal(np.asarray(whole), np.arange(8.0) + 2)
    assert model.v.value.sharding == sharding


def test_one_array_as_state_and_as_argument() -> None:
    array = jnp.arange(8.0)
    model = Holder(array)

    @mu.jit
    def step(model: Holder, x: jax.Array, *, y: jax.Array) -> None:
        model.v.value = model.v + x + y

    step(model, array, y=array)
    step(model, array, y=model.v.value)
    np.testing.assert_array_equal(np.asarray(array), np.arange(8.0))
    np.testing.assert_array_equal(np.asarray(model.v), np.arange(8.0) * 7)


def test_a_step_inside_a_step_leaves_the_outer_one_in_charge() -> None:
    model = settled()

    @mu.jit
    def outer(model: Holder) -> jax.Array:
        before = model.v.value
        increment(model)
        increment(model)
        return 2 * before

    inside = model.v._value
    out = outer(model)
    assert inside.is_deleted()
    np.testing.assert_array_equal(np.asarray(out), 2 * np.arange(8.0) + 2)
    np.testing.assert_array_equal(np.asarray(model.v), np.arange(8.0) + 3)


def test_inside_an_open_transaction_nothing_is_donated() -> None:
    model = settled()

    def undone() -> None:
        increment(model)
        increment(model)
        raise KeyError("undo")

    with pytest.raises(KeyError, match="undo"):
        mu.remat(undone)()
    np.testing.assert_array_equal(np.asarray(model.v), np.arange(8.0) + 1)


def test_a_failure_before_the_launch_loses_nothing() -> None:
    model = settled()

    @mu.jit
    def step(model: Holder, x: Any) -> None:
        model.v.value = model.v + x

    step(model, jnp.ones(8))
    step(model, jnp.ones(8))
    deleted = jnp.ones(8)
    deleted.delete()
    with pytest.raises(RuntimeError, match="deleted"):
        step(model, deleted)
    np.testing.assert_array_equal(np.asarray(model.v), np.arange(8.0) + 3)
    step(model, jnp.ones(8))
    np.testing.assert_array_equal(np.asarray(model.v), np.arange(8.0) + 4)


def test_what_a_callback_was_given_stays_intact() -> None:
    kept = []
    model = settled()

    @mu.jit
    def step(model: Holder) -> None:
        jax.debug.callback(kept.append, model.v.value)
        model.v.value = model.v + 1

    for _ in range(3):
        step(model)
    jax.effects_barrier()
    for index, seen in enumerate(sorted(kept, key=lambda x: float(x[0]))):
        np.testing.assert_array_equal(np.asarray(seen), np.arange(8.0) + 1 + index)


# -- how much is handed over and reused --------------------------------------------------------------------------


class Mixed(mu.Module):
    """States that a step writes, and others that it only reads."""

    def __init__(self, written: int, read: int) -> None:
        self.written = [mu.Variable(jnp.zeros((4, size + 1))) for size in range(written)]
        self.read = [mu.Cache(jnp.ones(16)) for _ in range(read)]


@mu.jit
def advance(model: Mixed, x: jax.Array) -> jax.Array:
    for cell in model.written:
        cell.value = cell + x + sum(jnp.sum(c.value) for c in model.read)
    return x + 1


@pytest.mark.parametrize("written", [0, 1, 20])
@pytest.mark.parametrize("read", [0, 3])
def test_arguments_results_and_donated_bytes(written: int, read: int) -> None:
    model = Mixed(written, read)
    compiled = advance.lower(model, jnp.float32(1)).compile()
    arguments, _ = compiled.args_info
    flat = jax.tree.leaves(arguments, is_leaf=lambda leaf: hasattr(leaf, "donated"))
    assert len(flat) == written + read + 1
    assert sum(info.donated for info in flat) == written, "what is only read stays with its owner"
    assert (
        len(jax.tree.leaves(compiled.out_avals if hasattr(compiled, "out_avals") else compiled.out_info)) == written + 1
    )
    used = 4 * 16 * read if written else 0  # XLA is given nothing that is not used
    size = sum(4 * 4 * (index + 1) for index in range(written))
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == size
    assert memory.argument_size_in_bytes == size + used + 4
    assert memory.output_size_in_bytes >= size + 4


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
