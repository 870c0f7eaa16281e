"""The errors of Mutatis, and the one place where their text is made.

Every error says, in this order: what went wrong, in a line that starts with the state's path; where it
happened; what was expected and what was found; and what to do, as code that runs. The same facts are fields
of the exception, so a program can act on them. Each class is a `MutatisError` and a fitting built-in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


class MutatisError(Exception):
    """Base class of all errors raised by Mutatis.

    Args:
      problem: one line that says what went wrong; it starts with the state's path where there is one.
      path: the path of the state or attribute at fault, as printed (``blocks[0].norm.mean``).
      where: the transform and function in which it happened (``jit(train_step)``).
      expected: what would have been right.
      got: what was found.
      made_at: the file, line and function in which the state was made.
      differences: further lines, of which the first ten are shown.
      cure: what to do, as text or code that runs.
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
        return _rebuild, (type(self), self.__dict__)


def _rebuild(cls: type[MutatisError], fields: dict[str, Any]) -> MutatisError:
    return cls(**fields)


class StateTypeError(MutatisError, TypeError):
    """A value's structure, shape or dtype does not fit the state it is written to."""


class FrozenStateError(MutatisError, TypeError):
    """A frozen or detached state was written."""


class TraceLevelError(MutatisError, RuntimeError):
    """A state was written across a raw JAX transform, or read where a raw transform would keep a stale value."""


class LaneError(MutatisError, ValueError):
    """A value that differs per lane of a `vmap` was written to a state that all lanes share."""


class StructureError(MutatisError, ValueError):
    """Modules, attributes or containers cannot be what they were made to be, or change where they may not."""


class StaticAttributeError(MutatisError, TypeError):
    """A static attribute holds something that cannot be static, or changes inside a compiled transform."""


class OptionError(MutatisError, ValueError):
    """An option of a transform is none of those there are."""


class ContextError(MutatisError, LookupError):
    """A context without a default was read where it is not set."""


class FilterError(MutatisError, ValueError):
    """A filter is not one, selects nothing, or leaves states over."""


class DeferredStateError(MutatisError, ValueError):
    """A deferred state was needed before it could be created."""


class RandomStreamError(MutatisError, ValueError):
    """A random stream is missing or was misused."""


class AxisError(MutatisError, ValueError):
    """The axes asked for a state contradict each other or do not fit it."""


class CheckpointError(MutatisError, ValueError):
    """A checkpoint is missing, damaged or does not fit the model."""


class EffectError(MutatisError, ValueError):
    """Requests for local state contradict each other, or are used without their handler."""


class OptimizerError(MutatisError, ValueError):
    """Gradients do not fit the parameters of an optimizer."""


class MissingPackageError(MutatisError, ImportError):
    """A library that an optional part of Mutatis builds on is not installed."""

    path: str | None = None  # of an ImportError it would be a file


class CapturedStateWarning(UserWarning):
    """Tracing found a state that neither the arguments nor the names used by the function lead to."""


class RecompilationWarning(UserWarning):
    """A function was compiled many times because of one static value or one shape."""


def shorten(lines: Iterable[str], most: int = 10) -> list[str]:
    """The first `most` lines, and a count of the rest."""
    every = list(lines)
    rest = len(every) - most
    return [*every[:most], f"and {rest} more"] if rest > 0 else every
