"""The optimizer: any optax transformation over the states of a model; and averages of these states."""

from typing import Any

from mutatis import _equivalents, _homes
from mutatis.optim.averages import EMA as EMA
from mutatis.optim.optimizer import Optimizer as Optimizer

__all__ = ["EMA", "Optimizer"]

_homes.publish(__name__, {"EMA": EMA})


def __getattr__(name: str) -> Any:
    raise _equivalents.missing(__name__, name)
