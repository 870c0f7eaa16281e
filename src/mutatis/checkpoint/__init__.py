"""Checkpoints: the states of a model on disk, whole or not at all.

`save` writes what `mu.state` would give, by path and explicit name, with kinds; `restore` puts it back into a model
that was built by the same code. A checkpoint is a directory: the arrays, written by Orbax, and one manifest in JSON.
A reader finds the old one or the new one, never a part; and nothing of a model is written before all has been checked.
Static attributes are not saved: they are the code's.
"""

from mutatis import _homes
from mutatis.checkpoint.restoring import restore as restore
from mutatis.checkpoint.saving import save as save

__all__ = ["restore", "save"]

_homes.publish(__name__, {name: globals()[name] for name in __all__})
