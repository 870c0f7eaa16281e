"""`Manager`: the checkpoints of a run, one directory for each step, saved in the background and swept by rules."""

from __future__ import annotations

import atexit
import base64
import dataclasses
import math
import os
import re
import shutil
import socket
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from mutatis.checkpoint import disk
from mutatis.checkpoint.arrays import encode
from mutatis.checkpoint.manifest import Entry, read_manifest
from mutatis.checkpoint.processes import TIMEOUT, Processes
from mutatis.checkpoint.restoring import restore
from mutatis.checkpoint.saving import by_key, check_call, check_extra, collect, write
from mutatis.compilation.plan import copy_values
from mutatis.core import access
from mutatis.core.calls import is_count
from mutatis.core.showing import show_value
from mutatis.errors import ArgumentError, CheckpointError
from mutatis.model.filters import FilterLike
from mutatis.model.walks import variables

_STEP = re.compile(r"step_(\d+)")


@dataclasses.dataclass(frozen=True)
class Restored:
    """The result of `Manager.restore`.

    Attributes:
      step: the step of the checkpoint, an int.
      metrics: the numbers that were saved with it, by name.
      extra: the further data that were saved with it; None if there are none.
    """

    step: int
    metrics: dict[str, float]
    extra: Any


class Manager:
    """Saves the checkpoints of a training run into one directory, and removes those that no rule keeps.

    By default it saves in the background: a call of `save` takes as long as copying the states. An error in the background is
    raised by the next call, by `wait` or by `close`, and reported at exit. In a job with several processes, all of them make a
    manager and make the same calls.

    Args:
      directory: the directory; it and its parents are made.
      every: save at the steps that this int divides; `save` ignores the others.
      keep: the number of checkpoints to keep, those that were saved last; None keeps all. A damaged one does not count.
      keep_best: the name of a metric with `min` or `max`, such as ``("loss", min)``: the best checkpoint by it is kept too.
      keep_every: the checkpoints of steps that this int divides are kept too.
      background: whether to write while the program goes on.
      timeout: the time in seconds that one process waits for another.

    Raises:
      ArgumentError: an option has a wrong value.
      CheckpointError: at the first save: another job saves into the directory.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> model = {"w": mu.Param(jnp.zeros(2))}
      >>> with mu.checkpoint.Manager("run", every=10, keep=2, keep_best=("loss", min)) as manager:
      ...     for step in range(1, 51):
      ...         model["w"].value += 1
      ...         _ = manager.save(step, model, metrics={"loss": abs(step - 20)})
      >>> manager.steps, manager.best
      ([20, 40, 50], 20)
      >>> manager.restore(model).step, float(model["w"].value[0])
      (50, 50.0)
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        every: int = 1,
        keep: int | None = 3,
        keep_best: tuple[str, Callable[..., Any]] | None = None,
        keep_every: int | None = None,
        background: bool = True,
        timeout: float = TIMEOUT,
    ) -> None:
        for name, number in (("every", every), ("keep", keep), ("keep_every", keep_every)):
            if number is not None and not is_count(number):
                raise ArgumentError(
                    f"`{name}` cannot be {show_value(number)}",
                    path=name,
                    expected="an int, from 1",
                    got=show_value(number),
                    cure=f"`mu.checkpoint.Manager(directory, {name}=3)`",
                )
        if keep_best is not None and not _is_best(keep_best):
            raise ArgumentError(
                f"`keep_best` cannot be {show_value(keep_best)}",
                path="keep_best",
                expected="the name of a metric, and `min` or `max`",
                got=show_value(keep_best),
                cure='`mu.checkpoint.Manager(directory, keep_best=("loss", min))`',
            )
        self.directory = check_call(directory, "kept")
        self.every = every
        self.keep = keep
        self.keep_best = keep_best
        self.keep_every = keep_every
        self.background = background
        self.timeout = timeout
        self._lock: int | None = None  # on the directory, from the first save on
        self._calls = threading.RLock()  # one at a time, from whichever threads
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._damaged: set[tuple[int, float]] = (
            set()
        )  # steps, and the orders of their saves, that a restore has found damaged
        _open.add(self)

    def __enter__(self) -> Manager:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except CheckpointError as problem:  # the error of the block is the one to be seen
            warnings.warn(f"a checkpoint could not be saved: {problem}", stacklevel=2)

    # -- saving ----------------------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        node: Any,
        *filters: FilterLike,
        metrics: dict[str, Any] | None = None,
        iterator: Any = None,
        extra: Any = None,
        force: bool = False,
    ) -> bool:
        """Save the states of a model at a step, if `every` divides the step.

        Args:
          step: the number of the step, an int from 0.
          node: a Module, a Variable, or a list, tuple or dict of them, such as ``(model, optimizer)``.
          *filters: which states; all, if none is given.
          metrics: a dictionary from names to numbers or scalar arrays.
          iterator: the source of the data, whose position is saved too: an object with `get_state`, as in Grain, or `state_dict`.
          extra: further data to keep, as JSON.
          force: whether to save at any step, for instance at the last one.

        Returns:
          Whether it saves, a bool.

        Raises:
          CheckpointError: the save before has failed, or this one cannot be made; another job saves into the directory.
          ArgumentError: the metric of `keep_best` is missing, or JSON cannot hold `extra`.
        """
        check_call(self.directory, "saved")
        with self._calls:
            return self._save(check_step(step), node, filters, metrics, iterator, extra, force)

    def _save(
        self, step: int, node: Any, filters: tuple[Any, ...], metrics: Any, iterator: Any, extra: Any, force: bool
    ) -> bool:
        self._raise_failure(wait=False)
        if not force and step % self.every:
            return False
        self.wait()
        path = self._path(step)
        numbers = {name: float(value) for name, value in (metrics or {}).items()}
        if self.keep_best is not None and self.keep_best[0] not in numbers:
            raise ArgumentError(
                f"there is no metric `{self.keep_best[0]}` to find the best checkpoint by",
                path="metrics",
                expected=f"a number for `{self.keep_best[0]}`",
                got=show_value(metrics),
                cure=f"`manager.save(step, model, metrics={{{self.keep_best[0]!r}: value}})`",
            )
        check_extra(extra)
        beside = {"step": step, "metrics": numbers, "extra": extra, "iterator": _position_of(iterator)}
        processes = Processes(f"save {path}", self.timeout)
        processes.agree(self._lock_directory)
        beside["order"] = processes.agree(self._next_order)
        cells = variables(node, *filters)
        with access.lent([cell for _, cell in by_key(cells).values()]) as values:
            entries, arrays = collect(cells, values)
            if not self.background:
                self._write(path, entries, arrays, beside, processes)
                return True
            arrays = _copied(arrays)
        self._thread = threading.Thread(
            target=self._write_later, args=(path, entries, arrays, beside, processes), name="mutatis.checkpoint"
        )
        self._thread.start()
        return True

    def wait(self) -> None:
        """Wait until the save in the background is done.

        Raises:
          CheckpointError: it has failed.
        """
        self._raise_failure(wait=True)

    def close(self) -> None:
        """Wait until the save in the background is done, and let other jobs save into the directory.

        Raises:
          CheckpointError: the save has failed.
        """
        try:
            self.wait()
        finally:
            lock, self._lock = self._lock, None
            disk.unlock(self.directory, lock)
            _open.discard(self)

    def _write_later(self, *args: Any) -> None:
        try:
            self._write(*args)
        except BaseException as error:
            self._failure = error

    def _write(
        self, path: str, entries: tuple[Entry, ...], arrays: dict[int, Any], beside: Any, processes: Processes
    ) -> None:
        write(path, entries, arrays, beside, processes)
        processes.agree(self._sweep)

    def _raise_failure(self, *, wait: bool) -> None:
        with self._calls:
            thread = self._thread
            if thread is not None and (wait or not thread.is_alive()):
                thread.join()
                self._thread = None
            failure, self._failure = self._failure, None
        if failure is not None:
            raise CheckpointError(
                f"a checkpoint of `{self.directory}` could not be saved in the background",
                got=f"{type(failure).__name__}: {failure}",
                cure="What was saved before is as it was. See to the cause, and save again with `force=True`.",
            ) from failure

    def _lock_directory(self) -> None:
        if self._lock is not None:
            return
        with disk.os_errors(self.directory, "written"):
            os.makedirs(self.directory, exist_ok=True)
            me = f"process {os.getpid()} on {socket.gethostname()}"
            self._lock, other = disk.lock_directory(self.directory, me)
        if self._lock is None:
            raise CheckpointError(
                f"another job saves into `{self.directory}`",
                expected="one job for a directory",
                got=other,
                cure="Save into another directory, or end that job.",
            )

    # -- what there is ---------------------------------------------------------------------------------------

    @property
    def steps(self) -> list[int]:
        """The steps of which there are checkpoints, a list of ints in increasing order."""
        try:
            names = os.listdir(self.directory)
        except (FileNotFoundError, NotADirectoryError):
            return []
        found = (_STEP.fullmatch(name) for name in names)
        return sorted(int(match[1]) for match in found if match is not None)

    @property
    def latest(self) -> int | None:
        """The step that was saved last, of those whose checkpoints have a complete manifest, or None."""
        return next((step for step in self._newest_first() if self._beside(step) is not None), None)

    @property
    def best(self) -> int | None:
        """The step with the best metric by `keep_best`, or None if no checkpoint has the metric."""
        if self.keep_best is None:
            return None
        name, best = self.keep_best
        scores = {
            step: score
            for step in self.steps
            if (score := (self._beside(step) or {"metrics": {}})["metrics"].get(name)) is not None
            and not np.isnan(score)
        }
        return None if not scores else best(scores, key=lambda step: (scores[step], -step if best is max else step))

    def restore(
        self, node: Any, *filters: FilterLike, step: int | None = None, iterator: Any = None, **options: Any
    ) -> Restored | None:
        """Restore the newest checkpoint that is intact. Damaged ones are skipped, with a warning that names them.

        Args:
          node: the model, in the structure that was saved.
          *filters: which states; all, if none is given.
          step: restore the checkpoint of this step, and no other.
          iterator: the source of the data, which is set to the saved position.
          **options: as in `mu.checkpoint.restore`.

        Returns:
          The step, the metrics and the further data that were saved, a `Restored`; None if there is no checkpoint.

        Raises:
          CheckpointError: the checkpoint does not fit the node, or has no position for the iterator; there is none of that
            step; or all are damaged.
        """
        self.wait()
        contents = options.pop("verify", "checksum") == "checksum"
        processes = Processes(f"find {self.directory}", self.timeout)
        chosen, damaged = processes.agree(lambda: self._find_whole(step, contents))
        if chosen is None and not damaged:
            return None
        if chosen is None:
            raise CheckpointError(
                f"no checkpoint in `{self.directory}` is whole",
                differences=[f"step {number}: {problem}" for number, problem in damaged],
                cure="Begin anew, or restore from another place.",
            )
        beside = self._beside(chosen) or {}
        if iterator is not None and beside.get("iterator") is None:
            raise CheckpointError(
                f"the checkpoint of step {chosen} in `{self.directory}` has no position of an iterator; nothing was restored",
                path="iterator",
                cure="Save it too, `manager.save(step, model, iterator=iterator)`, or restore without `iterator=`.",
            )
        restore(self._path(chosen), node, *filters, verify="size", **options)  # it has been looked at
        for number, problem in damaged:
            warnings.warn(f"the checkpoint of step {number} was skipped: {problem}", stacklevel=2)
        _set_position(iterator, beside.get("iterator"))
        return Restored(chosen, dict(beside.get("metrics", {})), beside.get("extra"))

    def _find_whole(self, step: int | None, contents: bool) -> tuple[int | None, list[tuple[int, str]]]:
        """The newest step of which all files are as they were written, and what is wrong with those after it."""
        damaged: list[tuple[int, str]] = []
        for each in self._newest_first() if step is None else [check_step(step)]:
            try:
                read_manifest(self._path(each)).check_files(self._path(each), contents=contents)
            except CheckpointError as error:
                if step is not None:
                    raise
                damaged.append((each, error.problem))
                self._damaged.add((each, self._order(each)))
                continue
            return each, damaged
        return None, damaged

    def _newest_first(self) -> list[int]:
        """The steps, the one that was saved last first: after a run went back to an earlier step, that is not the highest."""
        return sorted(self.steps, key=lambda step: (self._order(step), step), reverse=True)

    def _order(self, step: int) -> float:
        """The number of its save into the directory; 0 if an earlier version wrote it, infinite if its manifest is not whole."""
        beside = self._beside(step)
        return math.inf if beside is None else beside.get("order", 0)

    def _next_order(self) -> int:
        return 1 + max((int(order) for order in map(self._order, self.steps) if order < math.inf), default=0)

    def _is_whole(self, step: int) -> bool:
        """Whether its files are there, in their sizes, and no restore has found them damaged."""
        try:
            read_manifest(self._path(step)).check_files(self._path(step), contents=False)
        except CheckpointError:
            return False
        return (step, self._order(step)) not in self._damaged

    def _path(self, step: int) -> str:
        return os.path.join(self.directory, f"step_{step:09d}")

    def _beside(self, step: int) -> dict[str, Any] | None:
        """What was saved beside the states; None if the manifest is not whole."""
        try:
            extra = read_manifest(self._path(step)).extra
        except CheckpointError:
            return None
        return extra if isinstance(extra, dict) and "metrics" in extra else {"metrics": {}}

    def _sweep(self) -> None:
        """Remove what no rule keeps. It is renamed first, so that nobody finds a half of it."""
        if self.keep is None:
            return
        steps = [step for step in self._newest_first() if self._is_whole(step)]  # what is damaged takes nobody's place
        kept = {*steps[: self.keep], self.best}
        kept |= {step for step in steps if self.keep_every is not None and step % self.keep_every == 0}
        for step in steps:
            if step not in kept:
                path = self._path(step)
                with disk.os_errors(path, "removed"), disk.only_saver(path):
                    gone = disk.unfinished(path)
                    shutil.rmtree(gone, ignore_errors=True)
                    os.rename(path, gone)
                    shutil.rmtree(gone, ignore_errors=True)


def _is_best(given: Any) -> bool:
    """Whether these are a name, and how to choose among numbers."""
    return isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], str) and given[1] in (min, max)


def check_step(step: Any) -> int:
    """The number of a step.

    Raises:
      ArgumentError: it is none.
    """
    if isinstance(step, int | np.integer) and not isinstance(step, bool) and step >= 0:
        return int(step)
    raise ArgumentError(
        f"{show_value(step)} is not the number of a step",
        path="step",
        expected="an int, from 0",
        got=show_value(step),
        cure="`manager.save(int(optimizer.step), (model, optimizer))`",
    )


def _copied(arrays: dict[int, jax.Array]) -> dict[int, Any]:
    """Copies that no step of the program can delete: in the memory of the host, where that is another one."""
    local = all(array.is_fully_addressable for array in arrays.values())
    devices = {device.platform for array in arrays.values() for device in array.sharding.device_set}
    if local and "cpu" not in devices:
        return {number: np.asarray(encode(array)) for number, array in arrays.items()}
    copies: Sequence[Any] = copy_values(list(arrays.values()))
    return dict(zip(arrays, copies, strict=True))


# -- the position of the data --------------------------------------------------------------------------------------


def _position_of(iterator: Any) -> Any:
    """Where an iterator is, as JSON."""
    if iterator is None:
        return None
    for name in ("get_state", "state_dict"):
        if callable(read := getattr(iterator, name, None)):
            state = read()
            if isinstance(state, bytes):
                return {"bytes": base64.b85encode(state).decode()}
            check_extra(state)
            return {"json": state}
    raise _no_position(iterator)


def _set_position(iterator: Any, position: Any) -> None:
    if iterator is None:
        return
    state = position["json"] if "json" in position else base64.b85decode(position["bytes"])
    for name in ("set_state", "load_state_dict"):
        if callable(write_state := getattr(iterator, name, None)):
            write_state(state)
            return
    raise _no_position(iterator)


def _no_position(iterator: Any) -> ArgumentError:
    return ArgumentError(
        "the position of an iterator cannot be kept",
        path="iterator",
        expected="`get_state` and `set_state`, or `state_dict` and `load_state_dict`",
        got=show_value(iterator),
        cure="Keep what says where it is as `extra={'batch': 100}`, and skip so many after restoring.",
    )


_open: weakref.WeakSet[Manager] = weakref.WeakSet()


@atexit.register
def _finish() -> None:
    """Wait for what is being saved, and say what has failed."""
    for manager in list(_open):
        try:
            manager.close()
        except CheckpointError as error:
            warnings.warn(f"a checkpoint could not be saved: {error}", stacklevel=1)
