"""Marks: states that can be read and not written, for good or for a while."""

from __future__ import annotations

from typing import Generic, TypeVar

from mutatis.core.stamps import Stamp, in_ordinary_code, stamped
from mutatis.model.filters import FilterLike
from mutatis.model.variables import set_mark
from mutatis.model.walks import variables

T = TypeVar("T")


class _Marked(Generic[T]):
    """States that were frozen or thawed; leaving it as a context puts the marks back."""

    def __init__(self, node: T, filters: tuple[FilterLike, ...], mark: str | None) -> None:
        self._node = node
        self._before = {cell: cell._frozen for cell in variables(node, *filters).values()}
        for cell in self._before:
            set_mark(cell, "_frozen", mark)

    def __enter__(self) -> T:
        # A raw transform that reads the states, say a solver, is not to be found again with their values.
        self._stamped = stamped(Stamp()) if in_ordinary_code() else None
        if self._stamped is not None:
            self._stamped.__enter__()
        return self._node

    def __exit__(self, *_: object) -> None:
        if self._stamped is not None:
            self._stamped.__exit__(None, None, None)
        for cell, mark in self._before.items():
            set_mark(cell, "_frozen", mark)


def freeze(node: T, *filters: FilterLike) -> _Marked[T]:
    """Make states readable only, for good or, as a context manager, for a while.

    A frozen state still matches its kind, is left out by `grad` and optimizers, and may be a constant in raw JAX. In ordinary
    code a solver of raw JAX goes into such a block: ``with mu.freeze(model): odeint(model.field, y, t)``.

    Example:
      >>> import mutatis as mu
      >>> w = mu.Param(1.0)
      >>> with mu.freeze(w):
      ...     w.value = 2.0
      Traceback (most recent call last):
      ...
      mutatis.errors.FrozenStateError: frozen state (Param without a place in a model) was written
      Make it live again: `mu.thaw(model)`.
    """
    return _Marked(node, filters, "frozen")


def thaw(node: T, *filters: FilterLike) -> _Marked[T]:
    """Make frozen (and detached) states live again, for good or, as a context manager, for a while."""
    return _Marked(node, filters, None)
