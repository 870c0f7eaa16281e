"""`mu.eval_shape` and `mu.make_jaxpr`: nothing is computed, allocated or written."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import mutatis as mu
from mutatis import errors


class Net(mu.Module):
    def __init__(self, size: int = 3) -> None:
        self.w = mu.Param(jnp.ones((size, size)))
        self.x_tied = self.w
        self.n = mu.Variable(0)
        self.table = jnp.zeros(size)
        self.rngs = mu.Rngs(0)
        self.parts = [1]

    def __call__(self, x: Any) -> Any:
        self.n += 1
        return x @ self.w


HUGE = 1_000_000


def test_a_module_of_shapes() -> None:
    net = mu.eval_shape(lambda: Net(HUGE))
    assert net.w.value == jax.ShapeDtypeStruct((HUGE, HUGE), jnp.float32)
    assert net.w.shape == (HUGE, HUGE)
    assert net.x_tied is net.w
    assert net.table.shape == (HUGE,)
    assert net.parts == [1]
    assert mu.state(net)["n"].dtype == jnp.int32
    assert "Param(float32[1000000,1000000])" in repr(net)
    assert mu.graphdef(mu.eval_shape(Net)) == mu.graphdef(Net())


def test_a_module_of_shapes_can_be_filled() -> None:
    abstract, net = mu.eval_shape(Net), Net()
    mu.update(abstract, mu.state(net))
    assert mu.state(abstract) == mu.state(net)
    assert abstract(jnp.ones((1, 3))).shape == (1, 3)
    again = mu.merge(mu.graphdef(abstract), mu.state(net))
    assert int(mu.jit(again)(jnp.ones((1, 3)))[0, 0]) == 3


@pytest.mark.parametrize("form", ["argument", "closure", "module", "method"])
def test_nothing_is_written(form: str) -> None:
    net = Net()
    before, shown = mu.state(net), repr(net)

    def f(net: Net, x: Any) -> Any:
        net.flag = True
        net.parts.append(2)
        net.extra = mu.Cache(x)
        net.rngs()
        return {"y": net(x), "net": net}

    x = jnp.ones((2, 3))
    out = {
        "argument": lambda: mu.eval_shape(f, net, x),
        "closure": lambda: mu.eval_shape(lambda x: f(net, x), x),
        "module": lambda: {"y": mu.eval_shape(net, x), "net": net},
        "method": lambda: {"y": mu.eval_shape(net.__call__, x=x), "net": net},
    }[form]()
    assert out["y"].shape == (2, 3)
    assert out["net"] is net
    assert mu.state(net) == before
    assert repr(net) == shown


def test_eval_shape_inside_jit() -> None:
    net = Net()
    shapes: list[Any] = []

    @mu.jit
    def step(x: Any) -> Any:
        shapes.append(mu.eval_shape(net, x))
        return net(x)

    step(jnp.ones((2, 3)))
    assert shapes == [jax.ShapeDtypeStruct((2, 3), jnp.float32)]
    assert int(net.n) == 1


def test_deferred_states_stay_deferred() -> None:
    net = mu.Module()
    net.h = mu.Hidden(init=lambda: jnp.zeros(2))
    assert mu.eval_shape(lambda: net.h.value).shape == (2,)
    assert net.h.deferred
    assert mu.make_jaxpr(lambda: net.h.value)().out_avals[0].shape == (2,)
    assert net.h.deferred


def test_an_exception_in_the_middle() -> None:
    net = Net()
    for f in (
        lambda: mu.eval_shape(lambda: (net(1.0), 1 / 0)),
        lambda: mu.make_jaxpr(lambda: (setattr(net, "f", 1), 1 / 0))(),
    ):
        with pytest.raises((ZeroDivisionError, TypeError, ValueError)):
            f()
    assert int(net.n) == 0
    assert not hasattr(net, "f")


# -- make_jaxpr --------------------------------------------------------------------------------------------------


def test_inputs_are_states_then_arguments_and_outputs_results_then_writes() -> None:
    n, w = mu.Variable(0), mu.Param(jnp.ones(2))

    def f(x: Any) -> Any:
        n.value += 1
        return w.value * x

    jaxpr = mu.make_jaxpr(f)(3.0)
    assert [str(v.aval) for v in jaxpr.jaxpr.invars] == ["i32[]", "f32[2]", "f32[]"] or [
        v.aval.shape for v in jaxpr.jaxpr.invars
    ] == [(), (2,), ()]
    assert [v.aval.shape for v in jaxpr.jaxpr.outvars] == [(2,), ()]
    assert int(n) == 0
    hand = jax.make_jaxpr(lambda n, w, x: (w * x, n + 1))(0, w.value, 3.0)
    assert [e.primitive for e in jaxpr.eqns] == [e.primitive for e in hand.eqns] or len(jaxpr.eqns) == len(hand.eqns)


def test_options_of_make_jaxpr() -> None:
    n = mu.Variable(0)

    def f(x: Any, twice: bool) -> Any:
        n.value += 1
        return {"y": x * (2 if twice else 1)}

    jaxpr, shapes = mu.make_jaxpr(f, static_argnums=1, return_shape=True)(jnp.ones(3), True)
    assert shapes["y"].shape == (3,)
    assert len(jaxpr.in_avals) == 2
    jaxpr = mu.make_jaxpr(lambda x: jax.lax.psum(x, "i"), axis_env=[("i", 2)])(1.0)
    assert "psum" in str(jaxpr)


def test_make_jaxpr_of_a_transformed_function() -> None:
    net = Net()
    assert "jit" in str(mu.make_jaxpr(mu.jit(net))(jnp.ones((2, 3))))
    jaxpr = mu.make_jaxpr(mu.grad(lambda m: m(jnp.ones((2, 3))).sum()))(net)
    assert len(jaxpr.out_avals) == 2
    assert int(net.n) == 0


def test_a_state_written_in_a_raw_jaxpr_is_refused() -> None:
    net = Net()
    with pytest.raises(errors.TraceLevelError):
        jax.make_jaxpr(net)(jnp.ones((2, 3)))
    assert int(net.n) == 0


def test_calling_a_module_of_shapes() -> None:
    net = mu.eval_shape(lambda: Net(HUGE))
    out = mu.eval_shape(net, jax.ShapeDtypeStruct((8, HUGE), jnp.float32))
    assert out == jax.ShapeDtypeStruct((8, HUGE), jnp.float32)


def test_eval_shape_of_transforms() -> None:
    net = Net()
    assert mu.eval_shape(lambda: mu.jit(net)(jnp.ones((2, 3)))).shape == (2, 3)
    grads = mu.eval_shape(lambda: mu.grad(lambda m: m(jnp.ones((2, 3))).sum())(net))
    assert isinstance(grads, mu.State)
    assert jax.tree.leaves(grads)[0].shape == (3, 3)
    layers = mu.eval_shape(lambda: mu.vmap(lambda _: Net())(jnp.arange(4)))
    assert layers.w.shape == (4, 3, 3)
    assert mu.eval_shape(lambda: mu.for_loop(lambda x: net(x), jnp.ones((5, 2, 3)))).shape == (5, 2, 3)
    assert int(net.n) == 0
