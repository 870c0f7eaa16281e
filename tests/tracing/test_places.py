"""States that are made late and put in odd places: they are committed there, or an error says where they were made.

What is never right is a first value at each call.
"""

from __future__ import annotations

import collections
import contextvars
import functools
import gc
import types
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import mutatis as mu
from mutatis import errors

pytestmark = pytest.mark.once  # nothing here depends on the version of JAX

LATE: Any = None


class Net(mu.Module):
    def __init__(self) -> None:
        self.n = mu.Variable(0)

    def __call__(self) -> Any:
        self.n.value = self.n.value + 1
        return self.n.value


# -- places that a transform sees: each gives a step that makes its state at the first call, and counts ---------------


def in_a_list() -> Any:
    kept: list[Any] = []

    def step() -> Any:
        if not kept:
            kept.append(Net())
        return kept[0]()

    return step


def in_a_dict() -> Any:
    kept: dict[str, Any] = {}

    def step() -> Any:
        if "late" not in kept:
            kept["late"] = mu.Variable(0)
        kept["late"].value = kept["late"].value + 1
        return kept["late"].value

    return step


def in_a_list_of_a_dict() -> Any:
    kept: dict[str, Any] = {"size": 3, "layers": []}

    def step() -> Any:
        if not kept["layers"]:
            kept["layers"].append(Net())
        return kept["layers"][0]()

    return step


def in_an_attribute() -> Any:
    holder = types.SimpleNamespace(net=None)

    def step() -> Any:
        if holder.net is None:
            holder.net = Net()
        return holder.net()

    return step


def in_a_new_attribute() -> Any:
    holder = types.SimpleNamespace()

    def step() -> Any:
        if not hasattr(holder, "net"):
            holder.net = [Net()]
        return holder.net[0]()

    return step


def in_the_attribute_of_its_owner() -> Any:
    class Trainer:
        def __init__(self) -> None:
            self.parts: tuple[Any, ...] = ()

        def step(self) -> Any:
            if not self.parts:
                self.parts = (Net(), "a name")
            return self.parts[0]()

    return Trainer().step


def in_a_variable_of_a_closure() -> Any:
    net = None

    def step() -> Any:
        nonlocal net
        if net is None:
            net = Net()
        return net()

    return step


def in_a_global() -> Any:
    global LATE
    LATE = None

    def step() -> Any:
        global LATE
        if LATE is None:
            LATE = Net()
        return LATE()

    return step


def in_a_module() -> Any:
    net = mu.Module()

    def step() -> Any:
        if not hasattr(net, "n"):
            net.n = mu.Variable(0)
        net.n.value = net.n.value + 1
        return net.n.value

    return step


def in_a_default() -> Any:
    def step(kept: Any = {}) -> Any:  # noqa: B006
        return kept.setdefault("net", Net() if "net" not in kept else None)()

    return step


SEEN = [
    in_a_list,
    in_a_dict,
    in_a_list_of_a_dict,
    in_an_attribute,
    in_a_new_attribute,
    in_the_attribute_of_its_owner,
    in_a_variable_of_a_closure,
    in_a_global,
    in_a_module,
    in_a_default,
]


# -- places that it does not see -----------------------------------------------------------------------------------


def in_a_cache() -> Any:
    net = functools.cache(Net)
    return lambda: net()()


def in_a_set() -> Any:
    kept: set[Any] = set()

    def step() -> Any:
        if not kept:
            kept.add(Net())
        return next(iter(kept))()

    return step


def in_a_deque() -> Any:
    kept: Any = collections.deque()

    def step() -> Any:
        if not kept:
            kept.append(mu.Variable(0))
        kept[0].value = kept[0].value + 1
        return kept[0].value

    return step


def in_an_attribute_of_a_class() -> Any:
    class Registry:
        net: Any = None

    def step() -> Any:
        if Registry.net is None:
            Registry.net = Net()
        return Registry.net()

    return step


def in_an_object_in_a_list() -> Any:
    kept: list[Any] = [types.SimpleNamespace(net=None)]

    def step() -> Any:
        if getattr(kept[0], "net", None) is None:
            setattr(kept[0], "net", Net())  # noqa: B010
        return kept[0].net()

    return step


def in_a_module_of_a_cache() -> Any:
    cached = functools.cache(mu.Module)
    cached()

    def step() -> Any:
        net: Any = cached()
        if not hasattr(net, "n"):
            net.n = mu.Variable(0)
        net.n.value = net.n.value + 1
        return net.n.value

    return step


UNSEEN = [in_a_cache, in_a_set, in_a_deque, in_an_attribute_of_a_class, in_an_object_in_a_list, in_a_module_of_a_cache]


# -- transforms: each runs a step of no arguments once and gives what it gives ----------------------------------------


def grad(step: Any) -> Any:
    return mu.value_and_grad(lambda x: (x * 2.0, step()), has_aux=True)(1.0)[0][1]


def custom_vjp(step: Any) -> Any:
    f = mu.custom_vjp(lambda x: (x, step()))
    f.defvjp(lambda x: ((x, step()), None), lambda _, g: (g[0],))
    return f(1.0)[1]


def shard_map(step: Any) -> Any:
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    return mu.shard_map(step, mesh=mesh, in_specs=(), out_specs=P())()


PASSES_ON: dict[str, Callable[[Any], Any]] = {
    "jit": lambda step: mu.jit(step)(),
    "jit in jit": lambda step: mu.jit(lambda: mu.jit(step)())(),
    "grad": grad,
    "jit of grad": lambda step: mu.jit(lambda: grad(step))(),
    "remat": lambda step: mu.remat(step)(),
    "jit of remat": lambda step: mu.jit(mu.remat(step))(),
    "vjp": lambda step: mu.vjp(lambda x: (x * 1.0, step()), 1.0, has_aux=True)[2],
    "vmap": lambda step: mu.vmap(lambda x: (x, step())[1], out_axes=None)(jnp.arange(2)),
    "jit of grad of remat": lambda step: mu.jit(lambda: grad(mu.remat(step)))(),
    "transaction": lambda step: mu.jit(lambda: in_transaction(step))(),
}
REFUSES: dict[str, Callable[[Any], Any]] = {
    "scan": lambda step: mu.scan(lambda c, _: (c, step()), None, length=2),
    "for_loop": lambda step: mu.for_loop(lambda _: step(), jnp.arange(2)),
    "for_loop of grad": lambda step: mu.for_loop(lambda _: grad(step), jnp.arange(2)),
    "while_loop": lambda step: mu.while_loop(lambda i: i < 2, lambda i: i + step() * 0 + 1, 0),
    "condition": lambda step: mu.while_loop(lambda i: (step() > 5) | (i < 2), lambda i: i + 1, 0),
    "cond": lambda step: mu.cond(True, step, lambda: 0),
    "map": lambda step: mu.map(lambda _: step(), jnp.arange(2)),
    "shard_map": shard_map,
    "custom_vjp": lambda step: mu.jit(lambda: custom_vjp(step))(),
    "jit of scan": lambda step: mu.jit(lambda: mu.scan(lambda c, _: (c, step()), None, length=2))(),
}


def in_transaction(step: Any) -> Any:
    with mu.transaction():
        return step()


def makes(step: Any, run: Callable[[Any], Any]) -> Any:
    """Three runs of one step."""
    return [int(jnp.max(run(step))) for _ in range(3)]


@pytest.mark.parametrize("place", SEEN)
@pytest.mark.parametrize("name", PASSES_ON)
def test_a_late_state_is_committed_where_it_was_put(name: str, place: Any) -> None:
    if name == "vmap":
        values = makes(place(), lambda step: mu.vmap(lambda x: (x, step())[1])(jnp.arange(2)))
        assert values[0] == 1, "a state per lane, which the second call could not share"
        return
    assert makes(place(), PASSES_ON[name]) == [1, 2, 3]


@pytest.mark.parametrize("place", SEEN)
def test_one_compiled_step_is_kept(place: Any, traces: Any) -> None:
    """The first call makes the state, all others are another program; none is made for the third."""
    step = mu.jit(traces.count(place()))
    assert [int(step()) for _ in range(5)] == [1, 2, 3, 4, 5]
    assert traces.total == 2


@pytest.mark.parametrize("place", [*SEEN, *UNSEEN])
@pytest.mark.parametrize("name", REFUSES)
def test_loops_and_branches_refuse_it_and_put_it_back(name: str, place: Any) -> None:
    step = place()
    with pytest.raises(errors.StructureError) as caught:
        REFUSES[name](step)
    assert "test_places.py" in str(caught.value) or "was changed" in str(caught.value).split("\n")[0]
    if place in SEEN:
        assert makes(step, lambda step: step()) == [1, 2, 3], "as if nothing had been"


@pytest.mark.parametrize("place", UNSEEN)
@pytest.mark.parametrize("name", [name for name in PASSES_ON if "jit" in name or name == "transaction"])
def test_a_program_refuses_what_it_cannot_see(name: str, place: Any) -> None:
    with pytest.raises(errors.StructureError) as caught:
        PASSES_ON[name](place())
    text = str(caught.value)
    assert "Net.__init__" in text or "step" in text or "neither its arguments nor the names it uses" in text


@pytest.mark.parametrize("place", UNSEEN)
@pytest.mark.parametrize("name", ["grad", "remat", "vjp"])
def test_outside_of_programs_it_is_where_python_put_it(name: str, place: Any) -> None:
    assert makes(place(), PASSES_ON[name]) == [1, 2, 3]


@pytest.mark.parametrize("place", [*SEEN, *UNSEEN])
@pytest.mark.parametrize("look", [mu.eval_shape, lambda step: mu.make_jaxpr(step)(), lambda step: mu.jit(step).lower()])
def test_a_look_makes_nothing(look: Any, place: Any) -> None:
    step = place()
    if place in UNSEEN:
        with pytest.raises(errors.StructureError):
            look(step)
    else:
        look(step)
        assert makes(step, lambda step: step()) == [1, 2, 3]


@pytest.mark.parametrize("place", SEEN)
def test_a_failing_step_leaves_the_place_as_it_was(place: Any) -> None:
    step = place()

    def fails() -> None:
        step()
        raise KeyError("in the middle")

    for run in (mu.jit(fails), mu.remat(fails)):
        with pytest.raises(KeyError):
            run()
    assert makes(step, PASSES_ON["jit"]) == [1, 2, 3]


# -- swaps and removals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [mu.jit, lambda f: lambda: mu.jit(lambda: mu.jit(f)())(), mu.remat])
def test_states_that_change_places(wrap: Any) -> None:
    sim = types.SimpleNamespace(front=mu.Variable(0), back=mu.Variable(100))
    a, b = sim.front, sim.back

    def f() -> None:
        sim.front, sim.back = sim.back, sim.front
        sim.front.value = sim.front.value + 1

    step = wrap(f)
    for _ in range(4):
        step()
    assert [int(a), int(b)] == [2, 102]
    assert sim.front is a and sim.back is b


def test_a_swap_in_a_loop_is_refused() -> None:
    sim = types.SimpleNamespace(front=mu.Variable(0), back=mu.Variable(100))
    before = sim.front

    def body(_: Any) -> None:
        sim.front, sim.back = sim.back, sim.front

    with pytest.raises(errors.StructureError, match=r"`sim\.(front|back)` was changed in the body"):
        mu.for_loop(body, jnp.arange(2))
    assert sim.front is before


def test_a_state_that_is_dropped() -> None:
    holder = types.SimpleNamespace(net=Net())
    ref = weakref.ref(holder.net)

    @mu.jit
    def step() -> Any:
        n = holder.net()
        holder.net = None
        return n

    assert int(step()) == 1 and holder.net is None
    gc.collect()
    assert ref() is None


def test_rebinding_a_late_state_is_noticed() -> None:
    holder = types.SimpleNamespace(net=None)

    @mu.jit
    def step() -> Any:
        if holder.net is None:
            holder.net = Net()
        return holder.net()

    step()
    holder.net = Net()
    assert [int(step()), int(holder.net.n)] == [1, 1]


def test_one_state_in_two_places_stays_one() -> None:
    first: list[Any] = []
    holder = types.SimpleNamespace(net=None)

    @mu.jit
    def step() -> Any:
        if not first:
            first.append(Net())
            holder.net = first[0]
        return first[0]() + holder.net()

    assert [int(step()) for _ in range(3)] == [3, 7, 11]
    assert first[0] is holder.net


def test_a_state_in_a_seen_and_in_an_unseen_place() -> None:
    holder, kept = types.SimpleNamespace(net=None), set()

    @mu.jit
    def step() -> None:
        holder.net = Net()
        kept.add(holder.net)

    with pytest.raises(errors.StructureError, match="no transform sees it"):
        step()
    assert holder.net is None


def test_a_place_that_a_static_argument_names() -> None:
    """The program inside names the place, and so does the one around: it searches its static functions, too."""
    kept: dict[str, Any] = {}

    def late() -> Any:
        if "net" not in kept:
            kept["net"] = Net()
        return kept["net"]()

    run = mu.jit(lambda f: mu.jit(f)(), static_argnums=0)
    assert [int(run(late)) for _ in range(4)] == [1, 2, 3, 4]


def test_a_place_that_only_a_function_inside_names() -> None:
    """Nobody sees which function a context variable holds: the program inside names the place, the one around does not."""
    kept: dict[str, Any] = {}

    def late() -> Any:
        if "net" not in kept:
            kept["net"] = Net()
        return kept["net"]()

    chosen = contextvars.ContextVar("chosen", default=late)
    run = mu.jit(lambda: mu.jit(chosen.get())())
    with pytest.raises(errors.StructureError, match="no transform sees it"):
        run()


# -- what is no such state ------------------------------------------------------------------------------------------


def scratch(keep: list[Any]) -> None:
    """Temporary states: in cycles, in caught exceptions, as arguments of other programs, cloned, rolled back."""
    net: Any = Net()
    net.me = net
    net()
    try:
        other = Net()
        raise KeyError(other)
    except KeyError:
        pass
    mu.clone(net)
    inner(net)
    bare(net.n)
    with mu.transaction(net) as tx:
        net.extra = mu.Variable(1)
        tx.rollback()
    mu.grad(lambda w: w.value * 2.0)(mu.Param(1.0))
    mu.scan(lambda c, _: (c, Net()()), None, length=2)
    mu.sow(net, "seen", 1.0)
    mu.pop(net, mu.Intermediate)
    keep.append(len(keep))


inner = mu.jit(lambda net: net())
bare = mu.jit(lambda v: v.set(v.value + 1))


@pytest.mark.parametrize("run", [*PASSES_ON.values(), *REFUSES.values()])
def test_temporary_states_are_none_of_it(run: Any) -> None:
    count = mu.Variable(0)
    keep: list[Any] = []

    def step() -> Any:
        scratch(keep)
        return count.value * 0

    run(step)
    assert keep


def test_a_layer_without_states_may_be_cached() -> None:
    dropout = functools.cache(lambda rate: mu.nn.Dropout(rate, deterministic=True))
    f = mu.jit(lambda x: dropout(0.5)(x))
    assert float(f(1.0)) == 1.0
    assert dropout(0.5).rate == 0.5 and float(f(jnp.ones(()))) == 1.0


def test_what_python_keeps_of_its_own_is_its_own() -> None:
    """Lists and names that have nothing to do with states are left as the trace left them, as in JAX."""
    shapes: list[Any] = []
    count = 0

    @mu.jit
    def f(x: Any) -> Any:
        nonlocal count
        count += 1
        shapes.append(x.shape)
        return x

    f(jnp.ones(2))
    f(jnp.ones(2))
    assert (shapes, count) == ([(2,)], 1)
    mu.for_loop(lambda x: (shapes.append(x.shape), x)[1], jnp.ones(3))
    assert len(shapes) == 2
