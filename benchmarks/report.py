"""Run all benchmarks and write their rows, with the goals beside the figures, into docs/performance.md, with a plot.

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
PAGE = HERE.parent / "docs" / "performance.md"
PLOT = PAGE.with_suffix(".svg")
DATA = PAGE.with_suffix(".json")
SCRIPTS = {
    "calls": "What a call costs",
    "loops": "What people do around a call",
    "workloads": "Whole programs",
    "eager": "Without `mu.jit`",
    "programs": "What is compiled, and how long that takes",
    "pretraining": "Tracing a pretraining step",
    "decoding": "Decoding, one jitted call per token",
    "imports": "The import",
    "graph": "State operations, a train step, and building a model, beside other libraries",
}


def run(script: str, arguments: list[str]) -> dict[str, Any]:
    """The rows of one benchmark, and where it ran."""
    peers = ["--peers"] if script == "graph" else []
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


def plot(every: list[timing.Row]) -> None:
    """All ratios that have a goal, each as a dot beside its goal."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "mutatis", "svg.fonttype": "none"})
    from matplotlib import pyplot

    rows = [row for row in every if row.goal and not row.unit and row.value > 0][::-1]
    figure, axes = pyplot.subplots(figsize=(9, 0.22 * len(rows) + 1))
    for place, row in enumerate(rows):
        axes.plot([row.value], [place], "o", color="tab:green" if row.met else "tab:red", markersize=5)
        axes.plot([row.goal, row.goal], [place - 0.35, place + 0.35], color="black", linewidth=1.5)
    axes.set_yticks(range(len(rows)), [f"{row.what}, to {row.against}" for row in rows], fontsize=7)
    axes.set_xscale("log")
    axes.axvline(1.0, color="lightgray", linewidth=1, zorder=0)
    axes.set_xlabel("cost as a ratio to the other way; the bar is the goal, green where it is met")
    figure.tight_layout()
    figure.savefig(PLOT, metadata={"Date": None})


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
        plot([row for script in [*SCRIPTS][:-1] if script in data for row in rows_of(data[script])])


def rows_of(found: dict[str, Any]) -> list[timing.Row]:
    """The rows in what a benchmark printed."""
    return [timing.Row(**row) for row in found["rows"]]


if __name__ == "__main__":
    main()
