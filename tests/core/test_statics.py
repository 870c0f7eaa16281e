"""Static values: what may be an attribute, when two are equal, and what equality means for compiled programs."""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
import pickle
from collections import namedtuple
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import errors


class Color(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass(frozen=True)
class Config:
    size: int = 3
    name: str = "x"


@dataclasses.dataclass
class Loose:
    size: int = 3


class Plain:
    pass


Pair = namedtuple("Pair", "a b")


def function(x: Any) -> Any:
    return x


def closure_over(value: Any) -> Any:
    return lambda x: x + value


def holder(value: Any) -> mu.Module:
    module = mu.Module()
    module.value = value
    return module


GOOD = [
    None,
    True,
    3,
    2.5,
    1j,
    "text",
    b"bytes",
    ...,
    int,
    Plain,
    Color.RED,
    Config(),
    function,
    len,
    jnp.sin,
    jax.nn.relu,
    functools.partial(function, 3),
    "text".upper,
    jnp.float32,
    np.dtype("float32"),
    frozenset({1, 2}),
    (1, "a", (2.0, None)),
    [1, "a", [2.0, None]],
    {"a": 1, "b": {"c": [2]}},
    Pair(1, Config()),
    range(3),
    slice(1, 2).indices,
    np,
    jax.sharding.PartitionSpec("x", None),
    mu.Param,
    mu.OfType(mu.Param),
]


@pytest.mark.parametrize("value", GOOD, ids=lambda v: type(v).__name__)
def test_what_may_be_static(value: Any) -> None:
    module = holder(value)
    assert module.value is value or module.value == value
    assert len(mu.state(module)) == 0
    assert float(mu.jit(lambda m, x: x + 1)(module, 1.0)) == 2
    assert mu.graphdef(module) == mu.graphdef(holder(value))
    assert mu.clone(module).value == value


BAD = [{1, 2}, bytearray(b"x"), Loose(), Plain(), [Plain()], {"a": (1, {2})}, (Loose(),), iter([])]


@pytest.mark.parametrize("value", BAD, ids=lambda v: type(v).__name__)
def test_what_may_not_be_static(value: Any) -> None:
    module = mu.Module()
    with pytest.raises(errors.StaticAttributeError, match=r"`Module\.value` cannot be static") as caught:
        module.value = value
    assert not hasattr(module, "value")
    assert "self.value = mu.static(...)" in str(caught.value)
    assert "self.value = mu.Variable(...)" in str(caught.value)
    assert caught.value.path == "Module.value"


@pytest.mark.parametrize("value", BAD, ids=lambda v: type(v).__name__)
def test_any_object_may_be_static_by_identity(value: Any) -> None:
    module = holder(mu.static(value))
    assert module.value is value
    assert mu.clone(module).value is value
    assert mu.graphdef(module) == mu.graphdef(holder(mu.static(value)))
    assert mu.graphdef(module) != mu.graphdef(holder(mu.static(Plain())))
    assert mu.jit(lambda m: m.value is value)(module)
    module.value = 3
    assert module.value == 3


def test_statics_in_containers() -> None:
    plain = Plain()
    module = holder([mu.static(plain), 1])
    assert module.value[0].value is plain
    assert mu.graphdef(module) == mu.graphdef(holder([mu.static(plain), 1]))


EQUAL = [
    (1, 1),
    (float("nan"), float("nan")),
    (closure_over(3), closure_over(3)),
    (functools.partial(closure_over(1), x=2), functools.partial(closure_over(1), x=2)),
    (Config(), Config()),
    ({"a": [1]}, {"a": [1]}),
    (np.float32(2), np.float32(2)),
]
DIFFERENT = [
    (1, True),
    (0, False),
    (1, 1.0),
    (0.0, -0.0),
    ("a", b"a"),
    (closure_over(3), closure_over(4)),
    (closure_over(1), closure_over(True)),
    (functools.partial(function, x=1), functools.partial(function, x=2)),
    (Config(3), Config(4)),
    ([1], (1,)),
    ([1], [True]),
    ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    (Color.RED, Color.BLUE),
    (Pair(1, 2), (1, 2)),
    (lambda x: x + 1, lambda x: x + 2),
    (np.float32(2), np.float64(2)),
    ((1, 2), (1, 2, 3)),
]


@pytest.mark.parametrize(("a", "b"), EQUAL, ids=lambda v: type(v).__name__)
def test_equal_statics_share_a_program(a: Any, b: Any, traces: Any) -> None:
    assert mu.graphdef(holder(a)) == mu.graphdef(holder(b))
    assert hash(mu.graphdef(holder(a))) == hash(mu.graphdef(holder(b)))
    step = mu.jit(traces.count(lambda m: jnp.zeros(())))
    step(holder(a))
    step(holder(b))
    assert traces.total == 1


@pytest.mark.parametrize(("a", "b"), DIFFERENT, ids=lambda v: type(v).__name__)
def test_other_statics_have_a_program_of_their_own(a: Any, b: Any, traces: Any) -> None:
    assert mu.graphdef(holder(a)) != mu.graphdef(holder(b))
    module = holder(a)
    step = mu.jit(traces.count(lambda m: jnp.zeros(())))
    for value in (a, b, a, b):
        module.value = value
        step(module)
    assert traces.total == 2


def test_recursive_functions_and_containers_have_keys() -> None:
    def fact(n: int) -> int:
        return 1 if n == 0 else n * fact(n - 1)

    loop: list[Any] = [1]
    loop.append(loop)
    from mutatis.core.statics import static_key

    assert hash(static_key(fact)) == hash(static_key(fact))
    assert static_key(loop) == static_key(loop)


@pytest.mark.parametrize("size", [3, 1000])
def test_functions_that_captured_arrays(size: int) -> None:
    array = np.zeros(size)
    assert mu.graphdef(holder(closure_over(array))) == mu.graphdef(holder(closure_over(array)))
    if size == 3:
        assert mu.graphdef(holder(closure_over(array))) == mu.graphdef(holder(closure_over(array.copy())))
    assert mu.graphdef(holder(closure_over(array))) != mu.graphdef(holder(closure_over(np.ones(size))))


def test_a_function_attribute_with_another_capture_compiles_anew() -> None:
    module = holder(closure_over(1.0))
    step = mu.jit(lambda m, x: m.value(x))
    assert float(step(module, 1.0)) == 2
    module.value = closure_over(2.0)
    assert float(step(module, 1.0)) == 3


def test_a_list_of_statics_changed_in_place_is_noticed() -> None:
    module = holder([1.0, [2.0]])
    step = mu.jit(lambda m, x: x * m.value[0] + m.value[1][0])
    assert float(step(module, 1.0)) == 3
    module.value[1][0] = 5.0
    assert float(step(module, 1.0)) == 6
    module.value[0] = 2.0
    assert float(step(module, 1.0)) == 7


def test_static_objects_copy_and_pickle() -> None:
    module = holder(mu.static(Loose(5)))
    assert copy.deepcopy(module).value == Loose(5)
    assert pickle.loads(pickle.dumps(module)).value == Loose(5)
    assert repr(mu.static(3)) == "static(3)"


def test_a_static_changed_in_place_is_unseen() -> None:
    module = holder(mu.static(Loose(1)))
    step = mu.jit(lambda m, x: x + m.value.size)
    assert float(step(module, 1.0)) == 2
    module.value.size = 5
    assert float(step(module, 1.0)) == 2, "documented: its changes are unseen"
