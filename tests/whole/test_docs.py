"""The examples in docstrings, README.md and docs/ run and print what they show.

A docstring's examples know `mu`, `jax`, `jnp` and `np`; whatever else they use they import, as a reader must.
They are read from the source with `ast`, so that none hides behind a decorator.

In Markdown, the ```python blocks of a file run in order in one namespace, which starts empty; a block with
`>>>` is compared with the output it shows. `<!-- skip: reason -->` on the line above a block leaves it out.
A block that imports one of `PEERS` runs only where that is installed; no other block may need its names.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import doctest
import importlib
import importlib.util
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "mutatis"
MODULES = sorted(SOURCE.rglob("*.py"))
PAGES = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if path.exists()]

FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,})python\b[^\n]*\n(?P<code>.*?)^ *(?P=ticks) *$", re.M | re.S)
PEERS = ("brainstate", "equinox", "flax", "haiku", "penzai")
IMPORTS = re.compile(rf"^ *(?:>>> )?(?:import|from) ({'|'.join(PEERS)})\b", re.M)
INTEROP = {"linen": "flax", "nnx": "flax", "equinox": "equinox", "haiku": "haiku"}  # what these modules are about
SKIP = re.compile(r"<!--\s*skip:\s*(?P<reason>\S.*?)\s*-->\s*\Z", re.S)


@contextlib.contextmanager
def namespace(name: str, **known: object) -> Iterator[dict[str, object]]:
    """The globals of a module that exists while the examples run, so that classes made in it pickle."""
    module = types.ModuleType(name)
    module.__dict__.update(known)
    sys.modules[name] = module
    try:
        yield module.__dict__
    finally:
        del sys.modules[name]


def run_examples(text: str, known: dict[str, object], name: str, path: Path, line: int) -> None:
    """Runs the `>>>` examples in `text`, which starts at `line` (from 0) of `path`; adds to `known`."""
    test = doctest.DocTestParser().get_doctest(text, known, name, str(path), line)
    output: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.REPORT_NDIFF, verbose=False)
    result = runner.run(test, out=output.append, clear_globs=False)
    known.update(test.globs)
    if result.failed:
        pytest.fail("".join(output), pytrace=False)


def docstrings(path: Path) -> Iterator[tuple[str, str, int]]:
    """Each docstring of a file: name, text, and the line (from 0) on which the text starts."""

    def visit(node: ast.AST, name: str) -> Iterator[tuple[str, str, int]]:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{name}.{node.name}" if not isinstance(node, ast.Module) else name
            text = ast.get_docstring(node, clean=False)
            if text is not None:
                yield name, text, node.body[0].lineno - 1
        for child in ast.iter_child_nodes(node):
            yield from visit(child, name)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), module_name(path))


def once_if(costly: bool, path: Path) -> Any:
    """A parameter; the costly ones run on one Python, as `.ci/run` does with what is marked so."""
    return pytest.param(path, marks=[pytest.mark.once] if costly else [])


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.once  # what a docstring shows is the same on both; what it shows of is tested on both
@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_docstrings(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    import jax
    import jax.numpy as jnp
    import numpy as np

    import mutatis as mu

    if path.parent.name == "interop" and path.stem in INTEROP:
        pytest.importorskip(INTEROP[path.stem])
    if path.stem != "__main__":
        importlib.import_module(module_name(path))
    for name, text, line in docstrings(path):
        if ">>>" in text:
            with namespace("example", mu=mu, jax=jax, jnp=jnp, np=np) as known:
                run_examples(text, known, name, path, line)


@dataclasses.dataclass(frozen=True)
class Block:
    code: str
    line: int  # of its first line of code, from 1
    skip: str | None  # the reason


def blocks(text: str) -> list[Block]:
    found = []
    for match in FENCE.finditer(text):
        reason = SKIP.search(text[: match.start()])
        code = re.sub(rf"^{match['indent']}", "", match["code"], flags=re.M)
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(Block(code, line, reason["reason"] if reason else None))
    return found


def run_page(path: Path) -> None:
    with namespace("page") as known:
        for block in blocks(path.read_text(encoding="utf-8")):
            if block.skip or not all(map(importlib.util.find_spec, IMPORTS.findall(block.code))):
                continue
            if ">>>" in block.code:
                run_examples(block.code, known, f"{path.name}:{block.line}", path, block.line - 1)
            else:
                # Blank lines in front, so that a traceback shows the line of the page.
                exec(compile("\n" * (block.line - 1) + block.code, str(path), "exec"), known)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=pytest.mark.jax_leaks)  # JAX keeps the trace of a kept function
        if path.stem == "semantics"
        else pytest.param(path, marks=pytest.mark.slow)  # many small trainings, of what is tested elsewhere
        if path.parent.name in ("howto", "learn") and path.stem not in ("first_model", "debugging_nan", "recording")
        else once_if(path.stem != "README", path)
        for path in PAGES
    ],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_pages(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"):  # as readers have it: optax promotes
        run_page(path)


# The runner is itself tested: one that skips in silence would pass for good documentation.

PAGE = """
```python
import dataclasses

@dataclasses.dataclass
class Point:
    x: int
```
Text, then output that is compared:
```python
>>> import pickle
>>> p = Point(1)
>>> pickle.loads(pickle.dumps(p))
Point(x=1)
```
<!-- skip: needs a cluster -->
```python
raise RuntimeError
```
```
not Python
```
```python
assert p.x == 1
```
"""


def test_blocks_share_a_namespace(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    assert [block.skip for block in blocks(PAGE)] == [None, None, "needs a cluster", None]
    run_page(path)


@pytest.mark.parametrize("first", ["import {}", "from {}.nn import Linear", ">>> import {} as p", "import {}x"])
def test_blocks_of_a_peer_run_where_it_is_installed(
    first: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = f"```python\n{first.format('penzai')}\n```\n"
    peer = first != "import {}x"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "page.md").write_text(page)
    if peer:
        run_page(tmp_path / "page.md")
    else:
        with pytest.raises(ModuleNotFoundError):
            run_page(tmp_path / "page.md")


def test_wrong_output_fails(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("```python\n>>> 1 + 1\n3\n```\n")
    with pytest.raises(pytest.fail.Exception, match=r"(?s)line 2.*- 3\n *\+ 2"):
        run_page(path)


def test_failing_block_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("Title\n\n```python\nx = 1\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as caught:
        run_page(path)
    assert caught.traceback[-1].lineno == 4  # from 0
