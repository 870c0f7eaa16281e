"""`mu.grad` and `mu.value_and_grad` beside `jax.grad` of the same thing threaded by hand."""

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
    def __init__(self) -> None:
        self.w = mu.Param(jnp.array([1.0, -2.0, 3.0]))
        self.layers = [mu.Param(jnp.float32(0.5)), {"b": mu.Param(jnp.float32(-1))}]
        self.mean = mu.BatchStat(jnp.float32(2))
        self.calls = mu.Variable(0)
        self.steps = mu.Param(jnp.int32(1))

    def __call__(self, x: Any) -> Any:
        y = jnp.sum(jnp.tanh(self.w.value * x)) * self.layers[0] + self.layers[1]["b"] * self.mean.value
        self.mean.value = 0.5 * self.mean.value + 0.5 * y
        self.calls += 1
        return y * y


def hand(p: dict[str, Any], x: Any) -> Any:
    y = jnp.sum(jnp.tanh(p["w"] * x)) * p["a"] + p["b"] * p["mean"]
    return y * y, {"mean": 0.5 * p["mean"] + 0.5 * y, "calls": p["calls"] + 1}


def values() -> dict[str, Any]:
    return {
        "w": jnp.array([1.0, -2.0, 3.0]),
        "a": jnp.float32(0.5),
        "b": jnp.float32(-1),
        "mean": jnp.float32(2),
        "calls": jnp.int32(0),
    }


def hand_grad(names: list[str], x: Any = 0.7) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The value, the gradients by name and the new statistics."""
    p = values()

    def f(part: dict[str, Any]) -> Any:
        return hand({**p, **part}, part.get("x", x))

    part = {name: x if name == "x" else p[name] for name in names}
    (value, new), grads = jax.value_and_grad(f, has_aux=True)(part)
    return value, grads, new


PATHS = {"w": ("w",), "a": ("layers", 0), "b": ("layers", 1, "b"), "mean": ("mean",)}


def check(net: Net, value: Any, grads: Any, names: list[str]) -> None:
    expected, hand_grads, new = hand_grad(names)
    if value is not None:
        np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert isinstance(grads, mu.State)
    assert set(grads) == {PATHS[name] for name in names}
    for name in names:
        np.testing.assert_allclose(grads[PATHS[name]], hand_grads[name], rtol=1e-5)
    np.testing.assert_allclose(net.mean.value, new["mean"], rtol=1e-5)
    assert int(net.calls) == 1


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("form", ["argument", "of", "of, argument of another function", "module itself", "method"])
def test_gradients_of_a_model(form: str, compiled: bool) -> None:
    net = Net()
    around = mu.jit if compiled else (lambda f: f)
    if form == "argument":
        value, grads = around(mu.value_and_grad(lambda m, x: m(x)))(net, 0.7)
    elif form == "of":
        value, grads = around(mu.value_and_grad(lambda x: net(x), of=net))(0.7)
    elif form == "of, argument of another function":
        value, grads = around(lambda m: mu.value_and_grad(lambda: m(0.7), of=m)())(net)
    elif form == "module itself":
        value, grads = around(mu.value_and_grad(net, of=net))(0.7)
    else:
        value, grads = around(mu.value_and_grad(net.__call__, of=net))(0.7)
    check(net, value, grads, ["w", "a", "b"])


@pytest.mark.parametrize(
    ("wrt", "names"),
    [
        (mu.Param, ["w", "a", "b"]),
        ("batch_stats", ["mean"]),
        (mu.Variable, ["w", "a", "b", "mean"]),
        (..., ["w", "a", "b", "mean"]),
        (mu.PathContains("layers"), ["a", "b"]),
        (lambda path, v: path == ("w",), ["w"]),
    ],
)
def test_wrt(wrt: Any, names: list[str]) -> None:
    for run in (lambda m: mu.grad(lambda m: m(0.7), wrt=wrt)(m), lambda m: mu.grad(lambda: m(0.7), of=m, wrt=wrt)()):
        net = Net()
        check(net, None, run(net), names)


def test_a_gradient_has_the_structure_of_its_argument() -> None:
    net = Net()

    def loss(batch: Any, scale: Any) -> Any:
        return batch["models"][0](batch["x"]) * scale

    grads = mu.grad(loss)({"models": [net], "x": 0.7}, 1.0)
    assert set(grads) == {"models", "x"}
    _, expected, _ = hand_grad(["w", "x"])
    np.testing.assert_allclose(grads["models"][0]["w"], expected["w"], rtol=1e-5)
    np.testing.assert_allclose(grads["x"], expected["x"], rtol=1e-5)


@pytest.mark.parametrize("argnums", [(0, 1), [0, 1], (-2, 1), (1, 0)])
def test_several_arguments(argnums: Any) -> None:
    net = Net()
    grads = mu.grad(lambda m, x: m(x), argnums=argnums)(net, 0.7)
    assert isinstance(grads, tuple)
    by_number = dict(zip(argnums, grads, strict=True))
    by_model = by_number.get(0, by_number.get(-2))
    _, expected, _ = hand_grad(["w", "x"])
    np.testing.assert_allclose(by_model["w"], expected["w"], rtol=1e-5)
    np.testing.assert_allclose(by_number[1], expected["x"], rtol=1e-5)


@pytest.mark.parametrize("argnums", [1, -1])
def test_another_argument_than_the_first(argnums: int) -> None:
    net = Net()
    _, expected, _ = hand_grad(["x"])
    np.testing.assert_allclose(mu.grad(lambda m, x: m(x), argnums)(net, 0.7), expected["x"], rtol=1e-5)
    assert int(net.calls) == 1


def test_a_filter_for_each_argument() -> None:
    a, b = Net(), Net()
    first, second = mu.grad(lambda a, b: a(0.7) * b(0.7), argnums=(0, 1), wrt=("batch_stats", mu.PathContains("w")))(
        a, b
    )
    assert set(first) == {("mean",)}
    assert set(second) == {("w",)}


def test_of_and_arguments_together() -> None:
    net = Net()
    of, x = mu.grad(lambda x: net(x), argnums=0, of=net)(0.7)
    _, expected, _ = hand_grad(["w", "a", "b", "x"])
    np.testing.assert_allclose(of["w"], expected["w"], rtol=1e-5)
    np.testing.assert_allclose(x, expected["x"], rtol=1e-5)
    value, (of, xs) = mu.value_and_grad(lambda x, y: net(x) * y, argnums=(0, 1), of=net)(0.7, 1.0)
    assert len(xs) == 2
    np.testing.assert_allclose(value, xs[1], rtol=1e-5)


@pytest.mark.parametrize("of", ["tuple", "variables", "one variable", "dict", "submodule"])
def test_of_anything(of: str) -> None:
    net = Net()
    given: Any = {
        "tuple": (net, net.mean),
        "variables": (net.w, net.mean),
        "one variable": net.w,
        "dict": {"net": net},
        "submodule": net.layers,
    }[of]
    grads = mu.grad(lambda: net(0.7), of=given, wrt=...)()
    _, expected, _ = hand_grad(["w", "a", "b", "mean"])
    if of == "tuple":
        np.testing.assert_allclose(grads[0]["w"], expected["w"], rtol=1e-5)
        assert len(grads[1]) == 0, "at its first place only"
    elif of == "variables":
        np.testing.assert_allclose(grads[0][()], expected["w"], rtol=1e-5)
        np.testing.assert_allclose(grads[1][()], expected["mean"], rtol=1e-5)
    elif of == "one variable":
        np.testing.assert_allclose(grads[()], expected["w"], rtol=1e-5)
    elif of == "dict":
        np.testing.assert_allclose(grads["net"]["w"], expected["w"], rtol=1e-5)
    else:
        np.testing.assert_allclose(grads[0][()], expected["a"], rtol=1e-5)
        np.testing.assert_allclose(grads[1]["b"][()], expected["b"], rtol=1e-5)
    assert int(net.calls) == 1


def test_of_something_the_function_does_not_use() -> None:
    net, other = Net(), Net()
    grads = mu.grad(lambda: net(0.7), of=other)()
    assert not np.asarray(grads["w"]).any()
    assert int(other.calls) == 0


@pytest.mark.parametrize("of", [lambda m: mu.state(m), lambda m: m.w.value, lambda m: [], lambda m: {}, lambda m: 3])
def test_of_what_is_no_node(of: Any) -> None:
    net = Net()
    with pytest.raises(errors.MutatisError) as caught:
        mu.grad(lambda x: net(x), of=of(net))(0.7)
    assert caught.value.cure
    assert int(net.calls) == 0


def test_of_and_argument_are_the_same_object() -> None:
    net = Net()
    of, by_argument = mu.grad(lambda m: m(0.7), argnums=0, of=net)(net)
    _, expected, _ = hand_grad(["w"])
    np.testing.assert_allclose(of["w"], expected["w"], rtol=1e-5)
    assert len(by_argument) == 0


def test_a_shared_state_has_one_entry_at_its_first_place() -> None:
    net = Net()
    first, second = mu.grad(lambda a, b: a(0.7) + jnp.sum(b.w.value), argnums=(0, 1))(net, net)
    _, expected, _ = hand_grad(["w"])
    np.testing.assert_allclose(first["w"], expected["w"] + 1, rtol=1e-5)
    assert len(second) == 0


def test_an_auxiliary_result() -> None:
    net = Net()

    def loss(m: Net, x: Any) -> Any:
        return m(x), {"m": m, "x": x, "w": m.w.value, "name": None}

    grads, aux = mu.grad(loss, has_aux=True)(net, 0.7)
    assert aux["m"] is net
    assert not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((grads, aux)))
    (value, aux), grads = mu.value_and_grad(loss, has_aux=True)(Net(), 0.7)
    expected, _, _ = hand_grad(["w"])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert aux["name"] is None


def test_frozen_and_integer_states_are_left_out() -> None:
    net = Net()
    with mu.freeze(net.layers):
        grads = mu.grad(lambda m: m(0.7))(net)
    assert set(grads) == {("w",)}
    _, expected, _ = hand_grad(["w"])
    np.testing.assert_allclose(grads["w"], expected["w"], rtol=1e-5)


def test_pytree_states() -> None:
    v = mu.Param({"a": jnp.ones(2), "b": [jnp.float32(3)]})
    grads = mu.grad(lambda v: jnp.sum(v.value["a"]) * v.value["b"][0])(v)[()]
    np.testing.assert_array_equal(grads["a"], [3, 3])
    assert float(grads["b"][0]) == 2


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("compiled", [False, True])
def test_higher_derivatives(order: int, compiled: bool) -> None:
    w = mu.Param(jnp.float32(0.3))
    n = mu.Variable(0)

    def f(x: Any) -> Any:
        n.value += 1
        return jnp.sin(w.value * x) * x

    ours: Any = f
    raw: Any = lambda x: jnp.sin(jnp.float32(0.3) * x) * x  # noqa: E731
    for _ in range(order):
        ours, raw = mu.grad(ours), jax.grad(raw)
    np.testing.assert_allclose((mu.jit(ours) if compiled else ours)(0.7), raw(0.7), rtol=1e-5)
    assert int(n) == 1


def test_a_gradient_of_a_gradient_of_states() -> None:
    w = mu.Param(jnp.array([1.0, 2.0]))

    def penalty() -> Any:
        grads = mu.grad(lambda: jnp.sum(w.value**3), of=w)()
        return jnp.sum(grads[()] ** 2)

    def raw(w: Any) -> Any:
        return jnp.sum(jax.grad(lambda w: jnp.sum(w**3))(w) ** 2)

    np.testing.assert_allclose(mu.grad(penalty, of=w)()[()], jax.grad(raw)(w.value), rtol=1e-5)


def test_writes_inside_carry_gradients() -> None:
    """A state that is written and read again inside is differentiated through."""
    memory = mu.Hidden(jnp.float32(0))

    def f(x: Any) -> Any:
        for _ in range(3):
            memory.value = memory.value * 0.5 + x * x
        return memory.value

    def raw(x: Any) -> Any:
        m = jnp.float32(0)
        for _ in range(3):
            m = m * 0.5 + x * x
        return m

    np.testing.assert_allclose(mu.grad(f)(1.5), jax.grad(raw)(1.5), rtol=1e-6)
    np.testing.assert_allclose(memory.value, raw(1.5), rtol=1e-6)


def test_one_step_of_truncated_backpropagation() -> None:
    """What was written before the call is a constant, or an input if it is asked for."""
    memory = mu.Hidden(jnp.float32(2))
    grads = mu.grad(lambda x: memory.value * x, argnums=0, of=memory, wrt=mu.Hidden)(3.0)
    assert float(grads[0][()]) == 3
    assert float(grads[1]) == 2


def test_holomorphic_and_allow_int() -> None:
    v = mu.Param(jnp.complex64(1 + 2j))
    grads = mu.grad(lambda v: v.value**2, holomorphic=True)(v)
    assert complex(grads[()]) == complex(jax.grad(lambda x: x**2, holomorphic=True)(jnp.complex64(1 + 2j)))
    assert mu.grad(lambda x: 1.0, allow_int=True)(3).dtype == jax.dtypes.float0


@pytest.mark.parametrize("form", ["decorator", "decorator with options", "partial", "keyword"])
def test_forms(form: str) -> None:
    net = Net()

    def loss(m: Any, x: Any = 0.7) -> Any:
        return m(x)

    if form == "decorator":
        grads = mu.grad(loss)(net)
    elif form == "decorator with options":
        grads = mu.grad(wrt=mu.Param)(loss)(net)
    elif form == "partial":
        grads = mu.grad(functools.partial(loss, x=0.7))(net)
    else:
        grads = mu.grad(loss)(net, x=0.7)
    check(net, None, grads, ["w", "a", "b"])


@pytest.mark.parametrize(
    "call",
    [
        lambda net: mu.grad(lambda m: (m(0.7), m.w.value)[1])(net),  # no scalar
        lambda net: mu.grad(lambda m: (m(0.7), None)[1])(net),
        lambda net: mu.grad(lambda m: (m(0.7), 1.0))(net),
        lambda net: mu.grad(lambda m: {"loss": m(0.7)})(net),
        lambda net: mu.grad(lambda m, x: m(x), argnums=5)(net, 0.7),
        lambda net: mu.grad(lambda m, x: m(x), argnums=-3)(net, 0.7),
        lambda net: mu.grad(lambda m, x: m(x), argnums=(0, 2))(net, 0.7),
        lambda net: mu.grad(lambda x: net(x))(3),  # an integer
        lambda net: mu.grad(lambda m: m(0.7), has_aux=True)(net),
        lambda net: mu.grad(lambda m: (m(0.7), 1.0, 2.0), has_aux=True)(net),
        lambda net: mu.grad(lambda m: ((m(0.7), 1.0), 2.0), has_aux=True)(net),
        lambda net: mu.grad(lambda: net(0.7))(),
        lambda net: mu.grad(lambda m: m(0.7))(m=net),
    ],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_bad_calls(call: Any, compiled: bool) -> None:
    net = Net()
    before = mu.state(net)
    with pytest.raises((TypeError, ValueError)):
        (mu.jit(call) if compiled else call)(net)
    assert mu.state(net) == before


def test_a_deferred_state_cannot_be_differentiated() -> None:
    net = mu.Module()
    net.w = mu.Param(init=lambda: jnp.ones(2))
    with pytest.raises(errors.DeferredStateError, match=r"`args\[0\]\.w` cannot be differentiated|w` cannot be diff"):
        mu.grad(lambda m: jnp.sum(m.w.value))(net)
    assert net.w.deferred
    net.w.get()
    np.testing.assert_array_equal(mu.grad(lambda m: jnp.sum(m.w.value))(net)["w"], [1, 1])


def test_the_program_is_the_one_threaded_by_hand() -> None:
    net = Net()
    mine = mu.make_jaxpr(lambda m: mu.value_and_grad(lambda m: m(0.7))(m))(net)

    def raw(p: Any) -> Any:
        part = {k: p[k] for k in ("w", "a", "b")}
        return jax.value_and_grad(lambda q: hand({**p, **q}, 0.7), has_aux=True)(part)

    theirs = jax.make_jaxpr(raw)(values())
    assert len(mine.eqns) <= len(theirs.eqns)
    assert len(mine.out_avals) == len(theirs.out_avals)


def test_the_function_runs_once_per_call(traces: Any) -> None:
    net = Net()
    f = mu.grad(traces.count(lambda m: m(0.7)))
    for i in range(3):
        f(net)
        assert traces.total == i + 1
    mu.jit(f)(net)
    assert traces.total == 4
