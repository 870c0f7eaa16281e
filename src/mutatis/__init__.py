"""Explicit, typed, mutable state for JAX models, understood by every transform: `import mutatis as mu`."""

import pkgutil
from typing import TYPE_CHECKING

from mutatis import errors as errors
from mutatis.axes import Carry as Carry
from mutatis.axes import Shared as Shared
from mutatis.axes import StateAxes as StateAxes
from mutatis.axes import StateSharding as StateSharding
from mutatis.contexts import Context as Context
from mutatis.eager import transaction as transaction
from mutatis.errors import CapturedStateWarning as CapturedStateWarning
from mutatis.errors import MutatisError as MutatisError
from mutatis.filters import All as All
from mutatis.filters import AnyOf as Any
from mutatis.filters import Everything as Everything
from mutatis.filters import Filter as Filter
from mutatis.filters import Not as Not
from mutatis.filters import Nothing as Nothing
from mutatis.filters import OfType as OfType
from mutatis.filters import PathContains as PathContains
from mutatis.filters import WithTag as WithTag
from mutatis.graph import GraphDef as GraphDef
from mutatis.graph import variables as variables
from mutatis.interventions import capture as capture
from mutatis.interventions import intercept as intercept
from mutatis.interventions import perturb as perturb
from mutatis.interventions import sow as sow
from mutatis.kinds import BatchStat as BatchStat
from mutatis.kinds import Buffer as Buffer
from mutatis.kinds import Cache as Cache
from mutatis.kinds import Hidden as Hidden
from mutatis.kinds import Intermediate as Intermediate
from mutatis.kinds import MetricState as MetricState
from mutatis.kinds import OptState as OptState
from mutatis.kinds import Param as Param
from mutatis.kinds import Perturbation as Perturbation
from mutatis.kinds import RngState as RngState
from mutatis.modules import Module as Module
from mutatis.observers import on_commit as on_commit
from mutatis.optim import Optimizer as Optimizer
from mutatis.random import Rngs as Rngs
from mutatis.random import reseed as reseed
from mutatis.state import State as State
from mutatis.state import clone as clone
from mutatis.state import freeze as freeze
from mutatis.state import graphdef as graphdef
from mutatis.state import merge as merge
from mutatis.state import pop as pop
from mutatis.state import reset as reset
from mutatis.state import snapshot as snapshot
from mutatis.state import split as split
from mutatis.state import state as state
from mutatis.state import thaw as thaw
from mutatis.state import update as update
from mutatis.state import view as view
from mutatis.statics import static as static
from mutatis.surgery import modules as modules
from mutatis.surgery import replace as replace
from mutatis.transforms.abstract import eval_shape as eval_shape
from mutatis.transforms.abstract import make_jaxpr as make_jaxpr
from mutatis.transforms.autodiff import grad as grad
from mutatis.transforms.autodiff import value_and_grad as value_and_grad
from mutatis.transforms.batching import vmap as vmap
from mutatis.transforms.branches import cond as cond
from mutatis.transforms.branches import switch as switch
from mutatis.transforms.custom_rules import custom_jvp as custom_jvp
from mutatis.transforms.custom_rules import custom_vjp as custom_vjp
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
from mutatis.variables import Variable as Variable

if TYPE_CHECKING:
    from mutatis import checkpoint as checkpoint
    from mutatis import effects as effects
    from mutatis import functional as functional
    from mutatis import inspect as inspect
    from mutatis import interop as interop
    from mutatis import metrics as metrics
    from mutatis import nn as nn
    from mutatis.effects import rename as rename

# Imported at their first use: who wants a state and a step does not pay for them.
_LATER = {
    "checkpoint": "mutatis.checkpoint",
    "effects": "mutatis.effects",
    "functional": "mutatis.functional",
    "inspect": "mutatis.inspect",
    "interop": "mutatis.interop",
    "metrics": "mutatis.metrics",
    "nn": "mutatis.nn",
    "rename": "mutatis.effects:rename",
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
    "capture",
    "checkpoint",
    "clone",
    "cond",
    "custom_jvp",
    "custom_vjp",
    "effects",
    "errors",
    "eval_shape",
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
    "make_jaxpr",
    "map",
    "merge",
    "metrics",
    "modules",
    "nn",
    "on_commit",
    "perturb",
    "pop",
    "remat",
    "replace",
    "rename",
    "reseed",
    "reset",
    "scan",
    "shard_map",
    "snapshot",
    "sow",
    "split",
    "state",
    "static",
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


def __getattr__(name: str) -> object:
    if name in _LATER:
        return pkgutil.resolve_name(_LATER[name])
    raise AttributeError(f"module 'mutatis' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
