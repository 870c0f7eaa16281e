"""`mu.jit`: `jax.jit` for functions that read and write state."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, ParamSpec, TypedDict, TypeVar, Unpack, overload

import jax

from mutatis import _compat
from mutatis.compilation.compiler import Compiler
from mutatis.compilation.options import Options
from mutatis.compilation.program import Program
from mutatis.core.calls import check_transformed, takes, without_own_frames
from mutatis.core.showing import show_value
from mutatis.core.statics import Static
from mutatis.errors import ArgumentError, StructureError
from mutatis.tracing.arguments import argument_names, as_names, as_numbers, function_name, static_positions
from mutatis.tracing.transformed import ForPartial, Transformed

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class Jitted(Transformed[P, R_co]):
    """A function compiled by `mu.jit`."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        check_transformed(function, "jit")
        remake: functools.partial[Any] = functools.partial(jit, **options)
        super().__init__(function, remake)
        self._compiler = Compiler("jit", _options(function, options))

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R_co:
        try:
            return self._compiler(self.__wrapped__, args, kwargs)  # type: ignore[no-any-return]
        except Exception as error:
            raise without_own_frames(error)  # noqa: B904  # it is the same error

    def expect(self, *, compilations: int) -> contextlib.AbstractContextManager[None]:
        """Allow only a number of compilations inside a ``with`` block; one more is an error that says the difference.

        Args:
          compilations: the largest number of compilations, an int.

        Raises:
          CompilationError: in the block, by the call that would compile once more; it changes no state.

        Example:
          >>> import jax.numpy as jnp, mutatis as mu
          >>> step = mu.jit(lambda x: x + 1)
          >>> with step.expect(compilations=1):
          ...     _ = step(jnp.ones(3)), step(jnp.zeros(3))
        """
        return self._compiler.log.plan(compilations)

    def trace(self, /, *args: Any, **kwargs: Any) -> Traced[R_co]:
        """Trace the function for these arguments, without compiling or calling it; as `jax.jit(f).trace`.

        Example:
          >>> import jax.numpy as jnp, mutatis as mu
          >>> w = mu.Param(2.0)
          >>> mu.jit(lambda x: w * x).trace(jnp.ones(3)).out_info
          ShapeDtypeStruct(shape=(3,), dtype=float32)
        """
        return Traced(self, StaticArguments(self, args, kwargs), *self._compiler.trace(self.__wrapped__, args, kwargs))

    def eval_shape(self, /, *args: Any, **kwargs: Any) -> Any:
        """The shapes and dtypes of the result; as `jax.jit(f).eval_shape`. A module that is made comes back with shapes.

        Example:
          >>> import jax.numpy as jnp, mutatis as mu
          >>> mu.jit(lambda n: jnp.zeros(n), static_argnums=0).eval_shape(3)
          ShapeDtypeStruct(shape=(3,), dtype=float32)
        """
        return self._compiler.eval_shape(self.__wrapped__, args, kwargs)

    def clear_cache(self) -> None:
        """Forget all compiled programs of the function; as `jax.jit(f).clear_cache`. The next call traces and compiles anew."""
        self._compiler.clear()

    def lower(self, /, *args: Any, **kwargs: Any) -> Lowered[R_co]:
        """Trace and lower the function for these arguments, without calling it; as `jax.jit(f).lower`.

        Arrays may be `jax.ShapeDtypeStruct`; modules are given as they are. What is compiled of it takes no static
        arguments: they are those of this call.

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
        return Lowered(self, StaticArguments(self, args, kwargs), *self._compiler.lower(self.__wrapped__, args, kwargs))


class StaticArguments:
    """The static arguments of the call that a function was lowered for: what is compiled takes the others.

    Args:
      function: the function.
      args: the positional arguments of the call.
      kwargs: its keyword arguments.
    """

    def __init__(self, function: Jitted[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        options = function._compiler.options
        positions = static_positions(len(args), kwargs, options.static_argnums, options.static_argnames)
        names = argument_names(function.__wrapped__, args, {})
        self._label = f"jit({function_name(function)})"
        self._count = len(args)
        self._by_position = {n: args[n] for n in sorted(p for p in positions if isinstance(p, int))}
        self._by_keyword = {name: kwargs[name] for name in kwargs if name in positions}
        self._names = {names[n]: n for n in self._by_position}

    def insert(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call of what was compiled, with the static ones where they were; they may be given, too.

        Raises:
          StructureError: they are given, and others than it was compiled for.
        """
        given: dict[Any, Any] = {n: args[n] for n in self._by_position} if len(args) == self._count else {}
        given |= {self._names[name]: kwargs[name] for name in self._names if name in kwargs}
        given |= {name: kwargs[name] for name in self._by_keyword if name in kwargs}
        for place, value in given.items():
            known = self._by_position[place] if isinstance(place, int) else self._by_keyword[place]
            if Static(value) != Static(known):
                self._refuse(place, known, value)
        if self._by_position and len(args) == self._count - len(self._by_position):
            rest = iter(args)
            args = tuple(self._by_position[n] if n in self._by_position else next(rest) for n in range(self._count))
        others = {name: value for name, value in kwargs.items() if name not in self._names}
        return args, {**self._by_keyword, **others}

    def _refuse(self, place: Any, known: Any, value: Any) -> None:
        name = next((name for name, n in self._names.items() if n == place), place)
        raise StructureError(
            f"argument `{name}` is static, and another than what was compiled for it",
            path=name,
            where=self._label,
            expected=show_value(known),
            got=show_value(value),
            cure="What was compiled takes no static arguments, `compiled(x)`; what `mu.jit` returned compiles for others.",
        )


class Traced(Generic[R_co]):
    """A function traced for given types: `lower` it, or look at the program (`jaxpr`, `out_info`).

    The inputs of the jaxpr are the states and then the arguments; its outputs the written states, those that are made, and the
    result.
    """

    def __init__(
        self,
        function: Jitted[..., R_co],
        statics: StaticArguments,
        program: Program,
        number: int,
        traced: Any,
        out_info: Any,
    ) -> None:
        self._function = function
        self._statics = statics
        self._program = program
        self._number = number
        self._traced = traced
        self.out_info = out_info  # the shapes of the user's result

    def lower(self, **options: Any) -> Lowered[R_co]:
        """Lower it."""
        return Lowered(self._function, self._statics, self._program, self._number, self._traced.lower(**options))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._traced, name)


class Lowered(Generic[R_co]):
    """A function lowered for given types: `compile` it, or look at the program (`as_text`, `cost_analysis`, ...).

    Everything but `compile` is what JAX's own `Lowered` has.
    """

    def __init__(
        self, function: Jitted[..., R_co], statics: StaticArguments, program: Program, number: int, lowered: Any
    ) -> None:
        self._function = function
        self._statics = statics
        self._program = program
        self._number = number
        self._lowered = lowered

    def compile(self, compiler_options: dict[str, Any] | None = None) -> Compiled[R_co]:
        """Compile it, for calls with arguments of these types and modules of this structure."""
        options = {} if compiler_options is None else {"compiler_options": compiler_options}
        compiled = self._lowered.compile(**options)
        return Compiled(self._function, self._statics, self._program, self._number, compiled)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lowered, name)


class Compiled(Generic[R_co]):
    """A function compiled for given types. A call reads and writes the states of what it is called with.

    Everything else (`cost_analysis`, `memory_analysis`, `as_text`, ...) is what JAX's own `Compiled` has.
    """

    def __init__(
        self, function: Jitted[..., R_co], statics: StaticArguments, program: Program, number: int, compiled: Any
    ) -> None:
        self._function = function
        self._statics = statics
        self._program = program
        self._number = number
        self._compiled = compiled

    def __call__(self, /, *args: Any, **kwargs: Any) -> R_co:
        """Call it. Static arguments are left out, as in JAX: they are those that it was lowered for.

        Raises:
          StructureError: it was compiled for arguments of another structure, or the call is inside a transform.
        """
        f = self._function
        args, kwargs = self._statics.insert(args, kwargs)
        call = f._compiler.call_compiled
        return call(self._program, self._number, self._compiled, f.__wrapped__, args, kwargs)  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compiled, name)


class JitOptions(TypedDict, total=False):
    """What `jit` can be told, for type checkers."""

    in_shardings: Any
    out_shardings: Any
    static_argnums: int | Sequence[int] | None
    static_argnames: str | Iterable[str] | None
    donate_argnums: int | Sequence[int] | None
    donate_argnames: str | Iterable[str] | None
    keep_unused: bool
    device: Any
    backend: str | None
    inline: bool
    compiler_options: dict[str, Any] | None
    donate: str | bool


@overload
def jit(f: ForPartial, /) -> Any: ...
@overload
def jit(f: Transformed[P, R], /, **options: Unpack[JitOptions]) -> Jitted[P, R]: ...
@overload
def jit(f: Callable[P, R], /, **options: Unpack[JitOptions]) -> Jitted[P, R]: ...
@overload
def jit(f: None = None, /, **options: Unpack[JitOptions]) -> Callable[[Callable[P, R]], Jitted[P, R]]: ...
@takes("mu.jit(f)", _="Call what comes back with the arguments: `mu.jit(f)(x)`.")
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
    """Compile a function that reads and writes state; as `jax.jit`, with states.

    The states of modules that you pass as arguments are inputs of the compiled program, and so are those that the function uses
    from outside: by a global variable, a closure or `self`. The new values of written states are outputs, and Mutatis stores them
    in the states when the call returns. If the function raises, no state changes.

    The function is traced and compiled at its first call, and again for arguments of other shapes or dtypes, for a model of
    another structure, and for another value of a static attribute or argument. All programs are kept. Another model of the same
    structure uses the same program. `mu.inspect.explain` says why a function was compiled again.

    Args:
      f: a function, bound method, partial or callable Module. Without `f`, the result is a decorator.
      in_shardings, out_shardings: the shardings of arguments and results, as in `jax.jit`. For a Module give one sharding for all
        its states, a `State` of shardings, or a `mu.StateSharding`.
      static_argnums, static_argnames: the positions and names of arguments that are static: hashable Python values, each of which
        compiles a program of its own. As in `jax.jit`, for the arguments that are not modules.
      donate_argnums, donate_argnames: the arguments whose memory the program may reuse, as in `jax.jit`, for those that are not
        modules.
      keep_unused, device, backend, inline, compiler_options: as in `jax.jit`.
      donate: whether the memory of written states is reused for their new values. ``"auto"``: yes, wherever nobody can notice; a
        state whose array you still hold is copied first. ``True``: even if the program calls back into Python and may fail while
        it runs, which then loses the states. ``False``: never.

    Returns:
      A function with the arguments and the result of `f`. It also has `lower`, `trace`, `eval_shape` and `clear_cache`, as in
      JAX, and `expect`, which limits the number of compilations.

    Raises:
      TraceLevelError: a state is written across a raw JAX transform, or read where a trace would keep its old value.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> model, calls = mu.nn.Linear(3, 2, rngs=mu.Rngs(0)), mu.Variable(0)
      >>> @mu.jit
      ... def forward(model, x):
      ...     calls.value += 1
      ...     return model(x)
      >>> forward(model, jnp.ones((4, 3))).shape, forward(model, jnp.zeros((4, 3))).shape
      ((4, 2), (4, 2))
      >>> int(calls)
      2
    """
    options = {k: v for k, v in locals().items() if k != "f" and v is not _DEFAULTS[k]}
    if f is None:
        return functools.partial(jit, **options)
    return Jitted(f, options)


_OF_ARGUMENTS = ("static_argnums", "static_argnames", "donate_argnums", "donate_argnames")
_DEFAULTS = dict(inspect.unwrap(jit).__kwdefaults__ or {})


def _options(function: Any, options: dict[str, Any]) -> Options:
    given = {**_DEFAULTS, **options}
    if given["donate"] not in ("auto", True, False):
        raise ArgumentError(
            f"`donate` cannot be {show_value(given['donate'])}",
            where=f"jit({function_name(function)})",
            expected='"auto", True or False',
            got=show_value(given["donate"]),
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
        return as_numbers(numbers), as_names(names)
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except Exception:  # of a user's class, too
        return as_numbers(numbers), as_names(names)
    either = [p.name if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD else None for p in parameters]
    if numbers is not None:
        inside = [n for n in as_numbers(numbers) if -len(either) <= n < len(either)]
        return as_numbers(numbers), tuple(name for n in inside if (name := either[n]) is not None)
    return tuple(either.index(name) for name in as_names(names) if name in either), as_names(names)
