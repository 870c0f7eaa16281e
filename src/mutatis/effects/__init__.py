"""Effects: the local state of layers as a dictionary that goes in as an argument and comes out as a result.

A layer of any pytree type (a dataclass, an Equinox or Penzai module, a dict) asks for state by an attribute that holds an
`InitialLocalStateRequest`. `handle_local_states` replaces each request by a reference, and returns the values as a dictionary.
The handled layer maps ``(argument, states)`` to ``(output, new_states)``. `freeze_local_states` puts values back into the layer.

A handled call is a transaction whose overlay is filled from the dictionary. A reference acts as a `Variable` that has no value
outside of the call, so every transform of Mutatis understands the state, and refuses a write that would leak. The states of a
Mutatis `Module` are its Variables: the overlay lies on the cells of the model itself, and nothing else differs. If the layer
writes other states, the write goes to the place of the call; with handlers around handlers, that is the next handler's overlay.

**Names.** A state with an explicit name goes by it: the name stays when its layer moves, and `rename` changes it. Any other state
goes by its position in the tree when it was handled, with the names of the classes on the way there:
``Chain.parts[1]/Total.state``. The name of a Module's state ends in its path in the Module. Renaming does not change a position.
"""

from mutatis import _homes
from mutatis.effects.handling import LocalStateEffectImpl as LocalStateEffectImpl
from mutatis.effects.handling import WithFunctionalLocalState as WithFunctionalLocalState
from mutatis.effects.handling import freeze_local_states as freeze_local_states
from mutatis.effects.handling import handle_local_states as handle_local_states
from mutatis.effects.renaming import add_parameter_prefix as add_parameter_prefix
from mutatis.effects.renaming import rename as rename
from mutatis.effects.requests import FrozenLocalStateRequest as FrozenLocalStateRequest
from mutatis.effects.requests import HandledLocalStateRef as HandledLocalStateRef
from mutatis.effects.requests import InitialLocalStateRequest as InitialLocalStateRequest
from mutatis.effects.requests import LocalStateEffect as LocalStateEffect
from mutatis.effects.requests import SharedLocalStateRequest as SharedLocalStateRequest
from mutatis.effects.sharing import embed_shared_state_requests as embed_shared_state_requests
from mutatis.effects.sharing import hoist_shared_state_requests as hoist_shared_state_requests
from mutatis.model.marks import thaw as thaw

__all__ = [
    "FrozenLocalStateRequest",
    "HandledLocalStateRef",
    "InitialLocalStateRequest",
    "LocalStateEffect",
    "LocalStateEffectImpl",
    "SharedLocalStateRequest",
    "WithFunctionalLocalState",
    "add_parameter_prefix",
    "embed_shared_state_requests",
    "freeze_local_states",
    "handle_local_states",
    "hoist_shared_state_requests",
    "rename",
    "thaw",
]

_homes.publish(__name__, {name: globals()[name] for name in __all__})
