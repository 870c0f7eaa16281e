"""`mu.jvp`, `mu.vjp`, `mu.linearize`: the derivative of a stateful function as a linear map.

The function runs once, and what it writes is written once. The linear maps write nothing, however often they are applied.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, overload

import jax

from mutatis.core.showing import show_class
from mutatis.errors import ArgumentError
from mutatis.model.filters import FilterLike
from mutatis.model.kinds import Param
from mutatis.tracing.differentiation import Differentiation, Form

R = TypeVar("R")
Aux = TypeVar("Aux")


@overload
def jvp(
    fun: Callable[..., tuple[R, Aux]],
    primals: Sequence[Any],
    tangents: Any,
    *,
    has_aux: Literal[True],
    wrt: FilterLike = ...,
    of: Any = ...,
) -> tuple[R, Any, Aux]: ...
@overload
def jvp(
    fun: Callable[..., R],
    primals: Sequence[Any],
    tangents: Any,
    has_aux: Literal[False] = ...,
    *,
    wrt: FilterLike = ...,
    of: Any = ...,
) -> tuple[R, Any]: ...
def jvp(
    fun: Callable[..., Any],
    primals: Sequence[Any],
    tangents: Any,
    has_aux: bool = False,
    *,
    wrt: FilterLike = Param,
    of: Any = None,
) -> tuple[Any, ...]:
    """The value of a function and its derivative along tangents; as `jax.jvp`, with states.

    Args:
      fun: the function; its result is differentiated, or the first of a pair, if `has_aux`.
      primals: its positional arguments.
      tangents: a tangent for each, in its structure, with a `State` of tangents for the states that `wrt` selects in the
        place of each Module or Variable; with `of`, a pair of a State for it and these (a State only, without primals).
      has_aux: as in `jax.jvp`.
      wrt: which states of modules are differentiated; frozen states and those that are not floats are left out.
      of: nodes that the function names and that are differentiated besides.

    Returns:
      The value and its tangent (and the auxiliary result). What `fun` writes has no tangent outside: return it to get one.

    Raises:
      ArgumentError: the tangents do not fit.
      FilterError: an argument holds nothing to differentiate.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> w = mu.Param(jnp.array([1.0, 2.0]))
      >>> mu.jvp(lambda v, x: jnp.sum(v * x), (w, 3.0), (mu.state(w), 0.0))
      (Array(9., dtype=float32), Array(9., dtype=float32))
    """
    if not isinstance(primals, tuple | list):
        raise ArgumentError(
            "`mu.jvp` takes its primals as a tuple",
            path="primals",
            expected="a tuple with each positional argument, and one with a tangent for each",
            got=show_class(primals),
            cure="`mu.jvp(f, (x,), (dx,))`",
        )
    with _site("jvp", fun, tuple(primals), has_aux, wrt, of) as site:
        given = site.form.to_inputs(tangents)
        out, tangent, aux = jax.jvp(site.pure, (site.inputs,), (given,), has_aux=True)
        return _result(site, out, aux, has_aux, site.form.of_outputs(tangent))


@overload
def vjp(
    fun: Callable[..., tuple[R, Aux]],
    *primals: Any,
    has_aux: Literal[True],
    wrt: FilterLike = ...,
    of: Any = ...,
    reduce_axes: Sequence[Any] = ...,
    **options: Any,
) -> tuple[R, Callable[..., Any], Aux]: ...
@overload
def vjp(
    fun: Callable[..., R],
    *primals: Any,
    has_aux: Literal[False] = ...,
    wrt: FilterLike = ...,
    of: Any = ...,
    reduce_axes: Sequence[Any] = ...,
    **options: Any,
) -> tuple[R, Callable[..., Any]]: ...
def vjp(
    fun: Callable[..., Any],
    *primals: Any,
    has_aux: bool = False,
    reduce_axes: Sequence[Any] = (),
    wrt: FilterLike = Param,
    of: Any = None,
    **options: Any,
) -> tuple[Any, ...]:
    """The value of a function and its pullback; as `jax.vjp`, with states.

    Args:
      fun: the function; its result is differentiated, or the first of a pair, if `has_aux`.
      *primals: its positional arguments.
      has_aux: as in `jax.vjp`.
      reduce_axes: as in `jax.vjp`.
      wrt: which states of modules are differentiated; frozen states and those that are not floats are left out.
      of: nodes that the function names and that are differentiated besides.
      **options: `saveable_args` and `in_nzs` of the `jax.vjp` of JAX 0.12: bools for the primals, one for each Module.

    Returns:
      The value and the pullback (and the auxiliary result). The pullback takes a cotangent of the value and gives a tuple of
      cotangents of the primals, with a `State` for each Module or Variable; with `of`, a pair of a State for it and that
      tuple (a State only, without primals). JAX's own pullback, with its attributes, is ``pullback.args[0]``.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> w = mu.Param(jnp.array([1.0, 2.0]))
      >>> value, pullback = mu.vjp(lambda v, x: v * x, w, 3.0)
      >>> for_w, for_x = pullback(jnp.array([1.0, 0.0]))
      >>> for_w[()], float(for_x)
      (Array([3., 0.], dtype=float32), 1.0)
    """
    with _site("vjp", fun, primals, has_aux, wrt, of) as site:
        flags = {name: site.flags(value) for name, value in options.items()}
        out, pull, aux = jax.vjp(site.pure, site.inputs, has_aux=True, reduce_axes=reduce_axes, **flags)
        linear = jax.tree_util.Partial(functools.partial(_pull_back, site.form), pull)
        return _result(site, out, aux, has_aux, linear)


def _pull_back(form: Form, pull: Any, cotangent: Any) -> Any:
    (inputs,) = pull(form.to_outputs(cotangent))
    return form.of_inputs(inputs)


@overload
def linearize(
    fun: Callable[..., tuple[R, Aux]],
    *primals: Any,
    has_aux: Literal[True],
    wrt: FilterLike = ...,
    of: Any = ...,
    **options: Any,
) -> tuple[R, Callable[..., Any], Aux]: ...
@overload
def linearize(
    fun: Callable[..., R],
    *primals: Any,
    has_aux: Literal[False] = ...,
    wrt: FilterLike = ...,
    of: Any = ...,
    **options: Any,
) -> tuple[R, Callable[..., Any]]: ...
def linearize(
    fun: Callable[..., Any],
    *primals: Any,
    has_aux: bool = False,
    wrt: FilterLike = Param,
    of: Any = None,
    **options: Any,
) -> tuple[Any, ...]:
    """The value of a function and its derivative there as a function of tangents; as `jax.linearize`, with states.

    Args:
      fun: the function; its result is differentiated, or the first of a pair, if `has_aux`.
      *primals: its positional arguments.
      has_aux: as in `jax.linearize`.
      wrt: which states of modules are differentiated; frozen states and those that are not floats are left out.
      of: nodes that the function names and that are differentiated besides; their tangents, a State, come first.
      **options: `in_nzs` of the `jax.linearize` of JAX 0.12: bools for the primals, one for each Module.

    Returns:
      The value and the linear map (and the auxiliary result). The map takes a tangent for each primal, as `mu.jvp`. JAX's own
      map, with its attributes, is ``map.args[0]``.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> w = mu.Param(2.0)
      >>> value, along = mu.linearize(lambda v, x: v * x, w, 3.0)
      >>> value, along(mu.state(w), 1.0)
      (Array(6., dtype=float32), Array(8., dtype=float32))
    """
    with _site("linearize", fun, primals, has_aux, wrt, of) as site:
        flags = {name: site.flags(value) for name, value in options.items()}
        out, push, aux = jax.linearize(site.pure, site.inputs, has_aux=True, **flags)
        linear = jax.tree_util.Partial(functools.partial(_push_forward, site.form), push)
        return _result(site, out, aux, has_aux, linear)


def _push_forward(form: Form, push: Any, *tangents: Any) -> Any:
    return form.of_outputs(push(form.of_each(tangents)))


def _site(name: str, fun: Any, primals: tuple[Any, ...], has_aux: bool, wrt: FilterLike, of: Any) -> Differentiation:
    numbers = tuple(range(len(primals)))
    return Differentiation(name, fun, primals, {}, argnums=numbers, has_aux=has_aux, wrt=wrt, of=of)


def _result(site: Differentiation, out: Sequence[Any], aux: Any, has_aux: bool, linear: Any) -> tuple[Any, ...]:
    result = site.finish(out, aux)
    return (result[0], linear, result[1]) if has_aux else (result, linear)
