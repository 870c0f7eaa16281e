"""`mu.on_commit`: to hear of the values that states are given, when all of a commit is done."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, Self

from mutatis.core.committed import observe, observers_of
from mutatis.core.showing import show_value
from mutatis.core.structure import structure
from mutatis.errors import ArgumentError
from mutatis.model.filters import FilterLike, Path
from mutatis.model.walks import variables


class Observation:
    """What `on_commit` gives: `stop` ends it; as a context manager, so does the end of the block."""

    __slots__ = ("_notices",)

    def __init__(self, notices: dict[Any, Callable[[], None]]) -> None:
        self._notices = notices
        self._change(lambda known, notice: (*known, notice))

    def stop(self) -> None:
        """Observe no more."""
        self._change(lambda known, notice: tuple(other for other in known if other is not notice))
        self._notices = {}

    def _change(self, change: Callable[[tuple[Any, ...], Any], tuple[Any, ...]]) -> None:
        structure.changed(*self._notices)  # a compiled call knows which of its states are observed
        for cell, notice in self._notices.items():
            observe(cell, change(observers_of(cell), notice))
        structure.changed(*self._notices)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def on_commit(node: Any, fn: Callable[[Path, Any], Any], *filters: FilterLike) -> Observation:
    """Call a function whenever states have been given values, say to log them or to check a range.

    It is called when the outermost transform or transaction has committed, and sees all that was: once for each state that was
    written, whether by an assignment or by a jitted step. What it raises reaches who made the call, and undoes nothing. Without
    observers this costs nothing; a jitted step over observed states takes a few microseconds more, and a state that an
    observer reads is copied by the next step that would have donated it.

    Args:
      node: a Module, a Variable, or a list, tuple or dict of them.
      fn: ``fn(path, variable)``.
      *filters: which of its states; all, if none is given. States that are made later are not observed.

    Returns:
      What ends it: ``.stop()``, or the end of a ``with`` block. It lasts as long as the states otherwise.

    Example:
      >>> import mutatis as mu
      >>> n = mu.Variable(0)
      >>> with mu.on_commit(n, lambda path, n: print("now", int(n))):
      ...     n.value = 1
      ...     mu.jit(lambda: n.set(n + 1))()
      now 1
      now 2
    """
    if not callable(fn):
        raise ArgumentError(
            "`on_commit` needs a function to call",
            expected="a function of (path, variable)",
            got=show_value(fn),
            cure="`mu.on_commit(model, lambda path, state: print(path, state), mu.BatchStat)`",
        )
    cells = variables(node, *filters).items()
    return Observation({cell: functools.partial(_notice, fn, path, weakref.ref(cell)) for path, cell in cells})


def _notice(fn: Callable[[Path, Any], Any], path: Path, reference: Callable[[], Any]) -> None:
    fn(path, reference())
