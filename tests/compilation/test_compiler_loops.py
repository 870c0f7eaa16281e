"""What people do around a jitted step costs no walk, trace, compilation or copy: counted over twenty calls of each pattern.

The patterns are those that `benchmarks/loops.py` measures.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis.compilation import compiler, dispatch, plan
from mutatis.tracing.scope import Scope

FOLDER = Path(__file__).parents[2] / "benchmarks"
CALLS = 20
NAMES = [
    "the bare call",
    "call, then `float(model.loss)`",
    "call, then `model.loss.value`",
    "a dict of two arrays as batch",
    "the model in a captured list",
    "the model in a captured dict",
    "the model in a captured tuple",
    "the model in a captured NamedTuple",
    "Variables in a captured list",
    "the model as attribute of a plain object",
    "the model in `functools.partial`",
    "a bare Variable among the arguments",
    "a step inside `with mu.transaction()`",
    "`with context.set(array)` at each call",
    "`mu.intercept` entered at each call",
    "a step that sows and pops",
    "a step that makes a state and pops it",
    "a step that sows, and `mu.pop` after it",
    "a step that makes a state, and `mu.pop` after it",
    "an unrelated module's number changes",
    "an unrelated state's shape changes",
    "a counter of a named object changes",
    "`mu.state`, dropped again, before each call",
]


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("loops")  # type: ignore[return-value]


def count(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, counts: dict[str, int]) -> None:
    original = getattr(owner, name)
    counts[name] = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        counts[name] += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


def test_every_pattern_is_counted(loops: ModuleType) -> None:
    assert list(loops.PATTERNS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_pattern_costs_nothing_besides(
    name: str, loops: ModuleType, monkeypatch: pytest.MonkeyPatch, traces: Any
) -> None:
    net = loops.dispatch.build(12, mu.Module, mu.Variable)
    ours, _ = loops.PATTERNS[name][0](net, 12)
    for _ in range(4):
        ours()
    counts: dict[str, int] = {}
    count(monkeypatch, Scope, "__init__", counts)
    count(monkeypatch, compiler.Compiler, "_prepare", counts)
    count(monkeypatch, plan, "copy_values", counts)
    monkeypatch.setattr(dispatch, "copy_values", plan.copy_values)
    with traces.compilations() as compiled:
        for _ in range(CALLS):
            ours()
    assert compiled.count == 0
    assert counts["__init__"] == counts["_prepare"] == 0
    assert counts["copy_values"] == 0
    first = np.asarray(loops.dispatch.cells(net.blocks[-1])[-1].value)
    np.testing.assert_allclose(first, jnp.full(8, 12 * 1.0001**24), rtol=1e-4)
