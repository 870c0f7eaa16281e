"""Eager control flow: a loop or branch in ordinary Python runs as one compiled program, kept by the code of its functions."""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax

from mutatis import _compat
from mutatis.compilation.compiler import Compiler
from mutatis.compilation.options import Options
from mutatis.core import transactions
from mutatis.core.naming import innermost, probe
from mutatis.core.nodes import is_node
from mutatis.core.statics import static_key
from mutatis.model.modules import Module


@functools.lru_cache(maxsize=512)
def _compiler_for(_codes: tuple[Hashable, ...], name: str, _options: Hashable) -> Compiler:
    return Compiler(name, Options())


def compiled(
    name: str,
    implementation: Callable[..., Any],
    functions: Sequence[Callable[..., Any]],
    options: dict[str, Any],
    *operands: Any,
) -> Any:
    """Run a control-flow transform from ordinary Python as one compiled program, kept for functions of this code.

    Args:
      name: the transform's name.
      implementation: ``implementation(functions, options, operands)`` inside the program.
      functions: the user's functions.
      options: the transform's static options.
      *operands: its arguments.
    """
    plain, owners = zip(*map(_unbind, functions), strict=True)
    lifted = [_Lifted(function) for function in plain]
    plain = tuple(one.without for one in lifted)
    codes = tuple(
        probe(f if isinstance(f, functools.partial) else innermost(f), "__code__") or static_key(f) for f in plain
    )
    key = tuple((option, static_key(value)) for option, value in options.items())
    compiler = _compiler_for(codes, name, key)

    def run(owners: Any, operands: Any, arrays: Any) -> Any:
        whole = [one.around(own) for one, own in zip(lifted, arrays, strict=True)]
        bound = [f if owner is None else functools.partial(f, owner) for f, owner in zip(whole, owners, strict=True)]
        return implementation(bound, options, operands)

    return compiler(run, (owners, operands, [one.arrays for one in lifted]), {}, plain)


class _Lifted:
    """A function whose captured arrays are arguments: other arrays of the same types compile nothing."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.without = function  # what is searched for other captures
        self.arrays: dict[int, jax.Array] = {}
        if isinstance(function, types.FunctionType):
            written = _written_names(function.__code__)
            for index, (name, cell) in enumerate(
                zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
            ):
                value = _contents(cell)
                if isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer) and name not in written:
                    self.arrays[index] = value
            if self.arrays:
                self.without = self.around(dict.fromkeys(self.arrays))

    def around(self, arrays: dict[int, Any]) -> Any:
        """The function with these in the place of the captured arrays."""
        if not arrays:
            return self.function
        f = self.function
        cells = [types.CellType(arrays[i]) if i in arrays else cell for i, cell in enumerate(f.__closure__)]
        new = types.FunctionType(f.__code__, f.__globals__, f.__name__, f.__defaults__, tuple(cells))
        new.__kwdefaults__, new.__qualname__ = f.__kwdefaults__, f.__qualname__
        new.__dict__.update(f.__dict__)
        return new


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet bound
        return None


@functools.lru_cache(maxsize=4096)
def _written_names(code: types.CodeType) -> frozenset[str]:
    """The captured names that a function, or one defined in it, binds to something else."""
    written = {i.argval for i in dis.get_instructions(code) if i.opname in ("STORE_DEREF", "DELETE_DEREF")}
    inner = [_written_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return frozenset(written).union(*inner)


def _unbind(function: Any) -> tuple[Any, Any]:
    """A bound method or a callable module as a plain function and the object it belongs to."""
    if isinstance(function, Module):
        return type(function).__call__, function
    owner = probe(function, "__self__")
    if is_node(owner) and isinstance(function, types.MethodType):
        return function.__func__, owner
    return function, None


def runs_eagerly() -> bool:
    """Whether the code that runs now is ordinary Python, outside every transform and transaction."""
    return (
        transactions.current() is None and _compat.current_trace() is _compat.EVAL_TRACE and not _compat.jit_disabled()
    )
