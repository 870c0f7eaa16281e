"""Saving and restoring beside Orbax, the same arrays in one process: time, memory, and how long the program waits.

Contenders take turns, a figure is the median over the rounds of the ratio within a round. *Memory* is what the process holds at
most beyond what it held before, as a share of the data; each is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import timing

import mutatis as mu

ARRAYS = 64


def arrays(megabytes: int) -> dict[str, jax.Array]:
    """Random numbers, in arrays of one size."""
    size = megabytes * 250_000 // ARRAYS
    return {f"w{n}": jax.random.normal(jax.random.key(n), (size,)) for n in range(ARRAYS)}


def model(values: dict[str, jax.Array]) -> dict[str, mu.Param[jax.Array]]:
    """The same as parameters."""
    return {name: mu.Param(value) for name, value in values.items()}


def save_ours(folder: Path, states: Any) -> None:
    """By `mu.checkpoint`."""
    mu.checkpoint.save(folder / "ours", states)


def save_orbax(folder: Path, states: Any) -> None:
    """By Orbax."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = {name: state.value for name, state in states.items()}
        checkpointer.save(folder / "orbax", args=ocp.args.PyTreeSave(tree), force=True)


def restore_ours(folder: Path, states: Any) -> None:
    """By `mu.checkpoint`."""
    mu.checkpoint.restore(folder / "ours", states)


def restore_orbax(folder: Path, states: Any) -> None:
    """By Orbax, into arrays that are like those that there are."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = {name: state.value for name, state in states.items()}
        how = ocp.checkpoint_utils.construct_restore_args(tree)
        jax.block_until_ready(
            checkpointer.restore(folder / "orbax", args=ocp.args.PyTreeRestore(tree, restore_args=how))
        )


def clock(run: Callable[[], Any]) -> float:
    """Seconds."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def pauses(folder: Path, states: Any) -> tuple[float, float]:
    """How long a save in the background has the program wait: ours, and Orbax's."""
    with mu.checkpoint.Manager(folder / "managed", keep=1) as manager:
        ours = clock(lambda: manager.save(1, states))
    with ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = {name: state.value for name, state in states.items()}
        theirs = clock(lambda: checkpointer.save(folder / "async", args=ocp.args.PyTreeSave(tree), force=True))
        checkpointer.wait_until_finished()
    shutil.rmtree(folder / "managed")
    return ours, theirs


def memory(what: str, folder: str, megabytes: int) -> float:
    """The most that one thing holds beyond the data, as a share of them, in this process; only Linux tells."""
    states = model(arrays(megabytes))
    jax.block_until_ready([state.value for state in states.values()])
    Path("/proc/self/clear_refs").write_text("5")  # from now on the peak is measured anew
    before = peak()
    globals()[what](Path(folder), states)
    return (peak() - before) / (megabytes * 1000)


def peak() -> int:
    """The most memory that this process has held, in kilobytes."""
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("VmHWM")).split()[1])


def measure(options: argparse.Namespace) -> list[timing.Row]:
    """The rows."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    states = model(arrays(options.megabytes))
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        times: dict[str, list[float]] = {}
        waits = []
        pairs = [("save", save_ours, save_orbax), ("restore", restore_ours, restore_orbax)]
        for number in range(options.rounds + 1):
            for what, ours, theirs in pairs:
                turns = [("ours", ours), ("orbax", theirs)][:: 1 if number % 2 else -1]
                for who, run in turns:
                    took = clock(lambda run=run: run(folder, states))
                    if number:
                        times.setdefault(f"{what} {who}", []).append(took)
            if number:
                waits.append(pauses(folder, states))
        for what, goal in (("save", 1.1), ("restore", 1.1)):
            rows.append(timing.Row(what, "Orbax", timing.ratio(times, f"{what} ours", f"{what} orbax"), goal))
            rows[-1].note = f"{statistics.median(times[f'{what} ours']):.2f} s"
        plain = timing.ratio({"ours": [a for a, _ in waits], "orbax": [b for _, b in waits]}, "ours", "orbax")
        rows.append(timing.Row("the program waits for a save in the background", "Orbax", plain, 1.0))
        rows[
            -1
        ].note = f"{statistics.median(a for a, _ in waits):.3f} s to {statistics.median(b for _, b in waits):.3f} s"
        for what in ("save", "restore"):
            shares = {}
            for who in ("ours", "orbax"):
                command = [sys.executable, __file__, "--memory", f"{what}_{who}", "--folder", name]
                command += ["--megabytes", str(options.megabytes)]
                shares[who] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            rows.append(
                timing.Row(f"{what}: memory beyond the data", "Orbax", shares["ours"] / max(shares["orbax"], 0.01), 1.1)
            )
            rows[-1].note = f"{shares['ours']:.2f} to {shares['orbax']:.2f} of the data"
    return rows


if __name__ == "__main__":
    if "--memory" in sys.argv:
        parser = argparse.ArgumentParser()
        for name in ("--memory", "--folder", "--megabytes"):
            parser.add_argument(name)
        given = parser.parse_args()
        print(memory(given.memory, given.folder, int(given.megabytes)))
    else:
        timing.main(__doc__, measure, ("--megabytes", {"type": int, "default": 1000, "help": "of data"}))
