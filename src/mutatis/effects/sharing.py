"""States that several places of a tree share: one defines it, those after it ask for it by its name.

`hoist_shared_state_requests` takes the definitions out, so that parts can be moved between models, and
`embed_shared_state_requests` puts each back at the first place that asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from mutatis.effects.requests import (
    REQUESTS,
    Category,
    FrozenLocalStateRequest,
    InitialLocalStateRequest,
    Request,
    SharedLocalStateRequest,
    is_part,
    parts_of,
)
from mutatis.errors import EffectError
from mutatis.model.variables import Variable


def hoist_shared_state_requests(tree: Any, unsafe: bool = False) -> tuple[Any, dict[str, Request]]:
    """Take the definitions of shared states out of a tree, so that its parts can be moved.

    Args:
      tree: any pytree. Variables that Modules share are left alone: a Module can be moved as it is.
      unsafe: whether the definitions of one name may differ; the last one is then taken.

    Returns:
      A pair: the tree, with a `SharedLocalStateRequest` in place of each request whose name occurs several times, and a
      dictionary from these names to the definitions.

    Raises:
      EffectError: the requests of one name have several categories or definitions.

    Example:
      >>> import jax.numpy as jnp
      >>> from mutatis import effects
      >>> first = effects.InitialLocalStateRequest(lambda: jnp.zeros(()), category="sums", name="total")
      >>> tree = [first, effects.SharedLocalStateRequest("total", category="sums")]
      >>> tree, definitions = effects.hoist_shared_state_requests(tree)
      >>> [type(part).__name__ for part in tree], [*definitions]
      (['SharedLocalStateRequest', 'SharedLocalStateRequest'], ['total'])
    """
    requests = [part for _, part in parts_of(tree) if isinstance(part, REQUESTS) and part.name is not None]
    names = [request.name for request in requests]
    definitions: dict[str, Request] = {}
    categories: dict[str, Category] = {}
    for request in requests:
        name: Any = request.name
        if names.count(name) > 1:
            check_category(name, request.category, categories.setdefault(name, request.category))
            if not isinstance(request, SharedLocalStateRequest):
                check_definition(name, request, definitions.get(name), "unsafe" if unsafe else "allowed")
                definitions[name] = request

    def hoist(part: Any) -> Any:
        shared = isinstance(part, REQUESTS) and part.name in definitions
        return SharedLocalStateRequest(part.name, part.category) if shared else part

    return jax.tree.map(hoist, tree, is_leaf=is_part), definitions


def embed_shared_state_requests(tree: Any, state_requests: Mapping[str, Request]) -> Any:
    """Put the definitions of shared states back into a tree, each at the first request of its name.

    Args:
      tree: any pytree.
      state_requests: a dictionary from names to definitions, as `hoist_shared_state_requests` returns it. Names that do not occur
        in the tree are ignored.

    Returns:
      The tree with the definitions.

    Raises:
      EffectError: a definition has another name or category than its requests, or the tree already has a definition.

    Example:
      >>> import jax.numpy as jnp
      >>> from mutatis import effects
      >>> request = effects.SharedLocalStateRequest("total", category="sums")
      >>> definition = effects.InitialLocalStateRequest(lambda: jnp.zeros(()), category="sums", name="total")
      >>> tree = effects.embed_shared_state_requests([request, request], {"total": definition})
      >>> [type(part).__name__ for part in tree]
      ['InitialLocalStateRequest', 'SharedLocalStateRequest']
    """
    pending: dict[Any, Any] = dict(state_requests)
    for name, request in pending.items():
        if not isinstance(request, InitialLocalStateRequest | FrozenLocalStateRequest) or request.name != name:
            raise EffectError(
                f"state `{name}` is not defined by what goes by its name",
                path=name,
                expected=f"an initial or frozen request with the name {name!r}",
                got=f"{type(request).__name__} with the name {getattr(request, 'name', None)!r}",
                cure="Key the definitions by their names: `{r.name: r for r in state_requests.values()}`.",
            )
    for _, part in parts_of(tree):
        if isinstance(part, REQUESTS) and part.name in pending:
            check_category(part.name, part.category, pending[part.name].category)
            if not isinstance(part, SharedLocalStateRequest):
                raise _several(part.name, pending[part.name], part)

    def embed(part: Any) -> Any:
        return pending.pop(part.name, part) if isinstance(part, SharedLocalStateRequest) else part

    return jax.tree.map(embed, tree, is_leaf=is_part)


def check_category(name: Any, category: Category, other: Category) -> None:
    if category != other:
        raise EffectError(
            f"state `{name}` is shared by places of several categories",
            path=name,
            expected=repr(other),
            got=repr(category),
            cure="Give the category of the place with the value: "
            f"`mu.effects.SharedLocalStateRequest({name!r}, {other!r})`.",
        )


def check_shared(request: SharedLocalStateRequest, before: Any, sharing: str) -> None:
    """Raise unless a place may share what was found before it."""
    if sharing == "forbidden":
        raise _forbidden(request.name)
    if before is None or isinstance(before, Variable) or before.name is None:
        raise EffectError(
            f"state `{request.name}` is shared before it is defined",
            path=request.name,
            expected="an initial or frozen request with this name, earlier in the tree",
            got="none" if before is None else "a state of a Module, or one without a name",
            cure="Put the definitions at their first places: "
            "`mu.effects.embed_shared_state_requests(*mu.effects.hoist_shared_state_requests(tree))`.",
        )
    check_category(request.name, request.category, before.category)


def check_definition(key: str, request: Request, before: Any, sharing: str) -> None:
    """Raise unless a request may define what is defined already."""
    if before is None:
        return
    if isinstance(before, Variable) or before.name is None or request.name is None:
        raise _several(key, before, request)  # an explicit name that is also a position
    if sharing == "forbidden":
        raise _forbidden(key)
    if sharing == "allowed":
        check_category(key, request.category, before.category)
        both = isinstance(request, InitialLocalStateRequest) and isinstance(before, InitialLocalStateRequest)
        if not both or request.state_initializer is not before.state_initializer:  # type: ignore[union-attr]
            raise _several(key, before, request)


def _forbidden(name: str) -> EffectError:
    return EffectError(
        f"several places share the state `{name}`",
        path=name,
        expected="one place for each name (state_sharing='forbidden')",
        cure="If that is meant: `mu.effects.handle_local_states(layer, category=..., state_sharing='allowed')`. "
        "If not, give each its own name.",
    )


def _several(name: Any, before: Any, request: Any) -> EffectError:
    return EffectError(
        f"state `{name}` has several definitions",
        path=name,
        expected="one, or initial requests with the same initializer",
        got=f"{type(before).__name__} and {type(request).__name__}",
        cure=f"Leave one, and ask for it at the other places: `mu.effects.SharedLocalStateRequest({name!r}, "
        f"{request.category!r})`.",
    )
