"""Plots of states over time: rasters, traces, phase planes and weights. They need matplotlib.

Each function draws into the axes that you give, or into new ones, and returns the axes. It draws an array with time as the first
axis, such as the result of a `mu.for_loop` or a record of a `mu.recording.Monitor`.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from mutatis._packages import require
from mutatis.core.showing import show_value
from mutatis.errors import ArgumentError

__all__ = ["phase_plane", "raster", "traces", "weights"]


def raster(spikes: Any, times: Any = None, *, ax: Any = None, **style: Any) -> Any:
    """Draw spikes as dots: time to the right, and one row for each neuron.

    Args:
      spikes: an array of shape (time, neurons). Each element that is not zero is a spike.
      times: an array of shape (time,), the time of each row, in any unit. The default is the number of the row.
      ax: the matplotlib axes to draw into. The default is new ones.
      **style: options of `matplotlib.axes.Axes.scatter`.

    Returns:
      The axes.

    Raises:
      ArgumentError: an array has another shape.
      MissingPackageError: matplotlib is not installed.

    Example:
      >>> import jax, matplotlib, mutatis as mu
      >>> matplotlib.use("agg")
      >>> net = mu.nn.LIF(20)
      >>> spikes = mu.for_loop(net, 2 * jax.random.uniform(jax.random.key(0), (100, 20)))
      >>> ax = mu.inspect.plot.raster(spikes)
      >>> ax.get_ylabel()
      'neuron'
    """
    spikes, times = _over_time(spikes, times, "raster", dims=2)
    ax = _axes(ax, "raster")
    rows, neurons = np.nonzero(spikes)
    ax.scatter(times[rows], neurons, **{"s": 4, "marker": ".", "color": "black", **style})
    ax.set(xlabel="time", ylabel="neuron", ylim=(-0.5, spikes.shape[1] - 0.5))
    return ax


def traces(values: Any, times: Any = None, *, labels: Any = None, ax: Any = None, **style: Any) -> Any:
    """Draw values over time, as one line for each column.

    Args:
      values: an array of shape (time,) or (time, columns).
      times: an array of shape (time,), the time of each row, in any unit. The default is the number of the row.
      labels: a text for each column, shown in a legend.
      ax: the matplotlib axes to draw into. The default is new ones.
      **style: options of `matplotlib.axes.Axes.plot`.

    Returns:
      The axes.

    Raises:
      ArgumentError: an array has another shape.
      MissingPackageError: matplotlib is not installed.

    Example:
      >>> import jax.numpy as jnp, matplotlib, mutatis as mu
      >>> matplotlib.use("agg")
      >>> times = jnp.linspace(0.0, 10.0, 100)
      >>> ax = mu.inspect.plot.traces(jnp.stack([jnp.sin(times), jnp.cos(times)], axis=1), times, labels=["sin", "cos"])
      >>> len(ax.lines)
      2
    """
    values, times = _over_time(values, times, "traces", dims=None)
    ax = _axes(ax, "traces")
    columns = values.reshape(len(values), -1)
    if labels is not None and len(labels) != columns.shape[1]:
        raise _shape_error("traces", f"{columns.shape[1]} labels, one for each column", show_value(labels))
    lines = ax.plot(times, columns, **style)
    if labels is not None:
        for line, label in zip(lines, labels, strict=True):
            line.set_label(label)
        ax.legend()
    ax.set_xlabel("time")
    return ax


def phase_plane(x: Any, y: Any, *, ax: Any = None, **style: Any) -> Any:
    """Draw one value against another as they change with time, with a dot at the start of each line.

    Args:
      x: an array of shape (time,) or (time, columns), drawn to the right.
      y: an array of the same shape, drawn upwards.
      ax: the matplotlib axes to draw into. The default is new ones.
      **style: options of `matplotlib.axes.Axes.plot`.

    Returns:
      The axes.

    Raises:
      ArgumentError: the arrays have other shapes.
      MissingPackageError: matplotlib is not installed.

    Example:
      >>> import jax.numpy as jnp, matplotlib, mutatis as mu
      >>> matplotlib.use("agg")
      >>> times = jnp.linspace(0.0, 10.0, 100)
      >>> ax = mu.inspect.plot.phase_plane(jnp.sin(times), jnp.cos(times))
      >>> len(ax.lines)  # the line and its dot
      2
    """
    (x, _), (y, _) = _over_time(x, None, "phase_plane", dims=None), _over_time(y, None, "phase_plane", dims=None)
    if x.shape != y.shape:
        raise _shape_error("phase_plane", "two arrays of one shape, with time first", f"{x.shape} and {y.shape}")
    ax = _axes(ax, "phase_plane")
    for line in ax.plot(x.reshape(len(x), -1), y.reshape(len(y), -1), **style):
        ax.plot(line.get_xdata()[:1], line.get_ydata()[:1], "o", color=line.get_color(), markersize=4)
    return ax


def weights(values: Any, times: Any = None, *, ax: Any = None, **style: Any) -> Any:
    """Draw weights over time as an image: one row for each weight, with colors for its values and a color bar.

    Args:
      values: an array of shape (time, ...); the axes after the first count as one.
      times: an array of shape (time,), increasing in equal steps, the time of each row, in any unit. The default is the number
        of the row.
      ax: the matplotlib axes to draw into. The default is new ones.
      **style: options of `matplotlib.axes.Axes.imshow`.

    Returns:
      The axes.

    Raises:
      ArgumentError: an array has another shape.
      MissingPackageError: matplotlib is not installed.

    Example:
      >>> import jax.numpy as jnp, matplotlib, mutatis as mu
      >>> matplotlib.use("agg")
      >>> ax = mu.inspect.plot.weights(jnp.linspace(-1.0, 1.0, 60).reshape(20, 3))  # 20 times, 3 weights
      >>> ax.get_ylabel()
      'weight'
    """
    values, times = _over_time(values, times, "weights", dims=None)
    ax = _axes(ax, "weights")
    rows = values.reshape(len(values), -1).T.astype(np.float64)
    steps = np.diff(times.astype(np.float64))
    if len(steps) and not (steps[0] > 0 and np.allclose(steps, steps[0], rtol=1e-3)):
        raise _shape_error("weights", "times at equal distances, increasing", show_value(times))
    most = float(np.max(np.abs(rows), initial=0.0, where=np.isfinite(rows))) or 1.0
    extent = (float(times[0]), float(times[-1]) if len(times) > 1 else float(times[0]) + 1, -0.5, len(rows) - 0.5)
    defaults = {"aspect": "auto", "origin": "lower", "cmap": "RdBu_r", "vmin": -most, "vmax": most, "extent": extent}
    picture = ax.imshow(rows, **{**defaults, **style})
    ax.figure.colorbar(picture, ax=ax)
    ax.set(xlabel="time", ylabel="weight")
    return ax


def _over_time(values: Any, times: Any, name: str, dims: int | None) -> tuple[Any, Any]:
    values = _numbers(values, name)
    if values.ndim == 0 or len(values) == 0 or (dims is not None and values.ndim != dims):
        expected = "an array with time first" + (" and then neurons" if dims == 2 else "")
        raise _shape_error(name, expected, show_value(values))
    times = np.arange(len(values)) if times is None else _numbers(times, name)
    if times.shape != values.shape[:1]:
        raise _shape_error(name, f"{len(values)} times, one for each row", show_value(times))
    return values, times


def _numbers(given: Any, name: str) -> Any:
    """An array of real numbers as NumPy's; of a quantity the numbers in its unit."""
    if hasattr(given, "to_decimal"):
        given = given.to_decimal(given.unit)
    if isinstance(given, jax.core.Tracer):
        raise _shape_error(name, "numbers that are known: draw outside of compiled functions", show_value(given))
    try:
        array = np.asarray(given)
        return (
            array if array.dtype == bool or array.dtype.kind in "iu" else array.astype(np.float64, casting="same_kind")
        )
    except (TypeError, ValueError):
        raise _shape_error(name, "an array of real numbers", show_value(given)) from None


def _shape_error(name: str, expected: str, got: str) -> ArgumentError:
    return ArgumentError(
        f"`mu.inspect.plot.{name}` cannot draw this",
        expected=expected,
        got=got,
        cure="`monitor.state['v']` of a `mu.recording.Monitor` has time first; of a batch, take one: `record[:, 0]`.",
    )


def _axes(ax: Any, name: str) -> Any:
    return require("matplotlib.pyplot", f"mu.inspect.plot.{name}").subplots()[1] if ax is None else ax
