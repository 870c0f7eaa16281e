"""Bad input: a clear error that names the state, says what was expected and gives a cure; and nothing is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import errors

pytestmark = pytest.mark.once  # nothing here depends on the version of JAX


class Net(mu.Module):
    def __init__(self) -> None:
        self.w = mu.Param(jnp.arange(3.0))
        self.n = mu.Variable(0)
        self.mean = mu.BatchStat(jnp.zeros(()))
        self.steps = 0
        self.blocks = [mu.Cache(jnp.zeros(2))]

    def __call__(self, x: Any = 1.0) -> jax.Array:
        self.n += 1
        return jnp.sum(self.w.value) * x


XS = jnp.arange(3.0)


def leftover_states_in_split(m: Net) -> None:
    mu.split(m, mu.Param)


def wrong_shape_in_update(m: Net) -> None:
    mu.update(m, {"w": jnp.zeros(4), "n": 5})


def wrong_dtype_in_update(m: Net) -> None:
    mu.update(m, {"n": 1.5, "mean": 3.0})


def unknown_path_in_update(m: Net) -> None:
    mu.update(m, {"weight": jnp.zeros(3), "mean": 3.0})


def wrong_structure_in_update(m: Net) -> None:
    mu.update(m, {"w": {"a": jnp.zeros(3)}, "mean": 3.0})


def missing_state_in_merge(m: Net) -> None:
    definition, params, _ = mu.split(m, mu.Param, ...)
    mu.merge(definition, params)


def container_of_bare_arrays(m: Net) -> None:
    m.arrays = [jnp.zeros(2)]


def unhashable_static(m: Net) -> None:
    m.names = {"a", "b"}


def mutable_static(m: Net) -> None:
    class Config:
        pass

    m.config = Config()


def lane_dependent_write(m: Net) -> None:
    mu.vmap(lambda x: m.mean.set(x))(XS)


def dtype_change_in_a_loop(m: Net) -> None:
    mu.for_loop(lambda x: m.n.set(m.n.value.astype(jnp.float32)), XS)


def shape_change_in_a_while_loop(m: Net) -> None:
    mu.while_loop(lambda _: m.n < 3, lambda _: m.w.set(jnp.zeros(5)), None)


def dtype_change_in_a_branch(m: Net) -> None:
    mu.cond(True, lambda: m.n.set(m.n.value.astype(jnp.float32)), lambda: None)


def raw_write(m: Net) -> None:
    jax.jit(lambda: m.n.set(1))()


def raw_read(m: Net) -> None:
    jax.jit(lambda: m.w.value)()


def raw_gradient_write(m: Net) -> None:
    jax.grad(lambda x: m(x))(1.0)


def raw_vmap_write(m: Net) -> None:
    jax.vmap(lambda x: m(x))(XS)


def raw_write_inside_jit(m: Net) -> None:
    mu.jit(lambda: jax.jit(lambda: m.n.set(m.n + 1))())()


def write_in_a_condition(m: Net) -> None:
    def condition(_: Any) -> Any:
        m.n += 1
        return m.n < 3

    mu.while_loop(condition, lambda _: None, None)


def plain_number_counted_up(m: Net) -> None:
    def count() -> None:
        m.steps += 1

    mu.jit(count)()


def frozen_write(m: Net) -> None:
    with mu.freeze(m, mu.Variable):
        mu.jit(m)()


def created_in_a_loop(m: Net) -> None:
    mu.for_loop(lambda x: m.blocks.append(mu.Cache(x)), XS)


def attribute_in_a_branch(m: Net) -> None:
    mu.cond(True, lambda: setattr(m, "flag", True), lambda: None)


def nothing_to_differentiate(m: Net) -> None:
    mu.grad(lambda: m(), of=m, wrt=mu.RngState)()


def two_axes(m: Net) -> None:
    mu.vmap(lambda a, b: a(), in_axes=(0, None))(m, m)


def no_such_axis(m: Net) -> None:
    mu.vmap(lambda a: a())(m)


def carry_changes(m: Net) -> None:
    mu.scan(lambda c, x: (jnp.zeros(2), m()), jnp.zeros(3), XS)


def lengths_differ(m: Net) -> None:
    mu.for_loop(lambda x, y: m(), jnp.zeros(2), jnp.zeros(3))


def not_a_filter(m: Net) -> None:
    mu.state(m, 3)


def item_of_another_dtype(m: Net) -> None:
    m.n.value = jnp.zeros(3, jnp.int32)
    try:
        m.n[0] = 1.5
    finally:
        m.n.value = 0


# program -> (error, what its text has to say)
REFUSALS: dict[Callable[[Net], None], tuple[type[Exception], list[str]]] = {
    leftover_states_in_split: (errors.FilterError, ["blocks[0]", "mean", "n", "`...`"]),
    wrong_shape_in_update: (errors.StateTypeError, ["w: expected float32[3], got float32[4]"]),
    wrong_dtype_in_update: (errors.StateTypeError, ["n: expected int32[], got float32[]", "cast=True"]),
    unknown_path_in_update: (errors.StateTypeError, ["unexpected: weight"]),
    wrong_structure_in_update: (errors.StateTypeError, ["w"]),
    missing_state_in_merge: (errors.StructureError, ["missing:", "n", "mean", "blocks[0]"]),
    container_of_bare_arrays: (errors.StructureError, ["`Net.arrays`", "mu.Param(x) for x in arrays"]),
    unhashable_static: (errors.StaticAttributeError, ["`Net.names`", "mu.static", "mu.Variable"]),
    mutable_static: (errors.StaticAttributeError, ["`Net.config`", "Config", "mu.static"]),
    lane_dependent_write: (errors.LaneError, ["`m.mean`", "BatchStat", "pmean", "StateAxes"]),
    dtype_change_in_a_loop: (
        errors.StateTypeError,
        ["`m.n`", "expected: int32[]", "got:      float32[]", "astype(jnp.int32)"],
    ),
    shape_change_in_a_while_loop: (errors.StateTypeError, ["`m.w`", "float32[3]", "float32[5]"]),
    dtype_change_in_a_branch: (errors.StateTypeError, ["`m.n`", "in a branch", "astype(jnp.int32)"]),
    raw_write: (errors.TraceLevelError, ["`Net.n`", "jax.jit", "mu.functionalize"]),
    raw_read: (errors.TraceLevelError, ["`Net.w`", "was read", "mu.freeze"]),
    raw_gradient_write: (errors.TraceLevelError, ["`Net.n`", "jax.grad"]),
    raw_vmap_write: (errors.TraceLevelError, ["`Net.n`", "jax.vmap"]),
    raw_write_inside_jit: (errors.TraceLevelError, ["`m.n`", "written"]),
    write_in_a_condition: (errors.StructureError, ["`m.n`", "condition", "in the body"]),
    plain_number_counted_up: (errors.StaticAttributeError, ["`Net.steps`", "mu.Variable(0)"]),
    frozen_write: (errors.FrozenStateError, ["n`", "mu.thaw"]),
    created_in_a_loop: (errors.StructureError, ["`m.blocks`", "body"]),
    attribute_in_a_branch: (errors.StructureError, ["`m.flag`", "branch"]),
    nothing_to_differentiate: (errors.FilterError, ["`of`", "OfType(RngState)"]),
    two_axes: (errors.AxisError, ["`a.", "two axes", "0 and None"]),
    no_such_axis: (errors.AxisError, ["has no axis 0", "StateAxes"]),
    carry_changes: (errors.StateTypeError, ["float32[3]", "float32[2]"]),
    lengths_differ: (errors.ArgumentError, ["[2, 3]"]),
    not_a_filter: (errors.FilterError, ["3", "mu.Param"]),
    item_of_another_dtype: (errors.StateTypeError, ["astype(jnp.int32)"]),
}


@pytest.mark.parametrize("program", REFUSALS, ids=lambda f: f.__name__)
def test_refusals(program: Callable[[Net], None]) -> None:
    model = Net()
    values, shown = mu.state(model), repr(model)
    kind, parts = REFUSALS[program]
    with pytest.raises(kind) as caught:
        program(model)
    text = str(caught.value)
    assert isinstance(caught.value, errors.MutatisError)
    for part in parts:
        assert part in text, text
    assert mu.state(model) == values
    assert repr(model) == shown
    assert float(mu.jit(model)()) == 3, "the next call works"
    assert int(model.n) == 1


def test_errors_are_fitting_built_ins_too() -> None:
    with pytest.raises(TypeError):
        mu.update(Net(), {"w": jnp.zeros(1)})
    with pytest.raises(ValueError, match="match none"):
        mu.split(Net(), mu.Param)


def test_the_first_ten_differences_are_listed() -> None:
    model = mu.Module()
    for number in range(15):
        setattr(model, f"v{number:02}", mu.Variable(0))
    with pytest.raises(errors.StateTypeError) as caught:
        mu.update(model, {f"v{number:02}": jnp.zeros(2) for number in range(15)})
    assert str(caught.value).count("expected int32[], got float32[2]") == 10
    assert "and 5 more" in str(caught.value)


def test_a_cast_is_made_when_asked_for() -> None:
    model = Net()
    mu.update(model, {"n": 2.0, "w": np.zeros(3, np.int32)}, cast=True)
    assert model.n.dtype == jnp.int32
    assert model.w.dtype == jnp.float32
    assert int(model.n) == 2


def test_the_place_where_a_state_was_made_is_told() -> None:
    with pytest.raises(errors.StateTypeError, match=r"made at:  test_refusals\.py:\d+ in Net\.__init__"):
        dtype_change_in_a_loop(Net())
