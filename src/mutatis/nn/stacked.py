"""Layers whose states are stacked, as `nn.Stack` and `mu.vmap` keep them, seen from outside of the loop over them.

Inside of the loop a layer sees its own states, and from outside those of all layers, which have further axes. What is done to a
layer from outside, such as giving it an adapter, is done to each of the layers: a layer knows how many axes its state has, and
the others are those of the layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax

from mutatis.model.modules import Module
from mutatis.model.variables import Variable, lanes_of
from mutatis.random import Rngs
from mutatis.transforms.batching import vmap

M = TypeVar("M", bound=Module)


def stacked_axes(cell: Variable, own: int) -> dict[int, int]:
    """The axes of a state, in ascending order, along which layers are stacked, with their sizes.

    Args:
      cell: the state.
      own: the number of axes that it has in one layer.
    """
    noted = dict(lanes_of(cell))
    if cell.deferred or len(noted) == cell.ndim - own:
        return noted
    return dict(enumerate(cell.shape[: max(cell.ndim - own, 0)]))  # by hand they are stacked in front


def own_shape(cell: Variable, own: int) -> tuple[int, ...]:
    """The shape of a state in one layer; the arguments are those of `stacked_axes`."""
    axes = stacked_axes(cell, own)
    return tuple(size for axis, size in enumerate(cell.shape) if axis not in axes)


def made_for_each(make: Callable[..., M], cell: Variable, own: int, *streams: Rngs) -> M:
    """Make a part of a layer: as many as there are layers, stacked along the axes of a state that the layer has.

    Args:
      make: a function of the random streams that makes the part for one layer.
      cell, own: as in `stacked_axes`.
      *streams: random streams, which are split among the layers.
    """
    for axis, size in stacked_axes(cell, own).items():
        make = _one_more(make, axis, size)
    return make(*streams)


def _one_more(make: Callable[..., M], axis: int, size: int) -> Callable[..., M]:
    every = vmap(make, out_axes=axis, axis_size=size)
    return lambda *streams: every(*(rngs.split(size) for rngs in streams))


def for_each(f: Callable[..., jax.Array], *cells: tuple[Variable, int]) -> jax.Array:
    """Apply a function of arrays to the values of some states, once for each layer.

    Args:
      f: a function of arrays.
      *cells: states, each with the number of axes that it has in one layer. The result is stacked as the first is.
    """
    for at in zip(*(stacked_axes(cell, own) for cell, own in cells), strict=True):
        f = jax.vmap(f, at, at[0])
    values: list[Any] = [cell.value for cell, _ in cells]
    return f(*values)
