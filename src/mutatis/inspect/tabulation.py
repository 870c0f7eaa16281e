"""A table of the layers of a model: what goes in and out of each, what it holds and what it costs."""

from __future__ import annotations

import dataclasses
import itertools
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any

import jax
import numpy as np

from mutatis.core import access
from mutatis.core.avals import show_type
from mutatis.core.naming import show_path
from mutatis.core.showing import show_bytes, show_count
from mutatis.inspect.tables import Table
from mutatis.interventions import intercept
from mutatis.model.graphdef import describe_graph
from mutatis.model.kinds import Param
from mutatis.model.modules import Module
from mutatis.model.operations import clone, merge
from mutatis.model.state import State
from mutatis.model.surgery import modules
from mutatis.model.walks import variables
from mutatis.tracing.arguments import FlatTree
from mutatis.transforms.abstract import eval_arrays
from mutatis.transforms.jit import jit


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a layer, a row of `mu.inspect.tabulate`.

    Attributes:
      path: the path of the layer in the model; empty for the model itself.
      layer: the name of its class.
      inputs: the shapes and dtypes of the arrays that it is called with.
      output: the shapes and dtypes of its result.
      kinds: the number of states of each kind in the layer and in all layers inside it.
      parameters: the number of elements of its parameters.
      bytes: the size of all its states in bytes.
      flops: the number of floating point operations of the call, as XLA counts them before it optimizes; None if it does not say.
        XLA counts the body of a loop once, so the number of an `nn.Stack` is that of one layer.
        Inside a `vmap` or a loop it is the number of one lane or iteration, as inputs and output are.
    """

    path: str
    layer: str
    inputs: str
    output: str
    kinds: dict[str, int]
    parameters: int
    bytes: int
    flops: float | None


@dataclasses.dataclass(frozen=True, repr=False)
class Tabulation(Table):
    """The calls of the layers of a model, as `mu.inspect.tabulate` returns them.

    `print` shows it as text, `rich.print` as a table, and a notebook as HTML.

    Attributes:
      calls: the calls in order, a tuple of `Call`. The call of a layer comes before those of the layers inside it.
    """

    calls: tuple[Call, ...]
    header = ("layer", "class", "inputs", "output", "states", "parameters", "size", "flops")
    left = ("layer", "class", "inputs", "output", "states")

    def title(self) -> str:
        """Return the line that stands above the table in a notebook."""
        return show_count(len(self.calls), "call")

    def cells(self) -> list[Sequence[str]]:
        """Return the text of each row. Equal layers of a list share one row, such as ``layers[0..11]``."""
        rows = [
            (
                call.path,
                call.layer,
                call.inputs,
                call.output,
                ", ".join(f"{count} {kind}" for kind, count in call.kinds.items()),
                f"{call.parameters:,}",
                show_bytes(call.bytes),
                "?" if call.flops is None else f"{call.flops:,.0f}",
            )
            for call in self.calls
        ]
        return [(path or ".", *rest) for path, *rest in _folded(rows)]


_ALIKE = 4  # entries of a list in a row, from which on they are folded


def _folded(rows: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """Rows, of which those that differ in the first index of their paths only, by which they follow each other, are one."""
    folded: list[Sequence[str]] = []
    groups = [(key, list(group)) for key, group in itertools.groupby(map(_split, rows), lambda row: row[0])]
    start = 0
    while start < len(groups):
        (head, index), entries = groups[start]
        inside = [rest for _, rest in entries]
        if index is None:
            folded += inside
            start += 1
            continue
        end = start + 1
        while end < len(groups) and groups[end][0] == (head, index + end - start):
            if [rest for _, rest in groups[end][1]] != inside:
                break
            end += 1
        alike = range(start, end if end - start >= _ALIKE else start + 1)
        shown = f"{head}[{index}]" if len(alike) == 1 else f"{head}[{index}..{index + len(alike) - 1}]"
        folded += [(f"{shown}{path}", *rest) for path, *rest in _folded(inside)]
        start = alike.stop
    return folded


def _split(row: Sequence[str]) -> tuple[tuple[str, int | None], Sequence[str]]:
    """A row as the path up to its first index, that index, and the row with the rest of the path."""
    path, *rest = row
    found = re.match(r"([^\[]*)\[(\d+)\]", path)
    if found is None:
        return (path, None), row
    return (found[1], int(found[2])), (path[found.end() :], *rest)


def tabulate(net: Module, /, *inputs: Any, depth: int | None = None, **kwargs: Any) -> Tabulation:
    """Make a table of the layers of a model, for a call with given inputs. Nothing is computed, allocated or written.

    Each row is one call of a layer, with its shapes, states, size and floating point operations. The numbers of a layer include
    all layers inside it. In the printed table, equal layers of a list share one row.

    Args:
      net: the model. It may be one of shapes, ``mu.eval_shape(lambda: Net(...))``.
      *inputs: the inputs of the call. A `jax.ShapeDtypeStruct` may stand for an array.
      depth: how deep in the model a layer may be to get a row, an int. None means any depth.
      **kwargs: further inputs, by keyword.

    Returns:
      A `Tabulation`, which `print` shows as text and a notebook as HTML. Its `calls` have the same facts as data.

    Example:
      >>> import jax, jax.numpy as jnp, mutatis as mu
      >>> rngs = mu.Rngs(0)
      >>> net = mu.nn.Sequential(mu.nn.Linear(784, 128, rngs=rngs), mu.nn.relu, mu.nn.Linear(128, 10, rngs=rngs))
      >>> print(mu.inspect.tabulate(net, jax.ShapeDtypeStruct((32, 784), jnp.float32)))
      layer      class       inputs           output           states   parameters      size      flops
      .          Sequential  float32[32,784]  float32[32,10]   4 Param     101,770  407.1 kB  6,512,960
      layers[0]  Linear      float32[32,784]  float32[32,128]  2 Param     100,480  401.9 kB  6,426,624
      layers[2]  Linear      float32[32,128]  float32[32,10]   2 Param       1,290    5.2 kB     82,240
    """
    rows = []
    # Not lists, which the functions would name, and which would be put back after a trace.
    numbers: Iterator[int] = itertools.count()
    recorded: SimpleQueue[tuple[int, tuple[Any, ...]]] = SimpleQueue()

    def record(module: Module, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        row = next(numbers)
        out = call(*args, **kwargs)
        definition, _ = describe_graph(module)  # with the types of here, which may be those of one lane or iteration
        recorded.put((row, (module, definition, _shapes((args, kwargs)), _shapes(out))))
        return out

    def run(*inputs: Any, **kwargs: Any) -> Any:
        copy: Any = clone(net)
        with intercept(..., record):
            copy(*inputs, **kwargs)
        return copy

    made = eval_arrays(run, inputs, kwargs)
    paths = {id(module): path for path, module in modules(made).items()}
    flops: dict[Any, float | None] = {}  # of layers that are alike, those of one
    calls = sorted((recorded.get() for _ in range(recorded.qsize())), key=operator.itemgetter(0))
    for _, (module, definition, given, out) in calls:
        path = paths.get(id(module))
        if path is None or (depth is not None and len(path) > depth):
            continue
        values = {cell: access.load(cell) for cell in variables(module).values()}
        alike = (definition, repr(definition.types), repr(given))
        if alike not in flops:
            one = merge(definition, State(dict(zip(definition.paths, definition.types, strict=True))))
            flops[alike] = _flops(one, given)
        rows.append(
            Call(
                path=show_path(path),
                layer=type(module).__name__,
                inputs=_show(given),
                output=_show(out),
                kinds=dict(Counter(type(cell).__name__ for cell in values)),
                parameters=sum(_size(value) for cell, value in values.items() if isinstance(cell, Param)),
                bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(list(values.values()))),
                flops=flops[alike],
            )
        )
    return Tabulation(tuple(rows))


def _shapes(tree: Any) -> Any:
    """Arrays as shapes; nodes and all else as they are."""
    packed = FlatTree(tree)
    return packed.unflatten([_shape(leaf) for leaf in packed.leaves])


def _shape(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if isinstance(leaf, jax.Array | np.ndarray) else leaf


def _arrays(tree: Any) -> list[Any]:
    return [leaf for leaf in FlatTree(tree).leaves if isinstance(leaf, jax.ShapeDtypeStruct)]


def _show(tree: Any) -> str:
    return ", ".join(map(show_type, _arrays(tree)))


def _size(value: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(value))


def _flops(module: Any, given: Any) -> float | None:
    """What XLA counts for one call."""
    packed = FlatTree(given)

    def call(*arrays: Any) -> Any:
        rest = iter(arrays)
        leaves = [next(rest) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf for leaf in packed.leaves]
        args, kwargs = packed.unflatten(leaves)
        return module(*args, **kwargs)

    costs = jit(call).lower(*_arrays(given)).cost_analysis()
    return None if costs is None else costs.get("flops")
