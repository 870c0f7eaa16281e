"""`mu.scan`, `mu.for_loop`, `mu.while_loop`, `mu.fori_loop`: loops over functions that read and write state.

The body is staged once. What it writes is carried; what it only reads is a constant of the loop; modules among the `xs`
of a scan are sliced, and what is written to them is stacked. In ordinary Python a loop runs as one compiled program.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypedDict, TypeVar, TypeVarTuple, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from mutatis import _compat
from mutatis.compilation.eager_control import compiled, runs_eagerly
from mutatis.core import access, checks
from mutatis.core.calls import as_integer, check_function, takes
from mutatis.core.showing import show_class, show_value
from mutatis.errors import ArgumentError, StateTypeError, StructureError
from mutatis.model.variables import Variable
from mutatis.model.walks import variables
from mutatis.tracing.arguments import FlatTree, argument_names, function_name, leaf_names, leaf_places
from mutatis.tracing.axes import axes_by_cell, check_axis
from mutatis.tracing.blame import Labels
from mutatis.tracing.call_site import CallSite, RunResult
from mutatis.tracing.masks import Masked
from mutatis.tracing.progress import Bar, Progress
from mutatis.tracing.staging import (
    Staged,
    check_kept,
    check_same_nodes,
    refuse_structure,
    stage,
    stage_together,
    with_values,
)
from mutatis.tracing.unrolled import decides_in_python, run_once, scan_in_python, while_in_python

_OTHER_AXES = (
    "What the body writes is carried, modules among `xs` are sliced along axis 0, and other axes are said of states: "
    "`mu.scan(f, init, xs, states=mu.StateAxes({mu.Param: 0, ...: mu.Carry}))`."
)
_SCAN = "It runs at once, as `jax.lax.scan` does, and is no decorator: `carry, ys = mu.scan(f, init, xs)`."
_FOR = "It runs at once and is no decorator: `ys = mu.for_loop(f, xs)`, or `mu.for_loop(lambda: f(x), length=10)`."
_NOTHING_ELSE = "States are carried anyway; where there is nothing else to carry, give None: "
_WHILE = f"{_NOTHING_ELSE}`mu.while_loop(cond_fun, body_fun, None)`."
_FORI = f"{_NOTHING_ELSE}`mu.fori_loop(0, 10, body_fun, None)`."


Unroll: TypeAlias = int | bool
C = TypeVar("C")
X = TypeVar("X")
Y = TypeVar("Y")
Xs = TypeVarTuple("Xs")


class LoopOptions(TypedDict, total=False):
    """What `for_loop` can be told, for type checkers."""

    length: int | None
    reverse: bool
    unroll: Unroll
    states: Any
    checkpoint_every: int | None
    progress: Progress


class ScanOptions(TypedDict, total=False):
    """What `scan` can be told, for type checkers."""

    reverse: bool
    unroll: Unroll
    _split_transpose: bool
    states: Any
    checkpoint_every: int | None
    progress: Progress


@overload  # a carry may start as a number, and slices of what is like an array are arrays
def scan(
    f: Callable[[jax.Array, jax.Array], tuple[jax.Array, Y]],
    init: ArrayLike,
    xs: ArrayLike,
    length: int | None = ...,
    **options: Unpack[ScanOptions],
) -> tuple[jax.Array, Y]: ...
@overload
def scan(
    f: Callable[[jax.Array, X], tuple[jax.Array, Y]],
    init: ArrayLike,
    xs: X = ...,
    length: int | None = ...,
    **options: Unpack[ScanOptions],
) -> tuple[jax.Array, Y]: ...
@overload
def scan(
    f: Callable[[C, jax.Array], tuple[C, Y]],
    init: C,
    xs: ArrayLike,
    length: int | None = ...,
    **options: Unpack[ScanOptions],
) -> tuple[C, Y]: ...
@overload
def scan(
    f: Callable[[C, X], tuple[C, Y]],
    init: C,
    xs: X = ...,
    length: int | None = ...,
    **options: Unpack[ScanOptions],
) -> tuple[C, Y]: ...
@takes("mu.scan(f, init, xs)", in_axes=_OTHER_AXES, out_axes=_OTHER_AXES, _=_SCAN)
def scan(
    f: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    xs: Any = None,
    length: int | None = None,
    reverse: bool = False,
    unroll: Unroll = 1,
    _split_transpose: bool = False,
    *,
    states: Any = None,
    checkpoint_every: int | None = None,
    progress: Progress = None,
) -> tuple[Any, Any]:
    """Loop over the leading axis of arrays and modules, with a carry; as `jax.lax.scan`, with states.

    The body is compiled once, however many iterations there are. States that it writes go from one iteration to the next, and
    after the loop they have the values of the last iteration. So a `carry` is often not needed.

    Modules among `xs` are sliced along axis 0, as a stack of layers is: each iteration gets one slice, and the values that it
    writes are stacked again. Values that the body sows (`mu.sow`), and a module that it makes and returns, come back stacked
    along axis 0. A Variable in `y` counts as its value.

    Args:
      f: the body, ``f(carry, x) -> (carry, y)``.
      init: the first carry: an array or a pytree of arrays. None if there is none.
      xs: arrays and modules with leading axes of one size, as a pytree. None if only `length` counts.
      length: the number of iterations; it may be left out if `xs` says it.
      reverse: whether to go from the last slice to the first.
      unroll: how many iterations are compiled into one step of the loop, as in `jax.lax.scan`.
      states: `mu.StateAxes`, or pairs of a node and its `mu.StateAxes`, for captured states and for modules in `xs`. An int
        slices a state along that axis, and `mu.Carry` carries it from iteration to iteration.
      checkpoint_every: for gradients, keep the carry and the carried states only every so many iterations (an int), and compute
        the rest again in the backward pass. With n it needs memory for ``length / n + n`` carries instead of ``length``.
      progress: show a progress bar: a text beside it, or True for the name of `f`. A loop of less than half a second shows none,
        and the package tqdm draws the bar. A function of (steps done, all steps) is called instead, a few times a second and at
        the end. If it raises, so does the loop, and the states are as before. With a bar, `mu.jit` waits for the program and
        donates nothing unless told to, because it calls back into Python.

    Returns:
      The last carry, and the `y` of all iterations stacked along axis 0.

    Raises:
      StateTypeError: the body changes a state's shape or dtype; the message gives the cast.
      StructureError: the body makes states or changes attributes or containers.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> mean = mu.BatchStat(0.0)
      >>> def body(total, x):
      ...     mean.value = 0.5 * mean + 0.5 * x
      ...     return total + x, mean.value
      >>> total, means = mu.scan(body, 0.0, jnp.array([4.0, 4.0, 8.0]))
      >>> total, means, mean
      (Array(16., dtype=float32), Array([2. , 3. , 5.5], dtype=float32), BatchStat(5.5, float32))
    """
    check_function(f, "scan", "f", _SCAN)
    options: dict[str, Any] = {
        "length": length,
        "reverse": reverse,
        "unroll": unroll,
        "_split_transpose": _split_transpose,
        "checkpoint_every": checkpoint_every,
        "progress": None if progress is False else progress,
    }
    _check_every("scan", checkpoint_every)
    if runs_eagerly() and states is None:
        return compiled("scan", _scan_compiled, (f,), options, init, xs, names=("init", "xs"))  # type: ignore[no-any-return]
    return _scan("scan", f, lambda carry, x: f(carry, x), init, xs, states=states, **options)


def _scan_compiled(functions: Sequence[Any], options: dict[str, Any], operands: Any) -> Any:
    (f,) = functions
    return _scan("scan", f, f, *operands, **options)


@overload
def for_loop(f: Callable[[jax.Array], Y], xs: ArrayLike, /, **options: Unpack[LoopOptions]) -> Y: ...
@overload
def for_loop(f: Callable[[*Xs], Y], *xs: *Xs, **options: Unpack[LoopOptions]) -> Y: ...
@takes("mu.for_loop(f, xs)", _=_FOR)  # type: ignore[misc]  # mypy does not see that `*Any` takes what `*Xs` does
def for_loop(
    f: Callable[..., Any],
    *xs: Any,
    length: int | None = None,
    reverse: bool = False,
    unroll: Unroll = 1,
    states: Any = None,
    checkpoint_every: int | None = None,
    progress: Progress = None,
) -> Any:
    """Call ``f(*x)`` for each slice of `xs`: a `mu.scan` without an explicit carry.

    States that `f` writes go from one iteration to the next. The body is compiled once, however many iterations there are.

    Args:
      f: the body. It takes one slice of each of `xs`, and its result is kept.
      *xs: arrays and modules with leading axes of one size.
      length: the number of iterations, if there are no `xs`.
      reverse, unroll, states, checkpoint_every: as in `mu.scan`.
      progress: show a progress bar with this text, such as ``"epoch 1"``; as in `mu.scan`.

    Returns:
      The results of all iterations, stacked along axis 0.

    Raises:
      StateTypeError: the body changes a state's shape or dtype; the message gives the cast.
      StructureError: the body makes states or changes attributes or containers.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> total = mu.Variable(0.0)
      >>> def add(x):
      ...     total.value += x
      ...     return total.value
      >>> mu.for_loop(add, jnp.arange(4.0))
      Array([0., 1., 3., 6.], dtype=float32)
    """
    check_function(f, "for_loop", "f", _FOR)
    if any(type(x) in (int, range) for x in xs):
        raise ArgumentError(
            "a number of iterations is in the place of what is looped over",
            where="for_loop",
            expected="arrays with a leading axis",
            got=", ".join(map(show_value, xs)),
            cure="Say how often, `mu.for_loop(lambda: f(x), length=10)`, or loop over the numbers: "
            "`mu.for_loop(f, jnp.arange(10))`.",
        )
    _check_every("for_loop", checkpoint_every)
    options: dict[str, Any] = {
        "length": length,
        "reverse": reverse,
        "unroll": unroll,
        "checkpoint_every": checkpoint_every,
        "progress": None if progress is False else progress,
    }
    if runs_eagerly() and states is None:
        return compiled("for_loop", _for_compiled, (f,), options, xs, names=("xs",))
    return _for_compiled((f,), {**options, "states": states}, (xs,))


def _for_compiled(functions: Sequence[Any], options: dict[str, Any], operands: Any) -> Any:
    (f,), (xs,) = functions, operands
    return _scan("for_loop", f, lambda _, x: (None, f(*x)), None, xs, **options)[1]


def _check_every(name: str, count: Any) -> None:
    number = as_integer(count) if isinstance(count, int | np.integer) else None
    if count is not None and (number is None or number < 1):
        raise ArgumentError(
            f"`checkpoint_every` cannot be {show_value(count)}",
            where=name,
            expected="a positive int, or None",
            got=show_class(count),
            cure=f"`mu.{name}(f, {'init, ' if name == 'scan' else ''}xs, checkpoint_every=10)`",
        )


def _scan(
    name: str,
    f: Any,
    call: Callable[[Any, Any], Any],
    init: Any,
    xs: Any,
    *,
    length: int | None,
    reverse: bool,
    unroll: Unroll,
    states: Any = None,
    _split_transpose: bool = False,
    checkpoint_every: int | None = None,
    progress: Progress = None,
) -> tuple[Any, Any]:
    with CallSite(name, f, others=[("init", init), ("xs", xs)]) as site:
        carry, slices = FlatTree(init), FlatTree(xs)
        site.labels = lambda: _labels(name, f, init, xs)  # type: ignore[method-assign]
        axes = axes_by_cell(site, [], states)
        for node in slices.nodes:
            for cell in variables(node).values():
                axes.setdefault(cell, 0)
        sliced: dict[Variable, int] = {cell: axis for cell, axis in axes.items() if isinstance(axis, int)}
        site.split = sliced
        stacks = {cell: _to_front(check_axis(site, cell, axis), axis) for cell, axis in sliced.items()}
        count = site.repeats = _length(site.label, length, slices.leaves, stacks)
        carry.leaves = [jnp.asarray(leaf) for leaf in carry.leaves]

        def one_step(leaves: Any) -> Any:
            result = call(carry.unflatten(leaves[0]), slices.unflatten(leaves[1]))
            if not (isinstance(result, tuple) and len(result) == 2):
                raise StructureError(
                    "the body did not return a pair",
                    where=site.label,
                    expected="(carry, y)",
                    got=show_value(result),
                    cure="Return `carry, y`, either of which may be None; or use `mu.for_loop`.",
                )
            return result[0], with_values(result[1])

        if _compat.jit_disabled() and count:
            order = range(count)[:: -1 if reverse else 1]
            end, leaves, new = scan_in_python(
                site, "the body of a loop", one_step, carry.leaves, slices.leaves, stacks, order
            )
            check_same_nodes(site, carry.nodes, FlatTree(end.unflatten(leaves)[0]).nodes)
            for cell, stack in new.items():
                if cell in sliced:
                    access.write(cell, _from_front(stack, sliced[cell]))
                else:
                    access.create(cell, stack)
            return end.unflatten(leaves)  # type: ignore[no-any-return]
        cells = site.scope.cells
        types = {cell: jax.tree.map(_slice_type, stack) for cell, stack in stacks.items()}
        x_types = [_slice_type(leaf) for leaf in slices.leaves]
        while True:
            staged = stage(site, cells, types, (carry.leaves, x_types), one_step)
            end = staged.end
            sown, made = site.sown(end), site.made(end)
            refuse_structure(site, end, "the body of a loop", [*sown, *made])
            if not _promote(carry, staged):
                break
            site.undo()
        _check_carry(site, carry, staged)

        values = dict(zip(staged.cells, site.values(staged.cells), strict=True)) | types
        written: list[Any] = [cell for cell in end.cells if cell not in end.born]
        carried = [cell for cell in written if cell not in sliced]
        stacked = [cell for cell in written if cell in sliced]
        for cell in written:
            check_kept(site, staged, cell, values[cell], "in the body of a loop")
        constants = {cell: value for cell, value in values.items() if cell not in sliced}
        width = len(carry.leaves)

        def step(carried_now: Any, x: Any) -> Any:
            states_now, leaves = carried_now
            slices_now, x_leaves = x
            now = {
                **constants,
                **dict(zip(carried, states_now, strict=True)),
                **dict(zip(stacks, slices_now, strict=True)),
            }
            out, new = staged(now, (leaves, x_leaves))
            return ([new[c] for c in carried], out[:width]), (out[width:], [new[c] for c in (*stacked, *sown, *made)])

        def loop(start: Any, x: Any, length: int) -> Any:
            return jax.lax.scan(step, start, x, length, reverse, unroll, _split_transpose)

        start = [values[cell] for cell in carried], carry.leaves
        x = [*stacks.values()], slices.leaves
        bar = None if progress is None else Bar(progress, f, count, site.label)
        (last, leaves), (ys, new_stacks) = _in_blocks(loop, start, x, count, checkpoint_every, reverse, bar)
        new = dict(zip(carried, last, strict=True))
        stacks_of = dict(zip((*stacked, *sown, *made), new_stacks, strict=True))
        new |= {cell: _from_front(stacks_of[cell], sliced[cell]) for cell in stacked}
        for cell in written:
            access.write(cell, new[cell])
        for cell in (*sown, *made):
            access.create(cell, stacks_of[cell])
        return end.unflatten([*leaves, *ys])  # type: ignore[no-any-return]


def _in_blocks(
    loop: Callable[..., Any], start: Any, xs: Any, count: int, every: int | None, reverse: bool, bar: Bar | None
) -> Any:
    """Run a loop in blocks, which are checkpointed, or between which a bar moves: a scan over whole blocks, and a shorter one."""
    if count == 0 or (every is None and bar is None) or checks.are_off():  # where iterations are looked at one by one
        return loop(start, xs, count)
    size = bar.block() if every is None and bar is not None else every or count
    number = count // size
    whole = number * size

    def block(carry: Any, x: Any, length: int) -> Any:
        carry, shown = carry
        if bar is not None:
            shown = bar.tick(shown, length)
        if every is None:
            carry, ys = loop(carry, x, length)
        else:  # not `static_argnums`, which keeps `loop`, and the tracers it closes over, in a cache of JAX
            carry, ys = jax.checkpoint(lambda carry, x: loop(carry, x, length))(carry, x)
        return (carry, shown), ys

    def blocks(carry: Any) -> Any:
        stacked = jax.tree.map(lambda x: x[:whole].reshape(number, size, *x.shape[1:]), xs)
        carry, ys = jax.lax.scan(lambda carry, x: block(carry, x, size), carry, stacked, number, reverse)
        return carry, jax.tree.map(lambda y: y.reshape(whole, *y.shape[2:]), ys)

    def rest(carry: Any) -> Any:
        return block(carry, jax.tree.map(lambda x: x[whole:], xs), count - whole)

    parts = [part for part, length in ((blocks, whole), (rest, count - whole)) if length]
    results = []
    carry = (start, None if bar is None else bar.start())
    for part in reversed(parts) if reverse else parts:
        carry, ys = part(carry)
        results.append(ys)
    if bar is not None:
        bar.end(carry[1])
    if len(results) == 1:
        return carry[0], results[0]
    ordered = reversed(results) if reverse else results
    return carry[0], jax.tree.map(lambda *ys: jax.lax.concatenate(ys, 0), *ordered)


def _to_front(value: Any, axis: int) -> Any:
    return jax.tree.map(lambda x: jnp.moveaxis(x, axis, 0), value) if axis != 0 else value


def _from_front(value: Any, axis: int) -> Any:
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, axis), value) if axis != 0 else value


def _slice_type(stack: Any) -> jax.ShapeDtypeStruct:
    return _compat.type_of(stack, 1)


def _length(where: str, length: int | None, leaves: list[Any], stacks: dict[Variable, Any]) -> int:
    if scalars := [leaf for leaf in leaves if not jnp.ndim(leaf)]:
        raise ArgumentError(
            "a scalar cannot be looped over",
            where=where,
            expected="arrays with a leading axis",
            got=show_value(scalars[0]),
            cure="Say how often with `length=n`, and let the function name what stays the same.",
        )
    sizes = {jnp.shape(leaf)[0] for leaf in leaves}
    sizes |= {leaf.shape[0] for stack in stacks.values() for leaf in jax.tree.leaves(stack)}
    if length is not None:
        number = as_integer(length)
        if number is None or number < 0:
            raise ArgumentError(
                f"a loop cannot have `length={show_value(length)}`",
                path="length",
                where=where,
                expected="an int, from 0, that is known where the loop is called",
                got=show_value(length),
                cure="`length=10`; the size of an array, `length=x.shape[0]`. `mu.fori_loop(0, n, body_fun, init_val)` takes a "
                "traced number.",
            )
        sizes.add(number)
    if len(sizes) != 1:
        raise ArgumentError(
            "the number of iterations cannot be told",
            where=where,
            expected="one length: of the leading axes of `xs`, of the sliced states, and `length`",
            got=sorted(sizes),
            cure="Give `xs` of one length, or `length=n`.",
        )
    (size,) = sizes
    return size


def _promote(carry: FlatTree, staged: Staged) -> bool:
    """Give weakly typed leaves of the carry (Python numbers) the type that the body returns, if it is one of their sort.

    A float may become a smaller one, as in JAX; an int that would become a float stays, and is an error.

    Returns:
      Whether the body has to be staged again for it. Each loop around this one would double the number of times.
    """
    again = False
    for index, (leaf, out) in enumerate(zip(carry.leaves, staged.leaves, strict=False)):
        weak = jax.typeof(leaf).weak_type if hasattr(jax.typeof(leaf), "weak_type") else False
        fits = leaf.shape == out.shape and _sort(leaf.dtype) == _sort(out.dtype)
        if weak and fits and (leaf.dtype != out.dtype or not getattr(out, "weak_type", False)):
            again = again or leaf.dtype != out.dtype or _weakness_matters(leaf.dtype, staged)
            carry.leaves[index] = jax.lax.convert_element_type(leaf, out.dtype)
    return again


def _sort(dtype: Any) -> Any:
    return next((sort for sort in (np.integer, np.floating, np.complexfloating) if jnp.issubdtype(dtype, sort)), dtype)


def _weakness_matters(dtype: Any, staged: Staged) -> bool:
    """Whether a body may do something else for a value of this dtype than for one that is weakly typed.

    It does where the value meets another dtype of its sort; and what it makes of a weak one may come out as weak.
    """
    sort = np.floating if jnp.issubdtype(dtype, np.floating) else np.integer
    others = {other for other in staged.code.dtypes() if jnp.issubdtype(other, sort) and other != dtype}
    weak = [out for out in staged.leaves if getattr(out, "weak_type", False) and jnp.issubdtype(out.dtype, sort)]
    return bool(others or weak or not jnp.issubdtype(dtype, sort))


def _check_carry(site: CallSite, carry: FlatTree, staged: Staged) -> None:
    width = len(carry.leaves)
    result = staged.end.unflatten([*staged.leaves])
    after = FlatTree(result[0])
    check_same_nodes(site, carry.nodes, after.nodes)
    before = carry.unflatten([jax.typeof(leaf) for leaf in carry.leaves])
    if after.structure != carry.structure or any(
        a.shape != b.shape or a.dtype != b.dtype for a, b in zip(carry.leaves, staged.leaves[:width], strict=True)
    ):
        raise StateTypeError(
            "the carry changes its type in an iteration",
            where=site.label,
            expected=show_value(before),
            got=show_value(result[0]),
            cure=_carry_cure(carry.leaves, staged.leaves[:width]),
        )


def _carry_cure(before: Sequence[Any], after: Sequence[Any]) -> str:
    casts = {(str(a.dtype), str(b.dtype)) for a, b in zip(before, after, strict=False) if a.dtype != b.dtype}
    if len(casts) != 1:
        return "Return a carry of the type of `init`: convert with `.astype`, or start with that type."
    ((old, new),) = casts
    return (
        f"Start with the type that it has later, `x.astype(jnp.{new})` (of a number: `jnp.{new}(x)`), or convert what is "
        f"returned: `x.astype(jnp.{old})`."
    )


@overload
def while_loop(
    cond_fun: Callable[[jax.Array], ArrayLike],
    body_fun: Callable[[jax.Array], jax.Array],
    init_val: ArrayLike,
    *,
    max_steps: int | None = ...,
) -> jax.Array: ...
@overload
def while_loop(
    cond_fun: Callable[[C], ArrayLike], body_fun: Callable[[C], C], init_val: C, *, max_steps: int | None = ...
) -> C: ...
@takes("mu.while_loop(cond_fun, body_fun, init_val)", _=_WHILE)
def while_loop(
    cond_fun: Callable[[Any], Any], body_fun: Callable[[Any], Any], init_val: Any, *, max_steps: int | None = None
) -> Any:
    """Loop while a condition holds; as `jax.lax.while_loop`, with states.

    States that the body writes go from one iteration to the next. The condition may read states, but not write them.

    Args:
      cond_fun: the condition, ``cond_fun(val) -> bool``.
      body_fun: the body, ``body_fun(val) -> val``, of the same shapes and dtypes.
      init_val: the first value: an array or a pytree of arrays. None if the states say it all.
      max_steps: the largest number of iterations, after which the loop ends even if the condition still holds. With it, the loop
        can be differentiated in reverse mode (`mu.grad`), which needs memory for that many iterations.

    Returns:
      The last value.

    Raises:
      ArgumentError: `max_steps` is not an int from 0.
      StructureError: the condition writes a state, or the body makes states or changes attributes.
      StateTypeError: the body changes a state's shape or dtype.

    Example:
      >>> import mutatis as mu
      >>> steps = mu.Variable(0)
      >>> def halve(x):
      ...     steps.value += 1
      ...     return x / 2
      >>> float(mu.while_loop(lambda x: x > 1.0, halve, 10.0)), int(steps)
      (0.625, 4)
    """
    check_function(cond_fun, "while_loop", "cond_fun", _WHILE)
    check_function(body_fun, "while_loop", "body_fun", _WHILE)
    most = None if max_steps is None else as_integer(max_steps)
    if max_steps is not None and (most is None or most < 0):
        raise ArgumentError(
            f"a loop cannot have `max_steps={show_value(max_steps)}`",
            path="max_steps",
            where="while_loop",
            expected="an int, from 0; or None",
            got=show_value(max_steps),
            cure="`mu.while_loop(cond_fun, body_fun, init_val, max_steps=100)`",
        )
    if runs_eagerly():
        options = {"max_steps": most}
        return compiled("while_loop", _while_compiled, (cond_fun, body_fun), options, init_val, names=("init_val",))
    return _while("while_loop", cond_fun, body_fun, init_val, max_steps=most)


def _while_compiled(functions: Sequence[Any], options: dict[str, Any], operands: Any) -> Any:
    return _while("while_loop", *functions, *operands, **options)


def _labels(name: str, f: Any, init: Any, xs: Any) -> Labels:
    """What the leaves of a carry and of slices go by: the parameters of the body that they are given to."""
    if name == "for_loop":
        return {"leaves[1]": leaf_names(f, xs, {})}
    first, second = argument_names(f, (init, xs), {})
    of_carry, of_slices = (second, first) if name == "fori_loop" else (first, second)
    return {
        "leaves[0]": [of_carry + place for place in leaf_places(init)],
        "leaves[1]": [of_slices + place for place in leaf_places(xs)],
    }


def _while(
    name: str,
    cond_fun: Any,
    body_fun: Any,
    init_val: Any,
    functions: Sequence[Any] = (),
    max_steps: int | None = None,
) -> Any:
    with CallSite(name, body_fun, others=[("init_val", init_val)], functions=[cond_fun, *functions]) as site:
        carry = FlatTree(init_val)
        site.labels = lambda: {"leaves": leaf_names(body_fun, (init_val,), {})}  # type: ignore[method-assign]
        carry.leaves = [jnp.asarray(leaf) for leaf in carry.leaves]
        site.repeats = None

        def step_once(leaves: Any) -> Any:
            return (body_fun(carry.unflatten(leaves)),)

        def condition(leaves: Any) -> Any:
            return _held(cond_fun(carry.unflatten(leaves)))

        def test_once(leaves: Any) -> Any:
            end, holds, _, _ = run_once(site, "the condition of a loop", {}, lambda: condition(leaves))
            _refuse_condition_writes(site, end, holds)
            return holds[0]

        if _compat.jit_disabled() and decides_in_python(test_once(carry.leaves)):
            holds = _at_most(max_steps, test_once)
            last_end, leaves = while_in_python(site, holds, "the body of a loop", step_once, carry.leaves)
            return init_val if last_end is None else last_end.unflatten(leaves)[0]
        cells = site.scope.cells

        def stage_both() -> tuple[Masked, Staged]:
            while True:
                masked = Masked(site, lambda *given: stage(site, cells, {}, *given), carry.leaves, step_once)
                refuse_structure(site, masked.staged.end, "the body of a loop")
                if not _promote(carry, masked.staged):
                    break
            test = stage(site, masked.staged.cells, {}, carry.leaves, condition)
            _refuse_condition_writes(site, test.end, test.leaves)
            refuse_structure(site, test.end, "the condition of a loop")
            return masked, test

        masked, test = stage_together(site, stage_both)
        body = masked.staged
        _check_carry(site, carry, body)
        values = dict(zip(test.cells, site.values(test.cells), strict=True))
        written: list[Any] = [cell for cell in body.end.cells if cell not in body.end.born]
        for cell in written:
            check_kept(site, body, cell, values[cell], "in the body of a loop")

        def states_now(loop: Any) -> dict[Any, Any]:
            return {**values, **dict(zip(written, loop[0], strict=True))}

        def step(loop: Any) -> Any:
            leaves, new = masked(states_now(loop), loop[1], lambda: goes_on(loop))
            return [new[cell] for cell in written], leaves

        def goes_on(loop: Any) -> Any:
            (holds,), _ = test(states_now(loop), loop[1])
            return holds

        last, leaves = _loop_while(goes_on, step, ([values[cell] for cell in written], carry.leaves), max_steps)
        for cell, value in zip(written, last, strict=True):
            access.write(cell, value)
        return body.end.unflatten(leaves)[0]


def _loop_while(goes_on: Callable[[Any], Any], step: Callable[[Any], Any], start: Any, max_steps: int | None) -> Any:
    """JAX's loop; with a bound, one that has a derivative in reverse."""
    if max_steps is None:
        return jax.lax.while_loop(goes_on, step, start)

    def step_or_stay(loop: Any, _: None) -> Any:
        return jax.lax.cond(goes_on(loop), step, lambda loop: loop, loop), None

    return jax.lax.scan(step_or_stay, start, None, length=max_steps)[0]


def _at_most(max_steps: int | None, holds: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A condition that also ends a loop in Python."""
    numbers = itertools.count()
    return lambda leaves: (max_steps is None or next(numbers) < max_steps) and holds(leaves)


def _held(condition: Any) -> Any:
    """What a condition is, which may be a state."""
    return condition.get() if isinstance(condition, Variable) else condition


def _refuse_condition_writes(site: CallSite, end: RunResult, leaves: Sequence[Any]) -> None:
    for cell in end.cells:
        if cell not in end.born:
            raise StructureError(
                f"state `{site.scope.locate(cell)}` ({type(cell).__name__}) was written by the condition",
                path=site.scope.locate(cell),
                where=site.label,
                cure="A condition is evaluated once more than the body: write the state in the body.",
            )
    if len(leaves) != 1 or jnp.shape(leaves[0]) or not jnp.issubdtype(jnp.result_type(leaves[0]), jnp.bool_):
        raise StructureError(
            "the condition did not return one boolean",
            where=site.label,
            expected="a boolean scalar",
            got=show_value(end.unflatten(leaves)),
            cure="The condition comes first, and returns one comparison: `mu.while_loop(lambda x: x < 10, body_fun, init_val)`.",
        )


@overload
def fori_loop(
    lower: ArrayLike,
    upper: ArrayLike,
    body_fun: Callable[[jax.Array, jax.Array], jax.Array],
    init_val: ArrayLike,
    *,
    unroll: Unroll | None = ...,
) -> jax.Array: ...
@overload
def fori_loop(
    lower: ArrayLike,
    upper: ArrayLike,
    body_fun: Callable[[jax.Array, C], C],
    init_val: C,
    *,
    unroll: Unroll | None = ...,
) -> C: ...
@takes("mu.fori_loop(0, 10, body_fun, init_val)", _=_FORI)
def fori_loop(
    lower: Any, upper: Any, body_fun: Callable[[Any, Any], Any], init_val: Any, *, unroll: Unroll | None = None
) -> Any:
    """Loop over the integers from `lower` to `upper` - 1; as `jax.lax.fori_loop`, with states.

    States that the body writes go from one iteration to the next.

    Args:
      lower: the first integer.
      upper: the integer after the last one.
      body_fun: the body, ``body_fun(i, val) -> val``, of the same shapes and dtypes.
      init_val: the first value: an array or a pytree of arrays. None if there is none.
      unroll: how many iterations are compiled into one step of the loop, as in `jax.lax.fori_loop`.

    Returns:
      The last value.

    Raises:
      StateTypeError: the body changes a state's shape or dtype.
      StructureError: the body makes states or changes attributes or containers.

    Example:
      >>> import mutatis as mu
      >>> total = mu.Variable(0)
      >>> def body(i, value):
      ...     total.value += i
      ...     return value + 1
      >>> int(mu.fori_loop(0, 5, body, 0)), int(total)
      (5, 10)
    """
    check_function(body_fun, "fori_loop", "body_fun", _FORI)
    for name, bound in (("lower", lower), ("upper", upper)):
        if jnp.shape(bound) or not jnp.issubdtype(jnp.result_type(bound), jnp.integer):
            raise ArgumentError(
                f"the bound `{name}` is no integer",
                path=name,
                where="fori_loop",
                expected="an integer scalar",
                got=show_value(jnp.asarray(bound)),
                cure="`mu.fori_loop(0, 10, body_fun, init_val)`; of an array, its length: `len(xs)`.",
            )
    bounds = _known_bounds(lower, upper)
    options = {"unroll": unroll, "bounds": bounds}
    operands = (init_val, lower, upper) if bounds is None else (init_val,)
    if runs_eagerly():
        names = ("init_val", "lower", "upper")[: len(operands)]
        return compiled("fori_loop", _fori_compiled, (body_fun,), options, *operands, names=names)
    return _fori_compiled((body_fun,), options, operands)


def _known_bounds(*bounds: Any) -> tuple[int, ...] | None:
    """Bounds as ints, if they are known and are of the dtype of ints."""
    known = [as_integer(bound) for bound in bounds]
    usual = all(jnp.result_type(bound) == jnp.result_type(int) for bound in bounds)
    ints = tuple(bound for bound in known if bound is not None)
    return ints if usual and len(ints) == len(bounds) else None


def _fori_compiled(functions: Sequence[Any], options: dict[str, Any], operands: Any) -> Any:
    (body_fun,) = functions
    if options["bounds"] is None:
        init_val, lower, upper = operands

        def body(loop: Any) -> Any:
            i, end, value = loop
            return i + 1, end, body_fun(i, value)

        body.__qualname__ = function_name(body_fun)
        lower, upper = jnp.asarray(lower), jnp.asarray(upper)
        start = (lower.astype(jnp.result_type(lower, upper)), upper.astype(jnp.result_type(lower, upper)), init_val)
        return _while("fori_loop", lambda loop: loop[0] < loop[1], body, start, (body_fun,))[2]
    (init_val,) = operands
    first, last = options["bounds"]
    steps = first + jnp.arange(max(0, last - first))
    unroll = 1 if options["unroll"] is None else options["unroll"]
    out, _ = _scan(
        "fori_loop",
        body_fun,
        lambda value, i: (body_fun(i, value), None),
        init_val,
        steps,
        length=None,
        reverse=False,
        unroll=unroll,
    )
    return out
