"""Values: pytrees of strongly typed JAX arrays, which is what cells hold."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mutatis import _compat
from mutatis.core import access, naming
from mutatis.core.avals import show_type
from mutatis.core.cells import Cell
from mutatis.core.showing import show_class, show_value
from mutatis.errors import StateTypeError

_ARRAY = _compat.ARRAY


def as_value(value: Any, owner: Any = None) -> Any:
    """A value as a cell stores it: a pytree of strongly typed JAX arrays."""
    if type(value) is _ARRAY and not value.weak_type:
        return value
    if isinstance(value, Cell):
        return access.read(value)
    return jax.tree.map(lambda leaf: _as_leaf(leaf, owner), value, is_leaf=lambda x: isinstance(x, Cell))


def _as_leaf(leaf: Any, owner: Any) -> Any:
    if isinstance(leaf, Cell):
        return access.read(leaf)
    if isinstance(leaf, jax.Array):
        return jax.lax.convert_element_type(leaf, leaf.dtype) if getattr(leaf, "weak_type", False) else leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if isinstance(leaf, bool | int | float | complex):
        return jnp.array(leaf, dtype=jax.dtypes.canonicalize_dtype(np.result_type(type(leaf))))
    if isinstance(leaf, np.ndarray | np.generic) and leaf.dtype != object and leaf.dtype.kind not in "USMm":
        return jnp.array(leaf)
    path = None if owner is None else naming.path_of(owner) or getattr(owner, "name", None)
    kind = "state" if owner is None else type(owner).__name__
    raise StateTypeError(
        f"{f'state `{path}` ({kind})' if path else f'a {kind}'} cannot hold {show_value(leaf)}",
        path=path,
        where=naming.where(),
        expected="an array, a number, or a pytree of these",
        got=show_class(leaf),
        made_at=naming.made_at(owner),
        cure="Keep strings, functions and configuration as plain attributes of the module: they are static.",
    )


def brief(value: Any) -> str:
    """A number, or the type of anything else."""
    if isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer) and value.ndim == 0:
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            return str(value.dtype)
        return f"{value}, {value.dtype}"
    return show_type(value)


def to_bytes(leaf: Any) -> Any:
    """A leaf for pickling: a NumPy array, or what a random key is made of."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return ("key", str(jax.random.key_impl(leaf)), np.asarray(jax.random.key_data(leaf)))
    return np.asarray(leaf) if isinstance(leaf, jax.Array) else leaf


def from_bytes(leaf: Any) -> Any:
    """The leaf that `to_bytes` was given."""
    if isinstance(leaf, tuple):
        return jax.random.wrap_key_data(jnp.array(leaf[2]), impl=leaf[1])
    return jnp.array(leaf) if isinstance(leaf, np.ndarray | np.generic) else leaf
