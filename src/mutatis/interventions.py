"""Interventions: looking at a model's inside, and changing it, without editing the model.

`intercept` hands the calls of modules to a function, which may look at them or put something else in their place. `capture`
collects what modules return. `sow` and `perturb` are for code that keeps a value, or takes a gradient with respect to one.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from operator import is_
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp

from mutatis import collecting
from mutatis.core import naming, transactions
from mutatis.core.avals import show_type
from mutatis.core.calls import takes
from mutatis.core.naming import show_path
from mutatis.core.nodes import declare_searched
from mutatis.core.showing import show_class, show_value
from mutatis.errors import ArgumentError, RecompilationWarning, StateTypeError, StructureError
from mutatis.model.contexts import Context
from mutatis.model.filters import FilterLike, Path, as_filter
from mutatis.model.kinds import Intermediate, Perturbation
from mutatis.model.modules import Module, for_each_class
from mutatis.model.operations import pop
from mutatis.model.state import State
from mutatis.model.surgery import Places, modules
from mutatis.model.variables import Variable, spelled, unsubscripted
from mutatis.model.walks import check_node, variables
from mutatis.tracing.transformed import Transformed

T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")

_stack = Context("intercept", None)  # the innermost Interceptor
_stack.recurs = True
# By Interceptor, where modules are in its `of`: kept outside of it, for it may live as long as a model that it holds.
_places: contextvars.ContextVar[dict[Any, Places]] = contextvars.ContextVar("places", default={})  # noqa: B039 - never changed
# By what they do, those that are in use, or that a model keeps for the next time: so entering one again changes nothing that
# a compiled program goes by.
_interceptors: weakref.WeakValueDictionary[tuple[Any, ...], Interceptor] = weakref.WeakValueDictionary()


class Interceptor(Module):
    """What is done with calls. A module, so that the states that it holds are implicit arguments of compiled programs.

    Args:
      selects: which modules.
      function: what is called in their place; None to keep what they return in `store`.
      of: the node in which paths are; without it they are empty.
      store: where to keep what modules return.
      below: the interceptor that was there before.
    """

    def __init__(self, selects: Any, function: Any, of: Any, store: Any, below: Any) -> None:
        self.selects = selects
        self.function = function
        self.of = of
        self.store = store
        self.below = below

    def run(self, module: Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The call of a module, handed down from the innermost interceptor to the call itself."""
        go_on = call if self.below is None else functools.partial(self._go_on, module, call)
        found = _places.get()[self].path_of(module)
        path: Path = () if found is None else found
        if not self.selects(path, module) or (self.store is not None and found is None):
            return go_on(*args, **kwargs)
        if self.store is not None:
            out = go_on(*args, **kwargs)
            sow(self.store, show_path(path) or ".", out)
            return out
        active = _stack.get()

        def resume(*new_args: Any, **new_kwargs: Any) -> Any:
            with _stack.set(active):
                return go_on(*new_args, **new_kwargs)

        with _stack.set(self.below):  # what the function itself calls is not handed to it
            return self.function(module, resume, *args, **kwargs)

    def _go_on(self, module: Module, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return self.below.run(module, call, args, kwargs)


declare_searched(Interceptor, "selects", "function", "below")  # what these name is captured too


def _make_interceptable(cls: type[Module]) -> None:
    """Let the calls of a class's modules ask for interceptors."""
    definers = (base for base in cls.__mro__ if "__call__" in base.__dict__)
    base = next(definers, None)
    if base is None or (base is not cls and issubclass(base, Module)):
        return  # there is none, or it is another class's turn
    call = base.__dict__["__call__"]
    if _interceptable(call) is not None:
        return

    @functools.wraps(call)
    def __call__(self: Module, /, *args: Any, **kwargs: Any) -> Any:
        bound = call.__get__(self, type(self))
        interceptor = _stack.get()
        if interceptor is None or _outermost(type(self)) is not __call__:  # a call of `super()`
            return bound(*args, **kwargs)
        return interceptor.run(self, bound, args, kwargs)

    __call__._interceptable = True  # type: ignore[attr-defined]
    cls.__call__ = __call__  # type: ignore[method-assign]


def _outermost(cls: type) -> Any:
    """The call of a class that can be intercepted."""
    calls = (_interceptable(base.__dict__["__call__"]) for base in cls.__mro__ if "__call__" in base.__dict__)
    return next(filter(None, calls), None)


def _interceptable(call: Any) -> Any:
    """What of a call can be intercepted: itself, or what is below the transforms that were put on it later; None if nothing."""
    while call is not None and getattr(call, "_interceptable", False) is not True:
        call = getattr(call, "__wrapped__", None)
    return call


for_each_class(_make_interceptable, later=True)


@contextlib.contextmanager
def intercept(where: FilterLike, fn: Callable[..., Any], *, of: Any = None) -> Iterator[None]:
    """Hand the calls of modules to a function, inside a ``with`` block.

    ``fn(module, call, *args, **kwargs)`` gives the result of the call; ``call(*args, **kwargs)`` is what it would have been. Of
    several interceptors the innermost comes first.

    Args:
      where: which modules: a type, a predicate on (path, module), any filter.
      fn: what is called in their place.
      of: the node in which `where` finds paths; without it they are empty.

    Raises:
      ArgumentError: `fn` is no function.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> from mutatis import nn
      >>> layer = nn.Linear(2, 3, rngs=mu.Rngs(0))
      >>> with mu.intercept(nn.Linear, lambda module, call, x: jnp.zeros_like(call(x))):
      ...     layer(jnp.ones(2))
      Array([0., 0., 0.], dtype=float32)
    """
    if not callable(fn):
        raise ArgumentError(
            "`intercept` needs a function to hand the calls to",
            expected="a function of (module, call, *args, **kwargs)",
            got=show_value(fn),
            cure="`mu.intercept(nn.Linear, lambda module, call, x: call(x))`",
        )
    if of is not None:
        check_node(of)
    for_each_class(_make_interceptable)  # those that were given another `__call__` since
    with _under(_interceptor(as_filter(where), fn, of, _stack.get())):
        yield


@contextlib.contextmanager
def _under(interceptor: Interceptor) -> Iterator[None]:
    """Hand calls to an interceptor."""
    token = _places.set({**_places.get(), interceptor: Places(interceptor.of)})
    try:
        with _stack.set(interceptor):
            yield
    finally:
        _places.reset(token)


def _interceptor(selects: Any, fn: Callable[..., Any], of: Any, below: Any) -> Interceptor:
    """The one that does this, if there is one, or a new one."""
    function = (id(fn.__func__), id(fn.__self__)) if isinstance(fn, types.MethodType) else id(fn)
    key = (selects, function, id(of), id(below))
    known = _interceptors.get(key)
    if known is None:
        known = _interceptors[key] = Interceptor(selects, fn, of, None, below)
    return known


def capture(f: Callable[P, R], *filters: FilterLike, of: Any = None) -> Transformed[P, tuple[R, State]]:
    """A function that gives what `f` gives and what the modules inside returned: ``(out, activations)``.

    `activations` is a `State` by path, with a tuple for each module: one entry for each of its calls. Calls inside a `mu.vmap`
    or `mu.scan` within the model come back stacked. Of a kind of states, ``mu.capture(model, mu.Intermediate)``, it gives what
    the call sowed, and takes it out of the model.

    Args:
      f: a callable Module, or a function.
      *filters: which modules: types, predicates on (path, module), any filters; all, if there are none. Kinds of states, such as
        `mu.Intermediate`, select what is sown.
      of: the node in which the modules are, if that is not `f`.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> from mutatis import nn
      >>> class Net(mu.Module):
      ...     def __init__(self, rngs):
      ...         self.layers = [nn.Linear(2, 2, rngs=rngs), nn.Linear(2, 2, rngs=rngs)]
      ...     def __call__(self, x):
      ...         return self.layers[1](self.layers[0](x))
      >>> out, activations = mu.capture(Net(mu.Rngs(0)), nn.Linear)(jnp.ones(2))
      >>> activations["layers", 0][0].shape, bool((activations["layers", 1][0] == out).all())
      ((2,), True)
    """
    node = f if of is None else of
    if not isinstance(node, Module) and of is None:
        raise ArgumentError(
            "`capture` of a function needs the model that is looked into",
            expected="a callable Module, or `of=model`",
            got=show_value(f),
            cure="`mu.capture(model, nn.Linear)(x)`, or `mu.capture(f, nn.Linear, of=model)(x)`.",
        )
    kinds = tuple(f for f in filters if isinstance(f, type) and issubclass(f, Variable))
    rest = tuple(f for f in filters if f not in kinds)
    selects = as_filter(rest if rest else None if kinds else ...)

    def call(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        store = Module()
        for_each_class(_make_interceptable)
        before = {cell: cell.get() for cell in variables(node, *kinds).values()} if kinds else {}
        with _under(Interceptor(selects, None, node, store, _stack.get())):
            out = function(*args, **kwargs)
        paths = {show_path(path) or ".": path for path in modules(node)}
        kept = {paths[name]: cell.get() for name, cell in vars(store).items()}
        activations = State(kept, dict.fromkeys(kept, Intermediate))
        return out, activations | _take_sown(node, kinds, before) if kinds else activations

    return Transformed(f, functools.partial(capture, *filters, of=of), call)


def _take_sown(node: Any, kinds: tuple[type[Variable], ...], before: dict[Variable, Any]) -> State:
    """Take out of a node the states that were made since, and what was added to those that were there before."""
    made: State = pop(node, lambda path, cell: isinstance(cell, kinds) and cell not in before)
    added: dict[Path, Any] = {}
    cells = variables(node, *kinds)
    for path, cell in cells.items():
        then, now = before[cell], cell.get()
        if not isinstance(then, tuple) or not isinstance(now, tuple) or now is then:
            continue
        count = len(then) if len(now) > len(then) and all(map(is_, then, now)) else 0
        added[path] = now[count:]
        cell.set(then)
    return made | State(added, {path: type(cells[path]) for path in added})


@takes(
    "mu.sow(model, 'activation', x)",
    _="A name says where the value is kept, and no collection: `mu.sow(model, 'activation', x)`. Its kind says "
    "of what sort it is: `mu.sow(model, 'total', x, kind=mu.Variable)`.",
)
def sow(
    module: Module,
    name: str,
    value: T,
    *,
    kind: type[Variable[Any]] = Intermediate,
    reduce: Callable[[Any, T], Any] | None = None,
) -> None:
    """Keep a value from inside a computation as a state of a module.

    The state is a tuple of all values that were sown there until it is popped, ``mu.pop(model, mu.Intermediate)``. In a compiled
    program those of the latest call only: one that grew with each call would compile each call anew, so a warning says it. What
    the body of a `mu.scan` sows comes back stacked; branches, `mu.while_loop` and `mu.shard_map` refuse a state that is not there
    before, unless it is popped there again. In a call that collects this name, `mu.collect`, the value goes there and nowhere
    else.

    Args:
      module: the module.
      name: the attribute that holds the state.
      value: an array, or a pytree of arrays.
      kind: the kind of the state.
      reduce: ``reduce(old, value)`` gives the state's next value, in place of the tuple; the first is `value` itself.

    Raises:
      StructureError: the attribute is something else, or the class has a method or property of this name.

    Example:
      >>> import mutatis as mu
      >>> net = mu.Module()
      >>> mu.sow(net, "activation", 1.0)
      >>> mu.sow(net, "activation", 2.0)
      >>> [float(value) for value in mu.pop(net, mu.Intermediate)["activation"]]
      [1.0, 2.0]
    """
    kind = unsubscripted(kind)
    held = _held(module, name, kind)
    if kind is Intermediate and collecting.take(name, value):
        return
    if held is None:
        setattr(module, name, kind((value,)) if reduce is None else kind(value, reduced=True))
    elif not isinstance(held, kind):
        raise _occupied(module, name, type(held).__name__, kind)
    elif reduce is not None:
        held.set(reduce(held.get(), value))
    elif _is_of_earlier_call(held):
        warnings.warn(
            f"state {naming.describe(held)} still held what an earlier call had sown, which gives way to what this one sows: "
            "else it would grow, and compile, with each call. Take the values out after each call: "
            f"`mu.pop(model, {spelled(kind)})`.",
            RecompilationWarning,
            stacklevel=2,
        )
        held.set((value,))
    else:
        held.set((*held.get(), value))


def perturb(module: Module, name: str, value: T) -> T:
    """Add a state of zeros to a value, so that gradients with respect to the value can be taken.

    The state is made at the first call; ``mu.grad(loss, wrt=mu.Perturbation)(model)`` then gives the gradients.

    Args:
      module: the module that holds the state.
      name: the attribute that holds it.
      value: a float array, or a pytree of them.

    Raises:
      StructureError: the attribute is something else.
      StateTypeError: the state was made for a value of another shape.

    Example:
      >>> import mutatis as mu
      >>> class Net(mu.Module):
      ...     def __call__(self, x):
      ...         return mu.perturb(self, "hidden", 2 * x) ** 2
      >>> net = Net()
      >>> _ = net(3.0)
      >>> float(mu.grad(lambda net: net(3.0), wrt=mu.Perturbation)(net)["hidden"])
      12.0
    """
    held = _held(module, name, Perturbation)
    if held is None:
        held = Perturbation(jax.tree.map(jnp.zeros_like, value))
        setattr(module, name, held)
    elif not isinstance(held, Perturbation):
        raise _occupied(module, name, type(held).__name__, Perturbation)
    zeros = held.get()
    if jax.tree.map(jnp.shape, zeros) != jax.tree.map(jnp.shape, value):
        raise StateTypeError(
            f"state {naming.describe(held)} is added to a value of another shape",
            path=naming.path_of(held) or name,
            where=naming.where(),
            expected=show_type(zeros),
            got=show_type(value),
            made_at=held.made_at,
            cure="Take it out, `mu.pop(model, mu.Perturbation)`, and call the model once: it is made anew.",
        )
    perturbed: T = jax.tree.map(jnp.add, value, zeros)
    return perturbed


def _is_of_earlier_call(held: Variable) -> bool:
    """Whether a program is traced that has sown nothing into the state yet; what a loop repeats goes by the first time."""
    tx = transactions.current()
    compiled = tx is not None and tx.compiled
    while compiled and tx is not None:
        if held in tx.written or tx.repeats != 1:
            return False
        tx = tx.parent
    return compiled


def _held(module: Any, name: Any, kind: type[Variable]) -> Any:
    """What the attribute of a module holds, or None.

    Raises:
      ArgumentError: it is no module.
      StructureError: its class has a method or property of this name.
    """
    if isinstance(module, Module) and isinstance(name, str):
        held = module.__dict__.get(name)
        of_class = inspect.getattr_static(type(module), name, None)
        if held is None and (callable(of_class) or isinstance(of_class, _COMPUTED)):
            raise _occupied(module, name, f"a {type(of_class).__name__} of the class", kind)
        return held
    named = isinstance(name, str)
    raise ArgumentError(
        f"{show_value(module)} cannot hold state {f'`{name}`' if named else show_value(name)}",
        path=name if named else None,
        expected="a Module, and then a name",
        got=f"{show_class(module)}, {show_class(name)}",
        cure="Name the module that the value belongs to, and then where: `mu.sow(self, 'activation', x)`, "
        "`mu.perturb(self, 'hidden', x)`.",
    )


_COMPUTED = (property, functools.cached_property, classmethod, staticmethod)


def _occupied(module: Module, name: str, got: str, kind: type[Variable]) -> StructureError:
    owner = type(module).__name__
    return StructureError(
        f"`{owner}.{name}` is no {kind.__name__}",
        path=f"{owner}.{name}",
        expected=f"no attribute of this name, or a {kind.__name__}",
        got=got,
        cure="Give it another name.",
    )
