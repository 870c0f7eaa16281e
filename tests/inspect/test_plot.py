"""Plots: what is drawn is what the arrays hold; bad shapes and a missing package are named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import mutatis as mu
from mutatis.errors import ArgumentError, MissingPackageError
from mutatis.inspect import plot

matplotlib = pytest.importorskip("matplotlib")
pytestmark = pytest.mark.once


@pytest.fixture(autouse=True)
def _no_windows(monkeypatch: pytest.MonkeyPatch) -> Any:
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    yield
    plt.close("all")


def test_a_raster_has_a_dot_for_each_spike() -> None:
    spikes = np.zeros((10, 3))
    spikes[[1, 4, 4], [0, 2, 1]] = 1
    ax = plot.raster(spikes, times=np.arange(10) * 0.5)
    dots = sorted(map(tuple, ax.collections[0].get_offsets().tolist()))
    assert dots == [(0.5, 0.0), (2.0, 1.0), (2.0, 2.0)]
    assert plot.raster(spikes, ax=ax, color="red") is ax


def test_traces_have_a_line_for_each_column() -> None:
    values = np.random.default_rng(0).standard_normal((20, 3))
    ax = plot.traces(values, labels=["a", "b", "c"])
    for line, column in zip(ax.lines, values.T, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), column)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b", "c"]
    assert len(plot.traces(values[:, 0]).lines) == 1


def test_a_phase_plane_begins_with_a_dot() -> None:
    t = np.linspace(0, 6, 50)
    ax = plot.phase_plane(np.cos(t), np.sin(t))
    line, dot = ax.lines
    np.testing.assert_array_equal(line.get_xdata(), np.cos(t))
    assert (dot.get_xdata()[0], dot.get_ydata()[0]) == (1.0, 0.0)


def test_weights_are_rows_of_a_picture() -> None:
    values = np.random.default_rng(0).standard_normal((20, 2, 3))
    ax = plot.weights(values)
    np.testing.assert_array_equal(ax.images[0].get_array(), values.reshape(20, 6).T)
    assert len(ax.figure.axes) == 2  # and a scale
    low, high = ax.images[0].get_clim()
    assert low == -high == -np.abs(values).max()


def test_a_record_is_drawn() -> None:
    net = mu.nn.LIF(4)
    monitor = mu.recording.Monitor(net, "v", "spikes", length=30, every=3)

    def step(x: Any) -> None:
        net(x)
        monitor()

    mu.for_loop(step, np.full((30, 4), 1.5, np.float32))
    ax = plot.traces(monitor.state["v"], monitor.times)
    assert ax.lines[0].get_xdata().tolist() == list(range(0, 30, 3))


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plot.raster(np.zeros(3)),
        lambda: plot.raster(np.zeros((3, 2, 2))),
        lambda: plot.traces(3.0),
        lambda: plot.traces(np.zeros((0, 2))),
        lambda: plot.traces(np.zeros((3, 2)), times=np.zeros(4)),
        lambda: plot.phase_plane(np.zeros(3), np.zeros(4)),
        lambda: plot.weights(np.float32(1)),
    ],
)
def test_bad_shapes(draw: Any) -> None:
    with pytest.raises(ArgumentError, match="cannot draw this"):
        draw()


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match=r"needs the package `matplotlib`"):
        plot.traces(np.zeros(3))


def test_colors_of_narrow_and_of_missing_numbers() -> None:
    for values, most in (
        (np.array([[-128, 3], [1, 2]], np.int8), 128.0),
        (np.array([[np.nan, 3.0], [-5.0, np.inf]]), 5.0),
        (np.array([[True], [False]]), 1.0),
    ):
        (picture,) = plot.weights(values).images
        assert (picture.norm.vmin, picture.norm.vmax) == (-most, most)


def test_a_quantity_is_drawn_in_its_unit() -> None:
    u = pytest.importorskip("saiunit")
    ax = plot.traces(np.arange(3.0) * u.mV, np.arange(3.0) * u.ms)
    assert ax.lines[0].get_ydata().tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plot.traces(np.ones((3, 2)), labels=["a"]),
        lambda: plot.traces(np.ones(3) * 1j),
        lambda: plot.weights(np.ones((3, 2)), times=[0.0, 1.0, 5.0]),
        lambda: plot.raster(np.array([["a"]])),
        lambda: mu.jit(lambda x: plot.traces(x) and x)(np.ones(3)),
    ],
)
def test_what_is_no_record(draw: Any) -> None:
    with pytest.raises(ArgumentError, match="cannot draw this"):
        draw()
