"""`flax.linen`: `FromLinen` holds the collections of a Linen module, `ToLinen` keeps a module's states in collections.

A Linen module is a recipe without values: `init` makes the collections, `apply` is a pure function of them. `FromLinen` holds
them as states, from its first call on. `ToLinen` takes a recipe too, a function that makes the module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import jax

from mutatis import _homes
from mutatis._packages import require
from mutatis.core.naming import show_path
from mutatis.core.statics import static
from mutatis.errors import StructureError
from mutatis.interop import bridge
from mutatis.model.filters import Path
from mutatis.model.modules import Module, set_attribute
from mutatis.random import Rngs, streams_of
from mutatis.transforms.abstract import eval_shape

flax = require("flax", "mu.interop")
nn = require("flax.linen", "mu.interop")
meta = require("flax.core.meta", "mu.interop")

__all__ = ["FromLinen", "ToLinen"]

_Module: Any = nn.Module
_STATE: Any = flax.core.DenyList(("params", "intermediates"))


class FromLinen(Module):
    """A `flax.linen` module as a part of a Mutatis model.

    Its states are created at the first call, in the current transaction, or by `lazy_init`. Each value in its collections becomes
    a state, at the path that Linen gives it and of the kind that declares the collection. For a collection that no kind declares,
    a kind is made, and the name of the collection selects it: ``mu.state(model, "spikes")``.

    Args:
      module: the Linen module.
      rngs: a `mu.Rngs`, which is forked. ``make_rng(name)`` of Linen gets its keys from the stream of that name, or from the
        default stream if there is none. May be left out if nothing is drawn and `variables` are given.
      variables: the collections, if the module has been initialized: the result of ``module.init``.
      mutable: the collections that a call may write, as `mutable` in Linen. The default is all but `params` and `intermediates`.
        With `intermediates` among them, the sown values of the last call are kept as `Intermediate` states.

    Attributes:
      variables: the states in nested dictionaries, ``variables["params"]["Dense_0"]["kernel"]``.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu, flax.linen
      >>> net = mu.interop.FromLinen(flax.linen.Dense(3), rngs=mu.Rngs(0))
      >>> net(jnp.ones((2, 5))).shape
      (2, 3)
      >>> net.variables["params"]["kernel"].shape, mu.state(net, mu.Param)["variables", "params", "bias"].shape
      ((5, 3), (3,))
    """

    def __init__(
        self,
        module: Any,
        *,
        rngs: Rngs | None = None,
        variables: Mapping[str, Any] | None = None,
        mutable: Any = _STATE,
    ) -> None:
        try:
            hash(module)
            set_attribute(self, "module", module)  # by its value; of a user, `module` would be a stranger
        except TypeError:  # a field holds what cannot be compared
            self.module = static(module)
        self.rngs = None if rngs is None else rngs.fork()
        self.mutable = mutable
        self.variables: dict[str, Any] | None = None
        if variables is not None:
            self._create(bridge.flatten(variables))

    def lazy_init(self, /, *args: Any, **kwargs: Any) -> Self:
        """Create the states now, if there are none, for a call with these arguments.

        Args:
          *args: the arguments of the call; a `jax.ShapeDtypeStruct` may stand for an array.
          **kwargs: its keyword arguments.

        Returns:
          The module itself.

        Raises:
          RandomStreamError: there are no random streams to draw from.
        """
        if self.variables is None:
            if self.rngs is None:
                raise bridge.no_streams("FromLinen(module", "the collections as `variables=`")
            shapes = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((args, kwargs)))
            keys = _keys(self.rngs)
            if "params" in self.rngs:
                keys["params"] = self.rngs.params()
            init = self.module.lazy_init if shapes else self.module.init
            self._create(bridge.flatten(init(keys, *args, **kwargs)))
        return self

    def __call__(self, /, *args: Any, rngs: Rngs | Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        """Call the Linen module, or the method of it that `method` names.

        Args:
          *args: its arguments.
          rngs: a `mu.Rngs`, or keys by name, in place of the streams of the module. After `eval()` there are no others.
          **kwargs: its keyword arguments, such as the one that tells a Linen module whether it is in training.

        Returns:
          The result of the Linen module.

        Raises:
          RandomStreamError: the states have yet to be created, and there are no random streams.
        """
        self.lazy_init(*args, **kwargs)
        streams = self.rngs if rngs is None and self.training else rngs
        keys = _keys(streams) if isinstance(streams, Rngs) else streams
        mutable = () if self.mutable is False else self.mutable

        def pure(values: dict[Path, Any]) -> Any:
            collections = bridge.nest({path: value for path, value in values.items() if path[0] != "intermediates"})
            out, updates = self.module.apply(collections, *args, rngs=keys, mutable=mutable, **kwargs)
            return (out, updates), bridge.flatten(meta.unbox(updates))

        cells = bridge.flatten(self.variables)
        (out, updates), _ = bridge.call(cells, pure, evaluate=not self.training)
        self._create({path: value for path, value in bridge.flatten(updates).items() if path not in cells})
        return out

    def _create(self, values: Mapping[Path, Any]) -> None:
        """Make states of values that Linen made."""
        if self.variables is None:
            self.variables = {}
        for path, value in values.items():
            parent: Any = self.variables
            for part in path[:-1]:
                parent = parent.setdefault(part, {})
            sharding = getattr(value, "names", None) if isinstance(value, meta.AxisMetadata) else None
            parent[path[-1]] = bridge.kind_of(path[0])(meta.unbox(value), sharding=sharding)


def _keys(rngs: Rngs) -> dict[str, Any]:
    """A key for each stream but `params`; the default stream stands for those that Linen does not find: that is `params`."""
    keys = {name: state.draw() for name, state in streams_of(rngs).items() if name != "params"}
    if "default" in keys:
        keys["params"] = keys.pop("default")
    return keys


class ToLinen(_Module):
    """A Mutatis module as a `flax.linen.Module`.

    Its states are in the collections of their kinds, by their paths: ``variables["params"]["layers"]["0"]["kernel"]``. As in
    Linen, a write to a collection that is not mutable is an error, and a `mu.sow` into such a collection does nothing. Random
    streams are in no collection. Each starts anew in each call, from ``make_rng`` of its name (its tag), or of `params` if Linen
    has no rng of this name.

    Args:
      constructor: a function ``constructor(rngs)`` that makes the module, with the same structure each time.
      deterministic: whether `training` is False in the calls of the module.

    Raises:
      RandomStreamError: a call draws from a stream for which it has no key.
      StructureError: variables are missing, or a call changes the structure of the module.

    Example:
      >>> import jax, jax.numpy as jnp, mutatis as mu
      >>> layer = mu.interop.ToLinen(lambda rngs: mu.nn.Linear(None, 3, rngs=rngs))
      >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 5)))
      >>> jax.tree.map(jnp.shape, variables)
      {'params': {'bias': (3,), 'kernel': (5, 3)}}
      >>> layer.apply(variables, jnp.ones((2, 5))).shape
      (2, 3)
    """

    constructor: Callable[[Rngs], Module]
    deterministic: bool = False

    @nn.compact
    def __call__(self, /, *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
        """Call the module.

        Args:
          *args: its arguments.
          method: the name of the method to call.
          **kwargs: its keyword arguments.

        Returns:
          The result of the module.
        """
        shapes = bridge.take_apart(eval_shape(lambda: bridge.construct(self.constructor, Rngs(0))))
        names = bridge.named(shapes.collections)
        tops = {(shapes.collections[path], name[0]) for path, name in names.items()}
        new = self.is_initializing() and not any(self.has_variable(*top) for top in tops)

        def make() -> Module:
            return bridge.construct(self.constructor, Rngs(self.make_rng("params")))

        done = bridge.run(
            "ToLinen",
            make if new else self._around(shapes, names),
            lambda model: getattr(model, method)(*args, **kwargs),
            evaluate=self.deterministic,
            key_of=lambda name: self.make_rng(name) if self.has_rng(name) or self.has_rng("params") else None,
            cure="`module.apply(variables, x, rngs={{'{name}': jax.random.key(0)}})`; to draw nothing, "
            "`ToLinen(constructor, deterministic=True)`.",
        )
        for path, value in (done.initial("ToLinen") if new else done.written()).items():
            self._put(shapes.collections[path], names[path], value)
        if self.is_mutable_collection("intermediates"):
            for path, name in bridge.named(done.sown).items():
                self._put("intermediates", name, done.sown[path])
        return done.out

    def _around(self, shapes: bridge.Parts, names: Mapping[Path, Path]) -> Callable[[], Module]:
        """Makes the module around the variables that Linen holds."""
        values, missing = {}, []
        for path, name in names.items():
            collection = shapes.collections[path]
            try:
                held = bridge.fetch(self.get_variable(collection, name[0]), name[1:])
            except (KeyError, TypeError):
                missing.append(f"missing: {show_path(path)} in `{collection}`")
            else:
                values[path] = meta.unbox(flax.core.unfreeze(held))
        if missing:
            raise StructureError(
                "`ToLinen` was not given all of its variables",
                differences=missing,
                cure="Pass all the collections that `module.init` gave: `module.apply(variables, x)`.",
            )
        return bridge.rebuild(shapes, values)

    def _put(self, collection: str, name: Path, value: Any) -> None:
        """Have Linen hold a value beside those that it holds."""
        held = bridge.flatten(self.get_variable(collection, name[0], {}), name[:1])
        self.put_variable(collection, name[0], bridge.nest({**held, name: value})[name[0]])


_homes.publish("mutatis.interop", {"FromLinen": FromLinen, "ToLinen": ToLinen})
