"""Modules and weights of other libraries in Mutatis models, and Mutatis modules in theirs.

*Weights* come in by `load`, from files (safetensors, PyTorch, GGUF, Orbax) and live models, and go out by `save` and `export`;
rules say how names and layouts differ. *Modules* come and go by eight doors:

| library | theirs as a part of ours | ours as a part of theirs |
|---|---|---|
| `flax.linen` | `FromLinen(module, rngs=rngs)` | `ToLinen(constructor)`, a `linen.Module` |
| `flax.nnx` | `FromNnx(module)` | `ToNnx(model)`, an `nnx.Module` |
| `equinox` | `FromEquinox(module)` | `ToEquinox(model)`, an `equinox.Module` |
| `haiku` | `FromHaiku(function, rngs=rngs)` | `ToHaiku(constructor)`, a `haiku.Module` |

What comes *from* another library is a `Module` whose states stand in the nested dictionary `variables`, by the names that
the other library gives them, each of the kind that its collection or type says. A call hands their values to the other
library's pure function and writes back what changed; so it is threaded, differentiated, mapped, scanned, frozen and saved
like any module. In training each call gives the other module fresh random keys from the streams of the module; after
`eval()` it draws none, and what is still random needs keys with the call.

What goes *to* another library is a real module of that library. Where modules are objects (NNX, Equinox) it takes a model;
where they are recipes (Linen, Haiku) a function ``constructor(rngs)`` that makes one. Its states are held by the other
library's means, by collection; the model is put together around them for each call, and taken apart after it. So sharing
holds, and every transform of the other library sees values only. Frozen states are with the buffers: there they are not trained.

The other library is imported when its door is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = [
    "FromEquinox",
    "FromHaiku",
    "FromLinen",
    "FromNnx",
    "ToEquinox",
    "ToHaiku",
    "ToLinen",
    "ToNnx",
    "Halves",
    "Join",
    "Layout",
    "Reshape",
    "Split",
    "Transpose",
    "Weights",
    "export",
    "load",
    "read",
    "save",
    "equinox",
    "haiku",
    "linen",
    "nnx",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    door = name.removeprefix("From").removeprefix("To").lower()
    home = door if door in _DOORS else "weights"
    module = importlib.import_module(f"{__name__}.{home}")
    return module if name == home else getattr(module, name)


_DOORS = ("equinox", "haiku", "linen", "nnx")


def __dir__() -> list[str]:
    return sorted(__all__)
