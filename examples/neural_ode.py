"""A neural ordinary differential equation learns a spiral: a net gives the velocity, and Runge-Kutta steps integrate it.

    make example NAME=neural_ode

The position is a state of the model, so a solution is `mu.for_loop` over steps, and training differentiates through the loop. The
loop stores every tenth position and recomputes the others for the gradient. Training sees short pieces of the spiral. The program
prints the error of the pieces, and then of the whole spiral; if diffrax is installed, it prints the difference from diffrax's
adaptive solver.

Source: Chen, Rubanova, Bettencourt and Duvenaud, Neural Ordinary Differential Equations, 2018, https://arxiv.org/abs/1806.07366
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mutatis as mu
from mutatis import nn

STEP = 0.025
SPIRAL = np.array([[-0.1, 2.0], [-2.0, -0.1]], np.float32)
START = np.array([[2.0, 0.0]], np.float32)  # a batch of one


def truth(y: jax.Array) -> jax.Array:
    """The speed that the net is to learn."""
    return y**3 @ SPIRAL.T


class Flow(mu.Module):
    """A place, and a net that says how fast it moves."""

    def __init__(self, hidden: int, rngs: mu.Rngs) -> None:
        self.place = mu.Hidden(init=lambda: jnp.zeros(2))
        self.into = nn.Linear(2, hidden, rngs=rngs)
        self.out = nn.Linear(hidden, 2, rngs=rngs)

    def speed(self, y: jax.Array) -> jax.Array:
        """What the net says; it is given cubes, as in the paper."""
        return self.out(jnp.tanh(self.into(y**3)))

    def step(self) -> jax.Array:
        """One step in time; gives the place after it."""
        self.place.value = nn.rk4(self.speed, self.place.value, STEP)
        return self.place.value

    def solve(self, start: jax.Array, steps: int, checkpoint_every: int | None = None) -> jax.Array:
        """The places after each step, of shape (steps, batch, 2)."""
        mu.reset(self, mu.Hidden, batch_shape=len(start))
        self.place.value = start
        return mu.for_loop(self.step, length=steps, checkpoint_every=checkpoint_every)


def loss(model: Flow, start: jax.Array, places: jax.Array) -> jax.Array:
    """How far a solution is from the places, on average."""
    return jnp.abs(model.solve(start, len(places), checkpoint_every=10) - places).mean()


@mu.jit
def train(model: Flow, optimizer: mu.Optimizer, start: jax.Array, places: jax.Array) -> jax.Array:
    """One step of Adam; gives the loss."""
    value, grads = mu.value_and_grad(loss)(model, start, places)
    optimizer.update(grads)
    return value


@functools.partial(jax.jit, static_argnums=0)
def spiral(steps: int) -> jax.Array:
    """The places of the true spiral, with the first: (steps + 1, 2)."""

    def step(y: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        return nn.rk4(truth, y, STEP), y

    return jax.lax.scan(step, jnp.asarray(START), length=steps + 1)[1][:, 0]


def by_diffrax(model: Flow, steps: int) -> tuple[jax.Array, jax.Array]:
    """The same solution by an adaptive solver, which is raw JAX: with the model in its `args`, and in a closure."""
    diffrax = importlib.import_module("diffrax")

    def solve(speed: Callable[[jax.Array, jax.Array, Any], jax.Array], args: Flow | None) -> jax.Array:
        return diffrax.diffeqsolve(
            diffrax.ODETerm(speed),
            diffrax.Tsit5(),
            t0=0.0,
            t1=steps * STEP,
            dt0=STEP,
            y0=jnp.asarray(START),
            args=args,
            saveat=diffrax.SaveAt(ts=STEP * jnp.arange(1, steps + 1)),
            stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-6),
        ).ys

    handed = solve(lambda t, y, model: model.speed(y), model)
    with mu.freeze(model):
        named = solve(lambda t, y, _: model.speed(y), None)
    return handed, named


def main() -> None:
    """Train, then draw the whole spiral."""
    parser = argparse.ArgumentParser(description="A neural ordinary differential equation learns a spiral.")
    parser.add_argument("--updates", type=int, default=2000, help="steps of Adam")
    parser.add_argument("--hidden", type=int, default=100, help="units of the net")
    parser.add_argument("--steps", type=int, default=400, help="steps of the whole spiral")
    parser.add_argument("--piece", type=int, default=20, help="steps of a piece of it")
    args = parser.parse_args()
    data = spiral(args.steps)
    model = Flow(args.hidden, mu.Rngs(0))
    optimizer = mu.Optimizer(model, optax.adam(optax.cosine_decay_schedule(3e-3, args.updates)))
    order = np.random.default_rng(0)
    for update in range(args.updates):
        first = order.integers(0, args.steps - args.piece + 1, 50)
        places = data[first + np.arange(args.piece + 1)[:, None]]
        value = train(model, optimizer, places[0], places[1:])
        if update % max(1, args.updates // 5) == 0:
            print(f"update {update}: pieces are {float(value):.4f} off")
    drawn = mu.jit(Flow.solve, static_argnums=2)(model, START, args.steps)
    print(f"the whole spiral is {float(jnp.abs(drawn[:, 0] - data[1:]).mean()):.4f} off; it is 2 wide at the start")
    if importlib.util.find_spec("diffrax"):
        for name, other in zip(("in `args`", "in a closure"), by_diffrax(model, args.steps), strict=True):
            print(f"diffrax, with the model {name}: at most {float(jnp.abs(other - drawn).max()):.1e} from it")


if __name__ == "__main__":
    main()
