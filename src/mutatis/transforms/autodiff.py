"""`mu.grad` and `mu.value_and_grad`: gradients with respect to the states of modules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Concatenate, Generic, Literal, ParamSpec, TypedDict, TypeVar, Unpack, overload

import jax

from mutatis.core.calls import takes
from mutatis.model.filters import FilterLike
from mutatis.model.kinds import Param
from mutatis.model.modules import Module
from mutatis.model.state import State
from mutatis.model.variables import Variable
from mutatis.tracing.differentiation import UNSAID, Differentiation
from mutatis.tracing.transformed import Transformed

P = ParamSpec("P")
Rest = ParamSpec("Rest")
R = TypeVar("R")
Aux = TypeVar("Aux")
N = TypeVar("N", bound=Module | Variable[Any] | State)
OfNode = TypeVar("OfNode")
OfArray = TypeVar("OfArray")
Other = TypeVar("Other", covariant=True)

if TYPE_CHECKING:

    class _Unsaid:
        """Declared of no argument: who matches it is an argument without a declaration, as those of a lambda are."""

    class Gradient(Transformed[P, Other], Generic[P, OfNode, OfArray, Other]):
        """What gives a gradient: its type is known of what is declared to be a node or an array, and else it is any.

        Other transforms take it as the `Transformed` that it is: of overloaded calls mypy knows no signature to keep.
        """

        @overload
        def __call__(self: Gradient[[_Unsaid], OfNode, OfArray, Other], *args: P.args, **kwargs: P.kwargs) -> Other: ...
        @overload
        def __call__(
            self: Gradient[[_Unsaid, _Unsaid], OfNode, OfArray, Other], *args: P.args, **kwargs: P.kwargs
        ) -> Other: ...
        @overload
        def __call__(
            self: Gradient[[_Unsaid, _Unsaid, _Unsaid], OfNode, OfArray, Other], *args: P.args, **kwargs: P.kwargs
        ) -> Other: ...
        @overload
        def __call__(
            self: Gradient[Concatenate[N, Rest], OfNode, OfArray, Other],
            first: N,
            *args: Rest.args,
            **kwargs: Rest.kwargs,
        ) -> OfNode: ...
        @overload
        def __call__(
            self: Gradient[Concatenate[jax.Array, Rest], OfNode, OfArray, Other],
            first: jax.Array,
            *args: Rest.args,
            **kwargs: Rest.kwargs,
        ) -> OfArray: ...
        @overload
        def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Other: ...
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class GradOptions(TypedDict, total=False):
    """What `grad` and `value_and_grad` can be told, for type checkers."""

    holomorphic: bool
    allow_int: bool
    reduce_axes: Sequence[Any]
    wrt: FilterLike


@overload
def value_and_grad(
    f: Callable[P, tuple[R, Aux]], *, has_aux: Literal[True], of: Module | Variable[Any], **options: Unpack[GradOptions]
) -> Transformed[P, tuple[tuple[R, Aux], State]]: ...
@overload
def value_and_grad(
    f: Callable[P, R], *, has_aux: Literal[False] = ..., of: Module | Variable[Any], **options: Unpack[GradOptions]
) -> Transformed[P, tuple[R, State]]: ...
@overload
def value_and_grad(
    f: Callable[P, tuple[R, Aux]], argnums: Literal[0] = ..., *, has_aux: Literal[True], **options: Unpack[GradOptions]
) -> Gradient[P, tuple[tuple[R, Aux], State], tuple[tuple[R, Aux], jax.Array], tuple[tuple[R, Aux], Any]]: ...
@overload
def value_and_grad(
    f: Callable[P, R], argnums: Literal[0] = ..., has_aux: Literal[False] = ..., **options: Unpack[GradOptions]
) -> Gradient[P, tuple[R, State], tuple[R, jax.Array], tuple[R, Any]]: ...
@overload
def value_and_grad(
    f: Callable[P, tuple[R, Aux]],
    argnums: int | Sequence[int] = ...,
    *,
    has_aux: Literal[True],
    of: Any = ...,
    **options: Unpack[GradOptions],
) -> Transformed[P, tuple[tuple[R, Aux], Any]]: ...
@overload
def value_and_grad(
    f: Callable[P, R],
    argnums: int | Sequence[int] = ...,
    has_aux: bool = ...,
    holomorphic: bool = ...,
    allow_int: bool = ...,
    reduce_axes: Sequence[Any] = ...,
    *,
    wrt: FilterLike = ...,
    of: Any = ...,
) -> Transformed[P, tuple[Any, Any]]: ...
@overload
def value_and_grad(
    f: None = None,
    argnums: int | Sequence[int] = ...,
    has_aux: bool = ...,
    *,
    of: Any = ...,
    **options: Unpack[GradOptions],
) -> Callable[[Callable[P, R]], Transformed[P, tuple[Any, Any]]]: ...
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
    """Make a function that returns the value of `f` and its gradient; as `jax.value_and_grad`, with states.

    The gradient has the structure of the differentiated argument, with a `State` in place of each Module or Variable. The State
    has one gradient for each state that `wrt` selects, by path. A state with several paths (a shared weight) has one entry, at
    its first path: the sum over all uses. `f` may write to states; each write happens once.

    Args:
      f: a function whose result is a float scalar, or with `has_aux` a pair of it and anything else. Without `f`, the result is a
        decorator.
      argnums: the position of the argument to differentiate, or a tuple of positions. The default is the first argument.
      has_aux: whether `f` returns a pair ``(value, aux)``, of which `aux` is passed through.
      holomorphic, allow_int, reduce_axes: as in `jax.value_and_grad`.
      wrt: a filter: which states of modules are differentiated. States that are frozen or not of floats are left out. With
        several `argnums`, a tuple gives one filter for each.
      of: a Module, a Variable, or a tuple of them, that `f` uses without having it as an argument. It is differentiated in place
        of an argument. If `argnums` is given too, the gradient is a pair: of `of` and of the arguments.

    Returns:
      A function with the arguments of `f` that returns ``(value, gradient)``, or with `has_aux` ``((value, aux), gradient)``.

    Raises:
      FilterError: an argument holds nothing to differentiate.
      DeferredStateError: a state to differentiate has not been created yet.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> model = mu.nn.Linear(2, 1, rngs=mu.Rngs(0))
      >>> def loss_fn(model, x, y):
      ...     return jnp.mean((model(x) - y) ** 2)
      >>> loss, grads = mu.value_and_grad(loss_fn)(model, jnp.ones((4, 2)), jnp.zeros((4, 1)))
      >>> loss.shape, [*grads], grads["kernel"].shape
      ((), [('bias',), ('kernel',)], (2, 1))
    """
    options = _options(locals())
    return _transform(value_and_grad, f, options, lambda value, gradient: (value, gradient))


@overload
def grad(
    f: Callable[P, tuple[R, Aux]], *, has_aux: Literal[True], of: Module | Variable[Any], **options: Unpack[GradOptions]
) -> Transformed[P, tuple[State, Aux]]: ...
@overload
def grad(
    f: Callable[P, R], *, has_aux: Literal[False] = ..., of: Module | Variable[Any], **options: Unpack[GradOptions]
) -> Transformed[P, State]: ...
@overload
def grad(
    f: Callable[P, tuple[R, Aux]], argnums: Literal[0] = ..., *, has_aux: Literal[True], **options: Unpack[GradOptions]
) -> Gradient[P, tuple[State, Aux], tuple[jax.Array, Aux], tuple[Any, Aux]]: ...
@overload
def grad(
    f: Callable[P, R], argnums: Literal[0] = ..., has_aux: Literal[False] = ..., **options: Unpack[GradOptions]
) -> Gradient[P, State, jax.Array, Any]: ...
@overload
def grad(
    f: Callable[P, tuple[R, Aux]],
    argnums: int | Sequence[int] = ...,
    *,
    has_aux: Literal[True],
    of: Any = ...,
    **options: Unpack[GradOptions],
) -> Transformed[P, tuple[Any, Aux]]: ...
@overload
def grad(
    f: Callable[P, R],
    argnums: int | Sequence[int] = ...,
    has_aux: bool = ...,
    holomorphic: bool = ...,
    allow_int: bool = ...,
    reduce_axes: Sequence[Any] = ...,
    *,
    wrt: FilterLike = ...,
    of: Any = ...,
) -> Transformed[P, Any]: ...
@overload
def grad(
    f: None = None,
    argnums: int | Sequence[int] = ...,
    has_aux: bool = ...,
    *,
    of: Any = ...,
    **options: Unpack[GradOptions],
) -> Callable[[Callable[P, R]], Transformed[P, Any]]: ...
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
    """Make a function that returns the gradient of `f`; as `jax.grad`, with states.

    The gradient has the structure of the differentiated argument, with a `State` in place of each Module or Variable. By default
    the State has the gradients of all parameters (`mu.Param`) by path. See `mu.value_and_grad`, which returns the value too.

    Args:
      f, argnums, has_aux, holomorphic, allow_int, reduce_axes, wrt, of: as in `mu.value_and_grad`. `f` returns a float scalar,
        `wrt` selects states, and `of` is a model that `f` uses without having it as an argument.

    Returns:
      A function with the arguments of `f` that returns the gradient, or with `has_aux` a pair ``(gradient, aux)``.

    Raises:
      FilterError: an argument holds nothing to differentiate.
      DeferredStateError: a state to differentiate has not been created yet.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> model = mu.nn.Linear(2, 1, rngs=mu.Rngs(0))
      >>> def loss_fn(model, x):
      ...     return jnp.sum(model(x))
      >>> grads = mu.grad(loss_fn)(model, jnp.array([3.0, 4.0]))
      >>> grads["kernel"], grads["bias"]
      (Array([[3.],
             [4.]], dtype=float32), Array([1.], dtype=float32))
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
