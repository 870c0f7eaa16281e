"""Kinds with type arguments at run time: `mu.Param[jax.Array]` stands for `mu.Param`, wherever a class can."""

from __future__ import annotations

import copy
import pickle
import sys
from typing import Generic, TypeVar, get_args, get_origin

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mutatis as mu

pytestmark = pytest.mark.once  # nothing here depends on the version of JAX

T = TypeVar("T")
Arrays = dict[str, np.ndarray]


class Scale(mu.Param[jax.Array]):
    """A kind of arrays."""


class Table(mu.Buffer[T]):
    """A kind of anything."""


class Named(mu.Buffer[T], Generic[T]):
    """The same, as the type system asks for where there are more bases."""


def test_a_kind_takes_type_arguments() -> None:
    alias = mu.Param[Arrays]
    assert (get_origin(alias), get_args(alias)) == (mu.Param, (Arrays,))
    assert alias == mu.Param[Arrays] != mu.Param[jax.Array]
    assert pickle.loads(pickle.dumps(alias)) == alias


def test_a_call_makes_an_ordinary_state() -> None:
    state = mu.Param[jax.Array](2.0)
    assert type(state) is mu.Param and float(state) == 2.0
    assert "test_generics.py" in state.made_at
    assert not hasattr(state, "__orig_class__")


@pytest.mark.parametrize("kind", [Scale, Table, Named, Table[jax.Array]])
def test_a_subclass_is_a_kind(kind: type) -> None:
    state = kind(jnp.ones(2))
    net = mu.Module()
    net.state = state
    assert isinstance(state, mu.Variable) and not hasattr(state, "__dict__")
    assert [*mu.variables(net, type(state))] == [("state",)]
    copies = (
        copy.deepcopy(state),
        pickle.loads(pickle.dumps(state)),
        jax.tree.map(lambda x: x, state),
        mu.clone(net).state,
    )
    for other in copies:
        assert type(other) is type(state) and other.value.tolist() == [1.0, 1.0]
    mu.jit(lambda net: net.state.set(net.state + 1))(net)
    assert state.value.tolist() == [2.0, 2.0]


def test_a_subclass_inherits_what_its_kind_declares() -> None:
    assert (Scale.__bases__, Scale.collection, Table.collection) == ((mu.Param,), "params", "buffers")


@pytest.mark.skipif(sys.version_info < (3, 12), reason="syntax of Python 3.12")
def test_a_subclass_in_the_syntax_of_python_3_12() -> None:
    scope: dict[str, object] = {"mu": mu}
    exec("class Modern[T](mu.Param[T]): pass", scope)
    assert float(scope["Modern"](3.0)) == 3.0


@pytest.mark.parametrize(
    "use",
    [
        lambda net, kind: mu.OfType(kind),
        lambda net, kind: mu.Not(kind),
        lambda net, kind: mu.state(net, kind),
        lambda net, kind: mu.variables(net, kind),
        lambda net, kind: mu.StateAxes({kind: 0}),
        lambda net, kind: mu.grad(lambda net: net.w.value, wrt=kind)(net),
        lambda net, kind: mu.Optimizer(net, optax.sgd(0.1), wrt=kind),
        lambda net, kind: mu.replace(net, kind, mu.remat),
    ],
)
def test_as_a_filter_it_is_refused(use) -> None:
    """It would select states that hold something else."""
    net = mu.Module()
    net.w = mu.Param(1.0)
    with pytest.raises(mu.errors.FilterError, match=r"(?s)mutatis\.Param\[.*Leave them out, `mu\.Param`") as caught:
        use(net, mu.Param[Arrays])
    cure = str(caught.value).split("`")
    assert [*mu.variables(net, eval(cure[-4]))] == [("w",)]
    assert not mu.variables(net, eval(cure[-2]))


def test_a_union_is_a_filter_as_for_isinstance() -> None:
    net = mu.Module()
    net.w, net.n, net.c = mu.Param(1.0), mu.Buffer(2.0), mu.Cache(3.0)
    assert [*mu.variables(net, mu.Param | mu.Cache)] == [("c",), ("w",)]


def test_as_the_kind_of_an_entry_it_is_the_kind() -> None:
    given = {("w",): jnp.ones(2)}
    state = mu.State.from_flat(given, {("w",): mu.Param[jax.Array]})
    assert state.kinds() == {("w",): mu.Param} and len(state.filter(mu.Param)) == 1
    assert jax.tree.structure(state) == jax.tree.structure(mu.State(given, {("w",): mu.Param}))


def test_as_the_kind_of_what_is_sown_it_is_the_kind() -> None:
    net = mu.Module()
    for value in (1.0, 2.0):
        mu.sow(net, "x", value, kind=mu.Cache[tuple])
    assert [*map(float, mu.pop(net, mu.Cache)["x"])] == [1.0, 2.0]


def test_a_definition_knows_its_class_for_type_checkers_only() -> None:
    definition = mu.graphdef(mu.Param(1.0))
    assert mu.GraphDef[mu.Param] is not mu.GraphDef and definition == mu.graphdef(mu.Param(2.0))
    assert not hasattr(definition, "__dict__")
