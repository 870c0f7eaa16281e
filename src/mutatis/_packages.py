"""Optional packages: imported where they are used; what is missing is named with the extra that installs it."""

from __future__ import annotations

import importlib
from typing import Any

from mutatis.errors import MissingPackageError

# How pip knows a package: its distribution, and the extra of Mutatis that has it. Other packages are called as they are imported.
DISTRIBUTIONS = {
    "orbax": ("orbax-checkpoint", "checkpoint"),
    "rich": ("rich", "rich"),
    "tqdm": ("tqdm", "progress"),
    "matplotlib": ("matplotlib", "plot"),
    "flatbuffers": ("flatbuffers", "export"),
    "safetensors": ("safetensors", "safetensors"),
    "gguf": ("gguf", "gguf"),
    "flax": ("flax", "interop"),
    "equinox": ("equinox", "interop"),
    "haiku": ("dm-haiku", "interop"),
}


def require(name: str, user: str) -> Any:
    """A module of an optional package.

    Args:
      name: the module, dotted.
      user: what needs it, for the message: ``"mu.checkpoint"``.

    Raises:
      MissingPackageError: the package is not installed.
    """
    package = name.partition(".")[0]
    try:
        importlib.import_module(package)
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the package is there, and something that it needs is not
        distribution, extra = DISTRIBUTIONS[package]
        raise MissingPackageError(
            f"`{user}` needs the package `{distribution}`, which is not installed",
            path=package,
            cure=f"pip install 'mutatis[{extra}]'  # or alone: pip install {distribution}",
        ) from error
