"""The house: which folder knows which, what each is for, and that each file and each test is where it belongs.

Every import counts, also one inside a function or under `TYPE_CHECKING`, and `import_module("...")` of a
literal. `FLOORS` is the whole rule. CONTRIBUTING.md shows it as a table, with the first line of each docstring; after a
change: `python tests/whole/test_layers.py --write`.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "mutatis"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"

# The folders (and files that stand beside them), lowest floor first. A place knows those on lower floors. Inside a folder
# everybody may know everybody, as long as there is no cycle.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "_compat", "_homes", "_equivalents", "_packages"),
    ("core",),
    ("model",),
    ("tracing",),
    ("compilation",),
    ("transforms",),
    (
        "random",
        "optim",
        "metrics",
        "interventions",
        "collecting",
        "accumulation",
        "functional",
        "sharding",
        "surrogate",
        "recording",
        "checks",
        "exporting",
        "effects",
    ),
    ("nn", "checkpoint", "inspect", "interop"),
    ("", "__main__"),  # the package root, and the command line
)

# Neighbours on one floor that know each other: (importer, imported).
NEIGHBOURS = {
    ("_packages", "errors"),
    ("interventions", "collecting"),
    ("functional", "interventions"),
    ("functional", "random"),
    ("interop", "nn"),
    ("checkpoint", "inspect"),
}

# A folder of pages, of which none knows another, but for those that are made of others.
PAGES = "transforms"
DERIVED = {"mapping": {"batching", "loops"}}

# Lines of code and comments in one file. What is longer says why.
LONGEST = 500
LONGER = {
    "compilation.compiler": "one class: how a call finds its binding and its program, and is made",
    "model.variables": "one class, with all operators of an array",
    "transforms.loops": "four loops on one another, with the signatures that type checkers read",
}

# JAX's insides: for this module only, so that a new JAX release means work in one file.
INTERNALS = ("jax._src", "jax.interpreters", "jax.extend", "jaxlib")
INTERNALS_ALLOWED_IN = "_compat"

# Imports by a call.
DYNAMIC = ("importlib.import_module", "import_module", "__import__")


@dataclasses.dataclass(frozen=True)
class Import:
    line: int
    target: str  # dotted; for `from a import b`: "a.b" if that is a module of ours, else "a"
    names: tuple[str, ...] = ()  # what `from a import ...` takes out of `a`
    lazy: bool = False  # inside a function


def dotted(parts: tuple[str, ...]) -> str:
    return ".".join(part for part in parts if part)


@functools.cache
def sources() -> dict[str, Path]:
    """Every module of the package, by its name below `mutatis`; "" is the root."""
    return {
        dotted((*path.relative_to(SOURCE).parent.parts, "" if path.stem == "__init__" else path.stem)): path
        for path in sorted(SOURCE.rglob("*.py"))
    }


def place_of(module: str) -> str:
    """The folder, or the file beside the folders, that a module is in."""
    return module.partition(".")[0]


def floor_of(module: str) -> int | None:
    return next((floor for floor, places in enumerate(FLOORS) if place_of(module) in places), None)


def page_of(module: str) -> str:
    return module.removeprefix(f"{PAGES}.").partition(".")[0]


def read_imports(module: str, path: Path, is_module: Callable[[str], bool]) -> list[Import]:
    """The imports that stand in one file, absolute ("mutatis.x", "jax.numpy") and with their lines."""
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    found: list[Import] = []

    def absolute(level: int, name: str | None) -> str:
        if not level:
            return name or ""
        parts = dotted(("mutatis", package)).split(".")
        return dotted((*parts[: len(parts) - level + 1], name or ""))

    def visit(node: ast.AST, lazy: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(node.lineno, alias.name, (), lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node.level, node.module)
            plain = []
            for alias in node.names:
                if is_module(f"{base}.{alias.name}"):
                    found.append(Import(node.lineno, f"{base}.{alias.name}", (), lazy))
                else:
                    plain.append(alias.name)
            if plain:
                found.append(Import(node.lineno, base, tuple(plain), lazy))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in DYNAMIC:
            name = getattr(node.args[0], "value", None) if node.args else None
            if isinstance(name, str):
                level = len(name) - len(name.lstrip("."))
                found.append(Import(node.lineno, absolute(level, name.lstrip(".")), (), True))
        inner = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inner)

    visit(ast.parse(path.read_text(encoding="utf-8"), str(path)), False)
    return found


def is_ours(name: str) -> bool:
    return name == "mutatis" or name.startswith("mutatis.")


def below_root(name: str) -> str:
    return name.removeprefix("mutatis").removeprefix(".")


@functools.cache
def imports_of(module: str) -> list[Import]:
    return read_imports(module, sources()[module], lambda name: is_ours(name) and below_root(name) in sources())


def our_imports(module: str) -> Iterator[tuple[Import, str]]:
    for found in imports_of(module):
        if is_ours(found.target):
            yield found, below_root(found.target)


def show(module: str) -> str:
    return dotted(("mutatis", module))


def report(problems: list[str]) -> None:
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


def line_of(module: str, found: Import) -> str:
    return f"{sources()[module].relative_to(SOURCE.parents[1])}:{found.line}"


def test_every_place_is_on_one_floor() -> None:
    named = [place for places in FLOORS for place in places]
    assert sorted(named) == sorted({place_of(module) for module in sources()})


def fault(importer: str, imported: str) -> str | None:
    """Why one module may not import another, if it may not."""
    here, there = place_of(importer), place_of(imported)
    above, below = floor_of(importer), floor_of(imported)
    if here == there == PAGES:
        page, other = page_of(importer), page_of(imported)
        if importer == PAGES or page == other or other in DERIVED.get(page, ()):
            return None
        return "a page may import another only if DERIVED says so"
    if here == there or (here, there) in NEIGHBOURS or above is None or below is None or below < above:
        return None
    return f"floor {above} may import lower floors, and neighbours that NEIGHBOURS has; this is floor {below}"


def test_imports_point_down() -> None:
    problems = []
    for module in sources():
        for found, target in our_imports(module):
            why = fault(module, target) if target in sources() and target else None
            if why:
                problems.append(f"{line_of(module, found)}: {show(module)} imports {show(target)}: {why}")
    report(problems)


@pytest.mark.parametrize(
    ("importer", "imported", "fits"),
    [
        ("model.graph", "core.cells", True),
        ("core.cells", "model.graph", False),
        ("core.cells", "core.avals", True),
        ("nn.linear", "checkpoint", False),
        ("functional", "random", True),
        ("random", "functional", False),
        ("transforms.jit", "transforms.loops", False),
        ("transforms.mapping", "transforms.loops", True),
        ("transforms.custom.jvp", "transforms.custom.rule", True),
        ("transforms.custom.jvp", "transforms.jit", False),
        ("_homes", "errors", False),
    ],
)
def test_the_rule_of_floors(importer: str, imported: str, fits: bool) -> None:
    assert (fault(importer, imported) is None) is fits


def test_what_is_declared_is_so() -> None:
    """No exception stands here that nobody makes use of."""
    pairs = {(module, target) for module in sources() for _, target in our_imports(module)}
    assert not NEIGHBOURS - {(place_of(importer), place_of(imported)) for importer, imported in pairs}
    assert {(f"{PAGES}.{page}", f"{PAGES}.{other}") for page, others in DERIVED.items() for other in others} <= pairs
    assert sorted(LONGER) == [module for module, path in sources().items() if length(path) > LONGEST]


def test_nobody_imports_the_root() -> None:
    problems = []
    for module in sources():
        for found, target in our_imports(module):
            if not target:
                what = f"takes {', '.join(found.names)} from" if found.names else "imports"
                problems.append(
                    f"{line_of(module, found)}: {show(module)} {what} the package root; import the module that defines it"
                )
    report(problems)


def test_imports_of_ours_exist() -> None:
    report(
        [
            f"{line_of(module, found)}: there is no module {show(target)}"
            for module in sources()
            for found, target in our_imports(module)
            if target not in sources()
        ]
    )


def test_no_cycles() -> None:
    graph = {module: {t for _, t in our_imports(module) if t in sources()} - {""} for module in sources()}
    done: set[str] = set()

    def search(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            pytest.fail(
                "imports in a cycle: " + " -> ".join(map(show, (*path[path.index(module) :], module))),
                pytrace=False,
            )
        if module not in done:
            for target in sorted(graph[module]):
                search(target, (*path, module))
            done.add(module)

    for module in graph:
        search(module, ())


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def test_only_compat_touches_the_insides_of_jax() -> None:
    problems = []
    for module in sources():
        if module == INTERNALS_ALLOWED_IN:
            continue
        for found in imports_of(module):
            for name in (found.target, *(f"{found.target}.{name}" for name in found.names)):
                if within(name, INTERNALS):
                    problems.append(f"{line_of(module, found)}: {show(module)} imports {name}")
        for node in ast.walk(ast.parse(sources()[module].read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in INTERNALS:
                where = line_of(module, Import(node.lineno, ""))
                problems.append(f"{where}: {show(module)} reaches for {ast.unparse(node)}")
    report([f"{problem}; only {show(INTERNALS_ALLOWED_IN)} may" for problem in problems])


def test_nothing_experimental_at_import_time() -> None:
    report(
        [
            f"{line_of(module, found)}: {show(module)} imports jax.experimental as it is itself imported; "
            "do so inside the function that needs it"
            for module in sources()
            for found in imports_of(module)
            for name in (found.target, *(f"{found.target}.{name}" for name in found.names))
            if within(name, ("jax.experimental",)) and not found.lazy
        ]
    )


def test_private_names_stay_in_their_folder() -> None:
    """A name with an underscore is for its file, or for the files beside it."""
    report(
        [
            f"{line_of(module, found)}: {show(module)} imports {name} of {show(target)}, which is in another folder"
            for module in sources()
            for found, target in our_imports(module)
            for name in found.names
            if name.startswith("_") and module.rpartition(".")[0] != target.rpartition(".")[0]
        ]
    )


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def test_each_file_says_what_it_is_about() -> None:
    files = [*sources().values(), *(ROOT / "tests").rglob("*.py")]
    firsts = {str(path.relative_to(ROOT)): docstring(path).partition("\n")[0] for path in files}
    report(
        [
            f"{name}: the first line of its docstring is a sentence"
            for name, first in firsts.items()
            if first[-1:] != "."
        ]
    )


def length(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_files_are_short() -> None:
    report(
        [
            f"{path.relative_to(ROOT)} has {length(path)} lines: which second idea moved in? (or say why in LONGER)"
            for module, path in sources().items()
            if length(path) > LONGEST and module not in LONGER
        ]
    )


# Tests of what spans modules.
SPANNING = "whole"


def test_tests_mirror_the_package() -> None:
    """`tests/model/test_graph.py`, or `test_graph_of_cycles.py`, tests `mutatis.model.graph`."""
    problems = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        folder = path.relative_to(ROOT / "tests").parent.parts
        words = path.stem.split("_")[1:]
        meant = {dotted((*folder, "_".join(words[:n]))) for n in range(1, len(words) + 1)}
        if folder and words[0] == folder[-1]:
            meant.add(dotted(folder))
        if folder != (SPANNING,) and not meant & sources().keys():
            problems.append(
                f"{path.relative_to(ROOT)} is named after no module; what spans modules is in tests/{SPANNING}"
            )
    report(problems)


def test_no_two_files_of_tests_make_the_same_model() -> None:
    """Models that are alike are one, in `tests/nets.py`; what is left differs in more than its name."""
    places: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and any("Module" in ast.unparse(base) for base in node.bases):
                body = [n for n in node.body if not isinstance(n, ast.Expr | ast.Pass)]  # without docstrings
                if body:
                    places.setdefault(ast.unparse(body), []).append(f"{path.relative_to(ROOT)}: {node.name}")
    report([f"the same model in {', '.join(found)}" for found in places.values() if len(found) > 1])


def table() -> str:
    """The floors as they stand in CONTRIBUTING.md."""
    lines = ["| floor | folder or file | what is there |", "|---|---|---|"]
    for floor, places in enumerate(FLOORS):
        for place in places:
            path = sources()[place]
            name = "__init__" if not place else f"{place}/" if path.stem == "__init__" else place
            lines.append(
                f"| {floor if place == places[0] else ''} | `{name}` | {docstring(path).partition(chr(10))[0]} |"
            )
    return "".join(f"{line}\n" for line in lines)


def with_table(page: str) -> str:
    """The text of CONTRIBUTING.md with the table as it is now."""
    lines = page.splitlines(keepends=True)
    start = lines.index(table().splitlines(keepends=True)[0])
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    return "".join((*lines[:start], table(), *lines[end:]))


def test_contributing_shows_the_house() -> None:
    page = CONTRIBUTING.read_text(encoding="utf-8")
    if page != with_table(page):
        pytest.fail(
            "the table of folders in CONTRIBUTING.md is not as it would be written: "
            "python tests/whole/test_layers.py --write",
            pytrace=False,
        )


# The reader of imports is itself tested: a form that it missed would pass for a clean module.
@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("import mutatis.graph", ["mutatis.graph"]),
        ("import mutatis as mu", ["mutatis"]),
        ("from mutatis import graph, jit", ["mutatis.graph", "mutatis"]),
        ("from mutatis.graph import walk", ["mutatis.graph"]),
        ("from . import loops", ["mutatis.transforms"]),
        ("from .. import graph", ["mutatis.graph"]),
        ("from .. import Module", ["mutatis"]),
        ("from ..graph import walk", ["mutatis.graph"]),
        ("def f():\n    import mutatis.graph", ["mutatis.graph"]),
        ("if TYPE_CHECKING:\n    from mutatis.graph import walk", ["mutatis.graph"]),
        ("import importlib\nimportlib.import_module('mutatis.graph')", ["mutatis.graph"]),
    ],
)
def test_reader_sees_each_form(text: str, targets: list[str], tmp_path: Path) -> None:
    path = tmp_path / "jit.py"
    path.write_text(text)
    found = read_imports("transforms.jit", path, lambda name: name == "mutatis.graph")
    assert [f.target for f in found if is_ours(f.target)] == targets


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        CONTRIBUTING.write_text(with_table(CONTRIBUTING.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table(), end="")
