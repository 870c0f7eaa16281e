"""Interrupts: signal handlers wait while results may be lost.

JAX's compiled call runs no Python code, so a handler that raises (Ctrl-C) runs before it or after it. The first call of a program
is made in Python, and an exception between the run and the return would lose the results of donated buffers.

**Loops under a lock.** CPython looks for signals where a loop jumps back. From 3.12 on it forgets, for some of these jumps,
that a `try` or `with` is around them: an interrupt there skips the `finally`, or leaves the lock locked. So no loop stands
directly inside a `try` or `with` that has to hold; it is a function of its own, which is called there. (A test reads the
bytecode for it.)
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Signal handlers of Python run at the end of the block. Only the main thread runs any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[tuple[int, Any]] = []
    handlers: dict[int, Any] = {n: handler for n in signal.valid_signals() if callable(handler := signal.getsignal(n))}
    changed = []
    try:
        for number in handlers:
            changed.append(number)
            signal.signal(number, lambda n, frame: arrived.append((n, frame)))
        yield
    finally:
        for number in changed:
            signal.signal(number, handlers[number])
        for number, frame in arrived:
            handlers[number](number, frame)
