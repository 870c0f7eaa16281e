"""Code: what the code of a Python function names, and whether it is the user's or a library's.

Names are read off the bytecode: the globals and attributes that are loaded, strings that may be names of attributes
(``getattr(config, "lr")``), and whether names are computed while it runs, so that nobody can say which it uses.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import os
import sysconfig
import types
from collections.abc import Iterable, Iterator
from typing import Any

_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
_OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep
_GLOBAL = frozenset({"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS", "LOAD_FROM_DICT_OR_DEREF"})
_ATTRIBUTE = frozenset({"LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "IMPORT_FROM"})
_WHOLE = frozenset({"vars", "dir", "asdict", "astuple", "fields", "getmembers", "dumps"})
_WHOLE_ATTRIBUTES = frozenset({*_WHOLE, "__dict__", "__getstate__", "__reduce__", "__reduce_ex__"}) - {"dir", "vars"}
_HIDDEN = frozenset({"eval", "exec", "globals", "locals", "compile", "__import__", "import_module"})
_PRINTS = frozenset({"repr", "str", "format", "print"})
_MISSES = frozenset({"hasattr", "getattr"})


@dataclasses.dataclass(frozen=True)
class Names:
    """What a function, and the functions that are defined in it, name.

    Attributes:
      globals: global names that are loaded, in order of first use.
      imports: modules that are imported while it runs.
      attributes: attribute names that are loaded or may be, likewise.
      whole: objects may be read as a whole, or by names that are computed.
      hidden: more is read than one can tell.
      compares: objects may be compared or hashed.
      prints: objects may be turned into text.
      misses: attributes may be looked for that are not there.
    """

    globals: tuple[str, ...]
    imports: tuple[str, ...]
    attributes: tuple[str, ...]
    whole: bool
    hidden: bool
    compares: bool
    prints: bool
    misses: bool


@functools.lru_cache(maxsize=4096)
def names_of(code: types.CodeType) -> Names:
    """What a function's code names."""
    names: dict[str, None] = {}
    imports: dict[str, None] = {}
    attributes: dict[str, None] = {}
    instructions = [i for i in dis.get_instructions(code) if i.opname not in ("PRECALL", "CACHE", "EXTENDED_ARG")]
    operations = {i.opname for i in instructions}
    compares = "CONTAINS_OP" in operations
    whole = "MATCH_CLASS" in operations
    for index, instruction in enumerate(instructions):
        name = instruction.argval
        if instruction.opname in _GLOBAL:
            names[name] = None
            if name in ("getattr", "hasattr"):
                whole = whole or not _name_is_constant(instructions, index)
        elif instruction.opname in _ATTRIBUTE:
            attributes[name] = None
        elif instruction.opname == "IMPORT_NAME":
            imports[name] = None
        elif instruction.opname == "COMPARE_OP":
            compares = compares or "==" in str(name) or "!=" in str(name)
    attributes.update(dict.fromkeys(_strings(code.co_consts)))
    inner = [names_of(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    for one in inner:
        names.update(dict.fromkeys(one.globals))
        imports.update(dict.fromkeys(one.imports))
        attributes.update(dict.fromkeys(one.attributes))
    return Names(
        globals=tuple(names),
        imports=tuple(imports),
        attributes=tuple(attributes),
        whole=whole
        or not (_WHOLE.isdisjoint(names) and _WHOLE_ATTRIBUTES.isdisjoint(attributes))
        or any(one.whole for one in inner),
        hidden=not (_HIDDEN.isdisjoint(names) and "import_module" not in attributes)
        or any(one.hidden for one in inner),
        compares=compares or "hash" in names or any(one.compares for one in inner),
        prints=not _PRINTS.isdisjoint(names)
        or any(name.startswith("FORMAT") for name in operations)
        or any(one.prints for one in inner),
        misses=not _MISSES.isdisjoint(names) or "PUSH_EXC_INFO" in operations or any(one.misses for one in inner),
    )


def _name_is_constant(instructions: list[dis.Instruction], start: int) -> bool:
    """Whether the `getattr` or `hasattr` that is loaded here is called with a string that stands in the code."""
    for index in range(start + 1, len(instructions)):
        if instructions[index].opname.startswith("CALL"):
            count = instructions[index].arg or 0
            name = instructions[index - count + 1] if count >= 2 else None
            return name is not None and name.opname == "LOAD_CONST" and isinstance(name.argval, str)
    return False


def _strings(constants: Iterable[Any]) -> Iterator[str]:
    """The strings among constants that may be names of attributes."""
    for constant in constants:
        if isinstance(constant, str):
            yield from identifiers(constant)
        elif isinstance(constant, tuple | frozenset):
            yield from _strings(constant)


def identifiers(text: str) -> list[str]:
    """The names in a string that may be one of an attribute, or a path of them: ``"lr"``, ``"optimizer.lr"``."""
    parts = text.split(".") if len(text) < 200 else []
    return parts if all(part.isidentifier() for part in parts) else []


def default_names(function: types.FunctionType) -> tuple[str, ...]:
    """The parameters that have a default."""
    code = function.__code__
    count = len(function.__defaults__ or ())
    return code.co_varnames[code.co_argcount - count : code.co_argcount]


def contents(cell: types.CellType, empty: Any = None) -> Any:
    """What a closure cell holds; `empty` if it is not bound yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return empty


@functools.lru_cache(maxsize=4096)
def is_library_file(filename: str) -> bool:
    """Whether a file belongs to Python, to an installed package, or to Mutatis."""
    return filename.startswith((*_LIBRARIES, _OURS)) or "/site-packages/" in filename
