"""Strangers: layers of other libraries, which are no attributes of a module as they are, but have a door in `mutatis.interop`."""

from __future__ import annotations

from typing import Any

from mutatis.errors import StructureError

# The base class of layers, by the module in which it is defined and its name; how a layer comes in.
_LAYERS = {
    ("flax.nnx", "Module"): "mutatis.interop.FromNnx(layer)",
    ("flax.linen", "Module"): "mutatis.interop.FromLinen(layer, rngs=rngs)",
    ("equinox", "Module"): "mutatis.interop.FromEquinox(layer)",
    ("haiku", "Module"): "mutatis.interop.FromHaiku(lambda x: Layer()(x), rngs=rngs)",
}


def door(value: Any) -> str | None:
    """How a layer of another library comes into a model; None for anything else."""
    for base in type(value).__mro__:
        for (library, name), way in _LAYERS.items():
            if base.__name__ == name and f"{base.__module__}.".startswith(f"{library}."):
                # In Equinox everything is a Module; what is called is a layer, and what is not a value (a linear operator).
                return way if library != "equinox" or callable(value) else None
    return None


def refuse_layer(owner: type, name: str, value: Any) -> None:
    """Raise if a value is a layer of another library.

    Raises:
      StructureError: it is.
    """
    if (way := door(value)) is not None:
        raise StructureError(
            f"`{owner.__name__}.{name}` is a layer of another library, whose states would not be seen",
            path=f"{owner.__name__}.{name}",
            expected="a Mutatis module",
            got=f"{type(value).__module__}.{type(value).__name__}",
            cure=f"Bring it in: `self.{name} = {way}`.",
        )
