"""Recurrent cells beside those of Flax NNX with the same draws and weights, the carry that lives in the model, and bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import initializers

import mutatis as mu
from mutatis import nn
from mutatis.errors import ArgumentError, RandomStreamError

CELLS = ["SimpleCell", "LSTMCell", "OptimizedLSTMCell", "GRUCell"]


def waves(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.sin(jnp.arange(np.prod(shape), dtype=jnp.float32)).reshape(shape).astype(dtype)


def twins(name: str, seed: int = 0, **options: Any) -> tuple[Any, Any]:
    """A cell here and one of Flax, made of the same seed."""
    nnx = pytest.importorskip("flax.nnx")
    options = {"bias_init": initializers.normal(0.5), **options}
    return getattr(nn, name)(3, 4, rngs=mu.Rngs(seed), **options), getattr(nnx, name)(
        3, 4, rngs=nnx.Rngs(seed), **options
    )


def of_flax(model: Any) -> dict[tuple[Any, ...], jax.Array]:
    """The parameters of a model of Flax by path."""
    from flax import nnx

    return {tuple(path): value[...] for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def close(mine: Any, others: Any, **tolerance: float) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), mine, others)


# -- the same as Flax ------------------------------------------------------------------------------------------------


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "param_dtype"),
    [
        *((name, jnp.float32) for name in CELLS),
        ("LSTMCell", jnp.bfloat16),
    ],  # in others Flax cannot make orthogonal bfloat16
)
def test_draws(name: str, param_dtype: Any) -> None:
    mine, others = twins(name, param_dtype=param_dtype)
    mine, others = mu.state(mine, mu.Param).flat(), of_flax(others)
    assert mine.keys() == others.keys()
    for path, value in mine.items():
        np.testing.assert_array_equal(value, others[path], err_msg=str(path))


@pytest.mark.once
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(None, 1e-6), (jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)], ids=["none", "f32", "bf16"]
)
@pytest.mark.parametrize("name", CELLS)
def test_a_step_and_its_gradient(name: str, dtype: Any, tolerance: float) -> None:
    from flax import nnx

    mine, others = twins(name, dtype=dtype)
    x = waves(2, 3)
    carry = jax.tree.map(lambda h: h + waves(2, 4), mine.initialize_carry(x.shape))
    for run in (lambda f: f, mu.jit):
        with jax.numpy_dtype_promotion("standard"):  # Flax promotes what is remembered
            wanted = others(carry, x)
        got = run(lambda carry, x: mine(carry, x))(carry, x)
        assert [h.dtype for h in jax.tree.leaves(got)] == [h.dtype for h in jax.tree.leaves(wanted)]
        close(got, wanted, atol=tolerance)
    grads = mu.grad(lambda cell: jnp.sum(cell(carry, x)[1] ** 2))(mine).flat()
    with jax.numpy_dtype_promotion("standard"):
        wanted = of_flax_state(nnx.grad(lambda cell: jnp.sum(cell(carry, x)[1] ** 2))(others))
    for path, grad in grads.items():
        np.testing.assert_allclose(grad, wanted[path], atol=20 * tolerance, err_msg=str(path))


def of_flax_state(state: Any) -> dict[tuple[Any, ...], jax.Array]:
    from flax import nnx

    return {tuple(path): value[...] for path, value in nnx.to_flat_state(state)}


@pytest.mark.once
def test_a_residual_cell_and_other_activations() -> None:
    with jax.numpy_dtype_promotion("standard"):
        mine, others = twins("SimpleCell", residual=True, activation_fn=jax.nn.relu)
        close(mine(waves(2, 4), waves(2, 3)), others(waves(2, 4), waves(2, 3)), atol=1e-6)
        mine, others = twins("GRUCell", gate_fn=jax.nn.hard_sigmoid, activation_fn=jnp.sin)
        close(mine(waves(2, 4), waves(2, 3)), others(waves(2, 4), waves(2, 3)), atol=1e-6)


@pytest.mark.once
@pytest.mark.parametrize("name", CELLS)
def test_carries_are_drawn_alike(name: str) -> None:
    from flax import nnx

    mine, others = twins(name)
    init = initializers.normal(1.0)
    close(
        mine.initialize_carry((2, 3), mu.Rngs(5), init), others.initialize_carry((2, 3), nnx.Rngs(5), init), rtol=1e-6
    )


def test_the_two_kinds_of_lstm_are_one() -> None:
    plain, fused = nn.LSTMCell(3, 4, rngs=mu.Rngs(0)), nn.OptimizedLSTMCell(3, 4, rngs=mu.Rngs(1))
    for side, maps in {"dense_i": "ii if_ ig io", "dense_h": "hi hf hg ho"}.items():
        parts = [getattr(plain, name) for name in maps.split()]
        getattr(fused, side).kernel.value = jnp.concatenate([part.kernel.value for part in parts], -1)
    carry = (waves(2, 4), waves(2, 4) / 2)
    close(fused(carry, waves(2, 3)), plain(carry, waves(2, 3)), atol=1e-6)


# -- the carry that lives in the model ----------------------------------------------------------------------------------


def by_hand(cell: Any, xs: jax.Array) -> tuple[Any, jax.Array]:
    carry, ys = cell.initialize_carry(xs.shape[1:]), []
    for x in xs:
        carry, y = cell(carry, x)
        ys.append(y)
    return carry, jnp.stack(ys)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("how", ["eager", "jit of for_loop"])
def test_step_by_step(name: str, how: str) -> None:
    cell = getattr(nn, name)(3, 4, rngs=mu.Rngs(0))
    xs = waves(5, 2, 3)
    carry, wanted = by_hand(cell, xs)
    run: Callable[..., Any] = {
        "eager": lambda xs: jnp.stack([cell(x) for x in xs]),
        "jit of for_loop": mu.jit(lambda xs: mu.for_loop(cell, xs)),
    }[how]
    for _ in range(2):  # the second time starts anew
        mu.reset(cell, mu.Hidden, batch_shape=(2,))
        close(run(xs), wanted, atol=1e-6)
        close(cell.carry.value, carry, atol=1e-6)


def test_a_carry_handed_in_leaves_that_of_the_cell_alone() -> None:
    cell = nn.LSTMCell(3, 4, rngs=mu.Rngs(0))
    cell(waves(3))
    before = cell.carry.value
    cell(cell.initialize_carry((2, 3)), waves(2, 3))
    close(cell.carry.value, before)


def test_one_prompt_goes_on_in_many_ways() -> None:
    cell = nn.GRUCell(3, 4, rngs=mu.Rngs(0))
    cell(waves(3))
    (h,) = [cell.carry.value]
    many = waves(5, 3)
    close(cell(many), cell(jnp.broadcast_to(h, (5, 4)), many)[1])
    assert cell.carry.shape == (5, 4)


def test_lanes_have_carries_of_their_own() -> None:
    cells = mu.vmap(lambda rngs: nn.GRUCell(3, 4, rngs=rngs))(mu.Rngs(0).split(2))
    mu.reset(cells, mu.Hidden, batch_shape=(5,))
    assert cells.carry.shape == (2, 5, 4)
    x = waves(2, 5, 3)
    together = mu.vmap(lambda cell, x: cell(x))(cells, x)
    alone = nn.GRUCell(3, 4, rngs=mu.Rngs(0))
    mu.update(alone, mu.state(cells, mu.Param).map(lambda path, value: value[1]))
    close(together[1], alone(x[1]), atol=1e-6)
    close(cells.carry[1], alone.carry.value, atol=1e-6)


def test_gradients_through_time() -> None:
    cell = nn.GRUCell(3, 4, rngs=mu.Rngs(0))
    xs = waves(5, 2, 3)

    def loss(cell: Any) -> jax.Array:
        mu.reset(cell, mu.Hidden, batch_shape=(2,))
        return jnp.sum(mu.for_loop(cell, xs) ** 2)

    close(mu.grad(loss)(cell), mu.grad(lambda cell: jnp.sum(by_hand(cell, xs)[1] ** 2))(cell), atol=1e-5)


def test_an_error_in_the_middle_leaves_the_carry() -> None:
    cell = nn.GRUCell(3, 4, rngs=mu.Rngs(0))
    cell(waves(2, 3))
    before = cell.carry.value

    @mu.jit
    def fail(x: jax.Array) -> None:
        cell(x)
        raise KeyError

    with pytest.raises(KeyError):
        fail(waves(2, 3))
    close(cell.carry.value, before)


def test_a_carry_that_starts_elsewhere() -> None:
    cell = nn.LSTMCell(3, 4, carry_init=initializers.constant(0.5), rngs=mu.Rngs(0))
    close(cell.carry.value, (jnp.full(4, 0.5), jnp.full(4, 0.5)))
    cell(waves(2, 3))
    mu.reset(cell, mu.Hidden, batch_shape=(2,))
    close(cell.carry.value, (jnp.full((2, 4), 0.5), jnp.full((2, 4), 0.5)))
    kept = nn.GRUCell(3, 4, carry_init=initializers.normal(1.0), keep_rngs=True, rngs=mu.Rngs(0))
    one, other = kept.initialize_carry((2, 3)), kept.initialize_carry((2, 3))
    assert one.shape == (2, 4) and not np.allclose(one, other)


# -- bad input -----------------------------------------------------------------------------------------------------------


class Net(mu.Module):
    def __init__(self) -> None:
        self.cells = [nn.LSTMCell(3, 4, rngs=mu.Rngs(0))]


def test_another_batch() -> None:
    net = Net()
    mu.reset(net, mu.Hidden, batch_shape=(2,))
    with pytest.raises(ArgumentError) as caught:
        mu.jit(lambda net, x: net.cells[0](x))(net, waves(5, 3))
    text = str(caught.value)
    assert text.startswith("state `net.cells[0].carry` (Hidden) does not fit the input of its layer inside `jit(")
    assert "batch axes (2,)" in text and "got:      an input with the batch axes (5,)" in text
    assert "`mu.reset(model, mu.Hidden, batch_shape=(5,))`" in text
    mu.reset(net, mu.Hidden, batch_shape=(5,))
    assert net.cells[0](waves(5, 3)).shape == (5, 4)


def test_wrong_number_of_features() -> None:
    with pytest.raises(ArgumentError, match=r"(?s)cells\[0\].ii.kernel.*with 3 features.*\(2, 5\)"):
        mu.jit(lambda net: net.cells[0](waves(2, 5)))(Net())


def test_a_carry_that_is_drawn_needs_a_stream() -> None:
    cell = nn.GRUCell(3, 4, rngs=mu.Rngs(0))
    with pytest.raises(RandomStreamError, match=r"(?s)`nn.GRUCell` cannot draw a carry.*rngs=rngs"):
        cell.initialize_carry((2, 3), carry_init=initializers.normal(1.0))


def test_a_cell_without_a_carry_of_its_own() -> None:
    class Leaky(nn.RNNCellBase):
        def __call__(self, carry: Any, inputs: Any) -> Any:  # type: ignore[override]
            carry = 0.5 * carry + inputs
            return carry, carry

        def initialize_carry(self, input_shape: Any, rngs: Any = None, carry_init: Any = None) -> Any:
            return jnp.zeros(input_shape)

    x = waves(2, 5, 3)
    assert nn.RNN(Leaky())(x).shape == (2, 5, 3)
    with pytest.raises(ArgumentError, match=r"(?s)`Leaky` keeps no carry.*self.carry = mu.Hidden"):
        nn.RNN(Leaky(), stateful=True)(x)
    cell = Leaky()
    cell.carry = mu.Hidden(jnp.zeros(3), init=jnp.zeros(3))
    halves = [nn.RNN(cell, stateful=True)(part) for part in (x[:, :2], x[:, 2:])]
    close(jnp.concatenate(halves, 1), nn.RNN(Leaky())(x), atol=1e-6)


def test_carries_of_another_cell() -> None:
    x, pair, one = jnp.ones((2, 3)), (jnp.zeros((2, 4)), jnp.zeros((2, 4))), jnp.zeros((2, 4))
    rngs = mu.Rngs(0)
    for kind, wrong in (("LSTMCell", one), ("OptimizedLSTMCell", one), ("GRUCell", pair), ("SimpleCell", pair)):
        cell = getattr(nn, kind)(3, 4, rngs=rngs)
        with pytest.raises(ArgumentError, match="carry of another kind of cell"):
            cell(wrong, x)
        with pytest.raises(ArgumentError, match="carry of another kind of cell"):
            nn.RNN(cell)(x[:, None], initial_carry=wrong)
        carry, _ = cell(cell.initialize_carry(x.shape), x)
        assert jax.tree.structure(carry) == jax.tree.structure(pair if wrong is one else one)
