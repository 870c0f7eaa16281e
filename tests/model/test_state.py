"""State and its operations: taking values out, putting them back, copies, snapshots, freezing, views."""

from __future__ import annotations

import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mutatis as mu
from mutatis import errors
from tests.nets import Norm


class Net(mu.Module):
    def __init__(self) -> None:
        self.w = mu.Param(jnp.arange(2.0))
        self.blocks = [Norm(), Norm()]
        self.n = mu.Variable(0, init=0)
        self.flag = False
        self.x_tied = self.w


PATHS = [("blocks", 0, "mean"), ("blocks", 0, "scale"), ("blocks", 1, "mean"), ("blocks", 1, "scale"), ("n",), ("w",)]


# -- State as a mapping ------------------------------------------------------------------------------------------


def test_a_state_is_a_mapping_of_paths() -> None:
    net = Net()
    state = mu.state(net)
    assert [*state] == PATHS
    assert len(state) == 6
    assert state["w",] is net.w.value
    assert state["w"] is net.w.value
    assert state["blocks", 0, "mean"] is state["blocks"][0]["mean"]
    assert isinstance(state["blocks", 1], mu.State)
    assert [*state["blocks", 1]] == [("mean",), ("scale",)]
    assert state["blocks"].kinds()[0, "mean"] is mu.BatchStat
    assert ("blocks", 0) in state
    assert "blocks" in state
    assert "bias" not in state
    assert dict(state.items())["n",] is net.n.value
    assert state.get("bias") is None


def test_a_missing_path_is_told() -> None:
    with pytest.raises(KeyError, match=r"no state at 'blocks\[0\]\.bias'"):
        mu.state(Net())["blocks", 0, "bias"]


def test_repr_lists_kinds_and_types() -> None:
    assert repr(mu.state(Net(), mu.Variable)["blocks", 0]) == (
        "State({  # 2 parameters, 16 B in 2 states\n  mean: BatchStat float32[2],\n  scale: Param float32[2],\n})"
    )
    assert repr(mu.State({})) == "State({})"


def test_paths_with_many_numbers_are_in_order() -> None:
    model = [mu.Variable(i) for i in range(12)]
    assert [*mu.state(model)] == [(i,) for i in range(12)]
    assert [int(x) for x in jax.tree.leaves(mu.state(model))] == list(range(12))


def test_flat_and_back() -> None:
    state = mu.state(Net())
    again = mu.State.from_flat(state.flat(), state.kinds())
    assert again == state
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert mu.State.from_flat({("a", 1): 2.0}).kinds() == {("a", 1): mu.Variable}
    flat = state.flat()
    flat.clear()
    assert len(state) == 6


def test_a_pure_dict() -> None:
    net = Net()
    pure = mu.state(net).to_pure_dict()
    assert sorted(pure) == ["blocks", "n", "w"]
    assert pure["blocks"][0]["mean"] is net.blocks[0].mean.value
    other = Net()
    net.w.value = jnp.full(2, 5.0)
    mu.update(other, mu.state(net).to_pure_dict())
    assert mu.state(other) == mu.state(net)
    assert mu.merge(mu.graphdef(net), pure).n is not net.n


def test_a_variable_alone_has_the_empty_path() -> None:
    v = mu.Param(3.0)
    state = mu.state(v)
    assert [*state] == [()]
    assert float(state[()]) == 3
    assert repr(state) == "State({  # 1 parameter, 4 B in 1 state\n  .: Param float32[],\n})"
    mu.update(v, state.map(lambda _, x: x + 1))
    assert float(v) == 4


def test_union_and_map() -> None:
    net = Net()
    params, rest = mu.state(net, mu.Param, ...)
    both = params | rest
    assert both == mu.state(net)
    assert both.kinds() == mu.state(net).kinds()
    doubled = params.map(lambda path, value: value * 2 if path[-1] == "w" else value)
    np.testing.assert_array_equal(doubled["w"], [0, 2])
    np.testing.assert_array_equal((both | doubled)["w"], [0, 2])
    assert doubled.kinds() == params.kinds()


def test_filter_and_split() -> None:
    state = mu.state(Net())
    assert len(state.filter(mu.Param)) == 3
    assert len(state.filter(mu.Param, "batch_stats")) == 5
    params, rest = state.split(mu.Param, ...)
    assert (len(params), len(rest)) == (3, 3)
    with pytest.raises(errors.FilterError, match="1 state"):
        state.split(mu.Param, mu.BatchStat)


def test_equality_is_by_value_kind_and_path() -> None:
    a = mu.state(Net())
    assert a == mu.state(Net())
    assert a != a.map(lambda _, value: value + 1)
    assert a != a.map(lambda path, value: value.astype(jnp.float32))
    assert a != mu.State(a.flat())
    assert a != a.filter(mu.Param)
    assert a != 3
    with pytest.raises(TypeError, match="unhashable"):
        hash(a)


# -- State as a pytree -------------------------------------------------------------------------------------------


def test_a_state_is_a_pytree_of_values() -> None:
    state = mu.state(Net())
    leaves, treedef = jax.tree.flatten(state)
    assert len(leaves) == 6
    assert jax.tree.unflatten(treedef, leaves) == state
    assert treedef == jax.tree.structure(mu.state(Net()))
    assert treedef != jax.tree.structure(mu.State(state.flat())), "kinds are part of it"
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
    assert paths[0] == "['blocks[0].mean']"
    tagged = [mu.Param(1.0, tag="a")]
    assert jax.tree.structure(mu.state(tagged)) == jax.tree.structure(mu.state([mu.Param(1.0)])), "metadata are not"


def test_a_state_goes_through_raw_jax_and_optax() -> None:
    params = mu.state(Net(), mu.Param)

    @jax.jit
    def norm(params: Any) -> Any:
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(params))

    grads = jax.grad(norm)(params)
    assert isinstance(grads, mu.State)
    np.testing.assert_array_equal(grads["w"], [0, 2])
    tx = optax.sgd(0.5)
    updates, _ = tx.update(grads, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(new["blocks", 0, "scale"], [0, 0])
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), params, params)
    assert jax.vmap(norm)(stacked).shape == (2,)
    assert pickle.loads(pickle.dumps(new)) == new


# -- state, split, merge -----------------------------------------------------------------------------------------


def test_state_with_filters() -> None:
    net = Net()
    assert len(mu.state(net, mu.Param)) == 3
    params, stats = mu.state(net, mu.Param, mu.BatchStat)
    assert (len(params), len(stats)) == (3, 2)
    assert len(mu.state(net, mu.Cache)) == 0
    assert [*mu.state((net, net.blocks[0]))] == [(0, *path) for path in PATHS]


def test_split_and_merge() -> None:
    net = Net()
    definition, params, rest = mu.split(net, mu.Param, ...)
    other = mu.merge(definition, rest, params)
    assert mu.state(other) == mu.state(net)
    assert other.x_tied is other.w
    assert other.w is not net.w
    assert mu.graphdef(other) == definition


def test_split_refuses_leftovers() -> None:
    with pytest.raises(errors.FilterError) as caught:
        mu.split(Net(), mu.Param)
    text = str(caught.value)
    assert text.startswith("3 states match none of the filters")
    for path in ("blocks[0].mean", "blocks[1].mean", "n"):
        assert path in text
    assert "`...`" in text


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda flat: flat.pop(("w",)), "missing:    w"),
        (lambda flat: flat.update({("extra",): 1}), "unexpected: extra"),
    ],
)
def test_merge_refuses_what_does_not_fit(change: Any, problem: str) -> None:
    definition, state = mu.split(Net())
    flat = state.flat()
    change(flat)
    with pytest.raises(errors.StructureError, match=problem):
        mu.merge(definition, mu.State(flat))


@pytest.mark.parametrize("value", [jnp.zeros(5), jnp.zeros(2, jnp.int32), {"a": jnp.zeros(2)}])
def test_merge_checks_types(value: Any) -> None:
    """3.1: `merge` checks structure, shape and dtype for every kind."""
    definition, state = mu.split(Net())
    flat = {**state.flat(), ("w",): value}
    with pytest.raises(errors.StateTypeError, match="w"):
        mu.merge(definition, mu.State(flat, state.kinds()))


@pytest.mark.parametrize("bad", [Net, lambda: mu.state(Net()), lambda: 3, lambda: None])
def test_merge_needs_a_definition(bad: Any) -> None:
    with pytest.raises(errors.ArgumentError, match=r"mu\.split"):
        mu.merge(bad(), mu.state(Net()))
    with pytest.raises(TypeError):
        mu.state(Net()) | {"w": 1}


def test_merge_under_raw_jit() -> None:
    net = Net()
    definition, state = mu.split(net)

    @jax.jit
    def step(state: mu.State) -> Any:
        model = mu.merge(definition, state)
        model.n += 1
        model.w.value = model.w * 2
        return mu.state(model)

    new = step(step(state))
    assert int(new["n"]) == 2
    np.testing.assert_array_equal(new["w"], [0, 4])
    assert int(net.n) == 0


def test_clone() -> None:
    net = Net()
    other = mu.clone(net)
    other.w.value = jnp.full(2, 9.0)
    other.blocks[0].extra = 1
    np.testing.assert_array_equal(net.w, [0, 1])
    assert other.x_tied is other.w
    assert not hasattr(net.blocks[0], "extra")


def test_clone_inside_jit() -> None:
    net = Net()

    @mu.jit
    def step(net: Net) -> Any:
        other = mu.clone(net)
        other.n += 5
        return other.n.value, net.n.value

    assert tuple(map(int, step(net))) == (5, 0)


def test_clone_keeps_deferred_states_deferred() -> None:
    v = [mu.Param(init=lambda: jnp.ones(3))]
    w = mu.clone(v)
    assert v[0].deferred
    assert w[0].deferred
    assert w[0].shape == (3,)
    assert v[0].deferred


# -- update ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
def test_update(compiled: bool) -> None:
    net = Net()

    def put(net: Net, w: Any) -> None:
        mu.update(net, {"w": w, "blocks": {1: {"mean": w + 1}}}, mu.State({("n",): jnp.int32(3)}))

    (mu.jit(put) if compiled else put)(net, jnp.full(2, 4.0))
    np.testing.assert_array_equal(net.x_tied, [4, 4])
    np.testing.assert_array_equal(net.blocks[1].mean, [5, 5])
    np.testing.assert_array_equal(net.blocks[0].mean, [0, 0])
    assert int(net.n) == 3


@pytest.mark.parametrize(
    ("bad", "line"),
    [
        ({"w": jnp.zeros(3)}, "w: expected float32[2], got float32[3]"),
        ({"w": jnp.zeros(2, jnp.int32)}, "w: expected float32[2], got int32[2]"),
        ({"w": {"a": jnp.zeros(2)}}, "w"),
        ({"v": 1}, "unexpected: v"),
        ({"blocks": {2: {"mean": jnp.zeros(2)}}}, "unexpected: blocks[2].mean"),
        ({"n": 1.5}, "n: expected int32[], got float32[]"),
    ],
)
def test_update_is_all_or_nothing(bad: dict[str, Any], line: str) -> None:
    net = Net()
    before = mu.state(net)
    with pytest.raises(errors.StateTypeError) as caught:
        mu.update(net, {"blocks": {0: {"mean": jnp.ones(2)}}}, bad)
    assert line in str(caught.value)
    assert "nothing was written" in str(caught.value)
    assert mu.state(net) == before


def test_update_of_a_frozen_state_writes_nothing() -> None:
    net = Net()
    before = mu.state(net)
    with mu.freeze(net.w), pytest.raises(errors.FrozenStateError, match="w"):
        mu.update(net, {"n": 5, "w": jnp.ones(2)})
    assert mu.state(net) == before


def test_update_casts_when_asked() -> None:
    net = Net()
    mu.update(net, {"n": 2.0, "w": np.array([1, 2])}, cast=True)
    assert (net.n.dtype, net.w.dtype) == (jnp.int32, jnp.float32)
    with pytest.raises(errors.StateTypeError):
        mu.update(net, {"w": jnp.zeros(3)}, cast=True)


def test_update_of_a_state_that_is_a_tree() -> None:
    v = mu.Variable({"a": jnp.zeros(2), "b": 1})
    model = mu.Module()
    model.v = v
    mu.update(model, {"v": {"a": jnp.ones(2), "b": 5}})
    assert int(v.value["b"]) == 5
    with pytest.raises(errors.StateTypeError, match="v"):
        mu.update(model, {"v": {"a": jnp.ones(2)}})
    mu.update(v, {"a": jnp.zeros(2), "b": 7})
    assert int(v.value["b"]) == 7


def test_update_of_a_deferred_state_creates_it() -> None:
    model = [mu.Param(init=lambda: jnp.ones(3))]
    mu.update(model, {0: jnp.zeros(4)})
    assert model[0].shape == (4,)


@pytest.mark.parametrize("bad", [3, jnp.zeros(2), [1], "text"])
def test_update_refuses_what_is_no_state(bad: Any) -> None:
    with pytest.raises(errors.ArgumentError, match="is not a State"):
        mu.update(Net(), bad)


def test_a_tied_state_may_be_updated_by_either_path() -> None:
    """`x_tied` is another place of `w`, as `model.x_tied = ...` would show."""
    net = Net()
    with pytest.raises(errors.StateTypeError, match="x_tied"):
        mu.update(net, {"x_tied": jnp.ones(2)})


# -- pop ---------------------------------------------------------------------------------------------------------


def test_pop_takes_states_out() -> None:
    net = Net()
    net.blocks[0].seen = mu.Intermediate(3.0)
    net.list = [mu.Intermediate(1.0), mu.Cache(0), {"a": mu.Intermediate(2.0), "b": 1}]
    taken = mu.pop(net, mu.Intermediate)
    assert {p: float(v) for p, v in taken.flat().items()} == {
        ("blocks", 0, "seen"): 3,
        ("list", 0): 1,
        ("list", 2, "a"): 2,
    }
    assert not hasattr(net.blocks[0], "seen")
    assert [type(item) for item in net.list] == [mu.Cache, dict]
    assert net.list[1] == {"b": 1}
    assert len(mu.pop(net, mu.Intermediate)) == 0


def test_pop_with_several_filters() -> None:
    net = Net()
    params, stats = mu.pop(net, mu.Param, mu.BatchStat)
    assert (len(params), len(stats)) == (3, 2)
    assert [*mu.state(net)] == [("n",)]
    assert not hasattr(net, "x_tied")


def test_pop_under_jit_is_a_change_of_structure() -> None:
    net = Net()

    @mu.jit
    def step(net: Net) -> Any:
        net.seen = mu.Intermediate(jnp.sum(net.w.value))
        return mu.pop(net, mu.Intermediate)

    for _ in range(2):
        assert float(step(net)["seen"]) == 1
        assert not hasattr(net, "seen")


def test_pop_from_a_tuple() -> None:
    net = mu.Module()
    net.pair = (mu.Param(1.0), mu.Cache(2.0))
    try:
        mu.pop(net, mu.Param)
    except errors.MutatisError as error:
        assert "pair[0]" in str(error)  # noqa: PT017
        assert len(mu.state(net)) == 2
    else:
        assert [type(cell) for cell in net.pair] == [mu.Cache]


def test_pop_needs_a_filter() -> None:
    with pytest.raises(errors.FilterError, match="needs a filter") as caught:
        mu.pop(Net())
    exec("mu.pop(model, mu.Intermediate)", {"mu": mu, "model": Net()})
    assert "mu.pop(model, mu.Intermediate)" in str(caught.value)


def test_pop_in_a_transform_that_fails_takes_nothing() -> None:
    net = Net()
    net.list = [mu.Cache(0)]

    def fails(x: Any) -> Any:
        mu.pop(net, mu.Param, mu.Cache)
        raise KeyError("no")

    for transform in (mu.jit, mu.grad):
        with pytest.raises(KeyError):
            transform(fails)(1.0)
        assert len(mu.state(net)) == 7
        assert len(net.list) == 1


# -- snapshot ----------------------------------------------------------------------------------------------------


def test_a_snapshot_restores_values_and_structure() -> None:
    net = Net()
    before = mu.state(net)
    shown = repr(net)
    snapshot = mu.snapshot(net)
    step = mu.jit(lambda net: net.w.set(net.w + 1))
    step(net)
    net.n += 1
    net.flag = True
    net.extra = mu.Cache(0)
    net.blocks.append(Norm())
    del net.blocks[0].mean
    net.blocks[1].scale = mu.Param(jnp.zeros(5))
    for _ in range(2):
        snapshot.restore()
        assert mu.state(net) == before
        assert repr(net) == shown
        assert len(net.blocks) == 2
        step(net)
        np.testing.assert_array_equal(net.w, [1, 2])


def test_a_snapshot_inside_jit() -> None:
    net = Net()

    @mu.jit
    def attempt(net: Net) -> Any:
        snapshot = mu.snapshot(net)
        net.n += 10
        seen = net.n.value
        snapshot.restore()
        return seen

    assert int(attempt(net)) == 10
    assert int(net.n) == 0


# -- reset -------------------------------------------------------------------------------------------------------


def test_reset_writes_what_states_start_with() -> None:
    net = Net()
    net.n.value = 5
    net.blocks[0].mean.value = jnp.ones(2)
    net.w.value = jnp.ones(2)
    mu.reset(net)
    assert int(net.n) == 0
    np.testing.assert_array_equal(net.blocks[0].mean, [0, 0])
    np.testing.assert_array_equal(net.w, [1, 1]), "no init: left alone"


def test_reset_with_filters_and_batch_shape() -> None:
    net = Net()
    net.n.value = 5
    mu.reset(net, mu.BatchStat, batch_shape=(3,))
    assert net.blocks[0].mean.shape == (3, 2)
    assert int(net.n) == 5
    calls: list[int] = []
    v = mu.Hidden(init=lambda: calls.append(1) or jnp.full(2, 7.0))
    mu.reset(v, batch_shape=(2, 4))
    assert v.shape == (2, 4, 2)
    assert calls == [1]


def test_reset_inside_jit() -> None:
    net = Net()
    net.n.value = 3

    @mu.jit
    def step(net: Net) -> Any:
        net.n += 1
        seen = net.n.value
        mu.reset(net)
        return seen

    assert [int(step(net)) for _ in range(2)] == [4, 1]


def test_reset_keeps_placement() -> None:
    sharding = jax.sharding.NamedSharding(
        jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2]),
        jax.sharding.PartitionSpec("x"),
    )
    v = mu.Hidden(jax.device_put(jnp.ones(4), sharding), init=lambda: jnp.zeros(4))
    mu.reset(v)
    assert v.value.sharding == sharding
    np.testing.assert_array_equal(v, np.zeros(4))


def test_reset_of_a_frozen_state_is_refused() -> None:
    net = Net()
    with mu.freeze(net), pytest.raises(errors.FrozenStateError):
        mu.reset(net)


# -- freeze, thaw ------------------------------------------------------------------------------------------------


def test_frozen_states_are_read_not_written() -> None:
    net = Net()
    mu.freeze(net, mu.Param)
    assert net.w.frozen
    assert not net.n.frozen
    np.testing.assert_array_equal(net.w, [0, 1])
    before = mu.state(net)
    for write in (
        lambda: net.w.set(jnp.zeros(2)),
        lambda: setattr(net.w, "value", jnp.zeros(2)),
        lambda: net.w.__iadd__(1.0),
        lambda: net.w.__setitem__(0, 1.0),
        mu.jit(lambda: net.w.set(jnp.zeros(2))),
        lambda: mu.for_loop(lambda x: net.w.set(net.w + x), jnp.arange(2.0)),
    ):
        with pytest.raises(errors.FrozenStateError, match="frozen state") as caught:
            write()
        assert "`mu.thaw(model)`" in str(caught.value)
        assert mu.state(net) == before
    exec("mu.thaw(model)", {"mu": mu, "model": net})  # the cure
    net.w.value = jnp.zeros(2)


def test_frozen_states_match_their_kind_and_are_left_out_of_gradients() -> None:
    net = Net()
    mu.freeze(net.blocks[0])
    assert len(mu.state(net, mu.Param)) == 3
    grads = mu.grad(lambda m: jnp.sum(m.w * m.blocks[0].scale * m.blocks[1].scale))(net)
    assert set(grads) == {("w",), ("blocks", 1, "scale")}


def test_frozen_states_may_be_constants_of_raw_jax() -> None:
    net = Net()
    with mu.freeze(net):
        np.testing.assert_array_equal(jax.jit(lambda: net.w * 2)(), [0, 2])
        total, _ = jax.lax.scan(lambda c, x: (c + net.w.value[1] * x, None), 0.0, jnp.arange(3.0))
    assert float(total) == 3
    with pytest.raises(errors.TraceLevelError):
        jax.jit(lambda: net.w * 2)()


def test_freezing_for_a_while_puts_the_marks_back() -> None:
    net = Net()
    mu.freeze(net.n)
    with mu.freeze(net) as same:
        assert same is net
        assert all(cell.frozen for cell in mu.variables(net).values())
        with mu.thaw(net.w):
            net.w.value = jnp.ones(2)
        assert net.w.frozen
    assert [p for p, cell in mu.variables(net).items() if cell.frozen] == [("n",)]
    with pytest.raises(KeyError), mu.freeze(net):
        raise KeyError
    assert not net.w.frozen


def test_batch_statistics_say_to_call_eval() -> None:
    net = Net()
    with mu.freeze(net), pytest.raises(errors.FrozenStateError, match=r"model\.eval\(\)"):
        net.blocks[0].mean.value = jnp.ones(2)


def test_freezing_inside_a_failing_transform_is_undone() -> None:
    net = Net()

    def fails(x: Any) -> Any:
        mu.freeze(net)
        raise KeyError

    with pytest.raises(KeyError):
        mu.jit(fails)(1.0)
    assert not net.w.frozen


def test_freezing_inside_jit_is_replayed_or_refused() -> None:
    def step(net: Net) -> None:
        net.n += 1
        mu.freeze(net.w)

    compiled = mu.jit(step)
    for _ in range(2):
        net = Net()
        try:
            compiled(net)
        except errors.MutatisError:
            assert not net.w.frozen
            assert int(net.n) == 0
        else:
            assert net.w.frozen
            assert int(net.n) == 1


def test_freezing_for_a_while_inside_jit() -> None:
    @mu.jit
    def step(net: Net) -> Any:
        with mu.freeze(net.w):
            grads = mu.grad(lambda m: jnp.sum(m.w * m.blocks[0].scale))(net)
        net.w.value = net.w + 1
        return grads

    net = Net()
    for _ in range(2):
        assert set(step(net)) == {("blocks", 0, "scale"), ("blocks", 1, "scale")}
    np.testing.assert_array_equal(net.w, [2, 3])


# -- view --------------------------------------------------------------------------------------------------------


def test_a_view_is_another_module_over_the_same_cells() -> None:
    net = Net()
    other = mu.view(net, training=False)
    assert other is not net
    assert type(other) is Net
    assert other.w is net.w
    assert other.x_tied is net.w
    assert (other.training, net.training, other.blocks[0].training, net.blocks[0].training) == (
        False,
        True,
        False,
        True,
    )
    net.w.value = jnp.full(2, 7.0)
    np.testing.assert_array_equal(other.w, [7, 7])
    mu.jit(lambda m: m.w.set(m.w + 1))(other)
    np.testing.assert_array_equal(net.w, [8, 8])


def test_a_view_with_other_statics() -> None:
    net = Net()
    other = mu.view(net, flag=True)
    assert (other.flag, net.flag) == (True, False)
    run = mu.jit(lambda m, x: x + 1 if m.flag else x)
    assert [float(run(m, 1.0)) for m in (net, other, net, other)] == [1, 2, 1, 2]
    with pytest.raises(errors.ArgumentError, match="no module of Net has an attribute `flg`"):
        mu.view(net, flg=True)


def test_a_view_does_not_write_states() -> None:
    net = Net()
    for change in ({"w": 3.0}, {"n": 5}, {"w": jnp.ones(2)}, {"blocks": []}):
        with pytest.raises(errors.ArgumentError) as caught:
            mu.view(net, **change)
        assert next(iter(change)) in str(caught.value)
    np.testing.assert_array_equal(net.w, [0, 1])
    assert int(net.n) == 0
    assert len(net.blocks) == 2


def test_a_view_and_its_original_in_one_call() -> None:
    net = Net()

    @mu.jit
    def step(a: Net, b: Net) -> Any:
        a.n += 1
        b.n += 1
        return a.n.value

    assert int(step(net, mu.view(net, training=False))) == 2
    assert int(net.n) == 2


def test_a_state_of_many_layers_prints_as_one() -> None:
    layers = [{"w": mu.Param(jnp.ones(2)), "b": mu.Param(0.0)} for _ in range(300)]
    odd = [mu.Param(1.0), mu.Cache(1.0), mu.Param(1.0), mu.Param(1.0)]
    grid = [[mu.Param(1.0)] * 1, [mu.Param(1.0)], [mu.Param(1.0)]]
    assert repr(
        mu.state({"layers": layers, "odd": odd, "grid": grid, "two": [mu.Param(1), mu.Param(2)]})
    ).splitlines() == [
        "State({  # 908 parameters, 3.6 kB in 609 states",
        "  grid[0..2][0]: Param float32[],",
        "  layers[0..299].b: Param float32[],",
        "  layers[0..299].w: Param float32[2],",
        "  odd[0]: Param float32[],",
        "  odd[2]: Param float32[],",
        "  odd[3]: Param float32[],",
        "  odd[1]: Cache float32[],",
        "  two[0]: Param int32[],",
        "  two[1]: Param int32[],",
        "})",
    ]
