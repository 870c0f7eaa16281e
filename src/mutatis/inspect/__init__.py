"""Inspection: what a model holds and what functions do with it."""

from mutatis.inspect.summary import StateTable as StateTable
from mutatis.inspect.summary import state_table as state_table

__all__ = ["StateTable", "state_table"]
