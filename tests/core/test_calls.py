"""Tracebacks that leave the library: the user's lines, and neither ours nor those of JAX that only called us."""

from __future__ import annotations

import os
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import mutatis as mu
from mutatis import errors
from mutatis.core.naming import PACKAGE


def change(net: Any) -> Any:
    def body(x: Any) -> Any:
        net.w.value = jnp.zeros(3)
        return x

    return body


def files(error: BaseException) -> list[str]:
    return [frame.filename for frame in traceback.extract_tb(error.__traceback__)]


@pytest.mark.parametrize(
    "call",
    [
        lambda net: mu.for_loop(change(net), jnp.ones(3)),
        lambda net: mu.jit(lambda: mu.for_loop(change(net), jnp.ones(3)))(),
    ],
    ids=["loop", "loop in jit"],
)
def test_the_last_line_is_not_one_of_jax(call: Any) -> None:
    net: Any = mu.Module()
    net.w = mu.Param(jnp.zeros(2))
    with pytest.raises(errors.StateTypeError) as caught:
        call(net)
    shown = files(caught.value)
    assert shown[0] == __file__
    assert not shown[-1].startswith(os.path.dirname(jax.__file__) + os.sep)
    assert sum(file.startswith(PACKAGE) for file in shown) <= 2, "one for each function of ours that the user calls"


def test_the_line_that_is_left_of_us_is_marked_as_hidden() -> None:
    def body(x: Any) -> Any:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as caught:
        mu.for_loop(body, jnp.ones(3))
    trace = caught.value.__traceback__
    ours = []
    while trace is not None:
        if trace.tb_frame.f_code.co_filename.startswith(PACKAGE):
            ours.append(trace.tb_frame)
        trace = trace.tb_next
    assert ours and all(frame.f_locals.get("__tracebackhide__") for frame in ours)


def test_everything_is_shown_when_asked_for() -> None:
    net: Any = mu.Module()
    net.w = mu.Param(jnp.zeros(2))
    before = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")
    try:
        with pytest.raises(errors.StateTypeError) as caught:
            mu.for_loop(change(net), jnp.ones(3))
    finally:
        jax.config.update("jax_traceback_filtering", before)
    assert files(caught.value)[-1].startswith(PACKAGE)
