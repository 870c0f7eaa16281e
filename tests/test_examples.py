"""The example runs: its parts here, the whole of it among the slow tests."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu

SCRIPT = Path(__file__).parents[1] / "examples" / "mnist.py"


@pytest.fixture(scope="module")
def mnist() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mnist", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mnist"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(mnist: ModuleType) -> Any:
    return mnist.load_data(images_per_digit=4)


def test_data(data: Any) -> None:
    assert data.train_images.shape == (40, 28, 28, 1) and data.test_images.shape == (1000, 28, 28, 1)
    assert np.bincount(data.train_labels).tolist() == [4] * 10 and np.bincount(data.test_labels).tolist() == [100] * 10
    assert (float(data.test_images.min()), float(data.test_images.max())) == (0.0, 1.0)
    rows = [{image.tobytes() for image in np.asarray(images)} for images in (data.train_images, data.test_images)]
    assert rows[0].isdisjoint(rows[1])


def test_augmented_images_stay_digits(mnist: ModuleType, data: Any) -> None:
    images = jax.jit(mnist.augment)(jax.random.key(0), data.train_images)
    assert images.shape == data.train_images.shape and images.dtype == jnp.float32
    assert float(images.min()) >= 0 and float(images.max()) <= 1 + 1e-6
    assert float(images.sum()) == pytest.approx(float(data.train_images.sum()), rel=0.05)
    correlation = np.corrcoef(np.ravel(images), np.ravel(data.train_images))[0, 1]
    assert 0.4 < correlation < 0.95


@jax.numpy_dtype_promotion("standard")  # optax promotes
def test_stopped_run_goes_on_to_the_same_bits(mnist: ModuleType, data: Any, tmp_path: Path) -> None:
    def train(name: str, *words: str, resume: str | None = None) -> Any:
        args = mnist.parse_args([f"--out={tmp_path / name}", "--epochs=2", "--batch-size=20", *words])
        run = mnist.Training(epochs=2, steps=2, learning_rate=1e-3, seed=0)
        if resume:
            mu.checkpoint.restore(tmp_path / resume, run)
        mnist.train(run, data, args)
        return run

    whole, stopped = train("whole"), train("stopped", "--stop-after=1")
    assert (int(whole.optimizer.step), int(stopped.optimizer.step)) == (4, 2)
    assert mnist.differing(whole, stopped)
    assert mnist.differing(whole, train("resumed", resume="stopped/epoch_1")) == []
    assert np.isfinite(whole.curve).all()


def test_differing_sees_each_bit(mnist: ModuleType) -> None:
    runs = [mnist.Training(epochs=2, steps=2, learning_rate=1e-3, seed=0) for _ in range(2)]
    assert mnist.differing(*runs) == []
    runs[0].model.head.bias[3] = -0.0
    runs[0].rngs()
    assert [re.sub(r"\W", "", path) for path in mnist.differing(*runs)] == ["modelheadbias", "rngsstreamsdefaultcount"]


@pytest.mark.parametrize(
    "words", [["--epochs=1"], ["--stop-after=0"], ["--batch-size=0"], ["--quick", "--batch-size=401"]]
)
def test_options_that_do_not_fit(mnist: ModuleType, words: list[str]) -> None:
    with pytest.raises(SystemExit):
        mnist.parse_args(words)


def run(out: Path, *words: str) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}  # as users have it
    command = [sys.executable, str(SCRIPT), f"--out={out}", *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_quick(tmp_path: Path) -> None:
    text = run(tmp_path, "--quick")
    assert "bit for bit" in text
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    text = run(tmp_path)
    (accuracy,) = re.findall(r"([\d.]+)% of 1000 held-out images are right", text.partition("The proof")[0])
    assert float(accuracy) >= 97 and "bit for bit" in text
