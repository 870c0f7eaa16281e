"""Eager control flow: a loop or branch in ordinary Python runs as one compiled program, kept by the code of its functions."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from mutatis import _compat, transactions
from mutatis.compiling import Compiler
from mutatis.modules import Module, is_node
from mutatis.programs import Options
from mutatis.statics import static_key


@functools.lru_cache(maxsize=512)
def _compiler_for(_codes: tuple[Hashable, ...], name: str, _options: Hashable) -> Compiler:
    return Compiler(name, Options())


def compiled(
    name: str,
    implementation: Callable[..., Any],
    functions: Sequence[Callable[..., Any]],
    options: dict[str, Any],
    *operands: Any,
) -> Any:
    """Run a control-flow transform from ordinary Python as one compiled program, kept for functions of this code.

    Args:
      name: the transform's name.
      implementation: ``implementation(functions, options, operands)`` inside the program.
      functions: the user's functions.
      options: the transform's static options.
      *operands: its arguments.
    """
    plain, owners = zip(*map(_unbind, functions), strict=True)
    codes = tuple(getattr(inspect.unwrap(f), "__code__", None) or static_key(f) for f in plain)
    key = tuple((option, static_key(value)) for option, value in options.items())
    compiler = _compiler_for(codes, name, key)

    def run(owners: Any, operands: Any) -> Any:
        bound = [f if owner is None else functools.partial(f, owner) for f, owner in zip(plain, owners, strict=True)]
        return implementation(bound, options, operands)

    return compiler(run, (owners, operands), {}, plain)


def _unbind(function: Any) -> tuple[Any, Any]:
    """A bound method or a callable module as a plain function and the object it belongs to."""
    if isinstance(function, Module):
        return type(function).__call__, function
    owner = getattr(function, "__self__", None)
    if is_node(owner) and hasattr(function, "__func__"):
        return function.__func__, owner
    return function, None


def runs_eagerly() -> bool:
    """Whether the code that runs now is ordinary Python, outside every transform and transaction."""
    return (
        transactions.current() is None and _compat.current_trace() is _compat.EVAL_TRACE and not _compat.jit_disabled()
    )
