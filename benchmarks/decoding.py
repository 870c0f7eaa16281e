"""Tokens per second of a small decoder with a cache of keys and values: one jitted call for each token.

A call reads every parameter and writes every cache, so beside the arithmetic it pays for handing all of them over. Plain JAX
does the same by hand in two ways: over nested dictionaries, which is how people write it, and over a flat tuple of
parameters and a flat list of caches, which is the fastest that `jax.jit` can be called. Both donate the caches. All decode
the same text, which is compared token for token, from the same (random) weights; the token of a call is the input of the
next one. A figure is the median over the rounds of the ratio within a round, of whole texts.

*Ahead* means that nobody looks at a token before the text is done: Python may prepare a call while the one before it still
computes. *Looked at* means that each token comes to the host before the next call, as it does where somebody reads along.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from timing import Row, interleave, main

import mutatis as mu

ARGUMENT = "mu.jit, model as argument"
CLOSED = "mu.jit, model closed over"
NESTED = "threaded by hand, nested dicts"
FLAT = "threaded by hand, flat lists"
Text = Callable[[int, bool], list[Any]]  # decodes so many tokens from an empty cache, looking at each of them or not


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A decoder of the Llama type: grouped heads, rotary positions, SwiGLU, RMSNorm, the embedding tied to the output."""

    layers: int
    width: int
    heads: int
    shared: int  # heads of keys and values
    hidden: int
    vocabulary: int
    length: int  # of the cache

    @property
    def size(self) -> int:
        """Of a head."""
        return self.width // self.heads


SIZES = {
    "tiny": Sizes(layers=2, width=32, heads=2, shared=1, hidden=64, vocabulary=64, length=64),
    "small": Sizes(layers=4, width=128, heads=4, shared=2, hidden=384, vocabulary=256, length=128),
    "deep": Sizes(layers=30, width=192, heads=3, shared=1, hidden=512, vocabulary=4096, length=128),
    "smollm2": Sizes(layers=30, width=576, heads=9, shared=3, hidden=1536, vocabulary=49152, length=128),
}


def weights(sizes: Sizes, seed: int = 0) -> dict[str, Any]:
    """Random weights as nested dictionaries."""
    rng = np.random.default_rng(seed)
    width, keys = sizes.width, sizes.shared * sizes.size
    shapes = {
        "query": (width, width),
        "key": (width, keys),
        "value": (width, keys),
        "out": (width, width),
        "gate": (width, sizes.hidden),
        "up": (width, sizes.hidden),
        "down": (sizes.hidden, width),
    }

    def layer() -> dict[str, Any]:
        matrices = {
            name: rng.standard_normal(shape, np.float32) / np.float32(shape[0]) ** 0.5 for name, shape in shapes.items()
        }
        return jax.tree.map(jnp.asarray, {**matrices, "before": np.ones(width, "f"), "between": np.ones(width, "f")})

    return {
        "embedding": jnp.asarray(rng.standard_normal((sizes.vocabulary, width), np.float32) * np.float32(0.02)),
        "layers": [layer() for _ in range(sizes.layers)],
        "last": jnp.ones(width),
    }


def empty(sizes: Sizes) -> jax.Array:
    """A cache of keys or of values."""
    return jnp.zeros((sizes.length, sizes.shared, sizes.size))


# -- the arithmetic that all share -------------------------------------------------------------------------------------


def normalize(x: jax.Array, scale: jax.Array) -> jax.Array:
    """RMSNorm."""
    return x * lax.rsqrt(jnp.mean(x * x) + 1e-5) * scale


def rotate(heads: jax.Array, position: jax.Array) -> jax.Array:
    """Rotary positions, on heads of shape (heads, size)."""
    half = heads.shape[1] // 2
    angles = position * 100000.0 ** (-jnp.arange(half) / half)
    a, b = heads[:, :half], heads[:, half:]
    return jnp.concatenate([a * jnp.cos(angles) - b * jnp.sin(angles), b * jnp.cos(angles) + a * jnp.sin(angles)], 1)


def attend(query: jax.Array, keys: jax.Array, values: jax.Array, position: jax.Array) -> jax.Array:
    """What the heads of a query, (heads, size), find in a cache up to a position."""
    length, shared, size = keys.shape
    scores = jnp.einsum("sgd,lsd->sgl", query.reshape(shared, -1, size), keys) * size**-0.5
    scores = jnp.where(jnp.arange(length) <= position, scores, -jnp.inf)
    return jnp.einsum("sgl,lsd->sgd", jax.nn.softmax(scores), values).reshape(-1)


def put(cache: jax.Array, new: jax.Array, position: jax.Array) -> jax.Array:
    """A cache with the heads of one more position."""
    return lax.dynamic_update_slice(cache, new[None], (position, 0, 0))


# -- with Mutatis ------------------------------------------------------------------------------------------------------


class Layer(mu.Module):
    """Attention over its own cache, then a gated layer."""

    def __init__(self, sizes: Sizes, weights: dict[str, jax.Array]) -> None:
        self.size = sizes.size
        for name, array in weights.items():
            setattr(self, name, mu.Param(array))
        self.keys = mu.Cache(empty(sizes))
        self.values = mu.Cache(empty(sizes))

    def __call__(self, x: jax.Array, position: jax.Array) -> jax.Array:
        """Reads and writes the cache."""
        y = normalize(x, self.before.value)
        query = rotate((y @ self.query.value).reshape(-1, self.size), position)
        key = rotate((y @ self.key.value).reshape(-1, self.size), position)
        value = (y @ self.value.value).reshape(-1, self.size)
        self.keys.value = put(self.keys.value, key, position)
        self.values.value = put(self.values.value, value, position)
        x = x + attend(query, self.keys.value, self.values.value, position) @ self.out.value
        y = normalize(x, self.between.value)
        return x + (jax.nn.silu(y @ self.gate.value) * (y @ self.up.value)) @ self.down.value


class Decoder(mu.Module):
    """Takes a token, gives the likeliest next one."""

    def __init__(self, sizes: Sizes, weights: dict[str, Any]) -> None:
        self.embedding = mu.Param(weights["embedding"])
        self.layers = [Layer(sizes, each) for each in weights["layers"]]
        self.last = mu.Param(weights["last"])
        self.position = mu.Cache(jnp.int32(0))

    def __call__(self, token: jax.Array) -> jax.Array:
        """One position further."""
        position = self.position.value
        x = self.embedding.value[token]
        for layer in self.layers:
            x = layer(x, position)
        self.position.value = position + 1
        return jnp.argmax(self.embedding.value @ normalize(x, self.last.value))


def with_mutatis(sizes: Sizes, weights: dict[str, Any], *, argument: bool) -> Text:
    """Decodes a text from an empty cache."""
    decoder = Decoder(sizes, weights)
    jitted = mu.jit(lambda decoder, token: decoder(token)) if argument else mu.jit(lambda token: decoder(token))

    def text(length: int, look: bool) -> list[Any]:
        decoder.position.value = jnp.int32(0)
        token = jnp.int32(1)
        tokens: list[Any] = []
        for _ in range(length):
            token = jitted(decoder, token) if argument else jitted(token)
            tokens.append(int(token) if look else token)
        return tokens

    return text


# -- by hand -----------------------------------------------------------------------------------------------------------


def decode(
    sizes: Sizes, weights: dict[str, Any], caches: dict[str, Any], token: jax.Array
) -> tuple[dict[str, Any], jax.Array]:
    """The same as a pure function: new caches, and the likeliest next token."""
    position = caches["position"]
    x = weights["embedding"][token]
    layers = []
    for own, cache in zip(weights["layers"], caches["layers"], strict=True):
        y = normalize(x, own["before"])
        query = rotate((y @ own["query"]).reshape(-1, sizes.size), position)
        key = rotate((y @ own["key"]).reshape(-1, sizes.size), position)
        value = (y @ own["value"]).reshape(-1, sizes.size)
        keys, values = put(cache["keys"], key, position), put(cache["values"], value, position)
        layers.append({"keys": keys, "values": values})
        x = x + attend(query, keys, values, position) @ own["out"]
        y = normalize(x, own["between"])
        x = x + (jax.nn.silu(y @ own["gate"]) * (y @ own["up"])) @ own["down"]
    token = jnp.argmax(weights["embedding"] @ normalize(x, weights["last"]))
    return {"layers": layers, "position": position + 1}, token


def caches(sizes: Sizes) -> dict[str, Any]:
    """Empty caches, as nested dictionaries."""
    layers = [{"keys": empty(sizes), "values": empty(sizes)} for _ in range(sizes.layers)]
    return {"layers": layers, "position": jnp.int32(0)}


def by_hand(sizes: Sizes, weights: dict[str, Any], *, flat: bool) -> Text:
    """Decodes a text from an empty cache."""
    kept: Any = caches(sizes)
    given: Any = weights
    in_weights, in_caches = jax.tree.structure(weights), jax.tree.structure(kept)

    def step(given: Any, kept: Any, token: jax.Array) -> Any:
        if not flat:
            return decode(sizes, given, kept, token)
        new, token = decode(sizes, in_weights.unflatten(given), in_caches.unflatten(kept), token)
        return jax.tree.leaves(new), token

    if flat:
        given, kept = tuple(jax.tree.leaves(weights)), jax.tree.leaves(kept)
    jitted = jax.jit(step, donate_argnums=1)

    def text(length: int, look: bool) -> list[Any]:
        nonlocal kept
        if flat:
            kept[-1] = jnp.int32(0)
        else:
            kept["position"] = jnp.int32(0)
        token = jnp.int32(1)
        tokens: list[Any] = []
        for _ in range(length):
            kept, token = jitted(given, kept, token)
            tokens.append(int(token) if look else token)
        return tokens

    return text


def contenders(sizes: Sizes) -> dict[str, Text]:
    """All of them, over the same weights."""
    shared = weights(sizes)
    return {
        ARGUMENT: with_mutatis(sizes, shared, argument=True),
        CLOSED: with_mutatis(sizes, shared, argument=False),
        NESTED: by_hand(sizes, shared, flat=False),
        FLAT: by_hand(sizes, shared, flat=True),
    }


def check(texts: dict[str, Text], length: int) -> None:
    """All decode the same text, and not one token over and over."""
    decoded = {name: text(length, True) for name, text in texts.items()}
    first = decoded[NESTED]
    for name, tokens in decoded.items():
        if tokens != first:
            sys.exit(f"`{name}` decoded another text than `{NESTED}`")
    if len(set(first)) < 3:
        sys.exit(f"the text says nothing: {first}")


def last(text: Text, length: int, look: bool) -> Any:
    """The last token of a text."""
    return text(length, look)[-1]


def report(what: str, times: dict[str, list[float]], length: int) -> list[Row]:
    """The rows of one way to decode texts."""
    rows = []
    for base, goal in ((NESTED, 1.0), (FLAT, None)):
        for name in (ARGUMENT, CLOSED):
            faster = statistics.median(a / b for a, b in zip(times[base], times[name], strict=True))
            rows.append(Row(f"{what}: {name}", base, faster, goal, floor=True))
    for name, seconds in times.items():
        rows.append(Row(f"{what}: {name}", "", length / statistics.median(seconds), unit="tokens/s"))
    return rows


def measure(options: argparse.Namespace) -> list[Row]:
    """The rows."""
    rows = []
    for size in options.sizes:
        sizes = SIZES[size]
        texts = contenders(sizes)
        length = min(options.tokens, sizes.length)
        check(texts, length)
        for look, how in ((False, "ahead"), (True, "looked at")):
            calls = {name: functools.partial(last, text, length, look) for name, text in texts.items()}
            times = interleave(calls, calls=1, rounds=options.rounds)
            rows += report(f"tokens per second, {size}, {how}", times, length)
    return rows


def names(text: str) -> list[str]:
    """The argument of ``--sizes``."""
    if unknown := set(text.split(",")) - set(SIZES):
        raise argparse.ArgumentTypeError(f"no {sorted(unknown)} among {sorted(SIZES)}")
    return text.split(",")


if __name__ == "__main__":
    main(
        __doc__,
        measure,
        ("--sizes", {"type": names, "default": ["tiny", "small"], "help": f"of {', '.join(SIZES)}"}),
        ("--tokens", {"type": int, "default": 100, "help": "how many make a text"}),
    )
