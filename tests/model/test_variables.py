"""Variables: what cells hold, how they behave as arrays and as Python objects, and what they refuse."""

from __future__ import annotations

import copy
import operator
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import errors

KINDS: dict[type[mu.Variable], str] = {
    mu.Variable: "variables",
    mu.Param: "params",
    mu.BatchStat: "batch_stats",
    mu.Cache: "cache",
    mu.Hidden: "hidden",
    mu.Intermediate: "intermediates",
    mu.Perturbation: "perturbations",
    mu.Buffer: "buffers",
    mu.OptState: "opt_state",
    mu.MetricState: "metrics",
}


# -- what a cell holds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        (True, jnp.bool_),
        (3, jnp.int32),
        (2.5, jnp.float32),
        (1j, jnp.complex64),
        (np.float16(2), jnp.float16),
        (np.int8(2), jnp.int8),
        (np.arange(3, dtype=np.int16), jnp.int16),
        (jnp.ones(2, jnp.bfloat16), jnp.bfloat16),
        (jnp.asarray(2.0) * 1, jnp.float32),
    ],
)
def test_values_are_strongly_typed_arrays(given: Any, dtype: Any) -> None:
    v = mu.Variable(given)
    assert isinstance(v.value, jax.Array)
    assert v.dtype == dtype
    assert not v.value.weak_type
    v.value = given
    assert v.dtype == dtype
    assert not v.value.weak_type


def test_numpy_arrays_are_copied_in() -> None:
    array = np.zeros(3, np.float32)
    v = mu.Variable(array)
    array[0] = 7
    assert not np.asarray(v).any()
    v.value = array
    array[1] = 7
    np.testing.assert_array_equal(v, [7, 0, 0])


def test_pytrees_are_stored_leaf_by_leaf() -> None:
    leaf = np.zeros(2, np.float32)
    v = mu.Variable({"a": 1, "b": [leaf, (2.0, True)]})
    leaf[0] = 7
    assert jax.tree.map(lambda x: str(x.dtype), v.value) == {"a": "int32", "b": ["float32", ("float32", "bool")]}
    assert all(isinstance(x, jax.Array) and not x.weak_type for x in jax.tree.leaves(v.value))
    assert not np.asarray(v.value["b"][0]).any()


def test_none_is_an_empty_pytree() -> None:
    v = mu.Variable({"a": None, "b": 1})
    assert v.value["a"] is None


@pytest.mark.parametrize("bad", ["text", object(), len, np.array(["a"]), np.array([None]), {"a": "text"}, [{1, 2}]])
def test_what_is_no_array_is_refused(bad: Any) -> None:
    with pytest.raises(errors.StateTypeError, match="a Cache cannot hold") as caught:
        mu.Cache(bad)
    assert caught.value.made_at is not None
    assert "test_variables.py" in caught.value.made_at
    v = mu.Cache(1)
    with pytest.raises(errors.StateTypeError, match="cannot hold"):
        v.value = bad
    assert int(v) == 1


def test_a_variable_needs_a_value_or_a_start() -> None:
    with pytest.raises(errors.ArgumentError, match="a Param needs a value"):
        mu.Param()


def test_a_variable_as_value_gives_its_value() -> None:
    v = mu.Param(jnp.arange(3.0))
    w = mu.Cache(v)
    assert w.value is v.value
    w.value = [v, 1]
    assert w.value[0] is v.value


@pytest.mark.parametrize(("kind", "collection"), KINDS.items(), ids=lambda p: getattr(p, "__name__", p))
def test_kinds(kind: type[mu.Variable], collection: str) -> None:
    assert kind.collection == collection
    assert issubclass(kind, mu.Variable)
    v = kind(jnp.zeros(2))
    assert mu.WithTag(collection)(("x",), v)
    assert repr(v) == f"{kind.__name__}(float32[2])"


def test_rng_state_is_a_kind() -> None:
    assert issubclass(mu.RngState, mu.Variable)
    assert mu.RngState.collection == "rngs"


class Spikes(mu.Hidden):
    collection = "spikes"
    fixed = True


class SpikesToo(Spikes):
    pass


@pytest.mark.parametrize("kind", [Spikes, SpikesToo])
def test_a_kind_declares_defaults(kind: type[mu.Variable]) -> None:
    v = kind(jnp.zeros(2))
    assert (v.collection, v.fixed) == ("spikes", True)
    assert not kind(0, fixed=False).fixed
    assert not mu.Hidden(0).fixed


# -- as an array -------------------------------------------------------------------------------------------------

BINARY = [
    operator.add,
    operator.sub,
    operator.mul,
    operator.truediv,
    operator.floordiv,
    operator.mod,
    operator.pow,
    operator.lt,
    operator.le,
    operator.gt,
    operator.ge,
]
INTEGER = [operator.and_, operator.or_, operator.xor, operator.lshift, operator.rshift]
IN_PLACE = [
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
    operator.ifloordiv,
    operator.imod,
    operator.ipow,
]


@pytest.mark.parametrize("op", BINARY, ids=lambda f: f.__name__)
def test_arithmetic_works_on_the_value(op: Callable[[Any, Any], Any]) -> None:
    a, b = jnp.array([1.0, 2.0, 3.0]), jnp.array([3.0, 2.0, 1.0])
    v, w = mu.Param(a), mu.Cache(b)
    for got in (op(v, b), op(a, w), op(v, w)):
        np.testing.assert_array_equal(got, op(a, b))
        assert isinstance(got, jax.Array)
    np.testing.assert_array_equal(op(v, 2.0), op(a, 2.0))
    np.testing.assert_array_equal(op(2.0, v), op(2.0, a))
    np.testing.assert_array_equal(v, a)


@pytest.mark.parametrize("op", INTEGER, ids=lambda f: f.__name__)
def test_integer_arithmetic_works_on_the_value(op: Callable[[Any, Any], Any]) -> None:
    a, b = jnp.array([1, 2, 3]), jnp.array([3, 2, 1])
    np.testing.assert_array_equal(op(mu.Variable(a), mu.Variable(b)), op(a, b))
    np.testing.assert_array_equal(op(a, mu.Variable(b)), op(a, b))


@pytest.mark.parametrize("op", IN_PLACE, ids=lambda f: f.__name__)
def test_augmented_assignment_writes_in_place(op: Callable[[Any, Any], Any]) -> None:
    a, b = jnp.array([5.0, 6.0]), jnp.array([2.0, 4.0])
    v = mu.Param(a)
    alias = v
    v = op(v, b)
    assert v is alias
    np.testing.assert_array_equal(alias, op(a, b))
    v = op(v, mu.Param(b))
    assert v is alias


def test_matrices() -> None:
    a, x = jnp.arange(6.0).reshape(2, 3), jnp.ones(3)
    w = mu.Param(a)
    np.testing.assert_array_equal(w @ x, a @ x)
    np.testing.assert_array_equal(jnp.ones(2) @ w, jnp.ones(2) @ a)
    np.testing.assert_array_equal(w @ mu.Param(a.T), a @ a.T)
    np.testing.assert_array_equal(w.T, a.T)
    assert (w.shape, w.ndim, w.size, w.dtype, len(w)) == ((2, 3), 2, 6, jnp.float32, 2)
    assert w.astype(jnp.int32).dtype == jnp.int32
    np.testing.assert_array_equal(list(w)[1], a[1])


@pytest.mark.parametrize("op", [operator.neg, operator.pos, abs, operator.invert], ids=lambda f: f.__name__)
def test_unary_operators(op: Callable[[Any], Any]) -> None:
    a = jnp.array([1, -2, 3])
    np.testing.assert_array_equal(op(mu.Variable(a)), op(a))


@pytest.mark.parametrize("convert", [bool, int, float, complex, operator.index, str, len, list, np.asarray])
def test_conversions(convert: Callable[[Any], Any]) -> None:
    value = jnp.arange(3) if convert in (len, list, np.asarray) else jnp.int32(3)
    v = mu.Variable(value)
    if convert is str:
        assert str(v) == "Variable(3, int32)"
    else:
        np.testing.assert_array_equal(convert(v), convert(value))


def test_formatting() -> None:
    assert f"{mu.Variable(2.5):.2f}" == "2.50"
    assert f"{mu.Variable(2.5)}" == "Variable(2.5, float32)"
    assert [10, 20, 30][mu.Variable(1)] == 20


def test_numpy_may_ask_for_a_dtype_and_a_copy() -> None:
    v = mu.Variable(jnp.arange(3))
    assert np.asarray(v, dtype=np.float64).dtype == np.float64
    copied = np.array(v)
    copied[0] = 9
    assert int(v[0]) == 0


@pytest.mark.parametrize(
    "function",
    [jnp.sin, jnp.sum, jax.nn.relu, jax.nn.softmax, jnp.square, lambda x: jnp.dot(x, x), lambda x: jnp.add(x, x)],
)
def test_jnp_and_nn_functions_accept_variables(function: Callable[[Any], Any]) -> None:
    a = jnp.array([1.0, -2.0])
    np.testing.assert_array_equal(function(mu.Param(a)), function(a))
    np.testing.assert_array_equal(mu.jit(lambda v: function(v))(mu.Param(a)), jax.jit(function)(a))


# -- items -------------------------------------------------------------------------------------------------------


def test_items() -> None:
    v = mu.Param(jnp.arange(6.0).reshape(2, 3))
    assert v[...] is v.value
    np.testing.assert_array_equal(v[1], [3, 4, 5])
    v[0, 1] = 9.0
    v[1] = jnp.zeros(3)
    v[:, 2] = 7
    np.testing.assert_array_equal(v, [[0, 9, 7], [0, 0, 7]])
    v[...] = jnp.ones((2, 3))
    np.testing.assert_array_equal(v, np.ones((2, 3)))
    v[0] += 1
    np.testing.assert_array_equal(v, [[2, 2, 2], [1, 1, 1]])


def test_items_are_written_under_jit() -> None:
    cache = mu.Cache(jnp.zeros((4, 2)))

    @mu.jit
    def put(i: Any, row: Any) -> None:
        cache[i] = row

    put(2, jnp.ones(2))
    np.testing.assert_array_equal(cache.value.sum(1), [0, 0, 2, 0])


def test_item_assignment_keeps_the_dtype() -> None:
    v = mu.Variable(jnp.arange(3))
    with pytest.raises(errors.StateTypeError, match="another dtype by item assignment") as caught:
        v[0] = 1.5
    assert "expected: int32" in str(caught.value)
    assert "got:      float" in str(caught.value)
    x, i = jnp.array([1.5]), 0
    scope = {"v": v, "x": x[0], "i": i, "jnp": jnp}
    exec("v[i] = x.astype(jnp.int32)", scope)  # the cure
    np.testing.assert_array_equal(v, [1, 1, 2])


@pytest.mark.parametrize("new", [jnp.zeros(2), jnp.zeros(3, jnp.int32), {"a": jnp.zeros(3)}])
def test_whole_assignment_keeps_the_type(new: Any) -> None:
    v = mu.Param(jnp.zeros(3))
    with pytest.raises(errors.StateTypeError, match="another type"):
        v[...] = new
    np.testing.assert_array_equal(v, np.zeros(3))


def test_items_of_containers() -> None:
    v = mu.Variable({"a": 1, "b": jnp.zeros(2)})
    v["a"] = 5
    assert int(v["a"]) == 5
    with pytest.raises(errors.StateTypeError):
        v["a"] = 1.5
    with pytest.raises(errors.StateTypeError):
        v["c"] = 1
    assert int(v.value["a"]) == 5
    assert sorted(v.value) == ["a", "b"]


def test_a_container_changed_in_place_counts_as_a_write() -> None:
    v = mu.Variable({"a": 1})
    w = mu.Variable([jnp.zeros(2)])

    @mu.jit
    def step() -> None:
        v.value["a"] += 1
        w.value[0] = w.value[0] + 1

    step()
    step()
    assert int(v.value["a"]) == 3
    np.testing.assert_array_equal(w.value[0], [2, 2])


def test_a_container_inside_a_transaction_is_a_fresh_one() -> None:
    v = mu.Variable({"a": 1})
    outside = v.value

    def body(_: Any) -> None:
        assert v.value is not outside
        v.value["a"] = v.value["a"] + 1

    mu.for_loop(body, jnp.arange(2))
    assert int(v.value["a"]) == 3
    assert int(outside["a"]) == 1


# -- equality, hash, identity ------------------------------------------------------------------------------------


def test_values_compare_and_identities_hash() -> None:
    v, w = mu.Variable(1), mu.Variable(1)
    assert v is not w
    assert bool(v == w)
    assert not bool(v != w)
    assert bool(v == 1)
    assert not bool(v != 1)
    np.testing.assert_array_equal(mu.Variable(jnp.arange(3)) == jnp.array([0, 5, 2]), [True, False, True])
    assert len({v, w, v}) == 2
    assert {v: "a", w: "b"}[w] == "b"


def test_weak_references() -> None:
    v = mu.Variable(1)
    reference = weakref.ref(v)
    assert reference() is v
    del v
    assert reference() is None


# -- metadata ----------------------------------------------------------------------------------------------------


def test_metadata_are_attributes() -> None:
    v = mu.Param(1, name="w", sharding=("in", None), tag="big", unit="mV")
    assert (v.name, v.sharding, v.tag, v.unit) == ("w", ("in", None), "big", "mV")
    assert repr(v) == "Param(1, int32, name='w', tag='big', unit='mV')"
    with pytest.raises(AttributeError, match="no attribute 'units'"):
        v.units
    assert not hasattr(v, "tags")


@pytest.mark.parametrize("kind", [mu.Variable, Spikes])
def test_metadata_are_for_good(kind: Any) -> None:
    v = kind(1, tag="a")
    for name in ("tag", "other"):
        with pytest.raises(AttributeError, match=name):
            setattr(v, name, "b")
    assert v.tag == "a"


def test_a_variable_knows_where_it_was_made() -> None:
    assert mu.Param(1).made_at.startswith("test_variables.py:")
    assert mu.Param(1).made_at.endswith("in test_a_variable_knows_where_it_was_made")


# -- type changes, fixed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [jnp.zeros(5), jnp.zeros(2, jnp.int32), {"a": 1}])
def test_assignment_may_change_the_type(new: Any) -> None:
    v = mu.Variable(jnp.zeros(2))
    v.value = new
    assert jax.tree.structure(v.value) == jax.tree.structure(new)
    v = mu.Variable(jnp.zeros(2))
    mu.jit(lambda: v.set(new))()
    assert jax.tree.map(jnp.shape, v.value) == jax.tree.map(jnp.shape, new)


@pytest.mark.parametrize("new", [jnp.zeros(5), jnp.zeros(2, jnp.int32), {"a": jnp.zeros(2)}])
@pytest.mark.parametrize("make", [lambda x: mu.Variable(x, fixed=True), Spikes])
def test_a_fixed_state_keeps_its_type(make: Any, new: Any) -> None:
    v = make(jnp.zeros(2))
    for write in (lambda: v.set(new), mu.jit(lambda: v.set(new)), lambda: mu.grad(lambda x: v.set(new) or x)(1.0)):
        with pytest.raises(errors.StateTypeError, match="may not change"):
            write()
        np.testing.assert_array_equal(v, np.zeros(2))
    v.value = jnp.ones(2)
    np.testing.assert_array_equal(v, np.ones(2))


# -- deferred ----------------------------------------------------------------------------------------------------


def test_a_deferred_state_is_made_at_its_first_read() -> None:
    made: list[int] = []

    def start() -> jax.Array:
        made.append(1)
        return jnp.arange(3.0)

    v = mu.Param(init=start)
    assert v.deferred
    assert not made
    assert repr(v) == "Param(deferred)"
    np.testing.assert_array_equal(v.value, [0, 1, 2])
    assert not v.deferred
    assert v.shape == (3,)
    assert made == [1]


@pytest.mark.parametrize("around", [mu.jit, lambda f: lambda: mu.grad(lambda x: f() * x)(1.0), mu.remat])
def test_a_deferred_state_may_be_made_in_a_transform(around: Any) -> None:
    v = mu.Hidden(init=lambda: jnp.full(3, 2.0))
    assert float(around(lambda: jnp.sum(v.value))()) == 6
    assert not v.deferred
    np.testing.assert_array_equal(v, [2, 2, 2])
    assert not isinstance(v.value, jax.core.Tracer)


def test_a_deferred_state_in_a_loop_is_refused() -> None:
    v = mu.Hidden(init=lambda: jnp.zeros(()))
    with pytest.raises(errors.StructureError, match="was created in") as caught:
        mu.for_loop(lambda x: v.set(v.value + x), jnp.arange(3.0))
    assert "v" in str(caught.value)
    assert v.deferred
    assert float(v.value) == 0


def test_a_failing_start_leaves_the_state_deferred() -> None:
    v = mu.Param(init=lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        v.value
    with pytest.raises(ZeroDivisionError):
        mu.jit(lambda: v.value)()
    assert v.deferred


def test_a_write_may_come_before_the_first_read() -> None:
    v = mu.Param(init=lambda: 1 / 0)
    v.value = 3
    assert int(v) == 3


def test_init_may_be_a_value() -> None:
    v = mu.Hidden(init=jnp.ones(2))
    np.testing.assert_array_equal(v, [1, 1])
    v.value = jnp.zeros(2)
    mu.reset(v)
    np.testing.assert_array_equal(v, [1, 1])


# -- as a Python object ------------------------------------------------------------------------------------------


def everything() -> mu.Variable:
    return mu.Param({"a": jnp.arange(3.0), "key": jax.random.key(3)}, name="w", sharding=("x",), fixed=True, tag="t")


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))])
def test_copies(copied: Callable[[Any], Any]) -> None:
    v = everything()
    other = copied(v)
    assert type(other) is mu.Param
    assert other is not v
    assert (other.name, other.sharding, other.fixed, other.tag) == ("w", ("x",), True, "t")
    assert other.made_at == v.made_at
    np.testing.assert_array_equal(other.value["a"], v.value["a"])
    np.testing.assert_array_equal(jax.random.key_data(other.value["key"]), jax.random.key_data(v.value["key"]))
    other.value = {"a": jnp.zeros(3), "key": jax.random.key(0)}
    assert float(v.value["a"].sum()) == 3


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys_are_pickled_with_their_kind(impl: str) -> None:
    v = mu.Variable(jax.random.key(1, impl=impl))
    other = pickle.loads(pickle.dumps(v))
    assert other.dtype == v.dtype


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "int4", "complex64", "bool"])
def test_dtypes_survive_pickle(dtype: str) -> None:
    v = mu.Variable(jnp.array([1, 0, 1]).astype(dtype))
    other = pickle.loads(pickle.dumps(v))
    assert other.dtype == v.dtype
    np.testing.assert_array_equal(np.asarray(other.value), np.asarray(v.value))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))])
def test_a_deferred_state_is_copied_deferred(copied: Callable[[Any], Any]) -> None:
    v = mu.Param(init=jnp.ones(2))
    other = copied(v)
    assert v.deferred
    assert other.deferred
    np.testing.assert_array_equal(other, [1, 1])
    assert v.deferred


# -- as a pytree -------------------------------------------------------------------------------------------------


def test_a_variable_is_a_pytree_node() -> None:
    v = mu.Param(jnp.arange(3.0))
    leaves, treedef = jax.tree.flatten(v)
    assert leaves[0] is v.value
    assert len(leaves) == 1
    other = jax.tree.unflatten(treedef, leaves)
    assert type(other) is mu.Param
    assert jax.tree.structure(mu.Cache(0)) != jax.tree.structure(mu.Param(0))
    doubled = jax.tree.map(lambda x: 2 * x, v)
    np.testing.assert_array_equal(doubled.value, [0, 2, 4])
    np.testing.assert_array_equal(v, [0, 1, 2])


def test_an_unflattened_variable_may_be_read_but_not_written() -> None:
    other = jax.tree.map(lambda x: x, mu.Param(1.0))
    assert float(other) == 1
    with pytest.raises(errors.FrozenStateError, match="detached") as caught:
        other.value = 2.0
    for name in ("mu.jit", "mu.functionalize", "mu.thaw"):
        assert name in str(caught.value)
    mu.thaw(other)
    other.value = 2.0
    assert float(other) == 2


def test_a_variable_may_be_an_argument_of_raw_jit() -> None:
    assert float(jax.jit(lambda v: v.value * 2)(mu.Param(3.0))) == 6
