"""`SlotCache`: what is in a slot does not depend on the others, also in compiled programs; sharing, moving, streams."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import nn
from mutatis.errors import ArgumentError

pytestmark = pytest.mark.once


class Net(mu.Module):
    def __init__(self) -> None:
        rngs = mu.Rngs(0)
        self.layers = [nn.MultiHeadAttention(2, 8, rope=nn.RoPE(), decode=True, rngs=rngs) for _ in range(2)]

    def init_cache(self, *shape: int, ragged: bool = False, window: int | None = None) -> None:
        for layer in self.layers:
            layer.init_cache(shape, ragged=ragged, window=window)

    def __call__(self, x: jax.Array, lengths: Any = None) -> jax.Array:
        for layer in self.layers:
            x = x + layer(x, lengths=lengths)
        return x


def waves(*shape: int) -> jax.Array:
    return jnp.sin(jnp.arange(np.prod(shape), dtype=jnp.float32)).reshape(shape)


def make() -> tuple[Net, nn.SlotCache, Net]:
    net, alone = Net(), Net()
    net.init_cache(3, 10, 8, ragged=True)
    alone.init_cache(1, 8, 8)
    return net, nn.SlotCache(net, rngs=mu.Rngs(1)), alone


insert = mu.jit(lambda slots, slot, request, seed: slots.insert(slot, request, seed=seed))
step = mu.jit(lambda net, slots, x: net(x, slots.steps()))


def test_requests_come_and_go() -> None:
    net, slots, alone = make()
    x = waves(1, 6, 8)
    wanted = alone(x)
    for noise, slot in ((1.0, 2), (3.0, 0)):
        net(noise * waves(3, 1, 8), jnp.array([1, 1, 1]))
        mu.reset(alone, mu.Cache)
        alone(x[:, :4])
        insert(slots, jnp.int32(slot), alone, 5)
        for place in (4, 5):
            y = step(
                net, slots, jnp.stack([x[0, place : place + 1] if n == slot else noise * x[0, :1] for n in range(3)])
            )
            np.testing.assert_allclose(y[slot, 0], wanted[0, place], rtol=1e-4, atol=1e-5)
        assert int(slots.lengths[slot]) == 6
        slots.evict(slot)
        assert int(slots.lengths[slot]) == 0 and not slots.active.value.any()


def test_sharing_moving_rolling_back() -> None:
    net, slots, alone = make()
    x = waves(1, 6, 8)
    wanted = alone(x)
    slots.insert(0, alone)
    mu.jit(lambda s, a, b, n: s.share(a, b, n))(slots, jnp.int32(0), jnp.int32(2), jnp.int32(4))
    assert slots.lengths.tolist() == [6, 0, 4] and slots.active.value.tolist() == [True, False, True]
    slots.truncate(jnp.array([5, 0, 4]))
    slots.reorder(jnp.array([2, 0, 1]))
    assert slots.lengths.tolist() == [4, 5, 0] and slots.active.value.tolist() == [True, True, False]
    y = step(net, slots, jnp.stack([x[0, 4:5], x[0, 5:6], x[0, :1]]))
    np.testing.assert_allclose(y[0, 0], wanted[0, 4], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(y[1, 0], wanted[0, 5], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("places", "own", "prompt", "ragged"),
    [(4, 4, 9, False), (4, 7, 4, True), (7, 4, 9, True), (6, 5, 2, False), (7, 4, 2, False)],
)
def test_rings(places: int, own: int, prompt: int, ragged: bool) -> None:
    net, alone = Net(), Net()
    net.init_cache(3, places, 8, ragged=True, window=4)
    alone.init_cache(1, own, 8, window=4, ragged=ragged)
    slots = nn.SlotCache(net, rngs=mu.Rngs(1))
    step(net, slots, waves(3, 1, 8))
    x = waves(1, prompt + 4, 8)
    alone(x[:, :prompt])
    slots.insert(2, alone)
    insert(slots, jnp.int32(0), alone, 5)
    for at in range(prompt, prompt + 2):
        wanted = alone(x[:, at : at + 1])[0]
        y = step(net, slots, jnp.stack([x[0, at : at + 1]] * 3))
        np.testing.assert_allclose(y[0], wanted, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(y[2], wanted, rtol=1e-4, atol=1e-5)
    slots.share(0, 1)
    slots.evict(0)
    for at in range(prompt + 2, prompt + 4):
        wanted = alone(x[:, at : at + 1])[0]
        y = step(net, slots, jnp.stack([x[0, at : at + 1]] * 3))
        np.testing.assert_allclose(y[1], wanted, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(y[2], wanted, rtol=1e-4, atol=1e-5)
    assert slots.lengths.tolist() == [0, prompt + 4, prompt + 4]


def test_a_ring_shares_only_what_it_keeps() -> None:
    net, alone = Net(), Net()
    net.init_cache(2, 5, 8, ragged=True, window=4)
    alone.init_cache(1, 5, 8, window=4)
    slots = nn.SlotCache(net, rngs=mu.Rngs(1))
    x = waves(1, 9, 8)
    alone(x[:, :8])
    slots.insert(0, alone)
    before = mu.state(net, mu.Cache)
    with pytest.raises(ArgumentError, match="no longer kept"):
        slots.share(0, 1, 5)
    assert mu.state(net, mu.Cache) == before
    slots.share(0, 1, 7)
    alone.layers[0].cache.truncate(7)
    alone.layers[1].cache.truncate(7)
    np.testing.assert_allclose(
        step(net, slots, jnp.stack([x[0, 7:8]] * 2))[1], alone(x[:, 7:8])[0], rtol=1e-4, atol=1e-5
    )
    plain = Net()
    plain.init_cache(1, 5, 8)
    with pytest.raises(ArgumentError, match="window 4"):
        slots.insert(0, plain)


def test_streams() -> None:
    def draws(order: tuple[int, ...]) -> list[Any]:
        _, slots, alone = make()
        for slot in order:
            slots.insert(slot, alone, seed=slot + 10)
        return [jax.random.key_data(slots.keys()) for _ in range(2)]

    first, second = draws((0, 1)), draws((1, 0))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a[:2], b[:2])
    assert len(np.unique(np.concatenate(first), axis=0)) == 6
    _, slots, _ = make()
    slots.reseed(1, 7)
    before = jax.random.key_data(slots.keys())
    slots.reseed(1, 7)
    slots.reorder(jnp.array([1, 1, 1]), streams=True)
    np.testing.assert_array_equal(jax.random.key_data(slots.keys())[0], before[1])


def test_checkpoints_and_copies() -> None:
    net, slots, alone = make()
    alone(waves(1, 3, 8))
    slots.insert(1, alone)
    net_copy, slots_copy = mu.clone((net, slots))
    x = waves(3, 1, 8)
    np.testing.assert_array_equal(step(net, slots, x), step(net_copy, slots_copy, x))


def test_bad_input() -> None:
    net, slots, alone = make()
    before = mu.state(net, mu.Cache)
    small, plain = Net(), nn.MultiHeadAttention(2, 8, rngs=mu.Rngs(0))
    small.init_cache(1, 12, 8)
    for use, text in [
        (lambda: slots.insert(3, alone), "no slot 3"),
        (lambda: slots.evict(-1), "no slot -1"),
        (lambda: slots.evict(1.0), "no slot 1.0"),
        (lambda: slots.insert(0, alone, row=1), "no row 1"),
        (lambda: slots.share(0, 1, length=-2), "no length -2"),
        (lambda: slots.reorder(jnp.array([0, 1, 3])), r"(?s)cannot be reordered.*from 0 to 2.*\[0, 1, 3\]"),
        (lambda: slots.insert(0, small), r"do not fit into the slots"),
        (lambda: slots.insert(0, alone.layers[0]), "1 caches"),
        (lambda: nn.SlotCache(alone, rngs=mu.Rngs(0)), "ragged=False"),
        (lambda: nn.SlotCache(plain, rngs=mu.Rngs(0)), "no caches"),
        (lambda: slots.truncate(-1), "cannot be rolled back"),
    ]:
        with pytest.raises(ArgumentError, match=text):
            use()
    assert mu.state(net, mu.Cache) == before


def served() -> Any:
    model = nn.MultiHeadAttention(2, 8, decode=True, rngs=mu.Rngs(0))
    model.init_cache((2, 16, 8), ragged=True)
    return model


def test_slots_that_are_no_slots_leave_all_as_it_is() -> None:
    model = served()
    slots = nn.SlotCache(model, rngs=mu.Rngs(1))
    request: Any = nn.MultiHeadAttention(2, 8, decode=True, rngs=mu.Rngs(0))
    request.init_cache((1, 8, 8))
    request(jnp.ones((1, 3, 8)))
    slots.insert(1, request)
    before = [np.asarray(x) for x in jax.tree.leaves(mu.state(model, mu.Cache))]
    mu.jit(lambda slots, request, slot: slots.insert(slot, request))(slots, request, jnp.int32(2))
    for wrong, shape in (((2, 1, 16, 8), None), ((16, 8), None), ((1, 8, 8), np.array([0, 1]))):
        other: Any = nn.MultiHeadAttention(2, 8, decode=True, rngs=mu.Rngs(0))
        other.init_cache(wrong)
        with pytest.raises(ArgumentError, match=r"do not fit into the slots|goes into one slot"):
            slots.insert(1 if shape is None else shape, other)
    for old, new in zip(before, jax.tree.leaves(mu.state(model, mu.Cache)), strict=True):
        np.testing.assert_array_equal(old, new)
    for number in (np.uint8(1), jnp.uint32(0), jnp.int16(1)):
        slots.insert(number, request)
    assert slots.lengths.tolist() == [3, 3]


def test_what_is_not_finite_goes_with_its_request() -> None:
    model, fresh = served(), served()
    slots = nn.SlotCache(model, rngs=mu.Rngs(1))
    model(jnp.full((2, 3, 8), jnp.nan))
    request: Any = nn.MultiHeadAttention(2, 8, decode=True, rngs=mu.Rngs(0))
    request.init_cache((1, 8, 8))
    request(jnp.ones((1, 2, 8)))
    slots.insert(0, request)
    slots.evict([1])
    fresh_slots = nn.SlotCache(fresh, rngs=mu.Rngs(1))
    fresh_slots.insert(0, request)
    np.testing.assert_allclose(model(jnp.ones((2, 1, 8))), fresh(jnp.ones((2, 1, 8))), rtol=1e-6)
    model(jnp.full((2, 3, 8), jnp.nan))
    model.cache.reset()
    assert bool(jnp.isfinite(model(jnp.ones((2, 1, 8)))).all())
