"""Serving and speculative decoding with a GPT whose blocks are in an `nn.Stack`, beside the same GPT with a list of blocks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import nn
from mutatis.errors import ArgumentError

pytestmark = [pytest.mark.once, pytest.mark.filterwarnings("ignore::mutatis.errors.RecompilationWarning")]

WORDS, WIDTH, DEPTH = 11, 8, 3


class Block(mu.Module):
    def __init__(self, rngs: mu.Rngs) -> None:
        self.attention = nn.MultiHeadAttention(2, WIDTH, rope=nn.RoPE(), decode=True, rngs=rngs)
        self.norm, self.linear = nn.LayerNorm(WIDTH, rngs=rngs), nn.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array, lengths: Any = None) -> jax.Array:
        x = x + self.attention(self.norm(x), lengths=lengths)
        return x + jnp.tanh(self.linear(x))


class GPT(mu.Module):
    def __init__(self, stacked: bool) -> None:
        rngs = mu.Rngs(0)
        self.embed, self.head = nn.Embed(WORDS, WIDTH, rngs=rngs), nn.Linear(WIDTH, WORDS, rngs=rngs)
        blocks = [Block(rngs) for _ in range(DEPTH)]
        self.blocks: Any = nn.Stack(blocks) if stacked else blocks

    def __call__(self, tokens: jax.Array, lengths: Any = None) -> jax.Array:
        x = self.embed(tokens)
        for block in self.blocks if isinstance(self.blocks, list) else [self.blocks]:
            x = block(x, lengths)
        return self.head(x)

    def init_cache(self, batch: int, places: int, **options: Any) -> None:
        for layer in mu.modules(self, nn.MultiHeadAttention).values():
            layer.init_cache((batch, places, WIDTH), **options)


def both(batch: int, places: int, **options: Any) -> tuple[GPT, GPT]:
    models = GPT(False), GPT(True)
    for model in models:
        model.init_cache(batch, places, **options)
    return models


def tokens(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), shape, 0, WORDS)


def check_caches(plain: Any, stacked: Any) -> None:
    """The caches of the stack hold what those of the list hold, as far as a query can see it."""
    (one,), several = nn.kv_caches(stacked), nn.kv_caches(plain)
    for name in ("index", "positions"):
        if (cell := getattr(one, name)) is not None:
            np.testing.assert_array_equal(cell.value, jnp.stack([getattr(cache, name).value for cache in several]))


read = mu.jit(lambda model, tokens: model(tokens))
step = mu.jit(lambda model, slots, tokens: model(tokens, slots.steps()))
insert = mu.jit(lambda slots, slot, request, seed: slots.insert(slot, request, seed=seed))
RINGS = [{}, {"window": 4}]


def near(a: Any, b: Any) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("window", [None, 3])
def test_tokens_are_taken_back(window: int | None, ragged: bool, compiled: bool) -> None:
    """Speculative decoding: a guess of several tokens is read at once, and all but the accepted ones are taken back."""
    text = tokens(2, 9)

    def guess(model: Any, guessed: jax.Array, accepted: Any) -> jax.Array:
        logits = model(guessed)
        for cache in nn.kv_caches(model):
            cache.truncate(cache.index - guessed.shape[1] + accepted)
        return logits

    results = []
    for model in both(2, 16, window=window, ragged=ragged):
        run = mu.jit(guess) if compiled else guess
        got = [read(model, text[:, :3]), run(model, text[:, 3:6], 1), run(model, tokens(2, 3, seed=1), 0)]
        got.append(read(model, text[:, 4:6]))
        if ragged:
            for cache in nn.kv_caches(model):
                cache.truncate(jnp.array([6, 5]))
            got.append(model(jnp.stack([text[0, 6:7], text[1, 5:6]])))
        with mu.transaction() as tx:
            model(tokens(2, 2, seed=2))
            tx.rollback()
        for cache in nn.kv_caches(model):
            cache.truncate(5)
        results.append([*got, model(text[:, 5:])])
    for one, other in zip(*results, strict=True):
        near(one, other)
    whole = GPT(True)
    whole.init_cache(2, 16, window=window)
    near(results[1][-1], whole(text)[:, 5:])


@pytest.mark.parametrize("window", [None, 4])
def test_requests_come_and_go(window: int | None) -> None:
    """Slots are filled, emptied, shared and moved while the others go on."""
    text, results = tokens(4, 12), []
    for stacked in (False, True):
        model, alone = GPT(stacked), GPT(stacked)
        model.init_cache(4, 12, ragged=True, window=window)
        alone.init_cache(1, 9, window=window)
        slots, got = nn.SlotCache(model, rngs=mu.Rngs(1)), []

        def request(row: int, length: int, alone: Any = alone) -> Any:
            mu.reset(alone, mu.Cache)
            read(alone, text[row : row + 1, :length])
            return alone

        slots.insert(2, request(0, 4))
        insert(slots, jnp.int32(0), request(1, 2), 5)
        for place in range(4, 6):
            got.append(step(model, slots, text[jnp.array([1, 0, 0, 0]), place][:, None])[jnp.array([0, 2])])
        slots.evict(2)
        insert(slots, jnp.int32(2), request(2, 6), 6)
        assert slots.lengths.tolist() == [4, 0, 6, 0] and slots.lengths.shape == (4,)
        got.append(step(model, slots, text[:, 7:8])[jnp.array([0, 2])])
        mu.jit(lambda slots: slots.share(2, 3, 5 if window is None else 7))(slots)
        got.append(step(model, slots, text[:, 8:9])[jnp.array([0, 2, 3])])
        slots.reorder(jnp.array([3, 2, 1, 0]), streams=True)
        slots.truncate(6 if window is None else 99)
        got.append(step(model, slots, text[:, 9:10])[jnp.array([0, 1, 3])])
        slots.evict(jnp.array([0, 3]))
        got += [slots.lengths, slots.active.value, jax.random.key_data(slots.keys())]
        results.append((got, model))
    for one, other in zip(results[0][0], results[1][0], strict=True):
        near(one, other)
    check_caches(results[0][1], results[1][1])


def test_a_slot_of_a_stack_is_a_request_of_its_own() -> None:
    plain, text = GPT(False), tokens(1, 7)
    plain.init_cache(1, 9)
    wanted = plain(text)
    model, alone = GPT(True), GPT(True)
    model.init_cache(3, 9, ragged=True)
    alone.init_cache(1, 5)
    slots = nn.SlotCache(model, rngs=mu.Rngs(1))
    alone(text[:, :5])
    slots.insert(1, alone)
    for place in (5, 6):
        near(step(model, slots, jnp.full((3, 1), text[0, place]))[1, 0], wanted[0, place])


def test_beams_and_resets() -> None:
    for plain, stacked in [both(3, 8)]:
        text = tokens(3, 6)
        for model in (plain, stacked):
            model(text[:, :4])
            for cache in nn.kv_caches(model):
                cache.reorder(jnp.array([2, 0, 0]))
        near(plain(text[:, 4:]), stacked(text[:, 4:]))
        for model in (plain, stacked):
            for cache in nn.kv_caches(model):
                cache.reset()
        near(plain(text), stacked(text))
        mu.reset(stacked, mu.Cache)
        assert nn.kv_caches(stacked)[0].index.value.tolist() == [0] * DEPTH


@pytest.mark.parametrize("stacked", [False, True])
def test_numbers_that_a_compiled_function_names(stacked: bool) -> None:
    model = GPT(stacked)
    model.init_cache(3, 8, ragged=True)
    slots = nn.SlotCache(model, rngs=mu.Rngs(0))
    model(tokens(3, 4))
    mu.jit(lambda slots: (slots.truncate(3), slots.evict(1), slots.share(0, 2), slots.reseed(0, 3)))(slots)
    assert slots.lengths.tolist() == [3, 0, 3]
    for use in (lambda slots: slots.evict(3), lambda slots: slots.truncate(-1)):
        with pytest.raises(ArgumentError, match=r"no slot 3|an int from 0"):
            mu.jit(use)(slots)
    assert slots.lengths.tolist() == [3, 0, 3]


def test_where_a_cache_of_a_stack_was_made() -> None:
    model = GPT(True)
    model.init_cache(2, 8)
    assert "test_slots_stacked.py" in str(nn.kv_caches(model)[0].key.made_at)


def test_each_layer_to_a_length_of_its_own() -> None:
    model = GPT(True)
    model.init_cache(2, 8, ragged=True)
    model(tokens(2, 6))
    (cache,) = nn.kv_caches(model)
    cache.truncate(jnp.array([[6, 5], [4, 6], [2, 1]]))
    assert cache.index.value.tolist() == [[6, 5], [4, 6], [2, 1]]


def test_a_ring_of_a_stack_gives_back_only_what_it_keeps() -> None:
    model = GPT(True)
    model.init_cache(2, 5, ragged=True, window=4)
    model(tokens(2, 8))
    (cache,) = nn.kv_caches(model)
    slots = nn.SlotCache(model, rngs=mu.Rngs(0))
    before = mu.state(model, mu.Cache)
    for use in (lambda: cache.truncate(4), lambda: slots.share(0, 1, 4)):
        with pytest.raises(ArgumentError, match="no longer kept"):
            use()
    assert mu.state(model, mu.Cache) == before


@pytest.mark.parametrize(
    ("use", "text"),
    [
        (
            lambda m, c, s, a: c.truncate(-1),
            r"(?s)rolled back.*an int from 0, or an array of shape \(2,\), or an array of shape \(3, 2\)\n.*-1",
        ),
        (
            lambda m, c, s, a: c.truncate(jnp.array([1, 2, 3])),
            r"(?s)or an array of shape \(2,\), or .*\(3, 2\).*\(3,\)",
        ),
        (
            lambda m, c, s, a: c.reorder(jnp.array([0, 1, 1])),
            r"(?s)cannot be reordered.*\(2,\), from 0 to 1.*\[0, 1, 1\]",
        ),
        (lambda m, c, s, a: c.update(jnp.ones((3, 2, 1, 2, 4)), jnp.ones((3, 2, 1, 2, 4))), r"(?s)many layers.*\(3,\)"),
        (lambda m, c, s, a: s.insert(0, a), r"(?s)do not fit into the slots.*for 3 layers.*for 2 layers"),
        (lambda m, c, s, a: s.insert(0, both(1, 8)[0]), "got: *3 caches"),
        (lambda m, c, s, a: s.evict(2), "no slot 2"),
    ],
    ids=["negative", "shape", "reorder", "update", "depth", "a list", "slot"],
)
def test_bad_input(use: Any, text: str) -> None:
    model = GPT(True)
    model.init_cache(2, 8, ragged=True)
    slots = nn.SlotCache(model, rngs=mu.Rngs(0))
    (cache,) = nn.kv_caches(model)
    shallow = GPT(True)
    shallow.blocks = nn.Stack(shallow.blocks.layers()[:2])
    shallow.init_cache(1, 8)
    before = mu.state(model, mu.Cache)
    with pytest.raises(ArgumentError, match=text):
        use(model, cache, slots, shallow)
    assert mu.state(model, mu.Cache) == before


def test_the_cure_of_an_update_from_outside() -> None:
    model = GPT(True)
    model.init_cache(2, 8, ragged=True)
    (cache,) = nn.kv_caches(model)
    part = jax.random.normal(jax.random.key(0), (DEPTH, 2, 3, 2, 4))
    model.blocks.each(lambda layer, k, v: layer.attention.cache.update(k, v), part, part)
    np.testing.assert_array_equal(cache.key.value[:, :, :3], part)
    assert cache.index.value.tolist() == [[3, 3]] * 3
