"""Masks: whether a branch, or an iteration, that all lanes of a `vmap` run is one that the lane takes.

Where lanes choose different branches, `vmap` runs all branches and drops what a lane did not choose; and a loop runs for all
lanes until the last one has ended. A check must not fail for what is dropped. So a function that holds checks has what decides as
one more input, and the checks ask for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mutatis.model.contexts import Context
from mutatis.tracing.call_site import CallSite
from mutatis.tracing.staging import Staged

_taken = Context("taken", None)


def taken() -> Any:
    """Whether what runs is taken here: a boolean scalar; None if that is certain."""
    return _taken.get()


class Masked:
    """A staged function, staged again with a mask if there may be checks in it.

    Args:
      site: the call of the transform.
      stage: stages a function of leaves.
      leaves: values or shapes of the arguments' leaves.
      call: runs the user's function.
    """

    def __init__(self, site: CallSite, stage: Callable[..., Staged], leaves: Any, call: Callable[[Any], Any]) -> None:
        self.staged = stage(leaves, call)
        self._asks = self.staged.checks
        if not self._asks:
            return

        def call_if_taken(given: Any) -> Any:
            leaves, mask = given
            around = taken()
            with _taken.set(mask if around is None else around & mask):
                return call(leaves)

        site.undo()
        self.staged = stage((leaves, jax.ShapeDtypeStruct((), jnp.bool_)), call_if_taken)

    def __call__(self, values: Mapping[Any, Any], leaves: Any, mask: Callable[[], Any]) -> tuple[list[Any], Any]:
        """Run it, as `Staged` does; `mask` computes whether it is taken."""
        return self.staged(values, (leaves, mask()) if self._asks else leaves)
