"""Variables: the mutable cells that users hold, and their kinds.

A `Variable` reads and writes through the open transaction, if there is one. Everything else here makes it
pleasant: arithmetic on the value, item assignment, metadata. A *kind* is a subclass; it says what a state is for
and declares defaults as class attributes (`collection`, `vmap_axis`, `fixed`).
"""

from __future__ import annotations

import abc
import copyreg
import operator
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar, get_origin, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from mutatis._equivalents import equivalent, quoted
from mutatis.core import access, naming, placements, transactions
from mutatis.core.avals import is_concrete, same_type, show_type
from mutatis.core.cells import UNSET, Cell, Deferred
from mutatis.core.naming import caller
from mutatis.core.nodes import Node
from mutatis.core.stamps import thawed
from mutatis.core.structure import structure
from mutatis.errors import ArgumentError, DeferredStateError, FrozenStateError, StateTypeError
from mutatis.model.values import as_value, brief, from_bytes, to_bytes

V = TypeVar("V", bound="Variable[Any]")
if TYPE_CHECKING:  # a state holds an array, unless it says otherwise; Python knows such defaults from 3.13 on
    from typing_extensions import TypeVar as TypeVarWithDefault

    Held = TypeVarWithDefault("Held", default=jax.Array)
else:
    Held = TypeVar("Held")


class _Kind(type):
    """Gives kinds no instance dictionary: what is set there would be lost in copies, and is no metadata."""

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any) -> Any:
        return super().__new__(mcs, name, bases, {"__slots__": (), **namespace}, **options)


class Variable(Cell, Node, Generic[Held], metaclass=_Kind):
    """A state: a mutable cell that holds an array, or a pytree of arrays.

    Read and write the array by the attribute `value`. In arithmetic and in `jax.numpy` functions the Variable stands for its
    array. The subclasses, such as `mu.Param` and `mu.BatchStat`, say the purpose of a state, and filters select by them.

    A Python int becomes an int32 array, a float a float32 array (64 bits with `jax_enable_x64`), and a NumPy array is copied. In
    ordinary code and under `jit`, `grad` and `vmap` you may assign an array of another shape or dtype, unless the state is
    `fixed`.

    Args:
      value: an array, a number, or a pytree of them. It may be left out if `init` is given.
      init: the start value, or a function without arguments that returns it. `mu.reset` writes the start value again. Without
        `value` the state is *deferred*: its first read calls `init`.
      name: an explicit name, which stays the same when the state moves to another place in the model. Checkpoints use it.
      sharding: the placement on devices: a `jax.sharding.PartitionSpec`, a tuple with a name for each axis (see
        `mu.sharding.rules`), or a whole `jax.sharding.Sharding`. Under a mesh (`jax.set_mesh`) the value is put there.
      fixed: whether to refuse another structure, shape or dtype. None means the setting of the class, which is False for all
        kinds of Mutatis.
      **metadata: further hashable values, such as ``tag="adapter"``. They are readable as attributes and cannot be changed.

    Raises:
      ArgumentError: there is neither a value nor `init`.
      StateTypeError: a leaf of the value is not an array or a number.
      ShardingError: the mesh has no such axis, or cannot split the value so.

    Example:
      >>> import mutatis as mu
      >>> count = mu.Variable(0)
      >>> count.value += 2
      >>> count
      Variable(2, int32)
      >>> count + 1
      Array(3, dtype=int32)
    """

    __slots__ = ("_behind", "_frozen", "_init", "_lanes", "_made_at", "fixed", "metadata", "name", "sharding")
    __array_priority__ = 100  # NumPy leaves `array + variable` to us, as it does with JAX arrays

    collection: ClassVar[str] = "variables"
    vmap_axis: ClassVar[int | None] = None
    fixed: bool

    if TYPE_CHECKING:
        # What is given, or what `init` gives, is an array or becomes one; or else it is a pytree of arrays.

        @overload
        def __init__(
            self,
            value: ArrayLike,
            *,
            init: Any = ...,
            name: str | None = ...,
            sharding: Any = ...,
            fixed: bool | None = ...,
            **metadata: Any,
        ) -> None: ...
        @overload
        def __init__(
            self,
            value: Held,
            *,
            init: Any = ...,
            name: str | None = ...,
            sharding: Any = ...,
            fixed: bool | None = ...,
            **metadata: Any,
        ) -> None: ...
        @overload
        def __init__(
            self,
            *,
            init: ArrayLike | Callable[[], ArrayLike],
            name: str | None = ...,
            sharding: Any = ...,
            fixed: bool | None = ...,
            **metadata: Any,
        ) -> None: ...
        @overload
        def __init__(
            self,
            *,
            init: Held | Callable[[], Held],
            name: str | None = ...,
            sharding: Any = ...,
            fixed: bool | None = ...,
            **metadata: Any,
        ) -> None: ...

    else:
        __class_getitem__ = classmethod(types.GenericAlias)  # with which no frame comes between a state and its line

    def __init__(
        self,
        value: Any = UNSET,
        *,
        init: Any = None,
        name: str | None = None,
        sharding: Any = None,
        fixed: bool | None = None,
        **metadata: Any,
    ) -> None:
        super().__init__()
        self._frozen: str | None = None
        self._behind = False
        self._init = init
        self._lanes: tuple[
            tuple[int, int], ...
        ] = ()  # axes that transforms put into it, and their sizes; see `note_stacked`
        self._made_at: tuple[str, int, str] | None = caller()
        self.name = name
        self.sharding = sharding
        self.fixed = type(self)._fixed_by_kind if fixed is None else fixed
        self.metadata = metadata
        if metadata:
            _check_metadata(type(self), metadata)
        if value is UNSET and init is None:
            raise ArgumentError(
                f"a {type(self).__name__} needs a value",
                made_at=self.made_at,
                cure=f"Give a value, `{spelled(type(self))}(jnp.zeros(3))`, or say how it starts: `init=lambda: ...`.",
            )
        if value is not UNSET:
            value = as_value(value, self)
            if sharding is not None:
                value = placements.declared(self, value)
        access.create(self, value)

    _fixed_by_kind: ClassVar[bool] = False

    def __init_subclass__(cls, /, **options: Any) -> None:
        super().__init_subclass__(**options)
        declared = cls.__dict__.get("fixed")
        if isinstance(declared, bool):
            cls._fixed_by_kind = declared
            delattr(cls, "fixed")  # the slot of the base class holds it per cell
        _register(cls)

    # -- the value -------------------------------------------------------------------------------------------

    def get(self) -> Held:
        """The value; the same as the attribute `value`. A deferred state is created here, if it has `init`."""
        value: Held = access.read(self)
        if value is UNSET or type(value) is Deferred:
            value = self._create()
        return value

    def set(self, value: Held | ArrayLike) -> None:
        """Write another value; the same as an assignment to `value`. An expression can do it, such as a `lambda`."""
        if self._frozen is not None:
            raise frozen_error(self)
        new = as_value(value, self)
        if self.fixed:
            check_same_type(self, new, "may not change (fixed=True)")
        if self.sharding is not None and access.is_deferred(self):
            new = placements.declared(self, new)
        access.write(self, new)

    def admit(self, value: Any) -> Any:
        """Convert a value to the form in which the state stores it: a pytree of strongly typed arrays. Nothing is written.

        Raises:
          StateTypeError: a leaf is not an array or a number.
        """
        return as_value(value, self)

    if TYPE_CHECKING:

        @property
        def value(self) -> Held: ...
        @value.setter
        def value(self, value: Held | ArrayLike) -> None: ...
    else:
        value = property(get, set, doc="The value, read and written through the current transaction.")

    def _create(self) -> Any:
        start: Any = Deferred(None) if self._init is None else started(self)
        if type(start) is Deferred:
            raise DeferredStateError(
                f"state {naming.describe(self)} was read before its layer created it",
                path=naming.path_of(self),
                where=naming.where(),
                made_at=self.made_at,
                cure="Its size is inferred at the first call: call the model once, or give the size, e.g. "
                "`nn.Linear(in_features, out_features, rngs=rngs)`.",
            )
        self.set(start)
        self._shape = getattr(start, "shape", None)
        return access.read(self)

    @property
    def deferred(self) -> bool:
        """Whether the state has no value yet."""
        return access.is_deferred(self)

    @property
    def frozen(self) -> bool:
        """Whether the state may be read but not written."""
        return self._frozen is not None

    @property
    def init(self) -> Any:
        """The start value that was given, a function of no arguments that makes it, or None."""
        return self._init

    @property
    def made_at(self) -> str | None:
        """The file, line and function in which the state was made; None for a copy that was made of another."""
        return None if self._made_at is None else naming.show_place(self._made_at)

    def __getattr__(self, name: str) -> Any:
        # Only reached for names that are neither slots nor methods: metadata, and what arrays have.
        if not name.startswith("_"):
            if name in self.metadata:
                return self.metadata[name]
            if hasattr(jax.Array, name):
                return getattr(self.get(), name)
            if (instead := equivalent("Variable", name) or equivalent("jax.Array", name)) is not None:
                raise AttributeError(f"{type(self).__name__} has no attribute {name!r}: write {quoted(instead)}")
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}; its metadata are {[*self.metadata]}")

    # -- as an array -----------------------------------------------------------------------------------------

    @overload
    def __getitem__(self, index: types.EllipsisType) -> Held: ...
    @overload
    def __getitem__(self: Variable[jax.Array], index: Any) -> jax.Array: ...
    @overload
    def __getitem__(self, index: Any) -> Any: ...
    def __getitem__(self: Variable[Any], index: Any) -> Any:
        return self.get() if index is ... else self.get()[plain_index(index)]

    def __setitem__(self: Variable[Any], index: Any, item: Any) -> None:
        index = plain_index(index)
        item = item.get() if isinstance(item, Variable) else item
        if index is ...:
            new = as_value(item, self)
            check_same_type(self, new, "was given another type by `v[...] = x`")
            self.set(new)
            return
        old = self.get()
        if isinstance(old, dict | list):
            new = old.copy()
            new[index] = as_value(item, self)
            check_same_type(self, new, "was given another type by item assignment")
            self.set(new)
            return
        with jax.numpy_dtype_promotion("standard"):  # to compare, not to promote
            fits = jnp.result_type(old, item) == old.dtype
        if not fits:
            raise StateTypeError(
                f"state {naming.describe(self)} was given another dtype by item assignment",
                path=naming.path_of(self),
                where=naming.where(),
                expected=old.dtype,
                got=jnp.result_type(item),
                made_at=self.made_at,
                cure=f"Convert the item: `v[i] = x.astype(jnp.{old.dtype})`.",
            )
        self.set(old.at[index].set(item))

    @property
    def at(self: Variable[jax.Array]) -> At:
        """The `at` of the array: ``v.at[i].set(x)`` is an array with one changed element. The state itself does not change."""
        return At(self.get().at)

    @property
    def shape(self: Variable[jax.Array]) -> tuple[int, ...]:
        """The shape of the value."""
        return tuple(self.get().shape)

    @property
    def dtype(self: Variable[jax.Array]) -> Any:
        """The dtype of the value."""
        return self.get().dtype

    @property
    def ndim(self: Variable[jax.Array]) -> int:
        """The number of axes of the value."""
        return len(self.shape)

    @property
    def size(self: Variable[jax.Array]) -> int:
        """The number of elements of the value."""
        return int(np.prod(self.shape))

    @property
    def T(self: Variable[jax.Array]) -> jax.Array:
        """The transpose of the value."""
        return self.get().T

    def astype(self: Variable[jax.Array], dtype: Any) -> jax.Array:
        """The value in another dtype."""
        return self.get().astype(dtype)

    def __jax_array__(self: Variable[jax.Array]) -> jax.Array:
        return self.get()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        array = np.asarray(self.get(), dtype=dtype)
        return array.copy() if copy else array

    def __len__(self: Variable[Any]) -> int:
        return len(self.get())

    def __iter__(self: Variable[Any]) -> Iterator[Any]:
        return iter(self.get())

    def __bool__(self: Variable[Any]) -> bool:
        return bool(access.convert(self, bool))

    def __int__(self: Variable[jax.Array]) -> int:
        return int(access.convert(self, int))

    def __float__(self: Variable[jax.Array]) -> float:
        return float(access.convert(self, float))

    def __complex__(self: Variable[jax.Array]) -> complex:
        return complex(access.convert(self, complex))

    def __index__(self: Variable[jax.Array]) -> int:
        return int(access.convert(self, operator.index))

    def __format__(self, spec: str) -> str:
        return str(access.convert(self, lambda value: format(value, spec))) if spec else str(self)

    def __round__(self: Variable[jax.Array], ndigits: int | None = None) -> Any:
        return round(self.get(), ndigits)

    def item(self: Variable[jax.Array], *args: int) -> Any:
        """The value, or a part of it, as a Python number."""
        return access.convert(self, lambda value: value.item(*args))

    def tolist(self: Variable[jax.Array]) -> Any:
        """The value as a Python number, or as nested lists of them."""
        return access.convert(self, lambda value: value.tolist())

    # By identity, though `==` compares values: two cells never have one hash. It is in C, so that no signal handler runs in it.
    __hash__ = object.__hash__

    if TYPE_CHECKING:  # made by `_forward`, below the class

        def __add__(self: Variable[jax.Array], other: Any) -> jax.Array: ...
        def __sub__(self: Variable[jax.Array], other: Any) -> jax.Array: ...
        def __mul__(self: Variable[jax.Array], other: Any) -> jax.Array: ...
        def __truediv__(self: Variable[jax.Array], other: Any) -> jax.Array: ...
        def __matmul__(self: Variable[jax.Array], other: Any) -> jax.Array: ...
        def __pow__(self: Variable[jax.Array], other: Any) -> jax.Array: ...
        def __radd__(self: Variable[jax.Array], other: Any) -> jax.Array: ...
        def __rsub__(self: Variable[jax.Array], other: Any) -> jax.Array: ...
        def __rmul__(self: Variable[jax.Array], other: Any) -> jax.Array: ...
        def __rtruediv__(self: Variable[jax.Array], other: Any) -> jax.Array: ...
        def __rmatmul__(self: Variable[jax.Array], other: Any) -> jax.Array: ...
        def __iadd__(self, other: Any) -> Self: ...
        def __isub__(self, other: Any) -> Self: ...
        def __imul__(self, other: Any) -> Self: ...
        def __itruediv__(self, other: Any) -> Self: ...
        def __neg__(self: Variable[jax.Array]) -> jax.Array: ...
        def __eq__(self, other: object) -> Any: ...
        def __ne__(self, other: object) -> Any: ...
        def __lt__(self: Variable[jax.Array], other: Any) -> jax.Array: ...
        def __le__(self: Variable[jax.Array], other: Any) -> jax.Array: ...
        def __gt__(self: Variable[jax.Array], other: Any) -> jax.Array: ...
        def __ge__(self: Variable[jax.Array], other: Any) -> jax.Array: ...

    # -- as a Python object ----------------------------------------------------------------------------------

    def __repr__(self) -> str:
        if not access.holds_value(self):
            body = "deferred"
        else:
            value = access.read(self)
            body = "deferred" if type(value) is Deferred else brief(value)
        marks = [f"name={self.name!r}"] if self.name is not None else []
        marks += ["frozen"] if self.frozen else []
        marks += [f"{key}={item!r}" for key, item in self.metadata.items()]
        return f"{type(self).__name__}({', '.join([body, *marks])})"

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        from mutatis.model.treescoped import render_variable

        return render_variable(self, path, subtree_renderer)

    def __deepcopy__(self: V, memo: dict[int, Any]) -> V:
        new = duplicate(self)
        memo[id(self)] = new
        access.create(new, access.read(self))
        return new

    def __copy__(self: V) -> V:
        return self.__deepcopy__({})  # arrays are immutable; two cells over one state there are not

    def __getstate__(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in _FIELDS}
        leaves, treedef = jax.tree.flatten(access.read(self))
        return {
            **fields,
            "leaves": [to_bytes(leaf) for leaf in leaves],
            "tree": jax.tree.unflatten(treedef, [0] * len(leaves)),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        Cell.__init__(self)
        for name in _FIELDS:
            setattr(self, name, state.get(name, ()))  # what was pickled earlier has no lanes
        leaves = [from_bytes(leaf) for leaf in state["leaves"]]
        value = jax.tree.unflatten(jax.tree.structure(state["tree"]), leaves)
        access.create(self, value if self.sharding is None else placements.declared(self, value))

    def __reduce__(self) -> Any:
        return copyreg.__newobj__, (type(self),), self.__getstate__()  # type: ignore[attr-defined]


_FIELDS = ("_frozen", "_behind", "_init", "_lanes", "_made_at", "name", "sharding", "fixed", "metadata")


def _forward(name: str) -> None:
    """Give Variable a binary operator that works on the value, and its reflected and in-place forms."""
    apply = divmod if name == "divmod" else getattr(operator, name)

    def binary(self: Variable, other: Any) -> Any:
        return apply(self.get(), other.get() if isinstance(other, Variable) else other)

    def reflected(self: Variable, other: Any) -> Any:
        return apply(other, self.get())

    def in_place(self: Variable, other: Any) -> Variable:
        self.set(binary(self, other))
        return self

    stem = name.rstrip("_")
    for prefix, method in (("", binary), ("r", reflected), ("i", in_place)):
        if (prefix, name) == ("i", "divmod"):
            continue  # there is no such operator
        setattr(Variable, f"__{prefix}{stem}__", method)


for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and_",
    "or_",
    "xor",
    "lshift",
    "rshift",
    "divmod",
):
    _forward(_name)


def _forward_plain(name: str) -> None:
    apply = getattr(operator, name)
    if name in ("neg", "pos", "abs", "invert"):
        setattr(Variable, f"__{name}__", lambda self: apply(self.get()))
    else:
        setattr(
            Variable,
            f"__{name}__",
            lambda self, other: apply(self.get(), other.get() if isinstance(other, Variable) else other),
        )


for _name in ("neg", "pos", "abs", "invert", "eq", "ne", "lt", "le", "gt", "ge"):
    _forward_plain(_name)


class At:
    """What `Variable.at` is: that of its array, with states among the indices."""

    __slots__ = ("_at",)

    def __init__(self, at: Any) -> None:
        self._at = at

    def __getitem__(self, index: Any) -> Any:
        return self._at[plain_index(index)]


def plain_index(index: Any) -> Any:
    """An index with the values of states in their place."""
    if isinstance(index, Variable):
        return index.get()
    if isinstance(index, tuple):
        return tuple(map(plain_index, index))
    if isinstance(index, slice):
        return slice(plain_index(index.start), plain_index(index.stop), plain_index(index.step))
    return index


def _check_metadata(kind: type, metadata: dict[str, Any]) -> None:
    """Raise if metadata could not be read, as every state has an attribute of their name."""
    for name in metadata:
        if hasattr(kind, name):
            raise StateTypeError(
                f"metadata of a {kind.__name__} cannot be named `{name}`: every state has an attribute of that name",
                path=name,
                expected="a name that is no attribute of `mu.Variable`",
                got=name,
                cure=f"Give it another name: `{spelled(kind)}(x, {name}_=...)`.",
            )


# -- pytree: the child is the value, the kind is static --------------------------------------------------------


def _register(kind: type[Variable]) -> None:
    def flatten(variable: Variable) -> tuple[tuple[Any], Any]:
        return (variable.get(),), None

    def unflatten(_aux: None, children: tuple[Any]) -> Variable:
        variable: Variable = detached(kind)
        access.create_detached(variable, children[0])
        return variable

    def flatten_with_keys(variable: Variable) -> tuple[tuple[tuple[Any, Any]], Any]:
        return ((jax.tree_util.GetAttrKey("value"), variable.get()),), None

    jax.tree_util.register_pytree_with_keys(kind, flatten_with_keys, unflatten, flatten)


def detached(kind: type[V]) -> V:
    """A cell outside every model: what JAX makes when it rebuilds a pytree. It can be read, not written."""
    variable = kind.__new__(kind)
    Cell.__init__(variable)
    variable._frozen = "detached"
    variable._behind = False
    variable._init = None
    variable._lanes = ()
    variable._made_at = None
    variable.name = variable.sharding = None
    variable.fixed = kind._fixed_by_kind
    variable.metadata = {}
    return variable


def duplicate(variable: V) -> V:
    """Another cell of the same kind, name and metadata, without a value."""
    new = type(variable).__new__(type(variable))
    Cell.__init__(new)
    for name in _FIELDS:
        setattr(new, name, getattr(variable, name))
    new.metadata = dict(variable.metadata)
    return new


_register(Variable)


def spelled(kind: type) -> str:
    """A kind as a user writes it: ours are in `mu`."""
    return f"mu.{kind.__name__}" if kind.__module__ == "mutatis" else kind.__name__


def unsubscripted(kind: Any) -> Any:
    """A kind itself: `mu.Param` of `mu.Param[jax.Array]`, which is the same to all but type checkers."""
    return get_origin(kind) or kind


class ModuleInit(abc.ABC):
    """An `init` that takes the start of a state from the module that holds it, such as from a parameter of each neuron.

    A function of no arguments would close over the states of one module; its copies, and those that `vmap` makes, have others.
    """

    @abc.abstractmethod
    def start(self, module: Any, lanes: tuple[tuple[int, int], ...], batch_shape: tuple[int, ...]) -> Any:
        """The start of the state in a module.

        Args:
          module: the module that holds it.
          lanes: the axes along which the state is stacked, and their sizes.
          batch_shape: further axes, in front of those of a single one.
        """

    def __call__(self) -> Any:
        raise DeferredStateError(
            "a state that starts as its module says was to start without it",
            expected="the module, or what holds it",
            cure="`mu.reset(model, mu.Hidden)` starts the states of a model.",
        )


def initial(variable: Variable) -> Any:
    """The value that a state with `init` starts with.

    Raises:
      DeferredStateError: its `init` uses a value of the transform in which the state was made.
    """
    cause = None
    try:
        value = as_value(_call_init(variable), variable)
        if is_concrete(value) or not access.is_outside():
            return value
    except jax.errors.UnexpectedTracerError as error:
        cause = error
    raise DeferredStateError(
        f"state {naming.describe(variable)} cannot be started: its `init` uses a value of the transform it was made in",
        path=naming.path_of(variable),
        made_at=variable.made_at,
        expected="a function that makes the value when it is called, or a number or NumPy array",
        cure="Write `init=lambda: jnp.zeros(3)`, which makes the value each time, of nothing that was computed there.",
    ) from cause


def _call_init(variable: Variable) -> Any:
    """What `init` of a state says."""
    if not callable(variable._init):
        return variable._init
    try:
        return variable._init()
    except TypeError as error:
        if error.__traceback__ is None or error.__traceback__.tb_next is not None:
            raise  # from inside
        raise ArgumentError(
            f"state {naming.describe(variable)} cannot start: its `init` takes arguments",
            path=naming.path_of(variable),
            where=naming.where(),
            expected="a value, or a function of no arguments",
            got=naming.show_name(str(error)),
            made_at=variable.made_at,
            cure="Give them: `mu.Param(init(rngs.params(), (2, 3)))`; or later, "
            "`mu.Param(init=lambda: init(rngs.params(), (2, 3)))`.",
        ) from None


def note_stacked(variable: Variable, axis: int, size: int) -> None:
    """Note that a transform has stacked the states of its runs along a new axis: the state starts anew with it, too."""
    moved = [(at + (at >= axis), n) for at, n in variable._lanes]
    variable._lanes = tuple(sorted([*moved, (axis, size)]))


def note_unstacked(variable: Variable, axis: int) -> None:
    """Note that a state is one slice, along an axis, of what a transform has stacked."""
    variable._lanes = _without(variable._lanes, axis)


def lanes_of(variable: Variable) -> tuple[tuple[int, int], ...]:
    """The axes along which transforms have stacked a state, and their sizes, as the code that runs now sees it."""
    lanes = variable._lanes
    for axis in access.split_axes(variable):  # of these it sees one slice
        lanes = _without(lanes, axis)
    return lanes


def _without(lanes: tuple[tuple[int, int], ...], axis: int) -> tuple[tuple[int, int], ...]:
    return tuple((at - (at > axis), size) for at, size in lanes if at != axis)


def started(variable: Variable, batch_shape: tuple[int, ...] = (), module: Any = None) -> Any:
    """The value that a state with `init` starts with where it is: as often as the model that it is in is stacked.

    Args:
      variable: the state.
      batch_shape: further axes, in front of each single one.
      module: the module that holds it, if that is known.
    """
    lanes = lanes_of(variable)
    if isinstance(variable._init, ModuleInit) and module is not None:
        return variable._init.start(module, lanes, batch_shape)
    value = initial(variable)

    def stack(x: Any) -> Any:
        x = jnp.broadcast_to(x, (*batch_shape, *x.shape)) if batch_shape else x
        for axis, size in lanes:
            x = jnp.repeat(jnp.expand_dims(x, axis), size, axis)
        return x

    return jax.tree.map(stack, value) if lanes or batch_shape else value


def check_same_type(variable: Variable, new: Any, what: str) -> None:
    """Raise unless `new` has the type of the state's present value."""
    if not access.holds_value(variable):
        return
    old = access.read(variable)
    if type(old) is not Deferred and not same_type(old, new):
        raise StateTypeError(
            f"state {naming.describe(variable)} {what}",
            path=naming.path_of(variable),
            where=naming.where(),
            expected=show_type(old),
            got=show_type(new),
            made_at=variable.made_at,
            cure="Convert the value, `x.astype(v.dtype)`, or put another cell in its place: "
            f"`model.w = {spelled(type(variable))}(x)`.",
        )


def frozen_error(variable: Variable) -> FrozenStateError:
    """The error for a write to a frozen state."""
    if variable._frozen == "detached":
        problem = f"state {naming.describe(variable)} was written in a detached copy, which raw JAX made"
        cure = (
            "The write would be lost. Use `mu.jit` (or another `mu` transform) in place of `jax.jit`, make a pure "
            "function with `mu.functionalize`, or make the copy a model of its own: `mu.thaw(copy)`."
        )
    else:
        problem = f"frozen state {naming.describe(variable)} was written"
        cure = (
            "Make it live again: `mu.thaw(model)`."
            if variable.collection not in ("batch_stats", "rngs")
            else "Freeze the parameters only: `mu.thaw(model)`, then `mu.freeze(model, mu.Param)`. Or call `model.eval()` of the "
            "frozen part: its layers then neither update statistics nor draw random numbers."
        )
    return FrozenStateError(problem, path=naming.path_of(variable), where=naming.where(), cure=cure)


def detached_error(variable: Variable, what: str, path: str) -> FrozenStateError:
    """The error for a model that was to be trained, and is a copy that raw JAX made: its states are no longer live.

    Args:
      variable: one of its states.
      what: what cannot be done.
      path: the path of the state.
    """
    got = "what `jax.device_put`, `jax.tree.map` or another function of raw JAX has returned"
    cure = (
        "Make the copy a model of its own, `mu.thaw(model)`; or move a model itself: "
        "`mu.sharding.place(model, jax.devices()[0])`."
    )
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(access.peek_committed(variable))):
        got = "what `jax.jit` or another transform of raw JAX makes of an argument"
        cure = "Use `mu.jit` (or another `mu` transform) in place of `jax.jit`: it works on the model itself."
    return FrozenStateError(
        f"state `{path}` ({type(variable).__name__}) cannot be {what}: it is in a detached copy, which raw JAX made",
        path=path,
        where=naming.where(),
        expected="the model itself, whose states can be written",
        got=got,
        cure=cure,
    )


def set_mark(variable: Variable, name: str, mark: Any) -> None:
    """Set what is static of a state: whether it is frozen (`_frozen`), or its `name`; compiled programs take notice."""
    before = getattr(variable, name)
    if before != mark:
        tx = transactions.current()
        if tx is not None:
            tx.journal.note(variable, name, before)
        structure.changed(variable)
        setattr(variable, name, mark)
        structure.changed(variable)
        if name == "_frozen" and mark is None:
            thawed(variable)
