"""The examples as pages and notebooks show them: a description, and the script in pieces.

Nothing here needs more than Python, so that `tests/whole/test_site.py` can hold it in `make test`.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path


def described(path: Path) -> tuple[str, str]:
    """The first paragraph of an example's docstring, and the rest as Markdown."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")), clean=False) or path.stem
    first, _, rest = text.strip().partition("\n\n")
    return " ".join(first.split()), re.sub(r"^(?=(?:python|make) )", "    ", rest.strip("\n"), flags=re.MULTILINE)


def without_docstring(source: str) -> str:
    body = ast.parse(source).body
    end = body[0].end_lineno if body and ast.get_docstring(ast.parse(source)) else 0
    return "\n".join(source.splitlines()[end:]).strip("\n")


def cells(source: str) -> list[str]:
    """A script in pieces: the imports, then each class and function, and what stands between them."""
    lines = source.splitlines()
    starts: list[int] = []
    before: type[ast.stmt] | None = None
    for node in ast.parse(source).body:
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])
        while first > 1 and lines[first - 2].startswith("#"):  # a comment belongs to what follows
            first -= 1
        kind = ast.Import if isinstance(node, ast.Import | ast.ImportFrom) else type(node)
        if kind is not before or isinstance(node, ast.ClassDef | ast.FunctionDef):
            starts.append(first - 1)
        before = kind
    pieces = [lines[start:end] for start, end in zip(starts, [*starts[1:], len(lines)], strict=True)]
    return ["\n".join(piece).strip("\n") for piece in pieces]
