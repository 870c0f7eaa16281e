"""Filters: predicates on (path, variable), as hashable values.

Wherever a filter is expected, you may give a type, a string (a tag), ``...``, ``True``, ``None``, ``False``, a list or tuple, or
a callable; `as_filter` turns each of these into a filter.
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
    """Base class of filters, which select states (or modules) of a model.

    A filter is a predicate ``filter(path, variable)``. Two filters combine by ``&`` and ``|``, and ``~`` inverts one. Filters are
    hashable, and equal if they are made of equal parts. Functions that take filters also take these values:

    - a type, such as `mu.Param`, for `mu.OfType`
    - a string, for `mu.WithTag`
    - ``...`` or True, for `mu.Everything`; None or False, for `mu.Nothing`
    - a list or tuple of filters, for `mu.Any`
    - a function of (path, variable) that returns a bool.

    Example:
      >>> import mutatis as mu
      >>> model = mu.nn.BatchNorm(2)
      >>> [*mu.state(model, mu.OfType(mu.Param) & ~mu.PathContains("bias"))]
      [('scale',)]
      >>> [*mu.state(model, lambda path, variable: path[-1] == "mean")]
      [('mean',)]
    """

    __slots__ = ()

    @abc.abstractmethod
    def __call__(self, path: Path, variable: Any) -> bool:
        """Say whether the state (or module) at `path` is selected."""

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
    """Selects the states that every one of the filters selects. ``a & b`` is the same as ``mu.All(a, b)``.

    Args:
      *filters: the filters. Without any, it selects everything.

    Example:
      >>> import mutatis as mu
      >>> model = mu.nn.Linear(2, 1, rngs=mu.Rngs(0))
      >>> [*mu.state(model, mu.All(mu.Param, mu.PathContains("kernel")))]
      [('kernel',)]
    """

    __slots__ = ("filters",)

    def __init__(self, *filters: FilterLike) -> None:
        self.filters = tuple(map(as_filter, filters))

    def __call__(self, path: Path, variable: Any) -> bool:
        return all(f(path, variable) for f in self.filters)

    def _parts(self) -> tuple[Hashable, ...]:
        return self.filters


class AnyOf(Filter):
    """Selects the states that at least one of the filters selects. ``a | b`` and a list of filters are the same.

    Args:
      *filters: the filters. Without any, it selects nothing.

    Example:
      >>> import mutatis as mu
      >>> model = mu.nn.BatchNorm(2)
      >>> [*mu.state(model, mu.Any(mu.BatchStat, mu.PathContains("bias")))]
      [('bias',), ('mean',), ('var',)]
    """

    __slots__ = ("filters",)

    def __init__(self, *filters: FilterLike) -> None:
        self.filters = tuple(map(as_filter, filters))

    def __call__(self, path: Path, variable: Any) -> bool:
        return any(f(path, variable) for f in self.filters)

    def _parts(self) -> tuple[Hashable, ...]:
        return self.filters


AnyOf.__name__ = AnyOf.__qualname__ = "Any"


class Not(Filter):
    """Selects the states that the filter does not select. ``~a`` is the same, for an `a` that is a Filter.

    Args:
      filter: the filter.

    Example:
      >>> import mutatis as mu
      >>> model = mu.nn.BatchNorm(2)
      >>> [*mu.state(model, mu.Not(mu.Param))]
      [('mean',), ('var',)]
    """

    __slots__ = ("filter",)

    def __init__(self, filter: FilterLike) -> None:
        self.filter = as_filter(filter)

    def __call__(self, path: Path, variable: Any) -> bool:
        return not self.filter(path, variable)

    def _parts(self) -> tuple[Hashable, ...]:
        return (self.filter,)


class Everything(Filter):
    """Selects every state. ``...`` and ``True`` are the same.

    Example:
      >>> import mutatis as mu
      >>> model = mu.nn.BatchNorm(2)
      >>> params, rest = mu.state(model, mu.Param, mu.Everything())  # a state is in the first that selects it
      >>> [*rest]
      [('mean',), ('var',)]
    """

    __slots__ = ()

    def __call__(self, path: Path, variable: Any) -> bool:
        return True

    def _parts(self) -> tuple[Hashable, ...]:
        return ()


class Nothing(Filter):
    """Selects no state. ``None`` and ``False`` are the same.

    Example:
      >>> import mutatis as mu
      >>> len(mu.state(mu.nn.BatchNorm(2), mu.Nothing()))
      0
    """

    __slots__ = ()

    def __call__(self, path: Path, variable: Any) -> bool:
        return False

    def _parts(self) -> tuple[Hashable, ...]:
        return ()


class OfType(Filter):
    """Selects the states (or modules) of a type and of its subclasses. The type itself is the same.

    Args:
      type: a kind of state such as `mu.Param`, or a class of modules such as `mu.nn.Linear`.

    Raises:
      FilterError: the type has type arguments, as in ``mu.Param[jax.Array]``.

    Example:
      >>> import mutatis as mu
      >>> model = mu.nn.BatchNorm(2)
      >>> [*mu.state(model, mu.OfType(mu.BatchStat))]
      [('mean',), ('var',)]
    """

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
    """Selects the states whose path has this attribute name, index or key at any level.

    Args:
      key: the attribute name, index or key. It has to be equal: a part of a name does not count.

    Example:
      >>> import mutatis as mu
      >>> rngs = mu.Rngs(0)
      >>> model = mu.nn.Sequential(mu.nn.Linear(2, 8, rngs=rngs), mu.nn.relu, mu.nn.Linear(8, 3, rngs=rngs))
      >>> [*mu.state(model, mu.PathContains("bias"))]
      [('layers', 0, 'bias'), ('layers', 2, 'bias')]
      >>> [*mu.state(model, mu.PathContains(2))]
      [('layers', 2, 'bias'), ('layers', 2, 'kernel')]
    """

    __slots__ = ("key",)

    def __init__(self, key: Hashable) -> None:
        self.key = key

    def __call__(self, path: Path, variable: Any) -> bool:
        return self.key in path

    def _parts(self) -> tuple[Hashable, ...]:
        return (self.key,)


class WithTag(Filter):
    """Selects the states that carry a tag. A string is the same where a filter is expected.

    The tags of a state are the `collection` of its kind (``"params"`` of `mu.Param`), and the metadata that it was made with:
    ``tag="adapter"``, or ``tags=("adapter", "slow")``.

    Args:
      tag: the tag.

    Example:
      >>> import mutatis as mu
      >>> model = {"w": mu.Param(1.0), "a": mu.Param(2.0, tag="adapter"), "n": mu.Cache(0)}
      >>> [*mu.state(model, mu.WithTag("adapter"))], [*mu.state(model, "params")]
      ([('a',)], [('a',), ('w',)])
    """

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
    """Selects the states for which a function of (path, variable) returns true."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[[Path, Any], bool]) -> None:
        self.function = function

    def __call__(self, path: Path, variable: Any) -> bool:
        return bool(self.function(path, variable))

    def _parts(self) -> tuple[Hashable, ...]:
        return (self.function,)


def as_filter(filter: FilterLike) -> Filter:
    """Turn a filter-like value into a filter; see `Filter` for the values.

    Raises:
      FilterError: the value is none of them.
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
