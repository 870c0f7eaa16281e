"""Attributes: what may be an attribute of a module, and what is stored for it.

States, modules and transformed functions are stored as they are. An array, or another registered pytree that
holds arrays, becomes a `Buffer` behind the attribute. Everything else is static, and refused if it cannot be.
"""

from __future__ import annotations

import inspect
from typing import Any

import jax
import numpy as np

from mutatis.core import naming, transactions
from mutatis.core.nodes import Reference, is_node
from mutatis.core.showing import show_class
from mutatis.core.statics import PLAIN, StaticObject, check_static, static_key
from mutatis.errors import StaticAttributeError, StructureError
from mutatis.model.behind import install
from mutatis.model.elsewhere import Setting
from mutatis.model.kinds import Buffer
from mutatis.model.strangers import door, refuse_stranger

ARRAYS = jax.Array | np.ndarray | jax.ShapeDtypeStruct


def admit(owner: type, name: str, value: Any, old: Any) -> Any:
    """What is stored for a value that is assigned to an attribute.

    Args:
      owner: the module's class.
      name: the attribute.
      value: the value.
      old: what is stored now.

    Raises:
      StaticAttributeError: it is static and cannot be, or a number that changes inside a compiled transform.
      StructureError: a container cannot be part of a model, or holds bare arrays.
      AttributeError: to set it would change nothing: `optimizer.lr`.
    """
    if isinstance(setting := owner.__dict__.get(name), Setting):
        raise setting.missing(owner)
    if type(value) not in PLAIN:
        if isinstance(value, ARRAYS):
            return _behind(owner, name, value)
        if isinstance(value, StaticObject):
            install(owner, name)
            return value
        if is_node(value) or isinstance(value, Reference):
            return value
        if isinstance(value, list | tuple | dict):
            check_container(owner, name, value)
            return value
        refuse_stranger(owner, name, value)
        if holds_arrays(value):
            return _behind(owner, name, value)
        check_static(value, owner.__name__, name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        _check_counting(owner, name, value, old)
    return value


def _behind(owner: type, name: str, value: Any) -> Buffer:
    buffer = Buffer(value)
    buffer._behind = True
    install(owner, name)
    return buffer


def _is_pytree_of_arrays(item: Any) -> bool:
    return (
        type(item) not in PLAIN
        and not isinstance(item, list | tuple | dict)
        and door(item) is None
        and holds_arrays(item)
    )


def holds_arrays(value: Any) -> bool:
    """Whether a value is a registered pytree with arrays among its leaves, or of numbers and cannot be static: with a unit."""
    if jax.tree_util.default_registry.flatten_one_level(value) is None:
        return False  # a leaf
    leaves = jax.tree.leaves(value, is_leaf=is_node)
    if any(isinstance(leaf, ARRAYS) for leaf in leaves):
        return True
    numbers = bool(leaves) and all(isinstance(leaf, int | float | complex | np.number) for leaf in leaves)
    return numbers and not isinstance(value, list | tuple | dict) and type(value).__hash__ is None


def _check_counting(owner: type, name: str, value: Any, old: Any) -> None:
    tx = transactions.current()
    if tx is not None and tx.compiled and not isinstance(old, int | float):
        old = inspect.getattr_static(owner, name, old)  # a default of the class
    if tx is None or not tx.compiled or not isinstance(old, int | float) or isinstance(old, bool):
        return
    if static_key(old) != static_key(value):
        raise StaticAttributeError(
            f"`{owner.__name__}.{name}` is a plain number and was changed in a compiled function",
            path=f"{owner.__name__}.{name}",
            where=naming.where(),
            expected=repr(old),
            got=repr(value),
            cure="It would compile another program on each call. Make it a state: "
            f"`self.{name} = mu.Variable({old!r})`, which `self.{name} += 1` then writes.",
        )


def check_container(owner: type, name: str, value: Any, above: tuple[int, ...] = ()) -> None:
    """Raise unless a list, tuple or dict may be an attribute.

    Raises:
      StructureError: it is of another class than these, or holds bare arrays.
      StaticAttributeError: it holds something that cannot be static.
    """
    if type(value) not in (list, tuple, dict) and not is_namedtuple(value):
        raise StructureError(
            f"`{owner.__name__}.{name}` is a {type(value).__name__}, whose states would not be seen",
            path=f"{owner.__name__}.{name}",
            expected="a plain list, tuple or dict",
            got=type(value).__name__,
            cure=f"Use the plain container, or `self.{name} = mu.static(...)` for one without states.",
        )
    inside = (*above, id(value))
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, jax.Array | np.ndarray) or (not is_node(item) and _is_pytree_of_arrays(item)):
            raise StructureError(
                f"`{owner.__name__}.{name}` is a {type(value).__name__} of bare arrays",
                path=f"{owner.__name__}.{name}",
                expected="Variables, Modules, static values, or containers of these",
                got=show_class(item),
                cure=f"Say what kind of state they are: `self.{name} = [mu.Param(x) for x in arrays]`, "
                f"or hold them in one state: `self.{name} = mu.Variable(arrays)`.",
            )
        if isinstance(item, list | tuple | dict):
            if id(item) not in inside:  # else it holds itself
                check_container(owner, name, item, inside)
        elif not is_node(item) and not isinstance(item, StaticObject | Reference):
            refuse_stranger(owner, name, item)
            check_static(item, owner.__name__, name)


def is_namedtuple(value: Any) -> bool:
    """Whether a value is a named tuple."""
    return isinstance(value, tuple) and hasattr(type(value), "_fields")
