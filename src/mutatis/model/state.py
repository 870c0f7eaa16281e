"""State: the values of a model by path, as a mapping that goes through raw JAX and optax."""

from __future__ import annotations

import json
import math
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from operator import lt
from typing import Any

import jax
import jax.numpy as jnp

from mutatis.core.access import Lending
from mutatis.core.avals import same_type, show_type
from mutatis.core.naming import show_path
from mutatis.core.nearness import nearest
from mutatis.core.showing import cut
from mutatis.errors import FilterError, PathError
from mutatis.model.filters import FilterLike, Path, as_filter
from mutatis.model.tags import check_tags
from mutatis.model.variables import Variable, unsubscripted


class State(Mapping[Any, Any]):
    """A read-only mapping from paths to the values of states, with the kind of each.

    `mu.state`, `mu.split` and `mu.grad` return it. It is a pytree whose leaves are the values, so `jax.tree.map`, optax and every
    raw JAX transform take it. It holds the values of one moment and does not follow the model.

    A path is a tuple of attribute names, keys and indices: ``("blocks", 0, "kernel")``. ``state[path]`` is the value at a full
    path, and the State of the part below an incomplete one, such as ``state["blocks"]`` or ``state["blocks", 0]``. The printed
    form of a path works as well: ``state["blocks[0].kernel"]``. Iteration gives the full paths.

    Args:
      flat: a mapping from full paths (tuples) to values.
      kinds: a mapping from full paths to kinds. A path that is not in it has the kind `mu.Variable`.

    Raises:
      PathError: (a `KeyError`) there is nothing at a path.

    Example:
      >>> import mutatis as mu
      >>> model = mu.nn.Sequential(mu.nn.Linear(2, 3, rngs=mu.Rngs(0)), mu.nn.relu)
      >>> state = mu.state(model)
      >>> [*state]
      [('layers', 0, 'bias'), ('layers', 0, 'kernel')]
      >>> state["layers", 0, "kernel"].shape, state["layers"][0]["bias"].shape, state["layers[0].bias"].shape
      ((2, 3), (3,), (3,))
    """

    __slots__ = ("_held", "_kinds", "_lending")

    def __init__(
        self,
        flat: Mapping[Path, Any],
        kinds: Mapping[Path, type[Variable[Any]]] | None = None,
        _lending: Lending | None = None,
    ) -> None:
        kinds = {} if kinds is None else kinds
        paths = _sorted(flat)
        self._lending = _lending  # the values are a model's, and nobody has taken any out yet
        self._held = {path: flat[path] for path in paths}
        self._kinds = {path: kinds.get(path, Variable) for path in paths}
        if not all(issubclass(meta, type) for meta in set(map(type, self._kinds.values()))):
            self._kinds = {path: unsubscripted(kind) for path, kind in self._kinds.items()}

    @classmethod
    def from_flat(cls, flat: Mapping[Path, Any], kinds: Mapping[Path, type[Variable[Any]]] | None = None) -> State:
        """Make a State of a mapping from paths (tuples) to values, and perhaps one from paths to kinds."""
        return cls(flat, kinds)

    @property
    def _flat(self) -> dict[Path, Any]:
        """The values by path, for code that may keep them."""
        if self._lending is not None:
            self._lending.keep()
            self._lending = None
        return self._held

    def flat(self) -> dict[Path, Any]:
        """A plain dictionary from full paths (tuples) to values."""
        return dict(self._flat)

    def kinds(self) -> dict[Path, type[Variable[Any]]]:
        """A plain dictionary from full paths (tuples) to kinds."""
        return dict(self._kinds)

    def __getitem__(self, key: Any) -> Any:
        path = self._path(key)
        if path in self._held:
            return self._flat[path]
        below = {p: p[len(path) :] for p in self._held if p[: len(path)] == path}
        if not below:
            raise _no_state(key if isinstance(key, str) else show_path(path), self._held)
        return State(
            {rest: self._held[p] for p, rest in below.items()},
            {rest: self._kinds[p] for p, rest in below.items()},
            self._lending,
        )

    def get(self, key: Any, default: Any = None) -> Any:
        """The value or part at a path, or the default if there is nothing."""
        return self[key] if key in self else default  # noqa: SIM401  # this is `get`

    def __getattr__(self, name: str) -> Any:
        # No way to states: one may be called `map` or `items`.
        text = f"{type(self).__name__!r} object has no attribute {name!r}"
        raise AttributeError(f"{text}: write `state[{name!r}]`" if name[:1] != "_" and name in self else text)

    def _path(self, key: Any) -> Path:
        """The path that a key says: a part, a tuple of them, or, if there is no such, a path as it is printed."""
        path = key if isinstance(key, tuple) else (key,)
        if not isinstance(key, str) or key.isidentifier() or any(held[:1] == path for held in self._held):
            return path
        return next(filter(None, (_printed(held, key) for held in self._held)), path)

    def __iter__(self) -> Iterator[Path]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: object) -> bool:
        path = self._path(key)
        return any(p[: len(path)] == path for p in self._held)

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
        """The State of the entries that at least one of the filters selects, by path and kind."""
        selects = as_filter(filters)
        kept = [path for path in self._held if selects(path, self._kinds[path])]
        if not kept:
            check_tags(filters, self._kinds)
        return self._only(kept)

    def split(self, *filters: FilterLike) -> tuple[State, ...]:
        """One State for each filter. Each entry is in the State of the first filter that selects it.

        Raises:
          FilterError: entries are left over, because no filter selects them.
        """
        places = first_filters(self._kinds.items(), filters)
        return tuple(self._only(path for path, at in places.items() if at == i) for i in range(len(filters)))

    def map(self, function: Callable[[Path, Any], Any]) -> State:
        """Apply ``function(path, value)`` to each entry; the State of the results."""
        return State({path: function(path, value) for path, value in self._flat.items()}, self._kinds)

    def to_pure_dict(self) -> dict[Any, Any]:
        """The values as plain nested dictionaries, one level for each part of a path."""
        root: dict[Any, Any] = {}
        for path, value in self._flat.items():
            inner = root
            for part in path[:-1]:
                inner = inner.setdefault(part, {})
            inner[path[-1] if path else ()] = value
        return root

    def _only(self, paths: Iterable[Path]) -> State:
        kept = list(paths)
        values = {path: self._held[path] for path in kept}
        return State(values, {path: self._kinds[path] for path in kept}, self._lending)

    def __getstate__(self) -> Any:
        return None, {"_flat": self._flat, "_kinds": self._kinds}

    def __setstate__(self, state: Any) -> None:
        parts = state[1]
        self._held, self._kinds, self._lending = parts["_flat"], parts["_kinds"], None

    def __repr__(self) -> str:
        lines = [f"  {line}," for line in map(": ".join, self._rows())]
        if not lines:
            return "State({})"
        if len(lines) > _SCREEN:
            half = _SCREEN // 2
            lines[half:-half] = [f"  ... {len(lines) - 2 * half:,} more lines"]
        return "\n".join(cut(line, _WIDTH) for line in ("State({" + f"  # {self._tally().total()}", *lines, "})"))

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        from mutatis.model.treescoped import render_state

        return render_state(self, path, subtree_renderer)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/plain": repr(self), "text/html": self._html()}

    def _html(self) -> str:
        from mutatis.core import markup

        rows = [(where, *what.split(" ", 1)) for where, what in self._rows()]
        most = rows[:_AT_ONCE]
        more = f"... {len(rows) - len(most):,} more lines" if len(rows) > len(most) else ""
        table = markup.table(("state", "kind", "type"), most, left=("state", "kind", "type")) + markup.escape(more)
        summary = markup.escape(f"State: {self._tally().total() or 'empty'}")
        return markup.framed(markup.folding(summary, table, is_open=len(rows) <= _SCREEN))

    def _rows(self) -> list[tuple[str, str]]:
        rows = [(path, f"{self._kinds[path].__name__} {show_type(value)}") for path, value in self._held.items()]
        return [(where or ".", what) for where, what in _folded(rows)]

    def _tally(self) -> Any:
        from mutatis.model.tally import Tally  # few programs show a State

        tally = Tally()
        for path, value in self._held.items():
            tally.add_value(value, self._kinds[path])
        return tally


# What a state of a layer is called in PyTorch, and here.
_OF_TORCH = {"weight": ("kernel", "scale", "embedding"), "running_mean": ("mean",), "running_var": ("var",)}
_WIDTH, _SCREEN, _AT_ONCE = 120, 36, 200  # columns, lines, rows in a notebook


def _printed(path: Path, text: str) -> Path | None:
    """The path, or its first parts, if that is how it is printed; Python has two kinds of quotes."""
    text = text.replace('"', "'")
    if not show_path(path).startswith(text):
        return None
    return next((path[:n] for n in range(1, len(path) + 1) if show_path(path[:n]) == text), None)


def paths_of_texts(given: Iterable[Path], paths: Iterable[Path]) -> dict[Path, Path]:
    """For paths whose parts are texts, those of `paths` that are printed so, if there are."""
    texts = {path: ".".join(path).replace(".[", "[") for path in given if all(isinstance(p, str) for p in path)}
    printed = {show_path(path): path for path in paths} if texts else {}
    named = {path: printed.get(text.replace('"', "'")) for path, text in texts.items()}
    return {path: meant for path, meant in named.items() if meant is not None}


def _no_state(shown: str, paths: Iterable[Path]) -> PathError:
    every = list(paths)
    there = list(map(show_path, every))
    depth = len(re.findall(r"[^.\[\]]+", shown))
    above, _, last = shown.replace("]", "].").replace("..", ".").rpartition(".")
    same = [text for text in there for name in _OF_TORCH.get(last, ()) if text == f"{above}.{name}".lstrip(".")]
    near = next(iter(same), None) or nearest(shown, [*there, *dict.fromkeys(show_path(path[:depth]) for path in every)])
    return PathError(
        f"no state at {shown!r}",
        path=shown,
        expected=f"a path of the {len(there)} that are there, or the beginning of one"
        if there
        else "nothing: there are none",
        differences=there,
        cure="`mu.state(model)` has the states of a model." if near is None else f"The nearest is `state[{near!r}]`.",
    )


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
    state._held, state._lending = dict(zip(paths, children, strict=True)), None
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
