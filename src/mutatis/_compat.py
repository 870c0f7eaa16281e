"""The only file that touches JAX internals; everything else uses public JAX.

Each name says which internal it stands for and why there is no public way. Both JAX 0.10 and 0.12 have them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax
from jax._src import array as _array
from jax._src import callback as _callback
from jax._src import config as _config
from jax._src import core, traceback_util
from jax._src import debugging as _debugging
from jax._src import dispatch as _dispatch
from jax._src import distributed as _distributed
from jax._src import source_info_util as _source_info
from jax._src.interpreters import batching, partial_eval
from jax._src.sharding_impls import UNSPECIFIED

__all__ = [
    "ARRAY",
    "EVAL_TRACE",
    "NO_STAMP",
    "UNSPECIFIED",
    "Trace",
    "as_function",
    "at_trace",
    "called_program",
    "current_trace",
    "distributed_client",
    "dtypes_in",
    "forget_failed_callbacks",
    "has_host_callback",
    "hide_frames",
    "inputs_of",
    "is_batched",
    "is_literal",
    "is_of_jax",
    "is_per_lane",
    "raw_transform_name",
    "restore_eager_trace",
    "run_equation",
    "scan_inputs",
    "set_stamp_of_all",
    "settings",
    "lines_of",
    "load_late_settings",
    "log_no",
    "staging_trace",
    "stamp",
    "swap_stamp",
    "trace_settings",
    "type_of",
    "varying_axes",
    "weak_trace",
]

Trace = core.Trace
ARRAY = _array.ArrayImpl  # the class of concrete arrays; the public way, `type(jnp.zeros(()))`, starts the devices

# `get_opaque_trace_state` is the public twin of `trace_ctx.trace`, three times slower, and it cannot tell
# which kind of transform is tracing.
_context = core.trace_ctx
EVAL_TRACE = core.eval_trace


def current_trace() -> Any:
    """The trace that JAX operations of this thread go to now; `EVAL_TRACE` outside all transforms."""
    return _context.trace


def restore_eager_trace() -> None:
    """Undo what an interrupt inside JAX's own switching of traces leaves behind: no trace at all, for good."""
    if _context.trace is None:
        _context.set_trace(EVAL_TRACE)


def weak_trace(trace: Any) -> Any:
    """A weak reference to a trace: a strong one would look like a leak to `jax.checking_leaks`."""
    return trace._weakref


@contextlib.contextmanager
def at_trace(trace: Any) -> Iterator[None]:
    """Run operations at an enclosing trace, so that their results belong to it."""
    with core.set_current_trace(trace):  # in `jax.extend.core` too, which imports thirty modules
        yield


def staging_trace(trace: Any, ours: Any = None, local: Any = None) -> Any:
    """The innermost trace, from `trace` out to `ours` or `local`, that builds a program which JAX may reuse; None without one.

    Those are jit, scan, while, cond, checkpoint, as opposed to grad, vmap, jvp. `ours` and `local` themselves do not count.
    """
    while trace is not None and trace is not ours and trace is not local and trace is not EVAL_TRACE:
        if isinstance(trace, partial_eval.DynamicJaxprTrace):
            return trace
        trace = getattr(trace, "parent_trace", None)
    return None


# `jax.make_user_context` is public, but it cannot be changed inside its own block.
_stamps = jax.make_user_context()._obj
NO_STAMP = _stamps.swap_local(None)  # what says that a thread has none of its own
_stamps.set_local(NO_STAMP)


def stamp() -> Any:
    """This thread's part of the keys of JAX's traces that is ours."""
    return _stamps.value


def swap_stamp(value: Any) -> Any:
    """Set it; what to set it to, to have it as it was."""
    return _stamps.swap_local(value)


def set_stamp_of_all(value: Any) -> None:
    """Set it for all threads that have none of their own."""
    _stamps.set_global(value)


_RAW_NAMES = {
    "DynamicJaxprTrace": "jax.jit, jax.lax control flow or jax.checkpoint",
    "LinearizeTrace": "jax.grad, jax.vjp or jax.linearize",
    "JVPTrace": "jax.jvp or jax.grad",
    "BatchTrace": "jax.vmap",
}


def raw_transform_name(trace: Any) -> str:
    """The raw JAX transforms that make this kind of trace, for messages."""
    return _RAW_NAMES.get(type(trace).__name__, type(trace).__name__)


def is_batched(value: Any, trace: Any) -> bool:
    """Whether `value` differs per lane of the `jax.vmap` that made `trace`."""
    return isinstance(value, batching.BatchTracer) and value._trace is trace and value.batch_dim is not None


def is_per_lane(value: Any) -> bool:
    """Whether a value is that of one lane of some `jax.vmap`."""
    return isinstance(value, batching.BatchTracer)


def distributed_client() -> Any:
    """The client of the service that `jax.distributed.initialize` starts; None without one."""
    return _distributed.global_state.client


def varying_axes(value: Any) -> frozenset[Any]:
    """The mesh axes of a `shard_map` along which a value differs from device to device; the types show them (``V:x``)."""
    return frozenset(jax.typeof(value).mat.varying)


def type_of(value: Any, drop: int = 0) -> jax.ShapeDtypeStruct:
    """The whole type of an array, or of what indexing its first `drop` axes gives: with mesh axes, split and varying."""
    kind = jax.typeof(value)
    mesh, spec = kind.sharding.mesh, tuple(kind.sharding.spec)[drop:]
    sharding = None if mesh.empty else jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(kind.shape[drop:], kind.dtype, sharding=sharding, manual_axis_type=kind.mat)


def has_host_callback(jaxpr: Any) -> bool:
    """Whether a program calls back into Python code of the user's (a debug print does not count)."""
    return any(equation.primitive.name in _CALLBACKS for equation in _equations(jaxpr))


def dtypes_in(jaxpr: Any) -> set[Any]:
    """The dtypes of all values in a program."""
    variables = [*jaxpr.invars, *jaxpr.constvars, *jaxpr.outvars]
    for equation in _equations(jaxpr):
        variables += [*equation.invars, *equation.outvars]
    return {variable.aval.dtype for variable in variables if hasattr(variable.aval, "dtype")}


def _equations(jaxpr: Any) -> Iterator[Any]:
    """The equations of a program, and of those in it."""
    pending = [jaxpr]
    seen = {id(jaxpr)}
    while pending:
        for equation in pending.pop().eqns:
            yield equation
            for inner in core.jaxprs_in_params(equation.params):
                if id(inner) not in seen:  # most are there several times
                    seen.add(id(inner))
                    pending.append(inner)


def trace_settings() -> int:
    """A number for the settings that are part of JAX's trace keys, the same for the same ones."""
    return _settings_seen.setdefault(settings(), len(_settings_seen) + 1)


_settings_seen: dict[Hashable, int] = {}


@functools.cache
def load_late_settings() -> None:
    """Have the settings of Pallas be part of JAX's trace keys from now on.

    They become so when Pallas is imported, and Orbax imports it: all that was traced before is traced again then.
    """
    with contextlib.suppress(ImportError):
        importlib.import_module("jax._src.pallas.core")


def scan_inputs(params: Any) -> tuple[int, int]:
    """How many inputs of a `scan` equation are constants, and how many are carried. JAX 0.12 keeps the inputs by group."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carried, _ = params["ft_in"].unpack()
    return len(constants), len(carried)


_CALLBACKS = frozenset({"pure_callback", "io_callback", "debug_callback"})


def jit_disabled() -> bool:
    """Whether `jax.disable_jit` is on. `jax.config.jax_disable_jit` is the public, slower way."""
    return bool(_config.disable_jit.value)


def checks_results() -> bool:
    """Whether `jax_debug_nans` or `jax_debug_infs` is on: then a call may fail after it has run."""
    return bool(_config.debug_nans.value or _config.debug_infs.value)


def settings() -> Hashable:
    """JAX's settings, as far as they are part of the keys of its traces: this thread's and the global ones."""
    return _config.trace_context()  # type: ignore[no-any-return]


def hide_frames(folder: str) -> None:
    """Leave the frames of files under `folder` out of JAX's tracebacks, and of where it says that operations are."""
    traceback_util.register_exclusion(folder)
    _source_info.register_exclusion(folder)


def forget_failed_callbacks() -> None:
    """Have nobody who waits for calls back into Python, as the end of a process does, hear of those that have failed already."""
    tokens = _dispatch.runtime_tokens.output_runtime_tokens
    for device, token in [*tokens.items()]:
        try:
            token.block_until_ready()
        except jax.errors.JaxRuntimeError:
            tokens.pop(device, None)


def log_no(kind: type[BaseException]) -> None:
    """Have JAX not log that a call back into Python has raised this: it raises it, too."""
    for module in (_debugging, _callback):
        module.logger.addFilter(lambda record: not (record.exc_info and isinstance(record.exc_info[1], kind)))


def run_equation(equation: Any, values: Any) -> list[Any]:
    """Run one equation of a program on values. (`jax.core.eval_jaxpr`, which runs all of a program, is no more public.)"""
    kept = {name: value for name, value in equation.params.items() if name != "donated_invars"}
    if len(kept) < len(equation.params):  # a function under `jit` may delete its arguments, which are needed later
        kept["donated_invars"] = (False,) * len(equation.invars)
    parameters = equation.primitive.get_bind_params(kept)
    with equation.ctx.manager:
        out = equation.primitive.bind(*values, **parameters)
    return list(out) if equation.primitive.multiple_results else [out]


def as_function(closed: Any) -> Callable[..., list[Any]]:
    """A program as a function of its arguments. (`jax.extend.core.jaxpr_as_fun` is the public way; it imports Pallas.)"""
    return functools.partial(core.eval_jaxpr, closed.jaxpr, closed.consts)


def inputs_of(jaxpr: Any) -> list[Any]:
    """The variables that the values of a program's constants and arguments are given to, in this order."""
    return [*jaxpr.constvars, *jaxpr.invars]


def is_literal(atom: Any) -> bool:
    """Whether an input of an equation is a constant that stands in it."""
    return isinstance(atom, core.Literal)


def lines_of(equation: Any) -> Iterator[tuple[str, int, str]]:
    """Where an equation comes from, the innermost call first: file, line, function. (JAX's own frames are left out.)"""
    for frame in _source_info.user_frames(equation.source_info.traceback):
        yield frame.file_name, frame.start_line, frame.function_name


def called_program(equation: Any) -> Any:
    """The program that an equation calls with its own inputs, as `jit` and `checkpoint` do; None if it does something else."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr", "call"):
        closed = equation.params.get(name)
        if isinstance(closed, core.Jaxpr) and not hasattr(closed, "jaxpr") and not closed.constvars:
            closed = core.ClosedJaxpr(closed, ())  # in JAX 0.12 each program has its constants
        if hasattr(closed, "jaxpr"):
            inner = [variable.aval for variable in closed.jaxpr.invars]
            outer = [atom.aval for atom in equation.invars]
            if len(closed.jaxpr.outvars) == len(equation.outvars) and _same_shapes(inner, outer):
                return closed
    return None


def is_of_jax(closed: Any) -> bool:
    """Whether the function that a program was traced from is one of JAX itself, such as `jnp.log1p`."""
    place = str(closed.jaxpr.debug_info.func_src_info).partition(" at ")[2]  # "log1p at /.../ufuncs.py:60"
    return place.startswith(os.path.dirname(jax.__file__))


def _same_shapes(inner: list[Any], outer: list[Any]) -> bool:
    return len(inner) == len(outer) and all(
        getattr(a, "shape", None) == getattr(b, "shape", None) for a, b in zip(inner, outer, strict=True)
    )
