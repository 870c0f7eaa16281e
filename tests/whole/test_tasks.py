"""asyncio: a transaction belongs to a task (a context of `contextvars`) and to a thread."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import jax.numpy as jnp
import pytest

import mutatis as mu
from mutatis import errors
from mutatis.core import transactions


def run(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    async def limited() -> Any:
        return await asyncio.wait_for(main(), 60)

    return asyncio.run(limited())


class Cells:
    def __init__(self) -> None:
        self.a, self.b = mu.Variable(0), mu.Variable(0)

    def both(self) -> list[int]:
        return [int(self.a), int(self.b)]


@pytest.fixture
def cells() -> Cells:
    return Cells()


def test_tasks_do_not_see_each_other(cells: Cells) -> None:
    seen = []

    async def writes(end: bool) -> None:
        with mu.transaction():
            cells.a.value = 1
            await asyncio.sleep(0.02)
            seen.append(("inside", int(cells.a)))
            if not end:
                raise KeyError

    async def beside() -> None:
        await asyncio.sleep(0.01)
        seen.append(("beside", int(cells.a)))
        assert transactions.current() is None
        cells.b.value = int(cells.b) + 7

    async def main() -> None:
        await asyncio.gather(writes(False), beside(), return_exceptions=True)
        assert cells.both() == [0, 7]
        await asyncio.gather(writes(True), beside())

    run(main)
    assert seen == [("beside", 0), ("inside", 1), ("beside", 0), ("inside", 1)]
    assert cells.both() == [1, 14]


def test_many_tasks_commit_and_roll_back(cells: Cells) -> None:
    """Whatever the order in which they wait, each commits what it wrote or nothing."""
    states = [mu.Variable(0) for _ in range(30)]
    shared = mu.Variable(0)

    async def task(number: int) -> None:
        with mu.transaction():
            for step in range(5):
                states[number].value = states[number].value + 1
                shared.value = number
                await asyncio.sleep(0.001 * ((number * 7 + step * 3) % 5))
                assert int(shared) == number, "another task's value"
            if number % 3 == 0:
                raise KeyError

    async def main() -> None:
        results = await asyncio.gather(*map(task, range(30)), return_exceptions=True)
        assert [type(r) for r in results] == [KeyError if n % 3 == 0 else type(None) for n in range(30)]

    run(main)
    assert [int(s) for s in states] == [0 if n % 3 == 0 else 5 for n in range(30)]


def test_a_task_group_that_fails(cells: Cells) -> None:
    async def fails() -> None:
        with mu.transaction():
            cells.a.value = 1
            await asyncio.sleep(0.01)
            raise KeyError

    async def is_cancelled() -> None:
        with mu.transaction():
            cells.b.value = 1
            await asyncio.sleep(30)

    async def main() -> None:
        with pytest.raises(BaseExceptionGroup):
            async with asyncio.TaskGroup() as group:
                group.create_task(fails())
                group.create_task(is_cancelled())

    run(main)
    assert cells.both() == [0, 0]


def test_a_child_is_inside_while_the_transaction_is_open(cells: Cells) -> None:
    async def child() -> int:
        cells.b.value = int(cells.a) + 1
        return int(cells.a)

    async def main() -> None:
        with pytest.raises(KeyError), mu.transaction():
            cells.a.value = 5
            assert await asyncio.gather(child()) == [5]
            assert cells.both() == [5, 6]
            raise KeyError

    run(main)
    assert cells.both() == [0, 0]


@pytest.mark.parametrize("commits", [True, False])
def test_a_child_that_outlives_the_transaction_is_outside(cells: Cells, commits: bool) -> None:
    async def child() -> None:
        await asyncio.sleep(0.02)
        assert transactions.current() is None
        cells.b.value = int(cells.a) + 1

    async def main() -> None:
        try:
            with mu.transaction():
                cells.a.value = 5
                late = asyncio.create_task(child())
                await asyncio.sleep(0)
                if not commits:
                    raise KeyError
        except KeyError:
            pass
        await late

    run(main)
    assert cells.both() == ([5, 6] if commits else [0, 1])


@pytest.mark.parametrize("commits", [True, False])
def test_a_transaction_that_outlives_the_one_around_it_is_refused(cells: Cells, commits: bool) -> None:
    """Its values may rest on some that were rolled back."""

    async def child() -> None:
        with mu.transaction():
            cells.b.value = int(cells.a) + 1
            await asyncio.sleep(0.02)
            assert int(cells.b) == 6

    async def main() -> None:
        try:
            with mu.transaction():
                cells.a.value = 5
                late = asyncio.create_task(child())
                await asyncio.sleep(0)
                if not commits:
                    raise KeyError
        except KeyError:
            pass
        with pytest.raises(errors.TransactionError, match="a transaction ended before another one"):
            await late
        assert transactions.current() is None

    run(main)
    assert cells.both() == ([5, 0] if commits else [0, 0])


def test_a_thread_is_outside(cells: Cells) -> None:
    """`asyncio.to_thread` copies the context."""
    step = mu.jit(lambda: cells.b.set(cells.a.value + 1))

    def work() -> int:
        assert transactions.current() is None
        step()
        with mu.transaction():
            cells.b.value = cells.b.value + 1
        return int(cells.a)

    async def main() -> None:
        with mu.transaction():
            cells.a.value = 5
            assert await asyncio.to_thread(work) == 0
            assert cells.both() == [5, 2]

    run(main)
    assert cells.both() == [5, 2]


def test_a_copied_context_in_another_thread(cells: Cells) -> None:
    seen = []
    with mu.transaction():
        cells.a.value = 5
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(lambda: seen.append(int(cells.a)),))
        thread.start()
        thread.join()
        context.run(lambda: seen.append(int(cells.a)))
    context.run(lambda: seen.append((int(cells.a), transactions.current())))
    assert seen == [0, 5, (5, None)]


def test_jitted_steps_in_tasks(cells: Cells) -> None:
    """A step in one task is committed at once, another task's transaction is around its own only."""
    step = mu.jit(lambda: cells.a.set(cells.a.value + 1))

    async def inside() -> None:
        with mu.transaction() as tx:
            for _ in range(5):
                step()
                await asyncio.sleep(0.001)
            assert int(cells.a) == 5
            tx.rollback()

    async def outside() -> None:
        for _ in range(5):
            cells.b.value = int(cells.a)
            await asyncio.sleep(0.001)
            assert int(cells.b) == 0

    async def main() -> None:
        await asyncio.gather(inside(), outside())

    run(main)
    assert cells.both() == [0, 0]


def test_structure_is_undone_with_its_task() -> None:
    net = mu.Module()
    net.n = 0

    async def fails() -> None:
        with mu.transaction(net):
            net.extra = mu.Variable(1)
            await asyncio.sleep(0.01)
            raise KeyError

    async def beside() -> None:
        net.kept = 1

    async def main() -> None:
        await asyncio.gather(fails(), beside(), return_exceptions=True)

    run(main)
    assert net.kept == 1 and not hasattr(net, "extra")


# -- generators -------------------------------------------------------------------------------------------------------


def test_an_async_generator_that_is_closed_elsewhere(cells: Cells) -> None:
    """Enter and exit run in contexts of their own: refused, and nothing is left open."""

    async def steps() -> AsyncIterator[int]:
        with mu.transaction():
            cells.a.value = 1
            yield 1
            yield 2

    async def main() -> None:
        generator = steps()
        await asyncio.create_task(anext(generator))  # type: ignore[arg-type]
        assert transactions.current() is None and int(cells.a) == 0
        with pytest.raises((errors.StructureError, KeyError)):
            await asyncio.create_task(generator.athrow(KeyError))  # type: ignore[attr-defined]
        assert transactions.current() is None

    run(main)
    assert cells.both() == [0, 0]


def test_an_async_generator_in_one_task(cells: Cells) -> None:
    async def steps() -> AsyncIterator[int]:
        for number in range(3):
            with mu.transaction():
                cells.a.value = number
                await asyncio.sleep(0)
            yield int(cells.a)

    async def main() -> list[int]:
        return [n async for n in steps()]

    assert run(main) == [0, 1, 2]


def test_a_suspended_generator_shows_its_transaction(cells: Cells) -> None:
    """As today: a plain generator has no context of its own (the page on semantics says so)."""

    def steps() -> Iterator[int]:
        with mu.transaction():
            cells.a.value = 1
            yield 1

    generator = steps()
    next(generator)
    assert int(cells.a) == 1
    next(generator, None)
    assert transactions.current() is None and int(cells.a) == 1


def test_the_ledger_takes_no_notice_of_other_tasks() -> None:
    a, b = mu.Variable(0.0), mu.Variable(0.0)

    def f() -> None:
        a.value = a.value + jnp.float32(1)

    async def beside() -> None:
        with mu.transaction():
            b.value = 1.0

    async def main() -> Any:
        task = asyncio.create_task(beside())
        ledger = mu.inspect.ledger(f)()
        await task
        return ledger

    assert [entry.path for entry in run(main).entries] == ["a"]
