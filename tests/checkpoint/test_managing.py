"""`Manager`: which checkpoints stay, saves in the background and their failures, one job for a directory, what is restored."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import checkpoint
from mutatis.checkpoint import Manager, arrays, managing
from mutatis.compilation import dispatch
from mutatis.errors import ArgumentError, CheckpointError

pytestmark = pytest.mark.once


@pytest.fixture
def model() -> dict[str, Any]:
    return {"w": mu.Param(jnp.zeros(1000)), "n": mu.Variable(0), "rngs": mu.Rngs(0)}


def go_on(model: dict[str, Any]) -> int:
    model["n"].value += 1
    model["w"].value += 1
    return int(model["n"])


@pytest.mark.parametrize("background", [False, True])
def test_which_stay(background: bool, tmp_path: Path, model: dict[str, Any]) -> None:
    options: dict[str, Any] = {"every": 2, "keep": 2, "keep_best": ("loss", min), "keep_every": 10}
    with Manager(tmp_path / "run", background=background, **options) as manager:
        for step in range(1, 31):
            go_on(model)
            saved = manager.save(step, model, metrics={"loss": jnp.float32(abs(step - 7.6)), "n": step})
            assert saved == (step % 2 == 0)
        assert manager.save(31, model, metrics={"loss": 9}, force=True)
    assert manager.steps == [8, 10, 20, 30, 31] and manager.latest == 31 and manager.best == 8
    other = {"w": mu.Param(jnp.zeros(1000)), "n": mu.Variable(0), "rngs": mu.Rngs(1)}
    restored = Manager(tmp_path / "run").restore(other)
    assert restored is not None and restored.step == 31 and restored.metrics == {"loss": 9.0}
    assert int(other["n"]) == 30
    assert Manager(tmp_path / "run").restore(other, step=8).metrics["n"] == 8
    assert float(other["w"].value[0]) == 8
    assert not [name for name in os.listdir(tmp_path / "run") if name.startswith(".")]


def test_nothing_yet(tmp_path: Path, model: dict[str, Any]) -> None:
    manager = Manager(tmp_path / "run")
    assert manager.restore(model) is None and manager.steps == [] and manager.latest is None and manager.best is None
    with pytest.raises(CheckpointError, match="there is nothing at"):
        manager.restore(model, step=3)


def test_the_program_goes_on_meanwhile(tmp_path: Path, model: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    go, written = threading.Event(), managing.write

    def slowly(*args: Any) -> None:
        assert go.wait(60)
        written(*args)

    copies: list[int] = []
    copy = dispatch.copy_values
    monkeypatch.setattr(dispatch, "copy_values", lambda values: (copies.append(len(values)), copy(values))[1])
    monkeypatch.setattr(managing, "write", slowly)
    step = mu.jit(lambda w: w.set(w.value + 1))
    for _ in range(2):
        step(model["w"])
    copies.clear()
    with Manager(tmp_path / "run") as manager:
        manager.save(1, model)
        for _ in range(3):
            step(model["w"])
        assert manager.steps == [] and copies == [], "the step after copies nothing"
        go.set()
    manager.restore(model)
    assert float(model["w"].value[0]) == 2


def test_a_failure_in_the_background_is_seen(
    tmp_path: Path, model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, written = Manager(tmp_path / "run"), managing.write
    manager.save(1, model)
    manager.wait()

    def fails(*args: Any) -> None:
        raise OSError("disk on fire")

    monkeypatch.setattr(managing, "write", fails)
    manager.save(2, model)
    monkeypatch.setattr(managing, "write", written)
    with pytest.raises(CheckpointError, match=r"(?s)could not be saved in the background.*disk on fire"):
        manager.save(3, model)
    manager.save(3, model)
    manager.wait()
    assert manager.steps == [1, 3]
    monkeypatch.setattr(managing, "write", fails)
    manager.save(4, model)
    with pytest.raises(CheckpointError, match="disk on fire"):
        manager.close()

    def interrupted() -> None:
        with Manager(tmp_path / "a") as manager:
            manager.save(1, model)
            raise ZeroDivisionError

    with pytest.warns(UserWarning, match="disk on fire"), pytest.raises(ZeroDivisionError):
        interrupted()


def test_damaged_ones_are_skipped(tmp_path: Path, model: dict[str, Any]) -> None:
    with Manager(tmp_path / "run", keep=None) as manager:
        for _ in range(4):
            manager.save(go_on(model), model, extra={"n": int(model["n"])})
    (tmp_path / "run" / "step_000000004" / "mutatis.json").write_text("{}")
    for file in (tmp_path / "run" / "step_000000003").rglob("*"):
        if file.is_file() and file.name != "mutatis.json":
            file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="step [34] was skipped") as caught:
        restored = manager.restore(model)
    assert restored is not None and (restored.step, restored.extra) == (2, {"n": 2}) and len(caught) == 2
    with pytest.raises(CheckpointError, match="damaged"):
        manager.restore(model, step=3)
    for step in (1, 2):
        (tmp_path / "run" / f"step_00000000{step}" / "mutatis.json").unlink()
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoint in .* is whole.*step 3: "):
        manager.restore(model)
    with Manager(tmp_path / "b") as manager:
        manager.save(1, model)
    with pytest.raises(CheckpointError, match="does not fit"):
        manager.restore({"w": mu.Param(jnp.zeros(3))})


def test_one_job_for_a_directory(tmp_path: Path, model: dict[str, Any]) -> None:
    with Manager(tmp_path / "run") as first:
        first.save(1, model)
        with pytest.raises(CheckpointError, match=rf"(?s)another job saves into .*process {os.getpid()} on "):
            Manager(tmp_path / "run").save(2, model)
        first.wait()
        assert Manager(tmp_path / "run").restore(model) is not None
    with Manager(tmp_path / "run") as second:
        second.save(3, model)
    assert second.steps == [1, 3]


class Batches:
    def __init__(self, kind: str) -> None:
        self.at, self.kind = 0, kind

    def get_state(self) -> Any:
        return str(self.at).encode() if self.kind == "bytes" else {"at": self.at}

    def set_state(self, state: Any) -> None:
        self.at = int(state) if self.kind == "bytes" else state["at"]


class Loader:
    def __init__(self) -> None:
        self.at = 0

    def state_dict(self) -> Any:
        return {"at": self.at}

    def load_state_dict(self, state: Any) -> None:
        self.at = state["at"]


@pytest.mark.parametrize("make", [lambda: Batches("bytes"), lambda: Batches("json"), Loader])
def test_the_position_of_the_data(make: Any, tmp_path: Path, model: dict[str, Any]) -> None:
    batches, other = make(), make()
    batches.at = 17
    with Manager(tmp_path / "run") as manager:
        manager.save(1, model, iterator=batches)
    batches.at = 20
    manager.restore(model, iterator=other)
    assert other.at == 17
    with pytest.raises(ArgumentError, match="position of an iterator"):
        manager.save(2, model, iterator=iter([1]))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"every": 0}, "`every` cannot be 0"),
        ({"keep": -1}, "`keep` cannot be -1"),
        ({"keep_every": 1.5}, "`keep_every`"),
        ({"keep_best": "loss"}, "`keep_best`"),
        ({"keep_best": ("loss", sum)}, "`keep_best`"),
    ],
)
def test_options_that_are_none(options: Any, text: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=text):
        Manager(tmp_path, **options)


def test_several_threads_save(tmp_path: Path, model: dict[str, Any]) -> None:
    with Manager(tmp_path / "run", keep=None) as manager:
        threads = [
            threading.Thread(target=lambda n=n: [manager.save(10 * n + k, model) for k in range(4)]) for n in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert manager.steps == [10 * n + k for n in range(3) for k in range(4)]
    for step in manager.steps:
        assert manager.restore(model, step=step) is not None


def test_inside_a_transform(tmp_path: Path, model: dict[str, Any]) -> None:
    manager = Manager(tmp_path / "run")
    with pytest.raises(CheckpointError, match="while a function is traced"):
        mu.jit(lambda: manager.save(1, model))()


def test_bad_saves(tmp_path: Path, model: dict[str, Any]) -> None:
    manager = Manager(tmp_path / "run", keep_best=("loss", min))
    for use, text in [
        (lambda: manager.save(1, model), "no metric `loss`"),
        (lambda: manager.save(-1, model, metrics={"loss": 1}), "not the number of a step"),
        (lambda: manager.save(1, model, metrics={"loss": 1}, extra={1: 2}), "cannot be read back"),
        (lambda: manager.save(1, model, metrics={"loss": 1}, extra=float("nan")), "cannot be read back"),
    ]:
        with pytest.raises(ArgumentError, match=text):
            use()
    assert manager.steps == []
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError):
        Manager(tmp_path / "file" / "run").save(1, model)


PREEMPTED = """
import os, signal, sys, time
import jax.numpy as jnp, mutatis as mu
model = {"n": mu.Variable(0)}
with mu.checkpoint.Manager(sys.argv[1], every=1000) as manager, mu.preemption() as stop:
    while not stop:
        model["n"].value += 1
        print(int(model["n"]), flush=True)
        time.sleep(0.01)
    manager.save(int(model["n"]), model, force=True)
print("saved", int(model["n"]))
"""


def test_a_job_that_is_told_to_end_saves_first(tmp_path: Path) -> None:
    job = subprocess.Popen([sys.executable, "-c", PREEMPTED, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None
    for _ in range(3):
        job.stdout.readline()
    job.send_signal(signal.SIGTERM)
    out, _ = job.communicate(timeout=120)
    last = int(out.split()[-1])
    assert job.returncode == 0 and last >= 3
    model = {"n": mu.Variable(0)}
    assert Manager(tmp_path / "run").restore(model).step == last == int(model["n"])


def test_a_flag_and_nothing_else() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with mu.preemption(signal.SIGUSR1) as stop:
        assert not stop
        signal.raise_signal(signal.SIGUSR1)
        assert stop
    assert signal.getsignal(signal.SIGTERM) is before
    found: list[Any] = []

    def enter() -> None:
        try:
            with mu.preemption():
                pass
        except ArgumentError as error:
            found.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert "gets no signals" in str(found[0])


def test_a_failure_that_nobody_asked_for_is_told_at_exit(tmp_path: Path) -> None:
    program = (
        "import mutatis as mu\nfrom mutatis.checkpoint import managing\n"
        "def fails(*args): raise OSError('disk on fire')\n"
        "managing.write = fails\n"
        "mu.checkpoint.Manager('run').save(1, mu.Variable(0))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "disk on fire" in done.stderr


# -- looking in, and restoring otherwise ---------------------------------------------------------------------------------


def test_describe_and_load(tmp_path: Path, model: dict[str, Any]) -> None:
    checkpoint.save(tmp_path / "a", model, extra={"epoch": 3})
    found = checkpoint.describe(tmp_path / "a")
    assert found.extra == {"epoch": 3} and found.number == 1
    assert [(s.path, s.kind, s.type, s.bytes) for s in found.states] == [
        ("w", "Param", "float32[1000]", 4000),
        ("n", "Variable", "int32[]", 4),
        ("rngs.streams.default", "RngState", "dict(count=uint32[], key=key<fry>[])", 12),
    ]
    assert str(found).endswith("4.0 kB")
    state = checkpoint.load(tmp_path / "a")
    assert state == mu.state(model) and checkpoint.load(tmp_path / "a", mu.Param).kinds() == {("w",): mu.Param}
    with pytest.raises(mu.errors.FilterError, match="no state"):
        checkpoint.load(tmp_path / "a", mu.Cache)
    with pytest.raises(CheckpointError, match="there is nothing"):
        checkpoint.load(tmp_path / "b")


class Model(mu.Module):
    def __init__(self, seed: int) -> None:
        rngs = mu.Rngs(seed)
        self.encoder = mu.Module()
        self.encoder.blocks = [mu.nn.Linear(2, 2, rngs=rngs) for _ in range(2)]
        self.head = mu.nn.Linear(2, 3, rngs=rngs)


def test_one_of_several_that_were_saved_together(tmp_path: Path) -> None:
    first = Model(0)
    checkpoint.save(tmp_path / "a", (first, mu.Variable(3.0)))
    for at in (0, "0", "[0]", (0,)):
        model = Model(1)
        checkpoint.restore(tmp_path / "a", model, at=at)
        np.testing.assert_array_equal(model.head.kernel.value, first.head.kernel.value)
    with pytest.raises(CheckpointError, match=r"(?s)missing: .*restore\(path, model, at=\"\[0\]\"\)") as caught:
        checkpoint.restore(tmp_path / "a", model)
    assert caught.value.cure is not None
    exec(caught.value.cure.split("`")[3], {"mu": mu, "path": tmp_path / "a", "model": model})
    with pytest.raises(CheckpointError, match=r"there is no '\[2\]'"):
        checkpoint.restore(tmp_path / "a", model, at=2)


def test_restoring_a_part_elsewhere(tmp_path: Path) -> None:
    first = Model(0)
    checkpoint.save(tmp_path / "a", first)
    part = Model(1).encoder
    checkpoint.restore(tmp_path / "a", part, at="encoder")
    np.testing.assert_array_equal(part.blocks[1].kernel.value, first.encoder.blocks[1].kernel.value)
    layer = mu.nn.Linear(2, 2, rngs=mu.Rngs(5))
    checkpoint.restore(tmp_path / "a", layer, at="encoder.blocks[1]")
    np.testing.assert_array_equal(layer.kernel.value, first.encoder.blocks[1].kernel.value)
    layer = mu.nn.Linear(2, 2, rngs=mu.Rngs(6))
    checkpoint.restore(tmp_path / "a", layer, at=("encoder", "blocks", 1))
    np.testing.assert_array_equal(layer.kernel.value, first.encoder.blocks[1].kernel.value)
    layer = mu.nn.Linear(2, 2, rngs=mu.Rngs(7))
    checkpoint.restore(tmp_path / "a", layer, at="encoder.blocks.1")
    np.testing.assert_array_equal(layer.kernel.value, first.encoder.blocks[1].kernel.value)
    other = mu.Module()
    other.body, other.classifier = Model(2).encoder, mu.nn.Linear(2, 3, rngs=mu.Rngs(3))
    checkpoint.restore(tmp_path / "a", other, rename={"encoder": "body", "head": "classifier"})
    np.testing.assert_array_equal(other.classifier.kernel.value, first.head.kernel.value)
    np.testing.assert_array_equal(other.body.blocks[0].bias.value, first.encoder.blocks[0].bias.value)
    for options in ({"at": "decoder"}, {"rename": {"decoder": "body"}}):
        with pytest.raises(CheckpointError, match="there is no 'decoder'"):
            checkpoint.restore(tmp_path / "a", other, **options)


def test_restoring_into_a_changed_model(tmp_path: Path) -> None:
    first = Model(0)
    checkpoint.save(tmp_path / "a", first)
    grown = Model(1)
    grown.extra, grown.head = mu.Param(jnp.ones(2)), mu.Param(jnp.ones(3))
    with pytest.raises(CheckpointError, match=r"(?s)missing:    extra.*unexpected: head\.bias"):
        checkpoint.restore(tmp_path / "a", grown)
    checkpoint.restore(tmp_path / "a", grown, missing="keep", unexpected="ignore")
    np.testing.assert_array_equal(grown.encoder.blocks[0].kernel.value, first.encoder.blocks[0].kernel.value)
    np.testing.assert_array_equal(grown.extra.value, jnp.ones(2))
    for options in ({"missing": "ignore"}, {"unexpected": "keep"}, {"verify": "nothing"}):
        with pytest.raises(ArgumentError, match="cannot be"):
            checkpoint.restore(tmp_path / "a", grown, **options)


def test_verify(tmp_path: Path, model: dict[str, Any]) -> None:
    checkpoint.save(tmp_path / "a", model)
    largest = max((f for f in (tmp_path / "a" / "arrays-1").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[-1] ^= 1
    largest.write_bytes(bytes(content[:-1]))
    for verify in ("checksum", "size"):
        with pytest.raises(CheckpointError, match="damaged"):
            checkpoint.restore(tmp_path / "a", model, verify=verify)


# -- a run that goes back to an earlier step -----------------------------------------------------------------------


def saved_at(value: float) -> dict[str, Any]:
    return {"w": mu.Param(jnp.full(2000, value))}


def test_a_run_that_went_back_is_the_newest(tmp_path: Path) -> None:
    model = saved_at(0.0)
    for keep in (1, 2):
        folder = tmp_path / str(keep)
        with checkpoint.Manager(folder, keep=keep) as manager:
            for step in (10, 20, 30):
                model["w"].value = jnp.full(2000, float(step))
                manager.save(step, model)
                if step == 20 and keep == 1:
                    manager.wait()
                    shutil.copytree(folder / "step_000000020", tmp_path / "kept")
        if keep == 1:
            shutil.copytree(tmp_path / "kept", folder / "step_000000020")
        with checkpoint.Manager(folder, keep=keep) as manager:
            manager.restore(model, step=20)
            for step in (21, 22):
                model["w"].value = jnp.full(2000, -float(step))
                assert manager.save(step, model)
                manager.wait()
                assert step in manager.steps and manager.latest == step
            assert manager.steps == [21, 22][-keep:]
        with checkpoint.Manager(folder, keep=keep) as manager:
            found = manager.restore(model)
            assert found is not None and found.step == 22 and float(model["w"].value[0]) == -22.0


@pytest.mark.filterwarnings("ignore:the checkpoint of step 30 was skipped")
def test_a_damaged_one_takes_no_place(tmp_path: Path) -> None:
    for cut in (10, None):  # shorter; of the same size, which only a restore finds
        folder = tmp_path / str(cut)
        model = saved_at(1.0)
        with checkpoint.Manager(folder, keep=2) as manager:
            for step in (20, 30):
                manager.save(step, model)
        files = [path for path in (folder / "step_000000030").rglob("*") if path.is_file() and path.suffix != ".json"]
        largest = max(files, key=lambda path: path.stat().st_size)
        data = largest.read_bytes()
        largest.write_bytes(data[:cut] if cut else data[:-1] + bytes([data[-1] ^ 1]))
        with checkpoint.Manager(folder, keep=1) as manager:
            found = manager.restore(model)
            assert found is not None and found.step == 20
            assert manager.save(25, model)
            manager.wait()
            assert manager.steps == [25, 30]
            found = manager.restore(model)
            assert found is not None and found.step == 25


def test_an_iterator_without_a_position(tmp_path: Path) -> None:
    class Data:
        at = 3

        def get_state(self) -> int:
            return self.at

        def set_state(self, at: int) -> None:
            self.at = at

    model, data = saved_at(1.0), Data()
    with checkpoint.Manager(tmp_path / "run") as manager:
        manager.save(1, model)
        model["w"].value = jnp.zeros(2000)
        with pytest.raises(CheckpointError, match="has no position of an iterator; nothing was restored"):
            manager.restore(model, iterator=data)
        assert float(model["w"].value[0]) == 0.0
        manager.save(2, model, iterator=data)
        data.at = 9
        manager.restore(model, iterator=data)
        assert data.at == 3


# -- names and dtypes that do not go together ----------------------------------------------------------------------


def test_two_states_of_one_name(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a", {"a": mu.Param(1.0), "b": mu.Param(2.0)})
    model = {"a": mu.Param(0.0)}
    with pytest.raises(CheckpointError, match=r"two states of the checkpoint .* would be `a`"):
        checkpoint.restore(tmp_path / "a", model, rename={"b": "a"}, unexpected="ignore")
    assert float(model["a"]) == 0.0
    checkpoint.restore(tmp_path / "a", model, rename={"b": "a", "a": "unused"}, unexpected="ignore")
    assert float(model["a"]) == 2.0


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint32, jnp.bool_])
def test_integers_that_do_not_fit_are_not_converted(dtype: Any, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a", {"n": mu.Variable(jnp.array([-1, 2**24 + 1])), "w": mu.Param(3.0)})
    model = {"n": mu.Variable(jnp.zeros(2, dtype)), "w": mu.Param(0.0)}
    with pytest.raises(CheckpointError):
        checkpoint.restore(tmp_path / "a", model, cast=True)
    assert float(model["w"]) == 0.0
    model["n"] = mu.Variable(jnp.zeros(2, jnp.float32))
    checkpoint.restore(tmp_path / "a", model, cast=True)


def test_processes_wait_for_each_other_without_a_program_on_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    orbax = pytest.importorskip("orbax.checkpoint")
    assert arrays._checkpointer(orbax.PyTreeCheckpointHandler())._active_processes is None
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    assert arrays._checkpointer(orbax.PyTreeCheckpointHandler())._active_processes == {0, 1, 2}
