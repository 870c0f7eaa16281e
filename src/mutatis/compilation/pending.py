"""Pending calls: one call of a compiled function, with what is found out about it while it is made."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from mutatis import _compat
from mutatis.compilation.binding import Binding, survey
from mutatis.compilation.layout import Layout
from mutatis.compilation.program import Program
from mutatis.model.variables import Variable
from mutatis.tracing.arguments import FlatTree, argument_names, named_nodes
from mutatis.tracing.scope import Scope


class PendingCall:
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
        "may_start",
        "operands",
        "outer",
        "program",
        "seconds",
        "settings",
        "stale",
        "started",
        "traced",
        "users",
        "walked",
    )

    def __init__(
        self,
        function: Callable[..., Any],
        functions: tuple[Any, ...],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        key: tuple[Hashable, ...],
        operands: tuple[str, ...] = (),
        users: tuple[Any, ...] = (),
    ) -> None:
        self.function = function
        self.users = users  # the functions as the user gave them, if the program may be shared
        self.key = key  # of its objects
        self.functions = functions  # those whose captures count
        self.operands = operands  # of a loop or branch, which is called with them as one argument: their names
        self.args = args
        self.kwargs = kwargs
        self.may_start = False  # whether states with `init` may be given their first value before the call is traced
        self.started: list[Variable] = []  # those that were
        self.fast = False  # whether the call holds a lease and should not trace
        self.stale = 0  # how often its trace found something changed
        self.traced = False  # whether the function was run
        self.found: Scope | None = None  # what the walk for its binding found, if there was one
        self.walked: Scope | None = None  # what could be reached when it was run
        self.compilation: Any = None  # the entry of the log, if it compiles
        self.seconds: list[float] = []  # what tracing and compiling took
        self.outer = _compat.current_trace()
        _compat.load_late_settings()  # before the first look at them
        self.settings = _compat.settings()
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
        layout = self.binding.layout
        args, kwargs = layout.rebuild(self.args, self.kwargs, leaves)
        mixed = [(self.kwargs if isinstance(place, str) else self.args)[place] for place in layout.mixed]
        given = [(kwargs if isinstance(place, str) else args)[place] for place in layout.mixed]
        out = self.function(*args, **kwargs)
        if mixed and not self.operands:
            FlatTree(mixed).refuse_moved(given, self.label)
        return out

    def argument_names(self) -> list[str]:
        """What the arguments go by in messages, those by keyword last."""
        named = self.functions[0] if len(self.functions) == 1 else self.function
        return argument_names(named, self.args, self.kwargs)

    def argument_name(self, position: Any) -> str:
        """What the argument at a position or of a keyword goes by."""
        return self.argument_names()[position] if isinstance(position, int) else str(position)

    def searched(self, layout: Layout) -> list[Any]:
        """The functions that are searched: those that count, and those among the static arguments."""
        statics = [self.args[p] if isinstance(p, int) else self.kwargs[p] for p in sorted(layout.statics, key=str)]
        return [*self.functions, *(value for value in statics if callable(value) and not isinstance(value, type))]

    def nodes(self, layout: Layout) -> list[tuple[str, Any]]:
        """The nodes among the arguments, with the names they go by."""
        if self.operands:
            owners, operands, arrays = self.args
            several = sum(owner is not None for owner in owners) > 1
            names = [f"functions[{i}]" if several else "model" for i in range(len(owners))]
            return named_nodes([*names, *self.operands, "captured"], [*owners, *operands, arrays])
        names = self.argument_names()
        entries = zip(names, [*self.args, *self.kwargs.values()], [*range(len(self.args)), *self.kwargs], strict=True)
        dynamic = [(name, value) for name, value, position in entries if position not in layout.statics]
        return named_nodes([name for name, _ in dynamic], [value for _, value in dynamic])

    def scope(self) -> Scope:
        """A walk over everything that the call can reach, in the order of the binding's cells."""
        if self.found is not None and self.binding.holds():
            return self.found
        layout = self.binding.layout
        return survey(self.searched(layout), self.nodes(layout), self.binding.extras)[1]

    def bound_to(self, scope: Scope) -> bool:
        """Whether a walk finds what the program was chosen for: another thread may have changed it."""
        return self.binding.is_over(scope.cells) and scope.structure == self.binding.structure
