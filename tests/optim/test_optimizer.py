"""The optimizer: any optax transformation over the states of a model, beside optax threaded by hand."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mutatis as mu
from mutatis import errors


@pytest.fixture(autouse=True)
def _promotion() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"):  # optax computes float ** int
        yield


class Net(mu.Module):
    def __init__(self) -> None:
        self.w = mu.Param(jnp.array([[1.0, -2.0], [0.5, 3.0]]))
        self.layers = [mu.Param(jnp.array([0.1, -0.1])), {"scale": mu.Param(jnp.float32(2))}]
        self.mean = mu.BatchStat(jnp.zeros(2))
        self.steps = mu.Param(jnp.int32(3))

    def __call__(self, x: Any) -> Any:
        return (x @ self.w + self.layers[0].value[None]) * self.layers[1]["scale"].value


X = jnp.array([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]])


def loss(model: Net, x: Any = X) -> Any:
    return jnp.mean((model(x) - 1.0) ** 2)


def pure_loss(params: dict[str, Any], x: Any = X) -> Any:
    return jnp.mean(((x @ params["w"] + params["b"][None]) * params["s"] - 1.0) ** 2)


def by_hand(tx: Any, steps: int, **extra: Any) -> dict[str, Any]:
    params = {"w": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "b": jnp.array([0.1, -0.1]), "s": jnp.float32(2)}
    tx = optax.with_extra_args_support(tx)
    state = tx.init(params)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        value, grads = jax.value_and_grad(pure_loss)(params)
        given = {"value": value} if extra else {}
        updates, state = tx.update(grads, state, params, **given)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params


def check(model: Net, params: dict[str, Any]) -> None:
    np.testing.assert_allclose(model.w, params["w"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.layers[0], params["b"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.layers[1]["scale"], params["s"], rtol=1e-5, atol=1e-6)
    assert int(model.steps) == 3, "integers are left out"
    assert not np.asarray(model.mean).any()


TRANSFORMATIONS: dict[str, Any] = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(1e-2),
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "rmsprop": lambda: optax.rmsprop(1e-2),
    "lion": lambda: optax.lion(1e-2),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2)),
    "schedule": lambda: optax.adam(optax.linear_schedule(0.1, 0.0, 5)),
    "accumulation": lambda: optax.MultiSteps(optax.adam(1e-2), every_k_schedule=2),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
    "lookahead": lambda: optax.apply_if_finite(optax.adam(1e-2), 3),
    "ema": lambda: optax.chain(optax.sgd(0.1), optax.ema(0.9)),
}


WAYS = [("sgd", "eager"), ("accumulation", "eager"), ("adam", "arguments"), ("adam", "mixed")]


@pytest.mark.parametrize(("name", "how"), [*WAYS, *((name, "closures") for name in TRANSFORMATIONS)])
def test_steps_equal_optax_by_hand(name: str, how: str) -> None:
    model = Net()
    optimizer = mu.Optimizer(model, TRANSFORMATIONS[name]())

    def step(model: Net, optimizer: mu.Optimizer) -> None:
        optimizer.update(mu.grad(loss)(model))

    run = {
        "eager": lambda: step(model, optimizer),
        "arguments": lambda: compiled(model, optimizer),
        "closures": mu.jit(lambda: step(model, optimizer)),
        "mixed": lambda: mixed(model),
    }[how]
    compiled = mu.jit(step)
    mixed = mu.jit(lambda model: step(model, optimizer))
    for _ in range(4):
        run()
    check(model, by_hand(TRANSFORMATIONS[name](), 4))
    assert int(optimizer.step) == 4


def test_the_step_is_compiled_once(traces: Any) -> None:
    step = mu.jit(traces.count(lambda m, o: o.update(m, mu.grad(loss)(m))))
    for _ in range(2):
        model = Net()
        optimizer = mu.Optimizer(model, TX)
        for _ in range(3):
            step(model, optimizer)
    assert traces.total == 1


TX = optax.adam(1e-2)


def test_equal_transformations_share_a_program(traces: Any) -> None:
    step = mu.jit(traces.count(lambda m, o: o.update(m, mu.grad(loss)(m))))
    for _ in range(2):
        model = Net()
        step(model, mu.Optimizer(model, optax.adam(1e-2)))
    assert traces.total == 1
    model = Net()
    step(model, mu.Optimizer(model, optax.adam(1e-1)))
    assert traces.total == 2


def test_extra_arguments_reach_optax() -> None:
    tx = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1, factor=0.5))
    model = Net()
    optimizer = mu.Optimizer(model, tx)

    @mu.jit
    def step() -> None:
        value, grads = mu.value_and_grad(loss)(model)
        optimizer.update(grads, value=value)

    for _ in range(4):
        step()
    check(model, by_hand(tx, 4, value=True))


def test_injected_hyperparameters_are_states() -> None:
    model = Net()
    optimizer = mu.Optimizer(model, optax.inject_hyperparams(optax.sgd)(learning_rate=0.1))
    (name,) = [n for n in optimizer.state if n.endswith("learning_rate")]
    step = mu.jit(lambda: optimizer.update(mu.grad(loss)(model)))
    step()
    optimizer.state[name].value = jnp.float32(0.0)
    before = np.asarray(model.w)
    step()
    np.testing.assert_array_equal(model.w, before)


def test_moments_are_states_by_path() -> None:
    optimizer = mu.Optimizer(Net(), optax.adam(1e-2))
    state = mu.state(optimizer)
    assert all(kind is mu.OptState for kind in state.kinds().values())
    names = set(optimizer.state)
    assert {"0.mu.w", "0.nu.w", "0.mu.layers[0]", "0.count"} <= names
    assert mu.state(optimizer, "opt_state") == state
    assert not any("model" in str(path) for path in state)


@pytest.mark.parametrize("wrt", [mu.Param, "params", mu.PathContains("w"), mu.Not(mu.PathContains("w")), mu.Variable])
def test_wrt(wrt: Any) -> None:
    model = Net()
    optimizer = mu.Optimizer(model, optax.sgd(0.1), wrt=wrt)
    before = mu.state(model)
    optimizer.update(mu.grad(loss, wrt=wrt)(model))
    changed = {path for path, value in mu.state(model).items() if bool(jnp.any(value != before[path]))}
    floats = {path for path in mu.state(model, wrt) if path != ("steps",)}
    assert changed == floats - {("mean",)}


def test_frozen_parameters_are_left_alone() -> None:
    model = Net()
    mu.freeze(model.layers)
    optimizer = mu.Optimizer(model, optax.adam(0.1))
    step = mu.jit(lambda: optimizer.update(mu.grad(loss)(model)))
    step()
    np.testing.assert_allclose(model.layers[0], [0.1, -0.1])
    assert not np.array_equal(model.w, Net().w)
    mu.thaw(model.layers)
    step()
    assert not np.allclose(model.layers[0], [0.1, -0.1])
    assert "0.mu.layers[0]" in optimizer.state, "it got moments"
    mu.freeze(model.w)
    before = np.asarray(model.w)
    step()
    np.testing.assert_array_equal(model.w, before)
    moments = optimizer.state["0.mu.w"].value
    mu.thaw(model.w)
    step()
    np.testing.assert_allclose(
        optimizer.state["0.mu.w"].value, 0.9 * moments + 0.1 * np.asarray(mu.grad(loss)(model)[("w",)]), atol=1
    )


@pytest.mark.parametrize("compiled", [False, True])
def test_parameters_may_appear_and_vanish(compiled: bool) -> None:
    model = Net()
    optimizer = mu.Optimizer(model, optax.adam(0.1))

    def step() -> None:
        optimizer.update(mu.grad(lambda m: loss(m) + sum(jnp.sum(p.value) for p in m.layers[2:]))(model))

    run = mu.jit(step) if compiled else step
    run()
    first = np.asarray(optimizer.state["0.mu.w"])
    model.layers.append(mu.Param(jnp.zeros(4)))
    run()
    assert (np.asarray(model.layers[2]) < 0).all()
    assert optimizer.state["0.mu.layers[2]"].shape == (4,)
    assert not np.array_equal(optimizer.state["0.mu.w"], first), "moments of the others go on"
    model.layers.pop()
    run()
    assert "0.mu.layers[2]" not in optimizer.state
    assert int(optimizer.step) == 3


def test_a_changed_shape_is_refused() -> None:
    model = Net()
    optimizer = mu.Optimizer(model, optax.adam(0.1))
    model.layers[0].value = jnp.zeros(1)
    before = mu.state((model, optimizer))
    for run in (lambda g: optimizer.update(g), mu.jit(lambda g: optimizer.update(g))):
        with pytest.raises(errors.OptimizerError, match="another shape than its moment") as caught:
            run(mu.grad(loss)(model))
        text = str(caught.value)
        assert "layers[0]" in text
        assert "expected: float32[2]" in text
        assert "got:      float32[1]" in text
        assert mu.state((model, optimizer)) == before
    tx = optax.adam(0.1)
    optimizer = eval("mu.Optimizer(model, tx)", {"mu": mu, "model": model, "tx": tx})  # the cure
    optimizer.update(mu.grad(loss)(model))


@pytest.mark.parametrize(
    ("bad", "lines"),
    [
        (lambda g: g.filter(mu.PathContains("w")), ["missing:    layers[0]", "missing:    layers[1].scale"]),
        (lambda g: g | mu.State({("extra",): jnp.zeros(1)}), ["unexpected: extra"]),
        (lambda g: g.map(lambda _, x: x[None]), ["w: expected float32[2,2], got float32[1,2,2]"]),
        (lambda g: {"w": jnp.zeros((2, 2))}, ["missing:    layers[0]"]),
        (lambda g: {"w": jnp.zeros((2, 2)), "x": g}, ["unexpected: x.w"]),
    ],
)
def test_gradients_that_do_not_fit_are_refused(bad: Any, lines: list[str]) -> None:
    model = Net()
    optimizer = mu.Optimizer(model, optax.adam(0.1))
    before = mu.state((model, optimizer))
    grads = mu.grad(loss)(model)
    with pytest.raises(errors.OptimizerError, match="do not fit the parameters") as caught:
        optimizer.update(bad(grads))
    for line in lines:
        assert line in str(caught.value)
    assert mu.state((model, optimizer)) == before
    optimizer.update(grads)
    with pytest.raises(errors.ArgumentError, match="takes gradients"):
        optimizer.update()


def test_gradients_of_a_tuple_of_models() -> None:
    models = (Net(), {"b": Net()})
    optimizer = mu.Optimizer(models, optax.sgd(0.1))
    grads = mu.grad(lambda a, b: loss(a) + loss(b["b"]), argnums=(0, 1))(*models)
    optimizer.update(grads)
    check(models[0], by_hand(optax.sgd(0.1), 1))
    check(models[1]["b"], by_hand(optax.sgd(0.1), 1))


@pytest.mark.parametrize("compiled", [False, True])
def test_another_model_is_not_ignored(compiled: bool) -> None:
    mine, other = Net(), Net()
    optimizer = mu.Optimizer(mine, optax.sgd(0.1))
    update = mu.jit(lambda m, g: optimizer.update(m, g)) if compiled else optimizer.update
    grads = mu.grad(loss)(other)
    before = np.asarray(mine.w)
    try:
        update(other, grads)
    except errors.OptimizerError:
        np.testing.assert_array_equal(other.w, before)
    else:
        assert not np.array_equal(other.w, before)
    np.testing.assert_array_equal(mine.w, before)
    update(mu.view(mine, training=False), grads)
    assert not np.array_equal(mine.w, before)


def test_deferred_parameters_are_refused() -> None:
    model = mu.Module()
    model.w = mu.Param(init=lambda: jnp.zeros(2))
    with pytest.raises(errors.DeferredStateError, match="`w` cannot be optimized") as caught:
        mu.Optimizer(model, optax.sgd(0.1))
    assert "Call the model once" in str(caught.value)
    assert model.w.shape == (2,)
    mu.Optimizer(model, optax.sgd(0.1))


def test_tied_parameters_move_once() -> None:
    model = mu.Module()
    model.a = mu.Param(jnp.ones(2))
    model.b = [model.a]
    optimizer = mu.Optimizer(model, optax.sgd(0.5))
    optimizer.update(mu.grad(lambda m: jnp.sum(m.a * m.b[0].value))(model))
    np.testing.assert_array_equal(model.b[0], [0, 0])
    assert [n for n in optimizer.state if "b" in n] == []


def test_parameters_that_are_trees() -> None:
    model = mu.Param({"a": jnp.ones(2), "b": jnp.zeros(())})
    optimizer = mu.Optimizer(model, optax.adam(0.1))
    optimizer.update(mu.grad(lambda m: jnp.sum(m.value["a"]) + m.value["b"])(model))
    assert np.all(np.asarray(model.value["a"]) < 1)
    assert float(model.value["b"]) < 0


@pytest.mark.parametrize("copied", [mu.clone, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_model_and_optimizer_are_copied_together(copied: Any) -> None:
    model = Net()
    optimizer = mu.Optimizer(model, optax.sgd(0.1, momentum=0.9))
    optimizer.update(mu.grad(loss)(model))
    try:
        model2, optimizer2 = copied((model, optimizer))
    except (pickle.PicklingError, AttributeError) as problem:
        assert "local" in str(problem).lower()  # noqa: PT017 - optax's closures do not pickle
        return
    for m, o in ((model, optimizer), (model2, optimizer2)):
        o.update(mu.grad(loss)(m))
    assert mu.state(model) == mu.state(model2)
    assert model2.w is not model.w
    check(model2, by_hand(optax.sgd(0.1, momentum=0.9), 2))


def test_the_optimizer_in_a_scan() -> None:
    model = Net()
    optimizer = mu.Optimizer(model, optax.adam(1e-2))
    mu.jit(lambda: mu.for_loop(lambda _: optimizer.update(mu.grad(loss)(model)), jnp.arange(4)))()
    check(model, by_hand(optax.adam(1e-2), 4))


def test_an_ensemble_is_trained_by_vmap() -> None:
    models = mu.vmap(lambda _: Net())(jnp.arange(3))
    optimizers = mu.vmap(lambda m: mu.Optimizer(m, TX))(models)

    @mu.jit
    def step(models: Any, optimizers: Any) -> None:
        mu.vmap(lambda m, o: o.update(m, mu.grad(loss)(m)))(models, optimizers)

    for _ in range(3):
        step(models, optimizers)
    expected = by_hand(TX, 3)
    for lane in range(3):
        np.testing.assert_allclose(models.w[lane], expected["w"], rtol=1e-5)


def test_a_failing_step_moves_nothing() -> None:
    model = Net()
    optimizer = mu.Optimizer(model, optax.adam(1e-2))
    before = mu.state((model, optimizer))

    def step() -> None:
        optimizer.update(mu.grad(loss)(model))
        raise KeyError

    with pytest.raises(KeyError):
        mu.jit(step)()
    assert mu.state((model, optimizer)) == before
