"""What all benchmarks share: contenders in interleaved rounds, ratios within a round, and rows beside their goals.

Machines are noisy and other work comes and goes. So all contenders run in one process, in rounds: a round times a batch of
calls of each, in an order that moves on by one, and a figure is the median over the rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

WARMUP = 3  # rounds that do not count


@dataclasses.dataclass
class Row:
    """One figure of the report.

    Args:
      what: what was measured, and on what.
      against: what the ratio is to.
      value: the figure; a ratio of costs, if `unit` is empty.
      goal: what it should at most be; None for a figure that has no goal.
      unit: ``"s"``, ``"us"``, ``"tokens/s"``, ...
      floor: whether `goal` is what the figure should at *least* be.
      note: whatever else is to be known of it.
    """

    what: str
    against: str
    value: float
    goal: float | None = None
    unit: str = ""
    floor: bool = False
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None if there is none."""
        if self.goal is None:
            return None
        return self.value >= self.goal if self.floor else self.value <= self.goal


def interleave(
    contenders: dict[str, Callable[[], Any]], *, calls: int, rounds: int, wait: Callable[[str], Any] | None = None
) -> dict[str, list[float]]:
    """Seconds per call of each contender, by round.

    Args:
      contenders: one call of each, by name. What it returns is waited for at the end of a batch.
      calls: how many make a batch.
      rounds: how many batches of each are timed, after a few that are not.
      wait: gives what to wait for in place of a call's result, by the contender's name.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds + WARMUP):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            call = contenders[name]
            call()  # a look at the results of the last batch may cost the next call something
            begin = time.perf_counter()
            for _ in range(calls):
                out = call()
            jax.block_until_ready(out if wait is None else wait(name))
            times[name].append((time.perf_counter() - begin) / calls)
        gc.collect()
    return {name: seconds[WARMUP:] for name, seconds in times.items()}


def ratio(times: dict[str, list[float]], name: str, base: str) -> float:
    """The median over the rounds of one contender's time as a ratio to another's."""
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def installed(name: str) -> Any:
    """A module, or None if it is not there."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def numbers(text: str) -> list[int]:
    """The argument of an option that takes several: ``5,50``."""
    return [int(part) for part in text.split(",")]


def aligned(rows: Sequence[Sequence[str]], place: Callable[..., str] = str.ljust, gap: str = "  ") -> str:
    """Rows of text in columns, the first to the left and the others as `place` puts them."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(gap.join([row[0].ljust(widths[0]), *map(place, row[1:], widths[1:])]).rstrip() for row in rows)


def setup() -> dict[str, Any]:
    """Where this runs."""
    device = jax.devices()[0]
    return {
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": f"{device.platform} ({device.device_kind})",
        "cores": os.cpu_count(),
    }


def figure(row: Row) -> str:
    """The figure as text: ratios to two places."""
    return f"{row.value:.3g} {row.unit}" if row.unit else f"{row.value:.2f}"


def show(rows: Sequence[Row]) -> str:
    """Rows as text."""
    lines = [["what", "against", "figure", "goal", ""]]
    for row in rows:
        sign = ">=" if row.floor else "<="
        goal = "" if row.goal is None else f"{sign} {row.goal:g}"
        met = {None: "", True: "met", False: "missed"}[row.met]
        lines.append([row.what, row.against, figure(row), goal, f"{met} {row.note}".strip()])
    return aligned(lines)


def main(
    doc: str | None,
    measure: Callable[[argparse.Namespace], list[Row]],
    *options: tuple[str, dict[str, Any]],
    rounds: int = 40,
) -> None:
    """Read the command line, measure, print rows as a table or (``--json``) as data.

    Args:
      doc: the script's docstring.
      measure: makes the rows.
      *options: further options: a flag and the keywords of `add_argument`.
      rounds: how often each batch of calls is timed, unless the command line says so.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0] if doc else None)
    parser.add_argument("--rounds", type=int, default=rounds, help="how often each batch of calls is timed")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    for flag, keywords in options:
        parser.add_argument(flag, **keywords)
    given = parser.parse_args()
    rows = measure(given)
    if given.json:
        print(json.dumps({**setup(), "rows": [dataclasses.asdict(row) for row in rows]}, indent=1))
    else:
        print(", ".join(f"{key} {value}" for key, value in setup().items()) + "\n")
        print(show(rows))
