"""Interrupts: when signal handlers run, and what they find.

Python runs a signal handler between any two steps of the main thread. Three places need care:

- *A compiled call.* It runs no Python code, so a handler runs before it or after it; `cells` tells what becomes of the step.
- *The first call of a program.* JAX makes it in Python, and an exception between the run and the return would lose the results
  of donated buffers: handlers are held back.
- *A trace.* A handler is no part of the function that happens to be traced, so it runs as if in front of the outermost transform:
  it finds committed values, not tracers, and models as they were before the trace changed them.

**Loops under a lock.** CPython looks for signals where a loop jumps back. From 3.12 on it forgets, for some of these jumps,
that a `try` or `with` is around them: an interrupt there skips the `finally`, or leaves the lock locked. So no loop stands
directly inside a `try` or `with` that has to hold; it is a function of its own, which is called there. (A test reads the
bytecode for it.)
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

# In `_signal`, which is written in C: `signal` makes an enum of each number, fifty times slower.
_NUMBERS = tuple(map(int, signal.valid_signals()))


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Signal handlers of Python run at the end of the block. Only the main thread runs any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[tuple[int, Any]] = []
    handlers: dict[int, Any] = {n: handler for n in _NUMBERS if callable(handler := _signal.getsignal(n))}
    changed = []
    try:
        for number in handlers:
            changed.append(number)
            _signal.signal(number, lambda n, frame: arrived.append((n, frame)))
        yield
    finally:
        for number in changed:
            _signal.signal(number, handlers[number])
        for number, frame in arrived:
            handlers[number](number, frame)


class _Diverted:
    """A signal handler that runs in a context."""

    __slots__ = ("context", "handler")

    def __init__(
        self, handler: Callable[..., Any], context: Callable[[], contextlib.AbstractContextManager[Any]]
    ) -> None:
        self.handler = handler
        self.context = context

    def __call__(self, number: int, frame: Any) -> None:
        with self.context():
            self.handler(number, frame)


def divert(context: Callable[[], contextlib.AbstractContextManager[Any]]) -> list[tuple[int, _Diverted]]:
    """From now on, the handlers of signals run in a context; but for Python's own, which only raises `KeyboardInterrupt`.

    Returns:
      What `undivert` takes back.
    """
    if threading.current_thread() is not threading.main_thread():
        return []
    plain = signal.default_int_handler
    handlers = [(n, h) for n in _NUMBERS if callable(h := _signal.getsignal(n)) and h is not plain]
    diverted = [(number, _Diverted(handler, context)) for number, handler in handlers]
    for number, handler in diverted:
        _signal.signal(number, handler)
    return diverted


def undivert(diverted: list[tuple[int, _Diverted]]) -> None:
    """Put handlers back, but for those that were changed meanwhile."""
    for number, handler in diverted:
        if _signal.getsignal(number) is handler:
            _signal.signal(number, handler.handler)
