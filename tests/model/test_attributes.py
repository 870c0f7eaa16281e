"""What may be an attribute: pytrees that hold arrays are states as a whole; layers of other libraries have their door."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import sparse

import mutatis as mu
from mutatis import checkpoint, errors, interop

pytestmark = pytest.mark.once  # nothing here depends on the version of JAX


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Quantity:
    """An array with a unit; compares as nobody should ask it to."""

    mantissa: Any
    unit: str = dataclasses.field(default="ohm", metadata={"static": True})

    def __eq__(self, other: object) -> bool:
        raise AssertionError("nobody asked")

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise AssertionError("nobody asked")


@jax.tree_util.register_pytree_node_class
class Diagonal:
    """A linear operator, which is called."""

    def __init__(self, diagonal: Any) -> None:
        self.diagonal = diagonal

    def __call__(self, x: Any) -> Any:
        return self.diagonal * x

    def tree_flatten(self) -> Any:
        return (self.diagonal,), None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> Any:
        return cls(*children)


VALUES = {
    "quantity": lambda: Quantity(jnp.ones(3)),
    "numpy": lambda: Quantity(np.ones(3, np.float32)),
    "operator": lambda: Diagonal(jnp.ones(3)),
    "sparse": lambda: sparse.BCOO.fromdense(jnp.eye(3)),
}


def total(value: Any) -> Any:
    if isinstance(value, Quantity):
        return value.mantissa.sum()
    return (value(jnp.ones(3)) if callable(value) else value @ jnp.ones(3)).sum()


class Net(mu.Module):
    def __init__(self, value: Any) -> None:
        self.r = value

    def __call__(self) -> Any:
        return total(self.r)


@pytest.mark.parametrize("make", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("kind", [lambda x: x, mu.Param, mu.Cache], ids=["bare", "Param", "Cache"])
def test_a_pytree_is_one_state(make: Any, kind: Any, tmp_path: Any) -> None:
    net = Net(kind(make()))
    read = (lambda net: net.r) if isinstance(net.__dict__["r"], mu.Buffer) else (lambda net: net.r.value)
    assert len(mu.state(net)) == 1
    assert isinstance(read(net), type(make()))
    run = mu.jit(lambda net: total(read(net)))
    assert float(run(net)) == 3

    def twice(x: Any) -> Any:
        return x * 2 if jnp.issubdtype(x.dtype, jnp.inexact) else x

    def double(net: Net) -> None:
        net.r = jax.tree.map(twice, read(net))

    mu.jit(double)(net)
    mu.jit(lambda: mu.for_loop(lambda _: double(net), jnp.arange(2)))()
    assert float(run(net)) == 24
    for other in (mu.clone(net), copy.deepcopy(net), pickle.loads(pickle.dumps(net)), jax.tree.map(lambda x: x, net)):
        assert float(total(read(other))) == 24
    checkpoint.save(tmp_path / "net", net)
    fresh = Net(kind(make()))
    checkpoint.restore(tmp_path / "net", fresh)
    assert float(total(read(fresh))) == 24
    fresh = Net(kind(make()))
    mu.update(fresh, mu.state(net))
    assert float(total(read(fresh))) == 24
    assert repr(net)
    snapshot = mu.snapshot(net)
    double(net)
    snapshot.restore()
    assert float(run(net)) == 24


@pytest.mark.parametrize("tx", [lambda: optax.sgd(0.1), lambda: optax.adam(0.1), lambda: optax.sgd(0.1, momentum=0.9)])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_pytree_is_trained(tx: Any, compiled: bool) -> None:
    nested = {"w": mu.Param({"a": jnp.ones(2), "b": [jnp.ones(2), jnp.ones(1)]}), "q": mu.Param(Quantity(jnp.ones(3)))}
    flat = {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(1), "q": jnp.ones(3)}

    def loss() -> Any:
        w = nested["w"].value
        return (w["a"] ** 2).sum() + (w["b"][0] ** 3).sum() + w["b"][1].sum() + (nested["q"].value.mantissa ** 2).sum()

    def flat_loss(p: Any) -> Any:
        return (p["a"] ** 2).sum() + (p["b"] ** 3).sum() + p["c"].sum() + (p["q"] ** 2).sum()

    with jax.numpy_dtype_promotion("standard"):
        optimizer, twin = mu.Optimizer(nested, tx()), tx()
        state = twin.init(flat)
        step = lambda: optimizer.update(mu.grad(loss, of=nested)())  # noqa: E731
        step = mu.jit(step) if compiled else step
        for _ in range(3):
            step()
            updates, state = twin.update(jax.grad(flat_loss)(flat), state, flat)
            flat = optax.apply_updates(flat, updates)
    w = nested["w"].value
    for got, expected in zip((w["a"], w["b"][0], w["b"][1], nested["q"].value.mantissa), flat.values(), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_floats_and_integers_in_one_parameter_are_refused() -> None:
    w = mu.Param(sparse.BCOO.fromdense(jnp.eye(3)))
    with pytest.raises(errors.FilterError, match="holds floats and others"):
        mu.grad(lambda: total(w.value), of=w)()


@pytest.mark.parametrize("container", [lambda x: [x], lambda x: {"a": x}, lambda x: (x, 1), lambda x: [[x]]])
def test_a_container_of_pytrees_is_an_error_with_a_cure(container: Any) -> None:
    net = mu.Module()
    with pytest.raises(errors.StructureError, match="of bare arrays"):
        net.parts = container(Quantity(jnp.ones(3)))
    net.parts = container(mu.Param(Quantity(jnp.ones(3))))
    assert len(mu.state(net)) == 1


def test_an_array_behind_an_attribute_says_so() -> None:
    net = mu.Module()
    net.table = jnp.ones(3)
    assert "table=Buffer(float32[3]),  # read as an array" in repr(net)
    assert mu.variables(net)["table",].value is not None


def test_functions_and_frozen_values_are_static_still() -> None:
    net = mu.Module()
    net.spec = jax.sharding.PartitionSpec("x")
    net.act = jax.nn.relu
    net.shape = jax.ShapeDtypeStruct((2,), jnp.float32)
    net.nothing = ()
    assert len(mu.state(net)) == 1


def strangers() -> list[Any]:
    eqx, nnx = pytest.importorskip("equinox"), pytest.importorskip("flax.nnx")
    linen, hk = pytest.importorskip("flax.linen"), pytest.importorskip("haiku")
    made: list[Any] = []
    hk.transform(lambda: made.append(hk.Linear(3)))
    hk.testing.transform_and_run(lambda: made.append(hk.Linear(3)))()
    return [
        (eqx.nn.Linear(2, 3, key=jax.random.key(0)), "FromEquinox(layer)"),
        (nnx.Linear(2, 3, rngs=nnx.Rngs(0)), "FromNnx(layer)"),
        (linen.Dense(3), "FromLinen(layer, rngs=rngs)"),
        (made[0], "FromHaiku("),
        (nnx.Param(jnp.ones(2)), "mu.Param(variable.get_value())"),
        (nnx.Rngs(0), "mu.Rngs(0)"),
    ]


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("container", [lambda x: x, lambda x: [x], lambda x: {"a": (x,)}])
def test_what_is_of_another_library_names_its_way_in(number: int, container: Any) -> None:
    layer, way = strangers()[number]
    net = mu.Module()
    with pytest.raises(errors.StructureError, match=r"`Module\.layer` is of another library") as caught:
        net.layer = container(layer)
    assert way in str(caught.value)
    assert "mu.static" not in str(caught.value)


def test_the_ways_in() -> None:
    eqx, nnx, linen = (pytest.importorskip(name) for name in ("equinox", "flax.nnx", "flax.linen"))
    net, rngs = mu.Module(), mu.Rngs(0)
    net.a = interop.FromEquinox(eqx.nn.Linear(2, 3, key=jax.random.key(0)))
    net.b = interop.FromNnx(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    net.c = interop.FromLinen(linen.Dense(3), rngs=rngs)
    net.d = mu.Param(nnx.Param(jnp.ones(2)).get_value())
    assert net.a(jnp.ones(2)).shape == net.b(jnp.ones(2)).shape == net.c(jnp.ones(2)).shape == (3,)


def test_values_of_an_equinox_class_are_states() -> None:
    eqx = pytest.importorskip("equinox")

    class Matrix(eqx.Module):
        m: Any

        def mv(self, x: Any) -> Any:
            return self.m @ x

    net = mu.Module()
    net.matrix = Matrix(jnp.eye(2))
    np.testing.assert_array_equal(mu.jit(lambda net: net.matrix.mv(jnp.ones(2)))(net), [1, 1])
    assert len(mu.state(net)) == 1


def test_a_state_of_nnx_is_written() -> None:
    nnx = pytest.importorskip("flax.nnx")
    ours, theirs = mu.nn.Linear(2, 3, rngs=mu.Rngs(0)), nnx.Linear(2, 3, rngs=nnx.Rngs(1))
    mu.update(ours, nnx.state(theirs))
    np.testing.assert_array_equal(ours.kernel, theirs.kernel[...])
    mu.update(ours, nnx.to_pure_dict(nnx.state(theirs)))
    with pytest.raises(errors.StateTypeError, match="kernel: expected"):
        mu.update(mu.nn.Linear(3, 3, rngs=mu.Rngs(0)), nnx.state(theirs))


@pytest.mark.parametrize(
    "make", [lambda rngs: mu.nn.Linear(2, 3, rngs=rngs), lambda rngs: mu.nn.Dropout(0.5, rngs=rngs)]
)
def test_streams_of_nnx_name_ours(make: Any) -> None:
    nnx = pytest.importorskip("flax.nnx")
    with pytest.raises(errors.RandomStreamError, match=r"rngs ?= ?mu\.Rngs\(0\)") as caught:
        make(nnx.Rngs(0))
    assert caught.value.got == "flax.nnx.rnglib.Rngs"
    make(mu.Rngs(0))
