"""What Python offers for classes: cached properties, slots, descriptors, `__getattr__`, operators, protocols."""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import errors

pytestmark = pytest.mark.once  # nothing here depends on the version of JAX

X = jnp.ones(3)


@pytest.fixture(autouse=True)
def promotion() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"):
        yield


class Base(mu.Module):
    def __init__(self, w: float = 2.0) -> None:
        self.w = mu.Param(jnp.float32(w))


# -- computed once -------------------------------------------------------------------------------------------------

VALUES: dict[str, Callable[[Any], Any]] = {
    "numpy": lambda self: np.arange(3) < 2,
    "jax": lambda self: jnp.arange(3) < 2,
    "of a state": lambda self: jnp.arange(3) < self.w.value,
    "tuple": lambda self: (jnp.arange(3) < 2, 1),
    "dict": lambda self: {"mask": jnp.arange(3) < 2},
    "list": lambda self: [jnp.arange(3) < 2],
    "object": lambda self: lambda: jnp.arange(3) < 2,
}


def unpacked(value: Any) -> Any:
    value = value() if callable(value) else value
    value = value["mask"] if isinstance(value, dict) else value
    return value[0] if isinstance(value, tuple | list) else value


def cached(value: Callable[[Any], Any]) -> type[Base]:
    class Cached(Base):
        @functools.cached_property
        def mask(self) -> Any:
            return value(self)

        def __call__(self, x: Any) -> Any:
            return x * unpacked(self.mask) * self.w.value

    return Cached


def mixed(value: Callable[[Any], Any]) -> type[Base]:
    class Mixin:
        mask = functools.cached_property(value)

    Mixin.mask.__set_name__(Mixin, "mask")

    class Cached(Mixin, Base):
        def __call__(self, x: Any) -> Any:
            return x * unpacked(self.mask) * self.w.value

    return Cached


def by_hand(value: Callable[[Any], Any]) -> type[Base]:
    class Cached(Base):
        @property
        def mask(self) -> Any:
            if "_mask" not in self.__dict__:
                self.__dict__["_mask"] = value(self)
            return self.__dict__["_mask"]

        def __call__(self, x: Any) -> Any:
            return x * unpacked(self.mask) * self.w.value

    return Cached


CALLS: dict[str, Callable[[Any], Any]] = {
    "eager": lambda net: net(X),
    "jit": lambda net: mu.jit(lambda net, x: net(x))(net, X),
    "grad": lambda net: mu.value_and_grad(lambda net: (net(X).sum(), net(X)), has_aux=True)(net)[0][1],
    "vmap": lambda net: (
        mu.vmap(lambda x: net(x[None]), in_axes=0, out_axes=1)(X)[0] if False else mu.vmap(net)(X[None])[0]
    ),
    "scan": lambda net: mu.for_loop(lambda x: net(x), X[None])[0],
    "remat": lambda net: mu.remat(net)(X),
    "raw jit": lambda net: jax.jit(lambda net, x: net(x))(net, X),
    "jit of grad": lambda net: mu.jit(lambda net: (mu.grad(lambda n: n(X).sum())(net), net(X))[1])(net),
    "eval_shape": lambda net: (mu.eval_shape(net, X), net(X))[1],
}
WAYS = {"cached_property": cached, "of a mixin": mixed, "by hand": by_hand}


@pytest.mark.parametrize("value", [*VALUES])
@pytest.mark.parametrize("way", [*WAYS])
def test_computed_once(way: str, value: str) -> None:
    if way == "by hand" and value in ("dict", "list", "object"):
        pytest.skip("is refused, or static")
    kind = WAYS[way](VALUES[value])
    for first in ("jit", "grad", "vmap", "scan", "raw jit", "eval_shape", "jit of grad", "remat"):
        net = kind()
        for name in (first, "eager", first, "jit"):
            np.testing.assert_array_equal(CALLS[name](net), [2, 2, 0], f"{first}, then {name}")
        assert len(mu.state(net)) == 1
        for other in (mu.clone(net), copy.deepcopy(net)):
            np.testing.assert_array_equal(CALLS["jit"](other), [2, 2, 0])
            np.testing.assert_array_equal(other(X), [2, 2, 0])


@pytest.mark.parametrize("way", [cached, mixed])
def test_cached_properties_are_no_part_of_the_structure(way: Any) -> None:
    calls, traces = io.StringIO(), []  # a list would be traced anew for each call that ordinary code adds to it

    def value(self: Any) -> Any:
        calls.write(".")
        return jnp.arange(3) < 2

    kind = way(value)

    @mu.jit
    def run(net: Any) -> Any:
        traces.append(1)
        return net(X)

    one, other = kind(), kind()
    definition = mu.graphdef(one)
    run(one)
    assert len(calls.getvalue()) == 1
    one(X), one(X), run(one), run(other)
    assert (len(calls.getvalue()), len(traces)) == (2, 1)
    assert one.mask is one.mask
    assert mu.graphdef(one) == definition == mu.graphdef(other)
    assert "mask" not in repr(one)
    assert isinstance(kind.mask, functools.cached_property)
    del one.mask
    one(X)
    assert len(calls.getvalue()) == 3
    with pytest.raises(AttributeError):
        del other.mask
    one.mask = jnp.zeros(3)  # an attribute of its own from now on
    np.testing.assert_array_equal(run(one), [0, 0, 0])
    assert len(mu.state(one)) == 2
    del one.mask
    np.testing.assert_array_equal(run(one), [2, 2, 0])


@pytest.mark.parametrize("way", [cached, mixed])
def test_cached_properties_follow_the_states_that_they_are_of(way: Any) -> None:
    net = way(lambda self: self.w.value * 2)()
    run = mu.jit(lambda net: net.mask)
    for w in (1.0, 1.0, 5.0, 3.0):
        net.w.value = jnp.float32(w)
        assert float(net.mask) == float(run(net)) == 2 * w
    mu.jit(lambda net: net.w.set(7.0))(net)
    assert float(net.mask) == float(run(net)) == 14


def test_a_cached_property_of_a_model_made_in_a_transform() -> None:
    kind = cached(VALUES["jax"])

    def make() -> Any:
        net = kind()
        net(X)
        return net

    for net in (mu.jit(make)(), mu.remat(make)()):
        np.testing.assert_array_equal(net(X), [2, 2, 0])
        np.testing.assert_array_equal(CALLS["jit"](net), [2, 2, 0])
    nets = mu.vmap(lambda _: make(), axis_size=2)(jnp.arange(2))
    np.testing.assert_array_equal(mu.vmap(lambda net: net(X))(nets), [[2, 2, 0]] * 2)
    hand = by_hand(VALUES["jax"])

    def make_by_hand() -> Any:
        net = hand()
        net(X)
        return net

    for transform in (mu.jit, mu.remat):
        net = transform(make_by_hand)()
        np.testing.assert_array_equal(net(X), [2, 2, 0])
        np.testing.assert_array_equal(CALLS["jit"](net), [2, 2, 0])


def test_arrays_put_by_hand_are_constants_that_are_noticed() -> None:
    net = Base()
    run = mu.jit(lambda net: net.w.value * net._scale)
    for scale in (1.0, 3.0, 3.0):
        net.__dict__["_scale"] = np.float32([scale])
        np.testing.assert_array_equal(run(net), [2 * scale])
    net.__dict__["_scale"] = jnp.ones(100)
    np.testing.assert_array_equal(run(net), np.full(100, 2.0))
    net.__dict__["_scale"] = jnp.full(100, 2.0)
    np.testing.assert_array_equal(run(net), np.full(100, 4.0))
    run, other = mu.jit(lambda net: net.w.value * net._scale), Base()
    np.testing.assert_array_equal(run(net), np.full(100, 4.0))
    other.__dict__["_scale"] = jnp.full(100, 3.0)
    np.testing.assert_array_equal(run(other), np.full(100, 6.0))
    assert len(mu.state(net)) == 1


def test_what_code_assigns_by_hand_in_a_transform_counts_as_assigned() -> None:
    def step(net: Base) -> Any:
        net.__dict__["note"] = "seen"
        net.__dict__["more"] = mu.Cache(jnp.float32(1.0))
        return net.w.value

    for transform in (mu.jit, mu.remat):
        net = Base()
        for _ in range(2):
            transform(step)(net)
        assert net.note == "seen"
        assert float(net.more) == 1
        net = Base()

        def fails(net: Base) -> Any:
            step(net)
            raise KeyError

        with pytest.raises(KeyError):
            transform(fails)(net)


def test_a_frozen_dataclass_with_a_bare_array_says_so() -> None:
    @dataclasses.dataclass(frozen=True)
    class Net(mu.Module):
        w: Any
        n: int = 3

    with pytest.raises(errors.StructureError, match="bare arrays"):
        mu.state(Net(jnp.ones(2)))
    net = Net(mu.Param(jnp.ones(2)))
    assert len(mu.state(net)) == 1
    np.testing.assert_array_equal(mu.jit(lambda net: net.w.value * net.n)(mu.clone(net)), [3, 3])


# -- slots, descriptors, hooks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [("w",), ["w", "b"], "w", {"w": "doc"}])
def test_slots_are_refused_where_the_class_is_made(slots: Any) -> None:
    with pytest.raises(errors.StructureError, match="`Net` declares `__slots__`"):
        type("Net", (mu.Module,), {"__slots__": slots})
    with pytest.raises(errors.StructureError, match="`slots=True` of `@dataclass`"):

        @dataclasses.dataclass(slots=True)
        class Net(mu.Module):
            w: mu.Param

    type("Net", (mu.Module,), {"__slots__": ()})()


def test_mixins_with_empty_slots() -> None:
    class Mixin:
        __slots__ = ()

        def double(self) -> Any:
            return 2 * self.w.value  # type: ignore[attr-defined]

    class Net(Mixin, Base):
        pass

    assert float(mu.jit(lambda net: net.double())(Net())) == 4


class Positive:
    """A data descriptor of the user's."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = "_" + name

    def __get__(self, obj: Any, owner: type | None = None) -> Any:
        if obj is None:
            raise AttributeError("only of instances")
        return getattr(obj, self.name)

    def __set__(self, obj: Any, value: Any) -> None:
        if value <= 0:
            raise ValueError("not positive")
        setattr(obj, self.name, value)

    def __delete__(self, obj: Any) -> None:
        delattr(obj, self.name)


def test_descriptors() -> None:
    class Net(Base):
        rate = Positive()

        @property
        def scale(self) -> Any:
            return self.w.value

        @scale.setter
        def scale(self, value: Any) -> None:
            self.w.value = value

    net = Net()
    with pytest.raises(ValueError, match="not positive"):
        net.rate = -1.0
    net.rate = 2.0
    net.scale = jnp.float32(4.0)
    run = mu.jit(lambda net: net.scale * net.rate)
    assert float(run(net)) == 8
    net.rate = 3.0
    assert float(run(net)) == 12
    assert float(run(mu.clone(net))) == 12
    del net.rate
    assert "_rate" not in net.__dict__


class Dynamic(Base):
    """Looks up names that it does not have, and raises what nobody expects."""

    def __getattr__(self, name: str) -> Any:
        if name == "dynamic":
            return self.w.value + 1
        raise AttributeError(name) if name.startswith("__") else KeyError(name)


class Wild(Base):
    """Compares, hashes, has a truth value and a length as it likes."""

    def __eq__(self, other: object) -> Any:
        raise AssertionError("nobody asked")

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise AssertionError("nobody asked")

    def __len__(self) -> int:
        raise AssertionError("nobody asked")

    def __iter__(self) -> Any:
        raise AssertionError("nobody asked")

    def __contains__(self, item: Any) -> bool:
        raise AssertionError("nobody asked")


class Equal(Base):
    """Equal to all of its class."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Equal)

    def __hash__(self) -> int:
        return 1


class Constructed(Base):
    """Constructors that want arguments, and their own ways to be copied."""

    def __new__(cls, w: float) -> Any:
        return super().__new__(cls)

    def __init__(self, w: float) -> None:
        super().__init__(w)

    def __getnewargs__(self) -> tuple[float]:
        return (2.0,)


class Stateful(Base):
    def __getstate__(self) -> dict[str, Any]:
        return {"inner": super().__getstate__(), "version": 3}

    def __setstate__(self, state: dict[str, Any]) -> None:
        assert state["version"] == 3
        super().__setstate__(state["inner"])


class Watching(Base):
    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)

    def __getattribute__(self, name: str) -> Any:
        return super().__getattribute__(name)

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)

    def __dir__(self) -> Any:
        raise KeyError


KINDS = [Dynamic, Wild, Equal, Stateful, Watching, functools.partial(Constructed, 2.0)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: getattr(kind, "__name__", "Constructed"))
def test_classes_that_do_as_they_like(kind: Any) -> None:
    pair = mu.Module()
    pair.a, pair.b, pair.list = kind(), kind(), [kind()]
    pair.a.w.value = jnp.float32(1.0)

    def step(pair: Any) -> Any:
        pair.b.w.value = pair.b.w.value + pair.a.w.value
        return pair.b.w.value

    assert [float(mu.jit(step)(pair)) for _ in range(2)] == [3, 4]
    assert float(mu.jit(lambda: step(pair))()) == 5
    assert float(mu.grad(lambda pair: step(pair))(pair)[("a", "w")]) == 1
    assert len(mu.variables(pair)) == 3
    assert len(mu.modules(pair)) == 4
    pair.eval().train()
    one = kind()
    mu.jit(lambda net: net.w.set(net.w.value * 2))(one)
    assert float(one.w) == 4
    other = mu.clone(pair)
    assert float(other.b.w) == float(pair.b.w)
    assert copy.deepcopy(pair).a.w is not pair.a.w
    assert float(pickle.loads(pickle.dumps(pair)).a.w) == 1
    jax.tree.map(lambda x: x, pair)
    mu.snapshot(pair).restore()
    mu.replace(pair, mu.OfType(type(pair.a)), lambda net: net)
    mu.view(pair, training=False)
    assert repr(pair)
    with mu.intercept(lambda path, module: True, lambda module, call, *args: call(*args), of=pair):
        mu.jit(step)(pair)
    mu.vmap(lambda net: net.w.value)(mu.vmap(lambda _: mu.clone(kind()))(jnp.arange(2)))


def test_a_name_that_is_looked_up() -> None:
    assert float(mu.jit(lambda net: net.dynamic)(Dynamic())) == 3


# -- names of arguments, and objects in closures -------------------------------------------------------------------

KEYWORDS = ["float", "self", "cls", "function", "f", "args", "kwargs", "call", "module", "fun", "states", "flat", "λ"]
TRANSFORMS: dict[str, Callable[[Any], Any]] = {
    "jit": mu.jit,
    "grad": lambda f: mu.value_and_grad(f, of=Base()),
    "vmap": lambda f: mu.vmap(f, axis_size=2),
    "remat": mu.remat,
    "functionalize": lambda f: functools.partial(mu.functionalize(f)[0], mu.functionalize(f)[1]),
    "eval_shape": lambda f: functools.partial(mu.eval_shape, f),
    "make_jaxpr": mu.make_jaxpr,
    "ledger": mu.inspect.ledger,
}


@pytest.mark.parametrize("name", KEYWORDS)
@pytest.mark.parametrize("transform", [*TRANSFORMS])
def test_keyword_arguments_of_any_name(transform: str, name: str) -> None:
    seen = []

    def run(*args: Any, **kwargs: Any) -> Any:
        seen.append((len(args), sorted(kwargs)))
        return jnp.sum(sum([*args, *kwargs.values()], jnp.float32(0)))

    mapped = jnp.ones(2) if transform == "vmap" else jnp.float32(1)
    for kind in (jnp.float32, float) if transform in ("jit", "remat") else (lambda x: x,):
        run_it = TRANSFORMS[transform](run)
        seen.clear()
        run_it(kind(mapped))
        run_it(**{name: kind(mapped)})
        run_it(kind(mapped), **{name: kind(mapped)})
        assert [*dict.fromkeys(map(str, seen))] == [str(x) for x in [(1, []), (0, [name]), (1, [name])]]


@pytest.mark.parametrize("name", KEYWORDS)
def test_keyword_arguments_of_a_module(name: str) -> None:
    class Net(Base):
        def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
            return len(kwargs) * self.w.value

    for run in (Net(), mu.jit(Net()), mu.remat(Net())):
        assert float(run(**{name: jnp.float32(1.0)})) == 2
    with mu.intercept(mu.Module, lambda _module, _call, /, *args, **kwargs: _call(*args, **kwargs)):
        assert float(Net()(**{name: 1.0})) == 2

    class Made(mu.Module):
        def __init__(self, /, **kwargs: Any) -> None:
            self.names = [*kwargs]

    assert Made(**{name: 1}).names == [name]


class AttrDict(dict):
    __getattr__ = dict.__getitem__


class Ordered(OrderedDict):
    def __getattr__(self, name: str) -> Any:
        return self[name]


class Raising:
    """Raises what it likes for each name that it does not have."""

    def __init__(self) -> None:
        self.lr = 1.0

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


class Obliging:
    """Has every name."""

    def __init__(self) -> None:
        self.lr = 1.0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Obliging()

    def __call__(self, x: Any) -> Any:
        return x


TWICE: dict[str, Callable[[Any], Any]] = {
    "jit": mu.jit,
    "remat": mu.remat,
    "cond": lambda f: lambda: mu.cond(True, f, f),
}


@pytest.mark.parametrize("make", [lambda: AttrDict(lr=1.0), lambda: Ordered(lr=1.0), Raising, Obliging])
@pytest.mark.parametrize("transform", TWICE.values(), ids=TWICE)
def test_objects_that_raise_for_names_in_closures(make: Any, transform: Any) -> None:
    config = make()
    net = Base()

    def run() -> Any:
        return (config["lr"] if isinstance(config, dict) else config.lr) * net.w.value

    assert float(transform(run)()) == 2


def test_callables_that_have_every_name() -> None:
    np.testing.assert_array_equal(mu.jit(Obliging())(X), X)
    np.testing.assert_array_equal(mu.vmap(Obliging())(X), X)
    np.testing.assert_array_equal(mu.for_loop(Obliging(), X), X)
