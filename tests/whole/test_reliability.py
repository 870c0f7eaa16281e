"""The counts of docs/reliability.md: killed savers, damaged files, several savers at once; all of it in `make test-all`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.once
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "reliability.py"


@pytest.mark.parametrize(
    "options",
    [
        ["--kills", "1", "--damages", "8", "--seconds", "0.3"],
        pytest.param(["--write"], marks=pytest.mark.slow),
    ],
)
def test_nothing_is_lost(options: list[str]) -> None:
    strict = ("JAX_NUMPY_DTYPE_PROMOTION", "JAX_NUMPY_RANK_PROMOTION")
    env = {name: value for name, value in os.environ.items() if name not in strict}
    done = subprocess.run([sys.executable, str(SCRIPT), *options], check=False, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "**bad**" not in done.stdout and "SIGKILL, background, one of two processes" in done.stdout
