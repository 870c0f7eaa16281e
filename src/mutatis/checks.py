"""`mu.error_if`: a check inside compiled code, which raises and takes back the whole step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mutatis import _homes
from mutatis.core import checks, naming
from mutatis.core.showing import show_class, show_value
from mutatis.errors import ArgumentError, CheckError
from mutatis.tracing import masks

_CURE = (
    "The states are as they were before the outermost transform or transaction. `mu.inspect.find_nonfinite(step)(*args)` finds "
    "where a NaN comes from, `mu.inspect.history(model)` goes back further."
)


def error_if(pred: ArrayLike, message: str) -> None:
    """Raise an error if a condition holds, in ordinary and in compiled code, and take back all writes of the step.

    In `mu.jit` the call raises, and every state has the value from before the call: the outermost transform or transaction is
    rolled back. A loop ends with the first iteration in which the condition holds. Checks work inside derivatives and `mu.remat`.
    In raw JAX a check raises `jax.errors.JaxRuntimeError` with the same text.

    Under `mu.vmap` one lane is enough. A branch of `mu.cond` or `mu.switch` that a lane does not choose, and an iteration of
    `mu.while_loop` after its last one, are not checked for that lane. In a raw `jax.lax.cond` or `jax.lax.while_loop` under
    `vmap`, and in a rule of `mu.custom_vjp` or `mu.custom_jvp`, they are, because JAX computes them for all lanes.

    A program with checks calls back into Python when one fails. So `mu.jit` waits for its results before it commits, and donates
    no memory, because the old states may be needed again. With ``mu.jit(donate=True)`` it does donate; a step that fails then
    loses the states.

    Args:
      pred: a boolean array of any shape. The check fails if any element is True.
      message: the text of the error, in one line.

    Raises:
      CheckError: the condition holds.
      ArgumentError: `pred` is not boolean, or `message` is not a string.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> total = mu.Variable(1.0)
      >>> @mu.jit
      ... def add(x):
      ...     total.value += x
      ...     mu.error_if(total.value < 0, "the total is negative")
      >>> add(2.0)
      >>> try:
      ...     add(-5.0)
      ... except mu.errors.CheckError as error:
      ...     print(error.problem, float(total))
      the total is negative 3.0
    """
    if not isinstance(message, str):
        raise ArgumentError(
            "a check has no message",
            path="message",
            expected="a text that says what is wrong",
            got=show_class(message),
            cure='`mu.error_if(x < 0, "x is negative")`',
        )
    given: Any = pred
    try:
        pred = jnp.asarray(0.0 if isinstance(given, str | bytes) else given)
    except (TypeError, ValueError):  # what is no array
        pred = jnp.zeros(())
    if pred.dtype != jnp.bool_:
        raise ArgumentError(
            "a check is not a condition",
            path="pred",
            expected="booleans",
            got=show_value(given),
            cure='A comparison gives them: `mu.error_if(jnp.isnan(x), "x is NaN")`.',
        )
    if checks.are_off():
        return
    checked_at = f"checked at: {naming.show_place(naming.caller())}"
    error = CheckError(message, where=naming.where(), differences=[checked_at], cure=_CURE)
    fails, taken = jnp.any(jax.lax.stop_gradient(pred)), masks.taken()
    _check(fails if taken is None else fails & taken, error)


def _check(pred: jax.Array, error: CheckError) -> None:
    try:
        fails = bool(pred)
    except jax.errors.ConcretizationTypeError:
        checks.expect()
        _staged(error)(pred)
        return
    if fails:
        raise error


def _staged(error: CheckError) -> Callable[[jax.Array], jax.Array]:
    """A check of a value that is not known yet."""

    def fail() -> None:
        raise checks.CheckFailed(copy.copy(error))

    def check(pred: jax.Array) -> jax.Array:
        # A call back into Python costs fifty microseconds: only a check that fails makes one.
        jax.lax.cond(pred, lambda: jax.debug.callback(fail), lambda: None)
        return pred

    def all_lanes(size: int, batched: Any, pred: jax.Array) -> tuple[jax.Array, bool]:
        # Not a branch for each lane, which would run both sides.
        _check(jnp.any(pred), error)
        return jnp.bool_(False), False

    batched_at_once: Any = jax.custom_batching.custom_vmap(check)
    batched_at_once.def_vmap(all_lanes)
    return batched_at_once  # type: ignore[no-any-return]


_homes.publish("mutatis", {"error_if": error_if})
