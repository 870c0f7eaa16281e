"""What mkdocstrings has to be told of this package: its section `Example:`, and where names are that are imported late."""

from __future__ import annotations

import re
from typing import Any

import griffe
import navigation


class Docstrings(griffe.Extension):
    """Reads docstrings as they are written here, and finds every public name."""

    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Give sections the titles that the parser knows."""
        if obj.docstring is not None:
            text = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
            text = re.sub(r"^( +\w+(?:, \w+)*,)\n +(?=\w+[,:])", r"\1 ", text, flags=re.MULTILINE)  # names on two lines
            obj.docstring.value = text

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Let each public name lead to what it stands for: also one that is imported at its first use."""
        if pkg.name != "mutatis":
            return
        for module in navigation.MODULES:
            folder = pkg[module.partition(".")[2]] if "." in module else pkg
            for name in navigation.names_of(module):
                home = _home(folder, name)
                if home is not None:
                    _hide(folder, name, home)
        known = {_target(pkg, name).path for name in navigation.public_names()}
        for name in navigation.public_names():
            cls = _target(pkg, name)
            if cls.is_class:
                cls.bases = [base for base in cls.bases if _is_told(base, known)]


def _target(pkg: griffe.Module, name: str) -> Any:
    found = pkg[name.removeprefix("mutatis.")]
    return found.final_target if found.is_alias else found


def _is_told(base: str | griffe.Expr, known: set[str]) -> bool:
    """Whether a base class is for users: one of theirs, or one of Python's that is more than a means."""
    path = base if isinstance(base, str) else base.canonical_path
    return path in known if path.startswith("mutatis.") else not path.startswith(("typing.", "abc."))


def _home(folder: griffe.Module, name: str) -> griffe.Object | griffe.Alias | None:
    """What a public name stands for, if the module itself does not say so, or says it ambiguously."""
    there = folder.members.get(name)
    if isinstance(there, griffe.Module):  # perhaps a file that has the name of what is in it
        return there.members.get(name) if folder.imports.get(name) == f"{there.path}.{name}" else None
    if there is not None:
        return None
    found = (module.members.get(name) for module in folder.modules.values() if not module.is_alias)
    return next((inner for inner in found if inner is not None and not inner.is_alias), None)


def _hide(folder: griffe.Module, name: str, home: griffe.Object | griffe.Alias) -> None:
    """Let a public name stand for an object; what else leads through a module of that name leads there at once."""
    file = folder.members.get(name)
    if isinstance(file, griffe.Module):
        for other, alias in [*folder.members.items()]:
            if isinstance(alias, griffe.Alias) and alias.target_path.startswith(f"{file.path}."):
                inner = file[alias.target_path.removeprefix(f"{file.path}.")]
                folder.members[other] = griffe.Alias(other, inner, parent=folder)
    folder.members[name] = griffe.Alias(name, home, parent=folder)
