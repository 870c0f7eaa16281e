"""Recurrent cells: one step of a recurrent net. `RNN` of `nn.sequences` runs them over sequences.

The memory of a cell, its *carry*, is an argument and a result, ``carry, y = cell(carry, x)``, or a state of the model:
``y = cell(x)`` goes on from the `Hidden` state `cell.carry` and writes it. `mu.reset` starts it anew.
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
    """A cell of a simple recurrent net (Elman net): one step of it. `nn.RNN` runs it over sequences.

    ``cell(carry, x)`` returns the next carry and the output. ``cell(x)`` goes on from the carry that the cell keeps, and
    returns the output only. The carry is an array `h`, and the output is the new `h`::

        h' = tanh(dense_i(x) + dense_h(h))

    Args:
      in_features: the size of the last axis of the input.
      hidden_features: the size of the last axis of the output.
      dtype: the dtype of the computation, float32 by default. None takes the common dtype of the input and the parameters.
      param_dtype: the dtype of the parameters and of the first carry.
      carry_init: the initializer of the first carry, as those of `jax.nn.initializers`. None takes zeros.
      residual: whether `h` is added before the activation.
      activation_fn: the activation.
      kernel_init: the initializer of the kernel for the input, as those of `jax.nn.initializers`.
      recurrent_kernel_init: the initializer of the kernel for `h`.
      bias_init: the initializer of the bias.
      promote_dtype: the function that brings the input, kernel and bias of a linear map to one dtype, as in `Linear`.
      keep_rngs: whether the cell has a random stream of its own, forked from `carry`, for first carries that are drawn.
      rngs: random streams; the parameters are drawn from the stream `params`.
      kernel_metadata, recurrent_kernel_metadata, bias_metadata: metadata of the parameters, such as
        ``{"sharding": ("embed", "mlp")}``.

    Attributes:
      dense_i: Linear from `in_features` to `hidden_features`.
      dense_h: Linear from `hidden_features` to `hidden_features`, without a bias.
      carry: Hidden of shape (*batch, hidden_features), the carry that the cell keeps.

    Raises:
      RandomStreamError: there is no stream to draw the parameters from.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> cell = mu.nn.SimpleCell(2, 3, rngs=mu.Rngs(0))
      >>> x = jnp.ones((4, 2))  # one step of 4 sequences
      >>> h = cell.initialize_carry(x.shape)
      >>> h, y = cell(h, x)
      >>> y.shape
      (4, 3)
      >>> bool((cell(x) == y).all())  # from the carry of the cell, which starts with zeros, too
      True
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
    """A cell of a long short-term memory (LSTM): one step of it. `nn.RNN` runs it over sequences.

    ``cell(carry, x)`` returns the next carry and the output. ``cell(x)`` goes on from the carry that the cell keeps, and returns
    the output only. A carry is a pair ``(c, h)``, and the output is `h`. With linear maps `ii`, `hi`, ... of `x` and of `h`::

        i, f, o = sigmoid(ii(x) + hi(h)), sigmoid(if_(x) + hf(h)), sigmoid(io(x) + ho(h))
        c' = f * c + i * tanh(ig(x) + hg(h))
        h' = o * tanh(c')

    Args:
      in_features: the size of the last axis of the input.
      hidden_features: the size of the last axis of the output.
      gate_fn: the activation of the gates i, f and o.
      activation_fn: the activation of the memory and of the output.
      kernel_init: the initializer of the kernels for the input, as those of `jax.nn.initializers`.
      recurrent_kernel_init: the initializer of the kernels for `h`.
      bias_init: the initializer of the biases, which the maps of `h` have.
      dtype: the dtype of the computation. None takes the common dtype of the input and the parameters.
      param_dtype, carry_init, promote_dtype, keep_rngs, rngs, kernel_metadata, recurrent_kernel_metadata, bias_metadata: as in
        `SimpleCell`.

    Attributes:
      ii, if_, ig, io: Linear from `in_features` to `hidden_features`, without a bias.
      hi, hf, hg, ho: Linear from `hidden_features` to `hidden_features`.
      carry: Hidden, the pair ``(c, h)`` of arrays of shape (*batch, hidden_features) that the cell keeps.

    Raises:
      RandomStreamError: there is no stream to draw the parameters from.

    Source:
      Hochreiter and Schmidhuber, Long Short-Term Memory, 1997, https://doi.org/10.1162/neco.1997.9.8.1735

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> cell = mu.nn.LSTMCell(2, 3, rngs=mu.Rngs(0))
      >>> x = jnp.ones((4, 2))  # one step of 4 sequences
      >>> carry = cell.initialize_carry(x.shape)
      >>> carry, y = cell(carry, x)
      >>> y.shape
      (4, 3)
    """

    _parts = 2

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
        """Make a first carry: ``(c, h)``, arrays of shape (*batch, hidden_features), of zeros by default.

        Args:
          input_shape, rngs, carry_init: as in `RNNCellBase`.

        Raises:
          RandomStreamError: the initializer may draw, and there is no stream to draw from.
        """
        return self._initial(input_shape, rngs, carry_init), self._initial(input_shape, rngs, carry_init)


class OptimizedLSTMCell(LSTMCell):
    """An `LSTMCell` with fewer, larger products: one for the four linear maps of `x`, and one for those of `h`.

    The parameters are those of `LSTMCell` side by side along the last axis, in the order i, f, g, o. An initializer draws the
    four together.

    Args:
      in_features, hidden_features, gate_fn, activation_fn, kernel_init, recurrent_kernel_init, bias_init, dtype, param_dtype,
        carry_init, promote_dtype, keep_rngs, rngs, kernel_metadata, recurrent_kernel_metadata, bias_metadata: as in `LSTMCell`.

    Attributes:
      dense_i: Linear from `in_features` to ``4 * hidden_features``, without a bias.
      dense_h: Linear from `hidden_features` to ``4 * hidden_features``.
      carry: Hidden, the pair ``(c, h)`` of arrays of shape (*batch, hidden_features) that the cell keeps.

    Raises:
      RandomStreamError: there is no stream to draw the parameters from.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> rnn = mu.nn.RNN(mu.nn.OptimizedLSTMCell(2, 3, rngs=mu.Rngs(0)))
      >>> rnn(jnp.ones((4, 6, 2))).shape  # 4 sequences of 6 steps
      (4, 6, 3)
      >>> rnn.cell.dense_i.kernel.shape
      (2, 12)
    """

    def _make_maps(self, of_input: dict[str, Any], of_hidden: dict[str, Any]) -> None:
        self.dense_i = Linear(self.in_features, 4 * self.hidden_features, **of_input)
        self.dense_h = Linear(self.hidden_features, 4 * self.hidden_features, **of_hidden)

    def _maps(self, x: jax.Array, h: jax.Array) -> list[jax.Array]:
        return jnp.split(total(self.dense_i(x), self.dense_h(h)), 4, axis=-1)


class GRUCell(Cell):
    """A cell of a gated recurrent unit (GRU): one step of it. `nn.RNN` runs it over sequences.

    ``cell(carry, x)`` returns the next carry and the output. ``cell(x)`` goes on from the carry that the cell keeps, and
    returns the output only. The carry is an array `h`, and the output is the new `h`. With one linear map of `x` and one of
    `h`, each split into three parts::

        r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
        h' = (1 - z) * tanh(x_n + r * h_n) + z * h

    Args:
      in_features: the size of the last axis of the input.
      hidden_features: the size of the last axis of the output.
      gate_fn: the activation of the gates r and z.
      activation_fn: the activation of the candidate, ``tanh`` in the formula.
      kernel_init: the initializer of the kernel for the input, as those of `jax.nn.initializers`.
      recurrent_kernel_init: the initializer of the kernel for `h`.
      bias_init: the initializer of the biases.
      use_recurrent_bias: whether the map of `h` has a bias, as in PyTorch and cuDNN. The map of the input always has one.
      dtype: the dtype of the computation. None takes the common dtype of the input and the parameters.
      param_dtype, carry_init, promote_dtype, keep_rngs, rngs, kernel_metadata, recurrent_kernel_metadata, bias_metadata: as in
        `SimpleCell`.

    Attributes:
      dense_i: Linear from `in_features` to ``3 * hidden_features``, in the order r, z, n.
      dense_h: Linear from `hidden_features` to ``3 * hidden_features``, without a bias unless `use_recurrent_bias`.
      carry: Hidden of shape (*batch, hidden_features), the carry that the cell keeps.

    Raises:
      RandomStreamError: there is no stream to draw the parameters from.

    Source:
      Cho et al., Learning Phrase Representations using RNN Encoder-Decoder, 2014, https://arxiv.org/abs/1406.1078

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> cell = mu.nn.GRUCell(2, 3, rngs=mu.Rngs(0))
      >>> mu.reset(cell, mu.Hidden, batch_shape=(4,))
      >>> x = jnp.ones((5, 4, 2))  # 5 steps of 4 sequences
      >>> mu.for_loop(cell, x).shape
      (5, 4, 3)
      >>> cell.carry.shape  # the cell keeps its carry from step to step
      (4, 3)
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
        use_recurrent_bias: bool = False,
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
            use_bias=use_recurrent_bias,
            kernel_init=recurrent_kernel_init,
            bias_init=bias_init,
            kernel_metadata=recurrent_kernel_metadata,
            bias_metadata=bias_metadata,
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
