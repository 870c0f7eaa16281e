"""Attributes that modules of other libraries have, and ours do not: to ask for one says what is written here.

They are descriptors that raise, as what is missing does: `hasattr` says no, and whatever an instance, a subclass or another base
class has under the name comes first. (A ``__getattr__`` would slow down each look at a module, and hide errors of properties.)
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from mutatis._equivalents import EQUIVALENTS, missing_attribute


class Elsewhere:
    """An attribute of other libraries' classes.

    Args:
      place: under which `EQUIVALENTS` has it.
      name: its name.
    """

    def __init__(self, place: str, name: str) -> None:
        self._place = place
        self._name = name

    def __get__(self, obj: Any, owner: type) -> Any:
        raise self.missing(owner, of_class=obj is None)

    def missing(self, owner: type, *, of_class: bool = False) -> AttributeError:
        """The error that says what is written instead."""
        return missing_attribute(self._place, owner.__name__, self._name, of_class=of_class)


class Setting(Elsewhere):
    """An attribute that people set on other libraries' objects, and that would change nothing here: `admit` refuses it.

    A subclass may have an attribute of this name.
    """


def install(cls: type, place: str, settings: Collection[str] = ()) -> None:
    """Give a class the attributes that `EQUIVALENTS` has at a place, but for those that it has itself.

    Args:
      cls: the class.
      place: the place.
      settings: those that people would set.
    """
    for name in EQUIVALENTS[place]:
        if name not in cls.__dict__:
            setattr(cls, name, Setting(place, name) if name in settings else Elsewhere(place, name))


def step_aside(cls: type) -> None:
    """Have a new class inherit what other bases have under such names."""
    for place in ("Module", "Optimizer"):
        for name in EQUIVALENTS[place]:
            found = [base.__dict__[name] for base in cls.__mro__ if name in base.__dict__]
            own = next((item for item in found if not isinstance(item, Elsewhere)), None)
            if own is not None and isinstance(found[0], Elsewhere):
                setattr(cls, name, own)
