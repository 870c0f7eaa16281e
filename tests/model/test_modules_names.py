"""Attributes of any name: nothing that a user's class calls its own breaks a module."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import errors
from mutatis.model import behind
from mutatis.model import modules as internals
from mutatis.model.elsewhere import Elsewhere

pytestmark = pytest.mark.once  # nothing here depends on the version of JAX

X = jnp.arange(3.0)
# What Python itself uses, and `training`, whose meaning is Mutatis' own.
TAKEN = {"__class__", "__dict__", "training"}
NAMES = sorted(
    {
        *(name for name in dir(mu.Module) if not name.startswith("__")),
        *(name for name in dir(internals) if not name.startswith("__")),
        *(name for name in dir(mu.Optimizer) if not name.startswith("__")),
        *(name for name in dir(mu.Param) if not name.startswith("__")),
        *(
            "mode",
            "_mode",
            "_watched",
            "_bindings",
            "_described",
            "_birth",
            "_references_",
            "_searched_",
            "_cells",
            "_fields",
        ),
        *(
            "__wrapped__",
            "__jax_array__",
            "__array__",
            "__iter__",
            "__len__",
            "__name__",
            "__qualname__",
            "__module__",
            "__code__",
        ),
        *(
            "birth",
            "bindings",
            "described",
            "kept",
            "watch",
            "shape",
            "dtype",
            "aval",
            "func",
            "remake",
            "parts",
            "rules",
        ),
        *(
            "self",
            "cls",
            "value",
            "values",
            "keys",
            "items",
            "get",
            "name",
            "path",
            "key",
            "fwd",
            "bwd",
            "jvp",
            "lower",
        ),
        *(
            "_flatten",
            "tree_flatten",
            "tree_unflatten",
            "__dataclass_fields__",
            "__annotations__",
            "__deepcopy_",
            "_abc_impl",
        ),
        *(
            "method",
            "state",
            "params",
            "apply",
            "init",
            "setup",
            "call",
            "forward",
            "__func__",
            "__self__",
            "über",
            "λ",
        ),
    }
    - TAKEN
)


def body(net: Any, x: Any) -> Any:
    net.n.value = net.n.value + 1
    return net.w.value * x


def use(net: Any) -> None:
    """A little of everything."""
    step = mu.jit(body)
    for _ in range(2):
        np.testing.assert_array_equal(step(net, X), 2 * X)
    assert int(net.n) == 2
    np.testing.assert_array_equal(mu.grad(lambda net: body(net, X).sum())(net)[("w",)], 3)
    np.testing.assert_array_equal(mu.vmap(lambda x: body(net, x))(X), 2 * X)
    mu.for_loop(lambda x: body(net, x), X)
    assert int(net.n) == 7
    outer = mu.Module()
    outer.inner = [net]
    outer.eval()
    assert internals.is_training(net) is False
    outer.train()
    assert internals.is_training(net) is True
    state = mu.state(net, mu.Param)
    mu.update(net, state)
    assert len(mu.modules(outer)) == 2
    with mu.freeze(net):
        assert net.w.frozen
    snapshot = mu.snapshot(net)
    net.n.value = jnp.int32(0)
    snapshot.restore()
    assert int(net.n) == 7
    assert "w=Param(float32[])" in repr(net)
    view = mu.view(outer, training=False).inner[0]
    assert view.w is net.w
    for other in (mu.clone(net), copy.deepcopy(net), jax.tree.map(lambda x: x, net)):
        assert type(other) is type(net)
        assert float(other.w) == 2
        assert other.__dict__.keys() == net.__dict__.keys()
    assert hash(mu.graphdef(net)) == hash(mu.graphdef(mu.clone(net)))
    assert mu.graphdef(net) == mu.graphdef(mu.clone(net))


class Plain(mu.Module):
    def __init__(self) -> None:
        self.w = mu.Param(jnp.float32(2.0))
        self.n = mu.Variable(0)


OF_CLASSES = {"__name__", "__qualname__", "__module__", "__annotations__", "__doc__"}  # which hold no arrays
OWN = [name for name in NAMES if name not in ("w", "n")]


@pytest.mark.parametrize("name", OWN)
def test_an_attribute(name: str) -> None:
    class Net(Plain):
        pass

    net = Net()
    for value in ("text", 3, None):
        setattr(net, name, value)
        assert getattr(net, name) == value
    assert getattr(mu.clone(net), name) is None
    delattr(net, name)
    if name in OF_CLASSES:
        with pytest.raises(errors.StructureError, match="Python uses the name for the class"):
            setattr(net, name, jnp.ones(2))
        return
    setattr(net, name, jnp.ones(2))  # a Buffer behind it
    np.testing.assert_array_equal(getattr(net, name), [1, 1])
    assert len(mu.state(net, mu.Buffer)) == 1
    setattr(net, name, 2 * getattr(net, name))
    np.testing.assert_array_equal(getattr(copy.deepcopy(net), name), [2, 2])
    delattr(net, name)
    setattr(net, name, [mu.Cache(1.0), Plain()])
    assert len(mu.variables(net)) == 5
    assert len(mu.variables(Net())) == 2


@pytest.mark.parametrize("value", ["text", 3, None, jnp.ones(2), mu.static({})], ids=lambda value: type(value).__name__)
def test_attributes_of_all_names_at_once(value: Any) -> None:
    class Net(Plain):
        pass

    net = Net()
    for name in OWN:
        if name not in OF_CLASSES:
            setattr(net, name, value)
    use(net)
    if isinstance(value, jax.Array):
        np.testing.assert_array_equal(mu.jit(lambda net: net.mode)(net), [1, 1])
    use(Net())


@pytest.mark.parametrize("kind", ["method", "property", "static", "class attribute"])
def test_names_of_the_class(kind: str) -> None:
    own = {
        "method": lambda self: 5,
        "property": property(lambda self: 5),
        "static": staticmethod(lambda: 5),
        "class attribute": 5,
    }[kind]
    names = [name for name in OWN if name.isidentifier() and not name.startswith("__")]
    net = type("Net", (Plain,), dict.fromkeys(names, own))()
    use(net)
    for name in names:
        assert (getattr(net, name)() if kind in ("method", "static") else getattr(net, name)) == 5


PICKLED = "_watched"


class Pickled(Plain):
    def __init__(self) -> None:
        super().__init__()
        setattr(self, PICKLED, jnp.ones(2))
        self.train = "a"


def test_pickle() -> None:
    other = pickle.loads(pickle.dumps(Pickled()))
    assert other.train == "a"
    np.testing.assert_array_equal(getattr(other, PICKLED), [1, 1])


def test_an_array_under_the_name_of_a_method_leaves_other_objects_their_method() -> None:
    class Net(Plain):
        def scale(self) -> Any:
            return 2 * self.w.value

    one, other = Net(), Net()
    one.scale = jnp.ones(2)
    assert float(other.scale()) == 4
    assert float(Net.scale(other)) == 4
    one.eval = jnp.ones(2)
    assert other.eval() is other
    del one.scale
    assert float(one.scale()) == 4


def test_a_module_has_no_other_public_names() -> None:
    public = [name for name in dir(mu.Module()) if not name.startswith("__")]
    # Arrays in attributes of a bare `mu.Module()`, which other tests make, leave descriptors in the class.
    others = (behind._Behind, Elsewhere)
    own = [name for name in public if not isinstance(inspect.getattr_static(mu.Module, name), others)]
    assert own == ["_repr_mimebundle_", "eval", "train", "training"], "the first is what notebooks ask for"


# -- training ------------------------------------------------------------------------------------------------------


def test_training_is_a_flag() -> None:
    net = Plain()
    assert net.training is True
    definition = mu.graphdef(net)
    assert net.eval() is net
    assert net.training is False
    assert mu.graphdef(net) != definition
    net.training = np.True_
    assert net.training is True
    assert mu.graphdef(net) == definition, "there is one form for each value"
    assert "training" not in net.__dict__


@pytest.mark.parametrize("value", ["train", None, 1, jnp.array(True), mu.Variable(True)])
def test_training_is_nothing_else(value: Any) -> None:
    with pytest.raises(errors.StructureError, match=r"`Plain\.training` cannot be"):
        Plain().training = value


def test_toggling_compiles_twice_in_all() -> None:
    traces = []

    @mu.jit
    def step(net: Plain) -> Any:
        traces.append(net.training)
        return jnp.float32(net.training)

    net = Plain()
    for _ in range(4):
        assert float(step(net.train())) == 1
        assert float(step(net.eval())) == 0
    assert traces == [True, False]


def test_a_class_may_start_in_evaluation() -> None:
    class Frozen(Plain):
        training = False

    net = Frozen()
    assert not net.training
    net.train()
    assert net.training
    net.eval()
    assert "training" not in net.__dict__
    use(net.train())


def test_training_of_the_users_own() -> None:
    class Own(Plain):
        def training(self) -> str:  # type: ignore[override]
            return "mine"

    net = mu.Module()
    net.parts = [Own(), Plain()]
    net.eval()
    assert net.parts[0].training() == "mine"
    assert net.parts[1].training is False


def test_training_in_a_transform_that_fails_is_undone() -> None:
    net = Plain()

    def step(net: Plain) -> None:
        net.eval()
        raise KeyError

    for transform in (mu.jit, mu.grad, mu.remat):
        with pytest.raises(KeyError):
            transform(step)(net)
        assert net.training is True
    mu.jit(lambda net: net.eval() and None)(net)
    assert net.training is False
