"""`mu.shard_map` beside `jax.shard_map` threaded by hand: replicated and split states, streams, meshes, nesting."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mutatis as mu
from mutatis import errors

pytestmark = pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")

AUTO = jax.sharding.AxisType.Auto
XS = jnp.linspace(-1, 1, 24).reshape(8, 3)


@functools.cache
def line() -> Any:
    return jax.make_mesh((4,), ("d",), axis_types=(AUTO,))


@functools.cache
def square() -> Any:
    return jax.make_mesh((2, 2), ("d", "m"), axis_types=(AUTO, AUTO))


class Net(mu.Module):
    """Replicated weights, a statistic of the whole batch, a counter, and a memory of each example."""

    def __init__(self) -> None:
        self.w = mu.Param(jnp.arange(3.0) + 1)
        self.mean = mu.BatchStat(jnp.float32(0))
        self.calls = mu.Variable(0)
        self.last = mu.Hidden(jnp.zeros(8))

    def __call__(self, x: Any) -> Any:
        y = x @ self.w.value + self.last.value
        self.mean.value = 0.5 * self.mean.value + jax.lax.pmean(jnp.mean(y), "d")
        self.calls += 1
        self.last.value = y
        return y


def hand(s: dict[str, Any], x: Any) -> Any:
    y = x @ s["w"] + s["last"]
    mean = 0.5 * s["mean"] + jax.lax.pmean(jnp.mean(y), "d")
    return y, {"w": s["w"], "mean": mean, "calls": s["calls"] + 1, "last": y}


SPECS = {"w": P(), "mean": P(), "calls": P(), "last": P("d")}
STATES = mu.StateSharding({mu.Hidden: P("d"), ...: P()})


def start() -> dict[str, Any]:
    return {"w": jnp.arange(3.0) + 1, "mean": jnp.float32(0), "calls": jnp.int32(0), "last": jnp.zeros(8)}


def raw(**options: Any) -> Any:
    return jax.jit(jax.shard_map(hand, mesh=line(), in_specs=(SPECS, P("d")), out_specs=(P("d"), SPECS), **options))


def check(net: Any, state: dict[str, Any], *, placed: bool = True) -> None:
    for name, value in state.items():
        got = getattr(net, name)
        np.testing.assert_allclose(got.value, value, rtol=1e-5, atol=1e-6, err_msg=name)
        assert got.dtype == value.dtype
        if placed:
            assert got.value.sharding.is_equivalent_to(value.sharding, value.ndim), name


FORMS = ["argument", "closure", "pairs", "dict", "method", "partial"]


def apply(form: str, net: Net, **options: Any) -> Any:
    """`mu.shard_map` of a call of the model, as a function of the examples."""
    common: dict[str, Any] = {"mesh": line(), "out_specs": P("d"), **options}
    if form == "argument":
        f = mu.shard_map(lambda m, x: m(x), in_specs=(STATES, P("d")), **common)
        return lambda x: f(net, x)
    if form == "closure":
        return mu.shard_map(lambda x: net(x), in_specs=P("d"), states=STATES, **common)
    if form == "pairs":
        return mu.shard_map(lambda x: net(x), in_specs=P("d"), states=[(net, STATES)], **common)
    if form == "dict":
        return mu.shard_map(lambda x: net(x), in_specs=P("d"), states={net.last: P("d")}, **common)
    if form == "method":
        return mu.shard_map(net.__call__, in_specs=(P("d"),), states=STATES, **common)
    return mu.shard_map(functools.partial(Net.__call__, net), in_specs=(P("d"),), states=STATES, **common)


# -- values, states and where they live ------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "compiled"), [("closure", False), *((form, True) for form in FORMS)])
def test_states_beside_threading_by_hand(form: str, compiled: bool) -> None:
    net, state = Net(), start()
    f, g = apply(form, net), raw()
    f = mu.jit(f) if compiled else f
    for _ in range(2 + compiled):
        out, state = g(state, XS)
        got = f(XS)
        np.testing.assert_allclose(got, out, rtol=1e-5)
        assert got.sharding.is_equivalent_to(out.sharding, 1)
    check(net, {name: state[name] for name in ("mean", "calls", "last")})
    check(net, {"w": state["w"]}, placed=False)


def test_what_is_only_read_is_not_written() -> None:
    net = Net()
    w = net.w.value
    apply("argument", net)(XS)
    assert net.w.value is w


@pytest.mark.parametrize("check_vma", [True, False])
def test_check_vma(check_vma: bool) -> None:
    net, state = Net(), start()
    for _ in range(2):
        out, state = raw(check_vma=check_vma)(state, XS)
        np.testing.assert_allclose(apply("argument", net, check_vma=check_vma)(XS), out, rtol=1e-5)
    check(net, state, placed=False)


def test_a_callable_module() -> None:
    net, state = Net(), start()
    out, state = raw()(state, XS)
    np.testing.assert_allclose(
        mu.shard_map(net, mesh=line(), in_specs=P("d"), out_specs=P("d"), states=STATES)(XS), out
    )
    check(net, state, placed=False)


@pytest.mark.parametrize("arguments", [False, True])
def test_decorator(arguments: bool) -> None:
    n = mu.Variable(0)

    def f(x: Any) -> Any:
        n.value += 1
        return x * 2

    if arguments:
        g = mu.shard_map(mesh=line(), in_specs=P("d"), out_specs=P("d"))(f)
    else:
        g = mu.shard_map(f, mesh=line(), in_specs=P("d"), out_specs=P("d"))
    np.testing.assert_array_equal(g(XS), 2 * XS)
    assert int(n) == 1
    assert g.__name__ == "f"


def test_decorated_method() -> None:
    class Layer(mu.Module):
        def __init__(self) -> None:
            self.w = mu.Param(jnp.arange(8.0))
            self.n = mu.Variable(0)

        @mu.shard_map(mesh=line(), in_specs=(mu.StateSharding({mu.Param: P("d"), ...: None}), P("d")), out_specs=P("d"))
        def __call__(self, x: Any) -> Any:
            self.n += 1
            self.w.value = self.w + 1
            return x * self.w.value[:, None]

    layer = Layer()
    np.testing.assert_allclose(layer(XS), XS * (jnp.arange(8.0) + 1)[:, None])
    np.testing.assert_allclose(mu.jit(layer)(XS), XS * (jnp.arange(8.0) + 2)[:, None])
    np.testing.assert_allclose(layer.w, jnp.arange(8.0) + 2)
    assert layer.w.value.sharding.spec == P("d")
    assert int(layer.n) == 2


def test_hazard_a_replicated_counter() -> None:
    n = mu.Variable(0)

    def f(x: Any) -> Any:
        n.value += 1
        return x

    g = mu.shard_map(f, mesh=line(), in_specs=P("d"), out_specs=P("d"))
    for h in (g, mu.jit(g), g):
        h(XS)
    assert int(n) == 3, "once for each call, not for each device"


def test_a_summed_statistic() -> None:
    total = mu.Variable(0.0)
    f = mu.shard_map(
        lambda x: total.set(total + jax.lax.psum(jnp.sum(x), "d")), mesh=line(), in_specs=P("d"), out_specs=None
    )
    f(jnp.arange(8.0))
    assert float(total) == 28
    mu.jit(f)(jnp.arange(8.0))
    assert float(total) == 56


def test_a_gathered_value_in_a_replicated_state() -> None:
    v = mu.Variable(jnp.zeros(8))

    def hand(x: Any) -> Any:
        return jax.lax.all_gather(x, "d", tiled=True)

    options: dict[str, Any] = {"mesh": line(), "in_specs": P("d"), "check_vma": False}
    expected = jax.shard_map(hand, out_specs=P(), **options)(jnp.arange(8.0))
    mu.shard_map(lambda x: v.set(hand(x)), out_specs=None, **options)(jnp.arange(8.0))
    np.testing.assert_array_equal(v, expected)


def test_devices_see_their_part() -> None:
    v = mu.Variable(jnp.arange(8.0))
    shapes = []

    def f() -> None:
        shapes.append(v.shape)
        v.value = v + jax.lax.axis_index("d").astype(jnp.float32) * 10

    mu.shard_map(f, mesh=line(), in_specs=(), out_specs=None, states={v: P("d")})()
    assert shapes[0] == (2,)
    np.testing.assert_array_equal(v, [0, 1, 12, 13, 24, 25, 36, 37])
    assert v.value.sharding.spec == P("d")


def test_a_split_state_may_change_its_shape() -> None:
    v = mu.Variable(jnp.arange(8.0))

    def f() -> None:
        v.value = jnp.concatenate([v.value, v.value])

    mu.shard_map(f, mesh=line(), in_specs=(), out_specs=None, states={v: P("d")})()
    expected = jax.shard_map(lambda v: jnp.concatenate([v, v]), mesh=line(), in_specs=P("d"), out_specs=P("d"))(
        jnp.arange(8.0)
    )
    np.testing.assert_array_equal(v, expected)


@pytest.mark.parametrize("spec", [P("d", "m"), P("m", "d"), P(("d", "m")), P(None, "m"), P("d"), P(), None])
def test_two_axes_of_a_mesh(spec: Any) -> None:
    start = jnp.arange(32.0).reshape(8, 4)
    v = mu.Variable(start)

    def hand(v: Any) -> Any:
        return v * 2 + 1

    jax_spec = P() if spec is None else spec
    expected = jax.shard_map(hand, mesh=square(), in_specs=(jax_spec,), out_specs=jax_spec)(start)
    mu.shard_map(lambda: v.set(hand(v.value)), mesh=square(), in_specs=(), out_specs=None, states={v: spec})()
    np.testing.assert_array_equal(v, expected)
    assert v.value.sharding.is_equivalent_to(expected.sharding, 2)


def test_a_value_that_varies_along_one_axis_in_a_state_split_along_the_other() -> None:
    v = mu.Variable(jnp.zeros(2))
    before = v.value

    def f(x: Any, axis: str) -> None:
        v.value = jax.lax.psum(jnp.sum(x), axis)[None]

    options: dict[str, Any] = {"mesh": square(), "in_specs": P("d", "m"), "out_specs": None, "states": {v: P("d")}}
    with pytest.raises(errors.LaneError, match="along 'm'") as caught:
        mu.shard_map(lambda x: f(x, "d"), **options)(XS[:, :2])
    assert "jax.lax.pmean(x, 'm')" in str(caught.value)
    assert v.value is before
    mu.shard_map(lambda x: f(x, "m"), **options)(XS[:, :2])
    np.testing.assert_allclose(v, [XS[:4, :2].sum(), XS[4:, :2].sum()], rtol=1e-6)


def test_partially_manual() -> None:
    w = mu.Param(jnp.arange(8.0))
    n = mu.Variable(0)
    total = mu.Variable(0.0)

    def f(x: Any) -> Any:
        n.value += 1
        assert x.shape == (4, 3)
        total.value += jax.lax.psum(jnp.sum(x), "d")
        w.value = w * 2
        return x * w.value[:, None]

    g = mu.shard_map(f, mesh=square(), in_specs=P("d"), out_specs=P("d"), axis_names={"d"}, states={w: P("d")})
    np.testing.assert_allclose(mu.jit(g)(XS), XS * 2 * jnp.arange(8.0)[:, None], rtol=1e-6)
    np.testing.assert_allclose(w, 2 * jnp.arange(8.0))
    np.testing.assert_allclose(total, XS.sum(), atol=1e-5)
    assert int(n) == 1
    assert w.value.sharding.spec == P("d")


def test_tied_weights() -> None:
    class Tied(mu.Module):
        def __init__(self) -> None:
            self.a = mu.Param(jnp.ones(8))
            self.b = self.a

    tied = Tied()

    def f(m: Any, c: Any) -> Any:
        assert m.a is m.b is c
        m.a.value = m.a + 1
        return m.b.value

    out = mu.shard_map(f, mesh=line(), in_specs=(P("d"), P("d")), out_specs=P("d"))(tied, tied.b)
    np.testing.assert_array_equal(out, jnp.full(8, 2.0))
    assert tied.a is tied.b
    np.testing.assert_array_equal(tied.a, jnp.full(8, 2.0))


def test_states_that_are_trees() -> None:
    v = mu.Variable({"k": jnp.arange(8.0), "n": [jnp.arange(8), jnp.zeros((8, 2))]})

    def f() -> None:
        assert v.value["k"].shape == (2,)
        v.value["k"] = v.value["k"] + 1
        v.value["n"][0] = v.value["n"][0] * 2

    mu.shard_map(f, mesh=line(), in_specs=(), out_specs=None, states=[(v, P("d"))])()
    np.testing.assert_array_equal(v.value["k"], jnp.arange(8.0) + 1)
    np.testing.assert_array_equal(v.value["n"][0], jnp.arange(8) * 2)
    assert v.value["k"].sharding.spec == P("d")

    def g(x: Any) -> None:
        v.value["k"] = v.value["k"] + x[0]

    before = v.value
    with pytest.raises(errors.LaneError):
        mu.shard_map(g, mesh=line(), in_specs=P("d"), out_specs=None)(jnp.arange(4.0))
    assert all(a is b for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(v.value), strict=True))


def test_modules_in_containers() -> None:
    nets = [Net(), Net()]
    f = mu.shard_map(
        lambda d, x: d["nets"][1](d["nets"][0](x)[:, None] * jnp.ones((1, 3))) * d["s"],
        mesh=line(),
        in_specs=({"nets": STATES, "s": P()}, P("d")),
        out_specs=P("d"),
    )
    got = mu.jit(f)({"nets": nets, "s": jnp.float32(2)}, XS)
    y, first = raw()(start(), XS)
    z, second = raw()(start(), y[:, None] * jnp.ones((1, 3)))
    np.testing.assert_allclose(got, 2 * z, rtol=1e-5)
    check(nets[0], first, placed=False)
    check(nets[1], second, placed=False)


def test_one_spec_for_a_whole_module_and_for_a_variable() -> None:
    class Pair(mu.Module):
        def __init__(self) -> None:
            self.a = mu.Param(jnp.arange(8.0))
            self.b = mu.Variable(jnp.arange(16.0).reshape(8, 2))

    pair, extra = Pair(), mu.Variable(jnp.zeros(4))

    def f(m: Any, v: Any) -> None:
        assert (m.a.shape, m.b.shape, v.shape) == ((2,), (2, 2), (1,))
        m.a.value, m.b.value, v.value = m.a * 2, m.b + 1, v - 1

    mu.shard_map(f, mesh=line(), in_specs=(P("d"), P("d")), out_specs=None)(pair, extra)
    np.testing.assert_array_equal(pair.a, jnp.arange(8.0) * 2)
    np.testing.assert_array_equal(pair.b, jnp.arange(16.0).reshape(8, 2) + 1)
    np.testing.assert_array_equal(extra, -jnp.ones(4))


def test_a_buffer_attribute() -> None:
    class Layer(mu.Module):
        def __init__(self) -> None:
            self.table = jnp.arange(8.0)

    layer = Layer()

    def f(m: Any) -> Any:
        assert m.table.shape == (2,)
        m.table = m.table + 1
        return m.table

    out = mu.shard_map(f, mesh=line(), in_specs=(P("d"),), out_specs=P("d"))(layer)
    np.testing.assert_array_equal(out, jnp.arange(8.0) + 1)
    np.testing.assert_array_equal(layer.table, jnp.arange(8.0) + 1)


def test_modules_as_results() -> None:
    net = Net()
    f = mu.shard_map(lambda m: (m, m.w.value), mesh=line(), in_specs=(STATES,), out_specs=(None, P()))
    same, w = f(net)
    assert same is net
    np.testing.assert_array_equal(w, net.w)


# -- in_specs left out: as arrays are placed --------------------------------------------------------------------


def explicit() -> Any:
    return jax.make_mesh((4,), ("d",))


def test_states_are_split_as_they_are_placed_where_specs_are_left_out() -> None:
    mesh = explicit()
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, P("d")))
        v = mu.Variable(jax.device_put(jnp.arange(8.0), NamedSharding(mesh, P("d"))))
        n = mu.Variable(jax.device_put(jnp.int32(0), NamedSharding(mesh, P())))

        def f(x: Any) -> Any:
            assert v.shape == x.shape == (2,)
            v.value = v + x
            n.value += 1
            return v.value * 2

        g = mu.shard_map(f, out_specs=P("d"))
        np.testing.assert_array_equal(g(x), 4 * np.arange(8.0))
        np.testing.assert_array_equal(v.value, 2 * np.arange(8.0))
        assert v.value.sharding.spec == P("d")
        assert int(n) == 1


def test_explicit_mesh_under_jit_where_specs_are_left_out() -> None:
    mesh = explicit()
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, P("d")))
        v = mu.Variable(jax.device_put(jnp.arange(8.0), NamedSharding(mesh, P("d"))))

        def f(x: Any) -> Any:
            assert x.shape == (2,)
            assert v.shape == (2,), "a state is split as it is placed under jit too"
            v.value = v + x
            return v.value * 2

        g = mu.jit(mu.shard_map(f, out_specs=P("d")))
        for k in (2, 3):
            np.testing.assert_array_equal(g(x), 2 * k * np.arange(8.0))
            np.testing.assert_array_equal(v.value, k * np.arange(8.0))
            assert v.value.sharding.spec == P("d")


@pytest.mark.parametrize("compiled", [False, True])
def test_explicit_mesh_with_specs(compiled: bool) -> None:
    mesh = explicit()
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, P("d")))
        v = mu.Variable(jax.device_put(jnp.arange(8.0), NamedSharding(mesh, P("d"))))
        total = mu.Variable(0.0)

        def f(x: Any) -> Any:
            v.value = v + x
            total.value += jax.lax.psum(jnp.sum(x), "d")
            return v.value * 2

        g = mu.shard_map(f, in_specs=P("d"), out_specs=P("d"), states={v: P("d")})
        g = mu.jit(g) if compiled else g
        for k in (2, 3):
            np.testing.assert_array_equal(g(x), 2 * k * np.arange(8.0))
        assert v.value.sharding.spec == P("d")
        assert float(total) == 56


# -- inside other transforms -----------------------------------------------------------------------------------


@pytest.mark.jax_leaks
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients(compiled: bool) -> None:
    net, state = Net(), start()
    f, g = apply("argument", net), raw()

    def loss(w: Any, s: dict[str, Any]) -> Any:
        y, new = g({**s, "w": w}, XS)
        return jnp.sum(y**2), new

    def run() -> Any:
        return mu.grad(lambda: jnp.sum(f(XS) ** 2), of=net)()

    expected, state = jax.grad(loss, has_aux=True)(state["w"], state)
    grads = (mu.jit(run) if compiled else run)()
    np.testing.assert_allclose(grads["w"], expected, rtol=1e-5)
    assert list(grads) == [("w",)]
    check(net, state, placed=False)


def test_gradients_of_a_split_parameter() -> None:
    w = mu.Param(jnp.arange(8.0))
    f = mu.shard_map(lambda x: x * w, mesh=line(), in_specs=P("d"), out_specs=P("d"), states={w: P("d")})
    grads = mu.grad(lambda x: jnp.sum(f(x) ** 2), of=w)(jnp.ones(8))
    np.testing.assert_allclose(jax.tree.leaves(grads)[0], 2 * jnp.arange(8.0))


def test_gradients_taken_on_each_device() -> None:
    w = mu.Param(jnp.float32(3))
    losses = mu.Variable(0.0)

    def f(x: Any) -> Any:
        def loss(x: Any) -> Any:
            value = jnp.sum(w.value * x)
            losses.value = jax.lax.psum(value, "d")
            return value

        (grads,) = jax.tree.leaves(mu.grad(loss, of=w)(x))
        w.value = w - 0.1 * jax.lax.pmean(grads, "d")

    def by_hand(w: Any, x: Any) -> Any:
        grads = jax.grad(lambda w: jnp.sum(w * x))(w)
        return w - 0.1 * jax.lax.pmean(grads, "d")

    x = jnp.arange(8.0)
    expected = jax.shard_map(by_hand, mesh=line(), in_specs=(P(), P("d")), out_specs=P())(jnp.float32(3), x)
    mu.shard_map(f, mesh=line(), in_specs=P("d"), out_specs=None)(x)
    np.testing.assert_allclose(w, expected, rtol=1e-6)
    assert float(losses) == 84


def test_under_vmap() -> None:
    w = mu.Param(jnp.arange(3.0))
    total = mu.Variable(jnp.zeros(2))
    x = jnp.linspace(-1, 1, 48).reshape(2, 8, 3)

    def f(x: Any) -> Any:
        y = x @ w.value
        total.value += jax.lax.psum(jnp.sum(y), "d")
        return y

    g = mu.shard_map(f, mesh=line(), in_specs=P("d"), out_specs=P("d"))
    h = mu.jit(mu.vmap(g, states={total: 0}))
    for _ in range(2):
        np.testing.assert_allclose(h(x), x @ jnp.arange(3.0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(total, 2 * (x @ jnp.arange(3.0)).sum(1), rtol=1e-4)


def test_vmap_inside() -> None:
    w = mu.Param(jnp.arange(3.0))
    total = mu.Variable(0.0)

    def f(x: Any) -> Any:
        y = mu.vmap(lambda row: jnp.sum(row * w.value))(x)
        total.value += jax.lax.psum(jnp.sum(y), "d")
        return y

    y = mu.shard_map(f, mesh=line(), in_specs=P("d"), out_specs=P("d"))(XS)
    np.testing.assert_allclose(y, XS @ jnp.arange(3.0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(total, y.sum(), atol=1e-5)


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_scan(where: str) -> None:
    net, state = Net(), start()
    xs = jnp.stack([XS, XS * 2, XS * 3])
    if where == "outside":
        f = apply("closure", net)
        outs = mu.scan(lambda c, x: (c, f(x)), 0, xs)[1]
    else:
        f = mu.shard_map(
            lambda xs: mu.scan(lambda c, x: (c, net(x)), 0, xs)[1],
            mesh=line(),
            in_specs=P(None, "d"),
            out_specs=P(None, "d"),
            states=STATES,
        )
        outs = mu.jit(f)(xs)
    for x, got in zip(xs, outs, strict=True):
        out, state = raw()(state, x)
        np.testing.assert_allclose(got, out, rtol=1e-5)
    check(net, state, placed=False)


@pytest.mark.jax_leaks
@pytest.mark.parametrize("where", ["outside", "inside"])
def test_remat(where: str) -> None:
    net, state = Net(), start()
    f: Any
    if where == "outside":
        f = mu.remat(apply("closure", net))
    else:
        f = mu.shard_map(
            lambda x: mu.remat(lambda x: net(x))(x), mesh=line(), in_specs=P("d"), out_specs=P("d"), states=STATES
        )
    grads = mu.jit(mu.grad(lambda: jnp.sum(f(XS) ** 2), of=net))()
    g = raw()
    expected = jax.grad(lambda w: jnp.sum(g({**state, "w": w}, XS)[0] ** 2))(state["w"])
    np.testing.assert_allclose(grads["w"], expected, rtol=1e-5)
    check(net, g(state, XS)[1], placed=False)


@pytest.mark.parametrize("where", ["outside", "inside"])
@pytest.mark.parametrize("taken", [True, False])
def test_cond(where: str, taken: bool) -> None:
    net, state = Net(), start()
    if where == "outside":
        f = apply("closure", net)
        got = mu.cond(taken, f, lambda x: x @ jnp.ones(3), XS)
    else:
        f = mu.shard_map(
            lambda x: mu.cond(taken, net, lambda x: x @ jnp.ones(3), x),
            mesh=line(),
            in_specs=P("d"),
            out_specs=P("d"),
            states=STATES,
        )
        got = mu.jit(f)(XS)
    expected, state = raw()(state, XS) if taken else (XS @ jnp.ones(3), state)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    check(net, state, placed=False)


def test_functionalize() -> None:
    net, state = Net(), start()
    f = apply("closure", net)
    pure, values = mu.functionalize(lambda x: f(x), of=net)
    before = mu.state(net)
    for _ in range(2):
        out, values = jax.jit(pure)(values, XS)
        expected, state = raw()(state, XS)
        np.testing.assert_allclose(out, expected, rtol=1e-5)
    for name, value in state.items():
        np.testing.assert_allclose(values[name], value, rtol=1e-5)
    assert mu.state(net) == before


def test_functionalized_under_raw_shard_map() -> None:
    net, state = Net(), start()
    pure, values = mu.functionalize(net)
    specs = jax.tree.unflatten(jax.tree.structure(values), [SPECS[path[0]] for path in values])
    f = jax.shard_map(pure, mesh=line(), in_specs=(specs, P("d")), out_specs=(P("d"), specs))
    out, values = jax.jit(f)(values, XS)
    expected, state = raw()(state, XS)
    np.testing.assert_allclose(out, expected, rtol=1e-5)
    for name, value in state.items():
        np.testing.assert_allclose(values[name], value, rtol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_jit_inside(compiled: bool) -> None:
    net, state = Net(), start()
    inner = mu.jit(lambda m, x: m(x))
    f = mu.shard_map(lambda x: inner(net, x), mesh=line(), in_specs=P("d"), out_specs=P("d"), states=STATES)
    f = mu.jit(f) if compiled else f
    for _ in range(2):
        out, state = raw()(state, XS)
        np.testing.assert_allclose(f(XS), out, rtol=1e-5)
    check(net, state, placed=False)


def test_shard_map_inside_shard_map() -> None:
    v, n = mu.Variable(jnp.arange(16.0).reshape(4, 4)), mu.Variable(0)

    def inner() -> None:
        v.value = v + jax.lax.axis_index("m").astype(jnp.float32)
        n.value += 1

    def outer() -> None:
        v.value = v + 10 * jax.lax.axis_index("d").astype(jnp.float32)
        n.value += 1
        mu.shard_map(inner, in_specs=(), out_specs=None, axis_names={"m"}, states={v: P(None, "m")})()

    f = mu.shard_map(outer, mesh=square(), in_specs=(), out_specs=None, axis_names={"d"}, states={v: P("d")})
    mu.jit(f)()
    add = np.array([[0, 0, 1, 1]] * 2 + [[10, 10, 11, 11]] * 2)
    np.testing.assert_array_equal(v, np.arange(16.0).reshape(4, 4) + add)
    assert int(n) == 2


def test_under_make_jaxpr_and_eval_shape() -> None:
    net = Net()
    before = mu.state(net)
    f = apply("closure", net)
    assert mu.eval_shape(f, XS).shape == (8,)
    assert "shard_map" in str(mu.make_jaxpr(f)(XS))
    assert mu.state(net) == before


def test_compiled_once(traces: Any) -> None:
    net = Net()
    body = traces.count(lambda m, x: m(x))
    f = mu.jit(mu.shard_map(body, mesh=line(), in_specs=(STATES, P("d")), out_specs=P("d")))
    f(net, XS)
    f(net, XS)
    f(net, XS)
    runs = traces.total
    with traces.compilations() as compiled:
        f(net, XS * 2)
    assert traces.total == runs
    assert "multiply" not in compiled.names or compiled.count <= 1


def test_no_leaks() -> None:
    net = Net()
    rngs = mu.Rngs(0)

    def f(x: Any) -> Any:
        return net(x) + jax.random.normal(rngs(), x.shape[:1])

    with jax.checking_leaks():
        mu.jit(mu.shard_map(f, mesh=line(), in_specs=P("d"), out_specs=P("d"), states=STATES))(XS)
    assert int(net.calls) == 1


# -- random streams --------------------------------------------------------------------------------------------


def draws(rngs: mu.Rngs, n: int = 1, **options: Any) -> Any:
    """Draws on each device, device by device: (4, n)."""
    f = mu.shard_map(
        lambda: jnp.stack([jax.random.uniform(rngs()) for _ in range(n)])[None],
        mesh=line(),
        in_specs=(),
        out_specs=P("d"),
        **options,
    )
    return np.asarray(mu.jit(f)())


def test_devices_draw_differently_and_never_again_the_same() -> None:
    rngs = mu.Rngs(0)
    seen = [np.asarray(jax.random.uniform(rngs()))[None, None]]
    for count in (2, 3):
        seen.append(draws(rngs, 2))
        assert int(rngs.default.value["count"]) == count, "one further for each call"
    seen.append(np.asarray(jax.random.uniform(rngs()))[None, None])
    assert int(rngs.default.value["count"]) == 4
    everything = np.concatenate([x.ravel() for x in seen])
    assert len(set(everything.tolist())) == len(everything)


def test_draws_beside_folding_by_hand() -> None:
    rngs = mu.Rngs(3)
    got = draws(rngs, 2)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), jnp.uint32(0)), jnp.arange(4)[2])
    expected = [jax.random.uniform(jax.random.fold_in(key, jnp.uint32(i))) for i in range(2)]
    np.testing.assert_array_equal(got[2], expected)


def test_draws_are_the_same_in_every_run_and_compiled() -> None:
    first, second, third = mu.Rngs(0), mu.Rngs(0), mu.Rngs(0)
    np.testing.assert_array_equal(draws(first, 2), draws(second, 2))
    np.testing.assert_array_equal(draws(first, 1), draw_eagerly(second))
    assert mu.state(first) == mu.state(second)
    assert mu.state(first) != mu.state(third)


def draw_eagerly(rngs: mu.Rngs) -> Any:
    f = mu.shard_map(lambda: jax.random.uniform(rngs())[None, None], mesh=line(), in_specs=(), out_specs=P("d"))
    return f()


def test_shared_streams_draw_alike() -> None:
    rngs = mu.Rngs(0)
    f = mu.shard_map(
        lambda: jnp.stack([jax.random.uniform(rngs()), jax.random.uniform(rngs())])[None],
        mesh=line(),
        in_specs=(),
        out_specs=P("d"),
        states=mu.StateSharding({mu.RngState: mu.Shared, ...: None}),
        check_vma=False,
    )
    twin = mu.Rngs(0)
    expected = [jax.random.uniform(twin()), jax.random.uniform(twin())]
    np.testing.assert_array_equal(f(), np.broadcast_to(np.stack(expected), (4, 2)))
    assert mu.state(rngs) == mu.state(twin)


def test_shared_streams_are_replicated_values() -> None:
    rngs, last = mu.Rngs(0), mu.Variable(0.0)
    states = [(rngs, mu.Shared)]
    mu.shard_map(
        lambda: last.set(jax.random.uniform(rngs())), mesh=line(), in_specs=(), out_specs=None, states=states
    )()
    assert float(last) == float(jax.random.uniform(mu.Rngs(0)()))
    rngs = mu.Rngs(0)
    with pytest.raises(errors.LaneError, match="`last`"):
        mu.shard_map(lambda: last.set(jax.random.uniform(rngs())), mesh=line(), in_specs=(), out_specs=None)()
    assert int(rngs.default.value["count"]) == 0


@pytest.mark.parametrize("names", [{"d", "m"}, {"d"}])
def test_streams_on_two_axes(names: set[str]) -> None:
    rngs = mu.Rngs(0)
    spec = P(("d", "m")) if len(names) == 2 else P("d")
    f = mu.shard_map(
        lambda: jax.random.uniform(rngs())[None], mesh=square(), in_specs=(), out_specs=spec, axis_names=names
    )
    values = np.asarray(mu.jit(f)())
    assert values.shape == (2 ** len(names),)
    assert len(set(values.tolist())) == values.size
    assert int(rngs.default.value["count"]) == 1


def test_a_stream_that_is_not_used_is_not_advanced() -> None:
    rngs = mu.Rngs(0, other=1)
    draws(rngs)
    assert int(rngs.streams["other"].value["count"]) == 0
    assert int(rngs.default.value["count"]) == 1


def test_split_streams() -> None:
    rngs, twin = mu.Rngs(0).split(4), mu.Rngs(0).split(4)

    def draw(r: mu.Rngs) -> Any:
        return mu.vmap(lambda r: jax.random.uniform(r()))(r)

    f = mu.jit(mu.shard_map(draw, mesh=line(), in_specs=(P("d"),), out_specs=P("d")))
    for _ in range(2):
        np.testing.assert_array_equal(f(rngs), draw(twin))
    assert mu.state(rngs) == mu.state(twin)


@pytest.mark.parametrize(
    "inner",
    [
        "jit",
        "cond",
        "scan",
        "fori_loop",
        "vmap",
        "grad",
        "remat",
        "checkpoint_every",
    ],
)
def test_streams_in_transforms_inside(inner: str) -> None:
    rngs = mu.Rngs(0)

    def draw() -> Any:
        return jax.random.uniform(rngs())

    def f() -> Any:
        first = draw()
        if inner == "jit":
            second = mu.jit(draw)()
        elif inner == "remat":
            second = mu.remat(draw)()
        elif inner == "cond":
            second = mu.cond(True, draw, lambda: draw() + 1)
        elif inner == "scan":
            second = mu.scan(lambda c, _: (c, draw()), 0, length=2)[1][0]
        elif inner == "checkpoint_every":
            second = mu.scan(lambda c, _: (c, draw()), 0, length=4, checkpoint_every=2)[1][0]
        elif inner == "fori_loop":
            second = mu.fori_loop(0, 2, lambda i, c: draw() + 0 * c, first)
        elif inner == "vmap":
            second = mu.vmap(lambda x: draw() + x)(jnp.zeros(2))[0]
        else:
            second = mu.value_and_grad(lambda x: draw() * x, has_aux=False)(jnp.float32(1))[0]
        return jnp.stack([first, second, draw()])[None]

    g = mu.shard_map(f, mesh=line(), in_specs=(), out_specs=P("d"))
    values = np.asarray(mu.jit(g)())
    assert len(set(values.ravel().tolist())) == 12
    assert int(rngs.default.value["count"]) == 1
    if inner == "scan":  # eagerly each operation is a program: slow
        rngs = mu.Rngs(0)
        np.testing.assert_array_equal(g(), values)


@pytest.mark.parametrize("compiled", [False, True])
def test_streams_under_vmap_in_remat(compiled: bool) -> None:
    rngs = mu.Rngs(0)
    f = mu.vmap(lambda x: mu.remat(lambda x: x + jax.random.uniform(rngs()))(x))
    values = np.asarray((mu.jit(f) if compiled else f)(jnp.arange(4.0)))
    assert len(set((values % 1).tolist())) == 4
    assert int(rngs.default.value["count"]) == 1


def test_a_stream_first_used_inside_a_branch_or_loop() -> None:
    rngs = mu.Rngs(0)

    def f(x: Any) -> Any:
        a = mu.cond(x[0] > 1, lambda: jax.random.uniform(rngs()), lambda: jax.random.uniform(rngs()) + 1)
        return a[None]

    values = np.asarray(mu.shard_map(f, mesh=line(), in_specs=P("d"), out_specs=P("d"))(jnp.arange(4.0)))
    assert len(set((values % 1).tolist())) == 4
    np.testing.assert_array_equal(values > 1, [True, True, False, False])
    assert int(rngs.default.value["count"]) == 1


def test_draws_in_a_scan_of_shard_maps() -> None:
    rngs = mu.Rngs(0)
    f = mu.shard_map(lambda: jax.random.uniform(rngs())[None], mesh=line(), in_specs=(), out_specs=P("d"))
    values = np.asarray(mu.scan(lambda c, _: (c, f()), 0, length=3)[1])
    assert len(set(values.ravel().tolist())) == 12
    assert int(rngs.default.value["count"]) == 3


def test_dropout_under_gradients_is_the_same_in_both_passes() -> None:
    rngs = mu.Rngs(0)
    w = mu.Param(jnp.ones(8))

    def f(x: Any) -> Any:
        keep = jax.random.bernoulli(rngs(), 0.5, x.shape)
        return jnp.where(keep, x * w.value, 0.0)

    g = mu.shard_map(f, mesh=line(), in_specs=P("d"), out_specs=P("d"), states={w: P("d")})

    def loss() -> Any:
        out = mu.remat(g)(jnp.ones(8))
        return jnp.sum(out), out

    grads, out = mu.grad(loss, of=w, has_aux=True)()
    np.testing.assert_array_equal(jax.tree.leaves(grads)[0], out)
    assert int(rngs.default.value["count"]) == 1


@pytest.mark.parametrize("drawn", [False, True])
def test_a_stream_that_is_set_inside(drawn: bool) -> None:
    rngs = mu.Rngs(0)

    def f() -> Any:
        if drawn:
            rngs()
        mu.reseed(rngs, default=7)
        return jax.random.uniform(rngs())[None]

    twin = mu.Rngs(0)
    mu.reseed(twin, default=7)
    twin()
    mu.jit(mu.shard_map(f, mesh=line(), in_specs=(), out_specs=P("d")))()
    assert mu.state(rngs) == mu.state(twin)


# -- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("form", ["argument", "closure"])
def test_a_value_that_differs_by_device_in_a_replicated_state_is_refused(form: str, compiled: bool) -> None:
    net = Net()

    def wrong(m: Net, x: Any) -> Any:
        m.calls += 1
        m.mean.value = jnp.mean(x)
        return x

    if form == "argument":
        f = mu.shard_map(wrong, mesh=line(), in_specs=(STATES, P("d")), out_specs=P("d"))
        call = lambda: f(net, XS)  # noqa: E731
    else:
        g = mu.shard_map(lambda x: wrong(net, x), mesh=line(), in_specs=P("d"), out_specs=P("d"), states=STATES)
        call = lambda: g(XS)  # noqa: E731
    before = mu.state(net)
    with pytest.raises(errors.LaneError) as caught:
        (mu.jit(call) if compiled else call)()
    assert caught.value.path == ("m.mean" if form == "argument" else "net.mean")
    assert str(caught.value).startswith(f"state `{caught.value.path}` (BatchStat)")
    assert "test_sharded.py" in str(caught.value.made_at)
    assert mu.state(net) == before


def test_the_fixes_of_the_refusal_run() -> None:
    v = mu.Variable(jnp.zeros(4))

    def f(x: Any) -> None:
        v.value = x

    options: dict[str, Any] = {"mesh": line(), "in_specs": P("d"), "out_specs": None}
    x = jnp.arange(16.0)
    with pytest.raises(errors.LaneError) as caught:
        mu.shard_map(f, **options)(x)
    cure = str(caught.value.cure)
    reduce, split = cure.split("`")[1], cure.split("`")[3]
    scope = {"jax": jax, "mu": mu, "P": P}

    def fixed(x: Any) -> None:
        v.value = eval(reduce, {**scope, "x": x})

    mu.shard_map(fixed, **options)(x)
    np.testing.assert_array_equal(v, x.reshape(4, 4).mean(0))
    name, _, value = split.partition("=")
    assert name == "states"
    mu.shard_map(f, states=eval(value, scope), **options)(x)
    np.testing.assert_array_equal(v, x)


def test_a_user_kind_in_the_fix() -> None:
    class Membrane(mu.Hidden):
        pass

    v = Membrane(jnp.zeros(2))
    with pytest.raises(errors.LaneError, match=r"mu\.StateSharding\(\{Membrane: P\('d'\), \.\.\.: P\(\)\}\)"):
        mu.shard_map(lambda x: v.set(x), mesh=line(), in_specs=P("d"), out_specs=None)(jnp.arange(8.0))


def test_a_device_value_that_is_overwritten_is_fine() -> None:
    v = mu.Variable(0.0)

    def f(x: Any) -> Any:
        v.value = x[0]
        y = v.value * 2
        v.value = jnp.float32(7)
        return y[None]

    out = mu.shard_map(f, mesh=line(), in_specs=P("d"), out_specs=P("d"))(jnp.arange(4.0))
    np.testing.assert_array_equal(out, 2 * jnp.arange(4.0))
    assert float(v) == 7


@pytest.mark.parametrize("what", ["attribute", "list", "deferred", "returned"])
def test_states_made_inside_are_refused(what: str) -> None:
    class Box(mu.Module):
        def __init__(self) -> None:
            self.items = [mu.Variable(0)]
            self.late = mu.Variable(init=lambda: jnp.zeros(3))

    box = Box()

    def f(x: Any) -> Any:
        box.items[0].value += 1
        if what == "attribute":
            box.new = mu.Variable(0)
        elif what == "list":
            box.items.append(mu.Variable(0))
        elif what == "deferred":
            return x * box.late.value.sum()
        else:
            return Net()
        return x

    out_specs = None if what == "returned" else P("d")
    with pytest.raises(errors.StructureError):
        mu.shard_map(f, mesh=line(), in_specs=P("d"), out_specs=out_specs)(XS)
    assert not hasattr(box, "new") and len(box.items) == 1 and int(box.items[0]) == 0
    assert "deferred" in repr(box.late)


def test_a_scratch_state_made_and_dropped_inside_is_fine() -> None:
    def f(x: Any) -> Any:
        scratch = mu.Variable(jnp.zeros(()))
        scratch.value = scratch + jnp.sum(x)
        return x * scratch.value

    out = mu.shard_map(f, mesh=line(), in_specs=P("d"), out_specs=P("d"))(jnp.arange(4.0))
    np.testing.assert_array_equal(out, jnp.arange(4.0) ** 2)


def test_keyword_arguments_are_refused() -> None:
    n = mu.Variable(0)
    f = mu.shard_map(lambda x: x + n.value, mesh=line(), in_specs=P("d"), out_specs=P("d"))
    with pytest.raises(errors.ArgumentError, match="keyword arguments"):
        f(x=jnp.arange(4))


def test_options_are_by_keyword() -> None:
    with pytest.raises(TypeError):
        mu.shard_map(lambda x: x, line(), P("d"), P("d"))
    with pytest.raises(TypeError):
        mu.shard_map(lambda x: x)


def test_two_specs_for_one_state_are_refused() -> None:
    v = mu.Variable(jnp.arange(8.0))
    f = mu.shard_map(lambda a, b: a + b, mesh=line(), in_specs=(P("d"), P()), out_specs=P("d"))
    with pytest.raises(errors.AxisError, match="asked for along two axes"):
        f(v, v)
    g = mu.shard_map(lambda a: a + 1, mesh=line(), in_specs=(P("d"),), out_specs=P("d"), states=[(v, P())])
    with pytest.raises(errors.AxisError, match="asked for along two axes"):
        g(v)


@pytest.mark.parametrize("spec", [P(), None])
def test_the_same_spec_in_two_spellings_is_one(spec: Any) -> None:
    v = mu.Variable(jnp.arange(8.0))
    f = mu.shard_map(lambda a, b: a.value + b.value, mesh=line(), in_specs=(P(), spec), out_specs=P())
    np.testing.assert_array_equal(f(v, v), 2 * jnp.arange(8.0))


@pytest.mark.parametrize("entry", [0, "d", ("d",), mu.Carry, jnp.zeros(2)])
def test_what_is_no_spec_in_state_sharding(entry: Any) -> None:
    with pytest.raises(errors.AxisError, match="is not a spec"):
        mu.StateSharding({...: entry})


@pytest.mark.parametrize("states", [0, "d", P("d"), mu.StateAxes({...: 0})])
def test_what_states_cannot_be(states: Any) -> None:
    v = mu.Variable(jnp.arange(4.0))
    with pytest.raises(errors.AxisError):
        mu.shard_map(lambda x: x + v, mesh=line(), in_specs=P("d"), out_specs=P("d"), states=states)(jnp.arange(4.0))


@pytest.mark.parametrize("spec", [0, "d", mu.StateAxes({...: 0}), mu.Carry])
def test_a_pair_that_says_no_spec(spec: Any) -> None:
    v = mu.Variable(jnp.arange(4.0))
    f = mu.shard_map(lambda x: x + v, mesh=line(), in_specs=P("d"), out_specs=P("d"), states=[(v, spec)])
    with pytest.raises(errors.AxisError):
        f(jnp.arange(4.0))


@pytest.mark.parametrize("wrong", ["axis", "divisible", "rank"])
def test_specs_that_do_not_fit_a_state(wrong: str) -> None:
    """As for arrays, they are JAX's errors; nothing is written."""
    v, n = mu.Variable(jnp.arange(6.0)), mu.Variable(0)
    spec = {"axis": P("zz"), "divisible": P("d"), "rank": P(None, "d")}[wrong]

    def f(x: Any) -> Any:
        n.value += 1
        return x * v.value.sum()

    with pytest.raises(ValueError):
        mu.shard_map(f, mesh=line(), in_specs=P("d"), out_specs=P("d"), states={v: spec})(jnp.arange(4.0))
    assert int(n) == 0


def test_a_frozen_state_is_not_written() -> None:
    net = Net()
    with mu.freeze(net, mu.Hidden), pytest.raises(errors.FrozenStateError, match="last"):
        apply("argument", net)(XS)
    assert int(net.calls) == 0
    apply("argument", net)(XS)
    assert int(net.calls) == 1


def test_raw_shard_map_around_a_write_is_refused() -> None:
    n = mu.Variable(0)

    def f(x: Any) -> Any:
        n.value += 1
        return x

    with pytest.raises(errors.TraceLevelError):
        jax.shard_map(f, mesh=line(), in_specs=P("d"), out_specs=P("d"))(XS)
    with pytest.raises(errors.TraceLevelError):
        mu.jit(lambda: jax.shard_map(f, mesh=line(), in_specs=P("d"), out_specs=P("d"))(XS))()
    assert int(n) == 0


# -- exceptions in the middle ----------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
def test_an_exception_leaves_all_as_before(compiled: bool) -> None:
    net, rngs, log = Net(), mu.Rngs(0), {"a": mu.Variable(0)}

    def f(x: Any) -> Any:
        y = net(x) + jax.random.uniform(rngs())
        net.extra = 3
        log["b"] = mu.Variable(1)
        raise KeyError("now") if y.shape else y

    g = mu.shard_map(f, mesh=line(), in_specs=P("d"), out_specs=P("d"), states=STATES)
    g = mu.jit(g) if compiled else g
    before = mu.state((net, rngs))
    values = [cell.value for cell in mu.variables(net).values()]
    for _ in range(2):
        with pytest.raises(KeyError, match="now"):
            g(XS)
        assert mu.state((net, rngs)) == before
        assert not hasattr(net, "extra") and list(log) == ["a"]
        assert all(a is b.value for a, b in zip(values, mu.variables(net).values(), strict=True))


def test_an_error_of_jax_after_the_function_has_run() -> None:
    net = Net()
    before = mu.state(net)
    with pytest.raises(ValueError):
        apply("argument", net, out_specs=P())(XS)
    with pytest.raises(ValueError):
        apply("closure", net, out_specs=(P("d"), P()))(XS)
    assert mu.state(net) == before


# -- what is hard ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", ["for_loop", "map", "stack"])
def test_loops_inside_over_what_differs_by_device(loop: str) -> None:
    w = mu.Param(jnp.arange(3.0))
    n = mu.Variable(0)
    stack = mu.Variable(jnp.arange(16.0).reshape(2, 8))

    def body(x: Any) -> Any:
        n.value += 1
        return x @ w.value

    def f(xs: Any) -> Any:
        if loop == "for_loop":
            return mu.for_loop(body, xs)
        if loop == "map":
            return mu.map(body, xs)
        return mu.scan(lambda c, s: (c, body(jnp.ones((2, 3))) * s.value), 0, stack)[1]

    states = {stack: P(None, "d")}
    xs = jnp.stack([XS, 2 * XS])
    g = mu.shard_map(f, mesh=line(), in_specs=P(None, "d"), out_specs=P(None, "d"), states=states)
    expected = 3 * jnp.arange(16.0).reshape(2, 8) if loop == "stack" else xs @ jnp.arange(3.0)
    np.testing.assert_allclose(mu.jit(g)(xs), expected, rtol=1e-5, atol=1e-6)
    assert int(n) == 2


@pytest.mark.parametrize("loop", ["fori_loop", "while_loop", "switch"])
def test_loops_inside(loop: str) -> None:
    n, total = mu.Variable(0), mu.Variable(0.0)

    def body(x: Any) -> Any:
        n.value += 1
        total.value += jax.lax.psum(jnp.sum(x), "d")
        return 2 * x

    def f(x: Any) -> Any:
        if loop == "fori_loop":
            return mu.fori_loop(0, 3, lambda i, x: body(x), x)
        if loop == "while_loop":
            return mu.while_loop(lambda x: n.value < 3, body, x)
        return mu.switch(n.value, [lambda x: x, lambda x: x + 1, body], x)

    if loop == "switch":
        n.value = jnp.int32(2)
    x = jnp.arange(8.0)
    out = mu.jit(mu.shard_map(f, mesh=line(), in_specs=P("d"), out_specs=P("d")))(x)
    np.testing.assert_array_equal(out, (2 if loop == "switch" else 8) * x)
    assert int(n) == 3
    assert float(total) == (28 if loop == "switch" else 28 * 7)


def test_a_state_that_another_shape_is_written_to() -> None:
    v = mu.Variable(jnp.zeros(2))
    f = mu.jit(mu.shard_map(lambda x: v.set(jax.lax.psum(x, "d")), mesh=line(), in_specs=P("d"), out_specs=None))
    f(jnp.arange(16.0))
    np.testing.assert_array_equal(v, jnp.arange(16.0).reshape(4, 4).sum(0))
    f(jnp.arange(8.0))
    np.testing.assert_array_equal(v, jnp.arange(8.0).reshape(4, 2).sum(0))


def test_the_optimizer_in_a_data_parallel_step() -> None:
    net = Net()
    optimizer = mu.Optimizer(net, optax.sgd(0.1, momentum=0.9))
    rows = jnp.ones(8)

    def step(x: Any, y: Any) -> Any:
        loss, grads = mu.value_and_grad(lambda: jax.lax.pmean(jnp.mean((x @ net.w.value - y) ** 2), "d"), of=net)()
        optimizer.update(grads)
        return loss

    f = mu.jit(mu.shard_map(step, mesh=line(), in_specs=(P("d"), P("d")), out_specs=P()))
    losses = [float(f(XS, rows)) for _ in range(3)]

    tx, w = optax.sgd(0.1, momentum=0.9), jnp.arange(3.0) + 1
    opt_state = tx.init(w)
    for expected in losses:
        loss, grads = jax.value_and_grad(lambda w: jnp.mean((XS @ w - rows) ** 2))(w)
        np.testing.assert_allclose(expected, loss, rtol=1e-5)
        updates, opt_state = tx.update(grads, opt_state, w)
        w = optax.apply_updates(w, updates)
    np.testing.assert_allclose(net.w, w, rtol=1e-4)
    assert int(optimizer.step) == 3


def test_a_replicated_gradient_is_summed_by_jax() -> None:
    """With the types checked, a gradient of a replicated parameter is the sum over devices, as by hand."""
    w = mu.Param(jnp.float32(2))
    x = jnp.arange(8.0)
    got = mu.Variable(0.0)

    def f(x: Any) -> None:
        (grads,) = jax.tree.leaves(mu.grad(lambda: jnp.sum(w * x), of=w)())
        got.value = grads

    mu.jit(mu.shard_map(f, mesh=line(), in_specs=P("d"), out_specs=None))(x)
    expected = jax.shard_map(
        lambda w, x: jax.grad(lambda w: jnp.sum(w * x))(w), mesh=line(), in_specs=(P(), P("d")), out_specs=P()
    )(jnp.float32(2), x)
    np.testing.assert_allclose(got, expected)
