"""Averages of states, kept as states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mutatis.core import naming
from mutatis.core.avals import show_type
from mutatis.core.naming import show_path
from mutatis.core.nodes import Reference
from mutatis.core.showing import show_value
from mutatis.errors import ArgumentError, StateTypeError
from mutatis.model.filters import FilterLike, Path, as_filter
from mutatis.model.kinds import OptState, Param
from mutatis.model.modules import Module
from mutatis.model.variables import Variable
from mutatis.model.walks import check_node, variables
from mutatis.optim.layouts import beside


class EMA(Module):
    """An exponential moving average of the states of a model, which often evaluates better than the model itself.

    Call `update` after each training step: ``average = decay * average + (1 - decay) * state``.
    ``mu.view(model, states=ema, training=False)``, made once, is the model with the averages, without a copy, and follows each
    update. The averages have the dtypes of the states, and a narrow dtype cannot hold small steps: keep parameters in float32,
    also if the model computes in bfloat16.

    Args:
      model: a Module, a Variable, or a list, tuple or dict of them.
      decay: the weight of the old average, from 0 to 1, or a function from the number of updates to it, like an optax schedule.
      wrt: a filter: which states are averaged; those that are not floats are left out. The average of a state that appears
        later starts with its value then.

    Attributes:
      step: OptState, an int32 scalar: the number of updates.
      state: a dictionary from printed paths to the averages, which are `OptState`s.

    Raises:
      ArgumentError: `decay` is neither a number from 0 to 1 nor a function.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> model = mu.nn.Linear(2, 1, rngs=mu.Rngs(0))
      >>> ema = mu.optim.EMA(model, decay=0.9)
      >>> @mu.jit
      ... def train_step():
      ...     model.kernel.value += 1.0
      ...     ema.update()
      >>> train_step()
      >>> averaged = mu.view(model, states=ema)
      >>> round(float((model(jnp.ones(2)) - averaged(jnp.ones(2)))[0]), 3)
      1.8
    """

    def __init__(
        self, model: Any, decay: float | Callable[[jax.Array], Any] = 0.999, *, wrt: FilterLike = Param
    ) -> None:
        given: Any = decay
        if not callable(given) and not (isinstance(given, int | float) and 0 <= given <= 1):
            raise ArgumentError(
                f"an average cannot decay by {show_value(decay)}",
                path="decay",
                expected="a number from 0 to 1, or a function of the number of updates",
                got=show_value(decay),
                cure="`mu.optim.EMA(model, decay=0.999)`",
            )
        self.step = OptState(0)
        self.decay = decay
        self.wrt = as_filter(wrt)
        self._model = Reference(check_node(model))
        tracked = self._tracked()
        self.state = beside(tracked, {show_path(path): cell.get() for path, cell in tracked.items()})

    def update(self) -> None:
        """Move the averages towards the present values of the states."""
        tracked = {show_path(path): cell for path, cell in self._tracked().items()}
        decay = self.decay(self.step.value) if callable(self.decay) else self.decay
        if tracked.keys() != self.state.keys():
            kept = {name: cell for name, cell in self.state.items() if name in tracked}
            new = {name: cell.get() for name, cell in tracked.items() if name not in kept}
            self.state = kept | beside(self._tracked(), new)
        for name, cell in tracked.items():
            average = self.state[name]
            if not _alike(average.value, cell.value):
                raise StateTypeError(
                    f"the average of state `{name}` has another shape than the state",
                    path=name,
                    where=naming.where(),
                    expected=show_type(average.value),
                    got=show_type(cell.value),
                    made_at=cell.made_at,
                    cure="The layer was replaced since: make the averages anew, `mu.optim.EMA(model, decay=0.999)`.",
                )
            average.value = jax.tree.map(lambda old, new: _mixed(decay, old, new), average.value, cell.value)
        self.step += 1

    def _tracked(self) -> dict[Path, Variable]:
        cells = variables(self._model.value, self.wrt)
        return {
            path: cell
            for path, cell in cells.items()
            if not cell.deferred
            and all(jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in jax.tree.leaves(cell.get()))
        }

    def _shadows(self) -> dict[Path, Variable]:
        """The averages by the paths of the states; see `mu.view`."""
        paths = variables(self._model.value, self.wrt)
        return {path: self.state[name] for path in paths if (name := show_path(path)) in self.state}


def _alike(a: Any, b: Any) -> bool:
    shapes = [[leaf.shape for leaf in jax.tree.leaves(value)] for value in (a, b)]
    return jax.tree.structure(a) == jax.tree.structure(b) and shapes[0] == shapes[1]


def _mixed(decay: Any, old: jax.Array, new: jax.Array) -> jax.Array:
    """The next average: computed in float32, at least, as a step may be smaller than what a narrow dtype can tell apart."""
    with jax.numpy_dtype_promotion("standard"):
        wide = jnp.promote_types(old.dtype, jnp.float32)
        weight = jnp.asarray(decay, jnp.finfo(wide).dtype)
        return (weight * old.astype(wide) + (1 - weight) * new.astype(wide)).astype(old.dtype)
