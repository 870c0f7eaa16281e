"""`mu.eval_shape` and `mu.make_jaxpr`: look at a stateful function without running it. Nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, overload

import jax
import numpy as np

from mutatis.core import access
from mutatis.tracing.arguments import FlatTree, as_numbers, check_static_arguments, static_positions
from mutatis.tracing.call_site import CallSite
from mutatis.tracing.transformed import Transformed

R = TypeVar("R")


def eval_shape(f: Callable[..., R], /, *args: Any, **kwargs: Any) -> R:
    """The shapes and dtypes of a function's result; as `jax.eval_shape`, with states.

    Nothing is computed, allocated or written. A module that `f` makes comes back with shapes for values.

    Args:
      f: the function.
      *args: its arguments; `jax.ShapeDtypeStruct` will do for arrays, and a module of shapes for a module.
      **kwargs: its keyword arguments.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> class Net(mu.Module):
      ...     def __init__(self, size):
      ...         self.w = mu.Param(jnp.zeros((size, size)))
      >>> mu.eval_shape(lambda: Net(100_000)).w.value
      ShapeDtypeStruct(shape=(100000, 100000), dtype=float32)
    """
    with CallSite("eval_shape", f, args, kwargs) as site:
        cells = site.scope.cells

        def pure(values: list[Any], leaves: list[Any]) -> Any:
            site.end, out, written = site.run(dict(zip(cells, values, strict=True)), leaves)
            return out, written

        out, written = jax.eval_shape(pure, site.values(cells), site.packed.leaves)
        site.undo(keep=site.end.nodes)
        site.let_go(site.end)
        site.refuse_leftovers(site.end)
        for cell, shape in zip(site.end.cells, written, strict=True):
            if cell in site.end.born:
                access.create_detached(cell, shape)
        return site.end.unflatten(out)  # type: ignore[no-any-return]


def eval_arrays(f: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """`eval_shape` of a call in which only arrays are abstract; numbers, flags and all else are what they are."""
    packed = FlatTree((tuple(args), kwargs))
    arrays = [index for index, leaf in enumerate(packed.leaves) if isinstance(leaf, _ARRAYS)]

    def call(nodes: list[Any], tracers: list[Any]) -> Any:
        leaves = list(packed.leaves)
        for index, tracer in zip(arrays, tracers, strict=True):
            leaves[index] = tracer
        args, kwargs = packed.unflatten(leaves, nodes)
        return f(*args, **kwargs)

    return eval_shape(call, packed.nodes, [packed.leaves[index] for index in arrays])


_ARRAYS = jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct


@overload
def make_jaxpr(
    f: Callable[..., Any],
    static_argnums: int | Sequence[int] = ...,
    axis_env: Sequence[tuple[Any, int]] | None = ...,
    return_shape: Literal[False] = ...,
) -> Transformed[..., Any]: ...
@overload
def make_jaxpr(
    f: Callable[..., R],
    static_argnums: int | Sequence[int] = ...,
    axis_env: Sequence[tuple[Any, int]] | None = ...,
    *,
    return_shape: Literal[True],
) -> Transformed[..., tuple[Any, R]]: ...
def make_jaxpr(
    f: Callable[..., Any],
    static_argnums: int | Sequence[int] = (),
    axis_env: Sequence[tuple[Any, int]] | None = None,
    return_shape: bool = False,
) -> Any:
    """A function that gives the jaxpr of `f`; as `jax.make_jaxpr`, with states.

    The inputs of the jaxpr are the states that `f` can reach (in the order of their paths) and then the arguments; its
    outputs are the result and then the written states. Nothing is run or written.

    Args:
      f: the function.
      static_argnums, axis_env: as in `jax.make_jaxpr`.
      return_shape: whether a pair is given, of the jaxpr and the shapes of the result.

    Example:
      >>> import mutatis as mu
      >>> n = mu.Variable(0)
      >>> mu.make_jaxpr(lambda: n.set(n.value + 1))()
      { lambda ; a:i32[]. let b:i32[] = add a 1:i32[] in (b,) }
    """

    def call(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        statics = static_positions(len(args), (), as_numbers(static_argnums), ())
        check_static_arguments(args, kwargs, statics, "make_jaxpr")
        packed = FlatTree(({n: arg for n, arg in enumerate(args) if n not in statics}, kwargs))
        with CallSite("make_jaxpr", function, args, kwargs) as site:
            cells = site.scope.cells

            def pure(values: list[Any], leaves: list[Any]) -> Any:
                new_args, new_kwargs = packed.unflatten(leaves)
                all_args = [new_args.get(n, arg) for n, arg in enumerate(args)]
                overlay = dict(zip(cells, values, strict=True))
                site.end, out, written = site.run(overlay, call=lambda: function(*all_args, **new_kwargs))
                return out, written

            trace = jax.make_jaxpr(pure, axis_env=axis_env, return_shape=True)
            jaxpr, shapes = trace(site.values(cells), packed.leaves)
            site.undo()
            end = site.end.without_cells()
            site.let_go(site.end)
            site.refuse_leftovers(site.end)
            return (jaxpr, end.unflatten(shapes[0])) if return_shape else jaxpr

    return Transformed(f, make_jaxpr, call)
