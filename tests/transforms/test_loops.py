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

    with pytest.raises(errors.StructureError, match="cannot tell the number of its iterations"):
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
        (lambda m: setattr(m, "new", mu.Cache(0)), r"`m\.new` was changed inside the body"),
        (lambda m: setattr(m, "flag", True), r"`m\.flag` was changed inside the body"),
        (lambda m: m.parts.append(1), r"`m\.parts` was changed inside the body"),
        (lambda m: m.by_name.update(a=1), r"`m\.by_name` was changed inside the body"),
        (lambda m: m.late.value, r"state `m\.late` \(Param\) was created inside the body"),
        (lambda m: m.eval(), r"`m\._?mode` was changed inside the body"),
    ],
)
def test_structure_does_not_change_in_a_loop(name: str, compiled: bool, change: Any, message: str) -> None:
    m = mu.Module()
    m.n, m.flag, m.parts, m.by_name, m.late = mu.Variable(0), False, [], {}, mu.Param(init=jnp.ones(2))

    def f() -> None:
        m.n += 1
        change(m)

    with pytest.raises(errors.StructureError, match=message):
        around(lambda: LOOPS[name](f), compiled)()
    assert int(m.n) == 0
    assert m.late.deferred
    assert (m.flag, m.parts, m.by_name, m.mode) == (False, [], {}, "train")
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
