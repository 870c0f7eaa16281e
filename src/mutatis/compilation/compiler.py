"""Compiling: how a stateful function is called at the cost of threading by hand.

Three things are kept, each for longer than the one before it: a **binding** for given objects (`binding`), a **program** for
a structure, found by a key without identities (`program`), and in it a **record** for each trace (`record`). Binding and program
are for given settings of JAX, too (x64, precision, meshes, whatever JAX would trace again for): under others a function may write
other states, and its values are not to go to the cells of these.

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
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax

from mutatis import _compat
from mutatis.compilation.binding import Binding, Bindings, survey
from mutatis.compilation.blame import explain
from mutatis.compilation.dispatch import launch, rebuild_result, run_inside, write_inside
from mutatis.compilation.layout import Arguments, Layout
from mutatis.compilation.log import Log, facts_of
from mutatis.compilation.options import Options
from mutatis.compilation.pending import PendingCall
from mutatis.compilation.plan import DispatchPlan
from mutatis.compilation.program import NeedsTraceError, Program, refuse_to_trace, tracing
from mutatis.compilation.record import replay, shapes_of
from mutatis.compilation.shardings import InShardings
from mutatis.compilation.tracer import FoundStates, StaleBinding, StartsLate, trace
from mutatis.core import access, avals, checks, frames, naming, transactions
from mutatis.core.avals import types_of
from mutatis.core.cells import UNSET
from mutatis.core.committed import notify
from mutatis.core.nodes import identity
from mutatis.core.placements import mesh_of
from mutatis.core.stamps import stamped
from mutatis.core.statics import Identity, WeakIdentity
from mutatis.core.structure import structure, structure_lock
from mutatis.core.transactions import Transaction
from mutatis.errors import ArgumentError, CapturedStateWarning, StructureError, see
from mutatis.model import contexts
from mutatis.model.modules import Module, known_bindings, watch_of
from mutatis.model.variables import Variable
from mutatis.tracing import traced
from mutatis.tracing.arguments import function_name
from mutatis.tracing.call_site import CallSite
from mutatis.tracing.captures import Captures

_ARRAY = _compat.ARRAY
_PATIENCE = 20  # traces
_LATEST = 16  # bindings
_NOTED = 64  # places


def _abstract(value: Any) -> Any:
    """What JAX traces for a value. No array: another thread may donate those meanwhile."""
    return _abstract_leaf(value) if type(value) is _ARRAY else jax.tree.map(_abstract_leaf, value)


def _abstract_leaf(array: Any) -> Any:
    placed = isinstance(array.sharding, jax.sharding.NamedSharding)  # a mesh is part of a type
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding if placed else None)


def _types(cells: Sequence[Variable]) -> list[Any]:
    """What JAX traces for cells."""
    return [_abstract(cell._value) for cell in cells]


class _Kept(dict[Any, Any]):
    """A dict that can be referred to weakly."""

    __slots__ = ("__weakref__",)


class Compiler:
    """All programs and bindings of one function (or of one transform over functions of the same code).

    Args:
      name: the transform's name.
      options: those of `mu.jit`.
      shared: whether functions share it that are no more than equal in code.
    """

    def __init__(self, name: str, options: Options, *, shared: bool = False) -> None:
        self.name = name
        self.options = options
        self._arguments = Arguments(name, options.static_argnums, options.static_argnames)
        self.shared = shared
        self.programs: dict[tuple[tuple[Hashable, ...], tuple[Hashable, ...]], Program] = {}
        # A binding for arguments lives on the first module among them, so that a cycle through it can be collected.
        self.bindings: dict[Hashable, weakref.ref[Bindings]] = {}
        self._captured: dict[Hashable, Bindings] = _Kept()  # those for captures only
        # Those with bare Variables among the arguments: a binding holds its cells, so it cannot wait for one to die.
        self._latest: deque[dict[Hashable, Bindings]] = deque(maxlen=_LATEST)
        self._traced: deque[traced.TracedPlace] = deque(maxlen=_NOTED)  # what tracing itself changes
        self.log = Log()

    def __call__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        functions: tuple[Any, ...] | None = None,
        operands: tuple[str, ...] = (),
        users: tuple[Any, ...] = (),
    ) -> Any:
        """Call a function through its program.

        Args:
          function: what is traced.
          args: its positional arguments.
          kwargs: its keyword arguments.
          functions: the functions whose captures count, if not `function`.
          operands: if the second argument is the operands of a loop or branch, their names for messages.
          users: the functions as the user gave them, if the compiler is shared.
        """
        inside = transactions.current() is not None
        if _compat.current_trace() is not _compat.EVAL_TRACE or (inside and frames.recorder() is not None):
            with stamped(None):  # the program takes all states as arguments
                return self._call(self._inline, function, args, kwargs, functions, operands, users)
        flat, key = self._key(args, kwargs, functions)
        found = self._known(key)
        if (
            found is not None
            and (binding := found.latest()).holds()
            and not (found.several and binding.settings != _compat.settings())
        ):
            plan = binding.plan
            ready = plan is not None and (inside or plan.first is None) and plan.treedef is not None
            if plan is not None and ready and not _compat.jit_disabled():
                try:
                    return self._call_again(binding, plan, flat, inside)
                except NeedsTraceError:
                    pass
                except Exception as error:
                    call = PendingCall(function, functions or (function,), args, kwargs, key, operands, users)
                    call.bind(binding)
                    explain(error, call, flat)
                    raise
        act = self._inline if inside else self._dispatch
        return self._call(act, function, args, kwargs, functions, operands, users)

    def _call_again(self, binding: Binding, plan: DispatchPlan, flat: list[Any], inside: bool) -> Any:
        """The call that most calls are: nothing to find out, and nothing to do but to run and to store.

        Raises:
          NeedsTraceError: it has to be traced after all, say because a setting of JAX is another. Nothing has been done.
        """
        before = tracing.run
        if before is not refuse_to_trace:  # this is code that interrupts a call which is being traced
            tracing.run = refuse_to_trace
        try:
            if inside:
                number, made, leaves = run_inside(plan, binding.current_cells(), flat)
            else:
                number, made, leaves = launch(plan, flat)
        except BaseException:
            _compat.restore_eager_trace()
            raise
        finally:
            if before is not refuse_to_trace:
                tracing.run = before
        return (
            plan.treedef.unflatten(leaves)
            if number == plan.number
            else rebuild_result(binding, plan.program, number, made, leaves)
        )

    def lower(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Program, int, Any]:
        """Lower the program of a call without calling it: the program, the number of its record, and what JAX lowered."""
        with stamped(None):
            return self._call(self._lower, function, args, kwargs)  # type: ignore[no-any-return]

    def trace(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Program, int, Any, Any]:
        """Trace the program of a call: as `lower`, but what JAX traced, and the shapes of the user's result."""
        with stamped(None):
            return self._call(self._trace, function, args, kwargs)  # type: ignore[no-any-return]

    def eval_shape(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The shapes of the result of a call, which is traced and not made."""
        return self.trace(function, args, kwargs)[-1]

    def clear(self) -> None:
        """Forget all programs, and what is known of objects."""
        with structure_lock:
            self._invalidate_all()
            self.programs, self.bindings, self._captured = {}, {}, _Kept()
            self._latest.clear()

    def _invalidate_all(self) -> None:
        # A function of its own, as `core.interrupts` says of loops under a lock.
        for reference in self.bindings.values():
            if (bindings := reference()) is not None:
                bindings.first.invalidate()

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
        operands: tuple[str, ...] = (),
        users: tuple[Any, ...] = (),
    ) -> Any:
        """Find the binding of a call, and do something with it."""
        flat, key = self._key(args, kwargs, functions)
        if functions is None:
            functions = (function,)
        call = PendingCall(function, functions, args, kwargs, key, operands, users)
        call.may_start = act == self._dispatch
        found = self._known(key)
        if found is None:
            binding = self._bind(call, key, [])
        elif (binding := found.first).settings != call.settings or not binding.holds():
            binding = found.find(call.settings) or self._bind(call, key, binding.extras)
        before = tracing.run
        tracing.run = functools.partial(trace, call)
        try:
            while True:
                call.bind(binding)
                try:
                    if _compat.jit_disabled():
                        return self._run(call)
                    if frames.recorder() is not None:
                        result = self._run(call)
                        self._note_traced(binding)
                        return result
                    result = act(call, flat)
                    if call.traced:
                        self._bind_again(call, key, call.binding)
                    return result
                except StaleBinding:
                    self._forget(call.program)
                    binding.invalidate()
                    self._count_stale(call)
                    binding = self._bind(call, key, binding.extras)
                except StartsLate as late:
                    self._forget(call.program)
                    binding.invalidate()
                    self._start(call, late.cells)
                    binding = self._bind(call, key, binding.extras)
                except FoundStates as found:
                    self._warn(found.cells, binding)
                    binding.invalidate()
                    binding = self._bind(call, key, [*binding.extras, *found.cells])
        except BaseException as error:
            if call.outer is _compat.EVAL_TRACE:
                _compat.restore_eager_trace()
            access.write_many(call.started, [UNSET] * len(call.started))
            if isinstance(error, Exception):
                explain(error, call, flat)
            raise
        finally:
            tracing.run = before

    @staticmethod
    def _start(call: PendingCall, cells: list[Variable]) -> None:
        """Give states with `init` their first value: as inputs they are, or the next call would compile once more.

        Not if that reads or draws from other states: then it matters when it happens.
        """
        call.may_start = False
        with Transaction("init") as tx:
            for cell in cells:
                cell.get()
            values = [tx.values[cell] for cell in cells]
        if {*tx.seen, *tx.written} <= {*cells} and not tx.born:
            call.started = cells
            access.write_many(cells, values)

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
        flat, key = self._arguments.divide(args, kwargs)
        if contexts.active():
            key = (*key, contexts.key())
        if functions is not None:
            key = (*key, *map(identity, functions))
        return flat, key

    def _known(self, key: tuple[Hashable, ...]) -> Bindings | None:
        """The bindings for the objects of a key."""
        reference = self.bindings.get(key)
        return None if reference is None else reference()

    def _bind(
        self, call: PendingCall, key: tuple[Hashable, ...], extras: list[Variable], program: Program | None = None
    ) -> Binding:
        """Walk over the objects of a call and find the program for their structure, unless it is given."""
        layout = self._arguments.layout(call.args, call.kwargs)
        label = f"{self.name}({self._title(call)})"
        binding = Binding(label, call.settings, layout, extras)
        with structure_lock:
            nodes = call.nodes(layout)
            captures, call.found = survey(call.searched(layout), nodes, extras)
            scope = call.found
            captures.ephemeral = captures.ephemeral or scope.encoder.ephemeral
            binding.keep_walk(scope, captures)
        said = self._in_shardings(call, layout, label)
        placed = [] if said is None else said.by_cell
        placements = [None if cell in placed else access.placement(cell) for cell in scope.cells]
        if any(placements) and access.is_outside():
            apart = {*placed, *contexts.cells()}
            pairs = zip(scope.cells, placements, strict=True)
            if access.replicate([c for c, place in pairs if not place and c not in apart], mesh_of(placements)):
                return self._bind(call, key, extras, program)
        binding.structural = (
            call.settings,
            layout.static_parts(call.args, call.kwargs),
            layout.positions,
            tuple(layout.mixed.items()),
            binding.structure,
            tuple(placements),
            tuple(map(Identity, extras)),
            contexts.structure(),
        )
        binding.token = self._token(call, captures)
        if program is None:
            program = self.programs.get((binding.structural, binding.token))
        if program is None:
            shardings = None
            if said is not None:
                shardings = tuple(said.by_cell.get(cell, _compat.UNSPECIFIED) for cell in scope.cells)
                shardings += tuple(said.by_position[position] for position in layout.positions)
            program = Program(
                self.options,
                self._title(call),
                call.settings,
                len(scope.cells),
                layout.positions,
                placements,
                shardings,
            )
        if not captures.ephemeral:
            self._remember(binding.structural, binding.token, program)
        binding.program = program
        self._keep(binding, key, nodes, call.functions)
        return binding

    def _in_shardings(self, call: PendingCall, layout: Layout, label: str) -> InShardings | None:
        """What `in_shardings` says of a call; None if nothing is said."""
        if self.options.in_shardings is _compat.UNSPECIFIED:
            return None
        if call.kwargs.keys() - layout.statics:
            raise ArgumentError(
                "`in_shardings` says nothing of arguments by keyword",
                where=label,
                expected="arguments by position: `in_shardings` has an entry for each",
                got=", ".join(map(str, call.kwargs.keys() - layout.statics)),
                cure="Pass them by position.",
            )
        args = {position: value for position, value in enumerate(call.args) if position not in layout.statics}
        return InShardings(self.options.in_shardings, args, label)

    @staticmethod
    def _title(call: PendingCall) -> str:
        return ", ".join(map(function_name, call.functions))

    def _token(self, call: PendingCall, captures: Captures) -> tuple[Hashable, ...]:
        """What of a function decides, beside the structure, which program it gets."""
        if not (captures.opaque and self.shared):
            return tuple(captures.token)
        # What it captured may change unseen: another function, though it looks the same, gets a program of its own.
        me = weakref.ref(self)

        def ended(key: WeakIdentity) -> None:
            if (compiler := me()) is not None:
                compiler.programs = {k: program for k, program in compiler.programs.items() if key not in k[1]}

        return (*captures.token, *(WeakIdentity(function, ended) for function in call.users))

    def _remember(self, structural: tuple[Hashable, ...], token: tuple[Hashable, ...], program: Program) -> None:
        """Keep a program under the key of a structure and of what the function captured."""
        with structure_lock:
            self.programs[structural, token] = program

    def _forget(self, program: Program) -> None:
        """Drop a program whose trace failed: JAX keeps such a trace as one that fails."""
        with structure_lock:  # and no loop in it: see `core.interrupts`
            self.programs = dict(filter(lambda item: item[1] is not program, self.programs.items()))

    def _bind_again(self, call: PendingCall, key: tuple[Hashable, ...], old: Binding) -> None:
        """Bind the objects anew after a trace, for the next call."""
        if old.holds():
            return  # and so does its program
        self._rekey(call, old)
        if old.epoch == structure.epoch and old.containers.unchanged():
            new = self._bind(call, key, old.extras, old.program)
            new.plan = old.plan

    def _rekey(self, call: PendingCall, old: Binding) -> None:
        """Have the key of a program allow for what its own trace has changed about the names."""
        if self._note_traced(old) and call.walked is not None and not old.captures.ephemeral:
            if self.shared:  # a function with places of its own runs, and changes those
                with structure_lock:
                    self.programs.pop((old.structural, old.token), None)
            captures = survey(call.searched(old.layout), scope=call.walked)[0]
            self._remember(old.structural, self._token(call, captures), old.program)

    def _note_traced(self, binding: Binding) -> bool:
        """Note what has changed about what a function named since it began to run on tracers; whether anything has."""
        with structure_lock:  # a trace of another thread changes structure in place
            changes = binding.captures.guards.changed()
        noted = [traced.note(place, now) for place, now in changes]
        places = [place for place in noted if place is not None]
        self._traced.extend(places)
        return bool(places)

    def _keep(
        self, binding: Binding, key: tuple[Hashable, ...], nodes: list[tuple[str, Any]], functions: tuple[Any, ...]
    ) -> None:
        """Keep a binding for the next call with the same objects, until one of them dies."""
        captured = [node for _, node in binding.captures.roots]
        binding.captures.roots = []
        if binding.captures.ephemeral or any(cell._birth is not None for cell in contexts.cells()):
            return
        if any(map(access.is_made_here, binding.cells)):  # it would keep them beyond the trace that they belong to
            return
        me = weakref.ref(self)
        kept: dict[Any, Any]
        if any(isinstance(node, Variable) for _, node in nodes):
            kept = _Kept()  # by those that are the latest
        else:
            kept = known_bindings(nodes[0][1]).setdefault(self, _Kept()) if nodes else self._captured
        where_kept = weakref.ref(kept)

        def drop(_: Any) -> None:
            compiler = me()
            if compiler is not None and compiler.bindings.get(key) is own:  # and not one that came in its place
                compiler.bindings.pop(key, None)
                if (still := where_kept()) is not None:
                    still.pop(key, None)

        reference = self.bindings.get(key)
        bindings = (None if reference is None else reference()) or Bindings()
        bindings.put_first(binding)
        own = reference if reference is not None and reference() is bindings else weakref.ref(bindings, drop)
        ambient = contexts.nodes()
        for obj in (*(node for _, node in nodes), *captured, *functions, *ambient):
            if not isinstance(obj, Variable | list | tuple | dict):  # those are held
                try:
                    binding.references.append(weakref.ref(obj, drop))
                except TypeError:
                    return
        for holder in [node for node in (*(node for _, node in nodes), *captured) if isinstance(node, Module)][:1]:
            for node in filter(contexts.recurs, ambient):
                watch_of(holder).keep(node)
        kept[key] = bindings
        if any(isinstance(node, Variable) for _, node in nodes):
            self._latest.append(kept)
        self.bindings[key] = own

    @staticmethod
    def _warn(cells: list[Variable], binding: Binding) -> None:
        for cell in cells:
            warnings.warn(
                f"state {naming.describe(cell)} was found while tracing `{binding.label}`, but neither its arguments "
                "nor the names it uses lead to it. It is threaded, but binding its name to another state (a class attribute, "
                "a registry, a cached factory) would not be noticed. Pass it as an argument, or name it in the function. "
                f"{see(CapturedStateWarning)}",
                CapturedStateWarning,
                stacklevel=4,
            )

    # -- calling ---------------------------------------------------------------------------------------------

    def _prepare(self, call: PendingCall, flat: list[Any], types: list[Any] | None = None) -> DispatchPlan:
        """Trace, unless JAX has the trace, and learn from the record how to call.

        Args:
          call: the call.
          flat: the values of its arguments.
          types: those of the cells, if it is only to be lowered: that is no compilation, and is not logged.
        """
        binding, program = call.binding, call.program
        call.fast = False
        logged = types is None
        values = [cell._value for cell in binding.cells] if types is None else types
        started = time.perf_counter()
        key = types_of([*values, *flat])
        number = program.known(key)
        if number is None:
            with structure_lock, transactions.tracing():  # the lock before JAX's own one on the trace, always
                found = program.undonated.trace(*map(_abstract, values), *flat)
            (number,) = found.out_info
            program.records[number].waits = _compat.has_host_callback(found.jaxpr.jaxpr)
            program.note(key, number)
        record = program.records[number]
        binding.plan = DispatchPlan(
            program, binding.cells, binding.ambient, program.variant_for(record), number, record
        )
        if logged and binding.plan.first is not None:
            call.seconds = [time.perf_counter() - started]
            with structure_lock:  # a trace of another thread changes structure in place
                facts = facts_of(call)
            call.compilation = self.log.begin(binding.label, facts)
        return binding.plan

    def _lower(self, call: PendingCall, flat: list[Any]) -> tuple[Program, int, Any]:
        types = _types(call.binding.cells)
        plan = self._prepare(call, flat, types)
        return call.program, plan.number, plan.variant.jitted.lower(*types, *flat)

    def _trace(self, call: PendingCall, flat: list[Any]) -> tuple[Program, int, Any, Any]:
        types = _types(call.binding.cells)
        plan = self._prepare(call, flat, types)
        with structure_lock, transactions.tracing():
            found = plan.variant.jitted.trace(*types, *flat)
        ((_, made, leaves),) = found.out_info.values()
        record = call.program.records[plan.number]
        shapes = shapes_of(record, call.binding.cells, call.binding.live_objects(), made, leaves)
        return call.program, plan.number, found, shapes

    def _run_compiled(self, program: Program, number: int, compiled: Any, call: PendingCall, flat: list[Any]) -> Any:
        binding = call.binding
        # It may be called under other settings.
        key = ((program.settings, *binding.structural[1:]), binding.token)
        known = program in (binding.program, self.programs.get(key))
        if not known or transactions.current() is not None:
            what = "to be called by itself" if known else "for arguments of another structure"
            raise StructureError(
                f"`{binding.label}` was compiled {what}",
                where=naming.where(),
                cure="Call what `mu.jit` returned: it compiles when it needs to. Or lower it for these arguments.",
            )
        record = program.records[number]
        plan = DispatchPlan(program, binding.cells, binding.ambient, program.variant_for(record), number, record)
        plan.first = None
        with structure_lock if plan.restructures else contextlib.nullcontext():
            result = rebuild_result(binding, program, *launch(plan, flat, compiled))
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
            outcome = launch(plan, flat, seconds=call.seconds)
        except NeedsTraceError:
            plan.program.forget_traces()
            plan = self._prepare(call, flat)
            outcome = launch(plan, flat, seconds=call.seconds)
        result = rebuild_result(binding, plan.program, *outcome)
        if len(call.seconds) == 2:  # else another thread compiled it meanwhile
            self.log.end(call.compilation, *call.seconds)
        notify(plan.observed)
        return result

    def _restructure(self, call: PendingCall, flat: list[Any]) -> Any:
        """A call that changes structure: no other thread changes it between our look at it and our change."""
        with structure_lock:
            if not call.binding.holds():
                if call.traced:
                    self._rekey(call, call.binding)
                call.bind(self._bind(call, call.key, call.binding.extras))
            return self._dispatch(call, flat, locked=True)

    def _inline(self, call: PendingCall, flat: list[Any]) -> Any:
        """The call of a compiled program inside another transform or transaction."""
        binding, program = call.binding, call.program
        cells = binding.current_cells()
        values = access.load_many(cells)
        outside = call.outer is _compat.EVAL_TRACE and frames.recorder() is None
        if binding.plan is None and outside and all(map(avals.fits_program, map(access.peek_committed, cells), values)):
            self._prepare(call, flat, _types(binding.cells))  # for the next call
        returned = self._run_inline(program, values, flat)
        if call.outer is _compat.EVAL_TRACE:  # it has run, and has not failed yet
            (record,) = map(program.records.get, returned)
            if record is not None and record.waits is not False:
                checks.expect()
        number, made, leaves = write_inside(program, cells, values, returned)
        return replay(program.records[number], cells, binding.live_objects(), binding.places, made, leaves)

    @staticmethod
    def _run_inline(program: Program, values: list[Any], flat: list[Any]) -> Any:
        with structure_lock, transactions.tracing():  # the lock before JAX's own one on the trace, always
            return program.undonated(*values, *flat)

    @staticmethod
    def _run(call: PendingCall) -> Any:
        """The function itself, all or nothing: under `jax.disable_jit`, and where it is to be seen what it does."""
        site = CallSite("jit", call.function, call.args, call.kwargs, functions=call.functions)
        with site:
            end, leaves, values = site.run({}, make=functools.partial(Transaction, compiled=True))
            return site.commit(end, values, leaves)
