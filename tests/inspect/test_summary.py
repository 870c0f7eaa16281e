"""The table of states by kind: what it counts, as data, as text and in `rich`."""

from __future__ import annotations

import io

import jax.numpy as jnp
import rich.console

import mutatis as mu
from mutatis import nn
from mutatis.inspect.summary import Row, state_table


class Net(mu.Module):
    def __init__(self) -> None:
        rngs = mu.Rngs(0)
        self.linear = nn.Linear(10, 100, rngs=rngs)
        self.norm = nn.BatchNorm(100)
        self.dropout = nn.Dropout(0.5, rngs=rngs)
        self.tied = self.linear.kernel
        self.later = nn.Linear(None, 2, use_bias=False, rngs=rngs)


TEXT = """\
kind       states  elements    size
RngState        1         2    12 B
Param           5     1,300  5.2 kB
BatchStat       2       200   800 B
total           8     1,502  6.0 kB"""


def test_counts() -> None:
    rows = state_table(Net()).rows
    assert rows == (Row("RngState", 1, 2, 12), Row("Param", 5, 1300, 5200), Row("BatchStat", 2, 200, 800))


def test_text() -> None:
    assert str(state_table(Net())) == TEXT


def test_rich() -> None:
    console = rich.console.Console(file=io.StringIO(), width=80)
    console.print(state_table(Net()))
    text = console.file.getvalue()
    assert all(word in text for line in TEXT.splitlines() for word in line.split("  "))


def test_values_that_are_trees_and_empty_nodes() -> None:
    cache = mu.Cache({"k": jnp.zeros((2, 3)), "v": jnp.zeros((2, 3), jnp.bfloat16)})
    assert state_table([cache]).rows == (Row("Cache", 1, 12, 36),)
    assert state_table([]).total == Row("total")


def test_large_sizes() -> None:
    assert "4.2 MB" in str(state_table(mu.Param(jnp.zeros((1024, 1024)))))
