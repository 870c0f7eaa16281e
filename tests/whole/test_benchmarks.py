"""What the benchmarks compare is the same work; counts of operations, buffers and bytes are those of threading by hand."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import mutatis as mu
from mutatis.compilation import dispatch
from mutatis.compilation.compiler import Compiler
from mutatis.tracing.scope import Scope

pytestmark = pytest.mark.once
FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(FOLDER))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield importlib.import_module("programs")


@pytest.mark.parametrize("model", ["transformer", "convnet"])
def test_the_program_is_the_one_threaded_by_hand(model: str, programs: ModuleType) -> None:
    models = importlib.import_module("models")
    pair = programs.Pair(models.transformer(layers=1) if model == "transformer" else models.convnet(layers=4))
    lowered = {name: pair.lower(name) for name in (programs.OURS, programs.HAND)}
    ours, hand = (programs.lowered_operations(each.as_text()) for each in lowered.values())
    assert programs.differing(ours, hand) == "every kind alike"
    compiled = {name: each.compile() for name, each in lowered.items()}
    ours, hand = (programs.operations(each.as_text()) for each in compiled.values())
    assert programs.differing(ours, hand) == "every kind alike", "copies too: each state comes back in its own buffer"
    ours, hand = (programs.peak(each) for each in compiled.values())
    numbers = ours.pop("shared") - hand.pop(
        "shared"
    )  # a state that is one number, such as a step count, keeps its memory
    assert numbers in (0, 4, 8)
    assert ours == hand
    costs = [each.cost_analysis() for each in compiled.values()]
    for what in ("flops", "bytes accessed"):
        assert costs[0][what] == pytest.approx(costs[1][what], rel=1e-5)
    assert pair.run(compiled), "the same bits after two steps"


def test_each_written_state_comes_back_in_its_own_buffer() -> None:
    class Net(mu.Module):
        def __init__(self) -> None:
            self.a, self.b, self.c = (mu.Variable(jnp.zeros(4)) for _ in range(3))

    @mu.jit
    def step(net: Net, x: jax.Array) -> None:
        for cell in (net.c, net.a, net.b):  # in another order than the arguments
            cell.value = cell + x

    text = step.lower(Net(), jnp.ones(4)).as_text()
    assert re.findall(r"%arg(\d+): \S+ \{tf.aliasing_output = (\d+)", text) == [("0", "0"), ("1", "1"), ("2", "2")]


@pytest.mark.parametrize("first", [True, False])
def test_one_trace_walks_over_a_model_once(first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from mutatis.tracing.scope import Scope

    walks: list[Any] = []
    walk = Scope.__init__

    def counted(self: Scope, *args: Any, **kwargs: Any) -> None:
        walks.append(args)
        walk(self, *args, **kwargs)

    monkeypatch.setattr(Scope, "__init__", counted)
    step = mu.jit(lambda net, x: net(x))
    net = mu.nn.Linear(2, 2, rngs=mu.Rngs(0))
    if first:
        step(net, jnp.ones((1, 2)))
        assert len(walks) == 1
    else:
        step.lower(net, jnp.ones((1, 2)))
        assert len(walks) == 1


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("dispatch", ["--states", "12", "--rounds", "1"]),
        pytest.param("calls", ["--states", "12", "--rounds", "1", "--growth", "12,30"], marks=pytest.mark.slow),
        pytest.param("loops", ["--states", "12", "--rounds", "1", "--only", "captured list"], marks=pytest.mark.slow),
        pytest.param("workloads", ["--rounds", "1", "--only", "LIF", "--peers"], marks=pytest.mark.slow),
        pytest.param("spiking", ["--rounds", "1", "--only", "checks"], marks=pytest.mark.slow),
        pytest.param("imports", ["--rounds", "1"], marks=pytest.mark.slow),
        pytest.param("eager", ["--rounds", "1"], marks=pytest.mark.slow),
        pytest.param("pretraining", ["--rounds", "1"], marks=pytest.mark.slow),
        pytest.param("decoding", ["--rounds", "1", "--sizes", "tiny"], marks=pytest.mark.slow),
    ],
)
def test_scripts_run(script: str, options: list[str]) -> None:
    shown = shown_by(script, *options)
    assert "ratio" in shown or "figure" in shown
    assert "12 states" in shown or "--states" not in options


def test_counts_are_those_of_threading_by_hand() -> None:
    shown = shown_by("counts")
    assert "a sharded training step: all-gather" in shown
    assert "missed" not in shown, shown


def test_the_plot_is_that_of_the_figures(programs: ModuleType, tmp_path: Path) -> None:
    """One that is stale is written anew by `make bench ARGS=--write`."""
    report = importlib.import_module("report")
    for drawn in report.plot(json.loads(report.DATA.read_text()), tmp_path):
        assert drawn.read_bytes() == (report.PAGE.parent / drawn.name).read_bytes(), f"{drawn.name} is stale"


def test_the_page_has_the_figures(programs: ModuleType) -> None:
    report = importlib.import_module("report")
    page = report.PAGE.read_text(encoding="utf-8")
    for found in json.loads(report.DATA.read_text()).values():
        assert report.table(report.rows_of(found)) in page


def shown_by(script: str, *options: str) -> str:
    strict = ("JAX_NUMPY_DTYPE_PROMOTION", "JAX_NUMPY_RANK_PROMOTION")
    return subprocess.run(
        [sys.executable, str(FOLDER / f"{script}.py"), *options],
        check=True,
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name not in strict},
    ).stdout


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(FOLDER))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield importlib.import_module


WORKLOADS = [
    "a VAE that sows its KL term",
    "a DQN step with its replay buffer in states",
    "a GAN with two optimizers",
    "an LIF step, called from Python",
    "a token, looked at, model as argument",
    "a token, looked at, model closed over",
    "a token, looked at, the position read too",
    "a token, looked at, of two models in turn",
]


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_whole_program_is_the_one_by_hand_and_costs_nothing_besides(
    name: str, scripts: Any, monkeypatch: pytest.MonkeyPatch, traces: Any
) -> None:
    workloads = scripts("workloads")
    assert list(workloads.WORKLOADS) == WORKLOADS
    workload = workloads.WORKLOADS[name]()
    workloads.check(name, workload)
    counts = {"walks": 0, "plans": 0, "copies": 0}

    def count(owner: Any, attribute: str, what: str) -> None:
        original = getattr(owner, attribute)

        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[what] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, attribute, counted)

    count(Scope, "__init__", "walks")
    count(Compiler, "_prepare", "plans")
    count(dispatch, "copy_values", "copies")
    with traces.compilations() as compiled:
        for _ in range(20):
            workload.ours()
    assert compiled.count == 0
    assert counts == {"walks": 0, "plans": 0, "copies": 0}


def test_the_pretraining_step_is_the_one_by_hand(scripts: Any) -> None:
    scripts("pretraining").check()
