"""The garbage collector waits while a model's states are gone through, and is then as it was."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import pytest

import mutatis as mu
from mutatis.core.collection import uncollected

OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "state": mu.state,
    "split": mu.split,
    "merge": lambda node: mu.merge(*mu.split(node)),
    "clone": mu.clone,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_nothing_is_collected_meanwhile(name: str) -> None:
    one = jnp.ones(2)
    node = {"cells": [mu.Param(one) for _ in range(5000)]}
    seen: list[str] = []

    def note(phase: str, _: Any) -> None:
        seen.append(phase)

    gc.collect()
    gc.callbacks.append(note)
    try:
        OPERATIONS[name](node)
    finally:
        gc.callbacks.remove(note)
    # Two a collection: at most one in between the parts of it, or at its end; 5000 objects or more would be several.
    assert len(seen) <= 4


@pytest.mark.parametrize("enabled", [True, False])
def test_it_is_as_it_was(enabled: bool) -> None:
    @uncollected
    def look(fails: bool) -> bool:
        if fails:
            raise ValueError
        return gc.isenabled()

    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        assert not look(False)
        assert gc.isenabled() == enabled
        with pytest.raises(ValueError):
            look(True)
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
