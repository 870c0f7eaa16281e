"""`mu.map`: a function applied to each slice, one after the other or a batch at a time. A loop and a `vmap` put together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mutatis.compilation.eager_control import compiled, runs_eagerly
from mutatis.core.calls import check_function, takes
from mutatis.errors import ArgumentError, StructureError
from mutatis.tracing.arguments import FlatTree
from mutatis.tracing.staging import with_values
from mutatis.transforms.batching import vectorize
from mutatis.transforms.loops import for_loop

X = TypeVar("X")
Y = TypeVar("Y")


@overload
def map(f: Callable[[jax.Array], Y], xs: ArrayLike, *, batch_size: int | None = ...) -> Y: ...
@overload
def map(f: Callable[[X], Y], xs: X, *, batch_size: int | None = ...) -> Y: ...
@takes("mu.map(f, xs)")
def map(f: Callable[[Any], Any], xs: Any, *, batch_size: int | None = None) -> Any:
    """Apply a function to each slice of arrays along axis 0; as `jax.lax.map`, with states.

    Without `batch_size` the slices are handled one after the other, and states that `f` writes go from one to the next. With
    ``batch_size=n``, n slices are handled in parallel. They have no order then, so a write to a state is refused. Random draws
    differ from slice to slice either way.

    Args:
      f: ``f(x) -> y``.
      xs: arrays with leading axes of one size, as a pytree; without `batch_size` also modules.
      batch_size: how many slices are vectorized at a time; the last batch may be smaller.

    Returns:
      The results, stacked along axis 0.

    Raises:
      LaneError: `f` writes a state, with `batch_size`.
      ArgumentError: `xs` holds modules, with `batch_size`.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> w = mu.Param(2.0)
      >>> mu.map(lambda x: w * x, jnp.arange(5.0), batch_size=2)
      Array([0., 2., 4., 6., 8.], dtype=float32)
    """
    check_function(f, "map", "f", "The function comes first: `mu.map(f, xs)`.")
    if batch_size is None:
        return for_loop(f, xs)
    if runs_eagerly():
        return compiled("map", _map_compiled, (f,), {"batch_size": batch_size}, xs, names=("xs",))
    return _map(f, xs, batch_size)


def _map_compiled(functions: Sequence[Any], options: dict[str, Any], operands: Any) -> Any:
    return _map(functions[0], operands[0], options["batch_size"])


def _map(f: Callable[[Any], Any], xs: Any, batch_size: int) -> Any:
    if FlatTree(xs).nodes:
        raise ArgumentError(
            "`map` with `batch_size` cannot slice modules",
            expected="arrays in `xs`",
            got="a module",
            cure="Leave out `batch_size`, or vectorize over the module: `mu.vmap(f)(modules)`.",
        )

    counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(xs)}
    if len(counts) != 1 or () in counts or batch_size < 1:
        raise ArgumentError(
            "`map` cannot divide its items into batches",
            expected="arrays with leading axes of one size, and a positive `batch_size`",
            got=f"leading axes {sorted(counts)}, batch_size={batch_size}",
            cure="`mu.map(f, xs, batch_size=8)` with `xs` of one length.",
        )
    ((count,),) = counts

    @functools.wraps(f, updated=())
    def item(x: Any) -> Any:
        out = with_values(f(x))
        if FlatTree(out).nodes:
            raise StructureError(
                "`map` with `batch_size` cannot stack modules",
                expected="arrays, or Variables, in the result",
                got="a module",
                cure="Leave out `batch_size`, or make the modules with `mu.vmap(f)(xs)`.",
            )
        return out

    def batch(x: Any) -> Any:
        return vectorize(item, (x,), {}, name="map", writes=False)

    whole = count // batch_size * batch_size
    parts = []
    if whole:
        stacked = jax.tree.map(lambda x: x[:whole].reshape(-1, batch_size, *x.shape[1:]), xs)
        out = for_loop(batch, stacked)
        parts.append(jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), out))
    if whole < count:
        parts.append(batch(jax.tree.map(lambda x: x[whole:], xs)))
    return jax.tree.map(lambda *ys: jax.lax.concatenate(ys, 0), *parts)
