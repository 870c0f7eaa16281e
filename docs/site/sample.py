"""Writes `build/sample/index.html`: a page by `mu.inspect.page`, which `make site-check` opens in a browser."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import optax

import mutatis as mu
from mutatis import nn

FOLDER = Path(__file__).parents[2] / "build" / "sample"


class Net(mu.Module):
    """Two hundred layers, statistics and a random stream."""

    def __init__(self, rngs: mu.Rngs) -> None:
        self.layers = [nn.Linear(16, 16, rngs=rngs) for _ in range(200)]
        self.norm = nn.BatchNorm(16)
        self.dropout = nn.Dropout(0.1, rngs=rngs)

    def __call__(self, x: jnp.ndarray) -> jnp.ndarray:
        """Three of the layers will do."""
        for layer in self.layers[:3]:
            x = nn.relu(layer(x))
        return self.dropout(self.norm(x))


@mu.jit
def step(net: Net, optimizer: mu.Optimizer, x: jnp.ndarray) -> jnp.ndarray:
    """A step of training."""
    loss, grads = mu.value_and_grad(lambda net: jnp.mean(net(x) ** 2))(net)
    optimizer.update(grads)
    return loss


def main() -> None:
    """Compile for two shapes, and write the page."""
    net = Net(mu.Rngs(0))
    optimizer = mu.Optimizer(net, optax.adam(1e-3))
    for size in (8, 4):
        step(net, optimizer, jnp.ones((size, 16)))
    FOLDER.mkdir(parents=True, exist_ok=True)
    mu.inspect.page(net, step, net, optimizer, jnp.ones((8, 16)), path=FOLDER / "index.html")


if __name__ == "__main__":
    main()
