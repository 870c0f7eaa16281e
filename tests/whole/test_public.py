"""The public surface: each name, each signature, as tests/whole/public.txt lists them.

A change of the surface thus shows in review. After one that is meant: `python tests/whole/test_public.py --write`.
Annotations are left out: the type checker holds those.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import inspect
import pickle
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mutatis.model.elsewhere import Elsewhere

LISTING = Path(__file__).with_name("public.txt")

# The root, and the modules that users import by name. One that does not exist yet is left out.
PUBLIC_MODULES = (
    "mutatis",
    "mutatis.errors",
    "mutatis.nn",
    "mutatis.metrics",
    "mutatis.functional",
    "mutatis.effects",
    "mutatis.checkpoint",
    "mutatis.inspect",
)

# What `import mutatis` may not load: it is loaded when it is used.
LAZY = ("optax", "orbax", "rich", "treescope", "safetensors", "matplotlib", "flax", "sklearn", "mlxtend")


def public_modules() -> list[types.ModuleType]:
    return [importlib.import_module(name) for name in PUBLIC_MODULES if importlib.util.find_spec(name)]


def public_names(module: types.ModuleType) -> list[str]:
    """`__all__` and what a star leaves out; without these, what the module (or the package) defines itself."""
    if hasattr(module, "__all__"):
        return sorted([*module.__all__, *getattr(module, "_NOT_BY_STAR", ())])
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and str(getattr(value, "__module__", "")).startswith(module.__name__)
    )


def public_objects() -> dict[str, Any]:
    return {
        f"{module.__name__}.{name}": getattr(module, name)
        for module in public_modules()
        for name in public_names(module)
    }


def show_default(value: Any) -> str:
    if inspect.isclass(value) or inspect.isroutine(value):
        return value.__qualname__
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


class _Shown:
    """Stands in for a default, so that `str(signature)` does not depend on addresses or versions."""

    def __init__(self, value: Any):
        self.text = show_default(value)

    def __repr__(self) -> str:
        return self.text


def show_signature(value: Any) -> str:
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return "(...)"
    empty = inspect.Parameter.empty
    parameters = [
        p.replace(annotation=empty, default=empty if p.default is empty else _Shown(p.default))
        for p in signature.parameters.values()
    ]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


def show_members(cls: type) -> Iterator[str]:
    """The public methods and properties that a class defines itself."""
    for name, value in sorted(vars(cls).items()):
        if name.startswith("_") or isinstance(value, Elsewhere):  # it raises: the class does not have it
            continue
        if isinstance(value, staticmethod | classmethod):
            yield f"    {type(value).__name__} {name}{show_signature(getattr(cls, name))}"
        elif inspect.isfunction(value):
            yield f"    def {name}{show_signature(value)}"
        elif isinstance(value, property):
            yield f"    property {name}"
        elif not inspect.isdatadescriptor(value):
            yield f"    {name} = {show_default(value)}"


def show_object(name: str, value: Any) -> Iterator[str]:
    if inspect.ismodule(value):
        yield f"module {name}"
    elif inspect.isclass(value):
        bases = ", ".join(base.__qualname__ for base in value.__bases__ if base is not object)
        yield f"class {name}{show_signature(value)}" + (f" <- {bases}" if bases else "")
        yield from show_members(value)
    elif callable(value):
        yield f"def {name}{show_signature(value)}"
    else:
        yield f"{name}: {type(value).__qualname__}"


def listing() -> str:
    lines: list[str] = []
    first: dict[int, str] = {}  # an object that is public twice is shown once
    for name, value in public_objects().items():
        known = first.setdefault(id(value), name)
        lines.extend(show_object(name, value) if known == name else [f"{name} is {known}"])
    return "".join(f"{line}\n" for line in lines)


def test_surface_is_as_listed() -> None:
    listed = LISTING.read_text(encoding="utf-8") if LISTING.exists() else ""
    now = listing()
    gone = [f"- {line}" for line in listed.splitlines() if line not in now.splitlines()]
    new = [f"+ {line}" for line in now.splitlines() if line not in listed.splitlines()]
    if now != listed:
        changes = "\n".join((*gone, *new)) or "(another order)"
        pytest.fail(
            f"the public surface is not as listed:\n{changes}\n"
            "If that is meant: python tests/whole/test_public.py --write, and a line in CHANGELOG.md",
            pytrace=False,
        )


def test_names_are_unique() -> None:
    for module in public_modules():
        names = list(getattr(module, "__all__", ()))
        assert len(names) == len(set(names)), module.__name__


@pytest.mark.parametrize("module", public_modules(), ids=lambda module: module.__name__)
def test_a_star_hides_no_builtin(module: types.ModuleType) -> None:
    found: dict[str, Any] = {}
    exec(f"from {module.__name__} import *", found)
    assert {name for name in found if name in dir(builtins) and name != "__builtins__"} == set()
    assert set(getattr(module, "__all__", ())) <= found.keys()


def test_names_that_a_star_leaves_out_are_those_of_builtins() -> None:
    left_out = importlib.import_module("mutatis")._NOT_BY_STAR
    assert set(left_out) <= set(dir(builtins)) and set(left_out) <= set(dir(importlib.import_module("mutatis")))


def test_public_objects_pickle() -> None:
    """Classes and functions pickle by reference: module and qualname lead back to the very object."""
    problems = []
    for name, value in public_objects().items():
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        try:
            back = pickle.loads(pickle.dumps(value))
        except Exception as error:
            problems.append(f"{name}: {error}")
        else:
            if back is not value:
                problems.append(f"{name}: comes back as {back!r}")
            elif not value.__module__.startswith("mutatis"):
                problems.append(f"{name}: says that it comes from {value.__module__}")
    assert not problems, "\n".join(problems)


def test_importing_the_root_is_cheap() -> None:
    code = "import sys, mutatis; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "mutatis" in loaded
    assert loaded.isdisjoint(LAZY), f"`import mutatis` loads {sorted(loaded & set(LAZY))}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        LISTING.write_text(listing(), encoding="utf-8")
    else:
        print(listing(), end="")
