"""Programs: a stateful function of one structure as a pure function under `jax.jit`.

The pure function takes one positional argument per cell and then the leaves of the user's arguments. Each trace of it leaves a
**record** (`record`): which cells were written, what was returned, what was built. The program returns ``{number of the record:
values}``: the key of a dict is static in a pytree, so what the values mean comes back with them and no Python code runs inside
the compiled call.

Which call a program is traced for, it does not know: who calls it sets `tracing.run`, on this thread, to what makes a trace.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax

from mutatis import _compat
from mutatis.compilation.options import Options
from mutatis.compilation.record import TraceRecord
from mutatis.compilation.shardings import constrain
from mutatis.errors import MutatisError


class NeedsTraceError(Exception):
    """A compiled call would trace, though its shapes are known: JAX's settings changed, or its caches were cleared."""


def refuse_to_trace(_program: Program, _flat: Sequence[Any]) -> dict[int, Any]:
    """What `tracing.run` is where nothing is to be traced.

    Raises:
      NeedsTraceError: always.
    """
    raise NeedsTraceError


_NOTED = 64  # traces of one program


class _Tracing(threading.local):
    def __init__(self) -> None:
        # Given a program and JAX's tracers, runs the user's function on them: what the pure function returns.
        self.run: Callable[[Program, Sequence[Any]], dict[int, Any]] = refuse_to_trace


tracing = _Tracing()


class Program:
    """One structure's pure function, the records of its traces, and the `jax.jit`s of it.

    Args:
      options: those of `mu.jit`.
      label: the name of the user's function.
      settings: those of JAX that it is traced under.
      count: the number of cells.
      positions: of the arguments that JAX gets after the cells: numbers and keywords.
      placements: for each cell its shardings, or None.
      shardings: for each cell, and then for each position, what `in_shardings` says; None if nothing is said.
    """

    def __init__(
        self,
        options: Options,
        label: str,
        settings: Hashable,
        count: int,
        positions: tuple[Any, ...],
        placements: list[Any],
        shardings: tuple[Any, ...] | None = None,
    ) -> None:
        self.options = options
        self.label = label
        self.settings = settings
        self.count = count
        self.records: dict[int, TraceRecord] = {}
        self._placements = placements
        self._shardings = shardings
        self._positions = positions
        self._numbers = itertools.count()
        self._traced: deque[tuple[Any, int]] = deque(maxlen=_NOTED)  # types of values, and the record of their trace
        self._variants: dict[Hashable, Variant] = {}  # more than one if its traces differ in what they write
        me = weakref.ref(self)

        def pure(*flat: Any) -> dict[int, Any]:
            program = me()
            if program is None:
                raise MutatisError(f"`{label}` was traced when it was dropped already")
            return tracing.run(program, flat)

        pure.__name__ = pure.__qualname__ = label
        self._pure = pure
        self.undonated = self.make_jit(())

    def make_jit(self, donated: tuple[int, ...]) -> Any:
        """The pure function under `jax.jit`, with these arguments donated (and those that the user named)."""
        options = self.options
        users = tuple(self.count + i for i in range(len(self._positions)) if self._positions[i] in options.donate_args)
        shardings = {} if self._shardings is None else {"in_shardings": self._shardings}
        return jax.jit(
            self._pure,
            donate_argnums=(*donated, *users),
            keep_unused=options.keep_unused,
            inline=options.inline,
            **({} if options.compiler_options is None else {"compiler_options": options.compiler_options}),
            **shardings,
            **options.where,
        )

    def add(self, record: TraceRecord) -> int:
        """Keep the record of a trace; its number."""
        number = next(self._numbers)
        self.records[number] = record
        return number

    def known(self, types: Any) -> int | None:
        """The number of the record that a trace with values of these types would come to; None if there was none."""
        return None if types is None else next((number for known, number in [*self._traced] if known == types), None)

    def note(self, types: Any, number: int) -> None:
        """A trace with values of these types has come to this record."""
        self._traced.append((types, number))

    def forget_traces(self) -> None:
        """JAX has."""
        self._traced.clear()

    def variant_for(self, record: TraceRecord) -> Variant:
        """How to call the program for the shapes of a record."""
        key = (record.written, record.same_type, record.donatable, record.waits)
        if key not in self._variants:
            self._variants[key] = Variant(self, record)
        return self._variants[key]

    def keep_placement(self, number: int, value: Any, elsewhere: Any) -> Any:
        """A written value, constrained to where the cell of this number is placed, unless it is to be elsewhere."""
        if elsewhere is None and self._shardings is not None:
            elsewhere = self._shardings[number]
        if elsewhere is not None and elsewhere is not _compat.UNSPECIFIED:
            return constrain(value, elsewhere)
        shardings = self._placements[number]
        if shardings is None:
            return value
        leaves, treedef = jax.tree.flatten(value)
        if len(leaves) != len(shardings):
            return value
        return jax.tree.unflatten(treedef, [_keep(x, s) for x, s in zip(leaves, shardings, strict=True)])


def _keep(value: Any, sharding: Any) -> Any:
    fits = isinstance(sharding, jax.sharding.NamedSharding) and len(sharding.spec) <= value.ndim
    return constrain(value, sharding) if fits else value


class Variant:
    """One way to call a program: with these cells written and these buffers donated."""

    __slots__ = ("called", "donated", "jitted", "retypes", "waits", "written")

    def __init__(self, program: Program, record: TraceRecord) -> None:
        self.called: set[int] = set()  # the numbers of the records for which it was called
        self.written = record.written
        self.retypes = len(record.same_type) < len(record.written)  # some cell holds another type afterwards
        self.waits = bool(record.waits)
        donate = program.options.donate
        donates = donate is True or (donate == "auto" and not record.waits)
        self.donated = frozenset(record.donatable) if donates else frozenset()
        self.jitted = program.make_jit(tuple(sorted(self.donated)))
