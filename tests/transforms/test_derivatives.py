"""`mu.jvp`, `mu.vjp`, `mu.linearize` beside `jax.jvp`, `jax.vjp`, `jax.linearize` of the same thing threaded by hand."""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import errors

X = jnp.array([0.5, -1.0, 2.0])
DX = jnp.array([1.0, 0.5, -0.25])


class Net(mu.Module):
    """A tied weight, a statistic, a counter, a pytree, a random stream, and an integer among the parameters."""

    def __init__(self) -> None:
        self.w = mu.Param(jnp.array([1.0, -2.0, 3.0]))
        self.ztied = [self.w]
        self.p = mu.Param({"a": jnp.float32(0.5), "b": [jnp.array([1.0, 2.0, 3.0])]})
        self.steps = mu.Param(jnp.int32(1))
        self.mean = mu.BatchStat(jnp.float32(2))
        self.calls = mu.Variable(0)
        self.rngs = mu.Rngs(7)

    def __call__(self, x: Any) -> Any:
        p = self.p.value
        noise = jax.random.normal(self.rngs(), x.shape)
        y = jnp.tanh(self.w.value * x) * p["a"] + p["b"][0] * self.mean.value * noise
        self.mean.value = 0.5 * self.mean.value + 0.5 * jnp.sum(y) * jnp.sum(self.ztied[0].value)
        self.calls += 1
        return y * y + self.mean.value


KEY = jax.random.key(7)


def values() -> dict[str, Any]:
    """The state of a new `Net`, by hand."""
    return {
        "w": jnp.array([1.0, -2.0, 3.0]),
        "p": {"a": jnp.float32(0.5), "b": [jnp.array([1.0, 2.0, 3.0])]},
        "mean": jnp.float32(2),
        "calls": jnp.int32(0),
        "count": jnp.uint32(0),
    }


def hand(s: dict[str, Any], x: Any) -> tuple[Any, dict[str, Any]]:
    p = s["p"]
    noise = jax.random.normal(jax.random.fold_in(KEY, s["count"]), x.shape)
    y = jnp.tanh(s["w"] * x) * p["a"] + p["b"][0] * s["mean"] * noise
    mean = 0.5 * s["mean"] + 0.5 * jnp.sum(y) * jnp.sum(s["w"])
    return y * y + mean, {"mean": mean, "calls": s["calls"] + 1, "count": s["count"] + 1}


def close(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), a, b)


def check_writes(net: Net, new: dict[str, Any]) -> None:
    close(net.mean.value, new["mean"])
    assert int(net.calls) == int(new["calls"])
    assert int(net.rngs.default.value["count"]) == int(new["count"])
    assert not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(mu.state(net)))


def tangent(kind: str = "model") -> Any:
    """Tangents of the parameters: a State, or by hand."""
    w, p = jnp.array([0.1, 0.2, 0.3]), {"a": jnp.float32(2), "b": [jnp.array([1.0, 0.0, -1.0])]}
    return {"w": w, "p": p} if kind == "hand" else mu.State({("w",): w, ("p",): p})


def by_hand(x: Any = X) -> Any:
    """The function of the parameters and the input, for plain JAX; its second result is the new state."""
    return lambda part, x: hand({**values(), **part}, x)


def part() -> dict[str, Any]:
    return {name: values()[name] for name in ("w", "p")}


def unpack(gradient: mu.State) -> dict[str, Any]:
    assert set(gradient) == {("w",), ("p",)}, "a tied weight is at its first place, the integer is left out"
    return {"w": gradient["w"], "p": gradient["p"]}


Run = Callable[[Net], Any]


def jvp_hand() -> Any:
    return jax.jvp(by_hand(), (part(), X), (tangent("hand"), DX), has_aux=True)


# Each gives (value, derivative along `tangent` and DX).
FORWARD: dict[str, Run] = {
    "argument": lambda m: mu.jvp(lambda m, x: m(x), (m, X), (tangent(), DX)),
    "list of primals": lambda m: mu.jvp(lambda m, x: m(x), [m, X], [tangent(), DX]),
    "of": lambda m: mu.jvp(lambda x: m(x), (X,), (tangent(), (DX,)), of=m),
    "module itself": lambda m: mu.jvp(m, (X,), (tangent(), (DX,)), of=m),
    "method": lambda m: mu.jvp(m.__call__, (X,), (tangent(), (DX,)), of=m),
    "pytree": lambda m: mu.jvp(
        lambda d, _: d["m"][0](d["x"]), ({"m": [m], "x": X}, ()), ({"m": [tangent()], "x": DX}, ())
    ),
    "linearize": lambda m: (lambda out, along: (out, along(tangent(), DX)))(*mu.linearize(lambda m, x: m(x), m, X)),
    "linearize of": lambda m: (lambda out, along: (out, along(tangent(), DX)))(*mu.linearize(m, X, of=m)),
    "aux": lambda m: mu.jvp(lambda m, x: (m(x), (m, x)), (m, X), (tangent(), DX), has_aux=True)[:2],
}


def both(f: Run, compiled: bool) -> Run:
    return mu.jit(f) if compiled else f


# Every form eagerly and compiled; every other transform around one of them.
AROUND_FORWARD = [(form, around) for form in FORWARD for around in ("eager", "jit")]
AROUND_FORWARD += [
    (form, around) for form in ("of", "linearize") for around in ("remat", "scan", "cond", "jit of a closure")
]


@pytest.mark.parametrize(("form", "around"), AROUND_FORWARD)
def test_forward(form: str, around: str) -> None:
    net, run = Net(), FORWARD[form]
    if around == "eager":
        value, along = run(net)
    elif around == "jit":
        value, along = mu.jit(run)(net)
    elif around == "remat":
        value, along = mu.remat(run)(net)
    elif around == "scan":
        _, (value, along) = mu.scan(lambda c, _: (c, run(net)), None, length=1)
        value, along = value[0], along[0]
    elif around == "cond":
        value, along = mu.cond(jnp.bool_(True), lambda: run(net), lambda: (X, X))
    else:
        value, along = mu.jit(lambda: run(net))()
    expected, expected_along, new = jvp_hand()
    close(value, expected)
    close(along, expected_along)
    check_writes(net, new)


def vjp_hand(g: Any = DX) -> Any:
    value, pull, new = jax.vjp(by_hand(), part(), X, has_aux=True)
    return value, pull(g), new


# Each gives (value, (gradient by name, gradient of x)).
def _reverse(m: Net, form: str) -> Any:
    if form == "of":
        value, pull = mu.vjp(lambda x: m(x), X, of=m)
        of, (dx,) = pull(DX)
        return value, of, dx
    if form == "pytree":
        value, pull = mu.vjp(lambda d, empty: d["m"][0](d["x"]), {"m": [m], "x": X}, ())
        both, empty = pull(DX)
        assert empty == ()
        return value, both["m"][0], both["x"]
    if form == "aux":
        value, pull, (same, x, none) = mu.vjp(lambda m, x: (m(x), (m, x, None)), m, X, has_aux=True)
        assert same is m and none is None
        return value, *pull(DX)
    value, pull = mu.vjp(lambda m, x: m(x), m, X)
    return value, *pull(DX)


@pytest.mark.parametrize("around", ["eager", "jit", "remat", "scan", "switch"])
@pytest.mark.parametrize("form", ["argument", "of", "pytree", "aux"])
def test_reverse(form: str, around: str) -> None:
    net = Net()
    if around == "scan":
        _, out = mu.scan(lambda c, _: (c, _reverse(net, form)), None, length=1)
        value, of, dx = jax.tree.map(lambda a: a[0], out)
    elif around == "switch":
        value, of, dx = mu.switch(jnp.int32(1), [lambda: _reverse(net, form)] * 2)
    else:
        transform: Any = {"eager": lambda f: f, "jit": mu.jit, "remat": mu.remat}[around]
        value, of, dx = transform(lambda m: _reverse(m, form))(net)
    expected, (grads, expected_dx), new = vjp_hand()
    close(value, expected)
    close(unpack(of), grads)
    close(dx, expected_dx)
    check_writes(net, new)


@pytest.mark.parametrize(
    ("wrt", "paths"),
    [
        (mu.BatchStat, {("mean",)}),
        ("batch_stats", {("mean",)}),
        (mu.PathContains("w"), {("w",)}),
        (..., {("w",), ("p",), ("mean",)}),
        ((mu.Param, "batch_stats"), {("w",), ("p",)}),
    ],
)
def test_wrt(wrt: Any, paths: set[Any]) -> None:
    """A tuple gives one filter for each primal, here of a model and of another."""
    if isinstance(wrt, tuple):
        a, b = Net(), Net()
        _, pull = mu.vjp(lambda a, b: a(X) * b(X), a, b, wrt=wrt)
        first, second = pull(DX)
        assert set(first) == paths and set(second) == {("mean",)}
        return
    net = Net()
    _, pull = mu.vjp(lambda m: m(X), net, wrt=wrt)
    (gradient,) = pull(DX)
    assert set(gradient) == paths
    _, along = mu.jvp(lambda m: m(X), (Net(),), (jax.tree.map(jnp.ones_like, gradient),), wrt=wrt)
    total = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(gradient))
    np.testing.assert_allclose(jnp.vdot(along, DX), total, rtol=1e-4)


def test_frozen_states_are_left_out() -> None:
    net = Net()
    with mu.freeze(net.w):
        value, pull = mu.vjp(lambda m: m(X), net)
        (gradient,) = pull(DX)
    assert set(gradient) == {("p",)}
    expected, (grads, _), new = vjp_hand()
    close(gradient["p"], grads["p"])
    check_writes(net, new)


def test_the_same_model_twice_has_its_gradient_at_the_first_place() -> None:
    net = Net()
    _, pull = mu.vjp(lambda a, b: jnp.sum(a.w.value * b.w.value), net, net)
    first, second = pull(jnp.float32(1))
    np.testing.assert_allclose(first["w"], 2 * net.w.value)
    assert len(second) == 0
    _, along = mu.jvp(lambda a, b: jnp.sum(a.w * b.w.value), (net, net), (tangent(), mu.State({})))
    np.testing.assert_allclose(along, jnp.vdot(first["w"], tangent()["w"]), rtol=1e-6)


def test_integer_arguments_have_float0_tangents() -> None:
    zero = np.zeros((), jax.dtypes.float0)
    f: Any = lambda k, x: jnp.sin(x) * k.astype(jnp.float32)  # noqa: E731
    k, x = jnp.int32(3), jnp.float32(0.7)
    ours, raw = mu.jvp(f, (k, x), (zero, x)), jax.jvp(f, (k, x), (zero, x))
    close(ours, raw)
    value, pull = mu.vjp(f, k, x)
    expected, raw_pull = jax.vjp(f, k, x)
    dk, dx = pull(jnp.float32(2))
    raw_k, raw_x = raw_pull(jnp.float32(2))
    assert dk.dtype == raw_k.dtype == jax.dtypes.float0 and dk.shape == raw_k.shape
    np.testing.assert_allclose(dx, raw_x)
    close(mu.linearize(f, k, x)[1](zero, x), jax.linearize(f, k, x)[1](zero, x))


def test_integer_results_have_float0_cotangents() -> None:
    value, pull = mu.vjp(lambda x: (x * x, x > 0), 3.0)
    assert float(pull((1.0, np.zeros((), jax.dtypes.float0)))[0]) == 6
    assert bool(value[1])


def test_nothing_but_of() -> None:
    w = mu.Param(jnp.array([1.0, 2.0]))
    along = mu.State({(): jnp.array([1.0, -1.0])})
    value, pull = mu.vjp(lambda: w.value**2, of=w)
    np.testing.assert_array_equal(pull(jnp.ones(2))[()], [2, 4])
    np.testing.assert_array_equal(mu.jvp(lambda: w.value**2, (), along, of=w)[1], [2, -4])
    np.testing.assert_array_equal(mu.linearize(lambda: w.value**2, of=w)[1](along), [2, -4])


def test_of_several() -> None:
    a, b = mu.Param(2.0), mu.Param(3.0)
    of = {"a": a, "b": [b, a]}
    _, pull = mu.vjp(lambda x: a.value * b.value * x, 5.0, of=of)
    gradient, (dx,) = pull(1.0)
    assert float(gradient["a"][()]) == 15 and float(gradient["b"][0][()]) == 10 and len(gradient["b"][1]) == 0
    assert float(dx) == 6
    given = {"a": mu.State({(): 1.0}), "b": [mu.State({(): 1.0}), mu.State({})]}
    assert float(mu.jvp(lambda x: a.value * b.value * x, (5.0,), (given, (1.0,)), of=of)[1]) == 31


# -- writes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
def test_53_vjp_writes_once_however_often_the_pullback_runs(compiled: bool) -> None:
    net = Net()
    run = both(lambda m: mu.vjp(lambda m, x: m(x), m, X), compiled)
    value, pull = run(net)
    _, (grads, dx), new = vjp_hand()
    check_writes(net, new)
    for g in (DX, DX, 2 * DX):
        ours, ours_dx = pull(g)
        _, (grads, dx), _ = vjp_hand(g)
        close(unpack(ours), grads)
        close(ours_dx, dx)
        check_writes(net, new)


def test_53_no_pullback_writes_as_well() -> None:
    net = Net()
    mu.vjp(lambda m, x: m(x), net, X)
    check_writes(net, vjp_hand()[2])
    mu.linearize(lambda m, x: m(x), net, X)
    assert int(net.calls) == 2


@pytest.mark.parametrize("compiled", [False, True])
def test_54_jvp_through_a_state_write(compiled: bool) -> None:
    """What is written and read again carries its tangent inside; outside it is a value."""
    memory = mu.Hidden(jnp.float32(0))

    def f(x: Any) -> Any:
        for _ in range(3):
            memory.value = 0.5 * memory.value + x * x
        return memory.value

    def raw(x: Any) -> Any:
        m = jnp.float32(0)
        for _ in range(3):
            m = 0.5 * m + x * x
        return m

    ours = mu.jit(lambda: mu.jvp(f, (1.5,), (2.0,))) if compiled else lambda: mu.jvp(f, (1.5,), (2.0,))
    close([*ours()], [*jax.jvp(raw, (jnp.float32(1.5),), (jnp.float32(2.0),))])
    np.testing.assert_allclose(memory.value, raw(1.5))


@pytest.mark.parametrize("name", ["jvp", "vjp", "linearize"])
@pytest.mark.parametrize("outer", ["grad", "jvp"])
def test_what_is_written_inside_is_differentiated_outside(name: str, outer: str) -> None:
    memory = mu.Hidden(jnp.float32(0))

    def store(x: Any) -> Any:
        memory.value = x * x * x
        return x

    def f(x: Any) -> Any:
        if name == "jvp":
            mu.jvp(store, (x,), (jnp.float32(1),))
        else:
            getattr(mu, name)(store, x)
        return memory.value

    slope = mu.grad(f)(2.0) if outer == "grad" else mu.jvp(f, (2.0,), (1.0,))[1]
    np.testing.assert_allclose(slope, 12)
    np.testing.assert_allclose(memory.value, 8)


def test_the_pullback_keeps_the_values_of_its_call() -> None:
    net = Net()
    _, pull = mu.vjp(lambda m, x: m(x), net, X)
    before = pull(DX)
    net.w.value = net.w.value * 10
    mu.jit(lambda m: m(X))(net)
    mu.jit(lambda m: m(X))(net)  # donates what nobody else holds
    close(pull(DX), before)


@pytest.mark.parametrize("name", ["vjp", "linearize"])
def test_linear_maps_go_through_jax(name: str) -> None:
    net = Net()
    _, linear = getattr(mu, name)(lambda m, x: m(x), net, X)
    args = (DX,) if name == "vjp" else (tangent(), DX)
    expected = linear(*args)
    close(jax.jit(linear)(*args), expected)
    close(jax.jit(lambda f, a: f(*a))(linear, args), expected)
    close(mu.jit(lambda f, a: f(*a))(linear, args), expected)
    close(mu.jit(lambda: linear(*args))(), expected)
    close(jax.tree.map(lambda x: x, linear)(*args), expected)
    many = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), args)
    doubled = jax.vmap(linear)(*many)
    close(jax.tree.map(lambda x: x[0], doubled), expected)
    close(jax.tree.map(lambda x: x[1], doubled), jax.tree.map(lambda x: 2 * x, expected))
    close(mu.vmap(lambda *a: linear(*a))(*many), doubled)
    assert int(net.calls) == 1


@pytest.mark.parametrize("name", ["vjp", "linearize"])
def test_linear_maps_come_out_of_a_compiled_function(name: str) -> None:
    net = Net()
    args = (DX,) if name == "vjp" else (tangent(), DX)
    expected = getattr(mu, name)(lambda m, x: m(x), Net(), X)[1](*args)
    run = mu.jit(lambda m, x: getattr(mu, name)(lambda m, x: m(x), m, x))
    _, linear = run(net, X)
    _, second = run(net, X)
    close(linear(*args), expected)
    second(*args)
    assert int(net.calls) == 2


def test_a_pullback_as_a_residual_of_a_scan() -> None:
    """Pullbacks are pytrees: a forward loop stacks them, a loop backwards applies them."""
    w = mu.Param(jnp.float32(0.7))
    n = mu.Variable(0)

    def f(x: Any) -> Any:
        n.value += 1
        return jnp.sin(w.value * x)

    def forward(x: Any, _: Any) -> Any:
        return mu.vjp(f, x)

    y, pulls = mu.jit(lambda: mu.scan(forward, jnp.float32(0.4), length=4))()
    g, _ = jax.lax.scan(lambda g, pull: (pull(g)[0], None), jnp.float32(1), pulls, reverse=True)

    def raw(x: Any) -> Any:
        for _ in range(4):
            x = jnp.sin(jnp.float32(0.7) * x)
        return x

    np.testing.assert_allclose(y, raw(0.4), rtol=1e-6)
    np.testing.assert_allclose(g, jax.grad(raw)(0.4), rtol=1e-5)
    assert int(n) == 4


# -- in and around other transforms -----------------------------------------------------------------------------------


def _fwd_over_rev(m: Net) -> Any:
    return mu.jvp(lambda m, x: mu.grad(lambda m, x: jnp.sum(m(x)))(m, x), (m, X), (tangent(), DX))


def _rev_over_fwd(m: Net) -> Any:
    return mu.grad(lambda m: jnp.sum(mu.jvp(lambda m, x: m(x), (m, X), (tangent(), DX))[1]))(m)


@pytest.mark.parametrize("compiled", [False, True])
def test_forward_over_reverse(compiled: bool) -> None:
    net = Net()
    gradient, along = both(_fwd_over_rev, compiled)(net)

    def raw(part: Any, x: Any) -> Any:
        return jax.grad(lambda p: (lambda y, s: (jnp.sum(y), s))(*by_hand()(p, x)), has_aux=True)(part)

    expected, expected_along, new = jax.jvp(raw, (part(), X), (tangent("hand"), DX), has_aux=True)
    close(unpack(gradient), expected)
    close(unpack(along), expected_along)
    check_writes(net, new)


@pytest.mark.parametrize("compiled", [False, True])
def test_reverse_over_forward(compiled: bool) -> None:
    net = Net()
    gradient = both(_rev_over_fwd, compiled)(net)

    def raw(part: Any) -> Any:
        _, along, new = jax.jvp(by_hand(), (part, X), (tangent("hand"), DX), has_aux=True)
        return jnp.sum(along), new

    expected, new = jax.grad(raw, has_aux=True)(part())
    close(unpack(gradient), expected)
    check_writes(net, new)


def test_reverse_over_reverse_and_forward_over_forward() -> None:
    n = mu.Variable(0)
    w = mu.Param(jnp.float32(0.3))

    def f(x: Any) -> Any:
        n.value += 1
        return jnp.sin(w.value * x) * x

    def raw(x: Any) -> Any:
        return jnp.sin(jnp.float32(0.3) * x) * x

    x = jnp.float32(0.7)
    second = jax.grad(jax.grad(raw))(x)
    np.testing.assert_allclose(mu.vjp(lambda x: mu.vjp(f, x)[1](1.0)[0], x)[1](1.0)[0], second, rtol=1e-5)
    np.testing.assert_allclose(mu.jvp(lambda x: mu.jvp(f, (x,), (1.0,))[1], (x,), (1.0,))[1], second, rtol=1e-5)
    np.testing.assert_allclose(mu.linearize(lambda x: mu.linearize(f, x)[1](1.0), x)[1](1.0), second, rtol=1e-5)
    assert int(n) == 3


def test_lanes_of_derivatives() -> None:
    """Derivatives per lane, of an ensemble: each is that of its member."""
    ensemble = mu.vmap(lambda _: Net())(jnp.arange(3))
    ensemble.w.value = ensemble.w.value * jnp.array([1.0, 2.0, 3.0])[:, None]
    value, pull = mu.vmap(lambda m: mu.vjp(lambda m, x: m(x), m, X))(ensemble)
    of, dx = mu.vmap(lambda p: p(DX))(pull)
    for lane in range(3):
        at = {**part(), "w": part()["w"] * (lane + 1)}
        expected, raw, new = jax.vjp(by_hand(), at, X, has_aux=True)
        grads, expected_dx = raw(DX)
        close(value[lane], expected)
        close(jax.tree.map(lambda a, i=lane: a[i], unpack(of)), grads)
        close(dx[lane], expected_dx)
        close(ensemble.mean[lane], new["mean"])
        assert int(ensemble.calls[lane]) == 1


def test_lanes_of_inputs_with_a_shared_model() -> None:
    w, n = mu.Param(jnp.float32(2)), mu.Variable(0)

    def f(x: Any) -> Any:
        n.value += 1
        return w.value * x**3

    out, along = mu.vmap(lambda x: mu.jvp(f, (x,), (jnp.float32(1),)))(X)
    np.testing.assert_allclose(along, 6 * X**2, rtol=1e-6)
    assert int(n) == 1


def test_functionalized() -> None:
    net = Net()
    pure, state = mu.functionalize(lambda: _reverse(net, "of"), of=net)
    (value, of, dx), new_state = jax.jit(pure)(state)
    expected, (grads, expected_dx), new = vjp_hand()
    close(value, expected)
    close(unpack(of), grads)
    close(dx, expected_dx)
    close(new_state["mean"], new["mean"])
    assert int(net.calls) == 0


def test_through_loops() -> None:
    """The derivative of a loop over a stateful body."""
    net = Net()

    def run(m: Net, x: Any) -> Any:
        return mu.scan(lambda c, _: (jnp.tanh(m(c)), None), x, length=3)[0]

    def raw(part: Any, x: Any) -> Any:
        def body(c: Any, _: Any) -> Any:
            y, new = hand({**values(), **part, **c[1]}, c[0])
            return (jnp.tanh(y), new), None

        s = {k: v for k, v in values().items() if k not in part}
        (y, new), _ = jax.lax.scan(body, (x, s), length=3)
        return y, new

    value, along = mu.jvp(run, (net, X), (tangent(), DX))
    expected, expected_along, new = jax.jvp(raw, (part(), X), (tangent("hand"), DX), has_aux=True)
    close(value, expected)
    close(along, expected_along)
    check_writes(net, new)


def test_structure_made_inside_is_committed() -> None:
    net = mu.Module()

    def f(x: Any) -> Any:
        net.last = mu.Hidden(x)
        net.flag = "set"
        return net.last * x

    value, pull = mu.vjp(f, 3.0)
    assert float(pull(1.0)[0]) == 6
    assert net.flag == "set" and float(net.last) == 3


# -- errors ------------------------------------------------------------------------------------------------------


def untouched(run: Callable[[Net], Any], error: Any, match: str) -> Any:
    net = Net()
    net.parts = [1]
    before, shown = mu.state(net), repr(net)
    with pytest.raises(error, match=match) as caught:
        run(net)
    assert mu.state(net) == before and repr(net) == shown
    return caught.value


@pytest.mark.parametrize(
    "wrong", [lambda s: s | mu.state(Net(), mu.BatchStat), lambda s: s.filter(mu.PathContains("w"))]
)
@pytest.mark.parametrize("compiled", [False, True])
def test_the_tangent_of_a_model_has_its_states(wrong: Any, compiled: bool) -> None:
    given = wrong(mu.State(tangent().flat(), {("w",): mu.Param, ("p",): mu.Param}))
    run = both(lambda m: mu.jvp(lambda m, x: m(x), (m, X), (given, DX)), compiled)
    error = untouched(run, errors.ArgumentError, "is not a State of the states that are differentiated")
    assert error.path == "args[0]"


@pytest.mark.parametrize(
    "tangents",
    [
        lambda: (tangent(),),
        lambda: (tangent(), DX, DX),
        lambda: tangent(),
        lambda: ({"w": DX}, DX),
        lambda: (DX, DX),
        lambda: (None, DX),
        lambda: (tangent(), (DX,)),
        lambda: (tangent(), {"x": DX}),
    ],
)
@pytest.mark.parametrize("name", ["jvp", "linearize"])
def test_tangents_of_another_structure(name: str, tangents: Any) -> None:
    given = tangents()
    if name == "jvp":
        untouched(lambda m: mu.jvp(lambda m, x: m(x), (m, X), given), errors.ArgumentError, "tangent")
        return
    net = Net()
    _, along = mu.linearize(lambda m, x: m(x), net, X)
    with pytest.raises(errors.ArgumentError, match="tangent"):
        along(*given) if isinstance(given, tuple) else along(given)
    assert int(net.calls) == 1


@pytest.mark.parametrize(
    "given", [lambda: (mu.State({**tangent().flat(), ("w",): DX[:2]}), DX), lambda: (tangent(), DX[:2])]
)
def test_tangents_of_another_shape(given: Any) -> None:
    run: Any = lambda m: mu.jvp(lambda m, x: m(x), (m, X), given())  # noqa: E731
    untouched(run, (errors.StructureError, ValueError, TypeError), "shape")


@pytest.mark.parametrize("cotangent", [(DX, DX), [DX], {"y": DX}, None, ()])
def test_cotangents_of_another_structure(cotangent: Any) -> None:
    net = Net()
    _, pull = mu.vjp(lambda m, x: m(x), net, X)
    with pytest.raises(errors.ArgumentError, match="cotangent has another structure"):
        pull(cotangent)
    with pytest.raises(ValueError):
        pull(DX[:2])
    check_writes(net, vjp_hand()[2])


def test_of_wants_a_pair() -> None:
    untouched(lambda m: mu.jvp(m, (X,), tangent(), of=m), errors.ArgumentError, "a pair")
    untouched(lambda m: mu.jvp(m, (X,), (tangent(), DX, DX), of=m), errors.ArgumentError, "a pair")


def _no_tangent_of() -> Any:
    w = mu.Param(2.0)
    mu.linearize(lambda: w.value * 2, of=w)[1]()


def _no_tangent_for_the_primal() -> Any:
    w = mu.Param(2.0)
    mu.linearize(lambda x: w.value * x, 3.0, of=w)[1](mu.state(w))


@pytest.mark.parametrize("call", [_no_tangent_of, _no_tangent_for_the_primal])
def test_too_few_tangents_for_a_linear_map(call: Any) -> None:
    with pytest.raises(errors.ArgumentError):
        call()


def test_the_message_for_the_tangent_of_a_variable() -> None:
    with pytest.raises(errors.ArgumentError) as caught:
        mu.jvp(lambda w: w.value, (mu.Param(2.0),), (1.0,))
    assert "no states" not in str(caught.value)


@pytest.mark.parametrize("name", ["jvp", "vjp", "linearize"])
def test_nothing_to_differentiate(name: str) -> None:
    def run(m: Net) -> Any:
        m.eval()
        if name == "jvp":
            return mu.jvp(lambda m: m(X), (m,), (mu.State({}),), wrt=mu.Cache)
        return getattr(mu, name)(lambda m: m(X), m, wrt=mu.Cache)

    net = Net()
    with pytest.raises(errors.FilterError, match="nothing to differentiate"):
        run(net)
    assert int(net.calls) == 0
    with mu.freeze(net), pytest.raises(errors.FilterError, match="nothing to differentiate"):
        mu.vjp(lambda m: m(X), net)


@pytest.mark.parametrize("name", ["jvp", "vjp", "linearize"])
def test_of_what_is_no_node(name: str) -> None:
    def run(m: Net) -> Any:
        return mu.jvp(m, (X,), (DX, (DX,)), of=X) if name == "jvp" else getattr(mu, name)(m, X, of=X)

    untouched(run, errors.ArgumentError, "`of` cannot be")


@pytest.mark.parametrize("result", [lambda m, x: m.w, lambda m, x: (m(x), m)])
@pytest.mark.parametrize("name", ["vjp", "linearize"])
def test_results_are_arrays(name: str, result: Any) -> None:
    untouched(lambda m: getattr(mu, name)(result, m, X), errors.StructureError, "the result cannot be differentiated")


def test_aux_wants_a_pair() -> None:
    for result in (lambda m: m(X), lambda m: [m(X), 1], lambda m: (m(X), 1, 2)):
        untouched(lambda m: mu.vjp(result, m, has_aux=True), errors.StructureError, "a pair")


def test_a_state_that_has_not_been_created() -> None:
    v = mu.Param(init=lambda: jnp.ones(2))
    with pytest.raises(errors.DeferredStateError):
        mu.vjp(lambda v: v.value, v)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["jvp", "vjp", "linearize", "vjp of", "fwd over rev"])
def test_an_exception_leaves_everything_as_it_was(name: str, compiled: bool) -> None:
    def fails(m: Net, x: Any) -> Any:
        m(x)
        m.parts.append("more")
        m.flag = True
        m.extra = mu.Cache(0)
        raise KeyError("in the middle")

    def run(m: Net) -> Any:
        if name == "jvp":
            return mu.jvp(fails, (m, X), (tangent(), DX))
        if name == "vjp of":
            return mu.vjp(lambda x: fails(m, x), X, of=m)
        if name == "fwd over rev":
            return mu.jvp(lambda x: mu.grad(fails)(m, x), (X,), (DX,))
        return getattr(mu, name)(fails, m, X)

    untouched(both(run, compiled), KeyError, "in the middle")


def test_a_pullback_that_fails_changes_nothing() -> None:
    net = Net()

    def f(m: Net, x: Any) -> Any:
        y = m(x)

        @jax.custom_vjp
        def bad(y: Any) -> Any:
            return y

        def backward(_: Any, g: Any) -> Any:
            raise KeyError("backwards")

        bad.defvjp(lambda y: (y, None), backward)
        return bad(y)

    _, pull = mu.vjp(f, net, X)
    before = mu.state(net)
    with pytest.raises(KeyError):
        pull(DX)
    assert mu.state(net) == before
    net2 = Net()
    start = mu.state(net2)
    with pytest.raises(KeyError):
        mu.jit(lambda m: mu.vjp(f, m, X)[1](DX))(net2)
    assert mu.state(net2) == start


# -- lifetimes and leaks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
def test_no_tracer_leaks(compiled: bool) -> None:
    net = Net()
    with jax.checking_leaks():
        for run in FORWARD.values():
            both(run, compiled)(net)
        for form in ("argument", "of", "pytree"):
            both(lambda m, f=form: _reverse(m, f), compiled)(net)
        both(_fwd_over_rev, compiled)(net)
        both(_rev_over_fwd, compiled)(net)
    assert not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(mu.state(net)))


@pytest.mark.parametrize("name", ["vjp", "linearize"])
@pytest.mark.parametrize("form", ["argument", "of", "closure", "module itself", "compiled"])
def test_linear_maps_do_not_keep_the_model_alive(name: str, form: str) -> None:
    net = Net()
    transform = getattr(mu, name)
    if form == "argument":
        _, linear = transform(lambda m, x: m(x), net, X)
    elif form == "of":
        _, linear = transform(lambda x, m=net: m(x), X, of=net)
    elif form == "closure":
        _, linear = transform(lambda x, m=net: m(x), X)
    elif form == "module itself":
        _, linear = transform(net, X)
    else:
        _, linear = mu.jit(lambda m: transform(lambda m, x: m(x), m, X))(net)
    alive = [weakref.ref(net), weakref.ref(net.w), weakref.ref(net.calls)]
    del net
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3
    if name == "vjp":
        linear(DX)


def test_the_function_is_traced_once(traces: Any) -> None:
    net = Net()
    f = traces.count(lambda m, x: m(x))
    _, pull = mu.vjp(f, net, X)
    pull(DX)
    pull(DX)
    assert traces[f] == 1
    mu.jvp(f, (net, X), (tangent(), DX))
    assert traces[f] == 2
    step = mu.jit(lambda m: mu.vjp(f, m, X)[1](DX))
    step(net)
    step(net)
    assert traces[f] == 3


@pytest.mark.skipif("in_nzs" not in inspect.signature(jax.vjp).parameters, reason="new in JAX 0.12")
def test_options_of_new_jax() -> None:
    net = mu.Module()
    net.w, net.v = mu.Param(jnp.float32(2)), mu.Param(jnp.float32(3))

    def f(x: Any, m: Any, y: Any) -> Any:
        return x * m.w.value * m.v.value, y["a"]

    args = (jnp.float32(5), net, {"a": jnp.float32(7), "b": jnp.float32(0)})
    _, pull = mu.vjp(f, *args, in_nzs=(False, True, {"a": False, "b": True}))
    dx, dm, dy = pull((jnp.float32(1), jnp.float32(1)))
    assert (float(dx), float(dm["w"]), float(dm["v"]), float(dy["a"])) == (0, 15, 10, 0)
    assert pull.args[0].out_nzs == [True, False]
    _, push = mu.linearize(f, *args, in_nzs=(False, True, False))
    assert push.args[0].out_nzs == [True, False]

    _, pull = mu.vjp(f, *args, saveable_args=(True, False, True))
    ((cells, leaves),) = pull.args[0].args_res
    assert [type(cell).__name__ for cell in cells] == ["NotSaveable", "NotSaveable"]
    with pytest.raises(TypeError, match="bogus"):
        mu.vjp(f, *args, bogus=True)
