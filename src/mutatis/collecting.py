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
    """Make a function that returns the result of `f` and the sum of the values that layers sow under a name: ``(out, total)``.

    Use it for auxiliary losses: a layer calls ``mu.sow(self, "aux", loss)``, and the training step adds the total to its loss.
    All values inside the call count, also those of each iteration of a `mu.scan` and of each lane of a `mu.vmap`. Gradients flow
    through them. The layers keep no states of them. A `mu.vmap` around the call gives a total for each lane. Branches (`mu.cond`,
    `mu.switch`) and `mu.while_loop` refuse values that are sown inside them.

    Args:
      f: a function or callable Module.
      name: the name under which layers sow.
      reduce: a function from an array of shape (n,), all numbers that were sown, to the total. n is 0 if nothing was sown. The
        default is the sum.

    Returns:
      A function with the arguments of `f` that returns the pair ``(out, total)``.

    Raises:
      ArgumentError: `name` is not a string, or `reduce` is not a function.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> class Net(mu.Module):
      ...     def __init__(self, rngs):
      ...         self.layer = mu.nn.Linear(2, 1, rngs=rngs)
      ...     def __call__(self, x):
      ...         mu.sow(self, "aux", 0.1 * jnp.sum(self.layer.kernel**2))
      ...         return self.layer(x)
      >>> def loss_fn(model, x):
      ...     out, aux = mu.collect(model, "aux")(x)
      ...     return jnp.mean(out**2) + aux
      >>> net = Net(mu.Rngs(0))
      >>> loss, grads = mu.value_and_grad(loss_fn)(net, jnp.ones((4, 2)))
      >>> loss.shape, mu.variables(net, mu.Intermediate)
      ((), {})
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
