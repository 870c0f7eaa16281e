"""`mu.collect`: auxiliary losses beside those that a function returns, under every transform, and nothing is left."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis.errors import ArgumentError, StructureError

XS = jnp.arange(1.0, 4.0)


class Layer(mu.Module):
    def __init__(self, w: float = 2.0) -> None:
        self.w = mu.Param(jnp.float32(w))
        self.calls = mu.Variable(0)

    def __call__(self, x: Any) -> Any:
        self.calls += 1
        mu.sow(self, "aux", self.w.value * x**2)
        return self.w.value * x


def by_hand(w: Any, x: Any) -> tuple[Any, Any]:
    return w * x, w * x**2


# How a layer is called for each of XS, with the sum of what comes out.
WITHIN: dict[str, Any] = {
    "eager": lambda f: sum(f(x) for x in XS),
    "jit": lambda f: sum(mu.jit(f)(x) for x in XS),
    "for_loop": lambda f: jnp.sum(mu.for_loop(f, XS)),
    "scan": lambda f: jnp.sum(mu.scan(lambda c, x: (c, f(x)), None, XS)[1]),
    "vmap": lambda f: jnp.sum(mu.vmap(f)(XS)),
    "map": lambda f: jnp.sum(mu.map(f, XS)),
    "remat": lambda f: sum(mu.remat(f)(x) for x in XS),
    "remat of scan": lambda f: mu.remat(lambda: jnp.sum(mu.for_loop(f, XS)))(),
    "scan of remat": lambda f: jnp.sum(mu.for_loop(mu.remat(f), XS)),
    "vmap of scan": lambda f: jnp.sum(mu.vmap(lambda x: mu.for_loop(f, x[None]))(XS)),
}  # fmt: skip


@pytest.mark.parametrize("around", [lambda f: f, mu.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("name", WITHIN)
def test_beside_a_function_that_returns_it(name: str, around: Any) -> None:
    net = Layer()

    def loss(net: Layer) -> Any:
        layer = net if "vmap" not in name else lambda x: quiet(net, x)
        out, aux = mu.collect(lambda: WITHIN[name](layer), "aux")()
        return out + 10 * aux

    def quiet(net: Layer, x: Any) -> Any:  # lanes may not count into one state
        mu.sow(net, "aux", net.w.value * x**2)
        return net.w.value * x

    def wanted(w: Any) -> Any:
        outs, auxes = zip(*(by_hand(w, x) for x in XS), strict=True)
        return sum(outs) + 10 * sum(auxes)

    value, gradient = around(mu.value_and_grad(loss))(net)
    np.testing.assert_allclose(value, wanted(jnp.float32(2)), rtol=1e-6)
    np.testing.assert_allclose(gradient["w"], jax.grad(wanted)(jnp.float32(2)), rtol=1e-6)
    assert [*mu.state(net)] == [("calls",), ("w",)], "nothing is left"
    assert int(net.calls) == (0 if "vmap" in name else 3)


def test_a_total_for_each_lane_and_around_a_compiled_function(traces: Any) -> None:
    net = Layer()
    quiet = lambda x: mu.sow(net, "aux", net.w.value * x)  # noqa: E731
    np.testing.assert_allclose(mu.vmap(mu.collect(quiet, "aux"))(XS)[1], 2 * XS)
    step = mu.collect(mu.jit(traces.count(lambda x: net(net(x)))), "aux")
    for x in XS:
        np.testing.assert_allclose(step(x)[1], 2 * x**2 + 2 * (2 * x) ** 2)
    assert traces.total == 1
    assert not mu.variables(net, mu.Intermediate)


@pytest.mark.parametrize(("reduce", "wanted"), [(jnp.mean, 28 / 3), (jnp.max, 18), (lambda v: v.shape, (3,))])
def test_other_reductions(reduce: Any, wanted: Any) -> None:
    total = mu.collect(lambda: mu.for_loop(Layer(), XS), "aux", reduce=reduce)()[1]
    assert total == pytest.approx(wanted)


def test_names_are_apart_and_the_innermost_takes() -> None:
    net = Layer()

    def both(x: Any) -> Any:
        mu.sow(net, "other", x)
        return net(x)

    (out, inner), outer = mu.collect(mu.collect(both, "aux"), "aux")(3.0)
    assert (float(out), float(inner), float(outer)) == (6, 18, 0)
    (_, aux), other = mu.collect(mu.collect(both, "aux"), "other")(3.0)
    assert (float(aux), float(other)) == (18, 3)
    assert [float(v) for v in mu.pop(net, mu.Intermediate)["other"]] == [3.0], "as ever, what nobody collects"


def test_trees_and_dtypes() -> None:
    def f() -> None:
        net = mu.Module()
        mu.sow(net, "aux", {"a": jnp.ones((2, 2), jnp.bfloat16), "b": 1.5})
        mu.sow(net, "aux", 2)

    total = mu.collect(f, "aux")()[1]
    assert float(total) == 7.5 and total.dtype == jnp.float32


def test_an_error_in_the_middle() -> None:
    net = Layer()

    def fail(x: Any) -> None:
        net(x)
        raise KeyError

    with pytest.raises(KeyError):
        mu.jit(mu.collect(fail, "aux"))(1.0)
    net(1.0)
    assert len(mu.pop(net, mu.Intermediate)["aux"]) == 1 and int(net.calls) == 1


def test_as_a_pure_function_and_in_a_transaction() -> None:
    net = Layer()
    collected = mu.collect(net, "aux")
    pure, state = mu.functionalize(collected, of=net)
    (out, total), new = jax.jit(pure)(state, 3.0)
    assert (float(out), float(total), int(new["calls"])) == (6, 18, 1) and new.keys() == state.keys()
    with mu.transaction(net):
        assert float(collected(3.0)[1]) == 18
    assert int(net.calls) == 1


@pytest.mark.parametrize(
    "inside", [lambda f, x: mu.cond(x > 0, f, lambda x: x, x), lambda f, x: mu.switch(0, [f, f], x)]
)
def test_branches_refuse(inside: Any) -> None:
    net = Layer()
    with pytest.raises(StructureError, match="a value was kept in a branch"):
        mu.collect(lambda x: inside(net, x), "aux")(1.0)
    assert int(net.calls) == 0


def test_no_name() -> None:
    with pytest.raises(ArgumentError, match="needs the name under which layers sow"):
        mu.collect(Layer(), mu.Intermediate)  # type: ignore[arg-type]
