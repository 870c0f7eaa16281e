"""Tell nine speakers apart by how they say two vowels: a GRU and an LSTM on JapaneseVowels.

    make example NAME=vowels
    python examples/vowels.py --steps 150     (needs `pip install aeon`, for its data only)

The sequences have 12 channels and 7 to 29 steps, and are padded to one length. With `seq_lengths` the net reads each sequence
only to its end, forward and backward. The mean of the outputs decides the speaker. The program prints the loss and the test
accuracy of both nets.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mutatis as mu
from mutatis import nn


class Speakers(mu.Module):
    """A recurrent net in both directions, dropout, and a linear map to the logits of nine speakers."""

    def __init__(self, cell: type[nn.GRUCell] | type[nn.LSTMCell], size: int, *, rngs: mu.Rngs) -> None:
        forward, backward = (nn.RNN(cell(12, size, rngs=rngs)) for _ in range(2))
        self.rnn = nn.Bidirectional(forward, backward)
        self.norm = nn.LayerNorm(2 * size, rngs=rngs)
        self.dropout = nn.Dropout(0.4, rngs=rngs)
        self.head = nn.Linear(2 * size, 9, rngs=rngs)

    def __call__(self, x: jax.Array, lengths: jax.Array) -> jax.Array:
        """Logits of shape (batch, 9) for sequences of shape (batch, time, 12)."""
        y = self.rnn(x, seq_lengths=lengths)
        inside = (jnp.arange(x.shape[1]) < lengths[:, None])[..., None]
        mean = jnp.sum(y, 1, where=inside) / lengths[:, None].astype(y.dtype)
        return self.head(self.dropout(self.norm(mean)))


class Data(NamedTuple):
    """Padded sequences of shape (n, 29, 12), their lengths, and their speakers from 0 to 8."""

    x: jax.Array
    lengths: jax.Array
    speakers: jax.Array


def read(path: Path) -> Data:
    """A ``.ts`` file: a line for each sequence, its channels and its class divided by colons."""
    lines = path.read_text(encoding="utf-8").partition("@data")[2].split()
    parts = [line.split(":") for line in lines]
    sequences = [np.array([channel.split(",") for channel in channels], np.float32).T for *channels, _ in parts]
    padded = np.stack([np.pad(sequence, [(0, 29 - len(sequence)), (0, 0)]) for sequence in sequences])
    speakers = np.array([int(speaker) - 1 for *_, speaker in parts])
    return Data(jnp.asarray(padded), jnp.array([len(s) for s in sequences]), jnp.asarray(speakers))


def data_folder() -> Path:
    """Where the package `aeon` has the data; it is not imported."""
    spec = importlib.util.find_spec("aeon")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("The data come with the package aeon: pip install --no-deps aeon")
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "JapaneseVowels"


def train(model: Speakers, data: Data, steps: int) -> jax.Array:
    """Train on the whole of the data in each step; gives the losses, of shape (steps,)."""
    optimizer = mu.Optimizer(model, optax.adamw(optax.cosine_decay_schedule(1e-2, steps), weight_decay=1e-3))

    def loss_fn(model: Speakers) -> jax.Array:
        logits = model(data.x, data.lengths)
        return optax.softmax_cross_entropy_with_integer_labels(logits, data.speakers).mean()

    @mu.jit
    def step() -> jax.Array:
        loss, grads = mu.value_and_grad(loss_fn)(model)
        optimizer.update(grads)
        return loss

    return jnp.stack([step() for _ in range(steps)])


@mu.jit
def accuracy(model: Speakers, data: Data) -> jax.Array:
    """The share of sequences whose speaker is told."""
    return jnp.mean(model(data.x, data.lengths).argmax(-1) == data.speakers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--size", type=int, default=32, help="of what each direction remembers")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train_data, test_data = (read(data_folder() / f"JapaneseVowels_{part}.ts") for part in ("TRAIN", "TEST"))
    for cell in (nn.GRUCell, nn.OptimizedLSTMCell):
        model = Speakers(cell, args.size, rngs=mu.Rngs(args.seed))
        losses = train(model, train_data, args.steps)
        right = accuracy(mu.view(model, training=False), test_data)
        print(
            f"{cell.__name__}: loss {losses[0]:.3f} -> {losses[-1]:.3f}, {right:.1%} of {len(test_data.x)} test sequences"
        )


if __name__ == "__main__":
    main()
