"""The readable tree of a model: as text of at most a screen, which its `repr` is, as whole text, and as HTML that folds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from mutatis.core.markup import escape, folding, framed
from mutatis.core.showing import cut, show_count
from mutatis.core.structure import structure_lock
from mutatis.model.outline import Part, outline
from mutatis.model.tally import Tally

WIDTH = 120  # columns
SCREEN = 40  # lines
_INLINE = 90  # characters of a list that stands on one line
_AT_ONCE = 200  # parts of one that a notebook is given


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How a tree is laid out.

    Attributes:
      whole: whether layers are opened whose settings say all.
      depth: how many modules inside one another are opened.
      leaves: whether modules are opened that hold states only.
      items: how many entries of one container get a line.
      inline: whether a container is on one line, however much of it that leaves out.
    """

    whole: bool = False
    depth: int = 1_000
    leaves: bool = True
    items: int = 1_000_000
    inline: bool = False

    def closes(self, part: Part, depth: int) -> bool:
        """Whether a module is shown on one line."""
        if not part.module or not depth:
            return False
        if depth >= self.depth or (part.brief and not self.whole):
            return True
        return not self.leaves and not any(child.levels() for child in part.children)


def show_module(module: Any) -> str:
    """The tree of a module, as deep as there is place for on a screen."""
    try:
        with structure_lock:
            part = outline(module)
        return "\n".join(_on_a_screen(part))
    except RecursionError:
        return f"{type(module).__name__}(...)"


def _on_a_screen(part: Part) -> list[str]:
    layouts = [_Layout(), _Layout(leaves=False)]
    for depth in range(part.levels(), 0, -1):
        layouts += [_Layout(depth=depth, leaves=False, items=items) for items in (_Layout.items, 16, 8, 4)]
    for layout in layouts:
        lines = _lines(part, layout)
        if len(lines) <= SCREEN:
            return lines
    return _lines(_shortened(part, SCREEN - 3), _Layout(depth=1, inline=True))


def _shortened(part: Part, most: int) -> Part:
    """A part with so many of those in it at most, and a word on the others."""
    if len(part.children) <= most:
        return part
    last = min(most // 2, most - 2)
    first = most - 1 - last
    at = len(part.children) - last
    middle = Part((), "", f"... {_left_out(part.children[first:at])}")
    return dataclasses.replace(part, children=[*part.children[:first], middle, *part.children[at:]])


def _left_out(parts: Sequence[Part]) -> str:
    total = Tally()
    for part in parts:
        total += part.tally
    return f"{sum(part.count for part in parts):,} more" + (f": {total.total()}" if total.states else "")


# -- text ----------------------------------------------------------------------------------------------------------


def _lines(part: Part, layout: _Layout, indent: str = "", depth: int = 0, end: str = "") -> list[str]:
    """The lines of a part."""
    closed = _closed(part, layout, depth)
    begin = indent + part.name
    if closed is not None and len(begin) + len(closed) <= WIDTH - 2:
        line = f"{begin}{closed}{end}"
        if not _hides(part, layout, depth):
            return [_noted(line, part.note)]
        notes = (_note(part, part.tally.content()), show_count(part.tally.states, "state"))
        return [_noted(line, next((note for note in notes if len(line) + len(note) < WIDTH - 4), ""))]
    times = f"{part.count:,} x " if part.count > 1 else ""
    said = f"{part.said}," if part.said else ""
    note = _note(part, part.tally.total() if part.module and (layout.whole or not depth) else "")
    lines = [_noted(cut(f"{begin}{times}{part.head}{said}", WIDTH), note)]
    inside = part if part.module else _shortened(part, layout.items)
    for child in inside.children:
        stop = "" if child.head.startswith("...") else ","
        lines += _lines(child, layout, f"{indent}  ", depth + part.module, stop)
    return [*lines, f"{indent}{part.tail}{end}"] if part.children else [cut(f"{lines[0]}{part.tail}{end}", WIDTH)]


def _closed(part: Part, layout: _Layout, depth: int) -> str | None:
    """A part on one line, without its name; None if it is not for one line."""
    times = f"{part.count:,} x " if part.count > 1 else ""
    if not part.module and not part.children:
        return f"{times}{part.head}{part.tail}"
    if part.module:
        if not layout.closes(part, depth) and (part.children or not depth or layout.whole):
            return None if part.children or part.tally.states else f"{times}{part.head}{part.said}{part.tail}"
        if part.own is not None:
            return times + part.own
        more = "" if part.brief or not part.children else ", ..." if part.said else "..."
        return f"{times}{part.head}{part.said}{more}{part.tail}"
    texts: list[str] = []
    room = _INLINE
    for at, child in enumerate(part.children):
        text = _closed(child, layout, depth)
        if text is None or (len(text) + len(child.name) + 2 > room and not layout.inline):
            return None
        if len(text) + len(child.name) + 2 > room:
            texts.append(f"... {sum(rest.count for rest in part.children[at:]):,} more")
            break
        texts.append(child.name + text)
        room -= len(texts[-1]) + 2
    if part.head == "(" and len(texts) == 1 and part.count == 1:
        texts.append("")
    return f"{times}{part.head}{', '.join(texts).rstrip()}{part.tail}"


def _hides(part: Part, layout: _Layout, depth: int) -> bool:
    """Whether what stands on one line has states that the line does not show."""
    return (part.module and bool(part.tally.states)) or any(_hides(child, layout, depth) for child in part.children)


def _note(part: Part, *texts: str) -> str:
    return ", ".join(filter(None, (*texts, part.note)))


def _noted(line: str, note: str) -> str:
    return cut(f"{line}  # {note}" if note else line, WIDTH)


# -- for notebooks and pages ---------------------------------------------------------------------------------------


class Tree:
    """The tree of a model, as `mu.inspect.tree` makes it. `print` shows it as text, and a notebook as HTML that folds.

    Attributes:
      depth: how many levels of modules are opened; None for all.
    """

    def __init__(self, node: Any, depth: int | None = None) -> None:
        with structure_lock:
            self._part = outline(node)
        self.depth = depth

    def __str__(self) -> str:
        return "\n".join(_lines(self._part, _Layout(whole=True, depth=1_000 if self.depth is None else self.depth)))

    def __repr__(self) -> str:
        lines = str(self).split("\n")
        if len(lines) <= SCREEN:
            return "\n".join(lines)
        half = SCREEN // 2 - 1
        return "\n".join([*lines[:half], f"... {show_count(len(lines) - 2 * half, 'more line')}", *lines[-half:]])

    def _repr_html_(self) -> str:
        return framed(self.to_html())

    def to_html(self) -> str:
        """Return the tree as HTML, without a style."""
        levels = self._part.levels()
        open_to = next((d for d in range(levels, 1, -1) if len(_lines(self._part, _Layout(depth=d))) <= SCREEN), 1)
        layout = _Layout(whole=True, depth=1_000 if self.depth is None else self.depth)
        return _html(self._part, layout, open_to, 0)


def _html(part: Part, layout: _Layout, open_to: int, depth: int) -> str:
    times = f"{part.count:,} x " if part.count > 1 else ""
    name = f'<span class="note">{escape(part.name)}</span>' if part.name else ""
    total = part.tally.total() if part.module else ""
    if not part.children or layout.closes(part, depth):
        text = _closed(part, _Layout(depth=depth), depth) or f"{times}{part.head}{part.said}{part.tail}"
        return f'<div class="leaf">{name}{escape(text)}{_aside(_note(part, total))}</div>'
    text = part.own if part.own is not None else f"{part.head}{part.said}{part.tail}"
    if text == f"{part.head}{part.tail}" and text[-2:] in ("()", "[]", "{}"):
        text = text[:-2] if part.module else f"{text[:-1]}...{text[-1]}"
    inside = [_html(child, layout, open_to, depth + part.module) for child in part.children[:_AT_ONCE]]
    if left_out := part.children[_AT_ONCE:]:
        inside.append(f'<div class="leaf">... {escape(_left_out(left_out))}</div>')
    is_open = not depth or (depth < open_to and not (part.module and part.brief))
    summary = f"{name}{escape(times + text)}{_aside(_note(part, total))}"
    return folding(summary, f"<div>{''.join(inside)}</div>", is_open=is_open)


def _aside(text: str) -> str:
    return f' <span class="note">{escape(text)}</span>' if text else ""


def bundle_of_module(module: Any) -> dict[str, str]:
    """What a notebook shows of a module: HTML, or text where that cannot be; nothing if its class has HTML of its own."""
    if hasattr(type(module), "_repr_html_"):
        return {}
    try:
        tree = Tree(module)
        text = "\n".join(_on_a_screen(tree._part)) if tree._part.own is None else tree._part.own
        return {"text/plain": text, "text/html": tree._repr_html_()}
    except RecursionError:
        return {"text/plain": show_module(module)}
