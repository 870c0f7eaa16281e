"""Raw JAX transforms over kept functions that read states: right in every order, under every transform, as if threaded by hand.

A kept function is what JAX finds its traces by. So each case here makes one, once, and calls it again and again: in one program
and in several, for the value and for the gradient, before and after the states have changed.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.ode import odeint
from jax.scipy.sparse.linalg import bicgstab, cg

import mutatis as mu
from mutatis import _compat, errors
from mutatis.core import stamps


class Net(mu.Module):
    """w x + b, in several disguises."""

    def __init__(self, w: float = 2.0, b: float = 1.0) -> None:
        self.w = mu.Param(w)
        self.b = mu.BatchStat(b)
        self.zoom = [Scale(self.w), Scale(self.w)]

    def __call__(self, x: Any) -> Any:
        return self.w.value * x + self.b.value

    def method(self, x: Any) -> Any:
        return self(x)

    def slope(self, y: Any, t: Any) -> Any:
        return self.w.value * jnp.ones_like(y)


class Scale(mu.Module):
    def __init__(self, w: mu.Param) -> None:
        self.w = w

    def __call__(self, x: Any) -> Any:
        return self.w.value * x


Kept = Callable[[Any], Any]


def affine(make: Callable[[Net], Kept]) -> tuple[Callable[[Net], Kept], Callable[..., Any]]:
    return make, lambda w, b, x: w * x + b


def scaled(make: Callable[[Net], Kept]) -> tuple[Callable[[Net], Kept], Callable[..., Any]]:
    return make, lambda w, b, x: w * x


def kept_scan(net: Net) -> Kept:
    def body(carry: Any, _: Any) -> Any:
        return net(carry), None

    return lambda x: jax.lax.scan(body, x, None, length=1)[0]


def kept_while(net: Net) -> Kept:
    def go_on(carry: Any) -> Any:
        return carry[0] < net.b.value * 0 + 1

    def body(carry: Any) -> Any:
        return carry[0] + 1, net(carry[1])

    return lambda x: jax.lax.while_loop(go_on, body, (jnp.float32(0), x))[1]


def kept_fori(net: Net) -> Kept:
    def body(_: Any, carry: Any) -> Any:
        return net(carry)

    return lambda x: jax.lax.fori_loop(0, 1, body, x)


def kept_cond(net: Net) -> Kept:
    return lambda x: jax.lax.cond(x > -100, net, net.method, x)


def kept_switch(net: Net) -> Kept:
    return lambda x: jax.lax.switch(jnp.int32(x > -100), net.zoom, x)


def kept_jit(net: Net) -> Kept:
    return jax.jit(net.method)


def kept_jit_of_grad(net: Net) -> Kept:
    inner = jax.grad(lambda x: net(x) * x)
    f = jax.jit(lambda x: inner(x))
    return lambda x: f(x / 2)  # 2 w x / 2 + b


def kept_vmap_of_jit(net: Net) -> Kept:
    f = jax.vmap(jax.jit(net))
    return lambda x: f(jnp.stack([x, x]))[1]


def kept_map(net: Net) -> Kept:
    return lambda x: jax.lax.map(net, jnp.stack([x, x]))[0]


def kept_custom_vjp(net: Net) -> Kept:
    """One whose rules read no states that are differentiated: as raw JAX allows for closures."""

    @jax.custom_vjp
    def twice(x: Any) -> Any:
        return 2 * x

    twice.defvjp(lambda x: (twice(x), None), lambda _, g: (2 * g,))
    f = jax.checkpoint(lambda x: twice(net(x)) / 2)
    return lambda x: f(x)


def kept_nested(net: Net) -> Kept:
    inner = jax.checkpoint(net)
    outer = jax.jit(lambda x: jax.lax.cond(x > -100, inner, inner, x))
    return lambda x: outer(x)


def kept_associative_scan(net: Net) -> Kept:
    def combine(a: Any, b: Any) -> Any:
        return a + b * net.w.value / net.w.value

    body = jax.checkpoint(lambda x: jax.lax.associative_scan(combine, jnp.stack([x * net.w.value, net.b.value]))[-1])
    return lambda x: body(x)


def kept_ode(net: Net) -> Kept:
    def slope(y: Any, t: Any) -> Any:
        return net.slope(y, t)

    return lambda x: odeint(slope, net.b.value, jnp.stack([jnp.float32(0), x]))[-1]


def kept_cg(net: Net) -> Kept:
    def matvec(y: Any) -> Any:
        return y / (net.w.value + 1)

    return lambda x: cg(matvec, jnp.ones(2) * x)[0][0] - x + net.b.value


def kept_bicgstab(net: Net) -> Kept:
    def matvec(y: Any) -> Any:
        return y / (net.w.value + 1)

    return lambda x: bicgstab(matvec, jnp.ones(2) * x)[0][1] - x + net.b.value


RAW = {
    "checkpoint of a module": affine(lambda net: jax.checkpoint(net)),
    "checkpoint of a bound method": affine(lambda net: jax.checkpoint(net.method)),
    "checkpoint of a mu.remat": affine(lambda net: jax.checkpoint(mu.remat(net))),
    "jit of a bound method": affine(kept_jit),
    "jit of a partial": affine(lambda net: jax.jit(functools.partial(Net.__call__, net))),
    "jit around grad": affine(kept_jit_of_grad),
    "jit around mu.jit": affine(lambda net: jax.jit(mu.jit(net))),
    "vmap of jit": affine(kept_vmap_of_jit),
    "scan": affine(kept_scan),
    "while_loop": affine(kept_while),
    "fori_loop": affine(kept_fori),
    "cond": affine(kept_cond),
    "switch over layers": scaled(kept_switch),
    "map": affine(kept_map),
    "custom_vjp inside": affine(kept_custom_vjp),
    "nested": affine(kept_nested),
    "associative_scan": affine(kept_associative_scan),
    "odeint": affine(kept_ode),
    "cg": affine(kept_cg),
    "bicgstab": affine(kept_bicgstab),
}
FORWARD_ONLY = {"while_loop", "bicgstab"}
each_raw = pytest.mark.parametrize("name", RAW)
BRIEF = {"checkpoint of a module", "jit around grad", "scan", "switch over layers", "odeint"}
each_raw_in_detail = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in BRIEF else pytest.mark.slow) for name in RAW]
)
# A raw `jax.jit` hides what it names from the search; the states are threaded nevertheless.
pytestmark = pytest.mark.filterwarnings("ignore::mutatis.errors.CapturedStateWarning")


def close(got: Any, wanted: Any) -> None:
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), got, wanted)


def gradient(f: Kept, net: Net, x: Any) -> Any:
    return mu.grad(lambda net: f(x))(net)["w"]


def differentiable(name: str) -> None:
    if name in FORWARD_ONLY:
        pytest.skip("raw JAX has no reverse derivative of it")


@pytest.mark.jax_leaks
@each_raw
@pytest.mark.parametrize("gradient_first", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_value_and_gradient_in_one_program(name: str, gradient_first: bool) -> None:
    differentiable(name)
    make, by_hand = RAW[name]
    net = Net()
    f = make(net)

    @mu.jit
    def step(net: Net, x: Any) -> Any:
        if gradient_first:
            g = gradient(f, net, x)
            return f(x), g, f(x)
        return f(x), gradient(f, net, x), f(x)

    for w in (2.0, 5.0):
        net.w = w
        for x in (3.0, 4.0):
            value = by_hand(w, 1.0, x)
            close(step(net, x), (value, x, value))


@pytest.mark.jax_leaks
@each_raw_in_detail
def test_several_programs_in_turn(name: str) -> None:
    """Each of them finds what the others have left in JAX's caches."""
    differentiable(name)
    make, by_hand = RAW[name]
    net = Net()
    f = make(net)
    train = mu.jit(lambda net, x: gradient(f, net, x))
    evaluate = mu.jit(lambda net, x: f(x))
    lanes = mu.jit(lambda net, xs: mu.vmap(lambda x: f(x))(xs))
    loop = mu.jit(lambda net, xs: mu.for_loop(lambda x: f(x), xs))
    along = mu.jit(lambda net, x: mu.value_and_grad(lambda net: f(x))(net)[0])
    for turn in range(2):
        w = 2.0 + turn
        net.w = w
        xs = jnp.array([3.0, 4.0])
        close(train(net, 3.0), 3.0)
        close(evaluate(net, 3.0), by_hand(w, 1.0, 3.0))
        close(lanes(net, xs), by_hand(w, 1.0, xs))
        close(loop(net, xs), by_hand(w, 1.0, xs))
        close(along(net, 4.0), by_hand(w, 1.0, 4.0))
        close(train(net, jnp.float32(5.0)), 5.0)


@pytest.mark.jax_leaks
@each_raw_in_detail
def test_eager_transforms(name: str) -> None:
    """Without a program around: gradients, lanes and loops of ordinary code, again and again, while the states change."""
    make, by_hand = RAW[name]
    net = Net()
    f = make(net)
    for turn in range(3):
        w, x = 2.0 + turn, 3.0 + turn
        net.w = w
        if name not in FORWARD_ONLY:
            close(gradient(f, net, x), x)
            close(mu.value_and_grad(lambda x: f(x))(x), (by_hand(w, 1.0, x), jax.grad(by_hand, 2)(w, 1.0, x)))
        xs = jnp.array([x, x + 1])
        close(mu.vmap(lambda x: f(x))(xs), by_hand(w, 1.0, xs))
        close(mu.for_loop(lambda x: f(x), xs), by_hand(w, 1.0, xs))


@pytest.mark.jax_leaks
@each_raw_in_detail
def test_states_that_differ_per_lane(name: str) -> None:
    make, by_hand = RAW[name]
    nets = mu.vmap(Net)(jnp.array([2.0, 5.0]), jnp.array([1.0, 0.0]))
    f = make(nets)
    ws, bs = jnp.array([2.0, 5.0]), jnp.array([1.0, 0.0])

    @mu.jit
    def step(nets: Net, x: Any) -> Any:
        return mu.vmap(lambda x: f(x), in_axes=None, axis_size=2, states=[(nets, 0)])(x)

    for turn in range(2):
        nets.w.value = ws + turn
        close(step(nets, jnp.float32(3.0)), by_hand(ws + turn, bs, 3.0))
        eager = mu.vmap(lambda x: f(x), in_axes=None, axis_size=2, states=[(nets, 0)])
        close(eager(jnp.float32(3.0)), by_hand(ws + turn, bs, 3.0))


@pytest.mark.jax_leaks
@each_raw_in_detail
def test_a_nested_program_over_a_kept_function(name: str) -> None:
    """A jitted function inside others: traced once, and right in all of them."""
    make, by_hand = RAW[name]
    net = Net()
    f, traces = make(net), []
    inner = mu.jit(lambda x: (traces.append(1), f(x))[1])
    outer = [mu.jit(lambda x, k=k: inner(x) * k) for k in (1.0, 2.0)]
    for w in (2.0, 3.0):
        net.w = w
        for k in (1.0, 2.0):
            close(outer[int(k) - 1](jnp.float32(3.0)), k * by_hand(w, 1.0, 3.0))
        close(inner(jnp.float32(3.0)), by_hand(w, 1.0, 3.0))
    assert len(traces) == 1


@pytest.mark.jax_leaks
def test_several_threads_over_one_kept_function() -> None:
    net = Net()
    f = jax.checkpoint(net)
    got: dict[int, list[Any]] = {}

    def work(number: int) -> None:
        step = mu.jit(lambda net, x: (gradient(f, net, x), f(x)))
        got[number] = [step(net, jnp.ones(number) * 3.0)[1] for _ in range(3)]
        got[number] += [gradient(lambda x: f(x).sum(), net, jnp.ones(number) * 3.0)]

    def gradient(f: Any, net: Net, x: Any) -> Any:
        return mu.grad(lambda net: jnp.sum(f(x)))(net)["w"]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    for number in range(1, 5):
        close(got[number], [jnp.full(number, 7.0)] * 3 + [3.0 * number])


def test_a_random_stream_under_raw_checkpoint_is_refused() -> None:
    rngs = mu.Rngs(0)
    draw = jax.checkpoint(lambda x: x * jax.random.normal(rngs()))
    with pytest.raises(errors.TraceLevelError, match="written inside a raw JAX transform"):
        mu.jit(draw)(1.0)


def test_a_write_after_a_raw_read_is_refused() -> None:
    net = Net()
    f = jax.checkpoint(net)

    @mu.jit
    def step(x: Any) -> Any:
        y = f(x)
        net.b.value = net.b.value + 1
        return y

    with pytest.raises(errors.TraceLevelError, match=r"\.b` \(BatchStat\) was written after a raw"):
        step(jnp.float32(1.0))


def test_what_a_raw_transform_makes_lives_there() -> None:
    """A model that is built under a raw transform, with raw transforms over it inside."""

    @jax.jit
    def f(w: Any) -> Any:
        net = Net(w, 0.0)
        inner = jax.grad(lambda x: net(x) * x)
        return inner(jnp.float32(3.0)) + mu.grad(lambda net: net(jnp.float32(2.0)))(net)["w"]

    for w in (2.0, 3.0):
        close(f(w), 6 * w + 2)


# -- ordinary code --------------------------------------------------------------------------------------------------


STAGED: dict[str, Callable[[Net], Kept]] = {
    "jit": lambda net: jax.jit(net.method),
    "jit around grad": lambda net: jax.jit(jax.grad(lambda x: net(x) * x)),
    "jit around grad of a module": lambda net: jax.jit(lambda x: jax.grad(lambda x: net(x) * x)(x)),
    "jit around vmap": lambda net: jax.jit(lambda x: jax.vmap(net)(jnp.stack([x, x]))[0]),
    "jit around jvp": lambda net: jax.jit(lambda x: jax.jvp(net, (x,), (x,))[0]),
    "jit around vjp of vmap": lambda net: jax.jit(lambda x: jax.vjp(jax.vmap(net), x[None])[0][0]),
    "jit around mu.grad": lambda net: jax.jit(lambda x: mu.grad(lambda x: net(x))(x)),
    "jit around mu.vmap under grad": lambda net: jax.jit(jax.grad(lambda x: mu.vmap(lambda x: net(x) * x)(x[None])[0])),
    "scan": kept_scan,
    "grad around scan": lambda net: jax.grad(kept_scan(net)),
    "checkpoint": lambda net: jax.checkpoint(net),
    "grad around checkpoint": lambda net: jax.grad(jax.checkpoint(net)),
}


@pytest.mark.parametrize("name", STAGED)
@pytest.mark.parametrize("in_transaction", [False, True])
def test_what_would_go_stale_is_refused(name: str, in_transaction: bool) -> None:
    net = Net()
    f = STAGED[name](net)

    def attempt() -> None:
        with pytest.raises(errors.TraceLevelError, match="was read inside a raw JAX transform"):
            f(jnp.float32(3.0))

    if in_transaction:
        with mu.transaction():
            net.w.value = 3.0
            attempt()
    else:
        attempt()


@pytest.mark.parametrize("name", STAGED)
def test_the_cure_runs(name: str) -> None:
    """`with mu.freeze(model):` around it: right each time, although JAX keeps the function."""
    net, x = Net(), jnp.float32(3.0)
    f = STAGED[name](net)
    got, wanted = [], []
    for turn in range(3):
        net.w, net.b = 2.0 + turn, 1.0 - turn
        with mu.freeze(net):
            got.append(f(x))
        with jax.disable_jit(), mu.freeze(net):
            wanted.append(STAGED[name](net)(x))
    close(got, wanted)
    assert not np.allclose(got[0], got[1]) or "mu.grad" in name


def test_a_solver_in_ordinary_code() -> None:
    net = Net()
    solve = RAW["cg"][0](net)
    for w in (2.0, 3.0):
        net.w = w
        with mu.freeze(net):
            close(solve(3.0), w * 3 + 1)
        with mu.transaction(), mu.freeze(net):
            close(solve(3.0), w * 3 + 1)


def test_freezing_for_good_and_thawing() -> None:
    """A frozen state is a constant of raw JAX; when it may change again, that is no more used."""
    net, traces = Net(), []
    f = jax.jit(lambda x: (traces.append(1), net(x))[1])
    for turn in range(3):
        net.w = 2.0 + turn
        mu.freeze(net)
        for _ in range(3):
            close(f(jnp.float32(3.0)), 3 * (2.0 + turn) + 1)
        assert len(traces) == turn + 1
        mu.thaw(net)
    with pytest.raises(errors.TraceLevelError):
        f(jnp.float32(3.0))


def test_freezing_that_is_rolled_back() -> None:
    w = mu.Param(2.0)
    f = jax.jit(lambda x: w.value * x)
    with pytest.raises(KeyError), mu.transaction():
        mu.freeze(w)
        close(f(1.0), 2.0)
        raise KeyError
    w.value = 3.0
    with mu.freeze(w):
        close(f(1.0), 3.0)


@pytest.mark.jax_leaks
def test_freezing_inside_a_transform_hides_no_read() -> None:
    """The raw transform is entered under the stamp of the transform, whatever is frozen around it."""
    net = Net()
    f = jax.checkpoint(net)

    @mu.jit
    def step(net: Net, x: Any) -> Any:
        with mu.freeze(net):
            value = f(x)
        return value, gradient(f, net, x)

    for w in (2.0, 3.0):
        net.w = w
        close(step(net, 3.0), (3 * w + 1, 3.0))


# -- what it costs ----------------------------------------------------------------------------------------------------


def test_what_reads_no_state_is_traced_once() -> None:
    traces = []

    @jax.jit
    def pure(x: Any) -> Any:
        traces.append(1)
        return jnp.sin(x)

    w = mu.Param(2.0)
    for _ in range(3):
        mu.grad(lambda w: pure(w.value))(w)
        mu.jit(lambda w, x: pure(w.value) + x)(w, 1.0)
        mu.vmap(lambda x: pure(x))(jnp.ones(3))
    pure(w.value)
    assert len(traces) == 2  # inside of transforms, and in ordinary code


def test_a_jitted_function_is_traced_once_for_all_transforms() -> None:
    traces = []
    w = mu.Param(2.0)

    @mu.jit
    def inner(x: Any) -> Any:
        traces.append(1)
        return w.value * x

    one = jnp.float32(1.0)
    inner(one)
    mu.grad(lambda x: inner(x))(one)
    mu.jit(lambda x: inner(x) + 1)(one)
    mu.jit(lambda x: mu.grad(lambda x: inner(x))(x))(one)
    assert len(traces) == 1


@pytest.mark.jax_leaks
def test_no_stamp_is_left_behind() -> None:
    net = Net()
    f = jax.checkpoint(net)
    assert stamps.in_ordinary_code()
    mu.jit(lambda net: gradient(f, net, 3.0))(net)
    with pytest.raises(KeyError):
        mu.grad(lambda net: (f(3.0), {}["missing"]))(net)
    with pytest.raises(ZeroDivisionError), mu.freeze(net):
        _ = 1 / 0
    mu.update(net, {"b": 2.0})
    with mu.transaction():
        net.w = 3.0
    assert _compat.swap_stamp(_compat.NO_STAMP) is _compat.NO_STAMP
