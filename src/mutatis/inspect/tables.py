"""Tables: data that `print` shows as aligned text, `rich.print` as a table, and notebooks as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from mutatis.core import markup
from mutatis.core.showing import cut, show_count

SCREEN, WIDTH = 40, 120  # lines and columns of what a table looks like unasked
_AT_ONCE = 200  # rows that a notebook is given


class Table:
    """Rows of text under a header; subclasses say what is in them."""

    header: ClassVar[tuple[str, ...]]
    left: ClassVar[tuple[str, ...]]  # the columns that are aligned to the left

    def cells(self) -> Sequence[Sequence[str]]:
        """The text of each row."""
        raise NotImplementedError

    def footer(self) -> Sequence[str] | None:
        """The text of a row of sums, if there is one."""
        return None

    def _rows(self) -> list[Sequence[str]]:
        footer = self.footer()
        return [*self.cells(), *([] if footer is None else [footer])]

    def __str__(self) -> str:
        lines = [self.header, *self._rows()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        aligned = [str.ljust if name in self.left else str.rjust for name in self.header]
        return "\n".join(
            "  ".join(align(text, width) for align, text, width in zip(aligned, line, widths, strict=True)).rstrip()
            for line in lines
        )

    def __rich__(self) -> Any:
        from rich import box, table  # only `rich` calls this, so it is there

        shown = table.Table(box=box.SIMPLE_HEAD)
        for name in self.header:
            shown.add_column(name, justify="left" if name in self.left else "right")
        for row in self.cells():
            shown.add_row(*map(_plain, row))
        if (footer := self.footer()) is not None:
            shown.add_section()
            shown.add_row(*map(_plain, footer), style="bold")
        return shown

    def title(self) -> str:
        """What it is a table of, in a line: above it in notebooks."""
        return f"{type(self).__name__}: {show_count(len(self.cells()), 'row')}"

    def __repr__(self) -> str:
        """The text, of at most a screen."""
        lines = str(self).split("\n")
        if len(lines) > SCREEN:
            above, below = SCREEN // 2, SCREEN // 2 - 1
            lines[above:-below] = [f"... {show_count(len(lines) - above - below, 'more row')}"]
        return "\n".join(cut(line, WIDTH) for line in lines)

    def to_html(self) -> str:
        """The table as HTML that folds, with all of its rows."""
        return markup.framed(self.inner_html())

    def _repr_html_(self) -> str:
        return markup.framed(self.inner_html(_AT_ONCE))

    def inner_html(self, most: int | None = None) -> str:
        """The table as HTML without its style, with so many of its rows at most."""
        rows = self.cells()
        table = markup.table(self.header, rows[:most], self.footer(), self.left)
        if most is not None and len(rows) > most:
            table += markup.escape(f"... {show_count(len(rows) - most, 'more row')}")
        return markup.folding(markup.escape(self.title()), table, is_open=len(rows) <= SCREEN)


def _plain(text: str) -> Any:
    """Text in which rich sees no markup."""
    from rich.text import Text

    return Text(text)
