"""References: an optimizer and its model, in every way in which both, or one of them, are made or copied."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mutatis as mu
from mutatis import checkpoint, errors

pytestmark = pytest.mark.once  # many alike; what JAX's versions differ in, the twins and traces of transforms show

X = jnp.float32(3.0)


@pytest.fixture(autouse=True)
def promotion() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"):  # optax asks for it
        yield


def sgd_update(updates: Any, state: Any, params: Any = None) -> Any:
    return jax.tree.map(lambda g: -g, updates), state


SGD = optax.GradientTransformation(optax.init_empty_state, sgd_update)  # unlike `optax.sgd(1.0)`, it can be pickled


class Scale(mu.Module):
    def __init__(self, w: Any = 2.0) -> None:
        self.w = mu.Param(jnp.asarray(w, jnp.float32))

    def __call__(self, x: Any) -> Any:
        return self.w.value * x


class Trainer(mu.Module):
    """A module that holds both."""

    def __init__(self) -> None:
        self.net = Scale()
        self.optimizer = mu.Optimizer(self.net, SGD)


class Owner(mu.Module):
    """A module that holds its own optimizer: a cycle."""

    def __init__(self) -> None:
        self.w = mu.Param(jnp.float32(2.0))
        self.optimizer = mu.Optimizer(self, SGD)

    def __call__(self, x: Any) -> Any:
        return self.w.value * x


def both() -> tuple[Scale, mu.Optimizer]:
    net = Scale()
    return net, mu.Optimizer(net, SGD)


def swapped() -> tuple[mu.Optimizer, Scale]:
    return both()[::-1]


def of_container() -> tuple[dict[str, Any], mu.Optimizer]:
    nets = {"a": Scale(), "b": Scale(0.0)}
    return nets, mu.Optimizer(nets, SGD)


def of_other_container() -> tuple[list[Scale], mu.Optimizer]:
    a, b = Scale(), Scale(0.0)
    return [a, b], mu.Optimizer((a, {"b": b}), SGD)


def of_part() -> tuple[Trainer, mu.Optimizer]:
    trainer = Trainer()
    return trainer, mu.Optimizer(trainer.net, SGD)


def of_view() -> tuple[Scale, mu.Optimizer]:
    net = Scale()
    return net, mu.Optimizer(mu.view(net, training=False), SGD)


def of_variable() -> tuple[mu.Param, mu.Optimizer]:
    w = mu.Param(jnp.float32(2.0))
    return w, mu.Optimizer(w, SGD)


def parts(made: Any) -> tuple[mu.Param, mu.Optimizer]:
    """The parameter that starts at 2, and the optimizer."""
    if isinstance(made, mu.Module):
        return getattr(made, "net", made).w, made.optimizer
    optimizer, other = made if isinstance(made[0], mu.Optimizer) else made[::-1]
    if isinstance(other, mu.Variable):
        return other, optimizer
    if isinstance(other, mu.Module):
        return getattr(other, "net", other).w, optimizer
    return (other["a"] if isinstance(other, dict) else other[0]).w, optimizer


def step(made: Any) -> None:
    """A step of gradient descent on 3 w, by which w moves by -3."""
    optimizer = parts(made)[1]
    gradients = mu.grad(lambda: sum(p.value for p in optimizer._params().values()) * X, of=optimizer._model.value)()
    optimizer.update(gradients)


def steps(made: Any, n: int = 1) -> float:
    for _ in range(n):
        step(made)
    return float(parts(made)[0])


MAKERS = [both, swapped, of_container, of_other_container, of_part, of_view, of_variable, Trainer, Owner]
MAKES: dict[str, Callable[[Any], Any]] = {
    "jit": lambda make: mu.jit(make)(),
    "jit, again": lambda make: (f := mu.jit(make)) and (f(), f())[1],
    "jit in jit": lambda make: mu.jit(lambda: mu.jit(make)())(),
    "remat": lambda make: mu.remat(make)(),
    "transaction": lambda make: in_transaction(make),
}


def in_transaction(make: Any) -> Any:
    with mu.transaction():
        return make()


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("way", MAKES.values(), ids=MAKES)
def test_made_inside(make: Callable[[], Any], way: Callable[[Any], Any]) -> None:
    made = way(make)
    assert steps(made) == -1
    mu.jit(lambda: step(made))()
    assert float(parts(made)[0]) == -4


@pytest.mark.parametrize("make", MAKERS)
def test_shapes_are_restored(make: Callable[[], Any], tmp_path: Path) -> None:
    first = make()
    checkpoint.save(tmp_path / "both", first)
    for shapes in (mu.eval_shape(make), mu.eval_shape(mu.jit(make))):
        checkpoint.restore(tmp_path / "both", shapes)
        assert steps(shapes) == -1


COPIES: dict[str, Callable[[Any], Any]] = {
    "clone": mu.clone,
    "merge": lambda made: mu.merge(*mu.split(made)),
    "deepcopy": copy.deepcopy,
    "pickle": lambda made: pickle.loads(pickle.dumps(made)),
    "jit": lambda made: mu.jit(lambda: mu.clone(made))(),
    "clone of a clone": lambda made: mu.clone(mu.clone(made)),
}


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("copying", COPIES.values(), ids=COPIES)
def test_a_copy_of_both_is_trained_alone(make: Callable[[], Any], copying: Callable[[Any], Any]) -> None:
    made = make()
    copied = copying(made)
    assert steps(copied, 2) == -4
    assert float(parts(made)[0]) == 2
    assert int(parts(made)[1].step) == 0
    assert steps(made) == -1
    assert float(parts(copied)[0]) == -4


def thawed(tree: Any) -> Any:
    for node in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, mu.Module | mu.Variable)):
        mu.thaw(node)
    return tree


ALONE: dict[str, Callable[[mu.Optimizer], mu.Optimizer]] = {
    "clone": mu.clone,
    "merge": lambda optimizer: mu.merge(*mu.split(optimizer)),
    "tree.map": lambda optimizer: thawed(jax.tree.map(lambda x: x, optimizer)),
    "flatten": lambda optimizer: thawed(jax.tree.unflatten(*jax.tree.flatten(optimizer)[::-1])),
    "raw jit": lambda optimizer: thawed(jax.jit(lambda o: o)(optimizer)),
    "clone of such a copy": lambda optimizer: mu.clone(mu.clone(optimizer)),
    "pickle of such a copy": lambda optimizer: pickle.loads(pickle.dumps(mu.clone(optimizer))),
    "deepcopy of such a copy": lambda optimizer: copy.deepcopy(mu.clone(optimizer)),
}


@pytest.mark.parametrize("copying", ALONE.values(), ids=ALONE)
@pytest.mark.parametrize("make", [both, of_container, of_variable])
def test_a_copy_of_the_optimizer_alone_says_so(make: Callable[[], Any], copying: Callable[[Any], Any]) -> None:
    made = make()
    gradients = mu.grad(lambda: sum(p.value for p in made[1]._params().values()) * X, of=made[0])()
    alone = copying(made[1])
    for args in ((gradients,), (made[0], gradients)):
        with pytest.raises(errors.StructureError, match="was not copied with it"):
            alone.update(*args)
    assert float(parts(made)[0]) == 2
    assert repr(alone).startswith("Optimizer(")
    assert len(mu.state(alone)) == len(mu.state(made[1]))


def test_the_cure_runs() -> None:
    net, optimizer = both()
    with pytest.raises(errors.StructureError) as caught:
        mu.clone(optimizer).update(mu.state(net))
    cure = str(caught.value).rpartition("`")[0].rpartition("`")[2]
    model, optimizer = eval(cure, {"mu": mu, "model": net, "optimizer": optimizer})
    assert steps((model, optimizer)) == -1


def test_a_tree_of_both_is_two_copies_that_never_train_the_original() -> None:
    net, optimizer = both()
    copied = thawed(jax.tree.map(lambda x: x, (net, optimizer)))
    with pytest.raises(errors.StructureError, match="was not copied with it"):
        step(copied)
    assert float(net.w) == 2
    trainer = Trainer()
    other = thawed(jax.tree.map(lambda x: x, trainer))  # one node
    assert steps(other) == -1
    assert float(trainer.net.w) == 2


def test_only_some_of_what_it_refers_to_is_copied() -> None:
    nets, optimizer = of_container()
    _, alone = mu.clone((nets["a"], optimizer))
    with pytest.raises(errors.StructureError, match="was not copied with it"):
        alone.update({})


def test_a_view_of_an_optimizer_keeps_its_model() -> None:
    net, optimizer = both()
    view = mu.view(optimizer, training=False)
    assert steps((net, view)) == -1
    assert int(optimizer.step) == 1


def test_definitions_of_equal_structure_are_equal() -> None:
    one, other = both(), both()
    assert mu.graphdef(one[1]) != mu.graphdef(one), "with and without the model"
    tx = SGD
    a, b = mu.Optimizer(Scale(), tx), mu.Optimizer(Scale(), tx)
    assert mu.graphdef(a) == mu.graphdef(b)
    assert hash(mu.graphdef(a)) == hash(mu.graphdef(b))
    assert mu.graphdef(other) is not None


def test_an_optimizer_in_jit_of_another_model_compiles_nothing() -> None:
    tx, traces = SGD, []

    @mu.jit
    def run(net: Scale, optimizer: mu.Optimizer) -> None:
        traces.append(1)
        optimizer.update(mu.grad(lambda net: net(X))(net))

    for _ in range(3):
        net = Scale()
        optimizer = mu.Optimizer(net, tx)
        run(net, optimizer)
        assert float(net.w) == -1
    assert len(traces) == 1


# -- a population --------------------------------------------------------------------------------------------------


@pytest.mark.jax_leaks
@pytest.mark.parametrize("around", [lambda f: f, mu.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("inner", [optax.sgd, optax.adam])
def test_a_population_with_hyperparameters_of_its_own(around: Any, inner: Any) -> None:
    def make(lr: Any) -> tuple[Scale, mu.Optimizer]:
        net = Scale()
        return net, mu.Optimizer(net, optax.inject_hyperparams(inner)(learning_rate=lr))

    def run(net: Scale, optimizer: mu.Optimizer) -> None:
        optimizer.update(mu.grad(lambda net: net(X))(net))

    rates = jnp.array([0.1, 0.2])
    nets, optimizers = around(mu.vmap(make))(rates)
    twins = [make(rate) for rate in rates]
    train = around(mu.vmap(run))
    for _ in range(3):
        train(nets, optimizers)
        for twin in twins:
            run(*twin)
    np.testing.assert_allclose(nets.w, [twin[0].w.value for twin in twins], rtol=1e-6)
    np.testing.assert_array_equal(optimizers.step, [3, 3])


def test_a_population_is_cloned_and_scanned() -> None:
    nets, optimizers = mu.vmap(lambda w: (net := Scale(w), mu.Optimizer(net, optax.adam(0.1))))(jnp.arange(3.0))
    copied = mu.clone((nets, optimizers))

    def run(_: Any) -> None:
        mu.vmap(lambda net, optimizer: optimizer.update(mu.grad(lambda net: net(X))(net)))(*copied)

    mu.for_loop(run, jnp.arange(2))
    np.testing.assert_array_equal(nets.w, [0, 1, 2])
    np.testing.assert_allclose(copied[0].w, np.arange(3) - 0.2, atol=1e-4)
