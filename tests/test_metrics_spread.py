"""`Welford`, `Perplexity` and `ConfusionMatrix` beside NumPy, in one `MultiMetric`, and bad input."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import metrics
from mutatis.errors import ArgumentError

VALUES = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)


@pytest.mark.parametrize("shift", [0.0, 1e4])
@pytest.mark.parametrize("masked", [False, True])
def test_welford_beside_numpy(shift: float, masked: bool) -> None:
    values, mask = VALUES + np.float32(shift), VALUES > -0.5 if masked else np.ones_like(VALUES, bool)
    spread = metrics.Welford()
    step = mu.jit(lambda x, m: spread.update(values=x, mask=m))
    for x, m in zip(values, mask, strict=True):
        step(x, m)
    counted = values[mask].astype(np.float64)
    mean, error, deviation = spread.compute()
    np.testing.assert_allclose(mean, counted.mean(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(deviation, counted.std(), rtol=1e-3)
    np.testing.assert_allclose(error, counted.std() / np.sqrt(counted.size), rtol=1e-3)


def test_welford_of_nothing_and_anew() -> None:
    spread = metrics.Welford("loss")
    assert all(np.isnan(value) for value in spread.compute())
    spread.update(loss=jnp.ones(3), mask=False)
    assert all(np.isnan(value) for value in spread.compute())
    spread.update(loss=3.0)
    assert [float(value) for value in spread.compute()] == [3, 0, 0]
    spread.reset()
    spread.update(loss=jnp.array([1, 3]))
    assert float(spread.compute().mean) == 2 and float(spread.compute().standard_deviation) == 1


@pytest.mark.once
def test_welford_beside_flax() -> None:
    nnx = pytest.importorskip("flax.nnx")
    mine, other = metrics.Welford(), nnx.metrics.Welford()
    with jax.numpy_dtype_promotion("standard"):
        for row in VALUES:
            mine.update(values=row)
            other.update(values=row)
        wanted = other.compute()
    for name, value in mine.compute()._asdict().items():
        np.testing.assert_allclose(value, getattr(wanted, name), rtol=1e-4)


def test_several_by_keyword() -> None:
    all_of = metrics.MultiMetric(
        perplexity=metrics.Perplexity(), spread=metrics.Welford("loss"), confusion=metrics.ConfusionMatrix(3)
    )
    labels = jnp.array([[0, 1], [2, 2]])
    logits = jax.nn.one_hot(jnp.array([[0, 2], [2, 1]]), 3)
    step = mu.jit(lambda loss: all_of.update(loss=loss, logits=logits, labels=labels))
    for loss in ([[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]):
        step(jnp.array(loss))
    got: Any = all_of.compute()
    assert float(got["perplexity"]) == pytest.approx(np.exp(10 / 8), rel=1e-6)
    assert float(got["spread"].mean) == pytest.approx(10 / 8)
    assert got["confusion"].tolist() == [[2, 0, 0], [0, 0, 2], [0, 2, 2]]
    all_of.update(loss=jnp.zeros(2), logits=logits[0], labels=labels[0], mask={"confusion": jnp.array([True, False])})
    assert int(all_of.compute()["confusion"].sum()) == 9
    all_of.reset()
    assert int(all_of.compute()["confusion"].sum()) == 0


def test_labels_that_are_no_class_do_not_count() -> None:
    confusion = metrics.ConfusionMatrix(2)
    confusion.update(logits=jnp.eye(2)[jnp.array([0, 0, 0])], labels=jnp.array([-1, 2, 1]))
    assert confusion.compute().tolist() == [[0, 0], [1, 0]]


@pytest.mark.parametrize(
    ("shape", "labels"), [((4, 3), jnp.zeros(4, int)), ((4, 2), jnp.zeros((4, 2), int)), ((4, 2), jnp.zeros(4))]
)
def test_what_does_not_fit(shape: Any, labels: Any) -> None:
    with pytest.raises(ArgumentError, match="do not fit the labels of `ConfusionMatrix`"):
        metrics.ConfusionMatrix(2).update(logits=jnp.zeros(shape), labels=labels)
