"""Files that `torch.save` wrote, read without torch and without running code.

Such a file is a pickle beside raw numbers: in a zip archive, or, before torch 1.6, one after the other. A pickle is a program
that may call anything it can name. Here it can name what builds dictionaries and tensors, by stand-ins that make NumPy arrays,
and nothing else; every tensor is checked to lie within the numbers that are there.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

_LEGACY = 0x1950A86A20F9469CFC6C  # what a file without an archive starts with, as a pickled number

# The dtypes of the numbers, by the names that torch has for them; jax.numpy knows those that NumPy does not.
_STORAGES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}


class NotPlain(Exception):
    """The file wants to make what is not plain data."""


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype[Any]
    size: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def is_torch_file(start: bytes) -> bool:
    """Whether a file starts as `torch.save` starts one, or is some other pickle, which is refused with reasons."""
    return start.startswith((b"PK\x03\x04", b"\x80"))


def read_torch_file(path: str) -> Any:
    """What was saved, with NumPy arrays for tensors.

    Raises:
      NotPlain: it is not made of dictionaries, lists, tensors, numbers and texts only.
      Exception: it is damaged.
    """
    with open(path, "rb") as file:
        if zipfile.is_zipfile(file):
            return _read_archive(file)
        file.seek(0)
        return _read_legacy(file)


def _read_archive(file: BinaryIO) -> Any:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        found = [name for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(found) != 1:
            raise ValueError("the archive has no `data.pkl`")
        root = found[0].removesuffix("data.pkl")
        order = archive.read(f"{root}byteorder").decode() if f"{root}byteorder" in names else "little"
        tree = _unpickle(io.BytesIO(archive.read(found[0])))
        kept: dict[str, bytes] = {}

        def numbers(storage: _Storage) -> Any:
            if storage.key not in kept:
                kept[storage.key] = archive.read(f"{root}data/{storage.key}")
            return np.frombuffer(kept[storage.key], storage.dtype.newbyteorder("<" if order == "little" else ">"))

        return _fill(tree, numbers)


def _read_legacy(file: BinaryIO) -> Any:
    if _unpickle(file) != _LEGACY:
        raise NotPlain("it is a pickle, but not one that `torch.save` wrote")
    _unpickle(file)  # the version of the format
    about = _unpickle(file)
    tree = _unpickle(file)
    dtypes: dict[str, np.dtype[Any]] = {}
    _each(tree, lambda tensor: dtypes.setdefault(tensor.storage.key, tensor.storage.dtype))
    kept: dict[str, Any] = {}
    order: Any = "<" if not isinstance(about, dict) or about.get("little_endian", True) else ">"
    for key in _unpickle(file):
        size = int.from_bytes(_exactly(file, 8), "little" if order == "<" else "big", signed=True)
        # No tensor uses the numbers of a storage without a dtype, and without one nothing says how long it is.
        dtype = dtypes[key].newbyteorder(order)
        kept[key] = np.frombuffer(_exactly(file, size * dtype.itemsize), dtype)
    return _fill(tree, lambda storage: kept[storage.key])


def _exactly(file: BinaryIO, size: int) -> bytes:
    data = file.read(size) if size >= 0 else b""
    if len(data) != size:
        raise EOFError("it ends too early")
    return data


def _fill(tree: Any, numbers: Callable[[_Storage], Any]) -> Any:
    """The tree with arrays for tensors."""

    def array(tensor: _Tensor) -> Any:
        flat, (storage, offset, shape, strides) = numbers(tensor.storage), tensor
        if len(shape) != len(strides) or min((offset, *shape, *strides)) < 0:
            raise ValueError("a tensor has a shape that there is not")
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        if 0 in shape:
            return np.zeros(shape, storage.dtype)
        if last >= min(flat.size, storage.size):
            raise EOFError("a tensor reaches beyond its numbers")
        steps = tuple(step * flat.itemsize for step in strides)
        view = np.lib.stride_tricks.as_strided(flat[offset:], shape, steps, writeable=False)
        return view.astype(storage.dtype, order="C")

    return _each(tree, array)


def _each(tree: Any, change: Callable[[_Tensor], Any]) -> Any:
    if isinstance(tree, _Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: _each(value, change) for key, value in tree.items()}
    return type(tree)(_each(value, change) for value in tree) if type(tree) in (list, tuple) else tree


def _unpickle(file: BinaryIO) -> Any:
    return _Plain(file).load()


class _Plain(pickle.Unpickler):
    """An unpickler that can name only what stands in `_known`, none of which is torch's."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="utf-8")
        # Made anew for each file: whatever a pickle does to them goes with them.
        ordered = type("OrderedDict", (dict,), {})
        self._known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): ordered,
            ("torch", "Size"): lambda sizes=(): tuple(sizes),
            ("torch._utils", "_rebuild_tensor"): lambda *given: _tensor(*given),
            ("torch._utils", "_rebuild_tensor_v2"): lambda *given: _tensor(*given),
            ("torch._utils", "_rebuild_parameter"): lambda data, *given: data,
            ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *given: data,
        }

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return name
        if (module, name) not in self._known:
            raise NotPlain(f"it holds a `{module}.{name}`")
        return self._known[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, name, key, _, size, *view = pid
        if kind != "storage" or name not in _STORAGES or any(view):
            raise NotPlain(f"it refers to a {kind!r} of another sort")
        return _Storage(str(key), jnp.dtype(_STORAGES[name]), int(size))


def _tensor(storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise NotPlain("it holds a tensor without numbers")
    return _Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))
