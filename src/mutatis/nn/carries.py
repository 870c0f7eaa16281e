"""Carries: the memory of recurrent cells from step to step, an argument and a result or a `Hidden` state of the model."""

from __future__ import annotations

import functools
from typing import Any, TypeAlias, overload

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer, zeros
from jax.typing import ArrayLike, DTypeLike

from mutatis.core import naming
from mutatis.core.avals import show_type
from mutatis.core.showing import show_value
from mutatis.errors import ArgumentError, RandomStreamError
from mutatis.model.kinds import Hidden, RngState, stream_value
from mutatis.model.modules import Module
from mutatis.nn.layers import misfit
from mutatis.random import Rngs, stream_of

Carry: TypeAlias = Any  # an array, or a pytree of arrays, of shape (*batch, *features)


class RNNCellBase(Module):
    """Base class of recurrent cells.

    A cell of your own defines ``__call__(carry, inputs) -> (carry, outputs)`` and `initialize_carry`. For `RNN(stateful=True)`
    it also has a `Hidden` state `carry`.

    Attributes:
      carry: Hidden, the carry that the cell keeps, for calls without a carry.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> class Sum(mu.nn.RNNCellBase):
      ...     def __call__(self, carry, x):
      ...         return carry + x, carry + x
      ...     def initialize_carry(self, input_shape, rngs=None, carry_init=None):
      ...         return jnp.zeros(input_shape)
      >>> x = jnp.ones((1, 3, 2))  # one sequence of 3 steps
      >>> mu.nn.RNN(Sum())(x)[0, :, 0].tolist()
      [1.0, 2.0, 3.0]
    """

    carry: Hidden[Any]

    @overload
    def __call__(self, inputs: ArrayLike, /) -> jax.Array: ...
    @overload
    def __call__(self, carry: Carry, inputs: ArrayLike) -> tuple[Carry, jax.Array]: ...
    def __call__(self, carry: Any, inputs: Any = None) -> Any:
        """Make one step: ``cell(carry, inputs)``, or ``cell(inputs)`` from the carry that the cell keeps.

        Args:
          carry: the carry of the step before, or the first one by `initialize_carry`. In a call with one argument it is the
            input.
          inputs: an array of floats of shape (*batch, in_features).

        Returns:
          The new carry and the output, of shape (*batch, hidden_features). ``cell(inputs)`` returns the output only, and writes
          the new carry to `cell.carry`. If that carry has no batch axes yet, all elements of the batch start from it.

        Raises:
          ArgumentError: the input has another number of features, or the carry of the cell is that of another batch.
        """
        if inputs is not None:
            self._check_carry(carry)
            return self._step(carry, jnp.asarray(inputs))
        x = jnp.asarray(carry)
        new, y = self._step(carry_for(self, x.shape[: x.ndim - self.num_feature_axes]), x)
        self.carry.value = new
        return y

    def initialize_carry(
        self, input_shape: tuple[int, ...], rngs: Rngs | RngState | None = None, carry_init: Initializer | None = None
    ) -> Carry:
        """Make a first carry.

        Args:
          input_shape: the shape of the input of one step, (*batch, in_features).
          rngs: random streams, of which `carry` is drawn from, or one stream; carries of zeros need none.
          carry_init: the initializer of the carry, as those of `jax.nn.initializers`; overrides the setting of the cell.

        Returns:
          An array, or a pytree of arrays, of shape (*batch, hidden_features).

        Raises:
          RandomStreamError: the initializer may draw, and there is no stream to draw from.
        """
        raise NotImplementedError(f"`{type(self).__name__}` does not say how its carry starts: `initialize_carry`")

    @property
    def num_feature_axes(self) -> int:
        """The number of the input's last axes that are features. All axes before them are batch axes."""
        return 1

    def _step(self, carry: Carry, x: jax.Array) -> tuple[Carry, jax.Array]:
        raise NotImplementedError(f"`{type(self).__name__}` does not say what a step is: `__call__`")

    def _check_carry(self, carry: Carry) -> None:
        """Raise unless something that was handed in can be a carry of the cell."""


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


class Cell(RNNCellBase):
    """What the cells of `nn.recurrent` have in common."""

    _parts = 1  # of a carry: an array, or a tuple of several

    def _check_carry(self, carry: Carry) -> None:
        many = isinstance(carry, list | tuple | dict)
        if many if self._parts == 1 else not (isinstance(carry, list | tuple) and len(carry) == self._parts):
            raise ArgumentError(
                f"`nn.{type(self).__name__}` was given a carry of another kind of cell",
                path="carry",
                where=naming.where(),
                expected="an array" if self._parts == 1 else f"a tuple of {self._parts} arrays",
                got=show_value(carry),
                cure="`cell.initialize_carry(x.shape)` makes a first one; of a net, `rnn(x, initial_carry=carry)`.",
            )

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
        """Make a first carry: an array of shape (*batch, hidden_features), of zeros by default.

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
