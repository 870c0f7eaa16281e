"""Graph definitions: the static rest of a model, as a value; and a Module as one node of a pytree, whose structure it is."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import jax

from mutatis import _compat
from mutatis.core import access
from mutatis.core.cells import UNSET
from mutatis.core.naming import show_path
from mutatis.model.filters import Path
from mutatis.model.graph import Decoder, Spec, make_cell
from mutatis.model.modules import Module, for_each_class
from mutatis.model.variables import Variable
from mutatis.model.walks import _find

if TYPE_CHECKING:
    from typing_extensions import TypeVar as TypeVarWithDefault

    N_co = TypeVarWithDefault("N_co", covariant=True, default=Any)
else:
    N_co = TypeVar("N_co", covariant=True)
N = TypeVar("N")


class GraphDef(Generic[N_co]):
    """The structure of a model without its values: types, names, static attributes, and which states are shared.

    `mu.split` and `mu.graphdef` make it, and `mu.merge` builds a model from it and values. It is hashable, holds no arrays, and
    two of them are equal for models of equal structure. In pytrees it is a node without leaves, so it goes through raw JAX as an
    argument, static or not, and as a result.

    Example:
      >>> import jax, jax.numpy as jnp, mutatis as mu
      >>> graphdef, state = mu.split(mu.nn.Linear(2, 1, rngs=mu.Rngs(0)))
      >>> graphdef
      GraphDef(Linear, 2 states)
      >>> @jax.jit
      ... def forward(graphdef, state, x):
      ...     return mu.merge(graphdef, state)(x)
      >>> forward(graphdef, state, jnp.ones((4, 2))).shape
      (4, 1)
    """

    __slots__ = ("_hash", "cells", "paths", "spec", "tail", "types")

    def __init__(
        self,
        spec: Spec,
        tail: tuple[Spec, ...],
        paths: tuple[Path, ...],
        cells: tuple[Spec, ...],
        types: tuple[Any, ...] | None = None,
    ) -> None:
        self.spec = spec
        self.tail = tail
        self.paths = paths
        self.cells = cells  # what of each is static, by number; it is in `spec` too
        self.types = types  # shapes and dtypes that the cells had; not part of what makes two definitions equal
        self._hash: int | None = None  # found when it is asked for: in a large model it takes a while

    def untyped(self) -> GraphDef[N_co]:
        """Make a copy of this definition without the shapes and dtypes of values: `mu.merge` then accepts values of any type."""
        return GraphDef(self.spec, self.tail, self.paths, self.cells, (UNSET,) * len(self.paths))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GraphDef):
            return NotImplemented
        return hash(self) == hash(other) and self.spec == other.spec and self.tail == other.tail

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash((self.spec, self.tail))
        return self._hash

    def __setstate__(self, state: tuple[None, dict[str, Any]]) -> None:
        for name, value in state[1].items():
            setattr(self, name, value)
        self._hash = None  # it may come from another process, whose hashes are others

    def __repr__(self) -> str:
        kind = self.spec[1].__name__ if self.spec[0] == "m" else "tree"
        return f"GraphDef({kind}, {len(self.paths)} states)"

    def build(self, cells: list[Any]) -> N_co:
        """Build the model around these cells. For library code; use `mu.merge`."""
        decoder = Decoder(cells)
        root = decoder.decode(self.spec)
        decoder.refer(self.tail)
        return root  # type: ignore[no-any-return]


jax.tree_util.register_static(GraphDef)


def describe_graph(node: N, *, marks: bool = True) -> tuple[GraphDef[N], list[Variable[Any]]]:
    """The static description of a node (without `marks`, not of which cells are frozen), and its cells by number."""
    parts, cells = _find(node, described=True, marks=marks)
    return GraphDef(*parts, tuple(map(_type, access.peek_many(cells)))), cells


def _type(value: Any) -> Any:
    if type(value) is _compat.ARRAY:
        return _struct(value.shape, value.dtype)
    return jax.tree.map(_type_of_leaf, value)


def _type_of_leaf(leaf: Any) -> Any:
    try:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    except (AttributeError, TypeError):  # in a tree that was made from a module: a mask, an axis, a spec
        return leaf


@functools.lru_cache(maxsize=1024)
def _struct(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _register(cls: type[Module]) -> None:
    def flatten(module: Module) -> tuple[list[Any], GraphDef]:
        definition, cells = describe_graph(module)
        if any(spec[4] is not None for spec in definition.cells):  # a copy's cells are marked anew
            definition, cells = describe_graph(module, marks=False)
        return access.read_many(cells), definition

    def flatten_with_keys(module: Module) -> tuple[list[tuple[Any, Any]], GraphDef]:
        children, definition = flatten(module)
        keys = [jax.tree_util.GetAttrKey(show_path(path)) for path in definition.paths]
        return list(zip(keys, children, strict=True)), definition

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, _unflatten, flatten)


def _unflatten(definition: GraphDef, children: Sequence[Any]) -> Any:
    cells = list(map(make_cell, definition.cells))
    for cell, child in zip(cells, children, strict=True):
        cell._frozen = "detached"
        access.create_detached(cell, child)
    return definition.build(cells)


for_each_class(_register, later=True)
