"""Records: what a monitor keeps beside a list in Python; a stream beside the whole loop, in memory and on disk; bad input."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis.errors import (
    ArgumentError,
    CheckError,
    DeferredStateError,
    FilterError,
    LaneError,
    StateTypeError,
    StructureError,
    TraceLevelError,
)

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


V = np.arange(24.0, dtype=np.float32).reshape(4, 6)
INDICES: list[tuple[Any, Any]] = [
    (None, V),
    (2, V[2]),
    (-1, V[-1]),
    (np.int64(2), V[2]),
    (jnp.int32(2), V[2]),
    (slice(1, 3), V[1:3]),
    (slice(np.int64(1), None, 2), V[1::2]),
    (slice(2, 99), V[2:]),
    ([3, 0, 0], V[[3, 0, 0]]),
    ((1, -1), V[[1, -1]]),
    (range(0, 4, 2), V[::2]),
    (np.array([2, 1], np.uint8), V[[2, 1]]),
    (jnp.array([2, 1]), V[[2, 1]]),
    ([True, False, False, True], V[[0, 3]]),
    (np.array([False, True, True, False]), V[1:3]),
    (jnp.array([False] * 4), V[:0]),
    ([], V[:0]),
]


@pytest.mark.parametrize(("index", "wanted"), INDICES, ids=[str(index) for index, _ in INDICES])
def test_a_part_as_numpy_takes_it(index: Any, wanted: Any) -> None:
    v, scalar = mu.Hidden(jnp.asarray(V)), mu.Hidden(jnp.float32(7))
    monitor = mu.recording.Monitor({"v": v, "scalar": scalar}, length=2, index=index)
    mu.jit(lambda monitor: monitor())(monitor)
    v.value = v.value + 1
    monitor()
    np.testing.assert_array_equal(monitor.state["v"], np.stack([wanted, wanted + 1]))
    assert monitor.state["scalar"].tolist() == [7, 7]


@pytest.mark.parametrize(
    ("index", "text"),
    [
        (4, r"(?s)does not fit state `layers\[0\]\.v`.*from -4 to 3.*got: *4\n"),
        (-5, r"(?s)from -4 to 3.*got: *-5\n"),
        ([0, 4, 9], r"(?s)from -4 to 3.*got: *4, 9\n"),
        ([True, False], r"(?s)4 booleans.*got: *2\n"),
        (np.ones(5, bool), r"(?s)4 booleans.*got: *5\n"),
        (1.0, "index=1.0"),
        ([1.0], r"index=\[1.0\]"),
        (np.ones((2, 2), int), r"index=int64\[2,2\]"),
        (True, "index=True"),
        (np.True_, "index="),
        ("all", "index='all'"),
        (..., "index=Ellipsis"),
        (slice(0.0, 2), "index=slice"),
        (slice(0, 2, 0), "index=slice"),
    ],
    ids=str,
)
def test_what_is_no_part(index: Any, text: str) -> None:
    net = Net()
    with pytest.raises(ArgumentError, match=text) as caught:
        mu.recording.Monitor(net, "layers[0].v", length=3, index=index)
    assert caught.value.path in ("index", "layers[0].v")
    mu.recording.Monitor(net, "layers[0].v", length=1000, index=slice(0, 10))  # the cure


def test_a_traced_part() -> None:
    net = Net()
    with pytest.raises(ArgumentError, match="known when the monitor is made"):
        mu.jit(lambda n: mu.recording.Monitor(net, "layers[0].v", length=3, index=n))(jnp.arange(2))


def test_batches() -> None:
    net = Net()
    early = mu.recording.Monitor(net, "layers[0].v", length=3, index=[0, 3])
    whole = mu.recording.Monitor(net, "layers[0].v", length=3)
    mu.reset(net, mu.Hidden, batch_shape=5)
    for monitor in (early, whole):
        for call in (monitor, mu.jit(lambda monitor: monitor())):
            with pytest.raises(StateTypeError, match=r"(?s)`layers\[0\]\.v`.*has changed.*\[4\].*\[5,4\]") as caught:
                call() if call is monitor else call(monitor)
            assert "mu.reset" in str(caught.value) and monitor.count == 0
    late = mu.recording.Monitor(net, "layers[0].v", length=3, index=[4, 1])  # elements of the batch
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    net(jnp.asarray(x))
    late()
    np.testing.assert_array_equal(late.state["layers", 0, "v"][0], net.layers[0].v.value[jnp.array([4, 1])])
    mu.reset(net, mu.Hidden)
    with pytest.raises(StateTypeError, match=r"\[5,4\]"):
        late()
    del net.n
    gone = mu.recording.Monitor(net, length=3)
    del net.rngs
    with pytest.raises(StructureError, match=r"`rngs.*no longer has it"):
        gone()


def lanes(axis: int = 0) -> tuple[Any, Any, list[Any], list[Any]]:
    """Nets with their monitors in lanes, and as a list."""

    def make(start: jax.Array) -> tuple[Any, Any]:
        net = mu.nn.LI(4)
        net.v.value = net.v.value + start
        return net, mu.recording.Monitor(net, "v", length=4, every=2)

    net, monitor = mu.vmap(make, out_axes=0)(jnp.arange(3.0))
    singles = [make(start) for start in jnp.arange(3.0)]
    return net, monitor, [net for net, _ in singles], [monitor for _, monitor in singles]


def test_a_monitor_for_each_lane() -> None:
    net, monitor, nets, monitors = lanes()
    assert monitor.count == 0 and monitor.state["v"].shape == (3, 0, 4)

    def step(net: Any, monitor: Any, x: jax.Array) -> None:
        net(x)
        monitor()

    for x in X[:3]:
        mu.vmap(step, in_axes=(0, 0, None))(net, monitor, x)
        for one, recorder in zip(nets, monitors, strict=True):
            step(one, recorder, jnp.asarray(x))
    assert monitor.count == 2 and monitor.times.tolist() == [0, 2]
    np.testing.assert_allclose(monitor.state["v"], np.stack([m.state["v"] for m in monitors]), rtol=1e-6)
    with pytest.raises(LaneError, match=r"mu\.vmap\(lambda net, monitor: monitor\(\)\)\(net, monitor\)"):
        monitor()
    mu.vmap(lambda net, monitor: monitor())(net, monitor)  # the cure
    assert monitor.calls.value.tolist() == [4, 4, 4]
    mu.reset(monitor)
    assert monitor.calls.value.tolist() == [0, 0, 0] and not monitor.kept["v"].value.any()


def test_a_pickled_record_starts_anew() -> None:
    v = mu.Hidden({"a": jnp.ones(3), "b": (jnp.int32(1),)})
    monitor = mu.recording.Monitor({"v": v}, length=2, index=[0, 2])
    monitor()
    v, monitor = pickle.loads(pickle.dumps((v, monitor)))
    assert monitor.count == 1
    mu.reset(monitor)
    monitor()
    assert monitor.count == 1 and monitor.state["v"]["a"].tolist() == [[1, 1]]


def test_lanes_that_differ() -> None:
    net, monitor, *_ = lanes()
    record = mu.vmap(lambda n, m, now: mu.cond(now, lambda: (n(jnp.ones(4)), m())[1], lambda: None))
    for lane in range(3):
        record(net, monitor, jnp.arange(3) >= lane)
    for read in (lambda: monitor.count, lambda: monitor.times, lambda: monitor.state):
        with pytest.raises(LaneError, match=r"(?s)different numbers of calls.*got: *1, 2, 3 calls"):
            read()
    lane = 2  # the cure
    assert monitor.kept["v"].value[lane].shape == (2, 4) and int(monitor.calls.value[lane]) == 3


def test_a_record_in_a_compiled_function() -> None:
    net = Net()
    monitor = mu.recording.Monitor(net, "layers[0].v", length=3)
    for read in (lambda m: m.count, lambda m: m.times, lambda m: m.state):
        with pytest.raises(TraceLevelError, match="not known while a function is traced"):
            mu.jit(read)(monitor)


@pytest.mark.parametrize("restart", [mu.reset, lambda m: mu.reset(m, mu.MetricState)], ids=["all", "kind"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_record_starts_anew(compiled: bool, restart: Any) -> None:
    net = Net()
    monitor = mu.recording.Monitor(net, mu.Hidden, "n", length=4)
    for x in X[:6]:
        net(x)
        monitor()
    assert monitor.count == 4
    (mu.jit(restart) if compiled else restart)(monitor)
    assert monitor.count == 0 and monitor.times.size == 0
    assert not any(leaf.any() for cell in monitor.kept.values() for leaf in jax.tree.leaves(cell.value))
    net(X[6])
    monitor()
    np.testing.assert_array_equal(monitor.state["n"]["a"], [7])
    np.testing.assert_array_equal(monitor.state["layers", 1, "v"][0], net.layers[1].v.value)
    copied = mu.clone((net, monitor))[1]
    mu.reset(copied)
    assert copied.count == 0 and monitor.count == 1 and mu.graphdef(copied) == mu.graphdef(monitor)
    mu.reset((net, monitor), mu.Hidden)
    assert monitor.count == 1, "a reset of other kinds leaves the record"


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


def test_a_stream_of_no_steps_has_shapes_and_dtypes(tmp_path: Path) -> None:
    total, rngs = mu.Variable(0.0), mu.Rngs(0)

    def step(x: jax.Array) -> Any:
        total.value += x.sum()
        return {"x": x.astype(jnp.int8), "parts": (total.value, rngs(), x.astype(jnp.bfloat16))}

    chunks: list[Any] = []
    for into in (tmp_path / "run", chunks.append):
        mu.recording.stream(step, np.zeros((0, 2), np.float32), into=into, progress="none")
    mu.recording.stream(lambda: jnp.ones((3, 2)), length=0, into=tmp_path / "x.npy")
    found = {path.name: np.load(path) for path in (tmp_path / "run").iterdir()} | {"": np.load(tmp_path / "x.npy")}
    assert {name: (rows.shape, str(rows.dtype)) for name, rows in found.items()} == {
        "x.npy": ((0, 2), "int8"),
        "parts.0.npy": ((0,), "float32"),
        "parts.1.npy": ((0, 2), "uint32"),
        "parts.2.npy": ((0, 2), "float32"),
        "": ((0, 3, 2), "float32"),
    }
    (chunk,) = chunks
    assert chunk["x"].shape == (0, 2) and chunk["x"].dtype == np.int8
    assert float(total) == 0.0 and int(rngs.streams["default"].value["count"]) == 0


@pytest.mark.parametrize(
    "around",
    [mu.jit, jax.jit, mu.vmap, lambda f: lambda x: mu.for_loop(lambda _: f(x), jnp.arange(2)), mu.eval_shape],
    ids=["jit", "jax.jit", "vmap", "for_loop", "eval_shape"],
)
def test_a_stream_while_a_function_is_traced(around: Any, tmp_path: Path) -> None:
    def run(x: jax.Array) -> None:
        mu.recording.stream(lambda x: x * 2, x, into=tmp_path / "x.npy")

    with pytest.raises(
        TraceLevelError, match=r"(?s)cannot be sent while a function is traced.*mu\.for_loop\(step, xs\)"
    ):
        (lambda x: mu.eval_shape(run, x))(ROWS) if around is mu.eval_shape else around(run)(jnp.asarray(ROWS))
    assert not list(tmp_path.iterdir())
    run(jnp.asarray(ROWS))  # the cure
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), ROWS * 2)


def test_a_function_gets_a_chunk_when_the_states_are_those_after_it() -> None:
    total = mu.Variable(0.0)

    def step(x: jax.Array) -> jax.Array:
        total.value += x
        return total.value

    seen: list[tuple[float, float]] = []

    def send(rows: Any) -> None:
        seen.append((rows[-1], float(total)))
        if len(seen) == 3:
            raise KeyError("full")

    with pytest.raises(KeyError):
        mu.recording.stream(step, np.ones(1000, np.float32), into=send, size=100)
    assert seen == [(100.0, 100.0), (200.0, 200.0), (300.0, 300.0)]
    assert float(total) == 300.0


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    total, append = mu.Variable(0.0), mu.recording._Files._append

    def full(self: Any, path: Path, rows: Any) -> None:
        if rows[0] > 200:
            raise OSError("no space left")
        append(self, path, rows)

    def step(x: jax.Array) -> jax.Array:
        total.value += x
        return total.value

    monkeypatch.setattr(mu.recording._Files, "_append", full)
    with pytest.raises(OSError, match="no space"):
        mu.recording.stream(step, np.ones(1000, np.float32), into=tmp_path / "x.npy", size=100)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), np.arange(1.0, 201))
    assert float(total) == 400.0  # two chunks ahead: the one that failed, and the one that was computed meanwhile


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


@pytest.mark.parametrize("results", [lambda x: {"a": {"b": x}, "a.b": x}, lambda x: {"a/b": x, "a_b": x}])
def test_results_whose_files_would_be_one(results: Any, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"(?s)`into` does not fit.*two for a"):
        mu.recording.stream(results, np.arange(5.0), into=tmp_path / "d", size=2)
