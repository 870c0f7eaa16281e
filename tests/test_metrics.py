"""Metrics: their values beside NumPy's, their states under `mu.jit`, and input that does not fit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis.errors import ArgumentError
from mutatis.metrics import Accuracy, Average, Metric, MultiMetric

LOGITS = jnp.array([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [0.2, 0.2, 0.6], [0.9, 0.05, 0.05]])
LABELS = jnp.array([1, 0, 2, 1])


@mu.jit
def update(metric: Metric, **values: Any) -> None:
    metric.update(**values)


@pytest.mark.parametrize("apply", [lambda metric, **values: metric.update(**values), update], ids=["eager", "jit"])
def test_average(apply: Callable[..., None]) -> None:
    metric, seen = Average("loss"), []
    for batch in (
        np.array([1.0, 2.0], np.float32),
        np.array([[3, 4, 5]]),
        6.0,
        np.float32(7),
        jnp.ones((2, 2), jnp.bfloat16),
    ):
        apply(metric, loss=batch, other="unseen" if apply is not update else 0.0)
        seen += np.ravel(np.asarray(batch, np.float32)).tolist()
        assert float(metric.compute()) == pytest.approx(np.mean(seen))
    assert int(metric.count) == len(seen)


def test_mask() -> None:
    metric = Average()
    metric.update(values=jnp.arange(6.0).reshape(2, 3), mask=jnp.array([[True], [False]]))
    assert (float(metric.compute()), int(metric.count)) == (1.0, 3)
    metric.update(values=jnp.array([jnp.nan, 3.0]), mask=jnp.array([0, 1]))
    assert float(metric.compute()) == 1.5


@pytest.mark.parametrize("metric", [Average(), Accuracy()], ids=["Average", "Accuracy"])
def test_nothing_gives_nan(metric: Metric) -> None:
    assert np.isnan(metric.compute())


@pytest.mark.parametrize("apply", [lambda metric, **values: metric.update(**values), update], ids=["eager", "jit"])
def test_accuracy(apply: Callable[..., None]) -> None:
    metric = Accuracy()
    apply(metric, logits=LOGITS, labels=LABELS, loss=1.0)
    assert float(metric.compute()) == 0.75
    apply(metric, logits=LOGITS, labels=LABELS, mask=jnp.array([0, 0, 0, 1]))
    assert float(metric.compute()) == pytest.approx(0.6)
    apply(metric, logits=LOGITS[None], labels=LABELS[None])
    assert float(metric.compute()) == pytest.approx(6 / 9)


def test_accuracy_of_two_classes() -> None:
    metric = Accuracy(threshold=0.5)
    metric.update(logits=jnp.array([0.5, 0.4, 0.9]), labels=jnp.array([1, 0, 0]))
    assert float(metric.compute()) == pytest.approx(2 / 3)


def test_several_at_once(traces: Any) -> None:
    metrics = MultiMetric(loss=Average("loss"), accuracy=Accuracy())
    body = traces.count(
        lambda metrics, loss: (metrics.update(loss=loss, logits=LOGITS, labels=LABELS), metrics.compute())[1]
    )
    step = mu.jit(body)
    for loss in (1.0, 2.0):
        now = step(metrics, loss)
    assert traces.total == 1
    assert {name: float(value) for name, value in now.items()} == {"loss": 1.5, "accuracy": 0.75}
    assert [*mu.state(metrics, mu.MetricState)] == [*mu.state(metrics)] and len(mu.state(metrics)) == 4
    copied = copy.deepcopy(metrics)
    mu.jit(lambda m: m.reset())(metrics)
    assert np.isnan(metrics.loss.compute()) and float(copied.loss.compute()) == 1.5
    step(metrics, 5.0)
    assert float(metrics.compute()["loss"]) == 5.0 and traces.total == 1


def test_checkpoint(tmp_path: Path) -> None:
    metrics, other = Average(), Average()
    metrics.update(values=3.0)
    mu.checkpoint.save(tmp_path / "c", metrics)
    mu.checkpoint.restore(tmp_path / "c", other)
    assert float(other.compute()) == 3.0


def test_metric_of_a_user() -> None:
    class Largest(Metric):
        def __init__(self) -> None:
            self.value = mu.MetricState(-jnp.inf, init=-jnp.inf)

        def update(self, *, loss: jax.Array, **_: Any) -> None:
            self.value = jnp.maximum(self.value, loss)

        def compute(self) -> jax.Array:
            return self.value.value

    metrics = MultiMetric(largest=Largest(), loss=Average("loss"))
    for loss in (1.0, 3.0, 2.0):
        metrics.update(loss=loss)
    assert {name: float(value) for name, value in metrics.compute().items()} == {"largest": 3.0, "loss": 2.0}
    metrics.reset()
    assert float(metrics.largest.compute()) == -np.inf


def test_metrics_are_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Metric()  # type: ignore[abstract]


@pytest.mark.parametrize(
    ("use", "text"),
    [
        (lambda: Average("loss").update(los=1.0), r"(?s)takes `loss`.*expected: loss=\.\.\..*got:      los=\.\.\."),
        (lambda: Accuracy().update(logits=LOGITS, labels=jax.nn.one_hot(LABELS, 3)), r"labels of shape \(4,\)"),
        (lambda: Accuracy(0.5).update(logits=LOGITS, labels=LABELS), r"labels of shape \(4, 3\)"),
        (lambda: MultiMetric(update=Average()), "`update` cannot be an attribute"),
        (lambda: MultiMetric(loss=1.0), "`loss` cannot be an attribute"),
    ],
)
def test_input_that_does_not_fit(use: Callable[[], Any], text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        use()


def test_labels_of_padding_do_not_count() -> None:
    accuracy = Accuracy()
    accuracy.update(logits=jnp.eye(4), labels=jnp.array([0, -100, 2, 1]))
    assert (int(accuracy.count), float(accuracy.total)) == (3, 2.0)
    accuracy.update(logits=jnp.eye(4), labels=jnp.array([0, -100, 2, 1]), mask=jnp.array([1, 1, 0, 0]))
    assert (int(accuracy.count), float(accuracy.total)) == (4, 3.0)


@pytest.mark.parametrize(
    "update",
    [
        lambda mask: Average("x").update(x=jnp.ones((4, 3)), mask=mask),
        lambda mask: mu.metrics.Welford("x").update(x=jnp.ones((4, 3)), mask=mask),
        lambda mask: Accuracy().update(logits=jnp.ones((4, 3, 2)), labels=jnp.zeros((4, 3), int), mask=mask),
        lambda mask: Accuracy(0.5).update(logits=jnp.ones((4, 3)), labels=jnp.zeros((4, 3), int), mask=mask),
        lambda mask: mu.metrics.ConfusionMatrix(2).update(
            logits=jnp.ones((4, 3, 2)), labels=jnp.zeros((4, 3), int), mask=mask
        ),
    ],
)
def test_masks_that_do_not_fit(update: Callable[[Any], None]) -> None:
    for mask in (jnp.ones(4), jnp.ones((2, 4, 3)), jnp.ones((4, 2))):
        with pytest.raises(ArgumentError, match=r"(?s)mask of a metric.*broadcasts to \(4, 3\)"):
            update(mask)
    for mask in (True, jnp.ones(3), jnp.ones((4, 1)), jnp.ones((1, 3), bool)):
        update(mask)


@pytest.mark.parametrize(("dtype", "classes"), [(np.uint8, 256), (np.uint8, 300), (np.int8, 200), (np.int64, 300)])
def test_labels_of_narrow_dtypes(dtype: Any, classes: int) -> None:
    labels = np.array([3, 7, 100], dtype)
    confusion = mu.metrics.ConfusionMatrix(classes)
    confusion.update(logits=jnp.eye(classes)[labels.astype(int)], labels=labels)
    assert int(confusion.compute().sum()) == 3 and int(confusion.compute()[100, 100]) == 1
