"""Dynamics: what neurons and synapses have in common, a size, and parameters and states for each element."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from mutatis.core import naming
from mutatis.core.showing import show_value
from mutatis.errors import ArgumentError
from mutatis.model.kinds import Buffer, Hidden
from mutatis.model.modules import Module
from mutatis.model.variables import ModuleInit, Variable, lanes_of
from mutatis.nn.layers import as_axes, sizes
from mutatis.nn.spiking.units import has_unit, in_unit, step_length

Parameter: TypeAlias = Any  # a number, an array, or a Variable


@dataclasses.dataclass(frozen=True)
class _AtParameter(ModuleInit):
    """Starts a state of a `Dynamics` at one of its parameters.

    Args:
      name: of the parameter.
      size: the shape of the state.
      dtype: its dtype.
    """

    name: str
    size: tuple[int, ...]
    dtype: Any

    def start(self, module: Any, lanes: tuple[tuple[int, int], ...], batch_shape: tuple[int, ...]) -> jax.Array:
        """The parameter in the shape of the state: with its lanes, and with a batch."""
        parameter = getattr(module, self.name)
        value = jnp.asarray(module._value(self.name), self.dtype)
        stacked = lanes_of(parameter) if isinstance(parameter, Variable) else ()
        front = jnp.moveaxis(value, [axis for axis, _ in stacked], range(len(stacked)))
        outer, own = front.shape[: len(stacked)], front.shape[len(stacked) :]
        between = (1,) * (len(batch_shape) + len(self.size) - len(own))
        outer = outer or (1,) * len(lanes)
        full = (*(size for _, size in lanes), *batch_shape, *self.size)
        whole = jnp.broadcast_to(front.reshape(*outer, *between, *own), full)
        return jnp.moveaxis(whole, range(len(lanes)), [axis for axis, _ in lanes])


class Dynamics(Module):
    """Base class of modules with a size, and with parameters and states for each of their elements.

    Args:
      size: the number of elements, or their shape.
      dtype: the dtype of the states.
    """

    _units: ClassVar[Mapping[str, str]] = {}  # of parameters; the others have none
    _input_unit: str = "mV"
    _positive: ClassVar[frozenset[str]] = frozenset()  # parameters that are above zero: time constants

    def __init__(self, size: int | tuple[int, ...], dtype: Any = jnp.float32) -> None:
        self.size = sizes(as_axes(size))
        self.dtype = dtype

    def _parameters(self, **given: Parameter) -> None:
        """Keep parameters: numbers as they are, arrays as states that are not trained."""
        for name, value in given.items():
            now = in_unit(value.value if isinstance(value, Variable) else value, self._units.get(name, ""), name)
            if np.shape(now) not in ((), self.size):
                raise ArgumentError(
                    f"`nn.{type(self).__name__}` cannot have `{name}` of this shape",
                    path=name,
                    expected=f"a number, or an array of shape {self.size}",
                    got=f"shape {np.shape(now)}",
                    cure=f"One for each: `{name}=jnp.full({self.size}, 10.0)`.",
                )
            known = not isinstance(now, jax.core.Tracer | jax.ShapeDtypeStruct)
            if name in self._positive and known and not bool(np.all(np.asarray(now) > 0)):
                raise ArgumentError(
                    f"`nn.{type(self).__name__}` cannot have `{name}` that is not above zero",
                    path=name,
                    expected="a number above 0",
                    got=show_value(now),
                    cure=f"`nn.{type(self).__name__}(..., {name}=10.0)`",
                )
            if isinstance(now, np.number):
                now = now.item()
            plain = isinstance(now, int | float)
            setattr(self, name, value if isinstance(value, Variable) else now if plain else Buffer(self._array(now)))

    def _array(self, x: Any) -> jax.Array:
        return jnp.asarray(x, self.dtype)

    def _value(self, name: str) -> Any:
        """A parameter: a number, or an array of the dtype of the states."""
        value = getattr(self, name)
        value = value.value if isinstance(value, Variable) else value
        value = in_unit(value, self._units.get(name, ""), name) if has_unit(value) else value
        return value if isinstance(value, int | float) else self._array(value)

    def _get(self, name: str) -> Any:
        """A parameter: a number, or an array of the shape and dtype of the states, which may have batch axes in front."""
        value = self._value(name)
        return value if isinstance(value, int | float) else jnp.broadcast_to(value, self.states()[0].shape)

    def _step(self) -> Any:
        """The length of a step in time: a number, or a scalar of the dtype of the states."""
        step = step_length()
        return step if isinstance(step, int | float) else self._array(step)

    def _hidden(self, start: ArrayLike = 0.0, dtype: Any = None) -> Hidden[jax.Array]:
        """A state for each element."""

        def init(size: tuple[int, ...] = self.size, dtype: Any = dtype or self.dtype) -> jax.Array:
            return jnp.full(size, start, dtype)

        return Hidden(init(), init=init)

    def _hidden_at(self, name: str) -> Hidden[jax.Array]:
        """A state for each element that starts at a parameter, as that is when the state starts."""
        if isinstance(getattr(self, name), int | float):
            return self._hidden(getattr(self, name))
        start = _AtParameter(name, self.size, jnp.dtype(self.dtype))
        return Hidden(start.start(self, (), ()), init=start)

    def _input(self, x: ArrayLike, state: jax.Array) -> jax.Array:
        """What comes in, of the shape of a state.

        Raises:
          ArgumentError: it has another.
        """
        array = self._array(in_unit(x, self._input_unit, "x"))
        if array.shape == state.shape or array.shape == ():
            return array
        batch = array.shape[: array.ndim - len(self.size)]
        batched = array.shape[len(batch) :] == self.size and bool(batch) and state.shape == self.size
        raise ArgumentError(
            f"`nn.{type(self).__name__}` was given an input of another shape than its states",
            path=naming.path_of(self.states()[0]) or "x",
            where=naming.where(),
            expected=f"a number, or an array of shape {state.shape}",
            got=f"shape {array.shape}",
            cure=f"Start a batch first: `mu.reset(model, mu.Hidden, batch_shape={batch})`."
            if batched
            else f"Give one for each of the {self.size} elements.",
        )

    def _set_input_unit(self, resistance: Parameter) -> None:
        """The input is a current if the resistance that it is multiplied by has a unit, and else a potential."""
        if has_unit(resistance.value if isinstance(resistance, Variable) else resistance):
            self._input_unit = "nA"

    def states(self) -> list[Hidden[jax.Array]]:
        """The states of the elements."""
        return [value for value in vars(self).values() if isinstance(value, Hidden)]
