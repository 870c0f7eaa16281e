"""Stateless models, as in Flax Linen: `init` returns the states as plain dictionaries, and `apply` takes them as an argument.

    definition = mu.eval_shape(lambda: Net(rngs=mu.Rngs(0)))         # shapes only: nothing is allocated
    variables = init(lambda rngs: Net(rngs=rngs), key, x)            # {"params": ..., "batch_stats": ...}
    out, updates = apply(definition, variables, x, mutable=["batch_stats"], rngs={"dropout": key})

The states are plain arrays in nested dictionaries by path, one dictionary for each collection, so that raw JAX, optax and orbax
work on them. `apply` builds the model anew around them and runs it in a transaction. It returns the new values of mutable states,
and changes nothing else. Random streams are not in the dictionaries: you pass keys to each call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from mutatis.core import access, naming
from mutatis.core.cells import UNSET, Cell, Deferred
from mutatis.core.journal import ABSENT
from mutatis.core.naming import show_path
from mutatis.core.showing import show_class, show_value
from mutatis.core.transactions import Transaction
from mutatis.errors import ArgumentError, DeferredStateError, FrozenStateError, StructureError
from mutatis.interventions import capture
from mutatis.model.filters import FilterLike, Path, as_filter
from mutatis.model.graphdef import describe_graph
from mutatis.model.kinds import Intermediate, Perturbation, RngState, kind_of
from mutatis.model.marks import thaw
from mutatis.model.modules import Module
from mutatis.model.operations import flat_for, merge, pop
from mutatis.model.state import State
from mutatis.model.surgery import modules
from mutatis.model.variables import Variable
from mutatis.model.walks import variables
from mutatis.random import Rngs, as_key, restarted, stream_of
from mutatis.transforms.abstract import eval_shape

_PASSING = (Intermediate, Perturbation)  # states that a call makes where they are missing

__all__ = ["apply", "definition", "init"]


def init(
    ctor: Callable[[Rngs], Module],
    rngs: Any,
    /,
    *inputs: Any,
    method: str | Callable[..., Any] | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Make a model and return its states, in a dictionary by collection and path.

    With inputs, the model is called once. The call makes the states whose sizes are taken from the input, and those of sown
    values. The result has the value with which each state started: values that the call writes to it afterwards are dropped. (A
    state that is made inside a transform of the model, such as `mu.remat`, has its value after that transform.)

    Args:
      ctor: a function ``ctor(rngs)`` that makes the model from random streams, or a class.
      rngs: a key or a seed, a dictionary of them by the name of the stream, or a `mu.Rngs`.
      *inputs: example inputs for the call; without inputs the model is not called.
      method: the method to call: its name, or a function of the model and the inputs. The default is the model itself.
      **kwargs: further example inputs, by keyword.

    Returns:
      A dictionary from collections, such as ``"params"``, to nested dictionaries by path, with arrays as leaves. It does not have
      the random streams.

    Raises:
      ArgumentError: `ctor` does not make a Module.
      DeferredStateError: a state needs an input to get its size, and there is none.

    Example:
      >>> import jax, jax.numpy as jnp, mutatis as mu
      >>> variables = mu.functional.init(lambda rngs: mu.nn.Linear(None, 3, rngs=rngs), 0, jnp.ones((1, 2)))
      >>> jax.tree.map(jnp.shape, variables)
      {'params': {'bias': (3,), 'kernel': (2, 3)}}
    """
    module, _ = _started(ctor, rngs, inputs, method, kwargs)
    cells = _cells(module)
    if waiting := [show_path(path) for path, cell in cells.items() if type(access.load(cell)) is Deferred]:
        raise DeferredStateError(
            "the sizes of states are taken from an input that was not given",
            differences=waiting,
            cure="Give example inputs, `init(ctor, key, x)`; `method=` may name a function that calls all layers.",
        )
    return _collections({path: (type(cell), cell.value) for path, cell in cells.items()})


def definition(
    ctor: Callable[[Rngs], Module], /, *inputs: Any, method: str | Callable[..., Any] | None = None, **kwargs: Any
) -> Any:
    """Make a model of shapes for `apply`, with all states that a first call makes. Nothing is computed or allocated.

    If all layers and states exist before the first call, ``mu.eval_shape(lambda: Net(...))`` is enough.

    Args:
      ctor: a function ``ctor(rngs)`` that makes the model from random streams, or a class.
      *inputs: example inputs for the call; a `jax.ShapeDtypeStruct` may stand for an array.
      method: the method to call: its name, or a function of the model and the inputs. The default is the model itself.
      **kwargs: further example inputs, by keyword.

    Returns:
      A model of the class that `ctor` makes, with a `jax.ShapeDtypeStruct` in place of each array.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> layer = mu.functional.definition(lambda rngs: mu.nn.Linear(None, 3, rngs=rngs), jnp.ones((1, 2)))
      >>> layer.kernel.value
      ShapeDtypeStruct(shape=(2, 3), dtype=float32)
    """

    def make(*inputs: Any, **kwargs: Any) -> Module:
        module, made = _started(ctor, 0, inputs, method, kwargs)
        pop(module, lambda _, cell: cell in made and isinstance(cell, _PASSING))
        return module

    return eval_shape(make, *inputs, **kwargs)


def apply(
    definition: Module,
    variables: Mapping[str, Any],
    *inputs: Any,
    mutable: FilterLike = False,
    rngs: Any = None,
    method: str | Callable[..., Any] | None = None,
    capture_intermediates: FilterLike = False,
    **kwargs: Any,
) -> Any:
    """Call a model with the states of a dictionary. It is a pure function, so it goes through every raw JAX transform.

    Args:
      definition: the model. Only its structure counts, not its values: ``mu.eval_shape(lambda: Net(...))``, the result of
        `mu.functional.definition`, or any Module.
      variables: the result of `mu.functional.init`, or such a dictionary with other values. Sown values in it are ignored.
      *inputs: the inputs of the call.
      mutable: which states may be written: a collection, a list of collections, or any filter; True for all states.
      rngs: keys or seeds of random streams by name, where ``"default"`` is for all that are not named; or one key for all.
      method: the method to call: its name, or a function of the model and the inputs. The default is the model itself.
      capture_intermediates: a filter of modules whose results are returned too; True for all modules. The results are the entries
        ``"__call__"`` of the collection ``"intermediates"``, which is then mutable.
      **kwargs: further inputs, by keyword.

    Returns:
      The output of the model. If states are mutable or results are captured, a pair ``(out, updates)``: `updates` has the values
      of all mutable states, in the form of `variables`.

    Raises:
      StructureError: states are missing or superfluous; the message lists all of them. Or the model writes a state that is not
        its own.
      StateTypeError: states have other types than in the definition; the message lists all of them.
      FrozenStateError: the model writes a state that is not mutable. (Sown values are dropped instead.)
      RandomStreamError: the model draws from a stream for which `rngs` has no key.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> x = jnp.array([[1.0], [3.0]])
      >>> norm = mu.eval_shape(lambda: mu.nn.BatchNorm(1, momentum=0.5))
      >>> variables = mu.functional.init(lambda rngs: mu.nn.BatchNorm(1, momentum=0.5), 0)
      >>> out, updates = mu.functional.apply(norm, variables, x, mutable=["batch_stats"])
      >>> updates
      {'batch_stats': {'mean': Array([1.], dtype=float32), 'var': Array([1.], dtype=float32)}}
    """
    if not isinstance(variables, Mapping):
        raise ArgumentError(
            "`functional.apply` was given what is no dictionary of states as its `variables`",
            path="variables",
            expected="a model, what `init` gave for it, and then the inputs",
            got=show_class(variables),
            cure="`mu.functional.apply(model, variables, x)`",
        )
    captures = capture_intermediates is not False
    selects = as_filter([mutable, Intermediate] if captures else mutable)
    module = _build(definition, variables, rngs)
    before = set(_cells(module))
    with _Apply(module, selects) as tx:
        call = _method(module, method)
        if captures:
            call = capture(call, *([] if capture_intermediates is True else [capture_intermediates]), of=module)
        out = call(*inputs, **kwargs)
        tx.note_changes_in_place()
        cells = _cells(module)
        for path, cell in cells.items():
            if path not in before and not isinstance(cell, _PASSING) and not selects(path, cell):
                raise _immutable(cell, path, "made")
        updates = {p: (type(cell), access.load(cell)) for p, cell in cells.items() if selects(p, cell)}
    if captures:
        out, captured = out
        updates |= {(*path, "__call__"): (Intermediate, value) for path, value in captured.flat().items()}
    elif mutable is False:
        return out
    return out, _collections(updates)


class _Starts(Transaction):
    """Keeps what each state was first given, where it had no value."""

    def __init__(self, label: str) -> None:
        super().__init__(label)
        self.starts: dict[Cell, Any] = {}

    def write(self, cell: Cell, value: Any, trace: Any) -> None:
        if access.is_deferred(cell):
            self.starts[cell] = value
        super().write(cell, value, trace)

    def create(self, cell: Cell, value: Any) -> None:
        self.starts[cell] = value
        super().create(cell, value)


class _Apply(Transaction):
    """Refuses writes to states that are not mutable."""

    def __init__(self, module: Module, selects: Callable[[Path, Any], bool]) -> None:
        paths = {cell: path for path, cell in variables(module).items()}
        super().__init__("apply", locate=lambda cell: show_path(paths[cell]) if cell in paths else None)  # type: ignore[index]
        self._paths = paths
        self._fixed = {cell: path for cell, path in paths.items() if not selects(path, cell)}

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        self.journal.undo()  # the model is thrown away, and the attributes of all others stay as they were
        super().__exit__(kind, value, trace)

    def write(self, cell: Any, value: Any, trace: Any) -> None:
        if self._check(cell):
            super().write(cell, value, trace)

    def note_changes_in_place(self) -> None:
        super().note_changes_in_place()
        for cell in self.written:
            self._check(cell)

    def _check(self, cell: Any) -> bool:
        """Whether a write is kept.

        Raises:
          FrozenStateError: the state is not mutable.
          StructureError: it is none of the model's.
        """
        if cell in self._fixed and not isinstance(cell, RngState):
            if isinstance(cell, Intermediate):
                return False
            raise _immutable(cell, self._fixed[cell], "written")
        if cell not in self._paths and cell not in self.born and cell._birth is None:
            raise StructureError(
                f"state {naming.describe(cell)} was written, and the model does not hold it",
                path=naming.path_of(cell),
                where=naming.where(),
                made_at=cell.made_at,
                cure="Its new value would be lost. Make it a part of the model, or return the value.",
            )
        return True


def _immutable(cell: Any, path: Path, what: str) -> FrozenStateError:
    return FrozenStateError(
        f"state `{show_path(path)}` ({type(cell).__name__}) was {what}, and its collection is not mutable",
        path=show_path(path),
        where=naming.where(),
        made_at=cell.made_at,
        cure=f'`out, updates = apply(..., mutable=["{cell.collection}"])`; for statistics also `definition.eval()`.',
    )


def _started(
    ctor: Callable[[Rngs], Module], rngs: Any, inputs: Any, method: Any, kwargs: Any
) -> tuple[Module, dict[Cell, None]]:
    """A new model after its first call, with every state as it started, and the states that the call made."""
    if isinstance(ctor, Module):
        raise ArgumentError(
            "`ctor` is a model already, and not what makes one",
            path="ctor",
            expected="a class, or a function of random streams",
            got=show_class(ctor),
            cure="`mu.functional.init(lambda rngs: Net(rngs=rngs), key, x)`",
        )
    module = ctor(_as_rngs(rngs))
    if not isinstance(module, Module):
        raise ArgumentError(
            "`ctor` did not make a Module",
            expected="a Module",
            got=show_value(module),
            cure="`init(lambda rngs: Net(rngs=rngs), key, x)`",
        )
    if not (inputs or kwargs or method is not None):
        return module, {}
    with _Starts("init") as tx:
        _method(module, method)(*inputs, **kwargs)
        tx.note_changes_in_place()
        starts, made = dict(tx.starts), dict(tx.born)
    for cell, value in starts.items():
        access.create(cell, value)
    return module, made


def _as_rngs(rngs: Any) -> Rngs:
    return rngs if isinstance(rngs, Rngs) else Rngs(**rngs) if isinstance(rngs, Mapping) else Rngs(rngs)


def _method(module: Module, method: str | Callable[..., Any] | None) -> Callable[..., Any]:
    if method is None:
        return module  # type: ignore[return-value]
    if isinstance(method, str):
        return getattr(module, method)  # type: ignore[no-any-return]
    return functools.partial(getattr(method, "__func__", method), module)


def _cells(module: Module) -> dict[Path, Any]:
    """The states that are in dictionaries: all but random streams."""
    return {path: cell for path, cell in variables(module).items() if not isinstance(cell, RngState)}


def _collections(states: Mapping[Path, tuple[type[Variable], Any]]) -> dict[str, Any]:
    """Nested dictionaries by collection and path."""
    parts: dict[str, dict[Path, Any]] = {}
    for path, (kind, value) in states.items():
        parts.setdefault(kind.collection, {})[path] = value
    return {name: State(flat).to_pure_dict() for name, flat in sorted(parts.items())}


def _build(definition: Module, variables: Mapping[str, Any], rngs: Any) -> Module:
    """A model of the definition's structure around these states."""
    graphdef, cells = describe_graph(definition)
    known = {
        (cell.collection, *path): (path, cell)
        for path, cell in zip(graphdef.paths, cells, strict=True)
        if not isinstance(cell, RngState)
    }
    by_text = {tuple(map(str, path)): path for path in known}  # who has saved a dictionary may find "0" for 0
    flat = flat_for(variables, {*known, *by_text})
    given = {path if path in known else by_text.get(tuple(map(str, path)), path): v for path, v in flat.items()}
    missing = [path for path, (_, cell) in known.items() if path not in given and not isinstance(cell, _PASSING)]
    parents = modules(definition)
    extra = {path: _kind_of_extra(path, parents) for path in given if path not in known}
    superfluous = [path for path, kind in extra.items() if kind is None]
    if missing or superfluous:
        raise StructureError(
            "the variables do not fit the definition",
            differences=[
                *(f"missing:    {path[0]}: {show_path(path[1:])}" for path in missing),
                *(f"unexpected: {path[0]}: {show_path(path[1:])}" for path in superfluous),
            ],
            cure="Pass all that `init` gave. Where the first call makes layers or states, make the definition with an input: "
            "`functional.definition(ctor, x)`.",
        )
    values: dict[Path, Any] = {}
    for path, cell in zip(graphdef.paths, cells, strict=True):
        if isinstance(cell, RngState):
            values[path] = _stream(path, cell, rngs)
        else:
            values[path] = given.get((cell.collection, *path), UNSET)
    module: Module = merge(graphdef, State(values))
    thaw(module, lambda _, cell: cell._frozen == "detached")  # so is a definition that raw `jax.eval_shape` made
    left_out = [path for path, (_, cell) in known.items() if path not in given and isinstance(cell, _PASSING)]
    if left_out:
        pop(module, lambda path, cell: (cell.collection, *path) in left_out)
    places = modules(module)
    for path, kind in extra.items():
        if kind is not None and not issubclass(kind, Intermediate):
            setattr(places[path[1:-1]], path[-1], kind(given[path]))
    return module


def _kind_of_extra(path: Path, parents: Mapping[Path, Module]) -> type[Variable] | None:
    """The kind of a state that the definition lacks and a call makes, as an attribute that is None or as a passing one."""
    kind = kind_of(path[0])
    parent = parents.get(path[1:-1])
    if parent is None or kind is None:
        return None
    held = parent.__dict__.get(path[-1], ABSENT)
    return kind if held is None or (held is ABSENT and issubclass(kind, _PASSING)) else None


def _stream(path: Path, cell: RngState, rngs: Any) -> Any:
    """The start of a random stream in one call."""
    if rngs is None:
        return UNSET
    name = cell.metadata.get("tag", "default")
    if isinstance(rngs, Rngs):
        return restarted(path, stream_of(rngs, name).draw(), access.peek(cell))
    seeds = rngs if isinstance(rngs, Mapping) else {"default": rngs}
    seed = seeds.get(name, seeds.get("default", UNSET))
    return UNSET if seed is UNSET else restarted(path, as_key(seed, name), access.peek(cell))
