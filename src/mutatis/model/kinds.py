"""The kinds of state. A kind says what a state is for; users subclass further."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from mutatis.core import access, naming
from mutatis.errors import RandomStreamError
from mutatis.model.variables import Held, Variable


class Param(Variable[Held]):
    """A trainable parameter."""

    collection = "params"


class BatchStat(Variable[Held]):
    """A running statistic of the data."""

    collection = "batch_stats"


class Cache(Variable[Held]):
    """What was computed before and is kept, such as keys and values of attention."""

    collection = "cache"


class Hidden(Variable[Held]):
    """Recurrent or membrane state."""

    collection = "hidden"


class Intermediate(Variable[Held]):
    """A value kept from inside a computation."""

    collection = "intermediates"


class Perturbation(Variable[Held]):
    """A zero added to an intermediate value, to take gradients with respect to it."""

    collection = "perturbations"


class Buffer(Variable[Held]):
    """A plain array that belongs to a model."""

    collection = "buffers"


class OptState(Variable[Held]):
    """A state of an optimizer, such as a moment."""

    collection = "opt_state"


class MetricState(Variable[Held]):
    """A running total of a metric."""

    collection = "metrics"


class RngState(Variable[dict[str, jax.Array]]):
    """A random stream: its value is a dict of the stream's ``key`` and the ``count`` of draws so far."""

    collection = "rngs"

    def draw(self) -> jax.Array:
        """A fresh key; the stream advances by one."""
        stream = self._advance()
        return jax.random.fold_in(stream["key"], stream["count"])

    def skip(self) -> None:
        """Advance the stream by one, without making the key."""
        self._advance()

    def _advance(self) -> dict[str, jax.Array]:
        """Count a draw; gives the stream as it was before."""
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
        """Start the stream anew: in lanes, it is then what it was set to, for all of them."""
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


def kind_of(collection: str) -> type[Variable[Any]] | None:
    """The kind of a collection: ours, or the first that a user declared; None if there is none.

    Random streams are in no collection of values.
    """
    pending: list[type[Variable]] = [Variable]
    for kind in pending:
        if kind.collection == collection and kind is not RngState:
            return kind
        pending += kind.__subclasses__()
    return None
