"""State: the values of a model by path, as a mapping that goes through raw JAX and optax."""

from __future__ import annotations

import json
import math
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from operator import lt
from typing import Any

import jax
import jax.numpy as jnp

from mutatis.core.avals import same_type, show_type
from mutatis.core.naming import show_path
from mutatis.errors import FilterError
from mutatis.model.filters import FilterLike, Path, as_filter
from mutatis.model.variables import Variable, unsubscripted


class State(Mapping[Any, Any]):
    """A mapping from paths to values, with the kind of each.

    A pytree whose leaves are the values; the paths and kinds are part of its structure. It goes through raw JAX
    and optax. `state["blocks"]` or `state["blocks", 0]` is the part below that path, a value at a full path.

    Example:
      >>> import mutatis as mu
      >>> state = mu.state({"a": {"w": mu.Param(1.0), "n": mu.Cache(2.0)}})
      >>> float(state["a"]["w"]), [*state]
      (1.0, [('a', 'n'), ('a', 'w')])
    """

    __slots__ = ("_flat", "_kinds")

    def __init__(self, flat: Mapping[Path, Any], kinds: Mapping[Path, type[Variable[Any]]] | None = None) -> None:
        kinds = {} if kinds is None else kinds
        paths = _sorted(flat)
        self._flat = {path: flat[path] for path in paths}
        self._kinds = {path: kinds.get(path, Variable) for path in paths}
        if not all(issubclass(meta, type) for meta in set(map(type, self._kinds.values()))):
            self._kinds = {path: unsubscripted(kind) for path, kind in self._kinds.items()}

    @classmethod
    def from_flat(cls, flat: Mapping[Path, Any], kinds: Mapping[Path, type[Variable[Any]]] | None = None) -> State:
        """A State from a mapping of paths (tuples) to values."""
        return cls(flat, kinds)

    def flat(self) -> dict[Path, Any]:
        """The values by path."""
        return dict(self._flat)

    def kinds(self) -> dict[Path, type[Variable[Any]]]:
        """The kinds by path."""
        return dict(self._kinds)

    def __getitem__(self, key: Any) -> Any:
        path = key if isinstance(key, tuple) else (key,)
        if path in self._flat:
            return self._flat[path]
        below = {p: p[len(path) :] for p in self._flat if p[: len(path)] == path}
        if not below:
            raise KeyError(
                f"no state at {show_path(path)!r}; there are {', '.join(map(show_path, self._flat)) or 'none'}"
            )
        return State(
            {rest: self._flat[p] for p, rest in below.items()}, {rest: self._kinds[p] for p, rest in below.items()}
        )

    def __iter__(self) -> Iterator[Path]:
        return iter(self._flat)

    def __len__(self) -> int:
        return len(self._flat)

    def __contains__(self, key: object) -> bool:
        path = key if isinstance(key, tuple) else (key,)
        return any(p[: len(path)] == path for p in self._flat)

    def __or__(self, other: State) -> State:
        if not isinstance(other, State):
            return NotImplemented
        return State({**self._flat, **other._flat}, {**self._kinds, **other._kinds})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, State) or jax.tree.structure(self) != jax.tree.structure(other):
            return False
        return all(
            same_type(a, b) and bool(jnp.all(a == b))
            for a, b in zip(jax.tree.leaves(self), jax.tree.leaves(other), strict=True)
        )

    __hash__ = None  # type: ignore[assignment]  # compares by value and holds arrays

    def filter(self, *filters: FilterLike) -> State:
        """The part that any of the filters selects (by path and kind)."""
        selects = as_filter(filters)
        return self._only(path for path in self._flat if selects(path, self._kinds[path]))

    def split(self, *filters: FilterLike) -> tuple[State, ...]:
        """One State for each filter; each entry is in the first that selects it.

        Raises:
          FilterError: entries are left over.
        """
        places = first_filters(self._kinds.items(), filters)
        return tuple(self._only(path for path, at in places.items() if at == i) for i in range(len(filters)))

    def map(self, function: Callable[[Path, Any], Any]) -> State:
        """The State of ``function(path, value)`` for each entry."""
        return State({path: function(path, value) for path, value in self._flat.items()}, self._kinds)

    def to_pure_dict(self) -> dict[Any, Any]:
        """Plain nested dictionaries by path."""
        root: dict[Any, Any] = {}
        for path, value in self._flat.items():
            inner = root
            for part in path[:-1]:
                inner = inner.setdefault(part, {})
            inner[path[-1] if path else ()] = value
        return root

    def _only(self, paths: Iterable[Path]) -> State:
        kept = list(paths)
        return State({path: self._flat[path] for path in kept}, {path: self._kinds[path] for path in kept})

    def __repr__(self) -> str:
        rows = [(path, f"{self._kinds[path].__name__} {show_type(value)}") for path, value in self._flat.items()]
        lines = [f"  {where or '.'}: {what}," for where, what in _folded(rows)]
        return "State({\n" + "\n".join(lines) + "\n})" if lines else "State({})"


def _folded(rows: list[tuple[Path, str]]) -> Iterator[tuple[str, str]]:
    """Paths as text with what is there, several that differ in indices only as one: ``layers[0..11].bias``."""
    alike: dict[tuple[Path, str], list[Path]] = {}
    for path, what in rows:
        pattern = tuple(int if type(part) is int else part for part in path)
        alike.setdefault((pattern, what), []).append(path)
    for (pattern, what), paths in alike.items():
        axes = [sorted({path[at] for path in paths}) for at, part in enumerate(pattern) if part is int]
        whole = math.prod(map(len, axes)) == len(paths) and all(axis[-1] - axis[0] < len(axis) for axis in axes)
        if len(paths) < _FEW or not whole:
            yield from ((show_path(path), what) for path in paths)
            continue
        ranges = iter(axes)
        yield show_path(tuple(_Range(next(ranges)) if part is int else part for part in pattern)), what


_FEW = 3  # that many lines of one kind are folded


class _Range:
    """Indices in a row, as a part of a path."""

    def __init__(self, axis: list[int]) -> None:
        self._axis = axis

    def __repr__(self) -> str:
        return f"{self._axis[0]}..{self._axis[-1]}" if len(self._axis) > 1 else repr(self._axis[0])


def _sorted(given: Iterable[Path]) -> list[Path]:
    """Paths in order. Those of a model mostly are, and compare as they are: names with names, indices with indices."""
    paths = list(given)
    try:
        if set(map(type, chain.from_iterable(paths))) <= {int, str} and all(map(lt, paths, paths[1:])):
            return paths
    except TypeError:  # a name and an index in the same place
        pass
    return sorted(paths, key=_order)


def _order(path: Path) -> tuple[Any, ...]:
    return tuple(
        (0, part, "") if type(part) is int else (1, 0, part if type(part) is str else repr(part)) for part in path
    )


def _flatten(state: State) -> tuple[list[Any], Any]:
    return [*state._flat.values()], (tuple(state._flat), tuple(state._kinds.values()))


def _flatten_with_keys(state: State) -> tuple[list[tuple[Any, Any]], Any]:
    return [(jax.tree_util.DictKey(show_path(path)), value) for path, value in state._flat.items()], _flatten(state)[1]


def _unflatten(aux: Any, children: Iterable[Any]) -> State:
    state: State = State.__new__(State)
    paths, kinds = aux
    state._flat = dict(zip(paths, children, strict=True))
    state._kinds = dict(zip(paths, kinds, strict=True))
    return state


def _write_structure(aux: Any) -> bytes:
    paths, kinds = aux
    return json.dumps([[list(path) for path in paths], [f"{k.__module__}:{k.__qualname__}" for k in kinds]]).encode()


def _read_structure(text: bytes) -> Any:
    paths, kinds = json.loads(bytes(text))
    return tuple(map(tuple, paths)), tuple(map(pkgutil.resolve_name, kinds))


jax.tree_util.register_pytree_with_keys(State, _flatten_with_keys, _unflatten, _flatten)


jax.export.register_pytree_node_serialization(
    State,
    serialized_name="mutatis.State",
    serialize_auxdata=_write_structure,
    deserialize_auxdata=_read_structure,
)


def first_filters(
    items: Iterable[tuple[Path, Any]], filters: tuple[FilterLike, ...], *, leftovers: bool = False
) -> dict[Path, int | None]:
    """The number of the first filter that selects each (path, variable or kind).

    Raises:
      FilterError: something is left over, unless `leftovers`.
    """
    predicates = [as_filter(f) for f in filters]
    places: dict[Path, int | None] = {}
    for path, variable in items:
        places[path] = None
        for number, selects in enumerate(predicates):
            if selects(path, variable):
                places[path] = number
                break
    rest = [path for path, at in places.items() if at is None]
    if rest and not leftovers:
        raise FilterError(
            f"{len(rest)} {'state matches' if len(rest) == 1 else 'states match'} none of the filters "
            f"{', '.join(map(repr, predicates))}",
            differences=[show_path(path) for path in rest],
            cure="Add `...` as the last filter: it takes the rest.",
        )
    return places
