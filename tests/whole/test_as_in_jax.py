"""What raw JAX does with functions, loops and options, done with states: small doors that have to open the same way."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import mutatis as mu
from mutatis import errors, metrics

XS = jnp.arange(1.0, 5.0)


class Net(mu.Module):
    def __init__(self) -> None:
        self.w = mu.Param(jnp.ones(2))
        self.n = mu.Variable(0)
        self.rngs = mu.Rngs(0)

    def __call__(self, x: Any) -> Any:
        self.n.value = self.n.value + 1
        return self.w.value * x


# -- states that are first used in a loop or branch --------------------------------------------------------------------

FIRST: dict[str, Any] = {
    "for_loop": lambda f: mu.for_loop(f, XS),
    "scan": lambda f: mu.scan(lambda c, x: (c, f(x)), None, XS)[1],
    "nested": lambda f: mu.for_loop(lambda x: mu.for_loop(f, x[None]), XS),
    "while_loop": lambda f: mu.while_loop(lambda i: i < 4, lambda i: (f(XS[i]), i + 1)[1], 0),
    "fori_loop": lambda f: mu.fori_loop(0, 4, lambda i, c: (f(XS[i]), c)[1], 0),
    "map": lambda f: mu.map(f, XS),
    "cond": lambda f: [mu.cond(True, f, lambda x: x, x) for x in XS],
    "switch": lambda f: [mu.switch(0, [f, lambda x: x], x) for x in XS],
    "custom_vjp": lambda f: [mu.jit(lambda x: ruled(f)(x))(x) for x in XS],
    "grad": lambda f: mu.for_loop(lambda x: mu.grad(f)(x), XS),
}


def ruled(f: Any) -> Any:
    g = mu.custom_vjp(f)
    g.defvjp(lambda x: (f(x), None), lambda _, g: (g,))
    return g


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", FIRST)
def test_a_state_with_init_may_be_first_used_inside(name: str, compiled: bool) -> None:
    h = mu.Hidden(init=lambda: jnp.zeros(()))

    def f(x: Any) -> Any:
        h.value = h.value + x
        return h.value

    run = lambda: (FIRST[name](f), None)[1]  # noqa: E731
    (mu.jit(run) if compiled else run)()
    assert float(h) == 10.0
    (mu.jit(run) if compiled else run)()
    assert float(h) == 20.0


def test_a_state_that_only_one_of_several_functions_uses() -> None:
    h, g = mu.Hidden(init=1.0), mu.Hidden(init=0)
    mu.cond(False, lambda: h.set(h.value * 2), lambda: None)
    assert float(h) == 1.0, "there, and not written by the other branch"
    mu.while_loop(lambda i: i < 3 + g.value, lambda i: i + 1, 0)
    f = mu.custom_vjp(lambda x: x)
    late = mu.Hidden(init=5.0)
    f.defvjp(lambda x: (x * late.value, late.value), lambda r, g: (g * r,))
    assert float(mu.jit(mu.grad(f))(1.0)) == 5.0


@pytest.mark.parametrize("name", ["for_loop", "cond", "while_loop"])
def test_a_state_that_is_only_read_inside(name: str) -> None:
    h = mu.Hidden(init=2.0)
    total = mu.Variable(0.0)
    FIRST[name](lambda x: (total.set(total.value + x * h.value), x)[1])
    assert (float(h), float(total)) == (2.0, 20.0)


@pytest.mark.parametrize("name", ["for_loop", "cond", "while_loop"])
def test_a_layer_that_takes_its_size_from_the_input_is_still_refused(name: str) -> None:
    layer = mu.nn.Linear(None, 3, rngs=mu.Rngs(0))
    with pytest.raises(errors.StructureError, match="was created in"):
        FIRST[name](lambda x: (layer(jnp.ones(2)), x)[1])


# -- closed-over arrays in ordinary Python ------------------------------------------------------------------------------


def bodies(n: Any, flag: Any, table: Any) -> list[Any]:
    return [
        lambda x: x * (2 if flag else 3),
        lambda x: sum((x for _ in range(int(n))), jnp.zeros(())),
        lambda x: x * [1.0, 2.0, 4.0, 8.0][n],
        lambda x: x * float(np.asarray(table).sum()),
    ]


@pytest.mark.parametrize("index", range(4))
def test_python_may_look_at_a_captured_array(index: int) -> None:
    for n, flag in ((3, True), (2, False)):
        body = bodies(jnp.int32(n), jnp.asarray(flag), jnp.arange(float(n)))[index]
        expected = jnp.stack([body(x) for x in XS])
        np.testing.assert_allclose(mu.for_loop(body, XS), expected)
        np.testing.assert_allclose(mu.scan(lambda c, x, body=body: (c, body(x)), None, XS)[1], expected)
        np.testing.assert_allclose(mu.map(body, XS), expected)
        np.testing.assert_allclose(mu.cond(True, body, lambda x: x, XS[2]), expected[2])


def test_another_captured_array_still_compiles_nothing() -> None:
    traces: list[int] = []

    def run(a: Any) -> Any:
        return mu.for_loop(lambda x: (traces.append(1), x * a)[1], XS)

    for k in range(3):
        np.testing.assert_allclose(run(jnp.float32(k)), k * XS)
    assert len(traces) == 1


def test_a_look_at_the_slice_is_an_error_as_ever() -> None:
    a = jnp.float32(2)
    with pytest.raises(jax.errors.TracerBoolConversionError):
        mu.for_loop(lambda x: a if x > 1 else x, XS)


# -- disable_jit -----------------------------------------------------------------------------------------------------------


def looks(net: Any, x: Any) -> Any:
    """Python looks at the values."""
    net(x)
    return x * 2.0 if x > 2 else x


DISABLED: dict[str, Any] = {
    "scan": lambda net: mu.scan(lambda c, x: (c + looks(net, x), x), 0.0, XS),
    "reverse": lambda net: mu.scan(lambda c, x: (c + looks(net, x), c), 0.0, XS, reverse=True),
    "for_loop": lambda net: mu.for_loop(lambda x: looks(net, x), XS),
    "map": lambda net: mu.map(lambda x: looks(net, x), XS),
    "while_loop": lambda net: mu.while_loop(lambda c: bool(c < 4), lambda c: c + looks(net, c) * 0 + 1, 1.0),
    "fori_loop": lambda net: mu.fori_loop(0, 4, lambda i, c: c + looks(net, jnp.float32(i)), 0.0),
    "fori_loop of arrays": lambda net: mu.fori_loop(0, jnp.int32(4), lambda i, c: c + looks(net, jnp.float32(i)), 0.0),
    "cond": lambda net: mu.cond(jnp.array(True), lambda x: looks(net, x), lambda x: x, XS[3]),
    "switch": lambda net: mu.switch(jnp.int32(7), [lambda x: x, lambda x: looks(net, x)], XS[3]),
    "jit": lambda net: mu.jit(lambda: mu.for_loop(lambda x: looks(net, x), XS))(),
    "checkpointed": lambda net: mu.for_loop(lambda x: looks(net, x), XS, checkpoint_every=2),
}


def eager(name: str, net: Any) -> int:
    return {"while_loop": 3, "cond": 1, "switch": 1}.get(name, 4)


@pytest.mark.parametrize("name", DISABLED)
def test_python_runs_loops_and_branches(name: str) -> None:
    net, twin = Net(), Net()
    with jax.disable_jit():
        out = DISABLED[name](net)
    assert int(net.n) == eager(name, twin)
    if name in ("scan", "for_loop", "reverse"):
        step = lambda c, x: (c + jnp.where(x > 2, x * 2, x), x if name == "scan" else c)  # noqa: E731
        want = jax.lax.scan(step, 0.0, XS, reverse=name == "reverse")
        jax.tree.map(np.testing.assert_allclose, out, jnp.where(XS > 2, XS * 2, XS) if name == "for_loop" else want)


def everything(net: Any) -> Any:
    layers = mu.vmap(lambda k: mu.nn.Linear(2, 2, rngs=mu.Rngs(k)))(jax.random.split(jax.random.key(0), 3))

    def body(carry: Any, x: Any) -> Any:
        layer, k = x
        mu.sow(net, "seen", carry)
        net(k)
        layer.kernel.value = layer.kernel.value * 2
        return carry + layer(jnp.ones(2)).sum() + jax.random.normal(net.rngs()), (carry, net.n)

    def f() -> Any:
        return mu.scan(body, 0.0, (layers, XS[:3]))

    return f, layers


def test_what_a_loop_means_is_the_same() -> None:
    results = []
    for disabled in (False, True):
        net = Net()
        f, layers = everything(net)
        with jax.disable_jit(disabled):
            out = f()
        results.append(
            (
                out,
                layers.kernel.value,
                int(net.n),
                mu.pop(net, mu.Intermediate)["seen"],
                net.rngs.default.value["count"],
            )
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *results)


def test_a_body_that_fails_in_the_middle_leaves_all_as_it_was() -> None:
    net = Net()

    def body(x: Any) -> None:
        net(x)
        mu.sow(net, "seen", x)
        if x > 2:
            raise KeyError("in the middle")

    with jax.disable_jit(), pytest.raises(KeyError):
        mu.for_loop(body, XS)
    assert int(net.n) == 0 and not hasattr(net, "seen")


@pytest.mark.parametrize("run", [lambda f: mu.for_loop(f, XS), lambda f: mu.cond(True, f, f, XS[0])])
def test_what_is_refused_is_refused(run: Any) -> None:
    net: Any = mu.Module()

    def body(x: Any) -> None:
        net.new = mu.Variable(x)

    with jax.disable_jit(), pytest.raises(errors.StructureError, match="was changed in"):
        run(body)
    assert not hasattr(net, "new")


def test_tracers_are_not_run_by_python() -> None:
    net = Net()
    with jax.disable_jit():
        out = mu.vmap(lambda x: mu.cond(x > 2, lambda: x * net.w.value[0], lambda: -x))(XS)
        grown = mu.vmap(lambda x: mu.while_loop(lambda c: c < 4, lambda c: c * 2, x))(XS)
    np.testing.assert_allclose(out, jnp.where(XS > 2, XS, -XS))
    np.testing.assert_allclose(grown, [4, 4, 6, 4])


# -- carries that would promote --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", [0, jnp.int32(0)])
def test_a_carry_that_would_promote_is_an_error_with_the_cast(init: Any) -> None:
    with jax.numpy_dtype_promotion("standard"):
        for run in (
            lambda: mu.scan(lambda c, x: (c + x, None), init, XS),
            lambda: mu.while_loop(lambda c: c < 3, lambda c: c + jnp.float32(1), init),
            lambda: mu.fori_loop(0, 3, lambda i, c: c + jnp.float32(i), init),
        ):
            with pytest.raises(
                errors.StateTypeError, match=r"`x\.astype\(jnp\.float32\)`.*`jnp\.float32\(x\)`"
            ) as caught:
                run()
            assert "astype(jnp.int32)" in str(caught.value)
        assert float(mu.scan(lambda c, x: (c + x, None), jnp.float32(init), XS)[0]) == 10


# -- jit's own methods -------------------------------------------------------------------------------------------------------


def test_trace_eval_shape_and_clear_cache(traces: Any) -> None:
    net = Net()
    kept: list[Any] = []

    def f(k: int, x: Any) -> Any:
        if not kept:
            kept.append(Net())
        return Net(), net, net(x) * k, jax.random.key(k), kept[0].n

    step = mu.jit(traces.count(f), static_argnums=0)
    shapes = step.eval_shape(2, jnp.ones(2))
    assert isinstance(shapes[0].w.value, jax.ShapeDtypeStruct) and shapes[1] is net and shapes[2].shape == (2,)
    assert jax.dtypes.issubdtype(shapes[3].dtype, jax.dtypes.prng_key)
    assert (int(net.n), kept) == (0, []), "nothing is written"
    traced = step.trace(2, jnp.ones(2))
    assert traced.out_info[2].shape == (2,) and len(traced.jaxpr.out_avals) > 4
    compiled = traced.lower().compile()
    assert float(compiled(2, jnp.ones(2))[2][0]) == 2 and (int(net.n), len(kept)) == (1, 1)
    assert traces.total == 1
    step(2, jnp.ones(2))
    before = traces.total
    step.clear_cache()
    step(2, jnp.ones(2))
    step(2, jnp.ones(2))
    assert traces.total == before + 1
    assert int(net.n) == 4


# -- GraphDefs ---------------------------------------------------------------------------------------------------------------


def test_graphdefs_go_through_raw_jax() -> None:
    layer = mu.nn.Linear(2, 3, rngs=mu.Rngs(0))
    definition, state = mu.split(layer)
    assert jax.tree.leaves(definition) == []
    made, values = jax.jit(lambda: mu.split(mu.nn.Linear(2, 3, rngs=mu.Rngs(0))))()
    assert made == definition and mu.merge(made, values)(jnp.ones(2)).shape == (3,)
    apply = lambda definition, state, x: mu.merge(definition, state)(x)  # noqa: E731
    want = layer(jnp.ones(2))
    for jitted in (jax.jit(apply), jax.jit(apply, static_argnums=0), mu.jit(apply), mu.jit(apply, static_argnums=0)):
        np.testing.assert_allclose(jitted(definition, state, jnp.ones(2)), want)
    doubled = jax.tree.map(lambda x: 2 * x, (definition, state))
    np.testing.assert_allclose(mu.merge(*doubled)(jnp.ones(2)), 2 * want)
    _, (passed, _) = jax.lax.scan(lambda c, _: (c, None), (definition, state), length=2)[::-1]
    assert passed == definition


# -- checkify ------------------------------------------------------------------------------------------------------------------


def test_checkify_by_the_cure_that_its_error_names() -> None:
    net = Net()

    def step(x: Any) -> Any:
        checkify.check(x > 0, "negative")
        return net(x)

    with pytest.raises(errors.TraceLevelError, match=r"mu\.functionalize"):
        mu.jit(lambda x: checkify.checkify(step)(x))(1.0)
    pure, _ = mu.functionalize(step, of=net)

    @mu.jit
    def checked(x: Any) -> Any:
        error, (out, state) = checkify.checkify(pure)(mu.state(net), x)
        mu.update(net, state)
        return error, out

    error, out = checked(2.0)
    assert error.get() is None and float(out[0]) == 2
    error, _ = checked(-2.0)
    assert "negative" in error.get() and int(net.n) == 2


# -- small ones ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argnums", [0.5, (0.5,), "x", None])
@pytest.mark.parametrize("derive", [mu.grad, mu.value_and_grad, mu.jacrev, mu.jacfwd, mu.hessian])
def test_argnums_that_are_none(derive: Any, argnums: Any) -> None:
    with pytest.raises(errors.ArgumentError, match="no position of an argument"):
        derive(lambda x: x * 1.0, argnums=argnums)(1.0)
    assert float(derive(lambda x: x**3, argnums=np.int64(0))(2.0) if derive is mu.grad else 12.0) == 12.0


@pytest.mark.parametrize(
    ("shape", "spec", "dims"),
    [((4, 3), P("x", None), ()), ((4, 2), P("x", None), (1,)), ((2, 4), P(None, "x"), (1,))],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_dropout_on_explicit_axes(shape: Any, spec: Any, dims: Any, compiled: bool) -> None:
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    plain = mu.nn.Dropout(0.5, broadcast_dims=dims, rngs=mu.Rngs(0))(jnp.ones(shape))
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones(shape), NamedSharding(mesh, spec))
        layer = mu.nn.Dropout(0.5, broadcast_dims=dims, rngs=mu.Rngs(0))
        y = (mu.jit(layer) if compiled else layer)(x)
    assert y.sharding.spec == spec
    assert set(np.unique(np.asarray(y))) <= {0.0, 2.0}
    assert y.shape == plain.shape


def test_masks_by_the_names_of_metrics() -> None:
    every = metrics.MultiMetric(a=metrics.Accuracy(), b=metrics.Accuracy(), loss=metrics.Average("loss"))
    batch = {"logits": jnp.eye(2), "labels": jnp.array([0, 0]), "loss": jnp.array([1.0, 3.0])}
    every.update(**batch, mask={"a": jnp.array([1, 0]), "loss": jnp.array([0, 1])})
    assert {name: float(value) for name, value in every.compute().items()} == {"a": 1.0, "b": 0.5, "loss": 3.0}
    with pytest.raises(errors.ArgumentError, match="no metric `c`"):
        every.update(**batch, mask={"c": jnp.array([1, 0])})
    every.reset()
    every.update(**batch, mask=jnp.array([1, 0]))
    assert {name: float(value) for name, value in every.compute().items()} == {"a": 1.0, "b": 1.0, "loss": 1.0}


@pytest.mark.parametrize("way", ["jit", "bound", "grad", "remat", "scan", "for_loop", "vmap", "made inside"])
def test_a_module_is_traced_once_on_its_first_call(way: str) -> None:
    count: list[int] = []

    class Counted(Net):
        def __call__(self, x: Any) -> Any:
            count.append(1)
            return super().__call__(x).sum()

        def call(self, x: Any) -> Any:
            self.late = mu.Cache(x)
            return self(x)

    net = Counted()
    {
        "jit": lambda: mu.jit(net)(1.0),
        "bound": lambda: mu.jit(net.call)(1.0),
        "grad": lambda: mu.jit(lambda x: mu.grad(lambda net: net(x))(net))(1.0),
        "remat": lambda: mu.jit(mu.remat(net))(1.0),
        "scan": lambda: mu.scan(lambda c, x: (c, net(x)), None, XS),
        "for_loop": lambda: mu.for_loop(net, XS),
        "vmap": lambda: mu.jit(mu.vmap(net))(XS),
        "made inside": lambda: mu.jit(lambda x: Counted()(x))(1.0),
    }[way]()
    assert len(count) == 1
