"""HTML: the little that notebooks and pages are made of. It folds, and takes the colours of what it stands in."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

_STYLE = """
.mutatis{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;color:inherit;text-align:left;overflow-x:auto}
.mutatis details>:not(summary){margin-left:1.4em}
.mutatis summary{cursor:pointer}
.mutatis div.leaf{padding-left:1em}
.mutatis .note{opacity:.65}
.mutatis table{border-collapse:collapse;font:inherit;color:inherit;background:none;border:0;margin:.2em 0}
.mutatis tr{background:none!important}
.mutatis th,.mutatis td{padding:0 1.2em 0 0;border:0;text-align:right;white-space:pre;font:inherit;color:inherit}
.mutatis th,.mutatis tfoot td{font-weight:bold}
.mutatis thead th{border-bottom:1px solid rgba(128,128,128,.5)}
.mutatis tfoot td{border-top:1px solid rgba(128,128,128,.5)}
.mutatis th.left,.mutatis td.left{text-align:left}
""".replace("\n", "")


def escape(text: str) -> str:
    """Text as HTML shows it, wherever it stands."""
    return html.escape("".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text))


def framed(inside: str) -> str:
    """HTML with the style that it needs."""
    return f'<div class="mutatis"><style>{_STYLE}</style>{inside}</div>'


def folding(summary: str, inside: str, *, is_open: bool = True) -> str:
    """What folds, under a line of HTML."""
    return f"<details{' open' if is_open else ''}><summary>{summary}</summary>{inside}</details>"


def table(
    header: Sequence[str], rows: Iterable[Sequence[str]], footer: Sequence[str] | None = None, left: Sequence[str] = ()
) -> str:
    """A table of text.

    Args:
      header: the names of the columns.
      rows: the text of each row.
      footer: that of the sums.
      left: the columns that are aligned to the left.
    """
    sides = [' class="left"' if name in left else "" for name in header]

    def row(tag: str, texts: Sequence[str]) -> str:
        cells = (f"<{tag}{side}>{escape(text)}</{tag}>" for side, text in zip(sides, texts, strict=True))
        return f"<tr>{''.join(cells)}</tr>"

    foot = "" if footer is None else f"<tfoot>{row('td', footer)}</tfoot>"
    body = "".join(row("td", texts) for texts in rows)
    return f"<table><thead>{row('th', header)}</thead><tbody>{body}</tbody>{foot}</table>"
