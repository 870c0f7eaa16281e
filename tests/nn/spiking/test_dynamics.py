"""What neurons and synapses have in common: they compute in the dtype of their states, in batches, and start where they rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import nn
from mutatis.errors import ArgumentError

pytestmark = pytest.mark.once

MODULES: dict[str, Callable[..., Any]] = {
    "LIF": lambda **o: nn.LIF(3, tau=10.0, v_rest=0.2, tau_ref=2.0, **o),
    "ALIF": lambda **o: nn.ALIF(3, tau=10.0, **o),
    "LI": lambda **o: nn.LI(3, tau=10.0, **o),
    "Izhikevich": lambda **o: nn.Izhikevich(3, **o),
    "HodgkinHuxley": lambda **o: nn.HodgkinHuxley(3, **o),
    "Expon": lambda **o: nn.Expon(3, tau=5.0, **o),
    "DualExpon": lambda **o: nn.DualExpon(3, **o),
    "Alpha": lambda **o: nn.Alpha(3, **o),
    "STP": lambda **o: nn.STP(3, **o),
}
STEPS: dict[str, Callable[[], Any]] = {
    "NumPy float64": lambda: np.float64(0.1),
    "NumPy float32": lambda: np.float32(0.1),
    "NumPy array": lambda: np.array(0.1),
    "array": lambda: jnp.float32(0.1),
}
# With parameters that are trained, in float32 whatever the states are.
TRAINED: dict[str, Callable[..., Any]] = {
    "LIF": lambda **o: nn.LIF(3, tau=mu.Param(10.0), v_th=mu.Param(jnp.ones(3)), v_rest=mu.Param(0.2), **o),
    "ALIF": lambda **o: nn.ALIF(3, tau=10.0, tau_a=mu.Param(90.0), beta=mu.Param(jnp.full(3, 0.2)), **o),
    "LI": lambda **o: nn.LI(3, tau=mu.Param(10.0), v_rest=mu.Param(jnp.full(3, 0.2)), **o),
    "Izhikevich": lambda **o: nn.Izhikevich(3, a=mu.Param(0.02), d=mu.Param(jnp.full(3, 7.0)), **o),
    "HodgkinHuxley": lambda **o: nn.HodgkinHuxley(3, g_na=mu.Param(120.0), capacitance=mu.Param(jnp.ones(3)), **o),
    "Expon": lambda **o: nn.Expon(3, tau=mu.Param(5.0), **o),
    "DualExpon": lambda **o: nn.DualExpon(3, tau_decay=mu.Param(9.0), **o),
    "Alpha": lambda **o: nn.Alpha(3, tau=mu.Param(jnp.full(3, 5.0)), **o),
    "STP": lambda **o: nn.STP(3, u=mu.Param(0.3), tau_f=mu.Param(jnp.full(3, 50.0)), **o),
}


def input_of(name: str, dtype: Any = jnp.float32) -> jax.Array:
    spikes = jnp.asarray(np.random.default_rng(0).random((20, 3)) < 0.4, dtype)
    return spikes * {"Izhikevich": 30, "HodgkinHuxley": 15, "STP": 1}.get(name, 2)


def outputs(module: Any, x: Any, step: Any) -> Any:
    with nn.dt.set(step):
        return mu.for_loop(module, x), [state.value for state in module.states()]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", MODULES)
def test_whatever_number_the_step_is(name: str, step: str) -> None:
    x, run = input_of(name), mu.jit(outputs, static_argnames=())
    expected = outputs(MODULES[name](), x, 0.1)
    eager = MODULES[name]()
    with nn.dt.set(STEPS[step]()):
        one = eager(x[0])
    assert one.dtype == jnp.float32
    for out in (outputs(MODULES[name](), x, STEPS[step]()), run(MODULES[name](), x, jnp.asarray(STEPS[step]()))):
        for ours, theirs in zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True):
            assert ours.dtype == jnp.float32
            np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("made", [MODULES, TRAINED], ids=["numbers", "trained"])
def test_the_dtype_is_that_of_the_states(made: Any, name: str, step: str) -> None:
    x = input_of(name, jnp.bfloat16)
    out, states = outputs(made[name](dtype=jnp.bfloat16), x, STEPS[step]())
    wide = [state for state in states if state.dtype != jnp.bfloat16]
    rests = made is MODULES and name == "LIF"  # its refractory time is counted in float32
    assert out.dtype == jnp.bfloat16 and [state.dtype for state in wide] == [jnp.float32] * rests
    assert bool(jnp.isfinite(out).all())


@pytest.mark.parametrize("name", TRAINED)
def test_parameters_of_float32_in_neurons_of_float64(name: str) -> None:
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        out, _ = outputs(TRAINED[name](dtype=jnp.float64), input_of(name, jnp.float64), np.float32(0.125))
        again, _ = outputs(MODULES[name](dtype=jnp.float64), input_of(name, jnp.float64), 0.125)
        assert out.dtype == again.dtype == jnp.float64


@pytest.mark.parametrize("given", [-1.0, 0, float("nan"), float("inf"), None, True, "x", jnp.ones(3), np.float32(-0.5)])
def test_a_step_that_is_no_time(given: Any) -> None:
    for name in ("LIF", "Alpha"):
        with nn.dt.set(given), pytest.raises(ArgumentError, match=r"(?s)`nn.dt`.*no time.*nn\.dt\.set\(0\.1\)"):
            MODULES[name]()(jnp.ones(3))


@pytest.mark.parametrize("rest", [-65.0, np.full(3, -65.0, np.float32), mu.Param(-65.0), mu.Param(jnp.full(3, -65.0))])
def test_membranes_start_at_rest(rest: Any) -> None:
    for make in (lambda: nn.LIF(3, v_rest=rest), lambda: nn.LI(3, v_rest=rest), lambda: nn.ALIF(3, v_rest=rest)):
        module: Any = make()
        np.testing.assert_array_equal(module.v.value, np.full(3, -65.0))
        module(jnp.zeros(3))
        np.testing.assert_allclose(module.v.value, np.full(3, -65.0), rtol=1e-6)
        mu.reset(module, mu.Hidden, batch_shape=2)
        np.testing.assert_array_equal(module.v.value, np.full((2, 3), -65.0))


def test_neurons_that_are_made_in_compiled_code_start_at_rest() -> None:
    net = mu.jit(lambda rest: nn.LIF(3, v_rest=mu.Param(rest)))(jnp.float32(-65.0))
    np.testing.assert_array_equal(net.v.value, np.full(3, -65.0))
    several = mu.vmap(lambda rest: nn.LIF(3, v_rest=mu.Param(rest)))(jnp.array([-65.0, -70.0]))
    np.testing.assert_array_equal(several.v.value[:, 0], [-65.0, -70.0])


class Net(mu.Module):
    """Every module here, and a delay, one after the other."""

    def __init__(self) -> None:
        self.parts = [make() for make in MODULES.values()]
        self.delay = nn.Delay(3, max_steps=4)
        self.connection = nn.FixedProb(3, 3, 0.9, 0.5, rngs=mu.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.delay.push(x)
        late = self.connection(self.delay.at(2) + self.delay.at(1.25) + self.delay.at(jnp.array([0, 1, 4])))
        return jnp.stack([part(late) for part in self.parts])


def test_a_net_after_a_reset_to_a_batch_is_a_net_for_each() -> None:
    xs = jnp.asarray(np.random.default_rng(1).standard_normal((9, 5, 3)), jnp.float32)
    expected = []
    for n in range(5):
        net = Net()
        expected.append(mu.for_loop(net, xs[:, n]))
    net = Net()
    for batch in (5, (5,), 5):
        mu.reset(net, mu.Hidden, batch_shape=batch)
        np.testing.assert_allclose(mu.for_loop(net, xs), jnp.stack(expected, 2), rtol=1e-5, atol=1e-5)
    eager = Net()
    mu.reset(eager, mu.Hidden, batch_shape=(5,))
    for x, wanted in zip(xs, jnp.stack(expected, 2), strict=True):
        np.testing.assert_allclose(eager(x), wanted, rtol=1e-5, atol=1e-5)
    mu.reset(net, mu.Hidden)
    np.testing.assert_allclose(mu.for_loop(net, xs[:, 0]), expected[0], rtol=1e-5, atol=1e-5)


def test_membranes_start_at_the_rest_of_their_own_module() -> None:
    nets = mu.vmap(lambda rest: nn.LIF(3, v_rest=rest))(jnp.array([0.1, 0.2]))
    for batch in ((), (4,), (5, 2)):
        mu.reset(nets, mu.Hidden, batch_shape=batch)
        wanted = jnp.broadcast_to(jnp.array([0.1, 0.2]).reshape(2, *(1,) * (len(batch) + 1)), (2, *batch, 3))
        np.testing.assert_allclose(nets.v, wanted)
    mu.vmap(lambda net: mu.reset(net, mu.Hidden, batch_shape=4))(nets)
    np.testing.assert_allclose(nets.v[:, 0, 0], [0.1, 0.2])
    turned = mu.vmap(lambda rest: nn.LIF(3, v_rest=rest), out_axes=1)(jnp.arange(6.0).reshape(2, 3))
    mu.reset(turned, mu.Hidden, batch_shape=4)
    np.testing.assert_array_equal(turned.v[1], jnp.arange(6.0).reshape(2, 3))
    stack = nn.Stack([nn.LIF(3, v_rest=mu.Param(float(n))) for n in range(2)])
    mu.reset(stack, mu.Hidden)
    np.testing.assert_array_equal(stack.layer.v[:, 0], [0.0, 1.0])


def test_membranes_start_at_the_present_rest() -> None:
    net = nn.LIF(3, v_rest=mu.Param(-65.0))
    other = mu.clone(net)
    other.v_rest.value = jnp.float32(-70.0)
    for each in (net, other):
        mu.reset([each], mu.Hidden)
    assert (float(net.v[0]), float(other.v[0])) == (-65.0, -70.0)
    mu.jit(lambda net: mu.reset(net, mu.Hidden, batch_shape=2))(other)
    np.testing.assert_array_equal(other.v, jnp.full((2, 3), -70.0))
    with pytest.raises(mu.errors.DeferredStateError, match="as its module says"):
        mu.reset(net.v)


def test_a_unit_that_comes_later() -> None:
    u = pytest.importorskip("saiunit")
    ours, plain = nn.LIF(2), nn.LIF(2, tau=7.0)
    ours.tau = 7 * u.ms
    np.testing.assert_allclose(mu.for_loop(ours, jnp.ones((5, 2))), mu.for_loop(plain, jnp.ones((5, 2))))
    with pytest.raises(ArgumentError, match="unit that does not fit"):
        nn.Expon(3)(jnp.ones(3) * u.mS)
