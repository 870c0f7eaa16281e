"""Run all benchmarks and write their rows, with the goals beside the figures, into docs/benchmarks.md, with a plot.

Each benchmark runs in a process of its own, one after the other. Without ``--write`` the tables are only printed. What was
written is kept as data too, so that one benchmark can be run again without the others.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import timing

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
DATA = PAGE.with_suffix(".json")
SCRIPTS = {
    "counts": "Counted, not timed",
    "calls": "What a call costs",
    "loops": "What people do around a call",
    "workloads": "Whole programs",
    "eager": "Without `mu.jit`",
    "programs": "What is compiled, and how long that takes",
    "pretraining": "Tracing a pretraining step",
    "decoding": "Decoding, one jitted call per token",
    "spiking": "Loops over time",
    "imports": "The import",
    "graph": "State operations, a train step, and building a model, beside other libraries",
}

PLOTTED = ("calls", "workloads")
THEMES = {"light": ("#1f2328", "#1a7f37", "#bc4c00"), "dark": ("#e6edf3", "#3fb950", "#f0883e")}  # text, met, missed


def run(script: str, arguments: list[str]) -> dict[str, Any]:
    """The rows of one benchmark, and where it ran."""
    peers = ["--peers"] if script in ("graph", "workloads") else []  # those that are installed
    command = [sys.executable, str(HERE / f"{script}.py"), "--json", *peers, *arguments]
    print(f"{script} ...", file=sys.stderr, flush=True)
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    found: dict[str, Any] = json.loads(out)
    return found


def table(rows: list[timing.Row]) -> str:
    """Rows in Markdown."""
    lines = ["| what | against | figure | goal | |", "|---|---|---:|---:|---|"]
    for row in rows:
        goal = "" if row.goal is None else f"{'≥' if row.floor else '≤'} {row.goal:.2f}"
        met = {None: "", True: "met", False: "**missed**"}[row.met]
        note = ". ".join(filter(None, [met, row.note]))
        lines.append(f"| {row.what} | {row.against} | {timing.figure(row)} | {goal} | {note} |")
    return "\n".join(lines)


def plot(data: dict[str, Any], folder: Path = PAGE.parent) -> list[Path]:
    """The ratios of calls and of whole programs, each as a dot beside its goal, for light and dark pages; gives the files."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    every = [row for script in PLOTTED if script in data for row in rows_of(data[script])]
    rows = [row for row in every if row.goal and not row.unit and row.value > 0][::-1]
    files = []
    for theme, (text, met, missed) in THEMES.items():
        colors = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), text)
        with matplotlib.rc_context({"svg.hashsalt": "mutatis", **colors}):
            figure, axes = pyplot.subplots(figsize=(8.4, 0.21 * len(rows) + 0.8))
            for place, row in enumerate(rows):
                axes.plot([row.value], [place], "o", color=met if row.met else missed, markersize=5)
                axes.plot([row.goal, row.goal], [place - 0.35, place + 0.35], color=text, linewidth=1.5)
            axes.set_yticks(range(len(rows)), [f"{row.what}, to {row.against}" for row in rows], fontsize=7)
            axes.set(
                ylim=(-0.8, len(rows) - 0.2), xscale="log", xlabel="ratio; the bar is the goal, and orange misses it"
            )
            axes.axvline(1.0, color="gray", linewidth=0.8, zorder=0)
            figure.tight_layout()
            files.append(folder / f"{PAGE.stem}_{theme}.svg")
            figure.savefig(files[-1], transparent=True, metadata={"Date": None, "Creator": None})
            pyplot.close(figure)
    return files


def write(title: str, text: str) -> None:
    """Replace what stands in the page between the two marks of a section."""
    page = PAGE.read_text()
    begin, end = f"<!-- {title} -->\n", f"<!-- end of {title} -->"
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    PAGE.write_text(f"{before}{begin}{text}\n{end}{after}")


def main() -> None:
    """Run, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", type=lambda text: text.split(","), default=[*SCRIPTS][:-1], help="calls,imports,...")
    parser.add_argument("--rounds", help="how often each batch of calls is timed, instead of each script's own number")
    parser.add_argument("--write", action="store_true", help="put the tables and the plot into docs/")
    options = parser.parse_args()

    arguments = ["--rounds", options.rounds] if options.rounds else []
    data: dict[str, Any] = json.loads(DATA.read_text()) if DATA.exists() else {}
    for script in options.only:
        data[script] = run(script, arguments)
        rows = rows_of(data[script])
        where = ", ".join(f"{key} {value}" for key, value in data[script].items() if key != "rows")
        print(f"\n{SCRIPTS[script]} ({where})\n\n{timing.show(rows)}\n", flush=True)
        if options.write:
            write(script, f"Measured with {where}.\n\n{table(rows)}")
            DATA.write_text(json.dumps(data, indent=1) + "\n")
    if options.write:
        plot(data)


def rows_of(found: dict[str, Any]) -> list[timing.Row]:
    """The rows in what a benchmark printed."""
    return [timing.Row(**row) for row in found["rows"]]


if __name__ == "__main__":
    main()
