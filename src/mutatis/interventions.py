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
from mutatis.core.avals import shapes_of, show_type
from mutatis.core.calls import takes
from mutatis.core.naming import show_path
from mutatis.core.nodes import declare_searched
from mutatis.core.notes import annotate
from mutatis.core.showing import show_class, show_value
from mutatis.errors import ArgumentError, RecompilationWarning, StateTypeError, StructureError, see
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
        try:
            if interceptor is None or _outermost(type(self)) is not __call__:  # a call of `super()`
                return bound(*args, **kwargs)
            return interceptor.run(self, bound, args, kwargs)
        except Exception as error:
            annotate(error)
            raise

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
    """Replace the calls of some modules by a function of yours, inside a ``with`` block.

    The model itself does not change. In the block each call ``module(*args, **kwargs)`` of a selected module becomes
    ``fn(module, call, *args, **kwargs)``. Its result counts as the result of the module. ``call(*args, **kwargs)`` makes the
    original call, so `fn` can change the inputs, change the output, or leave the call out. If several blocks select a module, the
    function of the innermost block runs first.

    Args:
      where: a filter on modules: a type, a predicate on (path, module), or any other filter.
      fn: the function that is called in their place.
      of: the node in which `where` finds paths; without it they are empty.

    Raises:
      ArgumentError: `fn` is not a function.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> layer = mu.nn.Linear(2, 3, rngs=mu.Rngs(0))
      >>> def clip(module, call, x):
      ...     return jnp.clip(call(x), -0.1, 0.1)
      >>> with mu.intercept(mu.nn.Linear, clip):
      ...     out = layer(100 * jnp.ones(2))
      >>> bool((jnp.abs(out) <= 0.1).all())
      True
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
    """Make a function that returns the result of `f` and the outputs of the modules inside: ``(out, activations)``.

    The model itself does not change. `activations` is a `State` from the path of each module to a tuple, with one entry for each
    call of the module. The outputs of calls inside a `mu.vmap` or `mu.scan` within the model come back stacked.

    With a kind of states as a filter, ``mu.capture(model, mu.Intermediate)``, it returns the values that the call sowed
    (`mu.sow`), and takes them out of the model.

    Args:
      f: a callable Module, or a function.
      *filters: which modules: types, predicates on (path, module), or other filters. Without filters, all modules. Kinds of
        states, such as `mu.Intermediate`, select sown values.
      of: the node that holds the modules, if it is not `f`.

    Returns:
      A function with the arguments of `f`.

    Raises:
      ArgumentError: `f` is not a Module, and there is no `of`.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> rngs = mu.Rngs(0)
      >>> model = mu.nn.Sequential(mu.nn.Linear(2, 8, rngs=rngs), mu.nn.relu, mu.nn.Linear(8, 3, rngs=rngs))
      >>> out, activations = mu.capture(model, mu.nn.Linear)(jnp.ones((4, 2)))
      >>> [*activations]
      [('layers', 0), ('layers', 2)]
      >>> hidden, = activations["layers", 0]  # it was called once
      >>> hidden.shape
      (4, 8)
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
    """Keep a value from inside a computation, as a state of a module.

    Call it in a model for values that the model does not return, such as activations or attention weights. After the call, take
    them out: ``mu.pop(model, mu.Intermediate)``. `mu.capture` does both for one call.

    The state is a tuple of all values since it was last popped. In a compiled function the values of a new call replace those of
    earlier calls, with a warning: if the state grew with each call, each call would compile another program. The values that the
    body of a `mu.scan` sows come back stacked. Inside `mu.cond`, `mu.switch`, `mu.while_loop` and `mu.shard_map` the state has to
    exist before, or to be popped again inside. If an enclosing `mu.collect` collects this name, the value goes there and nowhere
    else.

    Args:
      module: the module that holds the state, mostly `self`.
      name: the attribute that holds the state.
      value: an array, or a pytree of arrays.
      kind: the kind of the state.
      reduce: ``reduce(old, value)`` returns the next value of the state. The state is then not a tuple; it begins as the first
        `value`.

    Raises:
      StructureError: the attribute is something else, or the class has a method or property of this name.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> class Net(mu.Module):
      ...     def __init__(self, rngs):
      ...         self.hidden = mu.nn.Linear(2, 8, rngs=rngs)
      ...     def __call__(self, x):
      ...         x = self.hidden(x)
      ...         mu.sow(self, "activation", x)
      ...         return x.sum()
      >>> net = Net(mu.Rngs(0))
      >>> _ = net(jnp.ones((4, 2)))
      >>> values = mu.pop(net, mu.Intermediate)
      >>> [x.shape for x in values["activation"]]
      [(4, 8)]
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
            f"`mu.pop(model, {spelled(kind)})`. {see(RecompilationWarning)}",
            RecompilationWarning,
            stacklevel=2,
        )
        held.set((value,))
    else:
        held.set((*held.get(), value))


def perturb(module: Module, name: str, value: T) -> T:
    """Add zeros to an intermediate value of a model, so that you can take the gradient with respect to this value.

    The zeros are a state of kind `Perturbation` of the module, made at the first call. Call the model once, and then
    ``mu.grad(loss_fn, wrt=mu.Perturbation)(model)`` gives the gradient with respect to the value.

    Args:
      module: the module that holds the state, mostly `self`.
      name: the attribute that holds the state.
      value: a float array, or a pytree of float arrays.

    Returns:
      `value` plus the state, in the shapes and dtypes of `value`.

    Raises:
      StructureError: the attribute is something else, or the class has a method or property of this name.
      StateTypeError: the state was made for a value of another shape or dtype.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> class Net(mu.Module):
      ...     def __call__(self, x):
      ...         hidden = mu.perturb(self, "hidden", 2 * x)
      ...         return jnp.sum(hidden**2)
      >>> net, x = Net(), jnp.array([1.0, 3.0])
      >>> _ = net(x)  # makes the state
      >>> mu.grad(lambda net: net(x), wrt=mu.Perturbation)(net)["hidden"]
      Array([ 4., 12.], dtype=float32)
    """
    held = _held(module, name, Perturbation)
    if held is None:
        held = Perturbation(jax.tree.map(jnp.zeros_like, value))
        setattr(module, name, held)
    elif not isinstance(held, Perturbation):
        raise _occupied(module, name, type(held).__name__, Perturbation)
    zeros = held.get()
    if shapes_of(zeros) != shapes_of(value):
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
