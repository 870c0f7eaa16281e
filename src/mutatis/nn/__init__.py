"""Layers: modules with the names and defaults of the field; activations and initializers are those of `jax.nn`."""

from typing import Any

from mutatis import _equivalents, _homes
from mutatis.nn.linear import Conv as Conv
from mutatis.nn.linear import Linear as Linear
from mutatis.nn.normalization import BatchNorm as BatchNorm
from mutatis.nn.stochastic import Dropout as Dropout

__all__ = ["BatchNorm", "Conv", "Dropout", "Linear"]


def __getattr__(name: str) -> Any:
    raise _equivalents.missing(__name__, name)


_homes.publish(__name__, {name: globals()[name] for name in __all__})
