"""Attributes that stand for what is behind them: the array of a `Buffer`, the object of `mu.static`."""

from __future__ import annotations

import types
from typing import Any

from mutatis.core.journal import ABSENT
from mutatis.core.statics import StaticObject
from mutatis.model.variables import Variable


class _Behind:
    """A data descriptor over the instance dictionary that shows what is behind an attribute.

    A descriptor, not `__getattr__`: a class attribute of the same name (a dataclass default) would hide the instance's.
    """

    def __init__(self, name: str, default: Any) -> None:
        self.name = name
        self.default = default

    def __get__(self, obj: Any, owner: type) -> Any:
        if obj is None:
            if self.default is ABSENT:
                raise AttributeError(f"type object {owner.__name__!r} has no attribute {self.name!r}")
            return self.default
        value = obj.__dict__.get(self.name, self.default)
        if isinstance(value, Variable):
            return value.get() if value._behind else value
        if isinstance(value, StaticObject):
            return value.value
        if value is ABSENT:
            raise AttributeError(f"{type(obj).__name__!r} object has no attribute {self.name!r}")
        return value

    def __set__(self, obj: Any, value: Any) -> None:
        raise AssertionError("Module.__setattr__ stores attributes itself")

    def __delete__(self, obj: Any) -> None:
        raise AssertionError("Module.__delattr__ removes attributes itself")


def install(cls: type, name: str) -> None:
    """Have the attribute of this name, in instances of a class, show what is behind it."""
    if not isinstance(cls.__dict__.get(name), _Behind):
        default = getattr(cls, name, ABSENT)
        if isinstance(default, types.MemberDescriptorType):
            default = ABSENT
        setattr(cls, name, _Behind(name, default))
