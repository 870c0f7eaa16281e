"""Tables: what they look like unasked, and in notebooks, with rich and without."""

from __future__ import annotations

import io
import sys
from typing import Any

import jax.numpy as jnp
import pytest
import rich.console

import mutatis as mu
from mutatis.inspect import ledger, placements, state_table, tabulate
from tests.inspect.test_trees import Balanced


class Named(mu.Module):
    """States under names that are HTML, and many of them."""

    def __init__(self, many: int = 3) -> None:
        self.parts = {f"<i>{number}</i>&": mu.Param(jnp.zeros(2)) for number in range(many)}

    def __call__(self, x: Any) -> Any:
        return x * sum(cell.value for cell in self.parts.values())


def tables(net: Named) -> dict[str, Any]:
    return {
        "ledger": ledger(net)(jnp.ones(2)),
        "placements": placements(net),
        "states": state_table(net),
        "calls": tabulate(net, jnp.ones(2)),
        "difference": ledger(net)(jnp.ones(2)).diff(ledger(lambda x: x)(jnp.ones(2))),
    }


@pytest.mark.parametrize("kind", ["ledger", "placements", "states", "calls", "difference"])
def test_a_table_is_of_at_most_a_screen_and_whole_when_printed(kind: str) -> None:
    small, large = tables(Named(3))[kind], tables(Named(300))[kind]
    assert repr(small) == str(small)
    lines = repr(large).splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 120
    assert lines[-1] == str(large).splitlines()[-1][:120], "the sums"
    if len(str(large).splitlines()) > 40:
        assert any(line.startswith("... ") and line.endswith(" more rows") for line in lines)


@pytest.mark.parametrize("kind", ["ledger", "placements", "states", "calls", "difference"])
def test_html_of_tables(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)  # as if it were not installed
    for net, is_open in ((Named(3), True), (Named(300), False)):
        shown = tables(net)[kind]
        page = Balanced(shown._repr_html_())
        assert "i" not in page.tags and "http" not in shown._repr_html_()
        assert page.tags.count("table") == 1 == page.tags.count("details")
        assert (("open", None) in page.attributes) is (is_open or len(shown.cells()) <= 40)
        assert page.tags.count("tr") <= 203
        assert Balanced(shown.to_html()).tags.count("tr") >= len(shown.cells()) + 1
    if kind in ("ledger", "placements", "difference"):
        assert "<i>0</i>&" in page.text


def test_a_notebook_shows_a_table_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = state_table(Named())
    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    assert shown._repr_html_() and not out.getvalue()
    assert not hasattr(shown, "_repr_mimebundle_")
