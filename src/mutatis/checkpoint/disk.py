"""Files and directories: one saver at a time, files that are files, what is written is on the disk, and one kind of error."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import shutil
import stat
import threading
from collections.abc import Iterator
from typing import IO, Any

from mutatis.errors import CheckpointError

# On Windows there are no such locks: two savers of one path are not kept apart.
_fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None

_CURES = {
    errno.ENOSPC: "Free some space, or save to another disk.",
    errno.EDQUOT: "Free some space, or save to another disk.",
    errno.EROFS: "Save to a disk that can be written to.",
    errno.EACCES: "Choose a place that this user may use.",
    errno.EPERM: "Choose a place that this user may use.",
    errno.ELOOP: "Remove the link, or choose another path.",
}
# What a file system says that knows no locks, or a directory into which nothing can be put; a checkpoint in it can be replaced.
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EACCES, errno.EPERM, errno.EROFS}
_saving: dict[str, int] = {}  # the thread that saves to a path, by path


@contextlib.contextmanager
def os_errors(path: str, what: str) -> Iterator[None]:
    """Raise what the operating system says as a `CheckpointError`.

    Args:
      path: the checkpoint.
      what: what cannot be done to it: ``"written"``.
    """
    try:
        yield
    except OSError as error:
        cure = _CURES.get(error.errno or 0, "Choose another path, or see what is there.")
        raise CheckpointError(
            f"the checkpoint at `{path}` cannot be {what}",
            got=f"{type(error).__name__}: {error}",
            cure=cure,
        ) from error


@contextlib.contextmanager
def only_saver(path: str) -> Iterator[None]:
    """Keep other savers of a path, in this process and in others, waiting meanwhile.

    Raises:
      CheckpointError: this very thread is saving there, and what runs now has interrupted it.
    """
    if _saving.get(path) == threading.get_ident():
        raise CheckpointError(
            f"the checkpoint at `{path}` is being saved by the code that this call interrupts",
            expected="a signal handler or finalizer that only notes what is to be done",
            cure="Set a flag in the handler, and save in the loop when it is set.",
        )
    lock = _lock_of(path)
    descriptor = _acquire(lock, wait=True)
    _saving[path] = threading.get_ident()
    try:
        yield
    finally:
        _saving.pop(path, None)
        _release(lock, descriptor)


def lock_directory(directory: str, me: str) -> tuple[int | None, str]:
    """Keep a directory for one job until `unlock`: a descriptor; or None, and who has it."""
    lock = os.path.join(directory, _JOB)
    descriptor = _acquire(lock, wait=False)
    if descriptor is None:
        with contextlib.suppress(OSError), open_file(lock) as file:
            return None, file.read(200).decode(errors="replace")
        return None, "a job that has just ended"
    if descriptor >= 0:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, me.encode())
    return descriptor, me


def unlock(directory: str, descriptor: int | None) -> None:
    """Let other jobs have a directory."""
    _release(os.path.join(directory, _JOB), descriptor)


_JOB = ".job.lock"


def sweep_leftovers(path: str) -> None:
    """Remove what savers that died have left beside a checkpoint; what another saver is writing stays."""
    folder = os.path.dirname(path)
    names: list[str] = []
    with contextlib.suppress(PermissionError):
        names = os.listdir(folder)
    for name in names:
        if not (name.startswith(".") and name.endswith(UNFINISHED)):
            continue
        other = os.path.join(folder, name[1 : -len(UNFINISHED)])
        lock = _lock_of(other)
        if other != path and (descriptor := _acquire(lock, wait=False)) is not None:
            shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
            _release(lock, descriptor)


UNFINISHED = ".unfinished"


def unfinished(path: str) -> str:
    """Where a new checkpoint is written before it is put in its place."""
    return os.path.join(os.path.dirname(path), f".{os.path.basename(path)}{UNFINISHED}")


def _lock_of(path: str) -> str:
    return os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.lock")


def _acquire(lock: str, *, wait: bool) -> int | None:
    """A descriptor that holds the lock, -1 where there are no locks; None if another has it, and it is not waited for."""
    if _fcntl is None:
        return -1
    while True:
        descriptor = -1
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            _fcntl.flock(descriptor, _fcntl.LOCK_EX if wait else _fcntl.LOCK_EX | _fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException as error:
            if descriptor >= 0:
                os.close(descriptor)
            if isinstance(error, OSError) and error.errno in _NO_LOCKS:
                return -1
            raise
        if _is_at(descriptor, lock):
            return descriptor
        os.close(descriptor)  # who had it before has removed the file: what we hold is no lock any more


def _is_at(descriptor: int, path: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    return False


def _release(lock: str, descriptor: int | None) -> None:
    if descriptor is not None and descriptor >= 0:
        with contextlib.suppress(OSError):
            os.unlink(lock)  # while it is held: who waits for it looks again
        os.close(descriptor)


def open_file(path: str) -> IO[Any]:
    """Open a regular file; anything else, a pipe say, could keep the reader waiting.

    Raises:
      IsADirectoryError: it is none.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise IsADirectoryError(errno.EISDIR, "not a regular file", path)
    return os.fdopen(descriptor, "rb")


def sync(path: str) -> None:
    """Have the operating system write a file or directory, and all that is below it, to the disk."""
    for folder, _, names in os.walk(path):
        for name in names:
            _sync_one(os.path.join(folder, name))
        sync_directory(folder)


def sync_directory(path: str) -> None:
    """Have the names in a directory written to the disk."""
    if os.name == "posix":  # elsewhere directories cannot be opened
        _sync_one(path)


def _sync_one(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
