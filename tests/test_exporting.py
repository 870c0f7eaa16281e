"""`mu.export` and `mu.load_program`: the program goes on as the model would, without its source; what is none is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import nn
from mutatis.errors import ArgumentError, CheckpointError, StructureError

DATA = Path(__file__).parent / "data" / "exported"


class Own(mu.Cache):
    """A kind that who loads the program does not have."""


class Net(mu.Module):
    def __init__(self) -> None:
        rngs = mu.Rngs(0)
        self.one, self.norm = nn.Linear(3, 4, rngs=rngs), nn.BatchNorm(4, rngs=rngs)
        self.dropout = nn.Dropout(0.5, rngs=rngs)
        self.kept = Own({"a": jnp.zeros(4, jnp.bfloat16), "n": (jnp.int32(0),)})
        self.empty = mu.Variable(jnp.zeros((0, 2)))

    def __call__(self, x: jax.Array) -> jax.Array:
        kept = self.kept.value
        self.kept.value = {"a": kept["a"] + 1, "n": (kept["n"][0] + 1,)}
        return self.dropout(self.norm(self.one(x)))


def step(net: Net, count: Any, x: dict[str, jax.Array]) -> dict[str, Any]:
    count.value += 1
    return {"y": net(x["x"]), "count": count.value}


def test_it_goes_on_as_the_model_would(tmp_path: Path) -> None:
    net, count, x = Net(), mu.Variable(0), {"x": jnp.arange(6.0).reshape(2, 3)}
    step(net, count, x)
    mu.export(mu.jit(step), (net, count), x, path=tmp_path / "step.mu")
    program = mu.load_program(tmp_path / "step.mu")
    assert program.platforms == ("cpu",)
    for _ in range(3):
        wanted, found = step(net, count, x), program(x)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), wanted, found)
    old = mu.state([net, count])
    new = program.state
    assert list(new) == list(old)
    for path, value in old.items():
        a, b = jax.tree.leaves(value), jax.tree.leaves(new[path])
        for left, right in zip(a, b, strict=True):
            assert left.dtype == right.dtype and left.shape == right.shape
            numbers = [
                jax.random.key_data(k) if jnp.issubdtype(k.dtype, jax.dtypes.prng_key) else k for k in (left, right)
            ]
            np.testing.assert_allclose(*[np.asarray(n, np.float64) for n in numbers], rtol=1e-6)
    assert new.kinds()[0, "norm", "mean"] is mu.BatchStat and new.kinds()[0, "kept"] is mu.Variable
    mu.checkpoint.save(tmp_path / "saved", program)
    other = mu.load_program(tmp_path / "step.mu")
    mu.checkpoint.restore(tmp_path / "saved", other)
    assert int(other(x)["count"]) == 5
    other.state = program.state
    np.testing.assert_array_equal(other(x)["y"], program(x)["y"])
    assert mu.inspect.explain(program._step).compilations and len(mu.inspect.explain(program._step).compilations) == 1


def test_states_are_donated_and_handed_out_safely(tmp_path: Path) -> None:
    w = mu.Param(jnp.zeros(8))
    mu.export(lambda w: w.set(w.value + 1), w, path=tmp_path / "p")
    program = mu.load_program(tmp_path / "p")
    program()
    kept = program.state[()]
    program()
    np.testing.assert_array_equal(kept, jnp.ones(8))
    np.testing.assert_array_equal(program.state[()], jnp.full(8, 2.0))


def test_a_batch_of_any_size(tmp_path: Path) -> None:
    net = nn.Linear(3, 2, rngs=mu.Rngs(0))
    (size,) = jax.export.symbolic_shape("b")
    mu.export(lambda net, x: net(x), net, jax.ShapeDtypeStruct((size, 3), jnp.float32), path=tmp_path / "p")
    program = mu.load_program(tmp_path / "p")
    for count in (1, 5):
        np.testing.assert_allclose(program(jnp.ones((count, 3))), net(jnp.ones((count, 3))), rtol=1e-6)


def test_another_program_runs_it_without_the_source(tmp_path: Path) -> None:
    net = Net()
    mu.export(lambda net, x: net(x), net.eval(), jnp.ones((2, 3)), path=tmp_path / "p")
    code = "import sys, jax.numpy as jnp, mutatis as mu\nprint(mu.load_program(sys.argv[1])(jnp.ones((2, 3))).sum())"
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path / "p")], check=True, capture_output=True, text=True)
    assert float(out.stdout) == pytest.approx(float(net(jnp.ones((2, 3))).sum()), rel=1e-5)


def test_a_program_of_earlier() -> None:
    """Written by JAX 0.10 with the first version of this format (`tests/data/exported/make.py`)."""
    program = mu.load_program(DATA / "count.mu")
    assert program(jnp.arange(3.0)).tolist() == [0.0, 2.0, 4.0] and int(program.state["n"]) == 2


def test_refused(tmp_path: Path) -> None:
    w = mu.Param(jnp.ones(3))
    mu.export(lambda w, x: w.value + x, w, jnp.ones(3), path=tmp_path / "p")
    content = (tmp_path / "p").read_bytes()
    flipped = content[:90] + bytes([content[90] ^ 255]) + content[91:]
    for name, change in {"cut": content[:-30], "none": b"", "text": b"hello", "flipped": flipped}.items():
        (tmp_path / name).write_bytes(change)
        with pytest.raises(CheckpointError, match="not a program that can be read"):
            mu.load_program(tmp_path / name)
    with pytest.raises(CheckpointError, match="there is no program"):
        mu.load_program(tmp_path / "nothing")

    def edited(**new: Any) -> Path:
        with zipfile.ZipFile(tmp_path / "p") as old, zipfile.ZipFile(tmp_path / "edited", "w") as file:
            for name in old.namelist():
                data = old.read(name)
                file.writestr(name, json.dumps({**json.loads(data), **new}) if name == "program.json" else data)
        return tmp_path / "edited"

    for new, text in [
        ({"version": 9}, "later version"),
        ({"format": "other"}, "not a program"),
        ({"arrays": [{"shape": [1 << 40], "dtype": "float32", "impl": None}]}, "another size"),
        ({"arrays": []}, "not a program"),
        ({"states": [{"path": ["w"], "kind": "os:system", "value": {"leaves": 7}}]}, "not a program"),
    ]:
        with pytest.raises(CheckpointError, match=text):
            mu.load_program(edited(**new))
    mu.export(lambda w, x: w.value + x, w, jnp.ones(3), path=tmp_path / "tpu", platforms=["tpu"])
    with pytest.raises(CheckpointError, match=r"(?s)another platform.*for cpu.*for tpu"):
        mu.load_program(tmp_path / "tpu")
    with pytest.raises(ArgumentError, match="the path is none"):
        mu.export(lambda w: w.value, w, path=3)  # type: ignore[arg-type]
    with pytest.raises(StructureError):
        mu.export(
            lambda net: setattr(net, "kernel", mu.Param(1.0)), nn.Linear(2, 2, rngs=mu.Rngs(0)), path=tmp_path / "q"
        )
    assert sorted(p.name for p in tmp_path.iterdir() if "unfinished" in p.name or p.name == "q") == []


def test_a_model_is_exported_as_it_is_called(tmp_path: Path) -> None:
    class Net(mu.Module):
        def __init__(self) -> None:
            self.linear = mu.nn.Linear(2, 3, rngs=mu.Rngs(0))
            self.calls = mu.Variable(0)

        def __call__(self, x: jax.Array, scale: jax.Array) -> jax.Array:
            self.calls += 1
            return self.linear(x) * scale

    net, x = Net(), jnp.ones((4, 2))
    mu.export(net, x, jnp.float32(2.0), path=tmp_path / "net.mu")
    program = mu.load_program(tmp_path / "net.mu")
    np.testing.assert_allclose(program(x, jnp.float32(2.0)), net(x, jnp.float32(2.0)), rtol=1e-6)
    assert int(program.state["calls"]) == 1
    mu.export(lambda net, x: net(x, 1.0), net, x, path=tmp_path / "named.mu")
    np.testing.assert_allclose(mu.load_program(tmp_path / "named.mu")(x), net(x, 1.0), rtol=1e-6)


def test_states_start_anew_as_in_the_model(tmp_path: Path) -> None:
    class Stream(mu.Module):
        def __init__(self) -> None:
            self.attention = nn.MultiHeadAttention(2, 4, rngs=mu.Rngs(0))
            self.attention.init_cache((1, 8, 4))
            self.cell = nn.GRUCell(4, 4, rngs=mu.Rngs(1))
            self.norm = nn.BatchNorm(4)
            self.noise = mu.Variable(
                {"a": jnp.arange(3.0), "n": jnp.int32(2)}, init=lambda: {"a": jnp.arange(3.0), "n": jnp.int32(2)}
            )
            self.plain = mu.Variable(1.0)

        def __call__(self, x: jax.Array) -> jax.Array:
            self.noise.value = jax.tree.map(lambda x: x * 2, self.noise.value)
            self.plain += 1
            return self.norm(self.cell(self.attention(x, decode=True)[:, 0]))

    model = Stream()
    x = jnp.arange(4.0).reshape(1, 1, 4) / 4
    model(x)
    mu.export(model, x, path=tmp_path / "stream.mu")
    program = mu.load_program(tmp_path / "stream.mu")
    with zipfile.ZipFile(tmp_path / "stream.mu") as file:
        sizes = [info.file_size for info in file.infolist() if info.filename.startswith("arrays/")]
    assert sizes.count(8 * 2 * 2 * 4) == 2, "an empty cache takes no room beside the present one"
    for filter, batch in ((mu.Cache, ()), (mu.Hidden, 1), (mu.BatchStat, ()), (mu.PathContains("noise"), ())):
        program(x)
        model(x)
        mu.reset(program, filter, batch_shape=batch)
        mu.reset(model, filter, batch_shape=batch)
        for path, value in mu.state(model).items():
            jax.tree.map(np.testing.assert_allclose, program.state[path], value)
        np.testing.assert_allclose(program(x), model(x), rtol=1e-5)
    with pytest.raises(mu.errors.FilterError, match="nothing says how it starts"):
        mu.reset(program, mu.Param)
