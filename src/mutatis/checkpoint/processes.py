"""Several processes that save together: what one decides and the others hear, and what all do, with a time limit.

They talk through the service that `jax.distributed.initialize` has started, not by programs on the devices, so a save in the
background does not get in the way of the steps.
"""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax

from mutatis import _compat
from mutatis.errors import CheckpointError

TIMEOUT = 600.0  # seconds that one process waits for another


class Processes:
    """The processes of one job that do something together. All have to call the same methods in the same order.

    Args:
      name: what they do, and to which path: each has the same.
      timeout: how long one waits for another, in seconds.
    """

    def __init__(self, name: str, timeout: float = TIMEOUT) -> None:
        self.count = jax.process_count()
        self.me = jax.process_index()
        self.timeout = timeout
        self.label = name
        _times[name] += 1  # each process has done so as often
        self._name = f"mutatis/{name}/{_times[name]}"
        self._numbers = itertools.count()

    @property
    def first(self) -> bool:
        """Whether this is the process that decides."""
        return bool(self.me == 0)

    def agree(self, decide: Callable[[], Any]) -> Any:
        """What the first process makes of it, for all; if it raises a `CheckpointError`, all do.

        Args:
          decide: gives something that JSON can hold; only the first process calls it.
        """
        if self.count == 1:
            return decide()
        key = f"{self._name}/{next(self._numbers)}"
        if self.first:
            try:
                result = decide()
            except BaseException as error:
                problem = error.problem if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
                _client().key_value_set(key, json.dumps({"error": problem}))
                raise
            _client().key_value_set(key, json.dumps({"result": result}))
            return result
        said = json.loads(self._hear(key, 0))
        if "error" in said:
            raise CheckpointError(said["error"], got="what process 0 found", cure="See the message of process 0.")
        return said["result"]

    def each(self, do: Callable[[], Any]) -> Any:
        """What this process makes of it, once all have done it; if one fails, all do.

        Raises:
          CheckpointError: another process has failed, or has not come to this in time.
        """
        if self.count == 1:
            return do()
        key = f"{self._name}/{next(self._numbers)}"
        try:
            result = do()
        except BaseException as error:
            _client().key_value_set(f"{key}/{self.me}", f"{type(error).__name__}: {error}")
            raise
        _client().key_value_set(f"{key}/{self.me}", "")
        end = time.monotonic() + self.timeout
        for other in range(self.count):
            if other != self.me and (problem := self._hear(f"{key}/{other}", other, end)):
                raise CheckpointError(
                    f"process {other} could not take part in `{self.label}`",
                    got=problem,
                    cure="See the message of that process; the checkpoint before is as it was.",
                )
        return result

    def _hear(self, key: str, other: int, end: float | None = None) -> str:
        rest = self.timeout if end is None else max(end - time.monotonic(), 0.1)
        try:
            return str(_client().blocking_key_value_get(key, int(rest * 1000)))
        except RuntimeError as error:
            raise CheckpointError(
                f"process {other} is late for `{self.label}`",
                expected=f"all {self.count} processes, within {self.timeout:g} seconds",
                got=f"{type(error).__name__}: {str(error).splitlines()[0]}",
                cure="Every process has to save and restore at the same steps; see what that one does.",
            ) from error


_times: Counter[str] = Counter()


def _client() -> Any:
    client = _compat.distributed_client()
    if client is None:
        raise CheckpointError(
            "the processes of this job cannot talk to each other",
            expected="`jax.distributed.initialize()` before anything else",
            cure="Call it at the start of the program, in each process.",
        )
    return client
