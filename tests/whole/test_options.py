"""Every option of every transform, over a model: it has its effect, or it is refused. None is ignored without a word.

`EFFECTS` has a row for each parameter of each transform; a test compares it with the signatures. A row gives what came out
and what is wanted, which is not what comes out without the option.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mutatis as mu
from mutatis import errors

pytestmark = pytest.mark.once  # nothing here depends on the version of JAX

ONES = jnp.ones(4)
XS = jnp.arange(4.0)


class Net(mu.Module):
    def __init__(self, n: int = 4, start: Any = 0) -> None:
        self.w = mu.Param(jnp.arange(1.0, n + 1))
        self.n = mu.Variable(start)

    def __call__(self, x: Any) -> Any:
        self.n.value = self.n.value + 1
        return self.w.value * x


def mesh() -> Any:
    return jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])


def split() -> Any:
    return NamedSharding(mesh(), P("x"))


def whole() -> Any:
    return NamedSharding(mesh(), P())


def raises(f: Callable[[], Any], *kinds: type[BaseException]) -> bool:
    with pytest.raises(kinds or errors.MutatisError):
        f()
    return True


EFFECTS: dict[tuple[str, str], Callable[[], Any]] = {}


def effect(name: str) -> Callable[[Any], Any]:
    """Add a row, for a transform and an option: a program that gives (got, wanted)."""
    transform, _, options = name.partition(" ")

    def add(f: Any) -> Any:
        for option in options.split(", "):
            EFFECTS[transform, option] = f
        return f

    return add


# -- jit -----------------------------------------------------------------------------------------------------------


@effect("jit in_shardings")
def _() -> Any:
    net = Net()
    mu.jit(lambda net, x: net(x), in_shardings=(mu.StateSharding({mu.Param: split(), ...: whole()}), None))(net, ONES)
    return len(net.n.value.sharding.device_set), 2


@effect("jit out_shardings")
def _() -> Any:
    return mu.jit(Net, out_shardings=mu.StateSharding({mu.Param: split(), ...: whole()}))().w.value.sharding, split()


@effect("jit static_argnums, static_argnames")
def _() -> Any:
    net = Net()
    f = mu.jit(lambda net, up: net(ONES) if up else ONES, static_argnums=1)
    g = mu.jit(lambda net, up: net(ONES) if up else ONES, static_argnames="up")
    return [f(net, True)[3], f(net, False)[3], g(net, up=True)[3], int(net.n)], [4, 1, 4, 2]


@effect("jit donate_argnums, donate_argnames")
def _() -> Any:
    f = mu.jit(lambda net, x: net(x), donate_argnums=1)
    g = mu.jit(lambda net, x: net(x), donate_argnames="x")
    x, y = jnp.ones(4) * 2, jnp.ones(4) * 2
    f(Net(), x), g(Net(), x=y)
    return [x.is_deleted(), y.is_deleted()], [True, True]


@effect("jit keep_unused, inline, compiler_options, device, backend")
def _() -> Any:
    net = Net()
    unused = [mu.jit(lambda net, x: net.n.set(1), keep_unused=k).lower(net, ONES).compile() for k in (True, False)]
    counts = [
        len(c._compiled.as_text().split("entry_computation_layout={(")[1].split("->")[0].split("{")) for c in unused
    ]
    inlined = [str(mu.make_jaxpr(mu.jit(lambda: net(ONES), inline=i))()).count("pjit") for i in (True, False)]
    refused = raises(lambda: mu.jit(net, compiler_options={"no_such": 1})(ONES), Exception)
    last = jax.devices()[-1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX says that they will be gone
        on = mu.jit(lambda: jnp.ones(4) * 2, device=last)().devices()
        other = mu.jit(lambda: net(ONES), backend="cpu")()
    return [counts[0] > counts[1], inlined[0] <= inlined[1], refused, on, other.shape], [True, True, True, {last}, (4,)]


@effect("jit donate")
def _() -> Any:
    gone = []
    for donate in (True, False):
        net = Net()
        step = mu.jit(lambda net: net.w.set(net.w.value + 1), donate=donate)
        step(net)
        old = net.w._value
        step(net)
        gone.append(old.is_deleted())
    return [*gone, raises(lambda: mu.jit(Net(), donate="sometimes"))], [True, False, True]


# -- derivatives ---------------------------------------------------------------------------------------------------

DERIVATIVES: dict[str, Callable[..., Any]] = {
    "grad": mu.grad,
    "value_and_grad": lambda f, **o: lambda *a: mu.value_and_grad(f, **o)(*a)[1],
    "jacfwd": mu.jacfwd,
    "jacrev": mu.jacrev,
}


def squares(net: Any, x: Any = 1.0) -> Any:
    net.n.value = net.n.value + 1
    return jnp.sum(net.w.value**2) * x


for _name, _derive in DERIVATIVES.items():

    @effect(f"{_name} argnums")
    def _(derive: Any = _derive) -> Any:
        net = Net()
        both = derive(squares, argnums=(0, 1))(net, 2.0)
        return [float(both[0]["w"][0]), float(both[1]), raises(lambda: derive(squares, argnums=0.5)(net))], [
            4,
            30,
            True,
        ]

    @effect(f"{_name} has_aux")
    def _(derive: Any = _derive, name: str = _name) -> Any:
        out = derive(lambda net: (squares(net), net.n.value), has_aux=True)(net := Net())
        aux = int(net.n) if name == "value_and_grad" else int(out[1])
        return aux, 1

    @effect(f"{_name} wrt")
    def _(derive: Any = _derive) -> Any:
        net = Net(start=2.0)
        return float(derive(lambda net: net.n.value**2 + net.w.value[0], wrt=mu.Not(mu.Param))(net)["n"]), 4.0

    @effect(f"{_name} of")
    def _(derive: Any = _derive) -> Any:
        net = Net()
        return float(derive(lambda: squares(net), of=net)()["w"][1]), 4.0


@effect("grad holomorphic")
@effect("value_and_grad holomorphic")
@effect("jacfwd holomorphic")
@effect("jacrev holomorphic")
@effect("hessian holomorphic")
def _() -> Any:
    w = mu.Param(jnp.complex64(1 + 1j))
    out = [float(jnp.imag(d(lambda w: w.value**2, holomorphic=True)(w)[()])) for d in DERIVATIVES.values()]
    second = mu.hessian(lambda w: w.value**3, holomorphic=True)(w)
    return [*out, float(jnp.imag(jax.tree.leaves(second)[0]))], [2, 2, 2, 2, 6]


@effect("grad allow_int")
@effect("value_and_grad allow_int")
@effect("jacrev allow_int")
def _() -> Any:
    net = Net()
    f = lambda n: squares(net) * n.astype(jnp.float32)  # noqa: E731
    derive = [mu.grad, DERIVATIVES["value_and_grad"], mu.jacrev]
    pure = lambda n: n.astype(jnp.float32)  # noqa: E731
    theirs = [d(pure, allow_int=True)(jnp.int32(3)).dtype for d in (jax.grad, jax.grad, jax.jacrev)]
    return [d(f, allow_int=True)(jnp.int32(3)).dtype for d in derive], theirs


@effect("grad reduce_axes")
@effect("value_and_grad reduce_axes")
@effect("vjp reduce_axes")
def _() -> Any:
    net = Net()
    each = [
        lambda: mu.grad(squares, reduce_axes=("i",))(net),
        lambda: mu.value_and_grad(squares, reduce_axes=("i",))(net),
    ]
    each.append(lambda: mu.vjp(squares, net, reduce_axes=("i",)))
    return [raises(f, NotImplementedError) for f in each], [True] * 3


@effect("hessian argnums, has_aux, wrt, of")
def _() -> Any:
    net, w = Net(start=2.0), mu.Param(3.0)
    got = [
        float(mu.hessian(lambda x, y: x * y**2 * w.value, argnums=1)(1.0, 2.0)),
        float(mu.hessian(lambda x: (x**2 * w.value, net(ONES)), has_aux=True)(1.0)[0]),
        float(jax.tree.leaves(mu.hessian(lambda m: m.n.value**2 * m.w.value[0], wrt=mu.Not(mu.Param))(net))[0]),
        float(jax.tree.leaves(mu.hessian(lambda: w.value**2, of=w)())[0]),
    ]
    return got, [6, 6, 2, 2]


@effect("jvp has_aux, wrt, of")
@effect("vjp has_aux, wrt, of")
@effect("linearize has_aux, wrt, of")
def _() -> Any:
    net, v = Net(), mu.Variable(2.0)
    f = lambda x: (x * 3.0, net(ONES))  # noqa: E731
    aux = [
        mu.jvp(f, (1.0,), (1.0,), has_aux=True)[2],
        mu.vjp(f, 1.0, has_aux=True)[2],
        mu.linearize(f, 1.0, has_aux=True)[2],
    ]
    square = lambda: v.value**2  # noqa: E731
    state = mu.state(v)
    every = [
        mu.jvp(square, (), state, wrt=mu.Variable, of=v)[1],
        mu.vjp(square, wrt=mu.Variable, of=v)[1](1.0)[()],
        mu.linearize(square, wrt=mu.Variable, of=v)[1](state),
    ]
    return [*(float(a[3]) for a in aux), *map(float, every)], [4, 4, 4, 8, 4, 8]


# -- vmap ----------------------------------------------------------------------------------------------------------


def make(x: Any) -> Net:
    net = Net(start=x)
    net.twice = mu.Cache(jnp.stack([x, x]))
    return net


@effect("vmap in_axes")
def _() -> Any:
    nets = mu.vmap(make)(XS[:3])
    axes = mu.StateAxes({mu.Param: None, ...: 0})
    nets.w.value = nets.w.value[0]
    return mu.vmap(lambda net, x: net(x)[0], in_axes=(axes, 0))(nets, XS[:3]), XS[:3]


@effect("vmap out_axes")
def _() -> Any:
    nets = mu.vmap(make, out_axes=mu.StateAxes({mu.Param: None, mu.Cache: -1, ...: 0}))(XS[:3])
    net = Net()
    out = mu.vmap(lambda x: (net, x * ONES), out_axes=(0, 1))(XS[:3])
    refused = [
        raises(lambda: mu.vmap(lambda x: net, out_axes=1)(XS)),
        raises(lambda: mu.vmap(make, out_axes=mu.StateAxes({...: None}))(XS), errors.LaneError),
        raises(lambda: mu.vmap(make, out_axes=mu.StateAxes({...: mu.Carry}))(XS)),
        raises(lambda: mu.vmap(make, out_axes=(0, 0, 0))(XS), ValueError),
    ]
    shapes = [nets.w.shape, nets.twice.shape, nets.n.shape, out[1].shape]
    return [*shapes, *refused, out[0] is net], [(4,), (2, 3), (3,), (4, 3), True, True, True, True, True]


@effect("vmap axis_name, axis_size, states")
def _() -> Any:
    net, nets = Net(), mu.vmap(make)(XS[:3])
    mean = mu.vmap(lambda x: net.w.set(net.w.value + jax.lax.pmean(x, "i")), axis_name="i")
    mean(XS)
    mu.vmap(lambda: nets(1.0), axis_size=3, states=[(nets, 0)])()
    return [float(net.w[0]), nets.n.value], [2.5, XS[:3] + 1]


@effect("vmap spmd_axis_name, sum_match")
def _() -> Any:
    net = Net()

    def f(x: Any) -> Any:
        return jax.lax.with_sharding_constraint(net(x), whole())

    with jax.set_mesh(mesh()):
        text = str(mu.make_jaxpr(mu.vmap(f, spmd_axis_name="x"))(jnp.ones((2, 4))))
    with mock.patch.object(jax, "vmap", wraps=jax.vmap) as theirs:
        mu.vmap(net, sum_match=True)(jnp.ones((2, 4)))
    return ["'x'" in text, theirs.call_args.kwargs["sum_match"]], [True, True]


# -- loops ---------------------------------------------------------------------------------------------------------


@effect("scan length, reverse, unroll, _split_transpose")
@effect("for_loop length, reverse, unroll")
def _() -> Any:
    net = Net()
    jaxprs = [
        str(mu.make_jaxpr(lambda: mu.scan(lambda c, x: (c, net(x)), None, XS, unroll=2))()),
        str(mu.make_jaxpr(lambda: mu.for_loop(net, XS, unroll=2))()),
    ]
    order: list[Any] = [
        mu.scan(lambda c, x: (c + 1, c), 0, XS, reverse=True)[1].tolist(),
        mu.for_loop(lambda x: (net(x), net.n.value)[1], XS, reverse=True).tolist(),
    ]
    mu.scan(lambda c, _: (c, net(1.0)), None, length=3)
    mu.for_loop(lambda: net(1.0), length=3)
    with mock.patch.object(jax.lax, "scan", wraps=jax.lax.scan) as theirs:
        mu.make_jaxpr(lambda: mu.scan(lambda c, x: (c, x), None, XS, _split_transpose=True))()
    passed = theirs.call_args.args[-1]
    got = ["unroll=2" in jaxprs[0], passed, "unroll=2" in jaxprs[1], *order, int(net.n)]
    return got, [True, True, True, [3, 2, 1, 0], [4, 3, 2, 1], 10]


@effect("scan states, checkpoint_every")
@effect("for_loop states, checkpoint_every")
def _() -> Any:
    got: list[Any] = []
    for loop in (lambda f, xs, **o: mu.scan(lambda c, x: (c, f(x)), None, xs, **o)[1], mu.for_loop):
        nets = mu.vmap(make)(XS)
        loop(lambda x: nets(x), XS, states=[(nets, mu.StateAxes({mu.Cache: mu.Carry, ...: 0}))])
        got += [nets.n.value - XS, raises(lambda loop=loop: loop(lambda x: x, XS, checkpoint_every=0))]
        net = Net()
        loss = lambda net, loop=loop: jnp.sum(loop(net, XS, checkpoint_every=3))  # noqa: E731
        got += [
            mu.grad(loss)(net)["w"],
            any(word in str(mu.make_jaxpr(loss)(net)) for word in ("checkpoint", "remat")),
            int(net.n),
        ]
    return got, [jnp.ones(4), True, jnp.full(4, 6.0), True, 4] * 2


@effect("for_loop progress")
def _() -> Any:
    told: list[tuple[int, int]] = []
    mu.for_loop(Net(), jnp.ones(5), progress=lambda done, total: told.append((done, total)))
    jax.effects_barrier()
    return told, [(5, 5)]


@effect("scan progress")
def _() -> Any:
    told: list[tuple[int, int]] = []
    net = Net()
    mu.scan(lambda c, x: (c, net(x)), None, jnp.ones(5), progress=lambda done, total: told.append((done, total)))
    jax.effects_barrier()
    return told, [(5, 5)]


@effect("while_loop max_steps")
def _() -> Any:
    net = Net()
    loop = lambda x: mu.while_loop(lambda x: x < 10, lambda x: x * 2 + 0 * net(1.0)[0], x, max_steps=3)  # noqa: E731
    return [loop(1.0), int(net.n), mu.grad(loop)(1.0)], [8.0, 3, 8.0]


@effect("fori_loop unroll")
def _() -> Any:
    net = Net()
    text = str(mu.make_jaxpr(lambda: mu.fori_loop(0, 4, lambda i, c: c + net(1.0)[0], 0.0, unroll=2))())
    return "unroll=2" in text, True


@effect("map batch_size")
def _() -> Any:
    net = mu.Module()
    net.w = mu.Param(ONES)
    text = str(mu.make_jaxpr(lambda: mu.map(lambda x: net.w.value * x, XS, batch_size=2))())
    out = mu.map(lambda x: net.w, XS, batch_size=3)
    refused = raises(lambda: mu.map(lambda x: Net(), XS, batch_size=2))
    return ["length=2" in text, out.shape, refused], [True, (4, 4), True]


@effect("cond operand")
@effect("switch operand")
def _() -> Any:
    net = Net()
    mu.cond(True, net, lambda x: x, operand=ONES)
    mu.switch(1, [lambda x: x, net], operand=ONES)
    return int(net.n), 2


# -- the rest ------------------------------------------------------------------------------------------------------


@effect("remat prevent_cse, policy")
def _() -> Any:
    net = Net()
    policy = jax.checkpoint_policies.everything_saveable
    text = str(mu.make_jaxpr(mu.remat(net, prevent_cse=False, policy=policy))(ONES))
    return ["prevent_cse=False" in text, "everything_saveable" in text], [True, True]


@effect("remat static_argnums, static_argnames")
def _() -> Any:
    net = Net()
    f = mu.remat(lambda net, up: net(ONES) if up else ONES, static_argnums=1)
    g = mu.remat(lambda net, up=True: net(ONES) if up else ONES, static_argnames="up")
    return [f(net, True)[3], f(net, False)[3], g(net, up=True)[3], int(net.n)], [4, 1, 4, 2]


@effect("shard_map mesh, in_specs, out_specs, axis_names, check_vma, states")
def _() -> Any:
    net = Net()
    specs = mu.StateSharding({mu.Param: P("x"), ...: P()})
    f = mu.shard_map(
        net, mesh=mesh(), in_specs=P("x"), out_specs=P("x"), axis_names={"x"}, check_vma=True, states=[(net, specs)]
    )
    seen: list[Any] = []
    g = mu.shard_map(
        lambda net: (seen.append(net.w.shape), net.w.value)[1], mesh=mesh(), in_specs=(specs,), out_specs=P("x")
    )
    g(net)
    h = mu.shard_map(
        lambda x: net.n.set(x[0]), mesh=mesh(), in_specs=P("x"), out_specs=P(), check_vma=False, states=specs
    )
    h(ONES)
    whole_sharding = mu.StateSharding({...: split()})
    bad = mu.shard_map(lambda net: 0, mesh=mesh(), in_specs=(whole_sharding,), out_specs=P())
    return [float(net.n), f(ONES), seen, raises(lambda: bad(net))], [1, jnp.arange(1.0, 5.0), [(2,)], True]


@effect("custom_vjp nondiff_argnums, nondiff_argnames")
@effect("custom_jvp nondiff_argnums, nondiff_argnames")
def _() -> Any:
    net, got = Net(), []
    for options in ({"nondiff_argnums": (1,)}, {"nondiff_argnames": ("k",)}):
        f = mu.custom_vjp(lambda x, k: x * k * net(1.0)[0], **options)
        f.defvjp(lambda x, k: (x * k * net(1.0)[0], None), lambda k, _, g: (g * 10.0 * k,))
        g = mu.custom_jvp(lambda x, k: x * k * net(1.0)[0], **options)
        g.defjvp(lambda k, p, t: (p[0] * k * net(1.0)[0], t[0] * 10.0 * k))
        got += [float(mu.grad(f)(1.0, 3.0)), float(mu.grad(g)(1.0, 3.0))]
    return got, [30.0] * 4


@effect("make_jaxpr static_argnums, axis_env, return_shape")
def _() -> Any:
    net = Net()
    f = mu.make_jaxpr(
        lambda x, up: jax.lax.psum(net(x), "i") if up else x, static_argnums=1, axis_env=[("i", 2)], return_shape=True
    )
    jaxpr, shape = f(ONES, True)
    return ["psum" in str(jaxpr), shape.shape], [True, (4,)]


@effect("functionalize of")
def _() -> Any:
    net, other = Net(), Net()
    _, state = mu.functionalize(lambda x: net(x), of=[net, other])
    return len(state), 4


# -- the tests -----------------------------------------------------------------------------------------------------

_OPERANDS = {"f", "fun", "primals", "tangents", "args", "kwargs", "options", "init", "xs", "init_val", "operands"} | {
    "cond_fun", "body_fun", "lower", "upper", "pred", "true_fun", "false_fun", "index", "branches",
}  # fmt: skip
TRANSFORMS = (
    *("jit", "grad", "value_and_grad", "jvp", "vjp", "linearize", "jacfwd", "jacrev", "hessian", "vmap"),
    *("scan", "for_loop", "while_loop", "fori_loop", "map", "cond", "switch", "remat", "shard_map"),
    *("custom_vjp", "custom_jvp", "eval_shape", "make_jaxpr", "functionalize"),
)


def test_every_option_has_a_row() -> None:
    options = {
        (name, option)
        for name in TRANSFORMS
        for option in inspect.signature(getattr(mu, name)).parameters
        if option not in _OPERANDS
    }
    assert options - EFFECTS.keys() == set()
    assert EFFECTS.keys() - options == set()


@pytest.mark.parametrize("row", dict.fromkeys(EFFECTS.values()), ids=lambda f: "/".join(_names(f)))
def test_an_option_has_its_effect(row: Any) -> None:
    got, wanted = row()
    got, wanted = (x if isinstance(x, list) else [x] for x in (got, wanted))
    assert len(got) == len(wanted)
    for mine, theirs in zip(got, wanted, strict=True):
        if isinstance(theirs, jax.Array | np.ndarray):
            np.testing.assert_allclose(mine, theirs)
        else:
            assert mine == theirs


def _names(row: Any) -> list[str]:
    return [" ".join(key) for key, f in EFFECTS.items() if f is row][:2]


# -- shardings of modules, further -----------------------------------------------------------------------------------


def test_shardings_of_a_module_in_every_spelling() -> None:
    net = Net()
    state = mu.state(net)
    forms = [mu.StateSharding({mu.Param: split(), ...: whole()})]
    forms.append(mu.State.from_flat({path: split() if path == ("w",) else whole() for path in state}))
    for said in forms:
        for _ in range(3):
            made = mu.jit(Net, out_shardings=said)()
            assert (made.w.value.sharding, made.n.value.sharding) == (split(), whole())
        there, step = Net(), mu.jit(lambda net, x: (net, net(x)), in_shardings=(said, None), out_shardings=(said, None))
        for _ in range(3):
            assert step(there, ONES)[0] is there
        assert (there.w.value.sharding, there.n.value.sharding, int(there.n)) == (split(), whole(), 3)


def test_specs_of_the_mesh_that_is_set() -> None:
    with jax.set_mesh(mesh()):
        made = mu.jit(Net, out_shardings=mu.StateSharding({mu.Param: P("x"), ...: None}))()
    assert made.w.value.sharding.spec == P("x")
    assert len(made.n.value.sharding.device_set) == 2


def test_a_returned_module_moves_only_where_it_is_said() -> None:
    net, other = Net(), Net()
    mu.jit(lambda: (net, other), out_shardings=(mu.StateSharding({mu.Param: split(), ...: whole()}), None))()
    assert net.w.value.sharding == split()
    assert len(other.w.value.sharding.device_set) == 1


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (lambda net: mu.jit(lambda net, x: net(x), in_shardings=(split(),))(net, ONES), "has 1 entries for 2 arguments"),
        (lambda net: mu.jit(lambda net, x: net(x), in_shardings=whole())(net, x=ONES), "says nothing of arguments by keyword"),
        (lambda net: mu.jit(lambda net: net.n.value, in_shardings=split())(net), r"\.n` \(Variable\) has fewer axes"),
        (lambda net: mu.jit(Net, out_shardings=split())(), "fewer axes than its sharding"),
        (lambda net: mu.jit(Net, out_shardings=mu.State.from_flat({("w",): split()}))(), r"missing:\s+n"),
        (lambda net: mu.jit(lambda: (net, 1), out_shardings=(None,) * 3)(), "`out_shardings` does not fit the result"),
        (lambda net: mu.jit(lambda a, b: a(b(ONES)), in_shardings=(whole(), mu.StateSharding({mu.Param: split()})))(net, net),
         "two shardings of one state"),
    ],
)  # fmt: skip
def test_shardings_that_cannot_be(program: Any, message: str) -> None:
    net = Net()
    with pytest.raises(errors.MutatisError, match=message):
        program(net)
    assert int(net.n) == 0


def test_static_arguments_have_no_sharding() -> None:
    f = mu.jit(lambda k, net, x: net(x) * k, static_argnums=0, in_shardings=(None, split()))
    net = mu.Module.__new__(Net)
    net.w, net.n = mu.Param(ONES), mu.Variable(jnp.zeros(4))
    assert f(2.0, net, ONES).sharding == split()


# -- what loops make and return ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", ["scan", "for_loop", "map", "scan in jit", "disabled", "reversed", "blocks"])
def test_modules_that_a_body_makes_come_back_stacked(loop: str) -> None:
    keys = jax.random.split(jax.random.key(0), 3)

    def body(key: Any) -> Any:
        return {"layer": mu.nn.Linear(2, 3, rngs=mu.Rngs(key)), "extra": [mu.Variable(jax.random.key_data(key)[1])]}

    def run() -> Any:
        if loop in ("scan", "scan in jit", "reversed", "blocks"):
            options: dict[str, Any] = {"reversed": {"reverse": True}, "blocks": {"checkpoint_every": 2}}.get(loop, {})
            return mu.scan(lambda c, k: (c, body(k)), None, keys, **options)[1]
        return mu.map(body, keys) if loop == "map" else mu.for_loop(body, keys)

    if loop == "disabled":
        with jax.disable_jit():
            out = run()
    else:
        out = mu.jit(run)() if loop == "scan in jit" else run()
    each = [body(key) for key in keys]
    np.testing.assert_allclose(out["layer"].kernel, jnp.stack([one["layer"].kernel.value for one in each]), rtol=1e-6)
    np.testing.assert_array_equal(out["extra"][0], jnp.stack([one["extra"][0].value for one in each]))
    assert isinstance(out["layer"], mu.nn.Linear) and isinstance(out["extra"][0], mu.Variable)
    stacked = mu.vmap(lambda layer, x: layer(x), in_axes=(0, None))(out["layer"], jnp.ones(2))
    assert stacked.shape == (3, 3)


@pytest.mark.parametrize("loop", ["scan", "for_loop", "map", "batches", "disabled"])
def test_a_variable_among_the_results_of_a_loop_is_its_values(loop: str) -> None:
    v, w = mu.Variable(0.0), mu.Param(2.0)

    def body(x: Any) -> Any:
        if loop != "batches":
            v.value = v.value + x
        return v, {"w": w}

    if loop == "disabled":
        with jax.disable_jit():
            out = mu.for_loop(body, XS)
    elif loop == "scan":
        out = mu.scan(lambda c, x: (c, body(x)), None, XS)[1]
    else:
        out = mu.map(body, XS, batch_size=3) if loop == "batches" else getattr(mu, loop)(body, XS)
    np.testing.assert_array_equal(out[0], jnp.zeros(4) if loop == "batches" else jnp.cumsum(XS))
    np.testing.assert_array_equal(out[1]["w"], jnp.full(4, 2.0))


def test_a_module_of_the_carry_is_still_the_same_one() -> None:
    with pytest.raises(errors.StructureError, match=r"other modules after an iteration|made and returned"):
        mu.scan(lambda net, _: (Net(), None), Net(), length=2)
