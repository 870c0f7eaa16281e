"""Modules: plain Python objects whose attributes are states, other modules, containers and static values.

The attributes live in the ordinary instance dictionary. `__setattr__` does three things on the way there: an array
becomes a `Buffer` behind the attribute; what is assigned over a state is written to it; and a change of structure is
noted, so that a failing transform can undo it and compiled programs can notice it.
"""

from __future__ import annotations

import copyreg
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from mutatis.core import access, naming, transactions
from mutatis.core.calls import takes
from mutatis.core.containers import ContainerSnapshot
from mutatis.core.journal import ABSENT, Removed, put_back
from mutatis.core.nodes import Node, is_node
from mutatis.core.showing import show_class
from mutatis.core.statics import PLAIN, StaticObject, check_static, static_key
from mutatis.core.structure import Watch, structure, structure_lock
from mutatis.errors import ArgumentError, StaticAttributeError, StructureError
from mutatis.model.behind import install
from mutatis.model.kinds import Buffer
from mutatis.model.tree import tree_lines
from mutatis.model.variables import Variable
from mutatis.model.wrapped import Wrapped

M = TypeVar("M", bound="Module")
_flips = threading.RLock()  # so that an old value and the epoch's change from it belong together


class Module(Node):
    """Base class of models and layers. Assign states, modules and static values as attributes, in any order.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> class Counter(mu.Module):
      ...     def __init__(self):
      ...         self.count = mu.Variable(0)
      ...     def __call__(self):
      ...         self.count += 1
      ...         return self.count.value
      >>> counter = mu.jit(Counter())
      >>> [int(counter()) for _ in range(3)]
      [1, 2, 3]
    """

    __slots__ = ("__dict__", "__weakref__", "_bindings", "_birth", "_described", "_watched")
    _birth: Any  # weak reference to the raw JAX trace the module was made in; None for an ordinary one
    _bindings: Any  # what compiled programs know about this module as an argument; it dies with it
    _described: Any  # what the last walk over it found; likewise
    _watched: Watch | None  # None: nobody took this module's structure for granted

    def __new__(cls: type[M], *args: Any, **kwargs: Any) -> M:
        if (args or kwargs) and cls.__init__ is object.__init__:
            raise ArgumentError(
                f"`{cls.__name__}` has no `__init__`, and was given arguments",
                expected="no arguments",
                got=", ".join([*map(show_class, args), *(f"{name}=..." for name in kwargs)]),
                cure="Write an __init__, or have it made of the fields: "
                f"`@dataclasses.dataclass` in front of `class {cls.__name__}`.",
            )
        self = object.__new__(cls)
        object.__setattr__(self, "_watched", None)
        object.__setattr__(self, "_bindings", None)
        object.__setattr__(self, "_described", None)
        object.__setattr__(self, "_birth", access.birth())
        return self

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # `@dataclass` fills in what it does not find here; modules compare and hash by identity.
        for name in ("__eq__", "__hash__", "__repr__"):
            if name not in cls.__dict__:
                setattr(cls, name, getattr(cls, name))
        for hook in _on_new_class:
            hook(cls)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self) >> 4

    def __setattr__(self, name: str, value: Any) -> None:
        old = self.__dict__.get(name, ABSENT)
        if value is old:
            return
        if isinstance(old, Variable) and _is_array_like(value):
            old.set(value)
            return
        if isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)
            return
        self._set_structure(name, self._admit(name, value, old))

    def __delattr__(self, name: str) -> None:
        if name not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        self._set_structure(name, ABSENT)

    def _watch(self) -> Watch:
        """Have the changes of this module's structure noticed from now on (`cells.structure`)."""
        if self._watched is None:
            object.__setattr__(self, "_watched", Watch())
        watch: Watch = self._watched  # type: ignore[assignment]
        return watch

    def _set_structure(self, name: str, value: Any) -> None:
        """Set an attribute, or remove it, in a way that is not a write to a state."""
        if isinstance(value, Variable | Module) and value._birth is not None:
            access.check_outlived(self, name)
        tx = transactions.current()
        if tx is not None:
            old = self.__dict__.get(name, ABSENT)
            tx.journal.note(self, name, Removed(old, tuple(self.__dict__)) if value is ABSENT else old)
        if self._watched is None:
            put_back(self, name, value)
            if self._watched is None:  # nor did another thread begin to watch meanwhile
                return
        elif self._flip(name, value):
            return
        else:
            structure.changed()
            put_back(self, name, value)
        structure.changed()
        _disturb(self)

    def _flip(self, name: str, value: Any) -> bool:
        """Change an attribute that is a flag and stays one; whether it is."""
        with _flips:
            mark = structure.begin()
            difference = self._watch().difference(name, self.__dict__.get(name, ABSENT), value)
            if difference is None:
                return False
            put_back(self, name, value)
            structure.end(mark, difference)
        _disturb(self)
        return True

    def _admit(self, name: str, value: Any, old: Any) -> Any:
        """What is stored for a value; refuses what cannot be part of a model."""
        if isinstance(value, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            buffer = Buffer(value)
            buffer._behind = True
            install(type(self), name)
            return buffer
        if isinstance(value, StaticObject):
            install(type(self), name)
            return value
        if isinstance(value, Variable | Module | Wrapped):
            return value
        if isinstance(value, list | tuple | dict):
            self._check_container(name, value)
            return value
        check_static(value, type(self).__name__, name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            self._check_counting(name, value, old)
        return value

    def _check_counting(self, name: str, value: Any, old: Any) -> None:
        tx = transactions.current()
        if tx is None or not tx.compiled or not isinstance(old, int | float) or isinstance(old, bool):
            return
        if static_key(old) != static_key(value):
            raise StaticAttributeError(
                f"`{type(self).__name__}.{name}` is a plain number and was changed in a compiled function",
                path=f"{type(self).__name__}.{name}",
                where=naming.where(),
                expected=repr(old),
                got=repr(value),
                cure="It would compile another program on each call. Make it a state: "
                f"`self.{name} = mu.Variable({old!r})`, which `self.{name} += 1` then writes.",
            )

    def _check_container(self, name: str, value: Any, above: tuple[int, ...] = ()) -> None:
        if type(value) not in (list, tuple, dict) and not hasattr(value, "_fields"):
            raise StructureError(
                f"`{type(self).__name__}.{name}` is a {type(value).__name__}, whose states would not be seen",
                path=f"{type(self).__name__}.{name}",
                expected="a plain list, tuple or dict",
                got=type(value).__name__,
                cure=f"Use the plain container, or `self.{name} = mu.static(...)` for one without states.",
            )
        inside = (*above, id(value))
        for item in value.values() if isinstance(value, dict) else value:
            if isinstance(item, jax.Array | np.ndarray):
                owner = type(self).__name__
                raise StructureError(
                    f"`{owner}.{name}` is a {type(value).__name__} of bare arrays",
                    path=f"{owner}.{name}",
                    expected="Variables, Modules, static values, or containers of these",
                    got=show_class(item),
                    cure=f"Say what kind of state they are: `self.{name} = [mu.Param(x) for x in arrays]`, "
                    f"or hold them in one state: `self.{name} = mu.Variable(arrays)`.",
                )
            if isinstance(item, list | tuple | dict):
                if id(item) not in inside:  # else it holds itself
                    self._check_container(name, item, inside)
            elif not isinstance(item, Variable | Module | Wrapped | StaticObject):
                check_static(item, type(self).__name__, name)

    # -- mode ------------------------------------------------------------------------------------------------

    @property
    def mode(self) -> str:
        """``"train"`` or ``"eval"``: what dropout, batch norm and whatever listens go by."""
        return str(self.__dict__.get("_mode", "train"))

    @mode.setter
    def mode(self, mode: str) -> None:
        if mode not in ("train", "eval"):
            raise StructureError(
                f"`{type(self).__name__}.mode` cannot be {mode!r}",
                path=f"{type(self).__name__}.mode",
                expected='"train" or "eval"',
                got=repr(mode),
                cure="The attribute `mode` says how layers behave; give yours another name.",
            )
        if mode != self.mode:
            self._set_structure("_mode", "eval" if mode == "eval" else ABSENT)

    @takes("model.train()", _="Its opposite is `model.eval()`.")
    def train(self: M) -> M:
        """Set the mode of this module and all its submodules to ``"train"``."""
        return self._set_modes("train")

    def eval(self: M) -> M:
        """Set the mode of this module and all its submodules to ``"eval"``."""
        return self._set_modes("eval")

    def _set_modes(self: M, mode: str) -> M:
        modules = self._submodules()
        if transactions.current() is not None:
            for module in modules:
                module.mode = mode
            return self
        # All of them as one change: who toggles before each step waits for little else.
        with _flips:
            others = _flip_modes(modules, mode)
        _disturb(*others)
        return self

    def _submodules(self) -> list[Module]:
        """This module and all that it holds, walked over only if something has changed."""
        watch = self._watch()
        if watch.submodules is not None:
            shape, contents, references = watch.submodules
            if shape == structure.shape and contents.unchanged():
                return [module for reference in references if (module := reference()) is not None]
        shape = structure.shape
        pending: list[Any] = [self]
        seen: set[int] = set()
        modules: list[Module] = []
        containers: list[Any] = []
        while pending:
            item = pending.pop()
            if id(item) in seen:
                continue
            seen.add(id(item))
            if isinstance(item, Module):
                item._watch()
                modules.append(item)
                held = dict(item.__dict__)  # a copy: another thread may set an attribute
                pending.extend(v for k, v in held.items() if k not in type(item)._references_)
            elif isinstance(item, list | tuple | dict):
                if not isinstance(item, tuple):
                    containers.append(item)
                pending.extend(item.values() if isinstance(item, dict) else item)
            elif isinstance(item, Wrapped):
                pending.append(item.__wrapped__)
        if transactions.current() is None:  # else it would hold what containers hold only until the transaction ends
            watch.submodules = (shape, ContainerSnapshot(containers), list(map(weakref.ref, modules)))
        return modules

    # -- as a Python object ----------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for name, value in state.items():
            if type(value) in PLAIN:
                continue
            if (isinstance(value, Variable) and value._behind) or isinstance(value, StaticObject):
                install(type(self), name)

    def __reduce__(self) -> Any:
        return copyreg.__newobj__, (type(self),), self.__getstate__()  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        with structure_lock:
            return "\n".join(tree_lines(self, "", set()))


_on_new_class: list[Callable[[type[Module]], None]] = []


def for_each_class(hook: Callable[[type[Module]], None], *, later: bool = False) -> None:
    """Call a function with Module and each subclass made so far, and with those made later."""
    if later:
        _on_new_class.append(hook)
    pending = [Module]
    while pending:
        cls = pending.pop()
        hook(cls)
        pending.extend(cls.__subclasses__())


def _flip_modes(modules: list[Module], mode: str) -> list[Module]:
    # A function of its own, as `core.interrupts` says of loops under a lock.
    mark, difference = structure.begin(), 0
    others = [module for module in modules if ("_mode" in module.__dict__) != (mode == "eval")]
    for module in others:
        if mode == "eval":
            module.__dict__["_mode"] = mode
        else:
            del module.__dict__["_mode"]
        difference ^= module._watch().mode
    structure.end(mark, difference)
    return others


def _disturb(*modules: Module) -> None:
    """Tell who is tracing in another thread that these modules have changed."""
    if structure_lock.acquire(blocking=False):
        structure_lock.release()  # nobody is
        return
    for module in modules:
        module._watch().disturbances += 1


def _is_array_like(value: Any) -> bool:
    """Whether a value assigned over a state is written to it, and does not replace it."""
    if isinstance(value, list | tuple | dict):
        return not any(is_node(item) for item in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, jax.Array | np.ndarray | np.generic | bool | int | float | complex | jax.ShapeDtypeStruct)
