"""A program remembers for which types it was traced, so that another model of its structure costs a walk and no more."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import mutatis as mu
from mutatis.compilation.program import Program


class Net(mu.Module):
    def __init__(self, value: Any) -> None:
        self.w = mu.Param(value)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each plan that is made, whether the program knew the types."""
    answers: list[bool] = []
    original = Program.known

    def known(self: Program, types: Any) -> int | None:
        number = original(self, types)
        answers.append(number is not None)
        return number

    monkeypatch.setattr(Program, "known", known)
    return answers


def test_another_model_is_not_traced(asked: list[bool], traces: Any) -> None:
    @mu.jit
    def step(net: Net, x: Any) -> Any:
        net.w.value = net.w.value + x
        return net.w.value * 2

    for _ in range(3):
        net = Net(jnp.ones(3))
        assert step(net, jnp.float32(1)).tolist() == [4, 4, 4]
        assert step(net, jnp.float32(2)).tolist() == [8, 8, 8]
    assert asked == [False, True, True]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (jnp.ones(3), jnp.ones(4)),
        (jnp.ones(3), jnp.ones(3, jnp.int32)),
        (jnp.ones(3), {"a": jnp.ones(3)}),
        (jax.random.key(0), jax.random.key(0, impl="rbg")),
    ],
    ids=["shape", "dtype", "structure", "keys"],
)
def test_other_types_are(first: Any, second: Any, asked: list[bool]) -> None:
    seen = []

    @mu.jit
    def look(net: Net) -> None:
        seen.append(jax.tree.map(jnp.shape, net.w.value))

    for value in (first, second, first, second):
        look(Net(value))
    assert len(seen) == 2
    assert asked[2:] == [True, True]


def test_weak_types_are_types(asked: list[bool]) -> None:
    seen = []

    @mu.jit
    def double(net: Net, x: Any) -> Any:
        seen.append(x.weak_type)
        return net.w.value.astype(jnp.bfloat16) * x

    one = Net(jnp.ones(()))
    assert double(one, 2.0).dtype == jnp.bfloat16
    with jax.numpy_dtype_promotion("standard"):
        assert double(Net(jnp.ones(())), jnp.float32(2)).dtype == jnp.float32
    assert double(Net(jnp.ones(())), 2.0).dtype == jnp.bfloat16
    assert seen[:2] == [True, False]


def test_what_jax_has_forgotten_is_traced_again() -> None:
    seen = []

    @mu.jit
    def step(net: Net) -> None:
        seen.append(1)
        net.w.value += 1

    net = Net(jnp.zeros(()))
    step(net)
    jax.clear_caches()
    other = Net(jnp.zeros(()))
    step(other)
    step(net)
    assert (float(net.w), float(other.w)) == (2, 1)
    assert len(seen) in (2, 3)
