"""`mutatis.interop.files` and `torch_files`: what is read from files of other programs, and what is refused about bad ones."""

from __future__ import annotations

import io
import json
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import errors, interop, nn

pytestmark = pytest.mark.once

DATA = Path(__file__).parents[1] / "data" / "weights"


def assert_same(a: Any, b: Any) -> None:
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        np.testing.assert_array_equal(np.asarray(a[name], np.float64), np.asarray(b[name], np.float64))


def refused(path: Path, *words: str) -> errors.CheckpointError:
    """What is said about a file that cannot be read: by `read`, and by `load`, which leaves the model as it was."""
    model = nn.Linear(2, 2, rngs=mu.Rngs(0))
    before = mu.state(model)
    with pytest.raises(errors.CheckpointError) as caught:
        interop.load(model, path)
    assert mu.state(model) == before
    with pytest.raises(errors.CheckpointError) as again:
        interop.read(path)
    assert str(again.value) == str(caught.value) and caught.value.cure
    for word in words:
        assert word in str(caught.value)
    return caught.value


# -- torch ---------------------------------------------------------------------------------------------------------


def test_both_formats_of_torch_hold_the_same() -> None:
    assert_same(interop.read(DATA / "net.pt"), interop.read(DATA / "legacy.pt"))


def test_tensors_of_torch() -> None:
    weights = interop.read(DATA / "dtypes.pt")
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    expected = {
        "turned": base.T[1:, ::2],
        "shared": base[2],
        "parameter": np.ones(2, np.float32),
        "bfloat16": np.array([1.5, -2.0], jnp.bfloat16),
        "float16": np.array([0.5], np.float16),
        "int64": np.array(2**40),
        "bool": np.array([True, False]),
        "empty": np.zeros((0, 3), np.float32),
    }
    expected = {f"state_dict.{name}": array for name, array in expected.items()} | {"history.0": np.ones(1, np.float32)}
    assert_same(weights, expected)
    assert weights.metadata == {"epoch": 3, "history.1": 0.5, "name": "net"}


class Malicious:
    """Its pickle calls what it is given."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.called = function, args

    def __reduce__(self) -> Any:
        return self.called


def touch(path: str) -> None:
    Path(path).touch()


def as_archive(data: bytes, **more: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", data)
        for name, content in more.items():
            archive.writestr(f"a/data/{name}", content)
    return file.getvalue()


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize(
    "made",
    [
        lambda mark: Malicious(touch, mark),
        lambda mark: {"w": Malicious(exec, f"open({mark!r}, 'w')")},
        lambda mark: [Malicious(getattr, [], "append"), mark],
        lambda mark: jax.ShapeDtypeStruct((2,), jnp.float32),
    ],
)
def test_no_code_of_a_pickle_runs(made: Any, archive: bool, tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "net.pth"
    data = pickle.dumps(made(str(mark)))
    path.write_bytes(as_archive(data) if archive else data)
    loaded = set(sys.modules)
    assert refused(path, "is not plain data", "no code of it was run").path == str(path)
    assert not mark.exists() and not {name for name in set(sys.modules) - loaded if name.startswith("torch")}


def test_a_pickled_module_is_refused() -> None:
    refused(DATA / "module.pt", "it holds a `torch.nn.modules.linear.Linear`", "torch.save(model.state_dict(), path)")


def test_a_pickle_of_plain_data_is_not_of_torch(tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"a": 1}))
    refused(tmp_path / "x.pkl", "not one that `torch.save` wrote")


def tensor_archive(offset: int, shape: tuple[int, ...], strides: tuple[int, ...], size: int = 4) -> bytes:
    """A file with one tensor over four numbers."""

    class Rebuilt:
        def __reduce__(self) -> Any:
            return _rebuild_tensor_v2, (stored, offset, shape, strides, False, {})

    stored = FloatStorage()

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", FloatStorage, "0", "cpu", size) if obj is stored else None

    file = io.BytesIO()
    Pickler(file, 2).dump({"w": Rebuilt()})
    # In place of the stand-ins, the names that torch has for them.
    data = file.getvalue().replace(f"c{__name__}\n_rebuild".encode(), b"ctorch._utils\n_rebuild")
    data = data.replace(f"c{__name__}\nFloat".encode(), b"ctorch\nFloat")
    return as_archive(data, **{"0": np.arange(4, dtype=np.float32).tobytes()})


class FloatStorage:
    """Stands for the class of torch."""


def _rebuild_tensor_v2(*_: Any) -> None:
    """Stands for the function of torch."""


@pytest.fixture
def own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or _this_module())


def _this_module() -> Any:
    module = type(sys)(__name__)
    module.__dict__.update(globals())
    return module


@pytest.mark.usefixtures("own_name")
def test_tensors_stay_within_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    path.write_bytes(tensor_archive(0, (2, 2), (1, 2)))
    assert interop.read(path)["w"].tolist() == [[0.0, 2.0], [1.0, 3.0]]
    for bad in [
        (1, (2, 2), (1, 2)),
        (0, (9,), (1,)),
        (0, (2,), (10**12,)),
        (3, (2,), (-1,)),
        (-1, (2,), (1,)),
        (0, (2,), ()),
    ]:
        path.write_bytes(tensor_archive(*bad))
        refused(path, "damaged, or ends too early")
    path.write_bytes(tensor_archive(0, (8,), (1,), size=8))
    refused(path, "damaged, or ends too early")


# -- damage --------------------------------------------------------------------------------------------------------


def write_gguf(path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    x = np.linspace(-1, 1, 256, dtype=np.float32).reshape(4, 64)
    q8 = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("blk.0.q", gguf.quants.quantize(x, q8), raw_dtype=q8)
    writer.add_tensor("norm", x[0])
    writer.add_tensor("half", x.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_orbax(path: Path) -> None:
    orbax = pytest.importorskip("orbax.checkpoint")
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, {"w": jnp.ones(3), "layers": {"0": {"kernel": {"value": jnp.zeros((2, 2))}}}})


def test_gguf(tmp_path: Path) -> None:
    write_gguf(tmp_path / "net.gguf")
    weights = interop.read(tmp_path / "net.gguf")
    x = np.linspace(-1, 1, 256).reshape(4, 64)
    assert [(name, str(array.dtype), array.shape) for name, array in weights.items()] == [
        ("blk.0.q", "float32", (4, 64)),
        ("norm", "float32", (64,)),
        ("half", "float16", (4, 64)),
    ]
    np.testing.assert_allclose(weights["blk.0.q"], x, atol=5e-3)
    assert weights.metadata["llama.block_count"] == 2 and weights.metadata["tokenizer.ggml.tokens"] == ["a", "b"]


def test_an_unknown_type_of_gguf(tmp_path: Path) -> None:
    path = tmp_path / "net.gguf"
    write_gguf(path)
    data = path.read_bytes()
    at = data.index(b"blk.0.q") + len("blk.0.q") + 4 + 2 * 8
    path.write_bytes(data[:at] + (99).to_bytes(4, "little") + data[at + 4 :])
    refused(path, "of a type that is not known here", "99", "another quantization")


WRITERS = {
    "net.safetensors": lambda path: interop.save(path, nn.Linear(8, 8, rngs=mu.Rngs(0))),
    "net.gguf": write_gguf,
    "net.pt": lambda path: path.write_bytes((DATA / "net.pt").read_bytes()),
    "legacy.pt": lambda path: path.write_bytes((DATA / "legacy.pt").read_bytes()),
}


@pytest.mark.parametrize("name", WRITERS)
def test_truncated_files(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    data = path.read_bytes()
    for kept in (12, 40, len(data) // 3, len(data) // 2, len(data) - 70):
        path.write_bytes(data[:kept])
        refused(path, "damaged, or ends too early", "Fetch the file anew")


def test_files_that_are_none(tmp_path: Path) -> None:
    refused(tmp_path / "absent.safetensors", "there is no file")
    for content in (b"", b"hello, world, this is a text"):
        (tmp_path / "x.bin").write_bytes(content)
        refused(tmp_path / "x.bin", "unknown format", "safetensors, GGUF")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "not one checkpoint of Orbax")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("readme", b"")
    refused(tmp_path / "x.zip", "cannot be read as what `torch.save` wrote")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", ("Git LFS", "git lfs pull")),
        (b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'}", ("one array of NumPy", "numpy.load")),
        (b"\x89HDF\r\n\x1a\n" + bytes(20), ("HDF5", "h5py")),
    ],
)
def test_files_of_other_sorts_are_named(content: bytes, words: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    refused(tmp_path / "x.bin", "unknown format", *words)


# -- several files, NumPy --------------------------------------------------------------------------------------------

PARTS = {
    "a": {"x.w": np.ones(2, np.float32)},
    "b": {"y.w": np.zeros((2, 3), np.float32), "x.b": np.ones(1, np.float32)},
}


def publish(folder: Path, suffix: str = "safetensors") -> Path:
    """A model in two files and their index, as they are published."""
    folder.mkdir(exist_ok=True)
    for name, arrays in PARTS.items():
        interop.save(folder / f"{name}.safetensors", interop.Weights(arrays))
    places = {name: f"{part}.safetensors" for part, arrays in PARTS.items() for name in arrays}
    index = {"metadata": {"total_size": 36}, "weight_map": places}
    (folder / f"model.{suffix}.index.json").write_text(json.dumps(index))
    return folder / f"model.{suffix}.index.json"


def test_a_model_in_several_files(tmp_path: Path) -> None:
    index = publish(tmp_path / "model")
    for path in (index, tmp_path / "model"):
        weights = interop.read(path)
        assert_same(weights, PARTS["a"] | PARTS["b"])
        assert weights.metadata == {"total_size": 36}
    whole = PARTS["a"] | {"z": np.ones(1)}
    interop.save(tmp_path / "model" / "model.safetensors", interop.Weights(whole))
    assert_same(interop.read(tmp_path / "model"), dict(sorted(whole.items())))


def test_files_of_an_index_that_are_not_there(tmp_path: Path) -> None:
    index = publish(tmp_path / "model")
    data = (tmp_path / "model" / "a.safetensors").read_bytes()
    (tmp_path / "model" / "a.safetensors").unlink()
    refused(index, "is not beside it", "no file `a.safetensors`", "2 files: a.safetensors, b.safetensors")
    (tmp_path / "model" / "a.safetensors").write_bytes(data[:30])
    refused(index, "a.safetensors", "damaged, or ends too early")
    interop.save(tmp_path / "model" / "a.safetensors", interop.Weights({"other": np.ones(1)}))
    refused(index, "do not hold all that it names", "no `x.w`")
    (tmp_path / "outside.safetensors").write_bytes(data)
    index.write_text(json.dumps({"weight_map": {"x.w": "../outside.safetensors"}}))
    refused(index, "is not beside it")
    for text in ("{", "[]", '{"weight_map": 3}'):
        index.write_text(text)
        refused(index, "cannot be read as an index")


def test_archives_of_numpy(tmp_path: Path) -> None:
    arrays = {"Transformer/block_0/kernel": np.ones((2, 3), np.float32), "step": np.array(3)}
    np.savez(tmp_path / "x.npz", **arrays)
    assert_same(interop.read(tmp_path / "x.npz"), {name.replace("/", "."): array for name, array in arrays.items()})
    np.savez(tmp_path / "bad.npz", w=np.array([Malicious(print, "run")], object))
    refused(tmp_path / "bad.npz", "cannot be read as an archive of NumPy")


# -- Orbax, safetensors ----------------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_of_orbax(tmp_path: Path) -> None:
    write_orbax(tmp_path / "net")
    assert sorted(interop.read(tmp_path / "net")) == ["layers.0.kernel", "w"]
    (tmp_path / "net" / "_METADATA").write_bytes(b"{")
    refused(tmp_path / "net", "cannot be read as an Orbax checkpoint")


def test_ours_is_restored_otherwise(tmp_path: Path) -> None:
    pytest.importorskip("orbax.checkpoint")
    mu.checkpoint.save(tmp_path / "net", mu.Param(jnp.ones(2)))
    refused(tmp_path / "net", "a checkpoint of Mutatis", "mu.checkpoint.restore")


def test_a_manager_of_orbax(tmp_path: Path) -> None:
    orbax = pytest.importorskip("orbax.checkpoint")
    with orbax.CheckpointManager(tmp_path / "run") as manager:
        for step in (2, 10):
            manager.save(step, args=orbax.args.StandardSave({"w": jnp.full(2, step)}))
        manager.wait_until_finished()
    assert interop.read(tmp_path / "run")["w"].tolist() == [10, 10]


@pytest.mark.parametrize("size", range(120, 136))
def test_a_header_of_any_length(size: int, tmp_path: Path) -> None:
    interop.save(tmp_path / "x.safetensors", interop.Weights({"n" * size: np.ones(2)}))
    (tmp_path / "x.safetensors").rename(tmp_path / "x.bin")
    assert [*interop.read(tmp_path / "x.bin")] == ["n" * size]


def test_dtypes_of_safetensors(tmp_path: Path) -> None:
    names = ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int32", "uint8", "bool")
    arrays = {name: np.asarray(jnp.asarray([[0, 1], [1, 0]]).astype(name)) for name in names}
    arrays |= {"turned": np.arange(6.0).reshape(2, 3).T, "scalar": np.array(3), "empty": np.zeros((0, 2))}
    interop.save(tmp_path / "x.safetensors", interop.Weights(arrays), metadata={"format": "pt"})
    weights = interop.read(tmp_path / "x.safetensors")
    assert_same({name: weights[name] for name in arrays}, arrays)
    assert weights.metadata == {"format": "pt"} and [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_what_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(errors.ArgumentError, match=r"ends with \.safetensors"):
        interop.save(tmp_path / "net.pt", nn.Linear(2, 2, rngs=mu.Rngs(0)))
    with pytest.raises(errors.ArgumentError, match="`w` is 'text'"):
        interop.save(tmp_path / "x.safetensors", interop.Weights({"w": "text"}))
    with pytest.raises(errors.CheckpointError, match="has no value: kernel"):
        interop.save(tmp_path / "x.safetensors", nn.Linear(None, 2, rngs=mu.Rngs(0)))
    assert not list(tmp_path.iterdir())


def test_folders_on_the_way_are_made(tmp_path: Path) -> None:
    interop.save(tmp_path / "a" / "b" / "x.safetensors", interop.Weights({"w": np.ones(1)}))
    assert [*interop.read(tmp_path / "a" / "b" / "x.safetensors")] == ["w"]


def test_metadata_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(errors.ArgumentError, match=r"(?s)`metadata`.*str\(step\)"):
        interop.save(tmp_path / "x.safetensors", interop.Weights({"w": np.ones(1)}), metadata={"step": 3})  # type: ignore[dict-item]
    assert not list(tmp_path.iterdir())
