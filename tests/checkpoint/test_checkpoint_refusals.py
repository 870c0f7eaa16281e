"""A checkpoint that does not fit, and calls that cannot be: one clear error, and the model is as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

import mutatis as mu
from mutatis import checkpoint
from mutatis.checkpoint.manifest import Manifest
from mutatis.errors import ArgumentError, CheckpointError, DeferredStateError

pytestmark = pytest.mark.once  # many alike; what JAX's versions differ in, the twins and traces of transforms show


def refused(path: Path, node: Any, *filters: Any, cast: bool = False) -> str:
    """What the error says, less its first and last line; the node has been left alone."""
    before = jax.tree.leaves(mu.state(node))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.restore(path, node, *filters, cast=cast)
    after = jax.tree.leaves(mu.state(node))
    assert len(before) == len(after) and all(a is b for a, b in zip(before, after, strict=True))
    problem, *rest, _ = str(caught.value).splitlines()
    assert problem == f"the checkpoint at `{path}` does not fit the model; nothing was restored"
    return "\n".join(line.strip() for line in rest)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "c"


@pytest.mark.parametrize(
    ("saved", "model", "message"),
    [
        (mu.Param(jnp.ones(3)), mu.Param(jnp.ones(4)), "v: expected float32[4], got float32[3]"),
        (mu.Param(jnp.ones(3)), mu.Param(jnp.ones(3, "int32")), "v: expected int32[3], got float32[3]"),
        (
            mu.Param(jnp.ones(3)),
            mu.BatchStat(jnp.ones(3)),
            "v: expected a BatchStat (batch_stats), got a Param (params)",
        ),
        (mu.Param([1, 2]), mu.Param((1, 2)), "v: expected tuple(int32[], int32[]), got list(int32[], int32[])"),
        (mu.Param({"a": 1}), mu.Param({"b": [1]}), "v: expected dict(b=list(int32[])), got dict(a=int32[])"),
        (mu.Param(1), mu.Param({"a": 1}), "v: expected dict(a=int32[]), got int32[]"),
        (
            mu.Param(jax.random.key(0)),
            mu.Param(jax.random.key(0, impl="rbg")),
            "v: expected key<rbg>[], got key<fry>[]",
        ),
        (mu.Param(jax.random.key(0)), mu.Param(jnp.zeros((2,), "uint32")), "v: expected uint32[2], got key<fry>[]"),
        (
            mu.Param(1.0),
            mu.Param(1.0, name="v"),
            "missing:    v (name 'v') (the checkpoint has v)\nunexpected: v",
        ),
    ],
)
def test_types(saved: Any, model: Any, message: str, path: Path) -> None:
    checkpoint.save(path, {"v": saved})
    assert refused(path, {"v": model}) == message


def test_cast_converts_numbers_only(path: Path) -> None:
    checkpoint.save(path, {"k": mu.Param(jax.random.key(0)), "w": mu.Param(1.5), "x": mu.Param(jnp.ones(2))})
    model = {"k": mu.Param(jnp.uint32(0)), "w": mu.Param(1), "x": mu.Param(jnp.ones(3, "int32"))}
    assert refused(path, model, cast=True) == (
        "k: expected uint32[], got key<fry>[]\nw: expected int32[], got float32[]\nx: expected int32[3], got float32[2]"
    )


@pytest.mark.parametrize(("value", "cast"), [(jnp.float16(1), True), (1, False), (jnp.ones(2), False)])
def test_the_cure_names_cast_where_it_helps(value: Any, cast: bool, path: Path) -> None:
    checkpoint.save(path, mu.Param(1.0))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.restore(path, mu.Param(value))
    assert ("`cast=True` converts dtypes." in str(caught.value)) == cast
    if cast:
        checkpoint.restore(path, mu.Param(value), cast=True)


def test_every_difference_is_listed(path: Path) -> None:
    checkpoint.save(path, {"kernel": mu.Param(1.0), "n": mu.Cache(0), "mean": mu.BatchStat(jnp.ones(2))})
    model = {"kernl": mu.Param(1.0), "n": mu.Cache(0.0), "mean": mu.BatchStat(jnp.ones(3)), "x": mu.Cache(1)}
    assert refused(path, model) == (
        "missing:    kernl (the checkpoint has kernel)\n"
        "missing:    x\n"
        "unexpected: kernel\n"
        "n: expected float32[], got int32[]\n"
        "mean: expected float32[3], got float32[2]"
    )


def test_ten_differences_are_shown_and_all_are_kept(path: Path) -> None:
    checkpoint.save(path, {})
    with pytest.raises(CheckpointError, match=r"missing: {4}\[9\]\n  and 3 more\n") as caught:
        checkpoint.restore(path, [mu.Param(1.0) for _ in range(13)])
    assert len(caught.value.differences) == 13


def test_states_that_the_filters_select_must_be_in_both(path: Path) -> None:
    checkpoint.save(path, {"w": mu.Param(1.0), "m": mu.OptState(2.0)})
    assert refused(path, {"w": mu.Param(1.0)}) == "unexpected: m"
    assert refused(path, {"w": mu.Param(1.0)}, mu.Param, mu.OptState) == "unexpected: m"
    assert refused(path, {"w": mu.Param(1.0), "b": mu.Param(1.0)}, mu.Param) == "missing:    b"


class Pair(NamedTuple):
    first: Any
    second: Any


@pytest.mark.parametrize(("value", "what"), [(Pair(1, 2), "Pair"), ({(1, 2): 3}, "(1, 2)")], ids=["container", "key"])
def test_what_only_code_can_make_is_not_restored_from_nothing(value: Any, what: str, path: Path) -> None:
    checkpoint.save(path, {"v": mu.Cache(value)})
    checkpoint.restore(path, {"v": mu.Cache(value)})
    deferred = mu.Cache(init=lambda: value)
    assert refused(path, {"v": deferred}) == f"v: has no value yet, and a {what} cannot be made from a file"
    assert deferred.deferred


def test_wide_dtypes_are_not_narrowed_in_silence(path: Path) -> None:
    with jax.enable_x64(True):
        checkpoint.save(path, {"v": mu.Cache(jnp.ones(2, "float64"))})
    assert refused(path, {"v": mu.Cache(jnp.ones(2))}) == "v: expected float32[2], got float64[2]"
    assert refused(path, {"v": mu.Cache(init=lambda: 0.0)}) == "v: float64 needs `jax_enable_x64`"
    cell = mu.Cache(jnp.zeros(2))
    checkpoint.restore(path, {"v": cell}, cast=True)
    assert cell.dtype == jnp.float32 and bool((cell == 1.0).all())


# -- calls that cannot be -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [lambda: mu.Cache(init=lambda: 0), lambda: mu.Cache(jax.ShapeDtypeStruct((), "int32"))]
)
def test_states_without_a_value_are_not_saved(make: Any, path: Path) -> None:
    model = {"w": mu.Param(1.0), "a": make(), "b": make()}
    with pytest.raises(DeferredStateError, match="states without a value cannot be saved\n  a\n  b\nCall the"):
        checkpoint.save(path, model)
    assert not path.exists()
    checkpoint.save(path, model, mu.Param)


@pytest.mark.parametrize("call", [checkpoint.save, checkpoint.restore])
def test_names_must_differ(call: Any, path: Path) -> None:
    checkpoint.save(path, {})
    with pytest.raises(CheckpointError, match=r"two states have the name 'w': \[0\] and \[1\]\n.*or none"):
        call(path, [mu.Param(1.0, name="w"), mu.Param(2.0, name="w")])


@pytest.mark.parametrize("transform", [mu.jit, jax.jit, jax.vmap, jax.grad], ids=["mu.jit", "jit", "vmap", "grad"])
@pytest.mark.parametrize("call", [checkpoint.save, checkpoint.restore])
def test_inside_a_transform(call: Any, transform: Any, path: Path) -> None:
    w = mu.Param(1.0)
    checkpoint.save(path, w)

    def f(x: Any) -> Any:
        call(path, w)
        return x.sum()

    with pytest.raises(CheckpointError, match=r"cannot be (saved|restored) while a function is traced"):
        transform(f)(jnp.ones(2))


@pytest.mark.parametrize("call", [checkpoint.save, checkpoint.restore])
def test_other_places(call: Any, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="`gs://bucket/c` is not a path of this machine"):
        call("gs://bucket/c", mu.Param(1.0))
    with pytest.raises(ArgumentError, match=r"1\.0 is not a node"):
        checkpoint.save(path, {})
        call(path, 1.0)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(CheckpointError, match="cannot talk to each other"):
        checkpoint.save(path, mu.Param(1.0))


# -- what is not a checkpoint, or one no more ---------------------------------------------------------------------


def files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


@pytest.fixture
def model() -> dict[str, Any]:
    return {"w": mu.Param(jnp.arange(1000.0)), "rngs": mu.Rngs(0)}


def check_damaged(path: Path, model: dict[str, Any], match: str) -> None:
    before = mu.state(model)
    with pytest.raises(CheckpointError, match=match):
        checkpoint.restore(path, model)
    assert mu.state(model) == before


@pytest.mark.parametrize("size", [lambda n: 0, lambda n: n // 2, lambda n: n - 1], ids=["empty", "half", "less one"])
def test_a_truncated_file(size: Any, path: Path, model: dict[str, Any]) -> None:
    checkpoint.save(path, model)
    assert len(files(path)) > 5
    for file in files(path):
        whole = file.read_bytes()
        file.write_bytes(whole[: size(len(whole))])
        short = file.name == "mutatis.json"
        check_damaged(path, model, "is damaged" if short else f"{file.name}: {len(whole)} bytes were written, ")
        file.write_bytes(whole)
    checkpoint.restore(path, model)


def test_a_missing_file(path: Path, model: dict[str, Any]) -> None:
    checkpoint.save(path, model)
    for file in files(path):
        whole = file.read_bytes()
        file.unlink()
        check_damaged(path, model, "no checkpoint" if file.name == "mutatis.json" else f"{file.name}: missing")
        file.write_bytes(whole)


def test_a_flipped_bit(path: Path, model: dict[str, Any]) -> None:
    checkpoint.save(path, model)
    for file in files(path):
        if file.name != "mutatis.json":
            whole = bytearray(file.read_bytes())
            whole[len(whole) // 2] ^= 1
            file.write_bytes(whole)
            check_damaged(path, model, f"{file.name}: its contents have changed")
            whole[len(whole) // 2] ^= 1
            file.write_bytes(whole)


def manifest(**changes: Any) -> Any:
    return lambda old: json.dumps({**json.loads(old), **changes})


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda old: "not JSON", "is damaged\n  got:      JSONDecodeError"),
        (lambda old: b"\xff\xfe\x00", "is damaged\n  got:      UnicodeDecodeError"),
        (lambda old: "[]", "is not the manifest of a checkpoint"),
        (lambda old: '{"step": 3}', "is not the manifest of a checkpoint"),
        (manifest(version=2), "has another format version\n  expected: 1\n  got:      2\nRestore it with the version"),
        (manifest(states=None), "is damaged\n  got:      contents that are not what was written"),
        (manifest(number=7), "is damaged\n  got:      contents that are not what was written"),
        (lambda old: old.replace('"array": 0', '"array": 1'), "is damaged\n  got:      contents that are not what was"),
    ],
)
def test_another_manifest(edit: Any, match: str, path: Path, model: dict[str, Any]) -> None:
    checkpoint.save(path, model)
    file = path / "mutatis.json"
    new = edit(file.read_text())
    file.write_bytes(new if isinstance(new, bytes) else new.encode())
    check_damaged(path, model, match)


@pytest.mark.parametrize("kind", ["nothing", "file", "folder"])
def test_a_foreign_path(kind: str, path: Path, model: dict[str, Any]) -> None:
    if kind == "file":
        path.write_text("precious")
    elif kind == "folder":
        path.mkdir()
        (path / "precious").write_text("precious")
    check_damaged(path, model, f"there is {'nothing' if kind == 'nothing' else 'no checkpoint of Mutatis'} at `{path}`")


def test_what_orbax_cannot_read(path: Path, model: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(path, model)
    monkeypatch.setattr(Manifest, "check_files", lambda *_, **options: None)
    for file in files(path / "arrays-1"):
        file.write_bytes(b"")
    check_damaged(path, model, r"the arrays at `.*arrays-1` cannot be read\n  got:      \w+Error: ")


def test_without_orbax(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r"pip install 'mutatis\[checkpoint\]'"):
        checkpoint.save(path, mu.Param(1.0))
    assert not path.exists()
