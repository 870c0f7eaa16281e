"""Tags: strings as filters, and what somebody may have meant by one that no state has.

Code that is written for any model asks for tags and collections that a model need not have: that selects nothing, and is no
mistake. It is one if the string is the name of something else, a kind or a path, or a slip of the pen for something that exists.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mutatis.core.naming import show_path
from mutatis.core.nearness import mistyped
from mutatis.errors import FilterError
from mutatis.model.filters import All, AnyOf, Path, WithTag
from mutatis.model.kinds import kind_of, kinds
from mutatis.model.variables import Variable, spelled


def check_tags(filters: Iterable[Any], cells: Mapping[Path, Any]) -> None:
    """Raise if a string that selects none of some cells, or kinds, names something else, or nearly does.

    Raises:
      FilterError: it does.
    """
    for tag in _tags(filters):
        if kind_of(tag) is None and not any(WithTag(tag)(path, cell) for path, cell in cells.items()):
            _check_other(tag, cells)
            _check_slip(tag, cells)


def _tags(filters: Iterable[Any]) -> Iterator[str]:
    """The tags in filters of which each has to select something."""
    for filter in filters:
        if isinstance(filter, str):
            yield filter
        elif isinstance(filter, WithTag):
            yield filter.tag
        elif isinstance(filter, list | tuple):
            yield from _tags(filter)
        elif isinstance(filter, AnyOf | All):
            yield from _tags(filter.filters)


def _kinds_of(cells: Mapping[Path, Any]) -> dict[str, type[Variable]]:
    found = (cell if isinstance(cell, type) else type(cell) for cell in cells.values())
    return {kind.__name__: kind for kind in dict.fromkeys(found)}


def _check_other(tag: str, cells: Mapping[Path, Any]) -> None:
    """Raise if a string that is no tag is the name of a kind or of a path."""
    kind = _kinds_of(cells).get(tag)
    shown = {show_path(path): path for path in cells}
    if kind is not None:
        got, cure = "the name of a kind", f"A kind is given itself: `mu.state(model, {spelled(kind)})`."
    elif tag in shown:
        got, cure = "the name of a path", f"One state is `mu.variables(model)[{shown[tag]!r}]`."
    elif any(tag in path for path in cells):
        got = "the name of a path"
        cure = f"What is at a path is selected by a key in it: `mu.state(model, mu.PathContains({tag!r}))`."
    elif any(text.startswith((f"{tag}.", f"{tag}[")) for text in shown):
        got, cure = "the name of a path", f"A part of a model is a node itself: `mu.state(model.{tag})`."
    else:
        return
    raise _no_such_tag(tag, got, cure)


def _check_slip(tag: str, cells: Mapping[Path, Any]) -> None:
    """Raise if a string is a slip for a tag, a collection, a kind or a path."""
    tags = dict.fromkeys(name for cell in cells.values() if isinstance(cell, Variable) for name in _tags_of(cell))
    collections = dict.fromkeys(kind.collection for kind in kinds())
    shown = {show_path(path): path for path in cells}
    parts = dict.fromkeys(part for path in cells for part in path if isinstance(part, str))
    if (near := mistyped(tag, [*tags, *collections])) is not None:
        cure = f"The nearest is `mu.state(model, {near!r})`."
    elif (near := mistyped(tag, _kinds_of(cells))) is not None:
        cure = f"A kind is given itself, and not as text: `mu.state(model, {spelled(_kinds_of(cells)[near])})`."
    elif (near := mistyped(tag, parts)) is not None:
        cure = f"What is at a path is selected by a key in it: `mu.state(model, mu.PathContains({near!r}))`."
    elif (near := mistyped(tag, shown)) is not None:
        cure = f"The nearest path is `mu.variables(model)[{shown[near]!r}]`."
    else:
        return
    raise _no_such_tag(tag, f"{tag!r}, which is nearly {near!r}", cure)


def _tags_of(cell: Variable) -> Iterator[str]:
    """The tags of a state: its collection, and what its metadata say."""
    yield cell.collection
    several = cell.metadata.get("tags", ())
    for tag in (cell.metadata.get("tag"), *(several if isinstance(several, list | tuple | set | frozenset) else ())):
        if isinstance(tag, str):
            yield tag


def _no_such_tag(tag: str, got: str, cure: str) -> FilterError:
    return FilterError(
        f"no state has the tag {tag!r}", expected="a tag or the name of a collection", got=got, cure=cure
    )
