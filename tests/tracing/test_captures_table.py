"""The table of what is noticed, by identity and baked in (`docs/semantics.md`), row by row: each row has its cases here."""

from __future__ import annotations

import array
import enum
import functools
import importlib
import itertools
import math
import operator
import random
import re
import types
from collections import deque, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu

pytestmark = pytest.mark.filterwarnings("ignore::mutatis.errors.RecompilationWarning")

PAGE = Path(__file__).resolve()
while not (PAGE / "docs" / "semantics.md").exists():
    PAGE = PAGE.parent
TEXT = (PAGE / "docs" / "semantics.md").read_text()
SECTION = TEXT[TEXT.index("### What a program was made from") : TEXT.index("What tracing itself changes")]
TABLES = re.split(r"^\*\*", SECTION, flags=re.MULTILINE)[1:]
ROWS = {table.partition("**")[0]: re.findall(r"^\| (?!captured|---)(.*?) \|", table, re.MULTILINE) for table in TABLES}


class Color(enum.Enum):
    A = 1
    B = 2


class Thing:
    default = 1.0

    def __init__(self, k: float) -> None:
        self.k = k

    @property
    def twice(self) -> float:
        return 2 * self.k

    def __call__(self) -> float:
        return self.k

    def __getitem__(self, index: int) -> float:
        return self.k * index


class Slots:
    __slots__ = ("k",)

    def __init__(self, k: float) -> None:
        self.k = k


Pair = namedtuple("Pair", "k other")
FACTOR = 1.0


class Model(mu.Module):
    rate = 1.0

    def by_global(self) -> Any:
        return FACTOR

    def by_class(self) -> Any:
        return self.rate


def set_factor(value: float) -> None:
    global FACTOR
    FACTOR = value


def set_item(container: Any, key: Any, value: Any) -> None:
    container[key] = value


Case = tuple[Any, Callable[[Any], Any], Callable[[Any], None]]  # a value, how it is read, how it is changed


def rebound(*values: Any, read: Callable[[Any], Any] = float) -> Case:
    """A name that is bound to another value."""
    return [values[0]], lambda held: read(held[0]), lambda held: set_item(held, 0, values[1])


def model(read: Callable[[Any], Any], change: Callable[[Any], None]) -> Case:
    return Model(), read, change


def make_thing() -> Any:
    return type("Local", (Thing,), {})


SEEN: dict[str, list[Callable[[], Case]]] = {
    "a number, string, `None`, member of an enumeration": [
        lambda: rebound(1, 2),
        lambda: rebound(1, 1.0, read=lambda v: len(type(v).__name__)),
        lambda: rebound("a", "bb", read=len),
        lambda: rebound(None, 1, read=lambda v: v is None),
        lambda: rebound(Color.A, Color.B, read=lambda v: v.value),
    ],
    "a list, tuple, dict, set, deque, `NamedTuple`, and subclasses of these": [
        lambda: ([1.0, [2.0]], lambda v: v[1][0], lambda v: set_item(v[1], 0, 3.0)),
        lambda: rebound((1.0,), (2.0,), read=lambda v: v[0]),
        lambda: ({"k": 1.0}, lambda v: v["k"], lambda v: v.update(k=2.0)),
        lambda: ({1.0}, sum, lambda v: v.add(2.0)),
        lambda: (deque([1.0]), lambda v: v[-1], lambda v: v.append(2.0)),
        lambda: rebound(Pair(1.0, 0), Pair(2.0, 0), read=lambda v: v.k),
        lambda: (type("D", (dict,), {})(k=1.0), lambda v: v["k"], lambda v: v.update(k=2.0)),
        lambda: ([1.0] * 1024, lambda v: v[5], lambda v: set_item(v, 5, 2.0)),
    ],
    "an object, by attribute, property, slot, `__getattr__`, `vars`, `[]`": [
        lambda: (Thing(1.0), lambda v: v.k, lambda v: setattr(v, "k", 2.0)),
        lambda: (Thing(1.0), lambda v: v.twice, lambda v: setattr(v, "k", 2.0)),
        lambda: (Slots(1.0), lambda v: v.k, lambda v: setattr(v, "k", 2.0)),
        lambda: (Thing(1.0), lambda v: vars(v)["k"], lambda v: setattr(v, "k", 2.0)),
        lambda: (Thing(1.0), lambda v: v[1], lambda v: setattr(v, "k", 2.0)),
        lambda: (Thing(1.0), lambda v: hasattr(v, "other"), lambda v: setattr(v, "other", 2.0)),
        lambda: (Thing(1.0), lambda v: v.default, lambda v: setattr(v, "default", 2.0)),
    ],
    "a class, by attribute or call": [
        lambda: (make_thing(), lambda v: v.default, lambda v: setattr(v, "default", 2.0)),
        lambda: (make_thing(), lambda v: v(3.0)(), lambda v: setattr(v, "__call__", lambda self: 7.0)),
    ],
    "a module of Python": [
        lambda: (types.ModuleType("m"), lambda v: getattr(v, "k", 0.0), lambda v: setattr(v, "k", 2.0)),
    ],
    "a function, bound method, `partial`, callable object": [
        lambda: rebound(lambda: 1.0, lambda: 2.0, read=lambda v: v()),
        lambda: (Thing(1.0).__call__, lambda v: v(), lambda v: setattr(v.__self__, "k", 2.0)),
        lambda: rebound(functools.partial(max, 1.0), functools.partial(max, 2.0), read=lambda v: v(0.5)),
        lambda: (Thing(1.0), lambda v: v(), lambda v: setattr(v, "k", 2.0)),
    ],
    "a global that a method of a model loads": [lambda: model(Model.by_global, lambda _: set_factor(FACTOR + 1))],
    "an attribute of the class of a model": [
        lambda: model(Model.by_class, lambda _: setattr(Model, "rate", Model.rate + 1)),
    ],
    "a NumPy array up to 64 KB": [
        lambda: (np.ones(3), lambda v: v[0], lambda v: set_item(v, 0, 2.0)),
        lambda: (np.ones(8192), lambda v: v[8191], lambda v: set_item(v, 8191, 2.0)),
    ],
    "an array of JAX up to 64 elements": [lambda: rebound(jnp.ones(3), 2 * jnp.ones(3), read=lambda v: v[0])],
    "a builtin function, a dtype, a class or function of a library": [
        lambda: rebound(math.sin, math.cos, read=lambda v: v(1.0)),
        lambda: rebound(operator.add, operator.mul, read=lambda v: v(3.0, 2.0)),
        lambda: rebound(jnp.float32, jnp.int8, read=lambda v: jnp.dtype(v).itemsize),
        lambda: rebound(jnp.sin, jnp.cos, read=lambda v: v(1.0)),
        lambda: rebound(deque, list, read=lambda v: len(v.__name__)),
    ],
    "an array of JAX of more elements": [lambda: rebound(jnp.ones(300), 2 * jnp.ones(300), read=lambda v: v[0])],
}

BAKED: dict[str, list[Callable[[], Case]]] = {
    "`mu.static(obj)`": [lambda: (mu.static(Thing(1.0)), lambda v: v.value.k, lambda v: setattr(v.value, "k", 2.0))],
    "a container of more than 1024 items": [lambda: ([1.0] * 1025, lambda v: v[5], lambda v: set_item(v, 5, 2.0))],
    "a NumPy array of more than 64 KB, or of objects": [
        lambda: (np.ones(8193), lambda v: v[5], lambda v: set_item(v, 5, 2.0)),
        lambda: (np.array([1.0, None]), lambda v: v[0], lambda v: set_item(v, 0, 2.0)),
    ],
    "a generator, iterator, random generator, `array.array`, `bytearray`": [
        lambda: (itertools.count(), next, next),
        lambda: (random.Random(0), lambda v: v.random(), lambda v: v.random()),
        lambda: (array.array("f", [1.0]), lambda v: v[0], lambda v: set_item(v, 0, 2.0)),
        lambda: (bytearray([1]), lambda v: v[0], lambda v: set_item(v, 0, 2)),
    ],
    "an object that is written in C, or has a base that is": [
        lambda: (type("R", (random.Random,), {})(0), lambda v: v.random(), lambda v: v.random()),
    ],
    "what code reaches by `eval`, `globals()` or `importlib`": [
        lambda: (0.0, lambda v: globals()["FACTOR"], lambda _: set_factor(FACTOR + 1)),
        lambda: (0.0, lambda v: eval("FACTOR"), lambda _: set_factor(FACTOR + 1)),
        lambda: (0.0, lambda v: importlib.import_module(__name__).FACTOR, lambda _: set_factor(FACTOR + 1)),
    ],
    "`__defaults__`, `__code__` and `__dict__`": [
        lambda: (
            types.FunctionType((lambda k=0.0: k).__code__, globals(), "f", (1.0,)),
            lambda v: v(),
            replace_defaults,
        ),
    ],
}


def replace_defaults(function: Any) -> None:
    function.__defaults__ = (2.0,)


def test_each_row_has_its_cases() -> None:
    by_identity = [row for row in ROWS["By identity"] if row in SEEN]
    assert sorted(SEEN) == sorted([*ROWS["Noticed"], *by_identity])
    assert sorted(BAKED) == sorted([*ROWS["Baked in"], *(row for row in ROWS["By identity"] if row not in SEEN)])


def runs(value: Any, read: Callable[[Any], Any]) -> dict[str, Callable[[], float]]:
    """The same by a kept step, by a kept body of a loop, and by a fresh one."""

    def body(c: Any, _: Any) -> Any:
        return jnp.float32(read(value)), None

    def fresh() -> Any:
        return mu.scan(lambda c, _: (jnp.float32(read(value)), None), jnp.float32(0), length=1)[0]

    step = mu.jit(lambda: jnp.float32(read(value)))
    return {
        "jit": lambda: float(step()),
        "scan": lambda: float(mu.scan(body, jnp.float32(0), length=1)[0]),
        "fresh": lambda: float(fresh()),
    }


CASES = [(row, index) for row, cases in SEEN.items() for index in range(len(cases))]
BAKED_CASES = [(row, index) for row, cases in BAKED.items() for index in range(len(cases))]


@pytest.mark.parametrize("how", ["jit", "scan", "fresh"])
@pytest.mark.parametrize(("row", "index"), CASES)
def test_noticed(row: str, index: int, how: str) -> None:
    value, read, change = SEEN[row][index]()
    run = runs(value, read)[how]
    before = float(read(value))
    assert run() == pytest.approx(before)
    assert run() == pytest.approx(before)
    change(value)
    after = float(read(value))
    assert after != before
    assert run() == pytest.approx(after)


@pytest.mark.parametrize("how", ["jit", "scan", "fresh"])
@pytest.mark.parametrize(("row", "index"), BAKED_CASES)
def test_baked_in(row: str, index: int, how: str) -> None:
    value, read, change = BAKED[row][index]()
    run = runs(value, read)[how]
    before = run()
    change(value)
    if how == "fresh" and row not in ("`mu.static(obj)`",):
        assert run() != before, "a fresh function object finds it as it is"
    else:
        assert run() == before
