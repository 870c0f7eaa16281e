"""Attributes that stand for what is behind them: the array of a `Buffer`, the object of `mu.static`."""

from __future__ import annotations

import types
from typing import Any

from mutatis.core.journal import ABSENT
from mutatis.core.statics import StaticObject
from mutatis.errors import StructureError
from mutatis.model.variables import Variable


class _Behind:
    """A data descriptor over the instance dictionary that shows what is behind an attribute.

    A descriptor, not `__getattr__`: a class attribute of the same name (a dataclass default, a method) would hide the instance's.
    """

    def __init__(self, name: str, default: Any) -> None:
        self.name = name
        self.default = default  # what the class has under this name, and instances without an attribute of their own

    def __get__(self, obj: Any, owner: type) -> Any:
        value = self.default if obj is None else obj.__dict__.get(self.name, self.default)
        if isinstance(value, Variable):
            return value.get() if value._behind else value
        if isinstance(value, StaticObject):
            return value.value
        if value is ABSENT:
            raise AttributeError(
                f"type object {owner.__name__!r} has no attribute {self.name!r}"
                if obj is None
                else f"{owner.__name__!r} object has no attribute {self.name!r}"
            )
        if value is self.default and hasattr(type(value), "__get__"):
            return type(value).__get__(value, obj, owner)  # a method
        return value

    def __set__(self, obj: Any, value: Any) -> None:
        raise AssertionError("Module.__setattr__ stores attributes itself")

    def __delete__(self, obj: Any) -> None:
        raise AssertionError("Module.__delattr__ removes attributes itself")


def install(cls: type, name: str) -> None:
    """Have the attribute of this name, in instances of a class, show what is behind it.

    Raises:
      StructureError: Python itself uses the name for classes.
    """
    if hasattr(type(type.__dict__.get(name)), "__set__") or name in ("__module__", "__doc__", "__annotations__"):
        raise StructureError(
            f"`{cls.__name__}.{name}` cannot hold an array: Python uses the name for the class",
            path=f"{cls.__name__}.{name}",
            expected="another name",
            got=name,
            cure=f"`self.{name.strip('_')}_ = ...`",
        )
    default = class_attribute(cls, name)
    if not isinstance(default, _Behind):
        setattr(cls, name, _Behind(name, ABSENT if isinstance(default, types.MemberDescriptorType) else default))


def takes_assignment(cls: type, name: str) -> bool:
    """Whether a class has a property, or another descriptor of the user's, that takes what is assigned to an attribute."""
    found = class_attribute(cls, name)
    return found is not ABSENT and hasattr(type(found), "__set__") and not isinstance(found, _Behind)


def class_attribute(cls: type, name: str) -> Any:
    """What a class has under a name, itself: `getattr` would ask descriptors for what they stand for."""
    for base in cls.__mro__:
        if name in base.__dict__:
            return base.__dict__[name]
    return ABSENT
