"""`haiku`: `FromHaiku` holds the parameters and state of a transformed function, `ToHaiku` keeps a module's states in Haiku's.

A transformed function of Haiku is a recipe without values: `init` makes the parameters and the state, `apply` is a pure
function of them. `FromHaiku` holds them as states, from its first call on. `ToHaiku` takes a recipe too, a function that
makes the module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

from mutatis import _homes
from mutatis._packages import require
from mutatis.core.naming import show_path
from mutatis.errors import FrozenStateError, StructureError
from mutatis.interop import bridge
from mutatis.model.filters import Path
from mutatis.model.kinds import BatchStat, Param
from mutatis.model.modules import Module
from mutatis.model.variables import Variable
from mutatis.random import Rngs, as_key, stream_of, streams_of
from mutatis.transforms.abstract import eval_shape

hk = require("haiku", "mu.interop")

__all__ = ["FromHaiku", "ToHaiku"]

_Module: Any = hk.Module


class FromHaiku(Module):
    """A function of `haiku` modules as a part of a Mutatis model.

    Its states are created at the first call, in the current transaction, or by `lazy_init`. The parameters of Haiku become
    `Param`s and its state becomes states of `kind`, by the names of the module and of the value.

    Args:
      function: the function, or the result of `hk.transform` or `hk.transform_with_state` for it.
      rngs: a `mu.Rngs`, which is forked. The parameters are drawn from the stream `params`. In training each call gets a key from
        the stream `dropout` or the default stream, if there is one. May be left out if nothing is drawn and `params` are given.
      params: the parameters, if they exist already.
      state: the state, if it exists already.
      kind: the kind of the state.

    Attributes:
      variables: the states in nested dictionaries, ``variables["params"]["linear"]["w"]``.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu, haiku as hk
      >>> net = mu.interop.FromHaiku(lambda x: hk.Linear(3)(x), rngs=mu.Rngs(0))
      >>> net(jnp.ones((2, 5))).shape, net.variables["params"]["linear"]["w"].shape
      ((2, 3), (5, 3))
    """

    def __init__(
        self,
        function: Any,
        *,
        rngs: Rngs | None = None,
        params: Mapping[str, Any] | None = None,
        state: Mapping[str, Any] | None = None,
        kind: type[Variable] = BatchStat,
    ) -> None:
        self.function = function
        self.rngs = None if rngs is None else rngs.fork()
        self.kind = kind
        self.variables: dict[str, Any] | None = None
        if params is not None:
            self._create(params, {} if state is None else state)

    def lazy_init(self, /, *args: Any, **kwargs: Any) -> Self:
        """Create the states now, if there are none, for a call with these arguments.

        Args:
          *args: the arguments of the call.
          **kwargs: its keyword arguments.

        Returns:
          The module itself.

        Raises:
          RandomStreamError: there are no random streams to draw from.
        """
        if self.variables is None:
            if self.rngs is None:
                raise bridge.no_streams("FromHaiku(function", "the values as `params=` and `state=`")
            self._create(*self._transformed().init(self.rngs.params(), *args, **kwargs))
        return self

    def __call__(self, /, *args: Any, rng: Any = None, **kwargs: Any) -> Any:
        """Call the function.

        Args:
          *args: its arguments.
          rng: a random key in place of one from the stream. After `eval()` there is no other.
          **kwargs: its keyword arguments, such as the one that tells a function whether it is in training.

        Returns:
          The result of the function.

        Raises:
          RandomStreamError: the states have yet to be created, and there are no random streams.
        """
        self.lazy_init(*args, **kwargs)
        if (
            rng is None
            and self.training
            and self.rngs is not None
            and {"dropout", "default"} & {*streams_of(self.rngs)}
        ):
            rng = stream_of(self.rngs, "dropout").draw()

        def pure(values: dict[Path, Any]) -> Any:
            held = {"params": {}, "state": {}, **bridge.nest(values)}
            out, state = self._transformed().apply(held["params"], held["state"], rng, *args, **kwargs)
            return out, {("state", *path): value for path, value in _two_levels(state).items()}

        return bridge.call(bridge.flatten(self.variables), pure, evaluate=not self.training)[0]

    def _transformed(self) -> Any:
        if isinstance(self.function, hk.TransformedWithState):
            return self.function
        if isinstance(self.function, hk.Transformed):
            return hk.with_empty_state(self.function)
        return hk.transform_with_state(self.function)

    def _create(self, params: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        made = {("params", *path): Param(value) for path, value in _two_levels(params).items()}
        kept = {("state", *path): self.kind(value) for path, value in _two_levels(state).items()}
        self.variables = {"params": {}, "state": {}, **bridge.nest({**made, **kept})}


def _two_levels(tree: Mapping[str, Any]) -> dict[tuple[str, str], Any]:
    """The values of Haiku's parameters or state by module and name; a value may be a dictionary."""
    return {(module, name): value for module, values in tree.items() for name, value in values.items()}


class ToHaiku(_Module):
    """A Mutatis module as a `haiku.Module`.

    Its parameters are parameters of Haiku, and all its other states are state of Haiku, by path:
    ``params["net"]["layers.0.kernel"]``. Random streams are neither: each starts anew in each call, from `hk.next_rng_key`.

    Args:
      constructor: a function ``constructor(rngs)`` that makes the module, with the same structure each time.
      name: the name of the Haiku module.

    Raises:
      RandomStreamError: a call draws random numbers and has no key.
      StructureError: values are missing, or a call changes the structure of the module.

    Example:
      >>> import jax, jax.numpy as jnp, mutatis as mu, haiku as hk
      >>> def forward(x):
      ...     return mu.interop.ToHaiku(lambda rngs: mu.nn.Linear(None, 3, rngs=rngs), name="net")(x)
      >>> net = hk.transform(forward)
      >>> params = net.init(jax.random.key(0), jnp.ones((2, 5)))
      >>> params["net"]["kernel"].shape, net.apply(params, None, jnp.ones((2, 5))).shape
      ((5, 3), (2, 3))
    """

    def __init__(self, constructor: Callable[[Rngs], Module], name: str | None = None) -> None:
        super().__init__(name=name)
        self.constructor = constructor
        self.created = False

    def __call__(self, /, *args: Any, is_training: bool = True, method: str = "__call__", **kwargs: Any) -> Any:
        """Call the module.

        Args:
          *args: its arguments.
          is_training: whether `training` of the module is True in this call.
          method: the name of the method to call.
          **kwargs: its keyword arguments.

        Returns:
          The result of the module.
        """
        new = hk.running_init() and not self.created
        shapes = bridge.take_apart(eval_shape(lambda: bridge.construct(self.constructor, Rngs(0))))
        names = {path: ".".join(name) for path, name in bridge.named(shapes.collections).items()}

        def make() -> Module:
            return bridge.construct(self.constructor, Rngs(as_key(hk.next_rng_key())))

        def key_of(_name: str) -> Any:
            key = hk.maybe_next_rng_key()
            return None if key is None else as_key(key)

        done = bridge.run(
            "ToHaiku",
            make if new else bridge.rebuild(shapes, self._values(names, shapes.trained)),
            lambda model: getattr(model, method)(*args, **kwargs),
            evaluate=not is_training,
            key_of=key_of,
            cure="`transformed.apply(params, state, jax.random.key(0), x)`; to draw nothing, "
            "`ToHaiku(constructor)(x, is_training=False)`.",
        )
        if new:
            self.created = True
            for path, value in done.initial("ToHaiku").items():
                if path in shapes.trained:
                    hk.get_parameter(names[path], value.shape, value.dtype, init=lambda *_, value=value: value)
                else:
                    hk.set_state(names[path], value)
        for path, value in done.written().items():
            if path not in shapes.trained:
                hk.set_state(names[path], value)
            elif not new:  # there, it is the parameter's creation
                raise FrozenStateError(
                    f"parameter `{show_path(path)}` was written, which Haiku takes for a constant in a call",
                    path=show_path(path),
                    where="ToHaiku",
                    cure="Make it a state of another kind: `self.w = mu.Variable(x)`.",
                )
        return done.out

    def _values(self, names: Mapping[Any, str], trained: set[Any]) -> dict[Any, Any]:
        """The values that Haiku holds."""
        held = {True: self.params_dict(), False: self.state_dict()}
        keys = {path: (path in trained, f"{self.module_name}/{name}") for path, name in names.items()}
        missing = [path for path, (train, key) in keys.items() if key not in held[train]]
        if missing:
            raise StructureError(
                "`ToHaiku` was not given all of its values",
                differences=[f"missing: {show_path(path)}" for path in missing],
                cure="Pass the params and the state that `init` gave.",
            )
        return {path: held[train][key] for path, (train, key) in keys.items()}


_homes.publish("mutatis.interop", {"FromHaiku": FromHaiku, "ToHaiku": ToHaiku})
