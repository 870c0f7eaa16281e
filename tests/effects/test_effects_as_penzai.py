"""What Penzai's own tests of its local-state effect say, said of ours: names, sharing, and frozen requests as values."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import effects, errors
from mutatis.effects import FrozenLocalStateRequest as Frozen
from mutatis.effects import InitialLocalStateRequest as Initial
from mutatis.effects import SharedLocalStateRequest as Shared
from mutatis.effects import handle_local_states as handle


def node(cls: type) -> Any:
    return jax.tree_util.register_dataclass(dataclasses.dataclass(cls))


@node
class Series:
    layers: Any

    def __call__(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


@node
class Tally:
    """One state with a name, one without, deep in dictionaries."""

    named: Any
    plain: Any

    @classmethod
    def start(cls) -> Tally:
        first = Initial(lambda: jnp.int32(5), "tally", "count")
        return effects.add_parameter_prefix(
            "outer.inner", cls({"a": {"b": first}}, {"c": [Initial(lambda: jnp.int32(7), "tally")]})
        )

    def __call__(self, x: Any) -> Any:
        cells = self.named["a"]["b"], self.plain["c"][0]
        before = [cell.get() for cell in cells]
        for cell, add in zip(cells, x, strict=True):
            cell.set(cell.get() + add)
        return before, [cell.get() for cell in cells]


@node
class Holder:
    payload: Any

    def __call__(self, x: Any) -> Any:
        return x


@node
class Count:
    """Adds one to each of its states, in turn."""

    states: Any

    def __call__(self, _: Any) -> None:
        for state in self.states:
            state.set(state.get() + 1)


NAMED, PLAIN = "outer.inner.count", "Series.layers[0]/Tally.plain['c'][0]"


@pytest.mark.parametrize("lazy", [True, False])
def test_the_life_of_a_state(lazy: bool) -> None:
    handled, states = handle(Series([Tally.start()]), "tally", lazy=lazy)
    states = states() if lazy else states
    assert states == {NAMED: 5, PLAIN: 7}
    (before, after), states = handled((jnp.array([10, 20]), states))
    assert (before, after) == ([5, 7], [15, 27])
    assert states == {NAMED: 15, PLAIN: 27}
    frozen = effects.freeze_local_states(handled, states)
    assert (type(frozen), type(frozen.layers[0])) == (Series, Tally)
    assert frozen.layers[0].named["a"]["b"] == Frozen(jnp.int32(15), "tally", NAMED)
    assert frozen.layers[0].plain["c"][0] == Frozen(jnp.int32(27), "tally")
    again, values = handle(frozen, "tally", handler_id=handled.handler_id)
    assert jax.tree.structure(again) == jax.tree.structure(handled)
    assert values == states


def test_a_predicate_chooses_categories() -> None:
    body = Holder({key: Initial(lambda: 0.0, key, name) for key, name in {"a": "mine", "b": None, "c": None}.items()})
    _, states = handle(body, category_predicate=lambda category: category in ("a", "c"))
    assert states == {"mine": 0.0, "Holder.payload['c']": 0.0}


def initial(name: str) -> Any:
    return Initial(lambda: 0.0, "shared", name)


def frozen(name: str) -> Any:
    return Frozen(0.0, "shared", name)


def counted(requests: list[Any], sharing: Any) -> Any:
    handled, states = handle(Count(requests), "shared", state_sharing=sharing)
    return handled((None, states))[1]


def test_one_request_at_several_places() -> None:
    one, two = initial("one"), initial("two")
    requests = [one, two, one, two, one]
    with pytest.raises(errors.EffectError, match="several places share the state `one`"):
        counted(requests, "forbidden")
    for sharing in ("allowed", "unsafe"):
        assert counted(requests, sharing) == {"one": 3.0, "two": 2.0}


@pytest.mark.parametrize("make", [initial, frozen])
def test_several_requests_of_one_name(make: Callable[[str], Any]) -> None:
    requests = [make(name) for name in ("one", "two", "one", "two", "one")]
    for sharing in ("forbidden", "allowed"):
        with pytest.raises(errors.EffectError, match="state `one`"):
            counted(requests, sharing)
    assert counted(requests, "unsafe") == {"one": 3.0, "two": 2.0}


def test_places_that_refer_to_a_definition() -> None:
    body = Count([frozen("one"), frozen("two"), *(Shared(name, "shared") for name in ("one", "two", "one"))])
    with pytest.raises(errors.EffectError, match="state_sharing='allowed'"):
        handle(body, "shared")
    for sharing in ("allowed", "unsafe"):
        handled, states = handle(body, "shared", state_sharing=sharing)  # type: ignore[arg-type]
        assert handled((None, states))[1] == {"one": 3.0, "two": 2.0}
        assert effects.freeze_local_states(handled, states).states == [
            Frozen(jnp.float32(0.0), "shared", "one"),
            Frozen(jnp.float32(0.0), "shared", "two"),
            *body.states[2:],
        ]


def test_definitions_are_taken_out_and_put_back() -> None:
    one, two = Initial(lambda: 10, "a", "one"), Frozen(20, "b", "two")
    later = [Shared("one", "a"), Shared("two", "b")]
    hoisted, definitions = effects.hoist_shared_state_requests([[one, one, two, *later], [*later, *later, *later]])
    assert definitions == {"one": one, "two": Frozen(20, "b", "two")}
    embedded = effects.embed_shared_state_requests(hoisted[1], definitions)
    assert embedded == [one, Frozen(20, "b", "two"), *later, *later]


# -- names -----------------------------------------------------------------------------------------------------------


def test_prefixes() -> None:
    model = {"a": mu.BatchStat(0.0, name="mean"), "b": mu.BatchStat(0.0)}
    assert effects.add_parameter_prefix("top", model) is not None
    assert [cell.name for cell in model.values()] == ["top.mean", None]
    handled, states = handle(Count([initial("one"), Initial(lambda: 0.0, "shared")]), "shared")
    assert [*states] == ["one", "Count.states[1]"]
    renamed = effects.add_parameter_prefix("top", handled, delimiter="/")
    assert renamed._names() == ["top/one", "Count.states[1]"]
    assert effects.add_parameter_prefix("a", effects.add_parameter_prefix("b", initial("c"))).name == "a.b.c"


class Net(mu.Module):
    def __init__(self) -> None:
        self.mean = mu.BatchStat(0.0)


class Pair(tuple[Any, ...]):
    """A class that JAX flattens without keys."""


jax.tree_util.register_pytree_node(Pair, lambda pair: (tuple(pair), None), lambda _, parts: Pair(parts))


@pytest.mark.parametrize(
    ("tree", "name"),
    [
        (lambda s: s, ""),
        (lambda s: [{"k": (s,)}], "[0]['k'][0]"),
        (lambda s: Holder(Holder([s])), "Holder.payload/Holder.payload[0]"),
        (lambda s: {"k": Holder(s)}, "['k']/Holder.payload"),
        (lambda s: Pair([None, Holder(s)]), "Pair[<flat index 1>]/Holder.payload"),
    ],
)
def test_a_position_names_the_classes(tree: Callable[[Any], Any], name: str) -> None:
    assert [*handle(tree(Initial(lambda: 0.0, "shared")), "shared")[1]] == [name]
    # A Module's states go by their paths in it, wherever it is.
    assert [*handle(tree(Net()), mu.BatchStat)[1]] == [f"{name}.mean" if name else "mean"]


def test_names_are_those_of_penzai() -> None:
    pytest.importorskip("penzai")
    from penzai.core import struct
    from penzai.deprecated.v1 import pz

    @struct.pytree_dataclass
    class Layer(pz.Layer):  # type: ignore[misc]
        states: Any

        def __call__(self, x: Any) -> Any:
            return x

    def body(request: Any) -> Any:
        return pz.nn.Sequential([Layer({"k": [request]}), pz.nn.Sequential([Layer(request)])])

    ours = handle(body(Initial(lambda: 0.0, "c")), "c")[1]
    theirs = pz.de.handle_local_states(body(pz.de.InitialLocalStateRequest(lambda: 0.0, "c")), "c")[1]
    assert [*ours] == [*theirs]


# -- frozen requests as values ---------------------------------------------------------------------------------------

STATES: list[Any] = [
    0.0,
    0,
    False,
    jnp.float32(0.0),
    jnp.int32(0),
    jnp.zeros(1),
    jnp.zeros(2),
    jnp.arange(2.0),
    {"a": jnp.zeros(2)},
    {"b": jnp.zeros(2)},
    [jnp.zeros(2)],
    (jnp.zeros(2),),
    jax.random.key(0),
    jax.random.key(1),
    "text",
    None,
]


def test_frozen_requests_are_equal_by_value() -> None:
    copies = [jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array) else x, state) for state in STATES]
    for i, state in enumerate(STATES):
        for j, other in enumerate(copies):
            a, b = Frozen(state, "c", "n"), Frozen(other, "c", "n")
            assert (a == b) is (i == j), (state, other)
            assert (a != b) is (i != j)
            assert i != j or hash(a) == hash(b)
    assert Frozen(0.0, "c") != Frozen(0.0, "d") != Frozen(0.0, "d", "n") != "d"
    assert Frozen(np.zeros(2, np.float32), "c") == Frozen(jnp.zeros(2), "c")
    assert len({Frozen(jnp.zeros(2), "c"), Frozen(jnp.zeros(2), "c"), Frozen(jnp.ones(2), "c")}) == 2


def test_frozen_requests_of_tracers_are_equal_to_themselves_only() -> None:
    seen = []

    @jax.jit
    def f(x: Any, y: Any) -> Any:
        a, b = Frozen(x, "c"), Frozen(y, "c")
        seen.append((a == Frozen(x, "c"), a == b, hash(a) == hash(b), a == Frozen(jnp.zeros(2), "c")))
        return a, b

    a, b = f(jnp.zeros(2), jnp.zeros(2))
    assert seen == [(True, False, True, False)]
    assert a == b


def test_an_equal_request_is_no_stale_one() -> None:
    """A request that a compiled function names is part of its program, by value and type."""

    def run(request: Any) -> Any:
        return mu.jit(functools.partial(lambda request, x: request.get() + x, request))(1)

    for state, out in ((1, 2), (1, 2), (jnp.int32(2), 3), (jnp.float32(1.5), 2.5), (2.0, 3.0)):
        result = run(Frozen(state, "c"))
        assert (result, result.dtype) == (out, jnp.result_type(state, 1))
