"""Views: other modules over the same cells."""

from __future__ import annotations

from typing import Any

from mutatis.core.nodes import Reference, is_node
from mutatis.errors import ArgumentError
from mutatis.model.graphdef import describe_graph
from mutatis.model.modules import M
from mutatis.model.surgery import modules
from mutatis.model.walks import variables


def view(module: M, /, **statics: Any) -> M:
    """Another module over the same cells with other static attributes, such as ``training=False``.

    Each attribute is set on every submodule that has it; `training` on all.

    Raises:
      ArgumentError: no submodule has the attribute, or it holds states: those are the original's too.
    """
    definition, cells = describe_graph(module)
    other = definition.build(list(cells))
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
