"""Random streams: fresh keys, named streams, and no key twice under any transform."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import errors


def data(keys: Any) -> list[tuple[int, ...]]:
    flat = np.asarray(jax.random.key_data(keys)).reshape(-1, 2)
    return [tuple(map(int, row)) for row in flat]


def unique(keys: Any, count: int) -> None:
    every = data(keys) if not isinstance(keys, list) else [k for part in keys for k in data(part)]
    assert len(every) == count
    assert len(set(every)) == count, "a key was used twice"


@pytest.mark.parametrize(
    "seed", [0, np.int32(0), jnp.int32(0), jax.random.key(0), jax.random.PRNGKey(0), np.uint32(0)], ids=repr
)
def test_seeds(seed: Any) -> None:
    assert data(mu.Rngs(seed)()) == data(mu.Rngs(0)())
    assert data(mu.Rngs(params=seed).params()) == data(mu.Rngs(params=0).params())


@pytest.mark.parametrize("bad", ["seed", 1.5, None, True, [0], jnp.zeros(2), jnp.array([0, 1])])
def test_bad_seeds(bad: Any) -> None:
    with pytest.raises(errors.RandomStreamError, match="random stream `dropout` cannot start from") as caught:
        mu.Rngs(dropout=bad)
    assert "`mu.Rngs(dropout=0)`" in str(caught.value)


def test_a_draw_advances_its_stream() -> None:
    rngs = mu.Rngs(0, dropout=1)
    first = [rngs.dropout() for _ in range(3)]
    unique(first, 3)
    assert data(first[0]) == data(jax.random.fold_in(jax.random.key(1), 0))
    assert int(rngs.dropout.value["count"]) == 3
    assert int(rngs.default.value["count"]) == 0


def test_unknown_names_use_the_default_stream() -> None:
    rngs = mu.Rngs(0)
    unique([rngs(), rngs.params(), rngs.noise()], 3)
    assert int(rngs.default.value["count"]) == 3
    assert "default" in rngs
    assert "noise" not in rngs
    named = mu.Rngs(params=0)
    with pytest.raises(errors.RandomStreamError, match="no random stream `dropout`, and no default") as caught:
        named.dropout()
    assert "got:      streams ['params']" in str(caught.value)
    eval("mu.Rngs(dropout=0)", {"mu": mu}).dropout()  # both cures
    eval("mu.Rngs(0)", {"mu": mu}).dropout()
    with pytest.raises(errors.RandomStreamError, match="`default`"):
        named()


def test_streams_of_other_names_and_seeds_differ() -> None:
    a, b = mu.Rngs(0), mu.Rngs(1)
    assert data(a()) != data(b())
    assert not hasattr(a, "__wrapped__")


NAMES = [
    "fork",
    "split",
    "stream",
    "streams",
    "training",
    "train",
    "eval",
    "self",
    "cls",
    "name",
    "value",
    "_watch",
    "in",
]


@pytest.mark.parametrize("name", NAMES)
def test_streams_of_any_name(name: str) -> None:
    def drawn(rngs: mu.Rngs) -> list[int]:
        return [data(getattr(rngs, name)()), data(rngs()), data(rngs.other())]

    expected = [data(mu.Rngs(x=1).x()), *(data(key) for key in (lambda r: [r(), r()])(mu.Rngs(0)))]
    rngs = mu.Rngs(0, **{name: 1})
    assert drawn(rngs) == expected
    assert name in rngs
    assert {*mu.state(rngs)} == {("streams", "default"), ("streams", name)}
    rngs = mu.Rngs(0, **{name: 1})
    assert data(mu.jit(lambda rngs: getattr(rngs, name)())(rngs)) == expected[0]
    copied = mu.clone(mu.Rngs(0, **{name: 1}))
    assert drawn(copied) == expected
    model = mu.Module()
    model.rngs = rngs
    mu.reseed(model, **{name: 5})
    model.eval().train()
    assert mu.nn.Dropout(0.5, rngs=rngs)(jnp.ones(3)).shape == (3,)


def test_names_that_streams_cannot_have() -> None:
    with pytest.raises(errors.RandomStreamError, match="`__call__`: Python gives such names a meaning"):
        mu.Rngs(0, __call__=1)
    mu.Rngs(call=0)


def test_fork_and_split() -> None:
    rngs = mu.Rngs(0, dropout=1)
    fork = rngs.fork()
    assert sorted(fork.streams) == ["default", "dropout"]
    unique([rngs(), fork(), rngs.dropout(), fork.dropout(), rngs.fork()()], 5)
    parts = rngs.split(4)
    assert parts.default.value["key"].shape == (4,)
    keys = mu.vmap(lambda r: r())(parts)
    unique([keys, rngs(), mu.vmap(lambda r: r())(parts), mu.vmap(lambda r: r.dropout())(parts)], 13)


def test_streams_are_states() -> None:
    rngs = mu.Rngs(0, dropout=1)
    assert [*mu.state(rngs)] == [("streams", "default"), ("streams", "dropout")]
    assert set(mu.state(rngs, "rngs")) == set(mu.state(rngs, mu.RngState))
    assert set(mu.state(rngs, "dropout")) == {("streams", "dropout")}
    assert "RngState" in repr(rngs)


@pytest.mark.parametrize("copied", [mu.clone, copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
def test_a_copy_continues_the_sequence(copied: Callable[[Any], Any]) -> None:
    rngs = mu.Rngs(0)
    rngs()
    other = copied(rngs)
    assert data(other()) == data(rngs())
    assert data(other()) == data(rngs())


# -- reseed ------------------------------------------------------------------------------------------------------


def test_reseed() -> None:
    model = mu.Module()
    model.rngs = mu.Rngs(0, dropout=1)
    model.layers = [mu.Rngs(0, dropout=1).fork(), mu.Rngs(0, dropout=1).fork()]
    mu.reseed(model, dropout=5)
    first = [m.dropout() for m in (model.rngs, *model.layers)]
    unique(first, 3)
    mu.reseed(model, dropout=5)
    assert [data(m.dropout()) for m in (model.rngs, *model.layers)] == [data(k) for k in first]
    assert data(model.rngs()) == data(mu.Rngs(0)()), "the others are left alone"
    mu.reseed(model, default=7)
    mu.reseed(model, mu.PathContains("rngs"), dropout=jax.random.key(3))
    with pytest.raises(errors.RandomStreamError, match="no random stream `noise`"):
        mu.reseed(model, noise=1)


def test_a_name_that_is_missing_reseeds_nothing() -> None:
    rngs = mu.Rngs(0, dropout=1)
    before = data(mu.clone(rngs).dropout())
    with pytest.raises(errors.RandomStreamError):
        mu.reseed(rngs, dropout=5, noise=1)
    assert data(rngs.dropout()) == before, "all or nothing"


def test_reseed_inside_jit() -> None:
    rngs = mu.Rngs(0)

    @mu.jit
    def step(seed: Any) -> Any:
        mu.reseed(rngs, default=seed)
        return rngs()

    assert data(step(3)) == data(step(3))
    assert data(step(4)) != data(step(3))


# -- under transforms --------------------------------------------------------------------------------------------


def test_jit_draws_what_eager_code_draws() -> None:
    eager, compiled = mu.Rngs(0), mu.Rngs(0)
    step = mu.jit(lambda r: (r(), r()))
    for _ in range(3):
        assert data(step(compiled)[0]) == data(eager())
        eager()
    assert data(compiled()) == data(eager())


TRANSFORMS: dict[str, Callable[[Any], Any]] = {
    "scan": lambda r: mu.scan(lambda c, _: (c, r()), None, length=4)[1],
    "for_loop": lambda r: mu.for_loop(lambda _: r(), jnp.arange(4)),
    "map": lambda r: mu.map(lambda _: r(), jnp.arange(4)),
    "map in batches": lambda r: mu.map(lambda _: r(), jnp.arange(4), batch_size=2),
    "map in uneven batches": lambda r: mu.map(lambda _: r(), jnp.arange(4), batch_size=3),
    "vmap": lambda r: mu.vmap(lambda _: r())(jnp.arange(4)),
    "vmap of vmap": lambda r: mu.vmap(mu.vmap(lambda _: r()))(jnp.zeros((2, 2))),
    "scan of vmap": lambda r: mu.for_loop(lambda _: mu.vmap(lambda _: r())(jnp.arange(2)), jnp.arange(2)),
    "vmap of scan": lambda r: mu.vmap(lambda _: mu.for_loop(lambda _: r(), jnp.arange(2)))(jnp.arange(2)),
    "vmap of cond": lambda r: mu.vmap(lambda x: mu.cond(x > 1, lambda: r(), lambda: r()))(jnp.arange(4)),
    "cond per lane, twice": lambda r: mu.vmap(
        lambda x: (mu.cond(x > 0, lambda: r(), lambda: jax.random.key(99)), r())[1]
    )(jnp.arange(4)),
    "remat": lambda r: jnp.stack([mu.remat(lambda: r())() for _ in range(4)]),
    "grad": lambda r: jnp.stack([mu.grad(lambda x: (x, r()), has_aux=True)(1.0)[1] for _ in range(4)]),
    "while_loop": lambda r: mu.while_loop(
        lambda c: c[0] < 4, lambda c: (c[0] + 1, c[1].at[c[0]].set(r())), (0, jax.random.split(jax.random.key(5), 4))
    )[1],
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("compiled", [False, True])
def test_no_key_is_used_twice(name: str, compiled: bool) -> None:
    rngs = mu.Rngs(0)
    function = TRANSFORMS[name]
    run = mu.jit(function) if compiled else function
    unique([rngs(), run(rngs), rngs(), run(rngs), rngs()], 11)


def test_shared_streams_draw_alike() -> None:
    rngs = mu.Rngs(0)
    keys = mu.vmap(lambda r, _: r(), in_axes=(mu.StateAxes({mu.RngState: mu.Shared}), 0))(rngs, jnp.arange(3))
    assert data(keys) == [data(mu.Rngs(0)())[0]] * 3
    keys = mu.vmap(lambda _: rngs(), states=mu.StateAxes({mu.RngState: mu.Shared}))(jnp.arange(3))
    assert len(set(data(keys))) == 1
    assert int(rngs.default.value["count"]) == 2


def test_the_stream_of_a_lane_is_documented() -> None:
    """Key `fold_in(fold_in(key, count), lane)`, count 0; outside one further if it was used."""
    rngs = mu.Rngs(7)
    rngs()
    keys = mu.vmap(lambda _: jnp.stack([rngs(), rngs()]))(jnp.arange(3))
    for lane in range(3):
        stream = jax.random.fold_in(jax.random.fold_in(jax.random.key(7), 1), lane)
        assert data(keys[lane]) == [data(jax.random.fold_in(stream, n))[0] for n in range(2)]
    assert int(rngs.default.value["count"]) == 2


def test_an_unused_stream_is_not_advanced() -> None:
    rngs = mu.Rngs(0, dropout=1)
    mu.vmap(lambda r, x: (r(), x)[1], in_axes=(None, 0))(rngs, jnp.arange(3))
    assert int(rngs.default.value["count"]) == 1
    assert int(rngs.dropout.value["count"]) == 0
    mu.cond(False, lambda: rngs.dropout(), lambda: jax.random.key(0))
    assert int(rngs.dropout.value["count"]) == 0


def test_remat_recomputes_with_the_same_draws() -> None:
    rngs = mu.Rngs(0)
    w = mu.Param(jnp.ones(8))

    def loss() -> Any:
        mask = jax.random.bernoulli(rngs(), 0.5, (8,)).astype(jnp.float32)
        return jnp.sum(jnp.sin(w.value) * mask)

    other = mu.Rngs(0)
    mask = jax.random.bernoulli(other(), 0.5, (8,)).astype(jnp.float32)
    gradient = mu.grad(mu.remat(loss), of=w)()[()]
    np.testing.assert_allclose(gradient, jnp.cos(jnp.ones(8)) * mask, rtol=1e-6)
    assert int(rngs.default.value["count"]) == 1


def test_an_ensemble_of_streams() -> None:
    rngs = mu.Rngs(0).split(3)
    first = mu.vmap(lambda r: r())(rngs)
    second = mu.vmap(lambda r: r())(rngs)
    unique([first, second], 6)
    np.testing.assert_array_equal(rngs.default.value["count"], [2, 2, 2])


def test_a_failing_call_does_not_advance() -> None:
    rngs = mu.Rngs(0)

    def fails(x: Any) -> Any:
        rngs()
        raise KeyError

    for transform in (mu.jit, mu.grad, mu.vmap):
        with pytest.raises(KeyError):
            transform(fails)(jnp.zeros(2))
    assert int(rngs.default.value["count"]) == 0
