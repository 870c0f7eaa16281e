"""`mu.remat`: recompute in the backward pass what the forward pass computed; writes and random draws happen once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, TypeVar, overload

import jax
import jax.numpy as jnp

from mutatis import _compat
from mutatis.core.calls import takes
from mutatis.tracing.arguments import (
    FlatTree,
    as_names,
    as_numbers,
    check_static_arguments,
    leaf_names,
    static_positions,
)
from mutatis.tracing.call_site import CallSite
from mutatis.tracing.transformed import ForPartial, Transformed

P = ParamSpec("P")
R = TypeVar("R")


@overload
def remat(f: ForPartial, /) -> Any: ...
@overload
def remat(
    f: Transformed[P, R],
    *,
    prevent_cse: bool | Sequence[bool] = ...,
    policy: Callable[..., bool] | None = ...,
    static_argnums: int | tuple[int, ...] = ...,
    static_argnames: str | Iterable[str] = ...,
) -> Transformed[P, R]: ...
@overload
def remat(
    f: Callable[P, R],
    *,
    prevent_cse: bool | Sequence[bool] = ...,
    policy: Callable[..., bool] | None = ...,
    static_argnums: int | tuple[int, ...] = ...,
    static_argnames: str | Iterable[str] = ...,
) -> Transformed[P, R]: ...
@overload
def remat(
    f: None = None,
    *,
    prevent_cse: bool | Sequence[bool] = ...,
    policy: Callable[..., bool] | None = ...,
    static_argnums: int | tuple[int, ...] = ...,
    static_argnames: str | Iterable[str] = ...,
) -> Callable[[Callable[P, R]], Transformed[P, R]]: ...
@takes("mu.remat(f)(x)", _="Call what comes back with the arguments: `mu.remat(f)(x)`.")
def remat(
    f: Callable[..., Any] | None = None,
    *,
    prevent_cse: bool | Sequence[bool] = True,
    policy: Callable[..., bool] | None = None,
    static_argnums: int | tuple[int, ...] = (),
    static_argnames: str | Iterable[str] = (),
) -> Any:
    """Save memory in gradients: compute a function again in the backward pass instead of keeping its intermediate values.

    It is `jax.checkpoint`, with states. Writes to states happen once, although the function is computed twice, and the second
    computation draws the same random numbers.

    Args:
      f: a function, or a Module: `self.block = mu.remat(Block(...))`. Without `f`, the result is a decorator.
      policy: which intermediate values are kept after all, such as `jax.checkpoint_policies.dots_saveable`; as in
        `jax.checkpoint`.
      prevent_cse, static_argnums, static_argnames: as in `jax.checkpoint`.

    Returns:
      A function with the arguments and the result of `f`.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> layer = mu.nn.Linear(2, 1, rngs=mu.Rngs(0))
      >>> @mu.remat
      ... def block(layer, x):
      ...     return jnp.tanh(layer(x))
      >>> def loss_fn(layer, x):
      ...     return jnp.sum(block(layer, x))
      >>> mu.grad(loss_fn)(layer, jnp.ones((4, 2)))["kernel"].shape
      (2, 1)
    """
    options = {k: v for k, v in locals().items() if k != "f"}
    remake: functools.partial[Any] = functools.partial(remat, **options)
    if f is None:
        return remake
    return Transformed(f, remake, lambda function, args, kwargs: _remat(function, args, kwargs, **options))


def _remat(
    function: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    prevent_cse: Any,
    policy: Any,
    static_argnums: Any,
    static_argnames: Any,
) -> Any:
    statics = static_positions(len(args), kwargs, as_numbers(static_argnums), as_names(static_argnames))
    check_static_arguments(args, kwargs, statics, "remat")
    dynamic = (
        {n: arg for n, arg in enumerate(args) if n not in statics},
        {name: arg for name, arg in kwargs.items() if name not in statics},
    )
    packed = FlatTree(dynamic)
    with CallSite("remat", function, args, kwargs) as site:
        site.labels = lambda: {"leaves": leaf_names(function, args, kwargs, statics)}  # type: ignore[method-assign]

        def pure(leaves: list[Any]) -> Any:
            new_args, new_kwargs = packed.unflatten(leaves)
            all_args = [new_args.get(n, arg) for n, arg in enumerate(args)]
            site.end, out, written = site.run({}, call=lambda: function(*all_args, **{**kwargs, **new_kwargs}))
            packed.refuse_moved((new_args, new_kwargs), site.label)
            return out, written

        # `pure` is new on each call: `jax.checkpoint` reuses traces by function object.
        out, written = jax.checkpoint(site.marked(pure), prevent_cse=prevent_cse, policy=policy)(packed.leaves)
        return site.commit(site.end, jax.tree.map(_as_array, written), out)


def _as_array(leaf: Any) -> Any:
    """A result as an array: a constant comes out of an eager `jax.checkpoint` as a literal of JAX's own."""
    return leaf if type(leaf) is _compat.ARRAY or isinstance(leaf, jax.core.Tracer) else jnp.asarray(leaf, leaf.dtype)
