"""SmolLM2 in other libraries: Flax NNX, and `transformers` with PyTorch.

    python examples/smollm.py --bench --peers

This file prints nothing. `smollm_bench.py` times its functions beside the model of `smollm.py`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import smollm

import mutatis as mu

Reader = Callable[[list[int]], Any]  # reads a prompt, from its first token, and gives the next one
Writer = Callable[[Any], Any]  # takes a token, gives the next one


def with_nnx(model: smollm.Llama, max_length: int, length: int) -> tuple[Reader, Writer] | None:
    """The model written with the layers of NNX, its caches in `nnx.Cache`; None if Flax is not installed."""
    if importlib.util.find_spec("flax") is None:
        return None
    from flax import nnx

    config, dtype = model.config, model.dtype
    depth = config.width // config.heads
    rngs = nnx.Rngs(0)
    common = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}

    def linear(inputs: int, outputs: int) -> Any:
        return nnx.Linear(inputs, outputs, use_bias=False, **common)

    def norm() -> Any:
        return nnx.RMSNorm(config.width, epsilon=config.epsilon, **common)

    def turn(x: jax.Array, positions: jax.Array) -> jax.Array:
        angles = positions[None, :, None, None] * config.theta ** (-jnp.arange(0, depth, 2, dtype=jnp.float32) / depth)
        a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        sin, cos = jnp.sin(angles), jnp.cos(angles)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(dtype)

    class Attention(nnx.Module):
        def __init__(self) -> None:
            self.query, self.out = linear(config.width, config.width), linear(config.width, config.width)
            self.key, self.value = (linear(config.width, config.kv_heads * depth) for _ in range(2))
            shape = (1, max_length, config.kv_heads, depth)
            self.keys, self.values = nnx.Cache(jnp.zeros(shape, dtype)), nnx.Cache(jnp.zeros(shape, dtype))

        def __call__(self, x: jax.Array, start: jax.Array) -> jax.Array:
            positions = start + jnp.arange(x.shape[1])
            query, key, value = (
                layer(x).reshape(*x.shape[:2], -1, depth) for layer in (self.query, self.key, self.value)
            )
            self.keys[...] = jax.lax.dynamic_update_slice(self.keys[...], turn(key, positions), (0, start, 0, 0))
            self.values[...] = jax.lax.dynamic_update_slice(self.values[...], value, (0, start, 0, 0))
            seen = (jnp.arange(max_length) <= positions[:, None])[None, None]
            found = jax.nn.dot_product_attention(turn(query, positions), self.keys[...], self.values[...], mask=seen)
            return self.out(found.reshape(x.shape))

    class Block(nnx.Module):
        def __init__(self) -> None:
            self.attention, self.attention_norm, self.mlp_norm = Attention(), norm(), norm()
            self.gate, self.up = linear(config.width, config.inner), linear(config.width, config.inner)
            self.down = linear(config.inner, config.width)

        def __call__(self, x: jax.Array, start: jax.Array) -> jax.Array:
            x = x + self.attention(self.attention_norm(x), start)
            h = self.mlp_norm(x)
            return x + self.down(jax.nn.silu(self.gate(h)) * self.up(h))

    class Llama(nnx.Module):
        def __init__(self) -> None:
            self.embed = nnx.Embed(config.vocabulary, config.width, **common)
            self.blocks = nnx.List([Block() for _ in range(config.layers)])
            self.norm = norm()
            self.at = nnx.Cache(jnp.int32(0))

        def __call__(self, tokens: jax.Array, last: jax.Array) -> jax.Array:
            x = self.embed(tokens)
            for block in self.blocks:
                x = block(x, self.at[...])
            self.at[...] += last + 1
            return jnp.argmax(self.embed.attend(self.norm(x[:, last])), -1).astype(jnp.int32)

    net = Llama()
    state = nnx.state(net, nnx.Param)
    ours = {path: cell.value for path, cell in mu.variables(model, mu.Param).items()}
    new = {path: ours[path].reshape(leaf.shape) for path, leaf in nnx.to_flat_state(state)}
    nnx.update(net, nnx.from_flat_state({path: nnx.Param(value) for path, value in new.items()}))
    step = nnx.jit(lambda net, tokens, last: net(tokens, last))

    def read(prompt: list[int]) -> Any:
        net.at[...] = jnp.int32(0)
        padded = jnp.asarray([prompt + [0] * (smollm.bucket(length) - length)], jnp.int32)
        return step(net, padded, jnp.int32(length - 1))

    nothing = jnp.int32(0)
    return read, lambda token: step(net, token[:, None], nothing)


def with_transformers(dtype: Any) -> tuple[Reader, Writer] | None:
    """The model of `transformers`, eagerly, as its users run it; None if it or PyTorch is not installed."""
    if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("torch") is None:
        return None
    import torch
    from transformers import AutoModelForCausalLM

    file = smollm.weights_file()
    kind = torch.bfloat16 if dtype == jnp.bfloat16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=kind).eval()
    cache: Any = None

    def run(tokens: Any) -> Any:
        nonlocal cache
        with torch.inference_mode():
            out = model(torch.as_tensor(np.asarray(tokens))[None], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        return np.asarray([int(out.logits[0, -1].argmax())])

    def read(prompt: list[int]) -> Any:
        nonlocal cache
        cache = None
        return run(prompt)

    return read, run
