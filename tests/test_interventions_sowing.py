"""What is sown: where it may be kept, what is left of it, and what it costs."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import errors

XS = jnp.arange(1.0, 4.0)


class Sower(mu.Module):
    def __init__(self) -> None:
        self.w = mu.Param(2.0)
        self.part = mu.nn.Identity() if hasattr(mu.nn, "Identity") else mu.Module()

    def features(self, x: Any) -> Any:
        mu.sow(self, "features", x)
        return x

    @property
    def size(self) -> int:
        return 1

    def __call__(self, x: Any) -> Any:
        mu.sow(self, "seen", self.w.value * x)
        return self.w.value * x


def loss(net: Any, x: Any) -> Any:
    """What is sown is taken out again, into the loss."""
    y = net(x)
    return jnp.sum(y) + sum(jnp.sum(v) for v in jax.tree.leaves(mu.pop(net, mu.Intermediate)))


# -- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["features", "size", "part", "w", "train", "__call__"])
@pytest.mark.parametrize("keep", [mu.sow, mu.perturb])
def test_a_name_that_is_taken(keep: Any, name: str) -> None:
    net = Sower()
    with pytest.raises(errors.StructureError, match=rf"`Sower\.{name}` is no"):
        keep(net, name, jnp.float32(1))
    assert float(net(1.0)) == 2.0 and net.size == 1


def test_a_default_of_the_class_is_no_hindrance() -> None:
    class Net(mu.Module):
        seen: Any = None
        count = 3

    net = Net()
    mu.sow(net, "seen", 1.0)
    mu.sow(net, "count", 2.0)
    sown = mu.pop(net, mu.Intermediate)
    assert [float(sown[name][0]) for name in ("seen", "count")] == [1, 2]
    assert net.seen is None and net.count == 3


# -- sown and popped: nothing is left ----------------------------------------------------------------------------------

WITHIN: dict[str, Any] = {
    "for_loop": lambda f: mu.for_loop(f, XS),
    "scan": lambda f: mu.scan(lambda c, x: (c, f(x)), None, XS)[1],
    "map": lambda f: mu.map(f, XS),
    "cond": lambda f: jnp.stack([mu.cond(x > 0, f, lambda x: x, x) for x in XS]),
    "switch": lambda f: jnp.stack([mu.switch(1, [lambda x: x, f], x) for x in XS]),
    "while_loop": lambda f: mu.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1].at[c[0]].set(f(XS[c[0]]))), (0, XS))[1],
    "remat": lambda f: jnp.stack([mu.remat(f)(x) for x in XS]),
    "vmap": lambda f: mu.vmap(f)(XS),
    "shard_map": lambda f: jnp.stack([sharded(f)(x) for x in XS]),
    "custom_vjp": lambda f: jnp.stack([ruled(f)(x) for x in XS]),
}  # fmt: skip


def sharded(f: Any) -> Any:
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec()
    return mu.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec)


def ruled(f: Any) -> Any:
    g = mu.custom_vjp(f)
    g.defvjp(lambda x: (f(x), None), lambda _, g: (g,))
    return g


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", WITHIN)
def test_a_loss_that_sows_and_pops(name: str, compiled: bool) -> None:
    net = Sower()
    before = mu.graphdef(net)
    run = lambda: WITHIN[name](lambda x: loss(net, x))  # noqa: E731
    np.testing.assert_allclose((mu.jit(run) if compiled else run)(), 4 * XS)
    assert mu.graphdef(net) == before


@pytest.mark.parametrize("name", ["for_loop", "scan", "map", "cond", "switch"])
def test_its_gradient_inside(name: str) -> None:
    net = Sower()
    np.testing.assert_allclose(WITHIN[name](lambda x: mu.grad(loss)(net, x)["w"]), 2 * XS)
    assert not hasattr(net, "seen")


def test_a_step_that_leaves_things_as_they_were_has_nothing_to_replay(traces: Any) -> None:
    class Net(mu.Module):
        def __init__(self) -> None:
            self.n, self.parts, self.table = mu.Variable(0), [mu.Variable(1)], {"a": mu.Variable(2)}

        def __call__(self) -> Any:
            self.n.value = self.n.value + 1
            self.kl = mu.Cache(jnp.zeros(2))
            self.parts.append(mu.Cache(jnp.ones(2)))
            self.table["b"] = self.parts.pop()
            del self.table["b"]
            self.flag = True
            del self.flag
            mu.freeze(self, mu.Variable)
            mu.thaw(self, mu.Variable)
            return mu.pop(self, mu.Cache)["kl"].sum() + jnp.float32(self.n.value)

    net = Net()
    step = mu.jit(traces.count(lambda net: net()))
    assert [float(step(net)) for _ in range(4)] == [1, 2, 3, 4]
    assert traces.total == 1
    (program,) = step._compiler.programs.values()
    (record,) = program.records.values()
    assert record.plain, "a call only runs and stores"
    epoch = mu.core.structure.structure.epoch
    step(net)
    assert mu.core.structure.structure.epoch == epoch


def test_a_state_that_is_replaced_is_no_such_step() -> None:
    net = mu.Module()
    net.a = mu.Cache(1.0)
    old = net.a

    @mu.jit
    def step() -> None:
        net.a = mu.Cache(net.a.value + 1)

    step()
    step()
    assert net.a is not old and float(net.a) == 3


# -- sown and left ------------------------------------------------------------------------------------------------------


def test_what_is_left_from_call_to_call_says_so_and_compiles_twice(traces: Any) -> None:
    net = Sower()
    step = mu.jit(traces.count(lambda net, x: net(x)))
    with pytest.warns(
        mu.errors.RecompilationWarning, match=r"`net\.seen` .* still held .*mu\.pop\(model, mu\.Intermediate"
    ):
        jax.tree.map(lambda k: step(net, k), [float(k) for k in range(6)])
    assert traces.total == 2
    (seen,) = mu.pop(net, mu.Intermediate)["seen"]
    assert float(seen) == 10, "what the latest call sowed"


def test_several_in_one_call_are_all_kept() -> None:
    net = Sower()
    step = mu.jit(lambda x: (net(x), net(x + 1), mu.grad(lambda x: net(x))(x + 2)))
    step(1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step(10.0)
    np.testing.assert_allclose(mu.pop(net, mu.Intermediate)["seen"], [20, 22, 24])


def test_ordinary_python_keeps_all() -> None:
    net = Sower()
    for k in range(3):
        net(float(k))
        mu.remat(net)(float(k))
    np.testing.assert_allclose(mu.pop(net, mu.Intermediate)["seen"], [0, 0, 2, 2, 4, 4])


def test_reduced_values_go_on() -> None:
    net = mu.Module()
    step = mu.jit(lambda x: mu.sow(net, "total", x, reduce=jnp.add))
    for k in range(4):
        step(float(k))
    assert float(net.total) == 6


# -- capture --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
def test_capture_of_a_kind_gives_what_was_sown(compiled: bool) -> None:
    outer: Any = mu.Module()
    outer.layers = [Sower(), Sower()]
    f = mu.capture(lambda x: outer.layers[1](outer.layers[0](x)), mu.Intermediate, of=outer)
    for k in (1.0, 3.0):
        out, sown = (mu.jit(f) if compiled else f)(k)
        assert (float(out), float(sown["layers", 0, "seen"][0]), float(sown["layers", 1, "seen"][0])) == (
            4 * k,
            2 * k,
            4 * k,
        )
    assert not mu.variables(outer, mu.Intermediate)


def test_capture_leaves_what_was_sown_before() -> None:
    net = Sower()
    net(1.0)
    out, sown = mu.capture(net, mu.Intermediate)(5.0)
    assert [float(v) for v in sown["seen"]] == [10.0]
    assert [float(v) for v in net.seen.value] == [2.0]


def test_capture_of_modules_and_of_a_kind() -> None:
    net = Sower()
    _, both = mu.capture(net, Sower, mu.Intermediate)(5.0)
    assert set(both) == {(), ("seen",)}
    _, none = mu.capture(net, mu.Cache)(5.0)
    assert not none
    mu.pop(net, mu.Intermediate)
