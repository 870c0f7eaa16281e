"""Steps in time, delays, cells and connections are those of BrainState: the same values and gradients from the same parameters.

BrainState 0.6 has an integrator, `Delay`, recurrent cells and connections, which are compared as they are. It has no neurons,
synapses or encoders of its own: they went to `brainpy.state`, and surrogate gradients to `braintools`. So neurons and synapses
are compared with what `brainpy.state` 2.9 computes, written here with BrainState's states and integrator, with our surrogates in
both. Not compared: `Izhikevich` and `HodgkinHuxley`, which are integrated differently there, and `LI`, `Poisson`, `latency` and
`rk4`, for which there is nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.sparse import BCOO

import mutatis as mu
from mutatis import nn, surrogate

brainstate = pytest.importorskip("brainstate", minversion="0.6")
bst: Any = brainstate
pytestmark = pytest.mark.once
OLD_NAMES = pytest.mark.filterwarnings("ignore:brainevent:DeprecationWarning")  # BrainState uses those of brainevent
STEPS = 60
RNG = np.random.default_rng(0)
CURRENT = jnp.asarray(RNG.uniform(0.5, 3.0, (STEPS, 4)), jnp.float32)
SPIKES = jnp.asarray(RNG.random((STEPS, 4)) < 0.2, jnp.float32)


@contextlib.contextmanager
def step_of(dt: float) -> Iterator[None]:
    with nn.dt.set(dt), bst.environ.context(dt=dt), jax.numpy_rank_promotion("allow"):
        yield


def close(found: Any, wanted: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=rtol, atol=atol)


# What is not in BrainState: neurons and synapses, as `brainpy.state` has them


class Theirs:
    """A layer whose states are made by `start`, a dictionary of their first values."""

    def __init__(self, spike: Any = surrogate.sigmoid, reset: str = "soft", **parameters: Any) -> None:
        self.spike, self.reset = spike, reset
        self.at(**parameters)
        self.states = {name: bst.HiddenState(value) for name, value in self.start().items()}

    def at(self, **parameters: Any) -> None:
        vars(self).update(parameters)

    def start(self) -> dict[str, Any]:
        raise NotImplementedError

    def again(self) -> None:
        for name, value in self.start().items():
            self.states[name].value = value

    def __call__(self, x: Any) -> Any:
        raise NotImplementedError


class LIF(Theirs):
    tau: Any = 10.0
    v_th: Any = 1.0
    v_reset: Any = 0.0
    v_rest: Any = 0.0
    resistance: Any = 1.0

    def start(self) -> dict[str, Any]:
        return {"v": jnp.full(4, self.v_rest)}

    def fire(self, v: Any, above: Any = 0.0) -> Any:
        return self.spike((v - self.v_th - above) / (self.v_th - self.v_reset))

    def lowered(self, v: Any, spikes: Any) -> Any:
        top = self.v_th if self.reset == "soft" else jax.lax.stop_gradient(v)
        return v - (top - self.v_reset) * spikes

    def moved(self, v: Any, x: Any) -> Any:
        return bst.nn.exp_euler_step(lambda v: (-v + self.v_rest + self.resistance * x) / self.tau, v)

    def __call__(self, x: Any) -> Any:
        v = self.states["v"].value
        self.states["v"].value = self.moved(self.lowered(v, self.fire(v)), x)
        return self.fire(self.states["v"].value)


class LIFRef(LIF):
    tau_ref: Any = 5.0

    def start(self) -> dict[str, Any]:
        return {**super().start(), "last": jnp.full(4, -1e7), "t": jnp.float32(0)}

    def __call__(self, x: Any) -> Any:
        v, last, t = (self.states[name].value for name in ("v", "last", "t"))
        v = self.lowered(v, self.fire(v))
        v = jnp.where(t - last < self.tau_ref, v, self.moved(v, x))
        self.states["v"].value = v
        self.states["last"].value = jnp.where(v >= self.v_th, t, last)
        self.states["t"].value = t + bst.environ.get_dt()
        return self.fire(v)


class ALIF(LIF):
    tau_a: Any = 100.0
    beta: Any = 0.1

    def start(self) -> dict[str, Any]:
        return {**super().start(), "a": jnp.zeros(4)}

    def __call__(self, x: Any) -> Any:
        v, a = (self.states[name].value for name in ("v", "a"))
        spikes = self.fire(v, self.beta * a)
        v = self.moved(self.lowered(v, spikes), x)
        a = bst.nn.exp_euler_step(lambda a: -a / self.tau_a, a + spikes)
        self.states["v"].value, self.states["a"].value = v, a
        return self.fire(v, self.beta * a)


class Expon(Theirs):
    tau: Any = 8.0

    def start(self) -> dict[str, Any]:
        return {"g": jnp.zeros(4)}

    def __call__(self, x: Any) -> Any:
        g = self.states["g"]
        g.value = bst.nn.exp_euler_step(lambda g: -g / self.tau, g.value) + x
        return g.value


class DualExpon(Theirs):
    tau_decay: Any = 10.0
    tau_rise: Any = 1.0

    def start(self) -> dict[str, Any]:
        return {"decay": jnp.zeros(4), "rise": jnp.zeros(4)}

    def __call__(self, x: Any) -> Any:
        decay, rise = self.states["decay"], self.states["rise"]
        decay.value = bst.nn.exp_euler_step(lambda g: -g / self.tau_decay, decay.value) + x
        rise.value = bst.nn.exp_euler_step(lambda g: -g / self.tau_rise, rise.value) + x
        slow, fast = self.tau_decay, self.tau_rise
        peak = slow * fast / (slow - fast) * jnp.log(slow / fast)
        return (decay.value - rise.value) / (jnp.exp(-peak / slow) - jnp.exp(-peak / fast))


class Alpha(Theirs):
    tau: Any = 8.0

    def start(self) -> dict[str, Any]:
        return {"g": jnp.zeros(4), "h": jnp.zeros(4)}

    def __call__(self, x: Any) -> Any:
        g, h = self.states["g"], self.states["h"]
        g.value = bst.nn.exp_euler_step(lambda g: (h.value - g) / self.tau, g.value)
        h.value = bst.nn.exp_euler_step(lambda h: -h / self.tau, h.value) + x
        return g.value


class STP(Theirs):
    u: Any = 0.15
    tau_f: Any = 1500.0
    tau_d: Any = 200.0

    def start(self) -> dict[str, Any]:
        return {"u": jnp.full(4, self.u), "x": jnp.ones(4)}

    def __call__(self, spikes: Any) -> Any:
        before, there = self.states["u"].value, self.states["x"].value
        u = bst.nn.exp_euler_step(lambda u: -u / self.tau_f, before) + spikes * self.u * (1 - before)
        x = bst.nn.exp_euler_step(lambda x: (1 - x) / self.tau_d, there)
        self.states["u"].value, self.states["x"].value = u, x - spikes * u * there
        return u * x * spikes


def both(mine: Any, theirs: Theirs, xs: Any, names: dict[str, str], rtol: float = 1e-5) -> None:
    """Results, states and the gradient by the input are the same."""
    weights = jnp.cos(jnp.arange(xs.size, dtype=jnp.float32)).reshape(xs.shape)

    def my_loss(xs: Any) -> Any:
        mu.reset(mine, mu.Hidden)
        out = mu.for_loop(mine, xs)
        return jnp.sum(weights * out), out

    def their_loss(xs: Any) -> Any:
        theirs.again()
        out = bst.transform.for_loop(theirs, xs)
        return jnp.sum(weights * out), out

    by_x, out = mu.jit(mu.grad(my_loss, has_aux=True))(xs)
    their_by_x, their_out = bst.transform.jit(bst.transform.grad(their_loss, argnums=0, has_aux=True))(xs)
    close(out, their_out, rtol)
    close(by_x, their_by_x, rtol, atol=rtol * float(jnp.abs(their_by_x).max()))
    for name, their_name in names.items():
        close(getattr(mine, name).value, theirs.states[their_name].value, rtol)
    assert jnp.abs(their_by_x).max() > 0


@pytest.mark.parametrize(
    ("reset", "spike"),
    [
        ("soft", surrogate.sigmoid),
        ("hard", surrogate.relu),
        ("soft", surrogate.multi_gaussian),
        ("hard", surrogate.arctan),
    ],
)
def test_lif(reset: Any, spike: Any) -> None:
    options = {"tau": 8.0, "v_th": 1.1, "v_reset": -0.2, "v_rest": 0.1, "resistance": 1.3}
    with step_of(0.5):
        mine = nn.LIF(4, **options, reset=reset, surrogate=spike)
        both(mine, LIF(spike, reset, **options), CURRENT, {"v": "v"})


@pytest.mark.parametrize("dt", [0.1, 1.0])
def test_alif(dt: float) -> None:
    with step_of(dt):
        mine = nn.ALIF(4, 5.0, tau_a=20.0, beta=0.3, surrogate=surrogate.gaussian)
        both(mine, ALIF(surrogate.gaussian, tau=5.0, tau_a=20.0, beta=0.3), 2 * CURRENT, {"v": "v", "a": "a"})


def test_refractory_neurons() -> None:
    """Of the steps after a spike theirs holds the membrane in those that end before the time is over, ours in all: one more."""
    with step_of(1.0):
        out = mu.for_loop(nn.LIF(4, 5.0, tau_ref=3.0), 2 * CURRENT)
        close(out, bst.transform.for_loop(LIFRef(tau=5.0, tau_ref=4.0), 2 * CURRENT))
        assert out.sum() != bst.transform.for_loop(LIFRef(tau=5.0, tau_ref=3.0), 2 * CURRENT).sum() != 0


def test_parameters_are_trained_alike() -> None:
    tau = jnp.array([5.0, 8.0, 10.0, 20.0])
    mine, theirs, state = nn.LIF(4, tau=mu.Param(tau)), LIF(), bst.ParamState(tau)

    def their_loss() -> Any:
        theirs.again()
        theirs.at(tau=state.value)
        return jnp.sum(bst.transform.for_loop(theirs, CURRENT) ** 2)

    def my_loss(net: nn.LIF) -> Any:
        mu.reset(net, mu.Hidden)
        return jnp.sum(mu.for_loop(net, CURRENT) ** 2)

    with step_of(1.0):
        wanted, value = bst.transform.grad(their_loss, state, return_value=True)()
        found = mu.value_and_grad(my_loss)(mine)
    close(found[0], value)
    close(found[1]["tau"], wanted, atol=1e-5)


def test_synapses() -> None:
    with step_of(0.5):
        both(nn.Expon(4, tau=6.0), Expon(tau=6.0), SPIKES, {"g": "g"})
        mine = nn.DualExpon(4, tau_decay=12.0, tau_rise=2.0)
        both(mine, DualExpon(tau_decay=12.0, tau_rise=2.0), SPIKES, {"decay": "decay", "rise": "rise"})


def test_alpha_comes_close_with_small_steps() -> None:
    """Theirs is of height 1/e, and is integrated in two parts; ours is of height 1, and exact."""
    errors = []
    for dt in (0.2, 0.1, 0.05):
        spikes = jnp.zeros((round(16 / dt), 4)).at[0].set(1.0)
        with step_of(dt):
            mine, theirs = mu.for_loop(nn.Alpha(4), spikes), bst.transform.for_loop(Alpha(), spikes)
        errors.append(float(jnp.abs(mine - jnp.e * theirs).max()))
    assert errors[2] < 0.005 and 1.8 < errors[0] / errors[1] < 2.2 and 1.8 < errors[1] / errors[2] < 2.2


def test_short_term_plasticity_comes_close_with_small_steps() -> None:
    """Theirs starts at u, ours at 0; theirs takes what was there before the step, ours what is there after it."""
    errors = []
    for dt in (0.2, 0.1, 0.05):
        spikes = jnp.zeros((round(100 / dt), 4)).at[:: round(5 / dt)].set(1.0)
        with step_of(dt):
            mine = nn.STP(4, u=0.3, tau_f=100.0, tau_d=50.0)
            mine.u_now.value = jnp.full(4, 0.3)
            wanted = bst.transform.for_loop(STP(u=0.3, tau_f=100.0, tau_d=50.0), spikes)
            errors.append(float(jnp.abs(mu.for_loop(mine, spikes) - wanted).max()))
    assert errors[2] < 0.001 and 1.8 < errors[0] / errors[1] < 2.2 and 1.8 < errors[1] / errors[2] < 2.2


# What BrainState has


@pytest.mark.parametrize(
    "slope",
    [
        lambda y: -y / 7.0,
        lambda y: (2.0 - y) / 3.0,
        lambda y: y * (1 - y),
        lambda y: jnp.sin(y),
        lambda y: 0.0 * y + 1.0,
        lambda y: -1e-5 * y,
    ],
)
def test_exponential_euler(slope: Callable[[Any], Any]) -> None:
    y = jnp.linspace(-2.0, 2.0, 9)
    with step_of(0.5):
        close(nn.exp_euler(slope, y, 0.5), bst.nn.exp_euler_step(slope, y))
        mine = jax.grad(lambda y: jnp.sum(nn.exp_euler(slope, y, 0.5) ** 2))(y)
        close(mine, jax.grad(lambda y: jnp.sum(bst.nn.exp_euler_step(slope, y) ** 2))(y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_delays(steps: int) -> None:
    with step_of(0.5):
        mine, theirs = nn.Delay(4, max_steps=3), bst.nn.Delay(jnp.zeros(4), time=1.5)
        theirs.register_entry("back", steps * 0.5)
        theirs.init_state()

        def my_step(x: Any) -> Any:
            mine.push(x)
            return mine.at(steps)

        def their_step(x: Any) -> Any:
            theirs.update(x)
            return theirs.at("back")

        def my_loss(xs: Any) -> Any:
            out = mu.for_loop(my_step, xs)
            return jnp.sum(out**3), out

        def their_loss(xs: Any) -> Any:
            out = bst.transform.for_loop(their_step, xs)
            return jnp.sum(out**3), out

        found = mu.grad(my_loss, has_aux=True)(CURRENT)
        wanted = bst.transform.grad(their_loss, argnums=0, has_aux=True)(CURRENT)
        close(found, wanted, rtol=1e-6)
        if steps:
            assert not found[1][:steps].any() and not found[0][-steps:].any()


def test_delays_between_steps() -> None:
    with step_of(0.5):
        mine, theirs = nn.Delay(4, max_steps=3), bst.nn.Delay(jnp.zeros(4), time=1.5)
        theirs.init_state()
        for number, x in enumerate(CURRENT[:8]):
            mine.push(x)
            theirs.update(x)
            with bst.environ.context(t=number * 0.5):
                for back in (0.0, 0.125, 0.5, 1.3):
                    close(mine.at(back / 0.5), theirs.retrieve_at_time(number * 0.5 - back), rtol=1e-5)


def joined(mine: nn.Linear, other: nn.Linear) -> Any:
    """One kernel for input and carry, one under the other, as theirs have them."""
    bias = mine.bias if mine.bias is not None else other.bias
    assert bias is not None
    return {"weight": jnp.concatenate([mine.kernel.value, other.kernel.value]), "bias": bias.value}


def cells(kind: str) -> tuple[Any, Any, Callable[[mu.State], Any]]:
    """Ours, theirs with the same parameters, and how gradients of ours look there."""
    if kind == "simple":
        simple, theirs = nn.SimpleCell(3, 5, rngs=mu.Rngs(0)), bst.nn.ValinaRNNCell(3, 5, activation="tanh")
        theirs.W.weight.value = joined(simple.dense_i, simple.dense_h)

        def one(g: Any) -> Any:
            kernel = jnp.concatenate([g["dense_i", "kernel"], g["dense_h", "kernel"]])
            return {"weight": kernel, "bias": g["dense_i", "bias"]}

        return simple, theirs, one
    lstm, theirs = nn.LSTMCell(3, 5, rngs=mu.Rngs(0)), bst.nn.LSTMCell(3, 5)
    for layer in (lstm.hi, lstm.hg, lstm.hf, lstm.ho):
        assert layer.bias is not None
        layer.bias.value = jnp.linspace(-1.0, 1.0, 5)
    pairs = [(lstm.ii, lstm.hi), (lstm.ig, lstm.hg), (lstm.if_, lstm.hf), (lstm.io, lstm.ho)]
    theirs.W.weight.value = jax.tree.map(lambda *parts: jnp.concatenate(parts, -1), *(joined(*pair) for pair in pairs))
    assert lstm.hf.bias is not None
    lstm.hf.bias.value += 1.0  # there the forget gate has it besides its bias

    def four(g: Any) -> Any:
        gates = [
            {
                "weight": jnp.concatenate([g[a, "kernel"], g[b, "kernel"]]),
                "bias": g[b, "bias"],
            }
            for a, b in (("ii", "hi"), ("ig", "hg"), ("if_", "hf"), ("io", "ho"))
        ]
        return jax.tree.map(lambda *parts: jnp.concatenate(parts, -1), *gates)

    return lstm, theirs, four


@pytest.mark.parametrize("kind", ["simple", "lstm"])
def test_recurrent_cells(kind: str) -> None:
    """`nn.GRUCell` is the variant of cuDNN and NNX, which resets after the map; theirs, before it, is on the page."""
    xs = jnp.asarray(RNG.standard_normal((12, 2, 3)), jnp.float32)
    with jax.numpy_rank_promotion("allow"):
        mine, theirs, as_theirs = cells(kind)
        mine(xs[0])
        bst.nn.init_all_states(theirs, 2)

        def my_loss(cell: Any) -> Any:
            mu.reset(cell, mu.Hidden, batch_shape=(2,))
            out = mu.for_loop(cell, xs)
            return jnp.sum(out**2), out

        def their_loss() -> Any:
            bst.nn.reset_all_states(theirs, 2)
            out = bst.transform.for_loop(theirs, xs)
            return jnp.sum(out**2), out

        gradients, out = mu.jit(mu.grad(my_loss, has_aux=True))(mine)
        their_gradients, their_out = bst.transform.jit(bst.transform.grad(their_loss, theirs.W.weight, has_aux=True))()
    close(out, their_out)
    close(as_theirs(gradients), their_gradients, rtol=1e-4, atol=1e-5)


def connections(kind: str) -> tuple[Any, Any, Any]:
    """Ours, theirs with the same parameters and connections, and the gradient of its weight as ours has it."""
    if kind == "one":
        weight = jnp.linspace(0.5, 2.0, 4)
        return nn.OneToOne(4, weight), bst.nn.OneToOne(4, weight), lambda g: g["weight"]
    if kind == "number":
        weight = jnp.asarray(RNG.standard_normal((4, 3)), jnp.float32)
        theirs = bst.nn.FixedNumConn(4, 6, 3, weight, allow_multi_conn=False, seed=1)
        fixed = nn.FixedNum(4, 6, 3, weight, rngs=mu.Rngs(0))
        mu.update(fixed, {"target": jnp.asarray(theirs.conn.indices, jnp.int32)})
        return fixed, theirs, lambda g: g
    matrix = jnp.asarray(RNG.standard_normal((4, 6)) * (RNG.random((4, 6)) < 0.5), jnp.float32)
    import saiunit  # type: ignore[import-not-found,import-untyped,unused-ignore]

    coo = saiunit.sparse.COO.fromdense(matrix)
    theirs = bst.nn.SparseLinear(coo)
    places = jnp.stack([coo.row, coo.col], axis=1)
    mine = nn.Sparse(BCOO((coo.data, places), shape=(4, 6)))
    return mine, theirs, lambda g: g["weight"]


@OLD_NAMES
@pytest.mark.parametrize("kind", ["one", "number", "sparse"])
def test_connections(kind: str) -> None:
    mine, theirs, as_mine = connections(kind)
    with jax.numpy_rank_promotion("allow"):
        for x in (SPIKES, CURRENT):
            close(mu.for_loop(mine, x), bst.transform.for_loop(theirs, x))
        found = mu.grad(lambda connect: jnp.sum(connect(CURRENT[0]) ** 2))(mine)
        wanted = bst.transform.grad(lambda: jnp.sum(theirs(CURRENT[0]) ** 2), theirs.weight)()
    close(found["weight"], as_mine(wanted))


@OLD_NAMES
def test_events_are_a_product() -> None:
    """`EventLinear` skips what does not spike; here it is a `Linear` without a bias, which gives the same."""
    brainevent = pytest.importorskip("brainevent")
    product = brainevent.binary_densemv_p
    before = product.get_default("cpu")
    product.set_default("cpu", "jax_raw")  # the other one needs numba
    weight = jnp.asarray(RNG.standard_normal((4, 6)), jnp.float32)
    mine, theirs = nn.Linear(4, 6, use_bias=False, rngs=mu.Rngs(0)), bst.nn.EventLinear(4, 6, weight)
    mine.kernel.value = weight
    try:
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            close(mine(SPIKES[3]), theirs(SPIKES[3]), rtol=1e-5)
            found = mu.grad(lambda mine: jnp.sum(mine(SPIKES[3]) ** 2))(mine)["kernel"]
            close(found, bst.transform.grad(lambda: jnp.sum(theirs(SPIKES[3]) ** 2), theirs.weight)())
    finally:
        if before is not None:
            product.set_default("cpu", before)
