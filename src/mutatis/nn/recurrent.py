"""Recurrent cells: one step of a recurrent net. `RNN` of `nn.sequences` runs them over sequences.

What a cell remembers, its *carry*, goes in and out, ``carry, y = cell(carry, x)``, or it lives in the model:
``y = cell(x)`` goes on from the `Hidden` state `cell.carry` and writes it, which `mu.reset` starts anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer, orthogonal, zeros
from jax.typing import DTypeLike

from mutatis.model.kinds import RngState
from mutatis.nn.carries import Carry, Cell
from mutatis.nn.layers import NO_METADATA, Metadata, PromoteDtype, alike, promote_dtype, total
from mutatis.nn.linear import Linear, default_kernel_init
from mutatis.random import Rngs

Activation: TypeAlias = Callable[[jax.Array], jax.Array]


def orthogonal_kernel_init(key: Any, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
    """An orthogonal matrix, made in float32, for which there are decompositions, and then converted."""
    return orthogonal()(key, shape).astype(dtype)


class SimpleCell(Cell):
    """A cell that remembers its output: ``h' = tanh(dense_i(x) + dense_h(h))``.

    Args:
      in_features: the size of the last axis of the input.
      hidden_features: the size of the last axis of the output.
      dtype: the dtype to compute in; None takes what the input and the parameters promote to.
      param_dtype: the dtype of the parameters and of the carry to start from.
      carry_init: makes the carry to start from; None is zeros.
      residual: whether `h` is added before the activation.
      activation_fn: the activation.
      kernel_init: makes the kernel for the input, an initializer of `jax.nn.initializers`.
      recurrent_kernel_init: makes the kernel for `h`.
      bias_init: makes the bias.
      promote_dtype: as in `Linear`.
      keep_rngs: whether the cell keeps a random stream for `initialize_carry`, forked from `carry`.
      rngs: random streams, of which `params` is drawn from.
      kernel_metadata, recurrent_kernel_metadata, bias_metadata: metadata of the parameters, such as
        ``{"sharding": ("embed", "mlp")}``.

    Attributes:
      dense_h: Linear from `hidden_features` to `hidden_features`, without a bias.
      dense_i: Linear from `in_features` to `hidden_features`.
      carry: Hidden of shape (*batch, hidden_features).

    Raises:
      RandomStreamError: there is no stream to draw the parameters from.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> cell = mu.nn.SimpleCell(2, 3, rngs=mu.Rngs(0))
      >>> x = jnp.ones((4, 2))
      >>> h, y = cell(cell.initialize_carry(x.shape), x)
      >>> bool((cell(x) == y).all()), cell.carry.shape
      (True, (4, 3))
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        dtype: DTypeLike | None = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        carry_init: Initializer | None = None,
        residual: bool = False,
        activation_fn: Activation = jax.nn.tanh,
        kernel_init: Initializer = default_kernel_init,
        recurrent_kernel_init: Initializer = orthogonal_kernel_init,
        bias_init: Initializer = zeros,
        promote_dtype: PromoteDtype = promote_dtype,
        keep_rngs: bool = False,
        rngs: Rngs,
        kernel_metadata: Metadata = NO_METADATA,
        recurrent_kernel_metadata: Metadata = NO_METADATA,
        bias_metadata: Metadata = NO_METADATA,
    ) -> None:
        self._settle(in_features, hidden_features, dtype, param_dtype, carry_init, keep_rngs, rngs)
        self.residual = residual
        self.activation_fn = activation_fn
        shared: dict[str, Any] = {
            "dtype": dtype,
            "param_dtype": param_dtype,
            "promote_dtype": promote_dtype,
            "rngs": rngs,
        }
        self.dense_h = Linear(
            hidden_features,
            hidden_features,
            use_bias=False,
            kernel_init=recurrent_kernel_init,
            kernel_metadata=recurrent_kernel_metadata,
            **shared,
        )
        self.dense_i = Linear(
            in_features,
            hidden_features,
            kernel_init=kernel_init,
            bias_init=bias_init,
            kernel_metadata=kernel_metadata,
            bias_metadata=bias_metadata,
            **shared,
        )
        self.carry = self._own_carry()

    def _step(self, h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = total(self.dense_i(x), self.dense_h(h))
        h = self.activation_fn(total(y, h) if self.residual else y)
        return h, h


class LSTMCell(Cell):
    """A long short-term memory: gates say what is kept, taken in and given out.

    With a linear map of `x` and one of `h` for each of them::

        i, f, o = sigmoid(ii(x) + hi(h)), sigmoid(if_(x) + hf(h)), sigmoid(io(x) + ho(h))
        c' = f * c + i * tanh(ig(x) + hg(h))
        h' = o * tanh(c')

    The carry is the pair ``(c, h)``, the output `h`.

    Args:
      in_features: the size of the last axis of the input.
      hidden_features: the size of the last axis of the output.
      gate_fn: the activation of the gates.
      activation_fn: the activation of the memory and the output.
      kernel_init: makes the kernels for the input, an initializer of `jax.nn.initializers`.
      recurrent_kernel_init: makes the kernels for `h`.
      bias_init: makes the biases, which the maps of `h` have.
      dtype, param_dtype, carry_init, promote_dtype, keep_rngs, rngs, kernel_metadata, recurrent_kernel_metadata,
        bias_metadata: as in `SimpleCell`; without `dtype` it takes what the input and the parameters promote to.

    Attributes:
      ii, if_, ig, io: Linear from `in_features` to `hidden_features`, without a bias.
      hi, hf, hg, ho: Linear from `hidden_features` to `hidden_features`.
      carry: Hidden, a pair of arrays of shape (*batch, hidden_features).

    Raises:
      RandomStreamError: there is no stream to draw the parameters from.

    Source:
      Hochreiter and Schmidhuber, Long Short-Term Memory, 1997, https://doi.org/10.1162/neco.1997.9.8.1735

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> cell = mu.nn.LSTMCell(2, 3, rngs=mu.Rngs(0))
      >>> (c, h), y = cell(cell.initialize_carry((4, 2)), jnp.ones((4, 2)))
      >>> c.shape, bool((h == y).all())
      ((4, 3), True)
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        gate_fn: Activation = jax.nn.sigmoid,
        activation_fn: Activation = jax.nn.tanh,
        kernel_init: Initializer = default_kernel_init,
        recurrent_kernel_init: Initializer = orthogonal_kernel_init,
        bias_init: Initializer = zeros,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        carry_init: Initializer | None = None,
        promote_dtype: PromoteDtype = promote_dtype,
        keep_rngs: bool = False,
        rngs: Rngs,
        kernel_metadata: Metadata = NO_METADATA,
        recurrent_kernel_metadata: Metadata = NO_METADATA,
        bias_metadata: Metadata = NO_METADATA,
    ) -> None:
        self._settle(in_features, hidden_features, dtype, param_dtype, carry_init, keep_rngs, rngs)
        self.gate_fn = gate_fn
        self.activation_fn = activation_fn
        shared: dict[str, Any] = {
            "dtype": dtype,
            "param_dtype": param_dtype,
            "promote_dtype": promote_dtype,
            "rngs": rngs,
        }
        of_input = {"use_bias": False, "kernel_init": kernel_init, "kernel_metadata": kernel_metadata, **shared}
        of_hidden = {
            "kernel_init": recurrent_kernel_init,
            "bias_init": bias_init,
            "kernel_metadata": recurrent_kernel_metadata,
            "bias_metadata": bias_metadata,
            **shared,
        }
        self._make_maps(of_input, of_hidden)
        self.carry = self._own_carry(states=2)

    def _make_maps(self, of_input: dict[str, Any], of_hidden: dict[str, Any]) -> None:
        size = self.hidden_features
        self.ii, self.if_, self.ig, self.io = (Linear(self.in_features, size, **of_input) for _ in range(4))
        self.hi, self.hf, self.hg, self.ho = (Linear(size, size, **of_hidden) for _ in range(4))

    def _maps(self, x: jax.Array, h: jax.Array) -> list[jax.Array]:
        """What goes into the gates, in the order i, f, g, o."""
        pairs = ((self.ii, self.hi), (self.if_, self.hf), (self.ig, self.hg), (self.io, self.ho))
        return [total(of_input(x), of_hidden(h)) for of_input, of_hidden in pairs]

    def _step(self, carry: Carry, x: jax.Array) -> tuple[Carry, jax.Array]:
        c, h = carry
        i, f, g, o = self._maps(x, h)
        c, i, f, g = alike(c, self.gate_fn(i), self.gate_fn(f), self.activation_fn(g))
        c = f * c + i * g
        o, out = alike(self.gate_fn(o), self.activation_fn(c))
        h = o * out
        return (c, h), h

    def initialize_carry(
        self, input_shape: tuple[int, ...], rngs: Rngs | RngState | None = None, carry_init: Initializer | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """A carry to start from: ``(c, h)``, arrays of shape (*batch, hidden_features).

        Args:
          input_shape, rngs, carry_init: as in `RNNCellBase`.

        Raises:
          RandomStreamError: the initializer may draw, and there is no stream to draw from.
        """
        return self._initial(input_shape, rngs, carry_init), self._initial(input_shape, rngs, carry_init)


class OptimizedLSTMCell(LSTMCell):
    """An `LSTMCell` whose four maps of the input are one, and likewise those of `h`: fewer, larger products.

    The parameters are those of `LSTMCell` side by side, in the order i, f, g, o.

    Args:
      in_features, hidden_features, ...: as in `LSTMCell`.

    Attributes:
      dense_i: Linear from `in_features` to ``4 * hidden_features``, without a bias.
      dense_h: Linear from `hidden_features` to ``4 * hidden_features``.
      carry: Hidden, a pair of arrays of shape (*batch, hidden_features).

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> cell = mu.nn.OptimizedLSTMCell(2, 3, rngs=mu.Rngs(0))
      >>> [cell(jnp.ones((4, 2))).shape for _ in range(2)], [h.shape for h in cell.carry.value]
      ([(4, 3), (4, 3)], [(4, 3), (4, 3)])
    """

    def _make_maps(self, of_input: dict[str, Any], of_hidden: dict[str, Any]) -> None:
        self.dense_i = Linear(self.in_features, 4 * self.hidden_features, **of_input)
        self.dense_h = Linear(self.hidden_features, 4 * self.hidden_features, **of_hidden)

    def _maps(self, x: jax.Array, h: jax.Array) -> list[jax.Array]:
        return jnp.split(total(self.dense_i(x), self.dense_h(h)), 4, axis=-1)


class GRUCell(Cell):
    """A gated recurrent unit: one gate says how much is new, another how much of the old goes into it.

    With one map of `x` and one of `h`, cut in three::

        r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
        h' = (1 - z) * tanh(x_n + r * h_n) + z * h

    Args:
      in_features: the size of the last axis of the input.
      hidden_features: the size of the last axis of the output.
      gate_fn: the activation of the gates.
      activation_fn: the activation of what is new.
      kernel_init: makes the kernel for the input, an initializer of `jax.nn.initializers`.
      recurrent_kernel_init: makes the kernel for `h`.
      bias_init: makes the bias, which the map of the input has.
      dtype, param_dtype, carry_init, promote_dtype, keep_rngs, rngs, kernel_metadata, recurrent_kernel_metadata,
        bias_metadata: as in `SimpleCell`; without `dtype` it takes what the input and the parameters promote to.

    Attributes:
      dense_i: Linear from `in_features` to ``3 * hidden_features``, in the order r, z, n.
      dense_h: Linear from `hidden_features` to ``3 * hidden_features``, without a bias.
      carry: Hidden of shape (*batch, hidden_features).

    Raises:
      RandomStreamError: there is no stream to draw the parameters from.

    Source:
      Cho et al., Learning Phrase Representations using RNN Encoder-Decoder, 2014, https://arxiv.org/abs/1406.1078

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> cell = mu.nn.GRUCell(2, 3, rngs=mu.Rngs(0))
      >>> mu.reset(cell, mu.Hidden, batch_shape=(4,))
      >>> mu.for_loop(cell, jnp.ones((5, 4, 2))).shape  # it goes on from step to step
      (5, 4, 3)
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        gate_fn: Activation = jax.nn.sigmoid,
        activation_fn: Activation = jax.nn.tanh,
        kernel_init: Initializer = default_kernel_init,
        recurrent_kernel_init: Initializer = orthogonal_kernel_init,
        bias_init: Initializer = zeros,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        carry_init: Initializer | None = None,
        promote_dtype: PromoteDtype = promote_dtype,
        keep_rngs: bool = False,
        rngs: Rngs,
        kernel_metadata: Metadata = NO_METADATA,
        recurrent_kernel_metadata: Metadata = NO_METADATA,
        bias_metadata: Metadata = NO_METADATA,
    ) -> None:
        self._settle(in_features, hidden_features, dtype, param_dtype, carry_init, keep_rngs, rngs)
        self.gate_fn = gate_fn
        self.activation_fn = activation_fn
        shared: dict[str, Any] = {
            "dtype": dtype,
            "param_dtype": param_dtype,
            "promote_dtype": promote_dtype,
            "rngs": rngs,
        }
        self.dense_i = Linear(
            in_features,
            3 * hidden_features,
            kernel_init=kernel_init,
            bias_init=bias_init,
            kernel_metadata=kernel_metadata,
            bias_metadata=bias_metadata,
            **shared,
        )
        self.dense_h = Linear(
            hidden_features,
            3 * hidden_features,
            use_bias=False,
            kernel_init=recurrent_kernel_init,
            kernel_metadata=recurrent_kernel_metadata,
            **shared,
        )
        self.carry = self._own_carry()

    def _step(self, h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        given, kept = alike(self.dense_i(x), self.dense_h(h))
        x_r, x_z, x_n = jnp.split(given, 3, axis=-1)
        h_r, h_z, h_n = jnp.split(kept, 3, axis=-1)
        r, z = self.gate_fn(x_r + h_r), self.gate_fn(x_z + h_z)
        new = self.activation_fn(x_n + r * h_n)
        new, z, h = alike(new, z, h)
        h = (1.0 - z) * new + z * h
        return h, h
