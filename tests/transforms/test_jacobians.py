"""`mu.jacfwd`, `mu.jacrev`, `mu.hessian` beside those of JAX of the same thing threaded by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import errors

pytestmark = pytest.mark.once  # many alike; what JAX's versions differ in, the twins and traces of transforms show

X = jnp.array([0.5, -1.0])
TRANSFORMS = {
    "jacfwd": (mu.jacfwd, jax.jacfwd),
    "jacrev": (mu.jacrev, jax.jacrev),
    "hessian": (mu.hessian, jax.hessian),
}
first_order = pytest.mark.parametrize("name", ["jacfwd", "jacrev"])
each = pytest.mark.parametrize("name", TRANSFORMS)
compiled_or_not = pytest.mark.parametrize("compiled", [False, True])


class Net(mu.Module):
    """A matrix, a pytree, a tied weight, a statistic, a counter, a random stream, and an integer parameter."""

    def __init__(self) -> None:
        self.k = mu.Param(jnp.array([[1.0, -2.0], [0.5, 1.5], [0.0, 1.0]]))
        self.p = mu.Param({"a": jnp.float32(0.5), "b": [jnp.array([1.0, 2.0, 3.0])]})
        self.steps = mu.Param(jnp.int32(1))
        self.ztied = [self.k]
        self.mean = mu.BatchStat(jnp.float32(2))
        self.calls = mu.Variable(0)
        self.rngs = mu.Rngs(3)

    def __call__(self, x: Any) -> Any:
        p = self.p.value
        noise = jax.random.normal(self.rngs(), (3,))
        y = jnp.tanh(self.k.value @ x) * p["a"] + p["b"][0] * noise * self.mean.value
        self.mean.value = 0.5 * self.mean.value + jnp.sum(y**2) * jnp.sum(self.ztied[0].value)
        self.calls += 1
        return {"y": y * y, "mean": self.mean.value}


KEY = jax.random.key(3)


def start() -> dict[str, Any]:
    """The state of a new `Net`, by hand."""
    net = Net()
    return {"k": net.k.get(), "p": net.p.get(), "mean": net.mean.get(), "calls": jnp.int32(0), "count": jnp.uint32(0)}


def hand(part: dict[str, Any], x: Any) -> Any:
    s = {**start(), **part}
    noise = jax.random.normal(jax.random.fold_in(KEY, s["count"]), (3,))
    y = jnp.tanh(s["k"] @ x) * s["p"]["a"] + s["p"]["b"][0] * noise * s["mean"]
    mean = 0.5 * s["mean"] + jnp.sum(y**2) * jnp.sum(s["k"])
    return {"y": y * y, "mean": mean}, {"mean": mean, "calls": s["calls"] + 1, "count": s["count"] + 1}


def parts() -> dict[str, Any]:
    return {name: start()[name] for name in ("k", "p")}


def close(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), a, b)


def plain(tree: Any) -> Any:
    """A result with each State as a dictionary, as the twin has it."""
    is_state: Any = lambda x: isinstance(x, mu.State)  # noqa: E731

    def convert(x: Any) -> Any:
        return {path[0]: plain(value) for path, value in x.flat().items()} if is_state(x) else x

    return jax.tree.map(convert, tree, is_leaf=is_state)


def check_writes(net: Net, new: dict[str, Any]) -> None:
    np.testing.assert_allclose(net.mean.value, new["mean"], rtol=1e-5)
    assert int(net.calls) == int(new["calls"])
    assert int(net.rngs.default.value["count"]) == int(new["count"])
    assert not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(mu.state(net)))


FORMS: dict[str, tuple[Callable[[Any, Net], Any], Callable[[Any], Any]]] = {
    "model": (
        lambda t, m: t(lambda m, x: m(x))(m, X),
        lambda t: t(hand, has_aux=True)(parts(), X),
    ),
    "of": (
        lambda t, m: t(lambda x: m(x), of=m)(X),
        lambda t: t(hand, has_aux=True)(parts(), X),
    ),
    "module itself": (
        lambda t, m: t(m, of=m)(X),
        lambda t: t(hand, has_aux=True)(parts(), X),
    ),
    "input": (
        lambda t, m: t(m)(X),
        lambda t: t(hand, 1, has_aux=True)(parts(), X),
    ),
    "argnums": (
        lambda t, m: t(lambda m, x: m(x), argnums=1)(m, X),
        lambda t: t(hand, 1, has_aux=True)(parts(), X),
    ),
    "negative": (
        lambda t, m: t(lambda m, x: m(x), -1)(m, X),
        lambda t: t(hand, 1, has_aux=True)(parts(), X),
    ),
    "several": (
        lambda t, m: t(lambda m, x: m(x), argnums=(0, 1))(m, X),
        lambda t: t(hand, (0, 1), has_aux=True)(parts(), X),
    ),
    "several, another order": (
        lambda t, m: t(lambda m, x: m(x), argnums=[-1, 0])(m, X),
        lambda t: t(hand, (1, 0), has_aux=True)(parts(), X),
    ),
    "tuple of one": (
        lambda t, m: t(lambda m, x: m(x), argnums=(1,))(m, X),
        lambda t: t(hand, (1,), has_aux=True)(parts(), X),
    ),
    "of and argument": (
        lambda t, m: t(lambda x: m(x), argnums=0, of=m)(X),
        lambda t: t(hand, (0, 1), has_aux=True)(parts(), X),
    ),
    "of and arguments": (
        lambda t, m: t(lambda x, s: jax.tree.map(lambda y: y * s, m(x)), argnums=(0,), of=m)(X, jnp.float32(1)),
        lambda t: t(lambda a, xs: hand(a, xs[0]), (0, 1), has_aux=True)(parts(), (X,)),
    ),
    "pytree": (
        lambda t, m: t(lambda d: m(d["x"][0]))({"x": [X]}),
        lambda t: t(lambda d: hand({}, d["x"][0]), has_aux=True)({"x": [X]}),
    ),
    "keyword": (
        lambda t, m: t(lambda x, *, m: m(x))(X, m=m),
        lambda t: t(hand, 1, has_aux=True)(parts(), X),
    ),
    "wrt": (
        lambda t, m: t(lambda m, x: m(x), wrt="batch_stats")(m, X),
        lambda t: t(hand, has_aux=True)({"mean": jnp.float32(2)}, X),
    ),
    "frozen": (
        lambda t, m: _with_frozen(t, m),
        lambda t: t(hand, has_aux=True)({"p": start()["p"]}, X),
    ),
}


def _with_frozen(t: Any, m: Net) -> Any:
    with mu.freeze(m.k):
        return t(lambda m, x: m(x))(m, X)


# Every form eagerly; compiled and inside others, those that differ in how the values come back.
CASES = [(form, "eager") for form in FORMS]
CASES += [
    (form, around) for form in ("model", "of and argument") for around in ("jit", "remat", "scan", "functionalize")
]


@each
@pytest.mark.parametrize(("form", "around"), CASES)
def test_twins(name: str, form: str, around: str) -> None:
    net = Net()
    (transform, raw), (ours, by_hand) = TRANSFORMS[name], FORMS[form]
    run: Any = lambda: ours(transform, net)  # noqa: E731
    if around == "eager":
        out = run()
    elif around == "scan":
        out = jax.tree.map(lambda x: x[0], mu.scan(lambda c, _: (c, run()), None, length=1)[1])
    elif around == "functionalize":
        pure, state = mu.functionalize(run, of=net)
        out, new_state = jax.jit(pure)(state)
        assert int(net.calls) == 0
        mu.update(net, new_state)
    else:
        out = (mu.jit if around == "jit" else mu.remat)(run)()
    expected, new = by_hand(raw)
    close(plain(out), expected)
    check_writes(net, new)


@each
def test_aux(name: str) -> None:
    net = Net()
    transform, raw = TRANSFORMS[name]
    out, (same, x, none, text) = transform(lambda m, x: (m(x), (m, x, None, 3)), has_aux=True)(net, X)
    assert same is net and none is None and int(text) == 3
    np.testing.assert_array_equal(x, X)
    assert not isinstance(x, jax.core.Tracer)
    expected, new = raw(hand, has_aux=True)(parts(), X)
    close(plain(out), expected)
    check_writes(net, new)


def test_aux_of_a_written_state() -> None:
    n = mu.Variable(0.0)

    def f(x: Any) -> Any:
        n.value = n.value + jnp.sum(x)
        return x * x, n.value

    for count, transform in enumerate([mu.jacfwd, mu.jacrev, mu.hessian], 1):
        _, aux = transform(f, has_aux=True)(X)
        assert float(aux) == float(n) == -0.5 * count


@each
def test_an_ensemble(name: str) -> None:
    ensemble = mu.vmap(lambda _: Net())(jnp.arange(2))
    ensemble.k.value = ensemble.k.value * jnp.array([1.0, 0.5])[:, None, None]
    transform, raw = TRANSFORMS[name]
    out = plain(mu.jit(mu.vmap(lambda m: transform(lambda m, x: m(x))(m, X)))(ensemble))
    for lane, factor in enumerate((1.0, 0.5)):
        expected, new = raw(hand, has_aux=True)({**parts(), "k": parts()["k"] * factor}, X)
        close(jax.tree.map(lambda x, i=lane: x[i], out), expected)
        np.testing.assert_allclose(ensemble.mean[lane], new["mean"], rtol=1e-5)
        assert int(ensemble.calls[lane]) == 1


def test_a_hessian_is_a_state_of_states() -> None:
    net = Net()
    out = mu.hessian(lambda m: m(X)["mean"])(net)
    assert isinstance(out, mu.State) and set(out) == {("k",), ("p",)}
    assert isinstance(out["k"], mu.State) and set(out["k"]) == {("k",), ("p",)}
    assert out["k"]["k"].shape == (3, 2, 3, 2)
    assert out["k"]["p"]["b"][0].shape == (3, 2, 3)
    assert out["p"]["b"][0]["k"].shape == (3, 3, 2), "of a pytree: a State for each leaf"
    np.testing.assert_allclose(out["k"]["p"]["a"], out["p"]["a"]["k"], rtol=1e-4)


def test_a_hessian_of_a_tied_weight() -> None:
    class Tied(mu.Module):
        def __init__(self) -> None:
            self.a = mu.Param(X)
            self.b = [self.a]

    out = mu.hessian(lambda m: jnp.sum(m.a.value**2 * m.b[0].value))(Tied())
    assert set(out) == {("a",)} and set(out["a"]) == {("a",)}
    np.testing.assert_allclose(out["a"]["a"], jnp.diag(6 * X), rtol=1e-6)


@first_order
def test_the_same_model_twice(name: str) -> None:
    w = mu.Param(X)
    first, second = TRANSFORMS[name][0](lambda a, b: a.value * b.value, argnums=(0, 1))(w, w)
    np.testing.assert_allclose(first[()], jnp.diag(2 * X))
    assert len(second) == 0


def test_a_filter_for_each_argument() -> None:
    a, b = Net(), Net()
    f: Any = lambda a, b: a(X)["mean"] * b(X)["mean"]  # noqa: E731
    first, second = mu.jacrev(f, argnums=(0, 1), wrt=("batch_stats", mu.PathContains("k")))(a, b)
    assert set(first) == {("mean",)} and set(second) == {("k",)}


@each
@pytest.mark.parametrize("output", ["none", "constant", "list", "scalar", "state"])
def test_output_pytrees(name: str, output: str) -> None:
    w = mu.Param(X)

    def shape(w: Any) -> Any:
        return {
            "none": {"a": None, "b": w * w},
            "constant": [w * w, 3.0, jnp.ones(2)],
            "list": [[w * w], (jnp.sum(w),)],
            "scalar": jnp.sum(w**3),
            "state": mu.State({("q",): w * w}),
        }[output]

    transform, raw = TRANSFORMS[name]
    out = transform(lambda w: shape(w.value))(w)
    expected = raw(shape)(X)
    leaves = jax.tree.leaves(out)
    close(leaves, jax.tree.leaves(expected))
    if output == "state":
        assert isinstance(out["q"], mu.State)


def test_integer_outputs_are_as_in_jax() -> None:
    n = mu.Variable(0)

    def f(x: Any) -> Any:
        n.value += 1
        return jnp.int32(2)

    for call in (mu.jacrev(f), jax.jacrev(lambda x: jnp.int32(2))):
        with pytest.raises(TypeError, match="real-valued outputs"):
            call(X)
    assert int(n) == 0
    ours, raw = mu.jacfwd(f)(X), jax.jacfwd(lambda x: jnp.int32(2))(X)
    assert ours.dtype == raw.dtype and ours.shape == raw.shape
    assert int(n) == 1


@each
def test_integer_arguments(name: str) -> None:
    transform, raw = TRANSFORMS[name]
    f: Any = lambda k: k.astype(jnp.float32) * 2.0  # noqa: E731
    for call in (transform(f), raw(f)):
        with pytest.raises(TypeError, match="requires real"):
            call(jnp.arange(2))


def test_allow_int() -> None:
    n = mu.Variable(0)

    def f(k: Any, x: Any) -> Any:
        n.value += 1
        return k.astype(jnp.float32) * x

    ours = mu.jacrev(f, argnums=(0, 1), allow_int=True)(jnp.arange(2), X)
    raw = jax.jacrev(lambda k, x: k.astype(jnp.float32) * x, argnums=(0, 1), allow_int=True)(jnp.arange(2), X)
    assert ours[0].dtype == raw[0].dtype and ours[0].shape == raw[0].shape
    np.testing.assert_array_equal(ours[1], raw[1])
    assert int(n) == 1


@each
def test_holomorphic(name: str) -> None:
    transform, raw = TRANSFORMS[name]
    z = X.astype(jnp.complex64) * (1 + 2j)
    w = mu.Param(z)
    np.testing.assert_allclose(
        transform(lambda w: w.value**3, holomorphic=True)(w)[()][()]
        if name == "hessian"
        else transform(lambda w: w.value**3, holomorphic=True)(w)[()],
        raw(lambda w: w**3, holomorphic=True)(z),
        rtol=1e-5,
    )
    with pytest.raises(TypeError):
        transform(lambda w: w.value**3)(w)
    with pytest.raises(TypeError):
        transform(lambda x: x**3, holomorphic=True)(X)


@each
@compiled_or_not
def test_writes_and_draws_happen_once(name: str, compiled: bool, traces: Any) -> None:
    """However many rows and columns there are."""
    net = Net()
    f = traces.count(lambda x: net(x)["y"])
    run = TRANSFORMS[name][0](f)
    run = mu.jit(run) if compiled else run
    run(X)
    assert int(net.calls) == 1 and int(net.rngs.default.value["count"]) == 1
    run(X)
    assert int(net.calls) == 2 and int(net.rngs.default.value["count"]) == 2
    assert traces[f] == (1 if compiled else 2)


@each
def test_what_is_written_is_differentiated_outside(name: str) -> None:
    memory = mu.Hidden(jnp.zeros(2))

    def f(x: Any) -> Any:
        def store(y: Any) -> Any:
            memory.value = x * x * y
            return y * y

        TRANSFORMS[name][0](store)(jnp.array([1.0, 2.0]))
        return jnp.sum(memory.value)

    np.testing.assert_allclose(mu.grad(f)(X), 2 * X * jnp.array([1.0, 2.0]), rtol=1e-6)


@compiled_or_not
def test_derivatives_of_derivatives(compiled: bool) -> None:
    w, n = mu.Param(X), mu.Variable(0)

    def f(w: Any) -> Any:
        n.value += 1
        return jnp.sum(jnp.sin(w.value) * w.value**2)

    raw = jax.hessian(lambda w: jnp.sum(jnp.sin(w) * w**2))(X)
    runs = [
        mu.hessian(f),
        mu.jacfwd(lambda w: mu.grad(f)(w)[()]),
        mu.jacrev(lambda w: mu.grad(f)(w)[()]),
        mu.jacrev(lambda w: mu.jacfwd(f)(w)[()]),
        mu.jacfwd(lambda w: mu.jacfwd(f)(w)[()]),
    ]
    for count, run in enumerate(runs, 1):
        out = (mu.jit(run) if compiled else run)(w)[()]
        np.testing.assert_allclose(out[()] if isinstance(out, mu.State) else out, raw, rtol=1e-4, atol=1e-5)
        assert int(n) == count
    third = mu.grad(lambda w: jnp.sum(mu.hessian(f)(w)[()][()]))(w)[()]
    expected = jax.grad(lambda w: jnp.sum(jax.hessian(lambda w: jnp.sum(jnp.sin(w) * w**2))(w)))(X)
    np.testing.assert_allclose(third, expected, rtol=1e-4)


@each
def test_as_a_decorator_and_method(name: str) -> None:
    transform, raw = TRANSFORMS[name]

    class Model(mu.Module):
        def __init__(self) -> None:
            self.w = mu.Param(X)

        @transform
        def of_self(self, x: Any) -> Any:
            return self.w * x * x

        @transform(argnums=1)
        def of_x(self, x: Any) -> Any:
            return self.w * x * x

    model = Model()
    close(plain(model.of_self(X)), raw(lambda s: s["w"] * X * X)({"w": X}))
    close(model.of_x(X), raw(lambda x: X * x * x)(X))
    assert model.of_x.__name__ == "of_x"


# -- errors ------------------------------------------------------------------------------------------------------


@each
@compiled_or_not
def test_an_exception_leaves_everything_as_it_was(name: str, compiled: bool) -> None:
    net = Net()
    net.parts = [1]
    before, shown = mu.state(net), repr(net)

    def fails(m: Net, x: Any) -> Any:
        m(x)
        m.parts.append("more")
        m.extra = mu.Cache(0)
        raise KeyError("in the middle")

    run = TRANSFORMS[name][0](fails)
    with pytest.raises(KeyError, match="in the middle"):
        (mu.jit(run) if compiled else run)(net, X)
    assert mu.state(net) == before and repr(net) == shown


@each
@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda t, m: t(lambda m: m(X), wrt=mu.Cache)(m), errors.FilterError),
        (lambda t, m: t(m, of=X)(X), errors.ArgumentError),
        (lambda t, m: t(m, of=())(X), errors.ArgumentError),
        (lambda t, m: t(lambda m, x: m(x), 2)(m, X), errors.ArgumentError),
        (lambda t, m: t(lambda m, x: m(x), -3)(m, X), errors.ArgumentError),
        (lambda t, m: t(lambda m, x: m(x), (0, 5))(m, X), errors.ArgumentError),
        (lambda t, m: t(lambda: m(X))(), errors.ArgumentError),
        (lambda t, m: t(lambda m, x: m.k)(m, X), errors.StructureError),
        (lambda t, m: t(lambda m, x: (m(x), m))(m, X), errors.StructureError),
        (lambda t, m: t(lambda m, x: m(x), has_aux=True)(m, X), errors.StructureError),
        (lambda t, m: t(lambda m, x: [m(x), 1], has_aux=True)(m, X), errors.StructureError),
    ],
)
def test_bad_calls(name: str, call: Any, error: Any) -> None:
    net = Net()
    before = mu.state(net)
    with pytest.raises(error) as caught:
        call(TRANSFORMS[name][0], net)
    assert caught.value.cure
    assert mu.state(net) == before


@each
@compiled_or_not
def test_no_tracer_leaks(name: str, compiled: bool) -> None:
    net = Net()
    run = TRANSFORMS[name][0](lambda m, x: m(x), argnums=(0, 1))
    with jax.checking_leaks():
        (mu.jit(run) if compiled else run)(net, X)
    assert not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(mu.state(net)))
