"""Bad input in the middle of things: the message leads with the state, and everything is as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import errors

pytestmark = pytest.mark.once  # nothing here depends on the version of JAX


class Norm(mu.Module):
    def __init__(self) -> None:
        self.mean = mu.BatchStat(jnp.zeros(3))
        self.count = mu.Variable(0)
        self.seen = 0


class Net(mu.Module):
    def __init__(self) -> None:
        self.w = mu.Param(jnp.arange(3.0))
        self.table = jnp.arange(3)
        self.blocks = [Norm(), {"a": Norm()}]
        self.flag = False

    def __call__(self, x: Any) -> Any:
        norm = self.blocks[0]
        norm.mean.value = norm.mean + x
        norm.count += 1
        return jnp.sum(self.w.value) * x


class Everything:
    """Values, attributes and containers of a model, to compare by identity and value."""

    def __init__(self, net: Net) -> None:
        self.net = net
        self.values = mu.state(net)
        self.shown = repr(net)
        self.objects = [(m, dict(m.__dict__)) for m in (net, net.blocks[0], net.blocks[1]["a"])]
        self.blocks = list(net.blocks)
        self.entries = dict(net.blocks[1])
        self.list = net.blocks
        self.marks = {cell: cell.frozen for cell in mu.variables(net).values()}

    def check(self) -> None:
        assert mu.state(self.net) == self.values
        assert not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(mu.state(self.net)))
        assert repr(self.net) == self.shown
        for module, attributes in self.objects:
            assert module.__dict__.keys() == attributes.keys()
            assert all(module.__dict__[name] is value for name, value in attributes.items())
        assert self.net.blocks is self.list
        assert all(a is b for a, b in zip(self.net.blocks, self.blocks, strict=True))
        assert self.net.blocks[1] == self.entries
        assert {cell: cell.frozen for cell in mu.variables(self.net).values()} == self.marks
        # The next call works, for the object is not poisoned.
        count = int(self.net.blocks[0].count)
        assert float(mu.jit(lambda m, x: m(x))(self.net, 2.0)) == 6
        assert float(self.net(2.0)) == 6
        assert int(self.net.blocks[0].count) == count + 2


def change_everything(net: Net, x: Any) -> None:
    """Values, attributes, lists, dicts: all that a traced function may change before it fails."""
    net(x)
    net.table = net.table + 1
    net.w.value = net.w * 2
    net.flag = True
    net.extra = mu.Cache(x)
    net.late = Norm()
    del net.blocks[1]["a"].seen
    net.blocks[0].mean = mu.Param(jnp.zeros(7))
    net.blocks.append(Norm())
    net.blocks[1]["b"] = net.blocks[0]
    net.blocks[1], net.blocks[0] = net.blocks[0], net.blocks[1]
    net.blocks = [net.blocks]
    net.eval()


def change_values(net: Net, x: Any) -> None:
    """What may change in loops and branches."""
    net(x)
    net.table = net.table + 1
    net.w.value = net.w * 2


XS = jnp.arange(1.0, 4.0)
X = jnp.float32(2)

TRANSFORMS: dict[str, Callable[[Callable[[Any], Any]], Any]] = {
    "jit": lambda f: mu.jit(f)(X),
    "grad": lambda f: mu.grad(f)(X),
    "value_and_grad": lambda f: mu.value_and_grad(f)(X),
    "vmap": lambda f: mu.vmap(f)(XS),
    "remat": lambda f: mu.remat(f)(X),
    "scan": lambda f: mu.scan(lambda c, x: (c, f(x)), None, XS),
    "for_loop": lambda f: mu.for_loop(f, XS),
    "while_loop": lambda f: mu.while_loop(lambda c: c < 3, f, X),
    "while_loop condition": lambda f: mu.while_loop(f, lambda c: c, X),
    "fori_loop": lambda f: mu.fori_loop(0, 3, lambda i, c: f(c), X),
    "map": lambda f: mu.map(f, XS),
    "map in batches": lambda f: mu.map(f, XS, batch_size=2),
    "cond": lambda f: mu.cond(True, f, lambda x: x, X),
    "cond, the other branch": lambda f: mu.cond(True, lambda x: x, f, X),
    "switch": lambda f: mu.switch(1, [lambda x: x, f], X),
    "eval_shape": lambda f: mu.eval_shape(f, X),
    "make_jaxpr": lambda f: mu.make_jaxpr(f)(X),
    "functionalize": lambda f: (lambda pure, state: pure(state, X))(*mu.functionalize(f)),
    "jit of grad of scan": lambda f: mu.jit(mu.grad(lambda x: mu.scan(lambda c, y: (f(c), y), x, XS)[0]))(X),
    "vmap of cond": lambda f: mu.vmap(lambda x: mu.cond(x > 2, f, lambda x: x, x))(XS),
    "jit of jit": lambda f: mu.jit(lambda x: mu.jit(f)(x))(X),
    "jit of for_loop of remat": lambda f: mu.jit(lambda x: mu.for_loop(lambda y: mu.remat(f)(y), x))(XS),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("change", [change_everything, change_values], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", [KeyError, KeyboardInterrupt, StopIteration, SystemExit])
def test_an_exception_in_the_middle(name: str, change: Any, kind: type[BaseException]) -> None:
    if kind is not KeyError and name not in ("jit", "grad", "scan", "cond"):
        kind = ValueError
    net = Net()
    everything = Everything(net)

    def fails(x: Any) -> Any:
        change(net, x)
        raise kind("in the middle")

    for _ in range(2):
        with pytest.raises(kind):
            TRANSFORMS[name](fails)
    everything.check()


@pytest.mark.parametrize(
    "name",
    [
        *("jit", "grad", "vmap", "scan", "cond", "jit of jit", "eval_shape"),
        pytest.param("remat", marks=pytest.mark.jax_leaks),
    ],
)
def test_an_exception_that_is_caught_inside(name: str) -> None:
    """An inner transform that fails leaves what the outer function had."""
    net = Net()

    def fails(x: Any) -> Any:
        change_everything(net, x)
        raise KeyError

    @mu.jit
    def step() -> None:
        net.w.value = net.w + 1
        net.blocks[0].extra = "kept"
        with pytest.raises(KeyError):
            TRANSFORMS[name](fails)
        net.w.value = net.w * 10

    step()
    np.testing.assert_array_equal(net.w, [10, 20, 30])
    assert net.blocks[0].extra == "kept"
    assert len(net.blocks) == 2
    assert int(net.blocks[0].count) == 0
    assert not hasattr(net, "extra")


def test_a_call_that_fails_after_a_compiled_one() -> None:
    net = Net()
    fail = False

    def step(x: Any) -> Any:
        out = net(x)
        if fail:
            change_everything(net, x)
            raise KeyError
        return out

    compiled = mu.jit(step)
    compiled(1.0)
    everything = Everything(net)
    fail = True
    with pytest.raises(KeyError):
        compiled(1.0)
    fail = False
    everything.check()
    compiled(1.0)
    assert int(net.blocks[0].count) == 4


def test_a_result_that_jax_refuses() -> None:
    net = Net()
    everything = Everything(net)

    def odd(x: Any) -> Any:
        change_values(net, x)
        return "text"

    for transform in (mu.jit, mu.grad, lambda f: mu.vmap(f, axis_size=2, in_axes=None)):
        with pytest.raises(TypeError):
            transform(odd)(X)
    with pytest.raises(TypeError):
        mu.grad(lambda x: (change_values(net, x), x)[1])(XS)  # not a scalar
    everything.check()


def test_an_argument_that_jax_refuses() -> None:
    net = Net()
    everything = Everything(net)
    for transform in (mu.jit, mu.grad, mu.vmap):
        with pytest.raises((TypeError, ValueError)):
            transform(lambda x: net(1.0))("text")
    everything.check()


def test_a_concrete_value_that_is_asked_of_a_tracer() -> None:
    net = Net()
    everything = Everything(net)

    def decides(x: Any) -> Any:
        change_values(net, x)
        return x if x > 0 else -x

    with pytest.raises(jax.errors.TracerBoolConversionError):
        mu.jit(decides)(1.0)
    everything.check()


# -- the message leads with the state ----------------------------------------------------------------------------


def merge_other_shape(net: Net) -> None:
    definition, state = mu.split(net)
    mu.merge(definition, {**state.to_pure_dict(), "v": jnp.zeros(3)})


# program -> (class, path, how the first line starts, expected, got)
MESSAGES: list[tuple[Any, type[errors.MutatisError], Any, str, Any, Any]] = [
    (
        lambda net: mu.vmap(lambda x: net(x))(XS),
        errors.LaneError,
        "net.blocks[0].mean",
        "state `net.blocks[0].mean` (BatchStat) is shared by all lanes",
        "the same value in all lanes, or an axis for the state",
        "a value per lane",
    ),
    (
        lambda net: mu.for_loop(lambda x: net.w.set(net.w.value.astype(jnp.int32)), XS),
        errors.StateTypeError,
        "net.w",
        "state `net.w` (Param) changes its type",
        "float32[3]",
        "int32[3]",
    ),
    (
        lambda net: mu.scan(
            lambda c, x: (net.blocks[0].count.set(net.blocks[0].count + jnp.ones(2, jnp.int32)), x), None, XS
        ),
        errors.StateTypeError,
        "net.blocks[0].count",
        "state `net.blocks[0].count` (Variable) changes its type",
        "int32[]",
        "int32[2]",
    ),
    (
        lambda net: mu.while_loop(lambda c: c < 2, lambda c: (net.w.set(jnp.zeros(2)), c + 1)[1], 0),
        errors.StateTypeError,
        "net.w",
        "state `net.w` (Param) changes its type",
        "float32[3]",
        "float32[2]",
    ),
    (
        lambda net: mu.cond(True, lambda: None, lambda: net.w.set(jnp.int32(0))),
        errors.StateTypeError,
        "net.w",
        "state `net.w` (Param) changes its type in a branch",
        "float32[3]",
        "int32[]",
    ),
    (
        lambda net: mu.switch(0, [lambda: None, lambda: net.blocks[1]["a"].mean.set({"x": jnp.zeros(3)})]),
        errors.StateTypeError,
        "net.blocks[1].a.mean",
        "state `net.blocks[1].a.mean` (BatchStat) changes its type in a branch",
        "float32[3]",
        "{'x': float32[3]}",
    ),
    (
        lambda net: mu.while_loop(lambda c: (net(1.0), c < 3)[1], lambda c: c + 1, 0),
        errors.StructureError,
        ("net.blocks[0].mean", "net.blocks[0].count"),
        "state `net.blocks[0].",
        None,
        None,
    ),
    (
        lambda net: jax.jit(lambda: net.w.set(net.w + 1))(),
        errors.TraceLevelError,
        "Net.w",
        "state `Net.w` (Param) was",
        None,
        None,
    ),
    (
        lambda net: jax.grad(lambda x: net(x))(1.0),
        errors.TraceLevelError,
        "Net.blocks[0].mean",
        "state `Net.blocks[0].mean` (BatchStat) was written inside a raw JAX transform",
        None,
        None,
    ),
    (
        lambda net: jax.lax.cond(True, lambda: net.w.value, lambda: net.w.value),
        errors.TraceLevelError,
        "Net.w",
        "state `Net.w` (Param) was read inside a raw JAX transform",
        None,
        None,
    ),
    (
        lambda net: jax.checkpoint(lambda x: net.w.value * x)(1.0),
        errors.TraceLevelError,
        "Net.w",
        "state `Net.w` (Param) was read inside a raw JAX transform",
        None,
        None,
    ),
    (
        lambda net: mu.jit(lambda: jax.lax.fori_loop(0, 2, lambda i, c: (net(1.0), c)[1], 0))(),
        errors.TraceLevelError,
        "net.blocks[0].mean",
        "state `net.blocks[0].mean` (BatchStat) was written",
        None,
        None,
    ),
    (
        lambda net: mu.jit(
            lambda: (jax.lax.fori_loop(0, 2, lambda i, c: c + net.w.value[0], 0.0), net.w.set(net.w * 2))
        )(),
        errors.TraceLevelError,
        "net.w",
        "state `net.w` (Param) was written after a raw JAX transform had read it",
        None,
        None,
    ),
    (
        lambda net: mu.jit(lambda: setattr(net.blocks[0], "seen", net.blocks[0].seen + 1))(),
        errors.StaticAttributeError,
        "Norm.seen",
        "`Norm.seen` is a plain number",
        "0",
        "1",
    ),
    (
        lambda net: mu.map(lambda x: net(x), XS, batch_size=2),
        errors.LaneError,
        "net.blocks[0].mean",
        "state `net.blocks[0].mean` (BatchStat) was written in a batch of items",
        None,
        None,
    ),
    (
        lambda net: mu.for_loop(lambda x: net.blocks.append(Norm()), XS),
        errors.StructureError,
        "net.blocks",
        "`net.blocks` was changed in the body of a loop",
        None,
        None,
    ),
    (
        lambda net: mu.cond(True, lambda: delattr(net.blocks[0], "seen"), lambda: None),
        errors.StructureError,
        "net.blocks[0].seen",
        "`net.blocks[0].seen` was changed in a branch",
        None,
        None,
    ),
    (
        lambda net: mu.cond(True, lambda: mu.Cache(XS), lambda: mu.Cache(XS)),
        errors.StructureError,
        None,
        "a Cache was made and returned in a branch",
        None,
        None,
    ),
    (
        lambda net: mu.scan(lambda c, x: c, 0.0, XS),
        errors.StructureError,
        None,
        "the body did not return a pair inside `scan(",
        "(carry, y)",
        "float32[]",
    ),
    (
        lambda net: mu.cond(True, lambda: 1, lambda: (1, 2)),
        errors.StructureError,
        None,
        "the branches return different structures inside `cond(",
        "what the false branch returns: (*, *)",
        "the true branch: *",
    ),
    (
        lambda net: mu.switch(0, []),
        errors.ArgumentError,
        None,
        "`switch` has no branches",
        "at least one function",
        None,
    ),
    (
        merge_other_shape,
        errors.StructureError,
        None,
        "the states do not fit the graph definition",
        None,
        None,
    ),
]


@pytest.mark.parametrize("number", range(len(MESSAGES)))
def test_messages(number: int) -> None:
    program, kind, path, start, expected, got = MESSAGES[number]
    net = Net()
    everything = Everything(net)
    for _ in range(2):
        with pytest.raises(kind) as caught:
            program(net)
        error = caught.value
        assert str(error).startswith(start), str(error)
        assert error.path in (path if isinstance(path, tuple) else (path,))
        if expected is not ...:
            assert error.expected == expected
            assert str(error.got) == str(got)
        assert (f"  expected: {error.expected}\n" in str(error)) == (error.expected is not None)
        assert error.cure
    everything.check()


def test_a_carry_that_would_promote_gives_the_cast() -> None:
    n = mu.Variable(0)
    model = mu.Module()
    model.n = n

    def body(x: Any) -> None:
        model.n.value = model.n.value.astype(jnp.float32) + x

    with pytest.raises(errors.StateTypeError) as caught:
        mu.for_loop(body, XS)
    assert "`v.value = x.astype(jnp.int32)`" in str(caught.value)

    def cured(x: Any) -> None:
        v = model.n
        x = model.n.value.astype(jnp.float32) + x
        v.value = x.astype(jnp.int32)

    mu.for_loop(cured, XS)
    assert int(n) == 6


@pytest.mark.parametrize(
    ("init", "step"),
    [
        (jnp.int32(0), lambda c: c.astype(jnp.float32)),
        (jnp.zeros(3), lambda c: jnp.zeros(2)),
        ((1.0, 2.0), lambda c: c[0]),
        ({"a": 1}, lambda c: {"b": 1}),
    ],
)
def test_a_carry_that_changes_is_refused(init: Any, step: Any) -> None:
    net = Net()
    everything = Everything(net)
    for loop in (
        lambda: mu.scan(lambda c, x: (step(c), net(x)), init, XS),
        lambda: mu.while_loop(lambda c: True, lambda c: (net(1.0), step(c))[1], init),
        lambda: mu.fori_loop(0, 3, lambda i, c: (net(1.0), step(c))[1], init),
    ):
        with pytest.raises(errors.StateTypeError, match="the carry changes its type"):
            loop()
    everything.check()


def test_gradients_of_nothing() -> None:
    net = Net()
    everything = Everything(net)
    for program in (
        lambda: mu.grad(lambda m: m(1.0), wrt=mu.Cache)(net),
        lambda: mu.grad(lambda: net(1.0), of=net, wrt=mu.Nothing())(),
        lambda: mu.grad(lambda m: m(1.0), wrt=mu.PathContains("table"))(net),
    ):
        with pytest.raises(errors.FilterError, match="nothing to differentiate"):
            program()
    with mu.freeze(net), pytest.raises(errors.FilterError, match="nothing to differentiate"):
        mu.grad(lambda m: m(1.0))(net)
    everything.check()


def test_a_copy_is_not_poisoned_either() -> None:
    net = Net()
    other = copy.deepcopy(net)
    with pytest.raises(errors.LaneError):
        mu.vmap(lambda x: net(x))(XS)
    Everything(other).check()
    Everything(net).check()
