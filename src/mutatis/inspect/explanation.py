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
    """The compilations of a jitted function: when they were, what they took, and what differed from the nearest earlier one.

    Args:
      step: what `mu.jit` returned, or such a method of an object.

    Raises:
      ArgumentError: it is something else.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> step = mu.jit(lambda x: x + 1)
      >>> _ = step(jnp.ones(3)), step(jnp.ones(4)), step(jnp.ones(3))
      >>> explanation = mu.inspect.explain(step)
      >>> [dict(compilation.changes) for compilation in explanation.compilations]
      [{}, {'x': ('float32[3]', 'float32[4]')}]
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
