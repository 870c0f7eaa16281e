"""Variables as values: comparing, indexing, methods of the array; and as keys, by identity."""

from __future__ import annotations

import gc
import operator
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import errors

pytestmark = pytest.mark.once  # nothing here depends on the version of JAX

COMPARE = [operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge]
A, B = jnp.array([1, 2, 3]), jnp.array([1, 0, 3])


def around(where: str, f: Any) -> Any:
    return {"eager": f, "jit": mu.jit(f), "vmap": lambda: mu.vmap(lambda _: f(), axis_size=1)(jnp.arange(1))[0]}[
        where
    ]()


@pytest.mark.parametrize("op", COMPARE)
@pytest.mark.parametrize("where", ["eager", "jit", "vmap"])
def test_comparing(op: Any, where: str) -> None:
    a, b = mu.Variable(A), mu.Cache(B)
    expected = op(np.asarray(A), np.asarray(B))
    for left, right in ((a, b), (a, B), (A, b), (a, np.asarray(B)), (np.asarray(A), b)):
        np.testing.assert_array_equal(around(where, lambda a=left, b=right: jnp.asarray(op(a, b))), expected)
    np.testing.assert_array_equal(around(where, lambda: op(a, 2)), op(np.asarray(A), 2))
    np.testing.assert_array_equal(around(where, lambda: op(a, a)), op(np.asarray(A), np.asarray(A)))


def test_comparing_with_what_is_no_array() -> None:
    v = mu.Variable(1)
    assert not operator.eq(v, None)
    assert v != "text"


def test_cells_are_keys() -> None:
    cells = [mu.Variable(jnp.zeros(3)) for _ in range(5000)]  # equal values: any `==` would be ambiguous
    table = {cell: number for number, cell in enumerate(cells)}
    assert all(table[cell] == number for number, cell in enumerate(cells))
    assert len({*cells, *cells}) == 5000
    assert {*cells[:10]} == {*cells[9::-1]}
    weak = weakref.WeakSet(map(weakref.ref, ()))
    del table, cells, weak
    gc.collect()


def test_many_equal_cells_in_transforms() -> None:
    cells = [mu.Param(jnp.ones(3)) for _ in range(50)]

    def step() -> None:
        for cell in cells:
            cell.value = cell.value + 1

    mu.jit(step)()
    mu.remat(step)()
    mu.for_loop(lambda _: step(), jnp.arange(2))
    mu.cond(True, step, lambda: None)
    with mu.transaction(*cells):
        step()
    assert all(float(cell.value[0]) == 7 for cell in cells)
    grads = mu.grad(lambda: sum(jnp.sum(c.value**2) for c in cells), of=cells)()
    assert len(jax.tree.leaves(grads)) == 50
    mu.vmap(lambda _: [c.value for c in cells], axis_size=2)(jnp.arange(2))


def test_observers_of_equal_cells() -> None:
    a, b, seen = mu.Variable(jnp.zeros(3)), mu.Variable(jnp.zeros(3)), []
    with mu.on_commit([a, b], lambda path, v: seen.append(path)), mu.on_commit(a, lambda path, v: seen.append("again")):
        b.value = jnp.ones(3)
        mu.jit(lambda: a.set(a + 1))()
    a.value = jnp.ones(3)
    assert seen == [(1,), (0,), "again"]
    observation = mu.on_commit(mu.Variable(jnp.zeros(3)), print)
    observation.stop()
    gc.collect()
    mu.Variable(jnp.zeros(3)).value = jnp.ones(3)


def test_contexts_that_hold_equal_arrays() -> None:
    dt = mu.Context("dt", 0.0)
    total = mu.Variable(jnp.zeros(3))
    step = mu.jit(lambda: total.set(total + dt.get()))
    for value in (jnp.ones(3), jnp.ones(3), 2 * jnp.ones(3)):
        with dt.set(value):
            step()
    np.testing.assert_array_equal(total, [4, 4, 4])


INDICES = [
    lambda i, j: i,
    lambda i, j: (i, j),
    lambda i, j: (..., i),
    lambda i, j: (slice(None), i),
    lambda i, j: (None, i),
    lambda i, j: (i, slice(None, 2)),
]


@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("where", ["eager", "jit"])
def test_indexing_by_states(index: Any, where: str) -> None:
    v = mu.Cache(jnp.arange(12.0).reshape(3, 4))
    i, j = mu.Cache(2), mu.Cache(jnp.array([0, 1]))
    plain = np.arange(12.0).reshape(3, 4)
    for a, b in ((i, j), (j, i)):
        at, by = index(a, b), index(np.asarray(a), np.asarray(b))
        np.testing.assert_array_equal(around(where, lambda at=at: v[at]), plain[by])
        np.testing.assert_array_equal(around(where, lambda at=at: v.at[at].add(1.0)), v.value.at[by].add(1.0))
    at, by = index(i, j), index(np.asarray(i), np.asarray(j))
    if not isinstance(by, tuple) or by[0] is not None:
        around(where, lambda: v.__setitem__(at, 5.0))
        plain[by] = 5.0
        np.testing.assert_array_equal(v, plain)
        around(where, lambda: v.__setitem__(at, mu.Variable(6.0)))
        plain[by] = 6.0
        np.testing.assert_array_equal(v, plain)


def test_slices_and_masks_of_states() -> None:
    v, n, mask = mu.Cache(jnp.arange(4.0)), mu.Cache(2), mu.Cache(jnp.array([True, False, True, False]))
    np.testing.assert_array_equal(v[n:], [2, 3])
    np.testing.assert_array_equal(v[mask], [0, 2])
    v[mask] = 9.0
    np.testing.assert_array_equal(v, [9, 1, 9, 3])
    table = mu.Variable({"a": jnp.zeros(2), "b": jnp.ones(2)})
    np.testing.assert_array_equal(table["b"], [1, 1])


ATTRIBUTES = [name for name in dir(jax.Array) if not name.startswith("_")]
CALLS = {
    "argpartition": (1,), "astype": (jnp.int32,), "choose": ([jnp.zeros(3), jnp.zeros(3)],), "clip": (0, 1), "compress": (A > 1,),
    "dot": (jnp.ones(3),), "repeat": (2,), "reshape": (3, 1), "searchsorted": (1.0,), "swapaxes": (0, 0), "take": (0,),
    "to_device": (jax.devices()[0],), "addressable_data": (0,), "view": (jnp.int32,),
}  # fmt: skip
OTHERS = {
    "addressable_shards",
    "at",
    "byteswap",
    "choose",
    "copy_to_host_async",
    "diagonal",
    "global_shards",
    "item",
    "mT",
}
OTHERS |= {"sharding", "trace"}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_what_arrays_have(name: str) -> None:
    array = jnp.array([2.0, 1.0, 3.0])
    v = mu.Variable(array)
    if name == "flat":
        return  # JAX has it to say that there is none
    if name == "mT":
        v.value = array[None]
    if name in OTHERS:
        assert hasattr(v, name)
        return
    got, expected = getattr(v, name), getattr(array, name)
    if callable(expected):
        args = CALLS.get(name, ())
        got, expected = got(*args), expected(*args)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), got, expected))
    np.testing.assert_array_equal(v, array)


def test_methods_in_transforms() -> None:
    v = mu.Param(jnp.arange(4.0))
    assert float(mu.jit(lambda: v.sum() + v.mean())()) == 7.5
    grad = mu.grad(lambda: (v.reshape(2, 2) ** 2).sum(), of=v)()
    np.testing.assert_array_equal(jax.tree.leaves(grad)[0], 2 * np.arange(4.0))
    assert v.at[0].set(5.0)[0] == 5
    assert float(v[0]) == 0
    np.testing.assert_array_equal(v.T, np.arange(4.0))
    assert divmod(mu.Variable(7), 2) == (3, 1)
    assert divmod(7, mu.Variable(2)) == (3, 1)
    assert round(mu.Variable(2.6)) == 3


@pytest.mark.parametrize("name", ["shape", "dtype", "T", "at", "get", "set", "deferred", "frozen", "made_at"])
def test_metadata_are_never_hidden(name: str) -> None:
    with pytest.raises(errors.StateTypeError, match=f"cannot be named `{name}`"):
        mu.Param(1.0, **{name: 3})
    assert getattr(mu.Param(1.0, **{f"{name}_": 3}), f"{name}_") == 3  # the cure


def test_metadata_go_before_what_arrays_have() -> None:
    v = mu.Param(jnp.ones(2), mean=0.5, std=2.0)
    assert (v.mean, v.std) == (0.5, 2.0)
    assert float(v.sum()) == 2
    with pytest.raises(AttributeError, match="its metadata are \\['mean', 'std'\\]"):
        _ = v.nothing


def test_kinds_of_the_users_own() -> None:
    class Scaled(mu.Param):
        @property
        def scaled(self) -> Any:
            return self.value * self.metadata.get("scale", 1)

        def mean(self) -> str:
            return "mine"

    v = Scaled(jnp.ones(2), scale=3)
    np.testing.assert_array_equal(v.scaled, [3, 3])
    assert v.mean() == "mine"
    with pytest.raises(errors.StateTypeError, match="metadata of a Scaled cannot be named `scaled`"):
        Scaled(1.0, scaled=2)
