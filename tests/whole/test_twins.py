"""Each transform beside the same thing threaded by hand through plain JAX: values, gradients and states.

The program is one: a step that reads a weight, updates a running mean and counts itself. `twin` threads the three by
hand; `step` has them in a model. Every transform is applied to both, with the model as an argument and closed over,
eagerly and inside `mu.jit`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from tests.nets import Running as Model

pytestmark = pytest.mark.once

HALF = jnp.float32(0.5)


def step(model: Model, x: jax.Array) -> jax.Array:
    y = jnp.sum(model.w.value * x) + model.mean.value
    model.mean.value = HALF * model.mean.value + HALF * y
    model.calls += 1
    return y * y


State = dict[str, jax.Array]


def twin(state: State, x: jax.Array) -> tuple[jax.Array, State]:
    y = jnp.sum(state["w"] * x) + state["mean"]
    return y * y, {"w": state["w"], "mean": HALF * state["mean"] + HALF * y, "calls": state["calls"] + 1}


def start() -> State:
    return {"w": jnp.array([1.0, -2.0, 3.0]), "mean": jnp.zeros(()), "calls": jnp.int32(0)}


Call = Callable[[Model], Any]
Twin = Callable[[State], tuple[Any, State]]
XS = jnp.linspace(-1.0, 1.0, 5)


def jit_pair(f: Callable[[Model, Any], Any]) -> tuple[Call, Twin]:
    return lambda m: mu.jit(f)(m, XS[0]), lambda s: jax.jit(twin)(s, XS[0])


def grad_twin(s: State) -> tuple[Any, State]:
    (_, new), gradient = jax.value_and_grad(lambda w: twin({**s, "w": w}, XS[1]), has_aux=True)(s["w"])
    return gradient, new


def grad_of_input_twin(s: State) -> tuple[Any, State]:
    (value, new), gradient = jax.value_and_grad(lambda x: twin(s, x), has_aux=True)(XS[1])
    return (value, gradient), new


def second_derivative_twin(s: State) -> tuple[Any, State]:
    def first(x: jax.Array) -> tuple[jax.Array, State]:
        return jax.grad(lambda x: twin(s, x), has_aux=True)(x)

    return jax.grad(first, has_aux=True)(XS[1])


def scan_twin(s: State) -> tuple[Any, State]:
    def body(carry: tuple[jax.Array, State], x: jax.Array) -> Any:
        total, s = carry
        y, s = twin(s, x)
        return (total + y, s), y

    (total, s), ys = jax.lax.scan(body, (jnp.float32(0), s), XS)
    return (total, ys), s


def stacked_twin(s: State) -> tuple[Any, State]:
    def body(s: State, x: jax.Array) -> Any:
        y, s = twin(s, x)
        return s, y

    s, ys = jax.lax.scan(body, s, XS)
    return ys, s


def scan_grad_twin(s: State) -> tuple[Any, State]:
    def loss(w: jax.Array) -> tuple[jax.Array, State]:
        (total, _), new = scan_twin({**s, "w": w})
        return total, new

    return jax.grad(loss, has_aux=True)(s["w"])


def while_twin(s: State) -> tuple[Any, State]:
    def body(loop: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
        y, s = twin(loop[1], XS[3])
        return loop[0] + y, s

    return jax.lax.while_loop(lambda loop: loop[1]["calls"] < 4, body, (jnp.float32(0), s))


def fori_twin(s: State) -> tuple[Any, State]:
    def body(i: Any, loop: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
        y, s = twin(loop[1], XS[i])
        return loop[0] + y, s

    return jax.lax.fori_loop(0, 3, body, (jnp.float32(0), s))


def cond_twin(taken: bool) -> Twin:
    return lambda s: jax.lax.cond(taken, lambda s: twin(s, XS[2] + 1), lambda s: (jnp.float32(-1), s), s)


def switch_twin(s: State) -> tuple[Any, State]:
    def add(s: State) -> tuple[jax.Array, State]:
        return jnp.float32(0), {**s, "mean": s["mean"] + 5}

    return jax.lax.switch(1, [lambda s: twin(s, XS[0]), add, lambda s: (jnp.float32(1), s)], s)


def remat_twin(s: State) -> tuple[Any, State]:
    return jax.grad(lambda w: jax.checkpoint(twin)({**s, "w": w}, XS[1]), has_aux=True)(s["w"])


def pmean_twin(s: State) -> tuple[Any, State]:
    y = jax.vmap(lambda x: jnp.sum(s["w"] * x))(XS)
    return y, {**s, "mean": y.mean(), "calls": s["calls"] + 1}


def pmean(model: Model, x: jax.Array) -> jax.Array:
    y = jnp.sum(model.w.value * x)
    model.mean.value = jax.lax.pmean(y, "lanes")
    model.calls += 1
    return y


def add_five(model: Model) -> jax.Array:
    model.mean.value = model.mean + 5
    return jnp.float32(0)


# name -> (the transform of `step` for a model, the transform of `twin` for a state)
PAIRS: dict[str, tuple[Call, Twin]] = {
    "plain": (lambda m: step(m, XS[0]), lambda s: twin(s, XS[0])),
    "jit": jit_pair(step),
    "grad": (lambda m: mu.grad(lambda m: step(m, XS[1]))(m)["w"], grad_twin),
    "grad of": (lambda m: mu.grad(lambda: step(m, XS[1]), of=m)()["w"], grad_twin),
    "value_and_grad of an array": (lambda m: mu.value_and_grad(lambda x: step(m, x))(XS[1]), grad_of_input_twin),
    "second derivative": (lambda m: mu.grad(mu.grad(lambda x: step(m, x)))(XS[1]), second_derivative_twin),
    "scan": (lambda m: mu.scan(lambda c, x: (lambda y: (c + y, y))(step(m, x)), jnp.float32(0), XS), scan_twin),
    "for_loop": (lambda m: mu.for_loop(lambda x: step(m, x), XS), stacked_twin),
    "gradient of a scan": (
        lambda m: mu.grad(lambda m: mu.scan(lambda c, x: (c + step(m, x), None), jnp.float32(0), XS)[0])(m)["w"],
        scan_grad_twin,
    ),
    "map": (lambda m: mu.map(lambda x: step(m, x), XS), stacked_twin),
    "while_loop": (
        lambda m: mu.while_loop(lambda _: m.calls < 4, lambda c: c + step(m, XS[3]), jnp.float32(0)),
        while_twin,
    ),
    "fori_loop": (lambda m: mu.fori_loop(0, 3, lambda i, c: c + step(m, XS[i]), jnp.float32(0)), fori_twin),
    "fori_loop with traced bounds": (
        lambda m: mu.fori_loop(jnp.int32(0), jnp.int32(3), lambda i, c: c + step(m, XS[i]), jnp.float32(0)),
        fori_twin,
    ),
    "cond, taken": (
        lambda m: mu.cond(True, lambda: step(m, XS[2] + 1), lambda: jnp.float32(-1)),
        cond_twin(True),
    ),
    "cond, not taken": (
        lambda m: mu.cond(False, lambda: step(m, XS[2] + 1), lambda: jnp.float32(-1)),
        cond_twin(False),
    ),
    "switch": (
        lambda m: mu.switch(1, [lambda: step(m, XS[0]), lambda: add_five(m), lambda: jnp.float32(1)]),
        switch_twin,
    ),
    "remat": (lambda m: mu.grad(lambda m: mu.remat(step)(m, XS[1]))(m)["w"], remat_twin),
    "vmap with pmean": (lambda m: mu.vmap(lambda x: pmean(m, x), axis_name="lanes")(XS), pmean_twin),
}


def check(model: Model, out: Any, expected: Any, state: State) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), out, expected)
    for name, value in state.items():
        np.testing.assert_allclose(mu.state(model)[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    "around", ["eager", "jit of the model", "jit of a closure", "functionalized", "transposed twice"]
)
@pytest.mark.parametrize("name", PAIRS)
def test_twins(name: str, around: str) -> None:
    ours, by_hand = PAIRS[name]
    model = Model()
    if around == "eager":
        run: Callable[[], Any] = lambda: ours(model)  # noqa: E731
    elif around == "jit of the model":
        compiled = mu.jit(ours)
        run = lambda: compiled(model)  # noqa: E731
    elif around == "jit of a closure":
        run = mu.jit(lambda: ours(model))
    elif around == "functionalized":
        pure, _ = mu.functionalize(lambda: ours(model), of=model)
        pure = jax.jit(pure)

        def run() -> Any:
            out, new = pure(mu.state(model))
            mu.update(model, new)
            return out
    else:  # inside remat, inside jit
        run = mu.jit(mu.remat(lambda: ours(model)))
    state = start()
    for _ in range(2):
        expected, state = by_hand(state)
        check(model, run(), expected, state)


@pytest.mark.parametrize("name", PAIRS)
def test_an_ensemble_is_the_twin_of_each_member(name: str) -> None:
    if name == "vmap with pmean":
        pytest.skip("names a lane axis of its own")
    ours, by_hand = PAIRS[name]
    ensemble = mu.vmap(lambda _: Model())(jnp.arange(3))
    ensemble.w.value = ensemble.w.value * jnp.array([1.0, 2.0, 3.0])[:, None]
    out = mu.jit(mu.vmap(ours))(ensemble)
    for lane in range(3):
        expected, state = by_hand({**start(), "w": start()["w"] * (lane + 1)})
        jax.tree.map(lambda a, b, i=lane: np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-5), out, expected)
        np.testing.assert_allclose(ensemble.mean[lane], state["mean"], rtol=1e-4, atol=1e-5)
        assert int(ensemble.calls[lane]) == int(state["calls"])


@pytest.mark.parametrize("name", PAIRS)
def test_compiled_programs_cost_no_more(name: str) -> None:
    """Each cell is one input, and XLA counts no more operations than for the hand-written program."""
    ours, by_hand = PAIRS[name]
    model = Model()
    jaxpr = mu.make_jaxpr(ours)(model)
    assert len(jaxpr.in_avals) == 3
    hand = jax.jit(by_hand).lower(start()).compile().cost_analysis()
    pure, state = mu.functionalize(lambda: ours(model), of=model)
    mine = jax.jit(pure).lower(state).compile().cost_analysis()
    assert mine.get("flops", 0) <= hand.get("flops", 0)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("compiled", [False, True])
def test_an_exception_leaves_everything_as_it_was(name: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, by_hand = PAIRS[name]
    model = Model()
    model.parts = [mu.Variable(0), "static"]
    before = mu.state(model)
    shown = repr(model)
    write = mu.Variable.set

    def fails(self: mu.Variable, value: Any) -> None:
        write(self, value)
        if isinstance(self, mu.BatchStat):
            model.parts.append("more")
            model.flag = True
            model.extra = mu.Cache(0)
            raise KeyError("in the middle")

    with monkeypatch.context() as patch:
        patch.setattr(mu.Variable, "set", fails)
        patch.setattr(mu.Variable, "value", property(mu.Variable.get, fails))
        with pytest.raises(KeyError, match="in the middle"):
            (mu.jit(ours) if compiled or name == "plain" else ours)(model)
    assert mu.state(model) == before
    assert repr(model) == shown
    del model.parts
    expected, state = by_hand(start())
    check(model, ours(model), expected, state)
