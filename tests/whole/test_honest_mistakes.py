"""Honest mistakes of people who come from other libraries: each is met by an error that says what to write, and that runs.

A row is a program, the error's class, a part of its text, and what is true once every piece of code in the error's advice
has been run where the program was. Errors of JAX about a compiled function speak of states and of the user's arguments, and
tracebacks show the user's code.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
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
from mutatis._equivalents import EQUIVALENTS

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
SIZES = "in_features, out_features = 2, 3"
WIDE = "exec('class Wide(nn.Linear):\\n    def __init__(self, n):\\n        super().__init__(n, 2 * n)', globals())"
FROZEN = errors.FrozenStateError
COPY, THAWED = "model = jax.device_put(model)", "not any(v.frozen for v in mu.variables(model).values())"
RULE = "Rule = type('Rule', (), {'init': lambda self, p: p, 'update': lambda self, g, s, p=None: (g, s)})"
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
    # -- raw JAX on a model
    Row(
        "jax.jit(mu.grad(loss_fn))(model, x)", FROZEN, "Use `mu.jit` (or another `mu` transform) in place of `jax.jit`"
    ),
    Row("jax.jit(lambda m: mu.Optimizer(m, tx).step)(model)", FROZEN, "Use `mu.jit` (or another `mu` transform)"),
    Row("mu.Optimizer(jax.device_put(model), tx)", FROZEN, "is in a detached copy", COPY, THAWED),
    Row("mu.grad(loss_fn)(jax.device_put(model), x)", FROZEN, "state `args[0].layers[0].bias` (Param)", COPY, THAWED),
    Row("mu.value_and_grad(loss_fn)(jax.tree.map(jnp.copy, model), x)", FROZEN, "differentiated", COPY, THAWED),
    Row("mu.jit(mu.grad(loss_fn))(jax.device_put(model), x)", FROZEN, "differentiated", COPY, THAWED),
    Row("jax.device_put(model).lin.bias.set(jnp.ones(3))", FROZEN, "written in a detached copy", "copy = model"),
    Row("mu.freeze(model, mu.Param)(x)", ARGUMENT, "the model itself was frozen", then="model(x) is not None"),
    # -- tags that are nearly there
    Row("mu.state(model, 'parms')", FILTER, "nearest is `mu.state(model, 'params')`"),
    Row("mu.state(model, 'Params')", FILTER, "'Params', which is nearly 'params'"),
    Row("mu.state(model, ['parms', 'cache'])", FILTER, "'parms', which is nearly 'params'"),
    Row("mu.variables(model, mu.Any('prams'))", FILTER, "nearly 'params'"),
    Row("mu.state(model, mu.BatchStat, 'buffer')", FILTER, "nearly 'buffers'"),
    Row("mu.split(model, 'parms', ...)", FILTER, "nearly 'params'"),
    Row("mu.freeze(model, 'parms')", FILTER, "nearly 'params'"),
    Row("mu.grad(loss_fn, wrt='parms')(model, x)", FILTER, "nearly 'params'"),
    Row("mu.Optimizer(model, tx, wrt='parms')", FILTER, "nearly 'params'"),
    Row("mu.state(model, 'Parm')", FILTER, "not as text: `mu.state(model, mu.Param)`", "del model.n, model.table"),
    Row("mu.state(model, 'kernal')", FILTER, "`mu.state(model, mu.PathContains('kernel'))`"),
    Row("mu.state(model, 'lin.kernal')", FILTER, "`mu.variables(model)[('lin', 'kernel')]`"),
    Row("mu.state(model, 'decoy')", FILTER, "nearly 'decay'", "model.w = mu.Param(1.0, tag='decay')"),
    Row("mu.state(model, 'decayng')", FILTER, "nearly 'decaying'", "model.w = mu.Param(1.0, tags=('decaying',))"),
    Row("mu.state(model).filter('parms')", FILTER, "nearly 'params'"),
    # -- paths of states
    Row("grads['lin.weight']", errors.PathError, "nearest is `state['lin.kernel']`", "state = grads"),
    Row("state['layers[5]']", errors.PathError, "nearest is `state['layers[0]']`", "state = mu.state(model)"),
    Row("grads['lin.kernl']", errors.PathError, "nearest is `state['lin.kernel']`", "state = grads"),
    Row("grads['layers.0.kernel']", errors.PathError, "nearest is `state['layers[0].kernel']`", "state = grads"),
    Row("grads['lin']['kernal']", errors.PathError, "nearest is `state['kernel']`", "state = grads['lin']"),
    Row("grads['layers', 1]", errors.PathError, "no state at 'layers[1]'", "state = grads"),
    Row("mu.State({})['w']", errors.PathError, "nothing: there are none"),
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
    Row("optimizer.update(loss_fn(model, x))", ARGUMENT, "got:      float32[]"),
    Row("optimizer.update(jnp.ones(3))", ARGUMENT, "got:      float32[3]"),
    Row("optimizer.update(0.5)", ARGUMENT, "got:      0.5"),
    Row("optimizer.update(None)", ARGUMENT, "got:      None"),
    Row("optimizer.update(model, loss_fn(model, x))", ARGUMENT, "got:      float32[]"),
    Row("optimizer.update(loss_fn)", ARGUMENT, "got:      the function loss_fn"),
    Row("optimizer.update(mu.grad(loss_fn))", ARGUMENT, "got:      a function that a transform made"),
    Row(
        "optimizer.update(grads)",
        ARGUMENT,
        "got:      a tuple of them",
        "grads = mu.grad(loss_fn, argnums=(0,))(model, x)",
    ),
    Row("optimizer.update(grads)", ARGUMENT, "got:      a list of them", "grads = [grads]", "int(optimizer.step) == 1"),
    Row(
        "optimizer.update(mu.grad(loss_fn, has_aux=True)(model, x))",
        ARGUMENT,
        "a pair, as `mu.grad` gives it",
        "loss_fn = lambda model, x: (jnp.mean(model(x)), {'x': x})",
    ),
    Row(
        "optimizer.update(mu.value_and_grad(loss_fn, has_aux=True)(model, x))",
        ARGUMENT,
        "`(loss, aux), grads = ",
        "loss_fn = lambda model, x: (jnp.mean(model(x)), {'x': x})",
        "aux['x'] is not None",
    ),
    Row("optimizer.update(grads=grads)", ARGUMENT, "got:      0 arguments"),
    Row("optimizer.update(grads, {}, mu.state(model))", ARGUMENT, "got:      3 arguments"),
    Row("mu.Optimizer(tx, model)", ARGUMENT, "The model comes first"),
    Row("mu.Optimizer(model, optax.adam)", ARGUMENT, "Make the transformation"),
    Row("mu.Optimizer(model, 1e-3)", ARGUMENT, "`mu.Optimizer(model, optax.adam(0.001))`"),
    Row("mu.Optimizer(model, 1)", ARGUMENT, "1 is not an optax transformation"),
    Row("mu.Optimizer(model, jnp.float32(1e-3))", ARGUMENT, "got:      float32[]"),
    Row("mu.Optimizer(model, None)", ARGUMENT, "None is not an optax transformation"),
    Row("mu.Optimizer(model, 'adam')", ARGUMENT, "Make the transformation: `mu.Optimizer(model, optax.adam(1e-3))`"),
    Row("mu.Optimizer(model, 'SGD')", ARGUMENT, "optax.sgd(1e-3)"),
    Row("mu.Optimizer(model, 'nonsense')", ARGUMENT, "got:      str"),
    Row("mu.Optimizer(model, optax.sgd)", ARGUMENT, "optax.sgd(1e-3)"),
    Row("mu.Optimizer(model, optax.identity)", ARGUMENT, "Make the transformation"),
    Row("mu.Optimizer(model, optax.GradientTransformation)", ARGUMENT, "got:      a class"),
    Row(
        "mu.Optimizer(model, schedule)",
        ARGUMENT,
        "A schedule is the rate of one",
        "schedule = optax.cosine_decay_schedule(1e-3, 10)",
    ),
    Row("mu.Optimizer(model, tx)", ARGUMENT, "optax.chain(*tx)", "tx = [optax.clip(1.0), optax.adam(1e-3)]"),
    Row("mu.Optimizer(model, Rule)", ARGUMENT, "got:      a class", RULE),
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
        ("mu.state(model, 'backbone') == mu.State({})", "True"),
        ("mu.state(model, 'group2') == mu.State({})", "model.w.set(1.0) is None"),
        ("mu.state(model, ['perturbations', 'elsewhere']) == mu.State({})", "True"),
        ("mu.state(model)['lin.kernel'] is model.lin.kernel.value", "True"),
        ("mu.state(model)['layers[0].kernel'] is model.layers[0].kernel.value", "True"),
        ("[*mu.state(model)['layers[0]']] == [('bias',), ('kernel',)]", "True"),
        ("mu.state(model)['layers']['[0].kernel'] is model.layers[0].kernel.value", "True"),
        ("mu.state([model])['[0].lin.bias'] is model.lin.bias.value", "True"),
        ("mu.state({'a b': model})[\"['a b'].lin.bias\"] is model.lin.bias.value", "True"),
        ("mu.state({'a b': model})['[\"a b\"].lin.bias'] is model.lin.bias.value", "True"),
        ("mu.state({'a.b': model, 'a': {'b': other}})['a.b']['lin']['bias'] is model.lin.bias.value", "True"),
        ("'lin.kernel' in mu.state(model) and 'layers[0]' in mu.state(model)", "True"),
        ("mu.sharding.place(model, jax.devices()[1]) is model", "model.lin.bias.value.devices() == {jax.devices()[1]}"),
        (
            "mu.sharding.place(model, {mu.Param: jax.devices()[1]}) is model",
            "model.n.value.devices() == {jax.devices()[0]}",
        ),
        ("jax.device_put(model, jax.devices()[1]).lin.bias.value.devices() == {jax.devices()[1]}", "True"),
        ("jax.jit(loss_fn_only)(model, x) == loss_fn_only(model, x)", "model.n == 1"),
        ("jax.vmap(loss_fn_only, in_axes=(None, 0))(model, x).shape == (4,)", "True"),
        ("rates.update(jax.grad(loss_fn_only)(trained, x)) is None", "int(rates.step) == 1 and trained.bias[0] < 0"),
        ("mu.jit(lambda o, x: o.update(jax.grad(loss_fn_only)(trained, x)))(rates, x) is None", "trained.bias[0] < 0"),
        ("not any(text in mu.state(model) for text in ('lin.', 'li', 'layers[1]', '', '.'))", "True"),
        ("mu.state(model).get('lin.kernel') is model.lin.kernel.value", "mu.state(model).get('lin.kernl', 3) == 3"),
        ("mu.update(model, {'lin.bias': jnp.ones(3)}) is None", "model.lin.bias.value[0] == 1"),
        ("mu.update(model, {'layers[0]': {'bias': jnp.ones(3)}}) is None", "model.layers[0].bias.value[0] == 1"),
        ("mu.update(model, {'lin': {'bias': jnp.ones(3)}, 'n': 2}) is None", "model.n == 2"),
    ],
)
def test_what_people_expect_works(program: str, holds: str) -> None:
    names = world()
    names["model"].flag = mu.Variable(True)
    names["model"].cell = Cell()
    names["model"].w = mu.Param(0.0, tag="group1")
    names["other"] = Net(mu.Rngs(1))
    names["other"].flag, names["other"].cell, names["other"].w = mu.Variable(True), Cell(), mu.Param(0.0, tag="group1")
    names["trained"] = nn.Linear(2, 3, rngs=mu.Rngs(0))
    names["rates"] = mu.Optimizer(names["trained"], optax.sgd(0.1))
    names["loss_fn_only"] = lambda model, x: jnp.sum(getattr(model, "lin", model)(x))
    assert eval(program, names)
    assert eval(holds, names)


def test_a_rate_is_not_an_attribute() -> None:
    optimizer = mu.Optimizer(mu.Param(1.0), optax.sgd(0.1))
    for name in ("lr", "learning_rate"):
        with pytest.raises(AttributeError, match=r"write a schedule, .*optax.inject_hyperparams"):
            setattr(optimizer, name, 0.01)
        assert not hasattr(optimizer, name)

    class Mine(mu.Optimizer):
        def __init__(self, model: Any, lr: float) -> None:
            super().__init__(model, optax.sgd(lr))
            self.lr = lr

    assert Mine(mu.Param(1.0), 0.1).lr == 0.1


def test_the_context_of_a_freeze_is_no_model() -> None:
    frozen = mu.freeze(world()["model"])
    with pytest.raises(AttributeError, match=r"write `model.kernel`, not `mu.freeze\(model\).kernel`"):
        frozen.kernel
    assert not hasattr(frozen, "__jax_array__") and copy.copy(frozen) is not frozen


def test_a_state_has_no_attributes_of_its_paths() -> None:
    state = mu.state(Net(mu.Rngs(0)))
    with pytest.raises(AttributeError, match=r"write `state\['lin'\]`"):
        _ = state.lin
    with pytest.raises(AttributeError, match=r"no attribute 'nothing'$"):
        _ = state.nothing
    assert pickle.loads(pickle.dumps(state)) == copy.deepcopy(state) == state


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


def notes(error: BaseException) -> str:
    """What was added to an error of JAX by us."""
    return "\n".join(note for note in getattr(error, "__notes__", ()) if not note.startswith(("-----", "See ")))


def run_notes(error: BaseException, names: dict[str, Any]) -> None:
    """Run every piece of code in the notes."""
    pieces = notes(error).split("`")[1::2]
    for piece in pieces:
        if " " in piece or "(" in piece or "=" in piece:  # no name
            exec(piece, names)


NOT_KNOWN = {
    "1.0 if {} > 0 else 2.0": jax.errors.TracerBoolConversionError,
    "[1.0 for _ in iter(lambda: bool({} > 3), True)][0]": jax.errors.TracerBoolConversionError,
    "float({})": jax.errors.ConcretizationTypeError,
    "int({})": jax.errors.ConcretizationTypeError,
    "[1.0, 2.0][{}.astype(int)]": jax.errors.TracerIntegerConversionError,
    "sum(range({}.astype(int)))": jax.errors.TracerIntegerConversionError,
    "np.asarray({})": jax.errors.TracerArrayConversionError,
}
INSIDE = {
    "jit": "mu.jit(f)(model, s)",
    "jit, closed over": "mu.jit(lambda s: f(model, s))(s0)",
    "scan": "mu.scan(lambda c, s: (c, f(model, s)), 0.0, ss)",
    "for_loop": "mu.for_loop(lambda s: f(model, s), ss)",
    "while_loop": "mu.while_loop(lambda s: s < 1, lambda s: f(model, s), s0)",
    "while_loop's condition": "mu.while_loop(lambda s: f(model, s) < 1, lambda s: s, s0)",
    "fori_loop": "mu.fori_loop(0, 3, lambda i, s: f(model, s), s0)",
    "cond": "mu.cond(True, lambda s: f(model, s), lambda s: 1.0, s0)",
    "switch": "mu.switch(0, [lambda s: f(model, s)], s0)",
    "remat": "mu.jit(lambda s: mu.remat(lambda s: f(model, s))(s))(s0)",
    "eval_shape": "mu.eval_shape(lambda s: f(model, s), s0)",
    "make_jaxpr": "mu.make_jaxpr(lambda s: f(model, s))(s0)",
    "jit of grad": "mu.jit(mu.grad(lambda model, s: f(model, s)))(model, s0)",
    "jit of scan": "mu.jit(lambda ss: mu.scan(lambda c, s: (c, f(model, s)), 0.0, ss))(ss)",
    "scan of cond": "mu.for_loop(lambda s: mu.cond(s > 0, lambda s: f(model, s), lambda s: 1.0, s), ss)",
}


@pytest.mark.parametrize("of", ["model.n.value", "model.n", "s"])
@pytest.mark.parametrize("body", NOT_KNOWN)
@pytest.mark.parametrize("inside", INSIDE)
def test_values_that_are_not_known_are_named(inside: str, body: str, of: str) -> None:
    names = world() | {"s0": jnp.float32(1), "s": jnp.float32(1), "ss": jnp.ones(3)}
    exec(f"def f(model, s):\n    return {body.format(of)}", names)
    with pytest.raises(NOT_KNOWN[body]) as caught:
        exec(INSIDE[inside], names)
    text = str(caught.value)
    if of == "s" or inside != "remat":  # it reads what is around it, of which JAX names operations
        what = "`s`" if of == "s" else "model.n` (Variable)"
        assert what in text, text
    assert "flat[" not in text, text
    assert "leaves[" not in text, text
    assert "values[" not in text, text
    assert "function pure" not in text, text
    assert os.sep + "mutatis" + os.sep + "src" not in text, text
    assert os.sep + os.path.join("src", "mutatis") not in text, text
    assert notes(caught.value).startswith(
        "The value is known when the program runs, not while it is traced (at <string>:2"
    )
    assert notes(caught.value).count("while it is traced") == 1


@pytest.mark.parametrize("body", [*NOT_KNOWN, "jnp.zeros({}.astype(int))", "{}[{} > 0]", "format({}, '.2f')"])
def test_what_to_write_for_values_that_are_not_known_runs(body: str) -> None:
    names = world()
    exec(f"def f(n):\n    return {body.format('n', 'n')}", names)
    with pytest.raises((jax.errors.JAXTypeError, jax.errors.JAXIndexError, TypeError)) as caught:
        mu.jit(names["f"])(jnp.float32(1))
    names |= {"f": lambda *x, n=0: 1.0, "g": lambda *x: 2.0, "pred": True, "a": 1, "b": 2, "items": [1, 2], "i": 1}
    names |= {"mask": jnp.array([True, False]), "x": jnp.float32(1), "self": mu.Module(), "init_val": 0.0}
    names |= {"cond_fun": lambda c: False, "body_fun": lambda *c: c[-1]}
    assert notes(caught.value)
    run_notes(caught.value, names)


def test_a_module_is_told_by_its_own_line() -> None:
    class Net(mu.Module):
        def __call__(self, x: jax.Array) -> jax.Array:
            return x if x.sum() > 0 else -x

    line = Net.__call__.__wrapped__.__code__.co_firstlineno
    with pytest.raises(jax.errors.TracerBoolConversionError, match=rf"Net at .*test_honest_mistakes.py:{line} for jit"):
        mu.jit(Net())(jnp.ones(2))


def test_names_of_arguments_in_errors_of_nested_loops_are_those_of_the_right_loop() -> None:
    def outer(carry: Any, x: dict[str, Any]) -> Any:
        return carry, mu.for_loop(lambda y: 1.0 if x["b"] else 2.0, jnp.ones(2))

    xs = {"a": jnp.ones(3), "b": jnp.ones(3)}
    with pytest.raises(jax.errors.TracerBoolConversionError, match=r"the argument `x\['b'\]`") as caught:
        mu.scan(outer, {"k": 0.0}, xs)
    assert "test_names_of_arguments" in str(caught.value)
    with pytest.raises(jax.errors.TracerBoolConversionError, match=r"the argument `carry\['k'\]`"):
        mu.scan(lambda carry, x: (x if carry["k"] > 0 else -x, x), {"k": 0.0}, xs)
    with pytest.raises(jax.errors.TracerBoolConversionError, match=r"the argument `b`"):
        mu.for_loop(lambda a, b: a if b > 0 else b, jnp.ones(2), jnp.ones(2))
    with pytest.raises(jax.errors.TracerBoolConversionError, match=r"the argument `y`"):
        mu.remat(lambda n, y: 1.0 if y > 0 else 2.0, static_argnums=0)(3, jnp.float32(1))


def test_a_size_that_is_not_known_is_named() -> None:
    with pytest.raises((jax.errors.JAXTypeError, TypeError), match=r"`x\['n'\]`"):
        mu.jit(lambda x: jnp.zeros(x["n"]))({"n": 3})


# -- states of another shape ------------------------------------------------------------------------------------------


class Shaped(mu.Module):
    def __init__(self) -> None:
        self.w, self.b = mu.Param(jnp.ones((4, 7))), mu.Param(jnp.ones(7))
        self.table = jnp.ones(7)
        self.lin = nn.Linear(7, 7, rngs=mu.Rngs(0))

    def __call__(self, x: Any) -> Any:
        return self.lin(x @ self.w.value + self.b.value + self.table)


SHAPES: dict[str, Callable[[Any], Any]] = {
    "b": lambda m: m.b.set(jnp.ones(6)),
    "table": lambda m: setattr(m, "table", jnp.ones(6)),
    "w": lambda m: m.w.set(jnp.ones((4, 8))),
    "lin.bias": lambda m: m.lin.bias.set(jnp.ones(6)),
    "lin.kernel": lambda m: m.lin.kernel.set(jnp.ones((6, 7))),
}
CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "eagerly": lambda m, x: m(x),
    "jit": lambda m, x: mu.jit(lambda m, x: m(x))(m, x),
    "grad": lambda m, x: mu.grad(lambda m, x: m(x).sum())(m, x),
    "for_loop": lambda m, x: mu.for_loop(m, x[None]),
    "vmap": lambda m, x: mu.vmap(m)(x[None]),
    "of a copy": lambda m, x: mu.jit(m)(x),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("path", SHAPES)
def test_states_of_another_shape_than_they_were_made_with_are_named(path: str, call: str) -> None:
    model, x = Shaped(), jnp.ones((2, 4))
    model = copy.deepcopy(model) if call == "of a copy" else model
    SHAPES[path](model)
    with pytest.raises((TypeError, ValueError)) as caught:
        CALLS[call](model, x)
    added = notes(caught.value)
    assert added.startswith("state `")
    assert f".{path}` (" in added
    assert added.count("was made with shape") == 1
    exec(added.split("`")[-2], {"jnp": jnp, "v": model.w})


def test_a_state_that_gets_its_shape_where_the_error_is() -> None:
    def step(model: Any, x: Any) -> Any:
        model.b.value = jnp.ones(6)
        return model(x)

    with pytest.raises(ValueError, match="broadcast") as caught:
        mu.jit(step)(Shaped(), jnp.ones((2, 4)))
    assert "state `model.b` (Param) was made with shape (7,), and is float32[6] now" in notes(caught.value)


@pytest.mark.parametrize("stacked", [False, True])
def test_states_of_the_shape_that_they_were_made_with_are_not_named(stacked: bool) -> None:
    model = mu.vmap(lambda _: Shaped())(jnp.arange(3)) if stacked else Shaped()
    call = mu.vmap(lambda m, x: m(x)) if stacked else mu.jit(lambda m, x: m(x))
    with pytest.raises(TypeError, match="contracting") as caught:
        call(model, jnp.ones((3, 2, 5) if stacked else (2, 5)))
    assert notes(caught.value) == ""
    model.b.value = jnp.ones((3, 6) if stacked else 6)
    with pytest.raises(ValueError, match="broadcast") as other:
        call(model, jnp.ones((3, 2, 4) if stacked else (2, 4)))
    assert "m.b` (Param) was made with shape (7,), and is float32[6] now" in notes(other.value)


@pytest.mark.parametrize(
    ("code", "instead"),
    [
        ("mu.jit(lambda: loss_fn(model, x).backward())()", "mu.grad(loss_fn)(model, x)"),
        ("mu.jit(lambda x: x.cuda())(x)", "jax.device_put(x, jax.devices()[0])"),
        ("mu.for_loop(lambda x: x.detach(), x)", "jax.lax.stop_gradient(x)"),
        ("model.lin.kernel.cuda()", "jax.device_put(x, jax.devices()[0])"),
        ("model.lin.kernel.numpy()", "np.asarray(x)"),
    ],
)
def test_what_arrays_of_other_libraries_have(code: str, instead: str) -> None:
    names = world()
    with pytest.raises(AttributeError) as caught:
        exec(code, names)
    text = f"{caught.value}\n{notes(caught.value)}"
    assert f"`{instead}`" in text
    exec(instead, names)


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


# -- the first hour of somebody who comes from PyTorch -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "place", "name"),
    [
        ("model.parameters()", "Module", "parameters"),
        ("model.to('cuda')", "Module", "to"),
        ("model.cuda()", "Module", "cuda"),
        ("model.state_dict()", "Module", "state_dict"),
        ("model.zero_grad()", "Module", "zero_grad"),
        ("model.lin.forward(x)", "Module", "forward"),
        ("Net.parameters", "Module", "parameters"),
        ("optimizer.zero_grad()", "Optimizer", "zero_grad"),
        ("optimizer.param_groups", "Optimizer", "param_groups"),
        ("optimizer.state_dict()", "Module", "state_dict"),
        ("nn.CrossEntropyLoss()", "mutatis.nn", "CrossEntropyLoss"),
        ("nn.MSELoss()", "mutatis.nn", "MSELoss"),
        ("nn.ReLU()", "mutatis.nn", "ReLU"),
        ("mu.optim.Adam(model, lr=1e-3)", "mutatis.optim", "Adam"),
        ("mu.manual_seed(0)", "mutatis", "manual_seed"),
    ],
)
def test_names_of_pytorch(code: str, place: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = world() | {"logits": jnp.ones((2, 3)), "labels": jnp.zeros(2, int), "outputs": x_(), "targets": x_()}
    with pytest.raises(AttributeError) as caught:
        eval(code, names)
    assert caught.value is not None
    instead = EQUIVALENTS[place][name]
    assert instead in str(caught.value)
    names["state"] = mu.state(names["model"])
    for piece in instead.split("`")[1::2] if "`" in instead else [instead]:
        if not piece.startswith("__") and "restore" not in piece:
            exec(piece, names)


def x_() -> jax.Array:
    return jnp.ones(3)


CONSTRUCTORS = [
    Row("nn.Linear(2, 3)", ARGUMENT, "missing 1 required keyword-only argument: 'rngs'"),
    Row("nn.Linear(2, 3, bias=False, rngs=rngs)", ARGUMENT, "`nn.Linear(2, 3, use_bias=False, rngs=rngs)`"),
    Row("nn.Linear(2, 3, bias=False)", ARGUMENT, "`nn.Linear(2, 3, use_bias=False, rngs=mu.Rngs(0))`"),
    Row("nn.Linear()", ARGUMENT, "expected: nn.Linear(in_features, out_features, rngs=rngs)", SIZES),
    Row("nn.Linear(2, 3, 4, 5)", ARGUMENT, "got:      2, 3, 4, 5", SIZES),
    Row("nn.Linear(2, 3, nonsense=1, rngs=rngs)", ARGUMENT, "'nonsense'", SIZES),
    Row("nn.Conv(1, 8, (3, 3), stride=2)", ARGUMENT, "`nn.Conv(1, 8, (3, 3), strides=2, rngs=mu.Rngs(0))`"),
    Row("nn.Embed(100, embedding_dim=8)", ARGUMENT, "`nn.Embed(100, features=8, rngs=mu.Rngs(0))`"),
    Row("nn.Dropout(p=0.5)", ARGUMENT, "`nn.Dropout(rate=0.5, rngs=mu.Rngs(0))`"),
    Row("nn.LayerNorm(8, eps=1e-6)", ARGUMENT, "`nn.LayerNorm(8, epsilon=1e-06, rngs=mu.Rngs(0))`"),
    Row("Wide(2)", ARGUMENT, "`nn.Linear` is not called like this", WIDE),
    Row("nn.Sequential([model, nn.relu])(x)", ARGUMENT, "takes a list apart", "layers = [model, nn.relu]"),
    Row("model.train(False)", ARGUMENT, "Its opposite is `model.eval()`", then="not model.training"),
    Row("optimizer.step()", ARGUMENT, "state `Optimizer.step` (OptState) is no function"),
]


@pytest.mark.parametrize("row", CONSTRUCTORS, ids=lambda row: row.program[:60])
def test_calls_of_pytorch(row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test_a_mistake_is_met(row, tmp_path, monkeypatch)


def test_a_type_error_inside_of_a_constructor_is_left_alone() -> None:
    with pytest.raises(TypeError) as caught:
        nn.Linear("a", 3, rngs=mu.Rngs(0))  # type: ignore[arg-type]
    assert "is not called like this" not in str(caught.value)


def test_names_of_other_libraries_are_free() -> None:
    class Other:
        def to(self, device: Any) -> Any:
            return device

        @property
        def device(self) -> str:
            return "here"

    class Own(mu.Module, Other):
        cuda = 3

        def __init__(self) -> None:
            self.parameters = jnp.ones(2)
            self.children = 1

        def forward(self, x: Any) -> Any:
            return x

    class Late(Own):
        def state_dict(self) -> int:
            return 1

    for cls in (Own, Late):
        own: Any = cls()
        assert (own.to(1), own.cuda, own.children, own.forward(2), own.device) == (1, 3, 1, 2, "here")
        assert own.parameters.shape == (2,)
        assert hasattr(own, "state_dict") is (cls is Late)
        assert not hasattr(own, "buffers")
        del own.parameters
        with pytest.raises(AttributeError, match=r"mu\.state"):
            _ = own.parameters
    fields: Any = dataclasses.make_dataclass("Fields", [("to", int), ("cpu", int, 4)], bases=(mu.Module,))
    assert (fields(3).to, fields(3).cpu) == (3, 4)
