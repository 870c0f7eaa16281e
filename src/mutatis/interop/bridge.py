"""What the doors to other libraries share: kinds for collections, nested dictionaries, and a call of ours in theirs.

A module of ours inside another library is not kept: its `GraphDef` is static there, its values are held by that library.
`run` puts the two together for one call, in a transaction that is never committed, and takes out the values again.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax

from mutatis import _compat
from mutatis.core import access, naming
from mutatis.core.cells import UNSET, Deferred
from mutatis.core.naming import show_path
from mutatis.core.showing import show_class
from mutatis.core.transactions import Transaction
from mutatis.errors import ArgumentError, DeferredStateError, RandomStreamError, StructureError
from mutatis.model import kinds
from mutatis.model.filters import Path
from mutatis.model.graphdef import GraphDef
from mutatis.model.kinds import Intermediate, Param, RngState
from mutatis.model.modules import Module
from mutatis.model.operations import merge, pop, split
from mutatis.model.state import State
from mutatis.model.variables import Variable, started
from mutatis.model.views import view
from mutatis.model.walks import variables
from mutatis.random import Rngs

T = TypeVar("T")


# -- kinds -----------------------------------------------------------------------------------------------------------

_lock = threading.Lock()  # one kind for a collection, whichever thread asks first


def kind_of(collection: str) -> type[Variable]:
    """The kind that declares a collection; where there is none, one that is made for it.

    Example:
      >>> from mutatis.interop.bridge import kind_of
      >>> kind_of("batch_stats"), kind_of("spikes").collection
      (<class 'mutatis.BatchStat'>, 'spikes')
    """
    # Its name leads back here (`__getattr__`), so that it pickles.
    names = {"collection": collection, "__module__": __name__, "__qualname__": _PREFIX + collection}
    with _lock:
        return kinds.kind_of(collection) or types.new_class(
            collection, (Variable,), {}, lambda namespace: namespace.update(names)
        )


_PREFIX = "kind_of_"


def __getattr__(name: str) -> Any:
    if name.startswith(_PREFIX):
        return kind_of(name.removeprefix(_PREFIX))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def collection_of(cell: Variable) -> str:
    """The collection that holds a state in another library, where what is frozen must not be trained."""
    return "buffers" if cell.frozen else cell.collection


# -- their nested dictionaries ---------------------------------------------------------------------------------------


def flatten(tree: Any, path: Path = ()) -> dict[Path, Any]:
    """The leaves of nested dictionaries by path."""
    if not isinstance(tree, Mapping):
        return {path: tree}
    return {p: leaf for key, inner in tree.items() for p, leaf in flatten(inner, (*path, key)).items()}


def nest(leaves: Mapping[Path, Any]) -> dict[Any, Any]:
    """Nested dictionaries with these leaves."""
    return State(leaves).to_pure_dict()


def fetch(tree: Any, path: Path) -> Any:
    """What nested dictionaries hold at a path."""
    for part in path:
        tree = tree[part]
    return tree


def named(paths: Iterable[Path]) -> dict[Path, Path]:
    """Paths with names only, as other libraries want them: ``("layers", "0", "kernel")``.

    Raises:
      StructureError: two are the same then.
    """
    names: dict[Path, Path] = {}
    for path in paths:
        name = tuple(map(str, path))
        if name in names.values():
            raise StructureError(
                f"`{show_path(path)}` has a path that another state has too, when its parts are taken as text",
                path=show_path(path),
                cure="Give the entries of the dictionary keys that differ as text.",
            )
        names[path] = name
    return names


def same(old: Any, new: Any) -> bool:
    """Whether two values are the very same arrays: then nobody wrote."""
    before, tree = jax.tree.flatten(old)
    after, other = jax.tree.flatten(new)
    return tree == other and all(a is b for a, b in zip(before, after, strict=True))


# -- theirs in ours --------------------------------------------------------------------------------------------------


def call(
    cells: Mapping[Path, Variable], pure: Callable[[dict[Path, Any]], tuple[T, dict[Path, Any]]], *, evaluate: bool
) -> tuple[T, dict[Path, Any]]:
    """Call a pure function of the values of cells, and write back what it changed.

    A value that comes back as the array that went in was not written. A transform inside the other library, such as its
    `remat`, gives back all values as new arrays, though. That does no harm where a write does none; where nothing is to be
    written, in parameters, frozen states and in evaluation, the program tells which of them merely passed through.

    Args:
      cells: the cells by path.
      pure: ``pure(values) -> (result, new_values)``.
      evaluate: whether nothing is expected to be written.

    Returns:
      What `pure` gave; it may have values for further paths.
    """
    values = {path: cell.value for path, cell in cells.items()}
    result, new = pure(values)
    changed = [path for path, value in new.items() if path in cells and not same(values[path], value)]
    streams = [path for path in changed if isinstance(cells[path], RngState)]
    started = [path for path in streams if values[path]["key"] is not new[path]["key"]]
    doubtful = [p for p in changed if evaluate or cells[p].frozen or isinstance(cells[p], Param) or p in started]
    through = _passed_through(pure, values, doubtful) if doubtful else {}
    for path in changed:
        if path in through and all(jax.tree.leaves(through[path])):
            continue
        if path in streams and (path not in started or (path in through and through[path]["key"])):
            Variable.set(cells[path], new[path])  # it was drawn from, not started anew
        else:
            cells[path].value = new[path]
    return result, new


def _passed_through(pure: Callable[..., Any], values: dict[Path, Any], paths: list[Path]) -> dict[Path, Any]:
    """For values that keep their structure: which leaves the program of a function gives back as they came."""

    def those(given: list[Any]) -> list[Any]:
        new = pure({**values, **dict(zip(paths, given, strict=True))})[1]
        return [new[path] for path in paths]

    given = [values[path] for path in paths]
    jaxpr, after = jax.make_jaxpr(those, return_shape=True)(given)
    numbers = jax.tree.unflatten(jax.tree.structure(given), range(len(jaxpr.jaxpr.invars)))
    origins = jax.tree.unflatten(jax.tree.structure(after), _origins(jaxpr.jaxpr))
    return {
        path: jax.tree.map(lambda n, o: n == o, number, origin)
        for path, number, origin in zip(paths, numbers, origins, strict=True)
        if jax.tree.structure(number) == jax.tree.structure(origin)
    }


_CALLS = frozenset({"jit", "pjit", "checkpoint", "remat2", "closed_call"})


def _origins(jaxpr: Any) -> list[int]:
    """For each output of a program the number of the input that it is, or -1."""
    origin = {variable: number for number, variable in enumerate(jaxpr.invars)}
    for equation in jaxpr.eqns:
        inner = equation.params.get("jaxpr")
        if equation.primitive.name in _CALLS:
            ends = _origins(getattr(inner, "jaxpr", inner))
        elif equation.primitive.name == "scan":
            ends = _origins(inner.jaxpr)
            constants, carried = _compat.scan_inputs(equation.params)
            for number, end in enumerate(ends):  # a carry has to stay where it is, and the rest to come from the slices
                stays = end == constants + number if number < carried else end >= constants + carried
                ends[number] = end if stays else -1
        else:
            continue
        for variable, end in zip(equation.outvars, ends, strict=True):
            if end >= 0:
                origin[variable] = _of(origin, equation.invars[end])
    return [_of(origin, variable) for variable in jaxpr.outvars]


def _of(origin: dict[Any, int], atom: Any) -> int:
    return -1 if hasattr(atom, "val") else origin.get(atom, -1)  # a literal cannot be looked up


def no_streams(door: str, values: str) -> RandomStreamError:
    """The error for states that are to be created without random streams.

    Args:
      door: the beginning of the call that made the module: ``"FromLinen(module"``.
      values: how its values might have been given.
    """
    return RandomStreamError(
        f"`{door.partition('(')[0]}` cannot create its states: it holds no random streams",
        path="params",
        expected=f"Rngs, or {values}",
        got="None",
        cure=f"`mu.interop.{door}, rngs=mu.Rngs(0))`",
    )


# -- ours in theirs --------------------------------------------------------------------------------------------------


class Parts(NamedTuple):
    """A module taken apart: its definition, and by path its values, their collections, and the names of its streams."""

    definition: GraphDef
    values: dict[Path, Any]
    collections: dict[Path, str]  # of all but the streams
    streams: dict[Path, str]
    trained: set[Path]


def take_apart(model: Module) -> Parts:
    """The parts of a module."""
    definition, state = split(model)
    cells = variables(model)
    streams = {p: cell.metadata.get("tag", "default") for p, cell in cells.items() if isinstance(cell, RngState)}
    collections = {path: collection_of(cell) for path, cell in cells.items() if path not in streams}
    # Without the types: in the other library values may be cast, stacked and sharded as it likes.
    definition = definition.untyped()
    trained = {path for path, cell in cells.items() if isinstance(cell, Param) and not cell.frozen}
    return Parts(definition, state.flat(), collections, streams, trained)


def construct(constructor: Callable[[Rngs], Module], rngs: Rngs) -> Module:
    """The module that a constructor makes, with a value, or a placeholder of its layer's, for each state."""
    model = constructor(rngs)
    for cell in variables(model).values():
        if access.load(cell) is UNSET:
            cell.value = started(cell)
    return model


def take_created(model: Any, door: str) -> Parts:
    """The parts of a module whose states all have values.

    Raises:
      ArgumentError: it is something else.
      DeferredStateError: a state has yet to be created.
    """
    if not isinstance(model, Module):
        raise ArgumentError(
            f"`{door}` holds a Mutatis module",
            expected="a Module",
            got=show_class(model),
            cure="Write it as `class Net(mu.Module)`.",
        )
    parts = take_apart(model)
    for path, value in parts.values.items():
        _check_created(path, value, door)
    return parts


def _check_created(path: Path, value: Any, door: str) -> None:
    if value is UNSET or type(value) is Deferred:
        raise DeferredStateError(
            f"state `{show_path(path)}` has no value, which `{door}` would hold",
            path=show_path(path),
            where=naming.where(),
            cure="Its size is inferred at the first call: call its layer once, or give the size where it is made.",
        )


class Run(NamedTuple):
    """What a call gave, the parts of the module before and after it, and the intermediate values that it kept."""

    out: Any
    before: Parts
    after: Parts
    sown: dict[Path, Any]

    def initial(self, door: str) -> dict[Path, Any]:
        """The values to start with: those of before the call, and of after it for states that it created.

        Raises:
          DeferredStateError: the call did not create a state that waits for its size.
        """
        start = {}
        for path in self.before.collections:
            value = self.before.values[path]
            start[path] = self.after.values[path] if type(value) is Deferred else value
            _check_created(path, start[path], door)
        return start

    def written(self) -> dict[Path, Any]:
        """The new values of the states that were written, streams aside."""
        after = self.after.values
        return {
            path: after[path] for path in self.before.collections if not same(self.before.values[path], after[path])
        }


def run(
    label: str,
    build: Callable[[], Module],
    call: Callable[[Module], Any],
    *,
    evaluate: bool = False,
    key_of: Callable[[str], Any] | None = None,
    cure: str = "",
) -> Run:
    """Make a module and call it; nothing of it outlives this.

    Args:
      label: the door, for messages.
      build: makes the module.
      call: calls it.
      evaluate: whether `training` is False for the call.
      key_of: gives the key that the random streams of a name start from in this call, or None if there is none. Without
        it they go on from the values that they have.
      cure: how to give a key for the stream `{name}`.

    Raises:
      RandomStreamError: the call drew from a stream that has no key.
      StructureError: the call changed what the module is made of, or wrote states that are no part of it.
    """
    with Transaction(label) as tx:
        model = build()
        model = view(model, training=False) if evaluate else model
        pop(model, Intermediate)
        start = take_apart(model)
        keyless = _start_streams(model, start, key_of) if key_of is not None else {}
        before = take_apart(model)
        out = call(model)
        tx.note_changes_in_place()
        sown = pop(model, Intermediate).flat()
        after = take_apart(model)
        _check_bounds(label, tx, before, after)
        for path, name in keyless.items():
            if not same(before.values[path], after.values[path]):
                raise RandomStreamError(
                    f"random stream `{show_path(path)}` was drawn from, and the call gave no key for `{name}`",
                    path=show_path(path),
                    where=label,
                    cure=cure.format(name=name),
                )
        # Nodes in the result would end with the transaction; as pytrees they become copies that hold their values.
        return Run(jax.tree.map(lambda leaf: leaf, out), before, after, sown)


def _start_streams(model: Module, parts: Parts, key_of: Callable[[str], Any]) -> dict[Path, str]:
    """Start each random stream from its key; the names of those that have none."""
    keyless = {}
    cells = variables(model, RngState)
    for path, name in parts.streams.items():
        key = key_of(name)
        if key is None:
            keyless[path] = name
            key = jax.random.key(0)
        shape = parts.values[path]["count"].shape  # of stacked streams: one for each layer
        access.write(cells[path], kinds.stream_value(jax.random.split(key, shape) if shape else key))
    return keyless


def _check_bounds(label: str, tx: Transaction, before: Parts, after: Parts) -> None:
    """Raise if a call changed more than the values of its module."""
    strays = [cell for cell in tx.written if cell not in tx.born]
    if strays:
        raise StructureError(
            f"state {naming.describe(strays[0])} was written and is no part of the module that was called",
            path=naming.path_of(strays[0]),
            where=label,
            cure="The write would be lost. Make the state a part: assign it to an attribute of the module.",
        )
    if before.definition != after.definition:
        changes = [f"new:     {show_path(p)}" for p in after.definition.paths if p not in before.values]
        changes += [f"missing: {show_path(p)}" for p in before.definition.paths if p not in after.values]
        raise StructureError(
            "the call changed what the module is made of",
            where=label,
            differences=changes or ["a static attribute"],
            cure="The change would be lost. Make states where the module is made; a size that is left out may wait, "
            "as in `nn.Linear(None, 10, rngs=rngs)`. A number that changes is a state: `self.n = mu.Variable(0)`.",
        )


def rebuild(parts: Parts, values: Mapping[Path, Any]) -> Callable[[], Module]:
    """Makes the module of these parts around other values."""
    return lambda: merge(parts.definition, State({**parts.values, **values}))
