"""Many threads at once: steps on one model are in some order, readers find neither deleted arrays nor tracers, nobody hangs.

Python is told to change threads as often as it can. Nothing here looks at a clock, but for the limit after which a
thread counts as hanging.
"""

from __future__ import annotations

import concurrent.futures
import copy
import faulthandler
import linecache
import pickle
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis.compilation import compiler, record

pytestmark = pytest.mark.filterwarnings("ignore::mutatis.errors.RecompilationWarning")  # each thread has its shape

THREADS = 8
LIMIT = 120.0  # seconds


@pytest.fixture(params=[100, pytest.param(1000, marks=pytest.mark.slow)], ids=lambda n: f"{n}_steps")
def steps(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(autouse=True)
def often_another_thread() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


class Together:
    """Runs functions in threads of their own, which start at one moment; raises what the first of them raised.

    Args:
      folder: where the stacks go if a thread hangs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *bodies: Callable[[], object], beside: Callable[[], object] | None = None) -> None:
        """Run the bodies; run `beside` again and again in one more thread until all of them are done."""
        problems: list[BaseException] = []
        barrier = threading.Barrier(len(bodies) + (beside is not None))
        done = threading.Event()

        def run(body: Callable[[], object], repeat: bool) -> None:
            try:
                barrier.wait(LIMIT)
                body()
                while repeat and not done.is_set():
                    body()
            except BaseException as problem:
                problems.append(problem)

        threads = [threading.Thread(target=run, args=(body, False), daemon=True) for body in bodies]
        others = [threading.Thread(target=run, args=(beside, True), daemon=True)] if beside is not None else []
        for thread in (*threads, *others):
            thread.start()
        end = time.monotonic() + LIMIT
        try:
            for thread in threads:
                thread.join(max(0.0, end - time.monotonic()))
        finally:
            done.set()
        for thread in others:
            thread.join(max(1.0, end - time.monotonic()))
        if any(thread.is_alive() for thread in (*threads, *others)):
            with (self.folder / "stacks.txt").open("w+") as file:
                faulthandler.dump_traceback(file)
                file.seek(0)
                pytest.fail(f"threads hang:\n{file.read()}")
        if problems:
            raise problems[0]


@pytest.fixture
def together(tmp_path: Path) -> Together:
    return Together(tmp_path)


class Net(mu.Module):
    """Two counts that are always written together, and a larger state."""

    def __init__(self, size: int = 4) -> None:
        self.n = mu.Variable(0)
        self.blocks = [mu.Param(jnp.zeros(size)), mu.Cache(jnp.zeros(size))]
        self.m = mu.Variable(0)
        self.fast = True


def advance(net: Net) -> tuple[jax.Array, jax.Array]:
    net.n += 1
    for block in net.blocks:
        block.value = block + 1
    net.m += 1
    return net.n.value, net.m.value


def check_all(net: Net, count: int) -> None:
    assert int(net.n) == int(net.m) == count
    for block in net.blocks:
        np.testing.assert_array_equal(np.asarray(block), np.full(block.shape, count))


# -- steps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared_program", [True, False])
def test_each_thread_has_its_model(together: Together, steps: int, shared_program: bool) -> None:
    nets = [Net() for _ in range(THREADS)]
    step = mu.jit(advance)

    def train(net: Net) -> None:
        mine = step if shared_program else mu.jit(lambda: advance(net))
        for count in range(1, steps + 1):
            n, m = mine(net) if shared_program else mine()
            assert int(n) == int(m) == count

    together(*(lambda net=net: train(net) for net in nets))
    for net in nets:
        check_all(net, steps)


def test_steps_under_a_lock(together: Together, steps: int) -> None:
    net = Net()
    step = mu.jit(advance)
    lock = threading.Lock()

    def train() -> None:
        for _ in range(steps):
            with lock:
                before = int(net.n)
                assert int(step(net)[0]) == before + 1

    together(*[train] * THREADS)
    check_all(net, THREADS * steps)


@pytest.mark.parametrize("donate", ["auto", False])
@pytest.mark.parametrize("closed_over", [True, False])
def test_no_step_is_lost_without_a_lock(together: Together, steps: int, donate: Any, closed_over: bool) -> None:
    net = Net()
    step = mu.jit(lambda: advance(net), donate=donate) if closed_over else mu.jit(advance, donate=donate)
    seen: list[Any] = []

    def train() -> None:
        for _ in range(steps):
            seen.append(step() if closed_over else step(net))

    together(*[train] * THREADS)
    check_all(net, THREADS * steps)
    assert sorted(int(n) for n, _ in seen) == list(range(1, THREADS * steps + 1)), "each step came after another"
    assert all(int(n) == int(m) for n, m in seen)


@pytest.mark.parametrize("looked_at", [False, True])
def test_programs_over_different_states_are_in_some_order(together: Together, steps: int, looked_at: bool) -> None:
    """The clock says in which order; replayed in that order in plain Python, each step gives what it gave."""
    clock, a, b = mu.Variable(0), mu.Variable(0), mu.Variable(0)

    @mu.jit
    def from_b_to_a() -> Any:
        clock.value += 1
        a.value = a.value // 2 + b.value + 1
        return clock.value, 0, a.value

    @mu.jit
    def from_a_to_b() -> Any:
        clock.value += 1
        b.value = (a.value + b.value) % 1000
        return clock.value, 1, b.value

    @mu.jit
    def swap() -> Any:
        clock.value += 1
        a.value, b.value = b.value, a.value
        return clock.value, 2, a.value

    seen: list[Any] = []

    def train(number: int) -> None:
        for index in range(steps):
            seen.append((from_b_to_a, from_a_to_b, swap)[(number + index) % 3]())

    def look() -> None:
        assert all(int(v) >= 0 for v in (a, b, clock))

    together(*(lambda i=i: train(i) for i in range(THREADS)), beside=look if looked_at else None)
    x = y = 0
    events = sorted(tuple(map(int, event)) for event in seen)
    assert [time for time, _, _ in events] == list(range(1, THREADS * steps + 1))
    for _, kind, result in events:
        if kind == 0:
            x = x // 2 + y + 1
        elif kind == 1:
            y = (x + y) % 1000
        else:
            x, y = y, x
        assert result == (y if kind == 1 else x)
    assert (int(a), int(b)) == (x, y)


@pytest.mark.parametrize("looked_at", [False, True])
def test_a_program_that_only_reads_sees_whole_steps(together: Together, steps: int, looked_at: bool) -> None:
    net = Net()
    step = mu.jit(advance)
    both = mu.jit(lambda net: (net.n.value, net.m.value))
    torn: list[Any] = []

    def train() -> None:
        for _ in range(steps):
            step(net)

    def read() -> None:
        for _ in range(steps):
            n, m = map(int, both(net))
            if n != m:
                torn.append((n, m))

    def look() -> None:
        assert net.n.value is not None and net.m.value is not None

    together(*[train, read] * (THREADS // 2), beside=look if looked_at else None)
    assert not torn
    check_all(net, THREADS // 2 * steps)


def write_in_transaction(net: Net, number: int) -> None:
    with mu.transaction():
        net.n.value = number
        net.m.value = number


def write_by_update(net: Net, number: int) -> None:
    mu.update(net, {"n": number, "m": number})


def write_by_restore(net: Net, number: int) -> None:
    start = mu.snapshot(net)
    write_in_transaction(net, number)
    start.restore()


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("write", [write_in_transaction, write_by_update, write_by_restore])
def test_writes_of_several_states_are_seen_whole(
    together: Together, steps: int, write: Callable[[Net, int], None], stepped: bool
) -> None:
    """A server's program, and who reads all states at once, find the weights from before they were exchanged, or those after."""
    net = Net()
    both = mu.jit(lambda net: (net.n.value, net.m.value))
    torn: list[Any] = []

    def exchange() -> None:
        for number in range(steps):
            write(net, number)

    def read() -> None:
        for _ in range(steps):
            state = mu.state(net)
            for n, m in (both(net), (state["n"], state["m"])):
                if int(n) != int(m):
                    torn.append((int(n), int(m)))

    together(exchange, *[read] * (THREADS // 2), beside=(lambda: advance_both(net)) if stepped else None)
    assert not torn


advance_both = mu.jit(lambda net: advance(net) and None)


# -- readers --------------------------------------------------------------------------------------------------


def read_values(net: Net) -> list[Any]:
    return [net.n.value, net.m.value, *(block.value for block in net.blocks)]


def read_state(net: Net) -> list[Any]:
    return jax.tree.leaves(mu.state(net))


def read_split(net: Net) -> list[Any]:
    return jax.tree.leaves(mu.split(net, mu.Param, ...)[1:])


def read_table(net: Net) -> list[Any]:
    assert "Variable       2         2   8 B" in str(mu.inspect.state_table(net))
    return []


def read_snapshot(net: Net) -> list[Any]:
    snapshot = mu.snapshot(net)  # held, or its arrays are the next step's
    return [np.array(leaf) for leaf in jax.tree.leaves(list(snapshot._values.values()))]


def read_pytree(net: Net) -> list[Any]:
    return jax.tree.leaves(net)


def read_repr(net: Net) -> list[Any]:
    text = repr(net)
    assert "racer" not in text
    assert "more" not in text, "an attribute that a trace has not committed"
    return []


def read_clone(net: Net) -> list[Any]:
    return jax.tree.leaves(mu.state(mu.clone(net)))


def read_deepcopy(net: Net) -> list[Any]:
    return jax.tree.leaves(mu.state(copy.deepcopy(net)))


def read_pickle(net: Net) -> list[Any]:
    return jax.tree.leaves(mu.state(pickle.loads(pickle.dumps(net))))


def read_compiled(net: Net) -> list[Any]:
    return list(_doubled(net))


_doubled = mu.jit(lambda net: (net.n.value * 1, net.blocks[0].value * 1))

READERS = [
    read_values,
    read_state,
    read_split,
    read_table,
    read_snapshot,
    read_pytree,
    read_repr,
    read_clone,
    read_deepcopy,
    read_pickle,
    read_compiled,
]


# One way of reading on each Python, the others on one.
each_reader = pytest.mark.parametrize(
    "read",
    [
        pytest.param(read, id=read.__name__, marks=pytest.mark.once if read is not read_state else ())
        for read in READERS
    ],
)


def check_arrays(values: list[Any]) -> None:
    for value in values:
        assert not isinstance(value, jax.core.Tracer)
        assert np.asarray(value).shape in ((), (4,)), "a state that a trace has not committed"


@each_reader
def test_readers_find_arrays(together: Together, steps: int, read: Callable[[Net], list[Any]]) -> None:
    net = Net()
    programs = [mu.jit(lambda net, x, number=number: (*advance(net), x + number)) for number in range(3)]

    def train() -> None:
        for index in range(steps):
            programs[index % 3](net, jnp.zeros(1 + 10 * index // steps))  # now and then it is traced again

    def look() -> None:
        check_arrays(read(net))

    def look_often() -> None:
        for _ in range(steps):
            look()

    together(train, train, look_often, look_often, beside=look)
    check_all(net, 2 * steps)


# -- tracing and structure ------------------------------------------------------------------------------------


def test_all_threads_trace_at_once(together: Together, steps: int) -> None:
    net = Net()

    @mu.jit
    def step(net: Net, x: jax.Array) -> jax.Array:
        advance(net)
        return x * 2 if net.fast else x + x

    def train(size: int) -> None:
        for _ in range(steps):
            assert step(net, jnp.ones(size)).shape == (size,)

    together(*(lambda size=size: train(size) for size in range(1, THREADS + 1)))
    check_all(net, THREADS * steps)


def test_a_thread_toggles_the_mode(together: Together, steps: int) -> None:
    class Toggled(Net):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = mu.nn.Dropout(0.5, rngs=mu.Rngs(0))

    net = Toggled()

    @mu.jit
    def step(net: Toggled, x: jax.Array) -> jax.Array:
        advance(net)
        return net.dropout(x)

    def train(size: int) -> None:
        for index in range(steps):
            if size == 1 and index % 10 == 0:
                net.eval() if index % 20 else net.train()
                net.fast = not net.fast
            out = step(net, jnp.ones(size))
            assert set(np.unique(out)) <= {0.0, 1.0, 2.0}

    together(*(lambda size=size: train(size) for size in range(1, THREADS + 1)))
    check_all(net, THREADS * steps)


def test_a_thread_changes_structure_that_others_walk_over(together: Together, steps: int) -> None:
    net = Net()
    net.items = {"first": 1}
    net.extra = [1]

    @mu.jit
    def count(net: Net, x: jax.Array) -> jax.Array:
        return x + len(net.extra) + 10 * len(net.items) + (100 if hasattr(net, "more") else 0) + int(not net.training)

    def change() -> None:
        net.eval()
        net.extra = [*net.extra, 1][-3:]
        net.items = {**net.items, "second": 2}
        net.more = 1
        net.train()
        del net.more
        net.items = {"first": 1}
        time.sleep(0.02)  # else no trace is left alone

    def walk(size: int) -> None:
        for index in range(steps):
            count(net, jnp.zeros(size))
            if index % 10 == 0:
                mu.graphdef(net)
                repr(net)

    together(*(lambda size=size: walk(size) for size in range(1, 5)), beside=change)
    for size in range(1, 5):  # nobody kept what was true of a moment in between
        assert count(net, jnp.zeros(size))[0] == len(net.extra) + 10


@pytest.mark.parametrize("times", [1, 1000])
def test_another_thread_changes_the_model_while_it_is_traced(times: int) -> None:
    net = Net()
    traces = []

    def toggle() -> None:
        net.fast = not net.fast

    @mu.jit
    def step(net: Net) -> jax.Array:
        seen = net.fast
        if len(traces) < times:
            traces.append(seen)
            other = threading.Thread(target=toggle)
            other.start()
            other.join()
        return jnp.ones(1 if seen else 2)

    if times == 1:
        assert step(net).shape == (2,)
        toggle()
        assert step(net).shape == (1,)
    else:
        with pytest.raises(mu.errors.StructureError, match=r"changed by another thread each of the 20 times `.*step"):
            step(net)
        times = 0
        assert step(net).shape == (1 if net.fast else 2,)


@pytest.mark.parametrize("read", [None, *READERS], ids=lambda f: getattr(f, "__name__", "nobody_reads"))
def test_a_thread_raises_in_the_middle_of_tracing(together: Together, steps: int, read: Any) -> None:
    net = Net()
    net.extra = [1]
    step = mu.jit(advance)

    def fails() -> None:
        @mu.jit
        def bad(net: Net) -> None:
            advance(net)
            net.extra.append(2)
            net.more = mu.Variable(jnp.zeros(3))
            net.fast = False
            raise KeyError("in the middle")

        with pytest.raises(KeyError, match="in the middle"):
            bad(net)

    def train() -> None:
        for _ in range(steps):
            step(net)

    def look() -> None:
        for _ in range(steps if read else 0):
            check_arrays(read(net))

    together(train, train, train, look, look, beside=fails)
    check_all(net, 3 * steps)
    assert net.extra == [1] and net.fast and not hasattr(net, "more")


@each_reader
def test_readers_wait_for_a_trace_that_changes_structure(read: Callable[[Net], list[Any]]) -> None:
    net = Net()
    problems: list[BaseException] = []

    def look() -> None:
        try:
            check_arrays(read(net))
        except BaseException as problem:
            problems.append(problem)

    reader = threading.Thread(target=look, daemon=True)

    @mu.jit
    def step(net: Net) -> None:
        advance(net)
        net.more = mu.Variable(jnp.zeros(3))
        reader.start()
        reader.join(0.2)  # time enough to look, if it does not wait
        raise KeyError("in the middle")

    with pytest.raises(KeyError, match="in the middle"):
        step(net)
    reader.join(LIMIT)
    assert not reader.is_alive()
    assert not problems, problems


def test_a_thread_steps_while_another_begins_to_trace() -> None:
    """The other thread's step runs just after JAX has found that an array to trace on is there."""
    net = Net()
    step = mu.jit(advance)
    step(net)
    step(net)
    ran = []

    def at_line(frame: types.FrameType, event: str, _: Any) -> Any:
        text = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and "_pjrt_layout" in text and not ran:
            ran.append(threading.Thread(target=step, args=(net,)))
            ran[0].start()
            ran[0].join(1)  # it may have to wait
        return at_line

    before = sys.gettrace()
    try:
        sys.settrace(lambda frame, *_: at_line if frame.f_code.co_name == "format" else None)
        mu.jit(lambda: advance(net))()
    finally:
        sys.settrace(before)
    for thread in ran:
        thread.join(LIMIT)
        assert not thread.is_alive()
    check_all(net, 3 + len(ran))


class Lazy(mu.Module):
    """Makes a state of its own for each name it is called with."""

    def __init__(self) -> None:
        self.caches: dict[str, mu.Cache] = {}
        self.calls = mu.Variable(0)

    def __call__(self, name: str, x: jax.Array) -> jax.Array:
        if name not in self.caches:
            self.caches[name] = mu.Cache(jnp.zeros_like(x))
        self.caches[name].value = self.caches[name] + x
        self.calls += 1
        return self.caches[name].value


@pytest.mark.parametrize("names", ["ab", "aa"])
def test_a_state_is_made_while_another_is_made(names: str) -> None:
    """The other thread makes its state when the first has traced, and is about to put in what the trace made."""
    model = Lazy()
    step = mu.jit(lambda model, x, name: model(name, x), static_argnames="name")
    other = threading.Thread(target=lambda: step(model, jnp.ones(3), name=names[1]), daemon=True)

    def at_replay(frame: types.FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code is record.replay.__code__ and other.ident is None:
            other.start()
            other.join(1)  # it may have to wait

    before = sys.getprofile()
    try:
        sys.setprofile(at_replay)
        step(model, jnp.ones(3), name=names[0])
    finally:
        sys.setprofile(before)
    other.join(LIMIT)
    assert not other.is_alive()
    assert int(model.calls) == 2
    assert {name: float(cache[0]) for name, cache in model.caches.items()} == {n: names.count(n) for n in names}


class Store(mu.Module):
    """Its entries come before its counts in a walk."""

    def __init__(self, names: str) -> None:
        self.entries = {name: mu.Cache(1000.0) for name in names}
        self.first = mu.Variable(0.0)
        self.second = mu.Variable(10.0)

    def numbers(self) -> list[float]:
        return [float(x) for x in (self.first, self.second, *self.entries.values())]


@pytest.mark.parametrize(("before", "after"), [("x", ""), ("x", "yx"), ("", "x"), ("", "yx"), ("xy", "x"), ("xy", "")])
def test_structure_changes_before_a_trace_begins(before: str, after: str) -> None:
    """Another thread changes structure when a call has walked over a model, and is about to trace."""
    model = Store(before)
    entries = list(model.entries.values())

    def change() -> None:
        for name in set(before) - set(after):
            del model.entries[name]
        model.entries = {name: model.entries.get(name) or mu.Cache(1000.0) for name in after}

    other = threading.Thread(target=change, daemon=True)

    def count(model: Store) -> None:
        model.first += 1
        model.second += 1

    step = mu.jit(count)

    def at_trace(frame: types.FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code is compiler.Compiler._prepare.__code__ and other.ident is None:
            other.start()
            other.join(1)  # it may have to wait

    profile = sys.getprofile()
    try:
        sys.setprofile(at_trace)
        step(model)
    finally:
        sys.setprofile(profile)
    other.join(LIMIT)
    assert not other.is_alive()
    assert model.numbers() == [1, 11] + [1000] * len(after)
    assert [float(entry) for entry in entries] == [1000] * len(before)
    for names in (before, after):  # the programs that are kept are right
        again = Store(names)
        step(again)
        assert again.numbers() == [1, 11] + [1000] * len(names)


def test_states_are_made_in_several_threads(together: Together) -> None:
    step = mu.jit(lambda model, x, name: model(name, x), static_argnames="name")

    def train(model: Lazy, number: int) -> None:
        for index in range(6):
            step(model, jnp.ones(number + 1), name=f"{number}.{index // 2}")

    for _ in range(10):
        model = Lazy()
        together(*(lambda n=n, model=model: train(model, n) for n in range(4)))
        assert int(model.calls) == 24
        assert sorted(model.caches) == [f"{number}.{index}" for number in range(4) for index in range(3)]
        for name, cache in model.caches.items():
            np.testing.assert_array_equal(np.asarray(cache), np.full(int(name[0]) + 1, 2.0))


def test_the_same_state_is_made_in_several_threads(together: Together) -> None:
    for _ in range(10):
        model = Lazy()
        step = mu.jit(lambda model, x: model("only", x))
        together(*[lambda model=model, step=step: step(model, jnp.ones(3))] * 4)
        assert int(model.calls) == 4
        np.testing.assert_array_equal(np.asarray(model.caches["only"]), np.full(3, 4.0))


def test_threads_use_every_transform(together: Together, steps: int) -> None:
    """Each on a model of its own; the functions, and with them the compiled programs, are shared."""

    def loss(net: Net, x: jax.Array) -> jax.Array:
        advance(net)
        return jnp.sum((net.blocks[0].value + x) ** 2)

    compiled = mu.jit(loss)
    programs: list[Callable[[Net], Any]] = [
        lambda net: compiled(net, 1.0),
        lambda net: mu.grad(loss)(net, 1.0),
        lambda net: mu.for_loop(lambda x: loss(net, x), jnp.ones(1)),
        lambda net: mu.cond(True, lambda: loss(net, 1.0), lambda: jnp.float32(0)),
        lambda net: mu.remat(loss)(net, 1.0),
        lambda net: mu.jit(mu.grad(loss))(net, 1.0),
    ]

    def run(number: int) -> None:
        net = Net()
        for index in range(steps // 10):
            programs[(number + index) % len(programs)](net)
        check_all(net, steps // 10)

    together(*(lambda n=n: run(n) for n in range(THREADS)))


def test_no_key_is_drawn_twice() -> None:
    """Draws in ordinary code, by four threads that take turns very often."""
    rngs = mu.Rngs(0)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            keys = list(pool.map(lambda _: np.asarray(jax.random.key_data(rngs())).tobytes(), range(200)))
    finally:
        sys.setswitchinterval(before)
    assert len(set(keys)) == 200
