"""Lowering and compiling before the call; programs that are exported, and kept on disk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import errors, nn

SHAPE = jax.ShapeDtypeStruct((2, 3), jnp.float32)
X = jnp.arange(6.0).reshape(2, 3)


class Net(mu.Module):
    def __init__(self, seed: int = 0, *, bias: bool = True) -> None:
        self.linear = nn.Linear(3, 3, rngs=mu.Rngs(seed), use_bias=bias)
        self.dropout = nn.Dropout(0.5, rngs=mu.Rngs(seed))
        self.calls = mu.Variable(0)


def step(net: Net, batch: Any) -> Any:
    net.calls += 1
    net.linear.kernel.value = net.linear.kernel.value * 0.9
    return jnp.sum(net.dropout(net.linear(batch["x"])))


def test_a_compiled_step_beside_the_jitted_one() -> None:
    jitted = mu.jit(step)
    compiled = jitted.lower(Net(), {"x": SHAPE}).compile()
    net, twin = Net(1), Net(1)
    for _ in range(3):
        np.testing.assert_array_equal(compiled(net, {"x": X}), jitted(twin, {"x": X}))
    assert mu.state(net) == mu.state(twin)
    assert int(net.calls) == 3


def test_lowering_runs_and_writes_nothing(traces: Any) -> None:
    net = Net()
    before = mu.state(net)
    body = traces.count(step)
    lowered = mu.jit(body).lower(net, {"x": SHAPE})
    with traces.compilations() as compiled:
        lowered.compile()
    assert compiled.count == traces[body] == 1
    assert mu.state(net) == before


def test_what_jax_knows_of_a_program() -> None:
    lowered = mu.jit(step).lower(Net(), {"x": SHAPE})
    compiled = lowered.compile()
    assert "stablehlo" in lowered.as_text()
    assert compiled.cost_analysis()["flops"] > 0
    assert compiled.memory_analysis().alias_size_in_bytes >= 36, "the kernel is donated"


def test_a_compiled_step_donates_and_it_cannot_be_seen() -> None:
    net = Net()
    compiled = mu.jit(step).lower(net, {"x": SHAPE}).compile()
    held = net.linear.kernel.value
    before = np.array(held)
    compiled(net, {"x": X})
    np.testing.assert_array_equal(held, before)
    inside: Any = net.linear.kernel._value  # nobody holds this one
    compiled(net, {"x": X})
    assert inside.is_deleted()


def test_a_capture_and_what_is_made_inside() -> None:
    calls = mu.Variable(0)

    def make(x: Any) -> Any:
        calls.value += 1
        made = mu.Module()
        made.w = mu.Param(x + calls.value.astype(x.dtype))
        return made

    compiled = mu.jit(make).lower(jax.ShapeDtypeStruct((), jnp.float32)).compile()
    assert [float(compiled(jnp.float32(1)).w) for _ in range(3)] == [2, 3, 4]


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda f, net: f(net, {"x": jnp.ones((4, 3))}), TypeError, "Argument types differ"),
        (lambda f, net: f(net, {"y": X}), TypeError, "pytree"),
        (lambda f, net: f(Net(bias=False), {"x": X}), errors.StructureError, "Call what `mu.jit` returned"),
        (lambda f, net: mu.jit(lambda: f(net, {"x": X}))(), errors.StructureError, "compiled to be called by itself"),
    ],
)
def test_another_call_is_refused_and_nothing_is_lost(call: Any, error: type[Exception], text: str) -> None:
    net = Net()
    compiled = mu.jit(step).lower(net, {"x": SHAPE}).compile()
    compiled(net, {"x": X})
    before = mu.state(net)
    with pytest.raises(error, match=text):
        call(compiled, net)
    assert mu.state(net) == before
    compiled(net, {"x": X})
    assert int(net.calls) == 2


def test_an_exported_step() -> None:
    net = Net()
    pure, state = mu.functionalize(lambda x: step(net, {"x": x}), of=net)
    data = jax.export.export(jax.jit(pure))(state, X).serialize()
    out, new = jax.export.deserialize(data).call(state, X)
    np.testing.assert_array_equal(out, mu.jit(step)(net, {"x": X}))
    assert new == mu.state(net)


CACHED = """
import sys, jax, jax.numpy as jnp, mutatis as mu
from mutatis import nn
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
found = []
jax.monitoring.register_event_listener(lambda event, **_: found.append(event))
model = nn.Linear(3, 3, rngs=mu.Rngs(0))
@mu.jit
def step(model, x):
    model.kernel.value = model.kernel.value * 2
    return model(x)
x = jnp.ones((2, 3))
found.clear()
step(model, x)
print(sum(event.endswith("/cache_hits") for event in found), sum(event.endswith("/cache_misses") for event in found))
"""


def test_programs_are_kept_on_disk(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(CACHED)

    def run() -> str:

        env = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "true"}
        command = [sys.executable, str(program), str(tmp_path / "cache")]
        return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.strip()

    hits, misses = run().split()
    assert int(hits) == 0 < int(misses)
    assert run().split() == [misses, "0"]


# -- static arguments -------------------------------------------------------------------------------------------------


def scaled(net: Net, x: Any, n: int, y: Any = 0.0, *, mode: str = "a") -> Any:
    net.calls += n
    return x * n + y + (1.0 if mode == "b" else 0.0)


@pytest.mark.parametrize(
    ("static", "lowered", "calls"),
    [
        ({"static_argnames": "n"}, ((X, 3), {}), [((X,), {}), ((X, 3), {}), ((X,), {"n": 3})]),
        ({"static_argnames": "n"}, ((X,), {"n": 3}), [((X,), {}), ((X,), {"n": 3})]),
        ({"static_argnums": 2}, ((X, 3, 2.0), {}), [((X, 2.0), {}), ((X, 3, 2.0), {}), ((X, 2.0), {"n": 3})]),
        ({"static_argnums": 2}, ((X, 3), {"y": 2.0}), [((X,), {"y": 2.0}), ((X, 3), {"y": 2.0})]),
        (
            {"static_argnames": ("n", "mode")},
            ((X, 3), {"mode": "b"}),
            [((X,), {}), ((X,), {"mode": "b"}), ((X, 3), {})],
        ),
        ({"static_argnums": (-2,)}, ((X, 3, 2.0), {}), [((X, 2.0), {}), ((X, 3, 2.0), {})]),
    ],
)
@pytest.mark.parametrize("traced", [False, True])
def test_what_was_compiled_takes_no_static_arguments(static: Any, lowered: Any, calls: Any, traced: bool) -> None:
    net, twin = Net(), Net()
    args, kwargs = lowered
    jitted = mu.jit(scaled, **static)
    stage = jitted.trace(net, *args, **kwargs).lower() if traced else jitted.lower(net, *args, **kwargs)
    compiled = stage.compile()
    expected = jitted(twin, *args, **kwargs)
    for call_args, call_kwargs in calls:
        np.testing.assert_array_equal(compiled(net, *call_args, **call_kwargs), expected)
    assert int(net.calls) == 3 * len(calls)


def test_other_static_arguments_are_refused() -> None:
    net = Net()
    compiled: Any = mu.jit(scaled, static_argnames=("n", "mode")).lower(net, X, 3, mode="a").compile()
    for args, kwargs, name in (((X, 4), {}, "n"), ((X,), {"n": 4}, "n"), ((X,), {"mode": "b"}, "mode")):
        with pytest.raises(errors.StructureError, match=f"argument `{name}` is static, and another") as caught:
            compiled(net, *args, **kwargs)
        exec(str(caught.value.cure).split("`")[1], {"compiled": lambda x: compiled(net, x), "x": X})
    with pytest.raises(errors.StructureError, match="arguments of another structure"):
        compiled(net, X, 3, 2.0)
    with pytest.raises(errors.StructureError, match="arguments of another structure"):
        compiled(net)
    assert int(net.calls) == 9
