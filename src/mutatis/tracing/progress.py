"""Bars: how far a compiled loop has come, shown while it runs.

The loop is run in blocks of steps, and between blocks it asks whether an update is due. The clock paces the updates: each is a
call into Python, which says after how many steps the next one comes. So a bar costs two calls and a few of these in each second,
however short a step is. What a reverse derivative does afterwards is not shown.

If a function that is told of the progress raises, the loop ends with this error, and its states are as they were before it: so
it can stop a loop. A bar that cannot be drawn any more, as when the terminal is gone, is left out, and the loop goes on.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from mutatis._packages import require
from mutatis.core import checks
from mutatis.core.showing import show_class, show_value
from mutatis.errors import ArgumentError
from mutatis.tracing.arguments import function_name

Progress: TypeAlias = bool | str | Callable[[int, int], object] | None

_SHORT = 0.5  # seconds: what takes less shows no bar
_PACE = 0.25  # seconds between updates
_GROWTH = 4  # at most so many times as many steps as before the last update
_FIRST = 256  # steps before the first update
_BLOCKS = 200  # about so many looks at whether an update is due: one takes a microsecond
_FEW = 50  # with fewer than these a bar would jump
_MOST = 2**31 - 1
_KEPT = 64  # loops of which it is known how far they are: some were interrupted and never end


class Bar:
    """How far one loop has come.

    Args:
      progress: the text in front of the bar; True for the name of the function; or a function of (steps done, all steps).
      f: the function that the loop runs.
      count: its number of steps.
      where: what shows it, for messages.

    Raises:
      ArgumentError: `progress` is something else.
      MissingPackageError: tqdm, which draws the bar, is not installed.
    """

    def __init__(self, progress: Progress, f: Any, count: int, where: str) -> None:
        if not (isinstance(progress, bool | str) or callable(progress)):
            raise ArgumentError(
                f"`progress` cannot be {show_value(progress)}",
                path="progress",
                where=where,
                expected="a text, True, or a function of (steps done, all steps)",
                got=show_class(progress),
                cure='`mu.for_loop(f, xs, progress="epoch 1")`',
            )
        self._count = count
        self._label = progress if isinstance(progress, str) else function_name(f)
        self._tell = progress if callable(progress) else None
        if self._tell is None:
            require("tqdm.auto", "progress=")

    def block(self) -> int:
        """How many steps to run between two looks: a divisor of their number, if there is one, so that no result is copied."""
        least = -(-self._count // _BLOCKS)
        return next((n for n in range(least, self._count // _FEW + 1) if self._count % n == 0), least)

    def start(self) -> tuple[jax.Array, jax.Array]:
        """What is carried along: the steps done; and those at which an update is due, with the number of the run."""
        return jnp.int32(0), jnp.array([0, -1], jnp.int32)

    def tick(self, carried: Any, steps: int) -> Any:
        """Show how far the loop is, if that is due, before it goes on by so many steps."""
        done, due = carried
        kind = jax.ShapeDtypeStruct(due.shape, due.dtype)
        # Not `io_callback`, which JAX refuses in branches under `vmap` and in checkpoints; `end` needs the result. The other
        # branch computes nothing: under a mesh with explicit axes its result would be placed elsewhere.
        due = jax.lax.cond(
            done >= due[0], lambda due: jax.pure_callback(self._show, kind, done, due), lambda due: due, due
        )
        return done + steps, due

    def end(self, carried: Any) -> None:
        """The loop is over."""
        jax.debug.callback(self._end, carried[1])

    def _show(self, done: Any, due: Any) -> Any:
        with _handed_on():
            return self._shown(int(done), int(due[1]))

    def _shown(self, done: int, number: int) -> Any:
        now = time.perf_counter()
        if (run := _runs.get(number)) is None:
            number = next(_numbers) % _MOST
            _runs[number] = run = _Run(now, _FIRST)
            while len(_runs) > _KEPT and (oldest := next(iter(_runs), None)) is not None:
                _close(_runs.pop(oldest, None))
        else:
            rate = (done - run.done) / max(now - run.shown, 1e-9)
            run.steps = max(1, min(int(rate * _PACE), _GROWTH * run.steps))
            if now - run.started >= _SHORT:
                try:
                    self._draw(run, done)
                except BaseException:
                    _close(_runs.pop(number, None))
                    raise
        run.done, run.shown = done, now
        return np.array([min(done + run.steps, _MOST), number], np.int32)

    def _draw(self, run: _Run, done: int) -> None:
        if self._tell is not None:
            self._tell(done, self._count)
        elif not run.gone:
            try:
                self._draw_bar(run, done)
            except (OSError, ValueError):  # `ValueError`: a file that is closed
                run.gone = True

    def _draw_bar(self, run: _Run, done: int) -> None:
        if run.bar is None:
            run.bar = require("tqdm.auto", "progress=").tqdm(
                total=self._count, desc=self._label, mininterval=0, miniters=0, delay=0
            )
            run.bar.start_t -= time.perf_counter() - run.started
        run.bar.update(done - run.bar.n)

    def _end(self, due: Any) -> None:
        run = _runs.pop(int(due[1]), None)
        if run is not None and (self._tell is not None or run.bar is not None):
            with _handed_on():
                self._draw(run, self._count)
        _close(run)


@contextlib.contextmanager
def _handed_on() -> Iterator[None]:
    """A call back from a compiled program, whose error is raised by the call of the program."""
    try:
        yield
    except Exception as error:
        raise checks.CheckFailed(error) from None


class _Run:
    """One run of a loop."""

    __slots__ = ("bar", "done", "gone", "shown", "started", "steps")

    def __init__(self, now: float, steps: int) -> None:
        self.started = self.shown = now
        self.steps = steps
        self.done = 0
        self.bar: Any = None
        self.gone = False  # what it is drawn to


def _close(run: _Run | None) -> None:
    if run is not None and run.bar is not None:
        with contextlib.suppress(OSError, ValueError):
            run.bar.close()


_numbers = itertools.count()
_runs: dict[int, _Run] = {}
