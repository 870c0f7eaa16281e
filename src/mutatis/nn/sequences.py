"""Recurrent nets over whole sequences: `RNN` runs a cell by `mu.scan`, `Bidirectional` runs two of them both ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from mutatis.core import naming
from mutatis.core.avals import is_concrete
from mutatis.core.showing import show_class
from mutatis.errors import ArgumentError
from mutatis.model.filters import All, FilterLike
from mutatis.model.kinds import RngState, stream_value
from mutatis.model.modules import Module
from mutatis.model.walks import variables
from mutatis.nn.carries import Carry, carry_for, stream_for_carries
from mutatis.nn.layers import first_said
from mutatis.random import Rngs, as_key
from mutatis.transforms.loops import scan


class RNN(Module):
    """A recurrent net: runs a recurrent cell, such as `nn.LSTMCell`, over sequences.

    A call starts from the first carry of the cell (zeros, by default) or from an `initial_carry`. A stateful net goes on where
    the last call ended.

    Args:
      cell: the cell: any module with ``cell(carry, x) -> (carry, y)``, `initialize_carry` and `num_feature_axes`.
      time_major: whether time is the first axis of the input and the output. If False, it comes after the batch axes.
      return_carry: whether a call returns ``(carry, outputs)``. If False, it returns the outputs.
      reverse: whether the cell goes from the end of each sequence to its start.
      keep_order: whether the outputs of a reversed run are in the order of the input. If False, the output of the first step, for
        the end of the sequence, comes first.
      unroll: how many steps are compiled into one iteration of the loop, as in `mu.scan`.
      state_axes: the axes of the cell's states in the loop, as `states` of `mu.scan`. None carries the written ones.
      broadcast_rngs: a filter: which random streams of the cell give the same numbers in all steps of a call. With ``"dropout"``,
        all steps drop the same elements.
      rngs: random streams, for first carries that are drawn: a stream is forked from `carry`. True makes one if the cell needs
        it.
      stateful: whether a call starts from `cell.carry` and writes the last carry to it.
        ``mu.reset(model, mu.Hidden, batch_shape=...)`` starts anew.

    Raises:
      ArgumentError: `cell` is no recurrent cell.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> rnn = mu.nn.RNN(mu.nn.LSTMCell(2, 3, rngs=mu.Rngs(0)))
      >>> x = jnp.ones((4, 6, 2))  # 4 sequences of 6 steps
      >>> rnn(x).shape
      (4, 6, 3)
      >>> (c, h), y = rnn(x, seq_lengths=jnp.array([6, 2, 1, 4]), return_carry=True)
      >>> bool((h[1] == y[1, 1]).all())  # the carry is that of the last step of each sequence
      True
    """

    def __init__(
        self,
        cell: Any,
        *,
        time_major: bool = False,
        return_carry: bool = False,
        reverse: bool = False,
        keep_order: bool = False,
        unroll: int = 1,
        state_axes: Any = None,
        broadcast_rngs: FilterLike = None,
        rngs: Rngs | RngState | bool = True,
        stateful: bool = False,
    ) -> None:
        if not callable(getattr(cell, "initialize_carry", None)):
            raise ArgumentError(
                "`nn.RNN` runs a recurrent cell",
                path="cell",
                expected="a module with `initialize_carry`, such as `nn.GRUCell`",
                got=show_class(cell),
                cure="`nn.RNN(nn.GRUCell(in_features, hidden_features, rngs=rngs))`",
            )
        self.cell = cell
        self.time_major = time_major
        self.return_carry = return_carry
        self.reverse = reverse
        self.keep_order = keep_order
        self.unroll = unroll
        self.state_axes = state_axes
        self.broadcast_rngs = broadcast_rngs
        self.rngs = _own_stream(rngs, cell)
        self.stateful = stateful

    def __call__(
        self,
        inputs: ArrayLike,
        *,
        initial_carry: Carry | None = None,
        seq_lengths: ArrayLike | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
        rngs: Rngs | RngState | None = None,
        stateful: bool | None = None,
    ) -> Any:
        """Run the cell over sequences.

        Args:
          inputs: an array of shape (*batch, time, features), or (time, *batch, features) with `time_major`.
          initial_carry: the first carry. None takes `cell.carry` if the net is stateful, or else the result of
            `initialize_carry`.
          seq_lengths: the length of each sequence, integers of shape (*batch). The steps after it are padding, and their outputs
            have no meaning. The returned carry is that of the last step of each sequence. In a compiled program, whose values
            cannot be checked, a length above `time` counts as `time`.
          return_carry, time_major, reverse, keep_order, stateful: override the settings of the net.
          rngs: random streams for first carries that are drawn.

        Returns:
          The outputs, of shape (*batch, time, hidden_features) or (time, *batch, hidden_features), or ``(carry, outputs)``.

        Raises:
          ArgumentError: the lengths do not fit the input, or the input does not fit the cell.
        """
        x = jnp.asarray(inputs)
        features = self.cell.num_feature_axes
        time_axis = 0 if first_said(time_major, self.time_major) else x.ndim - features - 1
        if x.ndim <= features:
            raise ArgumentError(
                "`nn.RNN` was given an input without an axis for time",
                path="inputs",
                where=naming.where(),
                expected=f"{features + 1} or more axes",
                got=f"an input of shape {x.shape}",
                cure="`rnn(x[None])` runs one step in front; a single step is the cell's: `rnn.cell(x)`.",
            )
        x = jnp.moveaxis(x, time_axis, 0)
        batch = x.shape[1 : x.ndim - features]
        lengths = None if seq_lengths is None else _checked_lengths(seq_lengths, batch, len(x), "nn.RNN")
        backwards = first_said(reverse, self.reverse)
        stays = first_said(stateful, self.stateful)
        wants_carry = first_said(return_carry, self.return_carry)
        if initial_carry is None:
            initial_carry = carry_for(self.cell, batch) if stays else self._initial_carry(x.shape[1:], rngs)

        shared = variables(self.cell, All(RngState, self.broadcast_rngs))
        start = [stream.value for stream in shared.values()]
        if lengths is not None and backwards:
            x = flip_sequences(x, lengths, lengths.ndim, True)
        options: dict[str, Any] = {
            "unroll": self.unroll,
            "reverse": backwards and lengths is None,
            "states": self.state_axes,
        }
        if lengths is not None and (wants_carry or stays):
            first = (initial_carry, initial_carry, lengths, start)
            (_, carry, _, _), outputs = scan(self._step_within, first, x, **options)
        else:
            (carry, _), outputs = scan(self._step, (initial_carry, start), x, **options)
        if stays:
            self.cell.carry.value = carry

        in_order = first_said(keep_order, self.keep_order)
        if backwards and lengths is None and not in_order:
            outputs = jax.tree.map(lambda y: jnp.flip(y, 0), outputs)
        if backwards and lengths is not None and in_order:
            outputs = jax.tree.map(lambda y: flip_sequences(y, lengths, lengths.ndim, True), outputs)
        outputs = jax.tree.map(lambda y: jnp.moveaxis(y, 0, time_axis), outputs)
        return (carry, outputs) if wants_carry else outputs

    def _initial_carry(self, input_shape: tuple[int, ...], rngs: Rngs | RngState | None) -> Carry:
        stream = self.rngs if rngs is None else stream_for_carries(rngs) if isinstance(rngs, Rngs) else rngs
        return self.cell.initialize_carry(input_shape, stream)

    def _step(self, state: Any, x: jax.Array) -> Any:
        carry, start = state
        for stream, value in zip(variables(self.cell, All(RngState, self.broadcast_rngs)).values(), start, strict=True):
            stream.value = value
        carry, y = self.cell(carry, x)
        return (carry, start), y

    def _step_within(self, state: Any, x: jax.Array) -> Any:
        """A step that also keeps the carry of each sequence from when it ended."""
        carry, kept, left, start = state
        (carry, _), y = self._step((carry, start), x)

        def choose(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(left.reshape(*left.shape, *[1] * (new.ndim - left.ndim)) > 0, new, old)

        return (carry, jax.tree.map(choose, carry, kept), left - 1, start), y


def _own_stream(rngs: Rngs | RngState | bool, *cells: Any) -> RngState | None:
    """The stream of a net for carries to start from; none where carries are zeros."""
    if isinstance(rngs, Rngs):
        return stream_for_carries(rngs)
    if isinstance(rngs, RngState):
        return rngs
    needed = any(getattr(cell, "carry_init", cell) is not None for cell in cells)
    return RngState(stream_value(as_key(0)), tag="carry") if rngs and needed else None


def _checked_lengths(lengths: ArrayLike, batch: tuple[int, ...], time: int, user: str) -> jax.Array:
    """The lengths of sequences as an array of int32. Lengths that are known only to a compiled program are cut off.

    Raises:
      ArgumentError: they are no integers, not one for each sequence, or longer than the input where that can be known.
    """
    array = jnp.asarray(lengths)
    fits = jnp.issubdtype(array.dtype, jnp.integer) and array.shape == batch
    got = f"{array.dtype}s of shape {array.shape}"
    if fits and is_concrete(array):
        known = np.asarray(array)
        outside = np.argwhere((known < 0) | (known > time))
        fits = not len(outside)
        got = _show_lengths(known, outside)
    if fits:
        return jnp.clip(array.astype(jnp.int32), 0, time)
    raise ArgumentError(
        f"the lengths of sequences do not fit the input of `{user}`",
        path="seq_lengths",
        where=naming.where(),
        expected=f"integers from 0 to {time}, of shape {batch}",
        got=got,
        cure="One length for each sequence: `rnn(x, seq_lengths=jnp.array([7, 4]))`; batch axes come before time, or after it "
        "with `time_major=True`.",
    )


def _show_lengths(lengths: np.ndarray, outside: np.ndarray) -> str:
    """The lengths that do not fit, and of which sequences they are."""
    shown = [
        str(lengths[tuple(at)]) + (f" for sequence {', '.join(map(str, at))}" if len(at) else "") for at in outside[:3]
    ]
    return ", ".join(shown) + (f", and {len(outside) - 3} more" if len(outside) > 3 else "")


def flip_sequences(
    inputs: ArrayLike, seq_lengths: ArrayLike | None, num_batch_dims: int, time_major: bool
) -> jax.Array:
    """Reverse each sequence in time; its padding stays at the end.

    Args:
      inputs: an array of shape (*batch, time, ...), or (time, *batch, ...) with `time_major`.
      seq_lengths: the length of each sequence, integers of shape (*batch). None reverses the whole axis.
      num_batch_dims: the number of batch axes.
      time_major: whether time is the first axis.

    Returns:
      An array of the same shape. The order within the padding is reversed, too.

    Raises:
      ArgumentError: the lengths do not fit the input.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> x = jnp.array([[1, 0, 0], [2, 3, 0], [4, 5, 6]])
      >>> mu.nn.flip_sequences(x, jnp.array([1, 2, 3]), num_batch_dims=1, time_major=False).tolist()
      [[1, 0, 0], [3, 2, 0], [6, 5, 4]]
    """
    x = jnp.asarray(inputs)
    axis = 0 if time_major else num_batch_dims
    if seq_lengths is None:
        return jnp.flip(x, axis)
    time = x.shape[axis]
    steps = jnp.arange(time).reshape([time if place == axis else 1 for place in range(num_batch_dims + 1)])
    batch = x.shape[1 : num_batch_dims + 1] if time_major else x.shape[:num_batch_dims]
    lengths = jnp.expand_dims(_checked_lengths(seq_lengths, batch, time, "nn.flip_sequences").astype(steps.dtype), axis)
    from_end = (lengths - 1 - steps) % time  # past the end it counts on from the end of the padding
    index = from_end.reshape(*from_end.shape, *[1] * (x.ndim - from_end.ndim))
    return jnp.take_along_axis(x, index, axis)


def _concatenate(one: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.concatenate([one, other], axis=-1)


class Bidirectional(Module):
    """Runs one recurrent net from start to end and another from end to start, and concatenates their outputs.

    Args:
      forward_rnn: the net that runs forward, such as an `RNN`.
      backward_rnn: the net that runs backward. If it is the same object, the two share their parameters.
      merge_fn: a function of an output of each net that joins them. The default concatenates them along the last axis.
      time_major: whether time is the first axis of the input and the output. If False, it comes after the batch axes.
      return_carry: whether a call returns ``((forward_carry, backward_carry), outputs)``. If False, it returns the outputs.
      rngs: random streams for first carries that are drawn, as in `RNN`.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> forward = mu.nn.RNN(mu.nn.GRUCell(2, 3, rngs=mu.Rngs(0)))
      >>> backward = mu.nn.RNN(mu.nn.GRUCell(2, 3, rngs=mu.Rngs(1)))
      >>> x = jnp.ones((4, 6, 2))  # 4 sequences of 6 steps
      >>> mu.nn.Bidirectional(forward, backward)(x).shape
      (4, 6, 6)
    """

    def __init__(
        self,
        forward_rnn: Any,
        backward_rnn: Any,
        *,
        merge_fn: Callable[[jax.Array, jax.Array], jax.Array] = _concatenate,
        time_major: bool = False,
        return_carry: bool = False,
        rngs: Rngs | RngState | bool = True,
    ) -> None:
        self.forward_rnn = forward_rnn
        self.backward_rnn = backward_rnn
        self.merge_fn = merge_fn
        self.time_major = time_major
        self.return_carry = return_carry
        self.rngs = _own_stream(rngs, *(getattr(rnn, "cell", rnn) for rnn in (forward_rnn, backward_rnn)))

    def __call__(
        self,
        inputs: ArrayLike,
        *,
        initial_carry: tuple[Carry, Carry] | None = None,
        rngs: Rngs | RngState | None = None,
        seq_lengths: ArrayLike | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
    ) -> Any:
        """Run both nets over sequences.

        Args:
          inputs: an array of shape (*batch, time, features), or (time, *batch, features) with `time_major`.
          initial_carry: a pair of the first carries of the two nets. None leaves them to the nets.
          rngs: random streams for first carries that are drawn.
          seq_lengths: the length of each sequence, integers of shape (*batch), as in `RNN`.
          return_carry, time_major: override the settings of the layer.
          reverse, keep_order: have no effect; they are there so that the call has the arguments of `RNN`.

        Returns:
          The outputs in the order of the input, of shape (*batch, time, features) or (time, *batch, features), or
          ``((forward_carry, backward_carry), outputs)``.
        """
        forward, backward = (None, None) if initial_carry is None else initial_carry
        stream = self.rngs if rngs is None else rngs
        if isinstance(stream, Rngs):
            stream = stream.stream("carry")
        shared: dict[str, Any] = {
            "rngs": stream,
            "seq_lengths": seq_lengths,
            "return_carry": True,
            "time_major": first_said(time_major, self.time_major),
        }
        forward, ahead = self.forward_rnn(inputs, initial_carry=forward, reverse=False, **shared)
        backward, back = self.backward_rnn(inputs, initial_carry=backward, reverse=True, keep_order=True, **shared)
        outputs = jax.tree.map(self.merge_fn, ahead, back)
        return ((forward, backward), outputs) if first_said(return_carry, self.return_carry) else outputs
