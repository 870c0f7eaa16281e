"""`mu.eval_shape` and `mu.make_jaxpr`: look at a stateful function without running it. Nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, overload

import jax
import numpy as np

from mutatis.core import access, placements
from mutatis.tracing.arguments import FlatTree, as_numbers, check_static_arguments, leaf_names, static_positions
from mutatis.tracing.call_site import CallSite
from mutatis.tracing.transformed import Transformed

R = TypeVar("R")


def eval_shape(f: Callable[..., R], /, *args: Any, **kwargs: Any) -> R:
    """Find the shapes and dtypes of a function's result without computing it; as `jax.eval_shape`, with states.

    Nothing is computed, allocated or written. A module that `f` makes comes back with shapes in place of values, so you can look
    at a model that is too large for this machine, or restore a checkpoint into it.

    Args:
      f: the function.
      *args: its arguments. A `jax.ShapeDtypeStruct` may stand for an array, and a module of shapes for a module.
      **kwargs: its keyword arguments, likewise.

    Returns:
      The result of `f`, with a `jax.ShapeDtypeStruct` in place of each array.

    Example:
      >>> import mutatis as mu
      >>> model = mu.eval_shape(lambda: mu.nn.Linear(100_000, 100_000, rngs=mu.Rngs(0)))
      >>> model.kernel.value
      ShapeDtypeStruct(shape=(100000, 100000), dtype=float32)
    """
    with CallSite("eval_shape", f, args, kwargs) as site:
        cells = site.scope.cells

        def pure(values: list[Any], leaves: list[Any]) -> Any:
            site.end, out, written = site.run(dict(zip(cells, values, strict=True)), leaves)
            return out, written

        out, written = jax.eval_shape(site.marked(pure), site.values(cells), site.packed.leaves)
        site.undo(keep=site.end.nodes)
        site.let_go(site.end)
        site.refuse_leftovers(site.end)
        for cell, shape in zip(site.end.cells, written, strict=True):
            if cell in site.end.born:
                access.create_detached(cell, shape if cell.sharding is None else placements.declared(cell, shape))
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
    """Make a function that returns the jaxpr of `f`, the program that JAX traces; as `jax.make_jaxpr`, with states.

    The inputs of the jaxpr are the states that `f` can reach, in the order of their paths, followed by the arguments. Its outputs
    are the result, followed by the new values of the states that `f` writes. `f` is traced with abstract values: nothing is
    computed, and no state changes.

    Args:
      f: the function.
      static_argnums: the positions of arguments that are static, as in `jax.make_jaxpr`: `f` gets them as they are.
      axis_env: pairs of a name and a size, for collectives over named axes, as in `jax.make_jaxpr`.
      return_shape: whether to return a pair: the jaxpr, and the result of `f` with a shape and dtype in place of each array.

    Returns:
      A function with the arguments of `f` that returns its jaxpr, or with `return_shape` a pair.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> total = mu.Variable(jnp.zeros(2))
      >>> def add(x):
      ...     total.value += x
      ...     return 2 * x
      >>> mu.make_jaxpr(add)(jnp.ones(2))
      { lambda ; a:f32[2] b:f32[2]. let
          c:f32[2] = add a b
          d:f32[2] = mul 2.0:f32[] b
        in (d, c) }
    """

    def call(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        statics = static_positions(len(args), (), as_numbers(static_argnums), ())
        check_static_arguments(args, kwargs, statics, "make_jaxpr")
        packed = FlatTree(({n: arg for n, arg in enumerate(args) if n not in statics}, kwargs))
        with CallSite("make_jaxpr", function, args, kwargs) as site:
            site.labels = lambda: {"leaves": leaf_names(function, args, kwargs, statics)}  # type: ignore[method-assign]
            cells = site.scope.cells

            def pure(values: list[Any], leaves: list[Any]) -> Any:
                new_args, new_kwargs = packed.unflatten(leaves)
                all_args = [new_args.get(n, arg) for n, arg in enumerate(args)]
                overlay = dict(zip(cells, values, strict=True))
                site.end, out, written = site.run(overlay, call=lambda: function(*all_args, **new_kwargs))
                return out, written

            trace = jax.make_jaxpr(site.marked(pure), axis_env=axis_env, return_shape=True)
            jaxpr, shapes = trace(site.values(cells), packed.leaves)
            site.undo()
            end = site.end.without_cells()
            site.let_go(site.end)
            site.refuse_leftovers(site.end)
            return (jaxpr, end.unflatten(shapes[0])) if return_shape else jaxpr

    return Transformed(f, make_jaxpr, call)
