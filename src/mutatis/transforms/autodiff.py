"""`mu.grad` and `mu.value_and_grad`: gradients with respect to the states of modules.

The selected states are the inputs of a pure function under `jax.value_and_grad`; everything else the function reads is
closed over, and everything it writes comes back as an auxiliary output and is written once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mutatis.cells import UNSET, Deferred
from mutatis.errors import DeferredStateError, FilterError, StructureError
from mutatis.filters import FilterLike, Path, as_filter
from mutatis.graph import show_path, variables
from mutatis.kinds import Param
from mutatis.lifting import Packed, Site, Transformed, function_name, write_back
from mutatis.modules import is_node
from mutatis.state import State
from mutatis.variables import Variable, raw_value


class _Unsaid(int):
    """The default of `argnums`, equal to 0: with `of` it means none."""


_UNSAID = _Unsaid(0)


def value_and_grad(
    f: Callable[..., Any] | None = None,
    argnums: int | Sequence[int] = _UNSAID,
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


def grad(
    f: Callable[..., Any] | None = None,
    argnums: int | Sequence[int] = _UNSAID,
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


class _Target:
    """One thing to differentiate: an argument, or what `of` names; its leaves and the selected cells of its nodes."""

    def __init__(self, name: str, value: Any, wrt: FilterLike, seen: set[Variable]) -> None:
        self.packed = Packed(value)
        if name == "of" and (self.packed.leaves or not self.packed.nodes):
            raise FilterError(
                f"`of` cannot be a {type(value).__name__}",
                path="of",
                expected="a Module, a Variable, or a tuple, list or dict of them",
                got=f"{value!r:.60}",
                cure="Name what the function reads: `of=model`; arrays are differentiated as arguments, by `argnums`.",
            )
        self.paths: list[dict[Path, Variable]] = []  # by node
        selects = as_filter(wrt)
        elsewhere = False
        for node in self.packed.nodes:
            chosen = {}
            for path, cell in variables(node).items():
                if cell.frozen or not selects(path, cell):
                    continue
                if cell in seen:
                    elsewhere = True  # its gradient is at its first place
                elif _differentiable(name, path, cell):
                    seen.add(cell)
                    chosen[path] = cell
            self.paths.append(chosen)
        self.cells = [cell for chosen in self.paths for cell in chosen.values()]
        if self.packed.nodes and not self.cells and not self.packed.leaves and not elsewhere:
            raise FilterError(
                f"there is nothing to differentiate in `{name}`",
                path=name,
                expected=f"float states, not frozen, selected by {selects!r}",
                cure="Say which states: `wrt=mu.Variable`, or make them `mu.Param`; `mu.thaw(model)` makes them live.",
            )

    def gradient(self, cells: list[Any], leaves: list[Any]) -> Any:
        """The gradient in the structure of the argument."""
        values = iter(cells)
        states = []
        for chosen in self.paths:
            kinds = {path: type(cell) for path, cell in chosen.items()}
            states.append(State({path: next(values) for path in chosen}, kinds))
        return self.packed.fill(leaves, states)


def _differentiable(name: str, path: Path, cell: Variable) -> bool:
    value = raw_value(cell)
    if value is UNSET or type(value) is Deferred:
        raise DeferredStateError(
            f"state `{name}{'.' if path else ''}{show_path(path)}` cannot be differentiated: it has not been created yet",
            path=f"{name}.{show_path(path)}",
            made_at=cell.made_at,
            cure="Call the model once before, or give the sizes where its layers are made.",
        )
    return all(jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in jax.tree.leaves(value))


def _check_result(site: Site, result: Any, has_aux: bool) -> Any:
    """The value to differentiate, the first leaf of a result; JAX itself checks its shape and dtype."""
    fits = not has_aux or (isinstance(result, tuple) and len(result) == 2)
    value = result[0] if fits and has_aux else result
    if fits and not is_node(value) and jax.tree.structure(value) == jax.tree.structure(0):
        return value
    raise StructureError(
        f"the function of `{site.label}` does not return what is differentiated",
        where=site.label,
        expected="a pair of a scalar array and anything (has_aux=True)" if has_aux else "one scalar array",
        got=f"a {type(result).__name__}" + (f" of {len(result)}" if isinstance(result, tuple | list) else ""),
        cure="Return `loss`; with more, return `loss, rest` and say `has_aux=True`; of a Variable, return its `.value`.",
    )


def _position(name: str, function: Any, number: int, count: int) -> int:
    if not -count <= number < count:
        raise FilterError(
            f"`{name}` cannot differentiate argument {number}: the call has {count} positional arguments",
            where=f"{name}({function_name(function)})",
            expected=f"a position below {count}",
            got=number,
            cure="Say which, `argnums=0`, or differentiate what the function names: `of=model`.",
        )
    return number % count


def _differentiate(
    name: str,
    function: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    argnums: int | Sequence[int],
    has_aux: bool,
    holomorphic: bool,
    allow_int: bool,
    reduce_axes: Sequence[Any],
    wrt: FilterLike,
    of: Any,
) -> tuple[Any, Any]:
    """The value and the gradient of one call."""
    by_argument = of is None or argnums is not _UNSAID
    several = not isinstance(argnums, int)
    wanted = [argnums] if isinstance(argnums, int) else [*argnums]
    numbers = [_position(name, function, n, len(args)) for n in wanted] if by_argument else []
    filters = list(wrt) if several and isinstance(wrt, tuple) and len(wrt) == len(numbers) else [wrt] * len(numbers)
    with Site(name, function, args, kwargs, others=[] if of is None else [("of", of)]) as site:
        seen: set[Variable] = set()
        targets = [] if of is None else [_Target("of", of, wrt, seen)]
        targets += [_Target(f"args[{n}]", args[n], filter, seen) for n, filter in zip(numbers, filters, strict=True)]
        cells = [cell for target in targets for cell in target.cells]

        def pure(inputs: tuple[list[Any], list[list[Any]]]) -> Any:
            values, leaves = inputs
            new_args = list(args)
            for number, target, new in zip(numbers, targets[-len(numbers) :] if numbers else [], leaves, strict=True):
                new_args[number] = target.packed.fill(new)
            overlay = dict(zip(cells, values, strict=True))
            site.end, out, written = site.run(overlay, call=lambda: function(*new_args, **kwargs))
            return _check_result(site, site.end.fill(out), has_aux), (out[1:], written)

        inputs = (site.values(cells), [target.packed.leaves for target in targets[len(targets) - len(numbers) :]])
        transform = jax.value_and_grad(
            pure, 0, has_aux=True, holomorphic=holomorphic, allow_int=allow_int, reduce_axes=reduce_axes
        )
        (loss, (rest, written)), (by_cell, by_leaf) = transform(inputs)
        write_back(site.end, written)
        value = site.end.fill([loss, *rest])

    per_target = iter(by_cell)
    leaves_of = iter(by_leaf)
    gradients = []
    for index, target in enumerate(targets):
        own = [next(per_target) for _ in target.cells]
        is_of = of is not None and index == 0
        gradients.append(target.gradient(own, [] if is_of else next(leaves_of)))
    by_args: Any = tuple(gradients[len(gradients) - len(numbers) :])
    if not several and by_args:
        (by_args,) = by_args
    if of is None:
        return value, by_args
    return value, (gradients[0], by_args) if by_argument else gradients[0]
