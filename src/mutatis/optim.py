"""The optimizer: any optax transformation over the states of a model.

It refers to the model, whose cells are not its children, and holds what optax keeps as `OptState` cells of its own, by
paths that end in the parameters' paths. At each update the parameters are looked up again, so that states may appear and
vanish; their moments follow.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any, overload

import jax
import jax.numpy as jnp

from mutatis.core import naming
from mutatis.core.avals import show_type
from mutatis.core.calls import takes
from mutatis.core.naming import show_path
from mutatis.core.nodes import Reference, is_node
from mutatis.core.showing import show_class, show_value
from mutatis.errors import ArgumentError, DeferredStateError, OptimizerError
from mutatis.model.filters import FilterLike, Path, as_filter
from mutatis.model.kinds import OptState, Param
from mutatis.model.modules import Module
from mutatis.model.state import State
from mutatis.model.variables import Variable
from mutatis.model.walks import check_node, variables


class Optimizer(Module):
    """Updates the parameters of a model by an optax transformation.

    Args:
      model: a Module, a Variable, or a list, tuple or dict of them.
      tx: any optax gradient transformation.
      wrt: which states are parameters; frozen states and those that are not floats are left out.

    Raises:
      OptimizerError: the gradients do not fit the parameters, or a parameter has another shape than its moments.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu, optax
      >>> w = mu.Param(jnp.array([1.0, 2.0]))
      >>> optimizer = mu.Optimizer(w, optax.sgd(0.1))
      >>> @mu.jit
      ... def step():
      ...     optimizer.update(mu.grad(lambda: jnp.sum(w.value**2), of=w)())
      >>> step()
      >>> w.value, int(optimizer.step)
      (Array([0.8, 1.6], dtype=float32), 1)
    """

    @takes("mu.Optimizer(model, optax.adam(1e-3))")
    def __init__(self, model: Any, tx: Any, wrt: FilterLike = Param) -> None:
        _check_transformation(model, tx)
        self.step = OptState(0)
        self.tx = tx
        self.wrt = as_filter(wrt)
        self._model = Reference(check_node(model))
        values = self._values(self._params())
        names, leaves, treedef = _named_leaves(tx.init(values))
        self.state = {name: OptState(leaf) for name, leaf in zip(names, leaves, strict=True)}
        types = tuple(_struct(cell.value) for cell in self.state.values())
        self._made_for: _Layout | None = _Layout(_types(values), tuple(names), types, treedef)

    def __setstate__(self, state: dict[str, Any]) -> None:
        model = state["_model"]  # itself, in what was pickled earlier
        reference = model if isinstance(model, Reference) else Reference(model)
        super().__setstate__({"_made_for": None, **state, "_model": reference})

    @overload
    def update(self, grads: Any, /, **extra: Any) -> None: ...
    @overload
    def update(self, model: Any, grads: Any, /, **extra: Any) -> None: ...
    def update(self, /, *args: Any, **extra: Any) -> None:
        """Apply gradients: ``update(grads)`` or ``update(model, grads)``.

        Args:
          *args: the gradients, as `mu.grad` gives them, or the model and them.
          **extra: further arguments of the transformation, such as ``value=loss``.

        Raises:
          OptimizerError: the gradients do not fit the parameters, the model is not the optimizer's, or a parameter has
            another shape than its moments.
        """
        import optax

        if len(args) not in (1, 2):
            raise ArgumentError(
                "`update` takes gradients, or a model and gradients",
                expected="optimizer.update(grads), or optimizer.update(model, grads)",
                got=f"{len(args)} arguments",
                cure="The optimizer keeps optax's state, and writes to the model: `optimizer.update(grads)`.",
            )
        _check_are_gradients(args[-1])
        params = self._params()
        if len(args) == 2:
            self._check_model(args[0], params)
        values = self._values(params)
        grads = _check_gradients(args[-1], values)
        tx = optax.with_extra_args_support(self.tx)
        updates, state = tx.update(grads, self._present_state(values), values, **extra)
        for path, value in optax.apply_updates(values, updates).flat().items():
            params[path].set(value)
        leaves, treedef = jax.tree.flatten(state)
        layout = self._layout(values)
        names = layout.names if treedef == layout.treedef else _named_leaves(state)[0]
        for name, leaf in zip(names, leaves, strict=True):
            self.state[name].set(leaf)
        self.step += 1

    @property
    def opt_state(self) -> Any:
        """What optax keeps, as the transformation made it: for functions of optax that look into it or change it.

        It may be assigned, too: ``optimizer.opt_state = optax.tree.set(optimizer.opt_state, learning_rate=0.1)``.

        Raises:
          OptimizerError: what is assigned has another structure, shape or dtype.

        Example:
          >>> import mutatis as mu, optax
          >>> optimizer = mu.Optimizer(mu.Param(1.0), optax.adam(1e-3))
          >>> optax.tree.get(optimizer.opt_state, "count")
          Array(0, dtype=int32)
        """
        return self._present_state(self._values(self._params()))

    @opt_state.setter
    def opt_state(self, new: Any) -> None:
        layout = self._layout(self._values(self._params()))
        leaves, treedef = jax.tree.flatten(new)
        types = [_struct(jnp.asarray(leaf)) for leaf in leaves] if treedef == layout.treedef else None
        if types != list(layout.leaves):
            raise OptimizerError(
                "what was assigned to `opt_state` is not what the optimizer keeps",
                path="opt_state",
                expected=show_type(jax.tree.unflatten(layout.treedef, layout.leaves)),
                got=show_value(new) if types is None else show_type(new),
                cure="Change what it keeps: `optimizer.opt_state = optax.tree.set(optimizer.opt_state, count=0)`.",
            )
        for name, leaf in zip(layout.names, leaves, strict=True):
            self.state[name].set(leaf)

    def _params(self, *, frozen: bool = False) -> dict[Path, Variable]:
        """The states to optimize, by path; with those that are frozen, which keep their moments, if asked for."""
        chosen = {}
        for path, cell in variables(self._model.value, self.wrt).items():
            if cell.frozen and not (frozen and not cell.deferred):
                continue
            if cell.deferred:
                raise DeferredStateError(
                    f"state `{show_path(path)}` cannot be optimized: it has not been created yet",
                    path=show_path(path),
                    made_at=cell.made_at,
                    cure="Call the model once before the optimizer is made, or give the sizes where its layers are made.",
                )
            if all(jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in jax.tree.leaves(cell.get())):
                chosen[path] = cell
        return chosen

    def _check_model(self, model: Any, params: dict[Path, Variable]) -> None:
        given = {path: cell for path, cell in variables(model, self.wrt).items() if not cell.frozen}
        strange = [path for path, cell in params.items() if given.get(path) is not cell]
        if model is not self._model.value and strange:
            raise OptimizerError(
                "the optimizer was made with another model than the one to update",
                path=show_path(strange[0]),
                where=naming.where(),
                expected="the node that it was made with, or a `mu.view` of it",
                got=f"a {type(model).__name__} with other states",
                cure="Make an optimizer for each model, `mu.Optimizer(model, tx)`, and pass that model or the gradients only.",
            )

    @staticmethod
    def _values(params: dict[Path, Variable]) -> State:
        return State(
            {path: cell.get() for path, cell in params.items()}, {path: type(cell) for path, cell in params.items()}
        )

    def _layout(self, values: State) -> _Layout:
        """The layout of what optax keeps for parameters."""
        types = _types(values)
        known = self._made_for
        return known if known is not None and types == known.types else _layout(self.tx.init, values, types)

    def _present_state(self, values: State) -> Any:
        """What optax keeps, for the present parameters: moments of new ones start as optax starts them."""
        layout = self._layout(values)
        if set(layout.names) != set(self.state):
            self._follow(layout, values)
        for name, shape in zip(layout.names, layout.leaves, strict=True):
            if self.state[name].shape != shape.shape:
                raise OptimizerError(
                    f"a parameter has another shape than its moment `{name}`",
                    path=name,
                    expected=show_type(self.state[name].value),
                    got=show_type(shape),
                    cure="Moments do not carry over to another shape: make a new `mu.Optimizer(model, tx)`.",
                )
        return jax.tree.unflatten(layout.treedef, [self.state[name].get() for name in layout.names])

    def _follow(self, layout: _Layout, values: State) -> None:
        """Start the moments of parameters that have appeared, and drop those of parameters that are gone; not of frozen ones."""
        present = set(layout.names) | set(self._layout(self._values(self._params(frozen=True))).names)
        if present.issuperset(self.state) and self.state.keys() >= set(layout.names):
            return
        fresh = dict(zip(layout.names, jax.tree.leaves(self.tx.init(values)), strict=True))
        kept = {name: state for name, state in self.state.items() if name in present}
        self.state = kept | {name: OptState(leaf) for name, leaf in fresh.items() if name not in kept}


class EMA(Module):
    """An exponential moving average of the states of a model, kept as states beside it.

    At each update ``average = decay * average + (1 - decay) * state``. It refers to the model, and `mu.view` evaluates the model
    with the averages, which are not copied: ``mu.view(model, states=ema, training=False)``, made once, sees each update. They
    have the dtypes of the states, and a narrow one cannot hold small steps: keep parameters in float32, whatever is computed in.

    Args:
      model: a Module, a Variable, or a list, tuple or dict of them.
      decay: the weight of the average, or a function that gives it for the number of updates so far, as an optax schedule does.
      wrt: which states; those that are not floats are left out. States that appear later start as they are then.

    Attributes:
      step: OptState, the number of updates.
      state: the averages, OptState by path.

    Raises:
      ArgumentError: `decay` is neither a number from 0 to 1 nor a function.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> net = mu.nn.Linear(2, 1, rngs=mu.Rngs(0))
      >>> ema = mu.optim.EMA(net, decay=0.9)
      >>> @mu.jit
      ... def step():
      ...     net.kernel.value += 1.0
      ...     ema.update()
      >>> step()
      >>> averaged = mu.view(net, states=ema)
      >>> round(float((net(jnp.ones(2)) - averaged(jnp.ones(2)))[0]), 3)
      1.8
    """

    def __init__(
        self, model: Any, decay: float | Callable[[jax.Array], Any] = 0.999, *, wrt: FilterLike = Param
    ) -> None:
        given: Any = decay
        if not callable(given) and not (isinstance(given, int | float) and 0 <= given <= 1):
            raise ArgumentError(
                f"an average cannot decay by {show_value(decay)}",
                path="decay",
                expected="a number from 0 to 1, or a function of the number of updates",
                got=show_value(decay),
                cure="`mu.optim.EMA(model, decay=0.999)`",
            )
        self.step = OptState(0)
        self.decay = decay
        self.wrt = as_filter(wrt)
        self._model = Reference(check_node(model))
        self.state = {show_path(path): OptState(cell.get()) for path, cell in self._tracked().items()}

    def update(self) -> None:
        """Move the averages towards the present values of the states."""
        tracked = {show_path(path): cell for path, cell in self._tracked().items()}
        decay = self.decay(self.step.value) if callable(self.decay) else self.decay
        if tracked.keys() != self.state.keys():
            kept = {name: cell for name, cell in self.state.items() if name in tracked}
            self.state = kept | {name: OptState(cell.get()) for name, cell in tracked.items() if name not in kept}
        for name, cell in tracked.items():
            average = self.state[name]
            average.value = jax.tree.map(lambda old, new: _mixed(decay, old, new), average.value, cell.value)
        self.step += 1

    def _tracked(self) -> dict[Path, Variable]:
        cells = variables(self._model.value, self.wrt)
        return {
            path: cell
            for path, cell in cells.items()
            if not cell.deferred
            and all(jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in jax.tree.leaves(cell.get()))
        }

    def _shadows(self) -> dict[Path, Variable]:
        """The averages by the paths of the states; see `mu.view`."""
        paths = variables(self._model.value, self.wrt)
        return {path: self.state[name] for path in paths if (name := show_path(path)) in self.state}


def _mixed(decay: Any, old: jax.Array, new: jax.Array) -> jax.Array:
    """The next average: computed in float32, at least, as a step may be smaller than what a narrow dtype can tell apart."""
    with jax.numpy_dtype_promotion("standard"):
        wide = jnp.promote_types(old.dtype, jnp.float32)
        weight = jnp.asarray(decay, jnp.finfo(wide).dtype)
        return (weight * old.astype(wide) + (1 - weight) * new.astype(wide)).astype(old.dtype)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How optax keeps what it keeps for parameters: names and types of the leaves, and the structure around them."""

    types: Hashable  # of the parameters
    names: tuple[str, ...]
    leaves: tuple[jax.ShapeDtypeStruct, ...]
    treedef: Any

    def __repr__(self) -> str:
        return f"<{len(self.names)} leaves>"


def _struct(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _types(values: State) -> Hashable:
    leaves, treedef = jax.tree.flatten(values)
    return treedef, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def _check_transformation(model: Any, tx: Any) -> None:
    """Refuse what is no optax transformation.

    Raises:
      ArgumentError: it is none.
    """
    if callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None)) and not is_node(tx):
        return
    if is_node(tx) and callable(getattr(model, "update", None)):
        cure = "The model comes first: `mu.Optimizer(model, tx)`."
    elif callable(tx):
        cure = "Make the transformation: `mu.Optimizer(model, optax.adam(1e-3))`."
    else:
        cure = "`mu.Optimizer(model, optax.adam(1e-3))`"
    raise ArgumentError(
        f"{show_value(tx)} is not an optax transformation",
        path="tx",
        expected="an object with the methods `init` and `update`, such as `optax.adam(1e-3)`",
        got=show_class(tx),
        cure=cure,
    )


def _check_are_gradients(given: Any) -> None:
    """Refuse what people give in the place of gradients.

    Raises:
      ArgumentError: it is a model, or a loss and gradients.
    """
    if is_node(given):
        got = show_class(given)
        cure = "Differentiate it first: `optimizer.update(mu.grad(loss_fn)(model, x))`; with a model, that comes first."
    elif (
        isinstance(given, tuple) and len(given) == 2 and not isinstance(given[0], State) and isinstance(given[1], State)
    ):
        got = "a pair, as `mu.value_and_grad` gives it"
        cure = "Take it apart: `loss, grads = mu.value_and_grad(loss_fn)(model, x)`, then `optimizer.update(grads)`."
    else:
        return
    raise ArgumentError("`update` was given what are no gradients", expected="what `mu.grad` gives", got=got, cure=cure)


def _named_leaves(state: Any) -> tuple[list[str], list[Any], Any]:
    """The leaves of an optax state with names that end in the parameters' paths: ``0.mu.blocks[0].kernel``."""
    entries, treedef = jax.tree_util.tree_flatten_with_path(state)
    names = [jax.tree_util.keystr(keys, simple=True, separator=".") for keys, _ in entries]
    return names, [leaf for _, leaf in entries], treedef


_layouts: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def _layout(init: Any, values: State, types: Hashable) -> _Layout:
    """The layout for parameters of these types; `init` is asked for it once."""
    try:
        known = _layouts.setdefault(init, {})
    except TypeError:  # no weak references to it, or no hash
        known = {}
    if types not in known:
        names, leaves, treedef = _named_leaves(jax.eval_shape(init, values))
        known[types] = _Layout(types, tuple(names), tuple(map(_struct, leaves)), treedef)
    layout: _Layout = known[types]
    return layout


def _check_gradients(grads: Any, values: State) -> State:
    """The gradients as a State of the parameters' paths.

    Raises:
      OptimizerError: some are missing, of no parameter, or of another shape; all are listed.
    """
    flat = dict(_gradients_by_path(grads, (), frozenset(values.flat())))
    problems = [f"missing:    {show_path(path)}" for path in values if path not in flat]
    problems += [
        f"unexpected: {show_path(path) or f'one value for all, {show_value(value)}'}"
        for path, value in flat.items()
        if path not in values.flat()
    ]
    for path, value in values.flat().items():
        if path in flat and _shapes(flat[path]) != _shapes(value):
            problems.append(f"{show_path(path)}: expected {show_type(value)}, got {show_type(flat[path])}")
    if problems:
        raise OptimizerError(
            "the gradients do not fit the parameters of the optimizer",
            differences=problems,
            cure="Differentiate the model that the optimizer was made with, by the same `wrt`.",
        )
    return State(flat, values.kinds())


def _shapes(value: Any) -> Any:
    return jax.tree.structure(value), [jnp.shape(leaf) for leaf in jax.tree.leaves(value)]


def _gradients_by_path(grads: Any, path: Path, ends: frozenset[Path]) -> Iterator[tuple[Path, Any]]:
    """The gradients by path; a container at the path of a parameter is a gradient."""
    if isinstance(grads, State):
        yield from (((*path, *inner), value) for inner, value in grads.flat().items())
    elif isinstance(grads, list | tuple | dict) and path not in ends:
        for key, part in grads.items() if isinstance(grads, dict) else enumerate(grads):
            yield from _gradients_by_path(part, (*path, key), ends)
    else:
        yield path, grads
