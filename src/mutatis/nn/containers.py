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
    """Layers and functions, each called with what the one before it returned.

    A tuple is given to the next one as its positional arguments, a dictionary as its keyword arguments. Keyword arguments of
    the call reach each layer that has arguments of these names, such as `deterministic`.

    Args:
      *fns: layers and functions.

    Attributes:
      layers: the list of them.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> rngs = mu.Rngs(0)
      >>> model = mu.nn.Sequential(mu.nn.Linear(2, 8, rngs=rngs), mu.nn.relu, mu.nn.Linear(8, 3, rngs=rngs))
      >>> model(jnp.ones((4, 2))).shape, len(model), model[1] is mu.nn.relu
      ((4, 3), 3, True)
    """

    def __init__(self, *fns: Callable[..., Any]) -> None:
        self.layers = list(fns)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call them all.

        Args:
          *args: what the first is called with.
          **kwargs: what each is called with that takes it.

        Returns:
          What the last returns; without layers, what was given.

        Raises:
          ArgumentError: one of them cannot be called, or two say a keyword argument.
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
            cure="`nn.Sequential(layer, nn.relu, layer)`; what does not go from one to the next is a Module with a `__call__`.",
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
