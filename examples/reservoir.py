"""An echo state network predicts a chaotic series: only a linear readout of its fixed random net is trained.

    make example NAME=reservoir

The series is that of Mackey and Glass. The activity of the net is a state, so `mu.for_loop` drives the net with the series. One
ridge regression from the activity to the next value trains the readout. Then the net runs freely, with its own predictions as
input, from fifty places of the series that were not used for training. The program prints the error of predictions one step
ahead, and the error after the free run.

Source: Jaeger and Haas, Harnessing Nonlinearity, 2004, https://doi.org/10.1126/science.1091277
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCOO

import mutatis as mu
from mutatis import nn

WASHOUT = 100  # steps after which the net has forgotten how it began


class Reservoir(mu.Module):
    """A sparse random net that leaks, and a readout."""

    def __init__(self, size: int, radius: float = 0.9, leak: float = 0.6, density: float = 0.05, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        matrix = random.normal(size=(size, size)) * (random.random((size, size)) < density)
        matrix *= radius / np.abs(np.linalg.eigvals(matrix)).max()  # so that what it holds fades
        self.recurrent = nn.Sparse(BCOO.fromdense(jnp.asarray(matrix, jnp.float32)))
        self.into = mu.Buffer(jnp.asarray(random.uniform(-1, 1, (2, size)), jnp.float32))
        self.readout = mu.Param(jnp.zeros((size + 2, 1)))
        self.units = mu.Hidden(init=lambda: jnp.zeros(size))
        self.leak = leak

    def features(self, x: jax.Array) -> jax.Array:
        """Take in a batch of numbers, (batch, 1); give what the readout sees: the units, the numbers, and ones."""
        x = jnp.concatenate([x, jnp.ones_like(x)], -1)
        held = self.units.value
        self.units.value = (1 - self.leak) * held + self.leak * jnp.tanh(self.recurrent(held) + x @ self.into.value)
        return jnp.concatenate([self.units.value, x], -1)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Take in a batch of numbers; foretell the next."""
        return self.features(x) @ self.readout.value


@mu.jit
def drive(model: Reservoir, series: jax.Array) -> jax.Array:
    """What the readout sees at each step of a batch of series of shape (steps, batch, 1), from the start."""
    mu.reset(model, mu.Hidden, batch_shape=series.shape[1])
    return mu.for_loop(model.features, series)


def fit(model: Reservoir, series: np.ndarray, ridge: float) -> None:
    """Set the readout, by ridge regression, to foretell the next number of one series."""
    seen = np.asarray(drive(model, series[:-1, None, None]), np.float64)[WASHOUT:, 0]
    readout = np.linalg.solve(seen.T @ seen + ridge * np.eye(seen.shape[1]), seen.T @ series[WASHOUT + 1 :, None])
    model.readout.value = jnp.asarray(readout, jnp.float32)


@mu.jit
def foretell(model: Reservoir, series: jax.Array) -> jax.Array:
    """One step ahead each time, for a batch of series."""
    mu.reset(model, mu.Hidden, batch_shape=series.shape[1])
    return mu.for_loop(model, series)


def run_freely(model: Reservoir, first: jax.Array, steps: int) -> jax.Array:
    """Go on from what the model holds, fed with what it says; gives `first` and what follows, (steps, batch, 1)."""
    return mu.scan(lambda x, _: (model(x), x), first, length=steps)[1]


def mackey_glass(length: int, delay: int = 17, parts: int = 10) -> np.ndarray:
    """The series, by Euler steps of a tenth; one number for each unit of time, about 0."""
    x = np.full((length + WASHOUT) * parts, 1.2)
    for n in range(delay * parts, len(x) - 1):
        past = x[n - delay * parts]
        x[n + 1] = x[n] + (0.2 * past / (1 + past**10) - 0.1 * x[n]) / parts
    return np.asarray(np.tanh(x[WASHOUT * parts :: parts] - 1), np.float32)


def normalized(error: jax.Array, series: np.ndarray) -> np.ndarray:
    """The root of the mean squared error over a batch, as a part of the deviation of the series."""
    return np.asarray(jnp.sqrt(jnp.mean(error**2, (-2, -1))) / np.std(series))


def main() -> None:
    """Fit the readout, foretell one step, then run freely."""
    parser = argparse.ArgumentParser(description="An echo state network foretells the series of Mackey and Glass.")
    parser.add_argument("--units", type=int, default=400, help="units of the net")
    parser.add_argument("--length", type=int, default=4000, help="how much of the series the readout is fitted to")
    parser.add_argument("--runs", type=int, default=50, help="how many pieces of the series are foretold")
    parser.add_argument("--ahead", type=int, default=84, help="steps to run freely")
    parser.add_argument("--ridge", type=float, default=1e-7, help="the penalty of the regression")
    args = parser.parse_args()
    each = 2 * WASHOUT + args.ahead
    series = mackey_glass(args.length + args.runs * each)
    model = Reservoir(args.units)
    fit(model, series[: args.length], args.ridge)
    pieces = jnp.asarray(series[args.length :].reshape(args.runs, each).T[..., None])
    known, later = pieces[: 2 * WASHOUT], pieces[2 * WASHOUT :]
    told = foretell(model, known)
    error = float(np.mean(normalized((told[:-1] - known[1:])[WASHOUT:], series)))
    print(f"one step ahead: error {error:.1e} of the deviation of the series")
    free = mu.jit(run_freely, static_argnums=2)(model, told[-1], args.ahead)
    errors = normalized(free - later, series)
    print(f"running freely: {errors[-1]:.1e} after {args.ahead} steps (to say the mean each time: 1)")


if __name__ == "__main__":
    main()
