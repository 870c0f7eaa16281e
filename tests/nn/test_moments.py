"""Means and variances under masks, over lanes and groups of them, where numbers cancel, and on explicit axes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import initializers
from jax.sharding import NamedSharding, PartitionSpec

import mutatis as mu
from mutatis import nn
from mutatis.errors import ArgumentError, AxisError, RandomStreamError

pytestmark = pytest.mark.once  # arithmetic of arrays: what JAX's versions differ in, the tests of transforms show

NORMS: dict[str, Any] = {
    "BatchNorm": lambda **options: nn.BatchNorm(4, **options),
    "LayerNorm": lambda **options: nn.LayerNorm(4, **options),
    "RMSNorm": lambda **options: nn.RMSNorm(4, **options),
    "GroupNorm": lambda **options: nn.GroupNorm(4, 2, **options),
    "InstanceNorm": lambda **options: nn.InstanceNorm(4, **options),
}
EACH = pytest.mark.parametrize("name", NORMS)


def noise(*shape: int) -> jax.Array:
    return 3 + 2 * jax.random.normal(jax.random.key(0), shape)


@EACH
@pytest.mark.parametrize("fast", [True, False])
def test_large_means_do_not_cancel(name: str, fast: bool) -> None:
    x = np.asarray(noise(4, 50, 4)) + 1e4 * (name != "RMSNorm")  # which has no mean to subtract
    wanted = NORMS[name]()(jnp.asarray(x - x.mean()) if name != "RMSNorm" else jnp.asarray(x))
    np.testing.assert_allclose(NORMS[name](use_fast_variance=fast)(jnp.asarray(x)), wanted, atol=2e-2)


@EACH
@pytest.mark.parametrize("fast", [True, False])
def test_both_ways_have_the_same_gradient(name: str, fast: bool) -> None:
    def loss(x: jax.Array) -> jax.Array:
        y = NORMS[name](use_fast_variance=fast)(x)
        return jnp.sum(y * jnp.sin(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    x, eps = noise(2, 5, 4), 1e-2
    step = jnp.zeros_like(x).at[0, 0, 0].set(eps)  # the value that the fast way takes its distances from
    np.testing.assert_allclose(jax.grad(loss)(x)[0, 0, 0], (loss(x + step) - loss(x - step)) / (2 * eps), atol=2e-3)


@EACH
def test_what_a_mask_hides_counts_nowhere(name: str) -> None:
    """Padding may be anything, NaN too, and batches that differ in it give the same."""
    mask = (jnp.arange(5) < 3)[None, :, None]
    x = noise(2, 5, 4)
    a, b = NORMS[name](), NORMS[name]()
    shown = a(jnp.where(mask, x, jnp.nan), mask=mask)[:, :3]
    np.testing.assert_allclose(shown, b(x[:, :3]), rtol=1e-5, atol=1e-5)
    assert all(np.allclose(value, mu.state(b)[path], atol=1e-6) for path, value in mu.state(a).flat().items())


def test_lanes_with_unequal_masks() -> None:
    """What counts is every number that is shown, in whichever lane it is."""
    x, mask = noise(6, 4), jnp.arange(6) < jnp.array(4)
    lanes, whole = nn.BatchNorm(4, axis_name="lanes", momentum=0), nn.BatchNorm(4, momentum=0)
    each = mu.vmap(lambda x, mask: lanes(x, mask=mask[:, None]), axis_name="lanes")
    y = each(x.reshape(2, 3, 4), mask.reshape(2, 3))
    np.testing.assert_allclose(y.reshape(6, 4)[:4], whole(x[:4]), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lanes.var, whole.var, rtol=1e-5)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_features_spread_over_lanes(name: str, fast: bool) -> None:
    x = noise(5, 8)
    norm = getattr(nn, name)(4, axis_name="lanes", use_fast_variance=fast)
    y = mu.vmap(norm, in_axes=1, out_axes=1, axis_name="lanes")(x.reshape(5, 2, 4))
    np.testing.assert_allclose(y.reshape(5, 8), getattr(nn, name)(8)(x), rtol=1e-4, atol=1e-5)


@EACH
def test_explicit_axes(name: str) -> None:
    mesh = jax.make_mesh((2, 2), ("x", "y"))
    x = noise(4, 6, 4)
    wanted = NORMS[name]()(x)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("x", None, "y")))
        y = mu.jit(NORMS[name]())(placed)
        assert tuple(jax.typeof(y).sharding.spec) == ("x", None, "y")
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-5)


def test_no_such_lanes() -> None:
    for options in ({}, {"use_scale": False, "use_bias": False}):
        with pytest.raises(AxisError, match=r"(?s)axis `lanes` that does not exist.*axis_name='lanes'\)\(batch\)`"):
            nn.LayerNorm(4, axis_name="lanes", **options)(noise(3, 4))


# -- sizes that are left out, and bad input ------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [lambda f: f, mu.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "InstanceNorm", "GroupNorm"])
def test_size_from_the_first_input(name: str, transform: Any) -> None:
    groups = {"num_groups": 2} if name == "GroupNorm" else {}
    options = {"scale_init": initializers.normal(1.0), **groups}
    waiting, given = (getattr(nn, name)(size, rngs=mu.Rngs(0), **options) for size in (None, 4))
    x = noise(2, 5, 4)
    np.testing.assert_array_equal(transform(waiting)(x), transform(given)(x))
    assert mu.state(waiting) == mu.state(given)


class Net(mu.Module):
    def __init__(self, norm: Any) -> None:
        self.norms = [norm]

    def __call__(self, x: Any, **options: Any) -> Any:
        return self.norms[0](x, **options)


@EACH
@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize(
    ("x", "options", "text"),
    [
        (noise(2, 5, 3), {}, r"4 features along axis -1\n  got:      an input of shape \(2, 5, 3\)"),
        (jnp.ones((2, 5, 4), jnp.int32), {}, r"floats\n  got:      an input of int32\[2,5,4\]"),
        (noise(2, 5, 4), {"mask": jnp.ones((2, 5))}, r"broadcasts to \(2, 5, 4\)\n  got:      shape \(2, 5\)"),
    ],
)
def test_inputs_that_do_not_fit(name: str, bare: bool, x: jax.Array, options: dict[str, Any], text: str) -> None:
    settings = {"use_scale": False} | ({} if name == "RMSNorm" else {"use_bias": False}) if bare else {}
    net = Net(NORMS[name](**settings))
    with pytest.raises(ArgumentError, match=text) as caught:
        mu.jit(lambda net, x: net(x, **options))(net, x)
    assert "et.norms[0]" in str(caught.value).splitlines()[0]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: nn.GroupNorm(4, 3), "divides the 4 features"),
        (lambda: nn.GroupNorm(4), r"(?s)divides the 4 features.*got: +32"),
        (lambda: nn.GroupNorm(4, 2, 2), "either `num_groups` or `group_size`"),
        (lambda: nn.GroupNorm(4, None), "either `num_groups` or `group_size`"),
        (lambda: nn.GroupNorm(None, 3)(noise(2, 4)), "divides the 4 features"),
        (lambda: nn.GroupNorm(4, 2, reduction_axes=1)(noise(2, 3, 4)), "the last one among them"),
        (lambda: nn.InstanceNorm(2, feature_axes=0)(noise(2, 3)), "after the first"),
    ],
)
def test_settings_that_do_not_fit(make: Any, text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        make()


def test_initializers_that_draw_need_streams() -> None:
    with pytest.raises(RandomStreamError, match=r"nn.LayerNorm.*\n.*\n.*\n.*rngs = mu.Rngs\(0\)"):
        nn.LayerNorm(3, bias_init=initializers.normal())


def test_groups_over_all_axes() -> None:
    x = noise(2, 3, 4)
    y = nn.GroupNorm(4, 2, reduction_axes=(0, 1, 2))(x)
    grouped = np.asarray(x).reshape(6, 2, 2)
    mean, var = grouped.mean((0, 2)).repeat(2), grouped.var((0, 2)).repeat(2)
    np.testing.assert_allclose(y, (np.asarray(x) - mean) / np.sqrt(var + 1e-6), rtol=1e-4, atol=1e-5)
