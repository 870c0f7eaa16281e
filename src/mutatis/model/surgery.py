"""Changing what models are made of: finding submodules, putting others in their place, taking states out."""

from __future__ import annotations

import types
from collections.abc import Callable, Collection, Iterator, Mapping
from operator import is_
from typing import Any, TypeVar, overload

import jax
import numpy as np

from mutatis.core import access, transactions
from mutatis.core.containers import ContainerSnapshot
from mutatis.core.journal import Journal, put_back
from mutatis.core.naming import show_path
from mutatis.core.nodes import is_node, stacked_part
from mutatis.core.showing import show_class, show_value
from mutatis.core.statics import check_static
from mutatis.core.structure import structure, structure_lock
from mutatis.core.transactions import Transaction
from mutatis.errors import ArgumentError, FilterError, StructureError
from mutatis.model.filters import FilterLike, Path, as_filter
from mutatis.model.graph import Encoder
from mutatis.model.modules import M, Module, watch_of
from mutatis.model.variables import Variable
from mutatis.model.walks import check_node
from mutatis.model.wrapped import Wrapped

T = TypeVar("T")
GONE = object()  # in the place of what is taken out


@overload
def modules(node: Any, kind: type[M], /) -> dict[Path, M]: ...
@overload
def modules(node: Any, *filters: FilterLike) -> dict[Path, Module]: ...
def modules(node: Any, *filters: FilterLike) -> dict[Path, Any]:
    """List the modules inside a model by path, the model itself first.

    A module with several paths (a shared layer) is listed once, at its first path.

    Args:
      node: a Module, or a list, tuple or dict of modules.
      *filters: which modules: types, predicates on (path, module), or other filters. A module is listed if any of them selects
        it. Without filters, all modules.

    Returns:
      A dictionary from paths, as tuples of attribute names, keys and indices, to modules. The path of the model itself is ``()``.

    Example:
      >>> import mutatis as mu
      >>> rngs = mu.Rngs(0)
      >>> model = mu.nn.Sequential(mu.nn.Linear(2, 3, rngs=rngs), mu.nn.Dropout(0.5, rngs=rngs), mu.nn.Linear(3, 1, rngs=rngs))
      >>> [*mu.modules(model, mu.nn.Linear)]
      [('layers', 0), ('layers', 2)]
      >>> for dropout in mu.modules(model, mu.nn.Dropout).values():
      ...     dropout.rate = 0.1
    """
    selects = as_filter(filters if filters else ...)
    encoder = Encoder()
    with structure_lock:
        encoder.encode(check_node(node))
    found = zip(encoder.object_paths, encoder.objects, strict=True)
    return {path: obj for path, obj in found if isinstance(obj, Module) and selects(path, obj)}


def replace(node: T, where: Any, fn: Callable[[Any], Any]) -> T:
    """Replace modules inside a model: each selected module gives way to the result of ``fn(module)``.

    The model is changed in place. Inner modules are replaced before the modules that hold them. A module with several paths (a
    shared layer) is replaced at all of them by the same new one.

    Args:
      node: a Module, or a list, tuple or dict of modules.
      where: which modules: a filter, or the path of a module. A path is a tuple of attribute names, keys and indices, or a string
        as paths are printed, such as ``"blocks[0].norm"``.
      fn: a function from the old module to the new one. The new one may hold the old one.

    Returns:
      The node; or if the node itself is replaced, the new one.

    Raises:
      FilterError: no module is selected. If this or any other error is raised, also by `fn`, then the model has not changed.
      ArgumentError: `fn` is not a function.

    Example:
      >>> import mutatis as mu
      >>> rngs = mu.Rngs(0)
      >>> model = mu.nn.Sequential(mu.nn.Linear(2, 8, rngs=rngs), mu.nn.relu, mu.nn.Linear(8, 3, rngs=rngs))
      >>> _ = mu.replace(model, "layers[2]", lambda old: mu.nn.Linear(8, 10, rngs=rngs))  # another head
      >>> model.layers[2].kernel.shape
      (8, 10)
    """
    given: object = fn
    if isinstance(given, Module) or not callable(given):
        raise ArgumentError(
            "`mu.replace` was given what is no function of the old module as its `fn`",
            path="fn",
            expected="a function that gives what stands in a module's place",
            got=show_class(given),
            cure="`mu.replace(model, where, lambda old: new)`",
        )
    every = modules(node)
    holders = holders_of(node)
    if isinstance(where, str) or (isinstance(where, tuple) and all(isinstance(key, str | int) for key in where)):
        wanted = {where, ()} if where == "." else {where}
        places = {**dict(_places(holders)), **every}
        chosen = [module for path, module in places.items() if path in wanted or show_path(path) in wanted]
    else:
        chosen = [*modules(node, where).values()]
    if not chosen:
        raise FilterError(
            f"no module is selected by {show_value(where)}",
            expected="the path of a module, or a filter that selects some",
            got=", ".join(show_path(path) or "." for path in every) or "no modules",
            cure="`mu.modules(model)` lists them by path.",
        )
    paths = {id(module): path for path, module in every.items()}
    others: dict[int, Any] = {}

    def swap(item: Any) -> Any:
        return others.get(id(item), item)

    containers = [obj for _, obj in holders if not isinstance(obj, Module)]
    with Transaction("replace", journal=Journal(containers)) as tx:
        for module in reversed(chosen):
            other = fn(module)
            if not is_node(other) and not isinstance(other, list | tuple | dict | jax.Array | np.ndarray):
                check_static(other, "replace", show_path(paths[id(module)]))
            others = {id(module): other}
            rewrite(holders, swap)
            node = swapped(node, swap, ())
        Encoder().encode(node)  # what lists and dicts hold now can be part of a model
        access.commit(tx)
    return node


def _places(holders: list[tuple[Path, Any]]) -> Iterator[tuple[Path, Module]]:
    """Every place of every submodule; `modules` gives the first of each."""
    for path, obj in holders:
        for key, item in _entries(obj):
            yield from _modules_in(item, (*path, key))


def _modules_in(item: Any, path: Path) -> Iterator[tuple[Path, Module]]:
    if isinstance(item, Module):
        yield path, item
    elif isinstance(item, Wrapped):
        yield from _modules_in(item.__wrapped__, path)
    elif isinstance(item, tuple):
        for index, inner in enumerate(item):
            yield from _modules_in(inner, (*path, index))


def _entries(obj: Any) -> list[tuple[Any, Any]]:
    """What a module, list or dict holds, by name, index or key."""
    return [*enumerate(obj)] if isinstance(obj, list) else [*(vars(obj) if isinstance(obj, Module) else obj).items()]


class Places:
    """The paths of a node's submodules, looked up when they are asked for, and anew when the node has changed.

    Args:
      node: the node; without one there are no paths.
    """

    __slots__ = ("_contents", "_epoch", "_node", "_paths")

    def __init__(self, node: Any) -> None:
        self._node = [] if node is None else node
        self._epoch: int | None = None  # not looked up yet
        self._contents: ContainerSnapshot
        self._paths: dict[int, Path] = {}  # by `id`: users' modules may compare as they like

    def path_of(self, module: Module) -> Path | None:
        """The first path of a module that is somewhere in the node."""
        if self._epoch != structure.epoch or not self._contents.unchanged():
            self._look()
        return self._paths.get(id(module))

    def _look(self) -> None:
        encoder = Encoder()
        with structure_lock:
            self._epoch = structure.epoch
            encoder.encode(check_node(self._node))
        self._contents = ContainerSnapshot([obj for obj in encoder.objects if not isinstance(obj, Module)])
        self._paths = {}
        for path, obj in zip(encoder.object_paths, encoder.objects, strict=True):
            if isinstance(obj, Module):
                watch_of(obj)
                self._paths[id(obj)] = path


def holders_of(node: Any) -> list[tuple[Path, Any]]:
    """The modules, lists and dicts of a node, with their paths."""
    encoder = Encoder()
    with structure_lock:
        encoder.encode(check_node(node))
    return list(zip(encoder.object_paths, encoder.objects, strict=True))


def holders_among(encoder: Encoder, cells: Collection[Variable]) -> list[tuple[Path, Any]]:
    """Those of the modules, lists and dicts that a walk has met which hold some of the cells, with their paths."""
    wanted = set(map(id, cells))

    def may_hold(obj: Any) -> bool:
        items = obj if type(obj) is list else (vars(obj) if isinstance(obj, Module) else obj).values()
        # No loop over the items in Python: most hold none of the cells.
        return not wanted.isdisjoint(map(id, items)) or any(issubclass(kind, _INDIRECT) for kind in {*map(type, items)})

    return [(path, obj) for path, obj in zip(encoder.object_paths, encoder.objects, strict=True) if may_hold(obj)]


_INDIRECT = (tuple, Wrapped, types.MethodType)  # what may hold some inside


def rewrite(holders: list[tuple[Path, Any]], swap: Callable[[Any], Any]) -> None:
    """Put ``swap(item)`` in the place of each item that modules, lists and dicts hold; `GONE` takes it out.

    Raises:
      StructureError: an item cannot be taken out of where it is; then nothing has changed.
    """
    changes = []
    for path, obj in holders:
        changes.append([(key, item, swapped(item, swap, (*path, key))) for key, item in _entries(obj)])
    for (_, obj), entries in zip(holders, changes, strict=True):
        if any(item is not new for _, item, new in entries):
            _refill(obj, [(key, new) for key, _, new in entries])


def swapped(item: Any, swap: Callable[[Any], Any], path: Path) -> Any:
    """What comes in the place of an attribute or entry, looking into tuples and transformed modules too."""
    if isinstance(item, Wrapped):
        inner = swapped(item.__wrapped__, swap, path)
        return item if inner is item.__wrapped__ else item.remake(inner, **item.parts)
    if isinstance(item, types.MethodType) and is_node(item.__self__):
        owner = swapped(item.__self__, swap, path)
        return item if owner is item.__self__ else GONE if owner is GONE else getattr(owner, item.__name__)
    if not isinstance(item, tuple):
        return swap(item)
    inside = [swapped(inner, swap, (*path, index)) for index, inner in enumerate(item)]
    if all(map(is_, inside, item)):
        return item
    left = [inner for inner in inside if inner is not GONE]
    if not hasattr(item, "_fields"):
        return tuple(left)
    if len(left) < len(inside):
        raise held_fast(path, item)
    return type(item)(*left)


def _refill(obj: Any, entries: list[tuple[Any, Any]]) -> None:
    if isinstance(obj, Module):
        for name, new in entries:
            if new is GONE:
                delattr(obj, name)
            elif obj.__dict__[name] is not new:
                setattr(obj, name, new)
        return
    tx = transactions.current()
    if tx is not None:
        tx.journal.note(obj, "", obj.copy())
    left = [(key, new) for key, new in entries if new is not GONE]
    put_back(obj, "", [new for _, new in left] if isinstance(obj, list) else dict(left))


def held_fast(path: Path, holder: Any) -> StructureError:
    """The error for what cannot be taken out of where it is."""
    return StructureError(
        f"`{show_path(path) or type(holder).__name__}` cannot be popped: nothing can be taken out of a "
        f"{type(holder).__name__}",
        path=show_path(path),
        expected="states that are attributes of modules, or in lists, dicts or tuples below them",
        got=type(holder).__name__,
        cure="Pop from each module that holds states: `mu.pop(model, mu.Cache)`.",
    )


def stacks_on(path: Path, owners: Mapping[Path, Module]) -> list[int]:
    """Where a path goes into the one layer of a stack that holds the states of all.

    Args:
      path: the path of a state or module.
      owners: the modules by path.
    """
    holders = [owners.get(path[:n]) for n in range(len(path))]
    return [n for n, part in enumerate(path) if holders[n] is not None and part == stacked_part(type(holders[n]))]
