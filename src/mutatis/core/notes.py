"""Notes: what is added to an error of Python or JAX before it reaches the user, once it has happened.

JAX says what does not work with arrays; of states, and of what to write in a model, it knows nothing. Every public call, and
every call of a module, hands what it raises to `annotate`: nothing is done until something has failed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import jax

from mutatis._equivalents import equivalent, quoted
from mutatis.core import access, naming
from mutatis.core.avals import show_type
from mutatis.core.cells import Cell
from mutatis.core.naming import PACKAGE
from mutatis.core.nodes import is_node
from mutatis.errors import shorten

_JAX = os.path.dirname(os.path.abspath(jax.__file__)) + os.sep
_ABOUT_SHAPES = ("shape", "dimension", "broadcast", "axis", "rank")
_STATIC = (
    'What is known before is a static argument, `mu.jit(f, static_argnames="n")`, or an attribute that is no state.'
)
_ABOUT_TRACERS: tuple[tuple[type[Exception], str], ...] = (
    (
        jax.errors.TracerBoolConversionError,
        "`jnp.where(pred, a, b)` chooses between values, `mu.cond(pred, f, g, x)` between functions, and "
        f"`mu.while_loop(cond_fun, body_fun, init_val)` repeats. {_STATIC}",
    ),
    (
        jax.errors.TracerIntegerConversionError,
        "`jnp.asarray(items)[i]` takes one of some values, `mu.switch(i, [f, g], x)` calls one of some functions, and "
        f"`mu.fori_loop(0, i, body_fun, init_val)` repeats. {_STATIC}",
    ),
    (
        jax.errors.TracerArrayConversionError,
        "NumPy needs the numbers: what `np` does, `jnp` does in compiled code, `jnp.sin(x)`.",
    ),
    (
        jax.errors.NonConcreteBooleanIndexError,
        "The shape of a result is to be known: `jnp.where(mask, x, 0)` keeps it, `jnp.nonzero(mask, size=3)` says it.",
    ),
    (
        jax.errors.ConcretizationTypeError,
        '`jax.debug.print("{x}", x=x)` shows a value, and a Python number is made of what the function has returned. '
        f"`x.astype(float)` converts. {_STATIC}",
    ),
)


_REVERSE = (
    "`mu.while_loop(cond_fun, body_fun, init_val, max_steps=100)` has such a derivative, and `mu.fori_loop` if its bounds "
    "are known."
)


def annotate(error: Exception) -> None:
    """Add to an error what it does not say, and we know.

    Args:
      error: what is raised; its class and its text stay.
    """
    if isinstance(error, AttributeError):
        _note_equivalent(error)
    elif isinstance(error, ValueError) and str(error).startswith("Reverse-mode differentiation does not work"):
        _add(error, _REVERSE, "max_steps")
    elif isinstance(error, TypeError | ValueError | IndexError) and not _note_tracer(error):
        _note_shapes(error)


def _add(error: Exception, note: str, sign: str) -> None:
    """Add a note that has a sign in it, once: several calls hand on the same error, and the innermost knows most."""
    if not any(sign in known for known in getattr(error, "__notes__", ())):
        error.add_note(note)


def _frames(error: Exception) -> list[Any]:
    """The frames that an error came through, the innermost first."""
    found = []
    trace = error.__traceback__
    while trace is not None:
        found.append((trace.tb_frame, trace.tb_lineno))
        trace = trace.tb_next
    return found[::-1]


# -- arrays --------------------------------------------------------------------------------------------------------


def _note_equivalent(error: AttributeError) -> None:
    if isinstance(error.obj, jax.Array) and (instead := equivalent("jax.Array", str(error.name))) is not None:
        sign = f"An array of JAX has no `{error.name}`"
        _add(error, f"{sign}: write {quoted(instead)}.", sign)


# -- values that are not known while a function is traced ----------------------------------------------------------


def _note_tracer(error: Exception) -> bool:
    """Say what to write in the place of what needs a value that is not known; whether that is what has happened."""
    cure = next((cure for kind, cure in _ABOUT_TRACERS if isinstance(error, kind)), None)
    if cure is None and "Tracer.__format__" in str(error):
        cure = '`jax.debug.print("{x:.2f}", x=x)` prints a value when the program runs.'
    if cure is None and "of concrete values" in str(error):
        cure = f"A shape is known before. {_STATIC}"
    if cure is None:
        return False
    sign = "The value is known when the program runs, not while it is traced"
    _add(error, f"{sign}{_users_place(error)}. {cure}", sign)
    return True


def _users_place(error: Exception) -> str:
    for frame, line in _frames(error):
        code = frame.f_code
        if not code.co_filename.startswith((PACKAGE, _JAX)):
            return f" (at {naming.show_place((code.co_filename, line, code.co_qualname))})"
    return ""


# -- states of another shape than they were made with --------------------------------------------------------------


def _note_shapes(error: Exception) -> None:
    """Name the states of another shape than they were made with: those that the innermost function leads to that has any."""
    if not any(word in str(error).lower() for word in _ABOUT_SHAPES):
        return
    for frame, _ in _frames(error):
        changed = [cell for value in [*frame.f_locals.values()] for cell in _cells_below(value) if _has_changed(cell)]
        if changed:
            _add(error, "\n".join(shorten(map(_changed, dict.fromkeys(changed)))), "was made with shape")
            return


def _cells_below(value: Any) -> Iterator[Cell]:
    """The cells that a node leads to."""
    pending, seen = [value], set()
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Cell):
            yield item
        elif is_node(item):
            pending.extend(list(getattr(item, "__dict__", {}).values()))
        elif type(item) in (list, tuple, dict) and len(seen) > 1:  # of a module: a batch may be large
            pending.extend(item.values() if isinstance(item, dict) else item)


def _made_with(cell: Cell) -> tuple[int, ...] | None:
    """The shape that a state was made with, as the code that runs now would see it."""
    if cell._shape is None:
        return None
    shape = list(cell._shape)
    for axis in access.split_axes(cell):
        del shape[axis : axis + 1]
    return tuple(shape)


def _has_changed(cell: Cell) -> bool:
    made, now = _made_with(cell), getattr(access.peek(cell), "shape", None)
    return made is not None and now is not None and now != made


def _changed(cell: Cell) -> str:
    made_at = naming.made_at(cell)
    return (
        f"state {naming.describe(cell)} was made with shape {_made_with(cell)}, and is {show_type(access.peek(cell))} now"
        + (f"; made at {made_at}" if made_at else "")
        + f". To give it the shape back: `v.value = jnp.zeros({_made_with(cell)})`."
    )
