"""Arrays to disk and back, bit for bit, by Orbax.

Orbax writes arrays of many dtypes, sharded ones too. What it does not take goes in a form that it does: random keys as
their numbers, a few narrow dtypes in a wider one, and an empty array not at all, since its type says all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mutatis._packages import require
from mutatis.checkpoint.manifest import Leaf
from mutatis.errors import CheckpointError

# The dtypes that TensorStore, under Orbax, does not know, by those that they are stored in.
_STORED_AS = {"uint2": "uint8", "uint4": "uint8", "float8_e4m3": "uint8"}


def _orbax() -> Any:
    return require("orbax.checkpoint", "mu.checkpoint")


def describe(value: jax.Array, number: int) -> Leaf:
    """The type of an array that is stored under a number."""
    impl = str(jax.random.key_impl(value)) if _is_key(value) else None
    return Leaf(tuple(value.shape), str(value.dtype), impl, number if value.size else None)


def write_arrays(directory: str, arrays: Mapping[int, jax.Array]) -> None:
    """Write arrays, by their numbers, into a new directory."""
    if not arrays:
        return  # Orbax refuses an empty tree
    orbax = _orbax()
    stored = {str(number): _encode(value) for number, value in arrays.items()}
    with orbax.Checkpointer(orbax.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(directory, args=orbax.args.PyTreeSave(stored))


def read_arrays(directory: str, wanted: list[tuple[Leaf, Any]]) -> list[jax.Array]:
    """Read arrays, each to where another one lives.

    Args:
      directory: the directory of the arrays.
      wanted: what is stored, with the array or shape whose placement it gets (None: the default device).

    Raises:
      CheckpointError: Orbax cannot read them.
    """
    stored: dict[str, Any] = {}
    targets = {str(leaf.array): _target(leaf, like) for leaf, like in wanted if leaf.array is not None}
    if targets:
        orbax = _orbax()
        plain = orbax.RestoreArgs(restore_type=np.ndarray)
        arguments = {n: plain if s is None else orbax.ArrayRestoreArgs(sharding=s) for n, s in targets.items()}
        request = orbax.args.PyTreeRestore(dict.fromkeys(targets, 0), restore_args=arguments, partial_restore=True)
        try:
            with orbax.Checkpointer(orbax.PyTreeCheckpointHandler()) as checkpointer:
                stored = checkpointer.restore(directory, args=request)
        except Exception as error:  # Orbax and TensorStore raise what they like
            raise CheckpointError(
                f"the arrays at `{directory}` cannot be read",
                got=f"{type(error).__name__}: {error}",
                cure="Restore an earlier checkpoint.",
            ) from error
    others = [leaf for leaf, _ in wanted if leaf.array is not None and not _is_of(stored.get(str(leaf.array)), leaf)]
    if others:
        raise CheckpointError(
            f"the arrays at `{directory}` are not those that the manifest tells of",
            differences=[f"array {leaf.array}: expected {leaf}" for leaf in others],
            cure="Restore an earlier checkpoint.",
        )
    return [_decode(leaf, stored.get(str(leaf.array)), like) for leaf, like in wanted]


def _is_of(stored: Any, leaf: Leaf) -> bool:
    """Whether what is stored can be the array of a leaf."""
    if not hasattr(stored, "shape"):
        return False
    shape, dtype = tuple(stored.shape), str(stored.dtype)
    if leaf.impl is not None:
        return shape[: len(leaf.shape)] == leaf.shape
    return shape == leaf.shape and dtype == _STORED_AS.get(leaf.dtype, leaf.dtype)


def _is_key(value: jax.Array) -> bool:
    return bool(jnp.issubdtype(value.dtype, jax.dtypes.prng_key))


def _encode(value: jax.Array) -> jax.Array:
    if _is_key(value):
        return jax.random.key_data(value)
    dtype = _STORED_AS.get(str(value.dtype))
    if dtype is None:
        return value
    return value.astype(dtype) if jnp.issubdtype(value.dtype, jnp.integer) else value.view(dtype)


def _decode(leaf: Leaf, stored: Any, like: Any) -> jax.Array:
    """The array of a leaf, where `like` lives; uncommitted, if that is."""
    if isinstance(stored, jax.Array):
        return stored
    if stored is None:
        stored = _empty(leaf)
    if leaf.dtype in _STORED_AS:
        stored = stored.astype(leaf.dtype) if "int" in leaf.dtype else stored.view(leaf.dtype)
    value = jax.random.wrap_key_data(jnp.array(stored), impl=leaf.impl) if leaf.impl else jnp.array(stored)
    return placed(value, like)


def placed(value: jax.Array, like: Any) -> jax.Array:
    """An array where another one lives."""
    return value if (sharding := _sharding(like)) is None else jax.device_put(value, sharding)


def _empty(leaf: Leaf) -> Any:
    if leaf.impl is None:
        return np.zeros(leaf.shape, _STORED_AS.get(leaf.dtype, leaf.dtype))
    numbers = jax.random.key_data(jax.random.key(0, impl=leaf.impl))
    return np.zeros((*leaf.shape, *numbers.shape), numbers.dtype)


def _sharding(like: Any) -> Any:
    """Where an array has to be, or None if JAX may choose."""
    sharding: Any = getattr(like, "sharding", None) if getattr(like, "committed", True) else None
    if isinstance(getattr(sharding, "mesh", None), jax.sharding.AbstractMesh):  # of a shape: axes without devices
        mesh = jax.sharding.get_mesh()
        return jax.NamedSharding(mesh, sharding.spec) if mesh.abstract_mesh == sharding.mesh else None
    return sharding


def _target(leaf: Leaf, like: Any) -> Any:
    """The sharding to read a leaf with, if it is spread over devices; its parts then go to their devices only."""
    sharding = _sharding(like)
    if sharding is None or len(sharding.device_set) == 1 or leaf.impl or leaf.dtype in _STORED_AS:
        return None
    return sharding
