"""Undo a training step whose loss is not finite: parameters, statistics, moments and streams are as before the step.

    make example NAME=undo_step

One batch of the data is broken. When its loss is known, the step has already written all its states. A transaction around the
step rolls them back. The program prints the number of undone steps, and whether the result is that of training without the
broken batch.
"""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import optax

import mutatis as mu
from mutatis import nn


class Net(mu.Module):
    """A hidden layer with batch norm and dropout."""

    def __init__(self, rngs: mu.Rngs) -> None:
        self.hidden = nn.Linear(4, 32, rngs=rngs)
        self.norm = nn.BatchNorm(32)
        self.dropout = nn.Dropout(0.1, rngs=rngs)
        self.out = nn.Linear(32, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(self.dropout(jax.nn.relu(self.norm(self.hidden(x)))))


@mu.jit
def train_step(net: Net, opt: mu.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
    """One step of gradient descent; the loss before it."""
    loss, grads = mu.value_and_grad(lambda net: jnp.mean((net(x) - y) ** 2))(net)
    opt.update(grads)
    return loss


def train(net: Net, opt: mu.Optimizer, batches: Iterable[tuple[jax.Array, jax.Array]]) -> int:
    """Train on all batches; the number of steps that were undone."""
    undone = 0
    for x, y in batches:
        with mu.transaction() as step:
            loss = train_step(net, opt, x, y)
            if not jnp.isfinite(loss):
                step.rollback()
                undone += 1
    return undone


def make_batches(count: int) -> list[tuple[jax.Array, jax.Array]]:
    """Batches of a smooth function of four numbers."""
    xs = jax.random.normal(jax.random.key(1), (count, 64, 4))
    return [(x, jnp.sin(x.sum(1, keepdims=True))) for x in xs]


def make() -> tuple[Net, mu.Optimizer]:
    """A net and its optimizer, always the same."""
    net = Net(mu.Rngs(0))
    return net, mu.Optimizer(net, optax.adam(1e-2))


def main() -> None:
    """Train with a broken batch in the middle, and without it."""
    batches = make_batches(200)
    broken = (batches[0][0].at[3, 1].set(jnp.nan), batches[0][1])
    net, opt = make()
    undone = train(net, opt, [*batches[:100], broken, *batches[100:]])
    clean, clean_opt = make()
    train(clean, clean_opt, batches)
    same = mu.state((net, opt)) == mu.state((clean, clean_opt))
    print(f"steps undone: {undone}; as if the broken batch had not been there: {same}")


if __name__ == "__main__":
    main()
