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
    """Compute the value of a function and its derivative along tangents (forward mode); as `jax.jvp`, with states.

    `fun` runs once, and each of its writes to states happens once.

    Args:
      fun: the function. Its result is an array or a pytree of arrays, or with `has_aux` a pair of it and anything else.
      primals: a tuple of the positional arguments of `fun`: the point at which it is differentiated.
      tangents: a tuple with a tangent for each argument: arrays of the shapes and dtypes of the argument, in its structure, with
        a `State` in place of each Module or Variable. The State has one tangent for each state that `wrt` selects, by path. With
        `of`, a pair: a State for `of`, and this tuple. If there are no arguments, the State alone.
      has_aux: whether `fun` returns a pair ``(value, aux)``, of which `aux` is passed through, as in `jax.jvp`.
      wrt: a filter: which states of modules are differentiated. States that are frozen or not of floats are left out.
      of: a Module, a Variable, or a tuple of them, that `fun` uses without having it as an argument. It is differentiated too.

    Returns:
      A pair ``(value, tangent)``, both in the structure of the result; with `has_aux` a triple ``(value, tangent, aux)``. The
      values that `fun` writes to states have no tangent afterwards; return a value from `fun` to get its tangent.

    Raises:
      ArgumentError: the tangents do not fit the arguments, or the primals are no tuple.
      FilterError: an argument holds nothing to differentiate.

    Example:
      >>> import jax, jax.numpy as jnp, mutatis as mu
      >>> model = mu.nn.Linear(2, 1, rngs=mu.Rngs(0))
      >>> direction = jax.tree.map(jnp.ones_like, mu.state(model, mu.Param))
      >>> x = jnp.array([3.0, 4.0])
      >>> value, tangent = mu.jvp(lambda model, x: model(x), (model, x), (direction, jnp.zeros(2)))
      >>> tangent  # 3 + 4 of the kernel, 1 of the bias
      Array([8.], dtype=float32)
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
    """Compute the value of a function and its pullback, which maps cotangents of the result to cotangents of the arguments.

    It is `jax.vjp`, with states: reverse-mode differentiation of a function whose result need not be a scalar. `fun` runs once,
    and each of its writes to states happens once. The pullback writes nothing; you may call it several times.

    Args:
      fun: the function. Its result is an array or a pytree of arrays, or with `has_aux` a pair of it and anything else.
      *primals: the positional arguments of `fun`: the point at which it is differentiated.
      has_aux: whether `fun` returns a pair ``(value, aux)``, of which `aux` is passed through, as in `jax.vjp`.
      reduce_axes: as in `jax.vjp`, which has deprecated it and takes only ``()``.
      wrt: a filter: which states of modules are differentiated. States that are frozen or not of floats are left out.
      of: a Module, a Variable, or a tuple of them, that `fun` uses without having it as an argument. It is differentiated too.
      **options: `saveable_args` and `in_nzs` of the `jax.vjp` of JAX 0.12: bools for the primals, one for each Module.

    Returns:
      A pair ``(value, pullback)``; with `has_aux` a triple ``(value, pullback, aux)``. The pullback takes a cotangent in the
      structure of the value. It returns a tuple with a cotangent for each argument, with a `State` in place of each Module or
      Variable; with `of`, a pair of a State for `of` and this tuple. If there are no arguments, it returns the State alone. The
      pullback of JAX itself, with its attributes, is ``pullback.args[0]``.

    Raises:
      FilterError: an argument holds nothing to differentiate.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> model = mu.nn.Linear(2, 1, rngs=mu.Rngs(0))
      >>> value, pullback = mu.vjp(lambda model, x: model(x), model, jnp.array([3.0, 4.0]))
      >>> for_model, for_x = pullback(jnp.ones(1))
      >>> for_model["kernel"], for_x.shape
      (Array([[3.],
             [4.]], dtype=float32), (2,))
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
    """Compute the value of a function and its derivative there, as a linear map of tangents; as `jax.linearize`, with states.

    Use it in place of `mu.jvp` for many tangents at one point: `fun` runs once, and each of its writes to states happens once.
    The map writes nothing; you may call it several times.

    Args:
      fun: the function. Its result is an array or a pytree of arrays, or with `has_aux` a pair of it and anything else.
      *primals: the positional arguments of `fun`: the point at which it is differentiated.
      has_aux: whether `fun` returns a pair ``(value, aux)``, of which `aux` is passed through, as in `jax.linearize`.
      wrt: a filter: which states of modules are differentiated. States that are frozen or not of floats are left out.
      of: a Module, a Variable, or a tuple of them, that `fun` uses without having it as an argument. It is differentiated too;
        the map then takes a State of its tangents as the first argument.
      **options: `in_nzs` of the `jax.linearize` of JAX 0.12: bools for the primals, one for each Module.

    Returns:
      A pair ``(value, linear_map)``; with `has_aux` a triple ``(value, linear_map, aux)``. The map takes a tangent for each
      argument, with a `State` in place of each Module or Variable as in `mu.jvp`, and returns the tangent of the value. The map
      of JAX itself, with its attributes, is ``linear_map.args[0]``.

    Raises:
      FilterError: an argument holds nothing to differentiate.

    Example:
      >>> import jax, jax.numpy as jnp, mutatis as mu
      >>> model = mu.nn.Linear(2, 1, rngs=mu.Rngs(0))
      >>> value, linear_map = mu.linearize(lambda model, x: model(x), model, jnp.array([3.0, 4.0]))
      >>> direction = jax.tree.map(jnp.ones_like, mu.state(model, mu.Param))
      >>> linear_map(direction, jnp.zeros(2))  # 3 + 4 of the kernel, 1 of the bias
      Array([8.], dtype=float32)
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
