"""A Kalman filter learns its noise: mean and covariance are states, and the noise variances are parameters.

    make example NAME=kalman

A pendulum is pushed at random, and its position is observed with noise. `mu.for_loop` runs the filter over the observations and
gives the log likelihood, whose gradient goes through the whole run. The program prints the learned variances beside the true
ones, the error of the filter beside that of the best filter, and the distance of its covariance from the solution of the Riccati
equation.

Source: Kalman, A New Approach to Linear Filtering and Prediction Problems, 1960, https://doi.org/10.1115/1.3662552
"""

from __future__ import annotations

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mutatis as mu

COS, SIN = np.cos(0.3), np.sin(0.3)
MOTION = np.array(0.98 * np.array([[COS, SIN], [-SIN, COS]]), np.float32)  # place and speed, one step later
PUSH = np.array([[0, 0], [0, 1]], np.float32)  # what is pushed is the speed
SEEN = np.array([1, 0], np.float32)  # what is seen is the place
PUSHES, NOISE = 0.2, 1.0  # the true variances: of a push, and of the noise in what is seen


class Filter(mu.Module):
    """What is believed about place and speed, and how large the noises are taken to be."""

    def __init__(self, pushes: float, noise: float) -> None:
        self.log_pushes = mu.Param(jnp.log(jnp.float32(pushes)))
        self.log_noise = mu.Param(jnp.log(jnp.float32(noise)))
        self.mean = mu.Hidden(init=lambda: jnp.zeros(2))
        self.covariance = mu.Hidden(init=lambda: 10 * jnp.eye(2))

    def __call__(self, seen: jax.Array) -> jax.Array:
        """One step in time: predict, look, correct. The log likelihood of what was seen."""
        mean = MOTION @ self.mean.value
        covariance = MOTION @ self.covariance.value @ MOTION.T + jnp.exp(self.log_pushes.value) * PUSH
        surprise = seen - SEEN @ mean
        variance = SEEN @ covariance @ SEEN + jnp.exp(self.log_noise.value)
        gain = covariance @ SEEN / variance
        self.mean.value = mean + gain * surprise
        self.covariance.value = covariance - variance * jnp.outer(gain, gain)
        return -0.5 * (surprise**2 / variance + jnp.log(2 * jnp.pi * variance))


def log_likelihood(model: Filter, seen: jax.Array) -> jax.Array:
    """The mean log likelihood of a series, from the start."""
    mu.reset(model, mu.Hidden)
    return mu.for_loop(model, seen).mean()


@mu.jit
def train(model: Filter, optimizer: mu.Optimizer, seen: jax.Array) -> jax.Array:
    """One step of Adam up the log likelihood; gives what that was."""
    value, grads = mu.value_and_grad(lambda model: -log_likelihood(model, seen))(model)
    optimizer.update(grads)
    return -value


@mu.jit
def follow(model: Filter, seen: jax.Array) -> jax.Array:
    """Place and speed as the filter believes them, at each time."""

    def step(seen: jax.Array) -> jax.Array:
        model(seen)
        return model.mean.value

    mu.reset(model, mu.Hidden)
    return mu.for_loop(step, seen)


@functools.partial(jax.jit, static_argnums=1)
def simulate(key: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """Places and speeds, and what is seen of them."""
    pushed, noise = jax.random.split(key)
    changes = PUSHES**0.5 * jax.random.normal(pushed, (length, 2)) @ PUSH

    def move(now: jax.Array, change: jax.Array) -> tuple[jax.Array, jax.Array]:
        now = MOTION @ now + change
        return now, now

    truth = jax.lax.scan(move, jnp.zeros(2), changes)[1]
    return truth, truth @ SEEN + NOISE**0.5 * jax.random.normal(noise, (length,))


def riccati(pushes: float, noise: float) -> np.ndarray:
    """The covariance of the filter in the end: the Riccati equation, iterated until it stands still."""
    covariance = np.eye(2)
    while True:
        predicted = MOTION @ covariance @ MOTION.T + pushes * PUSH
        gain = predicted @ SEEN / (SEEN @ predicted @ SEEN + noise)
        after: np.ndarray = predicted - np.outer(gain, SEEN @ predicted)
        if np.allclose(after, covariance, rtol=1e-10, atol=0):
            return after
        covariance = after


def main() -> None:
    """Learn the variances, then compare the filter with the known solution."""
    parser = argparse.ArgumentParser(description="A Kalman filter learns its noise.")
    parser.add_argument("--length", type=int, default=10000, help="how many times the pendulum is seen")
    parser.add_argument("--steps", type=int, default=200, help="steps of Adam")
    args = parser.parse_args()
    truth, seen = simulate(jax.random.key(0), args.length)
    model = Filter(1.0, 0.1)
    optimizer = mu.Optimizer(model, optax.adam(optax.cosine_decay_schedule(0.2, args.steps)))
    for step in range(args.steps):
        value = float(train(model, optimizer, seen))
        if step % max(1, args.steps // 5) == 0:
            print(f"step {step}: log likelihood {value:.4f} per observation")
    best = float(mu.jit(log_likelihood)(Filter(PUSHES, NOISE), seen))
    print(f"learned: log likelihood {float(mu.jit(log_likelihood)(model, seen)):.4f}; of the true variances {best:.4f}")
    learned = [float(jnp.exp(log.value)) for log in (model.log_pushes, model.log_noise)]
    print(f"variance of a push {learned[0]:.4f}, true {PUSHES}; of the noise {learned[1]:.4f}, true {NOISE}")
    errors = np.asarray(follow(model, seen) - truth)[len(truth) // 20 :]
    found, known = np.mean(errors**2, 0), np.diag(riccati(PUSHES, NOISE))
    print(f"squared error of place {found[0]:.4f}, of the best filter {known[0]:.4f}")
    print(f"squared error of speed {found[1]:.4f}, of the best filter {known[1]:.4f}")
    distance = np.abs(np.asarray(model.covariance) - riccati(*learned)).max()
    print(f"the covariance of the filter is {distance:.1e} from the Riccati solution")


if __name__ == "__main__":
    main()
