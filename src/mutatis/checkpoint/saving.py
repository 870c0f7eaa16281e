"""`save`: everything is collected and checked, then written beside what is there, then put in its place in one step."""

from __future__ import annotations

import contextlib
import dataclasses
import json
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
from mutatis.checkpoint.processes import Processes
from mutatis.core import access, naming
from mutatis.core.cells import UNSET, Deferred
from mutatis.core.naming import show_path
from mutatis.core.showing import show_class, show_value
from mutatis.errors import ArgumentError, CheckpointError, DeferredStateError
from mutatis.model.filters import FilterLike, Path
from mutatis.model.variables import Variable
from mutatis.model.walks import variables


def save(path: str | os.PathLike[str], node: Any, *filters: FilterLike, extra: Any = None) -> None:
    """Save the states of a model to a directory: all of them, or nothing if it fails.

    All kinds of state are saved: parameters, statistics, the states of an optimizer, random streams. `mu.checkpoint.restore` puts
    them back. An existing checkpoint is replaced in one step at the end. If the process dies before, the old checkpoint is
    intact, and the next save into the same directory removes the remains.

    Several saves to one path wait for one another. In a job with several processes, all of them call it, with the same path on a
    disk that all of them see.

    Args:
      path: the directory, on a file system of this machine. Its parents are made, and `~` is the home of the user.
      node: a Module, a Variable, or a list, tuple or dict of them, such as ``(model, optimizer)``.
      *filters: which states; all, if none is given. A state with several paths is saved once, at its first path.
      extra: further data to keep, as JSON: ``{"epoch": 3}``. `mu.checkpoint.describe` reads it.

    Raises:
      CheckpointError: something that is not a checkpoint is at the path, or it cannot be written to; two states have one name;
        the call is inside a transform, or in a signal handler that interrupts a save to this path; another process has failed or
        is late.
      DeferredStateError: states have no value yet.
      ArgumentError: JSON cannot hold `extra`.

    Example:
      >>> import mutatis as mu, optax
      >>> model = mu.nn.Linear(2, 1, rngs=mu.Rngs(0))
      >>> optimizer = mu.Optimizer(model, optax.adam(1e-3))
      >>> mu.checkpoint.save("step_100", {"model": model, "optimizer": optimizer})
      >>> mu.checkpoint.restore("step_100", {"model": model, "optimizer": optimizer})
    """
    path = check_call(path, "saved")
    check_extra(extra)
    cells = variables(node, *filters)
    keyed = [cell for _, cell in by_key(cells).values()]
    with access.lent(keyed) as values:
        write(path, *collect(cells, values), extra, Processes(f"save {path}"))


def check_extra(extra: Any) -> None:
    """Raise if JSON would not give back what is to be kept beside the states.

    Raises:
      ArgumentError: it would not.
    """
    try:
        if json.loads(json.dumps(extra, allow_nan=False)) == extra:
            return
    except (TypeError, ValueError, RecursionError):
        pass
    raise ArgumentError(
        "what is kept beside the states cannot be read back as it is",
        path="extra",
        expected="numbers, strings, booleans, None, and lists and dictionaries (with strings as keys) of them",
        got=show_value(extra),
        cure='`mu.checkpoint.save(path, model, extra={"epoch": 3, "loss": float(loss)})`',
    )


def write(path: str, entries: tuple[Entry, ...], arrays: dict[int, Any], extra: Any, processes: Processes) -> None:
    """Write a checkpoint, together with the other processes of the job: the first of them decides, and all write arrays."""
    with contextlib.ExitStack() as held:
        held.enter_context(disk.os_errors(path, "written"))
        number = processes.agree(lambda: _begin(path, held))
        target = path if number > 1 else disk.unfinished(path)
        inside = os.path.join(target, f"arrays-{number}")
        processes.each(lambda: write_arrays(inside, arrays, processes.count > 1))
        processes.agree(lambda: _finish(path, target, Manifest(number, entries, {}, extra)))


def _begin(path: str, held: contextlib.ExitStack) -> int:
    """Get a place to write to, and nobody else does; the number of this save. What was not finished goes at the end."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    held.enter_context(disk.only_saver(path))
    disk.sweep_leftovers(path)
    number = _number_of(path) + 1
    unfinished = disk.unfinished(path)
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that died
    if number == 1:
        held.callback(shutil.rmtree, unfinished, ignore_errors=True)
        os.makedirs(unfinished)
    else:
        _sweep(path)
        held.callback(_sweep, path)
    return number


def _finish(path: str, target: str, manifest: Manifest) -> None:
    """Write the manifest, from when on the arrays are what the checkpoint holds."""
    disk.sync(os.path.join(target, manifest.arrays))
    dataclasses.replace(manifest, files=fingerprints(target, manifest.arrays)).write(target)
    if target != path:
        os.rename(target, path)
        disk.sync_directory(os.path.dirname(path))


def check_call(path: str | os.PathLike[str], what: str) -> str:
    """The absolute path, where a checkpoint can be what it should be.

    Raises:
      CheckpointError: the path is a URL; or the call is inside a transform, where values are tracers and files would be
        touched once per trace.
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


def collect(cells: Mapping[Path, Variable], loaded: Sequence[Any]) -> tuple[tuple[Entry, ...], dict[int, jax.Array]]:
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


def _sweep(path: str) -> None:
    """Remove the arrays in a checkpoint that its manifest does not name: of an earlier save, or of one that died."""
    named = read_manifest(path).arrays
    for entry in os.listdir(path):
        if entry.startswith("arrays-") and entry != named:
            shutil.rmtree(os.path.join(path, entry), ignore_errors=True)
