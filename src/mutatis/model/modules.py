"""Modules: plain Python objects whose attributes are states, other modules, containers and static values.

The attributes live in the ordinary instance dictionary. `__setattr__` does three things on the way there: an array
becomes a `Buffer` behind the attribute (`attributes`); what is assigned over a state is written to it; and a change of structure
is noted, so that a failing transform can undo it and compiled programs can notice it.

A user's class may have attributes and methods of any name. So the class `Module` has none but `train`, `eval` and `training`:
what the library does with modules are functions, and what it keeps about one is in slots that no name leads to (`_hide`).
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
from mutatis.core.showing import show_class, show_value
from mutatis.core.statics import PLAIN, StaticObject
from mutatis.core.structure import Watch, structure, structure_lock
from mutatis.errors import ArgumentError, StructureError
from mutatis.model import cached, elsewhere
from mutatis.model.attributes import admit, holds_arrays
from mutatis.model.behind import install, takes_assignment
from mutatis.model.variables import Variable
from mutatis.model.wrapped import Wrapped

M = TypeVar("M", bound="Module")
_flips = threading.RLock()  # so that an old value and the epoch's change from it belong together


class Module(Node):
    """Base class of models and layers.

    In `__init__`, assign states, other modules, arrays and settings as attributes, in any order. Mutatis finds all states in
    them, also inside lists, tuples and dicts. Define `__call__` for the forward pass, and other methods as you like. Transforms
    such as `mu.jit` and `mu.grad` take a module as an argument, or find it where the function uses a variable from outside.

    An assigned array becomes a state of kind `Buffer`. You read and assign the attribute as an array, and ``mu.variables(model)``
    lists the state behind it. Numbers, strings and functions are static settings: when one changes, a jitted function compiles
    another program.

    The attribute `training` (True at first) selects the behaviour of layers that differ between training and evaluation, such as
    dropout and batch normalization. `train()` and `eval()` set it on a module and on all modules inside it.

    Raises:
      StructureError: a subclass declares `__slots__`.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> class Net(mu.Module):
      ...     def __init__(self, rngs):
      ...         self.hidden = mu.nn.Linear(3, 8, rngs=rngs)
      ...         self.out = mu.nn.Linear(8, 1, rngs=rngs)
      ...         self.calls = mu.Variable(0)
      ...     def __call__(self, x):
      ...         self.calls += 1
      ...         return self.out(mu.nn.relu(self.hidden(x)))
      >>> net = Net(mu.Rngs(0))
      >>> forward = mu.jit(net)
      >>> forward(jnp.ones((4, 3))).shape, int(net.calls)
      ((4, 1), 1)
    """

    __slots__ = ("__dict__", "__weakref__", "bindings", "birth", "described", "kept", "watch")

    training: bool = True

    def __new__(cls: type[M], /, *args: Any, **kwargs: Any) -> M:
        if (args or kwargs) and cls.__init__ is object.__init__:
            raise ArgumentError(
                f"`{cls.__name__}` has no `__init__`, and was given arguments",
                expected="no arguments",
                got=", ".join([*map(show_class, args), *(f"{name}=..." for name in kwargs)]),
                cure="Write an __init__, or have it made of the fields: "
                f"`@dataclasses.dataclass` in front of `class {cls.__name__}`.",
            )
        return new_module(cls)

    def __init_subclass__(cls, /, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.__dict__.get("__slots__"):
            raise StructureError(
                f"`{cls.__name__}` declares `__slots__`, which would hold states where they are not seen",
                path=cls.__name__,
                expected="a class whose attributes are in the instance dictionary",
                got=f"__slots__ = {cls.__dict__['__slots__']!r}",
                cure="Leave out `__slots__`, or `slots=True` of `@dataclass`.",
            )
        # `@dataclass` fills in what it does not find here; modules compare and hash by identity.
        for name in ("__eq__", "__hash__", "__repr__"):
            if name not in cls.__dict__:
                setattr(cls, name, getattr(cls, name))
        cached.adopt(cls, _kept_of)
        elsewhere.step_aside(cls)
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
        kind = type(self)
        if name == "__class__":
            _set_class(self, value)
            return
        if takes_assignment(kind, name):
            object.__setattr__(self, name, value)
            return
        if name == "training":
            _set_flag(self, value)
            return
        set_attribute(self, name, admit(kind, name, value, old))

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__:
            set_attribute(self, name, ABSENT)
        elif takes_assignment(type(self), name):
            object.__delattr__(self, name)
        elif _kept_of(self).pop(name, None) is None:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @takes("model.train()", _="Its opposite is `model.eval()`.")
    def train(self: M) -> M:
        """Set `training` to True on this module and on all modules inside it, and return the module."""
        _set_training(self, True)
        return self

    def eval(self: M) -> M:
        """Set `training` to False on this module and on all modules inside it, and return the module."""
        _set_training(self, False)
        return self

    # -- as a Python object ----------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        fill(self, state)

    def __reduce__(self) -> Any:
        given = getattr(type(self), "__getnewargs__", None)
        arguments = () if given is None else given(self)
        return copyreg.__newobj__, (type(self), *arguments), self.__getstate__()  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        from mutatis.model.tree import show_module  # few programs show a model

        return show_module(self)

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        from mutatis.model.treescoped import render_module

        return render_module(self, path, subtree_renderer)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        # Not `_repr_html_`: treescope would show that below its own rendering.
        from mutatis.model.tree import bundle_of_module

        return bundle_of_module(self)


def _hide(name: str) -> tuple[Callable[[Any], Any], Callable[[Any, Any], None]]:
    """Take the name of a slot from the class: how to read it, and how to write it."""
    slot = Module.__dict__[name]
    delattr(Module, name)
    return slot.__get__, slot.__set__


birth_of, _set_birth = _hide(
    "birth"
)  # weak reference to the raw JAX trace the module was made in; None for an ordinary one
bindings_of, _set_bindings = _hide(
    "bindings"
)  # what compiled programs know about the module as an argument; dies with it
described_of, set_described = _hide("described")  # what the last walk over it found; likewise
_get_kept, _set_kept = _hide("kept")  # values of cached properties
_get_watch, _set_watch = _hide("watch")  # None: nobody took the module's structure for granted


elsewhere.install(Module, "Module")


def new_module(cls: type[M]) -> M:
    """A module without attributes, whatever the constructors of its class do."""
    self = object.__new__(cls)
    _set_birth(self, access.birth())
    _set_bindings(self, None)
    set_described(self, None)
    _set_kept(self, None)
    _set_watch(self, None)
    return self


def fill(module: Module, attributes: dict[str, Any]) -> None:
    """Give a module that was made just now its attributes, as they are stored."""
    module.__dict__.update(attributes)
    for name, value in attributes.items():
        if type(value) in PLAIN:
            continue
        if (isinstance(value, Variable) and value._behind) or isinstance(value, StaticObject):
            install(type(module), name)


def _kept_of(module: Module) -> cached.Kept:
    """The values of a module's cached properties."""
    kept: cached.Kept | None = _get_kept(module)
    if kept is None:
        kept = {}
        _set_kept(module, kept)
    return kept


def known_bindings(owner: Any) -> weakref.WeakKeyDictionary[Any, dict[Any, Any]]:
    """What compiled programs know about a module or a transformed function as an argument."""
    if isinstance(owner, Module):
        if bindings_of(owner) is None:
            _set_bindings(owner, weakref.WeakKeyDictionary())
        return bindings_of(owner)  # type: ignore[no-any-return]
    if owner._bindings is None:
        owner._bindings = weakref.WeakKeyDictionary()
    return owner._bindings  # type: ignore[no-any-return]


# -- changes of structure ------------------------------------------------------------------------------------------


def watch_of(module: Module) -> Watch:
    """Have the changes of a module's structure noticed from now on (`core.structure`)."""
    watch: Watch | None = _get_watch(module)
    if watch is None:
        watch = Watch()
        _set_watch(module, watch)
    return watch


def set_attribute(module: Module, name: str, value: Any) -> None:
    """Set what is stored for an attribute, or remove it (`ABSENT`), in a way that is not a write to a state."""
    if is_node(value) and (value._birth if isinstance(value, Variable) else _birth(value)) is not None:
        access.check_outlived(type(module).__name__, birth_of(module), name)
    tx = transactions.current()
    if tx is not None:
        old = module.__dict__.get(name, ABSENT)
        tx.journal.note(module, name, Removed(old, tuple(module.__dict__)) if value is ABSENT else old)
    if _get_watch(module) is None:
        put_back(module, name, value)
        if _get_watch(module) is None:  # nor did another thread begin to watch meanwhile
            return
    elif _flip(module, name, value):
        return
    else:
        _disturb(module)  # before the change and after it: who traces may look in between
        structure.changed(watch_of(module))
        put_back(module, name, value)
    structure.changed(watch_of(module))
    _disturb(module)


def _birth(value: Any) -> Any:
    return birth_of(value) if isinstance(value, Module) else None


def _set_class(module: Module, kind: type) -> None:
    """Give a module another class, with what programs took for granted of it."""
    if transactions.current() is not None:
        raise StructureError(
            f"a module of `{type(module).__name__}` was given another class in a transform or transaction",
            path=type(module).__name__,
            where=naming.where(),
            expected="changes of attributes",
            got=f"the class `{kind.__name__}`",
            cure="Give it the class before; what a model is to do next is an attribute of it: `self.mode = 'test'`.",
        )
    _disturb(module)
    structure.changed(watch_of(module))
    object.__setattr__(module, "__class__", kind)
    structure.changed(watch_of(module))
    _disturb(module)


def _flip(module: Module, name: str, value: Any) -> bool:
    """Change an attribute that is a flag and stays one; whether it is."""
    with _flips:
        watch = watch_of(module)
        begun = structure.begin(watch)
        difference = watch.difference(name, module.__dict__.get(name, ABSENT), value)
        if difference is None:
            return False
        _disturb(module)
        put_back(module, name, value)
        structure.end(begun, difference, watch)
    _disturb(module)
    return True


def _disturb(*modules: Module) -> None:
    """Tell who is tracing in another thread that these modules have changed."""
    if structure_lock.acquire(blocking=False):
        structure_lock.release()  # nobody is
        return
    for module in modules:
        watch_of(module).disturbances += 1


# -- training ------------------------------------------------------------------------------------------------------


def is_training(module: Module) -> bool:
    """What `training` of a module is; a class may have something else of its own under that name."""
    value = module.__dict__.get("training", type(module).training)
    return value if isinstance(value, bool) else True


def _set_flag(module: Module, value: Any) -> None:
    """Assign to `training`, which has one form for each value: what the class says is not stored."""
    if not isinstance(value, bool | np.bool_):
        raise StructureError(
            f"`{type(module).__name__}.training` cannot be {show_value(value)}",
            path=f"{type(module).__name__}.training",
            expected="True or False",
            got=show_class(value),
            cure="The attribute `training` says how layers behave, and `train()` and `eval()` set it; give yours another name.",
        )
    if bool(value) != is_training(module):
        set_attribute(module, "training", ABSENT if type(module).training is bool(value) else bool(value))


def _set_training(root: Module, training: bool) -> None:
    # A class may have something of its own under the name.
    modules = [m for m in _submodules(root) if isinstance(type(m).training, bool)]
    if transactions.current() is not None:
        for module in modules:
            _set_flag(module, training)
        return
    # All of them as one change: who toggles before each step waits for little else.
    with _flips:
        others = _flip_training(modules, training)
    _disturb(*others)


def _flip_training(modules: list[Module], training: bool) -> list[Module]:
    # A function: from CPython 3.12 on an interrupt in a loop directly inside `with` may leave the lock locked.
    others = [m for m in modules if m.__dict__.get("training", type(m).training) is not training]
    watches = [watch_of(module) for module in others]
    begun, difference = structure.begin(*watches), 0
    for module in others:
        if type(module).training is training:
            del module.__dict__["training"]
        else:
            module.__dict__["training"] = training
        difference ^= watch_of(module).training
    structure.end(begun, difference, *watches)
    return others


def _submodules(root: Module) -> list[Module]:
    """A module and all that it holds, walked over only if something has changed."""
    watch = watch_of(root)
    if watch.submodules is not None:
        shape, contents, references = watch.submodules
        if shape == structure.shape and contents.unchanged():
            return [module for reference in references if (module := reference()) is not None]
    shape = structure.shape
    pending: list[Any] = [root]
    seen: set[int] = set()
    modules: list[Module] = []
    containers: list[Any] = []
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Module):
            watch_of(item)
            modules.append(item)
            pending.extend(dict(item.__dict__).values())  # a copy: another thread may set an attribute
        elif isinstance(item, list | tuple | dict):
            if not isinstance(item, tuple):
                containers.append(item)
            pending.extend(item.values() if isinstance(item, dict) else item)
        elif isinstance(item, Wrapped):
            pending.append(item.__wrapped__)
    if transactions.current() is None:  # else it would hold what containers hold only until the transaction ends
        watch.submodules = (shape, ContainerSnapshot(containers), list(map(weakref.ref, modules)))
    return modules


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


def _is_array_like(value: Any) -> bool:
    """Whether a value assigned over a state is written to it, and does not replace it."""
    if isinstance(value, list | tuple | dict):
        return not any(is_node(item) for item in (value.values() if isinstance(value, dict) else value))
    if isinstance(value, jax.Array | np.ndarray | np.generic | bool | int | float | complex | jax.ShapeDtypeStruct):
        return True
    return type(value) not in PLAIN and not is_node(value) and holds_arrays(value)
