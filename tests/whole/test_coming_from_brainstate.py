"""Programs for BrainState and their counterparts here give the same values, gradients and states, from the same parameters.

The page docs/coming_from/brainstate.md has them side by side and is run by the tests of pages; its table is read here. Neurons,
delays, cells and connections are compared in tests/nn/spiking/test_neurons_as_in_brainstate.py, units in
tests/whole/test_units.py.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mutatis as mu
from mutatis import nn

brainstate = pytest.importorskip("brainstate", minversion="0.6")
bst: Any = brainstate
transform: Any = bst.transform
PAGE = Path(__file__).parents[2] / "docs" / "coming_from" / "brainstate.md"
TABLE = PAGE.read_text(encoding="utf-8").partition("|---|---|\n")[2].partition("\n\n")[0]
ROWS = [tuple(re.split(r"(?<!\\)\|", line)[1:3]) for line in TABLE.splitlines()]
XS = jnp.asarray(np.random.default_rng(0).uniform(0.0, 2.0, (12, 4, 3)), jnp.float32)

pytestmark = pytest.mark.once


@pytest.fixture(autouse=True)
def broadcasting() -> Iterator[None]:
    """Layers of BrainState add a bias of fewer axes."""
    with jax.numpy_rank_promotion("allow"):
        yield


def close(found: Any, wanted: Any, rtol: float = 1e-6, atol: float = 1e-6) -> None:
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=rtol, atol=atol)


# The table


@pytest.mark.parametrize(
    "name", sorted({name for row in ROWS for name in re.findall(r"`((?:mu|nn|jax|checkpoint)\.[\w.]+)", row[1])})
)
def test_what_is_named_here_exists(name: str) -> None:
    root, path = name.split(".", 1)
    at = {"mu": mu, "nn": nn, "jax": jax, "checkpoint": mu.checkpoint}[root]
    assert functools.reduce(getattr, path.split("."), at) is not None


@pytest.mark.parametrize(
    "name",
    sorted(
        {
            name
            for row in ROWS
            for name in re.findall(r"`((?:transform|nn|graph|environ|random)\.\w+|\w+State)\b", row[0])
        }
    ),
)
def test_what_is_named_there_exists(name: str) -> None:
    assert functools.reduce(getattr, name.split("."), bst) is not None


# States and transforms


class Cell(mu.Module):
    def __init__(self) -> None:
        self.w = mu.Param(jnp.array([0.9, 0.5, -0.3]))
        self.h = mu.Hidden(jnp.zeros(3), init=lambda: jnp.zeros(3))

    def __call__(self, x: Any) -> Any:
        self.h.value = jnp.tanh(self.w.value * self.h.value + x)
        return self.h.value


class TheirCell(bst.nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.w = bst.ParamState(jnp.array([0.9, 0.5, -0.3]))
        self.h = bst.HiddenState(jnp.zeros(3))

    def reset_state(self, *_: Any, **__: Any) -> None:
        self.h.value = jnp.zeros(3)

    def update(self, x: Any) -> Any:
        self.h.value = jnp.tanh(self.w.value * self.h.value + x)
        return self.h.value


def test_jit_keeps_states() -> None:
    mine, theirs = Cell(), TheirCell()
    step, their_step = mu.jit(mine), transform.jit(theirs)
    for x in XS[:, 0]:
        close(step(x), their_step(x))
    close(mine.h.value, theirs.h.value)


@pytest.mark.parametrize("name", ["for_loop", "reverse", "scan", "map"])
def test_loops(name: str) -> None:
    mine, theirs, xs = Cell(), TheirCell(), XS[:, 0]
    if name == "for_loop":
        close(mu.for_loop(mine, xs), transform.for_loop(theirs, xs))
    elif name == "reverse":
        close(mu.for_loop(mine, xs, reverse=True, unroll=3), transform.for_loop(theirs, xs, reverse=True, unroll=3))
    elif name == "scan":
        start = jnp.zeros(3)
        found = mu.scan(lambda c, x: (c + mine(x), c * 2.0), start, xs)
        close(found, transform.scan(lambda c, x: (c + theirs(x), c * 2.0), start, xs))
    else:
        close(mu.map(lambda x: jnp.sin(x), xs, batch_size=5), transform.map(lambda x: jnp.sin(x), xs, batch_size=5))
    close(mine.h.value, theirs.h.value)


@pytest.mark.parametrize("which", ["for_loop", "scan"])
def test_checkpointed_loops(which: str) -> None:
    mine, theirs, xs = Cell(), TheirCell(), XS[:, 0]

    def my_loss(net: Cell) -> Any:
        mu.reset(net, mu.Hidden)
        if which == "for_loop":
            return jnp.sum(mu.for_loop(net, xs, checkpoint_every=4) ** 2)
        return jnp.sum(mu.scan(lambda c, x: (c + net(x), None), jnp.zeros(3), xs, checkpoint_every=4)[0] ** 2)

    def their_loss() -> Any:
        theirs.reset_state()
        if which == "for_loop":
            return jnp.sum(transform.checkpointed_for_loop(theirs, xs, base=4) ** 2)
        loop = transform.checkpointed_scan(lambda c, x: (c + theirs(x), c), jnp.zeros(3), xs, base=4)
        return jnp.sum(loop[0] ** 2)

    value, gradients = mu.value_and_grad(my_loss)(mine)
    wanted, their_value = transform.grad(their_loss, theirs.w, return_value=True)()
    close((value, gradients["w"]), (their_value, wanted), rtol=1e-5)


def test_loops_that_show_how_far_they_are() -> None:
    pytest.importorskip("tqdm")
    seen: list[int] = []
    mine = mu.for_loop(Cell(), XS[:, 0], progress=lambda done, count: seen.append(done))
    close(mine, transform.for_loop(TheirCell(), XS[:, 0], pbar=transform.ProgressBar(desc="steps")))
    jax.effects_barrier()
    assert seen[-1] == 12


def test_while_loops() -> None:
    count, rate = mu.Variable(0), mu.Param(jnp.float32(1.5))
    their_count, their_rate = bst.State(jnp.int32(0)), bst.ParamState(jnp.float32(1.5))

    def grow(x: Any) -> Any:
        count.value += 1
        return x * rate

    def their_grow(x: Any) -> Any:
        their_count.value += 1
        return x * their_rate.value

    one = jnp.float32(1.0)
    close(mu.while_loop(lambda x: x < 9.0, grow, one), transform.while_loop(lambda x: x < 9.0, their_grow, one))
    value, gradient = mu.value_and_grad(lambda: mu.while_loop(lambda x: x < 9.0, grow, one, max_steps=10), of=rate)()
    theirs, their_value = transform.grad(
        lambda: transform.bounded_while_loop(lambda x: x < 9.0, their_grow, one, max_steps=10),
        their_rate,
        return_value=True,
    )()
    close((value, gradient[()]), (their_value, theirs))
    assert count.value == their_count.value == 12


@pytest.mark.parametrize("index", [0, 1, 2])
def test_branches(index: int) -> None:
    mine, theirs, x = Cell(), TheirCell(), XS[0, 0]
    flags = [jnp.bool_(index == number) for number in range(3)]
    mu.cond(flags[0], lambda: mine(x), lambda: mine.h.value)
    transform.cond(flags[0], lambda: theirs(x), lambda: theirs.h.value)
    close(mine.h.value, theirs.h.value)
    found = mu.switch(index, [lambda: mine.h.value, lambda: mine(x), lambda: mine(2 * x)])
    branches = [lambda: theirs.h.value, lambda: theirs(x), lambda: theirs(2 * x)]
    close(found, transform.switch(index, branches))
    close(mine.h.value, theirs.h.value)
    again = mu.switch(jnp.argmax(jnp.array(flags)), [lambda: mine.h.value, lambda: mine(x), lambda: mine(2 * x)])
    close(again, transform.ifelse(flags, branches))
    close(mine.h.value, theirs.h.value)


def test_make_jaxpr_and_eval_shape() -> None:
    jaxpr, states = transform.make_jaxpr(TheirCell())(XS[0, 0])
    mine = mu.make_jaxpr(Cell())(XS[0, 0])
    assert len(mine.jaxpr.eqns) == len(jaxpr.jaxpr.eqns) and len(states) == 2
    assert mu.eval_shape(Cell).w.shape == transform.eval_shape(TheirCell).w.value.shape


# Derivatives


def fits() -> tuple[Any, Any, Any, Any]:
    weight, bias = mu.Param(jnp.array([1.0, -2.0, 3.0])), mu.Param(jnp.float32(0.5))
    return weight, bias, bst.ParamState(weight.value), bst.ParamState(bias.value)


@pytest.mark.parametrize("has_aux", [False, True])
@pytest.mark.parametrize("argnums", [None, 0, (0, 1)])
def test_gradients_by_states_and_arguments(argnums: Any, has_aux: bool) -> None:
    weight, bias, their_weight, their_bias = fits()
    x, y = jnp.arange(3.0), jnp.float32(2.0)

    def fit(w: Any, b: Any, x: Any, y: Any) -> Any:
        loss = jnp.sum((w * x + b) ** 2) * y
        return (loss, x * y) if has_aux else loss

    by = {} if argnums is None else {"argnums": argnums}
    mine = mu.value_and_grad(
        lambda x, y: fit(weight.value, bias.value, x, y), of={"w": weight, "b": bias}, has_aux=has_aux, **by
    )(x, y)
    theirs = transform.grad(
        lambda x, y: fit(their_weight.value, their_bias.value, x, y),
        {"w": their_weight, "b": their_bias},
        has_aux=has_aux,
        return_value=True,
        **by,
    )(x, y)
    out, gradients = mine
    by_states, by_arguments = (gradients, ()) if argnums is None else gradients
    their_states, their_arguments = (theirs[0], ()) if argnums is None else theirs[0]
    close(
        (out, {name: by_states[name][()] for name in "wb"}, by_arguments),
        (theirs[1:] if has_aux else theirs[1], their_states, their_arguments),
    )


@pytest.mark.parametrize("name", ["jacrev", "jacfwd", "hessian", "vjp", "vector_grad", "checkpoint"])
def test_other_derivatives(name: str) -> None:
    weight, _, their_weight, _ = fits()
    if name in ("jacrev", "jacfwd"):
        mine = getattr(mu, name)(lambda: weight.value**3, of=weight)()[()]
        theirs = getattr(transform, name)(lambda: their_weight.value**3, their_weight)()
    elif name == "hessian":
        mine = mu.hessian(lambda: jnp.sum(weight.value**3), of=weight)()[()][()]
        theirs = transform.hessian(lambda: jnp.sum(their_weight.value**3), their_weight)()
    elif name == "vjp":
        out, pull = mu.vjp(lambda w: w.value**3, weight)
        their_out, their_pull = transform.vjp(lambda: their_weight.value**3, grad_states=their_weight)
        mine, theirs = (out, pull(out)[0][()]), (their_out, their_pull(their_out))
    elif name == "vector_grad":
        mine = mu.grad(lambda: jnp.sum(weight.value**3), of=weight)()[()]
        theirs = transform.vector_grad(lambda: their_weight.value**3, their_weight)()
    else:
        mine = mu.grad(mu.remat(lambda w: jnp.sum(jnp.sin(w.value) ** 2)))(weight)[()]
        theirs = transform.grad(transform.checkpoint(lambda: jnp.sum(jnp.sin(their_weight.value) ** 2)), their_weight)()
    close(mine, theirs)


# Lanes


def test_states_with_an_axis() -> None:
    mine, theirs = Cell(), TheirCell()
    mu.reset(mine, mu.Hidden, batch_shape=(4,))
    theirs.h.value = jnp.zeros((4, 3))
    lanes = mu.StateAxes({mu.Hidden: 0, ...: None})
    batched = transform.vmap(theirs.update, in_states=theirs.h, out_states=theirs.h)
    with jax.check_tracer_leaks(False):
        for x in XS:
            close(mu.vmap(lambda net, x: net(x), in_axes=(lanes, 0))(mine, x), batched(x))
    close(mine.h.value, theirs.h.value)


def test_states_of_a_batch() -> None:
    theirs = bst.nn.ValinaRNNCell(3, 5, activation="tanh")
    bst.nn.vmap_init_all_states(theirs, axis_size=4, state_tag="hidden")
    mine = nn.SimpleCell(3, 5, rngs=mu.Rngs(0))
    mu.reset(mine, mu.Hidden, batch_shape=(4,))
    assert mine.carry.value.shape == theirs.h.value.shape == (4, 5)
    bst.nn.init_all_states(theirs, 2)
    mu.reset(mine, mu.Hidden, batch_shape=(2,))
    assert mine.carry.value.shape == theirs.h.value.shape == (2, 5)


def test_an_ensemble() -> None:
    keys = jax.random.split(jax.random.key(0), 3)

    class Net(mu.Module):
        def __init__(self, key: Any) -> None:
            self.w = mu.Param(jax.random.normal(key, (2,)))

    class TheirNet(bst.nn.Module):  # type: ignore[misc]
        def init_state(self, key: Any) -> None:
            self.w = bst.ParamState(bst.random.normal(size=(2,), key=key))

    theirs = TheirNet()
    transform.vmap_new_states(theirs.init_state, state_tag="new", axis_size=3)(keys)
    mine = mu.vmap(Net)(keys)
    close(mine.w.value, theirs.w.value)
    seen = transform.vmap(lambda x: theirs.w.value * x, in_states=theirs.w)
    with jax.check_tracer_leaks(False):
        close(mu.vmap(lambda net, x: net.w.value * x)(mine, jnp.arange(3.0)), seen(jnp.arange(3.0)))


# Random numbers


@pytest.mark.parametrize("name", ["normal", "uniform", "bernoulli", "exponential", "gumbel"])
def test_a_key_gives_the_same_numbers(name: str) -> None:
    key = jax.random.key(3)
    options = {"p": 0.3} if name == "bernoulli" else {}
    theirs = getattr(bst.random, name)(size=(5,), key=key, **options)
    mine = jax.random.bernoulli(key, 0.3, (5,)) if name == "bernoulli" else getattr(jax.random, name)(key, (5,))
    close(jnp.float32(mine), jnp.float32(theirs))


def test_streams_go_on_and_start_again() -> None:
    rngs, theirs = mu.Rngs(0), bst.random.RandomState(0)
    kept = mu.snapshot(rngs)

    def mine(_: Any) -> Any:
        return jax.random.normal(rngs())

    numbers = [mu.for_loop(mine, jnp.arange(6)) for _ in range(2)]
    their_numbers = [transform.for_loop(lambda _: theirs.normal(), jnp.arange(6)) for _ in range(2)]
    for drawn in (numbers, their_numbers):
        assert len(set(jnp.concatenate(drawn).tolist())) == 12
    kept.restore()
    theirs.seed(0)
    close(mu.for_loop(mine, jnp.arange(6)), numbers[0])
    close(transform.for_loop(lambda _: theirs.normal(), jnp.arange(6)), their_numbers[0])


# Nets


def spiking() -> tuple[Any, Any]:
    class Net(mu.Module):
        def __init__(self, rngs: mu.Rngs) -> None:
            self.inputs = nn.Linear(3, 8, rngs=rngs)
            self.neurons = nn.LIF(8, tau=4.0, surrogate=mu.surrogate.arctan)
            self.out = nn.Linear(8, 2, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.out(self.neurons(5 * self.inputs(x)))

    class TheirNeurons(bst.nn.Module):  # type: ignore[misc]
        def init_state(self, batch_size: Any = None, **_: Any) -> None:
            self.v = bst.HiddenState(jnp.zeros((batch_size, 8)))

        def reset_state(self, batch_size: Any = None, **_: Any) -> None:
            self.v.value = jnp.zeros((batch_size, 8))

        def update(self, x: Any) -> Any:
            v = self.v.value - mu.surrogate.arctan(self.v.value - 1.0)
            self.v.value = bst.nn.exp_euler_step(lambda v: (x - v) / 4.0, v)
            return mu.surrogate.arctan(self.v.value - 1.0)

    class TheirNet(bst.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.inputs, self.neurons, self.out = bst.nn.Linear(3, 8), TheirNeurons(), bst.nn.Linear(8, 2)

        def update(self, x: Any) -> Any:
            return self.out(self.neurons(5 * self.inputs(x)))

    mine, theirs = Net(mu.Rngs(0)), TheirNet()
    for layer, there in ((mine.inputs, theirs.inputs), (mine.out, theirs.out)):
        assert layer.bias is not None
        there.weight.value = {"weight": layer.kernel.value, "bias": layer.bias.value}
    bst.nn.init_all_states(theirs, 4)
    return mine, theirs


@pytest.mark.parametrize(
    "tx", [optax.sgd(0.1, momentum=0.9), optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1))]
)
def test_training_a_spiking_network(tx: Any) -> None:
    mine, theirs = spiking()
    labels = jnp.array([0, 1, 0, 1])
    params = theirs.states(bst.ParamState)
    optimizer, moments = mu.Optimizer(mine, tx), bst.State(tx.init({path: s.value for path, s in params.items()}))

    def score(out: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(out.mean(0), labels).mean()

    def my_loss(net: Any) -> Any:
        mu.reset(net, mu.Hidden, batch_shape=(4,))
        return score(mu.for_loop(net, XS))

    def their_loss() -> Any:
        bst.nn.reset_all_states(theirs, 4)
        return score(transform.for_loop(theirs, XS))

    @mu.jit
    def step(net: Any, optimizer: mu.Optimizer) -> Any:
        value, gradients = mu.value_and_grad(my_loss)(net)
        optimizer.update(gradients)
        return value

    def their_step() -> Any:
        gradients, value = transform.grad(their_loss, params, return_value=True)()
        updates, moments.value = tx.update(gradients, moments.value)
        for path, state in params.items():
            state.value = optax.apply_updates(state.value, updates[path])
        return value

    their_step = transform.jit(their_step)
    with nn.dt.set(1.0), bst.environ.context(dt=1.0), jax.numpy_dtype_promotion("standard"):
        losses = [float(step(mine, optimizer)) for _ in range(10)]
        close(losses, [float(their_step()) for _ in range(10)], rtol=1e-5)
    assert losses[-1] < losses[0]
    close(mine.out.kernel.value, params["out", "weight"].value["weight"], rtol=1e-5, atol=1e-5)
    close(mine.neurons.v.value, theirs.neurons.v.value, rtol=1e-4, atol=1e-4)


def test_a_gru() -> None:
    class GRU(mu.Module):
        def __init__(self, rngs: mu.Rngs) -> None:
            self.gates, self.candidate = nn.Linear(8, 10, rngs=rngs), nn.Linear(8, 5, rngs=rngs)
            self.h = mu.Hidden(init=lambda: jnp.zeros(5))

        def __call__(self, x: Any) -> Any:
            h = self.h.value
            r, z = jnp.split(jax.nn.sigmoid(self.gates(jnp.concatenate([x, h], axis=-1))), 2, axis=-1)
            new = jnp.tanh(self.candidate(jnp.concatenate([x, r * h], axis=-1)))
            self.h.value = (1 - z) * h + z * new
            return self.h.value

    mine, theirs = GRU(mu.Rngs(0)), bst.nn.GRUCell(3, 5)
    for layer, there in ((mine.gates, theirs.Wrz), (mine.candidate, theirs.Wh)):
        assert layer.bias is not None
        there.weight.value = {"weight": layer.kernel.value, "bias": layer.bias.value}
    bst.nn.init_all_states(theirs, 4)

    def loss(net: GRU) -> Any:
        mu.reset(net, mu.Hidden, batch_shape=(4,))
        return jnp.sum(mu.for_loop(net, XS) ** 2)

    def their_loss() -> Any:
        bst.nn.reset_all_states(theirs, 4)
        return jnp.sum(transform.for_loop(theirs, XS) ** 2)

    value, gradients = mu.value_and_grad(loss)(mine)
    wanted, their_value = transform.grad(their_loss, theirs.Wh.weight, return_value=True)()
    close(value, their_value, rtol=1e-5)
    found = {"weight": gradients["candidate", "kernel"], "bias": gradients["candidate", "bias"]}
    close(found, wanted, rtol=1e-4, atol=1e-5)


def test_layers_in_training_and_after() -> None:
    mine, theirs, x = nn.BatchNorm(3, momentum=0.9), bst.nn.BatchNorm0d((3,), momentum=0.9), XS[0]
    for fit in (True, True, False):
        with bst.environ.context(fit=fit):
            close((mine.train() if fit else mine.eval())(x), theirs(x), rtol=1e-4, atol=1e-5)
    close(
        (mine.mean.value, mine.var.value),
        (theirs.running_mean.value.ravel(), theirs.running_var.value.ravel()),
        rtol=1e-4,
    )
    drop, their_drop = nn.Dropout(0.25, rngs=mu.Rngs(0)), bst.nn.Dropout(0.75)
    with bst.environ.context(fit=True):
        for out in (drop(jnp.ones(1000)), their_drop(jnp.ones(1000))):
            assert set(np.unique(out.round(4))) == {np.float32(0.0), np.float32(1.3333)}
            assert 200 < int((out == 0).sum()) < 300
    with bst.environ.context(fit=False):
        close(drop.eval()(x), their_drop(x))


# What is ambient, what is looked at, what is kept


def test_ambient_values() -> None:
    time = mu.Context("time")
    mine = mu.jit(lambda x: x * time.get() * nn.dt.get())
    theirs = transform.jit(lambda x: x * bst.environ.get("t") * bst.environ.get_dt())
    x, found, wanted = jnp.float32(1.0), [], []
    for dt, now in ((0.1, 3.0), (0.2, 3.0), (0.1, 4.0)):
        with nn.dt.set(dt), time.set(jnp.float32(now)), bst.environ.context(dt=dt, t=jnp.float32(now)):
            found.append(mine(x))
            wanted.append(theirs(x))
    close(found, [0.3, 0.6, 0.4])
    close(wanted, [0.3, 0.3, 0.3])  # what was read when it was traced stays
    assert bst.environ.get("dt", None) is None and nn.dt.get() == 1.0


def test_writes_are_heard_of() -> None:
    mine, theirs = mu.Variable(0.0), bst.State(0.0)
    heard: list[float] = []
    theirs.register_hook("write_after", lambda context: heard.append(float(context.value)))
    theirs.value = 1.0
    with mu.on_commit(mine, lambda path, state: heard.append(float(state.value))):
        mine.value = 1.0
    assert heard == [1.0, 1.0]


def test_parts_of_a_net() -> None:
    mine, theirs = spiking()
    assert len(mu.modules(mine, nn.Linear)) == len(theirs.nodes(bst.nn.Linear)) == 2
    values, their_values = mu.state(mine, mu.Param), bst.graph.treefy_states(theirs, bst.ParamState)
    assert sum(x.size for x in jax.tree.leaves(values)) == sum(x.size for x in jax.tree.leaves(their_values)) == 50


def test_states_are_kept_and_put_back(tmp_path: Path) -> None:
    mine, theirs = spiking()
    with nn.dt.set(1.0), bst.environ.context(dt=1.0):
        mu.reset(mine, mu.Hidden, batch_shape=(4,))
        close(mu.for_loop(mine, XS), transform.for_loop(theirs, XS), rtol=1e-5)
        mu.checkpoint.save(tmp_path / "net", mine)
        kept = {path: state.value for path, state in theirs.states().items()}
        wanted = mu.for_loop(mine, XS), transform.for_loop(theirs, XS)
        mu.checkpoint.restore(tmp_path / "net", mine)
        for path, state in theirs.states().items():
            state.value = kept[path]
        close((mu.for_loop(mine, XS), transform.for_loop(theirs, XS)), wanted)
        close(*wanted, rtol=1e-5)


def test_what_is_refused_by_both() -> None:
    mine, theirs = mu.Variable(jnp.zeros(2)), bst.State(jnp.zeros(2))
    with pytest.raises(mu.errors.LaneError):
        mu.vmap(lambda x: mine.set(x))(jnp.ones((3, 2)))
    with pytest.raises(bst.BatchAxisError), jax.check_tracer_leaks(False):
        transform.vmap(lambda x: setattr(theirs, "value", x))(jnp.ones((3, 2)))
