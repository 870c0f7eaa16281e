"""What the structure of a model costs: calls of jitted steps, state operations, and making a model.

The model is a stack of blocks, each a linear layer and a batch norm over eight features, so that times are those of the
library and not of the arithmetic; its optimizer is SGD with momentum. NNX runs in every mode that it has, plain JAX with
nested dictionaries threaded by hand. Where `mu.jit` donates buffers, the others are told to.

- a jitted step that takes the model and its optimizer and does nothing;
- a jitted step of training on four examples;
- `state`, `split`, `merge` and `update` of the model, outside of any transform;
- making a model of many layers, eagerly and in one compiled program.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import inspect
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from timing import Row, installed, interleave, main, numbers, ratio

import mutatis as mu
from mutatis import nn

WIDTH = 8
TX = optax.sgd(1e-3, momentum=0.9)
OURS, PLAIN = "mu", "jax, by hand"
OPERATIONS = ("state", "split", "merge", "update")
COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX records it once for each program that is compiled

Calls = dict[str, Callable[[], Any]]
MERGE = {"nnx, graph mode": 0.25, "nnx, graph=False": 0.4}  # goals: it makes every object anew, whatever is known


def build(depth: int, module: type, layers: Any, rngs: Any, sequence: Callable[[Any], Any] = list) -> Any:
    """The model in some library: a stack of residual blocks."""

    class Block(module):  # type: ignore[misc]
        def __init__(self, rngs: Any) -> None:
            self.linear = layers.Linear(WIDTH, WIDTH, rngs=rngs)
            self.norm = layers.BatchNorm(WIDTH, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return x + jax.nn.relu(self.norm(self.linear(x)))

    class Net(module):  # type: ignore[misc]
        def __init__(self, rngs: Any) -> None:
            self.blocks = sequence([Block(rngs) for _ in range(depth)])

        def __call__(self, x: jax.Array) -> jax.Array:
            for block in self.blocks:
                x = block(x)
            return x

    return Net(rngs)


def ours(depth: int) -> Any:
    """The model in Mutatis."""
    return build(depth, mu.Module, nn, mu.Rngs(0))


def theirs(nnx: Any, depth: int) -> Any:
    """The model in NNX, with the values of ours."""
    net = build(depth, nnx.Module, nnx, nnx.Rngs(0), getattr(nnx, "List", list))
    nnx.update(net, mu.state(ours(depth)).to_pure_dict())
    return net


def batch() -> tuple[jax.Array, jax.Array]:
    """Four examples."""
    return jax.random.normal(jax.random.key(1), (4, WIDTH)), jax.random.normal(jax.random.key(2), (4, WIDTH))


def loss(net: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """What is made small."""
    return jnp.mean((net(x) - y) ** 2)


def idle(model: Any, optimizer: Any) -> None:
    """The step that does nothing."""


# -- one call of a jitted step ---------------------------------------------------------------------------------------


def our_steps(depth: int, *, trains: bool) -> Calls:
    """A step of Mutatis over a model and optimizer of its own."""
    net = ours(depth)
    optimizer = mu.Optimizer(net, TX)
    if not trains:
        step = mu.jit(idle)
        return {OURS: lambda: step(net, optimizer)}

    @mu.jit
    def train(net: Any, optimizer: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        value, gradients = mu.value_and_grad(loss)(net, x, y)
        optimizer.update(gradients)
        return value

    x, y = batch()
    return {OURS: lambda: train(net, optimizer, x, y)}


def plain_steps(depth: int, *, trains: bool) -> Calls:
    """The same step in plain JAX: nested dictionaries, threaded by hand."""
    state = mu.state(ours(depth))
    params = {"blocks": [_params(state, number) for number in range(depth)]}
    stats = {"blocks": [_statistics(state, number) for number in range(depth)]}
    values = jax.tree.map(jnp.array, (params, stats, TX.init(params)))  # buffers of its own, as they are donated

    def apply(params: Any, stats: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        new = []
        for block, running in zip(params["blocks"], stats["blocks"], strict=True):
            h = x @ block["linear"]["kernel"] + block["linear"]["bias"]
            mean, var = jnp.mean(h, 0), jnp.var(h, 0)
            new.append(jax.tree.map(lambda old, now: 0.99 * old + 0.01 * now, running, {"mean": mean, "var": var}))
            h = (h - mean) * (jax.lax.rsqrt(var + 1e-5) * block["norm"]["scale"]) + block["norm"]["bias"]
            x = x + jax.nn.relu(h)
        return x, {"blocks": new}

    def measure(params: Any, stats: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
        out, stats = apply(params, stats, x)
        return jnp.mean((out - y) ** 2), stats

    def train(values: Any, x: jax.Array, y: jax.Array) -> tuple[Any, jax.Array]:
        params, stats, moments = values
        (value, stats), gradients = jax.value_and_grad(measure, has_aux=True)(params, stats, x, y)
        updates, moments = TX.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), stats, moments), value

    step = jax.jit(train, donate_argnums=0) if trains else jax.jit(lambda values: (values, None))
    given = batch() if trains else ()

    def call() -> Any:
        nonlocal values
        values, value = step(values, *given)
        return value

    return {PLAIN: call}


def _params(state: Any, number: int) -> Any:
    linear, norm = state["blocks", number, "linear"], state["blocks", number, "norm"]
    return {
        "linear": {"kernel": linear["kernel"], "bias": linear["bias"]},
        "norm": {"scale": norm["scale"], "bias": norm["bias"]},
    }


def _statistics(state: Any, number: int) -> Any:
    norm = state["blocks", number, "norm"]
    return {"mean": norm["mean"], "var": norm["var"]}


def nnx_steps(nnx: Any, depth: int, *, trains: bool) -> Calls:
    """The same step in the modes of the installed NNX, each over a model and optimizer of its own.

    They are its graph mode, the same without updates of structure, its tree mode, what it offers to hoist the walk over
    the model out of the call in each of these, and `split` and `merge` by hand around `jax.jit`.
    """
    given = batch() if trains else ()
    donate: Any = {"donate_argnums": (0, 1)} if trains else {}

    def pair(**mode: Any) -> tuple[Any, Any]:
        net = theirs(nnx, depth)
        return net, nnx.Optimizer(net, TX, wrt=nnx.Param, **({"graph": mode["graph"]} if "graph" in mode else {}))

    def step(**mode: Any) -> Callable[..., Any]:
        def train(net: Any, optimizer: Any, x: jax.Array, y: jax.Array) -> jax.Array:
            value, gradients = nnx.value_and_grad(loss, **mode)(net, x, y)
            optimizer.update(net, gradients)
            return value

        return train if trains else idle

    def jitted(**mode: Any) -> Callable[[], Any]:
        call, objects = nnx.jit(step(**mode), **donate, **mode), pair(**mode)
        return lambda: call(*objects, *given)

    def partial(**mode: Any) -> Callable[[], Any]:
        call = nnx.jit_partial(step(**mode), *pair(**mode), **({"donate_argnums": 0} if trains else {}), **mode)
        return lambda: call(*given)

    def by_hand(pure: Callable[[Any], Any], **mode: Any) -> Callable[[], Any]:
        definition, values = nnx.split(pair(**mode), **mode)
        values, function = pure(values), step(**mode)

        def threaded(values: Any, *given: Any) -> tuple[Any, Any]:
            objects = nnx.merge(definition, values)
            value = function(*objects, *given)
            return pure(nnx.state(objects, **mode)), value

        call = jax.jit(threaded, **({"donate_argnums": 0} if trains else {}))

        def thread() -> Any:
            nonlocal values
            values, value = call(values, *given)
            return value

        return thread

    steps: Calls = {"nnx.jit": jitted()}
    if hasattr(nnx, "cached_partial"):
        cached = nnx.cached_partial(nnx.jit(step(), **donate), *pair())
        steps["nnx.cached_partial"] = lambda: cached(*given)
    steps["nnx.split, jax.jit, nnx.merge"] = by_hand(lambda state: state)
    if hasattr(nnx, "as_pure"):
        steps["the same, pure values"] = by_hand(nnx.as_pure)
    options = inspect.signature(nnx.jit).parameters
    simple, tree = {"graph": True, "graph_updates": False}, {"graph": False}
    if "graph_updates" in options:
        steps["nnx.jit, graph_updates=False"] = jitted(**simple)
    if "graph" in options:
        steps["nnx.jit, graph=False"] = jitted(**tree)
        steps["graph=False, split, jax.jit, merge"] = by_hand(lambda state: state, **tree)
    if hasattr(nnx, "jit_partial"):
        steps["nnx.jit_partial, graph_updates=False"] = partial(**simple)
        steps["nnx.jit_partial, graph=False"] = partial(**tree)
    return steps


def steps(depth: int, rounds: int, nnx: Any, *, trains: bool) -> list[Row]:
    """The rows on one step."""
    calls = our_steps(depth, trains=trains) | plain_steps(depth, trains=trains)
    if nnx:
        calls |= nnx_steps(nnx, depth, trains=trains)
    if trains:
        check({name: float(call()) for name, call in calls.items()})
    what = f"{'training' if trains else 'no-op'} step, {depth} blocks"
    return compare(what, calls, rounds, max(3, (200 if trains else 1000) // depth), goal=1.0)


def check(losses: dict[str, float]) -> None:
    """All contenders begin alike."""
    for name, value in losses.items():
        if not math.isclose(value, losses[OURS], rel_tol=1e-3):
            sys.exit(f"`{name}` computed a loss of {value}, and `{OURS}` one of {losses[OURS]}")


# -- state operations --------------------------------------------------------------------------------------------------


def our_operations(depth: int) -> dict[str, Callable[[], Any]]:
    """The state operations of Mutatis."""
    return operations(mu, ours(depth))


def operations(library: Any, net: Any, **mode: Any) -> Calls:
    """The state operations of a library that names them as NNX does."""
    state, (definition, values) = library.state(net, **mode), library.split(net, **mode)
    others = itertools.cycle(
        [jax.tree.map(lambda x: x + 0, state) for _ in range(2)]
    )  # each update writes other arrays
    return {
        "state": lambda: library.state(net, **mode),
        "split": lambda: library.split(net, **mode),
        "merge": lambda: library.merge(definition, values),
        "update": lambda: library.update(net, next(others)),
    }


def plain_operations(depth: int) -> Calls:
    """What comes closest to them for nested dictionaries in plain JAX."""
    tree: Any = mu.state(ours(depth)).to_pure_dict()
    leaves, treedef = jax.tree.flatten(tree)
    return {
        "state": lambda: jax.tree_util.tree_leaves_with_path(tree),
        "split": lambda: jax.tree.flatten(tree),
        "merge": lambda: jax.tree.unflatten(treedef, leaves),
        "update": lambda: jax.tree.map(lambda _, new: new, tree, tree),
    }


def traversals(depth: int, rounds: int, nnx: Any) -> list[Row]:
    """The rows on state operations."""
    ways = {OURS: our_operations(depth), PLAIN: plain_operations(depth)}
    if nnx:
        ways["nnx, graph mode"] = operations(nnx, theirs(nnx, depth))
        if "graph" in inspect.signature(nnx.split).parameters:
            ways["nnx, graph=False"] = operations(nnx, theirs(nnx, depth), graph=False)
    rows = []
    for operation in OPERATIONS:
        calls = {name: way[operation] for name, way in ways.items()}
        made = compare(f"{operation}, {depth} blocks", calls, rounds, max(2, 100 // depth), goal=0.2)
        rows += (
            [dataclasses.replace(row, goal=MERGE.get(row.against)) for row in made] if operation == "merge" else made
        )
    return rows


# -- making a model ----------------------------------------------------------------------------------------------------


def making(layers: int, rounds: int, nnx: Any) -> list[Row]:
    """The rows on making a model eagerly."""
    makers = makers_of(layers, nnx)
    times: dict[str, list[float]] = {name: [] for name in makers}
    for number in range(min(rounds, 9) + 1):
        for name in list(makers)[:: 1 if number % 2 else -1]:
            times[name].append(timed(makers[name]))
            gc.collect()
    times = {name: seconds[1:] for name, seconds in times.items()}
    what = f"making {layers} layers"
    rows = [Row(what, "", statistics.median(times[OURS]), unit="s")]
    if nnx:
        note = f"{statistics.median(times['nnx']):.3g} s"
        rows.append(Row(what, "nnx", ratio(times, OURS, "nnx"), 1.0, note=note))
    return rows


def compiling(layers: int, nnx: Any) -> list[Row]:
    """The rows on making a model in a compiled program. The seconds are XLA's, and many."""
    makers = makers_of(layers, nnx)
    makers[OURS] = mu.jit(makers[OURS])
    if nnx:
        makers["nnx"] = nnx.jit(makers["nnx"])
    taken, programs = {}, {}
    for name, make in makers.items():
        with compilations() as compiled:
            taken[name] = timed(make)
        programs[name] = len(compiled)
    what = f"making {layers} layers, jitted"
    rows = [
        Row(what, "", programs[OURS], 1, unit="programs"),
        Row(what, "", taken[OURS], unit="s", note="the first call, compiling included"),
    ]
    if nnx:
        rows.append(Row(what, "nnx.jit", taken[OURS] / taken["nnx"], note=f"{taken['nnx']:.3g} s"))
    return rows


def makers_of(layers: int, nnx: Any) -> Calls:
    """What makes a model of so many layers, in each library."""
    makers: Calls = {OURS: lambda: ours(layers // 2)}
    if nnx:
        sequence = getattr(nnx, "List", list)
        makers["nnx"] = lambda: build(layers // 2, nnx.Module, nnx, nnx.Rngs(0), sequence)
    return makers


def timed(make: Callable[[], Any]) -> float:
    """The seconds until a model is there."""
    begin = time.perf_counter()
    net = make()
    jax.block_until_ready(net.blocks[-1].linear.kernel[...])
    return time.perf_counter() - begin


@contextlib.contextmanager
def compilations() -> Iterator[list[float]]:
    """The seconds that each compilation of a program took, inside."""
    seconds: list[float] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event == COMPILED:
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


# -- the report --------------------------------------------------------------------------------------------------------


def compare(what: str, calls: Calls, rounds: int, number: int, *, goal: float) -> list[Row]:
    """Rows of ours against each other contender; a goal is set against NNX only."""
    times = interleave(calls, calls=number, rounds=rounds)
    rows = [Row(what, "", statistics.median(times[OURS]) * 1e6, unit="us")]
    for name in list(calls)[1:]:
        note = f"{statistics.median(times[name]) * 1e6:.0f} us"
        rows.append(Row(what, name, ratio(times, OURS, name), None if name == PLAIN else goal, note=note))
    return rows


def measure(options: argparse.Namespace) -> list[Row]:
    """All rows."""
    nnx = installed("flax.nnx") if options.peers else None
    rows: list[Row] = []
    for depth in options.depths:
        rows += steps(depth, options.rounds, nnx, trains=False)
        gc.collect()
        rows += steps(depth, options.rounds, nnx, trains=True)
        gc.collect()
        rows += traversals(depth, options.rounds, nnx)
        gc.collect()
    rows += making(options.layers, options.rounds, nnx)
    rows += compiling(options.jitted_layers, nnx)
    return rows


if __name__ == "__main__":
    main(
        __doc__,
        measure,
        ("--depths", {"type": numbers, "default": [5, 50, 200], "help": "how many blocks, e.g. 5,50"}),
        ("--layers", {"type": int, "default": 1000, "help": "how many to make eagerly"}),
        (
            "--jitted-layers",
            {"type": int, "default": 100, "help": "how many to make in one program; 1000 take minutes"},
        ),
        ("--peers", {"action": "store_true", "help": "flax NNX too, if it is installed"}),
    )
