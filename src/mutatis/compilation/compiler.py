"""Compiling: how a stateful function is called at the cost of threading by hand.

Three things are kept, each for longer than the one before it: a **binding** for given objects (`binding`), a **program** for
a structure, found by a key without identities (`program`), and in it a **record** for each trace (`record`).

The first call for new shapes traces through an undonated twin (`jax.jit(pure).trace`). JAX's trace cache is shared by every
`jax.jit` of one function object, so the call that follows, with exactly the written buffers donated, traces nothing again.
A binding is for given types of arguments too, so each call knows its trace.
"""

from __future__ import annotations

import contextlib
import functools
import time
import warnings
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np

from mutatis import _compat
from mutatis.compilation.binding import Binding, Bindings, Layout
from mutatis.compilation.dispatch import launch, rebuild_result
from mutatis.compilation.log import Log, facts_of
from mutatis.compilation.options import Options
from mutatis.compilation.pending import PendingCall
from mutatis.compilation.plan import DispatchPlan
from mutatis.compilation.program import NeedsTraceError, Program, refuse_to_trace, tracing
from mutatis.compilation.record import replay
from mutatis.compilation.tracer import FoundStates, StaleBinding, trace
from mutatis.core import access, frames, naming, transactions
from mutatis.core.committed import notify
from mutatis.core.nodes import is_node
from mutatis.core.statics import Identity, Static
from mutatis.core.structure import structure, structure_lock
from mutatis.core.transactions import Transaction
from mutatis.errors import CapturedStateWarning, StructureError
from mutatis.model import contexts
from mutatis.model.modules import known_bindings
from mutatis.model.variables import Variable
from mutatis.tracing.arguments import FlatTree, function_name
from mutatis.tracing.call_site import CallSite
from mutatis.tracing.captures import Captures, Slot, search

_ARRAY = _compat.ARRAY
_PATIENCE = 20  # traces
# In a key; a string alone is the name of a keyword argument.
_NUMBERS: dict[Any, Hashable] = {kind: (kind.__name__,) for kind in (bool, int, float, complex)}


def _type_of(leaf: Any) -> Any:
    """What of a leaf decides which trace it needs."""
    if isinstance(leaf, jax.Array):
        return leaf.aval
    is_array = isinstance(leaf, np.ndarray | np.generic | jax.ShapeDtypeStruct)
    return (type(leaf), leaf.shape, leaf.dtype) if is_array else type(leaf)


def _abstract(array: Any) -> Any:
    """What JAX traces for an array."""
    placed = isinstance(array.sharding, jax.sharding.NamedSharding)  # a mesh is part of a type
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding if placed else None)


def _types(cells: Sequence[Variable]) -> list[Any]:
    """What JAX traces for cells. Types, not arrays: another thread may donate those meanwhile."""
    values = [cell._value for cell in cells]
    return [_abstract(value) if type(value) is _ARRAY else jax.tree.map(_abstract, value) for value in values]


class Compiler:
    """All programs and bindings of one function (or of one transform over functions of the same code)."""

    def __init__(self, name: str, options: Options) -> None:
        self.name = name
        self.options = options
        self.programs: dict[Hashable, Program] = {}
        # A binding for arguments lives on the first module among them, so that a cycle through it can be collected.
        self.bindings: dict[Hashable, weakref.ref[Bindings]] = {}
        self._captured: dict[Hashable, Bindings] = {}  # those for captures only
        self.ignored: frozenset[Slot] = frozenset()  # names that tracing itself rebinds
        self.log = Log()

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
        if transactions.current() is not None or _compat.current_trace() is not _compat.EVAL_TRACE:
            return self._call(self._inline, function, args, kwargs, functions)
        flat, key = self._key(args, kwargs, functions)
        found = self._known(key)
        if found is not None and (binding := found.first).holds():
            plan = binding.plan
            if plan is not None and plan.first is None and plan.treedef is not None and not _compat.jit_disabled():
                try:
                    return self._call_again(binding, plan, flat)
                except NeedsTraceError:
                    pass
        return self._call(self._dispatch, function, args, kwargs, functions)

    def _call_again(self, binding: Binding, plan: DispatchPlan, flat: list[Any]) -> Any:
        """The call that most calls are: nothing to find out, and nothing to do but to run and to store.

        Raises:
          NeedsTraceError: it has to be traced after all, say because a setting of JAX is another. Nothing has been done.
        """
        before = tracing.run
        tracing.run = refuse_to_trace
        try:
            number, made, leaves = launch(binding, plan, flat)
        except BaseException:
            _compat.restore_eager_trace()
            raise
        finally:
            tracing.run = before
        return (
            plan.treedef.unflatten(leaves) if number == plan.number else rebuild_result(binding, number, made, leaves)
        )

    def lower(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Program, int, Any]:
        """Lower the program of a call without calling it: the program, the number of its record, and what JAX lowered."""
        return self._call(self._lower, function, args, kwargs)  # type: ignore[no-any-return]

    def call_compiled(
        self, program: Program, number: int, compiled: Any, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call what JAX compiled of a program, and of one of its records, before.

        Raises:
          StructureError: the program is for arguments of another structure, or the call is inside a transform.
        """
        return self._call(functools.partial(self._run_compiled, program, number, compiled), function, args, kwargs)

    def _call(
        self,
        act: Callable[[PendingCall, list[Any]], Any],
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        functions: tuple[Any, ...] | None = None,
    ) -> Any:
        """Find the binding of a call, and do something with it."""
        flat, key = self._key(args, kwargs, functions)
        if functions is None:
            functions = (function,)
        call = PendingCall(function, functions, args, kwargs, key)
        found = self._known(key)
        if found is None:
            binding = self._bind(call, key, [])
        elif not (binding := found.first).holds():
            binding = found.find() or self._bind(call, key, binding.extras)
        before = tracing.run
        tracing.run = functools.partial(trace, call)
        try:
            while True:
                call.bind(binding)
                try:
                    if _compat.jit_disabled() or frames.here.recorder is not None:
                        return self._run(call)
                    result = act(call, flat)
                    if call.traced:
                        self._bind_again(call, key, call.binding)
                    return result
                except StaleBinding:
                    self._forget(call.program)
                    binding.invalidate()
                    self._count_stale(call)
                    binding = self._bind(call, key, binding.extras)
                except FoundStates as found:
                    self._warn(found.cells, binding)
                    binding.invalidate()
                    binding = self._bind(call, key, [*binding.extras, *found.cells])
        except BaseException:
            if call.outer is _compat.EVAL_TRACE:
                _compat.restore_eager_trace()
            raise
        finally:
            tracing.run = before

    @staticmethod
    def _count_stale(call: PendingCall) -> None:
        """Give up on a call whose trace other threads do not leave alone."""
        call.stale += 1
        if call.stale > _PATIENCE:
            raise StructureError(
                f"the model was changed by another thread each of the {_PATIENCE} times `{call.label}` was traced",
                expected="attributes, modes and layers that stay while a function is traced over them",
                cure="Call the function once before the threads start, give each thread a model of its own, or hold a "
                "lock (`threading.Lock`) around the changes and around first calls.",
            )

    # -- binding ---------------------------------------------------------------------------------------------

    def _key(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], functions: tuple[Any, ...] | None
    ) -> tuple[list[Any], tuple[Hashable, ...]]:
        """JAX's positional arguments of a call, and what its bindings go by."""
        flat, key = self._divide(args, kwargs)
        if contexts.active():
            key = (*key, contexts.key())
        if functions is not None:
            key = (*key, *map(id, functions))
        return flat, key

    def _known(self, key: tuple[Hashable, ...]) -> Bindings | None:
        """The bindings for the objects of a key."""
        reference = self.bindings.get(key)
        return None if reference is None else reference()

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
        if kind is _ARRAY:
            flat.append(value)
            key.append(value.aval)
        elif is_node(value):
            key.append(id(value))
        elif kind in _NUMBERS:
            flat.append(value)
            key.append(_NUMBERS[kind])
        else:
            packed = FlatTree(value)
            flat.append(packed.leaves if packed.nodes else value)
            key.append((packed.structure, *map(id, packed.nodes), *map(_type_of, packed.leaves)))

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
                packed = FlatTree(value)
                positions.append(position)
                if packed.nodes:
                    mixed[position] = packed.structure
        return Layout(positions, mixed, statics)

    def _bind(
        self, call: PendingCall, key: tuple[Hashable, ...], extras: list[Variable], program: Program | None = None
    ) -> Binding:
        """Walk over the objects of a call and find the program for their structure, unless it is given."""
        layout = self._layout(call.args, call.kwargs)
        label = f"{self.name}({self._title(call)})"
        binding = Binding(label, layout, extras)
        with structure_lock:
            captures = search(*call.functions, ignored=self.ignored)
            nodes = call.nodes(layout)
            scope = call.found = binding.make_scope(nodes, captures)
            captures.ephemeral = captures.ephemeral or scope.encoder.ephemeral
            binding.keep_walk(scope, captures)
        placements = [access.placement(cell) for cell in scope.cells]
        binding.structural = (
            self._static_parts(call, layout),
            layout.positions,
            tuple(layout.mixed.items()),
            binding.specs,
            tuple(placements),
            tuple(map(Identity, extras)),
            contexts.structure(),
        )
        if program is None:
            program = self.programs.get((binding.structural, tuple(captures.token)))
        if program is None:
            program = Program(self.options, self._title(call), len(scope.cells), layout.positions, placements)
        self._remember(binding.structural, captures, program)
        binding.program = program
        self._keep(binding, key, nodes, call.functions)
        return binding

    @staticmethod
    def _title(call: PendingCall) -> str:
        return ", ".join(map(function_name, call.functions))

    def _remember(self, structural: Hashable, captures: Captures, program: Program) -> None:
        """Keep a program under the key of a structure and of what the function captured."""
        if not captures.ephemeral:
            with structure_lock:
                self.programs[structural, tuple(captures.token)] = program

    def _forget(self, program: Program) -> None:
        """Drop a program whose trace failed: JAX keeps such a trace as one that fails."""
        with structure_lock:  # and no loop in it: see `core.interrupts`
            self.programs = dict(filter(lambda item: item[1] is not program, self.programs.items()))

    def _bind_again(self, call: PendingCall, key: tuple[Hashable, ...], old: Binding) -> None:
        """Note what tracing itself changed about the keys: names that count traces, closures that settle late."""
        if old.holds():
            return  # and so does its program
        if changed := old.captures.changed():
            self.ignored |= changed
            self._remember(old.structural, search(*call.functions, ignored=self.ignored), old.program)
        if old.epoch == structure.epoch and old.containers.unchanged():
            new = self._bind(call, key, old.extras, old.program)
            new.plan = old.plan

    @staticmethod
    def _static_parts(call: PendingCall, layout: Layout) -> Hashable:
        args, kwargs = call.args, call.kwargs
        return tuple((p, Static(args[p] if isinstance(p, int) else kwargs[p])) for p in sorted(layout.statics, key=str))

    def _keep(
        self, binding: Binding, key: tuple[Hashable, ...], nodes: list[tuple[str, Any]], functions: tuple[Any, ...]
    ) -> None:
        """Keep a binding for the next call with the same objects, until one of them dies."""
        captured = [node for _, node in binding.captures.roots]
        binding.captures.roots = []
        traced = any(cell._birth is not None for cell in binding.ambient)
        if binding.captures.ephemeral or traced or any(isinstance(node, Variable) for _, node in nodes):
            return  # a binding holds its cells, so it cannot wait for one to die
        me = weakref.ref(self)

        def drop(_: Any) -> None:
            compiler = me()
            if compiler is not None and compiler.bindings.get(key) is own:  # and not one that came in its place
                compiler.bindings.pop(key, None)
                compiler._captured.pop(key, None)

        reference = self.bindings.get(key)
        bindings = (None if reference is None else reference()) or Bindings()
        bindings.put_first(binding)
        own = reference if reference is not None and reference() is bindings else weakref.ref(bindings, drop)
        modules = [node for node in captured if not isinstance(node, Variable)]
        for obj in (*(node for _, node in nodes), *modules, *functions):
            try:
                binding.references.append(weakref.ref(obj, drop))
            except TypeError:
                return
        if nodes:
            owner = nodes[0][1]
            known_bindings(owner).setdefault(self, {})[key] = bindings
        else:
            self._captured[key] = bindings
        self.bindings[key] = own

    @staticmethod
    def _warn(cells: list[Variable], binding: Binding) -> None:
        for cell in cells:
            warnings.warn(
                f"state {naming.describe(cell)} was found while tracing `{binding.label}`, but neither its arguments "
                "nor the names it uses lead to it. It is threaded, but binding its name to another state (a class attribute, "
                "a registry, a cached factory) would not be noticed. Pass it as an argument, or name it in the function.",
                CapturedStateWarning,
                stacklevel=4,
            )

    # -- calling ---------------------------------------------------------------------------------------------

    def _prepare(self, call: PendingCall, flat: list[Any], types: list[Any] | None = None) -> DispatchPlan:
        """Trace, unless JAX has the trace, and learn from the record how to call.

        Args:
          request: the call.
          flat: the values of its arguments.
          types: those of the cells, if it is only to be lowered: that is no compilation, and is not logged.
        """
        binding, program = call.binding, call.program
        call.fast = False
        logged = types is None
        types = _types(binding.cells) if types is None else types
        started = time.perf_counter()
        with structure_lock:  # before JAX's own lock on the trace, always
            traced = program.undonated.trace(*types, *flat)
        (number,) = traced.out_info
        record = program.records[number]
        record.waits = _compat.has_host_callback(traced.jaxpr.jaxpr)
        binding.plan = DispatchPlan(binding.cells, program.variant_for(record), number, record)
        if logged and binding.plan.first is not None:
            call.seconds = [time.perf_counter() - started]
            call.compilation = self.log.begin(binding.label, facts_of(call))
        return binding.plan

    def _lower(self, call: PendingCall, flat: list[Any]) -> tuple[Program, int, Any]:
        types = _types(call.binding.cells)
        plan = self._prepare(call, flat, types)
        return call.program, plan.number, plan.variant.jitted.lower(*types, *flat)

    def _run_compiled(self, program: Program, number: int, compiled: Any, call: PendingCall, flat: list[Any]) -> Any:
        binding = call.binding
        if binding.program is not program or transactions.current() is not None:
            inside = "is called inside another transform" if binding.program is program else "is called with others"
            raise StructureError(
                f"`{binding.label}` was compiled for arguments of one structure and for itself, and {inside}",
                where=naming.where(),
                cure="Call what `mu.jit` returned: it compiles when it needs to. Or lower it for these arguments.",
            )
        record = program.records[number]
        plan = DispatchPlan(binding.cells, program.variant_for(record), number, record)
        plan.first = None
        with structure_lock if plan.restructures else contextlib.nullcontext():
            result = rebuild_result(binding, *launch(binding, plan, flat, compiled))
        notify(plan.observed)
        return result

    def _dispatch(self, call: PendingCall, flat: list[Any], *, locked: bool = False) -> Any:
        """The call of a compiled program from ordinary Python: donates, and commits to the cells."""
        binding = call.binding
        plan = binding.plan or self._prepare(call, flat)
        if plan.restructures and not locked:
            return self._restructure(call, flat)
        call.fast = True
        try:
            outcome = launch(binding, plan, flat, seconds=call.seconds)
        except NeedsTraceError:
            outcome = launch(binding, self._prepare(call, flat), flat, seconds=call.seconds)
        result = rebuild_result(binding, *outcome)
        if len(call.seconds) == 2:  # else another thread compiled it meanwhile
            self.log.end(call.compilation, *call.seconds)
        notify(plan.observed)
        return result

    def _restructure(self, call: PendingCall, flat: list[Any]) -> Any:
        """A call that changes structure: no other thread changes it between our look at it and our change."""
        with structure_lock:
            if not call.binding.holds():
                call.bind(self._bind(call, call.key, call.binding.extras))
            return self._dispatch(call, flat, locked=True)

    def _inline(self, call: PendingCall, flat: list[Any]) -> Any:
        """The call of a compiled program inside another transform or transaction."""
        binding, program = call.binding, call.program
        values = [access.load(cell) for cell in binding.cells]
        with structure_lock:  # before JAX's own lock on the trace, always
            ((number, (new, made, leaves)),) = program.undonated(*values, *flat).items()
        record = program.records[number]
        before = [values[index] for index in record.written]
        for index, value in zip(record.written, record.new.decode(new, before), strict=True):
            access.write(binding.cells[index], value)
        for index in record.restarted:
            access.restart(binding.cells[index])
        access.note_reads(binding.cells[index] for index in record.seen)
        return replay(record, binding.cells, binding.live_objects(), made, leaves)

    @staticmethod
    def _run(call: PendingCall) -> Any:
        """The function itself, all or nothing: under `jax.disable_jit`, and where it is to be seen what it does."""
        site = CallSite("jit", call.function, call.args, call.kwargs, functions=call.functions)
        with site:
            end, leaves, values = site.run({}, make=functools.partial(Transaction, compiled=True))
            return site.commit(end, values, leaves)
