"""The options of `mu.jit` that reach `jax.jit`."""

from __future__ import annotations

from typing import Any

import jax

from mutatis import _compat
from mutatis.tracing.arguments import FlatTree


class Options:
    """The options of `mu.jit` that reach `jax.jit`."""

    def __init__(
        self,
        *,
        donate: str | bool = "auto",
        static_argnums: tuple[int, ...] = (),
        static_argnames: tuple[str, ...] = (),
        donate_args: frozenset[Any] = frozenset(),
        in_shardings: Any = _compat.UNSPECIFIED,
        out_shardings: Any = _compat.UNSPECIFIED,
        keep_unused: bool = False,
        inline: bool = False,
        compiler_options: dict[str, Any] | None = None,
        where: dict[str, Any] | None = None,
    ) -> None:
        self.donate = donate
        self.static_argnums = frozenset(static_argnums)
        self.static_argnames = frozenset(static_argnames)
        self.donate_args = donate_args
        self.in_shardings = in_shardings
        self.out_shardings = out_shardings
        self.keep_unused = keep_unused
        self.inline = inline
        self.compiler_options = compiler_options
        self.where = where or {}

    def constrain_outputs(self, packed: FlatTree) -> list[Any]:
        """The leaves of the result, placed as `out_shardings` says."""
        if self.out_shardings is _compat.UNSPECIFIED:
            return packed.leaves
        tree = packed.unflatten(packed.leaves, [None] * len(packed.nodes))
        full = jax.tree.broadcast(self.out_shardings, tree, is_leaf=lambda x: x is None)
        shardings = jax.tree.leaves(full, is_leaf=lambda x: x is None)
        return [
            leaf if sharding is None else jax.lax.with_sharding_constraint(leaf, sharding)
            for leaf, sharding in zip(packed.leaves, shardings, strict=True)
        ]
