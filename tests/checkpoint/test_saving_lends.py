"""A save borrows the arrays of the states: no step copies them after it, and nothing that others hold is deleted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import checkpoint
from mutatis.checkpoint import saving
from mutatis.compilation import dispatch, plan


class Net(mu.Module):
    def __init__(self) -> None:
        self.states = [mu.Variable(jnp.full(8, 1.0 + i)) for i in range(4)]


@mu.jit
def step(net: Net) -> None:
    for state in net.states:
        state.value = state.value * 2


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many arrays were copied, for each step that copied some."""
    counts: list[int] = []

    def counted(values: Any) -> Any:
        counts.append(len(values))
        return plan.copy_values(values)

    monkeypatch.setattr(dispatch, "copy_values", counted)
    return counts


def test_a_step_after_a_save_copies_nothing(copied: list[int], tmp_path: Path) -> None:
    net = Net()
    for _ in range(2):
        step(net)
    copied.clear()
    for number in range(3):
        checkpoint.save(tmp_path / str(number), net)
        step(net)
    assert copied == []
    other = Net()
    checkpoint.restore(tmp_path / "2", other)
    np.testing.assert_array_equal(other.states[1].value, jnp.full(8, 2.0 * 2**4))


def test_what_is_held_besides_is_copied(copied: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the save, while it goes on, and after it."""
    net = Net()
    for _ in range(2):
        step(net)
    copied.clear()
    held = [net.states[0].value]
    write = saving.write

    def meanwhile(*args: Any) -> None:
        write(*args)
        held.append(net.states[1].value)
        step(net)  # all four: they are lent
        held.append(net.states[2].value)

    monkeypatch.setattr(saving, "write", meanwhile)
    checkpoint.save(tmp_path / "a", net)
    assert copied == [4]
    held.append(net.states[3].value)
    step(net)
    assert copied == [4, 2]
    assert [float(array[0]) for array in held] == [4.0, 8.0, 24.0, 32.0]


def test_two_saves_at_once(copied: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that ends first does not end the other's loan."""
    net = Net()
    for _ in range(2):
        step(net)
    copied.clear()
    write, inner = saving.write, []

    def meanwhile(path: str, *args: Any) -> None:
        if not inner:
            inner.append(path)
            checkpoint.save(tmp_path / "b", net)
            step(net)
        write(path, *args)

    monkeypatch.setattr(saving, "write", meanwhile)
    checkpoint.save(tmp_path / "a", net)
    assert copied == [4]
    for name in ("a", "b"):
        other = Net()
        checkpoint.restore(tmp_path / name, other)
        np.testing.assert_array_equal(other.states[0].value, jnp.full(8, 4.0))


def test_a_save_that_fails_gives_back(copied: list[int], tmp_path: Path) -> None:
    net = Net()
    for _ in range(2):
        step(net)
    copied.clear()
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(mu.errors.CheckpointError):
        checkpoint.save(tmp_path / "file", net)
    step(net)
    assert copied == []
