"""`mu.custom_jvp`: a function with a forward-mode rule of the user's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from mutatis.model.state import State
from mutatis.tracing.transformed import ForPartial
from mutatis.transforms.custom.rule import CustomRule, _Call, _instantiate, _is_float, _Plan, _run_primal

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
Q = ParamSpec("Q")
S = TypeVar("S", bound=tuple[Any, Any])


@overload
def custom_jvp(fun: ForPartial, /) -> Any: ...
@overload
def custom_jvp(
    fun: Callable[P, R], nondiff_argnums: Sequence[int] = ..., nondiff_argnames: Sequence[str] = ...
) -> CustomJVP[P, R]: ...
@overload
def custom_jvp(
    fun: None = None, nondiff_argnums: Sequence[int] = ..., nondiff_argnames: Sequence[str] = ...
) -> Callable[[Callable[P, R]], CustomJVP[P, R]]: ...
def custom_jvp(
    fun: Callable[..., Any] | None = None, nondiff_argnums: Sequence[int] = (), nondiff_argnames: Sequence[str] = ()
) -> Any:
    """Make a function whose derivative in forward mode is a rule of yours; as `jax.custom_jvp`, with states.

    Define the rule by the decorator ``@f.defjvp``: a function ``rule(primals, tangents) -> (out, tangent_out)``. The tangent of a
    Module or Variable is a `State`, with the tangents of its float states that are not frozen, by path. Reverse mode uses the
    rule too.

    The function and its rule may write to states, and each write happens once. For derivatives a written value is a constant.

    Args:
      fun: the function. Without `fun`, the result is a decorator.
      nondiff_argnums: the positions of arguments that are not differentiated, as in `jax.custom_jvp`. The rule gets them first.
      nondiff_argnames: the names of such arguments.

    Returns:
      A function with the arguments and the result of `fun`, and the methods `defjvp` and `defjvps`.

    Raises:
      StructureError: a derivative is taken with respect to a state that is in no argument, or no rule was defined.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> @mu.custom_jvp
      ... def log1pexp(x):
      ...     return jnp.log(1.0 + jnp.exp(x))
      >>> @log1pexp.defjvp
      ... def rule(primals, tangents):
      ...     (x,), (dx,) = primals, tangents
      ...     return log1pexp(x), (1.0 - 1.0 / (1.0 + jnp.exp(x))) * dx
      >>> float(mu.grad(log1pexp)(100.0))
      1.0
      >>> @mu.custom_jvp  # with a state among the arguments
      ... def scaled(w, x):
      ...     return w * x
      >>> @scaled.defjvp
      ... def rule(primals, tangents):
      ...     (w, x), (dw, dx) = primals, tangents
      ...     return scaled(w, x), 10 * (x * dw[()] + w * dx)  # `dw` is a State; the path of a lone Variable is ()
      >>> float(mu.grad(scaled, argnums=1)(mu.Param(5.0), 2.0))
      50.0
    """
    if fun is None:
        return functools.partial(custom_jvp, nondiff_argnums=nondiff_argnums, nondiff_argnames=nondiff_argnames)
    return CustomJVP(fun, nondiff_argnums, nondiff_argnames)


class CustomJVP(CustomRule[P, R_co]):
    """A function with a forward-mode rule, as `mu.custom_jvp` makes it."""

    _name = "custom_jvp"
    _gives_tangents = True

    def defjvp(self, jvp: Callable[Q, S], symbolic_zeros: bool = False) -> Callable[Q, S]:
        """Define the rule; a decorator.

        Args:
          jvp: the rule, ``jvp(*nondiff_args, primals, tangents) -> (out, tangent_out)``. `primals` and `tangents` are tuples with
            one entry for each argument that is differentiated.
          symbolic_zeros: as in `jax.custom_jvp.defjvp`, except that the rule gets zeros as arrays in any case.

        Returns:
          The rule itself.
        """
        self._define((jvp,), {"symbolic_zeros": symbolic_zeros})
        return jvp

    def defjvps(self, *jvps: Callable[..., Any] | None) -> None:
        """Define the rule as a sum of one rule for each argument.

        Args:
          *jvps: for each argument a function ``jvp(tangent, out, *primals) -> tangent_out``, or None if the derivative with
            respect to this argument is zero.
        """
        function: Any = self

        def jvp(*given: Any) -> tuple[Any, Any]:
            *fixed, primals, tangents = given
            out = function(*fixed, *primals)
            parts = [rule(t, out, *fixed, *primals) for rule, t in zip(jvps, tangents, strict=True) if rule is not None]
            zero = jax.tree.map(jnp.zeros_like, out)
            return out, functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), parts, zero)

        self.defjvp(jvp)

    def _through_jax(self, call: _Call) -> tuple[list[Any], list[Any]]:
        (jvp,) = self.rules
        tangent_cells = [
            [(path, cell) for path, cell in by_path.items() if cell in call.differentiable and _is_float(cell.get())]
            for by_path in call.nodes
        ]
        flat_cells = list(dict.fromkeys(cell for pairs in tangent_cells for _, cell in pairs))

        def arguments(leaves: Any) -> list[Any]:
            primal_leaves, tangent_leaves, tangents = leaves
            by_cell = dict(zip(flat_cells, tangents, strict=True))
            moving = iter(tangent_leaves)
            every = [next(moving) if _is_float(p) else np.zeros(jnp.shape(p), jax.dtypes.float0) for p in primal_leaves]
            states = [
                State({path: by_cell[cell] for path, cell in pairs}, {path: type(cell) for path, cell in pairs})
                for pairs in tangent_cells
            ]
            primals = call.with_leaves(primal_leaves)
            return [*call.fixed, tuple(primals[n] for n in call.places), tuple(call.packed.unflatten(every, states))]

        moving = [leaf for leaf in call.packed.leaves if _is_float(leaf)]
        types = (call.packed.leaves, moving, [cell.get() for cell in flat_cells])
        plan = call.discover(jvp, types, arguments)
        rule = jax.custom_jvp(functools.partial(_run_primal, plan))
        push = functools.partial(_push_forward, plan, plan.places(flat_cells))
        rule.defjvp(push, symbolic_zeros=True)
        plan.forget_cells()
        return rule(call.values, call.packed.leaves)  # type: ignore[no-any-return]


def _push_forward(plan: _Plan, places: list[int], primals: Any, tangents: Any) -> Any:
    values, leaves = primals
    plan.refuse_captured([not _is_zero(tangent) for tangent in tangents[0]])
    along = [_instantiate(tangents[0][place]) for place in places]
    own = [_instantiate(t) for t, leaf in zip(tangents[1], leaves, strict=True) if _is_float(leaf)]
    out, written, _ = plan.run(plan.rule(), values, (leaves, own, along))
    still = jax.tree.map(_no_tangent, written)
    ends = [t if _is_float(p) else _no_tangent(p) for p, t in zip(out[: plan.count], out[plan.count :], strict=True)]
    return (out[: plan.count], written), (ends, still)


def _is_zero(tangent: Any) -> bool:
    leaves = jax.tree.leaves(tangent, is_leaf=lambda x: isinstance(x, SymbolicZero))
    return all(isinstance(leaf, SymbolicZero) or leaf.dtype == jax.dtypes.float0 for leaf in leaves)


def _no_tangent(primal: Any) -> Any:
    return jnp.zeros_like(primal) if _is_float(primal) else np.zeros(jnp.shape(primal), jax.dtypes.float0)
