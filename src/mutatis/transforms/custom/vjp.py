"""`mu.custom_vjp`: a function with a reverse-mode rule of the user's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar, overload

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal

from mutatis.core import naming
from mutatis.core.cells import Cell
from mutatis.core.journal import Journal
from mutatis.core.naming import show_path
from mutatis.core.showing import show_class, show_value
from mutatis.errors import StructureError
from mutatis.model.state import State
from mutatis.tracing.arguments import FlatTree
from mutatis.tracing.captures import search
from mutatis.tracing.scope import Scope
from mutatis.tracing.transformed import ForPartial
from mutatis.transforms.custom.rule import CustomRule, _Call, _instantiate, _is_float, _Late, _Plan, _run_primal

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


@overload
def custom_vjp(fun: ForPartial, /) -> Any: ...
@overload
def custom_vjp(
    fun: Callable[P, R], nondiff_argnums: Sequence[int] = ..., nondiff_argnames: Sequence[str] = ...
) -> CustomVJP[P, R]: ...
@overload
def custom_vjp(
    fun: None = None, nondiff_argnums: Sequence[int] = ..., nondiff_argnames: Sequence[str] = ...
) -> Callable[[Callable[P, R]], CustomVJP[P, R]]: ...
def custom_vjp(
    fun: Callable[..., Any] | None = None, nondiff_argnums: Sequence[int] = (), nondiff_argnames: Sequence[str] = ()
) -> Any:
    """Make a function whose derivative in reverse mode is a rule of yours; as `jax.custom_vjp`, with states.

    Define the rule by ``f.defvjp(fwd, bwd)``. The forward rule ``fwd(*args) -> (out, residuals)`` returns the result and the
    values that the backward rule needs. The backward rule ``bwd(residuals, cotangent) -> cotangents`` returns a tuple with a
    cotangent for each argument that is differentiated. For a Module or Variable the cotangent is a `State`, by path, with an
    entry for each of the float states that are differentiated; None stands for no cotangent. Residuals may hold modules; a
    compiled program that runs the rule then keeps these modules alive.

    The function and its forward rule may write to states, and each write happens once. For derivatives a written value is a
    constant. The backward rule may read states: it reads the values that they had when the forward rule had run. It may not
    write.

    Args:
      fun: the function. Without `fun`, the result is a decorator.
      nondiff_argnums: the positions of arguments that are not differentiated, as in `jax.custom_vjp`. `bwd` gets them first.
      nondiff_argnames: the names of such arguments.

    Returns:
      A function with the arguments and the result of `fun`, and the method `defvjp`.

    Raises:
      StructureError: a derivative is taken with respect to a state that is in no argument, or for which the rule returns no
        cotangent; the rule returns a cotangent for a state that does not exist; a backward rule writes a state; no rule was
        defined.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> @mu.custom_vjp
      ... def scaled(w, x):
      ...     return w * x
      >>> def fwd(w, x):
      ...     return w * x, (w.value, x)
      >>> def bwd(residuals, g):  # clips the gradient for `x`
      ...     w, x = residuals
      ...     return mu.State({(): g * x}), jnp.clip(g * w, -1, 1)  # the path of a lone Variable is ()
      >>> scaled.defvjp(fwd, bwd)
      >>> for_w, for_x = mu.grad(scaled, argnums=(0, 1))(mu.Param(5.0), 2.0)
      >>> float(for_w[()]), float(for_x)
      (2.0, 1.0)
    """
    if fun is None:
        return functools.partial(custom_vjp, nondiff_argnums=nondiff_argnums, nondiff_argnames=nondiff_argnames)
    return CustomVJP(fun, nondiff_argnums, nondiff_argnames)


class CustomVJP(CustomRule[P, R_co]):
    """A function with a reverse-mode rule, as `mu.custom_vjp` makes it."""

    _name = "custom_vjp"

    def defvjp(
        self,
        fwd: Callable[..., tuple[R_co, Any]],
        bwd: Callable[..., tuple[Any, ...]],
        symbolic_zeros: bool = False,
        optimize_remat: bool = False,
        **options: Any,
    ) -> None:
        """Define the rule.

        Args:
          fwd: the forward rule, ``fwd(*args) -> (out, residuals)``, with the arguments of the function.
          bwd: the backward rule, ``bwd(*nondiff_args, residuals, cotangent) -> cotangents``.
          symbolic_zeros: whether the rules are told which values are differentiated, as in `jax.custom_vjp.defvjp`; here every
            argument counts as differentiated.
          optimize_remat: an experimental option for use under `mu.remat`, as in `jax.custom_vjp.defvjp`.
          **options: further options of `jax.custom_vjp.defvjp`, such as `generic_batching` of JAX 0.12.
        """
        self._define((fwd, bwd), {"symbolic_zeros": symbolic_zeros, "optimize_remat": optimize_remat, **options})

    def _through_jax(self, call: _Call) -> tuple[list[Any], list[Any]]:
        fwd, bwd = self.rules
        options = dict(self._options)
        symbolic = options.pop("symbolic_zeros")

        def arguments(leaves: Sequence[Any]) -> list[Any]:
            return call.with_leaves([CustomVJPPrimal(leaf, True) for leaf in leaves] if symbolic else leaves)

        plan = call.discover(fwd, call.packed.leaves, arguments)
        if options["optimize_remat"]:
            call.refuse_more_writes()
        rule = jax.custom_vjp(functools.partial(_run_primal, plan))
        backward = _BackwardRule(plan, call, bwd, symbolic)
        forward = functools.partial(_run_forward, plan, backward, options["optimize_remat"])
        rule.defvjp(forward, backward, symbolic_zeros=not options["optimize_remat"], **options)
        plan.forget_cells()
        return rule(call.values, call.packed.leaves)  # type: ignore[no-any-return]


def _run_forward(plan: _Plan, backward: _BackwardRule, optimize_remat: bool, values: Any, leaves: Any) -> Any:
    if not optimize_remat:
        perturbed = [
            any(leaf.perturbed and _is_float(leaf.value) for leaf in jax.tree.leaves(value, is_leaf=_is_primal))
            for value in values
        ]
        plan.refuse_captured(perturbed)
        backward.perturbed = perturbed
        values, leaves = jax.tree.map(lambda leaf: leaf.value, (values, leaves), is_leaf=_is_primal)
    out, written, after = plan.run(plan.rule(), values, leaves)
    return (out[: plan.count], written), (out[plan.count :], [after[place] for place in backward.places])


class _Backward(_Late):
    """The transaction of a backward rule: it reads what was kept for it, and writes nothing."""

    __slots__ = ()

    def write(self, cell: Cell, value: Any, trace: Any) -> None:
        """Refused: JAX runs backward rules when and as often as it likes."""
        raise StructureError(
            f"state {naming.describe(cell)} was written in a backward rule",
            path=naming.path_of(cell),
            where=self.label,
            cure="Write it in the forward rule, or return it as a cotangent.",
        )

    def refuse_changes(self) -> None:
        """Raise if the rule changed attributes or containers; they are put back as the transaction ends."""
        for obj, name, _ in self.journal.changes():
            raise StructureError(
                f"{f'`{type(obj).__name__}.{name}`' if name else f'a {type(obj).__name__}'} was changed in a backward rule",
                where=self.label,
                cure="Change it in the forward rule, or outside.",
            )


class _BackwardRule:
    """The user's backward rule as JAX calls it. It holds the states that the rule reaches, and no others."""

    def __init__(self, plan: _Plan, call: _Call, function: Any, symbolic: bool) -> None:
        self._plan = plan
        self._function = function
        self._symbolic = symbolic
        self._end = call.rule.end.without_cells()
        self._fixed = call.fixed
        residuals = FlatTree(call.rule.end.unflatten(call.rule.leaves)[1])
        nodes = [*residuals.nodes, *FlatTree(call.fixed).nodes]
        self._scope = Scope([*search(function).roots, *(("residuals", node) for node in nodes)])
        self._cells = [cell for cell in self._scope.cells if cell in set(call.cells)]
        self.places = plan.places(self._cells)
        self.perturbed: list[bool] = [False] * len(call.cells)  # by place: which states are differentiated

    def __call__(self, residuals: Any, cotangents: Any) -> Any:
        leaves, values = residuals
        out, _ = cotangents
        if not self._symbolic:
            out = _instantiate(out)
        journal = Journal(self._scope.containers)
        with _Backward(f"bwd of {self._plan.label}", locate=self._scope.locate, journal=journal) as tx:
            tx.preload(dict(zip(self._cells, values, strict=True)))
            result, residual = self._end.unflatten([*out, *leaves])
            given = self._function(*self._fixed, residual, result)
            tx.refuse_changes()
            return _cotangents(self._plan, given, self.perturbed)


def _is_primal(x: Any) -> bool:
    return isinstance(x, CustomVJPPrimal)


def _cotangents(plan: _Plan, given: Any, perturbed: Sequence[bool]) -> tuple[list[Any], list[Any]]:
    """What a backward rule returned: for each state by place, and for the leaves of the arguments."""
    treedef, places = plan.structure
    try:
        parts = treedef.flatten_up_to(_nothing_as_leaves(list(given), treedef))
    except (ValueError, TypeError):
        parts = None
    at = set(places)
    if parts is None or any(p is not None and not _is_leaf(p) for i, p in enumerate(parts) if i not in at):
        raise StructureError(
            "a backward rule does not return a cotangent for each argument",
            where=plan.label,
            expected=f"a tuple of {plan.arguments}, each in the structure of its argument",
            got=show_value(given),
            cure="Return a tuple: a cotangent or None for each argument, a `mu.State` for a Module or Variable.",
        )
    states: list[Any] = [None] * len(perturbed)
    for where, (kind, by_path) in zip(places, plan.nodes, strict=True):
        part = parts[where]
        flat = {} if part is None else part.flat() if isinstance(part, State) else None
        if flat is None or not set(flat) <= set(by_path):
            raise StructureError(
                f"a backward rule gives cotangents for states that a {kind} does not have",
                where=plan.label,
                expected=f"None, or a State over some of {', '.join(map(show_path, by_path))}",
                got=show_class(part) if flat is None else ", ".join(map(show_path, flat)),
                cure="`mu.State({path: cotangent})`, with the paths of `mu.variables(module)`.",
            )
        for path, value in flat.items():
            place = by_path[path]
            if place is not None:
                states[place] = value if states[place] is None else jax.tree.map(jnp.add, states[place], value)
    for _, by_path in plan.nodes:
        for path, place in by_path.items():
            if place is not None and perturbed[place] and states[place] is None:
                raise StructureError(
                    f"state `{show_path(path)}` is differentiated, but the backward rule gives no cotangent for it",
                    path=show_path(path),
                    where=plan.label,
                    cure=f"Add it to the State: zeros, if there is none: `mu.State({{{path!r}: jnp.zeros_like(w), ...}})`.",
                )
    return states, [part for index, part in enumerate(parts) if index not in at]


def _is_leaf(x: Any) -> bool:
    return bool(jax.tree_util.all_leaves([x]))


def _nothing_as_leaves(given: Any, treedef: Any) -> Any:
    """None stands for a subtree without cotangents."""
    template = jax.tree.unflatten(treedef, [None] * treedef.num_leaves)
    return jax.tree.map(
        lambda part, whole: jax.tree.map(lambda _: None, whole, is_leaf=lambda x: x is None) if part is None else part,
        given,
        template,
        is_leaf=lambda x: x is None or isinstance(x, State),
    )
