"""Pages: one file, whole, balanced, with nothing from elsewhere and no text of the user's that is HTML."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import mutatis as mu
from mutatis import errors, nn
from mutatis.inspect import page
from tests.inspect.test_trees import ODD, Balanced

X = jnp.ones((2, 4))


class Net(mu.Module):
    """Layers, statistics and names that are HTML."""

    def __init__(self) -> None:
        self.layers = [nn.Linear(4, 4, rngs=mu.Rngs(0)) for _ in range(60)]
        self.norm = nn.BatchNorm(4)
        self.parts = {"</td><script>alert(1)</script>": mu.Param(1.0)}
        self.text = "<img src='http://example.org/x.png'>"

    def __call__(self, x: Any) -> Any:
        for layer in self.layers[:2]:
            x = layer(x)
        return self.norm(x) * self.parts["</td><script>alert(1)</script>"].value


def check(text: str) -> Balanced:
    found = Balanced(text)
    assert not {"script", "img", "link", "iframe", "object", "embed", "a"} & set(found.tags)
    assert not [name for name, _ in found.attributes if name in ("src", "href", "style") or name.startswith("on")]
    assert not re.search(r"url\(|@import|<[^>]*https?:", text)
    return found


def test_a_page_has_all_there_is() -> None:
    net = Net()
    step = mu.jit(lambda net, x: net(x).sum())
    step(net, X)
    step(net, jnp.ones((3, 4)))
    made = page(net, step, net, X)
    found = check(made.html)
    assert found.tags[:4] == ["html", "head", "meta", "meta"] and made.html.startswith("<!DOCTYPE html>")
    for text in (
        "60 x Linear(4 -> 4)",
        "BatchStat",
        "net.norm.mean",
        "cpu:0",
        "reads, writes and carries",
        "2 compilations",
        "x: float32[2,4] -> float32[3,4]",
        str(mu.inspect.count(net)),
        "</td><script>alert(1)</script>",
    ):
        assert text in found.text
    assert "prefers-color-scheme:dark" in made.html and "width=device-width" in made.html
    assert "60 x Linear" in check(made._repr_html_()).text
    assert repr(made) == f"Page('Net', {len(made.html):,} characters)"


def test_a_page_is_written(tmp_path: Path) -> None:
    made = page(Net(), path=tmp_path / "a.html")
    made.save(str(tmp_path / "b.html"))
    assert (tmp_path / "a.html").read_text(encoding="utf-8") == made.html == (tmp_path / "b.html").read_text("utf-8")
    assert "Compilations" not in made.html and "reads, writes" not in made.html


@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
def test_odd_models(make: Any) -> None:
    made = page(make())
    check(made.html)
    assert len(made.html) < 1_000_000


def test_steps_that_are_not_compiled_and_are_not_run() -> None:
    total = mu.Variable(0.0)

    class Holder(mu.Module):
        def __init__(self) -> None:
            self.n = mu.Variable(0)

        @mu.jit
        def step(self, by: Any) -> None:
            self.n += by

    def step(x: Any, *, scale: float) -> None:
        total.value = total + x.sum() * scale

    text = check(page(total, step, jax.ShapeDtypeStruct((3,), jnp.float32), scale=2.0).html).text
    assert "test_steps_that_are_not_compiled_and_are_not_run.step reads" in text and "Compilations" not in text
    assert float(total) == 0
    holder = Holder()
    assert "0 compilations" in check(page(holder, holder.step, 1).html).text
    assert int(holder.n) == 0
    with pytest.raises(errors.ArgumentError, match="cannot be called"):
        page(total, 3)  # type: ignore[arg-type]
    with pytest.raises(errors.ArgumentError, match="is not a node"):
        page(3)


def test_shapes_and_containers() -> None:
    check(page(mu.eval_shape(lambda: nn.Linear(3, 2, rngs=mu.Rngs(0)))).html)
    check(page({"a": mu.Param(1.0), "b": [mu.Cache(2)]}).html)
    check(page(mu.Module()).html)
    check(page(nn.Linear(None, 2, rngs=mu.Rngs(0))).html)
