"""Counts: as ints, with states and bytes, by kind and by filter."""

from __future__ import annotations

import copy
import operator
import pickle

import jax
import jax.numpy as jnp
import pytest

import mutatis as mu
from mutatis import errors, nn
from mutatis.inspect import Count, count, state_table


class Net(mu.Module):
    """Kinds, a shared state, one that waits, and a tree of arrays."""

    def __init__(self) -> None:
        rngs = mu.Rngs(0)
        self.linear = nn.Linear(10, 100, rngs=rngs)
        self.norm = nn.BatchNorm(100)
        self.tied = self.linear.kernel
        self.later = nn.Linear(None, 2, use_bias=False, rngs=rngs)
        self.cache = mu.Cache({"k": jnp.zeros((2, 3)), "v": jnp.zeros((2, 3), jnp.bfloat16)})


def test_counts() -> None:
    net = Net()
    assert str(count(net, mu.Param)) == "1,300 numbers in 5 states, 5.2 kB"
    total = count(net)
    assert (total, total.numbers, total.states, total.bytes) == (1512, 1512, 8, 6036)
    assert {kind: (int(one), one.states, one.bytes) for kind, one in total.kinds.items()} == {
        "Param": (1300, 5, 5200),
        "BatchStat": (200, 2, 800),
        "Cache": (12, 1, 36),
    }
    assert count(net, mu.BatchStat, mu.Cache) == 212
    table = state_table(net).total
    assert (table.elements, table.states, table.bytes) == (total, total.states, total.bytes)


def test_a_count_is_an_int() -> None:
    total = count(Net(), mu.Param)
    assert isinstance(total, int) and type(int(total)) is int and type(total.numbers) is int
    assert (
        operator.index(total) == 1300 and f"{total:,}" == "1,300" and total / 2 == 650 and [*range(total)][-1] == 1299
    )
    assert repr(total) == "<1,300 numbers in 5 states, 5.2 kB>"
    assert str(count(mu.Param(1))) == "1 number in 1 state, 4 B"
    assert str(count([])) == "0 numbers in 0 states, 0 B" and not count([])
    for other in (copy.deepcopy(total), pickle.loads(pickle.dumps(total))):
        assert type(other) is Count and other == total
        assert (other.states, other.bytes, other.kinds["Param"].states) == (5, 5200, 5)


def test_nothing_is_read_or_allocated() -> None:
    net = mu.eval_shape(lambda: nn.Linear(100_000, 100_000, rngs=mu.Rngs(0)))
    assert count(net, mu.Param).bytes == 40_000_400_000
    counted = []
    mu.jit(lambda net: counted.append(count(net)))(Net())
    assert counted == [1512]
    assert not any(entry.read for entry in mu.inspect.ledger(lambda net: (count(net), None)[1])(Net()).entries)
    assert count(jax.tree.map(lambda x: x, Net())) == 1512


def test_what_is_no_model() -> None:
    with pytest.raises(errors.ArgumentError, match="is not a node"):
        count(jnp.ones(3))
    with pytest.raises(errors.FilterError, match="no state has the tag"):
        count(Net(), "Param")
