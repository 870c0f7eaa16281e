"""What is left of a checkpoint when its saver is killed, its files are damaged, or several save at once: counted, many times.

`python benchmarks/reliability.py` runs it all, some twenty minutes, and `--write` puts the table into docs/reliability.md;
`make test-all` does that too. Savers are programs of their own, killed at random moments. What a restore gives is compared bit
for bit with what was saved at that step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mutatis as mu
from mutatis import checkpoint
from mutatis.errors import CheckpointError

PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
SIZE = 20_000


def model(step: int = 0) -> dict[str, Any]:
    """Some states, all of which say which step it is."""
    return {
        "w": mu.Param(jnp.full((SIZE,), step, jnp.float32)),
        "b": [mu.BatchStat(jnp.full((7, 3), step, jnp.bfloat16)), mu.Variable(jnp.int32(step))],
        "rngs": mu.Rngs(step),
    }


def step_of(states: dict[str, Any]) -> int:
    """Which step a model is of, if all its states are of one.

    Raises:
      AssertionError: they are of several.
    """
    step = int(states["b"][1].value)
    assert mu.state(states) == mu.state(model(step)), "states of several steps"
    return step


# -- killed savers -----------------------------------------------------------------------------------------------------

SAVER = """
import sys
import jax
if len(sys.argv) > 3:
    jax.distributed.initialize(sys.argv[3], 2, int(sys.argv[4]))
sys.path.insert(0, {here!r})
import reliability
from mutatis import checkpoint
how, path = sys.argv[1:3]
step = 0
manager = checkpoint.Manager(path, keep=2, background=how == "background") if how != "one path" else None
while True:
    step += 1
    states = reliability.model(step)
    if manager is None:
        checkpoint.save(path, states)
        print(step, flush=True)
    else:
        manager.save(step, states)
        # What is saved in the background is acknowledged when the next save begins.
        print(step - (how == "background"), flush=True)
"""


def start_saver(how: str, path: Path, count: int) -> list[subprocess.Popen[str]]:
    """One saver, or two processes that save together."""
    code = SAVER.format(here=str(Path(__file__).parent))
    more: list[list[str]] = [[]]
    if count > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        more = [[address, str(number)] for number in range(count)]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    quiet: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True, "env": env}
    return [subprocess.Popen([sys.executable, "-c", code, how, str(path), *rest], **quiet) for rest in more]


def kill(how: str, count: int, seed: int) -> str:
    """Kill a saver at a random moment; what became of its checkpoints."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "saved"
        jobs = start_saver(how, path, count)
        assert jobs[0].stdout is not None
        acknowledged = 0
        for _ in range(rng.randint(1, 4)):
            for line in jobs[0].stdout:
                if line.strip().isdigit():
                    acknowledged = int(line)
                    break
        time.sleep(rng.uniform(0, 0.12))
        jobs[rng.randrange(count)].send_signal(signal.SIGKILL)
        if count > 1:
            time.sleep(0.05)
        for job in jobs:
            job.kill()
        for line in jobs[0].communicate()[0].splitlines():
            acknowledged = max(acknowledged, int(line) if line.strip().isdigit() else 0)
        found = model(-1)
        if how == "one path":
            checkpoint.restore(path, found)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # a half-visible one would be skipped, with a warning
                if checkpoint.Manager(path).restore(found) is None:
                    return "whole" if acknowledged == 0 else "lost"
        return "whole" if step_of(found) >= acknowledged else "lost"


def kills(number: int) -> list[tuple[str, int, Counter[str]]]:
    """Rows of the table."""
    kinds = [("one path", 1), ("a directory for each step", 1), ("background", 1), ("background", 2)]
    shares = [0.3, 0.3, 0.3, 0.1]
    rows = []
    for (how, count), share in zip(kinds, shares, strict=True):
        seeds = range(max(1, round(number * share)))
        with ThreadPoolExecutor(2) as pool:
            found = Counter(pool.map(lambda seed, how=how, count=count: kill(how, count, seed), seeds))
        name = f"SIGKILL, {how}" + (", one of two processes" if count > 1 else "")
        rows.append((name, len(seeds), found))
    return rows


# -- damaged files -----------------------------------------------------------------------------------------------------


def files_in(path: Path) -> list[Path]:
    """The files of a checkpoint."""
    return sorted(file for file in path.rglob("*") if file.is_file())


def truncate(path: Path, rng: random.Random) -> None:
    """A file is shorter."""
    file = rng.choice(files_in(path))
    data = file.read_bytes()
    file.write_bytes(data[: rng.randrange(len(data) + 1)])


def flip(path: Path, rng: random.Random) -> None:
    """A bit is another."""
    file = rng.choice([file for file in files_in(path) if file.stat().st_size])
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(bytes(data))


def remove(path: Path, rng: random.Random) -> None:
    """A file is missing."""
    rng.choice(files_in(path)).unlink()


def add(path: Path, rng: random.Random) -> None:
    """A foreign file."""
    folder = rng.choice([path, *(p for p in path.rglob("*") if p.is_dir())])
    (folder / rng.choice(["x", ".hidden", "arrays-9", "0.bin"])).write_bytes(rng.randbytes(30))


def link(path: Path, rng: random.Random) -> None:
    """A link, to itself, to nothing, or to another file."""
    file = rng.choice(files_in(path))
    others = [file, path / "nowhere", *files_in(path)]
    target = rng.choice(others)
    file.unlink()
    file.symlink_to(target)


def pipe(path: Path, rng: random.Random) -> None:
    """A pipe that nobody writes to."""
    file = rng.choice(files_in(path))
    file.unlink()
    os.mkfifo(file)


def swap_kind(path: Path, rng: random.Random) -> None:
    """A directory where a file was, or a file where a directory was."""
    if rng.random() < 0.5:
        file = rng.choice(files_in(path))
        file.unlink()
        file.mkdir()
    else:
        folder = rng.choice([p for p in path.rglob("*") if p.is_dir()])
        shutil.rmtree(folder)
        folder.write_bytes(b"")


def edit(path: Path, rng: random.Random) -> None:
    """The manifest is edited, and its checksum is right."""
    file = path / "mutatis.json"
    data = json.loads(file.read_text())
    strange: list[Any] = [
        None,
        -1,
        0,
        1 << 62,
        1.5,
        "",
        "../../x",
        "/etc/passwd",
        [],
        {},
        True,
        "float64",
        [1 << 40],
        "key<fry>",
    ]
    deep: Any = "*"
    for _ in range(rng.choice([3, 150, 800])):
        deep = ["list", [[0, deep]]]

    def places(value: Any) -> Iterator[tuple[Any, Any]]:
        items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            yield value, key
            yield from places(inner)

    spots = list(places([data["states"], data["files"], data["number"]]))
    for _ in range(rng.randint(1, 2)):
        holder, key = rng.choice(spots)
        others = [*holder.values()] if isinstance(holder, dict) else holder
        holder[key] = rng.choice([*strange, deep, rng.choice(others)])
    if rng.random() < 0.3:
        data["number"] = rng.choice(strange)
    with contextlib.suppress(RecursionError, ValueError):
        data["crc"] = zlib.crc32(json.dumps([data["number"], data["files"], data["states"]]).encode())
        file.write_text(json.dumps(data))


DAMAGES: list[Callable[[Path, random.Random], None]] = [truncate, flip, remove, add, link, pipe, swap_kind, edit, edit]


def damages(number: int) -> list[tuple[str, int, Counter[str]]]:
    """Rows of the table."""
    rows: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        whole, path = Path(folder) / "whole", Path(folder) / "damaged"
        checkpoint.save(whole, model(3))
        target = model(-1)
        before = mu.state(target)
        for seed in range(number):
            rng, damage = random.Random(seed), DAMAGES[seed % len(DAMAGES)]
            shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(whole, path)
            damage(path, rng)
            found = rows.setdefault(str(damage.__doc__).rstrip("."), Counter())
            signal.alarm(30)  # a hang ends the program
            try:
                checkpoint.restore(path, target)
            except CheckpointError:
                found["refused" if mu.state(target) == before else "model changed"] += 1
            except Exception as error:
                found[type(error).__name__] += 1
            else:
                right = mu.state(target) == mu.state(model(3))
                found["right" if right else "wrong arrays"] += 1
                target = model(-1)
            finally:
                signal.alarm(0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return [(f"{name} (memory at most {peak:.1f} GB)", sum(found.values()), found) for name, found in rows.items()]


# -- several savers ------------------------------------------------------------------------------------------------------


def several(seconds: float) -> list[tuple[str, int, Counter[str]]]:
    """Savers of one path, and a reader."""
    rows = []
    for count in (2, 3):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "saved"
            jobs = [job for _ in range(count) for job in start_saver("one path", path, 1)]
            found: Counter[str] = Counter()
            while not path.exists():
                time.sleep(0.05)
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                states = model(-1)
                checkpoint.restore(path, states)
                step_of(states)
                found["whole"] += 1
            for job in jobs:
                job.kill()
                job.communicate()
            rows.append((f"{count} savers of one path, and a reader", sum(found.values()), found))
    return rows


# -- what the disk says ------------------------------------------------------------------------------------------------


def disks() -> list[tuple[str, int, Counter[str]]]:
    """Rows of the table: what cannot be written is one clear error, and what was there stays."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "saved"
        checkpoint.save(path, model(1))

        def full() -> None:
            limit = resource.getrlimit(resource.RLIMIT_FSIZE)
            before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE, limit[1]))
            try:
                checkpoint.save(path, {"w": mu.Param(jax.random.normal(jax.random.key(0), (SIZE,)))})
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limit)
                signal.signal(signal.SIGXFSZ, before)

        def a_file() -> None:
            (Path(folder) / "file").write_text("mine")
            checkpoint.save(Path(folder) / "file", model(2))

        def below_a_file() -> None:
            checkpoint.save(Path(folder) / "file" / "saved", model(2))

        def not_ours() -> None:
            (Path(folder) / "other").mkdir()
            (Path(folder) / "other" / "thesis.tex").write_text("mine")
            checkpoint.save(Path(folder) / "other", model(2))

        for name, use in [
            ("no room for the arrays", full),
            ("a file at the path", a_file),
            ("a path below a file", below_a_file),
            ("a directory of something else", not_ours),
            ("a device", lambda: checkpoint.save("/dev/null", model(2))),
        ]:
            found: Counter[str] = Counter()
            try:
                use()
                found["saved"] += 1
            except CheckpointError:
                states = model(-1)
                checkpoint.restore(path, states)
                found["refused" if step_of(states) == 1 else "lost"] += 1
            rows.append((name, 1, found))
    return rows


# -- the table -----------------------------------------------------------------------------------------------------------

GOOD = {"whole", "right", "refused"}


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write if asked to; 1 if anything was lost or wrong."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--damages", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=30.0, help="of several savers at once")
    parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")
    given = parser.parse_args(arguments)
    rows = [*disks(), *damages(given.damages), *several(given.seconds), *kills(given.kills)]
    lines = ["| what happened | times | what became of it | |", "|---|---:|---|---|"]
    bad = 0
    for name, number, found in rows:
        fine = not {*found} - GOOD
        bad += not fine
        became = ", ".join(f"{what}: {times}" for what, times in sorted(found.items()))
        lines.append(f"| {name} | {number} | {became} | {'' if fine else '**bad**'} |")
    table = "\n".join(lines)
    print(table)
    if given.write:
        where = f"Measured with jax {jax.__version__}, python {sys.version.split()[0]}, {os.cpu_count()} cores."
        page = PAGE.read_text()
        before, _, rest = page.partition("<!-- table -->\n")
        _, _, after = rest.partition("<!-- end of table -->")
        PAGE.write_text(f"{before}<!-- table -->\n{where}\n\n{table}\n<!-- end of table -->{after}")
    return int(bad > 0)


if __name__ == "__main__":
    np.seterr(all="ignore")
    sys.exit(main())
