"""Marks: states that can be read and not written, for good or for a while."""

from __future__ import annotations

from typing import Any, Generic, NoReturn, TypeVar

from mutatis.core.stamps import Stamp, in_ordinary_code, stamped
from mutatis.errors import ArgumentError
from mutatis.model.filters import FilterLike
from mutatis.model.variables import set_mark
from mutatis.model.walks import variables

T = TypeVar("T")


class _FreezeContext(Generic[T]):
    """States that were frozen or thawed; leaving it as a context puts the marks back."""

    def __init__(self, node: T, filters: tuple[FilterLike, ...], mark: str | None) -> None:
        self._node = node
        self._verb = "thawed" if mark is None else "frozen"
        self._before = {cell: cell._frozen for cell in variables(node, *filters).values()}
        for cell in self._before:
            set_mark(cell, "_frozen", mark)

    def __repr__(self) -> str:
        return f"<{len(self._before)} states are {self._verb}; a `with` block ends it>"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what Python and others look for
            raise AttributeError(name)
        raise AttributeError(
            f"the model itself was {self._verb}, and `mu.freeze` and `mu.thaw` give a context manager: "
            f"write `model.{name}`, not `mu.freeze(model).{name}`",
            name=name,
            obj=self,
        )

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise ArgumentError(
            f"the model itself was {self._verb}, and a context manager came back: it cannot be called",
            expected="the model",
            cure="`mu.freeze(model, mu.Param)`, and then `model(x)`.",
        )

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


def freeze(node: T, *filters: FilterLike) -> _FreezeContext[T]:
    """Make states read-only: from now on, or for a ``with`` block.

    A write to a frozen state is an error. `mu.grad` and `mu.Optimizer` leave frozen states out, so you freeze the parameters that
    are not to be trained. Filters select a frozen state as before: a frozen `Param` is still a `Param`.

    Raw JAX transforms may read a frozen state as a constant. So wrap a solver that is written in raw JAX in such a block:
    ``with mu.freeze(model): odeint(model.field, y, t)``.

    Args:
      node: a Module, a Variable, or a list, tuple or dict of them.
      *filters: which states; all, if none is given.

    Returns:
      An object that you may ignore. As a context manager it gives the node, and at the end of the block each state is as writable
      as it was before.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> layer = mu.nn.Linear(2, 1, rngs=mu.Rngs(0))
      >>> _ = mu.freeze(layer.kernel)
      >>> [*mu.grad(lambda layer, x: jnp.sum(layer(x)))(layer, jnp.ones(2))]
      [('bias',)]
      >>> with mu.freeze(layer):
      ...     layer.bias.frozen
      True
      >>> layer.bias.frozen
      False
    """
    return _FreezeContext(node, filters, "frozen")


def thaw(node: T, *filters: FilterLike) -> _FreezeContext[T]:
    """Make frozen states writable again: from now on, or for a ``with`` block.

    It also makes the states of a detached copy writable: raw JAX makes such copies when it rebuilds a model as a pytree.

    Args:
      node: a Module, a Variable, or a list, tuple or dict of them.
      *filters: which states; all, if none is given.

    Returns:
      An object that you may ignore. As a context manager it gives the node, and at the end of the block each state is as writable
      as it was before.

    Example:
      >>> import mutatis as mu
      >>> layer = mu.nn.Linear(2, 1, rngs=mu.Rngs(0))
      >>> _ = mu.freeze(layer)
      >>> _ = mu.thaw(layer, mu.PathContains("bias"))
      >>> layer.kernel.frozen, layer.bias.frozen
      (True, False)
    """
    return _FreezeContext(node, filters, None)
