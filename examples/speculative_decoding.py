"""Speculative decoding: a small model guesses tokens, a large one checks them in one call, and a rollback drops the rest.

    make example NAME=speculative_decoding

Both models are greedy here, so the text is token by token that of the large model alone, in fewer calls. Two transactions are
around each round. The first one drops all writes of the small model while it guesses. The second one keeps the KV cache of the
large model only up to the accepted tokens. The program prints the text, whether it is the same, and the number of calls.

Source: Leviathan et al., Fast inference from transformers via speculative decoding, 2023, https://arxiv.org/abs/2211.17192
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import mutatis as mu
from mutatis import nn

VOCABULARY, LENGTH = 64, 96


class Attention(mu.Module):
    """Causal attention over what is in the cache, with several heads."""

    def __init__(self, width: int, heads: int, rngs: mu.Rngs) -> None:
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.out = nn.Linear(width, width, use_bias=False, rngs=rngs)
        self.keys = mu.Cache(jnp.zeros((LENGTH, heads, width // heads)))
        self.values = mu.Cache(jnp.zeros((LENGTH, heads, width // heads)))

    def __call__(self, x: jax.Array, position: jax.Array) -> jax.Array:
        queries, keys, values = jnp.split(self.qkv(x).reshape(len(x), self.heads, -1), 3, axis=-1)
        self.keys.value = jax.lax.dynamic_update_slice(self.keys.value, keys, (position, 0, 0))
        self.values.value = jax.lax.dynamic_update_slice(self.values.value, values, (position, 0, 0))
        scores = jnp.einsum("qhd,khd->hqk", queries, self.keys.value) / np.sqrt(queries.shape[-1])
        seen = jnp.arange(LENGTH)[None] <= position + jnp.arange(len(x))[:, None]
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
        return self.out(jnp.einsum("hqk,khd->qhd", weights, self.values.value).reshape(x.shape))


class Transformer(mu.Module):
    """Logits of the next token after each of some tokens; what came before is in the caches."""

    def __init__(self, width: int, layers: int, rngs: mu.Rngs) -> None:
        self.embedding = mu.Param(jax.random.normal(rngs.params(), (VOCABULARY, width)))
        self.head = mu.Param(jax.random.normal(rngs.params(), (width, VOCABULARY)))
        self.places = mu.Param(0.3 * jax.random.normal(rngs.params(), (LENGTH, width)))
        self.attention = [Attention(width, 4, rngs) for _ in range(layers)]
        self.mlp = [nn.Linear(width, width, rngs=rngs) for _ in range(layers)]
        self.length = mu.Cache(0)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        position = self.length.value
        x = self.embedding.value[tokens] + jax.lax.dynamic_slice_in_dim(self.places.value, position, len(tokens))
        for attention, mlp in zip(self.attention, self.mlp, strict=True):
            x = x + attention(normalize(x), position)
            x = x + jax.nn.gelu(mlp(normalize(x)))
        self.length += len(tokens)
        return normalize(x) @ self.head.value


def normalize(x: jax.Array) -> jax.Array:
    """Each row with mean 0 and variance 1."""
    return (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True) + 1e-6)


@mu.jit
def read(model: Transformer, tokens: jax.Array) -> jax.Array:
    """The most likely next token after each of these."""
    return jnp.argmax(model(tokens), -1)


def speculate(
    large: Transformer, small: Transformer, prompt: list[int], count: int, ahead: int = 4
) -> tuple[list[int], int]:
    """The next tokens, as the large model alone would write them, and how often it was called for them.

    Args:
      large: the model that decides.
      small: the one that guesses.
      prompt: the tokens so far; the last of them has not been read yet when a round begins.
      count: how many tokens to write.
      ahead: how many tokens to guess in a round.
    """
    text, calls = list(prompt), 0
    for model in (large, small):
        read(model, jnp.array(text[:-1]))
    while len(text) < len(prompt) + count:
        with mu.transaction() as guessing:
            guesses: list[int] = []
            for _ in range(ahead):
                guesses.append(int(read(small, jnp.array([*text, *guesses][-1:]))[0]))
            guessing.rollback()
        with mu.transaction(large) as checking:
            wanted = np.asarray(read(large, jnp.array([text[-1], *guesses])))  # one more than the guesses
            right = int(np.argmin([*(wanted[:-1] == guesses), False]))
            new = [*guesses[:right], int(wanted[right])]
            written = mu.state(large, mu.Cache)
            checking.rollback(mu.Cache)
            keep(large, written, jnp.int32(len(new)))
        for token in [text[-1], *new[:-1]]:
            read(small, jnp.array([token]))
        text += new
        calls += 1
    return text[len(prompt) :][:count], calls


@mu.jit
def keep(model: Transformer, written: mu.State, count: jax.Array) -> None:
    """Take over what was written for the first `count` tokens."""
    old, end = mu.state(model, mu.Cache), model.length.value + count

    def merge(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(jnp.arange(LENGTH)[:, None, None] < end, new, old) if new.ndim else end

    mu.update(model, jax.tree.map(merge, written, old))


def decode(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """The next tokens, one call for each."""
    text = list(prompt)
    read(model, jnp.array(text[:-1]))
    for _ in range(count):
        text.append(int(read(model, jnp.array(text[-1:]))[0]))
    return text[len(prompt) :]


def make() -> tuple[Transformer, Transformer]:
    """A model, and one that has learned from it: here, its first layers."""
    large = Transformer(64, 4, mu.Rngs(0))
    for layer in (*large.attention[1:], *large.mlp[1:]):
        weights = mu.state(layer, mu.Param)
        mu.update(layer, weights.map(lambda _, w: 0.3 * w))
    small = mu.clone(large)
    small.attention, small.mlp = small.attention[:1], small.mlp[:1]
    return large, small


def main() -> None:
    """Write the same text in both ways."""
    prompt, count = [1, 2, 3, 5, 8, 13], 64
    large, small = make()
    expected = decode(mu.clone(large), prompt, count)
    text, calls = speculate(large, small, prompt, count)
    print(text)
    print(f"the same text: {text == expected}; calls of the large model: {calls} instead of {count}")


if __name__ == "__main__":
    main()
