"""Models that several files of tests use. A model that one test is about stands beside that test."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

import mutatis as mu
from mutatis import nn


class Counter(mu.Module):
    """Counts its calls; by how much is static."""

    def __init__(self, n: int = 0) -> None:
        self.n = mu.Variable(n)
        self.step = 1

    def count(self) -> Any:
        self.n += self.step
        return self.n.value

    def __call__(self) -> Any:
        return self.count()


class Scale(mu.Module):
    """One weight, and a count of its calls."""

    def __init__(self, w: float = 2.0) -> None:
        self.w = mu.Param(jnp.float32(w))
        self.calls = mu.Variable(0)

    def __call__(self, x: Any) -> Any:
        self.calls += 1
        return self.w * x


class Running(mu.Module):
    """Weights, a running statistic of what comes out, and a count."""

    def __init__(self, w: Any = (1.0, -2.0, 3.0)) -> None:
        self.w = mu.Param(jnp.asarray(w))
        self.mean = mu.BatchStat(jnp.float32(0))
        self.calls = mu.Variable(0)

    def __call__(self, x: Any) -> Any:
        y = jnp.sum(self.w.value * x)
        self.mean.value = 0.5 * self.mean.value + y
        self.calls += 1
        return y


class Norm(mu.Module):
    """A parameter and a statistic, which `mu.reset` sets back."""

    def __init__(self) -> None:
        self.scale = mu.Param(jnp.ones(2))
        self.mean = mu.BatchStat(jnp.zeros(2), init=jnp.zeros(2))


class Mixed(mu.Module):
    """States in attributes, in a list and in a dictionary, one of them a pytree; a stream; and a flag."""

    def __init__(self) -> None:
        self.w = mu.Param(jnp.arange(3.0))
        self.items = [mu.Variable(0)]
        self.table = {"a": mu.Variable(1)}
        self.tree = mu.Variable({"x": jnp.zeros(2)})
        self.flag = True
        self.rngs = mu.Rngs(0)

    def step(self) -> None:
        self.w.value = self.w * 2
        self.items[0].value += 1
        self.tree.value["x"] = self.tree.value["x"] + 1


class Layers(mu.Module):
    """Real layers, one of them under two names, with statistics, a random stream and a count."""

    def __init__(self, rngs: mu.Rngs, rate: float = 0.5, features: int | None = None) -> None:
        self.layers = [nn.Linear(features, 4, rngs=rngs), nn.BatchNorm(4, momentum=0.9)]
        self.tied = self.layers[0]
        self.drop = nn.Dropout(rate, rngs=rngs)
        self.calls = mu.Cache(0)

    def __call__(self, x: Any) -> Any:
        self.calls += 1
        for layer in self.layers:
            x = layer(x)
        return self.drop(x)

    def features(self, x: Any) -> Any:
        return self.tied(x)
