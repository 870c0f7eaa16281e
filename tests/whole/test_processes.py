"""Several real processes on one machine, by JAX's own distributed runtime: they train, look, save, restore and are killed."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis.checkpoint import Manager

pytestmark = pytest.mark.once
ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "multihost.py"


def start(command: list[str], count: int, devices: int = 4) -> list[subprocess.Popen[str]]:
    """The same program in several processes; each gets the coordinator's address, how many there are, and its number."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    strict = ("JAX_NUMPY_DTYPE_PROMOTION", "JAX_NUMPY_RANK_PROMOTION")
    env = {name: value for name, value in os.environ.items() if name not in strict}
    env |= {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    jobs = []
    for number in range(count):
        many = ["--coordinator", address, "--processes", str(count), "--number", str(number)] if count > 1 else []
        jobs.append(
            subprocess.Popen(
                [sys.executable, *command, *many], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    return jobs


def run(command: list[str], count: int, devices: int = 4) -> list[str]:
    """What each of them prints; the errors of all, if one fails."""
    jobs = start(command, count, devices)
    shown = [job.communicate(timeout=300) for job in jobs]
    assert all(job.returncode == 0 for job in jobs), "\n\n".join(errors[-3000:] for _, errors in shown)
    return [out for out, _ in shown]


def loss_in(shown: list[str]) -> float:
    return float(re.findall(r"loss ([\d.]+)", "".join(shown))[-1])


@pytest.mark.slow
def test_the_example_on_one_and_two_processes(tmp_path: Path) -> None:
    def example(directory: str, steps: int) -> list[str]:
        return [str(EXAMPLE), "--directory", str(tmp_path / directory), "--steps", str(steps)]

    alone = loss_in(run(example("alone", 40), 1, devices=8))
    assert loss_in(run(example("both", 20), 2)) > alone
    assert loss_in(run(example("both", 40), 1, devices=2)) == pytest.approx(alone, abs=2e-6)
    assert loss_in(run(example("both", 40), 2)) == pytest.approx(0, abs=1e-9), "there is nothing left to do"
    assert sorted(os.listdir(tmp_path / "both")) == ["step_000000020", "step_000000040"]


LOOKING = """
import argparse, os, sys
import jax, jax.numpy as jnp, numpy as np, optax
parser = argparse.ArgumentParser()
for name in ("coordinator", "processes", "number", "path"):
    parser.add_argument("--" + name)
args = parser.parse_args()
jax.distributed.initialize(args.coordinator, int(args.processes), int(args.number))
import mutatis as mu
from mutatis import nn
from jax.sharding import PartitionSpec as P, NamedSharding

mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
net = mu.sharding.place(nn.Linear(8, 8, rngs=mu.Rngs(0)), {"kernel": P("x"), ...: P()}, mesh=mesh)
count, rngs, kept = mu.Variable(0), mu.Rngs(0), []
traces = []

@mu.jit
def step(net, count, rngs):
    traces.append(1)
    count.value += 1
    net.kernel.value = net.kernel + 1
    return jnp.sum(net.kernel.value) + jax.random.normal(rngs())

for number in range(6):
    out = step(net, count, rngs)
    if jax.process_index() == 0:  # a look on one process only
        kept.append((net.kernel.value, mu.state(net), float(count)))
        mu.snapshot(net)
    if number == 2:
        net.kernel.value = np.ones((8, 8), np.float32)  # the same on each
assert len(traces) == 1, traces
for kernel, state, _ in kept:
    assert len(kernel.addressable_shards) == 4 and kernel.sharding.spec == P("x")
    [np.asarray(shard.data) for shard in kernel.addressable_shards]
assert net.kernel.value.sharding.spec == P("x"), net.kernel.value.sharding
assert float(count) == 6 and count.value.sharding.is_fully_replicated
local = mu.Variable(jnp.arange(3.0))
mu.checkpoint.save(args.path, [net, count, rngs, local])
other = mu.sharding.place(nn.Linear(8, 8, rngs=mu.Rngs(1)), {"kernel": P(None, "x"), ...: P()}, mesh=mesh)
mu.checkpoint.restore(args.path, [other, mu.Variable(0), mu.Rngs(3), mu.Variable(jnp.zeros(3))])
assert other.kernel.value.sharding.spec == P(None, "x")
moved = jax.device_put(net.kernel.value, other.kernel.value.sharding)
total = jax.jit(lambda a, b: jnp.sum(jnp.abs(a - b)))(other.kernel.value, moved)
print("same", float(total), float(out))
try:
    mu.checkpoint.save("/proc/nowhere/it", net)
except mu.errors.CheckpointError as error:
    print("refused", error.problem)
"""


def test_a_look_on_one_process_and_a_checkpoint_by_both(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(LOOKING)
    shown = run([str(program), "--path", str(tmp_path / "saved")], 2)
    found = [re.findall(r"same (\S+) (\S+)", each) for each in shown]
    assert found[0] == found[1] and found[0][0][0] == "0.0"
    assert all("refused" in each for each in shown), "what one finds, all are told"
    net = mu.nn.Linear(8, 8, rngs=mu.Rngs(1))
    count, local = mu.Variable(0), mu.Variable(jnp.zeros(3))
    mu.checkpoint.restore(tmp_path / "saved", [net, count, mu.Rngs(0), local])
    assert int(count) == 6 and float(net.kernel.value[0, 0]) == 4
    np.testing.assert_array_equal(local.value, jnp.arange(3.0))


LATE = """
import argparse, sys
import jax
parser = argparse.ArgumentParser()
for name in ("coordinator", "processes", "number", "path"):
    parser.add_argument("--" + name)
args = parser.parse_args()
jax.distributed.initialize(args.coordinator, int(args.processes), int(args.number))
import mutatis as mu
if jax.process_index() == 0:
    manager = mu.checkpoint.Manager(args.path, background=False, timeout=2)
    try:
        from mutatis.checkpoint.processes import Processes
        Processes("save", 2).each(lambda: None)
    except mu.errors.CheckpointError as error:
        print(error)
jax.experimental.multihost_utils.sync_global_devices("end") if hasattr(jax, "experimental") else None
"""


def test_the_late_one_is_named(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import jax.experimental.multihost_utils\n" + LATE)
    shown = run([str(program), "--path", str(tmp_path / "saved")], 2, devices=1)
    assert "process 1 is late for `save`" in shown[0] and "within 2 seconds" in shown[0]


@pytest.mark.slow
def test_four_processes(tmp_path: Path) -> None:
    command = [str(EXAMPLE), "--directory", str(tmp_path / "four"), "--steps"]
    alone = loss_in(run([str(EXAMPLE), "--directory", str(tmp_path / "alone"), "--steps", "40"], 1, devices=8))
    run([*command, "20"], 4, devices=2)
    assert loss_in(run([*command, "40"], 2)) == pytest.approx(alone, abs=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_one_of_two_is_killed(seed: int, tmp_path: Path) -> None:
    """The newest checkpoint that there is restores, and the job goes on from it."""
    command = [str(EXAMPLE), "--directory", str(tmp_path / "run"), "--steps", "100000"]
    rng = np.random.default_rng(seed)
    jobs = start(command, 2)
    deadline = time.monotonic() + 120
    while not Manager(tmp_path / "run").steps and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(float(rng.uniform(0, 1)))
    jobs[int(rng.integers(2))].send_signal(signal.SIGKILL)
    time.sleep(0.5)
    for job in jobs:
        job.kill()
        job.communicate()
    steps = Manager(tmp_path / "run").steps
    assert steps
    last = Manager(tmp_path / "run").latest
    assert last is not None
    shown = run([*command[:-1], str(last + 3)], 2)
    assert f"step {last + 3}" in shown[0]
