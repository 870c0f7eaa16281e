"""`RNN` and `Bidirectional` beside those of Flax NNX, streaming, lengths, draws, and bad input."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import initializers

import mutatis as mu
from mutatis import nn
from mutatis.errors import ArgumentError

from .test_recurrent import close, twins, waves

LENGTHS = np.array([4, 6])


def mask(time_major: bool) -> np.ndarray:
    inside = np.arange(6)[None] < LENGTHS[:, None]
    return (inside.T if time_major else inside)[..., None]


@pytest.mark.once
@pytest.mark.parametrize(
    "options",
    [
        {"return_carry": True},
        {"seq_lengths": LENGTHS, "return_carry": True},
        {"reverse": True},
        {"reverse": True, "keep_order": True, "return_carry": True},
        {"reverse": True, "keep_order": True, "seq_lengths": LENGTHS, "return_carry": True},
        {"reverse": True, "seq_lengths": LENGTHS},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("time_major", [False, True])
@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell"])
def test_beside_flax(name: str, time_major: bool, options: dict[str, Any]) -> None:
    from flax import nnx

    mine, others = twins(name)
    mine, others = nn.RNN(mine, time_major=time_major, unroll=2), nnx.RNN(others, time_major=time_major)
    x = waves(6, 2, 3) if time_major else waves(2, 6, 3)
    wanted = others(x, **options)
    close(mine(x, **options), wanted, atol=1e-6)
    close(mu.jit(lambda rnn, x: rnn(x, **options))(mine, x), wanted, atol=1e-6)


@pytest.mark.once
@pytest.mark.parametrize("time_major", [False, True])
def test_both_ways_beside_flax(time_major: bool) -> None:
    from flax import nnx

    pairs = [twins("GRUCell", seed) for seed in range(2)]
    mine = nn.Bidirectional(*(nn.RNN(cell) for cell, _ in pairs), time_major=time_major)
    others = nnx.Bidirectional(*(nnx.RNN(cell) for _, cell in pairs), time_major=time_major)
    x = waves(6, 2, 3) if time_major else waves(2, 6, 3)
    for options in ({}, {"seq_lengths": LENGTHS, "return_carry": True}, {"initial_carry": (waves(2, 4), waves(2, 4))}):
        close(mine(x, **options), others(x, **options), atol=1e-6)
    added = nn.Bidirectional(mine.forward_rnn, mine.backward_rnn, merge_fn=jnp.add, time_major=time_major)
    np.testing.assert_allclose(added(x), sum(jnp.split(mine(x), 2, -1)), rtol=1e-6)


@pytest.mark.once
def test_carries_are_drawn_as_in_flax() -> None:
    from flax import nnx

    with pytest.warns(UserWarning, match="carry_init"):
        mine, others = twins("LSTMCell", carry_init=initializers.normal(1.0))
    x = waves(2, 6, 3)
    for one, other in [
        (nn.RNN(mine), nnx.RNN(others)),
        (nn.RNN(mine, rngs=mu.Rngs(3)), nnx.RNN(others, rngs=nnx.Rngs(3))),
    ]:
        for _ in range(2):  # another draw each time
            close(one(x), other(x), atol=1e-6)
        close(one(x, rngs=mu.Rngs(1, carry=2)), other(x, rngs=nnx.Rngs(1, carry=2)), atol=1e-6)


def test_carries_of_zeros_need_no_stream() -> None:
    rnn = nn.RNN(nn.GRUCell(3, 4, rngs=mu.Rngs(0)))
    assert not mu.variables(rnn, mu.RngState)
    both = nn.Bidirectional(rnn, nn.RNN(nn.GRUCell(3, 4, rngs=mu.Rngs(1))))
    assert not mu.variables(both, mu.RngState)


@pytest.mark.parametrize("name", ["SimpleCell", "OptimizedLSTMCell"])
def test_streaming(name: str) -> None:
    cell = getattr(nn, name)(3, 4, rngs=mu.Rngs(0))
    whole, stream = nn.RNN(cell), nn.RNN(cell, stateful=True)
    x = waves(2, 6, 3)
    run = mu.jit(stream)
    for _ in range(2):
        mu.reset(stream, mu.Hidden, batch_shape=(2,))
        parts = [run(x[:, :2]), stream(x[:, 2:3]), run(x[:, 3:5]), cell(x[:, 5])[:, None]]
        close(jnp.concatenate(parts, 1), whole(x), atol=1e-6)
    before = cell.carry.value
    stream(x, stateful=False)
    close(cell.carry.value, before)


def test_streams_that_end_keep_what_they_remember() -> None:
    rnn = nn.RNN(nn.GRUCell(3, 4, rngs=mu.Rngs(0)), stateful=True)
    mu.reset(rnn, mu.Hidden, batch_shape=2)
    x = waves(2, 6, 3)
    rnn(x, seq_lengths=jnp.array([0, 4]))
    carry, _ = rnn(x[1], stateful=False, seq_lengths=4, return_carry=True)
    close(rnn.cell.carry.value, jnp.stack([jnp.zeros(4), carry]), atol=1e-6)


def test_padding_changes_nothing() -> None:
    rnn = nn.RNN(nn.LSTMCell(3, 4, rngs=mu.Rngs(0)), return_carry=True)
    x = waves(2, 6, 3)
    broken = jnp.where(mask(False), x, jnp.nan)

    def loss(rnn: Any, x: jax.Array) -> jax.Array:
        (c, _), y = rnn(x, seq_lengths=LENGTHS)
        return jnp.sum(c) + jnp.sum(y, where=mask(False))

    for options in ({}, {"reverse": True, "keep_order": True}):
        one, other = rnn(x, seq_lengths=LENGTHS, **options), rnn(broken, seq_lengths=LENGTHS, **options)
        close(one[0], other[0])
        np.testing.assert_array_equal(jnp.where(mask(False), one[1], 0), jnp.where(mask(False), other[1], 0))
    assert float(loss(rnn, x)) == float(loss(rnn, broken))
    close(mu.grad(loss)(rnn, x), mu.grad(loss)(rnn, jnp.where(mask(False), x, 7.0)), atol=1e-6)


def test_several_batch_axes_and_none() -> None:
    rnn = nn.RNN(nn.GRUCell(3, 4, rngs=mu.Rngs(0)))
    x = waves(2, 3, 6, 3)
    lengths = jnp.array([[6, 1, 2], [3, 4, 5]])
    carry, y = rnn(x, seq_lengths=lengths, return_carry=True, reverse=True)
    flat, z = rnn(x.reshape(6, 6, 3), seq_lengths=lengths.ravel(), return_carry=True, reverse=True)
    close((carry.reshape(6, 4), y.reshape(6, 6, 4)), (flat, z), atol=1e-6)
    close(rnn(x)[1, 2], rnn(x[1, 2]), atol=1e-6)
    assert rnn(x[:, :, :0]).shape == (2, 3, 0, 4)


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_beside_plain_jax(reverse: bool) -> None:
    rnn = nn.RNN(nn.GRUCell(3, 4, rngs=mu.Rngs(0)), reverse=reverse, keep_order=True)
    x = waves(2, 6, 3)
    definition, params, rest = mu.split(rnn.cell, mu.Param, ...)

    def by_hand(params: Any, x: jax.Array) -> jax.Array:
        def body(h: jax.Array, x: jax.Array) -> Any:
            pure, state = mu.functionalize(mu.merge(definition, params, rest))
            return pure(state, h, x)[0]

        return jnp.sum(jax.lax.scan(body, jnp.zeros((2, 4)), x.swapaxes(0, 1), reverse=reverse)[1] ** 2)

    wanted = jax.grad(by_hand, (0, 1))(params, x)
    for transform in (lambda f: f, mu.jit):
        got = transform(mu.grad(lambda cell, x: jnp.sum(rnn(x) ** 2), argnums=(0, 1)))(rnn.cell, x)
        close(got, wanted, atol=1e-5)


def test_nets_in_lanes_and_under_remat() -> None:
    def make(rngs: mu.Rngs) -> nn.RNN:
        return nn.RNN(nn.LSTMCell(3, 4, rngs=rngs))

    x = waves(2, 6, 3)
    rnns = mu.vmap(make)(mu.Rngs(0).split(3))
    out = mu.jit(mu.vmap(lambda rnn: rnn(x)))(rnns)
    one = make(mu.Rngs(0))
    mu.update(one, mu.state(rnns, mu.Param).map(lambda path, value: value[2]))
    close(out[2], one(x), atol=1e-6)
    close(mu.grad(lambda rnn: jnp.sum(mu.remat(rnn)(x)))(one), mu.grad(lambda rnn: jnp.sum(rnn(x)))(one), atol=1e-6)


class Dropping(nn.RNNCellBase):
    """Drops its input."""

    def __init__(self) -> None:
        self.drop = nn.Dropout(0.5, rngs=mu.Rngs(0))

    def __call__(self, carry: Any, inputs: Any) -> Any:  # type: ignore[override]
        return carry, self.drop(inputs)

    def initialize_carry(self, input_shape: Any, rngs: Any = None, carry_init: Any = None) -> Any:
        return jnp.zeros(())


def test_steps_draw_numbers_of_their_own_or_the_same() -> None:
    x = jnp.ones((6, 16))
    own, shared = nn.RNN(Dropping(), rngs=False), nn.RNN(Dropping(), broadcast_rngs="rngs", rngs=False)
    for rnn, alike in ((own, False), (shared, True)):
        y, z = rnn(x), mu.jit(rnn)(x)
        assert bool((y == y[:1]).all()) is alike
        assert not np.array_equal(y, z), "another call draws other numbers"


def test_eager_calls_compile_once(traces: Any) -> None:
    rnn = nn.RNN(nn.GRUCell(3, 4, rngs=mu.Rngs(0)), stateful=True)
    mu.reset(rnn, mu.Hidden, batch_shape=2)
    rnn(waves(2, 6, 3), seq_lengths=LENGTHS)
    with traces.compilations() as compiled:
        for _ in range(3):
            rnn(waves(2, 6, 3), seq_lengths=LENGTHS)
    assert compiled.count == 0


@pytest.mark.parametrize(("batch_dims", "time_major"), [(1, False), (1, True), (2, False)])
def test_flipping_twice_changes_nothing(batch_dims: int, time_major: bool) -> None:
    x = waves(*(6, 2, 3) if time_major else (2, 6, 3) if batch_dims == 1 else (2, 1, 6, 3))
    lengths = jnp.array([0, 5]).reshape([2, 1][:batch_dims])
    flipped = nn.flip_sequences(x, lengths, batch_dims, time_major)
    assert not np.array_equal(flipped, x)
    np.testing.assert_array_equal(nn.flip_sequences(flipped, lengths, batch_dims, time_major), x)
    axis = 0 if time_major else batch_dims
    np.testing.assert_array_equal(nn.flip_sequences(x, None, batch_dims, time_major), jnp.flip(x, axis))


# -- bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "got"),
    [
        ([4, 7], "7 for sequence 1"),
        ([-1, 2], "-1 for sequence 0"),
        ([9, 7], "9 for sequence 0, 7 for sequence 1"),
        ([4], r"int32s of shape \(1,\)"),
        ([[4, 6]], r"int32s of shape \(1, 2\)"),
        ([4.0, 6.0], r"float32s of shape \(2,\)"),
        (3, r"int32s of shape \(\)"),
    ],
    ids=["long", "negative", "both long", "few", "axes", "floats", "one"],
)
@pytest.mark.parametrize("user", ["RNN", "flip_sequences"])
def test_lengths_that_do_not_fit(lengths: Any, got: str, user: str) -> None:
    x = waves(2, 6, 3)
    text = rf"(?s)lengths of sequences do not fit the input of `nn.{user}`.*from 0 to 6, of shape \(2,\).*got: *{got}"
    with pytest.raises(ArgumentError, match=text):
        if user == "RNN":
            nn.RNN(nn.SimpleCell(3, 4, rngs=mu.Rngs(0)))(x, seq_lengths=jnp.asarray(lengths))
        else:
            nn.flip_sequences(x, jnp.asarray(lengths), 1, False)


def test_many_and_single_lengths_that_do_not_fit() -> None:
    rnn = nn.RNN(nn.SimpleCell(3, 4, rngs=mu.Rngs(0)))
    with pytest.raises(ArgumentError, match="9 for sequence 3, 9 for sequence 4, 9 for sequence 5, and 14 more"):
        rnn(waves(20, 6, 3), seq_lengths=np.array([1, 2, 3] + [9] * 17))
    with pytest.raises(ArgumentError, match=r"got: *8\n"):
        rnn(waves(6, 3), seq_lengths=8)


def test_a_length_that_no_check_sees_counts_as_the_whole_sequence() -> None:
    rnn, x = nn.RNN(nn.SimpleCell(3, 4, rngs=mu.Rngs(0)), reverse=True), waves(2, 6, 3)
    run = mu.jit(lambda x, lengths: rnn(x, seq_lengths=lengths, return_carry=True))
    for got, wanted in zip(run(x, jnp.array([9, 2])), run(x, jnp.array([6, 2])), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_inputs_that_do_not_fit() -> None:
    rnn = nn.RNN(nn.GRUCell(3, 4, rngs=mu.Rngs(0)))
    with pytest.raises(ArgumentError, match=r"without an axis for time"):
        rnn(waves(3))
    with pytest.raises(ArgumentError, match=r"(?s)cell.dense_i.kernel.*with 3 features"):
        rnn(waves(2, 6, 5))
    with pytest.raises(ArgumentError, match=r"(?s)runs a recurrent cell.*nn.GRUCell"):
        nn.RNN(nn.Linear(3, 4, rngs=mu.Rngs(0)))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64])
def test_lengths_of_narrow_dtypes(dtype: Any) -> None:
    net = nn.RNN(nn.GRUCell(2, 3, rngs=mu.Rngs(0)))
    x, lengths = jnp.sin(jnp.arange(1200.0)).reshape(2, 300, 2), np.array([100, 200])
    carry, _ = net(x, seq_lengths=lengths, return_carry=True)
    again, _ = net(x, seq_lengths=lengths.astype(dtype), return_carry=True)
    np.testing.assert_array_equal(again, carry)
    flipped = [nn.flip_sequences(x, given, 1, False) for given in (lengths, lengths.astype(dtype))]
    np.testing.assert_array_equal(*flipped)
