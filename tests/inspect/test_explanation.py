"""What `mu.inspect.explain` says of compilations, and the warning when there are many for one reason."""

from __future__ import annotations

import functools
import gc
import re
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import mutatis as mu
from mutatis import errors, nn

X = {"x": jnp.ones((2, 3)), "y": jnp.ones(2)}
scale = 1.0


class Net(mu.Module):
    def __init__(self) -> None:
        self.layers = [nn.Linear(3, 3, rngs=mu.Rngs(i)) for i in range(2)]
        self.dropout = nn.Dropout(0.5, rngs=mu.Rngs(2))
        self.rate = 1
        self.parts = ({"a": 1}, "b")

    def __call__(self, batch: Any) -> Any:
        x = batch["x"]
        for layer in self.layers:
            x = layer(x)
        return self.dropout(x)


def changes(step: Any) -> list[dict[str, tuple[str, str]]]:
    return [dict(compilation.changes) for compilation in mu.inspect.explain(step).compilations]


def shape(net: Net, batch: Any) -> Any:
    return {**batch, "x": jnp.ones((4, 3))}


def dtype(net: Net, batch: Any) -> Any:
    return {**batch, "x": batch["x"].astype(jnp.bfloat16).astype(jnp.float16)}


def attribute(net: Net, batch: Any) -> None:
    net.rate = 2


def mode(net: Net, batch: Any) -> None:
    net.dropout.eval()


def frozen(net: Net, batch: Any) -> None:
    mu.freeze(net.layers[1], mu.Param)


def items(net: Net, batch: Any) -> None:
    net.layers.pop()


def number(net: Net, batch: Any) -> None:
    global scale
    scale = 2.0


def state_shape(net: Net, batch: Any) -> None:
    net.layers[0].bias.value = jnp.zeros((1, 3))


def keys(net: Net, batch: Any) -> Any:
    return {**batch, "z": jnp.int32(0)}


def inside_a_tuple(net: Net, batch: Any) -> None:
    net.parts = (net.parts[0], "c")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (shape, {"batch['x']": ("float32[2,3]", "float32[4,3]")}),
        (dtype, {"batch['x']": ("float32[2,3]", "float16[2,3]")}),
        (attribute, {"net.rate": ("1", "2")}),
        (mode, {"net.dropout.training": ("True", "False")}),
        (number, {"scale": ("1.0", "2.0")}),
        (inside_a_tuple, {"net.parts[1]": ("'b'", "'c'")}),
        (state_shape, {"net.layers[0].bias": ("Param float32[3]", "Param float32[1,3]")}),
        (
            frozen,
            {
                "net.layers[1].bias": ("Param float32[3]", "Param float32[3] frozen"),
                "net.layers[1].kernel": ("Param float32[3,3]", "Param float32[3,3] frozen"),
            },
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_differed(change: Callable[[Net, Any], Any], expected: dict[str, Any], monkeypatch: Any) -> None:
    monkeypatch.setitem(globals(), "scale", 1.0)
    net, batch = Net(), X
    step = mu.jit(lambda net, batch: net(batch).sum() * scale)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        step(net, batch)
        step(net, change(net, batch) or batch)
    assert changes(step) == [{}, expected]


@pytest.mark.parametrize(("change", "path"), [(items, "net.layers"), (keys, "batch['z']")])
def test_what_is_more_or_less(change: Callable[[Net, Any], Any], path: str) -> None:
    net, batch = Net(), X
    step = mu.jit(lambda net, batch: net(batch).sum())
    step(net, batch)
    step(net, change(net, batch) or batch)
    assert path in changes(step)[1]


def test_compared_with_the_nearest() -> None:
    net, step = Net(), mu.jit(lambda net, batch: net(batch).sum())
    step(net, X)
    net.eval()
    step(net, X)
    net.train()
    step(net, {**X, "x": jnp.ones((4, 3))})
    first, second, third = mu.inspect.explain(step).compilations
    assert (first.nearest, second.nearest, third.nearest) == (None, 1, 1)
    assert first.tracing > 0 and first.compiling > 0
    text = str(mu.inspect.explain(step))
    assert "3 compilations" in text
    assert "compared with 1:\n     batch['x']: float32[2,3] -> float32[4,3]" in text


def test_calls_that_compile_nothing_are_not_listed() -> None:
    step = mu.jit(lambda net, batch: net(batch).sum())
    for net in (Net(), Net()):
        step(net, X)
        step(net, X)
    assert len(mu.inspect.explain(step).compilations) == 1


def test_contexts_and_static_arguments() -> None:
    dt = mu.Context("dt", 1.0)
    step = mu.jit(lambda x, how: x * dt.get(), static_argnames="how")
    with jax.numpy_dtype_promotion("standard"):
        step(1.0, how="a")
        step(1.0, how="b")
        with dt.set(2.0):
            step(1.0, how="b")
    _, second, third = changes(step)
    assert second == {"how": ("'a'", "'b'")}
    assert third["context dt"] == ("nothing", "2.0")


def test_a_warning_when_one_thing_compiles_again_and_again() -> None:
    step = mu.jit(lambda net, batch: net(batch).sum())
    net = Net()

    def rates() -> None:
        for rate in range(10, 18):
            net.rate = rate
            step(net, X)

    def sizes() -> None:
        for size in range(3, 9):
            step(net, {**X, "x": jnp.ones((size, 3))})

    step(net, X)
    with pytest.warns(errors.RecompilationWarning, match=r"`net.rate` was another: 1, 10, 11.*mu.Variable") as caught:
        rates()
    assert len(caught) == 1, "once"
    assert caught[0].filename == __file__
    with pytest.warns(errors.RecompilationWarning, match=r"batch\['x'\]` was another: float32\[2,3\].*Pad it"):
        sizes()


def test_a_long_explanation_is_shown_on_a_screen_and_folds() -> None:
    step = mu.jit(lambda x, how: x * len(how))
    with jax.numpy_dtype_promotion("standard"):
        for number in range(25):
            step = mu.jit(step.__wrapped__, static_argnames="how") if not number else step
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", errors.RecompilationWarning)
                step(1.0, how=f"<{number}>")
    explanation = mu.inspect.explain(step)
    lines = repr(explanation).splitlines()
    assert len(lines) == 40 and ": 25 compilations, traced in " in lines[0]
    assert "... " in lines[6] and "'<23>' -> '<24>'" in lines[-1]
    page = explanation._repr_html_()
    assert "&lt;24&gt;" in page and "<24>" not in page and page.count("<details") == 25


def test_a_log_keeps_nothing_alive() -> None:
    net = Net()
    step = mu.jit(lambda net, batch: net(batch).sum())
    step(net, X)
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None
    assert len(mu.inspect.explain(step).compilations) == 1


def test_methods_and_what_is_not_jitted() -> None:
    class Counter(mu.Module):
        def __init__(self) -> None:
            self.n = mu.Variable(0)

        @mu.jit
        def step(self) -> None:
            self.n += 1

    counter = Counter()
    counter.step()
    assert len(mu.inspect.explain(counter.step).compilations) == 1
    for wrong in (len, mu.grad(lambda x: x), 3):
        with pytest.raises(errors.ArgumentError, match=r"mu\.jit"):
            mu.inspect.explain(wrong)


# -- values with others inside ------------------------------------------------------------------------------------


OPTIMIZERS: dict[str, tuple[Callable[[float], Any], str]] = {
    "a rate": (optax.adam, "step_size` was another: -1.0, -2.0"),
    "a schedule": (lambda rate: optax.adam(optax.cosine_decay_schedule(rate, 10)), "init_value` was another: 1.0, 2.0"),
    "two settings": (
        lambda rate: optax.chain(optax.clip(rate), optax.adamw(rate, weight_decay=rate)),
        "`opt.tx` was another, as the last time: `opt.tx.init",
    ),
    "hyperparameters": (lambda rate: optax.inject_hyperparams(optax.adam)(learning_rate=rate), "'learning_rate']` was"),
}


@pytest.fixture
def standard_promotion() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"):  # optax computes float ** int
        yield


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("captured", [False, True])
def test_optimizers_with_other_settings_are_named(name: str, captured: bool) -> None:
    model = nn.Linear(2, 2, rngs=mu.Rngs(0))
    make, text = OPTIMIZERS[name]
    opt = mu.Optimizer(model, make(1.0))

    def train_with(opt: Any, x: Any) -> None:
        opt.update(mu.grad(lambda model: jnp.sum(model(x)))(model))

    step = mu.jit(lambda x: train_with(opt, x)) if captured else mu.jit(train_with)

    def train() -> None:
        for rate in range(1, 8):
            if captured:
                opt.tx = make(float(rate))
                step(jnp.ones(2))
            else:
                step(mu.Optimizer(model, make(float(rate))), jnp.ones(2))

    with pytest.warns(errors.RecompilationWarning, match=re.escape(text)) as caught:
        train()
    (warning,) = [w for w in caught if w.category is errors.RecompilationWarning]
    assert "Make one optimizer and keep it" in str(warning.message)
    for piece in str(warning.message).partition("keep it")[2].split("`")[1::2][:2]:
        assert eval(piece, {"optax": optax})
    explanation = mu.inspect.explain(step)
    assert all(path.startswith("opt.tx.") for entry in explanation.compilations for path in entry.changes)
    assert str(explanation).count("Make one optimizer and keep it") == 1


@pytest.mark.usefixtures("standard_promotion")
def test_optimizers_with_the_same_settings_are_one() -> None:
    model = nn.Linear(2, 2, rngs=mu.Rngs(0))
    step = mu.jit(lambda model, opt, x: opt.update(mu.grad(lambda model: jnp.sum(model(x)))(model)))
    for _ in range(7):
        step(model, mu.Optimizer(model, optax.adam(1e-3)), jnp.ones(2))
    assert len(mu.inspect.explain(step).compilations) == 1


def test_functions_among_static_arguments_and_attributes_are_looked_into() -> None:
    def scaled(by: Any) -> Callable[[Any], Any]:
        return lambda x: x * by["scale"][0]

    step = mu.jit(lambda f, x: f(x), static_argnums=0)
    for by in (1.0, 2.0):
        step(functools.partial(scaled({"scale": [by]})), jnp.ones(2))
    assert changes(step)[1]["f.by['scale'][0]"] == ("1.0", "2.0")

    def itself(n: int = 3) -> Any:
        return itself, n

    step = mu.jit(lambda f, x: x, static_argnums=0)
    step(itself, jnp.ones(2))
    assert len(changes(step)) == 1
