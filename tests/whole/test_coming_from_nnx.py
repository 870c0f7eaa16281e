"""The table in docs/coming_from/nnx.md has every public name of `flax.nnx`, and what it names here exists."""

from __future__ import annotations

import functools
import importlib.metadata
import re
from pathlib import Path

import jax
import jax.experimental.checkify
import pytest

import mutatis as mu

pytestmark = pytest.mark.once

PAGE = Path(__file__).parents[2] / "docs" / "coming_from" / "nnx.md"
ROWS = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", PAGE.read_text().partition("## Every name")[2], re.M))


def test_every_name_has_a_row() -> None:
    nnx = pytest.importorskip("flax.nnx")
    names = {name for name in dir(nnx) if not name.startswith("_")}
    assert names <= set(ROWS), f"without a row: {sorted(names - set(ROWS))}"
    if importlib.metadata.version("flax") == "0.12.12":  # the release that the table was written for
        assert names == set(ROWS) and len(names) == 238


def test_rows_are_in_order_and_say_something() -> None:
    assert list(ROWS) == sorted(ROWS, key=str.lower)
    assert [name for name, ours in ROWS.items() if "`" not in ours and not ours.startswith(("none", "a plain"))] == []


@pytest.mark.parametrize(
    "ours", sorted({name for row in ROWS.values() for name in re.findall(r"`((?:mu|jax)\.[\w.]+)`", row)})
)
def test_what_is_named_here_exists(ours: str) -> None:
    if ours.startswith("mu.interop."):
        pytest.importorskip("flax")  # doors to what is not installed are left out
    root, path = ours.split(".", 1)
    assert functools.reduce(getattr, path.split("."), {"mu": mu, "jax": jax}[root]) is not None
