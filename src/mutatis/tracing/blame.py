"""Blame: what JAX says about the inputs of a function that we trace, in terms of states and of the user's arguments.

To JAX, what a transform traces is a function `pure` of ours over lists of values. Each has a name of its own, so that an error
that speaks of it can be told from one that speaks of another, and is rewritten in place: its class stays.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from mutatis.core.naming import show_cell
from mutatis.errors import MutatisError
from mutatis.tracing.arguments import function_name

_INPUT = re.compile(r"\b(values|leaves)((?:\[[^\]]*\]|\.\w+)*)")
_numbers = itertools.count()

Labels = Mapping[str, Sequence[str]]  # for a prefix, ``leaves[0]``, what each of its entries goes by


def new_mark(name: str) -> str:
    """A name for a function that a transform has JAX trace, which no other function has."""
    return f"{name}_{next(_numbers)}"


class Site(Protocol):
    """What is known of a call of a transform."""

    name: str  # of the transform
    mark: str  # the name of the function that JAX traces
    function: Any  # the user's

    def labels(self) -> Labels:
        """What the leaves of the arguments go by."""

    def describe(self, cell: Any) -> str:
        """A cell as messages name it."""


def name_inputs(error: Exception, site: Site, cells: Sequence[Any]) -> None:
    """Say what an error that JAX raised is about.

    Args:
      error: the error; its text is changed if it speaks of the function that the call has JAX trace.
      site: the call.
      cells: the cells of which ``values`` are the values.
    """
    text = error.args[0] if error.args else None
    if not isinstance(text, str) or site.mark not in text or isinstance(error, MutatisError):
        return
    function = f"{function_name(site.function)}{source(site.function)} for {site.name}"
    text = re.sub(rf"{re.escape(site.mark)}( at .*?)?:\d+ for [^.\n]*", lambda _: function, text)
    error.args = (_INPUT.sub(lambda found: _name(found, site, cells), text), *error.args[1:])


def _name(found: re.Match[str], site: Site, cells: Sequence[Any]) -> str:
    """An input of the traced function as the user knows it."""
    if found[1] == "values":
        index = re.match(r"\[(\d+)\]", found[2])
        if index is None or int(index[1]) >= len(cells):
            return found[0]
        return f"state {site.describe(cells[int(index[1])])}{found[2][index.end() :]}"
    for prefix, names in site.labels().items():
        index = re.match(rf"{re.escape(prefix)}\[(\d+)\]", found[0])
        if index is not None and int(index[1]) < len(names):
            return f"`{names[int(index[1])]}{found[0][index.end() :]}`"
    return found[0]


def source(function: Any) -> str:
    """Where a function is, for messages: `` at model.py:41``."""
    function = inspect.unwrap(getattr(function, "__func__", function))
    call = vars(type(function)).get("__call__")  # of a module it is wrapped, so that it can be intercepted
    code = getattr(function, "__code__", None) or getattr(getattr(call, "__wrapped__", call), "__code__", None)
    return "" if code is None else f" at {show_cell(code.co_filename) or code.co_filename}:{code.co_firstlineno}"
