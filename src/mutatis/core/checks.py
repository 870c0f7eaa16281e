"""Checks that fail while a compiled program runs: what they raise, and who waits for them.

A failing check raises in a call back into Python. JAX hands on only a text of that, so the error itself is kept here, under a
number that the text holds; every public call asks for it (`calls.without_own_frames`). A compiled call that holds checks waits
for its results before it commits (`compilation.dispatch`); what else commits asks here whether there is something to wait for.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import threading
from collections.abc import Iterator
from typing import Any

import jax

from mutatis import _compat

_KEPT = 16  # errors that nobody has asked for yet: raw JAX raises its own
_numbers = itertools.count()
_failed: dict[int, Exception] = {}


class CheckFailed(Exception):
    """What a failing check raises for JAX."""

    def __init__(self, error: Exception) -> None:
        self.number = number = next(_numbers)
        _failed[number] = error
        while len(_failed) > _KEPT:
            _failed.pop(next(iter(_failed)), None)
        super().__init__(f"mutatis check {number}: {error}")


class _Pending(threading.local):
    ahead = False
    off = False


@contextlib.contextmanager
def off() -> Iterator[None]:
    """A block in which checks are not made, on this thread."""
    before, _pending.off = _pending.off, True
    try:
        yield
    finally:
        _pending.off = before


def are_off() -> bool:
    """Whether checks are not made."""
    return _pending.off


_pending = _Pending()


def expect() -> None:
    """What this thread commits next may hang on a check that has not been made yet."""
    _pending.ahead = True


def wait_for(values: Any) -> None:
    """Wait for what a program gives, and so for the checks in it; they are all that one without results has to wait for."""
    jax.block_until_ready(values)
    if not jax.tree.leaves(values):
        jax.effects_barrier()


def settle(values: Any) -> None:
    """Wait for values that are to be committed, if a check may still fail.

    Raises:
      MutatisError: one has.
    """
    if _pending.ahead:
        _pending.ahead = False
        try:
            wait_for(values)
        except jax.errors.JaxRuntimeError as problem:
            raise cause(problem) from None


def cause(problem: Any) -> Any:
    """The error of a check, if that is why JAX has raised this; else the same."""
    if isinstance(problem, CheckFailed):  # the call back was made by a program of one operation, outside of any loop
        number = problem.number
    elif isinstance(problem, jax.errors.JaxRuntimeError):
        found = re.search(r"mutatis check (\d+): ", str(problem))
        number = -1 if found is None else int(found[1])
    else:
        return problem
    error = _failed.pop(number, None)
    if error is None:
        return problem
    error.__suppress_context__ = True
    _compat.forget_failed_callbacks()
    return error


_compat.log_no(CheckFailed)
