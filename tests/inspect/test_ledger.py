"""The ledger: counts beside what a run does, roles in each transform, the questions that it answers, and that nothing is run."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mutatis as mu
from mutatis import nn
from mutatis.inspect import Collective, ledger

XS = jnp.ones((4, 3))


class Net(mu.Module):
    def __init__(self) -> None:
        self.w = mu.Param(jnp.ones(3))
        self.n = mu.Variable(0)
        self.h = mu.Hidden(jnp.zeros((4, 3)))
        self.rngs = mu.Rngs(0)
        self.unused = mu.Buffer(jnp.zeros(2))

    def step(self, x: Any) -> Any:
        self.n += 1
        return x * jnp.broadcast_to(self.w.value, x.shape)


def scan(net: Net) -> Any:
    return mu.scan(lambda c, x: (c, net.step(x)), None, XS)


PROGRAMS: dict[str, tuple[Callable[[Net], Any], int | None, tuple[str, ...]]] = {
    "plain": (lambda m: m.step(XS[0]), 1, ()),
    "twice": (lambda m: (m.step(XS[0]), m.step(XS[0])), 2, ()),
    "jit": (lambda m: mu.jit(m.step)(XS[0]), 1, ("jit(Net.step)",)),
    "jit twice": (lambda m: [f(XS[0]) for f in [mu.jit(m.step)] for _ in range(2)], 2, ("jit(Net.step)",)),
    "grad": (lambda m: mu.grad(lambda x: m.step(x).sum())(XS[0]), 1, ("grad(lambda)",)),
    "remat": (lambda m: mu.remat(m.step)(XS[0]), 1, ("remat(Net.step)",)),
    "cond": (lambda m: mu.cond(True, m.step, lambda x: x, XS[0]), 1, ("cond(Net.step)",)),
    "vmap": (lambda m: mu.vmap(m.step)(XS), 1, ("vmap(Net.step): shared",)),
    "scan": (scan, 4, ("scan(lambda in scan): carried",)),
    "for_loop": (lambda m: mu.for_loop(m.step, XS), 4, ("for_loop(Net.step): carried",)),
    "fori_loop": (
        lambda m: mu.fori_loop(0, 3, lambda i, x: m.step(x), XS[0]),
        3,
        ("fori_loop(lambda): carried",),
    ),
    "map": (lambda m: mu.map(m.step, XS), 4, ("for_loop(Net.step): carried",)),
    "weak carry": (
        lambda m: mu.scan(lambda c, x: (c + m.step(x).sum(), None), 0.0, XS),
        4,
        ("scan(lambda): carried",),
    ),
    "while": (
        lambda m: mu.while_loop(lambda i: i < 3, lambda i: (m.step(XS[0]), i + 1)[1], 0),
        None,
        ("while_loop(lambda): carried",),
    ),
    "scan of fori": (
        lambda m: mu.scan(lambda c, x: (c, mu.fori_loop(0, 3, lambda i, y: m.step(y), x)), None, XS),
        12,
        ("scan(lambda): carried", "fori_loop(lambda): carried"),
    ),
    "jit of scan, and more": (
        lambda m: mu.jit(lambda: (m.step(XS[0]), scan(m)))(),
        5,
        ("jit(lambda)", "scan(lambda in scan): carried"),
    ),
    "transaction": (lambda m: mu_transaction(m), 1, ("transaction",)),
}


def mu_transaction(m: Net) -> None:
    with mu.transaction(m):
        m.step(XS[0])


@pytest.mark.parametrize("name", PROGRAMS)
def test_updates_and_transforms(name: str) -> None:
    f, updates, through = PROGRAMS[name]
    net = Net()
    book = ledger(f)(net)
    entry = book["m.n" if name != "scan" else "net.n"]
    assert (entry.read, entry.updates, entry.changed) == (True, updates, True)
    assert entry.through == through
    unused = book["m.unused" if name != "scan" else "net.unused"]
    assert unused.unused and unused.through == ()
    assert int(net.n) == 0, "nothing is run"
    if updates is not None and name != "vmap":
        f(net)
        assert int(net.n) == updates


def test_entries_are_data() -> None:
    entry = ledger(lambda net: net.step(XS[0]))(Net())["net.w"]
    assert (entry.kind, entry.type, entry.bytes, entry.read, entry.updates) == ("Param", "float32[3]", 12, True, 0)


def test_a_compiled_function_is_seen_each_time() -> None:
    net = Net()
    step = mu.jit(lambda: net.step(XS[0]))
    step()
    for _ in range(2):
        assert ledger(step)()["net.n"].updates == 1
    step()
    assert int(net.n) == 2


def test_no_trace_is_left_behind(traces: Any) -> None:
    net = Net()
    counted = traces.count(net.step)
    step = mu.jit(counted)
    step(XS[0])
    ledger(step)(XS[0])
    step(XS[0])
    assert traces[counted] == 2, "one for the program, one for the ledger"


ROLES: dict[str, tuple[Callable[[Net], Any], str, str]] = {
    "sliced by vmap": (
        lambda m: mu.vmap(lambda h: h.value, in_axes=0)(m.h),
        "m.h",
        "vmap(lambda): split",
    ),
    "carried and shared": (scan, "net.w", "scan(lambda in scan): shared"),
    "a stream for each lane": (
        lambda m: mu.vmap(lambda x: jax.random.normal(m.rngs(), x.shape))(XS),
        "m.rngs.streams.default",
        "vmap(lambda): a stream each",
    ),
    "a stream that is carried": (
        lambda m: mu.for_loop(lambda x: jax.random.normal(m.rngs(), x.shape), XS),
        "m.rngs.streams.default",
        "for_loop(lambda): carried",
    ),
    "sliced by scan": (lambda m: mu.scan(lambda c, h: (c, h.value), None, m.h), "m.h", "scan(lambda): split"),
}


@pytest.mark.parametrize("name", ROLES)
def test_roles(name: str) -> None:
    f, path, role = ROLES[name]
    assert ledger(f)(Net())[path].through == (role,)


def test_states_that_are_made() -> None:
    def f(net: Any) -> Any:
        net.cache = mu.Cache(jnp.zeros(5))
        return nn.Linear(2, 3, rngs=mu.Rngs(0))

    net = Net()
    book = ledger(f)(net)
    assert {entry.path for entry in book.entries if entry.made} == {"net.cache", "result.kernel", "result.bias"}
    assert book["net.cache"].type == "float32[5]"
    assert not hasattr(net, "cache")


def test_nothing_is_allocated() -> None:
    net = mu.eval_shape(lambda: nn.Linear(100_000, 100_000, rngs=mu.Rngs(0)))
    book = ledger(lambda x: net(x))(jax.ShapeDtypeStruct((1, 100_000), jnp.float32))
    assert book["net.kernel"].bytes == 40_000_000_000


def test_why() -> None:
    net = Net()
    mu.freeze(net.w)
    norm = nn.BatchNorm(3)
    book = ledger(lambda x: norm(net.step(x)))(XS)
    assert book.why("net.n") == "`net.n` is updated: a call writes it once."
    assert "only reads it. It is frozen: `mu.thaw(...)`" in book.why("net.w")
    assert "neither reads nor writes it." in book.why("net.h")
    assert "cannot reach a state `other`" in book.why("other")
    book = ledger(lambda x: norm(net.step(x)))(XS) if norm.eval() else None
    assert "evaluation mode" in book.why("norm.mean")


def test_what_a_checkpoint_has_to_hold() -> None:
    book = ledger(lambda net: net.step(XS[0]))(Net())
    assert [entry.path for entry in book.changed] == ["net.n"]


def test_diff() -> None:
    net, norm = Net(), nn.BatchNorm(3)
    train = ledger(lambda: norm(net.step(XS)))()
    assert not train.diff(train)
    evaluate = ledger(lambda: norm(jnp.broadcast_to(net.w.value, XS.shape), use_running_average=True))()
    changes = set(train.diff(evaluate).changes)
    assert ("norm.mean", "updates", "1", "0") in changes
    assert ("net.n", "updates", "1", "0") in changes
    assert ("net.n", "read", "True", "False") in changes
    assert not any(path == "norm.scale" for path, *_ in changes)
    other = ledger(lambda: norm(XS))()
    assert ("net.w", "state", "-", "float32[3]") in other.diff(train).changes


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
def test_what_is_communicated() -> None:
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    w = mu.Param(jax.device_put(jnp.ones((8, 3)), NamedSharding(mesh, P("d"))))
    total = mu.Variable(0.0)

    @mu.jit
    def step() -> None:
        total.value = jnp.sum(w.value)

    book = ledger(step)()
    assert "d" in book["w"].sharding
    assert book["w"].sharding in str(book)
    assert book.collectives() == (Collective("all-reduce", "f32[]", 1),)
    assert float(total) == 0


def test_text_rich_and_html() -> None:
    book = ledger(lambda net: net.step(XS[0]))(Net())
    assert str(book).splitlines() == [
        "state                   kind      type         size  read  updates  through",
        "net.n                   Variable  int32[]       4 B   yes        1",
        "net.w                   Param     float32[3]   12 B   yes",
        "2 states, 3 left alone            4 B updated  16 B     2        1",
    ]
    console = rich.console.Console(file=io.StringIO(), width=120)
    console.print(book)
    assert "net.w" in console.file.getvalue()
    assert "net.w" in book.to_html() and book.to_html().startswith('<div class="mutatis">')


def test_an_error_in_the_function_leaves_nothing() -> None:
    net = Net()

    def f() -> None:
        net.step(XS[0])
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        ledger(f)()
    assert int(net.n) == 0
    step = mu.jit(net.step)
    step(XS[0])
    np.testing.assert_array_equal(net.n, 1)


def test_numbers_flags_and_text_are_what_they_are() -> None:
    count = mu.Variable(0)

    @functools.partial(mu.jit, static_argnames=("times", "active"))
    def step(x: Any, times: int, active: bool = False) -> None:
        for _ in range(times):
            if active:
                count.value += x

    for f in (step, step.__wrapped__):
        assert ledger(f)(1, 3, active=True)["count"].updates == 3
        assert ledger(f)(jnp.ones((), int), 2, active=False)["count"].unused
    assert ledger(lambda mode: count.set(1) if mode == "go" else None)("go")["count"].updates == 1
    assert count == 0


def test_states_that_a_class_attribute_leads_to() -> None:
    class Holder(mu.Module):
        registry: ClassVar[dict[str, Any]] = {}

        def __init__(self) -> None:
            self.hits = mu.Variable(0)

    holder = Holder.registry["holder"] = Holder()
    Holder.registry["bare"] = mu.Variable(0)

    def hit() -> None:
        for item in [*Holder.registry.values()]:
            cell = item.hits if isinstance(item, Holder) else item
            cell.value += 1

    found = ledger(hit)()
    assert found["Holder.registry.holder.hits"].updates == 1
    assert len(found.entries) == 2 and all(entry.read for entry in found.entries)
    assert holder.hits == 0


def test_states_that_are_gone_are_left_out() -> None:
    net = Net()

    def f(x: Any) -> Any:
        total = mu.Variable(0.0)

        def body(carry: Any, row: Any) -> Any:
            local = mu.Variable(row)
            local.value = local * 2
            total.value = total + local
            return carry, None

        mu.scan(body, None, x)
        with mu.transaction(net) as tx:
            net.extra = mu.Variable(1)
            tx.rollback()
        return jax.vmap(lambda row: mu.Variable(row).value + 1)(x) + total

    assert all(entry.path.startswith("net.") for entry in ledger(f)(jnp.arange(3.0)).entries)


def test_states_that_a_first_call_makes() -> None:
    layer = nn.Linear(None, 3, rngs=mu.Rngs(0))
    entry = ledger(layer)(jnp.ones((1, 2)))["model.kernel"]
    assert (entry.type, entry.bytes, entry.made) == ("float32[2,3]", 24, True)
    assert layer.kernel.deferred
    assert not ledger(lambda: layer.bias.value)()["layer.kernel"].made


def test_values_that_change_in_place_are_counted_once() -> None:
    tree = mu.Variable({"x": jnp.zeros(())})

    def f() -> None:
        with mu.transaction() as tx:
            tree.value["x"] = tree.value["x"] + 1
            tx.rollback(mu.Param)

    assert ledger(f)()["tree"].updates == 1
