"""The cost of ``import mutatis`` on top of ``import jax``: seconds and modules, in fresh processes.

Python keeps the bytecode of the modules, as it does for users; the first process, which writes it, does not count.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile

import timing

SCRIPT = """
import sys, time, jax
before, began = len(sys.modules), time.perf_counter()
import mutatis
print(time.perf_counter() - began, len(sys.modules) - before)
"""


def measure(options: argparse.Namespace) -> list[timing.Row]:
    """Import in one process after the other."""
    seconds, modules = [], 0.0
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryDirectory() as folder:
        environment["PYTHONPYCACHEPREFIX"] = folder
        for _ in range(max(1, options.rounds // 4) + 1):
            command = [sys.executable, "-c", SCRIPT]
            out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
            seconds.append(float(out[0]))
            modules = float(out[1])
    return [
        timing.Row("import mutatis", "import jax", statistics.median(seconds[1:]), 0.15, unit="s"),
        timing.Row("import mutatis", "import jax", modules, 60, unit="modules"),
    ]


if __name__ == "__main__":
    timing.main(__doc__, measure)
