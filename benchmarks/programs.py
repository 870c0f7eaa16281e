"""What becomes of a train step: how long JAX takes to trace and lower it, and which program comes out.

The step of each model is written with Mutatis and by hand (`models`), the latter under `jax.jit` with its state donated. Both
start from the same numbers, and the losses and parameters of two steps are compared before anything is reported. Every
figure is the ratio of Mutatis to that.

- Tracing and lowering: of a new function in each round, so that no cache knows it; with what JAX keeps of the functions
  in its library (`jax.numpy`, ...), as for another model in the same process, and without it, as for the first model.
- The compiled program: its operations, and the operations before XLA's optimizations; XLA's own count of arithmetic and of
  memory traffic; and the memory that a call takes: arguments, results and temporary buffers, without those that share
  memory with an argument.
"""

from __future__ import annotations

import argparse
import gc
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from models import Task, convnet, optimizer, stateful_step, threaded_state, threaded_step
from models import transformer as decoder
from timing import Row, main, ratio

import mutatis as mu

OURS, HAND = "mu.jit", "jax.jit by hand, donated"
TOLERANCE = 1e-5  # relative, where the results of two steps are not the same bits


class Pair:
    """Both forms of a task, with their states.

    Args:
      task: what is trained.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.batch = task.batch()
        self.net = task.build()
        self.optimizer = mu.Optimizer(self.net, optimizer())
        self.state = threaded_state(self.net)

    def lower(self, name: str) -> Any:
        """Trace and lower a new function. `mu.jit` lowers the program that donates the states it writes."""
        if name == OURS:
            return mu.jit(stateful_step(self.task)).lower(self.net, self.optimizer, *self.batch)
        return jax.jit(threaded_step(self.task), donate_argnums=0).lower(self.state, *self.batch)

    def run(self, compiled: dict[str, Any], steps: int = 2) -> bool:
        """Train both; whether they come to the same bits. Exits if they do not come to the same."""
        losses: dict[str, list[Any]] = {OURS: [], HAND: []}
        for _ in range(steps):
            losses[OURS].append(compiled[OURS](self.net, self.optimizer, *self.batch))
            self.state, loss = compiled[HAND](self.state, *self.batch)
            losses[HAND].append(loss)
        params, stats, _, _ = self.state
        present = mu.state(self.net)
        ours = losses[OURS], present.filter(mu.Param).to_pure_dict(), present.filter(mu.BatchStat).to_pure_dict()
        pairs = [
            (np.asarray(a), np.asarray(b))
            for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves((losses[HAND], params, stats)), strict=True)
        ]
        # Adam divides by the size of a gradient, so a parameter can be off by a part of the learning rate.
        if not all(np.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE) for a, b in pairs):
            sys.exit(f"{self.task.name}: the step with Mutatis did not compute what the one by hand did")
        return all(map(np.array_equal, *zip(*pairs, strict=True)))


# -- tracing and lowering -------------------------------------------------------------------------------------------


def tracing(pair: Pair, rounds: int, *, cold: bool) -> dict[str, list[float]]:
    """Seconds to trace and lower each form, by round; the first does not count.

    It is the processor time of this thread, which does all of it, with garbage collection off, as in `timeit`: a full
    collection takes a good part of what is measured, and comes when it comes.

    Args:
      pair: both forms.
      rounds: how often.
      cold: whether JAX forgets before each what it keeps of any function.
    """
    times: dict[str, list[float]] = {OURS: [], HAND: []}
    for number in range(rounds + 1):
        for name in (OURS, HAND) if number % 2 else (HAND, OURS):
            if cold:
                jax.clear_caches()
            gc.collect()
            gc.disable()
            begin = time.thread_time()
            lowered = pair.lower(name)
            times[name].append(time.thread_time() - begin)
            gc.enable()
            del lowered
    return {name: seconds[1:] for name, seconds in times.items()}


def tracing_rows(pair: Pair, rounds: int) -> list[Row]:
    """How long tracing and lowering take."""
    rows = []
    for what, cold in (("tracing and lowering, another model", False), ("tracing and lowering, the first", True)):
        times = tracing(pair, rounds, cold=cold)
        middle = {name: statistics.median(seconds) for name, seconds in times.items()}
        note = f"{middle[OURS]:.2f} s to {middle[HAND]:.2f} s"
        rows.append(Row(f"{pair.task.name}: {what}", HAND, ratio(times, OURS, HAND), goal=1.05, note=note))
    return rows


# -- the compiled program -------------------------------------------------------------------------------------------

_HLO = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = .*? ([a-z][a-z0-9\-]*)\(", re.MULTILINE)
_STABLEHLO = re.compile(r"^\s*(?:%[\w:, %]+ = )?\"?(call|(?:stablehlo|chlo|sdy)\.\w+)", re.MULTILINE)


def operations(hlo: str) -> Counter[str]:
    """How many operations of each kind there are in the text of an HLO module, those inside fusions too."""
    return Counter(_HLO.findall(hlo))


def lowered_operations(text: str) -> Counter[str]:
    """How many operations of each kind there are in the text of a StableHLO module."""
    return Counter(kind for kind in _STABLEHLO.findall(text) if kind != "stablehlo.return")


def differing(ours: Counter[str], hand: Counter[str]) -> str:
    """The kinds of which there are not equally many, with both numbers."""
    kinds = [f"{kind} {ours[kind]} to {hand[kind]}" for kind in sorted(ours | hand) if ours[kind] != hand[kind]]
    return ", ".join(kinds) or "every kind alike"


def peak(compiled: Any) -> dict[str, int]:
    """Bytes that a call takes, by what they are for."""
    memory = compiled.memory_analysis()
    return {
        "arguments": memory.argument_size_in_bytes,
        "results": memory.output_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "shared": -memory.alias_size_in_bytes,
    }


def program_rows(pair: Pair) -> list[Row]:
    """What the compiled programs consist of and take, once they are known to do the same."""
    lowered = {name: pair.lower(name) for name in (OURS, HAND)}
    compiled = {name: each.compile() for name, each in lowered.items()}
    same = "the same bits after two steps" if pair.run(compiled) else "the same after two steps, but for rounding"

    def compare(what: str, ours: float, hand: float, note: str, goal: float | None = 1.0) -> Row:
        return Row(f"{pair.task.name}: {what}", HAND, ours / hand, goal=goal, note=note)

    def count_of(what: str) -> Row:
        # XLA adds up in single precision, in the order of the operations: the last digits mean nothing.
        ours, hand = (costs[name][what] for name in (OURS, HAND))
        return compare(what, round(ours / hand, 5), 1, f"{ours:.4g} to {hand:.4g}")

    before = {name: lowered_operations(each.as_text()) for name, each in lowered.items()}
    after = {name: operations(each.as_text()) for name, each in compiled.items()}
    costs = {name: each.cost_analysis() for name, each in compiled.items()}
    parts = {name: peak(each) for name, each in compiled.items()}
    memory = {name: sum(bytes_.values()) for name, bytes_ in parts.items()}
    count = {name: counts.total() for name, counts in after.items()}
    early = {name: counts.total() for name, counts in before.items()}
    split = ", ".join(f"{part} {size - parts[HAND][part]:+d}" for part, size in parts[OURS].items())
    return [
        compare(
            "operations", count[OURS], count[HAND], f"{count[OURS]}; {differing(after[OURS], after[HAND])}; {same}"
        ),
        compare("operations before XLA", early[OURS], early[HAND], differing(before[OURS], before[HAND]), goal=None),
        count_of("flops"),
        count_of("bytes accessed"),
        compare("peak memory", memory[OURS], memory[HAND], f"{memory[OURS]} bytes; {split}"),
    ]


MODELS: dict[str, Callable[[], Task]] = {"transformer": decoder, "convnet": convnet}


def measure(given: argparse.Namespace) -> list[Row]:
    """All rows."""
    rows = []
    for name in given.models.split(","):
        pair = Pair(MODELS[name]())
        rows += tracing_rows(pair, given.rounds)
        rows += program_rows(pair)
    return rows


if __name__ == "__main__":
    main(__doc__, measure, ("--models", {"default": ",".join(MODELS), "help": "which: transformer,convnet"}), rounds=8)
