"""Frames: which transforms and transactions are open here. All ambient state of the engine is in this file.

What is open belongs to a thread and, on it, to a context of `contextvars`, as each asyncio task has one. Contexts are copied:
into tasks, and by `asyncio.to_thread` into other threads. So a frame counts in a copy only while it is open, and on its thread:

- a task that was made inside a transaction is inside it until that ends, and outside from then on;
- another thread is never inside.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from threading import get_ident
from typing import Any


class Frame:
    """What is open: the part of a transaction that messages are made of.

    Args:
      label: what it is, for messages: ``jit(train_step)``.
      locate: finds the printed path of a cell among what it was given.
    """

    __slots__ = ("label", "locate", "parent", "thread")

    def __init__(self, label: str, locate: Callable[[Any], str | None] | None = None) -> None:
        self.label = label
        self.locate = locate
        self.parent: Any = innermost()  # the next one further out, or None
        self.thread: int | None = None  # on which it is open; None before and after

    def open_parent(self) -> Any:
        """The next one further out that is still open, or None: a task may outlive the transaction that it was made in."""
        frame = self.parent
        while frame is not None and frame.thread is None:
            frame = frame.parent
        return frame


_innermost: contextvars.ContextVar[Any] = contextvars.ContextVar("mutatis_frame", default=None)
_recorder: contextvars.ContextVar[tuple[Callable[[Any], None], int] | None] = contextvars.ContextVar(
    "mutatis_recorder", default=None
)


def innermost() -> Any:
    """The innermost frame that is open here, or None."""
    frame = _innermost.get()
    while frame is not None and frame.thread != get_ident():
        frame = frame.parent
    return frame


def up_to(frame: Frame | None) -> list[Any]:
    """The frames that are open here inside of this one, the innermost first."""
    found: list[Any] = []
    inner = innermost()
    while inner is not None and inner is not frame:
        found.append(inner)
        inner = inner.parent
    return found


def reset(frame: Frame | None) -> None:
    """Have this frame, further out, be the innermost one."""
    _innermost.set(frame)


def push(frame: Frame) -> None:
    """Open a frame."""
    frame.thread = get_ident()
    _innermost.set(frame)


def pop(frame: Frame) -> None:
    """Close a frame, and with it whatever was left open inside it."""
    frame.thread = None
    _innermost.set(frame.parent)  # not by a token: what is left open in a generator may end in another context


@contextlib.contextmanager
def at_frame(frame: Frame | None) -> Iterator[None]:
    """Run a block as if this frame, further out, were the innermost one."""
    before, recorder = _innermost.get(), _recorder.get()
    _innermost.set(frame)
    _recorder.set(None)
    try:
        yield
    finally:
        _innermost.set(before)
        _recorder.set(recorder)


@contextlib.contextmanager
def recorded(recorder: Callable[[Any], None]) -> Iterator[None]:
    """Hand each transaction of this thread and context that ends well to a function, the inner ones first.

    While this is so, what is known already is traced again.
    """
    before = _recorder.get()
    _recorder.set((recorder, get_ident()))
    try:
        yield
    finally:
        _recorder.set(before)


def recorder() -> Callable[[Any], None] | None:
    """The function that transactions are handed to, if there is one."""
    entry = _recorder.get()
    return None if entry is None or entry[1] != get_ident() else entry[0]
