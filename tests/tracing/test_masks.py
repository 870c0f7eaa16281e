"""Checks in branches and loops under `vmap`: what a lane does not take is not checked for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis.errors import CheckError


def checked_log(x: Any) -> Any:
    mu.error_if(x <= 0, "not positive")
    return jnp.log(x)


def doubled_up_to(end: Any, limit: Any, **options: Any) -> Any:
    """Doubles 1.0 while it is below `end`; above `limit` it must not be."""
    seen = mu.Variable(1.0)

    def body(x: Any) -> Any:
        mu.error_if(seen.value > limit, "not positive")
        seen.value *= 2.0
        return x * 2.0

    return mu.while_loop(lambda x: x < end, body, 1.0, **options)


def in_both(x: Any, f: Callable[[Any], Any]) -> Any:
    return mu.cond(x > 0, lambda: f(x), lambda: 0.0)


kept_jit, kept_raw_jit = mu.jit(checked_log), jax.jit(checked_log)

# Programs of one lane: the second argument decides whether what the lane takes is checked well.
ONE_LANE: dict[str, Callable[[Any, Any], Any]] = {
    "cond": lambda x, y: mu.cond(x > 0, lambda: checked_log(x * y), lambda: 0.0),
    "cond, the other": lambda x, y: mu.cond(x <= 0, lambda: 0.0, lambda: checked_log(x * y)),
    "cond of a number": lambda x, y: mu.cond(jnp.where(x > 0, 3, 0), lambda: checked_log(x * y), lambda: 0.0),
    "switch": lambda x, y: mu.switch(jnp.where(x > 0, 7, 0), [lambda: 0.0, lambda: 1.0, lambda: checked_log(x * y)]),
    "switch below": lambda x, y: mu.switch(jnp.where(x > 0, -3, 1), [lambda: checked_log(x * y), lambda: 1.0]),
    "cond in cond": lambda x, y: in_both(
        x, lambda x: mu.cond(y < 0.5, lambda: checked_log(x * y), lambda: checked_log(x))
    ),
    "cond in cond, both": lambda x, y: mu.cond(
        y < 9.0, lambda: mu.cond(x > 0, lambda: checked_log(x * y), lambda: 0.0), lambda: checked_log(-1.0)
    ),
    "jit": mu.jit(lambda x, y: in_both(x, lambda x: checked_log(x * y))),
    "jit inside": lambda x, y: in_both(x, lambda x: kept_jit(x * y)),
    "raw jit inside": lambda x, y: in_both(x, lambda x: kept_raw_jit(x * y)),
    "raw checkpoint inside": lambda x, y: in_both(x, lambda x: jax.checkpoint(checked_log)(x * y)),
    "raw cond inside": lambda x, y: in_both(x, lambda x: jax.lax.cond(y < 9.0, checked_log, lambda z: z, x * y)),
    "remat inside": lambda x, y: in_both(x, lambda x: mu.remat(checked_log)(x * y)),
    "vmap inside": lambda x, y: in_both(x, lambda x: mu.vmap(checked_log)(jnp.stack([x, x * y])).sum()),
    "scan inside": lambda x, y: in_both(x, lambda x: mu.for_loop(checked_log, jnp.stack([x, x * y])).sum()),
    "grad": lambda x, y: mu.grad(lambda x: in_both(x, lambda x: checked_log(x * y)))(x),
    "grad inside": lambda x, y: in_both(x, lambda x: mu.grad(lambda x: checked_log(x * y))(x)),
    "in a scan": lambda x, y: mu.for_loop(
        lambda x: in_both(x, lambda x: checked_log(x * y)), jnp.stack([x, x / 2])
    ).sum(),
    "while_loop": lambda x, y: doubled_up_to(jnp.where(x > 0, 10.0, 1.0), 9.0 * y),
    "while_loop, max_steps": lambda x, y: doubled_up_to(jnp.where(x > 0, 10.0, 1.0), 9.0 * y, max_steps=6),
    "while_loop, compiled": mu.jit(lambda x, y: doubled_up_to(jnp.where(x > 0, 10.0, 1.0), 9.0 * y)),
    "cond in while_loop": lambda x, y: mu.while_loop(
        lambda i: i < 2.0 + x, lambda i: in_both(x, lambda x: checked_log(x * y)) * 0.0 + i + 1.0, 0.0
    ),
    "fori_loop": lambda x, y: mu.fori_loop(
        0, jnp.where(x > 0, 3, 0), lambda i, total: total + checked_log(x * y + i.astype(jnp.float32) * x), 0.0
    ),
}


@pytest.mark.parametrize("name", ONE_LANE)
def test_what_a_lane_does_not_take_is_not_checked(name: str) -> None:
    one, x, y = ONE_LANE[name], jnp.array([1.0, -1.0, 2.0]), jnp.array([1.0, -1.0, 1.0])
    expected = [one(a, b) for a, b in zip(x, y, strict=True)]
    for lanes in (mu.vmap(one), mu.jit(mu.vmap(one)), jax.vmap(one)):
        np.testing.assert_allclose(lanes(x, y), jnp.stack(expected), rtol=1e-6)
        with pytest.raises(CheckError, match="not positive"):
            lanes(x, y.at[2].set(-1.0))  # a lane that takes it
    with pytest.raises(CheckError, match="not positive"):
        one(x[2], -y[2])


def test_a_branch_without_checks_has_no_mask() -> None:
    x = jnp.ones(3)
    ours = mu.make_jaxpr(mu.vmap(lambda x: mu.cond(x > 0, lambda: jnp.log(x), lambda: x)))(x)
    theirs = jax.make_jaxpr(jax.vmap(lambda x: jax.lax.cond(x > 0, lambda: jnp.log(x), lambda: x)))(x)
    assert [each.primitive for each in ours.jaxpr.eqns] == [each.primitive for each in theirs.jaxpr.eqns]
    traced = []

    def branch(x: jax.Array) -> jax.Array:
        traced.append(x)
        return x

    mu.vmap(lambda x: mu.cond(x > 0, branch, lambda x: -x, x))(x)
    assert len(traced) == 1
