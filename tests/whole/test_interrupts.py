"""An interrupt at any moment of a donating training loop leaves a model that can be read, saved and trained on.

A timer raises `KeyboardInterrupt` at random moments, many times in one process. After each interrupt every state is
there, and all states have seen the same number of steps: those that returned, and perhaps the one that was hit.
"""

from __future__ import annotations

import dis
import inspect
import random
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax._src import core

import mutatis as mu
from mutatis import checkpoint
from mutatis.compilation import compiler, dispatch, program, tracer
from mutatis.core import cells, interrupts, structure, transactions
from mutatis.tracing import call_site

pytestmark = [
    # In the keys of its cache JAX makes another error of an interrupt.
    pytest.mark.usefixtures("compiled_afresh"),
    pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX interval timers"),
    # Python prints an interrupt that hits a callback of the garbage collector, and goes on.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


class Alarm:
    """Raises one `KeyboardInterrupt` in the main thread, a given time from now."""

    def __init__(self) -> None:
        assert threading.current_thread() is threading.main_thread()
        self.armed = False

    def fire(self, *_: object) -> None:
        if self.armed:
            self.armed = False
            raise KeyboardInterrupt

    def arm(self, delay: float) -> None:
        """Go on `while alarm.armed`: somebody may swallow the interrupt."""
        self.armed = True
        signal.setitimer(signal.ITIMER_REAL, delay)

    def disarm(self) -> None:
        self.armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.fixture
def alarm() -> Iterator[Alarm]:
    one = Alarm()
    before = signal.signal(signal.SIGALRM, one.fire)
    try:
        yield one
    finally:
        one.disarm()
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def healed() -> Iterator[None]:
    """An interrupt in an eager operation of JAX 0.12 may break JAX: no other test is to suffer from it."""
    yield
    core.trace_ctx.set_trace(core.eval_trace)


class Loop:
    """A training loop: what it trains, one step, and what counts its steps.

    Args:
      node: everything that has state.
      step: runs one step.
      counts: arrays by name, each of which is the number of steps that were committed.
    """

    def __init__(self, node: Any, step: Callable[[], object], counts: Callable[[], dict[str, Any]]) -> None:
        self.node = node
        self.step = step
        self.counts = counts
        self.done = 0  # steps of the last run that returned

    def run(self, alarm: Alarm, delay: float) -> None:
        """Step until the alarm interrupts; return if somebody swallows that."""
        self.done = 0
        alarm.arm(delay)
        while alarm.armed:
            self.step()
            self.done += 1

    def count(self) -> float:
        """The number of steps on which all states agree."""
        for path, value in mu.state(self.node).flat().items():
            for leaf in jax.tree.leaves(value):
                assert not isinstance(leaf, jax.core.Tracer), f"{path} holds a tracer"
                assert not leaf.is_deleted(), f"{path} was lost"
        counts = {name: np.asarray(value) for name, value in self.counts().items()}
        several = {float(n) for values in counts.values() for n in values.flat}
        assert len(several) == 1, f"a step was committed in part: {counts}"
        return several.pop()


class ManyStates(mu.Module):
    def __init__(self) -> None:
        self.states = [mu.Variable(jnp.zeros(8)) for _ in range(60)]


def many_states() -> Loop:
    model = ManyStates()

    @mu.jit
    def step(model: ManyStates) -> None:
        for state in model.states:
            state.value = state.value + 1

    return Loop(model, lambda: step(model), lambda: {str(i): s.value for i, s in enumerate(model.states)})


class Net(mu.Module):
    """Its loss has the gradient -1 by every weight; it counts its calls and what it has seen."""

    def __init__(self, rngs: mu.Rngs | None = None) -> None:
        self.kernel = mu.Param(jnp.zeros((3, 2)))
        self.bias = mu.Param(jnp.zeros(2))
        self.seen = mu.BatchStat(jnp.zeros(2))
        self.calls = mu.Variable(0)
        self.rngs = rngs

    def loss(self, x: jax.Array) -> jax.Array:
        noise = 0.5 if self.rngs is None else jax.random.uniform(self.rngs.noise())
        self.seen.value = self.seen + x
        self.calls += 1
        return -jnp.sum(self.kernel.value) - jnp.sum(self.bias.value) + noise

    def counts(self) -> dict[str, Any]:
        streams = {} if self.rngs is None else {"noise": self.rngs.stream("noise").value["count"]}
        return streams | {
            "kernel": self.kernel.value,
            "bias": self.bias.value,
            "seen": self.seen.value,
            "calls": self.calls.value,
        }


class Trainer:
    """A model, an optimizer and a metric."""

    def __init__(self, rngs: mu.Rngs | None = None) -> None:
        self.net = Net(rngs)
        self.optimizer = mu.Optimizer(self.net, optax.chain(optax.trace(0.0), optax.scale_by_schedule(lambda _: -1.0)))
        self.metric = mu.metrics.Average("loss")

    @property
    def nodes(self) -> tuple[Net, mu.Optimizer, mu.metrics.Average]:
        return self.net, self.optimizer, self.metric

    @staticmethod
    def train(net: Net, optimizer: mu.Optimizer, metric: mu.metrics.Average, x: jax.Array) -> jax.Array:
        loss, grads = mu.value_and_grad(lambda net: net.loss(x))(net)
        optimizer.update(grads)
        metric.update(loss=loss)
        return loss

    def counts(self) -> dict[str, Any]:
        schedule = {name: s.value for name, s in self.optimizer.state.items() if name.endswith("count")}
        assert len(schedule) == 1
        totals = {"optimizer": self.optimizer.step.value, "metric": self.metric.count.value}
        return self.net.counts() | schedule | totals


ONE = jnp.ones(2)


def model_as_argument(rngs: mu.Rngs | None = None) -> Loop:
    trainer = Trainer(rngs)
    step = mu.jit(trainer.train)
    return Loop(trainer.nodes, lambda: step(*trainer.nodes, ONE), trainer.counts)


def model_closed_over(rngs: mu.Rngs | None = None) -> Loop:
    trainer = Trainer(rngs)
    net, optimizer, metric = trainer.nodes
    step = mu.jit(lambda x: trainer.train(net, optimizer, metric, x))
    return Loop(trainer.nodes, lambda: step(ONE), trainer.counts)


def structured_result() -> Loop:
    """The result holds a pytree of a Python class, so that Python code puts it together."""
    trainer = Trainer()

    @mu.jit
    def step(net: Net, optimizer: mu.Optimizer, metric: mu.metrics.Average) -> Any:
        Trainer.train(net, optimizer, metric, ONE)
        return {"state": mu.state(net), "more": [ONE, {"x": Pair(ONE, ONE)}]}

    return Loop(trainer.nodes, lambda: step(*trainer.nodes), trainer.counts)


def nested_grad() -> Loop:
    net = Net()

    @mu.jit
    def step(net: Net) -> jax.Array:
        def gradient(y: jax.Array) -> jax.Array:
            return mu.grad(lambda z: z**3 + net.loss(ONE))(y)

        second = mu.grad(gradient)(jnp.float32(2))
        net.kernel.value = net.kernel + 1
        net.bias.value = net.bias + jax.grad(lambda b: jnp.sum(b * b) / 2)(jnp.ones(2))
        return second

    return Loop(net, lambda: step(net), net.counts)


def eager_scan() -> Loop:
    """Each call is four iterations; what is counted is calls."""
    net = Net()
    xs, zero = jnp.ones((4, 2)), jnp.float32(0)  # here: an interrupt in an eager operation of JAX 0.12 may break JAX

    def body(total: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
        loss = net.loss(x)
        net.kernel.value = net.kernel + 1
        net.bias.value = net.bias + 1
        return total + loss, None

    def counts() -> dict[str, Any]:
        return {name: np.asarray(value) / 4 for name, value in net.counts().items()}

    return Loop(net, lambda: mu.scan(body, zero, xs), counts)


def ensemble(streams: bool = False) -> Loop:
    members = mu.vmap(lambda seed: Net(mu.Rngs(noise=seed) if streams else None))(jnp.arange(3))

    @mu.jit
    @mu.vmap
    def step(net: Net) -> jax.Array:
        loss, grads = mu.value_and_grad(lambda net: net.loss(ONE))(net)
        net.kernel.value = net.kernel - grads["kernel"]
        net.bias.value = net.bias - grads["bias"]
        return loss

    return Loop(members, lambda: step(members), members.counts)


def model_with_random_streams() -> Loop:
    return model_as_argument(mu.Rngs(noise=0))


def closure_with_random_streams() -> Loop:
    return model_closed_over(mu.Rngs(noise=0))


def ensemble_with_random_streams() -> Loop:
    return ensemble(streams=True)


def result_with_random_streams() -> Loop:
    """What is returned holds a typed key."""
    net = Net()

    @mu.jit
    def step(net: Net) -> mu.Rngs:
        net.loss(ONE)
        net.kernel.value = net.kernel + 1
        net.bias.value = net.bias + 1
        return mu.Rngs(0)

    return Loop(net, lambda: step(net), net.counts)


class Pair(NamedTuple):
    """JAX makes it anew by running Python code."""

    a: Any
    b: Any


@jax.tree_util.register_pytree_node_class
class Custom:
    """A pytree node of the user's own, which JAX makes anew by running Python code."""

    def __init__(self, a: Any, b: Any) -> None:
        self.a = a
        self.b = b

    def tree_flatten(self) -> Any:
        return (self.a, self.b), None

    @classmethod
    def tree_unflatten(cls, _: Any, children: Any) -> Custom:
        return cls(*children)


class Holder(mu.Module):
    def __init__(self, kind: Any) -> None:
        self.states = [mu.Variable(kind(jnp.zeros(4), jnp.zeros(()))) for _ in range(20)]


def states_of(kind: Any) -> Loop:
    holder = Holder(kind)

    @mu.jit
    def step(holder: Holder) -> None:
        for state in holder.states:
            state.value = jax.tree.map(lambda x: x + 1, state.value)

    def counts() -> dict[str, Any]:
        return {f"{i}.{n}": x for i, s in enumerate(holder.states) for n, x in enumerate(jax.tree.leaves(s.value))}

    return Loop(holder, lambda: step(holder), counts)


def states_of_named_tuples() -> Loop:
    return states_of(Pair)


def states_of_a_pytree_class() -> Loop:
    return states_of(Custom)


LOOPS = [
    many_states,
    model_as_argument,
    model_closed_over,
    structured_result,
    nested_grad,
    eager_scan,
    ensemble,
    model_with_random_streams,
    closure_with_random_streams,
    ensemble_with_random_streams,
    result_with_random_streams,
    states_of_named_tuples,
    states_of_a_pytree_class,
]


each_loop = pytest.mark.parametrize(
    "make",
    LOOPS,
    ids=lambda f: f.__name__,
)


def in_a_call(problem: BaseException) -> bool:
    """Whether an interrupt hit code of the library, or of JAX below it."""
    return any(
        "mutatis" in frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(problem.__traceback__)
    )


def duration(step: Callable[[], object], times: int = 20) -> float:
    start = time.perf_counter()
    for _ in range(times):
        step()
    return (time.perf_counter() - start) / times


def counted_by(another_thread: ThreadPoolExecutor, loop: Loop) -> float:
    """What another thread counts; an error if it has to wait."""
    future = another_thread.submit(loop.count)
    try:
        return future.result(timeout=60)
    except TimeoutError:
        cells.give_back(cells._thread.lease)  # so that it ends
        raise AssertionError("another thread waits for a step that was interrupted") from None


def interrupt_often(alarm: Alarm, loop: Loop, hits: int, folder: Path) -> int:
    """Interrupt a loop so many times, and look at everything after each.

    Returns:
      How many interrupts hit a call (the others hit the loop around it).
    """
    moments = random.Random(0)
    longest = 3 * min(duration(loop.step) for _ in range(3))
    inside = 0
    count = loop.count()
    with ThreadPoolExecutor(1) as another_thread:
        for number in range(hits):
            if moments.random() < 0.5:  # else the first step copies what was looked at
                loop.step()
                count += 1
            try:  # around a call only: the end of a loop may lie outside of the `try` that is around it
                loop.run(alarm, moments.uniform(1e-6, longest))
            except KeyboardInterrupt as problem:
                inside += in_a_call(problem)
            except ValueError as problem:
                if "KeyboardInterrupt" not in str(problem):  # JAX's caches make this of any exception
                    raise
                inside += 1
            assert core.trace_ctx.trace is core.eval_trace, "JAX is broken: it thinks that it is inside a transform"
            assert counted_by(another_thread, loop) == loop.count()
            assert loop.count() in (count + loop.done, count + loop.done + 1)
            count = loop.count()
            if number % 200 == 0:
                checkpoint.save(folder / "saved", loop.node)
                loop.step()
                checkpoint.restore(folder / "saved", loop.node)
                assert loop.count() == count
    loop.step()
    assert loop.count() == count + 1
    return inside


@each_loop
def test_interrupts_lose_nothing(make: Callable[[], Loop], alarm: Alarm, tmp_path: Path) -> None:
    assert interrupt_often(alarm, make(), 40, tmp_path) > 0


@pytest.mark.slow
@each_loop
def test_ten_thousand_interrupts_lose_nothing(make: Callable[[], Loop], alarm: Alarm, tmp_path: Path) -> None:
    hits = 10_000 // len(LOOPS) + 1
    inside = interrupt_often(alarm, make(), hits, tmp_path)
    print(f"{inside} of {hits} interrupts hit a call")
    assert inside > 0


class Tripwire:
    """Sends this process a signal at the n-th moment of a call at which Python would handle one.

    Python looks for signals when a function begins and when a C function has returned.

    Args:
      alarm: its handler interrupts.
      at: the number of the moment.
      name: a part of the names of the modules whose moments count.
    """

    def __init__(self, alarm: Alarm, at: float = float("inf"), name: str = "") -> None:
        self.alarm = alarm
        self.at = at
        self.name = name
        self.moments = 0
        self.commit = 0  # the moment just after the states were committed

    def __call__(self, frame: types.FrameType, event: str, _: Any) -> None:
        if event in ("call", "c_return") and self.name in frame.f_globals.get("__name__", ""):
            self.moments += 1
            if frame.f_code is cells.give_back.__code__ and event == "call":
                self.commit = self.moments
            if self.moments == self.at:
                self.alarm.armed = True
                signal.raise_signal(signal.SIGALRM)

    def run(self, step: Callable[[], object]) -> bool:
        """Run a step; whether it was interrupted."""
        before = sys.getprofile()
        try:
            sys.setprofile(self)
            step()
        except KeyboardInterrupt:
            return True
        finally:
            sys.setprofile(before)
        return False


@pytest.mark.parametrize("settled", [True, False])
@pytest.mark.parametrize("make", [many_states, model_closed_over, eager_scan, ensemble], ids=lambda f: f.__name__)
def test_an_interrupt_at_each_moment_of_a_call(make: Callable[[], Loop], settled: bool, alarm: Alarm) -> None:
    loop = make()
    loop.step()
    count = loop.count()
    at, hit = 0, True
    while hit:
        at += 1
        if settled:  # else the step copies what was looked at
            loop.step()
            count += 1
        hit = Tripwire(alarm, at, "mutatis").run(loop.step)
        assert loop.count() in (count, count + 1)
        count = loop.count()
    assert at > 20


def test_an_interrupt_makes_no_other_thread_wait(alarm: Alarm) -> None:
    loop = many_states()
    loop.step()
    at, hit = 0, True
    while hit:
        at += 1
        loop.step()
        hit = Tripwire(alarm, at, "mutatis").run(loop.step)
        assert cells._thread.lease.flight is None
    assert at > 20


def first_calls() -> Callable[[int], Loop]:
    """Loops over the same settled states, each of which compiles a program of its own."""
    model = ManyStates()

    @mu.jit
    def step(model: ManyStates, x: jax.Array) -> None:
        for state in model.states:
            state.value = state.value + jnp.max(x)

    def make(size: int) -> Loop:
        x = jnp.ones(size)
        return Loop(model, lambda: step(model, x), lambda: {str(i): s.value[0] for i, s in enumerate(model.states)})

    return make


def interrupt_first_calls(alarm: Alarm, moments: Callable[[Tripwire], range], name: str) -> None:
    """Interrupt first calls at some moments, and look for lost states, and for signal handlers that were not put back."""
    make = first_calls()
    old = make(1)
    for size in (1, 2, 3):
        whole = Tripwire(alarm, name=name)
        assert not whole.run(make(size).step)
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    lost, kept = [], []
    for size, at in enumerate(moments(whole), 4):
        old.step()
        old.step()
        new = make(size)
        assert Tripwire(alarm, at, name).run(new.step)
        if any(state._value.is_deleted() for state in new.node.states):
            lost.append(at)
            for state in new.node.states:
                state.value = jnp.zeros(8)
        for number, handler in handlers.items():
            if signal.getsignal(number) != handler:
                kept.append((at, number))
                signal.signal(number, handler)
        count = new.count()
        new.step()
        assert new.count() == count + 1
    assert not lost
    assert not kept


@pytest.mark.parametrize("every", [50, pytest.param(5, marks=pytest.mark.slow)])
def test_an_interrupt_before_the_commit_of_a_first_call(alarm: Alarm, every: int) -> None:
    interrupt_first_calls(alarm, lambda whole: range(whole.commit, whole.commit - 600, -every), "")


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_an_interrupt_where_signals_are_held_back(alarm: Alarm, every: int) -> None:
    interrupt_first_calls(alarm, lambda whole: range(whole.moments, 0, -every), "mutatis.interrupts")


@pytest.mark.filterwarnings("ignore::mutatis.errors.RecompilationWarning")
@pytest.mark.parametrize("hits", [15, pytest.param(500, marks=pytest.mark.slow)])
def test_interrupts_while_a_program_is_made(alarm: Alarm, hits: int) -> None:
    """No state is half written, holds a tracer or cannot be stepped on; what was handed out before is not donated."""
    make = first_calls()
    loops = [make(number) for number in range(1, 5)]
    longest = 1.2 * max(duration(loop.step, 1) for loop in loops)
    moments = random.Random(0)
    for number in range(hits):
        loop = make(5 + number)
        count = loop.count()  # which hands the states out
        try:
            loop.run(alarm, moments.uniform(1e-6, longest))
        except KeyboardInterrupt:
            pass
        except ValueError as problem:
            if "KeyboardInterrupt" not in str(problem):
                raise
        finally:
            alarm.disarm()
        assert loop.count() in (count + loop.done, count + loop.done + 1)
        loops[0].step()


def unprotected_jumps(module: types.ModuleType) -> list[str]:
    """Where a loop jumps back inside a `try` or `with`, but outside of the code that its handler is for.

    CPython looks for signals at such jumps. Since 3.12 it forgets the handler for those after a condition: of an `if`
    without `else` that ends a loop, of a comprehension's filter, of a `while`.
    """
    found = []
    waiting = [compile(inspect.getsource(module), module.__name__, "exec")]
    while waiting:
        code = waiting.pop()
        waiting += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        instructions = list(dis.get_instructions(code))
        handlers = {i.offset for i in instructions if i.opname == "PUSH_EXC_INFO"}
        entries = [e for e in dis.Bytecode(code).exception_entries if e.target in handlers]  # type: ignore[attr-defined]
        covered = dis.Bytecode(code).exception_entries  # type: ignore[attr-defined]
        for jump in instructions:
            if jump.opname == "JUMP_BACKWARD" and not any(e.start <= jump.offset < e.end for e in covered):
                before = {e.target for e in entries if e.end <= jump.offset}
                after = {e.target for e in entries if e.start > jump.offset}
                if before & after and jump.positions is not None:
                    found.append(f"{module.__name__}:{jump.positions.lineno} in {code.co_qualname}")
    return found


def test_no_jump_lies_outside_of_its_try() -> None:
    assert not [
        place
        for module in (call_site, cells, compiler, dispatch, interrupts, program, structure, tracer, transactions)
        for place in unprotected_jumps(module)
    ]
