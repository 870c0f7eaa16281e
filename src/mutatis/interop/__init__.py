"""Modules and weights of other libraries in Mutatis models, and Mutatis modules in theirs.

`load` reads *weights* from files (safetensors, PyTorch, GGUF, Orbax) and live models, and `save` and `export` write them; rules
say how names and layouts differ. Eight classes wrap *modules*:

| library | their module as a part of a Mutatis model | a Mutatis module as a part of their model |
|---|---|---|
| `flax.linen` | `FromLinen(module, rngs=rngs)` | `ToLinen(constructor)`, a `linen.Module` |
| `flax.nnx` | `FromNnx(module)` | `ToNnx(model)`, an `nnx.Module` |
| `equinox` | `FromEquinox(module)` | `ToEquinox(model)`, an `equinox.Module` |
| `haiku` | `FromHaiku(function, rngs=rngs)` | `ToHaiku(constructor)`, a `haiku.Module` |

A wrapped module *from* another library is a `Module`. Its states are in the nested dictionary `variables`, by the names that the
other library gives them, each of the kind that its collection or type says. A call passes their values to the pure function of
the other library and writes the changed ones back. So it is differentiated, mapped, scanned, frozen and saved like any module. In
training each call gives the other module fresh random keys from the streams of the module. After `eval()` it draws none, and a
module that is still random then needs keys with the call.

A wrapped module *to* another library is a real module of that library. Where modules are objects (NNX, Equinox) the wrapper takes
a model; where they are recipes (Linen, Haiku) it takes a function ``constructor(rngs)`` that makes one. The other library holds
its states, by collection. The wrapper puts the model together around them for each call, and takes it apart afterwards. So
sharing is kept, and the transforms of the other library see values only. Frozen states are with the buffers, so they are not
trained.

The other library is imported when its wrapper is first used.
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
    "Sum",
    "Transpose",
    "Weights",
    "export",
    "load",
    "read",
    "recurrent",
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
