"""`restore`: the manifest is matched with the model, the files are checked and read; then the states are written."""

from __future__ import annotations

import collections
import dataclasses
import difflib
import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.dtypes import canonicalize_dtype as canonicalize

from mutatis.checkpoint.arrays import placed, read_arrays
from mutatis.checkpoint.disk import os_errors
from mutatis.checkpoint.manifest import Entry, Key, Leaf, Manifest, ValueType, label_of, read_manifest
from mutatis.checkpoint.processes import Processes
from mutatis.checkpoint.saving import by_key, check_call
from mutatis.core import access
from mutatis.core.avals import show_range
from mutatis.core.cells import UNSET, Deferred
from mutatis.core.naming import show_path
from mutatis.core.nodes import STACKED_PARTS, stacked_part
from mutatis.core.showing import show_value
from mutatis.core.transactions import Transaction
from mutatis.errors import ArgumentError, CheckpointError
from mutatis.model.filters import Filter, FilterLike, Path, as_filter
from mutatis.model.surgery import modules
from mutatis.model.variables import Variable
from mutatis.model.walks import variables

NO_NAMES: Mapping[str, str] = MappingProxyType({})


def restore(
    path: str | os.PathLike[str],
    node: Any,
    *filters: FilterLike,
    at: str | int | tuple[str | int, ...] = "",
    rename: Mapping[str, str] = NO_NAMES,
    missing: Literal["error", "keep"] = "error",
    unexpected: Literal["error", "ignore"] = "error",
    cast: bool = False,
    verify: Literal["checksum", "size"] = "checksum",
) -> None:
    """Write the states of a checkpoint into a model. Everything is checked before the first state is written.

    First build the model as it was when you saved it. A state with an explicit name is found by its name, any other one by its
    path. The values go to the devices and shardings of the model's states. Frozen states are restored too, and stay frozen.

    States without a value are created, and a model of shapes (`mu.eval_shape`) gets its arrays. A list of layers can be restored
    from an `nn.Stack` of them, and the other way round. In a job with several processes, all of them call it. The number of
    processes and devices may differ from when it was saved.

    Args:
      path: the directory that `mu.checkpoint.save` wrote.
      node: a Module, a Variable, or a list, tuple or dict of them.
      *filters: which states of the node; all, if none is given. Other states of the checkpoint are ignored.
      at: the path of the node in the checkpoint: ``at="model.encoder"`` restores an encoder from the checkpoint of a whole model,
        and ``at=0`` the first of several objects that were saved together.
      rename: a dictionary from paths in the checkpoint to paths in the node, with all that is below them:
        ``{"head": "classifier", "blocks[0]": "stem"}``.
      missing: for states that the checkpoint does not have: ``"error"``, or ``"keep"`` their present values.
      unexpected: for states of the checkpoint that the node does not have: ``"error"`` or ``"ignore"``.
      cast: whether to convert values of another dtype; never floats to integers, or complex numbers to real ones, and integers
        only where they fit. A float may become infinite in a narrow dtype.
      verify: the check of the files before they are read: ``"checksum"`` reads every byte, ``"size"`` does not.

    Raises:
      CheckpointError: there is no checkpoint of Mutatis at the path; it is damaged; the call is inside a transform; or it does
        not fit the node. The message then lists all states that are missing, unexpected, or of another kind, structure, shape or
        dtype. The node does not change.
      ArgumentError: an option has an unknown value.

    Example:
      >>> import mutatis as mu
      >>> model = mu.nn.Linear(2, 1, rngs=mu.Rngs(0))
      >>> mu.checkpoint.save("best", model)
      >>> other = mu.nn.Linear(2, 1, rngs=mu.Rngs(1))
      >>> mu.checkpoint.restore("best", other)
      >>> bool((other.kernel == model.kernel).all())
      True
      >>> try:
      ...     mu.checkpoint.restore("best", mu.nn.Linear(3, 1, rngs=mu.Rngs(0)))
      ... except mu.errors.CheckpointError as error:
      ...     print(error)
      the checkpoint at `...best` does not fit the model; nothing was restored
        kernel: expected float32[3,1], got float32[2,1]
      Restore it into a model that was built as the saved one was, or a part of it by a filter.
    """
    path = check_call(path, "restored")
    _check_options(missing=(missing, "error", "keep"), unexpected=(unexpected, "error", "ignore"))
    _check_options(verify=(verify, "checksum", "size"))
    processes = Processes(f"restore {path}")
    while True:
        manifest = read_manifest(path)
        entries = moved_entries(path, manifest, at, rename)
        selects = as_filter(filters or ...)
        slots = _match(path, entries, node, selects, cast, missing == "keep", unexpected == "ignore")
        try:
            with os_errors(path, "read"):
                processes.agree(functools.partial(manifest.check_files, path, contents=verify == "checksum"))
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


def _check_options(**options: tuple[Any, str, str]) -> None:
    for name, (given, *known) in options.items():
        if given not in known:
            raise ArgumentError(
                f"`{name}` cannot be {show_value(given)}",
                path=name,
                expected=" or ".join(map(repr, known)),
                got=show_value(given),
                cure=f'`mu.checkpoint.restore(path, model, {name}="{known[1]}")`',
            )


def moved_entries(
    path: str, manifest: Manifest, at: str | int | tuple[str | int, ...], rename: Mapping[str, str]
) -> list[Entry]:
    """The entries of a checkpoint that are below a path, by their paths from there, and under other names.

    Raises:
      CheckpointError: there is nothing at one of these paths.
    """
    entries = [*manifest.entries]
    at = at if isinstance(at, str) else show_path(at if isinstance(at, tuple) else (at,))
    if at:
        entries = [moved for entry in entries if (moved := _moved(entry, at, "")) is not None]
    found = dict.fromkeys(rename, False)
    for number, entry in enumerate(entries):
        for old, new in rename.items():
            if (moved := _moved(entry, old, new)) is not None:
                entries[number], found[old] = moved, True
                break
    twice = [key for key, count in collections.Counter(entry.key for entry in entries).items() if count > 1]
    if twice and rename:
        raise CheckpointError(
            f"two states of the checkpoint at `{path}` would be `{twice[0][1]}`",
            path=twice[0][1],
            expected="one state for each path",
            cure="Rename the other one too: `rename={'old': 'new', 'new': 'unused'}` with `unexpected='ignore'`.",
        )
    absent = [repr(at)] if at and not entries else [repr(old) for old, was in found.items() if not was]
    if absent:
        raise CheckpointError(
            f"there is no {', '.join(absent)} in the checkpoint at `{path}`",
            expected="a path of a state there, or the beginning of one",
            cure="`print(mu.checkpoint.describe(path))` lists the states.",
        )
    return entries


def _moved(entry: Entry, old: str, new: str) -> Entry | None:
    """An entry that is below one path, below another; None if it is not."""
    if entry.name is not None:
        return entry if not new else None  # it goes by its name, wherever it is
    for length in range(len(entry.parts) + 1):
        if old in (show_path(entry.parts[:length]), ".".join(map(str, entry.parts[:length]))):
            parts = (*_parse(new), *entry.parts[length:])
            return dataclasses.replace(entry, parts=parts, path=show_path(parts))
    return None


def _parse(text: str) -> Path:
    """The parts of a path that `show_path` prints so."""
    pieces = re.findall(r"\[(\d+)\]|\['([^']*)'\]|([^.\[\]]+)", text)
    return tuple(int(index) if index else key or name for index, key, name in pieces)


def _match(
    path: str,
    found: Sequence[Entry],
    node: Any,
    selects: Filter,
    cast: bool,
    keeps: bool = False,
    ignores: bool = False,
) -> list[_Slot]:
    """Which cell gets which entry.

    Raises:
      CheckpointError: they do not fit; all differences are listed.
    """
    cells = by_key(variables(node))
    entries = {entry.key: entry for entry in found}
    forms = _OtherForms(node, entries)
    sources = {key: ((entries[key],), None, False) if key in entries else forms.find(*cells[key]) for key in cells}
    used = {entry.key for source in sources.values() if source is not None for entry in source[0]}
    unexpected = [] if ignores else [e for e in unused(entries, used) if selects(e.parts, kind_of(e))]
    others = {entry.key[1]: entry.label for entry in unexpected}
    missing: list[str] = []
    lost: list[Path] = []
    mistyped: list[str] = []
    slots: list[_Slot] = []
    for key, (at, cell) in cells.items():
        if not selects(at, cell):
            continue
        source = sources[key]
        if source is None and keeps:
            continue
        if source is None:
            near = difflib.get_close_matches(key[1], others, 1) if len(missing) < 10 else ()
            hint = "".join(f" (the checkpoint has {others[found]})" for found in near)
            lost.append(at)
            missing.append(f"missing:    {label_of(show_path(at), cell.name)}{hint}")
            continue
        value = access.load(cell)
        slot = _Slot(cell, None if value is UNSET or type(value) is Deferred else value, *source)
        mistyped.extend(_differences(slot, cast))
        slots.append(slot)
    differences = [*missing, *(f"unexpected: {entry.label}" for entry in unexpected), *mistyped]
    if differences:
        above = _above(lost, found)
        castable = not cast and len([d for slot in slots for d in _differences(slot, True)]) < len(mistyped)
        raise CheckpointError(
            f"the checkpoint at `{path}` does not fit the model; nothing was restored",
            differences=differences,
            cure=(
                "Restore it into a model that was built as the saved one was, or a part of it by a filter."
                if above is None
                else f'These states are below `{above}` there: `mu.checkpoint.restore(path, model, at="{above}")`.'
            )
            + (" `cast=True` converts dtypes." if castable else ""),
        )
    return slots


def _above(lost: Sequence[Path], entries: Sequence[Entry]) -> str | None:
    """The path below which a checkpoint has all these paths, if there is one."""
    there = {entry.parts for entry in entries if entry.name is None}
    for parts in there if lost else ():
        length = len(parts) - len(lost[0])
        if length > 0 and parts[length:] == lost[0] and all((*parts[:length], *path) in there for path in lost):
            return show_path(parts[:length])
    return None


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


def unused(entries: Mapping[Key, Entry], used: Set[Key]) -> list[Entry]:
    """Those that no state is restored from."""
    return [entry for key, entry in entries.items() if key not in used]


def kind_of(entry: Entry) -> type[Variable]:
    """The kind of a state that the model does not have, for filters: as near as the kinds of this program come."""
    kinds = [Variable]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    known = [kind for kind in kinds if kind.collection == entry.collection]
    return next((kind for kind in known if kind.__name__ == entry.kind), known[0] if known else Variable)


def _read(path: str, manifest: Manifest, slots: list[_Slot]) -> list[Any]:
    """The values for slots, from files that have been checked."""
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
    new = [leaf if leaf.dtype == like.dtype else _converted(slot, leaf, like.dtype) for leaf, like in pairs]
    if slot.index is not None or slot.stacks:
        new = [placed(leaf, like) for leaf, like in zip(new, old, strict=True)]
    return jax.tree.unflatten(treedef, new)


def _converted(slot: _Slot, leaf: jax.Array, dtype: Any) -> jax.Array:
    """An array in another dtype.

    Raises:
      CheckpointError: it holds integers that the dtype does not have.
    """
    new = leaf.astype(dtype)
    whole = jnp.issubdtype(dtype, jnp.integer)
    if whole and bool(jnp.any((new.astype(leaf.dtype) != leaf) | ((new < 0) != (leaf < 0)))):
        raise CheckpointError(
            f"{slot.entry.label} cannot be converted to {dtype}: it holds integers that do not fit; nothing was restored",
            path=slot.entry.path,
            expected=f"integers from {jnp.iinfo(dtype).min} to {jnp.iinfo(dtype).max}",
            got=show_range(leaf),
            cure="Make the state of the model as wide as the saved one.",
        )
    return new
