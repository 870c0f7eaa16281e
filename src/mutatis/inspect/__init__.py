"""Inspection: what a model holds and what functions do with it."""

from mutatis import _homes
from mutatis.compilation.log import Compilation as Compilation
from mutatis.compilation.log import Explanation as Explanation
from mutatis.inspect.explanation import explain as explain
from mutatis.inspect.ledger import Collective as Collective
from mutatis.inspect.ledger import Entry as Entry
from mutatis.inspect.ledger import Ledger as Ledger
from mutatis.inspect.ledger import LedgerDiff as LedgerDiff
from mutatis.inspect.ledger import ledger as ledger
from mutatis.inspect.summary import StateTable as StateTable
from mutatis.inspect.summary import state_table as state_table
from mutatis.inspect.tabulation import Call as Call
from mutatis.inspect.tabulation import Tabulation as Tabulation
from mutatis.inspect.tabulation import tabulate as tabulate

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
    "StateTable",
    "explain",
    "ledger",
    "state_table",
]

_homes.publish(__name__, {name: globals()[name] for name in __all__})
