"""`mu.reset`: what it cannot reset it names; a stacked model stays stacked, and everything stays where it is."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mutatis as mu
from mutatis import errors

pytestmark = pytest.mark.once  # nothing here depends on the version of JAX


class Cell(mu.Module):
    def __init__(self, key: Any = None) -> None:
        self.w = mu.Param(jnp.zeros(2) if key is None else jax.random.normal(key, (2,)))
        self.h = mu.Hidden(init=lambda: jnp.zeros(2))
        self.c = mu.Cache(init=lambda: {"a": jnp.ones(3), "n": jnp.int32(0)})
        self.g = mu.Hidden(jnp.full(2, 7.0), init=lambda: jnp.full(2, 5.0))

    def __call__(self, x: Any) -> Any:
        self.h.value = self.h.value + x
        self.c.value = jax.tree.map(lambda v: v + 1, self.c.value)
        self.g.value = self.g.value * 2
        return self.h.value.sum() + self.c.value["a"].sum()


def shapes(cell: Cell) -> list[Any]:
    return [v.value.shape for v in (cell.w, cell.h, cell.g)] + [jax.tree.map(jnp.shape, cell.c.value)]


def single(*lanes: int) -> list[Any]:
    return [(*lanes, 2), (*lanes, 2), (*lanes, 2), {"a": (*lanes, 3), "n": lanes}]


KEYS = jax.random.split(jax.random.key(0), 2)
KINDS = mu.Any(mu.Hidden, mu.Cache)
call = mu.vmap(lambda cell, x: cell(x))
XS = jnp.array([1.0, 10.0])


@pytest.mark.parametrize(
    "filters", [(mu.Param,), (...,), ("params",), (mu.Any(mu.Hidden, mu.Param),), (lambda p, v: True,)]
)
def test_what_has_no_start_is_named(filters: tuple[Any, ...]) -> None:
    cell = Cell()
    before = np.asarray(cell.g)
    with pytest.raises(
        errors.FilterError, match=r"state `w` \(Param\) cannot be reset: nothing says how it starts"
    ) as caught:
        mu.reset(cell, *filters)
    assert caught.value.path == "w"
    np.testing.assert_array_equal(cell.g, before)
    cell.w = mu.Param(init=lambda: jnp.zeros(3))  # the cure
    mu.reset(cell, *filters)


def test_streams_are_reseeded_instead() -> None:
    model = {"rngs": mu.Rngs(0), "cell": Cell()}
    with pytest.raises(errors.FilterError, match=r"`mu\.reseed\(model, default=0\)` starts random streams anew"):
        mu.reset(model, mu.RngState)
    mu.reseed(model, default=0)


def test_without_filters_those_that_have_one() -> None:
    cell = Cell()
    cell(1.0)
    cell.w.value = jnp.ones(2)
    mu.reset(cell)
    np.testing.assert_array_equal(cell.w, [1, 1])
    np.testing.assert_array_equal(cell.h, [0, 0])
    np.testing.assert_array_equal(cell.g, [5, 5])


def test_nothing_is_written_if_one_is_frozen() -> None:
    cell = Cell()
    cell(1.0)
    mu.freeze(cell.g)
    h = np.asarray(cell.h)
    with pytest.raises(errors.FrozenStateError):
        mu.reset(cell, KINDS)
    np.testing.assert_array_equal(cell.h, h)


STACKS: dict[str, Callable[[], Cell]] = {
    "vmap": lambda: mu.vmap(Cell)(KEYS),
    "jit": lambda: mu.jit(mu.vmap(Cell))(KEYS),
    "jit, again": lambda: (f := mu.jit(mu.vmap(Cell))) and (f(KEYS), f(KEYS))[1],
    "clone": lambda: mu.clone(mu.vmap(Cell)(KEYS)),
    "deepcopy": lambda: copy.deepcopy(mu.vmap(Cell)(KEYS)),
    "pickle of a clone": lambda: mu.merge(*mu.split(mu.vmap(Cell)(KEYS))),
}


@pytest.mark.parametrize("make", STACKS.values(), ids=STACKS)
@pytest.mark.parametrize("called", [False, True])
def test_a_stacked_model_stays_stacked(make: Callable[[], Cell], called: bool) -> None:
    cells = make()
    if called:
        first = call(cells, XS)
    mu.reset(cells, KINDS)
    assert shapes(cells) == single(2)
    again = call(cells, XS)
    if called:
        np.testing.assert_array_equal(again, first)
    mu.jit(lambda: mu.reset(cells, KINDS))()
    assert shapes(cells) == single(2)
    np.testing.assert_array_equal(cells.g, np.full((2, 2), 5.0))


def test_a_deferred_state_of_a_stacked_model_starts_stacked() -> None:
    cells = mu.vmap(Cell)(KEYS)
    assert cells.h.value.shape == (2, 2)
    assert shapes(cells) == single(2)


def test_a_lane_resets_its_own() -> None:
    cells = mu.vmap(Cell)(KEYS)

    def reset(cell: Cell, x: Any) -> Any:
        mu.reset(cell, KINDS)
        assert cell.h.value.shape == (2,)
        return cell(x)

    outs = [mu.vmap(reset)(cells, XS) for _ in range(2)]
    np.testing.assert_array_equal(outs[0], outs[1])
    assert shapes(cells) == single(2)
    mu.reset(cells, KINDS)
    assert shapes(cells) == single(2)


@pytest.mark.parametrize("body", ["scan", "captured"])
def test_a_slice_in_a_scan_resets_its_own(body: str) -> None:
    cells = mu.vmap(Cell)(KEYS)
    call(cells, XS)

    def reset(carry: Any, cell: Cell) -> Any:
        mu.reset(cell, KINDS)
        return carry + cell.h.value.sum(), None

    if body == "scan":
        mu.scan(reset, jnp.float32(0), cells)
    else:
        mu.scan(lambda c, _: reset(c, cells), jnp.float32(0), length=2, states=mu.StateAxes({...: 0}))
    assert shapes(cells) == single(2)


def test_stacks_of_stacks_and_batches() -> None:
    keys = jax.random.split(jax.random.key(0), (3, 2))
    cells = mu.vmap(mu.vmap(Cell))(keys)
    assert shapes(cells) == single(3, 2)
    mu.reset(cells, KINDS)
    assert shapes(cells) == single(3, 2)
    mu.vmap(lambda cell: mu.reset(cell, KINDS))(cells)
    assert shapes(cells) == single(3, 2)
    mu.vmap(mu.vmap(lambda cell: mu.reset(cell, KINDS)))(cells)
    assert shapes(cells) == single(3, 2)
    mu.vmap(lambda cell: mu.reset(cell, KINDS), in_axes=1)(cells)  # along the inner axis
    assert shapes(cells) == single(3, 2)
    mu.reset(cells, mu.Hidden, batch_shape=(4,))
    assert [cells.h.shape, cells.g.shape] == [(3, 2, 4, 2)] * 2
    mu.vmap(lambda cell: mu.reset(cell, mu.Hidden, batch_shape=(5,)))(cells)
    assert [cells.h.shape, cells.g.shape] == [(3, 2, 5, 2)] * 2
    mu.reset(cells, mu.Hidden)
    assert shapes(cells) == single(3, 2)


def test_a_stacked_part_of_a_model() -> None:
    class Net(mu.Module):
        def __init__(self) -> None:
            self.layers = mu.vmap(Cell)(KEYS)
            self.head = Cell()

    net = Net()
    mu.reset(net, KINDS, batch_shape=(4,))
    assert net.layers.h.shape == (2, 4, 2)
    assert net.head.h.shape == (4, 2)
    stack = mu.vmap(lambda _: Net(), axis_size=3)(jnp.arange(3))
    mu.reset(stack, KINDS)
    assert stack.layers.h.shape == (3, 2, 2)
    assert stack.head.h.shape == (3, 2)


def test_placement_is_kept() -> None:
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    cells = mu.vmap(Cell)(KEYS)
    mu.reset(cells, KINDS)
    sharding = NamedSharding(mesh, P("x"))
    mu.update(cells, jax.tree.map(lambda x: jax.device_put(x, sharding), mu.state(cells)))
    call(cells, XS)
    mu.reset(cells, KINDS)
    assert shapes(cells) == single(2)
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(mu.state(cells, KINDS)))


class Bad(mu.Module):
    def __init__(self, w: Any, init: Callable[[Any], Any]) -> None:
        self.h = mu.Hidden(w, init=init(w))


@pytest.mark.jax_leaks
@pytest.mark.parametrize("transform", [mu.jit, mu.vmap])
@pytest.mark.parametrize("init", [lambda w: lambda: w, lambda w: lambda: w * 2, lambda w: w, lambda w: {"a": w + 1}])
def test_a_start_that_holds_a_tracer_says_so(transform: Any, init: Callable[[Any], Any]) -> None:
    bad = transform(lambda w: Bad(w, init))(jnp.ones((2, 3)))
    with pytest.raises(errors.DeferredStateError, match="its `init` uses a value of the transform it was made in"):
        mu.reset(bad)
    np.testing.assert_array_equal(bad.h, jnp.ones((2, 3)))


def test_its_cure() -> None:
    class Good(mu.Module):
        def __init__(self, w: Any) -> None:
            self.w = w
            self.h = mu.Hidden(init=lambda: jnp.zeros(3))

    good = mu.jit(Good)(jnp.ones(3))
    good.h.value = jnp.ones(3)
    mu.reset(good)
    np.testing.assert_array_equal(good.h, [0, 0, 0])


def test_pickles_of_stacked_states() -> None:
    cells = mu.vmap(lambda _: mu.Hidden(init=3.0), axis_size=2)(jnp.arange(2))
    other = pickle.loads(pickle.dumps(cells))
    mu.reset(other)
    np.testing.assert_array_equal(other, [3, 3])


@pytest.mark.parametrize(
    ("given", "shape"),
    [
        (4, (4,)),
        (np.int64(4), (4,)),
        (jnp.int32(4), (4,)),
        ([2, np.uint8(3)], (2, 3)),
        (np.array([2, 3]), (2, 3)),
        (0, (0,)),
        ((), ()),
    ],
    ids=str,
)
def test_a_batch_shape_of_integers_of_any_kind(given: Any, shape: tuple[int, ...]) -> None:
    cell = mu.nn.GRUCell(2, 3, rngs=mu.Rngs(0))
    mu.reset(cell, mu.Hidden, batch_shape=given)
    assert cell.carry.shape == (*shape, 3)


@pytest.mark.parametrize(
    "given", [-1, (2, -1), 2.0, (2.0,), "ab", True, (True,), None, np.ones((1, 1), int), {2: 3}], ids=str
)
def test_what_is_no_batch_shape(given: Any) -> None:
    cell = mu.nn.GRUCell(2, 3, rngs=mu.Rngs(0))
    cell.carry.value += 1
    with pytest.raises(errors.ArgumentError, match=r"(?s)cannot start with `batch_shape=.*integers from 0") as caught:
        mu.reset(cell, mu.Hidden, batch_shape=given)
    assert caught.value.path == "batch_shape" and cell.carry.shape == (3,) and float(cell.carry[0]) == 1


def test_a_traced_batch_shape() -> None:
    cell = mu.nn.GRUCell(2, 3, rngs=mu.Rngs(0))
    with pytest.raises(errors.ArgumentError, match="known when the call is made"):
        mu.jit(lambda n: mu.reset(cell, mu.Hidden, batch_shape=n))(2)
    mu.jit(lambda x: mu.reset(cell, mu.Hidden, batch_shape=x.shape[:1]))(jnp.ones((5, 2)))  # the cure
    assert cell.carry.shape == (5, 3)


def test_copies_that_are_made_in_lanes_are_stacked_once() -> None:
    several = mu.vmap(lambda rngs: mu.nn.BatchNorm(3, rngs=rngs))(mu.Rngs(0).split(5))
    for copied in (mu.vmap(mu.clone)(several), mu.vmap(lambda one: mu.merge(*mu.split(one)))(several)):
        mu.reset(copied, mu.BatchStat)
        assert copied.mean.shape == (5, 3) and mu.graphdef(copied) == mu.graphdef(several)
    stacks = mu.vmap(lambda rngs: mu.nn.Stack(lambda rngs: mu.nn.BatchNorm(3, rngs=rngs), 4, rngs=rngs))(
        mu.Rngs(0).split(5)
    )
    seconds = mu.vmap(lambda stack: stack[1])(stacks)
    mu.reset(seconds, mu.BatchStat)
    assert seconds.mean.shape == (5, 3)
    mu.reset(stacks, mu.BatchStat)
    assert stacks.layer.mean.shape == (5, 4, 3)


def test_a_batch_shape_without_filters_is_for_what_each_example_has() -> None:
    class Net(mu.Module):
        def __init__(self) -> None:
            self.norm = mu.nn.BatchNorm(2)
            self.cell = mu.nn.GRUCell(2, 3, rngs=mu.Rngs(0))
            self.count = mu.Variable(init=lambda: jnp.zeros(()))
            self.monitor = mu.recording.Monitor(self.cell, "carry", length=5)

    net = Net()
    net.monitor()
    mu.reset(net, batch_shape=4)
    assert net.cell.carry.shape == (4, 3) and net.count.shape == (4,)
    assert net.norm.mean.shape == (2,) and net.monitor.calls.shape == ()
    assert net.norm(jnp.ones((4, 2))).shape == (4, 2)
    assert net.monitor.count == 0
    mu.reset(net, mu.BatchStat, batch_shape=4)  # what is asked for by a filter
    assert net.norm.mean.shape == (4, 2)
