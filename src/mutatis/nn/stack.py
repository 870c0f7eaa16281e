"""`Stack`: layers of one kind, one after the other, whose states are stacked along a leading axis and run by one loop.

The loop's body is traced and compiled once, so compiling takes as long for 64 layers as for 4. What a layer writes, its
statistics, its cache, its random stream, is its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mutatis.core import naming
from mutatis.core.nodes import declare_stacked
from mutatis.core.showing import show_class
from mutatis.errors import ArgumentError, StructureError
from mutatis.model.modules import Module
from mutatis.model.operations import clone, graphdef, merge, split
from mutatis.model.walks import variables
from mutatis.random import Rngs
from mutatis.transforms.batching import vmap
from mutatis.transforms.loops import scan
from mutatis.transforms.rematerialize import remat as rematerialize


class Stack(Module):
    """Layers of one kind, one after the other.

    Args:
      make: makes a layer, ``make(rngs)``; or the layers themselves, a list of them. They have to differ in their values only.
      length: how many to make.
      rngs: random streams, from which each layer's own are split.
      remat: whether to keep only what goes from layer to layer for the gradient, and compute the rest again.
      unroll: how many layers the loop does at a time, as in `jax.lax.scan`.

    Attributes:
      layer: one layer, whose states have an axis for the layers in front.

    Raises:
      ArgumentError: there is no layer, or streams are missing.
      StructureError: the layers differ in more than their values.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> stack = mu.nn.Stack(lambda rngs: mu.nn.Linear(8, 8, rngs=rngs), 12, rngs=mu.Rngs(0))
      >>> stack(jnp.ones((2, 8))).shape, stack.layer.kernel.shape
      ((2, 8), (12, 8, 8))
      >>> first, *others = stack.layers()
      >>> first.kernel.shape, len(mu.nn.Stack([first, *others]))
      ((8, 8), 12)
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
        self.remat = remat
        self.unroll = unroll

    def __call__(self, x: Any, *args: Any, **options: Any) -> Any:
        """Call one layer after the other.

        Args:
          x: the input of the first layer; what a layer gives is the input of the next, and has the same shape and dtype.
          *args, **options: are given to all layers.

        Returns:
          What the last layer gives.
        """

        def body(x: Any, layer: Module) -> tuple[Any, None]:
            return layer(x, *args, **options), None  # type: ignore[operator]

        return scan(rematerialize(body) if self.remat else body, x, self.layer, unroll=self.unroll)[0]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Module:
        """A copy of a layer."""
        if not -self.length <= index < self.length:
            raise IndexError(f"there are {self.length} layers, and none has the number {index}")
        copy = clone(self.layer)
        for cell in variables(copy).values():
            cell.set(jax.tree.map(lambda x: x[index], cell.get()))
        return copy

    def layers(self) -> list[Module]:
        """Copies of the layers: a list of them has the paths of a model without `Stack`, ``blocks.0.kernel``."""
        return [self[index] for index in range(self.length)]

    def load(self, layers: Sequence[Module]) -> None:
        """Take over the states of layers, such as were read from the checkpoint of a model without `Stack`.

        Args:
          layers: as many as there are here, of the same structure.

        Raises:
          StructureError: there are more or fewer, or they differ from those here in more than their values.
        """
        new = _stacked(layers)
        if len(layers) != self.length or graphdef(new) != graphdef(self.layer):
            raise _differ(
                self.layer, new, f"{self.length} layers like those of the stack", f"{len(layers)} that differ"
            )
        theirs = variables(new)
        for path, cell in variables(self.layer).items():
            cell.set(theirs[path].get())

    def each(self, f: Callable[..., Any], *args: Any) -> Any:
        """Do something with every layer: ``stack.each(lambda layer: layer.init_cache(shape))``.

        Args:
          f: a function of a layer, and of the slices of the others.
          *args: arrays with an axis for the layers in front.

        Returns:
          What it gives, stacked.
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


def _differ(first: Module, other: Module, expected: str, got: str) -> StructureError:
    a, b = ({path: cell.value for path, cell in variables(node).items()} for node in (first, other))
    lines = [f"only in one of them: {'.'.join(map(str, path))}" for path in sorted(a.keys() ^ b.keys(), key=str)]
    for path in a.keys() & b.keys():
        types = [[(x.shape, str(x.dtype)) for x in jax.tree.leaves(values[path])] for values in (a, b)]
        if types[0] != types[1]:
            lines.append(f"{'.'.join(map(str, path))}: {types[0]} and {types[1]}")
    return StructureError(
        "layers of different structure cannot be stacked",
        where=naming.where(),
        expected=expected,
        got=got,
        differences=lines or ["their classes, attributes or settings"],
        cure="What differs goes into its own attribute, before or after the stack; settings that differ by layer can be a state.",
    )
