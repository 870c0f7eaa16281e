"""Places: how messages name the line of a file, and the cell of a notebook."""

from __future__ import annotations

import os
import sys
import types
from typing import Any

import jax.numpy as jnp
import pytest

import mutatis as mu
from mutatis import errors
from mutatis.core.naming import show_cell, show_place

SOURCE = """
class Net(mu.Module):
    def __init__(self):
        self.w = mu.Param(jnp.zeros(2))

net = Net()
def step():
    net.w[0] = jnp.ones((), jnp.int32) * 1.5
"""


def run(file: str) -> dict[str, Any]:
    names: dict[str, Any] = {"mu": mu, "jnp": jnp, "__name__": "notebook"}
    exec(compile(SOURCE, file, "exec"), names)
    return names


@pytest.mark.parametrize(
    ("file", "shown"),
    [
        ("<ipython-input-3-0a1b2c>", "Cell In[3]"),
        ("/tmp/ipython-input-12-345678.py", "Cell In[12]"),
        ("/tmp/ipykernel_123/456.py", "Cell"),
        (r"C:\Temp\ipykernel_123\456.py", "Cell"),
        ("/home/somebody/model.py", None),
        ("<stdin>", None),
    ],
)
def test_cells(file: str, shown: str | None) -> None:
    assert show_cell(file) == shown
    name = shown or os.path.basename(file)
    assert show_place((file, 4, "Net.__init__")) == f"{name}:4 in Net.__init__"
    names = run(file)
    assert names["net"].w.made_at == f"{name}:4 in Net.__init__"


def test_ipython_is_asked_for_the_number(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = types.SimpleNamespace(compile=types.SimpleNamespace(format_code_name=lambda file: ("Cell", "In[7]")))
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    assert show_cell("/tmp/ipykernel_123/456.py") == "Cell In[7]"
    for broken in (None, types.SimpleNamespace(compile=None)):
        monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda broken=broken: broken))
        assert show_cell("/tmp/ipykernel_123/456.py") == "Cell"


def test_errors_name_the_cell() -> None:
    names = run("<ipython-input-3-0a1b2c>")
    with pytest.raises(errors.StateTypeError, match=r"made at:  Cell In\[3\]:4 in Net\.__init__"):
        mu.jit(lambda: names["net"].w.__setitem__(0, jnp.ones((), jnp.complex64)))()
