"""The kinds of state. A kind says what a state is for; users subclass further."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from mutatis.core import access, naming
from mutatis.errors import ArgumentError, RandomStreamError
from mutatis.model.variables import Held, Variable


class Param(Variable[Held]):
    """A trainable parameter, such as the weights of a layer.

    `mu.grad`, `mu.value_and_grad`, `mu.Optimizer` and `mu.optim.EMA` select the states of this kind by default.

    Args:
      value, init, name, sharding, fixed, **metadata: as in `mu.Variable`.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> class Scale(mu.Module):
      ...     def __init__(self):
      ...         self.factor = mu.Param(jnp.ones(2))
      ...     def __call__(self, x):
      ...         return self.factor * x
      >>> def loss_fn(model, x):
      ...     return jnp.sum(model(x))
      >>> mu.grad(loss_fn)(Scale(), jnp.array([3.0, 4.0]))["factor"]
      Array([3., 4.], dtype=float32)
    """

    collection = "params"


class BatchStat(Variable[Held]):
    """A running statistic of the data, such as the running mean of `nn.BatchNorm`.

    It is no parameter: gradients and optimizers leave it out.

    Args:
      value, init, name, sharding, fixed, **metadata: as in `mu.Variable`.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> class Center(mu.Module):
      ...     def __init__(self):
      ...         self.mean = mu.BatchStat(0.0)
      ...     def __call__(self, x):
      ...         if self.training:
      ...             self.mean.value = 0.9 * self.mean + 0.1 * x.mean()
      ...         return x - self.mean
      >>> center = Center()
      >>> _ = center(jnp.ones((4, 2)))
      >>> mu.state(center, mu.BatchStat)["mean"]
      Array(0.1, dtype=float32)
    """

    collection = "batch_stats"


class Cache(Variable[Held]):
    """A value that one call keeps for later calls, such as the keys and values of attention in `nn.KVCache`.

    ``mu.reset(model, mu.Cache)`` sets all caches with `init` back to their start.

    Args:
      value, init, name, sharding, fixed, **metadata: as in `mu.Variable`.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> class Difference(mu.Module):
      ...     def __init__(self):
      ...         self.last = mu.Cache(init=jnp.zeros(2))
      ...     def __call__(self, x):
      ...         change = x - self.last
      ...         self.last.value = x
      ...         return change
      >>> difference = Difference()
      >>> difference(jnp.ones(2)), difference(jnp.ones(2))
      (Array([1., 1.], dtype=float32), Array([0., 0.], dtype=float32))
      >>> mu.reset(difference, mu.Cache)
      >>> difference.last.value
      Array([0., 0.], dtype=float32)
    """

    collection = "cache"


class Hidden(Variable[Held]):
    """A state of a recurrent cell or a neuron, such as the carry of `nn.LSTMCell` or a membrane potential.

    ``mu.reset(model, mu.Hidden)`` sets all of them with `init` back to their start, for instance before a new sequence.

    Args:
      value, init, name, sharding, fixed, **metadata: as in `mu.Variable`.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> class Leaky(mu.Module):
      ...     def __init__(self, size):
      ...         self.potential = mu.Hidden(init=jnp.zeros(size))
      ...     def __call__(self, x):
      ...         self.potential.value = 0.5 * self.potential + x
      ...         return self.potential.value
      >>> neurons = Leaky(2)
      >>> neurons(jnp.ones(2)), neurons(jnp.ones(2))
      (Array([1., 1.], dtype=float32), Array([1.5, 1.5], dtype=float32))
      >>> mu.reset(neurons, mu.Hidden)
    """

    collection = "hidden"


class Intermediate(Variable[Held]):
    """A value from inside a computation. `mu.sow` makes states of this kind, and `mu.pop` or `mu.capture` takes them out.

    Args:
      value, init, name, sharding, fixed, **metadata: as in `mu.Variable`.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> class Net(mu.Module):
      ...     def __call__(self, x):
      ...         mu.sow(self, "square", x**2)
      ...         return x
      >>> net = Net()
      >>> _ = net(jnp.array([1.0, 2.0]))
      >>> mu.pop(net, mu.Intermediate)["square"]
      (Array([1., 4.], dtype=float32),)
    """

    collection = "intermediates"


class Perturbation(Variable[Held]):
    """Zeros that are added to an intermediate value, to take the gradient with respect to it. `mu.perturb` makes them.

    Args:
      value, init, name, sharding, fixed, **metadata: as in `mu.Variable`.

    Example:
      >>> import mutatis as mu
      >>> class Net(mu.Module):
      ...     def __call__(self, x):
      ...         return mu.perturb(self, "hidden", 2 * x) ** 2
      >>> net = Net()
      >>> _ = net(3.0)
      >>> float(mu.grad(lambda net: net(3.0), wrt=mu.Perturbation)(net)["hidden"])
      12.0
    """

    collection = "perturbations"


class Buffer(Variable[Held]):
    """A plain array that was assigned to an attribute of a module.

    You read and assign the attribute as an array; ``mu.variables(model)`` lists the state behind it. Gradients and optimizers
    leave buffers out.

    Args:
      value, init, name, sharding, fixed, **metadata: as in `mu.Variable`.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> class Scale(mu.Module):
      ...     def __init__(self):
      ...         self.factor = jnp.array([1.0, 2.0])
      ...     def __call__(self, x):
      ...         return self.factor * x
      >>> mu.variables(Scale())
      {('factor',): Buffer(float32[2])}
    """

    collection = "buffers"


class OptState(Variable[Held]):
    """A state of an optimizer, such as a moment. `mu.Optimizer` makes states of this kind.

    Args:
      value, init, name, sharding, fixed, **metadata: as in `mu.Variable`.

    Example:
      >>> import mutatis as mu, optax
      >>> model = mu.nn.Linear(2, 1, rngs=mu.Rngs(0))
      >>> optimizer = mu.Optimizer(model, optax.sgd(0.1, momentum=0.9))
      >>> optimizer_state = mu.state(optimizer, mu.OptState)
      >>> [x.shape for x in optimizer_state.values()]  # a trace of each gradient, and the number of steps
      [(1,), (2, 1), ()]
    """

    collection = "opt_state"

    if not TYPE_CHECKING:

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """Refused: where other libraries have a function, `optimizer.step()`, there is a state."""
            raise ArgumentError(
                f"state {naming.describe(self)} is no function",
                path=naming.path_of(self),
                where=naming.where(),
                expected="gradients, given to `update` of the optimizer that it is a state of",
                got=f"a call with {len(args) + len(kwargs)} arguments",
                cure="Gradients are values: `optimizer.update(mu.grad(loss_fn)(model, x))`.",
            )


class MetricState(Variable[Held]):
    """A running total of a metric, such as those of `mu.metrics.Average`.

    ``mu.reset(metric)`` sets those with `init` back to their start.

    Args:
      value, init, name, sharding, fixed, **metadata: as in `mu.Variable`.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> class Count(mu.Module):
      ...     def __init__(self):
      ...         self.total = mu.MetricState(init=jnp.zeros((), jnp.int32))
      ...     def __call__(self, batch):
      ...         self.total += batch.shape[0]
      >>> count = Count()
      >>> count(jnp.ones((8, 3)))
      >>> int(count.total)
      8
    """

    collection = "metrics"


_drawing = threading.RLock()  # a signal handler may draw, too


class RngState(Variable[dict[str, jax.Array]]):
    """A random stream of `mu.Rngs`: its value is a dictionary of the ``key`` and the ``count`` of draws so far.

    Each draw gives ``jax.random.fold_in(key, count)`` and adds one to the count, so no key comes twice.

    Args:
      value: a dictionary of a `key` and a `count` (uint32). `mu.Rngs` makes it from a seed.
      init, name, sharding, fixed, **metadata: as in `mu.Variable`. The metadata `tag` is the name of the stream.

    Example:
      >>> import jax, mutatis as mu
      >>> dropout = mu.nn.Dropout(0.5, rngs=mu.Rngs(0))
      >>> stream, = mu.variables(dropout, mu.RngState).values()
      >>> key = stream.draw()
      >>> int(stream.value["count"])
      1
    """

    collection = "rngs"

    def draw(self) -> jax.Array:
        """Return a fresh random key, and advance the stream by one.

        Raises:
          RandomStreamError: the stream is stacked, as in an ensemble; draw from each inside `mu.vmap`.
        """
        stream = self._advance()
        return jax.random.fold_in(stream["key"], stream["count"])

    def skip(self) -> None:
        """Advance the stream by one without making the key."""
        self._advance()

    def _advance(self) -> dict[str, jax.Array]:
        """Count a draw; gives the stream as it was before."""
        if not access.is_outside():
            return self._advance_here()
        with _drawing:  # two threads would count one draw, and get one key
            return self._advance_here()

    def _advance_here(self) -> dict[str, jax.Array]:
        stream = self.get()
        if stream["key"].ndim:
            raise RandomStreamError(
                f"random stream {naming.describe(self)} is stacked, and gives no single key",
                path=naming.path_of(self),
                where=naming.where(),
                expected="one key",
                got=f"keys of shape {stream['key'].shape}",
                made_at=self.made_at,
                cure="Draw from each in its lane: `mu.vmap(lambda rngs: rngs())(rngs)`.",
            )
        super().set({"key": stream["key"], "count": stream["count"] + np.uint32(1)})
        return stream

    def set(self, value: Any) -> None:
        """Start the stream anew from this value. Inside `mu.vmap`, all lanes then draw from the new value alike."""
        access.restart(self)
        super().set(value)

    if not TYPE_CHECKING:
        value = property(Variable.get, set, doc="The value, read and written through the current transaction.")

    def _create(self) -> Any:
        name = self.metadata.get("tag", "default")
        raise RandomStreamError(
            f"random stream `{name}` has no key to draw from",
            path=naming.path_of(self) or name,
            where=naming.where(),
            made_at=self.made_at,
            cure=f"Give it one: `functional.apply(..., rngs={{'{name}': key}})`, `mu.reseed(model, {name}=key)`.",
        )


def stream_value(key: jax.Array) -> dict[str, Any]:
    """The value of a stream that starts at `key`, or of stacked ones that start at several."""
    return {"key": key, "count": jnp.zeros(key.shape, jnp.uint32)}


def kinds() -> list[type[Variable[Any]]]:
    """List all kinds of state, those of Mutatis and those that users declared, each after the kind that it is a subclass of."""
    pending: list[type[Variable]] = [Variable]
    for kind in pending:
        pending += kind.__subclasses__()
    return pending


def kind_of(collection: str) -> type[Variable[Any]] | None:
    """Find the kind of a collection, such as `Param` of ``"params"``: one of Mutatis, or the first that a user declared, or None.

    Random streams are in no collection of values.
    """
    return next((kind for kind in kinds() if kind.collection == collection and kind is not RngState), None)
