"""Why a function was compiled, and what each compilation took."""

from __future__ import annotations

import types
from typing import Any

from mutatis.compilation.log import Explanation
from mutatis.core.showing import show_class
from mutatis.errors import ArgumentError
from mutatis.tracing.arguments import function_name
from mutatis.transforms.jit import Jitted


def explain(step: Any) -> Explanation:
    """Explain why a jitted function was compiled: each compilation, its time, and its difference from the nearest earlier one.

    Use it if a training step is slow because it compiles again and again.

    Args:
      step: a function that `mu.jit` returned, or a method that is one.

    Returns:
      An object that `print` shows as text and a notebook as HTML. Its `compilations` have the same facts as data.

    Raises:
      ArgumentError: `step` is something else.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> @mu.jit
      ... def step(x):
      ...     return x + 1
      >>> _ = step(jnp.ones(3)), step(jnp.ones(4)), step(jnp.ones(3))
      >>> print(mu.inspect.explain(step))
      step: 2 compilations, traced in ..., compiled in ...
        1. at ..., traced in ..., compiled in ...
        2. at ..., traced in ..., compiled in ...; compared with 1:
           x: float32[3] -> float32[4]
    """
    function = step.__func__ if isinstance(step, types.MethodType) else step
    if not isinstance(function, Jitted):
        raise ArgumentError(
            f"{function_name(step)} is not compiled by `mu.jit`",
            expected="what `mu.jit` returned",
            got=show_class(step),
            cure="`step = mu.jit(f)`, then `mu.inspect.explain(step)`.",
        )
    return Explanation(function_name(function), function._compiler.log.entries)
