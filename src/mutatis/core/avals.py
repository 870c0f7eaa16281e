"""Abstract values: the type of a value, when two are the same, how one is shown, and where a value is placed.

A value is a pytree of arrays, of tracers, or of `jax.ShapeDtypeStruct`s. Its type is its structure and the shapes and dtypes of
its leaves. A compiled program goes by more: weak types, mesh axes, and the devices that a value is on.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mutatis import _compat
from mutatis.core.cells import UNSET
from mutatis.core.nodes import is_node
from mutatis.core.showing import notation, show_leaf_type

_ARRAY = _compat.ARRAY
ONE_LEAF = jax.tree.structure(0)


def same_type(a: Any, b: Any, *, exact: bool = False, lanes: bool = False) -> bool:
    """Whether two values agree in structure, shapes and dtypes.

    Args:
      a: a value.
      b: another.
      exact: whether they are also to agree in all else that JAX types have: weak types, mesh axes.
      lanes: whether a tracer in `b` may have another shape: it may be one lane of what `a` is like.
    """
    if type(b) is _ARRAY:
        if type(a) is _ARRAY:
            return _same_leaf_type(a.aval, b.aval, exact)
        if type(a) is jax.ShapeDtypeStruct and not exact:
            return _same_leaf_type(a, b.aval, exact)
    left, left_tree = jax.tree.flatten(a)
    right, right_tree = jax.tree.flatten(b)
    if left_tree != right_tree:
        return False
    if exact:
        if not all(isinstance(leaf, jax.Array) for leaf in (*left, *right)):
            return False
        left, right = list(map(jax.typeof, left)), list(map(jax.typeof, right))
    return all(
        _same_leaf_type(x, y, exact) or (lanes and isinstance(y, jax.core.Tracer) and x.dtype == y.dtype)
        for x, y in zip(left, right, strict=True)
    )


def _same_leaf_type(x: Any, y: Any, exact: bool) -> bool:
    if x is y:
        return True
    return bool(x == y) if exact else bool(x.shape == y.shape and x.dtype == y.dtype)


def fits_program(old: Any, new: Any) -> bool:
    """Whether a program that was compiled for one concrete value fits the other: type and placement are the same."""
    if old is new:
        return True
    if type(old) is _ARRAY and type(new) is _ARRAY:
        return _leaf_fits(old, new)
    left, left_tree = jax.tree.flatten(old)
    right, right_tree = jax.tree.flatten(new)
    return left_tree == right_tree and all(map(_leaf_fits, left, right))


def _leaf_fits(old: Any, new: Any) -> bool:
    if old is new:
        return True
    if not (isinstance(old, jax.Array) and isinstance(new, jax.Array)):
        return False
    a, b = _aval(old), _aval(new)
    x, y = old.sharding, new.sharding
    # JAX mostly has one object for equal types, and for equal shardings.
    return (a is b or bool(a == b)) and (x is y or bool(x == y))


def _aval(array: Any) -> Any:
    return array.aval if type(array) is _ARRAY else jax.typeof(array)


def types_of(values: list[Any]) -> Any:
    """All that JAX's trace goes by in values: two lists of this are equal, or it would trace anew. None if it cannot be told."""
    leaves, treedef = jax.tree.flatten(values)
    try:
        types = list(map(_aval, leaves))
    except TypeError:
        return None
    # JAX mostly has one object for equal types, and for equal shardings: comparing those is quick, and a hash is not.
    return treedef, types, [getattr(leaf, "sharding", None) for leaf in leaves]


def placement(value: Any) -> tuple[Any, ...] | None:
    """The shardings of a concrete value's leaves if they live on several devices, else None."""
    shardings = [leaf.sharding for leaf in jax.tree.leaves(value) if isinstance(leaf, jax.Array)]
    spread = [sharding for sharding in shardings if type(sharding) is not jax.sharding.SingleDeviceSharding]
    return tuple(spread) if spread else None


def numbers_of(leaf: Any) -> Any:
    """An array, or what an array of random keys is made of."""
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def is_concrete(value: Any) -> bool:
    """Whether no leaf of a value is a tracer; nodes are not looked into."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value, is_leaf=is_node))


def shapes_of(value: Any) -> Any:
    """A value's structure and shapes, to compare: the structure holds a unit, if it has one."""
    return jax.tree.structure(value), [jnp.shape(leaf) for leaf in jax.tree.leaves(value)]


def show_type(value: Any) -> str:
    """A value's structure, shapes and dtypes in short: ``float32[3,4]``, ``{'a': int32[], 'b': (bool[2],)}``."""
    if value is UNSET:
        return "no value"
    leaves, treedef = jax.tree.flatten(value)
    return notation(treedef, map(show_leaf_type, leaves))


def show_range(value: Any) -> str:
    """An array by its type and the range of its numbers: ``float32[3] from -1 to 2``."""
    kind = show_type(jax.ShapeDtypeStruct(jnp.shape(value), jnp.result_type(value)))
    numbers = np.asarray(value) if jnp.issubdtype(jnp.result_type(value), jnp.number) else np.zeros(0)
    numbers = numbers[~np.isnan(numbers)] if np.isrealobj(numbers) else np.zeros(0)
    if not numbers.size:
        return kind
    low, high = float(numbers.min()), float(numbers.max())
    return f"{kind} {low:g}" if low == high else f"{kind} from {low:g} to {high:g}"


def broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether an array of one shape broadcasts to another."""
    sizes = zip(shape[::-1], to[::-1], strict=False)
    return len(shape) <= len(to) and all(size in (1, other) for size, other in sizes)
