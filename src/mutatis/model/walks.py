"""Walks: finding the cells of a node, and its description, without walking over what has not changed."""

from __future__ import annotations

import types
import weakref
from collections.abc import Mapping
from itertools import chain
from typing import Any, overload

from mutatis import _compat
from mutatis.core.nodes import Reference, is_node
from mutatis.core.showing import show_class, show_value
from mutatis.core.statics import Static, StaticObject
from mutatis.core.structure import structure_lock
from mutatis.errors import ArgumentError
from mutatis.model.filters import Filter, Path, as_filter
from mutatis.model.graph import Encoder, Parts, Spec, cell_spec
from mutatis.model.modules import Module, described_of, set_described
from mutatis.model.tags import check_tags
from mutatis.model.variables import V, Variable, spelled
from mutatis.model.wrapped import Wrapped


class CachedWalk:
    """What a walk found in a module, which another would find too while everything holds the very same objects.

    It keeps neither modules nor cells alive, nor the containers that they are in: those are looked up where they were.
    """

    __slots__ = ("_cells", "_complete", "_kept", "_levels", "_modules", "_statics", "parts")

    def __init__(self, encoder: Encoder, parts: Parts) -> None:
        self.parts = parts
        self._complete = encoder.describe
        self._statics = encoder._statics
        self._cells = list(map(weakref.ref, encoder.cells))
        self._kept: list[Any] = []  # static values, so that nothing else gets their identity
        self._levels: list[tuple[list[type], list[int], list[int], list[int]]] = []
        level = [obj for obj in encoder.objects if isinstance(obj, Module)]
        self._modules = list(map(weakref.ref, level))
        seen = set(map(id, level))
        while level:
            held = [_held(encoder.held[id(obj)]) for obj in level]
            items = list(chain.from_iterable(held))
            identities = list(map(id, items))
            places = dict(zip(identities, range(len(items)), strict=True))  # one of each
            deeper = [at for identity, at in places.items() if identity in encoder.held and identity not in seen]
            seen.update(places)
            kept = [items[at] for identity, at in places.items() if identity not in encoder.held]
            self._kept += [item for item in kept if not isinstance(item, Variable | Module)]
            self._levels.append((list(map(type, level)), list(map(len, held)), identities, deeper))
            level = [items[at] for at in deeper]

    def cells(self, described: bool) -> list[Any] | None:
        """The cells in the order of their numbers; None if another walk would find, or describe, something else."""
        cells: list[Any] = [reference() for reference in self._cells]
        if not self._holds() or type(None) in map(type, cells) or (described and not self._describes(cells)):
            return None
        return cells

    def _holds(self) -> bool:
        level: list[Any] = [reference() for reference in self._modules]
        for kinds, lengths, identities, deeper in self._levels:
            if list(map(type, level)) != kinds:
                return False
            held = [_held(obj.__dict__ if isinstance(obj, Module) else obj) for obj in level]
            items = list(chain.from_iterable(held))
            if list(map(len, held)) != lengths or list(map(id, items)) != identities:
                return False
            level = [items[at] for at in deeper]
        return True

    def _describes(self, cells: list[Variable]) -> bool:
        # Static values can change in place, and the marks of cells without notice.
        return (
            self._complete
            and all(type(s.value) in _UNCHANGING or Static(s.value) == s for _, s in self._statics.values())
            and tuple([cell_spec(cell, self._static) for cell in cells]) == self.parts[3]
        )

    def _static(self, value: Any) -> Spec:
        return self._statics.get(id(value)) or ("s", Static(value))


_UNCHANGING = frozenset({type(None), bool, int, float, str, bytes, type, StaticObject})


def _held(obj: Any) -> list[Any]:
    """What is in a container, or in what holds nodes as one does."""
    if isinstance(obj, dict):
        return [*obj, *obj.values()]
    if isinstance(obj, Reference):
        return [obj._value]
    if isinstance(obj, Wrapped):
        return [obj.remake, obj.__wrapped__, *obj.parts, *obj.parts.values()]
    return [obj.__func__, obj.__self__] if isinstance(obj, types.MethodType) else list(obj)


def _find(node: Any, *, described: bool, marks: bool = True) -> tuple[Parts, list[Variable[Any]]]:
    """The parts of a node's definition, and its cells in the order of their numbers.

    A module is walked over only if it has changed. Without `described`, the paths are all that there is of a definition; without
    `marks`, it does not say which cells are frozen.
    """
    with structure_lock:
        known: CachedWalk | None = described_of(node) if isinstance(node, Module) and marks else None
        if known is not None and (cells := known.cells(described)) is not None:
            return known.parts, cells
        encoder = Encoder(describe=described, marks=marks)
        spec = encoder.encode(check_node(node))
        parts = spec, encoder.encode_references() if described else (), tuple(encoder.paths), tuple(encoder.specs)
        # Nothing is kept of a function that is traced: its static values may hold tracers.
        if isinstance(node, Module) and marks and _compat.current_trace() is _compat.EVAL_TRACE:
            set_described(node, CachedWalk(encoder, parts))
        return parts, list(encoder.cells)


def check_node(node: Any) -> Any:
    """The node itself, if it is a Module, a Variable or a pytree of them.

    Raises:
      ArgumentError: it is something else.
    """
    if is_node(node) or isinstance(node, list | tuple | dict):
        return node
    raise ArgumentError(
        f"{show_value(node)} is not a node",
        expected="a Module, a Variable, or a list, tuple or dict of them",
        got=show_class(node),
        cure=_instead_of(node),
    )


def _instead_of(node: Any) -> str:
    """What to write for what was given as a node."""
    if isinstance(node, type) and issubclass(node, Variable):
        return f"The model comes first, and then filters: `mu.state(model, {spelled(node)})`."
    if isinstance(node, type) and issubclass(node, Module):
        return "Make one first, and give that: `mu.state(model)`."
    if isinstance(node, Mapping):  # a State, which is no dict
        return "Give the model itself, and then values for it: `mu.update(model, state)`."
    return "Write a model as `class Net(mu.Module)`; for a plain dict of arrays use `mu.State.from_flat`."


@overload
def variables(node: Any, kind: type[V], /) -> dict[Path, V]: ...
@overload
def variables(node: Any, *filters: Any) -> dict[Path, Variable[Any]]: ...
def variables(node: Any, *filters: Any) -> dict[Path, Any]:
    """List the states of a model by path: the live `Variable` objects, which you can read and write.

    A state with several paths (a shared weight) is listed once, at its first path. For the values alone, see `mu.state`.

    Args:
      node: a Module, a Variable, or a list, tuple or dict of them.
      *filters: which states; a state is listed if any of the filters selects it. Without filters, all states are.

    Returns:
      A dictionary from paths (tuples of attribute names, keys and indices) to Variables.

    Example:
      >>> import mutatis as mu
      >>> layer = mu.nn.Linear(2, 1, rngs=mu.Rngs(0))
      >>> for path, variable in mu.variables(layer, mu.Param).items():
      ...     variable.value *= 0.5
      ...     print(path, variable.shape)
      ('bias',) (1,)
      ('kernel',) (2, 1)
    """
    selects = _any(filters)
    (_, _, paths, _), cells = _find(node, described=False)
    by_path = dict(zip(paths, cells, strict=True))
    if selects is None:
        return by_path
    chosen = {path: cell for path, cell in by_path.items() if selects(path, cell)}
    if not chosen:
        check_tags(filters, by_path)
    return chosen


def _any(filters: tuple[Any, ...]) -> Filter | None:
    return as_filter(filters) if filters else None


def holder_of(node: Any, path: Path) -> Any:
    """The module, list, tuple or dict that holds the state at a path of a node; None for the state itself."""
    for part in path[:-1]:
        node = node[part] if isinstance(node, list | tuple | dict) else node.__dict__[part]
    return node if path else None
