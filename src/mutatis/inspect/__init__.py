"""Inspection: the content of a model, and the use that functions make of it."""

from mutatis import _homes
from mutatis.compilation.log import Compilation as Compilation
from mutatis.compilation.log import Explanation as Explanation
from mutatis.inspect import plot as plot
from mutatis.inspect.counting import Count as Count
from mutatis.inspect.counting import count as count
from mutatis.inspect.explanation import explain as explain
from mutatis.inspect.ledger import Collective as Collective
from mutatis.inspect.ledger import Entry as Entry
from mutatis.inspect.ledger import Ledger as Ledger
from mutatis.inspect.ledger import LedgerDiff as LedgerDiff
from mutatis.inspect.ledger import ledger as ledger
from mutatis.inspect.nonfinite import Nonfinite as Nonfinite
from mutatis.inspect.nonfinite import find_nonfinite as find_nonfinite
from mutatis.inspect.paging import Page as Page
from mutatis.inspect.paging import page as page
from mutatis.inspect.placing import PlacementTable as PlacementTable
from mutatis.inspect.placing import placements as placements
from mutatis.inspect.summary import StateTable as StateTable
from mutatis.inspect.summary import state_table as state_table
from mutatis.inspect.tabulation import Call as Call
from mutatis.inspect.tabulation import Tabulation as Tabulation
from mutatis.inspect.tabulation import tabulate as tabulate
from mutatis.inspect.trees import tree as tree
from mutatis.inspect.watching import Broken as Broken
from mutatis.inspect.watching import History as History
from mutatis.inspect.watching import StateWatchWarning as StateWatchWarning
from mutatis.inspect.watching import Watch as Watch
from mutatis.inspect.watching import history as history
from mutatis.inspect.watching import watch as watch
from mutatis.model.tree import Tree as Tree

__all__ = [
    "Call",
    "Tabulation",
    "tabulate",
    "Collective",
    "Compilation",
    "Entry",
    "Explanation",
    "Ledger",
    "LedgerDiff",
    "Nonfinite",
    "PlacementTable",
    "StateTable",
    "explain",
    "find_nonfinite",
    "ledger",
    "placements",
    "plot",
    "state_table",
    "Broken",
    "History",
    "StateWatchWarning",
    "Watch",
    "history",
    "watch",
    "Count",
    "Page",
    "Tree",
    "count",
    "page",
    "tree",
]

_homes.publish(__name__, {name: globals()[name] for name in __all__})
