"""A State or snapshot that is dropped before anybody looks at its arrays costs no copy; any look keeps them for good."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis.compilation import dispatch


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    found: list[int] = []
    original = dispatch.copy_values

    def counted(values: list[Any]) -> Any:
        found.append(len(values))
        return original(values)

    monkeypatch.setattr(dispatch, "copy_values", counted)
    return found


class Net(mu.Module):
    def __init__(self) -> None:
        self.w = mu.Param(jnp.arange(4.0))
        self.n = {"a": mu.Cache(jnp.ones(3)), "b": mu.Cache(jnp.ones(2))}


@mu.jit
def step(net: Net) -> None:
    for cell in mu.variables(net).values():
        cell.value = cell.value + 1


def settled() -> Net:
    net = Net()
    step(net)
    step(net)
    return net


LOOKS: dict[str, Callable[[mu.State], Any]] = {
    "nothing": lambda state: None,
    "length": len,
    "paths": list,
    "kinds": lambda state: state.kinds(),
    "repr": repr,
    "contains": lambda state: "w" in state,
    "a part": lambda state: state["n"],
    "a part of a part": lambda state: state.filter(mu.Cache)["n"].split(...),
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("take", [mu.state, lambda net: mu.split(net)[1], lambda net: mu.state(net, mu.Param, ...)[1]])
def test_what_is_dropped_unseen_is_not_copied(look: str, take: Any, copies: list[int]) -> None:
    net = settled()
    copies.clear()
    for _ in range(3):
        LOOKS[look](take(net))
        step(net)
    assert copies == []


TAKES: dict[str, Callable[[mu.State], Any]] = {
    "a value": lambda state: state["w"],
    "a value of a part": lambda state: state["n"]["a"],
    "values": lambda state: [*state.values()],
    "items": lambda state: [*state.items()],
    "get": lambda state: state.get(("w",)),
    "leaves": jax.tree.leaves,
    "with paths": jax.tree_util.tree_leaves_with_path,
    "flat": lambda state: state.flat(),
    "dict": lambda state: state.to_pure_dict(),
    "map": lambda state: state.map(lambda path, x: x),
    "another": lambda state: state | mu.State.from_flat({("z",): 1.0}),
    "a copy": copy.copy,
    "the state itself": lambda state: state,
    "its part": lambda state: state.filter(mu.Param),
    "a part of its part": lambda state: state.filter(...)["n"],
}


@pytest.mark.parametrize("take", TAKES)
def test_what_was_taken_out_stays(take: str) -> None:
    net = settled()
    kept = TAKES[take](mu.state(net))
    gc.collect()
    before = [np.array(leaf) for leaf in jax.tree.leaves(kept) if isinstance(leaf, jax.Array)]
    step(net)
    step(net)
    after = [np.asarray(leaf) for leaf in jax.tree.leaves(kept) if isinstance(leaf, jax.Array)]
    assert len(before) == len(after) > 0
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)


def test_two_states_of_one_model() -> None:
    net = settled()
    first, second = mu.state(net), mu.state(net)
    del first
    step(net)
    np.testing.assert_array_equal(second["w"], jnp.arange(4.0) + 2)


def test_arrays_that_the_user_stored_stay_his(copies: list[int]) -> None:
    net = settled()
    copies.clear()
    mine = jnp.full(4, 7.0)
    net.w.value = mine
    mu.state(net)
    step(net)
    np.testing.assert_array_equal(mine, jnp.full(4, 7.0))
    assert copies == [1]


def test_a_snapshot_is_the_models_only_while_it_is_there(copies: list[int]) -> None:
    net = settled()
    copies.clear()
    mu.snapshot(net)
    step(net)
    assert copies == []
    before = mu.snapshot(net)
    step(net)
    assert copies == [3]
    before.restore()
    del before
    np.testing.assert_array_equal(net.w.value, jnp.arange(4.0) + 3)
    step(net)
    assert copies == [3, 3], "what is put back may be held"


def test_a_clone_shares_arrays_that_no_step_deletes() -> None:
    net = settled()
    twin = mu.clone(net)
    step(net)
    step(twin)
    step(twin)
    np.testing.assert_array_equal(net.w.value, jnp.arange(4.0) + 3)
    np.testing.assert_array_equal(twin.w.value, jnp.arange(4.0) + 4)


def test_it_is_pickled_as_ever() -> None:
    state = mu.state(settled())
    again = pickle.loads(pickle.dumps(state))
    assert again == state and again.kinds() == state.kinds()
    assert copy.deepcopy(state) == state


def test_threads_that_look_while_steps_run() -> None:
    net = settled()
    stop, wrong = threading.Event(), []

    def look() -> None:
        while not stop.is_set():
            state = mu.state(net)
            if len({float(jnp.sum(state["w"])) - 6, float(jnp.sum(state["w"])) - 6}) != 1:
                wrong.append(state)

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        step(net)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    np.testing.assert_array_equal(net.w.value, jnp.arange(4.0) + 202)
