"""`mu.rename`: other explicit names for states."""

from __future__ import annotations

from typing import Any, TypeVar

import jax

from mutatis.core.showing import show_class
from mutatis.effects.requests import Effect, Rename, is_model, is_part, parts_of, variables_of
from mutatis.errors import EffectError
from mutatis.model.variables import Variable, set_mark

T = TypeVar("T")


def add_parameter_prefix(prefix: str, tree: T, delimiter: str = ".") -> T:
    """Put a prefix in front of the explicit names of states, for instance of a layer that becomes part of another.

    It is `mu.rename` with the new name ``prefix + delimiter + name``.

    Args:
      prefix: the text in front of each name.
      tree: a Module, a Variable, or any pytree of them and of requests, as in `mu.rename`.
      delimiter: the text between the prefix and the old name.

    Returns:
      The node itself, or the renamed tree, as in `mu.rename`.

    Raises:
      EffectError: two states would have one name. Then nothing has changed.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> from mutatis import effects
      >>> request = effects.SharedLocalStateRequest("mean", category="statistics")
      >>> effects.add_parameter_prefix("encoder", request).name
      'encoder.mean'
    """
    return rename(tree, lambda name: f"{prefix}{delimiter}{name}")


def rename(node: T, fn: Rename) -> T:
    """Change the explicit names of states. A state without an explicit name stays without one.

    A Variable is renamed in place. Jitted functions notice the new name, and a transaction that fails takes it back. The
    requests, references and handlers of `mu.effects` are values, so these are renamed in the tree that is returned.

    Args:
      node: a Module, a Variable, or any pytree of them and of requests of `mu.effects`, handled or not.
      fn: a function from an explicit name to the new name. It is called once for each name.

    Returns:
      A tree like `node` with the renamed requests; it has the same modules and variables. A Module or Variable is returned
      itself.

    Raises:
      EffectError: two states would have one name, or a new name is not a string. Then nothing has changed.

    Example:
      >>> import mutatis as mu
      >>> norm = {"mean": mu.BatchStat(0.0, name="mean"), "var": mu.BatchStat(1.0)}
      >>> mu.rename(norm, lambda name: f"encoder/{name}")
      {'mean': BatchStat(0.0, float32, name='encoder/mean'), 'var': BatchStat(1.0, float32)}
    """
    parts = [part for _, part in parts_of(node)]
    cells = {cell: None for part in parts if is_model(part) for cell in variables_of(part).values()}
    named: list[Any] = [part for part in [*parts, *cells] if isinstance(part, Effect | Variable)]
    explicit = {
        part.name: None for part in named if part.name is not None and getattr(part, "was_explicitly_named", True)
    }
    before = {part.name: "a position" for part in named if not getattr(part, "was_explicitly_named", True)}
    table = {name: fn(name) for name in explicit}
    for old, new in table.items():
        if type(new) is not str or new in before:
            raise EffectError(
                f"state `{old}` cannot be renamed to {new!r}",
                path=old,
                expected="a string that names no other state",
                got=f"{before[new]}, too" if type(new) is str else show_class(new),
                cure="Give each its own: `mu.rename(model, lambda name: f'encoder/{name}')`.",
            )
        before[new] = f"the new name of `{old}`"
    for cell in cells:
        if cell.name is not None:
            set_mark(cell, "name", table[cell.name])
    renamed: T = jax.tree.map(
        lambda part: part.with_renamed_parameters(table.__getitem__) if isinstance(part, Effect) else part,
        node,
        is_leaf=is_part,
    )
    return renamed
