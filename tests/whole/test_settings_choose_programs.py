"""JAX's settings choose which trace is called: what it writes goes to the cells of that trace and to no others."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu

mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
Setting = Callable[[], contextlib.AbstractContextManager[Any]]
SETTINGS: dict[str, tuple[Setting, Callable[[], bool]]] = {
    "enable_x64": (lambda: jax.enable_x64(True), lambda: bool(jax.config.jax_enable_x64)),
    "default_matmul_precision": (
        lambda: jax.default_matmul_precision("highest"),
        lambda: jax.config.jax_default_matmul_precision == "highest",
    ),
    "numpy_dtype_promotion": (
        lambda: jax.numpy_dtype_promotion("standard"),
        lambda: jax.config.jax_numpy_dtype_promotion == "standard",
    ),
    "numpy_rank_promotion": (
        lambda: jax.numpy_rank_promotion("allow"),
        lambda: jax.config.jax_numpy_rank_promotion == "allow",
    ),
    "set_mesh": (lambda: jax.set_mesh(mesh), lambda: not jax.sharding.get_abstract_mesh().empty),
}
each_setting = pytest.mark.parametrize("name", SETTINGS)


class Pair(mu.Module):
    """One state is written under the setting, another without it."""

    def __init__(self, on: Callable[[], bool]) -> None:
        self.a, self.b, self.both = mu.Variable(jnp.zeros(3)), mu.Variable(jnp.zeros(3)), mu.Variable(jnp.zeros(2))
        self._on = on

    def step(self, x: Any) -> Any:
        cell, by = (self.a, 1) if self._on() else (self.b, 10)
        cell.value = cell.value + by
        self.both.value = self.both.value + 1
        return cell.value.sum() + x * 0

    def check(self, on: int, off: int) -> None:
        np.testing.assert_array_equal(self.a.value, np.full(3, on))
        np.testing.assert_array_equal(self.b.value, np.full(3, 10 * off))
        np.testing.assert_array_equal(self.both.value, np.full(2, on + off))


ORDERS = ["01", "10", "0110", "010101", "001101", "1001011"]


def jitted() -> Any:
    return mu.jit(lambda pair, x: pair.step(x))


STYLES: dict[str, Callable[[Pair], Callable[[Any], Any]]] = {
    "argument": lambda pair: functools.partial(jitted(), pair),
    "closure": lambda pair: mu.jit(lambda x: pair.step(x)),
    "method": lambda pair: mu.jit(pair.step),
    "eager loop": lambda pair: lambda x: mu.for_loop(lambda x: pair.step(x), x[None])[0],
    "in a jit": lambda pair: mu.jit(functools.partial(jitted(), pair)),
    "in a transaction": lambda pair: functools.partial(in_transaction, jitted(), pair),
}


def in_transaction(f: Any, *args: Any) -> Any:
    with mu.transaction():
        return f(*args)


@each_setting
@pytest.mark.parametrize("style", STYLES)
def test_in_every_order(name: str, style: str) -> None:
    setting, on = SETTINGS[name]
    for order in ORDERS if style == "argument" else ORDERS[2:4]:
        pair = Pair(on)
        step, counts = STYLES[style](pair), [0, 0]
        for which in map(int, order):
            with setting() if which else contextlib.nullcontext():
                step(jnp.ones((), jnp.float32))
            counts[which] += 1
            pair.check(counts[1], counts[0])


@each_setting
def test_each_setting_is_traced_once(name: str) -> None:
    if name == "set_mesh":
        pytest.skip("a state that was written under a mesh has another type")
    setting, on = SETTINGS[name]
    pair, traces = Pair(on), []
    step = mu.jit(lambda pair, x: (traces.append(1), pair.step(x))[1])
    for _ in range(3):
        for which in (False, True):
            with setting() if which else contextlib.nullcontext():
                step(pair, jnp.ones((), jnp.float32))
    assert len(traces) == 2
    pair.check(3, 3)


def test_several_settings_at_once() -> None:
    """More than are remembered for one model; each is its own program."""
    names = ["enable_x64", "default_matmul_precision", "numpy_rank_promotion"]
    seen: list[tuple[bool, ...]] = []
    cells = [mu.Variable(0) for _ in range(8)]

    @mu.jit
    def step(cells: Any) -> None:
        now = tuple(SETTINGS[name][1]() for name in names)
        seen.append(now)
        cell = cells[sum(2**i for i, on in enumerate(now) if on)]
        cell.value = cell.value + 1

    for _ in range(2):
        for chosen in itertools.product([False, True], repeat=3):
            with contextlib.ExitStack() as stack:
                for name, on in zip(names, chosen, strict=True):
                    stack.enter_context(SETTINGS[name][0]() if on else contextlib.nullcontext())
                step(cells)
    assert [int(c) for c in cells] == [2] * 8
    assert len(seen) == 8


def test_threads_with_settings_of_their_own() -> None:
    setting, on = SETTINGS["default_matmul_precision"]
    pair = Pair(on)
    step = mu.jit(lambda pair, x: pair.step(x))

    def work(mine: bool) -> None:
        with setting() if mine else contextlib.nullcontext():
            for _ in range(100):
                step(pair, jnp.ones((), jnp.float32))

    threads = [threading.Thread(target=work, args=(number % 2 == 0,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    pair.check(200, 200)


def test_compiled_ahead_of_time_and_called_under_another_setting() -> None:
    """As in JAX, it stays what it was compiled for."""
    setting, on = SETTINGS["default_matmul_precision"]
    pair = Pair(on)
    step = mu.jit(lambda pair, x: pair.step(x))
    x = jnp.ones((), jnp.float32)
    with setting():
        compiled = step.lower(pair, x).compile()
    compiled(pair, x)
    step(pair, x)
    compiled(pair, x)
    pair.check(2, 1)


@pytest.mark.once
def test_cleared_caches() -> None:
    setting, on = SETTINGS["default_matmul_precision"]
    pair = Pair(on)
    step, x = mu.jit(lambda pair, x: pair.step(x)), jnp.ones((), jnp.float32)
    for _ in range(2):
        step(pair, x)
        with setting():
            step(pair, x)
        jax.clear_caches()
    pair.check(2, 2)


def test_a_default_device() -> None:
    """It is part of what JAX traces by, as by hand."""
    traces, by_hand = [], []
    v = mu.Variable(jnp.zeros(2))
    step = mu.jit(lambda: (traces.append(1), v.set(v.value + 1))[1])
    raw = jax.jit(lambda x: (by_hand.append(1), x + 1)[1])
    for setting in (contextlib.nullcontext(), jax.default_device(jax.devices()[0]), contextlib.nullcontext()):
        with setting:
            step()
            raw(jnp.zeros(2))
    assert len(traces) == len(by_hand)
    np.testing.assert_array_equal(v.value, [3, 3])
