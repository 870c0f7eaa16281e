"""Errors: one row per class, with a program that raises it, its whole text, and its advice executed."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import sys
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mutatis as mu
from docs.site import navigation
from mutatis import errors

CLASSES = {
    cls
    for _, cls in inspect.getmembers(errors, inspect.isclass)
    if issubclass(cls, errors.MutatisError) and cls is not errors.MutatisError and cls.__module__ == errors.__name__
}


class Block(mu.Module):
    def __init__(self) -> None:
        self.mean = mu.BatchStat(jnp.zeros(3))


class Net(mu.Module):
    def __init__(self) -> None:
        self.w = mu.Param(jnp.ones(3))
        self.blocks = [Block()]


class Row:
    """A program that raises an error, the error's text, and what its advice does."""

    def __init__(
        self,
        raises: Callable[[Net, Path], None],
        text: str,
        cured: Callable[[Net, Path], Any],
        builtin: type[Exception],
        path: str | None,
    ) -> None:
        self.raises = raises
        self.text = textwrap.dedent(text).strip()
        self.cured = cured
        self.builtin = builtin
        self.path = path


def change_type(net: Net, _: Path) -> None:
    def step(x: Any) -> None:
        net.blocks[0].mean.value = jnp.zeros(2, jnp.int32)

    mu.for_loop(step, jnp.arange(2))


def change_type_cured(net: Net, _: Path) -> None:
    def step(x: Any) -> None:
        x = jnp.zeros(3, jnp.int32)
        v = net.blocks[0].mean
        v.value = x.astype(jnp.float32)

    mu.for_loop(step, jnp.arange(2))


def write_frozen(net: Net, _: Path) -> None:
    mu.freeze(net)
    net.w.value = jnp.zeros(3)


def write_frozen_cured(model: Net, _: Path) -> None:
    mu.thaw(model)
    model.w.value = jnp.zeros(3)


def raw_write(net: Net, _: Path) -> None:
    @jax.jit
    def step(x: Any) -> Any:
        net.w.value = net.w * x
        return x

    mu.freeze(net.blocks)
    with mu.freeze(net.w):
        pass
    net.w.value = jnp.ones(3)
    jax.vmap(lambda x: net.w.set(x))(jnp.zeros((2, 3)))


def raw_write_cured(net: Net, _: Path) -> None:
    mu.vmap(lambda x: net.w.set(net.w + 1))(jnp.zeros((2, 3)))
    pure, state = mu.functionalize(lambda x: net.w.set(x), of=net)
    jax.vmap(pure, in_axes=(None, 0))(state, jnp.zeros((2, 3)))


def per_lane(net: Net, _: Path) -> None:
    mu.vmap(lambda x: net.w.set(x), axis_name="lanes")(jnp.zeros((2, 3)))


def per_lane_cured(net: Net, _: Path) -> None:
    mu.vmap(lambda x: net.w.set(jax.lax.pmean(x, "lanes")), axis_name="lanes")(jnp.zeros((2, 3)))
    net.w.value = jnp.zeros((2, 3))
    mu.vmap(lambda x: net.w.set(x), states=mu.StateAxes({mu.Param: 0, ...: None}))(jnp.zeros((2, 3)))
    assert net.w.shape == (2, 3)


def bare_arrays(net: Net, _: Path) -> None:
    net.parts = {"a": jnp.zeros(2)}


def bare_arrays_cured(self: Net, _: Path) -> None:
    arrays = [jnp.zeros(2)]
    self.parts = [mu.Param(x) for x in arrays]
    self.parts = mu.Variable(arrays)


def unhashable(net: Net, _: Path) -> None:
    net.names = {"a"}


def unhashable_cured(self: Net, _: Path) -> None:
    self.names = mu.static({"a"})
    assert self.names == {"a"}
    del self.names
    self.names = mu.Variable(jnp.zeros(2))


def leftovers(net: Net, _: Path) -> None:
    mu.split(net, mu.Param)


def leftovers_cured(net: Net, _: Path) -> None:
    assert len(mu.split(net, mu.Param, ...)) == 3


def deferred(net: Net, _: Path) -> None:
    net.late = mu.nn.Linear(None, 2, rngs=mu.Rngs(0))
    net.late.kernel.value


def deferred_cured(net: Net, _: Path) -> None:
    model = mu.nn.Linear(None, 2, rngs=mu.Rngs(0))
    model(jnp.zeros((1, 3)))
    assert model.kernel.shape == (3, 2)
    rngs = mu.Rngs(0)
    assert eval("nn.Linear(3, 2, rngs=rngs)", {"nn": mu.nn, "rngs": rngs}).kernel.shape == (3, 2)


def missing_package(_: Net, __: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "haiku", None)
        patch.delitem(sys.modules, "mutatis.interop.haiku", raising=False)
        mu.interop.FromHaiku


def no_stream(_: Net, __: Path) -> None:
    mu.Rngs(params=0).dropout()


def no_stream_cured(_: Net, __: Path) -> None:
    mu.Rngs(dropout=0).dropout()
    mu.Rngs(0).dropout()


def unset_context(_: Net, __: Path) -> None:
    mu.Context("dt").get()


def unset_context_cured(_: Net, __: Path) -> None:
    dt = mu.Context("dt")
    with dt.set(0.1):
        assert dt.get() == 0.1
    assert mu.Context("dt", None).get() is None


def no_path(net: Net, _: Path) -> None:
    _ = mu.state(net)["blocks.0.mean"]


def no_path_cured(net: Net, _: Path) -> None:
    state = mu.state(net)
    assert state["blocks[0].mean"] is net.blocks[0].mean.value


def no_axis(net: Net, _: Path) -> None:
    net.scale = mu.Cache(2.0)
    mu.vmap(lambda model: model.w.value)(net)


def no_axis_cured(net: Net, _: Path) -> None:
    net.scale = mu.Cache(2.0)
    mu.vmap(lambda model: model.w.value, in_axes=(mu.StateAxes({mu.Cache: None, ...: 0}),))(net)
    make = lambda _: Net()  # noqa: E731
    keys = jnp.arange(3)
    mu.vmap(make)(keys)


def wrong_argument(net: Net, _: Path) -> None:
    mu.nn.Dropout(2, rngs=mu.Rngs(0))


def unplanned(net: Net, _: Path) -> None:
    step = mu.jit(lambda x: x)
    with step.expect(compilations=1):
        step(jnp.ones(2))
        step(jnp.ones(3))


def unplanned_cured(net: Net, _: Path) -> None:
    step = mu.jit(lambda x: x)
    with step.expect(compilations=2):
        step(jnp.ones(2))
        step(jnp.ones(3))


def wrong_argument_cured(net: Net, _: Path) -> None:
    rngs = mu.Rngs(0)
    eval("nn.Dropout(0.5, rngs=rngs)", {"nn": mu.nn, "rngs": rngs})(jnp.ones(3))


def out_of_turn(net: Net, _: Path) -> None:
    with mu.transaction(net) as tx:
        pass
    with tx:
        pass


def out_of_turn_cured(model: Net, _: Path) -> None:
    for _ in range(2):
        with mu.transaction(model) as tx:
            tx.rollback()


def bad_gradients(net: Net, _: Path) -> None:
    mu.Optimizer(net, optax.sgd(0.1)).update(mu.State({("v",): jnp.zeros(3)}))


def bad_gradients_cured(net: Net, _: Path) -> None:
    mu.Optimizer(net, optax.sgd(0.1)).update(mu.grad(lambda m: jnp.sum(m.w.value))(net))


def no_such_axis(net: Net, _: Path) -> None:
    with jax.set_mesh(jax.make_mesh((2,), ("data",))):
        mu.Param(jnp.zeros(4), name="w", sharding=("rows",))


def no_such_axis_cured(net: Net, _: Path) -> None:
    with jax.set_mesh(jax.make_mesh((2,), ("data",))), mu.sharding.rules(rows="data"):
        mu.Param(jnp.zeros(4), name="w", sharding=("rows",))


def shared_name(net: Net, _: Path) -> None:
    request = mu.effects.InitialLocalStateRequest(lambda: jnp.zeros(3), "cache", "keys")
    mu.effects.handle_local_states([request, request], "cache")


def shared_name_cured(net: Net, _: Path) -> None:
    request = mu.effects.InitialLocalStateRequest(lambda: jnp.zeros(3), "cache", "keys")
    layer = [request, mu.rename(request, lambda name: name + "2")]
    assert len(mu.effects.handle_local_states(layer, category="cache")[1]) == 2
    layer = [request, request]
    assert len(mu.effects.handle_local_states(layer, category="cache", state_sharing="allowed")[1]) == 1


def no_checkpoint(net: Net, folder: Path) -> None:
    from mutatis import checkpoint

    checkpoint.restore(folder / "nothing", net)


def no_checkpoint_cured(net: Net, folder: Path) -> None:
    from mutatis import checkpoint

    checkpoint.save(folder / "something", net)
    checkpoint.restore(folder / "something", net)


def check_fails(net: Net, _: Path) -> None:
    @mu.jit
    def step() -> None:
        net.blocks[0].mean.value -= 5
        mu.error_if(net.blocks[0].mean.value < 0, "a mean is negative")

    step()


def check_holds(net: Net, _: Path) -> None:
    with mu.inspect.history(net) as past:
        net.blocks[0].mean.value += 1
        past.rollback()


TABLE: dict[type[errors.MutatisError], Row] = {
    errors.StateTypeError: Row(
        change_type,
        """
        state `net.blocks[0].mean` (BatchStat) changes its type in the body of a loop inside `for_loop(change_type.step)`
          expected: float32[3]
          got:      int32[2]
          made at:  test_errors.py:LINE in Block.__init__
        What is carried or chosen has one type. Convert what is written: `v.value = x.astype(jnp.float32)`. Or give the state the type int32[2] before.
        """,  # noqa: E501
        change_type_cured,
        TypeError,
        "net.blocks[0].mean",
    ),
    errors.FrozenStateError: Row(
        write_frozen,
        """
        frozen state `Net.w` (Param) was written
        Make it live again: `mu.thaw(model)`.
        """,
        write_frozen_cured,
        TypeError,
        "Net.w",
    ),
    errors.TraceLevelError: Row(
        raw_write,
        """
        state `Net.w` (Param) was written inside a raw JAX transform (jax.vmap)
          made at:  test_errors.py:LINE in Net.__init__
        The write would be lost or leak a tracer. Use the transform of the same name in `mu` (`mu.jit`, `mu.grad`, `mu.vmap`, `mu.scan`, ...; `mu.custom_vjp` for a rule), or make a pure function with `mu.functionalize`.
        """,  # noqa: E501
        raw_write_cured,
        RuntimeError,
        "Net.w",
    ),
    errors.LaneError: Row(
        per_lane,
        """
        state `net.w` (Param) is shared by all lanes and was given a value that differs per lane inside `vmap(lambda in per_lane)`
          expected: the same value in all lanes, or an axis for the state
          got:      a value per lane
          made at:  test_errors.py:LINE in Net.__init__
        Reduce it, `jax.lax.pmean(x, axis_name)`, or give the state an axis: `states=mu.StateAxes({mu.Param: 0, ...: None})`.
        """,
        per_lane_cured,
        ValueError,
        "net.w",
    ),
    errors.StructureError: Row(
        bare_arrays,
        """
        `Net.parts` is a dict of bare arrays
          expected: Variables, Modules, static values, or containers of these
          got:      float32[2]
        Say what kind of state they are: `self.parts = [mu.Param(x) for x in arrays]`, or hold them in one state: `self.parts = mu.Variable(arrays)`.
        """,  # noqa: E501
        bare_arrays_cured,
        ValueError,
        "Net.parts",
    ),
    errors.StaticAttributeError: Row(
        unhashable,
        """
        `Net.names` cannot be static: set is not hashable
          expected: a Variable, Module, array, or a hashable value such as a number, string, function or frozen dataclass
          got:      {'a'}
        Keep it by identity, `self.names = mu.static(...)`, or make it state: `self.names = mu.Variable(...)`.
        """,
        unhashable_cured,
        TypeError,
        "Net.names",
    ),
    errors.FilterError: Row(
        leftovers,
        """
        1 state matches none of the filters OfType(Param)
          blocks[0].mean
        Add `...` as the last filter: it takes the rest.
        """,
        leftovers_cured,
        ValueError,
        None,
    ),
    errors.DeferredStateError: Row(
        deferred,
        """
        state `Net.late.kernel` (Param) was read before its layer created it
          made at:  test_errors.py:LINE in deferred
        Its size is inferred at the first call: call the model once, or give the size, e.g. `nn.Linear(in_features, out_features, rngs=rngs)`.
        """,  # noqa: E501
        deferred_cured,
        ValueError,
        "Net.late.kernel",
    ),
    errors.RandomStreamError: Row(
        no_stream,
        """
        there is no random stream `dropout`, and no default stream
          got:      streams ['params']
        Name it, `mu.Rngs(dropout=0)`, or give a default, `mu.Rngs(0)`.
        """,
        no_stream_cured,
        ValueError,
        "dropout",
    ),
    errors.ContextError: Row(
        unset_context,
        """
        context `dt` is not set, and has no default
        Set it, `with dt.set(value): ...`, or give a default: `mu.Context("dt", None)`.
        """,
        unset_context_cured,
        LookupError,
        "dt",
    ),
    errors.PathError: Row(
        no_path,
        """
        no state at 'blocks.0.mean'
          expected: a path of the 2 that are there, or the beginning of one
          blocks[0].mean
          w
        The nearest is `state['blocks[0].mean']`.
        """,
        no_path_cured,
        KeyError,
        "blocks.0.mean",
    ),
    errors.MissingPackageError: Row(
        missing_package,
        """
        `mu.interop` needs the package `dm-haiku`, which is not installed
        pip install 'mutatis[interop]'  # or alone: pip install dm-haiku
        """,
        lambda _, __: None,  # nothing is installed in a test
        ImportError,
        "haiku",
    ),
    errors.AxisError: Row(
        no_axis,
        """
        state `model.scale` (Cache) has no axis 0 inside `vmap(lambda in no_axis)`
          expected: at least 1 axis
          got:      shape ()
          made at:  test_errors.py:LINE in no_axis
        Share it, `mu.StateAxes({mu.Cache: None, ...: 0})`, or stack the models: `mu.vmap(make)(keys)`.
        """,
        no_axis_cured,
        ValueError,
        "model.scale",
    ),
    errors.CompilationError: Row(
        unplanned,
        """
        `jit(lambda in unplanned)` is compiled once more than planned
          expected: 1 compilation
          got:      2
          x: float32[2] -> float32[3]
        Keep that the same, pass it as an array, or plan for it: `step.expect(compilations=2)`.
        """,
        unplanned_cured,
        RuntimeError,
        None,
    ),
    errors.ArgumentError: Row(
        wrong_argument,
        """
        `nn.Dropout` cannot drop with rate 2
          expected: a probability, from 0 to 1
          got:      2
        `nn.Dropout(0.5, rngs=rngs)`
        """,
        wrong_argument_cured,
        ValueError,
        "rate",
    ),
    errors.TransactionError: Row(
        out_of_turn,
        """
        a transaction was entered a second time
        Make one for each block: `with mu.transaction(model) as tx: ...`.
        """,
        out_of_turn_cured,
        RuntimeError,
        None,
    ),
    errors.OptimizerError: Row(
        bad_gradients,
        """
        the gradients do not fit the parameters of the optimizer
          missing:    w
          unexpected: v
        Differentiate the model that the optimizer was made with, by the same `wrt`.
        """,
        bad_gradients_cured,
        ValueError,
        None,
    ),
    errors.EffectError: Row(
        shared_name,
        """
        several places share the state `keys`
          expected: one place for each name (state_sharing='forbidden')
        If that is meant: `mu.effects.handle_local_states(layer, category=..., state_sharing='allowed')`. If not, give each its own name.
        """,  # noqa: E501
        shared_name_cured,
        ValueError,
        "keys",
    ),
    errors.ShardingError: Row(
        no_such_axis,
        """
        state `w` (Param) is to be split along `rows`, which is no axis of the mesh
          expected: an axis of the mesh (data: 2) or a name that the rules map to one
          got:      ('rows',)
          made at:  test_errors.py:LINE in no_such_axis
        Say what it stands for: `with mu.sharding.rules(rows="data"): ...`, or None for an axis that is not split.
        """,
        no_such_axis_cured,
        ValueError,
        None,
    ),
    errors.CheckError: Row(
        check_fails,
        """
        a mean is negative inside `jit(check_fails.step)`
          checked at: test_errors.py:LINE in check_fails.step
        The states are as they were before the outermost transform or transaction. `mu.inspect.find_nonfinite(step)(*args)` \
        finds where a NaN comes from, `mu.inspect.history(model)` goes back further.
        """.replace(" " * 9 + "finds", " finds"),
        check_holds,
        RuntimeError,
        None,
    ),
    errors.CheckpointError: Row(no_checkpoint, "", no_checkpoint_cured, ValueError, None),
}


def test_every_class_has_a_row() -> None:
    assert set(TABLE) == CLASSES


@pytest.mark.parametrize("cls", TABLE, ids=lambda cls: cls.__name__)
def test_rows(cls: type[errors.MutatisError], tmp_path: Path) -> None:
    row = TABLE[cls]
    net = Net()
    values = mu.state(net)
    with pytest.raises(cls) as caught:
        row.raises(net, tmp_path)
    error = caught.value
    text = re.sub(r"(test_errors\.py):\d+", r"\1:LINE", str(error))
    if row.text:
        assert text == row.text
        assert error.path == row.path
    assert isinstance(error, row.builtin)
    assert isinstance(error, errors.MutatisError)
    assert error.cure is not None
    assert text.endswith(error.cure)
    assert cls.__doc__
    mu.thaw(net)
    assert all(
        mu.state(net)[path] is value or bool(jnp.all(mu.state(net)[path] == value)) for path, value in values.items()
    )
    row.cured(Net(), tmp_path)


@pytest.mark.parametrize("cls", sorted(CLASSES, key=lambda cls: cls.__name__), ids=lambda cls: cls.__name__)
def test_errors_are_exported_pickled_and_caught_by_the_base(cls: type[errors.MutatisError]) -> None:
    assert getattr(errors, cls.__name__) is cls
    error = cls(
        "problem", path="a.b", where="jit(f)", expected=1, got=2, made_at="x.py:1", differences=["d"], cure="do"
    )
    assert str(error) == "problem inside `jit(f)`\n  expected: 1\n  got:      2\n  d\n  made at:  x.py:1\ndo"
    other = pickle.loads(pickle.dumps(error))
    assert type(other) is cls
    assert str(other) == str(error)
    assert (other.path, other.where, other.expected, other.got, other.differences) == ("a.b", "jit(f)", 1, 2, ("d",))
    with pytest.raises(mu.MutatisError):
        raise other


PAGES = Path(__file__).parents[1] / "docs" / "errors"
EVERY_CLASS = [*CLASSES, errors.CapturedStateWarning, errors.RecompilationWarning]


@pytest.mark.parametrize("cls", sorted(EVERY_CLASS, key=lambda cls: cls.__name__), ids=lambda cls: cls.__name__)
def test_a_class_leads_to_the_page_about_it(cls: type[Exception]) -> None:
    address = errors.see(cls).removeprefix("See ")
    page = PAGES / f"{address.removeprefix(f'{navigation.ADDRESS}/errors/').strip('/')}.md"
    assert page.read_text(encoding="utf-8").startswith(f"# `{cls.__name__}`\n")
    assert f"]({page.name})" in (PAGES / "index.md").read_text(encoding="utf-8")
    last = traceback.format_exception(cls("problem"))[-1]
    assert last == (
        f"See {address}\n" if issubclass(cls, mu.MutatisError) else f"{cls.__module__}.{cls.__name__}: problem\n"
    )


def test_other_classes_lead_to_that_which_they_derive_from() -> None:
    class Mine(errors.LaneError):
        pass

    assert errors.see(Mine) == errors.see(errors.LaneError)
    assert errors.see(mu.MutatisError) == f"See {navigation.ADDRESS}/errors/"
    assert (
        errors.LaneError("p").__notes__ == copy.copy(errors.LaneError("p")).__notes__ == [errors.see(errors.LaneError)]
    )


def test_ten_differences_are_shown() -> None:
    error = errors.StructureError("p", differences=[str(i) for i in range(12)])
    assert str(error).splitlines()[1:] == [f"  {i}" for i in range(10)] + ["  and 2 more"]
    assert len(error.differences) == 12
    assert errors.shorten(["a"] * 10) == ["a"] * 10


def test_fields_that_are_not_given_have_no_line() -> None:
    assert str(errors.FilterError("p")) == "p"
    assert "expected: 0" in str(errors.FilterError("p", expected=0))


def test_the_captured_state_warning_is_a_user_warning() -> None:
    assert issubclass(mu.CapturedStateWarning, UserWarning)


# -- where it happened -------------------------------------------------------------------------------------------


def test_nested_transforms_are_told_from_the_outside_in() -> None:
    net = Net()
    mu.freeze(net)

    def body(x: Any) -> None:
        net.w.value = net.w + x

    def train_step() -> None:
        mu.for_loop(body, jnp.arange(2.0))

    with pytest.raises(errors.FrozenStateError) as caught:
        mu.jit(train_step)()
    first = str(caught.value).splitlines()[0]
    assert "train_step" in first
    assert "for_loop(" in first
    assert first.index("jit(") < first.index("for_loop(")
    assert "body" in first
    assert caught.value.path == "net.w"


def test_own_frames_are_hidden_from_tracebacks() -> None:
    """JAX filters the frames of registered folders out of tracebacks."""
    net = Net()

    def mine(x: Any) -> Any:
        raise KeyError("mine")

    with pytest.raises(KeyError) as caught:
        mu.jit(lambda x: mu.grad(mine)(x))(1.0)
    assert caught.value.args == ("mine",)
    assert int(mu.jit(lambda: net.w.value[0])()) == 1


@pytest.mark.parametrize("x", [np.zeros(2), jnp.zeros(2)])
def test_paths_in_messages_follow_the_argument_names(x: Any) -> None:
    def step(models: Any, *, head: Net) -> None:
        models["a"][0].blocks[0].mean.value = x

    fixed = mu.BatchStat(jnp.zeros(3), fixed=True)
    net = Net()
    net.blocks[0].mean = fixed
    with pytest.raises(errors.StateTypeError) as caught:
        mu.jit(step)({"a": [net]}, head=Net())
    assert caught.value.path == "models['a'][0].blocks[0].mean"
    with pytest.raises(errors.StateTypeError) as caught:
        mu.jit(lambda *, head: head.blocks[0].mean.set(x))(head=net)
    assert caught.value.path == "head.blocks[0].mean"


class Statistic(mu.BatchStat):
    """A kind of the user's own."""


@pytest.mark.parametrize(
    "program",
    [
        lambda v: mu.vmap(lambda x: v.set(x))(jnp.zeros((2, 3))),
        lambda v: mu.vmap(lambda v, x: x, in_axes=(3, 0))(v, jnp.zeros(3)),
        lambda v: v.__setitem__(..., jnp.zeros(7)),
        lambda v: Statistic(),
    ],
)
def test_cures_name_the_users_own_kinds(program: Callable[[Any], None]) -> None:
    with pytest.raises(errors.MutatisError) as caught:
        program(Statistic(jnp.zeros(3)))
    assert "Statistic" in str(caught.value)
    assert "mu.Statistic" not in str(caught.value)
