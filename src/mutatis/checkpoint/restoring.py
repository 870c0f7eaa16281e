"""`restore`: the manifest is matched with the model, the files are checked and read; then the states are written."""

from __future__ import annotations

import collections
import dataclasses
import difflib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.dtypes import canonicalize_dtype as canonicalize

from mutatis.checkpoint.arrays import placed, read_arrays
from mutatis.checkpoint.disk import os_errors
from mutatis.checkpoint.manifest import Entry, Key, Leaf, Manifest, ValueType, label_of, read_manifest
from mutatis.checkpoint.saving import by_key, check_call
from mutatis.core import access
from mutatis.core.cells import UNSET, Deferred
from mutatis.core.naming import show_path
from mutatis.core.nodes import STACKED_PARTS, stacked_part
from mutatis.core.transactions import Transaction
from mutatis.errors import CheckpointError
from mutatis.model.filters import Filter, FilterLike, Path, as_filter
from mutatis.model.surgery import modules
from mutatis.model.variables import Variable
from mutatis.model.walks import variables


def restore(path: str | os.PathLike[str], node: Any, *filters: FilterLike, cast: bool = False) -> None:
    """Put the states of a checkpoint back into a node. Everything is checked before anything is written.

    A state with an explicit name is found by it, any other by its path. Values go where the model's states live
    (device, sharding). A frozen state is restored like any other, and stays frozen: it gets back what it had. A state
    without a value is created, and a model of shapes (`mu.eval_shape`) gets its arrays. A list of layers is restored from an
    `nn.Stack` of them, and the other way round.

    Args:
      path: the directory that `save` wrote.
      node: a Module, a Variable, or a list, tuple or dict of them.
      *filters: which states; all, if none is given. The checkpoint's other states are left alone.
      cast: whether numbers of another dtype are converted; never floats to integers, or complex numbers to real ones.

    Raises:
      CheckpointError: there is no checkpoint; it is damaged or not one of ours; or it does not fit the node: then all
        states that are missing, unexpected or of another kind, structure, shape or dtype are listed. The node is as it
        was. Also inside a transform, and in one of several processes.

    Example:
      >>> from mutatis import checkpoint
      >>> checkpoint.save("best", {"w": mu.Param(jnp.ones(2))})
      >>> model = {"w": mu.Param(jnp.zeros(2))}
      >>> checkpoint.restore("best", model)
      >>> model["w"].value
      Array([1., 1.], dtype=float32)
      >>> checkpoint.restore("best", {"weight": mu.Param(jnp.zeros(3))})
      Traceback (most recent call last):
      ...
      mutatis.errors.CheckpointError: the checkpoint at `...best` does not fit the model; nothing was restored
        missing:    weight
        unexpected: w
      Restore it into a model that was built as the saved one was, or a part of it by a filter.
    """
    path = check_call(path, "restored")
    while True:
        manifest = read_manifest(path)
        slots = _match(path, manifest, node, as_filter(filters or ...), cast)
        try:
            with os_errors(path, "read"):
                values = _read(path, manifest, slots)
            break
        except CheckpointError:
            if read_manifest(path) == manifest:
                raise
            # Another process saved over it while it was read here: now the new one is there.
    with Transaction("restore") as tx:
        for slot, value in zip(slots, values, strict=True):
            access.write(slot.cell, value)  # below the cell's `set`, so that frozen ones are restored too
        access.commit(tx)


@dataclasses.dataclass(frozen=True)
class _Slot:
    """A cell with the value it has now, None if it has none, and what it is restored from.

    Attributes:
      entries: one entry; or, for a cell that holds the states of stacked layers, one of each layer.
      index: the layer whose part of the entry it is, if the checkpoint has the layers stacked.
      stacks: whether the entries are stacked: one is, too.
    """

    cell: Variable
    now: Any
    entries: tuple[Entry, ...]
    index: int | None = None
    stacks: bool = False

    @property
    def entry(self) -> Entry:
        """The first entry, which says what the others are, too."""
        return self.entries[0]

    @property
    def type(self) -> ValueType:
        """The type of what is restored."""
        stored = self.entry.type
        if self.index is not None:
            return _reshaped(stored, lambda shape: shape[1:])
        return _reshaped(stored, lambda shape: (len(self.entries), *shape)) if self.stacks else stored


def _reshaped(type_: ValueType, change: Callable[[tuple[int, ...]], tuple[int, ...]]) -> ValueType:
    leaves = tuple(dataclasses.replace(leaf, shape=change(leaf.shape)) for leaf in type_.leaves)
    return dataclasses.replace(type_, leaves=leaves)


class _OtherForms:
    """Finds what is stacked in the model and a list in the checkpoint, or the other way round.

    Args:
      node: the model.
      entries: those of the checkpoint.
    """

    def __init__(self, node: Any, entries: Mapping[Key, Entry]) -> None:
        self._by_path = {entry.parts: entry for entry in entries.values() if entry.name is None}
        places = {path: stacked_part(type(module)) for path, module in modules(node).items()}
        self._stacks = {(*path, name): path for path, name in places.items() if name is not None}
        indices = ((path, at) for path in variables(node) for at, part in enumerate(path) if type(part) is int)
        self._lengths = collections.Counter((path[:at], path[at + 1 :]) for path, at in indices)  # how long lists are

    def find(self, at: Path, cell: Variable) -> tuple[tuple[Entry, ...], int | None, bool] | None:
        """What a cell is restored from, as in a slot; None if there is nothing."""
        if cell.name is not None:
            return None
        for length in range(len(at)):
            if (layers := self._stacks.get(at[:length])) is not None:
                return self._of_each(layers, at[length:])
            if type(at[length]) is int:
                for name in STACKED_PARTS:
                    if (entry := self._by_path.get((*at[:length], name, *at[length + 1 :]))) is not None:
                        count = self._lengths[at[:length], at[length + 1 :]]
                        fits = all(leaf.shape[:1] == (count,) for leaf in entry.type.leaves)
                        return ((entry,), at[length], False) if fits and at[length] < count else None
        return None

    def _of_each(self, layers: Path, rest: Path) -> tuple[tuple[Entry, ...], int | None, bool] | None:
        found: list[Entry] = []
        while (entry := self._by_path.get((*layers, len(found), *rest))) is not None:
            found.append(entry)
        alike = found and all(
            entry.type == found[0].type and entry.collection == found[0].collection for entry in found
        )
        return (tuple(found), None, True) if alike else None


def _match(path: str, manifest: Manifest, node: Any, selects: Filter, cast: bool) -> list[_Slot]:
    """Which cell gets which entry.

    Raises:
      CheckpointError: they do not fit; all differences are listed.
    """
    cells = by_key(variables(node))
    entries = {entry.key: entry for entry in manifest.entries}
    forms = _OtherForms(node, entries)
    sources = {key: ((entries[key],), None, False) if key in entries else forms.find(*cells[key]) for key in cells}
    used = {entry.key for source in sources.values() if source is not None for entry in source[0]}
    unexpected = [e for key, e in entries.items() if key not in used and selects(e.parts, _kind(e))]
    others = {entry.key[1]: entry.label for entry in unexpected}
    missing: list[str] = []
    mistyped: list[str] = []
    slots: list[_Slot] = []
    for key, (at, cell) in cells.items():
        if not selects(at, cell):
            continue
        source = sources[key]
        if source is None:
            near = difflib.get_close_matches(key[1], others, 1) if len(missing) < 10 else ()
            hint = "".join(f" (the checkpoint has {others[found]})" for found in near)
            missing.append(f"missing:    {label_of(show_path(at), cell.name)}{hint}")
            continue
        value = access.load(cell)
        slot = _Slot(cell, None if value is UNSET or type(value) is Deferred else value, *source)
        mistyped.extend(_differences(slot, cast))
        slots.append(slot)
    differences = [*missing, *(f"unexpected: {entry.label}" for entry in unexpected), *mistyped]
    if differences:
        castable = not cast and len([d for slot in slots for d in _differences(slot, True)]) < len(mistyped)
        raise CheckpointError(
            f"the checkpoint at `{path}` does not fit the model; nothing was restored",
            differences=differences,
            cure="Restore it into a model that was built as the saved one was, or a part of it by a filter."
            + (" `cast=True` converts dtypes." if castable else ""),
        )
    return slots


def _differences(slot: _Slot, cast: bool) -> Iterator[str]:
    """In what an entry does not fit its cell."""
    cell, entry = slot.cell, slot.entry
    if entry.collection != cell.collection:
        expected = f"{type(cell).__name__} ({cell.collection})"
        yield f"{entry.label}: expected a {expected}, got a {entry.kind} ({entry.collection})"
    if slot.now is not None:
        type_ = ValueType.of(slot.now)
        if not slot.type.fits(type_, cast):
            yield f"{entry.label}: expected {type_}, got {slot.type}"
    elif wide := {leaf.dtype for leaf in entry.type.leaves if not leaf.impl and canonicalize(leaf.dtype) != leaf.dtype}:
        yield f"{entry.label}: {', '.join(sorted(wide))} needs `jax_enable_x64`"
    elif (container := entry.type.foreign()) is not None:
        yield f"{entry.label}: has no value yet, and a {container} cannot be made from a file"


def _kind(entry: Entry) -> type[Variable]:
    """The kind of a state that the model does not have, for filters: as near as the kinds of this program come."""
    kinds = [Variable]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    known = [kind for kind in kinds if kind.collection == entry.collection]
    return next((kind for kind in known if kind.__name__ == entry.kind), known[0] if known else Variable)


def _read(path: str, manifest: Manifest, slots: list[_Slot]) -> list[Any]:
    """The values for slots.

    Raises:
      CheckpointError: the files are damaged.
    """
    manifest.check_files(path)
    wanted: list[tuple[Leaf, Any]] = []
    for slot in slots:
        leaves = slot.entry.type.leaves
        whole = slot.now is None or slot.index is not None or slot.stacks
        likes = [None] * len(leaves) if whole else jax.tree.leaves(slot.now)
        for entry in slot.entries:
            wanted.extend(zip(entry.type.leaves, likes, strict=True))
    arrays = iter(read_arrays(os.path.join(path, manifest.arrays), _once(wanted)))
    known: dict[Any, jax.Array] = {}
    values = []
    for slot in slots:
        parts = []
        for entry in slot.entries:
            for leaf in entry.type.leaves:
                if leaf.array is None or leaf.array not in known:
                    array = next(arrays)
                    known |= {} if leaf.array is None else {leaf.array: array}
                else:
                    array = known[leaf.array]
                parts.append(array)
        values.append(_assemble(slot, parts))
    return values


def _once(wanted: list[tuple[Leaf, Any]]) -> list[tuple[Leaf, Any]]:
    """Each array once: several layers are read from one that is stacked."""
    seen: set[int] = set()
    kept = []
    for leaf, like in wanted:
        if leaf.array is None or leaf.array not in seen:
            kept.append((leaf, like))
            seen |= set() if leaf.array is None else {leaf.array}
    return kept


def _assemble(slot: _Slot, leaves: list[jax.Array]) -> Any:
    """The value of a slot around these leaves."""
    if slot.index is not None:
        leaves = [leaf[slot.index] for leaf in leaves]
    elif slot.stacks:
        count = len(slot.entry.type.leaves)
        leaves = [jnp.stack(leaves[number::count]) for number in range(count)]
    if slot.now is None:
        return slot.entry.type.build(leaves)
    old, treedef = jax.tree.flatten(slot.now)
    pairs = zip(leaves, old, strict=True)
    new = [leaf if leaf.dtype == like.dtype else leaf.astype(like.dtype) for leaf, like in pairs]
    if slot.index is not None or slot.stacks:
        new = [placed(leaf, like) for leaf, like in zip(new, old, strict=True)]
    return jax.tree.unflatten(treedef, new)
