"""Explicit, typed, mutable state for JAX models, understood by every transform: `import mutatis as mu`."""

import pkgutil
from typing import TYPE_CHECKING

from mutatis import _equivalents, _homes
from mutatis import errors as errors
from mutatis import optim as optim
from mutatis.accumulation import accumulate as accumulate
from mutatis.collecting import collect as collect
from mutatis.core.statics import static as static
from mutatis.errors import CapturedStateWarning as CapturedStateWarning
from mutatis.errors import MutatisError as MutatisError
from mutatis.interventions import capture as capture
from mutatis.interventions import intercept as intercept
from mutatis.interventions import perturb as perturb
from mutatis.interventions import sow as sow
from mutatis.model.contexts import Context as Context
from mutatis.model.filters import All as All
from mutatis.model.filters import AnyOf as Any
from mutatis.model.filters import Everything as Everything
from mutatis.model.filters import Filter as Filter
from mutatis.model.filters import Not as Not
from mutatis.model.filters import Nothing as Nothing
from mutatis.model.filters import OfType as OfType
from mutatis.model.filters import PathContains as PathContains
from mutatis.model.filters import WithTag as WithTag
from mutatis.model.graphdef import GraphDef as GraphDef
from mutatis.model.kinds import BatchStat as BatchStat
from mutatis.model.kinds import Buffer as Buffer
from mutatis.model.kinds import Cache as Cache
from mutatis.model.kinds import Hidden as Hidden
from mutatis.model.kinds import Intermediate as Intermediate
from mutatis.model.kinds import MetricState as MetricState
from mutatis.model.kinds import OptState as OptState
from mutatis.model.kinds import Param as Param
from mutatis.model.kinds import Perturbation as Perturbation
from mutatis.model.kinds import RngState as RngState
from mutatis.model.marks import freeze as freeze
from mutatis.model.marks import thaw as thaw
from mutatis.model.modules import Module as Module
from mutatis.model.observers import on_commit as on_commit
from mutatis.model.operations import clone as clone
from mutatis.model.operations import graphdef as graphdef
from mutatis.model.operations import merge as merge
from mutatis.model.operations import pop as pop
from mutatis.model.operations import reset as reset
from mutatis.model.operations import split as split
from mutatis.model.operations import state as state
from mutatis.model.operations import update as update
from mutatis.model.snapshots import snapshot as snapshot
from mutatis.model.state import State as State
from mutatis.model.surgery import modules as modules
from mutatis.model.surgery import replace as replace
from mutatis.model.variables import Variable as Variable
from mutatis.model.views import view as view
from mutatis.model.walks import variables as variables
from mutatis.optim import Optimizer as Optimizer
from mutatis.random import Rngs as Rngs
from mutatis.random import reseed as reseed
from mutatis.tracing.axes import Carry as Carry
from mutatis.tracing.axes import Shared as Shared
from mutatis.tracing.axes import StateAxes as StateAxes
from mutatis.tracing.axes import StateSharding as StateSharding
from mutatis.transforms.abstract import eval_shape as eval_shape
from mutatis.transforms.abstract import make_jaxpr as make_jaxpr
from mutatis.transforms.autodiff import grad as grad
from mutatis.transforms.autodiff import value_and_grad as value_and_grad
from mutatis.transforms.batching import vmap as vmap
from mutatis.transforms.branches import cond as cond
from mutatis.transforms.branches import switch as switch
from mutatis.transforms.custom.jvp import custom_jvp as custom_jvp
from mutatis.transforms.custom.vjp import custom_vjp as custom_vjp
from mutatis.transforms.derivatives import jvp as jvp
from mutatis.transforms.derivatives import linearize as linearize
from mutatis.transforms.derivatives import vjp as vjp
from mutatis.transforms.functionalize import functionalize as functionalize
from mutatis.transforms.jacobians import hessian as hessian
from mutatis.transforms.jacobians import jacfwd as jacfwd
from mutatis.transforms.jacobians import jacrev as jacrev
from mutatis.transforms.jit import jit as jit
from mutatis.transforms.loops import for_loop as for_loop
from mutatis.transforms.loops import fori_loop as fori_loop
from mutatis.transforms.loops import scan as scan
from mutatis.transforms.loops import while_loop as while_loop
from mutatis.transforms.mapping import map as map
from mutatis.transforms.rematerialize import remat as remat
from mutatis.transforms.sharded import shard_map as shard_map
from mutatis.transforms.transaction import transaction as transaction

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mutatis import checkpoint as checkpoint
    from mutatis import effects as effects
    from mutatis import functional as functional
    from mutatis import inspect as inspect
    from mutatis import interop as interop
    from mutatis import metrics as metrics
    from mutatis import nn as nn
    from mutatis import recording as recording
    from mutatis import sharding as sharding
    from mutatis import surrogate as surrogate
    from mutatis.checkpoint import preemption as preemption
    from mutatis.checks import error_if as error_if
    from mutatis.effects import rename as rename
    from mutatis.exporting import LoadedProgram as LoadedProgram
    from mutatis.exporting import export as export
    from mutatis.exporting import load_program as load_program

# Imported at their first use: who wants a state and a step does not pay for them.
_LATER = {
    "checkpoint": "mutatis.checkpoint",
    "error_if": "mutatis.checks:error_if",
    "LoadedProgram": "mutatis.exporting:LoadedProgram",
    "effects": "mutatis.effects",
    "export": "mutatis.exporting:export",
    "load_program": "mutatis.exporting:load_program",
    "functional": "mutatis.functional",
    "inspect": "mutatis.inspect",
    "interop": "mutatis.interop",
    "metrics": "mutatis.metrics",
    "nn": "mutatis.nn",
    "preemption": "mutatis.checkpoint:preemption",
    "recording": "mutatis.recording",
    "rename": "mutatis.effects:rename",
    "sharding": "mutatis.sharding",
    "surrogate": "mutatis.surrogate",
}

__all__ = [
    "All",
    "Any",
    "BatchStat",
    "Buffer",
    "Cache",
    "CapturedStateWarning",
    "Carry",
    "Context",
    "Everything",
    "Filter",
    "GraphDef",
    "Hidden",
    "Intermediate",
    "LoadedProgram",
    "MetricState",
    "Module",
    "MutatisError",
    "Not",
    "Nothing",
    "OfType",
    "OptState",
    "Optimizer",
    "Param",
    "PathContains",
    "Perturbation",
    "RngState",
    "Rngs",
    "Shared",
    "State",
    "StateAxes",
    "StateSharding",
    "Variable",
    "WithTag",
    "accumulate",
    "capture",
    "checkpoint",
    "clone",
    "collect",
    "cond",
    "custom_jvp",
    "custom_vjp",
    "effects",
    "error_if",
    "errors",
    "eval_shape",
    "export",
    "for_loop",
    "fori_loop",
    "freeze",
    "functional",
    "functionalize",
    "grad",
    "graphdef",
    "hessian",
    "inspect",
    "intercept",
    "jacfwd",
    "jacrev",
    "interop",
    "jit",
    "jvp",
    "linearize",
    "load_program",
    "make_jaxpr",
    "merge",
    "metrics",
    "modules",
    "nn",
    "on_commit",
    "optim",
    "perturb",
    "pop",
    "preemption",
    "recording",
    "remat",
    "replace",
    "rename",
    "reseed",
    "reset",
    "scan",
    "shard_map",
    "sharding",
    "snapshot",
    "sow",
    "split",
    "state",
    "static",
    "surrogate",
    "switch",
    "thaw",
    "transaction",
    "update",
    "value_and_grad",
    "variables",
    "view",
    "vjp",
    "vmap",
    "while_loop",
]

# Public like the others, and called as Python's own: `from mutatis import *` leaves it out.
_NOT_BY_STAR = ["map"]


def __getattr__(name: str) -> object:
    if name in _LATER:
        return pkgutil.resolve_name(_LATER[name])
    raise _equivalents.missing(__name__, name)


def __dir__() -> list[str]:
    return sorted(__all__ + _NOT_BY_STAR)


_homes.publish(__name__, {name: globals()[name] for name in __dir__() if name not in _LATER})
_homes.read_former_pickles(__name__)
