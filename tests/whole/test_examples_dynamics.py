"""The examples that move in time agree with twins in plain JAX and NumPy; each as a whole is among the slow tests."""

from __future__ import annotations

import importlib.util
import re
import sys
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mutatis as mu
from tests.whole.test_examples import load
from tests.whole.test_examples_training import run

pytestmark = pytest.mark.once  # nothing here depends on the version of JAX


def close(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    ours, theirs = (x.to_pure_dict() if isinstance(x, mu.State) else x for x in (ours, theirs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), ours, theirs)


def descend(loss: Any, params: Any, rate: float, steps: int) -> tuple[list[float], Any]:
    """Losses and parameters of steps of Adam in plain JAX; optax promotes."""
    adam, graded = optax.adam(rate), jax.jit(jax.value_and_grad(loss))
    moments, losses = adam.init(params), []
    for _ in range(steps):
        value, grads = graded(params)
        changes, moments = adam.update(grads, moments, params)
        params = optax.apply_updates(params, changes)
        losses.append(float(value))
    return losses, params


def shown(example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any, *words: str) -> str:
    """What an example prints."""
    monkeypatch.setattr(sys, "argv", [example.__name__, *words])
    with jax.numpy_dtype_promotion("standard"):
        example.main()
    return str(capsys.readouterr().out)


def figures(pattern: str, text: str) -> list[float]:
    (found,) = re.findall(pattern, text)
    return [float(part) for part in ([found] if isinstance(found, str) else found)]


# -- a Kalman filter ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kalman() -> ModuleType:
    return load("kalman")


def filtered(kalman: ModuleType, params: Any, seen: Any) -> Any:
    """Means, covariances and the mean log likelihood, with mean and covariance handed from step to step."""
    push = np.array([[0, 0], [0, 1]], np.float32)
    look = np.array([[1, 0]], np.float32)

    def step(carry: Any, y: Any) -> Any:
        mean, cov = carry
        mean, cov = kalman.MOTION @ mean, kalman.MOTION @ cov @ kalman.MOTION.T
        cov = cov + jnp.exp(params["log_pushes"]) * push
        spread = look @ cov @ look.T + jnp.exp(params["log_noise"])[None, None]
        gain = cov @ look.T @ jnp.linalg.inv(spread)
        told = jax.scipy.stats.norm.logpdf(y, (look @ mean)[0], jnp.sqrt(spread[0, 0]))
        mean, cov = mean + gain @ (y[None] - look @ mean), (jnp.eye(2) - gain @ look) @ cov
        return (mean, cov), (mean, cov, told)

    means, covs, told = jax.lax.scan(step, (jnp.zeros(2), 10 * jnp.eye(2)), seen)[1]
    return means, covs, told.mean()


def test_a_kalman_filter_beside_one_by_hand(kalman: ModuleType) -> None:
    truth, seen = kalman.simulate(jax.random.key(1), 40)
    assert truth.shape == (40, 2) and seen.shape == (40,)
    model = kalman.Filter(0.5, 0.5)
    params = mu.state(model, mu.Param).to_pure_dict()
    means, covs, told = filtered(kalman, params, seen)
    close(kalman.follow(model, seen), means)
    close(model.covariance.value, covs[-1])
    value, grads = mu.value_and_grad(kalman.log_likelihood)(model, seen)
    close(value, told)
    close(grads, jax.grad(lambda params: filtered(kalman, params, seen)[2])(params), 1e-4)
    with jax.numpy_dtype_promotion("standard"):
        optimizer = mu.Optimizer(model, optax.adam(0.1))
        values = [-float(kalman.train(model, optimizer, seen)) for _ in range(4)]
        losses, params = descend(lambda params: -filtered(kalman, params, seen)[2], params, 0.1, 4)
    close(values, losses)
    close(mu.state(model, mu.Param), params)


def test_the_covariance_goes_to_the_riccati_solution(kalman: ModuleType) -> None:
    model = kalman.Filter(0.3, 2.0)
    kalman.follow(model, jnp.zeros(60))
    known = kalman.riccati(0.3, 2.0)
    close(model.covariance.value, known)
    linalg = pytest.importorskip("scipy.linalg")
    look = np.array([[1.0], [0.0]])
    motion = np.asarray(kalman.MOTION, np.float64)
    predicted = linalg.solve_discrete_are(motion.T, look, 0.3 * np.diag([0.0, 1.0]), np.array([[2.0]]))
    close(known, predicted - np.outer(predicted @ look, look.T @ predicted) / (predicted[0, 0] + 2.0), 1e-6)


def test_kalman_in_small(kalman: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    text = shown(kalman, monkeypatch, capsys, "--length=200", "--steps=3")
    assert text.count("per observation") == 3
    assert figures(r"covariance of the filter is (\S+) from", text)[0] < 1e-5


@pytest.mark.slow
def test_kalman_as_a_whole() -> None:
    text = run("kalman")
    pushes, true_pushes, noise, true_noise = figures(
        r"push ([\d.]+), true ([\d.]+); of the noise ([\d.]+), true ([\d.]+)", text
    )
    assert pushes == pytest.approx(true_pushes, rel=0.1) and noise == pytest.approx(true_noise, rel=0.05)
    learned, best = figures(r"learned: log likelihood (\S+); of the true variances (\S+)", text)
    assert best <= learned < best + 0.01
    for name in ("place", "speed"):
        found, known = figures(rf"squared error of {name} ([\d.]+), of the best filter ([\d.]+)", text)
        assert found == pytest.approx(known, rel=0.05)
    assert figures(r"covariance of the filter is (\S+) from", text)[0] < 1e-5


# -- a neural ordinary differential equation ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def neural_ode() -> ModuleType:
    return load("neural_ode")


def flowed(params: Any, start: Any, steps: int, step: float) -> Any:
    """Places, handed from step to step."""

    def speed(y: Any) -> Any:
        hidden = jnp.tanh(jnp.dot(y**3, params["into"]["kernel"]) + params["into"]["bias"][None])
        return jnp.dot(hidden, params["out"]["kernel"]) + params["out"]["bias"][None]

    def move(y: Any, _: Any) -> Any:
        a = speed(y)
        b = speed(y + step / 2 * a)
        c = speed(y + step / 2 * b)
        d = speed(y + step * c)
        y = y + step / 6 * (a + 2 * b + 2 * c + d)
        return y, y

    return jax.lax.scan(move, start, length=steps)[1]


def test_a_neural_ode_beside_one_by_hand(neural_ode: ModuleType) -> None:
    model = neural_ode.Flow(8, mu.Rngs(0))
    params = mu.state(model, mu.Param).to_pure_dict()
    data = neural_ode.spiral(30)
    places = data[np.array([0, 3, 7]) + np.arange(21)[:, None]]
    start, places = places[0], places[1:]

    def loss(params: Any) -> Any:
        return jnp.abs(flowed(params, start, 20, neural_ode.STEP) - places).mean()

    close(mu.jit(model.solve, static_argnums=1)(start, 20), flowed(params, start, 20, neural_ode.STEP))
    value, grads = mu.value_and_grad(neural_ode.loss)(model, start, places)
    close(value, loss(params))
    close(grads, jax.grad(loss)(params))
    with jax.numpy_dtype_promotion("standard"):
        optimizer = mu.Optimizer(model, optax.adam(1e-3))
        values = [float(neural_ode.train(model, optimizer, start, places)) for _ in range(3)]
        losses, params = descend(loss, params, 1e-3, 3)
    close(values, losses)
    close(mu.state(model, mu.Param), params)


def test_the_spiral_is_that_of_its_equation(neural_ode: ModuleType) -> None:
    integrate = pytest.importorskip("scipy.integrate")
    matrix = np.array([[-0.1, 2.0], [-2.0, -0.1]])
    times = neural_ode.STEP * np.arange(41)
    solved = integrate.solve_ivp(
        lambda t, y: matrix @ y**3, (0, 1), [2.0, 0.0], t_eval=times, method="DOP853", rtol=1e-9
    )
    close(neural_ode.spiral(40), solved.y.T, 2e-3)


@pytest.mark.skipif(importlib.util.find_spec("diffrax") is None, reason="beside diffrax")
def test_diffrax_goes_the_same_way(neural_ode: ModuleType) -> None:
    model = neural_ode.Flow(8, mu.Rngs(0))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        handed, named = neural_ode.by_diffrax(model, 20)
    close(handed, named, 1e-6)
    close(model.solve(jnp.asarray(neural_ode.START), 20), handed, 1e-4)


def test_neural_ode_in_small(neural_ode: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    text = shown(neural_ode, monkeypatch, capsys, "--updates=4", "--hidden=8", "--steps=40", "--piece=10")
    assert text.count("pieces are") == 4 and "diffrax" not in text
    assert figures(r"whole spiral is (\S+) off", text)[0] < 2


@pytest.mark.slow
def test_neural_ode_as_a_whole() -> None:
    text = run("neural_ode")
    assert figures(r"whole spiral is (\S+) off", text)[0] < 0.15
    far = [float(number) for number in re.findall(r"at most (\S+) from it", text)]
    assert len(far) == 2 * (importlib.util.find_spec("diffrax") is not None) and all(number < 2e-2 for number in far)


# -- an echo state network ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reservoir() -> ModuleType:
    return load("reservoir")


def test_a_reservoir_beside_one_by_hand(reservoir: ModuleType) -> None:
    model = reservoir.Reservoir(30, density=0.2)
    matrix = np.zeros((30, 30), np.float32)
    matrix[tuple(np.asarray(model.recurrent.indices).T)] = np.asarray(model.recurrent.weight)
    assert np.abs(np.linalg.eigvals(matrix)).max() == pytest.approx(0.9, rel=1e-4)
    assert 0.1 < np.mean(matrix != 0) < 0.3
    into = np.asarray(model.into.value)
    series = reservoir.mackey_glass(300)

    def step(held: np.ndarray, x: float) -> tuple[np.ndarray, np.ndarray]:
        held = 0.4 * held + 0.6 * np.tanh(held @ matrix + np.array([x, 1]) @ into)
        return held, np.concatenate([held, [x, 1]])

    held, seen = np.zeros(30), []
    for x in series[:-1]:
        held, features = step(held, x)
        seen.append(features)
    close(reservoir.drive(model, series[:-1, None, None])[:, 0], np.stack(seen))

    reservoir.fit(model, series, 1e-2)
    rows, following = np.stack(seen)[reservoir.WASHOUT :], series[reservoir.WASHOUT + 1 :]
    padded = np.concatenate([rows, 0.1 * np.eye(32)]), np.concatenate([following, np.zeros(32)])
    readout = np.linalg.lstsq(*padded)[0]  # a ridge of 0.01 is as many rows more
    close(model.readout.value[:, 0], readout, 1e-3)

    told = reservoir.foretell(model, series[:-1, None, None])
    close(told[:, 0, 0], np.stack(seen) @ readout, 1e-3)
    free, x = [], (seen[-1] @ readout)
    for _ in range(10):
        free.append(x)
        held, features = step(held, x)
        x = features @ readout
    close(reservoir.run_freely(model, told[-1], 10)[:, 0, 0], np.array(free), 2e-3)
    close(model.units.value[0], held, 2e-3)


def test_a_batch_of_series_is_each_alone(reservoir: ModuleType) -> None:
    model = reservoir.Reservoir(20, density=0.2)
    model.readout.value = jnp.ones_like(model.readout.value)
    batch = reservoir.mackey_glass(60).reshape(3, 20).T[..., None]
    each = [reservoir.foretell(model, batch[:, [n]]) for n in range(3)]
    close(reservoir.foretell(model, batch), jnp.concatenate(each, 1))


def test_the_series_is_that_of_its_equation(reservoir: ModuleType) -> None:
    series = reservoir.mackey_glass(400)
    assert series.shape == (400,) and series.dtype == np.float32
    fine = reservoir.mackey_glass(60, parts=80)
    assert np.abs(series[:60] - fine).max() < 0.05
    assert reservoir.normalized(jnp.asarray(series - series.mean())[None, :, None], series) == pytest.approx(
        1, rel=1e-4
    )


def test_reservoir_in_small(reservoir: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    words = "--units=50", "--length=600", "--runs=4", "--ahead=5"
    text = shown(reservoir, monkeypatch, capsys, *words)
    assert figures(r"one step ahead: error (\S+)", text)[0] < 0.1
    assert figures(r"running freely: (\S+) after 5", text)[0] < 0.5


@pytest.mark.slow
def test_reservoir_as_a_whole() -> None:
    text = run("reservoir")
    assert figures(r"one step ahead: error (\S+)", text)[0] < 2e-3
    assert figures(r"running freely: (\S+) after 84", text)[0] < 0.05
