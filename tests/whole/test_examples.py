"""The examples run: their parts here, the whole of the longest among the slow tests."""

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

pytestmark = pytest.mark.once  # nothing here depends on the version of JAX

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT = EXAMPLES / "mnist.py"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def mnist() -> ModuleType:
    return load("mnist")


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
            mu.checkpoint.Manager(tmp_path / resume).restore(run, step=1)
        mnist.train(run, data, args)
        return run

    whole, stopped = train("whole"), train("stopped", "--stop-after=1")
    assert (int(whole.optimizer.step), int(stopped.optimizer.step)) == (4, 2)
    assert mnist.differing(whole, stopped)
    assert mnist.differing(whole, train("resumed", resume="stopped")) == []
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


# -- transactions: as users write them, with JAX's usual promotion ------------------------------------------------------


@pytest.fixture
def usual_promotion() -> Any:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.usefixtures("usual_promotion")
def test_an_undone_step_leaves_no_trace() -> None:
    example = load("undo_step")
    batches = example.make_batches(6)
    broken = (batches[0][0].at[3, 1].set(jnp.nan), batches[0][1])
    run, clean = example.make(), example.make()
    assert example.train(*run, [*batches[:3], broken, broken, *batches[3:]]) == 2
    assert example.train(*clean, batches) == 0
    assert mu.state(run) == mu.state(clean)


@pytest.mark.usefixtures("usual_promotion")
def test_a_line_search_beside_one_by_hand() -> None:
    example = load("line_search")
    x = jax.random.uniform(jax.random.key(0), (32, 2), minval=-1, maxval=1)
    y = x[:, :1] * x[:, 1:]
    net = example.Net(mu.Rngs(1))
    params = mu.state(net, mu.Param)
    pure, start = mu.functionalize(lambda: jnp.mean((net(x) - y) ** 2), of=net)

    def loss(params: Any) -> Any:
        return pure(start | params)[0]

    for _ in range(5):
        before, grads = jax.value_and_grad(loss)(params)
        slope, length = sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)), 4.0
        while loss(moved := jax.tree.map(lambda p, g: p - length * g, params, grads)) > before - 1e-4 * length * slope:
            length /= 2
        params = moved
        got = example.search(net, x, y)
        assert got == (pytest.approx(float(before), rel=1e-4), length)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), mu.state(net, mu.Param), params
        )
    assert int(net.evaluations) > 10, "those of steps that were taken back count, too"


@pytest.mark.usefixtures("usual_promotion")
def test_samples_have_the_moments_of_the_posterior() -> None:
    example = load("hmc")
    model = example.make()
    samples, accepted = example.sample(model, 1000)
    mean, covariance = example.posterior(model)
    deviation = np.sqrt(np.diag(covariance))
    assert 0.5 < accepted < 1
    assert np.all(np.abs(samples[100:].mean(0) - mean) < 0.3 * deviation)
    np.testing.assert_allclose(samples[100:].std(0), deviation, rtol=0.3)


@pytest.mark.usefixtures("usual_promotion")
def test_speculative_decoding_writes_what_the_large_model_writes() -> None:
    example = load("speculative_decoding")
    prompt, count = [1, 2, 3, 5, 8], 24
    large, small = example.make()
    alone = mu.clone(large)
    expected = example.decode(alone, prompt, count)
    text, calls = example.speculate(large, small, prompt, count)
    assert text == expected
    assert calls < count
    length = int(alone.length)
    for path, cache in mu.variables(large, mu.Cache).items():
        mine, other = np.asarray(cache), np.asarray(mu.variables(alone)[path])
        if cache.ndim:
            assert not mine[int(large.length) :].any(), "nothing is left of what was rejected"
            np.testing.assert_allclose(mine[:length], other[:length], rtol=1e-4, atol=1e-5)
