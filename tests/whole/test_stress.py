"""Everything at once on one model: steps, evaluations, reads, states, saves, resets, transactions; threads, tasks and signals.

Each state of the model counts the same steps, so that a part of a step, a lost step or a mixed-up value shows. What was handed
out has to stay what it was. Nothing here has a time limit but the one after which a thread counts as hanging.
"""

from __future__ import annotations

import asyncio
import faulthandler
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import checkpoint

pytestmark = pytest.mark.once  # nothing here depends on the version of JAX

HANGS = 120.0  # seconds


class Model(mu.Module):
    """Counts of steps; constants that no step writes; a number that anybody writes."""

    def __init__(self) -> None:
        self.counts = [mu.Variable(jnp.zeros(16)) for _ in range(8)]
        self.more = mu.BatchStat(jnp.zeros(4), init=lambda: jnp.zeros(4))
        self.constants = [mu.Param(jnp.ones(16)) for _ in range(3)]


@mu.jit
def train(model: Model) -> Any:
    for count in model.counts:
        count.value = count.value + model.constants[0].value
    model.more.value = model.more.value + 1
    return model.counts[0].value


@mu.jit
def train_some(model: Model) -> Any:
    for count in model.counts:
        count.value = count.value + 1
    return model.counts[-1].value


@mu.jit
def evaluate(model: Model) -> Any:
    return [count.value + 0 for count in model.counts], sum(p.value.sum() for p in model.constants)


@mu.jit
def look_at_one(model: Model) -> Any:
    return model.constants[1].value * 2


class Job:
    """What threads, tasks and handlers do to one model; `steps` counts the steps that were made."""

    def __init__(self, folder: Path) -> None:
        self.model, self.folder = Model(), folder
        self.lock = threading.RLock()
        self.steps = 0
        self.kept: list[tuple[Any, Any]] = []
        self.numbers = iter(range(10**9))
        for act in self.actions.values():
            act()

    @property
    def actions(self) -> dict[str, Callable[[], None]]:
        names = (
            "step",
            "step_some",
            "evaluate",
            "look",
            "read",
            "state",
            "pytree",
            "save",
            "reset",
            "try_out",
            "gradient",
        )
        return {name: getattr(self, name) for name in names}

    def _made(self) -> None:
        with self.lock:
            self.steps += 1

    def step(self) -> None:
        self.keep(train(self.model))
        self._made()

    def step_some(self) -> None:
        self.keep(train_some(self.model))
        self._made()

    def evaluate(self) -> None:
        counts, total = evaluate(self.model)
        assert len({float(x) for c in counts for x in np.asarray(c)}) == 1, "a program saw a part of a step"
        assert float(total) == 48

    def look(self) -> None:
        assert float(look_at_one(self.model).sum()) == 32

    def read(self) -> None:
        for cell in (*self.model.counts, self.model.more, *self.model.constants):
            self.keep(cell.value)

    def state(self) -> None:
        for leaf in jax.tree.leaves(mu.state(self.model)):
            self.keep(leaf)

    def pytree(self) -> None:
        for leaf in jax.tree.leaves(self.model):
            assert len({float(x) for x in np.asarray(leaf)}) == 1

    def save(self) -> None:
        path = self.folder / f"save_{next(self.numbers)}"
        checkpoint.save(path, self.model)
        other = Model()
        checkpoint.restore(path, other)
        assert all(len(set(np.asarray(c.value).tolist())) == 1 for c in other.counts)

    def reset(self) -> None:
        mu.reset(self.model, mu.BatchStat)

    def try_out(self) -> None:
        with mu.transaction() as tx:
            train_some(self.model)
            self.model.more.value = jnp.full(4, -1.0)
            tx.rollback()

    def gradient(self) -> None:
        constants = self.model.constants
        grads = mu.grad(lambda: sum((p.value**2).sum() for p in constants), of=constants)()
        assert all(float(np.sum(g)) == 32 for g in jax.tree.leaves(grads))

    def keep(self, array: Any) -> None:
        """Keep an array, and look later whether it is still what it was."""
        was = np.array(array)
        assert len(set(was.tolist())) == 1
        self.kept.append((array, was))
        if len(self.kept) > 300:
            old, self.kept = self.kept, []
            for array, was in old:
                np.testing.assert_array_equal(np.asarray(array), was)

    def check(self) -> None:
        for count in self.model.counts:
            np.testing.assert_array_equal(np.asarray(count.value), np.full(16, self.steps))


@pytest.fixture(autouse=True)
def often_another_thread() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


@pytest.fixture(params=[3.0, pytest.param(120.0, marks=pytest.mark.slow)], ids=lambda s: f"{s:g}_seconds")
def end(request: pytest.FixtureRequest) -> float:
    return time.monotonic() + request.param


def run_threads(bodies: list[Callable[[], None]], end: float, beside: Callable[[], None], folder: Path) -> None:
    """Run each body in a thread, again and again until the end, and one more in this thread; raise what was raised first."""
    problems: list[BaseException] = []

    def repeat(body: Callable[[], None]) -> None:
        try:
            while time.monotonic() < end and not problems:
                body()
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=repeat, args=(body,), daemon=True) for body in bodies]
    for thread in threads:
        thread.start()
    repeat(beside)
    for thread in threads:
        thread.join(HANGS)
    if any(thread.is_alive() for thread in threads):
        with (folder / "stacks.txt").open("w+") as file:
            faulthandler.dump_traceback(file)
            file.seek(0)
            pytest.fail(f"threads hang:\n{file.read()}")
    if problems:
        raise problems[0]


MIXTURES = {
    "a trainer that evaluates, and readers": (["step", "evaluate"], [["read"], ["state"], ["look"]]),
    "a trainer that saves, and trainers": (["step", "save"], [["step_some"], ["step", "gradient"], ["look", "read"]]),
    "everything": (
        ["step", "read", "evaluate", "step_some", "look", "state"],
        [["step", "reset"], ["save", "state"], ["evaluate", "look", "pytree"], ["try_out", "gradient"], ["read"]],
    ),
}


@pytest.mark.parametrize("mixture", MIXTURES)
def test_threads(mixture: str, end: float, tmp_path: Path) -> None:
    job = Job(tmp_path)
    main, others = MIXTURES[mixture]

    def together(names: list[str]) -> Callable[[], None]:
        moments = random.Random(str(names))
        return lambda: job.actions[moments.choice(names)]()

    run_threads([together(names) for names in others], end, together(main), tmp_path)
    job.check()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX interval timers")
@pytest.mark.parametrize("with_threads", [False, True])
def test_signals(with_threads: bool, end: float, tmp_path: Path) -> None:
    job, moments, busy, handled = Job(tmp_path), random.Random(0), [], []
    names = [name for name in job.actions if name not in ("gradient", "try_out")]

    over = threading.Event()

    def handler(*_: object) -> None:
        if over.is_set():
            return
        if not busy:  # never nested
            busy.append(1)
            name = moments.choice(names)
            job.actions[name]()
            handled.append(name)
            busy.clear()
        signal.setitimer(signal.ITIMER_REAL, moments.uniform(1e-4, 1e-2))

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    others = [["step_some"], ["read", "state"], ["evaluate", "look"]] if with_threads else []
    mine = random.Random(1)
    try:
        run_threads(
            [lambda names=names: job.actions[random.choice(names)]() for names in others],  # type: ignore[misc]
            end,
            lambda: job.actions[mine.choice(["step", "step_some", "evaluate", "read"])](),
            tmp_path,
        )
    finally:
        over.set()  # a handler that runs now starts no other alarm
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(handled) > 3
    job.check()


def test_tasks(end: float, tmp_path: Path) -> None:
    """Tasks that try something out, and wait in the middle of it, beside others that train, and threads of theirs."""
    job = Job(tmp_path)

    async def tries_out(number: int) -> None:
        while time.monotonic() < end:
            with mu.transaction() as tx:
                train_some(job.model)
                job.model.more.value = jnp.full(4, float(number))
                await asyncio.sleep(0.001 * number)
                assert float(job.model.more.value[0]) == number
                tx.rollback()
            await asyncio.sleep(0)

    async def trains() -> None:
        while time.monotonic() < end:
            job.step()
            job.evaluate()
            await asyncio.sleep(0)

    async def reads() -> None:
        while time.monotonic() < end:
            await asyncio.to_thread(job.state)
            await asyncio.to_thread(job.evaluate)

    async def everything() -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(1, 4):
                group.create_task(tries_out(number))
            group.create_task(trains())
            group.create_task(reads())

    asyncio.run(everything())
    job.check()
