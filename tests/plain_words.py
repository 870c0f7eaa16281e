"""Errors are told in plain words: checked for every error that is made while a test runs (see `conftest`).

No message shows JAX's insides, an address in memory or Python's names for what has none; and none names the transform in
its first words that it names as the place.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from typing import Any

JARGON = re.compile(
    r"Traced<|\w*Tracer\b|ShapedArray|PyTreeDef|ArrayImpl|NoneType|<locals>|<lambda>|<function |<class '| at 0x[0-9a-f]"
)


def jargon(text: str) -> list[str]:
    """The words in a message that mean nothing to its reader."""
    return [found.group() for found in JARGON.finditer(text)]


def said_twice(problem: str, where: str | None) -> list[str]:
    """The transforms, and calls of transforms, that a problem names although the place does."""
    labels = where.split(" > ") if where else []
    names = [name for label in labels for name in (label, label.partition("(")[0]) if "(" in label]
    return [name for name in names if f"`{name}`" in problem]


def faults(error: Any) -> list[str]:
    """What is wrong with the words of an error."""
    return [*jargon(str(error)), *said_twice(error.problem, error.where)]


_found: list[list[tuple[list[str], str]]] = []  # of the blocks that are open


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """Fails at its end if an error was made in the block, and in no block inside it, that is not told in plain words."""
    from mutatis.errors import MutatisError

    make: Any = MutatisError.__init__

    @functools.wraps(make)
    def noted(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        if wrong := faults(self):
            _found[-1].append((wrong, str(self)))

    if not _found:
        MutatisError.__init__ = noted  # type: ignore[method-assign]
    _found.append([])
    try:
        yield
    finally:
        found = _found.pop()
        if not _found:
            MutatisError.__init__ = make  # type: ignore[method-assign]
    assert not found, "\n\n".join(f"{wrong} in\n{text}" for wrong, text in found)
