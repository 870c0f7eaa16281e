"""What type checkers make of a user's program: mypy --strict and pyright, with JAX's own types.

`tests/typing/program.py` says it all: `assert_type` for what an expression is, and `# E` at the end of each line that has to be
an error. A checker that stops complaining fails the test, as one that starts to. The program also runs: what checks is true.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

pytestmark = pytest.mark.once  # nothing here depends on the version of JAX

ROOT = Path(__file__).parents[2]
HERE = ROOT / "tests" / "typing"
PROGRAM = HERE / "program.py"


def run(*command: str) -> str:
    environment = {**os.environ, "MYPYPATH": str(ROOT / "src"), "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, f"{done.stdout}\n{done.stderr}"  # there are errors, and nothing else went wrong
    return done.stdout


def errors_of_mypy() -> dict[int, str]:
    output = run("mypy", "--config-file", str(HERE / "mypy.ini"), "--no-error-summary", str(PROGRAM))
    found = re.findall(r"^(.*):(\d+): error: (.*)$", output, re.M)
    assert {Path(file).name for file, _, _ in found} == {PROGRAM.name}, output
    return {int(line): message for _, line, message in found}


def errors_of_pyright() -> dict[int, str]:
    output = json.loads(run("pyright", "--pythonpath", sys.executable, "--outputjson", "-p", str(HERE)))
    found = [entry for entry in output["generalDiagnostics"] if entry["severity"] == "error"]
    assert {Path(entry["file"]).name for entry in found} == {PROGRAM.name}, output
    return {entry["range"]["start"]["line"] + 1: entry["message"] for entry in found}


@pytest.mark.parametrize("errors", [errors_of_mypy, errors_of_pyright])
def test_a_checker_finds_the_errors_and_no_others(errors) -> None:
    checker = errors.__name__.removeprefix("errors_of_")
    if importlib.util.find_spec(checker) is None:
        pytest.skip(f"{checker} is not installed")
    lines = PROGRAM.read_text(encoding="utf-8").splitlines()
    expected = {number for number, line in enumerate(lines, 1) if line.endswith("# E")}
    found = errors()
    wrong = [f"line {n}: {lines[n - 1].strip()}\n    {found[n]}" for n in sorted(found.keys() - expected)]
    missed = [f"line {n}: {lines[n - 1].strip()}\n    no error" for n in sorted(expected - found.keys())]
    assert not wrong and not missed, "\n".join([f"{checker}:", *wrong, *missed])


def test_what_checks_runs() -> None:
    program = runpy.run_path(str(PROGRAM))
    net, x = program["Net"](3), jnp.ones(3)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    program["variables"](net, x)
    program["transforms"](net, x, mesh)
    for part in ("gradients", "loops", "states"):
        program[part](net, x)
    assert int(net.calls) > 0
