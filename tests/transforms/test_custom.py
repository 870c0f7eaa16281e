"""`mu.custom_vjp` and `mu.custom_jvp`: rules over states, beside those of JAX where there are none."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import errors

X = jnp.array([1.0, 2.0])
XS = jnp.array([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5], [2.0, 2.0], [-1.0, 1.0]])
compiled_or_not = pytest.mark.parametrize("compiled", [False, True])


def around(f: Any, compiled: bool) -> Any:
    return mu.jit(f) if compiled else f


def close(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), a, b)


class Net(mu.Module):
    """The function counts 1, its rule 100; the rule's derivatives are 2 and 3 times the true ones, to be told apart."""

    def __init__(self) -> None:
        self.w = mu.Param(jnp.array([0.5, -2.0]))
        self.n = mu.Variable(0)
        self.h = mu.Hidden(jnp.float32(0))
        self.rngs = mu.Rngs(5)

    @mu.custom_vjp
    def reverse(self, x: Any) -> Any:
        self.n += 1
        return jnp.sum(self.w.value * x)

    def _forward(self, x: Any) -> Any:
        self.n += 100
        self.h.value = jnp.sum(x)
        return jnp.sum(self.w.value * x), (self, x)

    def _backward(residuals: Any, g: Any) -> Any:  # type: ignore[misc]
        self, x = residuals
        return mu.State({("w",): 2 * g * x}), 3 * g * self.w.value

    reverse.defvjp(_forward, _backward)

    @mu.custom_jvp
    def forward(self, x: Any) -> Any:
        self.n += 1
        return jnp.sum(self.w.value * x)

    @forward.defjvp
    def _jvp(primals: Any, tangents: Any) -> Any:  # type: ignore[misc]
        (self, x), (d, dx) = primals, tangents
        self.n += 100
        self.h.value = jnp.sum(x)
        return jnp.sum(self.w.value * x), 2 * jnp.sum(d["w"] * x) + 3 * jnp.sum(self.w.value * dx)


W = jnp.array([0.5, -2.0])
Run = Callable[[Net, Any], Any]

# name -> (run, what it gives, what is counted, the hidden state)
PLAIN: dict[str, tuple[Run, Any, int, float]] = {
    "call": (lambda m, f: f(m, X), jnp.dot(W, X), 1, 0),
    "vmap": (lambda m, f: mu.vmap(lambda x: f(m, x))(XS), XS @ W, 1, 0),
    "scan": (lambda m, f: mu.scan(lambda c, x: (c + f(m, x), None), jnp.float32(0), XS)[0], (XS @ W).sum(), 5, 0),
    "cond": (lambda m, f: mu.cond(jnp.bool_(True), lambda: f(m, X), lambda: 0.0), jnp.dot(W, X), 1, 0),
    "not taken": (lambda m, f: mu.cond(jnp.bool_(False), lambda: f(m, X), lambda: 0.0), jnp.float32(0), 0, 0),
    "while": (lambda m, f: mu.while_loop(lambda c: c > -9, lambda c: c + f(m, X), 0.0), jnp.float32(-10.5), 3, 0),
    "remat": (lambda m, f: mu.remat(f)(m, X), jnp.dot(W, X), 1, 0),
}
DIFFERENTIATED: dict[str, tuple[Run, Any, int, float]] = {
    "of the model": (lambda m, f: mu.grad(f)(m, X)["w"], 2 * X, 100, 3),
    "of the input": (lambda m, f: mu.grad(f, argnums=1)(m, X), 3 * W, 100, 3),
    "of a closure": (lambda m, f: mu.grad(lambda x: f(m, x))(X), 3 * W, 100, 3),
    "of=": (lambda m, f: mu.grad(lambda: f(m, X), of=m)()["w"], 2 * X, 100, 3),
    "of both": (lambda m, f: mu.grad(lambda x: f(m, x), 0, of=m)(X)[1], 3 * W, 100, 3),
    "of jit": (lambda m, f: mu.grad(mu.jit(f))(m, X)["w"], 2 * X, 100, 3),
    "of remat": (lambda m, f: mu.grad(mu.remat(f))(m, X)["w"], 2 * X, 100, 3),
    "of cond": (
        lambda m, f: mu.grad(lambda m: mu.cond(jnp.bool_(True), lambda: f(m, X), lambda: 0.0))(m)["w"],
        2 * X,
        100,
        3,
    ),
    "in cond": (
        lambda m, f: mu.cond(jnp.bool_(True), lambda: mu.grad(f)(m, X)["w"], lambda: X),
        2 * X,
        100,
        3,
    ),
    "of vmap": (lambda m, f: mu.grad(lambda x: jnp.sum(mu.vmap(lambda _: f(m, x))(XS)))(X), 15 * W, 100, 3),
    "of scan": (
        lambda m, f: mu.grad(lambda m: mu.scan(lambda c, x: (c + f(m, x), None), jnp.float32(0), XS)[0])(m)["w"],
        2 * XS.sum(0),
        500,
        0,
    ),
    "in scan": (
        lambda m, f: mu.scan(lambda c, x: (c + mu.grad(f)(m, x)["w"], None), jnp.zeros(2), XS)[0],
        2 * XS.sum(0),
        500,
        0,
    ),
    "of blocks": (
        lambda m, f: mu.grad(
            lambda m: mu.scan(lambda c, x: (c + f(m, x), None), jnp.float32(0), XS, checkpoint_every=2)[0]
        )(m)["w"],
        2 * XS.sum(0),
        500,
        0,
    ),
    "of fori_loop": (
        lambda m, f: mu.grad(lambda m: mu.fori_loop(0, 5, lambda i, c: c + f(m, XS[i]), jnp.float32(0)))(m)["w"],
        2 * XS.sum(0),
        500,
        0,
    ),
    "vjp": (lambda m, f: mu.vjp(f, m, X)[1](jnp.float32(1))[1], 3 * W, 100, 3),
    "jacrev": (lambda m, f: mu.jacrev(f, 1)(m, X), 3 * W, 100, 3),
    "value": (lambda m, f: mu.value_and_grad(f)(m, X)[0], jnp.dot(W, X), 100, 3),
}
FORWARD: dict[str, tuple[Run, Any, int, float]] = {
    "jvp": (
        lambda m, f: mu.jvp(f, (m, X), (mu.State({("w",): X}), X))[1],
        2 * jnp.dot(X, X) + 3 * jnp.dot(W, X),
        100,
        3,
    ),
    "linearize": (lambda m, f: mu.linearize(f, m, X)[1](mu.State({("w",): X}), 0 * X), 2 * jnp.dot(X, X), 100, 3),
    "jacfwd": (lambda m, f: mu.jacfwd(f, 1)(m, X), 3 * W, 100, 3),
    "hessian": (lambda m, f: mu.hessian(f, 1)(m, X), jnp.zeros((2, 2)), 100, 3),
}
CASES = [("reverse", name) for name in (*PLAIN, *DIFFERENTIATED)]
CASES += [("forward", name) for name in (*PLAIN, *DIFFERENTIATED, *FORWARD)]


@compiled_or_not
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_rules(kind: str, name: str, compiled: bool) -> None:
    """The function's writes without differentiation, the rule's with it; each once, whatever is around."""
    run, expected, count, hidden = {**PLAIN, **DIFFERENTIATED, **FORWARD}[name]
    net = Net()
    f: Any = lambda m, x: getattr(m, kind)(x)  # noqa: E731
    ours = around(lambda m: run(m, f), compiled)
    for times in (1, 2):
        close(ours(net), jnp.asarray(expected))
        assert int(net.n) == times * count
        np.testing.assert_allclose(net.h.value, hidden)


@pytest.mark.parametrize("kind", ["reverse", "forward"])
def test_functionalized(kind: str) -> None:
    net = Net()
    pure, state = mu.functionalize(lambda x: getattr(net, kind)(x), of=net)
    out, new = jax.jit(pure)(state, X)
    np.testing.assert_allclose(out, W @ X)
    assert int(new["n"]) == 1

    def loss(w: Any) -> Any:
        out, new = pure(state | mu.State({("w",): w}, {("w",): mu.Param}), X)
        return out, new["n"]

    for transform in (lambda f: f, jax.jit):
        gradient, n = transform(jax.grad(loss, has_aux=True))(W)
        np.testing.assert_allclose(gradient, 2 * X)
        assert int(n) == 100
    assert int(net.n) == 0


@pytest.mark.parametrize("kind", ["reverse", "forward"])
def test_an_ensemble(kind: str) -> None:
    nets = mu.vmap(lambda _: Net())(jnp.arange(3))
    nets.w.value = nets.w.value * jnp.arange(3.0)[:, None]
    gradient, dx = mu.jit(mu.vmap(lambda m: mu.grad(lambda m, x: getattr(m, kind)(x), (0, 1))(m, X)))(nets)
    close(gradient["w"], jnp.stack([2 * X] * 3))
    close(dx, 3 * jnp.arange(3.0)[:, None] * W[None])
    np.testing.assert_array_equal(nets.n, [100] * 3)


@pytest.mark.parametrize("kind", ["reverse", "forward"])
def test_layers_in_a_scan(kind: str) -> None:
    nets = mu.vmap(lambda _: Net())(jnp.arange(3))

    def loss(nets: Any) -> Any:
        return mu.scan(lambda c, m: (c + getattr(m, kind)(X), None), jnp.float32(0), nets)[0]

    close(mu.grad(loss)(nets)["w"], jnp.stack([2 * X] * 3))
    np.testing.assert_array_equal(nets.n, [100] * 3)
    np.testing.assert_array_equal(nets.h, [3.0] * 3)


def test_other_states_do_not_stop_the_compiler(traces: Any) -> None:
    """Each of the function and its rule is traced once for a call."""
    w = mu.Param(X)
    f = traces.count(lambda m, x: jnp.sum(m.value * x))
    forward = traces.count(lambda m, x: (jnp.sum(m.value * x), (m.value, x)))
    backward = traces.count(lambda r, g: (mu.State({(): g * r[1]}), g * r[0]))
    rule = mu.custom_vjp(f)
    rule.defvjp(forward, backward)
    step = mu.jit(mu.grad(rule))
    step(w, X)
    step(w, X)
    assert (traces[f], traces[forward], traces[backward]) == (1, 1, 1)


# -- without states: as JAX ---------------------------------------------------------------------------------------


def _clip(module: Any) -> Any:
    @module.custom_vjp
    def f(x: Any, y: Any) -> Any:
        return {"a": jnp.sin(x) * y, "b": [x * y]}

    def forward(x: Any, y: Any) -> Any:
        return f(x, y), (x, y)

    def backward(r: Any, g: Any) -> Any:
        x, y = r
        return 2 * g["a"] * jnp.cos(x) * y + g["b"][0] * y, g["a"] * jnp.sin(x) + g["b"][0] * x

    f.defvjp(forward, backward)
    return f


def _log1pexp(module: Any) -> Any:
    @module.custom_jvp
    def f(x: Any, y: Any) -> Any:
        return {"a": jnp.sin(x) * y, "b": [x * y]}

    @f.defjvp
    def rule(primals: Any, tangents: Any) -> Any:
        (x, y), (dx, dy) = primals, tangents
        out = f(x, y)
        return out, {"a": 2 * dx * jnp.cos(x) * y + dy * jnp.sin(x), "b": [dx * y + x * dy]}

    return f


def _total(f: Any) -> Any:
    return lambda x, y: jnp.sum(f(x, y)["a"] ** 2) + jnp.sum(f(x, y)["b"][0])


STATELESS: dict[str, Callable[[Any, Any], Any]] = {
    "call": lambda m, f: f(X, X),
    "jit": lambda m, f: m.jit(f)(X, X),
    "vmap": lambda m, f: m.vmap(f, in_axes=(0, None))(XS, X),
    "grad": lambda m, f: m.grad(_total(f), (0, 1))(X, X),
    "jit of grad": lambda m, f: m.jit(m.grad(_total(f), (0, 1)))(X, X),
    "grad of jit": lambda m, f: m.grad(m.jit(_total(f)))(X, X),
    "vmap of grad": lambda m, f: m.vmap(m.grad(_total(f), (0, 1)))(XS, XS),
    "grad of vmap": lambda m, f: m.grad(lambda x: jnp.sum(m.vmap(_total(f))(x, XS)))(XS),
    "grad of grad": lambda m, f: m.grad(lambda x: jnp.sum(m.grad(_total(f))(x, X)))(X),
    "third derivative": lambda m, f: m.grad(lambda x: jnp.sum(m.grad(lambda x: jnp.sum(m.grad(_total(f))(x, X)))(x)))(
        X
    ),
    "jit of the third": lambda m, f: m.jit(
        m.grad(lambda x: jnp.sum(m.grad(lambda x: jnp.sum(m.grad(_total(f))(x, X)))(x)))
    )(X),
    "jacrev": lambda m, f: m.jacrev(f, (0, 1))(X, X),
    "vjp": lambda m, f: m.vjp(f, X, X)[1](f(X, X)),
}
STATELESS_FORWARD: dict[str, Callable[[Any, Any], Any]] = {
    "jvp": lambda m, f: m.jvp(f, (X, X), (X, 2 * X)),
    "jvp of grad": lambda m, f: m.jvp(lambda x: m.grad(_total(f))(x, X), (X,), (X,)),
    "jacfwd": lambda m, f: m.jacfwd(f, (0, 1))(X, X),
    "hessian": lambda m, f: m.hessian(f)(X, X),
    "linearize": lambda m, f: m.linearize(f, X, X)[1](X, X),
}


@pytest.mark.parametrize("make", [_clip, _log1pexp])
@pytest.mark.parametrize("name", [*STATELESS, *STATELESS_FORWARD])
def test_functions_without_states_are_as_in_jax(name: str, make: Any) -> None:
    run = {**STATELESS, **STATELESS_FORWARD}[name]
    if make is _clip and name in STATELESS_FORWARD:
        for module in (mu, jax):
            with pytest.raises(TypeError, match="forward-mode"):
                run(module, make(module))
        return
    close(run(mu, make(mu)), run(jax, make(jax)))


@pytest.mark.parametrize("make", [_clip, _log1pexp])
def test_raw_jax_around_a_rule_without_states(make: Any) -> None:
    ours, raw = make(mu), make(jax)
    close(jax.jit(ours)(X, X), raw(X, X))
    close(jax.grad(_total(ours))(X, X), jax.grad(_total(raw))(X, X))
    close(jax.vmap(jax.grad(_total(ours)))(XS, XS), jax.vmap(jax.grad(_total(raw)))(XS, XS))
    close(
        jax.lax.scan(lambda c, x: (c, jax.grad(_total(ours))(x, X)), 0, XS)[1],
        jax.lax.scan(lambda c, x: (c, jax.grad(_total(raw))(x, X)), 0, XS)[1],
    )


def test_a_rule_that_calls_its_own_function_and_writes() -> None:
    """First, second and third order; each run is counted once, whatever the order."""

    class Wave(mu.Module):
        def __init__(self) -> None:
            self.w = mu.Param(jnp.float32(0.5))
            self.n = mu.Variable(0)

    @mu.custom_vjp
    def f(m: Any, x: Any) -> Any:
        m.n += 1
        return jnp.sin(m.w.value * x)

    def forward(m: Any, x: Any) -> Any:
        return f(m, x), (m, x)

    def backward(r: Any, g: Any) -> Any:
        m, x = r
        cosine = jnp.cos(m.w.value * x)
        return mu.State({("w",): g * x * cosine}), g * m.w.value * cosine

    f.defvjp(forward, backward)
    raw: Any = lambda w, x: jnp.sin(w * x)  # noqa: E731
    wave, x = Wave(), jnp.float32(0.3)
    ours: Any = lambda m, x: f(m, x)  # noqa: E731
    count = 0
    for order in (1, 2, 3):
        ours, raw = mu.grad(ours, argnums=1), jax.grad(raw, argnums=1)
        for compiled in (False, True):
            np.testing.assert_allclose(around(ours, compiled)(wave, x), raw(jnp.float32(0.5), x), rtol=1e-5)
            count += 1
            assert int(wave.n) == count, order
    mixed = mu.grad(lambda m: mu.grad(f, argnums=1)(m, x))(wave)["w"]
    expected = jax.grad(lambda w: jax.grad(lambda w, x: jnp.sin(w * x), argnums=1)(w, x))(jnp.float32(0.5))
    np.testing.assert_allclose(mixed, expected, rtol=1e-5)


def test_a_jvp_rule_that_calls_its_own_function_and_writes() -> None:
    n = mu.Variable(0)

    @mu.custom_jvp
    def f(w: Any, x: Any) -> Any:
        n.value += 1
        return jnp.sin(w.value * x)

    @f.defjvp
    def rule(primals: Any, tangents: Any) -> Any:
        (w, x), (dw, dx) = primals, tangents
        return f(w, x), jnp.cos(w.value * x) * (dw[()] * x + w.value * dx)

    w, x = mu.Param(jnp.float32(0.5)), jnp.float32(0.3)
    ours: Any = lambda w, x: f(w, x)  # noqa: E731
    raw: Any = lambda w, x: jnp.sin(w * x)  # noqa: E731
    for _ in range(3):
        ours, raw = mu.grad(ours, argnums=1), jax.grad(raw, argnums=1)
        np.testing.assert_allclose(ours(w, x), raw(w.value, x), rtol=1e-5)
        np.testing.assert_allclose(mu.jit(ours)(w, x), raw(w.value, x), rtol=1e-5)
    assert int(n) == 6
    hessian = mu.hessian(lambda w: f(w, x))(w)[()][()]
    np.testing.assert_allclose(hessian, jax.hessian(lambda w: jnp.sin(w * x))(w.value), rtol=1e-5)


def test_one_function_twice_and_functions_inside_each_other() -> None:
    net = Net()

    @mu.custom_vjp
    def outer(m: Net, x: Any) -> Any:
        return m.reverse(x) + m.reverse(2 * x)

    outer.defvjp(lambda m, x: (outer(m, x), (m, x)), lambda r, g: (mu.State({("w",): 7 * g * r[1]}), None))
    np.testing.assert_allclose(mu.grad(outer)(net, X)["w"], 7 * X)
    assert int(net.n) == 2
    gradient = mu.grad(lambda m: m.reverse(X) + m.reverse(X) + outer(m, X))(net)["w"]
    np.testing.assert_allclose(gradient, 11 * X)
    assert int(net.n) == 2 + 200 + 2


# -- what a rule may do -------------------------------------------------------------------------------------------


@compiled_or_not
def test_a_write_only_when_differentiated(compiled: bool) -> None:
    n = mu.Variable(0)

    @mu.custom_vjp
    def f(x: Any) -> Any:
        return x * x

    def forward(x: Any) -> Any:
        n.value += 1
        return x * x, x

    f.defvjp(forward, lambda x, g: (2 * x * g,))
    around(f, compiled)(3.0)
    around(mu.vmap(f), compiled)(X)
    assert int(n) == 0
    assert float(around(mu.grad(f), compiled)(3.0)) == 6
    assert int(n) == 1
    around(lambda x: mu.vjp(f, x)[0], compiled)(3.0)
    assert int(n) == 2


@compiled_or_not
@pytest.mark.parametrize("kind", ["vjp", "jvp"])
def test_draws_in_a_rule(kind: str, compiled: bool) -> None:
    """The rule's draws are the stream's next; the count goes on from what was drawn."""
    net = Net()
    key = jax.random.fold_in(jax.random.key(5), 0)

    def draw() -> Any:
        return jax.random.normal(net.rngs())

    if kind == "vjp":
        f = mu.custom_vjp(lambda x: x * draw())

        def forward(x: Any) -> Any:
            z = draw()
            draw()
            return x * z, z

        f.defvjp(forward, lambda z, g: (g * z,))
    else:
        f = mu.custom_jvp(lambda x: x * draw())

        @f.defjvp
        def rule(primals: Any, tangents: Any) -> Any:
            z = draw()
            draw()
            return primals[0] * z, tangents[0] * z

    value, gradient = around(mu.value_and_grad(f), compiled)(2.0)
    z = jax.random.normal(key)
    np.testing.assert_allclose(value, 2 * z, rtol=1e-6)
    np.testing.assert_allclose(gradient, z, rtol=1e-6)
    assert int(net.rngs.default.value["count"]) == 2
    around(f, compiled)(2.0)
    assert int(net.rngs.default.value["count"]) == 3


def test_draws_per_lane() -> None:
    net = Net()
    f = mu.custom_vjp(lambda x: x * jax.random.normal(net.rngs()))

    def forward(x: Any) -> Any:
        z = jax.random.normal(net.rngs())
        return x * z, z

    f.defvjp(forward, lambda z, g: (g * z,))
    value, gradient = mu.vmap(mu.value_and_grad(f))(X)
    np.testing.assert_allclose(value, X * gradient, rtol=1e-6)
    assert float(gradient[0]) != float(gradient[1])
    assert int(net.rngs.default.value["count"]) == 1
    inner = mu.grad(lambda x: jnp.sum(mu.vmap(f)(x)))(X)
    assert float(inner[0]) != float(inner[1])


def test_what_is_written_is_a_constant_for_derivatives() -> None:
    memory = mu.Hidden(jnp.float32(0))

    @mu.custom_vjp
    def f(x: Any) -> Any:
        memory.value = x * x
        return x

    def forward(x: Any) -> Any:
        memory.value = x * x
        return x, None

    f.defvjp(forward, lambda _, g: (g,))
    value, gradient = mu.value_and_grad(lambda x: f(x) + memory.value)(3.0)
    assert (float(value), float(gradient), float(memory)) == (12, 1, 9)


@compiled_or_not
def test_a_backward_rule_reads_what_held_after_its_forward_rule(compiled: bool) -> None:
    scale = mu.Variable(jnp.float32(1))
    f = mu.custom_vjp(lambda x: x * x)

    def forward(x: Any) -> Any:
        scale.value = scale.value + 1
        return x * x, x

    f.defvjp(forward, lambda x, g: (g * scale.value,))

    def loss(x: Any) -> Any:
        out = f(x)
        scale.value = jnp.float32(100)
        return out

    assert float(around(mu.grad(loss), compiled)(3.0)) == 2
    assert float(scale) == 100


def test_a_pullback_is_applied_later() -> None:
    """The backward rule runs when its call is over: with the states of then."""
    net = Net()
    _, pull = mu.vjp(lambda m, x: m.reverse(x), net, X)
    net.w.value = net.w.value * 10
    net.n.value = 7
    for _ in range(2):
        gradient, dx = pull(jnp.float32(1))
        close(gradient["w"], 2 * X)
        close(dx, 3 * W)
    close(jax.jit(pull)(jnp.float32(1))[1], 3 * W)
    assert int(net.n) == 7


def test_residuals_of_any_kind() -> None:
    net = Net()
    f = mu.custom_vjp(lambda m, x: jnp.sum(m.w.value * x))

    def forward(m: Net, x: Any) -> Any:
        return jnp.sum(m.w.value * x), {"m": [m], "w": m.w, "x": (x, None), "k": 3, "s": mu.state(m, mu.Param)}

    def backward(r: Any, g: Any) -> Any:
        assert r["m"][0] is net and r["w"] is net.w and r["x"][1] is None
        return r["s"].map(lambda path, w: g * r["x"][0] * r["k"]), g * r["m"][0].w.value + 0 * r["w"].value

    f.defvjp(forward, backward)
    gradient, dx = mu.jit(mu.grad(f, (0, 1)))(net, X)
    close(gradient["w"], 3 * X)
    close(dx, W)


def test_modules_among_the_results() -> None:
    net = Net()
    f = mu.custom_vjp(lambda m, x: {"y": jnp.sum(m.w.value * x), "m": m})
    f.defvjp(
        lambda m, x: ({"y": jnp.sum(m.w.value * x), "m": m}, x),
        lambda x, g: (mu.State({("w",): 5 * g["y"] * x}), None),
    )
    assert f(net, X)["m"] is net
    assert mu.jit(f)(net, X)["m"] is net
    close(mu.grad(lambda m: f(m, X)["y"])(net)["w"], 5 * X)


class Tied(mu.Module):
    def __init__(self) -> None:
        self.a = mu.Param(X)
        self.z = [self.a]


def test_tied_weights_have_one_cotangent() -> None:
    f = mu.custom_vjp(lambda m: jnp.sum(m.a.value * m.z[0].value))
    f.defvjp(lambda m: (jnp.sum(m.a.value * m.z[0].value), m), lambda m, g: (mu.State({("a",): 2 * g * m.z[0].value}),))
    gradient = mu.grad(f)(Tied())
    assert set(gradient) == {("a",)}
    close(gradient["a"], 2 * X)

    @mu.custom_jvp
    def h(m: Tied) -> Any:
        return jnp.sum(m.a.value * m.z[0].value)

    @h.defjvp
    def rule(primals: Any, tangents: Any) -> Any:
        assert set(tangents[0]) == {("a",)}
        return h(*primals), 2 * jnp.sum(primals[0].z[0].value * tangents[0]["a"])

    close(mu.grad(h)(Tied())["a"], 2 * X)


def test_one_module_as_two_arguments() -> None:
    w = mu.Param(X)
    f = mu.custom_vjp(lambda a, b: jnp.sum(a.value * b.value))
    f.defvjp(
        lambda a, b: (jnp.sum(a.value * b.value), (a, b)),
        lambda r, g: (mu.State({(): g * r[1].value}), mu.State({(): g * r[0].value})),
    )
    close(mu.grad(lambda w: f(w, w))(w)[()], 2 * X)
    other = mu.Param(3 * X)
    first, second = mu.grad(f, (0, 1))(w, other)
    close(first[()], 3 * X)
    close(second[()], X)


def test_modules_deep_in_arguments() -> None:
    net = Net()
    f = mu.custom_vjp(lambda d: jnp.sum(d["m"][0].w.value * d["x"]))
    f.defvjp(
        lambda d: (jnp.sum(d["m"][0].w.value * d["x"]), d),
        lambda d, g: ({"m": [mu.State({("w",): g * d["x"]})], "x": g * d["m"][0].w.value},),
    )
    gradient = mu.grad(f)({"m": [net], "x": X})
    close(gradient["m"][0]["w"], X)
    close(gradient["x"], W)


@compiled_or_not
def test_a_captured_model_that_is_not_differentiated(compiled: bool) -> None:
    net = Net()
    f = mu.custom_vjp(lambda x: jnp.sum(net.w.value * x))

    def forward(x: Any) -> Any:
        net.n += 1
        return jnp.sum(net.w.value * x), None

    f.defvjp(forward, lambda _, g: (4 * g * net.w.value,))
    run = around(mu.grad(f), compiled)
    close(run(X), 4 * W)
    net.w.value = net.w.value * 2
    close(run(X), 8 * W)
    assert int(net.n) == 2


@compiled_or_not
def test_captured_arrays_of_an_enclosing_program(compiled: bool) -> None:
    def loss(y: Any, x: Any) -> Any:
        f = mu.custom_vjp(lambda x: jnp.sum(y * x))
        f.defvjp(lambda x: (jnp.sum(y * x), None), lambda _, g: (5 * g * y,))
        return f(x)

    close(around(mu.grad(loss, 1), compiled)(W, X), 5 * W)
    close(mu.vmap(mu.grad(loss, 1))(XS, XS), 5 * XS)


# -- options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["argnums", "argnames", "last", "names and numbers"])
def test_nondiff_arguments(form: str) -> None:
    fixed: dict[str, Any] = {
        "argnums": {"nondiff_argnums": (0,)},
        "argnames": {"nondiff_argnames": ("k",)},
        "last": {"nondiff_argnums": (1,)},
        "names and numbers": {"nondiff_argnums": (0,), "nondiff_argnames": ("p",)},
    }[form]
    functions: dict[str, Any] = {
        "argnums": lambda k, x: k(x),
        "argnames": lambda x, k: k(x),
        "last": lambda x, k: k(x),
        "names and numbers": lambda k, x, p: k(x) ** p,
    }
    function = functions[form]
    args = {"argnums": (jnp.sin, 3.0), "names and numbers": (jnp.sin, 3.0, 1)}.get(form, (3.0, jnp.sin))
    number = 1 if form in ("argnums", "names and numbers") else 0
    for module in (mu, jax):
        f = module.custom_vjp(function, **fixed)
        f.defvjp(lambda *a: (function(*a), 5.0), lambda *a: (a[-2] * a[-1],))
        np.testing.assert_allclose(module.grad(f, number)(*args), 5)
        np.testing.assert_allclose(f(*args), jnp.sin(3.0), rtol=1e-6)
        g = module.custom_jvp(function, **fixed)
        g.defjvp(lambda *a: (function(*args), 6.0 * a[-1][0]))
        np.testing.assert_allclose(module.grad(g, number)(*args), 6)


def test_nondiff_names_by_keyword() -> None:
    f = mu.custom_vjp(lambda x, k: k(x), nondiff_argnames=("k",))
    f.defvjp(lambda x, k: (k(x), None), lambda k, r, g: (k(g),))
    np.testing.assert_allclose(mu.grad(f)(3.0, k=jnp.sin), jnp.sin(1.0), rtol=1e-6)
    np.testing.assert_allclose(mu.jit(lambda x: mu.grad(f)(x, k=jnp.sin))(3.0), jnp.sin(1.0), rtol=1e-6)


def test_a_module_as_nondiff_argument_is_read_by_the_backward_rule() -> None:
    f = mu.custom_vjp(lambda m, x: jnp.sum(m.w.value * x), nondiff_argnums=(0,))

    def forward(m: Net, x: Any) -> Any:
        m.n += 1
        return jnp.sum(m.w.value * x), None

    f.defvjp(forward, lambda m, _, g: (2 * g * m.w.value,))
    net = Net()
    close(mu.grad(f, 1)(net, X), 2 * W)
    assert int(net.n) == 1


def test_a_module_as_nondiff_argument() -> None:
    f = mu.custom_vjp(lambda m, x: jnp.sum(m.w.value * x), nondiff_argnums=(0,))

    def forward(m: Net, x: Any) -> Any:
        m.n += 1
        return jnp.sum(m.w.value * x), m.w.value

    f.defvjp(forward, lambda m, w, g: (2 * g * w,))
    net = Net()
    close(mu.grad(f, 1)(net, X), 2 * W)
    close(mu.jit(mu.grad(f, 1))(net, X), 2 * W)
    assert int(net.n) == 2
    with pytest.raises(errors.StructureError, match="rule says nothing of it"):
        mu.grad(f, 0)(net, X)
    assert int(net.n) == 2


@pytest.mark.parametrize("options", [{"nondiff_argnums": (3,)}, {"nondiff_argnames": ("k",)}])
def test_nondiff_arguments_that_there_are_not(options: Any) -> None:
    for make in (mu.custom_vjp, mu.custom_jvp):
        with pytest.raises((errors.MutatisError, ValueError, TypeError)):
            make(lambda x: x * x, **options)


def test_nondiff_argnames_may_be_one_name() -> None:
    for module in (jax, mu):
        f = module.custom_vjp(lambda x, fn: fn(x), nondiff_argnames="fn")
        f.defvjp(lambda x, fn: (fn(x), None), lambda fn, r, g: (2.0 * g,))
        assert float(module.grad(f)(3.0, jnp.sin)) == 2


def test_symbolic_zeros() -> None:
    zero = jax.custom_derivatives.SymbolicZero
    seen: list[Any] = []
    f = mu.custom_vjp(lambda m, x: (jnp.sum(m.w.value * x), x))

    def forward(m: Net, x: Any) -> Any:
        m.n += 1
        assert x.perturbed
        return (jnp.sum(m.w.value * x.value), x.value), (m, x.value)

    def backward(r: Any, g: Any) -> Any:
        seen.append([type(part) is zero for part in g])
        m, x = r
        return mu.State({("w",): g[0] * x}), g[0] * m.w.value

    f.defvjp(forward, backward, symbolic_zeros=True)
    net = Net()
    close(mu.grad(lambda m, x: f(m, x)[0])(net, X)["w"], X)
    close(mu.jit(mu.grad(lambda x: f(net, x)[0]))(X), W)
    assert seen == [[False, True]] * 2
    assert int(net.n) == 2


def test_symbolic_zeros_of_a_jvp() -> None:
    @functools.partial(mu.custom_jvp)
    def f(x: Any, y: Any) -> Any:
        return x * y

    def rule(primals: Any, tangents: Any) -> Any:
        return primals[0] * primals[1], 2.0 * tangents[0] + 3.0 * tangents[1]

    f.defjvp(rule, symbolic_zeros=True)
    assert float(mu.grad(f)(2.0, 5.0)) == 2
    assert float(mu.jvp(f, (2.0, 5.0), (1.0, 1.0))[1]) == 5


@compiled_or_not
def test_optimize_remat(compiled: bool) -> None:
    def make(module: Any) -> Any:
        f = module.custom_vjp(lambda w, x: jnp.sum(jnp.sin(w * x)))
        f.defvjp(
            lambda w, x: (jnp.sum(jnp.sin(w * x)), (w, x)),
            lambda r, g: (2 * g * r[1], 3 * g * r[0]),
            optimize_remat=True,
        )
        return f

    ours, raw = make(mu), make(jax)
    close(around(mu.grad(ours, (0, 1)), compiled)(W, X), jax.grad(raw, (0, 1))(W, X))
    close(around(mu.grad(mu.remat(ours), (0, 1)), compiled)(W, X), jax.grad(raw, (0, 1))(W, X))
    close(around(ours, compiled)(W, X), raw(W, X))


@compiled_or_not
def test_optimize_remat_with_states(compiled: bool) -> None:
    """The function and its rule write the same."""
    net = Net()

    @mu.custom_vjp
    def f(m: Net, x: Any) -> Any:
        m.n += 1
        return jnp.sum(m.w.value * x)

    def forward(m: Net, x: Any) -> Any:
        m.n += 1
        return jnp.sum(m.w.value * x), (m, x)

    f.defvjp(forward, lambda r, g: (mu.State({("w",): 2 * g * r[1]}), g * r[0].w.value), optimize_remat=True)
    close(around(mu.grad(f), compiled)(net, X)["w"], 2 * X)
    close(around(mu.grad(mu.remat(f)), compiled)(net, X)["w"], 2 * X)
    around(f, compiled)(net, X)
    assert int(net.n) == 3


@pytest.mark.parametrize("inside", ["jit", "remat", "scan", "cond", "blocks"])
def test_optimize_remat_does_not_lose_writes(inside: str) -> None:
    n = mu.Variable(0)
    f = mu.custom_vjp(lambda x: x * x)

    def forward(x: Any) -> Any:
        n.value += 1
        return x * x, x

    f.defvjp(forward, lambda x, g: (2 * x * g,), optimize_remat=True)
    step = mu.grad(f)
    runs: dict[str, Callable[[], Any]] = {
        "jit": lambda: mu.jit(step)(1.0),
        "remat": lambda: mu.grad(mu.remat(f))(1.0),
        "scan": lambda: mu.scan(lambda c, _: (c, step(c)), 1.0, length=1),
        "cond": lambda: mu.cond(True, lambda: step(1.0), lambda: 0.0),
        "blocks": lambda: mu.grad(lambda x: mu.scan(lambda c, _: (f(c), None), x, length=1, checkpoint_every=1)[0])(
            1.0
        ),
    }
    try:
        runs[inside]()
    except errors.MutatisError:
        return  # refused is right too
    assert int(n) == 1


def test_defjvps() -> None:
    n = mu.Variable(0)

    def make(module: Any) -> Any:
        @module.custom_jvp
        def f(x: Any, y: Any) -> Any:
            if module is mu:
                n.value += 1
            return {"out": x * y}

        f.defjvps(lambda t, out, x, y: {"out": 2.0 * t * y}, None)
        return f

    ours, raw = make(mu), make(jax)
    for argnums in (0, 1):
        expected = jax.grad(lambda x, y: raw(x, y)["out"], argnums)(2.0, 3.0)
        assert float(mu.grad(lambda x, y: ours(x, y)["out"], argnums)(2.0, 3.0)) == float(expected)
    assert int(n) == 2


def test_arguments_by_name_defaults_and_many() -> None:
    f = mu.custom_vjp(lambda x, y=2.0: x * y)
    f.defvjp(lambda x, y: (x * y, (x, y)), lambda r, g: (10 * g * r[1], 20 * g * r[0]))
    assert float(mu.grad(f)(3.0)) == 20
    assert float(mu.grad(lambda y: f(y=y, x=3.0))(5.0)) == 60
    h = mu.custom_vjp(lambda *xs: sum(xs[1:], xs[0]))
    h.defvjp(lambda *xs: (sum(xs[1:], xs[0]), len(xs)), lambda n, g: (g * 1.0, g * 2.0, g * 3.0))
    assert [float(d) for d in mu.grad(h, (0, 1, 2))(1.0, 1.0, 1.0)] == [1, 2, 3]
    w = mu.Param(X)
    none = mu.custom_vjp(lambda: w.value * 2)
    none.defvjp(lambda: (w.value * 2, None), lambda r, g: ())
    close(none(), 2 * X)
    close(mu.jit(none)(), 2 * X)
    keyword = mu.custom_vjp(lambda x, *, y: x * y)
    keyword.defvjp(lambda x, y: (x * y, y), lambda y, g: (g * y,))
    with pytest.raises(errors.ArgumentError, match="keyword-only"):
        keyword(1.0, y=2.0)


def test_integer_arguments() -> None:
    def make(module: Any) -> tuple[Any, Any]:
        f = module.custom_vjp(lambda k, x: x * k.astype(jnp.float32))
        f.defvjp(lambda k, x: (x * k.astype(jnp.float32), k), lambda k, g: (None, 9 * g))
        h = module.custom_jvp(lambda k, x: x * k.astype(jnp.float32))

        @h.defjvp
        def rule(primals: Any, tangents: Any) -> Any:
            (k, x), (dk, dx) = primals, tangents
            assert dk.dtype == jax.dtypes.float0 and dk.shape == (2,)
            return x * k.astype(jnp.float32), 7 * dx * k.astype(jnp.float32)

        return f, h

    k = jnp.array([2, 3])
    for ours, raw in zip(make(mu), make(jax), strict=True):
        close(mu.vjp(ours, k, X)[1](X)[1], jax.vjp(raw, k, X)[1](X)[1])
        close(
            mu.grad(lambda k, x, f=ours: f(k, x).sum(), 1)(k, X), jax.grad(lambda k, x, f=raw: f(k, x).sum(), 1)(k, X)
        )


def test_integer_results_and_states() -> None:
    f = mu.custom_vjp(lambda m, x: (x * x, m.n.value))
    f.defvjp(lambda m, x: ((x * x, m.n.value), x), lambda x, g: (None, 3 * g[0]))
    h = mu.custom_jvp(lambda m, x: (x * x, m.n.value))
    h.defjvp(lambda p, t: ((p[1] * p[1], p[0].n.value), (3 * t[1], np.zeros((), jax.dtypes.float0))))
    for g in (f, h):
        net = Net()
        (value, n), gradient = mu.value_and_grad(lambda x, g=g, net=net: g(net, x), has_aux=True)(2.0)
        assert (float(value), int(n), float(gradient)) == (4, 0, 3)


# -- refusals ----------------------------------------------------------------------------------------------------


def refused(run: Callable[[Net], Any], match: str, kinds: Any = errors.StructureError) -> Any:
    """The call raises, eagerly and compiled, and the model is as before."""
    for transform in (lambda f: f, mu.jit):
        net = Net()
        net.parts = [1]
        before, shown = mu.state(net), repr(net)
        with pytest.raises(kinds, match=match) as caught:
            transform(run)(net)
        assert mu.state(net) == before and repr(net) == shown
    return caught.value


def rule_of(backward: Any, forward: Any = None) -> Any:
    """A function of a model and an array with a rule."""
    f = mu.custom_vjp(lambda m, x: jnp.sum(m.w.value * x))
    f.defvjp(forward or (lambda m, x: (jnp.sum(m.w.value * x), (m, x))), backward)
    return f


def _sets(m: Net) -> None:
    m.n.value = 7


def _adds(m: Net) -> None:
    m.n += 1


def _draws(m: Net) -> None:
    m.rngs()


def _puts_in_place(m: Net) -> None:
    m.w[0] = 3.0


@pytest.mark.parametrize("write", [_sets, _adds, _draws, _puts_in_place])
@pytest.mark.parametrize("captured", [False, True])
def test_writes_in_a_backward_rule(write: Any, captured: bool) -> None:
    def run(net: Net) -> Any:
        def backward(r: Any, g: Any) -> Any:
            write(net if captured else r[0])
            return mu.State({("w",): g * r[1]}), None

        return mu.grad(rule_of(backward))(net, X)

    error = refused(run, "was written in a backward rule")
    assert "forward rule" in error.cure


def _flag(m: Net, g: Any) -> None:
    m.flag = 3


def _array(m: Net, g: Any) -> None:
    m.flag = g


def _part(m: Net, g: Any) -> None:
    m.parts.append(3)


def _variable(m: Net, g: Any) -> None:
    m.extra = mu.Variable(0)


@pytest.mark.parametrize("change", [_flag, _array, _part, _variable])
def test_changes_of_structure_in_a_backward_rule(change: Any) -> None:
    def run(net: Net) -> Any:
        def backward(r: Any, g: Any) -> Any:
            change(net, g)
            return mu.State({("w",): g * r[1]}), None

        return mu.grad(rule_of(backward))(net, X)

    refused(run, "was changed in a backward rule")


@pytest.mark.parametrize("change", [_flag, _part, _variable])
@pytest.mark.parametrize("where", ["function", "rule"])
def test_changes_of_structure(change: Any, where: str) -> None:
    def function(m: Net, x: Any) -> Any:
        if where == "function":
            change(m, None)
        return jnp.sum(m.w.value * x)

    def forward(m: Net, x: Any) -> Any:
        if where == "rule":
            change(m, None)
        return jnp.sum(m.w.value * x), (m, x)

    def run(net: Net) -> Any:
        f = mu.custom_vjp(function)
        f.defvjp(forward, lambda r, g: (mu.State({("w",): g * r[1]}), None))
        return mu.grad(f)(net, X)

    refused(run, "was changed in|was created in")


def test_a_captured_state_is_differentiated() -> None:
    def run(net: Net) -> Any:
        f = mu.custom_vjp(lambda x: jnp.sum(net.w.value * x))
        f.defvjp(lambda x: (jnp.sum(net.w.value * x), None), lambda _, g: (g * net.w.value,))
        return mu.grad(lambda: f(X), of=net)()

    assert "Pass the module as an argument" in refused(run, "is differentiated, but the rule says nothing").cure

    def run_forward(net: Net) -> Any:
        f = mu.custom_jvp(lambda x: jnp.sum(net.w.value * x))
        f.defjvp(lambda p, t: (jnp.sum(net.w.value * p[0]), jnp.sum(net.w.value * t[0])))
        return mu.grad(lambda: f(X), of=net)()

    refused(run_forward, "is differentiated, but the rule says nothing")


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (lambda x, g: (None, g * x), "gives no cotangent"),
        (lambda x, g: (mu.State({}), g * x), "gives no cotangent"),
        (lambda x, g: (mu.State({("h",): g}), g * x), "gives no cotangent"),
        (lambda x, g: (mu.State({("w",): g * x, ("q",): g}), g * x), "does not have"),
        (lambda x, g: ({"w": g * x}, g * x), "does not return a cotangent for each|does not have"),
        (lambda x, g: (g * x, g * x), "does not have"),
        (lambda x, g: (mu.State({("w",): g * x}),), "for each argument"),
        (lambda x, g: (mu.State({("w",): g * x}), g * x, g), "for each argument"),
        (lambda x, g: mu.State({("w",): g * x}), "for each argument"),
        (lambda x, g: None, "for each argument"),
        (lambda x, g: g, "for each argument"),
        pytest.param(lambda x, g: (mu.State({("w",): g * x}), mu.State({(): g})), "for each argument"),
        (lambda x, g: (mu.State({("w",): g * x}), (g, g)), "for each argument"),
    ],
)
def test_cotangents_that_do_not_fit(given: Any, match: str) -> None:
    f = rule_of(lambda r, g: given(r[1], g))
    for transform in (lambda f: f, mu.jit):
        net = Net()
        with pytest.raises(errors.StructureError, match=match) as caught:
            transform(mu.grad(f, (0, 1)))(net, X)
        assert caught.value.cure
        assert int(net.n) == 0


def test_none_is_no_cotangent() -> None:
    net = Net()
    f = rule_of(lambda r, g: (None, 3 * g * r[0].w.value))
    close(mu.grad(f, 1)(net, X), 3 * W)
    f = rule_of(lambda r, g: (mu.State({("w",): g * r[1]}), None))
    gradient, dx = mu.grad(f, (0, 1))(net, X)
    close(dx, 0 * X)
    close(gradient["w"], X)
    deep = mu.custom_vjp(lambda d: d["a"] * d["b"][0])
    deep.defvjp(lambda d: (d["a"] * d["b"][0], None), lambda _, g: ({"a": 7 * g, "b": None},))
    got = mu.grad(deep)({"a": 1.0, "b": [2.0]})
    assert float(got["a"]) == 7 and float(got["b"][0]) == 0


def test_frozen_states_want_no_cotangent() -> None:
    net = Net()
    f = rule_of(lambda r, g: (None, 3 * g * r[0].w.value))
    with mu.freeze(net.w):
        close(mu.grad(f, 1)(net, X), 3 * W)
        h = mu.custom_jvp(lambda m, x: jnp.sum(m.w.value * x))

        @h.defjvp
        def rule(primals: Any, tangents: Any) -> Any:
            assert ("w",) not in tangents[0] and ("h",) in tangents[0]
            return h(*primals), jnp.sum(primals[0].w.value * tangents[1])

        close(mu.grad(h, 1)(net, X), W)


def test_a_rule_returns_what_its_function_returns() -> None:
    for result in (
        lambda x: x * x,
        lambda x: (x * x,),
        lambda x: ((x, x), None),
        lambda x: ({"y": x}, None),
        lambda x: None,
    ):
        f = mu.custom_vjp(lambda x: x * x)
        f.defvjp(result, lambda r, g: (g,))
        for run in (mu.grad(f), mu.jit(mu.grad(f)), mu.jit(f)):
            with pytest.raises(errors.StructureError, match="does not return what its function returns"):
                run(3.0)
    h = mu.custom_jvp(lambda x: x * x)
    h.defjvp(lambda p, t: (p[0] * p[0], (t[0], t[0])))
    with pytest.raises(errors.StructureError, match="does not return what its function returns"):
        mu.grad(h)(3.0)


def test_no_rule() -> None:
    for f in (mu.custom_vjp(lambda x: x), mu.custom_jvp(lambda x: x)):
        with pytest.raises(errors.StructureError, match="has no derivative rule yet"):
            f(1.0)


def test_a_rule_that_changes_the_type_of_a_state() -> None:
    def run(net: Net) -> Any:
        def forward(m: Net, x: Any) -> Any:
            m.h.value = jnp.zeros(3)
            return jnp.sum(m.w.value * x), (m, x)

        return mu.grad(rule_of(lambda r, g: (mu.State({("w",): g * r[1]}), None), forward))(net, X)

    assert refused(run, "changes its type", errors.StateTypeError).path


@pytest.mark.parametrize("where", ["function", "forward", "backward"])
def test_an_exception_leaves_everything_as_it_was(where: str) -> None:
    def fails(m: Net) -> None:
        m.n += 1
        raise KeyError("in the middle")

    def function(m: Net, x: Any) -> Any:
        m.h.value = m.h.value + 1
        if where == "function":
            fails(m)
        return jnp.sum(m.w.value * x)

    def forward(m: Net, x: Any) -> Any:
        m.h.value = m.h.value + 1
        if where == "forward":
            fails(m)
        return jnp.sum(m.w.value * x), (m, x)

    def backward(r: Any, g: Any) -> Any:
        raise KeyError("in the middle")

    def run(net: Net) -> Any:
        f = mu.custom_vjp(function)
        f.defvjp(forward, backward)
        net.n += 1
        return mu.grad(f)(net, X)

    net = Net()
    with pytest.raises(KeyError, match="in the middle"):
        mu.jit(run)(net)
    assert int(net.n) == 0 and float(net.h) == 0
    with pytest.raises(KeyError, match="in the middle"):
        run(net)
    assert int(net.n) == 1 and float(net.h) == 0
    assert float(net.reverse(X)) == -3.5, "nothing is left open"


# -- raw rules of JAX ---------------------------------------------------------------------------------------------


def _raw(net: Net, how: str) -> Any:
    f = jax.custom_vjp(lambda x: 2.0 * x)

    def forward(x: Any) -> Any:
        if how == "sets":
            net.h.value = 2 * x
        elif how == "adds":
            net.n += 1
        else:
            return 2.0 * x, jnp.sum(net.w.value)
        return 2.0 * x, None

    f.defvjp(forward, lambda r, g: (2.0 * g,))
    return f


RAW_RUNS: dict[str, Callable[[Any], Any]] = {
    "eager": lambda f: mu.grad(f)(1.0),
    "jit of grad": lambda f: mu.jit(mu.grad(f))(1.0),
    "grad of jit": lambda f: mu.grad(mu.jit(f))(1.0),
    "vjp": lambda f: mu.vjp(f, 1.0)[1](1.0)[0],
    "remat": lambda f: mu.grad(mu.remat(f))(1.0),
    "scan": lambda f: mu.grad(lambda x: mu.scan(lambda c, _: (f(c), None), x, length=1)[0])(1.0),
    "cond": lambda f: mu.grad(lambda x: mu.cond(True, lambda: f(x), lambda: x))(1.0),
}


# Under the leak check JAX calls any exception in a raw rule that it linearizes within a program a leak.
RAW_NAMES = [
    pytest.param(name, marks=pytest.mark.jax_leaks) if name in ("grad of jit", "scan", "cond") else name
    for name in RAW_RUNS
]


@pytest.mark.parametrize("how", ["sets", "adds"])
@pytest.mark.parametrize("name", RAW_NAMES)
def test_52_a_raw_rule_that_writes_is_right_or_refused(how: str, name: str) -> None:
    net = Net()
    f = _raw(net, how)
    caught = None
    try:
        gradient = RAW_RUNS[name](f)
    except errors.TraceLevelError as error:
        caught = error
    if caught is None:
        assert float(gradient) == 2
        assert (float(net.h) == 2) if how == "sets" else (int(net.n) == 1)
    else:
        assert int(net.n) == 0 and float(net.h) == 0
        assert caught.path
        assert "mu.custom_vjp" in caught.cure
    assert (caught is None) == (name in ("eager", "vjp"))


@pytest.mark.filterwarnings("ignore::mutatis.errors.CapturedStateWarning")
@pytest.mark.parametrize("name", RAW_NAMES)
def test_a_raw_rule_that_reads_is_right(name: str) -> None:
    assert float(RAW_RUNS[name](_raw(Net(), "reads"))) == 2


def test_states_that_only_a_raw_rule_names_are_found() -> None:
    net = Net()
    assert float(mu.jit(mu.grad(_raw(net, "reads")))(1.0)) == 2


def test_a_raw_rule_without_states_inside() -> None:
    """Fine anywhere."""
    net = Net()
    f = jax.custom_vjp(lambda x: 2.0 * x)
    f.defvjp(lambda x: (2.0 * x, None), lambda r, g: (5.0 * g,))

    def loss(m: Net) -> Any:
        m.n += 1
        return jnp.sum(f(m.w.value))

    for run in (mu.grad(loss), mu.jit(mu.grad(loss)), mu.grad(mu.remat(loss)), mu.grad(mu.jit(loss))):
        close(run(net)["w"], 5 * jnp.ones(2))
    assert int(net.n) == 4


# -- as values -----------------------------------------------------------------------------------------------------


def sine_forward(x: Any) -> Any:
    return jnp.sin(x), x


def sine_backward(x: Any, g: Any) -> Any:
    return (100.0 * g,)


def sine_rule(primals: Any, tangents: Any) -> Any:
    return jnp.sin(primals[0]), 100.0 * tangents[0]


class Holder(mu.Module):
    """Holds functions with rules among its attributes."""

    def __init__(self) -> None:
        self.w = mu.Param(jnp.float32(1))
        self.f = mu.custom_vjp(jnp.sin)
        self.f.defvjp(sine_forward, sine_backward)
        self.h = mu.custom_jvp(jnp.sin)
        self.h.defjvp(sine_rule)

    def __call__(self, x: Any) -> Any:
        return self.f(self.w * x) + self.h(x)


@pytest.mark.parametrize(
    "copied",
    [
        lambda m: m,
        copy.deepcopy,
        mu.clone,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: mu.merge(*mu.split(m)),
        lambda m: mu.jit(lambda m: m)(m),
    ],
    ids=["itself", "deepcopy", "clone", "pickle", "merge", "jit"],
)
def test_a_module_that_holds_rules(copied: Any) -> None:
    holder = Holder()
    same = copied(holder)
    assert float(mu.grad(same)(0.5)) == 200
    assert float(mu.jit(mu.grad(same))(0.5)) == 200
    assert float(mu.jit(mu.grad(lambda m: m(0.5)))(same)["w"]) == 50
    assert mu.graphdef(same) == mu.graphdef(holder)


def test_equal_holders_compile_once(traces: Any) -> None:
    count = traces.count(lambda m, x: m(x))
    step = mu.jit(lambda m: mu.grad(count)(m, 0.5))
    for _ in range(3):
        step(Holder())
    assert traces[count] == 1


class OwnRule(mu.Module):
    """Its rule is made of its own methods."""

    def __init__(self) -> None:
        self.w = mu.Param(jnp.float32(2))
        self.n = mu.Variable(0)
        self.f = mu.custom_vjp(self.square)
        self.f.defvjp(self.go, self.back)

    def square(self, x: Any) -> Any:
        return x * x

    def go(self, x: Any) -> Any:
        self.n += 1
        return x * x, x

    def back(self, x: Any, g: Any) -> Any:
        return (g * self.w.value,)


@pytest.mark.parametrize(
    "copied",
    [
        lambda m: m,
        copy.deepcopy,
        mu.clone,
        lambda m: pickle.loads(pickle.dumps(m)),
    ],
    ids=["itself", "deepcopy", "clone", "pickle"],
)
def test_a_copied_rule_belongs_to_the_copy(copied: Any) -> None:
    own = OwnRule()
    same = copied(own)
    same.w.value = jnp.float32(5)
    assert float(mu.grad(lambda x: same.f(x))(1.0)) == 5
    assert int(same.n) == 1
    assert same is own or int(own.n) == 0


def test_a_function_with_a_rule_looks_like_its_function() -> None:
    def named(x: Any) -> Any:
        """What it does."""
        return x

    for made in (mu.custom_vjp(named), mu.custom_jvp(named)):
        assert (made.__name__, made.__doc__) == ("named", "What it does.")
        assert "named" in repr(made)
    decorated = mu.custom_vjp(nondiff_argnums=(0,))(named)
    assert decorated.__name__ == "named"


def test_rules_can_be_defined_again() -> None:
    f = mu.custom_vjp(lambda x: x)
    f.defvjp(lambda x: (x, None), lambda r, g: (2 * g,))
    assert float(mu.grad(f)(1.0)) == 2
    f.defvjp(lambda x: (x, None), lambda r, g: (3 * g,))
    assert float(mu.grad(f)(1.0)) == 3


LEAKY: dict[str, Callable[[Net, Any], Any]] = {
    "grad": lambda m, f: mu.grad(f, (0, 1))(m, X),
    "jit of grad": lambda m, f: mu.jit(mu.grad(f, (0, 1)))(m, X),
    "grad of jit": lambda m, f: mu.grad(mu.jit(f), (0, 1))(m, X),
    "jit": lambda m, f: mu.jit(f)(m, X),
    "scan": lambda m, f: mu.scan(lambda c, x: (c + mu.grad(f, 1)(m, x), None), X, XS),
    "vmap": lambda m, f: mu.vmap(lambda x: f(m, x))(XS),
    "jit of vmap": lambda m, f: mu.jit(mu.vmap(lambda x: f(m, x)))(XS),
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [pytest.param(kind, name) for kind in ("reverse", "forward") for name in LEAKY],
)
def test_no_tracer_leaks(kind: str, name: str) -> None:
    net = Net()
    with jax.checking_leaks():
        LEAKY[name](net, lambda m, x: getattr(m, kind)(x))
    assert not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(mu.state(net)))


class Lean(Net):
    """The residuals are arrays: those that hold a module keep it, as long as JAX keeps the rule."""

    @mu.custom_vjp
    def reverse(self, x: Any) -> Any:
        self.n += 1
        return jnp.sum(self.w.value * x)

    def _forward(self, x: Any) -> Any:
        self.n += 100
        return jnp.sum(self.w.value * x), (self.w.value, x)

    def _backward(residuals: Any, g: Any) -> Any:  # type: ignore[misc]
        w, x = residuals
        return mu.State({("w",): 2 * g * x}), 3 * g * w

    reverse.defvjp(_forward, _backward)


@pytest.mark.parametrize("kind", ["reverse", "forward"])
@pytest.mark.parametrize("name", ["grad", "program of grad", "program", "eager loop", "eager cond"])
def test_a_rule_does_not_keep_the_model_alive(kind: str, name: str) -> None:
    net = Lean()
    f: Any = lambda m, x: getattr(m, kind)(x)  # noqa: E731
    program: Any = {"program": mu.jit(f), "program of grad": mu.jit(mu.grad(f)), "grad": mu.grad(f)}.get(name)
    if program is not None:
        program(net, X)
    elif name == "eager loop":
        mu.for_loop(lambda x, m=net: f(m, x), XS)
    else:
        mu.cond(jnp.bool_(True), lambda m: f(m, X), lambda m: jnp.float32(0), net)
    refs = [weakref.ref(net), weakref.ref(net.w)]
    del net
    gc.collect()
    assert [ref() for ref in refs] == [None, None]


def test_a_pullback_through_a_rule_does_not_keep_the_model_alive() -> None:
    net = Lean()
    _, pull = mu.vjp(lambda m, x: m.reverse(x), net, X)
    ref = weakref.ref(net)
    del net
    gc.collect()
    assert ref() is None
    (state, x) = pull(jnp.float32(1))
    close(state["w"], 2 * X)
    close(x, 3 * W)
