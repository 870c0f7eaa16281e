"""`mu.transaction`: what is committed, what is rolled back, nesting, transforms inside, threads."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mutatis as mu
from mutatis import nn
from mutatis.core import transactions
from mutatis.transforms import transaction
from tests.nets import Mixed as Net

X = jnp.arange(3.0)


def everything(net: Net) -> Any:
    return (
        jax.tree.map(np.asarray, mu.state(net, mu.Not(mu.RngState)).flat()),
        mu.graphdef(net),
        int(net.rngs.default.value["count"]),
    )


def change(net: Net) -> None:
    """Everything that can be changed."""
    net.step()
    net.rngs()
    net.flag = False
    net.extra = mu.Variable(5)
    net.items.append(mu.Variable(9))
    net.table["b"] = mu.Variable(2)
    del net.table["a"]
    net.eval()
    mu.freeze(net, mu.Param)


def same(a: Any, b: Any) -> None:
    assert a[1:] == b[1:]
    assert a[0].keys() == b[0].keys()
    jax.tree.map(np.testing.assert_array_equal, a[0], b[0])


class StopError(Exception):
    pass


def by_exception(net: Net) -> None:
    with pytest.raises(StopError), mu.transaction(net):
        change(net)
        raise StopError


def by_rollback(net: Net) -> None:
    with mu.transaction(net) as tx:
        change(net)
        tx.rollback()


def by_outer(net: Net) -> None:
    with mu.transaction(net) as tx:
        with mu.transaction(net) as inner:
            change(net)
        assert net.w in inner.writes
        tx.rollback()


def by_inner(net: Net) -> None:
    with mu.transaction(net), mu.transaction(net) as tx:
        change(net)
        tx.rollback()


def inside_jit(net: Net) -> None:
    @mu.jit
    def f() -> None:
        with mu.transaction(net) as tx:
            change(net)
            tx.rollback()

    f()


WAYS = [by_exception, by_rollback, by_outer, by_inner, inside_jit]


@pytest.mark.parametrize("way", WAYS)
def test_all_is_rolled_back(way: Callable[[Net], None]) -> None:
    net = Net()
    before = everything(net)
    way(net)
    same(everything(net), before)
    net.step()
    np.testing.assert_array_equal(net.w, [0, 2, 4])


@pytest.mark.parametrize("nested", [False, True])
def test_all_is_committed(nested: bool) -> None:
    net, twin = Net(), Net()
    change(twin)
    if nested:
        with mu.transaction(net), mu.transaction(net):
            change(net)
    else:
        with mu.transaction(net):
            change(net)
    same(everything(net), everything(twin))
    assert net.extra == 5 and net.items[1] == 9


def test_reads_and_writes() -> None:
    a, b, c, d = (mu.Variable(i) for i in range(4))
    both = mu.jit(lambda: d.set(c.value + 1))
    with mu.transaction() as tx:
        assert (tx.reads, tx.writes) == ((), ())
        b.value = a + 1
        assert (tx.reads, tx.writes) == ((a,), (b,))
        both()
        assert (tx.reads, tx.writes) == ((a, c), (b, d))
        mu.scan(lambda carry, _: (carry, a.set(a + b)), None, length=2)
    assert (set(tx.reads), set(tx.writes)) == ({a, b, c}, {a, b, d})
    assert [int(v) for v in (a, b, c, d)] == [2, 1, 2, 3]


def test_a_rollback_of_some_states() -> None:
    net = Net()
    with mu.transaction(net) as tx:
        proposal = []
        for _ in range(2):
            proposal.append(jax.random.normal(net.rngs()))
            net.w.value = net.w + proposal[-1]
            tx.rollback(mu.Not(mu.RngState))
            assert net.w not in tx.writes
    assert proposal[0] != proposal[1], "random streams go on"
    np.testing.assert_array_equal(net.w, np.arange(3))
    with mu.transaction(net) as tx:
        net.step()
        tx.rollback(lambda path, _: path == ("items", 0))
    assert int(net.items[0]) == 0
    np.testing.assert_array_equal(net.w, [0, 2, 4])


def test_what_is_made_inside_outlives_a_rollback() -> None:
    with mu.transaction() as tx:
        made = mu.Variable(1)
        made.value = 2
        tx.rollback()
        assert made == 2
    assert made == 2


TRANSFORMS: dict[str, Callable[[Net], Any]] = {
    "jit": lambda net: mu.jit(Net.step)(net),
    "jit again": lambda net: [step(net) for step in [mu.jit(Net.step)] for _ in range(3)],
    "scan": lambda net: mu.scan(lambda c, _: (c, net.step()), None, length=3),
    "cond": lambda net: mu.cond(True, net.step, lambda: None),
    "vmap": lambda net: mu.vmap(lambda x: net.w.set(net.w * 2), axis_size=2, in_axes=None)(0),
    "grad": lambda net: mu.grad(lambda: (net.step(), jnp.sum(net.w.value))[1], of=net.w)(),
    "remat": lambda net: mu.remat(net.step)(),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("commit", [False, True])
def test_transforms_inside(name: str, commit: bool) -> None:
    net, twin = Net(), Net()
    before = everything(net)
    TRANSFORMS[name](twin)
    with mu.transaction(net) as tx:
        TRANSFORMS[name](net)
        same(everything(net), everything(twin))
        if not commit:
            tx.rollback()
    same(everything(net), everything(twin) if commit else before)


def test_a_compiled_step_inside_and_outside_is_one_program(traces: Any) -> None:
    net = Net()
    counted = traces.count(net.step)
    step = mu.jit(counted)
    step()
    with mu.transaction() as tx:
        step()
        tx.rollback()
    with mu.transaction():
        step()
    step()
    assert traces[counted] == 1
    np.testing.assert_array_equal(net.w, np.arange(3) * 8)


def test_donation_leaves_what_a_transaction_may_need() -> None:
    net = Net()
    step = mu.jit(net.step)
    step()
    with pytest.raises(StopError), mu.transaction():
        for _ in range(3):
            step()
        raise StopError
    np.testing.assert_array_equal(net.w, [0, 2, 4])
    step()
    np.testing.assert_array_equal(net.w, [0, 4, 8])


def test_an_undone_step_of_an_optimizer() -> None:
    net = nn.Linear(2, 1, rngs=mu.Rngs(0))
    opt = mu.Optimizer(net, optax.adam(0.1))

    @mu.jit
    def step(x: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):  # optax needs it
            loss, grads = mu.value_and_grad(lambda: jnp.sum(net(x) ** 2), of=net)()
            opt.update(grads)
            return loss

    step(jnp.ones(2))
    before = mu.state((net, opt))
    with mu.transaction() as tx:
        if not jnp.isfinite(step(jnp.array([jnp.nan, 1]))):
            tx.rollback()
    assert mu.state((net, opt)) == before


def test_other_threads_see_what_is_committed() -> None:
    net, seen = Net(), []
    with mu.transaction():
        net.items[0].value = 7
        thread = threading.Thread(target=lambda: seen.append(int(net.items[0])))
        thread.start()
        thread.join()
    assert seen == [0]
    assert net.items[0] == 7


def test_a_transaction_that_was_made_elsewhere_begins_where_it_is_entered() -> None:
    n = mu.Variable(0)
    late = mu.transaction()
    with mu.transaction() as outer:
        n.value = 1
        with late:
            n.value += 1
        assert late.writes == outer.writes == (n,)
        outer.rollback()
    assert n == 0


@pytest.mark.parametrize("nested", [False, True])
def test_a_transaction_is_entered_once(nested: bool) -> None:
    n, tx = mu.Variable(0), mu.transaction()
    with pytest.raises(mu.errors.TransactionError, match="entered a second time"):
        with tx:
            n.value = 1
            if nested:
                with tx:
                    pass
        with tx:
            pass
    assert n == (0 if nested else 1)


def test_a_rollback_belongs_to_the_block() -> None:
    net = Net()
    with mu.transaction(net) as tx:
        net.items.append(mu.Variable(1))
        for inside in (lambda: mu.jit(tx.rollback)(), lambda: jax.jit(tx.rollback)(), lambda: mu.scan(roll, 0, X)):
            roll = lambda carry, _: (carry, tx.rollback())  # noqa: E731
            with pytest.raises(mu.errors.TransactionError, match="not the innermost block"):
                inside()
        with mu.transaction(), pytest.raises(mu.errors.TransactionError, match="not the innermost block"):
            tx.rollback()
    with pytest.raises(mu.errors.TransactionError, match="not the innermost block"):
        tx.rollback()
    assert len(net.items) == 2


def test_generators_that_take_turns_leave_nothing_open() -> None:
    a, b = mu.Variable(0), mu.Variable(0)

    def turn(n: Any) -> Any:
        with mu.transaction():
            n.value = 1
            yield

    first, second = turn(a), turn(b)
    next(first), next(second)
    for turns in (first, second):
        with pytest.raises(mu.errors.TransactionError, match="ended before another one"):
            next(turns)
    assert transactions.current() is None
    assert a == 0 and b == 0


def test_a_generator_that_is_dropped_leaves_nothing_open() -> None:
    a = mu.Variable(0)

    def turn() -> Any:
        with mu.transaction():
            a.value += 1
            yield

    first, second = turn(), turn()
    next(first), next(second)
    first.close()
    assert transactions.current() is None
    second.close()
    assert transactions.current() is None
    assert a == 0


@pytest.mark.parametrize("inner", ["jit", "remat", "transaction"])
@pytest.mark.parametrize("end", ["rollback", "exception", "outer", "jit"])
def test_containers_that_change_here_and_further_in(inner: str, end: str) -> None:
    net = Net()

    def further() -> None:
        net.items.append(mu.Variable(2))

    def block() -> None:
        net.items.append(mu.Variable(1))
        if inner == "transaction":
            with mu.transaction(net):
                further()
        else:
            getattr(mu, inner)(further)()
        if end in ("exception", "jit"):
            raise StopError

    before = [*net.items]
    if end == "jit":
        with pytest.raises(StopError):
            mu.jit(block)()
    elif end == "exception":
        with pytest.raises(StopError), mu.transaction(net):
            block()
    elif end == "rollback":
        with mu.transaction(net) as tx:
            block()
            tx.rollback()
            assert net.items == before
    else:
        with mu.transaction(net) as tx:
            with mu.transaction(net):
                block()
            tx.rollback()
    assert len(net.items) == 1 and net.items[0] is before[0]


def test_what_a_raw_transform_has_read_is_not_rolled_back() -> None:
    n = mu.Variable(1)

    @functools.partial(mu.jit, static_argnums=0)
    def f(roll: bool) -> Any:
        with mu.transaction() as tx:
            n.value = n + 5
            jax.jit(lambda: n.value * 1)()
            if roll:
                tx.rollback()
        n.value = n + 1

    with pytest.raises(mu.errors.TraceLevelError, match="rolled back after a raw"):
        f(True)
    with pytest.raises(mu.errors.TraceLevelError, match="written after a raw"):
        f(False)
    assert n == 1


def test_a_commit_that_is_refused_changes_nothing() -> None:
    net, read = Net(), mu.Variable(1)

    def under_raw() -> None:
        with mu.transaction(net):
            net.flag = False
            net.items.append(3)
            net.w.value = net.w * 2

    before = everything(net)
    with mu.freeze(net), pytest.raises(mu.errors.FrozenStateError):
        jax.jit(under_raw)()
    with pytest.raises(mu.errors.TraceLevelError):
        jax.vmap(lambda x: under_raw())(jnp.ones(2))
    same(everything(net), before)

    @mu.jit
    def f() -> Any:
        jax.jit(lambda: read.value * 1)()
        with contextlib.suppress(mu.errors.TraceLevelError), mu.transaction():
            net.items[0].value = 5
            read.value = 5
        return net.items[0].value

    assert f() == 0


def test_a_rollback_drops_what_could_not_be_kept() -> None:
    net = Net()
    with mu.transaction(net) as tx:
        net.tree.value["x"] = "text"
        tx.rollback(mu.Variable)
        net.step()
    assert net.tree.value["x"][0] == 1


def test_an_interrupt_at_the_end_leaves_nothing_open() -> None:
    class Now(Exception):
        pass

    net = Net()
    held, count = transaction.held_back, 0

    @contextlib.contextmanager
    def interrupted() -> Any:
        nonlocal count
        count += 1
        raise Now
        yield

    before = everything(net)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transaction, "held_back", interrupted)
        with pytest.raises(Now), mu.transaction(net):
            change(net)
    assert count == 1 and transaction.held_back is held
    assert transactions.current() is None
    same(everything(net), before)


def test_a_value_that_cannot_be_kept_rolls_back() -> None:
    net = Net()
    before = everything(net)
    with pytest.raises(mu.errors.StateTypeError), mu.transaction(net):
        net.step()
        net.tree.value["x"] = "text"
    same(everything(net), before)
    assert mu.Variable(1) + 1 == 2, "nothing is left open"


def test_nothing_but_nodes() -> None:
    with pytest.raises(mu.errors.ArgumentError, match="not a node"):
        mu.transaction(3)
