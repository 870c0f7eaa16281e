"""Inspection: what a model holds and what functions do with it."""

from mutatis.compilations import Compilation as Compilation
from mutatis.compilations import Explanation as Explanation
from mutatis.inspect.explanation import explain as explain
from mutatis.inspect.summary import StateTable as StateTable
from mutatis.inspect.summary import state_table as state_table

__all__ = ["Compilation", "Explanation", "StateTable", "explain", "state_table"]
