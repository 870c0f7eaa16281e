"""The tree of a model: its `repr`, which is of at most a screen, its whole text, and the HTML and treescope of notebooks."""

from __future__ import annotations

import dataclasses
import html.parser
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mutatis as mu
from mutatis import errors, nn
from mutatis.inspect import tree

VOID = {"meta", "br", "hr", "link", "img", "input"}


class Balanced(html.parser.HTMLParser):
    """Reads HTML and raises where it is not balanced; keeps its tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def html_of(node: Any) -> str:
    """What IPython shows of a module or a State."""
    return str(node._repr_mimebundle_()["text/html"])


class Deep(mu.Module):
    """Two hundred layers, as people write them: in a list, and in turns with functions."""

    def __init__(self, rngs: mu.Rngs) -> None:
        self.layers = [nn.Linear(16, 16, rngs=rngs) for _ in range(200)]
        self.turns = nn.Sequential(*[f for _ in range(100) for f in (nn.Linear(4, 4, rngs=rngs), nn.relu)])
        self.head = nn.Linear(None, 4, rngs=rngs)


class Block(mu.Module):
    """A layer of the user's, whose random stream is one for all of them."""

    def __init__(self, size: int, rate: float = 0.5, *, rngs: mu.Rngs) -> None:
        self.size = size
        self.rate = rate
        self.rngs = rngs
        self.w = mu.Param(jnp.zeros((size, size)))


def wide() -> Any:
    net: Any = mu.Module()
    for number in range(1000):
        setattr(net, f"p{number}", mu.Param(jnp.zeros(number % 7 + 1)))
    return net


def nested() -> Any:
    net = inner = mu.Module()
    for _ in range(300):
        inner.w = mu.Param(jnp.zeros(2))
        inner.inner = mu.Module()
        inner = inner.inner
    return net


def odd() -> Any:
    class Raises:
        def __repr__(self) -> str:
            raise RuntimeError("no")

        @property
        def __name__(self) -> str:
            raise RuntimeError("no")

    class Angry(mu.Module):
        @property
        def answer(self) -> Any:
            raise RuntimeError("no")

        def __repr__(self) -> str:
            raise RuntimeError("no")

    class Pair(NamedTuple):
        a: Any
        b: Any

    net: Any = mu.Module()
    setattr(net, "<script>alert(1)</script>", 1)
    setattr(net, "two\nlines" * 30, "x" * 100_000)
    net.parts = {"<b>": [mu.Param(1.0), ({"deep": mu.Cache(2.0)},)], ("a", 1): 3}
    net.table = mu.static(np.zeros((100, 100)))
    net.nan = float("nan")
    net.raises = mu.static(Raises())
    net.angry = Angry()
    net.angry.w = mu.Param(jnp.zeros(2))
    net.pair = Pair(mu.Param(1.0), None)
    net.me = net
    net.list = [net.angry, net]
    net.list.append(net.list)
    net.numbers = list(range(10_000))
    net.method = net.angry.train
    return net


ODD = {
    "deep": lambda: Deep(mu.Rngs(0)),
    "wide": wide,
    "nested": nested,
    "odd": odd,
    "of different layers": lambda: [mu.Param(jnp.zeros(size + 1)) for size in range(500)],
    "blocks": lambda: [Block(3, rngs=rngs) for rngs in [mu.Rngs(0)] for _ in range(30)],
}


def shown_of(node: Any) -> str:
    return repr(node) if isinstance(node, mu.Module) else repr(tree(node))


@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
def test_a_repr_is_of_at_most_a_screen(make: Any) -> None:
    net = make()
    lines = shown_of(net).split("\n")
    assert len(lines) <= 40 and max(map(len, lines)) <= 120
    assert all(line.isprintable() for line in lines)
    count = mu.inspect.count(net)
    assert f"in {count.states:,} state" in lines[0] or not isinstance(net, mu.Module)
    for depth in (1, 2, None):
        page = Balanced(tree(net, depth)._repr_html_())
        assert "script" not in page.tags and "b" not in page.tags
        assert str(tree(net, depth)) and len(repr(tree(net, depth)).split("\n")) <= 40


def test_two_hundred_layers_are_a_few_lines() -> None:
    net = Deep(mu.Rngs(0))
    assert repr(net).splitlines() == [
        "Deep(  # 56,404 parameters, 225.6 kB in 602 states, 1 deferred",
        "  layers=[200 x Linear(16 -> 16)],  # 400 Param, float32",
        "  turns=Sequential(",
        "    layers=[100 x (Linear(4 -> 4), relu)],  # 200 Param, float32",
        "  ),",
        "  head=Linear(? -> 4),  # 2 Param, float32, 1 deferred",
        ")",
    ]
    mu.freeze(net.layers[7])
    assert "layers=[7 x Linear(16 -> 16), Linear(16 -> 16), 192 x Linear(16 -> 16)]" in repr(net)


def test_what_a_class_says_is_left_out() -> None:
    def factory() -> list[int]:
        raise AssertionError("not to be called")

    @dataclasses.dataclass
    class Data(mu.Module):
        size: int
        rate: float = 0.5
        parts: list[Any] = dataclasses.field(default_factory=list)
        names: tuple[str, ...] = ("a", "b")
        mode: str | None = "x"
        nan: float = float("nan")
        made: Any = dataclasses.field(default_factory=factory)

    assert repr(Data(3, made=1)) == "Data(size=3, made=1)"
    assert repr(Data(3, 0.25, [1], ("a",), None, made=1)) == (
        "Data(size=3, rate=0.25, names=('a',), made=1,\n  parts=[1],\n)"
    )

    class Child(Block):
        kind = "plain"

        def __init__(self, size: int, extra: int = 2, **more: Any) -> None:
            super().__init__(size, **more)
            self.extra = extra
            self.kind = "plain"

    assert repr(Child(2, rngs=mu.Rngs(0))).startswith("Child(size=2,  # 4 parameters, 28 B in 2 states\n")
    assert repr(Child(2, 3, rate=0.1, rngs=mu.Rngs(0))).startswith("Child(size=2, rate=0.1, extra=3,  # ")


def test_layers_are_one_line_and_alone_a_tree() -> None:
    rngs = mu.Rngs(0)
    conv = nn.Conv(3, 16, (3, 3), rngs=rngs)
    lines = repr(nn.Sequential(conv, nn.BatchNorm(16), nn.Linear(16, 4, dtype=jnp.bfloat16, rngs=rngs)))
    assert "Conv(3 -> 16, kernel 3x3), BatchNorm(num_features=16), Linear(16 -> 4, dtype=bfloat16)" in lines
    assert repr(conv).splitlines() == [
        "Conv(3 -> 16, kernel 3x3,  # 448 parameters, 1.8 kB in 2 states",
        "  kernel=Param(float32[3,3,3,16]),",
        "  bias=Param(float32[16]),",
        ")",
    ]


def test_a_repr_of_the_users_own_stands_for_its_module() -> None:
    class Gate(mu.Module):
        def __init__(self, parent: Any = None) -> None:
            self.w = mu.Param(jnp.zeros(3))
            self.parent = parent

        def __repr__(self) -> str:
            return f"Gate of {self.w.shape[0]}" if self.parent is None else f"Gate in {self.parent!r}"

    net: Any = mu.Module()
    net.gates = [Gate() for _ in range(5)]
    assert "  gates=[5 x Gate of 3],  # 5 Param, float32" in repr(net)
    assert "    5 x Gate(  # 15 parameters, 60 B in 5 states" in str(tree(net))
    net.gates += [Gate(net) for _ in range(30)]
    assert len(repr(net).splitlines()) <= 40  # one that asks for the repr of what it is in


def test_what_is_in_two_places_is_named_at_the_second() -> None:
    net: Any = mu.Module()
    net.embed = nn.Linear(2, 2, rngs=mu.Rngs(0))
    net.head = net.embed
    net.tied = {"kernel": net.embed.kernel}
    net.step = mu.jit(net.embed)
    net.back = [net]
    text = repr(net)
    assert "head=<same as embed>," in text and "step=Jitted(<same as embed>)," in text
    assert "tied={'kernel': <same as embed.kernel>}," in text
    assert "back=[<same as the whole Module>]," in text
    assert "6 parameters, 24 B in 2 states" in text


def test_neighbours_that_share_fold_and_say_so() -> None:
    rngs = mu.Rngs(0)
    net: Any = mu.Module()
    net.blocks = [Block(3, rngs=rngs) for _ in range(12)]
    assert "12 x Block(size=3,  # all with one rngs" in repr(net)
    layer = nn.Linear(2, 2, rngs=rngs)
    net.blocks = [layer, layer, layer]
    assert "blocks=[Linear(2 -> 2), 2 x <same as blocks[0]>]," in repr(net)


def test_names_that_differ_by_a_number_are_one() -> None:
    net: Any = mu.Module()
    for number in range(12):
        setattr(net, f"w{number}", mu.Param(jnp.zeros(3)))
    net.gap = {"a1": mu.Param(1), "a2": mu.Param(1), "a4": mu.Param(1)}
    text = repr(net)
    assert "  w0..11=12 x Param(float32[3])," in text
    assert "'a1': Param(int32[]), 'a2': Param(int32[]), 'a4'" in text


def test_states_say_their_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    net: Any = mu.Module()
    net.w = mu.Param(jnp.zeros(3), name="weight", unit="mV")
    net.declared = mu.Param(jnp.zeros((8, 2)), sharding=P("d"))
    mu.freeze(net.w)
    net.eval()
    net.inner = mu.Module().eval()
    text = repr(net)
    assert "w=Param(float32[3], name='weight', frozen, unit='mV')," in text
    assert "declared=Param(float32[8,2], sharding=P('d',))," in text
    assert text.count("training=False") == 1, "what is inside is as what is around it"
    if jax.device_count() >= 4:
        mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
        net.spread = mu.Param(jax.device_put(jnp.zeros((8, 2)), NamedSharding(mesh, P(None, None))))
        assert "spread=Param(float32[8,2], sharding=P(None, None))," in repr(net)


def test_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Deep(mu.Rngs(0))
    net.count = mu.Variable(0)

    def show() -> Any:
        shown.append((repr(net), str(tree(net)), html_of(net)))
        return net.layers[0].bias.value

    shown: list[Any] = []
    assert not any(entry.read for entry in mu.inspect.ledger(lambda: (repr(net), None)[1])().entries)
    with jax.transfer_guard("disallow"):
        outside = repr(net), str(tree(net)), html_of(net)
    mu.jit(show)()
    mu.grad(lambda: show().sum(), of=net.layers[0])()
    mu.vmap(lambda x: show() + x)(jnp.ones((2, 16)))
    mu.for_loop(lambda x: show() + x, jnp.ones((2, 16)))
    assert shown == [outside] * len(shown) and len(shown) >= 4
    for array in jax.tree.leaves(mu.state(net)):
        array.delete()
    assert repr(net) == outside[0]


def test_a_repr_of_shapes_starts_no_device() -> None:
    program = (
        "import mutatis as mu\n"
        "from jax._src import xla_bridge\n"
        "class Net(mu.Module):\n"
        "    def __init__(self):\n"
        "        self.a = [1, {'b': 2.0}]\n"
        "        self.inner = mu.Module()\n"
        "text = repr(Net()), Net()._repr_mimebundle_(), str(mu.inspect.tree(Net()))\n"
        "assert not xla_bridge._backends and 'rich' not in __import__('sys').modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    big = mu.eval_shape(lambda: nn.Linear(100_000, 100_000, rngs=mu.Rngs(0)))
    assert repr(big).startswith("Linear(100000 -> 100000,  # 10,000,100,000 parameters, 40.0 GB in 2 states")


def test_optimizers_and_states_are_of_at_most_a_screen() -> None:
    net = Deep(mu.Rngs(0))
    net.head(jnp.ones((2, 3)))
    optimizer = mu.Optimizer(net, optax.adam(1e-3))
    lines = repr(optimizer).splitlines()
    assert len(lines) <= 40 and "112,834 numbers" in lines[0]
    assert any("'0.mu.layers[0..199].kernel': 200 x OptState(float32[16,16])" in line for line in lines)
    for state in (mu.state(net), mu.state(wide())):
        lines = repr(state).splitlines()
        assert len(lines) <= 40 and " states" in lines[0] and lines[0].startswith("State({  # ")
        Balanced(html_of(state))


def test_depth() -> None:
    net: Any = mu.Module()
    net.a = mu.Module()
    net.a.b = mu.Module()
    net.a.b.w = mu.Param(1.0)
    assert str(tree(net, 1)).splitlines() == [
        "Module(  # 1 parameter, 4 B in 1 state",
        "  a=Module(...),  # 1 Param, float32",
        ")",
    ]
    assert len(str(tree(net, 2)).splitlines()) == 5
    assert len(str(tree(net)).splitlines()) == 7 == len(str(tree(net, 30)).splitlines())
    assert "Param(float32[])" in str(tree(mu.Param(1.0)))
    for depth in (0, -1, 1.5, True):
        with pytest.raises(errors.ArgumentError, match="modules deep"):
            tree(net, depth)  # type: ignore[arg-type]
    with pytest.raises(errors.ArgumentError, match="is not a node"):
        tree(3)


def test_stacked_states_are_told() -> None:
    nets = mu.vmap(lambda rngs: nn.Linear(2, 3, rngs=rngs))(mu.Rngs(0).split(5))
    assert repr(nets).splitlines()[0] == "Linear(2 -> 3,  # 45 parameters, 180 B in 2 states, stacked 5"
    many = mu.vmap(lambda rngs: mu.vmap(lambda rngs: nn.Linear(2, 3, rngs=rngs))(rngs.split(4)))(mu.Rngs(0).split(5))
    assert repr(many).splitlines()[0].endswith("in 2 states, stacked 5 x 4")
    mixed = mu.Module()
    mixed.nets, mixed.alone = nets, mu.Param(1.0)
    assert str(mu.inspect.tree(mixed)).splitlines()[0].endswith("in 3 states, 2 stacked 5")


# -- notebooks -----------------------------------------------------------------------------------------------------


def test_a_notebook_shows_one_thing_that_folds() -> None:
    net = Deep(mu.Rngs(0))
    for node in (net, mu.state(net)):
        bundle = node._repr_mimebundle_()
        assert set(bundle) == {"text/plain", "text/html"} and bundle["text/plain"] == repr(node)
        assert not hasattr(node, "_repr_html_"), "treescope would show it a second time"
        page = Balanced(bundle["text/html"])
        assert "details" in page.tags and "http" not in bundle["text/html"]
    assert "200 x Linear(16 -> 16)" in Balanced(html_of(net)).text


def test_html_of_the_users_own_comes_first() -> None:
    class Own(mu.Module):
        def _repr_html_(self) -> str:
            return "<b>own</b>"

    assert Own()._repr_mimebundle_() == {}


@pytest.mark.filterwarnings("ignore:The chararray class")  # treescope asks NumPy for it
def test_treescope_shows_modules_as_what_they_are() -> None:
    treescope = pytest.importorskip("treescope")
    net: Any = Deep(mu.Rngs(0))
    net.layers = net.layers[:1]
    net.tied, net.me, net.step = net.layers[0].kernel, net, mu.jit(net.layers[0])
    net.marked = mu.Param(jnp.zeros(2), tag="<b>", name="n")
    mu.freeze(net.marked)
    text = treescope.render_to_text(net)
    for part in (
        "Deep(",
        "kernel=Param(",
        "<cyclic reference to Deep",
        "step=Jitted(",
        "name='n'",
        "frozen",
        "deferred",
    ):
        assert part in text
    assert "Rich HTML" not in text and "_made_at" not in text
    assert "State({" in (shown := treescope.render_to_text(mu.state(net))) and "marked: Param <jax.Array" in shown
    assert "late" not in shown and "deferred" in shown
    traced: list[str] = []
    mu.jit(lambda net: traced.append(treescope.render_to_text(net.layers[0])))(net)
    assert "kernel=Param(" in traced[0] and "float32[16,16]" in traced[0]
    assert treescope.render_to_html(net)
