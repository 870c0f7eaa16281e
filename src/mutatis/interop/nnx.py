"""`flax.nnx`: `FromNnx` holds what `nnx.split` gives, `ToNnx` holds a module's states as `nnx.Variable`s.

Both libraries have mutable objects in front and a graph definition with values behind. So each call through a door is the
other library's merge, the call, and its split. A stream of `nnx.Rngs` and a `mu.RngState` are the same thing, a key and
a count that give ``fold_in(key, count)``, and one stands for the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

from mutatis import _homes
from mutatis._packages import require
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

    Each `nnx.Variable` becomes a state at the path that NNX gives it: of the kind of the same meaning, for a subclass too
    (its name is then a tag: ``mu.state(model, "LoRAParam")``), else of the kind that declares the type's registered name as
    its collection. A random stream becomes one `RngState`, which draws what NNX would. Arrays become `Buffer`s. A
    variable that is shared stays one state. Whatever a call does to the NNX module, new variables and
    attributes too, is there at the next.

    Args:
      module: the NNX module. It is copied; `module` gives it back.

    Attributes:
      variables: the states in nested dictionaries, ``variables["layers"][0]["kernel"]``.
      graphdef: the `nnx.GraphDef`.

    Example:
      >>> from flax import nnx
      >>> net = mu.interop.FromNnx(nnx.Linear(5, 3, rngs=nnx.Rngs(0)))
      >>> mu.jit(net)(jnp.ones((2, 5))).shape, net.variables["kernel"].shape
      ((2, 3), (5, 3))
    """

    def __init__(self, module: Any) -> None:
        self.graphdef, state = nnx.split(module)
        self.variables = bridge.nest({path: make(value) for path, (make, value) in _found(state).items()})

    @property
    def module(self) -> Any:
        """An NNX module with the present values."""
        return self._merged({path: cell.value for path, cell in bridge.flatten(self.variables).items()})

    def __call__(self, /, *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
        """Call the NNX module, in its evaluation mode after `eval()`, else as it was made.

        Args:
          *args: arguments.
          method: the name of the method to call.
          **kwargs: keyword arguments.

        Returns:
          What the NNX module returns.
        """

        def pure(values: dict[Path, Any]) -> Any:
            module = self._merged(values)
            with _evaluating(module) if not self.training else contextlib.nullcontext():
                out = getattr(module, method)(*args, **kwargs)
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

    Its states are `nnx.Variable`s at their paths, of the type that is registered under the collection of their kind:
    `nnx.Param`, `nnx.BatchStat`, ...; for other collections a type is registered. Random streams are `nnx.RngStream`s, so
    `nnx.reseed` and `nnx.split_rngs` find them. The parameters and all other states are updated in place, as in NNX.

    Args:
      model: the module; it is copied, and all of its states have values.

    Attributes:
      variables: the variables in nested dictionaries, ``variables["layers"]["0"]["kernel"]``.
      deterministic: whether `training` is False for the module's calls; ``train()`` and ``eval()`` of NNX set it.
      intermediates: what `mu.sow` kept in the last call, as `nnx.Intermediate`s.

    Raises:
      DeferredStateError: a state has no value yet.
      StructureError: a call changes what the module is made of.

    Example:
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
          What the module returns.
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
