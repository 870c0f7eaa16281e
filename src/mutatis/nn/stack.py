"""`Stack`: layers of one kind, one after the other, whose states are stacked along a leading axis and run by one loop.

The loop's body is traced and compiled once, so compiling takes as long for 64 layers as for 4. Each layer has its own
statistics, cache and random stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mutatis.core import naming
from mutatis.core.avals import show_type
from mutatis.core.calls import as_integer
from mutatis.core.naming import show_path
from mutatis.core.nodes import declare_stacked, is_node
from mutatis.core.showing import show_class, show_value
from mutatis.errors import ArgumentError, StructureError
from mutatis.model.filters import Path
from mutatis.model.modules import Module
from mutatis.model.operations import clone, merge, split
from mutatis.model.surgery import modules, stacks_on
from mutatis.model.variables import Variable, lanes_of, note_unstacked
from mutatis.model.walks import variables
from mutatis.random import Rngs
from mutatis.transforms.batching import vmap
from mutatis.transforms.loops import scan
from mutatis.transforms.rematerialize import remat as rematerialize


class Stack(Module):
    """Many layers of one kind in a row, such as the blocks of a transformer, run by one loop.

    The states of all layers are stacked along a leading axis, and one layer is compiled for all of them. So 64 layers compile as
    fast as 4. Each layer has its own parameters, statistics, caches and random streams. ``stack[i]`` is a copy of one layer.

    Args:
      make: a function that makes a layer, ``make(rngs)``, or a list of layers that differ in their values only.
      length: the number of layers, if `make` is a function.
      rngs: random streams, which are split among the layers, if `make` is a function.
      remat: whether to save memory in gradients: only the values between layers are kept, and the rest is computed again.
      unroll: how many layers are compiled into one iteration of the loop, as in `jax.lax.scan`.

    Attributes:
      layer: one layer, whose states have a leading axis for all layers.

    Raises:
      ArgumentError: there is no layer, or streams are missing.
      StructureError: the layers differ in more than their values.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> stack = mu.nn.Stack(lambda rngs: mu.nn.Linear(8, 8, rngs=rngs), 12, rngs=mu.Rngs(0))
      >>> stack(jnp.ones((2, 8))).shape
      (2, 8)
      >>> stack.layer.kernel.shape, len(stack), stack[0].kernel.shape
      ((12, 8, 8), 12, (8, 8))
    """

    def __init__(
        self,
        make: Callable[[Rngs], Module] | Sequence[Module],
        length: int | None = None,
        *,
        rngs: Rngs | None = None,
        remat: bool = False,
        unroll: int | bool = 1,
    ) -> None:
        if isinstance(make, list | tuple):
            self.length = len(make)
            self.layer = _stacked(make)
        else:
            if not (isinstance(length, int) and length > 0 and isinstance(rngs, Rngs) and callable(make)):
                raise ArgumentError(
                    "`nn.Stack` has nothing to make layers from",
                    path="make",
                    expected="a function of random streams, a length from 1, and the streams; or a list of layers",
                    got=f"{show_class(make)}, length={length!r}, rngs={show_class(rngs)}",
                    cure="`nn.Stack(lambda rngs: Block(rngs), 12, rngs=mu.Rngs(0))`",
                )
            self.length = length
            self.layer = vmap(make)(rngs.split(length))
            for path, cell in variables(self.layer).items():
                if (0, length) not in lanes_of(cell):
                    raise _shared(path, cell)
        self.remat = remat
        self.unroll = unroll

    def __call__(self, x: Any, *args: Any, **options: Any) -> Any:
        """Call one layer after the other.

        Args:
          x: the input of the first layer: an array or a pytree of arrays. Each layer returns the input of the next, of the same
            shapes and dtypes.
          *args, **options: further arguments, the same for all layers.

        Returns:
          The result of the last layer.
        """

        def body(x: Any, layer: Module) -> tuple[Any, None]:
            return layer(x, *args, **options), None  # type: ignore[operator]

        return scan(rematerialize(body) if self.remat else body, x, self.layer, unroll=self.unroll)[0]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        """A copy of one layer, by its number; or a list of copies, by a slice."""
        if isinstance(index, slice):
            return [self[n] for n in range(*index.indices(self.length))]
        if self._is_stacked():
            raise StructureError(
                "the layers of several stacks cannot be taken out of them at once",
                where=naming.where(),
                expected="one stack",
                got="stacks that `mu.vmap` has stacked",
                cure="Take them out in the lanes: `mu.vmap(lambda stack: stack[0])(stacks)`.",
            )
        number = as_integer(index)
        if number is None:
            raise ArgumentError(
                f"a layer of a stack goes by its number, and {show_value(index)} is none",
                path="index",
                expected="an int, or a slice",
                got=show_value(index),
                cure="`stack[0]`; what differs by layer is computed in the loop: `stack.each(lambda layer: ...)`.",
            )
        index = number
        if not -self.length <= index < self.length:
            raise IndexError(f"there are {self.length} layers, and none has the number {index}")
        copy = clone(self.layer)
        for cell in variables(copy).values():
            note_unstacked(cell, 0)
            cell.set(jax.tree.map(lambda x: x[index], cell.get()))
        return copy

    def _is_stacked(self) -> bool:
        """Whether several stacks are seen at once, from outside of the transform that has stacked them."""
        inside = modules(self.layer)
        return any(
            len(lanes_of(cell)) > 1 + len(stacks_on(path, inside)) for path, cell in variables(self.layer).items()
        )

    def layers(self) -> list[Module]:
        """Copies of the layers, as a list. A model with this list instead of the Stack has paths such as ``blocks[0].kernel``."""
        return [self[index] for index in range(self.length)]

    def load(self, layers: Sequence[Module]) -> None:
        """Write the states of a list of layers into the stack, such as those of a checkpoint of a model without `Stack`.

        Args:
          layers: as many layers as in the stack, with states of the same paths, shapes and dtypes.

        Raises:
          StructureError: there are more or fewer, or their states differ from those of the stack in more than their values.
        """
        new = _stacked(layers)
        if len(layers) != self.length:
            raise StructureError(
                "a stack is loaded from as many layers as it has",
                where=naming.where(),
                expected=f"{self.length} layers",
                got=f"{len(layers)}",
                cure=f"`nn.Stack(layers)` makes a stack of {len(layers)}.",
            )
        if _types(new) != _types(self.layer):
            raise _differ(self.layer, new, "layers like those of the stack", "layers with other states")
        theirs = variables(new)
        for path, cell in variables(self.layer).items():
            cell.set(theirs[path].get())

    def each(self, f: Callable[..., Any], *args: Any) -> Any:
        """Call a function with every layer: ``stack.each(lambda layer: layer.init_cache(shape))``.

        Args:
          f: a function of a layer, and of one slice of each of `args`.
          *args: arrays with a leading axis for the layers.

        Returns:
          The results, stacked along axis 0.
        """
        return vmap(f)(self.layer, *args)


declare_stacked(Stack, "layer")  # a checkpoint of a list of layers is restored into it, and its own into a list


def _stacked(layers: Sequence[Module]) -> Module:
    """One layer with the states of all."""
    if not layers or not all(isinstance(layer, Module) for layer in layers):
        raise ArgumentError(
            "`nn.Stack` has no layers",
            path="make",
            expected="one module or more",
            got=f"{[show_class(layer) for layer in layers]}",
            cure="`nn.Stack([Block(rngs) for _ in range(12)])`",
        )
    owners: dict[Any, int] = {}
    for number, layer in enumerate(layers):
        for path, cell in variables(layer).items():
            if owners.setdefault(cell, number) != number:
                raise _shared(path, cell)
    definition, first = split(layers[0])
    states = [first]
    for layer in layers[1:]:
        other, state = split(layer)
        types = [jax.tree.map(lambda x: (x.shape, x.dtype), dict(s.flat())) for s in (first, state)]
        if other != definition or types[0] != types[1]:
            raise _differ(
                layers[0], layer, "layers that differ in their values only", "one that differs from the first"
            )
        states.append(state)
    together = jax.tree.map(lambda *values: jnp.stack(values), *states)
    return vmap(lambda state: merge(definition, state))(together)


def _shared(path: Path, cell: Variable) -> StructureError:
    return StructureError(
        f"state `{show_path(path)}` ({type(cell).__name__}) of a layer is not of this layer alone, and cannot be stacked",
        path=show_path(path),
        where=naming.where(),
        expected="layers that each have states of their own",
        got="a state that layers share with one another, or that was made before",
        made_at=cell.made_at,
        cure="Give what layers share in the call, `stack(x, shared)`, where all layers get the same; or make it in each layer.",
    )


def _types(node: Module) -> dict[Path, list[str]]:
    return {path: [show_type(x) for x in jax.tree.leaves(cell.value)] for path, cell in variables(node).items()}


def _settings(node: Module) -> dict[str, str]:
    """The classes of the modules in a layer, and their attributes that are no nodes, by path."""
    shown: dict[str, str] = {}
    for path, module in modules(node).items():
        shown[show_path(path) or "."] = show_class(module)
        attributes = {"training": module.training, **vars(module)}
        for name, value in attributes.items():
            if not any(map(is_node, jax.tree.leaves(value, is_leaf=is_node))):
                shown[show_path((*path, name))] = show_value(value)
    return shown


def _differ(first: Module, other: Module, expected: str, got: str) -> StructureError:
    a, b = _types(first), _types(other)
    lines = [f"only in one of them: {show_path(path)}" for path in sorted(a.keys() ^ b.keys(), key=str)]
    for path in a.keys() & b.keys():
        if a[path] != b[path]:
            lines.append(f"{show_path(path)}: {', '.join(a[path])} and {', '.join(b[path])}")
    ours, theirs = _settings(first), _settings(other)
    lines = lines or [f"{at}: {ours[at]} and {theirs[at]}" for at in ours if at in theirs and ours[at] != theirs[at]]
    return StructureError(
        "layers of different structure cannot be stacked",
        where=naming.where(),
        expected=expected,
        got=got,
        differences=lines or ["their classes, attributes or settings"],
        cure="What differs goes into its own attribute, before or after the stack; settings that differ by layer can be a state.",
    )
