"""`mu.on_commit`: each commit is heard of once, all of it, however it was made, and nothing that was rolled back."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis.core import committed
from tests.nets import Mixed as Net


@pytest.fixture
def log() -> list[Any]:
    return []


COMMITS: dict[str, Callable[[Net], Any]] = {
    "an assignment": lambda net: net.w.set(net.w * 2),
    "jit": lambda net: mu.jit(lambda: net.w.set(net.w * 2))(),
    "two writes in jit": lambda net: mu.jit(lambda: [net.w.set(net.w * s) for s in (1, 2)])(),
    "update": lambda net: mu.update(net, {"w": net.w * 2}),
    "scan": lambda net: mu.for_loop(lambda x: net.w.set(net.w * x), jnp.array([2.0])),
    "grad": lambda net: mu.grad(lambda x: (net.w.set(net.w * 2), x)[1])(1.0),
    "a transaction": lambda net: by_parts(net),
    "a restored snapshot": lambda net: doubled(net).restore(),
    "compiled before": lambda net: mu.jit(lambda: net.w.set(net.w * 2)).lower().compile()(),
}


def by_parts(net: Net) -> None:
    with mu.transaction():
        net.w.value = net.w * 7
        with mu.transaction():
            net.w.value = net.w * 2 / 7


def doubled(net: Net) -> Any:
    other = Net()
    other.w.value = net.w * 2
    snapshot = mu.snapshot(net)
    snapshot._values[net.w] = other.w.value
    return snapshot


@pytest.mark.parametrize("name", COMMITS)
def test_each_commit_is_observed_once(name: str, log: list[Any]) -> None:
    net = Net()
    with mu.on_commit(net, lambda path, state: log.append((path, np.asarray(state).tolist())), mu.Param):
        COMMITS[name](net)
    assert log == [(("w",), [0, 2, 4])]
    COMMITS[name](net)
    assert len(log) == 1


def test_a_jitted_step_from_before_is_observed_and_not_compiled_again(log: list[Any], traces: Any) -> None:
    net = Net()
    counted = traces.count(net.step)
    step = mu.jit(counted)
    step()
    with traces.compilations() as seen:
        observation = mu.on_commit([net], lambda path, state: log.append(path))
        step()
        assert sorted(log) == [(0, "items", 0), (0, "tree"), (0, "w")]
        observation.stop()
        step()
    assert len(log) == 3 and traces[counted] == 1
    assert not any("step" in name for name in seen.names)


def test_observers_see_all_of_a_commit(log: list[Any]) -> None:
    a, b = mu.Variable(0), mu.Variable(0)
    mu.on_commit([a, b], lambda path, _: log.append((int(a), int(b))))
    mu.update([a, b], {0: 1, 1: 1})
    mu.jit(lambda: (a.set(a + 1), b.set(b + 1)))()
    with mu.transaction():
        a.value, b.value = jnp.int32(3), jnp.int32(3)
    assert log == [(1, 1), (1, 1), (2, 2), (2, 2), (3, 3), (3, 3)]


def test_what_is_rolled_back_is_not_observed(log: list[Any]) -> None:
    net = Net()
    mu.on_commit(net, lambda path, _: log.append(path))
    with mu.transaction(net) as tx:
        net.step()
        tx.rollback()
    with pytest.raises(KeyError), mu.transaction(net):
        net.step()
        raise KeyError
    assert log == []


def test_an_observer_that_raises(log: list[Any]) -> None:
    net = Net()

    def check(path: Any, state: Any) -> None:
        if jnp.any(state.value > 3):
            raise OverflowError(path)

    mu.on_commit(net.w, check)
    step = mu.jit(net.step)
    with pytest.raises(OverflowError):
        step()
    np.testing.assert_array_equal(net.w, [0, 2, 4])
    assert net.items[0] == 1
    with pytest.raises(OverflowError), mu.transaction():
        step()
    np.testing.assert_array_equal(net.w, [0, 4, 8])


def test_an_observation_lasts_as_long_as_its_states(log: list[Any]) -> None:
    net = Net()
    before = len(committed.observers)
    mu.on_commit(net.w, lambda path, _: log.append(path))
    assert len(committed.observers) == before + 1
    reference = weakref.ref(net.w)
    del net
    gc.collect()
    assert reference() is None
    assert len(committed.observers) <= before


def test_observers_have_to_be_functions() -> None:
    with pytest.raises(mu.errors.ArgumentError, match="needs a function"):
        mu.on_commit(Net(), 3)
