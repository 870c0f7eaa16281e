"""Calls: what a public function says to a call that it does not take, and what its tracebacks show.

Python's own words for such a call end at a parameter's name (``missing 1 required positional argument: 'init'``), and somebody
who comes from another library needs to know how ours is called. So a public function is declared with its usage, which runs,
and with a hint for what it is likely to be given by mistake. Tracebacks that leave it show the user's code and one line of this
library.
"""

from __future__ import annotations

import functools
import inspect
import operator
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import jax
import numpy as np

from mutatis.core import checks
from mutatis.core.naming import JAX, PACKAGE
from mutatis.core.nodes import is_node
from mutatis.core.notes import annotate
from mutatis.core.showing import show_class, show_value
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


def constructs(cls: type, home: str, renamed: Mapping[str, str]) -> None:
    """Have the constructor of a public class say how it is called, with the arguments that it was given.

    Args:
      cls: the class.
      home: where users find it: ``nn``.
      renamed: what parameters that other libraries have are called here.

    Raises (by the constructor):
      ArgumentError: it has no place for the arguments of a call, or needs others.
    """
    init = cls.__dict__.get("__init__")
    if not isinstance(init, types.FunctionType):
        return

    @functools.wraps(init)
    def __init__(
        self: Any,
        *args: Any,
        _init: Any = init,
        _name: str = f"{home}.{cls.__name__}",
        _new: Any = renamed,
        **kwargs: Any,
    ) -> None:
        try:
            _init(self, *args, **kwargs)
        except TypeError as error:
            if type(error) is TypeError and not _got_inside(error):
                raise _not_constructed(_init, _name, error, args, kwargs, _new) from None
            raise

    cls.__init__ = __init__  # type: ignore[misc]


def _not_constructed(
    init: Any, name: str, error: TypeError, args: tuple[Any, ...], kwargs: dict[str, Any], renamed: Mapping[str, str]
) -> ArgumentError:
    parameters = list(inspect.signature(init).parameters.values())[1:]
    known = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    unknown = [key for key in kwargs if key not in known]
    new = {renamed.get(key, key): value for key, value in kwargs.items()}
    if "rngs" in known:
        new.setdefault("rngs", _Code("mu.Rngs(0)"))
    needed = [
        p.name if p.kind is not p.KEYWORD_ONLY else f"{p.name}={p.name}" for p in parameters if p.default is p.empty
    ]
    usage = f"{name}({', '.join(part for part in needed if not part.startswith(('args', 'kwargs')))})"
    try:
        inspect.signature(init).bind(None, *args, **new)
        shown = [*map(_as_code, args, known), *(f"{key}={_as_code(value, key)}" for key, value in new.items())]
        cure = f"`{name}({', '.join(shown)})`"
    except TypeError:
        cure = f"`{usage}`"
    return ArgumentError(
        f"`{name}` is not called like this: {str(error).partition('() ')[2]}",
        path=next(iter(unknown), None),
        expected=usage,
        got=", ".join([*map(show_value, args), *(f"{key}={show_value(value)}" for key, value in kwargs.items())]),
        cure=cure,
    )


class _Code(str):
    """An argument as code."""


def _as_code(value: Any, name: str) -> str:
    """An argument as it would be written, or the name of the parameter."""
    plain = value if isinstance(value, tuple) else (value,)
    if isinstance(value, _Code):
        return value
    return repr(value) if all(item is None or type(item) in (bool, int, float, str) for item in plain) else name


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


def is_count(given: Any, least: int = 1) -> bool:
    """Whether an argument is an int from `least` on, and no bool."""
    return isinstance(given, int) and not isinstance(given, bool) and given >= least


def as_integer(given: Any) -> int | None:
    """An argument that is an integer of any kind, such as NumPy's, as an int; None for what is none, for bools and tracers."""
    if isinstance(given, bool | np.bool_):
        return None
    try:
        return operator.index(given)
    except TypeError:
        return None


def as_shape(given: Any) -> tuple[int, ...] | None:
    """An argument that is a size or several, as a tuple of ints from 0; None for what is no shape."""
    many = isinstance(given, list | tuple) or (isinstance(given, np.ndarray | jax.Array) and given.ndim == 1)
    sizes = [as_integer(size) for size in (given if many else [given])]
    shape = tuple(size for size in sizes if size is not None and size >= 0)
    return shape if len(shape) == len(sizes) else None


def check_transformed(function: Any, name: str) -> None:
    """`check_function` for what a transform that gives a function is applied to."""
    check_function(function, name, "f", f"Give the function itself, and call what comes back: `mu.{name}(f)`.")


def without_own_frames(error: Exception) -> Exception:
    """An error whose traceback leaves out what lies between the user's call and the user's code; of a failed check its own.

    With ``JAX_TRACEBACK_FILTERING=off`` it shows everything, as JAX's do.
    """
    error = checks.cause(error)
    annotate(error)
    if jax.config.jax_traceback_filtering == "off":
        return error
    kept = []
    ours = False
    trace = error.__traceback__
    while trace is not None:
        ours = trace.tb_frame.f_code.co_filename.startswith(PACKAGE)
        if not ours:
            kept.append(trace)
        trace = trace.tb_next
    while ours and kept and kept[-1].tb_frame.f_code.co_filename.startswith(JAX):
        kept.pop()  # JAX had only called this library, which raised the error
    sys._getframe(1).f_locals["__tracebackhide__"] = (
        True  # the line that is left of us: IPython and pytest leave it out
    )
    shown = None
    for trace in reversed(kept):
        shown = types.TracebackType(shown, trace.tb_frame, trace.tb_lasti, trace.tb_lineno)
    return error.with_traceback(shown)
