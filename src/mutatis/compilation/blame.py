"""Blame: what JAX says about the arguments of a compiled program, in terms of states and of the user's arguments.

To JAX, a program has one list of arguments, ``flat``: the states and then the leaves of the user's arguments. An error that
names one of them is rewritten in place, so that its class stays; where the remedy is ours to say, there is an error of our own.
"""

from __future__ import annotations

import re
from typing import Any

import jax

from mutatis.compilation import program
from mutatis.compilation.pending import PendingCall
from mutatis.core.naming import describe
from mutatis.errors import ArgumentError, MutatisError, StructureError
from mutatis.model.variables import spelled
from mutatis.tracing.arguments import leaf_places
from mutatis.tracing.blame import source

_ARGUMENT = re.compile(r"flat\[(\d+)\]((?:\[[^\]]*\]|\.\w+)*)")
_SOURCE = re.compile(rf" at {re.escape(program.__file__)}:\d+")


def explain(error: Exception, call: PendingCall, flat: list[Any]) -> None:
    """Say what an error that JAX raised is about.

    Args:
      error: the error; its text is changed if it speaks of arguments by number.
      call: the call that it was raised in.
      flat: the values of the arguments of the call.

    Raises:
      ArgumentError: an argument is nothing that JAX knows.
      StructureError: states and arguments are on different devices, or an array of a state was deleted.
    """
    text = error.args[0] if error.args else None
    if not isinstance(text, str) or isinstance(error, MutatisError):
        return
    if text.startswith("Array has been deleted"):
        _refuse_deleted(error, call)
    if call.program.label not in text and call.program.label.rpartition(".")[2] not in text:
        return  # it is about another function
    if text.startswith("Error interpreting argument") and (found := _ARGUMENT.search(text)):
        _refuse_argument(error, call, flat, found)
    if text.startswith("Received incompatible devices"):
        _refuse_devices(error, call, flat)
    new = _ARGUMENT.sub(lambda found: _name(call, found), text)
    new = _SOURCE.sub(lambda _: source(call.functions[0]), new)
    if new != text:
        error.args = (new, *error.args[1:])


def _name(call: PendingCall, found: re.Match[str]) -> str:
    """An argument as the user knows it."""
    number, rest = int(found[1]), found[2]
    cells = call.binding.cells
    if number < len(cells):
        return f"state {_describe(call, cells[number])}{rest}"
    return f"`{_argument(call, number - len(cells), rest)}`"


def _argument(call: PendingCall, number: int, rest: str) -> str:
    """An argument, or a part of it, as an expression."""
    layout = call.binding.layout
    position = layout.positions[number] if number < len(layout.positions) else "?"
    if position in layout.mixed and (index := re.match(r"\[(\d+)\]", rest)):
        value = call.args[position] if isinstance(position, int) else call.kwargs[position]
        rest = leaf_places(value)[int(index[1])]
    if call.operands and position == 1 and (index := re.match(r"\[(\d+)\]", rest)):
        return call.operands[int(index[1])] + rest[index.end() :]
    return f"{call.argument_name(position)}{rest}"


def _describe(call: PendingCall, cell: Any) -> str:
    path = call.scope().locate(cell)
    return f"`{path}` ({type(cell).__name__})" if path else describe(cell)


def _refuse_deleted(error: Exception, call: PendingCall) -> None:
    for cell in call.binding.cells:
        if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in jax.tree.leaves(cell._value)):
            raise StructureError(
                f"state {_describe(call, cell)} holds an array that was deleted",
                path=call.scope().locate(cell),
                where=call.label,
                expected="an array that no other program was given to use up",
                got=str(error),
                made_at=cell.made_at,
                cure="Donate copies to functions of raw JAX: `jax.tree.map(jnp.copy, mu.state(model))`.",
            ) from error


def _refuse_argument(error: Exception, call: PendingCall, flat: list[Any], found: re.Match[str]) -> None:
    number = int(found[1]) - len(call.binding.cells)
    name = _argument(call, number, found[2])
    kind = re.search(r"of type <class '(?:builtins\.)?([^']*)'>", str(error))
    what = kind[1] if kind else type(flat[number]).__name__
    if call.operands:
        cure = "Give arrays, `jnp.asarray(xs)`, and let the function itself name what stays the same."
    elif name.isidentifier():
        cure = f'What decides how to compile is static: `mu.jit(f, static_argnames="{name}")`.'
    else:
        cure = "Give what decides how to compile by itself, and say that it is static: "
        cure += '`mu.jit(f, static_argnames="mode")`.'
    raise ArgumentError(
        f"argument `{name}` is a {what}, which JAX has no arrays for",
        path=name,
        where=call.label,
        expected="an array, a number, a Module, or a pytree of these",
        got=f"a {what}",
        cure=cure,
    ) from error


def _refuse_devices(error: Exception, call: PendingCall, flat: list[Any]) -> None:
    """Name the first two states or arguments that are on different devices for good."""
    scope = call.scope()
    count = len(call.binding.cells)
    places: list[tuple[str, Any, Any]] = []  # names, cells (None for arguments) and shardings; the states come first
    for number, value in enumerate([*(cell._value for cell in call.binding.cells), *flat]):
        for path, leaf in jax.tree_util.tree_flatten_with_path(value)[0]:
            if isinstance(leaf, jax.Array) and leaf.committed:
                cell = call.binding.cells[number] if number < count else None
                part = jax.tree_util.keystr(path)
                name = _argument(call, number - count, part) if cell is None else str(scope.locate(cell))
                places.append((name, cell, leaf.sharding))
    for name, cell, sharding in places:
        first, other, at = places[0]
        if sharding.device_set != at.device_set:
            moved, to = _value_of(name, cell), _value_of(first, other)
            new = f"jax.device_put({moved}, {to}.sharding)"
            raise StructureError(
                f"{_named(first, other)} and {_named(name, cell)} are on different devices",
                path=first,
                where=call.label,
                expected="the states and arguments of a call on the same devices",
                got=f"`{first}` on {_show(at)}, `{name}` on {_show(sharding)}",
                cure=f"Put one where the other is: `{name} = {new if moved == name else f'{spelled(type(cell))}({new})'}`.",
            ) from error


def _named(name: str, cell: Any) -> str:
    return f"argument `{name}`" if cell is None else f"state `{name}` ({type(cell).__name__})"


def _value_of(name: str, cell: Any) -> str:
    """An expression for an array: what is behind an attribute is read as one."""
    return name if cell is None or cell._behind else f"{name}.value"


def _show(sharding: Any) -> str:
    devices = sorted(sharding.device_set, key=lambda device: device.id)
    return ", ".join(map(str, devices[:4])) + (f" and {len(devices) - 4} more" if len(devices) > 4 else "")
