"""`mu.transaction`: what every transform is, around ordinary code.

Inside, writes go to an overlay; at the end they are committed together, or dropped. So a step can be tried: speculative
decoding, a line search, the accept or reject of a sampler, an update that is undone if the loss is not finite.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from mutatis import _compat
from mutatis.core import access, naming, transactions
from mutatis.core.interrupts import held_back
from mutatis.core.journal import Journal
from mutatis.core.naming import show_path
from mutatis.core.transactions import Transaction
from mutatis.errors import TransactionError
from mutatis.model.filters import FilterLike, Path, as_filter
from mutatis.model.graph import Encoder
from mutatis.model.modules import Module
from mutatis.model.walks import check_node


class Cells(tuple[Any, ...]):
    """Variables, in order. ``v in cells`` asks for the very same one: ``==`` compares values."""

    __slots__ = ()

    def __contains__(self, cell: object) -> bool:
        return any(cell is known for known in self)


class EagerTransaction:
    """A block of ordinary code as a transaction; see `transaction`."""

    __slots__ = ("_node", "_paths", "_tx")

    def __init__(self, nodes: tuple[Any, ...]) -> None:
        self._node = check_node(nodes[0] if len(nodes) == 1 else nodes)

    @property
    def reads(self) -> tuple[Any, ...]:
        """The Variables that were read so far, in order."""
        return Cells(self._tx.seen)

    @property
    def writes(self) -> tuple[Any, ...]:
        """The Variables that were written so far, in order, without those that were rolled back."""
        return Cells(self._tx.written)

    def rollback(self, *filters: FilterLike) -> None:
        """Take back the changes of the block so far. The block goes on after the call.

        Args:
          *filters: which states get their old values back. Without filters, all of them do, and attributes and containers are put
            back too. To try again with new random numbers, keep the random streams: ``tx.rollback(mu.Not(mu.RngState))``.

        Raises:
          TransactionError: the block has ended, or another transaction or a transform is open inside it.
          TraceLevelError: a raw JAX transform has read a written value.
        """
        tx = self._tx
        if transactions.current() is not tx or _compat.current_trace() not in (tx.trace, _compat.EVAL_TRACE):
            raise TransactionError(
                "what is to be rolled back is not the innermost block",
                where=naming.where(),
                expected="a call in its own block, before the end",
                cure="Raise an exception there, or open another one there: `with mu.transaction() as inner: inner.rollback()`.",
            )
        selects = as_filter(filters if filters else ...)
        tx.drop(lambda cell: selects(self._paths.get(cell, ()), cell))
        if not filters:
            tx.journal.undo()

    def _locate(self, cell: Any) -> str | None:
        return show_path(self._paths[cell]) if cell in self._paths else None

    def _is_open(self) -> bool:
        tx = transactions.current()
        while tx is not None and tx is not self._tx:
            tx = tx.parent
        return tx is not None

    def __enter__(self) -> Self:
        if hasattr(self, "_tx"):
            raise TransactionError(
                "a transaction was entered a second time",
                cure="Make one for each block: `with mu.transaction(model) as tx: ...`.",
            )
        encoder = Encoder(describe=False)
        encoder.encode(self._node)
        self._paths: dict[Any, Path] = dict(zip(encoder.cells, encoder.paths, strict=True))
        containers = [obj for obj in encoder.objects if not isinstance(obj, Module)]
        self._tx = Transaction("transaction", locate=self._locate, journal=Journal(containers))
        if self._tx.parent is not None and self._tx.parent.trace is self._tx.outer:
            self._tx.pinned |= self._tx.parent.pinned  # no transform is in between that could tell the two apart
        self._tx.__enter__()  # and nothing after it: an interrupt would leave it open
        return self

    def __exit__(self, kind: type[BaseException] | None, value: Any, trace: TracebackType | None) -> None:
        try:
            with held_back():
                self._commit() if kind is None else self._abandon()
        except BaseException:
            if self._is_open():  # a value cannot be kept, or an interrupt came before it was held back
                self._abandon()
            raise

    def _commit(self) -> None:
        tx = self._tx
        if transactions.current() is not tx or tx.open_parent() is not tx.parent:
            self._abandon()
            raise TransactionError(
                "a transaction ended before another one that began in it, or after the one that it began in",
                cure="End the inner one first: leave no `with mu.transaction()` open at a `yield` or `await` where others run.",
            )
        access.commit(tx)

    def _abandon(self) -> None:
        if self._is_open():
            self._tx.__exit__(BaseException, None, None)
        else:  # it ended with the one that it began in
            self._tx.journal.undo()
            self._tx.close()


def transaction(*nodes: Any) -> EagerTransaction:
    """Run the code of a ``with`` block as a transaction: all of its changes are kept, or none.

    If the block ends well, its writes are committed. If it raises, or calls ``tx.rollback()``, the values of all states and the
    attributes of all modules are as they were before. Changes to plain lists and dicts are rolled back in the named nodes only.

    Transactions nest: the outer one can still drop the writes that an inner one committed. Jitted functions and other transforms
    work in the block as elsewhere, except that they donate no memory.

    A transaction keeps references to the old arrays, no copies. A state that was read in the block counts as held by your code,
    so the next compiled step that would donate its memory copies it, once.

    Args:
      *nodes: Modules, Variables, or lists, tuples or dicts of them, whose containers are to be rolled back too.

    Returns:
      A context manager. It gives an object with `rollback()`, and with `reads` and `writes`, the Variables that were read and
      written.

    Example:
      >>> import mutatis as mu
      >>> weight = mu.Param(1.0)
      >>> with mu.transaction() as tx:
      ...     weight.value = 5.0
      ...     if weight > 3:  # the block sees its own writes
      ...         tx.rollback()
      >>> weight
      Param(1.0, float32)
    """
    return EagerTransaction(nodes)
