"""Where an optional package is missing, the error names it and the extra that installs it."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

import mutatis as mu
from mutatis import _packages, checkpoint, errors

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())


def lack(patch: pytest.MonkeyPatch, package: str) -> None:
    """Let it seem that a package is not installed, and that nothing that needs it was imported."""
    for name in [*sys.modules]:
        if name.partition(".")[0] == package:
            patch.delitem(sys.modules, name)
    patch.setitem(sys.modules, package, None)
    for door in ("linen", "nnx", "equinox", "haiku"):
        patch.delitem(sys.modules, f"mutatis.interop.{door}", raising=False)


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


NEEDS: list[tuple[Callable[[Path], Any], str, str, str]] = [
    (lambda folder: checkpoint.save(folder / "c", mu.Param(1.0)), "orbax", "orbax-checkpoint", "checkpoint"),
    (
        lambda folder: mu.interop.save(folder / "a.safetensors", mu.nn.BatchNorm(2)),
        "safetensors",
        "safetensors",
        "safetensors",
    ),
    (lambda folder: mu.interop.read(written(folder / "a.gguf", b"GGUF")), "gguf", "gguf", "gguf"),
    (lambda folder: mu.export(mu.Module(), path=folder / "a.mu", nodes=()), "flatbuffers", "flatbuffers", "export"),
    (lambda folder: mu.load_program(folder / "a.mu"), "flatbuffers", "flatbuffers", "export"),
    (lambda _: mu.interop.FromLinen, "flax", "flax", "interop"),
    (lambda _: mu.interop.FromNnx, "flax", "flax", "interop"),
    (lambda _: mu.interop.ToEquinox, "equinox", "equinox", "interop"),
    (lambda _: mu.interop.ToHaiku, "haiku", "dm-haiku", "interop"),
]


@pytest.mark.parametrize(("use", "package", "distribution", "extra"), NEEDS, ids=[need[1] for need in NEEDS])
def test_a_missing_package(
    use: Any, package: str, distribution: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lack(monkeypatch, package)
    with pytest.raises(errors.MissingPackageError, match="which is not installed") as caught:
        use(tmp_path)
    error = caught.value
    assert f"the package `{distribution}`" in error.problem
    assert error.cure == f"pip install 'mutatis[{extra}]'  # or alone: pip install {distribution}"
    assert error.path == package
    assert isinstance(error, ImportError)
    assert isinstance(error.__cause__, ModuleNotFoundError)


def test_what_a_package_needs_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rich_like.py").write_text("import surely_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="surely_not_installed") as caught:
        _packages.require("rich_like", "test")
    assert not isinstance(caught.value, errors.MissingPackageError)


def test_a_notebook_shows_tables_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    table = mu.inspect.state_table(mu.Param(jnp.zeros(3)))
    lack(monkeypatch, "rich")
    assert "Param" in table._repr_html_() and "Param" in table.to_html()


def test_extras_have_what_they_are_said_to_have() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for distribution, extra in _packages.DISTRIBUTIONS.values():
        assert distribution in [re.split(r"[<>=!~\[; ]", requirement)[0] for requirement in extras[extra]]
