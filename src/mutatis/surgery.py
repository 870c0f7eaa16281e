"""Changing what models are made of: finding submodules, putting others in their place, taking states out."""

from __future__ import annotations

from collections.abc import Callable
from operator import is_
from typing import Any, TypeVar

from mutatis import transactions
from mutatis.cells import structure_lock
from mutatis.errors import StructureError
from mutatis.filters import FilterLike, Path, as_filter
from mutatis.graph import Encoder, check_node, show_path
from mutatis.modules import Module, Wrapped

T = TypeVar("T")
GONE = object()  # in the place of what is taken out


def modules(node: Any, *filters: FilterLike) -> dict[Path, Module]:
    """The submodules of a node by path, the node itself first, each at its first place.

    Args:
      node: a Module, or a list, tuple or dict of them.
      *filters: a module is given if any of them selects it: a type, a predicate on (path, module), ...; all are, if there
        are none.

    Example:
      >>> import mutatis as mu
      >>> from mutatis import nn
      >>> net = mu.Module()
      >>> net.layers = [nn.Linear(2, 3, rngs=mu.Rngs(0)), nn.Dropout(0.5, rngs=mu.Rngs(0))]
      >>> [*mu.modules(net, nn.Linear)]
      [('layers', 0)]
    """
    selects = as_filter(filters if filters else ...)
    encoder = Encoder()
    with structure_lock:
        encoder.encode(check_node(node))
    found = zip(encoder.object_paths, encoder.objects, strict=True)
    return {path: obj for path, obj in found if isinstance(obj, Module) and selects(path, obj)}


def replace(node: T, where: Any, fn: Callable[[Any], Any]) -> T:
    """Put others in the place of submodules: ``fn(module)`` for each that is selected, innermost first.

    A module that is reached by several paths is replaced by one other at all of them.

    Args:
      node: a Module, or a list, tuple or dict of them; it is changed in place.
      where: a path, as a tuple of attribute names, keys and indices or as it is printed (``"blocks[0].norm"``), or a filter.
      fn: gives what stands in a module's place; it may hold the module.

    Returns:
      The node, or what stands in its place.

    Raises:
      StructureError: nothing is selected.

    Example:
      >>> import mutatis as mu
      >>> from mutatis import nn
      >>> net = mu.Module()
      >>> net.layers = [nn.Linear(2, 3, rngs=mu.Rngs(0))]
      >>> _ = mu.replace(net, nn.Linear, mu.remat)
      >>> net.layers
      [Transformed(Linear)]
    """
    every = modules(node)
    if isinstance(where, str):
        chosen = [module for path, module in every.items() if show_path(path) == where]
    elif isinstance(where, tuple) and where in every:
        chosen = [every[where]]
    else:
        chosen = [*modules(node, where).values()]
    if not chosen:
        raise StructureError(
            f"no module is selected by {where!r}",
            expected="the path of a module, or a filter that selects some",
            got=", ".join(show_path(path) or "." for path in every) or "no modules",
            cure="`mu.modules(model)` lists them by path.",
        )
    holders = holders_of(node)
    others: dict[Any, Any] = {}
    for module in reversed(chosen):
        others[module] = other = fn(module)
        rewrite(holders, lambda item, module=module, other=other: other if item is module else item)  # type: ignore[misc]
    replaced: T = others.get(node, node) if isinstance(node, Module) else node
    return replaced


def holders_of(node: Any) -> list[tuple[Path, Any]]:
    """The modules, lists and dicts of a node, with their paths."""
    encoder = Encoder()
    with structure_lock:
        encoder.encode(check_node(node))
    return list(zip(encoder.object_paths, encoder.objects, strict=True))


def rewrite(holders: list[tuple[Path, Any]], swap: Callable[[Any], Any]) -> None:
    """Put ``swap(item)`` in the place of each item that modules, lists and dicts hold; `GONE` takes it out.

    Raises:
      StructureError: an item cannot be taken out of where it is; then nothing has changed.
    """
    changes = []
    for path, obj in holders:
        entries = enumerate(obj) if isinstance(obj, list) else (vars(obj) if isinstance(obj, Module) else obj).items()
        changes.append([(key, item, swapped(item, swap, (*path, key))) for key, item in entries])
    for (_, obj), entries in zip(holders, changes, strict=True):
        if any(item is not new for _, item, new in entries):
            _refill(obj, [(key, new) for key, _, new in entries])


def swapped(item: Any, swap: Callable[[Any], Any], path: Path) -> Any:
    """What comes in the place of an attribute or entry, looking into tuples and transformed modules too."""
    if isinstance(item, Wrapped):
        inner = swapped(item.__wrapped__, swap, path)
        return item if inner is item.__wrapped__ else item.remake(inner, **item.parts)
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
        tx.note(obj, "", obj.copy())
    left = [(key, new) for key, new in entries if new is not GONE]
    transactions.put_back(obj, "", [new for _, new in left] if isinstance(obj, list) else dict(left))


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
