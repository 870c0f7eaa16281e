"""Draws the pictures of the documentation: `python docs/pictures/make.py`.

Each is written twice beside this file, for light and dark pages, as an SVG whose background is transparent. The same
program writes the same bytes, so a picture that has not changed makes no difference in the history.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

HERE = Path(__file__).parent
MONO = "DejaVu Sans Mono"


@dataclasses.dataclass(frozen=True)
class Colors:
    """Of a page, light or dark."""

    text: str
    faint: str
    line: str
    cell: str  # where states live
    overlay: str  # where writes wait
    code: str  # the user's function
    bad: str


THEMES = {
    "light": Colors("#1f2328", "#57606a", "#57606a", "#cfe8d5", "#fde7b8", "#d6e4fb", "#b42318"),
    "dark": Colors("#e6edf3", "#9aa5b1", "#9aa5b1", "#1f4a33", "#5a4413", "#1d3b66", "#ff8f84"),
}


class Drawing:
    """A figure in units of its own, with boxes, arrows and texts."""

    def __init__(self, width: float, height: float, colors: Colors) -> None:
        self.colors = colors
        self.figure, self.axes = plt.subplots(figsize=(width, height))
        self.axes.set(xlim=(0, 10 * width), ylim=(0, 10 * height))
        self.axes.axis("off")
        self.figure.subplots_adjust(0, 0, 1, 1)

    def box(
        self, x: float, y: float, w: float, h: float, text: str, color: str, mono: bool = False, size: float = 10
    ) -> None:
        """A box with its lower left corner at (x, y)."""
        shape = FancyBboxPatch(
            (x, y),
            w,
            h,
            boxstyle="round,pad=0,rounding_size=1.2",
            facecolor=color,
            edgecolor=self.colors.line,
            linewidth=1,
        )
        self.axes.add_patch(shape)
        self.text(x + w / 2, y + h / 2, text, size=size, mono=mono)

    def frame(self, x: float, y: float, w: float, h: float, title: str, color: str = "none") -> None:
        """A large box with its title at the top."""
        shape = FancyBboxPatch(
            (x, y),
            w,
            h,
            boxstyle="round,pad=0,rounding_size=1.5",
            facecolor=color,
            edgecolor=self.colors.line,
            linewidth=1,
        )
        self.axes.add_patch(shape)
        self.text(x + w / 2, y + h - 2.6, title, size=11, bold=True)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float = 10,
        mono: bool = False,
        bold: bool = False,
        color: str | None = None,
        align: str = "center",
    ) -> None:
        """Text around (x, y)."""
        options: dict[str, Any] = {"family": MONO} if mono else {}
        options |= {"weight": "bold"} if bold else {}
        self.axes.text(x, y, text, size=size, color=color or self.colors.text, ha=align, va="center", **options)

    def arrow(
        self,
        start: tuple[float, float],
        end: tuple[float, float],
        text: str = "",
        above: float = 1.8,
        dashed: bool = False,
        color: str | None = None,
        bend: float = 0.0,
    ) -> None:
        """An arrow, with text at its middle."""
        shape = FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=11,
            linewidth=1.3,
            color=color or self.colors.text,
            linestyle="--" if dashed else "-",
            shrinkA=0,
            shrinkB=0,
            connectionstyle=f"arc3,rad={bend}",
        )
        self.axes.add_patch(shape)
        if text:
            middle = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + above
            self.text(*middle, text, size=9, color=color or self.colors.faint)


def mental_model(colors: Colors) -> Drawing:
    """Cells, an overlay, and the commit."""
    d = Drawing(8.4, 3.2, colors)
    d.frame(2, 5, 22, 24, "your function")
    d.box(4, 17.5, 18, 5.5, "y = self.w * x", colors.code, mono=True, size=9)
    d.box(4, 8.5, 18, 5.5, "self.calls += 1", colors.code, mono=True, size=9)
    d.frame(33, 5, 19, 24, "overlay")
    d.text(42.5, 20.25, "no entry for w", size=9, color=colors.faint)
    d.box(35.5, 8.5, 14, 5.5, "calls  4", colors.overlay, mono=True, size=9)
    d.frame(61, 5, 21, 24, "cells")
    d.box(63.5, 17.5, 16, 5.5, "w      2.0", colors.cell, mono=True, size=9)
    d.box(63.5, 8.5, 16, 5.5, "calls  3", colors.cell, mono=True, size=9)
    d.arrow((63.5, 21.5), (22, 21.5), "", dashed=False)
    d.text(28.5, 23.4, "read", size=9, color=colors.faint)
    d.arrow((22, 11.25), (35.5, 11.25), "write")
    d.arrow((49.5, 11.25), (63.5, 11.25), "commit")
    d.text(56.5, 7.8, "once,\nat the end", size=8, color=colors.faint)
    d.arrow((42.5, 8.5), (42.5, 1.6), "", dashed=True, color=colors.bad)
    d.text(44, 2.6, "dropped, if the function raises", size=8.5, color=colors.bad, align="left")
    return d


def step(colors: Colors) -> Drawing:
    """The first call of a jitted step, and later ones."""
    d = Drawing(8.4, 2.9, colors)
    d.text(2, 23.8, "first call", size=11, bold=True, align="left")
    d.text(2, 9.6, "later calls", size=11, bold=True, align="left")
    first = ["find\nthe states", "trace\nyour code", "compile", "run", "commit"]
    colors_of = [colors.code, colors.code, colors.code, colors.overlay, colors.cell]
    xs = [16, 29.5, 43, 56.5, 70]
    for x, text, color in zip(xs, first, colors_of, strict=True):
        d.box(x, 20, 10.5, 7.5, text, color, size=9.5)
    for left, right in itertools.pairwise(xs):
        d.arrow((left + 10.5, 23.75), (right, 23.75))
    d.box(xs[0], 6, 10.5, 7.5, "check", colors.code, size=9.5)
    d.box(xs[3], 6, 10.5, 7.5, "run", colors.overlay, size=9.5)
    d.box(xs[4], 6, 10.5, 7.5, "commit", colors.cell, size=9.5)
    d.arrow((xs[0] + 10.5, 9.75), (xs[3], 9.75), "nothing decisive has changed", above=1.8)
    d.arrow((xs[3] + 10.5, 9.75), (xs[4], 9.75))
    d.arrow((xs[0] + 5.25, 13.5), (xs[0] + 5.25, 20), dashed=True)
    d.text(xs[0] + 6.5, 16.7, "another shape, flag or layer", size=8.5, color=colors.faint, align="left")
    d.text(xs[3] + 5.25, 3.2, "old values in,\nnew values out", size=8, color=colors.faint)
    d.text(xs[4] + 5.25, 3.2, "into the cells", size=8, color=colors.faint)
    return d


# -- the way of a state through each transform ----------------------------------------------------------------------------


def _panel(colors: Colors, words: str) -> Drawing:
    """A small drawing of 42 by 18 units with a line of words below."""
    d = Drawing(4.2, 1.8, colors)
    d.text(21, 1.7, words, size=8.5, color=colors.faint)
    return d


def jit(colors: Colors) -> Drawing:
    """A state is an input and an output of the program."""
    d = _panel(colors, "an input and an output of one program")
    d.box(3, 8, 7, 5, "w", colors.cell, mono=True)
    d.box(15, 6.5, 12, 8, "program", colors.code, size=9.5)
    d.box(32, 8, 7, 5, "w'", colors.cell, mono=True)
    d.arrow((10, 10.5), (15, 10.5))
    d.arrow((27, 10.5), (32, 10.5))
    return d


def grad(colors: Colors) -> Drawing:
    """A parameter gets a gradient, and another state is written once."""
    d = _panel(colors, "a gradient for each parameter; all writes happen once")
    d.box(2, 11.5, 7, 4.5, "w", colors.cell, mono=True)
    d.box(2, 4.5, 7, 4.5, "calls", colors.cell, mono=True, size=8.5)
    d.box(14, 5.5, 11, 9.5, "loss", colors.code, size=9.5)
    d.box(30, 11.5, 10, 4.5, "dloss/dw", colors.overlay, mono=True, size=8.5)
    d.box(30, 4.5, 10, 4.5, "calls'", colors.cell, mono=True, size=8.5)
    d.arrow((9, 13.7), (14, 12.6))
    d.arrow((9, 6.7), (14, 8))
    d.arrow((25, 12.6), (30, 13.7))
    d.arrow((25, 8), (30, 6.7))
    return d


def vmap(colors: Colors) -> Drawing:
    """A state is split among the lanes, or shared."""
    d = _panel(colors, "split among the lanes, or shared by all")
    for i, y in enumerate((13.2, 8.8, 4.4)):
        d.box(6, y, 7, 3.6, f"w[{i}]", colors.cell, mono=True, size=8)
        d.box(18, y, 9, 3.6, f"lane {i}", colors.code, size=8)
        d.arrow((13, y + 1.8), (18, y + 1.8))
        d.arrow((33, 10.6), (27, y + 1.8), color=colors.faint)
    d.box(33, 8.1, 5, 5, "s", colors.cell, mono=True)
    return d


def scan(colors: Colors) -> Drawing:
    """A state that the body writes is carried."""
    d = _panel(colors, "written states are carried; results are stacked")
    for i, x in enumerate((5, 17, 29)):
        d.box(x, 9.5, 8, 5.5, f"body {i}", colors.code, size=8.5)
        d.arrow((x + 4, 9.5), (x + 4, 5.6), color=colors.faint)
        d.text(x + 4, 4.4, f"y[{i}]", size=8.5, mono=True)
    d.arrow((1, 12.2), (5, 12.2), "h")
    d.arrow((13, 12.2), (17, 12.2), "h")
    d.arrow((25, 12.2), (29, 12.2), "h")
    d.arrow((37, 12.2), (41, 12.2), "h")
    return d


def while_loop(colors: Colors) -> Drawing:
    """The condition reads states, and the body writes them."""
    d = _panel(colors, "the condition may read states, the body may write them")
    d.box(3, 8, 7, 5, "n", colors.cell, mono=True)
    d.box(16, 8, 10, 5, "n < 10 ?", colors.code, mono=True, size=8.5)
    d.box(32, 8, 7, 5, "n'", colors.cell, mono=True)
    d.box(16, 3.4, 10, 3.2, "n += 3", colors.code, mono=True, size=8)
    d.arrow((10, 10.5), (16, 10.5))
    d.arrow((26, 10.5), (32, 10.5), "no")
    d.arrow((26, 9), (26, 5), bend=-0.9)
    d.arrow((16, 5), (16, 9), bend=-0.9)
    d.text(29.8, 6.4, "yes", size=9, color=colors.faint)
    return d


def cond(colors: Colors) -> Drawing:
    """The branch that is not taken leaves a state alone."""
    d = _panel(colors, "the branch that is not taken leaves the state alone")
    d.box(3, 8, 7, 5, "n", colors.cell, mono=True)
    d.box(16, 11.8, 10, 4, "n += 1", colors.code, mono=True, size=8.5)
    d.box(16, 5.2, 10, 4, "pass", colors.code, mono=True, size=8.5)
    d.box(32, 8, 7, 5, "n'", colors.cell, mono=True)
    d.arrow((10, 11), (16, 13.8))
    d.arrow((10, 10), (16, 7.2), dashed=True, color=colors.faint)
    d.arrow((26, 13.8), (32, 11))
    d.arrow((26, 7.2), (32, 10), dashed=True, color=colors.faint)
    return d


def remat(colors: Colors) -> Drawing:
    """The block runs again for the gradient, and writes once."""
    d = _panel(colors, "the second run reads the same values and writes nothing")
    d.box(3, 11, 14, 5, "block, forward", colors.code, size=8.5)
    d.box(25, 11, 14, 5, "block, again", colors.code, size=8.5)
    d.box(6, 4, 8, 4, "state", colors.cell, mono=True, size=8.5)
    d.box(28, 4, 8, 4, "gradient", colors.overlay, size=8.5)
    d.arrow((17, 13.5), (25, 13.5), "inputs")
    d.arrow((10, 11), (10, 8))
    d.text(11, 9.5, "once", size=8.5, color=colors.faint, align="left")
    d.arrow((32, 11), (32, 8))
    return d


def custom_vjp(colors: Colors) -> Drawing:
    """The forward rule may write, and the backward rule may not."""
    d = _panel(colors, "both rules read states; only the forward pass writes")
    d.box(3, 10.5, 13, 5, "fwd", colors.code, mono=True)
    d.box(26, 10.5, 13, 5, "bwd", colors.code, mono=True)
    d.box(14.5, 3.8, 13, 4, "states", colors.cell, size=8.5)
    d.arrow((16, 13), (26, 13), "residuals")
    d.arrow((10, 10.5), (14.5, 6.6))
    d.text(8.2, 8, "write", size=8.5, color=colors.faint)
    d.arrow((27.5, 6.6), (32, 10.5))
    d.text(33.5, 8, "read", size=8.5, color=colors.faint)
    return d


def shard_map(colors: Colors) -> Drawing:
    """A state is split over devices, or each device has a copy."""
    d = _panel(colors, "split over the devices, or a copy on each")
    for i, y in enumerate((11, 4.4)):
        d.box(4, y, 9, 5, f"w, part {i}", colors.cell, size=8)
        d.box(17, y, 10, 5, f"device {i}", colors.code, size=8)
        d.box(31, y, 7, 5, "s", colors.cell, mono=True)
        d.arrow((13, y + 2.5), (17, y + 2.5))
        d.arrow((31, y + 2.5), (27, y + 2.5))
    d.arrow((34.5, 9.4), (34.5, 11), color=colors.faint)
    d.arrow((34.5, 11), (34.5, 9.4), color=colors.faint)
    d.text(39.6, 10.2, "equal", size=8, color=colors.faint)
    return d


PICTURES: dict[str, Callable[[Colors], Drawing]] = {
    draw.__name__: draw
    for draw in (mental_model, step, jit, grad, vmap, scan, while_loop, cond, remat, custom_vjp, shard_map)
}


def write(name: str, folder: Path = HERE) -> list[Path]:
    """Write a picture in both themes; gives the files."""
    files = []
    for theme, colors in THEMES.items():
        with matplotlib.rc_context({"svg.hashsalt": name, "font.family": "DejaVu Sans"}):
            figure = PICTURES[name](colors).figure
            files.append(folder / f"{name}_{theme}.svg")
            figure.savefig(files[-1], transparent=True, metadata={"Date": None, "Creator": None})
            plt.close(figure)
    return files


if __name__ == "__main__":
    for each in PICTURES:
        write(each)
