"""Filters: predicates on (path, variable), as hashable values.

Wherever a filter is expected, a type, a string (a tag), ``...``, ``True``, ``None``, ``False``, a list or tuple, or a
callable will do; `as_filter` says what each means.
"""

from __future__ import annotations

import abc
import types
from collections.abc import Callable, Hashable
from typing import Any, TypeAlias, get_origin

from mutatis.core.nodes import is_node
from mutatis.core.showing import show_class, show_value
from mutatis.errors import FilterError
from mutatis.model.variables import Variable, spelled

Path: TypeAlias = tuple[Any, ...]
FilterLike: TypeAlias = Any


class Filter(abc.ABC):
    """A predicate on (path, variable) with ``&``, ``|`` and ``~``."""

    __slots__ = ()

    @abc.abstractmethod
    def __call__(self, path: Path, variable: Any) -> bool:
        """Whether the state (or module) at `path` is selected."""

    @abc.abstractmethod
    def _parts(self) -> tuple[Hashable, ...]: ...

    def __and__(self, other: FilterLike) -> Filter:
        return All(self, other)

    def __or__(self, other: FilterLike) -> Filter:
        return AnyOf(self, other)

    def __invert__(self) -> Filter:
        return Not(self)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self._parts() == other._parts()

    def __hash__(self) -> int:
        return hash((type(self), self._parts()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(_show, self._parts()))})"


def _show(part: Any) -> str:
    return part.__name__ if isinstance(part, type) else repr(part)


class All(Filter):
    """Selects what every one of the filters selects."""

    __slots__ = ("filters",)

    def __init__(self, *filters: FilterLike) -> None:
        self.filters = tuple(map(as_filter, filters))

    def __call__(self, path: Path, variable: Any) -> bool:
        return all(f(path, variable) for f in self.filters)

    def _parts(self) -> tuple[Hashable, ...]:
        return self.filters


class AnyOf(Filter):
    """Selects what at least one of the filters selects."""

    __slots__ = ("filters",)

    def __init__(self, *filters: FilterLike) -> None:
        self.filters = tuple(map(as_filter, filters))

    def __call__(self, path: Path, variable: Any) -> bool:
        return any(f(path, variable) for f in self.filters)

    def _parts(self) -> tuple[Hashable, ...]:
        return self.filters


AnyOf.__name__ = AnyOf.__qualname__ = "Any"


class Not(Filter):
    """Selects what the filter does not select."""

    __slots__ = ("filter",)

    def __init__(self, filter: FilterLike) -> None:
        self.filter = as_filter(filter)

    def __call__(self, path: Path, variable: Any) -> bool:
        return not self.filter(path, variable)

    def _parts(self) -> tuple[Hashable, ...]:
        return (self.filter,)


class Everything(Filter):
    """Selects every state."""

    __slots__ = ()

    def __call__(self, path: Path, variable: Any) -> bool:
        return True

    def _parts(self) -> tuple[Hashable, ...]:
        return ()


class Nothing(Filter):
    """Selects no state."""

    __slots__ = ()

    def __call__(self, path: Path, variable: Any) -> bool:
        return False

    def _parts(self) -> tuple[Hashable, ...]:
        return ()


class OfType(Filter):
    """Selects the states (or modules) of a kind and its subclasses."""

    __slots__ = ("type",)

    def __init__(self, type: type) -> None:
        _refuse_arguments(type)
        self.type = type

    def __call__(self, path: Path, variable: Any) -> bool:
        return isinstance(variable, self.type) or (isinstance(variable, type) and issubclass(variable, self.type))

    def _parts(self) -> tuple[Hashable, ...]:
        return (self.type,)


def _refuse_arguments(kind: Any) -> None:
    origin = get_origin(kind)
    if isinstance(origin, type) and origin is not types.UnionType:
        raise FilterError(
            f"`{kind}` is not a filter: what states hold is known to type checkers only",
            expected="a kind",
            got="a kind with type arguments",
            cure=f"Leave them out, `{spelled(origin)}`, or look at the values: `lambda path, v: isinstance(v.value, dict)`.",
        )


class PathContains(Filter):
    """Selects the states whose path has this attribute, index or key."""

    __slots__ = ("key",)

    def __init__(self, key: Hashable) -> None:
        self.key = key

    def __call__(self, path: Path, variable: Any) -> bool:
        return self.key in path

    def _parts(self) -> tuple[Hashable, ...]:
        return (self.key,)


class WithTag(Filter):
    """Selects the states that carry a tag: their `collection`, or one in the metadata ``tag`` or ``tags``."""

    __slots__ = ("tag",)

    def __init__(self, tag: str) -> None:
        self.tag = tag

    def __call__(self, path: Path, variable: Any) -> bool:
        if getattr(variable, "collection", None) == self.tag:
            return True
        if not isinstance(variable, Variable):
            return False
        return variable.metadata.get("tag") == self.tag or self.tag in variable.metadata.get("tags", ())

    def _parts(self) -> tuple[Hashable, ...]:
        return (self.tag,)


class Satisfies(Filter):
    """Selects what a function of (path, variable) says."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[[Path, Any], bool]) -> None:
        self.function = function

    def __call__(self, path: Path, variable: Any) -> bool:
        return bool(self.function(path, variable))

    def _parts(self) -> tuple[Hashable, ...]:
        return (self.function,)


def as_filter(filter: FilterLike) -> Filter:
    """What a filter-like value means.

    Raises:
      FilterError: it means nothing.
    """
    if isinstance(filter, Filter):
        return filter
    if filter is ... or filter is True:
        return Everything()
    if filter is None or filter is False:
        return Nothing()
    if isinstance(filter, type) or isinstance(get_origin(filter), type):
        return OfType(filter)
    if isinstance(filter, str):
        return WithTag(filter)
    if isinstance(filter, list | tuple):
        return AnyOf(*filter)
    if callable(filter) and not is_node(filter):
        return Satisfies(filter)
    raise FilterError(
        f"{show_value(filter)} is not a filter",
        expected="a kind, a tag, `...`, None, a bool, a list of filters, or a function of (path, variable)",
        got=show_class(filter),
        cure="For all parameters write `mu.Param`; for all but them `mu.Not(mu.Param)`.",
    )
