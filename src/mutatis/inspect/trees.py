"""The tree of a model, as deep as one asks for."""

from __future__ import annotations

from typing import Any

from mutatis.core.calls import is_count
from mutatis.core.showing import show_value
from mutatis.errors import ArgumentError
from mutatis.model.tree import Tree
from mutatis.model.walks import check_node


def tree(node: Any, depth: int | None = None) -> Tree:
    """Show the tree of a model: its modules, settings and states, with their sizes. Nothing is read or computed.

    The `repr` of a module shows at most a screen; this shows all of it. Equal neighbours share one entry, ``12 x Block(...)``. An
    object in several places is shown at the first, and the others refer to it. If a class has a `__repr__` of its own that gives
    one line, this line stands for its modules.

    Args:
      node: a Module, a Variable, or a list, tuple or dict of them.
      depth: how many levels of modules are opened, an int from 1. None opens all.

    Returns:
      An object that `print` shows as text, and a notebook as HTML that folds.

    Raises:
      ArgumentError: `node` is no part of a model, or `depth` is no number from 1.

    Example:
      >>> import mutatis as mu
      >>> class Net(mu.Module):
      ...     def __init__(self, rngs):
      ...         self.layers = [mu.nn.Linear(16, 16, rngs=rngs) for _ in range(200)]
      ...         self.head = mu.nn.Linear(16, 4, rngs=rngs)
      >>> print(mu.inspect.tree(Net(mu.Rngs(0))))
      Net(  # 54,468 parameters, 217.9 kB in 402 states
        layers=[
          200 x Linear(16 -> 16,  # 54,400 parameters, 217.6 kB in 400 states
            kernel=Param(float32[16,16]),
            bias=Param(float32[16]),
          ),
        ],
        head=Linear(16 -> 4,  # 68 parameters, 272 B in 2 states
          kernel=Param(float32[16,4]),
          bias=Param(float32[4]),
        ),
      )
    """
    if depth is not None and not is_count(depth):
        raise ArgumentError(
            f"a tree cannot be {show_value(depth)} modules deep",
            path="depth",
            expected="an int from 1, or None",
            got=show_value(depth),
            cure="`mu.inspect.tree(model, depth=2)`",
        )
    return Tree(check_node(node), depth)
