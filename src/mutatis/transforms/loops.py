"""`mu.scan`, `mu.for_loop`, `mu.while_loop`, `mu.fori_loop`: loops over functions that read and write state.

The body is staged once. What it writes is carried; what it only reads is a constant of the loop; modules among the `xs`
of a scan are sliced, and what is written to them is stacked. In ordinary Python a loop runs as one compiled program.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mutatis import _compat
from mutatis.compilation.eager_control import compiled, runs_eagerly
from mutatis.core import access
from mutatis.errors import OptionError, StateTypeError, StructureError
from mutatis.model.variables import Variable
from mutatis.model.walks import variables
from mutatis.tracing.arguments import FlatTree
from mutatis.tracing.axes import axes_by_cell, check_axis
from mutatis.tracing.call_site import CallSite
from mutatis.tracing.staging import Staged, check_kept, check_same_nodes, refuse_structure, stage


def scan(
    f: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    xs: Any = None,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
    _split_transpose: bool = False,
    *,
    states: Any = None,
    checkpoint_every: int | None = None,
) -> tuple[Any, Any]:
    """Loop over leading axes with a carry; as `jax.lax.scan`, with states.

    States that the body writes are carried along; modules among `xs` are sliced along axis 0 in each iteration (a stack
    of layers), and what is written to them is stacked back. The states are then what the last iteration left. What the body
    sows (`mu.sow`) comes back stacked along axis 0.

    Args:
      f: ``f(carry, x) -> (carry, y)``.
      init, xs, length, reverse, unroll: as in `jax.lax.scan`.
      states: `StateAxes`, or pairs of a node and `StateAxes`, for captured states and for modules in `xs`: an int slices
        a state along that axis, `mu.Carry` carries it.
      checkpoint_every: for gradients, keep what is carried only every so many iterations, and compute the rest again in
        the backward pass: memory for ``length / n + n`` carries instead of ``length``.

    Raises:
      StateTypeError: the body changes a state's shape or dtype; the message gives the cast.
      StructureError: the body makes states or changes attributes or containers.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> total = mu.Variable(0.0)
      >>> def body(carry, x):
      ...     total.value += x
      ...     return carry, total.value
      >>> mu.scan(body, None, jnp.arange(4.0))[1], float(total)
      (Array([0., 1., 3., 6.], dtype=float32), 6.0)
    """
    options: dict[str, Any] = {
        "length": length,
        "reverse": reverse,
        "unroll": unroll,
        "_split_transpose": _split_transpose,
        "checkpoint_every": checkpoint_every,
    }
    if checkpoint_every is not None and (type(checkpoint_every) is not int or checkpoint_every < 1):
        raise OptionError(
            f"`checkpoint_every` cannot be {checkpoint_every!r}",
            where="scan",
            expected="a positive int, or None",
            got=repr(checkpoint_every),
            cure="`mu.scan(f, init, xs, checkpoint_every=10)`",
        )
    if runs_eagerly() and states is None:
        return compiled("scan", _scan_compiled, (f,), options, init, xs)  # type: ignore[no-any-return]
    return _scan("scan", f, lambda carry, x: f(carry, x), init, xs, states=states, **options)


def _scan_compiled(functions: Sequence[Any], options: dict[str, Any], operands: Any) -> Any:
    (f,) = functions
    return _scan("scan", f, f, *operands, states=None, **options)


def for_loop(
    f: Callable[..., Any], *xs: Any, length: int | None = None, reverse: bool = False, unroll: int | bool = 1
) -> Any:
    """Run ``f(*x)`` for the slices of `xs`: a `scan` whose only carry is the state.

    Returns:
      The results, stacked.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> total = mu.Variable(0.0)
      >>> def add(x):
      ...     total.value += x
      ...     return total.value
      >>> mu.for_loop(add, jnp.arange(4.0))
      Array([0., 1., 3., 6.], dtype=float32)
    """
    options = {"length": length, "reverse": reverse, "unroll": unroll}
    if runs_eagerly():
        return compiled("for_loop", _for_compiled, (f,), options, xs)
    return _for_compiled((f,), options, (xs,))


def _for_compiled(functions: Sequence[Any], options: dict[str, Any], operands: Any) -> Any:
    (f,), (xs,) = functions, operands
    return _scan("for_loop", f, lambda _, x: (None, f(*x)), None, xs, states=None, **options)[1]


def _scan(
    name: str,
    f: Any,
    call: Callable[[Any, Any], Any],
    init: Any,
    xs: Any,
    *,
    length: int | None,
    reverse: bool,
    unroll: int | bool,
    states: Any,
    _split_transpose: bool = False,
    checkpoint_every: int | None = None,
) -> tuple[Any, Any]:
    with CallSite(name, f, others=[("init", init), ("xs", xs)]) as site:
        carry, slices = FlatTree(init), FlatTree(xs)
        axes = axes_by_cell(site, [], states)
        for node in slices.nodes:
            for cell in variables(node).values():
                axes.setdefault(cell, 0)
        sliced: dict[Variable, int] = {cell: axis for cell, axis in axes.items() if isinstance(axis, int)}
        site.split = sliced
        stacks = {cell: _to_front(check_axis(site, cell, axis), axis) for cell, axis in sliced.items()}
        count = site.repeats = _length(name, length, slices.leaves, stacks)
        carry.leaves = [jnp.asarray(leaf) for leaf in carry.leaves]

        def one_step(leaves: Any) -> Any:
            result = call(carry.unflatten(leaves[0]), slices.unflatten(leaves[1]))
            if not (isinstance(result, tuple) and len(result) == 2):
                raise StructureError(
                    f"the body of `{site.label}` returned {type(result).__name__}",
                    where=site.label,
                    expected="a pair: (carry, y)",
                    got=type(result).__name__,
                    cure="Return `carry, y`, either of which may be None; or use `mu.for_loop`.",
                )
            return result

        cells = site.scope.cells
        types = {cell: jax.tree.map(_slice_type, stack) for cell, stack in stacks.items()}
        x_types = [_slice_type(leaf) for leaf in slices.leaves]
        staged = stage(site, cells, types, (carry.leaves, x_types), one_step)
        while _promote(carry, staged):
            site.undo()
            staged = stage(site, cells, types, (carry.leaves, x_types), one_step)
        end = staged.end
        sown = site.sown(end)
        refuse_structure(site, end, f"the body of `{name}`", sown)
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
            return ([new[c] for c in carried], out[:width]), (out[width:], [new[c] for c in (*stacked, *sown)])

        def loop(start: Any, x: Any, length: int) -> Any:
            return jax.lax.scan(step, start, x, length, reverse, unroll, _split_transpose)

        start = [values[cell] for cell in carried], carry.leaves
        x = [*stacks.values()], slices.leaves
        (last, leaves), (ys, new_stacks) = _in_blocks(loop, start, x, count, checkpoint_every, reverse)
        new = dict(zip(carried, last, strict=True))
        stacks_of = dict(zip((*stacked, *sown), new_stacks, strict=True))
        new |= {cell: _from_front(stacks_of[cell], sliced[cell]) for cell in stacked}
        for cell in written:
            access.write(cell, new[cell])
        for cell in sown:
            access.create(cell, stacks_of[cell])
        return end.unflatten([*leaves, *ys])  # type: ignore[no-any-return]


def _in_blocks(loop: Callable[..., Any], start: Any, xs: Any, count: int, size: int | None, reverse: bool) -> Any:
    """Run a loop in checkpointed blocks: a scan over whole blocks, and one that is shorter at the end."""
    if size is None or count == 0:
        return loop(start, xs, count)
    number = count // size
    whole = number * size

    def block(carry: Any, x: Any, length: int) -> Any:
        # Not `static_argnums`, which keeps `loop`, and the tracers it closes over, in a cache of JAX.
        return jax.checkpoint(lambda carry, x: loop(carry, x, length))(carry, x)

    def blocks(carry: Any) -> Any:
        stacked = jax.tree.map(lambda x: x[:whole].reshape(number, size, *x.shape[1:]), xs)
        carry, ys = jax.lax.scan(lambda carry, x: block(carry, x, size), carry, stacked, number, reverse)
        return carry, jax.tree.map(lambda y: y.reshape(whole, *y.shape[2:]), ys)

    def rest(carry: Any) -> Any:
        return block(carry, jax.tree.map(lambda x: x[whole:], xs), count - whole)

    parts = [part for part, length in ((blocks, whole), (rest, count - whole)) if length]
    results = []
    for part in reversed(parts) if reverse else parts:
        start, ys = part(start)
        results.append(ys)
    ordered = reversed(results) if reverse else results
    return start, jax.tree.map(lambda *ys: jax.lax.concatenate(ys, 0), *ordered)


def _to_front(value: Any, axis: int) -> Any:
    return jax.tree.map(lambda x: jnp.moveaxis(x, axis, 0), value) if axis != 0 else value


def _from_front(value: Any, axis: int) -> Any:
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, axis), value) if axis != 0 else value


def _slice_type(stack: Any) -> jax.ShapeDtypeStruct:
    return _compat.type_of(stack, 1)


def _length(name: str, length: int | None, leaves: list[Any], stacks: dict[Variable, Any]) -> int:
    if scalars := [leaf for leaf in leaves if not jnp.ndim(leaf)]:
        raise StructureError(
            f"`{name}` was given a scalar to loop over",
            expected="arrays with a leading axis",
            got=f"{scalars[0]!r:.40}",
            cure="Say how often with `length=n`, and let the function name what stays the same.",
        )
    sizes = {jnp.shape(leaf)[0] for leaf in leaves}
    sizes |= {leaf.shape[0] for stack in stacks.values() for leaf in jax.tree.leaves(stack)}
    if length is not None:
        sizes.add(operator.index(length))
    if len(sizes) != 1:
        raise StructureError(
            f"`{name}` cannot tell the number of its iterations",
            expected="one length: of the leading axes of `xs`, of the sliced states, and `length`",
            got=sorted(sizes),
            cure="Give `xs` of one length, or `length=n`.",
        )
    (size,) = sizes
    return size


def _promote(carry: FlatTree, staged: Staged) -> bool:
    """Give weakly typed leaves of the carry (Python numbers) the type that the body returns, as JAX does."""
    changed = False
    for index, (leaf, out) in enumerate(zip(carry.leaves, staged.leaves, strict=False)):
        weak = jax.typeof(leaf).weak_type if hasattr(jax.typeof(leaf), "weak_type") else False
        if weak and leaf.shape == out.shape and (leaf.dtype != out.dtype or not getattr(out, "weak_type", False)):
            carry.leaves[index] = jax.lax.convert_element_type(leaf, out.dtype)
            changed = True
    return changed


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
            f"the carry of `{site.label}` changes its type in an iteration",
            where=site.label,
            expected=_show(before),
            got=_show(result[0]),
            cure="Return a carry of the type of `init`: convert with `.astype`, or start with that type.",
        )


def _show(tree: Any) -> str:
    return str(
        jax.tree.map(lambda x: f"{x.dtype}[{','.join(map(str, x.shape))}]", tree, is_leaf=lambda x: hasattr(x, "dtype"))
    )


def while_loop(cond_fun: Callable[[Any], Any], body_fun: Callable[[Any], Any], init_val: Any) -> Any:
    """Loop while a condition holds; as `jax.lax.while_loop`, with states.

    States that the body writes are carried. The condition may read states.

    Raises:
      StructureError: the condition writes a state, or the body makes states or changes attributes.
      StateTypeError: the body changes a state's shape or dtype.

    Example:
      >>> import mutatis as mu
      >>> n = mu.Variable(0)
      >>> def body(_):
      ...     n.value += 3
      >>> mu.while_loop(lambda _: n.value < 10, body, None)
      >>> int(n)
      12
    """
    if runs_eagerly():
        return compiled("while_loop", _while_compiled, (cond_fun, body_fun), {}, init_val)
    return _while("while_loop", cond_fun, body_fun, init_val)


def _while_compiled(functions: Sequence[Any], options: dict[str, Any], operands: Any) -> Any:
    return _while("while_loop", *functions, *operands, **options)


def _while(name: str, cond_fun: Any, body_fun: Any, init_val: Any, functions: Sequence[Any] = ()) -> Any:
    with CallSite(name, body_fun, others=[("init_val", init_val)], functions=[cond_fun, *functions]) as site:
        carry = FlatTree(init_val)
        carry.leaves = [jnp.asarray(leaf) for leaf in carry.leaves]
        site.repeats = None
        cells = site.scope.cells
        body = stage(site, cells, {}, carry.leaves, lambda leaves: (body_fun(carry.unflatten(leaves)),))
        while _promote(carry, body):
            body = stage(site, cells, {}, carry.leaves, lambda leaves: (body_fun(carry.unflatten(leaves)),))
        test = stage(site, body.cells, {}, carry.leaves, lambda leaves: cond_fun(carry.unflatten(leaves)))
        _refuse_condition_writes(site, test)
        refuse_structure(site, body.end, f"the body of `{name}`")
        _check_carry(site, carry, body)
        values = dict(zip(test.cells, site.values(test.cells), strict=True))
        written: list[Any] = [cell for cell in body.end.cells if cell not in body.end.born]
        for cell in written:
            check_kept(site, body, cell, values[cell], "in the body of a loop")

        def states_now(loop: Any) -> dict[Any, Any]:
            return {**values, **dict(zip(written, loop[0], strict=True))}

        def step(loop: Any) -> Any:
            leaves, new = body(states_now(loop), loop[1])
            return [new[cell] for cell in written], leaves

        def goes_on(loop: Any) -> Any:
            (holds,), _ = test(states_now(loop), loop[1])
            return holds

        last, leaves = jax.lax.while_loop(goes_on, step, ([values[cell] for cell in written], carry.leaves))
        for cell, value in zip(written, last, strict=True):
            access.write(cell, value)
        return body.end.unflatten(leaves)[0]


def _refuse_condition_writes(site: CallSite, test: Staged) -> None:
    for cell in test.end.cells:
        if cell not in test.end.born:
            raise StructureError(
                f"state `{site.scope.locate(cell)}` ({type(cell).__name__}) was written by the condition of a `while_loop`",
                path=site.scope.locate(cell),
                where=site.label,
                cure="A condition is evaluated once more than the body: write the state in the body.",
            )
    if len(test.leaves) != 1:
        raise StructureError(
            f"the condition of `{site.label}` must return one boolean",
            where=site.label,
            expected="a boolean scalar",
            got=f"{len(test.leaves)} values",
            cure="Return one comparison, e.g. `lambda x: x < 10`.",
        )


def fori_loop(
    lower: Any, upper: Any, body_fun: Callable[[Any, Any], Any], init_val: Any, *, unroll: int | bool | None = None
) -> Any:
    """Loop from `lower` to `upper`; as `jax.lax.fori_loop`, with states.

    Example:
      >>> import mutatis as mu
      >>> total = mu.Variable(0)
      >>> def body(i, value):
      ...     total.value += i
      ...     return value + 1
      >>> int(mu.fori_loop(0, 5, body, 0)), int(total)
      (5, 10)
    """
    fixed = all(isinstance(bound, int) for bound in (lower, upper))
    options = {"unroll": unroll, "bounds": (int(lower), int(upper)) if fixed else None}
    operands = (init_val,) if fixed else (init_val, lower, upper)
    if runs_eagerly():
        return compiled("fori_loop", _fori_compiled, (body_fun,), options, *operands)
    return _fori_compiled((body_fun,), options, operands)


def _fori_compiled(functions: Sequence[Any], options: dict[str, Any], operands: Any) -> Any:
    (body_fun,) = functions
    if options["bounds"] is None:
        init_val, lower, upper = operands

        def body(loop: Any) -> Any:
            i, end, value = loop
            return i + 1, end, body_fun(i, value)

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
        states=None,
    )
    return out
