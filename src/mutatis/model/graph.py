"""The graph of a model: walking it, and its static description.

`Encoder` walks over modules, containers and cells and writes down everything but the values, as nested tuples; `decode`
builds it again around given cells. That one description serves as the `GraphDef` of `split` and `merge`, the structure
of a module as a pytree, the key under which compiled programs are kept, and the note of what a traced function built.

Modules, lists and dicts are numbered at their first visit, and so are cells; a later visit is a reference to the
number. So sharing and cycles are part of the description. Attributes are visited in the order of their names, the entries
of a dict in their own order, which a program may depend on.

A specification is a tuple that starts with a letter::

    ("m", class, attributes, order)     a module            ("v", number, cell spec)   a cell, first visit
    ("l" | "d", items)                  a list, a dict      ("c", number)              a cell, later visit
    ("t", class, items)                 a tuple             ("r", number)              a numbered object, later visit
    ("w", static, child, parts)         a transformed node  ("b", static, child)       a method bound to a node
    ("s", static)                       a static value      ("f", child)               a reference
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

from mutatis.core.avals import is_concrete
from mutatis.core.journal import Journal
from mutatis.core.naming import show_path
from mutatis.core.nodes import LOST, Reference, is_node
from mutatis.core.showing import show_class
from mutatis.core.statics import PLAIN, Static
from mutatis.core.structure import Watch
from mutatis.errors import StructureError
from mutatis.model.byhand import put_by_hand
from mutatis.model.filters import Path
from mutatis.model.modules import Module, fill, new_module, watch_of
from mutatis.model.variables import Variable, detached, lanes_of
from mutatis.model.wrapped import Wrapped, borrows

Spec: TypeAlias = tuple[Any, ...]


Parts: TypeAlias = tuple[Spec, tuple[Spec, ...], tuple[Path, ...], tuple[Spec, ...]]  # of a `GraphDef`


class Encoder:
    """A walk over a graph that numbers what it meets and describes it.

    Args:
      thread: whether what a module merely refers to (an optimizer: its model) is walked over too. It is for
        transforms, which have to thread it, and not for `mu.state`.
      watch: whether later changes of these modules are counted (`cells.structure`); from before each is looked at, so
        that none is missed. Other threads may change attributes meanwhile, so a walk goes over copies.
      describe: whether static values are described; without it, a walk only finds cells and objects, and is faster.
      marks: whether it is described which cells are frozen.
      loose: whether containers outside of modules may hold anything: what is no node there is a static value. It is for what
        functions name, such as ``args = (model, x)``.
    """

    def __init__(
        self,
        *,
        thread: bool = False,
        watch: bool = False,
        describe: bool = True,
        marks: bool = True,
        loose: bool = False,
    ) -> None:
        self.thread = thread
        self.loose = loose
        self.describe = describe
        self.marks = marks
        self.watch = watch
        self.cells: dict[Variable, int] = {}
        self.paths: list[Path] = []
        self.watched: list[tuple[Watch, int, int]] = []  # of each module, with its disturbances and epoch
        self.cell_epochs: list[int] = []  # of the cells, by number
        self.objects: list[Any] = []  # modules, lists and dicts, by number
        self.object_paths: list[Path] = []
        self.outside: set[int] = set()  # the numbers of containers that were met outside of modules, if that is loose
        self.held: dict[int, Any] = {}  # what modules, containers and the like held when they were looked at, by `id`
        self.specs: list[Spec] = []  # of the cells, by number
        self._numbers: dict[int, int] = {}
        self._statics: dict[int, Spec] = {}  # of static values by identity; a specification keeps its value alive
        self._later: list[tuple[int, str, Reference, Path]] = []
        self.cached: list[Module] = []  # modules with arrays that were put into the instance dictionary by hand
        self.ephemeral = False  # a tracer is among those: what is made from this walk must not be kept

    def know(self, other: Encoder) -> None:
        """Start from what another walk has numbered."""
        self.cells = dict(other.cells)
        self.cell_epochs = list(other.cell_epochs)
        self.paths = list(other.paths)
        self.objects = list(other.objects)
        self.object_paths = list(other.object_paths)
        self._numbers = dict(other._numbers)

    def encode(self, value: Any, path: Path = ()) -> Spec:
        """The specification of a value."""
        kind = type(value)
        if kind in PLAIN:
            return self._static(value)
        if isinstance(value, Variable):
            return self._cell(value, path)
        if isinstance(value, Module):
            return self._module(value, path)
        if isinstance(value, Wrapped):
            self.held[id(value)] = value
            child = self.encode(value.__wrapped__, path)
            parts = tuple((name, self.encode(part, (*path, name))) for name, part in value.parts.items())
            return ("w", self._static(value.remake)[1], child, parts)
        if isinstance(value, types.MethodType) and borrows(value):
            self.held[id(value)] = value
            return ("b", self._static(value.__func__)[1], self.encode(value.__self__, path))
        if kind is list or kind is dict:
            number = self._numbers.get(id(value))
            if number is not None:
                return ("r", number)
            number = self._number(value, path)
            if self.loose:
                self.outside.add(number)
            held = self.held[id(value)] = value.copy()
            return ("l", self._items(held, path)) if kind is list else ("d", self._entries(held, path))
        if isinstance(value, tuple):
            self.held[id(value)] = value
            return ("t", kind, self._items(value, path))
        if self.loose and not isinstance(value, jax.core.Tracer):
            return self._static(value)
        if isinstance(value, jax.Array | np.ndarray):
            raise _bare_array(value, path)
        if kind is Reference:
            return self._reference(value, path)
        if isinstance(value, list | dict):
            raise StructureError(
                f"`{show_path(path)}` is a {kind.__name__}, whose states would not be seen",
                path=show_path(path),
                expected="a plain list, tuple or dict",
                got=kind.__name__,
                cure="Use the plain container, or `mu.static(...)` for one without states.",
            )
        return self._static(value)

    def _static(self, value: Any) -> Spec:
        if not self.describe:
            return _NOTHING
        spec = self._statics.get(id(value))
        if spec is None:
            spec = self._statics[id(value)] = ("s", Static(value))
        return spec

    def encode_references(self) -> tuple[Spec, ...]:
        """Describe what modules refer to without owning it; the last step of a walk."""
        tail = []
        while self._later:
            owner, name, reference, path = self._later.pop()
            tail.append((owner, name, self._reference(reference, path)))
        return tuple(tail)

    def _reference(self, reference: Reference, path: Path) -> Spec:
        self.held[id(reference)] = reference
        if reference.lost or not (self.thread or self._is_known(reference.value)):
            return _LOST
        return ("f", self.encode(reference.value, path))

    def _is_known(self, value: Any) -> bool:
        """Whether all the cells that a value leads to have been met."""
        if id(value) in self._numbers or (isinstance(value, Variable) and value in self.cells):
            return True
        probe = Encoder(describe=False)
        probe.know(self)
        probe.encode(value)
        return len(probe.cells) == len(self.cells)

    def known(self, obj: Any) -> int | None:
        """The number of a module, list or dict that was met."""
        return self._numbers.get(id(obj))

    def modules(self) -> list[Module]:
        """The modules that were met."""
        return [obj for obj in self.objects if isinstance(obj, Module)]

    def disturbed(self) -> bool:
        """Whether another thread has changed the structure of a watched module since the walk, while a lock was held."""
        return any(mark.disturbances != number for mark, number, _ in self.watched)

    def _number(self, obj: Any, path: Path) -> int:
        number = len(self.objects)
        self.objects.append(obj)
        self.object_paths.append(path)
        self._numbers[id(obj)] = number
        return number

    def _module(self, module: Module, path: Path) -> Spec:
        number = self._numbers.get(id(module))
        if number is not None:
            return ("r", number)
        number = self._number(module, path)
        if self.watch:
            mark = watch_of(module)
            self.watched.append((mark, mark.disturbances, mark._epoch))
        attributes = self.held[id(module)] = dict(module.__dict__)
        outside, self.loose = self.loose, False
        entries = []
        references = []
        borrowing = []
        for name in sorted(attributes):
            value = attributes[name]
            if type(value) in PLAIN:
                entries.append((name, self._static(value)))
            elif isinstance(value, Variable):
                entries.append((name, self._cell(value, (*path, name))))
            elif type(value) is Reference:
                references.append(name)
                self._later.append((number, name, value, (*path, name)))
            elif put_by_hand(value):
                entries.append((name, self._by_hand(module, name, value, path)))
            elif borrows(value):
                borrowing.append((name, value))
            else:
                entries.append((name, self.encode(value, (*path, name))))
        # What only borrows a node comes last, so that the node's path is where it belongs.
        entries += [(name, self.encode(value, (*path, name))) for name, value in borrowing]
        self.loose = outside
        return ("m", type(module), tuple(entries), tuple(name for name in attributes if name not in references))

    def _by_hand(self, module: Module, name: str, value: Any, path: Path) -> Spec:
        """Arrays that were put into the instance dictionary by hand: constants, as those that a function captures are."""
        if name in getattr(type(module), "__dataclass_fields__", ()):
            raise _bare_array(value, (*path, name))  # of a frozen dataclass, which assigns past the module
        if not self.cached or self.cached[-1] is not module:
            self.cached.append(module)
        self.ephemeral = self.ephemeral or not is_concrete(value)
        return self._static(value)

    def _cell(self, cell: Variable, path: Path) -> Spec:
        number = self.cells.get(cell)
        if number is not None:
            return ("c", number)
        number = len(self.cells)
        self.cells[cell] = number
        self.cell_epochs.append(cell._epoch)
        self.paths.append(path)
        if not self.describe:
            return ("v", number, None)
        self.specs.append(cell_spec(cell, self._static, self.marks))
        return ("v", number, self.specs[-1])

    def statics(self) -> list[Spec]:
        """The specifications of the static values, each once."""
        return list(self._statics.values())

    def encode_contents(self, container: Any, path: Path = (), *, loose: bool = False) -> Spec:
        """The specifications of what a list or dict at a path holds, whether it was met before or not."""
        self.loose = loose
        spec = self._entries(container, path) if isinstance(container, dict) else self._items(container, path)
        self.loose = False
        return spec

    def _items(self, items: Sequence[Any], path: Path) -> Spec:
        return tuple(self.encode(item, (*path, index)) for index, item in enumerate(items))

    def _entries(self, items: dict[Any, Any], path: Path) -> Spec:
        return tuple((self._static(key)[1], self.encode(item, (*path, key))) for key, item in items.items())


_NOTHING: Spec = ("s", None)  # a static value that is not described
_LOST: Spec = ("f", ("s", Static(LOST)))


def _bare_array(value: Any, path: Path) -> StructureError:
    place = show_path(path)
    return StructureError(
        f"`{place}` is one of the bare arrays in a container, which are no states",
        path=place,
        expected="Variables, Modules, static values, or containers of these",
        got=show_class(value),
        cure="Say what kind of state it is: put `mu.Variable(x)` (or `mu.Param(x)`, ...) into the container.",
    )


def cell_spec(
    cell: Variable, describe: Callable[[Any], Spec] = lambda value: ("s", Static(value)), marks: bool = True
) -> Spec:
    """What of a cell is static; `describe` gives the specification of a static value."""
    return (
        type(cell),
        cell.name,
        None if cell.sharding is None else Static(cell.sharding),
        cell.fixed,
        cell._frozen if marks else None,
        cell._behind,
        None if cell._init is None else describe(cell._init)[1],
        Static(cell.metadata) if cell.metadata else None,
        *(
            (lanes,) if cell._lanes and (lanes := lanes_of(cell)) else ()
        ),  # definitions that were pickled earlier have none
    )


def make_cell(spec: Spec) -> Variable:
    """A cell without a value, from its specification."""
    kind, name, sharding, fixed, frozen, behind, init, metadata, *lanes = spec
    cell: Variable = detached(kind)
    cell.name, cell.fixed, cell._frozen, cell._behind = name, fixed, frozen, behind
    cell.sharding = None if sharding is None else sharding.value
    cell._init = None if init is None else init.value
    cell._lanes = lanes[0] if lanes else ()
    cell.metadata = {} if metadata is None else dict(metadata.value)
    return cell


def handed_out(nodes: Sequence[Any], journal: Journal) -> Encoder:
    """A walk over what a function returned, and over the modules that it assigned to attributes."""
    encoder = Encoder(thread=True, describe=False)
    assigned = [obj.__dict__.get(name) for obj, name, _ in journal.noted if isinstance(obj, Module)]
    for node in [*nodes, *filter(is_node, assigned)]:
        encoder.encode(node)
    encoder.encode_references()
    return encoder


class Decoder:
    """Builds objects from specifications.

    Args:
      cells: the cells by number; `None` where one has yet to be made.
      objects: what was numbered before, by number; what is built is appended.
      make: makes a cell from its specification.
    """

    def __init__(
        self,
        cells: list[Any],
        objects: list[Any] | None = None,
        make: Callable[[int, Spec], Any] | None = None,
    ) -> None:
        self.cells = cells
        self.objects = [] if objects is None else objects
        self.make = make

    def decode(self, spec: Spec) -> Any:
        """The value that a specification describes."""
        letter = spec[0]
        if letter == "s":
            return spec[1].value
        if letter == "v":
            number = spec[1]
            if self.make is not None and (number >= len(self.cells) or self.cells[number] is None):
                self.cells.extend([None] * (number + 1 - len(self.cells)))
                self.cells[number] = self.make(number, spec[2])
            return self.cells[number]
        if letter == "c":
            return self.cells[spec[1]]
        if letter == "r":
            return self.objects[spec[1]]
        if letter == "m":
            module = new_module(spec[1])
            self.objects.append(module)
            values = dict.fromkeys(
                spec[3]
            )  # in their own order; that of the visits, by which things are numbered, is another
            for name, inner in spec[2]:
                values[name] = inner[1].value if inner[0] == "s" else self.decode(inner)
            fill(module, values)
            return module
        if letter == "l":
            items: list[Any] = []
            self.objects.append(items)
            items.extend(self.decode(inner) for inner in spec[1])
            return items
        if letter == "d":
            entries: dict[Any, Any] = {}
            self.objects.append(entries)
            entries.update((key.value, self.decode(inner)) for key, inner in spec[1])
            return entries
        if letter == "t":
            parts = [self.decode(inner) for inner in spec[2]]
            return spec[1](*parts) if hasattr(spec[1], "_fields") else spec[1](parts)
        if letter == "f":
            return Reference(self.decode(spec[1]))
        if letter == "b":
            return types.MethodType(spec[1].value, self.decode(spec[2]))
        child = self.decode(spec[2])
        return spec[1].value(child, **{name: self.decode(part) for name, part in spec[3]})  # "w"

    def refer(self, tail: tuple[Spec, ...]) -> None:
        """Put in what modules refer to."""
        for owner, name, spec in tail:
            self.objects[owner].__dict__[name] = self.decode(spec)
