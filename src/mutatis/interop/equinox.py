"""`equinox`: `FromEquinox` holds the arrays of a module, `ToEquinox` is a module whose leaves are the parameters.

An Equinox module is an immutable pytree, and what changes is in an `eqx.nn.State` beside it. From outside, the leaves of both
become states. A Mutatis module inside Equinox follows the same rule: its parameters are leaves, all else is in the `State`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mutatis import _homes
from mutatis._packages import require
from mutatis.core.showing import show_class
from mutatis.core.statics import static_key
from mutatis.errors import ArgumentError, StructureError
from mutatis.interop import bridge
from mutatis.model.filters import Path
from mutatis.model.graphdef import GraphDef
from mutatis.model.kinds import BatchStat, Buffer, Param
from mutatis.model.modules import Module
from mutatis.model.operations import merge
from mutatis.model.state import State
from mutatis.random import Rngs, as_key, stream_of

eqx = require("equinox", "mu.interop")

__all__ = ["FromEquinox", "ToEquinox"]

_StatefulLayer: Any = eqx.nn.StatefulLayer


class Hole(enum.Enum):
    """Stands in a skeleton where an array was."""

    ARRAY = enum.auto()


class Skeleton:
    """A pytree with holes in the place of its arrays: static, and equal to another of the same structure."""

    def __init__(self, tree: Any) -> None:
        self.tree = tree

    def _key(self) -> Hashable:
        leaves, treedef = jax.tree.flatten(self.tree)
        return treedef, static_key(tuple(leaves))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Skeleton) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def fill(self, arrays: Sequence[Any]) -> Any:
        """The tree with these arrays in the holes."""
        rest = iter(arrays)
        return jax.tree.map(lambda leaf: next(rest) if leaf is Hole.ARRAY else leaf, self.tree)


class FromEquinox(Module):
    """An `equinox` module as a part of a Mutatis model.

    The leaves that `filter` selects become `Param`s, the other arrays `Buffer`s, and the leaves of the `eqx.nn.State` of the
    module `BatchStat`s, at the paths where they are found. A call passes the state to the module as ``state=``, writes the new
    state back, and returns the rest of the result. In training it passes a fresh key as ``key=``. After `eval()` it calls the
    module in inference mode and without a key.

    As in Equinox, an array at two places is two leaves, and `eqx.nn.Shared` ties them to one state. Many modules of Equinox work
    on one example; use `mu.vmap` for a batch.

    Args:
      module: the Equinox module.
      state: its `eqx.nn.State`, if `eqx.nn.make_with_state` has taken it out.
      filter: which leaves are trained, as in `eqx.partition`.
      rngs: a `mu.Rngs`, which is forked. Keys come from the stream `dropout`, or from the default stream if there is none of this
        name. Leave it out for a module that takes no ``key=``.

    Attributes:
      variables: the states in nested dictionaries, ``variables["layers"][0]["weight"]``.

    Example:
      >>> import jax, jax.numpy as jnp, mutatis as mu, equinox as eqx
      >>> net = mu.interop.FromEquinox(eqx.nn.Linear(5, 3, key=jax.random.key(0)))
      >>> mu.vmap(net)(jnp.ones((2, 5))).shape, net.variables["weight"].shape
      ((2, 3), (3, 5))
    """

    def __init__(
        self,
        module: Any,
        state: Any = None,
        *,
        filter: Any = eqx.is_inexact_array,
        rngs: Rngs | None = None,
    ) -> None:
        if state is None:
            module, state = eqx.nn.make_with_state(lambda: module)()
        trained = jax.tree.leaves(eqx.filter(module, filter), is_leaf=_is_none)
        cells: dict[Path, Any] = {}
        holes = []
        for (keys, leaf), train in zip(_with_paths(module, _is_none), trained, strict=True):
            held = leaf is not None and (train is not None or eqx.is_array(leaf))
            if held:
                cells[_path(keys)] = Param(leaf) if train is not None else Buffer(leaf)
            holes.append(Hole.ARRAY if held else leaf)
        leaves, treedef = jax.tree.flatten(state)
        for path, leaf in zip(_paths_in_state(module, treedef), leaves, strict=True):
            cells[path] = BatchStat(leaf)
        structure = jax.tree.structure(module, is_leaf=_is_none)
        empty = jax.tree.unflatten(treedef, [Hole.ARRAY] * len(leaves))
        self.skeleton = Skeleton((jax.tree.unflatten(structure, holes), empty))
        self.order = tuple(cells)
        self.variables = bridge.nest(cells)
        self.stateful = len(leaves)
        self.rngs = None if rngs is None else rngs.fork()

    @property
    def module(self) -> Any:
        """An Equinox module with the present values. If it has an `eqx.nn.State`, a pair of the module and the state."""
        cells = bridge.flatten(self.variables)
        module, state = self._filled({path: cell.value for path, cell in cells.items()})
        return (module, state) if self.stateful else module

    def __call__(self, /, *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
        """Call the Equinox module.

        Args:
          *args: its arguments, without the state.
          method: the name of the method to call.
          **kwargs: its keyword arguments; a `key` among them is used in place of one from the stream.

        Returns:
          The result of the Equinox module, without the state.

        Raises:
          StructureError: the module has a state, and does not return a pair of a result and the new state.
        """
        if self.training and self.rngs is not None and "key" not in kwargs:
            kwargs["key"] = stream_of(self.rngs, "dropout").draw()

        def pure(values: dict[Path, Any]) -> Any:
            module, state = self._filled(values)
            module = eqx.nn.inference_mode(module) if not self.training else module
            if not self.stateful:
                return getattr(module, method)(*args, **kwargs), {}
            out, state = _checked(module, getattr(module, method)(*args, state=state, **kwargs))
            return out, dict(zip(self.order[-self.stateful :], jax.tree.leaves(state), strict=True))

        return bridge.call(bridge.flatten(self.variables), pure, evaluate=not self.training)[0]

    def _filled(self, values: Mapping[Path, Any]) -> Any:
        return self.skeleton.fill([values[path] for path in self.order])


def _checked(module: Any, result: Any) -> Any:
    """What a module with a state returned, if it is what it has to be."""
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], eqx.nn.State):
        return result
    raise StructureError(
        f"`{type(module).__name__}` has a state and did not return it",
        path=type(module).__name__,
        expected="a pair (out, state)",
        got=show_class(result),
        cure="As everywhere in Equinox: `def __call__(self, x, state): ...; return out, state`.",
    )


def _is_none(leaf: Any) -> bool:
    return leaf is None


def _is_index(leaf: Any) -> bool:
    return isinstance(leaf, eqx.nn.StateIndex)


def _with_paths(tree: Any, is_leaf: Callable[[Any], bool]) -> Any:
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]


def _path(keys: Sequence[Any]) -> Path:
    return tuple(getattr(key, "name", getattr(key, "idx", getattr(key, "key", None))) for key in keys)


def _paths_in_state(module: Any, treedef: Any) -> list[Path]:
    """For each leaf of a state the path of its `StateIndex` in the module, and from there on."""
    numbers = jax.tree.unflatten(treedef, range(treedef.num_leaves))
    paths: dict[int, Path] = {number: ("state", number) for number in range(treedef.num_leaves)}
    for keys, index in reversed(_with_paths(module, _is_index)):
        if _is_index(index):
            for inner, number in _with_paths(numbers.get(index), _is_none):
                paths[number] = (*_path(keys), *_path(inner))
    return [paths[number] for number in range(treedef.num_leaves)]


class ToEquinox(_StatefulLayer):
    """A Mutatis module as an `equinox.Module`.

    Its leaves are its parameters: `eqx.filter_grad` differentiates them and `eqx.apply_updates` updates them. If the module holds
    other states too (statistics, caches, buffers, frozen parameters), it is a stateful layer of Equinox and is used like one::

        net, state = eqx.nn.make_with_state(mu.interop.ToEquinox)(model)
        out, state = net(x, state, key=key)

    A module with parameters only is called as ``net(x)`` and returns ``out``. Random streams start anew in each call, from
    ``key=``. ``eqx.nn.inference_mode`` sets `training` of the module to False.

    Args:
      model: the module, whose states all have values; it is copied.
      inference: whether `training` is False in its calls.

    Attributes:
      params: the parameters in nested dictionaries, ``params["layers"]["0"]["kernel"]``.
      index: the `eqx.nn.StateIndex` of all other states, or None.

    Raises:
      DeferredStateError: a state has no value yet.
      RandomStreamError: a call draws random numbers without a `key`.
      ArgumentError: the module is stateful, and a call has no state.
      StructureError: a call changes the structure of the module.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu, equinox as eqx
      >>> net = mu.interop.ToEquinox(mu.nn.Linear(5, 3, rngs=mu.Rngs(0)))
      >>> grads = eqx.filter_grad(lambda net, x: net(x).sum())(net, jnp.ones((2, 5)))
      >>> grads.params["bias"].tolist()
      [2.0, 2.0, 2.0]
    """

    params: dict[str, Any]
    index: Any
    inference: bool
    definition: GraphDef = eqx.field(static=True)
    rest: tuple[Path, ...] = eqx.field(static=True)
    streams: tuple[tuple[Path, tuple[int, ...]], ...] = eqx.field(static=True)

    def __init__(self, model: Module, inference: bool = False) -> None:
        parts = bridge.take_created(model, "ToEquinox")
        names = bridge.named(parts.collections)
        rest = {names[path]: parts.values[path] for path in names if path not in parts.trained}
        self.params = bridge.nest({names[path]: parts.values[path] for path in parts.trained})
        self.index = eqx.nn.StateIndex(bridge.nest(rest)) if rest else None
        self.inference = inference
        self.definition = parts.definition
        self.rest = tuple(path for path in names if path not in parts.trained)
        self.streams = tuple((path, parts.values[path]["count"].shape) for path in parts.streams)

    def is_stateful(self) -> bool:
        """Say whether a call takes and returns an `eqx.nn.State`."""
        return self.index is not None

    def __call__(
        self, /, *args: Any, state: Any = None, key: Any = None, method: str = "__call__", **kwargs: Any
    ) -> Any:
        """Call the module.

        Args:
          *args: its arguments; for a stateful module the state comes last.
          state: the `eqx.nn.State`, if it is not the last of `args`.
          key: a random key, from which the random streams of the module start.
          method: the name of the method to call.
          **kwargs: its keyword arguments.

        Returns:
          The result of the module; for a stateful module a pair of it and the new state.
        """
        held: dict[Any, Any] = {}
        if self.is_stateful():
            if state is None and args:
                *args, state = args  # type: ignore[assignment]
            if not isinstance(state, eqx.nn.State):
                raise ArgumentError(
                    "`ToEquinox` was called without its state",
                    expected="an eqx.nn.State after the arguments",
                    got=show_class(state),
                    cure="`net, state = eqx.nn.make_with_state(mu.interop.ToEquinox)(model)`; `out, state = net(x, state)`.",
                )
            held = state.get(self.index)
        values: dict[Path, Any] = {
            path: {"key": jax.random.key(0), "count": jnp.zeros(shape)} for path, shape in self.streams
        }
        for path, name in bridge.named(self.definition.paths).items():
            if path not in values:
                values[path] = bridge.fetch(held if path in self.rest else self.params, name)
        done = bridge.run(
            "ToEquinox",
            lambda: merge(self.definition, State(values)),
            lambda model: getattr(model, method)(*args, **kwargs),
            evaluate=self.inference,
            key_of=_keys_from(key),
            cure="`net(x, key=jax.random.key(0))`; to draw nothing, `eqx.nn.inference_mode(net)`.",
        )
        if not self.is_stateful():
            return done.out
        names = bridge.named(self.rest)
        return done.out, state.set(
            self.index, bridge.nest({names[path]: done.after.values[path] for path in self.rest})
        )


def _keys_from(key: Any) -> Callable[[str], Any]:
    """Gives another key at each call, or None if there is none."""

    def next_key(_name: str) -> Any:
        nonlocal key
        if key is None:
            return None
        key, now = jax.random.split(as_key(key))
        return now

    return next_key


_homes.publish("mutatis.interop", {"FromEquinox": FromEquinox, "ToEquinox": ToEquinox})
