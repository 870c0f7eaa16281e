"""`flax.nnx`: `FromNnx` holds what `nnx.split` gives, `ToNnx` holds a module's states as `nnx.Variable`s.

Both libraries have mutable objects in front and a graph definition with values behind. So each call through a door is the
other library's merge, the call, and its split. A stream of `nnx.Rngs` and a `mu.RngState` are the same thing, a key and
a count that give ``fold_in(key, count)``, and one stands for the other.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax

from mutatis import _homes
from mutatis._packages import require
from mutatis.core.naming import show_path
from mutatis.interop import bridge
from mutatis.model.filters import Path
from mutatis.model.kinds import BatchStat, Buffer, Cache, Intermediate, Param, Perturbation, RngState
from mutatis.model.modules import Module
from mutatis.model.operations import merge
from mutatis.model.state import State
from mutatis.model.variables import Variable

nnx = require("flax.nnx", "mu.interop")

__all__ = ["FromNnx", "ToNnx"]

_Module: Any = nnx.Module
_KINDS: dict[Any, type[Variable]] = {
    nnx.Param: Param,
    nnx.BatchStat: BatchStat,
    nnx.Cache: Cache,
    nnx.Perturbation: Perturbation,
    nnx.Intermediate: Intermediate,
}
_FLAGS = ("deterministic", "use_running_average")  # that `nnx.Module.eval` sets


class FromNnx(Module):
    """A `flax.nnx` module as a part of a Mutatis model.

    Each `nnx.Variable` becomes a state, at the path that NNX gives it and of the kind with the same meaning. For a subclass, its
    name becomes a tag: ``mu.state(model, "LoRAParam")``. For another type, it is the kind whose collection is the registered name
    of the type. A random stream becomes one `RngState`, which draws the same keys as in NNX. Arrays become `Buffer`s. A shared
    variable stays one state. Changes that a call makes to the NNX module, such as new variables and attributes, are there in the
    next call.

    Attributes and methods of the NNX module are reached as in NNX: ``net.init_cache(shape)`` calls a method,
    ``net.decode = True`` sets an attribute, ``net.kernel`` is a state, and ``net.layers[0]`` is a part that is used in the same
    way. Names that `FromNnx` itself has, such as `variables`, come first.

    Args:
      module: the NNX module. It is copied; the attribute `module` returns it.

    Attributes:
      variables: the states in nested dictionaries, ``variables["layers"][0]["kernel"]``.
      graphdef: the `nnx.GraphDef`.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> from flax import nnx
      >>> net = mu.interop.FromNnx(nnx.Linear(5, 3, rngs=nnx.Rngs(0)))
      >>> mu.jit(net)(jnp.ones((2, 5))).shape, net.variables["kernel"].shape
      ((2, 3), (5, 3))
      >>> net.out_features, net.kernel is net.variables["kernel"]
      (3, True)
    """

    def __init__(self, module: Any) -> None:
        self.graphdef, state = nnx.split(module)
        self.variables = bridge.nest({path: make(value) for path, (make, value) in _found(state).items()})

    @property
    def module(self) -> Any:
        """An NNX module with the present values."""
        return self._merged({path: cell.value for path, cell in bridge.flatten(self.variables).items()})

    def __call__(self, /, *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
        """Call the NNX module, after `eval()` in its evaluation mode, and otherwise in the mode in which it was made.

        Args:
          *args: its arguments.
          method: the name of the method to call.
          **kwargs: its keyword arguments.

        Returns:
          The result of the NNX module.
        """
        return self._run(lambda module: getattr(module, method)(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "graphdef" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return _through(self, (name,))

    def __setattr__(self, name: str, value: Any) -> None:
        own = (
            name.startswith("_")
            or name in self.__dict__
            or hasattr(type(self), name)
            or "graphdef" not in self.__dict__
        )
        if own or name == "variables" or not hasattr(_look(self, ()), name):
            super().__setattr__(name, value)
        else:
            _assign(self, (name,), value)

    def _run(self, function: Callable[[Any], Any]) -> Any:
        """Call a function of the NNX module, and keep what it does to it."""

        def pure(values: dict[Path, Any]) -> Any:
            module = self._merged(values)
            with _evaluating(module) if not self.training else contextlib.nullcontext():
                out = function(module)
            graphdef, state = nnx.split(module)
            found = _found(state)
            return (out, graphdef, found), {path: value for path, (_, value) in found.items()}

        cells = bridge.flatten(self.variables)
        (out, graphdef, found), _ = bridge.call(cells, pure, evaluate=not self.training)
        if graphdef != self.graphdef:
            new = {path: cells[path] if path in cells else make(value) for path, (make, value) in found.items()}
            self.graphdef, self.variables = graphdef, bridge.nest(new)
        return out

    def _merged(self, values: dict[Path, Any]) -> Any:
        flat: dict[Path, Any] = {}
        for path, cell in bridge.flatten(self.variables).items():
            value = values[path]
            flat.update({(*path, part): value[part] for part in value} if isinstance(cell, RngState) else {path: value})
        return nnx.merge(self.graphdef, nnx.from_flat_state(flat))


class NnxPart:
    """A part of the NNX module in a `FromNnx`: its attributes, items, calls and methods are the module's own, with their writes.

    It says where in the module the part is, and holds nothing.
    """

    __slots__ = ("_owner", "_path")

    def __init__(self, owner: FromNnx, path: Path) -> None:
        object.__setattr__(self, "_owner", owner)
        object.__setattr__(self, "_path", path)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return _through(self._owner, (*self._path, name))

    def __setattr__(self, name: str, value: Any) -> None:
        _assign(self._owner, (*self._path, name), value)

    def __getitem__(self, key: Any) -> Any:
        part = _look(self._owner, self._path)
        return _through(self._owner, (*self._path, range(len(part))[key] if isinstance(key, int) else key))

    def __len__(self) -> int:
        return len(_look(self._owner, self._path))

    def __iter__(self) -> Iterator[Any]:
        part = _look(self._owner, self._path)
        keys = range(len(part)) if isinstance(part, nnx.List | list | tuple) else list(part)
        return iter([self[key] for key in keys] if isinstance(keys, range) else keys)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return self._owner._run(lambda module: _walk(module, self._path)(*args, **kwargs))

    def __repr__(self) -> str:
        return f"NnxPart({show_path(self._path)}: {type(_look(self._owner, self._path)).__name__})"


def _walk(module: Any, path: Path) -> Any:
    """What an NNX module has at a path of attributes and items."""
    for part in path:
        module = getattr(module, part) if isinstance(part, str) and hasattr(module, part) else module[part]
    return module


def _look(owner: FromNnx, path: Path) -> Any:
    """What the NNX module has at a path, to see what it is: the values of its states are not there."""
    cells = bridge.flatten(owner.variables)
    nothing = {at: {"key": 0, "count": 0} if isinstance(cell, RngState) else 0 for at, cell in cells.items()}
    return _walk(owner._merged(nothing), path)


def _through(owner: FromNnx, path: Path) -> Any:
    """An attribute or item of the NNX module: a state, a method that runs with its writes, a part, or a static value."""
    cells = bridge.flatten(owner.variables)
    if path in cells:
        return cells[path]
    *inner, name = path
    module = _look(owner, ())
    holder = _walk(module, tuple(inner))

    def call(*args: Any, **kwargs: Any) -> Any:
        return owner._run(lambda module: getattr(_walk(module, tuple(inner)), name)(*args, **kwargs))

    static = inspect.getattr_static(type(holder), name, None) if isinstance(name, str) else None
    if isinstance(static, property):
        return owner._run(lambda module: getattr(_walk(module, tuple(inner)), name))
    try:
        found = _walk(holder, (name,))
    except (AttributeError, TypeError):
        raise AttributeError(
            f"{type(owner).__name__!r} object has no attribute {name!r}, and the {type(holder).__name__} of NNX has none"
        ) from None
    if static is not None and callable(found) and name not in vars(holder):
        return functools.wraps(found)(call)
    if isinstance(found, nnx.Variable):  # one that is shared has its state at its first path
        return next(cell for at, cell in cells.items() if _holds(module, at, found))
    inside = isinstance(found, nnx.Pytree) or any(at[: len(path)] == path for at in cells)
    return NnxPart(owner, path) if inside else found


def _holds(module: Any, path: Path, variable: Any) -> bool:
    return _walk(module, path) is variable


def _assign(owner: FromNnx, path: Path, value: Any) -> None:
    """Set an attribute of the NNX module; a value for a state is written to it."""
    cell = bridge.flatten(owner.variables).get(path)
    if cell is not None and not isinstance(value, nnx.Variable):
        cell.value = value
    else:
        owner._run(lambda module: setattr(_walk(module, path[:-1]), path[-1], value))


@contextlib.contextmanager
def _evaluating(module: Any) -> Iterator[None]:
    """An NNX module in its evaluation mode, which it leaves as it entered it."""
    parts = [part for _, part in nnx.iter_modules(module)]
    flags = [(part, name, getattr(part, name)) for part in parts for name in _FLAGS if hasattr(part, name)]
    module.eval()
    yield
    for part, name, flag in flags:
        setattr(part, name, flag)


def _found(state: Any) -> dict[Path, tuple[Callable[[Any], Variable], Any]]:
    """For each state of an NNX module how to make it, and its value."""
    flat = dict(nnx.to_flat_state(state))
    found: dict[Path, tuple[Callable[[Any], Variable], Any]] = {}
    for path, variable in flat.items():
        other = flat.get((*path[:-1], "count" if path[-1] == "key" else "key"))
        value = variable.get_value() if isinstance(variable, nnx.Variable) else variable
        if isinstance(variable, nnx.RngKey) and isinstance(other, nnx.RngCount):
            tag = variable.get_metadata().get("tag", "default")
            found[path[:-1]] = (_maker(RngState, tag=tag), {"key": value, "count": other.get_value()})
        elif not (isinstance(variable, nnx.RngCount) and isinstance(other, nnx.RngKey)):
            found[path] = (_maker_of(variable), value)
    return found


def _maker_of(variable: Any) -> Callable[[Any], Variable]:
    if not isinstance(variable, nnx.Variable) or isinstance(variable, nnx.RngState):
        return Buffer
    metadata = variable.get_metadata()
    options = {"sharding": metadata.get("out_sharding", metadata.get("sharding_names"))}
    kind = type(variable)
    if kind is nnx.Variable:
        return _maker(Variable, **options)
    base = next((base for base in kind.__mro__ if base in _KINDS), None)
    if base is None:
        return _maker(bridge.kind_of(nnx.variable_name_from_type(kind, allow_register=True)), **options)
    return _maker(_KINDS[base], **options) if base is kind else _maker(_KINDS[base], **options, tag=kind.__name__)


def _maker(kind: type[Variable], **options: Any) -> Callable[[Any], Variable]:
    return lambda value: kind(value, **options)


class ToNnx(_Module):
    """A Mutatis module as a `flax.nnx.Module`.

    Its states are `nnx.Variable`s at their paths, of the type that is registered for the collection of their kind: `nnx.Param`,
    `nnx.BatchStat`, and so on; for other collections a type is registered. Random streams are `nnx.RngStream`s, so `nnx.reseed`
    and `nnx.split_rngs` find them. A call updates the states in place, as in NNX.

    Args:
      model: the module, whose states all have values; it is copied.

    Attributes:
      variables: the variables in nested dictionaries, ``variables["layers"]["0"]["kernel"]``.
      deterministic: whether `training` is False in the calls of the module; ``train()`` and ``eval()`` of NNX set it.
      intermediates: the values that `mu.sow` kept in the last call, as `nnx.Intermediate`s.

    Raises:
      DeferredStateError: a state has no value yet.
      StructureError: a call changes the structure of the module.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> from flax import nnx
      >>> net = mu.interop.ToNnx(mu.nn.Linear(5, 3, rngs=mu.Rngs(0)))
      >>> grads = nnx.grad(lambda net, x: net(x).sum())(net, jnp.ones((2, 5)))
      >>> grads["variables"]["bias"].get_value().tolist()
      [2.0, 2.0, 2.0]
    """

    def __init__(self, model: Module) -> None:
        parts = bridge.take_created(model, "ToNnx")
        self.definition = parts.definition
        self.deterministic = False
        names = bridge.named(parts.values)
        variables = {}
        for path, value in parts.values.items():
            if path in parts.streams:
                variable = nnx.RngStream(value["key"], tag=parts.streams[path])
                variable.count.set_value(value["count"])
            else:
                base = nnx.Param if path in parts.trained else nnx.Variable
                variable = nnx.variable_type_from_name(parts.collections[path], base=base, allow_register=True)(value)
            variables[names[path]] = variable
        self.variables = nnx.data(bridge.nest(variables))

    def __call__(self, /, *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
        """Call the module.

        Args:
          *args: its arguments.
          method: the name of the method to call.
          **kwargs: its keyword arguments.

        Returns:
          The result of the module.
        """
        held = {path: bridge.fetch(self.variables, name) for path, name in bridge.named(self.definition.paths).items()}
        values = {path: _value(variable) for path, variable in held.items()}
        done = bridge.run(
            "ToNnx",
            lambda: merge(self.definition, State(values)),
            lambda model: getattr(model, method)(*args, **kwargs),
            evaluate=self.deterministic,
        )
        for path, new in done.after.values.items():
            if bridge.same(values[path], new):
                continue
            if isinstance(held[path], nnx.RngStream):
                held[path].count.set_value(new["count"])
            else:
                held[path].set_value(new)
        if done.sown:
            sown = {name: nnx.Intermediate(done.sown[path]) for path, name in bridge.named(done.sown).items()}
            self.intermediates = nnx.data(bridge.nest(sown))
        return done.out


def _value(variable: Any) -> Any:
    if isinstance(variable, nnx.RngStream):
        return {"key": variable.key.get_value(), "count": variable.count.get_value()}
    return jax.tree.map(lambda leaf: leaf, variable.get_value())


_homes.publish("mutatis.interop", {"FromNnx": FromNnx, "ToNnx": ToNnx})
