"""What all doors share: imports when they are used, kinds by collection, and what merely passed through."""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import mutatis as mu
from mutatis import errors
from mutatis.interop import bridge

PEERS = {"flax": ("linen", "nnx"), "equinox": ("equinox",), "haiku": ("haiku",)}


def test_other_libraries_are_imported_when_used() -> None:
    code = "import sys, mutatis as mu; dir(mu.interop); print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()).isdisjoint(PEERS)


@pytest.mark.parametrize(("package", "door"), [(package, door) for package, doors in PEERS.items() for door in doors])
def test_a_missing_package_says_how_to_get_it(package: str, door: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"mutatis.interop.{door}", raising=False)
    for name in (door, f"From{door.capitalize()}", f"To{door.capitalize()}"):
        monkeypatch.delitem(vars(mu.interop), door, raising=False)
        with pytest.raises(ImportError, match=rf"`(dm-)?{package}`, which is not installed\npip install") as caught:
            getattr(mu.interop, name)
        assert isinstance(caught.value, errors.MissingPackageError)


def test_names() -> None:
    assert set(dir(mu.interop)) == set(mu.interop.__all__)
    with pytest.raises(AttributeError, match="no attribute 'FromTorch'"):
        mu.interop.FromTorch


def test_kinds_by_collection() -> None:
    for kind in (mu.Param, mu.BatchStat, mu.Cache, mu.Hidden, mu.Buffer, mu.Intermediate):
        assert bridge.kind_of(kind.collection) is kind
    made = bridge.kind_of("my.own")
    assert made is bridge.kind_of("my.own") and made.collection == "my.own"
    assert bridge.kind_of("rngs") is not mu.RngState  # whose value is a stream
    cell = bridge.kind_of("spikes")(1.0)
    assert type(pickle.loads(pickle.dumps(cell))) is type(cell)
    with pytest.raises(errors.StateTypeError) as caught:
        cell[...] = 1
    assert "mu.spikes" not in str(caught.value)


def test_paths_as_names() -> None:
    assert bridge.named([("a", 0), ("b",)]) == {("a", 0): ("a", "0"), ("b",): ("b",)}
    with pytest.raises(errors.StructureError, match=r"`a\[1\]`"):
        bridge.named([("a", "1"), ("a", 1)])


def passing(a: Any, b: Any) -> Any:
    return a, b * 2


def scanned(a: Any, b: Any) -> Any:
    def body(carry: Any, x: Any) -> Any:
        return (carry[0], carry[1] + x + b), (x, x * 2)

    (a, b), (xs, ys) = jax.lax.scan(jax.checkpoint(body), (a, b), jnp.ones(3))
    return a, b + ys.sum() + xs.sum()


def sliced(a: Any, b: Any) -> Any:
    return jax.lax.scan(jax.checkpoint(lambda c, x: (c, (x[0], x[1] + c))), jnp.float32(1), (a, b))[1]


def swapped(a: Any, b: Any) -> Any:
    return b, a


@pytest.mark.parametrize(
    ("function", "through"),
    [
        (passing, {"a"}),
        (jax.jit(passing), {"a"}),
        (jax.checkpoint(passing), {"a"}),
        (jax.jit(jax.checkpoint(jax.jit(passing))), {"a"}),
        (scanned, {"a"}),
        (sliced, {"a"}),
        (jax.jit(swapped), set()),
        (lambda a, b: (a + 0, b), {"b"}),
        (lambda a, b: (jnp.float32(1), b), {"b"}),
    ],
)
@pytest.mark.parametrize("traced", [False, True])
def test_what_passes_through_is_no_write(function: Any, through: set[str], traced: bool) -> None:
    shape = (3,) if getattr(function, "__wrapped__", function) is sliced else ()
    cells = {name: mu.Param(jnp.full(shape, 2.0)) for name in ("a", "b")}
    for name in through:
        mu.freeze(cells[name])
    by_path = {(name,): cell for name, cell in cells.items()}

    def pure(values: Any) -> Any:
        return None, dict(zip(by_path, function(*values.values()), strict=True))

    def run() -> None:
        bridge.call(by_path, pure, evaluate=False)

    (mu.jit(run) if traced else run)()
    mu.freeze(cells["a"]), mu.freeze(cells["b"])
    if len(through) < 2:
        with pytest.raises(errors.FrozenStateError):
            (mu.jit(run) if traced else run)()
