"""`mu.error_if`: it raises in every transform, and nothing of the step is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import mutatis as mu
from mutatis.core import checks
from mutatis.errors import ArgumentError, CheckError


class Net(mu.Module):
    def __init__(self) -> None:
        self.total = mu.Variable(1.0)
        self.calls = mu.Variable(0)

    def add(self, x: Any) -> Any:
        self.calls.value += 1
        self.total.value += x
        mu.error_if(self.total.value < 0, "the total is negative")
        return self.total.value


def in_loop(net: Net, x: Any) -> Any:
    return mu.for_loop(lambda part: net.add(part), x * jnp.array([0.1, 0.7, 0.2]))


def in_transaction(net: Net, x: Any) -> Any:
    with mu.transaction():
        net.total.value += 0.5
        return net.add(x)


STEPS: dict[str, Callable[[Net, Any], Any]] = {
    "plain, in a transaction": in_transaction,
    "jit": mu.jit(lambda net, x: net.add(x)),
    "jit, donating": mu.jit(lambda net, x: net.add(x), donate="auto"),
    "grad of jit": lambda net, x: mu.grad(mu.jit(lambda x: net.add(x)))(x),
    "jit of grad": mu.jit(lambda net, x: mu.grad(lambda x: net.add(x))(x)),
    "for_loop": in_loop,
    "jit of for_loop": mu.jit(in_loop),
    "grad of for_loop": mu.jit(lambda net, x: mu.grad(lambda x: in_loop(net, x).sum())(x)),
    "grad of for_loop, not compiled": lambda net, x: mu.grad(lambda x: in_loop(net, x).sum())(x),
    "remat": mu.jit(lambda net, x: mu.grad(mu.remat(lambda x: net.add(x)))(x)),
    "cond": mu.jit(lambda net, x: mu.cond(x < 100, lambda: net.add(x), lambda: x)),
    "while_loop": mu.jit(lambda net, x: mu.while_loop(lambda i: i < 2, lambda i: (net.add(x), i + 1)[1], 0)),
    "jit in a transaction": lambda net, x: _in(mu.transaction(), mu.jit(lambda x: net.add(x)), x),
    "jit in jit": mu.jit(lambda net, x: mu.jit(lambda x: net.add(x))(x)),
}


def _in(block: Any, f: Any, x: Any) -> Any:
    with block:
        return f(x)


@pytest.mark.parametrize("name", STEPS)
def test_it_raises_and_nothing_is_kept(name: str) -> None:
    net, step = Net(), STEPS[name]
    step(net, jnp.float32(2.0))
    kept = float(net.total), int(net.calls)
    for _ in range(2):
        with pytest.raises(CheckError, match="the total is negative") as caught:
            step(net, jnp.float32(-50.0))
        assert "checked at: test_checks.py:" in str(caught.value)
        assert (float(net.total), int(net.calls)) == kept
    step(net, jnp.float32(2.0))
    assert int(net.calls) > kept[1]
    assert float(net.total) > kept[0]


def test_any_lane() -> None:
    @mu.vmap
    def lane(x: jax.Array) -> jax.Array:
        mu.error_if(x < 0, "a lane is negative")
        return x * 2

    bad = jnp.ones((2, 3)).at[1, 1].set(-1.0)
    graded = mu.jit(mu.vmap(mu.grad(mu.remat(lambda x: lane(x).sum()))))
    for f, x in ((lane, bad[1]), (mu.jit(lane), bad[1]), (mu.vmap(lane), bad), (graded, bad)):
        f(jnp.abs(x))
        with pytest.raises(CheckError, match="a lane is negative"):
            f(x)


def test_a_loop_ends_at_the_iteration_that_fails() -> None:
    seen: list[int] = []

    @mu.jit
    def run(xs: jax.Array) -> None:
        def body(x: jax.Array) -> None:
            jax.debug.callback(lambda x: seen.append(int(x)), x)
            mu.error_if(x == 3, "three")

        mu.for_loop(body, xs)

    with pytest.raises(CheckError):
        run(jnp.arange(1000))
    assert max(seen) <= 4


def test_raw_jax_raises_with_the_same_text() -> None:
    step = jax.jit(lambda x: (mu.error_if(x < 0, "negative"), x + 1)[1])
    step(1.0)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"negative\n  checked at: test_checks\.py"):
        jax.block_until_ready(step(-1.0))


def test_a_check_that_holds_makes_no_call() -> None:
    """It is a branch in the program: no host call is made, and the program waits before it commits."""
    net = Net()
    step = mu.jit(lambda net, x: net.add(x))
    step(net, 1.0)
    text = step.lower(net, 1.0).as_text()
    assert "stablehlo.case" in text or "stablehlo.if" in text


def test_errors_that_raw_jax_has_raised_are_not_kept_for_ever() -> None:
    step = jax.jit(lambda x: (mu.error_if(x < 0, "negative"), x + 1)[1])
    for _ in range(20):
        with pytest.raises(jax.errors.JaxRuntimeError):
            jax.block_until_ready(step(-1.0))
    assert len(checks._failed) <= 17


def test_off() -> None:
    with checks.off():
        mu.error_if(True, "not made")
    with pytest.raises(CheckError):
        mu.error_if(True, "made")


@pytest.mark.parametrize(
    ("pred", "message", "problem"),
    [(1.0, "m", "not a condition"), (jnp.zeros(3), "m", "not a condition"), (True, None, "no message")],
    ids=str,
)
def test_bad_input(pred: Any, message: Any, problem: str) -> None:
    with pytest.raises(ArgumentError, match=problem):
        mu.error_if(pred, message)


@pytest.mark.parametrize("pred", [None, "a", 1.5, object()])
def test_what_is_no_condition(pred: Any) -> None:
    with pytest.raises(ArgumentError, match="a check is not a condition"):
        mu.error_if(pred, "x")
