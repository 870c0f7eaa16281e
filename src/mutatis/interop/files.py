"""Files with weights: what is in them as NumPy arrays by dotted name, whichever library wrote them; and safetensors written.

`read` looks at what a file is, not at how it is called. No code of a file is ever run.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mutatis._packages import require
from mutatis.core.showing import show_value
from mutatis.errors import ArgumentError, CheckpointError, MutatisError
from mutatis.interop.torch_files import NotPlain, is_torch_file, read_torch_file
from mutatis.model.strangers import plain_value


class Weights(dict[str, Any]):
    """A dictionary from dotted names to arrays, as `read` and `export` return it.

    Args:
      arrays: the arrays by name.
      source: the file that they come from, for messages.
      metadata: the further content of the file: the fields of a GGUF file, the texts of a safetensors file, and for other formats
        the values that are not arrays.

    Attributes:
      source: as above.
      metadata: as above, a dictionary.

    Example:
      >>> import numpy as np, mutatis as mu
      >>> weights = mu.interop.Weights({"fc.weight": np.ones((3, 2), np.float32)})
      >>> mu.interop.save("fc.safetensors", weights, metadata={"author": "me"})
      >>> mu.interop.read("fc.safetensors").metadata
      {'author': 'me'}
    """

    def __init__(
        self, arrays: Mapping[str, Any], *, source: str = "the weights", metadata: Mapping[str, Any] | None = None
    ):
        super().__init__(arrays)
        self.source = source
        self.metadata = dict(metadata or {})


def read(path: str | os.PathLike[str]) -> Weights:
    """Read the arrays of a file, by the names that the file gives them.

    It reads safetensors files; files of `torch.save` with a state dict, or dictionaries that hold one, without torch; GGUF files,
    whose quantized tensors become float32; archives of NumPy (``.npz``), in whose names slashes become dots; directories of
    Orbax, such as checkpoints of Flax NNX and Linen models; and models that are published in several files, by their index
    (``model.safetensors.index.json``) or by the directory that holds it.

    Args:
      path: the file, or the directory.

    Returns:
      A `Weights`: a dictionary from dotted names, such as ``"layers.0.kernel"``, to NumPy arrays, with the further content of the
      file as `metadata`. Random keys of an Orbax checkpoint stay `jax` arrays.

    Raises:
      CheckpointError: there is no file; it is damaged, of an unknown format, or holds more than plain data.
      MissingPackageError: the package that reads the format is not installed.

    Example:
      >>> import mutatis as mu
      >>> mu.interop.save("net.safetensors", mu.nn.Linear(2, 3, rngs=mu.Rngs(0)))
      >>> {name: array.shape for name, array in mu.interop.read("net.safetensors").items()}
      {'bias': (3,), 'kernel': (2, 3)}
    """
    path = os.path.abspath(os.fspath(path))
    if not os.path.exists(path):
        raise CheckpointError(
            f"there is no file at `{path}`", path=path, cure="Look for a misspelled name, or for a folder above."
        )
    reader, form = _reader_of(path)
    try:
        arrays, metadata = reader(path)
    except MutatisError:
        raise
    except NotPlain as error:
        raise CheckpointError(
            f"the file at `{path}` is not plain data: {error}",
            path=path,
            expected="arrays, numbers and texts in dictionaries",
            got="a pickle that makes other objects; no code of it was run",
            cure="Save what the model holds, `torch.save(model.state_dict(), path)`, or better as safetensors.",
        ) from error
    except Exception as error:  # readers raise what they like about damaged files
        raise CheckpointError(
            f"the file at `{path}` cannot be read as {form}: it is damaged, or ends too early",
            path=path,
            cure="Fetch the file anew, and compare its size with what its source says.",
        ) from error
    return Weights(arrays, source=path, metadata=metadata)


_PUBLISHED = tuple(  # what the directory of a published model may hold, the preferred first
    name + index
    for name in ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors")
    for index in ("", ".index.json")
)


def _reader_of(path: str) -> tuple[Any, str]:
    if os.path.isdir(path):
        inside = [os.path.join(path, name) for name in _PUBLISHED]
        found = next(filter(os.path.isfile, inside), None)
        return (lambda _: _read_whole(found), "a published model") if found else (_read_orbax, "an Orbax checkpoint")
    if path.endswith(".index.json"):
        return _read_index, "an index of files with weights"
    with open(path, "rb") as file:
        start = file.read(16)
    if start.startswith(b"GGUF"):
        return _read_gguf, "GGUF"
    # A header in JSON, after its length, whose first byte may be any.
    if path.endswith(".safetensors") or (start[8:9] == b"{" and start[4:8] == bytes(4)):
        return _read_safetensors, "safetensors"
    if _is_npz(path):
        return _read_npz, "an archive of NumPy"
    if is_torch_file(start):
        return _read_torch, "what `torch.save` wrote"
    what, cure = next((rest for begin, *rest in _OTHERS if start.startswith(begin)), (None, _BY_HAND))
    raise CheckpointError(
        f"the file at `{path}` is of an unknown format",
        path=path,
        expected="safetensors, GGUF, `.npz`, what `torch.save` wrote, an index of such files, or a directory of Orbax",
        got=what or f"a file that starts with {start[:8]!r}",
        cure=cure,
    )


_BY_HAND = "Arrays that other code reads are given as a dictionary: `mu.interop.load(model, {'head.kernel': x})`."
_OTHERS = (  # how they start, what they are, and what to do
    (b"version https://", "a placeholder of Git LFS in the place of the file", "`git lfs pull` fetches the files."),
    (
        b"\x93NUMPY",
        "one array of NumPy",
        "Give it a name: `mu.interop.load(model, {'head.kernel': numpy.load(path)})`.",
    ),
    (b"\x89HDF", "a file of HDF5, as Keras writes them", f"`h5py` reads it. {_BY_HAND}"),
)


# -- formats ---------------------------------------------------------------------------------------------------------

_FLOAT8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}  # which NumPy does not know by name


def _read_safetensors(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    safetensors = require("safetensors", "mu.interop")
    with safetensors.safe_open(path, "numpy") as file:
        names = list(file.keys())
        narrow = [name for name in names if file.get_slice(name).get_dtype() in _FLOAT8]
        arrays = {name: file.get_tensor(name) for name in names if name not in narrow}
        metadata = file.metadata() or {}
    if narrow:
        with open(path, "rb") as whole:
            for name, info in safetensors.deserialize(whole.read()):
                if name in narrow:
                    flat = np.frombuffer(info["data"], jnp.dtype(_FLOAT8[info["dtype"]]))
                    arrays[name] = flat.reshape(info["shape"])
    return {name: arrays[name] for name in names}, metadata


def _read_whole(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    weights = read(path)
    return dict(weights), weights.metadata


def _read_index(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays of the files that an index names, which lie beside it."""
    with open(path, encoding="utf-8") as file:
        index = json.load(file)
    places: dict[str, str] = index["weight_map"]
    files = sorted(set(places.values()))
    arrays: dict[str, Any] = {}
    for name in files:
        beside = os.path.join(os.path.dirname(path), name)
        if os.path.basename(name) != name or not os.path.isfile(beside):
            raise CheckpointError(
                f"a file that the index at `{path}` names is not beside it",
                path=name,
                expected=f"{len(files)} files: {', '.join(files[:8])}",
                got=f"no file `{name}`",
                cure="Fetch all files of the model into one directory.",
            )
        arrays |= read(beside)
    lacking = [name for name in places if name not in arrays]
    if lacking:
        raise CheckpointError(
            f"the files of the index at `{path}` do not hold all that it names",
            path=path,
            expected=f"{len(places)} arrays",
            got=f"no {', '.join(f'`{name}`' for name in lacking[:8])}",
            cure="Fetch index and files anew, of one version of the model.",
        )
    return {name: arrays[name] for name in places}, dict(index.get("metadata") or {})


def _is_npz(path: str) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(name.endswith(".npy") for name in archive.namelist())


def _read_npz(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    with np.load(path, allow_pickle=False) as archive:
        return {name.replace("/", "."): archive[name] for name in archive.files}, {}


def _read_torch(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    tree = read_torch_file(path)
    return _apart(tree if isinstance(tree, Mapping) else {"": tree})


def _read_gguf(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    gguf = require("gguf", "mu.interop")
    try:
        file = gguf.GGUFReader(path)
    except ValueError as error:
        if "GGMLQuantizationType" not in str(error):
            raise
        raise _unknown_type(path, "a tensor", str(error)) from error
    arrays = {}
    for tensor in file.tensors:
        if tensor.tensor_type.name in _PLAIN_GGUF:
            arrays[tensor.name] = tensor.data
            continue
        try:
            arrays[tensor.name] = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise _unknown_type(path, f"tensor `{tensor.name}`", tensor.tensor_type.name) from error
    return arrays, {name: field.contents() for name, field in file.fields.items()}


def _unknown_type(path: str, tensor: str, got: str) -> CheckpointError:
    return CheckpointError(
        f"{tensor} in `{path}` is of a type that is not known here",
        path=path,
        expected="a type that the package `gguf` makes numbers of",
        got=got,
        cure="Take a file of another quantization, or a newer release of `gguf`.",
    )


_PLAIN_GGUF = ("F16", "F32", "F64", "I8", "I16", "I32", "I64")  # which are arrays as they are


def _read_orbax(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    orbax = require("orbax.checkpoint", "mu.interop")
    with orbax.PyTreeCheckpointer() as checkpointer:
        item = _orbax_item(path)
        tree = checkpointer.metadata(item).item_metadata.tree
        plain = jax.tree.map(lambda leaf: orbax.RestoreArgs(restore_type=_restored_as(leaf)), tree)
        return _apart(checkpointer.restore(item, restore_args=plain))


def _restored_as(leaf: Any) -> Any:
    return (
        np.ndarray
        if isinstance(getattr(leaf, "shape", None), tuple) and type(leaf).__name__ == "ArrayMetadata"
        else None
    )


def _orbax_item(path: str) -> str:
    """The directory of one tree, in that of a checkpoint with several, or of a manager with several steps."""
    if os.path.exists(os.path.join(path, "_METADATA")):
        return path
    ours = os.path.exists(os.path.join(path, "mutatis.json"))
    inner = [entry.path for entry in os.scandir(path) if entry.is_dir() and not ours]
    items = sorted(folder for folder in inner if os.path.exists(os.path.join(folder, "_METADATA")))
    steps = [folder for folder in inner if os.path.basename(folder).isdigit()]
    if len(items) == 1:
        return items[0]
    if not items and steps:
        return _orbax_item(max(steps, key=lambda folder: int(os.path.basename(folder))))
    raise CheckpointError(
        f"the directory `{path}` is " + ("a checkpoint of Mutatis" if ours else "not one checkpoint of Orbax"),
        path=path,
        expected="a directory with a file `_METADATA`",
        got=f"{len(items)} such in it: {', '.join(map(os.path.basename, items))}" if items else "none",
        cure="`mu.checkpoint.restore(path, model)`"
        if ours
        else f"Give the one to read: `{(items or [path + '/default'])[0]}`.",
    )


# -- trees -----------------------------------------------------------------------------------------------------------


def flat_arrays(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dictionaries and lists by dotted name.

    A dictionary that has a `value` and nothing else is a variable of Flax NNX, as its checkpoints hold it; lists may have become
    dictionaries whose keys are numbers, as text.
    """
    if isinstance(tree, Mapping) and list(tree) == ["value"] and not isinstance(tree["value"], Mapping):
        yield name, tree["value"]
    elif isinstance(tree, Mapping | list | tuple):
        items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
        for key, inner in items:
            part = ".".join(map(str, key)) if isinstance(key, tuple) else str(key)
            yield from flat_arrays(inner, f"{name}.{part}" if name else part)
    else:
        yield name, plain_value(tree)


def _apart(tree: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays of a tree, and what else it holds."""
    flat = dict(flat_arrays(tree))
    arrays = {name: leaf for name, leaf in flat.items() if isinstance(leaf, np.ndarray | jax.Array)}
    return arrays, {name: leaf for name, leaf in flat.items() if name not in arrays}


def write_safetensors(
    path: str | os.PathLike[str], arrays: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Write arrays by name; the file is there whole or not at all.

    Raises:
      ArgumentError: something is no array, or the name of the file is of another format.
    """
    path = os.path.abspath(os.fspath(path))
    if not path.endswith(".safetensors"):
        raise ArgumentError(
            f"`{path}` is not a name for the format that is written",
            path=path,
            expected="a name that ends with .safetensors",
            got=os.path.basename(path),
            cure=f"`mu.interop.save({os.path.basename(path).partition('.')[0] + '.safetensors'!r}, model)`",
        )
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray | np.generic):
            raise ArgumentError(
                f"`{name}` is {show_value(array)}, and no array", path=name, cure="`numpy.asarray(x)` makes one."
            )
    for name, text in (metadata or {}).items():
        if not all(isinstance(part, str) for part in (name, text)):
            raise ArgumentError(
                f"`metadata` of a file has {show_value(name)}: {show_value(text)}, and texts only can be kept",
                path="metadata",
                expected="a dictionary from strings to strings",
                got=show_value(metadata),
                cure="`metadata={'step': str(step)}`",
            )
    writer = require("safetensors.numpy", "mu.interop")
    data = writer.save(
        {name: np.asarray(array, order="C") for name, array in arrays.items()}, metadata=dict(metadata or {})
    )
    os.makedirs(os.path.dirname(path), exist_ok=True)
    beside = f"{path}.{os.getpid()}.part"
    try:
        with open(beside, "wb") as file:
            file.write(data)
        os.replace(beside, path)
    finally:
        if os.path.exists(beside):
            os.remove(beside)
