"""Weights: the arrays of a file, or of a model of another library, into the states of a model, and out again.

`load` goes in steps, of which the last alone changes the model: `read` gives arrays by name; `rules` give them other names,
and cut, join and turn them; a convention says which name and layout each state has; every state gets a value of its type.
What does not work out, in any step, is told in one message.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mutatis import _homes
from mutatis.core import access
from mutatis.core.showing import show_class, show_value
from mutatis.core.transactions import Transaction
from mutatis.errors import ArgumentError, CheckpointError
from mutatis.interop.conventions import check_convention, numbers, slots_of
from mutatis.interop.files import Weights, flat_arrays, read, write_safetensors
from mutatis.interop.matching import Match, selection
from mutatis.interop.rules import (
    Halves,
    Join,
    Layout,
    Reshape,
    RulesLike,
    Split,
    Sum,
    Transpose,
    as_rules,
    inverse,
    recurrent,
    translate,
)
from mutatis.model.filters import FilterLike
from mutatis.model.state import State
from mutatis.model.strangers import door

__all__ = [
    "Halves",
    "Join",
    "Layout",
    "Reshape",
    "Split",
    "Sum",
    "Transpose",
    "Weights",
    "export",
    "load",
    "read",
    "recurrent",
    "save",
]


def load(
    node: Any,
    source: Any,
    *filters: FilterLike,
    rules: RulesLike = (),
    convention: str = "flax",
    cast: bool = False,
) -> None:
    """Write weights from elsewhere into the states of a model. Everything is checked before the first state is written.

    Args:
      node: a Module, a Variable, or a list, tuple or dict of them.
      source: the weights: a file or directory that `read` reads; arrays by name or in nested dictionaries; a Flax NNX module or
        its state; the result of `init` of a Linen module; a PyTorch module or its state dict.
      *filters: which states. Each selected state has to get a value, and arrays for other states are ignored. Without filters it
        is all states, but those of random streams, caches, recurrent layers, optimizers, metrics and activations may be missing.
      rules: the differences of names and arrays, from theirs to ours: a dictionary or pairs.
        ``{"encoder.layer.{i}": "blocks.{i}"}`` renames every name that begins so, ``{"pooler": None}`` leaves arrays out, and
        ``{"qkv": (("q", "k", "v"), Split(axis=0))}`` changes arrays by a `Layout`: `Transpose`, `Reshape`, `Split`, `Join`, `Sum`
        or `Halves`. The first rule that matches a name counts. `recurrent` makes the rules for recurrent layers of PyTorch.
      convention: the names and layouts of layers after the rules: ``"flax"`` as in Mutatis, or ``"torch"`` as in `torch.nn`, also
        for GGUF: ``weight`` in place of ``kernel``, transposed, and so on.
      cast: whether to convert numbers of another dtype. Floats may lose digits; numbers that integers cannot hold, and complex
        ones for floats, are an error. 64-bit integers need no `cast` if JAX has none, but have to fit.

    Note:
      Two arrays may go to one state, as those of tied layers do, if they are equal. A frozen state is loaded, and stays frozen. A
      state without a value is created; a model of shapes (`mu.eval_shape`) gets its arrays.

    Raises:
      CheckpointError: the file cannot be read, or does not fit: arrays are missing, unexpected or of another type, or rules
        contradict each other. The message lists all of it, with the nearest names. The model does not change.
      ArgumentError: a rule or the convention is not valid.

    Example:
      >>> import numpy as np, mutatis as mu
      >>> theirs = {"fc1.weight": np.ones((3, 2), np.float32), "fc1.bias": np.zeros(3, np.float32)}
      >>> net = {"layers": [mu.nn.Linear(2, 3, rngs=mu.Rngs(0))]}
      >>> mu.interop.load(net, theirs, rules={"fc{n}": "layers.0"}, convention="torch")
      >>> net["layers"][0].kernel.value.shape, float(net["layers"][0].kernel.value.sum())
      ((2, 3), 6.0)
      >>> try:
      ...     mu.interop.load(net, theirs, convention="torch")
      ... except mu.errors.CheckpointError as error:
      ...     print(error)
      the weights do not fit the model; nothing was loaded
        missing:    layers[0].bias, as `layers.0.bias` (nearest: fc1.bias)
        missing:    layers[0].kernel, as `layers.0.weight` (nearest: fc1.weight)
        unexpected: fc1.weight (nearest: layers.0.weight)
        unexpected: fc1.bias (nearest: layers.0.bias)
      Say how the names differ: `rules={'encoder.layer.{i}': 'blocks.{i}', 'pooler': None}`. A filter loads a part.
    """
    check_convention(convention)
    weights = _weights_of(source)
    match = Match(node, convention, filters, cast)
    known = as_rules(rules)
    heads = {name.partition(".")[0] for rule in known for name in rule.theirs}
    translated = translate(known, match.without_collections(weights, heads))
    for name, arrays in translated.arrays.items():
        match.add(name, arrays)
    problems = [*match.missing(), *match.unexpected(), *translated.problems, *match.problems]
    if problems:
        source_name = weights.source if weights.source == Weights({}).source else f"the weights in `{weights.source}`"
        raise CheckpointError(
            f"{source_name} do not fit the model; nothing was loaded",
            differences=[*problems, *translated.unused],
            cure=match.cure(),
        )
    values = match.values()
    with Transaction("load") as tx:
        for cell, value in values.items():
            access.write(cell, value)  # below the cell's `set`, so that frozen ones are loaded too
        access.commit(tx)


def export(node: Any, *filters: FilterLike, rules: RulesLike = (), convention: str = "flax") -> Weights:
    """Return the arrays of a model under the names, and in the layouts, of another library; the inverse of `load`.

    Args:
      node: a Module, a Variable, or a list, tuple or dict of them.
      *filters: which states. Without filters it is all but random streams, caches, and the states of recurrent layers,
        optimizers, metrics and activations.
      rules: the same rules as in `load`, from theirs to ours; they are applied the other way round.
      convention: the names and layouts of layers: ``"flax"`` or ``"torch"``, as in `load`.

    Returns:
      A `Weights`: a dictionary from dotted names to NumPy arrays. A shared state occurs once. For a random key it has the numbers
      of the key.

    Raises:
      CheckpointError: rules contradict each other, two arrays would get one name, or a state has no value.

    Example:
      >>> import mutatis as mu
      >>> layer = mu.nn.Linear(2, 3, rngs=mu.Rngs(0))
      >>> {name: array.shape for name, array in mu.interop.export(layer, convention="torch").items()}
      {'bias': (3,), 'weight': (3, 2)}
    """
    check_convention(convention)
    selects = selection(filters)
    slots = [slot for slot in slots_of(node, convention) if selects(slot.path, slot.cell)]
    without = [f"has no value: {slot.label}" for slot in slots if not isinstance(slot.now, jax.Array)]
    whole = {} if without else {id(slot.now): np.asarray(numbers(slot.now)) for slot in slots}
    arrays = {} if without else {slot.name: slot.write(whole[id(slot.now)][slot.layer]) for slot in slots}
    translated = translate(inverse(as_rules(rules)), arrays)
    twice = [
        f"two arrays for `{name}`: {', '.join(source for source, _ in given)}"
        for name, given in translated.arrays.items()
        if len(given) > 1
    ]
    if problems := [*without, *translated.problems, *twice]:
        raise CheckpointError(
            "the states cannot be written under the names that the rules give",
            differences=problems,
            cure="Each state needs a value, and a name of its own.",
        )
    return Weights({name: np.asarray(given[0][1]) for name, given in translated.arrays.items()})


def save(
    path: str | os.PathLike[str],
    node: Any,
    *filters: FilterLike,
    rules: RulesLike = (),
    convention: str = "flax",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the weights of a model to a safetensors file, for other programs. The file is written completely or not at all.

    To go on with training, use `mu.checkpoint`: it also keeps kinds, random streams and optimizers.

    Args:
      path: the file; its name ends with ``.safetensors``.
      node: a Module, a Variable, or a list, tuple or dict of them; or a `Weights`.
      *filters, rules, convention: as in `export`: which states, and under which names and layouts.
      metadata: a dictionary of texts to keep with the arrays.

    Raises:
      ArgumentError: the name of the file has another ending, or a value is not a NumPy array.
      CheckpointError: rules contradict each other, or a state has no value.
      MissingPackageError: `safetensors` is not installed.

    Example:
      >>> import mutatis as mu
      >>> mu.interop.save("layer.safetensors", mu.nn.Linear(2, 3, rngs=mu.Rngs(0)), convention="torch")
      >>> [*mu.interop.read("layer.safetensors")]
      ['bias', 'weight']
    """
    plain = isinstance(node, Weights)
    arrays = node if plain else export(node, *filters, rules=rules, convention=convention)
    write_safetensors(path, arrays, metadata)


# -- what is given -----------------------------------------------------------------------------------------------------


def _weights_of(source: Any) -> Weights:
    if isinstance(source, Weights):
        return source
    if isinstance(source, str | os.PathLike):
        return read(source)
    way = door(source)
    if way is not None and "FromNnx" in way:
        from mutatis.interop.nnx import nnx

        source = nnx.state(source)
    elif isinstance(source, State):
        source = source.to_pure_dict()
    elif not isinstance(source, Mapping) and callable(getattr(source, "state_dict", None)):
        source = source.state_dict()
    if not isinstance(source, Mapping):
        raise ArgumentError(
            f"{show_value(source)} holds no weights",
            expected="a file, or arrays by name",
            got=show_class(source),
            cure="`mu.interop.load(model, 'model.safetensors')`; of a model of Mutatis, give `mu.state(model)`.",
        )
    return Weights({name: _array(name, leaf) for name, leaf in flat_arrays(source) if leaf is not None})


def _array(name: str, leaf: Any) -> Any:
    """A leaf as an array of NumPy or JAX."""
    if isinstance(leaf, jax.core.Tracer):
        raise ArgumentError(
            f"`{name}` is a value that a transform traces, and weights are looked at",
            path=name,
            expected="arrays of numbers",
            got=show_value(leaf),
            cure="A state takes what is traced: `mu.update(model, {'kernel': x})`.",
        )
    if isinstance(leaf, jax.Array | np.ndarray):
        return leaf
    if type(leaf).__module__.partition(".")[0] == "torch" and hasattr(leaf, "detach"):
        leaf = leaf.detach().cpu()
        if str(leaf.dtype) == "torch.bfloat16":  # which `numpy()` of torch does not know
            return leaf.view(sys.modules["torch"].int16).numpy().view(jnp.bfloat16)
        return leaf.numpy()
    if isinstance(leaf, bool | int | float | complex | np.generic):
        return np.asarray(leaf)
    raise ArgumentError(
        f"`{name}` is {show_value(leaf)}, and no array",
        path=name,
        expected="arrays by name",
        got=show_class(leaf),
        cure="Give the part that holds the arrays: `mu.interop.load(model, checkpoint['state_dict'])`.",
    )


_homes.publish("mutatis.interop", {name: globals()[name] for name in __all__})
