"""Python's garbage collector, held back while many objects are made.

The collector looks through the young objects each time that some thousand more have been made, and now and then through all there
are. A function that makes objects for each state of a large model, and drops none of them, would set it off again and again for
nothing: with a hundred thousand states that takes longer than the work.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def uncollected(function: Callable[P, R]) -> Callable[P, R]:
    """A function during which the collector waits, unless it waits already."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not gc.isenabled():
            return function(*args, **kwargs)
        gc.disable()
        try:
            return function(*args, **kwargs)
        finally:
            gc.enable()

    return call
