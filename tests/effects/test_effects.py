"""`mutatis.effects`: local state as a dictionary, on any pytree and on Modules; names that stay and names that follow."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mutatis as mu
from mutatis import effects, errors
from mutatis.effects import FrozenLocalStateRequest as Frozen
from mutatis.effects import InitialLocalStateRequest as Initial
from mutatis.effects import SharedLocalStateRequest as Shared
from mutatis.effects import handle_local_states as handle

pytestmark = pytest.mark.once  # many alike; what JAX's versions differ in, the twins and traces of transforms show


def zero() -> Any:
    return jnp.zeros(())


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Total:
    """Adds up what it sees, weighted."""

    state: effects.LocalStateEffect[Any]
    w: Any = dataclasses.field(default_factory=lambda: jnp.float32(1.0))

    def __call__(self, x: Any) -> Any:
        self.state.set(self.state.get() + self.w * x)
        return self.state.get()


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Chain:
    parts: Any

    def __call__(self, x: Any) -> Any:
        for part in self.parts.values() if isinstance(self.parts, dict) else self.parts:
            x = part(x)
        return x


class Net(mu.Module):
    """The same with Variables: one named, one not, and a parameter."""

    def __init__(self) -> None:
        self.w = mu.Param(jnp.float32(2.0))
        self.total = mu.BatchStat(jnp.float32(0.0), name="total")
        self.steps = mu.Hidden(init=zero)

    def __call__(self, x: Any) -> Any:
        self.total.value = self.total + self.w * x
        self.steps += 1.0
        return self.total * 1.0


def same(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_allclose, a, b)


# -- requests ----------------------------------------------------------------------------------------------------


def test_requests_are_trees_of_values_only() -> None:
    leaves, tree = jax.tree.flatten([Initial(zero, "a", "n"), Frozen(jnp.ones(2), "a"), Shared("n", "a")])
    assert len(leaves) == 1
    assert tree == jax.tree.structure([Initial(zero, "a", "n"), Frozen(0, "a"), Shared("n", "a")])
    assert tree != jax.tree.structure([Initial(zero, "b", "n"), Frozen(0, "a"), Shared("n", "a")])
    assert jax.tree_util.keystr(jax.tree_util.tree_flatten_with_path(Frozen(1, "a"))[0][0][0]) == ".state"
    assert Initial(zero, "a").as_frozen().get() == 0.0
    for effect in (Initial(zero, "a"), Frozen(1, "a"), mu.Variable(1)):
        assert isinstance(effect, effects.LocalStateEffect)


@pytest.mark.parametrize(
    ("use", "what"),
    [
        (lambda: Initial(zero, "a", "n").get(), "read"),
        (lambda: Initial(zero, "a", "n").set(1), "written"),
        (lambda: Frozen(1, "a", "n").set(1), "written"),
        (lambda: Shared("n", "a").get(), "read"),
        (lambda: handle(Total(Initial(zero, "a", "n")), "a")[0].body.state.get(), "read"),
    ],
)
def test_a_request_is_used_in_its_handler_only(use: Callable[[], Any], what: str) -> None:
    with pytest.raises(errors.EffectError, match=rf"state `n` was {what} outside of its handler[\s\S]*category='a'"):
        use()


# -- handling, calling, freezing ---------------------------------------------------------------------------------


def two() -> Chain:
    return Chain([Total(Initial(zero, "a")), Total(Initial(zero, "a", "second"), jnp.float32(0.5))])


def by_hand(x: Any, states: dict[str, Any]) -> Any:
    first = states["Chain.parts[0]/Total.state"] + x
    second = states["second"] + 0.5 * first
    return second, {"Chain.parts[0]/Total.state": first, "second": second}


ROUNDS: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "eager": lambda f, s: f(3.0, s),
    "jit": lambda f, s: jax.jit(f)(3.0, s),
    "grad": lambda f, s: jax.grad(f, has_aux=True)(3.0, s),
    "grad of a state": lambda f, s: jax.grad(lambda s: f(3.0, s)[0])(s),
    "vmap": lambda f, s: jax.vmap(f, in_axes=(0, None))(jnp.arange(3.0), s),
    "vmap of states": lambda f, s: jax.vmap(f)(jnp.arange(3.0), jax.tree.map(lambda x: jnp.arange(3.0) + x, s)),
    "scan": lambda f, s: jax.lax.scan(lambda s, x: f(x, s)[::-1], s, jnp.arange(3.0)),
    "jit of grad of scan": lambda f, s: jax.jit(
        jax.grad(lambda x: jax.lax.scan(lambda s, x: f(x, s)[::-1], s, x)[1].sum())
    )(jnp.arange(3.0)),
    "mu.jit": lambda f, s: mu.jit(f)(3.0, s),
    "mu.scan": lambda f, s: mu.scan(lambda s, x: f(x, s)[::-1], s, jnp.arange(3.0)),
    "mu.vmap": lambda f, s: mu.vmap(f, in_axes=(0, None))(jnp.arange(3.0), s),
}


@pytest.mark.parametrize("form", ["pair", "two arguments"])
@pytest.mark.parametrize("through", ROUNDS)
def test_a_handled_layer_is_a_pure_function(through: str, form: str) -> None:
    handled, states = handle(two(), "a")
    call = handled if form == "two arguments" else lambda x, s: handled((x, s))
    assert set(states) == {"Chain.parts[0]/Total.state", "second"}
    with jax.checking_leaks():
        same(ROUNDS[through](call, states), ROUNDS[through](by_hand, states))


def test_a_handled_layer_is_a_tree() -> None:
    handled, states = handle(two(), "a")
    again, _ = handle(two(), "a")
    assert jax.tree.structure(handled) == jax.tree.structure(again)
    double = jax.tree.map(lambda w: 2 * w, handled)
    out, _ = jax.jit(lambda h, s: h((3.0, s)))(double, states)
    assert out == 3.0 * 2 * 1
    gradient = jax.grad(lambda h: h((3.0, states))[0])(handled)
    assert [float(leaf) for leaf in jax.tree.leaves(gradient)] == [1.5, 3.0]


@pytest.mark.parametrize("sharing", ["forbidden", "allowed"])
def test_freezing_and_handling_again_goes_on(sharing: Any) -> None:
    handled, states = handle(two(), "a", state_sharing=sharing)
    for _ in range(2):
        _, states = handled((1.0, states))
    frozen = effects.freeze_local_states(handled, states)
    first, second = frozen.parts
    assert (first.state.name, second.state.name) == (None, "second")
    assert float(first.state.get()) == 2.0
    assert type(first.state) is type(second.state) is Frozen
    frozen = pickle.loads(pickle.dumps(frozen))
    handled, again = handle(frozen, "a", state_sharing=sharing)
    same(again, states)
    same(handled((1.0, again)), by_hand(1.0, states))


def test_initializers_run_late_and_once() -> None:
    runs = []

    def start() -> Any:
        runs.append(1)
        return 0

    body = Chain([Total(Initial(start, "a", "n")), Total(Initial(start, "a", "n"))])
    handled, states = handle(body, "a", lazy=True, state_sharing="allowed")
    assert not runs
    assert jax.eval_shape(states)["n"].dtype == jnp.int32
    assert len(runs) == 1
    assert handled.body.parts[0].state == handled.body.parts[1].state
    made = states()
    assert made["n"].weak_type is False


def test_states_may_be_trees() -> None:
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Buffer:
        cache: Any

        def __call__(self, x: Any) -> Any:
            self.cache.get()["last"] = x  # in place: a write, as for every state
            return self.cache.value["n"]

    handled, states = handle(Buffer(Initial(lambda: {"last": 0.0, "n": 1}, "a")), "a")
    out, new = jax.jit(handled)((2.0, states))
    assert (out, new["Buffer.cache"]["last"], states["Buffer.cache"]["last"]) == (1, 2.0, 0.0)


@pytest.mark.parametrize("outer", ["a", "b"])
def test_handlers_nest_one_per_category(outer: str) -> None:
    body = Chain([Total(Initial(zero, "a")), Total(Initial(zero, "b"))])
    inner = "b" if outer == "a" else "a"
    handled, first = handle(body, inner)
    handled, second = handle(handled, outer)
    place = {"a": "Chain.parts[0]/Total.state", "b": "Chain.parts[1]/Total.state"}
    assert ([*first], [*second]) == ([place[inner]], [f"WithFunctionalLocalState.body/{place[outer]}"])
    (out, first), second = jax.jit(handled)(((3.0, first), second))
    assert (float(out), [*first.values()], [*second.values()]) == (3.0, [3.0], [3.0])
    once = effects.freeze_local_states(handled, second)
    assert isinstance(once, effects.WithFunctionalLocalState)
    both = effects.freeze_local_states(once, first)
    assert [part.state.category for part in both.parts] == ["a", "b"]
    assert [float(part.state.get()) for part in both.parts] == [3.0, 3.0]


def test_a_predicate_chooses_several_categories() -> None:
    body = Chain([Total(Initial(zero, ("cache", 1))), Total(Initial(zero, ("cache", 2))), Total(Initial(zero, None))])
    handled, states = handle(body, category_predicate=lambda c: c is not None)
    assert len(states) == 2
    handled, none = handle(handled, category_predicate=lambda c: c is None)
    assert handled(((1.0, states), none))[0][0] == 1.0


def test_a_handler_in_a_handler_of_the_same_name_has_its_own() -> None:
    inner, inside = handle(Total(Initial(zero, "a")), "a")
    outer, states = handle(Chain([Total(Initial(zero, "a"))]), "a")
    assert inner.handler_id == outer.handler_id
    moved = dataclasses.replace(outer, body=Chain([*outer.body.parts, lambda x: inner((x, inside))[0], inner]))
    assert moved._names() == ["Chain.parts[0]/Total.state"]
    with pytest.raises(errors.ArgumentError, match="was called without states"):
        moved((1.0, states))
    inner, _ = handle(inner, "b", handler_id="mine")
    with pytest.raises(errors.EffectError, match="has a handler 'local_state_0' already"):
        handle(inner, "b", handler_id="local_state_0")


# -- what transforms inside a layer see ------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Inside:
    state: Any
    how: str = dataclasses.field(metadata={"static": True})

    def add(self, x: Any) -> Any:
        self.state.set(self.state.get() + x)
        return self.state.get()

    def __call__(self, xs: Any) -> Any:
        if self.how == "mu.jit":
            return mu.jit(self.add)(xs.sum())
        if self.how == "mu.scan":
            return mu.scan(lambda c, x: (c, self.add(x)), 0, xs)[1][-1]
        if self.how == "mu.for_loop":
            return mu.for_loop(self.add, xs)[-1]
        if self.how == "mu.remat":
            return mu.remat(self.add)(xs.sum())
        if self.how == "mu.cond":
            return mu.cond(xs.sum() > 0, self.add, lambda x: self.state.get(), xs.sum())
        if self.how == "mu.vmap":
            return mu.vmap(lambda x: self.add(jax.lax.psum(x, "i")), axis_name="i")(xs)[0]
        if self.how == "mu.grad":
            return mu.grad(lambda x: self.add(x) ** 2)(xs.sum()) / 2
        if self.how == "lax.scan":
            return jax.lax.scan(lambda c, x: (c, self.add(x)), 0, xs)[1][-1]
        if self.how == "jax.jit":
            return jax.jit(self.add)(xs.sum())
        raise KeyError(self.how)


@pytest.mark.parametrize("through", ["eager", "jit", "mu.jit", "leaks"])
@pytest.mark.parametrize("how", ["mu.jit", "mu.scan", "mu.for_loop", "mu.remat", "mu.cond", "mu.vmap", "mu.grad"])
def test_transforms_understand_the_state(how: str, through: str) -> None:
    handled, states = handle(Inside(Initial(lambda: jnp.float32(1), "a"), how), "a")
    run = {"jit": jax.jit, "mu.jit": mu.jit}.get(through, lambda f: f)(handled)
    with jax.checking_leaks() if through == "leaks" else contextlib.nullcontext():
        out, new = run((jnp.arange(3.0), states))
        out, new = run((jnp.arange(3.0), new))
    assert (float(out), float(new["Inside.state"]), float(states["Inside.state"])) == (7.0, 7.0, 1.0)


@pytest.mark.parametrize("through", [lambda f: f, jax.jit, mu.jit])
@pytest.mark.parametrize("how", ["lax.scan", "jax.jit"])
def test_raw_transforms_inside_a_layer_are_refused(how: str, through: Any) -> None:
    handled, states = handle(Inside(Initial(zero, "a", "sum"), how), "a")
    with pytest.raises(errors.TraceLevelError, match=r"states\['sum'\]"):
        through(handled)((jnp.arange(3.0), states))
    assert handle(Inside(Initial(zero, "a"), "mu.scan"), "a")[0]((jnp.arange(3.0), {"Inside.state": zero()}))[0] == 3.0


def test_an_exception_leaves_nothing_behind() -> None:
    kept = []

    def fails(x: Any) -> Any:
        kept.append(x)
        raise KeyError("in the middle")

    handled, states = handle(Chain([Total(Initial(zero, "a")), fails]), "a")
    for through in (lambda f: f, jax.jit, mu.jit):
        with pytest.raises(KeyError, match="in the middle"):
            through(handled)((1.0, states))
    assert len(kept) == 3
    assert states == {"Chain.parts[0]/Total.state": 0.0}


# -- sharing ---------------------------------------------------------------------------------------------------------


def places(*requests: Any) -> Chain:
    return Chain([Total(request) for request in requests])


def one() -> Any:
    return jnp.ones(())


SHARED: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "shared": ([Initial(zero, "a", "n"), Shared("n", "a")], {"forbidden": "share", "allowed": 0.0, "unsafe": 0.0}),
    "shared frozen": ([Frozen(2.0, "a", "n"), Shared("n", "a")], {"forbidden": "share", "allowed": 2.0, "unsafe": 2.0}),
    "same initializer": (
        [Initial(zero, "a", "n"), Initial(zero, "a", "n")],
        {"forbidden": "share", "allowed": 0.0, "unsafe": 0.0},
    ),
    "other initializer": (
        [Initial(zero, "a", "n"), Initial(one, "a", "n")],
        {"forbidden": "share", "allowed": "definitions", "unsafe": 1.0},
    ),
    "two values": (
        [Frozen(1.0, "a", "n"), Frozen(2.0, "a", "n")],
        {"forbidden": "share", "allowed": "definitions", "unsafe": 2.0},
    ),
    "initial and frozen": (
        [Frozen(3.0, "a", "n"), Initial(zero, "a", "n")],
        {"forbidden": "share", "allowed": "definitions", "unsafe": 0.0},
    ),
    "too early": (
        [Shared("n", "a"), Initial(zero, "a", "n")],
        {"forbidden": "share", "allowed": "before it is defined", "unsafe": "before it is defined"},
    ),
    "a position for a name": (
        [Initial(zero, "a"), Initial(zero, "a", "Chain.parts[0]/Total.state")],
        {"forbidden": "definitions", "allowed": "definitions", "unsafe": "definitions"},
    ),
}


@pytest.mark.parametrize("sharing", ["forbidden", "allowed", "unsafe"])
@pytest.mark.parametrize("case", SHARED)
def test_sharing(case: str, sharing: Any) -> None:
    requests, expected = SHARED[case]
    body = places(*requests)
    if isinstance(expected[sharing], str):
        with pytest.raises(errors.EffectError, match=expected[sharing]):
            handle(body, "a", state_sharing=sharing)
        return
    handled, states = handle(body, "a", state_sharing=sharing)
    start = expected[sharing]
    assert states == {"n": start}
    out, new = handled((1.0, states))
    assert out == new["n"] == 2 * (start + 1.0)  # the second place sees what the first has written
    frozen = effects.freeze_local_states(handled, new)
    assert [type(part.state) for part in frozen.parts] == [Frozen, Shared]
    _, again = handle(frozen, "a", state_sharing="allowed")
    same(again, new)


def test_the_cures_of_sharing_work() -> None:
    early = places(Shared("n", "a"), Initial(zero, "a", "n"))
    tree = early
    mended = eval(
        "mu.effects.embed_shared_state_requests(*mu.effects.hoist_shared_state_requests(tree))",
        {"mu": mu, "tree": tree},
    )
    assert [type(part.state) for part in mended.parts] == [Initial, Shared]
    handle(mended, "a", state_sharing="allowed")


@pytest.mark.parametrize(
    "other", [Initial(zero, "b", "n"), Frozen(1.0, "b", "n"), Shared("n", "b")], ids=["initial", "frozen", "shared"]
)
def test_places_of_one_state_have_one_category(other: Any) -> None:
    tree = places(Initial(zero, "a", "n"), other)
    with pytest.raises(errors.EffectError, match="several categories"):
        handle(tree, category_predicate=lambda _: True, state_sharing="allowed")
    for unsafe in (False, True):
        with pytest.raises(errors.EffectError, match="several categories"):
            effects.hoist_shared_state_requests(tree, unsafe=unsafe)
    with pytest.raises(errors.EffectError, match="several categories"):
        effects.embed_shared_state_requests(places(Shared("n", "b")), {"n": Initial(zero, "a", "n")})


def test_hoisted_parts_can_be_moved() -> None:
    tree = places(
        Initial(zero, "a"), Frozen(2.0, "a", "n"), Shared("n", "a"), Initial(one, "b", "m"), Initial(one, "b", "m")
    )
    hoisted, definitions = effects.hoist_shared_state_requests(tree)
    assert [*definitions] == ["n", "m"]
    assert [type(part.state) for part in hoisted.parts] == [Initial, Shared, Shared, Shared, Shared]
    part = effects.embed_shared_state_requests(Chain(hoisted.parts[2:4]), definitions)
    assert [type(p.state) for p in part.parts] == [Frozen, Initial]
    _, states = handle(part, category_predicate=lambda _: True)
    assert states == {"n": 2.0, "m": 1.0}
    whole = effects.embed_shared_state_requests(hoisted, definitions)
    assert jax.tree.structure(whole) != jax.tree.structure(tree)  # the second initial request is a shared one now
    assert [type(p.state) for p in whole.parts] == [Initial, Frozen, Shared, Initial, Shared]
    assert effects.hoist_shared_state_requests(places(Frozen(1.0, "a", "n")))[1] == {}


@pytest.mark.parametrize(
    ("act", "text"),
    [
        (
            lambda: effects.hoist_shared_state_requests(places(Frozen(1.0, "a", "n"), Frozen(1.0, "a", "n"))),
            "several def",
        ),
        (
            lambda: effects.embed_shared_state_requests(places(Shared("n", "a")), {"n": Frozen(1.0, "a", "m")}),
            "its name",
        ),
        (lambda: effects.embed_shared_state_requests(places(Shared("n", "a")), {"n": Shared("n", "a")}), "its name"),
        (
            lambda: effects.embed_shared_state_requests(
                places(Shared("n", "a"), Frozen(1.0, "a", "n")), {"n": Frozen(1.0, "a", "n")}
            ),
            "several definitions",
        ),
    ],
)
def test_contradictory_definitions_are_errors(act: Callable[[], Any], text: str) -> None:
    with pytest.raises(errors.EffectError, match=text):
        act()
    _, definitions = effects.hoist_shared_state_requests(
        places(Frozen(1.0, "a", "n"), Frozen(2.0, "a", "n")), unsafe=True
    )
    assert definitions["n"].get() == 2.0


# -- Modules ---------------------------------------------------------------------------------------------------------


def net_by_hand(w: Any) -> Callable[[Any, dict[str, Any]], Any]:
    def run(x: Any, states: dict[str, Any]) -> Any:
        total = states["total"] + w * x
        return total, {"total": total, "steps": states["steps"] + 1.0}

    return run


@pytest.mark.parametrize("through", ROUNDS)
@pytest.mark.parametrize("wrap", [lambda net: net, mu.jit, mu.remat], ids=["plain", "jit", "remat"])
def test_the_states_of_a_module_are_its_variables(through: str, wrap: Any) -> None:
    net = Net()
    handled, states = handle(wrap(net), [mu.BatchStat, "hidden"])
    assert states == {"total": 0.0, "steps": 0.0}
    before = repr(net)
    with mu.freeze(net, mu.Param):
        same(ROUNDS[through](handled, states), ROUNDS[through](net_by_hand(2.0), states))
    assert repr(net) == before
    assert net.steps.deferred
    assert net.total.value == 0.0


def test_other_states_of_a_module_are_live() -> None:
    net = Net()
    handled, states = handle(net, mu.BatchStat)
    net.w.value = jnp.float32(5.0)
    assert handled((1.0, states))[0] == 5.0
    assert net.steps.value == 1.0  # not handled, so written as anywhere
    assert mu.jit(handled)((1.0, states))[1]["total"] == 5.0
    assert mu.jit(lambda a: handled(a)[0])((1.0, states)) == 5.0
    assert net.steps.value == 3.0
    gradient = mu.grad(lambda: handled((3.0, states))[0], of=net)()
    assert gradient["w"] == 3.0


def test_raw_jit_refuses_what_would_go_stale_or_leak() -> None:
    net = Net()
    handled, states = handle(net, mu.BatchStat)
    with pytest.raises(errors.TraceLevelError, match=r"w` .Param. was read"):
        jax.jit(handled)((1.0, states))
    mu.freeze(net, mu.Param)
    with pytest.raises(errors.TraceLevelError, match=r"steps` .Hidden. was"):
        jax.jit(handled)((1.0, states))
    assert net.steps.deferred
    handled, everything = handle(Net(), ...)
    out, new = jax.jit(handled)((1.0, everything))
    assert (out, new["w"], new["steps"]) == (2.0, 2.0, 1.0)


def test_a_handled_module_can_be_an_argument_of_raw_jax() -> None:
    net = Net()
    net.steps.value = jnp.float32(0.0)
    handled, states = handle(net, [mu.BatchStat, mu.Hidden])
    out, new = jax.jit(lambda handled, x, s: handled((x, s)))(handled, 3.0, states)
    assert (out, new["total"], new["steps"], net.steps.value) == (6.0, 6.0, 1.0, 0.0)
    gradient = jax.grad(lambda handled: handled((3.0, states))[0])(handled)
    assert gradient.body.w.value == 3.0


def test_handlers_around_one_module() -> None:
    net = Net()
    handled, first = handle(net, mu.BatchStat)
    handled, second = handle(handled, category_predicate=lambda collection: True)
    assert ([*first], {*second}) == (
        ["total"],
        {"WithFunctionalLocalState.body.steps", "WithFunctionalLocalState.body.w"},
    )
    (out, first), second = jax.jit(handled)(((1.0, first), second))
    assert (out, first["total"], second["WithFunctionalLocalState.body.steps"]) == (2.0, 2.0, 1.0)
    assert net.steps.deferred
    once = effects.freeze_local_states(handled, second)
    frozen = effects.freeze_local_states(once, first)
    assert isinstance(frozen, Net)
    assert (frozen.total.value, frozen.steps.value) == (2.0, 1.0)
    assert all(cell.frozen for cell in mu.variables(frozen).values())


def test_frozen_modules_are_saved_handled_again_and_thawed(tmp_path: Path) -> None:
    net = Net()
    handled, states = handle(net, [mu.BatchStat, mu.Hidden])
    _, states = handled((1.0, states))
    frozen = effects.freeze_local_states(handled, states)
    assert frozen is not net
    assert (frozen.total.frozen, frozen.steps.frozen, frozen.w.frozen) == (True, True, False)
    assert frozen.w is not net.w
    with pytest.raises(errors.FrozenStateError):
        frozen(1.0)
    mu.checkpoint.save(tmp_path / "net", frozen)
    mu.checkpoint.restore(tmp_path / "net", net)
    assert (net.total.value, net.steps.value) == (2.0, 1.0)
    handled, again = handle(frozen, [mu.BatchStat, mu.Hidden])
    same(again, states)
    for run in (handled, mu.jit(handled), mu.jit(lambda a: handled(a))):
        out, new = run((1.0, again))
        assert (out, new["steps"]) == (4.0, 2.0)
        assert frozen.total.frozen
        assert frozen.total.value == 2.0
    effects.thaw(frozen)
    assert frozen(1.0) == 4.0
    assert effects.thaw is mu.thaw


def test_threads_may_call_a_frozen_model_at_once() -> None:
    net = Net()
    handled, states = handle(net, [mu.BatchStat, mu.Hidden])
    handled, states = handle(effects.freeze_local_states(handled, states), [mu.BatchStat, mu.Hidden])
    outs: list[Any] = []
    threads = [
        threading.Thread(target=lambda i=i: outs.extend(handled((float(i), states))[0] for _ in range(5)))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(float, outs)) == sorted(5 * [0.0, 2.0, 4.0, 6.0])
    assert all(handled.body.total.frozen for _ in range(2))


def test_modules_in_other_trees() -> None:
    net, seen = Net(), mu.Variable(0)

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Both:
        nets: Any
        state: Any
        seen: Any

        def __call__(self, x: Any) -> Any:
            self.seen += 1
            return self.nets["a"](x) + self.nets["b"](x) + self.state.value

    body = Both({"a": net, "b": net}, Initial(one, "hidden"), seen)
    handled, states = handle(body, "hidden")
    assert states == {"Both.nets['a'].steps": 0.0, "Both.state": 1.0}
    out, new = handled((1.0, states))
    assert (out, new["Both.nets['a'].steps"], net.total.value, seen.value) == (2.0 + 4.0 + 1.0, 2.0, 4.0, 1)
    frozen = effects.freeze_local_states(handled, new)
    assert frozen.nets["a"] is frozen.nets["b"] is not net
    assert frozen.seen is not seen
    assert type(frozen.state) is Frozen
    handled, states = handle(body, "variables")
    assert states == {"Both.seen": 0 + 1}


def test_a_method_is_handled_as_its_module() -> None:
    net = Net()
    handled, states = handle(net.__call__, [mu.BatchStat, mu.Hidden])
    assert handled((1.0, states))[1] == {"total": 2.0, "steps": 1.0}
    assert net.total.value == 0.0
    frozen = effects.freeze_local_states(handled, {"total": 3.0, "steps": 1.0})
    assert frozen.__self__ is not net
    assert frozen.__self__.total.value == 3.0


@pytest.mark.parametrize("node", [Net, lambda: Chain([Net(), Total(Initial(zero, "x"))])])
def test_freezing_is_pure(node: Callable[[], Any]) -> None:
    handled, states = handle(node(), category_predicate=lambda _: True)
    ones = jax.tree.map(jnp.ones_like, states)
    frozen = jax.jit(lambda states: effects.freeze_local_states(handled, states))(ones)
    assert all(leaf == 1.0 for leaf in jax.tree.leaves(frozen))
    assert handle(frozen, category_predicate=lambda _: True)[1] == ones


@pytest.mark.parametrize("through", [lambda f: f, jax.jit, mu.jit])
def test_a_state_that_a_layer_returns_is_refused(through: Any) -> None:
    asks = jax.tree_util.Partial(lambda request, x: [request], Initial(zero, "cache"))
    for body in (Returns(), asks):
        handled, states = handle(body, "cache")
        with pytest.raises(errors.EffectError, match=r"was returned by its layer[\s\S]*state\.get"):
            through(handled)((1.0, states))


class Returns(mu.Module):
    def __init__(self) -> None:
        self.v = mu.Cache(0.0)

    def __call__(self, x: Any) -> Any:
        self.v += x
        return self.v


def test_modules_deep_in_other_trees_are_found() -> None:
    net = Net()
    handled, states = handle(Chain([Chain([net])]), mu.BatchStat)
    for run in (mu.jit(handled), mu.jit(lambda a: handled(a))):
        out, new = run((1.0, states))
        assert (out, new["total"]) == (2.0, 2.0)
    assert net.steps.value == 2.0
    counts = Counts()
    handled, states = handle(Chain([Chain([counts])]), "variables")
    for through in (lambda f: f, jax.jit):
        with pytest.raises(errors.StructureError, match=r"body\.parts\[0\]\.parts\[0\]\.calls"):
            through(handled)((1.0, states))
    assert counts.calls == 0


def test_streams_are_states() -> None:
    class Noise(mu.Module):
        def __init__(self) -> None:
            self.rngs = mu.Rngs(0)

        def __call__(self, x: Any) -> Any:
            return x + jax.random.normal(self.rngs())

    net, twin = Noise(), Noise()
    handled, states = handle(net, mu.RngState)
    for _ in range(3):
        out, states = jax.jit(handled)((1.0, states))
        same(out, twin(1.0))


def test_layers_whose_sizes_are_inferred() -> None:
    net = mu.nn.BatchNorm(None, rngs=mu.Rngs(0))
    x = jnp.arange(6.0).reshape(3, 2)
    handled, states = handle(net, ...)
    out, states = handled((x, states))
    twin = mu.nn.BatchNorm(2, rngs=mu.Rngs(0))
    same(out, twin(x))
    same(states["mean"], twin.mean.value)
    assert net.mean.deferred
    frozen = effects.freeze_local_states(handled, states)
    same(frozen.mean.value, twin.mean.value)
    handled, states = handle(net, ..., lazy=True)
    frozen = effects.freeze_local_states(handled, states())
    assert frozen.mean.deferred


# -- what is refused -------------------------------------------------------------------------------------------------


class Asks(mu.Module):
    def __init__(self) -> None:
        self.layers = [{"cache": (Initial(zero, "a"),)}]


class Counts(mu.Module):
    def __init__(self) -> None:
        self.v = mu.Variable(0.0)
        self.calls = 0

    def __call__(self, x: Any) -> Any:
        self.calls += 1
        self.v += x


class Twice(mu.Module):
    def __init__(self) -> None:
        self.a = mu.Cache(0.0, name="n")
        self.b = mu.Cache(0.0, name="n")


def changed() -> None:
    net = Net()
    handled, states = handle(net, mu.BatchStat)
    mu.rename(net, lambda name: name + "!")
    handled((1.0, states))


@pytest.mark.parametrize(
    ("act", "error", "text"),
    [
        (lambda: handle(two()), errors.ArgumentError, "said nowhere"),
        (lambda: handle(two(), "a", lambda c: True), errors.ArgumentError, "said twice"),
        (lambda: handle(two(), "a", state_sharing="some"), errors.ArgumentError, "`state_sharing` cannot be 'some'"),  # type: ignore[arg-type]
        (lambda: handle(Asks(), "a"), errors.EffectError, r"`layers\[0\]|`layers` is a request in a Module"),
        (lambda: handle(Twice(), mu.Cache), errors.EffectError, "two states have the name 'n': a and b"),
        (lambda: handle(Net(), object()), errors.FilterError, "is not a filter"),
        (lambda: handle(two(), "a")[0](1.0), errors.ArgumentError, "without states"),
        (lambda: handle(two(), "a")[0](1.0, {}), errors.EffectError, r"missing:    Chain\.parts\[0\]/Total\.state"),
        (lambda: handle(two(), "b")[0](1.0, {"x": 1}), errors.EffectError, "unexpected: x"),
        (lambda: effects.freeze_local_states(handle(two(), "a")[0], {}), errors.EffectError, "missing"),
        (lambda: handle(Counts(), "variables")[0](1.0, {"v": 1.0}), errors.StructureError, "changed in a handled"),
        (changed, errors.EffectError, r"has changed since it was handled[\s\S]*missing: total"),
        (
            lambda: handle(places(Frozen("text", "a")), "a"),
            errors.StateTypeError,
            r"`Chain\.parts\[0\]/Total\.state` \(.*\) cannot hold 'text'",
        ),
        (lambda: handle(two(), "b")[0](1.0, {}), errors.EffectError, "outside of its handler"),
        (
            lambda: handle(Total(Frozen(0, "a")), "a")[0](1.0, {"Total.state": "x"}),
            errors.StateTypeError,
            r"`Total\.state` \(",
        ),
    ],
)
def test_refusals(act: Callable[[], Any], error: Any, text: str) -> None:
    with pytest.raises(error, match=text) as caught:
        act()
    assert caught.value.cure is not None


def test_a_refused_change_is_undone() -> None:
    net = Counts()
    handled, states = handle(net, "variables")
    with pytest.raises(errors.StructureError):
        jax.jit(handled)((1.0, states))
    assert (net.calls, net.v.value) == (0, 0.0)


# -- names -----------------------------------------------------------------------------------------------------------


def test_renaming_trees() -> None:
    tree = places(
        Initial(zero, "a", "x"), Frozen(1.0, "a", "y"), Initial(zero, "a"), Initial(zero, "a", "z"), Shared("z", "a")
    )
    renamed = mu.rename(tree, str.upper)
    assert [part.state.name for part in renamed.parts] == ["X", "Y", None, "Z", "Z"]
    assert tree.parts[0].state.name == "x"
    handled, states = handle(tree, "a", state_sharing="allowed")
    other = handled.with_renamed_parameters(str.upper)
    assert {*other._names()} == {"X", "Y", "Z", "Chain.parts[2]/Total.state"}
    values = {name if "." in name else name.upper(): value for name, value in states.items()}
    same(other((1.0, values))[0], handled((1.0, states))[0])
    frozen = effects.freeze_local_states(other, values)
    assert [part.state.name for part in frozen.parts] == ["X", "Y", None, "Z", "Z"]


def test_names_may_be_exchanged() -> None:
    other = {"a": "b", "b": "a"}
    model = {"x": mu.Variable(0, name="a"), "y": mu.Variable(1, name="b"), "z": mu.Variable(2)}
    mu.rename(model, other.__getitem__)
    assert [cell.name for cell in model.values()] == ["b", "a", None]
    handled, states = handle(places(Initial(zero, "c", "a"), Initial(one, "c", "b")), "c")
    new = mu.rename(handled, other.__getitem__)(1.0, {"a": states["b"], "b": states["a"]})[1]
    assert (new["b"], new["a"]) == (1.0, 2.0)


@pytest.mark.parametrize("category", ["a", ("a", 1), mu.Cache, None])
def test_the_cure_of_a_request_without_a_handler_works(category: Any) -> None:
    layer = Total(Initial(zero, category))
    with pytest.raises(errors.EffectError) as caught:
        layer(1.0)
    assert caught.value.cure is not None
    handle_it, call_it = caught.value.cure.split("`")[1::2]
    known: dict[str, Any] = {"mu": mu, "layer": layer, "x": 1.0}
    exec(handle_it, known)
    exec(call_it, known)
    assert known["out"] == 1.0


def test_renaming_modules_is_a_mark() -> None:
    net = Net()
    assert mu.rename(net, lambda name: f"net/{name}") is net
    assert (net.total.name, net.steps.name) == ("net/total", None)
    handled, states = handle(net, [mu.BatchStat, mu.Hidden])
    assert {*states} == {"net/total", "steps"}
    other = mu.rename(handled, lambda name: name.replace("net", "model"))
    assert net.total.name == "model/total"
    assert {*other((1.0, {"model/total": 0.0, "steps": 0.0}))[1]} == {"model/total", "steps"}
    with pytest.raises(errors.EffectError, match="has changed since"):
        handled((1.0, states))

    @functools.partial(mu.jit, static_argnums=1)
    def step(net: Net, fails: bool) -> None:
        mu.rename(net, lambda name: name + "!")
        if fails:
            raise KeyError

    for _ in range(3):  # traced, and replayed
        step(net, False)
    assert net.total.name == "model/total!!!"
    with pytest.raises(KeyError):
        step(net, True)
    assert net.total.name == "model/total!!!"
    shared = mu.rename({"a": net, "b": (net, Initial(zero, "a", "c"))}, lambda name: name[0])
    assert (net.total.name, shared["b"][1].name) == ("m", "c")


@pytest.mark.parametrize(
    ("node", "fn", "text"),
    [
        (
            lambda: Chain([mu.Variable(0, name="a"), mu.Variable(0, name="b")]),
            lambda name: "c",
            "`b` cannot be renamed to 'c'",
        ),
        (
            lambda: places(Initial(zero, "a", "x"), Initial(zero, "a", "y")),
            lambda name: "c",
            "`y` cannot be renamed to 'c'",
        ),
        (lambda: handle(two(), "a")[0], lambda name: "Chain.parts[0]/Total.state", "cannot be renamed"),
        (lambda: mu.Variable(0, name="a"), lambda name: None, "cannot be renamed to None"),
        (lambda: mu.Variable(0, name="a"), lambda name: [], "cannot be renamed to"),
    ],
)
def test_names_may_not_fall_together(node: Callable[[], Any], fn: Any, text: str) -> None:
    tree = node()
    before = repr(tree)
    with pytest.raises(errors.EffectError, match=text):
        mu.rename(tree, fn)
    assert repr(tree) == before


names = st.lists(
    st.one_of(st.none(), st.sampled_from(["enc/a", "enc/b", "dec/c", "d", "e"])), min_size=1, max_size=6
).filter(lambda names: len({*names} - {None}) == len([name for name in names if name]))


class Cell(mu.Module):
    def __init__(self, name: str | None) -> None:
        self.v = mu.Cache(0.0, name=name)


@given(names=names, data=st.data(), kind=st.sampled_from(["list", "dict", "nested", "module"]))
def test_moving_keeps_explicit_names_and_renaming_keeps_positions(names: list[Any], data: Any, kind: str) -> None:
    def tree(order: list[int]) -> Any:
        if kind == "module":
            net = mu.Module()
            net.parts = [Cell(names[i]) for i in order]
            return net
        made = [Total(Initial(lambda i=i: jnp.full((), i), "cache", names[i])) for i in order]
        if kind == "nested":
            return Chain([Chain([layer]) for layer in made])
        return Chain({f"k{at}": layer for at, layer in enumerate(made)} if kind == "dict" else made)

    def split(states: dict[str, Any]) -> tuple[set[str], set[str]]:
        explicit = {name for name in states if name in (*names, *(f"new/{name}" for name in names))}
        return explicit, {*states} - explicit

    order = [*range(len(names))]
    moved = data.draw(st.permutations(order))

    def fn(name: str) -> str:
        return f"new/{name}"

    handled, states = handle(tree(order), "cache")
    _, after = handle(tree(moved), "cache")
    assert split(states)[0] == split(after)[0] == {name for name in names if name}
    assert len(states) == len(after) == len(names)
    for i, name in enumerate(names):
        if name and kind != "module":
            assert after[name] == states[name] == i
    renamed_first = handle(mu.rename(tree(order), fn), "cache")[1]
    renamed_after = {*mu.rename(handled, fn)._names()}
    assert {*renamed_first} == renamed_after
    assert split(renamed_first)[1] == split(states)[1]
    assert split(renamed_first)[0] == {f"new/{name}" for name in names if name}


# -- beside the library that has them -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", ["forbidden", "allowed", "unsafe"])
@pytest.mark.parametrize("case", [case for case in SHARED if case != "a position for a name"])
def test_as_penzai(case: str, sharing: Any) -> None:
    pytest.importorskip("penzai")
    from penzai.core import struct
    from penzai.deprecated.v1 import pz

    @struct.pytree_dataclass
    class Layer(pz.Layer):  # type: ignore[misc]
        state: Any

        def __call__(self, x: Any) -> Any:
            self.state.set(self.state.get() + x)
            return self.state.get()

    def theirs(request: Any) -> Any:
        cls = getattr(pz.de, type(request).__name__)
        return cls(**{field.name: getattr(request, field.name) for field in dataclasses.fields(request)})

    def run(library: Any, requests: list[Any]) -> Any:
        body = pz.nn.Sequential([Layer(request) for request in requests])
        try:
            handled, states = library.handle_local_states(body, category="a", state_sharing=sharing)
        except ValueError:
            return "refused"
        outs = []
        for x in (1.0, 2.0):
            out, states = jax.jit(lambda states, x=x: handled((x, states)))(states)
            outs.append((out, states))
        frozen = library.freeze_local_states(handled, states)
        tree, definitions = library.hoist_shared_state_requests(frozen)
        assert jax.tree.structure(library.embed_shared_state_requests(tree, definitions)) == jax.tree.structure(frozen)
        return outs, [(type(layer.state).__name__, layer.state.name) for layer in frozen.sublayers]

    requests = [*SHARED[case][0], Initial(zero, "a", "last")]
    ours, expected = run(effects, requests), run(pz.de, [theirs(request) for request in requests])
    if expected == "refused" or ours == "refused":
        assert ours == expected
    else:
        same(ours[0], expected[0])
        assert ours[1] == expected[1]


def test_equinox_modules_are_trees() -> None:
    eqx = pytest.importorskip("equinox")

    class Layer(eqx.Module):  # type: ignore[misc,name-defined]
        state: Any
        w: jax.Array

        def __call__(self, x: Any, key: Any = None) -> Any:
            self.state.set(self.state.get() + self.w * x)
            return self.state.get()

    body = eqx.nn.Sequential([eqx.nn.Lambda(Layer(Initial(zero, "a"), jnp.float32(2.0))), eqx.nn.Lambda(jnp.tanh)])
    handled, states = handle(body, "a")
    assert states == {"Sequential.layers[0]/Lambda.fn/Layer.state": 0.0}
    out, states = eqx.filter_jit(handled)((1.0, states))
    same((out, states), (jnp.tanh(2.0), {"Sequential.layers[0]/Lambda.fn/Layer.state": 2.0}))
    gradient = eqx.filter_grad(lambda handled: handled((1.0, states))[1]["Sequential.layers[0]/Lambda.fn/Layer.state"])(
        handled
    )
    assert jax.tree.leaves(gradient)[0] == 1.0
