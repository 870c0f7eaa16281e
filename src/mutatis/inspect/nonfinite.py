"""Finding the operation that made a number NaN or infinite.

The step is traced, and its program is run operation by operation. From a state that has become non-finite the search goes back
through what it was computed of, to the first operation that made a non-finite number of finite ones. It goes into functions
under `jit` and `checkpoint`, into the branch that is taken, and into the first iteration of a loop that fails.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mutatis import _compat
from mutatis.core import access, checks, frames, naming
from mutatis.core.avals import show_range
from mutatis.core.calls import check_transformed
from mutatis.core.naming import PACKAGE
from mutatis.errors import ArgumentError, TraceLevelError
from mutatis.tracing.arguments import argument_names
from mutatis.tracing.call_site import CallSite
from mutatis.tracing.codes import is_library_file


@dataclasses.dataclass(frozen=True)
class Nonfinite:
    """The result of `mu.inspect.find_nonfinite`. It is false if all numbers are finite, and `print` shows it.

    Attributes:
      states: the paths of the states that are non-finite after the step, in the order in which the step first writes them.
      returned: whether the result of the step is non-finite.
      operation: the JAX name of the first operation that made a non-finite number out of finite ones. (For NaN: out of numbers
        that are not NaN.)
      line: the line of your code that the operation belongs to.
      inputs: the inputs of the operation, with the range of their numbers.
      iterations: the iterations of the loops around the operation in which it happened, the outermost loop first.
      source: the state or argument that was non-finite before the step, if the number came from there.
      infinite: the origin of an infinite input of the operation, another `Nonfinite`.
    """

    states: tuple[str, ...] = ()
    returned: bool = False
    operation: str | None = None
    line: str | None = None
    inputs: tuple[str, ...] = ()
    iterations: tuple[int, ...] = ()
    source: str | None = None
    infinite: Nonfinite | None = None

    def __bool__(self) -> bool:
        return bool(self.states or self.returned or self.operation or self.source)

    def __str__(self) -> str:
        if not self:
            return "all states and results are finite"
        what = [f"state `{self.states[0]}`"] if self.states else ["the result"] if self.returned else []
        rest = len(self.states) - 1
        head = [f"{what[0]} becomes non-finite" + (f", and {rest} more" if rest > 0 else "")] if what else []
        return "\n".join([*head, *self._origin("first: ")])

    def _origin(self, word: str) -> Iterator[str]:
        if self.source is not None:
            yield f"  {word}`{self.source}` was non-finite before the step"
        if self.operation is None:
            return
        when = f", iteration {' > '.join(map(str, self.iterations))}" if self.iterations else ""
        yield f"  {word}`{self.operation}` at {self.line or 'a line that is not known'}{when}"
        for given in self.inputs:
            yield f"    of {given}"
        if self.infinite is not None:
            yield from self.infinite._origin("its infinite input: ")


def find_nonfinite(f: Callable[..., Any]) -> Callable[..., Nonfinite]:
    """Make a function that runs a step and finds the operation and the line by which a number first becomes NaN or infinite.

    The step runs once, operation by operation, and all states are as before afterwards. Infinite constants that are masked away,
    as in attention, are not blamed. Checks by `mu.error_if` do not raise in this run. The search does not look inside
    `jax.shard_map` and kernels.

    Args:
      f: the step: a function, also a transformed one, or a callable Module.

    Returns:
      A function with the arguments of `f` that returns a `Nonfinite`, which is false if all numbers are finite.

    Raises:
      ArgumentError: `f` cannot be called.
      TraceLevelError (by the function): it is called in a function that is traced, such as by `mu.jit`.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> total = mu.Variable(jnp.ones(3))
      >>> @mu.jit
      ... def step(x):
      ...     scale = jnp.log(x)
      ...     total.value = total.value * scale
      >>> found = mu.inspect.find_nonfinite(step)(jnp.array([1.0, 2.0, -1.0]))
      >>> found.states, found.operation, found.inputs
      (('total',), 'log', ('float32[3] from -1 to 2',))
      >>> bool(mu.inspect.find_nonfinite(step)(jnp.ones(3)))
      False
    """

    check_transformed(f, "inspect.find_nonfinite")

    @functools.wraps(f)
    def of(*args: Any, **kwargs: Any) -> Nonfinite:
        if _compat.current_trace() is not _compat.EVAL_TRACE:
            raise TraceLevelError(
                "a step cannot be searched while a function is traced: its numbers are not known yet",
                where=naming.where(),
                cure="Call `mu.inspect.find_nonfinite(step)(*args)` from ordinary code; `step` may be compiled.",
            )
        with checks.off(), frames.recorded(lambda tx: None), CallSite("find_nonfinite", f, args, kwargs) as site:
            try:
                closed, shapes, given, names, owners = _traced(site, f, _is_traced)
            except ArgumentError:  # a number that is static, and no int, for a function under `jit`
                site.undo()
                closed, shapes, given, names, owners = _traced(site, f, _is_array)
            finally:
                site.undo()
        written, _ = shapes
        by_leaf = [path for path, value in zip(owners, written, strict=True) for _ in jax.tree.leaves(value)]
        return _search(closed, given, names, by_leaf)

    return of


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def _is_traced(leaf: Any) -> bool:
    """Whether a leaf of the arguments is an input: an int may be static, and an int is finite."""
    return _is_array(leaf) or isinstance(leaf, float | complex)


def _traced(
    site: CallSite, f: Any, is_input: Callable[[Any], bool]
) -> tuple[Any, Any, list[Any], list[Any], list[str]]:
    """A step as a program.

    Returns:
      The program, the shapes of what it writes and returns, its inputs, their names, and the paths of the states it writes.
    """
    cells = [cell for cell in site.scope.cells if not access.is_deferred(cell)]
    values = site.values(cells)
    places = [place for place, leaf in enumerate(site.packed.leaves) if is_input(leaf)]
    arrays, structure = jax.tree.flatten(values)
    names = [
        *(site.scope.locate(cell) for cell, value in zip(cells, values, strict=True) for _ in jax.tree.leaves(value)),
        *(_argument(site, f, site.packed.leaves[place]) for place in places),
    ]
    owners: list[str] = []

    def pure(leaves: list[Any]) -> Any:
        values = jax.tree.unflatten(structure, leaves[: len(arrays)])
        packed = list(site.packed.leaves)
        for place, leaf in zip(places, leaves[len(arrays) :], strict=True):
            packed[place] = leaf
        end, out, written = site.run(dict(zip(cells, values, strict=True)), packed)
        owners[:] = [site.scope.locate(cell) or f"a new {type(cell).__name__}" for cell in end.cells]
        return written, out

    given = [*arrays, *(site.packed.leaves[place] for place in places)]
    closed, shapes = jax.make_jaxpr(pure, return_shape=True)(given)
    return closed, shapes, given, names, owners


def _argument(site: CallSite, f: Any, leaf: Any) -> str:
    values = [*site.args, *site.kwargs.values()]
    for name, value in zip(argument_names(f, site.args, site.kwargs), values, strict=False):
        if any(part is leaf for part in jax.tree.leaves(value)):
            return name
    return "an argument"


def _search(closed: Any, given: Sequence[Any], names: Sequence[Any], owners: Sequence[str]) -> Nonfinite:
    values = [*closed.consts, *given]
    flags = _flags(_run(closed.jaxpr, values))
    bad = [index for index, kinds in enumerate(flags) if any(kinds)]
    if not bad:
        return Nonfinite()
    states = tuple(dict.fromkeys(owners[index] for index in bad if index < len(owners)))
    found = _trace_back(closed.jaxpr, values, bad[0], nan=flags[bad[0]][0])
    named = [*("a captured array" for _ in closed.consts), *names]
    return dataclasses.replace(
        _as_result(found, named), states=states, returned=any(index >= len(owners) for index in bad)
    )


@dataclasses.dataclass
class _Origin:
    """Where a non-finite number came from: an operation, or an input of the program."""

    equation: Any = None
    line: str | None = None
    inputs: tuple[str, ...] = ()
    iterations: tuple[int, ...] = ()
    number: int | None = None  # of the input
    infinite: _Origin | None = None  # where an infinite input of the operation came from


def _as_result(found: _Origin, names: Sequence[Any]) -> Nonfinite:
    if found.equation is None:
        return Nonfinite(source=None if found.number is None else str(names[found.number]))
    return Nonfinite(
        operation=found.equation.primitive.name,
        line=found.line,
        inputs=found.inputs,
        iterations=found.iterations,
        infinite=None if found.infinite is None else _as_result(found.infinite, names),
    )


def _line(equation: Any) -> str | None:
    """The innermost line of the user; of a library, if it called all by itself."""
    places = [place for place in _compat.lines_of(equation) if not place[0].startswith(PACKAGE)]
    own = [place for place in places if not is_library_file(place[0])]
    return naming.show_place((own or places)[0]) if places else None


def _kinds(value: Any) -> Any:
    if hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.inexact):
        return jnp.any(jnp.isnan(value)), jnp.any(jnp.isinf(value))
    return np.False_, np.False_


_kinds_of = jax.jit(lambda values: [_kinds(value) for value in values])


def _flags(values: Sequence[Any]) -> list[tuple[bool, bool]]:
    """Of each value, whether it holds NaN, and whether infinite numbers."""
    return [(bool(nan), bool(inf)) for nan, inf in jax.device_get(_kinds_of(list(values)))]


def _run(jaxpr: Any, values: Sequence[Any], until: int | None = None, flags: dict[Any, Any] | None = None) -> list[Any]:
    """Run a program equation by equation.

    Args:
      jaxpr: the program.
      values: of its constants and arguments.
      until: the number of the equation whose inputs are wanted, and not the results of the program.
      flags: is given those of all variables.
    """
    env = dict(zip(_compat.inputs_of(jaxpr), values, strict=True))
    if flags is not None:
        flags.update({variable: _kinds(value) for variable, value in env.items()})

    def read(atom: Any) -> Any:
        return atom.val if _compat.is_literal(atom) else env[atom]

    last = _last_uses(jaxpr)
    for number, equation in enumerate(jaxpr.eqns):
        given = [read(atom) for atom in equation.invars]
        if number == until:
            return given
        out = _compat.run_equation(equation, given)
        env.update(zip(equation.outvars, out, strict=True))
        if flags is not None:
            flags.update(zip(equation.outvars, _kinds_of(out), strict=True))
        for variable in last.get(number, ()):
            env.pop(variable, None)
    return [read(atom) for atom in jaxpr.outvars]


def _last_uses(jaxpr: Any) -> dict[int, list[Any]]:
    last = {atom: n for n, eqn in enumerate(jaxpr.eqns) for atom in eqn.invars if not _compat.is_literal(atom)}
    for atom in jaxpr.outvars:
        if not _compat.is_literal(atom):
            last.pop(atom, None)
    uses: dict[int, list[Any]] = {}
    for variable, number in last.items():
        uses.setdefault(number, []).append(variable)
    return uses


def _trace_back(jaxpr: Any, values: Sequence[Any], output: int, *, nan: bool) -> _Origin:
    """Where a non-finite output of a program came from.

    Args:
      jaxpr: the program.
      values: of its constants and arguments.
      output: which of its results.
      nan: whether it holds NaN; else infinite numbers are looked for.
    """
    known: dict[Any, Any] = {}
    _run(jaxpr, values, flags=known)
    looked_at = jax.device_get([*known.values()])
    flags = {variable: (bool(nan), bool(inf)) for variable, (nan, inf) in zip(known, looked_at, strict=True)}
    inputs = {variable: number for number, variable in enumerate(_compat.inputs_of(jaxpr))}
    makers = {variable: n for n, eqn in enumerate(jaxpr.eqns) for variable in eqn.outvars}
    return _Walk(jaxpr, values, flags, inputs, makers).from_atom(jaxpr.outvars[output], nan)


@dataclasses.dataclass
class _Walk:
    """The way back through one program."""

    jaxpr: Any
    values: Sequence[Any]
    flags: dict[Any, tuple[bool, bool]]
    inputs: dict[Any, int]
    makers: dict[Any, int]

    def kinds(self, atom: Any) -> tuple[bool, bool]:
        return _flags([atom.val])[0] if _compat.is_literal(atom) else self.flags[atom]

    def from_atom(self, atom: Any, nan: bool) -> _Origin:
        """Where the NaN in a variable came from, or what is infinite in it."""
        number: int | None = None  # of the operation that was looked at last
        while True:
            if _compat.is_literal(atom):  # a number of the program itself: the operation that takes it
                return _Origin() if number is None else self._origin(number)
            if atom in self.inputs:
                return _Origin(number=self.inputs[atom])
            number = self.makers[atom]
            equation = self.jaxpr.eqns[number]
            given = functools.partial(_run, self.jaxpr, self.values, until=number)
            inner = _inside(equation, given, list(equation.outvars).index(atom), nan)
            if inner is not None:
                if inner.equation is not None:
                    return self._resolved(inner, equation)
                if inner.number is None:
                    return inner
                atom = equation.invars[inner.number]
                nan = self.kinds(atom)[0] if nan else False
                continue
            same = [a for a in equation.invars if self.kinds(a)[0 if nan else 1]]
            if not same:
                found = self._origin(number)
                infinite = [a for a in equation.invars if nan and self.kinds(a)[1]]
                if infinite:
                    found.infinite = self.from_atom(infinite[0], False)
                return found
            atom = same[0]

    def _origin(self, number: int) -> _Origin:
        equation, given = self.jaxpr.eqns[number], _run(self.jaxpr, self.values, until=number)
        return _Origin(equation, _line(equation), tuple(map(show_range, given)))

    def _resolved(self, found: _Origin, equation: Any) -> _Origin:
        """An operation inside of an equation, one of whose infinite inputs may come from outside of it.

        Its line is that of the call if JAX itself calls a function there: JAX keeps its trace, with the line of the first call.
        """
        called = _compat.called_program(equation)
        if found.line is None or (called is not None and _compat.is_of_jax(called)):
            found.line = _line(equation) or found.line
        if found.infinite is not None and found.infinite.equation is None and found.infinite.number is not None:
            found.infinite = self.from_atom(equation.invars[found.infinite.number], False)
        return found


def _inside(equation: Any, given: Callable[[], Sequence[Any]], output: int, nan: bool) -> _Origin | None:
    """Where a number came from inside of an equation of these inputs, or from which of them; None if nothing is inside."""
    name, params = equation.primitive.name, equation.params
    if name == "cond":
        branches = params["branches"]
        which, *operands = given()
        branch = branches[int(np.clip(int(which), 0, len(branches) - 1))]
        return _shifted(_call(branch, operands, output, nan), lambda number: number + 1)
    if name == "scan":
        constants, carried = _compat.scan_inputs(params)
        return _loop(_Scan(params, constants, carried, given()), output, nan)
    if name == "while":
        return None if output >= len(equation.outvars) else _loop(_While(params, given()), output, nan)
    closed = _compat.called_program(equation)
    return None if closed is None else _call(closed, given(), output, nan)


def _call(closed: Any, given: Sequence[Any], output: int, nan: bool) -> _Origin:
    found = _trace_back(closed.jaxpr, [*closed.consts, *given], output, nan=nan)
    return _shifted(found, lambda number: None if number < len(closed.consts) else number - len(closed.consts))


def _shifted(found: _Origin, outside: Callable[[int], int | None]) -> _Origin:
    """The same, with inputs numbered as they are outside."""
    for origin in (found, found.infinite):
        if origin is not None and origin.equation is None and origin.number is not None:
            origin.number = outside(origin.number)
    return found


class _Scan:
    """A scan, one iteration at a time."""

    def __init__(self, params: Any, constants: int, carried: int, given: Sequence[Any]) -> None:
        self.body = params["jaxpr"]
        self.constants, self.carried = constants, carried
        self._given = given
        length = params["length"]
        self._order = range(length)[:: -1 if params["reverse"] else 1]

    def iterations(self) -> Iterator[tuple[int, list[Any], list[Any]]]:
        """The number, the inputs and the results of each iteration."""
        run = jax.jit(_compat.as_function(self.body))
        fixed = [*self._given[: self.constants]]
        carry = [*self._given[self.constants : self.constants + self.carried]]
        xs = self._given[self.constants + self.carried :]
        for number, index in enumerate(self._order):
            given = [*fixed, *carry, *(x[index] for x in xs)]
            out = list(run(*given))
            yield number, given, out
            carry = out[: self.carried]

    def outside(self, number: int) -> int:
        """The input of the loop that an input of its body is."""
        return number


class _While:
    """A while loop, one iteration at a time."""

    def __init__(self, params: Any, given: Sequence[Any]) -> None:
        self.body = params["body_jaxpr"]
        self._cond = params["cond_jaxpr"]
        self._cond_given = given[: params["cond_nconsts"]]
        rest = given[params["cond_nconsts"] :]
        self.constants = params["body_nconsts"]
        self._fixed, self._start = rest[: self.constants], rest[self.constants :]
        self.carried = len(self._start)
        self._skipped: int = params["cond_nconsts"]

    def iterations(self) -> Iterator[tuple[int, list[Any], list[Any]]]:
        """The number, the inputs and the results of each iteration."""
        holds = jax.jit(_compat.as_function(self._cond))
        run = jax.jit(_compat.as_function(self.body))
        carry, number = [*self._start], 0
        while bool(holds(*self._cond_given, *carry)[0]):
            given = [*self._fixed, *carry]
            carry = list(run(*given))
            yield number, given, carry
            number += 1

    def outside(self, number: int) -> int:
        """The input of the loop that an input of its body is."""
        return number + self._skipped


def _loop(loop: _Scan | _While, output: int, nan: bool) -> _Origin:
    """Where a number came from in a loop: the iteration that made it first, and the operation in there."""
    end: int | None = None  # what comes after this iteration does not count
    while True:
        first = _first_bad(loop, output, nan, end)
        if first is None:  # it came in with the carry
            return _Origin(number=loop.outside(loop.constants + output))
        number, given = first
        found = _call(loop.body, given, output, nan)
        if found.equation is not None:
            found.iterations = (number, *found.iterations)
            return _shifted(found, loop.outside)
        carried = found.number is not None and 0 <= found.number - loop.constants < loop.carried
        if found.number is None or not carried or number == 0:
            return _shifted(found, loop.outside)
        output, end = found.number - loop.constants, number


def _first_bad(loop: _Scan | _While, output: int, nan: bool, end: int | None) -> tuple[int, list[Any]] | None:
    """The first iteration whose result of this number is non-finite: which, and its inputs."""
    for number, given, out in itertools.islice(loop.iterations(), end):
        if _flags([out[output]])[0][0 if nan else 1]:
            return number, given
    return None
