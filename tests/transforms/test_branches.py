"""`mu.cond` and `mu.switch` beside `jax.lax` threaded by hand: the union of writes, and nothing else."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import errors


class Net(mu.Module):
    def __init__(self) -> None:
        self.a = mu.Hidden(jnp.float32(1))
        self.b = mu.Hidden(jnp.float32(2))
        self.n = mu.Variable(0)
        self.w = mu.Param(jnp.float32(3))


def start() -> dict[str, Any]:
    return {"a": jnp.float32(1), "b": jnp.float32(2), "n": jnp.int32(0), "w": jnp.float32(3)}


def check(net: Net, state: dict[str, Any]) -> None:
    for name, value in state.items():
        np.testing.assert_allclose(getattr(net, name).value, value, rtol=1e-6, err_msg=name)


def write_a(net: Net, x: Any) -> Any:
    net.a.value = net.a + net.w.value * x
    return net.a.value


def write_b(net: Net, x: Any) -> Any:
    net.b.value = net.b * x + net.a.value
    net.n += 1
    return net.b.value


def write_nothing(net: Net, x: Any) -> Any:
    return net.w.value * x


def hand_a(s: Any, x: Any) -> Any:
    a = s["a"] + s["w"] * x
    return {**s, "a": a}, a


def hand_b(s: Any, x: Any) -> Any:
    b = s["b"] * x + s["a"]
    return {**s, "b": b, "n": s["n"] + 1}, b


def hand_nothing(s: Any, x: Any) -> Any:
    return s, s["w"] * x


MINE, HANDS = [write_a, write_b, write_nothing], [hand_a, hand_b, hand_nothing]
compiled_or_not = pytest.mark.parametrize("compiled", [False, True])


@compiled_or_not
@pytest.mark.parametrize("form", ["argument", "closure"])
@pytest.mark.parametrize("pred", [True, False, jnp.bool_(True), np.bool_(False), 1, 0])
@pytest.mark.parametrize("pair", [(0, 1), (1, 2), (2, 0)])
def test_cond(pair: tuple[int, int], pred: Any, form: str, compiled: bool) -> None:
    net, state = Net(), start()
    left, right = pair

    def run(pred: Any) -> Any:
        if form == "argument":
            return mu.cond(pred, MINE[left], MINE[right], net, 2.0)
        return mu.cond(pred, lambda x: MINE[left](net, x), lambda x: MINE[right](net, x), 2.0)

    for _ in range(2):
        state, expected = jax.lax.cond(pred, HANDS[left], HANDS[right], state, 2.0)
        np.testing.assert_allclose((mu.jit(run) if compiled else run)(pred), expected, rtol=1e-6)
        check(net, state)


@compiled_or_not
@pytest.mark.parametrize("index", [-1, 0, 1, 2, 3, jnp.int32(1), np.int64(2)])
def test_switch(index: Any, compiled: bool) -> None:
    net = Net()
    run = lambda i: mu.switch(i, MINE, net, 2.0)  # noqa: E731
    state, expected = jax.lax.switch(index, HANDS, start(), 2.0)
    np.testing.assert_allclose((mu.jit(run) if compiled else run)(index), expected, rtol=1e-6)
    check(net, state)


def test_the_operand_keyword() -> None:
    n = mu.Variable(0)
    assert float(mu.cond(True, lambda x: x * 2, lambda x: x, operand=3.0)) == 6
    assert mu.cond(True, lambda x: x, lambda x: x, operand=None) is None
    assert float(mu.switch(1, [lambda x: x, lambda x: (n.set(5), x * 3)[1]], operand=2.0)) == 6
    assert int(n) == 5


def test_one_branch_in_a_switch() -> None:
    n = mu.Variable(0)
    mu.switch(7, [lambda: n.set(3)])
    assert int(n) == 3


def test_only_the_union_of_writes_comes_back() -> None:
    net = Net()
    jaxpr = mu.make_jaxpr(lambda net: mu.cond(True, write_a, write_nothing, net, 2.0))(net)
    (equation,) = [e for e in jaxpr.eqns if e.primitive.name == "cond"]
    assert len(equation.outvars) == 2, "the result and a"
    jaxpr = mu.make_jaxpr(lambda net: mu.switch(0, MINE, net, 2.0))(net)
    (equation,) = [e for e in jaxpr.eqns if e.primitive.name == "cond"]
    assert len(equation.outvars) == 4


@compiled_or_not
def test_gradients_go_through_the_branch_that_is_taken(compiled: bool) -> None:
    for pred in (True, False):
        net = Net()
        f = mu.grad(lambda p: mu.cond(pred, write_a, write_b, net, p))
        expected = jax.grad(lambda p: jax.lax.cond(pred, hand_a, hand_b, start(), p)[1])(2.0)
        np.testing.assert_allclose((mu.jit(f) if compiled else f)(2.0), expected)
        net = Net()
        grads = mu.grad(lambda net: mu.cond(pred, write_a, write_b, net, 2.0))(net)
        expected = jax.grad(lambda w: jax.lax.cond(pred, hand_a, hand_b, {**start(), "w": w}, 2.0)[1])(jnp.float32(3))
        np.testing.assert_allclose(grads["w"], expected)


def test_a_predicate_per_lane_with_split_states() -> None:
    net = mu.vmap(lambda _: Net())(jnp.arange(4))
    xs = jnp.arange(4.0)
    out = mu.vmap(lambda net, x: mu.cond(x > 1, write_a, write_b, net, x))(net, xs)

    def raw(x: Any) -> Any:
        return jax.lax.cond(x > 1, hand_a, hand_b, start(), x)

    state, expected = jax.vmap(raw)(xs)
    np.testing.assert_allclose(out, expected)
    check(net, state)


def test_a_predicate_per_lane_makes_writes_differ() -> None:
    net = Net()
    with pytest.raises(errors.LaneError, match=r"`net\.n`"):
        mu.vmap(lambda x: mu.cond(x > 1, lambda: net.n.set(net.n + 1), lambda: None))(jnp.arange(4.0))
    assert int(net.n) == 0


def test_nodes_among_operands_and_results() -> None:
    net = Net()
    out = mu.cond(True, lambda t: (t["net"], t["x"]), lambda t: (t["net"], t["x"] + 1), {"net": net, "x": 1.0})
    assert out[0] is net
    with pytest.raises(errors.StructureError, match="return different structures"):
        mu.cond(True, lambda: net.a, lambda: net.b)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (lambda: 1.0, lambda: (1.0, 2.0)),
        (lambda: None, lambda: 1.0),
        (lambda: {"a": 1}, lambda: {"b": 1}),
        (lambda: jnp.zeros(2), lambda: jnp.zeros(3)),
        (lambda: jnp.int32(0), lambda: jnp.float32(0)),
    ],
)
def test_results_have_to_agree(left: Any, right: Any) -> None:
    n = mu.Variable(0)

    def add() -> Any:
        n.value += 1
        return left()

    for pred in (True, False):
        with pytest.raises((errors.StructureError, TypeError)):
            mu.cond(pred, add, right)
        with pytest.raises((errors.StructureError, TypeError)):
            mu.switch(int(pred), [add, right])
    assert int(n) == 0


@pytest.mark.parametrize("bad", [1.5, jnp.zeros(2), "yes", None])
def test_what_is_no_predicate_is_refused_as_in_jax(bad: Any) -> None:
    n = mu.Variable(0)
    outcomes = []
    for cond in (jax.lax.cond, mu.cond):
        try:
            cond(bad, lambda: 1, lambda: 2)
        except (TypeError, ValueError) as problem:
            outcomes.append(type(problem))
        else:
            outcomes.append(None)
    theirs, ours = outcomes
    assert ours is theirs or (ours is not None and theirs is not None and issubclass(ours, theirs))  # or says more
    assert int(n) == 0


@compiled_or_not
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m, "new", mu.Cache(0)), r"`m\.new` was changed in a branch"),
        (lambda m: m.parts.append(1), r"`m\.parts` was changed in a branch"),
        (lambda m: m.late(jnp.ones(2)), r"state `m\.late\.kernel` \(Param\) was created in a branch"),
    ],
)
def test_structure_does_not_change_in_a_branch(change: Any, message: str, compiled: bool) -> None:
    m = mu.Module()
    m.n, m.parts, m.late = mu.Variable(0), [], mu.nn.Linear(None, 2, rngs=mu.Rngs(0))

    def branch() -> None:
        m.n += 1
        change(m)

    def run() -> None:
        mu.cond(False, branch, lambda: None)

    with pytest.raises(errors.StructureError, match=message):
        (mu.jit(run) if compiled else run)()
    assert m.parts == []
    assert m.late.kernel.deferred
    assert not hasattr(m, "new")
    assert int(m.n) == 0


def test_each_branch_is_traced_once(traces: Any) -> None:
    net = Net()
    branches = [traces.count(f) for f in MINE]
    run = mu.jit(lambda i: mu.switch(i, branches, net, 2.0))
    for i in range(3):
        run(i)
    assert traces.total == 3
    nested = mu.jit(lambda i: mu.cond(i > 0, lambda: mu.switch(i, branches, net, 2.0), lambda: 0.0))
    nested(1)
    assert traces.total == 6


def test_eager_branches_compile_once(traces: Any) -> None:
    net = Net()
    left, right = traces.count(write_a), traces.count(write_b)
    mu.cond(True, left, right, net, 2.0)
    with traces.compilations() as again:
        for pred in (True, False, True):
            mu.cond(pred, left, right, net, 2.0)
    assert traces.total == 2
    assert again.count == 0


def test_random_draws_in_branches() -> None:
    rngs = mu.Rngs(0)
    twin = mu.Rngs(0)
    out = [float(mu.cond(p, lambda: jax.random.uniform(rngs()), lambda: jnp.float32(0))) for p in (True, False, True)]
    assert out[1] == 0
    assert out[0] == float(jax.random.uniform(twin()))
    assert out[2] == float(jax.random.uniform(twin()))
