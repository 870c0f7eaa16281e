"""`mu.scan`, `mu.for_loop`, `mu.while_loop`, `mu.fori_loop` beside `jax.lax` threaded by hand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import errors

XS = jnp.linspace(-1, 1, 5)


class Cell(mu.Module):
    def __init__(self, w: Any = 0.5) -> None:
        self.w = mu.Param(jnp.float32(w))
        self.h = mu.Hidden(jnp.zeros(2))
        self.n = mu.Variable(0)
        self.unused = mu.Cache(0)

    def __call__(self, x: Any) -> Any:
        self.h.value = jnp.tanh(self.w.value * self.h.value + x)
        self.n += 1
        return self.h.value.sum()


def hand(s: dict[str, Any], x: Any) -> Any:
    h = jnp.tanh(s["w"] * s["h"] + x)
    return {"w": s["w"], "h": h, "n": s["n"] + 1}, h.sum()


def start(w: float = 0.5) -> dict[str, Any]:
    return {"w": jnp.float32(w), "h": jnp.zeros(2), "n": jnp.int32(0)}


def check(cell: Cell, state: dict[str, Any]) -> None:
    for name, value in state.items():
        np.testing.assert_allclose(getattr(cell, name).value, value, rtol=1e-5, err_msg=name)
        assert getattr(cell, name).dtype == value.dtype


def around(f: Any, compiled: bool) -> Any:
    return mu.jit(f) if compiled else f


compiled_or_not = pytest.mark.parametrize("compiled", [False, True])


# -- scan --------------------------------------------------------------------------------------------------------


@compiled_or_not
@pytest.mark.parametrize(
    "options",
    [{}, {"reverse": True}, {"unroll": 2}, {"unroll": True}, {"length": 5}, {"_split_transpose": True}],
    ids=str,
)
def test_scan(options: Any, compiled: bool) -> None:
    cell, state = Cell(), start()
    run = around(lambda: mu.scan(lambda c, x: (c + x, cell(x)), jnp.float32(1), XS, **options), compiled)
    for _ in range(2):

        def body(c: Any, x: Any) -> Any:
            s, y = hand(c[1], x)
            return (c[0] + x, s), y

        (total, state), expected = jax.lax.scan(body, (jnp.float32(1), state), XS, **options)
        out, ys = run()
        np.testing.assert_allclose(out, total, rtol=1e-5)
        np.testing.assert_allclose(ys, expected, rtol=1e-5)
        check(cell, state)


@compiled_or_not
@pytest.mark.parametrize("form", ["closure", "carry", "method", "module as body"])
def test_where_the_state_comes_from(form: str, compiled: bool) -> None:
    cell = Cell()

    class Body(mu.Module):
        def __init__(self) -> None:
            self.cell = cell

        def __call__(self, c: Any, x: Any) -> Any:
            return c, self.cell(x)

        def body(self, c: Any, x: Any) -> Any:
            return c, self.cell(x)

    body = Body()
    run: Any = {
        "closure": lambda: mu.scan(lambda c, x: (c, cell(x)), None, XS),
        "carry": lambda: mu.scan(lambda c, x: (c, c[0](x)), (cell, 1.0), XS),
        "method": lambda: mu.scan(body.body, None, XS),
        "module as body": lambda: mu.scan(body, None, XS),
    }[form]
    carry, ys = around(run, compiled)()
    state, expected = jax.lax.scan(hand, start(), XS)
    np.testing.assert_allclose(ys, expected, rtol=1e-5)
    check(cell, state)
    if form == "carry":
        assert carry[0] is cell


def stack(n: int = 3) -> tuple[Cell, dict[str, Any]]:
    ws = jnp.linspace(0.1, 0.9, n)
    return mu.vmap(Cell)(ws), {"w": ws, "h": jnp.zeros((n, 2)), "n": jnp.zeros(n, jnp.int32)}


@compiled_or_not
@pytest.mark.parametrize("reverse", [False, True])
def test_scan_over_layers(reverse: bool, compiled: bool) -> None:
    layers, state = stack()
    run = around(lambda layers: mu.scan(lambda c, m: (m(c), c), jnp.float32(1), layers, reverse=reverse), compiled)

    def body(c: Any, s: Any) -> Any:
        new, y = hand(s, c)
        return y, (new, c)

    for _ in range(2):
        out, (state, expected) = jax.lax.scan(body, jnp.float32(1), state, reverse=reverse)
        got, ys = run(layers)
        np.testing.assert_allclose(got, out, rtol=1e-5)
        np.testing.assert_allclose(ys, expected, rtol=1e-5)
        check(layers, state)


def test_layers_beside_arrays() -> None:
    layers, state = stack()
    xs = {"m": layers, "x": XS[:3]}
    _, ys = mu.scan(lambda c, x: (c, x["m"](x["x"])), None, xs)
    _, expected = jax.vmap(hand)(state, XS[:3])
    np.testing.assert_allclose(ys, expected, rtol=1e-5)


@compiled_or_not
def test_axes_mix(compiled: bool) -> None:
    layers, state = stack()
    layers.n.value = 0

    def run() -> Any:
        axes = mu.StateAxes({mu.Param: 0, mu.Hidden: 0, "variables": mu.Carry})
        return mu.scan(lambda c, m: (m(c), c), jnp.float32(1), layers, states=axes)

    out, _ = around(run, compiled)()
    assert int(layers.n) == 3

    def body(c: Any, s: Any) -> Any:
        new, y = hand({**s, "n": 0}, c)
        return y, new["h"]

    expected, h = jax.lax.scan(body, jnp.float32(1), {"w": state["w"], "h": state["h"]})
    np.testing.assert_allclose(out, expected, rtol=1e-5)
    np.testing.assert_allclose(layers.h, h, rtol=1e-5)


def test_another_axis() -> None:
    table = mu.Buffer(jnp.arange(6.0).reshape(2, 3))

    def body(c: Any, _: Any) -> Any:
        table.value = table + 1
        return c, table.value.sum()

    _, ys = mu.scan(body, None, None, states=mu.StateAxes({mu.Buffer: 1}))
    np.testing.assert_array_equal(ys, [5, 7, 9])
    np.testing.assert_array_equal(table, jnp.arange(6.0).reshape(2, 3) + 1)


@compiled_or_not
def test_gradients_through_scan(compiled: bool) -> None:
    cell = Cell()
    grad = mu.grad(lambda x: mu.scan(lambda c, y: (c + cell(x * y), None), jnp.float32(0), XS)[0], argnums=0, of=cell)

    def raw(w: Any, x: Any) -> Any:
        def body(c: Any, y: Any) -> Any:
            s, out = hand(c[1], x * y)
            return (c[0] + out, s), None

        return jax.lax.scan(body, (jnp.float32(0), {**start(), "w": w}), XS)[0][0]

    of, x = around(grad, compiled)(0.7)
    expected = jax.grad(raw, (0, 1))(jnp.float32(0.5), 0.7)
    np.testing.assert_allclose(of["w"], expected[0], rtol=1e-5)
    np.testing.assert_allclose(x, expected[1], rtol=1e-5)
    assert int(cell.n) == 5


def test_no_carry_and_no_length() -> None:
    n = mu.Variable(0)

    def body(c: Any, x: Any) -> Any:
        n.value += 1
        return c, None

    assert mu.scan(body, None, length=4) == (None, None)
    assert int(n) == 4
    assert mu.scan(body, (), XS) == ((), None)
    assert int(n) == 9
    mu.scan(body, None, jnp.zeros((0,)))
    assert int(n) == 9
    mu.scan(body, None, length=0)
    assert int(n) == 9


@pytest.mark.parametrize(
    "call",
    [
        lambda f: mu.scan(f, None),
        lambda f: mu.scan(f, None, XS, length=4),
        lambda f: mu.scan(f, None, (XS, XS[:2])),
        lambda f: mu.for_loop(f, XS, XS[:3]),
    ],
)
def test_lengths_have_to_agree(call: Any) -> None:
    n = mu.Variable(0)

    def f(*_: Any) -> Any:
        n.value += 1
        return None, None

    with pytest.raises(errors.ArgumentError, match="number of iterations cannot be told"):
        call(f)
    assert int(n) == 0


def test_xs_that_are_scalars_are_refused() -> None:
    with pytest.raises((TypeError, ValueError)):
        mu.scan(lambda c, x: (c, x), None, 3.0)
    with pytest.raises((TypeError, ValueError)):
        mu.scan(lambda c, x: (c, x), None, (XS, jnp.float32(1)))


def test_keys_in_the_carry() -> None:
    f = lambda key, _: (jax.random.split(key)[0], jax.random.normal(key))  # noqa: E731
    mine, theirs = mu.scan(f, jax.random.key(0), length=3), jax.lax.scan(f, jax.random.key(0), length=3)
    np.testing.assert_array_equal(mine[1], theirs[1])


# -- for_loop ----------------------------------------------------------------------------------------------------


@compiled_or_not
@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"unroll": 2}], ids=str)
def test_for_loop(options: Any, compiled: bool) -> None:
    cell = Cell()
    ys = around(lambda: mu.for_loop(lambda x, z: cell(x * z), XS, XS, **options), compiled)()
    state, expected = jax.lax.scan(hand, start(), XS * XS, **options)
    np.testing.assert_allclose(ys, expected, rtol=1e-5)
    check(cell, state)


def test_for_loop_without_arguments() -> None:
    cell = Cell()
    assert mu.for_loop(lambda: cell(1.0), length=3).shape == (3,)
    assert int(cell.n) == 3


# -- while_loop --------------------------------------------------------------------------------------------------


@compiled_or_not
def test_while_loop(compiled: bool) -> None:
    cell = Cell()
    run = around(
        lambda x: mu.while_loop(lambda c: (cell.n < 4) & (c < 10), lambda c: c + jnp.abs(cell(x)), jnp.float32(0)),
        compiled,
    )

    def body(c: Any) -> Any:
        s, y = hand(c[1], 0.3)
        return c[0] + jnp.abs(y), s

    expected, state = jax.lax.while_loop(lambda c: (c[1]["n"] < 4) & (c[0] < 10), body, (jnp.float32(0), start()))
    np.testing.assert_allclose(run(0.3), expected, rtol=1e-5)
    check(cell, state)
    assert float(run(0.3)) == 0, "the condition does not hold any more"
    check(cell, state)


def test_a_while_loop_over_a_module_in_the_carry() -> None:
    cell = Cell()
    out = mu.while_loop(lambda c: c[0].n < 3, lambda c: (c[0], c[0](1.0)), (cell, jnp.float32(0)))
    assert out[0] is cell
    assert int(cell.n) == 3


@pytest.mark.parametrize("result", [lambda n: (n < 3, n < 3), lambda n: None, lambda n: n.value])
def test_a_condition_has_to_give_a_boolean(result: Any) -> None:
    n = mu.Variable(0)

    def body(c: Any) -> Any:
        n.value += 1
        return c

    with pytest.raises((errors.StructureError, TypeError)):
        mu.while_loop(lambda c: result(n), body, 0)
    assert int(n) == 0


def test_a_condition_that_draws_writes() -> None:
    rngs = mu.Rngs(0)
    with pytest.raises(errors.StructureError, match="written by the condition") as caught:
        mu.while_loop(lambda c: jax.random.uniform(rngs()) < 0.5, lambda c: c + 1, 0)
    assert "default" in caught.value.path
    assert int(rngs.default.value["count"]) == 0


# -- fori_loop ---------------------------------------------------------------------------------------------------


@compiled_or_not
@pytest.mark.parametrize(
    ("lower", "upper"), [(0, 4), (2, 5), (3, 3), (5, 2), (-2, 2), (jnp.int32(0), jnp.int32(4)), (np.int64(1), 3)]
)
def test_fori_loop(lower: Any, upper: Any, compiled: bool) -> None:
    cell = Cell()
    run = around(
        lambda: mu.fori_loop(lower, upper, lambda i, c: c + cell(i.astype(jnp.float32)), jnp.float32(0)), compiled
    )

    def body(i: Any, c: Any) -> Any:
        s, y = hand(c[1], i.astype(jnp.float32))
        return c[0] + y, s

    expected, state = jax.lax.fori_loop(lower, upper, body, (jnp.float32(0), start()))
    np.testing.assert_allclose(run(), expected, rtol=1e-5)
    check(cell, state)


def test_fori_loop_with_traced_bounds_and_unroll() -> None:
    cell = Cell()
    run = mu.jit(lambda n: mu.fori_loop(0, n, lambda i, c: c + cell(0.1), jnp.float32(0)))
    for n in (2, 3):
        run(n)
    assert int(cell.n) == 5
    mu.fori_loop(0, 4, lambda i, c: c + cell(0.1), jnp.float32(0), unroll=2)
    assert int(cell.n) == 9


def test_gradients_through_fori_loop_with_fixed_bounds() -> None:
    w = mu.Param(jnp.float32(2))
    grads = mu.grad(lambda: mu.fori_loop(0, 3, lambda i, c: c * w.value, jnp.float32(1)), of=w)()
    assert float(grads[()]) == 12


# -- all loops ---------------------------------------------------------------------------------------------------


LOOPS: dict[str, Any] = {
    "scan": lambda f: mu.scan(lambda c, x: (f(), (c, x))[1], None, XS),
    "for_loop": lambda f: mu.for_loop(lambda x: f(), XS),
    "while_loop": lambda f: mu.while_loop(lambda c: c < 3, lambda c: (f(), c + 1)[1], 0),
    "fori_loop": lambda f: mu.fori_loop(0, 3, lambda i, c: (f(), c)[1], 0),
    "fori_loop, traced": lambda f: mu.fori_loop(jnp.int32(0), jnp.int32(3), lambda i, c: (f(), c)[1], 0),
    "map": lambda f: mu.map(lambda x: f(), XS),
}


@pytest.mark.parametrize("name", LOOPS)
@compiled_or_not
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m, "new", mu.Cache(0)), r"`m\.new` was changed in the body"),
        (lambda m: setattr(m, "flag", True), r"`m\.flag` was changed in the body"),
        (lambda m: m.parts.append(1), r"`m\.parts` was changed in the body"),
        (lambda m: m.by_name.update(a=1), r"`m\.by_name` was changed in the body"),
        (lambda m: m.late(jnp.ones(2)), r"state `m\.late\.kernel` \(Param\) was created in the body"),
        (lambda m: m.eval(), r"`m\.training` was changed in the body"),
    ],
)
def test_structure_does_not_change_in_a_loop(name: str, compiled: bool, change: Any, message: str) -> None:
    m = mu.Module()
    m.n, m.flag, m.parts, m.by_name, m.late = mu.Variable(0), False, [], {}, mu.nn.Linear(None, 2, rngs=mu.Rngs(0))

    def f() -> None:
        m.n += 1
        change(m)

    with pytest.raises(errors.StructureError, match=message):
        around(lambda: LOOPS[name](f), compiled)()
    assert int(m.n) == 0
    assert m.late.kernel.deferred
    assert (m.flag, m.parts, m.by_name, m.training) == (False, [], {}, True)
    assert not hasattr(m, "new")


@pytest.mark.parametrize("name", LOOPS)
def test_structure_that_is_made_and_kept_inside_is_fine(name: str) -> None:
    n = mu.Variable(0)

    def f() -> None:
        scratch = Cell()
        scratch.extra = [mu.Cache(n.value)]
        n.value += scratch.extra[0].value * 0 + 1

    LOOPS[name](f)
    assert int(n) == (5 if name in ("scan", "for_loop", "map") else 3)


@pytest.mark.parametrize("name", LOOPS)
def test_the_body_is_traced_once(name: str, traces: Any) -> None:
    n = mu.Variable(0)

    def f() -> None:
        n.value += 1

    counted = traces.count(f)
    run = mu.jit(lambda: LOOPS[name](counted))
    run()
    assert traces.total == 1
    run()
    assert traces.total == 1
    m = int(n)
    mu.jit(lambda: LOOPS[name](lambda: LOOPS[name](lambda: LOOPS[name](counted))))()
    assert traces.total == 2, "at any depth"
    assert int(n) == m + (m // 2) ** 3


def test_eager_loops_of_one_function_compile_once(traces: Any) -> None:
    cell = Cell()
    body = traces.count(lambda c, x: (c, cell(x)))
    mu.scan(body, None, XS)
    with traces.compilations() as again:
        for _ in range(3):
            mu.scan(body, None, XS)
    assert traces.total == 1
    assert again.count == 0
    assert int(cell.n) == 20
    mu.scan(body, None, XS[:3])
    assert traces.total == 2


def test_eager_loops_of_equal_lambdas_compile_once(traces: Any) -> None:
    cell = Cell()
    for i in range(3):
        mu.for_loop(lambda x: traces.count(cell)(x), XS)
        if i == 0:
            first = traces.total
    assert traces.total == first, "DESIGN 4.8: an eager loop neither traces nor compiles again"


def test_eager_loops_see_new_captured_values() -> None:
    scale = 1.0
    v = mu.Variable(jnp.float32(0))

    def add(x: Any) -> None:
        v.value = v + x * scale

    mu.for_loop(add, jnp.ones(3))
    assert float(v) == 3
    scale = 10.0
    mu.for_loop(add, jnp.ones(3))
    assert float(v) == 33
    array = jnp.ones(3)
    for factor in (1.0, 2.0):
        array = jnp.full(3, factor)
        out = mu.for_loop(lambda x: x * array.sum(), jnp.ones(2))
        np.testing.assert_array_equal(out, [3 * factor] * 2)


def test_eager_loops_of_other_modules_of_the_same_code() -> None:
    for w in (0.5, 0.7):
        cell = Cell(w)
        ys = mu.for_loop(lambda x: cell(x), XS)
        _, expected = jax.lax.scan(hand, start(w), XS)
        np.testing.assert_allclose(ys, expected, rtol=1e-5)


def test_what_is_only_read_is_a_constant_of_the_loop() -> None:
    cell = Cell()
    jaxpr = mu.make_jaxpr(lambda c: mu.for_loop(lambda x: c(x), XS))(cell)
    (scan,) = [e for e in jaxpr.eqns if e.primitive.name == "scan"]
    assert len(scan.invars) == 4, "w, h and n, the slices; the cache is not used"
    assert len(scan.outvars) == 3, "h and n, the results"
    assert len(jaxpr.out_avals) == 3


def test_python_numbers_in_the_carry_are_promoted_as_in_jax() -> None:
    f = lambda c, x: ((c[0] + 1, c[1] * x), c[0])  # noqa: E731
    mine, theirs = mu.scan(f, (0, 1.0), XS), jax.lax.scan(f, (0, 1.0), XS)
    assert jax.tree.map(jnp.result_type, mine) == jax.tree.map(jnp.result_type, theirs)
    np.testing.assert_allclose(mine[0][1], theirs[0][1])
    f = lambda c, x: (c * x, c)  # noqa: E731
    mine, theirs = mu.scan(f, 1.0, XS), jax.lax.scan(f, 1.0, XS)
    assert jax.tree.map(lambda x: x.dtype, mine) == jax.tree.map(lambda x: x.dtype, theirs)


# -- checkpoint_every ---------------------------------------------------------------------------------------------


class Noisy(mu.Module):
    """A recurrence with noise, counted."""

    def __init__(self) -> None:
        self.w = mu.Param(jnp.array([0.5, -0.3]))
        self.h = mu.Hidden({"a": jnp.zeros(2), "b": [jnp.float32(1)]})
        self.n = mu.Variable(0)
        self.rngs = mu.Rngs(0)

    def __call__(self, x: Any) -> Any:
        h = self.h.value
        noise = jax.random.normal(self.rngs(), (2,))
        new = jnp.tanh(self.w.value * h["a"] + x * noise) * h["b"][0]
        self.h.value = {"a": new, "b": [h["b"][0] * 0.9 + 0.1 * new.sum()]}
        self.n += 1
        return new


LONG = jnp.linspace(-1, 1, 7)


def loop_and_gradient(model: Noisy, xs: Any, **options: Any) -> Any:
    """Everything that a loop gives: the gradient, the carry, the ys."""

    def loss(m: Noisy, xs: Any) -> Any:
        def body(c: Any, x: Any) -> Any:
            y = m(x)
            return {"sum": c["sum"] + y.sum() * x, "last": x}, {"y": y, "n": [m.n.value, None], "c": c["sum"]}

        init = {"sum": jnp.float32(0), "last": jnp.float32(0)}
        carry, ys = mu.scan(body, init, xs, checkpoint_every=options.pop("every", None), **options)
        return carry["sum"] + jnp.sum(ys["y"] ** 2), (carry, ys)

    return mu.value_and_grad(loss, argnums=(0, 1), has_aux=True)(model, xs)


def same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), a, b)


def same_states(a: mu.Module, b: mu.Module) -> None:
    convert: Any = lambda v: jax.random.key_data(v) if jnp.issubdtype(v.dtype, jax.dtypes.prng_key) else v  # noqa: E731
    same(*(jax.tree.map(convert, mu.state(m)) for m in (a, b)))


@pytest.mark.parametrize(
    ("options", "compiled", "sizes"),
    [
        ({}, False, (1, 3, 8)),
        pytest.param({}, True, (2, 6, 7, 100), marks=pytest.mark.once),
        pytest.param({"reverse": True}, False, (3,), marks=pytest.mark.once),
        pytest.param({"reverse": True}, True, (1, 2, 100), marks=pytest.mark.once),
        pytest.param({"unroll": 2}, True, (3,), marks=pytest.mark.once),
        ({"reverse": True, "unroll": True}, True, (5,)),
    ],
    ids=str,
)
def test_blocks_change_nothing(options: Any, compiled: bool, sizes: tuple[int, ...]) -> None:
    """Whole blocks, a remainder, one block, one that is longer than the loop: values, gradients, states, draws."""
    plain = Noisy()
    run = mu.jit(lambda m: loop_and_gradient(m, LONG, **options))
    expected = [run(plain) for _ in range(2)]
    for every in sizes:
        model = Noisy()
        ours = around(lambda m, every=every: loop_and_gradient(m, LONG, every=every, **options), compiled)
        for before in expected:
            same(ours(model), before)
        same_states(model, plain)
        assert int(model.n) == 14
        assert int(model.rngs.default.value["count"]) == 14


@pytest.mark.parametrize("every", [1, 3, 100])
@pytest.mark.parametrize("reverse", [False, True])
def test_blocks_without_gradients(every: int, reverse: bool) -> None:
    a, b = Noisy(), Noisy()

    def run(m: Noisy, every: Any) -> Any:
        return mu.scan(lambda c, x: (c + x, m(x)), jnp.float32(0), LONG, reverse=reverse, checkpoint_every=every)

    same(run(a, every), run(b, None))
    same(mu.jit(run, static_argnums=1)(a, every), mu.jit(run, static_argnums=1)(b, None))
    same_states(a, b)


@compiled_or_not
@pytest.mark.parametrize("every", [1, 5])
def test_blocks_of_a_loop_that_never_runs(every: int, compiled: bool) -> None:
    model = Noisy()
    before = mu.state(model)

    def run(xs: Any) -> Any:
        return mu.scan(lambda c, x: (c + x, (model(x), None)), jnp.float32(3), xs, checkpoint_every=every)

    carry, (ys, none) = around(run, compiled)(jnp.zeros(0))
    assert float(carry) == 3 and ys.shape == (0, 2) and none is None
    gradient = around(mu.grad(lambda xs: run(xs)[0]), compiled)(jnp.zeros(0))
    assert gradient.shape == (0,)
    assert mu.state(model) == before


@pytest.mark.parametrize(("length", "every"), [(1, 1), (1, 3), (4, 3), (4, 4), (7, 3)])
def test_blocks_without_xs(length: int, every: int) -> None:
    model = Noisy()

    def loss(m: Noisy, every: Any) -> Any:
        return mu.scan(lambda c, _: (c + m(1.0).sum(), None), 0.0, length=length, checkpoint_every=every)[0]

    gradient = mu.grad(lambda m: loss(m, every))(model)
    plain = Noisy()
    same(gradient, mu.grad(lambda m: loss(m, None))(plain))
    same_states(model, plain)


@pytest.mark.parametrize(
    ("outer", "inner"),
    [(2, 3), *(pytest.param(*pair, marks=pytest.mark.once) for pair in [(2, None), (None, 2), (1, 1), (100, 2)])],
)
def test_blocks_in_blocks(outer: Any, inner: Any) -> None:
    def loss(m: Noisy, outer: Any, inner: Any) -> Any:
        def rows(c: Any, xs: Any) -> Any:
            c, ys = mu.scan(lambda c, x: (c + m(x).sum(), m.n.value), c, xs, checkpoint_every=inner)
            return c, ys

        c, ys = mu.scan(rows, jnp.float32(0), jnp.stack([LONG, 2 * LONG, LONG]), checkpoint_every=outer)
        return c, ys

    model, plain = Noisy(), Noisy()
    gradient, ys = mu.grad(lambda m: loss(m, outer, inner), has_aux=True)(model)
    expected, expected_ys = mu.grad(lambda m: loss(m, None, None), has_aux=True)(plain)
    same(gradient, expected)
    np.testing.assert_array_equal(ys, expected_ys)
    np.testing.assert_array_equal(np.ravel(ys), np.arange(1, 22))
    same_states(model, plain)


@pytest.mark.parametrize(
    ("every", "reverse", "compiled"),
    [(1, False, True), (2, False, False), (2, True, True), (3, True, False), (5, False, True), (5, True, True)],
)
def test_blocks_over_layers(every: int, reverse: bool, compiled: bool) -> None:
    """Modules among the xs are cut into blocks and put together again."""

    def run(layers: Any, every: Any) -> Any:
        def loss(layers: Any) -> Any:
            body: Any = lambda c, m: (m(c), c)  # noqa: E731
            c, ys = mu.scan(body, jnp.float32(1), layers, reverse=reverse, checkpoint_every=every)
            return c + jnp.sum(ys), ys

        return mu.grad(loss, has_aux=True)(layers)

    (layers, _), (plain, _) = stack(5), stack(5)
    for _ in range(2):
        ours = around(lambda m: run(m, every), compiled)(layers)
        same(ours, run(plain, None))
        same_states(layers, plain)
    np.testing.assert_array_equal(layers.n, [2] * 5)


@pytest.mark.parametrize("every", [1, 2, 4])
def test_blocks_over_layers_along_another_axis(every: int) -> None:
    table = mu.Param(jnp.arange(12.0).reshape(2, 6))
    total = mu.Variable(jnp.float32(0))

    def run(every: Any) -> Any:
        axes = [(table, mu.StateAxes({mu.Param: 1}))]

        def body(c: Any, t: Any) -> Any:
            t.value = t.value + c
            total.value = total.value + t.value.sum()
            return c + 1, t.value

        return mu.scan(body, jnp.float32(0), table, states=axes, checkpoint_every=every)

    start_value = table.value
    out = run(every)
    written, summed = table.value, total.value
    table.value, total.value = start_value, jnp.float32(0)
    same(out, run(None))
    np.testing.assert_array_equal(table.value, written)
    np.testing.assert_array_equal(total.value, summed)


def test_blocks_of_keys_and_integers() -> None:
    keys = jax.random.split(jax.random.key(0), 5)

    def run(every: Any) -> Any:
        body: Any = lambda c, x: ((c[0] + 1, x[0]), (jax.random.uniform(x[0]), x[1] > 2))  # noqa: E731
        carry, ys = mu.scan(body, (0, keys[0]), (keys, jnp.arange(5)), checkpoint_every=every)
        return carry[0], jax.random.key_data(carry[1]), ys

    for every in (1, 2, 5, 9):
        same(run(every), run(None))


def test_blocks_of_a_stack_of_keys_as_results() -> None:
    keys = jax.random.split(jax.random.key(0), 5)
    _, ys = mu.scan(lambda c, k: (c, k), None, keys, checkpoint_every=2)
    np.testing.assert_array_equal(jax.random.key_data(ys), jax.random.key_data(keys))


@pytest.mark.once
def test_blocks_under_other_transforms() -> None:
    every = 3

    def run(m: Noisy, every: Any) -> Any:
        return mu.scan(lambda c, x: (c + m(x).sum(), None), jnp.float32(0), LONG, checkpoint_every=every)[0]

    transforms: dict[str, Any] = {
        "ensemble": lambda m, every: mu.vmap(lambda m: mu.grad(lambda m: run(m, every))(m))(m),
        "jit": lambda m, every: mu.jit(mu.vmap(lambda m: mu.grad(lambda m: run(m, every))(m)))(m),
        "remat": lambda m, every: mu.vmap(lambda m: mu.grad(mu.remat(lambda m: run(m, every)))(m))(m),
        "jvp": lambda m, every: mu.vmap(
            lambda m: mu.jvp(lambda m: run(m, every), (m,), (mu.State({("w",): jnp.ones(2)}),))
        )(m),
        "hessian": lambda m, every: jax.tree.leaves(mu.vmap(lambda m: mu.hessian(lambda m: run(m, every))(m))(m)),
        "cond": lambda m, every: mu.vmap(
            lambda m: mu.cond(m.w.value[0] > 0, lambda: mu.grad(lambda m: run(m, every))(m)["w"], lambda: m.w.value)
        )(m),
    }
    for name, transform in transforms.items():
        model, plain = (mu.vmap(lambda _: Noisy())(jnp.arange(2)) for _ in range(2))
        out, expected = transform(model, every), transform(plain, None)
        jax.tree.map(
            lambda a, b, name=name: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5, err_msg=name), out, expected
        )
        same_states(model, plain)


@compiled_or_not
def test_an_exception_in_a_block_leaves_everything_as_it_was(compiled: bool) -> None:
    model = Noisy()
    before = mu.state(model)

    def body(c: Any, x: Any) -> Any:
        model(x)
        raise KeyError("in the middle")

    with pytest.raises(KeyError, match="in the middle"):
        around(lambda: mu.scan(body, None, LONG, checkpoint_every=3), compiled)()
    assert mu.state(model) == before


@pytest.mark.parametrize("every", [0, -1, 2.0, "3", True, jnp.int32(3)])
def test_bad_block_sizes(every: Any) -> None:
    with pytest.raises(errors.MutatisError, match="checkpoint_every"):
        mu.scan(lambda c, x: (c, x), None, LONG, checkpoint_every=every)


def test_a_body_in_blocks_is_traced_once(traces: Any) -> None:
    model = Noisy()
    body = traces.count(lambda c, x: (c, model(x)))
    mu.jit(lambda: mu.scan(body, None, LONG, checkpoint_every=3))()
    assert traces[body] == 1
    mu.jit(mu.grad(lambda: mu.scan(body, None, LONG, checkpoint_every=3)[1].sum(), of=model))()
    assert traces[body] == 2


class Wide(mu.Module):
    """A state whose size dwarfs the rest."""

    def __init__(self) -> None:
        self.w = mu.Param(jnp.eye(4) * jnp.float32(0.9))
        self.h = mu.Hidden(jnp.ones((64, 4)))
        self.n = mu.Variable(0)

    def __call__(self, x: Any) -> Any:
        self.h.value = jnp.tanh(self.h.value @ self.w.value + x)
        self.n += 1
        return self.h.value.mean()


STEPS = 1000
CARRY = 64 * 4 * 4  # bytes of what an iteration carries, less a few scalars


def kept(every: int | None) -> tuple[int, int]:
    """The bytes that the backward pass keeps from the forward pass, and the temporary memory of both, compiled."""
    model = Wide()
    xs = jnp.linspace(-1, 1, STEPS)

    def loss(m: Wide) -> Any:
        return mu.scan(lambda c, x: (c + m(x), None), jnp.float32(0), xs, checkpoint_every=every)[0]

    pure, state = mu.functionalize(lambda: loss(model), of=model)
    rest, w = state.filter(~mu.OfType(mu.Param)), state.filter(mu.Param)
    _, pull = jax.eval_shape(lambda w: jax.vjp(lambda w: pure(rest | w)[0], w), w)
    gradient, state = mu.functionalize(lambda: mu.grad(loss)(model), of=model)
    analysis = jax.jit(gradient).lower(state).compile().memory_analysis()
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pull)), analysis.temp_size_in_bytes


def test_the_memory_of_blocks() -> None:
    """Carries at the blocks' ends, and those of one block: n / 30 + 30 in place of n."""
    plain, plain_peak = kept(None)
    assert plain > STEPS * CARRY
    blocks, peak = kept(30)
    number = STEPS // 30 + 1
    assert blocks < (number + 4) * CARRY + STEPS * 4 + 64
    assert peak < 2 * (number + 30) * CARRY + 2 * STEPS * 4
    assert peak * 15 < plain_peak
    assert kept(1)[0] > STEPS * CARRY, "a block for each iteration keeps every carry"
    one, one_peak = kept(STEPS)
    assert one < 4 * CARRY + STEPS * 4 + 64, "one block keeps its start"
    assert one_peak > STEPS * CARRY, "and computes all of it again"


def test_the_memory_of_blocks_of_layers() -> None:
    """The slices that a loop is given are kept once, whatever the blocks."""

    def residuals(every: int | None) -> int:
        layers = mu.vmap(lambda _: Wide())(jnp.arange(60))
        start = jnp.ones((64, 4))

        def loss(layers: Any) -> Any:
            def body(c: Any, m: Any) -> Any:
                return jnp.tanh(c @ m.w.value), None

            return mu.scan(body, start, layers, checkpoint_every=every)[0].sum()

        pure, state = mu.functionalize(lambda: loss(layers), of=layers)
        rest, w = state.filter(~mu.OfType(mu.Param)), state.filter(mu.Param)
        _, pull = jax.eval_shape(lambda w: jax.vjp(lambda w: pure(rest | w)[0], w), w)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pull))

    weights = 60 * 16 * 4
    assert residuals(None) > 60 * CARRY
    assert residuals(8) < (60 // 8 + 3) * CARRY + 2 * weights


@pytest.mark.parametrize(("start", "max_steps"), [(1.0, 3), (1.0, 20), (20.0, 3), (4.0, 0)])
@pytest.mark.parametrize("how", ["eager", "jit", "no jit"])
def test_a_bounded_while_loop(start: float, max_steps: int, how: str) -> None:
    count = mu.Variable(0)

    def body(x: jax.Array) -> jax.Array:
        count.value += 1
        return x * jnp.float32(1.5)

    def run(x: Any) -> Any:
        return mu.while_loop(lambda x: x < 10, body, x, max_steps=max_steps)

    steps, wanted = 0, start
    while wanted < 10 and steps < max_steps:
        steps, wanted = steps + 1, wanted * 1.5
    with jax.disable_jit(how == "no jit"):
        found = (mu.jit(run) if how == "jit" else run)(jnp.float32(start))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert int(count) == steps
    if how != "no jit":
        grad = mu.grad(run)(jnp.float32(start))
        np.testing.assert_allclose(grad, 1.5**steps, rtol=1e-6)
        assert int(count) == 2 * steps
        both = mu.vmap(lambda x: mu.while_loop(lambda x: x < 10, lambda x: x * 1.5, x, max_steps=max_steps))
        np.testing.assert_allclose(both(jnp.array([start, 11.0])), [wanted, 11.0], rtol=1e-6)


@pytest.mark.parametrize("max_steps", [-1, 2.5, True])
def test_a_bound_that_is_none(max_steps: Any) -> None:
    with pytest.raises(mu.errors.ArgumentError, match="max_steps"):
        mu.while_loop(lambda x: x < 10, lambda x: x + 1, 0, max_steps=max_steps)


@pytest.mark.parametrize("length", ["3", 3.0, -2, True])
def test_a_length_that_is_none(length: Any) -> None:
    for loop in (
        lambda: mu.for_loop(lambda: 1.0, length=length),
        lambda: mu.scan(lambda c, _: (c, c), 0.0, length=length),
    ):
        with pytest.raises(errors.ArgumentError, match=r"cannot have `length="):
            loop()


def test_a_traced_length() -> None:
    with pytest.raises(errors.ArgumentError, match=r"(?s)cannot have `length=.*mu.fori_loop"):
        mu.jit(lambda n: mu.for_loop(lambda: 1.0, length=n))(3)


@pytest.mark.parametrize("upper", [3, np.int64(3), np.int32(3), jnp.int32(3)])
def test_bounds_that_are_known_have_a_derivative_in_reverse(upper: Any) -> None:
    assert float(mu.grad(lambda x: mu.fori_loop(0, upper, lambda i, c: c * 2, x))(1.0)) == 8.0
    assert float(mu.fori_loop(0, upper, lambda i, c: c + i, 0)) == 3


def test_a_loop_without_a_derivative_in_reverse_says_which_has_one() -> None:
    for loop in (
        lambda y: mu.while_loop(lambda x: x < 10, lambda x: x * y, 1.0),
        lambda y: mu.jit(lambda n: mu.fori_loop(0, n, lambda i, x: x * y, 1.0))(3),
    ):
        with pytest.raises(ValueError, match="Reverse-mode") as caught:
            mu.grad(loop)(2.0)
        assert any("max_steps=100" in note for note in caught.value.__notes__)


def test_counts_of_numpy() -> None:
    xs = jnp.arange(4.0)
    np.testing.assert_array_equal(mu.for_loop(lambda x: x, xs, checkpoint_every=np.int64(3)), xs)
    assert float(mu.while_loop(lambda x: x < 10, lambda x: x + 1, 0.0, max_steps=np.int32(4))) == 4.0
