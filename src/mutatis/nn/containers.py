"""`Sequential`: callables, one after the other."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from mutatis.core import naming
from mutatis.core.showing import show_value
from mutatis.errors import ArgumentError
from mutatis.model.modules import Module


class Sequential(Module):
    """Layers and functions in a row: each is called with the result of the one before it.

    If a result is a tuple, its items are the positional arguments of the next layer, and a dictionary gives the keyword
    arguments. A keyword argument of the call, such as `deterministic`, goes to each layer that has an argument of this name.

    Args:
      *fns: the layers and functions.

    Attributes:
      layers: the list of them.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> rngs = mu.Rngs(0)
      >>> model = mu.nn.Sequential(mu.nn.Linear(2, 8, rngs=rngs), mu.nn.relu, mu.nn.Linear(8, 3, rngs=rngs))
      >>> model(jnp.ones((4, 2))).shape
      (4, 3)
      >>> len(model), model[0].kernel.shape
      (3, (2, 8))
    """

    def __init__(self, *fns: Callable[..., Any]) -> None:
        self.layers = list(fns)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layers, one after the other.

        Args:
          *args: the positional arguments of the first layer.
          **kwargs: keyword arguments, each for the layers that have an argument of this name.

        Returns:
          The result of the last layer. Without layers, the arguments.

        Raises:
          ArgumentError: one of them cannot be called, or it gets a keyword argument from the call and from the layer before.
        """
        if not self.layers:
            return args[0] if len(args) == 1 else args or kwargs or None
        output: Any = args
        named: dict[str, Any] = {}
        for number, layer in enumerate(self.layers):
            if not callable(layer):
                raise self._misfit(number, "cannot be called", "a layer or a function", show_value(layer))
            if number:
                args = output if isinstance(output, tuple) else () if isinstance(output, dict) else (output,)
                named = dict(output) if isinstance(output, dict) else {}
            taken = _taken(layer, len(args), kwargs)
            if twice := sorted(named.keys() & taken.keys()):
                raise self._misfit(
                    number, f"was given `{twice[0]}` twice", "one value", "one of the call, and one of the layer before"
                )
            output = layer(*args, **named, **taken)
        return output

    def __iter__(self) -> Iterator[Callable[..., Any]]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: Any) -> Any:
        return self.layers[index]

    def _misfit(self, number: int, problem: str, expected: str, got: str) -> ArgumentError:
        return ArgumentError(
            f"number {number} of `nn.Sequential` {problem}",
            path=f"layers[{number}]",
            where=naming.where(),
            expected=expected,
            got=got,
            cure="`nn.Sequential(*layers)` takes a list apart."
            if isinstance(self.layers[number], list | tuple)
            else "`nn.Sequential(layer, nn.relu, layer)`; what does not go from one to the next is a Module with a `__call__`.",
        )


def _taken(function: Callable[..., Any], positional: int, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of the keyword arguments that a function takes, besides some positional ones."""
    if not kwargs:
        return {}
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a function that does not say
        return {}
    by_place = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    used = {p.name for p in by_place[:positional] if p.kind is p.POSITIONAL_OR_KEYWORD}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return {name: value for name, value in kwargs.items() if name not in used}
    open_ones = [p for p in parameters if p.kind is p.KEYWORD_ONLY] + by_place[positional:]
    known = {p.name for p in open_ones if p.kind is not p.POSITIONAL_ONLY}
    return {name: value for name, value in kwargs.items() if name in known}
