"""Checkpoints: the states of a model on disk, complete or not at all.

`save` writes the states of a model by path and explicit name, with their kinds; `restore` writes them into a model that was built
by the same code. A checkpoint is a directory: the arrays, written by Orbax, and one manifest in JSON. A reader finds the old or
the new checkpoint, never a mixture, and `restore` checks everything before it writes the first state. Static attributes are not
saved: they belong to the code. `describe` and `load` read a checkpoint without a model; a `Manager` keeps the checkpoints of a
run; `preemption` lets a job that is told to end save first.
"""

from mutatis import _homes
from mutatis.checkpoint.managing import Manager as Manager
from mutatis.checkpoint.managing import Restored as Restored
from mutatis.checkpoint.preempting import preemption as preemption
from mutatis.checkpoint.reading import Description as Description
from mutatis.checkpoint.reading import describe as describe
from mutatis.checkpoint.reading import load as load
from mutatis.checkpoint.restoring import restore as restore
from mutatis.checkpoint.saving import save as save

__all__ = ["Description", "Manager", "Restored", "describe", "load", "preemption", "restore", "save"]

_homes.publish(__name__, {name: globals()[name] for name in __all__})
