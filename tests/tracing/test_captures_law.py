"""The law of captures, tested as a law.

Whatever raw JAX, with the states threaded by hand, gets right, Mutatis gets right: a fresh function object never gets the answer
of another. And what eager Python gets right and raw JAX does not, Mutatis gets right too, or `docs/semantics.md` says that it is
baked in (`baked` below).

A case is a random closure over random captured values of every sort, reached in a random way, run by a random transform,
while the values are rebound, changed in place and built afresh between calls. Each run is compared with plain Python.

The seeds are fixed, so that CI runs the same cases each time; `MUTATIS_RANDOM_CAPTURES=5000 pytest -m slow` runs fresh ones.
"""

from __future__ import annotations

import argparse
import array
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import itertools
import math
import operator
import os
import pathlib
import random
import re
import types
import typing
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mutatis as mu

pytestmark = [pytest.mark.once, pytest.mark.filterwarnings("ignore::mutatis.errors.RecompilationWarning")]


@dataclasses.dataclass
class Sort:
    """A sort of captured value.

    Attributes:
      make: a value by a number, 1 to 4; another number gives another value.
      read: what the function makes of it: a float.
      change: has it read as another number's value would, by a change in place.
      baked: whether that goes unnoticed in a function object that is kept, as the table in `docs/semantics.md` says.
      once: whether reading it changes it, so that it is read once.
    """

    make: Callable[[int], Any]
    read: Callable[[Any], Any]
    change: Callable[[Any, int], None] | None = None
    baked: bool = False
    once: bool = False


class Color(enum.Enum):
    A, B, C, D = 1, 2, 3, 4


class Low(enum.IntEnum):
    A, B, C, D = 1, 2, 3, 4


class High(enum.IntEnum):
    A, B, C, D = 1, 2, 3, 4


class Plain:
    default: Any = 0.5

    def __init__(self, k: Any) -> None:
        self.k = k
        self.unrelated = 0

    @property
    def doubled(self) -> Any:
        return 2 * self.k

    @functools.cached_property
    def cached(self) -> Any:
        return 3 * self.k

    def method(self, x: Any) -> Any:
        return x * self.k

    @classmethod
    def of_class(cls) -> Any:
        return cls.default

    @staticmethod
    def static(x: Any) -> Any:
        return x * Plain.default

    def __call__(self, x: Any) -> Any:
        return x + self.k

    def __float__(self) -> float:
        return float(self.k)

    def __len__(self) -> int:
        return int(self.k)

    def __getitem__(self, x: Any) -> Any:
        return self.k * x

    def __contains__(self, x: Any) -> bool:
        return bool(x == self.k)

    def __repr__(self) -> str:
        return "k" * int(self.k)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plain) and other.k == self.k

    def __hash__(self) -> int:
        return hash(self.k)


class Child(Plain):
    def method(self, x: Any) -> Any:
        return super().method(x) + 1


class Slotted:
    __slots__ = ("k",)

    def __init__(self, k: Any) -> None:
        self.k = k


class Dynamic:
    def __init__(self, k: Any) -> None:
        self.__dict__["_data"] = {"k": k}

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_data"][name]
        except KeyError:
            raise AttributeError(name) from None


class Validated:
    """A descriptor."""

    def __get__(self, obj: Any, owner: Any = None) -> Any:
        return obj.hidden * 2


class WithDescriptor:
    k = Validated()

    def __init__(self, k: Any) -> None:
        self.hidden = k


@dataclasses.dataclass
class Data:
    k: Any = 1
    rest: Any = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Frozen:
    k: Any = 1


@dataclasses.dataclass(slots=True)
class Both:
    k: Any = 1


class Pair(typing.NamedTuple):
    a: Any
    b: Any

    def total(self) -> Any:
        return self.a + self.b


class OwnDict(dict[str, Any]):
    def first(self) -> Any:
        return self["k"]


class OwnList(list[Any]):
    pass


class OwnTuple(tuple[Any, ...]):
    __slots__ = ()


class OwnFloat(float):
    pass


class Missing(dict[str, Any]):
    scale = 1

    def __missing__(self, key: str) -> Any:
        return self.scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Tree:
    a: Any
    b: Any


def make_class(n: int) -> type:
    return type("Settings", (), {"k": n, "f": lambda self: n})


def make_module(n: int) -> types.ModuleType:
    module = types.ModuleType("settings")
    module.k = n  # type: ignore[attr-defined]
    return module


def closure(n: Any) -> Callable[[Any], Any]:
    def inner(x: Any) -> Any:
        return x + n

    return inner


def nested_closure(n: Any) -> Callable[[Any], Any]:
    box = [n]

    def inner(x: Any) -> Any:
        def deepest() -> Any:
            return x * box[0]

        return deepest()

    inner.box = box  # type: ignore[attr-defined]
    return inner


def with_attribute(n: Any) -> Callable[[Any], Any]:
    def f(x: Any) -> Any:
        return x

    f.k = n  # type: ignore[attr-defined]
    return f


def with_default(n: Any) -> Callable[[Any], Any]:
    def f(x: Any, table: Any = {"k": n}) -> Any:  # noqa: B006
        return x * table["k"]

    return f


def set_item(value: Any, key: Any, item: Any) -> None:
    value[key] = item


def set_deep(value: Any, n: int) -> None:
    value["a"][0]["b"][0] = n


def set_k(value: Any, n: int) -> None:
    value.k = n


def set_first(value: Any, n: int) -> None:
    value[0].k = n


def set_second(value: Any, n: int) -> None:
    value[1].k = n


def put_seventh(value: Any, n: int) -> None:
    value[7] = n


def arrays(n: int) -> Any:
    return [jnp.float32(n), {"a": jnp.ones(2) * n}]


def refill_arrays(value: Any, n: int) -> None:
    value[:] = arrays(n)


def refill_set(value: Any, n: int) -> None:
    value.clear()
    value.add(n)


def computed(value: Any) -> Any:
    return getattr(value, "".join(["", "k"]))


NUMBERS = [math.sin, math.cos, math.exp, math.sqrt]
REAL = [operator.add, operator.sub, operator.mul, operator.truediv]
DTYPES = [jnp.float32, jnp.int8, jnp.int16, jnp.float16]
OF_JAX = [jnp.sin, jnp.cos, jnp.exp, jnp.tanh]
ZEROS = [0.0, -0.0, 1.0, -1.0]

SORTS: dict[str, Sort] = {
    "int": Sort(lambda n: n, lambda v: v),
    "float": Sort(lambda n: n * 0.37, lambda v: v),
    "signed zero": Sort(lambda n: ZEROS[n - 1], lambda v: math.copysign(2.0, v) + v),
    "int, bool or float": Sort(lambda n: [1, True, 1.0, 1j][n - 1], lambda v: len(type(v).__name__)),
    "str": Sort(lambda n: "x" * n, len),
    "bytes": Sort(lambda n: b"x" * n, len),
    "None": Sort(lambda n: None if n == 1 else n, lambda v: 0 if v is None else v),
    "enum": Sort(lambda n: Color(n), lambda v: v.value),
    "enums": Sort(lambda n: (Low if n % 2 else High)(n), lambda v: len(type(v).__name__)),
    "equal enums": Sort(lambda n: (Low if n % 2 else High)(1), lambda v: len(type(v).__name__)),
    "dtype": Sort(lambda n: DTYPES[n - 1], lambda v: jnp.zeros((), v).dtype.itemsize),
    "np.dtype": Sort(lambda n: np.dtype(DTYPES[n - 1]), lambda v: v.itemsize),
    "builtin": Sort(lambda n: NUMBERS[n - 1], lambda v: v(0.5)),
    "operator": Sort(lambda n: REAL[n - 1], lambda v: v(3.0, 2.0)),
    "builtin method": Sort(lambda n: {"k": n}.get, lambda v: v("k")),
    "method wrapper": Sort(lambda n: n.__add__, lambda v: v(1)),
    "str method": Sort(lambda n: ("x" * n).count, lambda v: v("x")),
    "class": Sort(make_class, lambda v: v.k, set_k),
    "instance of a local class": Sort(lambda n: make_class(n)(), lambda v: v.f() + v.k),
    "a class that is called": Sort(lambda n: [Data, Frozen, Both, Slotted][n - 1], lambda v: len(v(3).__class__.__name__)),
    "jnp function": Sort(lambda n: OF_JAX[n - 1], lambda v: v(jnp.float32(0.5))),
    "np function": Sort(lambda n: [np.sin, np.cos, np.exp, np.sqrt][n - 1], lambda v: float(v(0.5))),
    "nn function": Sort(lambda n: [jax.nn.relu, jax.nn.silu, jax.nn.gelu, jax.nn.softplus][n - 1], lambda v: v(jnp.float32(1.5))),
    "schedule": Sort(lambda n: optax.linear_schedule(float(n), 0.0, 10), lambda v: v(0)),
    "cosine": Sort(lambda n: optax.warmup_cosine_decay_schedule(float(n), 1.0, 5, 10), lambda v: v(0)),
    "transformation": Sort(lambda n: optax.sgd(float(n)), lambda v: v.update(jnp.ones(()), v.init(jnp.ones(())))[0]),
    "jitted": Sort(lambda n: jax.jit(lambda x: x * n), lambda v: v(jnp.float32(2.0))),
    "vmapped": Sort(lambda n: jax.vmap(lambda x: x * n), lambda v: v(jnp.ones(1))[0]),
    "partial": Sort(lambda n: functools.partial(operator.mul, n), lambda v: v(3.0)),
    "partial keywords": Sort(lambda n: functools.partial(lambda x, *, k: x * k, k=n), lambda v: v(3.0)),
    "getter": Sort(lambda n: operator.itemgetter(n), lambda v: v([9, 8, 7, 6, 5])),
    "attribute getter": Sort(lambda n: (operator.attrgetter("k"), Plain(n)), lambda v: v[0](v[1]), set_second),
    "a name and an object": Sort(lambda n: ("k", Plain(n)), lambda v: getattr(v[1], v[0]), set_second),
    "function": Sort(closure, lambda v: v(1.0)),
    "nested function": Sort(nested_closure, lambda v: v(2.0), lambda v, n: set_item(v.box, 0, n)),
    "function attribute": Sort(with_attribute, lambda v: v.k * v(1.0), set_k),
    "mutable default": Sort(with_default, lambda v: v(2.0), lambda v, n: set_item(v.__defaults__[0], "k", n)),
    "lambda": Sort(lambda n: [lambda x: x, lambda x: x + 1, lambda x: x * 5, lambda x: -x][n - 1], lambda v: v(2.0)),
    "bound method": Sort(lambda n: Plain(n).method, lambda v: v(2.0), lambda v, n: setattr(v.__self__, "k", n)),
    "method of a child": Sort(lambda n: Child(n), lambda v: v.method(2.0), set_k),
    "callable object": Sort(Plain, lambda v: v(2.0), set_k),
    "attribute": Sort(Plain, lambda v: v.k, set_k),
    "property": Sort(Plain, lambda v: v.doubled, set_k),
    "cached property": Sort(Plain, lambda v: v.cached),
    "getattr": Sort(Plain, lambda v: getattr(v, "k"), set_k),  # noqa: B009
    "computed name": Sort(Plain, computed, set_k),
    "vars": Sort(Plain, lambda v: vars(v)["k"], set_k),
    "__dict__": Sort(Plain, lambda v: v.__dict__["k"], set_k),
    "float()": Sort(Plain, lambda v: float(v), set_k),
    "len()": Sort(Plain, lambda v: len(v), set_k),
    "[]": Sort(Plain, lambda v: v[2], set_k),
    "in": Sort(Plain, lambda v: sum(i * (i in v) for i in range(5)), set_k),
    "repr": Sort(Plain, lambda v: len(f"{v}"), set_k),
    "==": Sort(Plain, lambda v: sum(i * (v == Plain(i)) for i in range(5)), set_k),
    "shadowed default": Sort(lambda n: Plain(n), lambda v: v.default, lambda v, n: setattr(v, "default", n)),
    "hasattr": Sort(lambda n: types.SimpleNamespace(), lambda v: v.k if hasattr(v, "k") else 0.25, set_k),
    "slots": Sort(Slotted, lambda v: v.k, set_k),
    "__getattr__": Sort(Dynamic, lambda v: v.k, lambda v, n: set_item(v._data, "k", n)),
    "descriptor": Sort(WithDescriptor, lambda v: v.k, lambda v, n: setattr(v, "hidden", n)),
    "dataclass": Sort(Data, lambda v: v.k, set_k),
    "dataclass as a whole": Sort(Data, lambda v: dataclasses.asdict(v)["k"], set_k),
    "dataclass replaced": Sort(Data, lambda v: dataclasses.replace(v, rest=()).k, set_k),
    "frozen dataclass": Sort(lambda n: Frozen([1, True, 1.0, 2][n - 1]), lambda v: len(type(v.k).__name__) + v.k),
    "slots dataclass": Sort(Both, lambda v: v.k, set_k),
    "match": Sort(Data, lambda v: match(v), set_k),
    "namespace": Sort(lambda n: types.SimpleNamespace(k=n), lambda v: v.k, set_k),
    "parsed arguments": Sort(lambda n: argparse.Namespace(k=n), lambda v: v.k, set_k),
    "pytree": Sort(lambda n: Tree(n, 2), lambda v: sum(jax.tree.leaves(v)), lambda v, n: setattr(v, "a", n)),
    "module": Sort(make_module, lambda v: v.k, set_k),
    "library module": Sort(lambda n: [math, np, jnp, jax.numpy][n - 1], lambda v: float(v.pi) + len(v.__name__)),
    "list": Sort(lambda n: [n, 2], lambda v: v[0], lambda v, n: set_item(v, 0, n)),
    "tuple": Sort(lambda n: (n, 2), lambda v: v[0]),
    "list or tuple": Sort(lambda n: [[1], (1,), {1}, frozenset({1})][n - 1], lambda v: len(type(v).__name__)),
    "dict": Sort(lambda n: {"k": n}, lambda v: v["k"], lambda v, n: set_item(v, "k", n)),
    "dict order": Sort(lambda n: dict([("a", n), ("b", 5)][:: (-1) ** n]), lambda v: float("".join(map(str, v.values())))),
    "dict subclass": Sort(lambda n: OwnDict(k=n), lambda v: v.first(), lambda v, n: set_item(v, "k", n)),
    "list subclass": Sort(lambda n: OwnList([n]), lambda v: v[0], lambda v, n: set_item(v, 0, n)),
    "tuple subclass": Sort(lambda n: OwnTuple([n]), lambda v: v[0]),
    "float subclass": Sort(OwnFloat, lambda v: v * 2),
    "__missing__": Sort(lambda n: Missing(), lambda v: v["?"], lambda v, n: setattr(v, "scale", n)),
    "named tuple": Sort(lambda n: Pair(n, 2), lambda v: v.total()),
    "defaultdict": Sort(lambda n: collections.defaultdict(int, k=n), lambda v: v["k"], lambda v, n: set_item(v, "k", n)),
    "default factory": Sort(lambda n: collections.defaultdict(lambda: n), lambda v: v.default_factory()),
    "OrderedDict": Sort(lambda n: collections.OrderedDict(k=n), lambda v: v["k"], lambda v, n: set_item(v, "k", n)),
    "Counter": Sort(lambda n: collections.Counter("k" * n), lambda v: v["k"], lambda v, n: set_item(v, "k", n)),
    "UserDict": Sort(lambda n: collections.UserDict(k=n), lambda v: v["k"], lambda v, n: set_item(v, "k", n)),
    "ChainMap": Sort(lambda n: collections.ChainMap({}, {"k": n}), lambda v: v["k"], lambda v, n: set_item(v.maps[1], "k", n)),
    "mapping proxy": Sort(lambda n: types.MappingProxyType({"k": n}), lambda v: v["k"]),
    "set": Sort(lambda n: {n}, lambda v: sum(v), refill_set),
    "frozenset": Sort(lambda n: frozenset({n}), sum),
    "deque": Sort(lambda n: collections.deque([n]), lambda v: v[0], lambda v, n: set_item(v, 0, n)),
    "nested": Sort(lambda n: {"a": ({"b": [n]},)}, lambda v: v["a"][0]["b"][0], set_deep),
    "65 numbers": Sort(lambda n: [n] * 65, lambda v: v[0], lambda v, n: set_item(v, 0, n)),
    "2000 numbers": Sort(lambda n: [n] * 2000, lambda v: v[0], lambda v, n: set_item(v, 0, n), baked=True),
    "NumPy scalar": Sort(lambda n: np.float32(n), float),
    "NumPy array": Sort(lambda n: np.full(3, n, np.float32), lambda v: v[0], lambda v, n: set_item(v, 0, n)),
    "400 NumPy numbers": Sort(lambda n: np.full(400, n, np.float32), lambda v: v[7], lambda v, n: set_item(v, 7, n)),
    "large NumPy array": Sort(lambda n: np.full(20_000, n, np.float32), lambda v: v[7], put_seventh, baked=True),
    "NumPy array of objects": Sort(lambda n: np.array([n, None]), lambda v: v[0], lambda v, n: set_item(v, 0, n), baked=True),
    "NumPy dtypes": Sort(lambda n: np.ones(2, [np.float32, np.int32, np.int8, np.uint8][n - 1]), lambda v: v.dtype.num),
    "JAX array": Sort(lambda n: jnp.full(3, float(n)), lambda v: v[0]),
    "large JAX array": Sort(lambda n: jnp.full(300, float(n)), lambda v: v[0]),
    "JAX arrays": Sort(arrays, lambda v: v[0] + v[1]["a"][0], refill_arrays),
    "random key": Sort(jax.random.key, lambda v: jax.random.uniform(v)),
    "weak reference": Sort(lambda n: (keep := Plain(n), weakref.ref(keep)), lambda v: v[1]().k, set_first),
    "cell": Sort(lambda n: types.CellType(n), lambda v: v.cell_contents, lambda v, n: setattr(v, "cell_contents", n)),
    "fraction": Sort(lambda n: fractions.Fraction(n, 7), float),
    "decimal": Sort(lambda n: decimal.Decimal(["1", "1.0", "1.00", "2"][n - 1]), lambda v: len(str(v))),
    "complex": Sort(lambda n: complex(1, n), lambda v: v.imag),
    "range": Sort(range, lambda v: len(v)),
    "slice": Sort(lambda n: slice(0, n), lambda v: len([1, 2, 3, 4, 5][v])),
    "path": Sort(lambda n: pathlib.PurePath("x" * n), lambda v: len(v.name)),
    "pattern": Sort(lambda n: re.compile("x" * n), lambda v: len(v.pattern)),
    "date": Sort(lambda n: datetime.date(2000, n, 1), lambda v: v.month),
    "array": Sort(lambda n: array.array("i", [n]), lambda v: v[0], lambda v, n: set_item(v, 0, n), baked=True),
    "bytearray": Sort(lambda n: bytearray([n]), lambda v: v[0], lambda v, n: set_item(v, 0, n), baked=True),
    "generator": Sort(lambda n: itertools.count(n), next, once=True),
    "iterator": Sort(lambda n: iter([n, n + 10, n + 20]), next, once=True),
    "random generator": Sort(random.Random, lambda v: v.random(), once=True),
    "NumPy generator": Sort(np.random.default_rng, lambda v: v.random(), once=True),
}  # fmt: skip


def match(value: Any) -> Any:
    match value:
        case Data(k, _):
            return k
    return 0


WAYS: dict[str, Callable[[Any, Any], Callable[[], Any]]] = {}


def way(f: Any) -> Any:
    WAYS[f.__name__] = f
    return f


@way
def directly(value: Any, read: Any) -> Any:
    return lambda: read(value)


@way
def through_a_function(value: Any, read: Any) -> Any:
    def inner() -> Any:
        return read(value)

    return lambda: inner()


@way
def by_default(value: Any, read: Any) -> Any:
    def f(held: Any = value) -> Any:
        return read(held)

    return f


@way
def by_keyword_default(value: Any, read: Any) -> Any:
    def f(*, held: Any = value) -> Any:
        return read(held)

    return f


@way
def by_partial(value: Any, read: Any) -> Any:
    return functools.partial(read, value)


@way
def in_a_list(value: Any, read: Any) -> Any:
    held = [None, value]
    return lambda: read(held[1])


@way
def in_a_tuple(value: Any, read: Any) -> Any:
    held = (value, read)
    return lambda: held[1](held[0])


@way
def in_a_dict(value: Any, read: Any) -> Any:
    held = {"value": value, "read": read}
    return lambda: held["read"](held["value"])


@way
def in_a_namespace(value: Any, read: Any) -> Any:
    held = types.SimpleNamespace(value=value)
    return lambda: read(held.value)


class Owner:
    def __init__(self, value: Any, read: Any) -> None:
        self.value, self.read = value, read

    def run(self) -> Any:
        return self.read(self.value)

    def __call__(self) -> Any:
        return self.run()


@way
def by_bound_method(value: Any, read: Any) -> Any:
    return Owner(value, read).run


@way
def by_callable_object(value: Any, read: Any) -> Any:
    return Owner(value, read)


@way
def by_decorator(value: Any, read: Any) -> Any:
    @functools.wraps(read)
    def wrapper(*args: Any) -> Any:
        return read(*args)

    return lambda: wrapper(value)


@way
def beside_a_model(value: Any, read: Any) -> Any:
    held = (mu.Variable(0.0), value)
    return lambda: to_array(read(held[1])) + 0 * held[0].value


@way
def by_star(value: Any, read: Any) -> Any:
    args = (value,)
    return lambda: read(*args)


GLOBAL: Any = None
READ: Any = None


@way
def by_global(value: Any, read: Any) -> Any:
    global GLOBAL, READ
    GLOBAL, READ = value, read
    return lambda: READ(GLOBAL)


class Model(mu.Module):
    def __init__(self) -> None:
        self.w = mu.Variable(1.0)

    def __call__(self) -> Any:
        return to_array(READ(GLOBAL)) * self.w.value


@way
def by_a_method_of_a_model(value: Any, read: Any) -> Any:
    global GLOBAL, READ
    GLOBAL, READ = value, read
    model = Model()
    return lambda: model()


def to_array(x: Any) -> Any:
    return jnp.asarray(x, jnp.float32)


# Each takes a function of nothing and gives one that runs it: kept, as long as the function is.
TRANSFORMS: dict[str, Callable[[Callable[[], Any]], Callable[[], Any]]] = {}


def transform(f: Any) -> Any:
    TRANSFORMS[f.__name__] = f
    return f


@transform
def jit(f: Any) -> Any:
    return mu.jit(lambda: to_array(f()))


@transform
def jit_itself(f: Any) -> Any:
    step = mu.jit(lambda g: to_array(g()), static_argnums=0) if isinstance(f, types.FunctionType) else None
    return (lambda: step(f)) if step else mu.jit(lambda: to_array(f()))


@transform
def scan(f: Any) -> Any:
    def body(c: Any, _: Any) -> Any:
        return to_array(f()), None

    return lambda: mu.scan(body, jnp.float32(0), None, length=1)[0]


@transform
def for_loop(f: Any) -> Any:
    def body(_: Any) -> Any:
        return to_array(f())

    return lambda: mu.for_loop(body, jnp.arange(2))[0]


@transform
def while_loop(f: Any) -> Any:
    def body(c: Any) -> Any:
        return c[0] + 1, to_array(f())

    return lambda: mu.while_loop(lambda c: c[0] < 1, body, (0, jnp.float32(0)))[1]


@transform
def fori_loop(f: Any) -> Any:
    def body(i: Any, c: Any) -> Any:
        return to_array(f())

    return lambda: mu.fori_loop(0, 1, body, jnp.float32(0))


@transform
def cond(f: Any) -> Any:
    return lambda: mu.cond(True, lambda: to_array(f()), lambda: jnp.float32(0))


@transform
def switch(f: Any) -> Any:
    def branch() -> Any:
        return to_array(f())

    return lambda: mu.switch(1, [lambda: jnp.float32(0), branch, lambda: jnp.float32(1)])


@transform
def mapped(f: Any) -> Any:
    def body(x: Any) -> Any:
        return to_array(f()) + 0 * x

    return lambda: mu.map(body, jnp.ones(2))[0]


def check(sort: Sort, name: str, run: Callable[[], Any], value: Any, shadow: Any, steps: list[str]) -> None:
    got, want = float(run()), float(np.asarray(to_array(sort.read(shadow))))
    assert got == pytest.approx(want, rel=1e-3, nan_ok=True), f"{name}, after {' -> '.join(steps)}: {got}, not {want}"


def run_case(seed: int) -> None:
    """One random closure through one random transform, in three calls or more."""
    draw = random.Random(seed)
    name = draw.choice(sorted(SORTS))
    reach = draw.choice(sorted(WAYS))
    by = draw.choice(sorted(TRANSFORMS))
    run_one(name, reach, by, draw)


def run_one(name: str, reach: str, by: str, draw: random.Random) -> None:
    sort = SORTS[name]
    title = f"{name!r}, {reach}, {by}"
    n = draw.randint(1, 4)
    value = sort.make(n)
    run = TRANSFORMS[by](WAYS[reach](value, sort.read))
    steps = [f"made of {n}"]
    check(sort, title, run, value, sort.make(n), steps)
    for _ in range(3):
        n = draw.randint(1, 4)
        kind = draw.choice(["built afresh", "changed", "the same"])
        if kind == "changed" and sort.change is not None:
            sort.change(value, n)
            if sort.baked or draw.random() < 0.5:  # a fresh function over the same object
                kind = "changed, with a fresh function"
                run = TRANSFORMS[by](WAYS[reach](value, sort.read))
            steps.append(f"{kind} to {n}")
            check(sort, title, run, value, value, steps)
        elif kind == "the same" and not sort.once:
            steps.append("called again")
            check(sort, title, run, value, value, steps)
        else:
            value = sort.make(n)
            run = TRANSFORMS[by](WAYS[reach](value, sort.read))
            steps.append(f"made of {n}")
            check(sort, title, run, value, sort.make(n), steps)


@pytest.mark.parametrize("name", SORTS)
def test_each_sort(name: str) -> None:
    draw = random.Random(name)
    for by in ("jit", "scan", draw.choice(sorted(TRANSFORMS))):
        run_one(name, draw.choice(sorted(WAYS)), by, draw)


@pytest.mark.parametrize("seed", range(20))
def test_random_captures(seed: int) -> None:
    for part in range(12):
        run_case(seed * 1000 + part)


COUNT = int(os.environ.get("MUTATIS_RANDOM_CAPTURES", "0"))
SEED = int(os.environ.get("MUTATIS_RANDOM_SEED", str(random.SystemRandom().randrange(10**9))))


@pytest.mark.slow
@pytest.mark.skipif(not COUNT, reason="MUTATIS_RANDOM_CAPTURES says how many fresh cases to run")
def test_fresh_random_captures() -> None:
    for offset in range(COUNT):
        try:
            run_case(SEED + offset)
        except BaseException as problem:
            problem.add_note(f"seed {SEED + offset}")
            raise
