"""No cache keeps a model alive, and a loop over fresh models neither compiles again nor grows."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import mutatis as mu


class Net(mu.Module):
    def __init__(self) -> None:
        self.layers = [mu.Param(jnp.ones(3)) for _ in range(2)]


class Cyclic(Net):
    def __init__(self) -> None:
        super().__init__()
        self.child = Net()
        self.child.parent = self
        self.all = [self, self.child]


def step(model: Net) -> None:
    for layer in model.layers:
        layer.value = layer + 1


compiled = mu.jit(step)


def by_argument(model: Net) -> None:
    compiled(model)
    compiled(model)


def in_a_dict(model: Net) -> None:
    mu.jit(lambda d: step(d["model"]))({"model": model})


def by_closure(model: Net) -> None:
    mu.jit(lambda: step(model))()


def by_eager_loop(model: Net) -> None:
    mu.for_loop(lambda x: step(model), jnp.arange(2))


def by_gradient(model: Net) -> None:
    mu.grad(lambda m: jnp.sum(m.layers[0].value))(model)


def by_optimizer(model: Net) -> None:
    optimizer = mu.Optimizer(model, optax.sgd(0.1))
    train = mu.jit(lambda m, o: o.update(mu.grad(lambda m: jnp.sum(m.layers[0] * m.layers[1].value))(m)))
    train(model, optimizer)
    train(model, optimizer)


@pytest.mark.parametrize(
    "use", [by_argument, in_a_dict, by_closure, by_eager_loop, by_gradient, by_optimizer], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("kind", [Net, Cyclic])
def test_a_dropped_model_is_freed(use: Callable[[Net], None], kind: type[Net]) -> None:
    model = kind()
    use(model)
    module, cell, array = weakref.ref(model), weakref.ref(model.layers[0]), weakref.ref(model.layers[0].value)
    del model
    gc.collect()
    assert module() is None
    assert cell() is None
    assert array() is None


def test_without_cycles_no_collector_is_needed() -> None:
    model = Net()
    by_argument(model)
    cell = weakref.ref(model.layers[0])
    gc.disable()
    try:
        del model
        assert cell() is None
    finally:
        gc.enable()


def test_fresh_models_share_a_program_and_leave_nothing(traces: Any) -> None:
    train = mu.jit(traces.count(lambda model: step(model)))
    for _ in range(50):
        train(Net())
    gc.collect()
    assert traces.total == 1
    compiler = train._compiler
    assert len(set(compiler.programs.values())) == 1
    assert not compiler.bindings


def test_a_loop_over_fresh_models_and_optimizers_is_flat(traces: Any) -> None:
    @mu.jit
    @traces.count
    def train(model: Net, optimizer: mu.Optimizer) -> None:
        optimizer.update(mu.grad(lambda m: jnp.sum(m.layers[0] * m.layers[1].value))(model))

    def epoch() -> None:
        model = Net()
        train(model, mu.Optimizer(model, optax.chain(optax.clip(1.0), optax.sgd(1e-3, momentum=0.9))))

    def held() -> tuple[int, int]:
        gc.collect()
        return len(gc.get_objects()), len(jax.live_arrays())

    for _ in range(50):
        epoch()
    before = held()
    for _ in range(1000):
        epoch()
    after = held()
    assert traces.total == 1
    assert after[0] - before[0] < 100, "objects that a round leaves behind would be thousands by now"
    assert after[1] <= before[1]


def test_a_fresh_optimizer_of_the_same_settings_compiles_nothing(traces: Any) -> None:
    @mu.jit
    @traces.count
    def train(model: Net, optimizer: mu.Optimizer) -> None:
        optimizer.update(mu.grad(lambda m: jnp.sum(m.layers[0] * m.layers[1].value))(model))

    for _ in range(3):
        model = Net()
        train(model, mu.Optimizer(model, optax.sgd(0.1, momentum=0.9)))
    assert traces.total == 1
    model = Net()
    train(model, mu.Optimizer(model, optax.sgd(0.2, momentum=0.9)))
    assert traces.total == 2, "another learning rate is another program"
    assert float(model.layers[0].value[0]) == pytest.approx(0.8)


REMOVED: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "attribute": (lambda m: m.w, lambda m: delattr(m, "w")),
    "submodule": (lambda m: m.child.layers[0], lambda m: delattr(m, "child")),
    "list": (lambda m: m.layers[0], lambda m: delattr(m, "layers")),
    "item": (lambda m: m.layers[0], lambda m: m.layers.pop(0)),
    "item of an item": (lambda m: m.nested[0][0], lambda m: m.nested.pop()),
    "entry": (lambda m: m.entries["a"][0], lambda m: m.entries.clear()),
    "transformed": (lambda m: m.inner.__wrapped__.layers[0], lambda m: delattr(m, "inner")),
}


@pytest.mark.parametrize("operation", [mu.state, mu.split, mu.variables, mu.clone, jax.tree.leaves])
@pytest.mark.parametrize(("find", "remove"), REMOVED.values(), ids=REMOVED)
def test_a_state_taken_out_of_a_model_is_freed(
    operation: Callable[[Any], Any], find: Callable[[Any], Any], remove: Callable[[Any], Any]
) -> None:
    model = Cyclic()
    model.w, model.nested, model.entries = mu.Param(1.0), [[mu.Param(1.0)]], {"a": (mu.Param(1.0),)}
    model.inner = mu.remat(Net())
    operation(model)
    cell = weakref.ref(find(model))
    remove(model)
    if remove is REMOVED["submodule"][1]:
        model.all.clear()  # which holds it too
    gc.collect()
    assert cell() is None


@pytest.mark.parametrize("operation", [mu.state, mu.split, mu.clone])
def test_a_model_whose_states_were_taken_needs_no_collector(operation: Callable[[Any], Any]) -> None:
    model = Net()
    operation(model)
    cell = weakref.ref(model.layers[0])
    gc.disable()
    try:
        del model
        assert cell() is None
    finally:
        gc.enable()
