"""What is known about the objects of a call: when it holds, when it comes back, what it keeps alive."""

from __future__ import annotations

import gc
import random
import signal
import threading
import weakref
from typing import Any

import jax
import pytest

import mutatis as mu
from mutatis.compilation.compiler import Compiler
from mutatis.core.structure import structure

pytestmark = pytest.mark.filterwarnings("ignore::mutatis.errors.RecompilationWarning")


class Part(mu.Module):
    def __init__(self) -> None:
        self.v = mu.Variable(0)
        self.flag = False


class Net(mu.Module):
    def __init__(self) -> None:
        self.parts = [Part(), Part()]
        self.extra = Part()
        self.level: Any = 1
        self.items = {"a": 1}


def describe(net: Net) -> tuple[Any, ...]:
    """Everything static of a net, as Python sees it."""
    modules = [net, net.extra, *net.parts]
    flags = [module.flag for module in modules[1:]]
    return (*flags, *(module.training for module in modules), net.level, repr(net.level), sorted(net.items.items()))


@pytest.fixture
def binds(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Each walk over the objects of a call."""
    walks: list[Any] = []
    bind = Compiler._bind

    def counted(self: Compiler, *args: Any, **kwargs: Any) -> Any:
        walks.append(args)
        return bind(self, *args, **kwargs)

    monkeypatch.setattr(Compiler, "_bind", counted)
    return walks


def seen_by(step: Any, net: Net) -> Any:
    """What a step was traced with."""
    return step(net).value


@pytest.fixture
def step() -> Any:
    class Seen:
        def __init__(self, value: Any) -> None:
            self.value = value

    jax.tree_util.register_pytree_node(Seen, lambda seen: ((), seen.value), lambda value, _: Seen(value))

    @mu.jit
    def look(net: Net) -> Seen:
        net.extra.v += 1
        return Seen(describe(net))

    return look


def toggle_mode(net: Net, on: bool) -> None:
    net.eval() if on else net.train()


def toggle_flag(net: Net, on: bool) -> None:
    net.parts[1].flag = on


def toggle_level(net: Net, on: bool) -> None:
    net.level = "high" if on else None


@pytest.mark.parametrize("toggle", [toggle_mode, toggle_flag, toggle_level], ids=lambda f: f.__name__)
def test_toggling_and_back_walks_over_nothing(toggle: Any, step: Any, binds: list[Any], traces: Any) -> None:
    net = Net()
    for on in (True, False, True, False):
        toggle(net, on)
        assert seen_by(step, net) == describe(net)
    before = len(binds)
    for on in (True, False) * 5:
        toggle(net, on)
        assert seen_by(step, net) == describe(net)
    assert len(binds) == before
    assert int(net.extra.v) == 14


def test_toggling_inside_a_transaction_that_fails_is_undone(step: Any) -> None:
    net = Net()
    seen_by(step, net)

    def fails() -> None:
        net.eval()
        net.parts[0].flag = True
        raise KeyError

    for transform in (mu.jit, mu.remat):
        with pytest.raises(KeyError):
            transform(fails)()
        assert net.training
        assert seen_by(step, net) == describe(net)


def test_values_that_are_equal_but_of_other_types_are_told_apart(step: Any) -> None:
    net = Net()
    for level in (1, True, 1.0, 0, False, -0.0, 0.0, None, "1", 1):
        net.level = level
        assert seen_by(step, net) == describe(net)


@pytest.mark.parametrize("seed", range(8))
def test_random_changes(seed: int, step: Any) -> None:
    draw = random.Random(seed)
    nets = [Net(), Net()]

    def change(net: Net) -> None:
        match draw.randrange(10):
            case 0:
                net.eval()
            case 1:
                net.train()
            case 2:
                draw.choice([net.extra, *net.parts]).eval()
            case 3:
                net.extra = Part()
            case 4:
                net.items[draw.choice("abc")] = draw.randrange(2)
            case 5:
                net.parts = [Part(), *net.parts[:1]]
            case 6:
                net.level = draw.choice([1, True, 2.0, "x", None])
            case 7:
                random.seed(0)  # ours is another generator
            case _:
                part = draw.choice([net.extra, *net.parts])
                part.flag = not part.flag

    for _ in range(60):
        net = draw.choice(nets)
        if draw.random() < 0.2:
            change(net)
        change(net)
        assert seen_by(step, net) == describe(net)


def test_what_was_known_before_keeps_no_states_alive(step: Any) -> None:
    net = Net()
    for flag in (True, False):
        net.extra.flag = flag
        seen_by(step, net)
    gone = weakref.ref(net.extra.v)
    net.extra = Part()
    seen_by(step, net)
    gc.collect()
    assert gone() is None


def test_two_threads_toggle_at_once(step: Any) -> None:
    net = Net()
    seen_by(step, net)
    barrier = threading.Barrier(4)

    def toggle(number: int) -> None:
        barrier.wait()
        for index in range(300):
            net.eval() if (index + number) % 2 else net.train()
            net.parts[0].flag = bool((index + number) % 3)

    for _ in range(3):
        threads = [threading.Thread(target=toggle, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen_by(step, net) == describe(net)


def test_a_signal_handler_may_toggle(step: Any) -> None:
    net = Net()
    seen_by(step, net)
    before = signal.signal(signal.SIGALRM, lambda *_: setattr(net.parts[0], "flag", not net.parts[0].flag))
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
        for index in range(3000):
            net.parts[1].flag = bool(index % 2)
            net.eval() if index % 3 else net.train()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert seen_by(step, net) == describe(net)


def test_an_epoch_comes_back_only_with_the_flags() -> None:
    net = Net()
    mu.jit(lambda net: net.extra.v + 1)(net)
    first = structure.epoch
    net.eval()
    second = structure.epoch
    net.train()
    assert structure.epoch == first != second
    net.level = 2
    net.eval()
    net.level = 1
    assert structure.epoch == second
    net.level = 1.5  # not a flag
    net.level = 1
    assert structure.epoch != second


def test_submodules_that_come_later_get_the_mode_too() -> None:
    net = Net()
    net.eval().train()
    net.parts.append(Part())
    net.more = Part()
    net.eval()
    assert {module.training for module in (net.parts[2], net.more, net.extra)} == {False}
    net.parts[2].extra = Part()
    net.train()
    assert net.parts[2].extra.training
    del net.parts[2]
    net.eval()
    assert not net.parts[1].training
