"""Programs with their state: one file that holds a compiled step and the states it goes on from, without the model's source.

The file is a zip archive: ``program.json`` says what there is, ``program.bin`` is what `jax.export` gives, and each array has an
entry with its bytes. No code of the file is run but the program itself. JAX reads programs that are some months older or newer.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import pkgutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mutatis import _homes
from mutatis._packages import require
from mutatis.core.avals import numbers_of
from mutatis.core.naming import show_path
from mutatis.core.nodes import is_node
from mutatis.core.showing import show_class, show_structure, show_value
from mutatis.errors import ArgumentError, CheckpointError
from mutatis.model.filters import Path
from mutatis.model.modules import Module
from mutatis.model.operations import update
from mutatis.model.state import State
from mutatis.model.variables import ModuleInit, Variable, started
from mutatis.model.walks import variables
from mutatis.transforms.functionalize import functionalize
from mutatis.transforms.jit import jit

_FORMAT, _VERSION = "mutatis.program", 1
_BEGINNING = 1 << 24  # bytes of the description, at most


def export(
    f: Callable[..., Any],
    nodes: Any,
    *examples: Any,
    path: str | os.PathLike[str],
    platforms: Sequence[str] | None = None,
) -> None:
    """Write a function, together with the states that it reads and writes, to one file that runs without the source of the model.

    `f` is compiled by `jax.export`, and `mu.load_program` reads the file, on another machine too. The file is written completely
    or not at all.

    Args:
      f: the function, called as ``f(*nodes, *examples)``.
      nodes: its first argument: a Module, a Variable, or a list or dict of them; or a tuple of several such arguments. Leave it
        out to export a model as it is called: ``mu.export(model, x, path="model.mu")``.
      *examples: its other arguments: arrays, or `jax.ShapeDtypeStruct` for their shapes and dtypes, also in lists, tuples and
        dictionaries. A size may be symbolic (`jax.export.symbolic_shape`), and is then free in each call.
      path: the file.
      platforms: the platforms to compile for, such as ``["cpu", "cuda", "tpu"]``. The default is that of this machine.

    Raises:
      ArgumentError: `path` is not a path.
      MissingPackageError: flatbuffers is not installed, which JAX needs for this.
      StructureError: `f` makes or removes states.
      DeferredStateError: a state has no value yet.

    Example:
      >>> import jax, jax.numpy as jnp, mutatis as mu
      >>> count = mu.Variable(0)
      >>> def add(count, x):
      ...     count.value += 1
      ...     return x * count.value
      >>> mu.export(add, count, jax.ShapeDtypeStruct((2,), jnp.int32), path="add.mu")
      >>> program = mu.load_program("add.mu")
      >>> program(jnp.array([1, 2])), program(jnp.array([1, 2])), program.state[()]
      (Array([1, 2], dtype=int32), Array([2, 4], dtype=int32), Array(2, dtype=int32))
    """
    if not isinstance(path, str | os.PathLike):
        raise ArgumentError(
            "a program cannot be exported: the path is none",
            path="path",
            expected="a string or `pathlib.Path`",
            got=show_class(path),
            cure="`mu.export(step, (model, cache), tokens, path='step.mu')`",
        )
    require("flatbuffers", "mu.export")
    model: Any = f
    if isinstance(model, Module) and not any(map(is_node, jax.tree.leaves(nodes, is_leaf=is_node))):
        f, nodes, examples = type(model).__call__, model, (nodes, *examples)
    given = nodes if isinstance(nodes, tuple) else (nodes,)
    of = given[0] if len(given) == 1 else list(given)
    pure, now = functionalize(functools.partial(f, *given), of=of)
    leaves, treedef = jax.tree.flatten(now)
    impls = [_impl(leaf) for leaf in leaves]

    def raw(arrays: list[Any], *args: Any) -> tuple[Any, list[Any]]:
        wrapped = [
            x if impl is None else jax.random.wrap_key_data(x, impl=impl) for x, impl in zip(arrays, impls, strict=True)
        ]
        out, new = pure(jax.tree.unflatten(treedef, wrapped), *args)
        return out, list(map(numbers_of, jax.tree.leaves(new)))

    arrays = list(map(numbers_of, leaves))
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    exported = jax.export.export(jax.jit(raw), platforms=platforms)(shapes, *examples)
    states: list[dict[str, Any]] = []
    data = [np.asarray(x) for x in arrays]
    said = [{"shape": x.shape, "dtype": str(x.dtype), "impl": impl} for x, impl in zip(arrays, impls, strict=True)]
    cells = variables(of)
    for entry, value in now.items():
        kind, start = now.kinds()[entry], _start(cells[entry])
        states.append(
            {"path": list(entry), "kind": f"{kind.__module__}:{kind.__qualname__}", "value": _structure(value)}
        )
        if start is not None:
            states[-1] |= {"start": _structure(start), "first": len(said)}
            for leaf in jax.tree.leaves(start):
                numbers = np.asarray(numbers_of(leaf))
                alike = numbers.size > 1 and bool((numbers == numbers.flat[0]).all())  # such as an empty cache
                said.append({"shape": numbers.shape, "dtype": str(numbers.dtype), "impl": _impl(leaf), "alike": alike})
                data.append(numbers.ravel()[:1] if alike else numbers)
    head = {
        "format": _FORMAT,
        "version": _VERSION,
        "platforms": list(exported.platforms),
        "states": states,
        "arrays": said,
    }
    target = os.path.abspath(os.path.expanduser(os.fspath(path)))
    unfinished = f"{target}.{os.getpid()}.unfinished"
    try:
        with zipfile.ZipFile(unfinished, "w") as file:
            file.writestr("program.json", json.dumps(head))
            file.writestr("program.bin", bytes(exported.serialize()))
            for number, array in enumerate(data):
                file.writestr(f"arrays/{number}", np.ascontiguousarray(array).tobytes())
        os.replace(unfinished, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(unfinished)


def _start(cell: Variable) -> Any:
    """The value that `mu.reset` would give a state; None if it has no start of its own, or one that waits for a first input."""
    start = None if cell.init is None or isinstance(cell.init, ModuleInit) else started(cell)
    return start if all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(start)) else None


def _impl(leaf: Any) -> str | None:
    return str(jax.random.key_impl(leaf)) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else None


def _structure(value: Any) -> Any:
    """How arrays are nested in a state, as JSON: None for an array itself."""
    if isinstance(value, dict):
        return {"dict": [[key, _structure(inner)] for key, inner in sorted(value.items())]}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return {type(value).__name__: [_structure(inner) for inner in value]}
    if len(jax.tree.leaves(value)) == 1 and isinstance(value, jax.Array):
        return None
    return {"leaves": len(jax.tree.leaves(value))}  # a container that only its own code can make


def _built(structure: Any, leaves: Any) -> Any:
    if structure is None:
        return next(leaves)
    ((kind, parts),) = structure.items()
    if kind == "dict":
        return {key: _built(inner, leaves) for key, inner in parts}
    if kind == "leaves":
        return [next(leaves) for _ in range(parts)]
    return (list if kind == "list" else tuple)(_built(inner, leaves) for inner in parts)


class LoadedProgram(Module):
    """A compiled function with its states, as `mu.load_program` reads it from a file.

    Call it with the arguments that come after the states. Each call reads and writes the states of this object. It is a Module,
    so checkpoints save its states, and `mu.reset` starts those anew that had an `init` in the model: ``mu.reset(program,
    mu.Cache)`` empties its caches.

    Attributes:
      states: a dictionary from printed paths to states.

    Example:
      >>> import jax, jax.numpy as jnp, mutatis as mu
      >>> def add(total, x):
      ...     total.value += x
      ...     return total.value
      >>> mu.export(add, mu.Variable(0.0), jax.ShapeDtypeStruct((), jnp.float32), path="add.mu")
      >>> program = mu.load_program("add.mu")
      >>> _ = program(2.0), program(3.0)
      >>> float(program.state[()])
      5.0
      >>> program.state = {".": jnp.zeros(())}
      >>> float(program(1.0))
      1.0
    """

    def __init__(self, exported: Any, states: dict[Path, Variable]) -> None:
        self.states = {show_path(path) or ".": variable for path, variable in states.items()}
        self._paths = tuple(states)
        self._exported = exported
        self._step = jit(_call)

    def __call__(self, *args: Any) -> Any:
        """Run the program once, on its states.

        Args:
          *args: the arguments after the states, in the shapes and dtypes of the examples.

        Returns:
          The result of the function that was exported.

        Raises:
          ArgumentError: the arguments have another structure, shape or dtype than the examples.
        """
        self._check(args)
        return self._step(self, *args)

    def _check(self, args: tuple[Any, ...]) -> None:
        """Refuse arguments that are not like the examples; of shapes with symbols, JAX does."""
        (_, *expected), _ = jax.tree.unflatten(self._exported.in_tree, self._exported.in_avals)
        leaves, structure = jax.tree.flatten(args)
        known, known_structure = jax.tree.flatten(tuple(expected))
        fits = structure == known_structure and all(
            jnp.ndim(leaf) == len(aval.shape)
            and all(type(size) is not int or size == now for size, now in zip(aval.shape, jnp.shape(leaf), strict=True))
            and jax.dtypes.result_type(leaf) == aval.dtype
            for leaf, aval in zip(leaves, known, strict=True)
        )
        if not fits:
            raise ArgumentError(
                "a loaded program was called with other arguments than it was exported for",
                expected=", ".join(map(str, known))
                if structure == known_structure
                else show_structure(known_structure),
                got=show_value(args),
                cure="Export it for these too: a size that may differ is named in the example, "
                "`jax.export.symbolic_shape('n, 3')`.",
            )

    @property
    def state(self) -> State:
        """The values of the states, a `State` by the paths that they had in the model. Assign another State to write them."""
        found = dict(zip(self._paths, self.states.values(), strict=True))
        return State(
            {path: cell.value for path, cell in found.items()}, {path: type(cell) for path, cell in found.items()}
        )

    @state.setter
    def state(self, new: Mapping[Any, Any]) -> None:
        # Of a `State` by path, else by paths as they are printed.
        named = {path if isinstance(path, str) else show_path(path) or ".": value for path, value in new.items()}
        update(self.states, {(name,): value for name, value in named.items()})

    def __repr__(self) -> str:
        states = "".join(f"\n  {path}: {cell!r}" for path, cell in self.states.items())
        return f"LoadedProgram of {self._exported.fun_name}, for {', '.join(self.platforms)}{states}"

    @property
    def platforms(self) -> tuple[str, ...]:
        """The names of the platforms that the program was compiled for, such as ``("cpu",)``."""
        return tuple(self._exported.platforms)


def _call(program: LoadedProgram, *args: Any) -> Any:
    cells = list(program.states.values())
    values = [jax.tree.leaves(cell.value) for cell in cells]
    flat = [numbers_of(leaf) for leaves in values for leaf in leaves]
    out, new = program._exported.call(flat, *args)
    fresh = iter(new)
    for cell, leaves in zip(cells, values, strict=True):
        impls = map(_impl, leaves)
        wrapped = [
            x if impl is None else jax.random.wrap_key_data(x, impl=impl) for impl, x in zip(impls, fresh, strict=False)
        ]
        cell.value = jax.tree.unflatten(jax.tree.structure(cell.value), wrapped)
    return out


def load_program(path: str | os.PathLike[str]) -> LoadedProgram:
    """Read a program that `mu.export` wrote.

    The source of the model is not needed. A state of a kind that is not part of Mutatis becomes a plain `Variable`.

    Args:
      path: the file.

    Returns:
      A `LoadedProgram`: call it with the arguments that come after the states.

    Raises:
      MissingPackageError: flatbuffers is not installed.
      CheckpointError: there is no such file; it is damaged, of a later version, or compiled for another platform than this
        machine's.

    Example:
      >>> import jax, jax.numpy as jnp, mutatis as mu
      >>> model = mu.nn.Linear(3, 2, rngs=mu.Rngs(0))
      >>> mu.export(model, jax.ShapeDtypeStruct((4, 3), jnp.float32), path="model.mu")
      >>> program = mu.load_program("model.mu")
      >>> program(jnp.ones((4, 3))).shape
      (4, 2)
    """
    require("flatbuffers", "mu.load_program")
    path = os.path.abspath(os.path.expanduser(os.fspath(path)))
    try:
        with zipfile.ZipFile(path) as file:
            if file.getinfo("program.json").file_size > _BEGINNING:
                raise ValueError("a description that is far too long")
            head = json.loads(file.read("program.json"))
            if head["format"] != _FORMAT:
                raise ValueError(f"the format {head['format']!r}")
            if head["version"] > _VERSION:
                raise CheckpointError(
                    f"the program at `{path}` was written by a later version",
                    expected=f"version {_VERSION}",
                    got=head["version"],
                    cure="Install a newer version of Mutatis.",
                )
            arrays = [_numbers(file, number, said) for number, said in enumerate(head["arrays"])]
            exported = jax.export.deserialize(bytearray(file.read("program.bin")))
            states = _states(head["states"], list(zip(arrays, (said["impl"] for said in head["arrays"]), strict=True)))
    except FileNotFoundError:
        raise CheckpointError(
            f"there is no program at `{path}`", cure="`mu.export(step, model, x, path=path)` writes one."
        ) from None
    except CheckpointError:
        raise
    except Exception as error:  # of the archive, JSON and JAX
        raise CheckpointError(
            f"`{path}` is not a program that can be read",
            expected="a file that `mu.export` wrote",
            got=f"{type(error).__name__}: {error}",
            cure="Export it again.",
        ) from error
    here = jax.default_backend()
    if not {here, "cuda" if here == "gpu" else here} & {*exported.platforms}:
        raise CheckpointError(
            f"the program at `{path}` was compiled for another platform",
            expected=f"one for {here}",
            got=f"one for {', '.join(exported.platforms)}",
            cure=f'Export it for both: `mu.export(step, model, x, path=path, platforms=["{exported.platforms[0]}", "{here}"])`.',
        )
    return LoadedProgram(exported, states)


def _numbers(file: zipfile.ZipFile, number: int, said: dict[str, Any]) -> Any:
    shape, dtype = tuple(map(int, said["shape"])), jnp.dtype(said["dtype"])
    name, alike = f"arrays/{number}", said.get("alike", False)
    if file.getinfo(name).file_size != (1 if alike else math.prod(shape)) * dtype.itemsize:
        raise ValueError(f"array {number} has another size than {dtype}{list(shape)}")
    numbers = np.frombuffer(file.read(name), dtype)
    return np.broadcast_to(numbers, shape) if alike else numbers.reshape(shape)


def _array(numbers: Any, impl: str | None) -> jax.Array:
    array = jnp.asarray(numbers)
    return array if impl is None else jax.random.wrap_key_data(array, impl=impl)


def _states(said: list[dict[str, Any]], numbers: list[tuple[Any, str | None]]) -> dict[Path, Variable]:
    starts = min((each["first"] for each in said if "first" in each), default=len(numbers))  # behind the values of all
    leaves = iter([_array(*each) for each in numbers[:starts]])
    states = {}
    for each in said:
        init = functools.partial(_started, each["start"], numbers[each["first"] :]) if "first" in each else None
        states[tuple(each["path"])] = _kind(each["kind"])(_built(each["value"], leaves), init=init)
    return states


def _started(structure: Any, numbers: list[tuple[Any, str | None]]) -> Any:
    """The value that a state starts anew with, of what the file says."""
    return _built(structure, (_array(*each) for each in numbers))


def _kind(name: str) -> type[Variable]:
    with contextlib.suppress(ImportError, AttributeError, ValueError):
        module = name.partition(":")[0]
        if module.partition(".")[0] == "mutatis":  # nothing else is imported for a file
            kind = pkgutil.resolve_name(name)
            if isinstance(kind, type) and issubclass(kind, Variable):
                return kind
    return Variable


__all__ = ["LoadedProgram", "export", "load_program"]

_homes.publish("mutatis", {name: globals()[name] for name in __all__})
