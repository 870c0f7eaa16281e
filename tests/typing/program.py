"""A program that mypy and pyright check with JAX's own types, and that runs.

`assert_type` says what an expression is to both. A line that ends in `# E` is an error to both, and no other line is.
"""

import functools
from typing import Any, assert_type

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import PartitionSpec as P

import mutatis as mu


class Net(mu.Module):
    w: mu.Param[Array]

    def __init__(self, size: int) -> None:
        self.w = mu.Param(jnp.ones(size))
        self.calls = mu.Variable(0)
        self.tables = mu.Buffer({"a": jnp.zeros(size)})

    def __call__(self, x: Array) -> Array:
        self.calls += 1
        return x * self.w

    @mu.jit
    def step(self, x: Array, *, scale: float = 1.0) -> Array:
        return scale * self(x)

    @mu.jit(static_argnames="times")
    def repeated(self, x: Array, times: int) -> tuple[Array, int]:
        return times * self(x), times

    @functools.partial(mu.jit, static_argnames="times")
    def by_partial(self, x: Array, times: int) -> Array:
        return times * self(x)

    @mu.remat
    def sized(self) -> Array:
        return jnp.sum(self.w.value)


@functools.partial(mu.jit, static_argnames="n", donate=False)
def scaled(x: Array, n: int) -> Array:
    return n * x


@functools.partial(mu.vmap, in_axes=0)
def in_lanes(x: Array) -> Array:
    return x


@functools.partial(mu.remat, prevent_cse=False)
def again(x: Array) -> Array:
    return x


@functools.partial(mu.custom_vjp, nondiff_argnums=(1,))
def with_rule(x: Array, n: int) -> Array:
    return n * x


with_rule.defvjp(lambda x, n: (n * x, None), lambda n, _, g: (n * g,))


class Scale(mu.Param[Array]):
    """A kind of the user's."""


def loss(net: Net, x: Array) -> Array:
    return jnp.sum(net(x))


def with_aux(net: Net, x: Array) -> tuple[Array, dict[str, Array]]:
    return loss(net, x), {"x": x}


def of_dict(params: dict[str, Array]) -> Array:
    return jnp.sum(params["w"])


def square(x: Array) -> Array:
    return x**2


@mu.custom_vjp
def clipped(x: Array, limit: float) -> Array:
    return x


def forward(x: Array, limit: float) -> tuple[Array, float]:
    return x, limit


clipped.defvjp(forward, lambda limit, g: (jnp.clip(g, -limit, limit), 0.0))


def variables(net: Net, x: Array) -> None:
    assert_type(net.w, mu.Param[Array])
    assert_type(net.w.value, Array)
    assert_type(net.calls.value, Array)
    assert_type(net.tables.value, dict[str, Array])
    assert_type(mu.Variable(x).value, Array)
    assert_type(mu.Param(3.0).value, Array)
    assert_type(mu.Param(np.ones(3)), mu.Param[Array])
    assert_type(mu.Hidden(init=lambda: jnp.zeros(3)).value, Array)
    assert_type(Scale(1.0).value, Array)
    assert_type(net.w[0], Array)
    assert_type(net.tables[...], dict[str, Array])
    assert_type(x @ net.w, Array)
    assert_type(2 * net.w, Array)
    net.w.value = 1.0
    net.w.value = jnp.ones(3)
    net.w[...] = jnp.ones(3)
    net.w *= 2


def transforms(net: Net, x: Array, mesh: jax.sharding.Mesh) -> None:
    assert_type(mu.jit(loss)(net, x), Array)
    assert_type(mu.jit(net)(x), Array)
    assert_type(net.step(x, scale=2.0), Array)
    assert_type(net.repeated(x, times=2), tuple[Array, int])
    assert_type(net.sized(), Array)
    # To mypy they are Any.
    print(net.by_partial(x, 2), scaled(x, 3), in_lanes(x), again(x), with_rule(x, 2))
    print(scaled.lower(x, 3).compile()(x), scaled.eval_shape(x, 3))
    print(functools.partial(mu.grad, argnums=0)(square)(x[0]), functools.partial(mu.value_and_grad)(square)(x[0]))
    assert_type(Net.step(net, x), Array)
    assert_type(mu.jit(loss).lower(net, x).compile()(net, x), Array)
    assert_type(mu.vmap(loss, (None, 0))(net, x), Array)
    assert_type(mu.remat(loss)(net, x), Array)
    assert_type(mu.shard_map(loss, mesh=mesh, in_specs=(P(), P()), out_specs=P())(net, x), Array)
    assert_type(clipped(x, 1.0), Array)
    pure, state = mu.functionalize(net)
    assert_type(pure(state, x), tuple[Array, mu.State])


def gradients(net: Net, x: Array) -> None:
    assert_type(mu.grad(loss)(net, x), mu.State)
    assert_type(mu.value_and_grad(loss)(net, x), tuple[Array, mu.State])
    assert_type(mu.grad(with_aux, has_aux=True)(net, x), tuple[mu.State, dict[str, Array]])
    assert_type(mu.value_and_grad(with_aux, has_aux=True)(net, x), tuple[tuple[Array, dict[str, Array]], mu.State])
    assert_type(mu.grad(lambda: loss(net, x), of=net)(), mu.State)
    assert_type(mu.value_and_grad(lambda: loss(net, x), of=net)(), tuple[Array, mu.State])
    assert_type(mu.grad(square)(x[0]), Array)
    assert_type(mu.grad(of_dict)({"w": x}), Any)
    assert_type(mu.jit(mu.grad(loss))(net, x), Any)
    assert_type(mu.grad(mu.grad(square))(x[0]), Array)
    assert_type(mu.grad(mu.jit(loss))(net, x), mu.State)
    assert_type(mu.grad(loss, argnums=1)(net, x), Any)
    print(mu.grad(lambda net: loss(net, x))(net)["w"], 2 * mu.grad(lambda x: jnp.sum(x["w"]))({"w": x})["w"])


def loops(net: Net, x: Array) -> None:
    def body(carry: Array, x: Array) -> tuple[Array, tuple[Array, Array]]:
        return carry + x, (net.w.value, x)

    assert_type(mu.scan(body, x[0], x), tuple[Array, tuple[Array, Array]])
    assert_type(mu.scan(body, 0.0, np.ones(3, "float32")), tuple[Array, tuple[Array, Array]])
    assert_type(mu.scan(lambda _, x: (None, 2 * x), None, x)[0], None)
    assert_type(mu.for_loop(square, x), Array)
    assert_type(mu.for_loop(lambda a, b: (a, b), x, x), tuple[Array, Array])
    assert_type(mu.fori_loop(0, 3, lambda i, c: 2 * c, x), Array)
    assert_type(mu.fori_loop(0, 3, lambda i, c: (c[1], c[0]), (x, x)), tuple[Array, Array])
    assert_type(mu.while_loop(lambda c: jnp.all(c < 9), lambda c: c + 1, x), Array)
    assert_type(mu.cond(True, square, lambda x: x, x), Array)
    assert_type(mu.switch(1, [square, square], x), Array)
    assert_type(mu.map(square, x, batch_size=2), Array)


def states(net: Net, x: Array) -> None:
    assert_type(mu.state(net), mu.State)
    assert_type(mu.state(net, mu.Param), mu.State)
    assert_type(mu.state(net, mu.Param, ...), tuple[mu.State, mu.State])
    definition, params, rest = mu.split(net, mu.Param, ...)
    assert_type(definition, mu.GraphDef[Net])
    assert_type(params, mu.State)
    assert_type(mu.merge(definition, params, rest), Net)
    assert_type(mu.clone(net), Net)
    assert_type(mu.view(net, training=False), Net)
    assert_type(mu.eval_shape(lambda: Net(3)), Net)
    assert_type(mu.eval_shape(loss, net, jax.ShapeDtypeStruct((3,), "float32")), Array)
    assert_type([*mu.modules(net, Net).values()], list[Net])
    optimizer = mu.Optimizer(net, optax.sgd(0.1))
    optimizer.update(mu.grad(loss)(net, x))
    optimizer.update(net, mu.grad(loss)(net, x))


def wrong(net: Net, x: Array) -> None:
    net.w = jnp.ones(3)  # E
    net.w.value = "one"  # E
    jnp.dot(net.w, x)  # E
    net.tables + 1  # E
    mu.jit(loss)(net)  # E
    mu.jit(loss, static_argnum=1)  # E
    mu.jit(net)("x")  # E
    net.step("x")  # E
    net.repeated(x, times="two")  # E
    net.sized(1)  # E
    mu.grad(loss)(x, net)  # E
    mu.value_and_grad(loss)(net, "x")  # E
    mu.vmap(loss)(net)  # E
    mu.remat(loss)(net, 1, 2)  # E
    clipped(x)  # E
    mu.functionalize(net)[0](x)  # E
    mu.scan(square, x, x)  # E
    mu.for_loop(square, x, x)  # E
    mu.fori_loop(0, 3, square, x)  # E
    mu.while_loop(loss, square, x)  # E
    mu.cond(True, square, square, x, x)  # E
    mu.switch(0, [square], "x")  # E
    mu.map(loss, x)  # E
    mu.state(net, mu.Param, ...).flat()  # E
    mu.merge(mu.graphdef(net), 3)  # E
    mu.view(net).missing  # E
    mu.Optimizer(net, optax.sgd(0.1)).update()  # E
