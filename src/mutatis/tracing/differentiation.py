"""Differentiation: a stateful function as a pure one of what is differentiated.

The values of the selected states and the leaves of the selected arguments are its inputs, as one pytree. Everything else that
the function reads is closed over, and everything that it writes comes back as an auxiliary output and is written once:

    with Differentiation("grad", f, args, kwargs, argnums=0, ...) as site:
        out, linear, aux = jax.vjp(site.pure, site.inputs, has_aux=True)
        return site.finish(out, aux), site.in_user_form(*linear(...))
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mutatis.core import access
from mutatis.core.avals import shapes_of, show_type
from mutatis.core.cells import UNSET, Deferred
from mutatis.core.naming import show_path
from mutatis.core.showing import notation, show_class, show_structure, show_value
from mutatis.errors import ArgumentError, DeferredStateError, FilterError, StructureError
from mutatis.model.filters import FilterLike, Path, as_filter
from mutatis.model.state import State
from mutatis.model.tags import check_tags
from mutatis.model.variables import Variable, detached_error
from mutatis.model.walks import variables
from mutatis.tracing.arguments import FlatTree, broadcast, function_name, unflatten
from mutatis.tracing.call_site import CallSite


class _Unsaid(int):
    """The default of `argnums`, equal to 0: with `of` it means none."""

    def __reduce__(self) -> str:
        return "UNSAID"


UNSAID = _Unsaid(0)


class Target:
    """What is differentiated of one argument, or of what `of` names: its structure, and the selected states by node."""

    __slots__ = ("count", "kinds", "name", "shapes", "structure")

    def __init__(
        self, name: str, structure: Any, kinds: list[dict[Path, type[Variable]]], shapes: list[dict[Path, Any]]
    ) -> None:
        self.name = name
        self.structure = structure
        self.kinds = kinds
        self.shapes = shapes
        self.count = sum(map(len, kinds))

    def in_user_form(self, cells: Sequence[Any], leaves: Sequence[Any]) -> Any:
        """A gradient or tangent in the structure of the argument, with a `State` in the place of each node."""
        values = iter(cells)
        states = [State({path: next(values) for path in kinds}, kinds) for kinds in self.kinds]
        return unflatten(self.structure, leaves, states)

    def from_user_form(self, given: Any) -> tuple[list[Any], list[Any]]:
        """The cells' and the leaves' parts of a tangent in the structure of the argument.

        Raises:
          ArgumentError: it has another structure.
        """
        treedef, places = self.structure
        try:
            parts = treedef.flatten_up_to(given)
        except ValueError:
            parts = None
        at = set(places)
        if parts is None or not all(jax.tree_util.all_leaves([p]) for i, p in enumerate(parts) if i not in at):
            raise ArgumentError(
                f"the tangent of `{self.name}` has another structure than `{self.name}`",
                path=self.name,
                expected=show_structure(treedef),
                got=show_value(given),
                cure="Give a tangent for each leaf, and a `mu.State` of tangents for each Module or Variable.",
            )
        cells = []
        for place, kinds, shapes in zip(places, self.kinds, self.shapes, strict=True):
            flat = parts[place].flat() if isinstance(parts[place], State) else None
            if flat is None or set(flat) != set(kinds):
                raise ArgumentError(
                    f"the tangent of `{self.name}` is not a State of the states that are differentiated",
                    path=self.name,
                    expected=f"a State of {', '.join(show_path(path) or '.' for path in kinds) or 'no states'}",
                    got=show_class(parts[place])
                    if flat is None
                    else f"a State of {', '.join(show_path(path) or '.' for path in flat)}",
                    cure="What `mu.grad` of the same gives has the structure.",
                )
            for path, shape in shapes.items():
                if shapes_of(flat[path]) != shape:
                    raise ArgumentError(
                        f"the tangent of state `{show_path(path) or self.name}` has another shape",
                        path=show_path(path),
                        expected=notation(shape[0], map(str, shape[1])),
                        got=show_type(flat[path]),
                        cure="What `mu.grad` of the same gives has the structure.",
                    )
            cells += [flat[path] for path in kinds]
        return cells, [part for index, part in enumerate(parts) if index not in at]


def select(name: str, value: Any, wrt: FilterLike, seen: set[Variable]) -> tuple[Target, list[Variable], list[Any]]:
    """What is differentiated of a value: its form, the cells of its nodes that `wrt` selects, and its leaves.

    A cell that was seen before is left out: its gradient is at its first place.

    Raises:
      FilterError: there is nothing to differentiate.
    """
    packed = FlatTree(value)
    if name == "of" and (packed.leaves or not packed.nodes):
        raise ArgumentError(
            f"`of` cannot be {show_value(value)}",
            path="of",
            expected="a Module, a Variable, or a tuple, list or dict of them",
            got=show_class(value),
            cure="Name what the function reads: `of=model`; arrays are differentiated as arguments, by `argnums`.",
        )
    selects = as_filter(wrt)
    by_node: list[dict[Path, Variable]] = []
    elsewhere = False
    for node in packed.nodes:
        chosen = {path: cell for path, cell in variables(node).items() if not cell.frozen and selects(path, cell)}
        elsewhere = elsewhere or not seen.isdisjoint(chosen.values())
        by_node.append({p: c for p, c in chosen.items() if c not in seen and _differentiable(name, p, c)})
        seen.update(by_node[-1].values())
    cells = [cell for chosen in by_node for cell in chosen.values()]
    if packed.nodes and not cells and not packed.leaves and not elsewhere:
        check_tags([wrt], variables(packed.nodes))
        for path, cell in [item for node in packed.nodes for item in variables(node).items()]:
            if cell._frozen == "detached" and selects(path, cell):
                raise detached_error(cell, "differentiated", f"{name}.{show_path(path)}")
        raise FilterError(
            f"there is nothing to differentiate in `{name}`",
            path=name,
            expected=f"float states, not frozen, selected by {selects!r}",
            cure="Say which states: `wrt=mu.Variable`, or make them `mu.Param`; `mu.thaw(model)` makes them live. A model that "
            "makes its parameters when it is called is called once before.",
        )
    kinds: list[dict[Path, type[Variable]]] = [
        {path: type(cell) for path, cell in chosen.items()} for chosen in by_node
    ]
    shapes = [{path: shapes_of(access.load(cell)) for path, cell in chosen.items()} for chosen in by_node]
    return Target(name, packed.structure, kinds, shapes), cells, packed.leaves


def _differentiable(name: str, path: Path, cell: Variable) -> bool:
    value = access.load(cell)
    if value is UNSET or type(value) is Deferred:
        raise DeferredStateError(
            f"state `{name}{'.' if path else ''}{show_path(path)}` cannot be differentiated: it has not been created yet",
            path=f"{name}.{show_path(path)}",
            made_at=cell.made_at,
            cure="Call the model once before, or give the sizes where its layers are made.",
        )
    floats = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in jax.tree.leaves(value)]
    if any(floats) and not all(floats):
        raise FilterError(
            f"state `{name}{'.' if path else ''}{show_path(path)}` cannot be differentiated: it holds floats and others",
            path=f"{name}.{show_path(path)}",
            expected="a state of floats only, or of none",
            got=show_type(value),
            made_at=cell.made_at,
            cure="Keep the others in a state of their own, or leave the state out: `wrt=mu.All(mu.Param, mu.Not(...))`.",
        )
    return all(floats)


class Differentiation(CallSite):
    """One call of a function that is to be differentiated.

    Args:
      name: the transform's name, for messages.
      function: the user's function.
      args: its positional arguments.
      kwargs: its keyword arguments.
      argnums: which of them are differentiated: a number, or several; with `of`, `UNSAID` means none.
      has_aux: whether the function returns a pair, of which the second is not differentiated.
      wrt: which states of modules are differentiated; a tuple gives one filter for each of several `argnums`.
      of: nodes that are differentiated besides, though they are no arguments.
    """

    def __init__(
        self,
        name: str,
        function: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        argnums: int | Sequence[int],
        has_aux: bool,
        wrt: FilterLike,
        of: Any,
    ) -> None:
        super().__init__(name, function, args, kwargs, others=[] if of is None else [("of", of)])
        self._has_aux = has_aux
        self._several = isinstance(argnums, Sequence) and not isinstance(argnums, str)
        wanted: Any = argnums if self._several else [argnums]
        if not all(hasattr(type(number), "__index__") for number in wanted):
            raise ArgumentError(
                f"{show_value(argnums)} in `argnums` is no position of an argument",
                path="argnums",
                where=self.label,
                expected="an int, or several: `argnums=0`, `argnums=(0, 1)`",
                got=show_class(argnums),
                cure=f"States are chosen by another keyword: `mu.{name}(f, wrt=mu.Param)`.",
            )
        if of is not None and argnums is UNSAID:
            wanted = ()
        self._numbers = [_position(name, function, number, len(args)) for number in wanted]
        each = isinstance(wrt, tuple) and self._several and len(wrt) == len(wanted)
        filters = list(wrt) if each else [wrt] * len(wanted)
        seen: set[Variable] = set()
        chosen = [] if of is None else [select("of", of, wrt, seen)]
        chosen += [
            select(f"args[{number}]", args[number], filter, seen)
            for number, filter in zip(self._numbers, filters, strict=True)
        ]
        self._targets = [target for target, _, _ in chosen]
        self._has_of = of is not None
        self._cells = [cell for _, cells, _ in chosen for cell in cells]
        self.inputs = self.values(self._cells), [leaves for _, _, leaves in chosen[self._has_of :]]
        self._out: Any = None  # the structure of what is differentiated

    def flags(self, prefix: Any) -> Any:
        """A prefix of the positional arguments, of bools, as one of the inputs; True for what `of` names."""
        entries = iter(broadcast(tuple(prefix) if isinstance(prefix, list) else prefix, self.args, _is_flag))
        cells: list[bool] = [True] * self._targets[0].count if self._has_of else []
        leaves: list[tuple[bool, ...]] = []
        for target in self._targets[self._has_of :]:
            nodes = iter(target.kinds)
            treedef, places = target.structure
            own = [(next(entries)[0], place in places) for place in range(treedef.num_leaves)]
            cells += [flag for flag, is_node in own if is_node for _ in next(nodes)]
            leaves.append(tuple(flag for flag, is_node in own if not is_node))
        return ((tuple(cells), tuple(leaves)),)

    def pure(self, inputs: tuple[list[Any], list[list[Any]]]) -> tuple[list[Any], Any]:
        """The leaves of what is differentiated, and all that the run gave besides."""
        values, leaves = inputs
        args = list(self.args)
        for number, new in zip(self._numbers, leaves, strict=True):
            args[number] = FlatTree(args[number]).unflatten(new)
        overlay = dict(zip(self._cells, values, strict=True))
        self.end, out, written = self.run(overlay, call=lambda: self.function(*args, **self.kwargs))
        for number in self._numbers:
            FlatTree(self.args[number]).refuse_moved(args[number], self.label)
        self._out = self._differentiated(self.end.unflatten(out))
        count = self._out.num_leaves
        return out[:count], (out[count:], written)

    def _differentiated(self, result: Any) -> Any:
        fits = not self._has_aux or (isinstance(result, tuple) and len(result) == 2)
        packed = FlatTree(result[0] if fits and self._has_aux else result)
        if not fits or packed.nodes:
            raise StructureError(
                "the result cannot be differentiated",
                where=self.label,
                expected="a pair of arrays and anything (has_aux=True)" if self._has_aux else "arrays",
                got=show_value(result),
                cure="Return `loss`; with more, return `loss, rest` and say `has_aux=True`; of a Variable, its `.value`.",
            )
        return packed.structure[0]

    def pure_scalar(self, inputs: tuple[list[Any], list[list[Any]]]) -> tuple[Any, Any]:
        """`pure` with the one leaf itself; JAX checks its shape and dtype."""
        out, aux = self.pure(inputs)
        if self._out != jax.tree.structure(0):
            raise StructureError(
                "the result cannot be differentiated",
                where=self.label,
                expected="a pair of a scalar array and anything (has_aux=True)"
                if self._has_aux
                else "one scalar array",
                got=show_value(self.end.unflatten([*out, *aux[0]])),
                cure="Return `loss`; with more, return `loss, rest` and say `has_aux=True`.",
            )
        if jnp.shape(out[0]):
            raise ArgumentError(
                "the function does not return a scalar",
                where=self.label,
                expected="one number",
                got=show_value(out[0]),
                cure="Return one number: `mu.grad(lambda *args: jnp.mean(f(*args)))(model, x)`; `mu.jacrev(f)(model, x)` "
                "differentiates all of an array.",
            )
        return out[0], aux

    def finish(self, out: Sequence[Any], aux: Any) -> Any:
        """Write what the function wrote, and give its result around the leaves that JAX gave back."""
        rest, written = aux
        access.commit_writes(self.end.cells, self.end.born, written)
        return self.end.unflatten([*out, *rest])

    @property
    def form(self) -> Form:
        """How inputs and outputs look to the user."""
        of = self._targets[0] if self._has_of else None
        return Form(of, self._targets[self._has_of :], self._several, self._out)


class Form:
    """The user's view of the inputs and outputs of `Differentiation.pure`. It holds no values."""

    def __init__(self, of: Target | None, arguments: list[Target], several: bool, out: Any) -> None:
        self._of = of
        self._arguments = arguments
        self._several = several
        self._out = out

    def of_inputs(self, tree: Any) -> Any:
        """A tree of the structure of the inputs as the user sees it: States for nodes, a tuple for several arguments."""
        cells, leaves = tree
        values = iter(cells)
        of = None if self._of is None else self._of.in_user_form([next(values) for _ in range(self._of.count)], [])
        arguments: Any = tuple(
            target.in_user_form([next(values) for _ in range(target.count)], own)
            for target, own in zip(self._arguments, leaves, strict=True)
        )
        if self._of is not None and not self._arguments:
            return of
        if not self._several:
            (arguments,) = arguments
        return arguments if self._of is None else (of, arguments)

    def to_inputs(self, given: Any) -> tuple[list[Any], list[list[Any]]]:
        """The inputs that a tangent, in the form that the user sees, stands for: the inverse of `of_inputs`."""
        if self._of is None:
            return self.join([], given)
        pair = given if self._arguments else (given, ())
        if not (isinstance(pair, tuple) and len(pair) == 2):
            raise _bad_tangents("a pair, of `of` and of the arguments", given)
        return self.join(*pair)

    def of_each(self, given: tuple[Any, ...]) -> tuple[list[Any], list[list[Any]]]:
        """`to_inputs` of values that are given one by one: that for `of`, if there is one, and those for the arguments."""
        if self._of is not None and not given:
            raise _bad_tangents("a tangent for `of`, and one for each argument", given)
        return self.join([], given) if self._of is None else self.join(given[0], given[1:])

    def join(self, of: Any, arguments: Any) -> tuple[list[Any], list[list[Any]]]:
        """`to_inputs` of the two parts."""
        cells = [] if self._of is None else self._of.from_user_form(of)[0]
        if not isinstance(arguments, tuple | list) or len(arguments) != len(self._arguments):
            raise _bad_tangents(f"a tuple of {len(self._arguments)}, one for each argument", arguments)
        leaves = []
        for target, tangent in zip(self._arguments, arguments, strict=True):
            own, rest = target.from_user_form(tangent)
            cells += own
            leaves.append(rest)
        return cells, leaves

    def of_outputs(self, leaves: Sequence[Any]) -> Any:
        """Leaves as what is differentiated."""
        return jax.tree.unflatten(self._out, leaves)

    def to_outputs(self, given: Any) -> list[Any]:
        """The leaves of a cotangent in the structure of what is differentiated: the inverse of `of_outputs`."""
        leaves: list[Any]
        leaves, treedef = jax.tree.flatten(given)
        if treedef != self._out:
            raise ArgumentError(
                "the cotangent has another structure than the result",
                expected=show_structure(self._out),
                got=show_structure(treedef),
                cure="Give the cotangent in the structure that the function returned.",
            )
        return leaves


def _bad_tangents(expected: str, given: Any) -> ArgumentError:
    return ArgumentError(
        "the tangents do not fit what is differentiated",
        expected=expected,
        got=show_value(given),
        cure="Give one tangent for each primal: `mu.jvp(f, (model, x), (state, dx))`.",
    )


def _position(name: str, function: Any, number: Any, count: int) -> int:
    number = operator.index(number)
    if not -count <= number < count:
        raise ArgumentError(
            f"there is no argument {number} to differentiate",
            where=f"{name}({function_name(function)})",
            expected=f"a position from {-count} to {count - 1}" if count else "a call with positional arguments",
            got=f"{number}, in a call with {count or 'no'} positional argument{'s' * (count != 1)}",
            cure="Say which, `argnums=0`, or differentiate what the function names: `of=model`.",
        )
    return int(number % count)


def _is_flag(x: Any) -> bool:
    return isinstance(x, bool)
