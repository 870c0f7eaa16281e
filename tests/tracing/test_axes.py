"""Axes by filter: what `StateAxes` means, and what contradicts itself."""

from __future__ import annotations

import pickle
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import errors


class Pair(mu.Module):
    def __init__(self) -> None:
        self.w = mu.Param(jnp.arange(3.0))
        self.n = mu.Cache(jnp.float32(0))
        self.table = mu.Buffer(jnp.arange(6.0).reshape(2, 3))


def test_the_first_filter_that_selects_decides() -> None:
    axes = mu.StateAxes({mu.Param: 0, "cache": None, mu.Variable: 1})
    assert axes.of(("w",), mu.Param(0)) == 0
    assert axes.of(("n",), mu.Cache(0)) is None
    assert axes.of(("n",), mu.Buffer(0)) == 1
    assert mu.StateAxes({mu.Param: 0}).of(("n",), mu.Cache(0)) is None


def test_axes_are_values() -> None:
    def make() -> mu.StateAxes:
        return mu.StateAxes({mu.Param: None, "cache": mu.Carry, mu.RngState: mu.Shared, ...: 0})

    assert make() == make()
    assert hash(make()) == hash(make())
    assert make() != mu.StateAxes({...: 0})
    assert mu.StateAxes({mu.Param: 0, ...: 1}) != mu.StateAxes({...: 1, mu.Param: 0})
    assert repr(make()) == (
        "StateAxes({OfType(Param): None, WithTag('cache'): mu.Carry, OfType(RngState): mu.Shared, Everything(): 0})"
    )
    assert pickle.loads(pickle.dumps(make())) == make()
    assert pickle.loads(pickle.dumps(mu.Carry)) is mu.Carry
    assert pickle.loads(pickle.dumps(mu.Shared)) is mu.Shared


@pytest.mark.parametrize("bad", ["0", 1.5, True, (0,), [0], mu.Param])
def test_what_is_no_axis_is_refused(bad: Any) -> None:
    with pytest.raises(errors.AxisError, match="is not an axis") as caught:
        mu.StateAxes({mu.Param: bad})
    assert "expected: an int, None, `mu.Carry` or `mu.Shared`" in str(caught.value)
    assert eval("mu.StateAxes({mu.Param: None, ...: 0})", {"mu": mu}) is not None  # the cure
    assert "`mu.StateAxes({mu.Param: None, ...: 0})`" in str(caught.value)


def test_a_bad_filter_is_refused() -> None:
    with pytest.raises(errors.FilterError):
        mu.StateAxes({3: 0})


@pytest.mark.parametrize("axis", [1, -1])
def test_other_axes_than_the_first(axis: int) -> None:
    pair = Pair()

    def f(pair: Pair) -> Any:
        pair.table.value = pair.table * pair.w.value
        return pair.table.value.sum()

    axes = mu.StateAxes({mu.Param: 0, mu.Buffer: axis, ...: None})
    out = mu.vmap(f, in_axes=(axes,))(pair)
    expected = jnp.arange(6.0).reshape(2, 3) * jnp.arange(3.0)[None]
    np.testing.assert_array_equal(out, expected.sum(0))
    np.testing.assert_array_equal(pair.table, expected)


@pytest.mark.parametrize(
    "states",
    [
        lambda p: mu.StateAxes({mu.Param: 0, ...: None}),
        lambda p: [(p, mu.StateAxes({mu.Param: 0, ...: None}))],
        lambda p: ((p, mu.StateAxes({mu.Param: 0})),),
        lambda p: {p: mu.StateAxes({mu.Param: 0})},
        lambda p: {p.w: 0},
        lambda p: [(p.w, 0), (p.n, None)],
    ],
)
def test_axes_of_captured_states(states: Any) -> None:
    pair = Pair()

    def f() -> Any:
        pair.w.value = pair.w + 1
        pair.n.value = pair.n + 1
        return pair.w.value * 2

    np.testing.assert_array_equal(mu.vmap(f, states=states(pair))(), [2, 4, 6])
    np.testing.assert_array_equal(pair.w, [1, 2, 3])
    assert float(pair.n) == 1


@pytest.mark.parametrize("bad", [0, "x", mu.Param])
def test_states_has_to_say_axes(bad: Any) -> None:
    with pytest.raises(errors.AxisError, match="says no axes") as caught:
        mu.vmap(lambda x: x, states=bad)(jnp.zeros(2))
    assert "states=[(model, 0)]" in str(caught.value)


def test_states_are_pairs() -> None:
    pair = Pair()
    for bad in ((pair, 0), (pair, mu.StateAxes({...: 0})), [pair], [(pair,)], [(pair, 0, 1)], ["ab", "cde"], [0]):
        for transform in (mu.vmap, mu.scan):
            with pytest.raises(errors.AxisError, match="says no axes"):
                if transform is mu.vmap:
                    mu.vmap(lambda: pair.w.value, states=bad)()
                else:
                    mu.scan(lambda c, _: (c, None), 0, None, length=3, states=bad)


def test_one_state_has_one_axis() -> None:
    pair = Pair()
    for call in (
        lambda: mu.vmap(lambda a, b: a.w.value, in_axes=(0, None))([pair.w], pair),
        lambda: mu.vmap(lambda: pair.w.value, states=[(pair.w, 0), (pair.w, None)])(),
    ):
        with pytest.raises(errors.AxisError) as caught:
            call()
    assert "is asked for along two axes" in str(caught.value)
    assert "0 and None" in str(caught.value)
    assert "w" in caught.value.path


def test_a_state_without_such_an_axis_is_told() -> None:
    pair = Pair()
    with pytest.raises(errors.AxisError, match=r"state `p\.n` \(Cache\) has no axis 0") as caught:
        mu.vmap(lambda p: p.w.value)(pair)
    text = str(caught.value)
    assert "expected: at least 1 ax" in text
    assert "got:      shape ()" in text
    assert "made at:  test_axes.py" in text


def test_sizes_have_to_agree() -> None:
    pair = Pair()
    with pytest.raises(errors.AxisError, match="mapped axes have different sizes") as caught:
        mu.vmap(lambda p, x: x, in_axes=(mu.StateAxes({mu.Param: 0}), 0))(pair, jnp.zeros(5))
    assert "5" in str(caught.value)
    assert "state p.w: 3" in str(caught.value)


def test_nothing_to_map_over() -> None:
    with pytest.raises(errors.AxisError, match="nothing to map over"):
        mu.vmap(lambda: 1)()
    np.testing.assert_array_equal(mu.vmap(lambda: jnp.int32(1), axis_size=3)(), [1, 1, 1])


def test_axes_in_scan() -> None:
    pair = Pair()

    def body(total: Any, _: Any) -> Any:
        pair.n.value = pair.n + pair.w.value
        pair.w.value = pair.w * 2
        return total + pair.table.value.sum(), pair.n.value

    axes = mu.StateAxes({mu.Param: 0, mu.Buffer: 1, mu.Cache: mu.Carry})
    total, ns = mu.scan(body, jnp.float32(0), None, states=axes)
    assert float(total) == 15
    np.testing.assert_array_equal(ns, [0, 1, 3])
    np.testing.assert_array_equal(pair.w, [0, 2, 4])
    np.testing.assert_array_equal(pair.table, np.arange(6.0).reshape(2, 3))
    assert float(pair.n) == 3


class Member(mu.Variable):
    vmap_axis = 0


def test_a_kind_may_declare_its_axis() -> None:
    v = Member(jnp.arange(3.0))
    shared = mu.Variable(0.0)

    def f() -> Any:
        v.value = v + 1
        shared.value = shared + 1
        return v.value

    np.testing.assert_array_equal(mu.vmap(f)(), [1, 2, 3])
    np.testing.assert_array_equal(v, [1, 2, 3])
    assert float(shared) == 1
