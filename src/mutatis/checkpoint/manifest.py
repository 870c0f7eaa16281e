"""What a checkpoint is on disk, and the manifest that says so.

A checkpoint is a directory::

    mutatis.json    the manifest
    arrays-3/       the arrays, written by Orbax under the numbers that the manifest gives them

The manifest tells of every state its path, name, kind, structure, shapes and dtypes, and of every file its size and
CRC-32; it has one of its own. It belongs to the arrays of one save, by number. To save over a checkpoint is to write
``arrays-4`` beside ``arrays-3`` and then to replace the manifest: one file, in one step. What no manifest names any
more is removed last.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from mutatis.checkpoint.disk import open_file, sync_directory
from mutatis.core.naming import show_path
from mutatis.core.showing import show_value
from mutatis.errors import CheckpointError
from mutatis.model.filters import Path
from mutatis.model.variables import Variable

MANIFEST = "mutatis.json"
FORMAT = "mutatis.checkpoint"
VERSION = 1

_PLAIN = (str, int, float, bool, type(None))  # what JSON gives back as it was

Key: TypeAlias = tuple[str, str]  # ("name", an explicit name) or ("path", a printed path)


def key_of(path: Path, cell: Variable) -> Key:
    """What a state is matched by: its explicit name, else its path."""
    return ("path", show_path(path)) if cell.name is None else ("name", cell.name)


def label_of(path: str, name: str | None) -> str:
    """A state as messages call it: its path, and its name if it has one."""
    return (path or ".") + (f" (name {name!r})" if name is not None else "")


# -- what a state is, as JSON -------------------------------------------------------------------------------------

_LEAF = "*"
_DEEPEST = 200  # containers in one another


@dataclasses.dataclass(frozen=True)
class Leaf:
    """The type of one array, and where it is stored."""

    shape: tuple[int, ...]
    dtype: str
    impl: str | None = dataclasses.field(default=None, compare=False)  # of random keys, which are stored as numbers
    array: int | None = dataclasses.field(default=None, compare=False)  # an empty array is not stored

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class ValueType:
    """The type of a state's value: its leaves, and how they are nested.

    The structure is ``"*"`` for a leaf, else ``[name of the container, [[key, structure], ...]]``.
    """

    structure: Any
    leaves: tuple[Leaf, ...]

    @classmethod
    def of(cls, value: Any) -> ValueType:
        """The type of a pytree of arrays or shapes."""
        leaves = (Leaf(tuple(leaf.shape), str(leaf.dtype)) for leaf in jax.tree.leaves(value))
        return cls(structure_of(value), tuple(leaves))

    def __str__(self) -> str:
        return _show(self.structure, iter(self.leaves))

    def fits(self, other: ValueType, cast: bool) -> bool:
        """Whether a value of this type can be written where one of the other type is."""
        same = _same_structure(self.structure, other.structure) and len(self.leaves) == len(other.leaves)
        if not cast:
            return same and self.leaves == other.leaves
        return same and all(map(_casts, self.leaves, other.leaves))

    def build(self, leaves: Sequence[Any]) -> Any:
        """A value of this structure, which has no `foreign` container."""
        return _build(self.structure, iter(leaves))

    def foreign(self) -> str | None:
        """A container or key in it that cannot be made from a manifest, if there is one."""
        return next((name for name in _containers(self.structure) if name not in _BUILDERS), None)


def _casts(leaf: Leaf, other: Leaf) -> bool:
    if leaf.dtype.startswith("key<") or other.dtype.startswith("key<"):
        return leaf == other
    # A float would be cut to an integer, a complex number to its real part, and an integer to whether it is zero.
    loses = _rank(leaf.dtype) > _rank(other.dtype)
    return leaf.shape == other.shape and not loses


def _rank(dtype: str) -> int:
    """0 for bools, 1 for integers, 2 for floats, 3 for complex numbers."""
    return 0 if dtype == "bool" else 3 if dtype.startswith("complex") else 1 + int("float" in dtype)


def structure_of(value: Any) -> Any:
    """How the leaves of a value are nested, as JSON."""
    entries = jax.tree_util.tree_flatten_with_path(value, is_leaf=lambda x: x is not value)[0]
    if len(entries) == 1 and not entries[0][0]:
        return _LEAF
    return [_container(value), [[_plain_key(keys[0]), structure_of(inner)] for keys, inner in entries]]


def _container(value: Any) -> str:
    """The name of a container's class; with what else it is, such as a unit: ``Quantity[Unit("mV")]``."""
    name = type(value).__name__
    if name in _BUILDERS or isinstance(value, tuple | dict):
        return name
    _, more = jax.tree.structure(value).node_data()
    return name if more is None or more == () else f"{name}[{show_value(more)}]"


def _same_structure(saved: Any, other: Any) -> bool:
    """Whether values of two structures can take each other's place; older files do not say what a container is besides."""
    if saved == other or _LEAF in (saved, other):
        return bool(saved == other)
    (name, items), (other_name, others) = saved, other
    if name != other_name and "[" in name and "[" in other_name:
        return False
    names = {name.partition("[")[0], other_name.partition("[")[0]}
    return (
        len(names) == 1
        and len(items) == len(others)
        and all(
            key == other_key and _same_structure(inner, other_inner)
            for (key, inner), (other_key, other_inner) in zip(items, others, strict=True)
        )
    )


def _plain_key(key: Any) -> Any:
    for attribute in ("key", "idx", "name"):  # of DictKey and FlattenedIndexKey, SequenceKey, GetAttrKey
        if hasattr(key, attribute):
            inner = getattr(key, attribute)
            return inner if isinstance(inner, _PLAIN) else {"repr": repr(inner)}
    return str(key)


def _show(structure: Any, leaves: Iterator[Leaf]) -> str:
    if structure == _LEAF:
        return str(next(leaves))
    container, items = structure
    return f"{container}({', '.join(_show_item(key, inner, leaves) for key, inner in items)})"


def _show_item(key: Any, inner: Any, leaves: Iterator[Leaf]) -> str:
    return (f"{key}=" if isinstance(key, str) else "") + _show(inner, leaves)


_BUILDERS: Mapping[str, Any] = {
    "dict": dict,
    "list": lambda items: [value for _, value in items],
    "tuple": lambda items: tuple(value for _, value in items),
    "NoneType": lambda _: None,
}


def _containers(structure: Any) -> Iterator[str]:
    if structure != _LEAF:
        container, items = structure
        yield container
        for key, inner in items:
            if isinstance(key, dict):
                yield key["repr"]
            yield from _containers(inner)


def _build(structure: Any, leaves: Iterator[Any]) -> Any:
    if structure == _LEAF:
        return next(leaves)
    container, items = structure
    return _BUILDERS[container]([(key, _build(inner, leaves)) for key, inner in items])


@dataclasses.dataclass(frozen=True)
class Entry:
    """One state of a checkpoint."""

    path: str
    parts: tuple[Any, ...]
    name: str | None
    kind: str
    collection: str
    type: ValueType

    @classmethod
    def of(cls, path: Path, cell: Variable, type_: ValueType) -> Entry:
        """The entry for a cell at a path."""
        parts = tuple(part if isinstance(part, _PLAIN) else repr(part) for part in path)
        return cls(show_path(path), parts, cell.name, type(cell).__name__, cell.collection, type_)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Entry:
        """The entry that `dataclasses.asdict` gave as JSON."""
        leaves = tuple(Leaf(**{**leaf, "shape": tuple(leaf["shape"])}) for leaf in data["type"]["leaves"])
        return cls(**{**data, "parts": tuple(data["parts"]), "type": ValueType(data["type"]["structure"], leaves)})

    @property
    def key(self) -> Key:
        """What the state is matched by."""
        return ("path", self.path) if self.name is None else ("name", self.name)

    @property
    def label(self) -> str:
        """The state as messages call it."""
        return label_of(self.path, self.name)


# -- the manifest -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The manifest of one save.

    Args:
      number: of the save: 1, and one more each time that the checkpoint is saved over.
      entries: the states.
      files: the size and CRC-32 of each file with arrays.
      extra: what the user keeps beside the states, as JSON; None for nothing.
    """

    number: int
    entries: tuple[Entry, ...]
    files: Mapping[str, tuple[int, int]]
    extra: Any = None

    @property
    def arrays(self) -> str:
        """The directory of the arrays."""
        return f"arrays-{self.number}"

    def write(self, directory: str) -> None:
        """Write or replace the manifest of a directory, in one step."""
        states = [dataclasses.asdict(entry) for entry in self.entries]
        head = {"format": FORMAT, "version": VERSION, "crc": _crc(self.number, self.files, states, self.extra)}
        head |= {"number": self.number, "files": self.files}
        head |= {} if self.extra is None else {"extra": self.extra}
        lines = ",\n".join(map(json.dumps, states))
        unfinished = os.path.join(directory, f"{MANIFEST}.unfinished")
        with open(unfinished, "w", encoding="utf-8") as file:
            file.write(f'{json.dumps(head)[:-1]}, "states": [\n{lines}\n]}}')
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, os.path.join(directory, MANIFEST))
        sync_directory(directory)

    def check_files(self, directory: str, *, contents: bool = True) -> None:
        """Raise unless all files are as they were written.

        Args:
          directory: the checkpoint.
          contents: whether they are read, to see that no byte has changed; without it only their sizes are compared.

        Raises:
          CheckpointError: some are missing, cut short or changed; all are listed.
        """
        look = fingerprint if contents else size_of
        paths = {name: os.path.join(directory, name) for name in self.files}
        problems = []
        for (name, expected), found in zip(self.files.items(), _several(look, paths.values()), strict=True):
            if isinstance(found, FileNotFoundError):
                problems.append(f"{name}: missing")
            elif isinstance(found, OSError):
                problems.append(f"{name}: {found.strerror}")
            elif found[0] != expected[0]:
                problems.append(f"{name}: {expected[0]} bytes were written, {found[0]} are there")
            elif contents and found != expected:
                problems.append(f"{name}: its contents have changed")
        if problems:
            raise CheckpointError(
                f"the checkpoint at `{directory}` is damaged",
                differences=problems,
                cure="Restore an earlier checkpoint.",
            )


def fingerprints(directory: str, below: str) -> dict[str, tuple[int, int]]:
    """The size and CRC-32 of every file below a directory, by path from it."""
    walk = os.walk(os.path.join(directory, below))
    files = sorted(os.path.join(folder, name) for folder, _, names in walk for name in names)
    found = {}
    for file, was in zip(files, _several(fingerprint, files), strict=True):
        if isinstance(was, OSError):
            raise was
        found[os.path.relpath(file, directory).replace(os.sep, "/")] = was
    return found


def _several(look: Callable[[str], tuple[int, int]], files: Iterable[str]) -> list[tuple[int, int] | OSError]:
    """What looking at each file gives, or the error; several are read at a time."""

    def one(file: str) -> tuple[int, int] | OSError:
        try:
            return look(file)
        except OSError as error:
            return error

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(one, files))


def size_of(file: str) -> tuple[int, int]:
    """The size of a file, in place of its fingerprint."""
    with open_file(file) as stream:
        return os.fstat(stream.fileno()).st_size, 0


def fingerprint(file: str) -> tuple[int, int]:
    """The size and CRC-32 of a file."""
    size = crc = 0
    with open_file(file) as stream:
        while block := stream.read(1 << 22):
            size += len(block)
            crc = zlib.crc32(block, crc)
    return size, crc


def read_manifest(directory: str) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
      CheckpointError: there is none, it is damaged, or it is of another format or version.
    """
    # Looked at first: another process may put the checkpoint there after this one has found no manifest.
    there = "no checkpoint of Mutatis" if os.path.lexists(directory) else "nothing"
    try:
        with open_file(os.path.join(directory, MANIFEST)) as file:
            data = json.loads(file.read().decode("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"there is {there} at `{directory}`",
            expected=f"a directory with the file {MANIFEST}",
            cure="`mutatis.checkpoint.save(path, model)` writes one.",
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(directory, f"{type(error).__name__}: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise CheckpointError(
            f"`{MANIFEST}` at `{directory}` is not the manifest of a checkpoint", expected=f"format {FORMAT}"
        )
    if data.get("version") != VERSION:
        raise CheckpointError(
            f"the checkpoint at `{directory}` has another format version",
            expected=VERSION,
            got=data.get("version"),
            cure="Restore it with the version of Mutatis that wrote it, and save it with this one.",
        )
    number: Any = data.get("number")
    files: Any = data.get("files")
    states: Any = data.get("states")
    problem = None
    try:
        if data.get("crc") != _crc(number, files, states, data.get("extra")):
            problem = "contents that are not what was written"
        else:
            entries = tuple(map(Entry.from_json, states))
            manifest = Manifest(number, entries, {name: tuple(was) for name, was in files.items()}, data.get("extra"))
            problem = _problem_of(manifest)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise _damaged(directory, "contents of another form than a manifest has") from error
    if problem is not None:
        raise _damaged(directory, problem)
    return manifest


def _problem_of(manifest: Manifest) -> str | None:
    """What in a manifest cannot be as `save` writes it: somebody has changed it, checksum and all."""
    if not (type(manifest.number) is int and manifest.number > 0):
        return f"the save's number {manifest.number!r}"
    for name, was in manifest.files.items():
        parts = name.split("/")
        if parts[0] != manifest.arrays or os.path.isabs(name) or {"", ".", ".."} & {*parts}:
            return f"a file that is not among its arrays: {name!r}"
        if [*map(type, was)] != [int, int]:
            return f"{name!r}: a size and checksum that are none"
    for entry in manifest.entries:
        texts = [entry.path, entry.kind, entry.collection, *([] if entry.name is None else [entry.name])]
        texts += [text for leaf in entry.type.leaves for text in (leaf.dtype, leaf.impl or "")]
        if not all(type(text) is str for text in texts) or not all(isinstance(part, _PLAIN) for part in entry.parts):
            return f"{entry.path!r}: a name that is none"
        if (unknown := next((leaf.dtype for leaf in entry.type.leaves if not _is_dtype(leaf)), None)) is not None:
            return f"{entry.label}: the dtype {unknown!r}"
    keys = [entry.key for entry in manifest.entries]
    if len({*keys}) < len(keys):
        return "two states of one path or name"
    leaves = [leaf for entry in manifest.entries for leaf in entry.type.leaves]
    for entry in manifest.entries:
        if _leaves_in(entry.type.structure) != len(entry.type.leaves):
            return f"{entry.label}: another number of arrays than its structure has"
    for number, leaf in enumerate(leaves):
        if not all(type(size) is int and size >= 0 for size in leaf.shape):
            return f"the shape {leaf.shape!r}"
        if (type(leaf.array) is not int) if math.prod(leaf.shape) else (leaf.array is not None):
            return f"an array of {leaf} under the number {leaf.array!r}"
        if leaf.array not in (None, number):  # they are numbered in the order in which they stand
            return f"the {number}th array under the number {leaf.array}"
    return None


def _is_dtype(leaf: Leaf) -> bool:
    """Whether there is such a dtype, or such a random key."""
    try:
        if leaf.impl is not None:
            return str(jax.eval_shape(functools.partial(jax.random.key, 0, impl=leaf.impl)).dtype) == leaf.dtype
        return str(jnp.dtype(leaf.dtype)) == leaf.dtype
    except (TypeError, ValueError):
        return False


def _leaves_in(structure: Any, depth: int = 0) -> int:
    """The number of leaves in a structure.

    Raises:
      ValueError: it is none.
    """
    if structure == _LEAF:
        return 1
    if depth > _DEEPEST or not (isinstance(structure, list) and len(structure) == 2 and isinstance(structure[0], str)):
        raise ValueError("a value's structure that is none")
    return sum(_leaves_in(inner, depth + 1) for _, inner in structure[1])


def _crc(number: Any, files: Any, states: Any, extra: Any) -> int:
    parts = [number, files, states] if extra is None else [number, files, states, extra]
    return zlib.crc32(json.dumps(parts).encode())


def _damaged(directory: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"the manifest of the checkpoint at `{directory}` is damaged",
        got=found,
        cure="Restore an earlier checkpoint.",
    )
