"""Collecting what layers sow: `mu.collect` sums up auxiliary losses, wherever in a call they come from.

While a function is collected, `mu.sow` keeps what is sown under the name in a store of the call, not in the layers. Each value
is a state of its own there, so loops and lanes stack it, gradients flow through it, and nothing is left when the call is over.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp

from mutatis.core.showing import show_value
from mutatis.errors import ArgumentError
from mutatis.model.contexts import Context
from mutatis.model.kinds import Intermediate
from mutatis.model.modules import Module
from mutatis.model.operations import pop
from mutatis.tracing.transformed import Transformed

P = ParamSpec("P")
R = TypeVar("R")

_innermost = Context("collect", None)  # the innermost Collector


class Collector(Module):
    """What a call collects. A module, so that what is sown in compiled programs comes out of them.

    Args:
      name: the name under which is sown.
      store: a module that holds the values.
      below: the collector that was there before.
    """

    def __init__(self, name: str, store: Module, below: Any) -> None:
        self.name = name
        self.store = store
        self.below = below


def take(name: str, value: Any) -> bool:
    """Give what is sown to the collector that asks for it; False if none does."""
    collector = _innermost.get()
    while collector is not None:
        if collector.name == name:
            setattr(collector.store, f"value_{len(vars(collector.store))}", Intermediate((value,)))
            return True
        collector = collector.below
    return False


def collect(
    f: Callable[P, R], name: str, *, reduce: Callable[[jax.Array], jax.Array] = jnp.sum
) -> Transformed[P, tuple[R, jax.Array]]:
    """A function that gives what `f` gives and what layers sow under a name, reduced: ``(out, total)``.

    Auxiliary losses are collected like this: a layer says ``mu.sow(self, "aux", loss)``, and the training step adds the total to
    its loss. Values of a `mu.scan` or `mu.vmap` inside the call all count; gradients flow through them; the layers are left
    without states. Around the call, `mu.vmap` gives a total for each lane. Branches and `mu.while_loop` refuse what is sown in
    them.

    Args:
      f: a function or callable Module.
      name: the name under which layers sow.
      reduce: gives the total, of an array of shape (n,) of all that was sown; n is 0 if nothing was.

    Raises:
      ArgumentError: what is no name was given.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> class Net(mu.Module):
      ...     def __init__(self):
      ...         self.w = mu.Param(2.0)
      ...     def __call__(self, x):
      ...         mu.sow(self, "aux", self.w.value**2)
      ...         return self.w * x
      >>> net = Net()
      >>> out, total = mu.collect(lambda x: net(net(x)), "aux")(1.0)
      >>> float(out), float(total), mu.variables(net, mu.Intermediate)
      (4.0, 8.0, {})
    """
    given: object = name
    if not isinstance(given, str) or not callable(reduce):
        raise ArgumentError(
            "`collect` needs the name under which layers sow",
            expected="a name, and a function of an array",
            got=show_value(reduce if isinstance(given, str) else given),
            cure='`mu.collect(model, "aux", reduce=jnp.sum)(x)`',
        )

    def call(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        store = Module()
        with _innermost.set(Collector(name, store, _innermost.get())):
            out = function(*args, **kwargs)
        return out, reduce(_joined(jax.tree.leaves(pop(store, Intermediate))))

    return Transformed(f, functools.partial(collect, name=name, reduce=reduce), call)


def _joined(values: list[Any]) -> jax.Array:
    """All elements of all arrays, in the dtype that they promote to."""
    if not values:
        return jnp.zeros(0)
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*values)
    return jnp.concatenate([value.astype(dtype).ravel() for value in values])
