"""Where public objects say that they are, and files of the time when each said in which file it was defined.

`tests/data/written_before_folders` was written before the package had folders: pickles, a checkpoint, and an exported program.
"""

from __future__ import annotations

import importlib
import inspect
import pickle
import pickletools
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import checkpoint, errors, nn
from tests.whole.test_public import public_modules, public_names

pytestmark = pytest.mark.once

WRITTEN = Path(__file__).parents[1] / "data" / "written_before_folders"
HOMES = [*public_modules(), importlib.import_module("mutatis.interop")]

# What has no public name of its own: the values of attributes in a GraphDef.
NAMELESS = {"mutatis.core.statics.Static"}


def pickled_things() -> dict[str, Any]:
    things: dict[str, Any] = pickle.loads((WRITTEN / "things.pickle").read_bytes())
    return things


def found(module: Any, name: str) -> Any:
    """What a module has by this name; None for a door to a library that is not installed."""
    try:
        return getattr(module, name)
    except ImportError:
        return None


def homes() -> list[Any]:
    return [
        pytest.param(module, name, id=f"{module.__name__}.{name}")
        for module in HOMES
        for name in public_names(module)
        if inspect.isclass(value := found(module, name)) or inspect.isroutine(value)
    ]


@pytest.mark.parametrize(("module", "name"), homes())
def test_public_objects_say_where_users_find_them(module: Any, name: str) -> None:
    obj = getattr(module, name)
    assert obj.__module__ in {home.__name__ for home in HOMES}
    assert getattr(importlib.import_module(obj.__module__), obj.__qualname__) is obj


@pytest.mark.parametrize(("module", "name"), homes())
def test_annotations_can_be_read(module: Any, name: str) -> None:
    """Those of an object, of the methods of a class, and of a subclass, which is in another file."""
    obj = getattr(module, name)
    hints = typing.get_type_hints(obj)
    assert hints.keys() == {key for cls in getattr(obj, "__mro__", [obj]) for key in inspect.get_annotations(cls)}
    if inspect.isclass(obj):
        for method in vars(obj).values():
            if inspect.isfunction(method):
                typing.get_type_hints(method)


def test_annotations_of_a_subclass_can_be_read() -> None:
    class Net(mu.Module):
        weight: mu.Param
        layers: list[nn.Linear]

    class Deeper(nn.BatchNorm):
        depth: int

    own = typing.get_type_hints(mu.Module)
    assert typing.get_type_hints(Net) == own | {"weight": mu.Param, "layers": list[nn.Linear]}
    assert typing.get_type_hints(Deeper)["depth"] is int


def named_in(data: bytes) -> set[str]:
    """The classes and functions of ours that a pickle names. Of protocol 2, which names each in one piece."""
    names = {argument.replace(" ", ".") for code, argument, _ in pickletools.genops(data) if code.name == "GLOBAL"}
    return {name for name in names if name.startswith("mutatis.")}


def test_pickles_name_no_file() -> None:
    public = {module.__name__ for module in HOMES}
    things = pickled_things() | {
        "marks": (mu.Carry, mu.Shared),
        "axes": mu.StateAxes({mu.Param: 0, ...: mu.Carry}),
        "rngs": mu.Rngs(0, dropout=1),
        "ensemble": mu.vmap(nn.Linear(2, 3, rngs=mu.Rngs(0)), in_axes=0),
        "state of shapes": mu.eval_shape(lambda: mu.state(nn.Linear(2, 3, rngs=mu.Rngs(0)))),
        "filters": [mu.WithTag("a"), mu.PathContains("b"), mu.Not(mu.Param), mu.Everything(), mu.Nothing()],
        "errors": [error("a state is wrong") for error in errors.MutatisError.__subclasses__()],
    }
    for name, thing in things.items():
        named = named_in(pickle.dumps(thing, protocol=2))
        assert {full for full in named - NAMELESS if full.rpartition(".")[0] not in public} == set(), name
    assert "mutatis.nn.Linear" in named_in(pickle.dumps(things["net"], protocol=2))  # names are seen


def test_former_pickles_are_read() -> None:
    things = pickled_things()
    net = things["net"]
    assert [type(layer) for layer in net.layers] == [nn.Linear, nn.BatchNorm, nn.Dropout]
    assert net.table.shape == (4,) and type(mu.variables(net)[("table",)]) is mu.Buffer
    assert net.count.value == 3 and net.count.tag == "steps" and net.options == {"a": 1}
    cells = mu.variables(net)
    assert things["state"].flat().keys() == cells.keys()
    for path, value in things["state"].flat().items():
        for leaf, other in zip(jax.tree.leaves(value), jax.tree.leaves(cells[path].value), strict=True):
            assert (leaf == other).all(), path
    assert not (net.keys() == net.keys()).all()
    x = jnp.ones((4, 2))
    layer = net.layers[0]
    np.testing.assert_allclose(layer(x), x @ layer.kernel.value + layer.bias.value[None])
    assert net.inner(jnp.ones((4, 3))).shape == (4, 3)

    assert things["graphdef"] == mu.graphdef(nn.Linear(2, 3, rngs=mu.Rngs(0)))
    assert hash(things["graphdef"]) == hash(mu.graphdef(layer))
    rebuilt = mu.merge(things["graphdef"], mu.state(layer))
    np.testing.assert_array_equal(rebuilt(x), layer(x))
    assert things["cell"].value == 2.0 and things["cell"].name == "w" and type(things["cell"]) is mu.Param
    assert things["filter"] == mu.All(mu.Param, mu.Not(mu.WithTag("tag")), mu.Any(mu.PathContains("a")))
    assert things["axes"] == mu.StateAxes({mu.Param: None, ...: mu.Carry})
    assert things["sharding"] == mu.StateSharding({...: jax.sharding.PartitionSpec("x")})
    assert isinstance(things["error"], errors.StateTypeError) and things["error"].path == "w"
    assert things["metric"].compute() is not None and things["metric"].argname == "values"


def test_former_checkpoints_are_restored() -> None:
    net = pickled_things()["net"]
    expected = {path: jax.tree.leaves(value) for path, value in mu.state(net).flat().items()}
    mu.update(net, jax.tree.map(jnp.zeros_like, mu.state(net, mu.Not(mu.RngState))))
    checkpoint.restore(WRITTEN / "checkpoint", net)
    for path, value in mu.state(net).flat().items():
        for leaf, other in zip(jax.tree.leaves(value), expected[path], strict=True):
            assert (leaf == other).all(), path
    assert net.count.value == 3


def test_former_programs_are_read() -> None:
    """A `State` goes in and comes out of a program that JAX 0.10 exported."""
    exported = jax.export.deserialize(bytearray((WRITTEN / "exported.bin").read_bytes()))
    state = mu.state(nn.Linear(2, 3, rngs=mu.Rngs(0)), mu.Param)
    assert exported.in_tree == jax.tree.structure(((state,), {}))
    if jax.default_backend() not in exported.platforms:
        pytest.skip(f"the program is for {', '.join(exported.platforms)}")
    twice = exported.call(state)
    assert type(twice) is mu.State
    for path, value in twice.flat().items():
        np.testing.assert_array_equal(value, 2 * state[path])


# As statements, by name, and after such a pickle was read in C and in Python.
IMPORTS = f"""
import importlib, pathlib, pickle
import mutatis as mu

def fails(program):
    try:
        exec(program)
    except ModuleNotFoundError as error:
        return error.name
for name in ("mutatis.state", "mutatis.variables", "mutatis.modules", "mutatis.lifting"):
    for program in ("import {{}}", "from {{}} import State", "importlib.import_module('{{}}')"):
        assert fails(program.format(name)) == name, (name, program)
for load in (pickle.loads, pickle._loads):
    assert load(pathlib.Path({str(WRITTEN)!r}, "things.pickle").read_bytes())["net"].count.value == 3
for function in mu.state, mu.variables, mu.modules:
    function(mu.Module())
"""


def test_former_modules_are_for_pickle_only() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
