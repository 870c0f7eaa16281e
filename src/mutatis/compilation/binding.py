"""Bindings: what is known about the objects of a call, so that the next call with them does no walking.

A binding keeps the list of cells to hand to the program, and what proves cheaply that nothing has changed: one number for
all attributes (`core.structure`), the elements of plain containers, the names that the function uses. A flag that is put back
brings the number back, and with it the binding of that time. If the number is another one because of something else, the numbers
of the binding's own modules and cells say so, or what those modules hold. A binding refers to modules weakly.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Hashable, Sequence
from operator import is_
from typing import Any

from mutatis.compilation.layout import Layout
from mutatis.compilation.plan import DispatchPlan
from mutatis.compilation.program import Program
from mutatis.core.containers import ContainerSnapshot
from mutatis.core.nodes import Node, Reference, holds_nodes
from mutatis.core.places import Place
from mutatis.core.structure import Watch, epoch_of, structure
from mutatis.model import contexts
from mutatis.model.modules import Module
from mutatis.model.variables import Variable
from mutatis.tracing.captures import Captures, search
from mutatis.tracing.scope import Scope


def same_objects(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two sequences hold the very same objects; the `==` of states compares values."""
    return len(a) == len(b) and all(map(is_, a, b))


class Bindings:
    """The bindings for given objects: the one in use first, then others over the same cells.

    Those are for flags of the objects, or settings of JAX, that may come back.
    """

    __slots__ = ("__weakref__", "_all", "first", "several")

    def __init__(self) -> None:
        self._all: list[Binding] = []
        self.first: Binding
        self.several = False  # whether they are for several settings

    def put_first(self, binding: Binding) -> None:
        """Use this one from now on."""
        others = [other for other in self._all if other is not binding and other.is_over(binding.cells)]
        self.first, self._all = binding, [binding, *others][:_REMEMBERED]
        self.several = any(other.settings != binding.settings for other in others)

    def latest(self) -> Binding:
        """The one in use; or one whose epoch has come back, say because a flag has: that is seen before anything is compared."""
        first = self.first
        if first.epoch != structure.epoch and len(self._all) > 1:
            for other in self._all:
                if other.epoch == structure.epoch and other.settings == first.settings:
                    self.put_first(other)
                    return other
        return first

    def find(self, settings: Hashable) -> Binding | None:
        """One that holds under these settings, which is then in use."""
        binding = next((one for one in self._all if one.settings == settings and one.holds()), None)
        if binding is not None:
            self.put_first(binding)
        return binding


_REMEMBERED = 4  # bindings for the same objects


class Binding:
    """What is known about given objects: which cells to hand over, and what proves that this still holds.

    It refers to modules weakly, and is dropped when one of them dies.
    """

    __slots__ = (
        "__weakref__",
        "ambient",
        "captures",
        "cell_epochs",
        "cells",
        "containers",
        "epoch",
        "extras",
        "label",
        "layout",
        "modules",
        "objects",
        "places",
        "plan",
        "program",
        "references",
        "settings",
        "structural",
        "structure",
        "token",
        "unspecific",
        "watch_epochs",
        "watches",
    )

    def __init__(self, label: str, settings: Hashable, layout: Layout, extras: list[Variable]) -> None:
        self.label = label
        self.settings = settings  # those of JAX that its program is traced under
        self.layout = layout
        self.extras = extras  # states that only tracing found
        self.epoch = structure.epoch  # from before the walk: what changes meanwhile is looked at again
        self.unspecific = structure.unspecific
        self.cell_epochs: list[int]
        self.watches: list[Watch]  # of the modules, with their epochs and what they held
        self.watch_epochs: list[int]
        self.modules: list[tuple[weakref.ref[Module], _Attributes]]
        # The arrays that contexts are set to: which cell holds each, and the context's number. Each `set` makes another cell.
        self.ambient: list[tuple[int, int]] = []
        self.cells: list[Variable]
        self.structure: Hashable  # what the walk found
        self.places: list[Place]  # where the function may put states, besides
        self.captures: Captures
        self.containers: ContainerSnapshot
        self.program: Program
        self.structural: tuple[
            Hashable, ...
        ]  # the key of the program, settings first, but for what the function captured
        self.token: tuple[Hashable, ...]  # what it captured
        self.objects: list[Any] = []
        self.references: list[Any] = []
        self.plan: DispatchPlan | None = None  # how to call; None before the first call

    def keep_walk(self, scope: Scope, captures: Captures) -> None:
        """Keep of a walk what the calls need."""
        self.cells = scope.cells
        by_cell = {cell: number for number, cell in enumerate(contexts.cells())}
        self.ambient = [(index, by_cell[cell]) for index, cell in enumerate(self.cells) if cell in by_cell]  # type: ignore[index]
        self.structure, self.places = scope.structure, scope.places
        self.captures = captures
        held = scope.encoder.held
        self.cell_epochs = scope.encoder.cell_epochs
        self.watches = [watch for watch, _, _ in scope.encoder.watched]
        self.watch_epochs = [epoch for _, _, epoch in scope.encoder.watched]
        self.modules = [
            (weakref.ref(module), _Attributes(type(module), held[id(module)])) for module in scope.encoder.modules()
        ]
        by_hand = scope.encoder.cached  # nothing tells when something is put there by hand again
        self.containers = ContainerSnapshot(
            [*scope.containers, *(module.__dict__ for module in by_hand)],
            [held[id(obj)] for obj in (*scope.containers, *by_hand)],
        )
        for obj in scope.encoder.objects:
            if isinstance(obj, Module):
                self.objects.append(weakref.ref(obj))
            else:
                self.objects.append(obj)

    def live_objects(self) -> list[Any]:
        """The modules, lists and dicts, by number."""
        return [obj() if isinstance(obj, weakref.ref) else obj for obj in self.objects]

    def is_over(self, cells: list[Variable]) -> bool:
        """Whether these are its cells."""
        return same_objects(self.cells, cells)

    def invalidate(self) -> None:
        """Have it hold no more."""
        self.epoch = _INVALID

    def holds(self) -> bool:
        """Whether nothing about the objects has changed."""
        return (
            (self.epoch == structure.epoch or self._is_about_others())
            and self.containers.unchanged()
            and self.captures.unchanged()
        )

    def current_cells(self) -> list[Variable]:
        """Its cells, with those of the contexts that are set now."""
        if not self.ambient:
            return self.cells
        cells, now = list(self.cells), contexts.cells()
        for index, number in self.ambient:
            cells[index] = now[number]
        return cells

    def _is_about_others(self) -> bool:
        """Whether it is not about these modules and cells that another epoch has begun; which is noted then."""
        epoch = structure.epoch  # first: what changes from now on is looked at again
        if self.unspecific != structure.unspecific or list(map(epoch_of, self.cells)) != self.cell_epochs:
            return False
        now = list(map(epoch_of, self.watches))
        if now != self.watch_epochs:
            for before, number, (module, attributes) in zip(self.watch_epochs, now, self.modules, strict=True):
                if before != number and not attributes.are_of(module()):
                    return False
            self.watch_epochs = now
        if self.epoch == _INVALID:
            return False
        self.epoch = epoch
        return True


_INVALID = -1  # an epoch that never is


class _Attributes:
    """What a module of a class held, compared by identity. It refers to nodes weakly; what it cannot is never found the same."""

    __slots__ = ("_kind", "_names", "_values")

    def __init__(self, kind: type, held: dict[str, Any]) -> None:
        self._kind = kind
        self._names = list(held)
        self._values = [_weakly(value) for value in held.values()]

    def are_of(self, module: Module | None) -> bool:
        """Whether the module holds the very same, in the same order."""
        if module is None or type(module) is not self._kind:
            return False
        now = dict(module.__dict__)  # another thread may set an attribute meanwhile
        then = [value() if type(value) is weakref.ref else value for value in self._values]
        return list(now) == self._names and all(map(is_, now.values(), then))


def _weakly(value: Any) -> Any:
    if isinstance(value, Variable) or type(value) in (list, dict):  # those are held in any case
        return value
    if isinstance(value, Node):
        return weakref.ref(value)
    # The rest is static, and in the key of the program already.
    return object() if isinstance(value, Reference | types.MethodType) or holds_nodes(value) else value


def survey(
    functions: Sequence[Any],
    nodes: Sequence[tuple[str, Any]] = (),
    extras: Sequence[Variable] = (),
    scope: Scope | None = None,
) -> tuple[Captures, Scope]:
    """Find all that a call depends on: what its functions name, and what arguments and names lead to.

    The methods of the models that are found count as named too, and may lead to further ones.

    Args:
      functions: what is searched.
      nodes: those among the arguments, with their names.
      extras: states that only tracing found.
      scope: the walk over all this, if it was made before.
    """
    captures = search(*functions)
    found = scope
    while True:
        if found is None:
            found = Scope([*nodes, *captures.roots, *(("captured", cell) for cell in extras)], watch=True)
        if not captures.look_into_modules(found.encoder):
            if scope is None:
                found.set_places(captures.find_places())
            captures.complete()
            return captures, found
        found = scope
