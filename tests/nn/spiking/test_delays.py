"""`Delay` beside a list of what was pushed: a number, one for each, between steps; transforms, gradients, bad input."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import nn
from mutatis.errors import ArgumentError

pytestmark = pytest.mark.once
X = np.random.default_rng(0).standard_normal((12, 3)).astype(np.float32)


def at_by_hand(now: int, steps: float) -> np.ndarray:
    def one(back: int) -> np.ndarray:
        return X[now - back] if now >= back else np.zeros(3, np.float32)

    below = int(np.floor(steps))
    share = steps - below
    return one(below) * (1 - share) + (one(below + 1) * share if share else 0)


@pytest.mark.parametrize("steps", [0, 1, 4, 0.5, 2.75, 4.0])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_number(steps: float, compiled: bool) -> None:
    delay = nn.Delay(3, max_steps=4)

    def step(x: jax.Array, steps: float) -> jax.Array:
        delay.push(x)
        return delay.at(steps)

    run = mu.jit(lambda xs, steps: mu.for_loop(lambda x: step(x, steps), xs))
    out = run(X, steps) if compiled else jnp.stack([step(x, steps) for x in X])
    np.testing.assert_allclose(out, [at_by_hand(n, steps) for n in range(12)], rtol=1e-6, atol=1e-6)


def test_one_for_each() -> None:
    delay, steps = nn.Delay(3, max_steps=4), jnp.array([0, 2, 4])
    for number, x in enumerate(X):
        delay.push(x)
        wanted = [at_by_hand(number, int(n))[i] for i, n in enumerate(steps)]
        np.testing.assert_array_equal(delay.at(steps), np.array(wanted, np.float32))
        np.testing.assert_allclose(delay.at(steps.astype(jnp.float32)), np.array(wanted, np.float32))


def test_transforms_gradients_and_checkpoints(tmp_path: Path) -> None:
    several = mu.vmap(lambda _: nn.Delay(3, max_steps=2))(jnp.arange(2))
    mu.vmap(lambda delay, x: delay.push(x))(several, jnp.asarray(X[:2]))
    np.testing.assert_array_equal(mu.vmap(lambda delay: delay.at(0))(several), X[:2])

    def loss(x: jax.Array, steps: jax.Array) -> jax.Array:
        delay = nn.Delay(3, max_steps=4)
        return jnp.sum(mu.for_loop(lambda x: (delay.push(x), delay.at(steps))[1], x)[-1] ** 2)

    by_x, by_steps = jax.grad(loss, (0, 1))(jnp.asarray(X), jnp.float32(1.25))
    mixed = 0.75 * X[-2] + 0.25 * X[-3]
    np.testing.assert_allclose(by_x[-2], 2 * mixed * 0.75, rtol=1e-5)
    np.testing.assert_allclose(by_x[-3], 2 * mixed * 0.25, rtol=1e-5)
    np.testing.assert_allclose(by_steps, np.sum(2 * mixed * (X[-3] - X[-2])), rtol=1e-4)
    delay, other = nn.Delay(3, max_steps=4), nn.Delay(3, max_steps=4)
    for x in X[:7]:
        delay.push(x)
    mu.checkpoint.save(tmp_path / "delay", delay)
    mu.checkpoint.restore(tmp_path / "delay", other)
    np.testing.assert_array_equal(other.at(3), X[3])
    mu.reset(other)
    assert not other.at(3).any()


def test_a_batch() -> None:
    xs = np.random.default_rng(1).standard_normal((8, 5, 2)).astype(np.float32)
    batch, several = nn.Delay(2, max_steps=3), [nn.Delay(2, max_steps=3) for _ in range(5)]
    mu.reset(batch, mu.Hidden, batch_shape=5)
    assert batch.buffer.shape == (5, 4, 2)
    each = jnp.asarray(np.random.default_rng(2).uniform(0, 3, (5, 2)), jnp.float32)
    for x in xs:
        batch.push(x)
        for delay, part in zip(several, x, strict=True):
            delay.push(part)
        for steps in (0, 3, 1.5, jnp.array([3, 1]), jnp.array([0.25, 3.0])):
            np.testing.assert_allclose(batch.at(steps), jnp.stack([delay.at(steps) for delay in several]), rtol=1e-6)
        one = [delay.at(steps) for delay, steps in zip(several, each, strict=True)]
        np.testing.assert_allclose(batch.at(each), jnp.stack(one), rtol=1e-6)
    lanes = mu.vmap(lambda delay, steps: delay.at(steps))(batch, each)
    np.testing.assert_allclose(lanes, jnp.stack(one), rtol=1e-6)
    slope = mu.grad(lambda steps: batch.at(steps).sum())(jnp.float32(1.5))
    np.testing.assert_allclose(slope, (xs[-3] - xs[-2]).sum(), rtol=1e-5)
    with pytest.raises(ArgumentError, match=r"(?s)expected: shape \(5, 2\).*a value for each element"):
        batch.push(xs[0, :4, 0])
    with pytest.raises(ArgumentError, match=r"mu\.reset\(model, mu\.Hidden, batch_shape=\(5,\)\)"):
        several[0].push(xs[0])


def test_out_of_range_in_compiled_code() -> None:
    delay = nn.Delay(3, max_steps=4)
    for x in X[:7]:
        delay.push(x)
    at = mu.jit(lambda steps: delay.at(steps))
    for steps, nearest in ((9, 4), (-2, 0), (4.75, 4), (-0.5, 0), (jnp.array([7, -7, 2]), jnp.array([4, 0, 2]))):
        np.testing.assert_array_equal(at(steps), delay.at(nearest))


@pytest.mark.parametrize("steps", [0.0, 1.0, 2.5, 4.0])
def test_the_slope_by_the_delay(steps: float) -> None:
    delay = nn.Delay(3, max_steps=4)
    for x in X[:7]:
        delay.push(x)
    first = min(int(steps), 3)
    wanted = X[6 - first - 1] - X[6 - first]  # at the last step, the slope of the last interval
    np.testing.assert_allclose(jax.jacobian(delay.at)(steps), wanted, rtol=1e-5)
    np.testing.assert_allclose(jax.jacobian(delay.at)(jnp.full(3, steps)), np.diag(wanted), rtol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "result"), [(jnp.int32, jnp.float32), (jnp.bool_, jnp.float32), (jnp.bfloat16, None)]
)
def test_values_of_other_dtypes(dtype: Any, result: Any) -> None:
    delay = nn.Delay(2, max_steps=3, dtype=dtype)
    delay.push(jnp.array([0, 1]))
    delay.push(jnp.array([1, 1]))
    assert delay.at(1).dtype == dtype and delay.at(0.5).dtype == (result or dtype)
    np.testing.assert_array_equal(delay.at(0.5), np.array([0.5, 1.0]))
    np.testing.assert_array_equal(delay.at(jnp.uint8(1)), np.array([0, 1]))


def test_one_write_for_a_step() -> None:
    delay = nn.Delay(1000, max_steps=500)
    step = mu.jit(lambda delay, x: (delay.push(x), delay.at(17))[1])
    text = step.lower(delay, jnp.ones(1000)).compile().as_text()
    mu.reset(delay, batch_shape=4)
    batch = step.lower(delay, jnp.ones((4, 1000))).compile().as_text()
    assert batch.count("dynamic-update-slice(") + batch.count("scatter(") <= 2
    assert not re.search(r"f32\[4,50\d,1000\]\S* (concatenate|copy)\(", batch)
    assert text.count("dynamic-update-slice(") + text.count("scatter(") <= 2
    assert not re.search(r"f32\[50\d,1000\]\S* (concatenate|copy)\(", text)


def test_bad_input() -> None:
    delay = nn.Delay(3, max_steps=4)
    for use, text in [
        (lambda: nn.Delay(3, max_steps=-1), "nothing to hold"),
        (lambda: nn.Delay(3, max_steps=2.5), "nothing to hold"),  # type: ignore[arg-type]
        (lambda: delay.push(jnp.ones(4)), "another shape"),
        (lambda: delay.at(5), r"(?s)does not reach so far back.*max_steps=5"),
        (lambda: delay.at(4.5), "does not reach so far back"),
        (lambda: delay.at(-1), r"(?s)does not know what comes.*delay.at\(0\)"),
        (lambda: delay.at(float("nan")), "does not know what comes"),
        (lambda: delay.at(True), "no number of steps"),
        (lambda: delay.at(jnp.array([1, 2])), "another shape than its values"),
    ]:
        with pytest.raises(ArgumentError, match=text):
            use()


def test_elements_of_a_batch_that_are_held_back() -> None:
    delay = nn.Delay(1, max_steps=3)
    mu.reset(delay, mu.Hidden, batch_shape=2)
    goes_on, alone = jnp.array([False, True]), [nn.Delay(1, max_steps=3) for _ in range(2)]
    for step in range(1, 8):
        before = mu.state(delay)
        delay.push(jnp.full((2, 1), float(step)))
        for number, each in enumerate(alone):
            if step <= 2 or bool(goes_on[number]):
                each.push(jnp.full(1, float(step)))
        if step > 2:
            held = jax.tree.map(
                lambda new, old: jnp.where(goes_on.reshape(2, *(1,) * (new.ndim - 1)), new, old),
                mu.state(delay),
                before,
            )
            mu.update(delay, held)
        for back in (0, 1, 2, 1.5, jnp.array([2])):
            np.testing.assert_allclose(delay.at(back), jnp.stack([each.at(back) for each in alone]))


def test_sizes_of_numpy() -> None:
    assert nn.Delay(np.int64(2), np.int64(3)).buffer.shape == (4, 2)
    with pytest.raises(ArgumentError, match="nothing to hold"):
        nn.Delay(2, 3.0)  # type: ignore[arg-type]
