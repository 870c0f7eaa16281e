"""Filters: what selects what, as values, and in every operation that takes one."""

from __future__ import annotations

import pickle
from typing import Any

import jax.numpy as jnp
import pytest

import mutatis as mu
from mutatis import errors


class Slow(mu.Param):
    collection = "slow"


class Net(mu.Module):
    def __init__(self) -> None:
        self.w = mu.Param(1.0)
        self.slow = Slow(1.0, tag="big")
        self.mean = mu.BatchStat(1.0, tags=("big", "old"))
        self.cache = [mu.Cache(1.0), mu.Param(2.0)]
        self.rngs = mu.Rngs(0, dropout=1)


ALL = {
    "w",
    "slow",
    "mean",
    "cache[0]",
    "cache[1]",
    "rngs.streams.default",
    "rngs.streams.dropout",
}
STREAMS = {"rngs.streams.default", "rngs.streams.dropout"}
PARAMS = {"w", "slow", "cache[1]"}


def is_first(path: Any, variable: Any) -> bool:
    return path[-1] == 0


def selected(*filters: Any) -> set[str]:
    from mutatis.core.naming import show_path

    return {show_path(path) for path in mu.variables(Net(), *filters)}


@pytest.mark.parametrize(
    ("filter", "expected"),
    [
        (..., ALL),
        (True, ALL),
        (mu.Everything(), ALL),
        (None, set()),
        (False, set()),
        (mu.Nothing(), set()),
        (mu.Param, PARAMS),
        (mu.OfType(mu.Param), PARAMS),
        (Slow, {"slow"}),
        (mu.Variable, ALL),
        (mu.RngState, STREAMS),
        ("params", {"w", "cache[1]"}),
        ("slow", {"slow"}),
        ("batch_stats", {"mean"}),
        ("big", {"slow", "mean"}),
        ("old", {"mean"}),
        ("dropout", {"rngs.streams.dropout"}),
        ("nothing of the kind", set()),
        (mu.WithTag("big"), {"slow", "mean"}),
        (mu.PathContains("cache"), {"cache[0]", "cache[1]"}),
        (mu.PathContains(0), {"cache[0]"}),
        (mu.PathContains("rngs"), STREAMS),
        ((mu.Cache, "slow"), {"cache[0]", "slow"}),
        ([mu.Cache, "slow"], {"cache[0]", "slow"}),
        ((), set()),
        (mu.Any(), set()),
        (mu.All(), ALL),
        (mu.Any(mu.Cache, mu.BatchStat), {"cache[0]", "mean"}),
        (mu.All(mu.Param, "big"), {"slow"}),
        (mu.Not(mu.Param), ALL - PARAMS),
        (mu.Not(...), set()),
        (mu.All(mu.Variable, mu.Not(mu.Param), mu.Not(mu.RngState)), {"mean", "cache[0]"}),
        (is_first, {"cache[0]"}),
        (mu.OfType(mu.Param) & mu.PathContains("cache"), {"cache[1]"}),
        (mu.OfType(mu.Param) & Slow, {"slow"}),
        (mu.OfType(mu.Cache) | "slow", {"cache[0]", "slow"}),
        (~mu.OfType(mu.Param), ALL - PARAMS),
        (mu.Not((mu.Param, mu.RngState)), {"mean", "cache[0]"}),
    ],
)
def test_what_is_selected(filter: Any, expected: set[str]) -> None:
    assert selected(filter) == expected


def test_several_filters_select_the_union() -> None:
    assert selected(mu.Cache, "slow") == {"cache[0]", "slow"}
    assert selected() == ALL


@pytest.mark.parametrize(
    ("filter", "text"),
    [
        (mu.OfType(mu.Param), "OfType(Param)"),
        (mu.All(mu.Param, mu.Not("big")), "All(OfType(Param), Not(WithTag('big')))"),
        (mu.Any(mu.Cache, ...), "Any(OfType(Cache), Everything())"),
        (mu.PathContains(0), "PathContains(0)"),
        (mu.Nothing() | None, "Any(Nothing(), Nothing())"),
    ],
)
def test_filters_are_readable(filter: Any, text: str) -> None:
    assert repr(filter) == text


@pytest.mark.parametrize(
    "make",
    [
        lambda: mu.OfType(mu.Param),
        lambda: mu.All(mu.Param, "big"),
        lambda: mu.Any(mu.Param, is_first),
        lambda: mu.Not([mu.Param, "x"]),
        mu.Everything,
        mu.Nothing,
        lambda: mu.PathContains(("a", 1)),
        lambda: mu.WithTag("a"),
    ],
)
def test_filters_are_values(make: Any) -> None:
    assert make() == make()
    assert hash(make()) == hash(make())
    assert pickle.loads(pickle.dumps(make())) == make()
    assert isinstance(make(), mu.Filter)


def test_filters_of_other_meaning_differ() -> None:
    every = [
        mu.OfType(mu.Param),
        mu.OfType(mu.Cache),
        mu.WithTag("a"),
        mu.PathContains("a"),
        mu.All(mu.Param),
        mu.Any(mu.Param),
        mu.Not(mu.Param),
        mu.Everything(),
        mu.Nothing(),
    ]
    assert len(set(every)) == len(every)
    assert mu.All(mu.Param, mu.Cache) != mu.All(mu.Cache, mu.Param)
    assert mu.Everything() != 3


@pytest.mark.parametrize("bad", [3, 1.5, {"a": 1}, object(), [mu.Param, 3], b"params"])
def test_what_is_no_filter_is_refused(bad: Any) -> None:
    for use in (mu.state, mu.split, mu.variables, mu.pop, mu.freeze, mu.thaw, mu.reset):
        with pytest.raises(errors.FilterError, match="is not a filter") as caught:
            use(Net(), bad)
        assert "mu.Not(mu.Param)" in str(caught.value)


def test_filters_mean_the_same_everywhere() -> None:
    net = Net()
    expected = {("w",), ("slow",), ("cache", 1)}
    assert set(mu.state(net, mu.Param)) == expected
    assert set(mu.split(net, mu.Param, ...)[1]) == expected
    assert set(mu.state(net).filter(mu.Param)) == expected
    assert set(mu.state(net).split(mu.Param, ...)[0]) == expected
    assert set(mu.grad(lambda m: m.w * m.slow, wrt=mu.Param)(net)) == expected
    assert set(mu.grad(lambda m: m.w * m.slow, wrt="slow")(net)) == {("slow",)}
    with mu.freeze(net, mu.Param):
        assert {path for path, cell in mu.variables(net).items() if cell.frozen} == expected


def test_a_state_knows_kinds_but_not_metadata() -> None:
    state = mu.state(Net())
    assert set(state.filter("params")) == {("w",), ("cache", 1)}
    assert set(state.filter(mu.PathContains("cache"))) == {("cache", 0), ("cache", 1)}
    assert set(state.filter(mu.All(mu.Variable, mu.Not(mu.RngState), mu.Not(mu.Param)))) == {("mean",), ("cache", 0)}


def test_the_first_filter_that_selects_takes_a_state() -> None:
    slow, params, rest = mu.state(Net(), Slow, mu.Param, ...)
    assert (set(slow), set(params)) == ({("slow",)}, {("w",), ("cache", 1)})
    assert len(rest) == 4


def test_filters_choose_axes() -> None:
    net = mu.Module()
    net.a, net.b = mu.Param(jnp.zeros(3)), mu.Cache(0.0)
    axes = mu.StateAxes({mu.Param: 0, ...: None})
    assert float(mu.vmap(lambda m: m.a + m.b, in_axes=axes)(net).sum()) == 0
