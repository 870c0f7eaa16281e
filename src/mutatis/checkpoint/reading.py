"""Looking into a checkpoint without a model: the list of its states, and their values."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from typing import Any

import jax
import jax.numpy as jnp

from mutatis.checkpoint.arrays import read_arrays
from mutatis.checkpoint.disk import os_errors
from mutatis.checkpoint.manifest import Entry, Leaf, Manifest, label_of, read_manifest
from mutatis.checkpoint.processes import Processes
from mutatis.checkpoint.restoring import kind_of
from mutatis.checkpoint.saving import check_call
from mutatis.core.showing import show_bytes
from mutatis.errors import CheckpointError, FilterError
from mutatis.inspect.tables import Table
from mutatis.model.filters import FilterLike, as_filter
from mutatis.model.state import State


@dataclasses.dataclass(frozen=True)
class Saved:
    """One state of a checkpoint.

    Attributes:
      path: the path of the state in the model.
      name: its explicit name; None without one.
      kind: the name of its kind.
      type: the shapes and dtypes of its value.
      bytes: the size of its arrays in bytes.
    """

    path: str
    name: str | None
    kind: str
    type: str
    bytes: int


@dataclasses.dataclass(frozen=True, repr=False)
class Description(Table):
    """The content of a checkpoint, as `mu.checkpoint.describe` returns it; `print` shows it as text, `rich.print` as a table.

    Attributes:
      path: the directory of the checkpoint.
      number: the number of saves into this directory so far.
      extra: the further data that were saved with the states; None if there are none.
      states: the states, in the order of the model.
    """

    path: str
    number: int
    extra: Any
    states: tuple[Saved, ...]
    header = ("state", "kind", "type", "size")
    left = ("state", "kind", "type")

    def cells(self) -> list[tuple[str, ...]]:
        """The text of each row."""
        return [
            (label_of(state.path, state.name), state.kind, state.type, show_bytes(state.bytes)) for state in self.states
        ]

    def footer(self) -> tuple[str, ...]:
        """The text of the sums."""
        return "total", "", "", show_bytes(sum(state.bytes for state in self.states))


def describe(path: str | os.PathLike[str]) -> Description:
    """List the states of a checkpoint. No arrays are read.

    Args:
      path: the directory that `mu.checkpoint.save` wrote.

    Returns:
      A `Description`: `print` shows it as a table, and it has `states`, `extra` and `number` as data.

    Raises:
      CheckpointError: there is no checkpoint, or its manifest is damaged.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> mu.checkpoint.save("best", {"w": mu.Param(jnp.ones(2))}, extra={"epoch": 3})
      >>> print(mu.checkpoint.describe("best"))
      state  kind   type        size
      w      Param  float32[2]   8 B
      total                      8 B
      >>> mu.checkpoint.describe("best").extra
      {'epoch': 3}
    """
    path = check_call(path, "read")
    manifest = read_manifest(path)
    states = tuple(
        Saved(entry.path or ".", entry.name, entry.kind, str(entry.type), sum(map(_bytes, entry.type.leaves)))
        for entry in manifest.entries
    )
    return Description(path, manifest.number, manifest.extra, states)


def _bytes(leaf: Leaf) -> int:
    if leaf.impl is not None:
        numbers = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=leaf.impl)))
        return math.prod(leaf.shape) * int(numbers.size * numbers.dtype.itemsize)
    return math.prod(leaf.shape) * int(jnp.dtype(leaf.dtype).itemsize)


def load(path: str | os.PathLike[str], *filters: FilterLike) -> State:
    """Read the values of a checkpoint without a model.

    Args:
      path: the directory that `mu.checkpoint.save` wrote.
      *filters: which states; all, if none is given.

    Returns:
      A `State` from paths to values, like that of `mu.state` of the model. The arrays are on the default device.

    Raises:
      CheckpointError: there is no checkpoint, it is damaged, or a value is a container that only code can make; restore such a
        checkpoint into a model.
      FilterError: no state is selected.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> mu.checkpoint.save("best", {"w": mu.Param(jnp.ones(2)), "rngs": mu.Rngs(0)})
      >>> mu.checkpoint.load("best", mu.Param)["w"]
      Array([1., 1.], dtype=float32)
    """
    path = check_call(path, "read")
    manifest = read_manifest(path)
    selects = as_filter(filters or ...)
    chosen = [entry for entry in manifest.entries if selects(entry.parts, kind_of(entry))]
    if filters and not chosen:
        raise FilterError(
            f"no state of the checkpoint at `{path}` is selected",
            expected="filters by kind or path",
            cure="`print(mu.checkpoint.describe(path))` lists the states.",
        )
    with os_errors(path, "read"):
        Processes(f"load {path}").agree(functools.partial(manifest.check_files, path))
        values = values_of(path, manifest, chosen)
    kinds = {entry.parts: kind_of(entry) for entry in chosen}
    return State(dict(zip(kinds, values, strict=True)), kinds)


def values_of(path: str, manifest: Manifest, entries: list[Entry]) -> list[Any]:
    """The values of entries, on the default device.

    Raises:
      CheckpointError: one holds a container that cannot be made from a file.
    """
    for entry in entries:
        if (container := entry.type.foreign()) is not None:
            raise CheckpointError(
                f"{entry.label} is a {container}, which cannot be made from a file",
                path=entry.path,
                cure="Restore the checkpoint into a model, which has one: `mu.checkpoint.restore(path, model)`.",
            )
    wanted = [(leaf, None) for entry in entries for leaf in entry.type.leaves]
    arrays = iter(read_arrays(os.path.join(path, manifest.arrays), wanted))
    return [entry.type.build([next(arrays) for _ in entry.type.leaves]) for entry in entries]
