"""Whole or not at all: whatever ends a save, a reader finds the old checkpoint or the new one, and files of others stay."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import checkpoint
from mutatis.checkpoint import manifest, restoring, saving
from mutatis.errors import CheckpointError


def model(value: float) -> dict[str, Any]:
    return {"a": mu.Param(jnp.full(3, value)), "b": mu.Cache({"n": jnp.full((), value)})}


def check_holds(path: Path, value: float) -> None:
    restored = model(0.0)
    checkpoint.restore(path, restored)
    assert mu.state(restored) == mu.state(model(value))


class Crash(BaseException):
    """Ends a save the hard way: nothing catches it."""


def crash(*_: Any, **__: Any) -> None:
    raise Crash


# Where a save may end: the function that does not return, by its module.
MOMENTS = [(saving, "write_arrays"), (saving, "fingerprints"), (os, "fsync"), (os, "replace")]
IDS = [name for _, name in MOMENTS]


@pytest.mark.parametrize(("where", "name"), MOMENTS, ids=IDS)
def test_the_old_one_stays(where: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c"
    checkpoint.save(path, model(1.0))
    with monkeypatch.context() as patch:
        patch.setattr(where, name, crash)
        with pytest.raises(Crash):
            checkpoint.save(path, model(2.0))
    check_holds(path, 1.0)
    checkpoint.save(path, model(3.0))
    check_holds(path, 3.0)
    assert sorted(os.listdir(path)) == ["arrays-2", "mutatis.json"] and os.listdir(tmp_path) == ["c"]


@pytest.mark.parametrize(("where", "name"), [*MOMENTS, (os, "rename")], ids=[*IDS, "rename"])
def test_nothing_appears(where: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c"
    with monkeypatch.context() as patch:
        patch.setattr(where, name, crash)
        with pytest.raises(Crash):
            checkpoint.save(path, model(1.0))
    assert os.listdir(tmp_path) == []
    checkpoint.save(path, model(2.0))
    check_holds(path, 2.0)


def test_a_failure_after_the_replacement_keeps_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c"
    checkpoint.save(path, model(1.0))
    replace = os.replace

    def replace_and_crash(*args: Any) -> None:
        replace(*args)
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_and_crash)
        with pytest.raises(Crash):
            checkpoint.save(path, model(2.0))
    check_holds(path, 2.0)
    assert sorted(os.listdir(path)) == ["arrays-2", "mutatis.json"]


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False], ids=["over a checkpoint", "afresh"])
@pytest.mark.parametrize("moment", ["saving.write_arrays", "saving.fingerprints", "os.replace"])
def test_a_killed_process(before: bool, moment: str, tmp_path: Path) -> None:
    path = tmp_path / "c"
    if before:
        checkpoint.save(path, model(1.0))
    program = f"""
import os, signal
import jax.numpy as jnp
import mutatis as mu
from mutatis.checkpoint import save, saving
original = {moment}
def die(*args, **kwargs):
    if {moment == "saving.write_arrays"}:
        original(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)
{moment} = die
save({str(path)!r}, {{"a": mu.Param(jnp.full(3, 2.0)), "b": mu.Cache({{"n": jnp.full((), 2.0)}})}})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    if before:
        check_holds(path, 1.0)
    else:
        assert not path.exists()
    checkpoint.save(path, model(3.0))
    check_holds(path, 3.0)
    assert sorted(os.listdir(path)) == ["arrays-2" if before else "arrays-1", "mutatis.json"]
    assert os.listdir(tmp_path) == ["c"]


def test_a_reader_finds_the_new_one_while_it_reads_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c"
    checkpoint.save(path, model(1.0))
    read = restoring.read_arrays
    calls = []

    def read_while_saved_over(directory: str, wanted: Any) -> Any:
        calls.append(directory)
        if len(calls) == 1:
            checkpoint.save(path, model(2.0))
        return read(directory, wanted)

    monkeypatch.setattr(restoring, "read_arrays", read_while_saved_over)
    check_holds(path, 2.0)
    assert [Path(directory).name for directory in calls] == ["arrays-1", "arrays-2"]


def test_another_shape_may_replace(tmp_path: Path) -> None:
    path = tmp_path / "c"
    checkpoint.save(path, model(1.0))
    checkpoint.save(path, mu.Param(jnp.ones((2, 2))))
    other = mu.Param(jnp.zeros((2, 2)))
    checkpoint.restore(path, other)
    np.testing.assert_array_equal(other.value, np.ones((2, 2)))


@pytest.mark.parametrize("kind", ["file", "folder", "damaged", "newer"])
def test_what_is_not_ours_is_not_replaced(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "c"
    if kind == "file":
        path.write_text("precious")
    else:
        path.mkdir()
        name = "precious" if kind == "folder" else manifest.MANIFEST
        text = '{"format": "mutatis.checkpoint", "version": 99}' if kind == "newer" else "precious"
        (path / name).write_text(text)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(CheckpointError, match="is not a checkpoint that can be replaced\n  got: "):
        checkpoint.save(path, model(1.0))
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_an_empty_folder_is_no_obstacle(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, model(1.0))
    check_holds(tmp_path, 1.0)


def test_a_checkpoint_may_be_moved(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a", model(1.0))
    shutil.move(tmp_path / "a", tmp_path / "b")
    check_holds(tmp_path / "b", 1.0)


def test_nothing_is_pickled(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", model(1.0))
    for file in tmp_path.rglob("*"):
        if file.is_file():
            assert b"mutatis.variables" not in file.read_bytes() and not file.read_bytes().startswith(b"\x80")


def test_orbax_alone_can_read_the_arrays(tmp_path: Path) -> None:
    import orbax.checkpoint as ocp

    checkpoint.save(tmp_path / "c", model(1.0))
    restore = {str(n): ocp.RestoreArgs(restore_type=np.ndarray) for n in range(2)}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        read = checkpointer.restore(tmp_path / "c" / "arrays-1", args=ocp.args.PyTreeRestore(restore_args=restore))
    np.testing.assert_array_equal(read["0"], np.ones(3))
