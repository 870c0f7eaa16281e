"""Watching states: checks after each commit, and the versions that states had before."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from mutatis.core import access
from mutatis.core.avals import show_range
from mutatis.core.calls import is_count
from mutatis.core.cells import UNSET
from mutatis.core.naming import show_path
from mutatis.core.nodes import identity
from mutatis.core.showing import show_value
from mutatis.errors import ArgumentError, CheckError, FilterError
from mutatis.model.filters import FilterLike, Path
from mutatis.model.observers import Observation
from mutatis.model.state import State
from mutatis.model.walks import variables

Action: TypeAlias = Literal["raise", "warn", "record"]
_ACTIONS = ("raise", "warn", "record")


def finite(x: Any) -> Any:
    """Say which numbers are finite, that is, neither NaN nor infinite."""
    return jnp.isfinite(x) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.bool_(True)


@dataclasses.dataclass(frozen=True)
class Broken:
    """A state for which the predicate of a watch did not hold.

    Attributes:
      path: the path of the state.
      commit: the number of the commit to watched states, from 1.
      value: the value that the state had then.
    """

    path: str
    commit: int
    value: Any = dataclasses.field(repr=False)


class StateWatchWarning(UserWarning):
    """The predicate of a watch with ``action="warn"`` did not hold for a state."""


class Watch(Observation):
    """The result of `mu.inspect.watch`: `stop` ends the watch; as a context manager, so does the end of the block.

    Attributes:
      broken: the states for which the predicate did not hold so far, a list of `Broken`, if `action` is not ``"raise"``.
      commits: the number of commits that have written watched states.
    """

    __slots__ = ("_action", "_check", "_paths", "broken", "commits")

    def __init__(self, cells: dict[Path, Any], predicate: Callable[[Any], Any], action: Action) -> None:
        self._paths = {identity(cell): show_path(path) for path, cell in cells.items()}
        self._action = action
        self._check = jax.jit(lambda values: [_holds(predicate, value) for value in values])
        self.broken: list[Broken] = []
        self.commits = 0
        super().__init__(cells.values(), self._look)

    def _look(self, cells: list[Any]) -> None:
        self.commits += 1
        cells = [cell for cell in cells if not access.is_deferred(cell)]
        with access.lent(cells) as values:  # let go of before the next step: it copies nothing
            verdicts = jax.device_get(self._check(list(values)))
        broken = [cell for cell, holds in zip(cells, verdicts, strict=True) if not holds]
        if not broken:
            return
        found = [Broken(self._paths[identity(cell)], self.commits, access.read(cell)) for cell in broken]
        paths = [one.path for one in found]
        error = CheckError(
            f"state `{paths[0]}` breaks what is asked of it, after commit {self.commits}",
            path=paths[0],
            got=", ".join(map(show_range, jax.tree.leaves(found[0].value))),
            differences=[f"so does: {path}" for path in paths[1:]],
            cure="The step has been committed. `mu.inspect.history(model)` keeps versions to go back to, and "
            "`mu.inspect.find_nonfinite(step)(*args)` names the operation that makes a NaN; `mu.error_if` checks before.",
        )
        if self._action == "raise":
            raise error
        self.broken += found
        if self._action == "warn":
            warnings.warn(str(error), StateWatchWarning, stacklevel=3)


def _holds(predicate: Callable[[Any], Any], value: Any) -> jax.Array:
    parts = [jnp.all(predicate(leaf)) for leaf in jax.tree.leaves(value)]
    return jnp.all(jnp.stack(parts)) if parts else jnp.bool_(True)


def watch(
    node: Any,
    filter: FilterLike = ...,  # as in `mu.state`
    predicate: Callable[[Any], Any] = finite,
    *,
    action: Action = "raise",
) -> Watch:
    """Check states each time they have got new values, by an assignment or by a compiled step.

    After each commit that has written some of the states, a small compiled program checks their new values, and the watch waits
    for its answer. So each step costs the launch of a program, and is not dispatched asynchronously. Nothing is copied, and the
    write stays. Use `mu.error_if` to check inside a step and to take it back.

    Args:
      node: a Module, a Variable, or a list, tuple or dict of them.
      filter: which states. States that are made later are not watched.
      predicate: a function from an array to booleans, which all have to be True. The default checks that all numbers are finite.
      action: what happens if the predicate does not hold: ``"raise"`` an error, ``"warn"``, or only ``"record"`` it in
        `Watch.broken`.

    Returns:
      A `Watch`: its method `stop` ends the checks, and as a context manager it ends them with the block.

    Raises:
      CheckError: with ``action="raise"``, the predicate does not hold. The call that has written the state raises it.
      FilterError: the filter selects no states.
      ArgumentError: `predicate` is not a function, or `action` is none of the three.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> w = mu.Param(jnp.ones(2))
      >>> @mu.jit
      ... def step(factor):
      ...     w.value *= factor
      >>> with mu.inspect.watch(w, mu.Param, lambda x: jnp.abs(x) < 10, action="record") as watch:
      ...     step(3.0)
      ...     step(5.0)
      >>> watch.broken
      [Broken(path='', commit=2)]
    """
    given: tuple[Any, Any] = (predicate, action)
    for wrong, name, value, expected in (
        (not callable(given[0]), "predicate", given[0], "a function of an array that gives booleans"),
        (given[1] not in _ACTIONS, "action", given[1], ", ".join(map(repr, _ACTIONS))),
    ):
        if wrong:
            raise ArgumentError(
                f"a watch cannot have `{name}={show_value(value)}`",
                path=name,
                expected=expected,
                got=show_value(value),
                cure="`mu.inspect.watch(model, mu.Param, lambda x: jnp.abs(x) < 100, action='warn')`",
            )
    return Watch(_chosen(node, filter), predicate, action)


def _chosen(node: Any, *filters: FilterLike) -> dict[Path, Any]:
    """The states to watch.

    Raises:
      FilterError: there are none.
    """
    cells = variables(node, *filters)
    if not cells:
        every = variables(node)
        kinds = ", ".join(dict.fromkeys(type(cell).__name__ for cell in every.values()))
        raise FilterError(
            "there is no state to watch",
            expected="a filter that selects states" if every else "a model that has states",
            got=f"{', '.join(map(show_value, filters))}, in a model of {kinds}" if every else show_value(node),
            cure="`mu.variables(model)` lists the states by path. A string is a tag; "
            "`mu.PathContains('layers')` selects by path.",
        )
    return cells


class History(Observation, Sequence[State]):
    """The result of `mu.inspect.history`: a sequence of versions of states, the oldest first. ``history[-1]`` is the present one.

    Each version is a `State`. The method `stop` ends the recording; as a context manager, so does the end of the block.

    Attributes:
      commits: the number of commits that have written these states.
    """

    __slots__ = ("_cells_by_path", "_paused", "_versions", "commits")

    def __init__(self, cells: dict[Path, Any], length: int) -> None:
        self._cells_by_path = cells
        self._paused = False
        self._versions: deque[dict[Path, Any]] = deque(maxlen=length + 1)
        self.commits = 0
        self._versions.append(dict(zip(cells, access.read_many([*cells.values()]), strict=True)))
        super().__init__(cells.values(), self._keep)

    def _keep(self, cells: list[Any]) -> None:
        if self._paused:
            return
        self.commits += 1
        written = set(map(identity, cells))
        new = {path: access.read(cell) for path, cell in self._cells_by_path.items() if identity(cell) in written}
        self._versions.append(self._versions[-1] | new)

    def __len__(self) -> int:
        return len(self._versions)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        known = {path: value for path, value in self._versions[index].items() if value is not UNSET}
        return State(known, {path: type(self._cells_by_path[path]) for path in known})

    def rollback(self, commits: int = 1) -> State:
        """Give the states the values that they had some commits ago. Later versions are forgotten.

        Args:
          commits: how many commits to go back, an int.

        Returns:
          The version that the states have now, a `State`.

        Raises:
          ArgumentError: not so many versions are kept.
        """
        if not is_count(commits, 0) or commits >= len(self):
            raise ArgumentError(
                f"the states cannot go back by {show_value(commits)} commits",
                path="commits",
                expected=f"an int from 0 to {len(self) - 1}: so many are kept",
                got=show_value(commits),
                cure="`mu.inspect.history(model, n=20)` keeps more.",
            )
        version = self._versions[-1 - commits]
        restored = {path: value for path, value in version.items() if value is not UNSET}
        with self._pause():
            access.write_many([self._cells_by_path[path] for path in restored], [*restored.values()])
        for _ in range(commits):
            self._versions.pop()
        return self[-1]  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def _pause(self) -> Iterator[None]:
        self._paused = True
        try:
            yield
        finally:
            self._paused = False


def history(node: Any, *filters: FilterLike, n: int = 10) -> History:
    """Keep the last versions of the states of a model, to look at them and to go back to one.

    A version has the values of the states after one commit: an assignment, or a call of an outermost transform or transaction
    that has written some of them. Versions keep their arrays, so the next compiled step copies the states instead of donating
    their memory. The memory is that of `n` versions of the states that change.

    Args:
      node: a Module, a Variable, or a list, tuple or dict of them.
      *filters: which states; all, if none is given. States that are made later are not kept.
      n: how many versions to keep before the present one, an int.

    Returns:
      A `History`, a sequence of `State`s, the oldest first. ``rollback(commits)`` goes back; ``stop()`` ends the recording, and
      so does the end of a ``with`` block.

    Raises:
      ArgumentError: `n` is not an int from 1.
      FilterError: the filters select no states.

    Example:
      >>> import mutatis as mu
      >>> total = mu.Variable(1.0)
      >>> past = mu.inspect.history(total, n=3)
      >>> for _ in range(5):
      ...     total.value *= 2
      >>> [float(version[()]) for version in past]
      [4.0, 8.0, 16.0, 32.0]
      >>> float(past.rollback(2)[()]), float(total), len(past)
      (8.0, 8.0, 2)
    """
    if not is_count(n):
        raise ArgumentError(
            f"a history cannot keep {show_value(n)} versions",
            path="n",
            expected="an int, from 1",
            got=show_value(n),
            cure="`mu.inspect.history(model, mu.Param, n=10)`",
        )
    return History(_chosen(node, *filters), n)
