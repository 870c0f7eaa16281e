"""`preemption`: a job that is told to end saves first."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax

from mutatis.errors import ArgumentError


class Stop:
    """Whether a job has to end, as `mu.preemption` gives it: false at first, and true once the job was told to end."""

    def __init__(self) -> None:
        self.told = False
        self._asked = 0

    def __bool__(self) -> bool:
        """Say whether the job is to end. In a job of several processes, all of them ask at the same steps and get one answer."""
        if jax.process_count() == 1:
            return self.told
        from jax.experimental import multihost_utils

        self._asked += 1
        if not self.told and multihost_utils.reached_preemption_sync_point(self._asked):
            self.told = True
        return self.told


@contextlib.contextmanager
def preemption(*signals: signal.Signals) -> Iterator[Stop]:
    """Let a job that is told to end finish its present step, so that it can save first.

    Clusters send a signal (SIGTERM) before they stop a job. Inside the ``with`` block the signal only sets a flag, ``stop``,
    which your loop asks for after each step. So states are read and saved between steps. A second signal has the effect that it
    had before the block. In a job of several processes the service of JAX itself watches for SIGTERM, and all processes stop
    after the same step.

    Args:
      *signals: the signals to watch for, in a job of one process, such as ``signal.SIGUSR1``. The default is SIGTERM.

    Returns:
      A context manager. It gives an object that is false at first, and true once the job was told to end.

    Raises:
      ArgumentError: the block is entered outside of the main thread. Python handles signals in the main thread only.

    Example:
      >>> import mutatis as mu
      >>> n, manager = mu.Variable(0), mu.checkpoint.Manager("run")
      >>> with mu.preemption() as stop:
      ...     while not stop and int(n) < 5:
      ...         n.value += 1
      ...     manager.save(int(n), n, force=True)
      True
      >>> manager.close()
    """
    stop = Stop()
    if jax.process_count() > 1:
        yield stop
        return
    if threading.current_thread() is not threading.main_thread():
        raise ArgumentError(
            "`mu.preemption` was entered in a thread that gets no signals",
            expected="the main thread",
            got=threading.current_thread().name,
            cure="Enter it in the main thread, and hand `stop` to the other one.",
        )
    before: dict[int, Any] = {}

    def tell(number: int, frame: Any) -> None:
        stop.told = True
        signal.signal(number, before[number])

    chosen = signals or (signal.SIGTERM,)
    for number in chosen:
        before[number] = signal.getsignal(number)
        signal.signal(number, tell)
    try:
        yield stop
    finally:
        for number in chosen:
            signal.signal(number, before[number])
