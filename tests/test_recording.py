"""Records: what a monitor keeps beside a list in Python; a stream beside the whole loop, in memory and on disk; bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis.errors import ArgumentError, CheckError, DeferredStateError, FilterError

pytestmark = pytest.mark.once


class Net(mu.Module):
    def __init__(self) -> None:
        self.layers = [mu.nn.LI(4), mu.nn.LI(4)]
        self.n = mu.Variable({"a": 0, "b": jnp.zeros(2)})
        self.rngs = mu.Rngs(0)

    def __call__(self, x: jax.Array) -> jax.Array:
        self.n.value = {"a": self.n.value["a"] + 1, "b": self.n.value["b"] + 0.5}
        self.rngs()
        return self.layers[1](self.layers[0](x))


X = np.random.default_rng(0).standard_normal((23, 4)).astype(np.float32)


def by_hand(every: int) -> dict[str, Any]:
    net, found = Net(), []
    for number, x in enumerate(X):
        net(x)
        if number % every == 0:
            found.append(jax.tree.map(np.asarray, {"v": net.layers[0].v.value, "n": net.n.value}))
    return {name: jax.tree.map(lambda *xs: np.stack(xs), *[each[name] for each in found]) for name in ("v", "n")}


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("how", ["python", "for_loop", "jit", "scan", "while"])
def test_what_is_kept(how: str, every: int) -> None:
    net = Net()
    monitor = mu.recording.Monitor(net, "layers[0].v", "n", length=23, every=every)

    def step(x: jax.Array) -> None:
        net(x)
        monitor()

    if how == "python":
        for x in X:
            step(x)
    elif how == "for_loop":
        mu.for_loop(step, X)
    elif how == "scan":
        mu.scan(lambda c, x: (c, step(x)), 0, X)
    elif how == "while":
        mu.while_loop(lambda n: n < 23, lambda n: (step(jnp.asarray(X)[n]), n + 1)[1], 0)
    else:
        mu.jit(lambda: mu.for_loop(step, X))()
    wanted = by_hand(every)
    np.testing.assert_allclose(monitor.state["layers", 0, "v"], wanted["v"], rtol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, monitor.state["n"], wanted["n"])
    assert monitor.times.tolist() == list(range(0, 23, every))


def test_parts_filters_and_more_calls_than_room() -> None:
    net = Net()
    monitor = mu.recording.Monitor(net, mu.Hidden, mu.RngState, length=10, index=[2, 0])
    for x in X:
        net(x)
        monitor()
    assert [*map(str, monitor.state)] == [
        "('layers', 0, 'v')",
        "('layers', 1, 'v')",
        "('rngs', 'streams', 'default')",
    ]
    assert monitor.state["layers", 1, "v"].shape == (10, 2) and monitor.count == 10
    mu.reset(net, mu.Hidden)
    one = mu.recording.Monitor(net, "layers[1]", length=3, index=0)
    one()
    assert one.state["layers", 1, "v"].shape == (1,)


def test_it_costs_one_write_and_its_record(traces: Any) -> None:
    def temporary(length: int) -> Any:
        net = Net()
        monitor = mu.recording.Monitor(net, "layers[0].v", length=8, every=max(1, length // 8))
        run = mu.jit(lambda net, monitor: mu.for_loop(lambda x: (net(jnp.full(4, x)), monitor())[1], jnp.ones(length)))
        return run.lower(net, monitor).compile().memory_analysis().temp_size_in_bytes

    assert temporary(10_000) <= temporary(80) + 40_000, "the numbers that the loop goes over, and no more"


def test_bad_input() -> None:
    net = Net()
    lazy = mu.Module()
    lazy.w = mu.Param(init=lambda: jnp.zeros(2))
    for use, error, text in [
        (lambda: mu.recording.Monitor(net, "layer[0].v", length=3), FilterError, r"nearest: layers\[0\]\.v"),
        (lambda: mu.recording.Monitor(net, mu.Cache, length=3), FilterError, "no state for"),
        (lambda: mu.recording.Monitor(net, length=0), ArgumentError, "length=0"),
        (lambda: mu.recording.Monitor(net, length=3, every=1.5), ArgumentError, "every=1.5"),
        (lambda: mu.recording.Monitor(lazy, length=3), DeferredStateError, "no value yet"),
    ]:
        with pytest.raises(error, match=text):
            use()


def counted() -> tuple[mu.Variable[Any], Any]:
    total = mu.Variable(0.0)

    def step(x: jax.Array) -> Any:
        total.value += x.sum()
        return {"total": total.value, "parts": (x * 2, total.value > 10)}

    return total, step


ROWS = np.random.default_rng(1).standard_normal((230, 4)).astype(np.float32)


@pytest.mark.parametrize("size", [1, 50, 229, 230, 1000])
def test_a_stream_is_the_loop(size: int, tmp_path: Path) -> None:
    total, step = counted()
    whole = mu.for_loop(step, ROWS)
    other, step = counted()
    mu.recording.stream(step, ROWS, into=tmp_path / "run", size=size)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["parts.0.npy", "parts.1.npy", "total.npy"]
    np.testing.assert_array_equal(np.load(tmp_path / "run" / "total.npy"), whole["total"])
    for number, part in enumerate(whole["parts"]):
        np.testing.assert_array_equal(np.load(tmp_path / "run" / f"parts.{number}.npy", mmap_mode="r"), part)
    assert float(total) == float(other)


def test_a_stream_to_a_function_and_one_file(tmp_path: Path) -> None:
    chunks: list[Any] = []
    _, step = counted()
    mu.recording.stream(step, ROWS, into=chunks.append, size=100)
    assert [chunk["total"].shape for chunk in chunks] == [(100,), (100,), (30,)]
    assert type(chunks[0]["total"]) is np.ndarray
    mu.recording.stream(lambda x: x.T, ROWS.reshape(23, 5, 2, 4), into=str(tmp_path / "x.npy"), size=10)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), ROWS.reshape(23, 5, 2, 4).transpose(0, 3, 2, 1))


def test_a_stream_compiles_once_for_each_length() -> None:
    total = mu.Variable(0.0)
    traces: set[int] = set()

    def step(x: jax.Array) -> jax.Array:
        traces.add(id(x))  # of another tracer at each trace
        total.value += x
        return total.value

    counts: list[int] = []
    mu.recording.stream(step, np.ones(2500, np.float32), into=lambda rows: counts.append(len(rows)), size=500)
    assert counts == [500] * 5
    assert float(total) == 2500.0
    assert len(traces) == 1


def test_what_was_whole_before_a_failure_is_on_disk(tmp_path: Path) -> None:
    total = mu.Variable(0.0)

    def step(x: jax.Array) -> jax.Array:
        total.value += x
        mu.error_if(total.value > 250, "too much")
        return total.value

    with pytest.raises(CheckError):
        mu.recording.stream(step, np.ones(1000, np.float32), into=tmp_path / "x.npy", size=100)
    rows = np.load(tmp_path / "x.npy")
    assert len(rows) in (100, 200)
    np.testing.assert_array_equal(rows, np.arange(1.0, len(rows) + 1))
    assert float(total) == 200.0


def test_streams_of_keys_and_of_bfloat16(tmp_path: Path) -> None:
    rngs = mu.Rngs(0)
    mu.recording.stream(lambda: (rngs(), jnp.bfloat16(1.5)), length=5, into=tmp_path, size=2)
    assert np.load(tmp_path / "0.npy").dtype == np.uint32
    assert np.load(tmp_path / "1.npy").tolist() == [1.5] * 5


def test_a_stream_of_no_steps(tmp_path: Path) -> None:
    mu.recording.stream(lambda x: x, np.zeros((0, 2)), into=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"into": 3}, "`into`"),
        ({"size": 0}, "`size`"),
        ({"size": 2.0}, "`size`"),
        ({"length": 7}, "`length`"),
        ({"xs": (np.float32(3),)}, "`length`"),
        ({"xs": (), "length": None}, "`length`"),
        ({"xs": (Net(),)}, "`xs`"),
        ({"into": "several.npy", "f": lambda x: (x, x)}, "`into`"),
    ],
    ids=range(8),
)
def test_bad_input_of_a_stream(more: dict[str, Any], problem: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"f": lambda x: x, "xs": (np.ones(5, np.float32),), "into": "x.npy", **more}
    with pytest.raises(ArgumentError, match=f"{problem} does not fit a loop in chunks"):
        mu.recording.stream(given.pop("f"), *given.pop("xs"), **given)


def test_a_stream_holds_every_step_that_the_states_hold(tmp_path: Path) -> None:
    total = mu.Variable(0.0)

    def step(x: jax.Array) -> jax.Array:
        total.value += 1
        mu.error_if(x < 0, "bad")
        return total.value

    with pytest.raises(mu.errors.CheckError):
        mu.recording.stream(step, jnp.ones(12).at[10].set(-1.0), into=tmp_path / "q.npy", size=4)
    assert float(total) == 8.0
    assert np.load(tmp_path / "q.npy").tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
