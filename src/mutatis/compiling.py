"""Compiled programs: how a stateful function becomes one `jax.jit` and is called at the cost of threading by hand.

Three things are kept, each for longer than the one before it:

- A **binding** belongs to given objects: the list of cells to hand over, and what proves cheaply that nothing about the
  objects has changed (one counter for attributes, the elements of plain containers, the names that the function uses).
- A **program** belongs to a structure: one pure function of one positional argument per cell (and then the user's other
  arguments) under one `jax.jit`. Another model of the same structure finds it by key; there is no identity in the key.
- A **record** belongs to one trace of the program (shapes, dtypes): which cells were written, what was returned, what
  was built. The program returns `{number of the record: values}`: the key of a dict is static in a pytree, so what the
  values mean comes back with them and no Python code runs inside the compiled call.

The first call for new shapes traces through an undonated twin (`jax.jit(pure).trace`). JAX's trace cache is shared by
every `jax.jit` of one function object, so the call that follows, with exactly the written buffers donated, traces nothing
again. Should the compiled call meet shapes it does not know, `pure` itself notices and sends the call back to tracing.
"""

from __future__ import annotations

import functools
import itertools
import sys
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from itertools import starmap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mutatis import _compat, transactions
from mutatis.captures import Captures, search
from mutatis.cells import UNSET, Cell, expose, give_back, my_lease, structure, structure_lock, take
from mutatis.errors import CapturedStateWarning, MutatisError
from mutatis.graph import Decoder, Encoder, Spec, cell_spec, make_cell
from mutatis.lifting import (
    Contents,
    Packed,
    Scope,
    Site,
    argument_names,
    fill,
    function_name,
    named_nodes,
    raw_value,
)
from mutatis.modules import Module, is_node
from mutatis.state import State
from mutatis.statics import Identity, Static, static_key
from mutatis.transactions import Transaction
from mutatis.variables import Variable

_ARRAY = type(jnp.zeros(()))
_LEAVES = frozenset({_ARRAY, np.ndarray, State, bool, int, float, complex, type(None)})
_set_value = Cell.__dict__["_value"].__set__  # the slot's own setter, written in C


class _NeedsTraceError(Exception):
    """The compiled call met shapes for which there is no record."""


class _FoundStates(BaseException):
    """Tracing found states that are not inputs; not an `Exception`, so that no user code catches it."""

    def __init__(self, cells: list[Variable]) -> None:
        self.cells = cells


class Request:
    """One call of a program, for the case that it has to be traced."""

    __slots__ = ("args", "binding", "fast", "function", "functions", "kwargs", "outer", "program", "traced")

    def __init__(
        self,
        function: Callable[..., Any],
        functions: tuple[Any, ...],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.function = function
        self.functions = functions  # those whose captures count
        self.args = args
        self.kwargs = kwargs
        self.fast = False  # whether the call must not trace
        self.traced = False  # whether the function was run
        self.outer = _compat.current_trace()
        self.binding: Binding
        self.program: Program

    def bind(self, binding: Binding) -> None:
        """Say which binding and program the call goes to."""
        self.binding = binding
        self.program = binding.program

    def nodes(self, layout: Layout) -> list[tuple[str, Any]]:
        """The nodes among the arguments, with the names they go by."""
        named = self.functions[0] if len(self.functions) == 1 else self.function
        names = argument_names(named, self.args, self.kwargs)
        entries = zip(names, [*self.args, *self.kwargs.values()], [*range(len(self.args)), *self.kwargs], strict=True)
        dynamic = [(name, value) for name, value, position in entries if position not in layout.statics]
        return named_nodes([name for name, _ in dynamic], [value for _, value in dynamic])

    def scope(self) -> Scope:
        """A walk over everything that the call can reach, in the order of the binding's cells."""
        captures = search(*self.functions, ignored=self.binding.captures.ignored)
        return self.binding.make_scope(self.nodes(self.binding.layout), captures)


class _Calls(threading.local):
    request: Request | None = None


_calls = _Calls()


class CompiledTransaction(Transaction):
    """The transaction of a traced program: a cell that is not an input is noted, and tracing starts again with it."""

    __slots__ = ("found",)

    def __init__(self, label: str, scope: Scope, outer: Any) -> None:
        super().__init__(label, locate=scope.locate, outer=outer, compiled=True)
        self.found: dict[Any, None] = {}

    def fetch(self, cell: Cell) -> Any:
        """What the cell holds outside: good enough to trace on until all such cells are known."""
        value = super().fetch(cell)
        self.found[cell] = None
        return value

    def write(self, cell: Cell, value: Any, trace: Any) -> None:
        """Write; a first write to a cell that is not an input finds it too."""
        if cell not in self.values and cell._birth is None:
            self.found[cell] = None
        super().write(cell, value, trace)


class Record:
    """One trace of a program: which values it returns, and what it did besides.

    Args:
      written: the numbers of the cells that are written, in the order in which their values are returned.
      same_type: those of them whose type stays the same.
      made: the specifications of the cells that were made.
      out: the structure of the user's result, with the specifications of the nodes in it.
      changes: what became of attributes and containers.
    """

    __slots__ = ("changes", "donated", "made", "nodes", "plain", "same_type", "structure", "waits", "written")

    def __init__(
        self,
        written: list[int],
        same_type: list[int],
        made: list[tuple[int, Spec]],
        structure: Any,
        nodes: tuple[Spec, ...],
        changes: list[tuple[int, str | None, Spec | None]],
    ) -> None:
        self.written = tuple(written)
        self.same_type = tuple(same_type)
        self.made = made
        self.structure = structure
        self.nodes = nodes
        self.changes = changes
        self.plain = not (made or nodes or changes)
        self.waits = False  # it calls back into Python, so it may fail at run time

    @property
    def variant(self) -> Hashable:
        """What decides how the program may be called."""
        return self.written, self.same_type, self.waits


class Variant:
    """One way to call a program: with these cells written and these buffers donated."""

    __slots__ = ("donated", "jitted", "waits", "written")

    def __init__(self, program: Program, record: Record, donate: str | bool) -> None:
        self.written = record.written
        self.waits = record.waits
        donates = donate is True or (donate == "auto" and not record.waits)
        self.donated = frozenset(record.same_type) if donates else frozenset()
        self.jitted = program.make_jit(tuple(sorted(self.donated)))


class Program:
    """One structure's pure function, its traces, and the `jax.jit`s of it."""

    def __init__(
        self, options: Options, label: str, count: int, positions: tuple[Any, ...], placements: list[Any]
    ) -> None:
        self.options = options
        self.count = count
        self.placements = placements
        self.records: dict[int, Record] = {}
        self._numbers = itertools.count()
        self.variants: dict[Hashable, Variant] = {}
        self.by_types: dict[Hashable, Variant] | None = None  # only if its traces differ in what they write
        self.only: Variant | None = None
        me = weakref.ref(self)

        def pure(*flat: Any) -> dict[int, Any]:
            program = me()
            request = _calls.request
            if program is None or request is None or request.program is not program:
                raise MutatisError(f"`{label}` was traced outside a call", cure="Call it, or use `mu.make_jaxpr`.")
            if request.fast:
                raise _NeedsTraceError
            return program.trace(request, flat)

        pure.__name__ = pure.__qualname__ = label
        self._pure = pure
        self._positions = positions
        self.plain = self.make_jit(())

    def make_jit(self, donated: tuple[int, ...]) -> Any:
        """The pure function under `jax.jit`, with these arguments donated (and those that the user named)."""
        options = self.options
        users = tuple(self.count + i for i in range(len(self._positions)) if self._positions[i] in options.donate_args)
        shardings: dict[str, Any] = {}
        if options.in_shardings is not _compat.UNSPECIFIED:
            given = options.in_shardings
            each = [given[p] if isinstance(given, tuple) else given for p in self._positions]
            shardings["in_shardings"] = (*[_compat.UNSPECIFIED] * self.count, *each)
        return jax.jit(
            self._pure,
            donate_argnums=(*donated, *users),
            keep_unused=options.keep_unused,
            inline=options.inline,
            **({} if options.compiler_options is None else {"compiler_options": options.compiler_options}),
            **shardings,
            **options.where,
        )

    def trace(self, request: Request, flat: Sequence[Any]) -> dict[int, Any]:
        """Run the user's function on JAX's tracers; called by JAX."""
        binding = request.binding
        request.traced = True
        cells, scope = binding.cells, request.scope()
        args, kwargs = binding.layout.rebuild(request.args, request.kwargs, flat[self.count :])
        tx = CompiledTransaction(binding.label, scope, request.outer)
        with structure_lock, tx:
            contents = Contents(scope.containers, copies=True)
            tx.fill(dict(zip(cells, flat, strict=False)))
            try:
                out = request.function(*args, **kwargs)
                tx.settle()
                packed = Packed(out)
                leaves = self.options.constrain_outputs(packed)
                record, new, made = self._describe(scope, tx, packed, contents, flat)
            finally:
                for container, then in contents.changed():
                    tx.note(container, "", then)
            tx.undo()
            if tx.found:
                raise _FoundStates(list(tx.found))
            number = next(self._numbers)
            self.records[number] = record
            return {number: (new, made, leaves)}

    def _describe(
        self, scope: Scope, tx: CompiledTransaction, packed: Packed, contents: Contents, flat: Sequence[Any]
    ) -> tuple[Record, list[Any], list[Any]]:
        """Everything that the trace did, as a record and lists of arrays."""
        known = scope.encoder
        encoder = Encoder(thread=True)
        encoder.know(known)
        changes: list[tuple[int, str | None, Spec | None]] = []
        for obj, name in {(id(o), n): (o, n) for o, n, _ in tx.journal}.values():
            number = known.known(obj)
            if number is not None and isinstance(obj, Module):
                value = obj.__dict__.get(name, transactions.ABSENT)
                changes.append((number, name, None if value is transactions.ABSENT else encoder.encode(value, (name,))))
        for container, _ in contents.changed():
            number = known.known(container)
            if number is not None:
                entries = (
                    encoder._entries(container, ()) if isinstance(container, dict) else encoder._items(container, ())
                )
                changes.append((number, None, entries))
        nodes = tuple(encoder.encode(node, ("out",)) for node in packed.nodes)
        encoder.finish()

        numbers = [known.cells[cell] for cell in tx.written if cell in known.cells]  # type: ignore[index]
        cells = list(known.cells)
        new = [self._keep_placement(i, tx.values[cells[i]]) for i in numbers]
        same = [i for i, value in zip(numbers, new, strict=True) if _same_avals(flat[i], value)]
        made_cells = list(encoder.cells)[self.count :]
        for cell in made_cells:
            if cell not in tx.born:
                tx.found[cell] = None
        made = [tx.values.get(cell, UNSET) for cell in made_cells]
        specs = [(encoder.cells[cell], cell_spec(cell)) for cell in made_cells]
        return Record(numbers, same, specs, packed.structure, nodes, changes), new, made

    def _keep_placement(self, number: int, value: Any) -> Any:
        shardings = self.placements[number]
        if shardings is None:
            return value
        leaves, treedef = jax.tree.flatten(value)
        if len(leaves) != len(shardings):
            return value
        return jax.tree.unflatten(treedef, [_constrain(x, s) for x, s in zip(leaves, shardings, strict=True)])

    def variant_for(self, record: Record, types: Hashable) -> Variant:
        """How to call the program for the shapes of a record."""
        variant = self.variants.get(record.variant)
        if variant is None:
            variant = self.variants[record.variant] = Variant(self, record, self.options.donate)
        if self.only is None and self.by_types is None:
            self.only = variant
        elif self.only is not variant and self.by_types is None:
            self.by_types = {}  # from now on every call looks at its shapes first
            self.only = None
        if self.by_types is not None:
            self.by_types[types] = variant
        return variant


def _constrain(value: Any, sharding: Any) -> Any:
    if isinstance(sharding, jax.sharding.NamedSharding) and len(sharding.spec) <= value.ndim:
        explicit = any(kind == jax.sharding.AxisType.Explicit for kind in sharding.mesh.axis_types)
        return jax.sharding.reshard(value, sharding) if explicit else jax.lax.with_sharding_constraint(value, sharding)
    return value


def _same_avals(old: Any, new: Any) -> bool:
    before, tree = jax.tree.flatten(old)
    after, other = jax.tree.flatten(new)
    return tree == other and all(jax.typeof(a) == jax.typeof(b) for a, b in zip(before, after, strict=True))


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


class Binding:
    """What is known about given objects: which cells to hand over, and what proves that this still holds.

    It refers to modules weakly, and is dropped when one of them dies.
    """

    __slots__ = (
        "__weakref__",
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
        "split",
        "splits",
    )

    def __init__(self, label: str, layout: Layout, extras: list[Variable]) -> None:
        self.label = label
        self.layout = layout
        self.extras = extras  # states that only tracing found
        self.cells: list[Variable]
        self.captures: Captures
        self.contents: Contents
        self.program: Program
        self.objects: list[Any] = []
        self.references: list[Any] = []
        self.split: Split | None = None  # how to call, if that does not depend on the shapes
        self.splits: dict[Variant, Split] = {}

    def make_scope(self, nodes: list[tuple[str, Any]], captures: Captures) -> Scope:
        """Walk over arguments and captures."""
        extras = [("captured", cell) for cell in self.extras]
        return Scope([*nodes, *captures.roots, *extras])

    def settle(self, scope: Scope, captures: Captures) -> None:
        """Keep of a walk what the calls need."""
        self.cells = scope.cells
        self.captures = captures
        self.contents = Contents(scope.containers)
        for obj in scope.encoder.objects:
            if isinstance(obj, Module):
                object.__setattr__(obj, "_watched", True)
                self.objects.append(weakref.ref(obj))
            else:
                self.objects.append(obj)
        self.epoch = structure.epoch

    def holds(self) -> bool:
        """Whether nothing about the objects has changed."""
        return self.epoch == structure.epoch and self.contents.unchanged() and self.captures.unchanged()


class Split:
    """A binding's cells divided for one variant of its program."""

    __slots__ = ("donates", "donating_at", "read", "variant", "written")

    def __init__(self, cells: list[Variable], variant: Variant) -> None:
        self.variant = variant
        self.written = [cells[i] for i in variant.written]
        taken = set(variant.written)
        self.read = [cell for i, cell in enumerate(cells) if i not in taken]
        self.donating_at = [i if i in variant.donated else None for i in variant.written]
        self.donates = bool(variant.donated)


class Options:
    """The options of `mu.jit` that reach `jax.jit`."""

    def __init__(
        self,
        *,
        donate: str | bool = "auto",
        static_argnums: tuple[int, ...] = (),
        static_argnames: tuple[str, ...] = (),
        donate_args: frozenset[Any] = frozenset(),
        in_shardings: Any = _compat.UNSPECIFIED,
        out_shardings: Any = _compat.UNSPECIFIED,
        keep_unused: bool = False,
        inline: bool = False,
        compiler_options: dict[str, Any] | None = None,
        where: dict[str, Any] | None = None,
    ) -> None:
        self.donate = donate
        self.static_argnums = frozenset(static_argnums)
        self.static_argnames = frozenset(static_argnames)
        self.donate_args = donate_args
        self.in_shardings = in_shardings
        self.out_shardings = out_shardings
        self.keep_unused = keep_unused
        self.inline = inline
        self.compiler_options = compiler_options
        self.where = where or {}

    def constrain_outputs(self, packed: Packed) -> list[Any]:
        """The leaves of the result, placed as `out_shardings` says."""
        if self.out_shardings is _compat.UNSPECIFIED:
            return packed.leaves
        tree = packed.fill(packed.leaves, [None] * len(packed.nodes))
        full = jax.tree.broadcast(self.out_shardings, tree, is_leaf=lambda x: x is None)
        shardings = jax.tree.leaves(full, is_leaf=lambda x: x is None)
        return [
            leaf if sharding is None else jax.lax.with_sharding_constraint(leaf, sharding)
            for leaf, sharding in zip(packed.leaves, shardings, strict=True)
        ]


_copies = jax.jit(lambda values: values)


def _copy(values: list[Any]) -> Any:
    """New buffers with the same contents, all made by one program."""
    if all(getattr(leaf, "is_fully_addressable", True) for leaf in jax.tree.leaves(values)):
        return _copies(values)
    # A program over an array that spans processes would have to be launched by all of them: copy shard by shard.
    return jax.tree.map(_copy_shards, values)


def _copy_shards(array: Any) -> Any:
    shards = [jnp.copy(shard.data) for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)


def _donation_is_safe() -> bool:
    return not _compat.checks_results() and _HAS_GIL


_HAS_GIL = getattr(sys, "_is_gil_enabled", lambda: True)()


class Compiler:
    """All programs and bindings of one function (or of one transform over functions of the same code)."""

    def __init__(self, name: str, options: Options) -> None:
        self.name = name
        self.options = options
        self.programs: dict[Hashable, Program] = {}
        # A binding for arguments lives on the first module among them, so that a cycle through it can be collected.
        self.bindings: dict[Hashable, weakref.ref[Binding]] = {}
        self._captured: dict[Hashable, Binding] = {}  # those for captures only
        self.ignored: frozenset[str] = frozenset()  # names that tracing itself rebinds

    def __call__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        functions: tuple[Any, ...] | None = None,
    ) -> Any:
        """Call a function through its program.

        Args:
          function: what is traced.
          args: its positional arguments.
          kwargs: its keyword arguments.
          functions: the functions whose captures count, if not `function`.
        """
        flat, key = self._divide(args, kwargs)
        if functions is None:
            functions = (function,)
        else:
            key = (*key, *map(id, functions))
        request = Request(function, functions, args, kwargs)
        reference = self.bindings.get(key)
        binding = None if reference is None else reference()
        if binding is None or not binding.holds():
            binding = self._bind(request, key, [] if binding is None else binding.extras)
        eager = transactions.current() is None and _compat.current_trace() is _compat.EVAL_TRACE
        before = _calls.request
        _calls.request = request
        try:
            while True:
                request.bind(binding)
                try:
                    if _compat.jit_disabled():
                        return self._run(request)
                    result = self._dispatch(request, flat) if eager else self._inline(request, flat)
                    if request.traced and (changed := binding.captures.changed()):
                        self.ignored |= changed
                        self._bind(request, key, binding.extras, binding.program)
                    return result
                except _FoundStates as found:
                    self._warn(found.cells, binding)
                    binding = self._bind(request, key, [*binding.extras, *found.cells])
        finally:
            _calls.request = before

    # -- binding ---------------------------------------------------------------------------------------------

    def _divide(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], tuple[Hashable, ...]]:
        """JAX's positional arguments of a call, and the key of its objects."""
        flat: list[Any] = []
        key: list[Hashable] = []
        statics = self.options.static_argnums
        for index, value in enumerate(args):
            if statics and (index in statics or index - len(args) in statics):
                key.append(Static(value))
            else:
                self._place(value, flat, key)
        for name in sorted(kwargs) if kwargs else ():
            key.append(name)
            if name in self.options.static_argnames:
                key.append(Static(kwargs[name]))
            else:
                self._place(kwargs[name], flat, key)
        return flat, tuple(key)

    @staticmethod
    def _place(value: Any, flat: list[Any], key: list[Hashable]) -> None:
        kind = type(value)
        if kind in _LEAVES:
            flat.append(value)
            key.append(0)
        elif is_node(value):
            key.append(id(value))
        else:
            packed = Packed(value)
            if packed.nodes:
                flat.append(packed.leaves)
                key.append((packed.structure, *map(id, packed.nodes)))
            else:
                flat.append(value)
                key.append(0)

    def _layout(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Layout:
        positions: list[Any] = []
        mixed: dict[Any, Any] = {}
        statics: set[Any] = set()
        entries = [*enumerate(args), *((name, kwargs[name]) for name in sorted(kwargs))]
        for position, value in entries:
            options = self.options
            if isinstance(position, int):
                static = position in options.static_argnums or position - len(args) in options.static_argnums
            else:
                static = position in options.static_argnames
            if static:
                statics.add(position)
            elif not is_node(value):
                packed = Packed(value)
                positions.append(position)
                if packed.nodes:
                    mixed[position] = packed.structure
        return Layout(positions, mixed, statics)

    def _bind(
        self, request: Request, key: tuple[Hashable, ...], extras: list[Variable], program: Program | None = None
    ) -> Binding:
        """Walk over the objects of a call and find the program for their structure, unless it is given."""
        layout = self._layout(request.args, request.kwargs)
        label = f"{self.name}({', '.join(map(function_name, request.functions))})"
        binding = Binding(label, layout, extras)
        with structure_lock:
            captures = search(*request.functions, ignored=self.ignored)
            nodes = request.nodes(layout)
            scope = binding.make_scope(nodes, captures)
            binding.settle(scope, captures)
        placements = [transactions.placement(cell) for cell in scope.cells]
        structural = (
            self._static_parts(request, layout),
            layout.positions,
            tuple(layout.mixed.items()),
            scope.specs,
            scope.tail,
            tuple(captures.token),
            tuple(placements),
            tuple(map(Identity, extras)),
        )
        if program is None:
            program = self.programs.get(structural)
        if program is None:
            program = Program(self.options, label, len(scope.cells), layout.positions, placements)
        if not captures.ephemeral:
            self.programs[structural] = program
        binding.program = program
        self._keep(binding, key, nodes, request.functions)
        return binding

    @staticmethod
    def _static_parts(request: Request, layout: Layout) -> Hashable:
        args, kwargs = request.args, request.kwargs
        return tuple((p, Static(args[p] if isinstance(p, int) else kwargs[p])) for p in sorted(layout.statics, key=str))

    def _keep(
        self, binding: Binding, key: tuple[Hashable, ...], nodes: list[tuple[str, Any]], functions: tuple[Any, ...]
    ) -> None:
        """Keep a binding for the next call with the same objects, until one of them dies."""
        captured = [node for _, node in binding.captures.roots]
        binding.captures.roots = []
        if binding.captures.ephemeral or any(isinstance(node, Variable) for _, node in nodes):
            return  # a binding holds its cells, so it cannot wait for one to die
        me = weakref.ref(self)

        def drop(_: Any) -> None:
            compiler = me()
            if compiler is not None:
                compiler.bindings.pop(key, None)
                compiler._captured.pop(key, None)

        modules = [node for node in captured if not isinstance(node, Variable)]
        for obj in (*(node for _, node in nodes), *modules, *functions):
            try:
                binding.references.append(weakref.ref(obj, drop))
            except TypeError:
                return
        if nodes:
            owner = nodes[0][1]
            if owner._bindings is None:
                object.__setattr__(owner, "_bindings", weakref.WeakKeyDictionary())
            owner._bindings.setdefault(self, {})[key] = binding
        else:
            self._captured[key] = binding
        self.bindings[key] = weakref.ref(binding, drop)

    @staticmethod
    def _warn(cells: list[Variable], binding: Binding) -> None:
        for cell in cells:
            warnings.warn(
                f"state {transactions.describe(cell)} was found while tracing `{binding.label}`, but neither its arguments "
                "nor the names it uses lead to it. It is threaded, but binding its name to another state (a class attribute, "
                "a registry, a cached factory) would not be noticed. Pass it as an argument, or name it in the function.",
                CapturedStateWarning,
                stacklevel=4,
            )

    # -- calling ---------------------------------------------------------------------------------------------

    def _prepare(self, request: Request, values: list[Any]) -> Split:
        """Trace for new shapes, and learn from the record how to call."""
        binding, program = request.binding, request.program
        request.fast = False
        traced = program.plain.trace(*values)
        (number,) = traced.out_info
        record = program.records[number]
        record.waits = _compat.has_host_callback(traced.jaxpr.jaxpr)
        return self._split(binding, program.variant_for(record, _types(values)))

    @staticmethod
    def _split(binding: Binding, variant: Variant) -> Split:
        split = binding.splits.get(variant)
        if split is None:
            split = binding.splits[variant] = Split(binding.cells, variant)
        binding.split = split if binding.program.only is variant else None
        return split

    def _dispatch(self, request: Request, flat: list[Any]) -> Any:
        """The call of a compiled program from ordinary Python: donates, and commits to the cells."""
        binding, program = request.binding, request.program
        request.fast = True
        split = binding.split if program.by_types is None else None
        if split is None:
            values = [cell._value for cell in binding.cells] + flat
            variant = program.only if program.by_types is None else program.by_types.get(_types(values))
            split = self._prepare(request, values) if variant is None else self._split(binding, variant)
        while True:
            try:
                number, made, leaves = self._launch(binding.cells, split, program, flat)
                break
            except _NeedsTraceError:
                split = self._prepare(request, [cell._value for cell in binding.cells] + flat)
        record = program.records[number]
        if record.plain:
            return record.structure[0].unflatten(leaves)
        return self._replay(binding, record, made, leaves)

    @staticmethod
    def _launch(
        cells: list[Variable], split: Split, program: Program, flat: list[Any]
    ) -> tuple[int, list[Any], list[Any]]:
        """Take the buffers, run, commit."""
        variant = split.variant
        written = split.written
        donating = split.donates and _donation_is_safe()
        jitted = variant.jitted if donating == split.donates else program.plain
        box: list[Any] = []
        lease = my_lease()
        exposed: list[int] = []
        try:
            take(lease, written, split.read, donating, exposed)
            values = [cell._value for cell in cells]
            if exposed and donating:
                places = [p for i in exposed if (p := split.donating_at[i]) is not None]
                for place, value in zip(places, _copy([values[p] for p in places]), strict=True):
                    values[place] = value
            values += flat
            # In one C call, so that an interrupt comes before the launch or after its results are kept.
            box.extend(starmap(jitted, (values,)))
            if variant.waits:
                jax.block_until_ready(box)
            ((number, (new, made, leaves)),) = box[0].items()
            if lease.broken:
                _commit_unbroken(lease, written, new)
            else:
                for cell, value in zip(written, new, strict=True):
                    cell._value = value
            return number, made, leaves
        except BaseException:
            if box and not variant.waits:
                ((_, (new, _, _)),) = box[0].items()
                deque(map(_set_value, written, new), 0)
            else:
                expose([written[i] for i in exposed])
            raise
        finally:
            give_back(lease)

    def _inline(self, request: Request, flat: list[Any]) -> Any:
        """The call of a compiled program inside another transform or transaction."""
        binding, program = request.binding, request.program
        values = [raw_value(cell) for cell in binding.cells]
        ((number, (new, made, leaves)),) = program.plain(*values, *flat).items()
        record = program.records[number]
        for index, value in zip(record.written, new, strict=True):
            transactions.write(binding.cells[index], value)
        return self._replay(binding, record, made, leaves)

    @staticmethod
    def _run(request: Request) -> Any:
        """Under `jax.disable_jit`: the function itself, all or nothing."""
        site = Site("jit", request.function, request.args, request.kwargs, functions=request.functions)
        with site:
            end, leaves, values = site.run({}, make=functools.partial(Transaction, compiled=True))
            return site.commit(end, values, leaves)

    @staticmethod
    def _replay(binding: Binding, record: Record, made: list[Any], leaves: list[Any]) -> Any:
        """Do to the user's objects what the trace did, and rebuild the result."""
        if record.plain:
            return record.structure[0].unflatten(leaves)
        values = {number: value for (number, _), value in zip(record.made, made, strict=True)}

        def make(number: int, spec: Spec) -> Variable:
            cell = make_cell(spec)
            transactions.create(cell, values[number])
            return cell

        objects = [obj() if isinstance(obj, weakref.ref) else obj for obj in binding.objects]
        decoder = Decoder(list(binding.cells), objects, make)
        with structure_lock:
            for number, name, spec in record.changes:
                target: Any = objects[number]
                if name is None:
                    _refill(target, spec, decoder)
                elif spec is None:
                    delattr(target, name)
                else:
                    target._set_structure(name, decoder.decode(spec))
            nodes = [decoder.decode(spec) for spec in record.nodes]
        return fill(record.structure, leaves, nodes)


def _refill(container: Any, items: Any, decoder: Decoder) -> None:
    tx = transactions.current()
    if tx is not None:
        tx.note(container, "", container.copy())
    if isinstance(container, list):
        container[:] = [decoder.decode(item) for item in items]
    else:
        entries = {key.value: decoder.decode(item) for key, item in items}
        container.clear()
        container.update(entries)


def _commit_unbroken(lease: Any, written: list[Variable], new: list[Any]) -> None:
    """Commit, except to cells that somebody else wrote while the program ran: theirs is the later write."""
    for cell, value in zip(written, new, strict=True):
        if cell._lease is lease:
            cell._value = value


def _types(values: list[Any]) -> Hashable:
    leaves, treedef = jax.tree.flatten(values)
    return treedef, tuple(jax.typeof(leaf) for leaf in leaves)


# -- eager control flow goes through a program of its own -------------------------------------------------------------


@functools.lru_cache(maxsize=512)
def _compiler_for(_codes: tuple[Hashable, ...], name: str, _options: Hashable) -> Compiler:
    return Compiler(name, Options())


def compiled(
    name: str,
    implementation: Callable[..., Any],
    functions: Sequence[Callable[..., Any]],
    options: dict[str, Any],
    *operands: Any,
) -> Any:
    """Run a control-flow transform from ordinary Python as one compiled program, kept for functions of this code.

    Args:
      name: the transform's name.
      implementation: ``implementation(functions, options, operands)`` inside the program.
      functions: the user's functions.
      options: the transform's static options.
      *operands: its arguments.
    """
    plain, owners = zip(*map(_unbind, functions), strict=True)
    codes = tuple(getattr(f, "__code__", None) or static_key(f) for f in plain)
    key = tuple((option, static_key(value)) for option, value in options.items())
    compiler = _compiler_for(codes, name, key)

    def run(owners: Any, operands: Any) -> Any:
        bound = [f if owner is None else functools.partial(f, owner) for f, owner in zip(plain, owners, strict=True)]
        return implementation(bound, options, operands)

    return compiler(run, (owners, operands), {}, plain)


def _unbind(function: Any) -> tuple[Any, Any]:
    """A bound method or a callable module as a plain function and the object it belongs to."""
    if isinstance(function, Module):
        return type(function).__call__, function
    owner = getattr(function, "__self__", None)
    if is_node(owner) and hasattr(function, "__func__"):
        return function.__func__, owner
    return function, None


def runs_eagerly() -> bool:
    """Whether the code that runs now is ordinary Python, outside every transform and transaction."""
    return (
        transactions.current() is None and _compat.current_trace() is _compat.EVAL_TRACE and not _compat.jit_disabled()
    )
