"""Transformed functions: what a transform returns. They work as methods and as attributes of modules."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, Self, TypeVar, overload

import jax

from mutatis import _compat
from mutatis.core.calls import check_transformed, without_own_frames
from mutatis.core.naming import PACKAGE, probe
from mutatis.core.nodes import is_node
from mutatis.model.wrapped import Wrapped, borrows
from mutatis.tracing.arguments import function_name

_compat.hide_frames(PACKAGE)  # users' tracebacks show users' code

P = ParamSpec("P")
Rest = ParamSpec("Rest")
R_co = TypeVar("R_co", covariant=True)
Owner = TypeVar("Owner")


if TYPE_CHECKING:
    from typing import final

    @final
    class ForPartial:
        """Nothing that there is, and so no call of a transform is its first overload, which takes this.

        To mypy, `functools.partial(mu.jit, static_argnames="n")` gives what the first overload gives, and from one with
        parameters to infer it infers ``Never``. Pyright asks the others.
        """

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
else:
    ForPartial = None


class Transformed(Wrapped, Generic[P, R_co]):
    """A function that a transform was applied to. Works as a method, and as an attribute of modules.

    Args:
      function: the user's function.
      remake: makes the same of another function; as a static value it stands for the transform.
      call: ``call(function, args, kwargs)`` runs the transform; subclasses may define `__call__` instead.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        remake: Callable[..., Any],
        call: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any] | None = None,
    ) -> None:
        if not is_node(function):  # a Module that is not called is a part of a model all the same
            check_transformed(function, getattr(remake, "func", remake).__name__)
        self.__wrapped__ = function
        self.set_recipe(remake)
        self._call = call
        for name in ("__name__", "__qualname__", "__doc__", "__module__"):
            if (value := probe(function, name)) is not None:
                setattr(self, name, value)

    def set_recipe(self, remake: Callable[..., Any]) -> None:
        """Say how to make the same of another function; options that hold nodes are set apart."""
        keywords = remake.keywords if isinstance(remake, functools.partial) else {}
        self.parts = {name: option for name, option in keywords.items() if _names_nodes(option)}
        if self.parts:
            rest = {name: option for name, option in keywords.items() if name not in self.parts}
            remake = functools.partial(remake.func, *remake.args, **rest)  # type: ignore[attr-defined]
        self.remake = remake

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R_co:
        assert self._call is not None
        try:
            return self._call(self.__wrapped__, args, kwargs)  # type: ignore[no-any-return]  # as the transform says
        except Exception as error:
            raise without_own_frames(error)  # noqa: B904  # it is the same error

    @overload
    def __get__(self, obj: None, owner: type | None = None) -> Self: ...
    @overload
    def __get__(
        self: Transformed[Concatenate[Owner, Rest], R_co], obj: Owner, owner: type | None = None
    ) -> Callable[Rest, R_co]: ...
    def __get__(self, obj: Any, owner: type | None = None) -> Any:
        return self if obj is None else types.MethodType(self, obj)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        parts = {name: copy.deepcopy(part, memo) for name, part in self.parts.items()}
        return self.remake(copy.deepcopy(self.__wrapped__, memo), **parts)

    def __reduce__(self) -> Any:
        return functools.partial(self.remake, **self.parts), (self.__wrapped__,)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({function_name(self.__wrapped__)})"


def _names_nodes(option: Any) -> bool:
    return any(is_node(leaf) or borrows(leaf) for leaf in jax.tree.leaves(option, is_leaf=is_node))
