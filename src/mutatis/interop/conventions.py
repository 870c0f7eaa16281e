"""Conventions: by which names, and in which layout, other libraries would hold the states of a model of ours.

`flax` has our own names: a path with dots, ``blocks.0.norm.scale``. `torch` has those of `torch.nn` for the layers of
`mutatis.nn`, at the same paths otherwise:

| layer | ours | `torch.nn` |
|---|---|---|
| `Linear`, `LinearGeneral` | `kernel` (in, out) | `weight` (out, in) |
| `Conv` | `kernel` (*size, in, out) | `weight` (out, in, *size) |
| `ConvTranspose` | `kernel` (*size, in, out); (*size, out, in) with `transpose_kernel` | `weight` (in, out, *size), mirrored |
| `Embed` | `embedding` | `weight` |
| norms | `scale`, `mean`, `var` | `weight`, `running_mean`, `running_var` |
| `PReLU` | `negative_slope` () | `weight` (1,) |
| `SimpleCell`, `GRUCell`, `OptimizedLSTMCell` | `dense_i.kernel`, `dense_h.kernel` | by the rules of `interop.recurrent` |

The layers of an `nn.Stack` have the names that they would have in a list, ``blocks.3.norm.scale``, in both conventions.

What is no weight is not in a file and stays to be said where the layer is made: the momentum of batch norm is the weight of the
*new* value in PyTorch, of the old one here (0.1 there is 0.9 here), and its epsilon and that of layer norm have another default.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mutatis import nn
from mutatis.core import access
from mutatis.core.cells import UNSET, Deferred
from mutatis.core.naming import show_path
from mutatis.errors import ArgumentError, StructureError
from mutatis.model.filters import Path
from mutatis.model.kinds import RngState
from mutatis.model.modules import Module
from mutatis.model.surgery import modules, stacks_on
from mutatis.model.variables import Variable, lanes_of
from mutatis.model.walks import variables
from mutatis.random import Rngs


def _as_it_is(array: Any) -> Any:
    return array


@dataclasses.dataclass(frozen=True)
class Slot:
    """One array of a model: the state that holds it, and the name and layout that a convention has for it.

    Args:
      cell: the state.
      path: its path.
      place: the path that the array has in a list of layers, if the state is one of a `Stack`; else the same.
      layer: the numbers of its layer in the stacks around it, from the outermost on.
      sizes: how many layers these stacks have.
      leaf: the number of the array among the leaves of its value.
      now: the leaf that is there, of all layers, or its shape; None if there is no value yet.
      tree: the structure of the value.
      name: what the convention calls it.
      read: the array for one in the convention's layout.
      write: the array in the convention's layout.
    """

    cell: Variable
    path: Path
    place: Path
    layer: tuple[int, ...]
    sizes: tuple[int, ...]
    leaf: int
    now: Any
    tree: Any
    name: str
    read: Callable[[Any], Any] = _as_it_is
    write: Callable[[Any], Any] = _as_it_is

    @property
    def label(self) -> str:
        """The array as messages call it."""
        return show_path(self.place) or "."

    @property
    def type(self) -> jax.ShapeDtypeStruct:
        """The shape and dtype of the array."""
        return jax.ShapeDtypeStruct(self.now.shape[len(self.layer) :], self.now.dtype)


CONVENTIONS = ("flax", "torch")


def check_convention(convention: str) -> None:
    """Raise if there is no such convention.

    Raises:
      ArgumentError: there is none.
    """
    if convention not in CONVENTIONS:
        raise ArgumentError(
            f"there is no convention {convention!r}",
            path="convention",
            expected=" or ".join(map(repr, CONVENTIONS)),
            got=repr(convention),
            cure='`"flax"` has our own names, `"torch"` those of `torch.nn`; `rules` say what else differs.',
        )


def slots_of(node: Any, convention: str) -> list[Slot]:
    """The arrays of a node, each with a name of its own.

    Raises:
      StructureError: two have one name.
    """
    owners = modules(node)
    slots = [slot for path, cell in variables(node).items() for slot in _slots(path, cell, owners, convention)]
    by_name: dict[str, Slot] = {}
    for slot in slots:
        if (other := by_name.setdefault(slot.name, slot)) is not slot:
            raise StructureError(
                f"`{slot.label}` and `{other.label}` are both called `{slot.name}` in the convention {convention!r}",
                path=slot.label,
                cure="Give one of them another name, or take the part of the model that holds one of them.",
            )
    return slots


def in_list(path: Path, at: Sequence[int], layer: Sequence[int]) -> Path:
    """The path that a layer of these numbers would have in lists, for stacks at these places of the path."""
    numbers = dict(zip(at, layer, strict=True))
    return tuple(numbers.get(n, part) for n, part in enumerate(path))


def _slots(path: Path, cell: Variable, owners: dict[Path, Module], convention: str) -> list[Slot]:
    value = access.load(cell)
    owner = owners.get(path[:-1])
    leaves: list[tuple[Any, Any]]
    if value is UNSET or type(value) is Deferred:
        leaves, tree = [((), None)], None
    else:
        leaves, tree = jax.tree_util.tree_flatten_with_path(value)
    at = stacks_on(path, owners)
    sizes = tuple(len(owners[path[:n]]) for n in at)  # type: ignore[arg-type]  # a stack has a length
    ensemble = len(lanes_of(cell)) > len(sizes) > 0
    if ensemble or any(now is not None and now.shape[: len(sizes)] != sizes for _, now in leaves):
        at, sizes = [], ()  # stacked along other axes, too, as in an ensemble
    found = []
    for number, (keys, now) in enumerate(leaves):
        for layer in np.ndindex(sizes):
            place = in_list(path, at, layer)
            slot = Slot(cell, path, place, layer, sizes, number, now, tree, "")
            parts = place
            if isinstance(cell, RngState) and len(path) > 1 and isinstance(owners.get(path[:-2]), Rngs):
                parts = (*place[:-2], place[-1])  # what holds the streams by name is nothing of its own in Flax
            prefix, last = ".".join(map(str, parts[:-1])), str(parts[-1]) if parts else ""
            translated = convention == "torch" and not keys
            shape = None if now is None else slot.type.shape
            name, read, write = _torch(owner, last, shape) if translated else (last, _as_it_is, _as_it_is)
            inner = jax.tree_util.keystr(keys, simple=True, separator=".")
            full = ".".join(part for part in (prefix, name, inner) if part)
            found.append(dataclasses.replace(slot, name=full, read=read, write=write))
    return found


# -- torch -----------------------------------------------------------------------------------------------------------

_TORCH = {"embedding": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def _torch(
    owner: Module | None, name: str, shape: tuple[int, ...] | None
) -> tuple[str, Callable[[Any], Any], Callable[[Any], Any]]:
    """The name, and the way there and back, for one array of a layer."""
    layers = [base.__name__ for base in type(owner).__mro__ if base.__module__ == nn.__name__]
    if not layers:
        return name, _as_it_is, _as_it_is
    if name == "kernel":
        _refuse_stacked(owner, shape)
        mirrored = "ConvTranspose" in layers and not owner.transpose_kernel  # type: ignore[union-attr]  # it is one
        if "ConvTranspose" in layers or "Conv" in layers:
            return "weight", _Convolution(mirrored).read, _Convolution(mirrored).write
        inputs = getattr(owner, "axis", None)
        return "weight", *_Matrix(shape, len(inputs) if isinstance(inputs, tuple) else 1).ways
    if name == "negative_slope":
        return "weight", *_Matrix(shape, 0).ways
    if name == "bias" and shape is not None and len(shape) > 1:
        return "bias", *_Matrix(shape, 0).ways
    return _TORCH.get(name, name), _as_it_is, _as_it_is


def own_name(owner: Any, name: str, convention: str) -> str:
    """The attribute of a layer that a convention calls by a name; the name itself, if there is none."""
    held = vars(owner) if convention == "torch" and isinstance(owner, Module) else {}
    named = [attribute for attribute, cell in held.items() if isinstance(cell, Variable)]
    return next((attribute for attribute in named if _torch(owner, attribute, None)[0] == name), name)


def _refuse_stacked(owner: Any, shape: tuple[int, ...] | None) -> None:
    """Raise if a kernel has axes in front of those of one layer.

    Raises:
      StructureError: it has.
    """
    if hasattr(owner, "kernel_size"):
        rank = len(owner.kernel_size) + 2
    elif hasattr(owner, "batch_axis"):
        rank = len(owner.batch_axis) + len(owner.axis) + len(owner.out_features)
    else:
        rank = 2
    if shape is not None and len(shape) > rank:
        raise StructureError(
            "`kernel` holds those of several layers, for which torch has no name",
            path="kernel",
            expected=f"an array of {rank} axes",
            got=f"one of shape {shape}",
            cure="Load layers one by one and stack them, or take them apart first: `stack.layers()`.",
        )


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """A matrix (out, in) of torch, or a vector, as an array whose axes are the inputs, and then the outputs."""

    shape: tuple[int, ...] | None
    inputs: int

    @property
    def ways(self) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
        return self.read, self.write

    def read(self, array: Any) -> Any:
        turned = array.T
        fits = self.shape is not None and turned.ndim <= 2 and math.prod(self.shape) == turned.size
        if fits and turned.ndim == 2:
            fits = math.prod(self.shape[: self.inputs]) == turned.shape[0]  # type: ignore[index]  # there is a shape
        return turned.reshape(self.shape) if fits else turned

    def write(self, array: Any) -> Any:
        return array.reshape(math.prod(array.shape[: self.inputs]), -1).T if self.inputs else array.reshape(-1)


@dataclasses.dataclass(frozen=True)
class _Convolution:
    """A kernel (out, in, *size) of torch, or (in, out, *size) and mirrored, as one (*size, in, out)."""

    mirrored: bool

    def read(self, array: Any) -> Any:
        if array.ndim < 3:
            return array
        if self.mirrored:
            return np.flip(array, tuple(range(2, array.ndim))).transpose(*range(2, array.ndim), 0, 1)
        return array.transpose(*range(2, array.ndim), 1, 0)

    def write(self, array: Any) -> Any:
        n = array.ndim - 2
        if self.mirrored:
            return np.flip(array, tuple(range(n))).transpose(n, n + 1, *range(n))
        return array.transpose(n + 1, n, *range(n))


def needless(owner: Any, name: str, convention: str) -> bool:
    """Whether a convention holds an array of this name that a layer of ours has no use for."""
    return convention == "torch" and name == "num_batches_tracked" and isinstance(owner, nn.BatchNorm)


def numbers(array: Any) -> Any:
    """An array as a file can hold it: of random keys, the numbers that they are made of."""
    return jax.random.key_data(array) if is_key(array) else array


def is_key(array: Any) -> bool:
    """Whether an array, or a shape, is of random keys."""
    return bool(jnp.issubdtype(array.dtype, jax.dtypes.prng_key))
