"""A page about a model: one HTML file, with what it holds, where that is, what a step does with it, and why that was compiled."""

from __future__ import annotations

import os
import types
from collections.abc import Callable
from typing import Any

from mutatis.core import markup
from mutatis.core.calls import check_function
from mutatis.core.showing import show_class, show_count
from mutatis.inspect.counting import count
from mutatis.inspect.explanation import explain
from mutatis.inspect.ledger import ledger
from mutatis.inspect.placing import placements
from mutatis.inspect.summary import state_table
from mutatis.inspect.tables import Table
from mutatis.inspect.trees import tree
from mutatis.model.modules import Module
from mutatis.transforms.jit import Jitted

_STYLE = """
:root{color-scheme:light dark}
body{margin:0 auto;padding:1em;max-width:1100px;font:15px/1.5 system-ui,sans-serif;background:#fff;color:#1b1f24}
h1{font-size:1.4em;margin:.2em 0}h2{font-size:1.1em;margin:1.4em 0 .3em}p{margin:.3em 0}
section{overflow-x:auto}
@media (prefers-color-scheme:dark){body{background:#16191d;color:#dfe3e8}}
@media (max-width:600px){body{padding:.6em}.mutatis{font-size:12px}.mutatis details>:not(summary){margin-left:.7em}
.mutatis summary,.mutatis div.leaf{overflow-wrap:anywhere}}
""".replace("\n", "")
_MOST = 1_000  # rows of one table


class Page:
    """A page about a model, as `mu.inspect.page` makes it. A notebook shows it, and `save` writes it to a file.

    Attributes:
      html: the text of the HTML file, which needs no other file.
    """

    def __init__(self, title: str, subtitle: str, sections: dict[str, str]) -> None:
        self._title = title
        inside = "".join(f"<section><h2>{markup.escape(name)}</h2>{text}</section>" for name, text in sections.items())
        self._inside = f"<h1>{markup.escape(title)}</h1><p>{markup.escape(subtitle)}</p>{inside}"

    @property
    def html(self) -> str:
        """The text of the HTML file."""
        return (
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<title>{markup.escape(self._title)}</title><style>{_STYLE}</style></head>"
            f"<body>{markup.framed(self._inside)}</body></html>\n"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page to a file.

        Args:
          path: the file.
        """
        with open(path, "w", encoding="utf-8") as file:
            file.write(self.html)

    def _repr_html_(self) -> str:
        return markup.framed(self._inside)

    def __repr__(self) -> str:
        return f"Page({self._title!r}, {show_count(len(self.html), 'character')})"


def page(
    model: Any,
    step: Callable[..., Any] | None = None,
    /,
    *args: Any,
    path: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> Page:
    """Make an HTML page about a model and a step, to look at, to keep with a run, or to send to somebody.

    It shows the tree of the model, its states by kind, where they are placed, and which of them the step reads, writes and
    carries. If the step is a function of `mu.jit`, it also shows why it was compiled. The page loads nothing from elsewhere,
    follows the light or dark mode of the reader, and fits on a phone. The step is traced but not run, and the page has no values
    of states.

    Args:
      model: a Module, a Variable, or a list, tuple or dict of them.
      step: a function, also a transformed one. Without it the page is about the model alone.
      *args: the arguments of the step; a `jax.ShapeDtypeStruct` may stand for an array.
      path: a file to write the page to.
      **kwargs: further arguments of the step, by keyword.

    Returns:
      A `Page`: ``html`` is its text, and ``save(path)`` writes it.

    Raises:
      ArgumentError: `model` is no part of a model, or `step` cannot be called.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> net = mu.nn.BatchNorm(4)
      >>> step = mu.jit(lambda net, x: net(x))
      >>> page = mu.inspect.page(net, step, net, jnp.ones((2, 4)))
      >>> page.html.startswith("<!DOCTYPE html>"), "carries" in page.html
      (True, True)
    """
    sections = {"Tree": tree(model).to_html(), "States by kind": _table(state_table(model))}
    places = placements(model)
    if places.rows:
        sections["Where they are"] = _table(places)
    if step is not None:
        check_function(step, "inspect.page", "step", "`mu.inspect.page(model, step, model, batch)`")
        book = ledger(step)(*args, **kwargs)
        sections[f"What {book.label} reads, writes and carries"] = _table(book)
        if isinstance(step.__func__ if isinstance(step, types.MethodType) else step, Jitted):
            sections["Compilations"] = explain(step).to_html()
    name = type(model).__name__ if isinstance(model, Module) else show_class(model)
    made = Page(name, str(count(model)), sections)
    if path is not None:
        made.save(path)
    return made


def _table(shown: Table) -> str:
    return shown.inner_html(_MOST)
