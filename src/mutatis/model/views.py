"""Views: other modules over the same cells, or over some others in their place."""

from __future__ import annotations

from typing import Any

from mutatis.core import access
from mutatis.core.avals import same_type, show_type
from mutatis.core.cells import UNSET, Deferred
from mutatis.core.naming import show_path
from mutatis.core.nodes import Reference, is_node
from mutatis.errors import ArgumentError, StateTypeError
from mutatis.model.filters import Path
from mutatis.model.graph import make_cell
from mutatis.model.graphdef import describe_graph
from mutatis.model.modules import M, Module
from mutatis.model.operations import flat_for, nearest
from mutatis.model.surgery import modules
from mutatis.model.values import as_value
from mutatis.model.variables import Variable
from mutatis.model.walks import variables


def view(module: M, /, *, states: Any = None, **statics: Any) -> M:
    """Make a second module over the same states, with other settings or with other values for some of the states.

    A typical use is the model in evaluation mode: ``mu.view(model, training=False)``. It always sees the present parameters,
    because a view does not copy them, and a write by the view reaches the model too. Each setting is set on every submodule that
    has it, and `training` on all of them. The original keeps its settings.

    Args:
      module: the module.
      states: replacements for some of the states, by path. Values (a `State` or a dictionary of arrays) go into new states of the
        view. The states of another node (a model with the same paths, a `mu.optim.EMA`) are used themselves, not copied, so the
        view sees later writes to them.
      **statics: new values of static attributes, such as ``training=False``.

    Returns:
      A module of the same class.

    Raises:
      ArgumentError: no submodule has the attribute, or it holds states; a view shares these with the original.
      StateTypeError: a path does not exist, or a value has another structure, shape or dtype than the state; all are listed.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> model = mu.nn.Sequential(mu.nn.Linear(2, 3, rngs=mu.Rngs(0)), mu.nn.Dropout(0.5, rngs=mu.Rngs(1)))
      >>> evaluate = mu.view(model, training=False)
      >>> bool((evaluate(jnp.ones(2)) == model[0](jnp.ones(2))).all()), model.training
      (True, True)
      >>> zeros = mu.view(model[0], states={"kernel": jnp.zeros((2, 3))})
      >>> zeros(jnp.ones(2)), zeros.bias is model[0].bias
      (Array([0., 0., 0.], dtype=float32), True)
    """
    definition, cells = describe_graph(module)
    others = {} if states is None else _others(states, dict(zip(definition.paths, cells, strict=True)))
    entries = zip(definition.paths, definition.cells, cells, strict=True)
    other = definition.build([_holding(spec, others[path]) if path in others else cell for path, spec, cell in entries])
    parts = [*modules(other).values()]
    for part, original in zip(parts, modules(module).values(), strict=True):
        for name, value in part.__dict__.items():
            if isinstance(value, Reference) and value.lost:  # it leads out of the module, and a view is no copy
                part.__dict__[name] = original.__dict__[name]
    for name, value in statics.items():
        having = [part for part in parts if name == "training" or name in part.__dict__]
        if not having:
            raise ArgumentError(
                f"no module of {type(module).__name__} has an attribute `{name}`",
                path=name,
                cure="`mu.view` changes static attributes that exist; `training` is one of every module.",
            )
        for part in having:
            held = part.__dict__.get(name)
            if is_node(held) or (isinstance(held, list | tuple | dict) and variables(held)):
                raise ArgumentError(
                    f"`{name}` holds states, which a view shares with its original",
                    path=name,
                    expected="a static attribute",
                    got=type(held).__name__,
                    cure="Write to the model itself, or change a copy: `mu.clone(model)`.",
                )
            setattr(part, name, value)
    return other


def _others(states: Any, cells: dict[Path, Variable]) -> dict[Path, Any]:
    """What a view has in the place of some states: Variables, and values for new ones.

    Raises:
      StateTypeError: a path does not exist, or a value has another type.
    """
    if isinstance(states, Module):
        shadows = getattr(type(states), "_shadows", None)  # an average knows of which states it is one
        given: dict[Path, Any] = dict(variables(states) if shadows is None else shadows(states))
    else:
        given = flat_for(states, cells)
    problems = []
    for path, value in given.items():
        if path not in cells:
            problems.append(f"unexpected: {show_path(path)}{nearest(path, cells)}")
            continue
        old = access.peek(cells[path])
        new = access.peek(value) if isinstance(value, Variable) else as_value(value, cells[path])
        if not isinstance(value, Variable):
            given[path] = new
        waits = any(x is UNSET or type(x) is Deferred for x in (old, new))
        if not waits and not same_type(old, new):
            problems.append(f"{show_path(path)}: expected {show_type(old)}, got {show_type(new)}")
    if problems:
        raise StateTypeError(
            "the states for a view do not fit the module",
            differences=problems,
            cure="`mu.variables(model)` lists the states by path; `mu.view(model, states=mu.state(other, mu.Param))` takes some.",
        )
    return given


def _holding(spec: Any, other: Any) -> Variable:
    """A state as a view has it: that which was given, or a new one with this value."""
    if isinstance(other, Variable):
        return other
    cell = make_cell(spec)
    access.create(cell, other)
    return cell
