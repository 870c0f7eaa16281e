"""Honest mistakes of people who come from other libraries: each is met by an error that says what to write, and that runs.

A row is a program, the error's class, a part of its text, and what is true once every piece of code in the error's advice
has been run where the program was. Errors of JAX about a compiled function speak of states and of the user's arguments, and
tracebacks show the user's code.
"""

from __future__ import annotations

import dataclasses
import os
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
from mutatis import errors, nn

pytestmark = pytest.mark.once  # nothing here depends on the version of JAX


class Net(mu.Module):
    def __init__(self, rngs: mu.Rngs) -> None:
        self.lin = nn.Linear(2, 3, rngs=rngs)
        self.n = mu.Variable(0)
        self.table = jnp.arange(3.0)
        self.layers = [nn.Linear(3, 3, rngs=rngs)]

    def __call__(self, x: Any) -> Any:
        self.n += 1
        return self.lin(x)


class Cell(mu.Module):
    """A recurrent cell whose state starts without a batch."""

    def __init__(self) -> None:
        self.h = mu.Hidden(jnp.zeros(3), init=lambda: jnp.zeros(3))
        self.w = mu.Param(jnp.ones((2, 3)))

    def __call__(self, x: Any) -> Any:
        y = x @ self.w.value
        self.h.value = jnp.tanh(y + jnp.broadcast_to(self.h.value, y.shape))
        return self.h.value


def loss_fn(model: Any, x: Any) -> Any:
    return jnp.mean(model(x) ** 2)


def world() -> dict[str, Any]:
    """What the programs and the advice find: the names that a user's script would have."""
    model = Net(mu.Rngs(0))
    x = jnp.ones((4, 2))
    return {
        "mu": mu,
        "nn": nn,
        "jax": jax,
        "jnp": jnp,
        "np": np,
        "optax": optax,
        "dataclasses": dataclasses,
        "Net": Net,
        "Cell": Cell,
        "loss_fn": loss_fn,
        "Bare": type("Bare", (mu.Module,), {"__annotations__": {"size": int}}),  # declares a field, as in Linen
        "model": model,
        "self": model,
        "x": x,
        "key": jax.random.key(0),
        "rngs": mu.Rngs(0),
        "tx": optax.adam(1e-3),
        "optimizer": mu.Optimizer(model, optax.sgd(0.1)),
        "grads": mu.grad(loss_fn)(model, x),
    }


def run_advice(error: errors.MutatisError, names: dict[str, Any]) -> None:
    """Run every piece of code in the advice."""
    assert error.cure is not None
    pieces = error.cure.split("`")[1::2]
    assert pieces, error.cure
    for piece in pieces:
        if piece.startswith("@"):
            names["decorator"] = eval(piece[1:], names)
        elif piece.startswith("class "):
            names["Decorated"] = names["decorator"](names[piece.removeprefix("class ")])
        else:
            exec(piece, names)


@dataclasses.dataclass
class Row:
    program: str
    error: type[errors.MutatisError]
    text: str  # in the message
    setup: str = ""  # run before
    then: str = "True"  # holds after the advice


ARGUMENT, STRUCTURE, STATE_TYPE = errors.ArgumentError, errors.StructureError, errors.StateTypeError
AXIS, FILTER, STREAM = errors.AxisError, errors.FilterError, errors.RandomStreamError

SCAN = "f, init, xs = lambda c, x: (c, x), 0.0, jnp.arange(3.0)"
FOR = "f, xs, x = lambda *x: 1.0, jnp.arange(3.0), 0.0"
WHILE = "cond_fun, body_fun, init_val = lambda c: False, lambda *c: c[-1], 0"
COND = "pred, true_fun, false_fun, operands = True, lambda x: x, lambda x: -x, (1.0,)"
SWITCH = "index, f, g, operands = 1, lambda x: x, lambda x: -x, (1.0,)"
LANES = "f, xs = lambda *a: 1.0, jnp.ones((4, 2))"

ROWS = [
    # -- loops as decorators, and in the words of others
    Row("mu.scan(f)", ARGUMENT, "`mu.scan` is not called like this: missing 1", SCAN, "ys.shape == (3,)"),
    Row("mu.scan(length=3)", ARGUMENT, "expected: mu.scan(f, init, xs)", SCAN, "carry == 0"),
    Row("mu.scan(f, in_axes=(None, 0))", ARGUMENT, "unexpected keyword argument 'in_axes'", SCAN),
    Row("mu.scan(in_axes=(mu.Carry, 0), out_axes=0)", ARGUMENT, "keyword argument", SCAN),
    Row("mu.scan(init, f, xs)", ARGUMENT, "cannot be called as its `f`", SCAN),
    Row("mu.scan(f, 'a', xs)", ARGUMENT, "argument `init` is a str", SCAN),
    Row("mu.scan(f, 0, {'k': ['a']})", ARGUMENT, "argument `xs['k'][0]` is a str", SCAN + "; xs = [1]"),
    Row("mu.for_loop(f, 3)", ARGUMENT, "a number of iterations", FOR),
    Row("mu.for_loop(f, range(3))", ARGUMENT, "got:      range(0, 3)", FOR),
    Row("mu.for_loop(f, xs=xs)", ARGUMENT, "expected: mu.for_loop(f, xs)", FOR, "ys.shape == (3,)"),
    Row("mu.while_loop(cond_fun)", ARGUMENT, "missing 2 required", WHILE),
    Row("mu.while_loop(cond_fun, body_fun)", ARGUMENT, "'init_val'", WHILE),
    Row("mu.while_loop(0, cond_fun, body_fun)", ARGUMENT, "cannot be called as its `cond_fun`", WHILE),
    Row(
        "mu.while_loop(lambda c: c + 1, lambda c: c < 3, jnp.int32(0))",
        STRUCTURE,
        "got:      int32[]",
        WHILE + "; body_fun, init_val = lambda x: x + 1, 0",
    ),
    Row("mu.fori_loop(body_fun, 0, 3, init_val)", ARGUMENT, "cannot be called as its `body_fun`", WHILE),
    Row("mu.fori_loop(0, 3, body_fun)", ARGUMENT, "'init_val'", WHILE),
    Row(
        "mu.fori_loop(0, xs, body_fun, 0)", ARGUMENT, "the bound `upper` is no integer", WHILE + "; xs = jnp.arange(3)"
    ),
    Row(
        "mu.fori_loop(0, 2.5, body_fun, 0)", ARGUMENT, "the bound `upper` is no integer", WHILE + "; xs = jnp.arange(3)"
    ),
    Row("mu.map(xs, f)", ARGUMENT, "got:      float32[3]", FOR),
    # -- branches
    Row("mu.cond(pred, true_fun)", ARGUMENT, "missing 1 required", COND),
    Row("mu.cond(true_fun, true_fun, pred)", ARGUMENT, "as its `pred`", COND),
    Row("mu.cond(pred, 1.0, 2.0)", ARGUMENT, "cannot be called as its `true_fun`", COND),
    Row("mu.cond(pred, true_fun, None)", ARGUMENT, "got:      None", COND),
    Row("mu.cond(model, true_fun, true_fun)", ARGUMENT, "got:      Net", COND),
    Row(
        "mu.cond(index, lambda: 1, lambda: 0)",
        ARGUMENT,
        "got:      bool[2]",
        "index, x, y = jnp.array([True, False]), 1, 0",
    ),
    Row(
        "mu.cond(True, lambda: 1, lambda: 1.5)",
        STATE_TYPE,
        "got:      the true branch: int32[]",
        "x = 1",
    ),
    Row("mu.switch(index, f, g)", ARGUMENT, "takes its functions as a list", SWITCH),
    Row("mu.switch([f, g], index)", ARGUMENT, "takes its functions as a list", SWITCH),
    # -- transforms
    Row("mu.jit(model, x)", ARGUMENT, "takes from 0 to 1 positional arguments", "f = lambda x: x"),
    Row("mu.jit(model(x))", ARGUMENT, "got:      float32[4,3]", "f = model"),
    Row("mu.grad(loss_fn(model, x))", ARGUMENT, "`mu.grad` was given what cannot be called", "f = loss_fn"),
    Row("mu.vmap(x)", ARGUMENT, "`mu.vmap` was given", "f = model"),
    Row("mu.jit(Bare())", ARGUMENT, "got:      Bare without `__call__`", "f = model"),
    Row("mu.vmap(f, model, xs, 0, 0, 0, 0, 0, 0)", ARGUMENT, "expected: mu.vmap(f)(xs)", LANES),
    Row("mu.remat(model, x)", ARGUMENT, "expected: mu.remat(f)(x)", "f = lambda x: x"),
    Row("mu.grad(f)(model, x)", ARGUMENT, "got:      float32[4,3]", "f = lambda model, x: model(x)"),
    Row("mu.grad(f, argnums=mu.Param)(model, x)", ARGUMENT, "in `argnums` is no position", "f = loss_fn"),
    Row("mu.grad(f, mu.Param)(model, x)", ARGUMENT, "the class Param in `argnums`", "f = loss_fn"),
    Row("mu.grad(f, wrt=model)(model, x)", FILTER, "is not a filter", "f = loss_fn"),
    Row("mu.jvp(f, 1.0, 1.0)", ARGUMENT, "`mu.jvp` takes its primals as a tuple", "f, x, dx = lambda x: x, 1.0, 1.0"),
    Row("mu.vmap(f, in_axes=({mu.Param: None}, 0))(model, x)", AXIS, "does not have the structure", LANES),
    Row("mu.vmap(f, in_axes=(None, 2))(model, x)", AXIS, "argument `a[1]` has no axis 2", LANES),
    Row("mu.vmap(f, in_axes=mu.StateAxes({...: None}))(model, x)", AXIS, "what is not an axis of an array", LANES),
    Row("mu.vmap(f)(x, jnp.ones(3))", AXIS, "got:      a[0]: 4, a[1]: 3", LANES + "; f = lambda *a: 1"),
    Row("mu.StateAxes([(mu.Param, 0)])", ARGUMENT, "`StateAxes` is made of a dictionary"),
    Row("mu.jit(f)(x, 'train')", ARGUMENT, "argument `mode` is a str", "f = lambda x, mode: x"),
    Row("mu.jit(f)(x, mode='train')", ARGUMENT, "argument `mode` is a str", "f = lambda x, mode: x"),
    Row("mu.jit(f)({'x': x, 'mode': 'train'})", ARGUMENT, "argument `x['mode']` is a str", "f = lambda x, mode=0: x"),
    Row("mu.jit(f)([model, 'train'])", ARGUMENT, "argument `parts[1]` is a str", "f = lambda parts, mode=0: 0"),
    # -- models
    Row(
        "Bare(size=3)",
        ARGUMENT,
        "`Bare` has no `__init__`, and was given arguments",
        then="Decorated(size=3).size == 3",
    ),
    Row("Bare(3)", ARGUMENT, "got:      int"),
    Row("model.train(False)", ARGUMENT, "`Module.train` is not called like this"),
    Row("mu.state(Net)", ARGUMENT, "Make one first"),
    Row("mu.state(mu.Param, model)", ARGUMENT, "the class Param is not a node"),
    Row("mu.update(mu.state(model), model)", ARGUMENT, "got:      State", "state = mu.state(model)"),
    Row("mu.state(model, 'Param')", FILTER, "got:      the name of a kind"),
    Row("mu.state(model, 'lin')", FILTER, "got:      the name of a path"),
    Row("mu.freeze(model, 'lin')", FILTER, "no state has the tag 'lin'"),
    Row("mu.variables(model, 'lin.kernel')", FILTER, "no state has the tag 'lin.kernel'"),
    Row("mu.pop(model, 'n')", FILTER, "no state has the tag 'n'"),
    Row("mu.state(model, mu.Param, 'layers[0]')", FILTER, "no state has the tag 'layers[0]'"),
    Row("mu.merge(model, mu.state(model))", ARGUMENT, "got:      Net"),
    Row("mu.merge(*reversed(mu.split(model)))", ARGUMENT, "got:      State"),
    Row("mu.merge(mu.split(model))", ARGUMENT, "got:      tuple"),
    Row("mu.update(model, model)", ARGUMENT, "got:      Net", "state = mu.state(model)"),
    Row(
        "mu.replace(model, where, new)",
        ARGUMENT,
        "as its `fn`",
        "where, new = 'lin', nn.Linear(2, 5, rngs=rngs)",
        "model.lin is new",
    ),
    Row("mu.reset(model, (4,))", FILTER, "[(4,)] are no filters", "model = Cell()", "model.h.shape == (4, 3)"),
    Row(
        "mu.for_loop(model, jnp.ones((5, 4, 2)))",
        STATE_TYPE,
        "state `model.h` (Hidden)",
        "model = Cell()",
        "mu.for_loop(model, jnp.ones((5, 4, 2))).shape == (5, 4, 3)",
    ),
    Row(
        "mu.jit(lambda: mu.for_loop(model, jnp.ones((5, 4, 2))))()",
        STATE_TYPE,
        "It starts without the axes of a batch",
        "model = Cell()",
        "mu.jit(lambda: mu.for_loop(model, jnp.ones((5, 4, 2))))().shape == (5, 4, 3)",
    ),
    Row("pure(x)", ARGUMENT, "without its state", "pure, state = mu.functionalize(model)", "out.shape == (4, 3)"),
    Row("pure(x, state)", ARGUMENT, "got:      float32[4,2] in the place", "pure, state = mu.functionalize(model)"),
    Row("mu.functional.init(model, key, x)", ARGUMENT, "`ctor` is a model already"),
    Row(
        "mu.functional.apply(variables, model, x)",
        ARGUMENT,
        "as its `variables`",
        "make = lambda rngs: nn.Linear(2, 3, rngs=rngs); variables = mu.functional.init(make, key); model = make(rngs)",
    ),
    Row("mu.checkpoint.save(model, 'run')", ARGUMENT, "the path is none"),
    Row("mu.checkpoint.restore(model, 'run')", ARGUMENT, "got:      Net"),
    # -- values kept inside
    Row(
        "mu.sow(model, 'intermediates', 'act', x)",
        ARGUMENT,
        "takes 3 positional arguments but 4",
        then="model.total is not None",
    ),
    Row("mu.sow('act', model, x)", ARGUMENT, "expected: a Module, and then a name"),
    Row(
        "mu.for_loop(f, xs); mu.for_loop(f, xs)",
        STATE_TYPE,
        "It holds what was sown before",
        "f, xs = lambda x: mu.sow(model, 'act', x), jnp.arange(3.0)",
        "mu.for_loop(f, xs) is None",
    ),
    Row("mu.metrics.Average().update(x)", ARGUMENT, "takes 1 positional argument", "metric = mu.metrics.Average()"),
    Row(
        "mu.metrics.Accuracy().update(logits, labels)",
        ARGUMENT,
        "expected: metric.update(logits=logits, labels=labels)",
        "metric, logits, labels = mu.metrics.Accuracy(), jnp.ones((2, 3)), jnp.zeros(2, int)",
    ),
    # -- optimizers
    Row("optimizer.update(model)", ARGUMENT, "got:      Net"),
    Row("optimizer.update(grads, model)", ARGUMENT, "got:      Net"),
    Row("optimizer.update(mu.value_and_grad(loss_fn)(model, x))", ARGUMENT, "a pair, as `mu.value_and_grad` gives it"),
    Row("optimizer.update(grads=grads)", ARGUMENT, "got:      0 arguments"),
    Row("optimizer.update(grads, {}, mu.state(model))", ARGUMENT, "got:      3 arguments"),
    Row("mu.Optimizer(tx, model)", ARGUMENT, "The model comes first"),
    Row("mu.Optimizer(model, optax.adam)", ARGUMENT, "Make the transformation"),
    Row("mu.Optimizer(model, 1e-3)", ARGUMENT, "0.001 is not an optax transformation"),
    Row("mu.Optimizer(model)", ARGUMENT, "missing 1 required positional argument: 'tx'"),
    # -- random streams
    Row("nn.Linear(2, 3, rngs=key)", STREAM, "got:      key<fry>[]"),
    Row("nn.Linear(2, 3, rngs=jax.random.PRNGKey(0))", STREAM, "A key starts streams", "key = jax.random.PRNGKey(0)"),
    Row("nn.Linear(2, 3, rngs=5)", STREAM, "A seed starts streams"),
    Row("nn.Linear(2, 3, rngs=rngs.params)", STREAM, "rngs = mu.Rngs(0)"),
    Row("nn.Linear(2, 3, rngs=mu.Rngs)", STREAM, "got:      a class"),
    Row("mu.Rngs({'params': 0, 'dropout': 1})", STREAM, "mu.Rngs(params=0, dropout=0)"),
    Row("mu.Rngs('params')", STREAM, "mu.Rngs(params=0)"),
    Row("mu.Rngs(mu.Rngs(0))", STREAM, "rngs.fork()"),
    Row("jax.random.normal(rngs.params, (3,))", STREAM, "was used as a key"),
    Row("rngs()", STREAM, "is stacked", "rngs = mu.Rngs(0).split(3)"),
    Row("mu.Param(init=init).value", ARGUMENT, "its `init` takes arguments", "init = jax.nn.initializers.normal()"),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.program[:60])
def test_a_mistake_is_met(row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # some advice writes files
    names = world()
    exec(row.setup, names)
    with pytest.raises(row.error) as caught:
        exec(row.program, names)
    assert row.text in str(caught.value), str(caught.value)
    assert isinstance(caught.value, errors.MutatisError)
    run_advice(caught.value, names)
    assert eval(row.then, names)


@pytest.mark.parametrize(
    ("program", "holds"),
    [
        ("mu.cond(model.flag, lambda: 1, lambda: 2) == 1", "True"),
        ("mu.jit(lambda: mu.cond(model.flag, lambda: 1, lambda: 2))() == 1", "True"),
        ("mu.switch(model.n, [lambda: 1, lambda: 2]) == 2", "model.n == 1"),
        ("mu.while_loop(lambda _: model.flag, lambda _: model.flag.set(False), None) is None", "not model.flag.value"),
        ("mu.update(model, mu.variables(other)) is None", "(model.lin.kernel.value == other.lin.kernel.value).all()"),
        ("mu.update(model, {('n',): 5}) is None", "model.n == 5"),
        ("mu.reset(model.cell, batch_shape=4) is None", "model.cell.h.shape == (4, 3)"),
        ("mu.jit(Net)(rngs).n == 0", "True"),
        ("mu.merge(mu.split(model)[0], mu.state(model).to_pure_dict()).n == 1", "True"),
        ("mu.state(model, 'intermediates') == mu.State({})", "True"),
    ],
)
def test_what_people_expect_works(program: str, holds: str) -> None:
    names = world()
    names["model"].flag = mu.Variable(True)
    names["model"].cell = Cell()
    names["other"] = Net(mu.Rngs(1))
    names["other"].flag, names["other"].cell = mu.Variable(True), Cell()
    assert eval(program, names)
    assert eval(holds, names)


@pytest.mark.parametrize("where", ["jit", "vmap", "scan", "for_loop", "cond"])
def test_results_that_are_no_arrays(where: str) -> None:
    def f(*_: Any) -> Any:
        return 0.0, {"mode": "train"}

    runs: dict[str, Callable[[], Any]] = {
        "jit": lambda: mu.jit(f)(),
        "vmap": lambda: mu.vmap(f)(jnp.arange(3)),
        "scan": lambda: mu.scan(f, 0.0, jnp.arange(3)),
        "for_loop": lambda: mu.for_loop(f, jnp.arange(3)),
        "cond": lambda: mu.cond(True, f, f),
    }
    for run in (runs[where], mu.jit(runs[where])):
        with pytest.raises(errors.ArgumentError, match="the function returned 'train'") as caught:
            run()
        assert "'train'" in str(caught.value)
        assert "test_honest_mistakes" not in str(caught.value)


def test_an_array_put_in_a_list_says_which_list() -> None:
    class Keeps(mu.Module):
        def __init__(self) -> None:
            self.seen = {"all": [mu.Variable(0.0)]}

        def __call__(self, x: Any) -> None:
            self.seen["all"].append(x)

    with pytest.raises(errors.StructureError, match=r"`model\.seen\.all\[1\]` is one of the bare arrays"):
        mu.jit(Keeps())(jnp.ones(2))


# -- what JAX says ---------------------------------------------------------------------------------------------------


def on(array: Any, device: int) -> jax.Array:
    return jax.device_put(array, jax.devices()[device])


def apart() -> tuple[Net, jax.Array]:
    """A model of which one state is on the second device, and an input on the third."""
    model = Net(mu.Rngs(0))
    model.lin.kernel = mu.Param(on(model.lin.kernel.value, 1))
    return model, on(jnp.ones((4, 2)), 2)


needs_devices = pytest.mark.skipif(jax.device_count() < 3, reason="needs several devices")


@needs_devices
@pytest.mark.parametrize(
    ("program", "first", "second"),
    [
        ("out = mu.jit(lambda model, x: model(x))(model, x)", "state `model.lin.kernel` (Param)", "argument `x`"),
        ("out = mu.jit(model)(x)", "state `model.lin.kernel` (Param)", "argument `x`"),
        ("out = mu.jit(lambda d: model(d['x']))({'x': x})", "state `model.lin.kernel` (Param)", "argument `d['x']`"),
        ("out = mu.jit(lambda d: d['m'](d['x']))(d)", "state `d['m'].lin.kernel` (Param)", "argument `d['x']`"),
        ("out = mu.jit(lambda x, *rest: x + rest[0])(x, y)", "argument `x`", "argument `rest[0]`"),
        (
            "out = mu.cond(True, lambda x: model(x), lambda x: model(x), x)",
            "state `model.lin.kernel` (Param)",
            "`operands[0]`",
        ),
        (
            "out, _ = mu.scan(lambda c, _: (c + m.lin.kernel[0, 0], 0), x, length=1)",
            "state `m.lin.kernel`",
            "argument `init`",
        ),
        (
            "out = mu.jit(lambda: model(x0).sum() + model.table.sum())()",
            "state `model.table` (Buffer)",
            "state `model.lin.kernel` (Param)",
        ),
    ],
)
def test_devices_are_named(program: str, first: str, second: str) -> None:
    model, x = apart()
    names = world() | {"model": model, "m": model, "x": x, "y": on(x, 1), "d": {"m": model, "x": x}}
    names["x0"] = names["init"] = np.ones((4, 2), np.float32)
    if "x0" in program:
        model.table = on(jnp.arange(3.0), 3)
    with pytest.raises(errors.StructureError, match="are on different devices") as caught:
        exec(program, names)
    text = str(caught.value)
    assert first in text, text
    assert second in text, text
    assert "flat[" not in text
    assert caught.value.__cause__ is not None


@needs_devices
@pytest.mark.parametrize("again", [False, True])
def test_the_advice_about_devices_runs(again: bool) -> None:
    names = world() | {"f": mu.jit(lambda model, x: model(x))}
    if again:
        names["f"](names["model"], names["x"])  # the program is known when the devices differ
    names["model"], names["x"] = apart()
    before = mu.state(names["model"])
    with pytest.raises(errors.StructureError) as caught:
        exec("f(model, x)", names)
    assert (caught.value.path, caught.value.where) == (
        "model.lin.kernel",
        "jit(lambda in test_the_advice_about_devices_runs)",
    )
    assert mu.state(names["model"]) == before
    run_advice(caught.value, names)
    assert eval("f(model, x)", names).shape == (4, 3)
    names["x"] = np.ones((4, 2), np.float32)
    names["model"].table = on(jnp.arange(3.0), 3)
    names["f"] = mu.jit(lambda model, x: model(x) + model.table.sum())
    with pytest.raises(errors.StructureError) as caught:
        exec("f(model, x)", names)
    run_advice(caught.value, names)
    assert eval("f(model, x)", names).shape == (4, 3)


@pytest.mark.parametrize(
    "body",
    [
        "1 if model.n > 0 else 2",
        "np.asarray(model.n.value)",
        "float(model.n.value)",
        "jnp.zeros(model.n.value)",
    ],
)
def test_values_that_are_not_known_are_named(body: str) -> None:
    names = world()
    exec(f"def f(model, x):\n    return {body}", names)
    with pytest.raises((jax.errors.JAXTypeError, TypeError)) as caught:
        mu.jit(names["f"])(names["model"], names["x"])
    text = str(caught.value)
    assert "state `model.n` (Variable)" in text
    assert "<string>:1" in text  # where `f` begins
    assert "flat[" not in text
    assert "program.py" not in text
    with pytest.raises((jax.errors.JAXTypeError, TypeError), match=r"`x\['n'\]`"):
        mu.jit(lambda x: jnp.zeros(x["n"]))({"n": 3})


def test_errors_of_an_inner_function_are_its_own() -> None:
    inner = mu.jit(lambda value, flag: 1 if flag else 2)
    with pytest.raises(jax.errors.TracerBoolConversionError) as caught:
        mu.jit(lambda a, b: inner(a, b))(jnp.ones(2), True)
    assert "`flag`" in str(caught.value)


def test_a_deleted_array_is_named() -> None:
    model, x = Net(mu.Rngs(0)), jnp.ones((4, 2))
    f = mu.jit(lambda net, x: net(x))
    for _ in range(2):  # when it is traced, and when the program is known
        jax.jit(lambda w: w + 1, donate_argnums=0)(model.lin.kernel.value)
        with pytest.raises(
            errors.StructureError, match=r"state `net\.lin\.kernel` \(Param\) holds an array that was deleted"
        ):
            f(model, x)
        model.lin.kernel = mu.Param(jnp.ones((2, 3)))
        assert f(model, x).shape == (4, 3)


# -- tracebacks ------------------------------------------------------------------------------------------------------


class Failing(mu.Module):
    def __init__(self) -> None:
        self.w = mu.Param(jnp.ones(3))

    def __call__(self, x: Any) -> Any:
        return fails(x)


def fails(x: Any) -> Any:
    raise KeyError("mine")


XS = jnp.ones((2, 3))

RUNS: dict[str, Callable[[Any], Any]] = {
    "jit": lambda f: mu.jit(f)(1.0),
    "grad": lambda f: mu.grad(f)(1.0),
    "vmap": lambda f: mu.vmap(f)(XS),
    "remat": lambda f: mu.remat(f)(1.0),
    "jacrev": lambda f: mu.jacrev(f)(1.0),
    "scan": lambda f: mu.scan(lambda c, x: (c, f(x)), 0.0, XS),
    "for_loop": lambda f: mu.for_loop(f, XS),
    "while_loop": lambda f: mu.while_loop(lambda c: c < 1, f, 0),
    "fori_loop": lambda f: mu.fori_loop(0, 2, lambda i, c: f(c), 0),
    "map": lambda f: mu.map(f, XS),
    "cond": lambda f: mu.cond(True, f, f, 1.0),
    "switch": lambda f: mu.switch(0, [f], 1.0),
    "jit of grad of scan": lambda f: mu.jit(mu.grad(lambda x: mu.scan(lambda c, y: (f(c), y), x, XS)[0]))(1.0),
}


def files(error: BaseException) -> list[str]:
    return [os.path.basename(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]


@pytest.mark.parametrize("model", [False, True])
@pytest.mark.parametrize("name", RUNS)
def test_tracebacks_show_the_users_code(name: str, model: bool) -> None:
    with pytest.raises(KeyError) as caught:
        RUNS[name](Failing() if model else fails)
    shown = traceback.extract_tb(caught.value.__traceback__)
    assert shown[-1].name == "fails"
    ours = [frame for frame in shown if "mutatis" in frame.filename and "test_" not in frame.filename]
    assert len(ours) <= 2, ours  # what the user called, and a module's call


def test_errors_of_ours_end_where_the_user_called() -> None:
    n = mu.Variable(0.0)
    with pytest.raises(errors.LaneError) as caught:
        mu.vmap(lambda x: n.set(x))(jnp.arange(3.0))
    assert files(caught.value) == ["test_honest_mistakes.py", "transformed.py"]
    with pytest.raises(errors.StateTypeError) as other:
        mu.for_loop(lambda x: n.set(x.astype(int)), jnp.arange(3.0))
    assert files(other.value) == ["test_honest_mistakes.py", "calls.py"]


def test_tracebacks_can_be_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    before = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")
    try:
        with pytest.raises(KeyError) as caught:
            mu.jit(fails)(1.0)
    finally:
        jax.config.update("jax_traceback_filtering", before)
    assert "compiler.py" in files(caught.value)


def test_a_type_error_of_the_users_own_is_left_alone() -> None:
    def two(a: Any, b: Any) -> Any:
        return a, b

    for run in (
        lambda: mu.scan(lambda c: c, 0.0, XS),
        lambda: mu.for_loop(two, XS),
        lambda: mu.cond(True, two, two, 1.0),
    ):
        with pytest.raises(TypeError) as caught:
            run()
        assert not (isinstance(caught.value, errors.ArgumentError) and "is not called like this" in str(caught.value))
