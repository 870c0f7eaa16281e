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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from mutatis import _compat, transactions
from mutatis.captures import search
from mutatis.cells import Cell
from mutatis.containers import Contents
from mutatis.control import runs_eagerly
from mutatis.errors import StructureError, TraceLevelError
from mutatis.graph import show_path
from mutatis.lifting import Packed, Scope, Site, Transformed, function_name
from mutatis.staging import Code, Staged, check_kept, refuse_structure, stage
from mutatis.state import State
from mutatis.transactions import Transaction
from mutatis.variables import Variable


class CustomRule(Transformed):
    """A function with a derivative rule of the user's."""

    def __init__(
        self, function: Callable[..., Any], nondiff_argnums: int | Sequence[int], nondiff_argnames: str | Sequence[str]
    ) -> None:
        numbers = (nondiff_argnums,) if isinstance(nondiff_argnums, int) else tuple(nondiff_argnums)
        names = (nondiff_argnames,) if isinstance(nondiff_argnames, str) else tuple(nondiff_argnames)
        # JAX checks that there are such arguments.
        jax.jit(function, static_argnums=numbers or None, static_argnames=names or None)
        super().__init__(function, functools.partial(_remake, type(self), numbers, names))
        self._nondiff = (numbers, names)
        self._options: dict[str, Any] = {}

    def _define(self, rules: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.rules = rules
        self._options = options
        self.set_recipe(functools.partial(_remake, type(self), *self._nondiff, rules=rules, **options))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        function = self.__wrapped__
        name = function_name(function)
        if not self.rules:
            raise StructureError(
                f"`{name}` has no derivative rule yet",
                where=name,
                cure="Define it: `f.defvjp(fwd, bwd)` of a `mu.custom_vjp`, `f.defjvp(jvp)` of a `mu.custom_jvp`.",
            )
        args = _positional(function, args, kwargs)
        if self in _discovering.rules:
            _discovering.rules[self] = True
            return function(*args)
        with Site(type(self)._name, function, args, functions=self.rules) as site:
            if runs_eagerly():
                end, leaves, values = site.run({})
                return site.commit(end, values, leaves)
            call = _Call(self, site, args)
            out, written = self._through_jax(call)
            for cell, value in zip(call.written, written, strict=True):
                transactions.write(cell, jax.tree.map(_constant, value))
            result = call.primal.end.fill(out)
            call.forget_values()
            return result

    _name: str
    _gives_tangents = False

    def _through_jax(self, call: _Call) -> tuple[list[Any], list[Any]]:
        """The leaves of the result, and what is written, as JAX gives it. JAX keeps the functions that it is given."""
        raise NotImplementedError


def _remake(
    cls: type[CustomRule], numbers: Any, names: Any, function: Any, *, rules: tuple[Any, ...] = (), **options: Any
) -> CustomRule:
    made = cls(function, numbers, names)
    if rules:
        made._define(tuple(rules), options)
    return made


class _Discovering(threading.local):
    """The functions whose rules are being staged for the first time, and whether a rule called its own function."""

    def __init__(self) -> None:
        self.rules: dict[CustomRule, bool] = {}


_discovering = _Discovering()


class _Call:
    """One call: what of its arguments is differentiated, the staged function, and the staged rule."""

    def __init__(self, owner: CustomRule, site: Site, args: tuple[Any, ...]) -> None:
        function = owner.__wrapped__
        numbers, names = owner._nondiff
        self.owner = owner
        self.site = site
        self.args = args
        fixed = {n % len(args) for n in numbers} | _places_of(function, names)
        self.fixed = [args[n] for n in sorted(fixed)]
        self.places = [n for n in range(len(args)) if n not in fixed]
        self.packed = Packed([args[n] for n in self.places])
        self.nodes: list[dict[Any, Variable]] = [site.scope.cells_of(node) for node in self.packed.nodes]
        self.differentiable = {cell for cells in self.nodes for cell in cells.values() if not cell.frozen}
        self.primal = stage(
            site, site.scope.cells, {}, self.packed.leaves, lambda leaves: function(*self.with_leaves(leaves))
        )
        refuse_structure(site, self.primal.end, "a function with a derivative rule")

    def with_leaves(self, leaves: Sequence[Any]) -> list[Any]:
        """All arguments, with other leaves in those that are differentiated."""
        args = list(self.args)
        for place, value in zip(self.places, self.packed.fill(leaves), strict=True):
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

        _discovering.rules[owner] = False
        try:
            staged = stage(site, site.scope.cells, {}, leaves, call)
        finally:
            recursive = _discovering.rules.pop(owner)
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
        self.packed.leaves, self.site.packed.leaves, self.values = [], [], []
        del self.primal, self.rule

    def _check(self, rule: Staged) -> None:
        expected = Packed(self.primal.end.fill(self.primal.leaves)).structure
        result = rule.end.fill(rule.leaves)
        given = Packed(result[0]).structure if isinstance(result, tuple) and len(result) == 2 else None
        if given == expected and self.owner._gives_tangents:
            given = Packed(result[1]).structure
        if given != expected:
            raise StructureError(
                "a derivative rule does not return what its function returns",
                where=self.site.label,
                expected=f"a pair, of {expected[0]} and the residuals or tangents",
                got=f"a {type(result).__name__}" if given is None else str(given[0]),
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
                    f"state {transactions.describe(cell)} is written by the forward rule and not by the function",
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

    def fetch(self, cell: Cell) -> Any:
        """There is nothing further out."""
        raise TraceLevelError(
            f"state {transactions.describe(cell)} was read in a derivative rule that does not name it",
            path=transactions.path_of(cell),
            where=self.label,
            cure="Pass it to the function as an argument, or, for a backward rule, among the residuals.",
        )


class _Backward(_Late):
    """The transaction of a backward rule: it reads what was kept for it, and writes nothing."""

    __slots__ = ()

    def write(self, cell: Cell, value: Any, trace: Any) -> None:
        """Refused: JAX runs backward rules when and as often as it likes."""
        raise StructureError(
            f"state {transactions.describe(cell)} was written in a backward rule",
            path=transactions.path_of(cell),
            where=self.label,
            cure="Write it in the forward rule, or return it as a cotangent.",
        )

    def refuse_changes(self) -> None:
        """Raise if the rule changed attributes or containers; they are put back as the transaction ends."""
        if self.journal:
            obj, name, _ = self.journal[0]
            raise StructureError(
                f"{f'`{type(obj).__name__}.{name}`' if name else f'a {type(obj).__name__}'} was changed in a backward rule",
                where=self.label,
                cure="Change it in the forward rule, or outside.",
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
        raise StructureError(
            f"keyword-only arguments of `{function_name(function)}` cannot be passed on to its derivative rule",
            where=function_name(function),
            expected="arguments that may be given by position",
            got=", ".join(bound.kwargs),
            cure="Make them ordinary parameters, or capture them.",
        )
    return bound.args


def _places_of(function: Any, names: Sequence[str]) -> set[int]:
    parameters = list(inspect.signature(function).parameters) if names else []
    return {parameters.index(name) for name in names}


# -- custom_vjp ---------------------------------------------------------------------------------------------------


def custom_vjp(
    fun: Callable[..., Any] | None = None, nondiff_argnums: Sequence[int] = (), nondiff_argnames: Sequence[str] = ()
) -> Any:
    """A function with a reverse-mode rule: ``f.defvjp(fwd, bwd)``; as `jax.custom_vjp`, with states.

    ``fwd(*args) -> (out, residuals)`` and ``bwd(residuals, cotangent) -> cotangents``, a tuple with one for each argument that
    is differentiated: for a Module or Variable a `State` of cotangents by path, of those of its float states that
    have one; None for nothing. Residuals may hold modules; a program that runs the rule then keeps them alive.

    What the function or its forward rule writes is committed, and is a constant for derivatives. A backward rule may read
    states: it finds what they held when the forward rule had run. It may not write any.

    Args:
      fun: the function.
      nondiff_argnums, nondiff_argnames: as in `jax.custom_vjp`.

    Raises:
      StructureError: a state is differentiated that is in no argument, or for which the rule gives no cotangent; the rule gives
        a cotangent for a state that there is not; a backward rule writes a state.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> calls = mu.Variable(0)
      >>> @mu.custom_vjp
      ... def scaled(w, x):
      ...     return w * x
      >>> def forward(w, x):
      ...     calls.value += 1
      ...     return w * x, (w.value, x)
      >>> def backward(residuals, g):
      ...     w, x = residuals
      ...     return mu.State({(): g * x}), jnp.clip(g * w, -1, 1)
      >>> scaled.defvjp(forward, backward)
      >>> w = mu.Param(5.0)
      >>> float(mu.grad(scaled, argnums=1)(w, 2.0)), int(calls)
      (1.0, 1)
    """
    if fun is None:
        return functools.partial(custom_vjp, nondiff_argnums=nondiff_argnums, nondiff_argnames=nondiff_argnames)
    return CustomVJP(fun, nondiff_argnums, nondiff_argnames)


class CustomVJP(CustomRule):
    """A function with a reverse-mode rule."""

    _name = "custom_vjp"

    def defvjp(
        self,
        fwd: Callable[..., tuple[Any, Any]],
        bwd: Callable[..., tuple[Any, ...]],
        symbolic_zeros: bool = False,
        optimize_remat: bool = False,
        **options: Any,
    ) -> None:
        """Define the rule.

        Args:
          fwd: ``fwd(*args) -> (out, residuals)``.
          bwd: ``bwd(*nondiff_args, residuals, cotangent) -> cotangents``.
          symbolic_zeros: as in `jax.custom_vjp.defvjp`; every argument counts as perturbed.
          optimize_remat: as in `jax.custom_vjp.defvjp`.
          **options: further options of `jax.custom_vjp.defvjp`.
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


def _run_primal(plan: _Plan, values: list[Any], leaves: list[Any]) -> tuple[list[Any], list[Any]]:
    out, written, _ = plan.run(plan.primal, values, leaves)
    return out, written


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


class _BackwardRule:
    """The user's backward rule as JAX calls it. It holds the states that the rule reaches, and no others."""

    def __init__(self, plan: _Plan, call: _Call, function: Any, symbolic: bool) -> None:
        self._plan = plan
        self._function = function
        self._symbolic = symbolic
        self._end = call.rule.end.without_cells()
        self._fixed = call.fixed
        residuals = Packed(call.rule.end.fill(call.rule.leaves)[1])
        nodes = [*residuals.nodes, *Packed(call.fixed).nodes]
        self._scope = Scope([*search(function).roots, *(("residuals", node) for node in nodes)])
        self._cells = [cell for cell in self._scope.cells if cell in set(call.cells)]
        self.places = plan.places(self._cells)
        self.perturbed: list[bool] = [False] * len(call.cells)  # by place: which states are differentiated

    def __call__(self, residuals: Any, cotangents: Any) -> Any:
        leaves, values = residuals
        out, _ = cotangents
        if not self._symbolic:
            out = _instantiate(out)
        with _Backward(f"bwd of {self._plan.label}", locate=self._scope.locate) as tx:
            tx.fill(dict(zip(self._cells, values, strict=True)))
            contents = Contents(self._scope.containers, copies=True)
            result, residual = self._end.fill([*out, *leaves])
            try:
                given = self._function(*self._fixed, residual, result)
            finally:
                for container, then in contents.changed():
                    tx.note(container, "", then)
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
            got=f"{given!r:.60}",
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
                got=type(part).__name__ if flat is None else ", ".join(map(show_path, flat)),
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


# -- custom_jvp ---------------------------------------------------------------------------------------------------


def custom_jvp(
    fun: Callable[..., Any] | None = None, nondiff_argnums: Sequence[int] = (), nondiff_argnames: Sequence[str] = ()
) -> Any:
    """A function with a forward-mode rule: ``@f.defjvp``; as `jax.custom_jvp`, with states.

    ``jvp(primals, tangents) -> (out, tangent_out)``; the tangent of a Module or Variable is a `State` of the tangents of its
    float states that are not frozen. What the function or its rule writes is committed, and is a constant for derivatives.

    Args:
      fun: the function.
      nondiff_argnums, nondiff_argnames: as in `jax.custom_jvp`.

    Raises:
      StructureError: a state is differentiated that is in no argument.

    Example:
      >>> import mutatis as mu
      >>> @mu.custom_jvp
      ... def scaled(w, x):
      ...     return w * x
      >>> @scaled.defjvp
      ... def rule(primals, tangents):
      ...     (w, x), (dw, dx) = primals, tangents
      ...     return scaled(w, x), 10 * (x * dw[()] + w * dx)
      >>> float(mu.grad(scaled, argnums=1)(mu.Param(5.0), 2.0))
      50.0
    """
    if fun is None:
        return functools.partial(custom_jvp, nondiff_argnums=nondiff_argnums, nondiff_argnames=nondiff_argnames)
    return CustomJVP(fun, nondiff_argnums, nondiff_argnames)


class CustomJVP(CustomRule):
    """A function with a forward-mode rule."""

    _name = "custom_jvp"
    _gives_tangents = True

    def defjvp(self, jvp: Callable[..., tuple[Any, Any]], symbolic_zeros: bool = False) -> Callable[..., Any]:
        """Define the rule; a decorator.

        Args:
          jvp: ``jvp(*nondiff_args, primals, tangents) -> (out, tangent_out)``.
          symbolic_zeros: as in `jax.custom_jvp.defjvp`; zeros are always given as arrays.
        """
        self._define((jvp,), {"symbolic_zeros": symbolic_zeros})
        return jvp

    def defjvps(self, *jvps: Callable[..., Any] | None) -> None:
        """Define the rule as a sum of rules for each argument, ``jvp(tangent, out, *primals)``, or None for zero."""
        function = self

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
            return [*call.fixed, tuple(primals[n] for n in call.places), tuple(call.packed.fill(every, states))]

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


def _is_float(value: Any) -> bool:
    return all(jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in jax.tree.leaves(value))


def _is_zero(tangent: Any) -> bool:
    leaves = jax.tree.leaves(tangent, is_leaf=lambda x: isinstance(x, SymbolicZero))
    return all(isinstance(leaf, SymbolicZero) or leaf.dtype == jax.dtypes.float0 for leaf in leaves)


def _instantiate(tangent: Any) -> Any:
    def instantiate(leaf: Any) -> Any:
        if not isinstance(leaf, SymbolicZero):
            return leaf
        still = leaf.dtype == jax.dtypes.float0
        return np.zeros(leaf.shape, leaf.dtype) if still else jnp.zeros(leaf.shape, leaf.dtype)

    return jax.tree.map(instantiate, tangent, is_leaf=lambda x: isinstance(x, SymbolicZero))


def _no_tangent(primal: Any) -> Any:
    return jnp.zeros_like(primal) if _is_float(primal) else np.zeros(jnp.shape(primal), jax.dtypes.float0)
