"""How fast `smollm.py` reads and writes, compared with the same model by hand in JAX.

    python examples/smollm.py --bench [--bfloat16] [--tokens 64] [--peers]

The model by hand has its arrays in dictionaries, and its caches are arguments and results. `--peers` also compares with Flax NNX,
and with `transformers` on PyTorch, where they are installed. The program prints the tokens per second of each, the ratio, and
whether the texts are the same.
"""

from __future__ import annotations

import argparse
import collections
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import smollm
import smollm_peers

import mutatis as mu

Weights = dict[str, Any]
Caches = list[tuple[jax.Array, jax.Array]]


def by_hand(model: smollm.Llama, max_length: int) -> tuple[Weights, Caches, Callable[..., Any], Callable[..., Any]]:
    """Weights, empty caches, and the two functions: `read` a prompt, and `step` by a token. The caches are donated."""
    config, dtype = model.config, model.dtype
    depth = config.width // config.heads
    weights: Weights = {".".join(map(str, path)): cell.value for path, cell in mu.variables(model, mu.Param).items()}
    shape = (1, max_length, config.kv_heads, depth)
    caches = [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.layers)]
    wavelengths = config.theta ** (-jnp.arange(0, depth, 2, dtype=jnp.float32) / depth)

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = (
            wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + config.epsilon) * scale.astype(jnp.float32)
        )
        return wide.astype(dtype)

    def turn(x: jax.Array, positions: jax.Array) -> jax.Array:
        angles = positions[None, :, None, None] * wavelengths
        sin, cos = jnp.sin(angles), jnp.cos(angles)
        a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(dtype)

    def hidden(w: Weights, caches: Caches, tokens: jax.Array, start: jax.Array) -> tuple[jax.Array, Caches]:
        x = w["embed.embedding"][tokens]
        positions = start + jnp.arange(tokens.shape[1])
        seen = (jnp.arange(max_length) <= positions[:, None])[None, None]
        new: Caches = []
        for number, (keys, values) in enumerate(caches):
            layer = f"blocks.{number}."
            h = norm(x, w[layer + "attention_norm.scale"])
            kernels = (w[f"{layer}attention.{name}.kernel"] for name in ("query", "key", "value"))
            q, k, v = ((h @ u.reshape(len(u), -1)).reshape(*h.shape[:2], *u.shape[1:]) for u in kernels)
            keys = jax.lax.dynamic_update_slice(keys, turn(k, positions), (0, start, 0, 0))
            values = jax.lax.dynamic_update_slice(values, v, (0, start, 0, 0))
            new.append((keys, values))
            h = jax.nn.dot_product_attention(turn(q, positions), keys, values, mask=seen)
            x = x + h.reshape(x.shape) @ w[layer + "attention.out.kernel"].reshape(-1, config.width)
            h = norm(x, w[layer + "mlp_norm.scale"])
            h = jax.nn.silu(h @ w[layer + "gate.kernel"]) * (h @ w[layer + "up.kernel"])
            x = x + h @ w[layer + "down.kernel"]
        return norm(x, w["norm.scale"]), new

    def choose(w: Weights, h: jax.Array) -> jax.Array:
        return jnp.argmax(h @ w["embed.embedding"].T, -1).astype(jnp.int32)

    @functools.partial(jax.jit, donate_argnums=1)
    def read(w: Weights, caches: Caches, tokens: jax.Array, length: jax.Array) -> tuple[jax.Array, Caches]:
        h, caches = hidden(w, caches, tokens, jnp.int32(0))
        return choose(w, jnp.take(h[0], length[None] - 1, axis=0)), caches

    @functools.partial(jax.jit, donate_argnums=(1, 3))
    def step(w: Weights, caches: Caches, tokens: jax.Array, at: jax.Array) -> tuple[jax.Array, Caches, jax.Array]:
        h, caches = hidden(w, caches, tokens[:, None], at)
        return choose(w, h[:, 0]), caches, at + 1

    return weights, caches, read, step


def main(args: argparse.Namespace) -> None:
    """Time both, taking turns; each number is the best of several."""
    model, tokenizer = smollm.load(jnp.bfloat16 if args.bfloat16 else jnp.float32)
    prompt = tokenizer.encode("The quick brown fox jumps over the lazy dog. " * 6)[:60]
    count, rngs = args.tokens, mu.Rngs(0)
    first = smollm.start(model, rngs, [prompt], count, smollm.GREEDY)
    max_length = model.blocks[0].attention.cache.max_length
    weights, caches, read, step = by_hand(model, max_length)
    tokens = jnp.asarray([prompt + [0] * (smollm.bucket(len(prompt)) - len(prompt))], jnp.int32)
    length = jnp.int32(len(prompt))
    times: dict[str, list[float]] = collections.defaultdict(list)
    others = {}
    if args.peers:
        found = {
            "nnx": smollm_peers.with_nnx(model, max_length, len(prompt)),
            "transformers": smollm_peers.with_transformers(model.dtype),
        }
        others = {name: pair for name, pair in found.items() if pair is not None}
    texts: dict[str, list[int]] = {}

    def clock(name: str, run: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = jax.block_until_ready(run())
        times[name].append(time.perf_counter() - begin)
        return result

    def write() -> jax.Array:
        token, new = first, [first]
        for _ in range(count - 1):
            token = smollm.step(model, rngs, token)
            new.append(token)
        return jnp.concatenate(new)

    def write_by_hand() -> jax.Array:
        nonlocal caches
        token, at, new = by_hand_first, length + 0, [by_hand_first]
        for _ in range(count - 1):
            token, caches, at = step(weights, caches, token, at)
            new.append(token)
        return jnp.concatenate(new)

    for _ in range(6):
        mu.reset(model, mu.Cache)
        first = clock("read", lambda: smollm.read(model, rngs, tokens, length[None]))
        by_hand_first, caches = clock("read by hand", functools.partial(read, weights, caches, tokens, length))
        texts["ours"] = np.asarray(clock("write", write)).tolist()
        texts["by hand"] = np.asarray(clock("write by hand", write_by_hand)).tolist()
        for name, (read_other, write_other) in others.items():
            token = clock(f"read {name}", functools.partial(read_other, prompt))
            texts[name] = clock(f"write {name}", functools.partial(continued, write_other, token, count))
    best = {name: min(seen[1:]) for name, seen in times.items()}
    print(f"{jax.devices()[0].device_kind}, {model.dtype.__name__}, {len(prompt)} tokens read, {count} written")
    for name, number in (("read", len(prompt)), ("write", count - 1)):
        ours = number / best[name]
        print(f"{name:6} {ours:8.1f} tokens/s")
        for other in ("by hand", *others):
            theirs = number / best[f"{name} {other}"]
            same = "the same text" if texts[other] == texts["ours"] else "another text"
            print(f"       {theirs:8.1f} tokens/s {other:13} ratio {ours / theirs:.2f}   {same}")


def continued(write: Callable[[Any], Any], token: Any, count: int) -> list[int]:
    """So many tokens, the first of which is given; each is looked at, as the next call needs it or a reader does."""
    new = [token]
    for _ in range(count - 1):
        new.append(write(new[-1]))
    return [int(each[0]) for each in new]
