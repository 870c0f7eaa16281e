"""`mu.remat` beside `jax.checkpoint` threaded by hand: the same values and gradients, writes and draws once."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu


class Block(mu.Module):
    def __init__(self) -> None:
        self.w = mu.Param(jnp.array([0.5, -1.0, 2.0]))
        self.mean = mu.BatchStat(jnp.float32(0))
        self.n = mu.Variable(0)

    def __call__(self, x: Any, scale: Any = 1.0) -> Any:
        y = jnp.sin(jnp.sin(self.w.value * x)) * scale
        self.mean.value = 0.5 * self.mean.value + y.sum()
        self.n += 1
        return y


def hand(w: Any, mean: Any, x: Any) -> Any:
    y = jnp.sin(jnp.sin(w * x))
    return y, 0.5 * mean + y.sum()


def loss_by_hand(w: Any, x: Any) -> Any:
    y, mean = jax.checkpoint(hand)(w, jnp.float32(0), x)
    return y.sum(), mean


def equations(jaxpr: Any, name: str) -> list[Any]:
    found = []
    for e in jaxpr.eqns:
        if e.primitive.name == name:
            found.append(e)
        for value in e.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    found += equations(getattr(inner, "jaxpr", inner), name)
    return found


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("form", ["function", "module", "method", "closure", "partial", "decorator"])
def test_values_and_gradients(form: str, compiled: bool) -> None:
    block = Block()
    wrapped: Any = {
        "function": lambda x: mu.remat(lambda b, x: b(x))(block, x),
        "module": mu.remat(block),
        "method": mu.remat(block.__call__),
        "closure": mu.remat(lambda x: block(x)),
        "partial": mu.remat(functools.partial(lambda b, x: b(x), block)),
        "decorator": mu.remat(prevent_cse=False)(lambda x: block(x)),
    }[form]
    grad = mu.value_and_grad(lambda x: wrapped(x).sum(), argnums=0, of=block)
    value, (of, x) = (mu.jit(grad) if compiled else grad)(0.7)
    (expected, mean), grads = jax.value_and_grad(loss_by_hand, (0, 1), has_aux=True)(block.w.value, 0.7)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(of["w"], grads[0], rtol=1e-5)
    np.testing.assert_allclose(x, grads[1], rtol=1e-5)
    np.testing.assert_allclose(block.mean.value, mean, rtol=1e-5)
    assert int(block.n) == 1


def test_the_backward_pass_computes_again() -> None:
    block = Block()
    jaxpr = mu.make_jaxpr(lambda b: mu.grad(lambda b: mu.remat(b)(0.7).sum())(b))(block)
    hand_jaxpr = jax.make_jaxpr(lambda w: jax.grad(loss_by_hand, has_aux=True)(w, 0.7))(block.w.value)
    assert len(equations(jaxpr, "sin")) == len(equations(hand_jaxpr, "sin"))
    plain = mu.make_jaxpr(lambda b: mu.grad(lambda b: b(0.7).sum())(b))(block)
    assert len(equations(jaxpr, "sin")) > len(equations(plain, "sin"))


@pytest.mark.parametrize(
    "policy", [None, jax.checkpoint_policies.everything_saveable, jax.checkpoint_policies.dots_saveable]
)
@pytest.mark.parametrize("prevent_cse", [True, False])
def test_options_reach_jax(policy: Any, prevent_cse: bool) -> None:
    block = Block()
    f = mu.remat(block, policy=policy, prevent_cse=prevent_cse)
    (equation,) = equations(mu.make_jaxpr(lambda: f(0.7))(), "remat2") or equations(
        mu.make_jaxpr(lambda: f(0.7))(), "checkpoint"
    )
    assert equation.params["policy"] is policy
    assert equation.params["prevent_cse"] in (prevent_cse, (prevent_cse,) * len(equation.invars))


@pytest.mark.parametrize("options", [{"static_argnums": (1,)}, {"static_argnums": 1}, {"static_argnums": -1}])
def test_static_arguments(options: Any) -> None:
    block = Block()
    f = mu.remat(lambda x, twice: block(x) * (2 if twice else 1), **options)
    np.testing.assert_allclose(f(0.7, True), 2 * np.asarray(f(0.7, False)))
    assert int(block.n) == 2


def test_static_names() -> None:
    block = Block()
    f = mu.remat(lambda x, *, twice: block(x) * (2 if twice else 1), static_argnames="twice")
    np.testing.assert_allclose(f(0.7, twice=True), 2 * np.asarray(f(0.7, twice=False)))


def test_draws_are_the_same_in_the_recomputation() -> None:
    rngs, w = mu.Rngs(0), mu.Param(jnp.ones(16))

    def loss() -> Any:
        return jnp.sum(jnp.sin(w.value) * jax.random.normal(rngs(), (16,)))

    noise = jax.random.normal(mu.Rngs(0)(), (16,))
    for compiled in (False, True):
        rngs = mu.Rngs(0)
        grad = mu.grad(mu.remat(loss), of=w)
        np.testing.assert_allclose((mu.jit(grad) if compiled else grad)()[()], jnp.cos(1.0) * noise, rtol=1e-5)
        assert int(rngs.default.value["count"]) == 1


def test_layers_of_a_model() -> None:
    class Model(mu.Module):
        def __init__(self) -> None:
            self.blocks = [mu.remat(Block()) for _ in range(3)]

        def __call__(self, x: Any) -> Any:
            for block in self.blocks:
                x = block(x)
            return x.sum()

    model, plain = Model(), Model()
    plain.blocks = [block.__wrapped__ for block in plain.blocks]
    grads, expected = mu.grad(lambda m: m(0.7))(model), mu.grad(lambda m: m(0.7))(plain)
    assert set(grads) == set(expected)
    for path, value in grads.items():
        np.testing.assert_allclose(value, expected[path], rtol=1e-5)
    assert mu.state(model) == mu.state(plain)


def test_in_a_scan_over_layers() -> None:
    layers = mu.vmap(lambda _: Block())(jnp.arange(3))
    run = lambda m, x: mu.scan(mu.remat(lambda c, b: (b(c), None)), x, m)[0].sum()  # noqa: E731
    plain = lambda m, x: mu.scan(lambda c, b: (b(c), None), x, m)[0].sum()  # noqa: E731
    other = mu.clone(layers)
    np.testing.assert_allclose(
        mu.grad(run)(layers, jnp.ones(3))["w"], mu.grad(plain)(other, jnp.ones(3))["w"], rtol=1e-5
    )
    np.testing.assert_array_equal(layers.n, [1, 1, 1])


def test_structure_may_change_inside() -> None:
    block = Block()

    def f(x: Any) -> Any:
        block.seen = mu.Intermediate(x)
        block.parts = [1]
        return block(x)

    mu.remat(f)(0.7)
    assert float(block.seen) == np.float32(0.7)
    assert block.parts == [1]
    block.late = mu.Hidden(init=lambda: jnp.ones(2))
    mu.remat(lambda: block.late.value)()
    np.testing.assert_array_equal(block.late, [1, 1])


def test_each_call_runs_the_function_once(traces: Any) -> None:
    block = Block()
    f = mu.remat(traces.count(lambda x: block(x)))
    for i in range(3):
        f(0.7)
        assert traces.total == i + 1, "raw `jax.checkpoint` would reuse the trace of the first"
    assert int(block.n) == 3
