"""`mu.jit`: `jax.jit` for functions that read and write state."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from mutatis import _compat
from mutatis.compilation.compiler import Compiler
from mutatis.compilation.options import Options
from mutatis.compilation.program import Program
from mutatis.errors import OptionError
from mutatis.tracing.arguments import function_name
from mutatis.tracing.transformed import Transformed


class Jitted(Transformed):
    """A function compiled by `mu.jit`."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        super().__init__(function, functools.partial(jit, **options))
        self._compiler = Compiler("jit", _options(function, options))

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return self._compiler(self.__wrapped__, args, kwargs)

    def lower(self, /, *args: Any, **kwargs: Any) -> Lowered:
        """Trace and lower the function for these arguments, without calling it; as `jax.jit(f).lower`.

        Arrays may be `jax.ShapeDtypeStruct`; modules are given as they are.

        Example:
          >>> import jax, jax.numpy as jnp, mutatis as mu
          >>> total = mu.Variable(0.0)
          >>> @mu.jit
          ... def add(x):
          ...     total.value += x
          >>> compiled = add.lower(jax.ShapeDtypeStruct((), jnp.float32)).compile()
          >>> compiled(jnp.float32(2)), float(total)
          (None, 2.0)
        """
        return Lowered(self, *self._compiler.lower(self.__wrapped__, args, kwargs))


class Lowered:
    """A function lowered for given types: `compile` it, or look at the program (`as_text`, `cost_analysis`, ...).

    Everything but `compile` is what JAX's own `Lowered` has.
    """

    def __init__(self, function: Jitted, program: Program, number: int, lowered: Any) -> None:
        self._function = function
        self._program = program
        self._number = number
        self._lowered = lowered

    def compile(self, compiler_options: dict[str, Any] | None = None) -> Compiled:
        """Compile it, for calls with arguments of these types and modules of this structure."""
        options = {} if compiler_options is None else {"compiler_options": compiler_options}
        return Compiled(self._function, self._program, self._number, self._lowered.compile(**options))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lowered, name)


class Compiled:
    """A function compiled for given types. A call reads and writes the states of what it is called with.

    Everything else (`cost_analysis`, `memory_analysis`, `as_text`, ...) is what JAX's own `Compiled` has.
    """

    def __init__(self, function: Jitted, program: Program, number: int, compiled: Any) -> None:
        self._function = function
        self._program = program
        self._number = number
        self._compiled = compiled

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Call it.

        Raises:
          StructureError: it was compiled for arguments of another structure, or the call is inside a transform.
        """
        f = self._function
        return f._compiler.call_compiled(self._program, self._number, self._compiled, f.__wrapped__, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compiled, name)


def jit(
    f: Callable[..., Any] | None = None,
    /,
    *,
    in_shardings: Any = _compat.UNSPECIFIED,
    out_shardings: Any = _compat.UNSPECIFIED,
    static_argnums: int | Sequence[int] | None = None,
    static_argnames: str | Iterable[str] | None = None,
    donate_argnums: int | Sequence[int] | None = None,
    donate_argnames: str | Iterable[str] | None = None,
    keep_unused: bool = False,
    device: Any = None,
    backend: str | None = None,
    inline: bool = False,
    compiler_options: dict[str, Any] | None = None,
    donate: str | bool = "auto",
) -> Any:
    """Compile a function that reads and writes state.

    States of modules among the arguments and of those that the function names are inputs of the program; those
    that are written are outputs, and are committed when the call returns. It is traced again for other shapes and
    dtypes, for another structure of a model and for other static attributes; every program is kept. Another model
    of the same structure compiles nothing.

    Args:
      f: a function, bound method, partial or callable Module; without it, the result is a decorator.
      in_shardings, out_shardings, static_argnums, static_argnames, donate_argnums, donate_argnames, keep_unused, device,
        backend, inline, compiler_options: as in `jax.jit`, for the arguments that are not modules.
      donate: whether the buffers of written states are reused for their new values. ``"auto"``: wherever this cannot
        be observed; a state whose array was handed out is copied first. ``True``: even when the program calls back into
        Python and can fail at run time, which then loses the states. ``False``: never.

    Raises:
      TraceLevelError: a state is written across a raw JAX transform, or read where it would go stale.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> total = mu.Variable(0.0)
      >>> @mu.jit
      ... def add(x):
      ...     total.value += x
      >>> add(2.0); add(3.0)
      >>> float(total)
      5.0
    """
    options = {k: v for k, v in locals().items() if k != "f" and v is not _DEFAULTS[k]}
    if f is None:
        return functools.partial(jit, **options)
    return Jitted(f, options)


_OF_ARGUMENTS = ("static_argnums", "static_argnames", "donate_argnums", "donate_argnames")
_DEFAULTS = dict(jit.__kwdefaults__ or {})


def _options(function: Any, options: dict[str, Any]) -> Options:
    given = {**_DEFAULTS, **options}
    if given["donate"] not in ("auto", True, False):
        raise OptionError(
            f"`donate` cannot be {given['donate']!r}",
            where=f"jit({function_name(function)})",
            expected='"auto", True or False',
            got=repr(given["donate"]),
            cure='`mu.jit(f, donate="auto")`',
        )
    jax.jit(function, **{name: given[name] for name in _OF_ARGUMENTS})  # checks that there are such arguments
    static_numbers, static_names = _both(function, given["static_argnums"], given["static_argnames"])
    donated_numbers, donated_names = _both(function, given["donate_argnums"], given["donate_argnames"])
    where = {key: given[key] for key in ("device", "backend") if given[key] is not None}
    return Options(
        donate=given["donate"],
        static_argnums=static_numbers,
        static_argnames=static_names,
        donate_args=frozenset([*donated_numbers, *donated_names]),
        in_shardings=given["in_shardings"],
        out_shardings=given["out_shardings"],
        keep_unused=given["keep_unused"],
        inline=given["inline"],
        compiler_options=given["compiler_options"],
        where=where,
    )


def _both(
    function: Any, numbers: int | Sequence[int] | None, names: str | Iterable[str] | None
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Positions and names of arguments; where only one was said, the signature tells the other, as in `jax.jit`."""
    if numbers is not None and names is not None:
        return _numbers(numbers), _names(names)
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except Exception:  # of a user's class, too
        return _numbers(numbers), _names(names)
    either = [p.name if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD else None for p in parameters]
    if numbers is not None:
        inside = [n for n in _numbers(numbers) if -len(either) <= n < len(either)]
        return _numbers(numbers), tuple(name for n in inside if (name := either[n]) is not None)
    return tuple(either.index(name) for name in _names(names) if name in either), _names(names)


def _numbers(given: int | Sequence[int] | None) -> tuple[int, ...]:
    return () if given is None else (given,) if isinstance(given, int) else tuple(given)


def _names(given: str | Iterable[str] | None) -> tuple[str, ...]:
    return () if given is None else (given,) if isinstance(given, str) else tuple(given)
