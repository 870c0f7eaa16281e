"""Frames: which transforms and transactions are open on this thread. All ambient state of the engine is in this file."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any


class Frame:
    """What is open: the part of a transaction that messages are made of.

    Args:
      label: what it is, for messages: ``jit(train_step)``.
      locate: finds the printed path of a cell among what it was given.
    """

    __slots__ = ("label", "locate", "parent")

    def __init__(self, label: str, locate: Callable[[Any], str | None] | None = None) -> None:
        self.label = label
        self.locate = locate
        self.parent: Any = here.top  # the next one further out, or None


class _Here(threading.local):
    """What is open on this thread."""

    def __init__(self) -> None:
        self.top: Any = None  # the innermost open frame
        self.recorder: Callable[[Any], None] | None = None


here = _Here()


def push(frame: Frame) -> None:
    """Open a frame."""
    here.top = frame


def pop(frame: Frame) -> None:
    """Close a frame, and with it whatever was left open inside it."""
    here.top = frame.parent


@contextlib.contextmanager
def recorded(recorder: Callable[[Any], None]) -> Iterator[None]:
    """Hand each transaction of this thread that ends well to a function, the inner ones first.

    While this is so, what is known already is traced again.
    """
    before, here.recorder = here.recorder, recorder
    try:
        yield
    finally:
        here.recorder = before
