"""Bars: equal values and derivatives, few calls into Python, whatever the loop and the transform around it."""

from __future__ import annotations

import functools
import io
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis.errors import ArgumentError, MissingPackageError
from mutatis.tracing import progress
from mutatis.tracing.progress import Bar

XS = np.linspace(0.0, 1.0, 1003, dtype=np.float32)
LOOPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "reverse": {"reverse": True},
    "checkpoints": {"checkpoint_every": 10},
    "checkpoints in reverse": {"checkpoint_every": 10, "reverse": True},
}


class Told:
    """What a loop tells of its progress."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def __call__(self, done: int, total: int) -> None:
        self.calls.append((done, total))


def run(start: Any, shown: Any, **options: Any) -> tuple[Any, Any]:
    v = mu.Variable(start)

    def body(x: jax.Array) -> jax.Array:
        v.value = jnp.sin(v.value) * 1.1 + x
        return v.value

    ys = mu.for_loop(body, XS, progress=shown, **options)
    jax.effects_barrier()
    return ys, v.value


@pytest.mark.parametrize("options", LOOPS.values(), ids=LOOPS)
def test_a_bar_changes_no_value_and_no_derivative(options: dict[str, Any]) -> None:
    told = Told()
    for transform in (
        lambda f: f,
        mu.jit,
        lambda f: mu.jit(mu.grad(lambda w: f(w)[0].sum())),
        lambda f: mu.grad(mu.remat(lambda w: f(w)[0].sum())),
        mu.jacfwd,
    ):
        plain = transform(functools.partial(run, shown=None, **options))(jnp.float32(0.3))
        shown = transform(functools.partial(run, shown=told, **options))(jnp.float32(0.3))
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(shown), strict=True):
            np.testing.assert_array_equal(a, b)
        jax.effects_barrier()
        assert told.calls[-1] == (1003, 1003)
        told.calls.clear()


@pytest.mark.once
def test_lanes_share_one_bar() -> None:
    told = Told()
    plain = mu.vmap(functools.partial(run, shown=None))(jnp.arange(3.0))
    shown = mu.vmap(functools.partial(run, shown=told))(jnp.arange(3.0))
    np.testing.assert_allclose(plain[0], shown[0], rtol=1e-6)
    jax.effects_barrier()
    assert told.calls == [(1003, 1003)]


def test_scan_and_the_last_states(recwarn: pytest.WarningsRecorder) -> None:
    told = Told()
    total = mu.Variable(0.0)

    def body(carry: Any, x: Any) -> tuple[Any, Any]:
        total.value += x
        return carry * x, total.value

    results = [mu.scan(body, jnp.float32(2.0), XS, progress=shown) for shown in (None, told)]
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert float(total) == pytest.approx(2 * XS.sum(), rel=1e-5)
    assert told.calls == [(1003, 1003)]


def test_the_clock_paces_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of ten milliseconds, by a clock of ours: an update comes in each quarter of a second, after a first half."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    told = Told()
    bar = Bar(told, None, 100_000, "")
    done, due, run = 0, 0, -1
    calls = 0
    while done < 3000:
        if done >= due:
            due, run = map(int, bar._show(done, (due, run)))
            calls += 1
        done += 1
        now[0] += 0.01
    bar._end((due, run))
    steps = np.diff([number for number, _ in told.calls[:-1]])
    assert set(steps) <= {24, 25, 26}
    assert told.calls[0][0] >= 50
    assert calls <= 3000 / 25 + 3


def test_short_loops_draw_no_bar(capfd: pytest.CaptureFixture[str]) -> None:
    run(jnp.float32(1.0), "short")
    assert capfd.readouterr().err == ""


def test_a_bar_is_drawn(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SHORT", 0.0)
    monkeypatch.setattr(progress, "_FIRST", 10)
    run(jnp.float32(1.0), "epoch 7")
    text = capfd.readouterr().err
    assert re.search(r"epoch 7: 100%.* 1003/1003 .*it/s", text)
    run(jnp.float32(1.0), True)
    assert "run.body: 100%" in capfd.readouterr().err


def test_how_many_looks() -> None:
    """A bar costs one look a block, of which there are few, and the blocks divide the loop where they can."""
    for count in (1, 3, 199, 200, 10_000, 10_007, 1_000_000, 999_983):
        block = Bar(Told(), None, count, "").block()
        assert 1 <= block <= count
        assert count // block <= 200
        if count in (10_000, 1_000_000):
            assert count % block == 0


def test_programs_with_a_bar_compile_once_and_roll_back(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    total = mu.Variable(0.0)

    def fails(done: int, total: int) -> None:
        raise RuntimeError("a fault of the user's")

    def step(x: jax.Array) -> None:
        total.value += x

    monkeypatch.setattr(progress, "_SHORT", 0.0)
    looped = mu.jit(lambda xs: mu.for_loop(step, xs, progress="bar"))
    with looped.expect(compilations=1):
        for _ in range(3):
            looped(XS)
    jax.effects_barrier()
    assert capfd.readouterr().err.count("\n") == 3
    before = float(total)
    with pytest.raises(RuntimeError, match=r"^a fault of the user's$"):
        mu.jit(lambda xs: mu.for_loop(step, xs, progress=fails))(XS)
    assert float(total) == before


class Enough(Exception):
    """What a user raises to stop a loop."""


@pytest.mark.parametrize("when", ["on the way", "at the end"])
@pytest.mark.parametrize("how", ["eager", "jit", "scan", "grad", "vmap"])
def test_a_function_that_raises_stops_the_loop(
    how: str, when: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_SHORT", 0.0)
    monkeypatch.setattr(progress, "_FIRST", 10)
    total, error, others = mu.Variable(0.0), Enough("stop here"), set(progress._runs)

    def tell(done: int, count: int) -> None:
        if (done == count) == (when == "at the end"):
            raise error

    def step(x: jax.Array) -> jax.Array:
        total.value += x
        return total.value

    def loop(xs: Any) -> Any:
        if how == "scan":
            return mu.scan(lambda carry, x: (carry, step(x)), 0, xs, progress=tell)[1]
        return mu.for_loop(step, xs, progress=tell)

    runs = {
        "jit": mu.jit(loop),
        "grad": mu.jit(mu.grad(lambda xs: loop(xs).sum())),
        "vmap": lambda xs: mu.vmap(lambda _, xs: loop(xs)[0], in_axes=(0, None))(jnp.arange(2), xs),
    }
    with pytest.raises(Enough) as caught:
        runs.get(how, loop)(XS)
        jax.effects_barrier()
    assert caught.value is error and float(total) == 0.0 and set(progress._runs) <= others
    mu.for_loop(step, XS)  # nothing is left of it
    assert float(total) > 0.0 and "Traceback" not in capfd.readouterr().err


def test_a_terminal_that_is_gone_stops_the_bar_and_not_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SHORT", 0.0)
    monkeypatch.setattr(progress, "_FIRST", 10)
    wanted, _ = run(jnp.float32(0.3), None)

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError("the terminal is gone")

    closed = io.StringIO()
    closed.close()
    for file in (Gone(), closed):
        monkeypatch.setattr(sys, "stderr", file)
        ys, _ = run(jnp.float32(0.3), "a bar")
        np.testing.assert_array_equal(ys, wanted)


def test_runs_that_never_end_are_forgotten() -> None:
    bar = Bar(Told(), None, 10, "")
    for _ in range(200):
        bar._show(0, (0, -1))
    assert len(progress._runs) <= 65


@pytest.mark.parametrize("given", [3, 1.5, ["epoch"], {}], ids=str)
def test_bad_input(given: Any) -> None:
    with pytest.raises(ArgumentError, match="`progress` cannot be"):
        mu.for_loop(lambda x: x, XS, progress=given)


def test_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, user: str) -> Any:
        raise MissingPackageError("no tqdm", cure="pip install tqdm")

    monkeypatch.setattr(progress, "require", missing)
    with pytest.raises(MissingPackageError):
        mu.for_loop(lambda x: x, XS, progress="bar")
    told = Told()
    mu.for_loop(lambda x: x, XS, progress=told)
    assert told.calls


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_on_several_devices(kind: str) -> None:
    """The branch that makes no call computes nothing, so that it is placed as the call is."""
    axes = (getattr(jax.sharding.AxisType, kind),)
    mesh = jax.make_mesh((len(jax.devices()),), ("d",), axis_types=axes)
    told = Told()
    with jax.set_mesh(mesh):
        split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
        v = mu.Param(jax.device_put(jnp.ones(8 * len(jax.devices())), split))

        def body(x: jax.Array) -> jax.Array:
            v.value = v.value * 1.01 + x
            mu.error_if(v.value > 1e9, "large")
            return v.value.sum()

        mu.jit(lambda v, xs: mu.for_loop(body, xs, progress=told))(v, jnp.zeros(300))
        jax.effects_barrier()
    assert told.calls == [(300, 300)]
    assert v.value.sharding.spec == jax.sharding.PartitionSpec("d")
