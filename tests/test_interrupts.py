"""An interrupt at any moment of a donating training loop leaves a model that can be read, saved and trained on."""

from __future__ import annotations

import random
import signal
import threading

import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX interval timers")


class Net(mu.Module):
    def __init__(self, count: int) -> None:
        self.states = [mu.Variable(jnp.zeros(8)) for _ in range(count)]


@mu.jit
def step(model: Net) -> None:
    for state in model.states:
        state.value = state.value + 1


def interrupt_often(hits: int) -> None:
    assert threading.current_thread() is threading.main_thread()
    model = Net(60)
    step(model)
    step(model)
    rng = random.Random(0)
    armed = False

    def handler(*_: object) -> None:
        if armed:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, handler)
    count = 0
    try:
        while count < hits:
            armed = True
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 5e-4))
                for _ in range(100):
                    step(model)
            except KeyboardInterrupt:
                count += 1
            armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            values = [float(state.value[0]) for state in model.states] if count % 20 == 0 else [0.0]
            assert len(set(values)) == 1, "a step was committed in part"
            assert not any(state._value.is_deleted() for state in model.states)
            step(model)
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    start = np.asarray(model.states[0])
    step(model)
    np.testing.assert_array_equal(np.asarray(model.states[-1]), start + 1)


def test_interrupts_lose_nothing() -> None:
    interrupt_often(200)


@pytest.mark.slow
def test_ten_thousand_interrupts_lose_nothing() -> None:
    interrupt_often(10_000)
