"""One direction for imports: a module imports from lower rows only.

Every import counts, also one inside a function or under `TYPE_CHECKING`, and `import_module("...")` of a
literal. `ROWS` is the whole rule; a new module gets a place there. `pkg.*` stands for every module inside the
package `mutatis.pkg`, `pkg` alone for its `__init__`, and the empty name for the package root.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "mutatis"

# Row -> its modules, lowest first. Within a row none imports another, but for OPEN_PACKAGES and SIBLINGS.
ROWS: dict[float, tuple[str, ...]] = {
    0.0: ("errors", "typing", "config", "_compat"),
    0.5: ("cells", "naming", "containers", "interrupts"),
    1.0: ("transactions",),
    1.5: ("values",),
    2.0: ("variables",),
    2.5: ("kinds",),
    3.0: ("filters", "statics"),
    3.5: ("contexts",),
    4.0: ("modules",),
    5.0: ("graph",),
    5.5: ("surgery", "observers"),
    6.0: ("state",),
    7.0: ("captures",),
    7.5: ("lifting",),
    7.6: ("programs", "staging", "axes", "differentiation", "lanes"),
    7.7: ("bindings",),
    7.75: ("compilations", "launching"),
    7.8: ("compiling",),
    7.9: ("control",),
    8.0: (
        "transforms.jit",
        "transforms.autodiff",
        "transforms.derivatives",
        "transforms.jacobians",
        "transforms.batching",
        "transforms.loops",
        "transforms.branches",
        "transforms.rematerialize",
        "transforms.custom_rules",
        "transforms.sharded",
        "transforms.abstract",
        "transforms.functionalize",
    ),
    8.5: ("transforms.mapping", "eager"),
    8.6: ("transforms",),
    9.0: ("interventions", "random", "optim", "metrics", "effects.*", "sharding"),
    9.5: ("functional", "effects"),
    10.0: ("nn.*", "checkpoint.*", "inspect.*", "interop.*"),
    10.5: ("nn", "checkpoint", "inspect", "interop"),
    11.0: ("", "cli", "__main__"),
}

# Packages whose modules may import each other (not in a cycle).
OPEN_PACKAGES = {"nn", "checkpoint", "effects", "inspect", "interop"}

# Further pairs inside a row: (importer, imported).
SIBLINGS: set[tuple[str, str]] = {("cli", ""), ("__main__", "cli")}

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


def row_of(module: str) -> float | None:
    """The row of a module, found by its name, else by `pkg.*`."""
    package = module.partition(".")[0]
    for wanted in (module, f"{package}.*" if "." in module else module):
        for row, names in ROWS.items():
            if wanted in names:
                return row
    return None


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


def place(module: str, found: Import) -> str:
    return f"{sources()[module].relative_to(SOURCE.parents[1])}:{found.line}"


def test_every_module_has_a_row() -> None:
    report(
        [
            f"{show(module)} has no row: add it to ROWS in tests/whole/test_layers.py"
            for module in sources()
            if row_of(module) is None
        ]
    )


def test_no_module_has_two_rows() -> None:
    names = [name for row in ROWS.values() for name in row]
    assert sorted(names) == sorted(set(names))


def allowed(importer: str, imported: str) -> bool:
    above, below = row_of(importer), row_of(imported)
    if above is None or below is None or below < above or (importer, imported) in SIBLINGS:
        return True  # without a row: the test above says so
    package = importer.partition(".")[0]
    return package in OPEN_PACKAGES and "." in importer and imported.startswith(f"{package}.")


def test_imports_point_down() -> None:
    problems = []
    for module in sources():
        for found, target in our_imports(module):
            if target != module and target in sources() and target and not allowed(module, target):
                problems.append(
                    f"{place(module, found)}: {show(module)} (row {row_of(module):g}) imports {show(target)} "
                    f"(row {row_of(target):g}); only lower rows, or what SIBLINGS declares, may be imported"
                )
    report(problems)


def test_nobody_imports_the_root() -> None:
    problems = []
    for module in sources():
        for found, target in our_imports(module):
            if not target and (module, "") not in SIBLINGS:
                what = f"takes {', '.join(found.names)} from" if found.names else "imports"
                problems.append(
                    f"{place(module, found)}: {show(module)} {what} the package root; import the module that defines it"
                )
    report(problems)


def test_imports_of_ours_exist() -> None:
    report(
        [
            f"{place(module, found)}: there is no module {show(target)}"
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
                    problems.append(f"{place(module, found)}: {show(module)} imports {name}")
        for node in ast.walk(ast.parse(sources()[module].read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in INTERNALS:
                where = place(module, Import(node.lineno, ""))
                problems.append(f"{where}: {show(module)} reaches for {ast.unparse(node)}")
    report([f"{problem}; only {show(INTERNALS_ALLOWED_IN)} may" for problem in problems])


def test_nothing_experimental_at_import_time() -> None:
    report(
        [
            f"{place(module, found)}: {show(module)} imports jax.experimental as it is itself imported; "
            "do so inside the function that needs it"
            for module in sources()
            for found in imports_of(module)
            for name in (found.target, *(f"{found.target}.{name}" for name in found.names))
            if within(name, ("jax.experimental",)) and not found.lazy
        ]
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
