"""Watches and histories: each commit once, what broke, no copies, and the way back."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mutatis as mu
from mutatis.errors import ArgumentError, CheckError, FilterError
from mutatis.inspect import StateWatchWarning


class Net(mu.Module):
    def __init__(self) -> None:
        self.w = mu.Param(jnp.ones(3))
        self.b = mu.Param(jnp.zeros(3))
        self.n = mu.Variable(0)
        self.rngs = mu.Rngs(0)


@mu.jit
def step(net: Net, factor: Any) -> None:
    net.w.value *= factor
    net.b.value += factor
    net.n.value += 1


def test_a_watch_raises_after_the_commit() -> None:
    net = Net()
    with mu.inspect.watch(net):
        step(net, 2.0)
        with pytest.raises(CheckError, match=r"state `b` breaks what is asked of it, after commit 2") as caught:
            step(net, jnp.inf)
    assert (caught.value.path, caught.value.got) == ("b", "float32[3] inf")
    assert caught.value.differences == ("so does: w",)
    assert int(net.n) == 2
    assert not np.isfinite(net.w.value).any()
    step(net, 1.0)  # it is over


def test_it_warns_or_records() -> None:
    net = Net()
    small = lambda x: jnp.abs(x) < 10  # noqa: E731
    with mu.inspect.watch(net, mu.Param, small, action="record") as watch:
        for factor in (3.0, 5.0, 0.01):
            step(net, factor)
        net.b.value = jnp.full(3, 20.0)
    assert [(one.path, one.commit) for one in watch.broken] == [("w", 2), ("b", 4)]
    np.testing.assert_allclose(watch.broken[0].value, 15.0)
    assert watch.commits == 4
    with mu.inspect.watch(net, mu.Param, small, action="warn"), pytest.warns(StateWatchWarning, match="`b`"):
        step(net, 1.0)


def test_one_program_looks_at_all_states_of_a_commit() -> None:
    net = Net()
    with mu.inspect.watch(net) as watch:
        for _ in range(5):
            step(net, 1.0)
        assert watch._check._cache_size() == 1
        assert watch.commits == 5


def test_a_watch_copies_nothing() -> None:
    """The looked-at arrays are given back: the next step donates them."""
    net = Net()
    step(net, 1.0)
    with mu.inspect.watch(net):
        step(net, 1.0)
        for _ in range(3):
            before = net.w._value  # behind the back of the state: this counts as no reader
            step(net, 1.0)
            assert before.is_deleted()


def test_what_is_no_number_is_finite() -> None:
    net = Net()
    net.keys = mu.Variable(jax.random.key(0))
    with mu.inspect.watch(net):
        net.keys.value = jax.random.key(1)
        net.rngs()
        net.n.value = 3


def test_a_watch_sees_transactions_as_one_commit() -> None:
    net = Net()
    with mu.inspect.watch(net) as watch:
        with mu.transaction():
            net.w.value = net.w.value * jnp.inf
            net.w.value = jnp.ones(3)
        assert watch.commits == 1


@pytest.mark.parametrize(
    ("more", "problem"), [({"predicate": 3}, "predicate=3"), ({"action": "stop"}, "action='stop'")], ids=str
)
def test_bad_input_of_a_watch(more: dict[str, Any], problem: str) -> None:
    with pytest.raises(ArgumentError, match=problem):
        mu.inspect.watch(Net(), mu.Param, **more)


def test_a_history_and_the_way_back() -> None:
    net = Net()
    with mu.inspect.history(net, mu.Param, n=3) as past:
        for factor in (2.0, 3.0, 4.0, 5.0):
            step(net, factor)
        assert len(past) == 4
        assert [float(version["w"][0]) for version in past] == [2.0, 6.0, 24.0, 120.0]
        assert [float(version["b"][0]) for version in past[1:]] == [5.0, 9.0, 14.0]
        assert past.commits == 4
        assert "n" not in past[0]
        assert float(past.rollback(2)["w"][0]) == 6.0
        assert (float(net.w.value[0]), float(net.b.value[0]), int(net.n)) == (6.0, 5.0, 4)
        assert len(past) == 2
        step(net, 2.0)
        assert [float(version["w"][0]) for version in past] == [2.0, 6.0, 12.0]
        past.rollback(0)
        with pytest.raises(ArgumentError, match="cannot go back by 9"):
            past.rollback(9)
    step(net, 2.0)
    assert len(past) == 3


def test_a_history_survives_donation() -> None:
    net = Net()
    optimizer = mu.Optimizer(net, optax.adam(0.1))
    with mu.inspect.history([net, optimizer], n=20) as past:

        @mu.jit
        def train(net: Net, optimizer: mu.Optimizer) -> None:
            optimizer.update(mu.grad(lambda net: (net.w.value**2).sum())(net))

        with jax.numpy_dtype_promotion("standard"):
            for _ in range(6):
                train(net, optimizer)
        values = [np.asarray(version[0, "w"]) for version in past]
        assert len({value.tobytes() for value in values}) == 7
        past.rollback(6)
        np.testing.assert_array_equal(net.w.value, 1.0)
        with jax.numpy_dtype_promotion("standard"):
            train(net, optimizer)
        np.testing.assert_array_equal(net.w.value, values[1])


def test_a_step_that_fails_is_no_version() -> None:
    net = Net()

    @mu.jit
    def fails(net: Net) -> None:
        net.w.value -= 5
        mu.error_if(net.w.value < 0, "negative")

    with mu.inspect.history(net) as past:
        with pytest.raises(CheckError):
            fails(net)
        assert len(past) == 1


def test_bad_input_of_a_history() -> None:
    with pytest.raises(ArgumentError, match="cannot keep 0 versions"):
        mu.inspect.history(Net(), n=0)


def test_nothing_is_watched_after_the_end() -> None:
    net = Net()
    watch, past = mu.inspect.watch(net), mu.inspect.history(net)
    watch.stop()
    past.stop()
    step(net, jnp.nan)
    assert (watch.commits, past.commits) == (0, 0)


@pytest.mark.parametrize("use", [mu.inspect.watch, mu.inspect.history])
def test_a_filter_that_selects_nothing(use: Any) -> None:
    net = mu.nn.BatchNorm(3)
    for filter in ("zz", mu.Cache, mu.PathContains("layers"), None):
        with pytest.raises(FilterError, match=r"(?s)no state to watch.*in a model of Param, BatchStat"):
            use(net, filter)
    with pytest.raises(FilterError, match=r"(?s)no state to watch.*expected: a model that has states"):
        use(mu.nn.Sequential())
