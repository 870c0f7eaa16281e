"""`mu.custom_vjp` and `mu.custom_jvp`: functions with derivative rules of the user's, which read and write state.

The function and its rule are staged at the call, with every state that they can reach as an input: what either writes is a
result of both, so that JAX may run the one or the other. For differentiation it is a constant, as are the states that a
backward rule reads: those are residuals of the forward rule. A backward rule writes nothing.

A rule may call its own function. It is then staged once more when JAX asks for it, since the first time that inner call was
run without its rule, to come to an end.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from mutatis import _compat
from mutatis.compilation.eager_control import runs_eagerly
from mutatis.core import access, naming
from mutatis.core.cells import UNSET, Cell
from mutatis.core.showing import show_structure, show_value
from mutatis.core.transactions import Transaction
from mutatis.errors import ArgumentError, StructureError, TraceLevelError
from mutatis.model.variables import Variable
from mutatis.tracing.arguments import FlatTree, as_names, as_numbers, function_name, leaf_names, static_positions
from mutatis.tracing.call_site import CallSite
from mutatis.tracing.staging import Code, Staged, check_kept, refuse_structure, stage
from mutatis.tracing.transformed import Transformed

P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)


class CustomRule(Transformed[P, R_co]):
    """A function with a derivative rule of the user's."""

    def __init__(
        self, function: Callable[..., Any], nondiff_argnums: int | Sequence[int], nondiff_argnames: str | Sequence[str]
    ) -> None:
        numbers, names = as_numbers(nondiff_argnums), as_names(nondiff_argnames)
        # JAX checks that there are such arguments.
        jax.jit(function, static_argnums=numbers or None, static_argnames=names or None)
        super().__init__(function, functools.partial(_remake, type(self), numbers, names))
        self._nondiff = (numbers, names)
        self._options: dict[str, Any] = {}

    def _define(self, rules: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.rules = rules
        self._options = options
        self.set_recipe(functools.partial(_remake, type(self), *self._nondiff, rules=rules, **options))

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R_co:
        function: Callable[..., R_co] = self.__wrapped__
        name = function_name(function)
        if not self.rules:
            raise StructureError(
                f"`{name}` has no derivative rule yet",
                cure="Define it: `f.defvjp(fwd, bwd)` of a `mu.custom_vjp`, `f.defjvp(jvp)` of a `mu.custom_jvp`.",
            )
        positional = _positional(function, args, kwargs)
        if self in _discovering.rules:
            _discovering.rules[self] = True
            return function(*positional)
        with CallSite(type(self)._name, function, positional, functions=self.rules) as site:
            if runs_eagerly():
                end, leaves, values = site.run({})
                committed: R_co = site.commit(end, values, leaves)
                return committed
            call = _Call(self, site, positional)
            out, written = self._through_jax(call)
            for cell, value in zip(call.written, written, strict=True):
                access.write(cell, jax.tree.map(_constant, value))
            result: R_co = call.primal.end.unflatten(out)
            call.forget_values()
            return result

    _name: str
    _gives_tangents = False

    def _through_jax(self, call: _Call) -> tuple[list[Any], list[Any]]:
        """The leaves of the result, and what is written, as JAX gives it. JAX keeps the functions that it is given."""
        raise NotImplementedError


def _remake(
    cls: type[CustomRule[..., Any]],
    numbers: Any,
    names: Any,
    function: Any,
    *,
    rules: tuple[Any, ...] = (),
    **options: Any,
) -> CustomRule[..., Any]:
    made = cls(function, numbers, names)
    if rules:
        made._define(tuple(rules), options)
    return made


class _Discovering(threading.local):
    """The functions whose rules are being staged for the first time, and whether a rule called its own function."""

    def __init__(self) -> None:
        self.rules: dict[CustomRule[..., Any], bool] = {}


_discovering = _Discovering()


class _Call:
    """One call: what of its arguments is differentiated, the staged function, and the staged rule."""

    def __init__(self, owner: CustomRule[..., Any], site: CallSite, args: tuple[Any, ...]) -> None:
        function = owner.__wrapped__
        numbers, names = owner._nondiff
        self.owner = owner
        self.site = site
        self.args = args
        fixed = static_positions(len(args), (), numbers, ()) | _places_of(function, names)
        self.fixed = [args[n] for n in sorted(fixed)]
        self.places = [n for n in range(len(args)) if n not in fixed]
        self.packed = FlatTree([args[n] for n in self.places])
        self.nodes: list[dict[Any, Variable]] = [site.scope.cells_of(node) for node in self.packed.nodes]
        self.differentiable = {cell for cells in self.nodes for cell in cells.values() if not cell.frozen}
        self._stage_primal()

    def _stage_primal(self) -> None:
        site, function, args = self.site, self.owner.__wrapped__, self.args
        fixed = {*range(len(args))} - {*self.places}
        site.labels = lambda: {"leaves": leaf_names(function, args, {}, fixed)}  # type: ignore[method-assign]
        self.primal = stage(
            site, site.scope.cells, {}, self.packed.leaves, lambda leaves: function(*self.with_leaves(leaves))
        )
        refuse_structure(site, self.primal.end, "a function with a derivative rule")

    def with_leaves(self, leaves: Sequence[Any]) -> list[Any]:
        """All arguments, with other leaves in those that are differentiated."""
        args = list(self.args)
        for place, value in zip(self.places, self.packed.unflatten(leaves), strict=True):
            args[place] = value
        return args

    def discover(self, rule: Any, leaves: Any, arguments: Callable[[Any], list[Any]]) -> _Plan:
        """Stage the rule, and learn what both read and write.

        Args:
          rule: the user's function.
          leaves: values or shapes of what it is called with.
          arguments: makes its arguments of them.
        """
        site, owner = self.site, self.owner
        types = jax.tree.map(_compat.type_of, leaves)

        def call(leaves: Any) -> Any:
            return rule(*arguments(leaves))

        late = [cell for cell in self.primal.cells if access.peek(cell) is UNSET]
        site.labels = dict  # type: ignore[method-assign]  # of its arguments, some are the user's
        _discovering.rules[owner] = False
        try:
            staged = stage(site, site.scope.cells, {}, leaves, call)
        finally:
            recursive = _discovering.rules.pop(owner)
        if any(access.peek(cell) is not UNSET for cell in late):
            self._stage_primal()  # the rule uses a state for the first time, which the function gets without a value
        refuse_structure(site, staged.end, "a derivative rule")
        self._check(staged)
        both = (self.primal, staged)
        cells: list[Any] = list(dict.fromkeys(cell for part in both for cell in part.cells))
        self.cells = cells
        self.values: list[Any] = site.values(cells)
        self.types = {
            cell: jax.tree.map(_compat.type_of, value) for cell, value in zip(cells, self.values, strict=True)
        }
        self.written: list[Any] = list(
            dict.fromkeys(cell for part in both for cell in part.end.cells if cell not in part.end.born)
        )
        for part in both:
            for cell in self.written:
                if cell in part.values:
                    check_kept(site, part, cell, self.types[cell], "in a function with a derivative rule")
        self.rule = staged
        again = functools.partial(self._stage_again, types, call) if recursive else None
        return _Plan(self, again)

    def _stage_again(self, leaves: Any, call: Callable[[Any], Any]) -> Staged:
        """The staged rule, for when it is differentiated: its inner calls of the function have their rule."""
        return stage(self.site, self.cells, self.types, leaves, call, _Late)

    def forget_values(self) -> None:
        """Let go of arrays and tracers: what JAX keeps of a rule that calls its own function holds this call."""
        self.args = tuple(None if place in self.places else value for place, value in enumerate(self.args))
        self.site.args, self.site.kwargs = (), {}
        self.site.labels = dict  # type: ignore[method-assign]
        self.packed.leaves, self.site.packed.leaves, self.values = [], [], []
        del self.primal, self.rule

    def _check(self, rule: Staged) -> None:
        expected = FlatTree(self.primal.end.unflatten(self.primal.leaves)).structure
        result = rule.end.unflatten(rule.leaves)
        given = FlatTree(result[0]).structure if isinstance(result, tuple) and len(result) == 2 else None
        if given == expected and self.owner._gives_tangents:
            given = FlatTree(result[1]).structure
        if given != expected:
            raise StructureError(
                "a derivative rule does not return what its function returns",
                where=self.site.label,
                expected=f"a pair, of {show_structure(expected[0])} and the residuals or tangents",
                got=show_value(result) if given is None else f"{show_structure(given[0])} first",
                cure="Return `out, residuals` from a forward rule, `out, tangent` from a `jvp`.",
            )

    def refuse_more_writes(self) -> None:
        """Raise if the rule writes what the function does not: `optimize_remat` takes the function's results for both.

        Raises:
          StructureError: it does; the message names the first.
        """
        for cell in self.written:
            if cell not in self.primal.values:
                raise StructureError(
                    f"state {naming.describe(cell)} is written by the forward rule and not by the function",
                    path=self.site.scope.locate(cell),
                    where=self.site.label,
                    expected="the same writes from both (optimize_remat=True)",
                    got="a write of the rule only",
                    cure="Leave out `optimize_remat`: `f.defvjp(fwd, bwd)`.",
                )


class _Plan:
    """What JAX keeps of a call with its program: code over the values of states by position, and names for messages.

    It holds no states and no arguments, so that a program does not keep alive the model that it was traced with. (Of a rule that
    calls its own function it holds the modules: the rule is staged anew when it is differentiated.)
    """

    def __init__(self, call: _Call, again: Callable[[], Staged] | None) -> None:
        site = call.site
        self._place = {cell: place for place, cell in enumerate(call.cells)}
        self.label = site.label
        self.count = len(call.primal.leaves)
        self.written = [self._place[cell] for cell in call.written]
        self.primal = self.by_position(call.primal)
        self._rule = self.by_position(call.rule)
        self._again = again
        self.structure = call.packed.structure
        self.arguments = len(call.places)
        self.nodes = [
            (type(node).__name__, {path: self._place.get(cell) for path, cell in by_path.items()})
            for node, by_path in zip(call.packed.nodes, call.nodes, strict=True)
        ]
        self._captured = {
            place: (site.describe(cell), site.scope.locate(cell))
            for cell, place in self._place.items()
            if cell not in call.differentiable
        }

    def places(self, cells: Sequence[Any]) -> list[int]:
        """The places of cells."""
        return [self._place[cell] for cell in cells]

    def forget_cells(self) -> _Plan:
        """Let go of the cells: from now on there are only places."""
        self._place = {}
        return self

    def by_position(self, staged: Staged) -> tuple[Code, list[int], list[int | None]]:
        """The code of a staged function, and the places of what it reads and writes."""
        place = self._place
        return staged.code, [place[cell] for cell in staged.cells], [place.get(cell) for cell in staged.end.cells]

    def rule(self) -> tuple[Code, list[int], list[int | None]]:
        """The rule, for when it is differentiated."""
        if self._again is None:
            return self._rule
        staged = self._again()
        cells = {cell: place for place, cell in enumerate(staged.cells)}
        return staged.code, [*cells.values()], [cells.get(cell) for cell in staged.end.cells]

    def run(self, part: tuple[Code, list[int], list[int | None]], values: Sequence[Any], leaves: Any) -> Any:
        """A staged function: its leaves, what all written states hold then, and all states."""
        code, reads, writes = part
        out, new = code([values[place] for place in reads], leaves)
        after = list(values)
        for place, value in zip(writes, new, strict=True):
            if place is not None:
                after[place] = value
        return out, [after[place] for place in self.written], after

    def refuse_captured(self, perturbed: Sequence[bool]) -> None:
        """Raise if a state is differentiated for which the rule says nothing.

        Raises:
          StructureError: it is; the message names the first.
        """
        for place, (name, path) in self._captured.items():
            if perturbed[place]:
                raise StructureError(
                    f"state {name} is differentiated, but the rule says nothing of it",
                    path=path,
                    where=self.label,
                    expected="differentiated states in modules that are arguments (and not in `nondiff_argnums`)",
                    got="a state that the function names",
                    cure="Pass the module as an argument; the rule gives a `mu.State` for it.",
                )


class _Late(Transaction):
    """The transaction of a rule that runs when its call is over: it has what the call could reach, and no more."""

    __slots__ = ()

    def load_outer(self, cell: Cell) -> Any:
        """There is nothing further out."""
        raise TraceLevelError(
            f"state {naming.describe(cell)} was read in a derivative rule that does not name it",
            path=naming.path_of(cell),
            where=self.label,
            cure="Pass it to the function as an argument, or, for a backward rule, among the residuals.",
        )


def _constant(value: Any) -> Any:
    return jax.lax.stop_gradient(value) if jnp.issubdtype(value.dtype, jnp.inexact) else value


def _positional(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """All arguments by position, with their defaults, as JAX's custom rules take them."""
    try:
        bound = inspect.signature(function).bind(*args, **kwargs)
    except ValueError:  # no signature
        return args
    bound.apply_defaults()
    if bound.kwargs:
        raise ArgumentError(
            f"keyword-only arguments of `{function_name(function)}` cannot be passed on to its derivative rule",
            expected="arguments that may be given by position",
            got=", ".join(bound.kwargs),
            cure="Make them ordinary parameters, or capture them.",
        )
    return bound.args


def _places_of(function: Any, names: Sequence[str]) -> set[int]:
    parameters = list(inspect.signature(function).parameters) if names else []
    return {parameters.index(name) for name in names}


def _run_primal(plan: _Plan, values: list[Any], leaves: list[Any]) -> tuple[list[Any], list[Any]]:
    out, written, _ = plan.run(plan.primal, values, leaves)
    return out, written


def _is_float(value: Any) -> bool:
    return all(jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in jax.tree.leaves(value))


def _instantiate(tangent: Any) -> Any:
    def instantiate(leaf: Any) -> Any:
        if not isinstance(leaf, SymbolicZero):
            return leaf
        still = leaf.dtype == jax.dtypes.float0
        return np.zeros(leaf.shape, leaf.dtype) if still else jnp.zeros(leaf.shape, leaf.dtype)

    return jax.tree.map(instantiate, tangent, is_leaf=lambda x: isinstance(x, SymbolicZero))
