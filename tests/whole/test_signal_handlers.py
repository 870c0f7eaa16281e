"""Signal handlers, weakref callbacks and `__del__` that use the states in the middle of a step.

A job that saves on SIGTERM. Whatever the handler does (reads, saves, writes, steps, evaluates), and at whatever moment: it finds
whole steps, neither deleted arrays nor tracers; nobody hangs; and no step is lost or made twice.
"""

from __future__ import annotations

import gc
import queue
import random
import signal
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mutatis as mu
from mutatis import checkpoint, nn
from mutatis.core import cells, structure

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX interval timers"),
]


@pytest.fixture
def handle() -> Iterator[Callable[[Callable[[], object]], None]]:
    """Sets what a signal does."""
    before = signal.getsignal(signal.SIGALRM)

    def handle(act: Callable[[], object]) -> None:
        def handler(*_: object) -> None:
            act()

        signal.signal(signal.SIGALRM, handler)

    try:
        yield handle
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Moments:
    """Sends this process a signal at the n-th moment of a call at which Python would handle one.

    Python looks for signals when a function begins and when a C function has returned.
    """

    def __init__(self, at: float = float("inf"), name: str = "mutatis", again: int = 0) -> None:
        self.at, self.name, self.count = at, name, 0
        self.again = self.at + again  # and once more, so many moments later

    def __call__(self, frame: types.FrameType, event: str, _: Any) -> None:
        if event in ("call", "c_return") and frame.f_globals.get("__name__", "").startswith(self.name):
            self.count += 1
            if self.count in (self.at, self.again):
                signal.raise_signal(signal.SIGALRM)

    def run(self, step: Callable[[], object]) -> bool:
        """Run a step; whether the moment came."""
        before = sys.getprofile()
        sys.setprofile(self)
        try:
            step()
        finally:
            sys.setprofile(before)
        return self.count >= self.at


class Many(mu.Module):
    def __init__(self, size: int = 8) -> None:
        self.states = [mu.Variable(jnp.zeros(size)) for _ in range(6)]
        self.constants = [mu.Buffer(jnp.ones(size)) for _ in range(2)]


def advance(model: Many) -> Any:
    for state in model.states:
        state.value = state.value + model.constants[0].value
    return model.states[0].value[0]


class Subject:
    """A model, its step, and what a handler may do to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = Many()
        self.step = mu.jit(advance)
        self.other = mu.jit(lambda model: advance(model) * 2)
        self.evaluate = mu.jit(lambda model: [s.value[0] for s in model.states])
        self.kept: list[tuple[Any, float]] = []
        for _ in range(2):
            self.step(self.model)
            self.other(self.model)
            self.evaluate(self.model)
            self.in_a_gradient()
        self.saved = 0

    def count(self) -> float:
        """The number of steps on which all states agree."""
        several = {float(x) for s in self.model.states for x in np.asarray(s._value)}
        assert len(several) == 1, f"a step was committed in part: {several}"
        return several.pop()

    def keep(self, values: list[Any]) -> None:
        seen = {float(x) for value in values for x in np.ravel(value)}
        assert len(seen) == 1, f"in the middle of a step the states are {seen}"
        self.kept += [(value, float(np.ravel(value)[0])) for value in values]

    def check_kept(self) -> None:
        """What was handed out is still what it was."""
        for value, was in self.kept:
            assert np.all(np.asarray(value) == was)
        self.kept.clear()

    # -- what a handler does

    def reads(self) -> None:
        self.keep([s.value for s in self.model.states])

    def takes_the_state(self) -> None:
        self.keep([v for p, v in mu.state(self.model).flat().items() if p[0] == "states"])

    def evaluates(self) -> None:
        self.keep(self.evaluate(self.model))

    def in_a_gradient(self) -> None:
        states = self.model.states
        value, _ = mu.value_and_grad(lambda: jnp.stack([s.value[0] for s in states]).mean(), of=states[0], wrt=...)()
        self.keep([value])

    def saves(self) -> None:
        self.saved += 1
        path = self.folder / f"saved_{self.saved}"
        checkpoint.save(path, self.model)
        other = Many()
        checkpoint.restore(path, other)
        self.keep([s.value for s in other.states])

    def writes(self) -> None:
        for state in self.model.states:
            state.value = jnp.full(8, 100.0)

    def updates(self) -> None:
        mu.update(self.model, {"states": [jnp.full(8, 100.0)] * 6})

    def steps(self) -> None:
        self.step(self.model)

    def steps_otherwise(self) -> None:
        self.other(self.model)
        self.reads()

    def makes_another(self) -> None:
        mu.jit(lambda model, n: (advance(model), n)[1])(self.model, jnp.ones(1))

    def rolls_back(self) -> None:
        with mu.transaction(self.model) as tx:
            self.step(self.model)
            self.writes()
            tx.rollback()

    def changes_a_mode(self) -> None:
        self.model.eval()
        self.model.train()


# What may be the count after a step that was interrupted, by what it was before.
NOTHING = lambda before: {before + 1}  # noqa: E731
WRITTEN = lambda _: {100.0, 101.0}  # noqa: E731
STEPPED = lambda before: {before + 2}  # noqa: E731
ACTIONS = {
    "reads": NOTHING,
    "takes_the_state": NOTHING,
    "evaluates": NOTHING,
    "in_a_gradient": NOTHING,
    "saves": NOTHING,
    "writes": WRITTEN,
    "updates": WRITTEN,
    "steps": STEPPED,
    "steps_otherwise": STEPPED,
    "makes_another": STEPPED,
    "rolls_back": NOTHING,
    "changes_a_mode": NOTHING,
}
SLOW_ACTIONS = {"saves", "makes_another", "in_a_gradient", "rolls_back", "updates"}
each_action = pytest.mark.parametrize(
    "action", [pytest.param(a, marks=pytest.mark.slow if a in SLOW_ACTIONS else ()) for a in ACTIONS]
)


@each_action
@pytest.mark.parametrize("exposed", [False, True])
def test_at_each_moment_of_a_step(action: str, exposed: bool, handle: Any, tmp_path: Path) -> None:
    subject = Subject(tmp_path)
    handle(getattr(subject, action))
    at, came = 0, True
    while came:
        at += 1
        subject.step(subject.model)
        if exposed:
            subject.reads()
        before = subject.count()
        came = Moments(at).run(lambda: subject.step(subject.model))
        after = subject.count()
        assert after in (ACTIONS if came else {action: NOTHING})[action](before), at
        subject.step(subject.model)
        assert subject.count() == after + 1
        subject.check_kept()
        assert cells._thread.lease.flight is None
    assert at > 20


@pytest.mark.parametrize(
    "action", ["steps", "writes", *(pytest.param(a, marks=pytest.mark.slow) for a in ("steps_otherwise", "saves"))]
)
@pytest.mark.parametrize(
    "how", ["value", "float", *(pytest.param(a, marks=pytest.mark.slow) for a in ("state", "save"))]
)
def test_at_each_moment_of_a_read(how: str, action: str, handle: Any, tmp_path: Path) -> None:
    """What is read is of one moment, and stays what it was, whatever the handler does meanwhile and afterwards."""
    subject = Subject(tmp_path)
    first = subject.model.states[0]
    reads = {
        "value": lambda: [first.value],
        "float": lambda: [float(first[0])],
        "state": lambda: [mu.state(first)[()]],
        "save": lambda: (checkpoint.save(tmp_path / "mine", first), [first.value])[1],
    }
    handle(getattr(subject, action))
    at, came = 0, True
    while came and at < 150:
        at += 1
        subject.step(subject.model)
        before = subject.count()
        got: list[Any] = []
        came = Moments(at).run(lambda got=got: got.extend(reads[how]()))
        subject.step(subject.model)
        assert {float(x) for x in np.ravel(np.asarray(got[0]))} <= {before, before + 1, 100.0, 200.0}, at
        assert cells._thread.lease.flight is None
    assert at > 5


TWO = [(first, later) for first in ("reads", "evaluates", "steps", "writes") for later in ("reads", "steps", "writes")]
FAST_TWO = [("evaluates", "reads"), ("steps", "steps")]


@pytest.mark.parametrize(
    ("action", "later"), [pytest.param(*two, marks=() if two in FAST_TWO else pytest.mark.slow) for two in TWO]
)
def test_at_two_moments_of_a_step(action: str, later: str, handle: Any, tmp_path: Path) -> None:
    """The second handler finds what the first has left of the dispatch."""
    subject = Subject(tmp_path)
    acts: list[str] = []
    handle(lambda: getattr(subject, acts.pop(0))())
    at, came = 0, True
    while came:
        at += 1
        for again in range(1, 40):
            subject.step(subject.model)
            subject.keep([subject.model.states[0].value])
            before = subject.count()
            acts[:] = [action, later]
            came = Moments(at, again=again).run(lambda: subject.step(subject.model))
            if acts:
                break
            after = {n for first in ACTIONS[action](before - 1) for n in ACTIONS[later](first)}
            assert subject.count() in {*after, *(n + 1 for n in after), 100.0, 101.0}, (at, again)
            subject.check_kept()
            assert cells._thread.lease.flight is None
    assert at > 20


@pytest.mark.parametrize("action", ["reads", "steps", "writes"])
def test_a_handler_that_raises(action: str, handle: Any, tmp_path: Path) -> None:
    """It uses the states, and then interrupts: all of the step, or nothing."""
    subject = Subject(tmp_path)

    def act() -> None:
        getattr(subject, action)()
        raise KeyboardInterrupt

    handle(act)
    at, came = 0, True
    while came:
        at += 1
        subject.step(subject.model)
        before = subject.count()
        came = False
        try:
            Moments(at).run(lambda: subject.step(subject.model))
        except KeyboardInterrupt:
            came = True
        after = subject.count()
        assert after in {before, before + 1, *ACTIONS[action](before)}
        subject.step(subject.model)
        assert subject.count() == after + 1
        subject.check_kept()
        assert cells._thread.lease.flight is None
    assert at > 20


class Trained:
    """A job: model, optimizer, a first step that is traced and compiled."""

    def __init__(self) -> None:
        self.net = nn.Linear(4, 4, rngs=mu.Rngs(0))
        self.optimizer = mu.Optimizer(self.net, optax.sgd(1e-3, momentum=0.9))
        self.count = mu.Variable(0)

    def make(self) -> Callable[[], Any]:
        @mu.jit
        def train(net: Any, optimizer: Any) -> None:
            grads = mu.grad(lambda net: jnp.sum(net(jnp.ones(4)) ** 2))(net)
            optimizer.update(grads)
            self.count.value = self.count.value + 1
            net.calls = mu.Variable(0)
            del net.calls

        return lambda: train(self.net, self.optimizer)


@pytest.mark.parametrize("every", [1000, pytest.param(50, marks=pytest.mark.slow)])
def test_in_a_first_call(every: int, handle: Any, tmp_path: Path) -> None:
    """While it is traced, compiled and run: the handler is outside, and the model as it was."""
    job = Trained()
    found: list[Any] = []
    names = set(vars(job.net))

    def look() -> None:
        leaves = jax.tree.leaves(mu.state((job.net, job.optimizer)))
        assert not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
        assert not isinstance(jnp.ones(2) + 1, jax.core.Tracer)
        assert set(vars(job.net)) == names
        found.append([np.asarray(leaf).sum() for leaf in leaves])

    handle(look)
    job.make()()
    whole = Moments(name="")
    whole.run(job.make())
    for at in range(1, whole.count, every):
        Moments(at, "").run(job.make())
    assert len(found) >= whole.count // every
    assert int(job.count) == 2 + len(range(1, whole.count, every))


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: mu.jit(f),
        lambda f: lambda: mu.grad(lambda x: (f(), x)[1])(1.0),
        lambda f: lambda: mu.vmap(lambda x: (f(), x)[1])(jnp.ones(2)),
        lambda f: lambda: mu.for_loop(f, length=2),
        lambda f: lambda: mu.jit(lambda: mu.cond(True, f, lambda: None))(),
        lambda f: lambda: mu.remat(f)(),
    ],
    ids=["jit", "grad", "vmap", "for_loop", "cond", "remat"],
)
def test_in_the_middle_of_a_trace(transform: Any, handle: Any) -> None:
    state, net = mu.Variable(1.0), mu.Module()
    net.items, net.n = [1], 1
    found = []
    step = mu.jit(lambda: state.set(state.value * 10))
    handle(lambda: (found.append((float(state), list(net.items), net.n, hasattr(net, "more"))), step()))

    def f() -> None:
        state.value = state.value + 1
        signal.raise_signal(signal.SIGALRM)

    transform(f)()
    assert found[0] == (1.0, [1], 1, False)
    before = signal.getsignal(signal.SIGALRM)

    @mu.jit
    def restructures() -> None:
        net.items.append(2)
        net.more = mu.Variable(1)
        net.mode_name = "new"
        signal.raise_signal(signal.SIGALRM)
        assert (net.items, hasattr(net, "more"), net.mode_name) == ([1, 2], True, "new")

    restructures()
    assert found[-1][1:] == ([1], 1, False)
    assert (net.items, int(net.more), net.mode_name) == ([1, 2], 1, "new")
    assert signal.getsignal(signal.SIGALRM) is before


def test_a_handler_inside_a_transaction_of_ordinary_code(handle: Any) -> None:
    """It is called there, as a function would be; a trace inside changes nothing about that."""
    state, found = mu.Variable(1), []
    handle(lambda: found.append(int(state)))

    @mu.jit
    def step() -> None:
        state.value = state.value + 100
        signal.raise_signal(signal.SIGALRM)

    with mu.transaction():
        state.value = 2
        signal.raise_signal(signal.SIGALRM)
        step()
        signal.raise_signal(signal.SIGALRM)
    assert found == [2, 2, 102]


def test_a_handler_that_is_changed_by_what_is_traced(handle: Any) -> None:
    new = lambda *_: None  # noqa: E731

    @mu.jit
    def step() -> None:
        signal.signal(signal.SIGALRM, new)

    step()
    assert signal.getsignal(signal.SIGALRM) is new


def test_a_handler_while_the_thread_waits_for_another(handle: Any) -> None:
    """Here the handler itself has to wait for the other thread's step, which waits for nothing."""
    subject_started, stop = threading.Event(), threading.Event()
    model = Many(200_000)
    step, seen = mu.jit(advance), []
    step(model)

    def train() -> None:
        while not stop.is_set():
            step(model)
            subject_started.set()

    busy: list[int] = []

    def act() -> None:
        if not busy:  # never nested
            busy.append(1)
            seen.append([float(np.asarray(s.value)[0]) for s in model.states])
            busy.clear()

    handle(act)
    thread = threading.Thread(target=train)
    thread.start()
    try:
        subject_started.wait(60)
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.003)
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            step(model)
            assert model.states[0].value.shape == (200_000,)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        stop.set()
        thread.join(60)
    assert not thread.is_alive() and len(seen) > 10


@pytest.mark.parametrize("seconds", [1.5, pytest.param(20.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("action", ["reads", "steps", "evaluates", "saves"])
def test_at_random_moments(action: str, seconds: float, handle: Any, tmp_path: Path) -> None:
    subject = Subject(tmp_path)
    moments, handled, busy = random.Random(0), [0], []

    def act() -> None:
        if not busy:  # never nested
            busy.append(1)
            getattr(subject, action)()
            handled[0] += 1
            busy.clear()
        signal.setitimer(signal.ITIMER_REAL, moments.uniform(1e-5, 2e-3))

    getattr(subject, action)()
    handle(act)
    count = subject.count()
    signal.setitimer(signal.ITIMER_REAL, 0.001)
    end, made = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        subject.step(subject.model)
        made += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    assert subject.count() == count + made + (handled[0] if action == "steps" else 0)
    assert handled[0] > 0
    subject.check_kept()


# -- finalizers ---------------------------------------------------------------------------------------------------------


class Trash:
    """Garbage that does something when it is freed; its cycle has it wait for the collector."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act = act
        self.me = self

    def __del__(self) -> None:
        self.act()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("action", ["reads", "takes_the_state", "steps", "writes"])
def test_a_finalizer_at_the_collector_s_moments(action: str, tmp_path: Path) -> None:
    """It works, or is refused while the launch is in flight: never a deleted array, a lost step, or a part of one."""
    subject, acted, refused = Subject(tmp_path), [0], []

    def act() -> None:
        try:
            getattr(subject, action)()
            acted[0] += 1
        except mu.MutatisError as error:
            refused.append(str(error))

    before = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        subject.step(subject.model)
        count = subject.count()
        for number in range(100):
            Trash(act)
            subject.step(subject.model)
            after = subject.count()
            assert after in ({100.0, 101.0} if action == "writes" else {count + 1, count + 2, count + 3}), number
            count = after
    finally:
        gc.set_threshold(*before)
    assert acted[0] > 50
    assert all("interrupted a step over it" in text for text in refused)
    subject.check_kept()


def test_a_weakref_callback_of_an_old_value(tmp_path: Path) -> None:
    """It runs in the middle of the commit, whenever an array is replaced."""
    subject = Subject(tmp_path)
    seen: list[float] = []
    for _ in range(20):
        references = [
            weakref.ref(state._value, lambda _: seen.append(len({float(s.value[0]) for s in subject.model.states})))
            for state in subject.model.states
        ]
        subject.step(subject.model)
        del references
    assert len(seen) >= 20
    assert set(seen) == {1.0}
    assert subject.count() >= 20


@pytest.fixture
def in_flight(monkeypatch: pytest.MonkeyPatch) -> Callable[[Subject, Any, Any], None]:
    """Has something happen inside the compiled call of a subject's step, once: before the program runs, or after that."""

    def install(subject: Subject, before: Any, after: Any) -> None:
        plan = next(iter(subject.step._compiler.bindings.values()))().first.plan  # type: ignore[union-attr]
        jitted, acts = plan.variant.jitted, [before, after]

        def called(*values: Any) -> Any:
            if acts[0]:
                acts.pop(0)()
                return jitted(*values)
            out = jitted(*values)
            if len(acts) == 2:
                acts.pop()()
            return out

        monkeypatch.setattr(plan.variant, "jitted", called)

    return install


@each_action
def test_in_flight_before_the_run(action: str, in_flight: Any, tmp_path: Path) -> None:
    """Where JAX makes the call in Python, since a setting or the placement of an argument is new."""
    subject = Subject(tmp_path)
    for exposed in (False, True):
        if exposed:
            subject.reads()
        before = subject.count()
        acted: list[int] = []
        in_flight(subject, lambda acted=acted: (acted.append(1), getattr(subject, action)()), None)
        subject.step(subject.model)
        assert acted == [1]
        assert subject.count() in ACTIONS[action](before)
        subject.step(subject.model)
        subject.check_kept()
        assert cells._thread.lease.flight is None


@pytest.mark.parametrize("action", ["reads", "evaluates", "writes", "steps"])
def test_in_flight_after_the_run_is_refused(action: str, in_flight: Any, tmp_path: Path) -> None:
    """And the error's own cure runs: note it in a queue, and do it after the step."""
    subject, problems = Subject(tmp_path), []
    later: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def act() -> None:
        try:
            getattr(subject, action)()
        except mu.MutatisError as error:
            problems.append(str(error))
            later.put(getattr(subject, action))

    before = subject.count()
    in_flight(subject, None, act)
    subject.step(subject.model)
    if action == "writes":  # it needs nothing of the old value, and is the later write
        assert not problems and subject.count() == 100
        return
    assert "between the run and the return" in problems[0] and "queue.SimpleQueue" in problems[0]
    assert subject.count() == before + 1
    later.get()()
    assert subject.count() == before + 1 + (action == "steps")
    subject.check_kept()


def test_locks_can_be_taken_again_by_what_interrupts() -> None:
    """A handler runs in the middle of whatever the main thread does, also where it holds one of our locks."""
    for lock in (cells.mutex, structure.structure_lock, structure.structure._lock):
        with lock:
            assert lock.acquire(timeout=1)
            lock.release()
