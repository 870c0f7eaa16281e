"""`mu.on_commit`: to hear of the values that states are given, when all of a commit is done."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, Self

from mutatis.core.committed import Observer, observe, observers_of
from mutatis.core.nodes import identity
from mutatis.core.showing import show_value
from mutatis.core.structure import structure
from mutatis.errors import ArgumentError
from mutatis.model.filters import FilterLike, Path
from mutatis.model.walks import variables


class Observation:
    """The result of `mu.on_commit`: `stop` ends the calls; as a context manager, so does the end of the block.

    Args:
      cells: the states, to which it holds weak references.
      tell: the function that is called after each commit that has written some of them, with a list of these.
    """

    __slots__ = ("_cells", "_tell")

    def __init__(self, cells: Iterable[Any], tell: Observer) -> None:
        self._cells = tuple(map(weakref.ref, cells))
        self._tell = tell
        self._change(lambda known: (*known, tell))

    def stop(self) -> None:
        """End the calls of the function."""
        self._change(lambda known: tuple(other for other in known if other is not self._tell))
        self._cells = ()

    def _change(self, change: Callable[[tuple[Observer, ...]], tuple[Observer, ...]]) -> None:
        cells = [cell for reference in self._cells if (cell := reference()) is not None]
        structure.changed(*cells)  # a compiled call knows which of its states are observed
        for cell in cells:
            observe(cell, change(observers_of(cell)))
        structure.changed(*cells)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def on_commit(node: Any, fn: Callable[[Path, Any], Any], *filters: FilterLike) -> Observation:
    """Call a function whenever states have got new values, for instance to log them or to check a range.

    The function is called after the outermost transform or transaction has committed, once for each state that was written, by an
    assignment or by a jitted step. It sees all new values of the commit. An error that it raises reaches the caller of the step,
    and takes nothing back.

    States without observers cost nothing. A jitted step over observed states takes a few microseconds more. A state that an
    observer reads is copied by the next step that would have donated its memory.

    Args:
      node: a Module, a Variable, or a list, tuple or dict of them.
      fn: the function, called as ``fn(path, variable)``.
      *filters: which states; all, if none is given. States that are made later are not observed.

    Returns:
      An observation: its method `stop` ends the calls, and as a context manager it ends them with the block. Otherwise they last
      as long as the states.

    Raises:
      ArgumentError: `fn` is not a function.

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
    paths = {identity(cell): path for path, cell in variables(node, *filters).items()}

    def tell(cells: list[Any]) -> None:
        for cell in cells:
            fn(paths[identity(cell)], cell)

    return Observation(variables(node, *filters).values(), tell)
