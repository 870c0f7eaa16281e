"""Tables: data that `print` shows as aligned text, `rich.print` as a table, and notebooks as HTML."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, ClassVar

from mutatis._packages import require
from mutatis.errors import MissingPackageError


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

    def to_html(self) -> str:
        """The table as HTML.

        Raises:
          MissingPackageError: the package `rich` is not installed.
        """
        console = require("rich.console", "to_html").Console(record=True, file=io.StringIO(), width=240)
        console.print(self)
        return str(console.export_html(inline_styles=True, code_format="<pre>{code}</pre>"))

    def _repr_html_(self) -> str | None:
        try:
            return self.to_html()
        except MissingPackageError:
            return None  # a notebook shows the text then


def _plain(text: str) -> Any:
    """Text in which rich sees no markup."""
    from rich.text import Text

    return Text(text)


def show_bytes(count: int) -> str:
    """``1.5 kB``."""
    size, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.0f} B" if units[0] == "B" else f"{size:.1f} {units[0]}"
