"""`mu.intercept`, `mu.capture`, `mu.sow`, `mu.perturb` beside the same programs threaded by hand through plain JAX."""

from __future__ import annotations

import functools
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import errors

pytestmark = pytest.mark.once  # many alike; what JAX's versions differ in, the twins and traces of transforms show

X = jnp.array([0.5, -1.0, 2.0])
XS = jnp.stack([X, -2.0 * X])
ONE = jnp.float32(1)
ZERO = jnp.float32(0)


class Scale(mu.Module):
    def __init__(self, w: float = 2.0) -> None:
        self.w = mu.Param(jnp.float32(w))
        self.calls = mu.Variable(0)

    def __call__(self, x: Any) -> Any:
        self.calls += 1
        return jnp.tanh(self.w.value * x)


class Block(mu.Module):
    def __init__(self, w: float = 2.0) -> None:
        self.scale = Scale(w)

    def __call__(self, x: Any) -> Any:
        return 2.0 * self.scale(x)


class Net(mu.Module):
    """A block under two names, called by both; a layer; and a statistic, which lanes could not share."""

    def __init__(self, statistic: bool = True) -> None:
        self.block = Block(0.5)
        self.last = Scale(-1.5)
        self.tied = [self.block]
        if statistic:
            self.total = mu.BatchStat(ZERO)

    def __call__(self, x: Any) -> Any:
        out = jnp.sum(self.last(self.tied[0](self.block(x))))
        if hasattr(self, "total"):
            self.total += out
        return out


def named(state: mu.State) -> dict[str, Any]:
    return {".".join(path): value for path, value in state.flat().items()}


def hand(s: dict[str, Any], x: Any, patch: Callable[[Any], Any] = lambda y: y) -> Any:
    """`Net` by hand: ``((out, what each layer gave), new state)``. `patch` and the states `.eps` are for the layers."""
    kept: dict[str, Any] = {}

    def layer(name: str, x: Any) -> Any:
        y = patch(jnp.tanh(s[f"{name}.w"] * x)) + s.get(f"{name}.eps", ZERO)
        kept[name] = (*kept.get(name, ()), y)
        return y

    out = jnp.sum(layer("last", 2.0 * layer("block.scale", 2.0 * layer("block.scale", x))))
    new = {**s, "block.scale.calls": s["block.scale.calls"] + 2, "last.calls": s["last.calls"] + 1}
    return (out, kept), new | ({"total": s["total"] + out} if "total" in s else {})


def close(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), a, b)


# -- ways to run (model, x) -> (out, aux), and the same by hand for (state, x) -> ((out, aux), new state) ----------


def scan(f: Any) -> Any:
    def loss(m: Any) -> Any:
        def body(total: Any, x: Any) -> Any:
            out, aux = f(m, x)
            return total + out, aux

        return mu.scan(body, ZERO, XS)

    return loss


def scan_hand(p: Any) -> Any:
    def loss(s: Any) -> Any:
        def body(carry: Any, x: Any) -> Any:
            (out, aux), new = p(carry[1], x)
            return (carry[0] + out, new), aux

        (total, new), aux = jax.lax.scan(body, (ZERO, s), XS)
        return (total, aux), new

    return loss


def vmap_hand(p: Any, s: Any) -> Any:
    result, new = jax.vmap(p, (None, 0))(s, XS)
    return result, jax.tree.map(lambda x: x[0], new)


def grad_hand(p: Any, s: Any, wrt: str) -> Any:
    def loss(part: Any) -> Any:
        (out, aux), new = p({**s, **part})
        return out, (aux, new)

    part = {name: value for name, value in s.items() if name.endswith(wrt)}
    gradient, (aux, new) = jax.grad(loss, has_aux=True)(part)
    return (gradient, aux), new


BY_HAND: dict[str, Callable[[Any, Any, str], Any]] = {
    "once": lambda p, s, _: p(s, X),
    "grad": lambda p, s, wrt: grad_hand(lambda s: p(s, X), s, wrt),
    "scan": lambda p, s, _: scan_hand(p)(s),
    "grad of scan": lambda p, s, wrt: grad_hand(scan_hand(p), s, wrt),
    "vmap": lambda p, s, _: vmap_hand(p, s),
}


def grad(f: Any, wrt: Any, **options: Any) -> Any:
    return mu.grad(f, has_aux=True, wrt=wrt, **options)


WAYS: dict[str, tuple[Callable[[Any, Net, Any], Any], str]] = {
    "eager": (lambda f, m, _: f(m, X), "once"),
    "jit": (lambda f, m, _: mu.jit(f)(m, X), "once"),
    "jit, closed over": (lambda f, m, _: mu.jit(lambda x: f(m, x))(X), "once"),
    "jit in jit": (lambda f, m, _: mu.jit(lambda x: mu.jit(f)(m, x))(X), "once"),
    "remat": (lambda f, m, _: mu.remat(f)(m, X), "once"),
    "scan": (lambda f, m, _: scan(f)(m), "scan"),
    "scan in jit": (lambda f, m, _: mu.jit(scan(f))(m), "scan"),
    "jit in scan": (lambda f, m, _: scan(mu.jit(f))(m), "scan"),
    "vmap": (lambda f, m, _: mu.vmap(f, (None, 0))(m, XS), "vmap"),
    "vmap in jit": (lambda f, m, _: mu.jit(lambda x: mu.vmap(lambda x: f(m, x))(x))(XS), "vmap"),
    "jit in vmap": (lambda f, m, _: mu.vmap(mu.jit(f), (None, 0))(m, XS), "vmap"),
    "grad": (lambda f, m, wrt: grad(f, wrt)(m, X), "grad"),
    "grad, closed over": (lambda f, m, wrt: grad(lambda x: f(m, x), wrt, of=m)(X), "grad"),
    "jit of grad": (lambda f, m, wrt: mu.jit(grad(f, wrt))(m, X), "grad"),
    "grad of jit": (lambda f, m, wrt: grad(mu.jit(f), wrt)(m, X), "grad"),
    "jit of grad of remat": (lambda f, m, wrt: mu.jit(grad(mu.remat(f), wrt))(m, X), "grad"),
    "grad of scan": (lambda f, m, wrt: grad(scan(f), wrt)(m), "grad of scan"),
    "jit of grad of scan of remat": (lambda f, m, wrt: mu.jit(grad(scan(mu.remat(f)), wrt))(m), "grad of scan"),
}
every_way = pytest.mark.parametrize("way", WAYS)


def make(way: str) -> Net:
    return Net(statistic="vmap" not in way)


def check(way: str, f: Any, net: Net, p: Any, wrt: Any = mu.Param) -> None:
    """Run (model, x) -> (out, aux) and its twin; without aux what was sown is taken for it."""
    run, by_hand = WAYS[way]
    expected, new = BY_HAND[by_hand](p, named(mu.state(net)), ".w" if wrt is mu.Param else ".eps")
    out, aux = run(f, net, wrt)
    sown = {name.removesuffix(".seen"): value for name, value in named(mu.pop(net, mu.Intermediate)).items()}
    close((named(out) if isinstance(out, mu.State) else out, sown if aux is None else aux), expected)
    close(named(mu.state(net)), new)


def without_aux(p: Any) -> Any:
    def twin(s: Any, x: Any) -> Any:
        (out, _), new = p(s, x)
        return (out, {}), new

    return twin


def scaled(module: Any, call: Any, x: Any) -> Any:
    return 3.0 * call(x) + 0.25


@pytest.mark.parametrize("place", ["around", "inside"])
@every_way
def test_a_patch(way: str, place: str) -> None:
    def inside(m: Net, x: Any) -> Any:
        with mu.intercept(Scale, scaled):
            return m(x), {}

    net, by_hand = make(way), without_aux(lambda s, x: hand(s, x, lambda y: 3.0 * y + 0.25))
    if place == "inside":
        check(way, inside, net, by_hand)
    else:
        with mu.intercept(Scale, scaled):
            check(way, lambda m, x: (m(x), {}), net, by_hand)


@every_way
def test_capture(way: str) -> None:
    def f(m: Net, x: Any) -> Any:
        out, kept = mu.capture(m, Scale)(x)
        return out, named(kept)

    check(way, f, make(way), hand)


@every_way
def test_what_is_sown_comes_back(way: str) -> None:
    def sowing(module: Any, call: Any, x: Any) -> Any:
        y = call(x)
        mu.sow(module, "seen", y)
        return y

    with mu.intercept(Scale, sowing):
        check(way, lambda m, x: (m(x), None), make(way), hand)


@pytest.mark.parametrize("wrt", [mu.Param, mu.Perturbation])
@every_way
def test_a_perturbation_is_an_added_zero(way: str, wrt: Any) -> None:
    net = make(way)
    with mu.intercept(Scale, lambda module, call, x: mu.perturb(module, "eps", call(x))):
        net(X)
        assert [*mu.state(net, mu.Perturbation)] == [("block", "scale", "eps"), ("last", "eps")]
        check(way, lambda m, x: (m(x), {}), net, without_aux(hand), wrt)


@pytest.mark.parametrize("transform", [mu.vmap, mu.scan])
def test_a_stack_of_layers(transform: Any) -> None:
    """Layers in one module with an axis: what they return is stacked under the one path."""

    class Stack(mu.Module):
        def __init__(self) -> None:
            self.layers = mu.vmap(lambda w: Scale(w))(jnp.array([0.5, 1.0, 2.0]))

        def __call__(self, x: Any) -> Any:
            if transform is mu.vmap:
                return mu.vmap(lambda layer: layer(x))(self.layers)
            return mu.scan(lambda x, layer: (layer(x), None), x, self.layers)[0]

    for f in (mu.capture(Stack(), Scale), mu.jit(mu.capture(Stack(), Scale))):
        out, kept = f(X)
        expected, last = [], X
        for w in (0.5, 1.0, 2.0):
            last = jnp.tanh(w * (X if transform is mu.vmap else last))
            expected.append(last)
        close(kept["layers"], (jnp.stack(expected),))
        close(out, kept["layers"][0] if transform is mu.vmap else last)


def test_an_ensemble() -> None:
    nets = mu.vmap(lambda w: Block(w))(jnp.array([0.5, 1.0]))
    out, kept = mu.vmap(lambda m, x: mu.capture(m, Scale)(x))(nets, XS)
    close(kept["scale"], (jnp.tanh(jnp.array([[0.5], [1.0]]) * XS),))
    close(out, 2.0 * kept["scale"][0])
    np.testing.assert_array_equal(nets.scale.calls.value, [1, 1])


# -- programs are not stale ----------------------------------------------------------------------------------------

RUNS: dict[str, Callable[[Any], Callable[[Any], Any]]] = {
    "jit": mu.jit,
    "grad": mu.grad,
    "jit of grad": lambda f: mu.jit(mu.grad(f)),
    "remat": mu.remat,
    "vmap": lambda f: lambda x: mu.vmap(f)(x[None])[0],
    "vmap of jit": lambda f: lambda x: mu.vmap(mu.jit(f))(x[None])[0],
    "scan": lambda f: lambda x: mu.scan(lambda c, _: (f(c), None), x, None, length=1)[0],
    "scan in jit": lambda f: mu.jit(lambda x: mu.scan(lambda c, _: (f(c), None), x, None, length=1)[0]),
    "fori_loop": lambda f: lambda x: mu.fori_loop(0, 1, lambda _, c: f(c), x),
    "cond": lambda f: lambda x: mu.cond(x > 0, f, f, x),
    "jvp": lambda f: lambda x: mu.jvp(f, (x,), (ONE,))[1],
    "make_jaxpr": lambda f: lambda x: str(mu.make_jaxpr(f)(x)),
}


@pytest.mark.parametrize("run", RUNS)
def test_the_same_transformed_function_with_and_without(run: str) -> None:
    layer = Scale()
    transformed, by_hand = RUNS[run](layer), RUNS[run](lambda x: 3.0 * jnp.tanh(2.0 * x) + 0.25)
    plain = transformed(ONE)
    with mu.intercept(Scale, scaled):
        patched = transformed(ONE)
    assert bool(plain == transformed(ONE)) and not bool(plain == patched)
    if run != "make_jaxpr":
        close(patched, by_hand(ONE))


@pytest.mark.parametrize("form", ["argument", "closure"])
@pytest.mark.parametrize("inner", [lambda f: f, lambda f: mu.grad(f, argnums=1)], ids=["jit", "jit of grad"])
def test_back_again_is_no_new_trace(form: str, inner: Any, traces: Any) -> None:
    net = Net()
    body = traces.count(lambda m, x: m(x))
    f = mu.jit(inner(body)) if form == "argument" else mu.jit(lambda x: inner(body)(net, x))
    args = (net, X) if form == "argument" else (X,)
    seen = []
    for _ in range(3):
        seen.append(np.asarray(f(*args)))
        with mu.intercept(Scale, scaled):
            seen.append(np.asarray(f(*args)))
        with mu.intercept(Block, scaled):
            seen.append(np.asarray(f(*args)))
    for k in range(3):
        assert (seen[k] == seen[k + 3]).all() and (seen[k] == seen[k + 6]).all()
        assert not np.allclose(seen[k], seen[(k + 1) % 3])
    assert traces.total == 3


def test_what_the_function_names_is_never_stale(traces: Any) -> None:
    layer, state, patch = Scale(), mu.Variable(ONE), Scale(3.0)
    f = mu.jit(traces.count(lambda x: layer(x)))

    def with_variable(a: Any) -> Any:
        state.value = a
        return lambda module, call, x: call(x) + state.value

    def three(make: Callable[[Any], Any]) -> int:
        before = traces.total
        for k in (1.0, 2.0, 3.0, 2.0, 1.0):
            with mu.intercept(Scale, make(ONE * k)):
                assert float(f(ONE)) == pytest.approx(k + float(jnp.tanh(2.0)))
        return int(traces.total - before)

    assert three(with_variable) == 1
    assert three(lambda a: (lambda n: lambda module, call, x: call(x) + n)(float(a))) == 3
    three(lambda a: lambda module, call, x: call(x) + a)
    three(lambda a: functools.partial(lambda a, module, call, x: call(x) + a, a))
    with mu.intercept(lambda _, m: m is layer, lambda module, call, x: patch(x)):
        close(f(ONE), jnp.tanh(3.0))
        patch.w.value = ONE
        close(f(ONE), jnp.tanh(1.0))
    assert (int(patch.calls), int(layer.calls)) == (2, 20)


@pytest.mark.parametrize("where", ["of", "captured by the function", "captured by `where`"])
def test_a_program_of_another_model(where: str) -> None:
    a, b = Scale(), Scale()
    f = mu.jit(lambda layer: layer(ONE))
    patched, plain = 3.0 * jnp.tanh(2.0) + 0.25, jnp.tanh(2.0)
    context = {
        "of": lambda: mu.intercept(lambda path, _: path == ("a",), scaled, of={"a": a}),
        "captured by the function": lambda: mu.intercept(
            Scale, lambda m, call, x: scaled(m, call, x) if m is a else call(x)
        ),
        "captured by `where`": lambda: mu.intercept(lambda _, m: m is a, scaled),
    }[where]()
    with context:
        close([f(a), f(b), f(a)], [patched, plain, patched])


def test_a_layer_that_is_replaced_inside_of_the_block() -> None:
    net = Net()
    f = mu.jit(lambda net: net(X))
    with mu.intercept(lambda path, _: path == ("last",), scaled, of=net):
        f(net)
        net.last = Scale(-1.5)
        close(f(net), net(X))


def test_popping_between_calls_keeps_the_program(traces: Any) -> None:
    net = mu.Module()
    f = mu.jit(traces.count(lambda x: mu.sow(net, "seen", 2.0 * x)))
    for k in range(3):
        f(ONE * k)
        assert float(mu.pop(net, mu.Intermediate)["seen"][0]) == 2 * k
    assert traces.total == 1


def test_gradients_of_an_interceptor() -> None:
    class Steer(mu.Module):
        def __init__(self) -> None:
            self.v = mu.Param(ONE)

        def __call__(self, module: Any, call: Any, x: Any) -> Any:
            return call(x) * self.v

    def loss(steer: Steer) -> Any:
        with mu.intercept(Scale, steer):
            return net(X)

    net, steer = Net(), Steer()
    expected = jax.grad(lambda v: hand(named(mu.state(net)), X, lambda y: v * y)[0][0])(ONE)
    for f in (mu.grad(loss), mu.jit(mu.grad(loss))):
        close(f(steer)["v"], expected)
    close(mu.grad(lambda: loss(steer), of=steer)()["v"], expected)


# -- what is handed over -------------------------------------------------------------------------------------------


def logger(log: list[Any], name: str) -> Any:
    def record(module: Any, call: Any, *args: Any) -> Any:
        log.append((name, type(module).__name__))
        return call(*args)

    return record


@pytest.mark.parametrize(
    ("outer", "inner", "expected"),
    [
        (Scale, Block, [("inner", "Block"), ("outer", "Scale")]),
        (Block, Scale, [("outer", "Block"), ("inner", "Scale")]),
        (Scale, Scale, [("inner", "Scale"), ("outer", "Scale")]),
        (..., Block, [("inner", "Block"), ("outer", "Block"), ("outer", "Scale")]),
        (..., ..., [("inner", "Block"), ("outer", "Block"), ("inner", "Scale"), ("outer", "Scale")]),
        (None, ..., [("inner", "Block"), ("inner", "Scale")]),
    ],
)
def test_the_innermost_comes_first(outer: Any, inner: Any, expected: Any) -> None:
    log: list[Any] = []
    block = Block()
    with mu.intercept(outer, logger(log, "outer")), mu.intercept(inner, logger(log, "inner")):
        block(X)
    assert log == expected
    block(X)
    assert log == expected


def test_two_patches_compose() -> None:
    layer = Scale()
    plus, times = (lambda m, call, x: call(x) + 1.0), (lambda m, call, x: call(x) * 10.0)
    y = jnp.tanh(2.0 * X)
    f = mu.jit(layer)
    with mu.intercept(Scale, plus), mu.intercept(Scale, times):
        close([layer(X), f(X)], [(y + 1) * 10] * 2)
    with mu.intercept(Scale, times), mu.intercept(Scale, plus):
        close([layer(X), f(X)], [y * 10 + 1] * 2)


@pytest.mark.parametrize("compiled", [False, True])
def test_capture_inside_of_an_intercepted_call(compiled: bool) -> None:
    net = Net()
    with mu.intercept(Block, lambda module, call, x: call(x)):
        f = mu.capture(net, Scale)
        assert [*(mu.jit(f) if compiled else f)(X)[1]] == [("block", "scale"), ("last",)]


def test_capture_sees_what_comes_out_of_the_patch() -> None:
    layer = Scale()
    with mu.intercept(Scale, scaled):
        out, kept = mu.capture(layer)(X)
    close((out, kept[()]), (3.0 * jnp.tanh(2.0 * X) + 0.25, (out,)))


def test_what_the_function_calls_itself_is_not_handed_to_it() -> None:
    layer, other, log = Scale(), Scale(3.0), []
    with mu.intercept(Scale, logger(log, "outer")), mu.intercept(Scale, lambda m, call, x: m(x) + other(x)):
        close(layer(X), jnp.tanh(2.0 * X) + jnp.tanh(3.0 * X))
    assert log == [("outer", "Scale")] * 2


def test_calls_can_be_repeated_left_out_and_given_other_arguments() -> None:
    class Pair(mu.Module):
        def __call__(self, x: Any, *, y: Any = 0.0) -> Any:
            return x + 10.0 * y

    layer, pair = Scale(), Pair()
    with mu.intercept(Scale, lambda m, call, x: call(call(x))):
        close(layer(X), jnp.tanh(2.0 * jnp.tanh(2.0 * X)))
    with mu.intercept(Scale, lambda m, call, x: x):
        assert layer(X) is X
    assert int(layer.calls) == 2
    with mu.intercept(Pair, lambda m, call, x, y=0.0: (call(y, y=x), y)):
        assert pair(1.0, y=2.0) == (12.0, 2.0)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("function", "by_hand", "calls"),
    [
        (lambda m, call, x: mu.jit(call)(x), lambda f, x: f(x), 1),
        (lambda m, call, x: mu.grad(mu.remat(call))(x), lambda f, x: jax.grad(f)(x), 1),
        (lambda m, call, x: mu.fori_loop(0, 3, lambda _, x: call(x), x), lambda f, x: f(f(f(x))), 3),
        (lambda m, call, x: mu.cond(x < 0, call, lambda x: 5.0 * x, x), lambda f, x: 5.0 * x, 0),
    ],
)
def test_transforms_of_the_call(function: Any, by_hand: Any, calls: int, compiled: bool) -> None:
    layer = Scale()
    with mu.intercept(Scale, function):
        close((mu.jit(layer) if compiled else layer)(ONE), by_hand(lambda x: jnp.tanh(2.0 * x), ONE))
    assert int(layer.calls) == calls


def test_a_module_that_calls_itself() -> None:
    class Down(mu.Module):
        def __call__(self, n: int) -> Any:
            return ONE if n == 0 else 1.0 + self(n - 1)

    down, log = Down(), []
    with mu.intercept(Down, logger(log, "each")):
        assert float(down(2)) == 3
    assert len(log) == 3
    close(mu.capture(down)(2)[1][()], (ONE, 2 * ONE, 3 * ONE))


def test_paths() -> None:
    net, seen = Net(), []

    def where(path: Any, module: Any) -> bool:
        seen.append(path)
        return path == ("block", "scale")

    with mu.intercept(where, scaled, of=net):
        patched = net(X)
    assert set(seen) == {(), ("block",), ("block", "scale"), ("last",)}
    with mu.intercept(lambda _, m: m is net.block.scale, scaled):
        close(net(X), patched)
    seen.clear()
    with mu.intercept(where, scaled):
        net(X)
    assert set(seen) == {()}


class Sub(Scale):
    def __call__(self, x: Any) -> Any:
        return super().__call__(x) + Scale.__call__(self, x)


class SubSub(Sub):
    pass


class Compiled(Scale):
    @mu.jit
    def __call__(self, x: Any) -> Any:
        return super().__call__(x)


@pytest.mark.parametrize("cls", [Scale, Sub, SubSub, Compiled])
def test_subclasses_are_handed_over_once(cls: type[Any]) -> None:
    layer = cls()
    y = layer(X)
    with mu.intercept(Scale, scaled):
        close(layer(X), 3.0 * y + 0.25)
    with mu.intercept(lambda _, m: type(m) is Scale, scaled):
        close(layer(X), 3.0 * y + 0.25 if cls is Scale else y)
    close(mu.capture(layer)(X)[1][()], (y,))


class Call:
    def __call__(self, x: Any) -> Any:
        return 2.0 * x


class MixedIn(Call, mu.Module):
    pass


class Assigned(mu.Module):
    pass


Assigned.__call__ = Call.__call__  # type: ignore[attr-defined]


@pytest.mark.parametrize("cls", [MixedIn, Assigned])
def test_calls_that_come_from_elsewhere(cls: Any) -> None:
    with mu.intercept(cls, lambda m, call, x: call(x) + 1.0):
        assert cls()(1.0) == 3.0


def test_only_calls_are_handed_over() -> None:
    class Coder(mu.Module):
        def __init__(self) -> None:
            self.scale = Scale()

        def encode(self, x: Any) -> Any:
            return self.scale(x)

    coder = Coder()
    with mu.intercept(Coder, lambda m, call, x: 0.0 * x), mu.intercept(Scale, scaled):
        close(coder.encode(X), 3.0 * jnp.tanh(2.0 * X) + 0.25)
    out, kept = mu.capture(coder.encode, Scale, of=coder)(X)
    close(kept["scale"], (out,))


@pytest.mark.parametrize("prefix", [(), (0,)], ids=["model", "list"])
def test_capture_leaves_out_what_is_not_in_the_model(prefix: Any) -> None:
    net, other = Block(), Scale(3.0)
    _, kept = mu.capture(lambda x: net(other(x)), Scale, of=[net] if prefix else net)(X)
    assert [*kept] == [(*prefix, "scale")]


# -- sow and perturb ------------------------------------------------------------------------------------------------


def test_sown_values_are_a_tuple_or_reduced() -> None:
    net = mu.Module()
    for k in (1.0, 2.0, 3.0):
        mu.sow(net, "seen", {"k": ONE * k})
        mu.sow(net, "sum", ONE * k, kind=mu.Cache, reduce=jnp.add)
    assert [float(value["k"]) for value in mu.pop(net, mu.Intermediate)["seen"]] == [1, 2, 3]
    mu.for_loop(lambda k: mu.sow(net, "sum", k, kind=mu.Cache, reduce=jnp.add), jnp.arange(4.0))
    assert named(mu.state(net)) == {"sum": 12}


def scan_in(f: Any, **options: Any) -> Any:
    return mu.scan(lambda c, x: (c, f(x)), None, jnp.arange(3.0), **options)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda f: mu.jvp(f, (ONE,), (ONE,)), 2.0),
        (lambda f: mu.vjp(f, ONE)[1](ONE), 2.0),
        (lambda f: mu.linearize(f, ONE)[1](ONE), 2.0),
        (lambda f: mu.hessian(f)(ONE), 2.0),
        (lambda f: mu.jacfwd(f)(X), 2.0 * X),
        (lambda f: mu.map(f, jnp.arange(4.0)), 2.0 * jnp.arange(4.0)),
        (lambda f: scan_in(f, reverse=True), 2.0 * jnp.arange(3.0)),
        (lambda f: scan_in(f, checkpoint_every=2), 2.0 * jnp.arange(3.0)),
        (lambda f: mu.for_loop(lambda x: mu.for_loop(f, x), XS), 2.0 * XS),
    ],
)
def test_sown_under_further_transforms(run: Any, expected: Any, compiled: bool) -> None:
    net = mu.Module()

    def f(x: Any) -> Any:
        mu.sow(net, "seen", 2.0 * x)
        return x**3

    (mu.jit(lambda: (run(f), None)[1]) if compiled else lambda: run(f))()
    (sown,) = mu.pop(net, mu.Intermediate).flat().values()
    close(sown, (jnp.asarray(expected),))


@pytest.mark.parametrize("shapes", [((4, 3), (1, 3)), ((1, 3), (4, 3)), ((), (3,))])
def test_a_perturbation_of_another_shape(shapes: Any) -> None:
    net = mu.Module()
    first, second = map(jnp.ones, shapes)
    mu.perturb(net, "eps", first)
    with jax.numpy_rank_promotion("allow"), pytest.raises(errors.MutatisError, match="eps"):
        mu.perturb(net, "eps", second)


def test_a_perturbation_made_in_lanes_is_not_added_as_a_whole() -> None:
    net, xs = mu.Module(), jnp.arange(3.0)
    close(mu.vmap(lambda x: mu.perturb(net, "eps", x))(xs), xs)
    try:
        again = mu.vmap(lambda x: mu.perturb(net, "eps", x))(xs)
    except errors.MutatisError:
        return
    close(again, xs)


# -- threads, errors, lifetimes -------------------------------------------------------------------------------------


@every_way
def test_an_exception_leaves_nothing_behind(way: str) -> None:
    def fails(module: Any, call: Any, x: Any) -> Any:
        mu.sow(module, "seen", call(x))
        module.flag = True
        raise KeyError("in the middle")

    net = make(way)
    before = repr(net)
    with pytest.raises(KeyError, match="in the middle"), mu.intercept(Scale, fails):
        mu.jit(lambda: WAYS[way][0](lambda m, x: (m(x), {}), net, mu.Param))()
    assert repr(net) == before
    check(way, lambda m, x: (m(x), {}), net, without_aux(hand))


@pytest.mark.parametrize("compiled", [False, True])
def test_other_threads_do_not_see_it(compiled: bool) -> None:
    layer, results = Scale(), {}
    f = mu.jit(layer) if compiled else layer
    entered, done = threading.Event(), threading.Event()

    def work() -> None:
        results["before"] = f(ONE)
        with mu.intercept(Scale, lambda m, call, x: call(x) * 0.0 - 1.0):
            results["inside"] = f(ONE)
            entered.set()
            done.wait(60)

    thread = threading.Thread(target=work)
    with mu.intercept(Scale, scaled):
        thread.start()
        assert entered.wait(60)
        here = f(ONE)
    plain = f(ONE)
    done.set()
    thread.join(60)
    y = jnp.tanh(2.0)
    close((here, plain, results), (3.0 * y + 0.25, y, {"before": y, "inside": -ONE}))
    assert int(layer.calls) == 4


def test_nothing_is_kept() -> None:
    net, seen = Net(), []
    with mu.intercept(Scale, lambda m, call, x: (seen.append(1), call(x))[1]), jax.checking_leaks():
        mu.capture(net, Scale)(X)
    out, kept = mu.jit(lambda m, x: mu.capture(m)(x))(net, X)
    gone = [weakref.ref(net), weakref.ref(net.block.scale.w)]
    assert [*mu.state(net, mu.Intermediate)] == []
    del net
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    assert [*kept] == [(), ("block",), ("block", "scale"), ("last",)] and len(seen) == 3


# -- what is refused ------------------------------------------------------------------------------------------------

S, T, F, A = errors.StructureError, errors.StateTypeError, errors.FilterError, errors.ArgumentError
KEEP = "Return the value from there, and keep it outside."
BEFORE = "Make states and change attributes before; inside, write to states."
REFUSED: list[tuple[Callable[[Any], Any], type[Exception], str, str]] = [
    (
        lambda m: mu.capture(lambda x: m(x), Scale),
        A,
        "`capture` of a function needs the model",
        "mu.capture(model, nn.L",
    ),
    (lambda m: mu.capture(m, of=3)(X), A, "3 is not a node", ""),
    (lambda m: mu.capture(m, 3), F, "3 is not a filter", "a function of (path, variable)"),
    (lambda m: mu.intercept(3, scaled).__enter__(), F, "3 is not a filter", "a function of (path, variable)"),
    (lambda m: mu.intercept(Scale, 3).__enter__(), A, "`intercept` needs a function", "call(x)"),
    (lambda m: mu.sow(3, "seen", ONE), A, "3 cannot hold state `seen`", "mu.sow(self"),
    (lambda m: mu.sow(m, "number", ONE), S, "`Scale.number` is no Intermediate", "Give it another name."),
    (lambda m: mu.sow(m, "w", ONE), S, "`Scale.w` is no Intermediate", "got:      Param"),
    (lambda m: mu.perturb(m, "w", ONE), S, "`Scale.w` is no Perturbation", "Give it another name."),
    (lambda m: mu.sow(m, "seen", "text"), T, "Intermediate cannot hold 'text'", "plain attributes of the module"),
    (lambda m: mu.cond(True, lambda: mu.sow(m, "seen", ONE), lambda: None), S, "in a branch", KEEP),
    (lambda m: mu.capture(lambda: mu.cond(True, m, lambda x: x, X), of=m)(), S, "in a branch", KEEP),
    (
        lambda m: mu.for_loop(lambda k: mu.sow(m, "s", k, reduce=jnp.add), X),
        S,
        "made by the first of them",
        "mu.sow(mo",
    ),
    (lambda m: mu.map(lambda x: mu.sow(m, "s", x), XS, batch_size=2), errors.LaneError, "no order", "Leave out `b"),
    (lambda m: mu.while_loop(lambda x: x < 2, lambda x: (mu.sow(m, "seen", x), x + 1)[1], ONE), S, "the body", KEEP),
    (lambda m: mu.for_loop(lambda x: mu.perturb(m, "eps", x), X), S, "`m.eps` was changed in the body", BEFORE),
    (
        lambda m: mu.grad(lambda m: mu.perturb(m, "eps", m(ONE)), wrt=mu.Perturbation)(m),
        F,
        "nothing to diff",
        "Perturb",
    ),
]


@pytest.mark.parametrize(("program", "error", "first", "further"), REFUSED)
def test_refused(program: Any, error: type[Exception], first: str, further: str) -> None:
    layer = Scale()
    layer.number = 3
    with pytest.raises(error) as caught:
        program(layer)
    assert first in str(caught.value).split("\n")[0] and further in str(caught.value)
    assert named(mu.state(layer)) == {"calls": 0, "w": 2} and layer.number == 3


def test_what_was_sown_before_a_loop_is_in_its_way() -> None:
    layer = Scale()
    mu.sow(layer, "seen", ONE)
    with pytest.raises(errors.StateTypeError, match=r"state `layer.seen` \(Intermediate\) changes its type"):
        mu.for_loop(lambda x: mu.sow(layer, "seen", x), X)
    mu.pop(layer, mu.Intermediate)
    mu.for_loop(lambda x: mu.sow(layer, "seen", x), X)
    close(mu.pop(layer, mu.Intermediate)["seen"], (X,))


def test_the_cures() -> None:
    layer = Scale()
    close(mu.capture(lambda x: layer(x), Scale, of=layer)(X)[1][()], (layer(X),))
    mu.perturb(layer, "eps", ONE)
    close(mu.for_loop(lambda x: mu.perturb(layer, "eps", x), X), X)
    close(mu.grad(lambda m: 2.0 * mu.perturb(m, "eps", m(ONE)), wrt=mu.Perturbation)(layer)["eps"], 2 * ONE)


@pytest.mark.parametrize("keep", [mu.sow, mu.perturb])
def test_nothing_is_kept_across_raw_jit(keep: Any) -> None:
    net = mu.Module()
    with pytest.raises(errors.TraceLevelError, match="mu"):
        jax.jit(lambda x: (keep(net, "seen", x), x)[1])(ONE)
    assert not hasattr(net, "seen")


def test_entered_again_it_is_the_same_for_compiled_programs(traces: Any) -> None:
    # Whoever does the same is the same; another function, filter, node or surrounding interceptor is another.
    net = Net(statistic=False)
    walks = []

    @mu.jit
    def step(net: Any, x: Any) -> Any:
        walks.append(1)
        return net(x)

    def double(module: Any, call: Any, x: Any) -> Any:
        return 2 * call(x)

    def negative(module: Any, call: Any, x: Any) -> Any:
        return -call(x)

    class Hook:
        def __init__(self, factor: float) -> None:
            self.factor = factor

        def hook(self, module: Any, call: Any, x: Any) -> Any:
            return self.factor * call(x)

    hooks = Hook(2.0), Hook(3.0)

    def patched(where: Any, fn: Any, of: Any = None) -> tuple[float, float]:
        with mu.intercept(where, fn, of=of):
            return float(step(net, X)), float(net(X))

    for _ in range(3):
        for where, fn, of in [
            (Scale, double, None),
            (mu.OfType(Scale), double, None),
            (Block, double, None),
            (Scale, negative, None),
            (mu.PathContains("last"), double, net),
            (mu.PathContains("scale"), double, net.block),
            (Scale, hooks[0].hook, None),
            (Scale, hooks[1].hook, None),
        ]:
            compiled, eager = patched(where, fn, of)
            assert np.isclose(compiled, eager, rtol=1e-6)
        with mu.intercept(Scale, negative):
            compiled, eager = patched(Block, double)
            assert np.isclose(compiled, eager, rtol=1e-6)
    assert len(walks) <= 9
    hooks[0].factor = 5.0
    compiled, eager = patched(Scale, hooks[0].hook)
    assert np.isclose(compiled, eager, rtol=1e-6)


def test_fresh_functions_are_not_kept() -> None:
    net = Net(statistic=False)
    step = mu.jit(lambda net, x: net(x))
    alive = []

    for _ in range(100):

        def patch(module: Any, call: Any, x: Any) -> Any:
            return call(x)

        with mu.intercept(Scale, patch, of=net):
            step(net, X)
        alive.append(weakref.ref(patch))
    del patch
    gc.collect()
    assert sum(ref() is not None for ref in alive) <= 20
    model = weakref.ref(net)
    del net
    gc.collect()
    assert model() is None
    assert sum(ref() is not None for ref in alive) <= 1  # the one that the program was made for
