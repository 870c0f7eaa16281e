"""Random streams: `Rngs` holds one `RngState` per named stream, and nothing is global.

A stream is a key and a count. A draw gives ``fold_in(key, count)`` and advances the count, so drawing is an ordinary
write to an ordinary state: transforms thread it, checkpoints save it, and no key is ever used twice.
"""

from __future__ import annotations

import zlib
from typing import Any

import jax
import numpy as np

from mutatis.core import access, naming
from mutatis.core.showing import show_class, show_value
from mutatis.errors import ArgumentError, RandomStreamError
from mutatis.model.filters import FilterLike, Path
from mutatis.model.kinds import RngState, stream_value
from mutatis.model.modules import Module
from mutatis.model.walks import variables


class Rngs(Module):
    """Named random streams: a source of fresh random keys.

    A stream is a state: a key and a count. ``rngs.dropout()`` draws a new key from the stream `dropout` and counts it, so no key
    comes twice, in compiled code either. ``rngs()`` draws from the default stream, and so does every name without a stream of its
    own. Layers take an Rngs where they are made: they draw their parameters from `params`, and dropout takes a stream from
    `dropout`.

    A name may also be that of a method, such as `fork`: the attribute is then the stream.

    Args:
      default: the seed of the default stream: an int, or a key of `jax.random`.
      **streams: a seed or key for each named stream.

    Attributes:
      streams: a dictionary from names to states of kind `RngState`.

    Raises:
      RandomStreamError: a seed is neither an integer nor a random key, or a name is one that Python itself uses.

    Example:
      >>> import jax, mutatis as mu
      >>> rngs = mu.Rngs(0, dropout=1)
      >>> layer = mu.nn.Linear(2, 3, rngs=rngs)  # draws from the default stream, for want of one named `params`
      >>> key = rngs.dropout()
      >>> jax.random.bernoulli(key, 0.5, (4,)).shape
      (4,)
      >>> rngs.streams["dropout"].value["count"]
      Array(1, dtype=uint32)
    """

    streams: dict[str, RngState]

    def __init__(self, default: Any = None, /, **streams: Any) -> None:
        if default is not None:
            streams["default"] = default
        for name in streams:
            if name.startswith("__") and name.endswith("__"):
                raise RandomStreamError(
                    f"a random stream cannot be named `{name}`: Python gives such names a meaning",
                    path=name,
                    expected="a name without two underscores on both sides",
                    got=name,
                    cure=f"`mu.Rngs({name.strip('_')}=0)`",
                )
        self.streams = {name: RngState(stream_value(as_key(seed, name)), tag=name) for name, seed in streams.items()}

    def __call__(self) -> jax.Array:
        """Draw a fresh key from the default stream."""
        return stream_of(self, "default").draw()

    def __getattribute__(self, name: str) -> Any:
        attributes = object.__getattribute__(self, "__dict__")
        if name in attributes.get("streams", ()) and not name.startswith("__"):
            return _Stream(attributes["streams"][name])
        return object.__getattribute__(self, name)

    def __getattr__(self, name: str) -> Any:
        # Only reached for names that are neither attributes nor streams: the default stream.
        if name.startswith("__") or "streams" not in self.__dict__:
            raise AttributeError(f"Rngs has no attribute {name!r}")
        return _Stream(stream_of(self, name))

    def __contains__(self, name: str) -> bool:
        return name in streams_of(self)

    def stream(self, name: str) -> RngState:
        """The state of the stream of this name, or of the default stream if there is none of that name.

        Raises:
          RandomStreamError: there is no default stream either.
        """
        return stream_of(self, name)

    def fork(self) -> Rngs:
        """Make independent streams of the same names. Each starts from a key that is drawn from its original."""
        return Rngs(**{name: state.draw() for name, state in streams_of(self).items()})

    def split(self, n: int) -> Rngs:
        """Make independent streams of the same names for `n` members of an ensemble, stacked along axis 0."""
        forked = Rngs()
        forked.streams = {
            name: RngState(stream_value(jax.random.split(state.draw(), n)), tag=name)
            for name, state in streams_of(self).items()
        }
        return forked


def streams_of(rngs: Rngs) -> dict[str, RngState]:
    """The states of the streams by name, whatever their names hide."""
    streams: dict[str, RngState] = rngs.__dict__["streams"]
    return streams


def stream_of(rngs: Any, name: str, layer: str | None = None) -> RngState:
    """The state of a stream, or of the default stream if there is none of that name.

    Args:
      rngs: random streams.
      name: the name of the stream.
      layer: the layer that they were given to, for messages.

    Raises:
      RandomStreamError: there is no default stream either, or `rngs` are no random streams.
    """
    if not isinstance(rngs, Rngs):
        owner = "" if layer is None else f"{layer} cannot draw from stream `{name}`: "
        raise RandomStreamError(
            f"{owner}`rngs` holds no random streams",
            path=name,
            where=naming.where(),
            expected="mutatis.Rngs",
            got=show_given(rngs),
            cure=f"`{'' if layer is None else layer.strip('`') + '(..., '}rngs=mu.Rngs(0){'' if layer is None else ')'}`",
        )
    streams = streams_of(rngs)
    found = streams.get(name, streams.get("default"))
    if found is None:
        raise RandomStreamError(
            f"there is no random stream `{name}`, and no default stream",
            path=name,
            got=f"streams {sorted(streams)}",
            where=naming.where(),
            cure=f"Name it, `mu.Rngs({name}=0)`, or give a default, `mu.Rngs(0)`.",
        )
    return found


def show_given(rngs: Any) -> str:
    """What was given as streams, for messages: other libraries, too, have a class `Rngs`."""
    kind = type(rngs)
    return f"{kind.__module__}.{kind.__qualname__}" if kind.__name__ == Rngs.__name__ else show_class(rngs)


class _Stream:
    """What `rngs.params` is: a stream that is called for a key, with the state's attributes."""

    __slots__ = ("state",)

    def __init__(self, state: RngState) -> None:
        self.state = state

    def __call__(self) -> jax.Array:
        return self.state.draw()

    def __getattr__(self, name: str) -> Any:
        if name in ("dtype", "ndim", "shape"):  # by which `jax.random` looks whether something is a key
            stream = self.state.metadata.get("tag", "default")
            raise RandomStreamError(
                f"random stream `{stream}` was used as a key",
                path=naming.path_of(self.state) or stream,
                where=naming.where(),
                expected="a key, drawn from it",
                got="the stream itself",
                cure=f"Call it: `jax.random.normal(rngs.{stream}(), (3,))`.",
            )
        return getattr(self.state, name)

    def __repr__(self) -> str:
        return repr(self.state)


def is_stream(given: Any) -> bool:
    """Whether something is one random stream, a state or what `rngs.params` is, and not several by name."""
    return isinstance(given, RngState | _Stream)


def as_key(seed: Any, name: str = "default") -> jax.Array:
    """A random key from a seed or a (typed or untyped) key.

    Raises:
      RandomStreamError: it is neither.
    """
    if isinstance(seed, jax.Array):
        if jax.dtypes.issubdtype(seed.dtype, jax.dtypes.prng_key):
            return seed
        if seed.dtype == np.uint32 and seed.ndim >= 1:
            return jax.random.wrap_key_data(seed)
        if jax.dtypes.issubdtype(seed.dtype, np.integer) and seed.ndim == 0:
            return jax.random.key(seed)
    elif isinstance(seed, int | np.integer) and not isinstance(seed, bool):
        return jax.random.key(int(seed))
    raise RandomStreamError(
        f"random stream `{name}` cannot start from {show_value(seed)}",
        path=name,
        expected="an integer seed, `jax.random.key(0)` or `jax.random.PRNGKey(0)`",
        got=show_class(seed),
        cure=_streams_of(seed, name),
    )


def _streams_of(seed: Any, name: str) -> str:
    """How to make streams of what was given as a seed."""
    if isinstance(seed, dict):
        return f"Name the streams: `mu.Rngs({', '.join(f'{key}=0' for key in seed)})`."
    if isinstance(seed, str):
        name = seed if name == "default" and seed.isidentifier() else name
        return f"Name the stream, and give it a seed: `mu.Rngs({name}=0)`."
    if isinstance(seed, Rngs):
        return "Streams of their own, from a draw of each: `rngs.fork()`."
    return f"`mu.Rngs({name}=0)`"


def reseed(node: Any, /, *filters: FilterLike, **seeds: Any) -> None:
    """Start the random streams of a model anew, from seeds.

    Each state of kind `RngState` gets a key of its own, made of the seed and its path: two dropout layers with streams of their
    own do not draw the same numbers. The counts start at zero. Stacked streams stay stacked.

    Args:
      node: a Module, a Variable, or a list, tuple or dict of them.
      *filters: which streams. Without filters, all streams.
      **seeds: an int or a key of `jax.random` for each name of a stream. `default` is for all streams that are not named.

    Raises:
      RandomStreamError: the model has no stream of a given name.
      ArgumentError: a seed is given without a name.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> model = mu.nn.Dropout(0.5, rngs=mu.Rngs(0))
      >>> x = jnp.ones(100)
      >>> mu.reseed(model, default=7)
      >>> first = model(x)
      >>> mu.reseed(model, default=7)
      >>> bool((model(x) == first).all())
      True
    """
    if filters and isinstance(filters[0], int | jax.Array | np.ndarray) and not isinstance(filters[0], bool):
        raise ArgumentError(
            "a seed is given by the name of its stream",
            where="reseed",
            expected="`default=` for all streams, or the name of one",
            got=show_value(filters[0]),
            cure=f"`mu.reseed(model, default={show_value(filters[0]) if isinstance(filters[0], int) else 'key'})`",
        )
    keys = {name: as_key(seed, name) for name, seed in seeds.items()}
    new: dict[RngState, Any] = {}
    used: set[str] = set()
    for path, cell in variables(node, *filters).items():
        if not isinstance(cell, RngState):
            continue
        name = cell.metadata.get("tag", "default")
        name = name if name in keys else "default"
        if name in keys:
            used.add(name)
            new[cell] = restarted(path, keys[name], access.load(cell))
    if unknown := set(keys) - used:
        raise RandomStreamError(
            f"the model has no random stream `{sorted(unknown)[0]}`",
            path=sorted(unknown)[0],
            cure="`mu.variables(model, mu.RngState)` lists the streams.",
        )
    for cell, value in new.items():
        cell.set(value)


def restarted(path: Path, key: jax.Array, old: Any) -> Any:
    """The start of the stream at a path of a model, whose own key is made of a key for many; stacked streams stay stacked."""
    key = jax.random.fold_in(key, np.uint32(zlib.crc32(repr(path).encode())))
    shape = jax.tree.leaves(old)[0].shape if jax.tree.leaves(old) else ()
    return stream_value(jax.random.split(key, shape) if shape else key)
