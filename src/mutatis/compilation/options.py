"""The options of `mu.jit` that reach `jax.jit`."""

from __future__ import annotations

from typing import Any

from mutatis import _compat
from mutatis.compilation.shardings import is_sharding
from mutatis.core.showing import show_structure, show_value
from mutatis.errors import ArgumentError
from mutatis.tracing.arguments import FlatTree, broadcast


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

    def result_shardings(self, result: FlatTree) -> list[tuple[Any, Any]]:
        """Each leaf and node of a result with what `out_shardings` says of it."""
        tree = result.unflatten(result.leaves)
        if self.out_shardings is _compat.UNSPECIFIED:
            return []
        try:
            return broadcast(self.out_shardings, tree, is_sharding)
        except ValueError as error:
            raise ArgumentError(
                "`out_shardings` does not fit the result",
                expected=f"a prefix of {show_structure(result.structure[0])}",
                got=show_value(self.out_shardings),
                cure="Give one sharding for all, or the structure of the result with a sharding, or None, for each part.",
            ) from error
