"""`save`: everything is collected and checked, then written beside what is there, then put in its place in one step."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from mutatis import _compat
from mutatis.checkpoint import disk
from mutatis.checkpoint.arrays import describe, write_arrays
from mutatis.checkpoint.manifest import (
    Entry,
    Key,
    Manifest,
    ValueType,
    fingerprints,
    key_of,
    read_manifest,
    structure_of,
)
from mutatis.core import access, naming
from mutatis.core.cells import UNSET, Deferred
from mutatis.core.naming import show_path
from mutatis.core.showing import show_class
from mutatis.errors import ArgumentError, CheckpointError, DeferredStateError
from mutatis.model.filters import FilterLike, Path
from mutatis.model.variables import Variable
from mutatis.model.walks import variables


def save(path: str | os.PathLike[str], node: Any, *filters: FilterLike) -> None:
    """Write the states of a node to a directory, whole or not at all.

    A checkpoint that is there already is replaced in one step, at the end: if the process dies before, the old one is
    there as it was, and if there was none there is nothing. Of several that save to one path each waits for the one before.
    What a dead one left is removed by the next that saves into the same directory.

    Args:
      path: the directory, on a file system of this machine; its parents are made, and `~` is the user's home.
      node: a Module, a Variable, or a list, tuple or dict of them, such as ``(model, optimizer)``.
      *filters: which states; all, if none is given. One that is reached by several paths is saved once, at the first.

    Raises:
      CheckpointError: something that is not a checkpoint is at the path, or it cannot be written to; two states have one
        name; the call is inside a transform, in one of several processes, or in a signal handler that interrupts a save
        to this path.
      DeferredStateError: states have no value yet.

    Example:
      >>> from mutatis import checkpoint
      >>> model = {"w": mu.Param(jnp.ones(2)), "rngs": mu.Rngs(0)}
      >>> checkpoint.save("step_100", model)
      >>> checkpoint.save("step_100", model, mu.Param)  # replaces it
    """
    path = check_call(path, "saved")
    cells = variables(node, *filters)
    keyed = [cell for _, cell in by_key(cells).values()]
    with access.lent(keyed) as values:
        _save(path, *_collect(cells, values))


def _save(path: str, entries: tuple[Entry, ...], arrays: dict[int, jax.Array]) -> None:
    with disk.os_errors(path, "written"):
        parent = os.path.dirname(path)
        os.makedirs(parent, exist_ok=True)
        with disk.only_saver(path):
            disk.sweep_leftovers(path)
            number = _number_of(path) + 1
            if number == 1:
                unfinished = disk.unfinished(path)
                shutil.rmtree(unfinished, ignore_errors=True)  # of a process that died
                try:
                    _write(unfinished, number, entries, arrays)
                    os.rename(unfinished, path)
                finally:
                    shutil.rmtree(unfinished, ignore_errors=True)
                disk.sync_directory(parent)
            else:
                _sweep(path)
                try:
                    _write(path, number, entries, arrays)
                finally:
                    _sweep(path)


def check_call(path: str | os.PathLike[str], what: str) -> str:
    """The absolute path, where a checkpoint can be what it should be.

    Raises:
      CheckpointError: the path is a URL; or the call is inside a transform, where values are tracers and files would be
        touched once per trace; or in one of several processes, which would write over each other.
    """
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    if not isinstance(path, str | os.PathLike):
        raise ArgumentError(
            f"states cannot be {what}: the path is none",
            path="path",
            expected="a string or `pathlib.Path`, and then the model",
            got=show_class(path),
            cure="`mu.checkpoint.save('run', model)`, then `mu.checkpoint.restore('run', model)`.",
        )
    if _compat.current_trace() is not _compat.EVAL_TRACE:
        raise CheckpointError(
            f"states cannot be {what} while a function is traced",
            where=naming.where(),
            cure="Save and restore between the calls of a transformed function.",
        )
    if jax.process_count() > 1:
        raise CheckpointError(
            f"states cannot be {what} by one of several processes",
            got=f"{jax.process_count()} processes",
            cure="Hand `mu.state(model).to_pure_dict()` to Orbax, which lets processes write together.",
        )
    if "://" in os.fspath(path):
        raise CheckpointError(
            f"`{path}` is not a path of this machine",
            cure="A checkpoint is replaced by a rename, which object stores do not have: save here, then copy.",
        )
    return os.path.abspath(os.path.expanduser(os.fsdecode(path)))


def by_key(cells: Mapping[Path, Variable]) -> dict[Key, tuple[Path, Variable]]:
    """Cells by what they are matched by.

    Raises:
      CheckpointError: two of them have one name.
    """
    found: dict[Key, tuple[Path, Variable]] = {}
    for path, cell in cells.items():
        first, _ = found.setdefault(key_of(path, cell), (path, cell))
        if first != path:
            raise CheckpointError(
                f"two states have the name {cell.name!r}: {show_path(first)} and {show_path(path)}",
                path=show_path(path),
                cure="In a checkpoint a state with an explicit name goes by it: give each its own, or none.",
            )
    return found


def _collect(cells: Mapping[Path, Variable], loaded: Sequence[Any]) -> tuple[tuple[Entry, ...], dict[int, jax.Array]]:
    """The manifest's entries for these cells with these values, and the arrays by number.

    Raises:
      DeferredStateError: some have no value; all are listed.
    """
    values = dict(zip(cells, loaded, strict=True))
    if missing := [show_path(path) for path, value in values.items() if not _has_arrays(value)]:
        raise DeferredStateError(
            "states without a value cannot be saved",
            path=missing[0],
            differences=missing,
            cure="Call the model once, which creates them, or leave them out: `save(path, model, mu.Param)`.",
        )
    entries: list[Entry] = []
    arrays: dict[int, jax.Array] = {}
    number = 0
    for path, value in values.items():
        leaves = []
        for leaf in jax.tree.leaves(value):
            leaves.append(describe(leaf, number))
            if leaf.size:
                arrays[number] = leaf
            number += 1
        entries.append(Entry.of(path, cells[path], ValueType(structure_of(value), tuple(leaves))))
    return tuple(entries), arrays


def _has_arrays(value: Any) -> bool:
    shapes = (isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(value))
    return value is not UNSET and type(value) is not Deferred and not any(shapes)


def _number_of(path: str) -> int:
    """The number of the save that is at a path, 0 if nothing is.

    Raises:
      CheckpointError: something else is there.
    """
    if not os.path.lexists(path) or (os.path.isdir(path) and not os.listdir(path)):
        return 0
    try:
        return read_manifest(path).number
    except CheckpointError as error:
        raise CheckpointError(
            f"`{path}` is not a checkpoint that can be replaced",
            got=error.problem,
            cure="Save to another path, or remove what is there.",
        ) from error


def _write(directory: str, number: int, entries: tuple[Entry, ...], arrays: dict[int, jax.Array]) -> None:
    """Write the arrays, then the manifest, from when on they are what the directory holds."""
    os.makedirs(directory, exist_ok=True)
    inside = os.path.join(directory, f"arrays-{number}")
    write_arrays(inside, arrays)
    disk.sync(inside)
    Manifest(number, entries, fingerprints(directory, f"arrays-{number}")).write(directory)


def _sweep(path: str) -> None:
    """Remove the arrays in a checkpoint that its manifest does not name: of an earlier save, or of one that died."""
    named = read_manifest(path).arrays
    for entry in os.listdir(path):
        if entry.startswith("arrays-") and entry != named:
            shutil.rmtree(os.path.join(path, entry), ignore_errors=True)
