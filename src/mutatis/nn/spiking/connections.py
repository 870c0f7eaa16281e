"""Connections between neurons: their ends and their strengths."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from mutatis.core import naming
from mutatis.core.avals import show_type
from mutatis.core.calls import as_integer
from mutatis.core.showing import show_value
from mutatis.errors import ArgumentError
from mutatis.model.kinds import Buffer, Param
from mutatis.model.modules import Module
from mutatis.nn.layers import param_key
from mutatis.nn.spiking.units import has_unit, in_unit, without_unit
from mutatis.random import Rngs


class Connection(Module):
    """Base class of connections from `pre` neurons to `post` neurons. A call takes spikes and returns the input of each neuron.

    Args:
      pre: the number of neurons that send.
      post: the number of neurons that receive.
      events: as in `FixedNum`.

    Attributes:
      weight: Param, the strengths: one for each connection, or one for all, of shape (). If they are quantities, what arrives
        is a quantity of the same unit: with `0.6 * saiunit.mS` it is a conductance.

    Example:
      >>> import mutatis as mu
      >>> connect = mu.nn.FixedNum(100, 50, 10, rngs=mu.Rngs(0))
      >>> isinstance(connect, mu.nn.Connection), connect.pre, connect.post
      (True, 100, 50)
    """

    weight: Param[jax.Array]

    def __init__(self, pre: int, post: int, events: int | None = None) -> None:
        self.pre, self.post = (_size(type(self).__name__, name, n) for name, n in (("pre", pre), ("post", post)))
        self.events = None if events is None else as_integer(events)
        if events is not None and (self.events is None or self.events < 1):
            raise ArgumentError(
                f"`nn.{type(self).__name__}` cannot have room for {show_value(events)} events",
                path="events",
                expected="an int, from 1; or None",
                got=show_value(events),
                cure=f"`nn.{type(self).__name__}(..., events={max(1, self.pre // 50)})`: about as many as spike in a step.",
            )

    def _arrive(self, x: ArrayLike, source: Any, target: jax.Array, start: Any, most: int) -> Any:
        array = self._spikes(x)
        weight, unit = without_unit(self.weight.value)
        weight = weight.ravel() if weight.ndim else weight
        if not jnp.issubdtype(array.dtype, jnp.inexact):  # bools and integers have tangents without numbers
            array = array.astype(weight.dtype)
        if self.events is None or array.ndim > 1 or self.events >= self.pre:
            return unit(_all_arrives(self.post, array, weight, source, target))
        given = array, weight, jnp.asarray(source), target, jnp.asarray(start)
        return unit(_events_arrive(self.post, self.events, most, *given))

    def _spikes(self, x: ArrayLike) -> jax.Array:
        array = jnp.asarray(in_unit(x, "", "x"))
        if array.ndim == 0 or array.shape[-1] != self.pre:
            raise ArgumentError(
                f"connection {naming.describe(self.weight)} was given another number of neurons",
                path=naming.path_of(self.weight),
                where=naming.where(),
                expected=f"shape (..., {self.pre})",
                got=show_type(array),
                made_at=self.weight.made_at,
                cure=f"It reaches from {self.pre} neurons to {self.post}.",
            )
        return array


def _all_arrives(post: int, x: jax.Array, weight: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
    """What arrives at each neuron through a list of connections, of shape (..., post)."""
    sent = x[..., source]
    sent = sent * jnp.broadcast_to(weight, sent.shape)
    return jnp.zeros((*x.shape[:-1], post), sent.dtype).at[..., target].add(sent)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # outside of `jit` a `cond` is compiled at each call
def _events_arrive(
    post: int, events: int, most: int, x: jax.Array, weight: jax.Array, source: jax.Array, target: jax.Array, start: Any
) -> jax.Array:
    """The same for few spikes: only the connections of neurons that spike are looked at.

    Args:
      post: how many neurons there are after.
      events: for how many spikes there is room; for more, all connections are looked at.
      most: how many connections a neuron has at most.
      x: the spikes, of shape (pre,).
      weight: of each connection, or of all.
      source: of each connection, in order.
      target: of each connection.
      start: where the connections of each neuron begin, and the last ones end, of shape (pre + 1,).
    """

    def few() -> jax.Array:
        active = jnp.nonzero(x, size=events, fill_value=len(x))[0]
        first, strength = start[active], jnp.concatenate([x, jnp.zeros(1, x.dtype)])[active]
        place = first[:, None] + jnp.arange(most)[None]
        there = place < start[jnp.minimum(active + 1, len(x))][:, None]
        place = jnp.where(there, place, 0)
        sent = strength[:, None] * (weight[place] if weight.ndim else weight)
        return jnp.zeros(post, sent.dtype).at[target[place]].add(jnp.where(there, sent, 0))

    fits = (jnp.count_nonzero(x) <= events) & (
        jnp.max(start[1:] - start[:-1]) <= most
    )  # other connections may be restored
    return jax.lax.cond(fits, few, lambda: _all_arrives(post, x, weight, source, target))


def _events_arrive_jvp(post: int, events: int, most: int, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    # A neuron that does not spike has a derivative, too.
    x, weight, source, target, _ = primals
    change = _all_arrives(post, tangents[0], weight, source, target)
    change = change + _all_arrives(post, x, tangents[1], source, target)
    return _events_arrive(post, events, most, *primals), change


_events_arrive.defjvp(_events_arrive_jvp)


class OneToOne(Connection):
    """Connects each neuron to the neuron with the same number.

    Args:
      size: the number of neurons on each side.
      weight: the strength: a number for all, or an array of shape (size,).

    Attributes:
      weight: Param of shape () or (size,).

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> connect = mu.nn.OneToOne(3, weight=2.0)
      >>> connect(jnp.array([1.0, 0.0, 1.0]))
      Array([2., 0., 2.], dtype=float32)
    """

    def __init__(self, size: int, weight: ArrayLike = 1.0) -> None:
        super().__init__(size, size)
        self.weight = Param(_strengths("OneToOne", weight, (size,)))

    def __call__(self, x: ArrayLike) -> jax.Array:
        """Compute the input of each neuron: the spikes times the weights.

        Args:
          x: the spikes, an array of shape (..., size).

        Returns:
          An array of the same shape.

        Raises:
          ArgumentError: the last axis has another size.
        """
        array = self._spikes(x)
        weight, unit = without_unit(self.weight.value)
        return unit(array * jnp.broadcast_to(weight, array.shape))


class FixedNum(Connection):
    """Connects each neuron to a fixed number of others, which are drawn once at random.

    Args:
      pre: the number of neurons that send.
      post: the number of neurons that receive.
      number: the number of different neurons to which each neuron is connected.
      weight: the strength: a number for all, or an array of shape (pre, number).
      events: a number of spikes in a step. Up to it, only the connections of the neurons that spike are looked at, which is
        faster if few of many neurons spike. With more spikes, in a batch, and for a derivative, all connections are looked at;
        the result is the same. None always looks at all.
      rngs: random streams; the connections are drawn from the stream `params`.

    Attributes:
      weight: Param of shape () or (pre, number).
      target: Buffer of integers, of shape (pre, number): the neurons that are reached.

    Raises:
      ArgumentError: `number` is not from 0 to `post`, or the weight has another shape.
      RandomStreamError: there is no stream to draw from.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> connect = mu.nn.FixedNum(100, 50, number=10, weight=0.5, rngs=mu.Rngs(0))
      >>> x = connect(jnp.ones(100))  # all 100 neurons spike, and each reaches 10 of 50
      >>> x.shape, float(x.sum())
      ((50,), 500.0)
    """

    def __init__(
        self, pre: int, post: int, number: int, weight: ArrayLike = 1.0, *, events: int | None = None, rngs: Rngs
    ) -> None:
        super().__init__(pre, post, events)
        reached = as_integer(number)
        if reached is None or not 0 <= reached <= post:
            raise ArgumentError(
                f"a neuron cannot reach {show_value(number)} of {post} others",
                path="number",
                expected=f"an int, from 0 to {post}",
                got=show_value(number),
                cure=f"`nn.FixedNum({pre}, {post}, {min(post, 10)}, weight, rngs=rngs)`",
            )
        key = param_key("FixedNum", rngs)
        keys = jax.random.split(key, pre) if key is not None else None
        self.target = Buffer(jax.vmap(lambda key: jax.random.permutation(key, post)[:reached])(keys))
        self.weight = Param(_strengths("FixedNum", weight, (pre, reached)))

    def __call__(self, x: ArrayLike) -> jax.Array:
        """Compute the input of each neuron: the sum of the spikes that reach it, times their weights.

        Args:
          x: the spikes, an array of shape (..., pre).

        Returns:
          An array of shape (..., post).

        Raises:
          ArgumentError: the last axis has another size.
        """
        number = self.target.shape[1]
        start = np.arange(self.pre + 1) * number
        source = np.repeat(np.arange(self.pre), number)
        return self._arrive(x, source, self.target.value.ravel(), start, number)


class FixedProb(Connection):
    """Connects each pair of neurons with the same probability; the connections are drawn once.

    They are drawn on the host, so make it outside of `jit`.

    Args:
      pre: the number of neurons that send.
      post: the number of neurons that receive.
      prob: the probability of a connection, from 0 to 1.
      weight: the strength: a number for all, or an initializer, a function of (key, shape).
      events: as in `FixedNum`.
      rngs: random streams; the connections and the weights are drawn from the stream `params`.

    Attributes:
      weight: Param of shape () or (connections,).
      source, target: Buffers of integers, of shape (connections,): the two ends of each connection, in the order of the
        sources.
      start: with `events`, a Buffer of integers of shape (pre + 1,): where the connections of each neuron begin in `source`.
        Who writes another `source` writes this, too.

    Raises:
      ArgumentError: `prob` is not from 0 to 1, or the random stream is traced.
      RandomStreamError: there is no stream to draw from.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> connect = mu.nn.FixedProb(400, 300, prob=0.1, weight=0.5, rngs=mu.Rngs(0))
      >>> x = connect(jnp.zeros(400).at[7].set(1.0))  # neuron 7 spikes
      >>> x.shape, bool(abs((x > 0).sum() - 30) < 20)  # it reaches about 30 of 300
      ((300,), True)
    """

    def __init__(
        self, pre: int, post: int, prob: float, weight: Any = 1.0, *, events: int | None = None, rngs: Rngs
    ) -> None:
        super().__init__(pre, post, events)
        prob = in_unit(prob, "", "prob")
        if isinstance(prob, jax.core.Tracer) or np.ndim(prob) or not 0 <= prob <= 1:
            raise ArgumentError(
                f"neurons cannot be connected by the chance {show_value(prob)}",
                path="prob",
                expected="a number from 0 to 1, known when the connections are drawn",
                got=show_value(prob),
                cure=f"`nn.FixedProb({pre}, {post}, 0.1, weight, rngs=rngs)`",
            )
        key = param_key("FixedProb", rngs)
        if isinstance(key, jax.core.Tracer):
            raise ArgumentError(
                "`nn.FixedProb` cannot be made where its random stream is traced: how many connections there are is not known",
                expected="a place outside of `jit`",
                got="a traced key",
                cure="Make the net first, or take `nn.FixedNum`, whose size is known.",
            )
        seed = np.asarray(jax.random.key_data(key)).ravel().tolist()
        draw = np.random.default_rng(seed)
        numbers = draw.binomial(post, prob, pre)
        targets = [np.sort(draw.choice(post, number, replace=False)) for number in numbers]
        self.source = Buffer(jnp.asarray(np.repeat(np.arange(pre), numbers), jnp.int32))
        self.target = Buffer(jnp.asarray(np.concatenate(targets) if targets else np.zeros(0), jnp.int32))
        self.start = None if events is None else Buffer(jnp.asarray(np.cumsum([0, *numbers]), jnp.int32))
        self.most = int(numbers.max(initial=0))
        total = (int(numbers.sum()),)
        drawn = weight(param_key("FixedProb", rngs), total) if callable(weight) else weight
        self.weight = Param(_strengths("FixedProb", drawn, total))

    def __call__(self, x: ArrayLike) -> jax.Array:
        """Compute the input of each neuron: the sum of the spikes that reach it, times their weights.

        Args:
          x: the spikes, an array of shape (..., pre).

        Returns:
          An array of shape (..., post).

        Raises:
          ArgumentError: the last axis has another size.
        """
        start = None if self.start is None else self.start.value
        return self._arrive(x, self.source.value, self.target.value, start, self.most)


class Sparse(Connection):
    """Connects neurons by a sparse matrix. Its values are trained, and the places of its values are fixed.

    Args:
      matrix: a `jax.experimental.sparse.BCOO` of shape (pre, post), without batch axes.

    Attributes:
      weight: Param of shape (connections,), the values of the matrix.
      indices: Buffer of integers, of shape (connections, 2).

    Raises:
      ArgumentError: `matrix` is no such matrix.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> from jax.experimental.sparse import BCOO
      >>> connect = mu.nn.Sparse(BCOO.fromdense(jnp.array([[0.0, 2.0], [3.0, 0.0]])))
      >>> connect(jnp.array([1.0, 1.0]))
      Array([3., 2.], dtype=float32)
    """

    def __init__(self, matrix: Any) -> None:
        from jax.experimental import sparse

        if not isinstance(matrix, sparse.BCOO) or matrix.ndim != 2 or matrix.n_batch or matrix.n_dense:
            raise ArgumentError(
                "`nn.Sparse` needs a sparse matrix",
                path="matrix",
                expected="a `jax.experimental.sparse.BCOO` of two axes, (pre, post), without batch axes",
                got=show_value(matrix),
                cure="`nn.Sparse(jax.experimental.sparse.BCOO.fromdense(matrix))`",
            )
        super().__init__(*matrix.shape)
        self.weight = Param(_strengths("Sparse", matrix.data, matrix.data.shape))
        self.indices = Buffer(matrix.indices)

    def __call__(self, x: ArrayLike) -> jax.Array:
        """Compute the input of each neuron: the sum of the spikes that reach it, times their weights.

        Args:
          x: the spikes, an array of shape (..., pre).

        Returns:
          An array of shape (..., post).

        Raises:
          ArgumentError: the last axis has another size.
        """
        from jax.experimental import sparse

        weight, unit = without_unit(self.weight.value)
        matrix = sparse.BCOO((weight, self.indices.value), shape=(self.pre, self.post))
        return unit(self._spikes(x) @ matrix)


def _size(layer: str, name: str, given: Any) -> int:
    size = as_integer(given)
    if size is None or size < 0:
        raise ArgumentError(
            f"`nn.{layer}` cannot connect {show_value(given)} neurons",
            path=name,
            expected="an int, from 0",
            got=show_value(given),
            cure="Give the number of neurons; those of layers of several axes are their product, `x.ravel()`.",
        )
    return size


def _strengths(layer: str, weight: Any, shape: tuple[int, ...]) -> Any:
    """Weights as floats, with their unit."""
    weight, unit = without_unit(weight if has_unit(weight) else in_unit(weight, "", "weight"))
    array = jnp.asarray(weight)
    array = array if jnp.issubdtype(array.dtype, jnp.floating) else array.astype(jnp.float32)
    if array.shape not in ((), shape):
        raise ArgumentError(
            f"`nn.{layer}` cannot have weights of this shape",
            path="weight",
            expected=f"a number, or an array of shape {shape}",
            got=show_type(array),
            cure=f"One for each connection: `jnp.full({shape}, 0.1)`.",
        )
    return unit(array)
