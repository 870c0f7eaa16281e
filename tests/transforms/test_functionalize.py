"""`mu.functionalize`: a stateful function as a pure one, through every raw JAX transform."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import errors


class Net(mu.Module):
    def __init__(self, w: Any = 2.0) -> None:
        self.w = mu.Param(jnp.float32(w))
        self.n = mu.Variable(0)
        self.h = mu.Hidden(jnp.float32(0))

    def step(self, x: Any) -> Any:
        self.n += 1
        self.h.value = self.h * jnp.float32(0.5) + self.w.value * x
        return self.h.value

    __call__ = step


def hand(s: dict[str, Any], x: Any) -> Any:
    h = s["h"] * jnp.float32(0.5) + s["w"] * x
    return h, {"w": s["w"], "n": s["n"] + 1, "h": h}


def start() -> dict[str, Any]:
    return {"w": jnp.float32(2), "n": jnp.int32(0), "h": jnp.float32(0)}


def check(state: Any, expected: dict[str, Any]) -> None:
    assert isinstance(state, mu.State)
    for name, value in expected.items():
        np.testing.assert_allclose(state[name], value, rtol=1e-6, err_msg=name)


XS = jnp.linspace(-1, 1, 4)


def make(form: str, net: Net) -> Any:
    return {
        "module": lambda: mu.functionalize(net),
        "method": lambda: mu.functionalize(net.step),
        "closure": lambda: mu.functionalize(lambda x: net(x)),
        "of": lambda: mu.functionalize(lambda x: net(x), of=net),
        "partial": lambda: mu.functionalize(functools.partial(Net.step, net)),
        "jitted": lambda: mu.functionalize(mu.jit(lambda x: net(x))),
    }[form]()


@pytest.mark.parametrize("form", ["module", "method", "closure", "of", "partial", "jitted"])
def test_forms(form: str) -> None:
    net = Net()
    pure, state = make(form, net)
    assert set(state) == {("w",), ("n",), ("h",)}
    expected_state = start()
    for x in (1.0, 2.0):
        out, state = jax.jit(pure)(state, x)
        expected, expected_state = hand(expected_state, x)
        np.testing.assert_allclose(out, expected)
        check(state, expected_state)
    check(mu.state(net), start())


RAW: dict[str, Any] = {
    "eager": lambda pure, s: pure(s, 1.5),
    "jit": lambda pure, s: jax.jit(pure)(s, 1.5),
    "grad": lambda pure, s: jax.grad(lambda x: pure(s, x), has_aux=True)(1.5),
    "grad of the state": lambda pure, s: jax.grad(
        lambda w: (lambda out, new: (out, (w, new)))(*pure(with_w(s, w), 1.5)), has_aux=True
    )(jnp.float32(2)),
    "vmap": lambda pure, s: jax.vmap(pure, in_axes=(None, 0))(s, XS),
    "vmap of states": lambda pure, s: jax.vmap(pure)(jax.tree.map(lambda x: jnp.stack([x] * 4), s), XS),
    "scan": lambda pure, s: jax.lax.scan(lambda s, x: pure(s, x)[::-1], s, XS),
    "while": lambda pure, s: jax.lax.while_loop(lambda s: get(s, "n") < 3, lambda s: pure(s, 1.0)[1], s),
    "cond": lambda pure, s: jax.lax.cond(True, pure, lambda s, x: (x, s), s, jnp.float32(1)),
    "checkpoint": lambda pure, s: jax.checkpoint(pure)(s, 1.5),
    "linearize": lambda pure, s: jax.linearize(lambda x: pure(s, x)[0], 1.5)[0],
    "eval_shape": lambda pure, s: jax.tree.map(lambda x: x.shape, jax.eval_shape(pure, s, 1.5)),
}


def with_w(s: Any, w: Any) -> Any:
    return mu.State({**s.flat(), ("w",): w}, s.kinds()) if isinstance(s, mu.State) else {**s, "w": w}


def get(s: Any, name: str) -> Any:
    return s[name]


@pytest.mark.parametrize("name", RAW)
def test_raw_transforms(name: str) -> None:
    net = Net()
    pure, state = mu.functionalize(net)
    mine = RAW[name](pure, state)
    theirs = RAW[name](hand, start())
    mine = jax.tree.map(
        lambda x: x.to_pure_dict() if isinstance(x, mu.State) else x, mine, is_leaf=lambda x: isinstance(x, mu.State)
    )
    assert jax.tree.structure(mine) == jax.tree.structure(theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), mine, theirs)
    check(mu.state(net), start())


def test_several_nodes_are_named() -> None:
    a, b = Net(1.0), Net(2.0)
    pure, state = mu.functionalize(lambda x: a(x) + b(x))
    assert set(state) == {(m, n) for m in "ab" for n in ("w", "n", "h")}
    out, state = pure(state, 1.0)
    assert float(out) == 3
    assert int(state["a", "n"]) == 1
    pure, state = mu.functionalize(lambda x: a(x) + b(x), of=(a, b))
    assert set(state) == {(m, n) for m in (0, 1) for n in ("w", "n", "h")}
    assert float(pure(state, 1.0)[0]) == 3
    pure, state = mu.functionalize(lambda x: a(x) + b(x), of={"x": a, "y": b})
    assert float(pure(state, 1.0)[0]) == 3


def test_no_states_at_all() -> None:
    pure, state = mu.functionalize(lambda x: x + 1)
    assert len(state) == 0
    out, state = jax.jit(pure)(state, 1.0)
    assert float(out) == 2


def test_kinds_and_filters_of_the_state() -> None:
    pure, state = mu.functionalize(Net())
    params, rest = state.split(mu.Param, ...)

    def loss(params: mu.State, rest: mu.State, x: Any) -> Any:
        return pure(params | rest, x)

    grads, rest = jax.jit(jax.grad(loss, has_aux=True))(params, rest, 1.5)
    assert isinstance(grads, mu.State)
    np.testing.assert_allclose(grads["w"], 1.5)
    assert int(rest["n"]) == 1


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda flat: flat.pop(("w",)), "missing:    w"),
        (lambda flat: flat.update({("x",): 0}), "unexpected: x"),
    ],
)
def test_a_state_that_does_not_fit(change: Any, line: str) -> None:
    pure, state = mu.functionalize(Net())
    flat = state.flat()
    change(flat)
    with pytest.raises(errors.StructureError, match="does not fit the function") as caught:
        pure(mu.State(flat), 1.0)
    assert line in str(caught.value)


def test_a_plain_dictionary_will_do() -> None:
    """`update` accepts a plain nested dict; a pure function should too, or say what it wants."""
    pure, state = mu.functionalize(Net())
    try:
        out, _ = pure(state.to_pure_dict(), 1.0)
    except errors.MutatisError:
        return
    assert float(out) == 2


def test_structure_does_not_change() -> None:
    net = Net()
    for change in (lambda: setattr(net, "flag", True), lambda: setattr(net, "extra", mu.Cache(0))):
        pure, state = mu.functionalize(lambda x: (change(), net(x))[1], of=net)
        with pytest.raises(errors.StructureError, match="was changed in a pure function"):
            pure(state, 1.0)
        assert not hasattr(net, "flag")
        assert not hasattr(net, "extra")


def test_it_composes_with_mu_transforms() -> None:
    net = Net()
    pure, state = mu.functionalize(net)
    out, state = mu.jit(pure)(state, 1.0)
    ys = mu.scan(lambda s, x: pure(s, x)[::-1], state, XS)[1]
    expected = jax.lax.scan(lambda s, x: hand(s, x)[::-1], hand(start(), 1.0)[1], XS)[1]
    np.testing.assert_allclose(ys, expected, rtol=1e-6)
    assert int(net.n) == 0


def test_a_counter_under_raw_jit() -> None:
    net = Net()
    pure, state = mu.functionalize(net.step)
    pure = jax.jit(pure)
    for i in range(4):
        _, state = pure(state, 1.0)
        assert int(state["n"]) == i + 1
    mu.update(net, state)
    assert int(net.n) == 4


def test_random_streams_are_in_the_state() -> None:
    rngs = mu.Rngs(0)
    pure, state = mu.functionalize(rngs)
    a, state = pure(state)
    b, state = jax.jit(pure)(state)
    twin = mu.Rngs(0)
    for key in (a, b):
        np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(twin()))


def test_a_state_that_is_not_in_it_is_refused() -> None:
    """`of` leaves out a state that the function writes: nothing else may change."""
    net, other = Net(), Net()
    pure, state = mu.functionalize(lambda x: net(x) + other(x), of=net)
    try:
        pure(state, 1.0)
    except errors.MutatisError:
        pass
    assert int(other.n) == 0, "what `f` writes is in `new_state` and nowhere else"


def test_a_state_of_the_function_alone() -> None:
    net = mu.Module()
    net.w = mu.Param(2.0)

    def run(x: Any) -> Any:
        local = mu.Module()
        local.v = mu.Variable(net.w * x)
        return local.v.value + 1

    pure, state = mu.functionalize(run, of=net)
    out, new = jax.jit(pure)(state, 3.0)
    assert float(out) == 7 and new == state
