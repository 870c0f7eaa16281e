"""Calls: what a public function says to a call that it does not take, and what its tracebacks show.

Python's own words for such a call end at a parameter's name (``missing 1 required positional argument: 'init'``), and somebody
who comes from another library needs to know how ours is called. So a public function is declared with its usage, which runs,
and with a hint for what it is likely to be given by mistake. Tracebacks that leave it show the user's code and one line of this
library.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax

from mutatis.core.naming import PACKAGE
from mutatis.core.nodes import is_node
from mutatis.core.showing import show_class
from mutatis.errors import ArgumentError

F = TypeVar("F", bound=Callable[..., Any])


def takes(usage: str, **hints: str) -> Callable[[F], F]:
    """Declare how a public function is called, for those who call it in another way.

    Args:
      usage: a call of it, as code that runs.
      **hints: for a keyword that other libraries have, what to write here; ``_`` is for every other call that does not fit.

    Raises (by the function):
      ArgumentError: its signature has no place for the arguments of a call.
    """

    def declare(function: F) -> F:
        @functools.wraps(function)
        # Without a closure: captures pass over functions of libraries only if they have none.
        def call(*args: Any, _function: Any = function, _usage: str = usage, _hints: Any = hints, **kwargs: Any) -> Any:
            try:
                return _function(*args, **kwargs)
            except Exception as error:
                if type(error) is TypeError and not _got_inside(error):
                    raise _not_taken(_function, error, kwargs, _usage, _hints) from None
                raise without_own_frames(error)  # noqa: B904  # it is the same error

        return cast(F, call)

    return declare


def _got_inside(error: BaseException) -> bool:
    """Whether an error comes from the body of a function, not from its signature."""
    trace = error.__traceback__
    return trace is None or trace.tb_next is not None


def _not_taken(
    function: Any, error: TypeError, kwargs: dict[str, Any], usage: str, hints: dict[str, str]
) -> ArgumentError:
    name, _, what = str(error).partition("() ")
    name = name.rpartition(".<locals>.")[2].removesuffix(".__init__")
    name = f"mu.{name}" if usage.startswith(f"mu.{name}(") or f"mu.{name}(" in usage else name
    hint = next((hints[key] for key in kwargs if key in hints), hints.get("_", ""))
    return ArgumentError(
        f"`{name}` is not called like this: {what}",
        path=next((key for key in kwargs if key in hints), None),
        expected=usage,
        cure=hint or f"`{usage}`",
    )


def check_function(function: Any, name: str, parameter: str, cure: str) -> None:
    """Raise unless an argument is a function.

    Args:
      function: the argument.
      name: the public function that got it.
      parameter: the name of its parameter.
      cure: what to write.

    Raises:
      ArgumentError: it cannot be called.
    """
    if not callable(function):
        raise ArgumentError(
            f"`mu.{name}` was given what cannot be called as its `{parameter}`",
            path=parameter,
            expected="a function, bound method, partial or Module with `__call__`",
            got=show_class(function) + (" without `__call__`" if is_node(function) else ""),
            cure=cure,
        )


def check_transformed(function: Any, name: str) -> None:
    """`check_function` for what a transform that gives a function is applied to."""
    check_function(function, name, "f", f"Give the function itself, and call what comes back: `mu.{name}(f)`.")


def without_own_frames(error: Exception) -> Exception:
    """An error whose traceback leaves out what lies between the user's call and the user's code.

    With ``JAX_TRACEBACK_FILTERING=off`` it shows everything, as JAX's do.
    """
    if jax.config.jax_traceback_filtering == "off":
        return error
    kept = []
    trace = error.__traceback__
    while trace is not None:
        if not trace.tb_frame.f_code.co_filename.startswith(PACKAGE):
            kept.append(trace)
        trace = trace.tb_next
    shown = None
    for trace in reversed(kept):
        shown = types.TracebackType(shown, trace.tb_frame, trace.tb_lasti, trace.tb_lineno)
    return error.with_traceback(shown)
