"""Continuous batching: requests of different lengths come and go, and one compiled step writes a token for each of them.

    make example NAME=serve
    python examples/serve.py --slots 2 --temperature 0.8 "Once upon a time" "The capital of Italy is" "Water boils at"

SmolLM2 reads a request into caches of its own, which are then put into a free slot of the server. Each slot has its own length
and its own random stream, which starts from the seed of the request. So the text of a request does not depend on the other
requests. The program prints each request with its text.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import smollm

import mutatis as mu
from mutatis import nn


@dataclasses.dataclass
class Request:
    """What to write on after, how many tokens, and the seed to choose them by."""

    prompt: list[int]
    count: int
    seed: int = 0
    tokens: list[int] = dataclasses.field(default_factory=list)


class Server(mu.Module):
    """A model with caches for several requests, and a view of it with those to read one.

    Args:
      model: the language model.
      slots: how many requests are served at a time.
      max_length: how many tokens one may have, with its prompt.
      sampling: how tokens are chosen.
    """

    def __init__(
        self, model: smollm.Llama, slots: int, max_length: int, sampling: smollm.Sampling = smollm.GREEDY
    ) -> None:
        self.reader = mu.view(model)
        self.reader.init_cache(1, max_length)
        self.model = model
        self.model.init_cache(slots, max_length, ragged=True)
        self.slots = nn.SlotCache(model, rngs=mu.Rngs(0))
        self.last = mu.Cache(jnp.zeros(slots, jnp.int32))
        self.sampling = sampling

    @mu.jit
    def admit(self, slot: jax.Array, tokens: jax.Array, length: jax.Array, seed: jax.Array) -> None:
        """Read a prompt, filled up to one of a few lengths, and put it into a slot."""
        for cache in nn.kv_caches(self.reader):
            cache.reset()
        hidden = self.reader.hidden(tokens[None])[0]
        for cache in nn.kv_caches(self.reader):
            cache.truncate(length)
        self.slots.insert(slot, self.reader, seed=seed)
        logits = self.reader.logits(jnp.take(hidden, length[None] - 1, axis=0))[0]
        token = self.sampling(logits, jax.random.fold_in(jax.random.key(seed), jnp.uint32(2**32 - 1)))
        self.last.value = self.last.value.at[slot].set(token)

    @mu.jit
    def step(self) -> jax.Array:
        """The next token in each slot; what is in a slot without a request means nothing."""
        hidden = self.model.hidden(self.last.value[:, None], self.slots.steps())[:, 0]
        self.last.value = jax.vmap(self.sampling)(self.model.logits(hidden), self.slots.keys())
        return self.last.value

    @mu.jit
    def evict(self, slot: jax.Array) -> None:
        """Free a slot."""
        self.slots.evict(slot)

    def serve(self, requests: Sequence[Request]) -> Iterator[Request]:
        """Serve requests in their order, each as soon as a slot is free; gives each when it is done."""
        waiting, served = list(requests), dict[int, Request]()
        while waiting or served:
            for slot in range(self.slots.slots):
                if slot not in served and waiting:
                    served[slot] = self._admit(slot, waiting.pop(0))
            for slot, request in list(served.items()):
                if len(request.tokens) >= request.count:
                    self.evict(jnp.int32(slot))
                    yield served.pop(slot)
            if served:
                tokens = np.asarray(self.step())
                for slot, request in served.items():
                    request.tokens.append(int(tokens[slot]))

    def _admit(self, slot: int, request: Request) -> Request:
        tokens = np.zeros(smollm.bucket(len(request.prompt)), np.int32)
        tokens[: len(request.prompt)] = request.prompt
        self.admit(jnp.int32(slot), jnp.asarray(tokens), jnp.int32(len(request.prompt)), jnp.int32(request.seed))
        request.tokens = [int(self.last.value[slot])]
        return request


def main() -> None:
    """Serve the prompts of the command line."""
    parser = argparse.ArgumentParser(description="SmolLM2 serves several requests at once.")
    parser.add_argument("prompts", nargs="*", help="the beginnings of the texts")
    parser.add_argument("--slots", type=int, default=3, help="how many are served at a time")
    parser.add_argument(
        "--tokens", type=int, default=32, help="how many to write for the first; each further one gets 8 more"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token")
    args = parser.parse_args()
    model, tokenizer = smollm.load()
    texts = args.prompts or [
        "The capital of Italy is",
        "Once upon a time",
        "Water boils at 100",
        "def add(a, b):",
        "1, 2, 3,",
    ]
    prompts = [tokenizer.encode(text) for text in texts]
    requests = [Request(prompt, args.tokens + 8 * n, seed=n) for n, prompt in enumerate(prompts)]
    longest = max(max(smollm.bucket(len(r.prompt)), len(r.prompt) + r.count) for r in requests)
    server = Server(model, args.slots, longest, smollm.Sampling(args.temperature))
    for request in server.serve(requests):
        print(f"--- {tokenizer.decode(request.prompt)}{tokenizer.decode(request.tokens)}\n")


if __name__ == "__main__":
    main()
