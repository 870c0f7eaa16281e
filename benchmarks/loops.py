"""What real loops do around a jitted step, and what that costs: each pattern beside the same thing threaded by hand.

The states are arrays of eight floats in nested modules, as in `dispatch.py`. By hand they are one donated list, and whatever
the pattern adds is written as plain JAX users write it. So the ratio is that of the whole loop body.
"""

from __future__ import annotations

import argparse
import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import dispatch
import jax
import jax.numpy as jnp
import timing

import mutatis as mu

Call = Callable[[], Any]


class ByHand:
    """Values in a list, and a jitted function that is given them and returns the new ones first."""

    def __init__(self, count: int, function: Callable[..., Any] | None = None) -> None:
        self.values = dispatch.start(count)
        self.jitted = jax.jit(function or (lambda values: ([v * dispatch.FACTOR for v in values],)), donate_argnums=0)

    def __call__(self, *args: Any) -> Any:
        self.values, *rest = self.jitted(self.values, *args)
        return rest


def step_of(net: Any) -> None:
    """The plain step."""
    dispatch.update(net)


# -- patterns: given a model, how it is called; and the same by hand -------------------------------------------------


def plain(net: Any, count: int) -> tuple[Call, Call]:
    """The bare call."""
    step = mu.jit(step_of)
    return lambda: step(net), ByHand(count)


def float_of_the_loss(net: Any, count: int) -> tuple[Call, Call]:
    """``float(model.loss)`` after each call."""
    step, hand = mu.jit(step_of), ByHand(count)
    loss = dispatch.cells(net.blocks[0])[0]
    loss.value = jnp.float32(1)

    def by_hand() -> float:
        hand()
        return float(hand.values[0])

    hand.values[0] = jnp.float32(1)
    return lambda: (step(net), float(loss))[1], by_hand


def value_of_the_loss(net: Any, count: int) -> tuple[Call, Call]:
    """``model.loss.value`` after each call."""
    step, hand = mu.jit(step_of), ByHand(count)
    loss = dispatch.cells(net.blocks[0])[0]
    loss.value = jnp.float32(1)
    hand.values[0] = jnp.float32(1)
    return lambda: (step(net), loss.value)[1], lambda: (hand(), hand.values[0])[1]


def dict_batch(net: Any, count: int) -> tuple[Call, Call]:
    """A dict of two arrays as batch."""
    batch = {"x": jnp.float32(1), "y": jnp.float32(2)}

    def train(net: Any, batch: Any) -> Any:
        step_of(net)
        return batch["x"] + batch["y"]

    step = mu.jit(train)
    hand = ByHand(count, lambda values, b: ([v * dispatch.FACTOR for v in values], b["x"] + b["y"]))
    return lambda: step(net, batch), lambda: hand(batch)


def captured(hold: Callable[[Any], Any], get: Callable[[Any], Any]) -> Callable[[Any, int], tuple[Call, Call]]:
    """A model that the function reaches through something that it names."""

    def pattern(net: Any, count: int) -> tuple[Call, Call]:
        kept = hold(net)
        return mu.jit(lambda: step_of(get(kept))), ByHand(count)

    return pattern


class Bundle(NamedTuple):
    """A model in a named tuple."""

    net: Any


def in_a_list_of_variables(net: Any, count: int) -> tuple[Call, Call]:
    """No module: the function names a list of Variables."""
    cells = [cell for block in net.blocks for cell in dispatch.cells(block)]

    def train() -> None:
        for cell in cells:
            cell.value = cell.value * dispatch.FACTOR

    return mu.jit(train), ByHand(count)


def in_partial(net: Any, count: int) -> tuple[Call, Call]:
    """A model bound by `functools.partial`."""
    return mu.jit(functools.partial(step_of, net)), ByHand(count)


def a_variable_argument(net: Any, count: int) -> tuple[Call, Call]:
    """A bare Variable beside the model."""
    number = mu.Variable(0.0)

    def train(net: Any, number: Any) -> None:
        step_of(net)
        number.value = number.value + 1

    step = mu.jit(train)
    return lambda: step(net, number), ByHand(count + 1)


def in_a_transaction(net: Any, count: int) -> tuple[Call, Call]:
    """The step inside ``with mu.transaction()``; by hand nothing is donated, for the old values may come back."""
    step = mu.jit(step_of)
    hand = ByHand(count)
    hand.jitted = jax.jit(lambda values: ([v * dispatch.FACTOR for v in values],))

    def call() -> None:
        with mu.transaction():
            step(net)

    return call, hand


def under_a_context(net: Any, count: int) -> tuple[Call, Call]:
    """``with context.set(array)`` around each call."""
    dt, value = mu.Context("dt", 1.0), jnp.float32(0.5)
    step = mu.jit(lambda net: (step_of(net), dt.get() * 1)[1])

    def call() -> Any:
        with dt.set(value):
            return step(net)

    hand = ByHand(count, lambda values, dt: ([v * dispatch.FACTOR for v in values], dt * 1))
    return call, lambda: hand(value)


def intercepted(net: Any, count: int) -> tuple[Call, Call]:
    """`mu.intercept` entered at each call."""

    class Counts(mu.Module):
        def __call__(self, x: Any) -> Any:
            return x * 1

    net.layer = Counts()
    step = mu.jit(lambda net, x: (step_of(net), net.layer(x))[1])
    x = jnp.float32(1)

    def double(module: Any, call: Any, *args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs) * 2

    def call() -> Any:
        with mu.intercept(mu.OfType(Counts), double):
            return step(net, x)

    hand = ByHand(count, lambda values, x: ([v * dispatch.FACTOR for v in values], x * 2))
    return call, lambda: hand(x)


def sown_and_popped_inside(net: Any, count: int) -> tuple[Call, Call]:
    """A step that sows, and pops what was sown, as a loss with an auxiliary term does."""

    def train(net: Any) -> Any:
        step_of(net)
        mu.sow(net, "kl", jnp.float32(1) * 1)
        return mu.pop(net, mu.Intermediate)

    step = mu.jit(train)
    hand = ByHand(count, lambda values: ([v * dispatch.FACTOR for v in values], jnp.float32(1) * 1))
    return lambda: step(net), hand


def made_and_popped_inside(net: Any, count: int) -> tuple[Call, Call]:
    """A step that sets an attribute to a new state, and pops it."""

    def train(net: Any) -> Any:
        step_of(net)
        net.kl = mu.Intermediate(jnp.float32(1) * 1)
        return mu.pop(net, mu.Intermediate)

    step = mu.jit(train)
    hand = ByHand(count, lambda values: ([v * dispatch.FACTOR for v in values], jnp.float32(1) * 1))
    return lambda: step(net), hand


def sown(net: Any, count: int) -> tuple[Call, Call]:
    """A step that sows, whose value is popped after it."""

    def train(net: Any) -> None:
        step_of(net)
        mu.sow(net, "kl", jnp.float32(1) * 1)

    step = mu.jit(train)

    def call() -> Any:
        step(net)
        return mu.pop(net, mu.Intermediate)

    hand = ByHand(count, lambda values: ([v * dispatch.FACTOR for v in values], jnp.float32(1) * 1))
    return call, hand


def made_and_popped(net: Any, count: int) -> tuple[Call, Call]:
    """A step that sets an attribute to a new state, which is popped after it."""

    def train(net: Any) -> None:
        step_of(net)
        net.kl = mu.Intermediate(jnp.float32(1) * 1)

    step = mu.jit(train)

    def call() -> Any:
        step(net)
        return mu.pop(net, mu.Intermediate)

    hand = ByHand(count, lambda values: ([v * dispatch.FACTOR for v in values], jnp.float32(1) * 1))
    return call, hand


def an_unrelated_number(net: Any, count: int) -> tuple[Call, Call]:
    """An int of a module that the step does not use changes between calls."""
    step, other = mu.jit(step_of), mu.Module()
    other.n, other.v = 0, mu.Variable(0.0)
    mu.jit(lambda other: other.v.value)(other)

    def call() -> None:
        step(net)
        other.n += 1

    return call, ByHand(count)


def an_unrelated_type(net: Any, count: int) -> tuple[Call, Call]:
    """A state that the step does not use changes its shape between calls."""
    step, other = mu.jit(step_of), mu.Module()
    other.v = mu.Variable(jnp.zeros(1))
    mu.jit(lambda other: other.v.value)(other)
    values = [jnp.zeros(1), jnp.zeros(2)]
    hand = ByHand(count)

    def call() -> None:
        step(net)
        values.reverse()
        other.v.value = values[0]

    return call, lambda: (hand(), values.reverse())


def a_python_counter(net: Any, count: int) -> tuple[Call, Call]:
    """A Python object's counter that the function's module of helpers happens to name changes between calls."""
    log = types.SimpleNamespace(calls=0, lines=[])

    def train(net: Any) -> None:
        step_of(net)
        if log is None:
            raise ValueError

    step = mu.jit(train)

    def call() -> None:
        step(net)
        log.calls += 1

    return call, ByHand(count)


def after_a_dropped_state(net: Any, count: int) -> tuple[Call, Call]:
    """`mu.state` before each call, which is dropped again; by hand, a new list of the values."""
    step, hand = mu.jit(step_of), ByHand(count)

    def call() -> None:
        mu.state(net)
        step(net)

    return call, lambda: (list(hand.values), hand())[1]


# With the goal for less than 300 states, and that for more, where they differ.
PATTERNS: dict[str, tuple[Callable[[Any, int], tuple[Call, Call]], float | tuple[float, float]]] = {
    "the bare call": (plain, (1.10, 1.05)),
    "call, then `float(model.loss)`": (float_of_the_loss, (1.25, 1.12)),
    "call, then `model.loss.value`": (value_of_the_loss, (1.20, 1.10)),
    "a dict of two arrays as batch": (dict_batch, 1.15),
    "the model in a captured list": (captured(lambda net: [net], lambda kept: kept[0]), 1.10),
    "the model in a captured dict": (captured(lambda net: {"net": net}, lambda kept: kept["net"]), 1.10),
    "the model in a captured tuple": (captured(lambda net: (net,), lambda kept: kept[0]), 1.10),
    "the model in a captured NamedTuple": (captured(Bundle, lambda kept: kept.net), 1.10),
    "Variables in a captured list": (in_a_list_of_variables, 1.10),
    "the model as attribute of a plain object": (
        captured(lambda net: types.SimpleNamespace(net=net), lambda kept: kept.net),
        1.10,
    ),
    "the model in `functools.partial`": (in_partial, 1.10),
    "a bare Variable among the arguments": (a_variable_argument, 1.10),
    "a step inside `with mu.transaction()`": (in_a_transaction, 2.0),
    "`with context.set(array)` at each call": (under_a_context, 1.3),
    "`mu.intercept` entered at each call": (intercepted, 1.3),
    "a step that sows and pops": (sown_and_popped_inside, 1.3),
    "a step that makes a state and pops it": (made_and_popped_inside, 1.3),
    "a step that sows, and `mu.pop` after it": (sown, 1.3),
    "a step that makes a state, and `mu.pop` after it": (made_and_popped, 1.3),
    "an unrelated module's number changes": (an_unrelated_number, 1.10),
    "an unrelated state's shape changes": (an_unrelated_type, 1.10),
    "a counter of a named object changes": (a_python_counter, 1.10),
    "`mu.state`, dropped again, before each call": (after_a_dropped_state, 1.3),
}


def pattern(name: str, count: int, rounds: int) -> timing.Row:
    """One row."""
    make, goals = PATTERNS[name]
    goal = goals if isinstance(goals, float) else goals[count >= 300]
    net = dispatch.build(count, mu.Module, mu.Variable)
    first = dispatch.cells(net.blocks[-1])[-1]
    ours, hand = make(net, count)
    keeper = hand if isinstance(hand, ByHand) else None
    times = timing.interleave(
        {"hand": hand, "ours": ours},
        calls=max(1, dispatch.calls_for(count) // 2),
        rounds=rounds,
        wait=lambda name: first._value if name == "ours" else (keeper.values[-1] if keeper else None),
    )
    return timing.Row(f"{name}: {count} states", "the same by hand", timing.ratio(times, "ours", "hand"), goal)


def measure(options: argparse.Namespace) -> list[timing.Row]:
    """All rows."""
    names = [name for name in PATTERNS if options.only in name]
    return [pattern(name, count, options.rounds) for name in names for count in options.states]


if __name__ == "__main__":
    timing.main(
        __doc__,
        measure,
        ("--states", {"type": dispatch.sizes, "default": [60, 300], "help": "how many"}),
        ("--only", {"default": "", "help": "a part of the names of the patterns to run"}),
    )
