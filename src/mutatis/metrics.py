"""Metrics: running totals that live in `MetricState` cells.

A metric is a module, so it goes into `mu.jit` as an argument, is saved with the model, and is updated in place.
`update` takes its values by keyword and ignores those of other metrics, so one call can update several.
"""

from __future__ import annotations

import abc
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mutatis.core.avals import broadcasts
from mutatis.core.calls import takes
from mutatis.core.showing import show_class
from mutatis.errors import ArgumentError
from mutatis.model.kinds import MetricState
from mutatis.model.modules import Module
from mutatis.model.operations import reset


class Metric(Module, abc.ABC):
    """Base class of metrics: `update` adds a batch, `compute` returns the value so far, `reset` starts anew.

    A metric of your own keeps its totals in `MetricState`s whose `init` is their first value, and defines `update` and
    `compute`.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> class Largest(mu.metrics.Metric):
      ...     def __init__(self):
      ...         self.largest = mu.MetricState(-jnp.inf, init=-jnp.inf)
      ...     def update(self, *, values, **_):
      ...         self.largest.value = jnp.maximum(self.largest.value, values.max())
      ...     def compute(self):
      ...         return self.largest.value
      >>> metric = Largest()
      >>> metric.update(values=jnp.array([1.0, 3.0]))
      >>> float(metric.compute())
      3.0
      >>> metric.reset()
      >>> float(metric.compute())
      -inf
    """

    @abc.abstractmethod
    def update(self, **values: Any) -> None:
        """Add a batch of values.

        Args:
          **values: the values by keyword. A metric takes those that it knows and ignores the others, so one call can update
            several.
        """

    @abc.abstractmethod
    def compute(self) -> Any:
        """The value over all batches since the start."""

    def reset(self) -> None:
        """Start anew: set each `MetricState` back to its first value."""
        reset(self, MetricState)


def _counted(mask: ArrayLike | None, shape: tuple[int, ...]) -> jax.Array:
    """A mask as booleans of a shape, all of which are True without one.

    Raises:
      ArgumentError: it does not broadcast to that.
    """
    given = jnp.asarray(True if mask is None else mask, bool)
    if not broadcasts(given.shape, shape):
        raise ArgumentError(
            "the mask of a metric does not fit its values",
            path="mask",
            expected=f"booleans of a shape that broadcasts to {shape}",
            got=f"shape {given.shape}",
            cure="A mask of examples for values of shape (batch, length): `mask=mask[:, None]`.",
        )
    return jnp.broadcast_to(given, shape)


class Average(Metric):
    """The mean of all values, such as the loss of an epoch.

    Args:
      argname: the keyword argument of `update` that holds the values.

    Attributes:
      total: MetricState, a scalar, the sum of the values.
      count: MetricState, a scalar, the number of values.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> loss = mu.metrics.Average("loss")
      >>> loss.update(loss=jnp.array([1.0, 2.0]))
      >>> loss.update(loss=6.0)
      >>> loss.compute()
      Array(3., dtype=float32)
    """

    def __init__(self, argname: str = "values") -> None:
        self.argname = argname
        self.total = MetricState(0.0, init=0.0)
        self.count = MetricState(0, init=0)

    @takes("metric.update(values=x)", _="Say what it is: `metric.update(values=x)`.")
    def update(self, *, mask: ArrayLike | None = None, **values: Any) -> None:
        """Add a batch of values.

        Args:
          mask: booleans that broadcast to the shape of the values: which of them count. None counts all.
          **values: the values, an array of any shape, under the name `argname`. Other keyword arguments are ignored.

        Raises:
          ArgumentError: there are no values of that name, or the mask does not fit them.
        """
        if self.argname not in values:
            raise ArgumentError(
                f"a metric that takes `{self.argname}` was updated without it",
                path=self.argname,
                expected=f"{self.argname}=...",
                got=", ".join(f"{name}=..." for name in values) or "no values",
                cure=f"`metric.update({self.argname}=x)`, or say the name where it is made: `mu.metrics.Average('loss')`.",
            )
        batch = jnp.asarray(values[self.argname])
        self._take(batch, _counted(mask, batch.shape))

    def _take(self, batch: jax.Array, counted: jax.Array) -> None:
        """Take in an array of values, and which of them count."""
        self.total += jnp.sum(batch, where=counted, dtype=self.total.dtype)
        self.count += jnp.sum(counted, dtype=self.count.dtype)

    def compute(self) -> jax.Array:
        """The mean so far: a scalar, NaN if there were no values."""
        mean: jax.Array = self.total / self.count.astype(self.total.dtype)
        return mean


class Accuracy(Average):
    """The share of right predictions.

    Args:
      threshold: for two classes with one logit: the logit from which on a prediction is positive. None is for one logit for
        each class, of which the largest is the prediction.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> accuracy = mu.metrics.Accuracy()
      >>> accuracy.update(logits=jnp.array([[0.1, 0.9], [0.8, 0.2]]), labels=jnp.array([1, 1]))
      >>> accuracy.compute()
      Array(0.5, dtype=float32)
    """

    def __init__(self, threshold: float | None = None) -> None:
        super().__init__("right")
        self.threshold = threshold

    @takes("metric.update(logits=logits, labels=labels)")
    def update(self, *, logits: ArrayLike, labels: ArrayLike, mask: ArrayLike | None = None, **_: Any) -> None:  # type: ignore[override]  # names what it takes of **values
        """Add a batch of predictions.

        Args:
          logits: an array of shape (..., classes), or (...) with a threshold.
          labels: the right classes: integers of shape (...). Those below 0, such as -100 for padding, do not count. With a
            threshold, labels above 0 are positive, and all count.
          mask: booleans that broadcast to shape (...): which predictions count. None counts all.

        Raises:
          ArgumentError: the shapes do not fit.
        """
        logits, labels = jnp.asarray(logits), jnp.asarray(labels)
        guesses = jnp.argmax(logits, -1) if self.threshold is None else logits >= self.threshold
        truth = labels if self.threshold is None else labels > 0
        if guesses.shape != truth.shape:
            raise ArgumentError(
                "the logits do not fit the labels of `Accuracy`",
                path="logits",
                expected=f"labels of shape {guesses.shape}",
                got=f"labels of shape {labels.shape}, logits of shape {logits.shape}",
                cure="Labels are integers without an axis for the classes: `labels=one_hot.argmax(-1)`.",
            )
        counted = _counted(mask, truth.shape)
        super().update(right=guesses == truth, mask=counted if self.threshold is not None else counted & (truth >= 0))


class MultiMetric(Metric):
    """Several metrics that one call updates.

    Args:
      **metrics: the metrics; each becomes an attribute of its name.

    Raises:
      ArgumentError: a value is not a metric, or its name is that of a method.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> metrics = mu.metrics.MultiMetric(loss=mu.metrics.Average("loss"), accuracy=mu.metrics.Accuracy())
      >>> metrics.update(loss=0.25, logits=jnp.eye(2), labels=jnp.array([0, 1]))
      >>> {name: float(value) for name, value in metrics.compute().items()}
      {'loss': 0.25, 'accuracy': 1.0}
      >>> metrics.reset()
    """

    def __init__(self, **metrics: Any) -> None:
        for name, metric in metrics.items():
            if not isinstance(metric, Metric) or hasattr(MultiMetric, name):
                raise ArgumentError(
                    f"`{name}` cannot be an attribute of `MultiMetric`",
                    path=name,
                    expected="a metric, under a name that is not one of its methods",
                    got=f"{name}={show_class(metric)}",
                    cure="`mu.metrics.MultiMetric(loss=mu.metrics.Average('loss'))`",
                )
            setattr(self, name, metric)

    @property
    def _metrics(self) -> dict[str, Metric]:
        return {name: metric for name, metric in vars(self).items() if isinstance(metric, Metric)}

    def update(self, **values: Any) -> None:
        """Update every metric with all values, of which each takes its own.

        Args:
          **values: the values by keyword. `mask` is for all metrics, or a dict from names of metrics to masks.

        Raises:
          ArgumentError: a mask is for a metric that does not exist.
        """
        by_name = isinstance(values.get("mask"), dict)
        masks: dict[str, Any] = values["mask"] if by_name else {}
        if strangers := masks.keys() - self._metrics.keys():
            raise ArgumentError(
                f"there is no metric `{min(map(str, strangers))}` for a mask",
                path="mask",
                expected=", ".join(self._metrics),
                got=", ".join(map(str, masks)),
                cure="Give masks by the names of the metrics, or one mask for all: `metrics.update(..., mask=mask)`.",
            )
        for name, metric in self._metrics.items():
            metric.update(**({**values, "mask": masks.get(name)} if by_name else values))

    def compute(self) -> dict[str, Any]:
        """The values of the metrics: a dictionary by name."""
        return {name: metric.compute() for name, metric in self._metrics.items()}


class Perplexity(Average):
    """The perplexity of a language model: ``exp`` of the mean loss.

    Args:
      argname: the keyword argument of `update` that holds the losses: the negative log-probabilities of the tokens.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> perplexity = mu.metrics.Perplexity()
      >>> perplexity.update(loss=-jnp.log(jnp.array([0.25, 0.25])))
      >>> perplexity.compute()
      Array(4., dtype=float32)
    """

    def __init__(self, argname: str = "loss") -> None:
        super().__init__(argname)

    def compute(self) -> jax.Array:
        """The perplexity so far: a scalar, NaN if there were no losses."""
        return jnp.exp(super().compute())


class Statistics(NamedTuple):
    """The result of `Welford.compute`, of three scalars.

    Attributes:
      mean: the mean.
      standard_error_of_mean: the standard deviation divided by the root of the number of values.
      standard_deviation: the standard deviation of the values, without Bessel's correction.
    """

    mean: jax.Array
    standard_error_of_mean: jax.Array
    standard_deviation: jax.Array


class Welford(Average):
    """The mean and the standard deviation of all values, computed so that they are precise also where the mean is large.

    Args:
      argname: the keyword argument of `update` that holds the values.

    Attributes:
      count: MetricState, a scalar, the number of values.
      mean: MetricState, a scalar, their mean.
      m2: MetricState, a scalar, the sum of the squared differences from the mean.

    Source:
      Welford, Note on a Method for Calculating Corrected Sums of Squares and Products, 1962; for batches, Chan et al., 1983,
      https://doi.org/10.1080/00031305.1983.10483115

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> spread = mu.metrics.Welford()
      >>> spread.update(values=jnp.array([1.0, 2.0]))
      >>> spread.update(values=jnp.array([3.0, 6.0]))
      >>> mean, _, deviation = spread.compute()
      >>> float(mean), round(float(deviation), 4)
      (3.0, 1.8708)
    """

    def __init__(self, argname: str = "values") -> None:
        self.argname = argname
        self.count = MetricState(0, init=0)
        self.mean = MetricState(0.0, init=0.0)
        self.m2 = MetricState(0.0, init=0.0)  # the sum of squared differences from the mean

    def _take(self, batch: jax.Array, counted: jax.Array) -> None:
        dtype = self.mean.dtype
        batch = batch.astype(dtype)
        new = jnp.sum(counted, dtype=self.count.dtype)
        weight = jnp.maximum(new, 1).astype(dtype)
        mean = jnp.sum(batch, where=counted) / weight
        m2 = jnp.sum(jnp.square(batch - mean), where=counted)
        both = jnp.maximum(self.count.value + new, 1).astype(dtype)
        delta, share = mean - self.mean.value, new.astype(dtype) / both
        self.m2 += m2 + jnp.square(delta) * share * self.count.value.astype(dtype)
        self.mean += delta * share
        self.count += new

    def compute(self) -> Statistics:
        """The `Statistics` so far; NaN if there were no values."""
        count = self.count.value.astype(self.mean.dtype)
        deviation = jnp.sqrt(self.m2 / count)
        return Statistics(self.mean.value + 0 / count, deviation / jnp.sqrt(count), deviation)


class ConfusionMatrix(Metric):
    """The counts of predictions for each pair of right class and predicted class.

    Args:
      num_classes: the number of classes.

    Attributes:
      counts: MetricState of shape (num_classes, num_classes), int32.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> confusion = mu.metrics.ConfusionMatrix(2)
      >>> confusion.update(logits=jnp.array([[0.1, 0.9], [0.8, 0.2]]), labels=jnp.array([1, 1]))
      >>> confusion.compute().tolist()  # two of class 1, of which one was taken for class 0
      [[0, 0], [1, 1]]
    """

    def __init__(self, num_classes: int) -> None:
        zeros = jnp.zeros((num_classes, num_classes), jnp.int32)
        self.num_classes = num_classes
        self.counts = MetricState(zeros, init=zeros)

    @takes("metric.update(logits=logits, labels=labels)")
    def update(self, *, logits: ArrayLike, labels: ArrayLike, mask: ArrayLike | None = None, **_: Any) -> None:  # type: ignore[override]  # names what it takes of **values
        """Add a batch of predictions.

        Args:
          logits: an array of shape (..., num_classes); the largest logit is the prediction.
          labels: the right classes: integers of shape (...). Those below 0 or from `num_classes` on do not count.
          mask: booleans that broadcast to shape (...): which predictions count. None counts all.

        Raises:
          ArgumentError: the shapes do not fit.
        """
        logits, labels = jnp.asarray(logits), jnp.asarray(labels)
        if logits.shape != (*labels.shape, self.num_classes) or not jnp.issubdtype(labels.dtype, jnp.integer):
            raise ArgumentError(
                "the logits do not fit the labels of `ConfusionMatrix`",
                path="logits",
                expected=f"logits of shape (..., {self.num_classes}) and integer labels of shape (...)",
                got=f"logits of shape {logits.shape}, {labels.dtype} labels of shape {labels.shape}",
                cure="Labels are integers without an axis for the classes: `labels=one_hot.argmax(-1)`.",
            )
        labels = labels.astype(jnp.int32)  # narrower ones may not hold the number of classes
        counted = (labels >= 0) & (labels < self.num_classes) & _counted(mask, labels.shape)
        guesses = jnp.argmax(logits, -1).astype(labels.dtype)
        self.counts.value = self.counts.value.at[labels, guesses].add(counted.astype(jnp.int32), mode="drop")

    def compute(self) -> jax.Array:
        """The counts so far, of shape (num_classes, num_classes): rows are right classes, columns predicted ones."""
        return self.counts.value
