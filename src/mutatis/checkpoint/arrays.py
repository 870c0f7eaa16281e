"""Arrays to disk and back, bit for bit, by Orbax.

Orbax writes arrays of many dtypes, sharded ones too. What it does not take goes in a form that it does: random keys as
their numbers, a few narrow dtypes in a wider one, and an empty array not at all, since its type says all of it.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mutatis._packages import require
from mutatis.checkpoint.manifest import Leaf
from mutatis.core.placements import put
from mutatis.errors import CheckpointError

_FILE = 1 << 27  # bytes of a file, about: several are checked at a time

# The dtypes that TensorStore, under Orbax, does not know, by those that they are stored in.
_STORED_AS = {"uint2": "uint8", "uint4": "uint8", "float8_e4m3": "uint8"}


def _orbax() -> Any:
    return require("orbax.checkpoint", "mu.checkpoint")


def _checkpointer(handler: Any) -> Any:
    """What Orbax writes and reads with.

    Several processes wait for each other through the service that connects them. By itself Orbax would run a program on all
    devices, which comes between the programs of the training when it saves in the background.
    """
    orbax = _orbax()
    if jax.process_count() == 1:
        return orbax.Checkpointer(handler)
    together = orbax.options.MultiprocessingOptions(active_processes=set(range(jax.process_count())))
    return orbax.Checkpointer(handler, multiprocessing_options=together)


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """Have Orbax not log the errors that it raises: pages of its own frames."""
    logger = logging.getLogger("absl")

    def is_no_error(record: logging.LogRecord) -> bool:
        return record.exc_info is None or "orbax" not in record.pathname

    logger.addFilter(is_no_error)
    try:
        yield
    finally:
        logger.removeFilter(is_no_error)


def describe(value: jax.Array, number: int) -> Leaf:
    """The type of an array that is stored under a number."""
    impl = str(jax.random.key_impl(value)) if _is_key(value) else None
    return Leaf(tuple(value.shape), str(value.dtype), impl, number if value.size else None)


def write_arrays(directory: str, arrays: Mapping[int, Any], several: bool = False) -> None:
    """Write arrays, by their numbers, into a new directory.

    Args:
      directory: the directory.
      arrays: the arrays; those of NumPy are encoded already.
      several: whether other processes write their parts of them. An array that this process has the whole of is written by
        the first alone.
    """
    if not arrays:
        return  # Orbax refuses an empty tree
    orbax = _orbax()
    stored = {str(number): encode(value) for number, value in arrays.items()}
    if several:
        stored = {
            name: np.asarray(value) if getattr(value, "is_fully_addressable", True) else value
            for name, value in stored.items()
        }
    try:
        # Weights are as good as random: to compress them takes longer than to write them.
        handler = orbax.PyTreeCheckpointHandler(use_compression=False)
        with _unlogged(), _checkpointer(handler) as checkpointer:
            checkpointer.save(directory, args=orbax.args.PyTreeSave(stored, ocdbt_target_data_file_size=_FILE))
    except OSError:
        raise
    except Exception as error:  # Orbax and TensorStore raise what they like
        raise CheckpointError(
            f"the arrays cannot be written to `{os.path.dirname(directory)}`",
            got=f"{type(error).__name__}: {error}",
            cure="Free some space, or save to another disk.",
        ) from error


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
            with _unlogged(), _checkpointer(orbax.PyTreeCheckpointHandler()) as checkpointer:
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
    # Each is let go of when it has been converted, so that no second copy of all is held.
    return [_decode(leaf, stored.pop(str(leaf.array), None), like) for leaf, like in wanted]


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


def encode(value: Any) -> Any:
    """An array as Orbax takes it."""
    if isinstance(value, np.ndarray):
        return value
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
    array = jax.device_put(stored)  # which copies nothing where that is not needed
    value = jax.random.wrap_key_data(array, impl=leaf.impl) if leaf.impl else array
    return placed(value, like)


def placed(value: jax.Array, like: Any) -> jax.Array:
    """An array where another one lives."""
    return value if (sharding := _sharding(like)) is None else put(value, sharding)


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
