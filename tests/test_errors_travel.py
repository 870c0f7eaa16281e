"""Errors are pickled, copied, and come back from the workers of a process pool, with all their fields."""

from __future__ import annotations

import concurrent.futures
import copy
import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import mutatis as mu
from mutatis import errors

pytestmark = pytest.mark.once  # nothing here depends on the version of JAX

CLASSES = sorted(
    (
        cls
        for cls in vars(errors).values()
        if isinstance(cls, type) and issubclass(cls, errors.MutatisError) and cls.__module__ == errors.__name__
    ),
    key=lambda cls: cls.__name__,
)


class Budget(errors.StateTypeError):
    """A user's class: another constructor, and a field of its own."""

    def __init__(self, spent: float, *, owner: str) -> None:
        super().__init__(f"`{owner}` is over its budget", path=owner, expected=1.0, got=spent)
        self.spent = spent


class Stubborn:
    """Neither pickled nor copied, and without a text."""

    def __reduce__(self) -> str:
        raise RuntimeError("no")

    def __str__(self) -> str:
        raise RuntimeError("no")


class Handle(Stubborn):
    """Neither pickled nor copied, and shown as text."""

    def __str__(self) -> str:
        return "a handle"


class Unreadable:
    """Written, and not read again."""

    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("not a number",)

    def __str__(self) -> str:
        return "unreadable"


def filled(cls: type[errors.MutatisError]) -> errors.MutatisError:
    """An error with all its fields, of which some cannot be pickled."""
    error = cls(
        "problem",
        path="a.b",
        where="jit(f)",
        expected=(3, 4),
        got=Handle(),
        made_at="x.py:1 in f",
        differences=["one", "two"],
        cure="do this",
    )
    error.seen = {"of": 3}  # type: ignore[attr-defined]
    error.odd = Unreadable()  # type: ignore[attr-defined]
    error.add_note("a note")
    return error


FIELDS = ("problem", "path", "where", "expected", "made_at", "differences", "cure", "seen", "args", "__notes__")


def check_same(new: Any, old: Any) -> None:
    assert type(new) is type(old)
    assert str(new) == str(old)
    assert repr(new) == repr(old)
    for name in FIELDS:
        assert getattr(new, name) == getattr(old, name), name


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles(cls: type[errors.MutatisError], protocol: int) -> None:
    error = filled(cls)
    new = pickle.loads(pickle.dumps(error, protocol))
    check_same(new, error)
    assert new.got == "a handle"
    assert new.odd == "unreadable"
    check_same(pickle.loads(pickle.dumps(new, protocol)), error)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_copies(cls: type[errors.MutatisError]) -> None:
    error = filled(cls)
    shallow = copy.copy(error)
    check_same(shallow, error)
    assert shallow.got is error.got
    deep = copy.deepcopy(error)
    check_same(deep, error)
    assert deep.got == "a handle"
    assert deep.seen is not error.seen  # type: ignore[attr-defined]
    assert isinstance(new_cause(shallow), KeyError)


def new_cause(error: BaseException) -> BaseException | None:
    try:
        raise error from KeyError("cause")
    except errors.MutatisError as caught:
        return caught.__cause__


def test_an_error_in_two_places_is_copied_once() -> None:
    error = filled(errors.LaneError)
    error.itself = error  # type: ignore[attr-defined]
    one, two = copy.deepcopy([error, error])
    assert one is two is one.itself  # type: ignore[attr-defined]


def test_a_field_that_has_no_text_goes_as_its_class() -> None:
    error = errors.LaneError("problem")
    error.extra = Stubborn()  # type: ignore[attr-defined]
    assert pickle.loads(pickle.dumps(error)).extra == "a Stubborn"
    assert copy.deepcopy(error).extra == "a Stubborn"  # type: ignore[attr-defined]


@pytest.mark.parametrize("travel", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy, copy.deepcopy])
def test_a_users_class_keeps_its_fields(travel: Callable[[Any], Any]) -> None:
    error = Budget(2.5, owner="net.w")
    new = travel(error)
    assert type(new) is Budget
    assert (new.spent, new.path, str(new)) == (2.5, "net.w", str(error))


def test_a_class_that_cannot_be_found_goes_as_what_it_is_made_of() -> None:
    class Local(Budget):
        pass

    error = Local(2.5, owner="net.w")
    new = pickle.loads(pickle.dumps(error))
    assert type(new) is Budget
    assert (new.spent, str(new)) == (2.5, str(error))
    assert type(copy.copy(error)) is Local


def test_an_error_that_holds_a_tracer() -> None:
    def fails(x: Any) -> None:
        error = errors.LaneError("problem")
        error.value = x  # type: ignore[attr-defined]
        kept.append(pickle.dumps(error))
        kept.append(pickle.dumps(copy.copy(error)))

    kept: list[bytes] = []
    jax.make_jaxpr(fails)(1.0)
    assert [type(pickle.loads(text).value) for text in kept] == [str, str]


def read_raw(_: Any = None) -> None:
    """What JAX adds notes to: an error raised while it traces."""
    v = mu.Variable(1.0)
    jax.jit(lambda: v.value)()


def test_an_error_with_the_notes_of_jax() -> None:
    with pytest.raises(errors.TraceLevelError) as caught:
        read_raw()
    new = pickle.loads(pickle.dumps(caught.value))
    assert str(new) == str(caught.value)
    assert getattr(new, "__notes__", None) == getattr(caught.value, "__notes__", None)


# -- processes -------------------------------------------------------------------------------------------------------


def raise_filled(number: int) -> None:
    raise filled(CLASSES[number]) from KeyError("cause")


def raise_budget(spent: float) -> None:
    raise Budget(spent, owner="net.w")


def raise_local(_: Any) -> None:
    class Local(errors.AxisError):
        pass

    raise Local("problem")


def lanes(_: Any) -> None:
    v = mu.Variable(jnp.zeros(3))
    mu.vmap(v.set)(jnp.zeros((2, 3)))


@pytest.fixture(scope="module")
def pool() -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("number", range(len(CLASSES)), ids=lambda number: CLASSES[number].__name__)
def test_errors_come_back_from_a_process_pool(pool: concurrent.futures.ProcessPoolExecutor, number: int) -> None:
    with pytest.raises(CLASSES[number]) as caught:
        pool.submit(raise_filled, number).result()
    error, same = caught.value, filled(CLASSES[number])
    for name in FIELDS:
        assert getattr(error, name) == getattr(same, name) or name == "args", name
    assert str(error).startswith("problem inside `jit(f)`\n  expected: (3, 4)\n  got:      a handle")
    assert "KeyError: 'cause'" in str(error.__cause__)  # the traceback of the worker, as Python shows it


@pytest.mark.parametrize(
    ("fails", "kind", "text"),
    [
        (raise_budget, Budget, "`net.w` is over its budget"),
        (raise_local, errors.AxisError, "problem"),
        (read_raw, errors.TraceLevelError, "was read inside a raw JAX transform"),
        (lanes, errors.LaneError, "is shared by all lanes"),
    ],
)
def test_real_errors_come_back(
    pool: concurrent.futures.ProcessPoolExecutor, fails: Callable[[Any], Any], kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text) as caught:
        pool.submit(fails, 2.5).result()
    assert type(caught.value) is kind
    assert pool.submit(abs, -1).result() == 1, "the pool is not broken"


def test_errors_come_back_from_a_pool_of_multiprocessing() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool, pytest.raises(Budget, match="over its budget") as caught:
        pool.map(raise_budget, [2.5])
    assert caught.value.spent == 2.5
