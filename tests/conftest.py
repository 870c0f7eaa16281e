"""What every test stands on: the JAX it runs under, two counters, and a reader of every error (`plain_words`).

JAX is set up by environment variables, before its first import, so that the subprocesses of a test get the
same: four CPU devices, strict dtype promotion, no rank promotion, a cache of what XLA compiled, and XLA's quick way to
compile (`JAX_DISABLE_MOST_OPTIMIZATIONS=0`, as in `make test-all`, has it optimize as users have it).

Most of the time of the tests is XLA's, and most of what it compiles it has compiled before: in another test, on the other
worker, in the run before. What is compiled again by our fault is counted all the same: JAX asks for each compilation,
and `traces.compilations()` counts what it asks for, wherever the program then comes from.

- `MUTATIS_TEST_PLATFORM=cuda` runs on that platform (tests marked `gpu` are skipped elsewhere).
- `--leaks`, or `MUTATIS_TEST_LEAKS=1`, runs everything under JAX's leak check. Not by default: it turns
  the trace caches off, so the tests that count traces are skipped under it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

if "jax" in sys.modules:
    raise pytest.UsageError("JAX was imported before tests/conftest.py could set it up (by a pytest plugin?)")

os.environ["JAX_PLATFORMS"] = os.environ.get("MUTATIS_TEST_PLATFORM", "cpu")
if os.environ["JAX_PLATFORMS"] != "cpu":
    os.environ["JAX_PLATFORMS"] += ",cpu"  # callbacks run there
os.environ["JAX_NUM_CPU_DEVICES"] = "4"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "compiled"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["MPLBACKEND"] = "Agg"

import hypothesis
import jax
import jax.monitoring

from tests import plain_words

# Compiling makes the time of an example uneven; CI finds the same examples each time.
hypothesis.settings.register_profile(
    "mutatis",
    deadline=None,
    derandomize=True,
    max_examples=30,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile("search", deadline=None, derandomize=False, max_examples=1000)
hypothesis.settings.load_profile("mutatis")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--leaks",
        action="store_true",
        default=os.environ.get("MUTATIS_TEST_LEAKS", "0") not in ("", "0"),
        help="run under jax_check_tracer_leaks",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--leaks"):
        jax.config.update("jax_check_tracer_leaks", True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip(f"needs a GPU, runs on {jax.default_backend()}")
    if item.get_closest_marker("jax_leaks") and item.config.getoption("--leaks"):
        pytest.skip("JAX finds a leak in this program when it is threaded by hand, too")
    if item.get_closest_marker("slow"):
        faulthandler.cancel_dump_traceback_later()  # the limit for tests that hang: these take as long as they take


def pytest_collection_finish() -> None:
    _keep_from_the_collector()


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is not None and nextitem.path != item.path:
        _keep_from_the_collector()


def _keep_from_the_collector() -> None:
    """Have the garbage collector no longer look at what is there: libraries, tests, and what JAX keeps of earlier files.

    It is half a million objects, and many tests collect garbage on purpose.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with plain_words.checked():
        return (yield)


class Compilations:
    """The programs that XLA compiled inside one `with traces.compilations()` block."""

    def __init__(self) -> None:
        self.names: list[str] = []

    @property
    def count(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"Compilations({self.names})"


class TraceCounter:
    """Counts how often Python runs the bodies of functions: under a transform, how often they are traced.

    `counted = traces.count(fn)` behaves as `fn`; `traces[fn]` (or `traces[counted]`) is the number of its
    runs, `traces.total` that of all counted functions.
    """

    def __init__(self) -> None:
        self._runs: Counter[Callable[..., Any]] = Counter()

    def count(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fn)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._runs[fn] += 1
            return fn(*args, **kwargs)

        return counted

    def __getitem__(self, fn: Callable[..., Any]) -> int:
        return self._runs[fn] if fn in self._runs else self._runs[getattr(fn, "__wrapped__", fn)]

    @property
    def total(self) -> int:
        return self._runs.total()

    @contextlib.contextmanager
    def compilations(self) -> Iterator[Compilations]:
        """Counts what XLA compiles in the block, on any thread.

        JAX's own little programs (`jnp.zeros`) count too: make the inputs before the block, or see `names`.
        """
        seen = Compilations()
        _watching.append(seen)
        try:
            yield seen
        finally:
            _watching.remove(seen)


_watching: list[Compilations] = []


def _on_duration(event: str, _seconds: float, **facts: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        for seen in tuple(_watching):
            seen.names.append(str(facts.get("fun_name", "?")))


jax.monitoring.register_event_duration_secs_listener(_on_duration)


@pytest.fixture
def compiled_afresh() -> Iterator[None]:
    """XLA compiles whatever the test needs: nothing is read from or written to a disk."""
    from jax.experimental.compilation_cache import compilation_cache

    def use(cache: bool) -> None:
        jax.config.update("jax_enable_compilation_cache", cache)
        compilation_cache.reset_cache()  # whether it is used is asked once

    use(False)
    yield
    use(True)


@pytest.fixture
def traces(request: pytest.FixtureRequest) -> TraceCounter:
    """Counts traces and compilations; see `TraceCounter`."""
    if request.config.getoption("--leaks"):
        pytest.skip("the leak check turns JAX's trace caches off: nothing to count")
    return TraceCounter()
