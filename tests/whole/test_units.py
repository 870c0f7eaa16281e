"""Values with units (`saiunit.Quantity`) as states, arguments, attributes: each transform, optimizers, files, messages."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mutatis as mu
from mutatis import nn
from mutatis.errors import ArgumentError, CheckpointError, StateTypeError, StructureError

u = pytest.importorskip("saiunit")
pytestmark = pytest.mark.once  # saiunit is the same on both
mV, ms, volt = u.mV, u.ms, u.volt
NEW = hasattr(u, "__version__") and tuple(map(int, u.__version__.split(".")[:2])) >= (
    0,
    6,
)  # it takes what is like an array
XS = jnp.linspace(0.5, 1.5, 10).reshape(5, 2)


class Leak(mu.Module):
    """A membrane in millivolts, with a parameter in millivolts and a time constant in milliseconds."""

    def __init__(self, unit: Any = mV) -> None:
        self.w = mu.Param(jnp.array([1.0, 2.0]) * unit)
        self.v = mu.Hidden(jnp.zeros(2) * unit, init=lambda: jnp.zeros(2) * unit)
        self.tau = mu.Buffer(jnp.float32(10.0) * ms)

    def __call__(self, x: Any) -> Any:
        self.v.value = self.v.value + (self.w.value * x - self.v.value) * (1.0 * ms / self.tau.value)
        return self.v.value


class Plain(mu.Module):
    """The same without units."""

    def __init__(self) -> None:
        self.w = mu.Param(jnp.array([1.0, 2.0]))
        self.v = mu.Hidden(jnp.zeros(2), init=lambda: jnp.zeros(2))

    def __call__(self, x: Any) -> Any:
        self.v.value = self.v.value + (self.w.value * x - self.v.value) * (1.0 / 10.0)
        return self.v.value


def check(found: Any, wanted: Any, unit: Any = mV) -> None:
    """A quantity has this unit, and these numbers in it."""
    assert isinstance(found, u.Quantity) and found.unit == unit
    np.testing.assert_allclose(found.mantissa, wanted, rtol=1e-6)


def squares(net: Any, xs: Any = XS, one: Any = mV) -> Any:
    mu.reset(net, mu.Hidden)
    return jnp.sum((mu.for_loop(net, xs) / one) ** 2)


PLAIN = functools.partial(squares, one=1.0)


# Values


@pytest.mark.parametrize("kind", [mu.Variable, mu.Param, mu.Hidden, mu.Buffer])
def test_a_quantity_is_a_value(kind: Any) -> None:
    state = kind(jnp.arange(3.0) * mV)
    check(state.value, [0, 1, 2])
    check(state + 1.0 * mV, [1, 2, 3])
    if NEW:
        check(1.0 * mV + state, [1, 2, 3])
    check(state * 2.0, [0, 2, 4])
    check(state[1], 1)
    state += 1.0 * mV
    state[0] = 5.0 * mV
    check(state.value, [5, 2, 3])
    assert state.shape == (3,)


@pytest.mark.parametrize("number", [2.0, np.float32(2.0), np.full((2,), 2.0, np.float32)])
def test_numbers_with_a_unit_become_arrays(number: Any) -> None:
    state = mu.Variable(u.Quantity(number, unit=mV))
    assert isinstance(state.value.mantissa, jax.Array) and state.value.dtype == jnp.float32
    check(state.value, number)


def test_an_array_with_a_unit_as_attribute() -> None:
    class Net(mu.Module):
        def __init__(self) -> None:
            self.scale = jnp.ones(2) * mV

    net = Net()

    @mu.jit
    def grow(net: Net) -> Any:
        net.scale = net.scale + 1.0 * mV
        return net.scale * 2.0

    check(grow(net), [4, 4])
    check(net.scale, [2, 2])
    assert "scale=Buffer(Quantity[Unit" in repr(net)


def test_a_unit_and_a_static_quantity_as_attributes() -> None:
    class Net(mu.Module):
        def __init__(self) -> None:
            self.unit = mV
            self.tau = mu.static(10.0 * ms)

        def __call__(self, x: Any) -> Any:
            return x * self.unit, x * self.tau

    found = mu.jit(Net())(jnp.ones(2))
    check(found[0], [1, 1])
    check(found[1], [10, 10], ms)


# Transforms


@pytest.mark.parametrize("captured", [False, True])
def test_jit(captured: bool) -> None:
    net, plain = Leak(), Plain()
    step = mu.jit(lambda x: net(x)) if captured else functools.partial(mu.jit(lambda net, x: net(x)), net)
    for x in XS:
        check(step(x), plain(x))
    check(net.v.value, plain.v.value)


def test_arguments_and_what_is_captured() -> None:
    total, offset = mu.Variable(jnp.zeros(2) * mV), jnp.ones(2) * mV

    @mu.jit
    def add(x: Any) -> Any:
        total.value = total.value + offset + x
        return x * 2.0

    check(add(2.0 * mV), 4)
    check(add(3.0 * mV), 6)
    assert len(mu.inspect.explain(add).compilations) == 1
    check(add(jnp.float32(1.0) * volt), 2, volt)
    check(total.value, [1008, 1008])
    offset = jnp.ones(2) * volt
    add(0.0 * mV)
    check(total.value, [2008, 2008])
    text = str(mu.inspect.explain(add))
    assert "mV" in text and 'Unit("V")' in text


def test_loops() -> None:
    net, plain = Leak(), Plain()
    check(mu.for_loop(net, XS), mu.for_loop(plain, XS))
    with_xs = mu.scan(lambda c, x: (c + net(x / mV), c), jnp.zeros(2) * mV, XS * mV)
    wanted = mu.scan(lambda c, x: (c + plain(x), c), jnp.zeros(2), XS)
    for mine, theirs in zip(with_xs, wanted, strict=True):
        check(mine, theirs)
    check(
        mu.while_loop(lambda c: (c < 9.0 * mV).all(), lambda c: c + net(XS[0]), jnp.zeros(2) * mV),
        mu.while_loop(lambda c: (c < 9.0).all(), lambda c: c + plain(XS[0]), jnp.zeros(2)),
    )
    check(
        mu.fori_loop(0, 3, lambda i, c: c + net(XS[0]), jnp.zeros(2) * mV),
        mu.fori_loop(0, 3, lambda i, c: c + plain(XS[0]), jnp.zeros(2)),
    )
    check(mu.map(lambda x: x * 2.0, XS * mV), XS * 2)
    check(net.v.value, plain.v.value)


def test_branches() -> None:
    net, plain = Leak(), Plain()
    for flag in (True, False):
        found = mu.cond(jnp.bool_(flag), lambda: net(XS[0]), lambda: net.v.value * 2.0)
        check(found, mu.cond(jnp.bool_(flag), lambda: plain(XS[0]), lambda: plain.v.value * 2.0))
    check(mu.switch(jnp.int32(1), [lambda: 0.0 * net.v.value, lambda: net(XS[1])]), plain(XS[1]))
    check(net.v.value, plain.v.value)


def test_vmap() -> None:
    several = mu.vmap(lambda _: Leak())(jnp.arange(3))
    found = mu.vmap(lambda net, x: net(x))(several, XS[:3])
    check(found, mu.vmap(lambda net, x: net(x))(mu.vmap(lambda _: Plain())(jnp.arange(3)), XS[:3]))
    net, lanes = Leak(), mu.StateAxes({mu.Hidden: 0, ...: None})
    mu.reset(net, mu.Hidden, batch_shape=(5,))
    check(mu.vmap(lambda net, x: net(x), in_axes=(lanes, 0))(net, XS), 0.1 * XS * jnp.array([[1.0, 2.0]]))
    assert net.v.value.shape == (5, 2)


def test_abstract_evaluation() -> None:
    shapes = mu.eval_shape(Leak)
    assert shapes.w.value.unit == mV and isinstance(shapes.w.value.mantissa, jax.ShapeDtypeStruct)
    assert len(mu.make_jaxpr(Leak())(XS[0]).jaxpr.outvars) == 2
    pure, state = mu.functionalize(Leak())
    check(jax.jit(pure)(state, XS[0])[0], Plain()(XS[0]))


# Derivatives. As with `jax.grad`, a gradient has the structure of what it is for: its numbers are those in the units of the
# parameter and of the result, and the unit that it shows is the one of the parameter.


@pytest.mark.parametrize(
    "gradient",
    [
        mu.grad,
        lambda f: mu.jit(mu.grad(f)),
        lambda f: lambda net: mu.grad(lambda: f(net), of=net)(),
        lambda f: mu.grad(mu.remat(f)),
        lambda f: lambda net: mu.value_and_grad(f)(net)[1],
        lambda f: lambda net: mu.grad(lambda net: (f(net), net.v.value), has_aux=True)(net)[0],
        lambda f: lambda net: mu.vjp(f, net)[1](jnp.float32(1.0))[0],
        mu.jacrev,
        mu.jacfwd,
    ],
)
def test_gradients(gradient: Any) -> None:
    found, wanted = gradient(squares)(Leak()), mu.grad(PLAIN)(Plain())
    check(found["w"], wanted["w"])
    assert "w: Param Quantity[Unit" in repr(found)


def test_gradients_of_long_loops() -> None:
    def loss(net: Leak) -> Any:
        mu.reset(net, mu.Hidden)
        return jnp.sum((mu.for_loop(net, XS, checkpoint_every=2) / mV) ** 2)

    check(mu.grad(loss)(Leak())["w"], mu.grad(PLAIN)(Plain())["w"])


def test_gradients_by_arguments() -> None:
    def loss(x: Any, y: Any) -> Any:
        return jnp.sum((x * y / mV) ** 2)

    check(mu.grad(loss, argnums=1)(2.0, jnp.ones(2) * mV), [8, 8])
    check(jax.grad(loss, argnums=1)(2.0, jnp.ones(2) * mV), [8, 8])
    check(mu.grad(lambda x: (x / mV) ** 2)(3.0 * mV), 6)
    (value, rest), gradients = mu.value_and_grad(lambda net: (squares(net), net.v.value), has_aux=True)(Leak())
    np.testing.assert_allclose(value, PLAIN(Plain()), rtol=1e-6)
    assert rest.unit == gradients["w"].unit == mV


@pytest.mark.parametrize("jvp", [False, True])
def test_custom_derivatives(jvp: bool) -> None:
    double: Any = (mu.custom_jvp if jvp else mu.custom_vjp)(lambda x: x * 2.0)
    if jvp:
        double.defjvp(lambda primals, tangents: (primals[0] * 2.0, tangents[0] * 3.0))
    else:
        double.defvjp(lambda x: (x * 2.0, None), lambda _, g: (g * 3.0,))
    check(mu.grad(lambda x: jnp.sum(double(x) / mV))(jnp.ones(2) * mV), [3, 3])


# Optimizers


@pytest.mark.parametrize(
    "make",
    [
        lambda: optax.sgd(0.1),
        lambda: optax.sgd(0.1, momentum=0.9),
        lambda: optax.rmsprop(0.1),
        lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.add_decayed_weights(0.1), optax.sgd(0.1)),
        lambda: optax.adam(0.1),
    ],
)
def test_optimizers(make: Any) -> None:
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam needs it
        _optimize(make)


def _optimize(make: Any) -> None:
    net, plain = Leak(), Plain()
    optimizer, other = mu.Optimizer(net, make()), mu.Optimizer(plain, make())

    @mu.jit
    def step(net: Leak, optimizer: mu.Optimizer) -> Any:
        value, gradients = mu.value_and_grad(squares)(net)
        optimizer.update(gradients)
        return value

    for _ in range(3):
        np.testing.assert_allclose(step(net, optimizer), PLAIN(plain), rtol=1e-5)
        other.update(mu.grad(PLAIN)(plain))
    assert net.w.value.unit == mV
    np.testing.assert_allclose(net.w.value.mantissa, plain.w.value, rtol=1e-5)


# Models as a whole


def test_checkpoints(tmp_path: Path) -> None:
    net, other = Leak(), Leak()
    mu.for_loop(net, XS)
    net.w.value = 3.0 * net.w.value
    mu.checkpoint.save(tmp_path / "net", net)
    mu.checkpoint.restore(tmp_path / "net", other)
    assert mu.state(other) == mu.state(net)
    check(other.w.value, [3, 6])


def test_a_file_alone_does_not_make_quantities(tmp_path: Path) -> None:
    mu.checkpoint.save(tmp_path / "net", Leak())
    with pytest.raises(CheckpointError, match=r"is a Quantity\[Unit\(\"ms\"\)\], which cannot be made from a file"):
        mu.checkpoint.load(tmp_path / "net")


def test_states_split_clone_and_roll_back() -> None:
    net = Leak()
    assert mu.state(net) == mu.state(Leak()) != mu.state(Leak(volt))
    copy, clone, kept = mu.merge(*mu.split(net)), mu.clone(net), mu.snapshot(net)
    net(XS[0])
    assert mu.state(copy) == mu.state(clone) == mu.state(Leak()) != mu.state(net)
    kept.restore()
    with pytest.raises(KeyError), mu.transaction():
        net.v.value = jnp.ones(2) * ms
        raise KeyError
    check(net.v.value, [0, 0])
    mu.update(net, {"w": jnp.ones(2) * mV})
    check(net.w.value, [1, 1])


def test_printing() -> None:
    net = Leak()
    assert repr(net) == (
        "Leak(  # 2 parameters, 20 B in 3 states\n"
        '  w=Param(Quantity[Unit("mV")](float32[2])),\n'
        '  v=Hidden(Quantity[Unit("mV")](float32[2])),\n'
        '  tau=Buffer(Quantity[Unit("ms")](float32[])),\n'
        ")"
    )
    assert 'w: Param Quantity[Unit("mV")](float32[2])' in repr(mu.state(net))
    assert "20 B" in str(mu.inspect.state_table(net))
    assert "float32[2]" in str(mu.inspect.tabulate(net, XS[0]))
    ledger = str(mu.inspect.ledger(lambda net, x: net(x))(net, XS[0]))
    assert "net.v" in ledger and 'Quantity[Unit("mV")](float32[2])' in ledger


def test_records_and_contexts() -> None:
    net = Leak()
    monitor = mu.recording.Monitor(net, "v", length=5)

    def step(x: Any) -> None:
        net(x)
        monitor()

    mu.for_loop(step, XS)
    check(monitor.state["v"], mu.for_loop(Plain(), XS))
    time = mu.Context("time")
    double = mu.jit(lambda: time.get() * 2.0)
    with time.set(jnp.float32(0.1) * ms):
        check(double(), 0.2, ms)


# Errors


def into_loop(body: Callable[[], Any]) -> None:
    mu.for_loop(lambda x: body(), XS)


WHERE: list[Callable[[Callable[[], Any]], Any]] = [
    into_loop,
    lambda body: mu.scan(lambda c, x: (c, body()), None, XS),
    lambda body: mu.fori_loop(0, 3, lambda i, c: (c, body())[0], 0),
    lambda body: mu.while_loop(lambda c: c < 3, lambda c: (c + 1, body())[0], 0),
    lambda body: mu.cond(jnp.bool_(True), body, lambda: None),
    lambda body: mu.switch(jnp.int32(0), [body, lambda: None]),
    lambda body: mu.jit(lambda: into_loop(body))(),
]


@pytest.mark.parametrize("given", [ms, volt, 1.0])
@pytest.mark.parametrize("run", WHERE)
def test_a_state_keeps_its_unit_in_loops_and_branches(run: Any, given: Any) -> None:
    state, count = mu.Variable(jnp.zeros(2) * mV), mu.Variable(0)

    def body() -> None:
        count.value += 1
        state.value = jnp.ones(2) * given

    with pytest.raises(StateTypeError) as caught:
        run(body)
    text = str(caught.value)
    assert "`state`" in text and "test_units.py" in text
    assert 'expected: Quantity[Unit("mV")](float32[2])' in text
    assert {ms: 'got:      Quantity[Unit("ms")]', volt: 'got:      Quantity[Unit("V")]'}.get(
        given, "float32[2]"
    ) in text
    check(state.value, [0, 0])
    assert count.value == 0


def test_branches_return_one_unit() -> None:
    with pytest.raises(StructureError, match=r'(?s)Unit\("ms"\).*Unit\("mV"\)'):
        mu.cond(jnp.bool_(True), lambda: 1.0 * mV, lambda: 1.0 * ms)


@pytest.mark.parametrize("value", [jnp.ones(2) * ms, jnp.ones(2) * volt, jnp.ones(2)])
def test_values_of_another_unit_do_not_fit(value: Any) -> None:
    net = Leak()
    with pytest.raises(StateTypeError, match=r'(?s)nothing was written.*w: expected Quantity\[Unit\("mV"\)\].*, got'):
        mu.update(net, {"w": value})
    check(net.w.value, [1, 2])


@pytest.mark.parametrize(
    "run",
    [
        *WHERE,
        lambda body: body(),
        lambda body: mu.jit(body)(),
        lambda body: mu.remat(body)(),
        lambda body: mu.vmap(lambda x: body())(XS),
        lambda body: mu.grad(lambda x: (x, body())[0])(1.0),
        lambda body: mu.eval_shape(body),
    ],
)
def test_units_that_do_not_match(run: Any) -> None:
    state, count = mu.Variable(jnp.zeros(2) * mV), mu.Variable(0)

    def body() -> None:
        count.value += 1
        state.value = state.value + 1.0 * ms

    with pytest.raises(u.UnitMismatchError, match=r"units do not match: mV != ms") as caught, mu.transaction():
        run(body)
    assert type(caught.value) is u.UnitMismatchError
    assert caught.traceback[-1].path != Path(__file__) and "body" in [entry.name for entry in caught.traceback]
    check(state.value, [0, 0])
    assert count.value == 0


def test_the_operators_of_a_state() -> None:
    state = mu.Variable(jnp.zeros(2) * mV)
    uses: list[Callable[[], Any]] = [lambda: state + 1.0 * ms, lambda: 1.0 * ms + state, lambda: state.value < 1.0 * ms]
    for use in uses:
        with pytest.raises(u.UnitMismatchError, match=r"mV.*ms|ms.*mV"):
            use()
    with pytest.raises(u.UnitMismatchError, match="do not match"):
        state += 1.0 * ms
    check(state.value, [0, 0])


# Beside BrainState


def test_as_in_brainstate() -> None:
    brainstate = pytest.importorskip("brainstate")
    net = Leak()
    weight = brainstate.ParamState(jnp.array([1.0, 2.0]) * mV)
    membrane = brainstate.HiddenState(jnp.zeros(2) * mV)

    def step(x: Any) -> Any:
        membrane.value = membrane.value + (weight.value * x - membrane.value) * (1.0 * ms / (jnp.float32(10.0) * ms))
        return membrane.value

    def loss(xs: Any) -> Any:
        membrane.value = jnp.zeros(2) * mV
        return jnp.sum((brainstate.transform.for_loop(step, xs) / mV) ** 2)

    theirs, value = brainstate.transform.grad(loss, weight, return_value=True)(XS)
    mine = mu.value_and_grad(squares)(net)
    np.testing.assert_allclose(mine[0], value, rtol=1e-6)
    check(mine[1]["w"], theirs.mantissa, theirs.unit)
    check(net.v.value, membrane.value.mantissa)


@pytest.mark.parametrize("unit", [volt, ms])
def test_a_checkpoint_knows_its_units(tmp_path: Path, unit: Any) -> None:
    mu.checkpoint.save(tmp_path / "net", Leak())
    net = Leak(unit)
    try:
        mu.checkpoint.restore(tmp_path / "net", net)
    except CheckpointError as error:
        assert "mV" in str(error)  # noqa: PT017
    else:
        assert unit is volt
        check(net.w.value, [0.001, 0.002], volt)


@pytest.mark.parametrize("loop", ["scan", "while_loop", "fori_loop"])
def test_a_carry_of_another_unit(loop: str) -> None:
    start = jnp.zeros(2) * mV
    with pytest.raises(StateTypeError, match=r'(?s)Unit\("mV"\).*Unit\("ms"\)'):
        if loop == "scan":
            mu.scan(lambda c, x: (x * ms, None), start, XS)
        elif loop == "while_loop":
            mu.while_loop(lambda c: jnp.bool_(True), lambda c: c / mV * ms, start)
        else:
            mu.fori_loop(0, 3, lambda i, c: c / mV * ms, start)


def test_the_cure_for_another_unit() -> None:
    state = mu.Variable(jnp.zeros(2) * mV)
    with pytest.raises(StateTypeError) as caught:
        into_loop(lambda: setattr(state, "value", jnp.ones(2) * volt))
    assert "astype" not in str(caught.value)


@pytest.mark.parametrize("run", [lambda body: body(), lambda body: mu.jit(body)()])
def test_another_unit_outside_of_loops(run: Any) -> None:
    """There a state takes a value of any type, as it takes another shape: a quantity says by itself what it means."""
    state = mu.Variable(jnp.zeros(2) * mV)
    run(lambda: setattr(state, "value", jnp.ones(2) * ms))
    check(mu.jit(lambda: state.value * 2.0)(), 2.0, ms)


@pytest.mark.parametrize("number", [10.0, 10, np.float32(10.0)])
def test_a_number_with_a_unit_as_attribute(number: Any) -> None:
    class Net(mu.Module):
        def __init__(self) -> None:
            self.tau = number * ms

    check(mu.jit(lambda net: net.tau * 1)(Net()), 10.0, ms)


def test_a_number_with_a_unit_in_a_context() -> None:
    time = mu.Context("time")
    with time.set(0.1 * ms):
        check(mu.jit(lambda: time.get() * 2.0)(), 0.2, ms)


def test_a_loss_with_a_unit() -> None:
    with pytest.raises(StructureError, match=r'Unit\("mV\^2"\)|mV \* mV|mV\^2'):
        mu.grad(lambda net: jnp.sum(net.w.value.mantissa) * mV * mV)(Leak())


@pytest.mark.parametrize("linearize", [False, True])
def test_tangents_of_a_model(linearize: bool) -> None:
    net, tangent = Leak(), mu.state(Leak(), mu.Param)
    if linearize:
        found = mu.linearize(lambda net: net(XS[0]), net)[1](tangent)
    else:
        found = mu.jvp(lambda net: net(XS[0]), (net,), (tangent,))[1]
    check(found, Plain()(XS[0]))


def test_perturbations() -> None:
    class Net(mu.Module):
        def __call__(self, x: Any) -> Any:
            return mu.perturb(self, "hidden", x * mV)

    net = Net()
    check(net(XS[0]), XS[0])
    check(mu.grad(lambda net: jnp.sum(net(XS[0]) / mV), wrt=mu.Perturbation)(net)["hidden"], [1, 1])


def test_averages_of_parameters() -> None:
    net = Leak()
    average = mu.optim.EMA(net, 0.5)
    net.w.value = 3.0 * net.w.value
    average.update()
    assert average is not None


def test_the_ledger_of_a_loop() -> None:
    net = Leak()
    ledger = mu.inspect.ledger(lambda xs: mu.for_loop(net, xs) / mV)(XS)
    assert ledger["net.v"].updates == 5


@pytest.mark.parametrize(
    "use",
    [
        lambda: check(nn.exp_euler(lambda v: -v / (10.0 * ms), jnp.ones(2) * mV, 1.0 * ms), np.full(2, np.exp(-0.1))),
        lambda: check(nn.rk4(lambda v: -v / (10.0 * ms), jnp.ones(2) * mV, 1.0 * ms), np.full(2, np.exp(-0.1))),
        lambda: nn.LIF(3, tau=10.0 * ms),
        lambda: nn.Delay(2, 3).push(jnp.ones(2) * mV),
    ],
    ids=["exp_euler", "rk4", "LIF", "Delay"],
)
def test_time_with_units(use: Any) -> None:
    use()


@pytest.mark.parametrize("layer", [lambda: nn.Linear(2, 3, rngs=mu.Rngs(0)), lambda: nn.LIF(2)])
def test_layers_refuse_quantities_clearly(layer: Any) -> None:
    with pytest.raises(ArgumentError, match="unit"):
        layer()(jnp.ones(2) * u.amp)
