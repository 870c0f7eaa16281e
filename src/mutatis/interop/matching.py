"""Matching: which array goes to which state, and what there is to say about those that go nowhere."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mutatis.core.avals import show_type
from mutatis.core.nodes import STACKED_PARTS, stacked_part
from mutatis.interop.conventions import Slot, in_list, is_key, needless, numbers, own_name, slots_of
from mutatis.model.filters import Filter, FilterLike, Not, as_filter
from mutatis.model.kinds import Cache, Hidden, Intermediate, MetricState, OptState, Perturbation, RngState, kind_of
from mutatis.model.modules import Module
from mutatis.model.surgery import modules, stacks_on
from mutatis.model.variables import Variable

# What files with weights seldom hold: a model keeps its own.
_WORKING = (Cache, Hidden, Intermediate, MetricState, OptState, Perturbation, RngState)


def selection(filters: tuple[FilterLike, ...]) -> Filter:
    """What filters select; without any, the states that make up a trained model."""
    return as_filter(filters) if filters else Not(_WORKING)


class Match:
    """The arrays for the states of a node, as they are found one by one.

    Args:
      node: what holds the states.
      convention: that of names and layouts.
      filters: which states have to get a value.
      cast: whether dtypes are converted.

    Attributes:
      problems: what does not fit, but for what is missing or unexpected.
    """

    def __init__(self, node: Any, convention: str, filters: tuple[FilterLike, ...], cast: bool) -> None:
        self.problems: list[str] = []
        self._node = node
        self._convention = convention
        self._cast = cast
        self._slots = {slot.name: slot for slot in slots_of(node, convention)}
        self._names = {(slot.cell, slot.layer): slot.name for slot in reversed(self._slots.values())}
        selects = selection(filters)
        self._needed = {name for name, slot in self._slots.items() if selects(slot.path, slot.cell)}
        self._wanted = self._needed if filters else set(self._slots)
        self._owners = modules(node)
        self._first_paths = {module: path for path, module in self._owners.items()}
        self._collections: dict[str, str] = {}
        self._found: dict[str, tuple[str, Any]] = {}  # by the name of the slot: where the array is from, and the array
        self._met: set[str] = set()  # those that an array was meant for, whether it fits or not
        self._strange: list[tuple[str, str]] = []  # the name that an array had, and the one that it came to
        self._castable = False

    def without_collections(self, arrays: Mapping[str, Any], heads: Collection[str] = ()) -> dict[str, Any]:
        """Arrays without the names of collections in front, as Linen has them, if all have one and no state or rule begins so."""
        tops = {name.partition(".")[0] for name in arrays}
        ours = {name.partition(".")[0] for name in self._slots}
        if any(kind_of(top) is None for top in tops) or tops & {*ours, *heads}:
            return dict(arrays)
        bare: dict[str, Any] = {}
        for name, array in arrays.items():
            collection, _, rest = name.partition(".")
            if rest in bare:
                self.problems.append(f"twice:      {rest} is in `{self._collections[rest]}` and in `{collection}`")
            bare[rest] = array
            self._collections[rest] = collection
        return bare

    def add(self, name: str, arrays: list[tuple[str, Any]]) -> None:
        """Take the arrays that came to a name, each with the name that it had."""
        slot = self._slot(name)
        if slot is None:
            if layers := self._in_list(name):
                for source, array in arrays:
                    self._add_each(layers, source, array)
            elif not needless(self._owner(name), name.rpartition(".")[2], self._convention):
                self._strange.extend((source, name) for source, _ in arrays)
            return
        if slot.name not in self._wanted:
            return
        self._met.add(slot.name)
        for source, array in arrays:
            collection = self._collections.get(source)
            if collection is not None and collection != slot.cell.collection:
                kind = type(slot.cell).__name__
                self.problems.append(
                    f"{slot.label}: is a {kind} ({slot.cell.collection}), and `{source}` is in `{collection}`"
                )
                continue
            value = self._fitted(slot, source, array)
            if value is None:
                continue
            known = self._found.get(slot.name)
            if known is not None and not np.array_equal(numbers(known[1]), numbers(value)):
                self.problems.append(f"{slot.label}: `{known[0]}` and `{source}` both come to it, and differ")
            self._found[slot.name] = (source, value)

    def _slot(self, name: str) -> Slot | None:
        """What a name means: a state by its name, by another path to it, or by what Flax calls it."""
        for candidate in (name, f"{name}.value"):
            if candidate in self._slots:
                return self._slots[candidate]
        return self._slots.get(self._by_first_path(name)) or self._stream(name)

    def _by_first_path(self, name: str) -> str:
        """A name through a module, or to a state, that is shared, by its first path."""
        parts, at, best = name.split("."), self._node, name
        layer: list[int] = []
        for taken, part in enumerate(parts):
            if part.isdigit() and isinstance(at, Module):
                layer.append(int(part))
            at = _step(at, part if taken + 1 < len(parts) else own_name(at, part, self._convention))
            if isinstance(at, Module) and at in self._first_paths:
                path = self._first_paths[at]
                stacks = stacks_on(path, self._owners)
                if len(stacks) == len(layer):
                    best = ".".join(map(str, (*in_list(path, stacks, layer), *parts[taken + 1 :])))
            elif isinstance(at, Variable):
                return self._names.get((at, tuple(layer)), best)
        return best

    def _stream(self, name: str) -> Slot | None:
        """The random stream of a layer, whatever the layer calls it, if it has one: Flax calls it `rngs`."""
        prefix, _, leaf = name.rpartition(".")
        inside = prefix.rpartition(".")[0]
        streams = [
            slot
            for slot in self._slots.values()
            if isinstance(slot.cell, RngState) and ".".join(map(str, slot.place[:-1])) == inside
        ]
        fitting = [slot for slot in streams if slot.name.rpartition(".")[2] == leaf]
        return fitting[0] if len(fitting) == 1 and prefix.rpartition(".")[2] == "rngs" else None

    def _in_list(self, name: str) -> list[str]:
        """The names in a list of layers for that of their stacked arrays; none if it is not that."""
        at, parts = self._node, name.split(".")
        for taken, part in enumerate(parts):
            layers = isinstance(at, list | tuple) or (isinstance(at, Module) and stacked_part(type(at)) == part)
            if layers and part in STACKED_PARTS:
                return [".".join([*parts[:taken], str(n), *parts[taken + 1 :]]) for n in range(len(at))]
            at = _step(at, part)
        return []

    def _add_each(self, names: list[str], source: str, array: Any) -> None:
        """Take the stacked arrays of layers, of which each has its name."""
        fits = array.shape[:1] == (len(names),)
        if not fits:
            self.problems.append(f"{source}: expected those of {len(names)} layers, got {show_type(array)}")
        for n, name in enumerate(names):
            if fits:
                self.add(name, [(source, array[n])])
            elif (slot := self._slot(name)) is not None:
                self._met.add(slot.name)

    def _owner(self, name: str) -> Any:
        """The module that a name goes through last."""
        at = self._node
        for part in name.split(".")[:-1]:
            at = _step(at, part)
        return at

    def _fitted(self, slot: Slot, source: str, array: Any) -> Any:
        """An array as its state holds it; None, and a problem, if it does not fit."""
        stored = array if isinstance(array, jax.Array) and is_key(array) else np.asarray(array)
        new = stored if is_key(stored) else slot.read(stored)
        if slot.now is None:
            return jnp.array(new)
        now = slot.type
        if is_key(now) and not is_key(new):
            new = self._key(slot.now, new)
        wide = new.dtype
        narrow = wide if is_key(new) else jax.dtypes.canonicalize_dtype(wide)
        if wide != narrow and wide.kind in "iu" and np.array_equal(new, new.astype(narrow)):
            new = new.astype(narrow)
        if tuple(new.shape) == tuple(now.shape) and new.dtype == now.dtype:
            return new
        shapes, keys = tuple(new.shape) == tuple(now.shape), is_key(new) or is_key(now)
        if shapes and not keys and self._cast:
            if (cast := _cast(np.asarray(new), now.dtype)) is not None:
                return cast
            self.problems.append(
                f"{slot.label}: `cast=True` would change the numbers of {show_type(new)} from `{source}`"
            )
            return None
        self._castable |= shapes and not keys
        came = f"`{source}`" + ("" if stored.shape == new.shape else f" {show_type(stored)}")
        self.problems.append(f"{slot.label}: expected {show_type(now)}, got {show_type(new)} from {came}")
        return None

    def _key(self, now: Any, data: Any) -> Any:
        """Random keys like those of now, from the numbers that they are made of."""
        impl = jax.random.key_impl(now) if isinstance(now, jax.Array) else None
        try:
            return jax.random.wrap_key_data(jnp.asarray(data), impl=impl)
        except (TypeError, ValueError):
            return data

    def missing(self) -> list[str]:
        """What is said of each state that has to get a value, and gets none."""
        lacking = [slot for name, slot in self._slots.items() if name in self._needed and name not in self._met]
        lines, names = [], [source for source, _ in self._strange]
        for n, slot in enumerate(lacking):
            called = f", as `{slot.name}`" if slot.name != slot.label else ""
            lines.append(f"missing:    {slot.label}{called}{_nearest(slot.name, names) if n < _SHOWN else ''}")
        partly = {slot.cell for name, slot in self._slots.items() if name in self._met} - {
            slot.cell for slot in lacking
        }
        lines += [
            f"missing:    {slot.label}, as `{slot.name}`"
            for name, slot in self._slots.items()
            if name not in self._met and slot.cell in partly and name in self._wanted
        ]
        return lines

    def unexpected(self) -> list[str]:
        """What is said of each array that no state is for."""
        names = sorted(name for name in self._wanted if name not in self._met) or sorted(self._slots)
        return [
            f"unexpected: {source}{f', as `{name}`' * (name != source)}{_nearest(name, names) if n < _SHOWN else ''}"
            for n, (source, name) in enumerate(self._strange)
        ]

    def cure(self) -> str:
        """What to do about all of it."""
        if self._castable and not self._strange and self._needed <= self._met:
            return "`cast=True` converts dtypes; another shape needs another model."
        of_torch = {"weight", "running_mean", "running_var", "in_proj_weight"}
        if self._convention == "flax" and of_torch & {name.rpartition(".")[2] for _, name in self._strange}:
            return "These are names of PyTorch: `convention='torch'` translates them and the layouts; `rules=` other names."
        return "Say how the names differ: `rules={'encoder.layer.{i}': 'blocks.{i}', 'pooler': None}`. A filter loads a part."

    def values(self) -> dict[Variable, Any]:
        """The new value of each state that gets one."""
        by_cell: dict[Variable, list[Slot]] = {}
        for slot in self._slots.values():
            by_cell.setdefault(slot.cell, []).append(slot)
        return {
            cell: _assembled(slots, [self._found[slot.name][1] for slot in slots])
            for cell, slots in by_cell.items()
            if slots[0].name in self._found
        }


_SHOWN = 10  # of each sort; so many of all are printed


def _nearest(name: str, names: Iterable[str]) -> str:
    """The name that is most like another one: first of those that end alike."""
    every = list(names)
    alike = [other for other in every if other.rpartition(".")[2] == name.rpartition(".")[2]]
    near = difflib.get_close_matches(name, alike, 1, 0.0) or difflib.get_close_matches(name, every, 1, 0.5)
    return f" (nearest: {near[0]})" if near else ""


def _cast(array: np.ndarray[Any, Any], dtype: Any) -> Any:
    """An array in another dtype; None if it would be another number: by rounding to integers, without its imaginary part."""
    whole = jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, np.bool_)
    part = array.real if jnp.issubdtype(array.dtype, jnp.complexfloating) else array
    narrow = not jnp.issubdtype(dtype, jnp.complexfloating) and (whole or part is not array)
    with np.errstate(invalid="ignore"):
        cast = (part if narrow else array).astype(dtype)
    lost = narrow and not (np.array_equal(part, array) and (not whole or np.array_equal(cast, part)))
    return None if lost else cast


def _step(at: Any, part: str) -> Any:
    """What a node has under one part of a name."""
    if isinstance(at, list | tuple):
        return at[int(part)] if part.isdigit() and int(part) < len(at) else None
    if isinstance(at, dict):
        return next((value for key, value in at.items() if str(key) == part), None)
    if not isinstance(at, Module):
        return None
    layers = stacked_part(type(at)) if part.isdigit() else None
    held = at.__dict__.get(layers or part)
    return held if isinstance(held, Module | Variable | list | tuple | dict) else None


def _assembled(slots: list[Slot], arrays: list[Any]) -> Any:
    """The value of a state around new arrays, each where the one before it is; those of layers are stacked."""
    by_leaf: dict[int, list[Any]] = {}
    for slot, array in zip(slots, arrays, strict=True):
        by_leaf.setdefault(slot.leaf, []).append(array)
    sizes = slots[0].sizes
    whole = [_stacked(each, sizes) if sizes else each[0] for each in by_leaf.values()]
    if slots[0].now is None:
        return whole[0]
    now = {slot.leaf: slot.now for slot in slots}
    return jax.tree.unflatten(
        slots[0].tree, [_placed(now[leaf], array) for leaf, array in zip(by_leaf, whole, strict=True)]
    )


def _stacked(arrays: list[Any], sizes: tuple[int, ...]) -> Any:
    stack = jnp.stack if any(isinstance(array, jax.Array) for array in arrays) else np.stack
    together: Any = stack(arrays)
    return together.reshape(*sizes, *together.shape[1:])


def _placed(now: Any, array: Any) -> jax.Array:
    value = jnp.array(array)  # a copy: nobody else holds what a state holds
    committed = isinstance(now, jax.Array) and not isinstance(now, jax.core.Tracer) and now.committed
    return jax.device_put(value, now.sharding) if committed else value
