"""`mu.grad` and `mu.value_and_grad`: gradients with respect to the states of modules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from mutatis.core.calls import takes
from mutatis.model.filters import FilterLike
from mutatis.model.kinds import Param
from mutatis.tracing.differentiation import UNSAID, Differentiation
from mutatis.tracing.transformed import Transformed


@takes("mu.value_and_grad(f)(x)", _="Call what comes back with the arguments: `mu.value_and_grad(f)(x)`.")
def value_and_grad(
    f: Callable[..., Any] | None = None,
    argnums: int | Sequence[int] = UNSAID,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
    reduce_axes: Sequence[Any] = (),
    *,
    wrt: FilterLike = Param,
    of: Any = None,
) -> Any:
    """A function that gives the value of `f` and its gradient; as `jax.value_and_grad`, with states.

    The gradient has the structure of the argument, with each Module or Variable replaced by a `State` of the gradients of
    the states that `wrt` selects. A state that is reached by several paths has one entry, the sum, at its first place.
    All writes of `f` happen, once.

    Args:
      f: a function with a scalar result, or a pair of it and anything, if `has_aux`.
      argnums, has_aux, holomorphic, allow_int, reduce_axes: as in `jax.value_and_grad`.
      wrt: which states of modules are differentiated; frozen states and those that are not floats are left out. A tuple
        gives one filter for each of several `argnums`.
      of: a Module, a Variable, or a tuple of them, that `f` names: they are differentiated in place of an argument; with
        `argnums` said too, the gradient is a pair, of `of` and of the arguments.

    Raises:
      FilterError: an argument holds nothing to differentiate.
      DeferredStateError: a state to differentiate has not been created yet.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> w = mu.Param(jnp.array([1.0, 2.0]))
      >>> value, gradient = mu.value_and_grad(lambda x: jnp.sum(w * x) ** 2, of=w)(jnp.array([3.0, 4.0]))
      >>> value, gradient[()]
      (Array(121., dtype=float32), Array([66., 88.], dtype=float32))
    """
    options = _options(locals())
    return _transform(value_and_grad, f, options, lambda value, gradient: (value, gradient))


@takes("mu.grad(f)(x)", _="Call what comes back with the arguments: `mu.grad(f)(x)`.")
def grad(
    f: Callable[..., Any] | None = None,
    argnums: int | Sequence[int] = UNSAID,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
    reduce_axes: Sequence[Any] = (),
    *,
    wrt: FilterLike = Param,
    of: Any = None,
) -> Any:
    """A function that gives the gradient of `f`: `value_and_grad` without the value.

    With `has_aux` it gives a pair of the gradient and the auxiliary result.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> mu.grad(lambda v: jnp.sum(v.value**2))(mu.Param(jnp.array([1.0, 2.0])))[()]
      Array([2., 4.], dtype=float32)
    """
    options = _options(locals())

    def pick(value: Any, gradient: Any) -> Any:
        return (gradient, value[1]) if has_aux else gradient

    return _transform(grad, f, options, pick)


def _options(given: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in given.items() if k != "f"}


def _transform(public: Callable[..., Any], f: Any, options: dict[str, Any], pick: Callable[[Any, Any], Any]) -> Any:
    remake = functools.partial(public, **options)
    if f is None:
        return remake

    def call(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return pick(*_differentiate(public.__name__, function, args, kwargs, **options))

    return Transformed(f, remake, call)


def _differentiate(
    name: str,
    function: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    argnums: int | Sequence[int],
    has_aux: bool,
    wrt: FilterLike,
    of: Any,
    **options: Any,
) -> tuple[Any, Any]:
    """The value and the gradient of one call."""
    with Differentiation(name, function, args, kwargs, argnums=argnums, has_aux=has_aux, wrt=wrt, of=of) as site:
        transform = jax.value_and_grad(site.pure_scalar, has_aux=True, **options)
        (value, aux), gradient = transform(site.inputs)
        return site.finish([value], aux), site.form.of_inputs(gradient)
