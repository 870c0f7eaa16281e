"""A backtracking line search: try a step of a whole model, and roll it back if it is too long.

    make example NAME=line_search

The direction is the negative gradient. A step is kept when it lowers the loss by a fraction of the decrease that the slope
predicts (Armijo, 1966). Otherwise a transaction rolls it back, and a step of half the length is tried. The program prints the
loss, the lengths of steps and the number of evaluations.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

import mutatis as mu
from mutatis import nn


class Net(mu.Module):
    """Two layers with a tanh between them."""

    def __init__(self, rngs: mu.Rngs) -> None:
        self.layers = [nn.Linear(2, 16, rngs=rngs), nn.Linear(16, 1, rngs=rngs)]
        self.evaluations = mu.Variable(0)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layers[1](jnp.tanh(self.layers[0](x)))


@mu.jit
def loss_of(net: Net, x: jax.Array, y: jax.Array) -> jax.Array:
    """The mean squared error; counts how often it was asked for."""
    net.evaluations += 1
    return jnp.mean((net(x) - y) ** 2)


@mu.jit
def move(net: Net, direction: mu.State, length: jax.Array) -> None:
    """Move the parameters along a direction."""
    mu.update(net, jax.tree.map(lambda p, d: p - length * d, mu.state(net, mu.Param), direction))


def search(net: Net, x: jax.Array, y: jax.Array, *, length: float = 4.0, tries: int = 20) -> tuple[float, float]:
    """One step: the loss before it, and the length that was taken, 0 if none was short enough."""
    loss, direction = mu.value_and_grad(loss_of)(net, x, y)
    slope = sum(jnp.vdot(g, g) for g in jax.tree.leaves(direction))
    for _ in range(tries):
        with mu.transaction() as attempt:
            move(net, direction, jnp.float32(length))
            if loss_of(net, x, y) <= loss - 1e-4 * length * slope:
                return float(loss), length
            attempt.rollback(mu.Param)  # the count of evaluations goes on
        length /= 2
    return float(loss), 0.0


def main() -> None:
    """Fit a saddle."""
    x = jax.random.uniform(jax.random.key(0), (256, 2), minval=-1, maxval=1)
    y = x[:, :1] * x[:, 1:]
    net = Net(mu.Rngs(1))
    for step in range(200):
        loss, length = search(net, x, y)
        if step % 40 == 0:
            print(f"step {step:3}  loss {loss:.5f}  length {length:g}")
    print(f"loss {float(loss_of(net, x, y)):.5f} after {int(net.evaluations)} evaluations")


if __name__ == "__main__":
    main()
