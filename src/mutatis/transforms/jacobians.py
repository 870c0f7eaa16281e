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
    """Make a function that returns the Jacobian of `fun`, computed in forward mode; as `jax.jacfwd`, with states.

    It computes the Jacobian column by column, so it is the cheaper choice where there are fewer inputs than outputs; `mu.jacrev`
    is the choice otherwise. Each write of `fun` to a state happens once.

    Args:
      fun: a function whose result is an array or a pytree of arrays, or with `has_aux` a pair of it and anything else. Without
        `fun`, the result is a decorator.
      argnums: the position of the argument to differentiate, or a tuple of positions. The default is the first argument.
      has_aux: whether `fun` returns a pair ``(value, aux)``, of which `aux` is passed through.
      holomorphic: whether `fun` is promised to be holomorphic, as in `jax.jacfwd`.
      wrt: a filter: which states of modules are differentiated, as in `mu.value_and_grad`.
      of: a model that `fun` uses without having it as an argument, as in `mu.value_and_grad`.

    Returns:
      A function with the arguments of `fun` that returns the Jacobian, or with `has_aux` a pair ``(jacobian, aux)``. The Jacobian
      has the structure of the result of `fun`. In place of each array of it stands a tree as `mu.grad` returns it, with a `State`
      for each Module or Variable; the arrays in this tree have the axes of the output, followed by the axes of the input.

    Raises:
      FilterError: an argument holds nothing to differentiate.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> model = mu.nn.Linear(2, 3, rngs=mu.Rngs(0))
      >>> x = jnp.ones(2)
      >>> jacobian = mu.jacfwd(lambda model, x: model(x))(model, x)
      >>> jacobian["kernel"].shape, jacobian["bias"].shape
      ((3, 2, 3), (3, 3))
      >>> mu.jacfwd(lambda model, x: model(x), argnums=1)(model, x).shape
      (3, 2)
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
    """Make a function that returns the Jacobian of `fun`, computed in reverse mode; as `jax.jacrev`, with states.

    It computes the Jacobian row by row, so it is the cheaper choice where there are fewer outputs than inputs, as in most models;
    `mu.jacfwd` is the choice otherwise. Each write of `fun` to a state happens once.

    Args:
      fun: a function whose result is an array or a pytree of arrays, or with `has_aux` a pair of it and anything else. Without
        `fun`, the result is a decorator.
      argnums, has_aux, wrt, of: as in `mu.jacfwd`. They say which arguments and states are differentiated, and whether `fun`
        returns a pair ``(value, aux)``.
      holomorphic, allow_int: as in `jax.jacrev`: whether `fun` is promised to be holomorphic, and whether inputs may be integers.

    Returns:
      A function with the arguments of `fun` that returns the Jacobian in the form of `mu.jacfwd`, or with `has_aux` a pair
      ``(jacobian, aux)``.

    Raises:
      FilterError: an argument holds nothing to differentiate.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> model = mu.nn.Linear(4, 2, rngs=mu.Rngs(0))
      >>> jacobian = mu.jacrev(lambda x: model(x), of=model)(jnp.ones(4))
      >>> jacobian["kernel"].shape, jacobian["bias"].shape
      ((2, 4, 2), (2, 2))
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
    """Make a function that returns the Hessian of `fun`, its second derivatives; as `jax.hessian`, with states.

    Each write of `fun` to a state happens once.

    Args:
      fun: a function whose result is an array or a pytree of arrays, mostly a scalar loss, or with `has_aux` a pair of it and
        anything else. Without `fun`, the result is a decorator.
      argnums, has_aux, holomorphic, wrt, of: as in `mu.jacfwd`. They say which arguments and states are differentiated, whether
        `fun` returns a pair ``(value, aux)``, and whether it is promised to be holomorphic.

    Returns:
      A function with the arguments of `fun` that returns the Hessian, or with `has_aux` a pair ``(hessian, aux)``. The Hessian
      has the structure of a Jacobian (`mu.jacfwd`) in which another such tree stands in place of each array. For a scalar
      function of a model it is a `State` of States: ``hessian[path][other]`` has the axes of the one state, followed by those of
      the other.

    Raises:
      FilterError: an argument holds nothing to differentiate.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> model = mu.nn.Linear(2, 1, rngs=mu.Rngs(0))
      >>> def loss_fn(model, x):
      ...     return jnp.sum(model(x) ** 2)
      >>> hessian = mu.hessian(loss_fn)(model, jnp.array([3.0, 4.0]))
      >>> hessian["kernel"]["bias"].shape, float(hessian["bias"]["bias"][0, 0])
      ((2, 1, 1), 2.0)
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
