"""`python -m mutatis checkpoint`: what its commands print, write, and refuse."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import checkpoint
from mutatis.__main__ import main

pytestmark = pytest.mark.once


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = {"net": mu.nn.Linear(2, 3, rngs=mu.Rngs(0)), "rngs": mu.Rngs(1), "n": mu.Variable(3)}
    checkpoint.save(tmp_path / "runs" / "a", model, extra={"epoch": 3})
    model["net"].kernel.value += 1
    model["more"] = mu.Param(jnp.ones(2))
    checkpoint.save(tmp_path / "runs" / "b", model)
    return tmp_path / "runs"


def run(capsys: pytest.CaptureFixture[str], *command: Any) -> tuple[int, str, str]:
    status = main(["checkpoint", *map(str, command)])
    out, err = capsys.readouterr()
    return status, out, err


def test_show_ls_verify(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "show", saved / "a")
    assert status == 0 and "net.kernel" in out and "kept beside: {'epoch': 3}" in out and "float32[2,3]" in out
    status, out, _ = run(capsys, "ls", saved)
    assert status == 0 and [line.split()[:2] for line in out.splitlines()[1:]] == [["a", "4"], ["b", "5"]]
    status, out, _ = run(capsys, "verify", saved / "b")
    assert status == 0 and "whole; 5 states" in out
    file = max((f for f in (saved / "b" / "arrays-1").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])
    status, _, err = run(capsys, "verify", saved / "b")
    assert status == 1 and "damaged" in err
    assert "damaged" in run(capsys, "ls", saved)[1]
    assert run(capsys, "show", saved / "c")[0] == 1
    assert run(capsys, "ls", saved / "a" / "arrays-1" / "nothing")[0] == 1


def test_diff(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "diff", saved / "a", saved / "b")
    lines = {line.split()[0]: line for line in out.splitlines()[1:]}
    assert set(lines) == {"net.kernel", "more"}
    assert f"{np.sqrt(6):.3g}" in lines["net.kernel"] and "only in" in lines["more"]
    assert run(capsys, "diff", saved / "a", saved / "a")[1] == "no difference\n"


@pytest.mark.parametrize("form", ["safetensors", "orbax"])
def test_convert(form: str, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = saved / ("a.safetensors" if form == "safetensors" else "theirs")
    assert run(capsys, "convert", saved / "a", out, "--to", form)[0] == 0
    assert run(capsys, "convert", out, saved / "again")[0] == 0
    state = checkpoint.load(saved / "again")
    assert {path[0] for path in state} >= {"net.kernel", "net.bias", "n", "rngs.streams.default.key"}
    np.testing.assert_array_equal(state["net.kernel"], checkpoint.load(saved / "a")["net"]["kernel"])


def test_as_a_program(saved: Path) -> None:
    command = [sys.executable, "-m", "mutatis", "checkpoint", "show", str(saved / "a")]
    assert "net.kernel" in subprocess.run(command, check=True, capture_output=True, text=True).stdout
    done = subprocess.run([sys.executable, "-m", "mutatis"], check=False, capture_output=True, text=True)
    assert done.returncode == 2 and "checkpoint" in done.stderr
