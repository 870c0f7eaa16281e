"""`mu.vmap` beside `jax.vmap` threaded by hand: split, shared and created states, streams, nesting."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import errors
from tests.nets import Running


class Net(Running):
    def __init__(self, scale: Any = 1.0) -> None:
        super().__init__(jnp.arange(3.0) * scale)


def hand(s: dict[str, Any], x: Any) -> Any:
    y = jnp.sum(s["w"] * x)
    return y, {"w": s["w"], "mean": 0.5 * s["mean"] + y, "calls": s["calls"] + 1}


def stacked(n: int = 4) -> tuple[Net, dict[str, Any]]:
    scales = jnp.arange(1.0, n + 1)
    net = mu.vmap(Net)(scales)
    return net, {"w": jnp.arange(3.0)[None] * scales[:, None], "mean": jnp.zeros(n), "calls": jnp.zeros(n, jnp.int32)}


def check(net: Net, state: dict[str, Any]) -> None:
    for name, value in state.items():
        np.testing.assert_allclose(getattr(net, name).value, value, rtol=1e-5, err_msg=name)
        assert getattr(net, name).dtype == value.dtype


XS = jnp.linspace(-1, 1, 4)


def test_states_made_inside_have_axis_0_outside() -> None:
    net, state = stacked()
    assert type(net) is Net
    check(net, state)
    assert not net.w.frozen


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("axes", [(0, 0), (0, None), 0])
def test_an_ensemble(axes: Any, compiled: bool) -> None:
    net, state = stacked()
    xs = XS[0] if axes == (0, None) else XS
    f = mu.vmap(lambda m, x: m(x), in_axes=axes)
    f = mu.jit(f) if compiled else f
    for _ in range(2):
        expected, state = jax.vmap(hand, in_axes=(0, None) if axes == (0, None) else (0, 0))(state, xs)
        np.testing.assert_allclose(f(net, xs), expected, rtol=1e-5)
    check(net, state)


@pytest.mark.parametrize("how", ["in_axes", "states", "pairs", "dict"])
def test_shared_weights_and_split_statistics(how: str) -> None:
    net = Net()
    net.mean.value = jnp.zeros(4)
    axes = mu.StateAxes({mu.BatchStat: 0, ...: None})
    if how == "in_axes":
        out = mu.vmap(lambda m, x: m(x), in_axes=(axes, 0))(net, XS)
    elif how == "states":
        out = mu.vmap(lambda x: net(x), states=axes)(XS)
    elif how == "pairs":
        out = mu.vmap(lambda x: net(x), states=[(net, axes)])(XS)
    else:
        out = mu.vmap(lambda x: net(x), states={net.mean: 0})(XS)
    np.testing.assert_allclose(out, 3 * XS, rtol=1e-6)
    np.testing.assert_allclose(net.mean, 3 * XS, rtol=1e-6)
    assert int(net.calls) == 1, "the same in all lanes"
    np.testing.assert_array_equal(net.w, [0, 1, 2])


@pytest.mark.parametrize("form", ["argument", "closure"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_value_per_lane_in_a_shared_state_is_refused(form: str, compiled: bool) -> None:
    net = Net()
    f: Any = (
        (lambda: mu.vmap(lambda m, x: m(x), in_axes=(None, 0))(net, XS))
        if form == "argument"
        else (lambda: mu.vmap(lambda x: net(x))(XS))
    )
    before = mu.state(net)
    with pytest.raises(errors.LaneError) as caught:
        (mu.jit(f) if compiled else f)()
    assert caught.value.path in ("m.mean", "net.mean")
    assert mu.state(net) == before


def test_a_reduced_value_in_a_shared_state() -> None:
    net = Net()

    def f(x: Any) -> Any:
        y = jnp.sum(net.w.value * x)
        net.mean.value = jax.lax.pmean(y, "lanes")
        return y

    mu.vmap(f, axis_name="lanes")(XS)
    np.testing.assert_allclose(net.mean, (3 * XS).mean(), atol=1e-6)


def test_a_lane_value_that_is_overwritten_is_fine() -> None:
    v = mu.Variable(0.0)

    def f(x: Any) -> Any:
        v.value = x
        y = v.value * 2
        v.value = jnp.float32(7)
        return y

    np.testing.assert_allclose(mu.vmap(f)(XS), XS * 2)
    assert float(v) == 7


@pytest.mark.parametrize(("in_axes", "out_axes"), [(0, 0), (1, 0), (-1, 1), (1, -1)])
def test_array_axes(in_axes: int, out_axes: int) -> None:
    w = mu.Param(jnp.float32(2))
    x = jnp.arange(24.0).reshape(2, 3, 4)
    f = lambda x: w * x  # noqa: E731
    raw = jax.vmap(lambda x: 2 * x, in_axes, out_axes)(x)
    np.testing.assert_array_equal(mu.vmap(f, in_axes, out_axes)(x), raw)


def test_axes_by_prefix() -> None:
    net, _ = stacked()
    tree = {"net": net, "x": XS, "more": [jnp.ones((2, 4)), jnp.float32(1)]}
    axes = ({"net": 0, "x": 0, "more": [1, None]},)
    out = mu.vmap(lambda t: t["net"](t["x"]) * t["more"][0].sum() * t["more"][1], in_axes=axes)(tree)
    np.testing.assert_allclose(out, 2 * 3 * jnp.arange(1.0, 5.0) * XS, rtol=1e-5)


def test_out_axes_by_prefix_and_none() -> None:
    w = mu.Param(jnp.float32(2))
    out = mu.vmap(lambda x: {"a": x * w.value, "b": w.value}, out_axes={"a": 0, "b": None})(XS)
    np.testing.assert_allclose(out["a"], 2 * XS)
    assert out["b"].shape == ()
    with pytest.raises(ValueError, match="out_axes"):
        mu.vmap(lambda x: x * w.value, out_axes=None)(XS)


def test_keyword_arguments_are_mapped() -> None:
    net, _ = stacked()
    np.testing.assert_allclose(mu.vmap(lambda m, *, x: m(x))(net, x=XS), 3 * jnp.arange(1.0, 5) * XS, rtol=1e-5)


def test_a_model_and_its_optimizer_state_as_a_pair() -> None:
    net, _ = stacked()
    out = mu.vmap(lambda pair, x: pair[0](x) + pair[1].value, in_axes=((0, None), 0))((net, mu.Param(10.0)), XS)
    np.testing.assert_allclose(out, 3 * jnp.arange(1.0, 5) * XS + 10, rtol=1e-5)


def test_nodes_returned_from_lanes() -> None:
    net, state = stacked()
    out = mu.vmap(lambda m, x: (m, m(x), m.w))(net, XS)
    assert out[0] is net
    assert out[2] is net.w
    _, state = jax.vmap(hand)(state, XS)
    check(net, state)


def test_tied_states_are_split_once() -> None:
    net, _ = stacked()
    net.again = [net.w]
    mu.vmap(lambda m: m.again[0].set(m.w + 1))(net)
    assert net.w.shape == (4, 3)
    np.testing.assert_allclose(net.w[0], [1, 2, 3])


def test_attributes_changed_in_lanes() -> None:
    net, _ = stacked()

    def f(m: Net) -> None:
        m.flag = True
        m.extra = mu.Cache(m.w.value.sum())

    mu.vmap(f)(net)
    assert net.flag is True
    np.testing.assert_allclose(net.extra, 3 * jnp.arange(1.0, 5))
    mu.vmap(lambda m: m.extra.set(m.extra + 1))(net)
    np.testing.assert_allclose(net.extra, 3 * jnp.arange(1.0, 5) + 1)


def test_deferred_states_of_an_ensemble() -> None:
    net = mu.Module()
    net.h = mu.Hidden(init=lambda: jnp.zeros(2))

    def f(m: Any, x: Any) -> Any:
        m.h.value = m.h + x
        return m.h.value

    try:
        out = mu.vmap(f)(net, XS)
    except errors.MutatisError:
        assert net.h.deferred
        return
    assert out.shape == (4, 2)
    assert net.h.shape == (4, 2)
    np.testing.assert_allclose(net.h, jnp.broadcast_to(XS[:, None], (4, 2)))


def test_nested() -> None:
    net = mu.vmap(mu.vmap(Net))(jnp.arange(1.0, 7).reshape(2, 3))
    assert net.w.shape == (2, 3, 3)
    xs = jnp.linspace(-1, 1, 6).reshape(2, 3)
    out = mu.vmap(mu.vmap(lambda m, x: m(x)))(net, xs)
    np.testing.assert_allclose(out, 3 * jnp.arange(1.0, 7).reshape(2, 3) * xs, rtol=1e-5)
    np.testing.assert_array_equal(net.calls, np.ones((2, 3)))
    out = mu.vmap(mu.vmap(lambda m, x: m(x)), in_axes=(1, 1), out_axes=1)(net, xs)
    np.testing.assert_allclose(out, 3 * jnp.arange(1.0, 7).reshape(2, 3) * xs, rtol=1e-5)
    assert net.w.shape == (2, 3, 3)
    np.testing.assert_array_equal(net.calls, np.full((2, 3), 2))


def test_shared_inside_split_outside() -> None:
    net, state = stacked(2)
    xs = jnp.arange(6.0).reshape(2, 3)
    out = mu.vmap(lambda m, row: mu.vmap(lambda x: jnp.sum(m.w.value * x))(row))(net, xs)
    np.testing.assert_allclose(out, state["w"].sum(1)[:, None] * xs)
    with pytest.raises(errors.LaneError):
        mu.vmap(lambda m, row: mu.vmap(lambda x: m(x))(row))(net, xs)
    check(net, state)
    mu.vmap(lambda m, row: mu.vmap(lambda x: m.mean.set(jax.lax.pmean(x, "i")), axis_name="i")(row))(net, xs)
    np.testing.assert_allclose(net.mean, xs.mean(1))


@pytest.mark.parametrize("order", ["grad of vmap", "vmap of grad", "jit of both"])
def test_with_gradients(order: str) -> None:
    net, state = stacked()

    def raw(w: Any, x: Any) -> Any:
        return jnp.sum(w * x) ** 2

    if order == "grad of vmap":
        grads = mu.grad(lambda m: jnp.sum(mu.vmap(lambda m, x: m(x) ** 2)(m, XS)))(net)
    elif order == "vmap of grad":
        grads = mu.vmap(mu.grad(lambda m, x: m(x) ** 2))(net, XS)
    else:
        grads = mu.jit(mu.vmap(mu.grad(lambda m, x: m(x) ** 2)))(net, XS)
    np.testing.assert_allclose(grads["w"], jax.vmap(jax.grad(raw))(state["w"], XS), rtol=1e-5)
    np.testing.assert_array_equal(net.calls, [1, 1, 1, 1])


def test_a_scan_in_lanes() -> None:
    net, state = stacked()
    out = mu.vmap(lambda m, x: mu.for_loop(lambda y: m(x * y), jnp.arange(3.0)))(net, XS)

    def raw(s: Any, x: Any) -> Any:
        return jax.lax.scan(lambda s, y: hand(s, x * y)[::-1], s, jnp.arange(3.0))[::-1]

    expected, state = jax.vmap(raw)(state, XS)
    np.testing.assert_allclose(out, expected, rtol=1e-5)
    check(net, state)


def test_axis_size_and_names() -> None:
    n = mu.Variable(0)

    def f() -> Any:
        n.value += 1
        return jax.lax.axis_index("i")

    np.testing.assert_array_equal(mu.vmap(f, axis_name="i", axis_size=3)(), [0, 1, 2])
    assert int(n) == 1


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: mu.vmap(lambda x, y: x, in_axes=(0,))(XS, XS), "`in_axes` has 1 entries for 2"),
        (lambda: mu.vmap(lambda x, y: x)(XS, XS[:2]), "different sizes"),
        (lambda: mu.vmap(lambda x: x, axis_size=5)(XS), "different sizes"),
        (lambda: mu.vmap(lambda x: x, in_axes=None)(XS), "nothing to map over"),
    ],
)
def test_bad_axes(call: Any, text: str) -> None:
    with pytest.raises(errors.AxisError, match=text) as caught:
        call()
    assert caught.value.cure


@pytest.mark.parametrize("bad", [0, (0, 3), ("x", 0), (1.5, 0), ({"a": 0}, 0)])
def test_axes_that_do_not_fit_an_array(bad: Any) -> None:
    n = mu.Variable(0)

    def f(x: Any, y: Any) -> Any:
        n.value += 1
        return x

    with pytest.raises((ValueError, TypeError)):
        mu.vmap(f, in_axes=bad)(XS, jnp.float32(0))
    assert int(n) == 0


def test_the_program_is_the_one_threaded_by_hand() -> None:
    net, state = stacked()
    mine = mu.make_jaxpr(lambda m: mu.vmap(lambda m, x: m(x))(m, XS))(net)
    theirs = jax.make_jaxpr(lambda s: jax.vmap(hand)(s, XS))(state)
    assert len(mine.eqns) <= len(theirs.eqns)
    assert len(mine.out_avals) == 3


def test_the_function_runs_once_per_call(traces: Any) -> None:
    net, _ = stacked()
    f = mu.vmap(traces.count(lambda m, x: m(x)))
    f(net, XS)
    f(net, XS)
    assert traces.total == 2
    compiled = mu.jit(f)
    compiled(net, XS)
    compiled(net, XS)
    assert traces.total == 3
