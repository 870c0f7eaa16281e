"""Bindings: what is known about the objects of a call, so that the next call with them does no walking.

A binding keeps the list of cells to hand to the program, and what proves cheaply that nothing has changed: one number for
all attributes (`cells.structure`), the elements of plain containers, the names that the function uses. A flag that is put back
brings the number back, and with it the binding of that time. A binding refers to modules weakly.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from operator import is_
from typing import Any

from mutatis import _compat, contexts, transactions
from mutatis.captures import Captures, search
from mutatis.cells import Group, structure
from mutatis.containers import Contents
from mutatis.lifting import Packed, Scope, argument_names, fill, named_nodes
from mutatis.modules import Module
from mutatis.programs import Program, Record, Variant
from mutatis.variables import Variable


class Layout:
    """How the arguments of a call are divided among nodes and JAX's positional arguments."""

    __slots__ = ("mixed", "names", "positions", "statics")

    def __init__(self, positions: list[Any], mixed: dict[Any, Any], statics: set[Any]) -> None:
        self.positions = tuple(positions)  # of JAX's arguments: a number or a keyword
        self.mixed = mixed  # positions of containers that hold nodes, with their structure
        self.statics = statics

    def rebuild(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], flat: Sequence[Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """The arguments of a call with JAX's values in the place of its leaves."""
        new_args, new_kwargs = list(args), dict(kwargs)
        for position, value in zip(self.positions, flat, strict=True):
            target: Any = new_args if isinstance(position, int) else new_kwargs
            if position in self.mixed:
                value = fill(self.mixed[position], value, Packed(target[position]).nodes)
            target[position] = value
        return new_args, new_kwargs


class Split:
    """A binding's cells divided for one variant of its program.

    Args:
      cells: the binding's cells.
      variant: the variant.
      number: the number of the record.
      record: the record: what the call does besides writing values, and what it returns.
    """

    __slots__ = ("donating_at", "first", "group", "number", "observed", "restructures", "treedef", "variant", "written")

    def __init__(self, cells: list[Variable], variant: Variant, number: int, record: Record) -> None:
        self.variant = variant
        self.restructures = not record.plain
        # Of the result, if that is all which is to be done after a call.
        self.treedef: Any = record.structure[0] if record.plain and record.out.plain else None
        self.number = number
        self.first = None if number in variant.called else number  # JAX makes the first call of a program in Python
        self.written = [cells[i] for i in variant.written]
        observers = transactions.observers
        self.observed = [cell for cell in self.written if cell in observers] if observers else []
        if self.observed:
            self.treedef = None
        taken = set(variant.written)
        self.group = Group(self.written, [cell for i, cell in enumerate(cells) if i not in taken])
        self.donating_at = [i if i in variant.donated else None for i in variant.written]


class Bindings:
    """The bindings for given objects: the one in use first, then others over the same cells, whose flags may come back."""

    __slots__ = ("__weakref__", "_all", "first")

    def __init__(self) -> None:
        self._all: list[Binding] = []
        self.first: Binding

    def put_first(self, binding: Binding) -> None:
        """Use this one from now on."""
        others = [other for other in self._all if other is not binding and other.is_over(binding.cells)]
        self.first, self._all = binding, [binding, *others][:_REMEMBERED]

    def find(self) -> Binding | None:
        """One that holds, which is then in use."""
        binding = next((binding for binding in self._all if binding.holds()), None)
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
        "contents",
        "epoch",
        "extras",
        "label",
        "layout",
        "objects",
        "program",
        "references",
        "specs",
        "split",
        "structural",
    )

    def __init__(self, label: str, layout: Layout, extras: list[Variable]) -> None:
        self.label = label
        self.layout = layout
        self.extras = extras  # states that only tracing found
        self.epoch = structure.epoch  # from before the walk: what changes meanwhile is looked at again
        self.ambient = contexts.cells()
        self.cells: list[Variable]
        self.specs: Hashable  # what the walk found
        self.captures: Captures
        self.contents: Contents
        self.program: Program
        self.structural: Hashable  # the key of the program, but for what the function captured
        self.objects: list[Any] = []
        self.references: list[Any] = []
        self.split: Split | None = None  # how to call; None before the first call

    def make_scope(self, nodes: list[tuple[str, Any]], captures: Captures) -> Scope:
        """Walk over arguments and captures."""
        extras = [("captured", cell) for cell in self.extras]
        return Scope([*nodes, *captures.roots, *extras], watch=True)

    def settle(self, scope: Scope, captures: Captures) -> None:
        """Keep of a walk what the calls need."""
        self.cells = scope.cells
        self.specs = (scope.specs, scope.tail)
        self.captures = captures
        self.contents = Contents(scope.containers, [scope.encoder.held[id(obj)] for obj in scope.containers])
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
        return len(self.cells) == len(cells) and all(map(is_, self.cells, cells))

    def invalidate(self) -> None:
        """Have it hold no more."""
        self.epoch = -1

    def holds(self) -> bool:
        """Whether nothing about the objects has changed."""
        return (
            self.epoch == structure.epoch
            and self.contents.unchanged()
            and self.captures.unchanged()
            and self.ambient == contexts.cells()
        )


class Request:
    """One call of a program, for the case that it has to be traced."""

    __slots__ = (
        "args",
        "binding",
        "compilation",
        "fast",
        "found",
        "function",
        "functions",
        "key",
        "kwargs",
        "outer",
        "program",
        "seconds",
        "stale",
        "traced",
        "walked",
    )

    def __init__(
        self,
        function: Callable[..., Any],
        functions: tuple[Any, ...],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        key: tuple[Hashable, ...],
    ) -> None:
        self.function = function
        self.key = key  # of its objects
        self.functions = functions  # those whose captures count
        self.args = args
        self.kwargs = kwargs
        self.fast = False  # whether the call holds a lease and should not trace
        self.stale = 0  # how often its trace found something changed
        self.traced = False  # whether the function was run
        self.found: Scope | None = None  # what the walk for its binding found, if there was one
        self.walked: Scope | None = None  # what could be reached when it was run
        self.compilation: Any = None  # the entry of the log, if it compiles
        self.seconds: list[float] = []  # what tracing and compiling took
        self.outer = _compat.current_trace()
        self.binding: Binding
        self.program: Program

    def bind(self, binding: Binding) -> None:
        """Say which binding and program the call goes to."""
        self.binding = binding
        self.program = binding.program

    @property
    def label(self) -> str:
        """What the call is, for messages."""
        return self.binding.label

    def run(self, leaves: Sequence[Any]) -> Any:
        """Run the user's function with JAX's values in the place of the arguments' leaves."""
        args, kwargs = self.binding.layout.rebuild(self.args, self.kwargs, leaves)
        return self.function(*args, **kwargs)

    def nodes(self, layout: Layout) -> list[tuple[str, Any]]:
        """The nodes among the arguments, with the names they go by."""
        named = self.functions[0] if len(self.functions) == 1 else self.function
        names = argument_names(named, self.args, self.kwargs)
        entries = zip(names, [*self.args, *self.kwargs.values()], [*range(len(self.args)), *self.kwargs], strict=True)
        dynamic = [(name, value) for name, value, position in entries if position not in layout.statics]
        return named_nodes([name for name, _ in dynamic], [value for _, value in dynamic])

    def scope(self) -> Scope:
        """A walk over everything that the call can reach, in the order of the binding's cells."""
        if self.found is not None and self.binding.holds():
            return self.found
        captures = search(*self.functions, ignored=self.binding.captures.ignored)
        return self.binding.make_scope(self.nodes(self.binding.layout), captures)

    def bound_to(self, scope: Scope) -> bool:
        """Whether a walk finds what the program was chosen for: another thread may have changed it."""
        return self.binding.is_over(scope.cells) and (scope.specs, scope.tail) == self.binding.specs
