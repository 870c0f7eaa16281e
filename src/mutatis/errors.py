"""The errors of Mutatis, and the one place where their text is made.

Every error says, in this order: what went wrong, in a line that starts with the state's path; where it
happened; what was expected and what was found; and what to do, as code that runs. The same facts are fields
of the exception, so a program can act on them. Each class is a `MutatisError` and a fitting built-in, and a
traceback ends with the address of the page about it.

Errors travel: they are pickled, copied and handed from one process to another with all their fields. A field that another
process could not read (a tracer, a lock) goes as its text, a class that is made in a function as the class that it is made of.
"""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

__all__ = [
    "ArgumentError",
    "AxisError",
    "CapturedStateWarning",
    "CheckError",
    "CheckpointError",
    "CompilationError",
    "ContextError",
    "DeferredStateError",
    "EffectError",
    "FilterError",
    "FrozenStateError",
    "LaneError",
    "MissingPackageError",
    "MutatisError",
    "OptimizerError",
    "PathError",
    "RandomStreamError",
    "RecompilationWarning",
    "ShardingError",
    "StateTypeError",
    "StaticAttributeError",
    "StructureError",
    "TraceLevelError",
    "TransactionError",
]

_E = TypeVar("_E", bound="MutatisError")


class MutatisError(Exception):
    """Base class of all errors that Mutatis raises.

    All arguments are attributes too, so a program can act on them.

    Args:
      problem: one line that says what went wrong; it starts with the path of the state where there is one.
      path: the path of the state or attribute at fault, as printed (``blocks[0].norm.mean``).
      where: the transform and function in which it happened (``jit(train_step)``).
      expected: a description of a right value.
      got: a description of the value that was found.
      made_at: the file, line and function in which the state was made.
      differences: further lines; the message shows the first ten.
      cure: the remedy, as text or as code that runs.
    """

    def __init__(
        self,
        problem: str,
        *,
        path: str | None = None,
        where: str | None = None,
        expected: object = None,
        got: object = None,
        made_at: str | None = None,
        differences: Sequence[str] = (),
        cure: str | None = None,
    ) -> None:
        self.problem = problem
        self.path = path
        self.where = where
        self.expected = expected
        self.got = got
        self.made_at = made_at
        self.differences = tuple(differences)
        self.cure = cure
        super().__init__(self._text())
        self.add_note(see(type(self)))  # a traceback shows it; whoever prints the message has read the class

    def _text(self) -> str:
        lines = [self.problem + (f" inside `{self.where}`" if self.where else "")]
        if self.expected is not None:
            lines.append(f"  expected: {self.expected}")
        if self.got is not None:
            lines.append(f"  got:      {self.got}")
        lines.extend(f"  {line}" for line in shorten(self.differences))
        if self.made_at is not None:
            lines.append(f"  made at:  {self.made_at}")
        if self.cure is not None:
            lines.append(self.cure)
        return "\n".join(lines)

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuilt from its fields, not by its constructor, which a subclass may have changed."""
        cls = next(cls for cls in type(self).__mro__ if _portable(cls) is cls)
        return _rebuild, (cls, _each(self.__dict__, _portable), _each(self.args, _portable))

    def __copy__(self: _E) -> _E:
        return _rebuild(type(self), self.__dict__, self.args)

    def __deepcopy__(self: _E, memo: dict[int, Any]) -> _E:
        memo[id(self)] = new = _rebuild(type(self), {}, self.args)
        new.__dict__.update(_each(self.__dict__, lambda value: _copied(value, memo)))
        return new


def _rebuild(cls: type[_E], fields: Any, args: Any = None) -> _E:
    error = cls.__new__(cls)
    error.__dict__.update(fields)
    args = (error._text(),) if args is None else args  # which earlier versions did not write
    super(MutatisError, error).__init__(*args)  # that of the built-in
    return error


def _each(values: Any, change: Callable[[Any], Any]) -> Any:
    """A dict or tuple of fields, each changed."""
    if isinstance(values, dict):
        return {name: change(value) for name, value in values.items()}
    return tuple(change(value) for value in values)


def _portable(value: Any) -> Any:
    """The value, or its text if no other process could have it."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    return _or_text(lambda: (pickle.loads(pickle.dumps(value)), value)[1], value)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    return _or_text(lambda: copy.deepcopy(value, memo), value)


def _or_text(make: Callable[[], Any], value: Any) -> Any:
    try:
        return make()
    except Exception:  # users' classes raise what they like
        try:
            return str(value)
        except Exception:
            return f"a {type(value).__name__}"


class StateTypeError(MutatisError, TypeError):
    """A value's structure, shape or dtype does not fit the state it is written to."""


class FrozenStateError(MutatisError, TypeError):
    """A frozen or detached state was written."""


class TraceLevelError(MutatisError, RuntimeError):
    """A state was written across a raw JAX transform, or read where a raw transform would keep a stale value."""


class LaneError(MutatisError, ValueError):
    """A value that differs per lane of a `vmap` was written to a state that all lanes share."""


class StructureError(MutatisError, ValueError):
    """A module, a container, a tree of states or a result has a wrong structure, or changes its structure where it may not."""


class StaticAttributeError(MutatisError, TypeError):
    """A static attribute holds a value that cannot be static, or changes inside a compiled transform."""


class ArgumentError(MutatisError, ValueError, TypeError):
    """An argument of a call has a wrong type or a wrong value, or an option does not exist.

    It is a `ValueError` and a `TypeError`, so code that expects either for a wrong argument catches it.
    """


class CompilationError(MutatisError, RuntimeError):
    """A function would have been compiled more often than `expect` allows."""


class TransactionError(MutatisError, RuntimeError):
    """A transaction was entered, rolled back or ended at a time when that is not possible."""


class ContextError(MutatisError, LookupError):
    """A context without a default was read outside of a block that sets it."""


class PathError(MutatisError, KeyError):
    """A path leads to nothing in a `State`."""

    __str__ = Exception.__str__  # a KeyError shows its text in quotes, on one line


class FilterError(MutatisError, ValueError):
    """A value is not a filter, a filter selects nothing, or filters leave states over."""


class DeferredStateError(MutatisError, ValueError):
    """A deferred state was needed before it could be created."""


class RandomStreamError(MutatisError, ValueError):
    """A random stream is missing or was misused."""


class AxisError(MutatisError, ValueError):
    """The axes that are given for a state contradict each other or do not fit it."""


class CheckpointError(MutatisError, ValueError):
    """A checkpoint is missing, damaged or does not fit the model."""


class ShardingError(MutatisError, ValueError):
    """A state cannot be placed as its sharding says: the mesh has no such axis, or cannot split the state so."""


class EffectError(MutatisError, ValueError):
    """Requests for local state contradict each other, or are used without their handler."""


class OptimizerError(MutatisError, ValueError):
    """Gradients do not fit the parameters of an optimizer."""


class CheckError(MutatisError, RuntimeError):
    """A check failed: `mu.error_if` in a step, which was rolled back, or `mu.inspect.watch` on the values that a step has
    written.
    """


class MissingPackageError(MutatisError, ImportError):
    """A library that an optional part of Mutatis builds on is not installed."""

    path: str | None = None  # of an ImportError it would be a file


class CapturedStateWarning(UserWarning):
    """Tracing found a state that is reached neither by the arguments nor by the names that the function uses."""


class RecompilationWarning(UserWarning):
    """A function was compiled many times because of one static value or one shape."""


_PAGES = "https://mutatis.readthedocs.io/errors/"


def see(kind: type) -> str:
    """Return the text that refers to the page of a class of errors or warnings, or of its base class in this file."""
    named = next(base for base in kind.__mro__ if globals().get(base.__name__) is base)
    page = re.sub(r"(?<!^)([A-Z])", r"_\1", named.__name__).lower()
    return f"See {_PAGES}{'' if named is MutatisError else f'{page}/'}"


def shorten(lines: Iterable[str], most: int = 10) -> list[str]:
    """The first `most` lines, and a count of the rest."""
    every = list(lines)
    rest = len(every) - most
    return [*every[:most], f"and {rest} more"] if rest > 0 else every
