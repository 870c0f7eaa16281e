"""Strangers: layers and states of other libraries, which are no attributes of a module as they are.

Layers have a door in `mutatis.interop`; states have a kind here.
"""

from __future__ import annotations

from typing import Any

from mutatis.errors import StructureError

# A base class, by the library that defines it and its name; how one of it comes in.
_STRANGERS = {
    ("flax.nnx", "Module"): "mutatis.interop.FromNnx(layer)",
    ("flax.linen", "Module"): "mutatis.interop.FromLinen(layer, rngs=rngs)",
    ("equinox", "Module"): "mutatis.interop.FromEquinox(layer)",
    ("haiku", "Module"): "mutatis.interop.FromHaiku(lambda x: Layer()(x), rngs=rngs)",
    ("flax.nnx", "Variable"): "mu.Param(variable.get_value())",
    ("flax.nnx", "Rngs"): "mu.Rngs(0)",
    ("brainstate", "State"): "mu.Variable(state.value)",
}


def door(value: Any) -> str | None:
    """How a layer or state of another library comes into a model; None for anything else."""
    for base in type(value).__mro__:
        for (library, name), way in _STRANGERS.items():
            if base.__name__ == name and f"{base.__module__}.".startswith(f"{library}."):
                # In Equinox everything is a Module; what is called is a layer, and what is not a value (a linear operator).
                return way if library != "equinox" or callable(value) else None
    return None


def plain_value(value: Any) -> Any:
    """The value of a state of Flax NNX, or of several, as they are in ``nnx.state(model)``; anything else as it is."""
    if isinstance(value, dict):
        return {key: plain_value(inner) for key, inner in value.items()}
    return value.get_value() if door(value) == _STRANGERS["flax.nnx", "Variable"] else value


def refuse_stranger(owner: type, name: str, value: Any) -> None:
    """Raise if a value is a layer or state of another library.

    Raises:
      StructureError: it is.
    """
    if (way := door(value)) is not None:
        raise StructureError(
            f"`{owner.__name__}.{name}` is of another library, whose states would not be seen",
            path=f"{owner.__name__}.{name}",
            expected="a module or state of Mutatis",
            got=f"{type(value).__module__}.{type(value).__name__}",
            cure=f"Bring it in: `self.{name} = {way}`.",
        )
