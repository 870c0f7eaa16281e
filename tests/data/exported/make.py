"""Makes `count.mu` beside it; with the command below, without the folders of the machine that makes it.

JAX_HLO_SOURCE_FILE_CANONICALIZATION_REGEX=".*/" python tests/data/exported/make.py  # by JAX 0.10.2 on Python 3.11
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import mutatis as mu


class Count(mu.Module):
    def __init__(self) -> None:
        self.n, self.rngs = mu.Variable(1), mu.Rngs(0)


def step(count: Any, x: jax.Array) -> jax.Array:
    count.n.value += 1
    jax.random.normal(count.rngs())
    return x * count.n.value


if __name__ == "__main__":
    mu.export(step, Count(), jnp.ones(3), path=Path(__file__).parent / "count.mu", platforms=["cpu", "cuda", "tpu"])
