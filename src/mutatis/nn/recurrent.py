"""Recurrent cells: one step of a recurrent net. `RNN` of `nn.sequences` runs them over sequences.

What a cell remembers, its *carry*, goes in and out, ``carry, y = cell(carry, x)``, or it lives in the model:
``y = cell(x)`` goes on from the `Hidden` state `cell.carry` and writes it, which `mu.reset` starts anew.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias, overload

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer, orthogonal, zeros
from jax.typing import ArrayLike, DTypeLike

from mutatis.core import naming
from mutatis.core.avals import show_type
from mutatis.core.showing import show_value
from mutatis.errors import ArgumentError, RandomStreamError
from mutatis.model.kinds import Hidden, RngState, stream_value
from mutatis.model.modules import Module
from mutatis.nn.layers import NO_METADATA, Metadata, PromoteDtype, alike, misfit, promote_dtype, total
from mutatis.nn.linear import Linear, default_kernel_init
from mutatis.random import Rngs, stream_of

Carry: TypeAlias = Any  # an array, or a pytree of arrays, of shape (*batch, *features)
Activation: TypeAlias = Callable[[jax.Array], jax.Array]


def orthogonal_kernel_init(key: Any, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
    """An orthogonal matrix, made in float32, for which there are decompositions, and then converted."""
    return orthogonal()(key, shape).astype(dtype)


class RNNCellBase(Module):
    """Base class of recurrent cells.

    A cell of your own defines ``__call__(carry, inputs) -> (carry, outputs)`` and `initialize_carry`. For `RNN(stateful=True)`
    it has a `Hidden` state `carry`, too.

    Attributes:
      carry: Hidden; the carry of the calls that do not hand one in.
    """

    carry: Hidden[Any]

    @overload
    def __call__(self, inputs: ArrayLike, /) -> jax.Array: ...
    @overload
    def __call__(self, carry: Carry, inputs: ArrayLike) -> tuple[Carry, jax.Array]: ...
    def __call__(self, carry: Any, inputs: Any = None) -> Any:
        """Make a step: ``cell(carry, inputs)``, or ``cell(inputs)`` from the cell's own carry.

        Args:
          carry: what the cell remembers, as `initialize_carry` or the step before gives it.
          inputs: an array of shape (*batch, in_features).

        Returns:
          The new carry and the output, of shape (*batch, hidden_features); ``cell(inputs)`` gives the output only. A carry of the
          cell's own that has no batch axes yet is that of each element of the batch.

        Raises:
          ArgumentError: the input has another number of features, or the cell's own carry is that of another batch.
        """
        if inputs is not None:
            return self._step(carry, jnp.asarray(inputs))
        x = jnp.asarray(carry)
        new, y = self._step(carry_for(self, x.shape[: x.ndim - self.num_feature_axes]), x)
        self.carry.value = new
        return y

    def initialize_carry(
        self, input_shape: tuple[int, ...], rngs: Rngs | RngState | None = None, carry_init: Initializer | None = None
    ) -> Carry:
        """A carry to start from.

        Args:
          input_shape: the shape of the input of a step, (*batch, in_features).
          rngs: random streams, of which `carry` is drawn from, or one stream; carries of zeros need none.
          carry_init: makes the carry, an initializer of `jax.nn.initializers`; goes before what the cell was made with.

        Raises:
          RandomStreamError: the initializer may draw, and there is no stream to draw from.
        """
        raise NotImplementedError(f"`{type(self).__name__}` does not say how its carry starts: `initialize_carry`")

    @property
    def num_feature_axes(self) -> int:
        """How many of the input's last axes are no batch axes."""
        return 1

    def _step(self, carry: Carry, x: jax.Array) -> tuple[Carry, jax.Array]:
        raise NotImplementedError(f"`{type(self).__name__}` does not say what a step is: `__call__`")


def carry_for(cell: RNNCellBase, batch: tuple[int, ...]) -> Carry:
    """The carry that lives in a cell, for an input with these batch axes.

    Raises:
      ArgumentError: it is that of another batch, or the cell keeps none.
    """
    hidden = getattr(cell, "carry", None)
    if not isinstance(hidden, Hidden):
        name = type(cell).__name__
        raise ArgumentError(
            f"`{name}` keeps no carry of its own",
            path=f"{name}.carry",
            where=naming.where(),
            expected="a Hidden state `carry`",
            got=show_value(hidden),
            cure="Make one where the cell is made, `self.carry = mu.Hidden(jnp.zeros(n), init=jnp.zeros(n))`, or hand it in: "
            "`cell(carry, x)`.",
        )
    value = hidden.value
    axes = cell.num_feature_axes
    for leaf in jax.tree.leaves(value):
        if leaf.shape[: leaf.ndim - axes] not in ((), batch):
            raise misfit(
                hidden,
                expected=f"an input with the batch axes {leaf.shape[: leaf.ndim - axes]} of what it remembers, "
                f"{show_type(value)}",
                got=f"an input with the batch axes {batch}",
                cure=f"Start anew for another batch, `mu.reset(model, mu.Hidden, batch_shape={batch})`, or hand the carry in: "
                "`carry, y = cell(carry, x)`.",
            )
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*batch, *leaf.shape[leaf.ndim - axes :])), value)


class _Cell(RNNCellBase):
    """What the cells here have in common."""

    def _settle(
        self,
        in_features: int,
        hidden_features: int,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
        carry_init: Initializer | None,
        keep_rngs: bool,
        rngs: Rngs,
    ) -> None:
        self.in_features = in_features
        self.hidden_features = hidden_features
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.carry_init = carry_init
        self.rngs = stream_for_carries(rngs) if keep_rngs else None

    def initialize_carry(
        self, input_shape: tuple[int, ...], rngs: Rngs | RngState | None = None, carry_init: Initializer | None = None
    ) -> jax.Array:
        """A carry to start from: an array of shape (*batch, hidden_features).

        Args:
          input_shape, rngs, carry_init: as in `RNNCellBase`.

        Raises:
          RandomStreamError: the initializer may draw, and there is no stream to draw from.
        """
        return self._initial(input_shape, rngs, carry_init)

    def _initial(
        self, input_shape: tuple[int, ...], rngs: Rngs | RngState | None, given: Initializer | None
    ) -> jax.Array:
        init = given or self.carry_init or zeros
        stream = self.rngs if rngs is None else rngs
        if stream is None and init is not zeros:
            raise RandomStreamError(
                f"`nn.{type(self).__name__}` cannot draw a carry to start from: there is no random stream",
                path="carry",
                where=naming.where(),
                cure="`cell.initialize_carry(shape, rngs)`, or `rnn(x, rngs=rngs)`; carries of zeros need none.",
            )
        key = None if stream is None else _stream(stream).draw()
        return init(key, (*input_shape[:-1], self.hidden_features), self.param_dtype)

    def _own_carry(self, states: int | None = None) -> Hidden[Any]:
        """The state for a carry: an array, or a tuple of several."""
        start = _start(self.carry_init or zeros, self.hidden_features, jnp.dtype(self.param_dtype), states)
        return Hidden(start(), init=start)


@functools.lru_cache(maxsize=1024)
def _start(init: Initializer, features: int, dtype: Any, states: int | None) -> functools.partial[Any]:
    """How a carry starts; one object for all that start alike, so that a walk over them describes it once."""
    return functools.partial(_started, init, features, dtype, states)


def _started(init: Initializer, features: int, dtype: Any, states: int | None) -> Any:
    # What an initializer draws here is always the same: a stream to draw from is given to `initialize_carry`.
    keys = [None] * (states or 1) if init is zeros else jax.random.split(jax.random.key(0), states or 1)
    arrays = tuple(init(key, (features,), dtype) for key in keys)
    return arrays[0] if states is None else arrays


def stream_for_carries(rngs: Rngs | RngState) -> RngState:
    """A stream of its own, forked from `carry`."""
    return RngState(stream_value(_stream(rngs).draw()), tag="carry")


def _stream(rngs: Rngs | RngState) -> RngState:
    return rngs if isinstance(rngs, RngState) else stream_of(rngs, "carry", "A recurrent cell")


class SimpleCell(_Cell):
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


class LSTMCell(_Cell):
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


class GRUCell(_Cell):
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
