"""Train on all devices of all processes, save together, and continue with another number of processes.

    python examples/multihost.py                                          # one process, all its devices
    python examples/multihost.py --coordinator host0:1234 --processes 2 --number 0   # and the same with 1, on another machine

Parameters and moments are split over all devices, each process reads its own part of the data, and all processes write the
checkpoint. A second start continues from the newest checkpoint. On SIGTERM the program saves and ends. At the end it prints the
number of processes and devices, the step, the loss and the sharding of a kernel.

On Slurm, Kubernetes and TPU pods, pass `--distributed` instead of the other options: `jax.distributed.initialize()` then finds
the processes itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mutatis as mu
from mutatis import nn

FEATURES, HIDDEN, BATCH = 16, 64, 32


class Net(mu.Module):
    """Two layers. Their axes have names, and say nothing of devices."""

    def __init__(self, rngs: mu.Rngs) -> None:
        self.one = nn.Linear(FEATURES, HIDDEN, kernel_metadata={"sharding": ("in", "hidden")}, rngs=rngs)
        self.norm = nn.BatchNorm(HIDDEN, rngs=rngs)
        self.two = nn.Linear(HIDDEN, FEATURES, kernel_metadata={"sharding": ("hidden", "in")}, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.two(jax.nn.relu(self.norm(self.one(x))))


@mu.jit
def make(seed: jax.Array) -> tuple[Net, mu.Optimizer]:
    """A net and its optimizer; each device makes its part."""
    net = Net(mu.Rngs(seed))
    return net, mu.Optimizer(net, optax.adam(1e-2))


@mu.jit
def train(net: Net, optimizer: mu.Optimizer, x: jax.Array) -> jax.Array:
    """One step; gives the loss of the whole batch."""
    loss, grads = mu.value_and_grad(lambda net: jnp.mean((net(x) - jnp.roll(x, 1, axis=1)) ** 2))(net)
    optimizer.update(grads)
    return loss


class Batches:
    """This process's part of each batch, from its position on."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        while True:
            batch = np.random.default_rng(self.at).standard_normal((BATCH, FEATURES), np.float32)
            self.at += 1
            yield np.split(batch, jax.process_count())[jax.process_index()]

    def get_state(self) -> dict[str, int]:
        """The position, which a checkpoint keeps."""
        return {"at": self.at}

    def set_state(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self.at = state["at"]


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description="Train on many devices.")
    parser.add_argument("--steps", type=int, default=60, help="after how many to end")
    parser.add_argument(
        "--directory", default="runs/multihost", help="for checkpoints, on a disk that all processes see"
    )
    parser.add_argument("--distributed", action="store_true", help="find the other processes by the cluster's means")
    parser.add_argument("--coordinator", help="address of the first process, where nobody says it")
    parser.add_argument("--processes", type=int, default=1, help="how many there are")
    parser.add_argument("--number", type=int, default=0, help="which of them this is")
    args = parser.parse_args()
    if args.coordinator:
        jax.distributed.initialize(args.coordinator, args.processes, args.number)
    elif args.distributed:
        jax.distributed.initialize()

    mesh = jax.make_mesh((jax.device_count(),), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    rules = {"hidden": "devices", "in": None}
    with (
        jax.set_mesh(mesh),
        mu.sharding.rules(rules),
        mu.checkpoint.Manager(args.directory, every=20, keep=2) as manager,
    ):
        net, optimizer = make(jax.random.key(0))
        batches = Batches()
        restored = manager.restore((net, optimizer), iterator=batches)
        step = 0 if restored is None else restored.step
        loss = jnp.float32(0)
        stream = iter(batches)
        with mu.preemption() as stop:
            while step < args.steps and not stop:
                x = jax.make_array_from_process_local_data(NamedSharding(mesh, P("devices")), next(stream))
                loss, step = train(net, optimizer, x), step + 1
                manager.save(step, (net, optimizer), iterator=batches)
        manager.save(step, (net, optimizer), iterator=batches, force=True)
    if jax.process_index() == 0:
        where = f"{jax.process_count()} processes, {jax.device_count()} devices"
        print(f"{where}: step {step}, loss {float(loss):.6f}, {net.one.kernel.value.sharding.spec}")


if __name__ == "__main__":
    main()
