"""Records: what states were over time, without a change of the model; and loops whose results do not fit in memory."""

from __future__ import annotations

import contextlib
import difflib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mutatis import _compat, _homes
from mutatis._packages import require
from mutatis.core import access, naming
from mutatis.core.avals import is_concrete, numbers_of, show_type
from mutatis.core.calls import as_integer, is_count
from mutatis.core.naming import show_path
from mutatis.core.nodes import Reference, is_node
from mutatis.core.showing import show_value
from mutatis.errors import (
    ArgumentError,
    DeferredStateError,
    FilterError,
    LaneError,
    StateTypeError,
    StructureError,
    TraceLevelError,
)
from mutatis.model.filters import FilterLike, as_filter
from mutatis.model.kinds import MetricState
from mutatis.model.modules import Module
from mutatis.model.state import State
from mutatis.model.variables import Variable, lanes_of
from mutatis.model.walks import check_node, variables
from mutatis.transforms.loops import for_loop

__all__ = ["Monitor", "stream"]


class Monitor(Module):
    """Records the values of states of a model, at each call or at each n-th call, in arrays that are made once.

    Call it after a step of a Python loop, or in the body of `mu.for_loop`, `mu.scan` or `mu.while_loop`. The model does not
    change. The record has a fixed size, and calls after it is full are not recorded. ``mu.reset(monitor)`` starts it anew.

    A monitor is for states of the shapes that they have when it is made. So make it after a reset to a batch. `mu.vmap` makes one
    for each lane, if the model and the monitor are made in the lanes; then the records have an axis for the lanes in front.

    Args:
      node: a Module, a Variable, or a list, tuple or dict of them.
      *which: the states to record: paths as they are printed (``"layers[0].v"``), or filters (``mu.Hidden``). Without any, all.
      length: the number of calls for which there is room.
      every: a call is recorded if its number, counted from 0, is a multiple of this.
      index: the part of each state to record, along its first axis: a slice, an integer, or a sequence of integers or booleans,
        such as ``slice(0, 10)``. Booleans choose the places where they are True. After ``mu.reset(net, mu.Hidden,
        batch_shape=32)`` the first axis is that of the batch. A state without axes is recorded as it is. None records the whole.

    Attributes:
      calls: MetricState, an int32 scalar, the number of calls.
      kept: a dictionary from printed paths to the records, MetricStates of shape (ceil(length / every), *shape).

    Raises:
      ArgumentError: `length` or `every` is no integer above 0, or `index` is none that all of the states have.
      FilterError: a path or a filter selects no state.
      DeferredStateError: a state has no value yet.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> net = mu.nn.LIF(100)
      >>> monitor = mu.recording.Monitor(net, "v", length=1000, every=10, index=slice(0, 3))
      >>> @mu.jit
      ... def run(net, monitor):
      ...     def step(x):
      ...         net(x)
      ...         monitor()
      ...     mu.for_loop(step, jnp.full((1000, 100), 1.2))
      >>> run(net, monitor)
      >>> monitor.state["v"].shape, monitor.times[:3]
      ((100, 3), Array([ 0, 10, 20], dtype=int32))
    """

    def __init__(self, node: Any, *which: str | FilterLike, length: int, every: int = 1, index: Any = None) -> None:
        counts = {"length": as_integer(length), "every": as_integer(every)}
        for name, number in counts.items():
            if number is None or number < 1:
                given = length if name == "length" else every
                raise ArgumentError(
                    f"a monitor cannot have {name}={show_value(given)}",
                    path=name,
                    expected="an int, from 1",
                    got=show_value(given),
                    cure="`mu.recording.Monitor(net, 'v', length=1000, every=10)`",
                )
        self._node = Reference(check_node(node))
        self.every = int(every)
        self.length = int(length)
        part, mask = _as_index(index)
        self._slice = (part.start, part.stop, part.step) if isinstance(part, slice) else None
        self._index = None if isinstance(part, slice) else part
        chosen = _chosen(node, which)
        self._paths = tuple(chosen)
        room = self._room
        self.calls = MetricState(0, init=0)
        self.kept: dict[str, MetricState[Any]] = {}
        for path, cell in chosen.items():
            if cell.deferred:
                raise DeferredStateError(
                    f"state `{show_path(path)}` cannot be recorded: it has no value yet",
                    path=show_path(path),
                    made_at=cell.made_at,
                    cure="Call the model once, which creates it.",
                )
            for leaf in jax.tree.leaves(access.read(cell)):
                _check_index(path, leaf.shape, part, mask)
            leaves, treedef = jax.tree.flatten(self._parts(cell))
            empty = functools.partial(_empty, treedef, tuple(((room, *x.shape), str(x.dtype)) for x in leaves))
            self.kept[show_path(path)] = MetricState(empty(), init=empty)
        self._types = tuple(show_type(access.read(cell)) for cell in chosen.values())

    def __call__(self) -> None:
        """Record the present values, if it is the turn of this call and the record is not full.

        Raises:
          StateTypeError: a state has another shape or dtype than when the monitor was made.
          StructureError: the model no longer has a state.
          LaneError: it is a monitor for each lane, called outside of them.
        """
        cells = variables(self._node.value)
        number = self.calls.value
        self._check(cells, number)
        place = number // self.every
        keeps = (number % self.every == 0) & (place < self._room)
        at = jnp.minimum(place, self._room - 1)
        for path in self._paths:
            record = self.kept[show_path(path)]

            def put(kept: jax.Array, now: jax.Array) -> jax.Array:
                # What is not kept is written over itself: one slice, and no copy of the record.
                old = jax.lax.dynamic_index_in_dim(kept, at, keepdims=False)
                return jax.lax.dynamic_update_index_in_dim(kept, jnp.where(keeps, now, old), at, 0)

            record.value = jax.tree.map(put, record.value, self._parts(cells[path]))
        self.calls.value = number + 1

    def _check(self, cells: dict[Any, Variable], number: jax.Array) -> None:
        """Raise unless the states are those that the monitor was made for."""
        if number.ndim:
            raise LaneError(
                "a monitor for each lane is called outside of `mu.vmap`",
                path="calls",
                where=naming.where(),
                expected="a number of calls",
                got=show_type(number),
                cure="`mu.vmap(lambda net, monitor: monitor())(net, monitor)` records in all lanes.",
            )
        for path, kind in zip(self._paths, self._types, strict=True):
            if path not in cells:
                raise StructureError(
                    f"state `{show_path(path)}` cannot be recorded: the model no longer has it",
                    path=show_path(path),
                    where=naming.where(),
                    cure="Make a new monitor of the model: `mu.recording.Monitor(net, length=1000)`.",
                )
            if (now := show_type(access.read(cells[path]))) != kind:
                raise StateTypeError(
                    f"state `{show_path(path)}` cannot be recorded: its type has changed since the monitor was made",
                    path=show_path(path),
                    where=naming.where(),
                    expected=kind,
                    got=now,
                    made_at=cells[path].made_at,
                    cure="Make the monitor when the states have their shapes: after "
                    "`mu.reset(net, mu.Hidden, batch_shape=(32,))`, or in the lanes of `mu.vmap`.",
                )

    def _parts(self, cell: Variable) -> Any:
        """What is recorded of a state; random keys as what they are made of."""
        return jax.tree.map(lambda x: numbers_of(self._part(x)), access.read(cell))

    def _part(self, x: jax.Array) -> jax.Array:
        if x.ndim == 0:
            return x
        if self._slice is not None:
            return x[slice(*self._slice)]
        if self._index is None:
            return x
        return x[np.array(self._index, np.int32)] if isinstance(self._index, tuple) else x[self._index]

    @property
    def _room(self) -> int:
        return -(-self.length // self.every)

    @property
    def count(self) -> int:
        """The number of calls that are recorded so far; of a monitor for each lane, in each of them.

        Raises:
          LaneError: the lanes have made different numbers of calls.
          TraceLevelError: a function is traced, in which the number is not known.
        """
        calls = self.calls.value
        if not is_concrete(calls):
            raise TraceLevelError(
                "the length of a record is not known while a function is traced",
                path="calls",
                where=naming.where(),
                cure="Read the record after the call, `monitor.state`; or take all of its rows, also those that are still empty: "
                "`monitor.kept['v'].value`, beside `monitor.calls.value`.",
            )
        numbers = np.unique(np.asarray(calls)).tolist()
        if len(numbers) > 1:
            raise LaneError(
                "the lanes of a monitor have made different numbers of calls",
                path="calls",
                expected="records of one length",
                got=f"{', '.join(map(str, numbers[:8]))} calls",
                cure="Take the rows of a lane from the whole record, `monitor.kept['v'].value[lane]`; "
                "`monitor.calls.value[lane]` says how many calls it has made.",
            )
        return min(-(-max(numbers, default=0) // self.every), self._room)

    @property
    def times(self) -> jax.Array:
        """The numbers of the recorded calls, counted from 0: integers of shape (count,). It raises as `count` does."""
        return jnp.arange(self.count) * self.every

    @property
    def state(self) -> State:
        """The record so far: a `State` with the values of each state by its path, of shape (count, *shape).

        Records of several lanes have the axes of these, too, where `mu.vmap` has put them: (lanes, count, *shape). It raises as
        `count` does.
        """
        count = self.count
        cells = variables(self._node.value)
        rows = {path: self._rows(self.kept[show_path(path)], count) for path in self._paths}
        return State(rows, {path: type(cells[path]) for path in self._paths})

    def _rows(self, record: Variable, count: int) -> Any:
        lanes: Any = [axis for axis, _ in lanes_of(record)]
        lanes = lanes if len(lanes) == self.calls.ndim else range(self.calls.ndim)  # by hand they are stacked in front
        axis = next(axis for axis in range(len(lanes) + 1) if axis not in lanes)
        return jax.tree.map(lambda x: jax.lax.slice_in_dim(x, 0, count, axis=axis), record.value)


def _empty(treedef: Any, types: tuple[tuple[tuple[int, ...], str], ...]) -> Any:
    """A record without rows."""
    return jax.tree.unflatten(treedef, [jnp.zeros(shape, dtype) for shape, dtype in types])


def _as_index(index: Any) -> tuple[slice | int | tuple[int, ...] | None, int | None]:
    """What to record of the first axis; and for booleans, for how many places they are.

    Raises:
      ArgumentError: it is nothing of the kind.
    """
    if index is None or (number := as_integer(index)) is not None:
        return None if index is None else number, None
    if isinstance(index, slice):
        given = index.start, index.stop, index.step
        ends = [as_integer(end) for end in given]
        if ends[2] != 0 and all(end is None or known is not None for end, known in zip(given, ends, strict=True)):
            return slice(*ends), None
    elif isinstance(index, list | tuple | range | np.ndarray | jax.Array) and is_concrete(index):
        numbers = np.asarray(index)
        if numbers.ndim == 1 and numbers.dtype == bool:
            return tuple(np.flatnonzero(numbers).tolist()), len(numbers)
        if numbers.ndim == 1 and (numbers.size == 0 or numbers.dtype.kind in "iu"):
            return tuple(map(int, numbers)), None
    raise ArgumentError(
        f"a monitor cannot have index={show_value(index)}",
        path="index",
        expected="a slice, an integer, or one axis of integers or booleans, known when the monitor is made",
        got=show_value(index),
        cure="`mu.recording.Monitor(net, 'v', length=1000, index=slice(0, 10))`; `index=[0, 5]`, or a mask, `index=mask`.",
    )


def _check_index(path: Any, shape: tuple[int, ...], part: Any, mask: int | None) -> None:
    """Raise unless a state has the places that are to be recorded; slices end where it ends, as in Python."""
    if not shape or part is None or isinstance(part, slice):
        return
    size = shape[0]
    outside = [n for n in (part if isinstance(part, tuple) else (part,)) if not -size <= n < size]
    if mask in (None, size) and not outside:
        return
    raise ArgumentError(
        f"`index` does not fit state `{show_path(path)}`, whose shape is {shape}",
        path=show_path(path),
        expected=f"numbers from {-size} to {size - 1}" if mask is None else f"{size} booleans",
        got=", ".join(map(str, outside[:8])) if mask is None else f"{mask}",
        cure="Places along the first axis, `mu.recording.Monitor(net, 'v', length=1000, index=slice(0, 10))`; for states of "
        "other sizes a monitor of their own.",
    )


def _chosen(node: Any, which: tuple[Any, ...]) -> dict[Any, Variable]:
    cells = variables(node)
    if not which:
        return cells
    names = {show_path(path): path for path in cells}
    found: dict[Any, Variable] = {}
    for each in which:
        if isinstance(each, str):
            below = (f"{each}.", f"{each}[")
            chosen = {at: cells[at] for name, at in names.items() if name == each or name.startswith(below)}
        else:
            selects = as_filter(each)
            chosen = {path: cell for path, cell in cells.items() if selects(path, cell)}
        if not chosen:
            near = difflib.get_close_matches(str(each), names, 1, 0.0) if isinstance(each, str) else []
            raise FilterError(
                f"there is no state for {show_value(each)} to record",
                expected="the path of a state, or a filter that selects some",
                got=show_value(each) + (f" (nearest: {near[0]})" if near else ""),
                cure="`mu.variables(net)` lists the states by path.",
            )
        found |= chosen
    return found


def stream(
    f: Callable[..., Any],
    *xs: Any,
    into: str | Path | Callable[[Any], object],
    length: int | None = None,
    size: int = 1000,
    progress: str | None = None,
) -> None:
    """Run ``f(*x)`` for the slices of `xs`, as `mu.for_loop` does, and send the results in chunks to disk or to a function.

    The results need not fit into memory. Each chunk is a `mu.for_loop` of its own, so if a step fails, the states keep the chunks
    before, which are all sent. NumPy arrays among `xs` go to the device chunk by chunk, too. A loop of no steps sends one chunk
    of no rows.

    A function gets a chunk before the next one is computed. So when it is called, and if it raises, the states are those after
    this chunk. A chunk is written to disk while the next one is computed, which the states then hold, too; if it cannot be
    written, as on a full disk, the states are up to two chunks ahead of the files.

    At a path that ends in ``.npy`` the results are one array. Any other path is a folder with an array for each leaf of the
    results, named by its place: ``0.npy``, ``spikes.npy``. The files hold all whole chunks at any time, and
    ``numpy.load(path, mmap_mode="r")`` reads them. bfloat16 is written as float32, and random keys as their numbers, because
    NumPy's files have neither. Of quantities they hold the numbers; the unit is yours to note.

    Args:
      f: the function of one slice of each of `xs`.
      *xs: arrays, or pytrees of arrays, with leading axes of one size.
      into: a path, or a function that is called with the results of each chunk, as NumPy arrays of shape (steps in the chunk,
        ...).
      length: the number of steps, if there are no `xs`.
      size: the number of steps in a chunk.
      progress: a text to show beside a progress bar. None shows no bar.

    Raises:
      ArgumentError: an argument has another type, or the lengths differ.
      TraceLevelError: it is called in a function that is traced, such as by `mu.jit`.
      MissingPackageError: tqdm, which draws the bar, is not installed.

    Example:
      >>> import jax.numpy as jnp, numpy as np, mutatis as mu
      >>> total = mu.Variable(0.0)
      >>> def step(x):
      ...     total.value += x
      ...     return total.value
      >>> mu.recording.stream(step, np.ones(2500, np.float32), into="totals.npy", size=1000)
      >>> np.load("totals.npy", mmap_mode="r")[-1], float(total)
      (np.float32(2500.0), 2500.0)
    """
    if _compat.current_trace() is not _compat.EVAL_TRACE:
        raise TraceLevelError(
            "the results of a loop cannot be sent while a function is traced: they are not known yet",
            where=naming.where(),
            cure="Call `mu.recording.stream(step, xs, into=...)` from ordinary code: it compiles the loop itself. In a compiled "
            "function, `mu.for_loop(step, xs)` returns the results.",
        )
    if not callable(into) and not isinstance(into, str | Path):
        raise _stream_error("into", "a path, or a function", show_value(into))
    if not is_count(size):
        raise _stream_error("size", "an int, from 1", show_value(size))
    if any(is_node(leaf) for leaf in jax.tree.leaves(xs, is_leaf=is_node)):
        raise _stream_error("xs", "arrays: name the model in the function", "a model or a state")
    lengths: set[Any] = {len(x) if jnp.ndim(x) else None for x in jax.tree.leaves(xs)} | (
        {length} if length is not None else set()
    )
    if len(lengths) != 1 or not is_count(total := next(iter(lengths)), 0):
        got = ["a number, which has none" if each is None else show_value(each) for each in sorted(lengths, key=str)]
        raise _stream_error("length", "one length, of all `xs` and `length`", ", ".join(got) or "none")
    bar = None if progress is None else require("tqdm.auto", "progress=").tqdm(total=total, desc=progress)
    with contextlib.ExitStack() as files:
        if bar is not None:
            files.callback(bar.close)
        send = into if callable(into) else _Files(Path(into), files)
        ahead: list[Any] = []  # chunks that are computed and not sent
        for start in range(0, max(total, 1), size):
            chunk = jax.tree.map(lambda x, start=start: x[start : start + size], xs)
            try:
                now = for_loop(f, *chunk, length=min(size, total - start))
            finally:  # if it fails, too: the steps of what is ahead are in the states
                while ahead:  # it is written while the device computes the next one
                    _send(send, ahead.pop(), bar)
            ahead.append(now)
            if callable(into):
                _send(send, ahead.pop(), bar)
        for results in ahead:
            _send(send, results, bar)


def _send(send: Callable[[Any], object], results: Any, bar: Any) -> None:
    results = jax.device_get(jax.tree.map(numbers_of, results))
    send(results)
    if bar is not None:
        bar.update(len(jax.tree.leaves(results)[0]) if jax.tree.leaves(results) else 0)


class _Files:
    """Arrays on disk that grow at their first axis: what is there is whole after each chunk."""

    def __init__(self, path: Path, files: contextlib.ExitStack) -> None:
        self._path = path
        self._stack = files
        self._open: dict[Path, Any] = {}
        self._rows: dict[Path, int] = {}
        self._places: dict[str, Any] = {}  # in the results, of the files

    def __call__(self, results: Any) -> None:
        leaves = jax.tree_util.tree_leaves_with_path(results)
        for way, leaf in leaves:
            if self._path.suffix == ".npy":
                if len(leaves) != 1:
                    raise _stream_error("into", "a folder, for results of several arrays", f"{self._path.name}")
                self._append(self._path, leaf)
            else:
                name = ".".join(str(_key(part)).replace("/", "_") for part in way) or "values"
                if self._places.setdefault(name, way) != way:
                    raise _stream_error(
                        "into", "results whose places have different names as files", f"two for {name}.npy"
                    )
                self._append(self._path / f"{name}.npy", leaf)

    def _append(self, path: Path, rows: Any) -> None:
        if path not in self._open:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._open[path] = self._stack.enter_context(path.open("wb+"))
            self._rows[path] = 0
        file = self._open[path]
        rows = np.ascontiguousarray(rows if rows.dtype.kind != "V" else rows.astype(np.float32))
        first = self._rows[path] == 0
        self._rows[path] += len(rows)
        header = np.lib.format.header_data_from_array_1_0(rows) | {"shape": (self._rows[path], *rows.shape[1:])}
        if not first:
            file.seek(0, 2)
            file.write(rows.data)
            file.flush()
        file.seek(0)  # NumPy leaves room for the number of rows to grow
        np.lib.format.write_array_header_1_0(file, header)
        if first:
            file.write(rows.data)
        file.flush()


def _key(part: Any) -> Any:
    return getattr(part, "key", getattr(part, "name", getattr(part, "idx", None)))


def _stream_error(name: str, expected: str, got: str) -> ArgumentError:
    return ArgumentError(
        f"`{name}` does not fit a loop in chunks",
        path=name,
        where="stream",
        expected=expected,
        got=got,
        cure="`mu.recording.stream(step, xs, into='spikes.npy', size=1000)`; a function of the results: `into=print`.",
    )


_homes.publish(__name__, {name: globals()[name] for name in __all__})
