"""The ledger: what a function does with states, seen without running it.

The function is traced with `mu.eval_shape`, and each transaction on the way hands in what it recorded. The numbers are those of
the code as it is traced: a branch counts as taken, and a `while_loop` as a number that is not known.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from mutatis.core import access, frames, naming
from mutatis.core.avals import shapes_of, show_type
from mutatis.core.showing import show_bytes, show_count
from mutatis.core.transactions import Transaction
from mutatis.inspect.tables import Table
from mutatis.model.modules import Module, is_training
from mutatis.model.variables import Variable
from mutatis.tracing.arguments import argument_names, function_name, named_nodes
from mutatis.tracing.captures import search
from mutatis.tracing.lanes import LaneTransaction
from mutatis.tracing.scope import Scope
from mutatis.transforms.abstract import eval_arrays
from mutatis.transforms.jit import jit


@dataclasses.dataclass(frozen=True)
class Entry:
    """The use that a function makes of one state, a row of `mu.inspect.ledger`.

    Attributes:
      path: the path of the state, from the name that the function has for its owner.
      kind: the name of its kind.
      type: its shape and dtype, or those of its leaves, when the function begins (when it ends, if it makes the state).
      bytes: the size of its arrays in bytes.
      read: whether the function reads it.
      updates: how often a call writes it; None if that is not known.
      made: whether the function makes it.
      frozen: whether it is read-only.
      training: the value of `training` of the module that holds it.
      sharding: how it is spread over devices; empty for one device.
      through: the transforms that it goes through on the way to the code that uses it, from the outside in, each with its effect:
        ``"scan(body): carried"``. *carried*: from one iteration to the next. *split*: each iteration, lane or device has a part.
        *shared*: all of them have the same. *a stream each*: each lane draws from a stream of its own.
    """

    path: str
    kind: str
    type: str
    bytes: int
    read: bool = False
    updates: int | None = 0
    made: bool = False
    frozen: bool = False
    training: bool = True
    sharding: str = ""
    through: tuple[str, ...] = ()

    @property
    def changed(self) -> bool:
        """Whether a call makes the state or gives it another value."""
        return self.made or self.updates != 0

    @property
    def unused(self) -> bool:
        """Whether the function can reach the state, but neither reads nor writes it."""
        return not self.read and not self.changed


@dataclasses.dataclass(frozen=True)
class Collective:
    """An operation in which devices exchange data, as `Ledger.collectives` lists them.

    Attributes:
      name: the name of the operation in XLA, such as ``"all-reduce"``.
      type: the shape and dtype of the data that each device receives.
      count: the number of such operations in the program.
    """

    name: str
    type: str
    count: int


@dataclasses.dataclass(frozen=True, repr=False)
class Ledger(Table):
    """The use that a function makes of each state that it can reach, as `mu.inspect.ledger` returns it.

    `print` shows it as text, `rich.print` as a table. ``ledger["model.bias"]`` is the entry of a path.

    Attributes:
      label: the name of the function.
      entries: the states, in the order of their paths, a tuple of `Entry`.
    """

    label: str
    entries: tuple[Entry, ...]
    _compile: Callable[[], str] = dataclasses.field(repr=False, compare=False)
    header = ("state", "kind", "type", "size", "read", "updates", "through")
    left = ("state", "kind", "type", "through")

    def title(self) -> str:
        """Return the line that stands above the table in a notebook."""
        return f"{self.label}: {show_count(len(self.entries), 'state')}, {len(self.changed):,} changed"

    def __getitem__(self, path: str) -> Entry:
        """Return the entry of a path."""
        for entry in self.entries:
            if entry.path == path:
                return entry
        raise KeyError(f"no state `{path}`; there are {', '.join(entry.path for entry in self.entries) or 'none'}")

    @property
    def changed(self) -> tuple[Entry, ...]:
        """The entries of the states that a call changes or makes. A checkpoint has to hold these."""
        return tuple(entry for entry in self.entries if entry.changed)

    def why(self, path: str) -> str:
        """Return a sentence that says why the state at this path is, or is not, updated."""
        if path not in {entry.path for entry in self.entries}:
            known = ", ".join(entry.path for entry in self.entries) or "none"
            return f"`{self.label}` cannot reach a state `{path}`: pass its owner, or name it. It reaches: {known}."
        entry = self[path]
        if entry.changed:
            times = {None: "an unknown number of times", 1: "once"}.get(entry.updates, f"{entry.updates} times")
            return f"`{path}` is {'made' if entry.made else 'updated'}: a call writes it {times}."
        used = "only reads" if entry.read else "neither reads nor writes"
        reason = " It is frozen: `mu.thaw(...)` lets it be written." if entry.frozen else ""
        if not entry.training:
            reason += " Its module is in evaluation mode: `model.train()` lets layers update their statistics."
        return f"`{path}` is not updated: `{self.label}` {used} it.{reason}"

    def collectives(self) -> tuple[Collective, ...]:
        """List the data exchanges between devices in a call, under the present shardings. Compiles the function, but does not run
        it.
        """
        found: Counter[tuple[str, str]] = Counter()
        for kind, name in _COLLECTIVE.findall(self._compile()):
            found[name, re.sub(r"\{[^}]*\}", "", kind)] += 1
        return tuple(Collective(name, kind, count) for (name, kind), count in sorted(found.items()))

    def diff(self, other: Ledger) -> LedgerDiff:
        """Compare this ledger with another one, state by state."""
        mine = {entry.path: entry for entry in self.entries}
        theirs = {entry.path: entry for entry in other.entries}
        changes = []
        for path in mine | theirs:
            a, b = mine.get(path), theirs.get(path)
            if a is None or b is None:
                changes.append((path, "state", "-" if a is None else a.type, "-" if b is None else b.type))
                continue
            for field in dataclasses.fields(Entry):
                before, after = getattr(a, field.name), getattr(b, field.name)
                if before != after:
                    changes.append((path, field.name, _show(before), _show(after)))
        return LedgerDiff(self.label, other.label, tuple(changes))

    def cells(self) -> list[Sequence[str]]:
        """Return the text of each row. States that the function neither reads nor writes are left out."""
        return [
            (
                entry.path,
                entry.kind + (", frozen" if entry.frozen else ""),
                entry.type + (f" {entry.sharding}" if entry.sharding else ""),
                show_bytes(entry.bytes),
                "yes" if entry.read else "",
                ("made, " if entry.made else "") + ("?" if entry.updates is None else str(entry.updates or "")),
                ", ".join(entry.through),
            )
            for entry in self.entries
            if not entry.unused
        ]

    def footer(self) -> Sequence[str]:
        """Return the text of the sums."""
        used = [entry for entry in self.entries if not entry.unused]
        changed = sum(entry.bytes for entry in self.changed)
        left = len(self.entries) - len(used)
        return (
            f"{len(used)} states" + (f", {left} left alone" if left else ""),
            "",
            f"{show_bytes(changed)} updated",
            show_bytes(sum(entry.bytes for entry in used)),
            str(sum(entry.read for entry in used)),
            str(len(self.changed)),
            "",
        )


@dataclasses.dataclass(frozen=True, repr=False)
class LedgerDiff(Table):
    """The differences of two ledgers, as `Ledger.diff` returns them. It is false if there are none.

    Attributes:
      before: the name of the function of the first ledger.
      after: the name of the function of the second ledger.
      changes: tuples (path, field, before, after); the field is ``"state"`` where one of the ledgers does not have the state.
    """

    before: str
    after: str
    changes: tuple[tuple[str, str, str, str], ...]
    header = ("state", "what", "before", "after")
    left = header

    def __bool__(self) -> bool:
        return bool(self.changes)

    def cells(self) -> Sequence[Sequence[str]]:
        """Return the text of each row."""
        return self.changes


def ledger(f: Callable[..., Any]) -> Callable[..., Ledger]:
    """Make a function that lists the states that a call of `f` reads, writes and makes. Nothing is run or allocated.

    Args:
      f: a function, also a transformed one, or a callable Module.

    Returns:
      A function of the arguments of `f` that returns a `Ledger`; a `jax.ShapeDtypeStruct` may stand for an array. `print` shows
      the Ledger as a table. The column `updates` says how often a call writes a state, and `through` by which transforms a state
      reaches the code that uses it.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> norm, calls = mu.nn.BatchNorm(4), mu.Variable(0)
      >>> @mu.jit
      ... def step(x):
      ...     calls.value += 1
      ...     return norm(x)
      >>> ledger = mu.inspect.ledger(step)(jnp.ones((8, 4)))
      >>> print(ledger)
      state       kind       type          size  read  updates  through
      calls       Variable   int32[]        4 B   yes        1  jit(step)
      norm.bias   Param      float32[4]    16 B   yes           jit(step)
      norm.mean   BatchStat  float32[4]    16 B   yes        1  jit(step)
      norm.scale  Param      float32[4]    16 B   yes           jit(step)
      norm.var    BatchStat  float32[4]    16 B   yes        1  jit(step)
      5 states               36 B updated  68 B     5        3
      >>> ledger.why("calls")
      '`calls` is updated: a call writes it once.'
    """

    @functools.wraps(f)
    def of(*args: Any, **kwargs: Any) -> Ledger:
        named = named_nodes(argument_names(f, args, kwargs), [*args, *kwargs.values()])
        roots = [*named, *search(f).roots]
        before = Scope(roots)
        types: dict[Any, Any] = {
            cell: _shapes(access.peek(cell)) for cell in before.cells if not access.is_deferred(cell)
        }
        shardings = {cell: _show_sharding(cell) for cell in before.cells}
        entries: dict[Any, Entry] = {}
        book = _Book()

        def entry(cell: Any, path: str, **more: Any) -> Entry:
            leaves = jax.tree.leaves(types[cell])
            return Entry(
                path=path,
                kind=type(cell).__name__,
                type=show_type(types[cell]),
                bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
                frozen=cell.frozen,
                **more,
            )

        def run(*args: Any, **kwargs: Any) -> None:
            out = f(*args, **kwargs)
            after = Scope([*roots, *named_nodes(["result"], [out])])
            new = {cell: _shapes(access.peek(cell)) for cell in after.cells if cell not in types}
            types.update(new)
            owners = {id(o): p for o, p in zip(after.encoder.objects, after.encoder.object_paths, strict=True)}
            modes = {p: is_training(o) for o in after.encoder.objects if isinstance(o, Module) for p in [owners[id(o)]]}
            for cell, path in zip(after.cells, after.encoder.paths, strict=True):
                entries[cell] = entry(
                    cell,
                    str(after.locate(cell)),
                    made=cell in new and not access.is_deferred(cell),
                    training=next((modes[path[:n]] for n in range(len(path) - 1, 0, -1) if path[:n] in modes), True),
                    sharding=shardings.get(cell, ""),
                )

        with frames.recorded(book.note):
            eval_arrays(run, args, kwargs)
        root = book.pages[-1]
        for found in {**root.tx.seen, **root.tx.written}:
            # What no name leads to, as `mu.jit` finds it, too; but nothing that was made on the way and is gone.
            lasts = found not in root.tx.born and found._birth is None and access.holds_value(found)
            if lasts and found not in entries:
                types[found] = _shapes(access.peek(found))
                entries[found] = entry(found, naming.path_of(found) or f"({naming.made_at(found)})")
        used = [
            dataclasses.replace(
                entry,
                read=cell in root.tx.seen,
                updates=book.updates(root, cell),
                through=book.through(root, cell),
            )
            for cell, entry in entries.items()
        ]
        compiled = jit(f) if not hasattr(f, "lower") else f
        return Ledger(
            function_name(f),
            tuple(sorted(used, key=lambda entry: entry.path)),
            lambda: compiled.lower(*args, **kwargs).compile().as_text(),
        )

    return of


@dataclasses.dataclass(eq=False)
class _Page:
    """One transaction: what it recorded, and how cells look in it."""

    tx: Transaction
    roles: dict[Any, str]


class _Book:
    """The transactions of a function, inner ones first."""

    def __init__(self) -> None:
        self.pages: list[_Page] = []
        self._calls: dict[Transaction | None, dict[Any, list[_Page]]] = {}

    def note(self, tx: Transaction) -> None:
        """Take in a transaction that has ended well, and still holds its values."""
        used = {cell: tx.values[cell] for cell in (*tx.seen, *tx.written) if cell in tx.values}
        self.pages.append(_Page(tx, {cell: _role(tx, cell, value) for cell, value in used.items()}))

    def _inside(self, page: _Page) -> Iterable[list[_Page]]:
        """The transactions directly inside one, those of one call of a transform together."""
        if not self._calls:
            for inner in self.pages:
                calls = self._calls.setdefault(inner.tx.parent, {})
                calls.setdefault((inner.tx.label, inner.tx.locate), []).append(inner)
        return self._calls.get(page.tx, {}).values()

    def updates(self, page: _Page, cell: Any) -> int | None:
        """How often a call writes a cell."""
        calls = [[p for p in pages if cell in p.tx.written] for pages in self._inside(page)]
        inner = [[self.updates(p, cell) for p in pages] for pages in calls if pages]
        direct = max(0, page.tx.written.get(cell, 0) - len(inner))  # each call of a transform commits once
        if not direct and not inner:
            return 0
        if page.tx.repeats is None or any(None in numbers for numbers in inner):
            return None
        return page.tx.repeats * (direct + sum(max(n for n in numbers if n is not None) for numbers in inner))

    def through(self, page: _Page, cell: Any) -> tuple[str, ...]:
        """The transforms inside one that a cell goes through."""
        found: dict[str, None] = {}
        for pages in self._inside(page):
            for inner in pages:
                if cell in inner.roles:
                    role = inner.roles[cell]
                    found[inner.tx.label + (f": {role}" if role else "")] = None
                found |= dict.fromkeys(self.through(inner, cell))
        return tuple(found)


def _role(tx: Transaction, cell: Any, value: Any) -> str:
    """What a transform does with a state."""
    lanes = isinstance(tx, LaneTransaction)
    if not lanes and tx.repeats == 1:
        return ""
    if isinstance(tx, LaneTransaction) and tx.is_forked(cell):
        return "a stream each"
    outside = access.peek(cell)
    if outside is not None and shapes_of(outside) != shapes_of(value):
        return "split"
    return "carried" if cell in tx.written and not lanes else "shared"


def _shapes(value: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), value)


def _show_sharding(cell: Variable) -> str:
    spread = access.placement(cell)
    return "" if spread is None else ", ".join(str(getattr(sharding, "spec", sharding)) for sharding in spread)


def _show(value: Any) -> str:
    return ", ".join(value) or "-" if isinstance(value, tuple) else "?" if value is None else str(value)


_COLLECTIVE = re.compile(
    r"= (\(?[a-z0-9]+\[.*?\)?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
