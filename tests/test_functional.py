"""Stateless models: `init` and `apply` beside the same model threaded by hand, under raw JAX, and what they refuse."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mutatis as mu
from mutatis import errors, nn
from mutatis.functional import apply, definition, init

pytestmark = pytest.mark.once  # many alike; what JAX's versions differ in, the twins and traces of transforms show

KEY = jax.random.key(0)
X = jnp.linspace(-1, 1, 6).reshape(3, 2)


class Net(mu.Module):
    """Sizes that wait for the input, statistics, dropout, a state that the first call makes, and a tie."""

    def __init__(self, rngs: mu.Rngs) -> None:
        self.layers = [nn.Linear(None, 4, rngs=rngs), nn.Linear(4, 4, rngs=rngs)]
        self.tied = self.layers[1]
        self.norm = nn.BatchNorm(None, momentum=0.5)
        self.dropout = nn.Dropout(0.5, rngs=rngs)
        self.cache = None

    def __call__(self, x: Any) -> Any:
        x = self.layers[0](x)
        mu.sow(self, "hidden", x)
        x = self.dropout(self.norm(x))
        if self.cache is None:
            self.cache = mu.Cache(jnp.zeros(()))
        self.cache.value += 1
        return self.tied(self.layers[1](x))

    def encode(self, x: Any) -> Any:
        return self.layers[0](x)


def make(rngs: mu.Rngs) -> Net:
    return Net(rngs)


@pytest.fixture
def net() -> Any:
    return mu.eval_shape(lambda: Net(mu.Rngs(0)))


@pytest.fixture
def variables() -> Any:
    return init(make, KEY, X)


@pytest.fixture(autouse=True)
def plain_promotion() -> Any:
    """The twins are written as users write them."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def shapes(tree: Any) -> Any:
    return jax.tree.map(jnp.shape, tree)


PARAMS = {
    "layers": {0: {"bias": (4,), "kernel": (2, 4)}, 1: {"bias": (4,), "kernel": (4, 4)}},
    "norm": {"bias": (4,), "scale": (4,)},
}


# -- init ---------------------------------------------------------------------------------------------------------


def test_init_gives_plain_dictionaries_by_collection(variables: Any) -> None:
    assert shapes(variables) == {
        "batch_stats": {"norm": {"mean": (4,), "var": (4,)}},
        "cache": {"cache": ()},
        "intermediates": {"hidden": ((3, 4),)},
        "params": PARAMS,
    }
    assert all(type(part) is dict for part in (variables, variables["params"], variables["params"]["layers"]))


def test_init_gives_each_state_as_it_starts(variables: Any) -> None:
    np.testing.assert_array_equal(variables["batch_stats"]["norm"]["mean"], jnp.zeros(4))
    np.testing.assert_array_equal(variables["batch_stats"]["norm"]["var"], jnp.ones(4))
    assert variables["cache"]["cache"] == 0


def test_init_draws_what_the_constructor_draws(variables: Any) -> None:
    live = Net(mu.Rngs(KEY))
    live(X)
    np.testing.assert_array_equal(variables["params"]["layers"][0]["kernel"], live.layers[0].kernel)


@pytest.mark.parametrize("rngs", [0, KEY, {"params": 0, "dropout": 1}, {"default": KEY}, mu.Rngs(0)], ids=repr)
def test_init_takes_keys_seeds_and_streams(rngs: Any) -> None:
    assert shapes(init(make, rngs, X)["params"]) == PARAMS


def test_init_without_inputs() -> None:
    variables = init(lambda rngs: nn.Linear(2, 3, rngs=rngs), 0)
    assert shapes(variables) == {"params": {"bias": (3,), "kernel": (2, 3)}}

    class Counter(mu.Module):
        def __init__(self) -> None:
            self.n = mu.Cache(init=lambda: jnp.int32(7))

    assert init(lambda rngs: Counter(), 0) == {"cache": {"n": 7}}
    with pytest.raises(errors.DeferredStateError) as caught:
        init(lambda rngs: nn.Linear(None, 3, rngs=rngs), 0)
    assert caught.value.differences == ("kernel",)


@pytest.mark.parametrize("transform", ["jit", "vmap", "eval_shape", "mu.jit", "mu.vmap"])
def test_init_inside_transforms(transform: str) -> None:
    def f(key: Any) -> Any:
        return init(make, key, X)

    keys = jax.random.split(KEY, 3)
    if transform == "eval_shape":
        assert shapes(jax.eval_shape(f, KEY)["params"]) == PARAMS
    elif "vmap" in transform:
        got = (jax.vmap if transform == "vmap" else mu.vmap)(f)(keys)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-6), got["params"], f(keys[1])["params"])
    else:
        got = (jax.jit if transform == "jit" else mu.jit)(f)(KEY)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, f(KEY))


def test_kinds_of_users_are_collections_of_their_own() -> None:
    class Membrane(mu.Hidden):
        collection = "membrane"

    class Cell(mu.Module):
        def __init__(self) -> None:
            self.v = Membrane(jnp.zeros(2))

        def __call__(self, x: Any) -> Any:
            self.v.value = 0.5 * self.v + x
            return self.v.value

    variables = init(lambda rngs: Cell(), 0)
    assert shapes(variables) == {"membrane": {"v": (2,)}}
    out, updates = apply(mu.eval_shape(Cell), variables, jnp.ones(2), mutable="membrane")
    np.testing.assert_array_equal(updates["membrane"]["v"], out)


# -- apply --------------------------------------------------------------------------------------------------------


def by_hand(variables: Any, x: Any) -> tuple[Any, Any]:
    """The model in evaluation mode, in plain JAX."""
    p, s = variables["params"], variables["batch_stats"]["norm"]

    def linear(p: Any, x: Any) -> Any:
        return x @ p["kernel"] + p["bias"]

    x = linear(p["layers"][0], x)
    x = (x - s["mean"]) / jnp.sqrt(s["var"] + 1e-5) * p["norm"]["scale"] + p["norm"]["bias"]
    return linear(p["layers"][1], linear(p["layers"][1], x)), variables["cache"]["cache"] + 1


def test_apply_beside_threading_by_hand(net: Any, variables: Any) -> None:
    def ours(variables: Any, x: Any) -> Any:
        out, updates = apply(net.eval(), variables, x, mutable=["cache"])
        return out, updates["cache"]["cache"]

    for transform in (lambda f: f, jax.jit, mu.jit, lambda f: jax.vmap(f, (None, 0)), lambda f: mu.vmap(f, (None, 0))):
        x = X[:, None]
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            transform(ours)(variables, x),
            transform(by_hand)(variables, x),
        )

    def loss(f: Any) -> Any:
        return jax.grad(lambda params: f({**variables, "params": params}, X)[0].sum())(variables["params"])

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), loss(ours), loss(by_hand))
    hlo = [jax.jit(f).lower(variables, X).cost_analysis()["flops"] for f in (ours, by_hand)]
    assert abs(hlo[0] - hlo[1]) <= 0.1 * hlo[1]


def test_nothing_else_changes(net: Any, variables: Any) -> None:
    before = str(net), jax.tree.map(np.asarray, variables)
    live = Net(mu.Rngs(0))
    live(X)
    state = mu.state(live)
    for model in (net, live):
        apply(model, variables, X, mutable=True, rngs=0, capture_intermediates=True)
    assert str(net) == before[0]
    jax.tree.map(np.testing.assert_array_equal, variables, before[1])
    assert mu.state(live) == state


@pytest.mark.parametrize(
    ("mutable", "collections"),
    [
        (["batch_stats", "cache"], ["batch_stats", "cache"]),
        (mu.Any("batch_stats", "cache"), ["batch_stats", "cache"]),
        (True, ["batch_stats", "cache", "intermediates", "params"]),
        (mu.Not(mu.Param), ["batch_stats", "cache", "intermediates"]),
        (["batch_stats", "cache", "intermediates"], ["batch_stats", "cache", "intermediates"]),
    ],
    ids=str,
)
def test_mutable(net: Any, variables: Any, mutable: Any, collections: list[str]) -> None:
    _, updates = apply(net, variables, X, mutable=mutable, rngs={"dropout": KEY})
    assert list(updates) == collections
    assert updates["cache"]["cache"] == 1
    assert not np.allclose(updates["batch_stats"]["norm"]["mean"], 0)
    if "intermediates" in collections:
        assert len(updates["intermediates"]["hidden"]) == 1, "and not the one that `init` gave"


def test_updates_can_be_merged_and_go_on(net: Any, variables: Any) -> None:
    for _ in range(3):
        _, updates = apply(net, variables, X, mutable=["batch_stats", "cache"], rngs=1)
        variables = variables | updates
    assert variables["cache"]["cache"] == 3


@pytest.mark.parametrize("mutable", [False, [], ["params"]])
def test_a_write_to_what_is_not_mutable_is_refused(net: Any, variables: Any, mutable: Any) -> None:
    with pytest.raises(errors.FrozenStateError, match=r"`norm\.mean` \(BatchStat\).*not mutable"):
        apply(net, variables, X, mutable=mutable, rngs=0)
    with pytest.raises(errors.FrozenStateError, match=r"`cache` \(Cache\)"):
        apply(net.eval(), variables, X, mutable=mutable)


def test_a_state_that_is_made_has_to_be_mutable(net: Any, variables: Any) -> None:
    del variables["cache"], variables["intermediates"]
    with pytest.raises(errors.FrozenStateError, match=r"`cache` .* was made"):
        apply(net.eval(), variables, X)
    out, updates = apply(net.eval(), variables, X, mutable="cache")
    assert updates == {"cache": {"cache": 1}}


def test_what_is_sown_there_is_dropped(net: Any, variables: Any) -> None:
    _, updates = apply(net.eval(), variables, X, mutable="cache")
    assert set(updates) == {"cache"}


def test_missing_and_superfluous_entries_are_all_listed(net: Any, variables: Any) -> None:
    del variables["params"]["norm"], variables["batch_stats"]["norm"]["mean"]
    variables["params"]["layers"][0]["kernle"] = X
    variables["cache"]["other"] = X
    with pytest.raises(errors.StructureError) as caught:
        apply(net, variables, X)
    assert set(caught.value.differences) == {
        "missing:    params: norm.scale",
        "missing:    params: norm.bias",
        "missing:    batch_stats: norm.mean",
        "unexpected: params: layers[0].kernle",
        "unexpected: cache: other",
    }


def test_other_types_are_all_listed() -> None:
    variables = init(lambda rngs: nn.Linear(2, 3, rngs=rngs), 0)
    variables["params"]["kernel"] = jnp.zeros((3, 2))
    variables["params"]["bias"] = jnp.zeros(3, int)
    with pytest.raises(errors.StateTypeError) as caught:
        apply(mu.eval_shape(lambda: nn.Linear(2, 3, rngs=mu.Rngs(0))), variables, X)
    assert len(caught.value.differences) == 2


def test_streams(net: Any, variables: Any) -> None:
    def run(rngs: Any) -> Any:
        return apply(net, variables, X, mutable=True, rngs=rngs)[0]

    np.testing.assert_array_equal(run({"dropout": 1}), run({"dropout": jax.random.key(1), "unused": 3}))
    np.testing.assert_array_equal(run(1), run({"default": 1}))
    assert not np.array_equal(run(1), run(2))
    for rngs in (None, {}, {"params": 0}):
        with pytest.raises(errors.RandomStreamError, match="`dropout` has no key"):
            run(rngs)


def test_stacked_streams_stay_stacked() -> None:
    ensemble = mu.vmap(lambda key: nn.Dropout(0.5, rngs=mu.Rngs(key)))(jax.random.split(KEY, 3))
    out = apply(ensemble, {}, jnp.ones(8), rngs=0, method=lambda m, x: mu.vmap(lambda m: m(x))(m))
    assert len({tuple(row) for row in np.asarray(out).tolist()}) == 3


@pytest.mark.parametrize("method", ["encode", Net.encode, lambda net, x: net.encode(x), Net(mu.Rngs(0)).encode])
def test_methods(net: Any, variables: Any, method: Any) -> None:
    p = variables["params"]["layers"][0]
    np.testing.assert_allclose(apply(net, variables, X, method=method), X @ p["kernel"] + p["bias"], rtol=1e-6)


def test_capture_intermediates(net: Any, variables: Any) -> None:
    out, updates = apply(net.eval(), variables, X, mutable="cache", capture_intermediates=nn.Linear)
    captured = updates["intermediates"]["layers"]
    assert [len(captured[i]["__call__"]) for i in (0, 1)] == [1, 2]
    np.testing.assert_array_equal(captured[1]["__call__"][1], out)
    assert "hidden" in updates["intermediates"], "what is sown, too"
    out, updates = apply(net, variables, X, mutable=True, rngs=0, capture_intermediates=True)
    np.testing.assert_array_equal(updates["intermediates"]["__call__"][0], out)


def test_intermediates_that_a_model_declares_are_states_like_others() -> None:
    class Keeps(mu.Module):
        def __init__(self) -> None:
            self.h = mu.Intermediate(jnp.zeros(()))

        def __call__(self, x: Any) -> Any:
            mu.sow(self, "sown", x)
            self.h.value = x
            return x

    variables = init(lambda rngs: Keeps(), 0, 1.0)
    assert variables == {"intermediates": {"h": 0, "sown": (1,)}}
    for net in (mu.eval_shape(Keeps), definition(lambda rngs: Keeps(), 1.0)):
        _, updates = apply(net, variables, 2.0, mutable="intermediates")
        assert updates == {"intermediates": {"h": 2, "sown": (2,)}}


def test_keys_that_were_written_as_text(net: Any, variables: Any) -> None:
    def text(tree: Any) -> Any:
        return {str(key): text(value) for key, value in tree.items()} if isinstance(tree, dict) else tree

    expected = apply(net.eval(), variables, X, mutable="cache")[0]
    np.testing.assert_array_equal(apply(net.eval(), text(variables), X, mutable="cache")[0], expected)


def test_a_definition_of_a_first_call() -> None:
    class Lazy(mu.Module):
        def __call__(self, x: Any) -> Any:
            if not hasattr(self, "layer"):
                self.layer = nn.Linear(x.shape[-1], 2, rngs=mu.Rngs(0))
            return self.layer(x)

    variables = init(lambda rngs: Lazy(), 0, X)
    with pytest.raises(errors.StructureError, match=r"unexpected: params: layer\.kernel"):
        apply(mu.eval_shape(Lazy), variables, X)
    lazy = definition(lambda rngs: Lazy(), jax.ShapeDtypeStruct(X.shape, X.dtype))
    p = variables["params"]["layer"]
    np.testing.assert_allclose(apply(lazy, variables, X), X @ p["kernel"] + p["bias"], rtol=1e-6)


@pytest.mark.parametrize("maker", [jax.eval_shape, mu.eval_shape])
def test_definitions_of_raw_and_of_our_eval_shape(maker: Any, variables: Any) -> None:
    net = maker(lambda: Net(mu.Rngs(0)))
    assert apply(net, variables, X, mutable=True, rngs=0)[1]["cache"]["cache"] == 1


def test_training_with_optax() -> None:
    ctor = lambda rngs: nn.Linear(2, 1, rngs=rngs)  # noqa: E731
    net, variables = mu.eval_shape(lambda: ctor(mu.Rngs(0))), init(ctor, 0)
    y = X @ jnp.array([[1.0], [-2.0]]) + 0.5
    tx = optax.adam(0.1)
    moments = tx.init(variables["params"])

    @jax.jit
    def step(params: Any, moments: Any) -> Any:
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((apply(net, {"params": p}, X) - y) ** 2))(params)
        updates, moments = tx.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, loss

    params = variables["params"]
    for _ in range(300):
        params, moments, loss = step(params, moments)
    assert loss < 1e-3


def test_transforms_inside_an_applied_model() -> None:
    class Deep(mu.Module):
        def __init__(self, rngs: mu.Rngs) -> None:
            self.layers = mu.vmap(lambda key: nn.Linear(2, 2, rngs=mu.Rngs(key)))(jax.random.split(rngs.params(), 3))
            self.calls = mu.Variable(0)

        def __call__(self, x: Any) -> Any:
            def body(x: Any, layer: Any) -> Any:
                self.calls += 1
                return mu.remat(layer)(x), None

            return mu.jit(lambda x: mu.scan(body, x, self.layers)[0])(x)

    ctor = lambda rngs: Deep(rngs)  # noqa: E731
    net, variables = mu.eval_shape(lambda: Deep(mu.Rngs(0))), init(ctor, KEY)

    def hand(p: Any, x: Any) -> Any:
        return jax.lax.scan(lambda x, p: (x @ p["kernel"] + p["bias"], None), x, p)[0].sum()

    def ours(p: Any, x: Any) -> Any:
        out, updates = apply(net, {**variables, "params": {"layers": p}}, x, mutable="variables")
        return out.sum(), updates["variables"]["calls"]

    p = variables["params"]["layers"]
    got, calls = jax.jit(jax.grad(ours, has_aux=True))(p, X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, jax.grad(hand)(p, X))
    assert calls == 3
    with pytest.raises(errors.FrozenStateError, match="`calls`"):
        apply(net, variables, X)


def test_an_exception_leaves_nothing_open(net: Any, variables: Any) -> None:
    with pytest.raises(TypeError):
        apply(net, variables, "text", mutable=True)
    assert mu.Variable(1) + 1 == 2
    assert apply(net.eval(), variables, X, mutable="cache")[1] == {"cache": {"cache": 1}}


def test_a_constructor_that_makes_no_module() -> None:
    with pytest.raises(errors.ArgumentError, match="`ctor` did not make a Module"):
        init(lambda rngs: 3, 0)


def test_keys_that_differ_only_in_their_type() -> None:
    class Table(mu.Module):
        def __init__(self) -> None:
            self.table = {0: mu.Param(1.0), "0": mu.Param(2.0)}

        def __call__(self) -> Any:
            return self.table[0] + 10 * self.table["0"].value

    assert apply(Table(), init(lambda rngs: Table(), 0)) == 21


class Tree(mu.Module):
    def __init__(self) -> None:
        self.tree = mu.Cache({"x": jnp.zeros(())})

    def __call__(self) -> None:
        self.tree.value["x"] = self.tree.value["x"] + 1


def test_a_change_in_place_is_a_write() -> None:
    variables = init(lambda rngs: Tree(), 0)
    with pytest.raises(errors.FrozenStateError, match="`tree`"):
        apply(Tree(), variables)
    assert apply(Tree(), variables, mutable="cache")[1] == {"cache": {"tree": {"x": 1}}}
    assert variables["cache"]["tree"]["x"] == 0


def test_nothing_outside_of_the_model_is_written() -> None:
    count, other, streams = mu.Variable(0), Tree(), mu.Rngs(0)
    variables = init(lambda rngs: Tree(), 0)
    for write in (lambda net: count.set(1), lambda net: other(), lambda net: streams()):
        with pytest.raises(errors.StructureError, match="the model does not hold it"):
            apply(Tree(), variables, method=write, mutable=True)
    apply(Tree(), variables, method=lambda net: setattr(other, "flag", True), mutable=True)
    assert not hasattr(other, "flag") and count == 0 and other.tree.value["x"] == 0

    def scratch(net: Any) -> Any:
        total = mu.Variable(0)
        mu.scan(lambda carry, _: (carry, total.set(total + 1)), None, length=3)
        made = mu.clone(net)
        mu.jit(made)()
        return total.value, made.tree.value["x"]

    assert apply(Tree(), variables, method=scratch) == (3, 1)
    assert jax.jit(lambda variables: apply(Tree(), variables, method=scratch))(variables) == (3, 1)
