"""The documentation hangs together: links lead somewhere, each page can be reached, each public name has its place.

Nothing here needs the packages that build the site; `make site-check` looks at what they build.
"""

from __future__ import annotations

import importlib
import re
import urllib.parse
from collections import Counter
from pathlib import Path

import jax
import pytest

from docs.pictures import make
from docs.site import examples, navigation
from tests.whole.test_public import public_names

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]

CODE = re.compile(r"^( *`{3,}).*?^\1 *$|(?<!`)(`+)(?!`).+?(?<!`)\2(?!`)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} (.+?)(?: \{#([\w.-]+)\})?$", re.MULTILINE)


def without_code(text: str, keep: bool = False) -> str:
    """Markdown without its code; `keep` leaves code inside of lines."""
    return CODE.sub(lambda found: found[0] if keep and found[2] else "", text)


def slug(title: str) -> str:
    """The anchor of a heading, as GitHub and the site make it."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
    return re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")


def anchors(text: str) -> set[str]:
    """The anchors of a page: of its headings, and those that are written out."""
    counts: Counter[str] = Counter()
    found = set(re.findall(r'<a (?:id|name)="([^"]+)"', text))
    for title, name in HEADING.findall(re.sub(CODE.pattern.partition("|")[0], "", text, flags=re.M | re.S)):
        name = name or slug(title)
        found.add(f"{name}-{counts[name]}" if counts[name] else name)
        counts[name] += 1
    return found


def wrong_links(path: Path) -> list[str]:
    """The links of a Markdown file that lead to no file, or to no heading of it."""
    text = path.read_text(encoding="utf-8")
    problems = []
    for link in LINK.findall(without_code(text)):
        if re.match(r"https?:|mailto:", link):
            continue
        target, _, anchor = urllib.parse.unquote(link).partition("#")
        file = (path.parent / target).resolve() if target else path
        below = file.relative_to(ROOT / "docs").as_posix() if file.is_relative_to(ROOT / "docs") else ""
        if below in navigation.generated_pages():
            names = navigation.shown_names()
            if below.startswith("api/") and anchor.startswith("mutatis.") and anchor not in names:
                problems.append(f"{link}: no such public name")
        elif not file.exists():
            problems.append(f"{link}: no such file")
        elif anchor and file.suffix == ".md" and anchor not in anchors(file.read_text(encoding="utf-8")):
            problems.append(f"{link}: no such heading")
    return problems


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    assert wrong_links(path) == []


def test_wrong_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A title: `x`\n[a](#a-title-x) [b](#other) [c](gone.md) `[d](gone.md)`\n```\n[e](gone.md)\n```\n")
    assert wrong_links(page) == ["#other: no such heading", "gone.md: no such file"]


def test_every_page_is_in_the_navigation_once() -> None:
    listed = navigation.flat(navigation.navigation())
    assert sorted(listed) == sorted(navigation.existing_pages())


def test_the_index_has_every_question() -> None:
    folder = ROOT / "docs" / "howto"
    linked = set(LINK.findall((folder / "index.md").read_text(encoding="utf-8")))
    assert {path.name for path in folder.glob("*.md")} - linked == {"index.md"}


def test_every_public_name_has_its_place() -> None:
    """What is new goes into `docs/site/navigation.py`."""
    names = {
        f"{module}.{name}" for module in navigation.MODULES for name in public_names(importlib.import_module(module))
    }
    shown = Counter(navigation.shown_names())
    assert [name for name, count in shown.items() if count > 1] == []
    assert names - navigation.ALSO.keys() - shown.keys() == set()
    assert shown.keys() - names == set()


def test_all_public_modules_are_known() -> None:
    root = importlib.import_module("mutatis")
    modules = {f"mutatis.{name}" for name in public_names(root) if type(getattr(root, name)) is type(importlib)}
    assert modules == {*navigation.MODULES} - {"mutatis"}


@pytest.mark.parametrize(("ours", "theirs"), navigation.COUNTERPARTS.items())
def test_counterparts_are_there(ours: str, theirs: str) -> None:
    assert ours in navigation.shown_names()
    module, _, name = theirs.rpartition(".")
    assert callable(getattr(importlib.import_module(module), name))


def test_every_transform_has_its_counterpart() -> None:
    [page] = [page for page in navigation.PAGES if page.file == "transforms"]
    ours = {"StateAxes", "StateSharding", "Carry", "Shared", "for_loop", "accumulate"}
    named = {name for group in page.groups for name in group.names}
    assert {name.removeprefix("mutatis.") for name in named - navigation.COUNTERPARTS.keys()} == ours


@pytest.mark.parametrize(("other", "shown"), navigation.ALSO.items())
def test_second_names_are_of_the_same_object(other: str, shown: str) -> None:
    found = [
        getattr(importlib.import_module(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in (other, shown)
    ]
    assert found[0] is found[1]


# -- pictures ----------------------------------------------------------------------------------------------------------


@pytest.mark.once
@pytest.mark.parametrize("name", make.PICTURES)
def test_a_picture_is_as_its_program_draws_it(name: str, tmp_path: Path) -> None:
    """One that is stale is written anew by `python docs/pictures/make.py`."""
    for drawn in make.write(name, tmp_path):
        assert drawn.read_bytes() == (make.HERE / drawn.name).read_bytes(), f"{drawn.name} is stale"


@pytest.mark.once
def test_every_picture_is_shown_in_both_themes() -> None:
    shown = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    assert {path.name for path in make.HERE.glob("*.svg")} == {
        f"{name}_{theme}.svg" for name in make.PICTURES for theme in make.THEMES
    }
    assert [path.name for path in make.HERE.glob("*.svg") if path.name not in shown] == []


# -- examples as notebooks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", navigation.examples(), ids=lambda path: path.stem)
def test_a_notebook_is_the_script_in_pieces(path: Path) -> None:
    source = examples.without_docstring(path.read_text(encoding="utf-8"))
    pieces = examples.cells(source)
    assert "\n\n\n".join(pieces).split() == source.split()
    for piece in pieces:
        compile(piece, path.name, "exec")  # of its own


SHORT = {
    "kalman": ["--length", "300", "--steps", "3"],
    "reservoir": ["--units", "50", "--length", "500", "--runs", "2"],
    "neural_ode": ["--updates", "5"],
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), SHORT.items(), ids=SHORT)
def test_a_notebook_runs_cell_by_cell(
    name: str, options: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [f"{name}.py", *options])
    names: dict[str, object] = {"__name__": "__main__"}
    source = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as users have it
        for piece in examples.cells(examples.without_docstring(source)):
            exec(compile(piece, f"{name}.ipynb", "exec"), names)
    assert capsys.readouterr().out
