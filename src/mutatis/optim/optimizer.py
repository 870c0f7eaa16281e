"""The optimizer: any optax transformation over the states of a model.

It refers to the model, whose cells are not its children. It holds the state of optax as `OptState` cells of its own, by paths
that end in the parameters' paths. At each update the parameters are looked up again, so states may appear and vanish, and their
moments follow.
"""

from __future__ import annotations

from typing import Any, overload

import jax
import jax.numpy as jnp

from mutatis.compilation.log import advise
from mutatis.core import naming
from mutatis.core.avals import show_type
from mutatis.core.calls import takes
from mutatis.core.naming import show_path
from mutatis.core.nodes import Reference
from mutatis.core.showing import show_value
from mutatis.errors import ArgumentError, DeferredStateError, OptimizerError
from mutatis.model import elsewhere
from mutatis.model.filters import FilterLike, Path, as_filter
from mutatis.model.kinds import OptState, Param
from mutatis.model.modules import Module
from mutatis.model.state import State
from mutatis.model.variables import Variable, detached_error
from mutatis.model.walks import check_node, variables
from mutatis.optim.gradients import check_are_gradients, check_gradients, check_transformation
from mutatis.optim.layouts import Layout, beside, layout_of, named_leaves, struct_of, types_of


class Optimizer(Module):
    """Updates the parameters of a model by an optax transformation, such as `optax.adam`.

    The optimizer keeps the state of optax (moments, counts) as states of its own, of kind `OptState`. `update` writes to the
    model and to these states, so nothing has to be returned from the training step. Frozen parameters stay as they are.

    Args:
      model: the model whose parameters are updated: a Module, a Variable, or a list, tuple or dict of them.
      tx: an optax gradient transformation.
      wrt: a filter: which states are the parameters. States that are frozen or not of floats are left out.

    Attributes:
      step: OptState, an int32 scalar: the number of updates.
      state: a dictionary from names to `OptState`s: the state of optax, with one entry for each array.

    Raises:
      ArgumentError: `tx` is no optax transformation.
      DeferredStateError: a parameter has not been created yet: call the model once before.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu, optax
      >>> model = mu.nn.Linear(2, 1, rngs=mu.Rngs(0))
      >>> optimizer = mu.Optimizer(model, optax.sgd(0.1))
      >>> def loss_fn(model, x, y):
      ...     return jnp.mean((model(x) - y) ** 2)
      >>> @mu.jit
      ... def train_step(x, y):
      ...     loss, grads = mu.value_and_grad(loss_fn)(model, x, y)
      ...     optimizer.update(grads)
      ...     return loss
      >>> x, y = jnp.ones((4, 2)), jnp.ones((4, 1))
      >>> losses = [float(train_step(x, y)) for _ in range(3)]
      >>> losses[2] < losses[0], int(optimizer.step)
      (True, 3)
    """

    @takes("mu.Optimizer(model, optax.adam(1e-3))")
    def __init__(self, model: Any, tx: Any, wrt: FilterLike = Param) -> None:
        check_transformation(model, tx)
        self.step = OptState(0)
        self.tx = tx
        self.wrt = as_filter(wrt)
        self._model = Reference(check_node(model))
        params = self._params()
        values = self._values(params)
        names, leaves, treedef = named_leaves(tx.init(values))
        self.state = beside(params, dict(zip(names, leaves, strict=True)))
        types = tuple(struct_of(cell.value) for cell in self.state.values())
        self._made_for: Layout | None = Layout(types_of(values), tuple(names), types, treedef)

    def __setstate__(self, state: dict[str, Any]) -> None:
        model = state["_model"]  # itself, in what was pickled earlier
        reference = model if isinstance(model, Reference) else Reference(model)
        super().__setstate__({"_made_for": None, **state, "_model": reference})

    @overload
    def update(self, grads: Any, /, **extra: Any) -> None: ...
    @overload
    def update(self, model: Any, grads: Any, /, **extra: Any) -> None: ...
    def update(self, /, *args: Any, **extra: Any) -> None:
        """Make one step: write new values to the parameters and to the states of the optimizer.

        Call it as ``update(grads)`` or, as in Flax NNX, as ``update(model, grads)``.

        Args:
          *args: the gradients, a `State` as `mu.grad` returns it; or the model and then the gradients.
          **extra: further arguments of the optax transformation, such as ``value=loss``.

        Raises:
          OptimizerError: the gradients do not fit the parameters, the model is not the optimizer's, or a parameter has another
            shape than its moments.
        """
        import optax

        if len(args) not in (1, 2):
            raise ArgumentError(
                "`update` takes gradients, or a model and gradients",
                expected="optimizer.update(grads), or optimizer.update(model, grads)",
                got=f"{len(args)} arguments",
                cure="The optimizer keeps optax's state, and writes to the model: `optimizer.update(grads)`.",
            )
        params = self._params()
        if len(args) == 2:
            check_are_gradients(args[1] if isinstance(args[0], State) else {})
            self._check_model(args[0], params)
        values = self._values(params)
        grads = check_gradients(args[-1], values)
        tx = optax.with_extra_args_support(self.tx)
        updates, state = tx.update(grads, self._present_state(values), values, **extra)
        for path, value in optax.apply_updates(values, updates).flat().items():
            params[path].set(value)
        leaves, treedef = jax.tree.flatten(state)
        layout = self._layout(values)
        names = layout.names if treedef == layout.treedef else named_leaves(state)[0]
        for name, leaf in zip(names, leaves, strict=True):
            self.state[name].set(leaf)
        self.step += 1

    @property
    def opt_state(self) -> Any:
        """The state of optax in the structure of the transformation, for optax functions that read or change it.

        It may be assigned, too: ``optimizer.opt_state = optax.tree.set(optimizer.opt_state, learning_rate=0.1)``.

        Raises:
          OptimizerError: an assigned value has another structure, shape or dtype.

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
        types = [struct_of(jnp.asarray(leaf)) for leaf in leaves] if treedef == layout.treedef else None
        if types != list(layout.leaves):
            wrong = [
                (name, was, now, leaf)
                for name, was, now, leaf in zip(layout.names, layout.leaves, types or (), leaves, strict=bool(types))
                if now != was
            ]
            settable = (
                f"{name.rpartition('.')[2]}=jnp.{was.dtype}({leaf})"
                for name, was, _, leaf in wrong
                if was.shape == () and isinstance(leaf, int | float)
            )
            change = next(settable, "count=0")
            raise OptimizerError(
                "what was assigned to `opt_state` is not what the optimizer keeps",
                path="opt_state",
                expected="the structure, shapes and dtypes that it has",
                got=show_value(new) if types is None else None,
                differences=[f"{name}: expected {show_type(was)}, got {show_type(now)}" for name, was, now, _ in wrong],
                cure=f"Change what it keeps: `optimizer.opt_state = optax.tree.set(optimizer.opt_state, {change})`.",
            )
        for name, leaf in zip(layout.names, leaves, strict=True):
            self.state[name].set(leaf)

    def _params(self, *, frozen: bool = False) -> dict[Path, Variable]:
        """The states to optimize, by path; with those that are frozen, which keep their moments, if asked for."""
        chosen = {}
        for path, cell in variables(self._model.value, self.wrt).items():
            if cell._frozen == "detached":
                raise detached_error(cell, "optimized", show_path(path))
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

    def _layout(self, values: State) -> Layout:
        """The layout of what optax keeps for parameters."""
        types = types_of(values)
        known = self._made_for
        return known if known is not None and types == known.types else layout_of(self.tx.init, values, types)

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

    def _follow(self, layout: Layout, values: State) -> None:
        """Start the moments of parameters that have appeared, and drop those of parameters that are gone; not of frozen ones."""
        present = set(layout.names) | set(self._layout(self._values(self._params(frozen=True))).names)
        if present.issuperset(self.state) and self.state.keys() >= set(layout.names):
            return
        fresh = dict(zip(layout.names, jax.tree.leaves(self.tx.init(values)), strict=True))
        kept = {name: state for name, state in self.state.items() if name in present}
        new = {name: leaf for name, leaf in fresh.items() if name not in kept}
        self.state = kept | beside(self._params(), new)


elsewhere.install(Optimizer, "Optimizer", settings=("lr", "learning_rate", "step_size"))
advise(
    Optimizer,
    "tx",
    "Make one optimizer and keep it: its settings are part of the program. A rate that changes is a schedule, `optax.adam("
    "optax.linear_schedule(1e-3, 1e-4, 1000))`, or a state, `optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)`.",
)
