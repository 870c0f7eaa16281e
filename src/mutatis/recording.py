"""Records: what states were over time, without a change of the model; and loops whose results do not fit in memory."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mutatis import _homes
from mutatis._packages import require
from mutatis.core import access
from mutatis.core.avals import numbers_of
from mutatis.core.calls import is_count
from mutatis.core.naming import show_path
from mutatis.core.nodes import Reference, is_node
from mutatis.core.showing import show_value
from mutatis.errors import ArgumentError, DeferredStateError, FilterError
from mutatis.model.filters import FilterLike, as_filter
from mutatis.model.kinds import MetricState
from mutatis.model.modules import Module
from mutatis.model.state import State
from mutatis.model.variables import Variable
from mutatis.model.walks import check_node, variables
from mutatis.transforms.loops import for_loop

__all__ = ["Monitor", "stream"]


class Monitor(Module):
    """Records the values of states of a model, at each call or at each n-th call, in arrays that are made once.

    Call it after a step of a Python loop, or in the body of `mu.for_loop`, `mu.scan` or `mu.while_loop`. The model does not
    change. The record has a fixed size, and calls after it is full are not recorded.

    Args:
      node: a Module, a Variable, or a list, tuple or dict of them.
      *which: the states to record: paths as they are printed (``"layers[0].v"``), or filters (``mu.Hidden``). Without any, all.
      length: the number of calls for which there is room.
      every: a call is recorded if its number, counted from 0, is a multiple of this.
      index: the part of each state to record, along its first axis: a slice, a number or an array of numbers, such as
        ``slice(0, 10)``. None records the whole.

    Attributes:
      calls: MetricState, an int32 scalar, the number of calls.
      kept: a dictionary from printed paths to the records, MetricStates of shape (ceil(length / every), *shape).

    Raises:
      ArgumentError: `length` or `every` is no int above 0.
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
        for name, number in (("length", length), ("every", every)):
            if not is_count(number):
                raise ArgumentError(
                    f"a monitor cannot have {name}={show_value(number)}",
                    path=name,
                    expected="an int, from 1",
                    got=show_value(number),
                    cure="`mu.recording.Monitor(net, 'v', length=1000, every=10)`",
                )
        self._node = Reference(check_node(node))
        self.every = every
        self.length = length
        self._slice = (index.start, index.stop, index.step) if isinstance(index, slice) else None
        self._index = (
            None if isinstance(index, slice) else index if isinstance(index, int | None) else tuple(map(int, index))
        )
        chosen = _chosen(node, which)
        self._paths = tuple(chosen)
        room = -(-length // every)
        self.calls = MetricState(0)
        self.kept: dict[str, MetricState[Any]] = {}
        for path, cell in chosen.items():
            if cell.deferred:
                raise DeferredStateError(
                    f"state `{show_path(path)}` cannot be recorded: it has no value yet",
                    path=show_path(path),
                    made_at=cell.made_at,
                    cure="Call the model once, which creates it.",
                )
            empty = jax.tree.map(lambda x: jnp.zeros((room, *self._part(x).shape), x.dtype), _numbers(cell))
            self.kept[show_path(path)] = MetricState(empty)

    def __call__(self) -> None:
        """Record the present values, if it is the turn of this call and the record is not full."""
        cells = variables(self._node.value)
        number = self.calls.value
        place = number // self.every
        room = -(-self.length // self.every)
        keeps = (number % self.every == 0) & (place < room)
        at = jnp.minimum(place, room - 1)
        for path in self._paths:
            record = self.kept[show_path(path)]

            def put(kept: jax.Array, now: jax.Array) -> jax.Array:
                # What is not kept is written over itself: one slice, and no copy of the record.
                old = jax.lax.dynamic_index_in_dim(kept, at, keepdims=False)
                return jax.lax.dynamic_update_index_in_dim(kept, jnp.where(keeps, self._part(now), old), at, 0)

            record.value = jax.tree.map(put, record.value, _numbers(cells[path]))
        self.calls.value = number + 1

    def _part(self, x: jax.Array) -> jax.Array:
        if x.ndim == 0:
            return x
        if self._slice is not None:
            return x[slice(*self._slice)]
        if self._index is None:
            return x
        return x[jnp.asarray(self._index)] if isinstance(self._index, tuple) else x[self._index]

    @property
    def count(self) -> int:
        """The number of calls that are recorded so far."""
        return min(-(-int(self.calls) // self.every), -(-self.length // self.every))

    @property
    def times(self) -> jax.Array:
        """The numbers of the recorded calls, counted from 0: integers of shape (count,)."""
        return jnp.arange(self.count) * self.every

    @property
    def state(self) -> State:
        """The record so far: a `State` with the values of each state by its path, of shape (count, *shape)."""
        count = self.count
        cells = variables(self._node.value)
        return State(
            {path: jax.tree.map(lambda x: x[:count], self.kept[show_path(path)].value) for path in self._paths},
            {path: type(cells[path]) for path in self._paths},
        )


def _numbers(cell: Variable) -> Any:
    """The value of a state; random keys as what they are made of."""
    return jax.tree.map(numbers_of, access.read(cell))


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

    The results need not fit into memory: one chunk is kept while the next one is computed. Each chunk is a `mu.for_loop` of its
    own, so if a step fails, the states keep the chunks before. NumPy arrays among `xs` go to the device chunk by chunk, too.

    At a path that ends in ``.npy`` the results are one array. Any other path is a folder with an array for each leaf of the
    results, named by its place: ``0.npy``, ``spikes.npy``. The files hold all whole chunks at any time, and
    ``numpy.load(path, mmap_mode="r")`` reads them. bfloat16 is written as float32, and random keys as their numbers, because
    NumPy's files have neither.

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
    if not callable(into) and not isinstance(into, str | Path):
        raise _stream_error("into", "a path, or a function", show_value(into))
    if not is_count(size):
        raise _stream_error("size", "an int, from 1", show_value(size))
    if any(is_node(leaf) for leaf in jax.tree.leaves(xs, is_leaf=is_node)):
        raise _stream_error("xs", "arrays: name the model in the function", "a model or a state")
    lengths = {len(x) if jnp.ndim(x) else -1 for x in jax.tree.leaves(xs)} | ({length} if length is not None else set())
    if len(lengths) != 1 or not is_count(total := next(iter(lengths)), 0):
        raise _stream_error(
            "length", "one length, of all `xs` and `length`", ", ".join(map(show_value, sorted(lengths, key=str)))
        )
    bar = None if progress is None else require("tqdm.auto", "progress=").tqdm(total=total, desc=progress)
    with contextlib.ExitStack() as files:
        if bar is not None:
            files.callback(bar.close)
        send = into if callable(into) else _Files(Path(into), files)
        ahead: Any = None
        for start in range(0, total, size):
            count = min(size, total - start)
            chunk = jax.tree.map(lambda x, start=start: x[start : start + size], xs)
            try:
                now = for_loop(f, *chunk, length=count)
            except BaseException:
                if ahead is not None:  # its steps are in the states: they are in the record, too
                    _send(send, ahead, bar)
                raise
            if ahead is not None:  # it is written while the device computes the next one
                _send(send, ahead, bar)
            ahead = now
        if ahead is not None:
            _send(send, ahead, bar)


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

    def __call__(self, results: Any) -> None:
        leaves = jax.tree_util.tree_leaves_with_path(results)
        for way, leaf in leaves:
            if self._path.suffix == ".npy":
                if len(leaves) != 1:
                    raise _stream_error("into", "a folder, for results of several arrays", f"{self._path.name}")
                self._append(self._path, leaf)
            else:
                name = ".".join(str(_key(part)).replace("/", "_") for part in way) or "values"
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
