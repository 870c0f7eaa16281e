"""Files as others leave them: two savers at once, what died savers left, edited manifests, disks that refuse."""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import checkpoint
from mutatis.checkpoint import disk, manifest
from mutatis.errors import CheckpointError

pytestmark = pytest.mark.once  # files are the same under each JAX


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run"


def model(value: float = 1.0) -> dict[str, Any]:
    return {"w": mu.Param(jnp.full((2, 3), value)), "v": mu.Param(jnp.full(3, value))}


def values(node: dict[str, Any]) -> set[float]:
    return {float(x) for cell in node.values() for x in np.unique(np.asarray(cell.value))}


# -- savers at the same time -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # of Orbax, whose files go while it reads
def test_threads_save_one_after_the_other(path: Path) -> None:
    failures: list[BaseException] = []

    def saver(number: int) -> None:
        try:
            for turn in range(5):
                checkpoint.save(path, model(10.0 * number + turn))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=saver, args=(number,)) for number in (1, 2, 3)]
    for thread in threads:
        thread.start()
    mixed = 0
    while any(thread.is_alive() for thread in threads):
        node = model(0.0)
        try:
            checkpoint.restore(path, node)
        except CheckpointError as error:
            failures += [] if "there is nothing" in str(error) else [error]
            continue
        mixed += len(values(node)) > 1
    gc.collect()  # what Orbax has left, while its warning is none
    assert not failures and not mixed
    assert os.listdir(path.parent) == ["run"]
    assert len(os.listdir(path)) == 2


def test_a_checkpoint_that_comes_while_it_is_looked_for_was_not_there(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_early(file: str) -> None:
        path.mkdir()  # as the first save of another process puts it there
        raise FileNotFoundError(file)

    monkeypatch.setattr(manifest, "open_file", too_early)
    with pytest.raises(CheckpointError, match="there is nothing"):
        checkpoint.restore(path, model())


@pytest.mark.once
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # of Orbax, whose files go while it reads
def test_processes_save_one_after_the_other(path: Path) -> None:
    program = """
        import sys, jax.numpy as jnp, mutatis as mu
        from mutatis import checkpoint
        for turn in range(6):
            value = float(sys.argv[2]) + turn
            checkpoint.save(sys.argv[1], {"w": mu.Param(jnp.full((2, 3), value)), "v": mu.Param(jnp.full(3, value))})
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(path)]
    savers = [subprocess.Popen([*command, str(n)], stderr=subprocess.PIPE, text=True) for n in (10, 20)]
    failures: list[str] = []
    while any(saver.poll() is None for saver in savers):
        node = model(0.0)
        try:
            checkpoint.restore(path, node)
        except CheckpointError as error:
            failures += [] if "there is nothing" in str(error) else [str(error)]
            continue
        assert len(values(node)) == 1
    for saver in savers:
        _, said = saver.communicate()
        assert saver.returncode == 0, said
    gc.collect()  # as above
    assert not failures
    node = model(0.0)
    checkpoint.restore(path, node)
    assert values(node) in ({15.0}, {25.0})
    assert os.listdir(path.parent) == ["run"]


def test_a_handler_that_interrupts_a_save_is_told_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def handler(*_: Any) -> None:
        with pytest.raises(CheckpointError) as caught:
            checkpoint.save(path, model(2.0))
        said.append(str(caught.value))

    before = signal.signal(signal.SIGUSR1, handler)
    original = disk.sync

    def sync(where: str) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        original(where)

    monkeypatch.setattr(disk, "sync", sync)
    try:
        checkpoint.save(path, model(1.0))
    finally:
        signal.signal(signal.SIGUSR1, before)
        monkeypatch.undo()
    assert len(said) == 1 and "Set a flag in the handler" in said[0]
    node = model(0.0)
    checkpoint.restore(path, node)
    assert values(node) == {1.0}
    checkpoint.save(path, model(3.0))


# -- what died savers left ---------------------------------------------------------------------------------------------


def test_what_a_dead_saver_left_is_removed_by_the_next(path: Path) -> None:
    for name in (".step_7.unfinished", ".run.unfinished"):
        (path.parent / name / "arrays-1").mkdir(parents=True)
    (path.parent / ".step_7.lock").touch()
    checkpoint.save(path, model())
    assert os.listdir(path.parent) == ["run"]


def test_what_another_saver_is_writing_stays(path: Path) -> None:
    other = path.parent / ".step_7.unfinished"
    other.mkdir(parents=True)
    with disk.only_saver(str(path.parent / "step_7")):
        checkpoint.save(path, model())
        assert other.exists()
    checkpoint.save(path, model())
    assert not other.exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EROFS])
def test_where_there_are_no_locks_it_saves_without(number: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.open

    def without(name: Any, *args: Any, **kwargs: Any) -> int:
        if os.fspath(name).endswith(".lock"):
            raise OSError(number, os.strerror(number))
        return original(name, *args, **kwargs)

    monkeypatch.setattr(os, "open", without)
    checkpoint.save(path, model(1.0))
    checkpoint.save(path, model(2.0))
    node = model(0.0)
    checkpoint.restore(path, node)
    assert values(node) == {2.0}


def test_a_lock_file_that_is_a_link_is_not_followed(path: Path) -> None:
    target = path.parent / "other"
    target.write_text("kept")
    (path.parent / ".run.lock").symlink_to(target)
    with pytest.raises(CheckpointError):
        checkpoint.save(path, model())
    assert target.read_text() == "kept"


# -- manifests that somebody has edited --------------------------------------------------------------------------------


def sealed(manifest: dict[str, Any]) -> str:
    parts = [manifest.get("number"), manifest.get("files"), manifest.get("states")]
    return json.dumps({**manifest, "crc": zlib.crc32(json.dumps(parts).encode())})


def nested(depth: int) -> Any:
    inner: Any = "*"
    for _ in range(depth):
        inner = ["list", [[0, inner]]]
    return inner


EDITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a pipe among the files": lambda m: m["files"].update({"arrays-1/pipe": [1, 2]}),
    "a pipe beside them": lambda m: m["files"].update({"pipe": [1, 2]}),
    "a name that climbs": lambda m: m["files"].update({"arrays-1/../../../etc/passwd": [1, 2]}),
    "an absolute name": lambda m: m["files"].update({"/etc/passwd": [1, 2]}),
    "an empty name": lambda m: m["files"].update({"": [1, 2]}),
    "a size that is none": lambda m: m["files"].update({"arrays-1/x": ["a", 2]}),
    "files that are none": lambda m: m.update(files=[1]),
    "states that are none": lambda m: m.update(states={"a": 1}),
    "a state that is none": lambda m: m["states"].append(3),
    "no states": lambda m: m.pop("states"),
    "a number that is none": lambda m: m.update(number="../x"),
    "a negative number": lambda m: m.update(number=-1),
    "another number": lambda m: m.update(number=7),
    "a state twice": lambda m: m["states"].append(m["states"][0]),
    "an array twice": lambda m: m["states"][0]["type"]["leaves"][0].update(array=1),
    "no array": lambda m: m["states"][0]["type"]["leaves"][0].update(array=None),
    "an array that is not there": lambda m: m["states"][0]["type"]["leaves"][0].update(array=77),
    "a huge shape": lambda m: m["states"][0]["type"]["leaves"][0].update(shape=[2**40, 2**40]),
    "a negative shape": lambda m: m["states"][0]["type"]["leaves"][0].update(shape=[-2, -3]),
    "a shape of words": lambda m: m["states"][0]["type"]["leaves"][0].update(shape=["a"]),
    "a dtype that is none": lambda m: m["states"][0]["type"]["leaves"][0].update(dtype="floaty"),
    "a structure that is none": lambda m: m["states"][0]["type"].update(structure=[[["a"]]]),
    "another structure": lambda m: m["states"][0]["type"].update(structure=nested(1)),
    "a deep structure": lambda m: m["states"][0]["type"].update(structure=nested(300)),
    "more leaves": lambda m: m["states"][0]["type"]["leaves"].append(m["states"][0]["type"]["leaves"][0]),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_manifest_is_refused(name: str, path: Path) -> None:
    checkpoint.save(path, model())
    for pipe in (path / "pipe", path / "arrays-1" / "pipe"):
        if "pipe" in name:
            os.mkfifo(pipe)
    file = path / "mutatis.json"
    manifest = json.loads(file.read_text())
    EDITS[name](manifest)
    file.write_text(sealed(manifest))
    node = model(5.0)
    with pytest.raises(CheckpointError):
        checkpoint.restore(path, node)
    assert values(node) == {5.0}


@pytest.mark.parametrize("depth", [2000, 100000])
def test_a_manifest_that_is_nested_without_end_is_refused(depth: int, path: Path) -> None:
    checkpoint.save(path, model())
    file = path / "mutatis.json"
    file.write_text(file.read_text().replace('"*"', '["list", [[0, ' * depth + '"*"' + "]]]" * depth, 1))
    with pytest.raises(CheckpointError):
        checkpoint.restore(path, model())
    with pytest.raises(CheckpointError):
        checkpoint.save(path, model())


@pytest.mark.parametrize("what", ["pipe", "directory", "link to itself"])
def test_a_manifest_that_is_no_file_is_refused(what: str, path: Path) -> None:
    checkpoint.save(path, model())
    file = path / "mutatis.json"
    file.unlink()
    if what == "pipe":
        os.mkfifo(file)
    elif what == "directory":
        file.mkdir()
    else:
        file.symlink_to(file)
    with pytest.raises(CheckpointError):
        checkpoint.restore(path, model())


# -- disks that refuse -------------------------------------------------------------------------------------------------


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def refuse(number: int) -> None:
        def sync(_: str) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(disk, "sync", sync)

    return refuse


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_what_the_system_says_is_one_clear_error(
    number: int, path: Path, refusing: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(path, model(1.0))
    refusing(number)
    with pytest.raises(CheckpointError, match="cannot be written") as caught:
        checkpoint.save(path, model(2.0))
    assert os.strerror(number) in str(caught.value)
    monkeypatch.undo()
    node = model(0.0)
    checkpoint.restore(path, node)
    assert values(node) == {1.0}
    assert len(os.listdir(path)) == 2


@pytest.mark.parametrize("operation", ["save", "restore"])
def test_a_link_to_itself(operation: str, path: Path) -> None:
    path.symlink_to(path)
    with pytest.raises(CheckpointError):
        getattr(checkpoint, operation)(path, model())


def test_a_file_in_the_place_of_a_parent(path: Path) -> None:
    path.write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        checkpoint.save(path / "deeper" / "still", model())


def test_everything_is_synced(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[str, bool]] = []
    original = os.fsync

    def fsync(descriptor: int) -> None:
        where = os.readlink(f"/proc/self/fd/{descriptor}")
        synced.append((os.path.relpath(where, path.parent), stat.S_ISDIR(os.fstat(descriptor).st_mode)))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    checkpoint.save(path, model())
    names = [name for name, _ in synced]
    before = ".run.unfinished"
    arrays = [name for name in names if name.startswith(f"{before}/arrays-1/")]
    assert {os.path.relpath(name, before) for name in arrays} >= {
        os.path.relpath(os.path.join(folder, file), path)
        for folder, _, files in os.walk(path / "arrays-1")
        for file in files
    }
    manifest, directory, parent = (
        names.index(f"{before}/mutatis.json.unfinished"),
        names.index(before),
        names.index("."),
    )
    assert max(map(names.index, arrays)) < manifest < directory < parent


# -- paths -------------------------------------------------------------------------------------------------------------


def test_home_and_bytes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(path.parent))
    checkpoint.save("~/run", model(4.0))
    for where in (path, str(path), os.fsencode(path), "~/run"):
        node = model(0.0)
        checkpoint.restore(where, node)
        assert values(node) == {4.0}
