"""JAX's own tools for debugging work on stateful code: checkify, `jax.debug`, NaN checks, `jax.disable_jit`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import mutatis as mu
from mutatis import errors


class Net(mu.Module):
    def __init__(self) -> None:
        self.w = mu.Param(jnp.array([1.0, 2.0]))
        self.calls = mu.Variable(0)

    def __call__(self, x: Any) -> Any:
        self.calls += 1
        checkify.check(jnp.all(x > 0), "negative input: {}", x[0])
        return jnp.log(x * self.w.value)


@pytest.mark.parametrize("x", [[1.0, 2.0], [-1.0, 2.0]])
def test_checkify_of_a_pure_function(x: Any) -> None:
    net = Net()
    pure, state = mu.functionalize(net)
    error, (out, new) = jax.jit(checkify.checkify(pure))(state, jnp.array(x))
    assert int(new["calls"]) == 1
    assert (error.get() is None) == (x[0] > 0)
    if x[0] > 0:
        mu.update(net, new)
        np.testing.assert_allclose(out, jnp.log(jnp.array(x) * net.w.value))


def test_checkify_inside_of_transforms() -> None:
    net = Net()

    def loss(net: Any, x: Any) -> Any:
        net.calls += 1

        def checked(x: Any) -> Any:
            checkify.check(jnp.all(x > 0), "negative input")
            return jnp.sum(net.w.value * x)

        return checkify.checkify(checked)(x)

    error, out = mu.jit(loss)(net, jnp.array([-1.0, 1.0]))
    assert "negative input" in error.get()
    assert float(out) == 1
    error, out = mu.jit(mu.vmap(loss, in_axes=(None, 0)))(net, jnp.array([[-1.0, 1.0], [1.0, 1.0]]))
    assert error.get() is not None
    np.testing.assert_allclose(out, [1, 3])
    assert int(net.calls) == 2


def test_checkify_over_writes_is_refused() -> None:
    net = Net()
    with pytest.raises(errors.TraceLevelError, match=r"mu\.functionalize"):
        checkify.checkify(lambda x: net(x))(jnp.ones(2))
    assert int(net.calls) == 0


@pytest.mark.parametrize("transform", [mu.jit, mu.remat, lambda f: mu.jit(mu.grad(f)), lambda f: f])
def test_debug_prints_and_callbacks(transform: Any, capsys: pytest.CaptureFixture[str]) -> None:
    net = Net()
    seen: list[float] = []

    def f(x: Any) -> Any:
        net.calls += 1
        jax.debug.print("calls={calls}", calls=net.calls.value)
        jax.debug.callback(lambda w: seen.append(float(w)), net.w.value[1])
        return jnp.sum(net.w.value * x)

    step = transform(f)
    for _ in range(2):
        step(3.0)
    jax.effects_barrier()
    assert "calls=1" in capsys.readouterr().out
    assert set(seen) == {2.0}
    assert int(net.calls) == 2


def test_debug_prints_in_loops_and_lanes(capsys: pytest.CaptureFixture[str]) -> None:
    net = Net()

    def f(x: Any) -> Any:
        net.calls += 1
        jax.debug.print("x={x} calls={calls}", x=x, calls=net.calls.value, ordered=True)
        return x

    mu.for_loop(f, jnp.arange(3))
    jax.effects_barrier()
    assert capsys.readouterr().out.split("\n")[:3] == ["x=0 calls=1", "x=1 calls=2", "x=2 calls=3"]
    mu.vmap(lambda x: jax.debug.print("lane {x}", x=x))(jnp.arange(2))
    jax.effects_barrier()
    assert "lane 1" in capsys.readouterr().out


def test_inspecting_a_program() -> None:
    net = Net()
    text = str(mu.make_jaxpr(lambda net, x: jax.named_scope("here")(lambda: net.w * x)())(net, 2.0))
    assert "mul" in text


def test_without_jit() -> None:
    net = Net()
    with jax.disable_jit():
        mu.jit(lambda net: net.calls.set(net.calls + 1))(net)
        assert float(mu.grad(lambda net: jnp.sum(net.w.value) * float(net.calls.value))(net)["w"][0]) == 1
    assert int(net.calls) == 1
