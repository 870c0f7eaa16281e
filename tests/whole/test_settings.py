"""JAX's settings: the twin programs, and random streams, give the same under each of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from tests.whole import test_twins as twins

pytestmark = pytest.mark.once  # many alike; what JAX's versions differ in, the twins and traces of transforms show

SETTINGS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "disable_jit": lambda: jax.disable_jit(),
    "enable_x64": lambda: jax.enable_x64(True),
    "standard dtype promotion": lambda: jax.numpy_dtype_promotion("standard"),
    "rank promotion": lambda: jax.numpy_rank_promotion("allow"),
    "checking_leaks": lambda: jax.checking_leaks(),
}
AROUND = ["eager", "jit of the model", "jit of a closure", "functionalized", "transposed twice"]


def all_programs() -> list[Any]:
    """Each setting with each program in each style of call; by default one style for each, all others are slow."""

    def chosen(i: int, j: int, k: int) -> bool:
        return (i + j) % len(AROUND) == k and [*SETTINGS][i] != "debug_infs"

    return [
        pytest.param(setting, name, around, marks=() if chosen(i, j, k) else pytest.mark.slow)
        for i, setting in enumerate(SETTINGS)
        for j, name in enumerate(twins.PAIRS)
        for k, around in enumerate(AROUND)
    ]


@pytest.mark.parametrize(("setting", "name", "around"), all_programs())
def test_twins_under(setting: str, name: str, around: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, state = twins.Model(), twins.start()  # before the setting, which may be about the dtypes of new arrays
    monkeypatch.setattr(twins, "Model", lambda: model)
    monkeypatch.setattr(twins, "start", lambda: state)
    with SETTINGS[setting]():
        twins.test_twins(name, around)
    assert {path[0]: value.dtype for path, value in mu.state(model).flat().items()} == {
        name: value.dtype for name, value in state.items()
    }


@pytest.mark.parametrize("inner", SETTINGS)
def test_a_setting_is_switched_on_between_calls(inner: str) -> None:
    """One jitted function, before, under and after a setting."""
    model, state = twins.Model(), twins.start()
    step = mu.jit(twins.step)
    for setting in (contextlib.nullcontext, SETTINGS[inner], contextlib.nullcontext):
        with setting():
            for _ in range(2):
                expected, state = twins.twin(state, twins.XS[0])
                twins.check(model, step(model, twins.XS[0]), expected, state)


class Double(mu.Module):
    def __init__(self) -> None:
        self.w = mu.Param(np.arange(1.0, 4.0))
        self.n = mu.Variable(0)

    def loss(self, x: Any) -> jax.Array:
        self.n += 1
        return jnp.sum(self.w.value**2 * x)


def test_states_in_double_precision() -> None:
    with jax.enable_x64(True):
        model = Double()
        assert (model.w.dtype, model.n.dtype) == (jnp.float64, jnp.int64)
        third = np.float64(1) / 3
        tight = {"rtol": 1e-15, "atol": 0}
        for run in (lambda f: f, mu.jit):
            np.testing.assert_allclose(run(lambda x: model.loss(x))(third), 14 * third, **tight)
            grads = run(lambda x: mu.grad(lambda m: m.loss(x))(model))(third)
            np.testing.assert_allclose(grads["w"], 2 * third * np.arange(1.0, 4.0), **tight)
            losses = run(lambda: mu.for_loop(lambda x: model.loss(x), third * jnp.arange(2.0)))()
            np.testing.assert_allclose(losses, [0, 14 * third], **tight)
            lanes = run(lambda: mu.vmap(lambda x: mu.remat(model.loss)(x))(third * jnp.arange(2.0)))()
            np.testing.assert_allclose(lanes, [0, 14 * third], **tight)
        assert int(model.n) == 2 * 5
        assert (model.w.dtype, model.n.dtype) == (jnp.float64, jnp.int64)


def test_states_of_both_precisions_in_one_program() -> None:
    """A model that was made under the setting is stepped on without it, and the other way round."""
    with jax.enable_x64(True):
        wide = Double()
    narrow = Double()
    step = mu.jit(lambda model: (model.loss(model.w.value), None)[1])
    with jax.enable_x64(True):
        step(wide)
        step(narrow)
    assert (wide.n.dtype, narrow.n.dtype) == (jnp.int64, jnp.int32)
    assert (wide.w.dtype, narrow.w.dtype) == (jnp.float64, jnp.float32)
    assert int(wide.n) == int(narrow.n) == 1


# -- random keys ----------------------------------------------------------------------------------------------

KEYS: dict[str, Callable[[], Any]] = {
    "seed": lambda: 7,
    "typed": lambda: jax.random.key(7),
    "untyped": lambda: jax.random.PRNGKey(7),
}


class Noisy(mu.Module):
    def __init__(self, rngs: mu.Rngs) -> None:
        self.w = mu.Param(jnp.ones(3))
        self.rngs = rngs

    def __call__(self) -> jax.Array:
        return jnp.sum(self.w.value * jax.random.normal(self.rngs.noise(), (3,), jnp.float32))


DRAWS: dict[str, Callable[[Noisy], Any]] = {
    "eager": lambda m: m(),
    "jit": lambda m: mu.jit(lambda m: m())(m),
    "grad": lambda m: mu.grad(lambda m: m())(m)["w"],
    "for_loop": lambda m: mu.for_loop(lambda _: m(), jnp.arange(2)),
    "cond": lambda m: mu.cond(True, lambda: m(), lambda: jnp.float32(0)),
    "remat": lambda m: mu.grad(lambda m: mu.remat(lambda m: m())(m))(m)["w"],
    "vmap": lambda m: mu.vmap(lambda _: m())(jnp.arange(2)),
}


def expected_draws(name: str) -> Any:
    key = jax.random.key(7)

    def draw(key: Any, count: int) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, count), (3,))

    if name in ("grad", "remat"):
        return draw(key, 0)
    if name == "for_loop":
        return jnp.stack([draw(key, 0).sum(), draw(key, 1).sum()])
    if name == "vmap":
        lanes = [jax.random.fold_in(jax.random.fold_in(key, 0), lane) for lane in range(2)]
        return jnp.stack([draw(lane, 0).sum() for lane in lanes])
    return draw(key, 0).sum()


@pytest.mark.parametrize(
    ("setting", "kind"),
    [
        pytest.param(setting, kind, marks=() if i % len(KEYS) == j else pytest.mark.slow)
        for i, setting in enumerate(SETTINGS)
        for j, kind in enumerate(KEYS)
    ],
)
def test_random_streams_under(setting: str, kind: str) -> None:
    for name, draws in DRAWS.items():
        model = Noisy(mu.Rngs(noise=KEYS[kind]()))
        expected = expected_draws(name)
        with SETTINGS[setting]():
            out = jax.tree.leaves(draws(model))[0]
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6, err_msg=name)
        count = model.rngs.stream("noise").value["count"]
        assert count.dtype == jnp.uint32
        assert int(count) == (2 if name == "for_loop" else 1), name


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_streams_of_each_implementation(implementation: str) -> None:
    key = jax.random.key(7, impl=implementation)
    rngs = mu.Rngs(key)
    draw = mu.jit(lambda: jax.random.normal(rngs()))
    for count in range(3):
        np.testing.assert_allclose(draw(), jax.random.normal(jax.random.fold_in(key, count)), rtol=1e-6)
    with jax.default_prng_impl(implementation):
        again = mu.Rngs(7)
        untyped = mu.Rngs(jax.random.PRNGKey(7))
        assert bool(jnp.all(jax.random.key_data(again()) == jax.random.key_data(untyped())))
