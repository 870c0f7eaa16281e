"""The command line: `python -m mutatis checkpoint show runs/step_100` and more of that kind.

- ``checkpoint ls DIRECTORY``: the checkpoints in a directory, whether each is whole, and what was kept beside
- ``checkpoint show PATH``: the states: paths, kinds, shapes, sizes
- ``checkpoint diff PATH OTHER``: what is in one only, and how far the rest is apart
- ``checkpoint verify PATH``: read every byte; the exit status is 1 if one is not as it was written
- ``checkpoint convert PATH OUT``: to a ``.safetensors`` file, or ``--to orbax``; and from these to a checkpoint
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mutatis import checkpoint, interop
from mutatis._packages import require
from mutatis.checkpoint.manifest import MANIFEST, read_manifest
from mutatis.core.avals import numbers_of, show_type
from mutatis.core.naming import show_path
from mutatis.core.showing import show_bytes
from mutatis.errors import MutatisError
from mutatis.inspect.tables import Table
from mutatis.interop.files import write_safetensors
from mutatis.model.kinds import Param
from mutatis.model.state import State


class Text(Table):
    """Rows of a command's output."""

    def __init__(self, header: tuple[str, ...], rows: Sequence[tuple[str, ...]], left: int) -> None:
        self.header, self.left, self._cells = header, header[:left], rows  # type: ignore[misc]

    def cells(self) -> Sequence[tuple[str, ...]]:
        """The text of each row."""
        return self._cells


def ls(args: argparse.Namespace) -> int:
    """The checkpoints in a directory."""
    rows = []
    for name in sorted(os.listdir(args.path)):
        path = os.path.join(args.path, name)
        if name.startswith(".") or not os.path.isdir(path):
            continue
        try:
            found = checkpoint.describe(path)
            read_manifest(path).check_files(path, contents=False)
        except MutatisError as error:
            rows.append((name, "", "", f"damaged: {error.problem}"))
            continue
        beside = "" if found.extra is None else str(found.extra)
        rows.append((name, str(len(found.states)), show_bytes(sum(s.bytes for s in found.states)), beside))
    print(Text(("checkpoint", "states", "size", "kept beside"), rows, 1) if rows else "no checkpoints")
    return 0


def show(args: argparse.Namespace) -> int:
    """The states of a checkpoint."""
    found = checkpoint.describe(args.path)
    print(found)
    if found.extra is not None:
        print(f"kept beside: {found.extra}")
    return 0


def verify(args: argparse.Namespace) -> int:
    """Read every byte."""
    manifest = read_manifest(os.path.abspath(args.path))
    manifest.check_files(os.path.abspath(args.path))
    size = sum(size for size, _ in manifest.files.values())
    print(f"{args.path}: whole; {len(manifest.entries)} states in {len(manifest.files)} files of {show_bytes(size)}")
    return 0


def diff(args: argparse.Namespace) -> int:
    """What is in one only, and how far the rest is apart."""
    one, other = checkpoint.load(args.path), checkpoint.load(args.other)
    rows = []
    for path in sorted({*one, *other}, key=show_path):
        name = show_path(path) or "."
        if path not in other or path not in one:
            rows.append((name, f"only in {args.path if path in one else args.other}", "", ""))
            continue
        a, b = (jax.tree.leaves(jax.tree.map(_numbers, state[path])) for state in (one, other))
        if [(x.shape, x.dtype) for x in a] != [(x.shape, x.dtype) for x in b]:
            rows.append((name, f"{show_type(one[path])} and {show_type(other[path])}", "", ""))
            continue
        apart = _norm([x.astype(np.float64) - y.astype(np.float64) for x, y in zip(a, b, strict=True)])
        if apart or any(not np.array_equal(x, y, equal_nan=x.dtype.kind in "fc") for x, y in zip(a, b, strict=True)):
            norm = _norm(a)
            rows.append((name, show_type(one[path]), f"{apart:.3g}", f"{apart / norm:.3g}" if norm else "inf"))
    print(Text(("state", "what", "norm of the difference", "relative"), rows, 2) if rows else "no difference")
    return 0


def _numbers(array: Any) -> np.ndarray[Any, Any]:
    return np.asarray(numbers_of(array))


def _norm(arrays: list[Any]) -> float:
    return float(np.sqrt(sum(float(np.sum(np.abs(array.astype(np.complex128)) ** 2)) for array in arrays)))


def convert(args: argparse.Namespace) -> int:
    """To another form, or from one."""
    if os.path.exists(os.path.join(args.path, MANIFEST)):
        arrays = _by_name(checkpoint.load(args.path))
        if args.to == "orbax":
            with require("orbax.checkpoint", "convert").PyTreeCheckpointer() as checkpointer:
                checkpointer.save(os.path.abspath(args.out), arrays)
        else:
            write_safetensors(args.out, arrays)
    else:
        weights = interop.read(args.path)
        checkpoint.save(args.out, {name: Param(_numbers(array)) for name, array in weights.items()})
    print(f"{args.path} -> {args.out}")
    return 0


def _by_name(state: State) -> dict[str, Any]:
    """Its arrays by dotted name; random keys as what they are made of."""
    named = {}
    for path, value in state.items():
        for keys, leaf in jax.tree_util.tree_flatten_with_path(value)[0]:
            inside = jax.tree_util.keystr(keys, simple=True, separator=".")
            named[".".join([*map(str, path), *([inside] if inside else [])]) or "value"] = _numbers(leaf)
    return named


def main(arguments: list[str] | None = None) -> int:
    """Run a command; gives the exit status."""
    parser = argparse.ArgumentParser("python -m mutatis", description="Look at what Mutatis has written.")
    rooms = parser.add_subparsers(required=True, metavar="checkpoint")
    commands = rooms.add_parser("checkpoint", help="checkpoints").add_subparsers(required=True, metavar="command")
    for function, names, about in (
        (ls, ["path"], "the checkpoints in a directory"),
        (show, ["path"], "the states of one"),
        (diff, ["path", "other"], "how two differ"),
        (verify, ["path"], "whether every byte is as it was written"),
        (convert, ["path", "out"], "to safetensors or Orbax, and back"),
    ):
        command = commands.add_parser(function.__name__, help=about)
        for name in names:
            command.add_argument(name)
        if function is convert:
            command.add_argument("--to", choices=["safetensors", "orbax"], default="safetensors", help="what `out` is")
        command.set_defaults(run=function)
    given = parser.parse_args(arguments)
    try:
        return int(given.run(given))
    except (MutatisError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
