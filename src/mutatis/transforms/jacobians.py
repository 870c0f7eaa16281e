"""`mu.jacfwd`, `mu.jacrev`, `mu.hessian`: derivatives of every output with respect to every selected state and argument."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, overload

import jax

from mutatis.model.filters import FilterLike
from mutatis.model.kinds import Param
from mutatis.tracing.differentiation import UNSAID, Differentiation
from mutatis.tracing.transformed import Transformed

P = ParamSpec("P")


@overload
def jacfwd(
    fun: Callable[P, Any],
    argnums: int | Sequence[int] = ...,
    has_aux: bool = ...,
    holomorphic: bool = ...,
    *,
    wrt: FilterLike = ...,
    of: Any = ...,
) -> Transformed[P, Any]: ...
@overload
def jacfwd(
    fun: None = None,
    argnums: int | Sequence[int] = ...,
    has_aux: bool = ...,
    holomorphic: bool = ...,
    *,
    wrt: FilterLike = ...,
    of: Any = ...,
) -> Callable[[Callable[P, Any]], Transformed[P, Any]]: ...
def jacfwd(
    fun: Callable[..., Any] | None = None,
    argnums: int | Sequence[int] = UNSAID,
    has_aux: bool = False,
    holomorphic: bool = False,
    *,
    wrt: FilterLike = Param,
    of: Any = None,
) -> Any:
    """A function that gives the Jacobian of `fun`, column by column; as `jax.jacfwd`, with states.

    The result has the structure of what `fun` returns, with what `mu.grad` would give in the place of each leaf: its arrays
    have the axes of the output and then those of the input. All writes of `fun` happen, once.

    Args:
      fun: a function with an array or a pytree of arrays as its result, or a pair of that and anything, if `has_aux`.
      argnums, has_aux, holomorphic: as in `jax.jacfwd`.
      wrt, of: as in `mu.grad`.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> mu.jacfwd(lambda v: v.value**2)(mu.Param(jnp.array([1.0, 2.0])))[()]
      Array([[2., 0.],
             [0., 4.]], dtype=float32)
    """
    options = {"argnums": argnums, "has_aux": has_aux, "wrt": wrt, "of": of}
    return _transform(jacfwd, jax.jacfwd, fun, options, {"holomorphic": holomorphic})


@overload
def jacrev(
    fun: Callable[P, Any],
    argnums: int | Sequence[int] = ...,
    has_aux: bool = ...,
    holomorphic: bool = ...,
    allow_int: bool = ...,
    *,
    wrt: FilterLike = ...,
    of: Any = ...,
) -> Transformed[P, Any]: ...
@overload
def jacrev(
    fun: None = None,
    argnums: int | Sequence[int] = ...,
    has_aux: bool = ...,
    holomorphic: bool = ...,
    allow_int: bool = ...,
    *,
    wrt: FilterLike = ...,
    of: Any = ...,
) -> Callable[[Callable[P, Any]], Transformed[P, Any]]: ...
def jacrev(
    fun: Callable[..., Any] | None = None,
    argnums: int | Sequence[int] = UNSAID,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
    *,
    wrt: FilterLike = Param,
    of: Any = None,
) -> Any:
    """A function that gives the Jacobian of `fun`, row by row; as `jax.jacrev`, with states. See `mu.jacfwd`.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> w = mu.Param(jnp.array([1.0, 2.0]))
      >>> mu.jacrev(lambda x: jnp.sum(w * x), of=w)(jnp.array([3.0, 4.0]))[()]
      Array([3., 4.], dtype=float32)
    """
    options = {"argnums": argnums, "has_aux": has_aux, "wrt": wrt, "of": of}
    return _transform(jacrev, jax.jacrev, fun, options, {"holomorphic": holomorphic, "allow_int": allow_int})


@overload
def hessian(
    fun: Callable[P, Any],
    argnums: int | Sequence[int] = ...,
    has_aux: bool = ...,
    holomorphic: bool = ...,
    *,
    wrt: FilterLike = ...,
    of: Any = ...,
) -> Transformed[P, Any]: ...
@overload
def hessian(
    fun: None = None,
    argnums: int | Sequence[int] = ...,
    has_aux: bool = ...,
    holomorphic: bool = ...,
    *,
    wrt: FilterLike = ...,
    of: Any = ...,
) -> Callable[[Callable[P, Any]], Transformed[P, Any]]: ...
def hessian(
    fun: Callable[..., Any] | None = None,
    argnums: int | Sequence[int] = UNSAID,
    has_aux: bool = False,
    holomorphic: bool = False,
    *,
    wrt: FilterLike = Param,
    of: Any = None,
) -> Any:
    """A function that gives the second derivatives of `fun`; as `jax.hessian`, with states.

    The result is that of `mu.jacfwd`, with what `mu.grad` would give once more in the place of each leaf: of a model it is a
    `State` of States.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> mu.hessian(lambda v: jnp.sum(v.value**3))(mu.Param(jnp.array([1.0, 2.0])))[()][()]
      Array([[ 6.,  0.],
             [ 0., 12.]], dtype=float32)
    """
    options = {"argnums": argnums, "has_aux": has_aux, "wrt": wrt, "of": of}
    return _transform(hessian, jax.hessian, fun, options, {"holomorphic": holomorphic})


def _transform(
    public: Callable[..., Any], transform: Callable[..., Any], fun: Any, options: dict[str, Any], passed: dict[str, Any]
) -> Any:
    remake = functools.partial(public, **options, **passed)
    if fun is None:
        return remake

    def call(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with Differentiation(public.__name__, function, args, kwargs, **options) as site:
            derivatives, aux = transform(site.pure, has_aux=True, **passed)(site.inputs)
            form, structure = site.form, jax.tree.structure(site.inputs)

            def in_user_form(derivative: Any) -> Any:
                if public is hessian:
                    inner = map(form.of_inputs, structure.flatten_up_to(derivative))
                    derivative = jax.tree.unflatten(structure, inner)
                return form.of_inputs(derivative)

            shown = form.of_outputs(list(map(in_user_form, derivatives)))
            result = site.finish([None] * len(derivatives), aux)
            return (shown, result[1]) if options["has_aux"] else shown

    return Transformed(fun, remake, call)
