"""Builds the documentation site: `make site`.

The pages are those of `docs/`, as they are, and three kinds that are made here: of CHANGELOG.md and CONTRIBUTING.md, of each
script of `examples/`, and of the public names. They are put together in `build/site_pages`, with links to files of the
repository turned into links to pages or to its source; from there Zensical makes `build/site`.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import griffe
import navigation
import nbformat
from docstrings import Docstrings
from examples import cells, described, without_docstring
from navigation import DOCS, REPOSITORY, ROOT

HERE = Path(__file__).parent
STAGE = ROOT / "build" / "site_pages"
SITE = ROOT / "build" / "site"
PAGES = STAGE / "docs"

# A link of Markdown, outside of code; what stands in code is matched first, and left alone.
CODE_OR_LINK = re.compile(
    r"(?P<code>^(?P<ticks> *`{3,}).*?^(?P=ticks) *$|(?<!`)(?P<inline>`+)(?!`).+?(?<!`)(?P=inline)(?!`))"
    r"|\]\((?P<target>[^)\s]+)\)",
    re.MULTILINE | re.DOTALL,
)


def relative(target: str, page: str) -> str:
    """A path below the pages, as it is written on one of them."""
    return posixpath.relpath(target, posixpath.dirname(page) or ".")


# A picture in two themes, as GitHub shows it: by the theme of the system. On the site it goes by the theme that is chosen there.
PICTURE = re.compile(
    r'<picture>\s*<source media="\(prefers-color-scheme: dark\)" srcset="(?P<dark>[^"]+)">\s*'
    r'<img alt="(?P<alt>[^"]*)" src="(?P<light>[^"]+)">\s*</picture>'
)


def page_of(path: str) -> str | None:
    """The page, or the file beside the pages, that a file of the repository is on the site."""
    pages = navigation.existing_pages()
    for page, file in navigation.FROM_ROOT.items():
        if path == file:
            return page
    if path == "README.md":
        return "index.md"
    if path.startswith("examples/") and path.endswith(".py"):
        return path.removesuffix(".py") + ".md"
    if path.startswith("docs/"):
        inner = path.removeprefix("docs/")
        if inner in pages or (ROOT / path).is_file():
            return inner
    return None


def translated(text: str, file: str, page: str) -> str:
    """The text of a Markdown file of the repository, with its links as they are on the site."""

    def link(found: re.Match[str]) -> str:
        target = found["target"]
        if found["code"] or target.startswith(("http:", "https:", "mailto:", "#")):
            return found[0]
        path, hash_, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(file), path))
        inner = page_of(path)
        if inner is not None:
            return f"]({relative(inner, page)}{hash_}{anchor})"
        if (ROOT / path).exists():
            kind = "tree" if (ROOT / path).is_dir() else "blob"
            return f"]({REPOSITORY}/{kind}/main/{path}{hash_}{anchor})"
        return found[0]

    text = PICTURE.sub(r"![\g<alt>](\g<light>#only-light)\n![\g<alt>](\g<dark>#only-dark)", text)
    return CODE_OR_LINK.sub(link, text)


def write(page: str, text: str) -> None:
    path = PAGES / page
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def copy_docs() -> None:
    """The pages that somebody wrote, and the pictures beside them."""
    for path in sorted(DOCS.rglob("*")):
        inner = path.relative_to(DOCS).as_posix()
        if not path.is_file() or inner.startswith("site/") or path.suffix in {".py", ".pyc"}:
            continue
        if path.suffix == ".md":
            write(inner, translated(path.read_text(encoding="utf-8"), f"docs/{inner}", inner))
        else:
            (PAGES / inner).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, PAGES / inner)
    for page, file in navigation.FROM_ROOT.items():
        write(page, translated((ROOT / file).read_text(encoding="utf-8"), file, page))
    if not (DOCS / "index.md").exists():
        write("index.md", translated((ROOT / "README.md").read_text(encoding="utf-8"), "README.md", "index.md"))
    shutil.copyfile(HERE / "extra.css", PAGES / "extra.css")


# ---- Examples


def notebook(path: Path) -> str:
    """An example as a notebook, with its description above."""
    title, about = described(path)
    source = without_docstring(path.read_text(encoding="utf-8"))
    v4: Any = nbformat.v4  # which has no types
    found = v4.new_notebook()
    parts = [f"# {path.stem}\n\n{title}\n\n{about}".strip(), f"import sys\n\nsys.argv = [{path.name!r}]  # its options"]
    found.cells = [v4.new_markdown_cell(parts[0])]
    found.cells += [v4.new_code_cell(piece) for piece in [parts[1], *cells(source)]]
    for number, cell in enumerate(found.cells):
        cell.id = f"cell-{number}"  # the same at each build
    found.metadata = {"language_info": {"name": "python"}}
    nbformat.validate(found)
    return f"{v4.writes(found)}\n"


def write_examples() -> None:
    rows = ["# Examples\n", "Each is one script that runs. `make example NAME=kalman` runs one with what it needs.\n"]
    for path in navigation.examples():
        title, about = described(path)
        source = path.read_text(encoding="utf-8")
        write(f"examples/{path.name}", source)
        write(f"examples/{path.stem}.ipynb", notebook(path))
        page = (
            f"# {path.stem}\n\n{title}\n\n{about}\n\n"
            f"Download: [{path.name}]({path.name}){{ download }}, [{path.stem}.ipynb]({path.stem}.ipynb){{ download }}. "
            f"[On GitHub]({REPOSITORY}/blob/main/examples/{path.name}).\n\n"
            f'```python title="examples/{path.name}"\n{without_docstring(source)}\n```\n'
        )
        write(f"examples/{path.stem}.md", page)
        rows.append(f"- [{path.stem}]({path.stem}.md): {title}")
    write("examples/index.md", "\n".join([rows[0], rows[1], *rows[2:]]) + "\n")


# ---- The API


def first_sentence(obj: griffe.Object | griffe.Alias) -> str:
    return obj.docstring.value.strip().partition("\n")[0] if obj.docstring else ""


def source_link(obj: griffe.Object | griffe.Alias) -> str:
    target = obj.final_target if isinstance(obj, griffe.Alias) else obj
    path = os.path.relpath(str(target.filepath), ROOT)
    lines = "" if target.is_module or not target.lineno else f"#L{target.lineno}"
    return f"[Source]({REPOSITORY}/blob/main/{path}{lines}){{ .source }}"


def counterpart_link(name: str) -> str:
    other = navigation.COUNTERPARTS.get(name)
    return f" In JAX: [`{other}`](https://docs.jax.dev/en/latest/_autosummary/{other}.html)." if other else ""


def write_api() -> None:
    package = griffe.load("mutatis", search_paths=[ROOT / "src"], extensions=griffe.load_extensions(Docstrings))
    also = {shown: name for name, shown in navigation.ALSO.items()}
    index = [
        "# API",
        "",
        "Every public name, by task. `import mutatis as mu` is what the examples call the package.",
        "",
    ]
    for page, groups in navigation.places().items():
        text = [f"# {page.title}", "", page.about, ""]
        index += ["", f"## [{page.title}]({page.file}.md)", ""]
        for group, names in groups:
            if len(groups) > 1:
                text += [f"## {group.title}", ""]
            for name in names:
                obj = package[name.removeprefix("mutatis.")]
                target = obj.final_target if isinstance(obj, griffe.Alias) else obj
                options: dict[str, Any] = {"heading_level": 3 if len(groups) > 1 else 2}
                if target.is_module:
                    options["members"] = False
                if target.docstring is None:
                    options["show_if_no_docstring"] = True
                text += [f"::: {name}", "    options:"]
                text += [f"        {key}: {json.dumps(value)}" for key, value in options.items()]
                links = source_link(obj) + (f" Also `{also[name]}`." if name in also else "") + counterpart_link(name)
                text += ["", links, ""]
                index.append(f"- [`{name}`][{name}]: {first_sentence(obj)}")
        write(f"api/{page.file}.md", "\n".join(text))
    write("api/index.md", "\n".join(index) + "\n")


# ---- The configuration


def as_toml(value: Any) -> str:
    """A value as inline TOML."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {as_toml(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def title_of(page: str) -> str:
    """The title of a page, as its first heading says it; markup is left out."""
    found = re.search(r"^# (.+)$", (PAGES / page).read_text(encoding="utf-8"), re.MULTILINE)
    return found[1].replace("`", "") if found else Path(page).stem


def as_nav(nav: navigation.Nav) -> list[Any]:
    entries: list[Any] = []
    for entry in nav:
        if not isinstance(entry, str):
            entries.append({entry[0]: as_nav(entry[1])})
        elif entry.endswith("/index.md"):
            entries.append(entry)
        else:
            entries.append({"Mutatis" if entry == "index.md" else title_of(entry): entry})
    return entries


HANDLER = {
    "show_root_heading": True,
    "show_root_full_path": True,
    "show_root_toc_entry": True,
    "show_source": False,
    "show_overloads": False,
    "show_if_no_docstring": False,
    "show_labels": False,
    "show_symbol_type_toc": True,
    "show_signature_annotations": True,
    "signature_crossrefs": True,
    "separate_signature": True,
    "line_length": 88,
    "members_order": "source",
    "filters": ["!^_"],
    "inherited_members": False,
    "merge_init_into_class": True,
    "docstring_style": "google",
    "docstring_section_style": "list",
    "docstring_options": {"ignore_init_summary": True, "warn_unknown_params": False, "warn_missing_types": False},
}


def configuration() -> str:
    toggle = {"icon": "lucide/sun-moon", "name": "Switch to the light theme"}
    project = {
        "site_name": "Mutatis",
        "site_url": f"{navigation.ADDRESS}/",
        "site_description": "Explicit, typed, mutable state for JAX models, understood by every transform.",
        "site_author": "The Mutatis developers",
        "copyright": "The Mutatis developers. Apache License 2.0.",
        "repo_url": REPOSITORY,
        "repo_name": "mutatis/mutatis",
        "docs_dir": "docs",
        "site_dir": "site",
        "extra_css": ["extra.css"],
        "nav": as_nav(navigation.navigation()),
        "theme": {
            "language": "en",
            "custom_dir": str(HERE / "theme"),
            "font": False,  # those of the reader's system: nothing is fetched from elsewhere
            "features": [
                "content.code.copy",
                "navigation.footer",
                "navigation.indexes",
                "navigation.path",
                "navigation.sections",
                "navigation.tabs",
                "navigation.top",
                "search.highlight",
                "toc.follow",
            ],
            "palette": [
                {"media": "(prefers-color-scheme)", "toggle": toggle},
                {
                    "media": "(prefers-color-scheme: light)",
                    "scheme": "default",
                    "toggle": {"icon": "lucide/sun", "name": "Switch to the dark theme"},
                },
                {
                    "media": "(prefers-color-scheme: dark)",
                    "scheme": "slate",
                    "toggle": {"icon": "lucide/moon", "name": "Use the theme of the system"},
                },
            ],
        },
        "markdown_extensions": {
            "admonition": {},
            "attr_list": {},
            "def_list": {},
            "footnotes": {},
            "md_in_html": {},
            "tables": {},
            "toc": {"permalink": "#", "permalink_title": "Link to this section", "toc_depth": 3},
            "pymdownx": {
                "details": {},
                "highlight": {"pygments_lang_class": True},
                "inlinehilite": {},
                "magiclink": {},
                "superfences": {},
                "tabbed": {"alternate_style": True},
                "arithmatex": {"generic": True},
            },
        },
        "plugins": {
            # A name with underscores is one word, so that its parts do not find it everywhere.
            "search": {"separator": r'[\s\-,:!=\[\]()\\"`/]+|\.(?!\d)'},
            "mkdocstrings": {
                "handlers": {
                    "python": {
                        "paths": [str(ROOT / "src")],
                        "options": {**HANDLER, "extensions": [f"{HERE / 'docstrings.py'}:Docstrings"]},
                    }
                }
            },
        },
    }
    return "[project]\n" + "".join(f"{key} = {as_toml(value)}\n" for key, value in project.items())


# ---- What comes out


def public_titles(text: str) -> str:
    """A page of HTML in which no name is shown by the file it is defined in."""

    def shown(found: re.Match[str]) -> str:
        name = found[1]
        if any(name == public or name.startswith(f"{public}.") for public in navigation.shown_names()):
            return found[0]
        return f'title="{name.rpartition(".")[2]}"'

    text = re.sub(r'(title="mutatis\.[\w.]+) \(mutatis\.[\w.]+\)"', r'\1"', text)
    return re.sub(r'title="(mutatis\.[\w.]+)(?:\([^"]*\))?"', shown, text)


def polish(change: Callable[[str], str]) -> None:
    for path in SITE.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        changed = change(text)
        if changed != text:
            path.write_text(changed, encoding="utf-8")


def main() -> None:
    shutil.rmtree(STAGE, ignore_errors=True)
    copy_docs()
    write_examples()
    write_api()
    (STAGE / "zensical.toml").write_text(configuration(), encoding="utf-8")
    command = [sys.executable, "-m", "zensical", "build", "--clean", *sys.argv[1:]]
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    done = subprocess.run(command, cwd=STAGE, env=environment, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.move(STAGE / "site", SITE)
    polish(public_titles)
    sys.stdout.write(f"The site is in {SITE.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
