"""The words of messages: how values, structures and names are shown, and what no message says."""

from __future__ import annotations

import collections
import contextlib
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import errors
from mutatis.core.avals import show_type
from mutatis.core.naming import show_name
from mutatis.core.showing import show_class, show_structure, show_value
from tests import plain_words


class Net(mu.Module):
    def __init__(self) -> None:
        self.w = mu.Param(jnp.zeros(3))


class Pair(NamedTuple):
    a: Any
    b: Any


class Plain:
    """An object with the `repr` that Python gives."""


class Broken:
    def __repr__(self) -> str:
        raise RuntimeError("no")


class Holder:
    """An object whose `repr` shows what it holds."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __repr__(self) -> str:
        return f"Holder({self.held!r})"


def named() -> None:
    """A function."""


SHOWN: list[tuple[Any, str]] = [
    (None, "None"),
    (1.5, "1.5"),
    ("text", "'text'"),
    (jnp.zeros((2, 3)), "float32[2,3]"),
    (np.zeros(3, np.int8), "int8[3]"),
    (np.float32(2), "np.float32(2.0)"),
    (jax.ShapeDtypeStruct((3,), jnp.float32), "float32[3]"),
    (jax.random.key(0), "key<fry>[]"),
    (Net(), "Net(...)"),
    (mu.Param(1.0), "Param(...)"),
    ([jnp.zeros(3), (1,), {"b": jnp.zeros(2), "a": None}], "[float32[3], (1,), {'a': None, 'b': float32[2]}]"),
    (Pair(jnp.zeros(3), 1), "Pair(a=float32[3], b=1)"),
    ({1}, "{1}"),
    (named, "the function named"),
    (lambda: None, "the function lambda"),
    (Net, "the class Net"),
    (Plain(), "a Plain"),
    (Broken(), "a Broken"),
    (Holder(Plain()), f"Holder(<{__name__}.Plain object>)"),
    (functools.partial(max, 1), "functools.partial(<built-in function max>, 1)"),
    (jax.tree.structure({"a": (1, 2)}), "{'a': (*, *)}"),
    (mu.State({("w",): jnp.zeros(3)}), "State({ w: Variable float32[3], })"),
    (mu.StateAxes({mu.Param: 0}), "StateAxes({OfType(Param): 0})"),
    (jax.P("x"), "P('x',)"),
]


@pytest.mark.parametrize(("value", "text"), SHOWN, ids=[text for _, text in SHOWN])
def test_values(value: Any, text: str) -> None:
    assert show_value(value) == text
    assert not plain_words.jargon(text)


def test_traced_values_are_shown_as_arrays() -> None:
    def look(x: Any) -> Any:
        shown.append(show_value({"x": x, "held": Holder(x), "in a list": [x]}))
        shown.append(show_class(x))
        return x

    shown: list[str] = []
    jax.vmap(jax.jit(jax.grad(look)))(jnp.zeros(3))
    assert shown == ["{'held': a Holder, 'in a list': [float32[]], 'x': float32[]}", "float32[]"]


@pytest.mark.parametrize(
    "value",
    ["x" * 10_000, list(range(10_000)), dict.fromkeys(range(100), "x" * 50), Holder("x" * 10_000), [[[[[[[[]]]]]]]]],
)
def test_long_values_are_cut(value: Any) -> None:
    text = show_value(value)
    assert len(text) <= 100
    assert "..." in text


def test_a_value_that_holds_itself() -> None:
    value: list[Any] = []
    value.append(value)
    assert show_value(value).startswith("[[[")


def test_what_a_value_is() -> None:
    assert [show_class(x) for x in (3, "x", None, jnp.zeros(2), Net(), [])] == [
        *("int", "str", "None", "float32[2]", "Net", "list")
    ]


@pytest.mark.parametrize(
    ("tree", "structure", "kind"),
    [
        (1, "*", "int"),
        (None, "None", "None"),
        ((), "()", "()"),
        ((1,), "(*,)", "(int,)"),
        ([jnp.zeros(3), ()], "[*, ()]", "[float32[3], ()]"),
        ({"b": 1, "a": (2, None)}, "{'a': (*, None), 'b': *}", "{'a': (int, None), 'b': int}"),
        (Pair(1, [2]), "Pair(a=*, b=[*])", "Pair(a=int, b=[int])"),
        (collections.OrderedDict(b=1), "OrderedDict[('b',)](*)", "OrderedDict[('b',)](int)"),
        (jax.tree_util.Partial(named, 1), "Partial[the function named]((*,), {})", None),
    ],
)
def test_structures(tree: Any, structure: str, kind: str | None) -> None:
    assert show_structure(jax.tree.structure(tree)) == structure
    assert kind is None or show_type(tree) == kind


def test_structures_that_differ_are_shown_differently() -> None:
    one, two = (mu.State({(name,): 1.0}) for name in "ab")
    assert show_structure(jax.tree.structure(one)) != show_structure(jax.tree.structure(two))


@pytest.mark.parametrize(
    ("qualname", "shown"),
    [
        ("train_step", "train_step"),
        ("Net.__call__", "Net.__call__"),
        ("train.<locals>.step", "train.step"),
        ("<lambda>", "lambda"),
        ("Net.__call__.<locals>.<lambda>", "lambda in Net.__call__"),
        ("_.<locals>.<lambda>.<locals>.<lambda>", "lambda"),
        ("_.<locals>.step", "step"),
        ("<lambda>.<locals>.step", "step"),
        ("train.<locals>._", "_ in train"),
        ("_", "_"),
    ],
)
def test_names(qualname: str, shown: str) -> None:
    assert show_name(qualname) == shown
    assert show_name(shown) == shown


def test_the_body_of_a_loop_has_its_users_name() -> None:
    w = mu.Param(jnp.zeros(3))

    def halve(i: Any, x: Any) -> Any:
        w.value = jnp.zeros(2)
        return x / 2

    for upper in (3, jnp.int32(3)):
        with pytest.raises(errors.StateTypeError) as caught:
            mu.fori_loop(0, upper, halve, 1.0)
        assert caught.value.where == "fori_loop(test_the_body_of_a_loop_has_its_users_name.halve)"


def test_made_at_names_a_function_as_where_does() -> None:
    assert (lambda: mu.Param(1.0))().made_at.endswith(" in lambda in test_made_at_names_a_function_as_where_does")  # type: ignore[union-attr]


# -- the reader of every error -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "fields", "faults"),
    [
        ("the body of `scan` returned int", {"where": "scan(f)"}, ["scan"]),
        ("the function of `grad(f)` returned int", {"where": "jit(g) > grad(f)"}, ["grad(f)"]),
        ("the body returned int", {"where": "scan(f)"}, []),
        ("`scan` has no length", {}, []),
        ("problem", {"got": "JitTracer<float32[]>"}, ["JitTracer"]),
        ("problem", {"expected": "PyTreeDef((*, *))"}, ["PyTreeDef"]),
        ("problem", {"got": "<__main__.Net object at 0x7f00>"}, [" at 0x7"]),
        ("problem", {"cure": "f.<locals>.<lambda>"}, ["<locals>", "<lambda>"]),
    ],
)
def test_faults_are_found(problem: str, fields: Any, faults: list[str]) -> None:
    made = []
    with pytest.raises(AssertionError) if faults else contextlib.nullcontext(), plain_words.checked():
        made.append(errors.StructureError(problem, **fields))
    assert plain_words.faults(*made) == faults
