"""Eager control flow: a loop or branch in ordinary Python runs as one compiled program, kept by the code of its functions."""

from __future__ import annotations

import dis
import functools
import inspect
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
from mutatis.core.statics import Identity, static_key
from mutatis.model.modules import Module
from mutatis.tracing.codes import contents


@functools.lru_cache(maxsize=512)
def _compiler_for(_codes: tuple[Hashable, ...], name: str, _options: Hashable) -> Compiler:
    return Compiler(name, Options(), shared=True)


def compiled(
    name: str,
    implementation: Callable[..., Any],
    functions: Sequence[Callable[..., Any]],
    options: dict[str, Any],
    *operands: Any,
    names: tuple[str, ...],
) -> Any:
    """Run a control-flow transform from ordinary Python as one compiled program, kept for functions of this code.

    Args:
      name: the transform's name.
      implementation: ``implementation(functions, options, operands)`` inside the program.
      functions: the user's functions.
      options: the transform's static options.
      *operands: its arguments.
      names: what they are called, for messages.
    """
    plain, owners = zip(*map(_unbind, functions), strict=True)
    codes = tuple(map(_code_of, plain))
    known = functools.partial(_run_compiled, name, implementation, codes, owners, options, operands, names, functions)
    lifted = [_Lifted(function, lifts=codes not in _concrete) for function in plain]
    try:
        return known(lifted)
    except _NEEDS_VALUES:
        if not any(one.arrays for one in lifted):
            raise
        _concrete[codes] = None  # as in JAX, a captured array has a value that Python may look at
        while len(_concrete) > _REMEMBERED:
            _concrete.pop(next(iter(_concrete)), None)
        return known([_Lifted(function, lifts=False) for function in plain])


_NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)
_REMEMBERED = 512
_concrete: dict[tuple[Hashable, ...], None] = {}  # code that looks at the values of captured arrays


def _run_compiled(
    name: str,
    implementation: Callable[..., Any],
    codes: tuple[Hashable, ...],
    owners: Sequence[Any],
    options: dict[str, Any],
    operands: Sequence[Any],
    names: tuple[str, ...],
    functions: Sequence[Any],
    lifted: Sequence[_Lifted],
) -> Any:
    key = tuple((option, static_key(value)) for option, value in options.items())
    compiler = _compiler_for(codes, name, key)

    def run(owners: Any, operands: Any, arrays: Any) -> Any:
        whole = [one.around(own) for one, own in zip(lifted, arrays, strict=True)]
        bound = [f if owner is None else functools.partial(f, owner) for f, owner in zip(whole, owners, strict=True)]
        return implementation(bound, options, operands)

    plain = tuple(one.without for one in lifted)
    return compiler(run, (owners, operands, [one.arrays for one in lifted]), {}, plain, names, tuple(functions))


class _Lifted:
    """A function whose captured arrays are arguments: other arrays of the same types compile nothing.

    Args:
      function: the function.
      lifts: whether they are; if not, their values are constants.
    """

    def __init__(self, function: Any, lifts: bool) -> None:
        self.function = function
        self.without = function  # what is searched for other captures
        self.arrays: dict[int, jax.Array] = {}
        if lifts and isinstance(function, types.FunctionType):
            written = _written_names(function.__code__)
            for index, (name, cell) in enumerate(
                zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
            ):
                value = contents(cell)
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


def _code_of(function: Any) -> Hashable:
    """What functions share a compiler by; what else tells them apart is part of the keys in it."""
    function = innermost(function)
    for candidate in (function, inspect.getattr_static(type(function), "__call__", None)):
        if isinstance(code := probe(candidate, "__code__"), types.CodeType):
            return code
    return Identity(type(function))


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
