"""Bindings: what is known about the objects of a call, so that the next call with them does no walking.

A binding keeps the list of cells to hand to the program, and what proves cheaply that nothing has changed: one number for
all attributes (`core.structure`), the elements of plain containers, the names that the function uses. A flag that is put back
brings the number back, and with it the binding of that time. A binding refers to modules weakly.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from operator import is_
from typing import Any

from mutatis.compilation.layout import Layout
from mutatis.compilation.plan import DispatchPlan
from mutatis.compilation.program import Program
from mutatis.core.containers import ContainerSnapshot
from mutatis.core.places import Place
from mutatis.core.structure import structure
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
        "cells",
        "containers",
        "epoch",
        "extras",
        "label",
        "layout",
        "objects",
        "places",
        "plan",
        "program",
        "references",
        "settings",
        "structural",
        "structure",
        "token",
    )

    def __init__(self, label: str, settings: Hashable, layout: Layout, extras: list[Variable]) -> None:
        self.label = label
        self.settings = settings  # those of JAX that its program is traced under
        self.layout = layout
        self.extras = extras  # states that only tracing found
        self.epoch = structure.epoch  # from before the walk: what changes meanwhile is looked at again
        self.ambient = contexts.cells()
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
        self.structure, self.places = scope.structure, scope.places
        self.captures = captures
        held = scope.encoder.held
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
        self.epoch = -1

    def holds(self) -> bool:
        """Whether nothing about the objects has changed."""
        return (
            self.epoch == structure.epoch
            and self.containers.unchanged()
            and self.captures.unchanged()
            and same_objects(self.ambient, contexts.cells())
        )


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
